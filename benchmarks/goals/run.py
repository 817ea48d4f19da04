"""python benchmarks/goals/run.py FOLDER [--repeats N]: the pipeline of the goal model, untouched, on real loans.

FOLDER holds `loan_preloan_features_682.parquet`: one row a loan, `status` (A, C: paid back; B, D: not), `ld` (the day of the loan) and numbers known
before it. Writes results.json beside this file.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import time
from pathlib import Path

import numpy as np
import polars as pl

from fincoach.forecast.goals import (
    FOREST,
    Cases,
    GoalAchievementClassifier,
    ahead,
    expected_calibration_error,
    held_out,
    paired,
    rivals,
    scores,
)

HERE = Path(__file__).parent
NO_INPUT = ("loan_id", "account_id", "status", "bad", "ld")


def read(folder):
    """The loans as cases, and the year of each."""
    loans = pl.read_parquet(Path(folder) / "loan_preloan_features_682.parquet").sort("ld", "loan_id")
    names = tuple(c for c in loans.columns if c not in NO_INPUT)
    X = loans.select(pl.col(names).cast(pl.Float64).fill_null(float("nan"))).to_numpy()
    year = loans["ld"].dt.year() if loans["ld"].dtype.is_temporal() else loans["ld"].cast(pl.String).str.slice(0, 4).cast(pl.Int64)
    good = loans["status"].is_in(["A", "C"]).to_numpy()
    return Cases(X, good, np.ones(len(loans)), loans["account_id"].to_numpy(), names), year.to_numpy()


def table(cases, p, votes=None):
    """Scores with intervals, and our Brier score less each other's; `votes`: what the forest's AUC goes by, where each fold has a curve of its own."""
    scored = lambda name, q: scores(cases, q, 400, order=votes if name == FOREST else None).items()  # noqa: E731
    return {name: {k: [round(x, 4) for x in v] for k, v in scored(name, q)} | ({"ours less theirs": [round(x, 4) for x in paired(cases, p[FOREST], q)]} if name != FOREST else {})
            for name, q in p.items()}


def pooled(cases, repeats):
    """Every loan judged by models of other folds; probabilities averaged over `repeats` ways of making folds."""
    neutral = np.nanmedian(cases.X, axis=0)
    p, votes = {FOREST: [], **{n: [] for n in rivals()}}, []
    for seed in range(repeats):
        model = GoalAchievementClassifier.fit(cases, seed=seed)
        p[FOREST].append(model.p_out)
        votes.append(model.votes_out)
        for name, make in rivals(seed).items():
            p[name].append(held_out(make, cases, neutral, seed=seed))
    order = {name: votes if name == FOREST else found for name, found in p.items()}
    single = {name: round(float(np.mean([scores(cases, q, 0)["auc"].value for q in found])), 4) for name, found in order.items()}
    mean = {name: np.mean(found, axis=0) for name, found in p.items()}
    by_curves = [round(x, 4) for x in scores(cases, mean[FOREST], 400)["auc"]]
    return table(cases, mean, np.mean(votes, axis=0)), single, by_curves, round(expected_calibration_error(cases, mean[FOREST]), 4)


def in_time(cases, year):
    """Learned from 1993 to 1996, judged on 1997 and 1998."""
    learn, test = cases.take(year <= 1996), cases.take(year > 1996)
    neutral = np.nanmedian(learn.X, axis=0)
    p = {FOREST: GoalAchievementClassifier.fit(learn).predict(test.X)} | {n: ahead(make, learn, test, neutral) for n, make in rivals().items()}
    overdrawn = test.X[:, test.names.index("balance_min")] < 0
    rule = float(((~overdrawn) == test.y).mean())
    return table(test, p), {"learned from": len(learn), "judged on": len(test), "was never overdrawn (accuracy)": round(rule, 4)}


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("folder")
    args.add_argument("--repeats", type=int, default=3)
    given = args.parse_args()
    cases, year = read(given.folder)
    start = time.process_time()
    across, single, by_curves, by_chance = pooled(cases, given.repeats)
    later, about = in_time(cases, year)
    found = {"loans": len(cases), "paid back": round(cases.base, 4), "numbers": len(cases.names), "pooled": across, "pooled, mean AUC of single runs": single, "pooled, AUC of the forest if each fold goes by its own curve": by_curves,
             "calibration error that exact probabilities would show": by_chance, "in time": later, "in time, about": about, "cpu_seconds": round(time.process_time() - start, 1)}
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    for look in ("pooled", "in time"):
        print(look)
        for name, row in found[look].items():
            print(f"  {name:26s}", "  ".join(f"{k} {v[0]:+.3f} ({v[1]:+.3f} to {v[2]:+.3f})" for k, v in row.items()))
    print(json.dumps({k: v for k, v in found.items() if k not in ("pooled", "in time")}, indent=1))


if __name__ == "__main__":
    main()
