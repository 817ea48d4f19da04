"""Worlds whose truth is known: bandits, sequences, and the population of `fincoach.data.population`."""

from datetime import timedelta

import numpy as np
import polars as pl

from fincoach.data.population import ACTIONS, generate
from fincoach.data.tables import SEGMENTS
from fincoach.recommend.ope import Episodes, Log, cross_fit

TRAITS, CHOICES = 4, 6
TASTE = np.random.default_rng(3).normal(size=(TRAITS, CHOICES))
HABIT = np.random.default_rng(4).normal(size=(TRAITS, CHOICES))


def softmax(scores):
    weight = np.exp(scores - scores.max(1, keepdims=True))
    return weight / weight.sum(1, keepdims=True)


def draw(rng, p):
    return np.minimum((p.cumsum(1) < rng.random((len(p), 1))).sum(1), p.shape[1] - 1)


class Bandit:
    """Six actions, four traits. The log follows HABIT with a share `floor` of pure chance; the policy follows TASTE with `sharp`ness."""

    def __init__(self, n, base=-1.0, floor=0.3, sharp=1.0):
        self.n, self.base, self.floor, self.sharp = n, base, floor, sharp
        crowd = np.random.default_rng(9).normal(size=(200_000, TRAITS))
        self.truth = float((self.policy(crowd) * self.chances(crowd)).sum(1).mean())

    def chances(self, x):
        return 1 / (1 + np.exp(-(self.base + x @ TASTE)))

    def policy(self, x):
        return softmax(self.sharp * x @ TASTE)

    def log(self, seed, model=True):
        rng = np.random.default_rng([seed, self.n])
        x = rng.normal(size=(self.n, TRAITS))
        p = self.floor / CHOICES + (1 - self.floor) * softmax(x @ HABIT)
        a, row = draw(rng, p), np.arange(self.n)
        reward = (rng.random(self.n) < self.chances(x)[row, a]).astype(float)
        if reward.min() == reward.max():
            return None
        guess = cross_fit(x, a, reward, CHOICES, seed=seed) if model else None
        return Log(a, reward, p[row, a], CHOICES, contexts=x, predictions=guess)


# What each segment is advised with probability 0.6; the other 0.4 are spread evenly over all actions.
ADVICE = {"Conservative Savers": "save_more", "Impulse Buyers": "reduce_spending", "Goal-Oriented": "celebrate",
          "Budget Conscious": "build_emergency_fund", "High Spenders": "review_subscriptions"}


def advice(segment):
    """The evaluated policy (n, 12) for segment numbers (n,)."""
    wanted = np.array([ACTIONS.index(ADVICE[s]) for s in SEGMENTS])
    return 0.4 / len(ACTIONS) + 0.6 * np.eye(len(ACTIONS))[wanted[segment]]


def population_log(seed, people=300, days=110):
    """(log, policy, true value on these decisions): decisions of one population, a reward is a yes.

    Decisions in the last 30 days before a person's last transaction are left out: their answers may not have come.
    """
    made = generate(people, days, seed)
    last = made.frames["transactions"].group_by("user_id").agg(pl.col("occurred_at").max().alias("last"))
    said = made.frames["recommendation_feedback"].select("recommendation_id", yes=pl.col("response").is_in(["accepted", "implemented"]))
    rows = (made.frames["recommendation_history"].join(last, on="user_id")
            .filter(pl.col("decided_at") < pl.col("last") - timedelta(days=30))
            .join(said, left_on="id", right_on="recommendation_id", how="left")
            .join(made.truth["segments"], on="user_id").with_columns(pl.col("yes").fill_null(False))
            .with_columns(phase=(pl.col("decided_at").dt.date() >= pl.col("changed_at")).fill_null(False).cast(pl.Int64)).sort("id"))
    odds = made.truth["responses"].pivot(on="action", index=["user_id", "phase"], values="probability", maintain_order=True)
    chance = rows.select("user_id", "phase").join(odds, on=["user_id", "phase"], how="left", maintain_order="left").select(ACTIONS).to_numpy()
    actions = rows["action"].replace_strict({a: i for i, a in enumerate(ACTIONS)}).to_numpy()
    rewards, segment, people = rows["yes"].cast(pl.Float64).to_numpy(), rows["segment_id"].to_numpy(), rows["user_id"].to_numpy()
    context = np.eye(len(SEGMENTS))[segment]
    guess = cross_fit(context, actions, rewards, len(ACTIONS), units=people, seed=seed)
    policy = advice(segment)
    log = Log(actions, rewards, rows["propensity"].to_numpy(), len(ACTIONS), contexts=context, predictions=guess, units=people)
    return log, policy, float((policy * chance).sum(1).mean())


STEPS, DISCOUNT = 4, 0.95
GOOD = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.2], [0.1, 0.2, 0.7]])  # chance of a reward by situation and action
MOVE = np.random.default_rng(6).dirichlet(np.ones(3), (3, 3))  # situation next, by situation and action
LOGGED = np.array([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]])
WISE = np.array([[0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.2, 0.2, 0.6]])


def sequence_truth():
    """The policy's value, backward through the steps."""
    value = np.zeros(3)
    for _ in range(STEPS):
        value = (WISE * (GOOD + DISCOUNT * MOVE @ value)).sum(1)
    return float(value.mean())


def sequence_log(n, seed):
    """(episodes, the policy's probabilities)"""
    rng, parts = np.random.default_rng([seed, n]), []
    s = rng.integers(0, 3, n)
    for t in range(STEPS):
        a = draw(rng, LOGGED[s])
        parts.append((np.arange(n), s, np.full(n, t), a, (rng.random(n) < GOOD[s, a]).astype(float)))
        s = draw(rng, MOVE[s, a])
    e, s, t, a, r = (np.concatenate(x) for x in zip(*parts, strict=True))
    at = np.eye(3 * STEPS)[s * STEPS + t]
    return Episodes(e, a, r, LOGGED[s, a], 3, states=at), WISE[s]
