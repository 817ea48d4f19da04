"""The whole API as its document describes it, with good and bad requests made from the document, alone and following its links: nothing fails, every answer fits its schema.

`FINCOACH_FUZZ=300 pytest tests/test_whole_api.py -n 0 -s` tries fifty times as much.
"""

import os
import secrets
import time
from collections import Counter
from datetime import UTC, date, datetime

import pytest
import schemathesis
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.checks import not_a_server_error
from schemathesis.core import NOT_SET
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fincoach.api.access import POLICY, Limits, keys_from, make_token
from fincoach.api.app import close_parts, create_app, parts_of
from fincoach.api.asking import Clock, Pool
from fincoach.data.database import connect, load, upgrade
from fincoach.data.population import generate
from fincoach.data.rights import Places
from fincoach.data.tables import TABLES

FREE = Limits(caller=(1e6, 1e6), address=(1e6, 1e6))
ENVIRON = {"FINCOACH_JWT_SECRET": secrets.token_hex(32)}
EXAMPLES = int(os.environ.get("FINCOACH_FUZZ", "6"))
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
ME = "person-00001"
SETTINGS = {"database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck), "derandomize": EXAMPLES <= 6}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app on a few people without trained models; person 1 has two goals."""
    home = tmp_path_factory.mktemp("whole")
    engine = connect(f"sqlite:///{home}/fincoach.db")
    upgrade(engine)
    load(engine, generate(people=4, days=150, seed=3).frames)
    with engine.begin() as c:
        for number, due in ((901, datetime(2024, 12, 1, tzinfo=UTC)), (902, None)):
            c.execute(sa.insert(TABLES["financial_goals"]).values(id=number, user_id=1, name=f"boat {number}", target_minor=400_000, currency="EUR", created_at=datetime(2024, 3, 1, tzinfo=UTC), due_at=due))
    places = Places(home / "work", home / "reports", home / "artifacts")
    made = create_app(parts_of(engine, places.artifacts, Clock.of_day(date(2024, 7, 1)), ENVIRON, FREE, Pool(budget=120), places), FREE)
    for aside in (made.state.fincoach.access.reads, made.state.fincoach.access.notes.aside):
        aside.patience = 60  # a machine that is busy is not what is tested here
    yield made
    close_parts(made.state.fincoach)


def head(path: str) -> dict[str, str]:
    """Who asks: below /admin an operator, else a person; numbers of events are never taken for tokens."""
    who, role = ("night-shift", "admin") if path.startswith("/admin") else (ME, "user")
    return {"authorization": f"Bearer {make_token(keys_from(ENVIRON), who, time.time(), role, token_id=f'{role} of the test')}"}


def about_oneself(case):
    """A request about somebody else is refused before anything else is looked at, and goals of a made-up number are not there: most are about oneself, and what is there."""
    if case.query is not None and case.query is not NOT_SET:
        case.query.pop("user", None)
    if case.path_parameters is not None and case.path_parameters is not NOT_SET and "goal_id" in case.path_parameters:
        case.path_parameters["goal_id"] = 901


def checked(tried, case, answer):
    """Counts an answer, and holds it against the document."""
    tried[case.operation.label, answer.status_code] += 1
    case.validate_response(answer, checks=CHECKS)


def test_each_question_alone(app):
    """Every operation of the document is asked with what fits and with what does not."""
    schema, tried = schemathesis.openapi.from_asgi("/openapi.json", app), Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        @seed(7)
        @settings(max_examples=EXAMPLES, **SETTINGS)
        @given(case=operation.as_strategy(), own=st.integers(0, 3))  # of this round: it is run at once
        def one(case, own):
            if own:
                about_oneself(case)
            checked(tried, case, case.call(headers=head(case.path)))

        one()
    asked = {label for label, _ in tried}
    told = {f"{method} {path}" for (method, path), policy in POLICY.items() if path in {o.ok().path for o in schema.get_all_operations()}}
    assert asked == told, "every operation, /me and /admin too"
    assert {s for _, s in tried} >= {200, 202, 404, 422}
    print(f"{sum(tried.values())} requests to {len(asked)} operations: {dict(Counter(s for (_, s), n in tried.items() for _ in range(n)))}")


def test_questions_that_lead_to_others(app):
    """A recommendation is answered, a goal is asked about, the log is read on: by the links that the document gives, many steps in a row."""
    schema, tried, followed = schemathesis.openapi.from_asgi("/openapi.json", app), Counter(), Counter()
    links = {(label, name) for label, operation in ((o.ok().label, o.ok()) for o in schema.get_all_operations())
             for response in operation.definition.raw["responses"].values() for name in response.get("links", {})}
    assert len(links) >= 4, "goals lead to chances, a segment to advice, advice to an answer, the log onwards"

    class Walk(schema.as_state_machine()):
        def before_call(self, case):
            if case.query is not None and case.query is not NOT_SET:
                case.query.pop("user", None)

        def get_call_kwargs(self, case):
            return {"headers": head(case.path)}

        def step(self, input):
            made = super().step(input)
            if made is not None and input.transition is not None and input.is_applied:
                followed[input.transition.id, made.response.status_code] += 1
            return made

        def validate_response(self, response, case, **more):
            checked(tried, case, response)

    run_state_machine_as_test(Walk, settings=settings(max_examples=3 * EXAMPLES, stateful_step_count=6, **SETTINGS))
    print(f"{sum(tried.values())} steps, {sum(followed.values())} of them by links: {dict(followed)}")
    arrived = {name.split("] ")[1].split(" -> ")[0] for name, status in followed if status in (200, 409)}
    assert arrived == {name for _, name in links}, "each link led to an answer, or to the word that silence asks for none"
