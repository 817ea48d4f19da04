"""What a kept answer costs, beside a plain indexed read and beside making it; and what following champions.json costs.

    python benchmarks/kept/run.py [--database postgresql+psycopg://user@host/name] [--people 200]

Without --database an SQLite file is made for the time of the run. Whatever is in a database that is given is left alone: it must be empty, and is
emptied again. Prints CPU and wall time a call in microseconds, and writes results.json (or results-postgresql.json) beside this file.
"""

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path

from fincoach.data.database import connect, downgrade, load, reading, state, upgrade, writing
from fincoach.data.population import generate
from fincoach.serving import EnhancedModelManager, FinancialHealthForecaster, PredictionCache
from fincoach.serving.artifacts import promote, publish
from fincoach.serving.cache import Question, lookup
from fincoach.serving.manager import Kind

NOW, DAY = datetime(2025, 3, 1, 9, tzinfo=UTC), date(2025, 2, 28)


def timed(call, times: int, rounds: int = 3) -> dict[str, float]:
    """CPU and wall microseconds a call, of the fastest of some rounds."""
    found = []
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        for i in range(times):
            call(i)
        found.append(((time.process_time() - cpu) / times * 1e6, (time.perf_counter() - wall) / times * 1e6))
    return {"cpu_us": round(min(f[0] for f in found), 2), "wall_us": round(min(f[1] for f in found), 2)}


def of_cache(engine, people: int) -> dict:
    """A real answer (the outlook of a person's balance) from each place where it may be."""
    service, cache = FinancialHealthForecaster(engine, "nowhere"), PredictionCache(engine)
    questions, serial = [Question(u, "health", DAY, "rules", "benchmark") for u in range(1, people + 1)], itertools.count()
    make = lambda user: service.outlook(user, DAY).to_dict()  # noqa: E731
    for q in questions:
        cache.answer(q, NOW, lambda q=q: make(q.user_id))

    def plain(i):
        with reading(engine) as ask:
            ask("SELECT timezone FROM users WHERE id = ?", 1 + i % people).fetchone()

    async def many(n):
        for i in range(n):
            await cache.answer_async(questions[i % people], NOW, dict)

    async def together(n):
        for _ in range(n // 64):
            await asyncio.gather(*(cache.answer_async(questions[i % people], NOW, dict) for i in range(64)))

    made = []
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda _: cache.answer(questions[0]._replace(subject="crowd"), NOW, lambda: (made.append(1), time.sleep(0.05), {})[2]), range(1000)))
    found = {
        "bytes of the answer": len(cache.get(questions[0], NOW).body),
        "a plain indexed read": timed(plain, 2_000),
        "from memory": timed(lambda i: cache.get(questions[i % people], NOW), 5_000),
        "from memory, in an event loop": timed(lambda _: asyncio.run(many(2_000)), 1),
        "from memory, 64 at once": timed(lambda _: asyncio.run(together(2_048)), 1),
        "from the table": timed(lambda i: lookup(engine, questions[i % people], NOW), 1_000),
        "made and kept": timed(lambda i: cache.answer(questions[i % people]._replace(subject=str(next(serial))), NOW, lambda: make(1 + i % people)), 50),
        "a thousand equal questions made": len(made),
    }
    for name, n in (("from memory, in an event loop", 2_000), ("from memory, 64 at once", 2_048)):
        found[name] = {k: round(v / n, 2) for k, v in found[name].items()}
    cache.close()
    return found


class Small:
    """A service that is its version's name."""

    def __init__(self, engine, artifacts, version=None):
        self.engine, self.status = engine, ("model", version, "") if version else ("rules", "rules", "")


def of_manager(engine) -> dict:
    """Taking a lineup, and how long a new champion takes from the file to the next request."""
    with tempfile.TemporaryDirectory() as root:
        for version in ("a", "b"):
            publish(root, "small", version, {"model.json": b"{}"}, {})
        promote(root, "small", "a")
        manager = EnhancedModelManager(engine, root, {"small": Kind(Small, lambda s, user, day: 1.0)}, look_every=0.05)
        manager.preload()
        found, took = {"a lineup": timed(lambda _: manager.lineup(), 50_000), "a person's service": timed(lambda i: manager.lineup().of(i)["small"], 50_000)}, []
        for i in range(40):
            promote(root, "small", "ba"[i % 2])
            begun = time.perf_counter()
            while manager.lineup()["small"].version != "ba"[i % 2]:
                time.sleep(0.0005)
            took.append(1000 * (time.perf_counter() - begun))
        manager.close()
    return found | {"a new champion answers after, ms": {"p50": round(sorted(took)[20], 1), "max": round(max(took), 1)}}


def main():
    """Runs everything and writes the results."""
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--database")
    given.add_argument("--people", type=int, default=200)
    given = given.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = connect(given.database or f"sqlite:///{folder}/kept.db")
        if given.database and state(engine) != "empty":
            raise SystemExit("the database that was given is not empty")
        upgrade(engine)
        load(engine, {k: v for k, v in generate(people=given.people, days=400, seed=1).frames.items() if not k.startswith("recommendation")})
        try:
            results = {"database": engine.dialect.name} | of_cache(engine, given.people) | of_manager(engine)
            with writing(engine) as c:
                c.exec_driver_sql("DELETE FROM prediction_cache")
        finally:
            if given.database:
                downgrade(engine, "base")
            engine.dispose()
    print(json.dumps(results, indent=1))
    name = "results.json" if not given.database else f"results-{results['database']}.json"
    (Path(__file__).parent / name).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
