"""What people do, and what models said: events, sessions, decisions, cached answers, measured performance.

The step `create_behavioral_tables`. `user_segments` belongs to 0001 and stays as it is, with its rows, up and down.
"""

import sqlalchemy as sa
from alembic import op

from fincoach.data.tables import Key, Moment

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade():
    """Creates each table after those it points to."""
    op.create_table(
        "model_performance",
        sa.Column("id", Key, nullable=False),
        sa.Column("model_name", sa.String(64), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("metric", sa.String(64), nullable=False),
        sa.Column("accuracy_metric", sa.Double(), nullable=False),
        sa.Column("sample_count", sa.Integer(), nullable=False),
        sa.Column("feature_importance", sa.Text()),
        sa.Column("created_at", Moment(), nullable=False),
        sa.CheckConstraint("sample_count >= 0", name=op.f("ck_model_performance_sample_count")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_performance")),
    )
    op.create_index("idx_model_performance_name_created", "model_performance", ["model_name", "created_at"])

    op.create_table(
        "behavioral_events",
        sa.Column("id", Key, nullable=False),
        sa.Column("event_id", sa.String(64), nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("event_type", sa.String(50), nullable=False),
        sa.Column("event_data", sa.Text(), server_default="{}", nullable=False),
        sa.Column("session_id", sa.String(100)),
        sa.Column("context", sa.Text()),
        sa.Column("timestamp", Moment(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.CheckConstraint("event_id <> ''", name=op.f("ck_behavioral_events_event_id")),
        sa.CheckConstraint("event_type <> ''", name=op.f("ck_behavioral_events_event_type")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_behavioral_events_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_behavioral_events")),
        sa.UniqueConstraint("user_id", "event_id", name=op.f("uq_behavioral_events_user_id_event_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("idx_behavioral_events_event_type", "behavioral_events", ["event_type", "timestamp"])
    op.create_index("idx_behavioral_events_timestamp", "behavioral_events", ["timestamp"])
    op.create_index("idx_behavioral_events_user_id", "behavioral_events", ["user_id", "timestamp"])
    op.create_index("idx_behavioral_events_user_type_time", "behavioral_events", ["user_id", "event_type", "timestamp"])

    op.create_table(
        "financial_decisions",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("decision_type", sa.String(50), nullable=False),
        sa.Column("amount_minor", sa.BigInteger()),
        sa.Column("currency", sa.String(3)),
        sa.Column("category_id", sa.Integer()),
        sa.Column("context", sa.Text()),
        sa.Column("outcome", sa.String(20)),
        sa.Column("outcome_at", Moment()),
        sa.Column("timestamp", Moment(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.CheckConstraint("(amount_minor IS NULL) = (currency IS NULL)", name=op.f("ck_financial_decisions_currency")),
        sa.CheckConstraint("decision_type <> ''", name=op.f("ck_financial_decisions_decision_type")),
        sa.CheckConstraint("outcome IN ('success', 'failure', 'partial')", name=op.f("ck_financial_decisions_outcome")),
        sa.CheckConstraint("(outcome IS NULL) = (outcome_at IS NULL)", name=op.f("ck_financial_decisions_outcome_at")),
        sa.ForeignKeyConstraint(["category_id"], ["categories.id"], name=op.f("fk_financial_decisions_category_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_financial_decisions_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_financial_decisions")),
    )
    op.create_index(op.f("ix_financial_decisions_decision_type_timestamp"), "financial_decisions", ["decision_type", "timestamp"])
    op.create_index(op.f("ix_financial_decisions_user_id_timestamp"), "financial_decisions", ["user_id", "timestamp"])

    op.create_table(
        "prediction_cache",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("prediction_type", sa.String(50), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False),
        sa.Column("segment_id", sa.Integer(), server_default="-1", nullable=False),
        sa.Column("as_of", Moment(), nullable=False),
        sa.Column("feature_version", sa.String(64), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("prediction_data", sa.Text(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.Column("expires_at", Moment(), nullable=False),
        sa.CheckConstraint("expires_at > created_at", name=op.f("ck_prediction_cache_expires_at")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_prediction_cache_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prediction_cache")),
    )
    op.create_index("idx_prediction_cache_expires_at", "prediction_cache", ["expires_at"])
    op.create_index("idx_prediction_cache_user_type", "prediction_cache", ["user_id", "prediction_type", "subject", "segment_id", "as_of", "feature_version", "model_version"], unique=True)

    op.create_table(
        "user_sessions",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("session_id", sa.String(100), nullable=False),
        sa.Column("start_time", Moment(), nullable=False),
        sa.Column("end_time", Moment()),
        sa.Column("actions_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("pages_visited", sa.Text(), server_default="[]", nullable=False),
        sa.CheckConstraint("actions_count >= 0", name=op.f("ck_user_sessions_actions_count")),
        sa.CheckConstraint("end_time >= start_time", name=op.f("ck_user_sessions_end_time")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_user_sessions_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_user_sessions")),
        sa.UniqueConstraint("user_id", "session_id", name=op.f("uq_user_sessions_user_id_session_id")),
    )
    op.create_index(op.f("ix_user_sessions_user_id_start_time"), "user_sessions", ["user_id", "start_time"])


def downgrade():
    """Drops them, with the rows in them; children first."""
    for name in ("user_sessions", "prediction_cache", "financial_decisions", "behavioral_events", "model_performance"):
        op.drop_table(name)
