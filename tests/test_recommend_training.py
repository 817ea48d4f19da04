"""Training the advice: no later day leaks in, every gate can fail, what is published is what was judged."""

from dataclasses import replace
from datetime import date

import numpy as np
import polars as pl
import pytest

from fincoach.data.export import write_snapshot
from fincoach.data.population import generate
from fincoach.evaluate.lineage import NotEnoughData
from fincoach.recommend import training
from fincoach.recommend.cql import load
from fincoach.recommend.dossier import CHAMPION, _losses, _worries, gates, judge
from fincoach.recommend.evidence import (
    LOGGED,
    NOTHING,
    RULES,
    SERVED,
    ModelEvaluator,
    by_group,
    chances_within,
    doubt,
    logged_chances,
    rested_actions,
    segments_in,
    served_policy,
)
from fincoach.recommend.ope import Worth
from fincoach.recommend.rewards import MultiObjectiveReward
from fincoach.recommend.training import HORIZON, Recipe, champion_policy, fit, take_data, train_recommendation
from fincoach.segments import training as segments
from fincoach.serving.actions import ACTION_NAMES, STRATEGY_NAMES, strategy_mask
from fincoach.serving.artifacts import open_version
from fincoach.serving.bandit import BanditState
from fincoach.serving.inference import SegmentationParameters
from fincoach.serving.network import Network
from fincoach.serving.policy import PolicyParameters

DAY = date(2025, 8, 24)
FILES = {
    "enhanced_cql_model.onnx", "enhanced_cql_model.pth", "cql_model.onnx", "cql_model.pth", "policy.json", "bandit_strategies.json", "actions.json",
    "feature_config.json", "segmentation.json", "model_metadata.json", "model_configs/recommendation.json", "validation_reports/recommendation.html",
    "validation_reports/recommendation.json",
}


@pytest.fixture(scope="module")
def population():
    """A small population."""
    return generate(people=250, days=420, seed=3)


@pytest.fixture(scope="module")
def snapshot(population, tmp_path_factory):
    """Its snapshot."""
    return write_snapshot(population.frames, tmp_path_factory.mktemp("snapshot"))


@pytest.fixture(scope="module")
def groups(snapshot):
    """Its segments."""
    recipe = segments.Recipe(DAY)
    return segments.fit(segments.take_data(snapshot, recipe), recipe, "groups-1").parameters


@pytest.fixture(scope="module")
def recipe():
    """A quick one."""
    return Recipe(DAY, segmentation="groups-1", steps=50)


@pytest.fixture(scope="module")
def trained(population, snapshot, recipe, groups):
    """A whole training."""
    return train_recommendation(snapshot, recipe, groups, population.truth)


@pytest.fixture(scope="module")
def data(trained):
    """The log, cut in three."""
    return trained.evidence.data


@pytest.fixture(scope="module")
def good(trained):
    """The evidence with everything in order that a small sample cannot show."""
    win, e = Worth(0.2, 0.02, 0.15, 0.25), trained.evidence
    shown = e.segments.with_columns(gain=pl.lit(0.2), low=pl.lit(0.1), high=pl.lit(0.3))
    return replace(e, deciding=dict.fromkeys(e.deciding, win), segments=shown)


def test_a_version_holds_all_that_serves_and_all_that_is_read(trained, data):
    files = trained.files
    assert set(files) == FILES
    assert PolicyParameters.from_json(files["policy.json"]).actions == ACTION_NAMES
    assert SegmentationParameters.from_json(files["segmentation.json"]).version == PolicyParameters.from_json(files["policy.json"]).segmentation
    assert sum(row[3] for row in BanditState.from_json(files["bandit_strategies.json"]).counts) > 0
    for name, states in (("enhanced_cql_model", data.test.states), ("cql_model", data.test.decisions.states(enhanced=False))):
        q = load(files[f"{name}.pth"]).q(states)
        assert np.allclose(Network(files[f"{name}.onnx"], states.shape[1], 12, states[0])(states), q, atol=1e-4)
    page = files["validation_reports/recommendation.html"].decode()
    assert trained.verdict.headline.split(":")[0] in page
    assert not any(word in page for word in ("<script", 'src="http', "@import"))
    assert {"learned", "people", "verdict", "parent", "snapshot", "as_of", "seed"} <= set(trained.manifest)


def test_outcomes_of_no_part_reach_into_the_next(data):
    learn, choose, test = data.learn, data.choose.decisions, data.test.decisions
    assert learn.day.max() + HORIZON < choose.day.min()
    assert choose.day.max() + HORIZON < test.day.min()
    assert not set(learn.decision_id) & set(choose.decision_id) | set(choose.decision_id) & set(test.decision_id)


def test_what_is_learned_does_not_know_the_test(population, recipe, groups, trained, data, tmp_path):
    """Every answer given in the test's time is turned round, and every purchase of that time doubled: the same bytes are learned."""
    late = pl.lit(data.test.decisions.decided_at.min()).dt.replace_time_zone("UTC")
    turned = pl.when(pl.col("response") == "accepted").then(pl.lit("dismissed")).otherwise(pl.lit("accepted"))
    frames = population.frames | {
        "recommendation_feedback": population.frames["recommendation_feedback"].with_columns(
            response=pl.when(pl.col("received_at") >= late).then(turned).otherwise(pl.col("response"))),
        "transactions": population.frames["transactions"].with_columns(
            amount_minor=pl.when(pl.col("occurred_at") >= late).then(2 * pl.col("amount_minor")).otherwise(pl.col("amount_minor")))}
    other = take_data(write_snapshot(frames, tmp_path), recipe, groups)
    assert (other.test.decisions.parts != data.test.decisions.parts).any()
    one, same = trained.evidence.fitted, fit(other, recipe, "a")
    for name in ("wide", "narrow", "cloning", "filtered"):
        assert getattr(one, name).to_pth() == getattr(same, name).to_pth()
    assert one.bandit.export() == same.bandit.export()


def test_too_little_is_not_learned_from(snapshot, recipe, groups, population, tmp_path):
    with pytest.raises(NotEnoughData, match=r"decisions of 2\d\d people .* needs 1,000,000 of 50"):
        take_data(snapshot, replace(recipe, min_decisions=1_000_000), groups)
    with pytest.raises(NotEnoughData, match="no segmentation serves"):
        take_data(snapshot, recipe, None)
    with pytest.raises(NotEnoughData, match="log for longer"):
        take_data(snapshot, replace(recipe, as_of=date(2024, 10, 15), min_decisions=100), groups)


@pytest.mark.parametrize(("given", "said"), [
    ({"weight_money": -1}, "weight of money"), ({"explore": 1.5}, "explore"), ({"gamma": 2}, "gamma"), ({"min_decisions": 5}, "min_decisions"),
    ({"quiet_from": 30}, "quiet_from"), ({"bandit": "dice"}, "algorithm"), ({"messages_per_week": -1}, "messages_per_week")])
def test_a_recipe_that_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Recipe(DAY, **given)


def test_with_everything_shown_it_is_promoted(good):
    assert judge(good).decision == "promote", [g.name for g in gates(good) if not g.passed]


LOSS = Worth(-0.01, 0.02, -0.05, 0.03)


@pytest.mark.parametrize(("name", "fault"), [
    ("Leaks", lambda e: {"audit": replace(e.audit, changed_by_after=1)}), ("Leaks", lambda e: {"outcomes": (1, 100)}),
    ("Logged probabilities", lambda e: {"chances": e.chances.with_columns(agrees=pl.lit(False))}),
    ("Gain over what was done", lambda e: {"deciding": e.deciding | {"Gain over what was done": LOSS}}),
    ("Gain over what was done", lambda e: {"deciding": e.deciding | {"Gain over what was done": None}}),
    ("Gain while the bandit knows nothing", lambda e: {"deciding": e.deciding | {"Gain while the bandit knows nothing": LOSS}}),
    ("Gain over the champion", lambda e: {"deciding": e.deciding | {"Gain over the champion": LOSS}}),
    ("No segment worse off", lambda e: {"segments": _one_segment(e, low=-0.01)}), ("No segment worse off", lambda e: {"segments": _one_segment(e, gain=None)}),
    ("Limits", lambda e: {"replay": replace(e.replay, violations={"messages in quiet hours": 1})}),
    ("Exact probabilities", lambda e: {"exact": 0.001}), ("Served network", lambda e: {"parity": 0.01})])
def test_every_gate_can_hold_it_back(good, name, fault):
    verdict = judge(replace(good, **fault(good)))
    assert verdict.decision == "hold"
    assert name in verdict.headline


def _one_segment(e, **given):
    """The segments with one of them changed."""
    hit = (pl.col("against") == NOTHING) & (pl.col("group") == e.segments["group"][0])
    return e.segments.with_columns(pl.when(hit).then(pl.lit(v, pl.Float64)).otherwise(pl.col(k)).alias(k) for k, v in given.items())


def test_losses_are_said(good):
    lost = replace(good, versus={RULES: Worth(-0.1, 0.01, -0.12, -0.08), LOGGED: Worth(0.1, 0.01, 0.08, 0.12)})
    assert "**Lost against** rules. Clearly better than logged." in _losses(lost)
    assert any(w["severity"] == "warning" and w["what"] == "Lost against rules" for w in _worries(lost))
    assert "Lost" not in _losses(replace(good, versus={LOGGED: Worth(0.1, 0.01, 0.08, 0.12)}))


def test_what_is_published_is_what_was_judged(trained, data, tmp_path):
    artifact = open_version(tmp_path, "recommendation", trained.publish(tmp_path))
    again = champion_policy(artifact, data.test)
    assert np.allclose(again, trained.evidence.policies[SERVED], atol=1e-9)
    (artifact.path / "policy.json").write_text("{}")
    assert champion_policy(artifact, data.test) is None


def test_an_equal_version_does_not_replace_the_champion(trained, data, recipe):
    policies = trained.evidence.policies
    evaluator = ModelEvaluator(data.test, recipe.reward)
    _, deciding, _ = training._gains(evaluator, policies | {CHAMPION: policies[SERVED]}, "parent")
    gain = deciding["Gain over the champion"]
    assert gain is None or gain.low <= 0
    _, lost, _ = training._gains(evaluator, policies, "parent")  # a champion that cannot be read
    assert lost["Gain over the champion"] is None


def test_a_damaged_champion_blocks_and_says_why(good):
    lost = replace(good, parent="2025-01-01-x", deciding=good.deciding | {"Gain over the champion": None})
    gate = next(g for g in gates(lost) if g.name == "Gain over the champion")
    assert gate.passed is None
    assert "2025-01-01-x cannot be used any more" in gate.meaning
    assert "too little" in next(g for g in gates(replace(lost, champion="2025-01-01-x")) if g.name == gate.name).meaning


def test_a_champion_with_other_actions_cannot_judge(trained, data, tmp_path):
    policy = trained.files["policy.json"].replace(b'"celebrate"', b'"applaud"')
    other = replace(trained, files=trained.files | {"policy.json": policy})
    assert champion_policy(open_version(tmp_path, "recommendation", other.publish(tmp_path)), data.test) is None


def test_probabilities_mixed_up_within_actions_are_noticed(trained, good):
    """They still come to 1 over all, so each action alone looks true: within segments they do not."""
    d = trained.evidence.data.decisions
    mixed_up = d.propensity.copy()
    for a in range(12):
        mixed_up[d.action == a] = np.random.default_rng(a).permutation(mixed_up[d.action == a])
    poisoned = replace(d, propensity=mixed_up)
    assert chances_within(d, segments_in(d))["agrees"].all()
    within = chances_within(poisoned, segments_in(d))
    assert not within["agrees"].all()
    verdict = judge(replace(good, within=within))
    assert verdict.decision == "hold"
    assert "Logged probabilities" in verdict.headline


def test_constant_probabilities_are_noticed(trained, good):
    d = trained.evidence.data.decisions
    chances = logged_chances(replace(d, propensity=np.full(len(d), 1 / 12)))
    assert judge(replace(good, chances=chances)).decision == "hold"


def test_one_person_with_nearly_all_decisions_is_noticed(good):
    d = good.data.decisions
    users = np.where(np.random.default_rng(0).random(len(d)) < 0.9, d.user_id[0], d.user_id)
    assert not any(w["what"] == "One person fills the log" for w in _worries(good))
    found = next(w for w in _worries(replace(good, data=replace(good.data, decisions=replace(d, user_id=users)))) if w["what"] == "One person fills the log")
    assert found["evidence"].startswith("90 %")


@pytest.mark.parametrize("days", [400, -60])
def test_answers_out_of_time_are_not_learned_from(population, recipe, groups, tmp_path, days):
    """Answers of the future, and answers that came before their decisions: nobody took up anything within the horizon."""
    feedback = population.frames["recommendation_feedback"].with_columns(pl.col("received_at") + pl.duration(days=days))
    with pytest.raises(NotEnoughData, match="not one was taken up"):
        take_data(write_snapshot(population.frames | {"recommendation_feedback": feedback}, tmp_path), recipe, groups)


def test_wrong_answers_are_weighed(trained, data, recipe):
    """One yes in ten that was not meant takes a tenth of what answers brought."""
    policy = trained.evidence.policies[SERVED]
    left = doubt(ModelEvaluator(data.test, recipe.reward), policy).left
    answers = ModelEvaluator(data.test, MultiObjectiveReward(0, 0, 1, 0)).estimate(policy)
    assert left[0.0].value - left[0.1].value == pytest.approx(0.1 * recipe.weight_engagement * answers)
    assert trained.evidence.doubt is None  # these few cannot bear the number, so the report has none


def test_people_in_stress_and_out_of_reach(trained, data):
    q, held = trained.evidence.fitted.wide.q(data.test.states), data.test
    assert held.stressed.any()
    p = served_policy(q, held, trained.evidence.fitted.chances, 0.5)
    pushes = strategy_mask(held.decisions.segment_id, held.stressed)[:, STRATEGY_NAMES.index("aggressive")]
    assert not pushes[held.stressed].any()
    assert np.allclose(p[held.stressed].max(1), 1)  # one strategy, its best action, nothing tried out
    assert (p[~held.stressed & ~held.limited].max(1) < 1).mean() > 0.9
    shut = replace(held, limited=np.ones(len(held), bool))
    assert (served_policy(q, shut, trained.evidence.fitted.chances, 0.5)[:, 0] == 1).all()


def test_thin_groups_get_no_number(trained, data, recipe):
    one = data.test.decisions.user_id == data.test.decisions.user_id[0]
    row = by_group(ModelEvaluator(data.test, recipe.reward), trained.evidence.policies[SERVED], {LOGGED: None}, {"one person": one}).row(0, named=True)
    assert row["gain"] is None
    assert row["people"] == 1


def test_the_truth_is_within_the_estimates(trained):
    """On a population the true relevance is known: the intervals of the report hold it for nearly every policy."""
    true = dict(trained.evidence.regret.rows.select("policy", "value").iter_rows())
    inside = [w.low - 0.02 <= true[k] <= w.high + 0.02 for k, w in trained.evidence.relevance.items() if k in true]
    assert not inside or np.mean(inside) >= 0.8


def test_what_was_said_rests_in_what_is_judged(data, recipe):
    """Row by row with another yardstick: an action said to the person in the days before is not allowed, and the policy that is judged never takes it."""
    d = data.decisions
    free, when = rested_actions(d, recipe.limits), d.decided_at.astype("datetime64[us]")
    for i in np.random.default_rng(0).integers(len(d), size=200):
        before = (d.user_id == d.user_id[i]) & (when < when[i]) & (when[i] - when < np.timedelta64(recipe.rest_days, "D")) & (d.action > 0)
        assert set(np.flatnonzero(~free[i])) == set(d.action[before])
    assert (~free).any()
    assert not (data.test.allowed & ~data.test.rested).any()
    never = rested_actions(d, recipe.limits._replace(rest_days=0))
    assert never.all()
