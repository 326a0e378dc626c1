"""The public models, as a table: what stood in the documented API from the start, and what was added to it."""

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any, get_type_hints

import psycopg
import pytest
from pydantic import BaseModel, ValidationError

from ducto_pg import errors, exactjson, models
from ducto_pg.models import (
    CreditMetadata,
    DailySpendRow,
    DeductionResult,
    GetUserPlanResult,
    PlanDefinition,
    PricingConfigData,
    PricingConfigHistoryItem,
    ReserveResult,
    SetupResult,
    SpendCap,
    UsageMetrics,
)


class Level(IntEnum):
    HIGH = 3


class Name(StrEnum):
    A = "a"


# Class: field type [= default]; ...   A field without a default is required.
DOCUMENTED = """
AddCreditsResult: transaction_id str; user_id str; amount int; new_balance int; lifetime_purchased int = 0
AddTeamMemberResult: team_id str = ""; user_id str = ""; role str = "member"
AggregateStatsRow: total_credits_consumed int = 0; active_users int = 0; avg_daily_spend int = 0
AggregateStatsRow: top_model str = ""; top_user str = ""
AllowanceResult: plan_id str; allowance_remaining int; period_start str; period_end str
BalanceResult: user_id str; balance int = 0; lifetime_purchased int = 0
CapCheckResult: capped bool = False; current_spend int = 0; cap_limit int = 0; action str | None = None
CapCheckResult: model str | None = None
CheckFeatureResult: user_id str; feature str; value Any = None; has_feature bool = False
CreateTeamResult: team_id str = ""; name str = ""
CreditMetadata: input_tokens int | None = None; output_tokens int | None = None; model str | None = None
CreditMetadata: reference_type str | None = None; reference_id str | None = None; idempotency_key str | None = None
CreditMetadata: fixed_job str | None = None
DailySpendRow: date str = ""; total_spend int = 0; transaction_count int = 0
DeductionResult: transaction_id str; user_id str; amount int; balance_after int; idempotent bool = False
DeductionResult: error str | None = None
GetUserPlanResult: user_id str; plan_id str | None = None; plan_name str | None = None; free_allowance int = 0
GetUserPlanResult: features dict[str, Any] = {}
PlanDefinition: id str; name str; free_allowance int = 0; rate_overrides dict[str, str] | None = None
PlanDefinition: features dict[str, Any] | None = None
PricingConfigData: version Literal[1] = 1; models dict[str, str]; tools dict[str, str] = {}
PricingConfigData: search dict[str, str] = {}
PricingConfigData: cache dict[str, str] = {}; fixed dict[str, int] = {}; min_balance int = 5
PricingConfigData: plans dict[str, PlanDefinition] | None = None
PricingConfigHistoryItem: id str; version int; label str | None = None; active bool = False; created_at str = ""
PricingConfigResult: id str; config PricingConfigData; version int = 1; label str | None = None
RefundResult: refund_transaction_id str; original_transaction_id str; user_id str; amount int = 0; new_balance int = 0
RefundResult: error str | None = None
ReserveResult: reservation_id str; user_id str; amount int; balance int = 0; reserved_total int = 0
ReserveResult: error str | None = None
SetUserPlanResult: user_id str; plan_id str
SetupResult: tables_created list[str] = []; rpcs_created list[str] = []; errors list[str] = []
SpendByModelRow: model str = ""; total_spend int = 0; transaction_count int = 0
SpendByUserRow: user_id str = ""; total_spend int = 0; transaction_count int = 0
SpendCap: user_id str = ""; model str | None = None; limit int = 0
SpendCap: cap_type Literal["daily", "weekly", "monthly", "lifetime"] = "daily"; label str | None = None
SpendCap: action Literal["deny", "warn", "notify"] = "deny"
SweepResult: expired_count int = 0; expired_amount int = 0; dry_run bool = False
Team: team_id str = ""; name str = ""; balance int = 0; member_count int = 0; created_at str = ""
TeamBalanceResult: team_id str = ""; name str = ""; balance int = 0; member_count int = 0
TeamDeductionResult: transaction_id str = ""; team_id str = ""; user_id str = ""; amount int = 0
TeamDeductionResult: team_balance_after int = 0
TeamDeductionResult: error str | None = None
TeamMember: user_id str = ""; role str = ""; spend_cap int | None = None; total_spent int = 0
TopUserRow: user_id str = ""; total_spend int = 0
"""

ADDED = """
AddCreditsResult: idempotent bool = False; revision int = 0; error str | None = None
BalanceResult: reserved int | None = None; available int | None = None; credit_limit int = 0
BalanceResult: revision int = 0; error str | None = None; idempotent bool | None = None
CreateTeamResult: idempotent bool = False
DeductionResult: cost Decimal = Decimal(0); allowance_used int = 0; shortfall int = 0; warnings list[str] = []
DeductionResult: revision int = 0
GetUserPlanResult: allowance_remaining int | None = None; period_start str | None = None; period_end str | None = None
PricingConfigData: rounding Literal["carry", "up", "down", "half_up"] = "carry"; metrics dict[str, Decimal] = {}
PricingConfigData: default_plan str | None = None; signup_bonus int = 0; low_balance int | None = None
PricingConfigData: signup_bonus_days int | None = None
PlanDefinition: low_balance int | None = None
PricingConfigData: timezone str = "UTC"
PricingConfigData: overrun Literal["debt", "reject", "bounded"] = "debt"
RefundResult: allowance_restored int = 0; allowance_lapsed int = 0; idempotent bool = False
ReserveResult: idempotent bool = False; revision int = 0
TeamDeductionResult: cost Decimal = Decimal(0); allowance_used int = 0; shortfall int = 0; warnings list[str] = []
TeamDeductionResult: idempotent bool = False
SweepResult: account_count int = 0
AutoTopup: user_id str = ""; threshold int = 0; amount int = 0; max_per_month int = 0; status str = ""
AutoTopup: due_key str | None = None; this_month int = 0; revision int = 0
CostBreakdown: model_credits Decimal = Decimal(0); tool_credits Decimal = Decimal(0)
CostBreakdown: search_credits Decimal = Decimal(0)
CostBreakdown: cache_savings Decimal = Decimal(0); fixed_credits Decimal = Decimal(0); total Decimal = Decimal(0)
CostBreakdown: resolved_model str | None = None; pricing_version int | None = None; plan_id str | None = None
CostBreakdown: breakdown dict[str, Any] = {}; warnings list[str] = []
Event: event_id str = ""; type str = ""; account_id str = ""; payload dict[str, Any] = {}; attempts int = 0
Event: created_at datetime | None = None
Explanation: transaction_id str = ""; account_id str = ""; cost Decimal | None = None
Explanation: carry_before Decimal | None = None
Explanation: carry_after Decimal | None = None; rounding str | None = None; usage dict[str, Any] | None = None
Explanation: pricing_version int | None = None; plan_id str | None = None; resolved_model str | None = None
Explanation: formulas dict[str, Any] = {}; parts dict[str, Any] = {}
Reservation: reservation_id str = ""; account_id str = ""; actor_id str | None = None; amount int = 0; charged int = 0
Reservation: operation_type str = ""; model str | None = None; metrics dict[str, Any] | None = None
Reservation: pricing_version int | None = None; plan_id str | None = None; idempotency_key str | None = None
Reservation: metadata dict[str, Any] | None = None; created_at datetime | None = None; ended_at datetime | None = None
Transaction: transaction_id str = ""; account_id str = ""; seq int = 0; type str = ""; amount int = 0
Transaction: balance_after int = 0
Transaction: allowance_used int = 0; allowance_lapsed int = 0; cost Decimal | None = None
Transaction: carry_after Decimal | None = None
Transaction: rounding str | None = None; actor_id str | None = None; model str | None = None
Transaction: resolved_model str | None = None; usage dict[str, Any] | None = None; pricing_version int | None = None
Transaction: plan_id str | None = None; reservation_id str | None = None; refers_to str | None = None
Transaction: idempotency_key str | None = None; paid_amount Decimal | None = None; paid_currency str | None = None
Transaction: reference str | None = None; expires_at datetime | None = None; reason str | None = None
Reservation: labels list[str] = []
Transaction: labels list[str] = []
Transaction: metadata dict[str, Any] | None = None; created_at datetime | None = None
Violation: account_id str = ""; invariant str = ""; expected str = ""; actual str = ""; detail str = ""
AggregateStatsRow: allowance_used int = 0; refunded int = 0; cost Decimal = Decimal(0)
DailySpendRow: allowance_used int = 0; refunded int = 0; cost Decimal = Decimal(0)
SpendByLabelRow: label str = ""; total_spend int = 0; transaction_count int = 0
SpendByModelRow: allowance_used int = 0; refunded int = 0; cost Decimal = Decimal(0)
SpendByUserRow: allowance_used int = 0; refunded int = 0; cost Decimal = Decimal(0)
TopUserRow: allowance_used int = 0; refunded int = 0; cost Decimal = Decimal(0)
"""


def rows(table: str) -> list[tuple[str, str]]:
    lines = (line.split(": ", 1) for line in table.strip().splitlines())
    return [(name, field) for name, fields in lines for field in fields.split("; ")]


def model(name: str) -> type[BaseModel]:
    found: type[BaseModel] = getattr(models, name)
    return found


def test_the_table_names_every_documented_model() -> None:
    assert len({name for name, _ in rows(DOCUMENTED)}) == 29


@pytest.mark.parametrize(("name", "sentence"), rows(DOCUMENTED) + rows(ADDED))
def test_field(name: str, sentence: str) -> None:
    field, _, rest = sentence.partition(" ")
    kind, has_default, default = rest.partition(" = ")
    info = model(name).model_fields[field]
    scope = vars(models) | {"datetime": datetime}
    assert get_type_hints(model(name))[field] == eval(kind, scope)
    assert info.is_required() == (not has_default)
    if has_default:
        assert info.get_default(call_default_factory=True) == eval(default, scope)


@pytest.mark.parametrize(
    "name",
    ["AddTeamMemberResult", "CapCheckResult", "Event", "SpendCap", "SweepResult", "Team", "TeamMember", "Transaction"],
)
def test_every_answer_can_be_a_refusal(name: str) -> None:
    answer: Any = model(name)(error="not_known_yet")
    with pytest.raises(errors.RefusedError) as caught:
        answer.or_raise()
    assert (caught.value.code, caught.value.result) == ("not_known_yet", answer)
    fine: Any = model(name)()
    assert fine.or_raise() is fine


@pytest.mark.parametrize("code", sorted(errors.REFUSALS))
def test_refusal_raises_its_own_type(code: str) -> None:
    refused = DeductionResult(transaction_id="", user_id="u", amount=0, balance_after=3, error=code)
    with pytest.raises(errors.REFUSALS[code]) as caught:
        refused.or_raise()
    assert caught.value.code == code
    assert caught.value.result is refused
    told = f"{code}: {errors.REFUSALS[code].__doc__}"
    assert str(caught.value) == (f"{told} The balance is 3." if code == "insufficient_credits" else told)


def test_errors_have_one_type_per_refusal_and_are_value_errors_where_the_input_is_at_fault() -> None:
    assert len(set(errors.REFUSALS.values())) == len(errors.REFUSALS) == 30
    for code in ("22023", "DU003", "DU004", "DU005"):
        kind = errors.kind_of(code)
        assert kind
        assert issubclass(kind, ValueError)
    assert errors.kind_of("40P01") is errors.ConcurrencyError
    assert errors.kind_of("42P01") is errors.kind_of(None) is None


def test_a_null_is_the_empty_value_where_the_field_cannot_be_none() -> None:
    held: Any = {
        "reservation_id": None,
        "user_id": "u",
        "amount": None,
        "balance": None,
        "warnings": None,
        "error": None,
    }
    result = ReserveResult(**held)
    assert (result.reservation_id, result.amount, result.balance, result.warnings, result.error) == ("", 0, 0, [], None)
    plan: Any = {"user_id": "u", "plan_id": None, "features": None}
    assert GetUserPlanResult(**plan).features == {}
    refused: Any = {"cap_type": None, "error": "cap_not_found"}
    assert SpendCap(**refused).cap_type == "daily"


def test_times_are_iso_text_in_utc_where_the_field_is_text() -> None:
    berlin = datetime(2026, 3, 1, 0, 30, tzinfo=timezone(timedelta(hours=1)))
    item: Any = {"id": "x", "version": 1, "created_at": berlin}
    assert PricingConfigHistoryItem(**item).created_at == "2026-02-28T23:30:00+00:00"
    plan: Any = {"user_id": "u", "period_start": datetime(2026, 3, 1, tzinfo=UTC)}
    assert GetUserPlanResult(**plan).period_start == "2026-03-01T00:00:00+00:00"
    day: Any = {"date": date(2026, 3, 1)}
    assert DailySpendRow(**day).date == "2026-03-01"


def test_answers_ignore_what_they_do_not_know_and_inputs_refuse_it() -> None:
    newer: Any = {"user_id": "u", "plan_id": "p", "of_tomorrow": 1}
    assert "of_tomorrow" not in models.SetUserPlanResult(**newer).model_dump()
    with pytest.raises(ValidationError, match="plan_nmae"):
        PlanDefinition.model_validate({"id": "p", "name": "P", "plan_nmae": "P"})
    with pytest.raises(ValidationError, match="min_balanse"):
        PricingConfigData.model_validate({"models": {"a": "input_tokens"}, "min_balanse": 1})
    assert CreditMetadata.model_validate({"model": "m", "ticket": 7}).model_extra == {"ticket": 7}


def test_a_spend_cap_takes_type_as_an_alias() -> None:
    assert SpendCap.model_validate({"type": "monthly"}).cap_type == "monthly"
    assert SpendCap(cap_type="monthly").model_dump()["cap_type"] == "monthly"


def test_setup_result() -> None:
    done = SetupResult(tables_created=["ducto_private.accounts"])
    assert done.success
    assert done.or_raise() is done
    failed = SetupResult(errors=["schema ducto belongs to mallory"])
    assert not failed.success
    with pytest.raises(errors.DuctoError, match="mallory") as caught:
        failed.or_raise()
    assert caught.value.result is failed


def test_usage_leaves_out_what_says_nothing_and_stays_exact() -> None:
    usage = UsageMetrics.model_validate(
        {
            "model": "gpt-4o",
            "input_tokens": Decimal("1E+3"),
            "tool_calls": ["a", {"name": "b"}],
            "audio": Decimal("0.10"),
            "images": 0,
        }
    )
    assert usage.to_usage() == {
        "model": "gpt-4o",
        "input_tokens": 1000,
        "tool_calls": ["a", {"name": "b"}],
        "audio": Decimal("0.10"),
        "images": Decimal(0),
    }
    assert (usage.tool_count, usage.tool_names) == (2, ["a", "b"])
    assert exactjson.dumps(usage.to_usage()["audio"]) == "0.10"
    assert UsageMetrics(tool_calls=3).to_usage() == {"tool_calls": 3}
    nothing: Any = {"model": None, "input_tokens": None, "tool_calls": None, "fixed_job": None}
    assert UsageMetrics(**nothing).to_usage() == {}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_tokens", -1, "must not be negative: -1"),
        ("input_tokens", "5", "must be a number, not '5'"),
        ("input_tokens", True, "must be a number, not True"),
        ("input_tokens", Decimal("1.5"), "must be a whole number, not 1.5"),
        ("input_tokens", 10**15, "must be below 10^15"),
        ("output_tokens", Decimal("NaN"), "must be a finite number, not NaN"),
        ("output_tokens", Decimal("1E+999999"), "must be below 10^15"),
        ("output_tokens", float("1"), "1.0 is a float, which is not exact: pass an int or a Decimal"),
        ("images", float("nan"), "nan is a float, which is not exact: pass an int or a Decimal"),
        ("images", Decimal("0.0000000000001"), "has more than 12 decimals: 1E-13"),
        ("images", Decimal("1E-999999"), "has more than 12 decimals: 1E-999999"),
        ("images", "many", "must be a number, not 'many'"),
        ("tool_calls", -1, "must not be negative: -1"),
        ("tool_calls", "search", "must be a number, not 'search'"),
        ("tool_calls", [{"function": "f"}], "a tool call is a name"),
        ("tool_calls", [""], "a tool call is a name"),
        ("model", "m" * 256, "at most 255 characters"),
        ("fixed_job", "", "at least 1 character"),
    ],
)
def test_usage_refuses(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        UsageMetrics.model_validate({field: value})
    assert message in str(caught.value)
    usage = UsageMetrics(input_tokens=1)
    with pytest.raises(ValidationError):
        setattr(usage, field, value)
    assert usage.to_usage() == {"input_tokens": 1}


def test_usage_normalises_how_a_number_is_written_but_not_its_value() -> None:
    usage = UsageMetrics.model_validate(
        {"a": Decimal("1E+3"), "b": Decimal("-0.00"), "c": Decimal("1.5000000000000000"), "d": 7}
    )
    assert [str(value) for value in (usage.model_extra or {}).values()] == ["1000", "0.00", "1.500000000000", "7"]


def test_each_answer_of_the_database_has_its_model(conn: psycopg.Connection[tuple[Any, ...]]) -> None:
    attributes: dict[str, set[str]] = {}
    for name, attribute in conn.execute(
        "select t.typname, a.attname from pg_catalog.pg_type as t"
        " join pg_catalog.pg_attribute as a on a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped"
        " where t.typnamespace = 'ducto'::regnamespace and t.typtype = 'c'"
    ):
        attributes.setdefault("".join(map(str.capitalize, name.split("_"))), set()).add(attribute)
    assert attributes
    assert attributes == {name: set(model(name).model_fields) for name in attributes}


def test_json_is_exact_both_ways() -> None:
    text = '{"a": 0.10, "b": [12345678901234567890.000000000001, true, null], "c": "\\"ü"}'
    assert exactjson.dumps(exactjson.loads(text)) == text
    longest = "-" + "9" * 5000
    assert exactjson.dumps(exactjson.loads(longest)) == longest
    for wrong in ("[NaN]", "[-Infinity]"):
        with pytest.raises(ValueError, match="is not a JSON number"):
            exactjson.loads(wrong)
    with pytest.raises(ValueError, match="is not a JSON number"):
        exactjson.dumps([Decimal("NaN")])
    with pytest.raises(TypeError, match="must be text"):
        exactjson.dumps({1: 2})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("1E+3"), "1000"),
        (Decimal("-0.100"), "-0.100"),
        (Decimal("1E-20"), "0.00000000000000000001"),
        (10**30, "1" + "0" * 30),
        (Level.HIGH, "3"),
        (Name.A, '"a"'),
        ([True, False, None, ()], "[true, false, null, []]"),
        ({"é\n": {"😀": "\u2028"}}, '{"é\\n": {"😀": "\u2028"}}'),
        (float("0.5"), "0.5"),
    ],
)
def test_json_of(value: object, text: str) -> None:
    assert exactjson.dumps(value) == text


@pytest.mark.parametrize(
    "value", [float("nan"), [float("inf")], Decimal("Infinity"), {None: 1}, {"a": {2: 3}}, {1}, b""]
)
def test_what_is_not_json(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        exactjson.dumps(value)


@pytest.mark.parametrize(
    ("text", "storable"), [("", True), ("ü😀\uffff\ue000", True), ("a\0", False), ("\ud800", False), ("x\udfff", False)]
)
def test_what_postgresql_can_store(text: str, storable: bool) -> None:
    assert exactjson.storable(text) is storable
