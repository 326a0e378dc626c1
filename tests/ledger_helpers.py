"""The words in which the ledger's tests are written: given some calls, a call, and what it answers.

A sentence runs in a transaction that is rolled back, so that many share one database. In arguments and answers `@hold`,
`@charge`, `@grant`, `@refund` and `@team` stand for the id that was answered last of that kind, `@hold1`, `@hold2`, …
for the first, the second, ….
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from conftest import Clock, Connection, _database
from psycopg.rows import dict_row

from ducto_pg import CreditManager, exactjson
from ducto_pg.embedded import Server

Row = dict[str, Any]
MOST = 9223372036854775807
UNKNOWN = "00000000-0000-7000-8000-000000000000"

# `any` costs as many credits as it is told points, to twelve decimals.
PRICES: dict[str, Any] = {
    "match": "prefix",
    "models": {
        "any": "points",
        "gpt": "input_tokens * 0.01 + output_tokens * 0.03",
        "ratio": "input_tokens / output_tokens",
        "square": "input_tokens ** 2",
    },
    "tools": {"browse": "tool_calls * 2"},
    "fixed": {"report": 7, "gift": 0},
    "metrics": {"points": 0},
    "min_balance": 5,
}

# Windows of a cap of 10, by zone: a moment in UTC, the kind of the cap, the room left in its window, and what is spent
# then.
WINDOWS: dict[str, list[tuple[str, str, int, int]]] = {
    "UTC": [
        ("2026-01-31T23:59:59.999999", "daily", 10, 10),
        ("2026-02-01T00:00", "daily", 10, 4),
        ("2026-02-01T23:59:59", "daily", 6, 6),
        ("2027-02-28T23:00", "monthly", 10, 6),
        ("2027-02-28T23:59:59.999999", "monthly", 4, 4),
        ("2027-03-01T00:00", "monthly", 10, 1),
        ("2028-02-28T23:59:59.999999", "daily", 10, 10),
        ("2028-02-29T00:00", "daily", 10, 6),
        ("2028-02-29T00:00", "monthly", 10, 6),
        ("2028-02-29T23:59:59.999999", "daily", 4, 4),
        ("2028-02-29T23:59:59.999999", "monthly", 4, 4),
        ("2028-03-01T00:00", "daily", 10, 10),
        ("2028-03-01T00:00", "monthly", 10, 10),
        ("2028-12-31T23:59:59", "monthly", 10, 10),
        ("2029-01-01T00:00", "monthly", 10, 10),
    ],
    # Days of 23 and of 25 hours.
    "Europe/Berlin": [
        ("2026-03-28T22:59:59", "daily", 10, 10),
        ("2026-03-28T23:00", "daily", 10, 6),
        ("2026-03-29T21:59:59", "daily", 4, 4),
        ("2026-03-29T22:00", "daily", 10, 10),
        ("2026-03-31T21:59:59", "monthly", 10, 10),
        ("2026-03-31T22:00", "monthly", 10, 10),
        ("2026-10-24T21:59:59", "daily", 10, 10),
        ("2026-10-24T22:00", "daily", 10, 6),
        ("2026-10-25T22:59:59", "daily", 4, 4),
        ("2026-10-25T23:00", "daily", 10, 10),
        ("2026-10-31T22:59:59", "monthly", 10, 10),
        ("2026-10-31T23:00", "monthly", 10, 10),
    ],
    # A day that begins at one o'clock, and one whose first hour comes twice.
    "America/Havana": [
        ("2026-03-08T04:59:59", "daily", 10, 10),
        ("2026-03-08T05:00", "daily", 10, 6),
        ("2026-03-09T03:59:59", "daily", 4, 4),
        ("2026-03-09T04:00", "daily", 10, 10),
        ("2026-11-01T03:59:59", "daily", 10, 10),
        ("2026-11-01T03:59:59", "monthly", 10, 10),
        ("2026-11-01T04:00", "daily", 10, 3),
        ("2026-11-01T04:00", "monthly", 10, 3),
        ("2026-11-01T04:59:59.999999", "monthly", 7, 1),
        ("2026-11-01T05:00", "daily", 7, 4),
        ("2026-11-01T05:30", "monthly", 6, 4),
        ("2026-11-02T04:59:59", "daily", 3, 3),
        ("2026-11-02T05:00", "daily", 10, 10),
        ("2026-12-01T04:59:59", "monthly", 2, 2),
        ("2026-12-01T05:00", "monthly", 10, 10),
    ],
    # The first hour of a month that never came.
    "Asia/Damascus": [
        ("2005-03-31T21:59:59", "daily", 10, 10),
        ("2005-03-31T21:59:59", "monthly", 10, 10),
        ("2005-03-31T22:00", "daily", 10, 4),
        ("2005-03-31T22:00", "monthly", 10, 10),
        ("2005-04-01T20:59:59", "daily", 6, 6),
        ("2005-04-01T21:00", "daily", 10, 10),
    ],
    # One minute after midnight the clock went back to the day, and the month, before.
    "America/St_Johns": [
        ("2009-11-01T02:29:59", "daily", 10, 6),
        ("2009-11-01T02:29:59", "monthly", 10, 6),
        ("2009-11-01T02:30", "daily", 10, 7),
        ("2009-11-01T02:30:59", "monthly", 10, 7),
        ("2009-11-01T02:31", "daily", 4, 1),
        ("2009-11-01T03:29:59", "daily", 3, 3),
        ("2009-11-01T03:29:59", "monthly", 4, 4),
        ("2009-11-01T03:30", "daily", 3, 3),
        ("2009-11-01T03:30", "monthly", 3, 2),
        ("2009-11-02T03:30", "daily", 10, 10),
        ("2009-12-01T03:29:59", "monthly", 1, 1),
        ("2009-12-01T03:30", "monthly", 10, 10),
    ],
    # A day that never came.
    "Pacific/Apia": [
        ("2011-12-30T09:59:59", "daily", 10, 10),
        ("2011-12-30T09:59:59", "monthly", 10, 6),
        ("2011-12-30T10:00", "daily", 10, 10),
        ("2011-12-31T09:59:59", "daily", 0, 0),
        ("2011-12-31T09:59:59", "monthly", 4, 4),
        ("2011-12-31T10:00", "daily", 10, 10),
        ("2011-12-31T10:00", "monthly", 10, 10),
    ],
}

_KINDS = {"reservation_id": "hold", "refund_transaction_id": "refund", "team_id": "team"}
_AMOUNTS = ("amount", "cost", "charged", "limit", "allowance_used", "allowance_restored", "allowance_lapsed")
_TABLES = """
select string_agg(
  format('select %L, (select md5(string_agg(r::text, chr(10) order by r::text)) from %s as r)',
    c.relname, c.oid::regclass),
  ' union all ')
from pg_class as c
where c.relnamespace = 'ducto_private'::regnamespace and c.relkind = 'r' and c.relname <> 'fake_clock'
"""

_WITHOUT_ALERTS = "select to_jsonb(a) - 'refused' from ducto_private.accounts as a order by a.account_id"


def costs(points: int | str) -> Row:
    """A usage of that exact cost."""
    return {"model": "any", "points": Decimal(points)}


@dataclass(frozen=True)
class Call:
    """A call of an RPC: arguments by position or by name (without `p_`; `key`, `hold` and `ttl` are short forms)."""

    name: str
    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def __call__(self, ledger: "Ledger") -> None:
        for row in ledger.run(self):
            assert row.get("error") is None, (self, row)


class _Ask:
    def __getattr__(self, name: str) -> Callable[..., Call]:
        return lambda *positional, **named: Call(name, positional, named)


ask = _Ask()

Step = Callable[["Ledger"], None]
Check = Callable[["Ledger", Call], None]
Sentence = tuple[str, list[Step], Call, Check]


@dataclass
class Ledger:
    """A session on a database with prices, its clock, and what was answered so far."""

    conn: Connection
    clock: Clock
    ids: dict[str, list[str]] = field(default_factory=dict)
    first_answers: dict[str, Row] = field(default_factory=dict)

    def run(self, call: Call) -> list[Row]:
        """Call, and remember ids and first answers."""
        short = {"key": "idempotency_key", "hold": "reservation_id", "ttl": "ttl_seconds"}
        names = [f"p_{short.get(name, name)} => %s" for name in call.named]
        values = [self.plain(value) for value in (*call.positional, *call.named.values())]
        query = f"select a.* from ducto.{call.name}({', '.join(['%s'] * len(call.positional) + names)}) as a"
        with self.conn.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(query.encode(), values).fetchall()
        if call.name == "deduct_batch" or (len(rows) == 1 and not call.name.startswith(("get_", "list_", "explain_"))):
            for row in rows:
                self.remember(call, row)
            if len(rows) == 1 and rows[0].get("error") is None:
                self.first_answers.setdefault(repr(call), rows[0])
        return rows

    def one(self, call: Call) -> Row:
        """The one row of an answer."""
        (row,) = self.run(call)
        return row

    def remember(self, call: Call, row: Row) -> None:
        names = ["refund_transaction_id", "reservation_id", "transaction_id"]
        for name in [*names, "team_id"] if call.name == "create_team" else names:
            if row.get(name):
                kind = _KINDS.get(name, "charge" if "allowance_used" in row else "grant")
                ids = self.ids.setdefault(kind, [])
                if row[name] not in ids[-100:]:
                    ids.append(row[name])

    def named(self, value: Any) -> Any:
        """What a name like `@hold` stands for, also inside lists and objects."""
        if isinstance(value, list):
            return [self.named(item) for item in value]
        if isinstance(value, dict):
            return {name: self.named(item) for name, item in value.items()}
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        kind = value[1:].rstrip("0123456789")
        return self.ids[kind][int(value[1 + len(kind) :] or 0) - 1]

    def plain(self, value: Any) -> Any:
        """A value as untyped text, so that the database reads it as the argument's type; of a tuple an array."""
        if isinstance(value, tuple):
            return list(value)
        if value is None or isinstance(value, str):
            return self.named(value)
        return exactjson.dumps(self.named(value)) if isinstance(value, (dict, list)) else str(value)

    def sql(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a statement, if it has any."""
        cursor = self.conn.execute(text.encode(), [self.plain(value) for value in values] or None)
        return cursor.fetchall() if cursor.description else []

    def tables(self) -> dict[str, str]:
        """What is in each table."""
        return contents(self.conn)

    def publish(self, **changes: Any) -> None:
        """Publish and activate the usual prices with changes; a change to None leaves a section out."""
        config = {name: value for name, value in (PRICES | changes).items() if value is not None}
        CreditManager(self.conn).publish_pricing(config)

    def events(self, *types: str) -> list[tuple[str, Row]]:
        """Type and payload of what is in the outbox, oldest first; only of these types if any are named."""
        rows = self.sql("select type, payload from ducto_private.events order by created_at, type, payload")
        return [(name, payload) for name, payload in rows if name in types or not types]

    def violations(self) -> list[Row]:
        """What `verify_ledger` finds."""
        return self.run(ask.verify_ledger())


def contents(conn: Connection) -> dict[str, str]:
    """The digest of all rows of each table."""
    ((query,),) = conn.execute(_TABLES).fetchall()
    return dict(conn.execute(query).fetchall())


@pytest.fixture(scope="module")
def module_ledger(server: Server, template_db: str) -> Iterator[Ledger]:
    """A database of this file's own with the usual prices."""
    with _database(server, template_db) as (_, dsn), psycopg.connect(dsn, autocommit=True) as conn:
        ledger = Ledger(conn, Clock(conn))
        ledger.publish()
        yield ledger


@contextmanager
def rolled_back(ledger: Ledger) -> Iterator[Ledger]:
    """The ledger with nothing remembered, at the start of 2026; what is done to it is undone, but sound it must be."""
    with ledger.conn.transaction(force_rollback=True):
        sentence = Ledger(ledger.conn, ledger.clock)
        sentence.clock.set("2026-01-01")
        yield sentence
        assert sentence.violations() == []


@pytest.fixture
def ledger(module_ledger: Ledger) -> Iterator[Ledger]:
    """The file's database as it was, at the start of 2026; what a test does to it is undone."""
    with rolled_back(module_ledger) as ledger:
        yield ledger


def prices(**changes: Any) -> Step:
    """The usual prices, changed, are published."""
    return lambda ledger: ledger.publish(**changes)


def at(time: str) -> Step:
    """It is that time (UTC)."""
    return lambda ledger: ledger.clock.set(time)


def later(**step: int) -> Step:
    """Time goes on."""
    return lambda ledger: ledger.clock.advance(timedelta(**step))


def team(name: str, *members: str) -> Step:
    """There is a team with 100 credits and these members."""

    def step(ledger: Ledger) -> None:
        ask.create_team(f"The {name}", 100, team_id=name)(ledger)
        for member in members:
            ask.add_team_member(name, member)(ledger)

    return step


def but(check: Check, call: Call) -> Step:
    """A call was made in between that did not simply succeed."""
    return lambda ledger: check(ledger, call)


def gives(**fields: Any) -> Check:
    """It succeeds; these are among the fields of its answer."""

    def check(ledger: Ledger, call: Call) -> None:
        row = ledger.one(call)
        assert row.get("error") is None, row
        _assert_shows(ledger, row, fields)

    return check


def lists(*rows: Row) -> Check:
    """It answers so many rows, with these among their fields, and writes nothing."""

    def check(ledger: Ledger, call: Call) -> None:
        before = ledger.tables()
        found = ledger.run(call)
        assert len(found) == len(rows), found
        for row, fields in zip(found, rows, strict=True):
            _assert_shows(ledger, row, fields)
        assert ledger.tables() == before

    return check


def lists_in_any_order(*rows: Row) -> Check:
    """It answers these rows, all with the same fields, in some order, and writes nothing."""

    def check(ledger: Ledger, call: Call) -> None:
        before = ledger.tables()
        found = [{name: row[name] for name in (rows or [{}])[0]} for row in ledger.run(call)]
        assert sorted(found, key=repr) == sorted((ledger.named(dict(row)) for row in rows), key=repr)
        assert ledger.tables() == before

    return check


def reads(**fields: Any) -> Check:
    """It answers one row, and writes nothing."""
    return lists(fields | {"error": None})


def replays(**fields: Any) -> Check:
    """It gives the first answer to the same call again, and writes nothing."""

    def check(ledger: Ledger, call: Call) -> None:
        first, before = ledger.first_answers[repr(call)], ledger.tables()
        again = ledger.one(call)
        assert again == first | {"idempotent": True}
        assert first["idempotent"] is False
        _assert_shows(ledger, again, fields)
        assert ledger.tables() == before

    return check


def refuses(error: str, **fields: Any) -> Check:
    """It answers this error, amounts of 0, no other text, today's balance of the first argument, and writes nothing."""

    def check(ledger: Ledger, call: Call) -> None:
        before, accounts = ledger.tables(), ledger.sql(_WITHOUT_ALERTS)
        row = ledger.one(call)
        assert row["error"] == error, row
        after = ledger.tables()
        if error == "insufficient_credits":  # The first tells, and flags the account's row.
            before |= {name: after[name] for name in ("accounts", "events", "auto_topups")}
        assert after == before
        assert ledger.sql(_WITHOUT_ALERTS) == accounts
        _assert_shows(ledger, row, fields)
        for name, value in row.items():
            if name.endswith(("_id", "expires_at")) or (isinstance(value, str) and name != "error"):
                assert value is None, name
            elif name in _AMOUNTS:
                assert value == 0, name
        assert row.get("idempotent", False) is False
        assert not row.get("warnings")
        user = call.named.get("user_id") or call.positional[0]
        if "user_id" in call.named or not call.name.startswith(("extend_", "release_", "refund_", "get_")):
            balance = ledger.one(ask.get_balance(user))
            for name in {"balance", "new_balance", "balance_after", "team_balance_after"} & row.keys():
                assert fields.get(name, balance["balance"]) == row[name]
            if "reserved_total" in row:
                assert fields.get("reserved_total", balance["reserved"]) == row["reserved_total"]

    return check


def raises(sqlstate: str, *words: str, hint: bool = True) -> Check:
    """It fails with this SQLSTATE, these words in message, detail or hint, a hint always, and writes nothing."""

    def check(ledger: Ledger, call: Call) -> None:
        before = ledger.tables()
        with pytest.raises(psycopg.Error) as raised, ledger.conn.transaction():
            ledger.run(call)
        diag = raised.value.diag
        text = f"{diag.message_primary}\n{diag.message_detail}\n{diag.message_hint}"
        assert raised.value.sqlstate == sqlstate, text
        assert all(word in text for word in words), text
        assert bool(diag.message_hint) is hint, text
        assert ledger.tables() == before

    return check


def _assert_shows(ledger: Ledger, row: Row, fields: Row) -> None:
    expected = {name: ledger.named(value) for name, value in fields.items()}
    assert {name: row[name] for name in fields} == expected, row


def table(*sentences: Sentence) -> pytest.MarkDecorator:
    """The sentences that a test tells, one after the other."""
    return pytest.mark.parametrize(
        ("given", "call", "check"), [row[1:] for row in sentences], ids=[row[0] for row in sentences]
    )


def tell(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    """Tell a sentence: do what is given, then call and look."""
    for step in given:
        step(ledger)
    check(ledger, call)


# What many stories begin with.
LONG = "x" * 256
FREE = {"free": {"id": "free", "name": "Free", "free_allowance": 10}}
rich = ask.add_credits("u", 100)
poor = ask.add_credits("u", 1)
hold = ask.reserve_credits("u", 30)
charge = ask.deduct("u", costs(30))
free = prices(plans=FREE, default_plan="free")
debt = prices(overrun="debt")
reject = prices(overrun="reject")


def settle(points: int, user: str = "u", **more: Any) -> Call:
    """The first hold is settled."""
    return ask.deduct(user, costs(points), hold="@hold1", **more)
