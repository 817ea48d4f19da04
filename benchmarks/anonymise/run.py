"""How many people of a shared population are found again, and what their features still say. One command; see README.md.

    python benchmarks/anonymise/run.py                 # 500 people
    python benchmarks/anonymise/run.py --people 60     # a look
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent.parent / "tests"))

from attackers import all_attacks  # noqa: E402

from fincoach.data.anonymise import PLAIN, STRENGTH, _secrets, _words, anonymise  # noqa: E402
from fincoach.data.population import generate  # noqa: E402
from fincoach.features.store import batch_features  # noqa: E402

KEY = b"nobody shares what has this key."


def pairs(frames, shared):
    """True and shared names of the people who have transactions in both."""
    names = frames["users"].join(frames["transactions"].select(id="user_id").unique(), on="id")["external_id"].sort()
    there = set(shared["users"].join(shared["transactions"].select(id="user_id").unique(), on="id")["external_id"])
    return [p for p in zip(names, _words(KEY, "someone", names), strict=True) if p[1] in there]


def shifted_back(frames, shared, strength):
    """The shared frames with each person's whole weeks undone, so that features can be asked for as of one day."""
    class Known:
        key = KEY
    Known.strength = strength
    names = frames["users"]["external_id"]
    weeks = {new: -7 * _secrets(Known, old)[2] for old, new in zip(names, _words(KEY, "someone", names), strict=True)}
    users = shared["users"].select(user_id="id", back=pl.col("external_id").replace_strict(weeks, return_dtype=pl.Int64))
    made = dict(shared)
    for table in ("transactions", "financial_goals"):
        moments = [n for n, t in shared[table].schema.items() if isinstance(t, pl.Datetime)]
        moved = shared[table].join(users, on="user_id", how="left", maintain_order="left")
        made[table] = moved.with_columns(pl.col(m) + pl.duration(days=pl.col("back")) for m in moments).drop("back")
    owners = shared["financial_goals"].select(goal_id="id", user_id="user_id").join(users, on="user_id")
    given = shared["goal_contributions"].join(owners, on="goal_id", how="left", maintain_order="left")
    made["goal_contributions"] = given.with_columns(pl.col("contributed_at") + pl.duration(days=pl.col("back"))).drop("back", "user_id")
    return made


def features(frames, shared, strength):
    """Rank correlation of each feature between true and shared people, as of the last day, and both medians."""
    last = frames["transactions"]["occurred_at"].max().date()
    users = {n: f["users"].select(user_id="id", name="external_id") for n, f in (("true", frames), ("shared", shared))}
    true = batch_features(frames, last).join(users["true"], on="user_id").with_columns(name=_words(KEY, "someone", frames["users"].sort("id")["external_id"]))
    both = true.join(batch_features(shifted_back(frames, shared, strength), last).join(users["shared"], on="user_id"), on="name", suffix="_shared")
    made = []
    for name in [c for c in true.columns if c not in ("user_id", "name", "month_position")]:
        pair = both.select(a=name, b=f"{name}_shared").filter(pl.col("a").is_finite() & pl.col("b").is_finite())
        ranks = np.corrcoef(pair["a"].rank(), pair["b"].rank())[0, 1]
        made.append({"feature": name, "rank correlation": round(float(ranks), 2), "median, true": float(f"{pair['a'].median():.3g}"), "median, shared": float(f"{pair['b'].median():.3g}")})
    return made


def main(people: int, keep: bool) -> None:
    frames, found, seconds = generate(people, 400, 9).frames, {}, {}
    for name, strength in (("plain", PLAIN), ("ours", STRENGTH)):
        began = time.perf_counter()
        shared = anonymise(frames, KEY, strength).frames
        seconds[name] = round(time.perf_counter() - began, 1)
        names = pairs(frames, shared)
        found[name] = all_attacks(frames, shared, name, names, targets=100)
        print(name, f"{len(names)} people, {seconds[name]} s,", f"{len(shared['transactions']):,} of {len(frames['transactions']):,} rows", flush=True)
    attacks = [{"the attacker knows": k, "scaled and shifted": round(found["plain"][k], 3), "anonymised": round(found["ours"][k], 3)} for k in found["ours"]]
    results = {"people": len(names), "targets of a to c": 100, "chance": round(1 / len(names), 4), "seconds": seconds, "attacks": attacks, "features": features(frames, shared, STRENGTH)}
    with pl.Config(tbl_rows=60, fmt_str_lengths=80, tbl_width_chars=140):
        print(pl.DataFrame(attacks), pl.DataFrame(results["features"]))
    if keep:
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=500)
    given = parser.parse_args()
    main(given.people, keep=given.people == 500)
