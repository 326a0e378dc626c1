"""The words in which the ledger's tests are written: given some calls, a call, and what it answers.

A sentence runs in a transaction that is rolled back, so that many share one database. In arguments and answers `@hold`,
`@charge`, `@grant` and `@refund` stand for the id that was answered last of that kind, `@hold1`, `@hold2`, … for the
first, the second, ….
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

_KINDS = {"reservation_id": "hold", "refund_transaction_id": "refund"}
_TABLES = """
select string_agg(
  format('select %L, (select md5(string_agg(r::text, chr(10) order by r::text)) from %s as r)',
    c.relname, c.oid::regclass),
  ' union all ')
from pg_class as c
where c.relnamespace = 'ducto_private'::regnamespace and c.relkind = 'r' and c.relname <> 'fake_clock'
"""


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
        if len(rows) == 1 and not call.name.startswith(("get_", "list_", "explain_")):
            self.remember(call, rows[0])
        return rows

    def one(self, call: Call) -> Row:
        """The one row of an answer."""
        (row,) = self.run(call)
        return row

    def remember(self, call: Call, row: Row) -> None:
        for name in ("refund_transaction_id", "reservation_id", "transaction_id"):
            if row.get(name):
                kind = _KINDS.get(name, "charge" if "allowance_used" in row else "grant")
                ids = self.ids.setdefault(kind, [])
                if row[name] not in ids:
                    ids.append(row[name])
        if row.get("error") is None:
            self.first_answers.setdefault(repr(call), row)

    def named(self, value: Any) -> Any:
        """What a name like `@hold` stands for."""
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        kind = value[1:].rstrip("0123456789")
        return self.ids[kind][int(value[1 + len(kind) :] or 0) - 1]

    def plain(self, value: Any) -> Any:
        """A value as untyped text, so that the database reads it as the argument's type."""
        if value is None or isinstance(value, str):
            return self.named(value)
        return exactjson.dumps(value) if isinstance(value, (dict, list)) else str(value)

    def sql(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of a statement, if it has any."""
        cursor = self.conn.execute(text.encode(), [self.plain(value) for value in values] or None)
        return cursor.fetchall() if cursor.description else []

    def tables(self) -> dict[str, Any]:
        """What is in each table."""
        ((query,),) = self.sql(_TABLES)
        return dict(self.sql(query))

    def publish(self, **changes: Any) -> None:
        """Publish and activate the usual prices with changes; a change to None leaves a section out."""
        config = {name: value for name, value in (PRICES | changes).items() if value is not None}
        CreditManager(self.conn).publish_pricing(config)

    def violations(self) -> list[Row]:
        """What `verify_ledger` finds."""
        return self.run(ask.verify_ledger())


@contextmanager
def open_ledger(server: Server, template_db: str) -> Iterator[Ledger]:
    """A database of its own with the usual prices."""
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


def prices(**changes: Any) -> Step:
    """The usual prices, changed, are published."""
    return lambda ledger: ledger.publish(**changes)


def at(time: str) -> Step:
    """It is that time (UTC)."""
    return lambda ledger: ledger.clock.set(time)


def later(**step: int) -> Step:
    """Time goes on."""
    return lambda ledger: ledger.clock.advance(timedelta(**step))


def team(name: str) -> Step:
    """There is a team with 100 credits."""

    def step(ledger: Ledger) -> None:
        ask.add_credits(name, 100)(ledger)
        ledger.sql("update ducto_private.accounts set kind = 'team', plain = false where account_id = %s", name)

    return step


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
        before = ledger.tables()
        row = ledger.one(call)
        assert row["error"] == error, row
        assert ledger.tables() == before
        _assert_shows(ledger, row, fields)
        for name, value in row.items():
            if name.endswith(("_id", "expires_at")):
                assert value is None, name
            elif name in ("amount", "cost", "charged", "allowance_used", "allowance_restored", "allowance_lapsed"):
                assert value == 0, name
        assert row.get("idempotent", False) is False
        assert not row.get("warnings")
        user = call.named.get("user_id") or call.positional[0]
        if "user_id" in call.named or not call.name.startswith(("extend_", "release_", "refund_", "get_")):
            balance = ledger.one(ask.get_balance(user))
            for name in {"balance", "new_balance", "balance_after"} & row.keys():
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


def tell(ledger: Ledger, given: list[Step], call: Call, check: Check) -> None:
    """Tell a sentence: do what is given, then call and look."""
    for step in given:
        step(ledger)
    check(ledger, call)
