"""Each RPC as a value: its name, its arguments, its answer.

`Calls` declares them once, as methods without a body; `@rpc` turns a declaration into a `Call`. On a `CreditManager`
a call returns its answer, on an `AsyncCreditManager` a coroutine of it: both only run the `Query` that the call
makes of its arguments.
"""

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cached_property, reduce, wraps
from operator import or_
from pathlib import Path
from types import MethodType, NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)
from uuid import UUID

from pydantic import BaseModel

from ducto_pg import exactjson
from ducto_pg.errors import InvalidArgumentError
from ducto_pg.models import (
    AddCreditsResult,
    AddTeamMemberResult,
    AggregateStatsRow,
    AllowanceResult,
    AutoTopup,
    BalanceResult,
    CapCheckResult,
    CheckFeatureResult,
    CostBreakdown,
    CreateTeamResult,
    CreditMetadata,
    DailySpendRow,
    DeductionResult,
    Event,
    Explanation,
    GetUserPlanResult,
    PricingConfigData,
    PricingConfigHistoryItem,
    PricingConfigResult,
    RefundResult,
    Reservation,
    ReserveResult,
    SetUserPlanResult,
    SpendByLabelRow,
    SpendByModelRow,
    SpendByUserRow,
    SpendCap,
    SpendMargin,
    Statement,
    SweepResult,
    Team,
    TeamBalanceResult,
    TeamDeductionResult,
    TeamMember,
    TopUserRow,
    Transaction,
    UsageMetrics,
    Violation,
)
from ducto_pg.usage.reading import plain

P = ParamSpec("P")
T = TypeVar("T")

Id = str | UUID
Usage = UsageMetrics | Mapping[str, Any]
Body = Annotated[Any, "jsonb"]
Metadata = CreditMetadata | Mapping[str, Any]
Charges = Sequence[Mapping[str, Any]]
Small = Annotated[int, "integer"]
Exact = Decimal | int

_SQL_TYPES: dict[Any, str] = {
    str: "text",
    Id: "text",
    Sequence[Id]: "text[]",
    Sequence[str]: "text[]",
    int: "bigint",
    Small: "integer",
    Exact: "numeric",
    bool: "boolean",
    datetime: "timestamptz",
    Usage: "jsonb",
    Body: "jsonb",
    Metadata: "jsonb",
    Charges: "jsonb",
}


class Query(NamedTuple, Generic[T]):
    """What a client sends, and how it reads the rows of the (last) answer."""

    sql: str
    arguments: Mapping[str, object] | None
    read: Callable[[list[tuple[Any, ...]]], T]


class Runner(Protocol):
    """What runs a statement at once."""

    def run(self, statement: Query[T]) -> T: ...


class AsyncRunner(Protocol):
    """What runs a statement when it is awaited."""

    async def run(self, statement: Query[T]) -> T: ...


class Call(Generic[P, T]):
    """Something to ask of the database: on a manager, a method that asks it."""

    def __init__(self, bind: Callable[P, Query[T]]) -> None:
        @wraps(bind)
        def ask(manager: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
            return manager.run(bind(*args, **kwargs))

        signature = inspect.signature(bind)
        manager = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        ask.__signature__ = signature.replace(parameters=[manager, *signature.parameters.values()])  # type: ignore[attr-defined]
        self._ask = ask
        self.bind = bind
        self.__doc__ = bind.__doc__

    @overload
    def __get__(self, manager: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self, manager: Runner, owner: type[Any]) -> Callable[P, T]: ...
    @overload
    def __get__(self, manager: AsyncRunner, owner: type[Any]) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, manager: Any, owner: type[Any]) -> Any:
        return self if manager is None else MethodType(self._ask, manager)


@dataclass(frozen=True)
class Parameter:
    """An argument of an RPC: in SQL `p_` and its name, less the `_` that Python wants after a keyword."""

    name: str
    sql_type: str
    default: object

    def to_sql(self, value: object) -> object:
        """`value` for the driver, or InvalidArgumentError: nothing is rounded or guessed on the way."""
        if value is None:
            return None
        in_words, write = _WRITERS[self.name if self.name in ("charges", "body") else self.sql_type]
        written = write(self.name, value)
        if written is None:
            raise InvalidArgumentError(f"{self.name} must be {in_words}, not {repr(value)[:100]}")
        return written


def _text(name: str, value: object) -> str | None:
    if isinstance(value, str):
        if not exactjson.storable(value):
            raise InvalidArgumentError(f"{name} holds a NUL or half a surrogate pair: {value[:100]!r}")
        return value
    return str(value) if isinstance(value, UUID) else None


def _texts(name: str, value: object) -> list[object] | None:
    element = Parameter(f"each of {name}", "text", None)
    return [element.to_sql(text) for text in value] if isinstance(value, list | tuple) else None


def _whole(name: str, value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _exact(name: str, value: object) -> Exact | None:
    return value if isinstance(value, Decimal) else _whole(name, value)


def _truth(name: str, value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _time(name: str, value: object) -> datetime | None:
    return value if isinstance(value, datetime) and value.utcoffset() is not None else None


def _object(name: str, value: object) -> str | None:
    return _json(name, _dict(name, value)) if isinstance(value, _OBJECTS) else None


def _charges(name: str, value: object) -> str | None:
    return _json(name, [_charge(charge) for charge in value]) if isinstance(value, list | tuple) else None


# An argument's SQL type: what is taken, in words, and what writes it for the driver (None: it is something else).
_WRITERS: dict[str, tuple[str, Callable[[str, object], object]]] = {
    "text": ("text", _text),
    "text[]": ("a list of texts", _texts),
    "bigint": ("a whole number", _whole),
    "integer": ("a whole number", _whole),
    "numeric": ("a Decimal or a whole number", _exact),
    "boolean": ("True or False", _truth),
    "timestamptz": ("a datetime with a time zone", _time),
    "jsonb": ("a dict", _object),
    "charges": ("a list of dicts", _charges),
    "body": ("what a provider returned", lambda name, value: _json(name, plain(value))),
}
_OBJECTS = (dict, BaseModel, Mapping)


def _charge(charge: Any) -> Any:
    """An element of `deduct_batch`; what is wrong with it, floats apart, is for the database to answer."""
    if not isinstance(charge, Mapping):
        return charge
    return {name: _field(name, value) for name, value in _dict("charges", charge).items()}


def _field(name: str, value: object) -> object:
    if isinstance(value, UUID):
        return str(value)
    return _dict(name, value) if isinstance(value, _OBJECTS) else value


def _dict(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, (dict, Mapping)):
        if name in ("metrics", "charges") and any(isinstance(number, float) for number in value.values()):
            raise InvalidArgumentError(f"{name}: a float is not exact, pass an int or a Decimal: {repr(value)[:200]}")
        if name == "metrics" and "body" in value:
            return {**value, "body": plain(value["body"])}
        return value if isinstance(value, dict) else dict(value)
    return value.to_usage() if isinstance(value, UsageMetrics) else value.model_dump(exclude_none=True)


def _json(name: str, value: object) -> str:
    try:
        text = exactjson.dumps(value)
        text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{name} cannot be written as JSON: {error}") from error


class Rpc(Call[P, T]):
    """A function of the schema `ducto`: `name`, `parameters`, `answer` (a model, or a plain type), `many` for a set."""

    def __init__(self, declaration: Callable[Concatenate[Any, P], T]) -> None:
        self.name = declaration.__name__
        self._declaration = declaration
        self._texts: dict[tuple[str, ...], str] = {}
        self.signature = inspect.signature(declaration)
        self.signature = self.signature.replace(parameters=list(self.signature.parameters.values())[1:])

        @wraps(declaration)
        def bind(*args: P.args, **kwargs: P.kwargs) -> Query[T]:
            writers = self._writers
            given = dict(zip(writers, args, strict=False)) | kwargs
            if len(given) < len(args) + len(kwargs) or not self._required <= given.keys() <= writers.keys():
                raise self._misuse(args, kwargs)
            asked = {name: value for name, value in given.items() if value is not None or name in self._required}
            values = {name: writers[name](asked[name]) for name in writers if name in asked}
            names = tuple(values)
            text = self._texts.get(names) or self._texts.setdefault(names, self._text(names))
            return Query(text, values, self.read)

        bind.__signature__ = self.signature  # type: ignore[attr-defined]
        super().__init__(bind)

    def _misuse(self, args: tuple[object, ...], kwargs: dict[str, object]) -> TypeError:
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            return TypeError(f"{self.name}: {error}")
        raise AssertionError(f"{self.name} takes these arguments")

    @cached_property
    def parameters(self) -> list[Parameter]:
        return [
            Parameter(name, _SQL_TYPES[_not_none(self._hints[name])], parameter.default)
            for name, parameter in self.signature.parameters.items()
        ]

    @cached_property
    def _writers(self) -> dict[str, Callable[[object], object]]:
        return {p.name: p.to_sql for p in self.parameters}

    @cached_property
    def _required(self) -> frozenset[str]:
        return frozenset(p.name for p in self.parameters if p.default is inspect.Parameter.empty)

    @cached_property
    def answer(self) -> type[Any]:
        """The model of a row."""
        answer = self._hints["return"]
        return get_args(answer)[0] if self.many else _not_none(answer)  # type: ignore[no-any-return]

    @cached_property
    def many(self) -> bool:
        return get_origin(self._hints["return"]) is list

    @property
    def sql(self) -> str:
        """The statement with all arguments."""
        return self._text(tuple(self._writers))

    def _text(self, names: tuple[str, ...]) -> str:
        """The statement with these arguments, named and cast; every attribute is named too, so that answers can grow.

        What is not given is left to the database: a statement without it is planned faster.
        """
        types = {p.name: p.sql_type for p in self.parameters}
        arguments = ", ".join(f"p_{name.rstrip('_')} => %({name})s::{types[name]}" for name in names)
        columns = ", ".join(f"a.{name}" for name in self._columns) or "a"
        return f"select {columns} from ducto.{self.name}({arguments}) a"

    @cached_property
    def _columns(self) -> list[str]:
        return list(self.answer.model_fields) if hasattr(self.answer, "model_fields") else []

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return get_type_hints(self._declaration, include_extras=True)

    def read(self, rows: list[tuple[Any, ...]]) -> T:
        answers: Any = [self._row(row) for row in rows]
        return answers if self.many else answers[0]  # type: ignore[no-any-return]

    def _row(self, row: tuple[Any, ...]) -> Any:
        if not self._columns:
            return row[0]
        if not self.many and row.count(None) == len(row):
            return None
        return self.answer.model_validate(dict(zip(self._columns, row, strict=True)))


def rpc(declaration: Callable[Concatenate[Any, P], T]) -> Rpc[P, T]:
    """The RPC that a method declares: its name, its arguments without `p_`, its answer."""
    return Rpc(declaration)


def _not_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return reduce(or_, (arm for arm in get_args(hint) if arm is not NoneType))
    return hint


def _publish(
    config: PricingConfigData | Mapping[str, Any] | str | bytes | Path,
    label: str | None = None,
    activate: bool = True,
    at: datetime | None = None,
) -> Query[PricingConfigResult]:
    """Compile a pricing config into the database as its next version, and make it the active one unless told not to:
    now, or from `at` on.

    The config is a model, a dict, the text of JSON or YAML, or the path of such a file.
    Publishing what a version already is, label included, activates that one and makes no new one. Only the role that
    installed may. Raises ConfigError for a config that cannot be used, with its path.
    """
    from ducto_pg.pricing.config import load
    from ducto_pg.pricing.publish import publish_call

    if label is not None and not (isinstance(label, str) and exactjson.storable(label)):
        raise InvalidArgumentError(f"label must be a text without NUL, not {label!r}")
    Parameter("at", "timestamptz", None).to_sql(at)
    if at is not None and not activate:
        raise InvalidArgumentError("at is when the version becomes active, but activate is False")
    call = publish_call(load(config), label=label, activate=activate, at=at)
    # A statement of its own: the one that publishes does not see what it has written.
    select = Calls.get_pricing_config.sql.replace("%(version)s", "pg_catalog.current_setting('ducto_pg.published')")
    text = f"select pg_catalog.set_config('ducto_pg.published', {call}::text, true);\n{select}"
    return Query(text, None, Calls.get_pricing_config.read)


# The declarations have docstrings for bodies.
# mypy: disable-error-code="empty-body"
class Calls:
    """What both managers can do.

    Credits are whole (`int`), costs exact (`Decimal`). A refusal is an answer with `error` set and nothing written;
    `.or_raise()` turns it into an exception. Misuse raises (`ducto_pg.errors`). None means an argument's default.
    An id or a key may be given as a UUID.
    With an `idempotency_key` of the caller's own a call may be repeated: the same request gives the first answer again.
    """

    @rpc
    def calculate_cost(
        self, metrics: Usage, user_id: Id | None = None, version: Small | None = None, plan_id: str | None = None
    ) -> CostBreakdown:
        """The exact price of a usage, on a plan or on that of an account if one is named; charges nothing."""

    @rpc
    def read_usage(self, body: Body, api: str | None = None, model: str | None = None) -> dict[str, Any]:
        """The usage that a provider's answer tells; `ducto_pg.usage.read` says the same without a database."""

    @rpc
    def get_active_pricing(self) -> PricingConfigResult | None:
        """The pricing version that is active; None until one is."""

    @rpc
    def get_pricing_config(self, version: Small) -> PricingConfigResult:
        """A published pricing version; raises UnknownVersionError."""

    @rpc
    def activate_pricing(self, version: Small, at: datetime | None = None) -> PricingConfigResult:
        """Make a published version the one that prices from now on, or from `at` on; past charges keep theirs."""

    @rpc
    def unschedule_pricing(self, version: Small) -> PricingConfigResult:
        """Take back the activation of a version whose time has not come yet."""

    @rpc
    def get_pricing_history(self) -> list[PricingConfigHistoryItem]:
        """All published versions, newest first."""

    @rpc
    def get_balance(self, user_id: Id, at: datetime | None = None) -> BalanceResult:
        """An account's credits now, or its balance at an earlier time; zeros where it is unknown."""

    @rpc
    def add_credits(
        self,
        user_id: Id,
        amount: int,
        type: str = "adjustment",
        metadata: Metadata | None = None,
        expires_at: datetime | None = None,
        idempotency_key: Id | None = None,
        paid_amount: Exact | None = None,
        paid_currency: str | None = None,
        reference: str | None = None,
        keep_lot: bool = False,
    ) -> AddCreditsResult:
        """Give credits, opening the account if need be.

        `type` is purchase, subscription, signup_bonus, promotion or adjustment; only a purchase adds to
        `lifetime_purchased`. `paid_amount`, `paid_currency` and `reference` are the caller's notes. With `keep_lot` it
        is known what is left of credits that do not expire, too.
        """

    @rpc
    def remove_credits(
        self,
        user_id: Id,
        amount: int | None,
        reason: str | None = None,
        transaction_id: Id | None = None,
        metadata: Metadata | None = None,
        idempotency_key: Id | None = None,
        unspent_only: bool = False,
        paid_amount: Exact | None = None,
        paid_currency: str | None = None,
    ) -> AddCreditsResult:
        """Take credits back: a grant mistyped, a payment refunded or disputed. May leave a debt; is not spend.

        With the grant's `transaction_id` never more than what is left of it; with `unspent_only` only what its lot
        still has and no hold claims, all of that where `amount` is None. `refund_credits` undoes it.
        """

    @rpc
    def merge_accounts(self, from_: Id, into: Id, idempotency_key: Id | None = None) -> BalanceResult:
        """Move all that an account has into another one, opening that if need be; refunds of its charges follow."""

    @rpc
    def set_credit_limit(self, user_id: Id, limit: int) -> BalanceResult:
        """How far below zero an account may go (0 at first)."""

    @rpc
    def set_low_balance(self, user_id: Id, threshold: int | None = None) -> BalanceResult:
        """Where the event `low_balance` is told of an account: None as its plan or the config says, 0 never."""

    @rpc
    def freeze_account(self, user_id: Id, frozen: bool = True) -> BalanceResult:
        """Refuse an account's holds, and its charges without one; settlements, refunds and grants go on."""

    @rpc
    def set_auto_topup(self, user_id: Id, threshold: int, amount: int, max_per_month: Small = 10) -> AutoTopup:
        """Ask for `amount` by the event `topup_due` whenever less than `threshold` is available, one at a time.

        `add_credits` under the event's key ends it.
        """

    @rpc
    def remove_auto_topup(self, user_id: Id) -> AutoTopup:
        """End automatic top-ups; the answer is what they were."""

    @rpc
    def get_auto_topup(self, user_id: Id) -> AutoTopup:
        """An account's automatic top-up, and whether one is open."""

    @rpc
    def fail_topup(self, user_id: Id, key: Id, retry_seconds: Small = 3600) -> AutoTopup:
        """End the open top-up of this key because it was not paid; the next opens no sooner than `retry_seconds`."""

    @rpc
    def sweep_expired_credits(self, dry_run: bool = False, limit: Small = 1000) -> SweepResult:
        """Write down what has expired, of at most `limit` accounts; once more until `account_count` is 0.

        Nothing depends on it: expired credits are never spent, swept or not. A dry run counts all and writes nothing.
        """

    @rpc
    def set_user_plan(
        self,
        user_id: Id,
        plan_id: str | None = None,
        when: str = "now",
        anchor: datetime | None = None,
        until: datetime | None = None,
        event_at: datetime | None = None,
        idempotency_key: str | None = None,
    ) -> SetUserPlanResult:
        """Put an account on a plan of the active version, opening it if need be; None takes the plan away.

        `when="period_end"` changes it when the present period ends. `anchor` is where the periods of a plan with
        `anchor: start` begin; from `until` on the plan is `default_plan`, else none. Each call replaces what was to
        come. A call with an `event_at` older than the last one given changes nothing and warns `superseded`.
        """

    @rpc
    def get_user_plan(self, user_id: Id) -> GetUserPlanResult:
        """An account's plan, at its present terms, and what is left of its allowance."""

    @rpc
    def check_feature(self, user_id: Id, feature: str) -> CheckFeatureResult:
        """A feature of an account's plan: its value, and whether that counts as having it."""

    @rpc
    def check_allowance(self, user_id: Id) -> AllowanceResult:
        """What is left of the free credits of an account's plan, and of which period."""

    @rpc
    def set_spend_cap(
        self,
        user_id: Id,
        limit: int,
        cap_type: str = "daily",
        model: str | None = None,
        action: str = "deny",
        label: str | None = None,
    ) -> SpendCap:
        """Bound what is debited from an account: in all, for a model or by a label; opens it if need be.

        `cap_type` is daily, weekly, monthly or lifetime; `action` is deny, warn or notify. A cap that is there already
        keeps its spend.
        """

    @rpc
    def remove_spend_cap(
        self, user_id: Id, cap_type: str, model: str | None = None, label: str | None = None
    ) -> SpendCap:
        """Take a cap away; the answer is the one that was there."""

    @rpc
    def list_spend_caps(self, user_id: Id) -> list[SpendCap]:
        """An account's caps."""

    @rpc
    def check_spend_cap(self, user_id: Id, model: str | None = None, amount: int = 0) -> CapCheckResult:
        """The cap that a charge of `amount` would exceed; zeros where there is none."""

    @rpc
    def reserve(
        self,
        user_id: Id,
        metrics: Usage,
        operation_type: str = "usage",
        metadata: Metadata | None = None,
        min_balance: int | None = None,
        ttl_seconds: Small = 600,
        idempotency_key: Id | None = None,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
        overrun: str | None = None,
    ) -> ReserveResult:
        """Hold the price, rounded up, of an estimated usage, until it is charged or `ttl_seconds` are over.

        `overrun` is debt, reject or bounded, in place of the config's; what settles the hold carries its `labels` too.
        """

    @rpc
    def reserve_credits(
        self,
        user_id: Id,
        amount: int,
        operation_type: str = "usage",
        metadata: Metadata | None = None,
        min_balance: int | None = None,
        ttl_seconds: Small = 600,
        idempotency_key: Id | None = None,
        model: str | None = None,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
        overrun: str | None = None,
    ) -> ReserveResult:
        """Hold a known amount (0 is a valid hold)."""

    @rpc
    def extend_reservation(
        self,
        reservation_id: Id,
        add_amount: int = 0,
        ttl_seconds: Small | None = None,
        user_id: Id | None = None,
        idempotency_key: Id | None = None,
    ) -> ReserveResult:
        """Hold more, or longer: `ttl_seconds` count from now and never shorten."""

    @rpc
    def release_reservation(self, reservation_id: Id, user_id: Id | None = None) -> ReserveResult:
        """End a hold without a charge; once more is not an error."""

    @rpc
    def get_reservation(self, reservation_id: Id, user_id: Id | None = None) -> Reservation:
        """A hold."""

    @rpc
    def list_reservations(
        self, user_id: Id, active: bool = True, limit: Small = 50, before: datetime | None = None
    ) -> list[Reservation]:
        """An account's active holds, or all of them, newest first; `before` is the last `created_at` seen."""

    @rpc
    def deduct(
        self,
        user_id: Id,
        metrics: Usage,
        idempotency_key: Id | None = None,
        metadata: Metadata | None = None,
        reservation_id: Id | None = None,
        final: bool = True,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
    ) -> DeductionResult:
        """Price a usage and charge it, in one step.

        With a `reservation_id` it settles that hold; `final=False` charges against the hold and keeps what is left.
        """

    @rpc
    def deduct_credits(
        self,
        user_id: Id,
        amount: Exact,
        reservation_id: Id | None = None,
        idempotency_key: Id | None = None,
        metadata: Metadata | None = None,
        model: str | None = None,
        final: bool = True,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
    ) -> DeductionResult:
        """Charge a known amount (0 settles a hold for nothing)."""

    @rpc
    def deduct_fixed(
        self,
        user_id: Id,
        job_name: str,
        idempotency_key: Id | None = None,
        metadata: Metadata | None = None,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
    ) -> DeductionResult:
        """Charge the fixed price of a job of the config."""

    @rpc
    def deduct_batch(self, charges: Charges) -> list[DeductionResult]:
        """Many charges in one call, each standing or refused by itself; the answers are in their order.

        A charge is a dict of `user_id` (beside it `team_id` for a team's member), one of `metrics`, `amount` (beside
        it `model`) and `job`, and optionally `reservation_id`, `final`, `idempotency_key`, `metadata`, `labels` and
        `occurred_at`.
        """

    @rpc
    def refund_credits(
        self,
        transaction_id: Id,
        amount: int | None = None,
        reason: str | None = None,
        metadata: Metadata | None = None,
        idempotency_key: Id | None = None,
        user_id: Id | None = None,
    ) -> RefundResult:
        """Give back a charge or a removal, or a part of it; never more in total than was taken."""

    @rpc
    def create_team(
        self, name: str, initial_balance: int = 0, idempotency_key: Id | None = None, team_id: Id | None = None
    ) -> CreateTeamResult:
        """Open a team's pool. Without a `team_id` the id is made, from the key if there is one."""

    @rpc
    def get_team(self, team_id: Id) -> Team:
        """A team: its name, pool and number of members."""

    @rpc
    def get_team_balance(self, team_id: Id) -> TeamBalanceResult:
        """A team's pool."""

    @rpc
    def add_team_member(
        self,
        team_id: Id,
        user_id: Id,
        role: str = "member",
        spend_cap: int | None = None,
        spend_cap_period: str = "lifetime",
    ) -> AddTeamMemberResult:
        """Make a user a member, or change the role and cap of one; `spend_cap_period` as in a cap."""

    @rpc
    def remove_team_member(self, team_id: Id, user_id: Id) -> AddTeamMemberResult:
        """End a membership; its history stays, and its open holds can still be settled."""

    @rpc
    def get_team_members(self, team_id: Id) -> list[TeamMember]:
        """A team's present members."""

    @rpc
    def reserve_team(
        self,
        team_id: Id,
        user_id: Id,
        metrics: Usage,
        operation_type: str = "usage",
        metadata: Metadata | None = None,
        min_balance: int | None = None,
        ttl_seconds: Small = 600,
        idempotency_key: Id | None = None,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
        overrun: str | None = None,
    ) -> ReserveResult:
        """`reserve` on a team's pool, for a member."""

    @rpc
    def reserve_team_credits(
        self,
        team_id: Id,
        user_id: Id,
        amount: int,
        operation_type: str = "usage",
        metadata: Metadata | None = None,
        min_balance: int | None = None,
        ttl_seconds: Small = 600,
        idempotency_key: Id | None = None,
        model: str | None = None,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
        overrun: str | None = None,
    ) -> ReserveResult:
        """`reserve_credits` on a team's pool, for a member."""

    @rpc
    def deduct_team(
        self,
        team_id: Id,
        user_id: Id,
        metrics: Usage,
        idempotency_key: Id | None = None,
        metadata: Metadata | None = None,
        reservation_id: Id | None = None,
        final: bool = True,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
    ) -> TeamDeductionResult:
        """`deduct` on a team's pool, for a member, at the prices of the team's plan."""

    @rpc
    def deduct_team_credits(
        self,
        team_id: Id,
        user_id: Id,
        amount: Exact,
        reservation_id: Id | None = None,
        idempotency_key: Id | None = None,
        metadata: Metadata | None = None,
        model: str | None = None,
        final: bool = True,
        labels: Sequence[str] | None = None,
        occurred_at: datetime | None = None,
    ) -> TeamDeductionResult:
        """`deduct_credits` on a team's pool, for a member."""

    @rpc
    def get_transaction(
        self, transaction_id: Id | None = None, user_id: Id | None = None, idempotency_key: Id | None = None
    ) -> Transaction:
        """A ledger entry: by its id, or by its account and the key of the call that wrote it."""

    @rpc
    def list_transactions(
        self,
        user_id: Id,
        limit: Small = 50,
        before: int | None = None,
        type: str | None = None,
        from_: datetime | None = None,
        to: datetime | None = None,
    ) -> list[Transaction]:
        """An account's ledger entries, the last first; `before` is the last `seq` seen, times are [from_, to)."""

    @rpc
    def explain_transaction(self, transaction_id: Id, user_id: Id | None = None) -> Explanation:
        """How a charge came about: usage, version, plan, formulas and their exact results."""

    @rpc
    def get_statement(self, user_id: Id, start: datetime | None, end: datetime | None) -> Statement:
        """What became of an account's credits in [start, end), expiry when it was due; None leaves an end open."""

    @rpc
    def spend_by_user(
        self, start: datetime | None = None, end: datetime | None = None, user_id: Id | None = None
    ) -> list[SpendByUserRow]:
        """What users and members spent in [start, end), most first; None leaves an end open.

        `user_id` selects what one user spent, in teams too, or what was charged to one team's pool.
        """

    @rpc
    def spend_by_model(
        self, start: datetime | None = None, end: datetime | None = None, user_id: Id | None = None
    ) -> list[SpendByModelRow]:
        """What was spent on models in [start, end), most first; `user_id` as in `spend_by_user`."""

    @rpc
    def spend_by_label(
        self, start: datetime | None = None, end: datetime | None = None, user_id: Id | None = None
    ) -> list[SpendByLabelRow]:
        """What was spent by charges that carry a label in [start, end), of all users or one, most first."""

    @rpc
    def spend_margin(self, start: datetime | None = None, end: datetime | None = None) -> list[SpendMargin]:
        """What was charged for models in [start, end), beside what their providers took, most first."""

    @rpc
    def daily_spend(
        self, start: datetime | None = None, end: datetime | None = None, user_id: Id | None = None
    ) -> list[DailySpendRow]:
        """What was spent on each local day in [start, end), in order; `user_id` as in `spend_by_user`."""

    @rpc
    def aggregate_stats(
        self, start: datetime | None = None, end: datetime | None = None, user_id: Id | None = None
    ) -> AggregateStatsRow:
        """What was spent in [start, end) in all, by how many, and on what and by whom most; `user_id` as in
        `spend_by_user`.
        """

    @rpc
    def top_users(
        self, limit: Small = 10, start: datetime | None = None, end: datetime | None = None
    ) -> list[TopUserRow]:
        """The users and members who spent most in [start, end)."""

    @rpc
    def rollup_usage(self) -> int:
        """Add what is new to the sums that make statistics fast (their answers are the same without); how many."""

    @rpc
    def fetch_events(self, limit: Small = 100, lease_seconds: Small = 60, consumer: str = "default") -> list[Event]:
        """The oldest events that no other worker of the consumer has; again after the lease unless acknowledged.

        Each consumer is given every event, and an event is kept until all have acknowledged it, 30 days at most.
        """

    @rpc
    def ack_events(self, ids: Sequence[Id], consumer: str = "default") -> int:
        """Tell that the consumer has dealt with events; how many it had not before."""

    @rpc
    def erase_user(self, user_id: Id) -> int:
        """Empty the free texts about a user, in teams too: metadata, reasons, references, events. The rows changed.

        Amounts, keys and usage stay. Only the role that installed may.
        """

    @rpc
    def my_balance(self) -> BalanceResult:
        """The end user's own balance, by the `sub` of `request.jwt.claims`."""

    @rpc
    def my_transactions(self, limit: Small = 50, before: int | None = None) -> list[Transaction]:
        """The end user's own ledger entries, the last first."""

    @rpc
    def my_plan(self) -> GetUserPlanResult:
        """The end user's own plan, and what is left of its allowance."""

    @rpc
    def my_statement(self, start: datetime | None, end: datetime | None) -> Statement:
        """What became of the end user's own credits in [start, end)."""

    @rpc
    def my_daily_spend(self, start: datetime | None, end: datetime | None) -> list[DailySpendRow]:
        """What the end user spent on each local day in [start, end), in teams too."""

    @rpc
    def verify_ledger(self, account_id: Id | None = None) -> list[Violation]:
        """The rules of the ledger that do not hold, of one account or of all: none when it is sound."""

    @rpc
    def version(self) -> str:
        """The version of ducto_pg that the database has."""

    publish_pricing = Call(_publish)
