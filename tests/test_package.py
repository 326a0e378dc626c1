"""What `import ducto_pg` offers."""

import ducto_pg


def test_what_the_package_offers_is_listed() -> None:
    offered = dir(ducto_pg)
    assert {"setup", "CreditManager", "PricingEngine", "UsageMetrics", "ReserveResult", "DuctoError"} <= set(offered)
    assert all(hasattr(ducto_pg, name) for name in offered)
