"""What must hold for the numbers of any ledger whatever, and their agreement with a second, plain implementation."""

import math
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from features_reference import reference
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fincoach.data.database import connect, load, upgrade
from fincoach.data.tables import CATEGORIES, KINDS
from fincoach.features import behavior
from fincoach.features.behavior import FEATURES, NAMES, extract, features_of
from fincoach.features.ledger import NEVER, Ledgers, day_number, ledger, unit_of
from fincoach.features.state import BASE, EnhancedStateVector, FinancialStateVector, Peers, feature_config
from fincoach.features.store import batch_features, user_features, weekly_features

BEGIN, AS_OF = date(2024, 1, 1), date(2025, 1, 20)
KIND = {c.name: KINDS[c.kind] for c in CATEGORIES}
NUMBER = {c.name: c.id for c in CATEGORIES}
quick = settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking takes minutes

days = st.integers(0, 440).map(lambda d: BEGIN + timedelta(days=d))  # some are after AS_OF
minutes = st.one_of(st.none(), st.integers(1, 1439), st.sampled_from([299, 300, 359, 360, 1079, 1080, 1379, 1380]))
amounts = st.one_of(st.integers(-50_000, 50_000), st.integers(-2_000_000, 2_000_000), st.just(0))
row = st.tuples(days, minutes, st.sampled_from(sorted(NUMBER)), amounts)
goal = st.tuples(days, st.none() | days, st.none() | days, st.integers(1, 500_000))


@st.composite
def lives(draw, max_rows=80):
    """Arguments of `make`: rows, opening balance, goals and contributions of one person."""
    # A dense and a sparse life: bursts and payday windows need rows close together, silences need them apart.
    base = draw(st.lists(row, max_size=max_rows))
    near = [(d, m, c, a) for d, m, c, a in base[: draw(st.integers(0, 20))]]
    rows = base + [(AS_OF - timedelta(days=(AS_OF - d).days % 40), m, c, a) for d, m, c, a in near]
    goals = draw(st.lists(goal, max_size=3))
    puts = draw(st.lists(st.tuples(st.integers(0, len(goals) - 1), days, st.integers(-20_000, 90_000)), max_size=8)) if goals else []
    return {"rows": rows, "opening": draw(st.none() | st.integers(-100_000, 5_000_000)), "goals": goals, "puts": puts}


def clock(minute):
    return "" if minute is None else f"{minute // 60:02}:{minute % 60:02}"


def make(life, scale=1, unit=0.01):
    """The person of a life, amounts times `scale`."""
    return ledger(
        [(str(d), clock(m), c, a * scale) for d, m, c, a in life["rows"]],
        math.nan if life["opening"] is None else life["opening"] * scale, unit,
        [(*g[:3], g[3] * scale) for g in life["goals"]], [(g, d, a * scale) for g, d, a in life["puts"]],
    )


def same(a, b):
    return np.array_equal(a, b, equal_nan=True)


def by_name(values):
    return dict(zip(NAMES, values.tolist(), strict=True))


# --- against the second implementation ---


@quick
@given(lives())
def test_agrees_with_plain_python(life):
    found = by_name(features_of(make(life), AS_OF))
    wanted = reference(
        [(d, m, c, KIND[c], a) for d, m, c, a in life["rows"]], AS_OF, opening=life["opening"], goals=life["goals"], puts=life["puts"]
    )
    assert {n for n, v in found.items() if not math.isnan(v)} == set(wanted)
    for name, value in wanted.items():
        assert math.isclose(found[name], value, rel_tol=1e-9, abs_tol=1e-9), name


def test_reference_is_exercised_in_full():
    """The comparison above means something only if every number takes many values somewhere in it."""
    rng = np.random.default_rng(0)
    seen = {n: set() for n in NAMES}
    for _ in range(40):
        rows = [(BEGIN + timedelta(days=int(rng.integers(385))), int(rng.integers(1, 1440)), name := rng.choice(sorted(NUMBER)), KIND[name],
                 int(rng.lognormal(8, 1.2) * rng.choice([-1, 0.1], p=[0.9, 0.1]) * (-5 if KIND[name] == "income" else 1))) for _ in range(250)]
        goals = [(BEGIN, AS_OF + timedelta(days=90), None, 200_000), (BEGIN + timedelta(days=200), None, None, 50_000)]
        puts = [(int(rng.integers(2)), BEGIN + timedelta(days=int(rng.integers(380))), 5_000) for _ in range(6)]
        wanted = reference(rows, AS_OF, opening=int(rng.integers(0, 300_000)), goals=goals, puts=puts)
        person = ledger([(str(d), clock(m), c, a) for d, m, c, _, a in rows], 0, goals=goals, puts=puts)
        opened = reference(rows, AS_OF, opening=0, goals=goals, puts=puts)
        assert np.allclose(features_of(person, AS_OF), [opened[n] for n in NAMES], rtol=1e-9, atol=1e-9)
        for name, value in wanted.items():
            seen[name].add(round(value, 6))
    assert [n for n, values in seen.items() if len(values) < 5 and n != "month_position"] == []


# --- as of a date ---


@quick
@given(lives(), lives())
def test_what_comes_later_has_no_influence(life, other):
    def until(rows, at):
        return [r for r in rows if r[at] <= AS_OF]

    later = [r for r in other["rows"] if r[0] > AS_OF]
    cut = life | {"rows": until(life["rows"], 0), "puts": until(life["puts"], 1)}
    altered = cut | {
        "rows": cut["rows"] + later, "puts": cut["puts"] + [(g, AS_OF + timedelta(days=1), 10**9) for g in range(len(life["goals"]))],
        "goals": [(s, due, None if end and end > AS_OF else end, t) for s, due, end, t in life["goals"]]
        + [(AS_OF + timedelta(days=3), None, None, 1)],
    }
    altered["puts"].append((len(life["goals"]), AS_OF - timedelta(days=5), 700))  # to a goal that is not there yet
    assert same(features_of(make(life), AS_OF), features_of(make(cut), AS_OF))
    assert same(features_of(make(altered), AS_OF), features_of(make(cut), AS_OF))


@quick
@given(lives())
def test_a_shift_in_time_changes_only_the_calendar(life):
    """Four weeks later everything is the same but the place in the month."""
    shift = timedelta(weeks=4)

    def move(d):
        return None if d is None else d + shift

    moved = life | {"rows": [(move(d), m, c, a) for d, m, c, a in life["rows"]], "puts": [(g, move(d), a) for g, d, a in life["puts"]],
                    "goals": [(move(s), move(due), move(end), t) for s, due, end, t in life["goals"]]}
    a, b = features_of(make(life), AS_OF), features_of(make(moved), AS_OF + shift)
    keep = [n != "month_position" for n in NAMES]
    assert same(a[keep], b[keep])


# --- units ---


@quick
@given(lives())
def test_cents_and_euros(life):
    cents = features_of(make(life), AS_OF)
    assert np.allclose(features_of(make(life, 10, 0.001), AS_OF), cents, rtol=1e-12, atol=1e-12, equal_nan=True)
    hundred = by_name(features_of(make(life, 100), AS_OF))
    for feature, value in zip(FEATURES, cents.tolist(), strict=True):
        wanted = value * 100 if feature.unit.startswith("money") else value
        assert math.isclose(hundred[feature.name], wanted, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(value) and math.isnan(hundred[feature.name]))


def test_units_of_currencies():
    assert [unit_of(c) for c in ("EUR", "USD", "JPY", "KRW", "BHD", "TND")] == [0.01, 0.01, 1, 1, 0.001, 0.001]


# --- hostile ledgers ---

LOW, HIGH = (np.array([getattr(f, bound) for f in FEATURES]) for bound in ("low", "high"))


def sane(values):
    return bool((np.isnan(values) | ((values >= LOW) & (values <= HIGH))).all() and not np.isinf(values).any())


@quick
@given(st.lists(st.tuples(days, minutes, st.sampled_from(sorted(NUMBER)), st.integers(-(2**53), 2**53)), max_size=60),
       st.sampled_from([math.nan, 0, 2**53, -(2**53)]))
def test_extreme_amounts_stay_in_range(rows, opening):
    forward = features_of(ledger([(str(d), clock(m), c, a) for d, m, c, a in rows], opening), AS_OF)
    assert sane(forward)


@pytest.mark.parametrize(
    ("rows", "known"),
    [
        ([], {"month_position"}),
        ([("2025-03-01", "09:00", "dining", -5)], {"month_position"}),  # all of it in the future
        ([("2025-01-20", "09:00", "dining", 0)], {"month_position", "spending_weekly", "transactions_weekly"}),
        ([("2025-01-10", "", "dining", 500), ("2025-01-11", "", "fees", 9)],  # only refunds
         {"month_position", "spending_weekly", "transactions_weekly"}),
    ],
)
def test_little_is_known_of_little(rows, known):
    found = by_name(features_of(ledger(rows), AS_OF))
    assert {n for n, v in found.items() if not math.isnan(v)} == known
    assert all(found[n] == 0 for n in known - {"month_position"})


def test_a_year_of_silence():
    person = ledger([("2023-01-01", "10:00", "salary", 100_000), ("2023-01-02", "10:00", "dining", -5_000)], opening=0)
    found = by_name(features_of(person, AS_OF))
    assert found["spending_weekly"] == found["income_weekly"] == found["transactions_weekly"] == found["low_balance_share"] == 0
    assert found["days_since_income"] == found["days_since_purchase"] == 364
    assert found["reserve_weeks"] == 104
    assert all(math.isnan(found[n]) for n in ("savings_rate", "spending_trend", "spending_pace", "spending_volatility", "payday_effect"))


def test_one_row():
    found = by_name(features_of(ledger([("2025-01-18", "20:00", "dining", -700)], opening=1_000), AS_OF))
    assert (found["spending_weekly"], found["typical_purchase"], found["weekend_share"], found["evening_share"]) == (7, 7, 1, 1)
    assert (found["transactions_weekly"], found["impulse_share"], found["days_since_purchase"]) == (1, 0, 2)
    assert found["reserve_weeks"] == 300 / 700


# --- everybody ---


def frames_of(people, zone="UTC", currency="EUR"):
    """Tables of lives; a row of minute None is at local midnight."""
    tz, rows, goals, puts = ZoneInfo(zone), [], [], []

    def at(day, minute=0):
        return datetime(day.year, day.month, day.day, minute // 60, minute % 60, tzinfo=tz).astimezone(UTC)

    for user, life in enumerate(people, 1):
        rows += [(user, at(d, m or 0), a, currency, NUMBER[c]) for d, m, c, a in life["rows"]]
        first = len(goals) + 1
        goals += [(first + i, user, t, currency, at(s, 5), due and at(due, 5), end and at(end, 5)) for i, (s, due, end, t) in enumerate(life["goals"])]
        puts += [(first + g, at(d, 7), a) for g, d, a in life["puts"]]
    moment = pl.Datetime("us", "UTC")

    def frame(data, **schema):
        return pl.DataFrame(data, schema, orient="row").with_row_index("id", 1) if "id" not in schema else pl.DataFrame(data, schema, orient="row")

    return {
        "users": frame([(u, f"u{u}", zone, currency, at(BEGIN)) for u in range(1, len(people) + 1)], id=pl.Int64,
                       external_id=pl.String, timezone=pl.String, currency=pl.String, created_at=moment),
        "user_profiles": pl.DataFrame([(u, x["opening"]) for u, x in enumerate(people, 1)],
                                      {"user_id": pl.Int64, "opening_balance_minor": pl.Int64}, orient="row"),
        "transactions": frame(rows, user_id=pl.Int64, occurred_at=moment, amount_minor=pl.Int64, currency=pl.String, category_id=pl.Int64),
        "financial_goals": frame(goals, id=pl.Int64, user_id=pl.Int64, target_minor=pl.Int64, currency=pl.String, created_at=moment,
                                 due_at=moment, closed_at=moment).with_columns(name=pl.lit("Goal")),
        "goal_contributions": frame(puts, goal_id=pl.Int64, contributed_at=moment, amount_minor=pl.Int64),
    }


crowds = st.lists(lives(30), min_size=1, max_size=4)


@settings(quick, max_examples=25)
@given(crowds, st.randoms(use_true_random=False))
def test_everybody_is_one_person_many_times(people, random):
    frames = frames_of(people)
    ledgers = Ledgers.from_frames(frames)
    values = extract(ledgers, AS_OF)
    assert same(values, np.array([features_of(ledgers.person(i), AS_OF) for i in range(len(people))]))
    assert same(values, np.array([features_of(make(life), AS_OF) for life in people]))
    order = list(range(frames["transactions"].height))
    random.shuffle(order)
    shuffled = frames | {"transactions": frames["transactions"][order]} | {n: frames[n].reverse() for n in ("users", "financial_goals", "goal_contributions")}
    assert same(values, extract(Ledgers.from_frames(shuffled), AS_OF))


@pytest.mark.parametrize("foreign_rows", [False, True])
def test_frames_handed_in_are_not_changed(foreign_rows):
    """Rows are ordered in place, so every column must have been copied, with rows left out and without."""
    life = {"rows": [(AS_OF, 60, "dining", -100), (BEGIN, 60, "salary", 900)], "opening": 5, "goals": [(BEGIN, None, None, 9)], "puts": [(0, BEGIN, 5)]}
    frames = frames_of([life])
    if foreign_rows:
        foreign = frames["transactions"].with_columns(currency=pl.lit("USD"))
        frames["transactions"] = pl.concat([frames["transactions"], foreign], rechunk=True)
    before = {name: frame.clone().rows() for name, frame in frames.items()}
    first, again = (extract(Ledgers.from_frames(frames), AS_OF) for _ in range(2))
    assert same(first, again)
    assert {name: frame.rows() for name, frame in frames.items()} == before


def test_threads_and_dates_do_not_matter():
    crowd = behavior._random_ledgers(people=700, rows=40, seed=3)
    values = extract(crowd, "2024-11-05", threads=4)
    assert same(values, extract(crowd, "2024-11-05", threads=1))
    dates, history = weekly_features(crowd, "2024-11-05", 3)
    assert all(same(history[:, i], extract(crowd, d)) for i, d in enumerate(dates))
    assert same(np.array([features_of(crowd.person(i), "2024-11-05") for i in range(700)]), values)


@settings(quick, max_examples=8)
@given(crowds, st.sampled_from(["UTC", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"]))
def test_request_equals_batch(tmp_path_factory, people, zone):
    """From a database, for one person, the same to the last bit, foreign currency and all."""
    frames = frames_of(people, zone)
    foreign = frames["transactions"].with_columns(pl.col("id") + 10**6, currency=pl.lit("USD"))
    frames["transactions"] = pl.concat([frames["transactions"], foreign])
    engine = connect(f"sqlite:///{tmp_path_factory.mktemp('db')}/fincoach.db")
    upgrade(engine)
    load(engine, frames)
    values = extract(Ledgers.from_frames(frames), AS_OF)
    assert same(values, np.array([user_features(engine, i, AS_OF) for i in range(1, len(people) + 1)]))
    engine.dispose()
    assert same(batch_features(frames, AS_OF).drop("user_id").fill_null(np.nan).to_numpy(), values)


# --- clocks ---

EDGES = ["America/St_Johns", "Africa/Casablanca", "Pacific/Apia", "Europe/London", "Asia/Tehran", "America/Havana", "Australia/Lord_Howe", "UTC"]


@pytest.mark.parametrize("zone", EDGES)
def test_local_days_are_those_of_the_time_zone_database(zone):
    rng = np.random.default_rng(len(zone))
    around = [datetime(y, m, d, tzinfo=UTC) for y in (2006, 2011, 2024, 2025) for m in (3, 4, 10, 11, 12) for d in (1, 15, 30)]
    stamps = sorted({t + timedelta(minutes=int(rng.integers(-3000, 3000)), seconds=1) for t in around for _ in range(20)})
    frames = frames_of([{"rows": [], "opening": None, "goals": [], "puts": []}], zone)
    frames["transactions"] = pl.DataFrame({"user_id": 1, "occurred_at": stamps, "amount_minor": -1, "currency": "EUR", "category_id": 8},
                                          {"occurred_at": pl.Datetime("us", "UTC")} | dict.fromkeys(("user_id", "amount_minor", "category_id"), pl.Int64) | {"currency": pl.String})
    person = Ledgers.from_frames(frames).person(0)
    local = sorted((day_number(t.date()), t.hour * 60 + t.minute) for t in (s.astimezone(ZoneInfo(zone)) for s in stamps))
    assert list(zip(person.day.tolist(), person.minute.tolist(), strict=True)) == local


def test_a_day_ends_at_local_midnight():
    frames = frames_of([{"rows": [(AS_OF, 1439, "dining", -100), (AS_OF + timedelta(days=1), 1, "dining", -900)], "opening": None,
                         "goals": [], "puts": []}], "Asia/Tokyo")
    assert by_name(extract(Ledgers.from_frames(frames), AS_OF)[0])["spending_weekly"] == 1


# --- what is left out, and what is refused ---


def test_foreign_and_absurd_rows_are_counted_not_summed():
    life = {"rows": [(AS_OF, 60, "dining", -100)], "opening": None, "goals": [(BEGIN, None, None, 10)], "puts": [(0, BEGIN, 5)]}
    frames = frames_of([life, life])
    clean = extract(Ledgers.from_frames(frames), AS_OF)
    row = frames["transactions"][:1]
    frames["transactions"] = pl.concat([frames["transactions"], row.with_columns(currency=pl.lit("USD")), row.with_columns(amount_minor=-(2**62))])
    dollars = frames["financial_goals"][:1].with_columns(pl.lit(99, pl.Int64).alias("id"), currency=pl.lit("USD"))
    frames["financial_goals"] = pl.concat([frames["financial_goals"], dollars])
    ledgers = Ledgers.from_frames(frames)
    assert ledgers.set_aside == {"another currency": 2, "an amount beyond 2**53": 1}
    assert same(extract(ledgers, AS_OF), clean)


def test_a_flood_of_money_is_set_aside_and_others_are_not():
    life = {"rows": [(AS_OF, 60, "dining", -100)], "opening": None, "goals": [], "puts": []}
    frames = frames_of([life, life])
    flood = pl.concat([frames["transactions"][:1].with_columns(amount_minor=pl.lit(-(2**53), pl.Int64))] * 600)
    ledgers = Ledgers.from_frames(frames | {"transactions": pl.concat([frames["transactions"], flood])})
    assert ledgers.set_aside == {"amounts that add up beyond 2**62": 601}
    assert np.diff(ledgers.offsets).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("transactions", {"category_id": pl.lit(77, pl.Int64)}, "category 77"),
        ("transactions", {"category_id": pl.lit(0, pl.Int64)}, "category 0"),
        ("transactions", {"amount_minor": pl.lit(None, pl.Int64)}, "amount_minor is missing in 1 rows"),
        ("transactions", {"user_id": pl.lit(9, pl.Int64)}, "such as 9"),
        ("users", {"timezone": pl.lit("Moon/Sea")}, "unknown time zone 'Moon/Sea'"),
        ("financial_goals", {"target_minor": pl.lit(0, pl.Int64)}, "target must be above 0"),
    ],
)
def test_bad_tables_are_refused_with_the_reason(table, change, said):
    frames = frames_of([{"rows": [(AS_OF, 60, "dining", -100)], "opening": 1, "goals": [(BEGIN, None, None, 10)], "puts": []}])
    with pytest.raises(ValueError, match=said):
        Ledgers.from_frames(frames | {table: frames[table].with_columns(**change)})
    with pytest.raises(ValueError, match="no time zone"):
        Ledgers.from_frames(frames | {"transactions": frames["transactions"].with_columns(pl.col("occurred_at").dt.replace_time_zone(None))})


def test_nobody_at_all():
    ledgers = Ledgers.from_frames(frames_of([]))
    assert extract(ledgers, AS_OF).shape == (0, 28)
    with pytest.raises(ValueError, match="give a date"):
        _ = ledgers.last_day


# --- states ---


@quick
@given(lives(30), st.integers(-1, 4))
def test_states_are_the_same_numbers(life, segment):
    values = features_of(make(life), AS_OF)
    peers = Peers.fit(np.tile(values, (30, 1)), np.arange(30) % 5)
    weekly = FinancialStateVector(values).generate_weekly_state()
    state = EnhancedStateVector(values, segment, peers).generate_enhanced_state()
    assert (len(weekly.names), len(state.names)) == (17, 35)
    assert same(weekly.values, state.values[:17])
    assert np.isfinite(state.values).all()
    known = ~np.isnan(values)
    assert same(weekly.known, known[:BASE])
    assert same(weekly.values[known[:BASE]], values[:BASE][known[:BASE]])
    assert state.values[17:22].sum() == (segment >= 0)


def test_the_definition_changes_only_when_something_changed(monkeypatch):
    from fincoach.features import state

    before = feature_config()
    assert before == feature_config()
    monkeypatch.setattr(state, "_numbers_hash", lambda: "other")
    assert feature_config()["hash"] != before["hash"]


def test_never_is_after_every_day():
    assert day_number(date.max) < NEVER
