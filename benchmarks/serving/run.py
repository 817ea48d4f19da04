"""How long a backend waits for the segmentation service. One command; see README.md.

    python benchmarks/serving/run.py                   # 500 people over two years, about two minutes
    python benchmarks/serving/run.py --people 100 --days 365
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def percentiles(seconds: list[float]) -> dict:
    """Median and 95th percentile in milliseconds, and how many were taken."""
    ordered = sorted(seconds)
    at = lambda q: round(1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)], 3)  # noqa: E731
    return {"p50_ms": at(0.5), "p95_ms": at(0.95), "n": len(ordered)}


def timed(call, arguments) -> dict:
    """`call` on each of `arguments`, one after the other."""
    taken = []
    for argument in arguments:
        begin = time.perf_counter()
        call(argument)
        taken.append(time.perf_counter() - begin)
    return percentiles(taken)


def serve(url: str, artifacts: str, as_of: str) -> None:
    """The service in a process of its own: import, first answer, then everything else; prints what was measured."""
    begin = time.perf_counter()
    from fincoach.serving import UserSegmentationService

    imported = time.perf_counter() - begin
    day = date.fromisoformat(as_of)
    begin = time.perf_counter()
    service = UserSegmentationService(url, artifacts)
    service.classify_user_segment(1, day)
    first = time.perf_counter() - begin
    assert service.status.method == "model", service.status
    import sqlalchemy as sa

    with service.engine.connect() as connection:
        ids = list(connection.scalars(sa.text("SELECT id FROM users ORDER BY id")))
    asked = (ids * 5)[:500]
    found = {
        "load champion": timed(lambda _: service.load_segmentation_model(), range(50)),
        "classify from the database": timed(lambda i: service.classify_user_segment(i, day), asked),
        "classify and store": timed(lambda i: service.update_user_segment(i, day), asked),
        "peers": timed(lambda i: service.get_segment_peers(i, day), asked[:100]),
    }
    begin = time.perf_counter()
    service.reclassify_all_users(day)
    everybody = time.perf_counter() - begin
    heavy = [m for m in ("torch", "sklearn", "pandas", "matplotlib") if m in sys.modules]  # Numba asks an installed SciPy its version
    assert not heavy, heavy
    print(json.dumps({
        "import_s": imported, "first_answer_s": first, "ways": found, "everybody_per_s": len(ids) / everybody,
        "peak_mib": peak_mib(),
    }))  # fmt: skip


def peak_mib() -> float:
    """The most memory this process held. (`ru_maxrss` would count the parent's, which a child inherits.)"""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def unpickle(pickle: str, features: str) -> None:
    """What serving the researcher's pickle would cost: import, load, and one prediction at a time without any database."""
    import joblib

    begin = time.perf_counter()
    model = joblib.load(pickle)
    loaded = time.perf_counter() - begin
    import polars as pl

    frame = pl.read_parquet(features)
    one = timed(lambda i: model.predict(frame[i]), [i % len(frame) for i in range(200)])
    print(json.dumps({"load_s": loaded, "ways": {"predict, features given": one}, "peak_mib": peak_mib()}))


def fresh(function: str, *words: str, times: int = 3) -> dict:
    """The measurement of `function` in fresh processes: the run with the shortest start."""
    runs = []
    for _ in range(times):
        command = [sys.executable, __file__, "--only", function, *words]
        runs.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout))
    return min(runs, key=lambda r: r.get("import_s", r.get("load_s")))


def main(people: int, days: int) -> None:
    """Make the data and the model, measure, print a table and write results.json."""
    from fincoach.features.store import batch_features
    from fincoach.learn.retrain import prepare, retrain
    from fincoach.serving.artifacts import promote
    from fincoach.settings import load_settings

    with tempfile.TemporaryDirectory() as folder:
        f = Path(folder)
        settings = replace(load_settings(), work=f / "work", artifacts=f / "artifacts", reports=f / "reports", people=people, days=days,
                           database_url=f"sqlite:///{f / 'work' / 'fincoach.db'}")  # fmt: skip
        result = retrain("population", settings, notebook=False)
        promote(settings.artifacts, "segmentation", result.version, "to be measured, whatever its verdict")
        found = prepare("population", settings)
        batch_features(found.snapshot, result.as_of).write_parquet(f / "features.parquet")
        rows = found.snapshot.rows("transactions")
        ours = fresh("serve", result.database_url, str(settings.artifacts), str(result.as_of))
        pickled = fresh("unpickle", str(result.artifact / "user_segmentation_model.pkl"), str(f / "features.parquet"))
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    Path(__file__).with_name("results.json").write_text(json.dumps(
        {"machine": machine, "people": people, "transactions": rows, "service": ours, "pickle": pickled}, indent=1) + "\n")  # fmt: skip
    print(f"{people:,} people, {rows:,} transactions; {machine}")
    for name, run in (("service", ours), ("the researcher's pickle", pickled)):
        start = ", ".join(f"{k.removesuffix('_s').replace('_', ' ')} {v:.2f} s" for k, v in run.items() if k.endswith("_s") and "per" not in k)
        print(f"{name}: {start}, peak {run['peak_mib']:.0f} MiB")
        for way, took in run["ways"].items():
            print(f"  {way:28} p50 {took['p50_ms']:8.2f} ms   p95 {took['p95_ms']:8.2f} ms")
    print(f"  everybody in one pass: {ours['everybody_per_s']:,.0f} people a second, stored")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--only"]:
        {"serve": serve, "unpickle": unpickle}[sys.argv[2]](*sys.argv[3:])
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--people", type=int, default=500)
        parser.add_argument("--days", type=int, default=730)
        main(**vars(parser.parse_args()))
