"""The 28 numbers in pandas: vectorised, no Python loop over people. Everybody is in UTC, in one currency, known for 182 days or more."""

import math

import numpy as np
import pandas as pd


def share(part, whole, low=0.0, high=1.0):
    """part / whole within limits, missing where whole is not positive."""
    return (part / whole.where(whole > 0)).clip(low, high)


def rows(transactions, small, day):
    """The rows up to `day`, with how many days ago and which kind."""
    at = transactions["occurred_at"].astype("int64") // 60_000_000
    kind = small["kinds"].set_index("category_id")["kind"]
    table = np.full(kind.index.max() + 1, -1, np.int8)
    table[kind.index] = kind
    r = pd.DataFrame({
        "u": transactions["user_id"], "ago": (day - at // 1_440).astype("int32"), "at": at, "c": transactions["category_id"].astype("int16"),
        "a": transactions["amount_minor"], "k": table[transactions["category_id"].to_numpy()],
    })
    r = r[r["ago"] >= 0]
    return r.assign(spends=r["k"].isin([1, 2, 4, 5]))


def once(r, day):
    """Everything that needs one grouping by person."""
    people = pd.Index(np.sort(r["u"].unique()), name="u")
    recent = r[r["ago"] < 84]
    spending = recent[recent["spends"]]
    bought = spending[spending["a"] < 0]
    visits = bought.groupby(["u", "at"]).agg(a=("a", "sum"), ago=("ago", "first")).reset_index("at")
    minute = visits["at"] % 1_440

    def total(part):
        return part.groupby("u")["a"].sum().reindex(people, fill_value=0).astype(float)

    def count(part):
        return part.groupby("u").size().reindex(people, fill_value=0)

    base = pd.DataFrame({
        "earned": total(recent[(recent["k"] == 0) & (recent["a"] > 0)]),
        "spent": (-total(spending)).clip(lower=0),
        "spent7": (-total(spending[spending["ago"] < 7])).clip(lower=0),
        "spent28": (-total(spending[spending["ago"] < 28])).clip(lower=0),
        "before28": (-total(spending[spending["ago"] >= 28])).clip(lower=0),
        "essential": -total(recent[recent["k"] == 1]),
        "owed": -total(recent[recent["k"].isin([4, 5])]),
        "saved": -total(recent[recent["k"] == 3]),
        "bought": count(visits),
        "typical": (-visits["a"]).groupby("u").median().reindex(people),
        "gross": -total(bought),
        "back": total(spending[spending["a"] > 0]),
        "since_income": r[(r["k"] == 0) & (r["a"] > 0)].groupby("u")["ago"].min().reindex(people),
        "since_purchase": r[r["spends"] & (r["a"] < 0)].groupby("u")["ago"].min().reindex(people),
        "kept": total(r[r["k"] != 3]),
        "carried": total(r[r["ago"] >= 84]),
        "weekend": count(visits[(day - visits["ago"] + 3) % 7 >= 5]),
        "evening": count(visits[(minute >= 1_080) | (minute < 360)]),
    })
    base["large"] = -total(visits[-visits["a"] > 5 * base["typical"].reindex(visits.index)])
    return base, recent


def categories(r, people):
    """Diversity, stability and discipline."""
    spending = r[r["spends"] & (r["ago"] < 168)]
    sums = spending.groupby(["u", "c", spending["ago"] >= 84])["a"].sum().unstack(fill_value=0).reindex(columns=[False, True], fill_value=0)
    mix = (-sums).clip(lower=0).astype(float)
    now, earlier = mix[False], mix[True]
    user = mix.index.get_level_values("u")
    p = now / now.groupby(user).transform("sum").replace(0, np.nan)
    entropy = -(p * np.log(p.where(p > 0))).groupby(user).sum() / math.log(18)
    norm = np.sqrt((now**2).groupby(user).sum()) * np.sqrt((earlier**2).groupby(user).sum())
    periods = (-spending.groupby(["u", "c", spending["ago"] // 28])["a"].sum()).clip(lower=0).astype(float)
    sums, squares = periods.groupby(["u", "c"]).sum(), (periods**2).groupby(["u", "c"]).sum()
    sd = np.sqrt((squares / 6 - (sums / 6) ** 2).clip(lower=0)).groupby("u").sum()
    return pd.DataFrame({
        "category_diversity": entropy.where(now.groupby(user).sum() > 0),
        "category_stability": share((now * earlier).groupby(user).sum(), norm),
        "budget_discipline": 1 - share(sd, sums.groupby("u").sum() / 6 * math.sqrt(5)),
    }).reindex(people)


def volatility(r):
    spending = r[r["spends"] & (r["ago"] < 182)]
    weeks = -spending.groupby(["u", spending["ago"] // 7])["a"].sum().astype(float)
    mean = weeks.groupby("u").sum() / 26
    return share(np.sqrt(((weeks**2).groupby("u").sum() / 26 - mean**2).clip(lower=0)), mean, 0, 5)


def impulses_and_paydays(r, recent, people):
    fun = recent[(recent["k"] == 2) & (recent["a"] < 0)].sort_values(["u", "at"])
    visits = fun.drop_duplicates(["u", "at"])
    u, at, minute = visits["u"].to_numpy(), visits["at"].to_numpy(), visits["at"].to_numpy() % 1_440
    close = (np.diff(at) <= 90) & (np.diff(u) == 0)
    impulsive = np.append(False, close) | np.append(close, False) | (minute >= 1_380) | (minute < 300)
    incomes = r[(r["k"] == 0) & (r["a"] > 0) & (r["ago"] < 90)]
    incomes = incomes[2 * incomes["a"] >= incomes.groupby("u")["a"].transform("max")]
    days = incomes["ago"].to_numpy()[:, None] - np.arange(7)
    near = np.unique((incomes["u"].to_numpy()[:, None] * 1_000 + days)[(days >= 0) & (days < 84)])
    after = fun[np.isin(fun["u"].to_numpy() * 1_000 + fun["ago"].to_numpy(), near)]
    return pd.DataFrame({
        "impulse_share": pd.Series(impulsive, visits.index).groupby(visits["u"]).mean(),
        "fun": -fun.groupby("u")["a"].sum().astype(float),
        "covered": pd.Series(near // 1_000).value_counts(),
        "after": -after.groupby("u")["a"].sum().astype(float),
    }).reindex(people)


def low_balance(recent, base, opening):
    """Balances on a grid of 84 days a person."""
    place = np.searchsorted(base.index, recent["u"])
    grid = np.zeros((len(base), 84))
    np.add.at(grid, (place, 83 - recent["ago"]), recent["a"])
    balance = (opening + base["carried"]).to_numpy()[:, None] + grid.cumsum(1)
    return (balance < base["spent"].to_numpy()[:, None] / 12).mean(1)


def goals(small, day, people):
    goals, puts = small["goals"], small["puts"][small["puts"]["day"] <= day]
    put = puts.groupby("goal")["a"].sum()
    now = goals[(goals["start"] <= day) & (goals["ending"] > day)]
    given = now["goal"].map(put).fillna(0)
    needed = (now["target"] - given).clip(lower=0) / ((now["due"] - day) / 7).clip(lower=1)
    steps = goals.merge(pd.DataFrame({"step": range(6)}), how="cross")
    end = day - 28 * steps["step"]
    ends = steps[(steps["start"] <= end) & (steps["ending"] > end)][["u", "step"]].drop_duplicates()
    kept = puts[puts["a"] > 0].merge(goals, on="goal")
    kept = kept.assign(step=(day - kept["day"]) // 28)[["u", "step"]].drop_duplicates().assign(kept=1.0)
    return pd.DataFrame({
        "goal_progress": (given / now["target"]).clip(0, 1).groupby(now["u"]).mean(),
        "need": needed.groupby(now["u"]).sum(),
        "goal_adherence": ends.merge(kept, how="left", on=["u", "step"]).fillna({"kept": 0.0}).groupby("u")["kept"].mean(),
    }).reindex(people)


def features(transactions: pd.DataFrame, small: dict, day: int, month: float) -> pd.DataFrame:
    """`user_id` and the 28 numbers, by user."""
    r = rows(transactions, small, day)
    x, recent = once(r, day)
    opening = small["people"].set_index("u")["opening"].reindex(x.index)
    low = low_balance(recent, x, opening)
    x = pd.concat([x, categories(r, x.index), impulses_and_paydays(r, recent, x.index), goals(small, day, x.index)], axis=1)
    spent, weekly = x["spent"], x["spent"] / 12
    reserve = opening + x["kept"]
    change = (x["spent28"] / 4 + spent / 120) / (x["before28"] / 8 + spent / 120)
    return pd.DataFrame({
        "user_id": x.index, "income_weekly": (x["earned"] / 1_200).where(x["since_income"].notna()), "spending_weekly": spent / 1_200,
        "spending_pace": share(x["spent7"], weekly, 0, 12), "savings_rate": share(x["earned"] - spent, x["earned"], -1),
        "spending_trend": np.log(change).clip(-3, 3), "essential_share": share(x["essential"], spent),
        "debt_share": share(x["owed"], spent), "saved_share": share(x["saved"], x["earned"], -1),
        "category_diversity": x["category_diversity"], "transactions_weekly": x["bought"] / 12, "typical_purchase": x["typical"] / 100,
        "large_purchase_share": share(x["large"], x["gross"]), "refund_share": share(x["back"], x["gross"]),
        "days_since_income": x["since_income"].clip(upper=364),
        "reserve_weeks": np.where(reserve <= 0, 0.0, np.where(weekly > 0, (reserve / weekly).clip(0, 104), 104.0)),
        "goal_progress": x["goal_progress"], "month_position": month, "spending_volatility": volatility(r).reindex(x.index),
        "impulse_share": x["impulse_share"], "category_stability": x["category_stability"], "budget_discipline": x["budget_discipline"],
        "weekend_share": share(x["weekend"], x["bought"]), "evening_share": share(x["evening"], x["bought"]),
        "payday_effect": (share(x["after"].fillna(0), x["fun"]) / (x["covered"] / 84)).clip(0, 12),
        "days_since_purchase": x["since_purchase"].clip(upper=364), "goal_adherence": x["goal_adherence"],
        "goal_pressure": share(x["need"], x["earned"] / 12, 0, 5), "low_balance_share": low,
    })
