"""Commands that ask the database: one call each, and those that repeat or judge one."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from ducto_pg.cli.common import TIME, add_command, manager_of, read_time
from ducto_pg.cli.tables import Told, print_answer, print_json
from ducto_pg.client.calls import Calls, Parameter, Rpc
from ducto_pg.errors import DuctoError
from ducto_pg.models import Answer, SweepResult

# Commands that are one call each: the call, what it must be told, and what it may.
ASKING = {
    "balance": "get_balance user_id --at",
    "statement": "get_statement user_id start end",
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
    "cap set": "set_spend_cap user_id limit --cap-type --model --label --action",
    "cap remove": "remove_spend_cap user_id cap_type --model --label",
    "cap list": "list_spend_caps user_id",
    "cap check": "check_spend_cap user_id --model --amount",
    "team create": "create_team name --team-id --initial-balance --idempotency-key",
    "team show": "get_team team_id",
    "team add": "add_team_member team_id user_id --role --spend-cap --spend-cap-period",
    "team remove": "remove_team_member team_id user_id",
    "team members": "get_team_members team_id",
    "stats total": "aggregate_stats --start --end --user-id",
    "stats users": "spend_by_user --start --end --user-id",
    "stats models": "spend_by_model --start --end --user-id",
    "stats labels": "spend_by_label --start --end --user-id",
    "stats margin": "spend_margin --start --end",
    "stats days": "daily_spend --start --end --user-id",
    "stats top": "top_users --limit --start --end",
    "stats rollup": "rollup_usage",
    "events fetch": "fetch_events --limit --lease-seconds --consumer",
    "events ack": "ack_events ids --consumer",
    "pricing list": "get_pricing_history",
}
_MEANINGS = {
    "user_id": "the id of an account: yours of a user, or a team's",
    "team_id": "the team's id",
    "transaction_id": "the id of a row of the ledger",
    "amount": "whole credits",
    "idempotency_key": "an id of yours for this request: once more, nothing happens twice",
    "plan_id": "a plan of the active version",
    "cap_type": "daily, weekly, monthly or lifetime",
    "action": "deny, warn or notify",
    "spend_cap": "whole credits",
    "spend_cap_period": "lifetime, daily, weekly or monthly",
    "before": "the last seq seen",
    "ids": "of events that were dealt with",
    **dict.fromkeys(("at", "from", "to", "start", "end", "expires_at"), TIME),
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


def add(commands: Any) -> dict[str, Any]:
    """`verify`, `sweep`, and a command for each of `ASKING`; answers their groups."""
    verify = add_command(commands, "verify", _verify, dsn=True, json=True)
    verify.add_argument("--account", metavar="ID", help="only this account")
    sweep = add_command(commands, "sweep", _sweep, dsn=True, json=True)
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
    return groups


def _add_asking(commands: Any, name: str, call: str, *told: str) -> None:
    rpc: Rpc[..., Told] = getattr(Calls, call)
    parser = add_command(commands, name, _ask, dsn=True, json=True, doc=inspect.getdoc(rpc))
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
    readers: dict[str, Callable[[str], object]] = {"bigint": int, "integer": int, "timestamptz": read_time}
    return readers.get(parameter.sql_type, str)


def _ask(arguments: argparse.Namespace) -> None:
    rpc: Rpc[..., Told] = arguments.rpc
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    with manager_of(arguments) as manager:
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
    with manager_of(arguments) as manager:
        while (swept := manager.sweep_expired_credits(arguments.dry_run, arguments.limit)).account_count:
            total.expired_count += swept.expired_count
            total.expired_amount += swept.expired_amount
            total.account_count += swept.account_count
            if arguments.dry_run:
                break
    (print_json if arguments.json else print_answer)(total)


def _verify(arguments: argparse.Namespace) -> int:
    """look for rules of the ledger that do not hold"""
    with manager_of(arguments) as manager:
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
