"""Kernels kept as machine code answer as Numba's do, and a process that finds them never loads Numba."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from fincoach.features.machine import fits

pytestmark = pytest.mark.skipif(bool(fits()), reason=fits() or "it can")

ASK = """
import hashlib, json, sys
from datetime import date
if "by Numba" in sys.argv:
    import fincoach.features.machine as machine
    machine._content = lambda name: None
    machine._write = lambda name, content: None
import numpy as np
from fincoach.features import behavior, goals, recurring, series
from fincoach.serving import cashflow, forecast, trees
from fincoach.serving.manager import MODELS, TRIAL_DAY, _made_up
from fincoach.data.database import read_person
from fincoach.features.ledger import person_from_rows
from pathlib import Path

for module in (behavior, goals, recurring, series, cashflow, forecast, trees):
    module.warm()
found = {}
ledgers = behavior._random_ledgers(people=30, rows=400, seed=5)
found["features"] = behavior.extract(ledgers, "2024-06-01").tobytes()
engine, nowhere = _made_up(), Path("no such folder")
person = person_from_rows(read_person(engine, 1, TRIAL_DAY))
of = series.person_series(person, TRIAL_DAY, forecast.HISTORY)
found["series"] = b"".join(np.ascontiguousarray(a).tobytes() for a in vars(of).values() if isinstance(a, np.ndarray)) if hasattr(of, "__dict__") else repr(of).encode()
found["goal numbers"] = repr(goals.goal_numbers(person, 0, TRIAL_DAY)).encode()
for name, kind in MODELS.items():
    if name != "recommendation":
        answer = kind.trial(kind.make(engine, nowhere, None), 1, TRIAL_DAY)
        found[name] = json.dumps(answer.to_dict(), sort_keys=True, default=str).encode()
print(json.dumps({"numba": "numba" in sys.modules, "found": {k: hashlib.sha256(v).hexdigest() for k, v in found.items()}}))
"""


def ask(*how, code=ASK, **env):
    """What a process of its own says."""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code, *how], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_kept_code_answers_as_numba_does_and_needs_no_numba():
    """Features of thirty people, series, goals, streams, a forecast, an outlook and every service: the same to the last bit."""
    ask()  # keeps what was not kept yet
    kept, numba = ask(), ask("by Numba")
    assert kept["found"] == numba["found"]
    assert set(kept["found"]) == {"features", "series", "goal numbers", "goal", "segmentation", "spending", "health"}
    assert numba["numba"]
    assert not kept["numba"], "a process that finds its machine code has no use for Numba"
