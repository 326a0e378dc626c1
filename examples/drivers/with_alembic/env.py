"""What `alembic upgrade` runs: all migrations in one transaction."""

from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

# Over psycopg 3, which ducto_pg itself uses; libpq takes the rest from its PG… variables.
engine = create_engine("postgresql+psycopg://", poolclass=NullPool)

with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
