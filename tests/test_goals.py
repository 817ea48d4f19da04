"""Goals from ledger to answer: nothing of tomorrow counts, probabilities mean what they say, and what is served is what was trained."""

import dataclasses
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT

from fincoach.data.database import connect, load, upgrade
from fincoach.data.export import export_snapshot, write_snapshot
from fincoach.data.population import generate
from fincoach.evaluate.lineage import NotEnoughData
from fincoach.features import goals as g
from fincoach.features.ledger import Ledgers, day_number, ledger
from fincoach.forecast.goal_training import Recipe, case_audit, fit, take_data
from fincoach.forecast.goals import Cases, GoalAchievementClassifier, goal_odds, scores
from fincoach.serving.actions import objections
from fincoach.serving.artifacts import promote, publish
from fincoach.serving.goal_model import GoalModel, GoalParameters
from fincoach.serving.goals import AIM, GoalPredictionService, payment_for
from fincoach.serving.network import NetworkError
from fincoach.serving.segmentation import ServiceError

DAY, ASKED = date(2026, 2, 20), date(2025, 9, 30)


@pytest.fixture(scope="module")
def people():
    return generate(people=550, days=600, seed=11)


@pytest.fixture(scope="module")
def ledgers(people):
    return Ledgers.from_frames(people.frames)


@pytest.fixture(scope="module")
def cases(ledgers):
    return g.goal_cases(ledgers, DAY)


@pytest.fixture(scope="module")
def trained(people, tmp_path_factory):
    snapshot = write_snapshot(people.frames, tmp_path_factory.mktemp("snapshots"))
    recipe = Recipe(DAY, min_people=20, min_goals=60, trees=15)
    data = take_data(snapshot, recipe)
    return snapshot, recipe, data, fit(data, recipe, "2026-02-20-test")


@pytest.fixture(scope="module")
def served(people, trained, tmp_path_factory):
    """A database with the people, a folder with the model, and an open goal."""
    folder, fitted = tmp_path_factory.mktemp("served"), trained[3]
    engine = connect(f"sqlite:///{folder / 'f.db'}")
    upgrade(engine)
    some = people.frames["users"].head(200)["id"].to_list()
    goals = people.frames["financial_goals"].filter(pl.col("user_id").is_in(some))
    frames = {n: people.frames[n].filter(pl.col(k).is_in(some)) for n, k in (("users", "id"), ("user_profiles", "user_id"), ("transactions", "user_id"))}
    puts = people.frames["goal_contributions"].filter(pl.col("goal_id").is_in(goals["id"].to_list()))
    load(engine, frames | {"financial_goals": goals, "goal_contributions": puts})
    publish(folder / "artifacts", "goal", fitted.version, {"goal.json": fitted.parameters.to_json().encode(), "goal_model.onnx": fitted.onnx}, {"as_of": "2026-02-20"})
    promote(folder / "artifacts", "goal", fitted.version)
    at = datetime(2025, 9, 30, tzinfo=UTC)
    alive = goals.filter((pl.col("created_at") < at - timedelta(days=90)) & (pl.col("due_at") > at + timedelta(days=60)) & (pl.col("closed_at").is_null() | (pl.col("closed_at") > at)))
    return engine, folder / "artifacts", alive


def test_months_are_those_of_the_calendar():
    for d in np.random.default_rng(0).integers(0, 60_000, 500).tolist():
        day = date.fromordinal(d + 719_163)
        month, of_month = g._month_of(d)
        assert (month // 12, month % 12 + 1, of_month) == (day.year, day.month, day.day)
        assert g._first_of(month) == day_number(day.replace(day=1))


def test_payments_against_plain_python():
    """Months with a payday are counted, several payments in a month are one, and silence is a zero."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        start = date(2025, 1, 1) + timedelta(days=int(rng.integers(0, 28)))
        puts = sorted((0, date(2025, int(m), 10), int(rng.integers(100, 900))) for m in rng.choice(np.arange(2, 12), rng.integers(1, 8), replace=False))
        person = ledger([("2025-01-01", "", "salary", 100)], goals=[(start.isoformat(), "2025-12-31", None, 100_000)], puts=[(n, d.isoformat(), a) for n, d, a in puts])
        paid, by_month = np.zeros(602), {d.month: a for _, d, a in puts}
        months, given, taken = g._payments(person, 0, day_number(date(2025, 11, 30)), paid)
        wanted = [by_month.get(m, 0) for m in range(1, 12) if m in by_month or start < date(2025, m, 10)]
        assert paid[:months].tolist() == wanted
        assert (given, taken) == (sum(by_month.values()), 0)


def test_nothing_of_tomorrow_counts(cases, ledgers):
    """Later payments, closings and transactions may be anything."""
    rng = np.random.default_rng(1)
    for r in rng.choice(len(cases), 60, replace=False).tolist():
        person, day = ledgers.person(int(cases.person[r])), int(cases.day[r])
        puts, goals, amount = person.puts.copy(), person.goals.copy(), person.amount.copy()
        late = puts[:, 1] > day
        puts[late, 2] = rng.integers(-(10**6), 10**6, late.sum())
        goals[goals[:, 3] > day, 3] = day + 1 + rng.integers(0, 50)
        amount[person.day > day] *= -7
        changed = person._replace(puts=puts, goals=goals, amount=amount)
        x = g.goal_numbers(changed, int(cases.own[r]), date.fromordinal(day + 719_163))
        np.testing.assert_array_equal(x, cases.X[r])


def test_cases_and_outcomes_against_the_tables(people, ledgers, cases):
    goals = people.frames["financial_goals"].sort("user_id", "id")
    paid = people.frames["goal_contributions"].group_by("goal_id").agg(pl.col("amount_minor").cum_sum().max().alias("most"))
    most = goals.select("id", "target_minor").join(paid, left_on="id", right_on="goal_id", how="left")
    reached = dict(zip(most["id"], (most["most"] >= most["target_minor"]).fill_null(False), strict=True))
    known = cases.take(cases.due <= day_number(DAY))
    told = np.array([reached[goals["id"][i]] for i in known.goal.tolist()])
    assert (told == known.reached).all()
    assert 0.3 < known.reached.mean() < 0.6
    assert (cases.X[:, 0] < 1).all()
    planned = [len(g.month_ends(ledgers.goals[i, 1], ledgers.goals[i, 2] - 1)) for i in cases.goal.tolist()]
    np.testing.assert_allclose(cases.weight, 1 / np.array(planned))


def test_counting_agrees_with_drawing():
    rng = np.random.default_rng(0)
    for paid, months, left, rest in ((6, 8, 6, 40_000), (2, 8, 10, 30_000), (9, 9, 5, 52_000), (1, 6, 3, 20_000)):
        p = rng.beta(paid + 2.4, months - paid + 1.6, 20_000)
        came = ((rng.random((20_000, left)) < p[:, None]) * 10_000 * np.maximum(1 + 0.2 * rng.standard_normal((20_000, left)), 0)).sum(1)
        assert abs(g._outlook(paid, months, left, float(rest), 10_000.0, 0.2) - (came >= rest).mean()) < 0.1


def test_planted_odds_come_true(people, ledgers, cases):
    """The oracle's odds are frequencies: in four bands what was said and what came agree."""
    known = cases.take(cases.due <= day_number(DAY))
    odds = goal_odds(people.frames["financial_goals"], people.truth, known, ledgers, runs=150)
    for said in odds:
        for low in (0.0, 0.25, 0.5, 0.75):
            band = (said >= low) & (said <= low + 0.25)
            goals = len(np.unique(known.goal[band]))
            w = known.weight[band]
            assert abs(np.average(known.reached[band], weights=w) - np.average(said[band], weights=w)) < 2.6 * 0.5 / np.sqrt(goals) + 0.02
    ours = scores(Cases(known.X, known.reached, known.weight, known.user_id), odds.true, 0)
    assert ours["skill"].value > 0.5


def test_no_skill_where_there_is_nothing_to_learn():
    rng = np.random.default_rng(5)
    cases = Cases(rng.standard_normal((800, 6)), rng.random(800) < 0.6, np.ones(800), rng.integers(0, 300, 800), tuple("abcdef"))
    model = GoalAchievementClassifier.fit(cases, trees=20)
    assert scores(cases, model.p_out, 0)["skill"].value < 0.02


def test_outcomes_are_counted_not_cases(cases):
    """The same goals seen twice make the same trees: leaves are measured in outcomes."""
    known = cases.take(cases.due <= day_number(DAY))
    one = Cases(known.X, known.reached, known.weight, known.user_id, g.GOAL_NAMES)
    two = Cases(*(np.concatenate([a, b]) for a, b in ((known.X, known.X), (known.reached, known.reached), (known.weight / 2, known.weight / 2), (known.user_id, known.user_id))), g.GOAL_NAMES)
    size = [GoalAchievementClassifier.fit(c, g.NEUTRAL, trees=3, k=2).forest.min_samples_leaf for c in (one, two)]
    assert abs(size[1] - 2 * size[0]) <= 1


def test_served_as_trained_and_the_same_again(trained):
    _, recipe, data, fitted = trained
    model = GoalModel(fitted.parameters, fitted.onnx)
    assert np.abs(model(data.known.X).chance - fitted.model.predict(data.known.X)).max() < 1e-5
    again = fit(data, recipe, fitted.version)
    assert again.onnx == fitted.onnx
    assert again.parameters.to_json() == fitted.parameters.to_json() == GoalParameters.from_json(fitted.parameters.to_json()).to_json()


def test_audit_of_cases_sees_a_change_and_no_leak(trained):
    snapshot, recipe, data, _ = trained
    changed, looked, control = case_audit(snapshot, data, recipe, 40)
    assert changed == 0
    assert looked > 1000
    assert control > 100


def test_too_few_goals_say_what_is_missing(trained):
    with pytest.raises(NotEnoughData, match="had come due"):
        take_data(trained[0], Recipe(date(2024, 10, 31)))


def test_cut_in_time_keeps_outcomes_apart(trained):
    data = trained[2]
    assert data.known.due[data.learn].max() <= data.known.day[data.later].min()


def test_hostile_forests_are_refused(trained):
    fitted = trained[3]
    for bad in (fitted.onnx[:-1000], fitted.onnx.replace(b"TreeEnsembleClassifier", b"TreeEnsembleClassifieX"), b"\x00" * 100, fitted.onnx + b"\x3a\x00"):
        with pytest.raises(NetworkError):
            GoalModel(fitted.parameters, bad)


def test_more_money_and_more_time_never_hurt(ledgers, cases):
    for r in np.random.default_rng(2).choice(len(cases), 15, replace=False).tolist():
        look = g.GoalProgressAnalyzer(ledgers.person(int(cases.person[r])), int(cases.own[r]), date.fromordinal(int(cases.day[r]) + 719_163))
        way = look.predict_trajectory()
        assert (np.diff([way.chance(pay=f) for f in (0.5, 1, 1.5, 2, 4)]) >= 0).all()
        assert (np.diff([way.chance(way.due + d) for d in (0, 60, 200, 500)]) >= 0).all()
        assert look.predict_trajectory(regular=True).chance() >= way.chance() - 0.02
        assert (np.diff(way.quantiles(), axis=0) >= 0).all()
        lever = payment_for(look, way, None)
        assert not np.isfinite(lever.value) or lever.chance >= AIM


def test_answers_are_kept_until_something_changes(served):
    engine, artifacts, alive = served
    service = GoalPredictionService(engine, artifacts)
    user, goal = alive.select("user_id", "id").row(0)
    at = datetime(2025, 10, 1, tzinfo=UTC)
    ask = {
        "chance": lambda now: service.predict_goal_achievement(user, goal, ASKED, now=now), "ahead": lambda now: service.analyze_goal_trajectory(user, goal, ASKED, now=now),
        "adjust": lambda now: service.recommend_goal_adjustments(user, goal, ASKED, now=now), "insights": lambda now: service.generate_goal_insights(user, ASKED, now=now)}
    for make in ask.values():
        plain, first, again = make(None), make(at), make(at + timedelta(days=6))
        assert (first.cached, again.cached) == (False, True)
        assert plain == dataclasses.replace(first, made_at=None) == dataclasses.replace(again, cached=False, made_at=None)
        assert not make(at + timedelta(days=8)).cached
    change = ("UPDATE financial_goals SET target_minor = target_minor + 100 WHERE id = :g", "DELETE FROM goal_contributions WHERE id = (SELECT max(id) FROM goal_contributions WHERE goal_id = :g)",
              "UPDATE transactions SET amount_minor = amount_minor - 1 WHERE id = (SELECT max(id) FROM transactions WHERE user_id = (SELECT user_id FROM financial_goals WHERE id = :g))")
    later = at + timedelta(days=8, hours=1)
    for statement in change:
        assert ask["chance"](later).goal_id == goal
        with engine.begin() as connection:
            connection.execute(sa.text(statement), {"g": goal})
        assert not ask["chance"](later).cached


def test_every_answer_is_in_order(served):
    """Bands hold the chance, advice reaches the aim, closed goals get no probability, no word shames."""
    engine, artifacts, alive = served
    model, plain = GoalPredictionService(engine, artifacts), GoalPredictionService(engine, artifacts / "none")
    for user, goal in alive.select("user_id", "id").head(12).iter_rows():
        for service in (model, plain):
            p, a = service.predict_goal_achievement(user, goal, ASKED), service.recommend_goal_adjustments(user, goal, ASKED)
            assert p.status == "open"
            assert 0 <= p.low <= p.chance <= p.high <= 1
            assert all(x.chance >= AIM for x in a.adjustments if x.kind != "standing order")
            said = [p.sentence, a.sentence, *(i.words for i in service.generate_goal_insights(user, ASKED).insights)]
            assert not [o for words in said for o in objections(words)]
            assert "<script" not in p.to_html() + service.analyze_goal_trajectory(user, goal, ASKED).to_html()
    after = model.predict_goal_achievement(user, goal, date(2027, 12, 31))
    assert after.chance is None
    assert after.status in ("over", "reached", "closed")
    assert plain.status.method == "rules"
    assert "no trained model" in plain.status.why_rules


@pytest.mark.parametrize("way", ["model", "counting"])
def test_everybody_s_goals_in_one_call_are_those_of_single_answers(served, tmp_path, way):
    engine, artifacts, _ = served
    service, day = GoalPredictionService(engine, artifacts if way == "model" else artifacts / "none"), date(2025, 9, 30)
    told = service.predict_all(day)
    assert told.made_by == way
    table = told.to_frame().filter(pl.col("user_id") <= 12)
    assert set(table["status"]) >= {"open", "reached"}
    for row in table.iter_rows(named=True):
        alone = service.predict_goal_achievement(row["user_id"], row["goal_id"], day)
        assert row == {n: getattr(alone, n) if alone.chance is not None or n != "confidence" else None for n in row}
    if way == "model":
        assert told.to_frame().equals(service.predict_all(day, export_snapshot(engine, tmp_path)).to_frame()), "the same from a snapshot, in other blocks"


def test_strangers_and_damage(served, tmp_path):
    engine, artifacts, alive = served
    service, (user, goal) = GoalPredictionService(engine, artifacts), alive.select("user_id", "id").row(0)
    other = alive.filter(pl.col("user_id") != user).select("id").row(0)[0]
    for wrong in (other, 10**9):
        with pytest.raises(ServiceError, match="has no goal"):
            service.predict_goal_achievement(user, wrong, ASKED)
    with pytest.raises(ServiceError, match="no goal"):
        service.predict_goal_achievement(user, goal, date(2020, 1, 1))
    copy = tmp_path / "artifacts"
    publish(copy, "goal", "v", {"goal.json": b"{}", "goal_model.onnx": b"x"}, {})
    promote(copy, "goal", "v")
    assert "cannot be used" in GoalPredictionService(engine, copy).status.why_rules
    (copy / "goal" / "v" / "goal.json").write_bytes(b"[]")
    damaged = GoalPredictionService(engine, copy)
    assert "altered" in damaged.status.why_rules
    assert damaged.predict_goal_achievement(user, goal, ASKED).made_by == "counting"


def test_serving_goals_needs_no_training_library():
    heavy = ("torch", "sklearn", "pandas", "matplotlib", "statsmodels", "onnx", "skl2onnx")
    script = f"import sys\nimport fincoach.serving.goals\nprint(*[m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not out.stdout.split()
