"""Learning from new data: rounds of collecting, trainings, versions, quality.

The step `create_continuous_learning_tables`. Nothing in these tables is about one person.
"""

import sqlalchemy as sa
from alembic import op

from fincoach.data.tables import Moment

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade():
    """Creates each table after those it points to."""
    op.create_table(
        "training_datasets",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("dataset_type", sa.String(32), nullable=False),
        sa.Column("data_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("counted_to", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("threshold", sa.Integer(), nullable=False),
        sa.Column("last_training_date", Moment()),
        sa.Column("is_ready_for_training", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("threshold_reached", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("data_quality_score", sa.Double()),
        sa.Column("snapshot_hash", sa.String(64)),
        sa.Column("created_at", Moment(), nullable=False),
        sa.Column("updated_at", Moment(), nullable=False),
        sa.CheckConstraint("data_count >= 0", name=op.f("ck_training_datasets_data_count")),
        sa.CheckConstraint("data_quality_score >= 0 AND data_quality_score <= 1", name=op.f("ck_training_datasets_data_quality_score")),
        sa.CheckConstraint("dataset_type IN ('segmentation', 'recommendation', 'spending', 'goal')", name=op.f("ck_training_datasets_dataset_type")),
        sa.CheckConstraint("threshold > 0", name=op.f("ck_training_datasets_threshold")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_training_datasets")),
    )
    op.create_index(op.f("ix_training_datasets_dataset_type_created_at"), "training_datasets", ["dataset_type", "created_at"])
    op.create_index("uq_training_datasets_open", "training_datasets", ["dataset_type"], unique=True, sqlite_where=sa.text("snapshot_hash IS NULL"), postgresql_where=sa.text("snapshot_hash IS NULL"))

    op.create_table(
        "data_quality_metrics",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("training_dataset_id", sa.String(36), nullable=False),
        sa.Column("completeness_score", sa.Double()),
        sa.Column("consistency_score", sa.Double()),
        sa.Column("validity_score", sa.Double()),
        sa.Column("freshness_score", sa.Double()),
        sa.Column("diversity_score", sa.Double()),
        sa.Column("anomaly_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("duplicate_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("missing_values_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("assessment_date", Moment(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.CheckConstraint("anomaly_count >= 0", name=op.f("ck_data_quality_metrics_anomaly_count")),
        sa.CheckConstraint("completeness_score >= 0 AND completeness_score <= 1", name=op.f("ck_data_quality_metrics_completeness_score")),
        sa.CheckConstraint("consistency_score >= 0 AND consistency_score <= 1", name=op.f("ck_data_quality_metrics_consistency_score")),
        sa.CheckConstraint("diversity_score >= 0 AND diversity_score <= 1", name=op.f("ck_data_quality_metrics_diversity_score")),
        sa.CheckConstraint("duplicate_count >= 0", name=op.f("ck_data_quality_metrics_duplicate_count")),
        sa.CheckConstraint("freshness_score >= 0 AND freshness_score <= 1", name=op.f("ck_data_quality_metrics_freshness_score")),
        sa.CheckConstraint("missing_values_count >= 0", name=op.f("ck_data_quality_metrics_missing_values_count")),
        sa.CheckConstraint("validity_score >= 0 AND validity_score <= 1", name=op.f("ck_data_quality_metrics_validity_score")),
        sa.ForeignKeyConstraint(["training_dataset_id"], ["training_datasets.id"], name=op.f("fk_data_quality_metrics_training_dataset_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_data_quality_metrics")),
    )
    op.create_index(op.f("ix_data_quality_metrics_training_dataset_id_assessment_date"), "data_quality_metrics", ["training_dataset_id", "assessment_date"])

    op.create_table(
        "model_training_events",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("model_type", sa.String(64), nullable=False),
        sa.Column("training_dataset_id", sa.String(36)),
        sa.Column("start_time", Moment()),
        sa.Column("end_time", Moment()),
        sa.Column("status", sa.String(16), server_default="pending", nullable=False),
        sa.Column("priority", sa.Integer(), server_default="0", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("run_after", Moment()),
        sa.Column("leased_until", Moment()),
        sa.Column("error", sa.Text()),
        sa.Column("performance_metrics", sa.Text()),
        sa.Column("model_path", sa.String(512)),
        sa.Column("previous_model_path", sa.String(512)),
        sa.Column("training_data_size", sa.Integer()),
        sa.Column("validation_score", sa.Double()),
        sa.Column("deployment_approved", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_model_training_events_attempts")),
        sa.CheckConstraint("end_time >= start_time", name=op.f("ck_model_training_events_end_time")),
        sa.CheckConstraint("status IN ('pending', 'in_progress', 'completed', 'failed', 'deployed')", name=op.f("ck_model_training_events_status")),
        sa.CheckConstraint("training_data_size >= 0", name=op.f("ck_model_training_events_training_data_size")),
        sa.ForeignKeyConstraint(["training_dataset_id"], ["training_datasets.id"], name=op.f("fk_model_training_events_training_dataset_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_training_events")),
    )
    op.create_index(op.f("ix_model_training_events_model_type_start_time"), "model_training_events", ["model_type", "start_time"])
    op.create_index(op.f("ix_model_training_events_status_priority_created_at"), "model_training_events", ["status", "priority", "created_at"])
    op.create_index(op.f("ix_model_training_events_training_dataset_id"), "model_training_events", ["training_dataset_id"])
    op.create_index("uq_model_training_events_running", "model_training_events", ["model_type"], unique=True, sqlite_where=sa.text("status = 'in_progress'"), postgresql_where=sa.text("status = 'in_progress'"))

    op.create_table(
        "model_versions",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("model_type", sa.String(64), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("model_path", sa.String(512), nullable=False),
        sa.Column("training_event_id", sa.String(36)),
        sa.Column("is_active", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("performance_baseline", sa.Double()),
        sa.Column("performance_current", sa.Double()),
        sa.Column("deployment_date", Moment()),
        sa.Column("rollback_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("metadata", sa.Text()),
        sa.Column("created_at", Moment(), nullable=False),
        sa.CheckConstraint("rollback_count >= 0", name=op.f("ck_model_versions_rollback_count")),
        sa.ForeignKeyConstraint(["training_event_id"], ["model_training_events.id"], name=op.f("fk_model_versions_training_event_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_versions")),
        sa.UniqueConstraint("model_type", "version", name=op.f("uq_model_versions_model_type_version")),
    )
    op.create_index(op.f("ix_model_versions_model_type_deployment_date"), "model_versions", ["model_type", "deployment_date"])
    op.create_index(op.f("ix_model_versions_training_event_id"), "model_versions", ["training_event_id"])
    op.create_index("uq_model_versions_active", "model_versions", ["model_type"], unique=True, sqlite_where=sa.text("is_active"), postgresql_where=sa.text("is_active"))


def downgrade():
    """Drops them, with the rows in them; children first."""
    for name in ("model_versions", "model_training_events", "data_quality_metrics", "training_datasets"):
        op.drop_table(name)
