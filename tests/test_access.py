"""Who may see what: every route, role, person and faulty token; floods, big and slow bodies; revocation, erasure, a database that is away."""

import asyncio
import base64
import json
import logging
import math
import os
import time
from datetime import UTC, datetime
from itertools import product

import httpx
import jwt
import polars as pl
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fastapi import APIRouter, Depends, FastAPI

from fincoach.api import access as access_
from fincoach.api.access import (
    POLICY,
    Access,
    AccessError,
    Buckets,
    Erasures,
    Keys,
    Limits,
    Refused,
    Shield,
    check_policy,
    depth,
    keys_from,
    make_token,
    me_router,
    read_token,
    revoke,
)
from fincoach.api.app import create_app, parts_of
from fincoach.api.asking import Pool
from fincoach.data import audit, rights
from fincoach.data.database import connect, load, upgrade
from fincoach.data.population import generate
from fincoach.data.tables import TABLES

SECRET = "a secret of forty characters, no less..."
ENVIRON = {"FINCOACH_JWT_SECRET": SECRET}
KEYS = keys_from(ENVIRON)
FREE = Limits(caller=(1e6, 1e6), address=(1e6, 1e6))


def run(coroutine):
    return asyncio.run(coroutine)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a database of a few made-up people; the numbers of a goal of the second, and of a decision about them."""
    folder = tmp_path_factory.mktemp("access")
    engine = connect(f"sqlite:///{folder}/fincoach.db", wait=2)
    upgrade(engine)
    load(engine, generate(8, 120, seed=3).frames)
    with engine.begin() as c:
        c.execute(sa.insert(TABLES["financial_goals"]).values(id=901, user_id=2, name="boat", target_minor=1000, currency="EUR", created_at=datetime(2024, 7, 2, tzinfo=UTC)))
        decision = c.scalar(sa.text("SELECT min(id) FROM recommendation_history WHERE user_id = 2"))
        names = dict(c.execute(sa.text("SELECT id, external_id FROM users")).all())
    yield folder, engine, names, decision
    engine.dispose()


@pytest.fixture
def app(place):
    folder, engine, _, _ = place
    made = create_app(parts_of(engine, folder / "artifacts", environ=ENVIRON, limits=FREE, pool=Pool(budget=60)), FREE)
    made.state.fincoach.access.reads.patience = 60  # a machine that is busy is not what is tested here
    made.state.fincoach.access.notes.aside.patience = 60
    yield made
    for name in ("erasures", "access", "manager", "cache", "pool", "batcher"):
        getattr(made.state.fincoach, name).close()


def client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://fincoach")


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def token(subject, role="user", **more):
    return make_token(KEYS, subject, time.time(), role, **more)


def forged(key=SECRET, algorithm="HS256", headers=None, **claims):
    said = {"sub": "person-00001", "role": "admin", "jti": "j", "aud": "fincoach", "exp": int(time.time()) + 600} | claims
    return jwt.encode({k: v for k, v in said.items() if v is not None}, key, algorithm, headers)


def by_hand(header, claims, signature="x"):
    """A token put together without a library."""
    parts = [base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=").decode() for p in (header, claims)]
    return ".".join([*parts, signature])


ADMIN = {"sub": "person-00001", "role": "admin", "jti": "j", "aud": "fincoach", "exp": 4e9}
FAULTS = {
    "no token": None,
    "noise": "noise",
    "empty": "",
    "alg none": by_hand({"alg": "none", "typ": "JWT"}, ADMIN, ""),
    "alg nOnE": by_hand({"alg": "nOnE", "typ": "JWT"}, ADMIN, ""),
    "another key": forged("another secret of forty characters....."),
    "another algorithm": forged(SECRET * 2, "HS512"),
    "key in the header": forged("k" * 40, headers={"jwk": {"kty": "oct", "k": base64.b64encode(b"k" * 40).decode()}, "kid": "../../dev/null"}),
    "another audience": forged(aud="shop"),
    "no audience": forged(aud=None),
    "expired": forged(exp=int(time.time()) - 1),
    "no end": forged(exp=None),
    "endless": forged(exp=math.inf),
    "not yet": forged(nbf=int(time.time()) + 600),
    "no number": forged(jti=None),
    "no subject": forged(sub=None),
    "role root": forged(role="root"),
    "roles in a list": forged(role=["admin"]),
    "endless token": "x" * 9000,
}


# --- every route, role and person ----------------------------------------------------------------------------------


BODIES = {"feedback": {"response": "accepted"}}


def calls(app, goal, decision):
    """Every route of the app, as something to call: (method, path, path as declared, policy)."""
    for route in app.routes:
        path = route.path.replace("{goal_id}", str(goal)).replace("{recommendation_id}", str(decision))
        assert "{" not in path, f"say in this test what to put into {path}"
        for method in sorted(route.methods - {"HEAD", "OPTIONS"}):
            yield method, path, route.path, POLICY[method, route.path]


def test_every_route_for_every_role_person_and_fault(app, place, capsys):
    """Nobody without a good token gets anything; a user nothing of another, an operator only with a note in the log."""
    _, engine, names, decision = place
    me, other = names[1], names[2]
    revoked = token(me, token_id="revoked")
    revoke(engine, "revoked", datetime(2100, 1, 1, tzinfo=UTC), datetime.now(UTC))
    faults = {**FAULTS, "revoked": revoked, "of nobody": token("nobody at all")}
    user, admin, outsider = token(me), token(me, "admin"), token("night-shift", "admin")
    asked = 0

    async def status(c, method, path, with_, **query):
        nonlocal asked
        asked += 1
        query |= {"confirm": "not the name"} if path in ("/me", "/me/anonymise") else {}
        got = await c.request(method, path, params=query, headers={} if with_ is None else bearer(with_), json=BODIES.get(path.rsplit("/", 1)[-1], {}) if method in ("POST", "PUT") else None)
        assert "Traceback" not in got.text
        assert got.headers["x-content-type-options"] == "nosniff"
        return got.status_code

    async def walk():
        async with client(app) as c:
            for method, path, template, policy in calls(app, 901, decision):
                if policy == "public":
                    assert await status(c, method, path, None) == 200, path
                    continue
                for name, fault in faults.items():
                    assert await status(c, method, path, fault, user=other) in (401, 403), (path, name)
                if policy == "admin":
                    assert await status(c, method, path, user) == 403, path
                    assert await status(c, method, path, user, user=me) == 403, path
                    assert await status(c, method, path, outsider) not in (401, 403), path
                    continue
                for foreign in (other, "nobody at all", "", me.upper(), f"{me} ", "%00", "' OR 1=1 --"):
                    assert await status(c, method, path, user, user=foreign) == 403, (path, foreign)
                own = await status(c, method, path, user)
                assert own == 404 if "{" in template else own not in (401, 403, 500), (path, own)
                assert await status(c, method, path, user, user=me) not in (401, 403, 500), path
                assert await status(c, method, path, admin, user=other) not in (401, 403, 500), path
                assert await status(c, method, path, admin, user="nobody at all") == 404, path
                assert await status(c, method, path, outsider) == 422, path

    with engine.connect() as c:
        before = c.scalar(sa.text("SELECT count(*) FROM audit_log"))
    run(walk())
    rows = audit.rows_after(engine, before, 100_000)
    routes = list(calls(app, 901, decision))
    own, admins = sum(r[3] == "own" for r in routes), sum(r[3] == "admin" for r in routes)
    refused = [r for r in rows if r["outcome"] == "refused"]
    assert sum(r["details"]["reason"] == "another person" for r in refused) == 7 * own
    assert sum(r["details"]["reason"] == "not an operator" for r in refused) == 2 * admins
    assert {r["details"]["reason"] for r in refused} == {"another person", "not an operator", "a row of another person"}
    assert sum(r["action"] == "access" and r["target_name"] == other for r in rows) == own
    assert not audit.verify(engine).broken
    with capsys.disabled():
        print(f"\n{asked:,} requests: {len(routes)} routes x {len(faults)} faults, 3 roles, 9 people; {len(refused)} refusals noted")


@pytest.mark.parametrize(("path", "what"), [("/coaching/secrets", "GET /coaching/secrets has no policy"), ("/me/export", "'own', but does not depend on access.own")])
def test_a_route_that_nobody_thought_about_does_not_start(app, path, what):
    app.add_api_route(path, lambda: 1)
    with pytest.raises(AccessError, match=what):
        check_policy(app.routes)


def test_a_router_that_hides_its_routes_does_not_start():
    app, router = FastAPI(openapi_url=None), APIRouter()
    router.add_api_route("/coaching/secrets", lambda: 1)
    app.include_router(router)
    with pytest.raises(AccessError, match="hides its routes"):
        check_policy(app.routes)


def test_whom_a_request_is_about_is_said_once_and_in_openapi(app, place):
    """Two names are not taken for one, however they are spelled; OpenAPI tells of the parameter exactly where it counts."""
    names, good = place[2], token(place[2][1])

    async def walk():
        async with client(app) as c:
            for query, status in ((f"user={names[1]}&user={names[2]}", 422), (f"user={names[2]}&us%65r={names[1]}", 422), (f"user={'x' * 129}", 422),
                                  (f"us%65r={names[1]}&user=", 422), ("user", 403), (f"User={names[2]}", 200), (f"user[]={names[2]}", 200), (f"superuser={names[2]}", 200)):
                assert (await c.get(f"/me/consent?{query}", headers=bearer(good))).status_code == status, query
            return (await c.get("/openapi.json")).json()

    told = {(method.upper(), path): [p["name"] for p in operation.get("parameters", [])] for path, item in run(walk())["paths"].items() for method, operation in item.items()}
    for key, parameters in told.items():
        assert parameters.count("user") == (POLICY[key] == "own"), key


def test_what_is_smuggled_into_bodies_is_refused_and_not_stored(app, place):
    _, engine, names, _ = place

    async def walk():
        async with client(app) as c:
            for extra in ({"role": "admin"}, {"user_id": 2}, {"is_admin": True}, {"model_version": "x"}, {"tracking": "yes"}, {"tracking": 1}):
                got = await c.put("/me/consent", headers=bearer(token(names[3])), json={"learning": False} | extra)
                assert got.status_code == 422, extra
            for body in ({"token_id": "x", "expires_at": "soon"}, {"token_id": "a b", "expires_at": "2026-01-01T00:00:00Z"}, {"token_id": "x", "expires_at": "2026-01-01T00:00:00"},
                         {"token_id": "x" * 65, "expires_at": "2026-01-01T00:00:00Z"}, {"token_id": "x", "expires_at": "2026-01-01T00:00:00Z", "role": "admin"}):
                assert (await c.post("/admin/revoke-token", headers=bearer(token("night-shift", "admin")), json=body)).status_code == 422, body

    run(walk())
    assert rights.consents(engine, 3) == rights.PURPOSES


# --- tokens --------------------------------------------------------------------------------------------------------


def pem(key):
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def private(key):
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@pytest.mark.parametrize(("key", "algorithm"), [(rsa.generate_private_key(65537, 2048), "RS256"), (ec.generate_private_key(ec.SECP256R1()), "ES256")])
def test_public_keys(key, algorithm):
    """A token signed with the private key is taken; one signed with the public key's text as a shared secret is not."""
    keys = keys_from({"FINCOACH_JWT_PUBLIC_KEY": pem(key), "FINCOACH_JWT_ISSUER": "https://login"})
    assert keys.algorithm == algorithm
    assert read_token(keys, forged(private(key), algorithm, iss="https://login"), time.time()).role == "admin"
    confused = by_hand({"alg": "HS256", "typ": "JWT"}, ADMIN | {"iss": "https://login"})
    for wrong in (forged(private(key), algorithm), forged(private(key), algorithm, iss="https://elsewhere"), confused, forged(SECRET, iss="https://login")):
        with pytest.raises(Refused) as refusal:
            read_token(keys, wrong, time.time())
        assert refusal.value.status_code == 401
    with pytest.raises(AccessError, match="cannot sign"):
        make_token(keys, "anna", 0)


def test_an_hmac_over_the_public_key_is_no_signature():
    """The classic confusion of RS256 and HS256, done with a real HMAC."""
    import hashlib
    import hmac

    key = rsa.generate_private_key(65537, 2048)
    head = by_hand({"alg": "HS256", "typ": "JWT"}, ADMIN, "").removesuffix(".")
    signature = base64.urlsafe_b64encode(hmac.new(pem(key).encode(), head.encode(), hashlib.sha256).digest()).rstrip(b"=").decode()
    with pytest.raises(Refused):
        read_token(keys_from({"FINCOACH_JWT_PUBLIC_KEY": pem(key)}), f"{head}.{signature}", time.time())


@pytest.mark.parametrize("key", [rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP384R1())])
def test_weak_and_odd_keys_are_refused_at_start(key):
    with pytest.raises(AccessError, match="must be an RSA key"):
        keys_from({"FINCOACH_JWT_PUBLIC_KEY": pem(key)})


def test_keys_do_not_show_their_secret():
    assert SECRET not in repr(KEYS)
    assert isinstance(KEYS, Keys)


def test_two_authorization_headers_and_other_schemes_are_refused(app, place):
    good = token(place[2][1])

    async def walk():
        async with client(app) as c:
            for headers in ([("authorization", f"Bearer {good}")] * 2, [("authorization", f"Basic {good}")], [("authorization", good)], [("authorization", "Bearer ")]):
                assert (await c.get("/me/consent", headers=headers)).status_code == 401
            assert (await c.get("/me/consent", headers=[("authorization", f"bearer {good}")])).status_code == 200

    run(walk())


# --- what changes after a token was signed -------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.at = time.time()

    def __call__(self):
        return self.at


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/var/fincoach.db"
        return
    if "FINCOACH_TEST_POSTGRES" not in os.environ:
        pytest.skip("FINCOACH_TEST_POSTGRES names no PostgreSQL database")
    url = sa.make_url(os.environ["FINCOACH_TEST_POSTGRES"])
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as c:
        c.exec_driver_sql("DROP SCHEMA IF EXISTS access CASCADE")
        c.exec_driver_sql("CREATE SCHEMA access")
    yield url.update_query_dict({"options": "-csearch_path=access"}).render_as_string(hide_password=False)
    with admin.connect() as c:
        c.exec_driver_sql("DROP SCHEMA access CASCADE")
    admin.dispose()


@pytest.fixture
def small(request, tmp_path):
    """A database with two people, two `Access` on it as two processes have them, their clock, and the file. On SQLite unless a test takes `database` too."""
    file = tmp_path / "var" / "fincoach.db"
    url = request.getfixturevalue("database") if "database" in request.fixturenames else f"sqlite:///{file}"
    engines = [connect(url, wait=0.3) for _ in range(2)]
    upgrade(engines[0])
    load(engines[0], {"users": pl.DataFrame({"id": [1, 2], "external_id": ["anna", "bert"], "currency": "EUR", "created_at": datetime(2026, 1, 1, tzinfo=UTC)})})
    clock = Clock()
    made = [Access(e, KEYS, FREE, clock, clock) for e in engines]
    yield made, clock, file
    for a in made:
        a.close()
        a.engine.dispose()


def refusal(coroutine):
    """The status with which a coroutine is refused."""
    with pytest.raises(Refused) as refused:
        run(coroutine)
    return refused.value.status_code


def test_a_revoked_token_is_refused_within_a_second_by_every_process(database, small):
    (one, two), clock, _ = small
    good, other = token("anna", token_id="a"), token("anna", token_id="b")
    assert run(one.caller(good)) == run(two.caller(good))
    revoke(one.engine, "a", datetime.fromtimestamp(clock() + 3600, UTC), datetime.fromtimestamp(clock(), UTC))
    clock.at += 1.01
    assert refusal(one.caller(good)) == refusal(two.caller(good)) == 401
    assert run(one.caller(other)).token_id == "b"


def test_a_remembered_token_expires_on_time(small):
    (one, _), clock, _ = small
    good = token("anna", hours=0.005)
    run(one.caller(good))
    clock.at += 17
    run(one.caller(good))
    clock.at += 2
    assert refusal(one.caller(good)) == 401


def test_an_erased_person_is_locked_out_at_once_and_the_number_is_not_inherited(database, small, tmp_path):
    """The other process remembers the token; the number goes to a new person; the old token must not open the new one's data."""
    (one, two), clock, _ = small
    good = token("bert")
    assert run(two.caller(good)).user_id == 2
    moment = datetime.fromtimestamp(clock(), UTC)
    rights.request_erasure(one.engine, 2, moment)
    clock.at += 1.01
    assert refusal(two.caller(good)) == 403
    rights.resume_erasures(one.engine, rights.Places(tmp_path / "var", tmp_path / "reports", tmp_path / "artifacts"), moment)
    load(one.engine, {"users": pl.DataFrame({"id": [2], "external_id": ["carl"], "currency": "EUR", "created_at": moment})})
    clock.at += 1.01
    assert refusal(two.caller(good)) == 403
    assert run(two.caller(token("carl"))).user_id == 2


def test_an_erasure_between_two_looks_is_noticed(small, tmp_path):
    """Asked for, done, and the number given away within one second: nobody who is remembered stays so."""
    (one, two), clock, _ = small
    good, moment = token("bert"), datetime.fromtimestamp(clock(), UTC)
    assert run(two.caller(good)).user_id == 2
    rights.erase_person(one.engine, 2, rights.Places(tmp_path / "var", tmp_path / "reports", tmp_path / "artifacts"), moment)
    load(one.engine, {"users": pl.DataFrame({"id": [2], "external_id": ["carl"], "currency": "EUR", "created_at": moment})})
    clock.at += 1.01
    assert refusal(two.caller(good)) == 403


def test_while_the_database_is_away_known_callers_stay_known_for_a_minute(small):
    """The file is really gone; it comes back, and so does everybody."""
    (one, two), clock, file = small
    good = token("anna", hours=10)
    run(one.caller(good))
    for a in (one, two):
        a.engine.dispose()
    for part in sorted(file.parent.iterdir()):
        part.rename(part.with_name(f"away-{part.name}"))
    clock.at += 30
    assert run(one.caller(good)).subject == "anna"
    assert refusal(two.caller(good)) == 503  # who is not known cannot be looked up
    clock.at += 40
    assert refusal(one.caller(good)) == 503
    for part in sorted(file.parent.iterdir()):
        part.rename(part.with_name(part.name.removeprefix("away-")))
    assert run(one.caller(good)) == run(two.caller(good))


def test_a_slow_database_is_waited_for_with_limited_patience(small, monkeypatch):
    (one, _), _, _ = small
    one.reads.patience, one.reads.room = 0.1, 3
    monkeypatch.setattr(one, "verify", lambda token: time.sleep(0.5))

    async def crowd():
        begin = time.monotonic()
        found = await asyncio.gather(*(one.caller(token("anna", token_id=str(n))) for n in range(20)), return_exceptions=True)
        return time.monotonic() - begin, {(r.status_code, r.detail["error"]) for r in found}

    took, found = run(crowd())
    assert found == {(503, "too many requests wait for the database"), (503, "the database does not answer")}
    assert took < 0.45
    assert one.reads.room == 3


def test_an_operator_who_cannot_be_noted_gets_nothing_and_a_refusal_stays_one(place, app):
    """The writer's lock is really held."""
    _, engine, names, _ = place
    app.state.fincoach.access.notes.aside.patience = 0.5
    with engine.connect() as c:
        c.exec_driver_sql("ROLLBACK")
        c.exec_driver_sql("BEGIN IMMEDIATE")

        async def walk():
            async with client(app) as web:
                admin = await web.get("/me/consent", params={"user": names[1]}, headers=bearer(token("night-shift", "admin")))
                user = await web.get("/me/consent", params={"user": names[1]}, headers=bearer(token(names[2])))
                own = await web.get("/me/consent", headers=bearer(token(names[2])))
                return admin, user, own

        admin, user, own = run(walk())
        c.exec_driver_sql("ROLLBACK")
    assert (admin.status_code, user.status_code, own.status_code) == (503, 403, 200)
    assert int(admin.headers["retry-after"]) >= 1


def test_the_newest_mark_is_kept_and_a_mark_that_cannot_be_is_counted(small, tmp_path):
    """A log that is cut at its end is found out; a folder that is a file stops nobody."""
    (one, _), _, _ = small
    caller = access_.Caller(None, "night-shift", "admin", "t")
    one.notes.mark = tmp_path / "audit.mark"
    for _ in range(3):
        run(one.notes.note(caller, "access", 1))
    with one.engine.begin() as c:
        c.execute(sa.delete(TABLES["audit_log"]).where(TABLES["audit_log"].c.id == 3))
    assert "rows after 2 were removed" in audit.verify(one.engine, (audit.kept_mark(one.notes.mark),)).broken
    one.notes.mark = tmp_path / "audit.mark" / "deeper"
    run(one.notes.note(caller, "access", 1))
    assert one.notes.counts["mark not kept"] == 1


# --- floods and bodies ---------------------------------------------------------------------------------------------


def test_who_floods_gets_429_and_others_are_served(place):
    _, engine, names, _ = place
    clock = Clock()
    access, app = Access(engine, KEYS, Limits(caller=(10, 20)), since=clock), FastAPI(openapi_url=None)

    @app.get("/x")
    async def x(person=Depends(access.own)) -> int:  # noqa: B008
        return person.user_id

    async def walk():
        async with client(app) as c:
            flood = [await c.get("/x", headers=bearer(token(names[1], token_id=str(n % 5)))) for n in range(50)]
            calm = await c.get("/x", headers=bearer(token(names[2])))
            clock.at += 1
            later = [await c.get("/x", headers=bearer(token(names[1]))) for _ in range(12)]
            return flood, calm, later

    flood, calm, later = run(walk())
    access.close()
    assert [f.status_code for f in flood] == [200] * 20 + [429] * 30  # another token does not help
    assert flood[-1].headers["retry-after"] == "1"
    assert calm.status_code == 200
    assert [f.status_code for f in later] == [200] * 10 + [429] * 2


def test_buckets_never_give_more_than_they_hold():
    """Against a count by hand, over random moments."""
    import random

    rng, bucket, at, given = random.Random(5), Buckets(rate=3, burst=7), 0.0, []
    for _ in range(5_000):
        at += rng.expovariate(6)
        if bucket.take("x", at) == 0:
            given.append(at)
    for i, j in product(range(0, len(given), 97), (1, 5, 20, 60)):
        if i + j < len(given):
            assert j + 1 <= 7 + 3 * (given[i + j] - given[i]) + 1e-6
    assert len(given) > 0.95 * 3 * at


async def exchange(app, chunks, headers=(), method="POST", host="10.0.0.1", pause=0.0):
    """Status, headers, body and how many chunks were taken, of one request sent by hand."""
    taken, sent = 0, []

    async def receive():
        nonlocal taken
        if taken >= len(chunks):
            await asyncio.sleep(60)
        await asyncio.sleep(pause)
        taken += 1
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": taken < len(chunks)}

    async def send(message):
        sent.append(message)

    await app({"type": "http", "method": method, "path": "/", "headers": list(headers), "client": (host, 1), "scheme": "https"}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:]), taken


async def echo(scope, receive, send):
    """An app that gives back the length of the body."""
    size, more = 0, scope["method"] == "POST"
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Security-Policy", b"mine")]})
    await send({"type": "http.response.body", "body": str(size).encode()})


CHUNKED = [(b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize(("chunks", "headers", "status", "most"), [
    ([b"x" * 1000] * 3, CHUNKED, 200, 3),
    ([b"x" * 3000], [(b"content-length", b"3000")], 200, 1),
    ([b"x"], [(b"content-length", b"10000000")], 413, 0),
    ([b"x"], [(b"content-length", b"9" * 40)], 413, 0),
    ([b"x"], [(b"content-length", b"-1")], 413, 0),
    ([b"x" * 1000] * 10_000, CHUNKED, 413, 1001),
    ([b"[" * 40 + b"]" * 40], CHUNKED, 422, 1),
    ([b"[" * 10_000], CHUNKED, 422, 1),
    ([b'{"a":' * 200_000], CHUNKED, 422, 1),
    ([b'["' + b"[" * 1000 + b'"]'], CHUNKED, 200, 1),
])
def test_bodies(chunks, headers, status, most):
    got, sent, body, taken = run(exchange(Shield(echo, FREE), chunks, headers))
    assert got == status
    assert taken <= most
    assert body == str(sum(map(len, chunks))).encode() if status == 200 else json.loads(body)["what_to_do"]
    assert sent[b"strict-transport-security"]


def test_a_body_that_trickles_is_given_up():
    """A byte now and then keeps no connection."""
    begin = time.monotonic()
    status, headers, _, _ = run(exchange(Shield(echo, FREE._replace(body_seconds=0.2)), [b"x"] * 1000, CHUNKED, pause=0.01))
    assert (status, headers[b"connection"]) == (408, b"close")
    assert time.monotonic() - begin < 2


def test_one_address_floods_and_another_is_served():
    shield = Shield(echo, Limits(address=(5, 10)), since=Clock())
    flood = [run(exchange(shield, [], method="GET"))[0] for _ in range(15)]
    assert flood == [200] * 10 + [429] * 5
    assert run(exchange(shield, [], method="GET", host="10.0.0.2"))[0] == 200
    of_one_network = [run(exchange(shield, [], method="GET", host=f"2001:db8::{n}"))[0] for n in range(1, 12)]
    assert of_one_network[-1] == 429


def test_an_answer_keeps_a_header_of_its_own():
    _, headers, _, _ = run(exchange(Shield(echo, FREE), [], method="GET"))
    assert headers[b"Content-Security-Policy"] == b"mine"
    assert b"content-security-policy" not in headers
    assert (headers[b"cache-control"], headers[b"x-frame-options"]) == (b"no-store", b"DENY")


def test_depth_is_quick_for_a_body_made_against_it():
    begin = time.process_time()
    for body in (b'"' + b'\\"' * 499_999, b'"' * 1_000_000, b"\\" * 1_000_000, b'"' + b"a\\" * 500_000, b"[" * 1_000_000):
        depth(body)
    assert time.process_time() - begin < 2


# --- what a person may ask for, over HTTP --------------------------------------------------------------------------


def test_export_and_erasure_over_http(place, tmp_path, caplog):
    _, engine, names, _ = place
    access, app = Access(engine, KEYS, FREE), FastAPI(openapi_url=None)
    erasures = Erasures(access, rights.Places(tmp_path, tmp_path, tmp_path))
    app.router.routes.extend(me_router(access, erasures).routes)
    check_policy(app.routes)
    me = names[7]
    with engine.connect() as c:
        before = c.scalar(sa.text("SELECT count(*) FROM audit_log"))

    async def walk():
        async with client(app) as c:
            head = bearer(token(me))
            agreed = await c.put("/me/consent", headers=head, json={"tracking": True})
            assert agreed.json() == {"tracking": True, "learning": True}
            export = await c.get("/me/export", headers=head)
            assert export.json()["tables"]["users"][0]["external_id"] == me
            assert len(export.json()["tables"]["transactions"]) > 20
            assert (await c.delete("/me", headers=head, params={"confirm": "yes"})).status_code == 422
            gone = await c.delete("/me", headers=head, params={"confirm": me})
            assert (gone.status_code, gone.json()["state"]) == (202, "accepted")
            assert (await c.get("/me/export", headers=head)).status_code == 403
            erasures.close()
            return export.text

    with caplog.at_level(logging.DEBUG):
        export = run(walk())
    access.close()
    assert access_.find(engine, me) is None
    rows = audit.rows_after(engine, before)
    assert [r["action"] for r in rows] == ["consent", "export", "erase asked for", "erase done"]
    said = json.dumps(rows, default=str) + "".join(r.getMessage() for r in caplog.records if r.name.startswith("fincoach"))
    amounts = {str(r["amount_minor"]) for r in json.loads(export)["tables"]["transactions"] if abs(r["amount_minor"]) > 99_999}
    assert not [secret for secret in (me, token(me)[:20], *amounts) if secret in said]


def test_odd_names_and_numbers_are_nobody_on_both_databases(database, small):
    """Names that a database cannot even be asked for are nobody, not an error."""
    (one, _), _, _ = small
    for name in ("\0", "a\0b", "' OR 1=1 --", "%", "x" * 128, "\u202e", "anna ", "ANNA"):
        assert access_.find(one.engine, name) is None, name
    assert access_.find(one.engine, "anna") == 1
    for number in (1, -1, 2**63 - 1, 2**63, -(2**200)):
        assert access_._owner(one.engine, "financial_goals", number) is None
    run(one.notes.note(access_.Caller(None, "night-shift", "admin", "t"), "access", 1))
    assert audit.verify(one.engine).rows == 1


def test_a_remembered_caller_needs_no_signature_and_no_database(small, monkeypatch):
    """Two look-ups and a bucket."""
    (one, _), _, _ = small
    good = token("anna")
    first = run(one.caller(good))
    asked = []
    monkeypatch.setattr(access_.jwt, "decode", lambda *a, **k: asked.append("signature"))
    sa.event.listen(one.engine, "before_cursor_execute", lambda *a: asked.append(a[2]))
    assert all(run(one.caller(good)) == first for _ in range(3))
    assert asked == []
