"""Rows to measure on: arrays drawn directly, unsorted. Plausible enough that every number varies; not a model of anybody."""

import numpy as np
import polars as pl

from fincoach.data.tables import CATEGORIES, KINDS

FIRST, AS_OF = "2024-01-01", "2025-01-20"
DAY = 20_108  # AS_OF, days since 1970
SPAN = 400  # days of rows; the last 14 come after AS_OF


def transactions(rows: int, people: int, seed: int) -> pl.DataFrame:
    """`rows` transactions of `people`, in no order; two thousandths of them income, one in fifty a refund."""
    rng = np.random.default_rng(seed)
    user = rng.integers(1, people + 1, rows, dtype=np.int64)
    start = np.datetime64(FIRST, "us").astype(np.int64)
    at = start + rng.integers(0, SPAN * 86_400, rows, dtype=np.int64) * 1_000_000 + 500_000
    category = rng.choice(np.array([c.id for c in CATEGORIES], np.int64), rows, p=_chances())
    size = (np.exp(rng.standard_normal(rows, np.float32) * 1.1 + 7.5) + 50).astype(np.int64)
    income = np.isin(category, [c.id for c in CATEGORIES if c.kind == 0])
    sign = np.where(income, 60, np.where(rng.random(rows, np.float32) < 0.02, 1, -1))
    return pl.DataFrame({"user_id": user, "occurred_at": pl.Series(at).cast(pl.Datetime("us", "UTC")), "amount_minor": size * sign,
                         "currency": pl.repeat("EUR", rows, eager=True), "category_id": category})


def _chances():
    weight = np.array([{0: 0.4, 1: 4, 2: 5, 3: 0.5, 4: 0.7, 5: 0.3, 6: 0.5}[c.kind] for c in CATEGORIES])
    return weight / weight.sum()


def frames(rows: int, people: int, seed: int = 0) -> dict[str, pl.DataFrame]:
    """The tables: rows, people, opening balances, and a goal for two people in three with six contributions each."""
    rng = np.random.default_rng(seed + 1)
    ids = np.arange(1, people + 1)
    savers = ids[ids % 3 > 0]
    begin = np.datetime64(FIRST, "us").astype(np.int64)

    def moment(days):
        return pl.Series(begin + np.asarray(days) * 86_400_000_000 + 43_200_000_000).cast(pl.Datetime("us", "UTC"))

    start = rng.integers(0, 380, len(savers))
    end = np.where(rng.random(len(savers)) < 0.3, start + rng.integers(5, 200, len(savers)), 9_999)
    goal = np.repeat(np.arange(1, len(savers) + 1), 6)
    return {
        "transactions": transactions(rows, people, seed),
        "users": pl.DataFrame({"id": ids}).with_columns(timezone=pl.lit("UTC"), currency=pl.lit("EUR")),
        "user_profiles": pl.DataFrame({"user_id": ids, "opening_balance_minor": rng.integers(0, 600_000, people)}),
        "categories": pl.DataFrame({"id": [c.id for c in CATEGORIES], "kind": [KINDS[c.kind] for c in CATEGORIES]}),
        "financial_goals": pl.DataFrame({
            "id": np.arange(1, len(savers) + 1), "user_id": savers, "target_minor": rng.integers(50_000, 900_000, len(savers)),
            "created_at": moment(start), "due_at": moment(start + rng.integers(100, 900, len(savers))), "closed_at": moment(end),
        }).with_columns(currency=pl.lit("EUR")),
        "goal_contributions": pl.DataFrame({
            "goal_id": goal, "contributed_at": moment(rng.integers(0, 395, len(goal))), "amount_minor": rng.integers(1_000, 90_000, len(goal))}),
    }


def small(tables: dict) -> dict[str, pl.DataFrame]:
    """The small tables as the peers get them: days and kinds as whole numbers, so that all they have left is the computing."""
    goals, puts = tables["financial_goals"], tables["goal_contributions"]

    def day(column):
        return pl.col(column).dt.epoch("d").cast(pl.Int64)

    return {
        "kinds": pl.DataFrame({"category_id": [c.id for c in CATEGORIES], "kind": [c.kind for c in CATEGORIES]}),
        "people": tables["user_profiles"].rename({"user_id": "u", "opening_balance_minor": "opening"}),
        "goals": goals.select(goal="id", u="user_id", target="target_minor", start=day("created_at"), due=day("due_at"), ending=day("closed_at")),
        "puts": puts.select(goal="goal_id", day=day("contributed_at"), a="amount_minor"),
    }
