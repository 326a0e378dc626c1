"""Random sequences of calls: the database and a small model of the contract answer the same, step by step."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from billing_model import Account, Answer, Billing, Plan, Prices, Refused, shown
from conftest import Clock, _database
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from ledger_helpers import Call, Ledger

from ducto_pg import CreditManager
from ducto_pg.embedded import Server

import os
from hypothesis import Phase
DEV: Any = {"phases": [Phase.generate]} if os.environ.get("NOSHRINK") else {}
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
        rates={"any": Decimal("0.5"), "gpt": Decimal("0.3")},
        jobs={"report": 3, "gift": 1},
        plans={"free": Plan(6), "pro": Plan(12)},
        default_plan="pro",
        min_balance=2,
        low_balance=0,
        rounding="half_up",
    ),
]
STARTS = ["2026-03-27T20:00", "2026-10-24T21:30", "2024-02-28T22:30", "2025-12-31T22:59:59.999999"]
SQLSTATES = {"invalid_argument": "22023", "unknown_model": "DU003", "unknown_job": "DU004"}
BALANCES = ("balance", "balance_after", "new_balance", "team_balance_after")
STEPS = [timedelta(**{unit: size}) for unit, size in (("seconds", 1), ("minutes", 10), ("hours", 5), ("days", 1), ("days", 31))]

STATE = """
select a.account_id, a.seq, b.revision, jsonb_build_array(b.balance, b.lifetime_purchased, b.reserved, b.available,
  b.credit_limit, p.plan_id, p.allowance_remaining),
  array[p.period_start, p.period_end],
  array(select l.remainder from ducto_read.lots as l where l.account_id = a.account_id and l.remainder > 0
    order by l.expires_at, l.remainder),
  array(select jsonb_build_array(r.reservation_id, r.actor_id, r.status, r.amount, r.charged)
    from ducto.list_reservations(a.account_id, false, 1000) as r order by r.reservation_id),
  array(select jsonb_build_array(c.cap_type, c.model, c.limit, c.action)
    from ducto.list_spend_caps(a.account_id) as c order by 1),
  array(select jsonb_build_array(m.user_id, m.role, m.spend_cap, m.spend_cap_period, m.total_spent)
    from ducto.get_team_members(a.account_id) as m order by 1)
from ducto_private.accounts as a
cross join lateral ducto.get_balance(a.account_id) as b
cross join lateral ducto.check_allowance(a.account_id) as p
"""
ROW = [
    "transaction_id", "type", "amount", "balance_after", "allowance_used", "allowance_lapsed", "cost", "carry_after",
    "actor_id", "model", "resolved_model", "reservation_id", "refers_to", "expires_at", "created_at",
]  # fmt: skip
ROWS = f"""
select {", ".join(f"t.{name}" + "::text" * name.endswith(("_id", "_to")) for name in ROW)}
from ducto_read.transactions as t
where t.account_id = %s and t.seq > %s
order by t.seq
"""


class Pair:
    """The database and the model, asked the same; the ids of the model by those of the database."""

    def __init__(self, ledger: Ledger, start: str) -> None:
        self.ledger = ledger
        self.ids: dict[str, str] = {}
        self.seen: dict[str, tuple[int, int, int]] = {}
        self.revisions: dict[str, int] = {}
        self.keyed: list[tuple[str, dict[str, Any]]] = []
        self.model = Billing(ZONE, VERSIONS, datetime.fromisoformat(start).replace(tzinfo=UTC))
        self.set_clock(self.model.clock)

    def set_clock(self, time: datetime) -> None:
        note(f"it is {time}")
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
                assert row[name] is not None and row[name] not in self.ids.values(), (name, row)
                self.ids[value] = row[name]
            expected = self.real(value)
            assert row[name] == expected, f"{name} is {row[name]!r}, not {expected!r}: {dict(row)}"

    def ask(self, rpc: str, **arguments: Any) -> None:
        """Ask both."""
        given = {name: value for name, value in arguments.items() if value is not None}
        note(f"{rpc}({', '.join(f'{name}={value!r}' for name, value in given.items())})")
        if given.get("idempotency_key"):
            self.keyed.append((rpc, given))
        call = Call(rpc, (), self.real(given))
        try:
            told = getattr(self.model, rpc)(**given)
        except Refused as refused:
            note(f"  {refused.error}")
            self.refuses(call, refused)
            return
        answers = told if isinstance(told, list) else [told]
        for row, answer in zip(self.ledger.run(call), answers, strict=True):
            self.shows({"error": None} | answer, row)
            if answer.get("idempotent") is False and rpc != "deduct_batch" and "user_id" in given:
                self.revisions[given.get("team_id", given["user_id"])] = row["revision"]

    def refuses(self, call: Call, refused: Refused) -> None:
        if refused.error in SQLSTATES:
            with pytest.raises(psycopg.Error) as raised, self.ledger.conn.transaction():
                self.ledger.run(call)
            assert raised.value.sqlstate == SQLSTATES[refused.error]
            return
        row = self.ledger.one(call)
        told = {"error": refused.error} | refused.told
        told |= {name: refused.told["balance"] for name in BALANCES if "balance" in refused.told}
        self.shows({name: value for name, value in told.items() if name in row}, row)

    def compare(self) -> None:
        """All that can be read is the same, and the ledger is sound."""
        found = {row[0]: row[1:] for row in self.ledger.sql(STATE)}
        assert found.keys() == {self.real(name) for name in self.model.accounts}
        for name, account in self.model.accounts.items():
            seq, revision, *state = found[self.real(name)]
            for values, told in zip(state, self.told(name, account), strict=True):
                assert values == told, f"{name} has {values}, not {told}"
            rows, before, changes = self.seen.get(name, (0, -1, 0))
            assert (revision > before) == (account.changes > changes), f"{name}: revision {before}, now {revision}"
            assert self.revisions.get(name, revision) == revision, f"{name}: revision {revision}"
            assert seq == len(account.rows), f"{name}: {seq} rows, not {len(account.rows)}"
            if seq > rows:
                found_rows = self.ledger.sql(ROWS, self.real(name), rows)
                for row, values in zip(account.rows[rows:], found_rows, strict=True):
                    self.shows({key: getattr(row, key) for key in ROW}, dict(zip(ROW, values, strict=True)))
            self.seen[name] = seq, revision, account.changes
        self.revisions.clear()
        self.compare_events()
        assert self.ledger.violations() == []

    def told(self, name: str, account: Account) -> list[list[Any]]:
        """What the model says of an account: numbers, times, lots, holds, caps, members."""
        now, balance, plan = self.model.now(account), self.model.get_balance(name), self.model.check_allowance(name)
        numbers = [balance[key] for key in ("balance", "lifetime_purchased", "reserved", "available", "credit_limit")]
        holds = [[hold.reservation_id, hold.actor_id, *shown(hold, now), hold.charged] for hold in account.holds]
        caps = [[kind, model, cap.limit, cap.action] for (kind, model), cap in account.caps.items()]
        members = [list(member.values()) for member in self.model.get_team_members(name)]
        return [
            numbers + [plan["plan_id"], plan["allowance_remaining"]],
            [plan["period_start"], plan["period_end"]],
            [remainder for _, remainder in sorted((lot.expires_at, lot.remainder) for lot in account.lots) if remainder],
            sorted(self.real(holds)),
            sorted(caps, key=lambda cap: (cap[0], cap[1] or "")),
            members,
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


amounts = st.one_of(st.integers(0, 12), st.integers(13, 40))
some = st.integers(1, 40)
users = st.sampled_from(["ann", "ann", "ann", "bob", "bob", "crew"])
accounts = st.sampled_from(["ann", "ann", "ann", "bob", "crew", "crew"])
members = st.sampled_from(["ann", "ann", "cat", "crew"])
actions = st.sampled_from(["deny", "deny", "warn", "notify"])
keys = st.sampled_from([None] * 6 + ["k", "l"])
places = st.integers(0, 5)
models = st.sampled_from([None, "any", "gpt", "gpt-4", "scanner"])
points = st.sampled_from([Decimal(n) for n in ("0", "0.1", "0.5", "1", "2.25", "3", "7.5", "12", "30")])
usages = st.builds(lambda model, n: {"model": model, "points": n}, st.sampled_from(["any", "gpt", "gpt-4"]), points)
lives = st.sampled_from([None, 60, 600, 7200, 86400, 3456000])
ttls = st.sampled_from([1, 60, 600, 7200, 86400, 2592000])


def pick(items: Sequence[Any], place: int) -> Any:
    """One of the items, counted from the last."""
    return items[-1 - place % len(items)]


class Machine(RuleBasedStateMachine):
    """What may be asked, in any order."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.undo = ledger.conn.transaction(force_rollback=True)
        self.undo.__enter__()
        self.ledger = ledger

    def teardown(self) -> None:
        self.undo.__exit__(None, None, None)

    @initialize(start=st.sampled_from(STARTS), version=st.integers(1, 3), pool=st.sampled_from([None, 0, 30]))
    def begin(self, start: str, version: int, pool: int | None) -> None:
        self.pair = Pair(self.ledger, start)
        self.pair.ask("activate_pricing", version=version)
        self.model = self.pair.model
        if pool is not None:
            self.pair.ask("create_team", name="Crew", initial_balance=pool, team_id="crew")
            self.pair.ask("add_team_member", team_id="crew", user_id="ann")

    @invariant()
    def same(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare()

    def holds(self) -> list[tuple[str, Any]]:
        return [(name, hold) for name, account in self.model.accounts.items() for hold in account.holds]

    def caps(self) -> list[tuple[str, Any]]:
        return [(name, named) for name, account in self.model.accounts.items() for named in account.caps]

    def now(self, account_id: str) -> datetime:
        account = self.model.accounts.get(account_id)
        return self.model.now(account) if account else self.model.clock

    def rows(self, *types: str) -> list[tuple[str, Any]]:
        return [(name, row) for name, account in self.model.accounts.items() for row in account.rows if row.type in types]

    @rule(step=st.sampled_from(STEPS))
    def later(self, step: timedelta) -> None:
        note(f"later: {step}")
        self.pair.set_clock(self.model.clock + step)

    @rule(place=places, micros=st.sampled_from([-1, 0, 0, 1]))
    def at_an_edge(self, place: int, micros: int) -> None:
        """Go to where a hold or a lot expires, or a local day or month begins."""
        now = self.model.clock
        edges = [hold.expires_at for _, hold in self.holds() if hold.status == "active"]
        edges += [lot.expires_at for account in self.model.accounts.values() for lot in account.lots if lot.remainder]
        day = now.astimezone(self.model.zone).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        edges += [self.model.month(now)[1].astimezone(UTC), day.astimezone(UTC)]
        coming = sorted(edge for edge in edges if edge > now)
        time = coming[place % len(coming)] + timedelta(microseconds=micros)
        note(f"at {time}")
        self.pair.set_clock(time)

    @rule(version=st.integers(1, 3))
    def activate(self, version: int) -> None:
        self.pair.ask("activate_pricing", version=version)

    @rule(seconds=st.sampled_from([1, 60, 3600]))
    def clock_set_back(self, seconds: int) -> None:
        note(f"clock set back: {seconds} s")
        self.pair.set_clock(self.model.clock - timedelta(seconds=seconds))

    @rule(account=accounts, amount=some, kind=st.sampled_from(["purchase", "promotion"]), ttl=lives, key=keys)
    def add(self, account: str, amount: int, kind: str, ttl: int | None, key: str | None) -> None:
        expires_at = ttl and self.now(account) + timedelta(seconds=ttl)
        self.pair.ask(
            "add_credits", user_id=account, amount=amount, type=kind, expires_at=expires_at, idempotency_key=key
        )

    @rule(account=accounts, amount=some, key=keys)
    def remove(self, account: str, amount: int, key: str | None) -> None:
        self.pair.ask("remove_credits", user_id=account, amount=amount, idempotency_key=key)

    @precondition(lambda self: self.rows("purchase", "promotion", "signup_bonus", "adjustment", "usage"))
    @rule(place=places, amount=some, key=keys)
    def remove_grant(self, place: int, amount: int, key: str | None) -> None:
        name, row = pick(self.rows("purchase", "promotion", "signup_bonus", "adjustment", "usage"), place)
        self.pair.ask(
            "remove_credits", user_id=name, amount=amount, transaction_id=row.transaction_id, idempotency_key=key
        )

    @rule(account=accounts, limit=st.sampled_from([0, 0, 6, 20]))
    def limit(self, account: str, limit: int) -> None:
        self.pair.ask("set_credit_limit", user_id=account, limit=limit)

    @rule(account=accounts, plan=st.sampled_from([None, "free", "pro"]))
    def plan(self, account: str, plan: str | None) -> None:
        self.pair.ask("set_user_plan", user_id=account, plan_id=plan)

    @rule(account=accounts, limit=amounts, kind=st.sampled_from(["daily", "monthly"]), model=models, action=actions)
    def cap(self, account: str, limit: int, kind: str, model: str | None, action: str) -> None:
        self.pair.ask("set_spend_cap", user_id=account, limit=limit, cap_type=kind, model=model, action=action)

    @precondition(lambda self: self.caps())
    @rule(place=places)
    def remove_cap(self, place: int) -> None:
        name, (kind, model) = pick(self.caps(), place)
        self.pair.ask("remove_spend_cap", user_id=name, cap_type=kind, model=model)

    @precondition(lambda self: self.caps())
    @rule(place=places, model=models, amount=amounts)
    def check_cap(self, place: int, model: str | None, amount: int) -> None:
        name, _ = pick(self.caps(), place)
        self.pair.ask("check_spend_cap", user_id=name, model=model, amount=amount)

    @rule(team=st.sampled_from([None, "crew", "ann"]), amount=st.integers(0, 30), key=keys)
    def team(self, team: str | None, amount: int, key: str | None) -> None:
        if team in self.model.accounts or not amount:  # KNOWN
            key = None
        if len(self.model.accounts) < 5:
            self.pair.ask(
                "create_team", name="Crew", initial_balance=amount, team_id=team, idempotency_key=key
            )

    @rule(user=members, cap=st.one_of(st.none(), amounts), period=st.sampled_from(["lifetime", "daily", "monthly"]))
    def member(self, user: str, cap: int | None, period: str) -> None:
        self.pair.ask("add_team_member", team_id="crew", user_id=user, spend_cap=cap, spend_cap_period=period)

    @rule(user=members)
    def member_leaves(self, user: str) -> None:
        self.pair.ask("remove_team_member", team_id="crew", user_id=user)

    @rule(user=members, usage=usages, ttl=ttls, key=keys)
    def team_hold(self, user: str, usage: Answer, ttl: int, key: str | None) -> None:
        self.pair.ask(
            "reserve_team", team_id="crew", user_id=user, metrics=usage, ttl_seconds=ttl, idempotency_key=key
        )

    @rule(user=members, amount=amounts, model=models, least=st.sampled_from([None, None, 9]), ttl=ttls, key=keys)
    def team_hold_amount(
        self, user: str, amount: int, model: str | None, least: int | None, ttl: int, key: str | None
    ) -> None:
        self.pair.ask(
            "reserve_team_credits",
            team_id="crew",
            user_id=user,
            amount=amount,
            model=model,
            min_balance=least,
            ttl_seconds=ttl,
            idempotency_key=key,
        )

    @rule(user=members, usage=usages, key=keys)
    def team_charge(self, user: str, usage: Answer, key: str | None) -> None:
        self.pair.ask("deduct_team", team_id="crew", user_id=user, metrics=usage, idempotency_key=key)

    @rule(user=members, amount=amounts, model=models, key=keys)
    def team_charge_amount(self, user: str, amount: int, model: str | None, key: str | None) -> None:
        self.pair.ask(
            "deduct_team_credits", team_id="crew", user_id=user, amount=amount, model=model, idempotency_key=key
        )

    @rule(dry_run=st.booleans())
    def sweep(self, dry_run: bool) -> None:
        self.pair.ask("sweep_expired_credits", dry_run=dry_run)

    @rule(user=users, usage=usages, least=st.sampled_from([None, None, 0, 9]), ttl=ttls, key=keys)
    def hold(self, user: str, usage: Answer, least: int | None, ttl: int, key: str | None) -> None:
        self.pair.ask(
            "reserve", user_id=user, metrics=usage, min_balance=least, ttl_seconds=ttl, idempotency_key=key
        )

    @rule(user=users, amount=amounts, model=models, least=st.sampled_from([None, None, 0, 9]), ttl=ttls, key=keys)
    def hold_amount(
        self, user: str, amount: int, model: str | None, least: int | None, ttl: int, key: str | None
    ) -> None:
        self.pair.ask(
            "reserve_credits",
            user_id=user,
            amount=amount,
            model=model,
            min_balance=least,
            ttl_seconds=ttl,
            idempotency_key=key,
        )

    @precondition(lambda self: self.holds())
    @rule(place=places, amount=st.integers(0, 15), ttl=st.one_of(st.none(), ttls), key=keys)
    def extend(self, place: int, amount: int, ttl: int | None, key: str | None) -> None:
        _, hold = pick(self.holds(), place)
        self.pair.ask(
            "extend_reservation",
            reservation_id=hold.reservation_id,
            add_amount=amount,
            ttl_seconds=ttl,
            idempotency_key=key,
        )

    @precondition(lambda self: self.holds())
    @rule(place=places)
    def release(self, place: int) -> None:
        _, hold = pick(self.holds(), place)
        self.pair.ask("release_reservation", reservation_id=hold.reservation_id)

    @rule(user=users, usage=usages, key=keys)
    def charge(self, user: str, usage: Answer, key: str | None) -> None:
        self.pair.ask("deduct", user_id=user, metrics=usage, idempotency_key=key)

    @rule(user=users, amount=amounts, model=models, key=keys)
    def charge_amount(self, user: str, amount: int, model: str | None, key: str | None) -> None:
        self.pair.ask("deduct_credits", user_id=user, amount=amount, model=model, idempotency_key=key)

    @rule(user=users, job=st.sampled_from(["report", "gift"]), key=keys)
    def charge_job(self, user: str, job: str, key: str | None) -> None:
        self.pair.ask("deduct_fixed", user_id=user, job_name=job, idempotency_key=key)

    @precondition(lambda self: self.holds())
    @rule(
        place=places,
        asked=st.one_of(
            usages.map(lambda usage: {"metrics": usage}),
            st.builds(lambda amount, model: {"amount": amount, "model": model}, amounts, models),
        ),
        final=st.booleans(),
        key=keys,
    )
    def settle(self, place: int, asked: Answer, final: bool, key: str | None) -> None:
        name, hold = pick(self.holds(), place)
        call = "deduct" if hold.actor_id is None else "deduct_team"
        call += "_credits" if "amount" in asked else ""
        who = {"user_id": name} if hold.actor_id is None else {"team_id": name, "user_id": hold.actor_id}
        more = {"reservation_id": hold.reservation_id, "final": final, "idempotency_key": key}
        self.pair.ask(call, **who, **asked, **more)

    @precondition(lambda self: self.rows("usage", "refund"))
    @rule(place=places, amount=st.one_of(st.none(), st.integers(1, 12)), key=keys)
    def refund(self, place: int, amount: int | None, key: str | None) -> None:
        _, row = pick(self.rows("usage", "refund"), place)
        self.pair.ask("refund_credits", transaction_id=row.transaction_id, amount=amount, idempotency_key=key)

    @precondition(lambda self: self.pair.keyed)
    @rule(place=places)
    def again(self, place: int) -> None:
        name, arguments = pick(self.pair.keyed, place)
        self.pair.ask(name, **arguments)


@pytest.fixture(scope="module")
def ledger(server: Server, template_db: str) -> Iterator[Ledger]:
    with _database(server, template_db) as (_, dsn), psycopg.connect(dsn, autocommit=True) as conn:
        for prices in VERSIONS:
            CreditManager(conn).publish_pricing(prices.config(ZONE), activate=prices is VERSIONS[0])
        yield Ledger(conn, Clock(conn))


def run(ledger: Ledger, examples: int, steps: int, derandomize: bool) -> None:
    run_state_machine_as_test(
        lambda: Machine(ledger),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            **DEV,
        ),
    )


def test_the_database_answers_as_the_model_does(ledger: Ledger) -> None:
    run(ledger, 25, 40, derandomize=True)


@pytest.mark.slow
def test_the_database_answers_as_the_model_does_for_long(ledger: Ledger) -> None:
    run(ledger, 120, 60, derandomize=False)
