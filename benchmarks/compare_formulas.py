"""The two back ends of the formula language against each other: random formulas for random usages.

    .venv/bin/python benchmarks/compare_formulas.py --count 1000000 --seed 1

Each answer of the offline engine is compared with that of the function that the formula compiles to, called by name
with its rates: the number's text, to the last decimal, or the error. The exit code is 1 where one differs. The tests do
the same with 10,000 answers.
"""

import argparse
import sys
import time
from pathlib import Path

import psycopg

import ducto_pg
from ducto_pg import servers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from formulas import compare


def main() -> int:
    """Compare, say what was seen, and answer the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="how many answers (1,000,000)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other formulas and usages (1)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with servers.open_server({"fsync": "off"}) as server:
        ducto_pg.setup(server.dsn()).or_raise()
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            seen = compare(connection, seed=arguments.seed, count=arguments.count)
    print(f"seed {arguments.seed}: {seen.count} answers in {time.perf_counter() - started:.0f} s")
    print(f"{seen.errors} divisions by zero, up to {seen.decimals} decimals, {seen.mismatches} mismatches")
    if seen.first:
        print(f"the first: {seen.first}")
    return 1 if seen.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
