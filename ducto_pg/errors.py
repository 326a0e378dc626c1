"""Every way in which ducto_pg says no.

A *refusal* is an answer whose `error` is set: nothing was written, and the caller may go on. `.or_raise()` turns it
into the exception of `REFUSALS`. *Misuse* is raised, by the database with a SQLSTATE (`SQLSTATES`) or by Python
itself.
"""

import re
from typing import Any, ClassVar, Literal


class DuctoError(Exception):
    """Base of all errors of this package.

    `code` is the refusal (`insufficient_credits`) or the SQLSTATE (`DU003`); `detail` and `hint` are the database's,
    and None where there is none; `result` is the answer that carried a refusal.

    `retry` says whether the same call can succeed later: "again", in a new transaction, or "elsewhere", on a new
    connection; None means that it would fail again.
    """

    default_code: ClassVar[str] = ""
    default_hint: ClassVar[str | None] = None
    retry: ClassVar[Literal["again", "elsewhere"] | None] = None

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        detail: str | None = None,
        hint: str | None = None,
        result: Any = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.detail = detail
        self.hint = self.default_hint or hint
        self.result = result

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(DuctoError, ValueError):
    """A pricing config that cannot be used.

    `path` is where in the config (`plans.pro.rate_overrides.gpt-4o`), `position` the first faulty character of the
    text there, counted from 0 (None where the fault is not in a text), `suggestion` the nearest known name for a
    misspelt one.
    """

    default_code = "config_error"

    def __init__(
        self, message: str = "", *, path: str = "", position: int | None = None, suggestion: str | None = None
    ) -> None:
        super().__init__(message)
        self.path = path
        self.position = position
        self.suggestion = suggestion
        self.hint = f"did you mean {suggestion}?" if suggestion else None

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        position = f" at position {self.position}" if self.position is not None else ""
        suggestion = f"; {self.hint}" if self.hint else ""
        return f"{where}{self.message}{position}{suggestion}"


class ExpressionError(ConfigError):
    """A formula that is not in the language; `path` is filled in when it is part of a config."""

    default_code = "expression_error"


class InvalidArgumentError(DuctoError, ValueError):
    """An argument, a usage or an id that no call accepts (22023)."""

    default_code = "22023"


class OutOfRangeError(DuctoError):
    """A cost or an amount beyond bigint (22003)."""

    default_code = "22003"


class NotInstalledError(DuctoError):
    """The database does not have ducto_pg, or an older one."""

    default_code = "3F000"
    default_hint = "run ducto-pg setup, or ducto_pg.setup()"


class PricingNotLoadedError(DuctoError):
    """No pricing version is active yet (DU001)."""

    default_code = "DU001"


class UnknownVersionError(DuctoError):
    """No such pricing version (DU002)."""

    default_code = "DU002"


class UnknownModelError(DuctoError, ValueError):
    """No price for this model, and no `_default` (DU003)."""

    default_code = "DU003"


class UnknownJobError(DuctoError, ValueError):
    """No fixed price for this job (DU004)."""

    default_code = "DU004"


class UnknownMetricError(DuctoError, ValueError):
    """A usage key that neither the product nor the config knows (DU005)."""

    default_code = "DU005"


class FormulaError(DuctoError, ArithmeticError):
    """A division by zero in a formula that was evaluated; the message names the formula (DU006)."""

    default_code = "DU006"


class UnpricedUsageError(DuctoError, ValueError):
    """A count that no formula of the price names, and that the config does not call free (DU008)."""

    default_code = "DU008"


class NegativePriceError(DuctoError, ArithmeticError):
    """A formula of a model, a tool or the search gives less than zero for this usage (DU009)."""

    default_code = "DU009"


class LedgerImmutableError(DuctoError):
    """Somebody tried to change or delete a ledger row (DU007)."""

    default_code = "DU007"


class ConcurrencyError(DuctoError):
    """Others were in the way, or the server was short of something: nothing was written, and the same transaction can
    be tried again. A serialization failure, a deadlock, a timeout (40001, 40P01, 55P03, 57014), no memory, disk or
    connection left (53…).
    """

    default_code = "40001"
    retry = "again"


class UnavailableError(DuctoError):
    """The server or the connection cannot do it, and nothing was written: try again on a new connection.

    A server that is read-only (25006), stops or starts (57P…), one that cannot be reached, or a session that it ended
    (25P03). On a DSN the manager has left the connection already; on one of yours the transaction is lost.
    """

    default_code = "08001"
    retry = "elsewhere"


class OutcomeUnknownError(UnavailableError):
    """The connection was lost during the call (08…, 57P02, or no SQLSTATE at all): it may have been committed.

    The same call under the same idempotency key is safe: it gives the first answer, or does now what was lost.
    """

    default_code = "08006"
    default_hint = "it may have been committed: repeat the same call under the same idempotency key"


class RefusedError(DuctoError):
    """Base of the refusals, each named as its class is: nothing was written, and the transaction stays usable."""

    def __init_subclass__(cls) -> None:
        cls.default_code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__.removesuffix("Error")).lower()


class InsufficientCreditsError(RefusedError):
    """Balance, allowance and credit limit do not admit the amount."""


class AccountNotFoundError(RefusedError):
    """The account was never opened."""


class IsATeamError(RefusedError):
    """A team's pool is charged by the team calls, for a member."""


class SpendCapExceededError(RefusedError):
    """A `deny` cap of the account has no room for the amount."""


class ReservationNotFoundError(RefusedError):
    """No such hold on this account."""


class ReservationNotActiveError(RefusedError):
    """The hold has ended or expired."""


class TransactionNotFoundError(RefusedError):
    """No such ledger entry on this account."""


class NotRefundableError(RefusedError):
    """Only a charge that took something, or a removal, can be refunded."""


class AlreadyRefundedError(RefusedError):
    """The charge has been given back in full."""


class RefundExceedsOriginalError(RefusedError):
    """More than is left of the charge."""


class ExceedsGrantError(RefusedError):
    """More than is left of the grant."""


class PlanNotFoundError(RefusedError):
    """No such plan in the active version."""


class CapNotFoundError(RefusedError):
    """No such cap on this account."""


class TeamExistsError(RefusedError):
    """The id is taken, by a team or a user."""


class TeamNotFoundError(RefusedError):
    """No such team."""


class NotAMemberError(RefusedError):
    """The user is not, or no longer, a member of the team."""


class HoldExceededError(RefusedError):
    """The costs of a bounded hold would pass what it was given; `shortfall` says by how much."""


class MemberCapExceededError(RefusedError):
    """The member's spend cap has no room for the amount."""


class HasOpenHoldsError(RefusedError):
    """An account with open holds cannot be merged: settle or release them first."""


class TopupNotFoundError(RefusedError):
    """The account has no automatic top-up, or none is open under this key."""


class AccountFrozenError(RefusedError):
    """The account is frozen: it takes no holds, and no charges without one."""


class IdempotencyConflictError(RefusedError):
    """The key belongs to another request."""


# A SQLSTATE, or the two characters of a whole class.
SQLSTATES: dict[str, type[DuctoError]] = {
    "22": InvalidArgumentError,
    "22003": OutOfRangeError,
    **dict.fromkeys(("3F000", "42883", "42703"), NotInstalledError),
    "DU001": PricingNotLoadedError,
    "DU002": UnknownVersionError,
    "DU003": UnknownModelError,
    "DU004": UnknownJobError,
    "DU005": UnknownMetricError,
    "DU006": FormulaError,
    "DU007": LedgerImmutableError,
    "DU008": UnpricedUsageError,
    "DU009": NegativePriceError,
    **dict.fromkeys(("40001", "40P01", "53", "55P03", "57014"), ConcurrencyError),
    **dict.fromkeys(("25006", "25P03", "25P04", "57P01", "57P03", "57P04", "57P05"), UnavailableError),
    **dict.fromkeys(("08", "57P02"), OutcomeUnknownError),
}

REFUSALS: dict[str, type[DuctoError]] = {
    **{refusal.default_code: refusal for refusal in RefusedError.__subclasses__()},
    "invalid_argument": InvalidArgumentError,
    "unknown_model": UnknownModelError,
    "unknown_job": UnknownJobError,
    "unknown_metric": UnknownMetricError,
    "formula_error": FormulaError,
    "unpriced_usage": UnpricedUsageError,
    "negative_price": NegativePriceError,
    "out_of_range": OutOfRangeError,
}


def kind_of(sqlstate: str | None) -> type[DuctoError] | None:
    """The class of an error that the database raised, or None where the SQLSTATE is not one of ours."""
    return SQLSTATES.get(sqlstate or "") or SQLSTATES.get((sqlstate or "")[:2])


def from_refusal(code: str, result: Any = None) -> DuctoError:
    """The exception for a refusal; one that this version does not know yet is a plain `RefusedError`."""
    kind = REFUSALS.get(code, RefusedError)
    told = f"{code}: {kind.__doc__}" if code in REFUSALS and kind.__doc__ else code
    balances = (getattr(result, name, None) for name in ("balance_after", "balance", "team_balance_after"))
    balance = next((balance for balance in balances if balance is not None), None)
    if code == "insufficient_credits" and balance is not None:
        told += f" The balance is {balance}."
    return kind(told, code=code, result=result)
