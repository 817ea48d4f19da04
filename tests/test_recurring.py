"""Recurring streams: each hard case as a ledger in words, and what must hold for any ledger."""

import re
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fincoach.data.source import Source
from fincoach.features.recurring import (
    RHYTHMS,
    PersonPayments,
    detect_spending_cycles,
    due_weeks,
    dues,
    dues_ahead,
    known_dues,
    person_streams,
    read_streams,
)

CATEGORY = {"in": 1, "out": 17}


def frames(rows, zone="Europe/Berlin"):
    """`users` and `transactions` from (user, date, amount, merchant) with a fifth, the account, if need be."""
    rows = [(*r, "giro")[:5] if len(r) == 4 else r for r in rows]
    return {
        "users": pl.DataFrame({"id": sorted({r[0] for r in rows}) or [1], "timezone": zone}),
        "transactions": pl.DataFrame(
            [(i, u, datetime(d.year, d.month, d.day, 11, tzinfo=UTC), a, "EUR", 1 if a > 0 else 17, m, acc) for i, (u, d, a, m, acc) in enumerate(rows, 1)],
            schema={"id": pl.Int64, "user_id": pl.Int64, "occurred_at": pl.Datetime("us", "UTC"), "amount_minor": pl.Int64, "currency": pl.String,
                    "category_id": pl.Int64, "merchant": pl.String, "account": pl.String}, orient="row")}


def ledger(text):
    """Rows from lines `2025-01-31  2500.00  Acme`; whatever else is in the text is prose."""
    found = re.findall(r"^\s*(\d{4}-\d\d-\d\d)\s+(-?\d+\.\d\d)(?:\s+(\S.*?))?\s*$", text, flags=re.M)
    return [(1, date.fromisoformat(d), round(float(a) * 100), m or None) for d, a, m in found]


def monthly(day, amount, merchant, first, n, shift=0):
    """`n` months of a payment on a day of the month; `shift` -1 the Friday before, 1 the Monday after."""
    out = []
    for k in range(n):
        m = first[1] - 1 + k
        begin, after = date(first[0] + m // 12, m % 12 + 1, 1), date(first[0] + (m + 1) // 12, (m + 1) % 12 + 1, 1)
        due = begin + timedelta(days=min(day, (after - begin).days) - 1)
        if due.weekday() >= 5:
            due += timedelta(days={-1: 4 - due.weekday(), 0: 0, 1: 7 - due.weekday()}[shift])
        out.append((1, due, amount, merchant))
    return out


def every(step, amount, merchant, first, n):
    """`n` payments every `step` days."""
    return [(1, first + timedelta(days=step * k), amount, merchant) for k in range(n)]


def streams(rows, as_of):
    """What is found in rows, as dicts."""
    return detect_spending_cycles(frames(rows), as_of).streams.to_dicts()


def only(rows, as_of):
    """The one stream found in rows."""
    found = streams(rows, as_of)
    assert len(found) == 1, [(f["merchant"], f["frequency"], f["count"]) for f in found]
    return found[0]


def test_a_payday_before_the_weekend():
    """
    2025-01-31  2500.00  Acme
    2025-02-28  2500.00  Acme
    2025-03-31  2500.00  Acme
    2025-04-30  2500.00  Acme
    2025-05-30  2500.00  Acme     the 31st is a Saturday
    2025-06-30  2500.00  Acme
    2025-07-31  2500.00  Acme
    2025-08-29  2500.00  Acme     the 31st is a Sunday
    2025-09-30  2500.00  Acme
    2025-10-31  2500.00  Acme
    """
    text = re.sub(r"(Acme) .*", r"\1", test_a_payday_before_the_weekend.__doc__)
    s = only(ledger(text), date(2025, 11, 10))
    assert (s["frequency"], s["anchor"], s["shift"], s["direction"], s["status"], s["amount_minor"]) == ("monthly", 31, "before", "in", "mature", 250_000)
    assert s["next_date"] == date(2025, 11, 28), "the 30th is a Sunday"
    assert s["confidence"] > 0.95
    assert len(s["transaction_ids"]) == s["count"] == 10


def test_a_bill_after_the_weekend():
    """Rent on the 1st, or the Monday after."""
    s = only(monthly(1, -80_000, "Housing", (2025, 1), 10, shift=1), date(2025, 10, 20))
    assert (s["frequency"], s["anchor"], s["shift"], s["next_date"]) == ("monthly", 1, "after", date(2025, 11, 3))


def test_a_utility_bill_may_vary_as_it_likes():
    """
    2025-01-15  -88.10  Energy
    2025-02-17  -93.40  Energy
    2025-03-17  -71.95  Energy
    2025-04-15  -64.20  Energy
    2025-05-15  -55.00  Energy
    2025-06-16  -49.75  Energy
    2025-07-15  -51.30  Energy
    """
    s = only(ledger(test_a_utility_bill_may_vary_as_it_likes.__doc__), date(2025, 7, 20))
    assert (s["frequency"], s["count"], s["price_changes"]) == ("monthly", 7, [])
    assert s["next_date"] == date(2025, 8, 15)
    assert s["low_minor"] == -9_340 <= s["amount_minor"] <= s["high_minor"] == -4_975


def test_a_higher_price_is_the_same_subscription():
    """9.99 for a year, then 11.99."""
    s = only(monthly(5, -999, "Stream", (2024, 1), 12) + monthly(5, -1_199, "Stream", (2025, 1), 5), date(2025, 5, 20))
    assert s["price_changes"] == [{"date": date(2025, 1, 5), "from": -999, "to": -1_199}]
    assert (s["count"], s["amount_minor"], s["last_minor"]) == (17, -1_199, -1_199)


def test_two_subscriptions_at_one_shop():
    """4.99 on the 3rd and 9.99 on the 20th; and both on one day."""
    for other in (20, 3):
        found = streams(monthly(3, -499, "Shop", (2025, 1), 8) + monthly(other, -999, "Shop", (2025, 1), 8), date(2025, 8, 25))
        assert sorted((s["amount_minor"], s["frequency"], s["count"]) for s in found) == [(-999, "monthly", 8), (-499, "monthly", 8)]


def test_phone_and_energy_of_similar_names_are_two():
    """City Works Energy and City Works Phone, on one day."""
    found = streams(monthly(7, -6_000, "City Works Energy 4711", (2025, 1), 6) + monthly(7, -2_500, "City Works Phone 4712", (2025, 1), 6), date(2025, 6, 20))
    assert sorted(s["amount_minor"] for s in found) == [-6_000, -2_500]


def test_numbers_and_months_in_names_do_not_part_a_stream():
    """Rent March 2025, Rent April 2025 ..."""
    rows = [(u, d, a, f"Rent {d:%B %Y} no. {d.toordinal()}") for u, d, a, _ in monthly(2, -70_000, "", (2025, 1), 6)]
    assert only(rows, date(2025, 6, 20))["count"] == 6


def test_a_missed_month_and_a_doubled_payment():
    """One month left out, one paid twice: still one stream, still going."""
    rows = monthly(12, -4_500, "Gym", (2024, 6), 14)
    assert (only(rows[:6] + rows[7:], date(2025, 7, 20))["status"], only(rows[:6] + rows[7:], date(2025, 7, 20))["count"]) == ("mature", 13)
    doubled = only([*rows, rows[8]], date(2025, 7, 20))
    assert (doubled["frequency"], doubled["count"], doubled["next_date"], doubled["amount_minor"]) == ("monthly", 14, date(2025, 8, 12), -4_500)


def test_a_payday_moved_by_three_days_makes_no_second_bump():
    """The 25th each month, once the 22nd."""
    rows = monthly(25, 210_000, "Acme", (2025, 1), 9, shift=-1)
    rows[7] = (1, date(2025, 8, 22), 210_000, "Acme")
    s = only(rows, date(2025, 10, 1))
    assert (s["count"], s["anchor"], s["next_date"]) == (9, 25, date(2025, 10, 24))


@pytest.mark.parametrize(("step", "name", "n"), [(7, "weekly", 20), (14, "biweekly", 12), (28, "four_weekly", 9)])
def test_wages_by_weeks(step, name, n):
    """Wages that vary a little, each week, each second and each fourth."""
    rng = np.random.default_rng(step)
    rows = [(u, d, round(a * rng.uniform(0.9, 1.1)), m) for u, d, a, m in every(step, 60_000, "Acme", date(2025, 1, 3), n)]
    s = only(rows, rows[-1][1] + timedelta(days=1))
    assert (s["frequency"], s["anchor"], s["next_date"]) == (name, 5, rows[-1][1] + timedelta(days=step))


def test_pay_twice_a_month():
    """The 15th and the last day, before the weekend."""
    rows = monthly(15, 140_000, "Acme", (2025, 1), 6, shift=-1) + monthly(31, 140_000, "Acme", (2025, 1), 6, shift=-1)
    s = only(rows, date(2025, 7, 2))
    assert (s["frequency"], s["count"], s["next_date"]) == ("semi_monthly", 12, date(2025, 7, 15))


def test_insurance_by_quarter_and_year():
    """Three quarters, and two years."""
    quarter = [r for i, r in enumerate(monthly(10, -18_000, "Insurance", (2024, 1), 19)) if i % 3 == 0]
    s = only(quarter, date(2025, 8, 1))
    assert (s["frequency"], s["next_date"], s["status"]) == ("quarterly", date(2025, 10, 10), "mature")
    year = [(1, date(y, 11, 4), -32_050, "Household insurance") for y in (2023, 2024)]
    s = only(year, date(2025, 1, 10))
    assert (s["frequency"], s["status"], s["next_date"].year, abs((s["next_date"] - date(2025, 11, 4)).days) <= 2) == ("yearly", "mature", 2025, True)


def test_a_thirteenth_salary_does_not_disturb_the_twelve():
    """A second salary each December 12th."""
    rows = monthly(28, 250_000, "Acme", (2023, 1), 30, shift=-1)
    found = streams([*rows, (1, date(2023, 12, 12), 250_000, "Acme"), (1, date(2024, 12, 12), 250_000, "Acme")], date(2025, 7, 1))
    assert [(s["frequency"], s["count"]) for s in found if s["frequency"] == "monthly"] == [("monthly", 30)]
    assert {s["frequency"] for s in found} <= {"monthly", "yearly"}


def test_fees_at_the_end_of_the_month():
    """3.90 on the last day, whatever its number, weekends too."""
    s = only(monthly(31, -390, "Bank", (2025, 1), 7), date(2025, 8, 5))
    assert (s["anchor"], s["shift"], s["next_date"]) == (31, "none", date(2025, 8, 31))


def test_instalments_that_count_themselves_have_an_end():
    """rate 1/12 to rate 7/12; all twelve."""
    rows = [(u, d, a, f"Laptop rate {i}/12") for i, (u, d, a, _) in enumerate(monthly(3, -8_325, "", (2025, 1), 12), 1)]
    s = only(rows[:7], date(2025, 7, 20))
    assert (s["instalments_left"], s["ends_on"], s["status"]) == (5, date(2025, 12, 3), "mature")
    done = only(rows, date(2025, 12, 4))
    assert (done["instalments_left"], done["status"], done["next_date"]) == (0, "ended", None)


def test_a_loan_that_was_paid_off_has_ended():
    """Two years, then nothing for three months."""
    s = only(monthly(5, -22_000, "Loans", (2023, 1), 24), date(2025, 4, 1))
    assert (s["status"], s["next_date"], s["missed"] >= 2, s["last_date"]) == ("ended", None, True, date(2024, 12, 5))


def test_early_with_two_payments():
    """Two payments of the same amount a month apart, and nothing else at that place."""
    found = streams(monthly(14, -1_299, "Stream", (2025, 3), 2), date(2025, 4, 20))
    assert [(s["status"], s["count"]) for s in found] in ([("early", 2)], [])


def test_groceries_each_saturday_are_a_habit():
    """A year of Saturdays, amounts as baskets are."""
    rng = np.random.default_rng(5)
    rows = [(u, d, -round(6_000 * np.exp(0.35 * rng.standard_normal())), m) for u, d, _, m in every(7, 0, "Foods", date(2024, 1, 6), 52)]
    assert streams(rows, date(2025, 1, 2)) == []


def test_coffee_each_working_day_is_a_habit():
    """2.50 each working day of half a year."""
    rows = [(1, d, -250, "Café") for k in range(180) if (d := date(2025, 1, 1) + timedelta(days=k)).weekday() < 5]
    assert streams(rows, date(2025, 7, 1)) == []


def test_a_cleaner_each_week_is_a_stream():
    """45.00 each Tuesday: as regular as groceries, but the amount is agreed."""
    s = only(every(7, -4_500, "Cleaner", date(2025, 1, 7), 15), date(2025, 4, 16))
    assert (s["frequency"], s["anchor"]) == ("weekly", 2)


def test_a_subscription_among_purchases_of_the_same_shop():
    """A pass of 49.00 on the 2nd, between forty tickets."""
    rng = np.random.default_rng(8)
    tickets = [(1, date(2025, 1, 1) + timedelta(days=int(k)), -int(rng.integers(180, 900)), "Mobility") for k in rng.choice(240, 40, replace=False)]
    s = only(tickets + monthly(2, -4_900, "Mobility", (2025, 1), 8), date(2025, 8, 31))
    assert (s["amount_minor"], s["count"]) == (-4_900, 8)


def test_without_a_name_the_text_counts_else_the_category():
    """Null merchants."""
    rows = monthly(9, -1_599, None, (2025, 1), 8)
    assert only(rows, date(2025, 8, 20))["count"] == 8
    f = frames([(u, d, -1_599 if i % 2 else -2_599, m) for i, (u, d, a, m) in enumerate(rows)])
    f["transactions"] = f["transactions"].with_columns(text=pl.when(pl.col("amount_minor") == -1_599).then(pl.lit("Tele")).otherwise(pl.lit("Music")))
    found = detect_spending_cycles(f, date(2025, 8, 20)).streams
    assert sorted(found["merchant"]) == ["Music", "Tele"]
    assert set(found["frequency"]) == {"two_monthly"}


def test_days_are_those_of_the_persons_clock():
    """A payment at 23:30 UTC on the 14th is the 15th in Berlin; and it is not there on the 14th."""
    f = frames([(1, d - timedelta(days=1), a, m) for _, d, a, m in monthly(15, -999, "Stream", (2025, 1), 5)])
    f["transactions"] = f["transactions"].with_columns(occurred_at=pl.col("occurred_at") + pl.duration(hours=12, minutes=30))
    s = detect_spending_cycles(f, date(2025, 5, 20)).streams.to_dicts()[0]
    assert (s["anchor"], s["last_date"]) == (15, date(2025, 5, 15))
    assert detect_spending_cycles(f, date(2025, 5, 14)).streams["count"].to_list() == [4]


def test_accounts_currencies_and_directions_are_kept_apart():
    """The same shop from two accounts."""
    rows = [(*r, "a") for r in monthly(3, -999, "Shop", (2025, 1), 6)] + [(*r, "b") for r in monthly(3, -999, "Shop", (2025, 1), 6)]
    assert sorted(s["account"] for s in streams(rows, date(2025, 6, 10))) == ["a", "b"]


def test_nothing_one_row_and_what_callers_do_wrong():
    """Empty in, empty out; errors say what to do."""
    assert len(detect_spending_cycles(frames([]), date(2025, 1, 1)).streams) == 0
    assert streams([(1, date(2025, 1, 1), -5, "X")], date(2025, 1, 1)) == []
    assert "No recurring" in detect_spending_cycles(frames([]), date(2025, 1, 1))._repr_html_()
    f = frames([(1, date(2025, 1, 1), -5, "X")])
    with pytest.raises(ValueError, match="no table 'users'"):
        detect_spending_cycles({"transactions": f["transactions"]}, date(2025, 1, 1))
    with pytest.raises(ValueError, match="lacks the column 'amount_minor'"):
        detect_spending_cycles(f | {"transactions": f["transactions"].drop("amount_minor")}, date(2025, 1, 1))
    with pytest.raises(ValueError, match="unknown time zone 'Mars'"):
        detect_spending_cycles(f | {"users": f["users"].with_columns(timezone=pl.lit("Mars"))}, date(2025, 1, 1))
    with pytest.raises(ValueError, match="not in users, such as 1"):
        detect_spending_cycles(f | {"users": f["users"].with_columns(id=pl.lit(7))}, date(2025, 1, 1))
    with pytest.raises(ValueError, match=r"datetime\.date"):
        detect_spending_cycles(f, "2025-01-01")


def test_as_plaid_words_it():
    """Field names, signs and words of /transactions/recurring/get."""
    rows = monthly(25, 210_000, "Acme", (2025, 1), 6) + monthly(5, -999, "Stream", (2025, 1), 6)
    f = frames(rows)
    told = detect_spending_cycles(Source("mine", f), date(2025, 7, 1)).to_plaid()
    assert set(told) == {"inflow_streams", "outflow_streams", "updated_datetime", "personal_finance_category_version", "request_id"}
    inflow, outflow = told["inflow_streams"][0], told["outflow_streams"][0]
    assert set(inflow) == {"account_id", "stream_id", "category", "category_id", "description", "merchant_name", "first_date", "last_date", "predicted_next_date",
                           "frequency", "transaction_ids", "average_amount", "last_amount", "is_active", "status", "personal_finance_category",
                           "is_user_modified", "last_user_modified_datetime"}
    assert inflow["average_amount"] == {"amount": -2100.0, "iso_currency_code": "EUR", "unofficial_currency_code": None}
    assert (outflow["average_amount"]["amount"], outflow["frequency"], outflow["status"], outflow["is_active"]) == (9.99, "MONTHLY", "MATURE", True)
    assert outflow["predicted_next_date"] == "2025-07-05"
    assert {r.plaid for r in RHYTHMS} <= {"WEEKLY", "BIWEEKLY", "SEMI_MONTHLY", "MONTHLY", "ANNUALLY", "UNKNOWN"}


def test_the_card_escapes_names():
    """A merchant's name is data."""
    card = detect_spending_cycles(frames(monthly(5, -999, "<script>alert(1)</script>", (2025, 1), 6)), date(2025, 7, 1))
    assert "<script>" not in card._repr_html_()
    assert card.to_dict()["streams"][0]["merchant"] == "<script>alert(1)</script>"


MERCHANTS = ("Acme", "Stream", "Foods", None)


@st.composite
def books(draw):
    """Rows of two people: a few streams with noise, and purchases."""
    rows = []
    for user in (1, 2):
        for _ in range(draw(st.integers(0, 3))):
            merchant, amount, day = draw(st.sampled_from(MERCHANTS)), draw(st.sampled_from([-999, -4_500, 120_000])), draw(st.integers(1, 31))
            rows += [(user, d, amount, merchant) for _, d, _, _ in monthly(day, 0, "", (2025, draw(st.integers(1, 4))), draw(st.integers(2, 9)))]
        for k, a in draw(st.lists(st.tuples(st.integers(0, 300), st.integers(-9_000, -100)), max_size=15)):
            rows.append((user, date(2025, 1, 1) + timedelta(days=k), a, draw(st.sampled_from(MERCHANTS))))
    return rows


def told(f, as_of=date(2025, 9, 15), drop=("transaction_ids",)):
    """The streams as plain rows, in an order of their own."""
    return sorted(map(repr, detect_spending_cycles(f, as_of).streams.drop(drop).to_dicts()))


@settings(max_examples=25, deadline=None)
@given(books(), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(rows, random):
    f = frames(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    assert told(f, drop=()) == told(f | {"transactions": f["transactions"][order] if rows else f["transactions"]}, drop=())


@settings(max_examples=25, deadline=None)
@given(books(), st.lists(st.tuples(st.integers(1, 400), st.integers(-90_000, 90_000)), max_size=20))
def test_what_comes_later_never_matters(rows, later):
    as_of = date(2025, 6, 30)
    known = [r for r in rows if r[1] <= as_of]
    future = [(1, as_of + timedelta(days=k), a, "Acme") for k, a in later]
    users = frames(rows)["users"].vstack(pl.DataFrame({"id": [], "timezone": []}, schema={"id": pl.Int64, "timezone": pl.String}))
    users = pl.DataFrame({"id": [1, 2], "timezone": ["Europe/Berlin"] * 2}) if len(users) < 2 else users
    assert told(frames(known) | {"users": users}, as_of) == told(frames(known + future) | {"users": users}, as_of)


@settings(max_examples=25, deadline=None)
@given(books(), st.sampled_from([2, 10, 100]))
def test_what_amounts_are_counted_in_does_not_matter(rows, factor):
    money = ("transaction_ids", "amount_minor", "last_minor", "low_minor", "high_minor", "due_low_minor", "due_high_minor", "price_changes", "variation", "confidence")
    assert told(frames(rows), drop=money) == told(frames([(u, d, a * factor, m) for u, d, a, m in rows]), drop=money)


@settings(max_examples=25, deadline=None)
@given(books())
def test_other_people_never_matter(rows):
    both = detect_spending_cycles(frames([*rows, (1, date(2025, 1, 1), -1, "x"), (2, date(2025, 1, 1), -1, "x")]), date(2025, 9, 15)).streams
    alone = detect_spending_cycles(frames([*[r for r in rows if r[0] == 1], (1, date(2025, 1, 1), -1, "x")]), date(2025, 9, 15)).streams
    assert both.filter(pl.col("user_id") == 1).drop("transaction_ids").to_dicts() == alone.drop("transaction_ids").to_dicts()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.sampled_from([7, 14, 28]), st.integers(4, 12))
def test_whole_weeks_later_is_the_same_by_weeks(weeks, step, n):
    """A stream by weeks moves with its rows."""
    first = date(2025, 1, 3)
    as_of = first + timedelta(days=step * n - 2)
    here = only(every(step, -4_500, "Cleaner", first, n), as_of)
    there = only(every(step, -4_500, "Cleaner", first + timedelta(weeks=weeks), n), as_of + timedelta(weeks=weeks))
    assert there["next_date"] - here["next_date"] == timedelta(weeks=weeks)
    assert [there[k] for k in ("frequency", "anchor", "count", "confidence", "status")] == [here[k] for k in ("frequency", "anchor", "count", "confidence", "status")]


@settings(max_examples=40, deadline=None)
@given(books())
def test_what_always_holds(rows):
    found = detect_spending_cycles(frames(rows), date(2025, 9, 15)).streams.to_dicts()
    ids = [i for s in found for i in s["transaction_ids"]]
    assert len(ids) == len(set(ids)), "a payment belongs to one stream"
    assert len({s["stream_id"] for s in found}) == len(found)
    for s in found:
        assert s["count"] == len(s["transaction_ids"]) >= 2
        assert s["low_minor"] <= s["amount_minor"] <= s["high_minor"]
        assert (s["direction"] == "in") == (s["amount_minor"] > 0)
        assert 0.5 <= s["confidence"] <= 1
        if s["status"] != "ended":
            assert date(2025, 9, 15) < s["next_date"]
            assert s["next_low"] <= s["next_date"] <= s["next_high"]


def fall(rows, as_of, days=90):
    """Due days of rows as of a date, by stream."""
    due = dues(detect_spending_cycles(frames(rows), as_of), as_of, as_of + timedelta(days=days))
    return due["day"].to_list()


def test_a_moved_payday_falls_due_once():
    """The 25th each month; once the 22nd, the 28th, or still to come."""
    rows = monthly(25, 210_000, "Acme", (2025, 1), 9)
    coming = [date(2025, 10, 25), date(2025, 11, 25), date(2025, 12, 25)]
    for day in range(22, 29):
        moved = [*rows[:8], (1, date(2025, 9, day), 210_000, "Acme")]
        assert fall(moved, date(2025, 9, day)) == [d for d in coming if d <= date(2025, 9, day) + timedelta(days=90)], day
    late = fall(rows[:8], date(2025, 9, 26), 30)
    assert (len(late), late[1]) == (2, date(2025, 10, 25)), "what is late comes once, then the next"
    assert date(2025, 9, 26) < late[0] <= date(2025, 9, 30)


def test_payments_before_the_weekend_fall_due_before_the_weekend():
    """The last day of each month, months of all lengths."""
    rows = monthly(31, 250_000, "Acme", (2025, 1), 10, shift=-1)
    assert fall(rows, date(2025, 11, 10), 130) == [date(2025, 11, 28), date(2025, 12, 31), date(2026, 1, 30), date(2026, 2, 27)]


@pytest.mark.parametrize("step", [7, 14, 28])
def test_weeks_fall_due_by_weeks(step):
    """Every so many weeks, none left out and none twice."""
    rows = every(step, -4_500, "Cleaner", date(2025, 1, 7), 12)
    last = rows[-1][1]
    assert fall(rows, last, 200) == [last + timedelta(days=step * k) for k in range(1, 200 // step + 1)]


def test_instalments_fall_due_as_often_as_they_are_owed():
    """Five of twelve are left; then none; an ended stream falls due no more."""
    rows = [(u, d, a, f"Laptop rate {i}/12") for i, (u, d, a, _) in enumerate(monthly(3, -8_325, "", (2025, 1), 12), 1)]
    assert fall(rows[:7], date(2025, 7, 20), 700) == [date(2025, m, 3) for m in range(8, 13)]
    assert fall(rows, date(2025, 12, 4), 700) == fall(monthly(5, -22_000, "Loans", (2023, 1), 24), date(2025, 4, 1), 700) == []


def test_what_falls_due_by_weeks_adds_up():
    """Rent and a refund that comes back each month, two people; money of other weeks, people and categories is left out."""
    rows = monthly(3, -70_000, "Housing", (2025, 1), 9) + monthly(12, 1_000, "Club", (2025, 1), 9) + [(2, *r[1:]) for r in monthly(3, -50_000, "Housing", (2025, 1), 9)]
    f = frames(rows)
    f["transactions"] = f["transactions"].with_columns(category_id=pl.lit(17, pl.Int64))
    due = dues(detect_spending_cycles(f, date(2025, 9, 30)), date(2025, 9, 30), date(2026, 3, 1))
    mondays = (date(2025, 9, 29) - date(1970, 1, 1)).days + 7 * np.arange(12)
    weeks = due_weeks(due, [2, 1], mondays, [17, 5])
    assert weeks.shape == (2, 12, 2)
    assert (weeks[:, :, 1] == 0).all()
    assert np.flatnonzero(weeks[0, :, 0]).tolist() == [0, 5, 9]
    assert np.flatnonzero(weeks[1, :, 0] < 0).tolist() == [1, 6, 10]
    assert 0.8 * 700 < weeks[1, 0, 0] <= 700
    assert due_weeks(due, [], mondays, [17]).shape == (0, 12, 1)
    assert due_weeks(due[:0], [1], mondays[:0], [17]).shape == (1, 0, 1)


@settings(max_examples=25, deadline=None)
@given(books(), st.integers(0, 60))
def test_what_always_holds_of_due_dates(rows, later):
    as_of = date(2025, 9, 15) + timedelta(days=later)
    found = detect_spending_cycles(frames(rows), as_of)
    due = dues(found, as_of, as_of + timedelta(days=100))
    by_id = {s["stream_id"]: s for s in found.streams.to_dicts()}
    for (stream_id,), part in due.group_by("stream_id", maintain_order=True):
        s, days = by_id[stream_id], part["day"].to_list()
        assert s["status"] != "ended"
        assert s["next_date"] == days[0]
        assert min(b - a for a, b in zip(days, [*days[1:], date.max], strict=True)).days > s["period_days"] / 2
        assert as_of < part["low_day"].min()
        assert (part["low_day"] <= part["day"]).all()
        assert (part["day"] <= part["high_day"]).all()
        assert (part["low_minor"] <= part["amount_minor"]).all()
        assert (part["amount_minor"] <= part["high_minor"]).all()
        assert part["confidence"].is_between(0, s["confidence"]).all()
        assert part["confidence"].is_sorted(descending=True)
    far = dues(found, as_of + timedelta(days=30), as_of + timedelta(days=60))
    assert far.equals(due.filter(pl.col("day").is_between(as_of + timedelta(days=30), as_of + timedelta(days=60))))


def payments(f, user):
    """The payments of one person in frames."""
    mine, zone = f["transactions"].filter(pl.col("user_id") == user), f["users"].filter(pl.col("id") == user)["timezone"].item()
    each = mine.select("currency", "merchant", "account").rows()
    texts = list(dict.fromkeys(each))
    return PersonPayments(user, zone, mine["id"].to_numpy(), mine["occurred_at"].to_physical().to_numpy(), mine["amount_minor"].to_numpy(),
                          mine["category_id"].to_numpy(), np.array([texts.index(t) for t in each], np.int64), texts)


@settings(max_examples=25, deadline=None)
@given(books(), st.randoms(use_true_random=False))
def test_one_person_alone_has_the_same_streams(rows, random):
    f = frames([*rows, (2, date(2025, 1, 1), -5, "x")])
    order = list(range(len(f["transactions"])))
    random.shuffle(order)
    alone = person_streams(payments(f | {"transactions": f["transactions"][order]}, 2), date(2025, 9, 15)).streams
    assert alone.equals(detect_spending_cycles(f, date(2025, 9, 15), user_ids=[2]).streams)


def test_one_person_with_instalments_raises_and_other_clocks():
    """All that is told of streams, from arrays; nothing from nothing."""
    rows = [(u, d, a, f"Laptop rate {i}/12") for i, (u, d, a, _) in enumerate(monthly(3, -8_325, "", (2025, 1), 7), 1)]
    rows += monthly(5, -999, "Stream", (2024, 1), 12) + monthly(5, -1_199, "Stream", (2025, 1), 5) + monthly(25, 210_000, None, (2025, 1), 7)
    for zone in ("Europe/Berlin", "Pacific/Auckland", "America/Los_Angeles"):
        f = frames(rows, zone)
        alone = person_streams(payments(f, 1), date(2025, 7, 26)).streams
        assert len(alone) == 3
        assert alone.equals(detect_spending_cycles(f, date(2025, 7, 26)).streams)
    none = PersonPayments(1, "UTC", *[np.empty(0, np.int64)] * 5, [])
    assert person_streams(none, date(2025, 7, 26)).streams.schema == alone.schema
    with pytest.raises(ValueError, match="unknown time zone 'Mars'"):
        person_streams(none._replace(timezone="Mars"), date(2025, 7, 26))


def test_a_database_gives_the_same(tmp_path):
    """The same rows from SQLite."""
    from fincoach.data.database import DatabaseError, connect, load, upgrade
    from fincoach.data.source import all_tables

    f = frames(monthly(5, -999, "Stream", (2025, 1), 6))
    users = f["users"].with_columns(external_id=pl.lit("me"), currency=pl.lit("EUR"), created_at=pl.datetime(2025, 1, 1, time_zone="UTC"))
    users = pl.concat([users, users.with_columns(id=pl.lit(2, pl.Int64), external_id=pl.lit("new"))])
    engine = connect(f"sqlite:///{tmp_path / 'a.db'}")
    upgrade(engine)
    load(engine, all_tables(users=users, transactions=f["transactions"]))
    known = detect_spending_cycles(f, date(2025, 6, 20)).streams
    assert detect_spending_cycles(engine, date(2025, 6, 20), user_ids=[1]).streams.equals(known)
    asked = []
    connection = engine.raw_connection()
    connection.driver_connection.set_trace_callback(asked.append)
    connection.close()
    assert person_streams(read_streams(engine, 1, date(2025, 6, 20)), date(2025, 6, 20)).streams.equals(known)
    assert sum("transactions" in s for s in asked) == 1, asked
    assert len(person_streams(read_streams(engine, 1, date(2025, 4, 6)), date(2025, 4, 6)).streams["days"][0]) == 4
    assert len(person_streams(read_streams(engine, 2, date(2025, 6, 20)), date(2025, 6, 20)).streams) == 0
    with pytest.raises(DatabaseError, match="nobody with the id 7"):
        read_streams(engine, 7, date(2025, 6, 20))
    engine.dispose()


def mondays_to(last, n):
    """The day numbers of the last `n` Mondays up to a date that is one."""
    return (last - date(1970, 1, 1)).days - 7 * np.arange(n - 1, -1, -1)


@pytest.fixture(scope="module")
def dozen():
    """Twelve made-up people, 420 days."""
    from fincoach.data.population import generate

    return generate(12, 420, seed=31).frames


def test_known_dues_of_rent_and_of_what_has_ended():
    """Rent on the 3rd is known for the week of each 3rd, and no other; a loan that ended is forgotten when that is seen; what was unknown then stays 0."""
    rows = monthly(3, -70_000, "Housing", (2024, 6), 17) + [(2, *r[1:]) for r in monthly(3, -50_000, "Loan", (2024, 6), 12)]
    f, mondays = frames(rows), mondays_to(date(2025, 10, 27), 74)
    f["transactions"] = f["transactions"].with_columns(category_id=pl.lit(5, pl.Int64))
    known = known_dues(f, mondays, horizon=6, every=1)
    assert known.shape == (2, 74, 6)
    assert (known[:, :4] == 0).all(), "one payment is no stream"
    for w, h in np.ndindex(60, 6):
        days = [date(1970, 1, 1) + timedelta(days=int(mondays[w + 10] + 7 * (h + 1) + k)) for k in range(7)]
        holds = any(d.day == 3 for d in days)
        assert (known[0, w + 10, h] > 350) == holds, (w, h, known[0, w + 10, h])
    assert known[1, 50].max() > 350
    assert (known[1, -12:] == 0).all()


def test_known_dues_know_nothing_from_later(dozen):
    """Rows after a week's Sunday may change at will; and each week is as if streams had been found on the Sunday that it uses."""
    mondays, every = mondays_to(date(2025, 1, 27), 20), 6
    known = known_dues(dozen, mondays, every=every)
    rng = np.random.default_rng(1)
    for w in (19, 12, 7, 3):
        sunday = date(1970, 1, 1) + timedelta(days=int(mondays[w]) + 6)
        local = pl.col("occurred_at") < datetime(sunday.year, sunday.month, sunday.day, 10, tzinfo=UTC) + timedelta(days=1, hours=16)
        altered = dozen["transactions"].with_columns(amount_minor=pl.when(local).then("amount_minor").otherwise(pl.Series(rng.integers(-9_000, -1, len(dozen["transactions"])))))
        again = known_dues(dozen | {"transactions": altered}, mondays, every=every)
        assert (again[:, :w + 1] == known[:, :w + 1]).all(), w
    newest = date(1970, 1, 1) + timedelta(days=int(mondays[13]) + 6)  # six weeks before the newest
    fresh = dues_ahead(detect_spending_cycles(dozen, newest), dozen["users"]["id"], weeks=6)
    assert (known[:, 13:19] == fresh).all()
    assert (known[:, 13:19].sum((0, 2)) > 0).all()


def test_one_persons_known_dues_are_the_same_bit_by_bit(dozen):
    """From streams of one person's arrays; by category; and the categories add up."""
    mondays, ids = mondays_to(date(2025, 1, 27), 3), dozen["categories"].filter(pl.col("kind").is_in(["essential", "discretionary", "debt", "fee"]))["id"].to_list()
    known, parts = known_dues(dozen, mondays), known_dues(dozen, mondays, categories=ids)
    assert parts.shape == (12, 3, 12, len(ids))
    assert np.allclose(parts.sum(-1), known)
    sunday = date(2025, 2, 2)
    for i, user in enumerate(dozen["users"]["id"].to_list()):
        alone = person_streams(payments(dozen, user), sunday)
        assert (dues_ahead(alone, [user])[0, 0] == known[i, -1]).all()
        assert (dues_ahead(alone, [user], categories=ids)[0, 0] == parts[i, -1]).all()
    assert (known_dues(dozen, mondays, user_ids=[5, 3]) == known[[2, 4]]).all()
    for wrong in (mondays + 1, mondays[::-1], mondays[[0, 2]]):
        with pytest.raises(ValueError, match="Mondays"):
            known_dues(dozen, wrong)
    with pytest.raises(ValueError, match="Saturday"):
        dues_ahead(detect_spending_cycles(dozen, date(2025, 2, 1)), [1])
    assert known_dues(dozen, mondays[:0]).shape == (12, 0, 12)


def test_known_dues_in_other_currencies_are_left_out():
    """A rent in francs is not spending in euros."""
    f = frames(monthly(3, -70_000, "Housing", (2025, 1), 9))
    f["users"] = f["users"].with_columns(currency=pl.lit("EUR"))
    f["transactions"] = f["transactions"].with_columns(category_id=pl.lit(5, pl.Int64))
    mondays = mondays_to(date(2025, 9, 22), 1)
    assert known_dues(f, mondays).sum() > 0
    f["transactions"] = f["transactions"].with_columns(currency=pl.lit("CHF"))
    assert known_dues(f, mondays).sum() == 0


@pytest.mark.parametrize("step", [7, 14, 28])
def test_what_is_overdue_is_never_expected_in_the_past(step):
    """A payment by weeks that does not come, day after day: the next date is ahead, and the first due date, until the stream has ended."""
    rows = every(step, -4_500, "Cleaner", date(2025, 1, 7), 12)
    for late in range(4 * step):
        as_of = rows[-1][1] + timedelta(days=step + late)
        found = detect_spending_cycles(frames(rows), as_of)
        s = found.streams.to_dicts()[0]
        coming = dues(found, as_of, as_of + timedelta(days=60))["day"].to_list()
        assert (s["status"] == "ended") == (s["next_date"] is None) == (coming == []), late
        assert s["status"] == "ended" or as_of < s["next_date"] == coming[0], late
    assert s["status"] == "ended"
