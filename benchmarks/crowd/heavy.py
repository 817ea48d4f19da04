"""A person with a million rows asks everything, and somebody else asks meanwhile. One command; see README.md.

    python benchmarks/crowd/heavy.py                     # about two minutes, on rules
    python benchmarks/crowd/heavy.py --artifacts artifacts/enhanced
    python benchmarks/crowd/heavy.py --rows 100000       # a look
"""

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from served import Line, Served, filled, percentiles, ready, served, token

HERE = Path(__file__).parent
QUESTIONS = [f"/coaching/{p}" for p in ("user-segment", "segment-insights", "segment-comparison", "spending-prediction", "financial-forecast", "behavioral-insights")] + [
    f"/financial/{p}" for p in ("spending-patterns", "category-preferences", "financial-personality", "peer-comparison")]


def many_rows(url: str, rows: int) -> None:
    """Somebody called `heavy` gets so many rows in three years, at three hundred shops."""
    from fincoach.data.database import connect, load

    rng, engine, end = np.random.default_rng(1), connect(url), int(datetime(2024, 9, 1, tzinfo=UTC).timestamp() * 1e6)
    with engine.connect() as c:
        categories, after = c.exec_driver_sql("SELECT id FROM categories WHERE kind <> 'income'").scalars().all(), c.exec_driver_sql("SELECT max(id) FROM transactions").scalar()
    moments = np.sort(rng.integers(end - 1095 * 86_400_000_000, end, rows))
    person = {"id": [900], "external_id": ["heavy"], "timezone": ["Europe/Berlin"], "currency": ["EUR"], "created_at": [datetime(2021, 1, 1, tzinfo=UTC)]}
    load(engine, {"users": pl.DataFrame(person), "transactions": pl.DataFrame({
        "id": np.arange(rows) + after + 1, "user_id": np.full(rows, 900), "occurred_at": pl.Series(moments).cast(pl.Datetime("us", "UTC")), "amount_minor": -rng.integers(100, 10_000, rows),
        "currency": ["EUR"] * rows, "category_id": rng.choice(categories, rows), "merchant": [f"shop {m}" for m in rng.integers(0, 300, rows).tolist()]})})
    engine.dispose()


def one_by_one(to: Served, who: str) -> dict:
    """Each question alone: seconds of a processor and until the answer was there, statuses on the way, and memory."""
    found = {}
    for path in QUESTIONS:
        line, said, begun, cpu = to.line("127.0.6.3"), Counter(), time.perf_counter(), to.seconds()
        while (status := line(path, who)[0]) == 503:
            said[status] += 1
            time.sleep(0.2)
        found[path] = {"processor_s": round(to.seconds() - cpu, 2), "answered_after_s": round(time.perf_counter() - begun, 2), "503_before": said[503], "status": status, "memory_mb": to.memory()}
    return found


def meanwhile(other: Line, mine: str, busy) -> dict:
    """How long somebody else waits for kept answers while `busy()`."""
    taken, said = [], Counter()
    while busy():
        begun = time.perf_counter()
        said[other("/coaching/user-segment", mine)[0]] += 1
        taken.append(time.perf_counter() - begun)
        time.sleep(0.06)
    return percentiles(taken) | {"answers": dict(said)}


def played(rows: int, artifacts: str) -> dict:
    """Everything that was measured."""
    with tempfile.TemporaryDirectory() as folder:
        url = filled(f"sqlite:///{folder}/people.db")
        begun = time.process_time()
        many_rows(url, rows)
        found = {"rows": rows, "loaded_in_processor_s": round(time.process_time() - begun, 1)}
        with served(url, artifacts and Path(artifacts).resolve()) as to:
            other, mine, who = to.line("127.0.6.4"), token("person-00004"), token("heavy")
            for path in QUESTIONS:
                ready(to.line("127.0.6.5"), path, token("person-00005"))  # everything is loaded and compiled
            ready(other, "/coaching/user-segment", mine)
            until = time.monotonic() + 3
            found["another_alone"], found["memory_mb"] = meanwhile(other, mine, lambda: time.monotonic() < until), {"before": to.memory()}
            found["one_by_one"] = one_by_one(to, who)
            ready(other, "/coaching/user-segment", mine)  # which was silent for long: its connection was closed
            past = [f"{path}?as_of=2024-08-30" for path in QUESTIONS]
            threads = [threading.Thread(target=ready, args=(to.line("127.0.6.3"), path, who, 300)) for path in past]
            [t.start() for t in threads]
            found["another_while_all_are_asked_at_once"] = meanwhile(other, mine, lambda: any(t.is_alive() for t in threads))
            found["memory_mb"]["after"] = to.memory()
            found["memory_mb"]["most"] = round(int(next(line for line in Path(f"/proc/{to.process.pid}/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1000, 1)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--artifacts", default="", help="a folder of artifacts; without it rules answer")
    parser.add_argument("--keep", action="store_true", help="write heavy.json")
    args = parser.parse_args()
    found = json.dumps(played(args.rows, args.artifacts), indent=1)
    if args.keep:
        (HERE / "heavy.json").write_text(found + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
