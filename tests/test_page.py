"""The page about a person, in a real browser: on a phone, by keyboard, with names that are no markup, and when the token is wrong."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from conftest import ROOT

from fincoach.api.access import keys_from, make_token
from fincoach.data.database import connect, load, upgrade, writing
from fincoach.data.population import generate
from fincoach.data.tables import TABLES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: the page is not looked at in a browser")]

SERVE = """
import sys
from datetime import date
from fincoach.api.app import create_app, parts_of
from fincoach.api.asking import Clock
import uvicorn
database, artifacts, day, port = sys.argv[1:]
app = create_app(parts_of(database, artifacts, Clock.of_day(date.fromisoformat(day))))
uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")
"""
HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server on a few people, without trained models: (address, tokens by name, engine)."""
    home = tmp_path_factory.mktemp("page")
    url = f"sqlite:///{home}/fincoach.db"
    engine = connect(url)
    upgrade(engine)
    frames = generate(people=12, days=400, seed=11).frames
    load(engine, frames)
    t = TABLES["transactions"]
    with writing(engine) as c:
        newest = c.scalar(sa.select(sa.func.max(t.c.occurred_at)))
        c.execute(sa.update(t).values(merchant=HOSTILE))
    environ = {**os.environ, "FINCOACH_JWT_SECRET": secrets.token_hex(32), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SERVE, url, str(home / "artifacts"), str(newest.date()), str(port)], env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
        names = frames["users"]["external_id"].to_list()
        yield address, {n: make_token(keys_from(environ), n, datetime.now(UTC).timestamp(), "user", 1) for n in names}, engine
    finally:
        process.terminate()
        process.communicate(timeout=20)
        engine.dispose()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def tab(browser):
    """A page as wide as a phone, and what its console said."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, reduced_motion="reduce")
    made = context.new_page()
    said = []
    made.on("console", lambda m: said.append(m.text))
    made.on("pageerror", lambda e: said.append(str(e)))
    yield made, said
    context.close()


def test_a_person_sees_everything_on_a_phone(served, tab):
    (address, tokens, _), (page, said) = served, tab
    name, token = next(iter(tokens.items()))
    page.goto(f"{address}/#token={token}")
    page.wait_for_selector("#card section")
    assert page.locator("#card section").count() == 5
    assert page.locator("#balance svg").count() >= 1
    assert "Lowest" in page.inner_text("#balance")
    assert name in page.title()
    assert "token" not in page.url, "nobody reads it over a shoulder, or out of a history"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than the phone"
    small = page.evaluate("[...document.querySelectorAll('#card button')].filter(b => b.getBoundingClientRect().height < 44).length")
    assert small == 0, "a thumb is 44 pixels wide"
    assert said == [], "no fault, and nothing that the page's policy had to stop"
    assert HOSTILE in page.content().replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"'), "the merchant is shown, as text"
    assert page.locator("#card img").count() == 0


def test_what_the_page_advises_is_counted_once_and_open_goals_are_told(served, tab):
    """Shown twice and asked for by the API too, it is one advice; a goal that is open is on the page, whether or not there is more to say about it."""
    (address, tokens, engine), (page, _) = served, tab
    name, token = list(tokens.items())[4]

    def ask(path, headers=None):
        with urllib.request.urlopen(urllib.request.Request(f"{address}{path}", headers=headers or {}), timeout=60) as answer:
            return answer.read().decode()

    def counted():
        return sum(float(line.rpartition(" ")[2]) for line in ask("/metrics").splitlines() if line.startswith("fincoach_advice_total{"))

    with writing(engine) as c:
        user = c.scalar(sa.select(TABLES["users"].c.id).where(TABLES["users"].c.external_id == name))
        newest = c.scalar(sa.select(sa.func.max(TABLES["transactions"].c.occurred_at)))
        c.execute(sa.insert(TABLES["financial_goals"]).values(id=9901, user_id=user, name="A very far goal", target_minor=10**10, currency="EUR", created_at=newest - timedelta(days=90), due_at=newest + timedelta(days=60)))
    before = counted()
    page.goto(f"{address}/#token={token}")
    page.wait_for_selector("#card section")
    assert "A very far goal" in page.inner_text("#goals")
    page.reload()
    page.wait_for_selector("#card section")
    assert ask("/coaching/recommendation", {"authorization": f"Bearer {token}"})
    assert counted() == before + 1


def test_it_works_by_keyboard_alone(served, tab):
    (address, tokens, engine), (page, _) = served, tab
    name, token = list(tokens.items())[2]
    page.goto(address)
    page.wait_for_selector("#token")
    assert page.evaluate("document.activeElement.id") == "token"
    page.keyboard.type(token)
    page.keyboard.press("Enter")
    page.wait_for_selector("#card section")
    assert page.evaluate("document.activeElement.id") == "card", "a screen reader begins to read here"
    if page.locator("[data-response]").count() == 0:
        pytest.fail(f"{name} was given no advice: choose another person, or this shows nothing")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.response") == "accepted":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "one sees where one is"
    page.keyboard.press("Enter")
    page.locator("#answered", has_text="Noted, thank you.").wait_for()
    with engine.connect() as c:
        assert c.scalar(sa.select(TABLES["recommendation_feedback"].c.response).order_by(TABLES["recommendation_feedback"].c.id.desc())) == "accepted"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.reload()
    page.wait_for_selector("#card section")  # still signed in, in this tab


def test_a_wrong_token_says_so_and_shows_nothing(served, tab):
    (address, tokens, _), (page, _) = served, tab
    page.goto(f"{address}/#token=nonsense")
    page.locator("#said", has_text="token").wait_for()
    assert page.locator("#card section").count() == 0
    one, other = list(tokens)[:2]
    page.fill("#token", tokens[one])
    page.fill("#user", other)
    page.press("#user", "Enter")
    page.locator("#said", has_text=re.compile("[a-z]{3}.*:")).wait_for()
    assert page.is_visible("#sign-in")
    assert page.locator("#card section").count() == 0, "somebody else's card is not shown"
    assert page.evaluate("sessionStorage.length") == 0
