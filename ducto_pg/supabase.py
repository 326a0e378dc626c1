"""The migration files that `supabase db push` takes: the schema, the roles that may call it, the prices.

Each kind is a file of its own in `supabase/migrations`, and is written anew only where it says something else than the
newest file of its kind: a file that may have been pushed is never changed.
"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Unpack

from ducto_pg.install import Roles, SetupOptions, _names, script
from ducto_pg.models import PricingConfigData


def write_migrations(
    folder: Path, prices: PricingConfigData | None = None, label: str | None = None, **options: Unpack[SetupOptions]
) -> list[Path]:
    """Write what has changed and answer these files, in the order in which they run.

    `folder` is the one that holds `supabase/`. Without `prices` no prices are written, and without roles in the options
    (those of `setup()`) no grants: the schema's file gives Supabase's own roles their rights. Raises OSError.
    """
    texts = {"schema": script(lock_timeout=options.pop("lock_timeout", "5s"))}
    if any(options.values()):
        texts["grants"] = _grants(**options)
    if prices:
        from ducto_pg.pricing import compile_config

        texts["prices"] = compile_config(prices, label=label)

    target = folder / "supabase" / "migrations"
    target.mkdir(parents=True, exist_ok=True)
    present = sorted(target.glob("*.sql"))
    numbers = [int(number[0]) for path in present if (number := re.match(r"\d+(?=_)", path.name))]
    number = max([int(f"{datetime.now(UTC):%Y%m%d%H%M%S}"), *(last + 1 for last in numbers)])
    written = []
    for kind, text in texts.items():
        name = f"ducto_pg_{kind}.sql"
        newest = [path for path in present if re.fullmatch(rf"\d+_{name}", path.name)][-1:]
        if [path.read_text("utf-8") for path in newest] != [text]:
            path = target / f"{number + len(written)}_{name}"
            path.write_text(text, "utf-8", newline="\n")
            written.append(path)
    return written


def _grants(
    *, grant_to: Roles = (), grant_admin_to: Roles = (), grant_read_to: Roles = (), revoke_from: Roles = ()
) -> str:
    roles = ", ".join(map(_names, (grant_to, grant_admin_to, grant_read_to, revoke_from)))
    return (
        "-- Who may call ducto_pg, besides Supabase's own roles. Run it where ducto_pg is set up.\n"
        "select ducto_private.lock_setup();\n"
        f"select ducto_private.apply_grants({roles});\n"
    )
