"""Puts ducto_pg into a database, or brings it up to date: the same road, and the same single statement, for both.

`install.sql` is that statement: a block that looks whether it may, makes again what was dropped or replaced since the
last one, runs the migrations that are missing, applies `sql/` and the grants, and does nothing where nothing differs.
`script()` prints it for psql or a migration tool; `setup()` runs it inside the caller's transaction and reports.
"""

import json
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from functools import reduce
from hashlib import sha256
from typing import Any, Protocol, TypedDict, Unpack, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from ducto_pg import __version__, exactjson
from ducto_pg.errors import InvalidArgumentError
from ducto_pg.formula import fields
from ducto_pg.install import sqlfiles
from ducto_pg.models import SetupResult
from ducto_pg.usage import table

Roles = str | Iterable[str]


class SqlAlchemyConnection(Protocol):
    """A SQLAlchemy `Connection` over psycopg or psycopg2, such as Alembic's `op.get_bind()`."""

    @property
    def connection(self) -> Any: ...
    def exec_driver_sql(self, statement: str, parameters: Any = None, execution_options: Any = None) -> Any: ...


class SqlAlchemyAsyncConnection(Protocol):
    """A SQLAlchemy `AsyncConnection` over psycopg."""

    async def run_sync(self, fn: Callable[[Any], Any]) -> Any: ...


class SetupOptions(TypedDict, total=False):
    """Who may call, and how long to wait.

    `grant_to` may use credits, `grant_admin_to` also give them and set terms, `grant_read_to` read the views of
    `ducto_read`. Roles once named keep these rights, new functions included, until `revoke_from`. `lock_timeout` bounds
    the wait for tables in use (default '5s'); after it the answer is an error, and trying again is safe.
    """

    grant_to: Roles
    grant_admin_to: Roles
    grant_read_to: Roles
    revoke_from: Roles
    lock_timeout: str


def setup(conn: psycopg.Connection[Any] | SqlAlchemyConnection | str, **options: Unpack[SetupOptions]) -> SetupResult:
    """Install or upgrade ducto_pg, all or nothing; where everything is as it should be, nothing is written.

    Runs in the transaction of `conn`, which it begins on an idle connection and leaves open: the caller commits. On an
    autocommit connection and for a DSN ('' takes libpq's PG… variables) it is a transaction of its own. May run from
    many processes at once: one installs, the others wait up to 60 seconds. The options are those of `SetupOptions`.

    A failure is in `.errors` (`.or_raise()` raises it), nothing is changed then and the connection stays usable.
    Raises TypeError for a `conn` or an option of another kind, InvalidArgumentError for a DSN that is none.
    """
    text = script(**options)
    if isinstance(conn, str):
        check_dsn(conn)
        try:
            with psycopg.connect(conn, autocommit=True) as own:
                return _run(own, text)
        except psycopg.Error as error:
            return SetupResult(errors=[_describe(error)])
    if not isinstance(conn, psycopg.Connection) and (not hasattr(conn, "exec_driver_sql") or hasattr(conn, "run_sync")):
        raise TypeError(f"setup() takes a psycopg connection, a SQLAlchemy connection or a DSN, not {type(conn)}")
    return _run(conn, text)


async def asetup(
    conn: psycopg.AsyncConnection[Any] | SqlAlchemyAsyncConnection | str, **options: Unpack[SetupOptions]
) -> SetupResult:
    """`setup()` on an async psycopg or SQLAlchemy connection, or a DSN."""
    text = script(**options)
    if isinstance(conn, str):
        check_dsn(conn)
        try:
            async with await psycopg.AsyncConnection.connect(conn, autocommit=True) as own:
                return await _arun(own, text)
        except psycopg.Error as error:
            return SetupResult(errors=[_describe(error)])
    if isinstance(conn, psycopg.AsyncConnection):
        return await _arun(conn, text)
    if hasattr(conn, "run_sync"):
        return cast(SetupResult, await conn.run_sync(lambda sync: _run(sync, text)))
    raise TypeError(f"asetup() takes an async psycopg or SQLAlchemy connection or a DSN, not {type(conn)}")


def check_dsn(dsn: str, name: str = "the DSN") -> None:
    """Raise InvalidArgumentError for what is no connection string, without repeating it: it may hold a password."""
    if re.match(r"postgres(ql)?\+", dsn):
        raise InvalidArgumentError(f"{name} has SQLAlchemy's form: write postgresql:// without +psycopg")
    try:
        parts = {key: str(value).split(",") for key, value in conninfo_to_dict(dsn).items()}
    except (psycopg.Error, UnicodeError):
        parts = {"port": ["none"]}
    # A password that is not percent-encoded is in part read as host or port, which errors tell.
    if any("@" in host[1:] for host in parts.get("host", [])) or not all(
        port.strip().isdecimal() or not port for port in parts.get("port", [])
    ):
        message = f"{name} is no connection string (postgresql://user@host/database)"
        raise InvalidArgumentError(message, hint="percent-encode what is special in a password")


def script(
    *,
    grant_to: Roles = (),
    grant_admin_to: Roles = (),
    grant_read_to: Roles = (),
    revoke_from: Roles = (),
    lock_timeout: str = "5s",
) -> str:
    """The whole of `setup()` as SQL: one statement, for psql or any migration tool, safe to run again."""
    if not isinstance(lock_timeout, str):
        raise TypeError(f"lock_timeout takes text such as '5s', not {lock_timeout!r}")
    if "\0" in lock_timeout:
        raise InvalidArgumentError(f"not a lock_timeout: {lock_timeout!r}")
    migrations = sqlfiles.read("migrations")
    shared = {
        "{{version}}": __version__,
        "{{usage_fields}}": table.as_json(),
        "{{known_counts}}": ",".join(fields.KNOWN_COUNTS),
        "{{part_limits}}": json.dumps({cached: fields.limits(cached) for cached in ("inside", "beside")}),
    }
    behaviour = [
        sqlfiles.SqlFile(file.name, reduce(lambda text, one: text.replace(*one), shared.items(), file.text))
        for file in sqlfiles.read("sql")
    ]
    checksums = {file.name: file.checksum for file in migrations}
    text = sqlfiles.template()
    contents = json.dumps([checksums, {file.name: file.checksum for file in behaviour}, text])
    values = {
        "release": __version__,
        "version": _literal(__version__),
        "contents": _literal(sha256(contents.encode()).hexdigest()),
        "checksums": _literal(json.dumps(checksums)),
        "lock_timeout": _literal(lock_timeout),
        "grant_to": _names(grant_to),
        "grant_admin_to": _names(grant_admin_to),
        "grant_read_to": _names(grant_read_to),
        "revoke_from": _names(revoke_from),
        "migrations": _files(migrations),
        "sql": _files(behaviour),
    }
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _literal(text: str) -> str:
    """`text` as a constant that reads the same under any setting, and inside any dollar quotes."""
    escaped = text.replace("\\", r"\\").replace("'", "''").replace("$", r"\x24")
    return f"E'{escaped}'"


def _names(roles: Roles) -> str:
    listed = [roles] if isinstance(roles, str) else list(roles) if isinstance(roles, Iterable) else [roles]
    for role in listed:
        if not isinstance(role, str):
            raise TypeError(f"roles are named by text or a list of texts, not {role!r}")
        if not exactjson.storable(role):
            raise InvalidArgumentError(f"not the name of a role: {role!r}")
    return f"array[{', '.join(map(_literal, listed))}]::text[]"


def _files(files: list[sqlfiles.SqlFile]) -> str:
    rows = ",\n".join(f"array[{_literal(file.name)}, $ducto_file$\n{file.text}$ducto_file$]" for file in files)
    return f"array[\n{rows}]"


_Steps = Generator[str, str | None, SetupResult]


def _steps(text: str, *, own_transaction: bool) -> _Steps:
    """The statements to run in order; takes their answers and errors, returns the report."""
    if own_transaction:
        begin, end, undo = "begin isolation level read committed read write", "commit", ["rollback"]
    else:
        begin, end = "savepoint ducto_setup", "release savepoint ducto_setup"
        undo = ["rollback to savepoint ducto_setup", end]
    try:
        yield begin
    except Exception as error:
        return SetupResult(errors=[_describe(error)])
    try:
        yield text
        report = yield "select pg_catalog.current_setting('ducto_pg.report')"
        yield end
    except BaseException as error:
        with suppress(Exception):
            yield from undo
        if not isinstance(error, Exception):
            raise
        return SetupResult(errors=[_describe(error)])
    return SetupResult.model_validate_json(report or "{}")


def _run(conn: psycopg.Connection[Any] | SqlAlchemyConnection, text: str) -> SetupResult:
    if not isinstance(conn, psycopg.Connection):
        dialect = getattr(conn, "dialect", None)
        if getattr(dialect, "name", "") != "postgresql" or not getattr(dialect, "driver", "").startswith("psycopg"):
            raise TypeError("setup() takes a SQLAlchemy connection to PostgreSQL over psycopg or psycopg2")
    steps = _steps(text, own_transaction=_begins_none(conn))
    statement = next(steps)
    try:
        while True:
            try:
                answer = _execute(conn, statement)
            except BaseException as error:
                statement = steps.throw(error)
            else:
                statement = steps.send(answer)
    except StopIteration as done:
        return cast(SetupResult, done.value)


async def _arun(conn: psycopg.AsyncConnection[Any], text: str) -> SetupResult:
    steps = _steps(text, own_transaction=_begins_none(conn))
    statement = next(steps)
    try:
        while True:
            try:
                async with psycopg.AsyncCursor(conn, row_factory=tuple_row) as cursor:
                    await cursor.execute(statement)
                    row = await cursor.fetchone() if cursor.description else None
            except BaseException as error:
                statement = steps.throw(error)
            else:
                statement = steps.send(row[0] if row else None)
    except StopIteration as done:
        return cast(SetupResult, done.value)


def _execute(conn: psycopg.Connection[Any] | SqlAlchemyConnection, statement: str) -> str | None:
    if isinstance(conn, psycopg.Connection):
        with psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else None
    else:
        # Without parameters the driver leaves the % signs of the text alone.
        result = conn.exec_driver_sql(statement, None, {"no_parameters": True})
        row = result.fetchone() if result.returns_rows else None
    return row[0] if row else None


def _begins_none(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any] | SqlAlchemyConnection) -> bool:
    """Whether a statement on this connection would be a transaction of its own."""
    if isinstance(conn, psycopg.Connection | psycopg.AsyncConnection):
        return conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE
    return bool(conn.connection.dbapi_connection.autocommit)


def _describe(error: Exception) -> str:
    """What the database said, in one line: message, detail and hint."""
    if isinstance(error, UnicodeEncodeError):
        return f"ducto_pg needs a database with encoding UTF8 and that client_encoding, not {error.encoding}"
    cause = getattr(error, "orig", None) or error
    diagnostics = getattr(cause, "diag", None)
    message = (
        getattr(diagnostics, "message_primary", None) or str(cause).split("[SQL:")[0].strip() or type(cause).__name__
    )
    extras = [getattr(diagnostics, f"message_{field}", None) for field in ("detail", "hint")]
    return "; ".join([message, *filter(None, extras)])
