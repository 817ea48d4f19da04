"""python benchmarks/ope/run.py [--wheel obp-0.4.1-py3-none-any.whl] [--runs N]: known truths, and the Open Bandit data.

The wheel: `pip download obp==0.4.1 --no-deps`. Without it that part is skipped and its last results are kept. Writes results.json beside this file.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from worlds import DISCOUNT, Bandit, population_log, sequence_log, sequence_truth

from fincoach.recommend.ope import (
    estimates,
    estimators,
    evaluate_episodes,
    evaluate_policy,
    fitted_q,
    support,
    worth,
)

HERE, DRAWS = Path(__file__).parent, 500


def table(found, truths):
    """Bias, root of the mean squared error, mean standard error, coverage (None: no interval) and mean width, per estimator."""
    out = {}
    for name in found[0]:
        value, low, high, error = (np.array([getattr(f[name], k) for f in found]) for k in ("value", "low", "high", "error"))
        ok = np.isfinite(low)
        out[name] = {"bias": float((value - truths).mean()), "mse": float(((value - truths) ** 2).mean()), "rmse": float(np.sqrt(((value - truths) ** 2).mean())),
                     "spread": float(value.std()), "error": float(np.nanmean(error)) if ok.any() else None,
                     "coverage": float(((low <= truths) & (truths <= high)).mean()) if ok.all() else None,
                     "width": float((high - low).mean()) if ok.all() else None}
    return {k: {n: None if x is None else round(x, 5) for n, x in row.items()} for k, row in out.items()}


def judge(values, truths):
    """Tables of the runs that were answered, and how many were."""
    truths = np.asarray(truths)
    answered = np.array([v.value is not None for v in values])
    told, true = [v for v in values if v.value is not None], truths[answered]
    out = {"runs": len(values), "answered": int(answered.sum()), "effective": float(np.median([v.support.effective for v in values])),
           "telling": float(np.median([v.support.telling for v in values])), "truth": round(float(truths.mean()), 5)}
    if told:
        out["estimators"] = table([v.estimates for v in told], true) | {"chosen": table([{"x": v.value} for v in told], true)["x"]}
        out["lower_bound"] = {"held": float(np.mean([v.lower <= t for v, t in zip(told, true, strict=True)])), "mean": round(float(np.mean([v.lower for v in told])), 4)}
    return out


def bandits(runs):
    """Three logs that can tell, and thin ones."""
    out = {}
    for name, world in {"near": Bandit(1500), "far": Bandit(2000, floor=0.2, sharp=2.0), "rare yes": Bandit(4000, base=-5.0)}.items():
        logs = [world.log(seed) for seed in range(runs)]
        out[name] = judge([evaluate_policy(log, world.policy, draws=DRAWS) for log in logs], [world.truth] * runs)
        naive = [worth(estimators(log, world.policy)["direct_method"], draws=DRAWS) for log in logs]
        out[name]["direct_method_naive_coverage"] = float(np.mean([v.low <= world.truth <= v.high for v in naive]))
        print(name, json.dumps(out[name]), flush=True)
    return out


THIN = [{"n": n, "floor": floor, "sharp": sharp} for n in (100, 300, 1000) for floor in (0.02, 0.1, 0.3) for sharp in (1.0, 3.0)]
FEW = [{"n": n, "base": base} for n in (1000, 3000) for base in (-9.0, -7.5, -6.0)]


def refusals(runs):
    """What intervals would have covered, by effective size and by telling rewards: why the limits are where they are."""
    rows = []
    for world in (Bandit(**w) for w in THIN + FEW):
        for seed in range(runs):
            log = world.log(10_000 + seed)
            if log is None:
                continue  # not one yes: such a log is refused at once
            s, found = support(log, world.policy), estimates(log, world.policy, draws=300)
            hit = {k: bool(found[k].low <= world.truth <= found[k].high) for k in ("ips", "snips", "doubly_robust")}
            rows.append((s.effective, s.telling, s.largest_share, s.supported, hit, {k: abs(found[k].value / world.truth - 1) for k in hit}))
    def group(mask):
        some = [r for r, m in zip(rows, mask, strict=True) if m]
        return {"logs": len(some)} | {k: {"coverage": round(float(np.mean([r[4][k] for r in some])), 3), "relative_error": round(float(np.mean([r[5][k] for r in some])), 3)}
                                      for k in ("ips", "snips", "doubly_robust")} if some else {"logs": 0}
    effective, telling, answered = (np.array([r[i] for r in rows]) for i in (0, 1, 3))
    out = {"answered": group(answered), "refused": group(~answered)}
    for name, x, edges in (("effective", effective, (0, 10, 30, 100, 300, 1e9)), ("telling", telling, (0, 5, 10, 20, 50, 1e9))):
        out[name] = {f"{a:g} to {b:g}": group((x >= a) & (x < b)) for a, b in pairwise(edges)}
    print("refusals", json.dumps(out), flush=True)
    return out


def population(runs):
    """Fresh populations; truth on each one's decisions, and truth of populations in general."""
    values, truths, rows = [], [], []
    for seed in range(runs):
        log, policy, truth = population_log(5_000 + seed)
        values.append(evaluate_policy(log, policy, draws=DRAWS))
        truths.append(truth)
        rows.append(len(log))
    out = judge(values, truths)
    general = float(np.average(truths, weights=rows))
    kept = [v for v in values if v.value is not None]
    out["general_truth"] = round(general, 5)
    out["coverage_of_general_truth"] = {k: c["coverage"] for k, c in table([v.estimates | {"chosen": v.value} for v in kept], np.full(len(kept), general)).items()}
    print("population", json.dumps(out), flush=True)
    return out


def sequences(runs, episodes=1000):
    """Four steps, three situations, truth by backward induction."""
    values = []
    for seed in range(runs):
        log, policy = sequence_log(episodes, seed)
        values.append(evaluate_episodes(log, policy, fitted_q(log, policy, DISCOUNT, folds=2, seed=seed), DISCOUNT, draws=DRAWS))
    out = judge(values, [sequence_truth()] * runs)
    print("sequences", json.dumps(out), flush=True)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=("bandits", "refusals", "population", "sequences", "open_bandit"))
    options = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    parts = {"bandits": lambda: bandits(options.runs), "population": lambda: population(options.runs), "sequences": lambda: sequences(options.runs),
             "refusals": lambda: refusals(max(options.runs // 7, 5))}
    if options.wheel:
        from open_bandit import compare
        parts["open_bandit"] = lambda: compare(options.wheel)
    for name, work in parts.items():
        if not options.only or name in options.only:
            results[name] = work()
            path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
