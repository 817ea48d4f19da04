"""Do ranges and chances of spending hold, for everybody and in every group; and what holds when settings are chosen on other weeks than those that judge. See README.md.

    python benchmarks/ranges/run.py                        # all parts
    python benchmarks/ranges/run.py --only population      # ranges by activity and segment, chances of months above the usual
    python benchmarks/ranges/run.py --only seeds           # ranges by activity and segment, of several populations, as they were and as they are
    python benchmarks/ranges/run.py --only households      # settings chosen on earlier weeks; ranges by activity
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "forecasting")]
# What the settings are chosen from: ours, and one change at a time.
CHANGES = {"as they are": {}, "half as many cells": {"hidden": 0.5}, "no attention": {"attention": False}, "half the steps": {"steps": 0.5}, "half the rate": {"rate": 0.5},
           "half as many trees": {"rounds": 0.5}, "slower trees": {"tree_rate": 0.5}}  # a number: so many times ours
NETWORK = ("hidden", "attention", "steps", "rate")  # what concerns the network; the rest concerns the trees


def population(people: int, days: int, seed: int) -> dict:
    """A model of made-up people with their segments: coverage by group with offsets by activity alone and by both, and chances that came true."""
    from fincoach.forecast import training as t

    data, recipe = _made_up(people, days, seed)
    found = {"seed": seed, "people": people, "days": days, "segments": sorted(data.segments.values())}
    start = time.process_time()
    both = t.fit(data, recipe, "both", print)
    found["fit_cpu_s"] = time.process_time() - start
    test, _ = t.judged(data, both)
    groups = t.kinds(data, data.test)
    alone = replace(data, segmentation=None)
    p = t.chosen(alone, both.first, data.choose, data.test[0], "activity", both.config)
    p = t._handed_on(p, alone, both.first, both.judged, data.choose[0])
    plain = replace(both, judged=replace(both.judged, parameters=p))
    tests = {"by activity": t.judged(alone, plain)[0], "by activity and segment": test}
    found["coverage"] = {name: t.coverage(x, t.SERVED, groups, seed).filter(pl.col("by") != "weeks ahead").to_dicts() for name, x in tests.items()}
    found["chances"] = t.come_true(test, data, both.judged.parameters.chances, seed).to_dicts()
    found["numbers"] = both.judged.parameters.chances
    return found


def _made_up(people: int, days: int, seed: int):
    """The data of made-up people with their segments, and the recipe."""
    from fincoach.data.export import write_snapshot
    from fincoach.data.population import generate
    from fincoach.features.ledger import Ledgers
    from fincoach.forecast import training as t
    from fincoach.segments import training as segments

    made = generate(people, days, seed)
    day = Ledgers.from_frames(made.frames).last_day
    with tempfile.TemporaryDirectory() as folder:
        snapshot = write_snapshot(made.frames, folder)
        how = segments.Recipe(day, seed)
        segmentation = segments.fit(segments.take_data(snapshot, how), how, f"{day}-measured").parameters
        recipe = t.Recipe(day, seed, segmentation.version)
        return t.take_data(snapshot, recipe, segmentation), recipe


@contextmanager
def _as_before():
    """Ranges as they were: tails asked a thirteenth smaller than they claim, and weeks far ahead moved along with each single week nearer by."""
    from fincoach.evaluate import conformal

    at, swing = conformal._at, conformal.SWING
    conformal._at = lambda ordered, level: at(ordered, level * (1 - 0.075) if level < 0.5 else 1 - (1 - level) * (1 - 0.075))
    conformal.SWING = 0.0
    try:
        yield
    finally:
        conformal._at, conformal.SWING = at, swing


def held(people: int, days: int, seed: int) -> dict:
    """Coverage by group of one population, with ranges as they were, as found for another network, and handed on (served): all carried on, of the same two networks."""
    from fincoach.evaluate.forecasts import backtest
    from fincoach.forecast import training as t
    from fincoach.serving.forecast import SpendingModel

    data, recipe = _made_up(people, days, seed)
    config, start = t.SpendingConfig(seed=recipe.seed), time.process_time()
    first, later = (t.learned(data, int(until), config) for until in (data.choose[0], data.test[0]))
    ways, asked = {}, lambda: t.chosen(data, first, data.choose, data.test[0], "measured", config)
    with _as_before():
        ways["as it was"] = asked()
    ways["as found"] = asked()
    ways["handed on (served)"] = t._handed_on(ways["as found"], data, first, later, data.choose[0])
    groups, found, said = t.kinds(data, data.test), {}, None
    for name, p in ways.items():
        model = SpendingModel(p, later.network, later.trees)
        if said is None:  # what the models say does not depend on ranges
            own = t.voices(model, data, data.test[0])
            said = backtest(t._open_ended(data.series, len(data.series.mondays) - 1), {k: own[k] for k in (t.RAW, t.SERVED)}, data.test)
        with _as_before() if name == "as it was" else nullcontext():
            carried = t._carried(data, SimpleNamespace(judged=model), said)
        found[name] = t.coverage(replace(said, models={t.SERVED: carried}), t.SERVED, groups, seed).to_dicts()
    return {"seed": seed, "people": people, "coverage": found, "cpu_s": round(time.process_time() - start, 1)}


def farthest(rows: list[dict], what: str, level: int, least: int = 50) -> dict:
    """The row of the group by activity or segment, with `least` people, whose coverage is farthest off."""
    return max((r for r in rows if r["by"] in ("activity", "segment") and r["what"] == what and r["level"] == level and r["people"] >= least), key=lambda r: abs(r["value"] - level / 100))


def _changed(config, change: dict):
    """Settings with one change."""
    return replace(config, **{k: v if isinstance(v, bool) else type(getattr(config, k))(v * getattr(config, k)) for k, v in change.items()})


def _votes(world, origins, config, change: dict, know: int, kept: dict):
    """What the network and the trees say at origins, in the middle: two (n, O, 4) and two (n, O), learned from the weeks up to number `know`."""
    from fincoach.forecast.spending import learn

    key = "as they are" if not change else next(iter(change))
    kept[key] = parts = learn(world.series.until(know), world.echo[:, : know + 1], _changed(config, change))
    ours = kept["as they are"]
    said = [parts.opinions(world.series.until(int(w)), world.echo[:, w]) for w in origins]
    plain = said if parts is ours else [ours.opinions(world.series.until(int(w)), world.echo[:, w]) for w in origins]
    net, trees = (said, plain) if key in NETWORK else (plain, said)
    return [np.stack(a, 1) for a in ([o.weekly[:, :4, 2] for o in net], [o.trees[:, :4] for o in trees], [o.month[:, 2] for o in net], [o.trees_month for o in trees])]


def _judged(world, config):
    """A backtest, on the weeks that judge, of a model of all that was known before them."""
    from worlds import HORIZON

    from fincoach.forecast.spending import PredictionEvaluator, SpendingPredictor

    first = int(world.origins[0])
    model = SpendingPredictor.fit(world.series.until(first), world.echo[:, : first + 1], config).model
    return PredictionEvaluator(world.series, world.echo).evaluate(model, world.origins, HORIZON)


def households() -> dict:
    """Real households: settings chosen by weeks before the first origin that judges, then judged once; beside those that are the default."""
    from worlds import HORIZON, ORIGINS
    from worlds import households as real

    from fincoach.forecast.spending import SpendingConfig

    world, config = real(), SpendingConfig()
    first = int(world.origins[0])
    origins = np.arange(first - ORIGINS, first - HORIZON + 1)  # their four weeks end with the first origin that judges
    cut = int(origins[0])
    active = np.flatnonzero((world.series.total[:, 1 : cut + 1] > 0).mean(1) >= 0.5)  # by the weeks before those that choose
    y = np.stack([world.series.total[active, w + 1 : w + 1 + HORIZON] for w in origins], 1)
    tried, kept = {}, {}
    for name, change in CHANGES.items():
        net, trees, net_month, trees_month = (a[active] for a in _votes(world, origins, config, change, cut, kept))
        error = lambda y, *said: float(np.abs(y - np.mean(said, axis=0)).sum() / np.abs(y).sum())  # noqa: E731
        tried[name] = {"next week": error(y[..., 0], net[..., 0], trees[..., 0]), "four weeks": error(y.sum(-1), net_month, trees_month)}
        print(name, tried[name], flush=True)
    best = min(tried, key=lambda k: sum(tried[k].values()))
    found = {"people": len(world.series), "weeks": len(world.series.mondays), "chosen_by": {"origins": [cut, int(origins[-1])], "households": len(active)}, "tried": tried, "chosen": best, "judged": {}}
    for name in dict.fromkeys((best, "as they are")):
        found["judged"][name] = _compared(_judged(world, _changed(config, CHANGES[name])), world)
    return found


def _compared(test, world) -> dict:
    """What is served beside its rivals, by group of households, and how ranges hold."""
    from fincoach.evaluate.forecasts import paired_difference, wape

    rows = {}
    for group, people in {"everybody": np.arange(len(world.series)), **world.groups}.items():
        y, month, f = test.y[people], test.month[people], {k: v for k, v in test.models.items() if k in ("FinCoach", "LSTM", "boosting", "12-week mean", "TSB")}
        part = {"people": len(people), "next week": {k: vars(wape(y[..., 0], v.point[people][..., 0])) for k, v in f.items()}}
        for rival in ("boosting", "12-week mean", "TSB"):
            week = paired_difference(y[..., 0], f["FinCoach"].point[people][..., 0], f[rival].point[people][..., 0])
            four = paired_difference(month, f["FinCoach"].month[people][..., 2], f[rival].month[people][..., 2])
            part[f"to {rival}"] = {"next week": [week.value, week.low, week.high], "four weeks": [four.value, four.low, four.high]}
        rows[group] = part
    return rows | {"coverage": _held(test, world)}


def _held(test, world) -> list[dict]:
    """Coverage by activity at the origin, with offsets that stand still."""
    from fincoach.evaluate.forecasts import ENDS, coverage_parts, score
    from fincoach.serving.forecast import activity

    names = np.stack([activity(world.series.total[:, : w + 1], world.series.begins) for w in world.origins], 1)
    rows, f = [], test.models["FinCoach"]
    for group in sorted(set(names.ravel().tolist())):
        for what, y, q in (("weeks", test.y, f.quantiles), ("four weeks together", test.month, f.month)):
            inside = names == group if y.ndim == 2 else (names == group)[..., None]
            for level, (low, high) in ENDS.items():
                s = score(*coverage_parts(np.where(inside, y, np.nan), q[..., low], q[..., high]))
                rows.append({"group": group, "what": what, "level": level, "value": s.value, "low": s.low, "high": s.high, "people": s.people})
    return rows


def show(results: dict) -> None:
    """Print the results."""
    if found := results.get("population"):
        print(f"\n{found['people']:,} made-up people, {found['days']} days; share of outcomes within ranges, farthest group first")
        for name, rows in found["coverage"].items():
            print(f"  offsets {name}")
            for r in sorted(rows, key=lambda r: -abs(r["value"] - r["level"] / 100)):
                print(f"    {r['level']} % {r['by']:9} {r['group']:22} {r['what']:20} {r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f})  {r['people']:,} people")
        for r in found["chances"]:
            if r["cases"]:
                print(f"  more than usual by {r['more']:.0%}, {r['way']:20} from {r['from']:.1f}: said {r['said']:.3f}, came {r['came']:.3f} ({r['low']:.3f} to {r['high']:.3f}), {r['cases']:,} cases")
    for found in results.get("seeds", ()):
        print(f"\nseed {found['seed']}, {found['people']:,} people: everybody, and the group with 50 people that is farthest off")
        for name, rows in found["coverage"].items():
            for what in ("weeks", "four weeks together"):
                for level in (80, 95):
                    worst, every = farthest(rows, what, level), next(r for r in rows if r["by"] == "all" and r["what"] == what and r["level"] == level)
                    print(f"  {name:20} {what:20} {level} %: {every['value']:.1%}; {worst['value']:.1%} ({worst['low']:.1%} to {worst['high']:.1%}) {worst['group']}, {worst['people']:,} people")
    if found := results.get("households"):
        print(f"\n{found['people']:,} households; chosen on origins {found['chosen_by']['origins']}: {found['chosen']}")
        for name, errors in found["tried"].items():
            print(f"  {name:22} next week {errors['next week']:.4f}, four weeks {errors['four weeks']:.4f}")
        for name, rows in found["judged"].items():
            print(f"  judged: {name}")
            for group, part in rows.items():
                if group != "coverage":
                    told = "; ".join(f"{k} next week {v['next week'][0]:+.1%} ({v['next week'][1]:+.1%} to {v['next week'][2]:+.1%}), four weeks {v['four weeks'][0]:+.1%} ({v['four weeks'][1]:+.1%} to {v['four weeks'][2]:+.1%})"
                                     for k, v in part.items() if k.startswith("to "))  # fmt: skip
                    print(f"    {group} ({part['people']:,}): WAPE {part['next week']['FinCoach']['value']:.4f}; {told}")
            for r in rows["coverage"]:
                print(f"    {r['level']} % {r['group']:8} {r['what']:20} {r['value']:.3f} ({r['low']:.3f} to {r['high']:.3f})  {r['people']:,}")


PARTS = ("population", "seeds", "households")
JUDGES = ((21, 1000), (22, 1000), (23, 1000), (24, 1000), (11, 1000), (7, 2000), (25, 2000), (26, 2000))  # seeds that nothing was chosen on, and people; seed 7 is the default population


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--people", type=int, default=2000)
    parser.add_argument("--days", type=int, default=730)
    parser.add_argument("--seed", type=int, default=11, help="of the population; the one that the ways of making ranges were chosen on is 7")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    if "population" in given.only:
        results["population"] = population(given.people, given.days, given.seed)
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    if "seeds" in given.only:
        results["seeds"] = []
        for seed, people in JUDGES:
            results["seeds"].append(held(people, given.days, seed))
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    if "households" in given.only:
        results["households"] = households()
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
