"""Shared data: nothing of the original words in it, its structure kept, and attackers who know true rows try to name people."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa
from attackers import all_attacks
from conftest import ROOT

from fincoach.data import anonymise as module
from fincoach.data.anonymise import (
    LEFT_OUT,
    PLAIN,
    POLICY,
    STRENGTH,
    anonymise,
    anonymise_database,
    check_policy,
    write_statement,
)
from fincoach.data.database import DatabaseError, connect, counts, load, upgrade
from fincoach.data.export import export_snapshot
from fincoach.data.population import generate
from fincoach.data.source import Source, SourceError, all_tables
from fincoach.data.sources import read_csv
from fincoach.data.tables import CATEGORIES, TABLES

KEY = bytes(range(32))
START = datetime(2025, 3, 1, 8, 30, tzinfo=UTC)
SECRET = "Zwetschgenweg 7 ☕"


@pytest.fixture(scope="module")
def frames():
    """A population, and rows with a secret word in every column of text of the tables that it does not fill."""
    made = dict(generate(40, 300, 5).frames)
    word = pl.lit(SECRET)
    base = pl.DataFrame({"id": [1, 2], "user_id": [3, 4]})
    made["behavioral_events"] = base.with_columns(event_id=pl.format("{}{}", word, "id"), event_type=word, event_data=word, session_id=word, context=word,
                                                  timestamp=pl.lit(START), created_at=pl.lit(START))
    made["user_sessions"] = base.with_columns(session_id=word, start_time=pl.lit(START), end_time=pl.lit(START + timedelta(hours=1)), pages_visited=word, actions_count=3)
    made["financial_decisions"] = base.with_columns(decision_type=word, amount_minor=500, currency=pl.lit("EUR"), context=word, outcome=pl.lit("success"),
                                                    outcome_at=pl.lit(START), timestamp=pl.lit(START), created_at=pl.lit(START), category_id=8)
    made["user_segments"] = base.with_columns(segment_id=1, segment_name=word, confidence=0.5, features=word, method=pl.lit("rules"), model_version=word,
                                              as_of=pl.lit(START), created_at=pl.lit(START), updated_at=pl.lit(START))
    made["transactions"] = made["transactions"].with_columns(
        external_id=pl.format("bank-row-{}", "id"), account=pl.format("DE02 1203 0000 {}", "user_id"),
        merchant=pl.when(pl.col("id") % 50 == 0).then(word).otherwise("merchant"))
    made["recommendation_history"] = made["recommendation_history"].with_columns(message=word, state_hash=word)
    made["recommendation_feedback"] = made["recommendation_feedback"].with_columns(comment=word)
    made["categories"] = pl.concat([made["categories"], pl.DataFrame({"id": [100], "name": [SECRET], "kind": ["essential"]})])
    return all_tables(**made)


@pytest.fixture(scope="module")
def shared(frames):
    return anonymise(frames, KEY)


@pytest.fixture(scope="module")
def engine(frames, tmp_path_factory):
    made = connect(f"sqlite:///{tmp_path_factory.mktemp('db')}/true.db")
    upgrade(made)
    load(made, frames)
    yield made
    made.dispose()


def by_name(frames, key):
    """True and new numbers of people."""
    names = frames["users"].select(user_id="id", name="external_id")
    return names.with_columns(name=module._words(key, "someone", names["name"]))


# Every column is settled


def test_every_column_of_every_table_has_a_policy(monkeypatch):
    check_policy()
    assert set(POLICY) | set(LEFT_OUT) == set(TABLES)
    for table, policies in POLICY.items():
        assert set(policies) >= {c.name for c in TABLES[table].columns}, table
    monkeypatch.setitem(POLICY, "user_profiles", {k: v for k, v in POLICY["user_profiles"].items() if k != "region"})
    with pytest.raises(SourceError, match=r"not settled how to anonymise user_profiles.region: add a policy"):
        anonymise(all_tables(), KEY)


def test_a_new_table_is_an_error_until_somebody_says_what_becomes_of_it(monkeypatch):
    more = sa.Table("diaries", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("entry", sa.Text))
    monkeypatch.setitem(module.TABLES, "diaries", more)
    with pytest.raises(SourceError, match=r"diaries.id, diaries.entry"):
        check_policy()


# f: no word of the original, anywhere in the bytes


def originals(frames):
    """Every text that must not be seen again: all but categories, currencies, and words of closed lists."""
    kept = {(t, c) for t, policies in POLICY.items() for c, p in policies.items() if p in ("keep", "zone")}
    words = {w for t, f in frames.items() for c, k in f.schema.items() if k == pl.String and (t, c) not in kept for w in f[c].drop_nulls().unique()}
    return {w for w in words if len(w) > 5 and not any(w in c.name for c in CATEGORIES) and w not in ("other", "person")}


def test_no_word_of_the_original_is_in_the_bytes(frames, shared, engine, tmp_path):
    target = connect(f"sqlite:///{tmp_path}/shared.db")
    anonymise_database(engine, target, KEY)
    snapshot = export_snapshot(target, tmp_path / "s")
    with target.connect() as c:
        c.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    target.dispose()
    csv = write_statement(shared.frames, tmp_path / "shared.csv").read_bytes()
    plain = b"".join(f.write_csv().encode() for f in shared.frames.values())
    parquet = b"".join(snapshot.frame(t).write_csv().encode() for t in snapshot.manifest["tables"])
    blob = csv + plain + parquet + (tmp_path / "shared.db").read_bytes() + repr(shared).encode() + str([str(f) for f in shared.findings]).encode()
    words = originals(frames)
    assert len(words) > 10_000
    assert SECRET in words
    # Rows of the bank have 14 characters or more that occur nowhere by chance.
    found = [w for w in words if w.encode() in blob] if len(words) < 1000 else [w for w in sorted(words, key=len) if not w.startswith("bank-row-") and w.encode() in blob]
    assert found == []
    assert b"bank-row-" not in blob
    assert KEY not in blob
    assert KEY.hex().encode() not in blob


def test_the_test_of_words_finds_words(frames, tmp_path):
    csv = write_statement(frames, tmp_path / "true.csv").read_bytes()
    assert b"bank-row-" in csv
    assert sum(w.encode() in csv for w in originals(frames) if not w.startswith("bank-row-")) > 50


# What is kept


def test_the_same_key_gives_the_same_and_another_another(frames, shared):
    again, other = anonymise(frames, KEY).frames, anonymise(frames, bytes(32)).frames
    assert all(shared.frames[t].equals(again[t]) for t in TABLES)
    assert not shared.frames["transactions"].equals(other["transactions"])
    assert not set(shared.frames["users"]["external_id"]) & set(other["users"]["external_id"])
    drawn = [anonymise(frames).frames["users"]["external_id"].to_list() for _ in range(2)]
    assert drawn[0] != drawn[1]
    with pytest.raises(SourceError, match="16 to 64 bytes"):
        anonymise(frames, b"short")


def test_a_database_becomes_the_database_of_the_frames(frames, shared, engine, tmp_path):
    """From frames, from a database, and into a database: the same rows, whatever the size of the groups."""
    read = anonymise(Source("db", engine=engine), KEY).frames
    assert all(read[t].equals(shared.frames[t]) for t in TABLES)
    target = connect(f"sqlite:///{tmp_path}/shared.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", 7)
        total = anonymise_database(engine, target, KEY)
    assert total == {t: len(f) for t, f in shared.frames.items() if t not in LEFT_OUT} | {"categories": 1}
    for table in set(TABLES) - set(LEFT_OUT):
        got = module._rows(target, sa.select(TABLES[table]).order_by(*TABLES[table].primary_key.columns), module.SCHEMA[table])
        assert got.equals(shared.frames[table].sort(got.columns[0])), table
    with pytest.raises(DatabaseError, match="already has rows in"):
        anonymise_database(engine, target, KEY)
    target.dispose()


@pytest.mark.skipif("FINCOACH_TEST_POSTGRES" not in os.environ, reason="FINCOACH_TEST_POSTGRES names no PostgreSQL database")
def test_postgresql_takes_the_shared_database(engine, shared):
    target = connect(os.environ["FINCOACH_TEST_POSTGRES"])
    with target.begin() as c:
        c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*TABLES, 'fincoach_version'])} CASCADE")
    anonymise_database(engine, target, KEY)
    assert counts(target)["transactions"] == len(shared.frames["transactions"])
    assert anonymise(target, KEY).frames["transactions"].height > 0
    with target.begin() as c:
        c.exec_driver_sql(f"DROP TABLE IF EXISTS {', '.join([*TABLES, 'fincoach_version'])} CASCADE")
    target.dispose()


def test_a_target_that_fails_half_way_is_left_empty(engine, tmp_path, monkeypatch):
    target, plain, done = connect(f"sqlite:///{tmp_path}/shared.db"), module._group, []

    def breaking(*args):
        done.append(1)
        if len(done) == 3:
            raise OSError("no room")
        return plain(*args)

    monkeypatch.setattr(module, "_AT_ONCE", 5)
    monkeypatch.setattr(module, "_group", breaking)
    with pytest.raises(OSError, match="no room"):
        anonymise_database(engine, target, KEY)
    assert sa.inspect(target).get_table_names() in ([], ["fincoach_version"])
    target.dispose()


def one(rows, zone="Europe/Berlin"):
    """One person's statement: rows of day, amount, category, merchant, account."""
    users = pl.DataFrame({"id": [1], "external_id": ["me"], "timezone": [zone], "currency": ["EUR"], "created_at": [START]})
    made = pl.DataFrame(rows, ["day", "amount_minor", "category_id", "merchant", "account"], orient="row").with_row_index("id", 1)
    made = made.with_columns(user_id=1, currency=pl.lit("EUR"), occurred_at=pl.lit(START) + pl.duration(days="day")).drop("day")
    return all_tables(users=users, transactions=made, user_profiles=pl.DataFrame({"user_id": [1], "opening_balance_minor": [100_000]}))


@pytest.mark.parametrize("seed", range(5))
def test_rents_refunds_and_transfers_stay_what_they_are(seed):
    rents = [(30 * i, -80_000 if i < 6 else -84_000, 5, "Landlord", "giro") for i in range(12)]
    coffees = [(3 * i + 1, -350, 13, "Café", "giro") for i in range(100)]
    shoes = [(40, -7_995, 14, "Shoes", "giro"), (49, 7_995, 14, "Shoes", "giro")]
    legs = [(90, -25_000, 24, "to savings", "giro"), (91, 25_000, 24, "from giro", "savings")]
    frames = one(rents + coffees + shoes + legs)
    made = anonymise(frames, bytes([seed]) * 32, replace(STRENGTH, left_out=0)).frames["transactions"]
    assert len(made) == len(frames["transactions"])
    rent = made.filter(pl.col("category_id") == 5).sort("occurred_at")
    gaps = rent["occurred_at"].dt.date().diff().drop_nulls().dt.total_days()
    assert gaps.to_list() == [30] * 11
    first, last = set(rent["amount_minor"][:6]), set(rent["amount_minor"][6:])
    assert len(first) == len(last) == 1, "equal rents stay equal"
    assert last.pop() / first.pop() == pytest.approx(84 / 80, abs=0.002), "and a rise is a rise of as much"
    assert made.filter(pl.col("category_id") == 13)["amount_minor"].n_unique() == 1, "equal coffees stay equal"
    bought, back = made.filter(pl.col("category_id") == 14).sort("amount_minor")["amount_minor"]
    assert bought == -back
    assert made.filter(pl.col("category_id") == 14).sort("amount_minor")["occurred_at"].diff()[1] == timedelta(days=9)
    out, into = made.filter(pl.col("category_id") == 24).sort("amount_minor")["amount_minor"]
    assert out == -into
    assert made["account"].n_unique() == 2
    assert set(made["occurred_at"].dt.time()) == {(START + timedelta(hours=1)).time(), (START + timedelta(hours=2)).time()}, "at the person's own clock, summer and winter"


def test_what_comes_in_and_goes_out_stays_in_proportion(frames, shared):
    """The sum of each kind is scaled like everything of the person, within what `total` allows; so the balance keeps its way."""
    kind = dict(frames["categories"].select("id", "kind").iter_rows())
    sums = []
    for f, names in ((frames, by_name(frames, KEY)), (shared.frames, shared.frames["users"].select(user_id="id", name="external_id"))):
        t = f["transactions"].join(names, on="user_id").with_columns(kind=pl.col("category_id").replace_strict(kind))
        opening = f["user_profiles"].join(names, on="user_id").select("name", opening="opening_balance_minor")
        sums.append(t.group_by("name", "kind").agg(pl.col("amount_minor").sum()).join(opening, on="name"))
    both = sums[0].join(sums[1], on=["name", "kind"], suffix="_s").filter((pl.col("opening") > 10_000) & (pl.col("amount_minor").abs() > 10_000))
    level = both["opening_s"] / both["opening"]
    assert level.is_between(0.499, 2.001).all()
    off = ((both["amount_minor_s"] / both["amount_minor"]) / level).log().abs()
    assert off.median() < 0.08
    assert (off < 0.25).mean() > 0.95


def test_numbers_point_where_they_pointed(frames, shared):
    for table, frame in shared.frames.items():
        for key in TABLES[table].foreign_keys:
            there = shared.frames[key.column.table.name][key.column.name]
            assert frame[key.parent.name].drop_nulls().is_in(there.implode()).all(), (table, key.parent.name)
    names = by_name(frames, KEY)
    goals = [f["financial_goals"].drop("name").join(n, on="user_id").group_by("name").len().sort("name") for f, n in
             ((frames, names), (shared.frames, shared.frames["users"].select(user_id="id", name="external_id")))]
    assert len(goals[0]) > 3
    assert goals[0].equals(goals[1])
    share = [f["goal_contributions"].group_by("goal_id").agg(pl.col("amount_minor").sum()).join(f["financial_goals"], left_on="goal_id", right_on="id")
             .select(pl.col("amount_minor") / pl.col("target_minor")).to_series().sort() for f in (frames, shared.frames)]
    assert len(frames["goal_contributions"]) == len(shared.frames["goal_contributions"]) > 10
    assert np.allclose(*share, atol=1e-3), "what share of a goal was reached"


def test_the_same_merchant_has_the_same_name_for_everybody(frames, shared):
    merchants = set(frames["transactions"]["merchant"].drop_nulls())
    words = module._words(KEY, "merchant", pl.Series(sorted(merchants)))
    assert set(shared.frames["transactions"]["merchant"].drop_nulls()) <= set(words)
    assert words.n_unique() == len(merchants)


def test_rare_things_are_not_told(frames, shared):
    assert set(shared.frames["behavioral_events"]["event_type"]) == {"other"}
    few = shared.frames["user_purchases"].join(shared.frames["users"], left_on="user_id", right_on="id").group_by("product_id").agg(pl.col("user_id").n_unique())
    rare = frames["user_purchases"].group_by("product_id").agg(pl.col("user_id").n_unique()).filter(pl.col("user_id") < module.FEW)
    assert few.height <= frames["user_purchases"]["product_id"].n_unique() - len(rare) + frames["products"]["department"].n_unique()
    assert shared.frames["user_profiles"]["income_bracket"].null_count() == len(shared.frames["user_profiles"])
    assert (shared.frames["user_profiles"]["birth_year"].drop_nulls() % 10 == 0).all()
    assert set(shared.frames["users"]["timezone"]) == {"UTC"}
    assert not len(shared.frames["user_segments"])


def test_a_huge_amount_is_made_less_so():
    frames = one([(i * 2, -1_000 - 7 * i, 14, f"m{i}", "a") for i in range(100)] + [(111, -9_000_000, 14, "Boat", "a")])
    loose = replace(STRENGTH, left_out=0, amount=0, place=0, total=0)
    size = anonymise(frames, KEY, loose).frames["transactions"]["amount_minor"].abs().sort(descending=True)
    assert size[0] / size.median() < 0.1 * 9_000_000 / frames["transactions"]["amount_minor"].abs().median()
    assert size[0] == size.max() > 5 * size[1]


# Files


def test_a_statement_reads_back_as_it_was_written(shared, tmp_path):
    frames = shared.frames
    again = read_csv(write_statement(frames, tmp_path / "a.csv"))
    columns = ["occurred_at", "amount_minor", "currency", "category_id", "merchant", "account", "external_id"]
    known = frames["transactions"].filter(pl.col("category_id") <= len(CATEGORIES)).join(frames["users"].select(user_id="id", user="external_id"), on="user_id")
    got = again.frames["transactions"].join(again.frames["users"].select(user_id="id", user="external_id"), on="user_id")
    assert got.select("user", *columns).sort("user", *columns).equals(known.select("user", *columns).sort("user", *columns))
    assert again.rejects is None or not len(again.rejects)


@pytest.mark.parametrize(("currency", "text"), [("JPY", "-1234567"), ("KWD", "-1234.567"), ("EUR", "-12345.67")])
def test_each_currency_keeps_its_decimals(tmp_path, currency, text):
    frames = one([(1, -1_234_567, 13, "a", "x"), (2, -1, 13, "b", "x"), (3, 5, 1, "c", "x")])
    frames["transactions"] = frames["transactions"].with_columns(currency=pl.lit(currency))
    file = write_statement(frames, tmp_path / "a.csv")
    assert f",{text},{currency}," in file.read_text()
    assert read_csv(file).frames["transactions"].sort("occurred_at")["amount_minor"].to_list() == [-1_234_567, -1, 5]


def test_nobody_and_nothing(tmp_path):
    assert len(anonymise(all_tables(), KEY).frames["transactions"]) == 0
    assert len(read_csv(write_statement(one([(1, -5, 13, None, None)]), tmp_path / "a.csv")).frames["transactions"]) == 1


MEMORY = """
import sys
from fincoach.data import anonymise
from fincoach.data.database import connect
anonymise._AT_ONCE = 10
anonymise.anonymise_database(connect(sys.argv[1]), connect(sys.argv[2]), bytes(32))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)
"""


def test_memory_does_not_grow_with_the_people(tmp_path):
    """170 people more have some 85,000 rows, which are 60 MiB as the objects that a driver makes of them."""
    peak = []
    for people in (30, 200):
        engine = connect(f"sqlite:///{tmp_path}/{people}.db")
        upgrade(engine)
        made = generate(people, 400, 1).frames
        load(engine, {t: made[t] for t in ("users", "transactions")})
        engine.dispose()
        command = [sys.executable, "-W", "ignore", "-c", MEMORY, f"sqlite:///{tmp_path}/{people}.db", f"sqlite:///{tmp_path}/to{people}.db"]
        peak.append(float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    assert peak[1] - peak[0] < 30, peak


# a to e: attackers


@pytest.fixture(scope="module")
def rates():
    """What each attacker finds among 80 people, scaled and shifted only, and anonymised. The same among 500 is in benchmarks/anonymise."""
    frames, found = generate(80, 300, 21).frames, {}
    for kind, strength in (("plain", PLAIN), ("ours", STRENGTH)):
        shared = anonymise(frames, KEY, strength).frames
        with_rows = set(shared["users"].join(shared["transactions"].select(id="user_id").unique(), on="id")["external_id"])
        names = frames["users"].join(frames["transactions"].select(id="user_id").unique(), on="id")["external_id"].sort()
        pairs = [p for p in zip(names, module._words(KEY, "someone", names), strict=True) if p[1] in with_rows]
        found[kind] = all_attacks(frames, shared, kind, pairs, targets=80, ks=(3, 10))
    print("\n".join(f"{k:58} {found['plain'][k]:6.1%} {found['ours'][k]:6.1%}" for k in found["ours"]))
    return found


@pytest.mark.parametrize(("attack", "plain", "most"), [
    ("a: 3 rows (day, amount)", 0.8, 0.12),
    ("a: 10 rows (day, amount)", 0.95, 0.2),
    ("b: ratios of 3 amounts", 0.0, 0.12),
    ("b: ratios of 10 amounts", 0.2, 0.2),
    ("c: gaps between 10 dates", 0.5, 0.12),
    ("d: how often at the ten first merchants, names unknown", 0.95, 0.12),
])
def test_attackers_find_people_who_are_scaled_and_shifted_and_hardly_the_anonymised(rates, attack, plain, most):
    """The first figure proves that the attacker is one; the second allows for chance (1 in 80) among 80 tries."""
    assert rates["plain"][attack] >= plain
    assert rates["ours"][attack] <= most


def test_what_remains_is_no_worse_than_is_said(rates):
    """Who knows most of a person's statement, or the whole series of weeks, finds some: the notebook says how many."""
    assert rates["plain"]["e: all weeks' spending"] > 0.95
    assert rates["ours"]["e: all weeks' spending"] < 0.5
    assert rates["ours"]["d: how often at the first 3 merchants, told by rank"] < 0.35
    assert rates["plain"]["d: how often at the first 10 merchants, told by rank"] > 0.9


def test_the_measured_table_is_there():
    assert (Path(ROOT) / "benchmarks/anonymise/results.json").is_file()
