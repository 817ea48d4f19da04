"""Databases as they are met: empty, old, newer, locked, damaged, somebody else's, full of rows, read while written."""

import os
import re
import sqlite3
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fincoach.data import database
from fincoach.data.database import (
    NEVER,
    REVISIONS,
    DatabaseError,
    conform,
    connect,
    counts,
    downgrade,
    drift,
    find_user,
    load,
    read_person,
    require,
    revision,
    state,
    upgrade,
    writing,
)
from fincoach.data.tables import CATEGORIES, KINDS, Base, Transaction, from_micros, to_micros

START = datetime(2025, 3, 1, 8, 30, tzinfo=UTC)


def people(ids=(1, 2), zone="UTC"):
    ids = list(ids)
    return pl.DataFrame({"id": ids, "external_id": [f"p{i}" for i in ids], "timezone": zone, "currency": "EUR", "created_at": START})


def rows(ids, user_id=1, at=START, amount=-100):
    ids = list(ids)
    return pl.DataFrame({"id": ids}).with_columns(
        user_id=pl.lit(user_id), occurred_at=pl.lit(at), amount_minor=pl.lit(amount), currency=pl.lit("EUR"), category_id=pl.lit(8)
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path):
    """A migrated, empty database. PostgreSQL where `FINCOACH_TEST_POSTGRES` names one that may be emptied."""
    url = f"sqlite:///{tmp_path}/fincoach.db" if request.param == "sqlite" else os.environ.get("FINCOACH_TEST_POSTGRES")
    if not url:
        pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
    made = connect(url)
    if request.param == "postgresql":
        with writing(made) as c:
            c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*Base.metadata.tables, database.VERSION_TABLE])} CASCADE")
    upgrade(made)
    yield made
    made.dispose()


@pytest.fixture
def lite(tmp_path):
    made = connect(f"sqlite:///{tmp_path}/fincoach.db", wait=0.1)
    upgrade(made)
    yield made
    made.dispose()


# Migrations


def test_models_and_migrations_are_the_same(engine):
    assert drift(engine) == []


def test_drift_sees_a_column_that_no_migration_made(engine):
    with writing(engine) as c:
        c.exec_driver_sql("ALTER TABLE users ADD COLUMN nickname VARCHAR(8)")
    assert drift(engine)


def test_checks_and_keys_are_those_of_the_models(tmp_path):
    """What Alembic does not compare: checks, names of constraints, actions of foreign keys."""
    migrated, modelled = connect(f"sqlite:///{tmp_path}/a.db"), connect(f"sqlite:///{tmp_path}/b.db")
    upgrade(migrated)
    (tmp_path / "b.db").touch()
    with writing(modelled) as c:
        Base.metadata.create_all(c)
    seen = []
    for made in (migrated, modelled):
        look = sa.inspect(made)
        key = lambda found: sorted(re.sub(r"TextClause object at \w+", "text", repr(f)) for f in found)  # noqa: E731
        seen.append({
            t: (key(look.get_check_constraints(t)), key(look.get_foreign_keys(t)), key(look.get_unique_constraints(t)), key(look.get_indexes(t)))
            for t in Base.metadata.tables
        })
        made.dispose()
    assert seen[0] == seen[1]


def test_revisions_are_those_that_alembic_finds():
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert [script.get_current_head()] == [REVISIONS[-1]]
    assert sorted(r.revision for r in script.walk_revisions()) == list(REVISIONS)


def test_a_new_database_has_the_categories(engine):
    with engine.connect() as c:
        found = c.execute(sa.text("SELECT id, name, kind FROM categories ORDER BY id")).all()
    assert found == [(c.id, c.name, KINDS[c.kind]) for c in CATEGORIES]


def test_up_down_with_rows_and_up_again(engine):
    load(engine, {"users": people(), "transactions": rows(range(1, 50))})
    upgrade(engine)
    assert counts(engine)["transactions"] == 49, "an upgrade that has nothing to do keeps the rows"
    downgrade(engine, "base")
    assert state(engine) == "empty"
    upgrade(engine)
    assert {name: n for name, n in counts(engine).items() if n} == {"categories": len(CATEGORIES), "user_revisions": 1}


def test_a_batch_change_of_a_table_keeps_its_children(lite, tmp_path, monkeypatch):
    """SQLite changes a table by making a new one: dropping the old one must not take the transactions along."""
    import shutil

    load(lite, {"users": people(), "transactions": rows(range(1, 50))})
    copy = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "versions/9000_nickname.py").write_text(
        f"import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = '9000', '{REVISIONS[-1]}'\n"
        "def upgrade():\n    with op.batch_alter_table('users', recreate='always') as t:\n        t.add_column(sa.Column('nickname', sa.String(8)))\n"
        "def downgrade():\n    with op.batch_alter_table('users', recreate='always') as t:\n        t.drop_column('nickname')\n"
    )
    monkeypatch.setattr(database, "MIGRATIONS", copy)
    monkeypatch.setattr(database, "REVISIONS", (*REVISIONS, "9000"))
    assert state(lite) == "behind"
    with pytest.raises(DatabaseError, match=r"older revision .*`fincoach db upgrade`"):
        require(lite)
    upgrade(lite)
    assert state(lite) == "current"
    assert counts(lite)["transactions"] == 49
    assert "nickname" in {c["name"] for c in sa.inspect(lite).get_columns("users")}
    downgrade(lite, REVISIONS[-1])
    assert counts(lite)["transactions"] == 49
    assert drift(lite) == []


def test_a_migration_that_fails_changes_nothing(lite, tmp_path, monkeypatch):
    import shutil

    copy = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "versions/9000_broken.py").write_text(
        f"from alembic import op\nrevision, down_revision = '9000', '{REVISIONS[-1]}'\n"
        "def upgrade():\n    op.drop_table('recommendation_feedback')\n    op.execute('SELECT * FROM nowhere')\n"
        "def downgrade():\n    pass\n"
    )
    monkeypatch.setattr(database, "MIGRATIONS", copy)
    monkeypatch.setattr(database, "REVISIONS", (*REVISIONS, "9000"))
    with pytest.raises(DatabaseError, match="nowhere"):
        upgrade(lite)
    monkeypatch.undo()
    assert state(lite) == "current"
    assert drift(lite) == []


def test_revision_writes_what_must_change(lite, tmp_path, monkeypatch):
    import shutil

    copy = tmp_path / "migrations"
    shutil.copytree(database.MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(database, "MIGRATIONS", copy)
    with writing(lite) as c:
        c.exec_driver_sql("DROP TABLE recommendation_feedback")
    revision(lite, "feedback again")
    (made,) = (copy / "versions").glob(f"{int(REVISIONS[-1]) + 1:04d}_*.py")
    assert 'create_table("recommendation_feedback"' in made.read_text().replace("'", '"')
    compile(made.read_text(), made.name, "exec")


# Errors that say what to do


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda path: None, "there is no database at .*fincoach db upgrade"),
        (lambda path: path.write_bytes(b""), "no tables of FinCoach yet: run `fincoach db upgrade`"),
        (lambda path: path.write_text("a letter " * 999), "is not an SQLite database"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE users (name TEXT)"), "that FinCoach did not make"),
    ],
    ids=["missing", "empty", "no database", "foreign"],
)
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
def test_a_database_that_is_not_ready_says_so(tmp_path, prepare, says):
    prepare(tmp_path / "a.db")
    made = connect(f"sqlite:///{tmp_path}/a.db")
    for use in (require, lambda e: load(e, {"users": people()}), lambda e: read_person(e, 1, date(2025, 1, 1))):
        with pytest.raises(DatabaseError, match=says):
            use(made)
    made.dispose()


def test_looking_does_not_make_a_database(tmp_path):
    made = connect(f"sqlite:///{tmp_path}/a.db")
    with pytest.raises(DatabaseError):
        read_person(made, 1, date(2025, 1, 1))
    made.dispose()
    assert not list(tmp_path.iterdir())


def test_a_newer_database_is_left_alone(engine):
    with writing(engine) as c:
        c.exec_driver_sql("UPDATE fincoach_version SET version_num = '9999'")
    for use in (require, upgrade, lambda e: downgrade(e, "base"), lambda e: load(e, {"users": people()})):
        with pytest.raises(DatabaseError, match=r"made by a newer FinCoach .*pip install -U"):
            use(engine)


def test_a_password_is_not_shown(monkeypatch):
    pytest.importorskip("psycopg")
    made = connect("postgresql+psycopg://ann:geheim@127.0.0.1:1/none")
    with pytest.raises(DatabaseError, match="is the server running") as said:
        counts(made)
    assert "geheim" not in str(said.value)


def test_another_writer_is_waited_for_and_then_named(lite):
    other = sqlite3.connect(lite.url.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="being written by another process"):
        load(lite, {"users": people()})
    other.execute("ROLLBACK")
    other.close()
    assert load(lite, {"users": people()}) == {"users": 2}


def test_wrong_urls_say_how_to_write_one():
    with pytest.raises(DatabaseError, match="sqlite:///path"):
        connect("fincoach.db")
    with pytest.raises(DatabaseError, match="no revision '0000'"):
        downgrade(connect("sqlite://"), "0000")


# Loading


def test_a_reader_sees_all_of_a_load_or_nothing(lite):
    """While rows come in, another connection reads without waiting, and never a half."""
    load(lite, {"users": people()})
    seen, done = set(), threading.Event()

    def look():
        other = connect(f"sqlite:///{lite.url.database}")
        while not done.is_set():
            seen.add(counts(other)["transactions"])
        seen.add(counts(other)["transactions"])
        other.dispose()

    reader = threading.Thread(target=look)
    reader.start()
    load(lite, {"transactions": rows(range(1, 60_001))})
    done.set()
    reader.join()
    assert seen <= {0, 60_000}
    assert 60_000 in seen


def test_the_same_ids_twice_change_nothing(engine):
    load(engine, {"users": people(), "transactions": rows(range(1, 1000))})
    with pytest.raises(DatabaseError, match="nothing was loaded"):
        load(engine, {"users": people((3,)), "transactions": rows(range(999, 1500))})
    assert counts(engine)["transactions"] == 999
    assert counts(engine)["users"] == 2


def test_the_bank_s_own_number_counts_once(engine):
    bank = rows((1, 2)).with_columns(account=pl.lit("giro"), external_id=pl.Series(["a", "b"]))
    load(engine, {"users": people(), "transactions": bank})
    with pytest.raises(DatabaseError):
        load(engine, {"transactions": bank.with_columns(id=pl.col("id") + 10)})
    with pytest.raises(DatabaseError, match=r"transactions.user_id, account, external_id must be unique"):
        load(engine, {"transactions": bank.with_columns(id=pl.col("id") + 10, external_id=pl.lit("c"))})
    assert counts(engine)["transactions"] == 2


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ({"transactions": rows((1,), user_id=77)}, r"transactions.user_id points to 1 rows that users has not \(users.id 77\)"),
        ({"users": people(), "transactions": rows((1,)).with_columns(category_id=999)}, r"transactions.category_id .*categories.id 999"),
        ({"users": people(), "transactions": rows((1,)).with_columns(amount_minor=1.5)}, "amount_minor is Float64.*minor units"),
        ({"users": people(), "transactions": rows((1,)).drop("amount_minor")}, "transactions.amount_minor is empty in 1 rows"),
        ({"users": people().with_columns(pl.col("created_at").dt.replace_time_zone(None))}, "users.created_at has no time zone"),
        ({"users": people().with_columns(created_at=pl.lit("today"))}, "users.created_at is String: must be a moment"),
        ({"users": people().with_columns(external_id=pl.lit("x" * 129) + pl.col("id").cast(pl.String))}, "130 characters: there is room for 128"),
        ({"users": people().with_columns(nam=pl.lit("x"))}, "no column in users 'nam'"),
        ({"transaction": rows((1,))}, "no table 'transaction': did you mean 'transactions'"),
        ({"users": people((1, 1)).with_columns(external_id=pl.Series(["a", "b"]))}, "users.id must be unique"),
        ({"categories": pl.DataFrame({"id": [1], "name": ["wages"], "kind": ["income"]})}, "category 1 is salary .* use a new number"),
        ({"categories": pl.DataFrame({"id": [99], "name": ["fun"], "kind": ["joy"]})}, "break the rule kind IN"),
        ({"users": people(), "user_profiles": pl.DataFrame({"user_id": [1], "birth_year": [2**31]})}, "birth_year has a number of 2147483648"),
    ],
)
def test_what_fits_no_table_is_refused_before_it_is_written(engine, frames, says):
    before = counts(engine)
    with pytest.raises(DatabaseError, match=says):
        load(engine, frames)
    assert counts(engine) == before


def test_categories_may_come_along_again_with_more(engine):
    mine = pl.DataFrame([(c.id, c.name, KINDS[c.kind]) for c in CATEGORIES] + [(100, "dairy", "essential")], ["id", "name", "kind"], orient="row")
    assert load(engine, {"categories": mine}) == {"categories": 1}
    assert load(engine, {"categories": mine}) == {"categories": 0}


def test_foreign_keys_are_on_again_after_a_load(lite):
    load(lite, {"users": people()})
    with pytest.raises(sa.exc.IntegrityError), writing(lite) as c:
        c.execute(sa.insert(Transaction.__table__), {"id": 1, "user_id": 9, "occurred_at": START, "amount_minor": 1, "currency": "EUR", "category_id": 1})


MOMENTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)).map(lambda d: d.replace(tzinfo=UTC))
AMOUNTS = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(st.tuples(MOMENTS, AMOUNTS, st.none() | st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=9)), min_size=1, max_size=9))
def test_moments_amounts_and_texts_come_back_as_they_went_in(engine, found):
    """The first and the last microsecond of the calendar, the largest numbers, empty texts, any alphabet."""
    with writing(engine) as c:
        c.exec_driver_sql("DELETE FROM users")
    moments, amounts, names = zip(*found, strict=True)
    frame = rows(range(1, len(found) + 1)).with_columns(
        occurred_at=pl.Series(moments, dtype=pl.Datetime("us", "UTC")), amount_minor=pl.Series(amounts), merchant=pl.Series(names, dtype=pl.String)
    )
    load(engine, {"users": people(), "transactions": frame})
    table = Transaction.__table__
    with engine.connect() as c:
        back = c.execute(sa.select(table.c.occurred_at, table.c.amount_minor, table.c.merchant).order_by(table.c.id)).all()
    assert back == found


def test_conform_changes_no_value_and_no_order():
    frame = rows((3, 1, 2)).with_columns(pl.col("occurred_at").dt.convert_time_zone("Asia/Tokyo").dt.cast_time_unit("ns"))
    made = conform({"transactions": frame})["transactions"]
    assert made["id"].to_list() == [3, 1, 2]
    assert made["occurred_at"].to_list() == [START] * 3
    assert made.schema == database.SCHEMA["transactions"]


# One person


@pytest.mark.parametrize(
    ("zone", "year"),
    [("UTC", 2018), ("America/Los_Angeles", 2018), ("Asia/Tokyo", 2018), ("Pacific/Apia", 2011), ("America/Sao_Paulo", 2018),
     ("America/Havana", 2018), ("America/St_Johns", 2010)],
)
def test_a_person_as_of_a_day_is_cut_at_local_midnight(engine, zone, year):
    """Against the calendar itself, on every day that clocks change, one that never was, and midnights that come twice."""
    local = ZoneInfo(zone)
    moments = [datetime(year, 1, 1, tzinfo=UTC) + timedelta(hours=h, microseconds=-1 + h % 3) for h in range(0, 24 * 365, 1)]
    frame = rows(range(1, len(moments) + 1)).with_columns(occurred_at=pl.Series(moments))
    load(engine, {"users": people((1,), zone), "transactions": frame})
    changes = {m.astimezone(local).date() for m in moments if m.astimezone(local).utcoffset() != (m + timedelta(hours=1)).astimezone(local).utcoffset()}
    for day in {d + timedelta(days=k) for d in changes for k in (-2, -1, 0, 1)} | {date(year, 5, 5)}:
        got = set(read_person(engine, 1, day).occurred_at.tolist())
        due = {to_micros(m) for m in moments if m.astimezone(local).date() <= day}
        assert got >= due
        twice = [from_micros(m).astimezone(local) for m in got - due]
        assert all(m.hour == 0 and m.date() == day + timedelta(days=1) for m in twice)
        assert not twice or zone in ("America/Havana", "America/St_Johns")


def test_a_person_has_goals_contributions_and_a_balance(engine):
    later = START + timedelta(days=40)
    goals = pl.DataFrame({"id": [5, 9, 11], "user_id": 1, "name": "g", "target_minor": [100, 200, 300], "currency": "EUR",
                          "created_at": [START, START, later], "due_at": [None, later, None]})
    given = pl.DataFrame({"id": [1, 2, 3], "goal_id": [9, 5, 9], "contributed_at": [START, START, later], "amount_minor": [7, 8, 9]})
    load(engine, {"users": people(), "user_profiles": pl.DataFrame({"user_id": [1], "opening_balance_minor": [-500]}),
                  "financial_goals": goals, "goal_contributions": given, "transactions": rows((1, 2), user_id=2)})
    got = read_person(engine, 1, date(2025, 3, 1))
    assert (got.external_id, got.currency, got.opening_balance_minor) == ("p1", "EUR", -500)
    assert got.goal_id.tolist() == [5, 9]
    assert got.goal_due_at.tolist() == [NEVER, to_micros(later)]
    assert got.contribution_goal.tolist() == [1, 0]
    assert got.contribution_minor.tolist() == [7, 8]
    assert got.occurred_at.size == 0
    assert got.kinds[8] == KINDS.index("essential")
    assert got.kinds[0] == -1
    assert read_person(engine, 1, date(2025, 12, 31)).contribution_minor.tolist() == [7, 8, 9]


def test_all_rows_in_one_piece_are_the_rows_one_by_one(engine):
    """Many at the same moment in the order of their numbers, before 1970 and 2000, huge amounts, of another currency left out."""
    n, rng = 400, np.random.default_rng(0)
    moments = [datetime(y, 6, 1, tzinfo=UTC) + timedelta(microseconds=int(m)) for y, m in zip(rng.choice([1950, 1999, 2000, 2024], n), rng.integers(0, 9, n), strict=True)]
    amounts = rng.choice([-(2**62), -1, 0, 7, 2**62], n).tolist()
    frame = rows(range(1, n + 1)).with_columns(occurred_at=pl.Series(moments), amount_minor=pl.Series(amounts, dtype=pl.Int64),
                                               currency=pl.Series(rng.choice(["EUR", "USD"], n)))
    load(engine, {"users": people(), "transactions": frame})
    got = read_person(engine, 1, date(2025, 1, 1))
    due = frame.filter(pl.col("currency") == "EUR").sort("occurred_at", "id")
    assert got.occurred_at.tolist() == [to_micros(m) for m in due["occurred_at"]]
    assert got.amount_minor.tolist() == due["amount_minor"].to_list()
    assert got.category_id.tolist() == due["category_id"].to_list()
    assert {a.dtype for a in got[5:8]} == {np.dtype(np.int64)}


def test_reading_leaves_a_connection_that_can_still_undo(engine):
    """It reads without a transaction; the next one on the same connection must not be stored piece by piece."""
    load(engine, {"users": people()})
    read_person(engine, 1, START.date())
    with pytest.raises(DatabaseError, match="nobody"):
        read_person(engine, 99, START.date())
    with suppress(InterruptedError), writing(engine) as connection:
        connection.exec_driver_sql("DELETE FROM users")
        raise InterruptedError
    assert read_person(engine, 1, START.date()).external_id == "p1"


def test_rows_after_the_day_change_nothing(engine):
    load(engine, {"users": people(), "transactions": rows((1, 2, 3))})
    before = read_person(engine, 1, date(2025, 3, 1))
    load(engine, {"transactions": rows((4, 5), at=datetime(2025, 3, 2, tzinfo=UTC))})
    after = read_person(engine, 1, date(2025, 3, 1))
    assert all(repr(a) == repr(b) for a, b in zip(before, after, strict=True))


def test_unknown_people_get_a_hint(engine):
    with pytest.raises(DatabaseError, match="nobody yet"):
        find_user(engine, "p1")
    load(engine, {"users": people()})
    assert find_user(engine, "p2") == 2
    with pytest.raises(DatabaseError, match="did you mean p"):
        find_user(engine, "pp1")
    with pytest.raises(DatabaseError, match="nobody with the id 77"):
        read_person(engine, 77, date(2025, 1, 1))


def test_reading_needs_no_heavy_library():
    script = ("import sys, fincoach.data.database\n"
              "print(*[m for m in ('pandas', 'sklearn', 'torch', 'scipy', 'alembic', 'pyarrow', 'matplotlib') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == ""
