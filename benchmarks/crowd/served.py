"""A server as people run it, to be troubled: on a few made-up people, in a process of its own."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from datetime import UTC, date, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DAY = date(2024, 9, 1)
SECRET = secrets.token_hex(32)
SERVE = "import sys; from fincoach.cli import main; sys.exit(main(sys.argv[1:]))"


def filled(url: str, people: int = 6, days: int = 245) -> str:
    """`url`, after a database was made there with some people; they said yes to tracking."""
    from fincoach.data.database import connect, load, upgrade
    from fincoach.data.population import generate
    from fincoach.data.rights import set_consent

    engine = connect(url)
    upgrade(engine)
    load(engine, generate(people=people, days=days, seed=11).frames)
    for user in range(1, people + 1):
        set_consent(engine, user, "tracking", True, datetime(2024, 1, 1, tzinfo=UTC))
    engine.dispose()
    return url


def token(who: str, role: str = "user") -> str:
    """A token that the server takes."""
    from fincoach.api.access import keys_from, make_token

    return make_token(keys_from({"FINCOACH_JWT_SECRET": SECRET}), who, time.time(), role)


class Served:
    """A running server: its port, its process, and the file with what it said."""

    def __init__(self, port: int, process: subprocess.Popen, log: Path):
        self.port, self.process, self.log, self.lines = port, process, log, []

    def line(self, source: str = "127.0.0.1", timeout: float = 30) -> "Line":
        """A connection, from an address of this machine."""
        self.lines.append(Line(self.port, source, timeout))
        return self.lines[-1]

    def memory(self) -> float:
        """Megabytes that the process holds."""
        return round(int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)

    def seconds(self) -> float:
        """Seconds of a processor that the process took."""
        return sum(map(int, Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def files(self) -> int:
        """How many files the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Line:
    """One connection that stays open, and asks one thing after the other."""

    def __init__(self, port: int, source: str = "127.0.0.1", timeout: float = 30):
        self.port, self.source, self.timeout, self.socket, self.read = port, source, timeout, None, None
        self.open()

    def close(self):
        """Let the connection go."""
        for part in (self.read, self.socket):
            if part is not None:
                part.close()

    def open(self):
        """Connect, or connect again."""
        self.close()
        self.socket = socket.create_connection(("127.0.0.1", self.port), self.timeout, (self.source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.read = self.socket.makefile("rb")

    def __call__(self, path: str, token: str = "", method: str = "GET", body: bytes | None = None) -> tuple[int, dict, bytes]:
        """Status, headers and body of the answer; status 0 where the connection was cut, after which there is a new one."""
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n" + (f"authorization: Bearer {token}\r\n" if token else "")
        head += "" if body is None else f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        with suppress(OSError):  # it may be answered before everything was sent
            self.socket.sendall(head.encode() + b"\r\n" + (body or b""))
        try:
            return self.answer()
        except (OSError, ValueError, IndexError):
            with suppress(OSError):
                self.open()
            return 0, {}, b""

    def answer(self) -> tuple[int, dict, bytes]:
        """The next answer."""
        status, headers = int(self.read.readline().split()[1]), {}
        while (line := self.read.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.strip().lower()] = value.strip()
        body = self.read.read(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.open()
        return status, headers, body


@contextmanager
def served(database: str, artifacts: str | Path = "", environ: dict | None = None, today: date | None = DAY, wait: float = 60):
    """A `Served` on a database, ready to answer; `today` None means the computer's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as nothing:
        told = {k: v for k, v in os.environ.items() if not k.startswith("FINCOACH")} | {"FINCOACH_HOME": nothing, "FINCOACH_JWT_SECRET": SECRET, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        told |= {"FINCOACH_ARTIFACTS": str(artifacts or Path(nothing) / "artifacts")} | (environ or {})
        command = [sys.executable, "-W", "error", "-c", SERVE, "serve", "--port", str(port), "--database", database, *(["--today", str(today)] if today else [])]
        log = Path(nothing) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=told, cwd=ROOT, stderr=file)
        try:
            until = time.monotonic() + wait
            while True:
                with suppress(OSError), closing(Line(port)) as line:
                    if line("/health/services")[0] == 200:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit("the server did not start")
                time.sleep(0.05)
            to = Served(port, process, log)
            yield to
            [line.close() for line in to.lines]
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()


def ready(line: Line, path: str, token: str, tries: int = 60) -> bytes:
    """The answer, asked for again while it is still being computed."""
    for _ in range(tries):
        status, _, body = line(path, token)
        if status == 200:
            return body
        if status not in (0, 503):
            raise SystemExit(f"{path} answered {status}: {body[:200]!r}")
        time.sleep(0.5)
    raise SystemExit(f"{path} was not answered")


def percentiles(seconds: list[float]) -> dict:
    """Median, 99th percentile and the longest, in milliseconds, and how many."""
    ms = sorted(1000 * s for s in seconds)
    return {"p50_ms": round(ms[len(ms) // 2], 2), "p99_ms": round(ms[int(0.99 * (len(ms) - 1))], 2), "max_ms": round(ms[-1], 2), "n": len(ms)}


def event(number: int) -> bytes:
    """A body with one event that has a number of its own."""
    return json.dumps({"event_id": f"00000000-0000-4000-8000-{number:012x}", "event_type": "page_view", "timestamp": "2024-08-31T12:00:00Z", "event_data": {"page": "goals"}}).encode()
