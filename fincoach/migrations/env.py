"""What Alembic runs: the changes, on the connection it was handed, in that connection's transaction.

The connection comes from `fincoach.data.database`, which has already begun the transaction, so that a change that is
killed half way leaves the tables as they were, on SQLite too.
"""

from alembic import context

from fincoach.data.tables import Base

VERSION_TABLE = "fincoach_version"


def include_name(name, kind, parents):
    """Compares FinCoach's own tables only: a database may hold others."""
    return kind != "table" or name in Base.metadata.tables


connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("FinCoach's migrations run through `fincoach db` or fincoach.data.database.upgrade(engine)")
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=connection.dialect.name == "sqlite",
    transactional_ddl=True,
    compare_type=True,
    compare_server_default=True,
    include_name=include_name,
)
context.run_migrations()
