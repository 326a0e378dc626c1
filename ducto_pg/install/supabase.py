"""The migration files that `supabase db push` takes: the schema, the roles that may call it, the prices.

Each kind is a file of its own in `supabase/migrations`, and is written anew only where it says something else than the
newest file of its kind: a file that may have been pushed is never changed.
"""

import re
from datetime import UTC, datetime
from pathlib import Path

from ducto_pg.install.setup import Roles, _names, script
from ducto_pg.models import PricingConfigData

_GRANTS = """-- Who may call ducto_pg, besides Supabase's own roles. Run it where ducto_pg is set up.
select ducto_private.lock_setup();
select ducto_private.apply_grants({});
"""


def write_migrations(
    folder: Path,
    prices: PricingConfigData | None = None,
    label: str | None = None,
    *,
    grant_to: Roles = (),
    grant_admin_to: Roles = (),
    grant_read_to: Roles = (),
    revoke_from: Roles = (),
    lock_timeout: str = "5s",
) -> list[Path]:
    """Write what has changed and answer these files, in the order in which they run.

    `folder` is the one that holds `supabase/`. Without `prices` no prices are written, and without roles (those of
    `setup()`) no grants: the schema's file gives Supabase's own roles their rights. Raises OSError.
    """
    texts = {"schema": script(lock_timeout=lock_timeout)}
    roles = (grant_to, grant_admin_to, grant_read_to, revoke_from)
    if any(roles):
        texts["grants"] = _GRANTS.format(", ".join(map(_names, roles)))
    if prices:
        from ducto_pg.pricing.publish import compile_config

        texts["prices"] = compile_config(prices, label=label)

    target = folder / "supabase" / "migrations"
    target.mkdir(parents=True, exist_ok=True)
    present = {path.name: path for path in sorted(target.glob("*.sql")) if re.match(r"\d+_", path.name)}
    numbers = [int(name.partition("_")[0]) + 1 for name in present]
    number = max([int(f"{datetime.now(UTC):%Y%m%d%H%M%S}"), *numbers])
    written: list[Path] = []
    for kind, text in texts.items():
        name = f"ducto_pg_{kind}.sql"
        newest = [path for other, path in present.items() if other.partition("_")[2] == name][-1:]
        if [path.read_text("utf-8") for path in newest] != [text]:
            written.append(target / f"{number + len(written)}_{name}")
            written[-1].write_text(text, "utf-8", newline="\n")
    return written
