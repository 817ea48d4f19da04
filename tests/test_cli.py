"""The command line on its good days and on its worst."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from fincoach import cli
from fincoach.cli import main

RUN = [sys.executable, "-c", "import sys; from fincoach.cli import main; sys.exit(main())"]
HEAVY = ("torch", "sklearn", "pandas", "scipy", "matplotlib", "numpy", "polars", "numba", "sqlalchemy", "alembic", "pyarrow", "tqdm")


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A home with 80 made-up people in its database."""
    home = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINCOACH_HOME", str(home))
        patch.setenv("FINCOACH_PEOPLE", "80")
        patch.setenv("FINCOACH_DAYS", "250")
        assert main(["import", "population"]) == 0
    return home


@pytest.fixture
def home(filled, monkeypatch):
    """That home as this test's own settings."""
    monkeypatch.setenv("FINCOACH_HOME", str(filled))
    return filled


@pytest.fixture
def shell(capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def run(*words):
        capsys.readouterr()
        code = main(words)
        return code, *capsys.readouterr()

    return run


def fails(result, code, *said):
    """The result is a clean failure: code, nothing on standard output, one line and a hint, no traceback."""
    found, out, err = result
    assert found == code, err
    assert out == ""
    problem = err[err.index("error: ") :].strip().splitlines()
    assert len(problem) <= 2, err
    assert "Traceback" not in err
    assert all(ch.isprintable() or ch == "\n" for ch in err)
    for part in said:
        assert part in err


# --- starting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["retrain", "--help"], ["nonsense"]])
def test_nothing_heavy_is_imported_to_answer_a_question_about_usage(words):
    script = (
        f"import sys\nfrom fincoach.cli import main\ntry:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        f"print('heavy:', *[m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.splitlines()[-1] == "heavy:"


def test_without_arguments_help_is_printed(shell):
    code, out, err = shell()
    assert (code, err) == (0, "")
    assert out.startswith("usage: fincoach")
    for command in cli._COMMANDS:
        assert re.search(rf"^    {command} ", out, re.M)


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_each_command_has_help_and_the_common_options(command, capsys):
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--json", "--debug", "--settings"))


# --- one JSON object each ------------------------------------------------------------------------------------------


JSON = {
    "db status": {"state"},
    "db counts": {"counts"},
    "db upgrade": {"state"},
    "export": {"path", "hash", "rows"},
    "validate": {"enough", "headline", "findings", "report"},
    "validate --source population": {"enough", "report"},
    "segment person-00001": {"segment", "confidence", "sentence", "method", "reasons", "unknown"},
    "segment person-00002 --as-of 2024-08-01 --store": {"segment", "stored"},
    "doctor": {"checks", "problems"},
    "warm": {"seconds", "failed"},
    "ahead person-00003": {"page", "spending", "alerts", "balance", "savings", "stress", "warnings", "goals"},
}


@pytest.mark.parametrize("line", JSON)
def test_json_is_one_object_on_standard_output(home, shell, line, monkeypatch):
    monkeypatch.setenv("FINCOACH_PEOPLE", "80")
    monkeypatch.setenv("FINCOACH_DAYS", "250")
    code, out, _ = shell(*line.split(), "--json")
    found = json.loads(out)
    assert code == 0, out
    assert out.count("\n") == 1
    assert found["ok"] is True
    assert found["command"] == line.split()[0]
    assert JSON[line] <= set(found)


def test_json_before_the_command_works_as_well(home, shell):
    code, out, _ = shell("--json", "db", "status")
    assert code == 0
    assert json.loads(out)["state"] == "current"


@pytest.mark.parametrize("line", ["segment nobody", "nonsense", "db sideways", "segment x --as-of soon", "import there-is-no.csv"])
def test_json_of_a_failure_is_one_object_too(home, shell, line):
    code, out, _ = shell(*line.split(), "--json")
    found = json.loads(out)
    assert code in (1, 2)
    assert found["ok"] is False
    assert found["error"]


# --- the commands do what they say ---------------------------------------------------------------------------------


def test_import_fills_an_empty_database_and_refuses_a_second_time(home, shell):
    counts = json.loads(shell("db", "counts", "--json")[1])["counts"]
    assert counts["users"] == 80
    assert counts["transactions"] > 80
    fails(shell("import", "population"), 1, "already")
    assert json.loads(shell("db", "counts", "--json")[1])["counts"] == counts


def test_import_of_a_csv_tells_what_it_refused(shell, tmp_path):
    file = tmp_path / "bank.csv"
    rows = "\n".join(f"ann;2025-01-{d:02};-{d},50;Shop" for d in range(13, 29))
    file.write_text(f"user;date;amount;description\n{rows}\nann;2025-02-31;-1,00;Shop\n")
    code, out, err = shell("import", str(file), "--json")
    if code:  # a currency or a zone has to be stated: the message must say how
        assert "mapping" in json.loads(out)["error"]
    else:
        assert json.loads(out)["rows"]["transactions"] == 16
        assert json.loads(out)["rejected"] == 1
        assert "2025-02-31" in err or json.loads(out)["findings"]


def test_export_twice_is_the_same_snapshot(home, shell):
    first, second = (json.loads(shell("export", "--json")[1]) for _ in range(2))
    assert first == second
    assert first["rows"]["users"] == 80
    assert os.path.isdir(first["path"])


def test_validate_writes_the_report_and_a_gate_not_passed_is_no_error(home, shell, monkeypatch):
    monkeypatch.setenv("FINCOACH_MIN_PEOPLE", "1000")
    code, out, _ = shell("validate", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["enough"]) == (0, True, False)
    page = Path(found["report"]).read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "http" + "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_segment_without_a_champion_says_it_is_by_rules(home, shell):
    code, out, _ = shell("segment", "person-00001")
    assert code == 0
    assert "By simple rules, because there is no trained model yet" in out
    assert "person-00001 as of " in out


def test_ahead_writes_a_page_and_says_what_answered(home, shell):
    found = json.loads(shell("ahead", "person-00002", "--as-of", "2024-08-01", "--json")[1])
    code, out, _ = shell("ahead", "person-00002", "--as-of", "2024-08-01")
    assert code == 0
    assert found["spending"]["sentence"] in out
    assert "no trained model" in out
    page = Path(found["page"]).read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "What lies ahead of person-00002 as of 2024-08-01" in page
    assert "<script" not in page


def test_segment_honours_the_day_and_stores_only_when_asked(home, shell):
    def segments():
        return json.loads(shell("db", "counts", "--json")[1])["counts"]["user_segments"]

    a, b = (json.loads(shell("segment", "person-00003", "--as-of", d, "--json")[1]) for d in ("2024-05-01", "2024-08-01"))
    assert a["as_of"] == "2024-05-01"
    assert a["features"] != b["features"]
    before = segments()
    shell("segment", "person-00003")
    assert segments() == before
    shell("segment", "person-00003", "--store")
    assert segments() == before + 1


def test_doctor_finds_what_is_wrong_and_says_what_to_do(home, shell, tmp_path):
    code, out, _ = shell("doctor")
    assert code == 0
    assert "all is well" in out
    assert "run `fincoach retrain`" in out
    other = tmp_path / "text.db"
    other.write_text("this is a text file, and not a database at all\n" * 100)
    code, out, _ = shell("doctor", "--database", f"sqlite:///{other}")
    assert code == 1
    assert "problem" in out
    assert "not an SQLite database" in out


def test_doctor_sees_an_altered_version(home, shell, tmp_path, monkeypatch):
    from fincoach.serving.artifacts import promote, publish

    monkeypatch.setenv("FINCOACH_ARTIFACTS", str(tmp_path / "artifacts"))
    publish(tmp_path / "artifacts", "segmentation", "v1", {"segmentation.json": b"{}"}, {})
    promote(tmp_path / "artifacts", "segmentation", "v1")
    file = tmp_path / "artifacts/segmentation/v1/segmentation.json"
    file.unlink()
    file.write_bytes(b"[]")
    code, out, _ = shell("doctor", "--json")
    problems = [c for c in json.loads(out)["checks"] if c["status"] == "problem"]
    assert code == 1
    assert {c["name"] for c in problems} == {"version v1", "champion"}
    assert all(c["advice"] for c in problems)


def test_demo_goes_all_the_way(shell, tmp_path, monkeypatch):
    """A population, a verdict, a person: and afterwards the folder serves, and the same retrain is recognised."""
    code, out, err = shell("demo", "--people", "60", "--folder", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 0, err
    assert found["retrain"]["decision"] in ("promoted", "held")
    assert found["segment"]["method"] == ("model" if found["retrain"]["champion"] else "rules")
    assert Path(found["retrain"]["report"]).exists()
    monkeypatch.setenv("FINCOACH_ARTIFACTS", str(tmp_path / "artifacts"))
    database = ("--database", found["retrain"]["database_url"])
    again = json.loads(shell("segment", found["segment"]["user"], "--as-of", found["segment"]["as_of"], *database, "--json")[1])
    assert {k: again[k] for k in ("segment", "confidence", "features")} == {k: found["segment"][k] for k in ("segment", "confidence", "features")}
    code, out, _ = shell("demo", "--people", "60", "--folder", str(tmp_path), "--json")
    assert (code, json.loads(out)["retrain"]["decision"]) == (0, "unchanged")


def test_retrain_on_a_database_uses_the_settings_one_and_reports_too_few_people(home, shell, monkeypatch):
    """Without --source the database of the settings is learned from; with too few people that fails, and says so."""
    monkeypatch.setenv("FINCOACH_MIN_PEOPLE", "1000")
    monkeypatch.setenv("FINCOACH_SEED", "1")
    code, out, err = shell("retrain")
    assert code in (0, 1)
    assert "80 people" in out + err or "1,000" in out + err or "1000" in out + err
    assert "Traceback" not in err
    assert "reading population" not in err


# --- the worst days ------------------------------------------------------------------------------------------------


HOSTILE = ["'; DROP TABLE users; --", "a\x1b[31mb", "line\nbreak", "../../etc/passwd", "%s%n", "\u202egnp", "x" * 5000, "--", "{}", ""]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_is_a_name_nobody_has(home, shell, name):
    fails(shell("segment", "--", name) if name.startswith("-") else shell("segment", name), 1, "nobody is called")
    assert json.loads(shell("db", "counts", "--json")[1])["counts"]["users"] == 80


def test_a_near_name_is_offered(home, shell):
    fails(shell("segment", "Person-00001"), 1, "did you mean", "person-00001")


@pytest.mark.parametrize("command", ["segment x", "export", "validate", "db counts", "db downgrade"])
def test_no_database_yet(shell, command):
    fails(shell(*command.split()), 1, "there is no database at", "fincoach import")


def test_asking_does_not_make_a_database(shell, tmp_path):
    shell("segment", "x", "--database", f"sqlite:///{tmp_path}/none/none.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["nonsense", "postgresql://", "mysql+nothing://x/y", "sqlite:////proc/none/x.db"])
def test_a_wrong_url(shell, url):
    code, out, err = shell("db", "counts", "--database", url)
    assert code in (1, 2)
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_an_empty_database_file(shell, tmp_path):
    (tmp_path / "empty.db").touch()
    fails(shell("segment", "x", "--database", f"sqlite:///{tmp_path}/empty.db"), 1, "fincoach db upgrade")


def test_a_folder_that_is_a_file(home, shell, tmp_path):
    (tmp_path / "file").touch()
    fails(shell("export", "--folder", str(tmp_path / "file")), 1, "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(home, shell, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(shell("export", "--folder", str(tmp_path / "locked/here")), 1, "Permission denied")


def test_settings_that_are_wrong(shell, monkeypatch, tmp_path):
    fails(shell("doctor", "--settings", str(tmp_path / "none.ini")), 2, "no settings file")
    monkeypatch.setenv("FINCOACH_SEED", "seven")
    fails(shell("doctor"), 2, "FINCOACH_SEED", "whole number")


@pytest.mark.parametrize("line", ["nonsense", "segment", "db", "db sideways", "retrain --seed seven", "demo --people many", "--jsn"])
def test_wrong_usage_is_code_two(shell, line):
    fails(shell(*line.split()), 2, "--help")


def test_debug_shows_the_traceback(home):
    with pytest.raises(Exception, match="nobody is called"):
        main(["segment", "nobody", "--debug"])


def test_a_fault_of_ours_is_called_one(shell, monkeypatch):
    def broken(args, settings):
        raise AttributeError("oops")

    monkeypatch.setitem(cli._COMMANDS, "warm", (broken, "", ""))
    fails(shell("warm"), 1, "AttributeError: oops", "fault in FinCoach")


def test_ctrl_c_ends_cleanly(tmp_path):
    """A real signal to a real process in the middle of its work."""
    env = os.environ | {"FINCOACH_HOME": str(tmp_path), "FINCOACH_PEOPLE": "20000"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*RUN, "import", "population"], cwd=ROOT, env=env, **pipes) as process:
        assert "reading population" in process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.strip().splitlines()[-1] == "stopped"
    assert "Traceback" not in err


def test_a_reader_that_goes_away(home):
    with subprocess.Popen([*RUN, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert "Traceback" not in err


def test_colour_is_for_terminals_only(monkeypatch, home, shell):
    class Terminal:
        def isatty(self):
            return True

    assert cli._colour("x", 31, Terminal()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli._colour("x", 31, Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b" not in "".join(shell("doctor")[1:])
