"""What is served beside boosting that is told only what any forecaster is told: `python benchmarks/forecasting/boosting.py`.

In `run.py` "boosting" are our own trees: they read our inputs (departments, the calendar of what resembles each week, what falls due) and are half of what is served. Here stands a
boosted median as a library's user would make one from weekly totals: scikit-learn, its default settings, absolute error, lags and rolling means, the calendar; one model a target, all households, as
multiples of the household's own mean. Everybody learns from the weeks up to the first of twelve origins, once. Writes boosting.json beside this file.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from worlds import HORIZON, households

from fincoach.evaluate.forecasts import paired_difference, wape
from fincoach.forecast.spending import PredictionEvaluator, SpendingConfig, SpendingPredictor

HERE = Path(__file__).parent
LAGS, MEANS, LEAST = 8, (4, 12, 26), 8


def told(total, begins, mondays, week):
    """What is told at the end of a week (n, inputs), and the unit (n,): the mean of the last 26 known weeks."""
    known = np.arange(week + 1) >= begins[:, None]
    past = np.where(known, total[:, : week + 1], np.nan)[:, -52:]
    past = np.pad(past, ((0, 0), (52 - past.shape[1], 0)), constant_values=np.nan)
    means = np.stack([np.nansum(past[:, -k:], 1) / np.maximum((~np.isnan(past[:, -k:])).sum(1), 1) for k in MEANS], 1)
    unit = np.where(means[:, -1] > 0, means[:, -1], np.nan)
    spread = np.nansum(np.abs(past[:, -12:] - means[:, 1:2]), 1) / 12
    silent = (past[:, -12:] == 0).sum(1)
    day = np.datetime64(int(mondays[week]) + 7, "D")
    month = day.astype("M8[M]")
    calendar = np.tile([(day - month.astype("M8[D]")).astype(int), month.astype(int) % 12], (len(total), 1))
    rows = np.column_stack([past[:, -LAGS:] / unit[:, None], means / unit[:, None], spread / unit, silent, past[:, [-13]] / unit[:, None], known.sum(1), calendar])
    return rows, unit


def target(total, week):
    """Next week, the fourth week and the mean of four weeks after a week, (n, 3)."""
    after = total[:, week + 1 : week + 1 + HORIZON]
    return np.column_stack([after[:, 0], after[:, -1], after.mean(1)])


def plain_boosting(world):
    """(n, O, 3) what boosting on totals says of `target`, and CPU-seconds."""
    s, first, start = world.series, int(world.origins[0]), time.process_time()
    parts = []
    for week in range(LEAST, first - HORIZON + 1):
        rows, unit = told(s.total, s.begins, s.mondays, week)
        who = np.flatnonzero((week + 1 - s.begins >= LEAST) & np.isfinite(unit))
        parts.append((rows[who], target(s.total, week)[who] / unit[who, None], unit[who]))
    x, y, unit = (np.concatenate(p) for p in zip(*parts, strict=True))
    models = [HistGradientBoostingRegressor(loss="absolute_error", random_state=0).fit(x, column, sample_weight=unit) for column in y.T]
    said = []
    for week in world.origins:
        rows, unit = told(s.total, s.begins, s.mondays, int(week))
        said.append(np.stack([m.predict(rows) for m in models], 1) * unit[:, None])
    return np.stack(said, 1), time.process_time() - start


def compared(world, test, plain):
    """Errors of what is served, of our trees and of boosting on totals, and differences, by group."""
    out = {}
    for group, people in {"everybody": np.arange(len(world.series)), **world.groups}.items():
        served, trees = (test.models[k] for k in ("FinCoach", "boosting"))
        known = np.isfinite(plain[people]).all((1, 2))
        people = people[known]
        y, month, other = test.y[people], test.month[people], plain[people]
        part = {"people": len(people)}
        for what, came, ours, own, theirs in (("next week", y[..., 0], served.point[people][..., 0], trees.point[people][..., 0], other[..., 0]),
                                              ("4th week", y[..., 3], served.point[people][..., 3], trees.point[people][..., 3], other[..., 1]),
                                              ("4 weeks", month, served.month[people][..., 2], trees.month[people][..., 2], HORIZON * other[..., 2])):  # fmt: skip
            part[what] = {"served": wape(came, ours).value, "our trees": wape(came, own).value, "boosting on totals": wape(came, theirs).value,
                          "served / our trees": list(vars(paired_difference(came, ours, own)).values())[:3], "served / boosting on totals": list(vars(paired_difference(came, ours, theirs)).values())[:3],
                          "our trees / boosting on totals": list(vars(paired_difference(came, own, theirs)).values())[:3]}
        out[group] = part
    return out


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    world, config = households(), SpendingConfig()
    plain, cpu = plain_boosting(world)
    first, start = int(world.origins[0]), time.process_time()
    model = SpendingPredictor.fit(world.series.until(first), world.echo[:, : first + 1], config).model
    ours = time.process_time() - start
    found = compared(world, PredictionEvaluator(world.series, world.echo).evaluate(model, world.origins, HORIZON, rivals=()), plain)
    (HERE / "boosting.json").write_text(json.dumps({"config": asdict(config), "cpu": {"served": round(ours, 1), "boosting on totals": round(cpu, 1)}, "groups": found}, indent=1) + "\n")
    for group, part in found.items():
        print(f"{group} ({part.pop('people'):,})")
        for what, row in part.items():
            print(f"  {what:10} " + "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v[0]:+.1%} ({v[1]:+.1%} to {v[2]:+.1%})" for k, v in row.items()))


if __name__ == "__main__":
    main()
