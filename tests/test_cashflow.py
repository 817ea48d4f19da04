"""Cash flow: reconciled to the cent, robust against what happens once, and as uncertain as it says."""

from datetime import date, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fincoach.data.population import generate
from fincoach.data.tables import KINDS
from fincoach.features.ledger import day_number
from fincoach.features.recurring import detect_spending_cycles, dues
from fincoach.serving.cashflow import (
    ANCHORS,
    DAYS,
    LEVELS,
    MEMBERS,
    NOTHING_DUE,
    PLAIN,
    SHARE,
    SPENDS,
    Bend,
    CashFlow,
    Dues,
    account,
    accounts,
    balance_series,
    bent,
    cash_flow,
    ceiling,
    dues_of,
    fan_of,
    led_astray,
    opinions,
    payments_of,
    simulate,
    turnover,
)

DAY = date(2025, 9, 28)


@pytest.fixture(scope="module")
def people():
    """A population, everybody's accounts and what is due in the year after `DAY`."""
    frames = generate(people=150, days=500, seed=4).frames
    streams = detect_spending_cycles(frames, DAY)
    ahead = dues(streams, DAY + timedelta(days=1), DAY + timedelta(days=365))
    everybody = accounts(frames, date(2025, 11, 12))
    return frames, everybody, everybody.streamed(streams), ahead


def of(people, i):
    """Account number `i` as of `DAY`, and what is due."""
    _, everybody, streamed, ahead = people
    mine = ahead.filter(pl.col("user_id") == int(everybody.user_ids[i]))
    return everybody.of(i, streamed).until(day_number(DAY)), mine


def test_the_balance_reconciles_to_the_cent_on_every_day(people):
    frames, everybody, streamed, _ = people
    opening = dict(frames["user_profiles"].select("user_id", "opening_balance_minor").iter_rows())
    zones = dict(frames["users"].select("id", "timezone").iter_rows())
    for i in range(0, 25, 6):
        user = int(everybody.user_ids[i])
        rows = frames["transactions"].filter(pl.col("user_id") == user).select(
            day=pl.col("occurred_at").dt.convert_time_zone(zones[user]).dt.date(), amount="amount_minor")
        series = balance_series(everybody.of(i, streamed), day_number(date(2025, 3, 1)), day_number(date(2025, 11, 12)))
        for k in range(0, len(series), 17):
            until = date(2025, 3, 1) + timedelta(days=k)
            assert series[k] == (opening[user] or 0) + rows.filter(pl.col("day") <= until)["amount"].sum()


def test_one_laptop_moves_the_total_of_next_year_by_under_two_per_cent(people):
    kind_of = {i: KINDS.index(k) for i, k in people[0]["categories"].select("id", "kind").iter_rows()}
    today, moved = day_number(DAY), []
    for i in range(len(people[1])):
        a, mine = of(people, i)
        if not len(a.day) or today - a.day[0] < 364:
            continue
        due = dues_of(mine)
        due = due.take(np.isin([kind_of.get(c, -1) for c in due.category], SPENDS))
        spent = a.only(SPENDS)
        price = 2 * -spent.amount[spent.day > today - 364].sum() // 52  # of two weeks' spending: 3.8 % of the year's
        at = np.searchsorted(spent.day, today - 9, "right")
        more = spent._replace(day=np.insert(spent.day, at, today - 9), kind=np.insert(spent.kind, at, SPENDS[1]), amount=np.insert(spent.amount, at, -price),
                              streamed=np.insert(spent.streamed, at, False))
        year = [simulate(x, due, today, 365, begin=int(a.day[0]))[:, -1].mean() for x in (spent, more)]
        moved.append(abs(year[1] / year[0] - 1))
    # Of somebody known for a year. Whose streams end, or who often buys what costs a week, may be moved by a little more.
    assert len(moved) >= 100
    assert np.mean(np.array(moved) < 0.02) >= 0.95
    assert max(moved) < 0.08


def paid(*days):
    """A salary on these days, and a small purchase each day of the same time."""
    first, last = min(days), max(days)
    rows = [(d, "income", 250_000) for d in days] + [(first + timedelta(days=k), "discretionary", -3_000 - 7 * (k % 13)) for k in range((last - first).days + 1)]
    frames = {"users": pl.DataFrame({"id": [1], "timezone": ["UTC"]}), "transactions": pl.DataFrame([
        {"id": n, "user_id": 1, "occurred_at": d, "amount_minor": a, "currency": "EUR", "category_id": 1 if a > 0 else 14, "merchant": "Employer" if a > 0 else f"Shop {n % 5}"}
        for n, (d, _, a) in enumerate(rows)]).with_columns(pl.col("occurred_at").cast(pl.Datetime("us")).dt.replace_time_zone("UTC"))}
    streams = detect_spending_cycles(frames, last)
    ahead = dues(streams, last + timedelta(days=1), last + timedelta(days=DAYS))
    a = account([(str(d), k, m) for d, k, m in rows], opening=100_000, streamed=[250_000])
    return simulate(a, dues_of(ahead), day_number(last))


@pytest.mark.parametrize("moved", [-3, -1, 0, 1, 3])
def test_a_payday_that_moves_makes_no_second_bump(moved):
    days = [date(2025, m, 26) for m in range(1, 9)]
    days[-1] += timedelta(days=moved)
    walks = paid(*days)
    up = np.diff(walks, axis=1, prepend=walks[:, :1])
    salaries = (up > 150_000).sum(1)
    assert (up[:, :24 - moved - 7] < 150_000).mean() > 0.999, "the salary that came is not expected again"
    assert np.quantile(salaries, (0.1, 0.5)).tolist() == [2, 3] or np.median(salaries) in (2, 3)
    one = (up[:, 24 - moved - 7:38 - moved + 7] > 150_000).sum(1)
    assert (one <= 1).all()
    assert (one == 1).mean() > 0.85


def test_the_chance_of_a_payment_is_the_share_of_walks_in_which_it_comes():
    today = day_number(DAY)
    due = Dues(*(np.array([x]) for x in (0, today + 2, today + 5, today + 9, -80_000.0, -100_000.0, -130_000.0, 0.3, -1)))
    empty = account([(str(DAY), "essential", -1)], opening=50_001, streamed=[-1])
    walks = simulate(empty, due, today, paths=4000)
    assert abs((walks[:, -1] < 0).mean() - 0.3) < 0.03
    came = 50_000 - walks[:, -1][walks[:, -1] < 0]
    assert 80_000 <= came.min() < 82_000
    assert abs(np.median(came) - 100_000) < 2_000
    assert (walks[:, 0] == 50_000).all()


def test_the_fan_is_as_wide_as_the_weeks_of_the_past_say():
    rng, begin = np.random.default_rng(2), date(2024, 9, 30)
    rows = [(str(begin + timedelta(days=k)), "discretionary", -int(x)) for k, x in enumerate(rng.normal(5_000, 1_500, 364).clip(1))]
    a, today = account(rows, opening=2_000_000), day_number(begin) + 363
    walks = simulate(a, NOTHING_DUE, today, paths=2000)
    spread = (walks[:, -1] - walks[:, -1].mean()).std()
    assert abs(walks[:, -1].mean() - (balance_series(a, today, today)[0] - 84 * 5_000)) < 12_000
    assert 0.7 < spread / (1_500 * np.sqrt(84)) < 1.6


numbers_ = st.lists(st.floats(0.05, 5), min_size=4, max_size=4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), numbers_, st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_bending_keeps_the_order_of_the_fan_and_moves_its_middle_to_the_weighed_opinion(seed, sides, weights):
    rng = np.random.default_rng(seed)
    walks = np.cumsum(rng.normal(0, 100, (151, DAYS)), axis=1)
    said = np.vstack([np.median(walks, axis=0)[np.array(ANCHORS) - 1], rng.normal(0, 500, (len(MEMBERS) - 1, len(ANCHORS)))])
    w = np.array(weights) / sum(weights)
    out = bent(walks, said, Bend(weights=(tuple(w),) * 3, stretch=(tuple(sides),) * 4))
    fan = fan_of(out)
    assert (np.diff(fan, axis=0) >= -1e-6).all()
    assert np.allclose(fan[2][np.array(ANCHORS) - 1], w @ said)
    assert np.isfinite(out).all()
    assert np.allclose(bent(walks, said, PLAIN), walks)


def test_walks_led_astray_keep_their_middle_and_their_payments():
    today = day_number(DAY)
    rows = [(str(DAY - timedelta(days=k)), "income" if k % 2 else "essential", 7_000 if k % 2 else -5_000) for k in range(100)]
    of = account(rows, opening=0)
    assert np.isclose(turnover(of, today), 50 * (7_000 + 5_000) / 2 * 7 / 100)
    assert turnover(of._replace(day=of.day[:0], kind=of.kind[:0], amount=of.amount[:0]), today) == 1
    walks = np.repeat(np.where(np.arange(DAYS) >= 20, 250_000.0, 0.0)[None], 400, axis=0)
    astray = led_astray(walks, 1_000.0)
    assert np.allclose(np.median(astray, 0), walks[0])
    assert np.allclose((astray - walks).std(0), 1_000 * np.sqrt(np.arange(1, DAYS + 1) / 7), rtol=0.02)
    assert (np.abs(np.diff(astray, axis=1)[:, 19] - 250_000) < 1_000).all(), "the salary comes on its day"
    bend = Bend(unrest=1.0, stretch=((1.5,) * 4,) * 4)
    told, sure = (cash_flow(1, of, NOTHING_DUE, DAY, bend=b) for b in (bend, bend._replace(unrest=0.0)))
    assert told.fan[-1][3] - told.fan[-1][1] > sure.fan[-1][3] - sure.fan[-1][1]
    assert abs(told.fan[27][2] - sure.fan[27][2]) <= 1, "the middle is what was weighed"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=60), st.integers(0, 10**7), st.integers(1, 10**9))
def test_a_further_large_row_moves_the_total_by_a_bounded_share(sizes, beside, price):
    sizes = np.array(sizes, float)
    top = ceiling(sizes, beside)
    assert (sizes > top).sum() <= max(2, 0.2 * len(sizes))
    if len(sizes) < 3:
        assert top == 0
        return
    before, more = beside + np.minimum(sizes, top).sum(), np.append(sizes, max(price, sizes.max()))
    after = beside + np.minimum(more, ceiling(more, beside)).sum()
    cut = (more > ceiling(more, beside)).sum()
    if ceiling(more, beside) <= SHARE * after * (1 + 1e-9):  # not held up by the least number of rows
        assert after - before <= SHARE / (1 - SHARE * cut) * before * (1 + 1e-6) + 1


def test_what_comes_after_the_day_changes_nothing(people):
    a, mine = of(people, 3)
    _, everybody, streamed, _ = people
    whole = everybody.of(3, streamed)
    due, payments = dues_of(mine), payments_of(mine)
    assert len(whole.day) > len(a.day)
    assert cash_flow(4, whole, due, DAY, payments) == cash_flow(4, a, due, DAY, payments)


def test_an_answer_survives_being_kept(people):
    a, mine = of(people, 5)
    answer = cash_flow(6, a, dues_of(mine), DAY, payments_of(mine))
    assert CashFlow.from_dict(answer.to_dict()) == answer
    frame = answer.to_frame()
    assert len(frame) == DAYS
    assert frame["below"].is_between(0, 1).all()
    assert len(answer.fan[0]) == len(LEVELS)
    assert "<svg" in answer.to_html()


def test_few_rows_no_rows_and_other_currencies_have_a_stated_answer():
    none = account([])
    assert cash_flow(1, none, NOTHING_DUE, DAY).made_by == "unknown"
    one = account([(str(DAY), "essential", -500)], opening=0)
    assert cash_flow(1, one, NOTHING_DUE, DAY).made_by == "unknown"
    assert "too little history" in cash_flow(1, one, NOTHING_DUE, DAY).to_html()
    yen = account([(str(DAY - timedelta(days=k)), "essential", -1_000) for k in range(60)], opening=500_000, currency="JPY")
    assert "500,000 JPY" in repr(cash_flow(1, yen._replace(opening=560_000.0), NOTHING_DUE, DAY))
    with pytest.raises(ValueError, match="at least 84"):
        cash_flow(1, yen, NOTHING_DUE, DAY, days=30)


def test_rows_in_a_foreign_currency_are_left_out(people):
    frames = people[0]
    foreign = frames["transactions"].filter(pl.col("user_id") == 2).head(5).with_columns(currency=pl.lit("USD"), id=pl.col("id") + 10**7)
    mixed = frames | {"transactions": pl.concat([frames["transactions"], foreign])}
    assert len(accounts(mixed, DAY).ids) == len(accounts(frames, DAY).ids)


def test_a_million_rows_are_walked_as_soon_as_a_thousand():
    n = 10**6
    days = np.sort(np.random.default_rng(0).integers(day_number(DAY) - 700, day_number(DAY) + 1, n)).astype(np.int32)
    many = account([])._replace(day=days, kind=np.full(n, 2, np.int8), amount=np.full(n, -10, np.int64), streamed=np.zeros(n, bool), opening=2e7)
    answer = cash_flow(1, many, NOTHING_DUE, DAY)
    assert answer.start == 2e7 - 10 * n
    assert opinions(many, simulate(many, NOTHING_DUE, day_number(DAY)), day_number(DAY)).shape == (len(MEMBERS), len(ANCHORS))
