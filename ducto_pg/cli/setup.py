"""Commands that bring ducto_pg into a database, or to a server of its own."""

import argparse
from pathlib import Path
from typing import Any

from ducto_pg import __version__
from ducto_pg.cli.common import add_command, load_config, manager_of
from ducto_pg.cli.tables import print_json
from ducto_pg.install.setup import check_dsn

_ROLES = {
    "grant_to": "may hold, charge and read",
    "grant_admin_to": "may make all calls but the owner's own",
    "grant_read_to": "may read the views of ducto_read",
    "revoke_from": "may do nothing of this any more",
}


def add(commands: Any) -> None:
    """`setup`, `sql`, `quickstart`, `supabase init`."""
    _add_install_options(add_command(commands, "setup", setup_database, dsn=True, json=True))
    _add_install_options(add_command(commands, "sql", _sql))
    parser = add_command(commands, "quickstart", quickstart)
    parser.add_argument("--dsn", help="a database without ducto_pg, instead of a server that comes and goes")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a CSV: TIMESTAMP,ContextTokens,GeneratedTokens")
    parser.add_argument("--keep", action="store_true", help="leave the server up at the end, and say how to ask it")
    group = commands.add_parser("supabase", help="init").add_subparsers(required=True, metavar="command")
    init = add_command(group, "init", _supabase_init)
    init.add_argument("--prices", metavar="CONFIG", help="a pricing config, JSON or YAML; - for standard input")
    init.add_argument("--label", help="a name for the version of the prices")
    init.add_argument("--folder", type=Path, default=Path(), help="the one that holds supabase/ (default: this one)")
    _add_install_options(init)


def _add_install_options(parser: argparse.ArgumentParser) -> None:
    for name, meaning in _ROLES.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, action="append", default=[], metavar="ROLE", help=f"{meaning} (repeatable)")
    parser.add_argument("--lock-timeout", default="5s", metavar="TIME", help="how long to wait for tables in use (5s)")


def _install_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in (*_ROLES, "lock_timeout")}


def setup_database(arguments: argparse.Namespace) -> None:
    """install or upgrade ducto_pg in a database"""
    with manager_of(arguments) as manager:
        result = manager.setup(**_install_options(arguments)).or_raise()
    if arguments.json:
        print_json(result)
    else:
        changes = [f"repaired: {name}" for name in result.repaired]
        if not changes and (result.tables_created or result.rpcs_created):
            made = f"{len(result.tables_created)} tables and views, {len(result.rpcs_created)} RPCs"
            changes = [f"ducto_pg {__version__} installed: {made}"]
        changes += ["rights set"] if any(getattr(arguments, option) for option in _ROLES) else []
        print("\n".join(changes) or "nothing to change")


def _sql(arguments: argparse.Namespace) -> None:
    """print what setup does as one SQL script, for any migration tool"""
    from ducto_pg.install.setup import script

    print(script(**_install_options(arguments)), end="")


def quickstart(arguments: argparse.Namespace) -> int:
    """charge a sample of real traffic, on a server that comes and goes, and check every digit"""
    from ducto_pg.quickstart import run

    check_dsn(arguments.dsn or "", "--dsn")
    return 0 if run(dsn=arguments.dsn, trace=arguments.trace, keep=arguments.keep) else 1


def _supabase_init(arguments: argparse.Namespace) -> None:
    """write what setup and publish do as migrations for `supabase db push`; again, only what has changed"""
    from ducto_pg.install.supabase import write_migrations

    prices = load_config(arguments.prices) if arguments.prices else None
    written = write_migrations(arguments.folder, prices, arguments.label, **_install_options(arguments))
    print("\n".join(map(str, written)) or "nothing to change")
