"""The retrain road: what it leaves behind when it ends well, badly, twice, or not at all."""

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT

from fincoach.data.database import connect
from fincoach.learn import retrain as road
from fincoach.learn.notebooks import run_notebook
from fincoach.learn.retrain import (
    Busy,
    NothingToLearn,
    ParameterError,
    RetrainError,
    locked,
    retrain,
    retrain_all,
)
from fincoach.serving.artifacts import champion, listed, open_version, publish, rollback, versions
from fincoach.settings import Settings, load_settings

PEOPLE, DAYS = 150, 240
FILES = {
    "segmentation.json", "people.npz", "user_segments.csv", "segment_profiles.json", "feature_config.json", "feature_engineering_pipeline.pkl",
    "user_segmentation_model.pkl", "model_metadata.json", "model_configs/segmentation.json", "validation_reports/segmentation.html",
    "validation_reports/segmentation.json",
}


def settings_in(home: Path, **given) -> Settings:
    """Settings for a small population below `home`."""
    limits = {"people": PEOPLE, "days": DAYS, "min_recovery": 0.3, "min_stability": 0.3}
    return load_settings(work=home / "var", artifacts=home / "artifacts", reports=home / "reports", **limits | given)


def quiet(text: str):
    """Tell nobody."""


def sums(settings: Settings, version: str) -> dict[str, str]:
    """SHA-256 of every file of a version, the manifest included."""
    folder = settings.artifacts / "segmentation" / version
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished retrain through the notebook: settings and result."""
    settings = settings_in(tmp_path_factory.mktemp("trained"))
    return settings, retrain("population", settings, say=quiet)


def test_the_notebook_leaves_everything_behind(trained):
    settings, result = trained
    assert set(open_version(settings.artifacts, "segmentation", result.version).files) == FILES
    assert {p.name for p in result.report.parent.iterdir()} == {"report.html", "report.json", "executed.ipynb"}
    page = result.report.read_text()
    assert result.verdict in page
    assert not any(word in page for word in ("<script", 'src="http', "@import"))
    assert json.loads(result.report.with_name("report.json").read_text())["version"] == result.version
    assert sum(s["people"] for s in open_version(settings.artifacts, "segmentation", result.version).manifest["segments"]) == result.people
    assert len(result.learned) == 5
    assert (result.decision, result.champion) == ("promoted", result.version)


def test_the_same_input_gives_the_same_bytes_with_or_without_the_notebook(trained, tmp_path):
    settings, result = trained
    again = settings_in(tmp_path)
    other = retrain("population", again, notebook=False, say=quiet)
    assert other.version == result.version
    assert sums(again, other.version) == sums(settings, result.version)


def test_twice_is_once(trained):
    settings, _ = trained
    before = {p: p.stat().st_mtime_ns for p in settings.artifacts.rglob("*") if p.is_file() and p.name != ".retrain.lock"}
    again = retrain("population", settings, say=quiet)
    assert again.decision == "unchanged"
    assert "already trained, champion unchanged" in again.summary()
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_seed_is_another_version_and_meets_the_champion(trained):
    settings, _ = trained
    before = champion(settings.artifacts, "segmentation")
    other = retrain("population", settings, seed=8, notebook=False, say=quiet)
    manifest = open_version(settings.artifacts, "segmentation", other.version).manifest
    assert manifest["parent"] == before
    assert "No worse than the champion" in manifest["metrics"]
    if other.decision == "promoted":  # and what is rolled back stays rolled back
        assert rollback(settings.artifacts, "segmentation") == before
        assert retrain("population", settings, seed=8, notebook=False, say=quiet).champion == before


@pytest.mark.parametrize(("parameters", "said"), [
    ({"sed": 3}, "no parameter 'sed'"), ({"seed": "3"}, "must be int"), ({"seed": True}, "must be int"),
    ({"min_stability": float("nan")}, "must be float"), ({"as_of": 20250630}, "must be str")])
def test_wrong_parameters_are_refused_before_anything_runs(parameters, said, tmp_path):
    with pytest.raises(ParameterError, match=said) as e:
        run_notebook("segmentation", parameters, tmp_path / "out.ipynb")
    assert "segments: int" in str(e.value)
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("call", [{"as_of": "June"}, {"model": "forecast"}])
def test_wrong_arguments_are_refused(call, trained):
    with pytest.raises(ParameterError):
        retrain("population", trained[0], say=quiet, **call)


def test_a_failing_notebook_is_reported_and_promotes_nothing(trained):
    settings, _ = trained
    before = champion(settings.artifacts, "segmentation")
    few = settings_in(settings.work.parent, min_people=100_000)
    with pytest.raises(RetrainError, match="training needs 100000") as e:
        retrain("population", few, say=quiet)
    assert e.value.report.parent.name.startswith("failed-")
    assert "NotEnoughData" in e.value.report.read_text()
    assert champion(settings.artifacts, "segmentation") == before


def test_data_without_structure_are_held_back(tmp_path):
    """Everybody's amounts and days are drawn from one urn: there are people, but no kinds of people."""
    settings = settings_in(tmp_path)
    found = road.prepare("population", settings, say=quiet)
    found.engine.dispose()
    with connect(found.database_url).begin() as c:
        rows = pl.read_database("select id, user_id, amount_minor, category_id, occurred_at from transactions order by id", c)
        urn = np.random.default_rng(0).permutation(len(rows))
        c.exec_driver_sql("delete from goal_contributions")
        c.exec_driver_sql("delete from financial_goals")
        c.exec_driver_sql("update user_profiles set opening_balance_minor = null")
        c.execute(sa.text("update transactions set amount_minor = :a, category_id = :c, occurred_at = :o where id = :i"), [
            {"a": a, "c": k, "o": o, "i": i} for (a, k, o), i in zip(
                rows.select("amount_minor", "category_id", "occurred_at").rows(), rows["id"][urn.tolist()].to_list(), strict=True)])
    result = retrain(found.database_url, settings_in(tmp_path, min_stability=0.8), notebook=False, say=quiet)
    assert (result.decision, result.champion) == ("held", None)
    assert "held back" in result.summary()


def test_without_logged_advice_there_is_nothing_to_learn_and_nothing_fails(trained, tmp_path, monkeypatch):
    settings, _ = trained
    file = tmp_path / "silent.db"
    with closing(sqlite3.connect(settings.work / "fincoach.db")) as old, closing(sqlite3.connect(file)) as new:
        old.backup(new)
        new.execute("delete from recommendation_feedback")
        new.execute("delete from recommendation_history")
        new.commit()
    own = settings_in(tmp_path)
    with pytest.raises(NothingToLearn, match="no advice has been logged"):
        retrain(f"sqlite:///{file}", own, model="recommendation", say=quiet)
    monkeypatch.setattr(road, "MODELS", {"recommendation": road.MODELS["recommendation"]})
    run = retrain_all(f"sqlite:///{file}", own, say=quiet)
    assert (list(run.skipped), run.results, run.failed) == (["recommendation"], {}, {})
    assert "Recommendation: skipped. No advice has been logged" in run.summary()
    assert not (own.reports / "recommendation").exists()


def test_too_few_decisions_are_told_with_a_report(trained):
    """The notebook fails with the sentence that says how many there are; nothing is published or promoted."""
    settings = settings_in(trained[0].work.parent, min_decisions=1_000_000)
    with pytest.raises(RetrainError, match="decisions") as e:
        retrain("population", settings, model="recommendation", say=quiet)
    assert e.value.report.parent.name.startswith("failed-")
    assert (listed(settings.artifacts, "recommendation"), champion(settings.artifacts, "recommendation")) == ([], None)


def test_two_at_once(trained):
    with locked(trained[0].artifacts), pytest.raises(Busy, match=f"process {os.getpid()}"):
        retrain("population", trained[0], say=quiet)
    assert retrain("population", trained[0], say=quiet).decision == "unchanged"


def test_somebodys_own_database_is_never_replaced(tmp_path):
    settings = settings_in(tmp_path)
    file = settings.work / "fincoach.db"
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as c:
        c.execute("create table mine (x int)")
    with pytest.raises(RetrainError, match="data of your own"):
        retrain("population", settings, say=quiet)
    with closing(sqlite3.connect(file)) as c:
        assert c.execute("select count(*) from mine").fetchone() == (0,)


# Retrains in processes of their own. Training itself writes nothing; all but two runs get its result ready-made, so that
# many can be killed where it matters: while the database, the snapshot, the version, the report and the champion are written.
# What they import takes longer than they do: one process imports, and forks for each run, before any library started threads that compute.
RUNS = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from test_retrain import Ready, settings_in
from fincoach.learn import retrain as road
from fincoach.segments import training
settings = settings_in(Path({home!r}))


def run(seed, real):
    if not real:
        training.train_segmentation = lambda snapshot, recipe, truth, parent, *rest: Ready(settings, {version!r}, road.version_name(snapshot.hash, recipe), parent)
    road.retrain("population", settings, seed=seed, notebook=False, say=lambda text: print(text, flush=True))


for line in sys.stdin:  # a run; the next line ends it
    seed, real = line.split()
    threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert sum(name not in ("jemalloc_bg_thd", "polars-ooc-clea") for name in threads) == 1, "a fork would lose " + ", ".join(threads)
    if not (child := os.fork()):
        try:
            run(int(seed), real == "real")
        finally:
            print("ended", flush=True)
            os._exit(0)
    sys.stdin.readline()
    os.kill(child, signal.SIGKILL)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Ready:
    """A trained version made of the files of another one."""

    def __init__(self, settings: Settings, like: str, version: str, parent: str | None):
        found = open_version(settings.artifacts, "segmentation", like)
        self.version, self.files = version, {name: found.read(name) for name in found.files}
        keys = ("format", "model", "version", "files", "digest")
        self.manifest = {k: v for k, v in found.manifest.items() if k not in keys} | {"parent": parent}

    def publish(self, artifacts):
        publish(artifacts, "segmentation", self.version, self.files, self.manifest)


# Where a run is when it is killed, and for how long (seconds) that lasts.
MOMENTS = (("reading population", 1.5), ("fincoach.db", 0.6), ("snapshot", 0.1), ("training", 0.3), ("publishing", 0.08), ("publishing", 0.02),
           ("deciding", 0.03), ("deciding", 0.01))


def killed(runs: subprocess.Popen, seed: int, real: bool, step: str, wait: float) -> bool:
    """Start a run, kill it `wait` seconds after it told `step`; whether it was still running."""
    print(seed, "real" if real else "ready", file=runs.stdin, flush=True)
    next(line for line in runs.stdout if line.startswith((step, "ended")))
    time.sleep(wait)
    print("kill", file=runs.stdin, flush=True)
    return int(next(line for line in runs.stdout if line.startswith("status")).split()[1]) == -signal.SIGKILL


def test_killed_at_any_moment_the_champion_still_serves(trained):
    """FINCOACH_KILLS says how many times (default 8)."""
    kills, chance = int(os.environ.get("FINCOACH_KILLS", "8")), random.Random(5)
    settings, result = trained
    script = RUNS.format(root=str(ROOT), tests=str(ROOT / "tests"), home=str(settings.work.parent), version=result.version)
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as runs:
        died = 0
        for attempt in range(kills):
            step, lasts = MOMENTS[attempt % len(MOMENTS)]
            if step == "reading population":  # so that there is a database to write
                (settings.work / "fincoach.db").unlink(missing_ok=True)
            before = champion(settings.artifacts, "segmentation")
            died += killed(runs, 100 + attempt, attempt % 8 == 3 and attempt < 16, step, chance.random() * lasts)
            now = champion(settings.artifacts, "segmentation")
            assert open_version(settings.artifacts, "segmentation", now).read("segmentation.json")
            assert versions(settings.artifacts, "segmentation") == listed(settings.artifacts, "segmentation"), "a half-written version is listed"
            assert now == before or open_version(settings.artifacts, "segmentation", now).manifest["parent"] == before
    ended = retrain("population", settings, notebook=False, say=quiet)
    assert (ended.version, ended.decision) == (result.version, "unchanged")
    assert not [p for p in settings.reports.glob("segmentation/.*") if p.name != ".retrain.lock"], "leftovers of killed runs"
    print(f"{died} of {kills} runs died")
    assert died >= kills / 2
