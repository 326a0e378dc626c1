"""What goes into the calls and what comes back, as Pydantic models.

Answers ignore attributes they do not know, so that an older client survives a newer database. A null in an answer
becomes the field's empty value ('' for text, 0 for numbers) where the field cannot be None, and a time becomes ISO
8601 text in UTC where the field is text. Configs and inputs refuse what they do not know.

Credits are whole (`int`), costs exact (`Decimal`). A Python float is refused wherever a number is money or usage: it
is not the number that was written down.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ducto_pg.errors import DuctoError, from_refusal
from ducto_pg.exactjson import dumps
from ducto_pg.formula.fields import FURTHER_COUNTS

MAX_BIGINT = 2**63 - 1
MAX_USAGE = 10**15
MAX_DECIMALS = 12
MAX_DIGITS = 30

Rounding = Literal["carry", "up", "down", "half_up"]


def _number(value: Any, decimals: int = MAX_DECIMALS) -> int | Decimal:
    """An exact number of 0 <= n < 10^15 with at most so many decimals, or ValueError."""
    if isinstance(value, float):
        raise ValueError(f"{value!r} is a float, which is not exact: pass an int or a Decimal")
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError(f"must be a number, not {value!r}")
    if isinstance(value, Decimal) and not value.is_finite():
        raise ValueError(f"must be a finite number, not {value}")
    if value < 0:
        raise ValueError(f"must not be negative: {value}")
    if value >= MAX_USAGE:
        raise ValueError("must be below 10^15")
    if isinstance(value, int):
        return value
    _, digits, exponent = value.as_tuple()
    beyond = max(0, -decimals - int(exponent))
    if beyond and any(digits[-beyond:]):
        raise ValueError(f"has more than {decimals} decimals: {value}")
    return Decimal(format(Decimal((0, digits[:-beyond] or (0,), -decimals)) if beyond else abs(value), "f"))


def _credits(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = Decimal(value)
    small = not isinstance(value, Decimal) or (value.is_finite() and abs(value) <= 2 * MAX_BIGINT)
    try:
        if small and not isinstance(value, str) and value == int(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"must be whole credits, not {value if isinstance(value, Decimal) else repr(value)}")


def _count(value: Any) -> int:
    number = _number(0 if value is None else value)
    if number != int(number):
        raise ValueError(f"must be a whole number, not {number}")
    return int(number)


def _factor(value: Any) -> Decimal:
    if isinstance(value, float):
        raise ValueError(f"{value!r} is a float, which is not exact: pass an int or a Decimal")
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError(f"must be a number, not {value!r}")
    factor = Decimal(value)
    if not factor.is_finite() or factor <= 0:
        raise ValueError(f"must be above 0, not {value}")
    if factor.adjusted() >= MAX_DIGITS or int(factor.as_tuple().exponent) < -MAX_DIGITS:
        raise ValueError(f"has at most {MAX_DIGITS} digits before and after the point")
    return Decimal(format(factor, "f"))


Credits = Annotated[int, Field(ge=0, le=MAX_BIGINT), BeforeValidator(_credits)]
"""Whole credits: an int, or a Decimal without a fraction."""
Days = Annotated[int, Field(ge=1, le=36500), BeforeValidator(_count)]
"""Whole days of 24 hours."""
Count = Annotated[int, BeforeValidator(_count)]
"""How often something happened: whole, 0 <= n < 10^15."""
Quantity = Annotated[Decimal, BeforeValidator(lambda value: Decimal(_number(value)))]
"""A further metric: 0 <= n < 10^15, at most 12 decimals."""
ProviderCost = Annotated[Decimal, BeforeValidator(lambda value: Decimal(_number(value, MAX_DIGITS)))]
"""What the provider says a call took, in its own money: 0 <= n < 10^15, at most 30 decimals."""
Factor = Annotated[Decimal, BeforeValidator(_factor)]
"""Above 0, at most 30 digits either side of the point."""


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


class UsageMetrics(BaseModel):
    """What one operation used, told in the provider's own counts.

    Counts are whole, 0 <= n < 10^15; `audio_seconds` has at most 12 decimals. `input_tokens` and `output_tokens`
    are wholes: cached, audio, image and video input are parts of the one, reasoning, audio and image output of the
    other. `tool_calls` is a list of names or of `{"name": ...}`, or a count. `provider_cost` is what the provider
    says that it took; nobody is charged by it. `unread` holds the counts of a provider's answer that
    `ducto_pg.usage.read` does not know, by their path. Further names are the config's own `metrics` (numbers with
    at most 12 decimals); whether the config knows them is checked when a price is asked for. Raises a
    ValidationError (a ValueError) for negatives, NaN, text and floats, also on assignment.
    """

    model_config = ConfigDict(extra="allow", validate_assignment=True, protected_namespaces=())

    model: Annotated[str, Field(max_length=255)] | None = None
    input_tokens: Count = 0
    output_tokens: Count = 0
    cache_read_tokens: Count = 0
    cache_write_tokens: Count = 0
    tool_calls: int | list[str | dict[str, Any]] = Field(default_factory=list)
    search_queries: Count = 0
    search_results: Count = 0
    web_search_calls: Count = 0
    code_exec_calls: Count = 0
    fixed_job: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    cache_write_1h_tokens: Count = 0
    reasoning_tokens: Count = 0
    input_audio_tokens: Count = 0
    output_audio_tokens: Count = 0
    cache_audio_read_tokens: Count = 0
    input_image_tokens: Count = 0
    output_image_tokens: Count = 0
    input_video_tokens: Count = 0
    audio_seconds: Quantity = Decimal(0)
    characters: Count = 0
    images: Count = 0
    requests: Count = 0
    provider_cost: ProviderCost | None = None
    unread: dict[str, Quantity] = Field(default_factory=dict)

    __pydantic_extra__: dict[str, Quantity] = Field(init=False)

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _tool_calls(cls, value: Any) -> Any:
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            return _count(value)
        for call in value:
            name = call.get("name") if isinstance(call, Mapping) else call
            if not isinstance(name, str) or not 1 <= len(name) <= 255:
                raise ValueError(f'a tool call is a name of 1 to 255 characters or {{"name": ...}}, not {call!r}')
        return list(value)

    @property
    def tool_names(self) -> list[str]:
        """The name of each call; empty where only their number is known."""
        if isinstance(self.tool_calls, int):
            return []
        return [call if isinstance(call, str) else call["name"] for call in self.tool_calls]

    @property
    def tool_count(self) -> int:
        """The number of tool calls."""
        return self.tool_calls if isinstance(self.tool_calls, int) else len(self.tool_calls)

    def to_usage(self) -> dict[str, Any]:
        """The usage object that the SQL calls take: what says nothing is left out, numbers stay exact."""
        said = self.model_fields_set.intersection(FURTHER_COUNTS)
        nothing: tuple[Any, ...] = (None, 0, [], {})
        known = {
            name: value
            for name in type(self).model_fields
            if (value := getattr(self, name)) not in nothing or name in said
        }
        return known | (self.model_extra or {})


class CreditMetadata(BaseModel):
    """Free notes on a ledger entry. Extras pass through; nothing in here replaces what the system itself writes."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    input_tokens: int | None = None
    output_tokens: int | None = None
    model: str | None = None
    reference_type: str | None = None
    reference_id: str | None = None
    idempotency_key: str | None = None
    fixed_job: str | None = None


class PlanDefinition(BaseModel):
    """A subscription plan: whole credits free per period, own prices, features.

    A period is a day, week (from Monday), month or year of the calendar in the config's `timezone`, or with
    `anchor: start` begins where the account's plan began. An ended period hands on what is left of its allowance, up to
    `rollover` credits.

    `rate_overrides` replace or add entries of the config's `models` for accounts on the plan: one that serves a name is
    its price. `factor` multiplies the config's, `low_balance` stands in its place.
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    name: str
    free_allowance: Credits = 0
    period: Literal["day", "week", "month", "year"] = "month"
    anchor: Literal["calendar", "start"] = "calendar"
    rollover: Annotated[Credits, Field(le=10**15)] = 0
    rate_overrides: dict[str, str] | None = None
    features: dict[str, Any] | None = None
    factor: Factor = Decimal(1)
    low_balance: Credits | None = None


class PricingConfigData(BaseModel):
    """A pricing config: formulas by model, tool, search and cache, fixed prices by job, and the terms of charging.

    `factor` is the credits for one unit of what the formulas give, so that a list can stand in money; `fixed` is in
    credits. `match` says which names a key serves, `aliases` which other names a model has. A count that no formula
    names and `free` does not list is refused or told (`unpriced`). `cached` says whether `input_tokens` counts
    cached input. `costs` are single models' costs to you, before `factor`, where those are not what the formula
    gives. Checks shapes only; `ducto_pg.pricing.config.load` and `PricingEngine` check the whole, formulas
    included.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    version: Literal[1] = 1
    models: dict[str, str]
    tools: dict[str, str] = Field(default_factory=dict)
    search: dict[str, str] = Field(default_factory=dict)
    cache: dict[str, str] = Field(default_factory=dict)
    fixed: dict[str, Credits] = Field(default_factory=dict)
    min_balance: Credits = 5
    plans: dict[str, PlanDefinition] | None = None
    rounding: Rounding = "carry"
    metrics: dict[str, Quantity] = Field(default_factory=dict)
    default_plan: str | None = None
    signup_bonus: Credits = 0
    signup_bonus_days: Days | None = None
    low_balance: Credits | None = None
    timezone: str = "UTC"
    overrun: Literal["debt", "reject", "bounded"] = "debt"
    factor: Factor = Decimal(1)
    match: Literal["dated", "prefix", "exact"] = "dated"
    aliases: dict[str, str] = Field(default_factory=dict)
    unpriced: Literal["refuse", "warn"] = "refuse"
    free: list[str] = Field(default_factory=list)
    cached: Literal["inside", "beside"] = "inside"
    costs: dict[str, str] = Field(default_factory=dict)

    @field_validator("version", mode="before")
    @classmethod
    def _version(cls, value: Any) -> Any:
        return 1 if value == 1 else value

    @property
    def low_balance_credits(self) -> int:
        """What is left when `low_balance` is told: as configured, else 2 x min_balance; 0 = never."""
        return min(2 * self.min_balance, MAX_BIGINT) if self.low_balance is None else self.low_balance

    def to_json(self) -> str:
        """The config as JSON text with exact numbers, which `load` reads back; defaults are left out."""
        return dumps({"version": self.version, **self.model_dump(exclude_defaults=True)})


PricingConfig = PricingConfigData


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


class Answer(BaseModel):
    """Base of everything that comes back from the database; where it is a refusal, `error` says why."""

    error: str | None = None

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    _not_null: ClassVar[frozenset[str]] = frozenset()
    _texts: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        kinds = {name: _kinds(field.annotation) for name, field in cls.model_fields.items()}
        cls._not_null = frozenset(name for name, kind in kinds.items() if NoneType not in kind and Any not in kind)
        cls._texts = frozenset(name for name, kind in kinds.items() if str in kind)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        row = dict(data)
        for name, value in data.items():
            if value is None and name in cls._not_null:
                field = cls.model_fields[name]
                if field.is_required():
                    row[name] = field.annotation() if field.annotation else None
                else:
                    del row[name]
            elif isinstance(value, date) and name in cls._texts:
                row[name] = (value.astimezone(UTC) if isinstance(value, datetime) else value).isoformat()
        return row

    def or_raise(self) -> Self:
        """This answer itself, or its refusal as the typed exception of `ducto_pg.errors`, which carries the answer."""
        if self.error:
            raise from_refusal(self.error, self)
        return self


class AccountAnswer(Answer):
    """Base of the answers about one account; `revision` counts its changes and is the order of everything."""

    revision: int = 0


class BalanceResult(AccountAnswer):
    """An account's credits. `available` is the largest hold admitted now, caps apart, `credit_limit` how far below zero
    the account may go; of a past moment `reserved` and `available` are None. Only a merge tells whether
    it is `idempotent`.
    """

    user_id: str
    balance: int = 0
    lifetime_purchased: int = 0
    reserved: int | None = None
    available: int | None = None
    credit_limit: int = 0
    idempotent: bool | None = None


class AddCreditsResult(AccountAnswer):
    """Credits added, or, with a negative amount, taken back."""

    transaction_id: str
    user_id: str
    amount: int
    new_balance: int
    lifetime_purchased: int = 0
    idempotent: bool = False


class ReserveResult(AccountAnswer):
    """A hold: `amount` credits that nothing else can spend until `expires_at`.

    An `idempotent` one may have ended since: see `get_reservation` before working on it.
    """

    reservation_id: str
    user_id: str
    amount: int
    balance: int = 0
    reserved_total: int = 0
    expires_at: datetime | None = None
    warnings: list[str] = Field(default_factory=list)
    idempotent: bool = False


class DeductionResult(AccountAnswer):
    """A charge: `amount` is minus the credits debited from the balance; -amount + `allowance_used` were charged.

    `cost` is the exact price, `shortfall` the part of the charge that nothing was left for.
    """

    transaction_id: str
    user_id: str
    amount: int
    balance_after: int
    idempotent: bool = False
    cost: Decimal = Decimal(0)
    allowance_used: int = 0
    shortfall: int = 0
    warnings: list[str] = Field(default_factory=list)


class TeamDeductionResult(AccountAnswer):
    """A charge on a team's pool for the member `user_id`; fields as in `DeductionResult`, the balance is the pool's."""

    transaction_id: str = ""
    team_id: str = ""
    user_id: str = ""
    amount: int = 0
    team_balance_after: int = 0
    idempotent: bool = False
    cost: Decimal = Decimal(0)
    allowance_used: int = 0
    shortfall: int = 0
    warnings: list[str] = Field(default_factory=list)


class RefundResult(AccountAnswer):
    """Credits given back: amount + `allowance_restored` + `allowance_lapsed` (of a past period) = credits refunded."""

    refund_transaction_id: str
    original_transaction_id: str
    user_id: str
    amount: int = 0
    new_balance: int = 0
    allowance_restored: int = 0
    allowance_lapsed: int = 0
    idempotent: bool = False


class SetUserPlanResult(AccountAnswer):
    """The plan that an account is on from now; '' for none. `next_plan_at` is when that changes, if it is to.

    The warning `superseded` says that a later event was applied already, and nothing was changed.
    """

    user_id: str
    plan_id: str
    idempotent: bool = False
    warnings: list[str] = Field(default_factory=list)
    next_plan_id: str | None = None
    next_plan_at: str | None = None


class AllowanceResult(AccountAnswer):
    """What is left of the plan's free credits in the period [period_start, period_end)."""

    plan_id: str
    allowance_remaining: int
    period_start: str
    period_end: str


class GetUserPlanResult(AccountAnswer):
    """An account's plan, at its present terms, and what is left of its allowance."""

    user_id: str
    plan_id: str | None = None
    plan_name: str | None = None
    free_allowance: int = 0
    features: dict[str, Any] = Field(default_factory=dict)
    allowance_remaining: int | None = None
    period_start: str | None = None
    period_end: str | None = None
    next_plan_id: str | None = None
    next_plan_at: str | None = None


class CheckFeatureResult(AccountAnswer):
    """A feature of the account's plan: `has_feature` is false for absent, null, false, 0, '', [] and {}."""

    user_id: str
    feature: str
    value: Any = None
    has_feature: bool = False


class SpendCap(AccountAnswer):
    """A bound on the credits debited from an account in the current window; `type` is an input alias.

    Of all that is debited, or for one `model`, or by charges that carry a `label`. `spent` is what counts against it
    now, net of refunds, `resets_at` the end of the window, None for a lifetime.
    """

    user_id: str = ""
    cap_type: Literal["daily", "weekly", "monthly", "lifetime"] = Field(
        default="daily", validation_alias=AliasChoices("cap_type", "type")
    )
    model: str | None = None
    limit: Credits = 0
    action: Literal["deny", "warn", "notify"] = "deny"
    spent: int = 0
    resets_at: datetime | None = None
    label: str | None = None


class CapCheckResult(AccountAnswer):
    """Whether an amount would exceed a cap, and which."""

    capped: bool = False
    current_spend: int = 0
    cap_limit: int = 0
    action: str | None = None
    model: str | None = None


class CreateTeamResult(AccountAnswer):
    """A new team."""

    team_id: str = ""
    name: str = ""
    idempotent: bool = False


class Team(AccountAnswer):
    """A team: an account with members who share its pool."""

    team_id: str = ""
    name: str = ""
    balance: int = 0
    member_count: int = 0
    created_at: str = ""


class TeamBalanceResult(AccountAnswer):
    """A team's pool."""

    team_id: str = ""
    name: str = ""
    balance: int = 0
    member_count: int = 0


class AddTeamMemberResult(AccountAnswer):
    """A member that was added or removed."""

    team_id: str = ""
    user_id: str = ""
    role: str = "member"


class TeamMember(Answer):
    """A member: `spend_cap` bounds `spent`, the debits of its period; `total_spent` is that of the whole life."""

    user_id: str = ""
    role: str = ""
    spend_cap: int | None = None
    total_spent: int = 0
    spend_cap_period: Literal["lifetime", "daily", "weekly", "monthly"] = "lifetime"
    spent: int = 0


class SweepResult(Answer):
    """Lots that expired, and the credits that went with them."""

    expired_count: int = 0
    expired_amount: int = 0
    dry_run: bool = False
    account_count: int = 0


class PricingConfigResult(Answer):
    """A published pricing version; versions never change."""

    id: str
    config: PricingConfigData
    version: int = 1
    label: str | None = None


class PricingConfigHistoryItem(Answer):
    """A line of the list of published versions."""

    id: str
    version: int
    label: str | None = None
    active: bool = False
    created_at: str = ""


class SetupResult(BaseModel):
    """What `setup()` created or changed; with errors, nothing was changed at all.

    `repaired` names what had been dropped, replaced, disabled or ungranted since the last setup and is right again, and
    what an older release had left and is gone. Tables and RPCs among it are in the other lists too.
    """

    tables_created: list[str] = Field(default_factory=list)
    rpcs_created: list[str] = Field(default_factory=list)
    repaired: list[str] = Field(default_factory=list)
    errors: list[str] = Field(default_factory=list)

    @property
    def success(self) -> bool:
        """True where there is no error."""
        return not self.errors

    def or_raise(self) -> Self:
        """This report itself, or a DuctoError that carries it."""
        if self.errors:
            raise DuctoError("; ".join(self.errors), code="setup_failed", result=self)
        return self


class CostBreakdown(Answer):
    """An exact price in credits and its parts, before rounding. `cache_savings` is the (usually negative) discount.

    `resolved_model` is the config's key that served the model, None where `_default` or nothing did. `breakdown`
    repeats model, input_tokens, output_tokens and tool_count of the usage. `warnings` are those of a charge's price.
    """

    model_credits: Decimal = Decimal(0)
    tool_credits: Decimal = Decimal(0)
    search_credits: Decimal = Decimal(0)
    cache_savings: Decimal = Decimal(0)
    fixed_credits: Decimal = Decimal(0)
    total: Decimal = Decimal(0)
    resolved_model: str | None = None
    pricing_version: int | None = None
    plan_id: str | None = None
    breakdown: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


class Transaction(Answer):
    """A ledger entry. `amount` is the signed change of the balance: the sum of an account's amounts is its balance.

    `allowance_used` is negative where a refund restored it; `seq` orders the entries of an account. `occurred_at` is,
    of an expiry, when the credits were due.
    """

    transaction_id: str = ""
    account_id: str = ""
    seq: int = 0
    type: str = ""
    amount: int = 0
    balance_after: int = 0
    allowance_used: int = 0
    allowance_lapsed: int = 0
    cost: Decimal | None = None
    carry_after: Decimal | None = None
    rounding: str | None = None
    actor_id: str | None = None
    model: str | None = None
    resolved_model: str | None = None
    usage: dict[str, Any] | None = None
    pricing_version: int | None = None
    plan_id: str | None = None
    reservation_id: str | None = None
    refers_to: str | None = None
    idempotency_key: str | None = None
    paid_amount: Decimal | None = None
    paid_currency: str | None = None
    reference: str | None = None
    expires_at: datetime | None = None
    reason: str | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    occurred_at: datetime | None = None
    price_error: str | None = None
    warnings: list[str] = Field(default_factory=list)
    labels: list[str] = Field(default_factory=list)


class Reservation(Answer):
    """A hold: `amount` is held now, `charged` was charged against it so far."""

    reservation_id: str = ""
    account_id: str = ""
    actor_id: str | None = None
    status: Literal["active", "expired", "settled", "released", ""] = ""
    amount: int = 0
    charged: int = 0
    operation_type: str = ""
    model: str | None = None
    metrics: dict[str, Any] | None = None
    pricing_version: int | None = None
    plan_id: str | None = None
    idempotency_key: str | None = None
    metadata: dict[str, Any] | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None
    ended_at: datetime | None = None
    labels: list[str] = Field(default_factory=list)


class Explanation(Answer):
    """How a charge came about: its usage, the formulas of its pricing version, and their exact results.

    What it cost became credits with what was carried before: -`amount` + `allowance_used` of them.
    """

    transaction_id: str = ""
    account_id: str = ""
    cost: Decimal | None = None
    carry_before: Decimal | None = None
    carry_after: Decimal | None = None
    rounding: str | None = None
    usage: dict[str, Any] | None = None
    pricing_version: int | None = None
    plan_id: str | None = None
    resolved_model: str | None = None
    formulas: dict[str, Any] = Field(default_factory=dict)
    parts: dict[str, Any] = Field(default_factory=dict)
    amount: int = 0
    allowance_used: int = 0


class Event(Answer):
    """Something that happened to an account, told once; fetched again until it is acknowledged."""

    event_id: str = ""
    type: str = ""
    account_id: str = ""
    payload: dict[str, Any] = Field(default_factory=dict)
    attempts: int = 0
    created_at: datetime | None = None


class AutoTopup(Answer):
    """When an account is to be topped up, and how that stands.

    `status` is `ready`, `due` (one is open, under `due_key`), `waiting` (one failed) or `exhausted` (`this_month` had
    `max_per_month`).
    """

    user_id: str = ""
    threshold: int = 0
    amount: int = 0
    max_per_month: int = 0
    status: str = ""
    due_key: str | None = None
    this_month: int = 0
    revision: int = 0


class Violation(Answer):
    """A rule of the ledger that does not hold."""

    account_id: str = ""
    invariant: str = ""
    expected: str = ""
    actual: str = ""
    detail: str = ""


class Statement(AccountAnswer):
    """What became of an account's credits in [period_start, period_end), None where that end is open: opening_balance +
    granted + purchased - charged + refunded - removed - expired = closing_balance.

    `granted` is all that was added but purchases; `expired` counts when it was due. What charges took of the balance is
    `charged`, of the plan's allowance `allowance_used`, both gross of refunds.
    """

    user_id: str = ""
    period_start: datetime | None = None
    period_end: datetime | None = None
    opening_balance: int = 0
    granted: int = 0
    purchased: int = 0
    charged: int = 0
    allowance_used: int = 0
    refunded: int = 0
    removed: int = 0
    expired: int = 0
    closing_balance: int = 0


class Spending(Answer):
    """Base of the statistics: besides the gross credits debited, allowance used, credits refunded, exact cost."""

    allowance_used: int = 0
    refunded: int = 0
    cost: Decimal = Decimal(0)


class SpendByUserRow(Spending):
    """Credits debited and charges by user or member."""

    user_id: str = ""
    total_spend: int = 0
    transaction_count: int = 0


class SpendByModelRow(Spending):
    """Credits debited and charges by model: the resolved one, else as given."""

    model: str = ""
    total_spend: int = 0
    transaction_count: int = 0


class SpendByLabelRow(Answer):
    """Credits debited and charges by label; a charge with two labels counts for both."""

    label: str = ""
    total_spend: int = 0
    transaction_count: int = 0


class SpendMargin(Answer):
    """What was charged for a model, and what the provider took for it, in the money of the price list.

    `uncosted` counts the charges of which the provider's cost is unknown: known amounts, fixed jobs, what the version
    of the charge cannot price.
    """

    model: str = ""
    transaction_count: int = 0
    total_spend: int = 0
    provider_cost: Decimal = Decimal(0)
    uncosted: int = 0


class DailySpendRow(Spending):
    """Credits debited and charges by local day (YYYY-MM-DD)."""

    date: str = ""
    total_spend: int = 0
    transaction_count: int = 0


class TopUserRow(Spending):
    """A user or member by credits debited."""

    user_id: str = ""
    total_spend: int = 0


class AggregateStatsRow(Spending):
    """The window as a whole; `avg_daily_spend` is over the days with a charge, rounded down."""

    total_credits_consumed: int = 0
    active_users: int = 0
    avg_daily_spend: int = 0
    top_model: str = ""
    top_user: str = ""
