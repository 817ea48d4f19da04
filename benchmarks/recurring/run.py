"""Recurring streams against people whose streams are known: what is found, when it comes next, how sure, how fast.

    python benchmarks/recurring/run.py [--people 400] [--seed 20261121] [--only PART] [--out results.json]

Truth is cut at each January raise; successive pieces are one stream here. A stream counts once it has three payments (yearly: two) by the date asked.
"""

import argparse
import json
import sys
import time
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from fincoach.data.population import EPOCH, START, generate
from fincoach.data.sources import read_source
from fincoach.data.tables import CATEGORIES
from fincoach.features.recurring import detect_spending_cycles

PERIOD = {"week": "weekly", "fortnight": "biweekly", "month": "monthly", "quarter": "quarterly", "year": "yearly"}
MONTHS = {"month": 1, "quarter": 3, "year": 12}
NAME = {c.id: c.name for c in CATEGORIES}
UNLISTED = ("interest", "savings", "fees")  # also booked on fixed days by the population (month's end, the day for goals), but not among its planted streams


def local_days(frames):
    """The transactions with their local `day`."""
    rows = frames["transactions"].join(frames["users"].select(pl.col("id").alias("user_id"), "timezone"), on="user_id")
    parts = [p.with_columns(day=pl.col("occurred_at").dt.convert_time_zone(z).dt.date()) for (z,), p in rows.group_by("timezone")]
    return pl.concat(parts).sort("id")


def due_dates(stream, months, first, last):
    """Every due date of a planted stream between two days; `months` are the offsets of the months it may fall in."""
    if stream["period"] in ("week", "fortnight"):
        step = 7 if stream["period"] == "week" else 14
        day = EPOCH + timedelta(days=stream["anchor"])
        return [d for k in range(2_000) if first <= (d := day + timedelta(days=step * k)) <= last]
    found = []
    for m in months:
        year, month = START.year + (START.month - 2 + m) // 12, (START.month - 2 + m) % 12 + 1
        begin, after = date(year, month, 1), date(year + month // 12, month % 12 + 1, 1)
        day = begin + timedelta(days=min(stream["anchor"], (after - begin).days) - 1)
        if day.weekday() >= 5:
            day += timedelta(days={-1: 4 - day.weekday(), 0: 0, 1: 7 - day.weekday()}[stream["shift"]])
        if first <= day <= last:
            found.append(day)
    return found


def planted(population, days):
    """One dict a planted stream, pieces joined: user_id, category, merchant, frequency, rows (day, id, amount), ends, levels."""
    truth, last = population.truth["streams"].to_dicts(), START + timedelta(days=days + 800)
    rows = local_days(population.frames)
    wanted = population.truth["streams"].select("user_id", "merchant", "category_id").unique()
    at = {}
    for r in rows.join(wanted, on=["user_id", "merchant", "category_id"], how="semi").select("user_id", "merchant", "category_id", "day", "id", "amount_minor").iter_rows():
        at.setdefault(r[:4], []).append(r[4:])
    joined, used = {}, set()
    for s in sorted(truth, key=lambda s: (s["user_id"], s["start_at"])):
        key = (s["user_id"], s["category_id"], s["merchant"], s["period"], s["anchor"], s["shift"])
        whole = joined.get(key)
        if whole is None or whole["end"] != s["start_at"]:
            whole = joined[key] = {"user_id": s["user_id"], "category": NAME[s["category_id"]], "frequency": PERIOD[s["period"]],
                                   "rows": [], "levels": [], "due": [], "variation": s["variation"], "key": key, "end": s["start_at"]}
        whole["end"] = s["end_at"]
        step = MONTHS.get(s["period"], 1)
        hits = lambda d, s=s: [x for x in at.get((s["user_id"], s["merchant"], s["category_id"], d), ())  # noqa: E731
                               if x[0] not in used and abs(np.log(abs(x[1] / s["amount_minor"]))) < 0.5 and x[1] * s["amount_minor"] > 0]
        choices = [due_dates(s, range(p, 80, step), s["start_at"], last) for p in range(step)] if s["period"] in MONTHS else [due_dates(s, (), s["start_at"], last)]
        due = max(choices, key=lambda c: sum(bool(hits(d)) for d in c if d < s["end_at"]))
        for d in due:
            if d < s["end_at"] and (near := hits(d)):
                row = min(near, key=lambda x: abs(x[1] - s["amount_minor"]))
                used.add(row[0])
                whole["rows"].append((d, *row))
        whole["levels"].append((s["start_at"], s["amount_minor"]))
        whole["due"] = [d for d in whole["due"] if d < s["start_at"]] + due
    return [w for w in joined.values() if w["rows"]]


def roughened(population, truth, seed):
    """(frames, truth) as banks are: one planted payment in six comes up to three days late, one in fifty a day early, one in thirty never, names carry
    numbers, and half of all other merchants ask whole prices, so that equal amounts are common."""
    rng = np.random.default_rng([seed, 77])
    rows = population.frames["transactions"]
    planted_ids = np.array([r[1] for t in truth for r in t["rows"]])
    where = np.searchsorted(rows["id"].to_numpy(), planted_ids)
    late = np.zeros(len(rows), np.int64)
    u = rng.random(len(where))
    late[where] = np.where(u < 1 / 6, rng.integers(1, 4, len(where)), np.where(u > 0.98, -1, 0))
    gone = np.zeros(len(rows), bool)
    gone[where] = rng.random(len(where)) < 1 / 30
    planted_row = np.zeros(len(rows), bool)
    planted_row[where] = True
    digits = pl.Series(rng.integers(1000, 9999, len(rows)))
    whole = pl.col("merchant").hash(seed) % 2 == 0
    rows = rows.with_columns(pl.Series("late", late), pl.Series("gone", gone), pl.Series("planted", planted_row), digits.alias("digits"))
    rounded = (pl.col("amount_minor") / 100).round().cast(pl.Int64) * 100
    rows = rows.with_columns(
        occurred_at=pl.col("occurred_at") + pl.duration(days="late"), merchant=pl.format("{} {}", "merchant", "digits"),
        amount_minor=pl.when(~pl.col("planted") & whole & (rounded != 0)).then(rounded).otherwise("amount_minor")).filter(~pl.col("gone"))
    frames = population.frames | {"transactions": rows.drop("late", "gone", "planted", "digits").sort("user_id", "occurred_at", "id")}
    day = dict(local_days(frames).select("id", "day").iter_rows())
    moved = [t | {"rows": sorted((day[i], i, a) for _, i, a in t["rows"] if i in day)} for t in truth]
    return frames, [t for t in moved if t["rows"]]


def baseline(frames, as_of):
    """Same merchant and direction, amounts within 5 %, the median gap near a known period and seven of ten gaps near it too."""
    rows = local_days(frames).filter(pl.col("day") <= as_of).with_columns(pl.col("merchant").str.replace(r" \d+$", ""), income=pl.col("amount_minor") > 0, size=pl.col("amount_minor").abs())
    rows = rows.sort("user_id", "merchant", "income", "size")
    group = ["user_id", "merchant", "income"]
    far = (pl.col("size") > 1.05 * pl.col("size").shift(1)).fill_null(True).over(group)
    rows = rows.with_columns(part=far.cast(pl.Int32).cum_sum().over(group))
    parts = rows.sort("day", "id").group_by([*group, "part"], maintain_order=True).agg("day", "id", "amount_minor").filter(pl.col("day").list.len() >= 2)
    found = []
    for r in parts.to_dicts():
        gaps = np.diff([d.toordinal() for d in r["day"]])
        middle = float(np.median(gaps))
        for name, period, slack in (("weekly", 7, 1), ("biweekly", 14, 2), ("monthly", 30.4, 4), ("quarterly", 91.3, 7), ("yearly", 365, 10)):
            enough = len(gaps) >= (1 if name == "yearly" else 2)
            if enough and abs(middle - period) <= slack and np.mean(np.abs(gaps - period) <= slack) >= 0.7:
                following = r["day"][-1] + timedelta(days=round(middle))
                ended = (as_of - r["day"][-1]).days > 1.5 * period
                found.append({"user_id": r["user_id"], "frequency": name, "transaction_ids": r["id"], "next_date": None if ended else max(following, as_of + timedelta(days=1)),
                              "amount_minor": int(np.median(r["amount_minor"])), "status": "ended" if ended else "mature", "confidence": 1.0,
                              "category_id": None, "count": len(r["id"]), "next_low": following, "next_high": following})
    return found


def judge(found, truth, as_of, category_of):
    """(found streams with whether each is true, planted streams that count with what was said of them)."""
    owner = {row[1]: n for n, t in enumerate(truth) for row in t["rows"]}
    for t in truth:
        t["seen"] = [r for r in t["rows"] if r[0] <= as_of]
        t["best"] = None
    for f in found:
        owners = [owner.get(i, -1) for i in f["transaction_ids"]]
        n = max(set(owners), key=owners.count)
        share = owners.count(n) / len(owners)
        f["category"] = category_of[f["transaction_ids"][-1]]
        f["true"] = n >= 0 and share >= 0.5 and truth[n]["frequency"] == f["frequency"]
        f["unlisted"] = not f["true"] and (f["category"] in UNLISTED) and n < 0
        f["planted"] = n if n >= 0 and share >= 0.5 else -1
        if f["true"] and owners.count(n) >= 0.5 * len(truth[n]["seen"]):
            t = truth[n]
            if t["best"] is not None:  # the second account of one stream is a false one
                worse = min(t["best"], f, key=lambda x: len(x["transaction_ids"]))
                worse["true"] = False
            if t["best"] is None or len(f["transaction_ids"]) > len(t["best"]["transaction_ids"]):
                t["best"] = f
        elif f["true"]:
            f["true"] = False
    counting = [t for t in truth if len(t["seen"]) >= (2 if t["frequency"] == "yearly" else 3)]
    return found, counting


def share(values):
    """The share of true values, rounded; None of nothing."""
    values = list(values)
    return round(float(np.mean(values)), 4) if values else None


def table_of(found, counting, as_of, person_years):
    """All figures of one way to find streams."""
    known = [f for f in found if f["count"] >= (2 if f["frequency"] == "yearly" else 3)]
    got = [t for t in counting if t["best"] is not None]
    strange = [f for f in known if not f["unlisted"]]
    result = {"streams": len(counting), "found": len(known), "recall": share(t["best"] is not None for t in counting), "precision": share(f["true"] for f in strange), "precision, unlisted flows counted as false": share(f["true"] for f in known),
              "precision with those of two payments": share(f["true"] for f in found if not f["unlisted"]),
              "false streams a person-year": round(sum(not f["true"] and not f["unlisted"] for f in found) / person_years, 3),
              "unlisted flows a person-year": round(sum(f["unlisted"] for f in found) / person_years, 3)}
    result["recall by frequency"] = {k: [share(t["best"] is not None for t in counting if t["frequency"] == k), sum(t["frequency"] == k for t in counting)]
                                     for k in sorted({t["frequency"] for t in counting})}
    result["precision by frequency"] = {k: [share(f["true"] for f in strange if f["frequency"] == k), sum(f["frequency"] == k for f in strange)]
                                        for k in sorted({f["frequency"] for f in strange})}
    result["recall by category"] = {k: [share(t["best"] is not None for t in counting if t["category"] == k), sum(t["category"] == k for t in counting)]
                                    for k in sorted({t["category"] for t in counting})}
    wrong = [f["category"] for f in found if not f["true"] and not f["unlisted"]]
    result["false streams by category"] = {k: wrong.count(k) for k in sorted(set(wrong), key=lambda k: -wrong.count(k))}
    errors, held = [], []
    for t in got:
        later = [d for d, *_ in t["rows"] if d > as_of]
        if later and t["best"]["next_date"]:
            errors.append(abs((t["best"]["next_date"] - later[0]).days))
            held.append(t["best"]["next_low"] <= later[0] <= t["best"]["next_high"])
    result["next date"] = {"streams": len(errors), "exact": share(e == 0 for e in errors), "within 2 days": share(e <= 2 for e in errors), "in the window": share(held)}
    off = [abs(t["best"]["amount_minor"] / [a for d, a in t["levels"] if d <= as_of][-1] - 1) for t in got]
    result["amount"] = {"median error": round(float(np.median(off)), 4), "95 % of errors below": round(float(np.quantile(off, 0.95)), 4)} if off else {}
    ended = [(t["end"] <= as_of and any(t["end"] <= d <= as_of for d in t["due"]), t["best"]["status"] == "ended",
              any(t["end"] <= d <= as_of - timedelta(days=7) for d in t["due"])) for t in got]
    result["status"] = {"going, said so": [share(not s for e, s, _ in ended if not e), sum(not e for e, *_ in ended)],
                        "ended, said so": [share(s for e, s, _ in ended if e), sum(e for e, *_ in ended)],
                        "ended for a week or more, said so": [share(s for e, s, w in ended if e and w), sum(e and w for e, _, w in ended)]}
    return result


def calibration(found):
    """Confidence in bands: how many, mean confidence, share that is true."""
    bands = []
    for low, high in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 0.95), (0.95, 0.99), (0.99, 1.01)):
        inside = [f for f in found if not f["unlisted"] and low <= f["confidence"] < high]
        if inside:
            bands.append({"from": low, "to": min(high, 1.0), "streams": len(inside), "mean confidence": round(float(np.mean([f["confidence"] for f in inside])), 3),
                          "true": share(f["true"] for f in inside)})
    return bands


def population_part(people, days, seed, rough=False, after=100):
    """Figures on a population; the last `after` days are the future that next dates are checked with."""
    population = generate(people, days, seed)
    as_of = START + timedelta(days=days - after - 1)
    category_of = dict(zip(population.frames["transactions"]["id"].to_list(), (NAME[c] for c in population.frames["transactions"]["category_id"].to_list()), strict=True))
    frames, truth = population.frames, planted(population, days)
    if rough:
        frames, truth = roughened(population, truth, seed)
    years = population.frames["users"].select(((pl.lit(as_of) - pl.col("created_at").dt.date()).dt.total_days() / 365.25).clip(0)).sum().item()
    told = detect_spending_cycles(frames, as_of)
    ours, counting = judge(told.streams.to_dicts(), truth, as_of, category_of)
    figures = {"people": people, "days": days, "seed": seed, "rough": rough, "as of": as_of.isoformat(), "transactions": len(frames["transactions"]), "person-years": round(years, 1),
               "fincoach": table_of(ours, counting, as_of, years), "calibration": calibration(ours)}
    plain, counting = judge(baseline(frames, as_of), truth, as_of, category_of)
    figures["plain rule"] = table_of(plain, counting, as_of, years)
    return figures, ours, truth


def journey_part():
    """Complete Journey's households only shop: whatever is found in a year of it is a false alarm. As read, and by department instead of by store."""
    frames = read_source("complete-journey").frames
    last = local_days(frames)["day"].max()
    years = len(frames["users"]) * 1.0
    figures = {"households": len(frames["users"]), "transactions": len(frames["transactions"])}
    for name, rows in (("by store", frames["transactions"]), ("by department", frames["transactions"].with_columns(merchant=pl.lit(None, pl.String)))):
        start = time.perf_counter()
        told = detect_spending_cycles(frames | {"transactions": rows}, last).streams
        figures[name] = {"false streams a household-year": round(len(told) / years, 4), "with three payments or more": round(len(told.filter(pl.col("count") >= 3)) / years, 4),
                         "by frequency": dict(told["frequency"].value_counts().sort("count", descending=True).iter_rows()), "seconds": round(time.perf_counter() - start, 1)}
    plain = baseline(frames, last)
    figures["plain rule, by store"] = {"false streams a household-year": round(len(plain) / years, 4)}
    return figures


def speed_part(people, days=540):
    """Seconds for everybody, and for one person with ten years of rows, by the clock and of processors (compiling not counted)."""
    figures = {}
    for name, population, end in ((f"{people:,} people, {days} days", generate(people, days, 3), days), ("one person, ten years", generate(2, 3652, 3), 3652)):
        chosen = [1] if people and end == 3652 else None
        as_of, runs = START + timedelta(days=end), []
        detect_spending_cycles(population.frames, as_of, user_ids=[1])
        for _ in range(3):
            clock, work = time.perf_counter(), time.process_time()
            detect_spending_cycles(population.frames, as_of, user_ids=chosen)
            runs.append((time.perf_counter() - clock, time.process_time() - work))
        rows = population.frames["transactions"] if chosen is None else population.frames["transactions"].filter(pl.col("user_id") == 1)
        figures[name] = {"transactions": len(rows), "seconds by the clock": round(min(r[0] for r in runs), 3), "seconds of processors": round(min(r[1] for r in runs), 3)}
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=400)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--only", help="one part; the others stay as they are in the results")
    given = parser.parse_args()
    populations = {"two years": (820, 0, False), "110 days": (210, 1, False), "two years, as banks are": (820, 2, True)}
    parts = {name: lambda days=days, more=more, rough=rough: population_part(given.people, days, given.seed + more, rough)[0]
             for name, (days, more, rough) in populations.items()}
    parts |= {"complete journey": journey_part, "speed": lambda: speed_part(5 * given.people)}
    if given.only and given.only not in parts:
        parser.error(f"there is no part {given.only!r}; there are {', '.join(parts)}")
    for name in [given.only] if given.only else list(parts):
        figures = parts[name]()
        known = json.loads(given.out.read_text()) if given.out.exists() else {}
        known[name] = figures
        given.out.write_text(json.dumps({k: known[k] for k in parts if k in known}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
