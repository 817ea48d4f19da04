"""Statements taken into a database, again and again, on both databases."""

import os
import threading
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fincoach.data.database import DatabaseError, connect, counts, downgrade, upgrade
from fincoach.data.intake import take_in
from fincoach.data.source import Source, all_tables
from fincoach.data.tables import TABLES

BEGIN = datetime(2025, 1, 1, tzinfo=UTC)


def bank(name, days, opening=None, account="giro", currency="EUR", numbered=True):
    """One row on each of `days` after the first of January; its number says which day it is."""
    rows = [{"id": i, "user_id": 7, "occurred_at": BEGIN + timedelta(days=day), "amount_minor": -100 - day, "currency": currency,
             "category_id": 8, "account": account, "external_id": f"row-{day}" if numbered else None}
            for i, day in enumerate(days, start=1)]
    user = {"id": 7, "external_id": name, "timezone": "UTC", "currency": currency, "created_at": BEGIN}
    return Source(name, all_tables(users=pl.DataFrame([user]), transactions=pl.DataFrame(rows),
                                   user_profiles=pl.DataFrame({"user_id": [7], "opening_balance_minor": [opening]})))


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path):
    url = f"sqlite:///{tmp_path}/a.db" if request.param == "sqlite" else os.environ["FINCOACH_TEST_POSTGRES"]
    engine = connect(url)
    if request.param == "postgresql":  # other tests may have left theirs
        with engine.begin() as c:
            c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*TABLES, 'fincoach_version'])} CASCADE")
    upgrade(engine)
    yield engine
    downgrade(engine, "base")
    engine.dispose()


def stored(engine):
    with engine.connect() as c:
        return sorted((name, number) for name, number in c.execute(sa.text(
            "SELECT u.external_id, t.external_id FROM transactions t JOIN users u ON u.id = t.user_id")))


def opening(engine, name):
    with engine.connect() as c:
        return c.execute(sa.text("SELECT p.opening_balance_minor FROM user_profiles p JOIN users u ON u.id = p.user_id "
                                 "WHERE u.external_id = :name"), {"name": name}).scalar()


def test_next_month_adds_what_is_new(engine):
    assert take_in(engine, bank("ann", range(59), 500)).rows["transactions"] == 59
    again = take_in(engine, bank("ann", range(31, 90)))
    assert (again.rows["transactions"], again.known) == (31, 28)
    assert take_in(engine, bank("bob", range(5))).rows["users"] == 1
    assert len(stored(engine)) == 95
    assert counts(engine)["users"] == 2
    assert opening(engine, "ann") == 500  # nothing older came


def test_older_rows_make_the_opening_balance_unknown_or_that_of_the_file(engine):
    take_in(engine, bank("ann", range(10, 20), 500))
    assert [f.rule for f in take_in(engine, bank("ann", range(5, 12))).findings] == ["no longer known"]
    assert opening(engine, "ann") is None
    take_in(engine, bank("ann", range(0, 20), 700))
    assert opening(engine, "ann") == 700


def test_another_account_makes_the_opening_balance_unknown(engine):
    take_in(engine, bank("ann", range(10), 500))
    assert take_in(engine, bank("ann", range(5, 9), 900, account="savings")).findings
    assert opening(engine, "ann") is None


def test_rows_that_could_be_twice_are_refused(engine):
    take_in(engine, bank("ann", range(5)))
    with pytest.raises(DatabaseError, match="no number of their own"):
        take_in(engine, bank("ann", range(5), numbered=False))
    with pytest.raises(DatabaseError, match="stored with amounts in EUR"):
        take_in(engine, bank("ann", range(5), currency="USD"))
    assert len(stored(engine)) == 5


def test_a_new_category_gets_a_free_number_and_a_known_one_its_own(engine):
    source = bank("ann", range(3))
    rows = source.frames["categories"]
    more = pl.DataFrame({"id": [len(rows) + 1], "name": ["allotment"], "kind": ["discretionary"]}, schema=rows.schema)
    source.frames["categories"] = pl.concat([rows, more])
    source.frames["transactions"] = source.frames["transactions"].with_columns(category_id=pl.lit(len(rows) + 1, pl.Int64))
    take_in(engine, source)
    other = bank("bob", range(3))
    other.frames["categories"] = pl.concat([rows, more.with_columns(name=pl.lit("beehives"))])
    other.frames["transactions"] = other.frames["transactions"].with_columns(category_id=pl.lit(len(rows) + 1, pl.Int64))
    take_in(engine, other)
    with engine.connect() as c:
        found = dict(c.execute(sa.text("SELECT u.external_id, c.name FROM transactions t JOIN users u ON u.id = t.user_id "
                                       "JOIN categories c ON c.id = t.category_id GROUP BY u.external_id, c.name")).all())
    assert found == {"ann": "allotment", "bob": "beehives"}


def test_several_at_once_lose_nothing(engine):
    failed = []

    def work(k):
        try:
            take_in(engine, bank(f"person-{k}", range(20)))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed
    assert len(stored(engine)) == 60


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 15)), min_size=1, max_size=5))
def test_any_overlapping_pieces_in_any_order_end_as_their_union(tmp_path_factory, pieces):
    engine = connect(f"sqlite:///{tmp_path_factory.mktemp('intake')}/a.db")
    upgrade(engine)
    for first, length in pieces:
        take_in(engine, bank("ann", range(first, first + length)))
    days = {d for first, length in pieces for d in range(first, first + length)}
    assert stored(engine) == sorted(("ann", f"row-{d}") for d in days)
    engine.dispose()
