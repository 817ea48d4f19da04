"""A small folder that was really retrained: who said no is in nothing that was learned from; who is erased is in no table, file, cache or log; what learned from them is told, and goes."""

import json
import re
import secrets
import shutil
import time
from dataclasses import replace
from datetime import UTC, date, datetime

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from fincoach import cli
from fincoach.api.access import Limits, make_token
from fincoach.api.app import close_parts, create_app, parts_of
from fincoach.api.asking import Clock, Pool
from fincoach.data.database import connect
from fincoach.data.rights import Places, marks, reach, request_erasure, resume_erasures, set_consent
from fincoach.data.tables import TABLES
from fincoach.learn.retrain import prepare, retrain
from fincoach.segments.model import UserSegmentationModel
from fincoach.serving.artifacts import champion, listed, open_version, promote, publish
from fincoach.serving.forgetting import forget_person, marked_versions
from fincoach.settings import load_settings

NOON, WIDE = datetime(2024, 9, 1, 12, tzinfo=UTC), Limits(caller=(1e6, 1e6), address=(1e6, 1e6))
GONE, NOISY = (7, "person-00007"), (3, 11, 19)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Settings of a folder in which a segmentation was trained on all but three of sixty people; what was said, and what came of it."""
    home, said = tmp_path_factory.mktemp("forgotten"), []
    settings = load_settings(work=home / "work", artifacts=home / "artifacts", reports=home / "reports", database_url=f"sqlite:///{home / 'work'}/fincoach.db",
                             people=60, days=240, min_recovery=-1.0, min_stability=0.0)
    made = prepare("population", settings, say=said.append)
    for user in NOISY:
        set_consent(made.engine, user, "learning", False, NOON)
    made.engine.dispose()
    with pytest.MonkeyPatch.context() as patch:  # how good the groups are is not what is tested here: few resamples
        for method, few in (("find_optimal_clusters", (None, range(4, 7), 2)), ("validate_clusters", (2,)), ("assign_segment_labels", (3,))):
            patch.setattr(getattr(UserSegmentationModel, method), "__defaults__", few)
        result = retrain("population", settings, notebook=False, say=said.append)
        promote(settings.artifacts, "segmentation", result.version)
        yield settings, said, result


@pytest.fixture
def trained(once, tmp_path):
    """A copy of that folder, which a test may change."""
    settings, said, result = once
    shutil.copytree(settings.artifacts.parent, tmp_path / "home")
    here = {name: tmp_path / "home" / name for name in ("work", "artifacts", "reports")}
    return replace(settings, **here, database_url=f"sqlite:///{here['work']}/fincoach.db"), said, result


def bytes_of(settings) -> dict[str, bytes]:
    """Every file of a folder: name -> content, Parquet and NumPy files unpacked."""
    found = {}
    for place in (settings.work, settings.artifacts, settings.reports):
        for path in (p for p in place.rglob("*") if p.is_file()):
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content += str(pl.read_parquet(path).rows()).encode()
            found[str(path.relative_to(place.parent))] = content
    return found


def test_who_said_no_is_left_out_of_all_that_was_learned_and_the_report_says_so(trained):
    settings, said, result = trained
    assert "3 of 60 people did not allow learning and are left out" in said
    report = json.loads((settings.reports / "segmentation" / result.version / "report.json").read_text())
    assert "3 of 60 people did not allow learning and are left out" in json.dumps(report)
    version = open_version(settings.artifacts, "segmentation", result.version)
    rows = pl.read_csv(version.read("user_segments.csv"))["user_id"].to_list()
    with np.load(version.path / "people.npz") as people:
        assert not {*people["user_id"].tolist(), *rows} & {*NOISY}
    assert 50 <= len(rows) <= 57
    (snapshot,) = [p.parent for p in settings.work.rglob("users.parquet") if json.loads((p.parent / "manifest.json").read_text()).get("left_out")]
    for file in snapshot.glob("*.parquet"):
        frame = pl.read_parquet(file)
        if key := {"users": "id"}.get(file.stem, "user_id" if "user_id" in frame.columns else ""):
            assert not set(frame[key]) & {*NOISY}, file.stem


def test_nothing_is_left_of_an_erased_person_in_any_table_file_cache_or_log(trained, capfd, caplog):
    """Asked, tracked, advised, exported; then erased over HTTP while the process goes on. The export before had every row."""
    settings, _, result = trained
    user, name = GONE
    environ = {"FINCOACH_JWT_SECRET": secrets.token_hex(32)}
    places = Places(settings.work, settings.reports, settings.artifacts)
    parts = parts_of(settings.database_url, settings.artifacts, Clock.of_day(date(2024, 9, 1)), environ, WIDE, Pool(budget=120), places)
    parts.access.reads.patience = parts.access.notes.aside.patience = 60
    (settings.reports / "ahead.html").write_text(f"<h1>{name}</h1>")
    head = {"authorization": f"Bearer {make_token(parts.access.keys, name, time.time())}"}
    with TestClient(create_app(parts, WIDE), headers=head) as client:
        client.put("/me/consent", json={"tracking": True})
        for path in ("user-segment", "spending-prediction", "recommendation", "card"):
            assert client.get(f"/coaching/{path}").status_code == 200
        event = {"event_id": "0f8fad5b-d9cb-469f-a165-70867728950e", "event_type": "page_view", "event_data": {"page": "forecast"}}
        assert client.post("/coaching/behavioral-event", json=event).json()["accepted"] == 1
        exported = client.get("/me/export").json()["tables"]
        for table, condition in reach().items():
            with parts.engine.connect() as c:
                assert c.scalar(sa.select(sa.func.count()).select_from(TABLES[table]).where(condition), {"person": user}) == len(exported[table]), table
        assert parts.cache.counts["entries"] >= 2
        assert client.request("DELETE", f"/me?confirm={name}").status_code == 202
        parts.erasures._pool.submit(lambda: None).result(timeout=120)
        assert client.get("/coaching/user-segment").status_code == 403
        time.sleep(1.1)  # within a second every process knows
        operator = {"authorization": f"Bearer {make_token(parts.access.keys, 'night-shift', time.time(), 'admin')}"}
        status = client.get("/admin/status", headers=operator).json()
        metrics = client.get("/metrics").text
        memory = repr([parts.zones, parts.access.known.by_token, parts.cache._memory.items()])
        with parts.engine.connect() as c:
            for table, condition in reach().items():
                assert not c.execute(sa.select(TABLES[table]).where(condition), {"person": user}).first(), table
    said = re.compile(rb"(?<![\w-])" + name.encode() + rb"(?![\w-])")
    assert [f for f, content in bytes_of(settings).items() if said.search(content)] == []
    assert name not in "".join(capfd.readouterr()) + caplog.text + metrics + memory
    new = champion(settings.artifacts, "segmentation")
    assert new == f"{result.version}-e1"
    assert status["learned_from_erased"] == [{"model_name": "segmentation", "model_version": new, "role": "champion", "trained_on": "yes", "erasures": 1}]
    assert "run `fincoach retrain`" in status["to_do"][0]
    assert "fincoach_erased_but_served 1.0" in metrics
    assert cli._check_erased(settings).status == "problem"


def test_the_next_retrain_ends_what_learned_from_them(trained):
    settings, _, first = trained
    engine = connect(settings.database_url)
    request_erasure(engine, GONE[0], NOON)
    resume_erasures(engine, Places(settings.work, settings.reports, settings.artifacts), NOON, forget_person)
    engine.dispose()
    marked = marked_versions(settings.artifacts)
    assert [m.role for m in marked] == ["champion"]
    second = retrain(settings.database_url, settings, notebook=False, say=lambda text: None)
    assert second.version not in (first.version, marked[0].version)
    promote(settings.artifacts, "segmentation", second.version)
    assert [m.role for m in marked_versions(settings.artifacts)] == [""], "it can be gone back to, and no longer serves"
    assert cli._check_erased(settings).status == "ok"
    seen = open_version(settings.artifacts, "segmentation", second.version)
    publish(settings.artifacts, "segmentation", "2030-01-01-next", {f: seen.read(f) for f in seen.files}, {"as_of": "2030-01-01"})
    promote(settings.artifacts, "segmentation", "2030-01-01-next")
    retrain(settings.database_url, settings, notebook=False, say=lambda text: None)
    assert (marks(settings.artifacts), marked_versions(settings.artifacts)) == ({}, [])
    assert listed(settings.artifacts, "segmentation") == sorted([second.version, "2030-01-01-next"])


def test_what_people_said_outlives_a_source_that_is_read_anew(trained):
    """The made-up population of another length fills the database again; who said no is found by name."""
    settings = replace(trained[0], days=200)
    made, said = prepare("population", settings, say=lambda text: None), []
    made.engine.dispose()
    assert (made.snapshot.left_out, made.snapshot.rows("users")) == (3, 57)
    assert prepare("population", settings, say=said.append).snapshot.hash == made.snapshot.hash
    assert "3 of 60 people did not allow learning and are left out" in said


def test_without_places_an_erasure_searches_the_folders_of_the_settings(tmp_path, monkeypatch):
    """Work, reports and artifacts, whoever puts the parts together."""
    monkeypatch.setenv("FINCOACH_WORK", str(tmp_path / "w"))
    monkeypatch.setenv("FINCOACH_REPORTS", str(tmp_path / "r"))
    parts = parts_of(f"sqlite:///{tmp_path}/fincoach.db", tmp_path / "a", environ={"FINCOACH_JWT_SECRET": secrets.token_hex(32)})
    try:
        assert parts.erasures.places == Places(tmp_path / "w", tmp_path / "r", tmp_path / "a")
        assert parts.access.notes.mark == tmp_path / "w" / "audit.mark"
    finally:
        close_parts(parts)
