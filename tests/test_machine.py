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


KERNELS = """
from typing import NamedTuple
import numpy as np
from fincoach.features.machine import compiled

class Pair(NamedTuple):
    rows: np.ndarray
    least: float

@compiled
def _above(value, least):
    return value >= least

@compiled
def chosen(pair):
    if len(pair.rows) == 0:
        raise ValueError("there is nothing to choose from")
    return np.sort(pair.rows[np.array([_above(v, pair.least) for v in pair.rows])]), len(pair.rows), pair.least
"""
CHOOSE = """
import json, sys
import numpy as np
from kernels import Pair, chosen
found = [[a.tolist() if isinstance(a, np.ndarray) else a for a in chosen(Pair(np.array(rows), 2.0))] for rows in ([3.0, 1.0, 2.5], [9.0])]
view = chosen(Pair(np.arange(8.0)[::3], 2.0))[0].tolist()
try:
    chosen(Pair(np.zeros(0), 2.0))
except ValueError as e:
    said = str(e)
print(json.dumps({"numba": "numba" in sys.modules, "kept": chosen.kept, "found": found, "view": view, "said": said}))
"""


def test_arrays_tuples_and_errors_come_back_and_damaged_code_is_made_again(tmp_path):
    (tmp_path / "kernels.py").write_text(KERNELS)
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = ask(code=CHOOSE, **env)
    assert first["found"] == [[[2.5, 3.0], 3, 2.0], [[9.0], 1, 2.0]]
    assert (first["view"], first["said"], first["numba"], first["kept"]) == ([3.0, 6.0], "there is nothing to choose from", True, 2)
    second = ask(code=CHOOSE, **env)
    assert second == first | {"numba": False}
    for path in (tmp_path / "cache/fincoach").glob("*.o"):
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes(9))
    assert ask(code=CHOOSE, **env) == first, "a damaged file is no file"
    assert ask(code=CHOOSE, **env) == second, "and is written anew"
    (tmp_path / "kernels.py").write_text(KERNELS.replace("value >= least", "value > least + 0.5"))
    changed = ask(code=CHOOSE, **env)
    assert changed["found"][0] == [[3.0], 3, 2.0], "what is kept belongs to what was written"
    assert changed["numba"]
