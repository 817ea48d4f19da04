"""Bandits: how fast they decide and learn, and how much they miss, beside two other libraries. One command; see README.md.

    python benchmarks/bandit/run.py --peers FOLDER
    python benchmarks/bandit/run.py --peers FOLDER --runs 4 --steps 1000     # a first look
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl

from fincoach.data.database import connect, load, upgrade
from fincoach.serving.actions import STRATEGY_NAMES, pool_of
from fincoach.serving.bandit import (
    Answer,
    BanditState,
    LinearBandit,
    PerformanceTracker,
    RecommendationBandit,
    StrategySelector,
    StrategyUpdater,
    draw,
)

HERE = Path(__file__).resolve().parent
ARMS, WIDTH = 12, 0.5


# Who takes part


class Ours:
    """A bandit of this package; decisions come with the exact probability of every arm."""

    def __init__(self, algorithm, arms, dimension, seed, explore=0.0, discount=1.0, weekly=10**9, width=WIDTH):
        self.names = tuple(f"arm {i}" for i in range(arms))
        self.place = {n: i for i, n in enumerate(self.names)}
        self.selector, self.tracker, self.discount = StrategySelector(algorithm, explore, width), PerformanceTracker(), discount
        self.linear = LinearBandit(arms, dimension, width, discount) if algorithm == "linucb" else None
        self.rng, self.weekly, self.t = np.random.default_rng(seed), weekly, 0

    def decide(self, x):
        if self.linear is None:
            wanted = self.selector.wanted(*self.tracker.read(0, self.names, self.discount))
        else:
            score = self.linear.scores(x)
            best = score == score.max()
            wanted = best / best.sum()
        p = self.selector.probabilities(wanted)
        return self.place[draw(dict(zip(self.names, p.tolist(), strict=True)), self.rng.random()).strategy]

    def learn(self, x, arm, reward):
        week = self.t // self.weekly
        self.t += 1
        if self.linear is None:
            self.tracker.add(0, self.names[arm], week, reward)
        else:
            self.linear.update(arm, x, reward, week)


class Mabwiser:
    """mabwiser, a row at a time, as it would serve."""

    def __init__(self, algorithm, arms, dimension, seed, width=WIDTH):
        from mabwiser.mab import MAB, LearningPolicy

        policy = {"epsilon_greedy": lambda: LearningPolicy.EpsilonGreedy(0.1), "ucb": lambda: LearningPolicy.UCB1(width),
                  "thompson": LearningPolicy.ThompsonSampling, "linucb": lambda: LearningPolicy.LinUCB(width, l2_lambda=1.0)}[algorithm]()
        self.with_context, self.arms = algorithm == "linucb", list(range(arms))
        self.mab = MAB(self.arms, policy, seed=seed)
        begin = [np.zeros((arms, dimension))] if self.with_context else []  # a row of zeros an arm, since it must be fitted before it is asked
        self.mab.fit(self.arms, [0] * arms, *begin)

    def decide(self, x):
        return self.mab.predict(x[None]) if self.with_context else self.mab.predict()

    def learn(self, x, arm, reward):
        self.mab.partial_fit([arm], [reward], *([x[None]] if self.with_context else []))


class Obp:
    """The policies of obp (its files, without the package's front door, which wants libraries for other things)."""

    def __init__(self, algorithm, arms, dimension, seed, width=WIDTH):
        contextfree, linear = obp_modules()
        self.with_context = algorithm == "linucb"
        made = {"epsilon_greedy": lambda: contextfree.EpsilonGreedy(arms, epsilon=0.1, random_state=seed),
                "thompson": lambda: contextfree.BernoulliTS(arms, random_state=seed, alpha=np.ones(arms), beta=np.ones(arms)),
                "linucb": lambda: linear.LinUCB(dimension, arms, epsilon=width, random_state=seed)}
        self.policy = made[algorithm]()

    def decide(self, x):
        return int((self.policy.select_action(x[None]) if self.with_context else self.policy.select_action())[0])

    def learn(self, x, arm, reward):
        self.policy.update_params(arm, reward, *([x[None]] if self.with_context else []))


def obp_modules():
    """obp's context-free and linear policies."""
    from importlib import import_module
    from importlib.util import find_spec

    if "obp.policy" not in sys.modules:
        root = Path(find_spec("obp").origin).parent
        for name, path in (("obp", root), ("obp.policy", root / "policy")):
            module = ModuleType(name)
            module.__path__ = [str(path)]
            sys.modules[name] = module
    return import_module("obp.policy.contextfree"), import_module("obp.policy.linear")


PEERS = {"fincoach": Ours, "mabwiser": Mabwiser, "obp": Obp}
TAKES = {"fincoach": ("epsilon_greedy", "ucb", "thompson", "linucb"), "mabwiser": ("epsilon_greedy", "ucb", "thompson", "linucb"), "obp": ("epsilon_greedy", "thompson", "linucb")}


# Speed


def rates(dimension, rounds, seed=0):
    """Decisions and updates per CPU-second of everybody, interleaved: medians over rounds, and of the ratios within a round."""
    rng = np.random.default_rng(seed)
    X, arms = rng.normal(size=(4000, dimension)), rng.integers(0, ARMS, 4000)
    rewards = (rng.random(4000) < 0.2).astype(float)
    many = {"fincoach": (2000, 2000), "mabwiser": (1000, 300), "obp": (1000, 1000)}
    many_thompson = {"fincoach": (30, 2000)}
    found = {}
    for r in range(rounds + 1):  # the first round warms up
        for algorithm in TAKES["fincoach"]:
            for who in PEERS:
                if algorithm not in TAKES[who]:
                    continue
                decisions, updates = (many_thompson if algorithm == "thompson" else {}).get(who, many[who])
                bandit = PEERS[who](algorithm, ARMS, dimension, r)
                for i in range(300):
                    bandit.learn(X[i], arms[i], rewards[i])
                gc.disable()
                a = time.process_time()
                for i in range(decisions):
                    bandit.decide(X[i])
                b = time.process_time()
                for i in range(updates):
                    bandit.learn(X[i], arms[i], rewards[i])
                c = time.process_time()
                gc.enable()
                if r:
                    found.setdefault((algorithm, who), []).append((decisions / (b - a), updates / (c - b)))
    return [{"algorithm": a, "library": w, "dimension": dimension, "decisions_per_cpu_second": round(float(np.median([x for x, _ in v]))),
             "updates_per_cpu_second": round(float(np.median([y for _, y in v]))),
             "decisions_low_high": [round(min(x for x, _ in v)), round(max(x for x, _ in v))], "updates_low_high": [round(min(y for _, y in v)), round(max(y for _, y in v))],
             "ours_times_decisions": round(float(np.median([o[0] / x[0] for o, x in zip(found[a, "fincoach"], v, strict=True)])), 2),
             "ours_times_updates": round(float(np.median([o[1] / x[1] for o, x in zip(found[a, "fincoach"], v, strict=True)])), 2)}
            for (a, w), v in found.items()]


def thompson_anew(arms, n=200):
    """CPU-milliseconds for Thompson's exact probabilities when the counts were never seen before."""
    selector, rng = StrategySelector("thompson"), np.random.default_rng(arms)
    counts = [rng.integers(10, 3000, arms).astype(float) for _ in range(n)]
    rewards = [c * rng.uniform(0.1, 0.3, arms) for c in counts]
    begin = time.process_time()
    for c, r in zip(counts, rewards, strict=True):
        selector.wanted(c, r)
    return round(1000 * (time.process_time() - begin) / n, 3)


def agreement(dimension, steps=600, seed=1):
    """The share of decisions in which LinUCB of the others chooses the same arm as ours, all learning from one stream; without exact ties."""
    rng = np.random.default_rng(seed)
    bandits = {w: PEERS[w]("linucb", ARMS, dimension, 0) for w in PEERS}
    same, asked = dict.fromkeys(("mabwiser", "obp"), 0), 0
    for _ in range(steps):
        x = rng.normal(size=dimension)
        said = {w: b.decide(x) for w, b in bandits.items()}
        second, first = np.sort(bandits["fincoach"].linear.scores(x))[-2:]
        if first > second:
            asked += 1
            for w in same:
                same[w] += said[w] == said["fincoach"]
        arm, reward = int(rng.integers(ARMS)), float(rng.random() < 0.3)
        for b in bandits.values():
            b.learn(x, arm, reward)
    return {"decisions": asked, **{w: n / asked for w, n in same.items()}}


def in_database(people=400, decisions=4000):
    """CPU-milliseconds each, on SQLite: strategies chosen from live counts, and answers counted, one or 500 a transaction."""
    start = datetime(2026, 3, 2, tzinfo=UTC)
    with tempfile.TemporaryDirectory() as folder:
        engine = connect(f"sqlite:///{folder}/bandit.db")
        upgrade(engine)
        i, rng = pl.int_range(1, decisions + 1, eager=True), np.random.default_rng(0)
        segments = rng.integers(0, 5, decisions)
        load(engine, {"users": pl.DataFrame({"id": range(1, people + 1), "external_id": [f"p{k}" for k in range(people)], "currency": "EUR", "created_at": start}),
                      "recommendation_history": pl.DataFrame({
                          "id": i, "user_id": 1 + i % people, "decided_at": pl.Series([start + timedelta(hours=int(h)) for h in rng.integers(0, 24 * 364, decisions)]), "action": "save_more",
                          "propensity": 0.2, "strategy": [pool_of(g)[k] for g, k in zip(segments.tolist(), rng.integers(0, 3, decisions).tolist(), strict=True)], "model_version": "v",
                          "segment_id": segments, "strategy_propensity": 0.4}, strict=False)})
        updater, bandit = StrategyUpdater(engine), RecommendationBandit(BanditState("epsilon_greedy"), engine)
        answers = [Answer(k, float(rng.random() < 0.2), start) for k in range(1, decisions + 1)]
        taken = {}
        for name, n, todo in (("answer, 500 a transaction", 3000, lambda: [updater.record(answers[k : k + 500]) for k in range(0, 3000, 500)]),
                              ("answer, one a transaction", 600, lambda: [updater.record([a]) for a in answers[3000:3600]]),
                              ("choice from a year of weekly counts", 600, lambda: [bandit.select_strategy(k % 5, 0.5, at=start + timedelta(days=364)) for k in range(600)])):
            begin = time.process_time()
            todo()
            taken[name] = round(1000 * (time.process_time() - begin) / n, 3)
        engine.dispose()
    return taken


# Regret


def stream(kind, steps, seed, dimension=8):
    """States (steps, d), the true share that each of four strategies helps (steps, 4), and the uniform numbers that answers are drawn with."""
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(steps), rng.normal(size=(steps, dimension - 1))])
    theta = np.column_stack([rng.uniform(0.1, 0.35, 4), rng.normal(scale=0.05, size=(4, dimension - 1))])
    p = x @ theta.T
    if kind == "changing":  # half way, the base rates change hands: what was best becomes worst
        turned = theta.copy()
        order = np.argsort(theta[:, 0])
        turned[order, 0] = theta[order[::-1], 0]
        p[steps // 2 :] = x[steps // 2 :] @ turned.T
    return x, np.clip(p, 0.01, 0.99), rng.random(steps)


def entrants(seed, dimension, weekly):
    """Who runs: name -> bandit. Ours keep a floor of .05 under the probabilities together (epsilon-greedy: .1) and discount weeks by .98."""
    mine = lambda a, explore=0.05: Ours(a, 4, dimension, seed, explore, 0.98, weekly, 0.25)  # noqa: E731
    made = {"fincoach epsilon-greedy": mine("epsilon_greedy", 0.1), "fincoach UCB": mine("ucb"), "fincoach Thompson": mine("thompson"), "fincoach LinUCB": mine("linucb"),
            "fincoach LinUCB, no floor, no discount": Ours("linucb", 4, dimension, seed, 0.0, 1.0, weekly, 0.25)}
    for who in ("mabwiser", "obp"):
        for a, name in (("epsilon_greedy", "epsilon-greedy"), ("ucb", "UCB"), ("thompson", "Thompson"), ("linucb", "LinUCB")):
            if a in TAKES[who]:
                made[f"{who} {name}"] = PEERS[who](a, 4, dimension, seed, 0.25)
    return made


def regret(kind, runs, steps, weekly=25, dimension=8):
    """What each lost against always knowing best, (runs, steps) cumulated: name -> array. Everybody meets the same people and luck."""
    out = {}
    for r in range(runs):
        x, p, u = stream(kind, steps, 1000 + r, dimension)
        best = p.max(axis=1)
        out.setdefault("by chance", []).append(np.cumsum(best - p.mean(axis=1)))
        for name, bandit in entrants(r, dimension, weekly).items():
            lost = np.empty(steps)
            for t in range(steps):
                arm = bandit.decide(x[t])
                bandit.learn(x[t], arm, float(u[t] < p[t, arm]))
                lost[t] = best[t] - p[t, arm]
            out.setdefault(name, []).append(np.cumsum(lost))
    return {name: np.array(v) for name, v in out.items()}


def interval(values, seed=0):
    """The mean of the runs, and 95 % of bootstrap means."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(axis=1)
    return [round(float(v), 1) for v in (values.mean(), *np.quantile(means, [0.025, 0.975]))]


COLOURS = {"epsilon-greedy": "#b35900", "UCB": "#7a4fa3", "Thompson": "#17756a", "LinUCB": "#0b5c9e"}


def picture(curves, path):
    """Mean cumulated regret with 95 % bands, a panel a stream: ours solid with the band, others dashed and dotted."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "fincoach", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "font.family": "sans-serif"})
    fig, axes = plt.subplots(1, len(curves), figsize=(11.5, 4.9), sharey=True, layout="constrained")
    for ax, (kind, found) in zip(axes, curves.items(), strict=True):
        steps = next(iter(found.values())).shape[1]
        some, ends = np.unique(np.linspace(0, steps - 1, 160).astype(int)), []
        t = some + 1
        for name, values in found.items():
            if "no floor" in name:
                continue
            values = values[:, some]
            mean, colour = values.mean(axis=0), COLOURS.get(name.split(" ", 1)[1], "#8a939f")
            ours = name.startswith("fincoach")
            style = {"fincoach": "-", "mabwiser": "--", "obp": ":"}.get(name.split()[0], "-")
            ax.plot(t, mean, color=colour, ls=style, lw=2 if ours else 1.3, alpha=1 if ours or name == "by chance" else 0.75)
            if ours:
                half = 1.96 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
                ax.fill_between(t, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
            if ours or name == "by chance":
                ends.append([mean[-1], name.replace("fincoach ", ""), colour])
        ends.sort()
        gap = max(v[0] for v in ends) * 0.045
        for k in range(1, len(ends)):
            ends[k][0] = max(ends[k][0], ends[k - 1][0] + gap)
        for y, name, colour in ends:
            ax.text(steps * 1.015, y, name, color=colour, va="center", fontsize=9.5)
        if kind == "changing":
            ax.axvline(steps / 2, color="#8a939f", lw=0.9, ls=(0, (2, 3)))
        ax.set_title({"stationary": "Nothing changes", "changing": "Half way, the best becomes the worst"}[kind], loc="left", fontsize=11, fontweight="bold")
        ax.set_xlabel("decisions")
        ax.set_xlim(0, steps * 1.3)
        ax.set_xticks(np.linspace(0, steps, 5))
        ax.set_ylim(0)
        ax.grid(axis="y", color="#e4e8ed", lw=0.8)
    axes[0].set_ylabel("helped fewer times than by knowing best")
    handles = [plt.Line2D([], [], color="#444", ls=s, lw=w) for s, w in (("-", 2), ("--", 1.3), (":", 1.3))]
    fig.legend(handles, ["fincoach, with 95 % band", "mabwiser", "obp"], loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="a folder with mabwiser and obp, see README.md")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    sys.path.append(str(args.peers))
    versions = {d.metadata["Name"]: d.version for d in distributions(path=[str(args.peers)])}
    speed = [row for d in (17, 35) for row in rates(d, args.rounds)]
    for row in speed:
        print(f"{row['dimension']:>3} {row['algorithm']:<15}{row['library']:<10}{row['decisions_per_cpu_second']:>9,} decisions {row['updates_per_cpu_second']:>9,} updates a CPU-second; "
              f"fincoach {row['ours_times_decisions']:g} and {row['ours_times_updates']:g} times", flush=True)
    anew = {arms: thompson_anew(arms) for arms in (4, ARMS)}
    print("Thompson with new counts, CPU-milliseconds:", anew, flush=True)
    same = agreement(17)
    print("LinUCB chooses the same arm:", same, flush=True)
    stored = in_database()
    print(stored, flush=True)
    curves = {kind: regret(kind, args.runs, args.steps) for kind in ("stationary", "changing")}
    ends = {kind: {name: dict(zip(("mean", "low", "high"), interval(v[:, -1]), strict=True)) for name, v in found.items()} for kind, found in curves.items()}
    for kind, found in ends.items():
        for name, v in sorted(found.items(), key=lambda i: i[1]["mean"]):
            print(f"{kind:<11}{name:<40}{v['mean']:>7.1f} ({v['low']:.1f} to {v['high']:.1f})")
    picture(curves, args.out / "regret.svg")
    made = {"machine": {"processors": os.cpu_count(), "python": platform.python_version(), "numpy": np.__version__}, "libraries": versions, "arms": ARMS, "rounds": args.rounds,
            "speed": speed, "thompson_with_new_counts_cpu_milliseconds": anew, "linucb_same_arm": same, "sqlite_cpu_milliseconds": stored, "regret": {"runs": args.runs, "steps": args.steps, "arms": len(STRATEGY_NAMES), "dimension": 8, "at_the_end": ends}}
    (args.out / "results.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
