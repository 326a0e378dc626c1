"""Install ducto_pg and publish the first prices.

A later release of ducto_pg, or new prices, is a migration with the same calls: what is there already is left alone.
"""

from pathlib import Path
from typing import Any

from alembic import op

import ducto_pg

revision = "0001"
down_revision = None

PRICES = Path(__file__).parents[3] / "prices.yaml"


def upgrade() -> None:
    """Both run in Alembic's transaction and never commit it."""
    bind = op.get_bind()
    ducto_pg.setup(bind).or_raise()
    conn: Any = bind.connection.driver_connection  # psycopg's own
    ducto_pg.CreditManager(conn).publish_pricing(PRICES, label="first")


def downgrade() -> None:
    """The ledger outlives a migration taken back."""
