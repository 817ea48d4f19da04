"""Off-policy evaluation: right on average (by enumeration), intervals that cover, refusals that give no number, errors that say what to do."""

import itertools
import json
from functools import partial

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge

from fincoach.data.population import ACTIONS, generate
from fincoach.recommend import ope
from fincoach.recommend.ope import (
    Episodes,
    LeastSquares,
    Log,
    Terms,
    bernstein_lower,
    clipped_ips,
    compare_policies,
    cross_fit,
    direct_method,
    doubly_robust,
    estimates,
    evaluate_episodes,
    evaluate_policy,
    fitted_q,
    fitted_value,
    importance_weights,
    ips,
    lower_bound,
    per_decision,
    sequence_dr,
    snips,
    support,
    switch_dr,
    worth,
)

CHANCE = np.array([[0.1, 0.5, 0.3], [0.7, 0.2, 0.4]])  # of a reward, by situation and action
LOGGED = np.array([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]])
WANTED = np.array([[0.1, 0.8, 0.1], [0.6, 0.1, 0.3]])
TRUTH = float((WANTED * CHANCE).sum(1).mean())


def made(n, seed=0, chance=CHANCE, **more):
    """A log of `n` decisions in two situations, and the wanted policy's probabilities."""
    rng = np.random.default_rng(seed)
    s = rng.integers(0, 2, n)
    a = (LOGGED[s].cumsum(1) < rng.random((n, 1))).sum(1)
    r = (rng.random(n) < chance[s, a]).astype(float)
    return Log(a, r, LOGGED[s, a], 3, contexts=np.eye(2)[s], **more), WANTED[s]


def everything():
    """Every situation, action and reward once, with its probability."""
    rows = [(s, a, r, 0.5 * LOGGED[s, a] * (CHANCE[s, a] if r else 1 - CHANCE[s, a])) for s, a, r in itertools.product(range(2), range(3), (0, 1))]
    s, a, r, p = (np.array(x) for x in zip(*rows, strict=True))
    return s, a, r.astype(float), p


def test_ips_and_doubly_robust_are_right_on_average_with_any_model():
    """The expectation is taken over every possible row, not sampled."""
    s, a, r, p = everything()
    w = importance_weights(a, LOGGED[s, a], WANTED[s])
    assert np.isclose(p @ ips(w, r).top, TRUTH)
    for model in (CHANCE, np.zeros((2, 3)), np.random.default_rng(0).normal(0, 3, (2, 3))):
        assert np.isclose(p @ doubly_robust(w, r, a, WANTED[s], model[s]).top, TRUTH)
    assert np.isclose(p @ direct_method(WANTED[s], CHANCE[s]).top, TRUTH)
    wrong = np.where(LOGGED > 0, 0.4, 0)  # propensities that are wrong: the model saves it, if the model is right
    w = importance_weights(a, wrong[s, a], WANTED[s])
    assert np.isclose(p @ doubly_robust(w, r, a, WANTED[s], CHANCE[s]).top, TRUTH)
    assert not np.isclose(p @ ips(w, r).top, TRUTH, rtol=0.05)


def slowly(log, policy, guess, tau, limit):
    """Every estimator again, row by row."""
    w = [policy[i][a] / log.propensities[i] for i, a in enumerate(log.actions)]
    n, model = len(log), [sum(policy[i][k] * guess[i][k] for k in range(3)) for i in range(len(log))]
    left = [log.rewards[i] - guess[i][log.actions[i]] for i in range(n)]
    return {
        "ips": sum(x * r for x, r in zip(w, log.rewards, strict=True)) / n,
        "clipped": sum(min(x, limit) * r for x, r in zip(w, log.rewards, strict=True)) / n,
        "snips": sum(x * r for x, r in zip(w, log.rewards, strict=True)) / sum(w),
        "direct": sum(model) / n,
        "robust": sum(m + x * e for m, x, e in zip(model, w, left, strict=True)) / n,
        "switch": sum(m + (x * e if x <= tau else 0) for m, x, e in zip(model, w, left, strict=True)) / n,
    }


def test_estimators_equal_a_slow_second_implementation():
    log, policy = made(200, 3)
    guess = np.random.default_rng(1).random((200, 3))
    w = importance_weights(log.actions, log.propensities, policy)
    given_ = (w, log.rewards, log.actions, policy, guess)
    ours = {"ips": ips(w, log.rewards), "clipped": clipped_ips(w, log.rewards, 1.3), "snips": snips(w, log.rewards),
            "direct": direct_method(policy, guess), "robust": doubly_robust(*given_), "switch": switch_dr(*given_, 1.3)}
    for name, value in slowly(log, policy, guess, 1.3, 1.3).items():
        assert np.isclose(ours[name].value, value, rtol=1e-12), name


@pytest.mark.parametrize("situation", ["easy", "rare"])
def test_intervals_cover_the_truth(situation):
    """80 logs. At 95 % fewer than 70 are covered twice in a thousand times; the benchmark has 300 runs a table."""
    chance = CHANCE if situation == "easy" else CHANCE / 6
    truth, n = (WANTED * chance).sum(1).mean(), 500 if situation == "easy" else 1500
    hits = {}
    for seed in range(80):
        log, policy = made(n, seed, chance)
        log, policy = made(n, seed, chance, predictions=cross_fit(log.contexts, log.actions, log.rewards, 3))
        told = evaluate_policy(log, policy, draws=200, seed=seed)
        assert told.verdict == "supported"
        for name, v in (told.estimates | {"chosen": told.value}).items():
            hits.setdefault(name, []).append(v.low <= truth <= v.high)
        assert told.lower < truth
    assert {k for k, v in hits.items() if not any(v)} == {"direct_method"}  # which claims no interval
    for name in set(hits) - {"direct_method"}:
        assert sum(hits[name]) >= 70, (name, sum(hits[name]))


def test_intervals_allow_for_what_was_cut_off():
    """60 logs in which clipping and switching take away a tenth of the weight or more: too low a value, an interval that still covers."""
    skewed = np.array([[0.97, 0.01, 0.02], [0.02, 0.01, 0.97]])
    hits, cut = {}, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        s = rng.integers(0, 2, 400)
        a = (skewed[s].cumsum(1) < rng.random((400, 1))).sum(1)
        log = Log(a, rng.random(400) < CHANCE[s, a], skewed[s, a], 3, predictions=np.full((400, 3), 0.2))
        found = estimates(log, WANTED[s], draws=200, switch_at=5.0)
        cut.append(support(log, WANTED[s]).clipped)
        for name in ("clipped_ips", "switch_dr"):
            hits.setdefault(name, []).append((found[name].low <= TRUTH <= found[name].high, found[name].value < TRUTH))
    assert np.mean(cut) > 0.1
    for name, found in hits.items():
        assert np.mean(found, axis=0)[0] >= 0.93, name
        assert np.mean(found, axis=0)[1] > 0.7, name  # the value itself is too low: its own spread would not cover


def test_an_interval_over_people_is_wider_when_their_answers_agree():
    """Fifty people with thirty rows each, half of them always say yes: fifty answers, not fifteen hundred."""
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(50), 30)
    r = (np.arange(50) % 2)[who].astype(float)
    a = rng.integers(0, 2, 1500)
    log, policy = Log(a, r, np.full(1500, 0.5), 2, units=who), np.tile([0.6, 0.4], (1500, 1))
    alone = worth(ips(importance_weights(a, log.propensities, policy), r))
    together = worth(ips(importance_weights(a, log.propensities, policy), r), who)
    assert 4 < together.error / alone.error < 7
    assert support(log, policy).units == 50
    assert "50" in repr(support(log, policy))
    assert evaluate_policy(log, policy).verdict == "not supported"  # fifty people are under a hundred


def test_bernstein_holds_for_few_rows_and_any_shape():
    """Rare large values: the bound may fail in 5 % of draws at most, here in none of 2,000."""
    rng = np.random.default_rng(0)
    for n, p in ((5, 0.5), (50, 0.02), (500, 0.01)):
        assert np.mean([bernstein_lower(rng.random(n) < p, 0, 1) > p for _ in range(700)]) <= 0.05
    assert bernstein_lower(np.repeat([0.0, 1.0], 5000), 0, 1) > 0.48  # and is no empty promise


def test_lower_bound_holds_where_weights_are_wild():
    wild = np.array([[0.98, 0.01, 0.01], [0.01, 0.01, 0.98]])
    for seed in range(40):
        rng = np.random.default_rng(seed)
        s = rng.integers(0, 2, 300)
        a = (wild[s].cumsum(1) < rng.random((300, 1))).sum(1)
        r = (rng.random(300) < CHANCE[s, a]).astype(float)
        w = importance_weights(a, wild[s, a], WANTED[s])
        assert lower_bound(w, r, (0, 1)) <= TRUTH
        assert lower_bound(w, r - 5, (-5, -4)) <= TRUTH - 5


THIN = {
    "few rows": lambda: made(80, 1),
    "one row decides": lambda: (Log(np.r_[1, np.zeros(999)], np.r_[1, np.arange(999) % 2], np.r_[1e-4, np.full(999, 0.9)], 2), np.tile([0.5, 0.5], (1000, 1))),
    "never logged": lambda: (Log(np.arange(1000) % 2, np.arange(1000) % 3 == 0, np.full(1000, 0.5), 3), np.tile([0.3, 0.3, 0.4], (1000, 1))),
    "no action in common": lambda: (Log(np.zeros(1000), np.arange(1000) % 3 == 0, np.ones(1000), 2), np.tile([0.0, 1.0], (1000, 1))),
    "hardly a yes": lambda: made(2000, 2, CHANCE / 300),
    "wrong propensities": lambda: (Log(np.arange(4000) % 2, np.arange(4000) % 3 == 0, np.full(4000, 0.6), 2), np.tile([0.5, 0.5], (4000, 1))),
}


@pytest.mark.parametrize("name", THIN)
def test_thin_support_is_refused_without_a_number(name):
    """No value anywhere: not in the value, not in the table, not in JSON, not in the card."""
    log, policy = THIN[name]()
    told = evaluate_policy(log, policy)
    assert told.verdict == "not supported"
    assert told.value is None
    assert told.lower is None
    assert told.estimates == {}
    assert told.to_frame().is_empty()
    assert json.loads(json.dumps(told.to_dict()))["value"] is None
    card = told._repr_html_()
    assert "Not supported" in card
    assert "interval" not in card
    compared = compare_policies(log, {"it": policy})
    assert compared.verdicts == {"it": "not supported"}
    assert compared.gains == {}
    assert "Comparison" in compared._repr_html_()


def test_a_comparison_knows_more_than_two_values():
    log, policy = made(2000, 5)
    near = 0.9 * policy + 0.1 / 3
    told = compare_policies(log, {"wanted": policy, "near": near}, baseline="near")
    alone = [evaluate_policy(log, p).value.error for p in (policy, near)]
    assert told.gains["wanted"].error < 0.3 * np.hypot(*alone)
    assert told.to_frame().filter(pl.col("policy") == "near")["verdict"].item() == "baseline"
    hits = []
    for seed in range(60):
        log, policy = made(600, seed)
        gain = compare_policies(log, {"wanted": policy}, draws=300).gains["wanted"]
        hits.append(gain.low <= TRUTH - (LOGGED * CHANCE).sum(1).mean() <= gain.high)
    assert sum(hits) >= 51


BAD = {
    "propensity 0": ({"propensities": [0.5, 0.0]}, "row 1 has the propensity 0"),
    "propensity over 1": ({"propensities": [0.5, 1.01]}, "row 1 has the propensity 1.01"),
    "propensity unknown": ({"propensities": [np.nan, 0.5]}, "propensities of row 0 is unknown"),
    "reward unknown": ({"rewards": [np.nan, 1]}, "rewards of row 0 is unknown"),
    "one row": ({"actions": [0], "rewards": [1], "propensities": [0.5]}, "bring at least two"),
    "one reward": ({"rewards": [1, 1]}, "every reward is 1"),
    "unseen action": ({"actions": [0, 2]}, "number them 0 to 1"),
    "half an action": ({"actions": [0, 0.5]}, "row 1 has the action 0.5"),
    "too few rewards": ({"rewards": [1]}, "2 in all"),
    "out of range": ({"reward_range": (0, 0.5)}, "widen the range"),
    "units": ({"units": [1]}, "units has 1 rows"),
    "predictions": ({"predictions": [[1.0, 2.0]]}, "one column an action"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_logs_are_told_what_to_do(name):
    change, said = BAD[name]
    with pytest.raises(ValueError, match=said):
        Log(**{"actions": [0, 1], "rewards": [0, 1], "propensities": [0.5, 0.5], "n_actions": 2} | change)


@pytest.mark.parametrize(("policy", "said"), [
    ([[0.5, 0.4], [0.5, 0.5]], "row 0 of the policy sums to 0.9"),
    ([[0.5, 0.5], [1.2, -0.2]], "row 1 of the policy sums to 1"),
    ([[0.5, 0.5]], "one row a decision"),
    ([[0.5, np.nan], [0.5, 0.5]], "row 0 holds something unknown"),
    (lambda x: x, "the log has none"),
])
def test_bad_policies_are_told_what_to_do(policy, said):
    log = Log([0, 1], [0, 1], [0.5, 0.5], 2)
    for use in (evaluate_policy, support, estimates):
        with pytest.raises(ValueError, match=said):
            use(log, policy)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(150, 400), st.floats(-5, 5), st.floats(0.1, 20))
def test_units_of_reward_and_order_of_rows_do_not_matter(seed, n, shift, scale):
    """Rewards in cents or euros, rows in any order: the same answer, in the same units."""
    log, policy = made(n, seed)
    order = np.random.default_rng(seed).permutation(n)
    one = evaluate_policy(log, policy, draws=50)
    moved = Log(log.actions[order], shift + scale * log.rewards[order], log.propensities[order], 3, reward_range=(shift, shift + scale))
    other = evaluate_policy(moved, policy[order], draws=50)
    assert one.verdict == other.verdict
    if one.value:
        assert np.isclose(other.value.value, shift + scale * one.value.value)
        assert np.isclose(other.value.error, scale * one.value.error)
        assert np.isclose(other.lower, shift + scale * one.lower)


def test_same_seed_same_answer_and_the_log_is_left_alone():
    log, policy = made(400, 0)
    before = [x.copy() for x in (log.actions, log.rewards, log.propensities, policy)]
    assert repr(evaluate_policy(log, policy, seed=4)) == repr(evaluate_policy(log, policy, seed=4))
    assert all((a == b).all() for a, b in zip(before, (log.actions, log.rewards, log.propensities, policy), strict=True))


def test_the_logs_own_policy_is_worth_what_it_earned():
    log, _ = made(700, 2)
    own = LOGGED[log.contexts.argmax(1)]
    told = evaluate_policy(log, own)
    assert np.isclose(told.value.value, log.rewards.mean())
    assert told.support.effective == 700


def test_cross_fitting_hides_a_person_from_their_own_model():
    """A model that remembers every row predicts nothing about people whose rows it never saw."""
    class Memory:
        def fit(self, x, y):
            self.seen = {tuple(r): v for r, v in zip(x, y, strict=True)}
            return self

        def predict(self, x):
            return np.array([self.seen.get(tuple(r), -1.0) for r in x])

    who = np.repeat(np.arange(40), 5)
    context = who[:, None].astype(float)
    assert (cross_fit(context, np.zeros(200), np.arange(200.0), 2, Memory, units=who) == -1).all()
    assert (cross_fit(context, np.zeros(200), np.arange(200.0), 2, Memory)[:, 0] > -1).mean() > 0.9  # rows apart: it peeks
    with pytest.raises(ValueError, match="9 folds of 4 units"):
        cross_fit(context[:20], np.zeros(20), np.arange(20.0), 2, folds=9, units=who[:20])


@pytest.mark.parametrize("model", [LeastSquares, partial(Ridge, alpha=1.0), partial(LogisticRegression, C=10.0)])
def test_reward_models_learn_which_action_suits_whom(model):
    log, _ = made(4000, 0)
    found = cross_fit(log.contexts, log.actions, log.rewards, 3, model)
    assert np.abs(found - CHANCE[log.contexts.argmax(1)]).max() < 0.1


def test_least_squares_is_ridge():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=60)
    assert np.allclose(LeastSquares(2.0).fit(x, y).predict(x), Ridge(alpha=2.0).fit(x, y).predict(x))


# --- sequences

MOVE = np.array([[[0.8, 0.2], [0.3, 0.7], [0.5, 0.5]], [[0.1, 0.9], [0.6, 0.4], [0.2, 0.8]]])
STEPS, DISCOUNT = 2, 0.9


def backward():
    """Values by step and situation of the wanted policy: (STEPS, 2, 3) of actions."""
    after, out = np.zeros(2), []
    for _ in range(STEPS):
        q = CHANCE + DISCOUNT * MOVE @ after
        after = (WANTED * q).sum(1)
        out.insert(0, q)
    return np.array(out), float(after.mean())


def odds(s, a, r):
    """The chance that the log has this action and reward in this situation."""
    return LOGGED[s, a] * (CHANCE[s, a] if r else 1 - CHANCE[s, a])


def every_path():
    """All paths of two steps as episodes, with their probabilities; states are one of (step, situation)."""
    rows, chances = [], []
    for path in itertools.product(range(2), range(3), (0, 1), range(2), range(3), (0, 1)):
        s, a, r, s2, a2, r2 = path
        chances.append(0.5 * odds(s, a, r) * MOVE[s, a, s2] * odds(s2, a2, r2))
        rows += [(len(chances) - 1, 0, s, a, r), (len(chances) - 1, 1, s2, a2, r2)]
    e, t, s, a, r = np.array(rows).T
    log = Episodes(e, a, r, LOGGED[s, a], 3, states=np.eye(4)[2 * t + s])
    return log, WANTED[s], t, s, np.array(chances)


def test_sequence_estimators_are_right_on_average():
    """Over all 144 paths, weighed by their probability; the doubly robust one with any values."""
    log, policy, t, s, chances = every_path()
    q, truth = backward()
    assert np.isclose(chances.sum(), 1)
    assert np.isclose(chances @ per_decision(log, policy, DISCOUNT).top, truth)
    assert np.isclose(chances @ fitted_value(log, policy, q[t, s]).top, truth)
    for values in (q, np.zeros_like(q), np.random.default_rng(0).normal(0, 2, q.shape)):
        assert np.isclose(chances @ sequence_dr(log, policy, values[t, s], DISCOUNT).top, truth)


def episodes(n, seed):
    """Paths drawn by their probability."""
    log, policy, _, _, chances = every_path()
    drawn = np.random.default_rng(seed).choice(len(chances), n, p=chances)
    rows = (2 * drawn[:, None] + [0, 1]).ravel()
    return Episodes(np.repeat(np.arange(n), 2), log.actions[rows], log.rewards[rows], log.propensities[rows], 3, states=log.states[rows]), policy[rows]


def test_fitted_q_finds_the_values():
    log, policy = episodes(6000, 0)
    found, (q, truth) = fitted_q(log, policy, DISCOUNT), backward()
    at = log.states.argmax(1)
    assert np.abs(found - q.reshape(4, 3)[at]).max() < 0.12
    assert abs(fitted_value(log, policy, found).value - truth) < 0.03


def test_sequence_intervals_cover_the_truth():
    truth, hits = backward()[1], {}
    for seed in range(60):
        log, policy = episodes(700, seed)
        told = evaluate_episodes(log, policy, fitted_q(log, policy, DISCOUNT, folds=2), DISCOUNT, draws=300)
        for name, v in told.estimates.items():
            hits.setdefault(name, []).append(v.low <= truth <= v.high)
        assert told.lower < truth
    assert {k: sum(v) >= 51 for k, v in hits.items()} == {"per_decision": True, "weighted_per_decision": True, "fitted_q": False, "sequence_dr": True}


def test_episodes_may_be_mixed_and_of_any_length():
    """Rows of an episode only have to be in time order; a shuffled log gives the same."""
    rng = np.random.default_rng(3)
    number = rng.integers(0, 90, 500)
    a, r, p = rng.integers(0, 2, 500), rng.random(500), np.full(500, 0.5)
    policy = np.tile([0.3, 0.7], (500, 1))
    order = np.argsort(number, kind="stable")
    one = per_decision(Episodes(number, a, r, p, 2), policy, 0.9)
    other = per_decision(Episodes(number[order], a[order], r[order], p[order], 2), policy[order], 0.9)
    assert np.allclose(one.top, other.top)
    slow = []
    for e in np.unique(number):
        w = total = 0.0
        for t, i in enumerate(np.flatnonzero(number == e)):
            w = (w if t else 1.0) * policy[i, a[i]] / 0.5
            total += 0.9**t * w * r[i]
        slow.append(total)
    assert np.allclose(one.top, slow)


def test_long_episodes_are_refused():
    """Forty steps away from what was logged: the products leave a handful of episodes."""
    rng = np.random.default_rng(0)
    e, a = np.repeat(np.arange(300), 40), rng.integers(0, 2, 12_000)
    told = evaluate_episodes(Episodes(e, a, rng.random(12_000), np.full(12_000, 0.5), 2), np.tile([0.9, 0.1], (12_000, 1)))
    assert told.verdict == "not supported"
    assert told.value is None


def test_values_that_run_away_are_told():
    e = np.repeat(np.arange(50), 4)
    log = Episodes(e, np.tile([0, 1], 100), np.linspace(1, 2, 200), np.full(200, 0.5), 2, states=np.tile([[1.0], [2.0], [4.0], [8.0]], (50, 1)), ended=np.zeros(200, bool))
    with pytest.raises(ValueError, match="run away"):
        fitted_q(log, np.full((200, 2), 0.5), 1.5)


# --- the population

def test_on_the_population_the_log_tells_the_truth():
    """Propensities, feedback and true answers of one population: the policy that advises each person the same is found within its interval."""
    made = generate(250, 100, seed=11)
    history = made.frames["recommendation_history"]
    yes = made.frames["recommendation_feedback"].filter(pl.col("response").is_in(["accepted", "implemented"]))["recommendation_id"]
    rows = history.filter(pl.col("decided_at") < history["decided_at"].max() - pl.duration(days=20))
    actions = rows["action"].replace_strict({a: i for i, a in enumerate(ACTIONS)}).to_numpy()
    log = Log(actions, rows["id"].is_in(yes.to_list()).cast(pl.Float64).to_numpy(), rows["propensity"].to_numpy(), len(ACTIONS), units=rows["user_id"].to_numpy())
    policy = np.tile((np.arange(len(ACTIONS)) > 0) / (len(ACTIONS) - 1), (len(log), 1))
    odds = made.truth["responses"].filter(pl.col("phase") == 0).pivot(on="action", index="user_id", values="probability")
    truth = (policy * rows.select("user_id").join(odds, on="user_id", how="left", maintain_order="left").select(ACTIONS).to_numpy()).sum(1).mean()
    told = evaluate_policy(log, policy)
    assert told.value.low < truth < told.value.high
    assert told.support.units > 200
    assert abs(told.support.mean_weight - 1) < 0.1
    save = evaluate_policy(log, np.tile(np.eye(len(ACTIONS))[1], (len(log), 1)))
    assert save.support.effective < told.support.effective


def test_cards_can_be_saved(tmp_path):
    log, policy = made(400, 0)
    told = evaluate_policy(log, policy, "a <b> policy")
    for card, name in ((told, "value"), (told.support, "support"), (compare_policies(log, {"it": policy}), "comparison")):
        page = card.save(tmp_path / f"{name}.html").read_text()
        assert "<b> policy" not in page
        json.loads(card.save(tmp_path / f"{name}.json").read_text())
        card.save(tmp_path / f"{name}.csv")
    assert Terms(np.array([1.0, 2.0]), np.array([1.0, 1.0])).value == 1.5
    assert set(told.estimates) <= set(ope.NAMES)
