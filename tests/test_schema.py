"""The later steps of the tables: up, down, killed half way, on older rows, looked at closely, on both databases."""

import hashlib
import os
import re
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT
from sqlalchemy.dialects import postgresql, sqlite

from fincoach.data.database import (
    REVISIONS,
    VERSION_TABLE,
    DatabaseError,
    connect,
    counts,
    drift,
    load,
    upgrade,
    writing,
)
from fincoach.data.population import generate
from fincoach.data.schema import (
    BEHAVIORAL,
    DECIDING,
    LEARNING,
    SERVING,
    STEPS,
    create_api_tables,
    create_behavioral_tables,
    create_continuous_learning_tables,
    create_recommendation_tables,
    diagram,
    meanings,
    restore,
    schema_page,
    standing,
)
from fincoach.data.tables import SNAPSHOT_TABLES, TABLES, Base
from fincoach.show import html

START = datetime(2025, 3, 1, 8, 30, tzinfo=UTC)
FIRST = (*SNAPSHOT_TABLES, "user_segments")  # the tables of 0001
ACT = {BEHAVIORAL: create_behavioral_tables, LEARNING: create_continuous_learning_tables, DECIDING: create_recommendation_tables, SERVING: create_api_tables}
MADE = tuple(t for s in STEPS for t in s.makes)
KEPT = tuple(t for t in MADE if t != "user_revisions")  # which counts, and begins anew


@pytest.fixture(params=["sqlite", "postgresql"])
def bare(request, tmp_path):
    """An engine for a database without tables."""
    url = f"sqlite:///{tmp_path}/fincoach.db" if request.param == "sqlite" else os.environ.get("FINCOACH_TEST_POSTGRES")
    if not url:
        pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
    made = connect(url)
    if request.param == "postgresql":
        with writing(made) as c:
            c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*TABLES, VERSION_TABLE])} CASCADE")
    yield made
    made.dispose()


@pytest.fixture
def engine(bare):
    """A migrated, empty database."""
    upgrade(bare)
    return bare


@pytest.fixture(scope="module")
def population():
    return generate(people=15, days=150, seed=7).frames


@pytest.fixture
def older(bare, population):
    """A database of revision 0001 with the rows of a population in it, and a segment for each person."""
    upgrade(bare, "0001")
    with writing(bare) as c:
        for name in FIRST:
            frame = population.get(name)
            if frame is not None and len(frame) and name != "categories":
                c.execute(sa.insert(TABLES[name]), frame.to_dicts())
        said = {"segment_id": 1, "segment_name": "Impulse Buyers", "confidence": 0.8, "features": "{}", "method": "rules", "model_version": "v",
                "as_of": START, "created_at": START, "updated_at": START}
        c.execute(sa.insert(TABLES["user_segments"]), [{"user_id": u, **said} for u in population["users"]["id"]])
    return bare


ADDED = {t: set(columns) for step in STEPS for t, columns in step.adds}


def digest(engine):
    """A hash of every row of the first tables, in the columns they had at first, read as the database has them."""
    made = hashlib.sha256()
    with engine.connect() as c:
        for name in FIRST:
            key = next(iter(TABLES[name].primary_key.columns)).name
            columns = ", ".join(c.name for c in TABLES[name].c if c.name not in ADDED.get(name, ()))
            for row in c.exec_driver_sql(f"SELECT {columns} FROM {name} ORDER BY {key}"):
                made.update(repr(tuple(row)).encode())
    return made.hexdigest()


def tables(engine):
    with engine.connect() as c:
        return set(sa.inspect(c).get_table_names())


def uid(i):
    return str(uuid.UUID(int=i))


def behaviour(n=200, people=5):
    """A bit of every table of the steps."""
    i = pl.col("id")
    ids = lambda n: pl.DataFrame({"id": range(1, n + 1)})  # noqa: E731
    at = pl.lit(START) + pl.duration(minutes=i * 7919 % 100_003)
    user = (1 + i % people).alias("user_id")
    return {
        "behavioral_events": ids(n).with_columns(user, event_id=pl.format("e{}", i), event_type=pl.when(i % 3 == 0).then(pl.lit("purchase")).otherwise(pl.lit("page_view")),
                                                 event_data=pl.lit('{"note": "tab\\tand\\nline ü"}'), session_id=pl.when(i % 2 == 0).then(pl.lit("s1")), timestamp=at, created_at=at),
        "user_sessions": ids(n // 4).with_columns(user, session_id=pl.format("s{}", i), start_time=at, end_time=pl.when(i % 2 == 0).then(at), actions_count=i),
        "financial_decisions": ids(n // 4).with_columns(user, decision_type=pl.lit("save"), amount_minor=pl.when(i % 2 == 0).then(-i), currency=pl.when(i % 2 == 0).then(pl.lit("EUR")),
                                                        category_id=pl.lit(8), outcome=pl.when(i % 5 == 0).then(pl.lit("partial")), outcome_at=pl.when(i % 5 == 0).then(at), timestamp=at, created_at=at),
        "prediction_cache": ids(n // 2).with_columns(user, prediction_type=pl.when(i % 2 == 0).then(pl.lit("spending")).otherwise(pl.lit("goal")), subject=pl.format("{}", i), as_of=at, feature_version=pl.lit("f1"),
                                                     model_version=pl.lit("m1"), prediction_data=pl.lit("{}"), created_at=at, expires_at=at + timedelta(hours=24)),
        "model_performance": ids(n // 2).with_columns(model_name=pl.format("m{}", i % 20), model_version=pl.lit("v"), metric=pl.lit("wape"), accuracy_metric=1 / i, sample_count=i, created_at=at),
        "training_datasets": pl.DataFrame({"id": [uid(1), uid(2)], "dataset_type": ["spending", "goal"], "threshold": [1000, 50], "data_quality_score": [0.5, None], "created_at": START, "updated_at": START}),
        "model_training_events": pl.DataFrame({"id": [uid(3), uid(4)], "model_type": "spending", "training_dataset_id": [uid(1), None], "status": ["in_progress", "pending"], "start_time": [START, None], "created_at": START}),
        "model_versions": pl.DataFrame({"id": [uid(5), uid(6)], "model_type": "spending", "version": ["1.0.0", "1.0.1"], "model_path": "p", "training_event_id": [None, uid(3)], "is_active": [False, True],
                                        "metadata": ['{"a": 1}', None], "created_at": START}),
        "data_quality_metrics": pl.DataFrame({"id": [uid(7)], "training_dataset_id": uid(1), "completeness_score": 0.25, "anomaly_count": 3, "assessment_date": START, "created_at": START}),
        "recommendation_history": ids(n // 4).with_columns(user, decided_at=at, action=pl.lit("save_more"), propensity=pl.lit(0.25), strategy=pl.lit("balanced"), model_version=pl.lit("v"),
                                                           segment_id=pl.when(i > 3).then(i % 6 - 1), strategy_propensity=pl.when(i > 3).then(pl.lit(0.5)), request_id=pl.when(i % 2 == 0).then(pl.format("r{}", i))),
        "bandit_counts": pl.DataFrame({"segment_id": [-1, 0], "strategy": "balanced", "week": [2880, 2881], "decisions": [3, 5], "reward_millionths": [2_500_000, 0]}),
        "bandit_updates": ids(n // 8).select(recommendation_id="id", reward_millionths=i * 10, received_at=at),
        "audit_log": ids(3).with_columns(at=at, actor=pl.lit("p1"), role=pl.lit("user"), action=pl.lit("read"), target=pl.lit("p2"), outcome=pl.lit("refused"), previous_hash=pl.lit(""), hash=pl.format("h{}", i)),
        "audit_names": pl.DataFrame({"user_id": [1, 2], "alias": ["a1", "a2"]}),
        "user_consents": pl.DataFrame({"user_id": [1, 2], "purpose": "tracking", "granted": [True, False], "updated_at": START}),
        "revoked_tokens": pl.DataFrame({"token_id": ["t1"], "revoked_at": START, "expires_at": START + timedelta(days=1)}),
        "erasures": pl.DataFrame({"id": [1, 2], "erased_user_id": [4, None], "requested_at": START, "completed_at": [None, START]}),
    }  # fmt: skip


def people(n=5):
    ids = list(range(1, n + 1))
    return pl.DataFrame({"id": ids, "external_id": [f"p{i}" for i in ids], "currency": "EUR", "created_at": START})


def stored(engine, names):
    with engine.connect() as c:
        return {n: c.execute(sa.select(TABLES[n]).order_by(*TABLES[n].primary_key)).all() for n in names}


# Up and down


def test_older_rows_stay_as_they_are_up_and_down(older, tmp_path):
    before = digest(older)
    for step in STEPS:
        assert ACT[step](older).passed
        assert digest(older) == before
    assert drift(older) == []
    for step in reversed(STEPS):
        assert ACT[step](older, "rollback", tmp_path).changed
        assert digest(older) == before
    assert standing(older) == BEHAVIORAL.before
    assert tables(older) == {*FIRST, VERSION_TABLE}


def test_rows_go_to_files_and_come_back(engine, tmp_path):
    load(engine, {"users": people(), **behaviour()})
    before = stored(engine, (*KEPT, *ADDED))
    assert all(before.values()), "a row in every table, else this shows nothing"
    fourth, third, second, first = (ACT[step](engine, "rollback", tmp_path) for step in reversed(STEPS))
    assert f"{sum(len(before[n]) for n in BEHAVIORAL.makes):,} rows are in {first.kept}" in first.sentence
    assert "restore(engine" in first.sentence
    assert "27 rows, and segment_id, strategy_propensity, urgency, served_by, request_id of 48 rows of recommendation_history are in" in third.sentence
    assert not set(MADE) & tables(engine)
    upgrade(engine)
    for result in (first, second, third, fourth):
        restore(engine, result.kept)
    assert stored(engine, (*KEPT, *ADDED)) == before
    assert [t.rows for t in create_behavioral_tables(engine, "verify").tables[:-1]] == [len(before[n]) for n in BEHAVIORAL.makes]


def test_rows_go_beside_a_sqlite_file_unless_a_folder_is_named(engine, tmp_path):
    load(engine, behaviour(4) | {"users": people()})
    if engine.dialect.name == "postgresql":
        with pytest.raises(DatabaseError, match=r"in which folder.*nothing was changed"):
            create_api_tables(engine, "rollback")
        assert standing(engine) == REVISIONS[-1]
    else:
        kept = create_api_tables(engine, "rollback").kept
        assert kept.parent == tmp_path / "kept"
        assert kept.stat().st_mode & 0o077 == 0, "people's rows are for the owner's eyes"


def test_whoever_was_deleted_does_not_come_back(engine, tmp_path):
    load(engine, {"users": people(), **behaviour()})
    create_api_tables(engine, "drop")
    decided = create_recommendation_tables(engine, "rollback", tmp_path).kept
    create_continuous_learning_tables(engine, "drop")
    kept = create_behavioral_tables(engine, "rollback", tmp_path).kept
    with writing(engine) as c:
        c.execute(sa.delete(TABLES["users"]).where(TABLES["users"].c.id == 3))
    upgrade(engine)
    restore(engine, kept)
    assert restore(engine, decided) == {"recommendation_history": 38, "bandit_counts": 2, "bandit_updates": 20}
    assert {r.user_id for r in stored(engine, ["behavioral_events"])["behavioral_events"]} == {1, 2, 4, 5}


def test_files_that_were_changed_are_refused(engine, tmp_path):
    load(engine, {"users": people(), **behaviour()})
    create_api_tables(engine, "drop")
    create_recommendation_tables(engine, "drop")
    kept = create_continuous_learning_tables(engine, "rollback", tmp_path).kept
    upgrade(engine)
    with (kept / "model_versions.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DatabaseError, match=r"model_versions.parquet was changed.*nothing was loaded"):
        restore(engine, kept)
    with pytest.raises(DatabaseError, match="no folder of a rollback"):
        restore(engine, tmp_path)
    assert counts(engine)["training_datasets"] == 0


def test_drop_says_how_many_rows_went(engine):
    data = behaviour()
    load(engine, {"users": people(), **data})
    create_api_tables(engine, "drop")
    said = create_recommendation_tables(engine, "drop").sentence
    assert "2 tables dropped with 27 rows, and segment_id, strategy_propensity, urgency, served_by, request_id of 48 rows of recommendation_history, which are gone" in said
    gone = create_continuous_learning_tables(engine, "drop")
    assert f"with {sum(len(data[n]) for n in LEARNING.makes)} rows, which are gone" in gone.sentence
    assert gone.kept is None
    assert not set(LEARNING.makes) & tables(engine)
    assert counts_of(engine, BEHAVIORAL.makes) == [len(data[n]) for n in BEHAVIORAL.makes]


def counts_of(engine, names):
    with engine.connect() as c:
        return [c.scalar(sa.select(sa.func.count()).select_from(TABLES[n])) for n in names]


def test_what_a_later_step_stands_on_does_not_go_first(engine):
    for action in ("rollback", "drop"):
        with pytest.raises(DatabaseError, match=rf"0004 \(create_continuous_learning_tables\), 0005 .* stands on 0003 .*`fincoach db create_api_tables --{action}` then "
                                                rf"`fincoach db create_recommendation_tables --{action}` then `fincoach db create_continuous_learning_tables --{action}`"):
            create_behavioral_tables(engine, action, "kept")
    assert standing(engine) == REVISIONS[-1]


def test_again_is_nothing_and_back_from_nothing_is_nothing(bare):
    assert create_behavioral_tables(bare).changed
    again = create_behavioral_tables(bare)
    assert not again.changed
    assert "was there already" in again.sentence
    assert not create_continuous_learning_tables(bare, "drop").changed
    assert create_behavioral_tables(bare, "drop").sentence.endswith("held no rows")
    for act in ACT.values():
        assert "is not there: nothing to take back" in act(bare, "rollback", "kept").sentence
    assert "0002 (one_external_id), before 0003" in create_behavioral_tables(bare, "verify").problems[0]
    with pytest.raises(DatabaseError, match="no action: there are create, verify"):
        create_behavioral_tables(bare, "undo")


def test_nothing_is_done_to_what_is_not_there_or_not_ours(tmp_path):
    missing = connect(f"sqlite:///{tmp_path}/a.db")
    for action in ("verify", "rollback", "drop"):
        with pytest.raises(DatabaseError, match="there is no database"):
            create_behavioral_tables(missing, action)
    assert not list(tmp_path.glob("a.db*"))


def test_tables_of_somebody_else_are_left_alone(bare):
    upgrade(bare, "0001")
    with writing(bare) as c:
        c.exec_driver_sql("CREATE TABLE user_sessions (name TEXT)")
        c.exec_driver_sql("INSERT INTO user_sessions VALUES ('mine')")
    try:
        with pytest.raises(DatabaseError, match=r"has user_sessions already, which FinCoach did not make.*RENAME TO user_sessions_old"):
            create_behavioral_tables(bare)
        assert standing(bare) == "0001"
        with bare.connect() as c:
            assert c.exec_driver_sql("SELECT name FROM user_sessions").scalar() == "mine"
    finally:
        with writing(bare) as c:
            c.exec_driver_sql("DROP TABLE user_sessions")


# A bank's number counts once


def twice(engine):
    upgrade(engine, "0001")
    row = {"user_id": 1, "occurred_at": START, "amount_minor": -5, "currency": "EUR", "category_id": 8}
    bank = [("a", None), ("a", None), ("a", None), ("b", None), ("a", "giro"), (None, None), (None, None)]
    with writing(engine) as c:
        c.execute(sa.insert(TABLES["users"]), people(1).to_dicts())
        c.execute(sa.insert(TABLES["transactions"]), [{"id": i, **row, "external_id": x, "account": a} for i, (x, a) in enumerate(bank, 1)])


def test_older_duplicates_stop_the_step_and_it_says_how_to_mend_them(bare):
    twice(bare)
    before = digest(bare)
    with pytest.raises(DatabaseError, match=r"2 rows without an account .*user_id 1, external_id 'a': 3 rows, the first has id 1") as said:
        create_behavioral_tables(bare)
    assert digest(bare) == before
    assert standing(bare) == "0001"
    advice = re.search(r"DELETE FROM .*;", str(said.value))[0]
    shown = re.search(r"To see them: (.*);", str(said.value))[1]
    with writing(bare) as c:
        assert len(c.exec_driver_sql(shown).all()) == 1
        assert c.exec_driver_sql(advice).rowcount == 2
    assert create_behavioral_tables(bare).passed
    with bare.connect() as c:
        assert c.scalars(sa.select(TABLES["transactions"].c.id).order_by("id")).all() == [1, 4, 5, 6, 7]


def test_naming_the_account_mends_them_too(bare):
    twice(bare)
    with writing(bare) as c:
        for id in (2, 3):
            c.exec_driver_sql(f"UPDATE transactions SET account = 'card {id}' WHERE id IN ({id})")
    assert create_behavioral_tables(bare).passed


def test_a_number_counts_once_an_account_and_once_without(engine):
    row = pl.DataFrame({"id": [1], "user_id": 1, "occurred_at": START, "amount_minor": -5, "currency": "EUR", "category_id": 8, "external_id": "a"})
    load(engine, {"users": people(1), "transactions": row})
    with pytest.raises(DatabaseError, match="nothing was loaded"):
        load(engine, {"transactions": row.with_columns(id=pl.lit(2))})
    with pytest.raises(DatabaseError, match=r"transactions.user_id, external_id must be unique"):
        load(engine, {"transactions": pl.concat([row, row]).with_columns(id=pl.Series([3, 4]), external_id=pl.lit("b"))})
    load(engine, {"transactions": pl.concat([row, row]).with_columns(id=pl.Series([5, 6]), account=pl.Series(["x", "y"]))})
    assert counts(engine)["transactions"] == 3


# Looking closely


TAMPER = {
    "sqlite": [
        ("DROP INDEX idx_prediction_cache_expires_at", "index idx_prediction_cache_expires_at is missing"),
        ("ALTER TABLE behavioral_events ADD COLUMN device VARCHAR(8)", "column device is not FinCoach's: VARCHAR(8)"),
        ("DROP INDEX idx_behavioral_events_user_id; CREATE INDEX idx_behavioral_events_user_id ON behavioral_events (user_id)",
         "index idx_behavioral_events_user_id is (user_id), and should be (user_id, timestamp)"),
        ("ALTER TABLE user_sessions RENAME COLUMN end_time TO ended", "column end_time is missing"),
        ("DROP TABLE model_performance", "model_performance is missing: run create_behavioral_tables"),
        ("DROP INDEX ix_user_segments_segment_name", "user_segments: index ix_user_segments_segment_name is missing"),
    ],
    "postgresql": [
        ("DROP INDEX idx_prediction_cache_expires_at", "index idx_prediction_cache_expires_at is missing"),
        ("ALTER TABLE behavioral_events ADD COLUMN device VARCHAR(8)", "column device is not FinCoach's: VARCHAR(8)"),
        ("ALTER TABLE behavioral_events ALTER event_type TYPE VARCHAR(20)", "column event_type is VARCHAR(20), not null, and should be VARCHAR(50), not null"),
        ("ALTER TABLE behavioral_events ALTER event_data DROP NOT NULL", "column event_data is TEXT, default '{}'::text, and should be TEXT, not null"),
        ("ALTER TABLE user_sessions ALTER actions_count DROP DEFAULT", "column actions_count is INTEGER, not null, and should be INTEGER, not null, default 0"),
        ("ALTER TABLE financial_decisions DROP CONSTRAINT ck_financial_decisions_outcome", "check ck_financial_decisions_outcome is missing"),
        ("ALTER TABLE financial_decisions DROP CONSTRAINT ck_financial_decisions_outcome, ADD CONSTRAINT ck_financial_decisions_outcome CHECK (outcome IN ('success'))",
         "check ck_financial_decisions_outcome is"),
        ("ALTER TABLE user_sessions DROP CONSTRAINT fk_user_sessions_user_id", "foreign key fk_user_sessions_user_id is missing: (user_id) to users (id), on delete cascade"),
        ("ALTER TABLE user_sessions DROP CONSTRAINT fk_user_sessions_user_id, ADD CONSTRAINT fk_user_sessions_user_id FOREIGN KEY (user_id) REFERENCES users(id)",
         "(user_id) to users (id), on delete no action, and should be (user_id) to users (id), on delete cascade"),
        ("ALTER TABLE behavioral_events DROP CONSTRAINT uq_behavioral_events_user_id_event_id", "unique constraint uq_behavioral_events_user_id_event_id is missing"),
        ("DROP INDEX idx_prediction_cache_user_type; CREATE INDEX idx_prediction_cache_user_type ON prediction_cache (user_id, prediction_type)",
         "index idx_prediction_cache_user_type is (user_id, prediction_type), and should be unique (user_id"),
        ("DROP TABLE model_performance", "model_performance is missing: run create_behavioral_tables"),
    ],
}


def test_verify_finds_nothing_where_nothing_is(engine):
    for act in ACT.values():
        result = act(engine, "verify")
        assert result.problems == ()
        assert "exactly what FinCoach expects" in result.sentence
    assert {n for n in tables(engine) if not n.startswith("pg_")} == {*TABLES, VERSION_TABLE}


def test_verify_names_each_difference(bare):
    for sql, says in TAMPER[bare.dialect.name]:
        create_behavioral_tables(bare)
        with writing(bare) as c:
            for statement in sql.split("; "):
                c.exec_driver_sql(statement)
        result = create_behavioral_tables(bare, "verify")
        assert not result.passed
        assert any(says in p for p in result.problems), (says, result.problems)
        assert says in str(result)
        assert "fc-error" in result.to_html()
        with writing(bare) as c:
            for name in [*reversed(TABLES), VERSION_TABLE]:
                c.exec_driver_sql(f"DROP TABLE IF EXISTS {name}" + " CASCADE" * (bare.dialect.name == "postgresql"))


def test_verify_sees_a_partial_index_that_lost_its_condition(engine):
    with writing(engine) as c:
        c.exec_driver_sql("DROP INDEX uq_model_versions_active")
        c.exec_driver_sql("CREATE UNIQUE INDEX uq_model_versions_active ON model_versions (model_type)")
    (problem,) = create_continuous_learning_tables(engine, "verify").problems
    assert "is unique (model_type), and should be unique (model_type) where is_active" in problem


def test_the_seven_indexes_have_the_names_they_were_given(engine):
    look = sa.inspect(engine)
    found = {i["name"]: i["column_names"] for t in BEHAVIORAL.makes for i in look.get_indexes(t) if i["name"].startswith("idx_")}
    assert found == {
        "idx_behavioral_events_user_id": ["user_id", "timestamp"],
        "idx_behavioral_events_event_type": ["event_type", "timestamp"],
        "idx_behavioral_events_timestamp": ["timestamp"],
        "idx_behavioral_events_user_type_time": ["user_id", "event_type", "timestamp"],
        "idx_prediction_cache_user_type": ["user_id", "prediction_type", "subject", "segment_id", "as_of", "feature_version", "model_version"],
        "idx_prediction_cache_expires_at": ["expires_at"],
        "idx_model_performance_name_created": ["model_name", "created_at"],
    }


# Killed


KILLED = """
import os, signal, sys
import sqlalchemy as sa
from fincoach.data.database import connect
from fincoach.data import schema
from fincoach.data.schema import STEPS, _act

schema._examine = lambda *_: ((), ())  # only changes count
url, at, action, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
engine, seen = connect(url), 0

@sa.event.listens_for(engine, "after_cursor_execute")
def on_statement(connection, cursor, statement, *_):
    global seen
    seen += statement.lstrip().upper().startswith(("CREATE", "DROP", "INSERT", "UPDATE", "ALTER"))
    if seen == at:
        os.kill(os.getpid(), signal.SIGKILL)

for step in (STEPS if action == "create" else STEPS[::-1]):
    _act(engine, step, action, folder)
"""


def killed(engine, at, action, folder):
    """Runs the steps in a process that kills itself after `at` changes to the database; whether it came that far."""
    url = engine.url.render_as_string(hide_password=False)
    run = subprocess.run([sys.executable, "-c", KILLED, url, str(at), action, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in (0, -9), run.stderr
    return run.returncode == -9


def test_killed_half_way_it_has_not_happened_or_is_complete(older, tmp_path):
    before, seen = digest(older), set()
    for at in (1, 2, 4, 9, 13, 17, 22, 29, 33, 38):
        assert killed(older, at, "create", tmp_path), f"over after fewer than {at} changes: this kill shows nothing"
        at = standing(older)
        seen.add(at)
        assert digest(older) == before
        due = {t for s in STEPS if s.revision <= at for t in s.makes}
        assert tables(older) & set(MADE) == due, "half a step"
        with older.connect() as c:
            have = {c["name"] for c in sa.inspect(c).get_columns("recommendation_history")}
        assert not have & ADDED["recommendation_history"], "half a step"
        for step in reversed(STEPS):
            ACT[step](older, "drop") if at >= step.revision else None
    assert seen <= {"0001", "0002", "0003", "0004"}
    assert {"0001", "0003", "0004"} <= seen, "kills in every step"
    assert not killed(older, 10_000, "create", tmp_path)
    assert digest(older) == before
    assert drift(older) == []
    assert all(act(older, "verify").passed for act in ACT.values())


def test_a_rollback_killed_loses_no_row(engine, tmp_path):
    load(engine, {"users": people(), **behaviour()})
    names = (*KEPT, *ADDED)
    before = stored(engine, names)
    for at in (1, 4, 6):
        assert killed(engine, at, "rollback", tmp_path)
        assert standing(engine) == "0006"
        assert stored(engine, names) == before
    assert killed(engine, 33, "rollback", tmp_path), "in the second step"
    assert standing(engine) == "0005"
    assert killed(engine, 11, "rollback", tmp_path), "in the third step"
    assert standing(engine) == "0004"
    assert killed(engine, 7, "rollback", tmp_path), "in the fourth step"
    assert standing(engine) == "0003"
    create_behavioral_tables(engine, "rollback", tmp_path)
    upgrade(engine)
    kept = sorted(p for p in tmp_path.iterdir() if p.name.startswith("create_"))
    assert len(kept) == 4, "the same rows are kept once"
    for folder in kept:
        restore(engine, folder)
    assert stored(engine, names) == before


def test_two_at_once_make_one(bare, tmp_path):
    upgrade(bare, "0001")
    url = bare.url.render_as_string(hide_password=False)
    runs = [subprocess.Popen([sys.executable, "-c", KILLED, url, "100000", "create", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [r.communicate()[1] for r in runs]
    assert [r.returncode for r in runs] == [0, 0, 0], said
    assert drift(bare) == []


# What the tables hold, and do not


def test_an_event_sent_again_is_stored_once(engine):
    load(engine, {"users": people(2)})
    events = TABLES["behavioral_events"]
    insert = (postgresql if engine.dialect.name == "postgresql" else sqlite).insert(events).on_conflict_do_nothing()
    row = {"user_id": 1, "event_id": uid(1), "event_type": "page_view", "timestamp": START, "created_at": START}
    with writing(engine) as c:
        for sent in (row, row, {**row, "user_id": 2}):
            c.execute(insert, sent)
        assert c.execute(sa.select(events.c.user_id, events.c.event_data).order_by("user_id")).all() == [(1, "{}"), (2, "{}")]


def test_the_number_of_an_event_is_never_given_out_again(engine):
    """Whoever counted up to a number must not miss an event that was given a deleted one's."""
    load(engine, {"users": people(2)})
    events = TABLES["behavioral_events"]
    row = {"user_id": 1, "event_type": "page_view", "timestamp": START, "created_at": START}
    with writing(engine) as c:
        first = [c.execute(sa.insert(events), {**row, "event_id": e}).inserted_primary_key[0] for e in "abc"]
        c.execute(sa.delete(events).where(events.c.event_id != "a"))
    with writing(engine) as c:
        assert c.execute(sa.insert(events), {**row, "event_id": "d"}).inserted_primary_key[0] > max(first)


def test_numbers_go_on_after_those_that_were_loaded(engine):
    load(engine, {"users": people(3), **behaviour(people=3)})
    load(engine, {"users": people(1).with_columns(id=pl.lit(10), external_id=pl.lit("ten"))})
    with writing(engine) as c:
        row = {"external_id": "new", "currency": "EUR", "created_at": START}
        assert c.execute(sa.insert(TABLES["users"]), row).inserted_primary_key[0] == 11
        row = {"user_id": 1, "event_id": "new", "event_type": "x", "timestamp": START, "created_at": START}
        assert c.execute(sa.insert(TABLES["behavioral_events"]), row).inserted_primary_key[0] == 201
        c.execute(sa.delete(TABLES["behavioral_events"]))
    load(engine, {"behavioral_events": behaviour(3, 3)["behavioral_events"]})
    with writing(engine) as c:
        assert c.execute(sa.insert(TABLES["behavioral_events"]), {**row, "event_id": "newer"}).inserted_primary_key[0] == 202


def test_of_a_person_who_is_deleted_nothing_stays(engine):
    load(engine, {"users": people(), **behaviour()})
    with writing(engine) as c:
        c.execute(sa.delete(TABLES["users"]).where(TABLES["users"].c.id == 2))
        for name, table in TABLES.items():
            if "user_id" in table.c:
                assert c.scalar(sa.select(sa.func.count()).select_from(table).where(table.c.user_id == 2)) == 0, name
        assert c.scalar(sa.select(sa.func.count()).select_from(TABLES["behavioral_events"])) == 160


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("behavioral_events", {"event_id": ""}, "event_id"),
        ("behavioral_events", {"event_type": ""}, "event_type"),
        ("user_sessions", {"end_time": START - timedelta(days=900)}, "end_time"),
        ("user_sessions", {"actions_count": -1}, "actions_count"),
        ("financial_decisions", {"outcome": "maybe", "outcome_at": START}, "outcome"),
        ("financial_decisions", {"outcome": "success", "outcome_at": None}, "outcome_at"),
        ("financial_decisions", {"amount_minor": 5, "currency": None}, "currency"),
        ("prediction_cache", {"expires_at": START - timedelta(days=900)}, "expires_at"),
        ("model_performance", {"sample_count": -1}, "sample_count"),
        ("training_datasets", {"dataset_type": "mood"}, "dataset_type"),
        ("training_datasets", {"threshold": 0}, "threshold"),
        ("training_datasets", {"data_quality_score": 1.01}, "data_quality_score"),
        ("model_training_events", {"status": "paused"}, "status"),
        ("model_training_events", {"end_time": START - timedelta(days=1)}, "end_time"),
        ("model_training_events", {"training_data_size": -1}, "training_data_size"),
        ("model_versions", {"rollback_count": -1}, "rollback_count"),
        ("data_quality_metrics", {"validity_score": -0.1}, "validity_score"),
        ("data_quality_metrics", {"duplicate_count": -1}, "duplicate_count"),
        ("recommendation_history", {"strategy_propensity": 1.01}, "strategy_propensity"),
        ("recommendation_history", {"urgency": "now"}, "urgency"),
        ("bandit_counts", {"decisions": 2}, "reward_millionths"),
        ("bandit_updates", {"reward_millionths": 1_000_001}, "reward_millionths"),
    ],
)
def test_the_database_refuses_what_cannot_be(engine, name, change, rule):
    """By the check of that name, when it is written and when it is loaded."""
    data = behaviour()
    load(engine, {"users": people(), **data})
    table, key = TABLES[name], next(iter(TABLES[name].primary_key)).name
    with pytest.raises(sa.exc.IntegrityError, match=f"ck_{name}_{rule}"), writing(engine) as c:
        c.execute(sa.update(table).where(table.c[key] == data[name][key][0]).values(change))
    broken = data[name].head(1).with_columns(**{k: pl.lit(v) for k, v in change.items()}, **{key: pl.lit(uid(99) if data[name][key].dtype == pl.String else 9999)})
    with pytest.raises(DatabaseError, match="break the rule"):
        load(engine, {name: broken})


@pytest.mark.parametrize(
    ("name", "again"),
    [("training_datasets", {"id": uid(50)}), ("model_training_events", {"id": uid(50)}), ("model_versions", {"id": uid(50), "version": "9.9.9"}),
     ("model_versions", {"id": uid(50), "is_active": False}), ("prediction_cache", {"id": 5000}), ("user_sessions", {"id": 5000}),
     ("recommendation_history", {"id": 5000}), ("bandit_counts", {}), ("bandit_updates", {})],
)
def test_what_must_never_be_twice_is_not(engine, name, again):
    data = behaviour()
    load(engine, {"users": people(), **data})
    row = data[name].filter(pl.col("is_active")) if "is_active" in data[name].columns else data[name][1] if name == "recommendation_history" else data[name].head(1)
    with pytest.raises(DatabaseError, match="nothing was loaded"):
        load(engine, {name: row.with_columns(**{k: pl.lit(v) for k, v in again.items()})})


def test_many_old_versions_stand_beside_one_active(engine):
    more = pl.DataFrame({"id": [uid(i) for i in range(100, 110)], "model_type": "goal", "version": [f"1.{i}.0" for i in range(10)], "model_path": "p",
                         "is_active": [i == 9 for i in range(10)], "created_at": START})
    load(engine, {"model_versions": more})
    with pytest.raises(DatabaseError, match=r"model_versions.model_type must be unique"):
        load(engine, {"model_versions": more.with_columns(id=pl.lit("x") + pl.col("id").str.slice(1), model_type=pl.lit("spending"), is_active=True)})


# Indexes


QUERIES = {
    "idx_behavioral_events_user_id": "SELECT * FROM behavioral_events WHERE user_id = 7 AND timestamp >= {late} ORDER BY timestamp",
    "idx_behavioral_events_event_type": "SELECT count(*) FROM behavioral_events WHERE event_type = 'purchase' AND timestamp >= {late}",
    "idx_behavioral_events_timestamp": "SELECT * FROM behavioral_events WHERE timestamp >= {late}",
    "idx_behavioral_events_user_type_time": "SELECT max(timestamp) FROM behavioral_events WHERE user_id = 7 AND event_type = 'purchase'",
    "idx_prediction_cache_user_type": "SELECT * FROM prediction_cache WHERE user_id = 7 AND prediction_type = 'spending'",
    "idx_prediction_cache_expires_at": "DELETE FROM prediction_cache WHERE expires_at < {early}",
    "idx_model_performance_name_created": "SELECT * FROM model_performance WHERE model_name = 'm7' ORDER BY created_at DESC LIMIT 1",
    "ix_model_training_events_status_priority_created_at": "SELECT * FROM model_training_events WHERE status = 'pending' ORDER BY priority, created_at LIMIT 1",
    "ix_model_training_events_model_type_start_time": "SELECT * FROM model_training_events WHERE model_type = 't7' ORDER BY start_time DESC LIMIT 5",
    "uq_model_versions_active": "SELECT * FROM model_versions WHERE model_type = 't7' AND is_active",
    "ix_data_quality_metrics_training_dataset_id_assessment_date": f"SELECT * FROM data_quality_metrics WHERE training_dataset_id = '{uid(7)}' ORDER BY assessment_date DESC LIMIT 1",
}


@pytest.fixture(scope="module")
def many():
    """Enough rows that reading them all would be the slower way."""
    data, i = behaviour(20_000, 400), pl.col("i")
    ids = pl.DataFrame({"i": range(2000)}).with_columns(id=i.map_elements(uid, pl.String))
    at = pl.lit(START) + pl.duration(hours=i)
    data["training_datasets"] = ids.select("id", dataset_type=pl.lit("goal"), threshold=50, snapshot_hash=pl.lit("h"), created_at=at, updated_at=at)
    data["model_training_events"] = ids.select("id", model_type=pl.format("t{}", i % 50), training_dataset_id="id", start_time=at, created_at=at, priority=i % 7,
                                               status=pl.when(i % 100 == 0).then(pl.lit("pending")).otherwise(pl.lit("completed")))
    data["model_versions"] = ids.select("id", model_type=pl.format("t{}", i % 50), version=pl.format("1.{}.0", i), model_path=pl.lit("p"), is_active=i < 50, created_at=at)
    data["data_quality_metrics"] = ids.select("id", training_dataset_id="id", assessment_date=at, created_at=at)
    return {"users": people(400), **data}


def test_each_index_is_what_its_question_is_answered_with(engine, many):
    load(engine, many)
    moment = Base.metadata.tables["behavioral_events"].c.timestamp.type
    late, early = (str(sa.literal(START + timedelta(minutes=m), moment).compile(engine, compile_kwargs={"literal_binds": True})) if engine.dialect.name == "sqlite"
                   else f"'{(START + timedelta(minutes=m)).isoformat()}'" for m in (99_000, 3000))
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with writing(engine) as c:
        c.exec_driver_sql("ANALYZE")
        for index, query in QUERIES.items():
            plan = "\n".join(str(row[-1]) for row in c.exec_driver_sql(explain + query.format(late=late, early=early)))
            assert re.search(rf"\b{index}\b", plan), (index, plan)
            assert "TEMP B-TREE" not in plan, (index, "sorts", plan)
            c.exec_driver_sql(f"DROP INDEX {index}")
            worse = "\n".join(str(row[-1]) for row in c.exec_driver_sql(f"{explain} {query.format(late=late, early=early)}"))  # one blank more: a plan is kept by its text
            assert worse != plan


# The page


def test_snapshots_hold_histories_only():
    assert set(SNAPSHOT_TABLES) == set(TABLES) - {"user_segments", *MADE}


def test_every_column_is_explained_and_nothing_else_is():
    for name, table in TABLES.items():
        lead, said = meanings(name)
        assert lead.endswith("."), name
        assert list(said) == [c.name for c in table.columns], name
        assert all(said.values()), name


def test_the_page_stands_alone_and_shows_everything():
    text = schema_page()
    assert text == schema_page()
    assert not re.search(r"(src|href)=.(?!#|data:)", text), "a link to somewhere else"
    assert "<script" not in text
    for name, table in TABLES.items():
        part = text[text.index(f'id="table-{name}"') :].split('class="entity"')[0]
        for column in table.columns:
            assert f"<code>{column.name}</code>" in part
        for index in table.indexes:
            assert f"<code>{index.name}</code>" in part
        for rule in table.constraints:
            if isinstance(rule, sa.CheckConstraint):
                assert html(rule.sqltext) in part


def test_the_picture_is_xml_in_which_no_two_tables_touch_and_each_line_ends_at_a_table():
    picture = diagram()
    root = ElementTree.fromstring(picture[picture.index("<svg") : picture.index("</svg>") + 6])
    space = "{http://www.w3.org/2000/svg}"
    width, height = (float(root.get(k)) for k in ("width", "height"))
    bodies = [[float(r.get(k)) for k in ("x", "y", "width", "height")] for r in root.iter(f"{space}rect") if r.get("class") == "body"]
    assert len(bodies) == len(TABLES)
    for i, (x, y, w, h) in enumerate(bodies):
        assert 0 <= x <= width - w
        assert 0 <= y <= height - h
        assert not any(x < a + c and a < x + w and y < b + d and b < y + h for a, b, c, d in bodies[:i])
    sides = {round(x, 0) for x, _, w, _ in bodies for x in (x, x + w)}
    lines = [p.get("d") for p in root.iter(f"{space}path") if p.get("class") == "link"]
    assert len(lines) == sum(len(t.foreign_keys) for t in TABLES.values())
    for d in lines:
        begin, end = float(re.match(r"M([\d.]+)", d)[1]), float(re.search(r"H([\d.]+)M", d)[1])
        assert {round(begin, 0), round(end, 0)} <= sides
