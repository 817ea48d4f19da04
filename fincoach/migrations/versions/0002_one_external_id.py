"""A bank's number counts once in transactions without an account too.

`uq_transactions_external` lets the same number in twice where the account is null, as SQL takes two nulls for different.
"""

import sqlalchemy as sa
from alembic import op

from fincoach.data.database import DatabaseError

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ALONE = "external_id IS NOT NULL AND account IS NULL"
GROUPS = f"SELECT user_id, external_id, count(*) AS found, min(id) AS first FROM transactions WHERE {ALONE} GROUP BY user_id, external_id"
ADVICE = """\
transactions holds {surplus} rows without an account whose bank number an earlier row of the same person has too ({some}). \
Nothing was changed. Look at them, mend them in one of two ways, then run this again:
(1) they are the same booking, imported twice. Keep the first of each:
    DELETE FROM transactions WHERE {alone} AND id NOT IN (SELECT first FROM ({groups}) AS firsts);
(2) they are bookings of different accounts. Say of which, for the rows of each account:
    UPDATE transactions SET account = 'name of the account' WHERE id IN (1, 2, 3);
To see them: {groups} HAVING count(*) > 1;"""


def upgrade():
    """Adds the index; stops, and says what to do, where rows of an older revision would break it."""
    surplus, people = op.get_bind().execute(sa.text(f"SELECT coalesce(sum(found - 1), 0), count(*) FROM ({GROUPS} HAVING count(*) > 1) AS twice")).one()
    if people:
        rows = op.get_bind().execute(sa.text(f"{GROUPS} HAVING count(*) > 1 ORDER BY first LIMIT 3"))
        some = "; ".join(f"user_id {r.user_id}, external_id {r.external_id!r}: {r.found} rows, the first has id {r.first}" for r in rows)
        raise DatabaseError(ADVICE.format(surplus=surplus, some=some, alone=ALONE, groups=GROUPS))
    op.create_index(
        "uq_transactions_external_alone",
        "transactions",
        ["user_id", "external_id"],
        unique=True,
        sqlite_where=sa.text(ALONE),
        postgresql_where=sa.text(ALONE),
    )


def downgrade():
    """Drops the index."""
    op.drop_index("uq_transactions_external_alone", "transactions")
