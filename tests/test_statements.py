"""Statements in any number, format and order become one person's rows: each once, none lost, and all that was decided is told."""

import os
import random
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
import statement_files as bank
from hypothesis import given, settings
from hypothesis import strategies as st

from fincoach.data import database
from fincoach.data.categorise import categorise, clean_merchants, read_corrections, read_rules, remember
from fincoach.data.source import FILES, SourceError, Statement, statement_rows
from fincoach.data.sources import read_source
from fincoach.data.statements import detect, merge, read_statements
from fincoach.data.tables import CATEGORIES, CATEGORY_ID
from fincoach.data.validate import usual_days

NAMES = {c.id: c.name for c in CATEGORIES}
MONDAY = date(2025, 3, 3)


def paper(file, records, account="DE89370400440532013000", form="ofx 2.0.3", currency="EUR", **kw):
    """A statement of (day number, amount[, payee[, bank id[, balance]]]) records; day 0 is a Monday."""
    rows = [{"row": n, "day": MONDAY + timedelta(r[0]), "amount_minor": r[1], "currency": currency, "payee": r[2] if len(r) > 2 else "Somebody",
             "bank_id": r[3] if len(r) > 3 else None, "balance_minor": r[4] if len(r) > 4 else None} for n, r in enumerate(records, 1)]
    return Statement(file, form, account, currency, statement_rows(rows), **kw)


def table(source):
    """What a source's rows say, without the numbers of a database."""
    return source.frames["transactions"].select("occurred_at", "amount_minor", "currency", "merchant", "account", "external_id", "category_id")


def rules_of(source, *severities):
    return {f.rule for f in source.findings if not severities or f.severity in severities}


def amounts(source):
    return sorted(source.frames["transactions"]["amount_minor"])


def categories(source):
    return [NAMES[i] for i in source.frames["transactions"]["category_id"]]


# --- duplicates -----------------------------------------------------------------------------------------------------------


@st.composite
def split_accounts(draw):
    """Days of rows with many equal ones, and windows of days that overlap and together cover all, in some order."""
    days = draw(st.integers(3, 25))
    coin = st.tuples(st.integers(0, days - 1), st.sampled_from([-350, -350, -1200, 900]), st.sampled_from(["Cafe Rot", "Kiosk", "Cafe Rot"]))
    rows = sorted(draw(st.lists(coin, min_size=1, max_size=40)), key=lambda r: r[0])
    cuts = sorted(draw(st.sets(st.integers(1, days - 1), max_size=4)))
    windows = [(a - draw(st.integers(0, 3)), b + draw(st.integers(0, 3))) for a, b in zip([0, *cuts], [*cuts, days], strict=True)]
    return rows, draw(st.permutations(windows)), draw(st.booleans())


@settings(max_examples=40, deadline=None)
@given(split_accounts())
def test_overlapping_files_in_any_order_are_the_whole(case):
    rows, windows, numbered = case
    rows = [(*r, f"id{n}" if numbered else None) for n, r in enumerate(rows)]
    whole = merge([paper("all.ofx", rows)])
    parts = [paper(f"{n}.ofx", [r for r in rows if a <= r[0] < b]) for n, (a, b) in enumerate(windows)]
    assert table(merge(parts)).equals(table(whole))
    assert len(whole.frames["transactions"]) == len(rows)


@settings(max_examples=30, deadline=None)
@given(split_accounts(), st.randoms())
def test_numbered_rows_may_be_cut_anywhere(case, dice):
    rows = [(*r, f"id{n}") for n, r in enumerate(case[0])]
    parts = [[r for r in rows if dice.random() < 0.5] for _ in range(3)]
    parts.append([r for r in rows if not any(r in p for p in parts)])
    merged = merge([paper(f"{n}.ofx", p) for n, p in enumerate(parts) if p])
    assert table(merged).equals(table(merge([paper("all.ofx", rows)])))


@settings(max_examples=30, deadline=None)
@given(split_accounts())
def test_two_formats_of_one_account_are_one(case):
    """Other numbers, texts cut and written otherwise: still each row once, with the same number of its own."""
    rows, windows, _ = case
    bare = paper("all.csv", [(d, a, f"KARTENZAHLUNG {p.upper()} 4711") for d, a, p in rows], form="csv:n26")
    parts = [paper(f"{n}.ofx", [(*r, f"F{k}") for k, r in enumerate(rows) if a <= r[0] < b]) for n, (a, b) in enumerate(windows)]
    merged = merge([bare, *parts])
    assert amounts(merged) == sorted(r[1] for r in rows)
    assert set(merged.frames["transactions"]["external_id"]) == set(merge([bare]).frames["transactions"]["external_id"])
    assert merged.files["kept"].sum() == len(rows)
    assert merged.files["rows"].sum() == merged.files["kept"].sum() + merged.files["duplicates"].sum()


def test_two_equal_coffees_stay_two_and_how_they_were_recognised_is_told():
    rows = [(0, -350, "Cafe Rot"), (0, -350, "Cafe Rot"), (1, -900, "Lidl")]
    one, other = paper("a.ofx", rows), paper("b.ofx", rows)
    merged = merge([one, other])
    assert amounts(merged) == [-900, -350, -350]
    told = [f for f in merged.findings if f.rule == "duplicate"]
    assert len(told) == 1
    assert told[0].count == 3
    assert "text: 3" in told[0].advice
    numbered = [paper(f, [(*r, f"n{k}") for k, r in enumerate(rows)]) for f in ("a.ofx", "b.ofx")]
    assert "number: 3" in next(f.advice for f in merge(numbered).findings if f.rule == "duplicate")


def test_a_row_in_one_file_only_is_never_dropped():
    """A third coffee, and another shop with the same amount on a day where one file was cut."""
    merged = merge([paper("a.ofx", [(0, -350, "Cafe"), (1, -350, "Cafe")]), paper("b.csv", [(1, -350, "Cafe"), (1, -350, "Cafe"), (2, -1, "x")], form="csv:n26")])
    assert amounts(merged) == [-350, -350, -350, -1]
    edge = merge([paper("a.ofx", [(0, -1, "Alpha"), (1, -350, "Bakery")]), paper("b.csv", [(1, -350, "Florist"), (2, -1, "Beta")], form="csv:n26")])
    assert amounts(edge) == [-350, -350, -1, -1]
    assert "possible duplicate" in rules_of(edge, "warning")


def test_numbers_that_start_anew_in_every_file_are_not_trusted():
    """A rent with the number 1 in every month stays; rows in both files with other numbers count once."""
    march, april = [(0, -90000, "Rent", "1"), (1, -350, "Cafe", "2")], [(31, -90000, "Rent", "1"), (32, -350, "Cafe", "2")]
    assert len(table(merge([paper("m", march), paper("a", april)]))) == 4
    days = [(n, -100 - n, f"Shop {n}") for n in range(10)]
    first, second = ([(*r, str(k)) for k, r in enumerate(part)] for part in (days[:8], days[3:]))
    assert amounts(merge([paper("a", first), paper("b", second)])) == sorted(-100 - n for n in range(10))


def test_a_row_whose_day_the_bank_moved_is_one():
    assert len(table(merge([paper("a", [(0, -500, "Shop", "X1"), (1, -1, "y", "X2")]), paper("b", [(2, -500, "Shop", "X1"), (3, -2, "z", "X3")])]))) == 3


def test_dates_that_differ_between_formats_are_told_not_guessed():
    first = [(n, -1000 - n, "Shop") for n in range(0, 20, 2)]
    merged = merge([paper("a.ofx", first), paper("b.csv", [(d + 1, a, p) for d, a, p in first], form="csv:n26")])
    assert len(table(merged)) == 20
    assert next(f for f in merged.findings if f.rule == "possible duplicate").count >= 9


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)))
def test_order_of_files_does_not_matter(order):
    parts = [paper("a", [(0, -350), (1, 900)]), paper("b", [(1, 900), (2, -1)], form="csv:n26"), paper("c", [(0, 5000)], account="77777777"), paper("d", [(0, -1)], account="", form="csv:x")]
    source, again = merge(parts), merge([parts[i] for i in order])
    assert table(source).equals(table(again))
    assert source.files.equals(again.files)
    assert source.findings == again.findings


# --- accounts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["DE89 3704 0044 0532 0130 00", "0532013000", "532013000", "37040044/0532013000", "****3000", "xxxx-xxxx-3000", "DE89****3000", "Giro 3000"])
def test_one_account_written_in_many_ways(other):
    merged = merge([paper("a.ofx", [(0, -1), (1, -2)]), paper("b.csv", [(1, -2), (2, -3)], account=other, form="csv:n26")])
    assert set(merged.frames["transactions"]["account"]) == {"DE89370400440532013000"}
    assert amounts(merged) == [-3, -2, -1]


@pytest.mark.parametrize("other", ["DE12500105170648489890", "0532013001", "****3001", "Savings", "Giro"])
def test_other_accounts_stay_apart(other):
    merged = merge([paper("a.ofx", [(0, -1), (1, -2)]), paper("b.csv", [(1, -2), (2, -3)], account=other, form="csv:n26")])
    assert merged.frames["transactions"]["account"].n_unique() == 2
    assert len(table(merged)) == 4


def test_a_mask_that_fits_two_accounts_stays_apart_and_is_told():
    merged = merge([paper("a", [(0, -1)], account="11113000"), paper("b", [(0, -2)], account="22223000"), paper("c", [(0, -3)], account="****3000", form="csv:x")])
    assert merged.frames["transactions"]["account"].n_unique() == 3
    assert "account in doubt" in rules_of(merged, "warning")


def test_an_unnamed_file_is_known_by_its_rows():
    rows = [(n, -100 * n - 7, "Shop") for n in range(10)]
    merged = merge([paper("a.ofx", rows), paper("b.csv", rows[4:], account="", form="csv:n26")])
    assert len(table(merged)) == 10
    assert "account recognised" in rules_of(merged)
    apart = merge([paper("a.ofx", rows), paper("b.csv", [(d, a - 1, p) for d, a, p in rows], account="", form="csv:n26")])
    assert len(table(apart)) == 20
    assert apart.frames["transactions"]["account"].n_unique() == 2


def test_unnamed_files_of_one_layout_are_one_account_unless_they_contradict():
    january, february = [(n, -n - 1) for n in range(9)], [(n + 31, -n - 50) for n in range(9)]
    merged = merge([paper("jan", january, account="", form="csv:n26"), paper("feb", february, account="", form="csv:n26")])
    assert merged.frames["transactions"]["account"].n_unique() == 1
    assert "unnamed account" in rules_of(merged)
    other = merge([paper("giro", january, account="", form="csv:n26"), paper("card", [(n, -n - 50) for n in range(9)], account="", form="csv:n26")])
    assert other.frames["transactions"]["account"].n_unique() == 2
    assert len(table(other)) == 18


# --- sums -----------------------------------------------------------------------------------------------------------------


def test_opening_and_rows_are_closing_to_the_cent():
    right = merge([paper("a", [(0, -101), (1, 1)], opening_minor=1000, closing_minor=900)])
    assert right.files["balanced"].to_list() == [True]
    assert right.frames["user_profiles"]["opening_balance_minor"][0] == 1000
    wrong = merge([paper("a", [(0, -101), (1, 1)], opening_minor=1000, closing_minor=901)])
    assert wrong.files["balanced"].to_list() == [False]
    assert "0.01 EUR" in next(f for f in wrong.findings if f.rule == "opening + rows is not closing").advice
    assert merge([paper("a", [(0, -101)], closing_minor=5)]).files["balanced"].to_list() == [None]


@pytest.mark.parametrize("newest_first", [False, True])
def test_running_balances(newest_first):
    rows = [(0, -10, "a", None, 90), (0, -10, "a", None, 80), (2, 50, "b", None, 130)]
    rows = rows[::-1] if newest_first else rows
    good = merge([paper("a", rows)])
    assert good.files.select("opening", "closing", "balanced").row(0) == (100, 130, True)
    del rows[1]
    assert "running balance jumps" in rules_of(merge([paper("a", rows)]), "error")


def test_a_missing_month_is_told_with_what_it_is_worth():
    def month(n, opening, *records):
        first = date(2025, n, 1)
        last = date(2025, n + 1, 1) - timedelta(1)
        rows = [((date(2025, n, d) - MONDAY).days, a) for d, a in records]
        return paper(f"{n}.ofx", rows, opening_minor=opening, closing_minor=opening + sum(a for _, a in records), opens=first, closes=last)

    whole = [month(1, 1000, (5, -100)), month(2, 900, (7, -300)), month(3, 600, (3, -50))]
    assert not {"gap between statements", "balances do not join"} & rules_of(merge(whole))
    holed = merge([whole[0], whole[2]])
    gap = next(f for f in holed.findings if f.rule == "gap between statements")
    assert gap.examples == ("2025-02-01 to 2025-02-28",)
    assert "-3.00 EUR" in gap.advice
    quiet = merge([whole[0], replace(whole[2], opening_minor=900, closing_minor=850)])
    assert "gap between statements" not in rules_of(quiet), "the balances prove that nothing happened"
    jump = merge([whole[0], replace(whole[1], opening_minor=950, closing_minor=650), whole[2]])
    assert "balances do not join" in rules_of(jump, "error")


def test_opening_is_known_only_when_all_accounts_begin_together():
    a = paper("a", [(0, -1)], opening_minor=100, closing_minor=99)
    b = paper("b", [(2, -7)], account="88888888", opening_minor=50, closing_minor=43)
    assert merge([a, b]).frames["user_profiles"]["opening_balance_minor"][0] == 150
    late = paper("b", [(200, -7)], account="88888888", opening_minor=50, closing_minor=43)
    unknown = merge([a, late])
    assert unknown.frames["user_profiles"]["opening_balance_minor"][0] is None
    assert "accounts begin at different times" in rules_of(unknown)
    assert "opening balance unknown" in rules_of(merge([a, paper("b", [(2, -7)], account="88888888")]))


def test_rows_after_the_end_and_far_from_the_rest():
    assert "after the statement's end" in rules_of(merge([paper("a", [(0, -1), (9, -2)], opens=MONDAY, closes=MONDAY + timedelta(5), opening_minor=10, closing_minor=9)]))
    rows = [(n, -100 - n) for n in range(120)]
    stray = merge([paper("a", [*rows, (9000, -5)])])
    assert stray.rejects["rule"].to_list() == ["far from the rest"]
    assert len(table(stray)) == 120
    assert stray.files["rejected"].to_list() == [1]
    assert usual_days(pl.DataFrame({"day": [MONDAY], "rows": [1]})) == (MONDAY, MONDAY)


# --- transfers ------------------------------------------------------------------------------------------------------------

POT = "DE12500105170648489890"


def moved(giro, pot, **kw):
    """The categories of rows by account, for rows of a current and a savings account."""
    source = merge([paper("giro.ofx", giro), paper("pot.ofx", pot, account=POT, **kw)])
    return source, sorted(zip(source.frames["transactions"]["amount_minor"], categories(source), strict=True))


@pytest.mark.parametrize(("out", "into"), [(0, 0), (4, 7), (4, 9), (2, 3), (3, 2)])  # the same day, Friday to Monday, to Wednesday, a day late, a clock apart
def test_both_legs_of_a_transfer_are_marked(out, into):
    _, rows = moved([(out, -20000, "Umbuchung Tagesgeld")], [(into, 20000, "Anna Weiss")])
    assert rows == [(-20000, "transfer"), (20000, "transfer")]


@pytest.mark.parametrize(("giro", "pot"), [
    ([(0, -20000, "Umbuchung")], [(9, 20000, "Anna")]),  # too late
    ([(0, -20000, "Umbuchung")], [(0, 19900, "Anna", "z")][:0] or [(0, 15000, "Anna")]),  # another amount, too little for a fee
    ([(0, -4999, "Lidl")], [(0, 4999, "Anna")]),  # groceries
    ([(0, -4999, "Unknown thing")], [(3, 4999, "Anna")]),  # nothing speaks of a transfer, three days apart
])
def test_what_is_no_transfer_is_not_marked(giro, pot):
    assert "transfer" not in [name for amount, name in moved(giro, pot)[1] if amount > 0]


def test_transfers_in_doubt_are_left_and_told():
    source = merge([paper("a", [(0, -5000, "Anna")]), paper("b", [(0, 5000, "Anna")], account=POT), paper("c", [(0, 5000, "Ben")], account="99999999")])
    assert "transfer" not in categories(source)
    assert "transfer in doubt" in rules_of(source, "warning")
    equal = merge([paper("a", [(0, -5000, "Anna"), (0, -5000, "Anna")]), paper("b", [(0, 5000, "Anna"), (1, 5000, "Anna")], account=POT)])
    assert categories(equal) == ["transfer"] * 4
    assert "transfer in doubt" not in rules_of(equal)


def test_a_fee_on_the_way_and_an_exchange():
    _, rows = moved([(0, -20000, "Umbuchung")], [(1, 19850, "Anna")])
    assert rows == [(-20000, "transfer"), (19850, "transfer")]
    _, rows = moved([(0, -10000, "Exchanged to USD")], [(0, 10840, "Exchanged to USD")], currency="USD")
    assert rows == [(-10000, "transfer"), (10840, "transfer")]


def test_monthly_savings_are_all_found():
    giro = [(28 * n, -10000, "Dauerauftrag Sparen") for n in range(12)]
    _, rows = moved(giro, [(28 * n + n % 3, 10000, "Eingang") for n in range(12)])
    assert {name for _, name in rows} == {"transfer"}
    assert len(rows) == 24


def test_a_correction_wins_over_a_transfer():
    source = merge([paper("a", [(0, -5000, "Anna")]), paper("b", [(0, 5000, "Anna")], account=POT)], corrections={"anna": "gifts"})
    assert categories(source) == ["gifts", "gifts"]


# --- merchants and categories ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "name"), [
    (["SUMUP *CAFE ROT 4711", "Cafe Rot", "CAFE ROT BERLIN", "SumUp *Cafe Rot"], "Cafe Rot"),
    (["REWE SAGT DANKE. 43122//Koeln/DE", "REWE Markt GmbH", "Kartenzahlung REWE 12.03.2025"], "Rewe"),
    (["PAYPAL *NETFLIX", "NETFLIX.COM", "Netflix International"], "Netflix"),
    (["POS DEBIT STARBUCKS STORE 08123", "STARBUCKS #55", "SQ *STARBUCKS SEATTLE WA"], "Starbucks"),
    (["AMZN Mktp US*2K4LL0", "Amazon.de*1X2Y3Z", "AMAZON EU SARL"], "Amazon"),
    (["Bäckerei Süßmilch GmbH & Co. KG", "BÄCKEREI SÜSSMILCH 18:04".replace("SS", "ß")], "Bäckerei Süßmilch"),
])
def test_one_shop_has_one_name(written, name):
    assert set(clean_merchants(pl.Series(written))) == {name}


def kinds(*records, corrections=None):
    rows = pl.DataFrame([(*r, *[None] * (4 - len(r))) for r in records], schema={"amount_minor": pl.Int64, "payee": pl.String, "text": pl.String, "label": pl.String}, orient="row")
    return [NAMES[i] for i in categorise(rows, corrections)["category_id"]]


@pytest.mark.parametrize(("record", "name"), [
    ((-1, "Lidl"), "groceries"), ((1, "Lidl"), "groceries"), ((1, "Acme", "Gehalt März"), "salary"), ((1, "Familienkasse", "Kindergeld"), "benefits"), ((1, None, "INTEREST PAID"), "interest"),
    ((-1, None, "Sollzinsen"), "fees"), ((-1, "Hans Meier", "Miete März"), "rent"), ((-1, "Stadtwerke Köln", "Abschlag"), "utilities"), ((-1, "UBER *EATS"), "dining"), ((-1, "UBER *TRIP"), "transport"),
    ((-1, None, "ATM WITHDRAWAL 123"), "cash"), ((-1, "Krankenversicherung Süd"), "insurance"), ((-1, "Löwen-Apotheke"), "health"), ((-1, "Paul Smith"), "uncategorised"), ((1, "Paul Smith"), "other_income"),
    ((-1, "Xyz", None, "FOOD_AND_DRINK_COFFEE"), "dining"), ((-1, "Xyz", None, "Food & Dining: Groceries"), "groceries"), ((-1, "Xyz", None, "no such label"), "uncategorised"),
    ((-1, "Albert Heijn 1432 AMSTERDAM"), "groceries"), ((-1, "PRLV SEPA EDF CLIENTS"), "utilities"), ((-1, "Mercadona"), "groceries"), ((-1, "Biedronka 1234"), "groceries"),
])
def test_rules(record, name):
    assert kinds(record) == [name]


def test_a_refund_stays_in_its_category_and_an_employer_is_no_shop():
    assert kinds((-5000, "Zalando"), (5000, "Zalando")) == ["shopping", "shopping"]
    assert kinds((-5000, "Corner Thing"), (2000, "Corner Thing")) == ["uncategorised", "uncategorised"]
    assert kinds(*[(180000, "Tesco Stores")] * 3, (-2000, "Tesco Stores"))[:3] == ["other_income"] * 3


def test_corrections_are_remembered_and_applied_to_later_files(tmp_path):
    book, month = tmp_path / "corrections.toml", bank.cut(bank.sample_account(60), date(2025, 1, 1), date(2025, 1, 31))
    (tmp_path / "jan.ofx").write_bytes(bank.write_ofx2(month))
    before = read_statements(tmp_path)
    remember(book, "Señor Taco", "gifts")
    remember(book, "SENOR TACO", "travel")
    assert read_corrections(book) == {"SENOR TACO": "travel"}
    assert os.listdir(tmp_path).count("corrections.toml") == 1
    after = read_statements(tmp_path)
    hit = after.frames["transactions"].filter(pl.col("merchant").str.contains("Taco"))
    assert len(hit)
    assert set(hit["category_id"]) == {CATEGORY_ID["travel"]}
    assert "corrections used" in rules_of(after)
    assert after.frames["transactions"]["external_id"].equals(before.frames["transactions"]["external_id"])
    book.write_text("# mine\n[merchants]\n'Kiosk' = 'gifts' # x\n")
    remember(book, "Kiosk", "dining")
    assert book.read_text() == '# mine\n[merchants]\n"Kiosk" = "dining"\n'
    for bad in ("[merchants]\na = 'nonsense'", "[other]\n", "no toml at all ["):
        book.write_text(bad)
        with pytest.raises(SourceError, match=r"corrections\.toml"):
            read_statements(tmp_path)


def test_uncategorised_is_told_in_rows_and_money():
    found = next(f for f in merge([paper("a", [(0, -9900, "Qwertz"), (1, -100, "Lidl")])]).findings if f.rule == "no category")
    assert found.severity == "warning"
    assert "50.0% of the rows and 99.0% of the money" in found.advice
    assert '"Qwertz" =' in found.advice


def test_the_rules_are_sound():
    rules = read_rules()
    assert rules.words["category_id"].n_unique() >= 20
    assert len(rules.words) > 1000
    assert not len(rules.words.filter(pl.col("pattern").str.strip_chars().str.len_chars() < 2))


# --- files ----------------------------------------------------------------------------------------------------------------

ENDINGS = {"csv": "csv", "xlsx": "xlsx", "ofx1": "ofx", "ofx2": "ofx", "qfx": "qfx", "camt053": "xml", "mt940": "sta", "qif": "qif", "plaid": "json"}


@pytest.fixture(scope="module")
def account():
    return bank.sample_account(120)


@pytest.mark.parametrize("kind", bank.WRITERS)
def test_content_tells_the_format(kind, account):
    wanted = {"ofx1": "ofx", "ofx2": "ofx", "qfx": "ofx", "camt053": "camt"}.get(kind, kind)
    assert detect(bank.WRITERS[kind](account), "statement.txt") == wanted


def test_one_account_in_every_format_in_one_folder(tmp_path, account):
    for kind, write in bank.WRITERS.items():
        (tmp_path / f"{kind}.{ENDINGS[kind]}").write_bytes(write(account))
    source = read_statements(tmp_path, zone="Europe/Berlin")
    assert sorted(source.files["file"]) == sorted(f"{k}.{e}" for k, e in ENDINGS.items())
    assert source.files.columns == list(FILES)
    assert amounts(source) == sorted(e.amount for e in account.entries)
    assert source.frames["user_profiles"]["opening_balance_minor"][0] == account.opening
    assert source.frames["transactions"]["account"].unique().to_list() == [account.number]
    assert not rules_of(source, "error")
    one = read_statements(tmp_path / "mt940.sta", zone="Europe/Berlin")
    assert set(one.frames["transactions"]["external_id"]) == set(source.frames["transactions"]["external_id"])


def test_months_in_many_formats_overlapping(tmp_path, account):
    dice, kinds = random.Random(3), list(bank.WRITERS)
    for n in range(5):
        first = date(2025, 1, 1) + timedelta(24 * n)
        part = bank.cut(account, first, first + timedelta(30))
        kind = dice.choice(kinds)
        (tmp_path / f"{n}-{kind}.{ENDINGS[kind]}").write_bytes(bank.WRITERS[kind](part))
    source = read_statements(tmp_path, zone="Europe/Berlin")
    assert amounts(source) == sorted(e.amount for e in account.entries)
    assert not rules_of(source, "error")


def test_a_source_loads_into_a_database(tmp_path, account):
    (tmp_path / "a.xml").write_bytes(bank.write_camt053(account))
    engine = database.connect(f"sqlite:///{tmp_path / 'db' / 'a.db'}")
    database.upgrade(engine)
    source = read_source(tmp_path / "a.xml")
    assert database.load(engine, source.frames)["transactions"] == len(account.entries)
    assert source.frames["users"]["external_id"].to_list() == ["me"]
    engine.dispose()


def test_a_folder_goes_on_past_what_it_cannot_read(tmp_path, account):
    (tmp_path / "good.ofx").write_bytes(bank.write_ofx1(account))
    (tmp_path / "bad.csv").write_bytes(b"no table here")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG....")
    (tmp_path / ".hidden.csv").write_bytes(b"x")
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024/older.qif").write_bytes(bank.write_qif(bank.sample_account(30, start=date(2024, 6, 1))))
    source = read_statements(tmp_path)
    assert {f.table for f in source.findings if f.rule == "cannot be read"} == {"bad.csv"}
    assert set(next(f for f in source.findings if f.rule == "left aside").examples) == {".hidden.csv", "photo.png"}
    assert set(source.files["file"]) == {"good.ofx", "2024/older.qif"}


@pytest.mark.parametrize("make", [lambda p: p / "none.ofx", lambda p: p, lambda p: p / "a\0b", lambda p: [p / "x", p / "y"], lambda p: "x" * 5000])
def test_nothing_to_read_is_said(make, tmp_path):
    with pytest.raises(SourceError):
        read_statements(make(tmp_path))


def test_wrong_zone_and_mapping_are_said(tmp_path, account):
    (tmp_path / "a.ofx").write_bytes(bank.write_ofx2(account))
    with pytest.raises(SourceError, match="no time zone"):
        read_statements(tmp_path, zone="Mars/Base")
    (tmp_path / "a.csv").write_bytes(bank.write_csv(account))
    (tmp_path / "map.toml").write_text("[columns]\ndate = 'Nope'\namount = 'Betrag'\n")
    assert "mapping not used" in rules_of(read_statements(tmp_path, mapping=Path(tmp_path, "map.toml")))


def test_a_mapping_that_is_not_there_is_said_and_its_zone_is_used(tmp_path, account):
    (tmp_path / "a.csv").write_bytes(bank.write_csv(account))
    with pytest.raises(SourceError, match="no mapping file"):
        read_statements(tmp_path / "a.csv", mapping=tmp_path / "none.toml")
    (tmp_path / "map.toml").write_text("[columns]\ndate = 'Date'\namount = 'Amount'\nmerchant = 'Payee'\n[format]\ntimezone = 'Europe/Berlin'\n")
    source = read_source(tmp_path / "a.csv", mapping=tmp_path / "map.toml", person="ann")
    assert source.frames["users"].select("external_id", "timezone").row(0) == ("ann", "Europe/Berlin")


def test_days_out_of_order_with_a_running_balance_that_follows_are_no_fault():
    rows = [(0, -33749, "A", None, 525728), (13, 5000, "B", None, 530728), (8, -75000, "C", None, 455728), (14, -100, "D", None, 455628)]
    source = merge([paper("a.csv", rows, form="csv")])
    assert not rules_of(source, "error")
    assert source.files["balanced"].to_list() == [True]


def test_a_file_without_a_row_says_what_became_of_its_entries(tmp_path):
    ofx = ("<OFX><BANKMSGSRSV1><STMTTRNRS><STMTRS><CURDEF>USD<BANKACCTFROM><ACCTID>1</BANKACCTFROM><BANKTRANLIST>"
           "<STMTTRN><TRNTYPE>DEBIT<DTPOSTED><TRNAMT>-5.00<FITID>1<NAME>Cafe</STMTTRN></BANKTRANLIST></STMTRS></STMTTRNRS></BANKMSGSRSV1></OFX>")
    (tmp_path / "bank.ofx").write_text(ofx)
    with pytest.raises(SourceError, match=r"(?s)^bank\.ofx: there is no row that could be read.*unreadable date"):
        read_statements([tmp_path / "bank.ofx"])


def test_somebody_called_mueller_is_no_drugstore():
    rows = [(0, -85000, "Martha Mueller"), (1, 4500, "Jürg Müller"), (2, -1234, "MUELLER SAGT DANKE"), (3, -500, "Drogerie Müller")]
    source = merge([paper("a.ofx", rows)])
    assert categories(source) == ["uncategorised", "other_income", "shopping", "shopping"]
