"""The examples of `examples/drivers/`: one small scenario, the same from every driver, told in the same words."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from program_helpers import environment, npm_packages

from ducto_pg import CreditManager
from ducto_pg.embedded import Server

Connection = psycopg.Connection[Any]

ROOT = Path(__file__).parent.parent
DRIVERS = ROOT / "examples" / "drivers"
SAID = """\
added 1000, balance 1000
held 54
charged 6 for 6.25000000, balance 994
refused: insufficient_credits
balance {}, reserved 0
refunded 6, balance 1000
"""


@pytest.fixture
def priced(conn: Connection) -> str:
    """The DSN of a database with the prices that the examples charge by."""
    CreditManager(conn).publish_pricing(ROOT / "examples" / "prices.yaml")
    return conn.info.dsn


def run(dsn: str, *command: str | Path, folder: Path = DRIVERS) -> str:
    """What a command prints, with this database in the PG… variables."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(dsn, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(dsn: str, *command: str | Path, folder: Path = DRIVERS) -> None:
    """The scenario is told, and told again when it is run again: but for the balance, and nothing is written."""
    user = "O'Brien:ü%s"
    assert run(dsn, *(str(part).format(user=user) for part in command), folder=folder) == SAID.format(994)
    assert run(dsn, *(str(part).format(user=user) for part in command), folder=folder) == SAID.format(1000)
    with CreditManager(dsn) as credits:
        assert [row.type for row in credits.list_transactions(user)] == ["refund", "usage", "purchase"]
        assert credits.verify_ledger() == []


def test_psql(priced: str, server: Server) -> None:
    folders = [str(server.bindir or ""), os.environ.get("PATH", "")]
    psql = shutil.which("psql", path=os.pathsep.join(folders))
    if not psql:
        pytest.skip("needs psql")
    first = (DRIVERS / "psql.sql").read_text().splitlines()[0]
    options = [option for option in first.split() if option.startswith("--") and len(option) > 2]
    check(priced, psql, *(option.replace("user-1", "{user}") for option in options))


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_python(priced: str, driver: str) -> None:
    pytest.importorskip(driver)
    check(priced, sys.executable, f"{driver}_charge.py", "{user}")


def test_node(priced: str, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(npm_packages(DRIVERS))
    shutil.copy(DRIVERS / "node_postgres.mjs", tmp_path)
    check(priced, "node", "node_postgres.mjs", "{user}", folder=tmp_path)


def test_sqlalchemy_and_alembic(server_conn: Connection) -> None:
    pytest.importorskip("alembic")
    dsn = server_conn.info.dsn
    run(dsn, sys.executable, "-m", "alembic", "-c", "with_alembic/alembic.ini", "upgrade", "head")
    check(dsn, sys.executable, "sqlalchemy_charge.py", "{user}")


def test_django(server_conn: Connection) -> None:
    pytest.importorskip("django")
    dsn, folder = server_conn.info.dsn, DRIVERS / "with_django"
    run(dsn, sys.executable, "manage.py", "migrate", folder=folder)
    check(dsn, sys.executable, "manage.py", "charge", "{user}", folder=folder)


@pytest.mark.parametrize("page", ["any_language.md", "migrations.md"])
def test_the_pages_show_what_the_examples_do(page: str) -> None:
    """A block that names a file is a part of it."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    shown = re.findall(r"^```\w+ (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown
    for name, part in shown:
        lines = [line.strip() for line in (ROOT / name).read_text("utf-8").splitlines()]
        wanted = [line.strip() for line in part.splitlines() if line.strip() not in ("", "…")]
        assert [line for line in wanted if line not in lines] == [], name
