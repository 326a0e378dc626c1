"""Random formulas and usages, and the database's answer to many of them at once."""

import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import psycopg

from ducto_pg import plpgsql
from ducto_pg.errors import ExpressionError
from ducto_pg.formula import Formula
from ducto_pg.language import KNOWN_VARIABLES, parse

METRICS = ("images", "audio_seconds")
VARIABLES = (*KNOWN_VARIABLES, *METRICS)
MODELS = ("", "gpt-4", "gpt-4-0613", "claude'x", "back\\slash", "naïve/модель")
CONSTANTS = (
    "0",
    "1",
    "2",
    "3",
    "7",
    "10",
    "1000",
    "1_000_000",
    "0.5",
    ".25",
    "5.",
    "0.001",
    "1e-6",
    "2.50",
    "1e29",
    "0.00",
)


class Formulas:
    """A source of random texts in the language, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def formula(self) -> str:
        """One formula; some are long products that are then divided. Those beyond the limits are passed over."""
        while True:
            text = f"{self.value(self.random.randint(1, 5))} + {self.variable()} * {self.constant()}"
            text = self.product() if self.random.random() < 0.04 else text
            try:
                parse(text, METRICS)
            except ExpressionError as error:
                if "more than 400" not in error.message and "nested powers" not in error.message:
                    raise
            else:
                return text

    def product(self) -> str:
        """Dozens of factors of dozens of digits, divided: the scale of a quotient ends at 1,000."""
        factors = [self.variable(), *(self.long_constant(30) for _ in range(self.random.randint(10, 54)))]
        split = self.random.randint(1, len(factors) - 1)
        return f"{' * '.join(factors[:split])} / ({' * '.join(factors[split:])} * {self.variable()})"

    def usage(self) -> dict[str, Decimal]:
        """A value for each variable, zero and equal ones often."""
        return {name: self.quantity(name) for name in VARIABLES}

    def quantity(self, name: str) -> Decimal:
        whole = self.random.choice([0, 0, 1, 2, 3, 10, 999, 1000, 1001, self.random.randrange(10**6), 10**15 - 1])
        decimals = self.random.choice([0, 1, 6, 12]) if name in METRICS else 0
        return Decimal(whole) + Decimal(self.random.randrange(10**decimals)).scaleb(-decimals)

    def model(self) -> str:
        return self.random.choice(MODELS)

    def variable(self) -> str:
        return self.random.choice(VARIABLES)

    def constant(self) -> str:
        if self.random.random() < 0.3:
            return self.long_constant()
        return self.random.choice(CONSTANTS)

    def long_constant(self, decimals: int | None = None) -> str:
        decimals = decimals or self.random.randint(1, 30)
        whole = self.random.randrange(1, 10 ** self.random.randint(1, 3))
        return f"{whole}.{self.random.randrange(10**decimals):0{decimals}}"

    def value(self, depth: int) -> str:
        """A number in parentheses where it needs them."""
        if depth <= 0:
            return self.random.choice([self.variable, self.variable, self.constant])()
        inner = [self.value(depth - 1 - self.random.randrange(2)) for _ in range(4)]
        condition = self.condition(depth - 1)
        low, high = sorted(self.random.sample(range(1, 5000), 2))
        shape = self.random.choice(
            [
                *["({0} + {1})", "({0} - {1})", "({0} * {1})", "({0} / {1})", "({0} // {1})", "({0} % {1})"] * 3,
                "(-{0})",
                "(+{0} - -{1})",
                "({0} if {c} else {1})",
                "if({c}, {0}, {1})",
                "case when {c} then {0} when {d} then {1} else {2} end",
                "({c})",
                "min({0}, {1}, {2})",
                "max({0}, {1})",
                "abs({0})",
                "ceil({0})",
                "floor({0})",
                "round({0})",
                "round({0}, {n})",
                "clamp({0}, {1}, {2})",
                "percentile({p}, {0}, {1}, {2}, {3})",
                "tier({0}, {low}, {1}, {high}, {2}, {3})",
                "tier({0}, {1}, {2}, {3})",
                "graduated({0}, {low}, {1}, {high}, 0.5, {2})",
                "graduated({v}, {w}, 2, {low}, 1.5, 0.25)",
                "({0} ** {e})",
                "(({v} ** 2 * {k}) ** 3)",
                "(True * {0} + False)",
            ]
        )
        return shape.format(
            *inner,
            c=condition,
            d=self.condition(0),
            n=self.random.randint(-15, 15),
            p=self.random.choice(["0", "25", "50", "33.3", "99.9", "100"]),
            e=self.random.randint(0, 3),
            v=self.variable(),
            w=self.variable(),
            k=self.constant(),
            low=low,
            high=high,
        )

    def condition(self, depth: int) -> str:
        """Something true or false, or a number that is taken for it."""
        first, second = self.value(max(depth - 1, 0)), self.value(0)
        comparison = f"{first} {self.random.choice(['<', '<=', '>', '>=', '==', '=', '!=', '<>'])} {second}"
        if depth <= 0:
            return comparison
        return self.random.choice(
            [
                comparison,
                f"0 < {first} <= {second}",
                f"({comparison}) and {self.condition(depth - 1)}",
                f"({comparison}) or {self.condition(depth - 1)}",
                f"not {comparison}",
                first,
                "'gpt-4' in model",
                "'back\\slash' not in model",
                "model == 'gpt-4'",
                "'naïve/модель' != model",
            ]
        )


Case = tuple[Formula, Mapping[str, Decimal], str]


def database_answers(connection: psycopg.Connection[Any], cases: Sequence[Case]) -> list[str]:
    """For each formula, usage and model what the compiled formula answers: the number as text, or the SQLSTATE and
    message. One statement."""
    declared = "".join(f"  {plpgsql.variable(name)} numeric;\n" for name in VARIABLES)
    steps = []
    for number, (formula, usage, model) in enumerate(cases):
        given = "".join(
            f"  {plpgsql.variable(name)} := pg_catalog.trim_scale({usage[name]:f});\n"
            for name in sorted(formula.variables)
        )
        steps.append(
            f"{given}  v_model := {plpgsql.text(model)};\n"
            f"  begin\n    return next {plpgsql.expression(formula, f'case {number}')}::text;\n"
            "  exception when others then return next sqlstate || ' ' || sqlerrm;\n  end;\n"
        )
    body = f"declare\n{declared}  v_model text;\nbegin\n{''.join(steps)}end"
    connection.execute(
        "create or replace function pg_temp.answers() returns setof text language plpgsql stable as $body$"
        + body
        + "$body$"
    )
    return [row[0] for row in connection.execute("select pg_temp.answers()").fetchall()]
