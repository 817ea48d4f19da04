"""Logged decisions: joined as a second, plain implementation joins them; nothing from the future; bad rows set aside and counted."""

import math
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fincoach.data.export import write_snapshot
from fincoach.data.population import START, generate
from fincoach.features.behavior import extract, features_of
from fincoach.features.ledger import Ledgers
from fincoach.features.state import EnhancedStateVector, Peers
from fincoach.recommend.decisions import ANSWERS, Decisions, numbers_before, read_decisions

ACTIONS = ("do_nothing", "save_more", "pay_debt")
MOMENT = pl.Datetime("us", "UTC")
BEGIN = datetime(2025, 3, 1, tzinfo=UTC)  # the clocks of New York change on 9 March, those of Berlin on 30 March
ZONES = {1: "UTC", 2: "America/New_York", 3: "Pacific/Kiritimati", 4: "Europe/Berlin"}
HISTORY = {"id": pl.Int64, "user_id": pl.Int64, "decided_at": MOMENT, "action": pl.String, "propensity": pl.Float64, "strategy": pl.String}
FEEDBACK = {"id": pl.Int64, "recommendation_id": pl.Int64, "received_at": MOMENT, "response": pl.String, "helpful": pl.Boolean}
PAYMENTS = {"id": pl.Int64, "user_id": pl.Int64, "occurred_at": MOMENT, "amount_minor": pl.Int64, "currency": pl.String, "category_id": pl.Int64}
NAN = math.nan
quick = settings(deadline=None, max_examples=80, phases=[Phase.explicit, Phase.reuse, Phase.generate])


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

    def mature(r):
        over = r[2] + timedelta(days=horizon)
        return max(local(over, r[1]), local(r[2], r[1]) + timedelta(days=horizon)) <= as_of

    rows = sorted((r for r in rows if mature(r)), key=lambda r: (r[1], r[2], r[0]))
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
