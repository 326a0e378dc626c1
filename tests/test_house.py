"""The house rules that tools can check."""

import subprocess
import sys

import pytest
from places import ROOT

import ducto_pg


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["ruff check --no-cache .", "ruff format --check --no-cache .", "mypy --cache-dir=/dev/null"],
)
def test_checked(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_package_offers_is_listed() -> None:
    offered = dir(ducto_pg)
    assert {"setup", "CreditManager", "PricingEngine", "UsageMetrics", "ReserveResult", "DuctoError"} <= set(offered)
    assert all(hasattr(ducto_pg, name) for name in offered)
