"""Health: strict parameters, answers that cannot contradict each other, a cache that notices, training that is honest."""

import json
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from fincoach.data.database import DatabaseError, connect, load, upgrade
from fincoach.data.export import write_snapshot
from fincoach.data.population import generate
from fincoach.evaluate.lineage import NotEnoughData
from fincoach.forecast.health import (
    HORIZONS,
    UNREST,
    Cases,
    Recipe,
    area,
    calibration_error,
    cases_of,
    fit,
    misses,
    mix,
    quantiles_of,
    simple_chance,
    spread,
    stretches,
    take_data,
    train_health,
    warn_line,
    weigh,
)
from fincoach.serving.actions import objections
from fincoach.serving.artifacts import promote
from fincoach.serving.cashflow import LEVELS
from fincoach.serving.health import (
    GROUPS,
    LEVELS_OF_STRESS,
    RULES,
    FinancialHealthForecaster,
    HealthParameters,
    Outlook,
    judge_stress,
    outlooks,
)
from fincoach.serving.inference import ParametersError

DAY, NOW = date(2025, 11, 2), datetime(2025, 11, 3, 8, tzinfo=UTC)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A population, its snapshot, and its database."""
    population, folder = generate(people=40, days=490, seed=6), tmp_path_factory.mktemp("health")
    engine = connect(f"sqlite:///{folder / 'fincoach.db'}")
    upgrade(engine)
    load(engine, population.frames)
    return population, write_snapshot(population.frames, folder), engine, folder


@pytest.fixture(scope="module")
def candidate(world):
    """A version trained on it, as small as may be."""
    population, snapshot, _, _ = world
    return train_health(snapshot, Recipe(DAY, min_people=20, at_most=40, learn_days=1, judge_days=1), truth=population.truth)


def test_training_twice_gives_the_same_bytes_and_says_what_it_is(world, candidate):
    _, snapshot, _, _ = world
    recipe = candidate.evidence.recipe
    data = take_data(snapshot, recipe)
    assert fit(data, cases_of(data, data.learn)).parameters == candidate.evidence.parameters
    assert set(candidate.files) == {"health.json", "financial_health_forecaster.pkl", "feature_config.json", "model_metadata.json", "model_configs/health.json",
                                    "validation_reports/health.html", "validation_reports/health.json"}
    assert {"learned", "people", "as_of", "seed", "snapshot", "parent", "verdict"} <= set(candidate.manifest)
    assert candidate.evidence.audit.passed
    assert HealthParameters.from_json(candidate.files["health.json"]) == candidate.evidence.parameters


def test_outcomes_that_teach_do_not_reach_into_days_that_judge():
    learn, judge = Recipe(DAY).days
    assert max(learn) + timedelta(days=84) <= min(judge)
    assert max(judge) + timedelta(days=84) <= DAY


def test_too_little_is_said_in_a_sentence(world):
    with pytest.raises(NotEnoughData, match="looks back"):
        train_health(world[1], Recipe(date(2024, 10, 1)))
    with pytest.raises(ValueError, match="at_most"):
        Recipe(DAY, at_most=3)


def test_the_service_serves_what_was_trained(world, candidate):
    _, _, engine, folder = world
    version = candidate.publish(folder / "artifacts")
    promote(folder / "artifacts", "health", version)
    service = FinancialHealthForecaster(engine, folder / "artifacts")
    assert service.status == ("model", version, ())
    told = service.outlook(3, DAY)
    assert told.balance.made_by == "model"
    assert told.balance.model_version == version
    assert told.balance != FinancialHealthForecaster(engine, folder / "nothing").outlook(3, DAY).balance


def test_a_damaged_version_is_not_served_and_rules_say_so(world, candidate, tmp_path):
    version = candidate.publish(tmp_path)
    promote(tmp_path, "health", version)
    file = next(tmp_path.rglob("health.json"))
    file.write_text(file.read_text().replace('"warn": ', '"warn": 1'))
    service = FinancialHealthForecaster(world[2], tmp_path)
    assert service.status.made_by == "rules"
    assert "cannot be used" in service.status.warnings[0]
    assert service.forecast_balance_trajectory(1, DAY).made_by == "rules"


def test_an_answer_is_kept_until_the_person_s_rows_change(world):
    _, _, engine, folder = world
    service = FinancialHealthForecaster(engine, folder / "nothing")
    first = service.outlook(7, DAY, NOW)
    assert service.outlook(7, DAY, NOW + timedelta(hours=3)) == first == service.outlook(7, DAY)
    with engine.begin() as c:
        c.execute(sa.text("INSERT INTO transactions (user_id, occurred_at, amount_minor, currency, category_id) SELECT 7, max(occurred_at), -50000, 'EUR', 14 FROM transactions "
                          "WHERE user_id = 7 AND occurred_at < :now"), {"now": int(datetime(2025, 11, 2, tzinfo=UTC).timestamp() * 1e6)})
    changed = service.outlook(7, DAY, NOW + timedelta(hours=4))
    assert changed.balance.start == first.balance.start - 50_000
    assert service.forecast_balance_trajectory(7, DAY, NOW, buffer=12_345).buffer == 12_345
    assert service.forecast_balance_trajectory(7, DAY, NOW).buffer == changed.balance.buffer


def test_everybody_gets_answers_that_agree_and_words_that_do_not_judge(world):
    _, _, engine, folder = world
    service = FinancialHealthForecaster(engine, folder / "nothing")
    for user in range(10, 22):
        o = service.outlook(user, DAY)
        assert Outlook.from_dict(json.loads(json.dumps(o.to_dict()))) == o
        for w in o.warnings.items:
            assert not [x for text in (w.what, *w.evidence) for x in objections(text)]
            assert w.lead_days == (w.day - DAY).days
            assert w.first <= w.day <= w.last
            assert w.evidence
        for f in o.balance.falls:
            key = ("zero" if f.below == 0 else "buffer") + ("_4" if f.days == 28 else "_12")
            assert o.stress.measures[key] == f.chance
        assert "<svg" in o.to_html()


def test_everybody_in_one_call_is_each_one_alone(world):
    population, snapshot, engine, folder = world
    service = FinancialHealthForecaster(engine, folder / "nothing")
    told = list(outlooks(engine, DAY, size=11))
    assert [o.balance.user_id for o in told] == list(range(1, 41))
    assert all(o == service.outlook(o.balance.user_id, DAY) for o in told[::4])
    assert told == list(outlooks(engine, DAY))
    few = {n: f.filter(pl.col("id" if n == "users" else "user_id") <= 12) for n, f in population.frames.items() if n in ("users", "user_profiles", "transactions")}
    table = service.outlook_all(DAY, population.frames | few).to_frame()
    assert table.equals(service.outlook_all(DAY, snapshot).to_frame().filter(pl.col("user_id") <= 12))
    assert table["zero_12"].is_between(0, 1).all()
    nobody = {n: f.clear() for n, f in population.frames.items() if n != "categories"} | {"categories": population.frames["categories"]}
    assert len(service.outlook_all(DAY, nobody)) == 0


def test_unknown_people_and_unknown_balances(world):
    _, _, engine, folder = world
    service = FinancialHealthForecaster(engine, folder / "nothing")
    with pytest.raises(DatabaseError, match="nobody"):
        service.outlook(10**6, DAY)
    early = service.outlook(1, date(2024, 7, 5))
    assert early.balance.made_by == early.stress.level == "unknown"
    with engine.begin() as c:
        c.execute(sa.text("UPDATE user_profiles SET opening_balance_minor = NULL WHERE user_id = 9"))
    blind = service.outlook(9, DAY)
    assert not blind.balance.known
    assert blind.balance.below is None
    assert "only changes can be told" in blind.balance.warnings[0]
    assert not [w for w in blind.warnings.items if w.kind.startswith("below")]
    assert "the balance" not in blind.warnings.looked


measures = st.fixed_dictionaries({m: st.one_of(st.none(), st.floats(0, 1)) for m in ("zero_4", "zero_12", "buffer_4", "buffer_12", "debt")} | {"reserve": st.one_of(st.none(), st.floats(-5, 60))})


@settings(max_examples=100, deadline=None)
@given(measures, st.sampled_from(["zero_4", "zero_12", "buffer_4", "buffer_12", "debt"]), st.floats(0, 1))
def test_a_worse_chance_never_leads_to_a_calmer_level(measured, name, more):
    rank = {level: k for k, level in enumerate(("unknown", *LEVELS_OF_STRESS))}
    level, reasons = judge_stress(measured)
    if measured[name] is not None:
        assert rank[judge_stress(measured | {name: max(measured[name], more)})[0]] >= rank[level]
    assert all(r.value is not None for r in reasons)
    assert len({r.what for r in reasons}) == len(reasons)
    assert {r.level for r in RULES} <= set(LEVELS_OF_STRESS)


def hostile(p):
    """Files that must not be served."""
    good = json.loads(p.to_json())
    yield {**good, "weights": [[0.5, 0, 0, 0, 0]] * 3}
    yield {**good, "weights": [[1, 0, 0, 0]] * 3}
    yield {**good, "stretch": {g: [[-1, 1, 1, 1]] * 4 for g in GROUPS}}
    yield {**good, "stretch": {"thin": good["stretch"]["thin"]}}
    yield {**good, "chance": [[0, 1, 0]] * 3}
    yield {**good, "chance": [[0, 1]] * 4}
    yield {**good, "chance": [["0", 1, 0]] * 4}
    yield {**good, "rate_errors": [0.2, 0.1, 0, -0.1, -0.2]}
    yield {**good, "warn": True}
    yield {**good, "members": ["walks"]}
    yield {**good, "as_of": 20250101}
    yield {**good, "format": 1}
    yield {**good, "format": 2}
    yield {**good, "unrest": -0.1}
    yield {k: v for k, v in good.items() if k != "unrest"}
    yield {**good, "more": 1}
    yield {k: v for k, v in good.items() if k != "warn"}
    yield []


def test_parameters_that_do_not_fit_together_are_refused(candidate):
    for wrong in hostile(candidate.evidence.parameters):
        with pytest.raises(ParametersError):
            HealthParameters.from_json(json.dumps(wrong))
    for text in ("", "nonsense", '{"format": NaN}', "[" * 100_000):
        with pytest.raises(ParametersError):
            HealthParameters.from_json(text)


def test_a_version_from_before_walks_were_led_astray_is_read_as_it_was(candidate):
    good = json.loads(candidate.files["health.json"])
    old = HealthParameters.from_json(json.dumps({k: v for k, v in good.items() if k != "unrest"} | {"format": 2}))
    assert old.unrest == 0
    assert old.bend("some")._replace(unrest=0.0) == candidate.evidence.parameters.bend("some")._replace(unrest=0.0)


def test_every_answer_says_where_payments_were_looked_for_in_the_newest_rows_only(world, monkeypatch, tmp_path):
    people = FinancialHealthForecaster(world[2], tmp_path)
    assert not people.assess_financial_stress(1, DAY).warnings
    monkeypatch.setattr("fincoach.features.recurring.MOST_ROWS", 50)
    found = people.outlook(1, DAY)
    for answer in (found.balance, found.savings, found.stress, found.warnings):
        assert any("newest 50" in w for w in answer.warnings)


def test_the_best_mixture_is_found():
    rng = np.random.default_rng(3)
    truth = rng.normal(size=1500)
    said = truth[:, None] + rng.normal(size=(1500, 5)) * [0.6, 0.6, 3, 3, 3]
    weights = mix(said, truth)
    assert weights[:2].sum() > 0.9
    assert np.isclose(weights.sum(), 1)
    loss = np.abs(said @ weights - truth).mean()
    assert loss <= np.abs(said - truth[:, None]).mean(0).min()
    assert all(loss <= np.abs(said @ w - truth).mean() + 0.004 for w in rng.dirichlet(np.ones(5), 300))


def test_a_stretched_fan_holds_on_new_cases_in_every_situation():
    rng = np.random.default_rng(5)
    n, width = 6000, {"thin": 0.4, "some": 1.0, "ample": 2.5}
    group = np.array(list(width))[rng.integers(0, 3, n)]
    errors = rng.standard_t(4, size=(n, len(HORIZONS))) * np.array([width[g] for g in group])[:, None]
    fan = np.tile(np.array([-1.96, -1.28, 0, 1.28, 1.96])[None, :, None], (n, 1, len(HORIZONS)))
    old, new = np.arange(n) < n // 2, np.arange(n) >= n // 2
    factors = stretches(fan[old], np.zeros((old.sum(), len(HORIZONS))), errors[old], group[old])
    for g in width:
        mine, f = new & (group == g), np.array(factors[g])
        for h in range(len(HORIZONS)):
            y = errors[mine, h]
            assert abs(((y >= -1.28 * f[h, 1]) & (y <= 1.28 * f[h, 2])).mean() - 0.8) < 0.05
            assert abs(((y >= -1.96 * f[h, 0]) & (y <= 1.96 * f[h, 3])).mean() - 0.95) < 0.03


def made_up(fans, y, size=1.0, said=None):
    """Cases of a made-up bank: fans (n, unrest, levels, horizons), what came (n, horizons)."""
    n = len(y)
    said = np.zeros((n, 5, 3)) if said is None else said
    ids = np.arange(n)
    return Cases(ids, ids, ids, ids, np.repeat("some", n), np.ones(n), np.full(n, size), said, fans, y, np.zeros((n, 3)), np.zeros(n))


def test_a_fan_that_is_a_line_holds_once_its_walks_are_led_astray():
    rng, n = np.random.default_rng(8), 3000
    line = 1e-9 * np.arange(-2, 3)[:, None] * np.ones((1, len(HORIZONS)))
    normal = np.array([-1.96, -1.2816, 0, 1.2816, 1.96])[:, None] * np.sqrt(np.array(HORIZONS) / 7)
    own = np.exp(rng.normal(size=n))  # what an account turns over
    fans = np.stack([line + u * normal * o for o in own for u in UNREST]).reshape(n, len(UNREST), len(LEVELS), len(HORIZONS))
    y = rng.standard_t(4, size=(n, len(HORIZONS))) * own[:, None] * np.sqrt(np.array(HORIZONS) / 7)
    cases, weights = made_up(fans, y, own), np.eye(5)[[0, 0, 0]]
    first, later = (cases.take((np.arange(n) < n // 2) == half) for half in (True, False))
    unrest, stretch = spread(first, weights)
    assert unrest > 0
    told = type("Learned", (), {"weights": weights, "stretch": stretch, "unrest": unrest})
    q = quantiles_of(later, told)
    for h in range(len(HORIZONS)):
        assert abs(((later.y[:, h] >= q[:, 1, h]) & (later.y[:, h] <= q[:, 3, h])).mean() - 0.8) < 0.03
    still = type("Stretched", (), {"weights": weights, "stretch": stretches(first.fan, np.zeros((len(first), 4)), first.y, first.group), "unrest": 0.0})
    assert (misses(later, q) < 0.9 * misses(later, quantiles_of(later, still))).all(), "one width for everybody"


def test_accounts_that_hardly_spend_do_not_settle_the_weights():
    rng, n = np.random.default_rng(9), 600
    y = rng.normal(size=(n, len(HORIZONS)))
    said = np.stack([y[:, 1:] + rng.normal(size=(n, 3)) * s for s in (0.3, 3, 3, 3, 3)], 1)
    size = np.ones(n)
    size[:10] = 500.0  # ten who turn over five hundred times what they spend, and are told wrong by what is right for others
    y[:10], said[:10, 3], said[:10, 0] = 0.0, 0.0, 600.0
    assert min(w[0] for w in weigh(made_up(np.zeros((n, len(UNREST), 5, 4)), y, size, said=said))) > 0.8


def test_measures_of_chances():
    rng = np.random.default_rng(1)
    p = rng.random(20_000)
    happened = rng.random(20_000) < p
    assert calibration_error(p, happened) < 0.015
    assert calibration_error(np.clip(p + 0.2, 0, 1), happened) > 0.12
    assert abs(area(p, happened) - 5 / 6) < 0.01
    assert abs(area(rng.random(20_000), happened) - 0.5) < 0.01
    assert np.isnan(area(p, np.ones(20_000, bool)))
    line = warn_line(p, happened)
    assert happened[p >= line].mean() >= 0.6
    assert warn_line(p, np.zeros(20_000, bool)) == 0.9
    simple = simple_chance(1 - p, happened, np.array([0.02, 0.5, 0.98]))
    assert np.allclose(simple, [0.95, 0.5, 0.05], atol=0.08)


def test_the_report_is_whole(candidate):
    assert candidate.report.verdict.decision in ("promote", "hold")
    html = candidate.files["validation_reports/health.html"].decode()
    assert "walks that know every dated payment" in html
    assert "://" not in html.replace("http://www.w3.org", "")
    assert len(LEVELS) == 5
    assert pl.DataFrame(candidate.evidence.coverage).height >= len(HORIZONS)
