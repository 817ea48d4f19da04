"""Snapshots: one hash for the same rows, whatever happens on the way; nothing that opens when it is not whole."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fincoach.data import export, reader
from fincoach.data.database import DatabaseError, connect, downgrade, load, upgrade, writing
from fincoach.data.export import DataExporter, Snapshot, SnapshotError, export_snapshot, order, write_snapshot
from fincoach.data.tables import CATEGORIES, TABLES, Base

START = datetime(2025, 3, 1, 8, 30, tzinfo=UTC)
PEOPLE, ROWS = 20, 3000


def frames(rows=ROWS):
    """A bit of every table, with nulls, empty texts, other alphabets, negative and huge amounts; texts that begin late."""
    i = pl.col("id")
    ids = lambda n: pl.DataFrame({"id": range(1, n + 1)})  # noqa: E731
    moment = pl.lit(START) + pl.duration(minutes=i * 7919 % 400_009)
    euro = pl.lit("EUR").alias("currency")
    return {
        "users": ids(PEOPLE).with_columns(euro, external_id=pl.format("p{}", i), created_at=pl.lit(START), timezone=pl.lit("Europe/Berlin")),
        "user_profiles": pl.DataFrame({"user_id": range(1, 11), "birth_year": [1980, None] * 5, "opening_balance_minor": [None, -5] * 5}),
        "categories": pl.DataFrame({"id": [100], "name": ["molkerei"], "kind": ["essential"]}),
        "products": ids(3).with_columns(external_id=pl.format("x{}", i), name=pl.lit("Brot"), brand=pl.Series([None, "", "Ü"])),
        "transactions": ids(rows).with_columns(
            euro, user_id=1 + i * 31 % PEOPLE, occurred_at=moment, amount_minor=(i - 1500) * 3_000_000_007, category_id=pl.when(i % 9 == 0).then(100).otherwise(8),
            merchant=pl.when(i > rows // 2).then(pl.format("Café {}", i % 7)), account=pl.when(i % 2 == 0).then(pl.lit(""))),
        "user_purchases": ids(500).with_columns(euro, user_id=1 + i % PEOPLE, product_id=1 + i % 3, purchased_at=moment, quantity=i % 4, amount_minor=i),
        "financial_goals": ids(5).with_columns(euro, user_id=i, name=pl.lit("Reise"), target_minor=i * 1000, created_at=pl.lit(START), due_at=pl.when(i > 2).then(moment)),
        "goal_contributions": ids(9).with_columns(goal_id=1 + i % 5, contributed_at=moment, amount_minor=-i),
        "recommendation_history": ids(40).with_columns(user_id=1 + i % PEOPLE, decided_at=moment, action=pl.lit("save"), propensity=1 / i, strategy=pl.lit("s"), model_version=pl.lit("v"), category_id=pl.when(i > 9).then(8)),
        "recommendation_feedback": ids(20).with_columns(recommendation_id=1 + i // 2, received_at=moment, response=pl.lit("ignored"), helpful=pl.when(i > 5).then(i % 2 == 0)),
    }  # fmt: skip


def made(url, data):
    engine = connect(url)
    upgrade(engine)
    load(engine, data)
    return engine


@pytest.fixture(scope="module")
def data():
    return frames()


@pytest.fixture(scope="module")
def engine(tmp_path_factory, data):
    engine = made(f"sqlite:///{tmp_path_factory.mktemp('db')}/a file #1?.db".replace("#", "%23").replace("?", "%3F"), data)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory, engine):
    return export_snapshot(engine, tmp_path_factory.mktemp("snapshots"))


@pytest.fixture
def fast(monkeypatch):
    """Even a small file is read by a process of its own, in small batches."""
    monkeypatch.setattr(export, "FAST_FROM", 0)


# The same rows, the same hash


def test_the_snapshot_holds_every_row(snapshot, data):
    for name, frame in data.items():
        got = snapshot.frame(name)
        want = frame.with_columns(pl.selectors.integer().cast(pl.Int64)).sort(order(name)) if name != "categories" else None
        if want is None:
            assert len(got) == len(CATEGORIES) + 1
        else:
            assert got.select(want.columns).equals(want), name
    assert snapshot.frame("users").schema["created_at"] == pl.Datetime("us", "UTC")


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 5000))
def test_order_and_batch_size_leave_no_trace(tmp_path_factory, data, snapshot, seed, batch):
    shuffled = {n: f.sample(fraction=1, shuffle=True, seed=seed) for n, f in data.items()}
    engine = made(f"sqlite:///{tmp_path_factory.mktemp('db')}/b.db", shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "BATCH", batch)
        assert export_snapshot(engine, tmp_path_factory.mktemp("s")).hash == snapshot.hash
    assert write_snapshot(shuffled, tmp_path_factory.mktemp("s")).hash == snapshot.hash
    engine.dispose()


def test_the_fast_way_gives_the_same(engine, snapshot, tmp_path, fast):
    assert export_snapshot(engine, tmp_path).manifest == snapshot.manifest


def test_frames_give_the_same_files(data, snapshot, tmp_path):
    assert write_snapshot(data, tmp_path).manifest == snapshot.manifest


def test_memory_gives_the_same(data, snapshot, tmp_path):
    assert export_snapshot(made("sqlite://", data), tmp_path).hash == snapshot.hash


@pytest.mark.skipif("FINCOACH_TEST_POSTGRES" not in os.environ, reason="FINCOACH_TEST_POSTGRES names no PostgreSQL database")
def test_postgresql_gives_the_same(data, snapshot, tmp_path):
    engine = connect(os.environ["FINCOACH_TEST_POSTGRES"])
    with writing(engine) as c:
        c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*Base.metadata.tables, 'fincoach_version'])} CASCADE")
    upgrade(engine)
    load(engine, data)
    assert export_snapshot(engine, tmp_path).hash == snapshot.hash
    downgrade(engine, "base")
    engine.dispose()


def test_a_snapshot_loaded_again_is_the_same_snapshot(snapshot, tmp_path):
    again = made(f"sqlite:///{tmp_path}/b.db", {name: snapshot.frame(name) for name in export.SNAPSHOT_TABLES})
    assert export_snapshot(again, tmp_path).hash == snapshot.hash
    again.dispose()


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.with_columns(amount_minor=pl.when(pl.col("id") == 7).then(pl.col("amount_minor") + 1).otherwise("amount_minor")),
        lambda f: f.with_columns(occurred_at=pl.when(pl.col("id") == 7).then(pl.col("occurred_at") + timedelta(microseconds=1)).otherwise("occurred_at")),
        lambda f: f.with_columns(merchant=pl.when(pl.col("id") == 7).then(pl.lit("")).otherwise("merchant")),
        lambda f: f[:-1],
    ],
    ids=["a cent", "a microsecond", "an empty text for none", "a row"],
)
def test_any_other_row_is_another_hash(data, snapshot, tmp_path, change):
    assert write_snapshot({**data, "transactions": change(data["transactions"])}, tmp_path).hash != snapshot.hash


def test_what_models_say_is_not_data(data, snapshot, tmp_path):
    """Classifying people must not change the data that the next model is made from."""
    engine = made(f"sqlite:///{tmp_path}/b.db", data)
    said = {"segment_id": 0, "segment_name": "x", "confidence": 0.5, "features": "{}", "method": "model", "model_version": "v",
            "as_of": START, "created_at": START, "updated_at": START}
    with writing(engine) as c:
        c.execute(sa.insert(TABLES["user_segments"]), {"user_id": 1, **said})
    assert export_snapshot(engine, tmp_path).hash == snapshot.hash
    profile = pl.read_parquet(DataExporter(engine).export_user_profiles(tmp_path / "people.parquet"))
    assert profile["segment_name"].to_list() == ["x"] + [None] * (PEOPLE - 1)
    engine.dispose()


def test_no_date_is_applied(snapshot, data):
    """Rows of any future are in it: the date that a model looks back from is applied by who reads, and nowhere before."""
    later = data["transactions"].with_columns(id=pl.col("id") + 10_000, occurred_at=pl.lit(datetime(2999, 1, 1, tzinfo=UTC)))
    both = {**data, "transactions": pl.concat([data["transactions"], later])}
    got = write_snapshot(both, snapshot.path.parent / "later")
    assert got.rows("transactions") == 2 * ROWS
    assert got.scan("transactions").filter(pl.col("occurred_at") < datetime(2998, 1, 1, tzinfo=UTC)).collect().equals(snapshot.frame("transactions"))


# One moment, whoever writes


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_all_tables_are_of_one_moment(tmp_path, monkeypatch, way):
    """While a writer adds a person and a transaction together, over and over, no snapshot has one without the other."""
    monkeypatch.setattr(export, "FAST_FROM", 0 if way == "fast" else 2**60)
    engine = made(f"sqlite:///{tmp_path}/a.db", frames())
    stop = threading.Event()

    def add():
        other, n = connect(f"sqlite:///{tmp_path}/a.db"), 10_000
        while not stop.is_set():
            n += 1
            user = pl.DataFrame({"id": [n], "external_id": [f"n{n}"], "currency": "EUR", "created_at": START})
            row = pl.DataFrame({"id": [n], "user_id": [n], "occurred_at": START, "amount_minor": 1, "currency": "EUR", "category_id": 8})
            load(other, {"users": user, "transactions": row})
        other.dispose()

    writer = threading.Thread(target=add)
    writer.start()
    try:
        found = [export_snapshot(engine, tmp_path / "s") for _ in range(3)]
    finally:
        stop.set()
        writer.join()
    engine.dispose()
    assert len({s.hash for s in found}) > 1, "nothing was written meanwhile, so nothing was tested"
    for s in found:
        new = pl.col("id") > 10_000
        assert s.frame("users").filter(new)["id"].to_list() == s.frame("transactions").filter(new)["user_id"].sort().to_list()


# Whole, or not there


def test_an_altered_cut_or_missing_file_is_named(snapshot, tmp_path):
    import shutil

    def broken(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(snapshot.path, copy)
        assert Snapshot.open(copy).hash == snapshot.hash
        change(copy)
        with pytest.raises(SnapshotError) as said:
            Snapshot.open(copy)
        return str(said.value)

    def flip(file):
        at = bytearray(file.read_bytes())
        at[len(at) // 2] ^= 1
        file.write_bytes(at)

    for name in export.SNAPSHOT_TABLES:
        assert f"{name}.parquet was altered" in broken(lambda p, n=name: flip(p / f"{n}.parquet"))
        assert f"{name}.parquet was cut" in broken(lambda p, n=name: os.truncate(p / f"{n}.parquet", 100))
        assert f"{name}.parquet is missing" in broken(lambda p, n=name: (p / f"{n}.parquet").unlink())
    manifest = json.loads((snapshot.path / "manifest.json").read_text())
    assert "manifest.json was altered" in broken(lambda p: os.truncate(p / "manifest.json", 300))
    rows = json.loads(json.dumps(manifest))
    rows["tables"]["users"]["rows"] += 1
    assert "manifest.json was altered" in broken(lambda p: (p / "manifest.json").write_text(json.dumps(rows)))
    assert "has format 2" in broken(lambda p: (p / "manifest.json").write_text(json.dumps({**manifest, "format": 2})))
    assert "it has no manifest.json" in broken(lambda p: (p / "manifest.json").unlink())
    with pytest.raises(SnapshotError, match="has no table 'user'"):
        snapshot.scan("user")


def test_a_damaged_snapshot_is_replaced_and_a_whole_one_kept(engine, snapshot, tmp_path):
    first = export_snapshot(engine, tmp_path)
    file = first.path / "users.parquet"
    before = file.stat().st_ino
    assert export_snapshot(engine, tmp_path) == first
    assert file.stat().st_ino == before, "a whole snapshot was written again"
    os.truncate(file, 10)
    assert export_snapshot(engine, tmp_path) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.hash]


EXPORT = "import sys; from fincoach.data import export; from fincoach.data.database import connect\nexport.FAST_FROM = int(sys.argv[3])\nprint('ready', flush=True)\nexport.export_snapshot(connect(sys.argv[1]), sys.argv[2])\nprint('done', flush=True)"


@pytest.mark.parametrize("fast_from", [0, 2**60], ids=["fast", "plain"])
def test_a_killed_export_leaves_nothing_that_opens(tmp_path, fast_from):
    """Killed at many moments from the first to the last; then one that is let be gives the snapshot and clears up."""
    engine = made(f"sqlite:///{tmp_path}/a.db", frames(30_000))
    folder = tmp_path / "s"
    start = lambda: subprocess.Popen([sys.executable, "-c", EXPORT, str(engine.url), folder, str(fast_from)], cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: E731
    with start() as whole:
        whole.stdout.readline()
        began = time.perf_counter()
        assert whole.stdout.readline() == "done\n"
        took = time.perf_counter() - began
    (good,) = folder.iterdir()
    expected = Snapshot.open(good).hash
    killed = 0
    for k in range(5):
        for old in folder.glob("[0-9a-f]*"):
            export.shutil.rmtree(old)
        with start() as process:
            process.stdout.readline()
            time.sleep(took * (k + 0.5) / 5)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        for left in folder.iterdir():
            if left.name.startswith(".staging-"):
                with pytest.raises(SnapshotError):
                    Snapshot.open(left)
            else:
                assert Snapshot.open(left).hash == expected
    assert killed >= 2, "the export was over before it was killed: nothing was tested"
    assert export_snapshot(engine, folder).hash == expected
    assert [p.name for p in folder.iterdir()] == [expected], "what the killed ones left is cleared"
    engine.dispose()


def test_two_at_once_give_one_snapshot(engine, snapshot, tmp_path):
    command = [sys.executable, "-c", EXPORT, str(engine.url), tmp_path, "0"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == [snapshot.hash]


def test_a_reading_process_that_dies_is_an_error(engine, tmp_path, monkeypatch, fast):
    """A stream that stops looks like one that ended: the export must not take it for the whole."""
    script = (Path(reader.__file__).read_text()).replace("stream.write_batch(batch)", "stream.write_batch(batch)\n                        out.flush(); import os; os.kill(os.getpid(), 9)")
    assert "os.kill" in script
    (tmp_path / "data").mkdir()
    (tmp_path / "data/reader.py").write_text(script)
    monkeypatch.setattr("fincoach.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(DatabaseError, match=r"\.db"):
        export_snapshot(engine, tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []


def test_a_table_that_vanished_is_named(data, tmp_path, fast):
    engine = made(f"sqlite:///{tmp_path}/a.db", data)
    with writing(engine) as c:
        c.exec_driver_sql("DROP TABLE recommendation_feedback")
    with pytest.raises(DatabaseError, match="recommendation_feedback"):
        export_snapshot(engine, tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []
    engine.dispose()


@pytest.mark.parametrize("bad", ["reference", "unique"])
def test_frames_that_no_database_would_take_are_refused(data, tmp_path, bad):
    rows = data["transactions"].with_columns(**({"user_id": pl.lit(777)} if bad == "reference" else {"id": pl.lit(1)}))
    with pytest.raises(DatabaseError, match=r"users.id 777|transactions.id must be unique"):
        write_snapshot({**data, "transactions": rows}, tmp_path / "s")
    assert not (tmp_path / "s").exists()


# Memory and what is shown


PEAK = """
import resource, sys
from fincoach.data import export
from fincoach.data.database import connect
export.FAST_FROM = int(sys.argv[3])
export.export_snapshot(connect(sys.argv[1]), sys.argv[2])
print(sum(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024)
"""


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory):
    """The URLs of a database of 100,000 transactions, and of one of 500,000."""
    home = tmp_path_factory.mktemp("sizes")
    for rows in (100_000, 500_000):
        made(f"sqlite:///{home}/{rows}.db", frames(rows)).dispose()
    return [f"sqlite:///{home}/{rows}.db" for rows in (100_000, 500_000)]


@pytest.mark.parametrize("fast_from", [0, 2**60], ids=["fast", "plain"])
def test_memory_does_not_grow_with_the_rows(two_sizes, tmp_path, fast_from):
    """400,000 rows more would take 45 MiB as columns, and many times that as objects; as a stream they take the buffers, once."""
    peak = []
    for url in two_sizes:
        command = [sys.executable, "-c", PEAK, url, tmp_path / "s", str(fast_from)]
        peak.append(float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    # The reading process keeps pages of the file in a cache of a fixed size, which holds all of these small files.
    cache = Path(two_sizes[1].removeprefix("sqlite:///")).stat().st_size / 2**20 if fast_from == 0 else 0
    assert peak[1] - peak[0] < 40 + cache, peak


def test_progress_is_shown_only_when_asked_for_and_not_on_stdout(engine, tmp_path, capsys):
    export_snapshot(engine, tmp_path)
    assert capsys.readouterr() == ("", "")
    export_snapshot(engine, tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "exporting" in err
    assert "100%" in err


# For analysts


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_the_joins_are_those_an_analyst_would_make(engine, data, tmp_path, monkeypatch, way):
    monkeypatch.setattr(export, "FAST_FROM", 0 if way == "fast" else 2**60)
    exporter = DataExporter(engine)
    got = pl.read_parquet(exporter.export_transaction_data(tmp_path / "t.parquet"))
    assert len(got) == ROWS
    assert got.filter(pl.col("category_id") == 100).select("category", "kind").unique().rows() == [("molkerei", "essential")]
    assert (got["user_external_id"] == pl.Series(got["user_id"]).cast(pl.String).map_elements("p{}".format, pl.String)).all()
    bought = pl.read_parquet(exporter.export_purchase_data(tmp_path / "p.parquet"))
    want = data["user_purchases"].join(data["products"], left_on="product_id", right_on="id", maintain_order="left").sort("user_id", "purchased_at", "id")
    assert bought["brand"].to_list() == want["brand"].to_list()
    assert bought["product_external_id"].to_list() == want["external_id"].to_list()
    advice = pl.read_parquet(exporter.export_recommendation_data(tmp_path / "r.parquet"))
    answers = data["recommendation_feedback"].group_by("recommendation_id").len()
    assert len(advice) == 20 + 40 - len(answers), "a row an answer, and one where there is none"
    assert advice["feedback_id"].drop_nulls().sort().to_list() == list(range(1, 21))
    assert advice.filter(pl.col("feedback_id").is_null())["response"].null_count() == 40 - len(answers)
    people = pl.read_parquet(exporter.export_user_profiles(tmp_path / "u.parquet"))
    assert people["birth_year"].to_list() == [1980, None] * 5 + [None] * 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.parquet", "r.parquet", "t.parquet", "u.parquet"]


def test_sqlite_reads_in_order_without_sorting(engine):
    """The order of a snapshot is that of an index or a key, so that ten million rows need no temporary file."""
    with engine.connect() as c:
        for name in export.SNAPSHOT_TABLES:
            plan = c.exec_driver_sql(f"EXPLAIN QUERY PLAN SELECT * FROM {name} ORDER BY {', '.join(order(name))}").all()
            assert not any("TEMP B-TREE" in step[-1] for step in plan), (name, plan)
