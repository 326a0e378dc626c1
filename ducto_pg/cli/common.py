"""What the commands share: their parsers, the database they ask, the config they read."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from ducto_pg.client.manager import CreditManager
from ducto_pg.errors import ConfigError, DuctoError
from ducto_pg.install.setup import check_dsn
from ducto_pg.models import PricingConfigData

Command = Callable[[argparse.Namespace], int | None]

TIME = "an ISO 8601 time, in UTC if it has no offset"


def add_command(
    commands: Any, name: str, command: Command, *, dsn: bool = False, json: bool = False, doc: str | None = None
) -> argparse.ArgumentParser:
    """The parser of a command, whose docstring is its help."""
    doc = doc or command.__doc__ or ""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=doc.partition("\n")[0], description=doc)
    parser.set_defaults(command=command)
    if dsn:
        parser.add_argument(
            "--dsn",
            help="the database (default: DATABASE_URL, else PG* and the service file); others on this machine see what "
            "stands here, so keep passwords out of it",
        )
    if json:
        parser.add_argument("--json", action="store_true", help="answer in JSON, for programs")
    return parser


def read_time(text: str) -> datetime:
    """A time as the command line gives it."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no ISO 8601 time, such as 2026-01-31T12:00+01:00") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@contextmanager
def manager_of(arguments: argparse.Namespace) -> Iterator[CreditManager]:
    """Each call is a transaction of its own; what the database remarks goes to standard error."""

    def remark(notice: psycopg.errors.Diagnostic) -> None:
        print("ducto-pg:", "; ".join(filter(None, (notice.message_primary, notice.message_hint))), file=sys.stderr)

    given: str | None = arguments.dsn
    dsn = os.environ.get("DATABASE_URL", "") if given is None else given
    check_dsn(dsn, "DATABASE_URL" if given is None else "--dsn")
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.add_notice_handler(remark)
        yield CreditManager(conn)


def load_config(file: str) -> PricingConfigData:
    """The config in a file; - is standard input."""
    from ducto_pg.pricing.config import load

    try:
        if file == "-" and sys.stdin is None:
            raise DuctoError("standard input is closed")
        return load(sys.stdin.buffer.read() if file == "-" else Path(file))
    except ConfigError as error:
        raise DuctoError(f"{file}: {error}") from error
