"""Install ducto_pg and publish the first prices.

A later release of ducto_pg, or new prices, is a migration with the same calls: what is there already is left alone.
"""

from pathlib import Path
from typing import Any

from django.db import migrations

import ducto_pg

PRICES = Path(__file__).parents[4] / "prices.yaml"


def install(apps: Any, schema_editor: Any) -> None:
    """Both run in the migration's transaction and never commit it."""
    conn = schema_editor.connection.connection
    ducto_pg.setup(conn).or_raise()
    ducto_pg.CreditManager(conn).publish_pricing(PRICES, label="first")


class Migration(migrations.Migration):
    operations = (migrations.RunPython(install, migrations.RunPython.noop),)
