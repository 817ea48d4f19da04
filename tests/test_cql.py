"""Conservative Q-learning: near the optimum where it is known, the penalty earns its keep, masks hold, same seed same bytes, files open and refuse."""

import hashlib
import io
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from fincoach.recommend import cql
from fincoach.recommend.cql import (
    CQLConfig,
    Draws,
    EnhancedQNetwork,
    SegmentAwareTrainer,
    TrainedQ,
    Transitions,
    best_of,
    clone_behaviour,
    load,
    n_step,
    segment_shares,
    select_alpha,
)
from fincoach.recommend.ope import importance_weights, snips
from fincoach.serving.network import Network

SMALL = CQLConfig(steps=60, target_every=10, evaluate_every=20, hidden=(16, 8), batch=32)


def made(n=300, d=7, a=5, seed=0, masks=True):
    """Transitions of pure chance, with masks, ends and three segments."""
    rng = np.random.default_rng(seed)
    actions, allowed, ahead = rng.integers(0, a, n), rng.random((n, a)) < 0.6, rng.random((n, a)) < 0.6
    allowed[np.arange(n), actions], ahead[:, 0] = True, True
    return Transitions(rng.normal(3, 2, (n, d)), actions, rng.normal(1, 3, n), rng.normal(3, 2, (n, d)), rng.choice([0, 0.9], n), a,
                       *((allowed, ahead) if masks else ()), segments=rng.integers(0, 3, n))


class World:
    """Twenty situations, six actions, known Q*. Two actions in each were never tried and are bad; the one tried most is the worst of the rest."""

    def __init__(self, seed, states=20, actions=6, gamma=0.8):
        rng = np.random.default_rng(seed)
        self.gamma, self.x = gamma, rng.normal(size=(states, 12)).astype(np.float32)
        self.r, self.p = rng.uniform(0, 1, (states, actions)), rng.dirichlet(np.full(states, 0.05), (states, actions))
        order = rng.permuted(np.tile(np.arange(actions), (states, 1)), axis=1)
        self.untried, tried = order[:, :2], order[:, 2:]
        np.put_along_axis(self.r, self.untried, -1.0, 1)
        self.q = np.zeros((states, actions))
        for _ in range(300):
            self.q = self.r + gamma * self.p @ self.q.max(1)
        worst = np.take_along_axis(tried, np.take_along_axis(self.q, tried, 1).argmin(1)[:, None], 1)
        self.behaviour = np.zeros((states, actions))
        np.put_along_axis(self.behaviour, tried, 0.125, 1)
        np.put_along_axis(self.behaviour, worst, 0.625, 1)

    def share(self, trained):
        """The value of the policy that takes the best by `trained`, of the best possible value; by solving, not by sampling."""
        rows, best = np.arange(len(self.x)), trained.best(self.x)
        value = np.linalg.solve(np.eye(len(rows)) - self.gamma * self.p[rows, best], self.r[rows, best])
        return value.mean() / self.q.max(1).mean()

    def log(self, n, seed):
        """`n` decisions of the behaviour, rewards with noise."""
        rng = np.random.default_rng(seed)
        s = rng.integers(0, len(self.x), n)
        a = (self.behaviour[s].cumsum(1) < rng.random((n, 1))).sum(1).clip(0, 5)
        s2 = (self.p[s, a].cumsum(1) < rng.random((n, 1))).sum(1).clip(0, len(self.x) - 1)
        return Transitions(self.x[s], a, self.r[s, a] + rng.normal(0, 0.1, n), self.x[s2], np.full(n, self.gamma), 6, segments=s % 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_near_the_optimum_and_the_penalty_is_why(seed):
    """At least .98 of V*; without the penalty the same learner falls for actions that nobody tried; imitation stays far below."""
    world = World(seed)
    log = world.log(6000, seed)
    config = CQLConfig(alpha=0.1, steps=2000, target_every=25, evaluate_every=1000, learning_rate=2e-3, hidden=(64, 32), batch=64, seed=seed)
    learned = SegmentAwareTrainer(log, config).fit()
    twin = SegmentAwareTrainer(log, replace(config, alpha=0)).fit()
    quick = replace(config, steps=300, evaluate_every=300)
    cloned, filtered = clone_behaviour(log, quick), clone_behaviour(best_of(log), quick)
    assert world.share(learned) >= 0.98
    assert world.share(twin) < 0.85
    assert world.share(cloned) < 0.5  # the most frequent action is wrong
    assert world.share(filtered) < world.share(learned) - 0.03
    fell = (twin.best(world.x)[:, None] == world.untried).any(1).mean()
    assert fell > 0.1
    assert not (learned.best(world.x)[:, None] == world.untried).any()


def graph_loss(network, memory, rows, data, alpha, double):
    """The loss of a batch written plainly, for automatic differentiation."""
    allowed, ahead = torch.from_numpy(data.allowed)[rows], torch.from_numpy(data.next_allowed)[rows]
    q = network.core(memory.states[rows])
    taken = q.gather(1, memory.actions[rows])
    with torch.no_grad():
        chooser = torch.where(ahead, network.core(memory.next_states[rows]) if double else memory.ahead[rows], -torch.inf)
        target = memory.rewards[rows] + memory.discounts[rows] * memory.ahead[rows].gather(1, chooser.argmax(1, keepdim=True))
    careful = torch.logsumexp(torch.where(allowed, q, -torch.inf), 1, keepdim=True) - taken
    return ((taken - target) ** 2).mean() / 2 + alpha * careful.mean()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_the_written_gradient_is_the_derived_one(double, masks):
    """The hand-written step against automatic differentiation, the target network being another than the online one."""
    data = made(masks=masks)
    trainer = SegmentAwareTrainer(data, replace(SMALL, alpha=0.7, double=double))
    network, target = trainer.network(), trainer.network()
    rows = torch.arange(32) * 5
    with torch.no_grad():
        target.flat.add_(torch.randn(target.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        memory, buffers = cql._Memory(data, network), cql._Buffers(network, 32 * (1 + double), 32)
        cql._look_ahead(target, memory, rows.numpy())
        cql._step(memory, buffers, rows, 0.7, values=True, pair=double)
    ours = buffers.gradient.clone()
    network.flat.grad = None
    graph_loss(network, memory, rows, data, 0.7, double).backward()
    torch.testing.assert_close(ours, network.flat.grad, rtol=1e-4, atol=1e-7)


def test_cloning_is_cross_entropy():
    """Imitation learns the behaviour's probabilities among what is allowed."""
    rng = np.random.default_rng(0)
    x, allowed = np.eye(2)[rng.integers(0, 2, 8000)], np.array([[True, True, True], [True, True, False]])
    chance = np.array([[0.6, 0.1, 0.3], [0.25, 0.75, 0.0]])
    kind = x.argmax(1)
    a = (chance[kind].cumsum(1) < rng.random((8000, 1))).sum(1)
    log = Transitions(x, a, np.zeros(8000), x, np.zeros(8000), 3, allowed=allowed[kind])
    odds = clone_behaviour(log, replace(SMALL, steps=600, batch=256, evaluate_every=600, learning_rate=2e-3)).q(np.eye(2))
    weight = np.exp(odds) * allowed
    np.testing.assert_allclose(weight / weight.sum(1, keepdims=True), chance, atol=0.05)


def test_an_action_never_allowed_moves_nothing():
    """No value, no penalty, no gradient: its column of the last layer is what it was at the start, to the bit."""
    data = made()
    allowed, ahead = data.allowed.copy(), data.next_allowed.copy()
    allowed[:, 4] = ahead[:, 4] = False
    data = replace(data, actions=np.where(data.actions == 4, 0, data.actions), allowed=allowed | np.eye(5, dtype=bool)[0], next_allowed=ahead)
    trained = SegmentAwareTrainer(data, SMALL).fit()
    (weight, bias), (first, _) = trained.network.layers()[-1], EnhancedQNetwork(7, 5, (16, 8), SMALL.seed).layers()[-1]
    assert torch.equal(weight[4], first[4])
    assert float(bias[4].detach()) == 0
    assert not torch.equal(weight[0], first[0])
    assert not (trained.best(data.states, data.allowed) == 4).any()


@pytest.mark.parametrize("double", [True, False])
def test_what_is_forbidden_ahead_is_not_looked_forward_to(double):
    """The second state pays 10 by action 1. Who may not take it there expects the 1 of action 0, and the value before it says so."""
    n = 2000
    rng = np.random.default_rng(0)
    second, a = rng.random(n) < 0.5, rng.integers(0, 2, n)
    reward = np.where(second, np.where(a == 1, 10.0, 1.0), 0.0)
    states = np.eye(2)[second.astype(int)]
    config = replace(SMALL, alpha=0, double=double, steps=400, evaluate_every=400, learning_rate=5e-3, batch=64)
    for open_there, expected in ((True, 10), (False, 1)):
        ahead = np.tile([True, open_there], (n, 1))
        data = Transitions(states, a, reward, np.tile([0.0, 1.0], (n, 1)), np.where(second, 0.0, 1.0), 2, next_allowed=ahead)
        np.testing.assert_allclose(SegmentAwareTrainer(data, config).fit().q([[1.0, 0.0]]), expected, atol=0.3)


def rewards_by_hand(i, n, rewards, following, weeks, gamma, ended):
    """Reward, row looked ahead to and discount of row `i`, one decision at a time; None if nothing is known."""
    if following[i] < 0 and not ended[i]:
        return None
    total, factor = 0.0, 1.0
    for _ in range(n):
        if following[i] < 0 and not ended[i]:
            break
        total += factor * rewards[i]
        if following[i] < 0:
            return total, None, 0.0
        factor *= gamma ** weeks[i]
        i = following[i]
    return total, i, factor


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.1, 1))
def test_n_step_is_the_sum_by_hand(seed, n, gamma):
    rng = np.random.default_rng(seed)
    size = 40
    person = np.sort(rng.integers(0, 8, size))
    following = np.where(np.append(person[1:] == person[:-1], False), np.arange(1, size + 1), -1)
    shuffle = rng.permutation(size)  # rows need no order
    place = np.argsort(shuffle)
    following = np.where(following[shuffle] < 0, -1, place[following[shuffle].clip(0, size - 1)])
    rewards, weeks, ended = rng.normal(size=size), rng.uniform(0.5, 3, size), rng.random(size) < 0.5
    expected = [(i, e) for i in range(size) if (e := rewards_by_hand(i, n, rewards, following, weeks, gamma, ended))]
    if len(expected) < 2:
        return
    t = n_step(np.arange(size)[:, None], np.zeros(size, int), rewards, following, 2, gamma, n, weeks, ended, allowed=np.ones((size, 2)), segments=person)
    assert t.states[:, 0].tolist() == [i for i, _ in expected]
    assert t.segments.tolist() == [person[i] for i, _ in expected]
    np.testing.assert_allclose(t.rewards, [e[0] for _, e in expected], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(t.discounts, [e[2] for _, e in expected], rtol=1e-5)
    assert all(t.next_states[k, 0] == e[1] for k, (_, e) in enumerate(expected) if e[1] is not None)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.floats(0, 1), st.integers(8, 256))
def test_every_batch_holds_its_quota_of_every_segment(sizes, lift, batch):
    segments = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) * 3 - 1, sizes))
    ids, shares = segment_shares(segments, lift)
    block = Draws(segments, batch, lift, np.random.default_rng(1)).block(20)
    assert np.isclose(shares.sum(), 1)
    for segment, share in zip(ids, shares, strict=True):
        held = (segments[block] == segment).sum(1)
        assert (np.abs(held - share * batch) < 1 + 1e-6).all()
    assert block.min() >= 0
    assert block.max() < len(segments)


def test_rows_of_a_segment_are_drawn_alike():
    segments = np.repeat([0, 1], [990, 10])
    counts = np.bincount(Draws(segments, 100, 1.0, np.random.default_rng(0)).block(2000).ravel(), minlength=1000)
    assert abs(counts[990:].sum() - 100_000) <= 2000  # half of all, though 1 % of the rows
    assert counts[990:].std() / counts[990:].mean() < 0.03
    assert abs(counts[:990].std() / counts[:990].mean() - 0.1) < 0.02  # as chance has it: one over the root of 101


CODE = """
import hashlib, numpy as np, torch
torch.manual_seed({noise}); torch.set_num_threads({threads})
from test_cql import SMALL, made
from fincoach.recommend.cql import SegmentAwareTrainer
t = SegmentAwareTrainer(made(), SMALL).fit(lambda q: -len(q.history))
print(hashlib.sha256(t.to_pth() + t.to_onnx()).hexdigest())
"""


def test_same_seed_same_bytes_in_another_process_too():
    """Whatever the random state and the number of threads around it; and another seed gives another network."""
    ours = SegmentAwareTrainer(made(), SMALL).fit(lambda q: -len(q.history))
    other = subprocess.run([sys.executable, "-c", CODE.format(noise=5, threads=2)], capture_output=True, text=True, cwd=ROOT / "tests", check=True,
                           env={**__import__("os").environ, "PYTHONPATH": f"{ROOT}"})
    assert hashlib.sha256(ours.to_pth() + ours.to_onnx()).hexdigest() == other.stdout.strip()
    before = torch.get_num_threads()
    assert SegmentAwareTrainer(made(), replace(SMALL, seed=1)).fit().to_onnx() != ours.to_onnx()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("hidden", [(256, 128, 64), (5,), ()])
def test_onnx_says_the_same(hidden):
    """Within float32 rounding, any number of rows, through the gate that serving puts before it."""
    data = made(d=9)
    trained = SegmentAwareTrainer(replace(data, states=data.states * 50, rewards=data.rewards * 1e3), replace(SMALL, hidden=hidden)).fit()
    served = Network(trained.to_onnx(), 9, 5)
    for rows in (1, 3, 200):
        x = (np.random.default_rng(rows).normal(150, 100, (rows, 9))).astype(np.float32)
        q = trained.q(x)
        np.testing.assert_allclose(served(x), q, rtol=0, atol=3e-6 * np.abs(q).max())


def test_the_pth_opens_and_comes_back():
    trained = SegmentAwareTrainer(made(), SMALL, [f"s{i}" for i in range(7)], list("abcde")).fit(lambda q: 1.5)
    held = torch.load(io.BytesIO(trained.to_pth()), weights_only=True)
    assert set(held["weights"]) == {"flat", "center", "spread", "unit"}
    back = load(trained.to_pth())
    assert (back.state_names, back.action_names, back.config, back.step, back.value) == (trained.state_names, tuple("abcde"), trained.config, trained.step, 1.5)
    assert back.history.equals(trained.history)
    assert np.array_equal(back.q(made().states), trained.q(made().states))
    assert back.to_pth() == trained.to_pth()


class Poison:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.poisoned = True",))


def test_hostile_and_broken_files_are_refused():
    good = SegmentAwareTrainer(made(), SMALL).fit().to_pth()
    torch.save({"format": 1, "weights": Poison()}, bad := io.BytesIO())
    held = torch.load(io.BytesIO(good), weights_only=True)
    torch.save({**held, "format": 99}, newer := io.BytesIO())
    torch.save({**held, "sizes": [7, 16, 9, 5]}, other := io.BytesIO())
    for wrong in (b"", b"not a file", good[: len(good) // 2], bad.getvalue(), pickle.dumps(Poison()), other.getvalue()):
        with pytest.raises(ValueError, match="take the file that training wrote"):
            load(wrong)
    with pytest.raises(ValueError, match="update FinCoach"):
        load(newer.getvalue())
    assert not hasattr(__import__("builtins"), "poisoned")


def test_held_out_value_alone_decides_when_to_stop():
    """The kept step is the best by `validate`, whatever the loss does; after `patience` looks without a better one it ends."""
    said, seen, values = [], [], iter([1.0, 3.0, 2.0, 2.9, 3.0, 9.0])
    config = replace(SMALL, steps=400, patience=3)

    def validate(now):
        seen.append(now.network.flat.detach().clone())
        return next(values)

    trained = SegmentAwareTrainer(made(), config).fit(validate, said.append)
    assert trained.history["value"].to_list() == [1.0, 3.0, 2.0, 2.9, 3.0]
    assert (trained.step, trained.value, len(said)) == (40, 3.0, 5)
    assert [torch.equal(trained.network.flat, s) for s in seen] == [False, True, False, False, False]  # what is kept is the network of that step
    with pytest.raises(ValueError, match="must return a finite number"):
        SegmentAwareTrainer(made(), config).fit(lambda q: float("nan"))


def test_alpha_is_chosen_by_held_out_value_of_the_log():
    """One decision a person; half of the log learns, half says by SNIPS which alpha is best. The truth agrees, the training loss would not."""
    rng = np.random.default_rng(2)
    n, taste = 6000, rng.normal(size=(6, 4))
    x = rng.normal(size=(n, 6)).astype(np.float32)
    chance = 1 / (1 + np.exp(1 - x @ taste))
    logged = np.full((n, 4), 0.08) + 0.68 * np.eye(4)[(x @ taste).argmin(1)]  # mostly the worst
    a = (logged.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, 3)
    r = (rng.random(n) < chance[np.arange(n), a]).astype(float)
    rows, learn = np.arange(n), np.arange(n) < n // 2
    log = Transitions(x, a, r, x, np.zeros(n), 4)

    def worth(trained, held=~learn):
        policy = np.eye(4)[trained.best(x[held])]
        return snips(importance_weights(a[held], logged[rows, a][held], policy), r[held]).value

    config = replace(SMALL, steps=400, evaluate_every=100, hidden=(32,), batch=128, learning_rate=3e-3)
    best, table = select_alpha(log.take(learn), config, (0.03, 10.0), worth)
    truth = {q.config.alpha: chance[~learn][np.arange(n // 2), q.best(x[~learn])].mean()
             for q in (SegmentAwareTrainer(log.take(learn), replace(config, alpha=al)).fit(worth) for al in (0.03, 10.0))}
    assert best.config.alpha == max(truth, key=truth.get) == 0.03
    assert table.filter("kept")["alpha"].to_list() == [0.03]
    assert best.value == table["value"].max()
    assert truth[0.03] > truth[10.0] + 0.1  # that much care is imitation, and imitation of the worst
    assert truth[0.03] > 0.9 * chance[~learn].max(1).mean()


def test_of_equal_alphas_the_most_careful():
    best, table = select_alpha(made(), SMALL, (0.1, 1.0, 0.3), lambda q: 2.0)
    assert best.config.alpha == 1.0
    assert table["alpha"].to_list() == [1.0, 0.3, 0.1]


def test_units_do_not_matter():
    """Cents for euros, other units of the state: the same policy, values in the new unit."""
    data = made()
    plain = SegmentAwareTrainer(data, SMALL).fit()
    other = SegmentAwareTrainer(replace(data, states=data.states * 64 + 8, next_states=data.next_states * 64 + 8, rewards=data.rewards * 128), SMALL).fit()
    np.testing.assert_allclose(other.q(data.states * 64 + 8), plain.q(data.states) * 128, rtol=1e-3, atol=0.05)


def test_weight_decay_shrinks_what_no_evidence_holds():
    """Rewards of pure chance: with decay the network stays small, without it learns them by heart."""
    size = {w: float(SegmentAwareTrainer(made(), replace(SMALL, steps=200, evaluate_every=200, learning_rate=5e-3, weight_decay=w)).fit().network.flat.detach().norm())
            for w in (0.0, 3.0)}
    assert size[3.0] < 0.5 * size[0.0]


def test_a_column_that_stands_still_and_one_row_states():
    data = made()
    still = np.where(np.arange(7) == 2, 5.0, data.states)
    trained = SegmentAwareTrainer(replace(data, states=still), SMALL).fit()
    assert np.isfinite(trained.q(still)).all()
    assert trained.q(still[:1]).shape == (1, 5)
    assert trained.q(still[:0]).shape == (0, 5)


def test_best_of_keeps_what_went_well():
    data = made(n=400)
    kept = best_of(data, 0.25)
    assert len(kept) == 100
    assert kept.rewards.min() > np.quantile(data.rewards, 0.74)
    answers = replace(data, rewards=(np.arange(400) < 40).astype(float))  # yes and no: a quarter would reach into the noes
    assert best_of(answers, 0.25).rewards.tolist() == [1.0] * 40
    assert len(best_of(data, 0.1, returns=np.arange(400))) == 40
    with pytest.raises(ValueError, match="no best to imitate"):
        best_of(replace(data, rewards=np.ones(400)))


FINE = {"states": np.eye(2), "actions": [0, 1], "rewards": [0, 1], "next_states": [1, 1], "discounts": [0.9, 0], "n_actions": 2}


@pytest.mark.parametrize(("change", "said"), [
    ({"states": [[1.0, np.nan], [0, 1]]}, "states of row 0 is unknown"),
    ({"states": np.eye(2)[:1]}, "nothing to learn from"),
    ({"states": [1.0, 2.0]}, "states has the shape"),
    ({"states": [["a", "b"], ["c", "d"]]}, "not numbers"),
    ({"actions": [0, -1]}, "row 1 has the action -1"),
    ({"actions": [0]}, "actions has the shape"),
    ({"actions": [0.5, 1]}, "actions of row 0 is 0.5: give whole"),
    ({"rewards": [0, np.inf]}, "rewards of row 1"),
    ({"discounts": [-0.1, 0]}, "discount -0.1"),
    ({"next_states": [0, 2]}, "is row 2, but there are 2"),
    ({"next_states": np.zeros((2, 3))}, "next_states has the shape"),
    ({"allowed": [[True, False], [True, False]]}, "row 1 took the action 1, which its mask does not allow"),
    ({"next_allowed": [[True, False], [False, False]]}, "row 1 allows no action"),
    ({"segments": [0]}, "segments has the shape"),
])
def test_wrong_transitions_say_what_is_wrong(change, said):
    with pytest.raises(ValueError, match=said):
        Transitions(**{**FINE, **change})


def test_wrong_settings_say_what_is_wrong():
    for change, said in [({"steps": 0}, "steps is 0"), ({"alpha": -1}, "alpha is -1"), ({"lift": 2}, "lift is 2"), ({"evaluate_every": 150}, "multiple of target_every")]:
        with pytest.raises(ValueError, match=said):
            CQLConfig(**change)
    for call, said in [
        (lambda: SegmentAwareTrainer(made(), method="magic"), "no method 'magic'"),
        (lambda: SegmentAwareTrainer(made(), action_names=["a", "a", "b", "c", "d"]), "4 different action names for 5"),
        (lambda: select_alpha(made(), SMALL, (), len), "no alpha to try"),
        (lambda: EnhancedQNetwork(0, 3), "must be 1 or more"),
        (lambda: n_step(np.eye(2), [0, 1], [0, 1], [1, 2], 2, 0.9), "number of another row"),
        (lambda: n_step(np.eye(2), [0, 1], [0, 1], [1, -1], 2, 1.9), "gamma 1.9"),
        (lambda: SegmentAwareTrainer(made(), SMALL).fit().q(np.eye(3)), "states has the shape"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()


def test_the_card_shows_itself():
    trained = SegmentAwareTrainer(made(), SMALL).fit(lambda q: -len(q.history))
    assert isinstance(trained, TrainedQ)
    assert "held-out value" in trained._repr_html_()
    assert "Behaviour cloning" in clone_behaviour(made(), SMALL)._repr_html_()
    assert trained.to_dict()["step"] == trained.step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_learns_the_same():
    cpu, gpu = (SegmentAwareTrainer(made(), replace(SMALL, device=d)).fit() for d in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu.q(made().states), cpu.q(made().states), rtol=1e-3, atol=1e-3)
