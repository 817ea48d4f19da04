"""Every notebook runs from top to bottom. Those under nbs/retrain run with papermill in test_retrain.py."""

import os

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(
    p.relative_to(ROOT / "nbs")
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts and not (p.parent / ".notest").exists()
)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_runs(notebook, monkeypatch):
    """No cell fails. nbdev runs the cells in this process, with the notebook's folder as working directory."""
    from nbdev.test import test_nb

    monkeypatch.syspath_prepend(ROOT)
    before = dict(os.environ)
    try:
        passed, _ = test_nb(ROOT / "nbs" / notebook, skip_flags=["notest", "slow"], basepath=None, cell_timeout=300)
    finally:  # what a notebook sets for itself ends with it
        os.environ.clear()
        os.environ.update(before)
    assert passed, f"nbs/{notebook} failed: the traceback is above"
