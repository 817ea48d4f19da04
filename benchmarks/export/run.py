"""How fast, and in how much memory, a database becomes a snapshot. One command; see README.md.

    python benchmarks/export/run.py                       # 10 million transactions, about 5 minutes, 1 GB of disk
    python benchmarks/export/run.py --rows 100000         # a look
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
from datetime import UTC, datetime
from pathlib import Path

PER_PERSON = 500
SQL = "SELECT * FROM transactions ORDER BY user_id, occurred_at, id"


def make(url: str, rows: int, order: str) -> None:
    """Fills a database with `rows` transactions, `PER_PERSON` a person, stored by person or by time."""
    import numpy as np
    import polars as pl

    from fincoach.data.database import connect, load, upgrade

    rng, people = np.random.default_rng(7), rows // PER_PERSON
    start = datetime(2023, 1, 1, tzinfo=UTC)
    users = pl.DataFrame({"id": range(1, people + 1)}).with_columns(
        external_id=pl.format("person-{}", "id"), currency=pl.lit("EUR"), created_at=pl.lit(start)
    )
    names = np.array([f"{word} {n}" for word in ("Grocer", "Bakery", "Café", "Transport", "Landlord") for n in range(400)])
    frame = pl.DataFrame({
        "user_id": np.repeat(np.arange(1, people + 1), PER_PERSON),
        "occurred_at": rng.integers(0, 2 * 365 * 86_400, people * PER_PERSON),
        "amount_minor": -rng.integers(1, 50_000, people * PER_PERSON),
        "category_id": rng.integers(1, 25, people * PER_PERSON),
        "merchant": names[rng.integers(0, len(names), people * PER_PERSON)],
    })  # fmt: skip
    frame = frame.sort(*(("user_id", "occurred_at") if order == "person" else ("occurred_at", "user_id")))
    frame = frame.with_columns(
        occurred_at=pl.lit(start) + pl.duration(seconds="occurred_at"),
        merchant=pl.when(pl.col("category_id") > 2).then("merchant"),
        currency=pl.lit("EUR"),
        account=pl.lit("main"),
    ).with_row_index("id", 1)
    engine = connect(url)
    upgrade(engine)
    began = time.perf_counter()
    load(engine, {"users": users})
    load(engine, {"transactions": frame})
    seconds = time.perf_counter() - began
    engine.dispose()
    print(json.dumps({"seconds": seconds, "rows_per_second": len(frame) / seconds}))


def fincoach(url: str, into: str) -> None:
    """The kit's export."""
    from fincoach.data.database import connect
    from fincoach.data.export import export_snapshot

    snapshot = export_snapshot(connect(url), into)
    assert snapshot.rows("transactions")


def pandas_whole(url: str, into: str) -> None:
    """`read_sql` and `to_parquet`."""
    import pandas as pd
    import sqlalchemy as sa

    pd.read_sql(sa.text(SQL), sa.create_engine(url).connect()).to_parquet(f"{into}/t.parquet")


def pandas_chunks(url: str, into: str) -> None:
    """`read_sql` in chunks of 100,000 rows, appended to one Parquet file."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
    import sqlalchemy as sa

    text = pa.string()
    schema = pa.schema([("id", pa.int64()), ("user_id", pa.int64()), ("occurred_at", pa.int64()), ("amount_minor", pa.int64()),
                        ("currency", text), ("category_id", pa.int64()), ("merchant", text), ("account", text), ("external_id", text)])
    with pq.ParquetWriter(f"{into}/t.parquet", schema) as writer:
        for part in pd.read_sql(sa.text(SQL), sa.create_engine(url).connect(), chunksize=100_000):
            writer.write_table(pa.Table.from_pandas(part, schema, preserve_index=False))


def polars_whole(url: str, into: str) -> None:
    """`read_database` and `write_parquet`."""
    import polars as pl
    import sqlalchemy as sa

    pl.read_database(sa.text(SQL), sa.create_engine(url).connect(), infer_schema_length=None).write_parquet(f"{into}/t.parquet")


WAYS = {f.__name__: f for f in (fincoach, pandas_whole, pandas_chunks, polars_whole)}


def measured(way: str, url: str, into: str) -> dict:
    """Wall seconds, CPU seconds and peak resident MiB of one way, in this process and in those it started."""
    began = time.perf_counter()
    WAYS[way](url, into)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": cpu, "peak_mib": sum(u.ru_maxrss for u in used) / 1024}


def apart(*args) -> dict:
    """One step in a fresh process, so that its memory is its own."""
    done = subprocess.run([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def main(rows: int) -> None:
    results = {"machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "runs": []}
    with tempfile.TemporaryDirectory() as home:
        plans = [(rows, "person", ["fincoach"]), (rows // 10, "time", list(WAYS))]
        for n, order, ways in plans:
            file = Path(home) / f"{n}-{order}.db"
            url = f"sqlite:///{file}"
            loaded = apart("--make", url, n, order)
            results["runs"].append({"way": "load", "rows": n, "stored_by": order, **loaded, "database_mb": file.stat().st_size / 1e6})
            for way in ways:
                into = Path(home) / f"{n}-{order}-{way}"
                into.mkdir()
                found = {"way": way, "rows": n, "stored_by": order, **apart("--way", way, url, into), "written_mb": size(into) / 1e6}
                results["runs"].append(found)
            file.unlink()
            for run in results["runs"][-len(ways) - 1 :]:
                print({k: round(v, 1) if isinstance(v, float) else v for k, v in run.items()}, flush=True)
    (Path(__file__).parent / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make[0], int(given.make[1]), given.make[2])
    elif given.way:
        print(json.dumps(measured(*given.way)))
    else:
        main(given.rows)
