"""The bandit: probabilities against scipy, counts against a model in plain Python, real processes, kill -9, hostile files."""

import json
import os
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from fincoach.data.database import VERSION_TABLE, connect, load, upgrade, writing
from fincoach.data.tables import SEGMENTS, TABLES
from fincoach.serving.actions import POOLS, STRATEGY_NAMES, pool_of
from fincoach.serving.bandit import (
    ALGORITHMS,
    HORIZON,
    MILLION,
    Answer,
    BanditState,
    LinearBandit,
    PerformanceTracker,
    RecommendationBandit,
    StrategySelector,
    StrategyUpdater,
    beta_interval,
    chances_to_be_best,
    draw,
    replayed,
    week_of,
)
from fincoach.serving.inference import ParametersError

START = datetime(2026, 3, 2, 9, tzinfo=UTC)  # a Monday
DAY = timedelta(days=1)
QUICK = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
DECISIONS = 120


# Probabilities


def integrated(a, b):
    """The integral by scipy's Beta functions, between many of their quantiles."""
    levels = 10.0 ** -np.arange(14, 0, -0.5)
    cuts = np.unique(np.concatenate([[0, 1], *([special.betaincinv(p, q, levels), 1 - special.betaincinv(q, p, levels)] for p, q in zip(a, b, strict=True))], axis=None))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half = np.diff(cuts)[:, None] / 2
    x = cuts[:-1, None] + half * (1 + nodes)
    F = np.array([special.betainc(p, q, x) for p, q in zip(a, b, strict=True)])
    f = np.array([stats.beta.pdf(x, p, q) for p, q in zip(a, b, strict=True)])
    return np.array([(f[i] * np.delete(F, i, 0).prod(0) * half * weights).sum() for i in range(len(a))])


@pytest.mark.parametrize("whole", [True, False])
def test_the_chance_to_be_the_best_is_scipys_integral(whole):
    rng, worst = np.random.default_rng(6), 0.0
    for _ in range(40):
        a, b = 1 + 10 ** rng.uniform(-2, 3.5, (2, rng.integers(2, 6)))
        a, b = (np.ceil(a), np.ceil(b)) if whole else (a, b)
        p = chances_to_be_best(a, b)
        assert abs(p.sum() - 1) < 1e-12
        worst = max(worst, np.abs(p - integrated(a, b)).max())
    assert worst < (1e-11 if whole else 1e-8)


@pytest.mark.parametrize(("a", "b"), [((1, 1), (1e6, 1e5)), ((1e6, 1e6), (2e6, 2e6)), ((1, 1e6), (1, 1)), ((1, 1, 1), (1, 1e4, 1e4)), ((5e5, 500), (5e5, 500))])
def test_extreme_counts_are_integrated_too(a, b):
    draws = np.random.default_rng(3).beta(a, b, (200_000, len(a))).argmax(1)
    assert np.abs(chances_to_be_best(a, b) - np.bincount(draws, minlength=len(a)) / 200_000).max() < 0.005


@given(st.floats(1, 1e5), st.floats(1, 1e5))
@QUICK
def test_intervals_are_scipys(a, b):
    low, high = beta_interval(a, b)
    width = stats.beta.std(a, b)
    assert abs(low - stats.beta.ppf(0.025, a, b)) < 0.01 * width
    assert abs(high - stats.beta.ppf(0.975, a, b)) < 0.01 * width


def test_what_is_no_beta_is_refused():
    for a, b in (([0.5, 1], [1, 1]), ([np.nan, 1], [1, 1]), ([1, 2], [1]), ([np.inf, 1], [1, 1])):
        with pytest.raises(ValueError, match="at least 1"):
            chances_to_be_best(a, b)


@given(st.sampled_from(ALGORITHMS[:3]), st.floats(0, 1), st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1)), min_size=1, max_size=6))
@QUICK
def test_probabilities_sum_to_one_and_keep_the_floor(algorithm, explore, arms):
    n = np.array([a for a, _ in arms], float)
    selector = StrategySelector(algorithm, explore)
    p = selector.probabilities(selector.wanted(n, n * [m for _, m in arms]))
    assert abs(p.sum() - 1) < 1e-9
    assert p.min() >= explore / len(arms) - 1e-12


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_draws_come_as_often_as_stated(algorithm):
    rng = np.random.default_rng(8)
    linear = replayed(4, rng.normal(size=(200, 5)), rng.integers(0, 4, 200), rng.random(200), np.zeros(200, int), discount=0.98) if algorithm == "linucb" else None
    counts = [(0, s, 10, 50 + i, (5 + i) * MILLION) for i, s in enumerate(pool_of(0))]
    bandit = RecommendationBandit(BanditState(algorithm, explore=0.2, counts=counts, linear=linear))
    x = rng.normal(size=5)
    stated = bandit.probabilities(0, x)
    drawn = [bandit.select_strategy(0, rng, context=x) for _ in range(4_000)]
    found = [sum(c.strategy == s for c in drawn) for s in stated]
    assert stats.chisquare(found, np.array(list(stated.values())) * len(drawn)).pvalue > 1e-4
    assert all(c.propensity == stated[c.strategy] and c.probabilities == stated for c in drawn)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4).filter(lambda p: sum(p) > 0), st.floats(0, 1, exclude_max=True))
@QUICK
def test_nothing_of_probability_zero_is_drawn(weights, u):
    p = dict(zip("abcd", np.array(weights) / sum(weights), strict=False))
    assert p[draw(p, u).strategy] > 0


def test_people_in_stress_are_not_experimented_on():
    counts = [(g, "aggressive", 10, 1000, 1000 * MILLION) for g in range(len(SEGMENTS))]
    for algorithm in ALGORITHMS:
        bandit = RecommendationBandit(BanditState(algorithm, counts=counts))
        for g in range(-1, len(SEGMENTS)):
            choices = {bandit.select_strategy(g, u, stressed=True)[:2] for u in (0, 0.4, 0.999)}
            assert len(choices) == 1
            ((strategy, propensity),) = choices
            assert propensity == 1
            assert strategy != "aggressive"
            assert strategy in pool_of(g)


def test_every_segment_has_a_pool_and_without_one_it_is_that_of_nobody():
    bandit = RecommendationBandit()
    assert {g: tuple(bandit.probabilities(g)) for g in range(-1, 5)} == {g: pool_of(g) for g in range(-1, 5)}
    bandit.initialize_bandit_arms({-1: ("balanced",), 0: ("conservative", "balanced")})
    assert tuple(bandit.probabilities(3)) == ("balanced",)
    bandit.initialize_bandit_arms({0: ("balanced",)})
    with pytest.raises(ValueError, match="segment 3 has no pool"):
        bandit.probabilities(3)
    with pytest.raises(ParametersError, match="stress"):
        bandit.initialize_bandit_arms({0: ("aggressive",)})
    with pytest.raises(ValueError, match="0 up to"):
        bandit.select_strategy(0, 1.0)
    with pytest.raises(ValueError, match="stored in a database"):
        bandit.update_strategy_rewards(1, 1.0, START)
    assert len(POOLS) == len(SEGMENTS) + 1


@pytest.mark.parametrize("algorithm", ALGORITHMS[:3])
def test_it_finds_out_who_is_best_and_notices_a_change(algorithm):
    odds, rng = {"conservative": 0.1, "balanced": 0.2, "personalized": 0.35}, np.random.default_rng(4)
    bandit, shares = RecommendationBandit(BanditState(algorithm, discount=0.9, width=0.3)), []
    for week in range(120):
        if week == 60:
            odds = odds | {"personalized": 0.05}
        for _ in range(25):
            choice = bandit.select_strategy(0, rng)
            bandit.tracker.add(0, choice.strategy, week, float(rng.random() < odds[choice.strategy]))
        shares.append(bandit.probabilities(0))
    assert np.mean([p["personalized"] for p in shares[40:60]]) > 0.6
    assert np.mean([p["balanced"] for p in shares[100:]]) > 0.5
    assert min(p["personalized"] for p in shares) >= 0.1 / 3 - 1e-12


# LinUCB


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.floats(0, 1)), min_size=1, max_size=60), st.sampled_from([1.0, 0.9]), st.integers(0, 2**32 - 1))
@QUICK
def test_linucb_is_discounted_ridge_regression_in_any_order(seen, discount, seed):
    X = np.random.default_rng(seed).normal(size=(len(seen), 4))
    arms, weeks, rewards = (np.array(v) for v in zip(*seen, strict=True))
    online = LinearBandit(4, 4, discount=discount)
    for i in np.random.default_rng(seed + 1).permutation(len(seen)):
        online.update(arms[i], X[i], rewards[i], int(weeks[i]))
    again = replayed(4, X, arms, rewards, weeks, discount=discount)
    share = discount ** (weeks.max() - weeks)
    for k in range(4):
        m = arms == k
        A = np.eye(4) + (X[m] * share[m, None]).T @ X[m]
        theta = np.linalg.solve(A, (X[m] * share[m, None]).T @ rewards[m])
        for made in (online, again):
            assert np.allclose(made.theta[k], theta, atol=1e-8)
        wide = theta @ X[0] + np.sqrt(X[0] @ np.linalg.solve(A, X[0]))
        assert np.isclose(online.scores(X[0])[k], wide, atol=1e-8)


def test_linucb_looks_at_the_pool_only_and_at_a_whole_context():
    linear = LinearBandit(4, 3, discount=0.98)
    linear.update(STRATEGY_NAMES.index("aggressive"), np.ones(3), 50.0)
    bandit = RecommendationBandit(BanditState("linucb", explore=0, linear=linear))
    assert bandit.probabilities(1, np.ones(3))["aggressive"] == 1
    assert "aggressive" not in bandit.probabilities(0, np.ones(3))
    for wrong in (None, np.ones(2), np.array([1, np.nan, 1])):
        with pytest.raises(ValueError, match="3 finite numbers"):
            bandit.probabilities(1, wrong)
    untrained = RecommendationBandit(BanditState("linucb")).probabilities(0)
    assert set(untrained.values()) == {1 / 3}


# Counts


def reference(decisions, answers):
    """What the counts must be, in plain Python: the latest answer within the horizon of each decision with a choice."""
    best = {}
    for i, reward, at in answers:
        d = decisions.get(i)
        if d and d["segment_id"] is not None and (d["strategy_propensity"] or 1) < 1 and at <= d["decided_at"] + HORIZON:
            best[i] = max(best.get(i, (at, 0)), (at, round(reward * MILLION)))
    counts = {}
    for i, (_, r) in best.items():
        d = decisions[i]
        held = counts.setdefault((d["segment_id"], d["strategy"], week_of(d["decided_at"])), [0, 0])
        held[0] += 1
        held[1] += r
    return sorted((*k, *v) for k, v in counts.items())


def decided(n=DECISIONS):
    rng = random.Random(1)
    rows = {}
    for i in range(1, n + 1):
        g = rng.choice([-1, 0, 1, 1, None])
        pool = pool_of(-1 if g is None else g)
        p = None if g is None else 1.0 if i % 11 == 0 else 0.5
        rows[i] = {"id": i, "user_id": 1 + i % 7, "decided_at": START + timedelta(hours=rng.randrange(24 * 20)), "action": "save_more", "propensity": 0.2,
                   "strategy": rng.choice(pool), "model_version": "v", "segment_id": g, "strategy_propensity": p}
    return rows


def answered(seed, decisions, n=400):
    """Answers in a wild order: several for some decisions, some too late, some to decisions that there are not."""
    rng = random.Random(seed)
    some = [(i := rng.randint(1, len(decisions) + 3), rng.choice([0.0, 1.0, 1 / 3, 0.5]), (decisions.get(i) or decisions[1])["decided_at"] + timedelta(hours=rng.randrange(24 * 40)))
            for _ in range(n)]
    return [Answer(*a) for a in rng.choices(some, k=n)]


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request, tmp_path):
    """A database with decisions."""
    url = f"sqlite:///{tmp_path}/fincoach.db" if request.param == "sqlite" else os.environ.get("FINCOACH_TEST_POSTGRES")
    if not url:
        pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
    made = connect(url, wait=60)
    if request.param == "postgresql":
        with writing(made) as c:
            c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*TABLES, VERSION_TABLE])} CASCADE")
    fill(made)
    yield made
    made.dispose()


def fill(engine):
    upgrade(engine)
    people = pl.DataFrame({"id": range(1, 8), "external_id": [f"p{i}" for i in range(1, 8)], "currency": "EUR", "created_at": START})
    load(engine, {"users": people, "recommendation_history": pl.DataFrame(list(decided().values()), infer_schema_length=None)})


def stored(engine):
    """The counts without empty rows, and what was remembered."""
    with engine.connect() as c:
        updates = sorted(c.execute(sa.select(TABLES["bandit_updates"])).all())
    return [r for r in StrategyUpdater(engine).rows() if r[3]], [tuple(u) for u in updates]


@pytest.fixture(scope="module")
def memory():
    engine = connect("sqlite://")
    fill(engine)
    return engine


@given(st.integers(0, 2**32 - 1), st.integers(1, 50), st.data())
@QUICK
def test_any_order_and_repetition_gives_the_same_counts(memory, seed, size, data):
    decisions, answers = decided(), answered(seed, decided(), 60)
    states = []
    for order in (answers, data.draw(st.permutations(answers + answers[::3]))):
        with writing(memory) as c:
            for name in ("bandit_counts", "bandit_updates"):
                c.execute(sa.delete(TABLES[name]))
        updater = StrategyUpdater(memory)
        for at in range(0, len(order), size):
            updater.record(order[at : at + size])
        states.append(stored(memory))
    assert states[0] == states[1]
    assert states[0][0] == reference(decisions, answers)


def test_an_answer_says_what_it_did(engine):
    bandit = RecommendationBandit(engine=engine)
    free = next(i for i, d in decided().items() if d["strategy_propensity"] == 0.5)
    none = next(i for i, d in decided().items() if d["strategy_propensity"] is None)
    only = next(i for i, d in decided().items() if d["strategy_propensity"] == 1)
    at = decided()[free]["decided_at"]
    said = [bandit.update_strategy_rewards(i, r, t) for i, r, t in (
        (free, 0.0, at + DAY), (free, 0.0, at + DAY), (free, 1.0, at + 2 * DAY), (free, 0.0, at + DAY), (free, 0.0, at + HORIZON + DAY),
        (none, 1.0, START + DAY), (only, 1.0, START + DAY), (10_000, 1.0, START))]
    assert said == ["counted", "same", "corrected", "older", "late", "no choice", "no choice", "unknown"]
    d = decided()[free]
    assert stored(engine)[0] == [(d["segment_id"], d["strategy"], week_of(at), 1, MILLION)]
    assert bandit.export().counts == tuple(StrategyUpdater(engine).rows())
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            bandit.update_strategy_rewards(free, wrong, at + 3 * DAY)
    with pytest.raises(ValueError, match="no time zone"):
        bandit.update_strategy_rewards(free, 1.0, datetime(2026, 3, 3))


def test_all_or_nothing(engine):
    before = stored(engine)
    with pytest.raises(ValueError, match="from 0 to 1"):
        StrategyUpdater(engine).record([Answer(1, 1.0, START), Answer(2, 7.0, START)])
    assert stored(engine) == before


def test_whoever_is_deleted_leaves_no_answer_behind(engine):
    updater = StrategyUpdater(engine)
    updater.record(answered(1, decided()))
    counts = updater.rows()
    with writing(engine) as c:
        c.execute(sa.delete(TABLES["users"]).where(TABLES["users"].c.id == 3))
    gone = {i for i, d in decided().items() if d["user_id"] == 3}
    assert {u[0] for u in stored(engine)[1]}.isdisjoint(gone)
    assert updater.rows() == counts, "sums are about nobody"
    assert set(updater.record([Answer(i, 1.0, START) for i in gone])) == {"unknown"}


# Real processes


WORKER = """
import json, os, signal, sys
from datetime import datetime
import sqlalchemy as sa
from fincoach.data.database import connect
from fincoach.serving.bandit import Answer, StrategyUpdater


def work(url, answers, batch, at):
    engine, seen = connect(url, wait=60), 0
    answers = [Answer(i, r, datetime.fromisoformat(t)) for i, r, t in answers]

    @sa.event.listens_for(engine, "after_cursor_execute")
    def on_statement(connection, cursor, statement, *_):
        nonlocal seen
        seen += statement.lstrip().upper().startswith(("INSERT", "UPDATE"))
        if at > 0 and seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    @sa.event.listens_for(engine, "commit")
    def on_commit(connection):
        if at == -1 and seen:
            os.kill(os.getpid(), signal.SIGKILL)

    updater = StrategyUpdater(engine)
    for first in range(0, len(answers), batch):
        updater.record(answers[first:first + batch])


for line in sys.stdin:
    children = []
    for job in json.loads(line):
        pid = os.fork()
        if pid == 0:
            work(*job)
            os._exit(0)
        children.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)
"""


@pytest.fixture(scope="module")
def workers():
    """`workers(engine, [(answers, batch, at), ...])` runs a process for each, all at once; their exit statuses.

    A process kills itself after its change number `at` to the database; for -1 at its first commit, for 0 never.
    """
    parent = subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(engine, jobs):
        url = engine.url.render_as_string(hide_password=False)
        parent.stdin.write(json.dumps([(url, [(i, r, t.isoformat()) for i, r, t in answers], batch, at) for answers, batch, at in jobs]) + "\n")
        parent.stdin.flush()
        return json.loads(parent.stdout.readline())

    yield run
    parent.communicate()


def test_processes_at_once_lose_nothing_and_double_nothing(engine, workers):
    """Four processes: all told of the same decisions, in different orders and batches, with revised answers."""
    decisions, jobs = decided(), []
    answers = answered(5, decisions)
    for i, batch in enumerate((3, 9, 40, 400)):
        order = answers[::-1] if i else answers[:]
        random.Random(i).shuffle(order) if i > 1 else None
        jobs.append((order, batch, 0))
    assert workers(engine, jobs) == [0, 0, 0, 0]
    assert stored(engine)[0] == reference(decisions, answers)


def test_killed_between_update_and_commit_it_has_not_happened(engine, workers):
    decisions = decided()
    answers = answered(9, decisions, 120)
    seen = []
    for at in (1, 2, 3, 4, 8, -1):
        assert workers(engine, [(answers, 10, at)]) == [-9]
        done, updates = stored(engine)
        seen.append(len(updates))
        assert sum(r[3] for r in done) == len(updates), "counts and memory are of the same moment"
        assert sum(r[4] for r in done) == sum(u[1] for u in updates)
    assert seen[0] == seen[1] == 0, "killed before the first commit"
    assert seen[-1] > 0, "killed after one"
    StrategyUpdater(engine).record(answers)
    assert stored(engine)[0] == reference(decisions, answers)


# Settling


def feedback(rows):
    return {"recommendation_feedback": pl.DataFrame([{"id": k, "recommendation_id": i, "received_at": at, "response": r, "helpful": h} for k, (i, at, r, h) in enumerate(rows, 1)],
                                                    schema_overrides={"helpful": pl.Boolean})}


def test_settling_counts_what_is_known_and_silence_after_four_weeks(engine):
    free = [i for i, d in decided().items() if d["strategy_propensity"] == 0.5]
    at = {i: decided()[i]["decided_at"] for i in free}
    a, b, c, d = free[:4]
    load(engine, feedback([(a, at[a] + DAY, "accepted", None), (b, at[b] + DAY, "accepted", False), (c, at[c] + DAY, "accepted", None), (c, at[c] + 2 * DAY, "dismissed", None),
                           (d, at[d] + 29 * DAY, "accepted", None)]))
    updater = StrategyUpdater(engine)
    assert updater.settle(START - DAY) == {}, "as of then nobody had decided anything"
    assert updater.settle(max(at[a], at[b], at[c]) + 2 * DAY) == {"counted": 3}
    rewards = {u[0]: u[1] for u in stored(engine)[1]}
    assert rewards == {a: MILLION, b: 0, c: 0}
    over = START + 60 * DAY
    assert updater.settle(over) == {"counted": len(free) - 3}
    assert updater.settle(over) == {}
    assert updater.settle(over + 900 * DAY) == {}
    rewards = {u[0]: u[1] for u in stored(engine)[1]}
    assert sum(rewards.values()) == MILLION, "the answer of d came too late"
    assert updater.record([Answer(d, 1.0, at[d] + 3 * DAY)]) == ["corrected"], "a real answer, told late, replaces silence"


# Reading as of a week


@given(st.lists(st.tuples(st.sampled_from(["balanced", "personalized"]), st.integers(0, 30), st.sampled_from([0.0, 0.25, 1.0])), max_size=40), st.integers(0, 40), st.sampled_from([1.0, 0.9, 0.5]))
@QUICK
def test_old_weeks_tell_less_and_later_ones_nothing_yet(rows, week, discount):
    tracker, pool = PerformanceTracker(), ("conservative", "balanced", "personalized")
    for s, w, r in rows:
        tracker.add(2, s, w, r)
    n, r = tracker.read(2, pool, discount, week)
    for i, s in enumerate(pool):
        assert n[i] == pytest.approx(sum(discount ** (week - w) for t, w, _ in rows if t == s and w <= week))
        assert r[i] == pytest.approx(sum(x * discount ** (week - w) for t, w, x in rows if t == s and w <= week))
    again = PerformanceTracker(tracker.rows())
    assert again.rows() == tracker.rows()


def test_the_same_from_a_database_and_from_its_export(engine):
    StrategyUpdater(engine).record(answered(3, decided()))
    for algorithm in ALGORITHMS:
        live = RecommendationBandit(BanditState(algorithm), engine)
        frozen = RecommendationBandit(BanditState.from_json(live.export().to_json()))
        for at in (None, START + 7 * DAY, START + 100 * DAY):
            assert all(live.probabilities(g, at=at) == frozen.probabilities(g, at=at) for g in range(-1, 5))
        assert live.evaluate_strategy_performance(START + 30 * DAY).rows == frozen.evaluate_strategy_performance(START + 30 * DAY).rows
    card = live.evaluate_strategy_performance()
    assert sum(r["decisions"] for r in card.rows) == sum(r[3] for r in stored(engine)[0])
    assert all(r["low"] <= (r["mean"] or 0.5) <= r["high"] for r in card.rows)
    assert "What helps whom" in card.to_html()


# Files


def a_state():
    rng = np.random.default_rng(2)
    linear = replayed(4, rng.normal(size=(50, 3)), rng.integers(0, 4, 50), rng.random(50), np.arange(50) // 10, width=0.5, discount=0.9)
    return BanditState("linucb", 0.05, 0.5, 0.9, counts=((0, "balanced", 10, 5, 2 * MILLION), (-1, "conservative", 11, 1, 0)), linear=linear)


def test_a_file_gives_the_same_state_bit_for_bit():
    text = a_state().to_json()
    assert BanditState.from_json(text).to_json() == text
    assert BanditState.from_json(text.encode()) == a_state()


def places(value, path=()):
    yield path
    for k, v in value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ():
        yield from places(v, (*path, k))


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_damaged_file_is_refused_or_is_a_state(data):
    """Whatever is put anywhere: a `ParametersError`, or a state that chooses."""
    whole = json.loads(a_state().to_json())
    path = data.draw(st.sampled_from(sorted(places(whole), key=str)))
    junk = data.draw(st.sampled_from([None, True, -1, 10**30, 1.5, float("1e300"), "x", "", [], {}, [[]], {"a": 1}, [None], "conservative", 0]))
    if not path:
        whole = junk
    else:
        into = whole
        for k in path[:-1]:
            into = into[k]
        into[path[-1]] = junk
    try:
        state = BanditState.from_json(json.dumps(whole))
    except ParametersError:
        return
    assert abs(sum(RecommendationBandit(state).probabilities(-1 if -1 in state.pools else min(state.pools), np.zeros(3)).values()) - 1) < 1e-9


@pytest.mark.parametrize(("change", "said"), [
    (lambda d: d.update(format=2), "newer"), (lambda d: d.update(extra=1), "unknown field"), (lambda d: d.pop("pools"), "lacks the field"), (lambda d: d.update(explore=1.5), "explore"),
    (lambda d: d.update(algorithm="magic"), "there are epsilon_greedy"), (lambda d: d["counts"].append(d["counts"][0]), "twice"), (lambda d: d["pools"].update({"9": ["balanced"]}), "segment"),
    (lambda d: d["counts"][0].__setitem__(4, 2 * MILLION * 9), "reward"), (lambda d: d["linear"]["A"][0].__setitem__(0, -5.0), "sum of squares"), (lambda d: d["linear"]["b"].pop(), "lists of 4"),
    (lambda d: d.update(algorithm="ucb"), "linucb only")])  # fmt: skip
def test_a_wrong_file_says_what_is_wrong(change, said):
    whole = json.loads(a_state().to_json())
    change(whole)
    with pytest.raises(ParametersError, match=said):
        BanditState.from_json(json.dumps(whole))
    with pytest.raises(ParametersError):
        BanditState.from_json("[" * 100_000)
    with pytest.raises(ParametersError, match="NaN"):
        BanditState.from_json('{"format": NaN}')


def test_its_card_and_its_state_read_no_clock():
    """A bandit asked without a moment answers as of the newest week that was counted, whenever it is asked."""
    bandit = RecommendationBandit(BanditState("thompson", counts=((0, "balanced", 10, 50, 20 * MILLION),)))
    assert bandit.probabilities(0) == bandit.probabilities(0, at=datetime(1970, 1, 5, tzinfo=UTC) + timedelta(weeks=10))
    assert bandit.probabilities(0) != bandit.probabilities(0, at=START)
