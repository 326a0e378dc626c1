"""The command `ducto-pg`: results on standard output, problems in one line on standard error.

Exit code 0: done; 1: failed, or `verify` found something; 2: misused. Commands that need a database take it from
`--dsn`, else `DATABASE_URL`, else PostgreSQL's own `PG*` variables and service file. A pricing config is read from a
file, JSON or YAML, or with `-` from standard input.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

import psycopg

from ducto_pg import __version__
from ducto_pg.cli import accounts, pricing, setup
from ducto_pg.cli.common import Command
from ducto_pg.embedded import ServerError
from ducto_pg.errors import DuctoError, NotInstalledError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code: 0 done, 1 failed, 2 misused."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        if sys.stdout is None:
            raise DuctoError("standard output is closed")
        code = command(arguments)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        # Whoever read has read enough; the interpreter must not try to write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (DuctoError, ServerError, psycopg.Error, OSError, UnicodeError) as error:
        hint = ""
        if isinstance(error, psycopg.OperationalError) and not error.sqlstate and command is not setup.quickstart:
            named = arguments.dsn is not None or os.environ.get("DATABASE_URL")
            hint = "" if named else "; DATABASE_URL is not set: set it, or give --dsn"
        elif isinstance(error, psycopg.errors.InsufficientPrivilege) and command in pricing.OWNERS_ONLY:
            hint = "; only the role that installed publishes"
        elif isinstance(error, psycopg.errors.InsufficientPrivilege) and command is not setup.setup_database:
            hint = "; the call needs a role of `ducto-pg setup --grant-admin-to`, or for charging --grant-to"
        print(f"ducto-pg: {_describe(error)}{hint}", file=sys.stderr)
        return 1


def _describe(error: Exception) -> str:
    """One line."""
    if isinstance(error, NotInstalledError):
        return "this database does not have ducto_pg, or an older one: name another, or run ducto-pg setup"
    text = str(error)
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        text = "\n".join(filter(None, (error.diag.message_primary, error.diag.message_detail, error.diag.message_hint)))
    elif isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return "; ".join(filter(None, map(str.strip, text.splitlines()))) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ducto-pg", description="Credits inside your own PostgreSQL.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    setup.add(commands)
    groups = accounts.add(commands)
    pricing.add(groups["pricing"])
    return parser
