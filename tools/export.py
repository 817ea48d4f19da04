"""Write the package and the README from the notebooks: `make export`. `--into DIR` writes elsewhere (the drift test)."""

import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))


def notebooks() -> list[Path]:
    """Every notebook of the project, in the order of their paths."""
    return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def export_package(into: Path) -> None:
    """Every module that a notebook exports, written under `into`."""
    from nbdev.export import nb_export

    for notebook in notebooks():
        nb_export(str(notebook), lib_path=str(into))
    for folder in {p.parent for p in into.rglob("*.py")} - {into}:
        (folder / "__init__.py").touch()


def export_readme(into: Path) -> None:
    """README.md from `nbs/index.ipynb`."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [c for c in notebook.cells if not c.source.startswith("#| hide")]
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    (into / "README.md").write_text(body.strip() + "\n", encoding="utf-8")


def main() -> None:
    """Export into the checkout, or into a folder of your choice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT)
    into = parser.parse_args().into
    package = into / "fincoach"
    package.mkdir(parents=True, exist_ok=True)
    if into != ROOT:
        shutil.copy(ROOT / "fincoach/__init__.py", package)
    export_package(package)
    if (ROOT / "nbs/index.ipynb").exists():
        export_readme(into)


if __name__ == "__main__":
    main()
