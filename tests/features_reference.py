"""The 28 numbers once more, in plain Python on dates and dictionaries, written from the feature table's sentences.

Slow and obvious on purpose: it shares no code with `fincoach.features.behavior`, which must agree with it.
"""

import calendar
import math
from collections import defaultdict
from datetime import timedelta
from statistics import mean, median, pstdev

SPENDING = {"essential", "discretionary", "debt", "fee"}
NAN = math.nan


class Life:
    """One person up to the end of a day. `rows` are (date, minute or None, category, kind, minor units)."""

    def __init__(self, rows, as_of, opening=None, unit=0.01, goals=(), puts=()):
        self.rows = [r for r in rows if r[0] <= as_of]
        self.as_of, self.opening, self.unit = as_of, opening, unit
        self.goals = list(goals)  # (start, due or None, end or None, target)
        self.puts = [p for p in puts if p[1] <= as_of and self.goals[p[0]][0] <= as_of]
        self.age = (as_of - min(r[0] for r in self.rows)).days + 1 if self.rows else 0

    def window(self, days, skip=0):
        """Rows of the last `days` days but the last `skip`, and the window's length."""
        first, last = self.as_of - timedelta(days=days - 1), self.as_of - timedelta(days=skip)
        return [r for r in self.rows if first <= r[0] <= last], max(min(days, self.age), 7)

    @staticmethod
    def spent(rows):
        return max(-sum(r[4] for r in rows if r[3] in SPENDING), 0)

    @staticmethod
    def net(rows, *kinds):
        return -sum(r[4] for r in rows if r[3] in kinds)

    @staticmethod
    def earned(rows):
        return sum(r[4] for r in rows if r[3] == "income" and r[4] > 0)

    @staticmethod
    def purchases(rows):
        """Payments, those of the same minute made one."""
        merged = []
        for r in sorted((r for r in rows if r[3] in SPENDING and r[4] < 0), key=lambda r: (r[0], -1 if r[1] is None else r[1])):
            if merged and r[1] is not None and merged[-1][:2] == r[:2]:
                merged[-1] = (*r[:4], merged[-1][4] + r[4])
            else:
                merged.append(tuple(r))
        return merged

    @staticmethod
    def by_category(rows):
        totals = defaultdict(int)
        for r in rows:
            if r[3] in SPENDING:
                totals[r[2]] -= r[4]
        return {c: t for c, t in totals.items() if t > 0}

    def open_goals(self, day):
        return [i for i, (start, _, end, _) in enumerate(self.goals) if start <= day and (end is None or day < end)]

    def put(self, goal):
        return sum(p[2] for p in self.puts if p[0] == goal)


def clip(value, low, high):
    return min(max(value, low), high)


def level(life):
    rows, days = life.window(84)
    if not life.rows:
        return
    bought = [-r[4] for r in life.purchases(rows)]
    if life.earned(life.rows):
        yield "income_weekly", life.earned(rows) * life.unit / (days / 7)
    yield "spending_weekly", life.spent(rows) * life.unit / (days / 7)
    yield "transactions_weekly", len(bought) / (days / 7)
    if bought:
        yield "typical_purchase", median(bought) * life.unit
        yield "large_purchase_share", sum(b for b in bought if b > 5 * median(bought)) / sum(bought)
        back = sum(r[4] for r in rows if r[3] in SPENDING and r[4] > 0)
        yield "refund_share", clip(back / sum(bought), 0, 1)
    weeks = min(life.age, 182) // 7 if life.age > 7 else 1
    if weeks >= 4:
        totals = [-sum(r[4] for r in life.rows if r[3] in SPENDING and (life.as_of - r[0]).days // 7 == w) for w in range(weeks)]
        if sum(totals) > 0:
            yield "spending_volatility", clip(float(pstdev(totals)) / float(mean(totals)), 0, 5)


def timing(life):
    day = life.as_of
    yield "month_position", (day.day - 1) / (calendar.monthrange(day.year, day.month)[1] - 1)
    rows, days = life.window(84)
    usual = life.spent(rows) * 7 / days
    if usual > 0:
        yield "spending_pace", clip(life.spent(life.window(7)[0]) / usual, 0, 12)
        if days >= 35:
            late, early = life.spent(life.window(28)[0]) / 4, life.spent(life.window(84, 28)[0]) / ((days - 28) / 7)
            yield "spending_trend", clip(math.log((late + usual / 10) / (early + usual / 10)), -3, 3)
    for name, found in [
        ("days_since_income", [r[0] for r in life.rows if r[3] == "income" and r[4] > 0]),
        ("days_since_purchase", [r[0] for r in life.purchases(life.rows)]),
    ]:
        if found:
            yield name, min((day - max(found)).days, 364)
    bought = life.purchases(rows)
    timed = [r for r in bought if r[1] is not None]
    if bought:
        yield "weekend_share", sum(r[0].isoweekday() >= 6 for r in bought) / len(bought)
    if timed:
        yield "evening_share", sum(r[1] >= 18 * 60 or r[1] < 6 * 60 for r in timed) / len(timed)


def payday(life):
    rows, days = life.window(84)
    incomes = [r for r in life.rows if r[3] == "income" and r[4] > 0 and (life.as_of - r[0]).days < days + 6]
    near = {r[0] + timedelta(days=k) for r in incomes if 2 * r[4] >= max(i[4] for i in incomes) for k in range(7)}
    covered = sum(life.as_of - timedelta(days=k) in near for k in range(days))
    fun = [r for r in rows if r[3] == "discretionary" and r[4] < 0]
    if covered and fun:
        yield "payday_effect", clip(sum(r[4] for r in fun if r[0] in near) / sum(r[4] for r in fun) / (covered / days), 0, 12)


def categories(life):
    rows, _ = life.window(84)
    spent = life.spent(rows)
    if spent > 0:
        yield "essential_share", clip(life.net(rows, "essential") / spent, 0, 1)
        yield "debt_share", clip(life.net(rows, "debt", "fee") / spent, 0, 1)
    now = life.by_category(rows)
    if now:
        shares = [t / sum(now.values()) for t in now.values()]
        yield "category_diversity", clip(-sum(s * math.log(s) for s in shares) / math.log(18), 0, 1)
    before = life.by_category(life.window(168, 84)[0])
    if life.age >= 112 and now and before:
        dot = sum(now[c] * before.get(c, 0) for c in now)
        yield "category_stability", clip(dot / math.hypot(*now.values()) / math.hypot(*before.values()), 0, 1)


def discipline(life):
    rows, _ = life.window(84)
    earned = life.earned(rows)
    if earned:
        yield "savings_rate", clip((earned - life.spent(rows)) / earned, -1, 1)
        yield "saved_share", clip(life.net(rows, "saving") / earned, -1, 1)
    fun = [r for r in rows if r[3] == "discretionary" and r[4] < 0 and r[1] is not None]
    if fun:
        at = {r[0].toordinal() * 1440 + r[1] for r in fun}
        burst = {a for a in at if any(a != b and abs(a - b) <= 90 for b in at)}
        night = {a for a in at if a % 1440 >= 23 * 60 or a % 1440 < 5 * 60}
        yield "impulse_share", len(burst | night) / len(at)
    periods = min(life.age // 28, 6)
    if periods >= 3:
        totals = defaultdict(lambda: [0] * periods)
        for r in life.rows:
            if r[3] in SPENDING and (period := (life.as_of - r[0]).days // 28) < periods:
                totals[r[2]][period] -= r[4]
        totals = [[max(t, 0) for t in ts] for ts in totals.values()]
        if sum(map(sum, totals)) > 0:
            worst = sum(mean(t) for t in totals) * math.sqrt(periods - 1)
            yield "budget_discipline", clip(1 - sum(float(pstdev(t)) for t in totals) / worst, 0, 1)


def goals(life):
    day = life.as_of
    now = life.open_goals(day)
    if now:
        yield "goal_progress", mean(clip(life.put(g) / life.goals[g][3], 0, 1) for g in now)
    ends = [e for e in (day - timedelta(days=28 * k) for k in range(6)) if life.open_goals(e)]
    if ends:
        yield "goal_adherence", mean(any(0 <= (e - p[1]).days < 28 and p[2] > 0 for p in life.puts) for e in ends)
    rows, days = life.window(84)
    due = [g for g in now if life.goals[g][1] is not None]
    if due and life.earned(rows):
        need = sum(max(life.goals[g][3] - life.put(g), 0) / max((life.goals[g][1] - day).days / 7, 1) for g in due)
        yield "goal_pressure", clip(need / (life.earned(rows) * 7 / days), 0, 5)


def risk(life):
    if life.opening is None or not life.rows:
        return
    rows, days = life.window(84)
    week = life.spent(rows) * 7 / days
    reserve = life.opening + sum(r[4] for r in life.rows if r[3] != "saving")
    yield "reserve_weeks", 0 if reserve <= 0 else clip(reserve / week, 0, 104) if week > 0 else 104
    balances = [life.opening + sum(r[4] for r in life.rows if r[0] <= life.as_of - timedelta(days=k)) for k in range(days)]
    yield "low_balance_share", sum(b < week for b in balances) / days


def reference(rows, as_of, **kw) -> dict:
    """Name to number; a name that is missing cannot be known."""
    life = Life(rows, as_of, **kw)
    return dict(item for part in (level, timing, payday, categories, discipline, goals, risk) for item in part(life))
