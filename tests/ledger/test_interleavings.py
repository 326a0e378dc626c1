"""Sessions that call at random on the same accounts, and a model that replays what they were answered.

Each call that was acknowledged happened once, in the order of the revisions, and each answer follows from the rules.
"""

import math
import random
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from conftest import Connect, Connection
from sessions import race

from ducto_pg import CreditManager

CONFIG: dict[str, Any] = {"models": {"m": "input_tokens * 0.25"}, "min_balance": 0}


@pytest.fixture
def owner(conn: Connection) -> CreditManager:
    manager = CreditManager(conn)
    manager.publish_pricing(CONFIG)
    return manager


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
        race(self.sessions, self.session)

    def session(self, conn: Connection, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        manager = CreditManager(conn)
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
