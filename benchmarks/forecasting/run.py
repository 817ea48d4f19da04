"""Forecasts of weekly spending beside statsforecast's and neuralforecast's: how good, and for how much work. See README.md.

    python benchmarks/forecasting/run.py --peers PEERS/bin/python [--bank FOLDER] [--only households population bank]

PEERS is an environment of its own (README.md says how to make it). Writes results.json beside this file after each world.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import ast
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from platform import python_version

import numpy as np
import torch
from worlds import HORIZON, accounts, households, population

from fincoach.evaluate.forecasts import Backtest, Forecasts, Score, paired_difference, portfolio, table, wape
from fincoach.forecast import spending
from fincoach.forecast.spending import (
    PredictionEvaluator,
    SpendingConfig,
    SpendingPredictor,
)
from fincoach.serving.forecast import SpendingModel, _past_of, _shares_in, _shares_told

HERE = Path(__file__).parent
NEURAL = {"households": ("defaults", "small", "tuned"), "population": ("small",), "bank": ("small",)}
SHARED = ("served", "learned, without dues", "past weeks' shares", "shares of last week")
WITHOUT = ("LSTM, without dues", "boosting, without dues")
EQUAL = ("naive", "seasonal naive", "12-week mean", "TSB")


def clocked(names):
    """Replace functions of `forecast.spending` by themselves with a clock; a dict of lists of CPU-seconds."""
    spent = {name: [] for name in names}

    def with_clock(name, work):
        def timed(*given, **more):
            start = time.process_time()
            try:
                return work(*given, **more)
            finally:
                spent[name].append(time.process_time() - start)
        return timed

    for name in names:
        setattr(spending, name, with_clock(name, getattr(spending, name)))
    return spent


def ours(world, spent):
    """A backtest of what is served, its parts and plain rivals, with CPU-seconds. All is learned from weeks up to the first origin, once."""
    first = int(world.origins[0])
    known, echoes = world.series.until(first), world.echo[:, : first + 1]
    some = known.take(slice(0, 60))
    spending.learn(some, echoes[:60], SpendingConfig(epochs=1, rounds=2))  # compiles
    for times in spent.values():
        times.clear()
    start = time.process_time()
    predictor = SpendingPredictor.fit(known, echoes)
    cpu = {"LSTM": {"train": spent["train_network"][-1]}, "boosting": {"train": spent["train_trees"][-1] + spent["cases_of"][-1]}, "FinCoach": {"train": time.process_time() - start}}
    test = PredictionEvaluator(world.series, world.echo).evaluate(predictor.model, world.origins, HORIZON)
    start = time.process_time()
    for week in world.origins:
        predictor.model.forecast(world.series.until(int(week)), world.echo[:, week])
    cpu["FinCoach"]["forecast"] = time.process_time() - start
    print(world.name, predictor, cpu, flush=True)
    return test, cpu, predictor.model


def dueless(world, model, cpu, spent):
    """Our LSTM and boosting alone, taught without what is known to fall due."""
    first, echoes = int(world.origins[0]), world.echo.echo
    start = time.process_time()
    parts = spending.learn(world.series.until(first), echoes[:, : first + 1], SpendingConfig())
    cpu["LSTM and boosting, without dues"] = {"train": time.process_time() - start}
    cpu["LSTM, without dues"] = {"train": spent["train_network"][-1]}
    other = SpendingModel(model.parameters, parts.network, parts.trees)
    found = [other.opinions(world.series.until(int(w)), echoes[:, w]) for w in world.origins]
    weekly, month = np.stack([o.weekly[:, :HORIZON] for o in found], 1), np.stack([o.month for o in found], 1)
    trees, trees_month, middle = np.stack([o.trees[:, :HORIZON] for o in found], 1), np.stack([o.trees_month for o in found], 1), np.arange(5) == 2
    alone = lambda a: np.where(middle, a[..., None], np.nan)  # noqa: E731
    return {WITHOUT[0]: Forecasts(WITHOUT[0], weekly[..., 2], np.sort(weekly), np.sort(month)), WITHOUT[1]: Forecasts(WITHOUT[1], trees, alone(trees), alone(trees_month))}


class Peers:
    """Parts of `peers.py`, each in a process of its own, all at once."""

    def __init__(self, world, python):
        self.folder = tempfile.TemporaryDirectory()
        s, home = world.series, Path(self.folder.name)
        np.savez(home / "series.npz", total=s.total, begins=s.begins, origins=world.origins, horizon=HORIZON, scored=world.scored, few=world.few)
        self.running = {part: subprocess.Popen([python, HERE / "peers.py", home, part], start_new_session=True) for part in ("statistical", *NEURAL[world.name])}

    def answers(self, cpu):
        """What they say; into `cpu` go CPU-seconds as told by each process itself and, for the whole of it, by the system."""
        said, middle = {}, np.arange(5) == 2
        for part, process in self.running.items():
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"peers.py {part} ended with {process.returncode}: its message is above")
            found = dict(np.load(Path(self.folder.name) / f"{part}.npz"))
            told = ast.literal_eval(str(found.pop("cpu")))
            cpu.update({f"{k}, peer": v for k, v in told.items() if isinstance(v, dict)})
            cpu[f"process: {part}"] = {"whole": used.ru_utime + used.ru_stime}
            said |= {f"{k}, peer": Forecasts(f"{k}, peer", q[..., 2], q, np.where(middle, q[..., 2].sum(-1)[..., None], np.nan)) for k, q in found.items()}
        self.folder.cleanup()
        return said


def equal(test, people):
    """The differences between our plain rivals and statsforecast's, relative to the person's mean spending (1 at least)."""
    size = np.maximum(np.nanmean(np.abs(test.y[people]), axis=(1, 2)), 1)
    out = {}
    for name in EQUAL:
        gap = np.abs(test.models[name].point[people] - test.models[f"{name}, peer"].point[people]).max((1, 2)) / size
        out[name] = {"people": int(np.isfinite(gap).sum()), "greatest": float(np.nanmax(gap)), "median": float(np.nanmedian(gap))}
    return out


def text(results):
    """JSON with lists of numbers in one line."""
    return re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m.group().split()), json.dumps(results, indent=1)) + "\n"


def plain(score: Score):
    """A score as [value, low, high]."""
    return [None if not np.isfinite(v) else round(float(v), 4) for v in (score.value, score.low, score.high)]


def pairs(test):
    """Relative WAPE differences of ours against the rivals that matter: next week, fourth week, four weeks together."""
    out = {}
    for mine in ("FinCoach", "LSTM", "boosting", WITHOUT[0]):
        for other in (k for k in test.models if k != mine and (k in ("boosting", "12-week mean", *WITHOUT) or k.endswith("peer"))):
            both = test.models[mine], test.models[other]
            out[f"{mine} / {other}"] = {f"{h} ahead": plain(paired_difference(test.y[..., h - 1], *(f.point[..., h - 1] for f in both))) for h in (1, 4)} | {
                "month": plain(paired_difference(test.month, *(f.month[..., 2] for f in both)))}
    return out


def scores(test):
    """Table, pairs and portfolios of a backtest."""
    kept = table(test)
    rows = {}
    for r in kept.iter_rows(named=True):
        if np.isfinite(r["value"]):
            where = r["level"] if r["ahead"] is None else f"{r['level']}, {r['ahead']} ahead"
            rows.setdefault(r["model"], {}).setdefault(where, {})[r["metric"]] = [round(r[k], 4) for k in ("value", "low", "high")]
    sizes = [k for k in (10, 50, 100) if k <= len(test.y)]
    pooled = {k: plain(portfolio(test.y[..., 0], test.models["FinCoach"].mean[..., 0], k)) for k in sizes}
    months = {k: plain(portfolio(test.month, test.models["FinCoach"].month[..., 2], k)) for k in sizes}
    return {"people": len(test.y), "scores": rows, "pairs": pairs(test), "portfolio_week": pooled, "portfolio_month": months}


def by_category(world, model):
    """Errors of weeks by category, next week and in the fourth, over people scored: of what is served, and of other ways to share it out; with differences."""
    said, came, whole = {}, [], []
    for week in (int(w) for w in world.origins):
        seen, known = world.series.until(week), world.echo[:, week]
        served, p = model.forecast(seen, known), _past_of(seen, HORIZON)
        y = world.series.y[:, week + 1 : week + 1 + HORIZON]
        mean = seen.y[:, -12:].mean(1)[:, None].repeat(HORIZON, 1)
        point, last = served.point[:, :HORIZON, None], np.maximum(seen.y[:, -1:], 0)
        ways = {"served": served.by_category[:, :HORIZON], "learned, without dues": point * _shares_told(p, model.parameters.alone), "past weeks' shares": point * _shares_in(p),
                "shares of last week": point * last / np.maximum(last.sum(2, keepdims=True), 1e-9), "12-week mean of each": mean, "as last week": seen.y[:, -1:].repeat(HORIZON, 1)}
        for name, amounts in ways.items():
            said.setdefault(name, []).append(np.nan_to_num(amounts))
        came.append(np.where(np.isnan(served.point[:, :1, None]), np.nan, y))
        whole.append(y.sum(2, keepdims=True))
    y, whole, said = np.stack(came, 1)[world.scored], np.stack(whole, 1)[world.scored], {k: np.stack(v, 1)[world.scored] for k, v in said.items()}
    out = {}
    for ahead in (1, 4):
        at = (slice(None), slice(None), ahead - 1)
        given = {k: v[at] / np.maximum(v[at].sum(-1, keepdims=True), 1e-9) * whole[at] for k, v in said.items() if k in SHARED}
        out[f"{ahead} ahead"] = {"error": {k: plain(wape(y[at], v[at])) for k, v in said.items()}, "error, given the total": {k: plain(wape(y[at], v)) for k, v in given.items()},
                                 "served against": {k: plain(paired_difference(y[at], said["served"][at], v[at])) for k, v in said.items() if k != "served"}}
    return out


def measure(world, python, spent):
    """Everything of one world."""
    peers = Peers(world, python)
    test, cpu, model = ours(world, spent)
    more = dueless(world, model, cpu, spent) | peers.answers(cpu)
    test = Backtest(test.user_ids, test.origins, test.mondays, test.y, test.scale, test.models | more)
    out = {"people": len(world.series), "weeks": len(world.series.mondays), "origins": world.origins.tolist(), "weights": [list(map(float, w)) for w in model.parameters.weights[:4]],
           "month_weights": list(map(float, model.parameters.month_weights)), "cpu": cpu, "equal": equal(test, world.scored)}
    out["categories"] = by_category(world, model)
    out["groups"] = {name: scores(test.take(rows)) for name, rows in world.groups.items()}
    return out


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--peers", type=Path, required=True, help="the Python of an environment with statsforecast and neuralforecast")
    ask.add_argument("--bank", type=Path, help="folder with the PKDD'99 tables")
    ask.add_argument("--only", nargs="*", choices=("households", "population", "bank"))
    given = ask.parse_args()
    torch.set_num_threads(1)
    makers = {"households": households, "population": population} | ({"bank": lambda: accounts(given.bank)} if given.bank else {})
    spent, path = clocked(("train_network", "train_trees", "cases_of")), HERE / "results.json"
    for name in given.only or makers:
        load = os.getloadavg()[0]
        found = measure(makers[name](), given.peers, spent) | {"python": python_version(), "torch": torch.__version__, "load": [round(load, 1), round(os.getloadavg()[0], 1)]}
        results = (json.loads(path.read_text()) if path.exists() else {}) | {name: found}
        path.write_text(text(results))


if __name__ == "__main__":
    main()
