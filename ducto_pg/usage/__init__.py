"""From what a provider returned to the counts that are charged: `read`, the same as `ducto.read_usage` in SQL."""

from ducto_pg.usage.reading import read, read_body

__all__ = ["read", "read_body"]
