"""The population is what it says: repeatable, free of the future, and true to its own truth."""

import calendar
import hashlib
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from conftest import ROOT

from fincoach.data import population as module
from fincoach.data.population import ACTIONS, FLOOR, START, ZONES, generate, transactions
from fincoach.data.tables import CATEGORIES, CATEGORY_ID, SEGMENTS, TABLES

DAYS = 400


@pytest.fixture(scope="module")
def people():
    return generate(people=400, days=DAYS, seed=11)


def digest(population):
    """One hash of every frame, as bytes of their columns in order."""
    sha = hashlib.sha256()
    for group in (population.frames, population.truth):
        for name in sorted(group):
            sha.update(name.encode())
            for column in group[name]:
                sha.update(column.name.encode() + str(column.dtype).encode() + repr(column.to_list()).encode())
    return sha.hexdigest()


def test_same_seed_same_bytes_in_another_process():
    code = "import sys; sys.path.insert(0, 'tests'); from test_population import digest, generate; print(digest(generate(30, 120, 5)))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    here = digest(generate(30, 120, 5))
    assert here == elsewhere
    assert here != digest(generate(30, 120, 6))


def test_numpy_global_state_is_neither_read_nor_changed():
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = digest(generate(10, 60, 5))
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    assert digest(generate(10, 60, 5)) == first


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_matter(chunk):
    whole = generate(20, 90, 3).frames["transactions"]
    assert pl.concat(transactions(20, 90, 3, chunk=chunk)).equals(whole)


def test_too_little_room_is_found_and_given(monkeypatch):
    whole = generate(20, 90, 3).frames["transactions"]
    real, asked = module._rows, []

    def small(capacity, people, days):
        asked.append(capacity)
        return real(capacity // 8, people, days)

    monkeypatch.setattr(module, "_rows", small)
    assert pl.concat(transactions(20, 90, 3)).equals(whole)
    assert len(asked) > 1, "the room was never too small, so the test shows nothing"


@pytest.mark.parametrize(("count", "days"), [(0, 100), (5, 27)])
def test_too_small_a_population_is_refused(count, days):
    with pytest.raises(ValueError, match="at least 1 person and 28 days"):
        generate(count, days, 1)


def test_one_person_for_a_month():
    assert generate(1, 28, 1).frames["users"]["id"].to_list() == [1]


# -- the tables ----------------------------------------------------------------------------------------------------


def test_frames_fit_the_tables(people):
    for name, frame in people.frames.items():
        table = TABLES[name]
        assert set(frame.columns) <= set(table.columns.keys()), name
        for column in table.columns:
            if column.nullable or column.server_default is not None:
                continue
            assert column.name in frame.columns, f"{name}.{column.name} is missing"
            assert frame[column.name].null_count() == 0, f"{name}.{column.name} has holes"
        if "id" in frame.columns and name != "categories":
            assert frame["id"].to_list() == list(range(1, len(frame) + 1)), name


def test_keys_point_at_rows(people):
    for name, frame in people.frames.items():
        for column in TABLES[name].columns:
            for key in column.foreign_keys:
                if column.name in frame.columns:
                    parent = people.frames[key.column.table.name][key.column.name]
                    assert frame[column.name].drop_nulls().is_in(parent.implode()).all(), f"{name}.{column.name}"


def test_loads_into_a_database(people, tmp_path):
    from fincoach.data.database import connect, load, upgrade

    engine = connect(f"sqlite:///{tmp_path / 'p.db'}")
    upgrade(engine)
    small = generate(15, 90, 2).frames
    counts = load(engine, small)
    assert counts["transactions"] == len(small["transactions"])
    engine.dispose()


def test_nothing_happens_before_joining_or_in_the_future(people):
    end = START + timedelta(days=DAYS)
    zones = dict(people.frames["users"].select("id", "timezone").iter_rows())
    joined = dict(people.frames["users"].select("id", "created_at").iter_rows())
    frames = people.frames
    goals = dict(frames["financial_goals"].select("id", "user_id").iter_rows())
    decided = dict(frames["recommendation_history"].select("id", "user_id").iter_rows())
    moments = [
        *frames["transactions"].group_by("user_id").agg(pl.col("occurred_at").min().alias("a"), pl.col("occurred_at").max().alias("b")).iter_rows(),
        *((goals[g], t, t) for g, t in frames["goal_contributions"].select("goal_id", "contributed_at").iter_rows()),
        *((decided[r], t, t) for r, t in frames["recommendation_feedback"].select("recommendation_id", "received_at").iter_rows()),
        *((u, t, t) for u, t in frames["recommendation_history"].select("user_id", "decided_at").iter_rows()),
        *((u, t, t) for u, t in frames["financial_goals"].select("user_id", "created_at").iter_rows()),
    ]
    assert len(moments) > 1000
    for user, first, last in moments:
        assert first >= joined[user]
        assert last.astimezone(ZoneInfo(zones[user])).date() < end


def test_clocks_are_those_of_the_zone(people):
    """Streams are booked between 6 and 9 by the person's own clock, in winter and summer, from Martinique to Reunion."""
    rows = people.frames["transactions"].filter(pl.col("category_id") == CATEGORY_ID["rent"]).join(
        people.frames["users"].select(pl.col("id").alias("user_id"), "timezone"), on="user_id")
    assert set(rows["timezone"]) == set(ZONES)
    for (zone,), part in rows.group_by("timezone"):
        local = part["occurred_at"].dt.convert_time_zone(zone).dt.hour()
        assert local.is_between(6, 8).all(), zone
    berlin = rows.filter(pl.col("timezone") == "Europe/Berlin")["occurred_at"].dt.hour()
    assert {4, 5, 6, 7} <= set(berlin)  # 6 to 8 in Berlin are 4 to 6 in summer and 5 to 7 in winter, in UTC


def test_all_hours_of_every_zone_agree_with_zoneinfo():
    """The table of offsets, over two years: an hour that exists is read as zoneinfo reads it, one that does not as the hour after."""
    cal, start = module._calendar(START, 730), datetime(START.year, START.month, START.day)
    for z, zone in enumerate(ZONES):
        tz, last = ZoneInfo(zone), None
        for hour in range(0, 730 * 24):
            local = start + timedelta(hours=hour)
            moment = (local - timedelta(minutes=int(cal.offset[z, hour]))).replace(tzinfo=UTC)
            back = moment.astimezone(tz).replace(tzinfo=None)
            exists = local.replace(tzinfo=tz).astimezone(UTC).astimezone(tz).replace(tzinfo=None) == local
            assert back == local if exists else abs(back - local) == timedelta(hours=1), (zone, local)
            assert last is None or moment >= last, "time runs backwards"
            last = moment


# -- the truth -----------------------------------------------------------------------------------------------------


def due_days(stream, first, last):
    """The days on which a stream falls due, worked out with the standard library alone."""
    found = []
    if stream["period"] in ("week", "fortnight"):
        step = 7 if stream["period"] == "week" else 14
        day = date(1970, 1, 1) + timedelta(days=stream["anchor"])
        nominal = [day + timedelta(days=step * k) for k in range(200)]
    else:
        nominal = [date(y, m, min(stream["anchor"], calendar.monthrange(y, m)[1])) for y in range(first.year - 1, last.year + 2) for m in range(1, 13)]
    for day in nominal:
        if stream["shift"] and day.weekday() >= 5:
            day += timedelta(days=4 - day.weekday() if stream["shift"] < 0 else 7 - day.weekday())
        if max(stream["start_at"], first) <= day < min(stream["end_at"], last):
            found.append(day)
    return found


def test_streams_fall_on_their_dates(people):
    """Every exact stream: each due day has its row, with the stream's amount and merchant, and there are no others."""
    first, last = START, START + timedelta(days=DAYS)
    zones = dict(people.frames["users"].select("id", "timezone").iter_rows())
    rows = people.frames["transactions"]
    booked = {}
    for user, at, amount, category, merchant in rows.filter(pl.col("category_id").is_in([CATEGORY_ID[c] for c in ("rent", "salary", "debt_payment", "benefits")])).select(
            "user_id", "occurred_at", "amount_minor", "category_id", "merchant").iter_rows():
        booked.setdefault((user, category, merchant, amount), []).append(at.astimezone(ZoneInfo(zones[user])).date())
    streams = people.truth["streams"].filter(
        (pl.col("variation") == 0) & pl.col("period").is_in(["month", "week", "fortnight"])
        & pl.col("category_id").is_in([CATEGORY_ID[c] for c in ("rent", "salary", "debt_payment", "benefits")]))
    expected = {}
    for stream in streams.iter_rows(named=True):
        key = stream["user_id"], stream["category_id"], stream["merchant"], stream["amount_minor"]
        expected.setdefault(key, []).extend(due_days(stream, first, last))
    checked = 0
    for key, days in expected.items():
        assert sorted(booked.get(key, [])) == sorted(days), key
        checked += len(days)
    assert checked > 5000


def test_payday_is_never_at_a_weekend(people):
    rows = people.truth["streams"].filter((pl.col("category_id") == CATEGORY_ID["salary"]) & (pl.col("period") == "month"))
    days = [d for s in rows.head(100).iter_rows(named=True) for d in due_days(s, START, START + timedelta(days=DAYS))]
    assert {d.weekday() for d in days} <= {0, 1, 2, 3, 4}
    assert len(days) > 300


def test_contributions_are_the_goal_transactions(people):
    """Every contribution is a transaction of the same moment and opposite sign, and a goal closes when its target is reached."""
    frames = people.frames
    goals = frames["financial_goals"]
    paid = frames["goal_contributions"].join(goals.select(pl.col("id").alias("goal_id"), "user_id"), on="goal_id")
    saved = frames["transactions"].filter(pl.col("category_id") == CATEGORY_ID["savings"])
    match = paid.with_columns(-pl.col("amount_minor")).join(
        saved, left_on=["user_id", "contributed_at", "amount_minor"], right_on=["user_id", "occurred_at", "amount_minor"], how="anti")
    assert len(paid) > 500
    assert match.is_empty()
    total = paid.group_by("goal_id").agg(pl.col("amount_minor").sum()).join(goals, left_on="goal_id", right_on="id")
    assert (total["closed_at"].is_not_null() == (total["amount_minor"] >= total["target_minor"])).all()


def test_goal_odds_are_the_share_reached():
    """Goals whose time is over: reached as often as their odds say, in four bands of odds (three standard errors)."""
    population = generate(people=1500, days=730, seed=4)
    end = datetime(START.year, START.month, START.day, tzinfo=UTC) + timedelta(days=728)
    silent = population.frames["transactions"].group_by("user_id").agg(pl.col("occurred_at").max().alias("last"))
    over = population.frames["financial_goals"].filter(pl.col("due_at") < end).join(population.truth["goals"], left_on="id", right_on="goal_id").join(
        silent, on="user_id").filter(pl.col("last") > pl.col("due_at"))
    bands = over.group_by((pl.col("odds") * 4).floor().clip(0, 3).alias("band")).agg(
        pl.len(), pl.col("closed_at").is_not_null().mean().alias("reached"), pl.col("odds").mean(), (pl.col("odds") * (1 - pl.col("odds"))).sum().alias("var"))
    assert len(bands) == 4
    for row in bands.iter_rows(named=True):
        assert row["len"] > 30
        assert abs(row["reached"] - row["odds"]) < 3 * row["var"] ** 0.5 / row["len"] + 0.01, row


def test_propensities_are_those_of_the_policy(people):
    """Each action is taken as often as the logged policy says: z under 4 for each action, and probabilities sum to one."""
    rows = module._walk(plan := module._plan(400, DAYS, 11, START), 11, 0, 400)
    assert len(plan.people) == 400
    p = module.logging_policy(rows.decisions[:, 2:].round(4))
    history = people.frames["recommendation_history"]
    assert np.allclose(p.sum(axis=1), 1)
    assert p.min() >= FLOOR
    taken = np.asarray([ACTIONS.index(a) for a in history["action"]])
    assert np.array_equal(history["propensity"].to_numpy(), p[np.arange(len(p)), taken])
    for k, action in enumerate(ACTIONS):
        z = ((taken == k).sum() - p[:, k].sum()) / np.sqrt((p[:, k] * (1 - p[:, k])).sum())
        assert abs(z) < 4, (action, z)


def test_policy_depends_on_the_state(people):
    by_action = people.frames["recommendation_history"].group_by("action").agg(pl.col("propensity").std() / pl.col("propensity").mean())
    assert by_action["propensity"].min() > 0.03


def test_answers_follow_the_true_probabilities(people):
    """For each action, yes is answered as often as the truth says (z under 4); doing nothing has no answer."""
    changes = dict(people.truth["changes"].select("user_id", "changed_at").iter_rows())
    truth = {(u, k, a): p for u, k, a, p in people.truth["responses"].iter_rows()}
    zones = dict(people.frames["users"].select("id", "timezone").iter_rows())
    rows = people.frames["recommendation_history"].join(people.frames["recommendation_feedback"].select("recommendation_id", "response"), left_on="id", right_on="recommendation_id")
    assert "do_nothing" not in set(rows["action"])
    sums = {a: [0, 0.0, 0.0] for a in ACTIONS[1:]}
    for user, at, action, response in rows.select("user_id", "decided_at", "action", "response").iter_rows():
        moved = user in changes and at.astimezone(ZoneInfo(zones[user])).date() >= changes[user]
        p = truth[user, int(moved), action]
        sums[action][0] += response in ("accepted", "implemented")
        sums[action][1] += p
        sums[action][2] += p * (1 - p)
    for action, (yes, mean, var) in sums.items():
        assert var > 20, action
        assert abs(yes - mean) < 4 * var**0.5, (action, yes, mean)


def test_truth_has_a_best_action_that_differs_between_people(people):
    best = people.truth["responses"].sort("probability", descending=True).group_by("user_id").first()["action"].value_counts()
    assert len(best) >= 4


def test_segments_and_changes_agree(people):
    truth = people.truth
    assert truth["segments"]["segment"].to_list() == [SEGMENTS[k] for k in truth["segments"]["segment_id"]]
    moved = truth["segments"].filter(pl.col("changed_at").is_not_null()).join(truth["changes"], on="user_id")
    assert len(moved) == len(truth["changes"]) > 5
    assert (moved["segment_id"] == moved["to_segment"]).all()
    assert (moved["from_segment"] != moved["to_segment"]).all()
    assert truth["segments"]["segment_id"].value_counts()["count"].min() > 0.1 * len(truth["segments"])


def test_receipts_sum_to_what_was_paid(people):
    lines = people.frames["user_purchases"]
    paid = lines.group_by("basket").agg(pl.col("amount_minor").sum()).with_columns(pl.col("basket").str.slice(1).cast(pl.Int64).alias("id"))
    both = paid.join(people.frames["transactions"], on="id")
    assert len(both) == len(paid) > 1000
    assert (both["amount_minor"] == -both["amount_minor_right"]).all()


def test_spending_follows_income_and_balance(people):
    """What the simulation promises: richer people spend more; the emptier the account, the fewer purchases."""
    kinds = {c.id: c.kind for c in CATEGORIES}
    rows = people.frames["transactions"].with_columns(kind=pl.col("category_id").replace_strict(kinds))
    totals = rows.group_by("user_id").agg(got=pl.col("amount_minor").filter(pl.col("kind") == 0).sum(),
                                          out=-pl.col("amount_minor").filter(pl.col("kind").is_in([1, 2, 4, 5])).sum())
    both = totals.filter((pl.col("out") > 0) & (pl.col("got") > 0))
    assert np.corrcoef(np.log(both["got"]), np.log(both["out"]))[0, 1] > 0.8
    state, person = np.zeros(2, module._STATE), module._plan(1, 60, 1, START).people[0, :1]
    state["balance"] = person["spending"] * np.asarray([-1.0, 4.0])
    low, high = (module._means(s, person[0]) for s in state)
    assert low < 0.5 < high


def test_weeks_of_zero_bursts_refunds_and_silence_exist(people):
    rows = people.frames["transactions"]
    free = rows.filter(pl.col("category_id").is_in([CATEGORY_ID[c] for c in ("dining", "shopping", "entertainment")]))
    weeks = free.group_by("user_id", pl.col("occurred_at").dt.truncate("1w")).len().group_by("user_id").len()["len"]
    assert (weeks < DAYS / 7 - 4).mean() > 0.3  # four or more weeks without any
    gaps = [b - a for _, part in free.filter(pl.col("amount_minor") < 0).partition_by("user_id", as_dict=True).items()
            for a, b in pairwise(part["occurred_at"].to_list())]
    assert np.mean([g < timedelta(minutes=90) for g in gaps]) > 0.05
    assert 0.001 < (free["amount_minor"] > 0).mean() < 0.2
    assert rows.filter((pl.col("category_id") == CATEGORY_ID["fees"]) & (pl.col("amount_minor") < -500)).height > 0
