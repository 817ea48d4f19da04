"""The same account in every format gives the same rows; each format's hard cases; files that are cut, mis-encoded or hostile."""

import contextlib
import io
import json
import time
from dataclasses import replace
from datetime import date

import mt940 as mt940_library
import polars as pl
import pytest
import statement_files as files
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ofxtools.Parser import OFXTree

from fincoach.data.camt import read_camt
from fincoach.data.delimited import read_delimited
from fincoach.data.mt940 import read_mt940
from fincoach.data.ofx import read_ofx
from fincoach.data.plaid import read_plaid
from fincoach.data.qif import read_qif
from fincoach.data.source import REJECTS, ROWS, SourceError, Statement
from fincoach.data.workbook import read_workbook

YEAR = files.sample_account()
SPRING = files.sample_account(days=40, start=date(2025, 2, 20))


def qif(raw, name):
    return read_qif(raw, name, currency="EUR")


VARIANTS = {
    "ofx1-cp1252": (read_ofx, files.write_ofx1, {}),
    "ofx1-utf8": (read_ofx, files.write_ofx1, {"encoding": "utf-8", "version": "160"}),
    "ofx1-card": (read_ofx, files.write_ofx1, {"card": True}),
    "ofx2": (read_ofx, files.write_ofx2, {}),
    "ofx2-card": (read_ofx, files.write_ofx2, {"version": "211", "card": True}),
    "qfx": (read_ofx, files.write_qfx, {}),
    **{f"camt-{v}": (read_camt, files.write_camt053, {"version": v}) for v in ("001.02", "001.04", "001.06", "001.08")},
    "camt-previous": (read_camt, files.write_camt053, {"previous": True}),
    "mt940-utf8": (read_mt940, files.write_mt940, {}),
    "mt940-latin1": (read_mt940, files.write_mt940, {"encoding": "latin-1"}),
    "mt940-daily": (read_mt940, files.write_mt940, {"daily": True}),
    **{f"qif-{o}": (qif, files.write_qif, {"order": o}) for o in ("mdy", "dmy", "ymd")},
    "qif-utf8": (qif, files.write_qif, {"encoding": "utf-8"}),
    "plaid": (read_plaid, files.write_plaid, {}),
    "plaid-pages": (read_plaid, files.write_plaid, {"pages": 4}),
    **{f"csv-{d}": (read_delimited, files.write_csv, {"dialect": d}) for d in files.CSV_DIALECTS},
    "xlsx": (read_workbook, files.write_xlsx, {}),
    "xlsx-text": (read_workbook, files.write_xlsx, {"typed": False}),
}
BANK = {name: v for name, v in VARIANTS.items() if not name.startswith(("csv", "xlsx"))}
WITH_IDS = ("ofx", "qfx", "camt", "mt940", "plaid")
WITH_OPENING = ("camt", "mt940", "qif")
WITH_CLOSING = ("ofx", "qfx", "camt", "mt940", "plaid")


def read(variant, account=YEAR, change=lambda raw: raw):
    """The statements of `account` written in one of `VARIANTS`."""
    reader, write, how = VARIANTS[variant]
    return reader(change(write(account, **how)), f"{variant}.file")


# --- the same account ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_format_gives_the_same_rows(variant):
    (told,) = read(variant)
    assert dict(told.rows.schema) == ROWS
    assert dict(told.rejects.schema) == REJECTS
    want = [(e.day, e.amount, YEAR.currency, e.payee, e.text) for e in YEAR.entries]
    assert told.rows.select("day", "amount_minor", "currency", "payee", "text").rows() == want
    assert [f for f in told.findings if f.severity != "note"] == []
    assert told.currency == "EUR"
    if variant.startswith(WITH_IDS):
        assert told.rows["bank_id"].to_list() == [e.id for e in YEAR.entries]
    if variant.startswith("qif"):
        assert told.rows["bank_id"].null_count() == len(told.rows)
        assert told.rejects["rule"].to_list() == ["opening balance"]
    elif variant in BANK:
        assert len(told.rejects) == 0
    if variant.startswith(("csv", "xlsx")) and told.rows["balance_minor"].null_count() == 0:
        assert told.rows["balance_minor"].to_list() == [e.balance for e in YEAR.entries]


@pytest.mark.parametrize("variant", BANK)
def test_balances_stand_where_the_format_has_them(variant):
    (told,) = read(variant)
    assert told.opening_minor == (YEAR.opening if variant.startswith(WITH_OPENING) else None)
    assert told.closing_minor == (YEAR.closing if variant.startswith(WITH_CLOSING) else None)
    assert told.opens == YEAR.opens
    assert told.closes == (max(e.day for e in YEAR.entries) if variant.startswith(("qif", "plaid", "mt940-daily")) else YEAR.closes)
    assert told.account == ("Girokonto 3000" if variant.startswith("plaid") else YEAR.number)


def test_the_sample_is_worth_reading():
    """Umlauts, refunds, equal payments on one day, a balance below zero, a transfer, texts with marks that formats use."""
    pairs = [(e.day, e.amount, e.payee, e.text) for e in YEAR.entries]
    assert len(set(pairs)) < len(pairs)
    assert any("ß" in e.payee for e in YEAR.entries)
    assert any("&" in e.payee and '"' in e.text and ";" in e.text for e in YEAR.entries)
    assert {e.text for e in YEAR.entries} >= {"Umbuchung Tagesgeld", "Gutschrift Retoure Filiale 321"}
    assert min(e.balance for e in YEAR.entries) < 0
    assert YEAR.entries[-1].balance == YEAR.closing
    assert files.sample_account(40) == files.sample_account(40) != files.sample_account(40, seed=8)


@pytest.mark.parametrize("minor", [0, 1, -1, 10, -10, 99, 100, 123456789012])
@pytest.mark.parametrize("variant", ["ofx1-cp1252", "camt-001.08", "mt940-utf8", "qif-mdy"])
def test_amounts_are_exact(variant, minor):
    account = replace(SPRING, entries=(replace(SPRING.entries[0], amount=-250), replace(SPRING.entries[1], amount=minor)))
    told = read(variant, account)[0]
    if abs(minor) > 10**11:  # over a billion is set aside
        assert told.rejects["rule"].to_list()[-1] == "absurd amount" or told.rejects["rule"].to_list()[0] == "absurd amount"
    else:
        assert told.rows["amount_minor"].to_list() == [-250, minor]


# --- beside the libraries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["ofx1-cp1252", "ofx1-card", "ofx2"])
def test_ofxtools_reads_the_same(variant):
    _, write, how = VARIANTS[variant]
    tree = OFXTree()
    tree.parse(io.BytesIO(write(SPRING, **how)))
    (theirs,) = tree.convert().statements
    ours = read(variant, SPRING)[0]
    seen = [(t.dtposted.date(), int(t.trnamt * 100), t.name, t.memo, t.fitid) for t in theirs.transactions]
    assert ours.rows.select("day", "amount_minor", "payee", "text", "bank_id").rows() == seen
    assert (ours.account, ours.currency, ours.closing_minor) == (theirs.account.acctid, theirs.curdef, int(theirs.ledgerbal.balamt * 100))


def test_mt940_library_reads_the_same():
    raw = files.write_mt940(SPRING)
    theirs = mt940_library.parse(raw, options=mt940_library.Options.all())
    seen = [(t.data["entry_date"], int(t.data["amount"].amount * 100), t.data["bank_reference"]) for t in theirs]
    ours = read_mt940(raw, "x")[0]
    assert ours.rows.select("day", "amount_minor", "bank_id").rows() == seen
    assert [t.data["applicant_name"] for t in theirs] == ours.rows["payee"].to_list()
    assert ours.opening_minor == int(theirs.data["final_opening_balance"].amount.amount * 100)
    assert ours.closing_minor == int(theirs.data["final_closing_balance"].amount.amount * 100)


def test_one_bad_entry_loses_the_others_there_and_not_here():
    day = f"{SPRING.entries[2].day:%Y%m%d}".encode()
    ofx = files.write_ofx1(SPRING).replace(b"<DTPOSTED>" + day + b"120000.000[+1:CET]", b"<DTPOSTED>20250231", 1)
    tree = OFXTree()
    tree.parse(io.BytesIO(ofx))
    with pytest.raises(ValueError, match="dtposted"):
        tree.convert()
    swift = files.write_mt940(SPRING).replace(b":61:" + day[2:], b":61:25AB22", 1)
    with pytest.raises(RuntimeError):
        mt940_library.parse(swift)
    for told in (read_ofx(ofx, "x")[0], read_mt940(swift, "x")[0]):
        assert (len(told.rows), len(told.rejects)) == (len(SPRING.entries) - 1, 1)
        assert [f.severity for f in told.findings] == ["error"]


# --- hard cases of each format ------------------------------------------------------------------------------------------


def ofx(entries, head="", tail="<LEDGERBAL><BALAMT>1.00<DTASOF>20250331</LEDGERBAL>"):
    body = f"<CURDEF>EUR<BANKACCTFROM><ACCTID>7</BANKACCTFROM><BANKTRANLIST><DTEND>20250331{entries}</BANKTRANLIST>{tail}"
    return f"{files.OFX1_HEADER.format('102', 'USASCII', '1252')}<OFX>{head}<STMTRS>{body}</STMTRS></OFX>".encode("cp1252")


def trn(fitid, amount="-1.00", day="20250301", more=""):
    return f"<STMTTRN><TRNTYPE>OTHER<DTPOSTED>{day}<TRNAMT>{amount}<FITID>{fitid}{more}</STMTTRN>"


@pytest.mark.parametrize(("entries", "rows", "rules"), [
    (trn(1) + trn(2, "1,5"), [-100, 150], []),
    (trn(1) + trn(2, "1,234"), [-100], ["unreadable amount"]),
    (trn(1) + trn(2, ""), [-100], ["unreadable amount"]),
    (trn(1) + trn(2, day="0"), [-100], ["unreadable date"]),
    (trn(1, more="<CURRENCY><CURRATE>1.1<CURSYM>USD</CURRENCY>"), [-100], []),
    (trn(1, more="<CURRENCY><CURSYM>$</CURRENCY>"), [], ["unreadable currency"]),
    (trn(1, "-3") + trn(2, "-4", more="<CORRECTFITID>1<CORRECTACTION>REPLACE"), [-400], ["replaced"]),
    (trn(1, "-3") + trn(2, "0", more="<CORRECTFITID>1<CORRECTACTION>DELETE"), [], ["removed", "removed"]),
    (trn(1) + "</BANKTRANLIST><BANKTRANLISTP><STMTTRNP><TRNAMT>-9<NAME>x</STMTTRNP></BANKTRANLISTP><BANKTRANLIST>", [-100], ["pending"]),
    (trn(1).replace("</STMTTRN>", "") + trn(2), [-100], ["cut off"]),
    (trn(1, more="<MEMO>") + trn(2, more="<MEMO></MEMO><NAME>x"), [-100, -100], []),
    ("", [], []),
])
def test_ofx(entries, rows, rules):
    (told,) = read_ofx(ofx(entries), "x.ofx")
    assert told.rows["amount_minor"].to_list() == rows
    assert told.rejects["rule"].to_list() == rules


def test_ofx_of_several_accounts_and_currencies():
    raw = ofx(trn(1, more="<CURRENCY><CURSYM>USD</CURRENCY>") + trn(2, more="<ORIGCURRENCY><CURSYM>GBP</ORIGCURRENCY>"))
    raw = raw.replace(b"</OFX>", files.write_ofx1(SPRING, card=True).partition(b"<OFX>")[2])
    bank, card = read_ofx(raw, "two.ofx")
    assert bank.rows["currency"].to_list() == ["USD", "EUR"]
    assert (bank.account, card.account, len(card.rows)) == ("7", SPRING.number, len(SPRING.entries))
    assert card.rows["row"].to_list()[0] == 3


def test_ofx_on_one_line_in_small_letters():
    raw = b" ".join(ofx(trn(1)).split()).replace(b"STMTTRN", b"stmttrn")
    assert read_ofx(raw, "x")[0].rows["amount_minor"].to_list() == [-100]


def test_ofx_ids_that_are_none():
    (told,) = read_ofx(ofx(trn(0) + trn(0, "-2") + trn(5) + trn(5)), "x")
    assert told.rows["bank_id"].to_list() == [None, None, "5", "5"]
    assert [f.rule for f in told.findings] == ["shared id"]


def camt(*entries, version="001.08", head=""):
    name = f"urn:iso:std:iso:20022:tech:xsd:camt.053.{version}"
    return (f'<d:Document xmlns:d="{name}"><d:BkToCstmrStmt><d:Stmt><d:Acct><d:Id><d:IBAN>X</d:IBAN></d:Id></d:Acct>{head}'
            f"{''.join(entries)}</d:Stmt></d:BkToCstmrStmt></d:Document>").encode()


def ntry(amount="1.00", way="DBIT", status="<d:Sts><d:Cd>BOOK</d:Cd></d:Sts>", more="", ccy="EUR", day="<d:BookgDt><d:Dt>2025-03-01</d:Dt></d:BookgDt>"):
    return f'<d:Ntry><d:Amt Ccy="{ccy}">{amount}</d:Amt><d:CdtDbtInd>{way}</d:CdtDbtInd>{status}{day}{more}</d:Ntry>'


def details(amount, ccy="EUR", name="N", way=None):
    side = f"<d:CdtDbtInd>{way}</d:CdtDbtInd>" if way else ""
    return (f'<d:TxDtls><d:Amt Ccy="{ccy}">{amount}</d:Amt>{side}<d:RltdPties><d:Cdtr><d:Pty><d:Nm>{name}</d:Nm></d:Pty></d:Cdtr></d:RltdPties></d:TxDtls>')


@pytest.mark.parametrize(("entry", "rows", "rules"), [
    (ntry(), [-100], []),
    (ntry(way="CRDT"), [100], []),
    (ntry(way="X"), [], ["unreadable entry"]),
    (ntry("-1.00"), [], ["unreadable entry"]),
    (ntry("1.001"), [], ["unreadable amount"]),
    (ntry("1.00000"), [-100], []),
    (ntry("150", ccy="JPY"), [-150], []),
    (ntry(ccy="eur"), [], ["unreadable currency"]),
    (ntry(status="<d:Sts>PDNG</d:Sts>"), [], ["pending"]),
    (ntry(status="<d:Sts><d:Cd>INFO</d:Cd></d:Sts>"), [], ["pending"]),
    (ntry(day=""), [], ["unreadable date"]),
    (ntry(day="<d:ValDt><d:Dt>2025-03-01</d:Dt></d:ValDt>"), [-100], []),
    (ntry(day="<d:BookgDt><d:DtTm>2025-03-01T23:59:59.999-11:00</d:DtTm></d:BookgDt>"), [-100], []),
    (ntry("3.00", more=f"<d:NtryDtls>{details('1.00')}{details('2.00')}</d:NtryDtls>"), [-100, -200], []),
    (ntry("1.00", more=f"<d:NtryDtls>{details('3.00', way='DBIT')}{details('2.00', way='CRDT')}</d:NtryDtls>"), [-300, 200], []),
    (ntry("3.00", more=f"<d:NtryDtls>{details('1.00')}{details('2.50')}</d:NtryDtls>"), [-300], []),
    (ntry("3.00", more=f"<d:NtryDtls>{details('1.00')}{details('2.00', 'USD')}</d:NtryDtls>"), [-300], []),
    (ntry("3.00", more=f"<d:NtryDtls>{details('1.00')}</d:NtryDtls>"), [-300], []),
])
def test_camt(entry, rows, rules):
    (told,) = read_camt(camt(entry), "x.xml")
    assert told.rows["amount_minor"].to_list() == rows
    assert told.rejects["rule"].to_list() == rules


def test_camt_of_the_running_day():
    raw = files.write_camt053(SPRING).replace(b"camt.053", b"camt.052").replace(b"BkToCstmrStmt", b"BkToCstmrAcctRpt")
    raw = raw.replace(b"<Stmt>", b"<Rpt>").replace(b"</Stmt>", b"</Rpt>").replace(b"CLBD", b"ITBD")
    (told,) = read_camt(raw, "x.xml")
    assert (told.format, len(told.rows), told.opening_minor, told.closing_minor) == ("camt.052.001.08", len(SPRING.entries), SPRING.opening, SPRING.closing)


def test_statements_that_follow_on_each_other_are_one_and_others_are_not():
    march, april, may = (files.cut(YEAR, date(2025, m, 1), date(2025, m, last)) for m, last in ((3, 31), (4, 30), (5, 31)))
    parts = [files.write_camt053(a) for a in (march, april, may)]
    inner = [p[p.index(b"<Stmt>"): p.index(b"</Stmt>") + 7] for p in parts]
    both = parts[1].replace(inner[1], inner[1] + inner[2])
    (told,) = read_camt(both, "x.xml")
    assert (told.opening_minor, told.closing_minor, len(told.rows)) == (april.opening, may.closing, len(april.entries + may.entries))
    assert told.rows["row"].to_list() == list(range(1, len(told.rows) + 1))
    apart = parts[0].replace(inner[0], inner[0] + inner[2])
    assert [t.opening_minor for t in read_camt(apart, "x.xml")] == [march.opening, may.opening]


def mt(*lines, closed=":62F:C250331EUR1,00"):
    return "\n".join([":20:X", ":25:7", ":28C:1", ":60F:C250228EUR0,00", *lines, closed, "-"]).encode()


@pytest.mark.parametrize(("line", "rows", "rules"), [
    (":61:2503010301D1,00NTRFNONREF", [-100], []),
    (":61:250301C1,00NTRFNONREF", [100], []),
    (":61:2503010301RD1,00NTRFNONREF", [100], []),
    (":61:2503010301RC1,5NTRFNONREF", [-150], []),
    (":61:2503010301CR12,NTRFNONREF", [1200], []),
    (":61:2503010301EC12,NTRFNONREF", [], ["pending"]),
    (":61:2503010301D12NTRFNONREF", [], ["unreadable entry"]),
    (":61:2513010301D12,NTRFNONREF", [], ["unreadable date"]),
    (":61:250301    D12,NTRFNONREF", [-1200], []),
    (":61:2503010301D1,234NTRFNONREF", [], ["unreadable amount"]),
    (":61:", [], ["unreadable entry"]),
])
def test_mt940(line, rows, rules):
    (told,) = read_mt940(mt(line), "x.sta")
    assert told.rows["amount_minor"].to_list() == rows
    assert told.rejects["rule"].to_list() == rules
    assert told.rows["bank_id"].null_count() == len(told.rows)


DIALECTS = {  # written like the banks' own files: the message, and day, amount, payee, text, id of its entries, opening, closing
    "rabobank": (""":940:
:20:940S250301
:25:NL91ABNA0417164300
:28C:0
:60F:C250228EUR000000001000,00
:61:250301D000000000025,00N102EREF
NL70ABNA0987654321
:86:/EREF/01-03-2025 12:00 0030000987654321/BENM//NAME/STICHTING DERD
ENGELDEN HUUR/REMI/Huur maart 2025/ISDT/2025-03-01
:61:250302C000000000010,00N154NONREF
:86:/ORDP//NAME/J. DE VRIES/REMI/Etentje/ISDT/2025-03-02
:62F:C250302EUR000000000985,00
""", [("2025-03-01", -2500, "STICHTING DERDENGELDEN HUUR", "Huur maart 2025", None), ("2025-03-02", 1000, "J. DE VRIES", "Etentje", None)], 100000, 98500),
    "abn amro": ("""ABNANL2A
940
ABNANL2A
:20:ABN AMRO BANK NV
:25:417164300
:28:19321/1
:60F:C250228EUR100,
:61:2503020301D9,N192NONREF
:86:BEA   NR:XXX1234   01.03.25/12.54 BAKKER BART 2500 UTRECHT,PAS001

:61:2503010301D11,8N426NONREF
:86:GIRO   428428 KPN - DIGITENNE    BETALINGSKENM.  000000042188659
5314606715                       BETREFT FACTUUR
:62F:C250301EUR79,2
-
""", [("2025-03-01", -900, "BAKKER BART 2500 UTRECHT", "BEA NR:XXX1234 01.03.25/12.54 BAKKER BART 2500 UTRECHT,PAS001", None),
      ("2025-03-01", -1180, None, "GIRO 428428 KPN - DIGITENNE BETALINGSKENM. 000000042188659 5314606715 BETREFT FACTUUR", None)], 10000, 7920),
    "postfinance": (""":20:2025030108285927
:25:123456789
:28C:99/1
:60F:C250228CHF0,
:61:2503010301C79,7FMSC01916//NONREF
20250301007602198765432000000012
:86:GIRO AUS ONLINE-SIC 80532 AUFTRAGGEBER: JANE DOE
:62M:C250301CHF79,7
-
:20:2025030108285928
:25:123456789
:28C:99/2
:60M:C250301CHF79,7
:61:2503020302D9,9FMSC01651//A7
:86:EINKAUF
:62F:C250302CHF69,8
-
""", [("2025-03-01", 7970, None, "GIRO AUS ONLINE-SIC 80532 AUFTRAGGEBER: JANE DOE", None), ("2025-03-02", -990, None, "EINKAUF", "A7")], 0, 6980),
    "mbank": (""":20:ST250301CYC/0001
:25:PL61109010140000071219812874
:28C:1/1
:34F:PLN0
:13D:2503011815+0100
:61:2503010301DN12,01S020NONREF//MB250301012058
020-PRZELEW
:86:020~00PRZELEW KRAJOWY~20Czynsz marzec~21 2025~32Wspolnota Mieszkaniowa~33 Zielona
:90D:1PLN12,01
:90C:0PLN0,00
-
""", [("2025-03-01", -1201, "Wspolnota Mieszkaniowa Zielona", "Czynsz marzec 2025", "MB250301012058")], None, None),
    "old": (""":20:STARTUMS
:25:1222333444
:28:1/1
:NS:22Test GmbH
23Testkonto
:60F:C990102DEM0,00
:61:990104CM5000,00NCHG
:NS:01Verwendungszweck 1
:62F:C990104005000,00
""", [("1999-01-04", 500000, None, None, None)], 0, 500000),
}


@pytest.mark.parametrize("bank", DIALECTS)
def test_mt940_as_banks_write_it(bank):
    text, rows, opening, closing = DIALECTS[bank]
    (told,) = read_mt940(text.encode(), "x.sta")
    got = told.rows.select(pl.col("day").cast(pl.String), "amount_minor", "payee", "text", "bank_id").rows()
    assert got == rows
    assert (told.opening_minor, told.closing_minor, len(told.rejects)) == (opening, closing, 0)


def test_ofx_with_empty_tags_takes_the_currency_of_its_rows():
    raw = b"\n\n" + ofx(trn("", more="<NAME></NAME><CURRENCY><CURRATE>1.0</CURRATE><CURSYM>AUD</CURSYM></CURRENCY>"), tail="<LEDGERBAL><BALAMT></BALAMT></LEDGERBAL>")
    (told,) = read_ofx(raw.replace(b"<CURDEF>EUR", b"<CURDEF></CURDEF>"), "x.ofx")
    assert (told.currency, told.rows["currency"].to_list(), told.rows["bank_id"].to_list(), told.format) == ("AUD", ["AUD"], [None], "ofx 1.0.2")


def test_qif_with_remarks_lists_and_splits():
    raw = b"""# kept by hand
!Type:Cat
NFood
^
!Type:Bank
D2/10'2020
T0.00
POpening Balance
L[Export]
^
D2/14'2020
T67.50
PPhone
L--Split--
SBills
D1/10'2020
$-15.00
SBills
$82.50
^
"""
    (told,) = qif(raw, "x.qif")
    assert told.rows.select(pl.col("day").cast(pl.String), "amount_minor", "label").rows() == [("2020-02-14", 6750, None)]
    assert {f.rule for f in told.findings} == {"opening balance", "split entries", "other lists"}


def test_mt940_cut_within_an_amount_is_not_a_smaller_amount():
    (told,) = read_mt940(mt(":61:2503010301D1,00NTRFNONREF", ":61:2503010301D850,", closed="").removesuffix(b"\n\n-"), "x.sta")
    assert told.rows["amount_minor"].to_list() == [-100]
    assert told.rejects["rule"].to_list() == ["cut off"]
    assert {f.severity for f in told.findings} == {"error", "warning"}


@pytest.mark.parametrize(("record", "rows", "rules"), [
    ("D1/13'25\nT-1.00\n", [-100], []),
    ("D1/13'25\nU-1.00\n", [-100], []),
    ("D1/13'25\nPx\n", [], ["unreadable amount"]),
    ("T-1.00\n", [], ["unreadable date"]),
    ("D1/13'25\nT-1,000.00\nSFood\n$-400.00\nSRent\n$-600.00\n", [-100000], []),
    ("D1/13'25\nT-$1.00\n", [], ["unreadable amount"]),
    ("D1/13'25\nT-1.00\nU-1.00\nCX\nN123\nAstreet\nAtown\nLFood\n", [-100], []),
])
def test_qif(record, rows, rules):
    (told,) = qif(f"!Type:Bank\n{record}^\n".encode(), "x.qif")
    assert told.rows["amount_minor"].to_list() == rows
    assert told.rejects["rule"].to_list() == rules


@pytest.mark.parametrize("how", ["one", "pages"])
def test_plaid_changes_are_applied_in_order(how):
    (page,) = files.plaid_pages(SPRING)
    first, second, third = (e["transaction_id"] for e in page["added"][:3])
    changed = {**page["added"][0], "amount": 7.25}
    waiting = {**page["added"][1], "transaction_id": "p", "pending": True}
    if how == "one":
        page["added"].append(waiting)
        page["modified"], page["removed"] = [changed], [{"transaction_id": second}]
        raw = json.dumps(page)
    else:
        more = {**page, "added": [waiting], "modified": [changed], "removed": [{"transaction_id": second}]}
        raw = json.dumps([page, more])
    (told,) = read_plaid(raw.encode(), "x.json")
    amounts = dict(told.rows.select("bank_id", "amount_minor").rows())
    assert amounts[first] == -725
    assert second not in amounts
    assert third in amounts
    assert sorted(told.rejects["rule"]) == ["pending", "removed", "replaced"]
    assert len(told.rows) + len(told.rejects) == len(SPRING.entries) + 2


# --- files that are hostile, cut or mis-encoded -------------------------------------------------------------------------

BOMB = b'<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize("declared", [BOMB, OUTSIDE, b"<!DOCTYPE x>", b'<!DOCTYPE x SYSTEM "http://localhost:1/x.dtd">'])
@pytest.mark.parametrize("variant", ["ofx2", "camt-001.02", "camt-001.08"])
def test_document_types_are_refused(variant, declared):
    def change(raw):
        at = raw.index(b"<OFX>") if b"<OFX>" in raw else raw.index(b"<Document")
        return (raw[:at] + declared + raw[at:]).replace(b"Wohnbau", b"&b;&e;")

    with pytest.raises(SourceError, match="document type"):
        read(variant, SPRING, change)


@pytest.mark.parametrize("variant", ["ofx2", "camt-001.08"])
def test_utf7_and_other_encodings_are_refused(variant):
    with pytest.raises(SourceError):
        read(variant, SPRING, lambda raw: raw.replace(b'"UTF-8"', b'"UTF-7"', 1))
    with pytest.raises(SourceError):
        read(variant, SPRING, lambda raw: raw.replace(b'"UTF-8"', b'"utf-9"', 1))


@pytest.mark.parametrize("variant", BANK)
def test_wrong_encodings(variant):
    """Whatever the bytes are taken for, no entry is lost and nothing but `SourceError` comes out."""
    for encode in ("cp1252", "utf-8", "utf-16", "cp437"):
        def change(raw, encode=encode):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("cp1252")
            return text.encode(encode, "replace")

        try:
            told = read(variant, SPRING, change)
        except SourceError:
            assert variant.startswith(("camt", "ofx", "qfx")), encode
            continue
        assert len(told[0].rows) == len(SPRING.entries)
        assert told[0].rows["amount_minor"].to_list() == [e.amount for e in SPRING.entries]


@pytest.mark.parametrize("variant", BANK)
def test_cut_at_every_50th_byte(variant):
    """A cut file gives its first entries unchanged and says that it is cut, or is refused."""
    _, write, how = VARIANTS[variant]
    account = files.sample_account(days=11, start=date(2025, 1, 20))
    raw, want = write(account, **how), [(e.day, e.amount) for e in account.entries]
    whole = 0
    for at in range(0, len(raw) - 10, 50):
        try:
            told = read(variant, account, lambda raw, at=at: raw[:at])
        except SourceError:
            continue
        got = [row for t in told for row in t.rows.select("day", "amount_minor").iter_rows()]
        assert got == want[: len(got)]
        assert {f.severity for t in told for f in t.findings} & {"error", "warning"} or variant.startswith(("qif", "mt940-daily")), at
        whole += got == want
    assert whole <= 12  # a cut behind the last entry


@pytest.mark.parametrize("variant", BANK)
def test_too_large_empty_and_foreign_files(variant):
    reader = VARIANTS[variant][0]
    for raw in (b"", b" \n", b"PK\x03\x04\x00\x00", b"%PDF-1.7", b"\x00" * 99, b"{}", b"[]", b"<html><body>Login</body></html>", b"\xff\xfe<\x00", b"null", b"!"):
        with pytest.raises(SourceError, match=r"x\.dat"):
            reader(raw, "x.dat")


def test_more_than_200_mb_is_refused_before_anything_is_read():
    huge = bytes(200_000_001)
    for reader in (read_ofx, read_camt, read_mt940, read_qif, read_plaid):
        begun = time.perf_counter()
        with pytest.raises(SourceError, match="200 MB"):
            reader(huge, "x")
        assert time.perf_counter() - begun < 2


@pytest.mark.parametrize(("reader", "raw"), [
    (read_plaid, b"[" * 200_000), (read_plaid, b'{"added":' * 50_000), (read_camt, b"<a>" * 200_000),
    (read_camt, camt("<d:Ntry>" * 20_000 + "</d:Ntry>" * 20_000)), (read_ofx, b"<OFX>" + b"<STMTRS>" * 50_000),
    (read_ofx, b"<OFX><STMTRS>" + b"<STMTTRN><MEMO><![CDATA[" * 20_000), (read_ofx, b"<OFX><STMTRS>" + b"<" * 200_000),
    (read_mt940, b":20:x\n:25:y\n" * 20_000), (read_mt940, b":20:x\n:25:y\n:86:" + b"?20?" * 50_000),
    (read_mt940, b":20:x\n:61:" + b"1" * 200_000), (read_qif, b"!Type:Bank\nD1/13/25\nT" + b"1,1." * 50_000 + b"x\n^"),
    (read_qif, b"!Type:Bank\n" + b"D1/1/25\n" * 50_000 + b"^"), (read_plaid, b'{"added": [], "accounts": [' + b"1," * 50_000 + b"1]}"),
], ids=range(13))
def test_no_file_takes_forever(reader, raw):
    begun = time.process_time()
    with contextlib.suppress(SourceError):
        assert all(isinstance(s, Statement) for s in reader(raw, "x"))
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("variant", ["ofx1-cp1252", "ofx2", "camt-001.08", "mt940-utf8", "mt940-daily", "qif-mdy", "plaid"])
def test_a_long_history_is_read_in_seconds(variant):
    """Ten years of a busy account; 100,000 entries take 4 to 12 s of a processor, so these must take far less than 10."""
    account = files.sample_account(days=3650, start=date(2015, 1, 1))
    raw = VARIANTS[variant][1](account, **VARIANTS[variant][2])
    begun = time.process_time()
    (told,) = VARIANTS[variant][0](raw, "x.dat")
    assert time.process_time() - begun < 10
    assert told.rows["amount_minor"].to_list() == [e.amount for e in account.entries]


# --- anything at all ----------------------------------------------------------------------------------------------------

SEEDS = {name: write(files.sample_account(days=4, start=date(2025, 1, 13)), **how) for name, (_, write, how) in BANK.items()}
ENTRIES = {"ofx": b"<STMTTRN>", "qfx": b"<STMTTRN>", "mt940": b"\n:61:", "qif": b"\n^", "plaid": b'"transaction_id"'}
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def mutated(draw, raw):
    """`raw` with some bytes changed, dropped, doubled or put in."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 30))
        new = draw(st.one_of(st.just(b""), st.binary(max_size=8), st.just(bytes(data[at : at + size]) * 2),
                             st.sampled_from([b"<", b">", b"&", b"\n^\n", b":61:", b"\r", b"\xff", b"\0", b"9" * 30, b"NaN", b'"', b"-", b"0000", b"\xed\xa0\x80"])))
        data[at : at + size] = new
    return bytes(data)


@pytest.mark.parametrize("variant", BANK)
@FUZZ
@given(data=st.data())
def test_changed_bytes_give_statements_or_a_reason(variant, data):
    raw = data.draw(mutated(SEEDS[variant]))
    try:
        told = VARIANTS[variant][0](raw, "x.dat")
    except SourceError:
        return
    check(told)
    marker = next((mark for kind, mark in ENTRIES.items() if variant.startswith(kind)), None)
    if variant.startswith(("ofx", "qfx")):
        # every start tag inside an account is an entry, whatever is broken around it
        inside = raw.partition(b"<OFX>")[2]
        assert sum(len(t.rows) + len(t.rejects) for t in told) <= inside.upper().count(marker) + inside.upper().count(b"<STMTTRNP>")


def check(told):
    """What holds for whatever a reader gives."""
    assert told
    for t in told:
        assert isinstance(t, Statement)
        assert dict(t.rows.schema) == ROWS
        assert dict(t.rejects.schema) == REJECTS
        assert t.rows.select(pl.col("day", "amount_minor", "currency", "row").null_count()).row(0) == (0, 0, 0, 0)
        assert t.rows["currency"].str.contains("^[A-Z]{3}$").all()
        counted = sum(f.count for f in t.findings if f.rule in set(t.rejects["rule"]))
        assert counted >= len(t.rejects), "what is set aside is told"
        assert str(t)
        assert all(str(f) for f in t.findings)


@pytest.mark.parametrize("reader", [read_ofx, read_camt, read_mt940, qif, read_plaid])
@FUZZ
@given(raw=st.binary(max_size=200))
@example(raw=b"<OFX><STMTRS><STMTTRN></STMTTRN></STMTRS></OFX>")
@example(raw=b"!Type:Bank\n^\n^")
@example(raw=b'{"added": [{"amount": 1, "date": "2025-01-01", "iso_currency_code": "EUR", "name": "\\ud800"}]}')
@example(raw=b'{"added": [{"transaction_id": {}, "account_id": [], "amount": true, "date": 3}]}')
@example(raw=b":20:\n:25:\n:60F:\n:61:\n:86:\n:62F:")
def test_any_bytes_give_statements_or_a_reason(reader, raw):
    with contextlib.suppress(SourceError):
        check(reader(raw, "x.dat"))


@pytest.mark.parametrize("variant", BANK)
@FUZZ
@given(which=st.data())
def test_rows_and_rejects_are_the_entries(variant, which):
    """Breaking values (never the structure) of some entries moves them from rows to rejects, and touches no other entry."""
    account = files.sample_account(days=10, start=date(2025, 1, 14))
    broken = which.draw(st.sets(st.integers(0, len(account.entries) - 1), min_size=1, max_size=4))
    spoil = which.draw(st.sampled_from(["amount", "day"]))
    raw = VARIANTS[variant][1](account, **VARIANTS[variant][2])
    place = raw.index(b"POpening") if variant.startswith("qif") else 0
    for n, e in enumerate(account.entries):
        before, value = (part.encode() for part in spelled(variant, e, spoil))
        place = raw.index(before + value, place) + len(before)
        if n in broken:
            bad = b"null" if variant.startswith("plaid") and spoil == "amount" else b"Z" * len(value)
            raw = raw[:place] + bad + raw[place + len(value):]
    told = VARIANTS[variant][0](raw, "x.dat")
    rows = pl.concat([t.rows for t in told])
    extra = 1 if variant.startswith("qif") else 0  # its opening balance
    assert len(rows) + sum(len(t.rejects) for t in told) == len(account.entries) + extra
    kept = [(e.day, e.amount) for n, e in enumerate(account.entries) if n not in broken]
    assert rows.select("day", "amount_minor").rows() == kept
    assert {f.severity for t in told for f in t.findings} >= {"error"}


def spelled(variant, e, what):
    """How a format spells the amount or day of an entry: what stands before it, and the value."""
    plain, signed = files.decimal(abs(e.amount)), files.decimal(e.amount)
    day = {"ofx": ("<DTPOSTED>", f"{e.day:%Y%m%d}"), "qfx": ("<DTPOSTED>", f"{e.day:%Y%m%d}"), "camt": ("<BookgDt><Dt>", f"{e.day}"),
           "mt940": (":61:", f"{e.day:%y%m%d}{e.day:%m%d}"), "plaid": ('"date": "', f"{e.day}"), "qif-dmy": ("\nD", f"{e.day:%d/%m/%Y}"),
           "qif-ymd": ("\nD", f"{e.day}"), "qif": ("\nD", f"{e.day.month}/{e.day.day:2d}'{e.day:%y}")}
    amount = {"ofx": ("<TRNAMT>", signed), "qfx": ("<TRNAMT>", signed), "camt": ('<Ntry><Amt Ccy="EUR">', plain),
              "mt940": ("D"[e.amount > 0 :] + "C"[e.amount < 0 :] + "R", plain.replace(".", ",")), "plaid": ('"amount": ', f"{-e.amount / 100}"),
              "qif": ("\nT", files.decimal(e.amount, ".", ","))}
    return next(v for kind, v in (day if what == "day" else amount).items() if variant.startswith(kind))


def test_mt940_currency_behind_the_account_is_no_part_of_it():
    raw = ":20:P\n:25:{}\n:60F:C140219EUR662,23\n:61:1402200220C1,56NTRFNONREF\n:86:X\n:62F:C140220EUR663,79\n-\n"
    for written, account in (("NL69INGB0123456789EUR", "NL69INGB0123456789"), ("50070010/123456789EUR", "50070010/123456789"), ("NL69INGB0123456789", "NL69INGB0123456789")):
        assert [s.account for s in read_mt940(raw.format(written).encode(), "a.sta")] == [account]
    assert read_mt940(raw.replace("EUR", "MUR").format("MU17BOMM0101101030300200000MUR").encode(), "a.sta")[0].account == "MU17BOMM0101101030300200000MUR"


@pytest.mark.parametrize(("about", "payee"), [
    ("BEA   NR:CT123456  03.01.14/12.54 ALBERT HEIJN 1512 UTRECHT,PAS123", "ALBERT HEIJN 1512 UTRECHT"),
    ("SEPA OVERBOEKING                 IBAN: NL46ABNA0499998748\nBIC: ABNANL2A                    NAAM: BASISONDERWIJS STG\nOMSCHRIJVING: SALARIS JAN", "BASISONDERWIJS STG"),
    ("52.89.39.882                    MYCOM DEN HAAG", None),
])
def test_mt940_names_in_dutch_texts(about, payee):
    raw = f":20:ABN AMRO BANK NV\n:25:500950253\n:60F:C140101EUR100,00\n:61:1401030103D3,75N426NONREF\n:86:{about}\n:62F:C140103EUR96,25\n-\n"
    assert read_mt940(raw.encode(), "a.sta")[0].rows["payee"].to_list() == [payee]


@pytest.mark.parametrize(("written", "minor"), [("-1.234,56", -123456), ("+1 234,56", 123456), ("1,234.56", 123456), ("+00000000000000.2400", 24), ("-0,05", -5), ("1,234", None), ("12.34,56", None), ("1 2", None)])
def test_ofx_amounts_as_banks_write_them(written, minor):
    raw = (f"<OFX><STMTRS><CURDEF>EUR<BANKACCTFROM><ACCTID>1</BANKACCTFROM><BANKTRANLIST><STMTTRN><DTPOSTED>20240115<TRNAMT>{written}<FITID>1</STMTTRN></BANKTRANLIST>"
           f"<LEDGERBAL><BALAMT>{written}<DTASOF>20240115</LEDGERBAL></STMTRS></OFX>")
    (statement,) = read_ofx(raw.encode(), "a.ofx")
    assert statement.rows["amount_minor"].to_list() == [minor] * (minor is not None)
    assert statement.closing_minor == minor
    assert ("unreadable balance" in {f.rule for f in statement.findings}) is (minor is None)
