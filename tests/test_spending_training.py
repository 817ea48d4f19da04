"""Training the forecast of spending: nothing later leaks in, every gate can fail, what is published is what was judged."""

from dataclasses import replace
from datetime import UTC, datetime, time, timedelta

import numpy as np
import polars as pl
import pytest

from fincoach.data.export import write_snapshot
from fincoach.data.population import generate
from fincoach.evaluate.forecasts import Forecasts
from fincoach.evaluate.lineage import NotEnoughData
from fincoach.evaluate.report import REQUIRED
from fincoach.features.ledger import Ledgers
from fincoach.forecast import training
from fincoach.forecast.dossier import BOOSTING, CHAMPION, MEAN, SERVED, gates, judge
from fincoach.forecast.spending import SpendingConfig
from fincoach.forecast.training import (
    MORE,
    Recipe,
    _best_constant,
    _why,
    by_group,
    champion_model,
    come_true,
    coverage,
    examine,
    finish,
    fit,
    forecast_audit,
    judged,
    kinds,
    placed_at,
    reach,
    served_gap,
    take_data,
    three_people,
    versus,
)
from fincoach.serving.artifacts import champion as champion_version
from fincoach.serving.artifacts import open_version, promote, publish
from fincoach.serving.forecast import HORIZON, MONTH, combined
from fincoach.serving.inference import Cluster, FeatureScaling, SegmentationParameters
from fincoach.serving.offsets import AND, AS_SAID

FILES = {
    "spending.json", "spending_lstm.onnx", "spending_lstm.pth", "spending_trees.npz", "spending_predictor.pkl", "feature_engineering_pipeline.pkl", "feature_config.json",
    "segmentation.json", "model_configs/spending.json", "model_metadata.json", "validation_reports/spending.html", "validation_reports/spending.json",
}
QUICK = SpendingConfig(steps=12, rounds=12, seed=3)


@pytest.fixture(scope="module")
def population():
    return generate(people=90, days=360, seed=6)


@pytest.fixture(scope="module")
def snapshot(population, tmp_path_factory):
    return write_snapshot(population.frames, tmp_path_factory.mktemp("snapshot"))


@pytest.fixture(scope="module")
def recipe(population):
    return Recipe(Ledgers.from_frames(population.frames).last_day, 3, "made-halves")


@pytest.fixture(scope="module")
def halves(recipe):
    """Two segments: who spends less than 400 a week, and more."""
    scaling = (FeatureScaling("spending_weekly", "log", 6.0, 6.0, 1.0, 9.0),)
    return SegmentationParameters("made-halves", recipe.as_of, scaling, (Cluster(0, "Spends less", 0.5, 1.0, (-1.0,)), Cluster(1, "Spends more", 0.5, 1.0, (1.0,))), 1.0, 0.1)


@pytest.fixture(scope="module")
def data(snapshot, recipe, halves):
    return take_data(snapshot, recipe, halves)


@pytest.fixture(scope="module")
def fitted(data, recipe):
    return fit(data, recipe, f"{recipe.as_of}-0123456789", config=QUICK)


@pytest.fixture(scope="module")
def evidence(snapshot, data, fitted, recipe, population):
    return examine(snapshot, data, fitted, recipe, population.truth)


def gate(e, name):
    return next(g for g in gates(e) if g.name.startswith(name))


def test_time_is_cut_in_three_that_do_not_overlap(data):
    weeks = len(data.series.mondays)
    assert data.choose[-1] + 1 == data.test[0]
    assert (np.diff(data.choose) == 1).all()
    assert (np.diff(data.test) == 1).all()
    assert data.test[-1] + MONTH == weeks - 1


def test_too_little_is_said_in_a_sentence(snapshot, recipe):
    with pytest.raises(NotEnoughData, match=r"whole weeks up to .* needs 40 weeks of 50"):
        take_data(snapshot, replace(recipe, as_of=recipe.as_of - timedelta(days=120)))
    with pytest.raises(NotEnoughData, match="of 5,000"):
        take_data(snapshot, replace(recipe, min_people=5000))


def test_segments_are_those_known_at_each_origin(snapshot, data, recipe, halves):
    """Cut off after an origin, the data put everybody in the same segment there as the whole data do; and people move between origins."""
    asked = [*data.choose.tolist(), *data.test.tolist(), len(data.series.mondays) - 1]
    assert (data.placed[:, np.setdiff1d(np.arange(len(data.series.mondays)), asked)] == -1).all()
    assert (data.placed[:, data.test[0]] != data.placed[:, data.test[-1]]).any()
    w = int(data.test[3])
    rows = snapshot.scan("transactions").filter(pl.col("occurred_at") < datetime.combine(data.day(w) + timedelta(days=1), time(0), UTC)).collect()
    early = Ledgers.from_frames({"users": snapshot.frame("users"), "categories": snapshot.frame("categories"), "transactions": rows})
    alone = placed_at(early, data.series.until(w), [w], halves)
    assert (alone[:, w] == data.placed[:, w]).mean() > 0.99  # rows are cut by the clock in Greenwich, weeks by each person's own
    assert set(kinds(data, data.test)) == {"activity", "segment"}
    assert kinds(data, data.test)["segment"].shape == (90, 12)


def test_ranges_go_by_activity_and_segment_and_the_segmentation_goes_with_them(evidence, fitted):
    p = fitted.final.model.parameters
    assert (p.grouped_by, p.segmentation) == ("both", "made-halves")
    assert {"varied", "segment 0", "segment 1"} <= set(p.weekly.groups)
    assert {f"varied{AND}segment 0", f"varied{AND}segment 1"} <= set(p.monthly.groups)
    assert {"activity", "segment", "history"} <= set(evidence.coverage["by"])
    assert {"Spends less", "Spends more"} <= set(evidence.ranges.columns)
    assert set(evidence.ranges["what"]) == {"weeks", "four weeks together"}


def test_what_is_judged_had_learned_from_no_week_that_judges(data, fitted):
    cut = fitted.judged.parameters.as_of
    assert cut == data.day(data.test[0])
    assert fitted.final.model.parameters.as_of == data.day(len(data.series.mondays) - 1)
    changed = replace(data.series, total=data.series.total.copy(), y=data.series.y.copy())
    changed.total[:, data.test[0] + 1 :] *= 7
    changed.y[:, data.test[0] + 1 :] *= 7
    again = fit(replace(data, series=changed), Recipe(fitted.final.model.parameters.as_of, 3), fitted.version, config=QUICK)
    assert again.judged.parameters.to_json() == fitted.judged.parameters.to_json()
    last = data.test[-1]
    one, other = (f.judged.forecast(data.series.until(last), data.echo[:, last]) for f in (fitted, again))
    assert np.array_equal(one.quantiles, other.quantiles, equal_nan=True)
    assert again.final.model.parameters.to_json() != fitted.final.model.parameters.to_json()


class Wider:
    """The opinions of a model with ranges of twice the width: a network that chance has made wide."""

    def __init__(self, model):
        self.model = model

    def opinions(self, series, echo):
        o = self.model.opinions(series, echo)
        return o._replace(**{k: getattr(o, k)[..., 2:3] + 2 * (getattr(o, k) - getattr(o, k)[..., 2:3]) for k in ("weekly", "month")})


def test_ranges_found_for_one_network_hold_for_the_next(data, fitted):
    """The network that is judged learned anew and is wider or narrower than the one that ranges were found for: they are handed on, and hold for a network of twice the width as for the one itself."""
    first, wide, cut = fitted.first, Wider(fitted.judged), data.choose[0]
    found = training.chosen(data, first, data.choose, data.test[0], "found", fitted.config)
    handed = [training._handed_on(found, data, first, model, cut) for model in (fitted.judged, wide)]
    assert np.array_equal(handed[0].weekly.values, fitted.judged.parameters.weekly.values)
    assert np.array_equal(handed[0].monthly.values, fitted.judged.parameters.monthly.values)
    assert np.array_equal(training._handed_on(found, data, first, first, cut).monthly.values, found.monthly.values)

    def held(p, model):
        inside = []
        for w in data.test[:4]:
            s = data.series.until(w)
            f = combined(p, model.opinions(s, data.echo[:, w]), s, data.placed[:, w])
            y = data.series.total[:, w + 1 : w + 1 + MONTH]
            inside += [((y >= f.quantiles[:, :MONTH, 1]) & (y <= f.quantiles[:, :MONTH, 3]))[f.made_by == "model"].mean()]
        return np.mean(inside)

    assert abs(held(handed[1], wide) - held(handed[0], fitted.judged)) < 0.03
    assert abs(held(found, wide) - held(handed[0], fitted.judged)) > 0.06


def test_audit_from_rows_finds_no_leak_and_would_find_one(snapshot, data, recipe, evidence, monkeypatch):
    assert evidence.audit.changed == 0
    assert evidence.audit.control_changed > 1000
    honest = training.echo

    def peeking(source, mondays, horizon=12):
        found = honest(source, mondays, horizon)
        last = int(mondays[-1])
        found[:, -1, 0] += np.array([(source.day[a:b] > last + 20).sum() for a, b in zip(source.offsets[:-1], source.offsets[1:], strict=True)])
        return found

    monkeypatch.setattr(training, "echo", peeking)
    leaked = forecast_audit(snapshot, data, recipe, at_most=12)
    assert leaked.inputs_changed > 0
    assert leaked.forecasts_changed > 0
    assert gate(replace(evidence, audit=leaked), "Leaks").passed is False


def test_audit_that_could_see_nothing_does_not_pass(evidence):
    blind = replace(evidence.audit, control_changed=0)
    assert gate(replace(evidence, audit=blind), "Leaks").passed is False


def test_all_rivals_stand_on_the_same_weeks(evidence):
    test = evidence.test
    assert {SERVED, "LSTM", BOOSTING, MEAN, "naive", "seasonal naive", "TSB", "plain rule", "week of month"} <= set(test.models)
    assert test.y.shape == (90, 12, HORIZON)
    known = np.isfinite(test.y).any(0)
    assert known[0].all()
    assert known[-1].tolist() == [True] * MONTH + [False] * (HORIZON - MONTH)
    for f in test.models.values():
        assert np.isfinite(f.point[np.isfinite(test.y)]).all()
    assert set(evidence.scores["level"]) >= {"user-week", "user-month", "segment", "portfolio", "portfolio of 50"}
    assert (evidence.scores.filter(pl.col("metric") == "WAPE")["low"] <= evidence.scores.filter(pl.col("metric") == "WAPE")["value"] + 1e-9).mean() > 0.95


def test_nobody_beats_the_floor(evidence):
    assert evidence.floor.week.value < evidence.floor.served_week.value
    assert evidence.floor.month.value < evidence.floor.served_month.value
    assert evidence.floor.over.low > 0


def perfect(e, name=SERVED, noise=0.0):
    """The evidence with forecasts of one model that know what came."""
    y = np.nan_to_num(e.test.y) + noise
    q = y[..., None] + np.array([-2.0, -1, 0, 1, 2])
    month = np.nan_to_num(e.test.month)[..., None] + noise + np.array([-2.0, -1, 0, 1, 2])
    test = replace(e.test, models=e.test.models | {name: Forecasts(name, y, q, month)})
    return replace(e, test=test, versus=versus(test), coverage=coverage(test, SERVED, {"activity": np.full(test.y.shape[:2], "steady")}), curve=reach(test)[0])


def test_gates_pass_and_fail_by_what_was_forecast(evidence):
    good, bad = perfect(evidence), perfect(evidence, noise=1e5)
    for name in ("Next week, to the 12-week mean", "Next week, no worse", "Four weeks", "Sums over 50", "The network"):
        assert gate(good, name).passed is True
    for name in ("Next week, to the 12-week mean", "Next week, no worse", "Sums over 50", "The network"):
        assert gate(bad, name).passed is False
    assert gate(good, "Ranges of 80").passed is False  # they hold everything: too wide is wrong as well
    assert judge(bad).decision == "hold"


def test_a_copy_of_boosting_has_not_earned_its_place(evidence):
    f = evidence.test.models[BOOSTING]
    test = replace(evidence.test, models=evidence.test.models | {SERVED: f})
    e = replace(evidence, versus=versus(test))
    assert gate(e, "Next week, no worse").passed is True
    assert gate(e, "The network").passed is False
    assert gate(e, "The network").blocking is False


@pytest.mark.parametrize(("field", "value", "name"), [("exact", 0.01, "Served files"), ("adds_up", 0.5, "Categories"), ("parent", "2025-01-05-0123456789", "To the champion")])
def test_files_and_champion_are_gates(evidence, field, value, name):
    assert gate(replace(evidence, **{field: value}), name).passed is not True
    assert judge(replace(evidence, **{field: value})).decision == "hold"


def test_a_better_champion_holds_a_version_back(evidence):
    e = perfect(evidence, CHAMPION, noise=0.01)
    e = replace(e, parent="2025-01-05-0123456789", champion="2025-01-05-0123456789", champion_as_of=evidence.data.day(0))
    assert gate(e, "To the champion").passed is False
    even = replace(evidence.test, models=evidence.test.models | {CHAMPION: evidence.test.models[SERVED]})
    assert gate(replace(e, versus=versus(even)), "To the champion").passed is True


@pytest.fixture(scope="module")
def in_service(snapshot, recipe, halves, tmp_path_factory):
    """A version learned eight weeks earlier, published and promoted: the champion as it is opened."""
    folder, day = tmp_path_factory.mktemp("artifacts"), recipe.as_of - timedelta(days=56)
    older = replace(recipe, as_of=day)
    trained = fit(take_data(snapshot, older, halves), older, f"{day}-0123456789", config=SpendingConfig(steps=30, rounds=30, seed=5)).final
    publish(folder, "spending", f"{day}-0123456789", trained.to_files() | {"segmentation.json": halves.to_json().encode()}, {})
    promote(folder, "spending", f"{day}-0123456789")
    return open_version(folder, "spending", champion_version(folder, "spending"))


def test_a_new_version_is_measured_against_the_one_in_service_as_it_serves(evidence, data, fitted, snapshot, recipe, in_service):
    """Two versions that were really learned. The newer is judged by the older one's own answers; one that has learned nothing is held back by it."""
    champion = champion_model(in_service)
    test, _ = judged(data, fitted, champion)
    w = int(data.test[4])
    said = champion.forecast(data.series.until(w), data.echo[:, w], data.placed[:, w])
    there = np.isfinite(test.y[:, 4, 0])
    assert np.allclose(test.models[CHAMPION].point[there, 4], said.point[there])
    assert np.allclose(test.models[CHAMPION].quantiles[there, 4], said.quantiles[there])
    known = {"parent": in_service.version, "champion": champion.parameters.version, "champion_as_of": champion.parameters.as_of}
    e = replace(evidence, test=test, versus=versus(test), **known)
    row = e.against(CHAMPION, "next week")
    assert row["low"] < row["value"] < row["high"]
    assert gate(e, "To the champion").interval == (row["low"], row["high"])
    assert gate(e, "To the champion").passed == (row["high"] <= 0.01)
    assert "had seen some of these weeks" not in gate(e, "To the champion").meaning or champion.parameters.as_of > data.day(data.test[0])
    untaught = fit(data, recipe, f"{recipe.as_of}-ffffffffff", config=SpendingConfig(steps=1, rounds=1, seed=3))
    poor, _ = judged(data, untaught, champion)
    worse = replace(evidence, test=poor, versus=versus(poor), **known)
    assert worse.against(CHAMPION, "next week")["value"] > 0.01
    assert gate(worse, "To the champion").passed is False
    assert judge(worse).decision == "hold"


def test_chances_are_told_as_they_came_true(evidence, data, fitted):
    """Every outcome is counted once for each way, shares lie between their ends, and a forecast that knows what comes is found out."""
    rows = evidence.chances.filter(pl.col("cases") > 0)
    each = rows.group_by("more", "way").agg(pl.col("cases").sum())
    assert set(rows["more"]) == set(MORE)
    assert each.group_by("more").agg(pl.col("cases").n_unique() == 1)["cases"].all()
    assert ((rows["low"] <= rows["came"]) & (rows["came"] <= rows["high"])).all()
    assert fitted.judged.parameters.chances != AS_SAID
    assert fitted.final.model.parameters.chances != fitted.judged.parameters.chances
    knows = come_true(perfect(evidence).test, data, AS_SAID)
    sure = knows.filter((pl.col("from") == 0.7) & (pl.col("cases") > 0))
    assert (sure["came"] == 1).all()


def test_files_say_what_was_trained_and_the_version_opens_as_champion(evidence, data, fitted, snapshot, recipe, tmp_path):
    trained = finish(evidence)
    assert set(trained.files) == FILES
    assert {s.id for s in trained.report.sections} == set(REQUIRED)
    assert evidence.exact < 1e-5
    assert evidence.adds_up < 1e-9
    artifact = open_version(tmp_path, "spending", trained.publish(tmp_path))
    model = champion_model(artifact)
    last = len(data.series.mondays) - 1
    one, other = (m.forecast(data.series, data.echo[:, last]) for m in (model, fitted.final.model))
    assert np.array_equal(one.quantiles, other.quantiles, equal_nan=True)
    assert artifact.manifest["people"] == 90
    assert any("12-week mean" in line for line in artifact.manifest["learned"])
    (artifact.path / "spending_lstm.onnx").write_bytes(b"cut off")
    assert champion_model(artifact) is None


def test_files_that_are_another_models_are_noticed(data, fitted):
    files = fitted.final.to_files()
    assert served_gap(data, fitted, files)[0] < 1e-5
    assert served_gap(data, fitted, files | {"spending_trees.npz": fitted.first.trees.to_npz()})[0] > 1e-3


def test_best_constant_is_the_best():
    rng = np.random.default_rng(0)
    y = rng.gamma(2, 50, (20, 12))
    found = _best_constant(y)
    for c in np.quantile(y, np.linspace(0.01, 0.99, 50)):
        assert (np.abs(y - c) / y).mean(1).min() >= found.min() - 1e-12
        assert (((np.abs(y - c) / y).mean(1)) >= found - 1e-12).all()


def test_coverage_counts_what_lies_within(evidence):
    e = perfect(evidence)
    everybody = e.coverage.filter((pl.col("by") == "all") & (pl.col("level") == 80))
    assert (everybody["value"] == 1).all()
    test = e.test
    shift = replace(test.models[SERVED], quantiles=test.models[SERVED].quantiles + 1.5)  # beyond the ends of 80 %, within those of 95 %
    held = coverage(replace(test, models=test.models | {SERVED: shift}), SERVED, {}).filter((pl.col("by") == "all") & (pl.col("what") == "weeks"))
    assert dict(held.select("level", "value").iter_rows()) == {80: 0.0, 95: 1.0}


def test_groups_are_told_and_small_ones_left_out(evidence):
    names = np.where(np.arange(90) < 10, "few", "many")
    found = by_group(evidence.test, {"made": names})
    assert found["group"].to_list() == ["many"]
    assert found["people"][0] <= 80


def test_three_people_go_from_good_to_bad_and_why_is_said(evidence, data):
    seen = three_people(evidence.test, data)
    assert [s.error for s in seen] == sorted(s.error for s in seen)
    assert all(s.why for s in seen)
    assert "3.0 times as much" in _why(np.full(26, 100.0), np.full(12, 300.0), np.full(12, 100.0))
    assert "one week makes up" in _why(np.full(26, 100.0), np.where(np.arange(12) == 3, 500.0, 100.0), np.full(12, 100.0))
