"""Kept answers: never stale, never somebody else's, never in the way; on SQLite and PostgreSQL."""

import os
import threading
from datetime import UTC, date, datetime, timedelta

import pytest
import sqlalchemy as sa

from fincoach.data.database import DatabaseError, connect, downgrade, load, upgrade, writing
from fincoach.data.population import generate
from fincoach.data.tables import TABLES
from fincoach.serving.cache import LIFETIMES, Question, lookup, remembered, store, sweep

NOW = datetime(2024, 7, 1, 9, tzinfo=UTC)
Q = Question(3, "spending", date(2024, 6, 30), "2024-06-01-made", "spending-1")


@pytest.fixture(scope="module")
def frames():
    made = {k: v for k, v in generate(people=12, days=180, seed=4).frames.items() if not k.startswith("recommendation")}
    assert len(made["financial_goals"])
    return made


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path, frames):
    url = f"sqlite:///{tmp_path}/fincoach.db" if request.param == "sqlite" else os.environ.get("FINCOACH_TEST_POSTGRES")
    if url is None:
        pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
    made = connect(url)
    if request.param == "postgresql":
        downgrade(made, "base")
    upgrade(made)
    load(made, frames)
    yield made
    made.dispose()


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


def test_a_read_only_database_still_answers(tmp_path, frames):
    made = connect(f"sqlite:///{tmp_path}/ro.db")
    upgrade(made)
    load(made, frames)
    made.dispose()
    readonly = sa.create_engine(f"sqlite:///file:{tmp_path}/ro.db?mode=ro&uri=true")
    given = remembered(readonly, Q, NOW, lambda: {"fresh": True})
    assert given.answer == {"fresh": True}
    assert "was not kept" in given.warning
    readonly.dispose()
