"""Judging data: every damage is found and named, clean data are left alone, and memory does not grow with the rows."""

import math
import random
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fincoach.data.export import write_snapshot
from fincoach.data.population import generate
from fincoach.data.tables import TABLES
from fincoach.data.validate import (
    PERSON_SCORE,
    SEVERITIES,
    DataValidator,
    Finding,
    blocks,
    findings_frame,
    history,
    holes,
    merge_names,
    minimum_data,
    name_key,
    quality_report,
    usual_days,
    usual_sizes,
)

UTC_TIME = pl.Datetime("us", "UTC")


@pytest.fixture(scope="module")
def population():
    return generate(60, 200, 3).frames


@pytest.fixture(scope="module")
def snapshot(population, tmp_path_factory):
    return write_snapshot(population, tmp_path_factory.mktemp("snapshots"))


def rules(data, as_of=None) -> dict[str, Finding]:
    return {f.rule: f for f in DataValidator(data, as_of).validate_transaction_completeness()}


def damaged(frames: dict, change) -> dict:
    return frames | {"transactions": change(frames["transactions"])}


def test_a_healthy_population_has_no_errors_or_warnings(population):
    found = DataValidator(population).validate_transaction_completeness()
    assert [str(f) for f in found if f.severity != "note"] == []


def test_a_snapshot_is_judged_like_its_frames(population, snapshot):
    one, other = quality_report(population), quality_report(snapshot)
    assert one.to_dict() == other.to_dict()
    assert one.to_html() == other.to_html()


def test_small_blocks_give_the_same_survey(population):
    from fincoach.data import validate

    whole, parts = validate._survey(population), validate._survey(population, rows=500)
    assert len(list(blocks(population, 500))) > 10
    for name in ("people", "days", "categories", "outliers"):
        assert getattr(whole, name).equals(getattr(parts, name)), name
    assert whole.nulls == parts.nulls


DAMAGE = {
    "missing": lambda t: t.with_columns(pl.when(pl.col("id") == 5).then(None).otherwise("amount_minor").alias("amount_minor")),
    "unknown person": lambda t: t.with_columns(pl.when(pl.col("id") == 5).then(9999).otherwise("user_id").alias("user_id")),
    "unknown category": lambda t: t.with_columns(pl.when(pl.col("id") == 5).then(999).otherwise("category_id").alias("category_id")),
    "repeated row": lambda t: pl.concat([t, t.head(1).with_columns(pl.lit(10**6, pl.Int64).alias("id"))]),
    "not the person's": lambda t: t.with_columns(pl.when(pl.col("id") == 5).then(pl.lit("USD")).otherwise("currency").alias("currency")),
    "far from the rest": lambda t: t.with_columns(pl.when(pl.col("id") == 5).then(datetime(2099, 12, 31, tzinfo=UTC)).otherwise("occurred_at").cast(UTC_TIME).alias("occurred_at")),
    "zero": lambda t: t.with_columns(pl.when(pl.col("id") == 5).then(0).otherwise("amount_minor").alias("amount_minor")),
}


@pytest.mark.parametrize("rule", DAMAGE)
def test_one_damaged_row_is_found_and_counted(population, rule):
    assert rule not in rules(population)
    assert rules(damaged(population, DAMAGE[rule]))[rule].count == 1


def test_a_missing_week_is_a_hole(population):
    day = population["transactions"]["occurred_at"].dt.date().median()
    gap = damaged(population, lambda t: t.filter(~pl.col("occurred_at").dt.date().is_between(day, day + timedelta(days=6))))
    assert rules(gap)["hole"].count in (6, 7)  # the person's day may begin in the UTC day before


def test_signs_that_are_turned_are_noticed(population):
    turned = rules(damaged(population, lambda t: t.with_columns(-pl.col("amount_minor"))))
    assert {"spending that comes in", "income that goes out"} <= set(turned)


def test_a_stray_date_does_not_move_the_day_of_judgement(population):
    before = DataValidator(population).as_of
    assert DataValidator(damaged(population, DAMAGE["far from the rest"])).as_of == before


def test_an_amount_a_hundred_times_too_large_is_found_and_others_are_not(population):
    normal = DataValidator(population).detect_outliers()
    assert len(normal) < len(population["transactions"]) / 200
    kinds = population["categories"].select(pl.col("id").alias("category_id"), "kind")
    rows = population["transactions"].join(kinds, on="category_id").filter(pl.col("kind") == "essential")["id"].sample(20, seed=1).to_list()
    cents = damaged(population, lambda t: t.with_columns(pl.when(pl.col("id").is_in(rows)).then(pl.col("amount_minor") * 100).otherwise("amount_minor").alias("amount_minor")))
    found = DataValidator(cents).detect_outliers()
    hit = set(rows) & set(found["id"])
    assert len(hit) >= 6  # euros as cents: those that were small stay within what people pay
    assert set(found.filter(~pl.col("id").is_in(rows))["id"]) <= set(normal["id"])


def test_outlier_scores_do_not_depend_on_the_unit(population):
    """Cents or tenths of a cent: the same rows, the same scores but for rounding to one percent."""
    one = DataValidator(population).detect_outliers().sort("id")
    ten = DataValidator(damaged(population, lambda t: t.with_columns(pl.col("amount_minor") * 10))).detect_outliers().sort("id")
    both = one.join(ten, on="id", suffix="_ten").drop_nulls("score_ten")
    assert len(both)
    assert ((both["score"] - both["score_ten"]).abs() < 0.2).all()
    for a, b in ((one, ten), (ten, one)):  # a row that only one flags is at the threshold
        assert (a.join(b, on="id", how="anti")["score"] < PERSON_SCORE + 0.2).all()


def test_usual_sizes_agree_with_exact_medians(population):
    kinds = population["categories"].select(pl.col("id").alias("category_id"), "kind")
    size = population["transactions"].filter(pl.col("amount_minor") != 0).join(kinds, on="category_id").with_columns(pl.col("amount_minor").abs().log().alias("size"))
    exact = size.group_by("kind", "currency").agg(pl.col("size").median().alias("exact"))
    both = usual_sizes(population).join(exact, on=["kind", "currency"])
    assert len(both) >= 5
    assert ((both["middle"] - both["exact"]).abs() <= 0.03).all()


def test_someone_who_always_pays_the_same_may_change_a_little():
    users = pl.DataFrame({"id": [1], "external_id": ["a"], "timezone": ["UTC"], "currency": ["EUR"]})
    random.seed(1)
    amounts = [-1000] * 40 + [-1500] + [-round(1000 * math.exp(random.gauss(0, 0.7))) for _ in range(200)]
    moves = pl.DataFrame({"id": range(241), "user_id": [1] * 41 + [2] * 200, "amount_minor": amounts, "category_id": 8, "currency": "EUR", "merchant": "x",
                          "occurred_at": [datetime(2025, 1, 1, 9, tzinfo=UTC) + timedelta(hours=7 * i) for i in range(241)]}, schema_overrides={"occurred_at": UTC_TIME})
    kinds = pl.DataFrame({"id": [8], "name": ["groceries"], "kind": ["essential"]})
    found = DataValidator({"users": users, "transactions": moves, "categories": kinds}).detect_outliers()
    assert 40 not in found["id"].to_list()
    assert (found["score"].fill_null(99) > PERSON_SCORE).all()


# Gate


def people(*zones) -> pl.DataFrame:
    return pl.DataFrame({"id": range(1, len(zones) + 1), "external_id": [f"p{i}" for i in range(len(zones))], "timezone": list(zones)}, schema_overrides={"id": pl.Int64})


def moves(*stamps) -> pl.DataFrame:
    return pl.DataFrame({"user_id": [u for u, _ in stamps], "occurred_at": [t for _, t in stamps]}, schema={"user_id": pl.Int64, "occurred_at": UTC_TIME})


def test_days_are_counted_on_the_persons_calendar():
    """23:30 UTC on 1 January is 2 January in Tokyo and still 1 January in New York; as of 3 January it is 2 and 3 days."""
    data = {"users": people("Asia/Tokyo", "America/New_York"), "transactions": moves((1, datetime(2025, 1, 1, 23, 30, tzinfo=UTC)), (2, datetime(2025, 1, 1, 23, 30, tzinfo=UTC)))}
    assert history(data, date(2025, 1, 3))["days"].to_list() == [2, 3]


def test_the_day_ends_on_the_persons_clock():
    late = datetime(2025, 1, 4, 2, tzinfo=UTC)  # the evening of the 3rd in New York, the 4th elsewhere
    data = {"users": people("UTC", "America/New_York"), "transactions": moves((1, late), (2, late))}
    assert history(data, date(2025, 1, 3))["transactions"].to_list() == [0, 1]


def test_days_over_a_change_of_clocks():
    first = datetime(2025, 10, 20, 22, 30, tzinfo=UTC)  # half past midnight of the 21st in Berlin
    assert history({"users": people("Europe/Berlin"), "transactions": moves((1, first))}, date(2025, 11, 1))["days"].item() == 12


@pytest.mark.parametrize(("need", "passed"), [(2, True), (3, False)])
def test_the_gate_counts_people_who_have_both(need, passed):
    start = datetime(2025, 1, 1, 12, tzinfo=UTC)
    long = [(u, start + timedelta(days=3 * i)) for u in (1, 2) for i in range(31)]
    burst = [(3, start + timedelta(days=80, minutes=i)) for i in range(40)]
    slow = [(4, start + timedelta(days=20 * i)) for i in range(5)]
    gate = minimum_data({"users": people(*["UTC"] * 5), "transactions": moves(*long, *burst, *slow)}, date(2025, 4, 1), min_people=need)
    assert gate.user_ids == (1, 2)
    assert gate.passed is passed
    assert gate.lacking.select("user_id", "lacks").rows() == [(3, "79 more days"), (4, "25 more transactions"), (5, "90 more days, 30 more transactions")]
    assert ("1 more" in gate.sentence) is not passed


def test_nobody_never_passes():
    gate = minimum_data({"users": people(), "transactions": moves()}, date(2025, 1, 1), min_people=0)
    assert not gate.passed
    assert gate.people == 0


def test_a_zone_that_is_none_is_named():
    with pytest.raises(ValueError, match="'Mars/Base' is no time zone"):
        minimum_data({"users": people("Mars/Base"), "transactions": moves()}, date(2025, 1, 1))


def test_later_rows_change_nothing(population):
    day = date(2024, 10, 1)
    altered = damaged(population, lambda t: t.filter(pl.col("occurred_at").dt.date() <= date(2024, 10, 2)))
    one, other = (minimum_data(d, day, 60, 20, 10) for d in (population, altered))
    assert one.user_ids == other.user_ids
    assert one.lacking.equals(other.lacking)


# Names


@given(st.text(max_size=30))
@settings(deadline=None)
def test_a_key_ignores_case_space_and_composition(text):
    import unicodedata

    assert name_key(f"  {text} ") == name_key(text)
    assert name_key(unicodedata.normalize("NFD", text)) == name_key(unicodedata.normalize("NFC", text))
    assert name_key(name_key(text)) == name_key(text)


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(1, 9)), max_size=12, unique_by=lambda p: p[0]))
@settings(deadline=None)
def test_merging_is_stable_and_done_once(pairs):
    """Cleaning twice is cleaning once, and row order does not matter."""
    counts = pl.DataFrame(pairs, schema={"name": pl.String, "rows": pl.Int64}, orient="row")
    mapping = dict(merge_names(counts).select("name", "clean").iter_rows())
    assert mapping == dict(merge_names(counts.reverse()).select("name", "clean").iter_rows())
    again = counts.with_columns(pl.col("name").replace(mapping)).group_by("name").agg(pl.col("rows").sum())
    assert merge_names(again).is_empty()


def test_categories_that_differ_in_spelling_merge_and_contradictions_do_not(population):
    more = pl.DataFrame({"id": [100, 101], "name": ["Personal Care", "Rent "], "kind": ["discretionary", "discretionary"]})
    moved = population["transactions"].with_columns(pl.when(pl.col("id") < 4).then(100).otherwise("category_id").alias("category_id"))
    cleaned = DataValidator(population | {"categories": pl.concat([population["categories"], more]), "transactions": moved}).clean_categorical_data()
    assert {f.rule: f.count for f in cleaned.findings if f.table == "categories"} == {"merged": 1, "two kinds": 2}
    names = dict(cleaned.tables["categories"].select("id", "name").iter_rows())
    assert {names[i] for i in cleaned.tables["transactions"].filter(pl.col("id") < 4)["category_id"]} == {"personal_care"}
    assert cleaned.tables["transactions"]["amount_minor"].sum() == moved["amount_minor"].sum()


# Report


HOSTILE = st.sampled_from(["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "javascript:alert(1)", "</style><script>", "&lt;", "\u202e", "x" * 200])


@given(name=HOSTILE, merchant=HOSTILE)
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_report_shows_text_as_text(population, name, merchant):
    few = pl.col("user_id") <= 5
    frames = {name: frame.filter(few) if "user_id" in frame.columns else frame for name, frame in population.items()}
    population = frames | {"users": frames["users"].filter(pl.col("id") <= 5)}
    frames = population | {"users": population["users"].with_columns(pl.lit(name).alias("external_id")),
                           "transactions": population["transactions"].with_columns(pl.lit(merchant).alias("merchant"), pl.when(pl.col("id") == 9).then(-10**9).otherwise("amount_minor").alias("amount_minor"))}
    page = quality_report(frames, findings=(Finding("error", name, merchant, "rule", 1, (merchant,), name),), min_history_days=9999).to_html()
    assert "<script" not in page
    assert "<img" not in page


def test_the_saved_page_is_complete_and_offline(population, tmp_path):
    import json
    import re

    path = quality_report(population).save(tmp_path / "quality")
    text = path.read_text()
    assert path == tmp_path / "quality/quality.html"
    assert "<script" not in text
    assert text.count("<svg") == 2
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert json.loads((tmp_path / "quality/quality.json").read_text())["enough"] is True


def test_every_shape_of_little_data_gives_a_report(population):
    """Nothing at all, one row, one person: a report that says so, never a traceback."""
    empty = {name: population[name].head(0) if name in population and name != "categories" else pl.DataFrame(schema={c.name: pl.String for c in TABLES[name].columns})
             for name in TABLES} | {"categories": population["categories"]}
    one = population | {"transactions": population["transactions"].head(1)}
    assert "not enough" in repr(quality_report(empty))
    assert "no rows" in rules(empty)
    assert "not enough" in repr(quality_report(one))
    assert quality_report({k: population[k] for k in ("users", "categories", "transactions")}).gate.passed


def test_findings_are_sorted_worst_first():
    found = [Finding(s, "t", "f", "r", n) for n, s in enumerate(reversed(SEVERITIES))]
    assert findings_frame(found)["severity"].to_list() == list(SEVERITIES)


@given(st.sets(st.integers(0, 60), min_size=1))
@settings(deadline=None)
def test_holes_are_exactly_the_days_without_rows(there):
    first = date(2025, 1, 1)
    frame = pl.DataFrame({"day": [first + timedelta(days=d) for d in there], "rows": 1}, schema_overrides={"day": pl.Date})
    found = holes(frame, first, first + timedelta(days=60))
    assert found["length"].sum() == 61 - len(there)
    assert all((b - a).days + 1 == n for a, b, n in found.iter_rows())


@given(st.lists(st.integers(0, 3000), min_size=20, max_size=60))
@settings(deadline=None)
def test_usual_days_keep_at_least_98_percent(offsets):
    days = pl.Series("day", [date(2020, 1, 1) + timedelta(days=d) for d in offsets])
    counts = days.value_counts(name="rows")
    low, high = usual_days(counts)
    assert (~days.is_between(low, high)).sum() <= 2 * max(1, len(days) // 100)
