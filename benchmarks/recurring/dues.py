"""Do payments come as surely as `dues` says? `python dues.py [--people 300] [--bank FOLDER] [--out dues.json]`

Streams are found as of a day, and what falls due in the twelve weeks after it is looked for in the rows of those weeks: a due payment came if the same
place was paid (same person, direction, currency, account and words of the name), within the days in which a payment belongs to a due date and at
0.6 to 1.7 times the amount expected; each row is good for one due date, the nearest first. People whose rows end before the twelve weeks do are left out.
FOLDER holds the PKDD'99 tables of a Czech bank (`trans_*.parquet`); without it only made-up people are measured.
"""

import argparse
import json
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
from real import frames as bank_frames
from run import planted, roughened

from fincoach.data.population import generate
from fincoach.features.recurring import _REACH, RHYTHMS, _grouped, _local_rows, _streams_in, coming

SPAN = 84
BANDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.01)
REACH = {r.name: int(reach) for r, reach in zip(RHYTHMS, _REACH, strict=True)}


def grouped(frames):
    """All payments in groups, as the search for streams sees them."""
    rows = frames["transactions"]
    last = rows["occurred_at"].max().date() + timedelta(days=2)
    return _grouped(_local_rows(frames["users"].select("id", "timezone"), rows, last))


def until(rows, day):
    """The payments up to a day."""
    from fincoach.features.recurring import _until

    return _until(rows, (day - date(1970, 1, 1)).days)


def judged(rows, as_of):
    """One row a due date of the twelve weeks after `as_of`: what was said of it, and whether it came."""
    found = _streams_in(until(rows, as_of), as_of)
    live, at, days, chance = coming(found, as_of + timedelta(days=1), as_of + timedelta(days=SPAN))
    today = (as_of - date(1970, 1, 1)).days
    groups = {g: (a, b) for g, a, b in zip(rows.groups.rows(), rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True)}
    place = dict(zip(found.told.stream_id, found.told.place, strict=True))
    lasts = {}
    for user, day in zip(np.array([g[0] for g in rows.groups.rows()])[np.repeat(np.arange(len(rows.groups)), np.diff(rows.offsets))].tolist(), rows.day.tolist(), strict=True):
        lasts[user] = max(lasts.get(user, 0), day)
    used, seen, out = set(), {}, []
    for i, day, p in zip(at.tolist(), days[:, 0].tolist(), chance.tolist(), strict=True):
        a, b = groups[place[live.stream_id[i]]]
        user, kind = int(live.user_id[i]), RHYTHMS[live.calendar[i, 0]].name
        seen[i] = ahead = seen.get(i, -1) + 1
        if lasts[user] < today + SPAN:
            continue
        reach, expected = REACH[kind], abs(int(live.amounts[i, 0]))
        near = [r for r in range(a, b) if rows.day[r] > today and abs(rows.day[r] - day) <= reach and r not in used and 0.6 < abs(rows.amount[r]) / expected < 1.7]
        if near:
            used.add(min(near, key=lambda r: abs(rows.day[r] - day)))
        out.append((kind, "in" if live.income[i] else "out", ahead, day - today, int(live.count[i]), int(live.missed[i]), float(live.confidence[i]), p, expected, bool(near)))
    return pl.DataFrame(out, schema=["rhythm", "direction", "ahead", "days", "count", "missed", "stream", "said", "amount", "came"], orient="row")


def bands(told, by="said"):
    """Stated chances in bands: how many, the mean, the share that came."""
    cut = told.with_columns(band=pl.Series(np.digitize(told[by], BANDS[1:-1]))).group_by("band").agg(
        pl.len().alias("due"), pl.col(by).mean().round(3).alias("said"), pl.col("came").mean().round(3)).sort("band").drop("band")
    return cut.to_dicts()


def by(told, *names):
    """Mean chance and share that came, by group."""
    return told.group_by(names).agg(pl.len().alias("due"), pl.col("said").mean().round(3), pl.col("came").mean().round(3)).sort(names).to_dicts()


def summary(told):
    """All figures of one source."""
    error = float(np.average([abs(b["said"] - b["came"]) for b in bands(told)], weights=[b["due"] for b in bands(told)]))
    weeks = told.with_columns(weeks=(pl.col("days") - 1) // 28 * 4)
    worth = (told["amount"] * told["said"]).sum() / (told["amount"] * told["came"]).sum()
    return {"due": len(told), "said": round(told["said"].mean(), 3), "came": round(told["came"].mean(), 3), "calibration error": round(error, 4),
            "money said over money that came": round(worth, 3), "bands": bands(told), "by weeks ahead": by(weeks, "weeks"), "by rhythm": by(told, "rhythm"),
            "by direction": by(told, "direction"), "by missed": by(told.with_columns(pl.col("missed").clip(0, 2)), "missed")}


def population_part(people, seed, rough):
    """Due payments of made-up people after 100 days, one year and two."""
    population = generate(people, 830, seed)
    frames, end = population.frames, population.frames["transactions"]["occurred_at"].max().date()
    if rough:
        frames = roughened(population, planted(population, 830), seed)[0]
    rows = grouped(frames)
    return pl.concat([judged(rows, end - timedelta(days=back)) for back in (SPAN + 3, 260, 460, 720)])


def bank_part(folder):
    """Due payments of the bank's accounts: of 1993-94, and of those that asked for a loan later; the other account's number as the merchant."""
    told = []
    for name, ends in (("trans_1993*", (date(1993, 9, 30), date(1993, 12, 31))), ("trans_preloan*", (date(1996, 6, 30), date(1997, 3, 31), date(1997, 12, 31)))):
        rows = pl.concat([pl.read_parquet(p) for p in sorted(folder.glob(f"{name}.parquet"))])
        if "trans_id" not in rows.columns or rows["trans_id"].null_count():
            rows = rows.with_columns(trans_id=pl.int_range(pl.len()).cast(pl.Int64))
        payments = grouped(bank_frames(rows.sort("account_id", "date", "trans_id"), True))
        told += [judged(payments, day) for day in ends]
    return pl.concat(told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--seed", type=int, default=20261124)
    parser.add_argument("--bank", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("dues.json"))
    given = parser.parse_args()
    figures = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name, rough in (("population", False), ("population, as banks are", True)):
        figures[name] = summary(population_part(given.people, given.seed + rough, rough))
    if given.bank:
        figures["bank"] = summary(bank_part(given.bank))
    given.out.write_text(json.dumps(figures, indent=1) + "\n")
    for name, f in figures.items():
        print(f"{name}: {f['due']:,} due, said {f['said']:.3f}, came {f['came']:.3f}, calibration error {f['calibration error']:.3f}, money {f['money said over money that came']:.3f}")


if __name__ == "__main__":
    main()
