"""What every test shares: the project's root, and no way for a test to touch the user's own settings."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_home(monkeypatch, tmp_path_factory):
    """Each test has a FinCoach home of its own: databases, artifacts and reports of the checkout stay untouched."""
    monkeypatch.setenv("FINCOACH_HOME", str(tmp_path_factory.mktemp("home")))
