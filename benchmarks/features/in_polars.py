"""The 28 numbers in Polars: lazy expressions, multi-threaded. The people are all in UTC, in one currency, known for 182 days or more."""

import math

import polars as pl
from polars import col


def share(part, whole, low=0.0, high=1.0):
    """part / whole within limits, null where whole is not positive."""
    return pl.when(whole > 0).then((part / whole).clip(low, high))


def rows(transactions, small, day):
    """The rows up to `day`, with how many days ago and which kind."""
    kinds = small["kinds"].lazy().with_columns(spends=col("kind").is_in([1, 2, 4, 5]))
    return (
        transactions.lazy()
        .with_columns(at=col("occurred_at").dt.epoch("us") // 60_000_000)
        .select(u="user_id", ago=(day - col("at") // 1_440).cast(pl.Int32), at="at", category_id="category_id", a="amount_minor")
        .filter(col("ago") >= 0)
        .join(kinds, on="category_id")
        .select("u", "ago", "at", "a", "spends", c="category_id", k="kind")
    )


def once(r, day):
    """Everything that one grouping by person can give."""
    recent, bought = col("ago") < 84, col("spends") & (col("a") < 0) & (col("ago") < 84)

    def total(where, what="a"):
        return col(what).filter(where).sum().cast(pl.Float64)

    return r.group_by("u").agg(
        earned=total((col("k") == 0) & (col("a") > 0) & recent),
        spent=(-total(col("spends") & recent)).clip(0),
        spent7=(-total(col("spends") & (col("ago") < 7))).clip(0),
        spent28=(-total(col("spends") & (col("ago") < 28))).clip(0),
        before28=(-total(col("spends") & recent & (col("ago") >= 28))).clip(0),
        essential=-total((col("k") == 1) & recent),
        owed=-total(col("k").is_in([4, 5]) & recent),
        saved=-total((col("k") == 3) & recent),
        gross=-total(bought),
        back=total(col("spends") & (col("a") > 0) & recent),
        since_income=col("ago").filter((col("k") == 0) & (col("a") > 0)).min(),
        since_purchase=col("ago").filter(col("spends") & (col("a") < 0)).min(),
        kept=total(col("k") != 3),
        carried=total(~recent),
    )


def visits(r, day):
    """Purchases, those of one minute made one: how many, when, and of what size."""
    visit = r.filter(col("spends") & (col("a") < 0) & (col("ago") < 84)).group_by("u", "at").agg(a=-col("a").sum(), ago=col("ago").first())
    minute, typical = col("at") % 1_440, col("a").median()
    return visit.group_by("u").agg(
        bought=pl.len(), typical=typical, weekend=((day - col("ago") + 3) % 7 >= 5).sum(), evening=((minute >= 1_080) | (minute < 360)).sum(),
        large=col("a").filter(col("a") > 5 * typical).sum().cast(pl.Float64),
    )


def categories(r):
    """Diversity, stability and discipline."""
    spending = r.filter(col("spends") & (col("ago") < 168))
    mix = spending.group_by("u", "c").agg(
        now=(-col("a").filter(col("ago") < 84).sum()).clip(0).cast(pl.Float64),
        earlier=(-col("a").filter(col("ago") >= 84).sum()).clip(0).cast(pl.Float64),
    )
    p = col("now") / col("now").sum()
    spread = mix.group_by("u").agg(
        category_diversity=pl.when(col("now").sum() > 0).then(-pl.when(p > 0).then(p * p.log()).otherwise(0.0).sum() / math.log(18)),
        category_stability=share((col("now") * col("earlier")).sum(), (col("now") ** 2).sum().sqrt() * (col("earlier") ** 2).sum().sqrt()),
    )
    periods = spending.group_by("u", "c", col("ago") // 28).agg(s=(-col("a").sum()).clip(0).cast(pl.Float64))
    mean = col("s").sum() / 6
    even = periods.group_by("u", "c").agg(mean=mean, sd=((col("s") ** 2).sum() / 6 - mean**2).clip(0).sqrt())
    budget = even.group_by("u").agg(budget_discipline=1 - share(col("sd").sum(), col("mean").sum() * math.sqrt(5)))
    return spread.join(budget, on="u", how="left")


def volatility(r):
    weeks = r.filter(col("spends") & (col("ago") < 182)).group_by("u", col("ago") // 7).agg(s=-col("a").sum().cast(pl.Float64))
    mean = col("s").sum() / 26
    return weeks.group_by("u").agg(spending_volatility=share(((col("s") ** 2).sum() / 26 - mean**2).clip(0).sqrt(), mean, 0, 5))


def impulses_and_paydays(r):
    fun = r.filter((col("k") == 2) & (col("a") < 0) & (col("ago") < 84)).sort("u", "at")
    visit = fun.unique(["u", "at"], keep="first", maintain_order=True)
    near_before = (col("at").diff() <= 90) & (col("u") == col("u").shift())
    near_after = (-col("at").diff(-1) <= 90) & (col("u") == col("u").shift(-1))
    minute = col("at") % 1_440
    impulsive = near_before.fill_null(False) | near_after.fill_null(False) | (minute >= 1_380) | (minute < 300)
    impulse = visit.with_columns(i=impulsive).group_by("u").agg(impulse_share=col("i").mean())
    impulse = impulse.join(fun.group_by("u").agg(fun=-col("a").sum().cast(pl.Float64)), on="u")
    incomes = r.filter((col("k") == 0) & (col("a") > 0) & (col("ago") < 90)).filter(2 * col("a") >= col("a").max().over("u"))
    steps = pl.LazyFrame({"step": range(7)}, schema={"step": pl.Int32})
    near = incomes.select("u", "ago").unique().join(steps, how="cross").select("u", ago=col("ago") - col("step"))
    near = near.filter(col("ago").is_between(0, 83)).unique()
    covered = near.group_by("u").agg(covered=pl.len())
    after = fun.join(near, on=["u", "ago"], how="semi").group_by("u").agg(after=-col("a").sum().cast(pl.Float64))
    return impulse.join(covered, on="u", how="left").join(after, on="u", how="left")


def low_balance(r, base, people):
    """Balances on a grid of 84 days a person."""
    daily = r.filter(col("ago") < 84).group_by("u", "ago").agg(col("a").sum())
    grid = base.select("u", "carried", "spent").join(people, on="u").join(pl.LazyFrame({"ago": range(83, -1, -1)}, schema={"ago": pl.Int32}), how="cross")
    filled = grid.join(daily, on=["u", "ago"], how="left").sort("u", "ago", descending=[False, True])
    balance = col("opening") + col("carried") + col("a").fill_null(0).cum_sum().over("u")
    return filled.with_columns(low=balance < col("spent") / 12).group_by("u").agg(low_balance_share=col("low").mean())


def goals(small, day):
    goals, puts = small["goals"].lazy(), small["puts"].lazy().filter(col("day") <= day)
    put = puts.group_by("goal").agg(put=col("a").sum().cast(pl.Float64))
    open_now = goals.filter((col("start") <= day) & (col("ending") > day)).join(put, on="goal", how="left").with_columns(col("put").fill_null(0))
    progress = open_now.group_by("u").agg(
        goal_progress=(col("put") / col("target")).clip(0, 1).mean(),
        need=((col("target") - col("put")).clip(0) / ((col("due") - day) / 7).clip(1)).sum(),
    )
    steps = pl.LazyFrame({"step": range(6)})
    ends = goals.join(steps, how="cross").filter((col("start") <= day - 28 * col("step")) & (col("ending") > day - 28 * col("step")))
    kept = puts.filter(col("a") > 0).join(goals, on="goal").select("u", step=(day - col("day")) // 28, kept=pl.lit(True)).unique()
    ends = ends.select("u", "step").unique().join(kept, on=["u", "step"], how="left")
    return progress.join(ends.group_by("u").agg(goal_adherence=col("kept").fill_null(False).mean()), on="u", how="full", coalesce=True)


def features(transactions: pl.DataFrame, small: dict, day: int, month: float) -> pl.DataFrame:
    """`user_id` and the 28 numbers, by user."""
    r = rows(transactions, small, day)
    base = once(r, day)
    people = small["people"].lazy()
    x = base.join(people, on="u")
    for part in (visits(r, day), categories(r), volatility(r), impulses_and_paydays(r), low_balance(r, base, people), goals(small, day)):
        x = x.join(part, on="u", how="left")
    spent, weekly = col("spent"), col("spent") / 12
    reserve = col("opening") + col("kept")
    return x.select(
        user_id="u", income_weekly=pl.when(col("since_income").is_not_null()).then(col("earned") / 1_200), spending_weekly=spent / 1_200, spending_pace=share(col("spent7"), weekly, 0, 12),
        savings_rate=share(col("earned") - spent, col("earned"), -1),
        spending_trend=pl.when(spent > 0).then(((col("spent28") / 4 + spent / 120) / (col("before28") / 8 + spent / 120)).log().clip(-3, 3)),
        essential_share=share(col("essential"), spent), debt_share=share(col("owed"), spent), saved_share=share(col("saved"), col("earned"), -1),
        category_diversity="category_diversity", transactions_weekly=col("bought").fill_null(0) / 12, typical_purchase=col("typical") / 100,
        large_purchase_share=share(col("large").fill_null(0), col("gross")), refund_share=share(col("back"), col("gross")),
        days_since_income=col("since_income").clip(upper_bound=364).cast(pl.Float64),
        reserve_weeks=pl.when(reserve <= 0).then(0.0).when(weekly > 0).then((reserve / weekly).clip(0, 104)).otherwise(104.0),
        goal_progress="goal_progress", month_position=pl.lit(month), spending_volatility="spending_volatility", impulse_share="impulse_share",
        category_stability="category_stability", budget_discipline="budget_discipline", weekend_share=share(col("weekend"), col("bought")),
        evening_share=share(col("evening"), col("bought")),
        payday_effect=pl.when((col("covered") > 0) & (col("fun") > 0)).then((col("after").fill_null(0) / col("fun") / (col("covered") / 84)).clip(0, 12)),
        days_since_purchase=col("since_purchase").clip(upper_bound=364).cast(pl.Float64), goal_adherence="goal_adherence",
        goal_pressure=share(col("need"), col("earned") / 12, 0, 5), low_balance_share="low_balance_share",
    ).sort("user_id").collect()
