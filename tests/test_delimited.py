"""A bank's own CSV file: every preset, any dialect, and whatever else may stand in it."""

import csv
import io
import time
import zipfile
from datetime import date, datetime, timedelta

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preset_samples import SAMPLES
from statement_files import CSV_DIALECTS, csv_rows, sample_account, write_csv, write_xlsx

from fincoach.data.delimited import (
    CsvMapping,
    check_mapping,
    matches,
    presets,
    read_delimited,
    read_mapping,
    save_mapping,
    sniff,
)
from fincoach.data.source import REJECTS, ROWS, SourceError
from fincoach.data.workbook import read_workbook

FUZZ = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def raw_of(sample: str | bytes) -> bytes:
    return sample if isinstance(sample, bytes) else sample.encode()


def rows_of(statements, *columns) -> list[tuple]:
    """The rows of all accounts in the file's order."""
    return pl.concat([s.rows for s in statements]).sort("row").select(columns or ("day", "amount_minor")).rows()


def rules(statements) -> dict[str, int]:
    return {f.rule: f.count for s in statements for f in s.findings}


# Presets


def test_every_preset_has_a_sample():
    assert set(SAMPLES) == set(presets())
    assert len(SAMPLES) >= 14


@pytest.mark.parametrize("name", SAMPLES)
def test_preset_reads_its_bank(name):
    raw, rows, more = SAMPLES[name]
    statements = read_delimited(raw_of(raw), "file.csv")
    assert {s.format for s in statements} == {f"csv:{name}"}
    assert rows_of(statements, "day", "amount_minor", "currency", "payee") == rows
    assert [s.account for s in statements] == more["accounts"]
    if len(statements) == 1:
        assert (statements[0].opening_minor, statements[0].closing_minor) == (more.get("opening"), more.get("closing"))
    assert statements[0].rejects["rule"].to_list() == more.get("aside", [])
    assert [f.rule for s in statements for f in s.findings if f.severity != "note"] == more.get("warnings", [])
    assert all(dict(s.rows.schema) == ROWS and dict(s.rejects.schema) == REJECTS for s in statements)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_header_is_known_by_one_preset_only(name):
    text = raw_of(SAMPLES[name][0]).decode("cp1252", "replace").replace("\ufeff", "")
    for line in text.splitlines():
        for delimiter in ",;\t":
            header = next(csv.reader([line], delimiter=delimiter), [])
            known = [n for n, mapping in presets().items() if matches(mapping, header)]
            assert known in ([], [name])


@pytest.mark.parametrize("name", SAMPLES)
def test_what_was_found_reads_the_file_the_same_way(name, tmp_path):
    raw = raw_of(SAMPLES[name][0])
    found = sniff(raw, "file.csv")
    again = read_mapping(save_mapping(found, tmp_path / "map.toml"))
    assert again == found
    for one, other in zip(read_delimited(raw, "file.csv"), read_delimited(raw, "file.csv", again), strict=True):
        assert one.rows.equals(other.rows)
        assert one.rejects.equals(other.rejects)
        assert (one.format, one.account, one.opening_minor, one.closing_minor) == (other.format, other.account, other.opening_minor, other.closing_minor)


# Any dialect

FORMS = {"%Y-%m-%d": "iso", "%d.%m.%Y": "dotted", "%d.%m.%y": "short", "%Y%m%d": "digits", "%d/%m/%Y": "british", "%m/%d/%Y": "american"}
TEXTS = st.text(st.characters(codec="cp1252", exclude_categories=("Cc", "Zs", "Cf")) | st.just(" "), min_size=1, max_size=20).map(str.strip).filter(bool)


def money(minor: int, mark: str, grouped: bool) -> str:
    text = f"{'-' if minor < 0 else ''}{abs(minor) // 100:{',' if grouped else ''}}.{abs(minor) % 100:02}"
    return text.translate(str.maketrans(",.", ".,")) if mark == "," else text


@st.composite
def tables(draw):
    """A statement as a bank could write it: its bytes, and the rows in it."""
    start = date(2024, 1, 13)  # the 13th: no other order of day and month reads it
    rows = [(start + timedelta(draw(st.integers(0, 300))), draw(st.integers(-10**8, 10**8).filter(bool)), draw(TEXTS)) for _ in range(draw(st.integers(0, 12)))]
    rows = [(start, -12345, "Bäckerei"), *rows]
    mark, form, way = draw(st.sampled_from(".,")), draw(st.sampled_from(list(FORMS))), draw(st.sampled_from(["sign", "two", "S/H", "Af/Bij"]))
    delimiter = draw(st.sampled_from(",;\t|"))
    grouped, above = draw(st.booleans()), draw(st.integers(0, 7))
    names = {"sign": ["Amount"], "two": ["Debit", "Credit"], "S/H": ["Betrag", "Soll/Haben"], "Af/Bij": ["Bedrag", "Af Bij"]}[way]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])), lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
    writer.writerows([["Kontoauszug", "März"], [], ["Kunde", "Jürgen"], ["IBAN", "DE02 1203 0000 0000 2020 51"], [], ["Stand", "12.03.2025"], [""]][:above])
    writer.writerow(["Date", *names, "Payee"])
    for day, minor, payee in rows:
        size = money(abs(minor), mark, grouped)
        cells = {"sign": [money(minor, mark, grouped)], "two": [size, ""] if minor < 0 else ["", size],
                 "S/H": [size, "S" if minor < 0 else "H"], "Af/Bij": [size, "Af" if minor < 0 else "Bij"]}[way]
        writer.writerow([day.strftime(form), *cells, payee])
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"]))
    return out.getvalue().encode(encoding), rows


def valid_in_one_encoding(raw: bytes) -> bool:
    """False for text of Windows that has by chance the form of UTF-8 in places: that is refused, never garbled."""
    text = raw.decode("utf-8", "replace")
    return raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw or "\ufffd" not in text or 3 * sum(c > "\x7f" and c != "\ufffd" for c in text) < text.count("\ufffd")


@FUZZ
@given(made=tables())
def test_any_dialect_gives_the_same_rows_back(made):
    raw, rows = made
    if not valid_in_one_encoding(raw):
        with pytest.raises(SourceError, match="most of it is UTF-8"):
            read_delimited(raw, "file.csv")
        return
    statements = read_delimited(raw, "file.csv")
    assert rows_of(statements, "day", "amount_minor", "payee") == [(d, a, " ".join(p.split())) for d, a, p in rows]
    assert statements[0].rejects.is_empty()
    assert read_delimited(raw, "file.csv", sniff(raw, "file.csv"))[0].rows.equals(statements[0].rows)


@pytest.mark.parametrize("dialect", CSV_DIALECTS)
def test_one_account_in_every_dialect(dialect):
    account = sample_account(120)
    (statement,) = read_delimited(write_csv(account, dialect), "file.csv")
    assert rows_of([statement], "day", "amount_minor", "payee", "text") == [(e.day, e.amount, e.payee, e.text) for e in account.entries]
    assert (statement.opening_minor, statement.closing_minor) == (account.opening, account.closing)
    assert statement.account == (account.number if dialect in ("german", "af_bij") else "")
    assert statement.currency == account.currency
    if dialect != "af_bij":
        assert statement.rows["bank_id"].to_list() == [e.id for e in account.entries]


def test_a_column_without_a_name_may_say_which_way_money_went():
    raw = "Buchungstag;Empfänger;Vorgang;Umsatz;\n13.01.2025;A;x;1.000,50;S\n14.01.2025;B;x;2.000,50;H\n".encode("cp1252")
    (statement,) = read_delimited(raw, "file.csv")
    assert statement.rows["amount_minor"].to_list() == [-100050, 200050]
    assert sniff(raw, "file.csv").columns["indicator"] == "#5"


def test_words_for_debit_and_credit_do_not_turn_amounts_that_have_a_sign():
    (statement,) = read_delimited(b"Date,Amount,Way\n2025-01-13,-1.00,debit\n2025-01-14,2.00,credit\n", "file.csv")
    assert statement.rows["amount_minor"].to_list() == [-100, 200]


@pytest.mark.parametrize(("balances", "amounts"), [(("95", "93", "90"), [-500, -200, -300]), (("105", "107", "110"), [500, 200, 300])])
def test_a_running_balance_proves_the_sign(balances, amounts):
    raw = "Date,Amount,Balance\n" + "".join(f"2025-01-1{i + 3},{a},{b}\n" for i, (a, b) in enumerate(zip((5, 2, 3), balances, strict=True)))
    assert read_delimited(raw.encode(), "file.csv")[0].rows["amount_minor"].to_list() == amounts
    with pytest.raises(SourceError, match="no amount is negative"):
        read_delimited(raw.replace(balances[1], "1").encode(), "file.csv")


def test_a_card_s_file_with_purchases_positive_is_asked_about():
    raw = b"Date,Description,Amount\n" + b"".join(b"2025-02-%d,TFL,2.80\n" % d for d in range(13, 28)) + b"2025-02-28,PAYMENT,-42.00\n"
    assert rules(read_delimited(raw, "file.csv"))["mostly money in"] == 15
    assert "mostly money in" not in rules(read_delimited(write_csv(sample_account(60)), "file.csv"))
    found = check_mapping({"format": {"sign": "positive is out"}})
    assert read_delimited(raw, "file.csv", found)[0].rows["amount_minor"].sum() == -15 * 280 + 4200


# What is open is refused, with the line that settles it


@pytest.mark.parametrize(("raw", "said", "line"), [
    (b"Date,Amount\n03/04/2025,-1.00\n", "dates are ambiguous", 'date = "%d/%m/%Y"'),
    (b'Date,Amount\n2025-04-03,"-1,234"\n', "amounts are ambiguous", 'decimal = "."'),
    (b"Date,Amount\n2025-04-03,5.00\n", "no amount is negative", 'sign = "positive is out"'),
    ("Date,Amount,Payee\n2025-04-03,-5.00,Müller\n".encode() + b"2025-04-04,-5.00,M\xfcller\n", "most of it is UTF-8", 'encoding = "cp1252"'),
])
def test_what_is_open_is_settled_by_the_line_that_the_refusal_names(raw, said, line, tmp_path):
    with pytest.raises(SourceError, match=said) as refused:
        read_delimited(raw, "file.csv")
    assert line.split(" = ")[0] in str(refused.value)
    (tmp_path / "map.toml").write_text(f"[format]\n{line}\n")
    assert len(rows_of(read_delimited(raw, "file.csv", tmp_path / "map.toml"))) >= 1


def test_a_mapping_without_columns_adds_to_the_preset():
    raw = SAMPLES["ynab"][0].replace("31.01.2026", "02/01/2026").replace("05.01.2026", "01/02/2026").encode()
    with pytest.raises(SourceError, match="dates are ambiguous"):
        read_delimited(raw, "file.csv")
    for form, days in (("%d/%m/%Y", [date(2026, 1, 2), date(2026, 2, 1)]), ("%m/%d/%Y", [date(2026, 2, 1), date(2026, 1, 2)])):
        (statement,) = read_delimited(raw, "file.csv", check_mapping({"format": {"date": form, "account": "mine"}}))
        assert statement.rows["day"].to_list() == days
        assert statement.format == "csv:ynab"


@pytest.mark.parametrize(("raw", "said"), [
    (b"", "empty"), (b" \n\0\0\n", "empty"), (b"PK\x03\x04", "workbook"), (b"%PDF-1.7", "PDF"), (b"a,b\n1,2\n", "no preset knows"),
    (b"just some words", "no preset knows"), (b'Date,Amount\n2025-01-01,"' + b"x" * 200_000, "never closed"), (b"\xff\xfe\x00", "no preset|empty|not utf-16"),
    (b"Date;Amount\n2025-04-03,-5\n2025-04-03,-5\n", "as many fields"), (b"Date,Amount\nsoon,-5.00\n", "no date"),
    (b"Date,Amount\n2025-04-03,much\n", "no amounts could be read"), (b"Date,Amount,Amount\n2025-04-03,1,2\n", "may all be the amount"),
])
def test_a_file_that_cannot_be_read_is_refused_in_words(raw, said):
    with pytest.raises(SourceError, match=said):
        read_delimited(raw, "file.csv")


def test_a_mapping_for_a_file_without_names(tmp_path):
    (tmp_path / "map.toml").write_text('[columns]\ndate = "#1"\namount = "#2"\npayee = "#5"\n[format]\ndate = "%m/%d/%Y"\ncurrency = "USD"\n')
    raw = b'"08/01/2024","-45.20","*","","PURCHASE"\n"08/05/2024","200.00","*","","PAYMENT"\n'
    assert rows_of(read_delimited(raw, "file.csv", tmp_path / "map.toml"), "row", "amount_minor", "payee") == [(1, -4520, "PURCHASE"), (2, 20000, "PAYMENT")]


def test_a_mapping_that_does_not_fit_names_what_is_not_there():
    with pytest.raises(SourceError, match="'Sum' not found; there are 'Date', 'Amount'"):
        read_delimited(b"Date,Amount\n2025-01-01,-1\n", "file.csv", CsvMapping({"date": "Date", "amount": "Sum"}))


@pytest.mark.parametrize("raw", [{"facts": {"opening": "("}}, {"patterns": {"payee": "(?=x)"}}, {"match": {"colums": ["x"]}}, {"indicator": {"in": 3}},
                                 {"format": {"date": [1]}}, {"columns": {"payee": []}}, {"status": {"pending": {}}}])
def test_a_wrong_mapping_is_refused(raw):
    with pytest.raises(SourceError):
        check_mapping(raw)


# Rows that are odd

HEADER = "Date,Amount,Payee,Currency,Reference"
GOOD = [f"2025-01-{d:02},-{d}.00,Shop {d},EUR,r{d}" for d in range(1, 29)]
BAD = {
    "2025-02-30,-1.00,x,EUR,a": ("date", "unreadable date"), ",-1.00,x,EUR,a": ("date", "missing"), "2025-01-09,,x,EUR,a": ("amount", "missing"),
    "2025-01-09,=1+1,x,EUR,a": ("amount", "unreadable amount"), "2025-01-09,-1.005,x,EUR,a": ("amount", "too many decimals"),
    "2025-01-09,-1.5,x,JPY,a": ("amount", "too many decimals"), "2025-01-09,1e5,x,EUR,a": ("amount", "unreadable amount"),
    "2025-01-09,-99999999999,x,EUR,a": ("amount", "absurd amount"), "2025-01-09,-1.00,x,EURO,a": ("currency", "unreadable currency"),
    "2025-01-09 25:10,-1.00,x,EUR,a": ("time", "unreadable time"), "2025-01-09,-1.00": (None, "wrong number of fields"),
    "2025-01-09,-1.00,x,EUR,a,b": (None, "wrong number of fields"),
    "2025-01-01,-1.00,Shop 1,EUR,r1": ("id", "repeated id"),
}


@pytest.mark.parametrize("row", BAD, ids=ascii)
def test_a_bad_row_is_set_aside_with_line_field_and_rule(row):
    statements = read_delimited("\n".join([HEADER, *GOOD[:10], row, *GOOD[10:]]).encode(), "file.csv")
    assert statements[0].rejects.drop("text").rows() == [("file.csv", 12, *BAD[row])]
    assert len(rows_of(statements)) == len(GOOD)
    assert [(f.severity, f.examples) for f in statements[0].findings if f.rule == BAD[row][1]] == [("error", ("line 12",))]


def test_cells_that_are_formulas_elsewhere_are_text_here():
    cells = ["=HYPERLINK(\"http://x\")", "@SUM(A1)", "+49 123", "-x", "\t=1", "x\0y", "a\u202eb", "<script>"]
    out = io.StringIO()
    csv.writer(out).writerows([["Date", "Amount", "Payee"], *(["2025-01-13", "-1.00", c] for c in cells)])
    statements = read_delimited(out.getvalue().encode(), "file.csv")
    assert statements[0].rows["payee"].to_list() == ["=HYPERLINK(\"http://x\")", "@SUM(A1)", "+49 123", "-x", "=1", "x y", "a\u202eb", "<script>"]


def test_two_equal_coffees_stay_two_and_a_number_of_several_rows_is_none():
    raw = b"Date,Amount,Payee,Reference\n2025-01-13,-3.50,Cafe,\n2025-01-13,-3.50,Cafe,\n2025-01-14,-1.00,A,x\n2025-01-15,-2.00,B,x\n"
    (statement,) = read_delimited(raw, "file.csv")
    assert statement.rows["amount_minor"].to_list() == [-350, -350, -100, -200]
    assert statement.rows["bank_id"].null_count() == 4
    assert rules([statement])["id of several rows"] == 2


def test_currencies_and_accounts_are_statements_of_their_own():
    raw = b"Date,Amount,Currency,Account\n2025-01-13,-1.00,EUR,a\n2025-01-14,-2.00,USD,a\n2025-01-15,-300,JPY,b\n2025-01-16,-4.00,EUR,a\n"
    statements = read_delimited(raw, "file.csv")
    assert [(s.account, s.currency, s.rows["amount_minor"].to_list()) for s in statements] == [("a", "EUR", [-100, -400]), ("a", "USD", [-200]), ("b", "JPY", [-300])]
    assert sum(len(s.findings) for s in statements[1:]) == 0


def test_a_missing_row_is_found_by_the_balance():
    account = sample_account(60)
    lines = write_csv(account).splitlines(keepends=True)
    (statement,) = read_delimited(b"".join(lines[:20] + lines[21:]), "file.csv")
    finding = next(f for f in statement.findings if f.rule == "balance does not follow")
    assert (finding.count, finding.examples) == (1, ("line 21",))
    assert statement.opening_minor + statement.rows["amount_minor"].sum() != statement.closing_minor


@pytest.mark.parametrize("backward", [False, True])
def test_a_balance_on_some_rows_only_still_counts(backward):
    lines = ["01/09/2017,A,,428.03,1000.00", "01/09/2017,B,,29.50,", "13/09/2017,C,512.00,,", "14/09/2017,D,20.00,,497.50", "15/09/2017,E,200.00,,", "16/09/2017,F,0.08,,297.42", "17/09/2017,G,1.00,,"]
    raw = "Date,Details,Debit,Credit,Balance\n" + "\n".join(lines[::-1] if backward else lines) + "\n"
    (statement,) = read_delimited(raw.encode(), "file.csv")
    assert (statement.opening_minor, statement.closing_minor) == (57197, 29642)
    assert "balance does not follow" not in rules([statement])
    (statement,) = read_delimited(raw.replace("200.00", "201.00").encode(), "file.csv")
    assert rules([statement])["balance does not follow"] == 1


def test_a_lonely_balance_among_rows_proves_nothing():
    (statement,) = read_delimited(b"Date,Amount,Balance\n2025-01-13,-1.00,\n2025-01-14,-2.00,97.00\n", "file.csv")
    assert (statement.opening_minor, statement.closing_minor) == (None, None)


def test_names_of_columns_of_swiss_and_german_banks():
    raw = "Datum;Bewegungstyp;Avisierungstext;Gutschrift in CHF;Lastschrift in CHF;Label;Kategorie\n31.01.2024;Buchung;LOHN;5000.50;;;\n30.01.2024;Buchung;COOP;;-45.30;;\n"
    (statement,) = read_delimited(raw.encode(), "file.csv")
    assert statement.rows["amount_minor"].to_list() == [500050, -4530]
    assert statement.rows["text"].to_list() == ["LOHN", "COOP"]
    raw = ('"Umsatz getätigt von";"Belegdatum";"Buchungsdatum";"Originalbetrag";"Originalwährung";"Buchungsbetrag";"Buchungswährung";"Transaktionsbeschreibung"\n'
           '"5";"20.02.18";"21.02.18";"-5,00";"USD";"-4,17";"EUR";"STARBUCKS"\n')
    (statement,) = read_delimited(raw.encode(), "file.csv")
    assert statement.rows.select("day", "amount_minor", "currency", "text").rows() == [(date(2018, 2, 21), -417, "EUR", "STARBUCKS")]
    raw = "Buchungstag;Umsatzart;Buchungstext;Betrag;Währung;Auftraggeberkonto;IBAN Auftraggeberkonto\n13.03.2018;Lastschrift;REWE;-17,22;EUR;538917600;DE44200400000538917600\n"
    assert read_delimited(raw.encode(), "file.csv")[0].account == "DE44200400000538917600"


def test_garbled_letters_are_told():
    assert rules(read_delimited("Date,Amount,Payee\n2025-01-13,-1.00,MÃ¼ller\n".encode(), "file.csv"))["garbled letters"] == 1
    assert "garbled letters" not in rules(read_delimited("Date,Amount,Payee\n2025-01-13,-1.00,Müller Ã\n".encode(), "file.csv"))


def test_an_export_without_transactions_is_an_empty_statement():
    (statement,) = read_delimited(SAMPLES["n26"][0].splitlines()[0].encode(), "file.csv")
    assert (len(statement.rows), rules([statement])) == (0, {"no rows": 1})


# Whatever stands in a file: statements, or one clear refusal; and every record is accounted for

CELL = st.one_of(st.sampled_from(["2025-01-13", "13/01/2025", "-1.00", "1,5", "EUR", "NaN", "=cmd()", '"', "\0", "\r", "\n", ";", "", "٣", "🦊", "9" * 40,
                                  "x" * 300, "2025-02-30", "-", "(1)", "\u202e", "-.", "Af", "S", "offen", "\ufeff", "€", "1" * 19]), st.text(max_size=12))


def judged(raw: bytes, mapping=None):
    try:
        statements = read_delimited(raw, "file.csv", mapping)
    except SourceError:
        return None
    assert statements
    assert all(dict(s.rows.schema) == ROWS and dict(s.rejects.schema) == REJECTS for s in statements)
    assert all(s.rows["day"].null_count() == 0 and s.rows["amount_minor"].null_count() == 0 for s in statements)
    return statements


@FUZZ
@given(rows=st.lists(st.lists(CELL, min_size=1, max_size=6), max_size=8))
def test_hostile_rows_are_all_accounted_for(rows):
    out = io.StringIO()
    csv.writer(out).writerows([["Date", "Amount", "Payee", "Currency", "Balance", "Reference"], ["2025-01-13", "-1.00", "x", "EUR", "", ""], *rows])
    raw = out.getvalue().encode("utf-8", "replace")
    statements = judged(raw)
    if statements is not None:
        told = rules(statements)
        records = list(csv.reader(io.StringIO(raw.decode(), newline="")))
        kept = sum(len(s.rows) + len(s.rejects) for s in statements)
        assert kept + told.get("blank line", 0) + told.get("not a transaction", 0) == len(records) - 1


@FUZZ
@given(raw=st.binary(max_size=300), name=st.sampled_from(sorted(SAMPLES)))
def test_any_bytes_after_any_header(raw, name):
    sample = raw_of(SAMPLES[name][0])
    judged(sample + raw)
    judged(raw)


def test_every_cut_of_every_sample_is_judged():
    """Each bank's file ending anywhere: rows with findings, or words; also where the names of the columns end before the amount."""
    for name in sorted(SAMPLES):
        raw = raw_of(SAMPLES[name][0])
        for cut in range(1, len(raw), 23 if name != "dkb" else 5):
            judged(raw[:cut])
    judged(raw_of(SAMPLES["dkb"][0])[:241])


@FUZZ
@given(name=st.sampled_from(sorted(SAMPLES)), cut=st.integers(0, 2000), flip=st.integers(0, 2000), value=st.integers(0, 255))
def test_cut_and_flipped_files(name, cut, flip, value):
    raw = bytearray(raw_of(SAMPLES[name][0]))
    raw[flip % len(raw)] = value
    judged(bytes(raw))
    judged(bytes(raw[: cut % len(raw)]))


def test_a_line_of_ten_megabytes_costs_itself_only():
    raw = b"Date,Amount,Payee\n2025-01-13,-1.00,x\n" + b"y," * 5_000_000 + b"\n2025-01-14,-2.00,z\n"
    (statement,) = read_delimited(raw, "file.csv")
    assert statement.rows["row"].to_list() == [2, 4]
    assert statement.rejects["rule"].to_list() == ["wrong number of fields"]
    assert len(statement.rejects["text"][0]) <= 1000


def test_a_hundred_thousand_rows_take_about_a_second():
    """A loose bound, for busy machines: it fails when reading becomes row by row."""
    account = sample_account(100)
    head, *lines = write_csv(account, "german").decode("cp1252").splitlines(keepends=True)[3:]
    many = (lines * (100_000 // len(lines) + 1))[:100_000]
    raw = (head + "".join(many)).encode("cp1252")
    read_delimited(raw[:10_000].rsplit(b"\n", 1)[0], "file.csv")
    start = time.process_time()
    statements = read_delimited(raw, "file.csv")
    assert sum(len(s.rows) + len(s.rejects) for s in statements) == 100_000
    assert time.process_time() - start < 8


# Workbooks


def book_of(*sheets: list[list], epoch=None) -> bytes:
    import openpyxl

    book = openpyxl.Workbook()
    book.epoch = epoch or book.epoch
    book.remove(book.active)
    for i, rows in enumerate(sheets):
        sheet = book.create_sheet(f"S{i + 1}")
        for row in rows:
            sheet.append(row)
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


@pytest.mark.parametrize("typed", [True, False])
def test_a_workbook_gives_the_rows_of_the_csv_file(typed):
    account = sample_account(120)
    (book,), (text,) = read_workbook(write_xlsx(account, typed), "file.xlsx"), read_delimited(write_csv(account), "file.csv")
    assert book.rows.equals(text.rows)
    assert (book.opening_minor, book.closing_minor, book.currency) == (account.opening, account.closing, account.currency)
    assert book.rejects.is_empty()


def test_a_preset_reads_the_bank_s_workbook_too():
    account = sample_account(40)
    names, *rows = csv_rows(account, "af_bij")
    rows = [[datetime.strptime(r[0], "%Y%m%d"), *r[1:6], float(r[6].replace(",", ".")), *r[7:]] for r in rows]
    (book,) = read_workbook(book_of([["Overzicht"], [], names, *rows]), "file.xlsx")
    assert book.format == "xlsx:ing_nl"
    assert rows_of([book]) == [(e.day, e.amount) for e in account.entries]
    assert (book.opening_minor, book.closing_minor, book.account) == (account.opening, account.closing, account.number)


def test_days_of_the_other_calendar_and_numbers_with_noise():
    from openpyxl.utils.datetime import CALENDAR_MAC_1904

    rows = [["Date", "Amount"], [date(2025, 1, 13), -12.1], [date(2025, 1, 14), 0.1 + 0.2], [datetime(2025, 1, 15, 9, 30), -1234567.89], [date(2025, 1, 16), 33.333]]
    for epoch in (None, CALENDAR_MAC_1904):
        (book,) = read_workbook(book_of(rows, epoch=epoch), "file.xlsx")
        assert rows_of([book], "row", "day", "minute", "amount_minor") == [
            (2, date(2025, 1, 13), None, -1210), (3, date(2025, 1, 14), None, 30), (4, date(2025, 1, 15), 570, -123456789)]
        assert book.rejects.select("row", "rule").rows() == [(5, "too many decimals")]


def test_every_sheet_with_a_table_is_read_and_the_others_are_named():
    one, other = [["Date", "Amount"], ["2025-01-13", -1]], [[], ["Date", "Amount"], ["2025-01-14", -2.5]]
    statements = read_workbook(book_of(one, [["milk"]], other, []), "file.xlsx")
    assert [(s.file, rows_of([s], "row", "amount_minor")) for s in statements] == [("file.xlsx [S1]", [(2, -100)]), ("file.xlsx [S3]", [(3, -250)])]
    assert next(f for f in statements[0].findings if f.rule == "sheet left out").examples[0].startswith("S2: no preset")


def packed(**parts: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(f"xl/worksheets/{name}.xml", part)
    return out.getvalue()


@pytest.mark.parametrize(("raw", "said"), [
    (b"", "no XLSX"), (b"Date,Amount\n", "no XLSX"), (b"PK\x03\x04", "no XLSX"), (b"\xd0\xcf\x11\xe0" + b"x" * 600, "old or a protected"),
    (packed(sheet1=b'<c r="A1"/><c r="XFD1048576"/>'), "cells"), (packed(sheet1=b"<!DOCTYPE x [<!ENTITY a 'b'>]>"), "document type"),
    (packed(sheet1=b"0" * 500_000_000), "unpacks to more"), (packed(sheet1=b"hello"), "no workbook"),
    (packed(sheet1=b"0" * 10**6).replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little")), "more than it says"),
    (book_of([]), "nothing in it"), (book_of([["milk"]]), "sheet 'S1': no preset"), (book_of([["Date", "Amount"], ["03/04/2025", -1]]), "dates are ambiguous"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_workbook_that_cannot_be_read_is_refused_in_words(raw, said):
    with pytest.raises(SourceError, match=said):
        read_workbook(raw, "file.xlsx")


@FUZZ
@given(cut=st.integers(0, 10_000), flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3))
def test_cut_and_flipped_workbooks(cut, flips):
    raw = bytearray(BOOK)
    for at, value in flips:
        raw[at % len(raw)] = value
    for part in (bytes(raw), bytes(raw[: cut % len(raw)])):
        try:
            statements = read_workbook(part, "file.xlsx")
        except SourceError:
            continue
        assert all(dict(s.rows.schema) == ROWS for s in statements)


BOOK = write_xlsx(sample_account(10))
