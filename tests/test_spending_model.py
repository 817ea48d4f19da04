"""The spending model across rooms: what is served is what was trained, online as in batch, and no file can make it do anything else."""

import io
import weakref
import zipfile
from dataclasses import replace
from datetime import date, timedelta

import numpy as np
import onnx
import polars as pl
import pytest
import torch

from fincoach.data.population import generate
from fincoach.evaluate.forecasts import leaks
from fincoach.features.ledger import Ledgers
from fincoach.features.recurring import detect_spending_cycles
from fincoach.features.series import WeeklySeries, person_series, weekly_series
from fincoach.forecast import spending
from fincoach.forecast.spending import (
    ForecastGenerator,
    PredictionEvaluator,
    SequenceDataLoader,
    SpendingConfig,
    SpendingPredictor,
    as_rivals,
    cases_of,
    train_network,
)
from fincoach.serving.forecast import (
    HORIZON,
    MONTH,
    TREES,
    ParametersError,
    SequenceNetwork,
    SpendingModel,
    SpendingParameters,
    activity,
    own_errors,
    rules_forecast,
)
from fincoach.serving.inputs import HISTORY, Known, known_ahead, look, person_known, window
from fincoach.serving.network import NetworkError
from fincoach.serving.trees import Trees, TreesError

torch.set_num_threads(1)
PEOPLE, DAYS = 90, 480
QUICK = SpendingConfig(epochs=25, rounds=40, seed=3)


class Made:
    """A population, and a model that knows all but its last eight weeks."""

    def __init__(self):
        self.frames = generate(PEOPLE, DAYS, seed=11).frames
        self.ledgers = Ledgers.of(self.frames)
        self.as_of = self.ledgers.last_day
        self.series = weekly_series(self.ledgers, self.as_of)
        self.echoes = known_ahead(self.frames, self.series)
        self.cut = len(self.series.mondays) - 9
        self.predictor = SpendingPredictor.fit(self.series.until(self.cut), self.echoes[:, : self.cut + 1], QUICK)
        self.files = self.predictor.to_files()
        self.model = SpendingModel.open(self.files.__getitem__)


@pytest.fixture(scope="module")
def made():
    return Made()


def close(a, b, tolerance=1e-5):
    """Whether forecasts agree within `tolerance` of their size."""
    return all(np.allclose(getattr(a, k), getattr(b, k), rtol=tolerance, atol=tolerance * 10, equal_nan=True) for k in ("point", "quantiles", "month", "by_category", "mean"))


def test_the_graph_says_what_the_network_says_of_real_people(made):
    told = look(window(made.series), made.echoes[:, -1])
    with torch.inference_mode():
        week, month = made.predictor.parts.net(torch.from_numpy(told.weeks), torch.from_numpy(told.ahead)[:, None], torch.tensor([HISTORY - 1]))
    served_week, served_month = made.model.network(told.weeks, told.ahead)
    assert np.abs(served_week - week[:, 0].numpy()).max() < 1e-4
    assert np.abs(served_month - month[:, 0].numpy()).max() < 1e-4


def test_the_walk_says_what_the_library_says_missing_numbers_included(made):
    cases = cases_of(made.series, made.echoes)
    rng = np.random.default_rng(0)
    for name, X in zip(TREES, cases[:3], strict=True):
        X = X[rng.choice(len(X), 500)] * rng.choice([0.5, 1.0, 1.5], (500, 1))
        X[rng.random(X.shape) < 0.1] = np.nan
        assert np.abs(made.model.trees(name, X) - made.predictor.parts.boosted[name].predict(X)).max() < 1e-9


def test_it_beats_the_mean_of_twelve_weeks_on_weeks_it_never_saw(made):
    test = PredictionEvaluator(made.series, made.echoes).evaluate(made.model, range(made.cut, made.cut + 5), MONTH, ("12-week mean",))
    assert test.compare("FinCoach", "12-week mean").high < -0.1
    assert test.compare("FinCoach", "12-week mean", month=True).high < 0


def test_weeks_within_its_training_are_no_test(made):
    with pytest.raises(ValueError, match="has seen the weeks up to"):
        PredictionEvaluator(made.series, made.echoes).evaluate(made.model, [made.cut - 1, made.cut], MONTH)


def test_later_weeks_have_no_influence(made):
    assert not leaks(lambda series: as_rivals(made.model, made.echoes)["FinCoach"], made.series, made.cut)


def test_later_rows_have_no_influence_on_what_is_learned_or_said(made):
    last = date.fromordinal(int(made.series.mondays[made.cut]) + 6 + 719_163)
    later = pl.col("occurred_at").dt.date() > last + timedelta(1)
    rows = made.frames["transactions"].with_columns(pl.when(later).then(pl.col("amount_minor") * 7).otherwise("amount_minor").alias("amount_minor"))
    changed = made.frames | {"transactions": rows.filter(~later | (pl.col("id") % 3 > 0))}
    series = weekly_series(Ledgers.of(changed), made.as_of, len(made.series.mondays), made.series.categories)
    known = known_ahead(changed, series)
    for a, b in ((known.echo, made.echoes.echo), (known.dues, made.echoes.dues)):
        assert np.array_equal(a[:, : made.cut + 1], b[:, : made.cut + 1], equal_nan=True)
        assert not np.array_equal(a, b, equal_nan=True)
    want = made.model.forecast(made.series.until(made.cut), made.echoes[:, made.cut])
    assert close(made.model.forecast(series.until(made.cut), known[:, made.cut]), want, 0)


def test_what_is_known_to_fall_due_helps_and_a_source_without_streams_still_has_an_answer(made):
    origins = range(made.cut, made.cut + 8)
    y = np.stack([made.series.total[:, t + 1] for t in origins], 1)

    def error(known):
        said = np.stack([made.model.forecast(made.series.until(t), known[:, t]).point[:, 0] for t in origins], 1)
        return np.nansum(np.abs(said - y)) / np.abs(y).sum()

    with_dues, without = error(made.echoes), error(made.echoes.echo)
    assert with_dues < 0.97 * without
    mean = np.stack([made.series.total[:, max(t - 11, 0) : t + 1].mean(1) for t in origins], 1)
    assert without < 0.95 * np.abs(mean - y).sum() / np.abs(y).sum()


def test_rent_is_not_forecast_in_a_week_in_which_it_is_not_due(made):
    rent = made.series.categories.tolist().index(5)
    known = made.echoes[:, made.cut]
    due, came = known.parts[:, :MONTH, rent], made.series.y[:, made.cut + 1 : made.cut + 1 + MONTH, rent]
    payers = (due > 0).any(1) & (made.series.y[:, made.cut - 12 : made.cut, rent] > 0).any(1)
    said = made.model.forecast(made.series.until(made.cut), known).by_category[:, :MONTH, rent]
    assert payers.sum() >= 10
    quiet = payers[:, None] & (due == 0) & (came == 0)
    assert said[quiet].mean() < 0.1 * came[payers].max(1).mean()
    assert said[payers[:, None] & (due > 0) & (came > 0)].mean() > 0.5 * came[payers[:, None] & (due > 0) & (came > 0)].mean()


def test_one_person_online_as_in_batch(made):
    batch = made.model.forecast(weekly_series(made.ledgers, made.as_of, HISTORY, made.model.categories), made.echoes)
    streams = detect_spending_cycles(made.frames, date.fromordinal(int(made.series.mondays[-1]) + 6 + 719_163))
    for i in (0, 17, 60):
        person = made.ledgers.person(i)
        alone = person_series(person, made.as_of, HISTORY, made.model.categories, int(made.series.user_ids[i]))
        assert close(made.model.forecast(alone, person_known(person, alone, streams)), batch.take([i]))


def test_who_is_asked_about_beside_whom_does_not_matter(made):
    order = np.random.default_rng(1).permutation(PEOPLE)
    want = made.model.forecast(made.series, made.echoes).take(order)
    assert close(made.model.forecast(made.series.take(order), made.echoes[order]), want)


def test_blocks_say_what_one_call_says(made):
    parts = list(ForecastGenerator(made.model, block=40).generate(made.frames, made.as_of))
    assert [len(p) for p in parts] == [40, 40, 10]
    whole = made.model.forecast(weekly_series(made.ledgers, made.as_of, HISTORY, made.model.categories), made.echoes)
    assert close(parts[1], whole.take(slice(40, 80)))


@pytest.mark.parametrize("factor", [0.01, 3.0, 1e6])
def test_another_unit_of_money_changes_nothing_else(made, factor):
    s = made.series
    other = WeeklySeries(s.user_ids, s.mondays, factor * s.y, s.begins, s.categories, factor * s.total)
    known = Known(*(factor * a for a in (made.echoes.echo, made.echoes.dues, made.echoes.parts)))
    said, want = made.model.forecast(other, known), made.model.forecast(s, made.echoes)
    assert np.allclose(said.quantiles / factor, want.quantiles, rtol=1e-4, atol=0.01)
    assert (said.group == want.group).all()


def test_what_is_said_holds_together(made):
    f = made.model.forecast(made.series, made.echoes)
    assert set(f.made_by) <= {"model", "cold start", "unknown"}
    known = f.made_by != "unknown"
    assert np.allclose(f.by_category[known].sum(2), f.point[known])
    assert (f.by_category[known & (f.point >= 0).all(1)] >= 0).all()
    assert np.array_equal(f.point, f.quantiles[..., 2], equal_nan=True)
    assert abs(np.nansum(f.mean) / made.series.total[:, -12:].mean(1)[known].sum() / HORIZON - 1) < 0.25  # expected amounts add up to what is usual


def odd_people() -> tuple[WeeklySeries, list]:
    """People at the edges: how many weeks, of what."""
    rng, w = np.random.default_rng(2), 60
    usual = rng.gamma(4, 30, w)
    rows = {"never spent": np.zeros(w), "only refunds": -usual, "silent for 30 weeks": np.where(np.arange(w) < 30, usual, 0), "huge": usual * 1e12, "tiny": usual * 1e-6, "one week of all": np.where(np.arange(w) == 40, 5e4, 0)}
    lengths = {"no week": 0, "one week": 1, "two weeks": 2, "three weeks": 3, "seven weeks": 7, "a year": 60}
    y = np.stack([*rows.values(), *[usual] * len(lengths)])[..., None]
    begins = np.array([0] * len(rows) + [w - k for k in lengths.values()])
    mondays = (20276 - 7 * np.arange(w, 0, -1)).astype(np.int32)
    return WeeklySeries(np.arange(len(y)), mondays, y * (np.arange(w) >= begins[:, None])[..., None], begins, np.array([8])), [*rows, *lengths]


@pytest.mark.parametrize("by", ["model", "rules"])
def test_people_at_the_edges_have_an_answer_or_are_unknown(made, by):
    series, names = odd_people()
    f = made.model.forecast(series, np.full((len(names), HORIZON), np.nan)) if by == "model" else rules_forecast(series)
    unknown = dict(zip(names, (f.made_by == "unknown").tolist(), strict=True))
    assert [n for n in names if unknown[n]] == ["no week", "one week", "two weeks"]
    known = f.made_by != "unknown"
    for array in (f.point, f.quantiles, f.month, f.mean, f.by_category):
        assert np.isfinite(array[known]).all()
        assert np.isnan(array[~known]).all()
    at = names.index("never spent")
    assert np.abs(f.quantiles[at]).max() == 0
    assert (f.quantiles[names.index("tiny")] >= 0).all()  # nothing below the person's lowest week
    for i in range(len(names)):
        assert f.person(i).to_html()


def test_rules_ranges_hold_as_often_as_they_say(made):
    held = []
    for week in range(made.cut, made.cut + 8):
        f = rules_forecast(made.series.until(week))
        y, q = made.series.total[:, week + 1], f.quantiles[:, 0]
        known = f.made_by == "rules"
        held.append([((y >= q[:, a]) & (y <= q[:, 4 - a]))[known].mean() for a in (1, 0)])
    inner, outer = np.mean(held, 0)
    assert 0.76 < inner < 0.93
    assert 0.92 < outer < 0.995


def test_groups_and_errors_by_hand():
    y = np.array([[100.0] * 20, [0.0, 90.0] * 10, [10.0, 400.0] * 10])
    assert activity(y, np.zeros(3, int)).tolist() == ["steady", "rare", "varied"]
    assert np.allclose(own_errors(y[:1], np.zeros(1, int), 1), 0)
    wide = own_errors(y[1:2], np.zeros(1, int), 1)[0]
    assert wide[0] < -45 < 45 < wide[4]


# Files that need not be trusted


def opened(made, **changed) -> SpendingModel:
    return SpendingModel.open((made.files | {k.replace("__", "."): v for k, v in changed.items()}).__getitem__)


def refusals():
    return (ParametersError, NetworkError, TreesError)


def test_no_flipped_byte_is_anything_but_a_refusal_or_a_model(made):
    rng = np.random.default_rng(5)
    refused = 0
    for name in ("spending.json", "spending_lstm.onnx", "spending_trees.npz"):
        for _ in range(25):
            data = bytearray(made.files[name])
            at = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 2000)))
            data[at] ^= 1 << int(rng.integers(8))
            try:
                model = opened(made, **{name.replace(".", "__"): bytes(data)})
                model.forecast(made.series.take(slice(0, 3)), made.echoes[:3])
            except refusals():
                refused += 1
            except ValueError as e:  # a number so large that quantiles no longer hold together
                assert "quantiles cross" in str(e)  # noqa: PT017
    assert refused > 20


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("name", ["spending.json", "spending_lstm.onnx", "spending_trees.npz"])
def test_a_file_cut_short_is_refused(made, name, cut):
    with pytest.raises(refusals()):
        opened(made, **{name.replace(".", "__"): made.files[name][: int(cut * len(made.files[name]))]})


def graph_with(data: bytes, change) -> bytes:
    model = onnx.load_from_string(data)
    change(model)
    return model.SerializeToString()


def weights_elsewhere(model):
    t = model.graph.initializer[0]
    t.ClearField("raw_data")
    t.data_location = onnx.TensorProto.EXTERNAL
    t.external_data.add(key="location", value="../../etc/passwd")


def other_operator(model):
    model.graph.node[-1].op_type = "Expand"


def other_shape(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 60


def third_output(model):
    model.graph.output.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, ["n", 1]))


@pytest.mark.parametrize("change", [weights_elsewhere, other_operator, other_shape, third_output])
def test_a_graph_that_training_would_not_write_is_refused(made, change):
    with pytest.raises(NetworkError):
        SequenceNetwork(graph_with(made.files["spending_lstm.onnx"], change))


def test_trees_unfold_nothing_and_unpickle_nothing(made):
    bomb = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(made.files["spending_trees.npz"])) as box, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for m in box.infolist():
            out.writestr(m.filename, box.read(m))
    with pytest.raises(TreesError, match="stored as they are"):
        Trees.from_npz(bomb.getvalue())
    objects = io.BytesIO()
    np.savez(objects, **{n: np.array([print], dtype=object) for n in ("names", "feature")})
    with pytest.raises(TreesError):
        Trees.from_npz(objects.getvalue())


def test_no_walk_is_endless(made):
    trees = made.model.trees
    asks = np.flatnonzero(trees.feature >= 0)
    for at in (asks[0], asks[-1]):
        for to in (0, at, len(trees.feature)):
            left = trees.left.copy()
            left[at] = to
            with pytest.raises(TreesError):
                replace(trees, left=left)


def test_trees_of_another_model_are_refused(made):
    t = made.model.trees
    with pytest.raises(ParametersError, match="another model"):
        opened(made, spending_trees__npz=replace(t, names=("next week", "later", "year")).to_npz())


def test_parameters_come_back_as_they_were(made):
    text = made.files["spending.json"]
    assert SpendingParameters.from_json(text).to_json().encode() == text
    p = made.model.parameters
    for wrong in ({"weights": p.weights[:-1]}, {"weights": ((float("nan"),) * 3,) * HORIZON}, {"month_weights": (1.0, -0.1, 0.1)}, {"shares": p.shares[:-1]}, {"alone": ((-1.0,) * 8,) * len(p.categories)}, {"categories": (1, 1)},
                  {"grouped_by": "stars"}, {"monthly": p.weekly}, {"people": 0}):
        with pytest.raises(ParametersError):
            replace(p, **wrong)


def test_the_same_data_give_the_same_files(made):
    small, tiny = made.series.take(slice(0, 30)), replace(QUICK, epochs=2, rounds=3)
    first, second = (SpendingPredictor.fit(small, made.echoes[:30], tiny).to_files() for _ in range(2))
    assert first == second
    other = SpendingPredictor.fit(small, made.echoes[:30], replace(tiny, seed=4)).to_files()
    assert other["spending_lstm.onnx"] != first["spending_lstm.onnx"]


def test_too_few_weeks_are_said_to_be_too_few(made):
    with pytest.raises(ValueError, match="too few to learn from"):
        SpendingPredictor.fit(made.series.until(10), made.echoes[:, :11], QUICK)
    with pytest.raises(ValueError, match="echo has the shape"):
        made.model.forecast(made.series, made.echoes[:5])


# Training


class Passing:
    """Loaders made one after the other, and how many there were at a time."""

    def __init__(self, made, blocks):
        self.made, self.blocks, self.alive, self.most = made, blocks, 0, 0

    def __iter__(self):
        for k in range(self.blocks):
            rows = np.arange(k % 3, PEOPLE, 3)
            loader = SequenceDataLoader(self.made.series.take(rows), self.made.echoes[rows], seed=k)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(loader, self._gone)
            yield loader
            del loader

    def _gone(self):
        self.alive -= 1


def test_people_may_come_block_by_block_and_only_one_or_two_blocks_are_there_at_a_time(made):
    blocks = Passing(made, 12)
    net, losses = train_network(blocks, replace(QUICK, epochs=None, steps=24))
    assert len(losses) == 2
    assert blocks.most <= 2
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_training_ends_early_where_people_kept_apart_are_told_no_better(made, monkeypatch):
    small = SpendingConfig(steps=400, hidden=4, attention=False)

    def steps(told):
        loader = SequenceDataLoader(made.series, made.echoes, batch=16, origins=2)
        assert len(loader.apart) == PEOPLE // 10
        assert not set(loader.apart) & set(loader.people)
        drawn, draw = [], loader._drawn
        monkeypatch.setattr(loader, "_drawn", lambda rows: drawn.append(0) or draw(rows))
        monkeypatch.setattr(spending, "_told", told)
        train_network([loader], small)
        return len(drawn)

    better = iter(np.linspace(2, 1, 50))
    assert steps(lambda *given: next(better)) > 400
    assert 350 < steps(lambda *given: 1.0) < 355  # two looks in vain end the fast part; one window is of the people apart


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_used_where_there_is_one(made):
    torch.cuda.reset_peak_memory_stats()
    net, losses = train_network([SequenceDataLoader(made.series, made.echoes)], QUICK)
    assert torch.cuda.max_memory_allocated() > 1 << 20
    assert losses[-1] < losses[0]
    assert next(net.parameters()).device.type == "cpu"
