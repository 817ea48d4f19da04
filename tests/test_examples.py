"""The answers that the API's documentation shows are answers it would give."""

import json
import secrets

import pytest
from pydantic import TypeAdapter, ValidationError

from fincoach.api.app import close_parts, create_app, parts_of
from fincoach.api.examples import examples
from fincoach.data.database import connect, upgrade


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app on an empty database."""
    home = tmp_path_factory.mktemp("examples")
    url = f"sqlite:///{home}/fincoach.db"
    engine = connect(url)
    upgrade(engine)
    engine.dispose()
    parts = parts_of(url, home / "artifacts", environ={"FINCOACH_JWT_SECRET": secrets.token_hex(32)})
    yield create_app(parts)
    close_parts(parts)


@pytest.fixture(scope="module")
def answers(app):
    """`METHOD path` -> the model of its answer, for every route that has one."""
    return {f"{next(iter(r.methods))} {r.path}": r.response_model for r in app.routes if getattr(r, "response_model", None)}


@pytest.mark.parametrize("name", sorted(examples()))
def test_an_example_fits_its_schema(name, answers):
    if name in answers:
        TypeAdapter(answers[name]).validate_json(json.dumps(examples()[name]["body"]))


def test_an_example_that_does_not_fit_is_found(answers):
    body = examples()["GET /coaching/user-segment"]["body"] | {"confidence": "much"}
    with pytest.raises(ValidationError):
        TypeAdapter(answers["GET /coaching/user-segment"]).validate_python(body)


def test_every_personal_question_has_an_example(answers):
    asked = {n for n in answers if n.split(" ")[1].startswith(("/coaching/", "/financial/"))}
    assert asked <= {*examples(), "POST /coaching/behavioral-event", "POST /financial/event"}
    assert len(asked) > 10


def test_the_document_shows_them(app):
    told = app.openapi()
    shown = told["paths"]["/coaching/spending-prediction"]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    assert shown == examples()["GET /coaching/spending-prediction"]["body"]
    assert len(shown["weeks"]) == 12
