"""Random sequences of calls: the database and a small model of the contract answer the same, step by step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

import psycopg
import pytest
from billing_model import Account, Answer, Billing, Hold, Plan, Prices, Refused, is_open, matches, shown
from conftest import Clock, _database
from ledger_helpers import Call, Ledger

from ducto_pg import CreditManager
from ducto_pg.embedded import Server

ZONE = "Europe/Berlin"
VERSIONS = [
    Prices(
        rates={"any": Decimal(1), "gpt": Decimal("0.4")},
        jobs={"report": 7, "gift": 0},
        plans={"free": Plan(10), "pro": Plan(25, {"gpt-4": Decimal(2)})},
    ),
    Prices(
        rates={"any": Decimal("1.5"), "gpt": Decimal("0.7"), "gpt-4": Decimal(1)},
        jobs={"report": 9},
        plans={"free": Plan(4, {"gpt": Decimal("0.25")})},
        default_plan="free",
        signup_bonus=30,
        min_balance=0,
        low_balance=8,
        rounding="up",
        overrun="reject",
    ),
    Prices(
        rates={"_default": Decimal(3), "any": Decimal("0.25"), "gpt": Decimal("0.15"), "gpt-4": Decimal("0.35")},
        jobs={"report": 3, "gift": 1},
        plans={"free": Plan(6), "pro": Plan(12, {"gpt": Decimal("0.7")}, Decimal("0.5"))},
        default_plan="pro",
        min_balance=2,
        low_balance=0,
        rounding="half_up",
        factor=Decimal(2),
    ),
]
STARTS = ["2026-03-27T20:00", "2026-10-24T21:30", "2024-02-28T22:30", "2025-12-31T22:59:59.999999"]
SQLSTATES = {
    "invalid_argument": "22023",
    "out_of_range": "22003",
    "unknown_model": "DU003",
    "unknown_job": "DU004",
    "unknown_metric": "DU005",
    "unpriced_usage": "DU008",
}
BALANCES = ("balance", "balance_after", "new_balance", "team_balance_after")
SIZES = [
    timedelta(**{unit: size})
    for unit, size in (("seconds", 1), ("minutes", 10), ("hours", 5), ("days", 1), ("days", 31))
]

STATE = """
select a.account_id, a.seq, b.revision, jsonb_build_array(b.balance, b.lifetime_purchased, b.reserved, b.available,
  b.credit_limit, p.plan_id, p.allowance_remaining),
  array[p.period_start, p.period_end],
  jsonb_build_array(k.capped, k.current_spend, k.cap_limit, k.action, k.model),
  array(select row(l.expires_at at time zone 'UTC', l.remainder)::text from ducto_private.credit_lots as l
    where l.account_id = a.account_id and l.remainder > 0 order by l.expires_at, l.remainder),
  array(select jsonb_build_array(r.reservation_id, r.actor_id, r.status, r.amount, r.charged)
    from ducto.list_reservations(a.account_id, false, 1000) as r order by r.reservation_id),
  array(select jsonb_build_array(c.cap_type, c.model, c.limit, c.action, c.spent,
      c.resets_at at time zone 'UTC')
    from ducto.list_spend_caps(a.account_id) as c order by 1),
  array(select jsonb_build_array(m.user_id, m.role, m.spend_cap, m.spend_cap_period, m.total_spent, m.spent)
    from ducto.get_team_members(a.account_id) as m order by 1),
  jsonb_build_array(v.balance, v.held, array(select l.remainder from ducto_read.lots as l
    where l.account_id = a.account_id and l.remainder > 0 order by l.remainder))
from ducto_private.accounts as a
join ducto_read.accounts as v on v.account_id = a.account_id
cross join lateral ducto.get_balance(a.account_id) as b
cross join lateral ducto.check_allowance(a.account_id) as p
cross join lateral ducto.check_spend_cap(a.account_id, 'gpt-4', 9) as k
"""
ROW = [
    "transaction_id", "type", "amount", "balance_after", "allowance_used", "allowance_lapsed", "cost", "carry_after",
    "actor_id", "model", "resolved_model", "reservation_id", "refers_to", "expires_at", "created_at",
    "occurred_at", "pricing_version", "plan_id",
]  # fmt: skip
TERMS = ["pricing_version", "plan_id"]
ROWS = f"""
select {", ".join(f"t.{name}" + "::text" * name.endswith(("n_id", "_to")) for name in ROW)}
from ducto_read.transactions as t
where t.account_id = %s and t.seq > %s
order by t.seq
"""


# Views see the tests' clock too.
VIEWS = """
select format('create or replace view %I.%I as %s', v.schemaname, v.viewname,
  replace(v.definition, 'clock_timestamp()', 'ducto_private.clock()'))
from pg_views as v
where v.schemaname in ('ducto_private', 'ducto_read') and v.definition like '%clock_timestamp()%'
"""


class Pair:
    """The database and the model, asked the same; the ids of the model by those of the database."""

    def __init__(self, ledger: Ledger, start: str) -> None:
        self.ledger = ledger
        self.story: list[str] = []
        self.first: dict[tuple[str, str], Answer] = {}
        self.ids: dict[str, str] = {}
        self.seen: dict[str, tuple[int, int, int]] = {}
        self.latest: dict[str, int] = {}
        self.revisions: dict[str, int] = {}
        self.keyed: list[tuple[str, dict[str, Any]]] = []
        self.model = Billing(ZONE, VERSIONS, datetime.fromisoformat(start).replace(tzinfo=UTC))
        self.set_clock(self.model.clock)

    def set_clock(self, time: datetime) -> None:
        self.story.append(f"it is {time}")
        self.model.clock = time
        self.ledger.clock.set(time)

    def real(self, value: Any) -> Any:
        """What the database calls it."""
        if isinstance(value, list):
            return [self.real(item) for item in value]
        if isinstance(value, Mapping):
            return {name: self.real(item) for name, item in value.items()}
        return self.ids.get(value, value) if isinstance(value, str) else value

    def shows(self, told: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """The row has what the model determined; ids are learnt."""
        for name, value in told.items():
            if name.endswith("_id") and isinstance(value, str) and value not in self.ids and row[name] != value:
                assert row[name] not in [None, *self.ids.values()], (name, row)
                self.ids[value] = row[name]
            expected = self.real(value)
            assert row[name] == expected, f"{name} is {row[name]!r}, not {expected!r}: {dict(row)}"

    def ask(self, rpc: str, as_asked: Mapping[str, Any] | None = None, /, **arguments: Any) -> None:
        """Ask both; `as_asked` are the arguments of the first call that this one repeats, if they are not the same."""
        given = {name: value for name, value in arguments.items() if value is not None}
        self.story.append(f"{rpc}({', '.join(f'{name}={value!r}' for name, value in given.items())})")
        if given.get("idempotency_key") and as_asked is None:
            self.keyed.append((rpc, given))
        call = Call(rpc, (), self.real(given))
        try:
            told = self.model.call(rpc, given)
        except Refused as refused:
            self.story.append(f"  {refused.error}")
            self.refuses(call, refused)
            return
        answers = told if isinstance(told, list) else [told]
        for place, (row, answer) in enumerate(zip(self.ledger.run(call), answers, strict=True)):
            if rpc == "deduct_batch":
                self.shows_element(given["charges"][place], row, answer)
                continue
            self.shows({"error": None} | answer, row)
            if rpc != "release_reservation" and "idempotent" in answer:
                first = self.first.setdefault((rpc, repr(as_asked or given)), row)
                assert not row["idempotent"] or row == first | {"idempotent": True}, first
            if answer.get("idempotent") is False and "user_id" in given:
                self.revisions[given.get("team_id", given["user_id"])] = row["revision"]

    def shows_element(self, element: Any, row: Mapping[str, Any], answer: Answer) -> None:
        """A batch's answer to an element; a refusal has the revision of what went before."""
        told = {name: value for name, value in answer.items() if name != "of"}
        self.shows({"error": None} | told, row)
        if "of" in answer:
            self.shows({"revision": self.latest[answer["of"]] if answer["of"] else 0}, row)
        elif row["error"] is None and not row["idempotent"]:
            self.latest[element.get("team_id") or element["user_id"]] = row["revision"]

    def refuses(self, call: Call, refused: Refused) -> None:
        if refused.error in SQLSTATES:
            with pytest.raises(psycopg.Error) as raised, self.ledger.conn.transaction():
                self.ledger.run(call)
            assert raised.value.sqlstate == SQLSTATES[refused.error]
            return
        row = self.ledger.one(call)
        told = {"error": refused.error} | refused.told
        told |= {name: refused.told["balance"] for name in BALANCES if "balance" in refused.told}
        if "of" in told:
            told["revision"] = self.latest[told["of"]] if told["of"] else 0
        self.shows({name: value for name, value in told.items() if name in row}, row)

    def compare(self) -> None:
        """All that can be read is the same, and the ledger is sound."""
        found = {row[0]: row[1:] for row in self.ledger.sql(STATE)}
        assert found.keys() == {self.real(name) for name in self.model.accounts}
        for name, account in self.model.accounts.items():
            seq, revision, *state = found[self.real(name)]
            behind = self.model.clock < account.changed_at  # The views read the wall clock.
            for values, told in list(zip(state, self.told(name, account), strict=True))[: -1 if behind else None]:
                assert values == told, f"{name} has {values}, not {told}"
            rows, before, changes = self.seen.get(name, (0, -1, 0))
            assert (revision > before) == (account.changes > changes), f"{name}: revision {before}, now {revision}"
            assert self.revisions.get(name, revision) == revision, f"{name}: revision {revision}"
            assert seq == len(account.rows), f"{name}: {seq} rows, not {len(account.rows)}"
            if seq > rows:
                found_rows = self.ledger.sql(ROWS, self.real(name), rows)
                for row, values in zip(account.rows[rows:], found_rows, strict=True):
                    columns = [name for name in ROW if row.type == "usage" or name not in TERMS]
                    self.shows({name: getattr(row, name) for name in columns}, dict(zip(ROW, values, strict=True)))
            self.seen[name] = seq, revision, account.changes
            self.latest[name] = revision
        self.revisions.clear()
        self.compare_events()
        assert self.ledger.violations() == []

    def told(self, name: str, account: Account) -> list[list[Any]]:
        """What the model says of an account: numbers, times, what 9 credits exceed, lots, holds, caps, members."""
        now, balance, plan = self.model.now(account), self.model.get_balance(name), self.model.check_allowance(name)
        exceeded = self.model.check_spend_cap(name, "gpt-4", 9)
        numbers = [balance[key] for key in ("balance", "lifetime_purchased", "reserved", "available", "credit_limit")]
        holds = [[hold.reservation_id, hold.actor_id, *shown(hold, now), hold.charged] for hold in account.holds]
        caps = [list(cap.values())[1:] for cap in self.model.list_spend_caps(name)]
        caps = [[*cap, f"{resets_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S}"] for *cap, resets_at in caps]
        lots = [(lot.expires_at.astimezone(UTC), lot.remainder) for lot in account.lots if lot.remainder]
        left = [lot.remainder for lot in account.live_lots(now)]
        left += [keeps for _, keeps in account.due_lots(now) if keeps]
        members = [list(member.values()) for member in self.model.get_team_members(name)]
        return [
            [*numbers, plan["plan_id"], plan["allowance_remaining"]],
            [plan["period_start"], plan["period_end"]],
            [exceeded[key] for key in ("capped", "current_spend", "cap_limit", "action", "model")],
            [f'("{time:%Y-%m-%d %H:%M:%S}{fraction(time)}",{credits})' for time, credits in sorted(lots)],
            sorted(self.real(holds)),
            sorted(caps, key=lambda cap: (cap[0], cap[1] or "")),
            members,
            [balance["balance"], balance["reserved"], sorted(left)],
        ]

    def compare_events(self) -> None:
        found = self.ledger.sql("delete from ducto_private.events returning account_id, type, payload")
        for name, account in self.model.accounts.items():
            for kind, payload in account.events:
                event = next((event for event in found if self.is_told(event, name, kind, payload)), None)
                assert event is not None, f"no event {kind} {payload} of {name} in {found}"
                found.remove(event)
            account.events.clear()
        assert not found

    def is_told(self, event: tuple[Any, ...], name: str, kind: str, payload: Answer) -> bool:
        account_id, found, told = event
        if "expires_at" in told:
            told = told | {"expires_at": datetime.fromisoformat(told["expires_at"])}
        return (account_id, found) == (self.real(name), kind) and self.real(payload).items() <= told.items()


# Instead of an amount, one more or less: what is just admitted, or of a settlement just covered; what a cap lets pass.
AVAILABLE, ROOM = 1000, 2000
EDGES = [AVAILABLE - 1, AVAILABLE, AVAILABLE + 1, ROOM - 1, ROOM, ROOM + 1]

AMOUNTS = [*range(13), *range(13, 41, 6), *EDGES * 2]
SOME = [*range(1, 13), *range(13, 61, 12)]
LIMITS = [*range(13), *range(13, 41, 3)]
USERS = ["ann"] * 5 + ["bob"] * 3 + ["crew"]
ACCOUNTS = ["ann"] * 3 + ["bob"] + ["crew"] * 2
MEMBERS = ["ann"] * 5 + ["cat"] * 3 + ["bob"]
KEYS = [None] * 17 + ["k", "l", "m"]
PLACES = [0, 0, 0, 1, 1, 2, 3, 4, 5]
NAMES = [None, None, "any", "gpt", "gpt-4", "scanner"]
NOTHING: list[dict[str, Any]] = [
    {},
    {"input_tokens": None},
    {"input_tokens": 0, "output_tokens": Decimal("0.0")},
    {"points": None},
]
POINTS = [Decimal(points) for points in ("0", "0.1", "0.5", "1", "2.25", "3", "7.5", "12", "30")]
USAGES: list[dict[str, Any]] = [
    {"model": model, "points": points} for model in ("any", "gpt", "gpt-4") for points in POINTS
]
USAGES += [
    {"model": "gpx", "points": Decimal(1)},
    {"model": "any", "points": None},
    {"model": "gpt", "input_tokens": 0, "output_tokens": None, "points": Decimal("7.5")},
    {"model": None, "points": Decimal(0)},
    {"model": "gpt-4-0613", "points": Decimal(3)},
]
BAD_USAGES = [{"model": "any", "points": Decimal(-1)}, {"model": "any", "point": Decimal(1)}]
BAD_ELEMENTS: list[Any] = [
    None, 7, "ann", [], {}, {"user_id": None, "amount": 1}, {"user_id": " ann", "amount": 1},
    {"team_id": "crew", "amount": 1}, {"user_id": "ann"}, {"user_id": "ann", "amount": 1, "metrics": {"model": "any"}},
    {"user_id": "ann", "amount": "1"}, {"user_id": "ann", "amount": -1}, {"user_id": "bob", "amount": 1, "colour": 1},
    {"user_id": "ann", "metrics": []}, {"user_id": "ann", "metrics": {"model": "any"}, "model": "any"},
    {"user_id": "ann", "amount": 1, "idempotency_key": " "}, {"user_id": "new", "amount": -1},
    {"user_id": "crew", "amount": -1}, {"user_id": "ann", "amount": 1, "final": "no"},
    {"team_id": "crew", "user_id": "ann", "amount": 1, "job": "report"},
    *({"user_id": "ann", "metrics": usage} for usage in BAD_USAGES),
]  # fmt: skip
TTLS = [1, 60, 600, 7200, 86400, 2592000, 2592000]
LIVES = [None, 60, 600, 600, 7200, 86400, 3456000]
FLOORS = [None, None, None, 0, 9]
JOBS = ["report", "report", "gift"]
EITHER: Sequence[Any] = [True, False]

STEPS: list[str] = []
ARGUMENTS: dict[str, dict[str, Sequence[Any]]] = {}
Do = Callable[..., None]


def step(weight: int, **arguments: Sequence[Any]) -> Callable[[Do], Do]:
    """A step that is taken that often, with arguments of these."""

    def register(do: Do) -> Do:
        STEPS.extend([do.__name__] * weight)
        ARGUMENTS[do.__name__] = arguments
        return do

    return register


# How often a theme takes which steps; `all` takes each as often as it says itself.
THEMES: dict[str, dict[str, int]] = {
    "all": {},
    "lots": {
        "add": 6, "fall_due": 4, "burn_and_remove": 1, "charge_amount": 3, "hold_amount": 4, "settle_amount": 5,
        "extend": 1, "release": 1, "refund": 5, "remove": 2, "remove_grant": 3, "sweep": 2, "limit": 1, "at_an_edge": 4,
        "read_at": 3,
    },
    "due": {
        "add": 2, "fall_due": 3, "fall_due_in_steps": 5, "charge_amount": 2, "hold_amount": 2, "settle_amount": 4,
        "extend": 2, "release": 4, "refund": 2, "remove": 1, "remove_grant": 1, "sweep": 2, "at_an_edge": 6, "later": 1,
        "read_at": 10, "batch": 1, "clock_set_back": 1,
    },
    "prices": {
        "add": 2, "charge": 6, "charge_job": 2, "hold": 4, "settle": 4, "activate": 2, "schedule": 6, "unschedule": 2,
        "plan": 4, "later": 3, "at_an_edge": 5, "clock_set_back": 1, "cap": 1, "check_cap": 1, "batch": 2, "misuse": 1,
        "again_otherwise": 1, "open": 2,
    },
    "batches": {
        "add": 2, "batch": 12, "hold": 3, "hold_amount": 2, "again_otherwise": 4, "again": 1, "release": 1, "cap": 1,
        "later": 1, "at_an_edge": 2, "team": 1, "member": 2, "fall_due": 1, "plan": 1, "activate": 1,
    },
    "refunds": {
        "add": 3, "charge_amount": 4, "burn_and_remove": 4, "batch": 1, "refund": 10, "refund_other": 1, "remove": 1,
        "remove_grant": 1, "again": 1, "plan": 1, "at_an_edge": 2,
    },
    "holds": {
        "add": 2, "charge": 1, "hold": 4, "hold_amount": 4, "settle": 5, "settle_amount": 5, "extend": 5, "release": 2,
        "again": 3, "plan": 2, "limit": 1, "activate": 2, "later": 1, "at_an_edge": 3, "clock_set_back": 1,
    },
    "caps": {
        "add": 2, "cap": 5, "remove_cap": 1, "check_cap": 5, "charge": 2, "charge_amount": 5, "batch": 1, "hold": 2,
        "hold_amount": 3, "settle": 1, "settle_amount": 4, "extend": 2, "refund": 3, "remove": 1, "plan": 2,
        "later": 1, "at_an_edge": 2,
    },
    "teams": {
        "add": 1, "member": 5, "member_leaves": 2, "team_hold": 1, "team_hold_amount": 4, "team_charge": 1,
        "team_charge_amount": 5, "settle_amount": 3, "extend": 2, "refund": 4, "plan": 1, "cap": 1, "batch": 1,
        "again": 1, "later": 1, "at_an_edge": 2,
    },
}  # fmt: skip


def pick(items: Sequence[Any], place: int) -> Any:
    """One of the items, counted from the last."""
    return items[-1 - place % len(items)]


def left_of(charge: Any) -> int:
    """What has not been refunded of a charge."""
    return int(charge.allowance_used - charge.amount - charge.refunded - charge.refunded_allowance)


def rpc_of(element: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The single call that an element of a batch is."""
    if "job" in element:
        return "deduct_fixed", {"job_name" if name == "job" else name: value for name, value in element.items()}
    return "deduct" + "_team" * ("team_id" in element) + "_credits" * ("amount" in element), element


def fraction(time: datetime) -> str:
    return f".{time.microsecond:06}".rstrip("0").rstrip(".")


class Caller:
    """What may be asked, in any order; what there is nothing to ask about is passed over."""

    def __init__(self, ledger: Ledger, theme: str, seed: int) -> None:
        self.number = f"{theme} {seed}"
        self.theme = theme
        self.seed = Random(self.number)
        self.pair = Pair(ledger, self.seed.choice(STARTS))
        self.model = self.pair.model

    def begin(self) -> None:
        choose = self.seed.choice
        weights = THEMES[self.theme]
        self.steps = [name for name, weight in weights.items() for _ in range(weight)] or STEPS
        self.only = {"all": choose([None, "ann"]), "teams": "crew"}.get(self.theme, "ann")
        self.pair.ask("activate_pricing", version=choose([1, 2, 3]))
        credits, pool = choose([0, 20, 60]), choose([0, 30, 60])
        if credits := {"caps": 200}.get(self.theme, credits):
            self.pair.ask("add_credits", user_id="ann", amount=credits, type="purchase")
        if pool := {"all": pool, "teams": 200}.get(self.theme, 0):
            self.pair.ask("create_team", name="Crew", initial_balance=pool, team_id="crew")
            for user in ("ann", "cat"):
                self.pair.ask("add_team_member", team_id="crew", user_id=user, spend_cap=choose([None, *LIMITS]))
        self.pair.compare()

    def take(self, number: int) -> None:
        """Take the seed's step of that number."""
        self.seed = Random(f"{self.number} {number}")
        name = self.seed.choice(self.steps)
        arguments = {key: self.seed.choice(options) for key, options in ARGUMENTS[name].items()}
        if self.only:
            who = ("account",) if "team" in name or "member" in name else ("account", "user")
            arguments |= {key: self.only for key in who if key in arguments}
        getattr(self, name)(**arguments)
        self.pair.compare()

    # What there is

    def holds(self) -> list[tuple[str, Hold]]:
        return [(name, hold) for name, account in self.model.accounts.items() for hold in account.holds]

    def hold_of(self, place: int) -> tuple[str, Hold] | None:
        """One of the holds, mostly of those that are open."""
        holds = self.holds()
        if self.seed.choice([True, True, True, False]):
            holds = [(name, hold) for name, hold in holds if is_open(hold, self.now(name))] or holds
        return pick(holds, place) if holds else None

    def caps(self) -> list[tuple[str, Any]]:
        return [(name, named) for name, account in self.model.accounts.items() for named in account.caps]

    def rows(self, *types: str) -> list[tuple[str, Any]]:
        accounts = self.model.accounts.items()
        return [(name, row) for name, account in accounts for row in account.rows if row.type in types]

    def now(self, account_id: str) -> datetime:
        account = self.model.accounts.get(account_id)
        return self.model.now(account) if account else self.model.clock

    def amount(self, account_id: str, amount: int, member: str | None = None) -> int:
        """The amount that is meant for an account, or a member of it."""
        if amount < EDGES[0]:
            return amount
        account = self.model.accounts.get(account_id)
        if account is None or amount < EDGES[3]:
            amount -= 1000 * (amount >= EDGES[3])
            return max(0, int(self.model.get_balance(account_id)["available"]) + amount - AVAILABLE)
        model, now = self.model, self.now(account_id)
        left, held, holds = model.allowance_left(account, now), account.held(now), account.open_holds(now)
        bounds = []
        for (kind, of), cap in account.caps.items():
            matched = sum(hold.amount for hold in holds if matches(of, hold.names))
            bounds.append((cap.limit - model.spent_of_cap(account, kind, of, now), matched))
        who = account.members.get(member or "")
        if member and who and who.spend_cap is not None:
            matched = sum(hold.amount for hold in holds if hold.actor_id == member)
            bounds.append((who.spend_cap - model.spent_of_member(account, member, who.period, now), matched))
        rooms = [rest - taken for rest, matched in bounds for taken in (-left, min(held - left, matched))]
        return max(0, self.seed.choice(rooms or [1]) + amount - ROOM)

    # Time

    @step(3, size=SIZES)
    def later(self, size: timedelta) -> None:
        self.pair.set_clock(self.model.clock + size)

    @step(4, place=PLACES, micros=[-1, 0, 0, 1])
    def at_an_edge(self, place: int, micros: int) -> None:
        """Go to where a hold or a lot expires, or a local day or month begins."""
        now = self.model.clock
        edges = [hold.expires_at for _, hold in self.holds() if hold.status == "active"]
        edges += [lot.expires_at for account in self.model.accounts.values() for lot in account.lots if lot.remainder]
        edges += [at for _, at in self.model.activations if at]
        edges += [self.model.month(now)[1].astimezone(UTC), self.model.tomorrow(now).astimezone(UTC)]
        coming = sorted(edge for edge in edges if edge > now)
        self.pair.set_clock(coming[place % len(coming)] + timedelta(microseconds=micros))

    @step(1, seconds=[1, 60, 3600])
    def clock_set_back(self, seconds: int) -> None:
        self.pair.set_clock(self.model.clock - timedelta(seconds=seconds))

    # Prices, plans, caps

    @step(1, version=[1, 2, 3])
    def activate(self, version: int) -> None:
        self.pair.ask("activate_pricing", version=version)

    @step(1, version=[1, 2, 3], size=SIZES, back=[False] * 9 + [True])
    def schedule(self, version: int, size: timedelta, back: bool) -> None:
        """Prices that hold from a time to come on, or would from one that is past."""
        self.pair.ask("activate_pricing", version=version, at=self.model.clock + (-size if back else size))

    @step(1, version=[1, 2, 3])
    def unschedule(self, version: int) -> None:
        self.pair.ask("unschedule_pricing", version=version)

    @step(2, account=ACCOUNTS, plan=[None, "free", "pro", "gold"])
    def plan(self, account: str, plan: str | None) -> None:
        self.pair.ask("set_user_plan", user_id=account, plan_id=plan)

    @step(
        4,
        account=ACCOUNTS,
        limit=LIMITS,
        kind=["daily", "monthly"],
        model=NAMES,
        action=["deny", "deny", "warn", "notify"],
    )
    def cap(self, account: str, limit: int, kind: str, model: str | None, action: str) -> None:
        self.pair.ask("set_spend_cap", user_id=account, limit=limit, cap_type=kind, model=model, action=action)

    @step(1, place=PLACES)
    def remove_cap(self, place: int) -> None:
        if self.caps():
            name, (kind, model) = pick(self.caps(), place)
            self.pair.ask("remove_spend_cap", user_id=name, cap_type=kind, model=model)

    @step(2, place=PLACES, model=NAMES, amount=[*LIMITS, *EDGES[3:] * 3])
    def check_cap(self, place: int, model: str | None, amount: int) -> None:
        if self.caps():
            name = pick(self.caps(), place)[0]
            self.pair.ask("check_spend_cap", user_id=name, model=model, amount=self.amount(name, amount))

    @step(1, account=[*ACCOUNTS, "new"], kind=["daily", "monthly"])
    def remove_no_cap(self, account: str, kind: str) -> None:
        self.pair.ask("remove_spend_cap", user_id=account, cap_type=kind, model="none such")

    @step(1, usage=USAGES, amount=AMOUNTS, how=range(4))
    def open(self, usage: Answer, amount: int, how: int) -> None:
        """A user seen for the first time is charged."""
        user = f"new{len(self.model.accounts)}"
        asked: dict[str, Any] = {"amount": self.amount(user, amount)} if how > 1 else {"metrics": usage}
        self.pair.ask(["deduct", "reserve", "deduct_credits", "reserve_credits"][how], user_id=user, **asked)

    @step(1, account=["new", "bob"])
    def read(self, account: str) -> None:
        self.pair.ask("get_balance", user_id=account)
        self.pair.ask("check_allowance", user_id=account)
        self.pair.ask("check_spend_cap", user_id=account, amount=9)

    @step(1, place=PLACES, until=PLACES)
    def statistics(self, place: int, until: int) -> None:
        if rows := self.rows("usage", "refund"):
            times = [None, *(row.created_at for _, row in rows)]
            window = {"start": pick(times[::-1], place), "end": pick(times, until)}
            if None in window.values() or window["start"] < window["end"]:
                for rpc in ("spend_by_user", "spend_by_model", "daily_spend", "top_users", "aggregate_stats"):
                    self.pair.ask(rpc, **window)

    @step(3, account=[*ACCOUNTS, "new"], place=range(1000), micros=[-1, 0, 1], size=SIZES)
    def read_at(self, account: str, place: int, micros: int, size: timedelta) -> None:
        """The balance at a time at which something happened, or will, as far as can be known now."""
        of = self.model.accounts.get(account)
        times = [self.model.clock, self.model.clock + size]
        if of:
            times += [at for row in of.rows for at in (row.created_at, row.occurred_at) if at]
            times += [lot.expires_at for lot in of.lots] * 2 + [hold.expires_at for hold in of.holds] * 2
        at = times[place % len(times)] + timedelta(microseconds=micros)
        self.pair.ask("get_balance", user_id=account, at=at)

    # Credits

    @step(6, account=ACCOUNTS, amount=SOME, kind=["purchase", "promotion"], ttl=LIVES, key=KEYS)
    def add(self, account: str, amount: int, kind: str, ttl: int | None, key: str | None) -> None:
        expires_at = ttl and self.now(account) + timedelta(seconds=ttl)
        self.pair.ask(
            "add_credits", user_id=account, amount=amount, type=kind, expires_at=expires_at, idempotency_key=key
        )

    @step(1, amount=SOME, held=SOME, place=PLACES, micros=[-1, 0, 0, 1])
    def fall_due(self, amount: int, held: int, place: int, micros: int) -> None:
        """Credits that a hold claims some of expire."""
        self.add("ann", amount, "promotion", 60 + place, None)
        self.pair.compare()
        self.hold_amount("ann", held, None, None, TTLS[-1], None)
        self.pair.compare()
        self.pair.set_clock(self.model.clock + timedelta(seconds=60 + place, microseconds=micros))

    @step(
        1, amounts=[[10], [10, 7], [4, 8], [6, 6, 6]], held=[[5], [4, 3], [3, 8], [2, 9, 4]], late=SIZES, place=PLACES
    )
    def fall_due_in_steps(self, amounts: list[int], held: list[int], late: timedelta, place: int) -> None:
        """Credits that several holds claim expire, and the holds end one after the other."""
        for number, amount in enumerate(amounts):
            self.add("ann", amount, "promotion", 60 + 40 * number, None)
            self.pair.compare()
        for number, amount in enumerate(held):
            self.hold_amount("ann", amount, None, 0, 50 + self.seed.choice([0, 10, 60, 90, 700, 8000]), None)
            self.pair.compare()
            self.pair.set_clock(self.model.clock + timedelta(seconds=10 * (number == place)))
        self.pair.set_clock(self.model.clock + self.seed.choice([late, timedelta(seconds=40), timedelta(seconds=70)]))
        self.pair.compare()
        if self.model.accounts.get("ann"):
            self.read_at("ann", self.seed.randrange(1000), 0, late)

    @step(2, account=ACCOUNTS, amount=SOME, key=KEYS)
    def remove(self, account: str, amount: int, key: str | None) -> None:
        self.pair.ask("remove_credits", user_id=account, amount=amount, idempotency_key=key)

    @step(3, place=PLACES, amount=[*SOME, *[AVAILABLE] * 12, AVAILABLE + 1], key=KEYS)
    def remove_grant(self, place: int, amount: int, key: str | None) -> None:
        """Take back some of a grant, all that is left of it, or one credit more."""
        if rows := self.rows("purchase", "promotion", "adjustment", "signup_bonus", "refund"):
            if self.seed.choice([True, True, False]):
                burnt = {lot.transaction_id for _, charge in self.rows("usage") for lot, _ in charge.taken}
                rows = [of for of in rows if of[1].transaction_id in burnt] or rows
            name, row = pick(rows, place)
            if amount >= AVAILABLE:
                account = self.model.accounts[name]
                gone = sum(lot.gone(self.now(name)) for lot in account.lots if lot.transaction_id == row.transaction_id)
                amount = max(1, row.amount - row.removed - gone + amount - AVAILABLE)
            more = {"transaction_id": row.transaction_id, "idempotency_key": key}
            self.pair.ask("remove_credits", user_id=name, amount=amount, **more)

    @step(1, amount=SOME, charged=SOME, place=PLACES, back=[*range(1, 9), AVAILABLE])
    def burn_and_remove(self, amount: int, charged: int, place: int, back: int) -> None:
        """Of a grant that a charge has burnt some of, some is taken back."""
        self.add("ann", amount, "purchase", LIVES[1 + place], None)
        self.pair.compare()
        self.charge_amount("ann", charged, None, None)
        self.pair.compare()
        self.remove_grant(0, back, None)

    @step(1, account=ACCOUNTS, limit=[0, 0, 6, 20])
    def limit(self, account: str, limit: int) -> None:
        self.pair.ask("set_credit_limit", user_id=account, limit=limit)

    @step(1, dry_run=EITHER)
    def sweep(self, dry_run: bool) -> None:
        # The sweep looks for accounts by the wall clock, which may have been set back.
        if all(account.changed_at <= self.model.clock for account in self.model.accounts.values()):
            self.pair.ask("sweep_expired_credits", dry_run=dry_run)

    # Holds

    @step(5, user=USERS, usage=USAGES, least=FLOORS, ttl=TTLS, key=KEYS)
    def hold(self, user: str, usage: Answer, least: int | None, ttl: int, key: str | None) -> None:
        more = {"min_balance": least, "ttl_seconds": ttl, "idempotency_key": key}
        self.pair.ask("reserve", user_id=user, metrics=usage, **more)

    @step(5, user=USERS, amount=AMOUNTS, model=NAMES, least=FLOORS, ttl=TTLS, key=KEYS)
    def hold_amount(
        self, user: str, amount: int, model: str | None, least: int | None, ttl: int, key: str | None
    ) -> None:
        more = {"model": model, "min_balance": least, "ttl_seconds": ttl, "idempotency_key": key}
        self.pair.ask("reserve_credits", user_id=user, amount=self.amount(user, amount), **more)

    @step(3, place=PLACES, amount=[0] * 8 + AMOUNTS, ttl=[None, *TTLS], key=KEYS)
    def extend(self, place: int, amount: int, ttl: int | None, key: str | None) -> None:
        if found := self.hold_of(place):
            name, hold = found
            more = {"ttl_seconds": ttl, "idempotency_key": key}
            amount = self.amount(name, amount)
            self.pair.ask("extend_reservation", reservation_id=hold.reservation_id, add_amount=amount, **more)

    @step(2, place=PLACES)
    def release(self, place: int) -> None:
        if found := self.hold_of(place):
            self.pair.ask("release_reservation", reservation_id=found[1].reservation_id)

    # Charges

    @step(5, user=USERS, usage=USAGES, key=KEYS)
    def charge(self, user: str, usage: Answer, key: str | None) -> None:
        self.pair.ask("deduct", user_id=user, metrics=usage, idempotency_key=key)

    @step(5, user=USERS, amount=AMOUNTS, model=NAMES, key=KEYS)
    def charge_amount(self, user: str, amount: int, model: str | None, key: str | None) -> None:
        amount = self.amount(user, amount)
        self.pair.ask("deduct_credits", user_id=user, amount=amount, model=model, idempotency_key=key)

    @step(1, user=USERS, usage=BAD_USAGES, hold=EITHER)
    def misuse(self, user: str, usage: Answer, hold: bool) -> None:
        self.pair.ask("reserve" if hold else "deduct", user_id=user, metrics=usage)

    @step(1, user=USERS, job=JOBS, key=KEYS)
    def charge_job(self, user: str, job: str, key: str | None) -> None:
        self.pair.ask("deduct_fixed", user_id=user, job_name=job, idempotency_key=key)

    @step(5, place=PLACES, usage=USAGES, final=EITHER, key=KEYS)
    def settle(self, place: int, usage: Answer, final: bool, key: str | None) -> None:
        if found := self.hold_of(place):
            self.settle_by("", *found, {"metrics": usage, "final": final, "idempotency_key": key})

    @step(6, place=PLACES, amount=AMOUNTS, model=NAMES, final=EITHER, key=KEYS)
    def settle_amount(self, place: int, amount: int, model: str | None, final: bool, key: str | None) -> None:
        if found := self.hold_of(place):
            name, hold = found
            if EDGES[0] <= amount < EDGES[3]:
                told = self.model.get_balance(name)
                free = told["balance"] + self.model.check_allowance(name)["allowance_remaining"] - told["reserved"]
                amount = max(0, hold.amount + self.seed.choice([0, free]) + amount - AVAILABLE)
            amount = self.amount(name, amount, hold.actor_id)
            asked = {"amount": amount, "model": model, "final": final, "idempotency_key": key}
            self.settle_by("_credits", name, hold, asked)

    def settle_by(self, suffix: str, name: str, hold: Hold, asked: dict[str, Any]) -> None:
        asked |= self.owner(name, hold) | {"reservation_id": hold.reservation_id}
        self.pair.ask(("deduct" if hold.actor_id is None else "deduct_team") + suffix, **asked)

    def owner(self, name: str, hold: Hold) -> dict[str, str]:
        """Whose hold it is, or once in a while another member of the team."""
        if hold.actor_id is None:
            return {"user_id": name}
        return {"team_id": name, "user_id": self.seed.choice([hold.actor_id] * 15 + MEMBERS[-1:])}

    @step(7, place=PLACES, amount=[None, *range(1, 9), AVAILABLE], key=KEYS)
    def refund(self, place: int, amount: int | None, key: str | None) -> None:
        """Give back of a charge all, some, or one credit more than is left of it."""
        rows = [row for _, row in self.rows("usage")]
        if rows := [row for row in rows if left_of(row)] or rows:
            charge = pick(rows, place)
            if amount is not None:
                amount = left_of(charge) + 1 if amount == AVAILABLE else min(amount, left_of(charge) or 1)
            transaction_id = charge.transaction_id
            self.pair.ask("refund_credits", transaction_id=transaction_id, amount=amount, idempotency_key=key)

    @step(1, place=PLACES)
    def refund_other(self, place: int) -> None:
        if rows := self.rows("usage", "refund", "removal", "expiry", "purchase"):
            self.pair.ask("refund_credits", transaction_id=pick(rows, place)[1].transaction_id)

    @step(3)
    def batch(self) -> None:
        """Charges, some of them settlements, bad ones, and sometimes what was asked before under a key."""
        elements: list[Any] = []
        for _ in range(self.seed.choice([0, 1, 2, 3, 4, 4, 5, 8])):
            keyed = [of for of in elements if of not in BAD_ELEMENTS and "idempotency_key" in of]
            if keyed and self.seed.random() < 0.4:
                elements.append(self.otherwise(self.seed.choice(keyed)))
            else:
                elements.append(self.element())
        self.pair.ask("deduct_batch", charges=elements)
        self.pair.keyed += [rpc_of(of) for of in elements if of not in BAD_ELEMENTS and "idempotency_key" in of]

    def element(self) -> Any:
        choose = self.seed.choice
        if self.seed.random() < 0.15:
            return choose(BAD_ELEMENTS)
        again = [given for rpc, given in self.pair.keyed if rpc.startswith("deduct") and rpc != "deduct_fixed"]
        if again and choose(EITHER) and choose(EITHER):
            return dict(choose(again))
        who: dict[str, Any] = {"user_id": choose(USERS)}
        if choose(EITHER):
            who = {"team_id": "crew", "user_id": choose(MEMBERS)}
        what: dict[str, Any] = {"metrics": choose(USAGES)}
        if choose(EITHER):
            what = {"amount": choose(LIMITS), "model": choose(NAMES)}
        if (found := self.hold_of(choose(PLACES))) and choose(EITHER):
            who = self.owner(*found) | {"reservation_id": found[1].reservation_id}
            what |= {"final": choose(EITHER)}
        elif "team_id" not in who and choose(USERS) == "crew":
            what = {"job": choose(JOBS)}
        element = {**who, **what, "idempotency_key": choose([*KEYS, *KEYS[-3:] * 4])}
        return {name: value for name, value in element.items() if value is not None}

    def otherwise(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The same request in other words, or once in a while another one."""
        asked, choose = dict(given), self.seed.choice
        if "metrics" in asked:
            usage = {name: value for name, value in asked["metrics"].items() if value or choose(EITHER)}
            asked["metrics"] = choose(NOTHING) | usage
        if "type" in asked:
            ttl = choose(LIVES)
            asked["expires_at"] = ttl and self.model.clock + timedelta(seconds=ttl, days=60)
        asked |= {name: choose(TTLS) for name in ("ttl_seconds",) if name in asked}
        asked |= {name: choose(FLOORS) for name in ("min_balance",) if name in asked}
        other = self.seed.random()
        if other < 0.1 and "amount" in asked:
            asked["amount"] += 1
        elif other < 0.2 and "final" in asked:
            asked["final"] = not asked["final"]
        elif other < 0.2 and asked.get("metrics", {}).get("points"):
            asked["metrics"] = asked["metrics"] | {"points": asked["metrics"]["points"] + 1}
        return asked

    @step(3, place=PLACES)
    def again(self, place: int) -> None:
        if self.pair.keyed:
            name, arguments = pick(self.pair.keyed, place)
            self.pair.ask(name, **arguments)

    @step(2, place=PLACES)
    def again_otherwise(self, place: int) -> None:
        if self.pair.keyed:
            name, arguments = pick(self.pair.keyed, place)
            self.pair.ask(name, arguments, **self.otherwise(arguments))

    # Teams

    @step(1, team=[None, "crew", "ann"], amount=[0, 10, 30], key=KEYS)
    def team(self, team: str | None, amount: int, key: str | None) -> None:
        if team in self.model.accounts or not amount:
            key = None  # A team's key is known by its initial row.
        if len(self.model.accounts) < 5:
            more = {"team_id": team, "idempotency_key": key}
            self.pair.ask("create_team", name="Crew", initial_balance=amount, **more)

    @step(2, user=[*MEMBERS, "crew"], cap=[None, None, *LIMITS], period=["lifetime", "daily", "monthly"])
    def member(self, user: str, cap: int | None, period: str) -> None:
        self.pair.ask("add_team_member", team_id="crew", user_id=user, spend_cap=cap, spend_cap_period=period)

    @step(1, user=MEMBERS)
    def member_leaves(self, user: str) -> None:
        self.pair.ask("remove_team_member", team_id="crew", user_id=user)

    @step(3, user=MEMBERS, usage=USAGES, ttl=TTLS, key=KEYS)
    def team_hold(self, user: str, usage: Answer, ttl: int, key: str | None) -> None:
        more = {"ttl_seconds": ttl, "idempotency_key": key}
        self.pair.ask("reserve_team", team_id="crew", user_id=user, metrics=usage, **more)

    @step(3, user=MEMBERS, amount=AMOUNTS, model=NAMES, least=FLOORS, ttl=TTLS, key=KEYS)
    def team_hold_amount(
        self, user: str, amount: int, model: str | None, least: int | None, ttl: int, key: str | None
    ) -> None:
        more = {"model": model, "min_balance": least, "ttl_seconds": ttl, "idempotency_key": key}
        amount = self.amount("crew", amount, user)
        self.pair.ask("reserve_team_credits", team_id="crew", user_id=user, amount=amount, **more)

    @step(3, user=MEMBERS, usage=USAGES, key=KEYS)
    def team_charge(self, user: str, usage: Answer, key: str | None) -> None:
        self.pair.ask("deduct_team", team_id="crew", user_id=user, metrics=usage, idempotency_key=key)

    @step(3, user=MEMBERS, amount=AMOUNTS, model=NAMES, key=KEYS)
    def team_charge_amount(self, user: str, amount: int, model: str | None, key: str | None) -> None:
        more = {"amount": self.amount("crew", amount, user), "model": model, "idempotency_key": key}
        self.pair.ask("deduct_team_credits", team_id="crew", user_id=user, **more)


@pytest.fixture(scope="module")
def ledger(server: Server, template_db: str) -> Iterator[Ledger]:
    with _database(server, template_db) as (_, dsn), psycopg.connect(dsn, autocommit=True) as conn:
        for prices in VERSIONS:
            CreditManager(conn).publish_pricing(prices.config(ZONE), activate=prices is VERSIONS[0])
        clock = Clock(conn)
        for query in conn.execute(VIEWS).fetchall():
            conn.execute(query[0])
        conn.execute("select ducto_private.store_objects()")
        yield Ledger(conn, clock)


def play(ledger: Ledger, theme: str, seed: int, steps: Sequence[int]) -> str | None:
    """Take these of the seed's steps; what differed, and the story before it."""
    with ledger.conn.transaction(force_rollback=True):
        caller = Caller(Ledger(ledger.conn, ledger.clock), theme, seed)
        try:
            caller.begin()
            for number in steps:
                caller.take(number)
        except (AssertionError, ValueError, psycopg.Error) as error:
            return "\n".join([*caller.pair.story, repr(error)])
    return None


def check(ledger: Ledger, theme: str, seed: int, count: int) -> None:
    """Play a seed; if it fails, the fewest of its steps that do are told."""
    steps = list(range(count))
    story = play(ledger, theme, seed, steps)
    for size in (16, 4, 1, 1):
        for place in reversed(range(0, len(steps) * (story is not None), size)):
            fewer = steps[:place] + steps[place + size :]
            if shorter := play(ledger, theme, seed, fewer):
                steps, story = fewer, shorter
    assert story is None, f"{theme}, seed {seed}, steps {steps}\n{story}"


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("theme", THEMES)
def test_the_database_answers_as_the_model_does(ledger: Ledger, theme: str, seed: int) -> None:
    check(ledger, theme, seed, 50)


@pytest.mark.slow
@pytest.mark.parametrize("theme", THEMES)
def test_the_database_answers_as_the_model_does_for_long(ledger: Ledger, theme: str) -> None:
    for seed in range(100, 124):
        check(ledger, theme, seed, 60)
