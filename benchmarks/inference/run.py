"""What leaving PyTorch and scikit-learn out of serving is worth: one row through each model, eager and as served. One command; see README.md.

    python benchmarks/inference/run.py            # on what `make retrain` left: about a minute
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT))
MODELS = ("segmentation", "recommendation", "spending network", "spending trees", "goal")
WAYS = ("eager", "served")


def held() -> float:
    """Megabytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def eager(model: str, read):
    """A call of one row, by PyTorch or scikit-learn, from what training wrote for researchers."""
    import numpy as np

    rng = np.random.default_rng(0)
    if model == "segmentation":
        from sklearn.cluster import KMeans
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        told = json.loads(read("segmentation.json"))
        centres = np.array([c["centroid"] for c in told["clusters"]])
        spread = np.concatenate([centres + 0.1 * rng.normal(size=centres.shape) for _ in range(20)])
        pipe = make_pipeline(StandardScaler(), KMeans(len(centres), init=centres, n_init=1)).fit(spread)
        x = rng.normal(size=(1, centres.shape[1]))
        return lambda: pipe.predict(x)
    if model == "recommendation":
        import torch

        from fincoach.recommend.cql import load

        net, x = load(read("enhanced_cql_model.pth")).network.eval(), torch.zeros(1, 35)
    elif model == "spending network":
        import torch

        from fincoach.forecast.spending import LSTMSpendingModel
        from fincoach.serving.forecast import HISTORY, HORIZON
        from fincoach.serving.inputs import AHEAD, WEEK

        made = _loaded(read("spending_predictor.pkl"))
        net = LSTMSpendingModel(made["config"].hidden, made["config"].attention)
        net.load_state_dict({k: torch.as_tensor(v) for k, v in made["weights"].items()}, strict=False)
        net.eval()
        x = (torch.zeros(1, HISTORY, len(WEEK)), torch.zeros(1, 1, HORIZON, len(AHEAD)), torch.tensor([HISTORY - 1]))
    elif model == "spending trees":
        trees = _loaded(read("spending_predictor.pkl"))["trees"]
        first = next(iter(trees.values()))[0]
        x = rng.normal(size=(1, first.n_features_in_))
        return lambda: first.predict(x)
    else:
        forest = _loaded(read("goal_achievement_model.pkl")).forest
        x = rng.normal(size=(1, forest.n_features_in_)).astype(np.float32)
        return lambda: forest.predict_proba(x)

    def call():
        with torch.inference_mode():
            return net(*x) if isinstance(x, tuple) else net(x)

    return call


def _loaded(data: bytes):
    """What joblib wrote."""
    import io

    import joblib

    return joblib.load(io.BytesIO(data))


def served(model: str, read):
    """The same by what serving reads: ONNX, JSON and arrays."""
    import numpy as np

    rng = np.random.default_rng(0)
    if model == "segmentation":
        from fincoach.serving.inference import SegmentationParameters, assign

        parameters = SegmentationParameters.from_json(read("segmentation.json"))
        x = rng.normal(size=(1, len(parameters.features)))
        return lambda: assign(parameters, x)
    if model == "recommendation":
        from fincoach.serving.network import Network

        network = Network(read("enhanced_cql_model.onnx"), 35, 12)
        return lambda: network(np.zeros((1, 35)))
    if model == "spending network":
        from fincoach.serving.forecast import HISTORY, HORIZON, SequenceNetwork
        from fincoach.serving.inputs import AHEAD, WEEK

        network, a, b = SequenceNetwork(read("spending_lstm.onnx")), np.zeros((1, HISTORY, len(WEEK))), np.zeros((1, HORIZON, len(AHEAD)))
        return lambda: network(a, b)
    if model == "spending trees":
        from fincoach.serving.trees import Trees

        trees = Trees.from_npz(read("spending_trees.npz"))
        x = rng.normal(size=(1, int(trees.width[0])))
        return lambda: trees(trees.names[0], x)
    from fincoach.serving.goal_model import GoalModel

    forest = GoalModel.open(read)
    x = rng.normal(size=(1, len(forest.parameters.usual)))
    return lambda: forest.votes(x)


def one(way: str, models: list[str], artifacts: Path, times: int) -> dict:
    """In this process: milliseconds a row of each model, and megabytes that were taken since NumPy was loaded."""
    import numpy as np

    from fincoach.serving.artifacts import champion, listed, open_version

    before, found = held(), {}
    for model in models:
        name = model.split()[0]
        version = champion(artifacts, name) or listed(artifacts, name)[-1]
        call = (eager if way == "eager" else served)(model, open_version(artifacts, name, version).read)
        for _ in range(20):
            call()
        taken = []
        for _ in range(max(50, times // 20) if way == "eager" and model == "goal" else times):
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
        p50, p95 = 1000 * np.quantile(taken, (0.5, 0.95))
        found[model] = {"p50_ms": round(float(p50), 4), "p95_ms": round(float(p95), 4)}
    return {"models": found, "mb": round(held() - before, 1)}


def fresh(way: str, models, artifacts: Path, times: int) -> dict:
    """`one` in a fresh process."""
    said = subprocess.run([sys.executable, __file__, "--one", way, "--models", ",".join(models), "--artifacts", str(artifacts), "--times", str(times)],
                          capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    return json.loads(said.stdout.strip().splitlines()[-1])


def main() -> None:
    """Each model alone in a fresh process, then all together; three rounds, the ways in turn, of each figure the median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts/enhanced")
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=WAYS)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    models = args.models.split(",")
    if args.one:
        return print(json.dumps(one(args.one, models, args.artifacts, args.times)))
    results = {"machine": f"{os.cpu_count()} processors, Python {platform.python_version()}", "load_before": os.getloadavg()[0], "alone": {}}
    for group in [*([m] for m in models), models]:
        rounds = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                rounds[way].append(fresh(way, group, args.artifacts, args.times))
        took = {way: {"mb": statistics.median(r["mb"] for r in rounds[way])} for way in WAYS}
        if len(group) == 1:
            for way in WAYS:
                took[way] |= {q: statistics.median(r["models"][group[0]][q] for r in rounds[way]) for q in ("p50_ms", "p95_ms")}
            took["times_faster"] = round(took["eager"]["p50_ms"] / took["served"]["p50_ms"], 1)
        took["less_memory"] = round(1 - took["served"]["mb"] / took["eager"]["mb"], 3)
        results["alone" if len(group) == 1 else "together"] = results["alone"] | {group[0]: took} if len(group) == 1 else took
    text = json.dumps(results, indent=1)
    print(text)
    (HERE / "results.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
