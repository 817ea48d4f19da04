"""Weekly series, calendar and echo against plain Python; nothing later has any influence; one person gives the batch's bits."""

from collections import defaultdict
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fincoach.data.population import generate
from fincoach.data.tables import CATEGORIES, KINDS
from fincoach.features import series as module
from fincoach.features.ledger import Ledgers, day_number, ledger
from fincoach.features.series import (
    CALENDAR,
    TimeSeriesFeatureExtractor,
    WeeklySeries,
    calendar_inputs,
    echo,
    echo_windows,
    future_mondays,
    lag_features,
    last_monday,
    person_echo,
    person_series,
    rolling_statistics,
    seasonal_patterns,
    weekly_series,
)

AS_OF = date(2025, 1, 22)  # a Wednesday; the last complete week ends on the 19th
SUNDAY = date(2025, 1, 19)
BEGIN = date(2024, 1, 1)
SPENDING = {c.name: c.id for c in CATEGORIES if KINDS[c.kind] in ("essential", "discretionary", "debt", "fee")}
NAMES = [c.name for c in CATEGORIES]
quick = settings(deadline=None, max_examples=50, phases=[Phase.explicit, Phase.reuse, Phase.generate])

row = st.tuples(st.integers(0, 420).map(lambda d: BEGIN + timedelta(days=d)), st.sampled_from(NAMES), st.integers(-90_000, 30_000))
lives = st.lists(row, max_size=60)


def make(rows, unit=0.01):
    return ledger([(str(d), "", c, a) for d, c, a in rows], unit=unit)


def reference(rows, weeks):
    """Spending by (Monday, category), total by Monday, and the first complete week, from dates alone."""
    by, total = defaultdict(int), defaultdict(int)
    born = min((d for d, _, _ in rows), default=None)
    first = None if born is None else born + timedelta(days=-born.weekday() % 7)
    mondays = [SUNDAY - timedelta(days=6 + 7 * k) for k in range(weeks)][::-1]
    for d, c, a in rows:
        monday = d - timedelta(days=d.weekday())
        if c in SPENDING and first is not None and monday >= first:
            by[monday, SPENDING[c]] -= a
            total[monday] -= a
    begins = weeks if first is None else sum(m < first for m in mondays)
    return mondays, by, total, begins


@quick
@given(lives, st.sampled_from([1, 7, 60]))
def test_agrees_with_plain_python(rows, weeks):
    s = person_series(make(rows), AS_OF, weeks)
    mondays, by, total, begins = reference(rows, weeks)
    assert s.mondays.tolist() == [day_number(m) for m in mondays]
    assert s.begins.tolist() == [begins]
    assert np.allclose(s.total[0], [total[m] / 100 for m in mondays], rtol=1e-12)
    assert np.allclose(s.y[0], [[by[m, c] / 100 for c in s.categories.tolist()] for m in mondays], rtol=1e-12)
    seen = {SPENDING[c] for d, c, _ in rows if c in SPENDING and mondays[0] <= d <= SUNDAY}
    assert set(s.categories.tolist()) == seen


def echo_reference(rows, origin: date, ahead: int):
    """The echo of one week from dates alone: the windows are found by counting days of the month."""
    def back(day, k):
        months = day.year * 12 + day.month - 1 - k
        year, month = divmod(months, 12)
        following = date(year + (month == 11), (month + 1) % 12 + 1, 1)
        return date(year, month + 1, min(day.day, (following - timedelta(days=1)).day))

    born, monday, found = min((d for d, _, _ in rows), default=None), origin + timedelta(days=7 * ahead), []
    for k in range(1, 14):
        low, high = back(monday, k), back(monday + timedelta(days=7), k) - timedelta(days=1)
        if high <= origin + timedelta(days=6) and born is not None and low >= born and len(found) < module.ECHOES:
            found.append(-sum(a for d, c, a in rows if c in SPENDING and low <= d <= high) / 100)
    return float(np.median(found)) if found else np.nan


@quick
@given(lives, st.integers(0, 50))
def test_echo_agrees_with_plain_python(rows, week):
    monday = BEGIN + timedelta(days=7 * week)
    found = person_echo(make(rows), [day_number(monday)], 12)[0, 0]
    assert np.allclose(found, [echo_reference(rows, monday, h) for h in range(1, 13)], equal_nan=True)


@quick
@given(lives, lives)
def test_rows_after_the_last_sunday_have_no_influence(rows, others):
    """Neither on the series, nor on the choice of categories, nor on the echo at any origin up to it."""
    cut = [r for r in rows if r[0] <= SUNDAY]
    grown = cut + [r for r in others if r[0] > SUNDAY]
    a, b = (person_series(make(r), AS_OF, 30) for r in (cut, grown))
    if cut:  # who begins later is not there yet, but has a ledger
        assert np.array_equal(a.begins, b.begins)
    assert np.array_equal(a.y, b.y)
    assert np.array_equal(a.total, b.total)
    assert np.array_equal(a.categories, b.categories)
    assert np.array_equal(person_echo(make(cut), a.mondays), person_echo(make(grown), a.mondays), equal_nan=True)


def test_echo_at_an_origin_knows_nothing_later():
    """Each origin by itself: rows after its Sunday replaced by others."""
    rng = np.random.default_rng(0)
    def rows(n):
        return [(BEGIN + timedelta(days=int(rng.integers(400))), "groceries", -int(rng.integers(1, 9_000))) for _ in range(n)]

    mine, other = rows(300), rows(300)
    mondays = [day_number(BEGIN) + 7 * w for w in range(50)]
    whole = person_echo(make(mine), mondays)
    for w, monday in enumerate(mondays):
        sunday = BEGIN + timedelta(days=7 * w + 6)
        mixed = [r for r in mine if r[0] <= sunday] + [r for r in other if r[0] > sunday]
        assert np.array_equal(person_echo(make(mixed), [monday])[0, 0], whole[0, w], equal_nan=True)
    assert np.isfinite(whole).mean() > 0.8


# --- one person and everybody ---


@pytest.fixture(scope="module")
def population():
    return generate(60, 300, seed=5)


def test_one_person_gives_the_bits_of_the_batch(population):
    ledgers = Ledgers.from_frames(population.frames)
    batch = weekly_series(ledgers, AS_OF, 40)
    heard = echo(ledgers, batch.mondays, 12)
    for i in range(len(ledgers)):
        alone = person_series(ledgers.person(i), AS_OF, 40, batch.categories, user_id=int(ledgers.user_ids[i]))
        for field in ("user_ids", "y", "total", "begins"):
            assert np.array_equal(getattr(alone, field), getattr(batch, field)[[i]]), field
        assert np.array_equal(person_echo(ledgers.person(i), batch.mondays), heard[[i]], equal_nan=True)
    assert 0 < np.isnan(heard).mean() < 0.6


def test_threads_and_order_of_rows_change_nothing(population, monkeypatch):
    shuffled = population.frames | {"transactions": population.frames["transactions"].sample(fraction=1, shuffle=True, seed=1)}
    a, b = (weekly_series(f, AS_OF) for f in (population.frames, shuffled))
    assert np.array_equal(a.y, b.y)
    ledgers = Ledgers.from_frames(population.frames)
    monkeypatch.setattr(module, "in_blocks", lambda offsets, work: [work(i, i + 1) for i in reversed(range(len(offsets) - 1))])
    assert np.array_equal(weekly_series(ledgers, AS_OF).y, a.y)
    assert np.array_equal(echo(ledgers, a.mondays), echo(shuffled, a.mondays), equal_nan=True)


def test_currencies_have_their_own_units():
    rows = [(date(2025, 1, 6), "groceries", -1_000), (date(2024, 12, 1), "groceries", -1_000)]
    euros, yen = (person_series(make(rows, unit), AS_OF, 3).total for unit in (0.01, 1.0))
    assert np.array_equal(euros * 100, yen)


def test_until_is_what_was_known_then(population):
    """The series as of an earlier day is the later series cut there; whoever had not begun has not begun."""
    now = weekly_series(population.frames, AS_OF)
    for weeks_ago in (1, 9, 20):
        then = weekly_series(population.frames, SUNDAY - timedelta(weeks=weeks_ago), categories=now.categories)
        cut = now.until(len(now.mondays) - 1 - weeks_ago)
        assert np.array_equal(then.y, cut.y)
        assert np.array_equal(then.begins, cut.begins)
        assert np.array_equal(then.live, cut.live)
        assert np.array_equal(future_mondays(cut, 3), now.mondays[len(cut.mondays) : len(cut.mondays) + 3] if weeks_ago >= 3 else future_mondays(cut, 3))


def test_silence_is_zero_and_the_time_before_is_not():
    rows = [(date(2024, 11, 6), "groceries", -1_000), (date(2025, 1, 15), "groceries", -2_000)]
    s = person_series(make(rows), AS_OF, 20)
    frame = s.to_frame()
    assert frame["ds"].min() == date(2024, 11, 11)
    assert frame["y"].to_list() == [0.0] * 9 + [20.0]
    assert s.live.sum() == 10


def test_edges():
    nobody = Ledgers.from_frames({
        "users": pl.DataFrame({"id": [1], "timezone": ["UTC"], "currency": ["EUR"]}),
        "transactions": pl.DataFrame(schema={"user_id": pl.Int64, "occurred_at": pl.Datetime("us", "UTC"), "amount_minor": pl.Int64, "currency": pl.String, "category_id": pl.Int64})})
    empty = weekly_series(nobody, AS_OF)
    assert empty.y.shape == (1, 1, 0)
    assert empty.begins.tolist() == [1]
    assert not empty.total.any()
    assert np.isnan(echo(nobody, empty.mondays)).all()
    long_ago = person_series(make([(date(1971, 1, 1), "rent", -1), (date(2025, 1, 7), "rent", -1)]), AS_OF)
    assert len(long_ago.mondays) == module.MOST_WEEKS
    assert echo(nobody, []).shape == (1, 0, 12)
    for wrong in (lambda: person_series(make([]), AS_OF, 0), lambda: person_series(make([]), AS_OF, 5, [8, 8]), lambda: long_ago.until(9_999),
                  lambda: person_echo(make([]), [20_000, 30_000]), lambda: lag_features(long_ago, [0])):
        with pytest.raises(ValueError, match=r"weeks|each once|among|gaps|lags"):
            wrong()


def test_large_amounts_are_exact():
    rows = [(date(2025, 1, 13), "rent", -(2**53 - 1)), (date(2025, 1, 14), "rent", -1), (date(2025, 1, 15), "rent", 2**53 - 1)]
    assert person_series(make(rows, unit=1.0), AS_OF, 3).total[0, 2] == 1.0


# --- the calendar ---


def test_calendar_agrees_with_dates():
    mondays = last_monday("2016-01-10") + 7 * np.arange(600)
    found = calendar_inputs(mondays)
    for monday, values in zip(mondays.tolist(), found.astype(float).tolist(), strict=True):
        week = [date.fromordinal(monday + 719_163 + d) for d in range(7)]
        told = dict(zip(CALENDAR, values, strict=True))
        assert round(told["days_1_7"] * 7) == sum(d.day <= 7 for d in week)
        assert round(told["days_29_31"] * 7) == sum(d.day > 28 for d in week)
        assert told["month_end"] == any((d + timedelta(days=1)).day == 1 for d in week)
        assert told["month_start"] == any(d.day == 1 for d in week)
        assert round(told["december"] * 7) == sum(d.month == 12 for d in week)
        assert abs(told["season_sin"] ** 2 + told["season_cos"] ** 2 - 1) < 1e-6
    kept = calendar_inputs(mondays)
    kept[:] = 0
    assert calendar_inputs(mondays).any()  # a caller may write into what it was given


@given(st.integers(10_000, 30_000), st.integers(1, 24))
@quick
def test_echo_windows_meet_without_a_gap(day, months):
    mondays = last_monday(day) + 7 * np.arange(60)
    first, last = echo_windows(mondays, months)
    assert (first[1:] == last[:-1] + 1).all()
    assert set(np.unique(last - first + 1)) <= set(range(4, 11))
    gap = mondays[:, None] - first
    assert (gap >= 28 * np.arange(1, months + 1)).all()


# --- frames for the analyst ---


def test_rolling_statistics_and_lags_know_nothing_later(population):
    now = weekly_series(population.frames, AS_OF)
    then = now.until(len(now.mondays) - 6)
    last = pl.Series([int(then.mondays[-1])], dtype=pl.Int32).cast(pl.Date)[0]
    assert rolling_statistics(then).equals(rolling_statistics(now).filter(pl.col("ds") <= last))
    told = lag_features(then)
    assert told.filter(pl.col("y").is_not_null()).equals(lag_features(now).filter(pl.col("ds") <= last))
    coming = told.filter(pl.col("y").is_null()).drop("y")
    begun = now.user_ids[now.begins <= len(then.mondays)]
    later = lag_features(now).filter(pl.col("ds") == last + timedelta(days=7)).drop("y")
    assert coming.filter(pl.col("user_id").is_in(begun)).equals(later)


def test_rolling_statistics_agree_with_numpy(population):
    s = weekly_series(population.frames, AS_OF).take([0])
    frame, y = rolling_statistics(s, [5]), s.total[0, s.begins[0] :]
    for k in range(4, len(y)):
        window = y[k - 4 : k + 1]
        wanted = (window.mean(), window.std(ddof=1), np.median(window), (window == 0).mean())
        assert np.allclose(frame.row(k)[3:], wanted)


def test_seasonal_patterns(population):
    s = weekly_series(population.frames, AS_OF)
    found = seasonal_patterns(s)
    assert found["user_id"].to_list() == s.user_ids.tolist()
    young = found.filter(pl.col("weeks") < module.LEAST_WEEKS)
    assert young.select(pl.exclude("user_id", "weeks").is_null().all()).row(0) == (True,) * len(module.SEASONAL)
    known = found.filter(pl.col("weeks") >= module.LEAST_WEEKS)
    assert known["month_strength"].is_between(0, 1).all()
    rent = known.filter(pl.col("month_strength") > 0.3)
    assert rent.height > 0.5 * known.height  # bills follow the month in this population
    noise = WeeklySeries(np.arange(40), s.mondays, np.random.default_rng(0).gamma(2, 50, (40, len(s.mondays), 1)), np.zeros(40, int), np.array([8]))
    assert seasonal_patterns(noise)["month_strength"].mean() < 0.1
    still = WeeklySeries(np.arange(2), s.mondays, np.stack([np.zeros((len(s.mondays), 1)), np.full((len(s.mondays), 1), 7.0)]), np.zeros(2, int), np.array([8]))
    assert seasonal_patterns(still)["trend"].to_list() == [0.0, 0.0]


def test_the_extractor_delegates_and_takes_later_rows_calmly(population):
    rows = population.frames["transactions"]
    end = datetime(2025, 1, 20, tzinfo=UTC)
    whole, cut = (TimeSeriesFeatureExtractor(population.frames | {"transactions": t}, "2025-01-19") for t in (rows, rows.filter(pl.col("occurred_at") < end - timedelta(hours=12))))
    edge = rows.filter(pl.col("occurred_at").is_between(end - timedelta(hours=12), end + timedelta(hours=12)))["user_id"].unique()
    apart = ~pl.col("user_id").is_in(edge.implode())  # people without a row near the midnight of any zone
    for frame in ("extract_seasonal_patterns", "calculate_rolling_statistics", "create_lag_features"):
        a, b = (getattr(x, frame)().filter(apart) for x in (whole, cut))
        assert a.height > 0
        assert a.equals(b), frame
    streams = whole.detect_spending_cycles()
    assert {"user_id", "stream_id"} <= set(streams.columns)
    assert "people" in repr(whole)
