"""The spending service: what it answers is right, sure of what it says, the same from the cache, and never worse than silence."""

import json
import math
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest
import sqlalchemy as sa

from fincoach.data.database import DatabaseError, connect, load, upgrade, writing
from fincoach.data.population import generate
from fincoach.data.tables import CATEGORY_ID, TABLES
from fincoach.features.behavior import extract
from fincoach.features.ledger import Ledgers
from fincoach.features.series import weekly_series
from fincoach.serving import spending as module
from fincoach.serving.actions import objections
from fincoach.serving.artifacts import promote, publish
from fincoach.serving.forecast import _SHAPES, GROUPS, HORIZON, TREES, SpendingParameters
from fincoach.serving.inference import Cluster, FeatureScaling, SegmentationParameters
from fincoach.serving.inputs import AHEAD, BY_MONTH, BY_WEEK, WEEK
from fincoach.serving.offsets import AND, Offsets, set_right
from fincoach.serving.policy import Places
from fincoach.serving.segmentation import ServiceError
from fincoach.serving.spending import ALERT_RULES, MOST_ALERTS, SpendingPredictionService
from fincoach.serving.trees import Trees

onnx_helper = pytest.importorskip("onnx.helper")
DAY, NOW = date(2025, 1, 15), datetime(2025, 1, 16, 7, tzinfo=UTC)  # a Wednesday: three days of the first week are over
SUNDAY = date(2025, 1, 12)
PEOPLE = 60


def stand_in() -> bytes:
    """A network of the right form whose quantiles are the same multiples of everybody's scale."""
    tensor = lambda name, a: onnx_helper.make_tensor(name, 1, np.shape(a), np.ravel(a).astype(np.float32))  # noqa: E731
    node = onnx_helper.make_node
    nodes = [node("MatMul", ["ahead", "zero"], ["none"]), node("Add", ["none", "level"], ["weekly"]), node("Slice", ["weekly"], ["first"], axes=[1], starts=[0], ends=[1]),
             node("Squeeze", ["first"], ["flat"], axes=[1]), node("Slice", ["weeks"], ["last"], axes=[1], starts=[51], ends=[52]), node("Squeeze", ["last"], ["now"], axes=[1]),
             node("Softplus", ["now"], ["any"]), node("MatMul", ["any", "silent"], ["nothing"]), node("Add", ["flat", "nothing"], ["month"])]  # fmt: skip
    ends = [onnx_helper.make_tensor_value_info(k, 1, ["n", *s]) for k, s in _SHAPES.items()]
    weights = [tensor("zero", np.zeros((len(AHEAD), 5))), tensor("level", [0.2, 0.4, 0.8, 1.5, 2.2]), tensor("silent", np.zeros((len(WEEK), 5)))]
    graph = onnx_helper.make_graph(nodes, "stand_in", ends[:2], ends[2:], weights)
    return onnx_helper.make_model(graph, ir_version=8, opset_imports=[onnx_helper.make_opsetid("", 9)]).SerializeToString()


def flat(weeks: int) -> Offsets:
    return Offsets((), np.zeros((1, weeks, 5)), np.zeros((1, weeks, 5)), np.zeros((1, weeks)))


def files(**changes) -> dict[str, bytes]:
    """An artifact of a model, in the very files that training writes."""
    trees = Trees(TREES, np.full(3, -1, "i4"), np.zeros(3), np.zeros(3, "i4"), np.zeros(3, "i4"), np.zeros(3, bool), np.array([0.9, 1.0, 1.1]), np.arange(3, dtype="i4"),
                  np.ones(3, "i4"), np.zeros(3), np.array([len(BY_WEEK), len(BY_WEEK), len(BY_MONTH)], "i4"))  # fmt: skip
    p = SpendingParameters("made", date(2024, 12, 29), 100, (5, 8), "activity", ((0.5, 0.5, 0.0),) * HORIZON, (0.4, 0.4, 0.2), ((1.0, 0.1, 0.0),) * HORIZON,
                           (), flat(HORIZON), flat(1))  # fmt: skip
    return {"spending.json": replace(p, **changes).to_json().encode(), "spending_lstm.onnx": stand_in(), "spending_trees.npz": trees.to_npz()}


def published(folder, made: dict[str, bytes], version: str = "2024-12-29-made"):
    publish(folder, "spending", version, made, {})
    promote(folder, "spending", version)
    return folder


class World:
    """A database of made-up people, and a folder with a model."""

    def __init__(self, folder):
        self.frames = {k: v for k, v in generate(people=PEOPLE, days=400, seed=3).frames.items() if not k.startswith("recommendation")}
        self.url = f"sqlite:///{folder}/fincoach.db"
        self.engine = connect(self.url)
        upgrade(self.engine)
        load(self.engine, self.frames)
        self.none, self.artifacts = folder / "none", published(folder / "artifacts", files())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("spending"))
    yield made
    made.engine.dispose()


@pytest.fixture(scope="module")
def rules(world):
    return SpendingPredictionService(world.engine, world.none)


@pytest.fixture(scope="module")
def model(world):
    return SpendingPredictionService(world.engine, world.artifacts)


def small(folder, rows, currency="EUR", **user):
    """A service on a database of one person with rows (date, category, major units); negative is out."""
    engine = connect(f"sqlite:///{folder}/one.db")
    upgrade(engine)
    with writing(engine) as c:
        c.execute(sa.insert(TABLES["users"]).values(id=1, external_id="one", timezone="UTC", currency=currency, created_at=NOW, **user))
        found = [{"user_id": 1, "occurred_at": datetime(d.year, d.month, d.day, 12, tzinfo=UTC), "amount_minor": round(a * 100), "currency": r[0] if r else "EUR",
                  "category_id": CATEGORY_ID[cat], "merchant": r[1] if len(r) > 1 else None} for d, cat, a, *r in rows]  # fmt: skip
        if found:
            c.execute(sa.insert(TABLES["transactions"]), found)
    return SpendingPredictionService(engine, folder / "none")


def every_week(n, amount, category="groceries", until=SUNDAY):
    return [(until - timedelta(days=7 * i + 2), category, -amount) for i in range(n)]


# --- what is answered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["rules", "model"])
def test_everybody_at_once_gets_what_each_gets_alone(which, request, world):
    service = request.getfixturevalue(which)
    everybody = service.forecast_all(DAY)
    cut = service.forecast_all(DAY, Ledgers.of(world.frames))
    assert everybody.user_ids.tolist() == list(range(1, PEOPLE + 1))
    assert {"model", "cold start", "rules", "unknown"} >= set(everybody.made_by.tolist()) >= {"rules" if which == "rules" else "model"}
    for name in ("point", "quantiles", "month", "mean", "past"):
        assert np.allclose(getattr(everybody, name), getattr(cut, name), rtol=1e-5, equal_nan=True), name
    for i in range(0, PEOPLE, 11):
        alone = service.predict_weekly_spending(i + 1, DAY)
        assert alone.made_by == everybody.made_by[i]
        assert np.allclose([w[1:] for w in alone.forecast.weeks], np.c_[everybody.point[i], everybody.quantiles[i][:, [1, 3, 0, 4]]][: len(alone.forecast.weeks)], rtol=1e-5)
        assert alone.model_version == service.status.version
        together = everybody.person(i, dict(zip(CATEGORY_ID.values(), CATEGORY_ID, strict=True))).categories
        assert {k: np.round(v, 6).tolist() for k, v in alone.forecast.categories.items()} == {k: np.round(v, 6).tolist() for k, v in together.items()}


def test_batches_of_any_size_are_the_same(model, world, monkeypatch):
    whole = model.forecast_all(DAY, world.frames)
    monkeypatch.setattr(module, "BLOCK", 7)
    parts = model.forecast_all(DAY, world.frames)
    assert np.allclose(whole.quantiles, parts.quantiles, rtol=1e-5, equal_nan=True)
    assert whole.made_by.tolist() == parts.made_by.tolist()


def test_the_categories_add_up_and_the_weeks_follow_the_last_sunday(model):
    p = model.predict_weekly_spending(8, DAY)
    assert [w.monday for w in p.forecast.weeks] == [date(2025, 1, 13) + timedelta(days=7 * h) for h in range(12)]
    assert np.allclose(np.sum(list(p.forecast.categories.values()), axis=0), [w.point for w in p.forecast.weeks])
    assert p.why_rules == ""
    assert model.predict_weekly_spending(8, SUNDAY).forecast.weeks == p.forecast.weeks  # nothing after the last Sunday moves the forecast
    assert model.predict_weekly_spending(8, SUNDAY).spent_this_week == 0


def test_rows_after_the_day_change_nothing(tmp_path):
    before, after = every_week(30, 80), [(DAY + timedelta(days=1), "travel", -9_000), (DAY + timedelta(days=30), "groceries", -5_000)]
    answers = []
    for name, rows in (("a", before), ("b", before + after)):
        (tmp_path / name).mkdir()
        s = small(tmp_path / name, rows)
        answers.append([repr(x.to_dict()) for x in (s.predict_weekly_spending(1, DAY), s.assess_budget_risk(1, DAY), s.generate_spending_alerts(1, DAY))])
    assert answers[0] == answers[1]


def test_known_payments_are_those_of_the_streams(tmp_path):
    rent = [(date(2024, m, 1), "rent", -850.0, "EUR", "Harbour Housing") for m in range(3, 13)] + [(date(2025, 1, 1), "rent", -850.0, "EUR", "Harbour Housing")]
    salary = [(date(2024, m, 25), "salary", 2400.0, "EUR", "Employer") for m in range(3, 13)]
    p = small(tmp_path, rent + salary + every_week(40, 60)).predict_weekly_spending(1, DAY)
    named = [q for q in p.payments if q.name == "Harbour Housing"]
    assert [q.day for q in named][:2] == [date(2025, 2, 1), date(2025, 3, 1)]
    assert all(q.amount == 850 and q.every == "monthly" and q.chance > 0.8 for q in named)
    assert all(q.amount > 0 for q in p.payments)  # income is no payment
    week = (date(2025, 2, 1) - date(2025, 1, 13)).days // 7
    assert p.known[week] >= 0.8 * 850
    assert math.isclose(sum(p.known), sum(q.amount * q.chance for q in p.payments))


# --- budgets ------------------------------------------------------------------------------------------------------


def test_a_rent_in_a_budget_either_comes_or_does_not(tmp_path):
    """850 in a budget of 900: the chance of more is small. In one of 800 it is the chance that the rent comes."""
    rent = [(date(2024, m, 20), "rent", -850.0, "EUR", "Harbour Housing") for m in range(3, 13)]
    service = small(tmp_path, rent + every_week(40, 60))
    enough, short = (service.assess_budget_risk(1, DAY, {"rent": b}).of("rent") for b in (900_00, 800_00))
    assert enough.chance < 0.1
    assert short.chance > 0.85
    assert enough.due == short.due > 0.8 * 850
    assert (short.over, short.seen) != (0, 0)
    assert short.chance_low < short.chance <= short.chance_high


def test_more_budget_is_less_risk_and_what_is_spent_is_certain(model):
    chances = [model.assess_budget_risk(8, DAY, {"total": b}).of("total").chance for b in range(0, 500_000, 60_000)]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.97 > 0.05 > chances[-1]
    for user in range(1, 11):
        for r in model.assess_budget_risk(user, DAY).risks:
            assert 0 <= r.chance_low <= r.chance <= r.chance_high + 1e-9 <= 1 + 2e-9
            assert r.low80 <= r.expected <= r.high80
            assert r.over <= r.seen <= 13
            if r.spent > r.budget:
                assert r.chance == 1


def test_chances_of_budgets_come_true_as_often_as_they_say(rules, world):
    """On made-up people six weeks before the end: within six points on the whole, better than the plain share of past periods, and sure ones sure."""
    origin = date(2024, 9, 1)
    said, true, share = [], [], []
    actual = weekly_series(world.frames, origin + timedelta(days=28), 4)
    spent = {c: actual.y[:, :, j].sum(1) for j, c in enumerate(actual.categories.tolist())}
    for user in range(1, PEOPLE + 1):
        for r in rules.assess_budget_risk(user, origin).risks:
            if r.category != "total":
                said.append(r.chance)
                true.append(spent.get(CATEGORY_ID[r.category], np.zeros(PEOPLE))[user - 1] > r.budget)
                share.append(r.over / r.seen)
    said, true, share = np.array(said), np.array(true, float), np.array(share)
    assert len(said) > 250
    assert abs(said.mean() - true.mean()) < 0.06
    assert np.square(said - true).mean() < np.square(share - true).mean()
    assert true[said < 0.1].mean() < 0.12
    assert true[said > 0.5].mean() > 0.4


def test_chances_of_the_total_are_set_right_as_the_model_says_and_those_of_categories_are_not(world, model, tmp_path):
    bent = SpendingPredictionService(world.engine, published(tmp_path, files(chances=(1.5, 0.5, 0.7))))
    asked = {"total": 60_000, "groceries": 9_000}
    changed = 0
    for user in range(1, 21):
        plain, other = ({r.category: r for r in s.assess_budget_risk(user, DAY, asked).risks} for s in (model, bent))
        if "total" not in plain:
            continue
        certain = plain["total"].spent > plain["total"].budget
        want = 1.0 if certain else float(set_right(plain["total"].chance, (1.5, 0.5, 0.7)))
        assert math.isclose(other["total"].chance, want, abs_tol=0.01)  # the plain one went through numbers that leave all as it is, but for the ends
        assert other["groceries"].chance == plain["groceries"].chance
        assert (other["total"].expected, other["total"].low80) == (plain["total"].expected, plain["total"].low80)
        changed += abs(other["total"].chance - plain["total"].chance) > 0.02
    assert changed >= 3


def test_budgets_are_checked(rules):
    for budgets, says in (({"grocery": 1}, "did you mean 'groceries'"), ({99: 1}, "no spending category 99"), ({"total": 1.5}, "whole minor units"), ({"total": True}, "whole minor units"),
                          ({"total": -1}, "whole minor units"), ({"salary": 1}, "no spending category 'salary'")):  # fmt: skip
        with pytest.raises(ServiceError, match=says):
            rules.assess_budget_risk(8, DAY, budgets)
    by_name, by_number = (rules.assess_budget_risk(8, DAY, {k: 100_00}) for k in ("groceries", CATEGORY_ID["groceries"]))
    assert by_name == by_number
    assert rules.assess_budget_risk(8, DAY, {}).risks == ()
    with pytest.raises(ServiceError, match="was not assessed"):
        by_name.of("rent")


# --- alerts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["rules", "model"])
def test_alerts_are_few_and_say_what_they_stand_on_in_words_that_blame_nobody(which, request):
    service, kinds = request.getfixturevalue(which), {r.kind: r for r in ALERT_RULES}
    told = [service.generate_spending_alerts(user, DAY).alerts for user in range(1, PEOPLE + 1)]
    assert max(map(len, told)) <= MOST_ALERTS
    found = [a for alerts in told for a in alerts]
    assert len({a.kind for a in found}) >= 2
    assert len(found) < PEOPLE  # less than one each
    for a in found:
        assert objections(a.words) == [], a.words
        assert a.evidence
        assert a.chance >= kinds[a.kind].chance
        assert a.first <= a.last
        assert a.amount > 0


def test_a_price_that_rose_a_rare_payment_and_a_week_above_its_range_are_said(tmp_path):
    music = [(date(2024, 3, 5) + timedelta(days=0) if m == 0 else date(2024 + (2 + m) // 12, (2 + m) % 12 + 1, 5), "subscriptions", -9.99 if m < 9 else -12.99, "EUR", "Music Box") for m in range(11)]
    insurance = [(date(y, mo, 28), "insurance", -300.0, "EUR", "Safe Home") for y, mo in ((2023, 10), (2024, 1), (2024, 4), (2024, 7), (2024, 10))]
    today = [(DAY, "shopping", -2_000.0)]
    found = small(tmp_path, music + insurance + every_week(60, 100) + today).generate_spending_alerts(1, DAY)
    by_kind = {a.kind: a for a in found.alerts}
    assert {"rare payment", "price change", "week so far"} <= set(by_kind), found
    assert "€300" in by_kind["rare payment"].words
    assert "every quarter" in by_kind["rare payment"].words
    assert by_kind["rare payment"].first <= date(2025, 1, 28) <= by_kind["rare payment"].last
    assert "€12.99" in by_kind["price change"].words.replace("€13", "€12.99")
    assert by_kind["week so far"].chance == 1


def test_a_merchants_name_cannot_put_words_into_our_mouth(tmp_path):
    bad = "BUY NOW! Wasteful <b>Loans</b> https://x"
    rows = [(date(y, mo, 28), "insurance", -300.0, "EUR", bad) for y, mo in ((2023, 10), (2024, 1), (2024, 4), (2024, 7), (2024, 10))] + every_week(60, 100)
    service = small(tmp_path, rows)
    found = service.generate_spending_alerts(1, DAY)
    assert [a.kind for a in found.alerts] == ["rare payment"]
    assert "a regular payment" in found.alerts[0].words
    for card in (found, service.predict_weekly_spending(1, DAY), service.assess_budget_risk(1, DAY)):
        assert "<b>Loans" not in card._repr_html_()


def test_an_even_life_gives_nothing_to_say(tmp_path):
    assert len(small(tmp_path, every_week(60, 100)).generate_spending_alerts(1, DAY)) == 0


# --- data at the edge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "weeks"), [([], 0), ([(DAY, "groceries", -5.0)], 0), ([(date(2024, 12, 30), "groceries", -5.0)], 0), (every_week(3, 50), 0), (every_week(6, 50), 12)])
def test_too_little_is_said_to_be_too_little(tmp_path, rows, weeks):
    service = small(tmp_path, rows)
    p, b, a = service.predict_weekly_spending(1, DAY), service.assess_budget_risk(1, DAY, {"total": 1_00}), service.generate_spending_alerts(1, DAY)
    assert len(p.forecast.weeks) == weeks
    assert p.made_by == ("rules" if weeks else "unknown")
    assert bool(b.risks) == (weeks > 0) == (b.unknown == "")
    assert a.alerts == ()
    for card in (p, b, a):
        json.dumps(card.to_dict(), allow_nan=False)
        assert card._repr_html_()
        card.to_frame()


def test_other_currencies_and_silence_are_said(tmp_path):
    foreign = [(date(2024, 12, d), "dining", -20.0, "USD") for d in range(1, 6)]
    p = small(tmp_path, every_week(20, 50, until=date(2024, 11, 24)) + foreign).predict_weekly_spending(1, DAY)
    assert any("5 transactions in other currencies than EUR" in w for w in p.warnings)
    assert any("nothing was booked for 54 days" in w for w in p.warnings)
    assert "dining" not in p.forecast.categories


def test_a_currency_without_cents_is_told_in_its_own_units(tmp_path):
    rows = [(d, c, a, "JPY") for d, c, a in every_week(20, 50)]  # 5,000 minor units a week
    p = small(tmp_path, rows, "JPY").predict_weekly_spending(1, DAY)
    assert math.isclose(p.forecast.weeks[0].point, 5000, rel_tol=0.02)
    assert "¥5,000" in p.sentence


def test_absurd_amounts_do_no_harm(tmp_path):
    p = small(tmp_path, [*every_week(20, 50), (date(2024, 12, 1), "travel", -(2.0**53) / 100), (date(2024, 12, 8), "travel", 2.0**60 / 100)]).assess_budget_risk(1, DAY)
    json.dumps(p.to_dict(), allow_nan=False)


def test_nobody_and_nonsense_are_refused(rules):
    with pytest.raises(DatabaseError, match="nobody with the id 999"):
        rules.predict_weekly_spending(999, DAY)
    with pytest.raises(DatabaseError, match="nobody with the id 999"):
        rules.predict_weekly_spending(999, DAY, NOW)
    for day in (NOW, "2025-01-15", None):
        with pytest.raises(ServiceError, match=r"datetime\.date"):
            rules.predict_weekly_spending(8, day)
    with pytest.raises(ValueError, match="no time zone"):
        rules.predict_weekly_spending(8, DAY, datetime(2025, 1, 16))


# --- the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["rules", "model"])
def test_from_the_cache_comes_the_same_card(which, request):
    service = request.getfixturevalue(which)
    for user in (8, int(np.flatnonzero(service.forecast_all(DAY).made_by == "unknown")[0]) + 1):
        for ask in (service.predict_weekly_spending, service.assess_budget_risk, service.generate_spending_alerts):
            fresh, first, again = ask(user, DAY), ask(user, DAY, now=NOW), ask(user, DAY, now=NOW + timedelta(hours=23))
            assert (fresh.cached, first.cached, again.cached) == (False, False, True)
            assert repr(replace(again, cached=False)) == repr(first)
            assert first.to_dict() == replace(again, cached=False).to_dict()  # NaN is None there
            assert again.to_dict() == replace(fresh, cached=True, made_at=NOW).to_dict()
            assert again._repr_html_()


def test_other_budgets_other_models_and_other_days_are_other_questions(world, model):
    a, b = {"total": 100_00, "groceries": 5_00}, {"groceries": 5_00, "total": 100_00}
    first = model.assess_budget_risk(9, DAY, a, now=NOW)
    assert model.assess_budget_risk(9, DAY, b, now=NOW).cached
    assert not model.assess_budget_risk(9, DAY, {"total": 100_01, "groceries": 5_00}, now=NOW).cached
    assert not model.assess_budget_risk(9, DAY, now=NOW).cached
    assert not model.assess_budget_risk(9, SUNDAY, a, now=NOW).cached
    other = SpendingPredictionService(world.engine, world.none).assess_budget_risk(9, DAY, a, now=NOW)
    assert not other.cached
    assert other.model_version != first.model_version


def test_a_new_transaction_is_in_the_next_answer(tmp_path):
    service = small(tmp_path, every_week(30, 80))
    before = service.predict_weekly_spending(1, DAY, NOW)
    assert service.predict_weekly_spending(1, DAY, NOW).cached
    with writing(service.engine) as c:
        c.execute(sa.insert(TABLES["transactions"]).values(user_id=1, occurred_at=datetime(2025, 1, 14, tzinfo=UTC), amount_minor=-500_00, currency="EUR", category_id=CATEGORY_ID["travel"]))
    after = service.predict_weekly_spending(1, DAY, NOW)
    assert not after.cached
    assert (before.spent_this_week, after.spent_this_week) == (0, 500)


def test_a_new_model_answers_at_once(tmp_path, world):
    folder = published(tmp_path / "a", files())
    service = SpendingPredictionService(world.engine, folder)
    assert service.predict_weekly_spending(10, DAY, NOW).model_version == "2024-12-29-made"
    published(folder, files(month_weights=(0.0, 0.0, 1.0)), "2025-01-05-made")
    assert service.predict_weekly_spending(10, DAY, NOW).cached  # what was loaded goes on
    service.load_prediction_models()
    fresh = service.predict_weekly_spending(10, DAY, NOW)
    assert not fresh.cached
    assert fresh.model_version == "2025-01-05-made"


# --- ranges by segment ---------------------------------------------------------------------------------------------


def two_segments(version: str = "2024-12-01-halves") -> SegmentationParameters:
    """Two segments, of those who spend less and more than 250 a week."""
    scaling = (FeatureScaling("spending_weekly", "log", 5.5, math.log1p(250), 1.0, 9.0),)
    return SegmentationParameters(version, date(2024, 12, 1), scaling, (Cluster(0, "less", 0.5, 1.0, (-1.0,)), Cluster(3, "more", 0.5, 1.0, (1.0,))), 1.0, 0.1)


def by_both(groups: dict[str, float], weeks: int) -> Offsets:
    """Offsets that move the highest end of each group by so many scales."""
    values = np.zeros((len(groups) + 1, weeks, 5))
    values[:-1, :, 4] = np.array(list(groups.values()))[:, None]
    return Offsets(tuple(groups), values, np.ones_like(values), np.ones((len(groups) + 1, weeks)))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory, world):
    """A service whose ranges reach 20 scales further for segment 3, and 7 for 'varied' people of no segment that is known."""
    crossed = {f"{a}{AND}segment 3": 20.0 for a in GROUPS} | {"varied": 7.0}
    made = files(grouped_by="both", segmentation="2024-12-01-halves", weekly=by_both(crossed, HORIZON), monthly=by_both(crossed, 1))
    folder = published(tmp_path_factory.mktemp("segmented"), made | {"segmentation.json": two_segments().to_json().encode()})
    return SpendingPredictionService(world.engine, folder)


def test_ranges_go_by_the_segment_that_serving_finds_by_itself(segmented, model, world):
    assert segmented.status.method == "model"
    place = Places(two_segments())(extract(Ledgers.of(world.frames), SUNDAY))
    assert {0, 3} == set(place.tolist())
    plain, found = model.forecast_all(DAY), segmented.forecast_all(DAY)
    known = found.made_by != "unknown"
    wider = (found.quantiles - plain.quantiles)[:, 0, 4] / plain.quantiles[:, 0, 2]
    assert (wider[known & (place == 3)] > 10).all()
    assert ((wider > 1) == ((place == 3) | np.char.startswith(found.group, "varied")))[known].all()
    assert all(g.endswith(f"segment {s}") for g, s in zip(found.group[known].tolist(), place[known].tolist(), strict=True))
    for i in range(0, PEOPLE, 13):
        alone = segmented.predict_weekly_spending(i + 1, DAY)
        assert alone.forecast.group == found.group[i]
        assert np.allclose(alone.forecast.month, found.month[i], rtol=1e-5, equal_nan=True)


def test_nothing_after_the_last_sunday_moves_anybody_to_another_segment(segmented):
    for user in range(1, 9):
        assert segmented.predict_weekly_spending(user, DAY).forecast.weeks == segmented.predict_weekly_spending(user, SUNDAY).forecast.weeks


@pytest.mark.parametrize(("change", "says"), [({}, "missing"), ({"segmentation.json": b"{}"}, "cannot be used"), ({"segmentation.json": two_segments("2024-12-08-other").to_json().encode()}, "not of 2024-12-08-other")])
def test_without_the_right_segments_the_rule_answers_and_says_why(tmp_path, world, change, says):
    made = files(grouped_by="both", segmentation="2024-12-01-halves") | change
    service = SpendingPredictionService(world.engine, published(tmp_path, made))
    assert service.status.method == "rules"
    assert says in service.status.why_rules


def test_a_model_learned_without_segments_needs_none(tmp_path, world):
    service = SpendingPredictionService(world.engine, published(tmp_path, files(grouped_by="both")))
    assert service.status.method == "model"
    assert set(service.forecast_all(DAY).group.tolist()) <= set(GROUPS)


def test_a_given_version_answers_in_the_champions_place(tmp_path, world):
    folder = published(published(tmp_path / "a", files(), "2024-12-22-older"), files(month_weights=(0.0, 0.0, 1.0)))
    older, serving = SpendingPredictionService(world.engine, folder, "2024-12-22-older"), SpendingPredictionService(world.engine, folder)
    assert (older.status.version, serving.status.version) == ("2024-12-22-older", "2024-12-29-made")
    assert older.predict_weekly_spending(8, DAY).forecast.month != serving.predict_weekly_spending(8, DAY).forecast.month
    older.load_prediction_models()
    assert older.status.version == "2024-12-22-older"
    assert SpendingPredictionService(world.engine, folder, "2020-01-01-none").status.method == "rules"


# --- a model that cannot be trusted --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["spending.json", "spending_lstm.onnx", "spending_trees.npz"])
@pytest.mark.parametrize("how", ["altered", "cut", "missing", "nonsense"])
def test_a_damaged_model_is_not_served_and_every_answer_says_why(tmp_path, world, name, how):
    made = files()
    if how == "nonsense":  # published like that, so its hash is right
        made[name] = b"{}" if name.endswith("json") else b"nonsense"
    folder = published(tmp_path / "a", made)
    file = folder / "spending" / "2024-12-29-made" / name
    data = bytearray(file.read_bytes())
    if how != "nonsense":
        file.chmod(0o644)
        file.unlink()
    if how == "altered":
        data[len(data) // 2] ^= 1
    if how in ("altered", "cut"):
        file.write_bytes(bytes(data[: len(data) if how == "altered" else 50]))
    service = SpendingPredictionService(world.engine, folder)
    assert service.status.method == "rules"
    assert service.status.why_rules
    assert str(tmp_path) not in service.status.why_rules
    p = service.predict_weekly_spending(8, DAY)
    assert p.made_by == "rules"
    assert service.status.why_rules in p.sentence


def test_a_model_without_numbers_for_somebody_is_answered_by_the_rule(world, model, monkeypatch):
    way = model._way

    class Broken:
        categories, parameters = way.model.categories, way.model.parameters

        def forecast(self, series, echoes, segments):
            found = way.model.forecast(series, echoes, segments)
            found.quantiles[series.user_ids == 8] = np.nan
            return found

    service = SpendingPredictionService(world.engine, world.artifacts)
    service._way = way._replace(model=Broken())
    everybody, sound = service.forecast_all(DAY), model.forecast_all(DAY)
    assert everybody.made_by[7] == "rules"
    assert np.isfinite(everybody.quantiles[7]).all()
    others = np.arange(PEOPLE) != 7
    assert everybody.made_by[others].tolist() == sound.made_by[others].tolist()
    p = service.predict_weekly_spending(8, DAY)
    assert p.made_by == "rules"
    assert any("plain rule answered" in w for w in p.warnings)

    class Raising(Broken):
        def forecast(self, *_):
            raise ValueError("out of numbers")

    service._way = way._replace(model=Raising())
    p = service.predict_weekly_spending(8, DAY)
    assert p.made_by == "rules"
    assert any("out of numbers" in w for w in p.warnings)


def test_nothing_heavy_is_loaded_and_answers_are_kept(world):
    """Torch, scikit-learn, pandas and statsmodels stay out."""
    import subprocess
    import sys

    code = ("import sys; from datetime import date; from fincoach.serving.spending import SpendingPredictionService as S; s = S(sys.argv[1], sys.argv[2]); "
            "s.predict_weekly_spending(8, date(2025, 1, 15)); assert s.status.method == 'model'; "
            "print([m for m in ('torch', 'sklearn', 'pandas', 'statsmodels', 'matplotlib') if m in sys.modules])")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code, world.url, str(world.artifacts)], capture_output=True, text=True, check=False)
    assert said.stdout == "[]\n", said.stderr
    service = SpendingPredictionService(world.engine, world.artifacts)
    for user in range(1, 11):
        service.predict_weekly_spending(user, DAY, NOW + timedelta(days=3))
    for user in range(1, 11):
        assert service.predict_weekly_spending(user, DAY, NOW + timedelta(days=3)).cached
