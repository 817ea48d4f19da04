"""The peers, in their own environment: `PYTHON peers.py FOLDER NAME`. Reads FOLDER/series.npz, writes FOLDER/NAME.npz. `run.py` calls it.

Needs statsforecast and neuralforecast, and nothing of fincoach. CPU-seconds are those of this process: import, training (or compiling) and
forecasting apart.
"""

import time

T0 = time.process_time()

import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

os.environ |= {"OMP_NUM_THREADS": "1", "NIXTLA_ID_AS_COL": "1", "CUDA_VISIBLE_DEVICES": ""}
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

QUANTILES = (0.025, 0.1, 0.5, 0.9, 0.975)
ENDS = ("lo-95", "lo-80", None, "hi-80", "hi-95")


def long(total, begins, people, last):
    """The long table of some people's series, each from its beginning to week `last`."""
    parts = [pd.DataFrame({"unique_id": i, "ds": np.arange(begins[i], last + 1), "y": total[i, begins[i] : last + 1]}) for i in people]
    return pd.concat(parts, ignore_index=True)


def placed(frame, column, people, origins, horizon, n):
    """(n, O, H) from the long table of a cross-validation: NaN for whom it has no row."""
    out = np.full((n, len(origins), horizon), np.nan)
    at = np.searchsorted(origins, frame["cutoff"].to_numpy())
    out[frame["unique_id"].to_numpy(), at, (frame["ds"] - frame["cutoff"]).to_numpy() - 1] = frame[column].to_numpy()
    return out


def statistical(s, out, cpu):
    """Each of statsforecast's models by itself, fitted anew at each origin."""
    from statsforecast import StatsForecast
    from statsforecast.models import TSB, AutoETS, Naive, SeasonalNaive, Theta, WindowAverage

    total, begins, origins, horizon = s["total"], s["begins"], s["origins"], int(s["horizon"])
    n, last = len(total), int(origins[-1]) + horizon
    some, few = (s[k][begins[s[k]] <= origins[0] - 11] for k in ("scored", "few"))
    models = {"naive": (Naive(), some, True), "seasonal naive": (SeasonalNaive(4), some, True), "12-week mean": (WindowAverage(12), some, False),
              "TSB": (TSB(0.1, 0.1), some, False), "AutoETS": (AutoETS(season_length=1), few, True), "Theta": (Theta(season_length=1), few, True)}
    for name, (model, people, ranges) in models.items():
        table, warm = long(total, begins, people, last), long(total, begins, people[:2], last)
        level = {"level": [80, 95]} if ranges else {}
        start = time.process_time()
        StatsForecast(models=[model], freq=1, n_jobs=1).cross_validation(df=warm, h=horizon, n_windows=1, **level)
        middle = time.process_time()
        found = StatsForecast(models=[model], freq=1, n_jobs=1).cross_validation(df=table, h=horizon, n_windows=len(origins), step_size=1, **level)
        cpu[name] = {"warm": middle - start, "forecast": time.process_time() - middle, "series": len(people)}
        column = repr(model) if repr(model) in found else next(c for c in found.columns if c not in ("unique_id", "ds", "cutoff", "y"))
        point = placed(found, column, people, origins, horizon, n)
        quantiles = [placed(found, f"{column}-{e}", people, origins, horizon, n) if ranges and e else point if e is None else np.full_like(point, np.nan) for e in ENDS]
        out[name] = np.stack(quantiles, axis=-1)
        print(name, cpu[name], flush=True)


NEURAL = {
    "defaults": {"max_steps": 300, "windows_batch_size": 1024},
    "small": {"max_steps": 300, "windows_batch_size": 1024, "input_size": 26, "start_padding_enabled": True, "encoder_n_layers": 1, "encoder_hidden_size": 32, "decoder_hidden_size": 32},
    "tuned": {"max_steps": 300, "windows_batch_size": 1024, "input_size": 26, "start_padding_enabled": True, "encoder_n_layers": 1, "encoder_hidden_size": 32, "decoder_hidden_size": 32,
              "learning_rate": 0.01, "num_lr_decays": 3},
}


def neural(s, out, cpu, name):
    """neuralforecast's LSTM: trained once on what was known at the first origin, then asked at all of them."""
    import torch
    from neuralforecast import NeuralForecast
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import LSTM

    torch.set_num_threads(1)
    for noise in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(noise).setLevel(logging.ERROR)
    total, begins, origins, horizon = s["total"], s["begins"], s["origins"], int(s["horizon"])
    people = np.flatnonzero(begins <= origins[0] - 11)
    table = long(total, begins, people, int(origins[-1]) + horizon)
    model = LSTM(h=horizon, loss=MQLoss(quantiles=list(QUANTILES)), random_seed=1, alias="m", accelerator="cpu", enable_progress_bar=False, logger=False,
                 enable_checkpointing=False, **NEURAL[name])
    nf = NeuralForecast(models=[model], freq=1)
    start = time.process_time()
    nf.fit(df=table[table["ds"] <= origins[0]])
    middle = time.process_time()
    found = pd.concat([nf.predict(df=table[table["ds"] <= o]).assign(cutoff=o) for o in origins])
    label = f"LSTM {name}"
    cpu[label] = {"train": middle - start, "forecast": time.process_time() - middle, "series": len(people), "parameters": sum(p.numel() for p in nf.models[0].parameters())}
    columns = [c for c in found.columns if c.startswith("m")]
    out[label] = np.sort(np.stack([placed(found, c, people, origins, horizon, len(total)) for c in columns], axis=-1), axis=-1)
    print(label, cpu[label], flush=True)


def main(folder, name):
    s = dict(np.load(folder / "series.npz"))
    out, cpu = {}, {"import": time.process_time() - T0}
    statistical(s, out, cpu) if name == "statistical" else neural(s, out, cpu, name)
    cpu["whole process"] = time.process_time()
    np.savez(folder / f"{name}.npz", cpu=repr(cpu), **out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
