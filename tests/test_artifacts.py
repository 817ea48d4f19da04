"""Versions on disk: killed, raced, damaged and named with malice, they are whole or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from fincoach.serving.artifacts import (
    ArtifactError,
    champion,
    history,
    listed,
    open_version,
    promote,
    publish,
    rollback,
    sweep,
    versions,
)

FILES = {"segmentation.json": b'{"k": 5}', "people.npz": bytes(range(256)) * 40, "validation_reports/report.html": b"<h1>fine</h1>"}
MANIFEST = {"seed": 7, "snapshot": "c0ffee", "metrics": {"recovery": 0.87}, "parent": None}
NEW, OLD = "2025-07-31-new", "2025-06-30-old"


def put(root, version=OLD, **files):
    """A published version."""
    return publish(root, "segmentation", version, FILES | files, MANIFEST)


def run(code, *arguments):
    """A Python process running `code`, which finds FILES, MANIFEST and NEW as they are here."""
    code = f"FILES, MANIFEST, NEW = {FILES!r}, {MANIFEST!r}, {NEW!r}\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE)


# For each n: a forked publisher that kills itself with SIGKILL just before its n-th call of the file system, until one gets through.
KILLED = """
import os, signal, sys
from fincoach.serving.artifacts import promote, publish
OLD = sys.argv[2]

def publish_and_promote(root, version):
    publish(root, "segmentation", version, FILES, MANIFEST)
    promote(root, "segmentation", version)

def count(name, deadline, calls=[0]):
    real = getattr(os, name)
    def call(*a, **k):
        calls[0] += 1
        if calls[0] == deadline:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    setattr(os, name, call)

n, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    n += 1
    root = f"{sys.argv[1]}/{n:03}"
    publish_and_promote(root, OLD)
    child = os.fork()
    if not child:
        for name in ("open", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "chmod"):
            count(name, n)
        publish_and_promote(root, NEW)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
sys.exit(status)
"""


def test_killed_at_every_call_of_the_file_system(tmp_path):
    """The old champion or the new one serves, nothing half-written is listed, and the next try succeeds."""
    process = run(KILLED, tmp_path, OLD)
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, error
    *killed, through = sorted(tmp_path.iterdir())
    assert len(killed) >= 20
    assert champion(through, "segmentation") == NEW
    serving = [champion(root, "segmentation") for root in killed]
    assert set(serving) == {OLD, NEW}, "the instants must lie both before and after the switch"
    assert serving == sorted(serving), "once switched, it stays"
    for root, version in zip(killed, serving, strict=True):
        assert open_version(root, "segmentation", version).read("segmentation.json") == FILES["segmentation.json"]
        assert listed(root, "segmentation") == versions(root, "segmentation"), "a half-written version is listed"
        put(root, NEW)
        promote(root, "segmentation", NEW)
        assert champion(root, "segmentation") == NEW
        assert versions(root, "segmentation") == [OLD, NEW]
        assert sweep(root) == []


RACER = """
import sys
from fincoach.serving.artifacts import promote, publish
for i in range(15):
    publish(sys.argv[1], "segmentation", f"{NEW}{i}", FILES, MANIFEST)
    promote(sys.argv[1], "segmentation", f"{NEW}{i}")
"""


def test_two_publishers_of_the_same_versions(tmp_path):
    racers = [run(RACER, tmp_path) for _ in range(2)]
    for racer in racers:
        error = racer.communicate(timeout=60)[1].decode()
        assert racer.returncode == 0, error
    assert len(versions(tmp_path, "segmentation")) == 15
    assert champion(tmp_path, "segmentation") in versions(tmp_path, "segmentation")
    assert sweep(tmp_path) == []


def test_a_reader_never_sees_a_half_while_others_promote(tmp_path):
    put(tmp_path)
    promote(tmp_path, "segmentation", OLD)
    racer = run(RACER, tmp_path)
    seen = set()
    while racer.poll() is None:
        version = champion(tmp_path, "segmentation")
        seen.add(open_version(tmp_path, "segmentation", version).version)
    assert racer.communicate()[1] == b""
    assert OLD in seen
    assert len(seen) > 1


def test_any_flipped_bit_is_noticed(tmp_path):
    """One bit in each byte of the small files, and in some of the large, in the manifest and in the list of champions."""
    folder = put(tmp_path)
    promote(tmp_path, "segmentation", OLD)
    for path in [p for p in folder.rglob("*") if p.is_file()] + [tmp_path / "champions.json"]:
        sound = path.read_bytes()
        path.chmod(0o644)
        for i in range(0, len(sound), 1 + len(sound) // 60):
            path.write_bytes(sound[:i] + bytes([sound[i] ^ (1 << (i % 8))]) + sound[i + 1 :])
            with pytest.raises(ArtifactError) as e:
                open_version(tmp_path, "segmentation", champion(tmp_path, "segmentation"))
            assert e.value.kind in ("altered", "cut", "newer")
        path.write_bytes(sound)
    assert versions(tmp_path, "segmentation") == [OLD]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_cut_grown_or_missing_files_have_their_kind(tmp_path, name):
    path = put(tmp_path) / name
    sound = path.read_bytes()
    path.chmod(0o644)
    for kind, content in (("cut", sound[:-3]), ("altered", sound + b" "), ("cut", b"")):
        path.write_bytes(content)
        with pytest.raises(ArtifactError) as e:
            open_version(tmp_path, "segmentation", OLD)
        assert e.value.kind == kind
        assert path.name in str(e.value)
    path.unlink()
    with pytest.raises(ArtifactError) as e:
        open_version(tmp_path, "segmentation", OLD)
    assert e.value.kind == "missing"


def test_a_file_that_changes_after_opening_is_noticed(tmp_path):
    artifact = open_version(tmp_path, "segmentation", put(tmp_path).name)
    path = artifact.path / "people.npz"
    path.chmod(0o644)
    path.write_bytes(FILES["people.npz"][::-1])
    with pytest.raises(ArtifactError, match="is not the file that was published"):
        artifact.read("people.npz")
    with pytest.raises(ArtifactError, match="has no file 'model"):
        artifact.read("model.pkl")


def test_links_and_foreign_things_are_refused(tmp_path):
    """A link may lead anywhere, even to the same bytes; a pipe would hang a reader."""
    secret = tmp_path / "secret"
    for i, prepare in enumerate((
        lambda f: ((f / "people.npz").rename(secret), (f / "people.npz").symlink_to(secret)),
        lambda f: ((f / "manifest.json").rename(secret), (f / "manifest.json").symlink_to(secret)),
        lambda f: (f / "extra.pkl").symlink_to("/etc/hostname"),
        lambda f: os.mkfifo(f / "pipe"),
        lambda f: ((f / "people.npz").unlink(), os.mkfifo(f / "people.npz")),
        lambda f: (f.rename(f.with_name("moved")), f.symlink_to(f.with_name("moved"))),
        lambda f: (f / "validation_reports/extra").mkdir(),
    )):
        root = tmp_path / str(i)
        prepare(put(root))
        with pytest.raises(ArtifactError) as e:
            open_version(root, "segmentation", OLD)
        assert e.value.kind == "altered", i


BAD_NAMES = ["../x", "..", ".", "", "a/../../b", "/etc/x", "a\\b", "a b", "a\0b", "-rf", ".hidden", "ä", "x" * 200, "a\n", 7, None]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_hostile_names(tmp_path, name):
    root = tmp_path / "root"
    calls = [
        lambda: publish(root, name, OLD, FILES, {}),
        lambda: publish(root, "segmentation", name, FILES, {}),
        lambda: publish(root, "segmentation", OLD, {name: b"x"}, {}),
        lambda: open_version(root, "segmentation", name),
        lambda: open_version(root, name, OLD),
        lambda: promote(root, "segmentation", name),
        lambda: champion(root, name),
        lambda: rollback(root, name),
        lambda: listed(root, name),
    ]
    for call in calls:
        with pytest.raises(ArtifactError) as e:
            call()
        assert e.value.kind == "invalid"
    assert {p.name for p in tmp_path.rglob("*")} <= {"root", ".lock"}


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12))
def test_no_name_leads_out_of_the_folder(name):
    with pytest.raises(ArtifactError) as e:
        open_version("/nowhere/root", "segmentation", name)
    model = Path("/nowhere/root/segmentation")
    assert e.value.kind == "invalid" or (e.value.kind == "missing" and (model / name).resolve().parent == model)


def test_names_in_a_forged_manifest_lead_nowhere(tmp_path):
    """A manifest with a valid digest, but with a file name that climbs."""
    from fincoach.serving.artifacts import _sealed

    folder = tmp_path / "segmentation" / OLD
    folder.mkdir(parents=True)
    entry = {"../../secret": {"sha256": "0" * 64, "bytes": 0}}
    (folder / "manifest.json").write_bytes(_sealed({"format": 1, "model": "segmentation", "version": OLD, "files": entry}))
    with pytest.raises(ArtifactError) as e:
        open_version(tmp_path, "segmentation", OLD)
    assert e.value.kind == "invalid"


def test_newer_formats_say_upgrade(tmp_path):
    folder = put(tmp_path)
    for path in (folder / "manifest.json", tmp_path / "champions.json"):
        promote(tmp_path, "segmentation", OLD)
        path.chmod(0o644)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
        with pytest.raises(ArtifactError, match="upgrade fincoach") as e:
            open_version(tmp_path, "segmentation", champion(tmp_path, "segmentation"))
        assert e.value.kind == "newer"
        if path.parent == folder:
            with pytest.raises(ArtifactError):
                put(tmp_path)  # a newer version is not taken for a damaged one
            path.unlink()
            put(tmp_path)


def test_same_content_same_bytes_and_other_content_is_refused(tmp_path):
    one, two = put(tmp_path / "a"), put(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in one.rglob("*.*")} == {p.name: p.read_bytes() for p in two.rglob("*.*")}
    before = (one / "manifest.json").stat().st_mtime_ns
    assert put(tmp_path / "a") == one
    assert (one / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="exists with other content"):
        put(tmp_path / "a", **{"people.npz": b"other"})
    assert open_version(tmp_path / "a", "segmentation", OLD).read("people.npz") == FILES["people.npz"]


def test_a_damaged_version_is_replaced_by_publishing_it_again(tmp_path):
    path = put(tmp_path) / "people.npz"
    path.unlink()
    assert versions(tmp_path, "segmentation") == []
    put(tmp_path)
    assert versions(tmp_path, "segmentation") == [OLD]


def test_files_can_be_copied_from_disk_and_everybody_may_read(tmp_path):
    source = tmp_path / "model.pkl"
    source.write_bytes(b"x" * 3_000_000)
    folder = publish(tmp_path / "root", "m", "v", {"model.pkl": source}, {})
    assert open_version(tmp_path / "root", "m", "v").read("model.pkl") == source.read_bytes()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "model.pkl").stat().st_mode & 0o777 == 0o444


def test_rollback_skips_a_damaged_version_and_history_stays(tmp_path):
    for version in ("v1", "v2", "v3"):
        put(tmp_path, version)
        promote(tmp_path, "segmentation", version, why=f"{version} won")
    (tmp_path / "segmentation/v2/people.npz").unlink()
    assert rollback(tmp_path, "segmentation", why="complaints") == "v1"
    assert [h["version"] for h in history(tmp_path, "segmentation")] == ["v1", "v2", "v3", "v1"]
    assert history(tmp_path, "segmentation")[-1]["why"] == "complaints"
    with pytest.raises(ArtifactError, match="no earlier"):
        rollback(tmp_path, "segmentation")
    assert champion(tmp_path, "segmentation") == "v1"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"format": 1}\n', b"[" * 100_000])
def test_unreadable_champions_say_what_to_do_and_are_never_overwritten(tmp_path, content):
    put(tmp_path)
    (tmp_path / "champions.json").write_bytes(content)
    for call in (champion, rollback, lambda r, m: promote(r, m, OLD)):
        with pytest.raises(ArtifactError, match="restore it from a backup"):
            call(tmp_path, "segmentation")
    assert (tmp_path / "champions.json").read_bytes() == content


def test_a_damaged_version_cannot_be_promoted(tmp_path):
    (put(tmp_path) / "people.npz").unlink()
    with pytest.raises(ArtifactError):
        promote(tmp_path, "segmentation", OLD)
    assert champion(tmp_path, "segmentation") is None


def test_the_module_is_light():
    code = "import sys, fincoach.serving.artifacts; print(sorted({'numpy', 'polars', 'sqlalchemy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip() == "[]"
