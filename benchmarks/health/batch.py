"""Everybody in one call: `python benchmarks/health/batch.py [--people N] [--days D]`: outlooks and chances of goals, with their rate and the memory they need.

Small models are trained first on other people, so that the whole road is walked; the people come from a snapshot on disk. Writes batch.json beside this file.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import tempfile
import time
from datetime import date
from pathlib import Path

from fincoach.data.export import write_snapshot
from fincoach.data.population import generate
from fincoach.forecast import goal_training, health
from fincoach.serving.artifacts import promote, publish
from fincoach.serving.goals import GoalPredictionService
from fincoach.serving.health import FinancialHealthForecaster

HERE = Path(__file__).parent


def peak_mib():
    """The most memory this process held."""
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1]) / 1024


def trained(folder):
    """Small versions of both models, published and promoted."""
    people = generate(people=400, days=600, seed=11)
    snapshot, day = write_snapshot(people.frames, folder / "learn"), date(2026, 2, 20)
    data = health.take_data(snapshot, health.Recipe(day, at_most=60))
    told = health.fit(data, health.cases_of(data, data.learn)).parameters
    publish(folder, "health", told.version, {"health.json": told.to_json().encode()}, {"as_of": str(day)})
    promote(folder, "health", told.version)
    recipe = goal_training.Recipe(day, min_people=20, min_goals=60)
    fitted = goal_training.fit(goal_training.take_data(snapshot, recipe), recipe, "2026-02-20-example")
    publish(folder, "goal", fitted.version, {"goal.json": fitted.parameters.to_json().encode(), "goal_model.onnx": fitted.onnx}, {"as_of": str(day)})
    promote(folder, "goal", fitted.version)


def timed(call):
    """What a call gives back, and what it took."""
    before, clock, busy = peak_mib(), time.perf_counter(), time.process_time()
    found = call()
    took, own = time.perf_counter() - clock, time.process_time() - busy
    return found, {"rows": len(found), "clock_s": round(took, 1), "processor_s": round(own, 1), "a_second_of_processor": round(len(found) / own, 1), "mib_before": round(before), "peak_mib": round(peak_mib())}


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--people", type=int, default=100_000)
    args.add_argument("--days", type=int, default=365)
    given = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        trained(folder)
        frames = generate(people=given.people, days=given.days, seed=5).frames
        day = frames["transactions"]["occurred_at"].max().date()
        snapshot, rows = write_snapshot({k: v for k, v in frames.items() if not k.startswith("recommendation")}, folder / "all"), len(frames["transactions"])
        del frames
        outlooks, goals = FinancialHealthForecaster("sqlite://", folder), GoalPredictionService("sqlite://", folder)
        assert outlooks.status.made_by == goals.status.method == "model", (outlooks.status, goals.status)
        few = generate(people=3, days=90, seed=1).frames  # compiled code is loaded
        outlooks.outlook_all(date(2025, 3, 1), few), goals.predict_all(date(2025, 3, 1), few)
        found = {"machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "people": given.people, "transactions": rows}
        for name, call in (("outlooks", lambda: outlooks.outlook_all(day, snapshot)), ("goals", lambda: goals.predict_all(day, snapshot))):
            told, found[name] = timed(call)
            print(name, found[name], repr(told))
    (HERE / "batch.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
