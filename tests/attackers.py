"""Attackers on anonymised people. Each knows something true of a person, how the method works and how strong it is, but not the key,
looks at everybody in the shared data, and names one. `named_rightly` is the share of people that they name rightly.

The likelihoods are smoothed counts of a candidate's rows on a grid of days and log amounts; the attacker tries every shift in whole weeks and every
level that the method may have drawn. Scores are taken with and without dividing by the candidate's number of rows, and the better one counts.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numba import njit

WIDTH = {"plain": 0.02, "ours": 0.1}  # of a bin of log amounts
BINS = {k: int(15 / w) for k, w in WIDTH.items()}
LEVELS = {k: np.arange(-int(0.75 / w), int(0.75 / w) + 1) for k, w in WIDTH.items()}  # log 2, and a little


@dataclass
class People:
    """Rows of people as arrays in the order of `ids`: local day, signed log amount, merchant as a word."""

    ids: list
    first: int
    rows: list  # of (day, sign, log amount, merchant, category)


def people_of(frames, first=None, names=None) -> People:
    """The people of frames; days are local, and counted from `first`."""
    zones = frames["users"].select(user_id="id", timezone="timezone", name="external_id")
    rows = frames["transactions"].join(zones, on="user_id")
    parts = [p.with_columns(day=pl.col("occurred_at").dt.convert_time_zone(z[0]).dt.date().to_physical()) for z, p in rows.partition_by("timezone", as_dict=True).items()]
    rows = pl.concat(parts).sort("user_id", "day", "id")
    found = {k[0]: p for k, p in rows.partition_by("name", as_dict=True).items()}
    first = int(rows["day"].min()) if first is None else first
    made = []
    for name in names or list(found):
        p = found[name]
        size = np.log(np.maximum(p["amount_minor"].abs().to_numpy(), 1))
        made.append((p["day"].to_numpy() - first, (p["amount_minor"] > 0).to_numpy().astype(int), size, p["merchant"].fill_null("").to_numpy(), p["category_id"].to_numpy()))
    return People(names or list(found), first, made)


def _smooth(counts, kernel, axis):
    """Counts spread by a kernel along an axis."""
    out, half = np.zeros_like(counts), len(kernel) // 2
    for k, w in enumerate(kernel):
        if w:
            out += w * np.roll(counts, k - half, axis)
    return out


def kernels(kind):
    """How a row's day and log amount (in bins) may have moved under the method."""
    if kind == "plain":
        return np.ones(1), np.array([0.25, 0.5, 0.25])
    day = np.zeros(2 * 84 + 1)
    day[56:113:28] += 0.75 / 3
    day[81:88] += 0.25 / 7
    z = np.arange(-12, 13) * WIDTH[kind]
    return day, np.exp(-0.5 * ((z - 0.25) / 0.4) ** 2) / np.exp(-0.5 * (z / 0.4) ** 2).sum()


PAD = 40 * 7


def _grid(rows, days, kind):
    """A candidate's density on days (padded), sign and bins."""
    day, sign, size, *_ = rows
    grid = np.zeros((days + 2 * PAD, 2, BINS[kind]), np.float32)
    np.add.at(grid, (np.clip(day + PAD, 0, days + 2 * PAD - 1), sign, np.clip((size / WIDTH[kind]).astype(int), 0, BINS[kind] - 1)), 1)
    by_day, by_bin = kernels(kind)
    return _smooth(_smooth(grid, by_day.astype(np.float32), 0), by_bin.astype(np.float32), 2)


def _known(rng, people, k, successive=False):
    """For each person the places of `k` rows that the attacker knows."""
    made = []
    for day, *_ in people.rows:
        if successive:
            at = rng.integers(0, max(len(day) - k, 0) + 1)
            made.append(np.arange(at, min(at + k, len(day))))
        else:
            made.append(rng.choice(len(day), min(k, len(day)), replace=False))
    return made


@njit(cache=True)
def _best(grid, day, sign, size, weeks, levels):
    """The highest sum of `grid` at the known rows, at any shift of days and any level."""
    best = -np.inf
    for w in weeks:
        for level in levels:
            total = 0.0
            for i in range(len(day)):
                total += grid[day[i] + w, sign[i], min(max(size[i] + level, 0), grid.shape[2] - 1)]
            best = max(best, total)
    return best


def by_rows(truth: People, shared: People, kind: str, ks, rng, targets: int) -> dict[str, float]:
    """Share named rightly from `k` true rows: from days and amounts, from amounts alone up to a factor, and from the days of successive rows alone."""
    weeks, none = np.arange(-26, 27) * 7, np.zeros(1, int)
    days = max(int(r[0].max()) for r in truth.rows + shared.rows) + 1
    who = rng.choice(len(truth.rows), min(targets, len(truth.rows)), replace=False)
    asked = [(what, k) for what in "abc" for k in ks if what == "a" or k > 1]
    known = {q: _known(rng, truth, q[1], q[0] == "c") for q in asked}
    score = {q: np.full((3, len(who), len(shared.rows)), -np.inf) for q in asked}
    for c, rows in enumerate(shared.rows):
        full = _grid(rows, days, kind)
        by_day = full.sum((1, 2))
        # That a row was left out, or changed by more than the kernels allow, is always possible: 0.05.
        views = {"a": np.log(full + 0.05), "b": np.log(full.sum(0, keepdims=True) + 0.05), "c": np.log(by_day + 0.05)[:, None, None]}
        for q in asked:
            what = q[0]
            for t, person in enumerate(who):
                day, sign, size = (x[known[q][person]] for x in truth.rows[person][:3])
                bins, zero = (size / WIDTH[kind]).astype(int), np.zeros(len(day), int)
                at = {"a": (day + PAD, sign, bins, weeks, LEVELS[kind]), "b": (zero, sign, bins, none, LEVELS[kind]), "c": (day + PAD, zero, zero, weeks, none)}[what]
                score[q][0, t, c] = _best(views[what], *at)
                score[q][1, t, c] = score[q][0, t, c] - len(day) * np.log(len(rows[0]))  # as a share of the candidate's rows
                if what == "c":
                    score[q][2, t, c] = _window(day, rows[0], by_day, weeks)
    says = {"a": "a: {} rows (day, amount)", "b": "b: ratios of {} amounts", "c": "c: gaps between {} dates"}
    return {says[q[0]].format(q[1]): max(_rightly(score[q][n], who, rng) for n in range(3 if q[0] == "c" else 2)) for q in asked}


def _window(known, day, density, weeks):
    """How like the days between the first and the last known row are a candidate's, in how many rows they have, as they are and smoothed."""
    first, last = known.min(), known.max() + 1
    want = np.sqrt(np.bincount(known - first, minlength=last - first))
    there = np.bincount(np.clip(day + PAD, 0, len(density) - 1), minlength=len(density)).astype(float)
    at = (np.arange(first, last) + PAD)[None, :] + weeks[:, None]
    return max(-((want - np.sqrt(d[at])) ** 2).sum(1).min() for d in (there, density))


def _rightly(score, who, rng):
    """The share of targets whose own score is the highest; equals are drawn by lot."""
    noise = rng.random(score.shape) * 1e-9
    return float(((score + noise).argmax(1) == who).mean())


def by_merchants(truth: People, shared: People, rng, mapped: int | None) -> float:
    """From how often the person was at which merchant. Without `mapped` only the sorted numbers count, of the ten merchants with the most rows.

    With it, that many of the person's first merchants are known by name, and pseudonyms told by their rank among all rows of their category.
    """
    def counts(rows):
        return np.unique(np.char.add(rows[4].astype(str), np.char.add("|", rows[3].astype(str))), return_counts=True)

    def ranks(people):
        every = np.concatenate([np.char.add(r[4].astype(str), np.char.add("|", r[3].astype(str))) for r in people.rows])
        words, n = np.unique(every, return_counts=True)
        made, seen = {}, {}
        for i in np.argsort(-n):
            category = words[i].split("|")[0]
            seen[category] = seen.get(category, -1) + 1
            made[words[i]] = f"{category}:{seen[category]}"
        return made

    if mapped:
        a, b = ranks(truth), ranks(shared)
        names = sorted(set(a.values()) | set(b.values()))
        place = {n: i for i, n in enumerate(names)}
        x, y = (np.zeros((len(p.rows), len(names))) for p in (truth, shared))
        for into, p, m in ((x, truth, a), (y, shared, b)):
            for i, rows in enumerate(p.rows):
                for word, n in zip(*counts(rows), strict=True):
                    into[i, place[m[word]]] = n
        told = x >= -np.sort(-x, axis=1)[:, [min(mapped, x.shape[1]) - 1]]
        share = y / y.sum(1, keepdims=True)
        pool = share.mean(0)
        multinomial = (x * told) @ np.log(0.7 * share + 0.3 * pool + 1e-6).T
        poisson = np.stack([-((np.sqrt(x[i, told[i]]) - np.sqrt(y[:, told[i]] / 0.78)) ** 2).sum(1) for i in range(len(x))])
        return max(_rightly(s, np.arange(len(x)), rng) for s in (multinomial, poisson))
    top = [np.stack([np.pad(np.sort(counts(r)[1])[::-1][:10], (0, 10))[:10] for r in p.rows]).astype(float) for p in (truth, shared)]
    x, y = top
    plain = -((np.sqrt(x)[:, None] - np.sqrt(y)[None]) ** 2).sum(2)
    shares = -((np.sqrt(x / x.sum(1, keepdims=True))[:, None] - np.sqrt(y / y.sum(1, keepdims=True))[None]) ** 2).sum(2)
    return max(_rightly(s, np.arange(len(x)), rng) for s in (plain, shares))


def by_weeks(truth: People, shared: People, rng) -> float:
    """From the whole series of weekly spending: the highest correlation at any shift in whole weeks."""
    days = max(int(r[0].max()) for r in truth.rows + shared.rows) + 1
    weeks = (days + 2 * PAD) // 7 + 1

    def series(rows):
        day, sign, size, *_ = rows
        out = np.zeros(weeks)
        np.add.at(out, (np.clip(day + PAD, 0, None)) // 7, np.where(sign == 0, np.exp(size), 0))
        return np.log1p(out)

    x, y = (np.stack([series(r) for r in p.rows]) for p in (truth, shared))
    best = np.full((len(x), len(y)), -2.0)
    for lag in range(-26, 27):
        z = np.roll(y, lag, 1)
        both = [(v - v.mean(1, keepdims=True)) / (v.std(1, keepdims=True) + 1e-9) for v in (x, z)]
        best = np.maximum(best, both[0] @ both[1].T / weeks)
    return _rightly(best, np.arange(len(x)), rng)


def all_attacks(original, shared, kind, names, seed=0, targets=100, ks=(1, 2, 3, 5, 10)) -> dict[str, float]:
    """Every attack: its name and the share of people named rightly. `names` are pairs of true and shared names of the same people, in one order."""
    first = int(original["transactions"]["occurred_at"].min().timestamp() // 86_400) - 1
    a = people_of(original, first, [n for n, _ in names])
    b = people_of(shared, first, [n for _, n in names])
    rng = np.random.default_rng(seed)
    found = by_rows(a, b, kind, ks, rng, targets)
    found["d: how often at the ten first merchants, names unknown"] = by_merchants(a, b, rng, None)
    for known in (1, 3, 10, 10_000):
        found[f"d: how often at the first {known} merchants, told by rank"] = by_merchants(a, b, rng, known)
    found["e: all weeks' spending"] = by_weeks(a, b, rng)
    return found
