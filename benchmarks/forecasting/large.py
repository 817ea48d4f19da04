"""Training on many people: how much work, and whether the road for sets beyond memory keeps its memory flat. See README.md.

    python benchmarks/forecasting/large.py [--people 10000] [--days 730]

The streaming road is walked in processes of their own, on one, two and four times as many people as a block holds: the population is written to disk block by block, and
a loader is made of one block after the other. Writes large.json beside this file.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fincoach.data.population import generate
from fincoach.features.ledger import Ledgers
from fincoach.features.series import WeeklySeries, weekly_series
from fincoach.forecast.spending import SequenceDataLoader, SpendingConfig, SpendingPredictor, train_network
from fincoach.serving.inputs import Known, known_ahead

HERE, SEED, BLOCK = Path(__file__).parent, 20261121, 1000


class Blocks:
    """Loaders over blocks of people in files, one after the other: at most one is in memory."""

    def __init__(self, files, seed=0):
        self.files, self.seed = files, seed

    def __iter__(self):
        for k, file in enumerate(self.files):
            with np.load(file) as kept:
                series = WeeklySeries(kept["user_ids"], kept["mondays"], kept["y"].astype(float), kept["begins"], kept["categories"])
                known = Known(kept["echo"].astype(float), kept["dues"].astype(float))
            yield SequenceDataLoader(series, known, seed=self.seed + k)


def block(seed, days, people=BLOCK):
    """Series and what is known ahead of `people` made-up people."""
    frames = generate(people, days, seed).frames
    ledgers = Ledgers.from_frames(frames)
    series = weekly_series(ledgers, ledgers.last_day)
    return series, known_ahead(frames, series)


def stream(folder, blocks):
    """Train over `blocks` blocks, some of them the same file again; prints the highest memory in MB and CPU-seconds."""
    torch.set_num_threads(1)
    files = sorted(folder.glob("*.npz"))
    start = time.process_time()
    _, losses = train_network(Blocks([files[k % len(files)] for k in range(blocks)]), SpendingConfig(steps=200))
    print(json.dumps({"blocks": blocks, "people": blocks * BLOCK, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "cpu_s": round(time.process_time() - start, 1), "loss": round(losses[-1], 3)}))


def whole(people, days):
    """CPU-seconds of each step of a training on everybody at once."""
    torch.set_num_threads(1)
    spent, wall = {}, time.perf_counter()

    def clock(name, work):
        start = time.process_time()
        found = work()
        spent[name] = round(time.process_time() - start, 1)
        print(name, spent[name], flush=True)
        return found

    frames = clock("making the people", lambda: generate(people, days, SEED).frames)
    wall = time.perf_counter()
    series = clock("weeks", lambda: weekly_series(Ledgers.from_frames(frames), Ledgers.from_frames(frames).last_day))
    known = clock("what is known ahead", lambda: known_ahead(frames, series))
    clock("the whole fit: both trainings, weights, ranges, shares", lambda: SpendingPredictor.fit(series, known))
    return {"people": people, "weeks": len(series.mondays), "cpu_s": spent, "wall_s": round(time.perf_counter() - wall, 1), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--people", type=int, default=10_000)
    ask.add_argument("--days", type=int, default=730)
    ask.add_argument("--stream", nargs=2, help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.stream:
        return stream(Path(given.stream[0]), int(given.stream[1]))
    results = {"streaming": []}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(2):
            series, known = block(SEED + k, given.days)
            np.savez(Path(folder) / f"{k}.npz", user_ids=series.user_ids, mondays=series.mondays, y=series.y.astype(np.float32), begins=series.begins, categories=series.categories,
                     echo=known.echo.astype(np.float32), dues=known.dues.astype(np.float32))
        for blocks in (1, 2, 4, 8):
            out = subprocess.run([sys.executable, __file__, "--stream", folder, str(blocks)], check=True, capture_output=True, text=True).stdout
            results["streaming"].append(json.loads(out.splitlines()[-1]))
            print(results["streaming"][-1], flush=True)
    results["whole"] = whole(given.people, given.days)
    (HERE / "large.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
