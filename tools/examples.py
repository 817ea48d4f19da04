"""Ask a service everything once, and keep the answers as the examples of the API's documentation.

    python tools/examples.py [DATABASE [ARTIFACTS]]       # default: what `make retrain` left. The database is copied, and stays as it is.

Writes fincoach/api/examples.json.
"""

import json
import os
import secrets
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PATHS = ("/health", "/health/services", "/coaching/user-segment", "/coaching/segment-insights", "/coaching/segment-comparison", "/coaching/spending-prediction", "/coaching/goal-probability/{goal_id}",
         "/coaching/financial-forecast", "/coaching/behavioral-insights", "/coaching/recommendation", "/financial/spending-patterns", "/financial/category-preferences",
         "/financial/financial-personality", "/financial/peer-comparison", "/coaching/goals", "/me/consent", "/me/kept-answers")
OPERATORS = ("/admin/status", "/admin/model-performance", "/admin/cache", "/admin/audit")


def asked(client, operator: str, goal_id: int, at: datetime) -> dict:
    """Every answer: `METHOD path` -> status and body. `operator` is a token for the routes below /admin."""
    found = {}

    def keep(method: str, path: str, answer) -> dict:
        if answer.status_code >= 300:
            raise SystemExit(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        found[f"{method} {path}"] = {"status": answer.status_code, "body": answer.json()}
        return answer.json()

    keep("PUT", "/me/consent", client.put("/me/consent", json={"tracking": True}))
    for path in PATHS:
        told = keep("GET", path, client.get(path.format(goal_id=goal_id)))
        if path == "/coaching/recommendation":
            answered = client.post(f"/coaching/recommendation/{told['recommendation_id']}/feedback", json={"response": "accepted", "helpful": True})
            keep("POST", "/coaching/recommendation/{recommendation_id}/feedback", answered)
    keep("POST", "/coaching/refresh-segment", client.post("/coaching/refresh-segment"))
    event = {"event_id": str(uuid.UUID(int=7)), "event_type": "page_view", "timestamp": at.isoformat(), "event_data": {"page": "goals"}}
    keep("POST", "/coaching/behavioral-event", client.post("/coaching/behavioral-event", json=event))
    head = {"authorization": f"Bearer {operator}"}
    for path in OPERATORS:
        keep("GET", path, client.get(path, headers=head))
    keep("POST", "/admin/revoke-token", client.post("/admin/revoke-token", headers=head, json={"token_id": "5f2b9c1e", "expires_at": "2100-01-01T00:00:00Z"}))
    return dict(sorted(found.items()))


def main(database: str = "", artifacts: str = "") -> None:
    """Asks about the first person with an open goal."""
    import sqlite3

    from starlette.testclient import TestClient

    from fincoach.api.access import keys_from, make_token
    from fincoach.api.app import create_app, parts_of
    from fincoach.api.asking import Clock
    from fincoach.data.database import connect, upgrade
    from fincoach.data.tables import from_micros

    environ = {**os.environ, "FINCOACH_JWT_SECRET": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory() as folder:
        old, new = sqlite3.connect(database or ROOT / "var/fincoach.db"), sqlite3.connect(f"{folder}/fincoach.db")
        old.backup(new)
        (newest,) = new.execute("SELECT max(occurred_at) FROM transactions").fetchone()
        goal_id, name = new.execute("SELECT g.id, u.external_id FROM financial_goals g JOIN users u ON u.id = g.user_id WHERE g.closed_at IS NULL ORDER BY g.id").fetchone()
        old.close()
        new.close()
        upgrade(connect(f"sqlite:///{folder}/fincoach.db"))
        day = from_micros(newest).astimezone(UTC).date()
        app = create_app(parts_of(f"sqlite:///{folder}/fincoach.db", artifacts or ROOT / "artifacts/enhanced", Clock.of_day(day), environ))
        token, operator = make_token(keys_from(environ), name, time.time(), "user", 1), make_token(keys_from(environ), "night-shift", time.time(), "admin", 1)
        with TestClient(app, headers={"authorization": f"Bearer {token}"}) as client:
            found = asked(client, operator, goal_id, datetime(day.year, day.month, day.day, 9, 30, tzinfo=UTC))
    path = ROOT / "fincoach/api/examples.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{len(found)} examples about {name} on {day} in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
