"""`CreditManager` and `AsyncCreditManager`: two ways to run the calls of `ducto_pg.client.calls`."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from functools import cache
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import psycopg
from psycopg.adapt import AdaptersMap, Buffer, Loader
from psycopg.errors import PipelineAborted
from psycopg.postgres import register_default_adapters
from psycopg.pq import Format
from psycopg.rows import TupleRow, tuple_row

from ducto_pg import exactjson
from ducto_pg.client.calls import Calls, Query
from ducto_pg.errors import DuctoError, InvalidArgumentError, OutcomeUnknownError, UnavailableError, kind_of
from ducto_pg.install.setup import SetupOptions, asetup, check_dsn, setup
from ducto_pg.models import SetupResult

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

T = TypeVar("T")


class CreditManager(Calls):
    """The calls on a psycopg connection, a psycopg_pool pool, or a DSN ('' takes libpq's PG… variables).

    On a connection they run in its transaction and never begin, commit or roll back, so that a charge and the caller's
    own writes stand or fall together. On a pool or a DSN each call is a committed transaction of its own; for a DSN one
    connection is opened at the first call and kept (threads take turns), until `close()` or the end of a `with` block;
    a forked process opens its own.

    Where an error says "elsewhere", the connection of a DSN is closed, and the next call opens a new one. Errors of
    missing rights are psycopg's own.
    """

    def __init__(self, source: "psycopg.Connection[Any] | ConnectionPool[Any] | str") -> None:
        self._connection: Callable[[], AbstractContextManager[psycopg.Connection[Any]]]
        if isinstance(source, str):
            check_dsn(source)
            self._dsn = source
            self._connection = self._kept_connection
        elif isinstance(source, psycopg.Connection):
            self._connection = lambda: nullcontext(source)
        elif _is_pool(source, asynchronous=False):
            self._connection = source.connection
        else:
            raise TypeError(f"CreditManager takes a psycopg connection, a pool or a DSN, not {type(source)}")
        self._source = source
        self._kept: psycopg.Connection[Any] | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()

    def setup(self, **options: Unpack[SetupOptions]) -> SetupResult:
        """Install or upgrade ducto_pg through this manager's connection; see `ducto_pg.setup`."""
        with self._connection() as conn:
            return setup(conn, **options)

    def run(self, statement: Query[T]) -> T:
        """Run a statement of `ducto_pg.client.calls` and read its answer."""
        sent = False
        try:
            with self._connection() as conn:
                sent = not conn.closed
                cursor = _Cursor(conn, row_factory=tuple_row)
                cursor.execute(
                    statement.sql, statement.arguments, prepare=False, binary=statement.arguments is not None
                )
                while cursor.nextset():
                    pass
                return statement.read(cursor.fetchall())
        except (psycopg.Error, UnicodeEncodeError) as error:
            if ours := _ours(error, sent):
                raise ours from error
            raise

    def close(self) -> None:
        """Close the connection that a DSN opened; one of the caller's is left alone."""
        if self._kept and self._process == os.getpid():
            self._kept.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _kept_connection(self) -> Iterator[psycopg.Connection[Any]]:
        """The one of a DSN, opened if need be; one whose server sends us elsewhere is closed."""
        with self._lock:
            # What a fork copied is the parent's: one would read the other's answers.
            if self._kept is None or self._kept.closed or self._process != os.getpid():
                self._kept = psycopg.Connection.connect(self._dsn, autocommit=True)
                self._process = os.getpid()
            try:
                yield self._kept
            except psycopg.Error as error:
                if _leads_elsewhere(error):
                    self._kept.close()
                raise


class AsyncCreditManager(Calls):
    """`CreditManager` on an async psycopg connection, an async pool, or a DSN: every call is a coroutine."""

    def __init__(self, source: "psycopg.AsyncConnection[Any] | AsyncConnectionPool[Any] | str") -> None:
        self._connection: Callable[[], AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]]
        if isinstance(source, str):
            check_dsn(source)
            self._dsn = source
            self._connection = self._kept_connection
        elif isinstance(source, psycopg.AsyncConnection):
            self._connection = lambda: nullcontext(source)
        elif _is_pool(source, asynchronous=True):
            self._connection = source.connection
        else:
            raise TypeError(
                f"AsyncCreditManager takes an async psycopg connection, an async pool or a DSN, not {type(source)}"
            )
        self._source = source
        self._kept: psycopg.AsyncConnection[Any] | None = None
        self._process = os.getpid()
        self._lock = asyncio.Lock()

    async def setup(self, **options: Unpack[SetupOptions]) -> SetupResult:
        """Install or upgrade ducto_pg through this manager's connection; see `ducto_pg.setup`."""
        async with self._connection() as conn:
            return await asetup(conn, **options)

    async def run(self, statement: Query[T]) -> T:
        """Run a statement of `ducto_pg.client.calls` and read its answer."""
        sent = False
        try:
            async with self._connection() as conn:
                sent = not conn.closed
                cursor = _AsyncCursor(conn, row_factory=tuple_row)
                await cursor.execute(
                    statement.sql, statement.arguments, prepare=False, binary=statement.arguments is not None
                )
                while cursor.nextset():
                    pass
                return statement.read(await cursor.fetchall())
        except (psycopg.Error, UnicodeEncodeError) as error:
            if ours := _ours(error, sent):
                raise ours from error
            raise

    async def close(self) -> None:
        """Close the connection that a DSN opened; one of the caller's is left alone."""
        if self._kept and self._process == os.getpid():
            await self._kept.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @asynccontextmanager
    async def _kept_connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """The one of a DSN, opened if need be; one whose server sends us elsewhere is closed."""
        async with self._lock:
            # What a fork copied is the parent's: one would read the other's answers.
            if self._kept is None or self._kept.closed or self._process != os.getpid():
                self._kept = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True)
                self._process = os.getpid()
            try:
                yield self._kept
            except psycopg.Error as error:
                if _leads_elsewhere(error):
                    await self._kept.close()
                raise


def _is_pool(source: object, *, asynchronous: bool) -> bool:
    lends = callable(getattr(type(source), "connection", None))
    return lends and iscoroutinefunction(getattr(source, "close", None)) is asynchronous


class _ExactJson(Loader):
    def load(self, data: Buffer) -> Any:
        return exactjson.loads(bytes(data))


class _ExactJsonBinary(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> Any:
        return exactjson.loads(bytes(data)[1:])  # after jsonb's version byte


# Psycopg's own adapters, whatever a program has registered in their place, but numbers in JSON are exact.
_ADAPTERS = AdaptersMap(types=psycopg.adapters.types)
register_default_adapters(_ADAPTERS)
_ADAPTERS.types["text"].register(_ADAPTERS)  # for its array
for _loader in (_ExactJson, _ExactJsonBinary):
    _ADAPTERS.register_loader("jsonb", _loader)


class _Cursor(psycopg.Cursor[TupleRow]):
    """Reads the same whatever its connection was told, and in binary: text would follow the session's DateStyle."""

    @property
    def adapters(self) -> AdaptersMap:
        return _ADAPTERS


class _AsyncCursor(psycopg.AsyncCursor[TupleRow]):
    adapters = _Cursor.adapters


def _ours(error: psycopg.Error | UnicodeEncodeError, sent: bool) -> DuctoError | None:
    """The error of `ducto_pg.errors` for one of psycopg; None where it stays psycopg's."""
    if isinstance(error, UnicodeEncodeError):
        what = repr(error.object[error.start : error.end])[:100]
        return InvalidArgumentError(f"{what} is not in the connection's client_encoding, {error.encoding}")
    kind = kind_of(error.sqlstate)
    if isinstance(error, PipelineAborted):
        return None  # not run, as in a transaction that has failed
    if kind is None and isinstance(error, psycopg.OperationalError) and not error.sqlstate:
        kind = OutcomeUnknownError if sent else UnavailableError
    if kind is None and isinstance(error, psycopg.DataError):
        kind = InvalidArgumentError
    if kind is None:
        return None
    diag = error.diag
    if kind.retry:
        kind = _also(kind, type(error))  # type: ignore[arg-type]
    return kind(
        diag.message_primary or str(error), code=error.sqlstate, detail=diag.message_detail, hint=diag.message_hint
    )


@cache
def _also(kind: type[DuctoError], theirs: type[psycopg.Error]) -> type[DuctoError]:
    """`kind` that is psycopg's class too, for programs that catch that one."""

    def reduce(self: DuctoError) -> tuple[Any, ...]:
        return kind, self.args, vars(self)

    return type(kind.__name__, (kind, theirs), {"__module__": kind.__module__, "__reduce__": reduce})


def _leads_elsewhere(error: psycopg.Error) -> bool:
    kind = kind_of(error.sqlstate)
    return kind is not None and kind.retry == "elsewhere"
