"""The audit log: what may stand in it, that it is durable, and that whatever is done to it afterwards is named."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from fincoach.data import audit
from fincoach.data.audit import AuditError, Entry, Mark, append, checked, keep_mark, kept_mark, verify
from fincoach.data.database import DatabaseError, connect, upgrade
from fincoach.data.tables import TABLES

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
LOG = TABLES["audit_log"]
ENTRY = Entry("operator:night-shift", "admin", "access", "person:0123456789abcdef", details={"route": "/me/export", "method": "GET"})


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request, tmp_path_factory):
    """A migrated database."""
    if request.param == "sqlite":
        made = connect(f"sqlite:///{tmp_path_factory.mktemp('audit')}/audit.db", wait=5)
        upgrade(made)
        yield made
        made.dispose()
        return
    if "FINCOACH_TEST_POSTGRES" not in os.environ:
        pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
    url = sa.make_url(os.environ["FINCOACH_TEST_POSTGRES"])
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as c:
        c.exec_driver_sql("DROP SCHEMA IF EXISTS audited CASCADE")
        c.exec_driver_sql("CREATE SCHEMA audited")
    made = connect(url.update_query_dict({"options": "-csearch_path=audited"}).render_as_string(hide_password=False))
    upgrade(made)
    yield made
    made.dispose()
    with admin.connect() as c:
        c.exec_driver_sql("DROP SCHEMA audited CASCADE")
    admin.dispose()


@pytest.fixture
def engine(database):
    """A database with ten rows in the log."""
    with database.begin() as c:
        c.execute(sa.delete(LOG))
    for n in range(10):
        append(database, ENTRY._replace(details={"rows": n}), NOON + timedelta(seconds=n))
    return database


def alter(engine, *statements):
    with engine.begin() as c:
        for statement in statements:
            c.execute(statement if isinstance(statement, sa.Executable) else sa.text(statement))


def test_the_chain_holds_as_written(engine):
    chain = verify(engine)
    assert (chain.rows, chain.broken, chain.head.id) == (10, "", 10)


@pytest.mark.parametrize("column", [c.name for c in LOG.columns])
def test_any_changed_column_is_named_at_its_row(engine, column):
    """Whatever is changed in row 4, the chain breaks there, or where row 5 should follow it."""
    values = {"id": 400, "at": NOON, "outcome": "failed", "hash": "a" * 64, "previous_hash": "b" * 64}
    alter(engine, sa.update(LOG).where(LOG.c.id == 4).values({column: values.get(column, "fincoach")}))
    chain = verify(engine)
    assert chain.rows == 3
    assert "row 4 " in chain.broken


def test_a_row_rewritten_with_a_fitting_hash_is_named_by_the_next(engine):
    with engine.connect() as c:
        row = c.execute(sa.select(LOG).where(LOG.c.id == 4)).one()
    forged = audit.row_hash(row.previous_hash, 4, row.at, "fincoach", row.role, row.action, row.target, row.outcome, row.details)
    alter(engine, sa.update(LOG).where(LOG.c.id == 4).values(actor="fincoach", hash=forged))
    assert verify(engine).broken.startswith("row 5 does not follow row 4")


@pytest.mark.parametrize(("statement", "said"), [
    ("DELETE FROM audit_log WHERE id = 1", "row 1 was removed"),
    ("DELETE FROM audit_log WHERE id IN (6, 7)", "row 6 was removed: row 5 is followed by row 8"),
    ("DELETE FROM audit_log WHERE id > 7", "rows after 7 were removed"),
    ("DELETE FROM audit_log", "rows after 0 were removed"),
])
def test_removed_rows_are_named(engine, statement, said):
    mark = verify(engine).head
    alter(engine, statement)
    assert said in verify(engine, (mark,)).broken


def test_a_log_that_was_rewritten_to_its_end_is_found_by_a_mark(engine):
    """Whoever may write can compute all hashes anew; a mark that is kept elsewhere tells."""
    mark = verify(engine).head
    alter(engine, "DELETE FROM audit_log WHERE id > 3")
    for _ in range(8):
        append(engine, ENTRY, NOON)
    assert not verify(engine).broken
    assert "row 10 is not the one that was marked" in verify(engine, (mark,)).broken


def test_many_writers_make_one_chain(engine):
    """Four threads, no gap, no fork."""
    def write():
        for _ in range(8):
            append(engine, ENTRY, NOON)

    threads = [threading.Thread(target=write) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert verify(engine)[:1] == (42,)
    assert not verify(engine).broken


def test_a_row_goes_with_the_transaction_it_tells_of(engine):
    def fail():
        with audit.durably(engine) as connection:
            audit.record(connection, ENTRY, NOON)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert verify(engine).rows == 10


# --- what may stand in it ------------------------------------------------------------------------------------------

SECRETS = ["anna@example.org", "192.168.0.17", "eyJhbGciOiJIUzI1NiJ9.e30.x", "45.00", "12 Main Street", "Anna Müller", "x" * 300, "", "\0", "\ud800"]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_field_takes_a_name_an_amount_a_token_or_an_address(secret):
    for field in ("actor", "role", "action", "target", "outcome"):
        if (field, secret) == ("target", ""):  # which is for nobody
            continue
        with pytest.raises(AuditError):
            checked(ENTRY._replace(**{field: secret}))
    for key in ("route", "method", "request", "reason", "purpose", "granted", "rows", "note"):
        with pytest.raises(AuditError):
            checked(ENTRY._replace(details={key: secret}))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=12), st.one_of(st.text(), st.floats(), st.lists(st.integers()), st.none()), min_size=1, max_size=2))
def test_details_that_are_not_on_the_list_are_refused(details):
    with pytest.raises(AuditError):
        checked(ENTRY._replace(details=details))


def test_operators_are_named_plainly_or_by_a_digest():
    assert audit.operator("night-shift") == "operator:night-shift"
    for subject in SECRETS:
        assert subject == "" or subject not in audit.operator(subject)
        checked(ENTRY._replace(actor=audit.operator(subject)))


# --- real faults ---------------------------------------------------------------------------------------------------


@pytest.fixture
def lite(tmp_path):
    made = connect(f"sqlite:///{tmp_path}/audit.db", wait=0.3)
    upgrade(made)
    yield made
    made.dispose()


def test_a_full_disk_leaves_the_log_as_it_was(lite):
    append(lite, ENTRY, NOON)
    with lite.connect() as c:  # the limit is the connection's, and the pool gives the same one again
        c.exec_driver_sql(f"PRAGMA max_page_count={c.exec_driver_sql('PRAGMA page_count').scalar()}")
    written = [1]
    with pytest.raises(DatabaseError, match="no room left"):
        written.extend(append(lite, ENTRY, NOON).id for _ in range(200))
    assert verify(lite)[::2] == (written[-1], "")
    with lite.connect() as c:
        assert c.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"


def test_a_held_lock_is_waited_for_and_then_said(lite, tmp_path):
    holder = sqlite3.connect(tmp_path / "audit.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    begin = time.monotonic()
    with pytest.raises(DatabaseError, match="another process"):
        append(lite, ENTRY, NOON)
    assert time.monotonic() - begin < 5
    holder.execute("ROLLBACK")
    assert append(lite, ENTRY, NOON).id == 1


WRITER = """
import sys
from datetime import UTC, datetime
from fincoach.data.audit import Entry, append
from fincoach.data.database import connect
engine = connect(sys.argv[1])
while True:
    print(append(engine, Entry("fincoach", "system", "test"), datetime(2026, 1, 1, tzinfo=UTC)).id, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(lite, tmp_path):
    """A process that writes is killed; every row it told of is there, and the chain holds. Twice."""
    told = 0
    for delay in (0.05, 0.2):
        with subprocess.Popen([sys.executable, "-c", WRITER, f"sqlite:///{tmp_path}/audit.db"], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            told = max([told, *map(int, process.stdout.read().split("\n")[:-1])])
        chain = verify(lite)
        assert not chain.broken
        assert chain.rows >= told > 0


def test_marks_are_kept_in_a_file_and_never_go_back(tmp_path):
    path = tmp_path / "deep" / "audit.mark"
    assert kept_mark(path) is None
    keep_mark(path, Mark(7, "a" * 64))
    keep_mark(path, Mark(6, "b" * 64))
    assert kept_mark(path) == Mark(7, "a" * 64)
    assert [p.name for p in path.parent.iterdir()] == ["audit.mark"]
    path.write_text("7 short")
    with pytest.raises(AuditError, match="holds no mark"):
        kept_mark(path)
