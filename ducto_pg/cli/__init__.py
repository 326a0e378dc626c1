"""The command `ducto-pg`: results on standard output, problems in one line on standard error.

Exit code 0: done; 1: failed, or `verify` found something; 2: misused. Commands that need a database take it from
`--dsn`, else `DATABASE_URL`, else PostgreSQL's own `PG*` variables and service file. A pricing config is read from a
file, JSON or YAML, or with `-` from standard input.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import psycopg

from ducto_pg import __version__, exactjson
from ducto_pg.cli.tables import Told, print_answer, print_json
from ducto_pg.client.calls import Calls, Parameter, Rpc
from ducto_pg.client.manager import CreditManager
from ducto_pg.embedded import ServerError
from ducto_pg.errors import ConfigError, DuctoError, NotInstalledError
from ducto_pg.install.setup import check_dsn
from ducto_pg.models import Answer, PricingConfigData, PricingConfigResult, SweepResult

Command = Callable[[argparse.Namespace], int | None]

# Commands that are one call each: the call, what it must be told, and what it may.
ASKING = {
    "balance": "get_balance user_id --at",
    "credit add": "add_credits user_id amount --type --expires-at --reference --idempotency-key",
    "credit remove": "remove_credits user_id amount --transaction-id --reason --idempotency-key",
    "credit refund": "refund_credits transaction_id --amount --reason --idempotency-key",
    "credit limit": "set_credit_limit user_id limit",
    "credit list": "list_transactions user_id --limit --before --type --from --to",
    "plan set": "set_user_plan user_id plan_id",
    "plan remove": "set_user_plan user_id",
    "plan show": "get_user_plan user_id",
    "plan allowance": "check_allowance user_id",
    "plan feature": "check_feature user_id feature",
    "cap set": "set_spend_cap user_id limit --cap-type --model --action",
    "cap remove": "remove_spend_cap user_id cap_type --model",
    "cap list": "list_spend_caps user_id",
    "cap check": "check_spend_cap user_id --model --amount",
    "team create": "create_team name --team-id --initial-balance --idempotency-key",
    "team show": "get_team team_id",
    "team add": "add_team_member team_id user_id --role --spend-cap --spend-cap-period",
    "team remove": "remove_team_member team_id user_id",
    "team members": "get_team_members team_id",
    "stats total": "aggregate_stats --start --end",
    "stats users": "spend_by_user --start --end",
    "stats models": "spend_by_model --start --end",
    "stats days": "daily_spend --start --end",
    "stats top": "top_users --limit --start --end",
    "stats rollup": "rollup_usage",
    "events fetch": "fetch_events --limit --lease-seconds",
    "events ack": "ack_events ids",
    "pricing list": "get_pricing_history",
}
_TIME = "an ISO 8601 time, in UTC if it has no offset"
_MEANINGS = {
    "user_id": "the id of an account: yours of a user, or a team's",
    "team_id": "the team's id",
    "transaction_id": "the id of a row of the ledger",
    "amount": "whole credits",
    "idempotency_key": "an id of yours for this request: once more, nothing happens twice",
    "plan_id": "a plan of the active version",
    "cap_type": "daily or monthly",
    "action": "deny, warn or notify",
    "spend_cap": "whole credits",
    "spend_cap_period": "lifetime, daily or monthly",
    "before": "the last seq seen",
    "ids": "of events that were dealt with",
    **dict.fromkeys(("at", "from", "to", "start", "end", "expires_at"), _TIME),
}
_COLUMNS = {
    "list_transactions": (
        "seq",
        "type",
        "amount",
        "allowance_used",
        "balance_after",
        "cost",
        "model",
        "created_at",
        "transaction_id",
    ),
    "get_pricing_history": ("version", "active", "created_at", "label"),
}


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
        elif isinstance(error, psycopg.errors.InsufficientPrivilege) and command in (_publish, _activate, _unschedule):
            hint = "; only the role that installed publishes"
        print(f"ducto-pg: {_describe(error)}{hint}", file=sys.stderr)
        return 1


def _describe(error: Exception) -> str:
    """One line."""
    if isinstance(error, NotInstalledError):
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
    sweep = _add(commands, "sweep", _sweep, dsn=True, json=True)
    sweep.add_argument("--dry-run", action="store_true", help="only count")
    sweep.add_argument("--limit", type=int, default=1000, help="accounts in each transaction (1000)")

    groups = {"": commands}
    for name, asked in ASKING.items():
        group, _, own_name = name.rpartition(" ")
        if group not in groups:
            names = [other.split()[1] for other in ASKING if other.startswith(f"{group} ")]
            text = "check, publish and look at prices" if group == "pricing" else ", ".join(names)
            groups[group] = commands.add_parser(group, help=text).add_subparsers(required=True, metavar="command")
        _add_asking(groups[group], own_name, *asked.split())
    commands = groups["pricing"]
    _add_config(_add(commands, "validate", _validate, json=True))
    publish = _add(commands, "publish", _publish, dsn=True, json=True)
    _add_publish_options(publish)
    _add_at(publish)
    activate = _add(commands, "activate", _activate, dsn=True, json=True)
    activate.add_argument("version", type=int, help="the number of a published version")
    _add_at(activate)
    unschedule = _add(commands, "unschedule", _unschedule, dsn=True, json=True)
    unschedule.add_argument("version", type=int, help="the number of a version that is to be active later")
    diff = _add(commands, "diff", _diff, dsn=True, json=True)
    either = "a config, or the number of a published version, or `active`"
    diff.add_argument("old", nargs="?", default="active", help=f"{either} (which is the default)")
    diff.add_argument("new", help=either)
    export = _add(commands, "export", _export, dsn=True)
    export.add_argument("version", nargs="?", default="active", help="its number (default: the active one)")
    _add_publish_options(_add(commands, "compile", _compile))
    commands = groups[""].add_parser("supabase", help="init").add_subparsers(required=True, metavar="command")
    _add_supabase_options(_add(commands, "init", _supabase_init))
    return parser


def _add(
    commands: Any, name: str, command: Command, *, dsn: bool = False, json: bool = False, doc: str | None = None
) -> argparse.ArgumentParser:
    doc = doc or command.__doc__ or ""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=doc.partition("\n")[0], description=doc)
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


def _add_asking(commands: Any, name: str, call: str, *told: str) -> None:
    rpc: Rpc[..., Told] = getattr(Calls, call)
    parser = _add(commands, name, _ask, dsn=True, json=True, doc=inspect.getdoc(rpc))
    parser.set_defaults(rpc=rpc)
    parameters = {parameter.name.rstrip("_"): parameter for parameter in rpc.parameters}
    for argument in told:
        parameter = parameters[argument.removeprefix("--").replace("-", "_")]
        options: dict[str, Any] = {"type": _reader(parameter), "metavar": argument.removeprefix("--").upper()}
        if parameter.sql_type == "text[]":
            options["nargs"] = "+"
        meaning = _MEANINGS.get(parameter.name.rstrip("_"), "")
        if argument.startswith("--"):
            options["dest"] = parameter.name
            meaning += f" (default: {parameter.default})" if parameter.default else ""
        options["help"] = meaning.strip() or None
        parser.add_argument(argument, **options)


def _reader(parameter: Parameter) -> Callable[[str], object]:
    readers: dict[str, Callable[[str], object]] = {"bigint": int, "integer": int, "timestamptz": _time}
    return readers.get(parameter.sql_type, str)


def _time(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no ISO 8601 time, such as 2026-01-31T12:00+01:00") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _add_at(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at", type=_time, metavar="TIME", help=f"active from then on, not from now: {_TIME}")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the config's file, JSON or YAML; - for standard input")


def _add_publish_options(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--label", help="a name for the version")
    parser.add_argument("--no-activate", dest="activate", action="store_false", help="only publish; activate it later")


def _add_supabase_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prices", metavar="CONFIG", help="a pricing config, JSON or YAML; - for standard input")
    parser.add_argument("--label", help="a name for the version of the prices")
    parser.add_argument("--folder", type=Path, default=Path(), help="the one that holds supabase/ (default: this one)")
    _add_install_options(parser)


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
        print_json(result)
    else:
        tables, functions = len(result.tables_created), len(result.rpcs_created)
        changes = [f"ducto_pg {__version__} installed: {tables} tables and {functions} functions"]
        changes = changes if tables or functions else []
        changes += [f"repaired: {name}" for name in result.repaired]
        changes += ["rights set"] if any(getattr(arguments, option) for option in _ROLES) else []
        print("\n".join(changes) or "nothing to change")


def _sql(arguments: argparse.Namespace) -> None:
    """print what setup does as one SQL script, for any migration tool"""
    from ducto_pg.install.setup import script

    print(script(**_install_options(arguments)), end="")


def _quickstart(arguments: argparse.Namespace) -> int:
    """charge a sample of real traffic, on a server that comes and goes, and check every digit"""
    from ducto_pg.quickstart import run

    check_dsn(arguments.dsn or "", "--dsn")
    return 0 if run(dsn=arguments.dsn, trace=arguments.trace, keep=arguments.keep) else 1


def _ask(arguments: argparse.Namespace) -> None:
    rpc: Rpc[..., Told] = arguments.rpc
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    with _manager(arguments) as manager:
        answer = manager.run(rpc.bind(**{name: given[name] for name in given.keys() & rpc.signature.parameters.keys()}))
    if arguments.json:
        print_json(answer)
    if isinstance(answer, Answer):
        answer.or_raise()
    if not arguments.json:
        print_answer(answer, _COLUMNS.get(rpc.name, ()))


def _sweep(arguments: argparse.Namespace) -> None:
    """write down which credits have expired, some accounts in each transaction, until none is left"""
    total = SweepResult(dry_run=arguments.dry_run)
    with _manager(arguments) as manager:
        while (swept := manager.sweep_expired_credits(arguments.dry_run, arguments.limit)).expired_count:
            total.expired_count += swept.expired_count
            total.expired_amount += swept.expired_amount
            if arguments.dry_run:
                break
    (print_json if arguments.json else print_answer)(total)


def _verify(arguments: argparse.Namespace) -> int:
    """look for rules of the ledger that do not hold"""
    with _manager(arguments) as manager:
        violations = manager.verify_ledger(arguments.account)
        if arguments.account is not None and not violations and not manager.get_balance(arguments.account).revision:
            raise DuctoError(f"no such account: {arguments.account!r}")
    if arguments.json:
        print_json(violations)
    elif violations:
        print_answer(violations)
    else:
        print("sound")
    return 1 if violations else 0


def _validate(arguments: argparse.Namespace) -> None:
    """check a pricing config without a database"""
    config = _load(arguments.config)
    if arguments.json:
        print_json(config)
    else:
        print(f"{arguments.config}: sound (models: {len(config.models)}, plans: {len(config.plans or {})})")


def _publish(arguments: argparse.Namespace) -> None:
    """compile a pricing config into the database as its next version, and activate it"""
    config = _load(arguments.config)
    with _manager(arguments) as manager:
        result = manager.publish_pricing(config, label=arguments.label, activate=arguments.activate, at=arguments.at)
    active = f"published, {_active(arguments)}" if arguments.at else "published and active"
    _print_version(arguments, result, active if arguments.activate else "published, not activated")


def _activate(arguments: argparse.Namespace) -> None:
    """make a published version the one that prices from now on"""
    with _manager(arguments) as manager:
        result = manager.activate_pricing(_number(arguments.version), at=arguments.at)
    _print_version(arguments, result, _active(arguments))


def _unschedule(arguments: argparse.Namespace) -> None:
    """take back an activation whose time has not come yet"""
    with _manager(arguments) as manager:
        result = manager.unschedule_pricing(_number(arguments.version))
    _print_version(arguments, result, "not scheduled any more")


def _diff(arguments: argparse.Namespace) -> None:
    """say what changes from one config to another"""
    from ducto_pg.pricing.publish import diff

    lines = diff(_config_of(arguments, arguments.old), _config_of(arguments, arguments.new))
    if arguments.json:
        print(exactjson.dumps(lines))
    else:
        print("\n".join(lines) or "no difference")


def _export(arguments: argparse.Namespace) -> None:
    """print the config of a published version, as JSON"""
    print(_indented(_published(arguments, arguments.version).model_dump(exclude_none=True)))


def _compile(arguments: argparse.Namespace) -> None:
    """print a pricing config as SQL that publishes it without Python"""
    from ducto_pg.pricing.publish import compile_config

    print(compile_config(_load(arguments.config), label=arguments.label, activate=arguments.activate), end="")


def _supabase_init(arguments: argparse.Namespace) -> None:
    """write what setup and publish do as migrations for `supabase db push`; again, only what has changed"""
    from ducto_pg.install.supabase import write_migrations

    prices = _load(arguments.prices) if arguments.prices else None
    written = write_migrations(arguments.folder, prices, arguments.label, **_install_options(arguments))
    print("\n".join(map(str, written)) or "nothing to change")


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing


@contextmanager
def _manager(arguments: argparse.Namespace) -> Iterator[CreditManager]:
    """Each call is a transaction of its own; what the database remarks goes to standard error."""

    def remark(notice: psycopg.errors.Diagnostic) -> None:
        print("ducto-pg:", "; ".join(filter(None, (notice.message_primary, notice.message_hint))), file=sys.stderr)

    given: str | None = arguments.dsn
    dsn = os.environ.get("DATABASE_URL", "") if given is None else given
    check_dsn(dsn, "DATABASE_URL" if given is None else "--dsn")
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.add_notice_handler(remark)
        yield CreditManager(conn)


def _load(file: str) -> PricingConfigData:
    from ducto_pg.pricing.config import load

    try:
        if file == "-" and sys.stdin is None:
            raise DuctoError("standard input is closed")
        return load(sys.stdin.buffer.read() if file == "-" else Path(file))
    except ConfigError as error:
        raise DuctoError(f"{file}: {error}") from error


def _config_of(arguments: argparse.Namespace, name: str) -> PricingConfigData:
    return _published(arguments, name) if name == "active" or name.isdecimal() else _load(name)


def _published(arguments: argparse.Namespace, name: str) -> PricingConfigData:
    if name != "active" and not name.isdecimal():
        raise DuctoError(f"a version is a number or `active`, not {name!r}")
    with _manager(arguments) as manager:
        result = manager.get_active_pricing() if name == "active" else manager.get_pricing_config(_number(int(name)))
    if result is None:
        raise DuctoError("no pricing version is active yet")
    return result.config


def _number(version: int) -> int:
    if version >= 2**31:
        raise DuctoError(f"there is no pricing version {version}")
    return version


def _active(arguments: argparse.Namespace) -> str:
    return f"active from {arguments.at.isoformat()}" if arguments.at else "active"


def _print_version(arguments: argparse.Namespace, result: PricingConfigResult, what: str) -> None:
    if arguments.json:
        print_json(result)
    else:
        print(f"version {result.version} {what}")


def _indented(value: object, indent: str = "\n") -> str:
    """JSON with a line per key, for people."""
    if not isinstance(value, dict) or not value:
        return exactjson.dumps(value)
    inner = indent + "  "
    lines = (f"{inner}{exactjson.dumps(key)}: {_indented(item, inner)}" for key, item in value.items())
    return "{" + ",".join(lines) + indent + "}"
