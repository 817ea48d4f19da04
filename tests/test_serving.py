"""Serving stands on files and a database, and says so when one of them cannot be trusted."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest
import sqlalchemy as sa
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fincoach.data.database import VERSION_TABLE, DatabaseError, connect, load, upgrade, writing
from fincoach.data.population import generate
from fincoach.data.tables import SEGMENTS, TABLES
from fincoach.features.behavior import FEATURES, extract
from fincoach.features.ledger import Ledgers
from fincoach.serving import ServiceError, UserSegmentationService
from fincoach.serving.artifacts import champion, open_version, promote, publish
from fincoach.serving.inference import (
    Cluster,
    FeatureScaling,
    ParametersError,
    SegmentationParameters,
    assign,
    pack_people,
    standardise,
    unpack_people,
)
from fincoach.serving.segmentation import MIN_DAYS, MIN_ROWS

DAY = date(2024, 9, 1)
NAMES = [f.name for f in FEATURES]
HEAVY = ("torch", "sklearn", "pandas", "scipy", "matplotlib", "plotly", "seaborn", "statsmodels")


def averages(people, X) -> SegmentationParameters:
    """A model whose centres are the averages of the planted groups."""
    used = [f for f in FEATURES if f.role != "context" and np.isfinite(X[:, NAMES.index(f.name)]).mean() > 0.5]
    columns = X[:, [NAMES.index(f.name) for f in used]]
    bent = np.where([f.scale == "log" for f in used], np.sign(columns) * np.log1p(np.abs(columns)), columns)
    scalings = tuple(
        FeatureScaling(f.name, f.scale, float(fill), float(m), float(s) + 1e-9, 3.0)
        for f, fill, m, s in zip(used, np.nanmedian(columns, 0), np.nanmean(bent, 0), np.nanstd(bent, 0), strict=True)
    )
    one = (Cluster(0, "draft", 0.0, 1.0, (0.0,) * len(used)),)
    z = standardise(SegmentationParameters("draft", DAY, scalings, one, 4.0, 0.1), columns)[0]
    planted = people.sort("user_id")["segment_id"].to_numpy()
    clusters = tuple(
        Cluster(k, name, 0.8, float((planted == k).mean()), tuple(z[planted == k].mean(0))) for k, name in enumerate(SEGMENTS)
    )
    return SegmentationParameters("2024-09-01-averages", DAY, scalings, clusters, 4.0, 0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a database of 60 made-up people and a promoted model; copied by each test that writes."""
    folder = tmp_path_factory.mktemp("world")
    population = generate(people=60, days=250, seed=11)
    engine = connect(f"sqlite:///{folder}/people.db")
    upgrade(engine)
    load(engine, population.frames)
    ledgers = Ledgers.from_frames(population.frames)
    X = extract(ledgers, DAY)
    parameters = averages(population.truth["segments"], X)
    files = {
        "segmentation.json": parameters.to_json().encode(),
        "people.npz": pack_people(parameters, ledgers.user_ids, X[:, [NAMES.index(n) for n in parameters.names]]),
    }
    publish(folder / "artifacts", "segmentation", parameters.version, files, {})
    promote(folder / "artifacts", "segmentation", parameters.version)
    with engine.connect() as c:
        c.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return folder


@pytest.fixture
def mine(world, tmp_path):
    """A copy of the world that a test may change."""
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def service(mine):
    """The service on a copy of the world."""
    service = UserSegmentationService(f"sqlite:///{mine}/people.db", mine / "artifacts")
    yield service
    service.engine.dispose()


def stored(engine) -> dict[int, dict]:
    """The rows of user_segments by person, without their own number."""
    with engine.connect() as c:
        rows = c.execute(sa.select(TABLES["user_segments"])).mappings().all()
    return {r["user_id"]: {k: v for k, v in r.items() if k != "id"} for r in rows}


# --- the environment a backend has ---------------------------------------------------------------------------------


BLOCKED = """
import sys

class Without:
    \"\"\"A finder of modules to which those of training are not installed.\"\"\"
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {heavy!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(f) for f in sys.meta_path]
try:
    import pandas
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker blocks nothing")

from datetime import date
from fincoach.serving import UserSegmentationService
s = UserSegmentationService("sqlite:///{folder}/people.db", "{folder}/artifacts")
assert s.status.method == "model", s.status
day = date(2024, 9, 1)
found = s.update_user_segment(1, day)
assert found.method == "model" and found.sentence
s.reclassify_all_users(day)
assert s.get_segment_analytics().people == 60
assert len(s.get_segment_peers(1, day)) > 0
s.get_segment_characteristics(found.segment).to_dict()
found.to_dict(), found._repr_html_(), s.get_segment_analytics()._repr_html_()
print(*[m for m in {heavy!r} if m in sys.modules])
"""


def test_all_of_it_works_without_any_training_library(mine):
    script = BLOCKED.format(heavy=HEAVY, folder=mine)
    out = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == []


# --- a model that cannot be trusted --------------------------------------------------------------------------------


def rewrite(file, content: bytes):
    """Put `content` in the place of a published file, which is read-only."""
    file.unlink()
    file.write_bytes(content)


def version_of(world):
    root = world / "artifacts"
    return root / "segmentation" / champion(root, "segmentation")


def replaced(world, old: bytes, new: bytes):
    """Publish and promote the champion with a changed parameter file: intact by its hashes, wrong inside."""
    root = world / "artifacts"
    artifact = open_version(root, "segmentation", champion(root, "segmentation"))
    changed = artifact.read("segmentation.json").replace(old, new)
    assert changed != artifact.read("segmentation.json")
    publish(root, "segmentation", "2024-09-02-other", {"segmentation.json": changed}, {})
    promote(root, "segmentation", "2024-09-02-other")


def flip(world):
    file = version_of(world) / "segmentation.json"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    rewrite(file, bytes(data))


def cut(world):
    file = version_of(world) / "segmentation.json"
    rewrite(file, file.read_bytes()[:-10])


def newer_manifest(world):
    file = version_of(world) / "manifest.json"
    rewrite(file, json.dumps(json.loads(file.read_text()) | {"format": 99}).encode())


DAMAGE = {
    "one bit altered": (flip, "altered"),
    "file cut": (cut, "incomplete"),
    "file gone": (lambda w: (version_of(w) / "segmentation.json").unlink(), "missing"),
    "version gone": (lambda w: shutil.rmtree(version_of(w)), "missing"),
    "artifacts gone": (lambda w: shutil.rmtree(w / "artifacts"), "no trained model"),
    "manifest of a newer format": (newer_manifest, "newer FinCoach"),
    "parameters of a newer format": (lambda w: replaced(w, b'"format": 1', b'"format": 2'), "newer FinCoach"),
    "a feature nobody computes": (lambda w: replaced(w, b'"savings_rate"', b'"star_sign"'), "newer FinCoach"),
    "not JSON": (lambda w: replaced(w, b"{", b"["), "cannot be read"),
    "nonsense in champions.json": (lambda w: rewrite(w / "artifacts/champions.json", b"nonsense"), "trained model"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_rules_answer_and_say_why(mine, kind):
    damage, why = DAMAGE[kind]
    damage(mine)
    service = UserSegmentationService(f"sqlite:///{mine}/people.db", mine / "artifacts")
    found = service.update_user_segment(1, DAY)
    assert service.status.method == found.method == "rules"
    assert why in service.status.why_rules
    assert why in found.sentence
    assert str(mine) not in found.sentence, "a sentence for people holds no paths"
    assert stored(service.engine)[1]["method"] == "rules"
    with pytest.raises(ServiceError, match="peers need a trained model"):
        service.get_segment_peers(1, DAY)
    service.engine.dispose()


def test_a_model_that_went_bad_while_serving_is_dropped_at_the_next_load(service, mine):
    assert service.classify_user_segment(1, DAY).method == "model"
    flip(mine)
    assert service.load_segmentation_model().method == "rules"
    assert service.classify_user_segment(1, DAY).method == "rules"


def test_altered_table_of_people_stops_peers_but_not_segments(service, mine):
    file = version_of(mine) / "people.npz"
    rewrite(file, file.read_bytes()[:-1] + b"!")
    assert service.classify_user_segment(1, DAY).method == "model"
    with pytest.raises(ServiceError, match="cannot be used"):
        service.get_segment_peers(1, DAY)


# --- one person ----------------------------------------------------------------------------------------------------


def test_the_model_is_better_than_the_rules_and_than_chance(service, mine):
    truth = dict(generate(people=60, days=250, seed=11).truth["segments"].select("user_id", "segment_id").iter_rows())
    service.reclassify_all_users(DAY)
    by_model = np.mean([r["segment_id"] == truth[u] for u, r in stored(service.engine).items()])
    shutil.rmtree(mine / "artifacts")
    service.load_segmentation_model()
    service.reclassify_all_users(DAY)
    by_rules = np.mean([r["segment_id"] == truth[u] for u, r in stored(service.engine).items()])
    chance = max(np.bincount(list(truth.values()))) / len(truth)
    assert by_model > by_rules > chance, (by_model, by_rules, chance)


def test_the_answer_is_complete_and_plain(service):
    found = service.classify_user_segment(1, DAY)
    assert list(found.features) == NAMES
    assert set(found.unknown) == {n for n, v in found.features.items() if v is None}
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.confidence == max(found.probabilities.values()) >= found.runner_up_confidence > 0
    assert found.reasons
    assert all(r.words in found.sentence for r in found.reasons)
    assert found.segment in found.sentence
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["segment"] == found.segment
    assert plain["as_of"] == "2024-09-01"


def test_reasons_speak_for_the_segment(service):
    """Each reason's feature alone puts the person nearer to the segment's centre than to the average of the others."""
    way = service._loaded[0]
    for user_id in range(1, 61):
        found = service.classify_user_segment(user_id, DAY)
        x = np.array([[np.nan if v is None else v for v in found.features.values()]])
        z = standardise(way.parameters, x[:, way.columns])[0][0]
        for r in found.reasons:
            j = way.parameters.names.index(r.feature)
            gaps = np.square(z[j] - way.parameters.arrays["centroid"][:, j])
            own = way.segments.index((found.segment_id, found.segment))
            assert gaps[own] < np.delete(gaps, own).mean()


def test_later_rows_change_nothing(service):
    t = TABLES["transactions"]
    before = [service.classify_user_segment(u, DAY).to_dict() for u in (1, 2, 3)]
    end = datetime(2024, 9, 2, 14, tzinfo=UTC)  # midnight has come everywhere
    with service.engine.begin() as c:
        assert c.execute(sa.delete(t).where(t.c.occurred_at >= end)).rowcount > 0
    assert [service.classify_user_segment(u, DAY).to_dict() for u in (1, 2, 3)] == before


def test_the_day_matters(service):
    a, b = (service.classify_user_segment(1, d) for d in (DAY, DAY - timedelta(days=60)))
    assert a.features != b.features


@pytest.mark.parametrize("keep", [0, 1, MIN_ROWS - 1])
def test_too_few_rows_are_said_to_be_too_few(service, keep):
    with service.engine.begin() as c:
        c.exec_driver_sql(
            f"DELETE FROM transactions WHERE user_id = 1 AND id NOT IN (SELECT id FROM transactions WHERE user_id = 1 ORDER BY occurred_at LIMIT {keep})"
        )
    found = service.update_user_segment(1, DAY)
    assert (found.segment_id, found.segment, found.confidence, found.method) == (-1, "Not enough data", 0.0, "rules")
    assert found.sentence.startswith("Not enough data to say")
    assert stored(service.engine)[1]["segment_name"] == "Not enough data"
    with pytest.raises(ServiceError, match="too little"):
        service.get_segment_peers(1, DAY)


def test_a_short_history_is_too_little_however_many_rows(service):
    first = service.engine.connect().execute(sa.text("SELECT min(occurred_at) FROM transactions WHERE user_id = 1")).scalar()
    start = datetime.fromtimestamp(first / 1e6, UTC).date()
    assert service.classify_user_segment(1, start + timedelta(days=MIN_DAYS - 3)).segment == "Not enough data"
    assert service.classify_user_segment(1, start + timedelta(days=MIN_DAYS + 3)).segment in SEGMENTS


def test_an_unknown_person_is_an_error_that_says_so(service):
    with pytest.raises(DatabaseError, match="999"):
        service.classify_user_segment(999, DAY)


# --- storing -------------------------------------------------------------------------------------------------------


def test_storing_twice_changes_nothing_and_older_never_wins(service):
    service.update_user_segment(1, DAY)
    first = stored(service.engine)
    service.update_user_segment(1, DAY)
    service.update_user_segment(1, DAY - timedelta(days=1))
    assert stored(service.engine) == first
    later = datetime(2024, 12, 24, 12, tzinfo=UTC)
    service.update_user_segment(1, DAY + timedelta(days=1), at=later)
    row = stored(service.engine)[1]
    assert row["updated_at"] == later
    assert row["created_at"] == first[1]["created_at"]
    assert row["as_of"].date() == DAY + timedelta(days=1)


def test_everybody_at_once_is_each_one_alone(service):
    analytics = service.reclassify_all_users(DAY)
    many = stored(service.engine)
    assert len(many) == analytics.people == 60
    for user_id in many:
        service.update_user_segment(user_id, DAY)
    assert stored(service.engine) == many
    assert sum(s["people"] for s in analytics.segments) == 60
    assert analytics.between == sum(json.loads(r["features"])["between"] for r in many.values())
    assert analytics.mean_confidence == pytest.approx(np.mean([r["confidence"] for r in many.values()]))


def test_blocks_of_people_make_no_difference(service, monkeypatch):
    from fincoach.serving import segmentation

    service.reclassify_all_users(DAY)
    whole, blocks = stored(service.engine), segmentation._blocks
    with service.engine.begin() as c:
        c.exec_driver_sql("DELETE FROM user_segments")
    monkeypatch.setattr(segmentation, "_blocks", lambda engine: blocks(engine, 7))
    service.reclassify_all_users(DAY)
    assert stored(service.engine) == whole


WRITER = """
import sys
from datetime import date, timedelta
from fincoach.serving import UserSegmentationService
folder, odd = sys.argv[1], int(sys.argv[2])
s = UserSegmentationService(f"sqlite:///{folder}/people.db", f"{folder}/artifacts")
print("ready", flush=True)
sys.stdin.readline()
for i in range(30):
    s.update_user_segment(1, date(2024, 8, 1) + timedelta(days=(i * 7 + odd * 3) % 31))
"""


@pytest.mark.skipif(not os.environ.get("FINCOACH_TEST_POSTGRES"), reason="FINCOACH_TEST_POSTGRES names no PostgreSQL database")
def test_postgresql_gives_the_same_answers_and_rows(service):
    """The same people in both databases: every answer and every stored row is equal, also when stored twice or out of order."""
    url = os.environ["FINCOACH_TEST_POSTGRES"]
    other = connect(url)
    with writing(other) as c:
        c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*TABLES, VERSION_TABLE])} CASCADE")
    upgrade(other)
    load(other, generate(people=60, days=250, seed=11).frames)
    there = UserSegmentationService(other, service.artifacts)
    for user_id in (1, 30, 60):
        assert there.classify_user_segment(user_id, DAY) == service.classify_user_segment(user_id, DAY)
    assert there.reclassify_all_users(DAY) == service.reclassify_all_users(DAY)
    there.update_user_segment(1, DAY - timedelta(days=9))
    there.update_user_segment(1, DAY)
    assert stored(other) == stored(service.engine)
    other.dispose()


def test_two_processes_store_the_same_person(mine):
    """Both go through the days in another order; one row is left, as of the last day, and it is what one process stores."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen([sys.executable, "-c", WRITER, mine, str(k)], cwd=ROOT, text=True, **pipes) for k in (0, 1)]
    for p in both:
        assert p.stdout.readline() == "ready\n", p.stderr.read()
    for p in both:  # start together
        p.stdin.write("go\n")
        p.stdin.flush()
    for p in both:
        _, said = p.communicate(timeout=60)
        assert p.returncode == 0, said
    service = UserSegmentationService(f"sqlite:///{mine}/people.db", mine / "artifacts")
    rows = stored(service.engine)
    service.update_user_segment(1, date(2024, 8, 31))
    created = {"created_at": rows[1]["created_at"]}
    assert rows == {1: stored(service.engine)[1] | created}
    service.engine.dispose()


def test_nothing_half_stored_when_a_pass_is_stopped(service, monkeypatch):
    from fincoach.serving import segmentation

    blocks, store, calls = segmentation._blocks, segmentation._store, []

    def stops(engine, rows):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        store(engine, rows)

    monkeypatch.setattr(segmentation, "_blocks", lambda engine: blocks(engine, 10))
    monkeypatch.setattr(segmentation, "_store", stops)
    with pytest.raises(KeyboardInterrupt):
        service.reclassify_all_users(DAY)
    assert sorted(stored(service.engine)) == list(range(1, 21))


# --- segments ------------------------------------------------------------------------------------------------------


def test_peers_are_the_nearest_of_the_segment(service):
    """Against the definition, by hand."""
    way, artifact = service._loaded
    people = unpack_people(artifact.read("people.npz"))
    found = service.classify_user_segment(1, DAY)
    peers = service.get_segment_peers(1, DAY, 4)
    own = people.cluster[people.user_id.tolist().index(1)]
    assert way.segments[own] == (found.segment_id, found.segment)
    x = np.array([[np.nan if v is None else v for v in found.features.values()]])[:, way.columns]
    z, known = (a[0] for a in standardise(way.parameters, x))
    gap = {
        int(u): float(np.square(np.float32(other) - z)[known].sum())
        for u, c, other in zip(*people, strict=True)
        if c == own and u != 1
    }
    assert list(peers) == sorted(gap, key=lambda u: (gap[u], u))[:4]
    assert all(type(p) is int for p in peers)


def test_characteristics_know_each_segment_and_refuse_others(service):
    told = [service.get_segment_characteristics(name) for name in SEGMENTS]
    assert [c.segment_id for c in told] == list(range(5))
    assert sum(c.share for c in told) == pytest.approx(1)
    assert service.get_segment_characteristics(3).segment == SEGMENTS[3]
    with pytest.raises(ServiceError, match="Conservative Savers"):
        service.get_segment_characteristics("Misers")


def test_analytics_of_nobody(service):
    empty = service.get_segment_analytics()
    assert (empty.people, empty.without, empty.segments) == (0, 60, ())
    json.dumps(empty.to_dict(), allow_nan=False)


# --- the function both training and serving use --------------------------------------------------------------------


SMALL = SegmentationParameters(
    "v", DAY,
    (FeatureScaling("a", "linear", 0.1, 0.2, 0.5, 3.0), FeatureScaling("b", "log", 30.0, 3.0, 1.0, 3.0)),
    tuple(Cluster(k, f"s{k}", 0.5, 1.0, (float(k), float(-k))) for k in range(3)), 0.7, 0.1,
)
ANY = arrays(np.float64, st.tuples(st.integers(1, 6), st.just(2)), elements=st.floats(allow_nan=True, allow_infinity=True))


@given(ANY)
@settings(deadline=None)
def test_probabilities_are_probabilities_whatever_comes(X):
    found = assign(SMALL, X)
    assert np.isfinite(found.probability).all()
    assert (found.probability >= 0).all()
    assert np.allclose(found.probability.sum(axis=1), 1)
    one_by_one = np.concatenate([assign(SMALL, x[None]).probability for x in X])
    assert np.array_equal(found.probability, one_by_one)


@given(arrays(np.float64, (20, 2), elements=st.floats(-1e6, 1e6)))
@settings(deadline=None)
def test_equal_weights_mean_the_nearest_centre(X):
    z = standardise(SMALL, X)[0]
    distance = np.square(z[:, None] - SMALL.arrays["centroid"]).sum(-1)
    clear = np.diff(np.sort(distance, axis=1)[:, :2], axis=1)[:, 0] > 1e-9
    assert np.array_equal(assign(SMALL, X).cluster[clear], distance.argmin(axis=1)[clear])


def test_unknown_people_get_the_shares():
    uneven = SegmentationParameters("v", DAY, SMALL.features, tuple(
        Cluster(c.segment_id, c.name, c.similarity, w, c.centroid) for c, w in zip(SMALL.clusters, (5, 3, 2), strict=True)), 0.7, 0.1)
    assert np.allclose(assign(uneven, [[np.nan, np.nan]]).probability, [[0.5, 0.3, 0.2]])


def test_parameters_survive_json_to_the_last_bit():
    rng = np.random.default_rng(0)
    for _ in range(20):
        numbers = rng.normal(size=6) * 10.0 ** rng.integers(-12, 12, 6)
        p = SegmentationParameters("v", DAY, (FeatureScaling("a", "log", *numbers[:2], *np.abs(numbers[2:4])),),
                                   (Cluster(-1, "x", 0.0, abs(numbers[4]), (numbers[5],)),), abs(numbers[4]), 0.5)
        assert SegmentationParameters.from_json(p.to_json()) == p


WRONG = {
    "a newer format": ({"format": 2}, "newer"),
    "an old format": ({"format": 0}, "invalid"),
    "a format that is text": ({"format": "1"}, "invalid"),
    "infinite spread": ({"spread": float("inf")}, "invalid"),
    "no spread": ({"spread": 0}, "invalid"),
    "spread as text": ({"spread": "1"}, "invalid"),
    "true as a number": ({"margin": True}, "invalid"),
    "an unknown field": ({"colour": 1}, "invalid"),
    "no features": ({"features": []}, "invalid"),
    "features that are no list": ({"features": {}}, "invalid"),
    "no clusters": ({"clusters": []}, "invalid"),
    "no version": ({"version": ""}, "invalid"),
    "a day that is none": ({"as_of": "2024-13-01"}, "invalid"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_parameters_are_refused(kind):
    change, expected = WRONG[kind]
    with pytest.raises(ParametersError) as e:
        SegmentationParameters.from_json(json.dumps(json.loads(SMALL.to_json()) | change))
    assert e.value.kind == expected


@pytest.mark.parametrize("gone", ["format", "version", "as_of", "features", "clusters", "spread", "margin"])
def test_a_missing_field_is_named(gone):
    found = json.loads(SMALL.to_json())
    del found[gone]
    with pytest.raises(ParametersError, match=gone):
        SegmentationParameters.from_json(json.dumps(found))


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_cleanly(data):
    for read in (SegmentationParameters.from_json, unpack_people):
        with pytest.raises(ParametersError):
            read(data)


def test_people_hold_ids_and_coordinates_only():
    people = unpack_people(pack_people(SMALL, [2, 1], [[0.0, 1.0], [np.nan, 5.0]]))
    assert people._fields == ("user_id", "cluster", "z")
    assert people.user_id.tolist() == [1, 2]
    assert people.z.dtype == np.float16
    with pytest.raises(ValueError, match="twice"):
        pack_people(SMALL, [1, 1], [[0.0, 1.0], [0.0, 1.0]])


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="needs"):
        assign(SMALL, np.zeros((3, 5)))
