"""How long an app waits for the spending service, how fast everybody is forecast, and whether chances come true. One command; see README.md.

    python benchmarks/predictions/run.py                            # 2,000 people over two years, some minutes
    python benchmarks/predictions/run.py --people 300 --copies 20   # quicker
    python benchmarks/predictions/run.py --rules                    # without training: what the plain rule costs
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
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
ASKED = 100  # people asked one after the other
UNSEEN = 14  # weeks before the end at which training stops: what was said after that is compared with what came


def percentiles(seconds: list[float]) -> dict:
    """Median and 95th percentile in milliseconds, and how many were taken."""
    ordered = sorted(seconds)
    at = lambda q: round(1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)], 2)  # noqa: E731
    return {"p50_ms": at(0.5), "p95_ms": at(0.95), "n": len(ordered)}


def timed(call, arguments) -> dict:
    """`call` on each of `arguments`, one after the other: on the clock, and the processor's time alone, which other work does not lengthen."""
    clock, own = [], []
    for argument in arguments:
        begin, busy = time.perf_counter(), time.process_time()
        call(argument)
        clock.append(time.perf_counter() - begin)
        own.append(time.process_time() - busy)
    return {"clock": percentiles(clock), "processor": percentiles(own)}


def peak_mib() -> float:
    """The most memory this process held."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def serve(url: str, artifacts: str, as_of: str) -> dict:
    """The service in a process of its own: import, load, first answer, then one person after the other."""
    begin = time.perf_counter()
    from fincoach.serving.spending import SpendingPredictionService

    imported = time.perf_counter() - begin
    day, begin = date.fromisoformat(as_of), time.perf_counter()
    service = SpendingPredictionService(url, artifacts)
    loaded = time.perf_counter() - begin
    service.predict_weekly_spending(1, day)
    first = time.perf_counter() - begin
    import sqlalchemy as sa

    with service.engine.connect() as connection:
        ids = list(connection.scalars(sa.text("SELECT id FROM users ORDER BY id")))
        rows = connection.scalar(sa.text("SELECT count(*) FROM transactions"))
    rows /= len(ids)
    ids = (ids * ASKED)[:ASKED]
    now = datetime(2030, 1, 1, tzinfo=UTC)
    ways = {}
    for name, ask in (("forecast", service.predict_weekly_spending), ("budgets", service.assess_budget_risk), ("alerts", service.generate_spending_alerts)):
        ask(ids[0], day)
        ways[f"{name}, computed"] = timed(lambda i, ask=ask: ask(i, day), ids)
        ways[f"{name}, computed and kept"] = timed(lambda i, ask=ask: ask(i, day, now=now), ids)
        assert all(ask(i, day, now=now).cached for i in ids[:5])
        ways[f"{name}, from the cache"] = timed(lambda i, ask=ask: ask(i, day, now=now), ids)
    heavy = [m for m in ("torch", "sklearn", "pandas", "statsmodels", "matplotlib") if m in sys.modules]
    assert not heavy, heavy
    return {"method": service.status.method, "rows_a_person": rows, "import_s": imported, "load_s": loaded, "first_answer_s": first, "ways": ways, "peak_mib": peak_mib()}


def batch(snapshot: str, artifacts: str, as_of: str, copies: str) -> dict:
    """Everybody as one call: the people of the snapshot, each `copies` times, from ledgers in memory; the rules and the model."""
    import numpy as np

    from fincoach.data.export import Snapshot
    from fincoach.features.ledger import Ledgers
    from fincoach.serving.spending import SpendingPredictionService

    one, k = Ledgers.of(Snapshot.open(snapshot)), int(copies)
    tile = lambda a: np.tile(a, (k, *[1] * (a.ndim - 1)))  # noqa: E731
    edges = lambda o: np.concatenate([[0], (o[1:] + o[-1] * np.arange(k)[:, None]).ravel()])  # noqa: E731
    names = ("day", "minute", "category", "kind", "amount", "opening", "unit", "goals", "puts")
    many = replace(one, user_ids=np.arange(1, k * len(one) + 1), **{n: tile(getattr(one, n)) for n in names}, **{n: edges(getattr(one, n)) for n in ("offsets", "goal_offsets", "put_offsets")})
    service, day, found = SpendingPredictionService("sqlite://", artifacts), date.fromisoformat(as_of), {}
    service.forecast_all(day, one)  # compiled code is loaded
    before, begin, busy = peak_mib(), time.perf_counter(), time.process_time()
    told = service.forecast_all(day, many)
    took, own = time.perf_counter() - begin, time.process_time() - busy
    assert np.allclose(told.quantiles[: len(one)], told.quantiles[-len(one) :], equal_nan=True)
    found = {"people": len(many), "rows": int(many.offsets[-1]), "method": service.status.method, "clock_s": took, "processor_s": own, "people_a_s": len(many) / took,
             "data_mib": before, "peak_mib": peak_mib()}  # fmt: skip
    return found


def chances(snapshot: str, artifacts: str, as_of: str, people: str) -> dict:
    """What was said about budgets and alerts on earlier days, and what became of it; beside it the plain share of past periods."""
    import numpy as np
    import polars as pl

    from fincoach.data.export import Snapshot
    from fincoach.features.ledger import Ledgers, day_number
    from fincoach.features.recurring import RecurringStreams, detect_spending_cycles
    from fincoach.features.series import weekly_series
    from fincoach.serving import spending as s

    kept = Snapshot.open(snapshot)
    frames = {n: kept.frame(n) for n in ("users", "user_profiles", "categories", "transactions")}
    ids = frames["users"]["id"].sort().to_list()[: int(people)]
    frames = {n: f.filter(pl.col("id" if n == "users" else "user_id").is_in(ids)) if n != "categories" else f for n, f in frames.items()}
    ledgers, names = Ledgers.of(frames), dict(frames["categories"].select("id", "name").iter_rows())
    service = s.SpendingPredictionService("sqlite://", artifacts)
    spending = np.unique(ledgers.category[np.isin(ledgers.kind, s.SPENDING_KINDS)]).astype(np.int64)
    last = date.fromisoformat(as_of)
    said, alerts = [], []
    for back, days in ((5, 0), (9, 0), (13, 0), (9, 3)):
        origin = last - timedelta(days=(last.weekday() + 1) % 7, weeks=back) + timedelta(days=days)
        found = detect_spending_cycles(frames, origin)
        mine = {k[0]: v for k, v in found.streams.partition_by("user_id", as_dict=True).items()}
        after = weekly_series(ledgers, origin + timedelta(days=28 - days), 4, spending)
        true = {names[int(c)]: after.y[:, :, j].sum(1) for j, c in enumerate(spending)} | {"total": after.total.sum(1)}
        for i, user in enumerate(ledgers.user_ids.tolist()):
            p = ledgers.person(i)
            n = int(np.searchsorted(p.day, day_number(origin), "right"))
            p = p._replace(**{k: getattr(p, k)[:n] for k in ("day", "minute", "category", "kind", "amount")})
            known = s._known(service._way, user, origin, p, RecurringStreams(origin, mine.get(user, found.streams.head(0))), ("EUR", names, spending, 0))
            for r in s._assessed(known, service._way, None).risks:
                t = float(true[r.category][i])
                said.append((r.category == "total", r.due > 0, r.chance, r.over / r.seen if r.seen else 0.0, t > r.budget, r.low80 <= t <= r.high80))
            for a in s._alerts(known, service._way).alerts:
                came = None if a.limit is None else float(true[a.category or "total"][i] > a.limit)
                alerts.append((a.kind, a.chance, came))
    told = pl.DataFrame(said, orient="row", schema=["total", "due", "chance", "share", "over", "inside"]).with_columns(pl.col("over").cast(pl.Float64))

    def scored(rows: pl.DataFrame) -> dict:
        base = rows["over"].mean()
        brier = lambda c: float(((rows[c] - rows["over"]) ** 2).mean())  # noqa: E731
        ten = rows.group_by((pl.col("chance") * 5).floor().clip(0, 4).cast(pl.Int8).alias("fifth")).agg(pl.len(), pl.col("chance").mean(), pl.col("over").mean()).sort("fifth")
        return {"n": len(rows), "came_true": base, "said": rows["chance"].mean(), "brier": brier("chance"), "brier_of_past_share": brier("share"), "skill": 1 - brier("chance") / (base * (1 - base)),
                "inside_80": rows["inside"].mean(), "by_fifths": ten.to_dicts()}  # fmt: skip

    rows = pl.DataFrame(alerts, orient="row", schema={"kind": pl.String, "said": pl.Float64, "came_true": pl.Float64})
    told_alerts = rows.group_by("kind").agg(pl.len().alias("n"), pl.col("said").mean(), pl.col("came_true").mean()).sort("kind").to_dicts()
    return {"people": len(ids), "method": service.status.method, "answers": 4 * len(ids), "total": scored(told.filter("total")), "category": scored(told.filter(~pl.col("total"))),
            "category with payments due": scored(told.filter(~pl.col("total") & pl.col("due"))), "alerts": told_alerts}  # fmt: skip


def fresh(function: str, *words: str) -> dict:
    """The measurement of `function` in a fresh process."""
    command = [sys.executable, __file__, "--only", function, *map(str, words)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1])


def trained(snapshot, day: date, artifacts: Path, say) -> str:
    """Train on the snapshot and promote that version, whatever its verdict: speed is measured here, not worth."""
    from fincoach.forecast.training import Recipe, train_spending
    from fincoach.serving.artifacts import promote
    from fincoach.settings import load_settings

    found = train_spending(snapshot, Recipe.of(load_settings(), day, seed=0), None, None, None, None, [], say)
    found.publish(artifacts)
    promote(artifacts, "spending", found.version, "to be measured, whatever its verdict")
    return found.version


def main(people: int, days: int, copies: int, judged: int, rules: bool, out: str) -> None:
    """Make the data and the model, measure, print and write the results."""
    from fincoach.data.database import connect, load, upgrade
    from fincoach.data.export import write_snapshot
    from fincoach.data.population import generate
    from fincoach.features.ledger import Ledgers

    with tempfile.TemporaryDirectory() as folder:
        f = Path(folder)
        frames = {k: v for k, v in generate(people=people, days=days, seed=7).frames.items() if not k.startswith("recommendation")}
        day = Ledgers.of(frames).last_day
        snapshot = write_snapshot(frames, f / "snapshots")
        engine = connect(url := f"sqlite:///{f / 'fincoach.db'}")
        upgrade(engine)
        load(engine, frames)
        engine.dispose()
        artifacts = f / "artifacts"
        if not rules:
            trained(snapshot, day - timedelta(weeks=UNSEEN), artifacts, lambda *_: None)
        results = {"machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "people": people, "days": days, "serve": fresh("serve", url, artifacts, day),
                   "batch": fresh("batch", snapshot.path, artifacts, day, copies), "chances": fresh("chances", snapshot.path, artifacts, day, judged)}  # fmt: skip
    Path(out).write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def show(results: dict) -> None:
    """Print the results."""
    s, b, c = results["serve"], results["batch"], results["chances"]
    print(f"{results['people']:,} people, {s['rows_a_person']:,.0f} transactions each, by {s['method']}; {results['machine']}")
    print(f"import {s['import_s']:.2f} s, load {s['load_s']:.2f} s, first answer {s['first_answer_s']:.2f} s, peak {s['peak_mib']:.0f} MiB")
    for way, took in s["ways"].items():
        print(f"  {way:32}" + "".join(f"  {k} p50 {v['p50_ms']:7.2f} ms p95 {v['p95_ms']:7.2f} ms" for k, v in took.items()))
    print(f"batch: {b['people']:,} people, {b['rows']:,} rows in {b['clock_s']:.1f} s ({b['people_a_s']:,.0f} a second), {b['peak_mib'] - b['data_mib']:.0f} MiB beside the data")
    for name in ("total", "category", "category with payments due"):
        r = c[name]
        print(f"  {name:28} n {r['n']:6,}  said {r['said']:.3f}  came true {r['came_true']:.3f}  Brier {r['brier']:.4f} (past share {r['brier_of_past_share']:.4f}, skill {r['skill']:.3f})  "
              f"in 80 % range {r['inside_80']:.3f}")  # fmt: skip
    for a in c["alerts"]:
        true = "" if a["came_true"] is None else f"  came true {a['came_true']:.3f}"
        print(f"  alert {a['kind']:22} n {a['n']:5}  said {a['said']:.3f}{true}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--only"]:
        print(json.dumps({"serve": serve, "batch": batch, "chances": chances}[sys.argv[2]](*sys.argv[3:])))
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("--people", type=int, default=2000)
        parser.add_argument("--days", type=int, default=730)
        parser.add_argument("--copies", type=int, default=50, help="how often each person is taken in the batch")
        parser.add_argument("--judged", type=int, default=500, help="people whose chances are compared with what became of them")
        parser.add_argument("--rules", action="store_true", help="do not train: measure the plain rule")
        parser.add_argument("--out", default=str(Path(__file__).with_name("results.json")))
        main(**vars(parser.parse_args()))
