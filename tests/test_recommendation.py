"""One decision for one person: exact, stored, explained, within limits, and never from a file that cannot be trusted."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import sqlalchemy as sa
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fincoach.data.database import VERSION_TABLE, DatabaseError, connect, load, reading, upgrade, writing
from fincoach.data.population import generate
from fincoach.data.tables import SEGMENTS, TABLES
from fincoach.features.behavior import FEATURES, NAMES, extract
from fincoach.features.ledger import Ledgers
from fincoach.features.state import BASE, ENHANCED_NAMES, WEEKLY_NAMES, EnhancedStateVector, Peers, feature_config
from fincoach.serving import EnhancedCQLModelService, ServiceError
from fincoach.serving.actions import (
    ACTION_NAMES,
    STRATEGY_NAMES,
    Limits,
    eligible,
    in_stress,
    objections,
    strategy_mask,
)
from fincoach.serving.artifacts import promote, publish
from fincoach.serving.bandit import BanditState
from fincoach.serving.inference import Cluster, FeatureScaling, ParametersError, SegmentationParameters, standardise
from fincoach.serving.network import Network, NetworkError, check_graph
from fincoach.serving.policy import (
    PolicyParameters,
    action_probabilities,
    best_action,
    by_strategy,
    drawn,
    flips_of,
    mixed,
    parts_of,
    segments_of,
    usual_of,
    values_of,
)
from fincoach.serving.recommendation import RULES, _explain, _scorer, state_hash

DAY = date(2024, 10, 1)
MORNING = datetime(2024, 10, 2, 9, tzinfo=UTC)
PEOPLE = 40
HEAVY = ("torch", "sklearn", "pandas", "matplotlib", "plotly", "statsmodels", "onnx")
WIDE, NARROW = "enhanced_cql_model.onnx", "cql_model.onnx"
LIMITS = {"messages_per_week": 2, "quiet_from": 21, "quiet_until": 8, "rest_days": 14}


# ---------------------------------------------------------------------------------------------------- stand-ins


def tensor(name, values):
    values = np.asarray(values, np.float32)
    return helper.make_tensor(name, TensorProto.FLOAT, values.shape, values.tobytes(), raw=True)


def graph(names, nodes, weights, gives=12, notes=True) -> bytes:
    """An ONNX graph from `state` to `q`."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k]) for n, k in (("state", len(names)), ("q", gives))]
    made = helper.make_graph(nodes, "stand_in", ends[:1], ends[1:], weights)
    model = helper.make_model(made, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    if notes:
        helper.set_model_props(model, {"state_names": json.dumps(list(names)), "action_names": json.dumps(list(ACTION_NAMES))})
    return model.SerializeToString()


def by_chance(names, seed, gives=12, notes=True) -> bytes:
    """A network of the kind that training writes, its weights drawn by chance."""
    rng, big = np.random.default_rng(seed), {"money": 400, "money/week": 400, "weeks": 20, "days": 30, "purchases/week": 10}
    scale = np.array([1 / big.get(next((f.unit for f in FEATURES if f.name == n), ""), 1) for n in names])
    weights = [tensor("w0", rng.normal(size=(32, len(names))) * scale), tensor("b0", np.zeros(32)),
               tensor("w1", rng.normal(size=(gives, 32)) * 0.3), tensor("b1", np.zeros(gives))]  # fmt: skip
    nodes = [helper.make_node("Gemm", ["state", "w0", "b0"], ["h"], transB=1), helper.make_node("Relu", ["h"], ["r"]),
             helper.make_node("Gemm", ["r", "w1", "b1"], ["q"], transB=1)]  # fmt: skip
    return graph(names, nodes, weights, gives, notes)


class World:
    """Made-up people in a database, and the files of an artifact for them."""

    def __init__(self, folder):
        self.folder = folder
        made = generate(people=PEOPLE, days=300, seed=3)
        self.frames = {k: v for k, v in made.frames.items() if not k.startswith("recommendation")}
        self.X = extract(Ledgers.from_frames(self.frames), DAY)
        planted = made.truth["segments"].sort("user_id")["segment_id"].to_numpy()
        self.segmentation = centres(self.X, planted)
        self.segments = segments_of(self.segmentation, self.X)
        peers = Peers.fit(self.X, self.segments)
        self.calm = 1 + int(np.flatnonzero(~in_stress(self.X))[0])  # somebody who is not short of money
        self.states = EnhancedStateVector(self.X, self.segments, peers).state.values
        files = {WIDE: by_chance(ENHANCED_NAMES, 1), NARROW: by_chance(WEEKLY_NAMES, 2)}
        q = Network(files[WIDE], 35, 12)(self.states)
        self.policy = PolicyParameters("2024-10-01-made", DAY, ACTION_NAMES, 0.1, LIMITS, {"engagement": 1.0, "burden": 0.1}, peers.grid,
                                       usual_of(self.states), values_of(ACTION_NAMES, q), self.segmentation.version, feature_config()["hash"])  # fmt: skip
        self.files = files | {"policy.json": self.policy.to_json().encode(), "segmentation.json": self.segmentation.to_json().encode(),
                              "bandit_strategies.json": BanditState().to_json().encode()}  # fmt: skip

    def publish(self, folder, version="2024-10-01-made", **changed):
        """Publish the files, some of them changed (None: left out), and let them serve."""
        files = {k: v for k, v in (self.files | {k.replace("__", "."): v for k, v in changed.items()}).items() if v is not None}
        publish(folder, "recommendation", version, files, {})
        promote(folder, "recommendation", version)
        return folder


def centres(X, planted) -> SegmentationParameters:
    """A segmentation whose centres are the averages of the planted groups."""
    used = [j for j, f in enumerate(FEATURES) if f.role != "context" and f.scale == "linear" and np.isfinite(X[:, j]).mean() > 0.5]
    scalings = tuple(FeatureScaling(NAMES[j], "linear", float(np.nanmedian(X[:, j])), float(np.nanmean(X[:, j])), float(np.nanstd(X[:, j])) + 1e-9, 3.0) for j in used)
    draft = SegmentationParameters("draft", DAY, scalings, (Cluster(0, "draft", 0.0, 1.0, (0.0,) * len(used)),), 2.0, 0.1)
    z = standardise(draft, X[:, used])[0]
    clusters = tuple(Cluster(k, name, 0.8, float((planted == k).mean()) + 1e-6, tuple(z[planted == k].mean(0))) for k, name in enumerate(SEGMENTS))
    return replace(draft, version="2024-10-01-segments", clusters=clusters)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def fill(url, world, frames=None):
    """A database with the people in it and no advice yet."""
    engine = connect(url, wait=0.3)
    if engine.dialect.name == "postgresql":
        with writing(engine) as c:
            c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*TABLES, VERSION_TABLE])} CASCADE")
    upgrade(engine)
    load(engine, frames or world.frames)
    return engine


@pytest.fixture(scope="module")
def shared(world, tmp_path_factory):
    """A service for tests that store nothing."""
    folder = tmp_path_factory.mktemp("shared")
    engine = fill(f"sqlite:///{folder}/people.db", world)
    yield EnhancedCQLModelService(engine, world.publish(folder / "artifacts"))
    engine.dispose()


@pytest.fixture
def mine(world, tmp_path, request):
    """A service of one's own on SQLite, or on PostgreSQL where asked by parameter."""
    url = f"sqlite:///{tmp_path}/people.db" if getattr(request, "param", "sqlite") == "sqlite" else os.environ.get("FINCOACH_TEST_POSTGRES")
    if not url:
        pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
    engine = fill(url, world)
    yield EnhancedCQLModelService(engine, world.publish(tmp_path / "artifacts"))
    engine.dispose()


BOTH = pytest.mark.parametrize("mine", ["sqlite", "postgresql"], indirect=True)


def history(engine, user_id=None):
    """The rows of recommendation_history as dicts."""
    t = TABLES["recommendation_history"]
    asked = sa.select(t).order_by(t.c.id)
    with engine.connect() as c:
        return [r._asdict() for r in c.execute(asked if user_id is None else asked.where(t.c.user_id == user_id))]


# ------------------------------------------------------------------------------------------------- probabilities


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_a_mixture_is_what_two_draws_give(seed, explore):
    """The marginal probability is the sum over strategies of their probability times the action's within: done here in plain loops."""
    rng = np.random.default_rng(seed)
    q, may, p = rng.normal(size=(3, 5)).round(1), rng.random((3, 4, 5)) < 0.5, rng.dirichlet(np.ones(4), 3)
    may[:, :, 0] = True
    found = mixed(q, may, p, explore)
    for i in range(3):
        by_hand = np.zeros(5)
        for s in range(4):
            allowed = [a for a in range(5) if may[i, s, a]]
            best = max(allowed, key=lambda a: (q[i, a], -a))
            for a in allowed:
                by_hand[a] += p[i, s] * (explore / len(allowed) + (1 - explore) * (a == best))
        assert np.allclose(found[i], by_hand, atol=1e-12)


def test_a_strategy_outside_the_pool_is_no_chance():
    q, may = np.zeros((1, 3)), np.ones((1, 2, 3), bool)
    may[0, 1] = False
    assert (by_strategy(q, may)[0, 1] == 0).all()
    with pytest.raises(ValueError, match="allows no action"):
        mixed(q, may, [[0.5, 0.5]])
    for bad in ([[0.5, 0.4]], [[1.5, -0.5]], [[1.0]]):
        with pytest.raises(ValueError, match="strategy_p"):
            mixed(q, may, bad)
    with pytest.raises(ValueError, match="no number"):
        action_probabilities(q * np.nan, may[:, 0])
    with pytest.raises(ValueError, match="share from 0 to 1"):
        action_probabilities(q, may[:, 0], -0.1)


def test_a_draw_never_lands_on_probability_zero():
    for p in ([0.0, 1.0, 0.0], [0.3, 0.0, 0.7 - 1e-17]):
        for u in (0.0, 0.3, math.nextafter(0.3, 0), 1 - 2**-53):
            assert p[drawn(u, p)] > 0


def proposed(service, facts, at):
    """What the service would decide, its segment, and what it stands on."""
    with reading(service.engine) as ask:
        return service._propose(ask, service._loaded, facts, at)


def test_draws_of_the_service_are_as_stated(shared, world):
    """600 real moments of one person, all the way from the facts: no pattern in the hashed draws. (The notebook draws 20,000.)"""
    f = shared._facts(world.calm, MORNING)
    found = [proposed(shared, f, MORNING + timedelta(seconds=i))[0] for i in range(600)]
    for action, p in {(d.action, round(d.propensity, 12)) for d in found}:
        share = np.mean([d.action == action for d in found])
        assert abs(share - p) <= 4.5 * math.sqrt(p * (1 - p) / len(found))
    assert len({d.strategy for d in found}) > 1


# --------------------------------------------------------------------------------------------- what is stored


@BOTH
def test_what_is_stored_is_what_was_answered_and_can_be_worked_out_again(mine, world):
    """For everybody: the row holds the answer, and its probability follows from the values, the table of actions and the bandit alone."""
    wide = Network(world.files[WIDE], 35, 12)
    people = range(1, PEOPLE + 1)
    answers = {u: mine.get_segment_aware_recommendation(u, MORNING) for u in people}
    rows = {r["user_id"]: r for r in history(mine.engine)}
    assert set(rows) == set(people)
    served = {r["served_by"] for r in rows.values()}
    assert "model-35" in served
    for u, a in answers.items():
        r = rows[u]
        assert (r["id"], r["action"], r["message"] or "", r["propensity"], r["strategy"]) == (a.decision_id, a.action, a.message, a.propensity, a.strategy)
        assert (r["decided_at"], r["model_version"], r["amount_minor"], r["urgency"]) == (MORNING, "2024-10-01-made", a.amount_minor, a.urgency)
        assert (r["strategy_propensity"], r["segment_id"], r["served_by"]) == (a.strategy_propensity, a.segment_id, a.served_by)
        assert not objections(a.message)
        if a.served_by != "model-35":
            continue
        x, segment = world.X[u - 1], int(world.segments[u - 1])
        assert r["state_hash"] == state_hash(x, segment)
        stressed = in_stress(x[None])
        chances = mine.select_recommendation_strategy(u, MORNING).probabilities
        may = strategy_mask([segment], stressed) & eligible(x[None])[:, None]
        p = mixed(wide(world.states[u - 1 : u]), may, [[chances.get(s, 0.0) for s in STRATEGY_NAMES]], 0.0 if stressed[0] else 0.1)[0]
        assert math.isclose(p[ACTION_NAMES.index(a.action)], a.propensity, rel_tol=1e-9)
        assert math.isclose(chances[a.strategy], a.strategy_propensity, rel_tol=1e-12)


def test_the_same_request_is_decided_once(mine):
    first = mine.get_segment_aware_recommendation(8, MORNING, "r-1")
    assert not first.repeated
    for at in (MORNING, MORNING + timedelta(days=3), MORNING - timedelta(days=3)):
        again = mine.get_segment_aware_recommendation(8, at, "r-1")
        assert again.repeated
        assert replace(again, repeated=False) == first
    other = mine.get_segment_aware_recommendation(9, MORNING, "r-1")
    assert other.decision_id != first.decision_id
    assert len(history(mine.engine)) == 2


def test_a_repeated_request_after_a_change_keeps_its_decision_and_says_that_reasons_are_gone(mine, world):
    first = mine.get_segment_aware_recommendation(8, MORNING)
    assert first.why
    with writing(mine.engine) as c:  # a receipt of last month that came late
        c.execute(sa.insert(TABLES["transactions"]).values(user_id=8, occurred_at=MORNING - timedelta(days=20), amount_minor=-50_000, currency="EUR", category_id=9))
    again = mine.get_segment_aware_recommendation(8, MORNING)
    assert (again.decision_id, again.action, again.propensity, again.message) == (first.decision_id, first.action, first.propensity, first.message)
    assert again.why == ()
    assert "reasons are not at hand" in again.warnings[-1]


WORKER = """
import json, sys
from datetime import datetime
from fincoach.serving import EnhancedCQLModelService
url, folder, own, at = sys.argv[1:]
service = EnhancedCQLModelService(url, folder)
print("ready", flush=True)
sys.stdin.readline()
for request in [f"same-{i}" for i in range(4)] + [f"{own}-{i}" for i in range(4)]:
    r = service.get_segment_aware_recommendation(8, datetime.fromisoformat(at), request)
    print(json.dumps(r.to_dict() | {"repeated": None}), flush=True)
"""


@BOTH
def test_processes_at_once_store_a_request_once_and_never_send_more_than_the_limit(mine):
    """Two real processes, the same four requests and then four of each one's own, about one person at one moment: two messages are allowed."""
    words = [mine.engine.url.render_as_string(hide_password=False), str(mine.artifacts)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen([sys.executable, "-c", WORKER, *words, own, MORNING.isoformat()], cwd=ROOT, text=True, **pipes) for own in "ab"]
    for p in both:
        assert p.stdout.readline() == "ready\n", p.stderr.read()
    for p in both:  # start together
        p.stdin.write("go\n")
        p.stdin.flush()
    said = [p.communicate(timeout=120) for p in both]
    assert all(p.returncode == 0 for p in both), said
    one, other = ([json.loads(line) for line in out.splitlines()] for out, _ in said)
    assert one[:4] == other[:4]
    rows = history(mine.engine)
    assert len(rows) == 12
    assert {r["id"] for r in rows} == {r["decision_id"] for r in one + other}
    assert sum(r["action"] != "do_nothing" for r in rows) == 2
    assert any(r["served_by"] == "limits" for r in rows)


KILLED = """
import os, sys
from datetime import datetime
from fincoach.serving import EnhancedCQLModelService, recommendation
url, folder, at = sys.argv[1:]
recommendation._answer = lambda *_: os.kill(os.getpid(), 9)
EnhancedCQLModelService(url, folder).get_segment_aware_recommendation(8, datetime.fromisoformat(at), "r-1")
"""


def test_killed_between_storing_and_answering_the_client_asks_again(mine):
    words = [mine.engine.url.render_as_string(hide_password=False), str(mine.artifacts), MORNING.isoformat()]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (row,) = history(mine.engine)
    again = mine.get_segment_aware_recommendation(8, MORNING + timedelta(minutes=1), "r-1")
    assert again.repeated
    assert (again.decision_id, again.action, again.propensity, again.at) == (row["id"], row["action"], row["propensity"], MORNING)
    assert again.why
    assert len(history(mine.engine)) == 1


# -------------------------------------------------------------------------------------------------------- limits


def test_no_seven_days_hold_more_messages_than_allowed_and_nights_are_quiet(mine):
    """Asked every seven hours for five weeks, out of order: the stored rows are looked through with another yardstick."""
    moments = [MORNING + timedelta(hours=7 * i) for i in range(120)]
    for at in np.random.default_rng(0).permutation(np.array(moments, object)):
        mine.get_segment_aware_recommendation(3, at)
    with mine.engine.connect() as c:
        zone = c.scalar(sa.text("SELECT timezone FROM users WHERE id = 3"))
    rows = sorted(history(mine.engine, 3), key=lambda r: r["decided_at"])
    sent = [r["decided_at"] for r in rows if r["action"] != "do_nothing"]
    assert len(sent) >= 4
    assert all(sum(a <= b < a + timedelta(days=7) for b in sent) <= 2 for a in sent)
    hours = [at.astimezone(ZoneInfo(zone)).hour for at in sent]
    assert all(8 <= h < 21 for h in hours)


def test_nothing_is_said_again_before_it_has_rested_and_the_probability_knows_it(mine, world):
    """Asked every four days for two months: no message comes again within two weeks, and each probability is that of what was left to say."""
    user, wide = world.calm, Network(world.files[WIDE], 35, 12)
    for k in range(16):
        mine.get_segment_aware_recommendation(user, MORNING + timedelta(days=4 * k))
    rows = sorted(history(mine.engine, user), key=lambda r: r["decided_at"])
    sent = [(r["decided_at"], r["action"]) for r in rows if r["action"] != "do_nothing"]
    assert len({a for _, a in sent}) >= 3
    for i, (t, a) in enumerate(sent):
        assert all(b != a or u - t >= timedelta(days=14) for u, b in sent[i + 1 :])
    first = [r for r in rows if r["served_by"] == "model-35"]
    assert len(first) > 8
    for r in first:
        f = mine._facts(user, r["decided_at"])
        segment, stressed = r["segment_id"], bool(in_stress(f.x[None])[0])
        states = EnhancedStateVector(f.x, np.int64(segment), world.policy.ranking).state.values[None]
        left = eligible(f.x[None])
        for t, a in sent:
            if t < r["decided_at"] < t + timedelta(days=14):
                left[0, ACTION_NAMES.index(a)] = False
        chances = mine.select_recommendation_strategy(user, r["decided_at"]).probabilities
        may = strategy_mask([segment], [stressed]) & left[:, None]
        p = mixed(wide(states), may, [[chances.get(s, 0.0) for s in STRATEGY_NAMES]], 0.0 if stressed else 0.1)[0]
        assert math.isclose(p[ACTION_NAMES.index(r["action"])], r["propensity"], rel_tol=1e-9)


@BOTH
def test_two_requests_at_once_do_not_say_the_same_twice(mine, monkeypatch):
    """While one is worked out, another of a second before is stored: the first takes notice, and its probability too."""
    own, other, said = type(mine)._propose, EnhancedCQLModelService(mine.engine, mine.artifacts), []

    def slowly(self, ask, loaded, f, at):
        made = own(self, ask, loaded, f, at)
        if self is mine and not said:
            said.append(other.get_segment_aware_recommendation(f.user_id, at - timedelta(seconds=1)))
        return made

    monkeypatch.setattr(type(mine), "_propose", slowly)
    for user in range(1, 13):
        said.clear()
        found = mine.get_segment_aware_recommendation(user, MORNING)
        assert found.action == "do_nothing" or found.action != said[0].action
        if said[0].action != "do_nothing":
            monkeypatch.undo()
            f = mine._facts(user, MORNING)
            assert [a for a, _ in f.said] == [said[0].action]
            assert found.propensity in (proposed(mine, f, MORNING)[0].propensity, 1.0)
            break
    else:
        raise AssertionError("nobody got a message")


def test_a_repeated_request_waits_for_no_writer(mine):
    first = mine.get_segment_aware_recommendation(1, MORNING)
    with writing(mine.engine):  # held by somebody else for as long as this lasts
        again = mine.get_segment_aware_recommendation(1, MORNING)
    assert again.repeated
    assert again.decision_id == first.decision_id


def test_what_is_too_old_is_not_advised_on(shared):
    """A year and a half after the last row: silence, and the reason."""
    late = shared.get_segment_aware_recommendation(3, MORNING + timedelta(days=560))
    assert late.action == "do_nothing"
    assert any("too old to advise on" in w for w in late.warnings)


def test_a_clock_that_jumps_back_allows_no_more(mine):
    mine = EnhancedCQLModelService(mine.engine, mine.artifacts, Limits(quiet_from=21, rest_days=0))
    later = [mine.get_segment_aware_recommendation(3, MORNING + timedelta(days=d)) for d in (0, 1, 2, 3)]
    assert later[-1].served_by == "limits"
    jumped = mine.get_segment_aware_recommendation(3, MORNING - timedelta(days=1))
    assert jumped.served_by == "limits"
    assert jumped.action == "do_nothing"
    assert jumped.message == ""
    assert any("was a clock wrong" in w for w in jumped.warnings)


def test_limits_given_overrule_those_that_were_learned(world, tmp_path):
    engine = fill(f"sqlite:///{tmp_path}/people.db", world)
    silent = EnhancedCQLModelService(engine, world.publish(tmp_path / "a"), Limits(messages_per_week=0))
    r = silent.get_segment_aware_recommendation(3, MORNING)
    assert (r.action, r.served_by, r.propensity, r.strategy_propensity) == ("do_nothing", "limits", 1.0, None)
    assert "0 of 0" in r.sentence
    with pytest.raises(ValueError, match="messages_per_week"):
        EnhancedCQLModelService(engine, tmp_path / "a", Limits(messages_per_week=-1))
    engine.dispose()


def test_nothing_is_tried_out_on_people_in_stress(shared, world):
    """Everybody in stress, 40 moments each: always the best action of a strategy that does not push."""
    stressed = np.flatnonzero(in_stress(world.X))
    assert len(stressed) >= 3
    for i in stressed[:6].tolist():
        f = shared._facts(i + 1, MORNING)
        for k in range(40):
            d, segment, _ = proposed(shared, f, MORNING + timedelta(minutes=k))
            assert d.strategy != "aggressive"
            assert (d.propensity, d.strategy_propensity) == (1.0, 1.0)
            q, may = _scorer(shared._loaded, shared._loaded.brains[0], segment, d.strategy)(f.x[None])
            assert d.action == best_action(q, may)[0]


# -------------------------------------------------------------------------------------------------- explanations


def test_reasons_are_exact_differences_and_changes_change_it(shared, world):
    """Worked out again for some people, number by number, with a policy put together here."""
    told = 0
    wide = Network(world.files[WIDE], 35, 12)
    for u in range(1, 13):
        f = shared._facts(u, MORNING)
        d, segment, _ = proposed(shared, f, MORNING)
        e = _explain(shared._loaded, shared._loaded.brains[0], f.x, segment, d.strategy, d.action, "EUR")

        def values(x):
            s = segments_of(world.segmentation, x[None])
            return wide(EnhancedStateVector(x[None], s, world.policy.ranking).state.values)[0]

        for r in e.why:
            altered = f.x.copy()
            altered[NAMES.index(r.feature)] = r.typical
            a, b = d.action, ACTION_NAMES.index(e.second.action)
            lead, left = np.subtract(values(f.x)[a], values(f.x)[b]), np.subtract(values(altered)[a], values(altered)[b])
            assert r.part == pytest.approx(float(lead) - float(left), abs=1e-4)
            assert r.opens or r.part > 0
        score = _scorer(shared._loaded, shared._loaded.brains[0], segment, d.strategy)
        usual = {n.name: n for n in world.policy.usual}
        for c in e.would_change:
            altered = f.x.copy()
            altered[NAMES.index(c.feature)] = c.to
            assert ACTION_NAMES[best_action(*score(altered[None]))[0]] == c.action != ACTION_NAMES[d.action]
            assert usual[c.feature].low - 1e-6 <= c.to <= usual[c.feature].high * (1 + 1e-9) + 1e-6
            told += 1
    assert told > 5


def test_no_smaller_change_was_passed_over():
    """On a policy that flips at known points, the change found is the nearest one, to the width of the finer grid."""
    x, low, high = np.zeros(28), np.full(28, -1.0), np.full(28, 1.0)

    def score(rows):
        q = np.zeros((len(rows), 2))
        q[:, 1] = np.maximum.reduce([rows[:, 3] - 0.4, -rows[:, 3] - 0.7, rows[:, 5] - 0.9])
        return q, np.ones_like(q, bool)

    found = flips_of(score, x, low, high, log=np.zeros(28, bool))
    assert [f.feature for f in found] == [3, 5]
    assert 0.4 < found[0].to < 0.4 + 2 / 11 / 8
    assert 0.9 < found[1].to < 0.9 + 2 / 11 / 8
    assert parts_of(score, np.eye(28)[3], x, 1, 0).part[3] == 1.0


def test_what_is_unknown_is_never_a_reason(shared, world):
    """Numbers that nobody could compute neither speak for an action nor would change it, and no text names them."""
    x = world.X[7].copy()
    x[[NAMES.index(n) for n in ("reserve_weeks", "low_balance_share", "income_weekly", "savings_rate", "saved_share")]] = np.nan
    q, may = _scorer(shared._loaded, shared._loaded.brains[0], 0, "balanced")(x[None])
    e = _explain(shared._loaded, shared._loaded.brains[0], x, 0, "balanced", int(best_action(q, may)[0]), "EUR")
    unknown = {n for n, v in zip(NAMES, x, strict=True) if np.isnan(v)}
    assert not unknown & ({r.feature for r in e.why} | {c.feature for c in e.would_change})


def test_the_card_shows_itself_and_saves(mine, tmp_path):
    r = mine.get_segment_aware_recommendation(8, MORNING)
    page = r.save(tmp_path / "card.html").read_text()
    assert "http" not in re.sub(r"http-equiv", "", page)
    kept = json.loads(r.save(tmp_path / "card.json").read_text())
    assert kept["action"] == r.action
    assert kept["why"][0]["words"] == r.why[0].words
    assert repr(r).startswith("CoachingRecommendation(user 8, 2024-10-02 09:00 UTC: ")


# ------------------------------------------------------------------------------------------- files not to trust


def spoilt(artifacts, name, change):
    """Damage a published file on the disk."""
    file = artifacts / "recommendation" / "2024-10-01-made" / name
    data = change(bytearray(file.read_bytes()))
    file.unlink()
    if data is not None:
        file.write_bytes(bytes(data))


def flipped(data):
    data[len(data) // 2] ^= 4
    return data


@pytest.mark.parametrize(
    ("names", "served", "says"),
    [
        ([WIDE], "model-17", f"{WIDE} was altered"),
        (["segmentation.json"], "model-17", "segmentation.json was altered"),
        ([WIDE, NARROW], "rules", f"{NARROW} was altered"),
        ([NARROW], "model-35", f"{NARROW} was altered"),
        (["policy.json"], "rules", "policy.json was altered"),
        (["bandit_strategies.json"], "model-35", "bandit_strategies.json was altered"),
        (["manifest.json"], "rules", "the trained model was altered"),
    ],
)
@pytest.mark.parametrize("how", [flipped, lambda d: d[:-7], lambda d: None], ids=["a bit", "cut", "gone"])
def test_a_damaged_file_is_refused_and_the_next_simpler_way_answers(shared, world, tmp_path, names, served, says, how):
    before = EnhancedCQLModelService(shared.engine, world.publish(tmp_path / "a"))
    for name in names:
        spoilt(before.artifacts, name, how)
    fresh = EnhancedCQLModelService(shared.engine, before.artifacts)
    assert fresh.status.served_by == served
    wanted = says.replace("was altered", "") if how is not flipped else says
    assert any(wanted in w for w in fresh.status.warnings)
    r = fresh.get_recommendation(world.states[7])
    assert r.served_by == served
    assert r.warnings == fresh.status.warnings
    assert not any(str(tmp_path) in w for w in r.warnings)
    assert before.load_enhanced_models().served_by == "model-35", "who serves already goes on with what was sound"
    assert before.get_recommendation(world.states[7]).warnings[-1].endswith("goes on serving")


class Trap:
    """A pickle that would write a file when opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def elsewhere(names):
    """A graph whose weights are in another file, with a path out of its folder."""
    made = helper.make_tensor("w0", TensorProto.FLOAT, [12, len(names)], [0.0] * 12 * len(names))
    made.ClearField("float_data")
    made.data_location = TensorProto.EXTERNAL
    made.external_data.add(key="location", value="../../../../../../etc/passwd")
    return graph(names, [helper.make_node("Gemm", ["state", "w0"], ["q"], transB=1)], [made])


def enormous(names):
    """A graph that would multiply two vectors into a matrix larger than any memory."""
    wide = helper.make_tensor("w0", TensorProto.FLOAT, [0], b"", raw=True)
    wide.dims[:] = [len(names), 10**9]
    return graph(names, [helper.make_node("MatMul", ["state", "w0"], ["q"])], [wide])


def looping(names):
    """A graph with a graph inside a step."""
    inner = helper.make_graph([helper.make_node("Identity", ["state"], ["out"])], "inner", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 12])])
    return graph(names, [helper.make_node("If", ["state"], ["q"], then_branch=inner, else_branch=inner)], [])


def one_person_off(names):
    """Fine for an ordinary person, infinite for others: it would pass any test on made-up numbers."""
    usual = 0.5
    weights = [tensor("w0", [[1.0]] + [[0.0]] * (len(names) - 1)), tensor("b0", [-usual]), tensor("m", [[1e37]]), tensor("w1", np.ones((1, 12)))]
    nodes = [helper.make_node("Gemm", ["state", "w0", "b0"], ["h"]), helper.make_node("Mul", ["h", "m"], ["far"]),
             helper.make_node("MatMul", ["far", "w1"], ["q"])]  # fmt: skip
    return graph(names, nodes, weights)


HOSTILE = {
    "weights elsewhere": elsewhere,
    "enormous": enormous,
    "a graph inside": looping,
    "too few actions": lambda names: by_chance(names, 0, gives=11),
    "other numbers": lambda names: by_chance(names[:-1], 0),
    "numbers in another order": lambda names: by_chance(names[::-1], 0),
    "poisoned": lambda names: graph(names, [helper.make_node("Gemm", ["state", "w0"], ["q"], transB=1)], [tensor("w0", np.full((12, len(names)), np.nan))]),
    "text": lambda names: b"<html>not found</html>",
    "empty": lambda names: b"",
    "random": lambda names: np.random.default_rng(0).bytes(5000),
    "a gigabyte announced": lambda names: b"\x3a\xff\xff\xff\xff\x03" + b"\x00" * 100,
    "too large": lambda names: bytes(17 << 20),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_network_is_refused_although_its_hash_is_right(world, shared, tmp_path, what):
    """Published by somebody who may publish: the large network is refused, and the small one answers."""
    data = HOSTILE[what](list(ENHANCED_NAMES))
    service = EnhancedCQLModelService(shared.engine, world.publish(tmp_path / "a", **{WIDE.replace(".", "__"): data}))
    assert service.status.served_by == "model-17"
    assert service.status.warnings[0].startswith(WIDE)


def test_only_known_steps_and_small_sides_pass_the_look_at_a_graph():
    """Nothing here is damaged or elsewhere: an unknown operator and a side of 5,000 are refused for what they are."""
    step = [helper.make_node("Tanh", ["state"], ["q"])]
    with pytest.raises(NetworkError, match="operator 'Tanh'"):
        check_graph(graph(["a"], step, []))
    with pytest.raises(NetworkError, match=r"weights of \[1, 5000\]"):
        check_graph(graph(["a"], [helper.make_node("MatMul", ["state", "w"], ["q"])], [tensor("w", np.zeros((1, 5000)))]))
    check_graph(graph(["a"], [helper.make_node("MatMul", ["state", "w"], ["q"])], [tensor("w", np.zeros((1, 4096)))]))


def test_a_pickle_is_not_opened(world, shared, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    changed = {n.replace(".", "__"): trap for n in (WIDE, NARROW, "policy.json", "segmentation.json", "bandit_strategies.json")}
    service = EnhancedCQLModelService(shared.engine, world.publish(tmp_path / "a", **changed))
    assert service.status.served_by == "rules"
    assert not (tmp_path / "sprung").exists()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_bytes_make_the_look_at_a_graph_fail_otherwise(data):
    """A good graph with bytes changed, put in or left out: it passes, or is refused in words."""
    good = bytearray(by_chance(WEEKLY_NAMES, 0, gives=2))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        check_graph(bytes(good))
    except NetworkError:
        return


def test_a_network_that_fails_for_one_person_leaves_that_person_to_the_next(world, shared, tmp_path):
    usual = tuple(u._replace(low=min(u.low, 0.5), typical=0.5, high=max(u.high, 0.5)) if u.name == ENHANCED_NAMES[0] else u for u in world.policy.usual)
    policy = replace(world.policy, usual=usual).to_json().encode()
    engine = fill(f"sqlite:///{tmp_path}/people.db", world)
    service = EnhancedCQLModelService(engine, world.publish(tmp_path / "a", **{WIDE.replace(".", "__"): one_person_off(list(ENHANCED_NAMES)), "policy__json": policy}))
    assert service.status.served_by == "model-35"
    r = service.get_segment_aware_recommendation(8, MORNING)
    assert r.served_by == "model-17"
    assert "model-35 had no answer for this person" in r.warnings
    engine.dispose()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"actions": ["do_nothing"], "q": [{"action": "do_nothing", "mean": 0.0, "spread": 1.0}]}, "actions are not those"),
        ({"features": "0" * 16}, "other definitions of the features"),
        ({"format": 2}, "newer FinCoach"),
        ({"explore": 7}, "explore"),
    ],
)
def test_a_policy_that_does_not_fit_leaves_the_rules(world, shared, tmp_path, change, says):
    policy = json.dumps(json.loads(world.policy.to_json()) | change).encode()
    service = EnhancedCQLModelService(shared.engine, world.publish(tmp_path / "a", policy__json=policy))
    assert service.status.served_by == "rules"
    assert says in service.status.warnings[0]


def test_segments_of_another_version_and_strange_pools_are_left_aside(world, shared, tmp_path):
    other = replace(world.segmentation, version="2023-01-01-other").to_json().encode()
    pools = BanditState(pools=dict.fromkeys(range(-1, 5), ("balanced", "aggressive"))).to_json().encode()
    service = EnhancedCQLModelService(shared.engine, world.publish(tmp_path / "a", segmentation__json=other, bandit_strategies__json=pools))
    assert service.status.served_by == "model-17"
    assert [w.split()[0] for w in service.status.warnings] == ["segmentation.json", "bandit_strategies.json"]


def test_without_any_model_the_rules_answer(shared, tmp_path):
    service = EnhancedCQLModelService(shared.engine, tmp_path / "nothing")
    assert service.status == ("rules", "rules-1", ("there is no trained model yet",))
    r = service.get_recommendation(np.zeros(17))
    assert (r.served_by, r.propensity) == ("rules", 1.0)


# ----------------------------------------------------------------------------------------- people and requests


def test_people_of_whom_nothing_is_known(mine):
    """Before the first transaction no network is asked, and nothing is claimed."""
    early = mine.get_segment_aware_recommendation(8, datetime(2001, 5, 5, 12, tzinfo=UTC))
    assert (early.served_by, early.segment_id, early.strategy_propensity, early.propensity) == ("rules", -1, None, 1.0)
    assert early.amount_minor is None
    assert any("nothing was booked" in w for w in early.warnings)
    with writing(mine.engine) as c:
        c.execute(sa.insert(TABLES["users"]).values(id=900, external_id="new", timezone="Pacific/Auckland", currency="JPY", created_at=MORNING))
    for at in (MORNING, MORNING - timedelta(days=90)):  # on the first day, and before the person was known at all
        fresh = mine.get_segment_aware_recommendation(900, at)
        assert fresh.served_by in ("rules", "limits")
        assert not re.search(r"\d", fresh.message)


@pytest.mark.parametrize("at", [datetime(2024, 10, 2, 9), "2024-10-02", datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC), None])
def test_moments_that_are_none(shared, at):
    with pytest.raises(ServiceError, match=r"zone|moment"):
        shared.get_segment_aware_recommendation(8, at)


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a\nb", "a\0b", 7, "\ud800"])
def test_requests_that_cannot_be(shared, request_id):
    with pytest.raises(ServiceError, match="request_id"):
        shared.get_segment_aware_recommendation(8, MORNING, request_id)


def test_unknown_people_and_states(shared):
    with pytest.raises(DatabaseError, match="nobody with the id 4711"):
        shared.get_segment_aware_recommendation(4711, MORNING)
    for state in (np.zeros(18), np.zeros((2, 17)), []):
        with pytest.raises(ServiceError, match="17 or 35"):
            shared.get_recommendation(state)


def test_a_decision_that_cannot_be_stored_is_not_answered(mine):
    """Another writer holds the database: after a bounded wait it is an error in words, and later the request is decided as if new."""
    with writing(mine.engine) as other:
        other.execute(sa.update(TABLES["users"]).values(timezone="UTC").where(TABLES["users"].c.id == 1))
        with pytest.raises(DatabaseError, match=r"lock|busy|writ"):
            mine.get_segment_aware_recommendation(8, MORNING, "r-1")
    assert history(mine.engine) == []
    assert not mine.get_segment_aware_recommendation(8, MORNING, "r-1").repeated


def test_versions_change_under_way_and_no_answer_mixes_two(world, shared, tmp_path):
    """Four threads ask while two versions take turns: the values of each answer are those of the network of the version it names."""
    other = by_chance(ENHANCED_NAMES, 77)
    world.publish(tmp_path / "a", "second", **{WIDE.replace(".", "__"): other, "policy__json": replace(world.policy, version="second").to_json().encode()})
    service = EnhancedCQLModelService(shared.engine, world.publish(tmp_path / "a", "first"))
    nets = {"first": Network(world.files[WIDE], 35, 12), "second": Network(other, 35, 12)}
    seen, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            seen.append(service.get_recommendation(world.states[3], explain=True))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    for i in range(6):
        promote(tmp_path / "a", "recommendation", ("second", "first")[i % 2])
        service.load_enhanced_models()
    stop.set()
    for t in threads:
        t.join()
    assert {r.model_version for r in seen} == {"first", "second"}
    for r in seen:
        q = nets[r.model_version](world.states[3:4])[0]
        assert [r.values[a] for a in ACTION_NAMES] == q.tolist()
        assert r.action == max(r.allowed, key=lambda a: r.values[a])


def test_a_state_alone_gives_the_best_action(shared, world):
    """From 35 numbers: the very action that the large network values most; from 17: the small one. Nothing is stored."""
    before, wide, narrow = len(history(shared.engine)), Network(world.files[WIDE], 35, 12), Network(world.files[NARROW], 17, 12)
    for i in range(PEOPLE):
        r = shared.get_recommendation(world.states[i])
        small = shared.get_recommendation(world.states[i, :BASE], explain=True)
        assert (r.served_by, small.served_by) == ("model-35", "model-17")
        q, small_q = wide(world.states[i : i + 1])[0], narrow(world.states[i : i + 1, :BASE])[0]
        assert r.action == max(r.allowed, key=lambda a: q[ACTION_NAMES.index(a)])
        assert small.action == max(small.allowed, key=lambda a: small_q[ACTION_NAMES.index(a)])
        assert [r.values[a] for a in ACTION_NAMES] == q.tolist()
        assert (r.decision_id, r.user_id, r.message) == (None, None, "")
    assert len(history(shared.engine)) == before


# ------------------------------------------------------------------------------------------------------ learning


@BOTH
def test_answers_are_stored_and_counted_once(mine):
    r = next(r for u in range(1, PEOPLE) if (r := mine.get_segment_aware_recommendation(u, MORNING)).action != "do_nothing" and r.strategy_propensity and r.strategy_propensity < 1)
    hour = MORNING + timedelta(hours=1)
    said = [mine.update_strategy_performance(r.decision_id, *a).outcome for a in (("accepted", None, hour), ("accepted", None, hour), ("accepted", False, 2 * (hour - MORNING) + MORNING))]
    assert said == ["counted", "same", "corrected"]
    with mine.engine.connect() as c:
        kept = c.execute(sa.select(TABLES["recommendation_feedback"].c.response, TABLES["recommendation_feedback"].c.helpful)).all()
        counts = c.execute(sa.select(TABLES["bandit_counts"].c.decisions, TABLES["bandit_counts"].c.reward_millionths)).all()
    assert [tuple(k) for k in kept] == [("accepted", None), ("accepted", False)]
    assert [tuple(k) for k in counts] == [(1, 0)]
    performance = mine.evaluate_strategy_performance(hour)
    assert sum(row["decisions"] for row in performance.rows) == 1
    assert mine.settle(MORNING + timedelta(days=40)).get("counted", 0) == sum(
        1 for row in history(mine.engine) if row["strategy_propensity"] and row["strategy_propensity"] < 1) - 1  # fmt: skip


def test_counts_of_the_version_come_first_and_those_of_the_database_go_on(world, tmp_path):
    """A version that learned of one segment up to week 100: of that segment earlier weeks of the database are left out, of others none."""
    engine = fill(f"sqlite:///{tmp_path}/people.db", world)
    state = BanditState("epsilon_greedy", discount=1.0, counts=((0, "balanced", 100, 50, 40_000_000),))
    service = EnhancedCQLModelService(engine, world.publish(tmp_path / "a", bandit_strategies__json=state.to_json().encode()))
    stored = [(0, "balanced", 99, 7, 0), (0, "balanced", 100, 9, 0), (0, "balanced", 101, 10, 10_000_000), (1, "balanced", 3, 4, 1_000_000)]
    with writing(engine) as c:
        c.execute(sa.insert(TABLES["bandit_counts"]), [dict(zip(("segment_id", "strategy", "week", "decisions", "reward_millionths"), r, strict=True)) for r in stored])
    rows = {(r["segment_id"], r["strategy"]): r for r in service.evaluate_strategy_performance().rows}
    assert (rows[0, "balanced"]["decisions"], rows[0, "balanced"]["mean"]) == (60, pytest.approx(50 / 60))
    assert (rows[1, "balanced"]["decisions"], rows[1, "balanced"]["mean"]) == (4, 0.25)
    engine.dispose()


def test_answers_that_cannot_be(mine):
    r = next(r for u in range(1, PEOPLE) if (r := mine.get_segment_aware_recommendation(u, MORNING)).action != "do_nothing")
    night = mine.get_segment_aware_recommendation(r.user_id, MORNING + timedelta(hours=14))
    hour = MORNING + timedelta(hours=20)
    for decision, response, at, says in (
        (10**9, "accepted", hour, "there is none"),
        (night.decision_id, "accepted", hour, "nothing to answer"),
        (r.decision_id, "loved", hour, "accepted, implemented"),
        (r.decision_id, None, hour, "response"),
        (r.decision_id, "accepted", MORNING - timedelta(hours=1), "cannot be answered"),
        (r.decision_id, "accepted", hour.replace(tzinfo=None), "time zone"),
    ):
        with pytest.raises(ServiceError, match=says):
            mine.update_strategy_performance(decision, response, None, at)
    with mine.engine.connect() as c:
        assert c.scalar(sa.select(sa.func.count()).select_from(TABLES["recommendation_feedback"])) == 0


# ---------------------------------------------------------------------------------------------------- the files


GRID = np.sort(np.random.default_rng(0).normal(size=(6, 2, 101)))
SMALL = PolicyParameters("v", DAY, ACTION_NAMES, 0.1, LIMITS, {"money": 1.0}, GRID, usual_of(np.ones((3, 35))), values_of(ACTION_NAMES, np.ones((3, 12))),
                         "s", "f").to_json()  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_policy_files_are_read_strictly(data):
    """Any one value of a policy file replaced by something else: another valid policy, or a ParametersError."""
    found = json.loads(SMALL)
    name = data.draw(st.sampled_from(sorted(found)))
    found[name] = data.draw(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3), st.just({})))
    try:
        read = PolicyParameters.from_json(json.dumps(found))
    except ParametersError:
        return
    assert PolicyParameters.from_json(read.to_json()) == read


def test_the_rules_as_a_brain_follow_what_is_allowed(world):
    may = eligible(world.X)
    q = RULES.q(world.X, world.segments, may)
    assert may[np.arange(PEOPLE), q.argmax(1)].all()
    assert (q.sum(1) == 1).all()


FRESH = """
import sys
from datetime import datetime, UTC
from fincoach.serving import EnhancedCQLModelService
url, folder = sys.argv[1:]
service = EnhancedCQLModelService(url, folder)
assert service.status.served_by == "model-35", service.status
r = service.get_segment_aware_recommendation(8, datetime(2024, 10, 2, 9, tzinfo=UTC))
r.to_html(), service.get_recommendation(list(range(17)))
print(*[m for m in %r if m in sys.modules])
"""


def test_serving_needs_nothing_heavy(mine):
    """A decision from start to end in a fresh process: no torch, scikit-learn, pandas, not even onnx."""
    url = mine.engine.url.render_as_string(hide_password=False)
    done = subprocess.run([sys.executable, "-W", "error", "-c", FRESH % (HEAVY,), url, str(mine.artifacts)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("kind", [SegmentationParameters, PolicyParameters, BanditState])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' * 50_000, "{", b"\xff\xfe", '{"format": NaN}', "[]"], ids=range(6))
def test_no_text_makes_a_strict_reader_fail_otherwise(kind, text):
    """JSON nested deeper than Python can follow is no exception: one reader opens all three files."""
    with pytest.raises(ParametersError):
        kind.from_json(text)
