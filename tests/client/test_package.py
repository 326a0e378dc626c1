"""What `import ducto_pg` offers, and what it loads for it."""

import subprocess
import sys

import ducto_pg
from ducto_pg import PricingEngine, errors, models


def loaded_by(*lines: str) -> set[str]:
    """The modules that a process has loaded after these lines."""
    text = "\n".join((*lines, "import sys", "print(*sys.modules)"))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_all_lists_what_is_offered() -> None:
    offered: list[str] = ducto_pg.__all__
    assert {"setup", "CreditManager", "PricingEngine", "UnavailableError", "DeductionResult"} <= set(offered)
    assert offered == sorted(set(offered))
    assert all(getattr(ducto_pg, name) is not None for name in offered)
    for home in (models, errors):
        classes = {name for name, value in vars(home).items() if getattr(value, "__module__", "") == home.__name__}
        assert {name for name in classes if not name.startswith("_")} <= set(offered)
    names: dict[str, object] = {}
    exec("from ducto_pg import *", names)
    assert set(offered) == set(names) - {"__builtins__"}


def test_nothing_heavy_is_loaded_before_it_is_asked_for() -> None:
    heavy = {"sqlglot", "yaml", "psycopg", "pydantic"}
    assert not loaded_by("import ducto_pg") & heavy
    assert loaded_by("import ducto_pg", "ducto_pg.__all__") & heavy == {"pydantic"}
    assert loaded_by("from ducto_pg import CreditManager") & heavy == {"psycopg", "pydantic"}


def test_calls_need_no_manager() -> None:
    loaded = loaded_by("from ducto_pg.client.calls import Calls", "Calls.deduct.bind('alice', {})")
    assert not loaded & {"ducto_pg.client.manager", "psycopg"}


def test_the_engine_takes_a_plain_dict() -> None:
    config = {"models": {"m": "input_tokens * 2"}}
    assert PricingEngine(config).calculate({"model": "m", "input_tokens": 3}).total == 6
    assert PricingEngine(models.PricingConfigData.model_validate(config)).has_model("m")
