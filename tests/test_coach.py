"""The page about one person's own money: its figures are sums of rows, its text is escaped, it reaches nowhere."""

import re
import subprocess
import sys
from dataclasses import replace
from datetime import date, timedelta
from html.parser import HTMLParser

import polars as pl
import pytest
from conftest import ROOT

from fincoach.data.population import generate
from fincoach.data.source import FILES, REJECTS, Source, SourceError, all_tables
from fincoach.data.tables import CATEGORY_ID, SEGMENTS
from fincoach.data.validate import Finding
from fincoach.serving.artifacts import promote, publish
from fincoach.serving.coach import _changes, _money, coach
from fincoach.serving.inference import Cluster, FeatureScaling, SegmentationParameters, assign

SPENDING = ["rent", "utilities", "insurance", "groceries", "transport", "health", "education", "uncategorised", "dining", "shopping", "entertainment", "travel", "subscriptions", "personal_care", "gifts", "cash", "debt_payment", "fees"]
INCOME = ["salary", "benefits", "interest", "other_income"]
HOSTILE = "<script>alert(1)</script><img src=//evil.example/x onerror=a>\"'&"


@pytest.fixture(scope="module")
def population():
    return generate(people=6, days=800, seed=31)


def one(population, user_id):
    frames = {n: f.filter(pl.col("id" if n == "users" else "user_id") == user_id) for n, f in population.frames.items() if n in ("users", "user_profiles", "transactions")}
    return Source("own", frames | {"categories": population.frames["categories"]})


@pytest.fixture(scope="module")
def source(population):
    return one(population, 2)


@pytest.fixture(scope="module")
def rows(source):
    """The rows with their local day and category, made without the module under test."""
    zone = source.frames["users"]["timezone"][0]
    names = {v: k for k, v in CATEGORY_ID.items()}
    return source.frames["transactions"].with_columns(
        day=pl.col("occurred_at").dt.convert_time_zone(zone).dt.date(), category=pl.col("category_id").replace_strict(names, return_dtype=pl.String))


def with_rows(source, rows, **more):
    return replace(source, frames=source.frames | {"transactions": rows.select(source.frames["transactions"].columns)}, **more)


class Reader(HTMLParser):
    """Checks that elements are balanced, and collects tags, attributes and text."""

    VOID = frozenset(["meta", "link", "br", "img", "line", "polyline", "polygon"])

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.ids = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def looked_at(page):
    """The page as a reader sees it, after the checks that every page must pass."""
    text = page.to_html()
    found = Reader(text)
    assert not found.tags & {"script", "iframe", "img", "object", "form", "base"}
    assert not [a for a in found.attributes if a[0].startswith("on") or (a[0] in ("src", "href") and not re.match(r"#|data:,", a[1] or ""))]
    assert not re.search(r"url\(|@import|https?:|//[a-z]", re.search(r"<style>(.*?)</style>", text, re.S)[1])
    assert len(found.ids) == len(set(found.ids))
    assert {v[1:] for k, v in found.attributes if k == "href" and v.startswith("#")} <= set(found.ids)
    assert len(text) < 500_000
    assert "nan" not in " ".join(found.words).lower().split()
    assert "None" not in " ".join(found.words)
    assert all(v for k, v in found.attributes if k == "aria-label")
    return found, " ".join(" ".join(found.words).split())


def test_totals_and_months_are_sums_of_the_rows(source, rows):
    page = coach(source)
    _, text = looked_at(page)
    income = int(rows.filter(pl.col("category").is_in(INCOME))["amount_minor"].sum())
    spending = -int(rows.filter(pl.col("category").is_in(SPENDING))["amount_minor"].sum())
    saved = -int(rows.filter(pl.col("category") == "savings")["amount_minor"].sum())
    assert (page.totals["income"], page.totals["spending"], page.totals["saved"], page.totals["net"]) == (income, spending, saved, int(rows["amount_minor"].sum()))
    for amount in (income, -spending, int(rows["amount_minor"].sum())):
        assert _money(amount, "EUR", sign=True) in text
    for m in page.months:
        theirs = rows.filter((pl.col("day").dt.year() == m["month"].year) & (pl.col("day").dt.month() == m["month"].month))
        assert m["rows"] == len(theirs)
        assert m["income"] == int(theirs.filter(pl.col("category").is_in(INCOME))["amount_minor"].sum())
        assert m["spending"] == -int(theirs.filter(pl.col("category").is_in(SPENDING))["amount_minor"].sum())


def test_categories_and_merchants_are_sums_of_the_last_year(source, rows):
    page = coach(source)
    _, text = looked_at(page)
    last = rows.filter((pl.col("day") >= page.since) & pl.col("category").is_in(SPENDING))
    assert 364 <= (page.as_of - page.since).days + 1 <= 367
    for c in page.categories:
        assert c["recent"] == -int(last.filter(pl.col("category") == c["category"])["amount_minor"].sum())
        assert not c["recent"] or _money(c["recent"], "EUR") in text
    best = last.group_by("merchant").agg(-pl.col("amount_minor").sum()).sort("amount_minor", descending=True).row(0)
    assert (page.merchants[0]["merchant"], page.merchants[0]["amount"]) == best
    unknown = last.filter(pl.col("category") == "uncategorised")
    assert page.unknown["rows"] == len(unknown)
    assert page.unknown["share_of_money"] == pytest.approx(unknown["amount_minor"].abs().sum() / last["amount_minor"].abs().sum())


def test_transfers_are_not_counted(source, rows):
    before = coach(source).totals
    pair = rows.head(2).with_columns(amount_minor=pl.Series([-500_00, 500_00]), category_id=pl.lit(CATEGORY_ID["transfer"], pl.Int64), account=pl.Series(["a", "b"]), id=pl.Series([10**6, 10**6 + 1]))
    after = coach(with_rows(source, pl.concat([rows, pair]))).totals
    assert {k: after[k] for k in ("income", "spending", "saved", "transfer", "net")} == {k: before[k] for k in ("income", "spending", "saved", "transfer", "net")}


def test_steady_weeks_are_whole_weeks(source, rows):
    page = coach(source)
    for w in page.weeks:
        theirs = rows.filter(pl.col("day").is_between(w["monday"], w["monday"] + timedelta(days=6)) & pl.col("category").is_in(SPENDING))
        assert w["monday"].weekday() == 0
        assert w["spending"] == -int(theirs["amount_minor"].sum())
    inside = sum(page.steady["weeks"]["low"] <= w["spending"] <= page.steady["weeks"]["high"] for w in page.weeks)
    assert 0.4 <= inside / len(page.weeks) <= 0.6


def test_streams_sum_to_what_is_told(source):
    page = coach(source)
    _, text = looked_at(page)
    out = [s for s in page.streams if s["status"] != "ended" and s["direction"] == "out" and s["flow"] == "spending"]
    assert out
    assert page.stream_totals["out_yearly"] == sum(-s["yearly"] for s in out)
    assert f"about {_money(page.stream_totals['out_monthly'], 'EUR', False)} a month" in text
    monthly = next(s for s in out if s["frequency"] == "monthly")
    assert abs(monthly["monthly"] - monthly["amount_minor"]) <= abs(monthly["amount_minor"]) * 0.001 + 1


def test_balances_meet_the_files_to_the_cent(source, rows):
    middle = rows["day"].sort()[len(rows) // 2]
    first = int(rows.filter(pl.col("day") <= middle)["amount_minor"].sum())
    line = lambda file, start, end, opening, closing: {"file": file, "format": "camt", "account": "current", "currency": "EUR", "rows": 1, "kept": 1, "duplicates": 0, "rejected": 0,  # noqa: E731
                                                       "first": start, "last": end, "opening": opening, "closing": closing, "balanced": True}
    files = [line("a.xml", rows["day"].min(), middle, 10_000, 10_000 + first), line("b.xml", middle + timedelta(days=1), rows["day"].max(), None, 10_000 + int(rows["amount_minor"].sum()))]
    page = coach(replace(source, files=pl.DataFrame(files, schema=FILES)))
    (balance,) = page.balances
    assert balance["closing"] == 10_000 + int(rows["amount_minor"].sum())
    assert balance["checked"] == 2
    assert not balance["off"]
    assert "It meets the 2 balances stated in the files, to the cent." in looked_at(page)[1]
    files[1]["closing"] += 1
    page = coach(replace(source, files=pl.DataFrame(files, schema=FILES)))
    assert [o["off"] for o in page.balances[0]["off"]] == [1]
    assert "It misses 1 of 2 balances" in looked_at(page)[1]


def test_currencies_are_kept_apart(source, rows):
    mixed = rows.with_columns(currency=pl.when(pl.col("id") % 3 == 0).then(pl.lit("JPY")).otherwise("currency"))
    page = coach(with_rows(source, mixed))
    found, text = looked_at(page)
    assert page.totals["net"] == int(mixed.filter(pl.col("currency") == "EUR")["amount_minor"].sum())
    (other,) = page.others
    assert other["currency"] == "JPY"
    assert other["net"] == int(mixed.filter(pl.col("currency") == "JPY")["amount_minor"].sum())
    assert "currencies" in found.ids
    assert _money(other["net"], "JPY", sign=True) in text
    assert "¥" in text


def test_hostile_names_stay_text(source, rows):
    evil = rows.with_columns(merchant=pl.lit(HOSTILE), account=pl.lit("<b>acc"))
    file = pl.DataFrame([("<i>f.csv", "csv", "<b>acc", "EUR", 1, 1, 0, 1, rows["day"].min(), rows["day"].max(), 0, 5, False)], schema=FILES, orient="row")
    page = coach(with_rows(source, evil, files=file, rejects=pl.DataFrame([("<i>f.csv", 3, "amount", "<u>no", HOSTILE)], schema=REJECTS, orient="row"),
                           findings=(Finding("error", "<i>f.csv", "<u>", "<s>", 1, (HOSTILE,), HOSTILE),)))
    found, text = looked_at(page)
    assert HOSTILE in text
    assert not found.tags & {"u", "s", "script"}
    assert "<i>f.csv" in text


def test_what_could_not_be_read_is_told(source):
    findings = (Finding("error", "scan.pdf", "", "not a statement", 1, ("page 1",), "Download it as CSV."), Finding("note", "x.csv", "date", "gap", 3, (), "Get March."))
    rejects = pl.DataFrame([("x.csv", 17, "amount", "not a number", "12,,5")], schema=REJECTS, orient="row")
    nothing = coach(Source("folder", all_tables(), findings=findings, rejects=rejects))
    _, text = looked_at(nothing)
    for words in ("Nothing to add up yet", "scan.pdf", "Download it as CSV.", "Get March.", "x.csv, row 17", "not a number", "12,,5"):
        assert words in text
    assert nothing.totals["rows"] == 0
    assert nothing.segment is None
    assert "12,,5" in looked_at(coach(replace(source, findings=findings, rejects=rejects)))[1]


@pytest.mark.parametrize("keep", [1, 2, 5, 40])
def test_few_rows(source, rows, keep):
    page = coach(with_rows(source, rows.head(keep)))
    _, text = looked_at(page)
    assert page.totals["rows"] == keep
    assert page.changes["why_not"]
    assert "eight whole weeks" in text
    assert page.segment["segment"] in ("Not enough data", "Unclassified") or keep >= 10


def test_no_income_no_spending_no_merchant(source, rows):
    page = coach(with_rows(source, rows.filter(pl.col("amount_minor") < 0)))
    assert page.totals["income"] <= 0
    assert "No income" in looked_at(page)[1]
    assert "no spending" in looked_at(coach(with_rows(source, rows.filter(pl.col("category") == "salary"))))[1]
    assert "(no name)" in looked_at(coach(with_rows(source, rows.with_columns(merchant=pl.lit(None, pl.String), account=pl.lit(None, pl.String), category_id=pl.lit(None, pl.Int64)))))[1]


def test_later_rows_do_not_count(source, rows):
    day = rows["day"].sort()[len(rows) // 2]
    cut = with_rows(source, rows.filter(pl.col("day") <= day))
    page = coach(source, as_of=day)
    assert page.later == int((rows["day"] > day).sum()) > 0
    assert replace(page, later=0).to_html() == coach(cut, as_of=day).to_html()


def test_same_rows_same_bytes_in_any_order(source, rows):
    text = coach(source).to_html()
    assert coach(with_rows(source, rows.sample(fraction=1, shuffle=True, seed=3))).to_html() == text


def test_a_change_beyond_the_noise_is_told_and_noise_is_not(population):
    """A level that triples is told with its size; the same months in which nothing happened tell of nothing."""
    months = [{"month": date(2024 + n // 12, n % 12 + 1, 1), "full": True, "income": 3000_00, "spending": 900_00 + (n * 37 % 11) * 5_00} for n in range(20)]
    quiet = [{"category": "dining", "months": [200_00 + (n * 53 % 7) * 9_00 for n in range(20)]}, {"category": "travel", "months": [0 if n % 4 else 150_00 for n in range(20)]}]
    assert not [s for s in _changes(months, quiet)["series"] if s["told"]]
    quiet[0]["months"][-3:] = [600_00, 640_00, 610_00]
    (told,) = [s for s in _changes(months, quiet)["series"] if s["told"]]
    assert told["name"] == "dining"
    assert 350_00 < told["difference"] < 420_00
    months[-1]["full"] = False
    assert _changes(months, quiet)["to"] == date(2025, 7, 31)
    assert _changes(months[:8], [])["why_not"]


def test_rules_answer_where_there_is_no_model(source, tmp_path):
    page = coach(source, artifacts=tmp_path)
    _, text = looked_at(page)
    assert page.segment["method"] == "rules"
    assert "simple rules" in text
    assert "made-up people" in text


@pytest.mark.parametrize(("made_up", "said"), [(True, "made-up people"), (False, "other people's real rows")])
def test_the_champion_answers_where_there_is_one(source, tmp_path, made_up, said):
    """The page gives the model's own probability, its version, and how many people it learned from; an altered model is not believed."""
    scaling = (FeatureScaling("savings_rate", "linear", 0.0, 0.0, 0.2, 3.0), FeatureScaling("essential_share", "linear", 0.5, 0.5, 0.2, 3.0))
    clusters = tuple(Cluster(k, name, 0.9, 0.5, (2.0 * k - 1, 0.0)) for k, name in enumerate(SEGMENTS[:2]))
    parameters = SegmentationParameters("2026-01-01-test", date(2026, 1, 1), scaling, clusters, 2.0, 0.1)
    path = publish(tmp_path, "segmentation", parameters.version, {"segmentation.json": parameters.to_json().encode()}, {"people": 321, "as_of": "2026-01-01", "made_up": made_up})
    promote(tmp_path, "segmentation", parameters.version)
    page = coach(source, artifacts=tmp_path)
    _, text = looked_at(page)
    values = [[page.segment["features"][f.name] for f in scaling]]
    assert page.segment["method"] == "model"
    assert list(page.segment["probabilities"].values()) == pytest.approx(assign(parameters, values).probability[0])
    assert "2026-01-01-test" in text
    assert "321 people" in text
    assert said in text
    file = path / "segmentation.json"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(b"0.9", b"0.8"))
    assert coach(source, artifacts=tmp_path).segment["method"] == "rules"


def test_callers_mistakes(population, source):
    many = Source("all", {n: population.frames[n] for n in ("users", "user_profiles", "transactions", "categories")})
    with pytest.raises(SourceError, match="6 people"):
        coach(many)
    with pytest.raises(SourceError, match="database"):
        coach(Source("database"))


def test_saved_as_page_figures_and_months(source, tmp_path):
    page = coach(source)
    assert page.save(tmp_path / "a.html").read_text() == page.to_html()
    assert '"streams"' in page.save(tmp_path / "a.json").read_text()
    assert len(page.to_frame()) == len(page.months)
    assert "my-money.html" in page._repr_html_()


def test_no_heavy_import_and_no_clock():
    script = "import sys\nimport fincoach.serving.coach\nprint(*[m for m in ('torch', 'sklearn', 'pandas', 'matplotlib', 'plotly', 'seaborn', 'statsmodels') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.split() == []
    assert not re.search(r"\b(today|now|utcnow)\(|random", (ROOT / "fincoach/serving/coach.py").read_text())
