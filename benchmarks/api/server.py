"""The API as `fincoach serve` starts it, with two more routes to compare with and without limits on how much one caller may ask.

    python benchmarks/api/server.py DATABASE ARTIFACTS PORT

/trivial answers ready bytes through all of the app's layers, and takes bodies that it throws away; /indexed reads one row by its key over the same driver. Started by run.py.
"""

import sqlite3
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def routes(database: str):
    """The two routes to compare with."""
    from starlette.responses import Response
    from starlette.routing import Route

    ready = b'{"status":"healthy"}'
    if sqlite := database.startswith("sqlite"):
        line = sqlite3.connect(database.removeprefix("sqlite:///"), check_same_thread=False)
    else:
        import psycopg

        line = psycopg.connect(database.replace("+psycopg", ""), autocommit=True)
    statement = f"SELECT currency FROM users WHERE id = {'?' if sqlite else '%s'}"

    async def trivial(request):
        await request.body()
        return Response(ready, media_type="application/json")

    async def indexed(request):
        (found,) = line.execute(statement, (7,)).fetchone()
        return Response(found, media_type="text/plain")

    return [Route("/trivial", trivial, methods=["GET", "POST"]), Route("/indexed", indexed)]


def main(database: str, artifacts: str, port: str, day: str) -> None:
    """Serves until stopped."""
    from fincoach.api.soon import serve

    def make():
        from fincoach.api.access import Limits
        from fincoach.api.app import create_app, parts_of
        from fincoach.api.asking import Clock

        limits = Limits(caller=(1e9, 1e9), address=(1e9, 1e9))
        app = create_app(parts_of(database, artifacts, Clock.of_day(date.fromisoformat(day)), limits=limits), limits)
        app.router.routes[:0] = routes(database)
        return app

    serve(make, "127.0.0.1", int(port), lambda text: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
