"""Logged decisions: joined as a second, plain implementation joins them; nothing from the future; bad rows set aside and counted."""

import math
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fincoach.data.database import connect, load, upgrade
from fincoach.data.export import export_snapshot, write_snapshot
from fincoach.data.population import START, generate
from fincoach.features.behavior import extract, features_of
from fincoach.features.ledger import NEEDED, Ledgers
from fincoach.features.state import EnhancedStateVector, Peers
from fincoach.recommend.decisions import ANSWERS, Decisions, numbers_before, read_decisions
from fincoach.recommend.rewards import money_and_goal
from fincoach.serving.inference import Cluster, FeatureScaling, SegmentationParameters
from fincoach.serving.recommendation import EnhancedCQLModelService, state_hash

ACTIONS = ("do_nothing", "save_more", "pay_debt")
MOMENT = pl.Datetime("us", "UTC")
BEGIN = datetime(2025, 3, 1, tzinfo=UTC)  # the clocks of New York change on 9 March, those of Berlin on 30 March
ZONES = {1: "UTC", 2: "America/New_York", 3: "Pacific/Kiritimati", 4: "Europe/Berlin"}
HISTORY = {"id": pl.Int64, "user_id": pl.Int64, "decided_at": MOMENT, "action": pl.String, "propensity": pl.Float64, "strategy": pl.String}
FEEDBACK = {"id": pl.Int64, "recommendation_id": pl.Int64, "received_at": MOMENT, "response": pl.String, "helpful": pl.Boolean}
PAYMENTS = {"id": pl.Int64, "user_id": pl.Int64, "occurred_at": MOMENT, "amount_minor": pl.Int64, "currency": pl.String, "category_id": pl.Int64}
NAN = math.nan
quick = settings(deadline=None, max_examples=35, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def at(minutes):
    """Minutes after BEGIN as a moment; None stays."""
    return None if minutes is None else BEGIN + timedelta(minutes=minutes)


def frames(decisions=(), answers=(), payments=(), zones=ZONES):
    """Tables from tuples: (id, user, minutes, action, propensity, strategy), (id, decision, minutes, response, helpful), (user, minutes, cents)."""
    rows = [(n, user, at(m), cents, "EUR", 1 if cents > 0 else 8) for n, (user, m, cents) in enumerate(payments, 1)]
    return {
        "users": pl.DataFrame({"id": list(zones), "timezone": list(zones.values()), "currency": ["EUR"] * len(zones)}),
        "transactions": pl.DataFrame(rows, schema=PAYMENTS, orient="row"),
        "recommendation_history": pl.DataFrame([(i, u, at(m), *r) for i, u, m, *r in decisions], schema=HISTORY, orient="row"),
        "recommendation_feedback": pl.DataFrame([(i, d, at(m), *r) for i, d, m, *r in answers], schema=FEEDBACK, orient="row"),
    }


DAY = 1440
ALWAYS = [(user, -90 * DAY, 100_000) for user in ZONES] + [(user, -k * DAY, -1_000 * k) for user in ZONES for k in range(1, 9)]


def read(decisions=(), answers=(), payments=ALWAYS, as_of="2025-06-30", **more):
    return read_decisions(frames(decisions, answers, payments), as_of, actions=ACTIONS, **more)


def rules(decisions):
    return {(f.table.removeprefix("recommendation_"), f.rule): f.count for f in decisions.findings}


def same(a, b, but=()):
    """Whether two `Decisions` are equal in every field but those named."""
    for name, mine in vars(a).items():
        theirs = getattr(b, name)
        if name in but:
            continue
        if isinstance(mine, np.ndarray):
            equal = np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f") and mine.dtype == theirs.dtype
        else:
            equal = repr(mine) == repr(theirs)  # NaN among examples is not equal to itself
        if not equal:
            return False
    return True


# --- against a second implementation ---


def local(moment, user):
    return moment.astimezone(ZoneInfo(ZONES.get(user, "UTC"))).date()


def plainly(decisions, answers, payments, as_of, horizon):
    """What `read_decisions` should find, said row by row: id -> (day, action, response, helpful, next id), counts of rules, waiting."""
    found = Counter()

    def keep(rows, table, rule, good):
        kept = [r for r in rows if good(r)]
        if len(kept) < len(rows):
            found[table, rule] += len(rows) - len(kept)
        return kept

    dated = keep([(i, u, at(m), a, p, s) for i, u, m, a, p, s in decisions], "history", "no moment", lambda r: r[2] is not None)
    known = [r for r in dated if local(r[2], r[1]) <= as_of]
    seen = set()
    rows = keep(known, "history", "the same row again", lambda r: not (r in seen or seen.add(r)))
    times = Counter(r[0] for r in rows)
    rows = keep(rows, "history", "one number for several", lambda r: times[r[0]] == 1)
    rows = keep(rows, "history", "unknown user", lambda r: r[1] in ZONES)
    rows = keep(rows, "history", "unknown action", lambda r: r[3] in ACTIONS)
    rows = keep(rows, "history", "impossible propensity", lambda r: r[4] is not None and 0 < r[4] <= 1)
    lowest = {}
    for r in sorted(rows):
        lowest.setdefault((r[1], r[2], r[3]), r[0])
    rows = keep(rows, "history", "the same decision again", lambda r: lowest[r[1], r[2], r[3]] == r[0])
    first = {}
    for user, m, _ in payments:
        first[user] = min(first.get(user, date.max), local(at(m), user))
    rows = keep(rows, "history", "before any transaction", lambda r: first.get(r[1], date.max) < local(r[2], r[1]))
    by_id = {r[0]: r for r in rows}

    said = keep([(i, d, at(m), *r) for i, d, m, *r in answers], "feedback", "no moment", lambda r: r[2] is not None)
    said = [r for r in said if local(r[2], by_id[r[1]][1] if r[1] in by_id else None) <= as_of]
    said = keep(said, "feedback", "unknown decision", lambda r: r[1] in {k[0] for k in known})
    said = keep(said, "feedback", "decision set aside", lambda r: r[1] in by_id)
    said = keep(said, "feedback", "before its decision", lambda r: r[2] >= by_id[r[1]][2])
    said = keep(said, "feedback", "unknown answer", lambda r: r[3] in ANSWERS[1:])
    said = keep(said, "feedback", "answer to nothing", lambda r: by_id[r[1]][3] != "do_nothing")
    answer, several = {}, set()
    for r in sorted(set(said), key=lambda r: (r[1], r[2], r[0])):
        if r[2] <= by_id[r[1]][2] + timedelta(days=horizon):
            several |= {r[1]} & set(answer)
            answer[r[1]] = r[3:5]
    if several:
        found["feedback", "answered more than once"] = len(several)

    rows = sorted((r for r in rows if local(r[2] + timedelta(days=horizon), r[1]) <= as_of), key=lambda r: (r[1], r[2], r[0]))
    following = {a[0]: b[0] for a, b in pairwise(rows) if a[1] == b[1]}
    out = {}
    for r in rows:
        silent = r[3] == "do_nothing"
        response, helpful = ("none", None) if silent else answer.get(r[0], ("ignored", None))
        out[r[0]] = (local(r[2], r[1]), r[3], response, helpful, following.get(r[0]))
    return out, dict(found), len(by_id) - len(rows)


minutes = st.one_of(st.integers(-3 * DAY, 75 * DAY), st.sampled_from([0, 300, 840, DAY, 1439, 28 * DAY, 28 * DAY + 1, 28 * DAY - 1, 28 * DAY + 300]))
decision = st.tuples(
    st.integers(1, 9), st.integers(1, 5), st.none() | minutes | minutes | minutes, st.sampled_from([*ACTIONS, *ACTIONS, "nonsense", None]),
    st.sampled_from([0.25, 0.25, 0.5, 1.0, 1.0, 0.0, 2.0, -0.5, NAN, math.inf, None]), st.sampled_from(["softmax", "calm", None]),
)
answer = st.tuples(st.integers(1, 9), st.none() | minutes | minutes, st.sampled_from([*ANSWERS[1:], *ANSWERS[1:], "liked", "none", None]), st.sampled_from([None, True, False]))
payment = st.tuples(st.integers(1, 4), minutes | st.integers(-60 * DAY, 0), st.sampled_from([-1_000, -2_500, 50_000]))


@st.composite
def logs(draw):
    """Lists of decisions, answers and payments, most of them usable, some of them twice."""
    decisions = draw(st.lists(decision, max_size=10))
    decisions += draw(st.lists(st.sampled_from(decisions), max_size=2)) if decisions else []
    answers = [(n, *a) for n, a in enumerate(draw(st.lists(answer, max_size=12)), 1)]
    return decisions, answers, draw(st.lists(payment, max_size=8)) + draw(st.sampled_from([[], ALWAYS, ALWAYS[:1]]))


@quick
@given(logs(), st.integers(20, 75), st.sampled_from([1, 7, 28]))
def test_joined_as_said_row_by_row(log, days, horizon):
    as_of = (BEGIN + timedelta(days=days)).date()
    found = read(*log, as_of=as_of, horizon=horizon)
    wanted, counts, waiting = plainly(*log, as_of, horizon)
    ids = found.decision_id.tolist()
    got = {i: (found.day[k].astype(date), ACTIONS[found.action[k]], ANSWERS[found.response[k]], {1: True, 0: False, -1: None}[found.helpful[k]],
               ids[found.next[k]] if found.next[k] >= 0 else None) for k, i in enumerate(ids)}
    assert got == wanted
    assert rules(found) == counts
    assert found.waiting == waiting
    assert same(found, read(*[part[::-1] for part in log], as_of=as_of, horizon=horizon))
    found._repr_html_(), found.to_dict(), found.to_frame()


# --- days, zones and clocks ---


def test_the_state_ends_with_the_day_before_on_the_persons_own_clock():
    evening = 8 * DAY + 23 * 60  # 9 March, 23:00 UTC: 10 March on Kiritimati, the 9th in New York
    for user, day in ((2, date(2025, 3, 9)), (3, date(2025, 3, 10))):
        log = [(1, user, evening, "save_more", 0.5, "x")]
        found = read(log)
        assert found.day.tolist() == [day]
        before = extract(Ledgers.of(frames(payments=ALWAYS)), day - timedelta(days=1))[user - 1]
        assert np.array_equal(found.values[0], before, equal_nan=True)
        midnight = int((datetime.combine(day, datetime.min.time(), ZoneInfo(ZONES[user])) - BEGIN).total_seconds()) // 60
        assert same(found, read(log, payments=[*ALWAYS, (user, midnight + 1, -99_000)]), but=("parts",))  # on the day itself
        earlier = read(log, payments=[*ALWAYS, (user, midnight - 1, -99_000)])
        assert not np.array_equal(found.values, earlier.values, equal_nan=True)


@pytest.mark.parametrize("user", ZONES)
def test_a_decision_counts_once_its_horizon_is_over_wherever_the_clocks_stand(user):
    midnight = datetime(2025, 3, 6, tzinfo=ZoneInfo(ZONES[user])).astimezone(UTC)
    start = int((midnight - BEGIN).total_seconds()) // 60
    log = [(1, user, start, "save_more", 0.5, "x"), (2, user, start + 1_439, "save_more", 0.5, "x")]
    late = {1: 28, 2: 29, 3: 28, 4: 29}[user]  # the clocks went forward, so that 28 times 24 hours later the day is over
    first = date(2025, 3, 6)
    assert [len(read(log, as_of=first + timedelta(days=n))) for n in (0, 27, 28, late)] == [0, 0, 2 if late == 28 else 1, 2]
    assert read(log, as_of=first + timedelta(days=27)).waiting == 2
    assert read(log, as_of=first - timedelta(days=1)).waiting == 0  # not yet decided
    found = read(log)
    assert (found.over - found.day).astype(int).tolist() == [28, late]
    for split, rows in ((0, (0, 2)), (28, (0, 0)), (29, (1 + (late == 28), 0)), (30, (2, 0))):
        assert tuple(map(len, found.split(first + timedelta(days=split)))) == rows


def test_where_the_clocks_went_back_the_horizon_ends_an_hour_earlier():
    night = datetime(2025, 10, 20, 0, 30, tzinfo=ZoneInfo("Europe/Berlin")).astimezone(UTC)
    log = [(1, 4, int((night - BEGIN).total_seconds()) // 60, "save_more", 0.5, "x")]
    assert [len(read(log, as_of=date(2025, 11, d))) for d in (15, 16)] == [0, 1]
    last = int((night - BEGIN).total_seconds()) // 60 + 28 * DAY
    assert read(log, [(1, 1, last, "accepted", None)], as_of=date(2025, 11, 16)).parts[0, 2] == 1


def test_an_answer_counts_up_to_the_minute_the_horizon_ends():
    log = [(1, 1, 600, "save_more", 0.5, "x")]
    for minute, response in ((600, "accepted"), (600 + 28 * DAY, "accepted"), (601 + 28 * DAY, "ignored"), (599, "ignored")):
        assert ANSWERS[read(log, [(1, 1, minute, "accepted", True)]).response[0]] == response
    assert rules(read(log, [(1, 1, 599, "accepted", True)])) == {("feedback", "before its decision"): 1}


@pytest.mark.parametrize(("said", "engagement", "burden"), [
    ([], 0, 1), ([("ignored", None)], 0, 1), ([("dismissed", None)], 0, 2), ([("accepted", None)], 1, 1), ([("accepted", False)], 0, 1),
    ([("accepted", True), ("accepted", False)], 0, 1), ([("accepted", False), ("accepted", None)], 1, 1), ([("implemented", True)], 1, 1), ([("dismissed", None), ("implemented", None)], 1, 1), ([("accepted", True), ("dismissed", True)], 0, 2),
])
def test_engagement_and_burden(said, engagement, burden):
    found = read([(1, 1, 600, "save_more", 0.5, "x")], [(n, 1, 700 + n, *a) for n, a in enumerate(said)])
    assert found.parts[0, 2:].tolist() == [engagement, burden]


@pytest.mark.parametrize("horizon", [28, 7])
def test_money_and_goals_are_those_of_the_days_of_the_horizon(horizon):
    log = [(1, 1, 600, "save_more", 0.5, "x")]
    after = [(1, 800, -400), (1, 5 * DAY, -300)]

    def money(*more):
        return read(log, payments=[*ALWAYS, *after, *more], horizon=horizon).parts[0, 0]

    ledgers = Ledgers.of(frames(payments=[*ALWAYS, *after]))
    assert money() == money_and_goal(ledgers, [0], np.array(["2025-03-01"], "M8[D]"), horizon)[0, 0] != 0
    assert money() == money((1, horizon * DAY + 1, -700))
    assert money() > money((1, horizon * DAY - 1, -700))


def test_nothing_said_is_no_burden_and_has_no_answer():
    found = read([(1, 1, 600, "do_nothing", 0.5, "x")], [(1, 1, 700, "dismissed", None)])
    assert ANSWERS[found.response[0]] == "none"
    assert found.parts[0, 2:].tolist() == [0, 0]
    assert rules(found) == {("feedback", "answer to nothing"): 1}
    told = {r["action"]: r for r in found.answers().to_dicts()}
    assert (told["do_nothing"]["decisions"], told["do_nothing"]["ignored"], told["save_more"]["ignored"]) == (1, None, None)


@pytest.mark.parametrize("turn", [1, -1])
def test_at_the_same_moment_the_higher_id_is_later(turn):
    log = [(1, 1, 600, "save_more", 0.5, "x"), (2, 1, 600, "pay_debt", 0.5, "x")]
    said = [(1, 1, 700, "implemented", None), (2, 1, 700, "dismissed", None), (3, 2, 700, "dismissed", None), (4, 2, 700, "accepted", None)]
    found = read(log[::turn], said[::turn])
    assert (found.decision_id.tolist(), found.next.tolist()) == ([1, 2], [1, -1])
    assert [ANSWERS[r] for r in found.response] == ["dismissed", "accepted"]


def test_answers_are_told_by_action():
    log = [(n, 1, 600 + n, "save_more", p, "x") for n, p in enumerate((0.5, 0.25, 0.25, 1.0), 1)]
    said = [(1, 1, 900, "implemented", None), (2, 2, 900, "accepted", False), (3, 3, 900, "dismissed", None)]
    (row,) = read(log, said).answers().filter(pl.col("action") == "save_more").to_dicts()
    assert row == {"action": "save_more", "decisions": 4, "propensity": 0.5, **dict.fromkeys(ANSWERS[1:], 0.25), "relevance": 0.25}


# --- bad input ---


def test_the_cards_table_fits_a_notebook():
    """Four columns: each answer's share is in the picture below, and the last column must not be cut off."""
    page = read([(1, 1, 600, "save_more", 0.5, "x")], [(1, 1, 700, "accepted", None)])._repr_html_()
    assert [h.split(">")[-1] for h in page.split("<thead>")[1].split("</thead>")[0].split("</th")[:-1]] == ["Action", "Decisions", "Propensity", "Relevance"]
    assert "100%" in page


def test_rows_set_aside_are_counted_with_examples_and_advice():
    log = [
        (1, 1, 600, "save_more", 0.5, "x"), (2, 1, 600, "save_mroe", 0.5, "x"), (3, 1, 600, "pay_debt", 0.0, "x"), (4, 1, 600, "pay_debt", NAN, "x"),
        (5, 1, 600, "pay_debt", 2.0, "x"), (6, 7, 600, "pay_debt", 0.5, "x"), (7, 1, -99 * DAY, "pay_debt", 0.5, "x"), (8, 1, None, "pay_debt", 0.5, "x"),
        (9, 1, 600, "save_more", 0.5, "x"), (10, 1, 700, "pay_debt", 0.5, "x"), (10, 1, 800, "pay_debt", 0.5, "x"), (1, 1, 600, "save_more", 0.5, "x"),
    ]
    found = read(log, [(1, 1, 700, "liked", None), (2, 99, 700, "accepted", None), (3, 1, None, "accepted", None), (4, 5, 700, "accepted", None)])
    assert found.decision_id.tolist() == [1]
    assert rules(found) == {
        ("history", "unknown action"): 1, ("history", "impossible propensity"): 3, ("history", "unknown user"): 1, ("history", "before any transaction"): 1,
        ("history", "no moment"): 1, ("history", "the same decision again"): 1, ("history", "one number for several"): 2, ("history", "the same row again"): 1,
        ("feedback", "unknown answer"): 1, ("feedback", "unknown decision"): 1, ("feedback", "no moment"): 1, ("feedback", "decision set aside"): 1,
    }
    assert all(f.examples and f.advice for f in found.findings)
    assert "waiting" not in repr(found)
    assert "11 set aside" in repr(found)
    assert "save_mroe" in found._repr_html_()


def test_rows_of_nobody_known_have_their_day_in_utc():
    late = 23 * 60  # of 1 March
    for as_of, count in ((date(2025, 3, 1), 1), (date(2025, 2, 28), 0)):
        found = read([(1, 9, late, "save_more", 0.5, "x")], [(1, 99, late, "accepted", None)], as_of=as_of)
        assert rules(found) == ({("history", "unknown user"): 1, ("feedback", "unknown decision"): 1} if count else {})


def test_a_person_without_transactions_has_no_decisions_to_learn_from():
    found = read([(1, 1, 600, "save_more", 0.5, "x"), (2, 2, 600, "save_more", 0.5, "x")], payments=[p for p in ALWAYS if p[0] != 1])
    assert found.user_id.tolist() == [2]
    assert rules(found) == {("history", "before any transaction"): 1}
    on_the_day = [(1, 600, -1_000)]
    assert len(read([(1, 1, 900, "save_more", 0.5, "x")], payments=on_the_day)) == 0
    assert len(read([(1, 1, 900 + DAY, "save_more", 0.5, "x")], payments=on_the_day)) == 1


def test_empty_tables_give_no_decisions():
    found = read(payments=[])
    assert isinstance(found, Decisions)
    assert (len(found), found.findings, found.waiting) == (0, (), 0)
    assert found.states(enhanced=False).shape == (0, 17)
    assert found.states().shape == (0, 35)
    assert found.take([]).split("2025-01-01")[0].discounts(0.9).shape == (0,)
    assert found.returns(np.empty(0), 0.9).shape == (0,)
    assert found.answers()["decisions"].sum() == 0
    assert "0 of 0 people" in found._repr_html_() or found.to_dict()["decisions"] == 0
    nobody = {n: f.clear() for n, f in frames().items()}
    assert len(read_decisions(nobody, "2025-06-30")) == 0


def test_one_row():
    found = read([(1, 1, 600, "save_more", 0.5, None)], segmentation=None)
    assert (found.next.tolist(), found.weeks_to_next.tolist(), found.strategy.tolist(), found.segment_id.tolist()) == ([-1], [0.0], ["unknown"], [-1])
    assert found.states().shape == (1, 35)
    with pytest.raises(ValueError, match="at least two decisions"):
        found.log(found.parts[:, 2])


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: f.pop("recommendation_history"), "no table 'recommendation_history'"),
    (lambda f: f.pop("recommendation_feedback"), "no table 'recommendation_feedback'"),
    (lambda f: f.update(recommendation_history=f["recommendation_history"].drop("propensity")), "lacks the column 'propensity'"),
    (lambda f: f.update(recommendation_history=f["recommendation_history"].with_columns(pl.col("decided_at").dt.replace_time_zone(None))), "with a time zone"),
    (lambda f: f.update(recommendation_feedback=f["recommendation_feedback"].with_columns(pl.col("received_at").dt.date())), "with a time zone"),
    (lambda f: f.update(recommendation_history=f["recommendation_history"].with_columns(pl.col("decided_at").dt.to_string())), "with a time zone"),
    (lambda f: f.update(recommendation_history=f["recommendation_history"].with_columns(pl.col("id").cast(pl.Float64))), "id is Float64, not Int64"),
    (lambda f: f.update(recommendation_history=f["recommendation_history"].with_columns(pl.col("propensity").cast(pl.String))), "propensity is String, not Float64"),
    (lambda f: f.update(recommendation_feedback=f["recommendation_feedback"].with_columns(pl.lit("yes").alias("helpful"))), "helpful is String, not Boolean"),
    (lambda f: f.update(users=f["users"].with_columns(pl.lit("Mars/Base").alias("timezone"))), "time zone"),
])
def test_what_the_caller_got_wrong_is_said(change, message):
    tables = frames([(1, 1, 600, "save_more", 0.5, "x")], payments=ALWAYS)
    change(tables)
    with pytest.raises(ValueError, match=message):
        read_decisions(tables, "2025-06-30")


@pytest.mark.parametrize("horizon", [0, -1, 2.5, True, None])
def test_a_horizon_is_whole_days(horizon):
    with pytest.raises(ValueError, match="horizon"):
        read(horizon=horizon)


def test_columns_of_other_widths_and_zones_are_read_alike():
    log, answers = [(1, 1, 600, "save_more", 0.5, "x")], [(1, 1, 700, "accepted", True)]
    tables = frames(log, answers, ALWAYS)
    other = dict(tables)
    other["recommendation_history"] = tables["recommendation_history"].with_columns(
        pl.col("decided_at").dt.convert_time_zone("Asia/Tokyo").dt.cast_time_unit("ns"), pl.col("id", "user_id").cast(pl.Int32)).lazy()
    other["recommendation_feedback"] = tables["recommendation_feedback"].drop("id", "helpful")
    assert same(read_decisions(tables, "2025-06-30"), read_decisions(other, "2025-06-30"), but=("helpful",))


def test_where_a_limit_held_back_everything_nothing_was_decided():
    tables = frames([(n, 1, n * DAY, a, 1.0, "x") for n, a in enumerate(("save_more", "do_nothing", "do_nothing"), 1)], payments=ALWAYS)
    tables["recommendation_history"] = tables["recommendation_history"].with_columns(served_by=pl.Series(["model-35", "limits", None]))
    found = read_decisions(tables, "2025-06-30")
    assert (found.decision_id.tolist(), found.next.tolist()) == ([1, 3], [1, -1])
    assert rules(found) == {("history", "held by limits"): 1}
    assert "set aside" not in repr(found)


def test_columns_without_any_value_are_read():
    tables = frames([(1, 1, 600, "save_more", None, None)], payments=ALWAYS)
    tables["recommendation_history"] = tables["recommendation_history"].with_columns(pl.lit(None).alias("propensity"), pl.lit(None).alias("strategy"))
    assert rules(read_decisions(tables, "2025-06-30")) == {("history", "impossible propensity"): 1}


def test_markup_in_a_log_is_text_in_the_card():
    found = read([(1, 1, 600, "<script>alert(1)</script>", 0.5, "<b>"), (2, 1, 600, "save_more", 0.5, "<b>")])
    assert "<script" not in found._repr_html_()
    assert "&lt;script" in found._repr_html_()


# --- segments ---


def scheme(*clusters, feature="spending_weekly"):
    """A segmentation by one feature: (segment, centre, weight)."""
    return SegmentationParameters("made", date(2025, 1, 1), (FeatureScaling(feature, "linear", 50.0, 0.0, 1.0, 1e6),), tuple(
        Cluster(s, f"segment {s}", 1.0, w, (c,)) for s, c, w in clusters), 1.0, 0.1)


def test_segments_are_those_of_the_numbers_before_the_decision():
    log = [(1, 1, 600, "save_more", 0.5, "x"), (2, 1, 60 * DAY, "save_more", 0.5, "x")]
    payments = [*ALWAYS, *((1, k * DAY, -90_000) for k in range(20, 60))]
    found = read(log, payments=payments, segmentation=scheme((2, 30.0, 0.5), (4, 3_000.0, 0.5)))
    assert found.segment_id.tolist() == [2, 4]
    assert found.segmentation == "made"
    assert found.states()[:, [19, 21]].tolist() == [[1, 0], [0, 1]]


def test_two_groups_of_one_segment_count_together():
    level = extract(Ledgers.of(frames(payments=ALWAYS)), date(2025, 2, 28))[0, 1]
    groups = scheme((0, level + 0.1, 0.4), (1, level - 0.2, 0.3), (1, level + 0.2, 0.3))
    assert read([(1, 1, 600, "save_more", 0.5, "x")], segmentation=groups).segment_id.tolist() == [1]
    assert read([(1, 1, 600, "save_more", 0.5, "x")], segmentation=scheme((-1, 0.0, 1.0))).segment_id.tolist() == [-1]


def test_a_segmentation_by_other_numbers_is_refused():
    with pytest.raises(ValueError, match="needs the number 'shoe_size'"):
        read([(1, 1, 600, "save_more", 0.5, "x")], segmentation=scheme((0, 0.0, 1.0), feature="shoe_size"))


# --- time: nothing from the future ---


@pytest.fixture(scope="module")
def population():
    return generate(people=60, days=260, seed=11).frames


LAST = START + timedelta(days=259)


@contextmanager
def database(folder):
    """An empty database of its own."""
    engine = connect(f"sqlite:///{folder}/fincoach.db")
    try:
        upgrade(engine)
        yield engine
    finally:
        engine.dispose()


def shaken(frame, later, seed):
    """`frame` with every number and text of the rows where `later` holds dealt out anew among them, and some of them lost."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(frame.select(later).to_series().to_numpy())
    kept = np.setdiff1d(np.arange(frame.height), rows[rng.random(len(rows)) < 0.3])
    order = np.arange(frame.height)
    order[rows] = rng.permutation(rows)
    swapped = frame[order].select(c for c in frame.columns if c not in ("id", "user_id", "occurred_at", "recommendation_id", "received_at"))
    return frame.with_columns(swapped)[kept]


def test_the_future_changes_nothing(population):
    day = date(2024, 12, 15)
    end = pl.lit(datetime(2024, 12, 17, tzinfo=UTC))  # later than the end of that day in every zone
    future = {"transactions": "occurred_at", "recommendation_history": "decided_at", "recommendation_feedback": "received_at"}
    cut = population | {name: population[name].filter(pl.col(c) < end) for name, c in future.items()}
    known = read_decisions(cut, day)
    assert len(known) > 300
    assert known.waiting > 50
    assert same(known, read_decisions(population, day))
    odd = population | {"transactions": shaken(population["transactions"], pl.col("occurred_at") >= end, 1),
                        "recommendation_feedback": shaken(population["recommendation_feedback"], pl.col("received_at") >= end, 2)}
    assert same(known, read_decisions(odd, day))


def test_what_comes_after_a_decisions_horizon_changes_no_outcome(population):
    whole = read_decisions(population, LAST)
    day = np.datetime64("2024-11-04")
    before = np.flatnonzero(whole.day <= day)
    end = pl.lit(datetime(2024, 11, 4, tzinfo=UTC) + timedelta(days=30))
    odd = read_decisions(population | {
        "transactions": shaken(population["transactions"], pl.col("occurred_at") >= end, 3),
        "recommendation_feedback": shaken(population["recommendation_feedback"], pl.col("received_at") >= end, 4)}, LAST)
    assert len(before) > 200
    for name in ("values", "parts", "response", "helpful", "propensity"):
        assert np.array_equal(getattr(whole, name)[before], getattr(odd, name)[before], equal_nan=True), name
    assert not np.array_equal(whole.values, odd.values, equal_nan=True)  # the alteration was real


def test_what_comes_after_a_decision_changes_no_state(population):
    whole = read_decisions(population, LAST)
    morning = pl.lit(datetime(2024, 11, 4, tzinfo=UTC) + timedelta(hours=1))  # all zones of the population are behind it
    odd = read_decisions(population | {"transactions": shaken(population["transactions"], pl.col("occurred_at") >= morning, 5)}, LAST)
    before = whole.day <= np.datetime64("2024-11-04")
    assert np.array_equal(whole.values[before], odd.values[before], equal_nan=True)
    assert not np.array_equal(whole.values[~before], odd.values[~before], equal_nan=True)


def test_states_are_those_that_a_request_would_have_seen(population):
    found = read_decisions(population, LAST)
    ledgers = Ledgers.of(population)
    for i in range(0, len(found), 97):
        person = ledgers.person(int(np.searchsorted(ledgers.user_ids, found.user_id[i])))
        assert np.array_equal(found.values[i], features_of(person, found.day[i].astype(int) - 1), equal_nan=True)


def test_what_was_served_is_what_is_learned_from(population, tmp_path):
    """The service stores a hash of the state it decided on: read back from a snapshot, months later, it is the same state."""
    with database(tmp_path) as engine:
        load(engine, {n: population[n] for n in NEEDED})
        service = EnhancedCQLModelService(engine, tmp_path / "artifacts")
        for user, hour in ((1, 2), (2, 12), (3, 23), (40, 9), (1, 14)):
            service.get_segment_aware_recommendation(user, datetime(2024, 11, 20, hour, 30, tzinfo=UTC), request_id=f"{user}-{hour}")
        snapshot = export_snapshot(engine, tmp_path / "snapshots")
    found, logged = read_decisions(snapshot, LAST), snapshot.frame("recommendation_history")
    assert len(found) + sum(f.count for f in found.findings) == 5
    assert len(found) >= 3
    hashes = dict(logged.select("id", "state_hash").rows())
    assert [state_hash(x, s) for x, s in zip(found.values, found.segment_id, strict=True)] == [hashes[i] for i in found.decision_id.tolist()]
    assert dict(zip(found.decision_id.tolist(), found.propensity.tolist(), strict=True)).items() <= dict(logged.select("id", "propensity").rows()).items()


# --- the same whatever the order, the threads and the container ---


def test_order_threads_and_container_do_not_matter(population, tmp_path):
    found = read_decisions(population, LAST)
    mixed = {n: f.sample(fraction=1, shuffle=True, seed=3) for n, f in population.items()}
    assert same(found, read_decisions(mixed, LAST))
    assert same(found, read_decisions(write_snapshot(population, tmp_path), LAST))
    ledgers = Ledgers.of(population)
    person, day = np.searchsorted(ledgers.user_ids, found.user_id), found.day.astype(np.int64)
    assert all(np.array_equal(found.values, numbers_before(ledgers, person, day, threads), equal_nan=True) for threads in (1, 3))


# --- parts of the log ---


def test_rows_taken_keep_their_sequence_or_end_it(population):
    found = read_decisions(population, LAST)
    some = found.take(np.random.default_rng(1).random(len(found)) < 0.7)
    place = {i: k for k, i in enumerate(some.decision_id.tolist())}
    whole = dict(zip(found.decision_id.tolist(), np.append(found.decision_id, -1)[found.next].tolist(), strict=True))
    for k, i in enumerate(some.decision_id.tolist()):
        assert some.next[k] == place.get(whole[i], -1)
    assert (some.weeks_to_next[some.next < 0] == 0).all()
    assert same(found, found.take(np.arange(len(found))))
    back = found.take(np.arange(len(found))[::-1])
    reward = found.parts[:, 2]
    assert np.array_equal(back.returns(reward[::-1], 0.95)[::-1], found.returns(reward, 0.95))
    alone = found.user_id == found.user_id[500]
    by_hand = sum(r * 0.95 ** (d / 7) for r, d in zip(reward[alone], (found.decided_at[alone] - found.decided_at[alone][0]) / np.timedelta64(1, "D"), strict=True))
    assert math.isclose(found.returns(reward, 0.95)[alone][0], by_hand, rel_tol=1e-12)


@pytest.mark.parametrize("day", ["2024-11-30", date(2024, 11, 30), "2020-01-01", "2030-01-01"])
def test_no_outcome_reaches_over_a_split(population, day):
    found = read_decisions(population, LAST)
    earlier, later = found.split(day)
    edge = np.datetime64(day)
    assert (earlier.over < edge).all()
    assert (later.day >= edge).all()
    between = (found.day < edge) & (found.over >= edge)
    assert set(np.unique(found.over - found.day).astype(int)) <= {27, 28, 29}
    assert len(earlier) + len(later) + between.sum() == len(found)
    assert (later.next != -1).sum() == (found.next[found.day >= edge] != -1).sum()


def test_states_rank_among_the_peers_given(population):
    found = read_decisions(population, LAST)
    earlier, later = found.split("2024-12-01")
    peers = earlier.peers()
    wanted = EnhancedStateVector(later.values, later.segment_id, peers).state.values
    assert np.array_equal(later.states(peers), wanted.astype(np.float32))
    assert later.states().dtype == np.float32
    assert not np.array_equal(later.states(), later.states(peers))
    assert np.array_equal(earlier.states(), earlier.states(Peers.fit(earlier.values, earlier.segment_id)))
    log = found.log(found.parts[:, 2], contexts=found.states(enhanced=False))
    assert (len(log), log.n_actions) == (len(found), 12)
    assert np.array_equal(log.units, found.user_id)
