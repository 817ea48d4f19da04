"""Conservative Q-learning beside d3rlpy's DiscreteCQL: gradient steps a CPU-second and what the policies are worth. See README.md.

    python benchmarks/cql/run.py --peer FOLDER

FOLDER is where d3rlpy and its small needs were installed (README.md says how). `--rounds`, `--seeds`, `--steps` make it smaller.
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from platform import python_version

import numpy as np
import torch

from fincoach.recommend.cql import CQLConfig, SegmentAwareTrainer, best_of, clone_behaviour, n_step

HERE = Path(__file__).parent
HIDDEN, BATCH, GAMMA, EVERY, RATE = (256, 128, 64), 256, 0.8, 50, 1e-3
STATE, ACTIONS, SITUATIONS, UNTRIED, LONG = 35, 12, 40, 4, 500


class World:
    """Situations with known values: 35 numbers and noise a state, 12 actions, of which 4 were never tried and are bad; the most frequent one is the worst of the rest."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(SITUATIONS, STATE)).astype(np.float32)
        self.reward = rng.uniform(0, 1, (SITUATIONS, ACTIONS))
        self.chance = rng.dirichlet(np.full(SITUATIONS, 0.05), (SITUATIONS, ACTIONS))
        order = rng.permuted(np.tile(np.arange(ACTIONS), (SITUATIONS, 1)), axis=1)
        tried = order[:, UNTRIED:]
        np.put_along_axis(self.reward, order[:, :UNTRIED], -1.0, 1)
        self.reward /= 0.5  # so that rewards of the log have a deviation near 1, as both learners like it
        self.q = np.zeros((SITUATIONS, ACTIONS))
        for _ in range(300):
            self.q = self.reward + GAMMA * self.chance @ self.q.max(1)
        worst = np.take_along_axis(tried, np.take_along_axis(self.q, tried, 1).argmin(1)[:, None], 1)
        self.behaviour = np.zeros((SITUATIONS, ACTIONS))
        np.put_along_axis(self.behaviour, tried, 0.5 / tried.shape[1], 1)
        np.put_along_axis(self.behaviour, worst, 0.5 + 0.5 / tried.shape[1], 1)

    def log(self, sequences: int, seed: int) -> dict[str, np.ndarray]:
        """Sequences of 500 decisions by the behaviour, one after the other: states with noise, actions, rewards with noise."""
        rng = np.random.default_rng(seed)
        now, found = rng.integers(0, SITUATIONS, sequences), []
        for _ in range(LONG):
            a = draw(rng, self.behaviour[now])
            found.append((now, a))
            now = draw(rng, self.chance[now, a])
        s, a = (np.stack(v, axis=1).ravel() for v in zip(*found, strict=True))
        reward = self.reward[s, a] + rng.normal(0, 0.3, len(s))
        return {"states": (self.x[s] + rng.normal(0, 0.1, (len(s), STATE))).astype(np.float32), "actions": a, "rewards": reward / reward.std()}

    def share(self, best: np.ndarray) -> float:
        """The value of taking `best` (situations,), of the best possible value; solved, not sampled."""
        rows = np.arange(SITUATIONS)
        value = np.linalg.solve(np.eye(SITUATIONS) - GAMMA * self.chance[rows, best], self.reward[rows, best])
        return float(value.mean() / self.q.max(1).mean())


def draw(rng, chance: np.ndarray) -> np.ndarray:
    """One column a row, by its probabilities."""
    return (chance.cumsum(1) < rng.random((len(chance), 1))).sum(1).clip(0, chance.shape[1] - 1)


def ours(log: dict):
    """The log as `Transitions`; what follows a sequence's last row is unknown, in both packages."""
    n = len(log["actions"])
    following = np.where(np.arange(1, n + 1) % LONG == 0, -1, np.arange(1, n + 1))
    return n_step(log["states"], log["actions"], log["rewards"], following, ACTIONS, GAMMA, ended=False)


def peers_dataset(log: dict):
    """The log as d3rlpy's dataset."""
    from d3rlpy import ActionSpace
    from d3rlpy.dataset import MDPDataset

    n = len(log["actions"])
    return MDPDataset(log["states"], log["actions"][:, None].astype(np.int32), log["rewards"][:, None].astype(np.float32), np.zeros(n, np.float32),
                      (np.arange(1, n + 1) % LONG == 0).astype(np.float32), action_space=ActionSpace.DISCRETE, action_size=ACTIONS)


class Peer:
    """d3rlpy's DiscreteCQL with the same network, batch, rates and target updates; `steps(count)` is its own sampling and update, without its logging."""

    def __init__(self, dataset, alpha: float, seed: int):
        import d3rlpy

        d3rlpy.seed(seed)
        self.data = dataset
        encoder = d3rlpy.models.VectorEncoderFactory(hidden_units=list(HIDDEN))
        self.algo = d3rlpy.algos.DiscreteCQLConfig(learning_rate=RATE, batch_size=BATCH, gamma=GAMMA, target_update_interval=EVERY, alpha=alpha,
                                                   encoder_factory=encoder).create(device="cpu:0")
        self.algo.build_with_dataset(dataset)

    def steps(self, count: int):
        for _ in range(count):
            self.algo.update(self.data.sample_transition_batch(BATCH))

    def best(self, states: np.ndarray) -> np.ndarray:
        return self.algo.predict(states)


def config(alpha: float, seed: int, steps: int, every: int) -> CQLConfig:
    """Our settings, equal to the peer's where both have them."""
    return CQLConfig(alpha=alpha, gamma=GAMMA, hidden=HIDDEN, batch=BATCH, steps=steps, learning_rate=RATE, target_every=EVERY, evaluate_every=every,
                     patience=10**6, lift=0.0, seed=seed, device="cpu")


def spread(values) -> dict:
    """Median, quartiles, extremes."""
    return dict(zip(("median", "quarter", "three_quarters", "least", "most"), np.round(np.quantile(values, [0.5, 0.25, 0.75, 0, 1]), 2).tolist(), strict=True))


def speed(rounds: int, peer: bool) -> dict:
    """Gradient steps a CPU-second in rounds that take turns. Ours is a whole `fit`, with its preparation; the peer's is the bare loop."""
    log = World(0).log(40, 0)
    data, found = ours(log), {"ours": [], "d3rlpy": []}
    other = Peer(peers_dataset(log), 0.1, 0) if peer else None
    for turn in range(-1, rounds):  # the first is not counted
        start = time.process_time()
        SegmentAwareTrainer(data, config(0.1, turn + 1, 400, 400)).fit()
        middle = time.process_time()
        if peer:
            other.steps(100)
        end = time.process_time()
        if turn >= 0:
            found["ours"].append(400 / (middle - start))
            found["d3rlpy"].append(100 / (end - middle) if peer else np.nan)
        print(f"round {turn}: {400 / (middle - start):.0f} ours" + (f", {100 / (end - middle):.0f} d3rlpy" if peer else ""), flush=True)
    ratio = np.array(found["ours"]) / np.array(found["d3rlpy"])
    shown = {"rounds": rounds, "decisions": len(data), "ours": spread(found["ours"])}
    return {**shown, "d3rlpy": spread(found["d3rlpy"]), "ratio": spread(ratio)} if peer else shown


def worth(seed: int, alpha: float, steps: int, peer: bool) -> dict:
    """Share of V* after `steps` steps, and the mean of the last four of ten looks on the way."""
    world, looks, every = World(seed), {"ours": [], "d3rlpy": []}, steps // 10
    log = world.log(40, seed)

    def look(trained):
        looks["ours"].append(world.share(trained.best(world.x)))
        return float(len(looks["ours"]))  # nothing is chosen by the truth: the last one is kept

    SegmentAwareTrainer(ours(log), config(alpha, seed, steps, every)).fit(look)
    if peer:
        other = Peer(peers_dataset(log), alpha, seed)
        for _ in range(10):
            other.steps(every)
            looks["d3rlpy"].append(world.share(other.best(world.x)))
    return {"seed": seed, "alpha": alpha, **{k: {"last": round(v[-1], 4), "late": round(float(np.mean(v[-4:])), 4)} for k, v in looks.items() if v}}


def imitations(seed: int, steps: int) -> dict:
    """Share of V* of imitation, and of imitation of the quarter with the best rewards."""
    world, setup = World(seed), replace(config(0.1, seed, steps // 2, steps // 2))
    data = ours(world.log(40, seed))
    return {"seed": seed, "cloning": round(world.share(clone_behaviour(data, setup).best(world.x)), 4),
            "filtered": round(world.share(clone_behaviour(best_of(data), setup).best(world.x)), 4)}


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--peer", type=Path, help="folder with d3rlpy 2.8.1 and its needs; without it only ours is measured")
    ask.add_argument("--rounds", type=int, default=30)
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--steps", type=int, default=2000)
    ask.add_argument("--out", type=Path, default=HERE / "results.json")
    given = ask.parse_args()
    torch.set_num_threads(1)
    found = {"python": python_version(), "torch": torch.__version__, "load_before": round(os.getloadavg()[0], 1)}
    if given.peer:
        sys.path.append(str(given.peer))  # behind everything else: NumPy and torch are the same for both
        warnings.simplefilter("ignore")
        import d3rlpy
        import structlog

        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
        found["d3rlpy"] = d3rlpy.__version__
    peer, found["worth"], found["imitation"] = bool(given.peer), [], []
    found["speed"] = speed(given.rounds, peer)
    for seed in range(given.seeds):
        found["imitation"].append(imitations(seed, given.steps))
        for alpha in (0.0, 0.1, 0.3):
            found["worth"].append(worth(seed, alpha, given.steps, peer))
            print(found["worth"][-1], flush=True)
            given.out.write_text(json.dumps({**found, "load_after": round(os.getloadavg()[0], 1)}, indent=1) + "\n")
    print(json.dumps(found["speed"], indent=1))


if __name__ == "__main__":
    main()
