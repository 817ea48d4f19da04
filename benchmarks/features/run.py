"""python benchmarks/features/run.py [--rows N] [--people N] [--repeats N]: the 28 numbers four ways, in one run.

Needs duckdb and psutil beside FinCoach's `lab` extra. Prints the table of README.md and writes results.json beside this file.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import duckdb
import in_pandas
import in_polars
import numpy as np
import polars as pl
from made import AS_OF, DAY, frames, small

from fincoach.data.database import connect, load, read_person, upgrade
from fincoach.features.behavior import NAMES, extract, features_of, warm
from fincoach.features.ledger import Ledgers, person_from_rows
from fincoach.features.store import user_features

HERE = Path(__file__).parent


def clock(work):
    """(seconds by the clock, seconds of all processors, result)"""
    start, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - start, time.process_time() - processor, result


def in_duckdb(arrow, tables, day, month):
    with duckdb.connect() as connection:
        for name, table in {"input": arrow, **tables}.items():
            connection.register(name, table)
        return pl.from_arrow(connection.sql((HERE / "in_duckdb.sql").read_text(), params={"day": day, "month": month}).to_arrow_table())


def matrix(frame):
    """The numbers in the order of FEATURES; unknown is NaN."""
    return frame.sort("user_id").select(pl.col(n).cast(pl.Float64).fill_null(np.nan) for n in NAMES).to_numpy()


def check(name, found, wanted):
    """Stops if a peer computes something else."""
    for i, feature in enumerate(NAMES):
        same = np.isclose(found[:, i], wanted[:, i], rtol=1e-7, atol=1e-7, equal_nan=True)
        if not same.all():
            k = np.flatnonzero(~same)[0]
            raise SystemExit(f"{name} differs in {feature} for {(~same).sum()} people: {found[k, i]} instead of {wanted[k, i]} for user {k + 1}")


def everybody(tables, repeats):
    """Interleaved runs from the same Arrow table: (seconds by the clock, seconds of processors)."""
    arrow, few = tables["transactions"].to_arrow(), small(tables)
    few_arrow, few_pandas = {n: t.to_arrow() for n, t in few.items()}, {n: t.to_pandas() for n, t in few.items()}
    month = 19 / 30

    def ours():
        return extract(Ledgers.from_frames(tables | {"transactions": pl.from_arrow(arrow)}), AS_OF)

    ways = {
        "fincoach": ours,
        "polars": lambda: matrix(in_polars.features(pl.from_arrow(arrow), few, DAY, month)),
        "duckdb": lambda: matrix(in_duckdb(arrow, few_arrow, DAY, month)),
        "pandas": lambda: matrix(pl.from_pandas(in_pandas.features(arrow.to_pandas(), few_pandas, DAY, month))),
    }
    wanted, times = ours(), {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds, processor, found = clock(way)
            check(name, found, wanted)
            times[name].append((round(seconds, 3), round(processor, 3)))
            print(f"{name:10} {seconds:7.2f} s, {processor:7.2f} s of processors", flush=True)
    ledgers = Ledgers.from_frames(tables)
    kernels = [clock(lambda: extract(ledgers, AS_OF))[:2] for _ in range(5)]
    return times, middle(kernels), ledgers


def middle(pairs):
    """Medians by the clock and of processors."""
    return [round(statistics.median(p[i] for p in pairs), 3) for i in (0, 1)]


def one_person(ledgers, tables):
    """Medians in milliseconds: from arrays, and from a SQLite database of 200 people."""
    arrays = []
    for i in range(2_000):
        person = ledgers.person(i % len(ledgers))
        arrays.append(clock(lambda person=person: features_of(person, DAY))[0])
    few = tables["users"]["id"][:200].to_list()
    named = {
        "users": tables["users"].filter(pl.col("id").is_in(few)).with_columns(external_id=pl.col("id").cast(pl.String), created_at=pl.lit(0).cast(pl.Datetime("us", "UTC"))),
        "user_profiles": tables["user_profiles"].filter(pl.col("user_id").is_in(few)),
        "transactions": tables["transactions"].filter(pl.col("user_id").is_in(few)).with_row_index("id", 1),
        "financial_goals": tables["financial_goals"].filter(pl.col("user_id").is_in(few)).with_columns(name=pl.lit("Goal")),
    }
    goals = named["financial_goals"]["id"].to_list()
    named["goal_contributions"] = tables["goal_contributions"].filter(pl.col("goal_id").is_in(goals)).with_row_index("id", 1)
    with tempfile.TemporaryDirectory() as folder:
        engine = connect(f"sqlite:///{folder}/fincoach.db")
        upgrade(engine)
        load(engine, named)
        day = ledgers.last_day.fromisoformat(AS_OF)
        database = [clock(lambda u=u: user_features(engine, u, day))[0] for u in few * 2]
        reading = [clock(lambda u=u: read_person(engine, u, day))[0] for u in few]
        rows = [read_person(engine, u, day) for u in few]
        building = [clock(lambda r=r: person_from_rows(r))[0] for r in rows]
        online = np.array([user_features(engine, u, day) for u in few])
        engine.dispose()
    check("one person", online, extract(ledgers, AS_OF)[:200])
    return {"arrays": arrays, "database": database, "reading": reading, "building": building}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--people", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warm()
    tables = frames(options.rows, options.people)
    times, kernels, ledgers = everybody(tables, options.repeats)
    single = {name: round(statistics.median(t) * 1e3, 4) for name, t in one_person(ledgers, tables).items()}
    medians = {name: middle(t) for name, t in times.items()}
    slower = {n: [round(t / o, 2) for t, o in zip(m, medians["fincoach"], strict=True)] for n, m in medians.items()}
    result = {"rows": options.rows, "people": options.people, "what": ["seconds by the clock", "seconds of processors"], "runs": times,
              "median": medians, "times_slower": slower, "features_alone": kernels, "one_person_ms": single}
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
