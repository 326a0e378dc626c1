"""`CreditManager` and `AsyncCreditManager`: two ways to run the calls of `ducto_pg.client.calls`."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import psycopg
from psycopg.adapt import Buffer, Loader
from psycopg.pq import Format
from psycopg.rows import TupleRow, tuple_row
from psycopg.types.numeric import NumericBinaryLoader, NumericLoader

from ducto_pg import exactjson
from ducto_pg.client.calls import Calls, Statement
from ducto_pg.errors import InvalidArgumentError, from_sqlstate
from ducto_pg.install.setup import SetupOptions, asetup, check_dsn, setup
from ducto_pg.models import SetupResult

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

T = TypeVar("T")


class CreditManager(Calls):
    """The calls on a psycopg connection, a psycopg_pool pool, or a DSN ('' takes libpq's PG… variables).

    On a connection they run in its transaction and never begin, commit or roll back, so that a charge and the caller's
    own writes stand or fall together. On a pool or a DSN each call is a committed transaction of its own; for a DSN one
    connection is opened at the first call and kept (threads take turns), until `close()` or the end of a `with` block.

    Errors of the connection itself, and of missing rights, are psycopg's own.
    """

    def __init__(self, source: "psycopg.Connection[Any] | ConnectionPool[Any] | str") -> None:
        if isinstance(source, str):
            check_dsn(source)
        elif not isinstance(source, psycopg.Connection) and not _is_pool(source, asynchronous=False):
            raise TypeError(f"CreditManager takes a psycopg connection, a pool or a DSN, not {type(source)}")
        self._source = source
        self._kept: psycopg.Connection[Any] | None = None
        self._lock = threading.Lock()

    def setup(self, **options: Unpack[SetupOptions]) -> SetupResult:
        """Install or upgrade ducto_pg through this manager's connection; see `ducto_pg.setup`."""
        with self._connection() as conn:
            return setup(conn, **options)

    def run(self, statement: Statement[T]) -> T:
        """Run a statement of `ducto_pg.client.calls` and read its answer."""
        with _errors(), self._connection() as conn, psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
            _read_exactly(cursor)
            cursor.execute(statement.sql, statement.arguments, prepare=False, binary=statement.arguments is not None)
            while cursor.nextset():
                pass
            return statement.read(cursor.fetchall())

    def close(self) -> None:
        """Close the connection that a DSN opened; one of the caller's is left alone."""
        if self._kept:
            self._kept.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _connection(self) -> Iterator[psycopg.Connection[Any]]:
        if isinstance(self._source, psycopg.Connection):
            yield self._source
        elif isinstance(self._source, str):
            with self._lock:
                if self._kept is None or self._kept.closed:
                    self._kept = psycopg.connect(self._source, autocommit=True)
            yield self._kept
        else:
            with self._source.connection() as conn:
                yield conn


class AsyncCreditManager(Calls):
    """`CreditManager` on an async psycopg connection, an async pool, or a DSN: every call is a coroutine."""

    def __init__(self, source: "psycopg.AsyncConnection[Any] | AsyncConnectionPool[Any] | str") -> None:
        if isinstance(source, str):
            check_dsn(source)
        elif not isinstance(source, psycopg.AsyncConnection) and not _is_pool(source, asynchronous=True):
            raise TypeError(
                f"AsyncCreditManager takes an async psycopg connection, an async pool or a DSN, not {type(source)}"
            )
        self._source = source
        self._kept: psycopg.AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()

    async def setup(self, **options: Unpack[SetupOptions]) -> SetupResult:
        """Install or upgrade ducto_pg through this manager's connection; see `ducto_pg.setup`."""
        async with self._connection() as conn:
            return await asetup(conn, **options)

    async def run(self, statement: Statement[T]) -> T:
        """Run a statement of `ducto_pg.client.calls` and read its answer."""
        with _errors():
            async with self._connection() as conn, psycopg.AsyncCursor(conn, row_factory=tuple_row) as cursor:
                _read_exactly(cursor)
                await cursor.execute(
                    statement.sql, statement.arguments, prepare=False, binary=statement.arguments is not None
                )
                while cursor.nextset():
                    pass
                return statement.read(await cursor.fetchall())

    async def close(self) -> None:
        """Close the connection that a DSN opened; one of the caller's is left alone."""
        if self._kept:
            await self._kept.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        if isinstance(self._source, psycopg.AsyncConnection):
            yield self._source
        elif isinstance(self._source, str):
            async with self._lock:
                if self._kept is None or self._kept.closed:
                    self._kept = await psycopg.AsyncConnection.connect(self._source, autocommit=True)
            yield self._kept
        else:
            async with self._source.connection() as conn:
                yield conn


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


def _read_exactly(cursor: psycopg.Cursor[TupleRow] | psycopg.AsyncCursor[TupleRow]) -> None:
    """Numbers come as Decimal through this cursor, whatever the connection is told.

    Answers to calls with arguments are read in binary: their text would follow the session's DateStyle.
    """
    for loader in (_ExactJson, _ExactJsonBinary):
        cursor.adapters.register_loader("jsonb", loader)
    for numbers in (NumericLoader, NumericBinaryLoader):
        cursor.adapters.register_loader("numeric", numbers)


@contextmanager
def _errors() -> Iterator[None]:
    """Raises the database's errors as those of `ducto_pg.errors`; what is none of ours stays psycopg's."""
    try:
        yield
    except UnicodeEncodeError as error:
        what = repr(error.object[error.start : error.end])[:100]
        raise InvalidArgumentError(f"{what} is not in the connection's client_encoding, {error.encoding}") from error
    except psycopg.Error as error:
        message = error.diag.message_primary or str(error)
        ours = from_sqlstate(error.sqlstate, message, error.diag.message_detail, error.diag.message_hint)
        if ours is None and isinstance(error, psycopg.DataError):
            ours = InvalidArgumentError(message, code=error.sqlstate, detail=error.diag.message_detail)
        if ours is None:
            raise
        raise ours from error
