"""A person's own files from the command line: the page, the database, the copy for others, the steps of the tables."""

import json
import re

import pytest
import statement_files as banks

from fincoach.cli import main


@pytest.fixture
def shell(capsys):
    """Runs a command in this process: exit code, its JSON object (or text), standard error."""

    def run(*words):
        capsys.readouterr()
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in words else out, err

    return run


@pytest.fixture(scope="module")
def account():
    return banks.sample_account(days=200)


@pytest.fixture
def folder(tmp_path, account):
    """The same account as three formats wrote it down, and a note that is no statement."""
    into = tmp_path / "statements"
    into.mkdir()
    (into / "a.xml").write_bytes(banks.write_camt053(account))
    (into / "b.sta").write_bytes(banks.write_mt940(account))
    (into / "c.ofx").write_bytes(banks.write_ofx2(account))
    (into / "read me.md").write_text("nothing to see")
    return into


def test_coach_writes_one_page_from_a_folder(shell, folder, tmp_path):
    code, found, _ = shell("coach", folder, "--zone", "Europe/Berlin", "--folder", tmp_path / "out", "--json")
    assert code == 0
    assert sorted(f["format"].split(".")[0].split(" ")[0] for f in found["files"]) == ["camt", "mt940", "ofx"]
    assert sum(f["kept"] for f in found["files"]) == max(f["rows"] for f in found["files"])
    assert found["rejected"] == 0
    page = (tmp_path / "out/coach.html").read_text(encoding="utf-8")
    assert found["page"] == str(tmp_path / "out/coach.html")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|src=[\"'](?!data:)|<script", page)
    assert any("read me.md" in e for f in found["findings"] for e in f["examples"])


def test_one_unreadable_file_does_not_stop_the_others(shell, folder):
    (folder / "broken.xml").write_text("<Document><not closed")
    code, found, _ = shell("coach", folder, "--json")
    assert code == 0
    assert [f["table"] for f in found["findings"] if f["severity"] == "error"] == ["broken.xml"]


def test_how_a_file_is_read_can_be_saved_and_named(shell, tmp_path, account):
    file, mapping = tmp_path / "mine.csv", tmp_path / "mine.toml"
    file.write_bytes(banks.write_csv(account))
    assert shell("coach", file, "--save-mapping", mapping)[0] == 0
    _, plain, _ = shell("coach", file, "--json")
    code, mapped, _ = shell("coach", file, "--mapping", mapping, "--json")
    assert code == 0
    counted = [[(f["rows"], f["kept"], f["opening"], f["closing"], f["balanced"]) for f in found["files"]] for found in (plain, mapped)]
    assert counted[0] == counted[1]
    assert counted[0][0][0] == len(account.entries)
    (tmp_path / "a.xml").write_bytes(banks.write_camt053(account))
    code, _, err = shell("coach", tmp_path / "a.xml", "--save-mapping", mapping)
    assert code == 2
    assert "one CSV file" in err


@pytest.mark.parametrize("text", ["", "hello", "<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>"])
def test_nothing_readable_is_a_refusal_and_no_page(shell, tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    code, out, err = shell("coach", tmp_path / "a.xml", "--folder", tmp_path / "out")
    assert code == 2
    assert out == ""
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_correction_is_remembered_and_holds_for_import_too(shell, tmp_path):
    march = tmp_path / "march.csv"
    march.write_text("Date,Amount,Currency,Merchant\n" + "".join(f"2025-03-{d},-{d}.50,EUR,Zyxco\n" for d in range(13, 30)))
    assert shell("coach", march, "--correct", "Zyxco=travel")[0] == 0
    _, found, _ = shell("coach", march, "--json")
    assert not [f for f in found["findings"] if f["rule"] == "uncategorised"]
    shell("import", march, "--person", "ann")
    from fincoach.data.database import connect
    from fincoach.settings import load_settings

    with connect(load_settings().database_url).connect() as c:
        rows = c.exec_driver_sql("SELECT DISTINCT c.name FROM transactions t JOIN categories c ON c.id = t.category_id").all()
    assert rows == [("travel",)]
    assert shell("coach", march, "--correct", "Zyxco")[0] == 2
    assert shell("coach", march, "--correct", "Zyxco=magic")[0] == 2


def test_import_takes_the_same_month_twice_without_harm_and_adds_the_next(shell, tmp_path, account):
    first, both = tmp_path / "first.xml", tmp_path / "both.sta"
    first.write_bytes(banks.write_camt053(banks.sample_account(days=100)))
    both.write_bytes(banks.write_mt940(banks.sample_account(days=100)))
    code, one, _ = shell("import", first, "--json")
    again = shell("import", first, "--json")[1]
    assert code == 0
    assert again["rows"].get("transactions", 0) == 0
    assert again["known"] == one["rows"]["transactions"]


def test_anonymise_a_statement_gives_a_file_that_reads_again_and_names_nobody(shell, tmp_path, account):
    file = tmp_path / "mine.xml"
    file.write_bytes(banks.write_camt053(account))
    code, _, _ = shell("anonymise", file, "--to", tmp_path / "shared.csv", "--json")
    assert code == 0
    shared = (tmp_path / "shared.csv").read_text(encoding="utf-8")
    assert account.number not in shared
    assert not [e.payee for e in account.entries if e.payee and e.payee in shared]
    code, read, _ = shell("coach", tmp_path / "shared.csv", "--json")
    assert code == 0
    assert sum(f["rows"] for f in read["files"]) == shared.count("\n") - 1


def test_anonymise_a_database_needs_a_new_one(shell, tmp_path, account, monkeypatch):
    file = tmp_path / "mine.xml"
    file.write_bytes(banks.write_camt053(account))
    url = f"sqlite:///{tmp_path}/own.db"
    shell("import", file, "--database", url)
    code, _, err = shell("anonymise", url)
    assert code == 2
    assert "--to" in err
    assert shell("anonymise", url, "--to", f"sqlite:///{tmp_path}/shared.db")[0] == 0
    counts = [shell("db", "counts", "--database", u, "--json")[1]["counts"] for u in (url, f"sqlite:///{tmp_path}/shared.db")]
    assert counts[0]["transactions"] >= counts[1]["transactions"] > 0
    assert counts[0]["users"] == counts[1]["users"]


def test_the_steps_of_the_tables_from_a_shell(shell, tmp_path):
    at = ("--database", f"sqlite:///{tmp_path}/a.db", "--json")
    assert shell("db", "create_behavioral_tables", *at)[0] == 0
    assert shell("db", "create_behavioral_tables", "--verify", *at)[0] == 0
    assert shell("db", "create_continuous_learning_tables", "--verify", *at)[0] == 1
    assert shell("db", "create_continuous_learning_tables", *at)[0] == 0
    assert shell("db", "create_continuous_learning_tables", "--rollback", *at)[0] == 0
    assert shell("db", "create_behavioral_tables", "--drop", *at)[0] == 0
    assert shell("db", "create_behavioral_tables", "--verify", *at)[0] == 1
    code, found, _ = shell("db", "create_behavioral_tables", "--drop", "--verify", *at)
    assert code == 2
    assert "exclude" in found["error"]


def test_the_page_of_the_schema(shell, tmp_path):
    code, _, _ = shell("db", "schema", "--folder", tmp_path, "--json")
    assert code == 0
    assert "behavioral_events" in (tmp_path / "schema.html").read_text(encoding="utf-8")
