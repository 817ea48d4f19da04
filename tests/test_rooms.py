"""The house stands as drawn: rooms import downward only, and light rooms stay light."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# What each room may import, besides itself. `settings` and `show` are everybody's.
BELOW = {
    "data": set(),
    "features": {"data"},
    "evaluate": {"data", "features", "serving"},
    "serving": {"data", "features"},
    "api": {"data", "features", "serving"},
    "segments": {"data", "features", "evaluate", "serving"},
    "recommend": {"data", "features", "evaluate", "serving"},
    "forecast": {"data", "features", "evaluate", "serving"},
    "learn": {"data", "features", "evaluate", "serving", "segments", "recommend", "forecast"},
}
FREE = {"settings", "show", ""}
HEAVY = ("torch", "sklearn", "pandas", "scipy", "matplotlib", "plotly", "statsmodels", "seaborn", "numba", "polars", "sqlalchemy")
MODULES = sorted(p for p in (ROOT / "fincoach").rglob("*.py") if len(p.relative_to(ROOT).parts) == 3)


def rooms_imported(path):
    """The rooms of fincoach that the module at `path` imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level == 2 or (node.level == 1 and path.parent.name == "fincoach"):
                yield parts[0]
            elif parts[0] == "fincoach":
                yield parts[1] if len(parts) > 1 else ""
        elif isinstance(node, ast.Import):
            yield from ([*a.name.split("."), ""][1] for a in node.names if a.name.split(".")[0] == "fincoach")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_downward(path):
    room = path.parent.name
    if room == "migrations":
        return
    upward = {r for r in rooms_imported(path) if r not in FREE | BELOW[room] | {room}}
    assert not upward, f"{room} must not know about {upward}"


def test_the_check_sees_an_upward_import(tmp_path):
    """The walk finds both spellings, and imports inside functions."""
    room = tmp_path / "fincoach/data"
    room.mkdir(parents=True)
    module = room / "x.py"
    module.write_text("from ..segments.model import A\nimport fincoach.learn.retrain\ndef f():\n    from fincoach.serving import B\n")
    assert set(rooms_imported(module)) == {"segments", "learn", "serving"}


def loaded_by(code):
    """The heavy modules that a fresh interpreter holds after running `code`."""
    script = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(out.stdout.split())


def test_import_fincoach_is_light():
    assert loaded_by("import fincoach") == set()


def test_settings_are_light():
    assert loaded_by("import fincoach.settings") == set()


def test_serving_pulls_in_no_training_library():
    training = {"torch", "sklearn", "pandas", "scipy", "matplotlib", "plotly", "statsmodels", "seaborn"}
    compiler = {"numba"}  # loaded only where a kernel's machine code is not kept yet
    assert not loaded_by("from fincoach.serving import UserSegmentationService\nimport fincoach.api.app") & (training | compiler)
