"""Decisions in two draws, and what helped whom: how a strategy was drawn, and the counts that the bandit learns from.

The step `create_recommendation_tables`. The rows of `recommendation_history` stay as they are; what is new is null in them.
"""

import sqlalchemy as sa
from alembic import op

from fincoach.data.tables import Key, Moment

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ADDS = (
    ("segment_id", sa.Integer(), ""),
    ("strategy_propensity", sa.Double(), "strategy_propensity > 0 AND strategy_propensity <= 1"),
    ("urgency", sa.String(8), "urgency IN ('low', 'normal', 'high')"),
    ("served_by", sa.String(16), ""),
    ("request_id", sa.String(64), ""),
)


def upgrade():
    """Adds the columns, then creates the tables."""
    for name, kind, rule in ADDS:  # SQLite takes a check with the column, and not afterwards
        checked = f" CONSTRAINT ck_recommendation_history_{name} CHECK ({rule})" if rule else ""
        op.execute(f"ALTER TABLE recommendation_history ADD COLUMN {name} {kind.compile(op.get_bind().dialect)}{checked}")
    op.create_index("uq_recommendation_history_request", "recommendation_history", ["user_id", "request_id"], unique=True, sqlite_where=sa.text("request_id IS NOT NULL"), postgresql_where=sa.text("request_id IS NOT NULL"))

    op.create_table(
        "bandit_counts",
        sa.Column("segment_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("strategy", sa.String(32), nullable=False),
        sa.Column("week", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("decisions", sa.BigInteger(), nullable=False),
        sa.Column("reward_millionths", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("decisions >= 0", name=op.f("ck_bandit_counts_decisions")),
        sa.CheckConstraint("reward_millionths >= 0 AND reward_millionths <= 1000000 * decisions", name=op.f("ck_bandit_counts_reward_millionths")),
        sa.PrimaryKeyConstraint("segment_id", "strategy", "week", name=op.f("pk_bandit_counts")),
    )
    op.create_table(
        "bandit_updates",
        sa.Column("recommendation_id", Key, autoincrement=False, nullable=False),
        sa.Column("reward_millionths", sa.BigInteger(), nullable=False),
        sa.Column("received_at", Moment(), nullable=False),
        sa.CheckConstraint("reward_millionths >= 0 AND reward_millionths <= 1000000", name=op.f("ck_bandit_updates_reward_millionths")),
        sa.ForeignKeyConstraint(["recommendation_id"], ["recommendation_history.id"], name=op.f("fk_bandit_updates_recommendation_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("recommendation_id", name=op.f("pk_bandit_updates")),
    )


def downgrade():
    """Drops the tables and the columns, with what is in them."""
    op.drop_table("bandit_updates")
    op.drop_table("bandit_counts")
    op.drop_index("uq_recommendation_history_request", "recommendation_history")
    for name, *_ in reversed(ADDS):
        op.drop_column("recommendation_history", name)
