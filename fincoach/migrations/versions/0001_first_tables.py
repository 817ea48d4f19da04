"""The first tables, and the categories that every database starts with."""

import sqlalchemy as sa
from alembic import op

from fincoach.data.tables import Key, Moment

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# As they were when this revision was released: it must give the same rows for ever.
CATEGORIES = (
    (1, "salary", "income"),
    (2, "benefits", "income"),
    (3, "interest", "income"),
    (4, "other_income", "income"),
    (5, "rent", "essential"),
    (6, "utilities", "essential"),
    (7, "insurance", "essential"),
    (8, "groceries", "essential"),
    (9, "transport", "essential"),
    (10, "health", "essential"),
    (11, "education", "essential"),
    (12, "uncategorised", "discretionary"),
    (13, "dining", "discretionary"),
    (14, "shopping", "discretionary"),
    (15, "entertainment", "discretionary"),
    (16, "travel", "discretionary"),
    (17, "subscriptions", "discretionary"),
    (18, "personal_care", "discretionary"),
    (19, "gifts", "discretionary"),
    (20, "cash", "discretionary"),
    (21, "savings", "saving"),
    (22, "debt_payment", "debt"),
    (23, "fees", "fee"),
    (24, "transfer", "transfer"),
)
DROPS = ['recommendation_feedback', 'goal_contributions', 'user_segments', 'user_purchases', 'user_profiles', 'transactions', 'recommendation_history', 'financial_goals', 'users', 'products', 'categories']


def upgrade():
    """Creates each table after those it points to."""
    op.create_table(
        "categories",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.CheckConstraint("kind IN ('income', 'essential', 'discretionary', 'saving', 'debt', 'fee', 'transfer')", name=op.f("ck_categories_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_categories")),
        sa.UniqueConstraint("name", name=op.f("uq_categories_name")),
    )

    op.create_table(
        "products",
        sa.Column("id", Key, nullable=False),
        sa.Column("external_id", sa.String(128), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("department", sa.String(64)),
        sa.Column("brand", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_products")),
        sa.UniqueConstraint("external_id", name=op.f("uq_products_external_id")),
    )

    op.create_table(
        "users",
        sa.Column("id", Key, nullable=False),
        sa.Column("external_id", sa.String(128), nullable=False),
        sa.Column("timezone", sa.String(64), server_default="UTC", nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("external_id", name=op.f("uq_users_external_id")),
    )

    op.create_table(
        "financial_goals",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("target_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.Column("due_at", Moment()),
        sa.Column("closed_at", Moment()),
        sa.CheckConstraint("target_minor > 0", name=op.f("ck_financial_goals_target")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_financial_goals_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_financial_goals")),
    )
    op.create_index(op.f("ix_financial_goals_user_id"), "financial_goals", ["user_id"])

    op.create_table(
        "recommendation_history",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("decided_at", Moment(), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("category_id", sa.Integer()),
        sa.Column("amount_minor", sa.BigInteger()),
        sa.Column("message", sa.Text()),
        sa.Column("propensity", sa.Double(), nullable=False),
        sa.Column("state_hash", sa.String(64)),
        sa.Column("strategy", sa.String(32), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.CheckConstraint("propensity > 0 AND propensity <= 1", name=op.f("ck_recommendation_history_propensity")),
        sa.ForeignKeyConstraint(["category_id"], ["categories.id"], name=op.f("fk_recommendation_history_category_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_recommendation_history_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recommendation_history")),
    )
    op.create_index(op.f("ix_recommendation_history_user_id_decided_at"), "recommendation_history", ["user_id", "decided_at"])

    op.create_table(
        "transactions",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("occurred_at", Moment(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("category_id", sa.Integer(), nullable=False),
        sa.Column("merchant", sa.String(128)),
        sa.Column("account", sa.String(64)),
        sa.Column("external_id", sa.String(128)),
        sa.ForeignKeyConstraint(["category_id"], ["categories.id"], name=op.f("fk_transactions_category_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_transactions_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transactions")),
    )
    op.create_index(op.f("ix_transactions_user_id_occurred_at"), "transactions", ["user_id", "occurred_at"])
    op.create_index(
        "uq_transactions_external",
        "transactions",
        ["user_id", "account", "external_id"],
        unique=True,
        sqlite_where=sa.text("external_id IS NOT NULL"),
        postgresql_where=sa.text("external_id IS NOT NULL"),
    )

    op.create_table(
        "user_profiles",
        sa.Column("user_id", Key, nullable=False),
        sa.Column("birth_year", sa.Integer()),
        sa.Column("household_size", sa.Integer()),
        sa.Column("income_bracket", sa.String(32)),
        sa.Column("region", sa.String(64)),
        sa.Column("opening_balance_minor", sa.BigInteger()),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_user_profiles_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_user_profiles")),
    )

    op.create_table(
        "user_purchases",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("product_id", Key, nullable=False),
        sa.Column("purchased_at", Moment(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("discount_minor", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("basket", sa.String(64)),
        sa.ForeignKeyConstraint(["product_id"], ["products.id"], name=op.f("fk_user_purchases_product_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_user_purchases_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_user_purchases")),
    )
    op.create_index(op.f("ix_user_purchases_user_id_purchased_at"), "user_purchases", ["user_id", "purchased_at"])

    op.create_table(
        "user_segments",
        sa.Column("id", Key, nullable=False),
        sa.Column("user_id", Key, nullable=False),
        sa.Column("segment_id", sa.Integer(), nullable=False),
        sa.Column("segment_name", sa.String(64), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=False),
        sa.Column("features", sa.Text(), nullable=False),
        sa.Column("method", sa.String(16), nullable=False),
        sa.Column("model_version", sa.String(64), nullable=False),
        sa.Column("as_of", Moment(), nullable=False),
        sa.Column("created_at", Moment(), nullable=False),
        sa.Column("updated_at", Moment(), nullable=False),
        sa.CheckConstraint("method IN ('model', 'rules')", name=op.f("ck_user_segments_method")),
        sa.CheckConstraint("confidence >= 0 AND confidence <= 1", name=op.f("ck_user_segments_confidence")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_user_segments_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_user_segments")),
        sa.UniqueConstraint("user_id", name=op.f("uq_user_segments_user_id")),
    )
    op.create_index(op.f("ix_user_segments_segment_name"), "user_segments", ["segment_name"])

    op.create_table(
        "goal_contributions",
        sa.Column("id", Key, nullable=False),
        sa.Column("goal_id", Key, nullable=False),
        sa.Column("contributed_at", Moment(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["goal_id"], ["financial_goals.id"], name=op.f("fk_goal_contributions_goal_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_goal_contributions")),
    )
    op.create_index(op.f("ix_goal_contributions_goal_id"), "goal_contributions", ["goal_id"])

    op.create_table(
        "recommendation_feedback",
        sa.Column("id", Key, nullable=False),
        sa.Column("recommendation_id", Key, nullable=False),
        sa.Column("received_at", Moment(), nullable=False),
        sa.Column("response", sa.String(16), nullable=False),
        sa.Column("helpful", sa.Boolean()),
        sa.Column("comment", sa.Text()),
        sa.CheckConstraint("response IN ('accepted', 'dismissed', 'ignored', 'implemented')", name=op.f("ck_recommendation_feedback_response")),
        sa.ForeignKeyConstraint(["recommendation_id"], ["recommendation_history.id"], name=op.f("fk_recommendation_feedback_recommendation_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recommendation_feedback")),
    )
    op.create_index(op.f("ix_recommendation_feedback_recommendation_id"), "recommendation_feedback", ["recommendation_id"])

    categories = sa.table("categories", sa.column("id"), sa.column("name"), sa.column("kind"))
    op.bulk_insert(categories, [dict(zip(("id", "name", "kind"), row, strict=True)) for row in CATEGORIES])


def downgrade():
    """Drops all of them, with the rows in them; children first."""
    for name in DROPS:
        op.drop_table(name)
