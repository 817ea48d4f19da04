"""Ten thousand connections that mean no good, one person who floods, and somebody who wants an answer meanwhile. One command; see README.md.

    python benchmarks/crowd/run.py                       # 10,000 connections, about a minute
    python benchmarks/crowd/run.py --connections 700     # a look
"""

import argparse
import json
import socket
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from served import Served, filled, percentiles, ready, served, token

HERE = Path(__file__).parent
KEPT, KINDS = "/coaching/user-segment", ("says nothing", "a head without end", "a body without end", "reads nothing")
MINE, FLOODS = "127.0.0.2", "127.0.0.3"  # this machine has more addresses than one


def opened(to: Served, connections: int, reads: str) -> list[tuple[str, socket.socket]]:
    """Connections from many addresses: six of ten say nothing, two never end the head of a request, one never ends the body, one never reads."""
    found = []
    for i in range(connections):
        kind = KINDS[(0, 0, 0, 0, 0, 0, 1, 1, 2, 3)[i % 10]]
        s = socket.socket()
        s.bind((f"127.1.{i // 200 % 256}.{1 + i % 200}", 0))
        if kind == "reads nothing":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.settimeout(30)
        s.connect(("127.0.0.1", to.port))
        said = {"a head without end": b"GET /health HTTP/1.1\r\nx-", "reads nothing": f"GET {KEPT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {reads}\r\n\r\n".encode() * 2,
                "a body without end": b"POST /coaching/behavioral-event HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n["}.get(kind, b"")
        with suppress(OSError):
            s.sendall(said)
        found.append((kind, s))
    return found


def trickle(crowd: list, stop: threading.Event) -> None:
    """Those who never end send a letter every two seconds."""
    while not stop.wait(2):
        for kind, s in crowd:
            if "without end" in kind:
                with suppress(OSError):
                    s.send(b"x")


def asked(to: Served, mine: str, seconds: float, pause: float = 0.02) -> dict:
    """One person asks again and again: how long it took, and what was answered."""
    line, taken, said, until = to.line(MINE), [], Counter(), time.monotonic() + seconds
    while time.monotonic() < until:
        begun = time.perf_counter()
        said[line(KEPT, mine)[0]] += 1
        taken.append(time.perf_counter() - begun)
        time.sleep(max(pause, 0.06))  # below the twenty a second that one person may
    return percentiles(taken) | {"answers": dict(said)}


def flood(to: Served, who: str, seconds: float, said: Counter) -> None:
    """One person asks as often as four connections can."""
    def one():
        line, until = to.line(FLOODS), time.monotonic() + seconds
        while time.monotonic() < until:
            said[line(KEPT, who)[0]] += 1

    threads = [threading.Thread(target=one) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]


def still_open(crowd: list) -> Counter:
    """How many connections of each kind the server has not closed."""
    found = Counter()
    for kind, s in crowd:
        s.setblocking(False)
        with suppress(OSError):
            if kind != "reads nothing" and s.recv(1, socket.MSG_PEEK) == b"":
                continue
        error = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        found[kind] += not error and _established(s)
    return found


def _established(s: socket.socket) -> bool:
    """Whether the other side holds the connection, as the kernel says (state 1 of TCP_INFO)."""
    return s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


def played(connections: int, seconds: float, gone: float) -> dict:
    """Everything that was measured."""
    with tempfile.TemporaryDirectory() as folder, served(filled(f"sqlite:///{folder}/people.db")) as to:
        mine, theirs, said = token("person-00001"), token("person-00002"), Counter()
        for who in (mine, theirs):
            ready(to.line(), KEPT, who)
        found = {"connections": connections, "alone": asked(to, mine, seconds), "memory_mb": {"before": to.memory()}, "files": {"before": to.files()}}
        begun, stop = time.monotonic(), threading.Event()
        crowd = opened(to, connections, token("person-00003"))
        found["opened_in_s"] = round(time.monotonic() - begun, 1)
        found["files"]["crowd"] = most = to.files()
        while (now := to.files()) >= most - 20 and now < found["files"]["before"] + connections and time.monotonic() < begun + 9:
            most = max(most, now)
            time.sleep(0.02)
        found["files"]["crowd"], found["accepted_in_s"] = max(most, now), round(time.monotonic() - begun, 1)
        threads = [threading.Thread(target=trickle, args=(crowd, stop)), threading.Thread(target=flood, args=(to, theirs, seconds, said))]
        [t.start() for t in threads]
        found["in_the_crowd"] = asked(to, mine, seconds)
        found["memory_mb"]["crowd"] = to.memory()
        found["open_then"] = dict(still_open(crowd))
        threads[1].join()
        found["who_floods"], found["after_flood"] = dict(said), to.line(MINE)(KEPT, mine)[0]
        found["health"] = to.line(MINE)("/health")[0]
        while time.monotonic() < begun + gone and to.files() > found["files"]["before"] + 20:
            time.sleep(0.25)
        found["closed_after_s"] = round(time.monotonic() - begun, 1)
        found["files"]["after"], found["memory_mb"]["after"] = to.files(), to.memory()
        stop.set()
        threads[0].join()
        [s.close() for _, s in crowd]
        found["afterwards"] = asked(to, mine, seconds)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--gone", type=float, default=60, help="how long to wait until the server has closed them")
    parser.add_argument("--keep", action="store_true", help="write results.json")
    args = parser.parse_args()
    with suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = json.dumps(played(args.connections, args.seconds, args.gone), indent=1)
    if args.keep:
        (HERE / "results.json").write_text(found + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
