"""Charging as the contract tells it, without a database: a reference for the SQL, written from the text alone.

Nothing here is kept that can be counted: what is spent, used, held or due is worked out from the rows each time. A call
decides first and writes last; a refusal is an exception. Names, arguments and answers are those of the RPCs. Answers
hold only what the contract determines; ids are this model's own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from itertools import count
from typing import Any
from zoneinfo import ZoneInfo

Answer = dict[str, Any]
Names = tuple[str | None, str | None]
Quote = tuple[Decimal, Names, list[str], str | None]
Price = Callable[..., Quote]
Due = tuple[datetime, "Lot", int]

REFUND_LOT = timedelta(hours=720)
GRANTS = ("purchase", "subscription", "signup_bonus", "promotion", "adjustment")
MOST = 2**63 - 1
COUNTS = ("points", "input_tokens", "output_tokens")
ELEMENT: dict[str, type] = {
    **dict.fromkeys(("user_id", "team_id", "job", "model", "reservation_id", "idempotency_key"), str),
    "metrics": dict,
    "amount": int,
    "final": bool,
}


class Refused(Exception):
    """A refusal, or misuse of which a batch answers the error; `told` is what the answer says besides."""

    def __init__(self, error: str, **told: Any) -> None:
        super().__init__(error)
        self.error = error
        self.told = told


@dataclass(frozen=True)
class Plan:
    """What a plan gives a month, and its own rates and factor."""

    allowance: int = 0
    rates: Mapping[str, Decimal] = field(default_factory=dict)
    factor: Decimal = Decimal(1)


@dataclass(frozen=True)
class Prices:
    """A published version: a usage of so many `points` costs the rate of its model a point, times the factors."""

    rates: Mapping[str, Decimal]
    jobs: Mapping[str, int] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    default_plan: str | None = None
    signup_bonus: int = 0
    min_balance: int = 5
    low_balance: int | None = None
    rounding: str = "carry"
    overrun: str = "debt"
    factor: Decimal = Decimal(1)

    def config(self, zone: str) -> dict[str, Any]:
        """The config to publish."""

        def formulas(rates: Mapping[str, Decimal]) -> dict[str, str]:
            return {model: f"points * {rate}" for model, rate in rates.items()}

        plans = {
            name: {"id": name, "name": name, "free_allowance": plan.allowance, "rate_overrides": formulas(plan.rates)}
            | {"factor": plan.factor}
            for name, plan in self.plans.items()
        }
        config: dict[str, Any] = {
            "match": "prefix",
            "models": formulas(self.rates),
            "metrics": {"points": 0},
            "fixed": dict(self.jobs),
            "plans": plans,
        }
        config |= {"timezone": zone, "signup_bonus": self.signup_bonus, "default_plan": self.default_plan}
        config |= {"min_balance": self.min_balance, "rounding": self.rounding, "overrun": self.overrun}
        config |= {"low_balance": self.low_balance, "factor": self.factor}
        return {name: value for name, value in config.items() if value is not None}

    @property
    def low(self) -> int:
        return 2 * self.min_balance if self.low_balance is None else self.low_balance


@dataclass(eq=False)
class Lot:
    """Credits that expire; `transaction_id` is the row that gave them."""

    lot_id: int
    transaction_id: str
    remainder: int
    expires_at: datetime
    expired: int = 0
    renewed: int = 0
    told: bool = False

    def gone(self, now: datetime) -> int:
        """What cannot be taken back: what has expired, or is due, kept for a hold or not."""
        return self.expired + (self.remainder if self.expires_at <= now else 0)


@dataclass(eq=False)
class Row:
    """A row of the ledger; `occurred_at` is when what an expiry writes was due.

    `taken` is what it took of which lot, in order, `outside` what of none; both less what refunds gave back: what paid
    a debt counts as `outside`, which may so become negative.
    """

    transaction_id: str
    seq: int
    type: str
    amount: int
    balance_after: int
    carry_after: Decimal
    created_at: datetime
    purchased_after: int
    allowance_used: int = 0
    allowance_lapsed: int = 0
    cost: Decimal | None = None
    actor_id: str | None = None
    model: str | None = None
    resolved_model: str | None = None
    reservation_id: str | None = None
    pricing_version: int | None = None
    plan_id: str | None = None
    refers_to: str | None = None
    expires_at: datetime | None = None
    occurred_at: datetime | None = None
    price_error: str | None = None
    taken: list[tuple[Lot, int]] = field(default_factory=list)
    outside: int = 0
    refunded: int = 0
    refunded_allowance: int = 0
    removed: int = 0


@dataclass(eq=False)
class Hold:
    """Credits held; `end` is the request and the answer of the keyless settlement that ended it."""

    reservation_id: str
    actor_id: str | None
    amount: int
    taken_at: datetime
    expires_at: datetime
    min_balance: int | None
    version: int
    plan: str | None
    names: Names
    status: str = "active"
    charged: int = 0
    given: int = 0
    cost: Decimal = Decimal(0)
    told: bool = False
    end: tuple[Any, Answer] | None = None


@dataclass(eq=False)
class Cap:
    """A bound of a window; `told` is the window in which a warning was told last."""

    limit: int
    action: str
    told: date | None = None


@dataclass(eq=False)
class Member:
    """A member of a team, present or gone."""

    role: str
    spend_cap: int | None
    period: str
    present: bool = True


@dataclass(eq=False)
class Account:
    """A user or a team with all that ever happened to it."""

    account_id: str
    kind: str
    changed_at: datetime
    plan: str | None = None
    name: str | None = None
    balance: int = 0
    carry: Decimal = Decimal(0)
    credit_limit: int = 0
    lifetime_purchased: int = 0
    rows: list[Row] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    lots: list[Lot] = field(default_factory=list)
    caps: dict[tuple[str, str | None], Cap] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    keys: dict[tuple[str, str], tuple[Any, Answer]] = field(default_factory=dict)
    events: list[tuple[str, Answer]] = field(default_factory=list)
    changes: int = 0
    refused: int | None = None  # What must be available before another refusal for funds is told.
    told: tuple[date | None, int] = (None, 0)  # The percent of the allowance that was told last, and of which month.

    def open_holds(self, now: datetime, but: Hold | None = None) -> list[Hold]:
        return [hold for hold in self.holds if is_open(hold, now) and hold is not but]

    def held(self, now: datetime, but: Hold | None = None) -> int:
        return sum(hold.amount for hold in self.open_holds(now, but))

    def live_lots(self, now: datetime) -> list[Lot]:
        return [lot for lot in in_order(self.lots) if lot.expires_at > now]

    def due_lots(self, now: datetime) -> list[tuple[Lot, int]]:
        """The lots that are due, each with what it keeps."""
        found, kept = [], 0
        for lot in in_order(self.lots):
            if lot.expires_at <= now:
                held = sum(hold.amount for hold in self.open_holds(now) if hold.taken_at < lot.expires_at)
                keeps = min(lot.remainder, max(0, held - kept))
                kept += keeps
                found.append((lot, keeps))
        return found

    def expiries(self, now: datetime) -> Iterator[Due]:
        """What of which lot expires at which moment until now and is not recorded, in order.

        The last change recorded all that was due then: if there is more of that time, it let a hold go.
        """
        ends = [lot.expires_at for lot in self.lots] + [hold.expires_at for hold in self.holds]
        gone: dict[Lot, int] = {}
        for moment in sorted({max(end, self.changed_at) for end in [self.changed_at, *ends]}):
            if moment > now:
                return
            for lot, keeps in self.due_lots(moment):
                if expired := lot.remainder - keeps - gone.get(lot, 0):
                    gone[lot] = lot.remainder - keeps
                    yield moment, lot, expired

    def kept(self, now: datetime) -> int:
        return sum(keeps for _, keeps in self.due_lots(now))

    def net(self, now: datetime) -> int:
        """The balance without what is due."""
        return self.balance - sum(lot.remainder - keeps for lot, keeps in self.due_lots(now))


def is_open(hold: Hold, now: datetime) -> bool:
    return hold.status == "active" and now < hold.expires_at


def shown(hold: Hold, now: datetime) -> tuple[str, int]:
    """A hold's status, and what it holds."""
    expired = hold.status == "active" and not is_open(hold, now)
    return ("expired", 0) if expired else (hold.status, hold.amount)


def in_order(lots: Iterable[Lot]) -> list[Lot]:
    """The lots that have credits, soonest expiry first, then oldest."""
    return sorted((lot for lot in lots if lot.remainder), key=lambda lot: (lot.expires_at, lot.lot_id))


def matches(model: str | None, names: Names) -> bool:
    """Whether a cap of this model, or of all, matches."""
    return model is None or model in names


def asked(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A usage as requests are compared: without nulls and zeros."""
    return {name: value for name, value in metrics.items() if value is not None and value != 0}


def most_first(rows: list[Answer]) -> list[Answer]:
    """Rows of statistics, those that spent most first, then by name."""
    return sorted(rows, key=lambda row: (-row["total_spend"], next(iter(row.values()))))


class Billing:
    """All accounts under these prices; the first version is active. `clock` is the wall clock and may be set."""

    def __init__(self, zone: str, versions: list[Prices], clock: datetime) -> None:
        self.zone = ZoneInfo(zone)
        self.versions = versions
        self.activations: list[tuple[int, datetime | None]] = [(0, None)]
        self.clock = clock
        self.accounts: dict[str, Account] = {}
        self._touched: list[Account] = []
        self._numbers = count(1)

    def call(self, rpc: str, arguments: Mapping[str, Any]) -> Any:
        """A call, after which no account that has enough counts as refused."""
        self._touched.clear()
        answer = getattr(self, rpc)(**arguments)
        for account in self._touched:
            if account.refused is not None and self._available(account) >= account.refused:
                account.refused = None
        return answer

    # Accounts, time, prices

    def active(self, now: datetime) -> int:
        """Of the activations whose time has come, the one recorded last."""
        return [version for version, at in self.activations if at is None or at <= now][-1]

    def prices(self, account: Account) -> Prices:
        return self.versions[self.active(self.now(account))]

    def _id(self, kind: str) -> str:
        return f"{kind}{next(self._numbers)}"

    def now(self, account: Account) -> datetime:
        return max(self.clock, account.changed_at)

    def window(self, period: str, at: datetime) -> date | None:
        """The local day or month of that time, by its first day; None is the whole life."""
        day = at.astimezone(self.zone).date()
        return {"daily": day, "monthly": day.replace(day=1), "lifetime": None}[period]

    def month(self, at: datetime) -> tuple[datetime, datetime]:
        """Start and end of the local month of that time."""
        local = at.astimezone(self.zone)
        start = local.replace(day=1, hour=0, minute=0, second=0, microsecond=0, fold=0)
        return start, (start + timedelta(days=32)).replace(day=1)

    def tomorrow(self, at: datetime) -> datetime:
        """The end of the local day of that time."""
        local = at.astimezone(self.zone)
        return local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0) + timedelta(1)

    def terms(self, version: int, plan: str | None) -> Plan:
        """A plan's terms: of the last version up to this one that has it, else of the first after it."""
        having = [number for number, prices in enumerate(self.versions) if plan in prices.plans]
        if plan is None or not having:
            return Plan()
        before = [number for number in having if number <= version]
        return self.versions[before[-1] if before else having[0]].plans[plan]

    def _rates(self, version: int, plan: str | None) -> list[Mapping[str, Decimal]]:
        """A plan's own rates, then those of the list."""
        return [self.terms(version, plan).rates, self.versions[version].rates]

    def names(self, model: str | None, version: int, plan: str | None) -> Names:
        """A model as given and as resolved.

        Of the plan's keys, else of the list's, it is the longest that is the name or its beginning before a separator.
        """
        name = model or ""
        for rates in self._rates(version, plan):
            keys = [key for key in rates if name == key or (name.startswith(key) and name[len(key)] in "-@:/_")]
            if keys:
                return model, max(keys, key=len)
        return model, None

    def _usage(self, metrics: Mapping[str, Any]) -> Price:
        """What prices a usage, for a version and a plan: cost, model as given and resolved, warnings, and why not.

        At a settlement `held` is the hold's model, or ''.
        """
        if any((metrics.get(name) or 0) < 0 for name in COUNTS):
            raise Refused("invalid_argument")

        def price(version: int, plan: str | None, held: str | None = None) -> Quote:
            if not metrics.keys() <= {"model", *COUNTS} and held is None:
                raise Refused("unknown_metric")
            warnings = []
            named = given = metrics.get("model")
            rates, resolved = self._rates_of(named, version, plan)
            if not rates and held:
                rates, resolved = self._rates_of(held, version, plan)
                named = held if rates else named
                warnings += ["priced_by_hold_model"] if rates else []
            if not rates and named is not None:
                raise Refused("unknown_model", message=f"unknown model '{named}'")
            unpriced = [
                name
                for name, count in sorted(metrics.items())
                if name != "model" and count and (name != "points" or not rates)
            ]
            if unpriced and held is None:
                raise Refused("unpriced_usage")
            reason = f"no formula of this price names {', '.join(unpriced)}" if unpriced else None
            warnings += ["unpriced_usage"] if unpriced else []
            if named is not None and not any(count for name, count in metrics.items() if name != "model"):
                warnings.append("no_usage")
            factor = self.versions[version].factor * self.terms(version, plan).factor
            cost = Decimal(metrics.get("points") or 0) * rates[0] * factor if rates else Decimal(0)
            return cost, (given, resolved), warnings, reason

        return price

    def _rates_of(self, name: str | None, version: int, plan: str | None) -> tuple[list[Decimal], str | None]:
        """What a point of a model costs, by the plan before the list, and the key that says so (None: `_default`)."""
        _, resolved = self.names(name, version, plan)
        key = resolved or "_default"
        return [rates[key] for rates in self._rates(version, plan) if key in rates], resolved

    def _job(self, name: str) -> Price:
        def price(version: int, plan: str | None) -> Quote:
            if name not in self.versions[version].jobs:
                raise Refused("unknown_job")
            return Decimal(self.versions[version].jobs[name]), (None, None), [], None

        return price

    def _amount(self, amount: int, model: str | None) -> Price:
        if amount < 0:
            raise Refused("invalid_argument")
        return lambda version, plan, held=None: (Decimal(amount), self.names(model, version, plan), [], None)

    def credits(self, cost: Decimal, carry: Decimal, rounding: str) -> tuple[int, Decimal]:
        """What a cost takes, and the carry after it."""
        if rounding == "carry":
            charged = int((carry + cost).to_integral_value(ROUND_FLOOR))
            return charged, carry + cost - charged
        if rounding == "half_up":
            return int((cost + Decimal("0.5")).to_integral_value(ROUND_FLOOR)), carry
        return int(cost.to_integral_value(ROUND_CEILING if rounding == "up" else ROUND_FLOOR)), carry

    def allowance_left(self, account: Account, now: datetime) -> int:
        month = self.window("monthly", now)
        used = sum(row.allowance_used for row in account.rows if self.window("monthly", row.created_at) == month)
        return max(0, self.terms(self.active(now), account.plan).allowance - used)

    def spent(self, account: Account, period: str, now: datetime, counts: Callable[[Row], bool]) -> int:
        """Credits debited in the window by the charges that count, less what was refunded of them."""
        return sum(
            -row.amount - row.refunded
            for row in account.rows
            if row.type == "usage" and counts(row) and self.window(period, row.created_at) == self.window(period, now)
        )

    def spent_of_cap(self, account: Account, kind: str, model: str | None, now: datetime) -> int:
        return self.spent(account, kind, now, lambda row: matches(model, (row.model, row.resolved_model)))

    def spent_of_member(self, account: Account, user: str, period: str, now: datetime) -> int:
        return self.spent(account, period, now, lambda row: row.actor_id == user)

    # What every call does

    def _open(self, account_id: str) -> Account:
        """The account, or as it would be opened now."""
        if account_id in self.accounts:
            return self.accounts[account_id]
        prices = self.versions[self.active(self.clock)]
        account = Account(account_id, "user", self.clock, prices.default_plan)
        account.balance = prices.signup_bonus
        told = {"kind": "user", "plan_id": account.plan, "balance": account.balance}
        account.events.append(("account_opened", told))
        if account.balance:
            account.balance = 0
            self._write(account, "signup_bonus", prices.signup_bonus, self.clock)
        return account

    def _charged_account(self, account_id: str) -> Account:
        """The account of a hold or a charge, opened if the prices say so."""
        prices = self.versions[self.active(self.clock)]
        if account_id not in self.accounts and not prices.signup_bonus and not prices.default_plan:
            raise Refused("account_not_found", balance=0, of=None)
        return self._open(account_id)

    def _begin(self, account: Account) -> datetime:
        """A success: what is due is written first."""
        now = self.now(account)
        due = list(account.expiries(now))
        self.accounts[account.account_id] = account
        self._touched.append(account)
        account.changed_at = now
        account.changes += 1
        self._end_holds(account, now)
        self._expire(account, due, now)
        return now

    def _expire(self, account: Account, due: list[Due], now: datetime) -> None:
        for moment, lot, expired in due:
            lot.remainder -= expired
            lot.expired += expired
            about = {"refers_to": lot.transaction_id, "expires_at": lot.expires_at, "occurred_at": moment}
            before = self._at_hand(account, now)
            self._write(account, "expiry", -expired, now, **about)
            self._tell_low(account, before, now)
            told = {"transaction_id": lot.transaction_id, "amount": expired, "expires_at": lot.expires_at}
            account.events.append(("lot_expired", told))

    def _end_holds(self, account: Account, now: datetime) -> bool:
        """Tell which holds have expired; whether any has that was not told."""
        ended = [hold for hold in account.holds if hold.status == "active" and hold.expires_at <= now and not hold.told]
        for hold in ended:
            hold.told = True
            told = {"actor_id": hold.actor_id or account.account_id, "amount": hold.amount, "charged": hold.charged}
            told |= {"reservation_id": hold.reservation_id, "expires_at": hold.expires_at}
            account.events.append(("hold_expired", told))
        return bool(ended)

    def _available(self, account: Account) -> int:
        available: int = self.get_balance(account.account_id)["available"]
        return available

    def _at_hand(self, account: Account, now: datetime) -> int:
        """What is available and what is reserved, by the balance as it is written."""
        floor = self._min_balance(account) - account.credit_limit
        return max(account.held(now), self.allowance_left(account, now) + max(0, account.balance - floor))

    def _tell_low(self, account: Account, before: int, now: datetime) -> None:
        low = self.versions[self.active(now)].low
        if low and before > low >= self._at_hand(account, now):
            account.events.append(("low_balance", {"balance": account.balance, "low_balance": low}))

    def _refuse_funds(self, account: Account, amount: int, actor: str | None, **told: Any) -> Refused:
        """A refusal for funds: the first is told, where the account is open."""
        if account.account_id in self.accounts:
            available = self._available(account)
            if account.refused is None or available >= account.refused:
                account.refused = max(amount, available + 1)
                about = {"actor_id": actor or account.account_id, "amount": amount, "available": available}
                account.events.append(("refused", about))
        return self._refused(account, "insufficient_credits", **told)

    def _tell_allowance(self, account: Account, now: datetime) -> None:
        month, left = self.window("monthly", now), self.allowance_left(account, now)
        used = sum(row.allowance_used for row in account.rows if self.window("monthly", row.created_at) == month)
        known = account.told[1] if account.told[0] == month else 0
        for percent in (80, 100):
            if known < percent and used * 100 >= (used + left) * percent:
                account.told = (month, percent)
                told = {
                    "percent": percent,
                    "plan_id": account.plan,
                    "allowance_used": used,
                    "allowance_remaining": left,
                }
                account.events.append(("allowance_used", told))

    def _write(self, account: Account, kind: str, amount: int, now: datetime, **more: Any) -> Row:
        before, account.balance = account.balance, account.balance + amount
        row = Row(
            transaction_id=self._id("row"),
            seq=len(account.rows) + 1,
            type=kind,
            amount=amount,
            balance_after=account.balance,
            carry_after=account.carry,
            created_at=now,
            purchased_after=account.lifetime_purchased,
            **more,
        )
        account.rows.append(row)
        if before >= 0 > account.balance:
            account.events.append(("debt_begun", {"balance": account.balance}))
        return row

    def _first(self, account_id: str, space: str, key: str | None, request: Any) -> Answer | None:
        """The first answer to this request, if the key has been used."""
        account = self.accounts.get(account_id)
        if account is None or key is None or (space, key) not in account.keys:
            return None
        first, answer = account.keys[space, key]
        if first != request:
            raise self._refused(account, "idempotency_conflict")
        return answer | {"idempotent": True}

    def _remember(self, account: Account, space: str, key: str | None, request: Any, answer: Answer) -> Answer:
        if key is not None:
            account.keys[space, key] = request, answer
        return answer

    def _refused(self, account: Account, error: str, **told: Any) -> Refused:
        """A refusal that tells how the account stands; one that is not open yet has nothing."""
        now, known = self.now(account), account.account_id in self.accounts
        told |= {"balance": account.net(now) if known else 0, "reserved_total": account.held(now)}
        return Refused(error, of=account.account_id if known else None, **told)

    def _check_range(self, account: Account, *values: int) -> None:
        if any(abs(value) > MOST for value in values):
            raise self._refused(account, "out_of_range")

    # Admission, caps, burning

    def _demand(self, account: Account, amount: int, matched: int) -> int:
        """What would be debited of the holds that a cap matches and of the amount."""
        now = self.now(account)
        return min(matched + amount, max(0, account.held(now) + amount - self.allowance_left(account, now)))

    def _exceeds(self, account: Account, amount: int, matched: int, spent: int, limit: int) -> bool:
        demand = self._demand(account, amount, matched)
        return demand > self._demand(account, 0, matched) and spent + demand > limit

    def _exceeded(self, account: Account, amount: int, names: Names) -> list[tuple[int, str, str, Cap, int]]:
        """The caps that an amount would exceed: room, kind, model, cap and what is spent."""
        found, now = [], self.now(account)
        for (kind, model), cap in account.caps.items():
            matched = sum(hold.amount for hold in account.open_holds(now) if matches(model, hold.names))
            spent = self.spent_of_cap(account, kind, model, now)
            if matches(model, names) and self._exceeds(account, amount, matched, spent, cap.limit):
                room = cap.limit - spent - self._demand(account, amount, matched)
                found.append((room, kind, model or "", cap, spent))
        return found

    def _admit(self, account: Account, amount: int, names: Names, member: str | None, least: int | None) -> list[Cap]:
        """Refuse what no cap or funds admit; the caps that warn."""
        now = self.now(account)
        held, left = account.held(now), self.allowance_left(account, now)
        warning = [cap for *_, cap, _ in self._exceeded(account, amount, names)]
        if any(cap.action == "deny" for cap in warning):
            raise self._refused(account, "spend_cap_exceeded")
        if member is not None and (limit := account.members[member].spend_cap) is not None:
            matched = sum(hold.amount for hold in account.open_holds(now) if hold.actor_id == member)
            spent = self.spent_of_member(account, member, account.members[member].period, now)
            if self._exceeds(account, amount, matched, spent, limit):
                raise self._refused(account, "member_cap_exceeded")
        floor = (self._min_balance(account) if least is None else least) - account.credit_limit
        needed = max(0, held + amount - left)
        if amount and needed and account.net(now) - needed < floor:
            raise self._refuse_funds(account, amount, member)
        return warning

    def _min_balance(self, account: Account) -> int:
        return 0 if account.kind == "team" else self.prices(account).min_balance

    def _tell(self, account: Account, caps: Iterable[Cap], now: datetime) -> None:
        """One event per window and cap that warns."""
        for (kind, model), cap in account.caps.items():
            if cap in caps and cap.action != "deny" and cap.told != self.window(kind, now):
                cap.told = self.window(kind, now)
                told = {"cap_type": kind, "model": model, "label": None, "limit": cap.limit, "action": cap.action}
                told["spent"] = self.spent_of_cap(account, kind, model, now)
                account.events.append(("cap_warned", told))

    def _burn(
        self, account: Account, debit: int, now: datetime, hold: Hold | None = None, own: Lot | None = None
    ) -> tuple[list[tuple[Lot, int]], int]:
        """Take credits from lots, soonest expiry first, and tell what of no lot is left to take.

        First comes a removed grant's own lot; what due lots keep is only for a hold taken before their expiry.
        """
        taken: list[tuple[Lot, int]] = []
        left = debit

        def take(lot: Lot, most: int) -> int:
            nonlocal left
            part = min(lot.remainder, left, most)
            if part:
                lot.remainder -= part
                left -= part
                taken.append((lot, part))
            return part

        if own is not None and own.expires_at > now:
            take(own, left)
        if hold is not None and is_open(hold, now):
            mine = hold.amount
            for lot, _ in account.due_lots(now):
                if hold.taken_at < lot.expires_at:
                    mine -= take(lot, mine)
        for lot in account.live_lots(now):
            take(lot, left)
        return taken, left

    # Money in and out

    def add_credits(
        self,
        user_id: str,
        amount: int,
        type: str = "adjustment",
        expires_at: datetime | None = None,
        idempotency_key: str | None = None,
    ) -> Answer:
        if amount <= 0:
            raise Refused("invalid_argument")
        request = ("add", amount, type)
        if first := self._first(user_id, "ledger", idempotency_key, request):
            return first
        account = self._open(user_id)
        if expires_at is not None and expires_at <= self.now(account):
            raise Refused("invalid_argument")
        now = self.now(account)
        purchased = account.lifetime_purchased + (amount if type == "purchase" else 0)
        self._check_range(account, account.net(now) + amount, purchased)
        now = self._begin(account)
        debt = max(0, account.kept(now) - account.balance)
        if type == "purchase":
            account.lifetime_purchased += amount
        row = self._write(account, type, amount, now, expires_at=expires_at)
        if expires_at is not None and amount > debt:
            account.lots.append(Lot(next(self._numbers), row.transaction_id, amount - debt, expires_at))
        return self._remember(account, "ledger", idempotency_key, request, self._added(account, row))

    def _added(self, account: Account, row: Row) -> Answer:
        return {
            "transaction_id": row.transaction_id,
            "user_id": account.account_id,
            "amount": row.amount,
            "new_balance": row.balance_after,
            "lifetime_purchased": account.lifetime_purchased,
            "idempotent": False,
        }

    def remove_credits(
        self, user_id: str, amount: int, transaction_id: str | None = None, idempotency_key: str | None = None
    ) -> Answer:
        if amount <= 0:
            raise Refused("invalid_argument")
        request = ("remove", amount, transaction_id)
        if first := self._first(user_id, "ledger", idempotency_key, request):
            return first
        if user_id not in self.accounts:
            raise Refused("account_not_found", balance=0, of=None)
        account = self.accounts[user_id]
        grant, own = None, None
        if transaction_id is not None:
            grant = next((row for row in account.rows if row.transaction_id == transaction_id), None)
            if grant is None or grant.type not in GRANTS:
                raise self._refused(account, "transaction_not_found")
            own = next((lot for lot in account.lots if lot.transaction_id == transaction_id), None)
            if grant.removed + amount > grant.amount - (own.gone(self.now(account)) if own else 0):
                raise self._refused(account, "exceeds_grant")
        self._check_range(account, account.net(self.now(account)) - amount)
        now = self._begin(account)
        taken, outside = self._burn(account, amount, now, own=own)
        if grant is not None:
            grant.removed += amount
            account.lifetime_purchased -= amount if grant.type == "purchase" else 0
        before = self._at_hand(account, now)
        row = self._write(account, "removal", -amount, now, refers_to=transaction_id, taken=taken, outside=outside)
        self._tell_low(account, before, now)
        return self._remember(account, "ledger", idempotency_key, request, self._added(account, row))

    def set_credit_limit(self, user_id: str, limit: int) -> Answer:
        account = self._open(user_id)
        now = self._begin(account)
        before = self._at_hand(account, now)
        account.credit_limit = limit
        self._tell_low(account, before, now)
        return self.get_balance(user_id)

    # Holds

    def reserve(self, user_id: str, metrics: Mapping[str, Any], **rest: Any) -> Answer:
        request = ("reserve", None, asked(metrics))
        return self._reserve(user_id, None, self._usage(metrics), request, **rest)

    def reserve_credits(self, user_id: str, amount: int, model: str | None = None, **rest: Any) -> Answer:
        request = ("reserve_credits", None, amount, model)
        return self._reserve(user_id, None, self._amount(amount, model), request, **rest)

    def reserve_team(self, team_id: str, user_id: str, metrics: Mapping[str, Any], **rest: Any) -> Answer:
        request = ("reserve_team", user_id, asked(metrics))
        return self._reserve(team_id, user_id, self._usage(metrics), request, **rest)

    def reserve_team_credits(
        self, team_id: str, user_id: str, amount: int, model: str | None = None, **rest: Any
    ) -> Answer:
        request = ("reserve_team_credits", user_id, amount, model)
        return self._reserve(team_id, user_id, self._amount(amount, model), request, **rest)

    def _account_of(self, account_id: str, member: str | None) -> Account:
        """The account that a hold or a charge may use: of a user, or of a team for a member."""
        if member is None:
            account = self._charged_account(account_id)
            if account.kind == "team":
                raise self._refused(account, "is_a_team")
            return account
        team = self.accounts.get(account_id)
        if team is None or team.kind != "team":
            raise Refused("team_not_found")
        return team

    def _check_member(self, account: Account, member: str | None) -> None:
        if member is not None and not (member in account.members and account.members[member].present):
            raise self._refused(account, "not_a_member")

    def _reserve(
        self,
        account_id: str,
        member: str | None,
        price: Price,
        request: Any,
        min_balance: int | None = None,
        ttl_seconds: int = 600,
        idempotency_key: str | None = None,
    ) -> Answer:
        if first := self._first(account_id, "holds", idempotency_key, request):
            return first
        account = self._account_of(account_id, member)
        self._check_member(account, member)
        version = self.active(self.now(account))
        cost, names, warnings, _ = price(version, account.plan)
        amount = int(cost.to_integral_value(ROUND_CEILING))
        warning = self._admit(account, amount, names, member, min_balance)
        self._check_range(account, account.held(self.now(account)) + amount)
        now = self._begin(account)
        account.refused = None if amount else account.refused
        hold = Hold(
            reservation_id=self._id("hold"),
            actor_id=member,
            amount=amount,
            taken_at=now,
            expires_at=now + timedelta(seconds=ttl_seconds),
            min_balance=min_balance,
            version=version,
            plan=account.plan,
            names=names,
            given=amount,
        )
        account.holds.append(hold)
        self._tell(account, warning, now)
        answer = self._hold_answer(account, hold, now, warning)
        answer["warnings"] = warnings + answer["warnings"]
        return self._remember(account, "holds", idempotency_key, request, answer)

    def _hold_answer(self, account: Account, hold: Hold, now: datetime, warning: list[Cap]) -> Answer:
        return {
            "reservation_id": hold.reservation_id,
            "user_id": hold.actor_id or account.account_id,
            "amount": hold.amount if is_open(hold, now) else 0,
            "balance": account.net(now),
            "reserved_total": account.held(now),
            "expires_at": hold.expires_at,
            "warnings": ["spend_cap_exceeded"] if warning else [],
            "idempotent": False,
        }

    def _hold(self, reservation_id: str, user_id: str | None) -> tuple[Account, Hold]:
        for account in self.accounts.values():
            for hold in account.holds:
                if hold.reservation_id == reservation_id and user_id in (None, account.account_id):
                    return account, hold
        known = self.accounts.get(user_id or "")
        raise self._refused(known, "reservation_not_found") if known else Refused("reservation_not_found")

    def extend_reservation(
        self,
        reservation_id: str,
        add_amount: int = 0,
        ttl_seconds: int | None = None,
        user_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Answer:
        if add_amount < 0:
            raise Refused("invalid_argument")
        request = ("extend", reservation_id, add_amount)
        if user_id is not None and (first := self._first(user_id, "holds", idempotency_key, request)):
            return first
        account, hold = self._hold(reservation_id, user_id)
        if first := self._first(account.account_id, "holds", idempotency_key, request):
            return first
        if not is_open(hold, self.now(account)):
            raise self._refused(account, "reservation_not_active")
        if add_amount:
            self._check_member(account, hold.actor_id)
        warning = self._admit(account, add_amount, hold.names, hold.actor_id, hold.min_balance)
        self._check_range(account, account.held(self.now(account)) + add_amount)
        now = self._begin(account)
        account.refused = None if add_amount else account.refused
        hold.amount += add_amount
        hold.given += add_amount
        if ttl_seconds is not None:
            hold.expires_at = max(hold.expires_at, now + timedelta(seconds=ttl_seconds))
        self._tell(account, warning, now)
        answer = self._hold_answer(account, hold, now, warning)
        return self._remember(account, "holds", idempotency_key, request, answer)

    def release_reservation(self, reservation_id: str, user_id: str | None = None) -> Answer:
        account, hold = self._hold(reservation_id, user_id)
        if hold.status == "settled":
            raise self._refused(account, "reservation_not_active")
        again = hold.status == "released"
        if not again:
            self._begin(account)
            hold.status, hold.amount = "released", 0
        return self._hold_answer(account, hold, self.now(account), []) | {"idempotent": again}

    # Charges

    def deduct(self, user_id: str, metrics: Mapping[str, Any], **rest: Any) -> Answer:
        return self._charge(user_id, None, self._usage(metrics), ("deduct", asked(metrics)), **rest)

    def deduct_credits(self, user_id: str, amount: int, model: str | None = None, **rest: Any) -> Answer:
        return self._charge(user_id, None, self._amount(amount, model), ("deduct_credits", amount, model), **rest)

    def deduct_fixed(self, user_id: str, job_name: str, idempotency_key: str | None = None) -> Answer:
        request = ("deduct_fixed", job_name)
        return self._charge(user_id, None, self._job(job_name), request, idempotency_key=idempotency_key)

    def deduct_team(self, team_id: str, user_id: str, metrics: Mapping[str, Any], **rest: Any) -> Answer:
        return self._charge(team_id, user_id, self._usage(metrics), ("deduct_team", asked(metrics)), **rest)

    def deduct_team_credits(
        self, team_id: str, user_id: str, amount: int, model: str | None = None, **rest: Any
    ) -> Answer:
        request = ("deduct_team_credits", amount, model)
        return self._charge(team_id, user_id, self._amount(amount, model), request, **rest)

    def _charge(
        self,
        account_id: str,
        member: str | None,
        price: Price,
        asked: Any,
        idempotency_key: str | None = None,
        reservation_id: str | None = None,
        final: bool = True,
    ) -> Answer:
        request = (asked, member, reservation_id, final)
        if first := self._first(account_id, "ledger", idempotency_key, request):
            return first
        account = self._account_of(account_id, member)
        named = (reservation_id, member)
        hold = next((hold for hold in account.holds if (hold.reservation_id, hold.actor_id) == named), None)
        if hold is None:
            if reservation_id is not None:
                raise self._refused(account, "reservation_not_found")
            self._check_member(account, member)
        elif hold.status != "active":
            if hold.end is None or idempotency_key is not None or not final:
                raise self._refused(account, "reservation_not_active")
            if hold.end[0] != request:
                raise self._refused(account, "idempotency_conflict")
            return hold.end[1] | {"idempotent": True}
        version, plan = (hold.version, hold.plan) if hold else (self.active(self.now(account)), account.plan)
        if hold is None:
            cost, names, warnings, reason = price(version, plan)
        else:
            cost, names, warnings, reason = self._settlement(price, hold, final, asked)
        terms = self.versions[version]
        charged, carry = self.credits(cost, account.carry, terms.rounding)
        now = self.now(account)
        left = self.allowance_left(account, now)
        shortfall, warning = 0, []
        if hold is None:
            warning = self._admit(account, charged, names, member, None)
        else:
            held, others = hold.amount if is_open(hold, now) else 0, account.held(now, hold)
            free = account.net(now) + left + account.credit_limit - held - others
            shortfall = max(0, charged - held - max(0, free))
            budget = hold.given - hold.cost if is_open(hold, now) else hold.amount
            if terms.overrun == "debt" and cost > max(0, budget) and "priced_by_hold" not in warnings:
                warnings.append("hold_exceeded")
            if not is_open(hold, now):
                warnings.append("reservation_expired")
            if shortfall and terms.overrun == "reject":
                raise self._refuse_funds(account, charged, member, shortfall=shortfall)
            self._check_range(account, account.net(now) - max(0, charged - left), hold.charged + charged)
        now = self._begin(account)
        debit = max(0, charged - left)
        at_hand = self._at_hand(account, now)
        account.refused = None if charged and hold is None else account.refused
        spent = {cap: self.spent_of_cap(account, *named, now) for named, cap in account.caps.items()}
        matching = [cap for (_, model), cap in account.caps.items() if matches(model, names)]
        if hold is not None:
            warning = [cap for cap in matching if debit and spent[cap] + debit > cap.limit]
        if warning:
            warnings.append("spend_cap_exceeded")
        if hold is not None and member is not None and debit:
            of = account.members[member]
            before = self.spent_of_member(account, member, of.period, now)
            if of.spend_cap is not None and before + debit > of.spend_cap:
                warnings.append("member_cap_exceeded")
        if member is not None and (limit := account.members[member].spend_cap) is not None:
            period = account.members[member].period
            before = self.spent_of_member(account, member, period, now)
            if before < limit <= before + debit:
                reached = {"user_id": member, "spend_cap": limit, "spend_cap_period": period, "spent": before + debit}
                account.events.append(("member_cap_reached", reached))
        taken, outside = self._burn(account, debit, now, hold)
        account.carry = carry
        row = self._write(
            account,
            "usage",
            -debit,
            now,
            allowance_used=charged - debit,
            cost=cost,
            actor_id=member,
            model=names[0],
            resolved_model=names[1],
            reservation_id=reservation_id,
            pricing_version=version + 1,
            plan_id=plan,
            taken=taken,
            outside=outside,
            price_error=reason,
        )
        alike = [of for of in account.rows[:-1] if (of.price_error, of.pricing_version) == (reason, version + 1)]
        if reason and not any(self.window("daily", of.created_at) == self.window("daily", now) for of in alike):
            told = {"transaction_id": row.transaction_id, "pricing_version": version + 1, "reason": reason}
            account.events.append(("settlement_unpriced", told))
        self._tell(account, warning, now)
        for (kind, model), cap in account.caps.items():
            if cap.action == "deny" and cap in matching and spent[cap] < cap.limit <= spent[cap] + debit:
                told = {"cap_type": kind, "model": model, "label": None, "limit": cap.limit, "action": "deny"}
                account.events.append(("cap_reached", told | {"spent": spent[cap] + debit}))
        answer = {
            "transaction_id": row.transaction_id,
            "user_id": member or account_id,
            "amount": -debit,
            "balance_after" if member is None else "team_balance_after": row.balance_after,
            "idempotent": False,
            "cost": cost,
            "allowance_used": charged - debit,
            "shortfall": shortfall,
            "warnings": warnings,
        }
        if member is not None:
            answer["team_id"] = account_id
        if hold is not None:
            hold.charged += charged
            hold.cost += cost
            hold.amount = 0 if final else max(0, hold.amount - charged)
            if final:
                hold.status = "settled"
                hold.end = (request, answer) if idempotency_key is None else None
        if charged:
            self._tell_low(account, at_hand, now)
        if left:
            self._tell_allowance(account, now)
        return self._remember(account, "ledger", idempotency_key, request, answer)

    def _settlement(self, price: Price, hold: Hold, final: bool, asked: Any) -> Quote:
        """The price of a settlement, which is never refused for it: what cannot be priced costs what is held."""
        try:
            return price(hold.version, hold.plan, hold.names[0] or "")
        except Refused as refused:
            if refused.error == "invalid_argument":
                raise
            given = dict(asked[1]).get("model") if len(asked) == 2 else None
            return Decimal(hold.amount if final else 0), (given, None), ["priced_by_hold"], refused.told["message"]

    def deduct_batch(self, charges: list[Any]) -> list[Answer]:
        return [self._element(charge) for charge in charges]

    def _element(self, charge: Any) -> Answer:
        """The single call that an element is; what fails of it is its error."""
        given = {name: value for name, value in charge.items() if value is not None} if isinstance(charge, dict) else {}
        names = [given[name] for name in ("team_id", "user_id") if isinstance(given.get(name), str)]
        whose = names[0] if names else None
        try:
            answer = self._single(given)
        except Refused as refused:
            told: Answer = {"error": refused.error, "shortfall": refused.told.get("shortfall", 0)}
            if refused.error == "team_not_found":
                return told
            account = self.accounts.get(whose or "")
            told["balance_after"] = account.net(self.now(account)) if account else 0
            return told | {"of": whose if account else None}
        if "team_id" in given:
            answer = answer | {"balance_after": answer["team_balance_after"]}
        return {key: value for key, value in answer.items() if key not in ("team_id", "team_balance_after")}

    def _single(self, given: Answer) -> Answer:
        """An element `{user_id | team_id and user_id, metrics | amount and model | job, …}` as a call."""
        sound = given.keys() <= ELEMENT.keys() and all(isinstance(of, ELEMENT[name]) for name, of in given.items())
        what = [name for name in ("metrics", "amount", "job") if name in given]
        if not sound or "user_id" not in given or len(what) != 1 or ("model" in given and what != ["amount"]):
            raise Refused("invalid_argument")
        texts = [given[name] for name in ("user_id", "team_id", "job") if name in given]
        if any(not text or text != text.strip() for text in texts):
            raise Refused("invalid_argument")
        if not given.get("idempotency_key", "key").strip() or given.get("amount", 0) > MOST:
            raise Refused("invalid_argument")
        rpc, arguments = "deduct" + "_team" * ("team_id" in given) + "_credits" * ("amount" in given), dict(given)
        if "job" in given:
            rpc, arguments["job_name"] = "deduct_fixed", arguments.pop("job")
        answer: Answer = getattr(self, rpc)(**arguments)
        return answer

    # Refunds

    def refund_credits(
        self,
        transaction_id: str,
        amount: int | None = None,
        idempotency_key: str | None = None,
        user_id: str | None = None,
    ) -> Answer:
        if amount is not None and amount <= 0:
            raise Refused("invalid_argument")
        rows = {row.transaction_id: (account, row) for account in self.accounts.values() for row in account.rows}
        found = rows.get(transaction_id)
        account_id = user_id or (found[0].account_id if found else "")
        request = ("refund", transaction_id, amount)
        if first := self._first(account_id, "ledger", idempotency_key, request):
            return first
        if found is None or found[0].account_id != account_id:
            known = self.accounts.get(account_id)
            raise self._refused(known, "transaction_not_found") if known else Refused("transaction_not_found")
        account, charge = found
        charged = charge.allowance_used - charge.amount
        if charge.type not in ("usage", "removal") or not charged:
            raise self._refused(account, "not_refundable")
        rest = charged - charge.refunded - charge.refunded_allowance
        if not rest:
            raise self._refused(account, "already_refunded")
        if amount is not None and amount > rest:
            raise self._refused(account, "refund_exceeds_original")
        total = rest if amount is None else amount
        back = min(total, -charge.amount - charge.refunded)
        self._check_range(account, account.net(self.now(account)) + back)
        now = self._begin(account)
        debt = max(0, account.kept(now) - account.balance)
        allowance = total - back
        grant = next((row for row in account.rows if row.transaction_id == charge.refers_to), None)
        if grant is not None:
            grant.removed -= back
            account.lifetime_purchased += back if grant.type == "purchase" else 0
        lapses = self.window("monthly", charge.created_at) != self.window("monthly", now)
        row = self._write(
            account,
            "refund",
            back,
            now,
            refers_to=transaction_id,
            allowance_used=0 if lapses else -allowance,
            allowance_lapsed=allowance if lapses else 0,
            actor_id=charge.actor_id,
            model=charge.model,
            resolved_model=charge.resolved_model,
        )
        self._give_back(account, charge, row, back, debt, now)
        if charge.type == "removal":
            self._expire(account, list(account.expiries(now)), now)
        charge.refunded += back
        charge.refunded_allowance += allowance
        answer = {
            "refund_transaction_id": row.transaction_id,
            "original_transaction_id": transaction_id,
            "amount": back,
            "new_balance": row.balance_after,
            "allowance_restored": -row.allowance_used,
            "allowance_lapsed": row.allowance_lapsed,
            "idempotent": False,
        }
        return self._remember(account, "ledger", idempotency_key, request, answer)

    def _give_back(self, account: Account, charge: Row, row: Row, back: int, debt: int, now: datetime) -> None:
        """What was not of a lot comes back first, then lots, last first, as far as no debt takes it.

        What a removal of a lot's grant took elsewhere comes back there. What a removal took comes back to lots that are
        due, too, and expires.
        """
        left = min(back - max(0, min(charge.outside, back)), max(0, back - debt))
        charge.outside -= back - left
        new = 0
        for place in reversed(range(len(charge.taken))):
            lot, taken = charge.taken[place]
            part = min(taken, left)
            left -= part
            charge.taken[place] = lot, taken - part
            grant = next(grant for grant in account.rows if grant.transaction_id == lot.transaction_id)
            part = min(part, max(0, grant.amount - grant.removed - lot.expired - lot.renewed - lot.remainder))
            if lot.expires_at > now or charge.type == "removal":
                lot.remainder += part
            else:
                lot.renewed += part
                new += part
        if new:
            account.lots.append(Lot(next(self._numbers), row.transaction_id, new, now + REFUND_LOT))

    # Expiry

    def sweep_expired_credits(self, dry_run: bool = False) -> Answer:
        expired, lots = 0, 0
        for account in self.accounts.values():
            due = list(account.expiries(self.now(account)))
            expired += sum(amount for _, _, amount in due)
            lots += len({lot.lot_id for _, lot, _ in due})
            if dry_run:
                continue
            now = self.now(account)
            if due:
                self._begin(account)
            elif self._end_holds(account, now):
                account.changed_at = now
                self._touched.append(account)
            for lot in account.live_lots(now):
                if lot.expires_at <= now + timedelta(7) and not lot.told:
                    lot.told = True
                    told = {"transaction_id": lot.transaction_id, "amount": lot.remainder, "expires_at": lot.expires_at}
                    account.events.append(("credits_expiring", told))
                    self._touched.append(account)
        return {"expired_count": lots, "expired_amount": min(MOST, expired), "dry_run": dry_run}

    # Plans and caps

    def set_user_plan(self, user_id: str, plan_id: str | None = None) -> Answer:
        account = self._open(user_id)
        if plan_id is not None and plan_id not in self.prices(account).plans:
            raise Refused("plan_not_found")
        self._begin(account)
        if plan_id != account.plan:
            account.events.append(("plan_changed", {"from": account.plan, "to": plan_id}))
        account.plan = plan_id
        return {"user_id": user_id, "plan_id": plan_id}

    def set_spend_cap(
        self, user_id: str, limit: int, cap_type: str = "daily", model: str | None = None, action: str = "deny"
    ) -> Answer:
        account = self._open(user_id)
        self._begin(account)
        cap = account.caps.setdefault((cap_type, model), Cap(limit, action))
        cap.limit, cap.action = limit, action
        return self._cap(account, cap_type, model, cap)

    def _cap(self, account: Account, cap_type: str, model: str | None, cap: Cap) -> Answer:
        now = self.now(account)
        return {
            "user_id": account.account_id,
            "cap_type": cap_type,
            "model": model,
            "limit": cap.limit,
            "action": cap.action,
            "spent": self.spent_of_cap(account, cap_type, model, now),
            "resets_at": self.month(now)[1] if cap_type == "monthly" else self.tomorrow(now),
        }

    def list_spend_caps(self, user_id: str) -> list[Answer]:
        account = self.accounts[user_id]
        return [self._cap(account, kind, model, cap) for (kind, model), cap in account.caps.items()]

    def remove_spend_cap(self, user_id: str, cap_type: str, model: str | None = None) -> Answer:
        account = self.accounts.get(user_id)
        if account is None or (cap_type, model) not in account.caps:
            raise Refused("cap_not_found")
        self._begin(account)
        return self._cap(account, cap_type, model, account.caps.pop((cap_type, model)))

    def check_spend_cap(self, user_id: str, model: str | None = None, amount: int = 0) -> Answer:
        """Of the caps that the amount would exceed, the one that denies with least room, or the first that warns."""
        account = self._open(user_id)
        exceeded = self._exceeded(account, amount, self.names(model, self.active(self.now(account)), account.plan))
        if not exceeded:
            return {"capped": False, "current_spend": 0, "cap_limit": 0, "action": None, "model": None}
        deny = [found for found in exceeded if found[3].action == "deny"]
        _, _, of, cap, spent = min(deny or exceeded, key=lambda found: found[not deny : 3])
        told = {"current_spend": spent, "cap_limit": cap.limit, "action": cap.action, "model": of or None}
        return told | {"capped": cap.action == "deny"}

    # Teams

    def create_team(
        self, name: str, initial_balance: int = 0, idempotency_key: str | None = None, team_id: str | None = None
    ) -> Answer:
        account_id = team_id or (f"team of {idempotency_key}" if idempotency_key else self._id("team"))
        request = ("create_team", name, initial_balance)
        if first := self._first(account_id, "ledger", idempotency_key, request):
            return first
        if account_id in self.accounts:
            raise Refused("team_exists")
        account = Account(account_id, "team", self.clock, name=name)
        account.events.append(("account_opened", {"kind": "team", "plan_id": None, "balance": initial_balance}))
        now = self._begin(account)
        if initial_balance:
            self._write(account, "adjustment", initial_balance, now)
        answer = {"team_id": account_id, "name": name, "idempotent": False}
        return self._remember(account, "ledger", idempotency_key, request, answer)

    def _team(self, team_id: str) -> Account:
        account = self.accounts.get(team_id)
        if account is None or account.kind != "team":
            raise Refused("team_not_found")
        return account

    def add_team_member(
        self,
        team_id: str,
        user_id: str,
        role: str = "member",
        spend_cap: int | None = None,
        spend_cap_period: str = "lifetime",
    ) -> Answer:
        account = self._team(team_id)
        if user_id in self.accounts and self.accounts[user_id].kind == "team":
            raise Refused("is_a_team")
        self._begin(account)
        account.members[user_id] = Member(role, spend_cap, spend_cap_period)
        return {"team_id": team_id, "user_id": user_id, "role": role}

    def remove_team_member(self, team_id: str, user_id: str) -> Answer:
        account = self._team(team_id)
        self._check_member(account, user_id)
        self._begin(account)
        account.members[user_id].present = False
        return {"team_id": team_id, "user_id": user_id, "role": account.members[user_id].role}

    def get_team_members(self, team_id: str) -> list[Answer]:
        account = self.accounts[team_id]
        return [
            {
                "user_id": user,
                "role": member.role,
                "spend_cap": member.spend_cap,
                "spend_cap_period": member.period,
                "total_spent": self.spent_of_member(account, user, "lifetime", self.now(account)),
                "spent": self.spent_of_member(account, user, member.period, self.now(account)),
            }
            for user, member in sorted(account.members.items())
            if member.present
        ]

    # Reading

    def get_balance(self, user_id: str, at: datetime | None = None) -> Answer:
        account = self.accounts.get(user_id)
        if at is not None:
            rows = account.rows if account else []
            balance = sum(row.amount for row in rows if (row.occurred_at or row.created_at) <= at)
            balance -= sum(amount for _, _, amount in account.expiries(at)) if account else 0
            purchased = [0, *(row.purchased_after for row in rows if row.created_at <= at)][-1]
            return {"balance": balance, "lifetime_purchased": purchased, "reserved": None, "available": None}
        if account is None:
            names = ("balance", "lifetime_purchased", "reserved", "available", "credit_limit")
            return {"user_id": user_id} | dict.fromkeys(names, 0)
        now = self.now(account)
        held, left, balance = account.held(now), self.allowance_left(account, now), account.net(now)
        floor = self._min_balance(account) - account.credit_limit
        return {
            "user_id": user_id,
            "balance": balance,
            "lifetime_purchased": account.lifetime_purchased,
            "reserved": held,
            "available": min(MOST, max(0, left - held + max(0, balance - floor))),
            "credit_limit": account.credit_limit,
        }

    def _statistics(
        self, start: datetime | None, end: datetime | None, group: Callable[[Account, Row], Any]
    ) -> dict[Any, Answer]:
        """What was spent and refunded from start and before end, by what the charge's account and row say."""
        sums: dict[Any, Answer] = {}
        removals = {
            row.transaction_id for account in self.accounts.values() for row in account.rows if row.type == "removal"
        }
        for account in self.accounts.values():
            for row in account.rows:
                within = (start is None or start <= row.created_at) and (end is None or row.created_at < end)
                within = within and row.refers_to not in removals
                if not within or row.type not in ("usage", "refund"):
                    continue
                zeros = dict.fromkeys(("total_spend", "transaction_count", "allowance_used", "refunded", "cost"), 0)
                told = sums.setdefault(group(account, row), zeros)
                if row.type == "usage":
                    told["total_spend"] -= row.amount
                    told["transaction_count"] += 1
                    told["allowance_used"] += row.allowance_used
                    told["cost"] += row.cost
                else:
                    told["refunded"] += row.amount
        return sums

    def spend_by_user(self, start: datetime | None = None, end: datetime | None = None) -> list[Answer]:
        told = self._statistics(start, end, lambda account, row: row.actor_id or account.account_id)
        return most_first([{"user_id": user, **sums} for user, sums in told.items()])

    def spend_by_model(self, start: datetime | None = None, end: datetime | None = None) -> list[Answer]:
        told = self._statistics(start, end, lambda account, row: row.resolved_model or row.model or "")
        return most_first([{"model": model, **sums} for model, sums in told.items()])

    def daily_spend(self, start: datetime | None = None, end: datetime | None = None) -> list[Answer]:
        told = self._statistics(start, end, lambda account, row: self.window("daily", row.created_at))
        return [{"date": day, **sums} for day, sums in sorted(told.items())]

    def top_users(self, start: datetime | None = None, end: datetime | None = None) -> list[Answer]:
        names = ("user_id", "total_spend", "allowance_used", "refunded", "cost")
        users = [user for user in self.spend_by_user(start, end) if user["transaction_count"]]
        return [{name: user[name] for name in names} for user in users][:10]

    def aggregate_stats(self, start: datetime | None = None, end: datetime | None = None) -> Answer:
        users, models = self.spend_by_user(start, end), self.spend_by_model(start, end)
        days = [day for day in self.daily_spend(start, end) if day["transaction_count"]]
        total = sum(user["total_spend"] for user in users)
        return {
            "total_credits_consumed": total,
            "active_users": sum(user["transaction_count"] > 0 for user in users),
            "avg_daily_spend": total // len(days) if days else 0,
            "top_user": next((user["user_id"] for user in users if user["transaction_count"]), None),
            "top_model": next((of["model"] for of in models if of["model"] and of["transaction_count"]), None),
            **{name: sum(user[name] for user in users) for name in ("allowance_used", "refunded", "cost")},
        }

    def check_allowance(self, user_id: str) -> Answer:
        account = self._open(user_id)
        now = self.now(account)
        start, end = self.month(now) if account.plan else (None, None)
        left = self.allowance_left(account, now)
        return {"plan_id": account.plan, "allowance_remaining": left, "period_start": start, "period_end": end}

    # Prices over time

    def activate_pricing(self, version: int, at: datetime | None = None) -> Answer:
        """One that holds at once ends all before it, also those whose time has not come."""
        if at is not None:
            if at <= self.clock:
                raise Refused("invalid_argument")
            self.activations.append((version - 1, at))
        elif self.active(self.clock) != version - 1:
            self.activations = [(version - 1, None)]
        return {"version": version}

    def unschedule_pricing(self, version: int) -> Answer:
        """Takes back what was recorded after the active one; what was before it and has not come never will."""
        come = max(place for place, (_, at) in enumerate(self.activations) if at is None or at <= self.clock)
        kept = [of for place, of in enumerate(self.activations) if place <= come or of[0] != version - 1]
        if kept == self.activations:
            raise Refused("invalid_argument")
        self.activations = kept
        return {"version": version}

    def get_active_pricing(self) -> Answer:
        return {"version": self.active(self.clock) + 1}
