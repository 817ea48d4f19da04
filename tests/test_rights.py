"""Consent, export, erasing and anonymising: nothing is left out, nothing is left behind, nobody else is touched, and a kill in the middle changes nothing."""

import fcntl
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT

from fincoach.data import audit, export, rights
from fincoach.data.database import DatabaseError, connect, counts, load, upgrade
from fincoach.data.export import DataExporter, Snapshot, export_snapshot
from fincoach.data.rights import (
    Places,
    anonymise_person,
    carry_out,
    consents,
    erase_person,
    export_person,
    marks,
    reach,
    request_erasure,
    resume_erasures,
    set_consent,
)
from fincoach.data.schema import create_api_tables, restore
from fincoach.data.tables import SNAPSHOT_TABLES, TABLES, Moment
from fincoach.serving import artifacts, forgetting
from fincoach.serving.bandit import Answer, StrategyUpdater
from fincoach.serving.forgetting import forget_person

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ANNA, BERT = 1, 2
NAME = "anna-quite-alone"


def filled(engine, user_id, name):
    """Gives the database a person who has a row in every table that can hold one; made from the schema, so that a new table gets one too."""
    plain = {int: 3, float: 0.5, bool: True, str: name[:3]}
    special = {"outcome": "ok", "response": "accepted", "method": "rules", "purpose": "tracking", "status": "pending", "alias": f"{user_id:016x}",
               "external_id": name, "currency": "EUR", "timezone": "Europe/Berlin", "expires_at": NOON.replace(year=2027), "end_time": NOON.replace(year=2027), "event_id": f"{name}-1",
               "merchant": f"shop of {name}", "comment": f"says {name}", "id": user_id, "revision": 9, "category_id": 1, "urgency": "low"}
    with engine.begin() as c:
        c.execute(sa.insert(TABLES["products"]).values(id=user_id, external_id=f"product {user_id}", name="thing"))
        for table, condition in reach().items():
            t, row = TABLES[table], {}
            if table == "user_revisions" and c.execute(sa.select(t).where(condition), {"person": user_id}).first():
                continue
            for column in t.c:
                kind = column.type.python_type
                row[column.name] = special.get(column.name, NOON if isinstance(column.type, Moment) else plain.get(kind))
                if column.name == "user_id" or (column.foreign_keys and column.name != "category_id"):
                    row[column.name] = user_id
            for column in ("outcome", "outcome_at") if table == "financial_decisions" else ():
                row[column] = {"outcome": "success", "outcome_at": NOON}[column]
            c.execute(sa.insert(t).values(row))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request, tmp_path_factory):
    """A function that gives an empty, migrated database: a new file, or the server's one schema without its rows."""
    made = []

    def new():
        if request.param == "sqlite":
            made.append(connect(f"sqlite:///{tmp_path_factory.mktemp('work')}/var/fincoach.db", wait=5))
            upgrade(made[-1])
            return made[-1]
        if not made:
            made.append(connect(url.update_query_dict({"options": "-csearch_path=rights"}).render_as_string(hide_password=False)))
            upgrade(made[0])
        with made[0].begin() as c:
            for name in reversed(TABLES):
                c.execute(sa.delete(TABLES[name]).where(TABLES[name].c.name == "" if name == "categories" else sa.true()))
        return made[0]

    if request.param == "postgresql":
        if "FINCOACH_TEST_POSTGRES" not in os.environ:
            pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
        url = sa.make_url(os.environ["FINCOACH_TEST_POSTGRES"])
        admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as c:
            c.exec_driver_sql("DROP SCHEMA IF EXISTS rights CASCADE")
            c.exec_driver_sql("CREATE SCHEMA rights")
    yield new
    for engine in made:
        engine.dispose()
    if request.param == "postgresql":
        with admin.connect() as c:
            c.exec_driver_sql("DROP SCHEMA rights CASCADE")
        admin.dispose()


@pytest.fixture
def engine(server):
    made = server()
    filled(made, ANNA, NAME)
    filled(made, BERT, "bert-next-door")
    return made


@pytest.fixture
def places(tmp_path):
    found = Places(tmp_path / "var", tmp_path / "reports", tmp_path / "artifacts")
    for folder in found:
        folder.mkdir()
    return found


def rows_of(engine, user_id):
    return json.loads("".join(export_person(engine, user_id)))["tables"]


def there(engine, user_id):
    """The tables that have a row about a person."""
    with engine.connect() as c:
        return {n for n, condition in reach().items() if c.execute(sa.select(TABLES[n]).where(condition), {"person": user_id}).first()}


# --- the schema is walked ------------------------------------------------------------------------------------------


def test_every_table_that_names_a_person_is_reached():
    """Each column that is called like a person leads to `users` by a key or is taken as one; nothing else is reached."""
    named = {n for n, t in TABLES.items() if any(c.name.endswith("user_id") for c in t.c)} - {"erasures"}
    assert named | {"users", "goal_contributions", "recommendation_feedback", "bandit_updates"} == set(reach())


def test_a_table_that_is_added_tomorrow_is_reached():
    """By a key to a person, by one to a row of a person's row, and by name alone; a table about nobody is not."""
    meta = sa.MetaData()
    users = sa.Table("users", meta, sa.Column("id", sa.Integer, primary_key=True))
    one = sa.Table("one", meta, sa.Column("id", sa.Integer, primary_key=True), sa.Column("who", sa.ForeignKey(users.c.id)))
    two = sa.Table("two", meta, sa.Column("id", sa.Integer, primary_key=True), sa.Column("one", sa.ForeignKey(one.c.id)))
    sa.Table("three", meta, sa.Column("id", sa.Integer, primary_key=True), sa.Column("two", sa.ForeignKey(two.c.id)))
    sa.Table("loose", meta, sa.Column("user_id", sa.Integer, primary_key=True))
    sa.Table("weather", meta, sa.Column("id", sa.Integer, primary_key=True))
    found = reach({t.name: t for t in meta.sorted_tables})
    assert set(found) == {"users", "one", "two", "three", "loose"}
    assert str(found["three"]).count("SELECT") == 2


# --- consent and export --------------------------------------------------------------------------------------------


def test_what_is_allowed_is_what_was_said_and_else_the_default(engine):
    """Tracking is off and learning on until a person says otherwise; each word is one row, and a note in the log."""
    with engine.begin() as c:
        c.execute(sa.delete(TABLES["user_consents"]))
    assert consents(engine, ANNA) == rights.PURPOSES == {"tracking": False, "learning": True}
    set_consent(engine, ANNA, "learning", False, NOON)
    set_consent(engine, ANNA, "learning", False, NOON)
    assert consents(engine, ANNA) == {"tracking": False, "learning": False}
    assert consents(engine, BERT) == rights.PURPOSES
    set_consent(engine, ANNA, "learning", True, NOON)
    assert consents(engine, ANNA) == {"tracking": False, "learning": True}
    with pytest.raises(DatabaseError, match="no purpose 'selling'"):
        set_consent(engine, ANNA, "selling", True, NOON)
    with pytest.raises(DatabaseError, match="nobody with the id 77"):
        set_consent(engine, 77, "learning", True, NOON)
    assert audit.verify(engine).rows == 3


def test_who_said_no_to_learning_is_in_nothing_that_training_reads(engine, places, monkeypatch):
    """In no table of a snapshot, in no file for analysts, whichever way the rows are read, and not counted by the bandit; a no to tracking, or nothing said, leaves nobody out."""
    whole = export_snapshot(engine, places.work)
    assert whole.left_out == 0
    set_consent(engine, BERT, "tracking", False, NOON)
    assert export_snapshot(engine, places.work) == whole
    set_consent(engine, ANNA, "learning", False, NOON)
    without = export_snapshot(engine, places.work)
    assert (without.left_out, Snapshot.open(without.path).left_out) == (1, 1)
    everybodys = {"categories", "products"}
    assert {n: without.rows(n) for n in SNAPSHOT_TABLES if n not in everybodys} == {n: 1 for n in SNAPSHOT_TABLES if n not in everybodys}
    exporter = DataExporter(engine)
    exports = [getattr(exporter, f"export_{n}")(places.work / f"{n}.parquet") for n in ("transaction_data", "purchase_data", "recommendation_data", "user_profiles")]
    files = [*without.path.glob("*.parquet"), *exports]
    assert all(NAME not in str(pl.read_parquet(f).rows()) for f in files)
    assert all(len(pl.read_parquet(f)) == 1 for f in exports)
    with engine.begin() as c:
        decision = c.scalar(sa.select(TABLES["recommendation_history"].c.id).where(TABLES["recommendation_history"].c.user_id == ANNA))
    assert StrategyUpdater(engine).record([Answer(decision, 1.0, NOON)]) == ["not allowed"]
    monkeypatch.setattr(export, "FAST_FROM", 0)
    assert export_snapshot(engine, places.work / "fast").hash == without.hash
    set_consent(engine, ANNA, "learning", True, NOON)
    assert export_snapshot(engine, places.work) == whole


def test_an_export_has_every_row_of_the_person_and_none_of_another(engine):
    found = rows_of(engine, ANNA)
    assert set(found) == set(reach())
    assert all(found.values()), [n for n, rows in found.items() if not rows]
    assert NAME in json.dumps(found)
    assert "bert" not in json.dumps(found)
    with engine.connect() as c:
        for name, rows in found.items():
            there = c.execute(sa.select(TABLES[name]).where(reach()[name]), {"person": ANNA}).mappings().all()
            assert json.loads(json.dumps([dict(r) for r in there], default=datetime.isoformat)) == rows


def test_an_export_of_nobody_says_so_before_it_begins(engine):
    with pytest.raises(DatabaseError, match="nobody with the id 77"):
        next(export_person(engine, 77))


# --- erasing -------------------------------------------------------------------------------------------------------


def everywhere(places, engine):
    """All bytes of all files, and for a server what a dump of all tables would hold."""
    files = b"".join(p.read_bytes() for folder in places for p in sorted(folder.rglob("*")) if p.is_file())
    if engine.dialect.name == "sqlite":
        return files + b"".join(p.read_bytes() for p in sorted(os.scandir(os.path.dirname(engine.url.database)), key=lambda p: p.name) for p in [rights.Path(p.path)] if p.is_file())
    with engine.connect() as c:
        return files + repr([c.execute(sa.select(t)).all() for t in TABLES.values()]).encode()


def traces(places, engine):
    """Files that hold Anna: snapshots, rows that a rollback kept, a report, a log, findings, versions of models."""
    old = export_snapshot(engine, places.work / "snapshots")
    kept = create_api_tables(engine, "rollback", places.work / "kept").kept
    upgrade(engine)
    (places.reports / "goal").mkdir()
    (places.reports / "goal" / "report.html").write_text(f"<td>{NAME}</td><td>{NAME}2</td>")
    (places.work / "api.log").write_text(f'{{"person": "{NAME}"}}\n')
    pl.DataFrame({"user_id": [ANNA, BERT], "x": [1, 2]}).write_parquet(places.work / "features.parquet")
    for model, snapshot, day in (("goal", old.hash, "2026-06-30"), ("health", "f" * 64, "2026-06-30"), ("spending", "f" * 64, "2025-01-01")):
        version = places.artifacts / model / f"{day}-aa"
        version.mkdir(parents=True)
        (version / "manifest.json").write_text(json.dumps({"snapshot": snapshot, "as_of": day}))
    return kept


def test_nothing_is_left_of_a_person_and_nobody_else_is_touched(engine, places):
    kept = traces(places, engine)
    before, log, named = rows_of(engine, BERT), NAME.encode(), there(engine, ANNA)
    assert len(named) >= 15
    assert everywhere(places, engine).count(log) > 3
    erased = erase_person(engine, ANNA, places, NOON)
    assert set(erased.tables) - {"user_revisions", "audit_names"} == named - {"user_revisions", "audit_names"}
    assert there(engine, ANNA) == set()
    with engine.connect() as c:
        wish = c.execute(sa.select(TABLES["erasures"])).one()
    assert (wish.erased_user_id, wish.completed_at) == (None, NOON)
    assert NAME not in wish.report
    after = rows_of(engine, BERT)
    assert {n: r for n, r in after.items() if n != "user_revisions"} == {n: r for n, r in before.items() if n != "user_revisions"}
    assert not re.search(rb"(?<![\w-])" + log + rb"(?![\w-])", everywhere(places, engine))
    assert (places.reports / "goal" / "report.html").read_text() == f"<td>(erased)</td><td>{NAME}2</td>"
    assert (erased.snapshots, erased.models, erased.name_sought) == (1, 2, True)
    assert {m: [x["trained_on"] for x in v.popitem()[1]] for m, v in marks(places.artifacts).items()} == {"goal": ["yes"], "health": ["perhaps"]}
    assert pl.read_parquet(places.work / "features.parquet").rows() == [(BERT, 2)]
    restore(engine, kept)  # what a rollback kept still fits together
    assert not audit.verify(engine).broken


def test_an_erasure_leaves_an_audit_row_that_names_nobody(engine, places):
    erase_person(engine, ANNA, places, NOON)
    rows = audit.rows_after(engine, 0)
    assert [r["action"] for r in rows] == ["erase asked for", "erase done"]
    assert [r["actor_name"] for r in rows] == [None, None]
    assert rows[1]["details"]["tables"] >= 10


def test_erasing_twice_and_erasing_nobody(engine, places):
    number = request_erasure(engine, ANNA, NOON)
    assert request_erasure(engine, ANNA, NOON) == number
    assert carry_out(engine, number, places, NOON) is not None
    assert carry_out(engine, number, places, NOON) is None
    assert resume_erasures(engine, places, NOON) == []
    with pytest.raises(DatabaseError, match="nobody with the id 1"):
        erase_person(engine, ANNA, places, NOON)


def test_a_new_person_with_the_number_of_an_erased_one_inherits_nothing(engine, places):
    set_consent(engine, ANNA, "learning", False, NOON)
    erase_person(engine, ANNA, places, NOON)
    load(engine, {"users": pl.DataFrame({"id": [ANNA], "external_id": ["carl"], "currency": "EUR", "created_at": NOON})})
    assert consents(engine, ANNA) == rights.PURPOSES
    found = rows_of(engine, ANNA)
    assert {n: len(r) for n, r in found.items() if r} in ({"users": 1}, {"users": 1, "user_revisions": 1})


def test_sealed_artifacts_are_never_altered(engine, places):
    """Also where they lie below the folders that are searched."""
    inside = Places(places.work, places.work, places.work / "artifacts")
    manifest = inside.artifacts / "goal" / "1" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"snapshot": "f" * 64, "as_of": "2026-06-30", "note": NAME}))
    before = manifest.read_bytes()
    assert erase_person(engine, ANNA, inside, NOON).models == 1
    assert manifest.read_bytes() == before


def test_a_common_name_is_not_looked_for_and_that_is_said(server, places):
    engine = server()
    filled(engine, ANNA, "17")
    (places.reports / "report.html").write_text("17 of 20 people")
    assert not erase_person(engine, ANNA, places, NOON).name_sought
    assert (places.reports / "report.html").read_text() == "17 of 20 people"


def test_a_snapshot_that_is_being_written_is_waited_for(engine, places):
    """A writer began before the erasure, and its snapshot gets its name in the middle of it."""
    made = export_snapshot(engine, places.work / "aside")
    stage = places.work / "snapshots" / ".staging-1"
    stage.mkdir(parents=True)
    handle = os.open(stage, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)

    def finish():
        time.sleep(0.4)
        made.path.rename(places.work / "snapshots" / made.hash)
        os.close(handle)

    writer = threading.Thread(target=finish)
    writer.start()
    assert erase_person(engine, ANNA, places, NOON).snapshots == 1
    writer.join()
    assert not (places.work / "snapshots" / made.hash).exists()


# --- versions of models that hold a row ----------------------------------------------------------------------------


def segmentation(root, version="2026-06-30-ab", people=(ANNA, BERT, 11, 21)):
    """A version as training writes it, as far as people are in it."""
    rows = "".join(f"{p},0,Conservative Savers,0.5,,false\n" for p in people)
    z, out = np.arange(len(people) * 23, dtype=np.float16).reshape(-1, 23), io.BytesIO()
    np.savez(out, user_id=np.array(people, np.int64), cluster=np.zeros(len(people), np.int16), z=z)
    files = {"people.npz": out.getvalue(), "user_segments.csv": f"user_id,segment_id,segment_name,confidence,second_name,between\n{rows}".encode(),
             "segmentation.json": b"{}", "user_segmentation_model.pkl": b"everybody"}
    artifacts.publish(root, "segmentation", version, files, {"snapshot": "f" * 64, "as_of": "2026-06-30"})
    return version


def holders(root, user_id):
    """The versions that open and hold a row about a person."""
    return [v for v in artifacts.versions(root, "segmentation") if forgetting._holds(artifacts.open_version(root, "segmentation", v), user_id)]


def quickly(root, user_id):
    """`forget_person`, where nobody serves."""
    return forget_person(root, user_id, grace=0)


def test_no_version_keeps_a_row_and_the_champion_goes_on(engine, places):
    """The champion, an older version and a canary; marks go over to those that take their places."""
    root = places.artifacts
    for version in ("2026-05-31-aa", "2026-06-30-ab", "2026-07-31-ac"):
        segmentation(root, version)
    artifacts.promote(root, "segmentation", "2026-05-31-aa")
    artifacts.promote(root, "segmentation", "2026-06-30-ab")
    artifacts.canary(root, "segmentation", "2026-07-31-ac", 0.5)
    before = artifacts.open_version(root, "segmentation", "2026-06-30-ab")
    done = erase_person(engine, ANNA, places, NOON, quickly)
    assert done.versions == 3
    assert holders(root, ANNA) == []
    assert artifacts.versions(root, "segmentation") == ["2026-05-31-aa-e1", "2026-06-30-ab-e1", "2026-07-31-ac-e1"]
    assert artifacts.champion(root, "segmentation") == "2026-06-30-ab-e1"
    assert artifacts.serving(root)["segmentation"].canary is None
    after = artifacts.open_version(root, "segmentation", "2026-06-30-ab-e1")
    assert after.manifest["snapshot"] == before.manifest["snapshot"]
    assert "user_segmentation_model.pkl" not in after.files
    with np.load(io.BytesIO(after.read("people.npz"))) as people:
        assert people["user_id"].tolist() == [BERT, 11, 21]
        assert people["z"][0, 0] == 23
    assert after.read("user_segments.csv").count(b"\n") == 4
    erase_person(engine, BERT, places, NOON, quickly)
    found = marks(root)["segmentation"]
    assert sorted(found) == artifacts.versions(root, "segmentation")
    assert [len(its) for its in found.values()] == [2, 2, 2]


def test_a_process_that_dies_while_a_version_is_replaced_leaves_one_that_serves(engine, places, monkeypatch):
    """After publishing, after promoting, and before the old version is gone: a second call finishes."""
    root = places.artifacts
    artifacts.promote(root, "segmentation", segmentation(root))
    for step in ("promote", "end_canary"):
        with monkeypatch.context() as m:
            m.setattr(forgetting, step, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                quickly(root, ANNA)
        artifacts.open_version(root, "segmentation", artifacts.champion(root, "segmentation"))
    quickly(root, ANNA)
    assert holders(root, ANNA) == []
    assert artifacts.champion(root, "segmentation") == "2026-06-30-ab-e1"
    assert forget_person(root, ANNA) == {}


def test_a_damaged_version_is_not_made_to_look_sound(places):
    root = places.artifacts
    segmentation(root)
    file = root / "segmentation" / "2026-06-30-ab" / "people.npz"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-9])
    assert forget_person(root, ANNA) == {}
    assert artifacts.listed(root, "segmentation") == ["2026-06-30-ab"]


# --- anonymising ---------------------------------------------------------------------------------------------------


def test_an_unknown_person_keeps_the_rows_and_nothing_that_tells(engine, places):
    before, old = counts(engine), rows_of(engine, ANNA)
    done = anonymise_person(engine, ANNA, places, NOON)
    after = counts(engine)
    with engine.connect() as c:
        number = c.scalar(sa.select(sa.func.max(TABLES["users"].c.id)))
        assert c.scalar(sa.select(sa.func.count()).select_from(TABLES["users"]).where(TABLES["users"].c.id == ANNA)) == 0
    new = rows_of(engine, number)
    kept = [n for n in ("users", "user_profiles", "financial_goals", "goal_contributions", "recommendation_history", "recommendation_feedback", "behavioral_events") if new[n]]
    assert len(kept) == 7
    assert all(before[n] == after[n] for n in kept)
    assert not any(new[n] for n in ("audit_names", "user_consents", "prediction_cache", "user_segments", "user_purchases"))
    text = json.dumps(new)
    assert NAME not in text
    assert new["financial_goals"][0]["id"] == new["goal_contributions"][0]["goal_id"] != old["financial_goals"][0]["id"]
    assert done.kind == "anonymise"
    with engine.begin() as c:  # the next row gets a number of its own
        c.execute(sa.insert(TABLES["users"]).values(external_id="carl", currency="EUR", created_at=NOON))


# --- killed on the way ---------------------------------------------------------------------------------------------

KILLED = """
import os, shutil, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from fincoach.data import audit, rights
from fincoach.data.database import connect

where, after = sys.argv[3].split(":")
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
owner = {"record": audit, "rmtree": shutil}.get(where, rights)
real = getattr(owner, where)
seen = [0]
def once(*args, **kw):
    if where == "record" and seen.append(0) or where == "record" and len(seen) < 3: return real(*args, **kw)
    if after == "before": kill()
    made = real(*args, **kw)
    kill()
setattr(owner, where, once)
places = rights.Places(*(Path(sys.argv[2]) / n for n in ("var", "reports", "artifacts")))
rights.erase_person(connect(sys.argv[1]), 1, places, datetime(2026, 3, 1, 12, tzinfo=UTC))
"""


@pytest.mark.parametrize("point", ["_delete_rows:after", "_rows_gone:after", "_mark:after", "rmtree:after", "record:after"])
def test_killed_at_any_step_it_ends_as_if_it_had_not_been(point, places, tmp_path):
    """A real process is killed; the next start finishes. The person is never half there."""
    engine = connect(f"sqlite:///{places.work}/fincoach.db", wait=5)
    upgrade(engine)
    filled(engine, ANNA, NAME)
    filled(engine, BERT, "bert-next-door")
    traces(places, engine)
    before = there(engine, ANNA)
    process = subprocess.run([sys.executable, "-c", KILLED, str(engine.url), str(tmp_path), point], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -9, process.stderr
    with engine.connect() as c:
        assert c.scalar(sa.select(sa.func.count()).select_from(TABLES["erasures"]).where(TABLES["erasures"].c.completed_at.is_(None))) == 1
    assert there(engine, ANNA) - {"audit_names"} in (before - {"audit_names"}, set())
    (done,) = resume_erasures(engine, places, NOON)
    assert len(done.tables) >= 10
    assert not re.search(rb"(?<![\w-])" + NAME.encode() + rb"(?![\w-])", everywhere(places, engine))
    assert set(marks(places.artifacts)) == {"goal", "health"}
    assert not audit.verify(engine).broken
    assert rows_of(engine, BERT)["transactions"]
    engine.dispose()


# --- from a shell --------------------------------------------------------------------------------------------------


def test_from_a_shell(capsys, monkeypatch, tmp_path):
    """What a person asks for, as an operator does it; and the log that tells of it, cut at its end."""
    from fincoach.api.access import keys_from, read_token
    from fincoach.cli import main

    home = rights.Path(os.environ["FINCOACH_HOME"])
    engine = connect(f"sqlite:///{home}/var/fincoach.db")
    upgrade(engine)
    filled(engine, ANNA, NAME)

    def said(*words, code=0):
        assert main([*words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    assert said("rights", "consent", NAME, "--allow", "learning", "--forbid", "tracking")["learning"] is True
    file = tmp_path / "anna.json"
    assert said("rights", "export", NAME, "--to", str(file))["to"] == str(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert set(json.loads(file.read_text())["tables"]) == set(reach())
    assert "needs a person" in said("rights", "erase", code=2)["error"]
    assert "cannot be undone" in said("rights", "erase", NAME, code=2)["error"]
    assert said("rights", "erase", NAME, "--yes")["tables"]["transactions"] == 1
    assert "nobody is called" in said("rights", "export", NAME, code=1)["error"]
    assert said("rights", "resume") == {"ok": True, "command": "rights", "done": []}
    head = said("rights", "audit")["head"]
    audit.keep_mark(home / "var" / "audit.mark", audit.Mark(**head))
    with engine.begin() as c:
        c.execute(sa.delete(TABLES["audit_log"]).where(TABLES["audit_log"].c.id == head["id"]))
    assert "were removed" in said("rights", "audit", code=1)["broken"]
    engine.dispose()

    assert "FINCOACH_JWT_SECRET" in said("token", NAME, code=1)["error"]
    monkeypatch.setenv("FINCOACH_JWT_SECRET", "x" * 40)
    token = said("token", NAME, "--role", "admin", "--hours", "2")["token"]
    assert read_token(keys_from(os.environ), token, time.time() + 7000)[:2] == (NAME, "admin")
