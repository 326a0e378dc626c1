"""The command `ducto-pg`: results on standard output, problems in one line on standard error.

Exit code 0: done; 1: failed, or `verify` found something; 2: misused. Commands that need a database take it from
`--dsn`, else `DATABASE_URL`, else PostgreSQL's own `PG*` variables and service file. A pricing config is read from a
file, JSON or YAML, or with `-` from standard input.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from ducto_pg import __version__, exactjson
from ducto_pg.embedded import ServerError
from ducto_pg.errors import ConfigError, DuctoError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ducto_pg.client import CreditManager
    from ducto_pg.models import PricingConfigData, PricingConfigResult

Command = Callable[[argparse.Namespace], int | None]

_NOT_INSTALLED = (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedFunction)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code: 0 done, 1 failed, 2 misused."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        if sys.stdout is None:
            raise DuctoError("standard output is closed")
        code = command(arguments)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        # Whoever read has read enough; the interpreter must not try to write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (DuctoError, ServerError, psycopg.Error, OSError, UnicodeError) as error:
        hint = ""
        if isinstance(error, psycopg.OperationalError) and not error.sqlstate and command is not _quickstart:
            named = arguments.dsn is not None or os.environ.get("DATABASE_URL")
            hint = "" if named else "; DATABASE_URL is not set: set it, or give --dsn"
        elif isinstance(error, psycopg.errors.InsufficientPrivilege) and command in (_publish, _activate):
            hint = "; only the role that installed publishes"
        print(f"ducto-pg: {_describe(error)}{hint}", file=sys.stderr)
        return 1


def _describe(error: Exception) -> str:
    """One line."""
    if isinstance(error, _NOT_INSTALLED):
        return "this database does not have ducto_pg, or an older one: run ducto-pg setup"
    text = str(error)
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        text = "\n".join(filter(None, (error.diag.message_primary, error.diag.message_detail, error.diag.message_hint)))
    elif isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return "; ".join(filter(None, map(str.strip, text.splitlines()))) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ducto-pg", description="Credits inside your own PostgreSQL.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_install_options(_add(commands, "setup", _setup, dsn=True, json=True))
    _add_install_options(_add(commands, "sql", _sql))
    quickstart = _add(commands, "quickstart", _quickstart)
    quickstart.add_argument("--dsn", help="a database without ducto_pg, instead of a server that comes and goes")
    quickstart.add_argument("--trace", type=Path, metavar="FILE", help="a CSV: TIMESTAMP,ContextTokens,GeneratedTokens")
    quickstart.add_argument("--keep", action="store_true", help="leave the server up at the end, and say how to ask it")
    verify = _add(commands, "verify", _verify, dsn=True, json=True)
    verify.add_argument("--account", metavar="ID", help="only this account")

    pricing = commands.add_parser("pricing", help="check, publish and look at prices", description="Prices.")
    commands = pricing.add_subparsers(required=True, metavar="command")
    _add_config(_add(commands, "validate", _validate, json=True))
    _add_publish_options(_add(commands, "publish", _publish, dsn=True, json=True))
    _add(commands, "list", _list, dsn=True, json=True)
    activate = _add(commands, "activate", _activate, dsn=True, json=True)
    activate.add_argument("version", type=int, help="the number of a published version")
    diff = _add(commands, "diff", _diff, dsn=True, json=True)
    either = "a config, or the number of a published version, or `active`"
    diff.add_argument("old", nargs="?", default="active", help=f"{either} (which is the default)")
    diff.add_argument("new", help=either)
    export = _add(commands, "export", _export, dsn=True)
    export.add_argument("version", nargs="?", default="active", help="its number (default: the active one)")
    _add_publish_options(_add(commands, "compile", _compile))
    return parser


def _add(
    commands: Any, name: str, command: Command, *, dsn: bool = False, json: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
    parser.set_defaults(command=command)
    if dsn:
        parser.add_argument(
            "--dsn",
            help="the database (default: DATABASE_URL, else PG* and the service file); others on this machine see what "
            "stands here, so keep passwords out of it",
        )
    if json:
        parser.add_argument("--json", action="store_true", help="answer in JSON, for programs")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the config's file, JSON or YAML; - for standard input")


def _add_publish_options(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--label", help="a name for the version")
    parser.add_argument("--no-activate", dest="activate", action="store_false", help="only publish; activate it later")


_ROLES = {
    "grant_to": "may hold, charge and read",
    "grant_admin_to": "may make all calls but the owner's own",
    "grant_read_to": "may read the views of ducto_read",
    "revoke_from": "may do nothing of this any more",
}


def _add_install_options(parser: argparse.ArgumentParser) -> None:
    for name, meaning in _ROLES.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, action="append", default=[], metavar="ROLE", help=f"{meaning} (repeatable)")
    parser.add_argument("--lock-timeout", default="5s", metavar="TIME", help="how long to wait for tables in use (5s)")


def _install_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in (*_ROLES, "lock_timeout")}


# ----------------------------------------------------------------------------------------------------------------------
# Commands; their docstrings are their help


def _setup(arguments: argparse.Namespace) -> None:
    """install or upgrade ducto_pg in a database"""
    with _manager(arguments) as manager:
        result = manager.setup(**_install_options(arguments)).or_raise()
    if arguments.json:
        _print_json(result)
    else:
        tables, functions = result.tables_created, result.rpcs_created
        head = f"ducto_pg {__version__} installed: {len(tables)} tables, {len(functions)} functions"
        print("\n".join([head, *tables, *functions]) if tables or functions else "nothing to change")


def _sql(arguments: argparse.Namespace) -> None:
    """print what setup does as one SQL script, for any migration tool"""
    from ducto_pg.install import script

    print(script(**_install_options(arguments)), end="")


def _quickstart(arguments: argparse.Namespace) -> int:
    """charge a sample of real traffic, on a server that comes and goes, and check every digit"""
    from ducto_pg.install import check_dsn
    from ducto_pg.quickstart import run

    check_dsn(arguments.dsn or "", "--dsn")
    return 0 if run(dsn=arguments.dsn, trace=arguments.trace, keep=arguments.keep) else 1


def _verify(arguments: argparse.Namespace) -> int:
    """look for rules of the ledger that do not hold"""
    with _manager(arguments) as manager:
        violations = manager.verify_ledger(arguments.account)
        if arguments.account is not None and not violations and not manager.get_balance(arguments.account).revision:
            raise DuctoError(f"no such account: {arguments.account!r}")
    if arguments.json:
        _print_json(violations)
    elif violations:
        head = ("account", "invariant", "expected", "actual", "detail")
        print_table(head, ((v.account_id, v.invariant, v.expected, v.actual, v.detail) for v in violations))
    else:
        print("sound")
    return 1 if violations else 0


def _validate(arguments: argparse.Namespace) -> None:
    """check a pricing config without a database"""
    config = _load(arguments.config)
    if arguments.json:
        _print_json(config)
    else:
        print(f"{arguments.config}: sound (models: {len(config.models)}, plans: {len(config.plans or {})})")


def _publish(arguments: argparse.Namespace) -> None:
    """compile a pricing config into the database as its next version, and activate it"""
    config = _load(arguments.config)
    with _manager(arguments) as manager:
        result = manager.publish_pricing(config, label=arguments.label, activate=arguments.activate)
    _print_version(arguments, result, "published and active" if arguments.activate else "published, not activated")


def _list(arguments: argparse.Namespace) -> None:
    """list the published versions, newest first"""
    with _manager(arguments) as manager:
        history = manager.get_pricing_history()
    if arguments.json:
        _print_json(history)
    elif not history:
        print("no version is published yet")
    else:
        rows = ((v.version, "active" if v.active else "", v.created_at, v.label or "") for v in history)
        print_table(("version", "", "published", "label"), rows)


def _activate(arguments: argparse.Namespace) -> None:
    """make a published version the one that prices from now on"""
    with _manager(arguments) as manager:
        result = manager.activate_pricing(_number(arguments.version))
    _print_version(arguments, result, "active")


def _diff(arguments: argparse.Namespace) -> None:
    """say what changes from one config to another"""
    from ducto_pg.pricing import diff

    with _manager(arguments) as manager:
        old, new = (_config_of(manager, name) for name in (arguments.old, arguments.new))
    lines = diff(old, new)
    if arguments.json:
        print(exactjson.dumps(lines))
    else:
        print("\n".join(lines) or "no difference")


def _export(arguments: argparse.Namespace) -> None:
    """print the config of a published version, as JSON"""
    with _manager(arguments) as manager:
        config = _published(manager, arguments.version)
    print(_indented(config.model_dump(exclude_none=True)))


def _compile(arguments: argparse.Namespace) -> None:
    """print a pricing config as SQL that publishes it without Python"""
    from ducto_pg.pricing import compile_config

    print(compile_config(_load(arguments.config), label=arguments.label, activate=arguments.activate), end="")


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing


def _manager(arguments: argparse.Namespace) -> "CreditManager":
    from ducto_pg.client import CreditManager
    from ducto_pg.install import check_dsn

    given: str | None = arguments.dsn
    dsn = os.environ.get("DATABASE_URL", "") if given is None else given
    check_dsn(dsn, "DATABASE_URL" if given is None else "--dsn")
    return CreditManager(dsn)


def _load(file: str) -> "PricingConfigData":
    from ducto_pg.config import load

    try:
        if file == "-" and sys.stdin is None:
            raise DuctoError("standard input is closed")
        return load(sys.stdin.buffer.read() if file == "-" else Path(file))
    except ConfigError as error:
        raise DuctoError(f"{file}: {error}") from error


def _config_of(manager: "CreditManager", name: str) -> "PricingConfigData":
    return _published(manager, name) if name == "active" or name.isdecimal() else _load(name)


def _published(manager: "CreditManager", name: str) -> "PricingConfigData":
    if name != "active" and not name.isdecimal():
        raise DuctoError(f"a version is a number or `active`, not {name!r}")
    result = manager.get_active_pricing() if name == "active" else manager.get_pricing_config(_number(int(name)))
    if result is None:
        raise DuctoError("no pricing version is active yet")
    return result.config


def _number(version: int) -> int:
    if version >= 2**31:
        raise DuctoError(f"there is no pricing version {version}")
    return version


def _print_version(arguments: argparse.Namespace, result: "PricingConfigResult", what: str) -> None:
    if arguments.json:
        _print_json(result)
    else:
        print(f"version {result.version} {what}")


def _print_json(answer: "BaseModel | Sequence[BaseModel]") -> None:
    rows = [row.model_dump() for row in answer] if isinstance(answer, Sequence) else answer.model_dump()
    print(exactjson.dumps(rows))


def print_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Columns for people: numbers to the right, all else to the left."""
    table = [head, *rows]
    widths = [max(len(str(row[column])) for row in table) for column in range(len(head))]
    for row in table:
        cells = (
            f"{cell:>{width}}" if isinstance(cell, int) else f"{cell!s:<{width}}"
            for cell, width in zip(row, widths, strict=True)
        )
        print("  ".join(cells).rstrip())


def _indented(value: object, indent: str = "\n") -> str:
    """JSON with a line per key, for people."""
    if not isinstance(value, dict) or not value:
        return exactjson.dumps(value)
    inner = indent + "  "
    lines = (f"{inner}{exactjson.dumps(key)}: {_indented(item, inner)}" for key, item in value.items())
    return "{" + ",".join(lines) + indent + "}"


if __name__ == "__main__":
    sys.exit(main())
