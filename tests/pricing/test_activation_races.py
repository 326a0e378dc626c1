"""Prices that change while sessions charge: each charge has the price and the terms of one version, its row's.

The versions differ in everything that a charge takes from one: formula, factor, rounding, allowance, jobs, tools, a
plan's own prices. What a row says of its version is compared with what that version gives; which version it may be,
with the activations that were there when the call was made.
"""

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connect, Connection
from psycopg import IsolationLevel
from psycopg.rows import dict_row
from sessions import race, waits

from ducto_pg import CreditManager
from ducto_pg.errors import ConcurrencyError, DuctoError, InvalidArgumentError, PricingNotLoadedError

LEVELS = [IsolationLevel.READ_COMMITTED, IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE]
ROUNDINGS = ["carry", "up", "down", "half_up"]
MUCH = 10**12

# --- Versions and what they give --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prices:
    """The config of version `number`, and what it gives."""

    number: int

    @property
    def rate(self) -> Decimal:
        return Decimal(self.number) + Decimal("0.0137")

    @property
    def terms(self) -> int:
        """How many terms the formula has: versions have formulas of their own, not only rates."""
        return 1 + self.number % 40

    @property
    def factor(self) -> int:
        return 1 + self.number % 3

    @property
    def rounding(self) -> str:
        return ROUNDINGS[self.number % 4]

    @property
    def allowance(self) -> int:
        """All or nothing, so that a row shows whose it was."""
        return MUCH * (self.number % 2)

    def config(self, **more: Any) -> dict[str, Any]:
        formula = " + ".join([f"input_tokens * {self.rate}", *["output_tokens * 0.5"] * self.terms])
        return {
            "match": "prefix",
            "free": ["input_tokens", "output_tokens"],
            "models": {"m": formula, "_default": f"input_tokens * {self.rate} + {self.number}"},
            "tools": {"browse": f"tool_calls * {self.number}"},
            "fixed": {"job": 1000 + self.number},
            "min_balance": 0,
            "low_balance": 0,
            "rounding": self.rounding,
            "factor": self.factor,
            "signup_bonus": MUCH,
            "plans": {
                "pro": {"id": "pro", "name": "Pro", "free_allowance": self.allowance, "factor": 2},
                "own": {"id": "own", "name": "Own", "rate_overrides": {"m": f"output_tokens * {self.rate}"}},
            },
            **more,
        }

    def cost(self, usage: dict[str, Any], plan: str | None) -> Decimal:
        """What the formulas give for a usage, in credits."""
        if "fixed_job" in usage:
            return Decimal(1000 + self.number)
        inputs, outputs = Decimal(usage.get("input_tokens", 0)), Decimal(usage.get("output_tokens", 0))
        if usage["model"].partition("-")[0] != "m":
            cost = inputs * self.rate + self.number
        elif plan == "own":
            cost = outputs * self.rate
        else:
            cost = inputs * self.rate + outputs * Decimal("0.5") * self.terms
        calls = len(usage.get("tool_calls", []))
        return (cost + calls * self.number) * self.factor * (2 if plan == "pro" else 1)

    def charged(self, cost: Decimal, carry: Decimal) -> int:
        match self.rounding:
            case "carry":
                return int((carry + cost).to_integral_value(ROUND_FLOOR))
            case "up":
                return ceil(cost)
            case "down":
                return int(cost)
        return int((cost + Decimal("0.5")).to_integral_value(ROUND_FLOOR))


def ceil(cost: Decimal) -> int:
    return int(cost.to_integral_value(ROUND_CEILING))


def check_rows(conn: Connection) -> list[dict[str, Any]]:
    """Each charge has the cost, the rounding and the allowance of its row's version; answers all charges."""
    with conn.cursor(row_factory=dict_row) as cursor:
        holds = {row["hold_id"]: row for row in cursor.execute("select * from ducto_private.holds").fetchall()}
        rows = cursor.execute("select * from ducto_private.ledger order by account_id, seq").fetchall()
    carry: dict[str, Decimal] = {}
    used: dict[tuple[str, str], int] = {}
    for row in rows:
        account, before = row["account_id"], carry.get(row["account_id"], Decimal(0))
        period = (account, row["created_at"].astimezone(UTC).strftime("%Y-%m"))
        if row["type"] == "usage":
            prices = Prices(row["pricing_version"])
            if row["usage"] is not None:
                assert row["cost"] == prices.cost(row["usage"], row["plan_id"]), row
            charged = row["allowance_used"] - row["amount"]
            assert charged == prices.charged(row["cost"], before), row
            left = max(0, prices.allowance - used.get(period, 0)) if row["plan_id"] == "pro" else 0
            if row["hold_id"]:
                # Its price is the hold's, its allowance the present one.
                assert row["pricing_version"] == holds[row["hold_id"]]["pricing_version"], row
                assert row["allowance_used"] in (0, charged) if row["plan_id"] == "pro" else not row["allowance_used"]
            else:
                assert row["allowance_used"] == min(charged, left), row
            used[period] = used.get(period, 0) + row["allowance_used"]
        elif row["type"] == "signup_bonus":
            assert row["amount"] == MUCH
        carry[account] = row["carry_after"]
    for hold in holds.values():
        if hold["status"] == "active" and hold["metrics"] is not None and hold["charged"] == 0:
            assert hold["held"] == ceil(Prices(hold["pricing_version"]).cost(hold["metrics"], hold["plan_id"])), hold
    assert CreditManager(conn).verify_ledger() == []
    return [row for row in rows if row["type"] == "usage"]


ACCOUNTS = {"plain": None, "pro": "pro", "own": "own"}


def open_accounts(manager: CreditManager, *names: str) -> list[str]:
    """An account without a plan and one on each plan, for each name."""
    users = []
    for name in names:
        for kind, plan in ACCOUNTS.items():
            user = f"{name} {kind}"
            manager.add_credits(user, MUCH).or_raise()
            if plan:
                manager.set_user_plan(user, plan).or_raise()
            users.append(user)
    return users


def usage_of(rng: random.Random) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "model": rng.choice(["m", "m-2024-05-13", "unlisted"]),
        "input_tokens": rng.randint(1, 50),
        "output_tokens": rng.randint(1, 50),
    }
    return usage | ({"tool_calls": ["browse"] * 2} if rng.random() < 0.25 else {})


# --- Sessions that publish at the same moment -------------------------------------------------------------------------


def test_publishers_get_versions_of_their_own(connect: Connect, conn: Connection) -> None:
    versions = race(
        managers(connect), lambda m, number: m.publish_pricing(Prices(1).config(min_balance=number)).version
    )
    assert sorted(versions) == list(range(1, 9))
    history = CreditManager(conn).get_pricing_history()
    assert [item.active for item in history] == [True] + [False] * 7


def test_publishes_and_activations(connect: Connect, conn: Connection) -> None:
    owner = CreditManager(conn)
    owner.publish_pricing(Prices(1).config())

    def publish(manager: CreditManager, number: int) -> int | None:
        if number % 2:
            manager.activate_pricing(1)
        return manager.publish_pricing(Prices(2 + number).config(), str(number)).version

    assert sorted(map(int, filter(None, race(managers(connect), publish)))) == list(range(2, 10))
    assert sum(item.active for item in owner.get_pricing_history()) == 1


def test_publishing_the_same_prices(connect: Connect, conn: Connection) -> None:
    CreditManager(conn).publish_pricing(Prices(1).config())
    versions = race(managers(connect), lambda m, _: m.publish_pricing(Prices(2).config()).version)
    assert set(versions) == {2}


def managers(connect: Connect) -> list[CreditManager]:
    """Eight sessions."""
    return [CreditManager(connect()) for _ in range(8)]


# --- Many sessions charge, two change the prices ----------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """The recorded activations as one commit left them: (version, when it starts, whether it was taken back)."""

    activations: tuple[tuple[int, datetime | None, bool], ...]
    before_commit: float
    after_commit: float

    def active(self, at: datetime) -> int | None:
        """Of the activations whose time has come, the one recorded last."""
        due = [version for version, starts, gone in self.activations if not gone and (starts is None or starts <= at)]
        return due[-1] if due else None


@dataclass(frozen=True)
class Made:
    """Charges and holds of one committed call, and when its snapshot of the prices was taken."""

    ids: tuple[str, ...]
    began: float
    ended: float


@dataclass
class Market:
    connect: Connect
    owner: CreditManager
    level: IsolationLevel
    seed: int
    changes: int
    scheduled: bool
    states: list[State] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    published: int = 0
    over: bool = False
    progress: threading.Condition = field(default_factory=threading.Condition)
    serial: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        print(f"seed {self.seed}")
        for _ in range(3):
            self.owner.publish_pricing(Prices(self.published + 1).config(), activate=self.published == 0)
            self.published += 1
        self.users = open_accounts(self.owner, "one", "two")
        source = self.owner._source
        assert isinstance(source, psycopg.Connection)
        self.states = [self.read(source, 0.0, 0.0)]
        sessions = [self.connect(autocommit=False) for _ in range(6)]
        for session in sessions:
            session.isolation_level = self.level
        # Those that change prices do so at READ COMMITTED, where none fails, and at the level itself.
        sessions[0].isolation_level = IsolationLevel.READ_COMMITTED
        race(sessions, lambda session, number: (self.change if number < 2 else self.charge)(number, session))

    def read(self, conn: Connection, before: float, after: float) -> State:
        rows = conn.execute(
            "select version, nullif(starts_at, '-infinity'), withdrawn_at is not null"
            " from ducto_private.activations order by activation_id"
        ).fetchall()
        return State(tuple((version, starts, gone) for version, starts, gone in rows), before, after)

    def change(self, number: int, conn: Connection) -> None:
        rng, manager, done = random.Random(f"{self.seed} prices {number}"), CreditManager(conn), 0
        try:
            while done < self.changes:
                with self.progress:
                    # Not before some more charges were made.
                    seen = len(self.made)
                    self.progress.wait_for(lambda seen=seen: len(self.made) > seen + 2 or self.over, 60)  # type: ignore[misc]
                try:
                    before = self.read(conn, 0.0, 0.0)
                    self.step(rng, manager)
                    # The setup lock is held until the commit: states are read in the order of commits, but for those of
                    # older snapshots, which can change nothing.
                    state = self.read(conn, time.monotonic(), 0.0)
                    conn.commit()
                    state = State(state.activations, state.before_commit, time.monotonic())
                    with self.serial:
                        self.states += [state] * (state.activations != before.activations)
                    done += 1
                except (ConcurrencyError, psycopg.errors.SerializationFailure) as error:
                    conn.rollback()
                    self.count(f"change {getattr(error, 'code', None) or getattr(error, 'sqlstate', None)}")
                except InvalidArgumentError as error:
                    # Its time had come, or there is nothing to take back.
                    conn.rollback()
                    if not re.search("p_at must be|is not scheduled", str(error)):
                        raise
        finally:
            with self.progress:
                self.over = True
                self.progress.notify_all()

    def step(self, rng: random.Random, manager: CreditManager) -> None:
        kind = rng.choice(["publish", "activate", *["schedule", "schedule", "unschedule"] * self.scheduled])
        version = rng.randint(1, 3)
        match kind:
            case "publish":
                # Numbered under the setup lock, by whoever has it.
                manager._source.execute("select ducto_private.lock_setup()")  # type: ignore[union-attr]
                version = len(manager.get_pricing_history()) + 1
                assert manager.publish_pricing(Prices(version).config()).version == version
            case "activate":
                manager.activate_pricing(version)
            case "schedule":
                manager.activate_pricing(version, at=datetime.now(UTC) + timedelta(milliseconds=rng.randint(2, 40)))
            case "unschedule":
                manager.activate_pricing(version, at=datetime.now(UTC) + timedelta(milliseconds=rng.randint(10, 40)))
                manager.unschedule_pricing(version)
        self.count(kind)

    def count(self, what: str) -> None:
        with self.serial:
            self.outcomes[what] += 1

    def charge(self, number: int, conn: Connection) -> None:
        try:
            self.charge_on(number, conn)
        finally:
            with self.progress:
                self.over = True
                self.progress.notify_all()

    def charge_on(self, number: int, conn: Connection) -> None:
        rng, manager = random.Random(f"{self.seed} charges {number}"), CreditManager(conn)
        while not self.over:
            try:
                conn.autocommit = rng.random() < 0.5
                if conn.autocommit:
                    conn.execute(f"set default_transaction_isolation = '{self.level.name.lower().replace('_', ' ')}'")
                done = []
                first: tuple[float, float] | None = None
                # A transaction of several calls keeps to one account, lest it make a deadlock of its own.
                user = rng.choice(self.users)
                for _ in range(1 if conn.autocommit else rng.randint(1, 3)):
                    began = time.monotonic()
                    ids = self.call(rng, manager, user, f"{number}" if conn.autocommit else "")
                    window = (began, time.monotonic())
                    # Above READ COMMITTED a transaction sees the prices of its first statement.
                    first = first or window
                    if self.level is not IsolationLevel.READ_COMMITTED and not conn.autocommit:
                        window = first
                    done.append(Made(tuple(ids), *window))
                conn.commit()
                with self.progress:
                    self.made += done
                    self.progress.notify_all()
            except ConcurrencyError as error:
                conn.rollback()
                if error.code != "40001" or self.level is IsolationLevel.READ_COMMITTED:
                    raise
                self.count("40001")
            except psycopg.errors.SerializationFailure:
                conn.rollback()
                if self.level is IsolationLevel.READ_COMMITTED:
                    raise
                self.count("40001")

    def call(self, rng: random.Random, manager: CreditManager, user: str, news: str) -> list[str]:
        """Makes a call, and answers the charges and holds whose version was found then."""
        usage = usage_of(rng)
        kind = rng.choice(["charge", "charge", "batch", "batch", "job", "hold", "settle"])
        self.count(kind)
        match kind:
            case "charge":
                return [manager.deduct(user, usage).or_raise().transaction_id]
            case "job":
                return [manager.deduct_fixed(user, "job").or_raise().transaction_id]
            case "hold":
                return [manager.reserve(user, usage, ttl_seconds=3600).or_raise().reservation_id]
            case "settle":
                hold = manager.reserve(user, usage, ttl_seconds=3600).or_raise().reservation_id
                if rng.random() < 0.5:
                    manager.deduct(user, usage_of(rng), reservation_id=hold, final=False).or_raise()
                manager.deduct(user, usage_of(rng), reservation_id=hold).or_raise()
                return [hold]
        charges: list[dict[str, Any]] = []
        for name in [*rng.sample(self.users, 2), f"new {news} {rng.randrange(10**6)}"] if news else [user]:
            charges += [{"user_id": name, "metrics": usage}, {"user_id": name, "job": "job"}]
            charges += [{"user_id": name, "metrics": usage}, {"user_id": name, "metrics": usage_of(rng)}]
        rng.shuffle(charges)
        return [row.or_raise().transaction_id for row in manager.deduct_batch(charges)]

    def check(self, conn: Connection) -> Counter[int]:
        """Each version is one that was active, at the time of the row, in a state that the call can have seen."""
        check_rows(conn)
        found = {
            str(name): (version, at)
            for name, version, at in conn.execute(
                "select transaction_id, pricing_version, created_at from ducto_private.transactions"
                " union all select hold_id, pricing_version, created_at from ducto_private.holds"
            ).fetchall()
        }
        # Those that hold the setup lock commit one after the other.
        states = sorted(self.states, key=lambda state: state.before_commit)
        versions: Counter[int] = Counter()
        for made in self.made:
            sure = [n for n, state in enumerate(states) if state.after_commit <= made.began]
            seen = states[max(sure) :]
            seen = [state for state in seen if state.before_commit <= made.ended]
            for name in made.ids:
                version, at = found[name]
                assert version in {state.active(at) for state in seen}, (version, at, made, seen)
                versions[version] += 1
        return versions


def trade(
    connect: Connect, conn: Connection, level: IsolationLevel, seed: int, changes: int, scheduled: bool
) -> Market:
    market = Market(connect, CreditManager(conn), level, seed, changes, scheduled)
    market.run()
    versions = market.check(conn)
    print(level.name, len(market.made), "calls", market.outcomes, dict(versions))
    assert len(versions) > 2
    assert sum(versions.values()) > changes
    return market


@pytest.mark.parametrize("scheduled", [False, True], ids=["at once", "scheduled"])
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_prices_change_while_sessions_charge(
    connect: Connect, conn: Connection, level: IsolationLevel, scheduled: bool
) -> None:
    trade(connect, conn, level, 1, 10, scheduled)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_prices_change_often_while_sessions_charge(
    connect: Connect, conn: Connection, level: IsolationLevel, seed: int
) -> None:
    market = trade(connect, conn, level, seed, 80, True)
    assert {"publish", "activate", "schedule", "unschedule"} < set(market.outcomes)


# --- Between any two statements ---------------------------------------------------------------------------------------

STOP = 71094
STOPPED = [
    "ducto.deduct_batch(jsonb)",
    "ducto_private.spend(text,ducto_private.request[])",
    "ducto_private.open_account(ducto_private.accounts,integer)",
]


class Stops:
    """The functions on the road of charges, which stop before each statement where they are told to."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.count = 0
        conn.execute(
            f"""
            create function ducto_private.stop(p_stop integer) returns void language plpgsql volatile as '
            begin
              if current_setting(''test.stop'', true) = ''-1'' then
                perform set_config(''test.met'', current_setting(''test.met'', true) || '' '' || p_stop, false);
              elsif current_setting(''test.stop'', true) = p_stop::text then
                perform pg_advisory_lock_shared({STOP});
                perform pg_advisory_unlock_shared({STOP});
              end if;
            end'
            """
        )
        for name in STOPPED:
            row = conn.execute("select pg_get_functiondef(%s::regprocedure)", [name]).fetchone()
            assert row
            conn.execute("\n".join(self.stopping(row[0].splitlines())))
        conn.execute("select ducto_private.store_objects()")

    def stopping(self, lines: list[str]) -> Iterator[str]:
        """The lines of a PL/pgSQL function, with a stop where a statement begins a line."""
        declares, before = True, ""
        for line in lines:
            text = line.strip()
            if text and not text.startswith("--"):
                first = text.split()[0].rstrip(";")
                begins = before.endswith(";") or before.split(" ")[-1] in ("then", "else", "loop", "begin")
                # A stop would change what FOUND says.
                asks = "found" in text or first in ("end", "else", "elsif", "exception", "when", "begin", "get")
                if not declares and begins and not asks:
                    yield f"perform ducto_private.stop({self.count});"
                    self.count += 1
                declares = (declares or first == "declare") and first != "begin"
                before = text
            yield line


@dataclass
class Stage:
    """A session that is stopped in the midst of a call, and one that does something meanwhile."""

    session: Connection
    other: Connection

    def met(self, call: Callable[[CreditManager], Any]) -> list[int]:
        """The stops that a call meets."""
        self.session.execute("select set_config('test.stop', '-1', false), set_config('test.met', '', false)")
        call(CreditManager(self.session))
        row = self.session.execute("select current_setting('test.met')").fetchone()
        assert row
        return sorted({int(stop) for stop in row[0].split()})

    def play(self, stop: int, call: Callable[[CreditManager], Any], meanwhile: Callable[[], Any]) -> tuple[bool, Any]:
        """Whether the call came to that stop, and what it was answered or raised."""
        self.session.execute("select set_config('test.stop', %s, false)", [str(stop)])
        self.other.execute("select pg_advisory_lock(%s)", [STOP])
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(call, CreditManager(self.session))
            stopped = False
            while not (running.done() or stopped):
                stopped = waits(self.other, self.session, self.other)
            try:
                if stopped:
                    meanwhile()
            finally:
                self.other.execute("select pg_advisory_unlock(%s)", [STOP])
            try:
                return stopped, running.result(60)
            except DuctoError as error:
                return stopped, error


ROAD: dict[str, Callable[[CreditManager, str, dict[str, Any]], Any]] = {
    "usage": lambda m, u, at: m.deduct(f"one {u}", at["usage"]),
    "part by part": lambda m, u, at: m.deduct(f"one {u}", at["usage"] | {"tool_calls": ["browse"]}),
    "amount": lambda m, u, at: m.deduct_credits(f"one {u}", 7, model="m-2024"),
    "job": lambda m, u, at: m.deduct_fixed(f"one {u}", "job", at["key"]),
    "hold": lambda m, u, at: m.reserve(f"one {u}", at["usage"], idempotency_key=at["key"]),
    "extend": lambda m, u, at: m.extend_reservation(at["known"], 5),
    "settle": lambda m, u, at: m.deduct(f"one {u}", at["usage"], reservation_id=at["hold"]),
    "settle a part": lambda m, u, at: m.deduct(f"one {u}", at["usage"], reservation_id=at["hold"], final=False),
    "opening": lambda m, u, at: m.deduct(f"new {at['key']}", at["usage"]),
    "batch": lambda m, u, at: m.deduct_batch(
        [
            {"user_id": f"one {u}", "metrics": at["usage"]},
            {"user_id": f"two {u}", "metrics": at["usage"]},
            {"user_id": f"new {at['key']}", "metrics": at["usage"]},
            {"user_id": f"one {u}", "job": "job"},
            {"user_id": f"one {u}", "metrics": at["usage"]},
            {"user_id": f"one {u}", "metrics": at["usage"], "reservation_id": at["hold"]},
            {"user_id": f"one {u}", "metrics": at["usage"]},
            {"user_id": f"new {at['key']}", "metrics": at["usage"]},
        ]
    ),
}  # fmt: skip


class TestBetweenAnyTwoStatements:
    """Of a charge, a hold, a settlement or a batch, somebody activates another version, or a schedule's time comes."""

    def play(
        self,
        connect: Connect,
        conn: Connection,
        level: IsolationLevel,
        change: Callable[[CreditManager], None],
        every: int,
        back: Callable[[], None] | None = None,
    ) -> None:
        owner = CreditManager(conn)
        for number in (1, 2):
            owner.publish_pricing(Prices(number).config())
        open_accounts(owner, "one", "two")
        Stops(conn)
        stage = Stage(connect(), connect())
        stage.session.execute(f"set default_transaction_isolation = '{level.name.lower().replace('_', ' ')}'")
        stops, number = Counter[str](), 0

        def scene(kind: str) -> dict[str, Any]:
            # Few activations: how long it takes to record one grows with their number.
            conn.execute("delete from ducto_private.activations where ends_at = '-infinity'")
            if back:
                back()
            hold = owner.reserve(f"one {kind}", {"model": "m", "input_tokens": 3}, ttl_seconds=36000).or_raise()
            known = owner.reserve_credits(f"one {kind}", 5, ttl_seconds=36000).or_raise()
            usage = {"model": "m", "input_tokens": 5 + number % 7, "output_tokens": 3}
            return {"key": f"{number}", "hold": hold.reservation_id, "known": known.reservation_id, "usage": usage}

        for name, call in ROAD.items():
            for kind in ACCOUNTS:
                number += 1
                first = scene(kind)
                met = stage.met(lambda m, call=call, kind=kind, at=first: call(m, kind, at))  # type: ignore[misc]
                for stop in met[number % every :: every]:
                    number += 1
                    at = scene(kind)
                    stopped, answer = stage.play(
                        stop,
                        lambda m, call=call, kind=kind, at=at: call(m, kind, at),  # type: ignore[misc]
                        lambda: change(owner),
                    )
                    stops[name] += stopped
                    assert not isinstance(answer, DuctoError), (name, stop, answer)
                    for one in answer if isinstance(answer, list) else [answer]:
                        assert one.error is None, (name, stop, one)
        print("stopped", stops)
        assert min(stops[name] for name in ROAD) > 50 // every
        rows = check_rows(conn)
        assert {row["pricing_version"] for row in rows} == {1, 2}

    @pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
    def test_another_version(self, connect: Connect, conn: Connection, level: IsolationLevel) -> None:
        self.play(connect, conn, level, self.activate, 11)

    @pytest.mark.slow
    @pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
    def test_another_version_at_each(self, connect: Connect, conn: Connection, level: IsolationLevel) -> None:
        self.play(connect, conn, level, self.activate, 1)

    def activate(self, owner: CreditManager) -> None:
        active = owner.get_active_pricing()
        assert active
        owner.activate_pricing(3 - active.version)

    def test_its_time_comes(self, connect: Connect, conn: Connection, clock: Clock) -> None:
        self.come(connect, conn, clock, 11)

    @pytest.mark.slow
    def test_its_time_comes_at_each(self, connect: Connect, conn: Connection, clock: Clock) -> None:
        self.come(connect, conn, clock, 1)

    def come(self, connect: Connect, conn: Connection, clock: Clock, every: int) -> None:
        now = datetime(2026, 6, 1, tzinfo=UTC)
        clock.set(now)
        owner = CreditManager(conn)

        def back() -> None:
            nonlocal now
            now += timedelta(seconds=60)
            clock.set(now)
            conn.execute("delete from ducto_private.activations")
            owner.activate_pricing(1 + now.minute % 2)
            owner.activate_pricing(2 - now.minute % 2, at=now + timedelta(seconds=30))

        self.play(connect, conn, LEVELS[0], lambda owner: clock.set(now + timedelta(seconds=30)), every, back)

    @pytest.mark.parametrize("name", [name for name in ROAD if not name.startswith(("settle", "extend"))])
    def test_the_first_version_of_all(self, connect: Connect, conn: Connection, name: str) -> None:
        """Either there was none, or the charge is priced by it, terms and all."""
        owner, stops = CreditManager(conn), Stops(conn)
        owner.publish_pricing(Prices(1).config(), activate=False)
        users = open_accounts_unpriced(owner, "one", "two")
        stage = Stage(connect(), connect())
        kept = 0
        for stop in range(stops.count):
            conn.execute("delete from ducto_private.activations")
            at = {"key": f"{stop}", "usage": {"model": "m", "input_tokens": 3, "output_tokens": 1}, "hold": ""}
            call = ROAD[name]
            if name == "batch":
                call = lambda m, u, at: m.deduct_batch([{"user_id": user, "metrics": at["usage"]} for user in users])  # noqa: E731
            stopped, answer = stage.play(
                stop,
                lambda m, call=call, at=at: call(m, "plain", at),  # type: ignore[misc]
                lambda: owner.activate_pricing(1),
            )
            if isinstance(answer, DuctoError):
                assert isinstance(answer, PricingNotLoadedError), (stop, answer)
            else:
                kept += 1
                assert stopped
        check_rows(conn)
        rows = conn.execute(
            "select pricing_version from ducto_private.transactions where type = 'usage'"
            " union all select pricing_version from ducto_private.holds"
        ).fetchall()
        assert set(rows) <= {(1,)}
        assert kept > 0


def open_accounts_unpriced(manager: CreditManager, *names: str) -> list[str]:
    users = [f"{name} plain" for name in names]
    for user in users:
        manager.add_credits(user, MUCH).or_raise()
    return users


# --- Accounts whose clock is not the server's -------------------------------------------------------------------------

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
USAGE = {"model": "m", "input_tokens": 7, "output_tokens": 3}


@dataclass
class Zone:
    """Version 1 is active, 2 is scheduled for one o'clock. Accounts named "late …" were last changed at two, those
    named "early …" at noon; the server's clock says noon."""

    manager: CreditManager
    conn: Connection
    clock: Clock

    def made(self, user: str, versions: set[int]) -> None:
        """All calls on this account are priced by these versions, rows and answers alike."""
        m, conn = self.manager, self.conn
        plan = user.split()[-1] if user.split()[-1] in ("pro", "own") else None
        costs = {Prices(version).cost(USAGE, plan) for version in versions}
        jobs = {Decimal(1000 + version) for version in versions}
        assert {m.calculate_cost(USAGE, user).total, m.deduct(user, USAGE).or_raise().cost} == costs
        (priced, job) = m.deduct_batch([{"user_id": user, "metrics": USAGE}, {"user_id": user, "job": "job"}])
        assert ({priced.cost}, {job.cost}) == (costs, jobs)
        hold = m.reserve(user, USAGE, ttl_seconds=86400).or_raise()
        assert {hold.amount} == {ceil(cost) for cost in costs}
        found = conn.execute(
            "select pricing_version from ducto_private.holds where hold_id = %s", [hold.reservation_id]
        ).fetchall()
        assert {version for (version,) in found} == versions
        assert m.release_reservation(hold.reservation_id).error is None
        check_rows(conn)


@pytest.fixture
def zone(conn: Connection, clock: Clock) -> Zone:
    clock.set(NOON)
    manager = CreditManager(conn)
    for number in (1, 2, 3):
        manager.publish_pricing(Prices(number).config(), activate=number == 1)
    clock.set(NOON + 2 * HOUR)
    open_accounts(manager, "late")
    clock.set(NOON)
    open_accounts(manager, "early")
    manager.activate_pricing(2, at=NOON + HOUR)
    return Zone(manager, conn, clock)


@pytest.mark.parametrize("kind", ACCOUNTS)
class TestClocks:
    def test_ahead_of_the_server(self, zone: Zone, kind: str) -> None:
        for server, early in ((0.0, 1), (0.5, 1), (1.0, 2), (1.5, 2), (3.0, 2)):
            zone.clock.set(NOON + server * HOUR)
            zone.made(f"late {kind}", {2})
            zone.made(f"early {kind}", {early})

    def test_the_server_goes_back(self, zone: Zone, kind: str) -> None:
        """An account goes on where it was; others hear the server's clock again."""
        zone.made(f"early {kind}", {1})
        zone.clock.set(NOON + 1.5 * HOUR)
        zone.made(f"early {kind}", {2})
        zone.clock.set(NOON)
        zone.made(f"early {kind}", {2})
        zone.manager.add_credits("another", 10**6)
        zone.made("another", {1})

    def test_at_the_very_moment(self, zone: Zone, kind: str) -> None:
        zone.clock.set(NOON + HOUR - timedelta(microseconds=1))
        zone.made(f"early {kind}", {1})
        zone.clock.set(NOON + HOUR)
        zone.made(f"early {kind}", {2})
        zone.clock.set(NOON + HOUR - timedelta(microseconds=1))
        zone.made(f"early {kind}", {2})

    def test_taken_back(self, zone: Zone, kind: str) -> None:
        zone.made(f"late {kind}", {2})
        zone.manager.unschedule_pricing(2)
        zone.made(f"late {kind}", {1})
        zone.clock.set(NOON + 2 * HOUR)
        zone.made(f"early {kind}", {1})

    def test_at_once(self, zone: Zone, kind: str) -> None:
        """Holds from its commit, whatever either clock says."""
        zone.made(f"late {kind}", {2})
        zone.manager.activate_pricing(3)
        for server in (0, -1, 2):
            zone.clock.set(NOON + server * HOUR)
            zone.made(f"late {kind}", {3})
            zone.made(f"early {kind}", {3})

    def test_one_after_the_other(self, zone: Zone, kind: str) -> None:
        zone.manager.activate_pricing(3, at=NOON + 3 * HOUR)
        zone.made(f"late {kind}", {2})
        zone.manager.activate_pricing(1, at=NOON + 1.5 * HOUR)
        zone.made(f"late {kind}", {1})
        zone.made(f"early {kind}", {1})

    def test_a_batch_of_both(self, zone: Zone, kind: str) -> None:
        """Each account's elements by its own time, in one call."""
        users = [f"early {kind}", f"late {kind}", f"early {kind}", f"late {kind}", "new"]
        answers = zone.manager.deduct_batch([{"user_id": user, "metrics": USAGE} for user in users])
        expected = [1, 2, 1, 2, 1]
        for user, version, answer in zip(users, expected, answers, strict=True):
            plan = {"pro": "pro", "own": "own"}.get(user.split()[-1])
            assert answer.or_raise().cost == Prices(version).cost(USAGE, plan)
        check_rows(zone.conn)

    def test_holds_settle_by_their_version(self, zone: Zone, kind: str) -> None:
        m = zone.manager
        holds = {
            user: m.reserve(user, USAGE, ttl_seconds=10**6).or_raise() for user in (f"early {kind}", f"late {kind}")
        }
        for server in (2, 0, 2):
            zone.clock.set(NOON + server * HOUR)
            for number, (user, hold) in enumerate(holds.items(), 1):
                (batched,) = m.deduct_batch(
                    [{"user_id": user, "metrics": USAGE, "reservation_id": hold.reservation_id, "final": False}]
                )
                single = m.deduct(user, USAGE, reservation_id=hold.reservation_id, final=False)
                cost = Prices(number).cost(USAGE, None if kind == "plain" else kind)
                assert (batched.or_raise().cost, single.or_raise().cost) == (cost, cost)
        check_rows(zone.conn)


def test_a_batch_of_an_account_ahead_as_if_called_one_by_one(conn: Connection, clock: Clock) -> None:
    """The first version of all is scheduled; the account's time is past it, the server's is not."""
    manager = CreditManager(conn)
    clock.set(NOON + 2 * HOUR)
    manager.add_credits("ahead", 10**6).or_raise()
    clock.set(NOON)
    manager.publish_pricing(Prices(1).config(), at=NOON + HOUR)
    assert manager.deduct("ahead", USAGE).or_raise().cost == Prices(1).cost(USAGE, None)
    (answer,) = manager.deduct_batch([{"user_id": "ahead", "metrics": USAGE}])
    assert answer.or_raise().cost == Prices(1).cost(USAGE, None)
