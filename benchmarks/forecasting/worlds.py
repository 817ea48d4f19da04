"""The people whose spending is forecast: real households, real bank accounts, a population. Series up to the last week, and who is scored."""

import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl

from fincoach.data.population import generate
from fincoach.data.sources import read_source
from fincoach.evaluate.forecasts import origins
from fincoach.features.ledger import Ledgers
from fincoach.features.series import WeeklySeries, weekly_series
from fincoach.serving.inputs import Known, known_ahead

HORIZON, ORIGINS = 4, 12
SEED = 20261121


@dataclass(frozen=True)
class World:
    name: str
    series: WeeklySeries
    echo: Known  # (n, W, 12): echo and dues
    groups: dict  # name -> row numbers of the people who are scored
    origins: np.ndarray  # week numbers

    @property
    def scored(self):
        """Everybody who is in a group."""
        return np.unique(np.concatenate(list(self.groups.values())))

    @property
    def few(self):
        """Who is forecast by methods that are slow: of the real households everybody scored, of others 200 drawn."""
        n = len(self.scored) if self.name == "households" else 200
        return np.sort(np.random.default_rng(SEED).choice(self.scored, n, replace=False))


def world(name, frames, as_of, choose):
    """Series, echo and groups of a source; `choose` gives the groups of a series."""
    ledgers = Ledgers.from_frames(frames)
    series = weekly_series(ledgers, as_of or ledgers.last_day)
    return World(name, series, known_ahead(frames, series), choose(series), origins(series.mondays, count=ORIGINS, horizon=HORIZON))


def households():
    """Complete Journey. Active: spending in a share of all weeks but the first, as in other measurements of these data; the last group
    is told by the weeks before the first origin alone."""
    def choose(series):
        first = int(origins(series.mondays, count=ORIGINS, horizon=HORIZON)[0])
        rng, found = np.random.default_rng(SEED), {}
        for label, weeks in (("", slice(1, None)), (", told before", slice(1, first + 1))):
            share = (series.total[:, weeks] > 0).mean(1)
            found[f"active in 90 %{label}"] = np.flatnonzero(share >= 0.9)
            if not label:
                found["active in 50 %"] = np.sort(rng.choice(np.flatnonzero(share >= 0.5), 500, replace=False))
        return found

    return world("households", read_source("complete-journey").frames, None, choose)


def population(people=600, days=730):
    """Made-up people, everybody who had twelve weeks at the first origin."""
    choose = lambda series: {"population": np.flatnonzero(series.begins <= origins(series.mondays, count=ORIGINS, horizon=HORIZON)[0] - 11)}  # noqa: E731
    return world("population", generate(people, days, SEED).frames, None, choose)


def accounts(folder, count=600):
    """Accounts of a bank, PKDD'99 tables in `folder`: the `count` that were known first, up to 20 April 1994."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "recurring"))
    from real import frames

    rows = pl.read_parquet(folder / "trans_1993_to_1994-04.parquet").sort("account_id", "date", "trans_id")
    choose = lambda series: {"accounts": np.sort(np.argsort(series.begins, kind="stable")[:count])}  # noqa: E731
    return world("bank", frames(rows, named=True), date(1994, 4, 20), choose)
