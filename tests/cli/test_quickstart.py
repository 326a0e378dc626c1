"""The demonstration: everything sound, its database refused where there is a ledger, its server kept when asked."""

import os
import re
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest

from ducto_pg import quickstart
from ducto_pg.cli import main
from ducto_pg.embedded import Server
from ducto_pg.pricing import config
from ducto_pg.pricing.engine import PricingEngine

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A short one."""
    lines = quickstart._example("trace.csv").read_text("utf-8").splitlines()
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines[:151]))
    return path


def test_a_short_trace_is_charged_to_the_last_digit(
    server: Server, server_conn: Connection, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dsn = server.dsn(server_conn.info.dbname)
    assert main(["quickstart", "--dsn", dsn, "--trace", str(trace)]) == 0
    table = dict(re.findall(r"^  (\S.*?) {2,}(\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert table["verify_ledger"] == "sound"
    for plan in ("free", "pro", "no"):
        ledger, engine = (
            table[f"exact cost {where}, {plan} plan"] for where in ("in the ledger", "by the offline engine")
        )
        assert ledger == engine
    assert Decimal(table["what the providers took, USD"]) > 0
    refusals = [int(table[f"refusals ({code})"]) for code in quickstart.EXPECTED]
    assert int(table["charges"]) + sum(refusals) == 150
    told = "accounts, teams, charges for a team, refusals (insufficient_credits), replays, refunds, credits: promotion"
    told += ", credits: expiry, credits paid by allowances"
    assert all(int(table[name].replace(",", "")) for name in told.split(", "))

    assert main(["quickstart", "--dsn", dsn, "--trace", str(trace)]) == 1
    assert capsys.readouterr().err == "ducto-pg: this database holds a ledger already: name one without\n"


def test_what_is_off_is_said_and_is_the_exit_code(
    server: Server,
    server_conn: Connection,
    trace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Wrong(PricingEngine):
        def calculate(self, metrics, plan_id=None):  # type: ignore[no-untyped-def]
            cost = super().calculate(metrics, plan_id)
            return cost.model_copy(update={"total": cost.total + Decimal("0.00000001")})

    monkeypatch.setattr(quickstart, "PricingEngine", Wrong)
    dsn = server.dsn(server_conn.info.dbname)
    assert main(["quickstart", "--dsn", dsn, "--trace", str(trace)]) == 1
    assert capsys.readouterr().err.startswith("ducto-pg: exact costs, ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no requests"),
        ("TIMESTAMP,ContextTokens\n2023,5\n", "line 2 has no whole numbers under ContextTokens and GeneratedTokens"),
        ("ContextTokens,GeneratedTokens\n1,2\n1,many\n", "line 3 has no whole numbers"),
        ("ContextTokens,GeneratedTokens\n-1,2\n", "line 2 has no whole numbers"),
    ],
)
def test_a_bad_trace_is_refused_before_anything_else(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    assert main(["quickstart", "--dsn", "host=/nowhere", "--trace", str(path)]) == 1
    assert said in capsys.readouterr().err


def test_a_kept_server_answers_until_it_is_killed(trace: Path) -> None:
    command = [sys.executable, "-m", "ducto_pg.cli", "quickstart", "--keep", "--trace", str(trace)]
    settings = {name: value for name, value in os.environ.items() if name != "DUCTO_PG_TEST_DSN"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    killed = re.search(r"kill -INT (\d+)", done.stdout)
    assert killed, done.stderr
    try:
        assert done.returncode == 0
        assert done.stdout.count('psql "$DATABASE_URL"') == 3
        pasted = re.search(r"^export DATABASE_URL='.*(?=^kill)", done.stdout, re.MULTILINE | re.DOTALL)
        assert pasted
        verify = 'psql "$DATABASE_URL" -Atc "select count(*) from ducto.verify_ledger()"'
        script = f"set -e\n{pasted[0]}{verify}"
        asked = subprocess.run(script, shell=True, check=True, capture_output=True, text=True, env=settings)
        assert asked.stdout.endswith("\n0\n")
    finally:
        os.kill(int(killed[1]), signal.SIGINT)


def test_without_a_dsn_its_database_is_gone_at_the_end(
    server: Server, trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DUCTO_PG_TEST_DSN", server.dsn())
    assert main(["quickstart", "--trace", str(trace)]) == 0
    with psycopg.connect(server.dsn()) as conn:
        databases = conn.execute("select datname from pg_database where datname like 'ducto_quickstart%'").fetchall()
    assert databases == []


def test_the_shipped_prices_are_sound() -> None:
    prices = config.load(quickstart._example("prices.yaml").read_bytes())
    engine = PricingEngine(prices)
    usage = {"input_tokens": 300_000, "cache_read_tokens": 100_000, "output_tokens": 1000}
    assert engine.calculate({"model": "claude-sonnet-4-5", **usage}).total == Decimal("1603.125")
    assert engine.calculate({"model": "gpt-5-2025-08-07", **usage}).total == Decimal("340.625")
