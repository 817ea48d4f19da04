"""Cash flow, low points, chances and warnings on real bank accounts: `python benchmarks/health/run.py FOLDER [--people N]`.

FOLDER holds `trans_1993_to_1994-04.parquet` and, for the second look, `trans_preloan_354acc_1995-1998.parquet`: accounts of a bank with every row and the
balance after it (PKDD'99 Discovery Challenge; public, not part of this project). Without a folder `--people` made-up ones are looked at. Writes results.json beside this file.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from fincoach.data.export import write_snapshot
from fincoach.data.population import generate
from fincoach.data.tables import KINDS
from fincoach.features.ledger import day_number
from fincoach.forecast import health as h
from fincoach.serving.cashflow import (
    ANCHORS,
    DAYS,
    PLAIN,
    accounts,
    balance_series,
    bent,
    led_astray,
    low_point,
    opinions,
    simulate,
    turnover,
)

HERE = Path(__file__).parent
FIRST, LATER = "trans_1993_to_1994-04.parquet", "trans_preloan_354acc_1995-1998.parquet"
SAME = {"withdrawal in cash": "withdraw_cash", "payment for statement": "service", "insurrance payment": "insurrance_pmt", "interest credited": "interest_pmt", " ": None,
        "sanction interest if negative balance": "interest_for_negetive_balance"}  # the later file's names, as the first one has them
AS_OF, SEED = date(1994, 4, 20), 7


def read(path):
    """Our tables of a file of the bank's rows, with opening balances; and the share of days that end, to a crown, with the balance the bank tells (it rounds interest)."""
    sys.path.insert(0, str(HERE.parent / "recurring"))
    from real import frames as bank_frames

    rows = pl.read_parquet(path).with_row_index("n").sort("account_id", "date", "n")
    rows = rows.with_columns(type=pl.when(pl.col("type") == "credit").then(pl.lit("credit")).otherwise(pl.lit("debit")), operation=pl.col("operation").replace(SAME), k_symbol=pl.col("k_symbol").replace(SAME))
    signed = pl.when(pl.col("type") == "credit").then(pl.col("amount")).otherwise(-pl.col("amount"))
    rows = rows.with_columns(signed=signed, trans_id=pl.int_range(1, pl.len() + 1, dtype=pl.Int64))  # some rows have no number of the bank's
    # Rows of one day come in any order, so that the opening balance is the one with which most days end as the bank says.
    ends = rows.with_columns(moved=pl.col("signed").cum_sum().over("account_id")).with_columns(apart=(pl.col("balance") - pl.col("moved")).round(2))
    opening = ends.group_by("account_id").agg(pl.col("apart").mode().sort().first().alias("opening"))
    frames = bank_frames(rows.drop("signed", "n"), named=True)
    profiles = opening.select(pl.col("account_id").alias("user_id"), (pl.col("opening") * 100).round().cast(pl.Int64).alias("opening_balance_minor"))
    told = ends.join(opening, on="account_id").group_by("account_id", "date").agg(((pl.col("apart") - pl.col("opening")).abs() < 1.0).any().alias("same"))
    return frames | {"user_profiles": profiles.sort("user_id")}, float(told["same"].mean()), dict(rows.group_by("account_id").agg(pl.col("date").max()).iter_rows())


def score(s):
    """A score as three rounded numbers."""
    return [round(float(x), 4) for x in s]


def low_points(data, origins, cases, parameters):
    """How far the lowest balance of the next twelve weeks was told right: error in weeks of spending beside plain answers, coverage of its range and of its days."""
    rows = []
    for i, k, group, week in zip(cases.person.tolist(), cases.origin.tolist(), cases.group.tolist(), cases.scale.tolist(), strict=True):
        of, due, _ = h.standing(data, i, origins[k])
        today = day_number(origins[k].day)
        walks = simulate(of, due, today)
        said, bend = opinions(of, walks, today), parameters.bend(group)
        low = low_point(bent(led_astray(walks, bend.unrest * turnover(of, today)), said, bend), today, bent(walks, said, bend._replace(stretch=PLAIN.stretch)))
        series = balance_series(data.accounts.of(i, origins[k].streamed), today - DAYS + 1, today + DAYS)
        past, came = series[:DAYS], series[DAYS:]
        true, when = came.min(), date.fromordinal(today + 1 + int(came.argmin()) + 719_163)
        plain = min(past[-1], past[-1] + (past - np.maximum.accumulate(past)).min())
        rows.append((abs(low.amount - true) / week, abs(past.min() - true) / week, abs(plain - true) / week, low.low <= true <= low.high, low.first <= when <= low.last,
                     (low.last - low.first).days + 1))
    told = np.array(rows, float)
    ours, again, fallen = told[:, 0], told[:, 1], told[:, 2]
    best = again if again.mean() < fallen.mean() else fallen
    return {"error, weeks of spending": score(h.mean_of(ours, cases.user_id)), "lowest of the last 12 weeks": score(h.mean_of(again, cases.user_id)),
            "as deep a fall as in the last 12 weeks": score(h.mean_of(fallen, cases.user_id)), "ours beside the better of them": score(h.ratio(ours, best, cases.user_id, SEED, 1.0)),
            "within the 80 % range": score(h.mean_of(told[:, 3], cases.user_id)), "on a day of the 80 % range": score(h.mean_of(told[:, 4], cases.user_id)), "days of that range": round(float(told[:, 5].mean()), 1)}  # fmt: skip


def look(data, origins, cases, learn, fitted):
    """Everything about cases judged by parameters learned elsewhere."""
    p = fitted.parameters
    straight = replace(p, unrest=0.0, stretch=h.stretches(learn.fan, h.centres(learn, p.weights), learn.y, learn.group))
    errors = h.balance_errors(cases, p)
    alone = min(h.MEMBERS, key=lambda m: errors[m].mean())
    falls = h.falls_of(data, origins, cases, p.bend)
    rates, versus, inside = h._rates(cases, p, SEED)
    return {"cases": len(cases), "accounts": len(np.unique(cases.user_id)), "best single opinion": alone,
            "led astray by": p.unrest, "balance error, weeks of turnover, beside it stays as it is": {f"{d // 7} weeks": score(h.ratio(errors[h.OURS][:, a] / cases.size, errors["still"][:, a] / cases.size, cases.user_id, SEED, 1.0)) for a, d in enumerate(ANCHORS)},
            "balance error, weeks of spending": {f"{d // 7} weeks": {n: score(h.mean_of(e[:, a], cases.user_id)) for n, e in errors.items()} | {f"ours beside {alone}": score(h.ratio(errors[h.OURS][:, a], errors[alone][:, a], cases.user_id, SEED, 1.0))}
                                                 for a, d in enumerate(ANCHORS)},
            "fan": h.coverage_table(cases, h.quantiles_of(cases, p), SEED).to_dicts(), "walks as they come": h.coverage_table(cases, cases.fan, SEED).to_dicts()[:4],
            "fan misses by, weeks of turnover": {"served": h.misses(cases, h.quantiles_of(cases, p)).round(3).tolist(), "stretched only": h.misses(cases, h.quantiles_of(cases, straight)).round(3).tolist()},
            "low point": low_points(data, origins, cases, p), "chances": h.chances_table(falls, cases, fitted.falls, learn, p, SEED).to_dicts(),
            "warnings": h.warnings_table(falls, p, cases.user_id, SEED).to_dicts(), "savings rate": {n: score(s) for n, s in rates.items()} | {f"ours beside {n}": score(s) for n, s in versus.items()},
            "savings rate within 80 % and 95 %": [round(x, 4) for x in inside]}  # fmt: skip


def in_time(frames, as_of, people, folder, **days):
    """Learned on earlier days, judged on later ones of the same accounts; also what was learned."""
    snapshot = write_snapshot(frames, folder)
    data = h.take_data(snapshot, h.Recipe(as_of, SEED, at_most=people, **days))
    learn, judge = h.cases_of(data, data.learn), h.cases_of(data, data.judge)
    fitted = h.fit(data, learn)
    told = {"learned on": [str(o.day) for o in data.learn], "judged on": [str(o.day) for o in data.judge], "cases learned from": len(learn),
            "weights at 12 weeks": dict(zip(h.MEMBERS, fitted.parameters.weights[-1], strict=True)), "warns from": fitted.parameters.warn}  # fmt: skip
    return told | look(data, data.judge, judge, learn, fitted), learn, fitted


def lasting(frames, ends, days, users):
    """Data and cases of some accounts on some days: those whose rows go on for twelve weeks more."""
    last = max(ends.values()).date()
    known = accounts(frames, last, users)
    origins = tuple(h._origin(frames, known, d, known.user_ids.tolist()) for d in days)
    kind_of = {i: KINDS.index(k) for i, k in frames["categories"].select("id", "kind").iter_rows()}
    data = h.Data(h.Recipe(last, SEED), known, kind_of, origins, origins, frames["user_profiles"], "measured")
    cases = h.cases_of(data, origins)
    there = np.array([ends[int(u)].date() >= date.fromordinal(int(d) + 719_163) + timedelta(days=DAYS) for u, d in zip(cases.user_id, cases.day, strict=True)])
    return data, cases.take(there)


def strangers(frames, ends, learn, fitted):
    """Other accounts in later years, quarter by quarter."""
    days = [d for y in range(1995, 1999) for m in (2, 5, 8, 11) if (d := date(y, m, 15)) + timedelta(days=DAYS) <= max(ends.values()).date()]
    data, cases = lasting(frames, ends, days, None)
    return look(data, data.judge, cases, learn, fitted)


def halves(frames, ends):
    """Learned on every second account from 1995 to 1996, all seasons, judged on the others from 1997 to 1998."""
    users = frames["users"]["id"].sort().to_list()
    begin, turn, last = date(1995, 8, 15), date(1997, 1, 1), max(ends.values()).date()
    days = [begin + timedelta(days=25 * k) for k in range(60)]
    before, after = [d for d in days if d + timedelta(days=DAYS) < turn], [d for d in days if turn <= d <= last - timedelta(days=DAYS)]
    data, learn = lasting(frames, ends, before, users[::2])
    fitted = h.fit(data, learn)
    later, cases = lasting(frames, ends, after, users[1::2])
    return {"learned on": list(map(str, before)), "judged on": list(map(str, after)), "cases learned from": len(learn)} | look(later, later.judge, cases, learn, fitted)


def show(name, r):
    """Print the measurements of one look."""
    print(f"\n{name}: {r['cases']:,} cases of {r['accounts']:,} accounts")
    for span, row in r["balance error, weeks of spending"].items():
        turned = "{:+.1%} ({:+.1%} to {:+.1%})".format(*r["balance error, weeks of turnover, beside it stays as it is"][span])
        print(f"  balance in {span:8s} " + "  ".join(f"{n} {v[0]:.2f}" for n, v in row.items() if "beside" not in n) + f"   beside {r['best single opinion']} " + "{:+.1%} ({:+.1%} to {:+.1%})".format(*row[f"ours beside {r['best single opinion']}"]) + f"; in weeks of turnover beside still {turned}")
    for row in r["fan"]:
        within = "  ".join(f"{level} %: {row[level]:.1%} ({row[f'{level}_low']:.1%} to {row[f'{level}_high']:.1%})" for level in ("80", "95"))
        print(f"  fan {row['group']:8s} {row['days']:3d} days n {row['cases']:5d}  {within}")
    print("  fan misses by (7, 28, 56, 84 days):", r["fan misses by, weeks of turnover"], "walks led astray by", r["led astray by"], "weeks of turnover")
    for what, v in r["low point"].items():
        print(f"  low point: {what}: {v}")
    for row in r["chances"]:
        print("  below {level} in {days} days: n {cases}, happened {happened:.1%}, said {mean:.1%}, skill {skill:.2f} ({skill_low:.2f} to {skill_high:.2f}), AUC {area:.3f} (plain {plain_area:.3f}), off {error:.1%}, beside plain {more:+.1%} ({more_low:+.1%} to {more_high:+.1%})".format(**row))
    for row in r["warnings"]:
        print("  warnings of {level}: {warned} of {cases}, true {true:.0%} ({true_low:.0%} to {true_high:.0%}), found {found:.0%}, {lead} days before".format(**row))
    print("  savings rate: " + "  ".join(f"{n} {v[0]:+.3f}" for n, v in r["savings rate"].items()), r["savings rate within 80 % and 95 %"])


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("folder", nargs="?", type=Path)
    args.add_argument("--people", type=int, default=300, help="accounts or people looked at on each day, at most; of 2,000 people made up")
    given, start, found = args.parse_args(), time.process_time(), {}
    if given.folder is not None and not (given.folder / FIRST).is_file():
        sys.exit(f"there is no {FIRST} in {given.folder}: give the folder with the bank's tables as parquet files, or none for made-up people")
    with tempfile.TemporaryDirectory() as folder:
        if given.folder is None:
            frames = generate(people=2_000, days=730, seed=20250101).frames
            found["population"] = in_time(frames, frames["transactions"]["occurred_at"].max().date(), given.people, folder)[0]
        else:
            frames, same, _ = read(given.folder / FIRST)
            found["accounts"], learn, fitted = in_time(frames, AS_OF, given.people, folder, learn_days=8, judge_days=6)
            found["accounts"]["days that end with the balance the bank tells"] = round(same, 4)
            if (given.folder / LATER).is_file():
                frames, same, ends = read(given.folder / LATER)
                found["other accounts, years later"] = strangers(frames, ends, learn, fitted) | {"days that end with the balance the bank tells": round(same, 4)}
                found["other accounts, learned on half of them"] = halves(frames, ends)
    kept = json.loads((HERE / "results.json").read_text()) if (HERE / "results.json").is_file() else {}
    (HERE / "results.json").write_text(json.dumps(kept | found | {"cpu_seconds": kept.get("cpu_seconds", {}) | dict.fromkeys(found, round(time.process_time() - start, 1))}, indent=1) + "\n")
    for name, r in found.items():
        show(name, r)


if __name__ == "__main__":
    main()
