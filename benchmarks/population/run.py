"""How fast, and in how much memory, a population comes to be; how well its segments can be found. See README.md.

    python benchmarks/population/run.py                      # 10 million transactions and the ceiling
    python benchmarks/population/run.py --people 500         # a look
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

DAYS = 730


def make(people: int, seed: int) -> dict:
    """Generates transactions in chunks, each written to Parquet; seconds with a warm compile cache, rows, peak memory."""
    from fincoach.data.population import transactions

    began = time.perf_counter()
    for _ in transactions(5, 60, seed):
        pass
    compiled = time.perf_counter() - began
    began, cpu, rows = time.perf_counter(), time.process_time(), 0
    with tempfile.TemporaryDirectory() as folder:
        for i, frame in enumerate(transactions(people, DAYS, seed)):
            frame.write_parquet(Path(folder) / f"{i}.parquet")
            rows += len(frame)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
    return {"people": people, "days": DAYS, "rows": rows, "wall_seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
            "rows_per_cpu_second": round(rows / cpu),
            "compile_or_load_seconds": round(compiled, 1), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "parquet_mb": size // 2**20}


def find(people: int, seed: int) -> dict:
    """How well the planted segments can be found from features: trained on the truth (the ceiling), and by k-means (blind)."""
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, adjusted_rand_score
    from sklearn.model_selection import cross_val_predict

    from fincoach.data.population import START, generate
    from fincoach.features.behavior import FEATURES, extract
    from fincoach.features.ledger import Ledgers

    population = generate(people, DAYS, seed)
    ledgers = Ledgers.from_frames(population.frames)
    x = extract(ledgers, START + timedelta(days=DAYS - 1))
    truth = population.truth["segments"].sort("user_id")["segment_id"].to_numpy()[np.asarray(ledgers.user_ids) - 1]
    spent = ~np.isnan(x[:, [f.name for f in FEATURES].index("essential_share")])
    x, truth = x[spent], truth[spent]  # who spent nothing in the window has nothing to be told by
    columns = []
    for i, f in enumerate(FEATURES):
        if f.role != "context":
            v = np.where(np.isnan(x[:, i]), f.neutral, x[:, i])
            v = np.sign(v) * np.log1p(np.abs(v)) if f.scale == "log" else v
            v = np.clip(v, *np.percentile(v, [1, 99]))
            columns.append((v - v.mean()) / (v.std() or 1))
    z = np.stack(columns, axis=1)
    out = {"people": len(z), "spent_nothing": int((~spent).sum()), "features": z.shape[1]}
    for name, model in (("logistic", LogisticRegression(C=0.3, max_iter=1000)),
                        ("forest", RandomForestClassifier(300, min_samples_leaf=3, random_state=0))):
        guess = cross_val_predict(model, z, truth, cv=5)
        out[name] = {"accuracy": round(accuracy_score(truth, guess), 3), "ari": round(adjusted_rand_score(truth, guess), 3)}
    out["kmeans"] = {"ari": round(adjusted_rand_score(truth, KMeans(5, n_init=20, random_state=0).fit_predict(z)), 3)}
    return out


def main() -> None:
    """Runs both parts, each in a process of its own, and writes `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=11_200, help="people for the speed part; 11,200 make about 10 million rows")
    parser.add_argument("--part", choices=("make", "find"))
    parser.add_argument("--seed", type=int, default=20250101)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(make(given.people, given.seed) if given.part == "make" else find(2000, given.seed)))
        return
    results = {}
    for part in ("make", "find"):
        command = [sys.executable, __file__, "--part", part, "--people", str(given.people), "--seed", str(given.seed)]
        results[part] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(part, results[part])
    if given.people == parser.get_default("people"):
        (Path(__file__).parent / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
