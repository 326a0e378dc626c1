"""Calls that touch many accounts: no order of sessions is a deadlock, and no list of ids fills the lock table."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import permutations, product
from typing import Any

import psycopg
import pytest
from conftest import Connect, Connection
from ledger_helpers import UNKNOWN, Ledger, ask
from sessions import Arena, Cast, race, together
from steps import connection

from ducto_pg import CreditManager
from ducto_pg.errors import DuctoError, InvalidArgumentError

Call = Callable[[CreditManager], Any]

PLANS = {
    "free": {"id": "free", "name": "Free", "free_allowance": 40},
    "pro": {"id": "pro", "name": "Pro", "free_allowance": 1000, "rate_overrides": {"m": "input_tokens * 0.125"}},
}
CLOSED: dict[str, Any] = {
    "models": {"m": "input_tokens * 0.25", "square": "input_tokens ** 2"},
    "fixed": {"job": 30},
    "min_balance": 0,
    "plans": PLANS,
}
# Whether a first charge opens the account.
CONFIGS: dict[str, dict[str, Any]] = {
    "closed": CLOSED,
    "bonus": CLOSED | {"signup_bonus": 50},
    "plan": CLOSED | {"default_plan": "free"},
}


def errors(answer: Any) -> set[str]:
    """The refusals in an answer."""
    answers = answer if isinstance(answer, list) else [answer]
    return {error for one in answers if (error := getattr(one, "error", None))}


def batch(*charges: dict[str, Any]) -> Call:
    return lambda m: m.deduct_batch(list(charges))


def of(user: str, amount: int = 1, **more: Any) -> dict[str, Any]:
    return {"user_id": user, "amount": amount, **more}


# --- A batch of accounts that are not there yet -----------------------------------------------------------------------

OPENERS: dict[str, Callable[[CreditManager, str], Any]] = {
    "add": lambda m, u: m.add_credits(u, 10),
    "plan": lambda m, u: m.set_user_plan(u, "pro"),
    "cap": lambda m, u: m.set_spend_cap(u, 100),
    "limit": lambda m, u: m.set_credit_limit(u, 10),
    "charge": lambda m, u: m.deduct_credits(u, 1),
    "hold": lambda m, u: m.reserve_credits(u, 1),
    "batch": lambda m, u: m.deduct_batch([of(u), of(u, 2)]),
    "team": lambda m, u: m.create_team("Team", 10, team_id=u),
}
# The opener's transaction, the first holder's end, the batches' order, their transactions, the unknown name.
OPENINGS = list(
    product(
        CONFIGS,
        OPENERS,
        ["", "commit", "rollback"],
        ["rollback", "commit"],
        ["there", "back"],
        ["", "rollback"],
        ["xx", "zz"],
    )
)


def opening(
    cast: Cast, owner: CreditManager, scene: int, case: tuple[str, str, str, str, str, str, str], unknown: int
) -> int:
    """A batch of unknown and known accounts waits for a known one, somebody opens an unknown one, a second batch of the
    same waits, the first holder ends. Returns how many waited at most."""
    config, opener, opens, ends, order, batch_ends, name = case
    owner.publish_pricing(CONFIGS[config])
    known = f"{scene} yy"
    news = [f"{scene} {name} {number}" for number in range(unknown)]
    owner.add_credits(known, 100).or_raise()
    charges = [*(of(new) for new in news), of(known, 2)]
    if order == "back":
        charges.reverse()
    let_go = threading.Event()
    cast.open(0, lambda m: m.deduct_credits(known, 1).or_raise())
    cast.start(1, batch(*charges), batch_ends)
    cast.start(2, lambda m: OPENERS[opener](m, news[-1]), opens, let_go)
    cast.start(3, batch(*charges), batch_ends)
    cast.start(4, batch(*charges[::-1]))
    cast.start(5, lambda m: OPENERS["add"](m, news[0]))
    waiters = cast.waiters()
    cast.sessions[0].execute(ends)
    let_go.set()
    told = {error for answer in cast.answers() for error in errors(answer)}
    assert told <= {"account_not_found", "insufficient_credits", "is_a_team", "team_exists"}, case
    return waiters


@pytest.fixture
def owner(conn: Connection) -> CreditManager:
    manager = CreditManager(conn)
    manager.publish_pricing(CLOSED)
    return manager


class TestBatchesOfUnknownAccounts:
    def play(self, connect: Connect, owner: CreditManager, cases: list[Any]) -> None:
        cast = Cast(connect, 6)
        waited = [opening(cast, owner, scene, case, 1 + scene % 3) for scene, case in enumerate(cases)]
        cast.close()
        assert min(waited) >= 2
        assert max(waited) >= 4
        assert owner.verify_ledger() == []

    def test_nobody_is_in_a_deadlock(self, connect: Connect, owner: CreditManager) -> None:
        self.play(connect, owner, OPENINGS[::23])

    @pytest.mark.slow
    def test_in_all_variants(self, connect: Connect, owner: CreditManager) -> None:
        self.play(connect, owner, OPENINGS)

    @pytest.mark.parametrize("config", CONFIGS)
    def test_the_scene_as_it_was_reported(self, connect: Connect, owner: CreditManager, config: str) -> None:
        owner.add_credits("yy", 100).or_raise()
        owner.publish_pricing(CONFIGS[config])
        cast, both = Cast(connect, 4), batch(of("xx", 5), of("yy", 5))
        cast.open(0, lambda m: m.deduct_credits("yy", 1).or_raise())
        cast.start(1, both)
        cast.start(2, lambda m: m.add_credits("xx", 100))
        cast.start(3, both)
        assert cast.waiters() == (2 if config == "closed" else 3)
        cast.sessions[0].rollback()
        first, added, second = cast.answers()
        cast.close()
        assert added.error is None
        assert [row.error for row in first] == ["account_not_found" if config == "closed" else None, None]
        assert [row.error for row in second] == [None, None]
        assert owner.get_balance("yy").balance == 90
        assert owner.get_balance("xx").balance == {"closed": 95, "bonus": 140, "plan": 100}[config]
        assert owner.verify_ledger() == []

    def test_each_waits_for_what_the_other_opens(self, connect: Connect, owner: CreditManager) -> None:
        """Two batches of the same unknown accounts, named in opposite orders, while a third opens one of them."""
        owner.publish_pricing(CONFIGS["bonus"])
        names = [f"new {number:02}" for number in range(20)]
        for turn, held in enumerate((names[0], names[10], names[19])):
            cast = Cast(connect, 4)
            users = [f"{turn} {name}" for name in names]
            cast.open(0, lambda m, u=f"{turn} {held}": m.add_credits(u, 1).or_raise())  # type: ignore[misc]
            cast.start(1, batch(*(of(user) for user in users)))
            cast.start(2, batch(*(of(user) for user in reversed(users))))
            cast.start(3, batch(*(of(user) for user in random.Random(turn).sample(users, 20))))
            assert cast.waiters() == 3
            cast.sessions[0].rollback()
            assert {error for answer in cast.answers() for error in errors(answer)} == set()
            cast.close()
            assert {owner.get_balance(user).balance for user in users} == {47}
        assert owner.verify_ledger() == []


def test_batches_of_the_same_accounts_in_any_order(arena: Arena) -> None:
    """None waits for one that waits for it, also where the accounts are opened by the batches themselves."""
    users = [f"u{number}" for number in range(12)]
    arena.ledger.publish(min_balance=0, signup_bonus=1000)
    for turn in ("there", "opened"):
        names = [f"{user} {turn}" for user in users]
        if turn == "there":
            arena.given(*(ask.set_credit_limit(name, 0) for name in names))

        def charge(session: Ledger, number: int, names: list[str] = names) -> None:
            order = names[::-1] if number % 2 else names
            for _ in range(3):
                for row in session.run(ask.deduct_batch([of(name) for name in order])):
                    assert row["error"] is None

        race(arena.sessions(8), charge)
        balances = {arena.ledger.one(ask.get_balance(name))["balance"] for name in names}
        assert balances == {1000 - 24}
    arena.sound()


class TestTheLockTable:
    """A batch of 10,000 ids that are not there takes no lock for each."""

    def locks(self, session: Connection) -> Counter[str]:
        rows = session.execute(
            "select locktype, count(*) from pg_locks where pid = pg_backend_pid() and mode <> 'SIReadLock' group by 1"
        ).fetchall()
        return Counter(dict(rows))

    def check(self, owner: CreditManager, connect: Connect, config: str, level: psycopg.IsolationLevel) -> None:
        owner.publish_pricing(CONFIGS[config])
        session, other = connect(autocommit=False), connect(autocommit=False)
        session.isolation_level = level
        answers = CreditManager(session).deduct_batch([of(f"unknown {number}", 3) for number in range(10_000)])
        assert {row.error for row in answers} == {"account_not_found" if config == "closed" else None}
        locks = self.locks(session)
        assert locks["relation"] < 60
        assert locks["transactionid"] + locks["virtualxid"] <= 2
        assert set(locks) <= {"relation", "transactionid", "virtualxid"}
        # There is room for as many as another session could have before.
        other.execute("select pg_advisory_xact_lock(g) from generate_series(1, 8000) as g")
        CreditManager(other).add_credits("another", 10).or_raise()
        CreditManager(other).deduct_credits("another", 1).or_raise()
        other.rollback()
        session.rollback()

    @pytest.mark.parametrize("config", ["closed", "bonus"])
    def test_has_few_rows_for_it(self, owner: CreditManager, connect: Connect, config: str) -> None:
        self.check(owner, connect, config, psycopg.IsolationLevel.READ_COMMITTED)

    @pytest.mark.slow
    @pytest.mark.parametrize("level", [2, 3, 4])
    @pytest.mark.parametrize("config", CONFIGS)
    def test_at_each_level(self, owner: CreditManager, connect: Connect, config: str, level: int) -> None:
        self.check(owner, connect, config, psycopg.IsolationLevel(level))

    def test_ids_that_are_taken_refused_and_malformed(self, owner: CreditManager, connect: Connect) -> None:
        session = connect(autocommit=False)
        for number in range(20):
            owner.add_credits(f"{number}", 10)
        charges = [of(f"{number % 40}", 1 + number % 20, model="m" if number % 3 else "?") for number in range(4000)]
        answers = CreditManager(session).deduct_batch([*charges, {"user_id": 5}, of("", 1)])
        assert {None, "account_not_found", "invalid_argument"} < {row.error for row in answers}
        assert sum(self.locks(session).values()) < 60
        session.rollback()


# --- Forgetting users, and their events -------------------------------------------------------------------------------


def erase(user: str) -> Call:
    return lambda m: m.erase_user(user)


def events_of(manager: CreditManager, *users: str) -> list[str]:
    """The events of these users, which the consumer "other" has fetched."""
    rows = connection(manager).execute(
        "select event_id::text from ducto_private.events where account_id = any (%s) order by event_id", [list(users)]
    )
    return [row[0] for row in rows]


FORGETTING: dict[str, Call] = {
    "zz": erase("zz"),
    "aa": erase("aa"),
    "ack": lambda m: m.ack_events([event.event_id for event in m.fetch_events(3, 1)][::-1] or [UNKNOWN]),
    "batch": batch(of("zz"), of("aa"), {**of("aa"), "team_id": "mm"}, {**of("zz"), "team_id": "mm"}),
}
HOLDERS: dict[str, Call] = {
    "charge": lambda m: m.deduct_credits("zz", 1),
    "first": lambda m: m.deduct_credits("aa", 1),
    "pool": lambda m: m.deduct_team_credits("mm", "aa", 1),
    "events": lambda m: m.fetch_events(),
    "event": lambda m: m.ack_events([events_of(m, "zz")[1]], "other"),
    "erase": erase("zz"),
}
FORGETS = list(product(HOLDERS, ["rollback", "commit"], permutations(FORGETTING)))


class TestForgetting:
    """aa and zz are members of the team mm, which stands between them in the order of locks."""

    @pytest.fixture
    def team(self, owner: CreditManager) -> CreditManager:
        owner.create_team("The middle", 10_000, team_id="mm").or_raise()
        for user in ("aa", "zz"):
            owner.add_team_member("mm", user).or_raise()
        self.refill(owner)
        return owner

    def refill(self, owner: CreditManager) -> None:
        """Something to forget, and events of each, no others."""
        connection(owner).execute("truncate ducto_private.events, ducto_private.deliveries")
        for user in ("aa", "zz"):
            owner.add_credits(user, 100, metadata={"of": user}).or_raise()
            owner.deduct_team_credits("mm", user, 1, metadata={"of": user}).or_raise()
            for plan in ("pro", "free", None):
                owner.set_user_plan(user, plan).or_raise()
        owner.fetch_events(1000, consumer="other")

    def play(self, connect: Connect, team: CreditManager, cases: list[Any]) -> None:
        cast, waited = Cast(connect, 6), []
        for holder, ends, order in cases:
            self.refill(team)
            ids = events_of(team, "aa", "zz")
            cast.open(0, HOLDERS[holder])
            for number, name in enumerate(order):
                cast.start(1 + number, FORGETTING[name])
            cast.start(5, lambda m, ids=ids: m.ack_events(ids[::-1], "other"))  # type: ignore[misc]
            waited.append(cast.waiters())
            cast.sessions[0].execute(ends)
            told = {error for answer in cast.answers() for error in errors(answer)}
            assert told == set(), (holder, ends, order)
        cast.close()
        assert min(waited) >= 1
        assert max(waited) >= 3
        assert team.verify_ledger() == []

    def test_nobody_is_in_a_deadlock(self, connect: Connect, team: CreditManager) -> None:
        self.play(connect, team, FORGETS[::7])

    @pytest.mark.slow
    def test_in_all_variants(self, connect: Connect, team: CreditManager) -> None:
        self.play(connect, team, FORGETS)

    def test_the_scene_as_it_was_reported(self, connect: Connect, team: CreditManager) -> None:
        cast = Cast(connect, 4)
        ids = events_of(team, "aa", "zz")
        cast.open(0, lambda m: m.deduct_credits("zz", 1).or_raise())
        cast.start(1, erase("zz"))
        cast.start(2, erase("aa"))
        assert cast.waiters() == 2
        cast.start(3, lambda m: m.ack_events(ids, "other"))
        cast.sessions[0].rollback()
        first, second, acknowledged = cast.answers()
        cast.close()
        assert min(first, second) > 0
        assert acknowledged == len(ids)
        assert team.verify_ledger() == []


# --- Rounds at random -------------------------------------------------------------------------------------------------

USERS = ["aa", "bb", "cc", "yy", "zz"]
TEAMS = {"a team": ["bb", "zz"], "mm": ["aa", "zz"], "zz team": ["aa", "cc"]}
REFUSALS = {
    "account_not_found",
    "already_refunded",
    "exceeds_grant",
    "idempotency_conflict",
    "insufficient_credits",
    "is_a_team",
    "member_cap_exceeded",
    "not_a_member",
    "not_refundable",
    "out_of_range",
    "refund_exceeds_original",
    "reservation_not_active",
    "reservation_not_found",
    "spend_cap_exceeded",
    "team_exists",
    "team_not_found",
    "transaction_not_found",
}


@dataclass
class Turn:
    """Calls that one session makes in a row: each in its own transaction, or all in one that is held until somebody
    waits for it (or nobody has for a while) and then ends so."""

    calls: list[tuple[str, Call]]
    end: str = ""


@dataclass
class Storm:
    """Rounds of calls that are drawn from a seed before they are made."""

    connect: Connect
    owner: CreditManager
    seed: int
    rounds: int
    holds: list[tuple[str, str]] = field(default_factory=list)
    charges: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        print(f"seed {self.seed}")
        self.rng = random.Random(self.seed)
        self.monitors = [self.connect() for _ in range(8)]
        self.sessions = [self.connect() for _ in range(8)]
        for session in self.sessions:
            session.execute("set deadlock_timeout = '10ms'")
            session.execute("set lock_timeout = '60s'")
        self.prepare()
        for number in range(self.rounds):
            self.round(number)
            if self.failures:
                break
        assert self.failures == []

    def prepare(self) -> None:
        for config in CONFIGS.values():
            self.owner.publish_pricing(config)
        for user in USERS[:4]:
            self.owner.add_credits(user, 5000).or_raise()
        self.owner.set_user_plan("bb", "pro").or_raise()
        self.owner.set_spend_cap("cc", 2000, action="warn").or_raise()
        for team, members in TEAMS.items():
            self.owner.create_team(team, 5000, team_id=team).or_raise()
            for member in members:
                self.owner.add_team_member(team, member, "member", 3000, "daily").or_raise()

    def round(self, number: int) -> None:
        rng = self.rng
        # Most rounds at READ COMMITTED; in the others the stricter sessions may hear 40001.
        levels = ["read committed"] if number % 4 else ["read committed", "repeatable read", "serializable"]
        self.news = [f"{rng.choice('abmyz')} new {number}" for _ in range(3)]
        count = rng.randint(6, 8)
        plans = [[self.turn() for _ in range(rng.randint(1, 4))] for _ in range(count)]
        chosen = [rng.choice(levels) for _ in range(count)]
        together(
            [
                partial(self.play, number, session, plan, level)
                for session, plan, level in zip(range(count), plans, chosen, strict=True)
            ]
        )
        del self.holds[:-40], self.charges[:-40], self.events[:-40]

    def play(self, number: int, session: int, turns: list[Turn], level: str) -> None:
        conn = self.sessions[session]
        conn.execute(f"set default_transaction_isolation = '{level}'".encode())
        manager = CreditManager(conn)
        for turn in turns:
            try:
                if turn.end:
                    conn.execute("begin")
                done = [(name, call(manager)) for name, call in turn.calls]
                if turn.end:
                    self.linger(session)
                    conn.execute(turn.end)
                if turn.end != "rollback":
                    self.keep(done)
            except (DuctoError, psycopg.Error) as error:
                code = str(getattr(error, "code", None) or getattr(error, "sqlstate", None))
                with self.lock:
                    self.outcomes[code] += 1
                    if level == "read committed" or code != "40001":
                        names = [name for name, _ in turn.calls]
                        self.failures.append(
                            f"seed {self.seed}, round {number}, session {session} at {level}, {names}: {code} {error!r}"
                        )
                conn.execute("rollback")

    def linger(self, session: int) -> None:
        """Until somebody waits for this session, or nobody has for some looks."""
        pid = self.sessions[session].info.backend_pid
        for _ in range(8):
            row = (
                self.monitors[session]
                .execute(
                    "select exists (select from pg_stat_activity where datname = current_database()"
                    " and wait_event_type = 'Lock' and %s = any (pg_blocking_pids(pid)))",
                    [pid],
                )
                .fetchone()
            )
            if row and row[0]:
                with self.lock:
                    self.outcomes["waited for"] += 1
                return

    def keep(self, done: list[tuple[str, Any]]) -> None:
        with self.lock:
            for name, answer in done:
                self.outcomes[name.partition(" ")[0] if name.startswith("hold ") else name] += 1
                for one in answer if isinstance(answer, list) else [answer]:
                    if error := getattr(one, "error", None):
                        self.outcomes[error] += 1
                        if error not in REFUSALS:
                            self.failures.append(f"seed {self.seed}: {name} answered {error}")
                    elif hasattr(one, "reserved_total") and one.reservation_id:
                        self.holds.append((name.removeprefix("hold "), one.reservation_id))
                    elif hasattr(one, "allowance_used") and getattr(one, "transaction_id", None):
                        self.charges.append(one.transaction_id)
                    elif hasattr(one, "event_id"):
                        self.events.append(one.event_id)

    # What is drawn

    def turn(self) -> Turn:
        rng = self.rng
        end = rng.choice(["", "", "", "commit", "rollback"])
        if rng.random() < 0.4:
            return Turn([self.wide()], end)
        user = rng.choice([*USERS, *self.news])
        return Turn([self.single(user) for _ in range(rng.randint(1, 3))], end)

    def single(self, user: str) -> tuple[str, Call]:
        """A call on one account."""
        rng = self.rng
        amount, usage = rng.randint(0, 60), {"model": rng.choice(["m", "m-2024"]), "input_tokens": rng.randint(0, 200)}
        key = f"k{rng.randrange(30)}" if rng.random() < 0.2 else None
        mine = [hold for name, hold in self.holds if name == user] or [UNKNOWN]
        hold, charge = rng.choice(mine), rng.choice(self.charges or [UNKNOWN])
        final, expires = rng.random() < 0.5, rng.random() < 0.5
        plan, note, cap_type = rng.choice(["free", "pro", None]), {"note": user}, rng.choice(["daily", "monthly"])
        calls: list[tuple[str, Call]] = [
            ("add", lambda m: self.add(m, user, amount + 20, expires, key)),
            ("plan", lambda m: m.set_user_plan(user, plan)),
            ("cap", lambda m: m.set_spend_cap(user, 3000, cap_type, action="warn")),
            ("limit", lambda m: m.set_credit_limit(user, amount)),
            ("charge", lambda m: m.deduct(user, usage, key, note)),
            ("charge", lambda m: m.deduct_credits(user, amount, None, key, note)),
            ("job", lambda m: m.deduct_fixed(user, "job", key)),
            (f"hold {user}", lambda m: m.reserve_credits(user, amount, ttl_seconds=1 if amount % 2 else 600)),
            (f"hold {user}", lambda m: m.reserve(user, usage, idempotency_key=key)),
            ("settle", lambda m: m.deduct_credits(user, amount, hold, final=final)),
            ("settle", lambda m: m.deduct(user, usage, reservation_id=hold, final=final)),
            ("release", lambda m: m.release_reservation(hold, user)),
            ("extend", lambda m: m.extend_reservation(hold, amount, user_id=user)),
            ("refund", lambda m: m.refund_credits(charge, amount + 1, user_id=user)),
            ("remove", lambda m: m.remove_credits(user, amount + 1)),
            ("balance", lambda m: m.get_balance(user)),
        ]
        return rng.choice(calls)

    def add(self, manager: CreditManager, user: str, amount: int, expires: bool, key: str | None) -> Any:
        if not expires:
            return manager.add_credits(user, amount, idempotency_key=key)
        try:
            with connection(manager).transaction():
                return manager.add_credits(user, amount, expires_at=datetime.now(UTC) + timedelta(seconds=2))
        except InvalidArgumentError as error:
            # It may have waited for its turn until they would have expired.
            if "future" not in str(error):
                raise
            return None

    def wide(self) -> tuple[str, Call]:
        """A call on many accounts, on events, on prices, or on a pool."""
        rng = self.rng
        team = rng.choice([*TEAMS, "mm", self.news[0]])
        user, amount, limit = rng.choice(USERS), rng.randint(0, 40), rng.randint(1, 30)
        everybody = [*USERS, *self.news, *USERS]
        charges = [self.element(rng.choice(everybody)) for _ in range(rng.randint(2, 12))]
        ids = [*rng.sample(self.events, min(len(self.events), 12)), UNKNOWN]
        config, version = rng.choice(list(CONFIGS.values())), rng.randint(1, 3)
        if rng.random() < 0.2:
            config = config | {"models": {**config["models"], "m": f"input_tokens * {rng.choice(['0.5', '0.75'])}"}}
        soon = rng.randint(5, 60)
        calls: list[tuple[int, str, Call]] = [
            (8, "batch", lambda m: m.deduct_batch(charges)),
            (4, "erase", lambda m: m.erase_user(user)),
            (3, "ack", lambda m: m.ack_events(ids)),
            (3, "fetch", lambda m: m.fetch_events(limit, 1)),
            (3, "sweep", lambda m: m.sweep_expired_credits(limit=limit)),
            (1, "rollup", lambda m: m.rollup_usage()),
            (1, "verify", lambda m: self.sound(m)),
            (1, "publish", lambda m: m.publish_pricing(config)),
            (2, "activate", lambda m: m.activate_pricing(version)),
            (1, "schedule", lambda m: self.schedule(m, version, soon)),
            (2, "team charge", lambda m: m.deduct_team_credits(team, user, amount, metadata={"note": user})),
            (2, "team usage", lambda m: m.deduct_team(team, user, {"model": "m", "input_tokens": amount})),
            (2, f"hold {team}", lambda m: m.reserve_team_credits(team, user, amount)),
            (1, "member", lambda m: m.add_team_member(team, user, "member", 3000, "daily")),
            (1, "member leaves", lambda m: m.remove_team_member(team, user)),
            (1, "team", lambda m: m.create_team("New", amount, team_id=team)),
            (1, "statistics", lambda m: [m.aggregate_stats(), m.spend_by_user()][0]),
        ]
        _, name, call = rng.choices(calls, [weight for weight, _, _ in calls])[0]
        return name, call

    def element(self, user: str) -> dict[str, Any]:
        rng = self.rng
        mine = [hold for name, hold in self.holds if name == user] or [UNKNOWN]
        what: dict[str, Any] = rng.choice(
            [
                {"amount": rng.randint(0, 40)},
                {"metrics": {"model": "m", "input_tokens": rng.randint(0, 100)}},
                {"job": "job"},
                {"amount": rng.randint(0, 9), "reservation_id": rng.choice(mine), "final": rng.random() < 0.5},
                {"amount": 1, "idempotency_key": f"k{rng.randrange(30)}"},
            ]
        )
        teams = [team for team, members in TEAMS.items() if user in members]
        if teams and "job" not in what and rng.random() < 0.3:
            what = {**what, "team_id": rng.choice(teams)}
        return {"user_id": user, "metadata": {"note": user}, **what}

    def schedule(self, manager: CreditManager, version: int, soon: int) -> Any:
        """Come, or taken back, before its turn is no fault."""
        session = connection(manager)
        try:
            with session.transaction():
                manager.activate_pricing(version, at=datetime.now(UTC) + timedelta(milliseconds=soon))
                return manager.unschedule_pricing(version) if soon % 2 else None
        except InvalidArgumentError:
            return None

    def sound(self, manager: CreditManager) -> Any:
        """Sound at any moment."""
        found = manager.verify_ledger()
        if found:
            with self.lock:
                self.failures.append(f"seed {self.seed}: {found}")
        return None


def blow(connect: Connect, owner: CreditManager, seed: int, rounds: int) -> Counter[str]:
    storm = Storm(connect, owner, seed, rounds)
    began = time.monotonic()
    storm.run()
    print(f"{rounds} rounds in {time.monotonic() - began:.0f} s: {storm.outcomes.most_common()}")
    assert owner.verify_ledger() == []
    assert storm.outcomes["40P01"] == 0
    assert storm.outcomes["waited for"] > rounds // 10
    return storm.outcomes


class TestRounds:
    def test_at_random(self, connect: Connect, owner: CreditManager) -> None:
        blow(connect, owner, 1, 40)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [2, 3, 4, 5])
    def test_many_at_random(self, connect: Connect, owner: CreditManager, seed: int) -> None:
        outcomes = blow(connect, owner, seed, 100)
        assert {"batch", "erase", "ack", "fetch", "sweep", "publish", "activate", "settle", "refund"} < set(outcomes)
