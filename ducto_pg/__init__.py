"""Credits for AI features inside your own PostgreSQL: prices, holds, charges and refunds as atomic SQL functions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ducto_pg.client.manager import AsyncCreditManager as AsyncCreditManager
    from ducto_pg.client.manager import CreditManager as CreditManager
    from ducto_pg.errors import *  # noqa: F403
    from ducto_pg.install.setup import asetup as asetup
    from ducto_pg.install.setup import script as script
    from ducto_pg.install.setup import setup as setup
    from ducto_pg.models import *  # noqa: F403
    from ducto_pg.pricing.engine import PricingEngine as PricingEngine

__version__ = "0.1.0"

_HOMES = {
    "setup": "install.setup",
    "asetup": "install.setup",
    "script": "install.setup",
    "PricingEngine": "pricing.engine",
    "CreditManager": "client.manager",
    "AsyncCreditManager": "client.manager",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_offered()})


def _offered() -> list[str]:
    homes = [import_module(f"ducto_pg.{home}") for home in ("models", "errors")]
    found = (name for home in homes for name, value in vars(home).items() if _is_of(home.__name__, value))
    return sorted({*_HOMES, *(name for name in found if not name.startswith("_"))})


def _is_of(home: str, value: object) -> bool:
    return getattr(value, "__module__", None) == home


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is asked for: `import ducto_pg` loads none of it."""
    if name == "__all__":
        return _offered()
    for home in [_HOMES[name]] if name in _HOMES else ["models", "errors"]:
        value = getattr(import_module(f"ducto_pg.{home}"), name, None)
        if _is_of(f"ducto_pg.{home}", value):
            globals()[name] = value
            return value
    raise AttributeError(f"module 'ducto_pg' has no attribute {name!r}")
