"""Random formulas and usages, and the answers of both back ends to many of them at once."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import psycopg

from ducto_pg import exactjson
from ducto_pg.errors import ExpressionError, FormulaError
from ducto_pg.formula.fields import KNOWN_COUNTS, limits
from ducto_pg.formula.generator import Function, compile_function
from ducto_pg.formula.language import Formula, parse
from ducto_pg.pricing.lookup import NO_MODEL

METRICS = ("pages", "audio_seconds")
DEFAULTS = {"pages": Decimal(0), "audio_seconds": Decimal("2.50")}
VARIABLES = tuple(dict.fromkeys((*KNOWN_COUNTS, *METRICS)))
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

    def told(self) -> dict[str, Any]:
        """A usage as it is given: what is absent has its default, and tool calls may be a list."""
        told: dict[str, Any] = {name: value for name, value in self.usage().items() if self.random.random() < 0.9}
        if self.random.random() < 0.9:
            told["model"] = self.model()
        if told.get("tool_calls", 4) <= 3:
            told["tool_calls"] = ["a"] * int(told["tool_calls"])
        return told

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


def fitting(usage: dict[str, Any]) -> dict[str, Any]:
    """The same usage with each part at most as large as what it is a part of."""
    fits = dict(usage)
    for parts, whole in limits("inside") * 2:
        *others, last = parts.split(" + ")
        if last in fits:
            fits[last] = min(fits[last], fits.get(whole, 0) - sum(fits.get(other, 0) for other in others))
    return fits


Usage = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A formula and the usages that it is evaluated for."""

    formula: Formula
    usages: Sequence[Usage]


def engine_answers(case: Case) -> list[str]:
    """The value for each usage as text, or the SQLSTATE that stands for the error."""
    answers = []
    for usage in case.usages:
        told = {"requests": Decimal(usage.get("model", "") not in NO_MODEL)}
        told |= {
            name: Decimal(len(value) if isinstance(value, list) else value)
            for name, value in usage.items()
            if name != "model"
        }
        try:
            answers.append(format(case.formula.evaluate(DEFAULTS | told, usage.get("model", ""), "x"), "f"))
        except FormulaError:
            answers.append("22012")
    return answers


def database_answers(connection: psycopg.Connection[Any], cases: Sequence[Case]) -> list[list[str]]:
    """The same from the functions that the formulas compile to."""
    compiled = [compile_function(case.formula.tree, DEFAULTS) for case in cases]
    return function_answers(connection, compiled, [case.usages for case in cases])


def function_answers(
    connection: psycopg.Connection[Any], compiled: Sequence[Function], usages: Sequence[Sequence[Usage]]
) -> list[list[str]]:
    """What each function gives for its usages, called by name with its rates: two statements."""
    connection.execute((_ANSWER + "".join({function.id: _create(function) for function in compiled}.values())).encode())
    rows = connection.execute(
        """
        select pg_temp.answers(c.function, c.usages, c.rates)
        from unnest(%s::text[], %s::jsonb[], %s::text[]) with ordinality as c (function, usages, rates, place)
        order by c.place
        """,
        [
            [function.name for function in compiled],
            [exactjson.dumps(list(each)) for each in usages],
            ["{" + ",".join(f"{rate:f}" for rate in function.rates) + "}" for function in compiled],
        ],
    )
    return [row[0] for row in rows]


def _create(function: Function) -> str:
    return (
        f"create or replace function ducto_private.{function.name}(p_usage jsonb, p_rates numeric[]) returns numeric"
        f" language plpgsql immutable set search_path = pg_catalog, pg_temp as $body${function.body}$body$;\n"
    )


_ANSWER = """
create or replace function pg_temp.answers(p_function text, p_usages jsonb, p_rates text) returns text[]
language plpgsql as $body$
declare
  v_answers text[];
  v_usage jsonb;
  v_answer text;
begin
  for v_usage in select * from jsonb_array_elements(p_usages) loop
    begin
      execute format('select ducto_private.%I($1, $2)', p_function) into v_answer using v_usage, p_rates::numeric[];
    exception when others then
      v_answer := sqlstate;
    end;
    v_answers := v_answers || v_answer;
  end loop;
  return v_answers;
end
$body$;
"""


@dataclass
class Comparison:
    """What a run of `compare` has seen: answers, those that were errors, the most decimals, and where they differ."""

    count: int = 0
    errors: int = 0
    decimals: int = 0
    mismatches: int = 0
    first: str = ""


def compare(connection: psycopg.Connection[Any], *, seed: int, count: int, usages: int = 25) -> Comparison:
    """Random formulas, each for so many random usages, until `count` answers of both back ends were compared.

    Each hundred formulas have a session of their own, since a session looks at all that it has compiled whenever a
    function is made.
    """
    seen = Comparison()
    for cases in _cases(Formulas(seed), count, usages):
        with psycopg.connect(connection.info.dsn, password=connection.info.password, autocommit=True) as session:
            answers = database_answers(session, cases)
        for case, theirs in zip(cases, answers, strict=True):
            for usage, mine, their in zip(case.usages, engine_answers(case), theirs, strict=True):
                seen.count += 1
                seen.errors += mine == "22012"
                seen.decimals = max(seen.decimals, len(mine.partition(".")[2]))
                if mine != their:
                    seen.mismatches += 1
                    seen.first = seen.first or f"{case.formula.text} for {usage}: {mine} in Python, {their} in SQL"
    return seen


def _cases(source: Formulas, count: int, usages: int) -> Iterator[list[Case]]:
    while count > 0:
        size = min(100, -(-count // usages))
        yield [Case(parse(source.formula(), METRICS), [source.told() for _ in range(usages)]) for _ in range(size)]
        count -= size * usages
