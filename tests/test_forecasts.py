"""Metrics and rivals against plain Python, a backtest that cannot look ahead, intervals that hold, and the floor under all."""

import copy
import json
from datetime import date, timedelta

import numpy as np
import pytest

from fincoach.data.futures import futures
from fincoach.data.population import generate
from fincoach.evaluate import forecasts as module
from fincoach.evaluate.conformal import calibrate, covered, step, track
from fincoach.evaluate.forecasts import (
    BASELINES,
    Forecasts,
    backtest,
    baseline,
    baselines,
    best_possible,
    coverage_parts,
    leaks,
    mase_parts,
    origins,
    paired_difference,
    part_of_month,
    pinball_parts,
    pooled,
    portfolio,
    score,
    smape_parts,
    table,
    wape,
    wape_parts,
)
from fincoach.features.series import WeeklySeries, last_monday, weekly_series
from fincoach.serving.forecast import QUANTILES
from fincoach.serving.offsets import Offsets, offsets_from_dict, offsets_to_dict, shifted

MONDAY = last_monday("2023-01-08")


def made(n, weeks, seed, silent=0.3, late=0.3):
    """Weeks of made-up people: levels of their own, silence, refunds, late beginnings."""
    rng = np.random.default_rng(seed)
    y = rng.lognormal(5, 0.7, (n, 1)) * rng.lognormal(-0.2, 0.7, (n, weeks)) * (rng.random((n, weeks)) > silent)
    y = np.where(rng.random((n, weeks)) < 0.03, -0.2 * y, y)
    begins = np.where(rng.random(n) < late, rng.integers(0, weeks + 1, n), 0)
    y *= np.arange(weeks) >= begins[:, None]
    return WeeklySeries(np.arange(n) + 1, MONDAY + 7 * np.arange(weeks, dtype=np.int32), y[..., None], begins, np.array([8]))


@pytest.fixture(scope="module")
def some():
    return made(120, 75, 1)


@pytest.fixture(scope="module")
def tested(some):
    return backtest(some, baselines(horizon=5), origins(some.mondays, count=4, horizon=5, step=3), horizon=5)


# --- metrics ---


def test_metrics_agree_with_plain_python():
    rng = np.random.default_rng(0)
    y, f, scale = rng.normal(50, 40, (30, 4, 3)), rng.normal(50, 40, (30, 4, 3)), rng.uniform(0, 30, (30, 4, 1))
    y[rng.random(y.shape) < 0.2], f[rng.random(y.shape) < 0.1], scale[3] = np.nan, np.nan, 0
    y[5], f[5, 0, 0], y[5, 0, 0] = np.nan, 0, 0  # a week of nothing, forecast as nothing
    q = np.sort(rng.normal(50, 40, (30, 4, 3, 5)), axis=-1)
    for i in range(30):
        cells = [(a, b, s, p) for a, b, s, p in zip(y[i].ravel(), f[i].ravel(), np.repeat(scale[i], 3), q[i].reshape(-1, 5), strict=True) if not np.isnan(a)]
        both = [c for c in cells if not np.isnan(c[1])]
        assert np.allclose([p[i] for p in wape_parts(y, f)], [sum(abs(a - b) for a, b, *_ in both), sum(abs(a) for a, *_ in both)])
        assert np.allclose([p[i] for p in smape_parts(y, f)], [sum(2 * abs(a - b) / (abs(a) + abs(b)) if a or b else 0 for a, b, *_ in both), len(both)])
        scaled = [abs(a - b) / s for a, b, s, _ in both if s > 0]
        assert np.allclose([p[i] for p in mase_parts(y, f, scale)], [np.mean(scaled) if scaled else 0, bool(scaled)])
        loss = sum(np.mean([2 * (t * (a - k) if a >= k else (1 - t) * (k - a)) for t, k in zip(QUANTILES, p, strict=True)]) for a, _, _, p in cells)
        assert np.allclose([p_[i] for p_ in pinball_parts(y, q)], [loss, sum(abs(a) for a, *_ in cells)])
        assert np.allclose([p_[i] for p_ in coverage_parts(y, q[..., 1], q[..., 3])], [sum(p[1] <= a <= p[3] for a, _, _, p in cells), len(cells)])
    with pytest.raises(ValueError, match="shape"):
        wape(y, f[:, :1])


def test_units_do_not_matter_and_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(1)
    y, f = rng.gamma(2, 30, (80, 6)), rng.gamma(2, 30, (80, 6))
    a, b = wape(y, f, seed=4), wape(y * 100, f * 100, seed=4)
    assert np.allclose([a.value, a.low, a.high], [b.value, b.low, b.high])
    assert a == wape(y, f, seed=4)
    assert a != wape(y, f, seed=5)
    assert a.low < a.value < a.high
    assert np.isnan(score(np.zeros(3), np.zeros(3)).value)


def test_who_spends_nothing_counts_with_what_was_forecast():
    """Leaving out people whose weeks were all silent would flatter whoever forecasts too much for them."""
    rng = np.random.default_rng(6)
    y, f = rng.gamma(2, 30, (40, 5)), rng.gamma(2, 30, (40, 5))
    y[10:] = 0
    assert np.isclose(wape(y, f).value, np.abs(y - f).sum() / y.sum())
    assert wape(y, f).people == 40


def test_a_difference_to_oneself_is_nothing_and_its_sign_is_right():
    rng = np.random.default_rng(2)
    y = rng.gamma(2, 30, (200, 6))
    f = y + rng.normal(0, 20, y.shape)
    nothing, worse = paired_difference(y, f, f), paired_difference(y, y + 1.1 * (f - y), f)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    assert np.allclose([worse.value, worse.low, worse.high], 0.1)
    assert paired_difference(y, f, y + 1.1 * (f - y)).high < 0


def test_intervals_are_over_people():
    """Weeks of one person that are all alike make nothing surer."""
    rng = np.random.default_rng(3)
    y, f = rng.gamma(2, 30, (100, 1)), rng.gamma(2, 30, (100, 1))
    one, many = wape(y, f), wape(np.repeat(y, 50, 1), np.repeat(f, 50, 1))
    assert np.allclose([one.low, one.high], [many.low, many.high], rtol=1e-5)


def test_pooled_errors_are_of_sums():
    rng = np.random.default_rng(4)
    y, f, groups = rng.gamma(2, 30, (60, 5)), rng.gamma(2, 30, (60, 5)), np.arange(60) % 3
    y[0, 0] = np.nan
    both = np.where(np.isnan(y), np.nan, f)
    parts = [(abs(np.nansum(y[groups == g], 0) - np.nansum(both[groups == g], 0)).sum(), np.nansum(y[groups == g])) for g in range(3)]
    assert np.isclose(pooled(y, f, groups).value, sum(a for a, _ in parts) / sum(b for _, b in parts))
    assert np.isclose(pooled(y, f, np.arange(60)).value, wape(y, f).value)
    assert np.isclose(portfolio(y, f, 60).value, pooled(y, f).value)
    with pytest.raises(ValueError, match="cannot be drawn"):
        portfolio(y, f, 61)


# --- the plain rivals ---


def plain(name, y, part, horizon):
    """A rival in plain Python for the known weeks `y` of one person; `part` of those weeks and the coming ones."""
    n, mean = len(y), np.mean(y[-12:])
    if name == "naive":
        return [y[-1]] * horizon
    if name in ("seasonal naive", "last year"):
        season, default = (4, y[-1]) if name == "seasonal naive" else (52, mean)
        return [y[n - season + h % season] if n - season + h % season >= 0 else default for h in range(horizon)]
    if name in ("12-week mean", "12-week median"):
        return [mean if name == "12-week mean" else np.median(y[-12:])] * horizon
    if name == "week of month":
        y, p = y[-26:], part[:n][-26:]
        return [(sum(v for v, k in zip(y, p, strict=True) if k == part[n + h]) + np.mean(y)) / (sum(k == part[n + h] for k in p) + 1) for h in range(horizon)]
    if name == "smoothing":
        best = (np.inf, y[0])
        for k in range(10):
            level, error = y[0], 0.0
            for v in y[1:]:
                error, level = error + (v - level) ** 2, level + (0.03 + 0.07 * k) * (v - level)
            best = (error, level) if error < best[0] else best
        return [best[1]] * horizon
    head, sizes = y[:10], [v for v in y[:10] if v != 0]
    chance, size = len(sizes) / len(head), sum(sizes) / max(len(sizes), 1)
    for v in y[10:]:
        chance += 0.1 * ((v != 0) - chance)
        size += 0.1 * (v - size) if v != 0 else 0
    return [chance * size] * horizon


@pytest.mark.parametrize("name", BASELINES)
def test_rivals_agree_with_plain_python(some, name):
    f = baseline(name, some, 6)
    part = part_of_month(MONDAY + 7 * np.arange(81)).tolist()
    for i, first in enumerate(some.begins.tolist()):
        if first == 75:
            assert np.isnan(f.point[i]).all()
            assert np.isnan(f.quantiles[i]).all()
            continue
        assert np.allclose(f.point[i], plain(name, some.total[i, first:].tolist(), part[first:], 6)), (name, i)
    assert np.array_equal(f.quantiles[..., 2], f.point, equal_nan=True)
    assert np.allclose(f.month[:, 2], f.point[:, :4].sum(1), equal_nan=True)
    known = some.begins < 70
    assert (np.diff(f.quantiles[known]) >= 0).all()
    assert (np.diff(f.month[known]) >= 0).all()


def test_quantiles_of_a_rival_are_those_of_its_own_past_errors():
    s = made(20, 40, 2, late=0)
    f = baseline("12-week mean", s, 4)
    for i in range(20):
        y, errors, fours = s.total[i], [], []
        for now in range(40 - 1 - 26, 39):
            said = np.mean(y[max(0, now - 11) : now + 1])
            errors += [y[now + 1 + h] - said for h in range(4) if now + 1 + h < 40]
            fours += [y[now + 1 : now + 5].sum() - 4 * said] if now + 4 < 40 else []
        for errors_of, point, found in ((errors, f.point[i, 0], f.quantiles[i, 0]), (fours, 4 * f.point[i, 0], f.month[i])):
            low, high = np.quantile(errors_of, QUANTILES[:2]), np.quantile(errors_of, QUANTILES[3:])
            assert np.allclose(found, [*(point + np.minimum(low, 0)), point, *(point + np.maximum(high, 0))])


def test_a_person_of_one_week_and_odd_questions():
    young = made(3, 30, 3, late=0)
    young = WeeklySeries(young.user_ids, young.mondays, young.y * (np.arange(30) == 29)[:, None], np.array([29, 30, 0]), young.categories)
    for name in BASELINES:
        f = baseline(name, young, 4)
        assert np.isfinite(f.point[0]).all()
        assert np.isnan(f.quantiles[0][..., [0, 1, 3, 4]]).all()
        assert np.isnan(f.point[1]).all()
    with pytest.raises(ValueError, match="take one of naive"):
        baseline("crystal ball", young)
    with pytest.raises(ValueError, match="4 weeks at least"):
        baseline("naive", young, 3)


# --- the backtest ---


def test_truths_and_scales_are_those_of_the_series(some, tested):
    for o, week in enumerate(tested.origins.tolist()):
        assert tested.mondays[o] == some.mondays[week]
        for i in range(len(some)):
            known = week + 1 - some.begins[i] >= 4
            wanted = some.total[i, week + 1 : week + 6] if known else np.full(5, np.nan)
            assert np.array_equal(tested.y[i, o], wanted, equal_nan=True)
            if known:
                assert np.isclose(tested.scale[i, o], np.abs(np.diff(some.total[i, some.begins[i] : week + 1])).mean())
    assert np.array_equal(tested.month, tested.y[..., :4].sum(-1), equal_nan=True)
    assert np.array_equal(tested.models["naive"].point[:, 2], baseline("naive", some.until(tested.origins[2]), 5).point, equal_nan=True)


def test_a_model_is_handed_nothing_from_later(some):
    seen = []

    def curious(series, origin):
        for array in (series.y, series.total, series.mondays, series.begins):
            while array is not None:  # not even by way of the array that a view is of
                assert origin + 1 in array.shape or array.shape == series.begins.shape
                seen.append(array)
                array = array.base
        assert series.mondays[-1] == some.mondays[origin]
        assert (series.begins <= origin + 1).all()
        series.total[:] = 0  # nor can it spoil what others are given
        return baseline("naive", series, 4)

    before = some.total.copy()
    result = backtest(some, {"curious": curious, "naive": baselines(["naive"], 4)["naive"]}, [40, 60], horizon=4)
    assert len(seen) >= 8
    assert np.array_equal(some.total, before)
    assert np.nansum(result.models["naive"].point) > 0


def test_bad_models_and_origins_are_refused(some):
    naive = baselines(["naive"], 4)["naive"]

    def gaps(series, origin):
        f = naive(series, origin)
        return Forecasts("gaps", np.where(f.point > np.nanmedian(f.point), np.nan, f.point), f.quantiles, f.month)

    fitted = lambda series, origin: naive(series, origin)  # noqa: E731
    fitted.fitted_until = int(some.mondays[50])
    assert backtest(some, {"fitted": fitted}, [50], horizon=4).models
    for models, at, horizon, why in (({"gaps": gaps}, [50], 4, "has no forecast for"), ({"fitted": fitted}, [49], 4, "has seen weeks after the origin 49"),
                                     ({"naive": naive}, [50], 6, "are wanted"), ({"naive": naive}, [72], 4, "do not fit"), ({"naive": naive}, [], 4, "do not fit")):
        with pytest.raises(ValueError, match=why):
            backtest(some, models, at, horizon=horizon)
    with pytest.raises(ValueError, match="need 79 weeks"):
        origins(some.mondays, count=71, horizon=8)
    assert origins(some.mondays, last=40, count=3, horizon=8, step=4).tolist() == [24, 28, 32]
    with pytest.raises(ValueError, match="do not fit together"):
        Forecasts("odd", np.zeros((2, 4)), np.zeros((2, 4, 3)), np.zeros((2, 5)))


@pytest.mark.parametrize("field", ["point", "quantiles", "month", "mean", "begins"])
def test_leaks_finds_a_look_ahead_wherever_it_shows(some, field):
    def build(series):
        def model(seen, origin):
            f = baseline("12-week mean", seen, 4)
            values = {k: getattr(f, k).copy() for k in ("point", "quantiles", "month", "mean")}
            if field == "begins":
                values["point"][:] += series.begins.mean()  # how soon others will join
            else:
                values[field][3] += series.total[3, origin + 1]
            return Forecasts("peeks", **values)

        return model

    assert leaks(build, some, 50)


def test_leaks_has_nothing_against_honest_models(some):
    for name in BASELINES:
        assert not leaks(lambda series, name=name: baselines([name], 4)[name], some, 50), name
        assert not leaks(lambda series, name=name: (lambda seen, origin: baseline(name, series.until(origin), 4)), some, 50), name


def test_table_has_every_level(tested):
    segments = np.arange(len(tested.user_ids)) % 3
    found = table(tested, segments, ahead=(1, 4, 9), sizes=(10, 50, 10_000))
    assert set(found["level"]) == {"user-week", "user-month", "segment", "portfolio", "portfolio of 10", "portfolio of 50"}
    assert set(found["ahead"].drop_nulls()) == {1, 4}
    assert set(found["model"]) == set(BASELINES)
    assert not found.select(["value", "low", "high"]).null_count().sum_horizontal()[0]
    month = found.filter(model="TSB", level="user-month", metric="WAPE").row(0, named=True)
    assert np.isclose(month["value"], wape(tested.month, tested.models["TSB"].month[..., 2]).value)
    assert tested.take(segments == 1).y.shape[0] == (segments == 1).sum()
    assert tested.compare("TSB", "naive").high < 0
    assert tested.compare("TSB", "naive", ahead=None).value != tested.compare("TSB", "naive", month=True).value


# --- conformal ---


def uneven(seed, origins_=25, horizon=2, names=("calm", "uneven", "wild"), spreads=(0.3, 0.8, 1.6), each=300):
    """Groups of different unevenness, and one opinion on all of them: y (n, O, H), quantiles, scale, groups."""
    rng = np.random.default_rng(seed)
    n, groups, spread = each * len(names), np.repeat(names, each), np.repeat(spreads, each)
    scale = rng.lognormal(4, 0.7, n)
    y = scale[:, None, None] * np.exp(spread[:, None, None] * rng.standard_normal((n, origins_, horizon)))
    opinion = np.quantile(np.exp(0.8 * rng.standard_normal(50_000)), QUANTILES)
    return y, np.broadcast_to(scale[:, None, None, None] * opinion, (*y.shape, 5)), scale, groups


def said_at(offsets, q, scale, groups):
    return np.stack([shifted(offsets, q[:, k], scale, groups) for k in range(q.shape[1])], axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_grouped_intervals_hold_where_pooled_ones_miss(seed):
    y, q, scale, groups = uneven(seed)
    new, told, size, _ = uneven(seed + 100)
    held = {name: covered(new, said_at(calibrate(y, q, scale, g), told, size, g), groups) for name, g in (("grouped", groups), ("pooled", np.repeat("all", len(groups))))}
    worst = {name: {lv: (f.filter(level=lv)["value"] - lv / 100).abs().max() for lv in (80, 95)} for name, f in held.items()}
    assert worst["grouped"][80] < 0.03
    assert worst["grouped"][95] < 0.02
    assert worst["pooled"][80] > 0.15


def test_each_week_ahead_has_offsets_of_its_own():
    y, q, scale, groups = uneven(7, horizon=3)
    y = y.copy()
    y[..., 2] = scale[:, None] * (y[..., 2] / scale[:, None]) ** 2  # three weeks ahead all are twice as uneven
    offsets = calibrate(y, q, scale, groups)
    inside = [(lambda s: ((y[..., h] >= s[..., h, 1]) & (y[..., h] <= s[..., h, 3])).mean())(said_at(offsets, q, scale, groups)) for h in range(3)]
    assert np.allclose(inside, 0.8, atol=0.02)
    assert (offsets.values[:, 2, 4] > offsets.values[:, 0, 4]).all()


def test_what_is_missing_does_not_count_and_units_do_not_matter():
    y, q, scale, groups = uneven(8, origins_=6)
    holes = y.copy()
    holes[:, 3:] = np.nan
    a, b = calibrate(holes, q, scale, groups), calibrate(y[:, :3], q[:, :3], scale, groups)
    assert np.array_equal(a.values, b.values)
    assert np.array_equal(a.cases, b.cases)
    c = calibrate(100 * y[:, :3], 100 * q[:, :3], 100 * scale, groups)
    assert np.allclose(c.values, b.values)
    unscaled = scale.copy()
    unscaled[:5] = 0
    assert calibrate(y, q, unscaled, groups).cases[-1, 0] == (len(y) - 5) * 6
    with pytest.raises(ValueError, match="no outcome"):
        calibrate(np.full(y.shape, np.nan), q, scale, groups)
    with pytest.raises(ValueError, match="wants quantiles"):
        calibrate(y, q[..., :3], scale, groups)


def test_months_are_one_week_ahead_of_their_own():
    y, q, scale, groups = uneven(9, horizon=1)
    offsets = calibrate(y, q, scale, groups)
    month = shifted(offsets, q[:, 0], scale, groups)
    assert month.shape == (len(y), 1, 5)


def test_tracked_intervals_recover_from_a_change_and_fixed_ones_do_not():
    y, q, scale, groups = uneven(10, origins_=80)
    offsets = calibrate(y[:, :20], q[:, :20], scale, groups)
    drift = y.copy()
    calm = groups == "calm"
    drift[calm, 40:] = scale[calm, None, None] * (drift[calm, 40:] / scale[calm, None, None]) ** 3
    _, said = track(offsets, drift, q, scale, groups)
    fixed = said_at(offsets, q, scale, groups)
    hold = lambda s, span, low, high: ((drift >= s[..., low]) & (drift <= s[..., high]))[calm][:, span].mean()  # noqa: E731
    assert hold(fixed, slice(55, 80), 1, 3) < 0.5
    assert abs(hold(said, slice(55, 80), 1, 3) - 0.8) < 0.03
    assert abs(hold(said, slice(55, 80), 0, 4) - 0.95) < 0.02
    others = ((drift >= said[..., 1]) & (drift <= said[..., 3]))[~calm].mean()
    assert abs(others - 0.8) < 0.02  # nobody else pays for it


def test_tracking_carries_its_whole_state():
    """Half of the origins, the offsets written down and read again, the other half: the same as in one go. Weeks ahead are due later."""
    y, q, scale, groups = uneven(11, origins_=20, horizon=1)
    start = calibrate(y[:, :5], q[:, :5], scale, groups)
    end, said = track(start, y, q, scale, groups)
    middle, first = track(start, y[:, :10], q[:, :10], scale, groups)
    again, second = track(offsets_from_dict(json.loads(json.dumps(offsets_to_dict(middle)))), y[:, 10:], q[:, 10:], scale, groups)
    assert np.array_equal(np.concatenate([first, second], 1), said)
    assert np.array_equal(again.values, end.values)


@pytest.mark.parametrize("gap", [1, 3])
def test_tracking_learns_from_a_week_only_when_it_is_over(gap):
    y, q, scale, groups = uneven(12, origins_=12, horizon=4, each=50)
    start, at = calibrate(y[:, :4], q[:, :4], scale, groups), np.arange(12) * gap
    _, said = track(start, y, q, scale, groups, at)
    for o in range(12):
        later = y.copy()
        later[at[None, :, None] + np.arange(1, 5) + 0 * y > at[o]] *= 9
        _, other = track(start, later, q, scale, groups, at)
        assert np.array_equal(other[:, o], said[:, o]), o
    with pytest.raises(ValueError, match="ascending"):
        track(start, y, q, scale, groups, at[::-1])


def test_a_step_goes_the_right_way():
    y, q, scale, groups = uneven(13, origins_=4)
    offsets = calibrate(y, q, scale, groups)
    for sign in (1, -1):
        after = step(offsets, np.full((50, 5), sign * 1e6), np.repeat("calm", 50), 0)
        moved = after.values[offsets.groups.index("calm"), 0] - offsets.values[offsets.groups.index("calm"), 0]
        assert (sign * moved[[0, 1, 3, 4]] > 0).all()
        assert moved[2] == 0
        assert np.array_equal(after.values[offsets.groups.index("wild")], offsets.values[offsets.groups.index("wild")])


def test_offsets_are_read_strictly():
    y, q, scale, groups = uneven(14, origins_=3)
    good = offsets_to_dict(calibrate(y, q, scale, groups))
    assert offsets_to_dict(offsets_from_dict(json.loads(json.dumps(good)))) == good
    def broken(**change):
        return copy.deepcopy(good) | change

    bad = [None, [], {}, broken(more=1), broken(groups="calm"), broken(groups=["a"]), broken(groups=["calm", "calm", "wild"]), broken(groups=[1, 2, 3]),
           broken(values=[]), broken(values=[[1.0]]), broken(values=good["values"][:2]), broken(values=[[["1e999x"]]]), broken(values={"a": 1}),
           broken(slope=[[[float("nan")] * 5] * 2] * 4), broken(cases=[[1], [1, 2]]), broken(values=[[[10**400] * 5] * 2] * 4), broken(values=[[[[0.0]]]])]
    for value in bad:
        with pytest.raises(ValueError, match="offsets"):
            offsets_from_dict(value)
    offsets = offsets_from_dict(good)
    assert np.array_equal(offsets.rows(["wild", "nobody", "calm"]), [2, 3, 0])
    for shape, count in (((4, 2, 4), 4), ((4, 3, 5), 4), ((4, 5), 4), ((4, 2, 5), 3)):
        with pytest.raises(ValueError, match="do not fit"):
            shifted(offsets, np.zeros(shape), np.ones(count), ["calm"] * count)


def test_shifted_quantiles_never_cross():
    rng = np.random.default_rng(15)
    wild = Offsets(("a",), rng.normal(0, 3, (2, 4, 5)) * [1, 1, 0, 1, 1], np.ones((2, 4, 5)), np.ones((2, 4)))
    q = np.sort(rng.normal(0, 1, (200, 4, 5)), axis=-1)
    found = shifted(wild, q, rng.gamma(2, 1, 200), rng.choice(["a", "b"], 200))
    assert (np.diff(found) >= 0).all()
    assert np.array_equal(found[..., 2], q[..., 2])


# --- the floor ---


def test_no_plain_rival_gets_below_the_floor():
    people, days, seed = 150, 380, 11
    s = weekly_series(generate(people, days, seed).frames, date(2025, 7, 13))
    at = origins(s.mondays, count=2, step=4)
    tested = backtest(s, {"best possible": best_possible(people, days, seed, horizon=4, runs=50)} | baselines(horizon=4), at, horizon=4)
    for name in BASELINES:
        assert tested.compare("best possible", name).high < 0, name
        assert tested.compare("best possible", name, month=True).high < 0, name
    best = tested.models["best possible"]
    assert pooled(tested.y, best.mean).value < pooled(tested.y, best.point).value
    assert abs(score(*coverage_parts(tested.y, best.quantiles[..., 1], best.quantiles[..., 3])).value - 0.8) < 0.05
    mine = backtest(s.take([4, 2]), {"best": best_possible(people, days, seed, horizon=4, runs=50)}, at, horizon=4).models["best"]
    assert np.array_equal(mine.point, best.point[[4, 2]])


def test_futures_refuse_what_they_cannot_know():
    for origin, users in ((date(2024, 6, 1), None), (date(2025, 7, 1), None), ("2025-01-05", [0]), ("2025-01-05", [31])):
        with pytest.raises(ValueError, match=r"not within|user ids"):
            futures(30, 300, 1, origin, weeks=4, runs=2, users=users)
    a, b = (futures(30, 300, 1, date(2025, 1, 5) + timedelta(weeks=k), weeks=4, runs=3) for k in (0, 1))
    assert a.shape == (30, 3, 4)
    assert np.array_equal(a, np.round(a, 2))
    assert not np.array_equal(a[:, 0], a[:, 1])
    assert not np.array_equal(a, b)
    assert module.ENDS == {80: (1, 3), 95: (0, 4)}
