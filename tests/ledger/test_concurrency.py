"""Many sessions on the same accounts: what was acknowledged stands, once, and nothing else does."""

import math
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import psycopg
import pytest

import ducto_pg
from ducto_pg import CreditManager, servers
from ducto_pg.embedded import Server, ServerError
from ducto_pg.errors import ConcurrencyError

Connection = psycopg.Connection[Any]
Connect = Callable[..., Connection]
Scene = dict[str, str]
Prepare = Callable[[CreditManager, str], Scene]

CONFIG: dict[str, Any] = {"models": {"m": "input_tokens * 0.25"}, "fixed": {"job": 30}, "min_balance": 0}


@pytest.fixture
def owner(conn: Connection) -> CreditManager:
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG)
    return manager


@pytest.fixture
def eight(connect: Connect) -> list[CreditManager]:
    """Eight sessions."""
    return [CreditManager(connect()) for _ in range(8)]


def together(managers: list[CreditManager], work: Callable[[CreditManager, int], Any]) -> list[Any]:
    """What `work` answered in each of the sessions, which begin at the same moment."""
    start = threading.Barrier(len(managers))

    def run(number: int) -> Any:
        start.wait(30)
        return work(managers[number], number)

    with ThreadPoolExecutor(len(managers)) as pool:
        return [future.result() for future in [pool.submit(run, number) for number in range(len(managers))]]


# --- Races ------------------------------------------------------------------------------------------------------------


@dataclass
class Race:
    """`prepare` an account with 100 credits, then `work` in every session at once."""

    work: Callable[[CreditManager, Scene, int], Any]
    outcomes: dict[str, int]
    balance: int
    reserved: int = 0
    prepare: Prepare = lambda m, u: {}
    config: dict[str, Any] = field(default_factory=dict)


def hold(amount: int) -> Prepare:
    return lambda m, u: {"hold": m.reserve_credits(u, amount).or_raise().reservation_id}


def charge(amount: int) -> Prepare:
    return lambda m, u: {"charge": m.deduct_credits(u, amount).or_raise().transaction_id}


def grant(m: CreditManager, u: str) -> Scene:
    return {"grant": m.list_transactions(u)[0].transaction_id}


ONE_EFFECT = {"ok": 1, "replayed": 7}
RACES = {
    "charges beyond the balance": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 30), {"ok": 3, "insufficient_credits": 5}, balance=10
    ),
    "priced charges beyond the balance": Race(
        lambda m, at, n: m.deduct(at["u"], {"model": "m", "input_tokens": 120}),
        {"ok": 3, "insufficient_credits": 5},
        balance=10,
    ),
    "jobs beyond the balance": Race(
        lambda m, at, n: m.deduct_fixed(at["u"], "job"), {"ok": 3, "insufficient_credits": 5}, balance=10
    ),
    "charges with one key": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 10, idempotency_key="k"), ONE_EFFECT, balance=90
    ),
    "jobs with one key": Race(lambda m, at, n: m.deduct_fixed(at["u"], "job", "k"), ONE_EFFECT, balance=70),
    "different charges with one key": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 10 + n // 2, idempotency_key="k"),
        {"ok": 1, "replayed": 1, "idempotency_conflict": 6},
        balance=-1,
    ),
    "grants with one key": Race(
        lambda m, at, n: m.add_credits(at["u"], 10, idempotency_key="k"), ONE_EFFECT, balance=110
    ),
    "removals with one key": Race(
        lambda m, at, n: m.remove_credits(at["u"], 10, idempotency_key="k"), ONE_EFFECT, balance=90
    ),
    "removals of one grant": Race(
        lambda m, at, n: m.remove_credits(at["u"], 30, transaction_id=at["grant"]),
        {"ok": 3, "exceeds_grant": 5},
        balance=10,
        prepare=grant,
    ),
    "holds beyond the balance": Race(
        lambda m, at, n: m.reserve_credits(at["u"], 30), {"ok": 3, "insufficient_credits": 5}, balance=100, reserved=90
    ),
    "holds with one key": Race(
        lambda m, at, n: m.reserve_credits(at["u"], 30, idempotency_key="k"), ONE_EFFECT, balance=100, reserved=30
    ),
    "holds and charges": Race(
        lambda m, at, n: m.reserve_credits(at["u"], 30) if n % 2 else m.deduct_credits(at["u"], 30),
        {"ok": 3, "insufficient_credits": 5},
        balance=-1,
        reserved=-1,
    ),
    "extensions beyond the balance": Race(
        lambda m, at, n: m.extend_reservation(at["hold"], 30),
        {"ok": 3, "insufficient_credits": 5},
        balance=100,
        reserved=100,
        prepare=hold(10),
    ),
    "extensions with one key": Race(
        lambda m, at, n: m.extend_reservation(at["hold"], 30, idempotency_key="k"),
        ONE_EFFECT,
        balance=100,
        reserved=40,
        prepare=hold(10),
    ),
    "releases of one hold": Race(
        lambda m, at, n: m.release_reservation(at["hold"]), ONE_EFFECT, balance=100, prepare=hold(50)
    ),
    "settlements of one hold": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40, at["hold"]), ONE_EFFECT, balance=60, prepare=hold(50)
    ),
    "settlements of one hold with one key": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40, at["hold"], "k"), ONE_EFFECT, balance=60, prepare=hold(50)
    ),
    "settlements of one hold with keys of their own": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40, at["hold"], f"k{n}"),
        {"ok": 1, "reservation_not_active": 7},
        balance=60,
        prepare=hold(50),
    ),
    "different settlements of one hold": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40 + n, at["hold"]),
        {"ok": 1, "idempotency_conflict": 7},
        balance=-1,
        prepare=hold(50),
    ),
    "parts of one hold": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 20, at["hold"], final=False),
        {"ok": 8},
        balance=-60,
        prepare=hold(50),
    ),
    "parts of one hold, overrun refused": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 20, at["hold"], final=False),
        {"ok": 5, "insufficient_credits": 3},
        balance=0,
        prepare=hold(50),
        config={"overrun": "reject"},
    ),
    "settling and releasing": Race(
        lambda m, at, n: m.deduct_credits(at["u"], 40, at["hold"], "k") if n % 2 else m.release_reservation(at["hold"]),
        {"ok": 1, "replayed": 3, "reservation_not_active": 4},
        balance=-1,
        prepare=hold(50),
    ),
    "full refunds of one charge": Race(
        lambda m, at, n: m.refund_credits(at["charge"]),
        {"ok": 1, "already_refunded": 7},
        balance=100,
        prepare=charge(40),
    ),
    "parts of a refund": Race(
        lambda m, at, n: m.refund_credits(at["charge"], 15),
        {"ok": 2, "refund_exceeds_original": 6},
        balance=90,
        prepare=charge(40),
    ),
    "refunds with one key": Race(
        lambda m, at, n: m.refund_credits(at["charge"], 15, idempotency_key="k"),
        ONE_EFFECT,
        balance=75,
        prepare=charge(40),
    ),
}


@pytest.fixture
def race_db(owner: CreditManager) -> CreditManager:
    return owner


def summary(answers: list[Any]) -> dict[str, int]:
    return dict(Counter(a.error or ("replayed" if getattr(a, "idempotent", False) else "ok") for a in answers))


class TestRaces:
    def test_of_one_account(self, owner: CreditManager, eight: list[CreditManager]) -> None:
        for name, race in RACES.items():
            owner.publish_pricing({**CONFIG, **race.config})
            owner.add_credits(name, 100).or_raise()
            at = {"u": name, **race.prepare(owner, name)}
            answers = together(eight, lambda m, n, race=race, at=at: race.work(m, at, n))  # type: ignore[misc]
            assert summary(answers) == race.outcomes, name
            effects = [answer for answer in answers if not answer.error and not answer.idempotent]
            replays = [answer for answer in answers if not answer.error and answer.idempotent]
            if "releas" not in name:
                assert all(answer.model_copy(update={"idempotent": False}) in effects for answer in replays), name
            balance = owner.get_balance(name)
            assert race.balance in (-1, balance.balance), name
            assert race.reserved in (-1, balance.reserved), name
            assert balance.balance >= (balance.reserved or 0) or name == "parts of one hold", name
        assert owner.verify_ledger() == []

    def test_first_grants(self, owner: CreditManager, eight: list[CreditManager]) -> None:
        answers = together(eight, lambda m, n: m.add_credits("new", 10).or_raise())
        assert sorted(answer.new_balance for answer in answers) == list(range(10, 90, 10))
        assert owner.verify_ledger() == []

    def test_first_calls_of_an_unknown_user(self, owner: CreditManager, eight: list[CreditManager]) -> None:
        plan = {"plans": {"free": {"id": "free", "name": "Free", "free_allowance": 50}}, "default_plan": "free"}
        calls: list[Callable[[CreditManager, str], Any]] = [
            lambda m, u: m.deduct_credits(u, 20),
            lambda m, u: m.reserve_credits(u, 20),
            lambda m, u: m.add_credits(u, 1),
        ]
        for terms, bonus, admitted in (
            ({"signup_bonus": 50}, [50], 2),
            (plan, [], 2),
            ({**plan, "signup_bonus": 50}, [50], 5),
        ):
            owner.publish_pricing({**CONFIG, **terms})
            for kinds in ([0], [1], [2], [0, 1, 2]):
                user = f"{admitted} {bonus} {kinds}"
                answers = together(eight, lambda m, n, u=user, k=kinds: calls[k[n % len(k)]](m, u))  # type: ignore[misc]
                if kinds in ([0], [1]):
                    assert summary(answers) == {"ok": admitted, "insufficient_credits": 8 - admitted}, user
                rows = owner.list_transactions(user)
                assert [row.amount for row in rows if row.type == "signup_bonus"] == bonus, user
        assert owner.verify_ledger() == []

    def test_an_allowance_pays_once(self, owner: CreditManager, eight: list[CreditManager]) -> None:
        plans = {"free": {"id": "free", "name": "Free", "free_allowance": 100}}
        owner.publish_pricing({**CONFIG, "plans": plans, "default_plan": "free"})
        answers = together(eight, lambda m, n: m.deduct_credits("new", 30))
        assert summary(answers) == {"ok": 3, "insufficient_credits": 5}
        assert sum(answer.allowance_used for answer in answers) == 90
        assert owner.verify_ledger() == []

    def test_publishes_and_activations(self, owner: CreditManager, eight: list[CreditManager]) -> None:
        def work(manager: CreditManager, number: int) -> int | None:
            if number % 2:
                manager.activate_pricing(1)
            return manager.publish_pricing({**CONFIG, "fixed": {"job": number}}, str(number)).version

        versions = together(eight, work)
        assert sorted(versions) == list(range(2, 10))
        assert sum(item.active for item in owner.get_pricing_history()) == 1

    def test_publishing_the_same_prices(self, owner: CreditManager, eight: list[CreditManager]) -> None:
        prices = {**CONFIG, "fixed": {"other": 1}}
        assert set(together(eight, lambda m, n: m.publish_pricing(prices).version)) == {2}


# --- Random interleavings ---------------------------------------------------------------------------------------------


@dataclass
class Done:
    """A call that was answered, and committed where it changed something."""

    call: str
    user: str
    args: dict[str, Any]
    answer: Any
    key: str | None = None


class Storm:
    """Sessions that call at random, without holds if `plain`; `done` has all that was acknowledged."""

    def __init__(self, sessions: list[Connection], users: list[str], steps: int, seed: int, plain: bool) -> None:
        self.sessions, self.users, self.steps, self.seed, self.plain = sessions, users, steps, seed, plain
        self.done: list[Done] = []
        self.holds: dict[str, list[str]] = {user: [] for user in users}
        self.charges: dict[str, list[str]] = {user: [] for user in users}
        self.requests: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
        self.lock = threading.Lock()

    def run(self) -> None:
        start = threading.Barrier(len(self.sessions))
        with ThreadPoolExecutor(len(self.sessions)) as pool:
            for running in [pool.submit(self.session, n, conn, start) for n, conn in enumerate(self.sessions)]:
                running.result()

    def session(self, number: int, conn: Connection, start: threading.Barrier) -> None:
        rng = random.Random(self.seed * 1000 + number)
        manager = CreditManager(conn)
        start.wait(30)
        for _ in range(self.steps):
            user = rng.choice(self.users)
            if rng.random() * 10 < 9:
                self.keep([self.step(rng, manager, user)])
                continue
            calls = rng.randint(1, 4)
            undo = rng.random() * 2 < 1
            with conn.transaction(force_rollback=undo):
                done = [self.step(rng, manager, user) for _ in range(calls)]
            if not undo:
                self.keep(done)

    def keep(self, done: list[Done]) -> None:
        with self.lock:
            self.done += done
            for one in done:
                if one.answer.error:
                    continue
                if one.call in ("reserve_credits", "reserve"):
                    self.holds[one.user].append(one.answer.reservation_id)
                elif one.call in ("deduct_credits", "deduct"):
                    self.charges[one.user].append(one.answer.transaction_id)

    def step(self, rng: random.Random, manager: CreditManager, user: str) -> Done:
        call, args = self.request(rng, user)
        key = None
        if call not in ("release_reservation", "set_credit_limit") and rng.randrange(3) == 0:
            # A key of a few, which other sessions use at the same time, always for the same request.
            space = "hold" if call in ("reserve_credits", "reserve", "extend_reservation") else "entry"
            requests = self.steps * len(self.sessions) // len(self.users)
            key = f"{space} {rng.randrange(1 + requests // 12)}"
            with self.lock:
                call, args = self.requests.setdefault((user, key), (call, args))
        answer = getattr(manager, call)(**args, **({"idempotency_key": key} if key else {}))
        return Done(call, user, args, answer, key)

    def request(self, rng: random.Random, user: str) -> tuple[str, dict[str, Any]]:
        amount = rng.randint(0, 30)
        usage = {"model": "m", "input_tokens": rng.randint(0, 120)}
        with self.lock:
            held = rng.choice(self.holds[user][-6:] or [""])
            charged = rng.choice(self.charges[user][-6:] or [""])
        choices: list[tuple[int, str, dict[str, Any]]] = [
            (6, "add_credits", {"user_id": user, "amount": amount + 10}),
            (1, "remove_credits", {"user_id": user, "amount": amount + 1}),
            (1, "set_credit_limit", {"user_id": user, "limit": rng.choice([0, 0, 25])}),
            (6, "deduct_credits", {"user_id": user, "amount": amount}),
            (6, "deduct", {"user_id": user, "metrics": usage}),
        ]
        if not self.plain:
            choices += [
                (6, "reserve_credits", {"user_id": user, "amount": amount}),
                (4, "reserve", {"user_id": user, "metrics": usage}),
            ]
        if held:
            final = rng.randrange(2) == 0
            choices += [
                (6, "deduct_credits", {"user_id": user, "amount": amount, "reservation_id": held, "final": final}),
                (6, "deduct", {"user_id": user, "metrics": usage, "reservation_id": held, "final": final}),
                (3, "extend_reservation", {"reservation_id": held, "add_amount": amount}),
                (3, "release_reservation", {"reservation_id": held}),
            ]
        if charged:
            choices += [
                (2, "refund_credits", {"transaction_id": charged}),
                (3, "refund_credits", {"transaction_id": charged, "amount": amount + 1}),
            ]
        _, call, args = rng.choices(choices, [weight for weight, _, _ in choices])[0]
        return call, args


class Replay:
    """The account as the acknowledged answers tell it, in the order of their revisions, by the rules of charging."""

    def __init__(self) -> None:
        self.balance = 0
        self.limit = 0
        self.carry = Decimal(0)
        self.held: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.settled_by: dict[str, tuple[str, str]] = {}
        self.refundable: dict[str, int] = {}
        self.charged: set[str] = set()

    def admits(self, amount: int) -> bool:
        claims = sum(self.held.values()) + amount
        return amount == 0 or claims <= 0 or self.balance - claims >= -self.limit

    def cost(self, args: dict[str, Any]) -> Decimal:
        if "metrics" in args:
            return args["metrics"]["input_tokens"] * Decimal("0.25")  # type: ignore[no-any-return]
        return Decimal(args["amount"])

    def expect(self, done: Done) -> str:
        """What the rules say to a call on the account as it is: a refusal, 'replayed', or ''."""
        args, held = done.args, done.args.get("reservation_id")
        match done.call:
            case "reserve_credits" | "reserve":
                return "" if self.admits(math.ceil(self.cost(args))) else "insufficient_credits"
            case "extend_reservation" if held not in self.held:
                return "reservation_not_active"
            case "extend_reservation":
                return "" if self.admits(args["add_amount"]) else "insufficient_credits"
            case "release_reservation" if held not in self.held:
                return "replayed" if self.ended[str(held)] == "released" else "reservation_not_active"
            case "deduct_credits" | "deduct" if held is None:
                charged = math.floor(self.carry + self.cost(args))
                return "" if self.admits(charged) else "insufficient_credits"
            case "deduct_credits" | "deduct" if held not in self.held:
                if done.key is None and args["final"] and held in self.settled_by:
                    same = self.settled_by[held] == (done.call, str(args))
                    return "replayed" if same else "idempotency_conflict"
                return "reservation_not_active"
            case "refund_credits":
                left = self.refundable[args["transaction_id"]]
                if left == 0:
                    nothing = args["transaction_id"] not in self.charged
                    return "not_refundable" if nothing else "already_refunded"
                return "refund_exceeds_original" if args.get("amount", 0) > left else ""
        return ""

    def apply(self, done: Done) -> None:
        """Change the account as a successful call does, and compare its answer."""
        args, answer, held = done.args, done.answer, done.args.get("reservation_id")
        match done.call:
            case "add_credits":
                self.balance += args["amount"]
                assert answer.new_balance == self.balance
            case "remove_credits":
                self.balance -= args["amount"]
                assert answer.new_balance == self.balance
            case "set_credit_limit":
                self.limit = args["limit"]
                assert (answer.balance, answer.credit_limit) == (self.balance, self.limit)
            case "reserve_credits" | "reserve":
                self.held[answer.reservation_id] = math.ceil(self.cost(args))
            case "extend_reservation":
                self.held[str(held)] += args["add_amount"]
            case "release_reservation":
                del self.held[str(held)]
                self.ended[str(held)] = "released"
            case "deduct_credits" | "deduct":
                self.charge(done)
            case "refund_credits":
                amount = args.get("amount") or self.refundable[args["transaction_id"]]
                self.refundable[args["transaction_id"]] -= amount
                self.balance += amount
                assert (answer.amount, answer.new_balance) == (amount, self.balance)
        if hasattr(answer, "reserved_total"):
            assert (answer.balance, answer.reserved_total) == (self.balance, sum(self.held.values()))

    def charge(self, done: Done) -> None:
        args, answer, held = done.args, done.answer, done.args.get("reservation_id")
        cost = self.cost(args)
        charged = math.floor(self.carry + cost)
        self.carry += cost - charged
        shortfall = 0
        if held:
            mine = self.held.pop(held)
            free = max(0, self.balance + self.limit - mine - sum(self.held.values()))
            shortfall = max(0, charged - mine - free)
            if args["final"]:
                self.ended[held] = "settled"
                if done.key is None:
                    self.settled_by[held] = (done.call, str(args))
            else:
                self.held[held] = max(0, mine - charged)
        self.balance -= charged
        self.refundable[answer.transaction_id] = charged
        if charged:
            self.charged.add(answer.transaction_id)
        assert (answer.cost, answer.amount, answer.balance_after) == (cost, -charged, self.balance)
        assert answer.shortfall == shortfall


def check(storm: Storm, manager: CreditManager) -> Counter[str]:
    """Each acknowledged call happened once, in the order of the revisions, and each answer follows from the rules."""
    outcomes: Counter[str] = Counter()
    for user in storm.users:
        mine = [done for done in storm.done if done.user == user]
        effects: dict[int, Done] = {}
        firsts: dict[str, Any] = {}
        judged: dict[int, list[Done]] = defaultdict(list)
        for done in mine:
            replayed = getattr(done.answer, "idempotent", False)
            outcomes[f"{done.call}: {done.answer.error or ('replayed' if replayed else 'ok')}"] += 1
            if done.answer.error or (replayed and done.call == "release_reservation"):
                judged[done.answer.revision].append(done)
            elif not replayed:
                assert done.answer.revision not in effects
                effects[done.answer.revision] = done
                if done.key:
                    assert done.key not in firsts
                    firsts[done.key] = done.answer
        for done in mine:
            if done.key and not done.answer.error:
                assert done.answer.model_copy(update={"idempotent": False}) == firsts[done.key]
        replay = Replay()
        assert sorted(effects) == list(range(1, len(effects) + 1))
        for revision in range(len(effects) + 1):
            if revision:
                done = effects[revision]
                expected = replay.expect(done)
                assert expected == "", (done, expected)
                replay.apply(done)
            for done in judged[revision]:
                expected = replay.expect(done)
                assert expected == (done.answer.error or "replayed"), done
        balance = manager.get_balance(user)
        assert (balance.balance, balance.reserved) == (replay.balance, sum(replay.held.values()))
        assert balance.revision == len(effects)
        rows = manager.list_transactions(user, 1000)
        while rows and rows[-1].seq > 1:
            rows += manager.list_transactions(user, 1000, before=rows[-1].seq)
        assert len(rows) == rows[0].seq
        assert sorted(row.transaction_id for row in rows if row.type == "usage") == sorted(replay.refundable)
    assert manager.verify_ledger() == []
    return outcomes


def open_accounts(owner: CreditManager, storm: Storm) -> None:
    for user in storm.users:
        storm.keep([Done("add_credits", user, {"amount": 100}, owner.add_credits(user, 100).or_raise())])


@pytest.mark.parametrize("plain", [False, True], ids=["", "without holds"])
@pytest.mark.parametrize("sessions", [2, 4, 8, 16])
def test_random_interleavings(owner: CreditManager, connect: Connect, sessions: int, plain: bool) -> None:
    storm = Storm([connect() for _ in range(sessions)], ["a", "b"], 240 // sessions, sessions, plain)
    open_accounts(owner, storm)
    storm.run()
    outcomes = check(storm, owner)
    assert len(outcomes) > (5 if plain else 10), outcomes


@pytest.mark.slow
@pytest.mark.parametrize(("sessions", "users", "plain"), [(2, 1, False), (8, 1, True), (16, 1, False), (16, 5, False)])
def test_longer_random_interleavings(
    owner: CreditManager, connect: Connect, sessions: int, users: int, plain: bool
) -> None:
    names = [f"user {number}" for number in range(users)]
    storm = Storm([connect() for _ in range(sessions)], names, 3000 // sessions, 100 + sessions, plain)
    open_accounts(owner, storm)
    storm.run()
    outcomes = check(storm, owner)
    for call in ("add_credits", "deduct", "deduct_credits"):
        assert min(outcomes[f"{call}: ok"], outcomes[f"{call}: replayed"]) > 0, outcomes
    for call in ("reserve", "reserve_credits", "extend_reservation", "release_reservation"):
        assert plain or outcomes[f"{call}: ok"] > 0, outcomes


def test_prices_published_while_sessions_charge(
    owner: CreditManager, eight: list[CreditManager], conn: Connection
) -> None:
    """Each row's version is the one that priced it, and a hold is settled at its own."""
    owner.add_credits("a", 10**9).or_raise()
    over = threading.Event()

    def work(manager: CreditManager, number: int) -> list[int | None]:
        if number == 0:
            try:
                for step in range(12):
                    manager.publish_pricing({**CONFIG, "models": {"m": f"input_tokens * {step + 2}"}})
                    manager.activate_pricing(1 + step // 2)
            finally:
                over.set()
            return []
        versions = []
        while not over.is_set():
            manager.deduct("a", {"model": "m", "input_tokens": 3}).or_raise()
            hold = manager.reserve("a", {"model": "m", "input_tokens": 3}).or_raise()
            version = manager.get_reservation(hold.reservation_id).pricing_version
            answer = manager.deduct(
                "a", {"model": "m", "input_tokens": 5}, reservation_id=hold.reservation_id
            ).or_raise()
            row = manager.get_transaction(answer.transaction_id)
            assert row.pricing_version == version
            versions.append(version)
        return versions

    versions = {version for session in together(eight[:5], work) for version in session}
    assert len(versions) > 1
    wrong = conn.execute(
        """
        select t.transaction_id, t.pricing_version, t.cost, c.total
        from ducto_private.ledger as t
        cross join lateral ducto.calculate_cost(t.usage, null, t.pricing_version) as c
        where t.usage is not null and t.cost <> c.total
        """
    ).fetchall()
    assert wrong == []
    assert owner.verify_ledger() == []


# --- Who waits for whom -----------------------------------------------------------------------------------------------


def wait_until_blocked(conn: Connection, pid: int, by: int) -> None:
    """Return once the session waits for the other's lock, as the server sees it."""
    for _ in range(3000):
        found = conn.execute(
            "select s.wait_event_type, pg_blocking_pids(s.pid) from pg_stat_activity as s where s.pid = %s", [pid]
        ).fetchone()
        if found and found[0] == "Lock" and by in found[1]:
            return
        conn.execute("select pg_sleep(0.01)")
    raise AssertionError(f"session {pid} never waited for {by}: {found}")


WAITING: dict[str, Callable[[CreditManager, Scene], Any]] = {
    "charge": lambda m, at: m.deduct_credits("u", 60),
    "hold": lambda m, at: m.reserve_credits("u", 60),
    "extend": lambda m, at: m.extend_reservation(at["hold"], 60),
    "release": lambda m, at: m.release_reservation(at["hold"]),
    "settle": lambda m, at: m.deduct_credits("u", 60, at["hold"]),
    "refund": lambda m, at: m.refund_credits(at["charge"]),
    "add": lambda m, at: m.add_credits("u", 60),
    "remove": lambda m, at: m.remove_credits("u", 60),
    "limit": lambda m, at: m.set_credit_limit("u", 60),
}


class TestWaiting:
    @pytest.fixture
    def at(self, owner: CreditManager) -> Scene:
        owner.add_credits("u", 120).or_raise()
        return charge(20)(owner, "u") | hold(10)(owner, "u")

    @pytest.fixture
    def first(self, connect: Connect) -> Connection:
        return connect(autocommit=False)

    def test_calls_on_one_account_take_turns(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection, at: Scene
    ) -> None:
        for name, call in WAITING.items():
            if name in ("release", "settle"):
                at = hold(0)(owner, "u") | {"charge": at["charge"]}
            CreditManager(first).deduct_credits("u", 0).or_raise()
            second = connect()
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(call, CreditManager(second), at)
                wait_until_blocked(conn, second.info.backend_pid, first.info.backend_pid)
                revision = CreditManager(first).get_balance("u").revision
                first.commit()
                answer = waiting.result(30)
            assert answer.revision >= revision, name
        assert owner.verify_ledger() == []

    @pytest.mark.parametrize("commits", [True, False])
    @pytest.mark.parametrize("name", ["charge", "hold", "extend"])
    def test_the_one_who_waited_decides_on_what_is_there_then(
        self,
        owner: CreditManager,
        connect: Connect,
        conn: Connection,
        first: Connection,
        at: Scene,
        name: str,
        commits: bool,
    ) -> None:
        CreditManager(first).deduct_credits("u", 50).or_raise()
        second = connect()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(WAITING[name], CreditManager(second), at)
            wait_until_blocked(conn, second.info.backend_pid, first.info.backend_pid)
            if commits:
                first.commit()
            else:
                first.rollback()
            assert waiting.result(30).error == ("insufficient_credits" if commits else None)
        assert owner.verify_ledger() == []

    def test_nobody_else_waits(self, owner: CreditManager, connect: Connect, first: Connection, at: Scene) -> None:
        """Not other accounts, not readers, not publishing, and nobody for publishing."""
        owner.add_credits("other", 100).or_raise()
        CreditManager(first).deduct_credits("u", 50).or_raise()
        impatient = connect()
        impatient.execute("set lock_timeout = '1ms'")
        manager = CreditManager(impatient)
        with pytest.raises(psycopg.errors.LockNotAvailable):
            manager.deduct_credits("u", 1)
        manager.deduct_credits("other", 1).or_raise()
        manager.deduct_credits("other", 1, manager.reserve_credits("other", 1).reservation_id).or_raise()
        manager.add_credits("new", 1).or_raise()
        assert manager.get_balance("u").balance == 100
        assert len(manager.list_transactions("u")) == 2
        assert manager.verify_ledger() == []
        assert manager.publish_pricing({**CONFIG, "fixed": {"job": 1}}).version == 2
        with impatient.transaction():
            manager.publish_pricing({**CONFIG, "fixed": {"job": 2}})
            CreditManager(first).deduct("u", {"model": "m", "input_tokens": 4}).or_raise()
            priced = owner.deduct_fixed("other", "job").or_raise()
            assert owner.get_transaction(priced.transaction_id).pricing_version == 2
        first.commit()
        assert owner.verify_ledger() == []

    def test_a_charge_that_waited_while_prices_changed(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection, at: Scene
    ) -> None:
        CreditManager(first).deduct_credits("u", 1).or_raise()
        second = connect()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(CreditManager(second).deduct, "u", {"model": "m", "input_tokens": 4})
            wait_until_blocked(conn, second.info.backend_pid, first.info.backend_pid)
            owner.publish_pricing({**CONFIG, "models": {"m": "input_tokens * 2"}})
            first.commit()
            answer = waiting.result(30).or_raise()
        row = owner.get_transaction(answer.transaction_id)
        assert (row.pricing_version, str(row.cost)) in ((1, "1.00"), (2, "8"))
        assert owner.verify_ledger() == []

    def test_two_first_charges(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection
    ) -> None:
        owner.publish_pricing({**CONFIG, "signup_bonus": 50})
        CreditManager(first).deduct_credits("new", 30).or_raise()
        for commits, expected in ((False, None), (True, "insufficient_credits")):
            second = connect(autocommit=False)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(CreditManager(second).deduct_credits, "new", 30)
                wait_until_blocked(conn, second.info.backend_pid, first.info.backend_pid)
                if commits:
                    first.commit()
                else:
                    first.rollback()
                assert waiting.result(30).error == expected
            second.rollback()
            if not commits:
                CreditManager(first).deduct_credits("new", 30).or_raise()
        assert [row.amount for row in owner.list_transactions("new")] == [-30, 50]
        assert owner.verify_ledger() == []

    def test_a_first_charge_that_finds_the_account_opened_on_other_terms(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection
    ) -> None:
        CreditManager(first).add_credits("new", 100).or_raise()
        plan = {"id": "free", "name": "Free", "free_allowance": 40}
        owner.publish_pricing({**CONFIG, "plans": {"free": plan}, "default_plan": "free"})
        second = connect()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(CreditManager(second).deduct_credits, "new", 30)
            wait_until_blocked(conn, second.info.backend_pid, first.info.backend_pid)
            first.commit()
            answer = waiting.result(30).or_raise()
        assert (answer.amount, answer.allowance_used, answer.balance_after) == (-30, 0, 70)
        assert owner.verify_ledger() == []

    def test_a_deadlock_of_the_callers_making_ends_in_an_error_for_one(
        self, owner: CreditManager, connect: Connect, conn: Connection, first: Connection
    ) -> None:
        for user in ("a", "b"):
            owner.add_credits(user, 100).or_raise()
        second = connect(autocommit=False)
        one, two = CreditManager(first), CreditManager(second)
        one.deduct_credits("a", 1).or_raise()
        two.deduct_credits("b", 1).or_raise()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(one.deduct_credits, "b", 1)
            wait_until_blocked(conn, first.info.backend_pid, second.info.backend_pid)
            failures = 0
            try:
                two.deduct_credits("a", 1)
                second.commit()
            except ConcurrencyError:
                failures += 1
                second.rollback()
            try:
                waiting.result(30)
                first.commit()
            except ConcurrencyError:
                failures += 1
                first.rollback()
        assert failures == 1
        assert [owner.get_balance(user).balance for user in ("a", "b")] == [99, 99]
        assert owner.verify_ledger() == []


# --- Sessions and servers that go away --------------------------------------------------------------------------------


def contents(conn: Connection) -> list[Any]:
    return [
        conn.execute(f"select t from ducto_private.{table} as t order by t::text".encode()).fetchall()
        for table in ("accounts", "transactions", "holds", "hold_keys", "pricing_versions", "activations")
    ]


class TestGone:
    def test_a_session_that_is_ended_in_its_transaction_leaves_the_ledger_as_before(
        self, owner: CreditManager, connect: Connect, conn: Connection
    ) -> None:
        owner.add_credits("u", 120).or_raise()
        at = charge(20)(owner, "u") | hold(10)(owner, "u")
        before = contents(conn)
        publish: Callable[[CreditManager, Scene], Any] = lambda m, at: m.publish_pricing({**CONFIG, "fixed": {}})  # noqa: E731
        for name, call in {**WAITING, "publish": publish}.items():
            gone = connect(autocommit=False)
            manager = CreditManager(gone)
            call(manager, at)
            manager.deduct_credits("u", 1)
            conn.execute("select pg_terminate_backend(%s, 30000)", [gone.info.backend_pid])
            with pytest.raises(psycopg.OperationalError):
                gone.commit()
            assert contents(conn) == before, name

    def test_a_session_that_is_ended_while_it_waits(
        self, owner: CreditManager, connect: Connect, conn: Connection
    ) -> None:
        owner.add_credits("u", 120).or_raise()
        before = contents(conn)
        first, second, third = connect(autocommit=False), connect(), connect()
        CreditManager(first).deduct_credits("u", 100).or_raise()
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(CreditManager(second).deduct_credits, "u", 30)
            wait_until_blocked(conn, second.info.backend_pid, first.info.backend_pid)
            conn.execute("select pg_terminate_backend(%s, 30000)", [second.info.backend_pid])
            with pytest.raises(psycopg.OperationalError):
                waiting.result(30)
            next_one = pool.submit(CreditManager(third).deduct_credits, "u", 30)
            wait_until_blocked(conn, third.info.backend_pid, first.info.backend_pid)
            assert contents(conn) == before
            conn.execute("select pg_terminate_backend(%s, 30000)", [first.info.backend_pid])
            assert next_one.result(30).or_raise().balance_after == 90
        with pytest.raises(psycopg.OperationalError):
            first.commit()
        assert owner.verify_ledger() == []

    def test_a_statement_that_runs_out_of_time(self, owner: CreditManager, connect: Connect, conn: Connection) -> None:
        owner.add_credits("u", 120).or_raise()
        first, second = connect(autocommit=False), connect(autocommit=False)
        CreditManager(first).deduct_credits("u", 100).or_raise()
        second.execute("set statement_timeout = 50")
        with pytest.raises(psycopg.errors.QueryCanceled), second.transaction():
            CreditManager(second).deduct_credits("u", 30)
        first.rollback()
        assert CreditManager(second).deduct_credits("u", 30).or_raise().balance_after == 90
        second.commit()
        assert owner.verify_ledger() == []

    def test_a_server_that_crashes(self, server: Server) -> None:
        """What was acknowledged is there, and a retry under the same key settles the rest."""
        if server.bindir is None or server.pid is None:
            pytest.skip("this server is not ours to crash")
        try:
            own = servers.open_server({"synchronous_commit": "on"})
        except ServerError as error:
            pytest.skip(str(error))
        with own, ExitStack() as stack:
            with psycopg.connect(own.dsn(), autocommit=True) as conn:
                ducto_pg.setup(conn).or_raise()
                CreditManager(conn).publish_pricing(CONFIG)
                CreditManager(conn).add_credits("u", 10_000).or_raise()
            answers: dict[str, str] = {}
            crashed = threading.Event()
            crash_at = threading.Barrier(5)

            def connected() -> Connection:
                while True:
                    time.sleep(0.05)
                    with suppress(psycopg.OperationalError):
                        return stack.enter_context(psycopg.connect(own.dsn(), autocommit=True))

            def charge_in_turn(session: int) -> None:
                conn = connected()
                for step in range(40):
                    if step == 15:
                        crash_at.wait(30)
                    key = f"{session}-{step}"
                    while key not in answers:
                        try:
                            answers[key] = (
                                CreditManager(conn).deduct_credits("u", 1, idempotency_key=key).transaction_id
                            )
                        except psycopg.OperationalError:
                            crashed.set()
                            conn = connected()

            with ThreadPoolExecutor(4) as pool:
                running = [pool.submit(charge_in_turn, session) for session in range(4)]
                with psycopg.connect(own.dsn()) as victim:
                    crash_at.wait(30)
                    os.kill(victim.info.backend_pid, signal.SIGKILL)
                    for one in running:
                        one.result(60)
                    with suppress(psycopg.OperationalError):
                        victim.execute("select")
            assert crashed.is_set()
            manager = CreditManager(connected())
            rows = manager.list_transactions("u", 1000, type="usage")
            assert {row.idempotency_key: row.transaction_id for row in rows} == answers
            assert len(rows) == len(answers) == 160
            assert manager.get_balance("u").balance == 9_840
            assert manager.verify_ledger() == []
