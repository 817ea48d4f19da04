"""Kept answers: never stale, never somebody else's, never in the way; on SQLite and PostgreSQL."""

import asyncio
import itertools
import json
import os
import shutil
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest
import sqlalchemy as sa

from fincoach.data.database import DatabaseError, connect, downgrade, load, state, upgrade, writing
from fincoach.data.population import generate
from fincoach.data.tables import TABLES
from fincoach.serving.cache import (
    LIFETIMES,
    Made,
    PredictionCache,
    Question,
    _Gathered,
    _Patience,
    lookup,
    remembered,
    store,
    sweep,
)

NOW = datetime(2024, 7, 1, 9, tzinfo=UTC)
Q = Question(3, "spending", date(2024, 6, 30), "2024-06-01-made", "spending-1")


@pytest.fixture(scope="module")
def frames():
    made = {k: v for k, v in generate(people=12, days=180, seed=4).frames.items() if not k.startswith("recommendation")}
    assert len(made["financial_goals"])
    return made


@pytest.fixture(scope="module")
def template(frames, tmp_path_factory):
    """A SQLite file with the people in it."""
    folder = tmp_path_factory.mktemp("template")
    made = connect(f"sqlite:///{folder}/fincoach.db")
    upgrade(made)
    load(made, frames)
    with made.connect() as c:
        c.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    made.dispose()
    return folder / "fincoach.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path, frames, template):
    if request.param == "sqlite":
        made = connect(f"sqlite:///{shutil.copy(template, tmp_path / 'fincoach.db')}")
    elif url := os.environ.get("FINCOACH_TEST_POSTGRES"):
        made = connect(url)
        filled(made, frames)
    else:
        pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
    yield made
    made.dispose()


def filled(engine, frames):
    """Make the server's database hold the people and nothing else; migrated once."""
    if state(engine) != "current":
        downgrade(engine, "base")
        upgrade(engine)
    with writing(engine) as c:
        c.exec_driver_sql(f"TRUNCATE {', '.join(TABLES)} RESTART IDENTITY CASCADE")
        c.exec_driver_sql("INSERT INTO user_revisions VALUES (0, 1)")
    load(engine, frames)


def ask(engine, question=Q, now=NOW, answer=None):
    """Whether the answer was kept from before, after asking."""
    return remembered(engine, question, now, lambda: answer or {"made": now.isoformat()}).cached


def change(engine, statement):
    """Run a statement that changes the database, and check that it did change a row."""
    with writing(engine) as connection:
        assert connection.execute(statement).rowcount != 0


T = {name: TABLES[name].c for name in TABLES}
MINE = sa.select(sa.func.min(T["transactions"].id)).where(T["transactions"].user_id == 3).scalar_subquery()
GOALS = TABLES["financial_goals"]


def with_goal(engine):
    """A question about a person with a goal and a contribution."""
    with engine.connect() as c:
        user = c.scalar(sa.select(GOALS.c.user_id).join(TABLES["goal_contributions"]).limit(1))
    return Q._replace(user_id=user, prediction_type="goal")


def test_an_answer_is_given_again_until_it_expires(engine):
    assert not ask(engine)
    assert ask(engine)
    assert ask(engine, now=NOW + timedelta(hours=24) - timedelta(microseconds=1))
    assert not ask(engine, now=NOW + timedelta(hours=24))
    goal = Q._replace(prediction_type="goal")
    assert not ask(engine, goal)
    assert ask(engine, goal, NOW + timedelta(days=7) - timedelta(microseconds=1))
    assert not ask(engine, goal, NOW + timedelta(days=7))


def test_a_clock_that_steps_back_makes_an_answer_unusable_not_immortal(engine):
    assert not ask(engine)
    assert not ask(engine, now=NOW - timedelta(hours=1))  # it would come from the future
    assert ask(engine, now=NOW)  # what was made an hour before now
    assert not ask(engine, now=NOW + timedelta(hours=23))  # expired with the clock that was wrong


def test_the_answer_comes_back_exactly(engine):
    answer = {"numbers": [0.1 + 0.2, 1e-300, -0.0, 2**53 + 1], "text": "Café \u2013 ünïcode, 100 %s ? 'quoted'", "none": None, "deep": [{"a": [[]]}]}
    assert not ask(engine, answer=answer)
    given = remembered(engine, Q, NOW, lambda: pytest.fail("asked again"))
    assert given.answer == answer
    assert str(given.answer["numbers"][2]) == "-0.0"
    assert given.made_at == NOW


def test_what_json_cannot_hold_is_refused_before_anything_is_kept(engine):
    with pytest.raises(ValueError, match="JSON"):
        remembered(engine, Q, NOW, lambda: {"bad": float("nan")})
    assert not ask(engine)


OTHERS = ({}, {"user_id": 4}, {"prediction_type": "health"}, {"subject": "7"}, {"segment_id": 2}, {"as_of": date(2024, 6, 29)}, {"model_version": "b"}, {"feature_version": "c"})


def test_questions_that_differ_in_anything_are_two(engine):
    for again in (False, True):
        for other in OTHERS:
            given = remembered(engine, Q._replace(**other), NOW, lambda other=other: {"of": repr(other)})
            assert (given.cached, given.answer) == (again, {"of": repr(other)})


ROW = {"occurred_at": NOW - timedelta(days=5), "amount_minor": -100, "currency": "EUR", "category_id": 9}
CHANGES = {
    "a new row": sa.insert(TABLES["transactions"]).values(user_id=3, **ROW),
    "a cent": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(amount_minor=T["transactions"].amount_minor + 1),
    "ten million cents": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(amount_minor=T["transactions"].amount_minor + 1_000_000_007),
    "a moment": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(occurred_at=NOW - timedelta(days=90, microseconds=1)),
    "a microsecond": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(occurred_at=NOW - timedelta(days=90)),
    "a merchant": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(merchant="x"),
    "no merchant": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(merchant=None),
    "an empty merchant": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(merchant=""),
    "an account": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(account="B"),
    "another category": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(category_id=12),
    "a row deleted": sa.delete(TABLES["transactions"]).where(T["transactions"].id == MINE),
    "a row given to somebody else": sa.update(TABLES["transactions"]).where(T["transactions"].id == MINE).values(user_id=4),
    "another zone": sa.update(TABLES["users"]).where(T["users"].id == 3).values(timezone="Asia/Tokyo"),
    "another currency": sa.update(TABLES["users"]).where(T["users"].id == 3).values(currency="CHF"),
    "another opening balance": sa.update(TABLES["user_profiles"]).where(T["user_profiles"].user_id == 3).values(opening_balance_minor=5),
    "a category of another kind": sa.update(TABLES["categories"]).where(T["categories"].id == 9).values(kind="fee"),
}


def test_any_change_of_the_persons_rows_is_noticed(engine):
    assert not ask(engine)
    for what, statement in CHANGES.items():
        change(engine, statement)
        assert not ask(engine), what
        assert ask(engine), what


def test_changes_that_cancel_in_every_sum_are_noticed(engine):
    t = TABLES["transactions"]
    with engine.connect() as c:
        (a, x), (b, y) = c.execute(sa.select(t.c.id, t.c.amount_minor).where(t.c.user_id == 3).order_by(t.c.amount_minor).limit(2)).all()
    assert not ask(engine)
    with writing(engine) as c:
        c.execute(sa.update(t).where(t.c.id == a).values(amount_minor=y + 1))
        c.execute(sa.update(t).where(t.c.id == b).values(amount_minor=x - 1))
    assert not ask(engine)


def test_what_does_not_concern_the_person_changes_nothing(engine):
    assert not ask(engine)
    change(engine, sa.insert(TABLES["transactions"]).values(user_id=4, **ROW))
    change(engine, sa.update(TABLES["users"]).where(T["users"].id == 4).values(currency="CHF"))
    assert ask(engine)


def test_changes_of_goals_are_noticed(engine):
    question, g = with_goal(engine), TABLES["goal_contributions"]
    goal = sa.select(sa.func.min(GOALS.c.id)).where(GOALS.c.user_id == question.user_id).scalar_subquery()
    given = sa.select(sa.func.min(g.c.id)).where(g.c.goal_id.in_(sa.select(GOALS.c.id).where(GOALS.c.user_id == question.user_id))).scalar_subquery()
    changes = (
        sa.update(GOALS).where(GOALS.c.id == goal).values(target_minor=GOALS.c.target_minor + 1),
        sa.update(GOALS).where(GOALS.c.id == goal).values(closed_at=NOW - timedelta(days=1)),
        sa.insert(g).values(goal_id=goal, contributed_at=NOW - timedelta(days=3), amount_minor=1),
        sa.delete(g).where(g.c.id == given),
    )
    assert not ask(engine, question)
    for statement in changes:
        change(engine, statement)
        assert not ask(engine, question), str(statement)
        assert ask(engine, question), str(statement)


def test_a_row_that_comes_while_the_answer_is_made_is_in_no_kept_answer(engine):
    """The revision is older than what the answer was made from: the answer is given once, and made anew the next time."""

    def meanwhile():
        change(engine, CHANGES["a new row"])
        return {"saw": "perhaps the new row, perhaps not"}

    assert not remembered(engine, Q, NOW, meanwhile).cached
    assert not ask(engine)
    assert ask(engine)


def test_nobody_and_nonsense_are_refused(engine):
    with pytest.raises(DatabaseError, match="nobody with the id 999"):
        lookup(engine, Q._replace(user_id=999), NOW)
    with pytest.raises(ValueError, match="no time zone"):
        lookup(engine, Q, datetime(2024, 7, 1))
    with pytest.raises(KeyError):
        store(engine, lookup(engine, Q._replace(prediction_type="weather"), NOW), b"{}", NOW)


def test_a_damaged_row_is_no_answer_and_is_replaced(engine):
    assert not ask(engine)
    for text in ("", "null", "[]", '{"digest": "x"}', '{"answer": {"a": 1}}', "[" * 100_000, '{"digest": 5, "answer": {}}', "\ud7ff{"):
        change(engine, sa.update(TABLES["prediction_cache"]).values(prediction_data=text))
        assert not ask(engine), text[:20]
        assert ask(engine)


def test_an_answer_that_was_kept_under_another_digest_is_not_given(engine):
    ask(engine)
    with engine.connect() as c:
        text = c.scalar(sa.select(T["prediction_cache"].prediction_data))
    change(engine, sa.update(TABLES["prediction_cache"]).values(prediction_data=text.replace('"digest":"', '"digest":"0')[:-1] + "}"))
    assert not ask(engine)


def test_many_at_once_keep_one_row_and_every_answer_is_right(engine):
    """Eight threads ask about two people at the same moment: nobody gets another's answer, nothing is raised."""
    start, wrong = threading.Barrier(8), []

    def asking(i):
        user = 3 + i % 2
        start.wait()
        for n in range(10):
            try:
                given = remembered(engine, Q._replace(user_id=user), NOW + timedelta(seconds=n), lambda: {"user": user})
                if given.answer != {"user": user}:
                    wrong.append(given)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=asking, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    with engine.connect() as c:
        assert c.scalar(sa.select(sa.func.count()).select_from(TABLES["prediction_cache"])) == 2


def test_another_writer_does_not_hold_up_the_answer(engine, tmp_path):
    ask(engine)
    with writing(engine) as c:
        c.execute(sa.update(TABLES["prediction_cache"]).values(segment_id=-1))  # the row is locked
        begun = datetime.now()
        given = remembered(engine, Q, NOW + timedelta(hours=24), lambda: {"fresh": True})
        took = datetime.now() - begun
    assert given.answer == {"fresh": True}
    assert "was not kept" in given.warning
    assert took < timedelta(seconds=2)
    assert not ask(engine, now=NOW + timedelta(hours=25))
    if engine.dialect.name == "sqlite":  # others wait as long as ever
        with engine.connect() as c:
            assert c.exec_driver_sql("PRAGMA busy_timeout").scalar() == 10_000


def test_a_person_who_is_deleted_takes_their_answers_along(engine):
    ask(engine)
    found = lookup(engine, Q, NOW + timedelta(hours=25))
    with writing(engine) as c:
        for table in ("goal_contributions", "financial_goals"):
            own = T["goal_contributions"].goal_id.in_(sa.select(GOALS.c.id).where(GOALS.c.user_id == 3)) if table == "goal_contributions" else T[table].user_id == 3
            c.execute(sa.delete(TABLES[table]).where(own))
        for table in ("transactions", "user_purchases", "user_profiles"):
            c.execute(sa.delete(TABLES[table]).where(T[table].user_id == 3))
        c.execute(sa.delete(TABLES["users"]).where(T["users"].id == 3))
        assert c.scalar(sa.select(sa.func.count()).select_from(TABLES["prediction_cache"])) == 0
    assert "was not kept" in store(engine, found, b'{"late":true}', NOW)
    with engine.connect() as c:
        assert c.scalar(sa.select(sa.func.count()).select_from(TABLES["prediction_cache"])) == 0


def test_sweeping_takes_what_has_expired_and_nothing_else(engine):
    ask(engine)
    ask(engine, Q._replace(prediction_type="goal"))
    assert sweep(engine, NOW + timedelta(hours=24) - timedelta(microseconds=1)) == 0
    assert sweep(engine, NOW + timedelta(hours=24)) == 1
    assert ask(engine, Q._replace(prediction_type="goal"), NOW + timedelta(hours=25))
    assert LIFETIMES["goal"] == timedelta(days=7)


def test_a_read_only_database_still_answers(tmp_path, template):
    shutil.copy(template, tmp_path / "ro.db")
    readonly = sa.create_engine(f"sqlite:///file:{tmp_path}/ro.db?mode=ro&uri=true")
    given = remembered(readonly, Q, NOW, lambda: {"fresh": True})
    assert given.answer == {"fresh": True}
    assert "was not kept" in given.warning
    readonly.dispose()


# ---------------------------------------------------------------------------------------------------- revisions


def revisions(engine):
    """The revision of everybody."""
    with engine.connect() as c:
        return dict(c.execute(sa.select(T["user_revisions"].user_id, T["user_revisions"].revision)).all())


def changed(engine, statement):
    """Whose revision a statement changes."""
    before = revisions(engine)
    change(engine, statement)
    after = revisions(engine)
    return {u for u in before | after if before.get(u) != after.get(u)}


WATCHED = ("transactions", "financial_goals", "goal_contributions", "user_profiles", "user_purchases")


def test_every_table_that_answers_stand_on_is_watched(engine):
    """Insert, update, move to somebody else and delete, in each table: exactly the people concerned get a new revision."""
    with engine.connect() as c:
        owner = {t: c.execute(sa.select(TABLES[t]).limit(1)).mappings().one() for t in WATCHED}
        mine = dict(c.execute(sa.select(GOALS.c.id, GOALS.c.user_id)).all())
    other_goal = next(g for g, u in mine.items() if u != mine[owner["goal_contributions"]["goal_id"]])
    for name in WATCHED:
        table, row = TABLES[name], dict(owner[name])
        key = next(iter(table.primary_key.columns))
        where, who = "goal_id" if name == "goal_contributions" else "user_id", lambda r, n=name: mine[r["goal_id"]] if n == "goal_contributions" else r["user_id"]
        assert changed(engine, sa.update(table).where(key == row[key.name]).values({where: row[where]})) == {who(row)}, name
        if name != "user_profiles":
            new = {k: v for k, v in row.items() if k not in ("id", "external_id")}
            assert changed(engine, sa.insert(table).values(new)) == {who(row)}, name
            moved = row | {where: other_goal if where == "goal_id" else 7 + (row["user_id"] == 7)}
            assert changed(engine, sa.update(table).where(key == row[key.name]).values({where: moved[where]})) == {who(row), who(moved)}, name
            row, mine[moved.get("id")] = moved, moved.get("user_id") if name == "financial_goals" else mine.get(moved.get("id"))
        if name != "financial_goals":
            assert changed(engine, sa.delete(table).where(key == row[key.name])) == {who(row)}, name
    assert changed(engine, sa.update(TABLES["categories"]).where(T["categories"].id == 9).values(name="lunch")) == {0}


def test_what_answers_do_not_stand_on_changes_no_revision(engine):
    watched = {*WATCHED, "users", "categories", "user_revisions"}
    assert {t for t in TABLES if t not in watched and "user_id" in T[t]} == {
        "user_segments", "recommendation_history", "behavioral_events", "user_sessions", "financial_decisions", "prediction_cache", "user_consents", "audit_names"
    }, "a new table about people: do kept answers stand on it? Then it needs triggers"
    ask(engine)
    assert changed(engine, sa.update(TABLES["prediction_cache"]).values(segment_id=-1)) == set()


def test_a_statement_that_is_undone_changes_nothing(engine):
    before = revisions(engine)
    with engine.connect() as c:
        c.execute(CHANGES["a cent"])
        assert c.execute(sa.select(T["user_revisions"].revision).where(T["user_revisions"].user_id == 3)).scalar() != before[3]
        c.rollback()
    assert revisions(engine) == before


def test_rows_loaded_at_once_and_rows_put_over_others_are_noticed(engine):
    late = pl.DataFrame({"user_id": [3, 3, 5], "occurred_at": [NOW] * 3, "amount_minor": [-5, -6, -7], "currency": ["EUR"] * 3, "category_id": [9] * 3, "id": [900_001, 900_002, 900_003]})
    before = revisions(engine)
    load(engine, {"transactions": late})
    assert {u for u, r in revisions(engine).items() if before[u] != r} == {3, 5}
    verb = "INSERT OR IGNORE INTO" if engine.dialect.name == "sqlite" else "INSERT INTO"
    tail = "" if engine.dialect.name == "sqlite" else " ON CONFLICT DO NOTHING"
    moment = "1719000000000000" if engine.dialect.name == "sqlite" else "now()"
    assert changed(engine, sa.text(f"{verb} transactions (id, user_id, occurred_at, amount_minor, currency, category_id) VALUES (900009, 4, {moment}, -1, 'EUR', 9){tail}")) == {4}


def test_many_rows_loaded_at_once_renew_each_person_once_and_leave_the_triggers_standing(engine):
    many = pl.DataFrame({"id": range(910_000, 912_000), "user_id": [3, 5] * 1000, "occurred_at": [NOW] * 2000, "amount_minor": [-5] * 2000, "currency": ["EUR"] * 2000, "category_id": [9] * 2000})
    before = revisions(engine)
    load(engine, {"transactions": many})
    now = revisions(engine)
    assert {u for u, r in now.items() if before[u] != r} == {3, 5}
    with pytest.raises(DatabaseError, match="nothing was loaded"):
        load(engine, {"transactions": many})
    assert revisions(engine) == now
    assert changed(engine, sa.insert(TABLES["transactions"]).values(user_id=4, **ROW)) == {4}


def test_somebody_new_with_an_old_number_gets_nobodys_answers(engine):
    """People are erased; their number is given again; a fresh revision, whatever was there before."""
    cache, person = PredictionCache(engine), {"id": 99, "external_id": "first", "timezone": "UTC", "currency": "EUR", "created_at": NOW}
    question, seen = Q._replace(user_id=99), set()
    for name in ("first", "second", "third"):
        change(engine, sa.insert(TABLES["users"]).values(person | {"external_id": name}))
        given = cache.answer(question, NOW, lambda name=name: {"of": name})
        assert (given.cached, json.loads(given.body)) == (False, {"of": name})
        assert cache.answer(question, NOW, lambda: pytest.fail("made twice")).cached
        seen.add(revisions(engine)[99])
        change(engine, sa.delete(TABLES["users"]).where(T["users"].id == 99))
        assert 99 not in revisions(engine)
        assert cache.get(question, NOW) is None
        with pytest.raises(DatabaseError, match="nobody with the id 99"):
            cache.answer(question, NOW, dict, stale_ok=True)
    assert len(seen) == 3
    assert cache.sweep(NOW) == 1
    cache.close()


def test_the_triggers_go_with_their_step(engine):
    downgrade(engine, "0005")
    change(engine, CHANGES["a new row"])
    cache = PredictionCache(engine)
    with pytest.raises(DatabaseError, match="older revision"):
        cache.answer(Q, NOW, dict)
    upgrade(engine)
    assert cache.answer(Q, NOW, lambda: {"again": True}).cached is False
    assert changed(engine, CHANGES["a cent"]) == {3}
    cache.close()


# ---------------------------------------------------------------------------------------------------- the cache of a process


async def joined(cache, many):
    """Wait until so many wait for what another makes."""
    for _ in range(4_000):
        if cache.counts["joined"] >= many:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{cache.counts['joined']} of {many} wait")


@pytest.fixture
def cache(engine):
    made = PredictionCache(engine, budget=20)  # the machine may be busy
    yield made
    made.close()


def test_bytes_come_from_memory_then_from_the_table(engine, cache):
    first = cache.answer(Q, NOW, lambda: {"é": [0.1, None]})
    assert first == (b'{"\xc3\xa9":[0.1,null]}', NOW, False, Q.model_version, "")
    assert cache.answer(Q, NOW, dict) == first._replace(cached=True)
    assert cache.get(Q, NOW).body is first.body, "the very same bytes"
    other = PredictionCache(engine)
    assert other.get(Q, NOW) is None
    assert other.answer(Q, NOW, dict) == first._replace(cached=True)
    assert other.get(Q, NOW).body == first.body
    assert {k: v for k, v in other.counts.items() if v and k not in ("bytes",)} == {"table": 1, "memory": 1, "entries": 1}
    other.close()


def test_a_thousand_who_ask_at_once_are_answered_by_one(engine, cache):
    """Two hundred of them in threads, the others in an event loop; the answer is made once, and all get it."""
    made, gate = [], threading.Barrier(2)

    def slow():
        gate.wait(10)
        made.append(threading.get_ident())
        return {"number": len(made)}

    async def loop():
        asked = [asyncio.ensure_future(cache.answer_async(Q, NOW, slow)) for _ in range(800)]
        await joined(cache, 999)
        await asyncio.to_thread(gate.wait, 10)
        return await asyncio.gather(*asked)

    with ThreadPoolExecutor(200) as pool:
        threads = [pool.submit(cache.answer, Q, NOW, slow) for _ in range(200)]
        given = [*asyncio.run(loop()), *(t.result() for t in threads)]
    assert len(made) == 1
    assert len(given) == 1000
    assert {g.body for g in given} == {b'{"number":1}'}
    assert cache.counts["made"] == 1
    with engine.connect() as c:
        assert c.scalar(sa.select(sa.func.count()).select_from(TABLES["prediction_cache"])) == 1


def test_an_error_is_told_to_all_who_wait_and_forgotten(cache):
    gate, asked = threading.Event(), []

    def fails():
        asked.append(1)
        gate.wait(10)
        raise ArithmeticError("no answer")

    async def loop():
        tasks = [asyncio.ensure_future(cache.answer_async(Q, NOW, fails)) for _ in range(50)]
        await joined(cache, 49)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert {(type(e), str(e)) for e in asyncio.run(loop())} == {(ArithmeticError, "no answer")}
    assert len(asked) == 1
    assert cache.answer(Q, NOW, lambda: {"fine": 1}).cached is False
    with pytest.raises(ValueError, match="JSON"):
        cache.answer(Q._replace(subject="nan"), NOW, lambda: {"bad": float("nan")})
    with pytest.raises(KeyError):
        cache.answer(Q._replace(prediction_type="weather"), NOW, dict)
    assert cache.answer(Q._replace(prediction_type="weather"), NOW, dict, lifetime=timedelta(hours=1)).body == b"{}"


def test_nobody_waits_for_an_answer_that_was_refused_or_left(cache):
    """The pool is full: all who wait hear it at once. Who is cancelled leaves the answer in the making for the others."""

    async def full(call, *args):
        raise OverflowError("the queue is full")

    async def refused():
        return await asyncio.gather(*(cache.answer_async(Q, NOW, dict, run=full) for _ in range(5)), return_exceptions=True)

    assert {type(e) for e in asyncio.run(refused())} == {OverflowError}
    assert not cache._flights._now

    async def left():
        gate, before = threading.Event(), cache.counts["joined"]
        first, second = (asyncio.ensure_future(cache.answer_async(Q, NOW, lambda: gate.wait(10) and {"whole": True})) for _ in range(2))
        await joined(cache, before + 1)
        first.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        return await second, first.cancelled()

    given, cancelled = asyncio.run(left())
    assert cancelled
    assert given.body == b'{"whole":true}'


def test_who_comes_after_a_change_does_not_join_who_came_before(engine, cache):
    gate, begun = threading.Event(), threading.Event()

    def old():
        begun.set()
        gate.wait(10)
        return {"saw": "before"}

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.answer, Q, NOW, old)
        assert begun.wait(10)
        change(engine, CHANGES["a cent"])
        after = cache.answer(Q, NOW, lambda: {"saw": "after"})
        gate.set()
        assert json.loads(first.result().body) == {"saw": "before"}
    assert json.loads(after.body) == {"saw": "after"}
    assert json.loads(cache.answer(Q, NOW, dict).body) == {"saw": "after"}, "who was late does not overwrite"


def test_nobody_gets_anothers_answer_nor_one_older_than_what_was_committed(engine, cache):
    """Six threads ask about four people while two change their amounts: each answer is of the person, and at least as new as what was committed before asking."""
    committed, stop, wrong, count = dict.fromkeys((3, 4, 5, 6), 0), threading.Event(), [], itertools.count()
    t, first = TABLES["transactions"], {}
    with engine.connect() as c:
        for user in committed:
            first[user] = c.scalar(sa.select(sa.func.min(t.c.id)).where(t.c.user_id == user))
    for user in committed:
        change(engine, sa.update(t).where(t.c.id == first[user]).values(amount_minor=0))

    def make(user):
        with engine.connect() as c:
            return {"user": user, "amount": c.scalar(sa.select(t.c.amount_minor).where(t.c.id == first[user]))}

    def write(users):
        for n in range(1, 31):
            for user in users:
                change(engine, sa.update(t).where(t.c.id == first[user]).values(amount_minor=n))
                committed[user] = n
        stop.set()

    def read(shift):
        while not stop.is_set():
            user = 3 + (next(count) + shift) % 4
            least = committed[user]
            try:
                given = json.loads(cache.answer(Q._replace(user_id=user), NOW, lambda user=user: make(user)).body)
                if given["user"] != user or given["amount"] < least:
                    wrong.append((given, user, least))
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=write, args=(u,)) for u in ((3, 5), (4, 6))] + [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert cache.counts["memory"] > 0, "it was no cache"
    assert {json.loads(cache.answer(Q._replace(user_id=u), NOW, lambda u=u: make(u)).body)["amount"] for u in committed} == {30}


def test_a_clock_that_steps_never_makes_an_answer_live_longer(cache, monkeypatch):
    real = [1000.0]
    monkeypatch.setattr("fincoach.serving.cache.monotonic", lambda: real[0])
    ask = lambda now: cache.get(Q, now)  # noqa: E731
    cache.answer(Q, NOW, dict)
    real[0] += 3600
    assert ask(NOW + timedelta(hours=1))
    assert not ask(NOW - timedelta(seconds=1)), "made in the future"
    assert not ask(NOW + timedelta(hours=24)), "the wall clock says it has expired"
    real[0] += 23 * 3600 - 1
    assert ask(NOW), "a day less a second"
    real[0] += 1
    assert not ask(NOW), "set back again and again, it still ends"


def test_memory_is_bounded_and_lets_go_of_the_least_used(engine):
    cache = PredictionCache(engine, most_bytes=20_000)
    for n in range(30):
        cache.answer(Q._replace(subject=str(n)), NOW, lambda: {"text": "x" * 980})
        cache.get(Q._replace(subject="0"), NOW)
    assert cache.counts["bytes"] <= 20_000
    assert cache.counts["entries"] == 9 or cache.counts["entries"] == 10
    assert cache.get(Q._replace(subject="0"), NOW), "used all the time"
    assert not cache.get(Q._replace(subject="1"), NOW)
    assert cache.answer(Q._replace(subject="1"), NOW, dict).cached, "the table has it"
    cache.answer(Q._replace(subject="huge"), NOW, lambda: {"text": "x" * 50_000})
    assert cache.counts["bytes"] <= 20_000
    cache.close()


def test_an_answer_is_kept_under_the_version_that_made_it(engine, cache):
    """A challenger was asked and the champion stepped in: nobody finds the champion's answer under the challenger's name."""
    asked = Q._replace(model_version="challenger")
    given = cache.answer(asked, NOW, lambda: Made({"by": "champion"}, Q.model_version))
    assert (given.model_version, given.cached) == (Q.model_version, False)
    assert cache.get(asked, NOW) is None
    assert json.loads(cache.get(Q, NOW).body) == {"by": "champion"}
    with engine.connect() as c:
        assert c.scalars(sa.select(T["prediction_cache"].model_version)).all() == [Q.model_version]
    assert json.loads(cache.answer(asked, NOW, lambda: Made({"by": "challenger"}, "challenger")).body) == {"by": "challenger"}


def test_warming_sweeping_and_forgetting(engine, cache):
    def fails():
        raise ArithmeticError

    wanted = [(Q._replace(user_id=u), lambda u=u: {"user": u}) for u in (3, 4, 5, 999)] + [(Q._replace(subject="bad"), fails)]
    assert cache.warm(wanted, NOW) == {"made": 3, "there": 0, "failed": 2}
    assert cache.warm(wanted, NOW) == {"made": 0, "there": 3, "failed": 2}
    assert json.loads(cache.get(Q._replace(user_id=4), NOW).body) == {"user": 4}
    assert cache.forget(4) == 1
    assert cache.get(Q._replace(user_id=4), NOW) is None
    change(engine, sa.insert(TABLES["transactions"]).values(user_id=5, **ROW))
    assert cache.sweep(NOW) == 1, "one that does not hold any more"
    assert cache.sweep(NOW + timedelta(days=1)) == 1 + 3, "one in memory, three in the table"


def test_a_writer_who_holds_the_lock_holds_up_nobody(engine, cache):
    with writing(engine) as c:
        c.execute(sa.update(TABLES["users"]).where(T["users"].id == 3).values(currency="CHF"))
        begun = time.monotonic()
        assert not cache.answer(Q, NOW, dict).cached
        assert cache.answer(Q, NOW, dict).cached
        assert time.monotonic() - begun < 2
    assert not cache.answer(Q, NOW, dict).cached, "the change was committed"


def test_while_the_database_cannot_be_asked_only_those_who_allow_it_get_what_may_be_old(engine, tmp_path):
    cache = PredictionCache(engine, budget=0.2)
    first = cache.answer(Q, NOW, dict)
    with ExitStack() as away:
        if engine.dialect.name == "sqlite":
            os.rename(tmp_path / "fincoach.db", tmp_path / "gone.db")
            away.callback(os.rename, tmp_path / "gone.db", tmp_path / "fincoach.db")
        else:
            holder = away.enter_context(engine.connect())
            holder.exec_driver_sql("LOCK TABLE user_revisions IN ACCESS EXCLUSIVE MODE")
        begun = time.monotonic()
        for _ in range(50):
            old = cache.answer(Q, NOW + timedelta(hours=1), dict, stale_ok=True)
            assert (old.body, old.made_at) == (first.body, first.made_at)
            assert "the answer of 01 Jul 2024 09:00 UTC" in old.warning
            assert asyncio.run(cache.answer_async(Q, NOW, dict, stale_ok=True)).warning
        assert time.monotonic() - begun < 2, "only the first had to wait"
        with pytest.raises(DatabaseError):
            cache.answer(Q, NOW, dict)
        with pytest.raises(DatabaseError):
            asyncio.run(cache.answer_async(Q, NOW, dict))
        with pytest.raises(DatabaseError):
            cache.answer(Q, NOW + timedelta(days=1), dict, stale_ok=True)  # it has expired
        with pytest.raises(DatabaseError):
            cache.answer(Q._replace(subject="new"), NOW, dict, stale_ok=True)
    for _ in range(100):
        try:
            assert cache.answer(Q, NOW, dict).warning == ""
            break
        except DatabaseError:  # the last question is still overdue
            time.sleep(0.02)
    else:
        pytest.fail("it did not find back")
    cache.close()


def test_connections_that_the_server_cut_are_replaced_without_anybody_noticing(engine, cache):
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no server")
    cache.answer(Q, NOW, dict)
    admin = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with admin.connect() as c:
        cut = c.exec_driver_sql("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()").scalar()
    admin.dispose()
    assert cut >= 1
    assert cache.answer(Q, NOW, dict).cached


def test_a_database_put_back_from_a_copy_gives_no_answer_of_the_time_between(tmp_path, template):
    """The file is replaced under a running process: revisions of the copy count, and none of the answers made since."""
    made = connect(f"sqlite:///{shutil.copy(template, tmp_path / 'fincoach.db')}")
    cache = PredictionCache(made)
    for n in range(3):
        change(made, CHANGES["a cent"])
        cache.answer(Q, NOW, lambda n=n: {"after": n})
    made.dispose()
    for name in ("fincoach.db", "fincoach.db-wal", "fincoach.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(template, tmp_path / "fincoach.db")
    for _ in range(3):  # as many changes as before
        change(made, CHANGES["a cent"])
    assert cache.get(Q, NOW) is None
    cache.close()
    made.dispose()


# ---------------------------------------------------------------------------------------------------- checking in an event loop


class Stub:
    """A wire whose answers the test gives."""

    broken = fresh = False

    def __init__(self):
        self.sent, self.given, (self.near, self.far) = [], [], socket.socketpair()
        self.end = self.near.fileno()

    def ask(self, users):
        self.sent.append(set(users))

    def give(self, answer):
        """The server answers; an exception is raised where the answer is read."""
        self.given.append(answer)
        self.far.send(b".")

    def answer(self):
        self.near.recv(1)
        found = self.given.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def close(self):
        self.near.close()
        self.far.close()

    call_back = close


@pytest.fixture
def stubbed(monkeypatch):
    """Stubs in the order in which they were opened, and what makes the asker of the running loop."""
    opened = []

    def opening(engine):
        opened.append(Stub())
        future = Future()
        future.set_result(opened[-1])
        return future

    monkeypatch.setattr("fincoach.serving.cache._opening", opening)
    return opened, lambda budget=20: _Gathered(asyncio.get_running_loop(), None, _Patience(budget))


async def turns():
    """Let the loop do what there is to do."""
    for _ in range(5):
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)


def test_who_asks_while_a_question_is_under_way_is_told_by_the_next_one(stubbed):
    opened, gathered = stubbed

    async def loop():
        asker = gathered()
        first = asker.ask(3)
        await turns()
        later = [asker.ask(u) for u in (3, 4, 3, 5, 99)]
        later[3].cancel()
        await turns()
        assert opened[0].sent == [{3}], "one at a time"
        opened[0].give({0: 1, 3: 30})
        await turns()
        assert first.result() == (30, 1)
        assert not any(f.done() for f in later[:3]), "what was asked before they came says nothing about now"
        assert opened[0].sent == [{3}, {3, 4, 99} | ({5} & opened[0].sent[1])]
        opened[0].give({0: 2, 3: 31, 4: 40, 5: 50})
        told = [await later[i] for i in (0, 1, 2, 4)]
        asker.close()
        return told

    assert asyncio.run(loop()) == [(31, 2), (40, 2), (31, 2), None]
    assert len(opened) == 1


def test_an_error_is_told_to_those_who_asked_and_to_nobody_after(stubbed):
    opened, gathered = stubbed

    async def loop():
        asker = gathered()
        first = asker.ask(3)
        failed = [asker.ask(u) for u in (4, 5)]
        await turns()
        opened[0].give({0: 1, 3: 30})
        assert await first == (30, 1)
        later = asker.ask(6)
        opened[0].give(DatabaseError("no such thing"))
        await turns()
        assert [str(f.exception()) for f in failed] == ["no such thing"] * 2
        opened[0].give({0: 1, 6: 60})
        assert await later == (60, 1)
        assert opened[0].sent == [{3}, {4, 5}, {6}]
        asker.close()

    asyncio.run(loop())


def test_a_connection_that_broke_is_replaced_once_for_the_same_question(stubbed):
    opened, gathered = stubbed

    async def loop():
        asker = gathered()
        asked = asker.ask(3)
        await turns()
        opened[0].broken = True
        opened[0].give(DatabaseError("the server hung up"))
        await turns()
        assert opened[1].sent == [{3}]
        opened[1].broken = opened[1].fresh = True  # one that never worked: nobody tries for ever
        opened[1].give(DatabaseError("and again"))
        await turns()
        assert str(asked.exception()) == "and again"
        again = asker.ask(3)
        await turns()
        opened[2].give({0: 1, 3: 30})
        assert await again == (30, 1)
        opened[2].broken = True
        opened[2].give(DatabaseError("hung up while nobody asked"))
        await turns()
        later = asker.ask(4)
        await turns()
        opened[3].give({0: 1, 4: 40})
        assert await later == (40, 1)
        asker.close()

    asyncio.run(loop())


def test_after_a_question_that_nobody_answered_one_at_a_time_tries_again(stubbed):
    opened, gathered = stubbed

    async def loop():
        asker = gathered(0.2)
        asked = [asker.ask(u) for u in (3, 4)]
        await turns()
        asked.append(asker.ask(5))
        assert {str(e) for e in await asyncio.gather(*asked, return_exceptions=True)} == {"the database did not answer within 0.2 seconds: try again later"}
        with pytest.raises(DatabaseError, match="did not answer"):
            asker.ask(3)
        await asyncio.sleep(0.25)
        tries = asker.ask(3)
        with pytest.raises(DatabaseError, match="did not answer"):
            asker.ask(4)
        await turns()
        opened[1].give({0: 1, 3: 30})
        assert await tries == (30, 1)
        healed = asker.ask(4)
        await turns()
        opened[1].give({0: 1, 4: 40})
        assert await healed == (40, 1)
        asker.close()

    asyncio.run(loop())


def test_in_an_event_loop_too_no_answer_is_older_than_what_was_committed(engine, cache):
    """Forty who ask again and again about four people in one loop, while a thread changes their amounts: batches of checks mix nobody up, and none is stale."""
    committed, t, wrong, stop = dict.fromkeys((3, 4, 5, 6), 0), TABLES["transactions"], [], threading.Event()
    with engine.connect() as c:
        first = {user: c.scalar(sa.select(sa.func.min(t.c.id)).where(t.c.user_id == user)) for user in committed}
    for user in committed:
        change(engine, sa.update(t).where(t.c.id == first[user]).values(amount_minor=0))

    def make(user):
        with engine.connect() as c:
            return {"user": user, "amount": c.scalar(sa.select(t.c.amount_minor).where(t.c.id == first[user]))}

    def write():
        for n in range(1, 26):
            for user in committed:
                change(engine, sa.update(t).where(t.c.id == first[user]).values(amount_minor=n))
                committed[user] = n
        stop.set()

    async def ask(shift):
        for i in itertools.count(shift):
            user = 3 + i % 4
            question, least = Q._replace(user_id=user), committed[user]
            given = await cache.get_async(question, NOW) if i % 2 else None
            given = given or await cache.answer_async(question, NOW, lambda user=user: make(user))
            found = json.loads(given.body)
            if found["user"] != user or found["amount"] < least:
                wrong.append((found, user, least))
            if stop.is_set():
                return
            if i % 8 == 7:  # who goes away in the middle takes nobody along
                asyncio.ensure_future(cache.answer_async(question, NOW, dict)).cancel()
            await asyncio.sleep(0)

    async def loop():
        await asyncio.gather(asyncio.to_thread(write), *(ask(i) for i in range(40)))

    asyncio.run(loop())
    assert wrong == []
    assert cache.counts["memory"] > 0, "it was no cache"


def others(engine, wanted):
    """What `wanted` says of the connections to the database but this one."""
    admin = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with admin.connect() as c:
        found = c.exec_driver_sql(f"SELECT {wanted} FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()").scalar()
    admin.dispose()
    return found


def test_an_event_loop_finds_its_way_back_to_a_server_that_cut_its_connections(engine, cache):
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no server")

    async def loop():
        await cache.answer_async(Q, NOW, dict)
        assert await asyncio.to_thread(others, engine, "count(pg_terminate_backend(pid))") >= 1
        assert (await cache.answer_async(Q, NOW, dict)).cached, "cut while nobody asked"
        with engine.connect() as holder:
            holder.exec_driver_sql("LOCK TABLE user_revisions IN ACCESS EXCLUSIVE MODE")
            asked = asyncio.ensure_future(cache.answer_async(Q, NOW, dict))
            while not (cut := await asyncio.to_thread(others, engine, "count(pg_terminate_backend(pid)) FILTER (WHERE wait_event_type = 'Lock')")):
                await asyncio.sleep(0.01)
        assert cut == 1
        assert (await asked).cached, "cut while somebody waited"

    asyncio.run(loop())


def test_a_question_that_is_overdue_is_called_back(engine):
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no server")
    cache = PredictionCache(engine, budget=0.3)

    async def loop():
        await cache.answer_async(Q, NOW, dict)
        with engine.connect() as holder:
            holder.exec_driver_sql("LOCK TABLE user_revisions IN ACCESS EXCLUSIVE MODE")
            said = await asyncio.gather(*(cache.get_async(Q, NOW) for _ in range(30)), return_exceptions=True)
            assert {type(e) for e in said} == {DatabaseError}
            for _ in range(500):
                if not await asyncio.to_thread(others, engine, "count(*) FILTER (WHERE wait_event_type = 'Lock')"):
                    break
                await asyncio.sleep(0.01)
            else:
                pytest.fail("the server still works on it")
        for _ in range(500):
            with suppress(DatabaseError):
                return await cache.get_async(Q, NOW)
            await asyncio.sleep(0.02)

    assert asyncio.run(loop()).cached
    cache.close()
