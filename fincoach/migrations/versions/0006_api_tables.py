"""What an API needs beside the models: how often a person's rows have changed, who did what, who agreed to what, and who is to be forgotten.

The step `create_api_tables`. Everybody who is there begins with a revision that no earlier count can have reached: the microseconds
since 1970. So an answer that was kept before the step was taken back never passes for one that holds.
"""

import sqlalchemy as sa
from alembic import op

from fincoach.data.tables import Key, Moment

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

NOW = {"sqlite": "CAST(strftime('%s', 'now') AS INTEGER) * 1000000", "postgresql": "CAST(extract(epoch FROM now()) * 1000000 AS BIGINT)"}

# Whose revision a row of these tables is about; {row} is the row before or after the change.
WATCHED = {
    "transactions": "{row}.user_id",
    "financial_goals": "{row}.user_id",
    "user_profiles": "{row}.user_id",
    "user_purchases": "{row}.user_id",
    "goal_contributions": "(SELECT g.user_id FROM financial_goals g WHERE g.id = {row}.goal_id)",
    "categories": "0",
}
CHANGES = {"insert": ("NEW",), "update": ("OLD", "NEW"), "delete": ("OLD",)}
FRESH = "CAST(random() * 9223372036854775000 AS BIGINT)"  # PostgreSQL's; random() is a whole number on SQLite
AS_OWNER = "RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT"  # so that whoever may write rows need not be let in here


def _sqlite():
    """The triggers, each with what it does to a row."""
    for table, who in WATCHED.items():
        for change, rows in CHANGES.items():
            yield table, change, [f"UPDATE user_revisions SET revision = random() WHERE user_id = {who.format(row=r)}" for r in rows]
    gone = "DELETE FROM user_revisions WHERE user_id = {}.id"
    come = "INSERT INTO user_revisions (user_id, revision) VALUES (NEW.id, random())"
    yield "users", "insert", [gone.format("NEW"), come]
    yield "users", "update", [gone.format("OLD"), gone.format("NEW"), come]
    yield "users", "delete", [gone.format("OLD")]


def _postgresql():
    """The triggers, each with what it does to all rows of a statement at once; people in order, so that two writers wait for each other and do not lock."""
    for table, who in WATCHED.items():
        for change, rows in CHANGES.items():
            people = " UNION ".join(f"SELECT {who.format(row='r')} FROM {r.lower()}_rows r" for r in rows)
            held = f"SELECT user_id FROM user_revisions WHERE user_id IN ({people}) ORDER BY user_id FOR NO KEY UPDATE"
            yield table, change, [f"UPDATE user_revisions SET revision = {FRESH} WHERE user_id IN ({held})"]
    gone = "DELETE FROM user_revisions WHERE user_id IN (SELECT id FROM {}_rows)"
    come = f"INSERT INTO user_revisions (user_id, revision) SELECT id, {FRESH} FROM new_rows ON CONFLICT (user_id) DO UPDATE SET revision = excluded.revision"
    yield "users", "insert", [come]
    yield "users", "update", [gone.format("old"), come]
    yield "users", "delete", [gone.format("old")]


def watch():
    """Makes the database give a person a new revision whenever their rows change: a random number, since counts repeat where ids are used again."""
    if op.get_bind().dialect.name == "sqlite":
        for table, change, steps in _sqlite():
            op.execute(f"CREATE TRIGGER revise_{table}_{change} AFTER {change.upper()} ON {table} BEGIN {'; '.join(steps)}; END")
        return
    for table, change, steps in _postgresql():
        name, seen = f"revise_{table}_{change}", " ".join(f"{r} TABLE AS {r.lower()}_rows" for r in CHANGES[change])
        op.execute(f"CREATE OR REPLACE FUNCTION {name}() {AS_OWNER} AS $$ BEGIN {'; '.join(steps)}; RETURN NULL; END $$")
        op.execute(f"CREATE TRIGGER {name} AFTER {change.upper()} ON {table} REFERENCING {seen} FOR EACH STATEMENT EXECUTE FUNCTION {name}()")
    op.execute(f"CREATE OR REPLACE FUNCTION revise_all() {AS_OWNER} AS $$ BEGIN UPDATE user_revisions SET revision = {FRESH}; RETURN NULL; END $$")
    for table in (*WATCHED, "users"):
        op.execute(f"CREATE TRIGGER revise_{table}_truncate AFTER TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION revise_all()")


def unwatch():
    """Takes the triggers away."""
    made = _sqlite() if (sqlite := op.get_bind().dialect.name == "sqlite") else _postgresql()
    for table, change, _ in made:
        name = f"revise_{table}_{change}"
        op.execute(f"DROP TRIGGER IF EXISTS {name}" if sqlite else f"DROP FUNCTION IF EXISTS {name}() CASCADE")
    if not sqlite:
        op.execute("DROP FUNCTION IF EXISTS revise_all() CASCADE")


def upgrade():
    """Creates the tables, and begins to count."""
    op.create_table(
        "user_revisions",
        sa.Column("user_id", Key, autoincrement=False, nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_user_revisions")),
    )
    now = NOW[op.get_bind().dialect.name]
    op.execute(f"INSERT INTO user_revisions (user_id, revision) SELECT id, {now} FROM users UNION ALL SELECT 0, {now}")
    op.create_table(
        "audit_log",
        sa.Column("id", Key, nullable=False),
        sa.Column("at", Moment(), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("details", sa.Text(), server_default="{}", nullable=False),
        sa.Column("previous_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.CheckConstraint("outcome IN ('ok', 'refused', 'failed')", name=op.f("ck_audit_log_outcome")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
        sa.UniqueConstraint("hash", name=op.f("uq_audit_log_hash")),
    )
    op.create_index(op.f("ix_audit_log_actor_at"), "audit_log", ["actor", "at"])
    op.create_table(
        "audit_names",
        sa.Column("user_id", Key, nullable=False),
        sa.Column("alias", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_audit_names_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_audit_names")),
        sa.UniqueConstraint("alias", name=op.f("uq_audit_names_alias")),
    )
    op.create_table(
        "user_consents",
        sa.Column("user_id", Key, nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("granted", sa.Boolean(), nullable=False),
        sa.Column("updated_at", Moment(), nullable=False),
        sa.CheckConstraint("purpose IN ('tracking', 'learning')", name=op.f("ck_user_consents_purpose")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_user_consents_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", "purpose", name=op.f("pk_user_consents")),
    )
    op.create_table(
        "revoked_tokens",
        sa.Column("token_id", sa.String(64), nullable=False),
        sa.Column("revoked_at", Moment(), nullable=False),
        sa.Column("expires_at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("token_id", name=op.f("pk_revoked_tokens")),
    )
    op.create_table(
        "erasures",
        sa.Column("id", Key, nullable=False),
        sa.Column("erased_user_id", sa.BigInteger(), nullable=True),
        sa.Column("requested_at", Moment(), nullable=False),
        sa.Column("completed_at", Moment(), nullable=True),
        sa.Column("report", sa.Text(), server_default="{}", nullable=False),
        sa.CheckConstraint("(completed_at IS NULL) = (erased_user_id IS NOT NULL)", name=op.f("ck_erasures_erased_user_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasures")),
    )
    watch()


def downgrade():
    """Drops the tables, with what is in them."""
    unwatch()
    for name in ("erasures", "revoked_tokens", "user_consents", "audit_names", "audit_log", "user_revisions"):
        op.drop_table(name)
