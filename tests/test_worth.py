"""The all-knowing judge fits the answers, and the worth of features: null features earn nothing at the stated rate, planted ones are found, nothing leaks."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.stats import false_discovery_control

from fincoach.data.population import generate
from fincoach.features.state import ENHANCED_NAMES
from fincoach.recommend import worth
from fincoach.recommend.decisions import PARTS, read_decisions
from fincoach.recommend.ope import Log, evaluate_policy
from fincoach.recommend.oracle import (
    BY_STATE,
    DONE,
    KNOWING,
    best_policy,
    calibration,
    learnable,
    regret,
    relevance_table,
    taken_policy,
    true_burden,
    true_phase,
    true_relevance,
    true_reward,
    true_segment,
    true_value,
    true_yes,
)
from fincoach.recommend.worth import (
    EARNS,
    IDLE,
    REPLACEABLE,
    SAME,
    ablation,
    adjusted,
    feature_importance,
    feature_tests,
    feature_worth,
    held_out,
    outcome_correlation,
    prepare,
    select_features,
)

ENGAGEMENT, BURDEN = PARTS.index("engagement"), PARTS.index("burden")


@pytest.fixture(scope="module")
def known():
    """A population, its decisions and their true relevance."""
    population = generate(250, 300, seed=11)
    decisions = read_decisions(population.frames, "2025-04-20")
    return population, decisions, true_relevance(population.truth, decisions)


def test_truth_is_that_of_the_person_the_action_and_the_day(known):
    population, decisions, _ = known
    yes, phase, segment = true_yes(population.truth, decisions), true_phase(population.truth, decisions), true_segment(population.truth, decisions)
    chance = {(u, p, a): x for u, p, a, x in population.truth["responses"].select("user_id", "phase", "action", "probability").rows()}
    changes = {r["user_id"]: r for r in population.truth["changes"].iter_rows(named=True)}
    now = dict(population.truth["segments"].select("user_id", "segment_id").rows())
    for i, u in enumerate(decisions.user_id.tolist()):
        changed = u in changes and decisions.decided_at[i].astype("datetime64[D]") >= np.datetime64(changes[u]["changed_at"])
        assert phase[i] == changed
        assert segment[i] == (changes[u]["from_segment"] if u in changes and not changed else now[u])
        assert yes[i].tolist() == [chance[u, int(changed), a] for a in decisions.actions]
    assert phase.any()
    assert (true_yes(population.truth, replace(decisions, actions=decisions.actions[::-1]))[:, ::-1] == yes).all()


@pytest.mark.parametrize("seed", [21, 22, 23])
def test_judge_fits_the_answers_and_would_notice_if_not(seed):
    population = generate(200, 300, seed=seed)
    decisions = read_decisions(population.frames, "2025-04-20")
    relevance, seen = true_relevance(population.truth, decisions), decisions.parts[:, ENGAGEMENT]
    taken = np.arange(len(decisions)), decisions.action
    assert calibration(relevance[taken], seen).p_value > 1e-3
    assert calibration(np.minimum(relevance[taken] * 1.3, 0.99), seen).p_value < 1e-3
    assert calibration(np.random.default_rng(0).permutation(relevance[taken]), seen).p_value < 1e-6
    burden, message = true_burden(population.truth, decisions)[taken], decisions.action != decisions.actions.index("do_nothing")
    aloud = decisions.parts[:, BURDEN] - 1  # a dismissal
    assert (decisions.parts[~message, BURDEN] == burden[~message]).all()
    assert calibration((burden - 1)[message], aloud[message]).p_value > 1e-3


def test_estimates_from_the_log_agree_with_the_judge(known):
    _, decisions, relevance = known
    n = len(decisions.actions)
    log = decisions.log(decisions.parts[:, ENGAGEMENT], decisions.states())
    for policy in (np.full(relevance.shape, 1 / n), taken_policy(np.full(len(decisions), decisions.actions.index("celebrate")), n), best_policy(relevance)):
        told, truth = evaluate_policy(log, policy).value, true_value(relevance, policy)
        assert abs(told.value - truth.value) < 4 * told.error


def test_values_regret_and_what_is_allowed(known):
    _, decisions, relevance = known
    rng = np.random.default_rng(0)
    allowed = rng.random(relevance.shape) < 0.5
    allowed[:, 0] = True
    told = relevance + rng.normal(0, 0.1, relevance.shape)
    always = taken_policy(np.full(len(decisions), 1), relevance.shape[1])
    rows = {r["policy"]: r for r in regret(relevance, decisions.action, decisions.user_id, {"always": always}, told, allowed).rows.iter_rows(named=True)}
    assert list(rows) == [DONE, "always", BY_STATE, KNOWING]
    assert np.isclose(rows[KNOWING]["value"], np.where(allowed, relevance, -1).max(1).mean())
    assert np.isclose(rows[BY_STATE]["value"], relevance[np.arange(len(told)), np.where(allowed, told, -9).argmax(1)].mean())
    assert np.isclose(rows["always"]["regret_all"], rows[KNOWING]["value"] - relevance[:, 1].mean())
    assert np.isclose(rows["always"]["gain"], relevance[:, 1].mean() / rows[DONE]["value"] - 1)
    assert rows[DONE]["way"] == 0
    assert rows[BY_STATE]["way"] == 1
    assert rows[KNOWING]["regret_all_high"] == 0
    assert rows[DONE]["regret_all_low"] > 0


def test_learnable_is_judged_on_strangers():
    """A number that names the person teaches nothing about others; one that holds the truth teaches all."""
    rng = np.random.default_rng(3)
    people = np.repeat(np.arange(150), 4)
    truth = rng.random((150, 3))[people]
    name = rng.normal(size=(150, 2))[people]
    best_constant = truth.mean(0).max()
    by_name, by_truth = (best_policy(learnable(x, truth, people)) for x in (name, truth))
    assert true_value(truth, by_name).value < best_constant + 0.06
    assert true_value(truth, by_truth).value > truth.max(1).mean() - 0.03
    assert (learnable(name, truth, people) == learnable(name, truth, people)).all()  # the same again


def test_judge_refuses_strangers_in_words(known):
    population, decisions, relevance = known
    with pytest.raises(ValueError, match="knows nothing of the person"):
        true_yes(generate(10, 60, seed=1).truth, decisions)
    with pytest.raises(ValueError, match="knows nothing of the action 'dance'"):
        true_yes(population.truth, replace(decisions, actions=(*decisions.actions[:-1], "dance")))
    with pytest.raises(ValueError, match="give probabilities of all actions"):
        true_value(relevance, relevance[:, :3])
    with pytest.raises(ValueError, match="rows for 10 bins"):
        calibration([0.5] * 50, [1] * 50)
    with pytest.raises(ValueError, match="folds of 2 people"):
        learnable(np.zeros((4, 1)), np.ones((4, 2)), [1, 1, 2, 2])


def test_reward_of_several_parts_has_a_truth(known):
    population, decisions, relevance = known
    weights = np.array([2.0, 1.0, 1.0, -0.1])
    taken = np.arange(len(decisions)), decisions.action
    expected, seen = true_reward(population.truth, decisions, lambda p: p @ weights)[taken], decisions.parts @ weights
    people = np.unique(decisions.user_id, return_inverse=True)[1]
    apart = np.bincount(people, expected - seen)
    assert abs(apart.sum()) < 4 * np.sqrt((apart**2).sum())
    assert np.allclose((expected - seen), (relevance[taken] - decisions.parts[:, ENGAGEMENT]) - 0.1 * (true_burden(population.truth, decisions)[taken] - decisions.parts[:, BURDEN]))


def test_table_of_relevance_has_intervals_over_people(known):
    population, decisions, relevance = known
    segment = true_segment(population.truth, decisions)
    rows = relevance_table(relevance, segment, decisions.user_id, decisions.actions)
    assert len(rows) == 5 * len(decisions.actions)
    one = rows.filter(segment="Goal-Oriented", action="catch_up_goal").row(0, named=True)
    assert np.isclose(one["relevance"], relevance[segment == 2][:, decisions.actions.index("catch_up_goal")].mean())
    assert one["low"] < one["relevance"] < one["high"]


# --- worth

NAMES = ("a", "b", "mood", "noise", "noise_of_person")


def made(seed, people=200, rows=10, effect=1.0, more=0):
    """A log: `a` tells action 1, `b` action 2, `mood` moves all alike; noise by row, by person, and `more` columns of either kind."""
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(people), rows)
    a, b, mood, noise = rng.normal(size=(4, len(unit)))
    extra = [rng.normal(size=people)[unit] if k % 2 else rng.normal(size=len(unit)) for k in range(more)]
    x = np.column_stack([a, b, mood, noise, rng.normal(size=people)[unit], *extra])
    p = np.exp(0.3 * np.column_stack([mood, a, b]))
    p /= p.sum(1, keepdims=True)
    action = (p.cumsum(1) < rng.random((len(p), 1))).sum(1)
    score = -0.8 + rng.normal(0, 0.4, people)[unit] + effect * (0.5 * mood + np.column_stack([0 * a, a, b])[np.arange(len(a)), action])
    reward = (rng.random(len(a)) < 1 / (1 + np.exp(-score))).astype(float)
    return Log(action, reward, p[np.arange(len(p)), action], 3, contexts=x, units=unit), (*NAMES, *(f"extra_{k}" for k in range(more)))


@pytest.mark.parametrize("effect", [0.0, 1.0])
def test_noise_earns_nothing_at_the_stated_rate(effect):
    """With nothing to find, any find at all comes in at most one table of twenty; single p-values are as rare as they say, beside planted effects too."""
    alone, added, any_find, scrambled = [], [], [], []
    for seed in range(40):
        log, names = made(seed, people=120, rows=8, effect=effect, more=10)
        material = prepare(log, names, seed=seed)
        tests = feature_tests(material)
        noise = tests["feature"].is_in(["noise", "noise_of_person", *names[5:]]) | (effect == 0)
        alone.append(tests.filter(noise)["alone_p"].to_numpy())
        added.append(tests.filter(noise)["added_p"].to_numpy())
        any_find.append((worth._either(alone[-1], added[-1]) <= 0.05).any())
        if seed < 8:
            rows = feature_importance(material, draws=2).rows.filter(noise)
            scrambled.append([(rows["p"].to_numpy() <= 0.05).mean(), (rows["value_p"].cast(pl.Float64).fill_null(1).to_numpy() <= 0.05).mean()])
    assert 0.02 < np.mean(np.array(alone) <= 0.05) < 0.08
    assert 0.02 < np.mean(np.array(added) <= 0.05) < 0.08
    assert np.mean(any_find) <= 0.15  # 6 of 40: at 5 % the chance of more is .003
    assert np.mean(scrambled, axis=0).max() < 0.085  # never over the rate, allowing for 96 to 120 draws


def test_planted_effects_are_found():
    for seed in range(5):
        log, names = made(100 + seed)
        found = feature_worth(log, names, ("wait", "one", "two"))
        assert {"a", "b", "mood"} <= set(found.named(EARNS))
        rows = {r["feature"]: r for r in found.rows.iter_rows(named=True)}
        assert (rows["a"]["action"], rows["b"]["action"]) == ("one", "two")
        assert rows["a"]["loss_low"] > 0
        assert rows["a"]["value"] > rows["mood"]["value"]
        assert {"a", "b", "mood"} <= set(found.selection.chosen)
        assert found.selection.no_worse is not False


def test_a_copy_is_replaceable_and_a_constant_never_varies():
    log, names = made(1, people=300)
    x = log.contexts
    log = replace(log, contexts=np.column_stack([x, x[:, 0] + 0.2 * np.random.default_rng(0).normal(size=len(x)), np.ones(len(x))]))
    found = feature_worth(log, (*names, "copy", "one"))
    assert "a" in found.named(EARNS)
    assert "copy" in found.named(REPLACEABLE)
    assert found.named(SAME) == ("one",)
    assert {"noise", "noise_of_person"} & set(found.named(IDLE))
    assert json.dumps(found.to_dict(), allow_nan=False)
    assert "earns nothing" in found.to_html()


def test_a_bend_is_seen_where_a_slope_sees_nothing():
    rng = np.random.default_rng(5)
    unit = np.repeat(np.arange(250), 8)
    x = rng.normal(size=(len(unit), 2))
    reward = (rng.random(len(unit)) < 0.1 + 0.5 * (np.abs(x[:, 0]) < 0.6)).astype(float)
    log = Log(rng.integers(0, 2, len(unit)), reward, np.full(len(unit), 0.5), 2, contexts=x, units=unit)
    rows = outcome_correlation(prepare(log, ("hump", "noise"))).features
    assert rows["q"].min() > 0.01
    assert rows["bend_q"][0] < 1e-6
    assert rows["bend_q"][1] > 0.01


def test_correlation_is_that_of_normal_scores_and_its_interval_covers():
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        unit = np.repeat(np.arange(100), 6)
        person, noise = rng.normal(size=(2, 100))[:, unit]
        x, y = person, 0.5 * person + noise + rng.normal(size=len(unit))  # r = .5 / 1.5
        log = Log(np.zeros(len(unit), int), y, np.ones(len(unit)), 1, contexts=x[:, None], units=unit)
        material = prepare(log, ("x",))
        row = outcome_correlation(material).pairs.row(0, named=True)
        assert np.isclose(row["r"], np.corrcoef(material.scores[:, 0], y)[0, 1])
        inside += row["low"] <= 1 / 3 <= row["high"]
    assert inside >= 88


def test_what_does_not_matter_changes_nothing():
    """Units of numbers, order of rows, names of people, scale of rewards."""
    log, names = made(7)
    tests = feature_tests(prepare(log, names))
    order = np.random.default_rng(0).permutation(len(log))
    shuffled = Log(log.actions[order], 3 * log.rewards[order] - 1, log.propensities[order], 3, contexts=np.exp(log.contexts[order]) * 7, units=log.units[order] + 1000)
    for column in ("alone_p", "added_p", "drop", "drop_low"):
        assert np.allclose(feature_tests(prepare(shuffled, names))[column], tests[column], rtol=1e-6, atol=1e-9)
    assert feature_worth(log, names).rows.equals(feature_worth(log, names).rows)


def test_nothing_leaks_into_the_judged_fold():
    """Outcomes of a fold's people change neither its predictions nor what was chosen for it."""
    log, names = made(9, more=4)
    before = prepare(log, names)
    mine = before.fold == 0
    after = prepare(replace(log, rewards=np.where(mine, 1 - log.rewards, log.rewards)), names)
    assert (after.fold == before.fold).all()
    for features in (None, ["a", "noise"], []):
        assert np.allclose(held_out(before, features)[mine], held_out(after, features)[mine])
        assert not np.allclose(held_out(before, features)[~mine], held_out(after, features)[~mine])
    chosen = [worth._eliminate(m, [1, 2, 3, 4], m.penalty[0]) for m in (before, after)]
    assert chosen[0] == chosen[1]


def test_what_matters_to_a_given_policy_is_what_it_looks_at():
    log, names = made(3)
    material = prepare(log, names)
    by_a = lambda x: np.where((x[:, :1] > 0), [0.1, 0.8, 0.1], [0.1, 0.1, 0.8])  # noqa: E731
    rows = feature_importance(material, by_a).rows
    assert rows.filter(pl.col("feature") != "a")["value"].abs().max() < 1e-12
    assert rows.filter(feature="a")["value_low"][0] > 0


def test_where_the_log_is_thin_there_is_no_value():
    log, names = made(4)
    rare = replace(log, propensities=np.where(log.units == 3, 1e-4, log.propensities))
    material = prepare(rare, names)
    importance, rows = feature_importance(material), ablation(material).rows
    assert importance.reasons
    assert importance.rows["value"].null_count() == len(importance.rows)
    assert rows["why"].null_count() < len(rows)
    assert rows.filter(pl.col("why").is_not_null())["value"].null_count() == rows["why"].count()
    assert select_features(material).no_worse is not True


def test_leaving_out_needs_no_refit():
    """The shortcut of the selection gives what refitting gives, also where an action is missing in a fold."""
    log, names = made(6, people=100, more=4)
    material = prepare(log, names)
    part = material.moments[1:].copy()
    part[1:, 2] = 0
    learn, every = part.sum(0) - part, np.arange(len(names))
    quick = worth._losses_without(learn, part, every, every, 300.0)
    plain = [worth._loss(worth._fit(learn, np.delete(every, j), np.full(4, 300.0)), part) for j in every]
    assert np.allclose(quick.T, plain)


def test_selection_on_noise_takes_nothing_and_loses_nothing():
    sizes = []
    for seed in range(6):
        log, names = made(200 + seed, people=120, rows=8, effect=0.0, more=6)
        found = select_features(prepare(log, names, seed=seed))
        sizes.append(len(found.chosen))
        assert found.told_more.high > 0
    assert np.mean(sizes) < 3


def test_adjusted_is_benjamini_and_hochberg():
    p = np.random.default_rng(0).random(40) ** 3
    assert np.allclose(adjusted(p), false_discovery_control(p))
    assert np.isnan(adjusted([np.nan, 0.5])[0])


def test_mistakes_are_answered_in_words():
    log, names = made(0)
    for wrong, words in ((replace(log, contexts=None), "no contexts or no units"), (replace(log, units=None), "no contexts or no units"),
                         (replace(log, contexts=np.where(log.contexts > 2, np.nan, log.contexts)), "is unknown in some rows"), (replace(log, units=log.units % 9), "20 a fold")):
        with pytest.raises(ValueError, match=words):
            prepare(wrong, names)
    with pytest.raises(ValueError, match="give one column a name"):
        prepare(log, names[:2])
    with pytest.raises(ValueError, match="give booleans"):
        prepare(log, names, np.ones((len(log), 3)))
    with pytest.raises(ValueError, match="no feature 'moon'"):
        ablation(prepare(log, names), {"strange": ["moon"]})


def test_on_decisions_of_a_population(known):
    _, decisions, relevance = known
    log = decisions.log(decisions.parts[:, ENGAGEMENT], decisions.states())
    found = feature_worth(log, ENHANCED_NAMES, decisions.actions)
    assert set(found.rows["feature"]) == set(ENHANCED_NAMES[:17]) | {"segment"} | set(ENHANCED_NAMES[22:])
    assert len(found.named(EARNS)) + len(found.named(REPLACEABLE)) >= 8
    assert "month_position" in found.named(IDLE)  # the calendar has no say in the population's answers
    model = best_policy(held_out(prepare(log, ENHANCED_NAMES)))
    assert true_value(relevance, model).value > 1.3 * true_value(relevance, taken_policy(decisions.action, relevance.shape[1])).value
    assert "weekly state" in repr(found.ablation)
