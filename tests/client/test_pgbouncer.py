"""Through a real pgbouncer in transaction mode: 32 clients on 4 server connections, without an error."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import psycopg
import pytest
from program_helpers import debian_program
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool
from supabase_helpers import free_port
from test_drivers import DRIVERS as EXAMPLES
from test_drivers import run

from ducto_pg import AsyncCreditManager, CreditManager
from ducto_pg.embedded import Server, _server_user

Connection = psycopg.Connection[Any]

CLIENTS, SERVERS, ROUNDS = 32, 4, 5
PRICES = {"models": {"chat": "input_tokens * 0.5"}, "min_balance": 0}
USAGE = {"model": "chat", "input_tokens": 3}
_KEYS = ("host", "port", "user", "password", "dbname")
PACKAGES = ("pgbouncer", "libevent-2.1-7", "libc-ares2")


@dataclass(frozen=True)
class Bouncer:
    """A running pgbouncer: the DSN of a database behind it, and of its own console."""

    dsn: str
    console: str


@pytest.fixture
def bouncer(db: str, server: Server) -> Iterator[Bouncer]:
    behind, port, user = conninfo_to_dict(db), free_port(), _server_user()
    folder = Path(tempfile.mkdtemp(prefix="ducto_pg-bouncer-", dir="/tmp"))
    program = debian_program("pgbouncer", *PACKAGES, folder=folder)
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "admin_users": "postgres",
        "pool_mode": "transaction",
        "default_pool_size": SERVERS,
        "max_client_conn": CLIENTS + 10,
        "logfile": folder / "log",
        "pidfile": folder / "pid",
    }
    database = " ".join(f"{key}='{behind[key]}'" for key in _KEYS if behind.get(key))
    lines = [
        "[databases]",
        f"shop = {database}",
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in settings.items()),
    ]
    (folder / "pgbouncer.ini").write_text("\n".join(lines))
    # Like PostgreSQL, it does not run as root.
    for path in (folder, *folder.iterdir()):
        os.chown(path, user.get("user", -1), user.get("group", -1))
    process = subprocess.Popen(
        [program, folder / "pgbouncer.ini"],
        cwd="/",
        env={"LD_LIBRARY_PATH": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **user,
    )
    dsn = make_conninfo(host="127.0.0.1", port=port, user="postgres", dbname="shop")
    try:
        for _ in range(200):
            try:
                psycopg.connect(dsn, connect_timeout=5).close()
                break
            except psycopg.OperationalError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        yield Bouncer(dsn, make_conninfo(dsn, dbname="pgbouncer"))
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(folder)


def work(credits: CreditManager, number: int) -> None:
    """What a client does: holds, settlements, charges on an account of its own and on one of all."""
    user = f"user {number}"
    credits.add_credits(user, 100, idempotency_key="grant").or_raise()
    for turn in range(ROUNDS):
        hold = credits.reserve(user, USAGE, idempotency_key=f"hold {turn}").or_raise()
        charge = credits.deduct(user, USAGE, f"charge {turn}", reservation_id=hold.reservation_id).or_raise()
        assert credits.deduct(user, USAGE, f"charge {turn}", reservation_id=hold.reservation_id).idempotent
        credits.deduct_credits("everybody", 1, idempotency_key=f"{number} {turn}").or_raise()
        assert credits.get_transaction(charge.transaction_id)
    credits.refund_credits(charge.transaction_id).or_raise()


SOURCES: dict[str, Callable[[str, ExitStack], CreditManager]] = {
    "a DSN": lambda dsn, stack: stack.enter_context(CreditManager(dsn)),
    "a pool": lambda dsn, stack: CreditManager(
        stack.enter_context(ConnectionPool[Connection](dsn, min_size=1, max_size=1, open=True))
    ),
    "a connection": lambda dsn, stack: CreditManager(stack.enter_context(psycopg.connect(dsn, autocommit=True))),
}


def test_32_clients_on_4_connections(conn: Connection, bouncer: Bouncer) -> None:
    owner = CreditManager(conn)
    owner.publish_pricing(PRICES)
    owner.add_credits("everybody", CLIENTS * ROUNDS)
    start = Barrier(CLIENTS)

    def client(number: int) -> None:
        with ExitStack() as stack:
            credits = list(SOURCES.values())[number % len(SOURCES)](bouncer.dsn, stack)
            credits.get_balance("everybody")
            start.wait(60)
            work(credits, number)

    with psycopg.connect(bouncer.console, autocommit=True, cursor_factory=psycopg.ClientCursor) as console:
        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(client, range(CLIENTS)))
        servers = console.execute("show servers").fetchall()
    assert 2 <= len(servers) <= SERVERS
    assert owner.get_balance("everybody").balance == 0
    assert [owner.get_balance(f"user {number}").balance for number in range(CLIENTS)] == [94] * CLIENTS
    assert owner.verify_ledger() == []


def test_asynchronous_clients_and_drivers(conn: Connection, bouncer: Bouncer) -> None:
    asyncpg = pytest.importorskip("asyncpg")
    owner = CreditManager(conn)
    owner.publish_pricing(PRICES)
    owner.add_credits("everybody", CLIENTS * ROUNDS)

    async def managed(number: int) -> None:
        async with AsyncCreditManager(bouncer.dsn) as credits:
            for turn in range(ROUNDS):
                (await credits.deduct("everybody", USAGE | {"input_tokens": 2}, f"{number} {turn}")).or_raise()

    async def plain(number: int) -> None:
        parts = conninfo_to_dict(bouncer.dsn)
        address = {"host": parts["host"], "port": str(parts["port"]), "user": "postgres", "database": "shop"}
        mine = await asyncpg.connect(**address, statement_cache_size=0, ssl=False)
        for turn in range(ROUNDS):
            query = "select error from ducto.deduct_credits('everybody', 1, p_idempotency_key => $1)"
            assert await mine.fetchval(query, f"{number} {turn}") is None
        await mine.close()

    async def main() -> None:
        await asyncio.gather(*((managed if number % 2 else plain)(number) for number in range(CLIENTS)))

    asyncio.run(main())
    assert owner.get_balance("everybody").balance == 0
    assert owner.verify_ledger() == []


def test_examples(conn: Connection, bouncer: Bouncer) -> None:
    CreditManager(conn).publish_pricing(EXAMPLES.parent / "prices.yaml")
    for driver in ("asyncpg", "psycopg2", "sqlalchemy"):
        said = run(bouncer.dsn, sys.executable, EXAMPLES / f"{driver}_charge.py", driver)
        assert said.endswith("refunded 6, balance 1000\n")


def test_a_transaction_of_ones_own(conn: Connection, bouncer: Bouncer) -> None:
    """What goes together stays on one server connection; setup and publishing work there too."""
    with psycopg.connect(bouncer.dsn) as mine:
        credits = CreditManager(mine)
        assert not credits.setup().or_raise().rpcs_created
        credits.publish_pricing(PRICES)
        credits.add_credits("alice", 10).or_raise()
        credits.deduct("alice", USAGE).or_raise()
        mine.rollback()
    assert CreditManager(conn).get_balance("alice").revision == 0
