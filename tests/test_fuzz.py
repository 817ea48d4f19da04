"""Whatever is in a file: rows with findings, or a `SourceError` that says what is wrong. Never another exception."""

import io
import json
import os
import struct
import time
import zipfile
from datetime import date

import pytest
import statement_files as bank
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fincoach.data.source import REJECTS, ROWS, Source, SourceError
from fincoach.data.statements import FORMATS, detect, read_statement, read_statements

ACCOUNT = bank.cut(bank.sample_account(20), date(2025, 1, 1), date(2025, 1, 20))
WHOLE = {kind: write(ACCOUNT) for kind, write in bank.WRITERS.items()}
ENDINGS = {"csv": "csv", "xlsx": "xlsx", "ofx1": "ofx", "ofx2": "ofx", "qfx": "qfx", "camt053": "xml", "mt940": "sta", "qif": "qif", "plaid": "json"}
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def tried(function, *args):
    """What a function gives and None, or None and the words of its refusal."""
    try:
        return function(*args), None
    except SourceError as error:
        refused = error
    assert "its reader failed" not in str(refused), f"{refused} from {refused.__cause__!r}"
    return None, str(refused)


def outcome(path):
    """What reading a file came to: its statements, or the words of a refusal. The reader itself must not have failed."""
    read, refused = tried(read_statement, path)
    if refused:
        assert path.name[:20] in refused
        return refused
    for statement in read:
        assert dict(statement.rows.schema) == ROWS
        assert dict(statement.rejects.schema) == REJECTS
        assert not statement.rows["day"].null_count()
        assert not statement.rows["amount_minor"].null_count()
    return read


def written(tmp_path, raw, name="statement.bin"):
    path = tmp_path / name
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("kind", bank.WRITERS)
@QUICK
@given(data=st.data())
def test_cut_and_altered_files(kind, data, tmp_path):
    """Cut at both ends, bytes changed, pieces doubled, dropped or put in."""
    raw = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        far = min(len(raw), at + data.draw(st.integers(0, 400)))
        what = data.draw(st.sampled_from(["change", "drop", "double", "put in", "cut"]))
        if what == "change":
            raw[at:at + 1] = bytes([data.draw(st.integers(0, 255))])
        elif what == "drop":
            del raw[at:far]
        elif what == "double":
            raw[at:at] = raw[at:far]
        elif what == "put in":
            raw[at:at] = data.draw(st.sampled_from([b"\0", b"\xff\xfe", b'"', b"<", b"&amp;", b"&#0;", b"9" * 400, b"-", b"1e308", b"NaN", b"\r\n:61:", b"^\n", b"]]>", "٣€\u202e".encode(), b"{[", b",,,,"]))
        else:
            del raw[far:]
    outcome(written(tmp_path, bytes(raw), f"statement.{ENDINGS[kind]}"))


@QUICK
@given(raw=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda t: t.encode("utf-8", "surrogatepass")),
                     st.builds(lambda head, rest: head + rest, st.sampled_from([b"OFXHEADER:100\n", b"<OFX>", b":20:X\n:25:", b"!Type:Bank\nD", b'{"added": [', b"PK\x03\x04xl/",
                                                                               b'<?xml version="1.0"?><Document xmlns="urn:iso:std:iso:20022:tech:xsd:camt.053.001.02">', b"Date,Amount\n2025-01-01,"]),
                               st.binary(max_size=200))))
def test_anything_at_all(raw, tmp_path):
    outcome(written(tmp_path, raw))


@QUICK
@given(value=st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
                          lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["added", "accounts", "amount", "date", "account_id", "transaction_id", "name", "removed"]), inner, max_size=5)), max_leaves=12))
def test_any_json(value, tmp_path):
    outcome(written(tmp_path, json.dumps({"added": value, "accounts": value}).encode(), "plaid.json"))
    outcome(written(tmp_path, json.dumps({"added": [value], "accounts": [value]}).encode(), "plaid.json"))


@pytest.mark.parametrize("kind", bank.WRITERS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "cp037", "utf-7", "latin-1"])
def test_other_encodings(kind, encoding, tmp_path):
    text = WHOLE[kind].decode("utf-8", "replace")
    outcome(written(tmp_path, text.encode(encoding, "replace"), f"statement.{ENDINGS[kind]}"))


@pytest.mark.parametrize("kind", bank.WRITERS)
def test_a_wrong_extension_does_not_matter(kind, tmp_path):
    rows = {ending: outcome(written(tmp_path, WHOLE[kind], f"statement.{ending}")) for ending in ("csv", "pdf", "")}
    assert all(len(r[0].rows) == len(ACCOUNT.entries) for r in rows.values())


BOMB = """<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>"""
HOSTILE = {
    "entities.xml": (BOMB + '<Document xmlns="urn:iso:std:iso:20022:tech:xsd:camt.053.001.02"><BkToCstmrStmt>&c;</BkToCstmrStmt></Document>').encode(),
    "outside.xml": b'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><Document xmlns="urn:iso:std:iso:20022:tech:xsd:camt.053.001.02"><BkToCstmrStmt>&x;</BkToCstmrStmt></Document>',
    "entities.ofx": ('<?OFX OFXHEADER="200" VERSION="203"?>' + BOMB + "<OFX>&c;</OFX>").encode(),
    "deep.json": b'{"added": ' + b"[" * 50_000,
    "deep2.json": b'{"added": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep.xml": b'<Document xmlns="urn:iso:std:iso:20022:tech:xsd:camt.053.001.02">' + b"<a>" * 50_000,
    "deep.ofx": b"OFXHEADER:100\n\n<OFX>" + b"<A>" * 20_000,
    "long.csv": b"Date,Amount\n2025-01-01," + b"1" * 1_000_000,
    "wide.csv": b"Date,Amount" + b",x" * 1_000 + b"\n",
    "quote.csv": b'Date,Amount\n"' + b"2025-01-01,1\n" * 20_000,
    "surrogate.json": b'{"added": [{"name": "\\ud800", "amount": 1, "date": "2025-01-01"}], "accounts": []}',
    "huge.json": b'{"added": [{"amount": 1e400, "date": "9999-12-31", "transaction_id": "a"}], "accounts": []}',
    "nul.csv": b"Date,Amount\n\0\0\0,1\n", "only.csv": b"Date,Amount\n", "mt.sta": b":20:A\r\n:25:1\r\n:60F:C999999EUR1,\r\n:61:9913329913D,\r\n:62F:X",
    "qif.qif": b"!Type:Bank\nD99/99/9999\nT1,2,3.4.5\n^\nD1/1'0\nT\n^", "zero.bin": b"\0" * 5000, "newlines.csv": b"\n" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, tmp_path):
    begun = time.process_time()
    outcome(written(tmp_path, HOSTILE[name], name))
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("name", ["entities.xml", "outside.xml", "entities.ofx"])
def test_entities_are_refused(name, tmp_path):
    assert isinstance(outcome(written(tmp_path, HOSTILE[name], name)), str)


def packed(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return out.getvalue()


def test_archives_and_bombs(tmp_path):
    """A sheet that says it has 4 GB, one that says less than it has, other archives."""
    sheet = b" " * 12_345_678
    bomb = packed({"[Content_Types].xml": b"<Types/>", "xl/workbook.xml": b"<workbook/>", "xl/worksheets/sheet1.xml": sheet})
    begun = time.process_time()
    for said in (4_000_000_000, 10):
        lies = bomb.replace(struct.pack("<L", len(sheet)), struct.pack("<L", said))
        assert lies != bomb
        assert isinstance(outcome(written(tmp_path, lies, "bomb.xlsx")), str)
    assert time.process_time() - begun < 5
    assert isinstance(outcome(written(tmp_path, packed({"a.csv": b"Date,Amount\n"}), "files.zip")), str)
    assert isinstance(outcome(written(tmp_path, packed({"../../evil": b"x", "xl/workbook.xml": b"no xml"}), "evil.xlsx")), str)


def test_what_is_no_file(tmp_path):
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nothing")
    (tmp_path / "dir.ofx").mkdir()
    os.mkfifo(tmp_path / "pipe.qif")
    for name in ("loop.csv", "gone.csv", "dir.ofx", "pipe.qif"):
        assert isinstance(outcome(tmp_path / name), str)
    (tmp_path / "real.ofx").write_bytes(WHOLE["ofx2"])
    (tmp_path / "link.ofx").symlink_to(tmp_path / "real.ofx")
    source = read_statements(tmp_path)
    assert len(source.frames["transactions"]) == len(ACCOUNT.entries)
    assert {"gone.csv", "loop.csv", "pipe.qif"} <= set(next(f for f in source.findings if f.rule == "left aside").examples)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = written(tmp_path, WHOLE["ofx2"], "a.ofx")
    path.chmod(0)
    assert "cannot open" in outcome(path)


def test_a_file_that_is_too_big(tmp_path):
    with (tmp_path / "big.csv").open("wb") as file:
        file.truncate(201 * 2**20)
    assert "200 MB" in outcome(tmp_path / "big.csv")


@settings(QUICK, max_examples=12)
@given(data=st.data())
def test_a_folder_of_altered_files(data, tmp_path):
    """Merging goes on with what is left of them."""
    for kind in data.draw(st.lists(st.sampled_from(list(WHOLE)), min_size=1, max_size=3, unique=True)):
        raw = WHOLE[kind]
        a, b = sorted(data.draw(st.integers(0, len(raw))) for _ in range(2))
        raw = data.draw(st.sampled_from([raw, raw[:b], raw[:a] + raw[b:], raw.replace(b"2025", b"2026", 3), raw.replace(b"EUR", b"USD", 2), raw.replace(b"-", b"", 5)]))
        (tmp_path / f"{kind}.{ENDINGS[kind]}").write_bytes(raw)
    source, refused = tried(read_statements, tmp_path)
    if refused:
        return
    assert isinstance(source, Source)
    assert not [f for f in source.findings if "its reader failed" in f.advice]
    assert source.files["rows"].sum() == source.files["kept"].sum() + source.files["duplicates"].sum()
    assert source.files["kept"].sum() == len(source.frames["transactions"])


def test_detect_never_fails():
    for raw in HOSTILE.values():
        try:
            assert detect(raw, "x") in FORMATS
        except SourceError:
            continue
