"""Segments: the checks that every clusterer must pass, groups that are there and groups that are not, names, and words."""

from dataclasses import replace
from datetime import date

import numpy as np
import polars as pl
import pytest

from fincoach.data.tables import SEGMENTS
from fincoach.evaluate.clusters import adjusted_rand, structure, temporal_stability
from fincoach.features.behavior import FEATURES
from fincoach.segments.model import (
    BEHAVIOUR,
    FLOOR,
    GOALS,
    PROTOTYPES,
    UserSegmentationModel,
    outcomes,
    place,
    segment_usefulness,
    similarities,
    two_step_fit,
)
from fincoach.segments.profiles import SegmentProfiler
from fincoach.serving.inference import SegmentationParameters, assign

DAY = date(2025, 6, 30)
NAMES = [f.name for f in FEATURES]
WIDTH = {f.name: 0.1 if f.scale == "linear" else 0.5 for f in FEATURES}


def arrows():
    """The five patterns as rows of z over the behavioural features."""
    return np.array([[{t.feature: t.strength for t in p}.get(f.name, 0.0) for f in BEHAVIOUR] for p in PROTOTYPES.values()])


def crowd(n=400, noise=0.6, seed=0, z=None):
    """Made-up features (not through transactions): people around the five patterns, or at `z`, in each feature's own unit."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, n)
    z = arrows()[truth] + noise * rng.normal(size=(n, len(BEHAVIOUR))) if z is None else z
    columns = {f.name: rng.normal(size=n) for f in FEATURES}
    for f, values in zip(BEHAVIOUR, z.T, strict=True):
        columns[f.name] = np.expm1(np.abs(3 + values)) if f.scale == "log" else 0.4 + WIDTH[f.name] * values
    return pl.DataFrame({"user_id": np.arange(1, n + 1)} | columns), truth


@pytest.fixture(scope="module")
def people():
    return crowd()


@pytest.fixture(scope="module")
def model(people):
    return UserSegmentationModel(seed=1).train_clustering_model(people[0], DAY)


# What every clusterer must pass


def test_the_planted_groups_are_found_and_named(model, people):
    assert adjusted_rand(model.labels, people[1]) > 0.95
    named = np.array([n.segment_id for n in model.naming])[model.labels]
    assert (named == people[1]).mean() > 0.97  # not only the groups: each by its own name


def test_same_seed_same_bytes(model, people):
    again = UserSegmentationModel(seed=1).train_clustering_model(people[0], DAY)
    assert again.parameters.to_json() == model.parameters.to_json()


def test_row_order_changes_nothing(model, people):
    mixed = people[0].sample(fraction=1, shuffle=True, seed=3)
    again = UserSegmentationModel(seed=1).train_clustering_model(mixed, DAY)
    assert again.parameters.to_json() == model.parameters.to_json()
    assert again.predict(mixed).sort("user_id").equals(model.predict(people[0]))


def test_ids_are_only_names(model, people):
    """Other ids in the same order: the same model."""
    again = UserSegmentationModel(seed=1).train_clustering_model(people[0].with_columns(pl.col("user_id") * 17 + 5), DAY)
    assert again.parameters.to_json() == model.parameters.to_json()


def test_the_context_of_the_day_changes_nothing(model, people):
    """Nobody changes segment because payday was yesterday."""
    context = [f.name for f in FEATURES if f.role == "context"]
    assert len(context) == 5
    later = people[0].with_columns(pl.col(c) * 3 + 1 for c in context)
    assert model.predict(later).equals(model.predict(people[0]))


def test_a_person_never_seen_is_placed(model):
    stranger, truth = crowd(n=60, seed=9)
    placed = model.predict(stranger)
    assert (placed["segment_id"].to_numpy() == truth).mean() > 0.9


def test_one_row_is_placed_as_among_many(model, people):
    many = model.predict(people[0])
    for i in (0, 7, 399):
        one = model.predict(people[0][i])
        assert one.drop("confidence").row(0) == many.drop("confidence").row(i)
        assert one["confidence"][0] == pytest.approx(many["confidence"][i], rel=1e-12)


def test_nobody_is_placed_as_nobody(model, people):
    assert model.predict(people[0].head(0)).is_empty()


def test_who_is_unknown_is_said_to_be_unsure(model, people):
    unknown = people[0].head(1).with_columns(pl.lit(None, pl.Float64).alias(n) for n in NAMES)
    placed = model.predict(unknown)
    largest = max(n.share for n in model.naming)
    assert placed["confidence"][0] == pytest.approx(largest, abs=0.01)
    assert placed["confidence"][0] < 0.4 < model.predict(people[0])["confidence"].mean()


def test_serving_reads_what_training_wrote(model):
    stored = SegmentationParameters.from_json(model.parameters.to_json())
    assert stored == model.parameters
    assert (assign(stored, model.raw).cluster == model.labels).all()


def test_labels_are_the_nearest_centres_when_shares_are_equal(model):
    """With equal weights serving's `assign` is plain k-means prediction, by scikit-learn's own code."""
    from sklearn.cluster import KMeans

    equal = replace(model.parameters, clusters=tuple(replace(c, weight=1.0) for c in model.parameters.clusters))
    plain = KMeans(len(model.centres), init=model.centres, n_init=1, max_iter=1).fit(model.centres)
    plain.cluster_centers_ = np.ascontiguousarray(model.centres)
    assert (assign(equal, model.raw).cluster == plain.predict(model.z)).all()


# Data as they come


def test_a_constant_feature_is_dropped_and_said(people):
    model = UserSegmentationModel().train_clustering_model(people[0].with_columns(refund_share=pl.lit(0.0)), DAY)
    assert model.dropped == {"refund_share": "the same for everybody"}
    assert "refund_share" not in model.names


def test_a_feature_unknown_for_most_is_dropped_and_said(people):
    few = people[0].with_columns(pl.when(pl.col("user_id") <= 150).then(pl.col("savings_rate")).alias("savings_rate"))
    model = UserSegmentationModel().train_clustering_model(few, DAY)
    assert model.dropped == {"savings_rate": "known for 38% of people"}


def test_having_no_goal_is_known_but_goals_nobody_has_are_not(people):
    some = people[0].with_columns(pl.when(pl.col("user_id") <= 100).then(pl.col(g)).alias(g) for g in GOALS)
    assert not UserSegmentationModel().train_clustering_model(some, DAY).dropped
    none = people[0].with_columns(pl.lit(None, pl.Float64).alias(g) for g in GOALS)
    model = UserSegmentationModel().train_clustering_model(none, DAY)
    assert set(model.dropped) == set(GOALS)
    assert "Goal-Oriented" not in {n.name for n in model.naming}  # what cannot be seen gives no name


def test_the_silent_are_not_learned_from_but_placed(people):
    silent = people[0].head(30).with_columns(pl.lit(None, pl.Float64).alias(f.name) for f in BEHAVIOUR if f.name != "income_weekly")
    silent = silent.with_columns(pl.col("user_id") + 1000, income_weekly=pl.lit(0.0))
    both = pl.concat([people[0], silent.select(people[0].columns)])
    model = UserSegmentationModel(seed=1).train_clustering_model(both, DAY)
    assert model.left_out.tolist() == silent["user_id"].to_list()
    assert len(model.predict(both)) == 430
    assert adjusted_rand(model.labels, people[1]) > 0.95


def test_one_castle_does_not_move_the_rest(model, people):
    castle = people[0].with_columns(spending_weekly=pl.when(pl.col("user_id") == 1).then(1e9).otherwise(pl.col("spending_weekly")))
    moved = UserSegmentationModel(seed=1).train_clustering_model(castle, DAY)
    assert adjusted_rand(moved.labels[1:], model.labels[1:]) > 0.97


@pytest.mark.parametrize(("broken", "said"), [
    (lambda f: f.drop("savings_rate"), "the features lack \\['savings_rate'\\]"),
    (lambda f: pl.concat([f, f.head(1)]), "occurs twice"),
    (lambda f: f.with_columns(pl.lit(None, pl.Float64).alias(n) for n in NAMES), "none of 400 people"),
    (lambda f: f.head(3), "cannot make 5 groups"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_words(people, broken, said):
    with pytest.raises(ValueError, match=said):
        UserSegmentationModel().train_clustering_model(broken(people[0]), DAY)


def test_an_untrained_model_says_what_to_call():
    for ask in (lambda m: m.predict(pl.DataFrame()), lambda m: m.find_optimal_clusters(), lambda m: m.assign_segment_labels(), lambda m: m.centres):
        with pytest.raises(RuntimeError, match="train_clustering_model"):
            ask(UserSegmentationModel())


# Groups that are not there


@pytest.mark.parametrize("shape", ["cloud", "lopsided", "tied"])
def test_data_without_groups_are_not_said_to_have_them(shape):
    rng = np.random.default_rng(4)
    z = rng.normal(size=(500, len(BEHAVIOUR)))
    if shape == "lopsided":
        z = np.exp(z) / 2
    if shape == "tied":
        z = z @ (np.eye(z.shape[1]) + 0.4 * rng.normal(size=(z.shape[1],) * 2))
    model = UserSegmentationModel().train_clustering_model(crowd(500, z=z)[0], DAY)
    assert not model.validate_clusters(draws=8).structure.beyond_nulls


def test_groups_that_are_there_are_said_to_be(model):
    found = model.validate_clusters(draws=8)
    assert found.structure.beyond_nulls
    assert found.stability.low > 0.8
    assert found.names == 5
    assert found.names_in_noise["permuted"] < 4


def test_the_number_of_groups_planted_is_found(model):
    choice = model.find_optimal_clusters(ks=range(2, 8), draws=4)
    assert choice.elbow == choice.best_silhouette == 5
    assert choice.table["k"].to_list() == [2, 3, 4, 5, 6, 7]


def test_stability_counts_pairs_not_numbers():
    """A fit that shuffles its label numbers each time is as stable as one that does not."""
    rng = np.random.default_rng(0)
    x = np.repeat(np.eye(4) * 9, 50, axis=0) + rng.normal(size=(200, 4))

    def shuffling(x, seed):
        order, label = np.random.default_rng(seed).permutation(4), two_step_fit(4)(x, 0)
        return lambda other: order[label(other)]

    assert structure(x, shuffling, draws=6).scores["real"]["stability"].value == pytest.approx(1.0)


# Names


def test_names_do_not_depend_on_the_number_of_a_cluster():
    from fincoach.segments.model import _names

    names, centres = [f.name for f in BEHAVIOUR], arrows() * 0.8
    for order in np.random.default_rng(0).permuted(np.tile(np.arange(5), (6, 1)), axis=1):
        found = _names(centres[order], np.full(5, 0.2), names)
        assert [n.name for n in found] == [SEGMENTS[i] for i in order]


def test_a_cluster_far_from_all_patterns_has_no_name():
    """Late shoppers who change everything each quarter, and nothing else: a group, but none of the five."""
    z = np.random.default_rng(2).normal(size=(400, len(BEHAVIOUR))) * 0.5
    names = [f.name for f in BEHAVIOUR]
    z[:100, names.index("debt_share")] += 4
    z[:100, names.index("large_purchase_share")] -= 4
    z[100:200] += 1.5 * arrows()[1]
    model = UserSegmentationModel(k=3, seed=1).train_clustering_model(crowd(400, z=z)[0], DAY)
    odd = model.naming[np.bincount(model.labels[:100]).argmax()]
    assert odd.segment_id == -1
    assert odd.name.startswith("Unnamed pattern")
    assert {odd.distinguishes[0][0], odd.distinguishes[1][0]} == {"debt_share", "large_purchase_share"}
    assert "Impulse Buyers" in {n.name for n in model.naming}
    assert (place(model.parameters, crowd(400, z=z)[0])["segment_id"].to_numpy()[:100] == -1).mean() > 0.9


def test_average_people_have_no_name():
    assert (similarities(arrows() * 0.05, [f.name for f in BEHAVIOUR]) < FLOOR).all()


def test_a_name_is_given_once_and_survives_resampling(model):
    naming = model.assign_segment_labels(draws=6)
    assert sorted(n.segment_id for n in naming.names) == [0, 1, 2, 3, 4]
    assert min(n.frequency for n in naming.names) == 1.0
    assert min(n.gap for n in naming.names) > 0.3


def test_more_groups_than_patterns_leave_some_unnamed(people):
    model = UserSegmentationModel(k=7, seed=1).train_clustering_model(people[0], DAY)
    unnamed = [n for n in model.naming if n.segment_id < 0]
    assert [n.name for n in unnamed] == ["Unnamed pattern A", "Unnamed pattern B"]
    assert unnamed[0].share >= unnamed[1].share


# Between, over time, in words


def test_who_is_half_way_is_said_to_be_between(model):
    z = np.repeat(((arrows()[0] + arrows()[1]) / 2)[None], 5, axis=0)
    half = model.predict(crowd(5, z=z)[0])
    assert half["confidence"].max() < 0.9
    sure = model.predict(crowd(5, z=np.repeat(arrows()[:1], 5, axis=0))[0])
    assert not sure["between"].any()
    middle = replace(model.parameters, margin=1.0)
    assert place(middle, crowd(5, z=z)[0])["between"].all()


def test_lasting_sees_who_moved():
    then = np.repeat([0, 1, 2], 100)
    now = then.copy()
    now[:25] = 1
    found = temporal_stability(then, now)
    assert found.kept.value == pytest.approx(275 / 300)
    assert found.moves[0].tolist() == [0.75, 0.25, 0]


def test_outcomes_may_not_be_seen_before_they_happen():
    from fincoach.data.population import generate
    from fincoach.features.ledger import Ledgers

    ledgers = Ledgers.from_frames(generate(people=40, days=200, seed=2).frames)
    model = UserSegmentationModel(k=2)
    model.parameters = SegmentationParameters("v", ledgers.last_day, *_tiny(), 1.0, 0.1)
    with pytest.raises(ValueError, match="choose an earlier day"):
        segment_usefulness(model, ledgers, ledgers.last_day)
    earlier = date.fromordinal(ledgers.last_day.toordinal() - 84)
    with pytest.raises(ValueError, match="may have seen the outcomes"):
        segment_usefulness(model, ledgers, earlier)
    found = outcomes(ledgers, ledgers.last_day)
    assert {len(v) for v in found.values()} == {40}


def _tiny():
    from fincoach.serving.inference import Cluster, FeatureScaling

    return (FeatureScaling("savings_rate", "linear", 0.0, 0.0, 1.0, 3.0),), (Cluster(0, SEGMENTS[0], 1.0, 1.0, (0.0,)),)


def test_profiles_describe_the_people_they_are_of(model, people):
    profiler = SegmentProfiler(model, people[0], currency="EUR")
    found = profiler.analyze_segment_characteristics()
    assert found.sizes["people"].sum() == 400
    row = found.table.filter((pl.col("segment") == "Impulse Buyers") & (pl.col("feature") == "impulse_share")).row(0, named=True)
    inside = people[0].filter(pl.Series(people[1] == 1))["impulse_share"]
    assert row["median"] == pytest.approx(inside.median(), rel=0.02)
    assert row["low"] <= row["median"] <= row["high"]
    assert row["effect"] > 1


def test_words_are_about_the_right_people(model, people):
    said = {p.name: " ".join(p.sentences) for p in SegmentProfiler(model, people[0]).generate_segment_personas()}
    assert "several things in a row" in said["Impulse Buyers"]
    assert "towards their goals" in said["Goal-Oriented"]
    assert "in reserve" in said["Conservative Savers"]
    assert not any("several things in a row" in text for name, text in said.items() if name != "Impulse Buyers")


def test_demographics_are_told_where_known_and_hidden_text_is_escaped(model, people):
    ids = people[0]["user_id"]
    told = pl.DataFrame({"user_id": ids, "region": ["<b>North</b>"] * 400, "household_size": [None] * 360 + [2] * 40})
    found = SegmentProfiler(model, people[0], told).analyze_segment_characteristics()
    assert found.demographics["trait"].unique().to_list() == ["region"]
    assert found.demographics["here"].unique().to_list() == ["<b>North</b> (100%)"]
    shown = found._repr_html_()
    assert "North" in shown
    assert "<b>North" not in shown


def test_peers_are_the_nearest_of_the_same_segment(model, people):
    profiler = SegmentProfiler(model, people[0])
    peers = profiler.peers(5, count=400)
    same = profiler.placed.filter(pl.col("cluster") == profiler.placed["cluster"][4])
    assert set(peers["user_id"]) == set(same["user_id"]) - {5}
    assert peers["distance"].is_sorted()


def test_profiles_are_json(model, people):
    import json

    from fincoach.show import plain

    text = json.dumps(plain(SegmentProfiler(model, people[0]).to_dict()), allow_nan=False)
    assert len(json.loads(text)["segments"]) == 5
