"""Versions that come and go under load: one request meets one of each model, bad ones never serve or go by themselves, and who asks notices nothing."""

import gc
import json
import pickle
import random
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT
from test_recommendation import HOSTILE, WIDE, Trap, World, by_chance

from fincoach.data.database import DatabaseError, connect, load, upgrade
from fincoach.features.state import ENHANCED_NAMES
from fincoach.serving import EnhancedModelManager, ServiceError
from fincoach.serving.actions import ACTION_NAMES
from fincoach.serving.artifacts import (
    canaries,
    canary,
    champion,
    end_canary,
    history,
    meets_canary,
    open_version,
    promote,
    publish,
    rollback,
    serving,
)
from fincoach.serving.cache import Made, PredictionCache, Question
from fincoach.serving.manager import MODELS, TRIAL_DAY, Kind, LoadError, ModelLoader, _made_up, unsound
from fincoach.serving.network import Network

NOW = datetime(2024, 7, 1, 9, tzinfo=UTC)
MORNING = datetime(2024, 10, 2, 9, tzinfo=UTC)


# ---------------------------------------------------------------------------------------------------- small services


class Small:
    """A service whose file holds its version's name and a number; it answers with both."""

    model = "left"

    def __init__(self, engine, artifacts, version=None):
        self.engine, version = engine, version or champion(artifacts, self.model)
        self.status = ("model", version, "") if version else ("rules", "rules-1", "there is no trained model yet")
        self.held = json.loads(open_version(artifacts, self.model, version).read("model.json")) if version else {"version": "rules-1", "number": 0.0, "weight": []}

    def answer(self):
        return {"version": self.held["version"], "number": self.held["number"]}


class Right(Small):
    model = "right"


KINDS = {"left": Kind(Small, lambda s, user, day: s.answer()), "right": Kind(Right, lambda s, user, day: s.answer())}


def put(root, model, version, number=1.0, size=0):
    """A published version of a small service."""
    publish(root, model, version, {"model.json": json.dumps({"version": version, "number": number, "weight": [0.5] * size}).encode()}, {})
    return version


def until(true, seconds=10.0):
    """Wait for what a thread does; how long it took."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it did not happen"
        time.sleep(0.002)
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def person():
    made = _made_up()
    yield made
    made.dispose()


@pytest.fixture
def root(tmp_path):
    """Three versions of two models; `a` of both serves."""
    for model in KINDS:
        for version in ("a", "b", "c"):
            put(tmp_path, model, version, number=float(ord(version)))
        promote(tmp_path, model, "a")
    return tmp_path


@pytest.fixture
def manager(root, person):
    made = EnhancedModelManager(person, root, KINDS, look_every=0.0)
    made.preload()
    yield made
    made.close()


def answers(manager, model="left", users=range(40)):
    """Which versions people meet."""
    lineup = manager.lineup()
    return {lineup.of(u)[model].version for u in users}


# ---------------------------------------------------------------------------------------------------- lineups


def test_nothing_is_opened_before_it_is_asked_for_and_then_once(root, person, monkeypatch):
    opened, real = [], ModelLoader.load
    monkeypatch.setattr(ModelLoader, "load", lambda self, name, version: (opened.append((name, version)), time.sleep(0.02), real(self, name, version))[2])
    manager = EnhancedModelManager(person, root, KINDS)
    lineup = manager.lineup()
    assert opened == []
    assert lineup.versions == {"left": "a", "right": "a"}
    threads = [threading.Thread(target=lambda: lineup.left.answer()) for _ in range(20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert opened == [("left", "a")]
    assert manager.status()["right"]["open"] is False
    with pytest.raises(KeyError, match="there are left, right"):
        lineup["middle"]
    with pytest.raises(AttributeError):
        lineup.middle  # noqa: B018


def test_rules_are_called_the_same_before_they_are_asked_and_after(person, tmp_path):
    """Else equal questions at once were two questions, while the process starts."""
    manager = EnhancedModelManager(person, tmp_path)
    before = manager.lineup().versions
    manager.preload()
    assert manager.lineup().versions == before
    assert all(state["version"] == before[name] and state["open"] for name, state in manager.status().items())
    manager.close()


def test_thousands_of_swaps_under_load_mix_nothing_and_fail_nobody(manager, root):
    """Four threads ask both models again and again through one lineup each, while champions change 3,000 times: in a request a model is always the same, and
    each answer names the version that made it."""
    stop, wrong, seen, requests = threading.Event(), [], set(), [0] * 4

    def request(i):
        rng = random.Random(i)
        while not stop.is_set():
            try:
                lineup, met = manager.lineup().of(rng.randrange(1000)), {}
                for _ in range(6):
                    model = rng.choice(("left", "right"))
                    asked = lineup.ask(model, lambda s: s.answer())
                    if asked.answer != {"version": asked.version, "number": float(ord(asked.version))} or met.setdefault(model, asked.version) != asked.version:
                        wrong.append((model, met, asked))
                seen.update(met.items())
                requests[i] += 1
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=request, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    rng, plan = random.Random(9), serving(root)
    for n in range(3_000):
        plan = plan | {rng.choice(("left", "right")): plan["left"]._replace(version=rng.choice("abc"), changes=n)}
        manager._follow(plan)
        if n % 50 == 0:
            time.sleep(0.002)
    stop.set()
    for t in threads:
        t.join()
    assert wrong == []
    assert len(seen) == 6, "every version of both answered"
    assert manager.counts["swapped"] > 1_000
    assert min(requests) > 50
    until(lambda: manager.lineup().versions == {m: plan[m].version for m in KINDS})


def test_real_promotions_are_followed_within_a_second(manager, root):
    """Sixty times another champion in the file, asked for all the while in a thread."""
    stop, wrong = threading.Event(), []

    def request():
        while not stop.is_set():
            asked = manager.lineup().ask("left", lambda s: s.answer())
            if asked.answer["version"] != asked.version:
                wrong.append(asked)

    thread = threading.Thread(target=request)
    thread.start()
    took = []
    for i in range(60):
        promote(root, "left", "abc"[(i + 1) % 3])
        took.append(until(lambda i=i: manager.lineup()["left"].version == "abc"[(i + 1) % 3]))
    stop.set()
    thread.join()
    assert wrong == []
    assert sorted(took)[-3] < 1.0
    assert [h["version"] for h in history(root, "left")][-3:] == ["b", "c", "a"]


def test_looking_costs_one_stat_at_most_so_often(root, person, monkeypatch):
    manager = EnhancedModelManager(person, root, KINDS, look_every=0.2)
    looks, real = [], manager.updater.changed
    monkeypatch.setattr(manager.updater, "changed", lambda: (looks.append(1), real())[1])
    begun = time.monotonic()
    for _ in range(20_000):
        manager.lineup()
    assert len(looks) <= 1 + (time.monotonic() - begun) / 0.2


# ---------------------------------------------------------------------------------------------------- bad versions


def bent(root, model, version, how):
    """Damage the file of a version."""
    file = Path(root, model, version, "model.json")
    data = bytearray(file.read_bytes())
    file.unlink()
    if how == "a bit":
        data[len(data) // 2] ^= 1
    if how != "gone":
        file.write_bytes(data[:-3] if how == "cut" else data)


@pytest.mark.parametrize(("how", "kind"), [("a bit", "altered"), ("cut", "cut"), ("gone", "missing")])
def test_a_damaged_new_version_never_serves_and_is_taken_once_repaired(manager, root, how, kind):
    promote(root, "left", "b")
    bent(root, "left", "b", how)
    manager.lineup()
    until(lambda: manager.status()["left"]["wrong"])
    assert answers(manager) == {"a"}
    assert manager.status()["left"]["wrong"] == [f"left b cannot be used: a part of it is {kind}"]
    assert manager.counts["refused"] == 1
    put(root, "left", "b", number=98.0)  # publishing again repairs
    manager.retry_every = manager._again = 0.0
    until(lambda: answers(manager) == {"b"})
    assert manager.status()["left"]["wrong"] == []


def test_at_start_the_newest_sound_champion_serves(root, person):
    for version in ("b", "c"):
        promote(root, "left", version)
    bent(root, "left", "c", "a bit")
    manager = EnhancedModelManager(person, root, KINDS)
    served = manager.lineup()["left"]
    assert (served.version, served.method) == ("b", "model")
    assert served.why == "left c cannot be used: a part of it is altered; b answers in its place"
    bent(root, "left", "b", "cut")
    assert EnhancedModelManager(person, root, KINDS).lineup()["left"].version == "a"


@pytest.mark.parametrize("what", ["garbage", "gone", "a folder", "newer"])
def test_a_damaged_list_of_champions_changes_nothing(manager, root, what):
    file = root / "champions.json"
    file.unlink()
    if what == "a folder":
        file.mkdir()
    elif what != "gone":
        file.write_text('{"format": 99}\n' if what == "newer" else "{")
    assert answers(manager) == {"a"}
    if what != "gone":
        assert "champions.json cannot be used" in manager.status()["left"]["wrong"][0]
        assert str(root) not in str(manager.status())
    file.rmdir() if what == "a folder" else file.unlink(missing_ok=True)
    promote(root, "left", "b")
    until(lambda: answers(manager) == {"b"})
    assert manager.status()["left"]["wrong"] == []


def test_a_version_that_fails_on_trial_never_meets_anybody(root, person):
    def trial(service, user, day):
        assert (user, day) == (1, TRIAL_DAY)
        return {"number": float("nan")} if service.held["version"] == "b" else 1 / (service.held["number"] - 99.0)

    manager = EnhancedModelManager(person, root, {"left": Kind(Small, trial)}, look_every=0.0)
    assert answers(manager) == {"a"}
    for version, why in (("b", "failed on trial: the answer is not a number"), ("c", "failed on trial: ZeroDivisionError: float division by zero")):
        promote(root, "left", version)
        manager.lineup()
        until(lambda why=why: why in "".join(manager.status()["left"]["wrong"]))
        assert answers(manager) == {"a"}


def test_a_poisoned_pickle_is_refused_and_nothing_of_it_runs(person, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for model in MODELS:
        names = {"segmentation": ["segmentation.json", "people.npz"], "recommendation": ["policy.json", WIDE, "segmentation.json"], "health": ["health.json"]}.get(model, [f"{model}.json", f"{model}.onnx"])
        publish(tmp_path / "artifacts", model, "poisoned", dict.fromkeys([*names, "model.pkl", "model.pth", "model.joblib"], trap), {})
        promote(tmp_path / "artifacts", model, "poisoned")
    manager = EnhancedModelManager(person, tmp_path / "artifacts")
    for model in MODELS:
        assert manager.lineup()[model].method == "rules"
        assert manager.status()[model]["wrong"][0].startswith(f"{model} poisoned cannot be used")
    assert not (tmp_path / "sprung").exists()


# ---------------------------------------------------------------------------------------------------- canaries


def test_a_canary_meets_always_the_same_people(manager, root):
    canary(root, "left", "b", 0.3)
    until(lambda: answers(manager) == {"a", "b"})
    met = {u for u in range(1000) if manager.lineup().of(u)["left"].version == "b"}
    assert met == {u for u in range(1000) if meets_canary("left", "b", 0.3, u)}
    assert 250 < len(met) < 350
    assert answers(manager, "right") == {"a"}
    canary(root, "left", "b", 0.6)
    until(lambda: manager.lineup()._canaries["left"].wanted.share == 0.6)
    more = {u for u in range(1000) if manager.lineup().of(u)["left"].version == "b"}
    assert met < more, "who met it goes on meeting it"
    canary(root, "left", "c", 0.6)
    until(lambda: answers(manager) == {"a", "c"})
    other = {u for u in range(1000) if manager.lineup().of(u)["left"].version == "c"}
    assert 100 < len(more - other) < 400, "another canary meets other people"
    code = "import sys; from fincoach.serving.artifacts import meets_canary; print([u for u in range(1000) if meets_canary('left', 'b', 0.3, u)])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == str(sorted(met)), "also in another process"


@pytest.mark.parametrize("how", ["ended", "rolled back", "another promoted"])
def test_a_canary_with_half_of_the_traffic_is_gone_within_a_second_and_its_answers_too(root, person, tmp_path, how):
    """Readers ask through a cache all the while. A second after the canary was taken back nobody gets an answer of it, kept or new."""
    database = connect(f"sqlite:///{tmp_path}/people.db")
    upgrade(database)
    load(database, {"users": pl.DataFrame({"id": list(range(1, 21)), "external_id": [f"p{i}" for i in range(20)], "currency": "EUR", "created_at": NOW})})
    promote(root, "left", "c")  # so that there is one to go back to
    manager, cache = EnhancedModelManager(person, root, KINDS, look_every=0.01), PredictionCache(database)
    manager.preload()
    canary(root, "left", "b", 0.5)
    until(lambda: answers(manager) == {"b", "c"})
    told, stop = [], threading.Event()

    def request(i):
        rng = random.Random(i)
        while not stop.is_set():
            user, begun = rng.randrange(1, 21), time.monotonic()
            lineup = manager.lineup().of(user)
            question = Question(user, "spending", TRIAL_DAY, lineup["left"].version, "f")

            def make(lineup=lineup):
                asked = lineup.ask("left", lambda s: s.answer())
                return Made(asked.answer, asked.version)

            kept = cache.answer(question, NOW, make)
            told.append((begun, kept.model_version, json.loads(kept.body)["version"], kept.cached))

    threads = [threading.Thread(target=request, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    until(lambda: len(told) > 300)
    {"ended": lambda: end_canary(root, "left"), "rolled back": lambda: rollback(root, "left"), "another promoted": lambda: promote(root, "left", "a")}[how]()
    over, many = time.monotonic(), len(told)
    until(lambda: time.monotonic() > over + 1.2)
    stop.set()
    for t in threads:
        t.join()
    assert all(version == label for _, label, version, _ in told)
    assert {v for _, _, v, _ in told[:many]} >= {"b", "c"}
    assert any(v == "b" and cached for _, _, v, cached in told[:many]), "the canary's answers were kept"
    after = [t for t in told if t[0] > over + 1.0]
    assert len(after) > 20
    assert {v for _, _, v, _ in after} == {"c" if how == "ended" else "a"}
    assert serving(root)["left"].canary is None
    assert canaries(root, "left")[-1]["share"] == 0
    cache.close()
    database.dispose()


def raises(service):
    if service.held["version"] == "b":
        raise ArithmeticError("overflow")
    return service.answer()


def no_number(service):
    return service.answer() | ({"number": float("nan")} if service.held["version"] == "b" else {})


def late(service):
    if service.held["version"] == "b":
        time.sleep(10)
    return service.answer()


@pytest.mark.parametrize(("call", "why"), [(raises, "ArithmeticError: overflow"), (no_number, "the answer is not a number"), (late, "no answer within 0.1 seconds")])
def test_a_challenger_that_fails_is_answered_for_in_budget_and_taken_back_by_itself(manager, root, call, why):
    canary(root, "left", "b", 1.0, why="a try")
    until(lambda: answers(manager) == {"b"})
    asked, took = [], []
    for user in range(8):
        begun = time.monotonic()
        asked.append(manager.ask("left", user, call, budget_s=0.2))
        took.append(time.monotonic() - begun)
    assert {(a.version, a.canary, a.answer["version"]) for a in asked} == {("a", False, "a")}
    assert max(took) < 2, "the budget and what a busy machine adds; the late one takes ten seconds"
    events = [a.event for a in asked if a.event]
    assert [(e.what, e.model, e.version, e.to) for e in events] == [("rolled back", "left", "b", "a")]
    assert asked.index(next(a for a in asked if a.event)) == 4, "after five failures"
    assert answers(manager) == {"a"}
    until(lambda: serving(root)["left"].canary is None)
    assert canaries(root, "left")[-1] == {"version": "b", "share": 0.0, "why": f"taken back after 5 failures, the last: {why}"}
    manager.lineup()
    assert manager.counts == {"canary begun": 1, "rolled back": 1}
    canary(root, "left", "b", 1.0, why="mended")  # a new try begins anew
    until(lambda: answers(manager) == {"b"})
    assert manager.ask("left", 1, lambda s: s.answer()) == ({"version": "b", "number": 98.0}, "b", True, None)


def test_many_who_wait_for_a_hanging_challenger_hold_up_nobody(manager, root):
    """Eight of its answers hang; then it is not even asked."""
    canary(root, "left", "b", 1.0)
    until(lambda: answers(manager) == {"b"})
    manager.health.most, gate, begun = 10_000, threading.Event(), []

    def hangs(service):
        if service.held["version"] == "b":
            begun.append(1)
            gate.wait(20)
        return service.answer()

    start = time.monotonic()
    assert {manager.ask("left", u, hangs, budget_s=0.02).version for u in range(100)} == {"a"}
    assert time.monotonic() - start < 5
    assert len(begun) == 8
    gate.set()
    until(lambda: manager._late._value == 8)
    assert manager.ask("left", 1, lambda s: s.answer()).version == "b"


def test_what_is_the_callers_or_the_databases_fault_takes_nobody_back(manager, root):
    canary(root, "left", "b", 1.0)
    until(lambda: answers(manager) == {"b"})

    def fails(error):
        def call(service):
            raise error

        return call

    for error in (ServiceError("no such goal"), DatabaseError("away"), KeyError("the caller's own")):
        for user in range(12):
            with pytest.raises(type(error)):
                manager.ask("left", user, fails(error))
    assert answers(manager) == {"b"}
    assert manager.health.report("left", "b")["failures"] == 0


def test_when_it_cannot_be_written_it_is_taken_back_here_all_the_same(manager, root, monkeypatch):
    canary(root, "left", "b", 1.0)
    until(lambda: answers(manager) == {"b"})

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fincoach.serving.manager.end_canary", full)
    for user in range(6):
        manager.ask("left", user, raises)
    until(lambda: manager.status()["left"]["wrong"])
    assert manager.status()["left"]["wrong"] == ["this could not be written to champions.json: [Errno 28] No space left on device"]
    promote(root, "right", "b")  # the file changes, and still names the canary
    until(lambda: answers(manager, "right") == {"b"})
    assert serving(root)["left"].canary == "b"
    assert answers(manager) == {"a"}


def test_a_champion_that_fails_again_and_again_goes_back_to_the_last_good_one(manager, root):
    promote(root, "left", "b")
    until(lambda: answers(manager) == {"b"})
    for _ in range(5):
        assert answers(manager) == {"b"}
        with pytest.raises(ArithmeticError):
            manager.ask("left", 1, raises)
    until(lambda: answers(manager) == {"a"})
    assert manager.ask("left", 1, raises).version == "a"
    until(lambda: champion(root, "left") == "a")
    assert history(root, "left")[-1] == {"version": "a", "why": "taken back after 5 failures, the last: ArithmeticError: overflow"}
    for _ in range(20):  # the last one there is: nothing to go back to, so it stays
        with pytest.raises(ZeroDivisionError):
            manager.ask("left", 1, lambda s: 1 / 0)
    assert answers(manager) == {"a"}


def test_a_fault_now_and_then_takes_nobody_back(manager, root):
    promote(root, "left", "b")
    until(lambda: answers(manager) == {"b"})
    for n in range(300):
        if n % 30 == 0:
            with pytest.raises(ArithmeticError):
                manager.ask("left", 1, raises)
        else:
            manager.ask("left", 1, lambda s: s.answer())
    assert answers(manager) == {"b"}
    assert manager.health.report("left", "b") == {"answers": 300, "failures": 10, "last_failure": "ArithmeticError: overflow"}


# ---------------------------------------------------------------------------------------------------- memory


def test_versions_are_let_go_by_number_and_by_size_but_never_one_in_use(root, person):
    for n in range(12):
        put(root, "left", f"v{n:02}", size=4_000)
    manager = EnhancedModelManager(person, root, KINDS, most=4, look_every=0.0)
    manager.preload()
    held = manager.lineup()
    alive = weakref.ref(held["left"].service)
    for n in range(12):
        promote(root, "left", f"v{n:02}")
        until(lambda n=n: answers(manager) == {f"v{n:02}"})
        assert manager.registry.report()["versions"] <= 4
    assert manager.registry.report()["open"][-1] == "left v11"
    assert "right a" in manager.registry.report()["open"], "it serves, however long ago it was opened"
    assert held.left.answer()["version"] == "a", "who holds a lineup keeps what is in it"
    del held
    gc.collect()
    assert alive() is None, "then it is gone"
    one = manager.registry.get("left", "v11").bytes
    assert 4_000 * 8 < one < 4_000 * 40
    manager.registry.most, manager.registry.most_bytes = 100, int(2.5 * one)
    for n in range(5):
        promote(root, "left", f"v{n:02}")
        until(lambda n=n: answers(manager) == {f"v{n:02}"})
        assert manager.registry.report()["bytes"] <= 2.5 * one + 10_000


# ---------------------------------------------------------------------------------------------------- the real services


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def test_the_real_service_of_advice_swaps_under_load_and_each_answer_is_its_versions_own(world, person, tmp_path):
    """The values of each answer are those of the network of the version it names."""
    other = by_chance(ENHANCED_NAMES, 77)
    world.publish(tmp_path, "second", **{WIDE.replace(".", "__"): other, "policy__json": replace(world.policy, version="second").to_json().encode()})
    world.publish(tmp_path, "first")
    manager = EnhancedModelManager(person, tmp_path, look_every=0.0)
    nets = {"first": Network(world.files[WIDE], 35, 12), "second": Network(other, 35, 12)}
    seen, stop = [], threading.Event()

    def request():
        while not stop.is_set():
            seen.append(manager.lineup().ask("recommendation", lambda s: s.get_recommendation(world.states[3])))

    threads = [threading.Thread(target=request) for _ in range(3)]
    for t in threads:
        t.start()
    for i in range(20):
        promote(tmp_path, "recommendation", ("second", "first")[i % 2])
        until(lambda i=i: manager.lineup()["recommendation"].version == ("second", "first")[i % 2])
    stop.set()
    for t in threads:
        t.join()
    assert {a.version for a in seen} == {"first", "second"}
    for asked in seen:
        assert asked.answer.model_version == asked.version
        assert [asked.answer.values[a] for a in ACTION_NAMES] == nets[asked.version](world.states[3:4])[0].tolist()


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_network_never_serves_the_last_good_version_goes_on(world, person, tmp_path, what):
    """Its hash is right: somebody who may publish made it. Part of the version would still answer; with a sound one at hand it does not get to."""
    manager = EnhancedModelManager(person, world.publish(tmp_path, "good"), look_every=0.0)
    assert manager.lineup()["recommendation"].version == "good"
    world.publish(tmp_path, "hostile", **{WIDE.replace(".", "__"): HOSTILE[what](list(ENHANCED_NAMES))})
    manager.lineup()
    until(lambda: manager.status()["recommendation"]["wrong"])
    assert manager.lineup()["recommendation"].version == "good"
    assert WIDE in manager.status()["recommendation"]["wrong"][0]


def test_without_artifacts_all_five_answer_by_rules_and_say_so(person, tmp_path):
    manager = EnhancedModelManager(person, tmp_path / "nothing")
    assert set(manager.preload()) == set(MODELS)
    for model, kind in MODELS.items():
        served = manager.lineup()[model]
        assert served.method == "rules"
        assert served.why
        assert unsound(kind.trial(served.service, 1, TRIAL_DAY)) == ""


def test_the_manager_starts_fast_and_needs_nothing_heavy(tmp_path):
    code = """
import sys
from fincoach.serving import EnhancedModelManager
heavy = [m for m in ("torch", "sklearn", "pandas", "onnxruntime", "fastapi", "alembic") if m in sys.modules]
manager = EnhancedModelManager("sqlite://", sys.argv[1])
assert manager.lineup().versions["spending"] == "rules-1"
assert not any(state["open"] for state in manager.status().values())
print(heavy)
"""
    out = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_made_up_person_is_enough_for_all_five_and_never_in_a_real_database(person):
    with person.connect() as c:
        assert c.exec_driver_sql("SELECT count(*) FROM transactions").scalar() > 150
        assert c.exec_driver_sql("SELECT external_id FROM users").scalar() == "made-up"
    assert not isinstance(person.pool, sa.pool.QueuePool)


def test_a_version_that_answers_under_another_name_is_refused(root, person):
    class Liar(Small):
        def __init__(self, engine, artifacts, version=None):
            super().__init__(engine, artifacts, version)
            self.status = ("model", "somebody else", "")

    with pytest.raises(LoadError, match="somebody else answers in its place"):
        ModelLoader(person, root, {"left": Kind(Liar, lambda s, user, day: 1.0)}).load("left", "a")
