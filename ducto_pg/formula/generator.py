"""The formulas' back end in SQL: a checked tree becomes the body of a PL/pgSQL function of a usage and rates.

Everything is numeric and in parentheses of its own; texts are `E'…'` constants. Order of evaluation is kept by `case`
alone: `and` and `or` promise none in SQL. The numbers that a formula's text names are not in the body but in `p_rates`,
so that formulas of one shape share a function, and so that the planner has no constants to divide before their time.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import reduce
from typing import Any, ClassVar, NamedTuple

from sqlglot import exp
from sqlglot.generator import Generator

from ducto_pg.formula.arithmetic import CHAINED, COMPARISONS, OPERATORS, spine, trim_scale
from ducto_pg.formula.signs import signs

_CALL_COUNT = (
    "case jsonb_typeof(p_usage -> 'tool_calls') when 'array'"
    " then jsonb_array_length(p_usage -> 'tool_calls')::numeric"
    " else coalesce(trim_scale((p_usage -> 'tool_calls')::numeric), 0) end"
)
_ONE_WITH_MODEL = "case when p_usage ->> 'model' in ('', 'none') is false then 1 else 0 end"
_FUNCTIONS = {"min": "least", "max": "greatest"}
_SIGNS: Mapping[type[exp.Expr], str] = {
    exp.Add: "+",
    exp.Sub: "-",
    exp.Mul: "*",
    exp.Div: "/",
    exp.LT: "<",
    exp.LTE: "<=",
    exp.GT: ">",
    exp.GTE: ">=",
    exp.EQ: "=",
    exp.NEQ: "<>",
}
_WHOLE: Mapping[type[exp.Expr], tuple[str, str]] = {
    exp.IntDiv: ("div", "ducto_private.floor_divide"),
    exp.Mod: ("mod", "ducto_private.modulo"),
}
_QUOTED = str.maketrans({"\\": "\\\\", "'": "''", "\n": "\\n", "\r": "\\r", "\1": "\\001"})


class Function(NamedTuple):
    """`ducto_private.formula_<id>(p_usage jsonb, p_rates numeric[]) returns numeric`, and the rates of one price.

    The id is the first 8 bytes of the body's SHA-256 as a bigint; in the function's name it has 16 hex digits.
    """

    id: int
    body: str
    rates: tuple[Decimal, ...]

    @property
    def name(self) -> str:
        """The function's name in the schema `ducto_private`."""
        return f"formula_{self.id & (2**64 - 1):016x}"


def compile_function(tree: exp.Expr, defaults: Mapping[str, Decimal] | None = None) -> Function:
    """A checked tree as SQL. `defaults` are those of the config's metrics; a field without one is 0 when absent, and
    `requests` 1 where a model is named."""
    writer = _Writer([tree], defaults or {})
    return writer.function(writer.sql(tree))


def compile_sum(
    priced: Sequence[exp.Expr], saved: Sequence[exp.Expr], defaults: Mapping[str, Decimal] | None = None
) -> Function:
    """The sum of checked trees as SQL; null where one of `priced` is below 0, which those of `saved` may be."""
    writer = _Writer([*priced, *saved], defaults or {})
    terms = [writer.sql(tree) for tree in priced]
    for place, tree in enumerate(priced):
        if -1 in signs(tree):
            terms[place] = writer.declare(f"v_part_{place + 1}", terms[place])
    guards = " and ".join(f"{term} >= 0" for term in terms if term.startswith("v_part_"))
    total = " + ".join([*terms, *map(writer.sql, saved)])
    return writer.function(f"case when {guards} then {total} end" if guards else total)


def text(value: str) -> str:
    """A text constant that means the same under every setting of `standard_conforming_strings`."""
    return f"E'{value.translate(_QUOTED)}'"


class _Writer(Generator):
    """Writes the trees of one function. What they name more than once is declared, their texts' numbers are `rates`."""

    def __init__(self, trees: Sequence[exp.Expr], defaults: Mapping[str, Decimal]) -> None:
        super().__init__(comments=False)
        self.rates: list[Decimal] = []
        self.defaults = defaults
        self.lifted: dict[int, str] = {}
        self.declared: list[str] = []
        uses = Counter(node.name for tree in trees for node in tree.dfs() if isinstance(node, exp.Var))
        self.variables = {
            name: self.declare(f"v_{name}", self.read(name), "text" if name == "model" else "numeric")
            for name, count in sorted(uses.items())
            if count > 1
        }

    def declare(self, name: str, value: str, kind: str = "numeric") -> str:
        """Evaluate a value once, under this name."""
        self.declared.append(f"  {name} constant {kind} := {value};")
        return name

    def function(self, result: str) -> Function:
        """The function that returns this value."""
        declare = ["declare", *self.declared] if self.declared else []
        body = "\n".join([*declare, "begin", f"  return {result};", "end"])
        digest = hashlib.sha256(body.encode()).digest()
        return Function(int.from_bytes(digest[:8], "big", signed=True), body, tuple(self.rates))

    def rate(self, value: Decimal) -> str:
        self.rates.append(value)
        return f"p_rates[{len(self.rates)}]"

    def read(self, name: str) -> str:
        """A usage field; absent, its default."""
        if name == "model":
            return "coalesce(p_usage ->> 'model', '')"
        if name == "tool_calls":
            return _CALL_COUNT
        default = _ONE_WITH_MODEL if name == "requests" and name not in self.defaults else "0"
        if value := trim_scale(self.defaults.get(name, Decimal(0))):
            default = self.rate(value)
        return f"coalesce(trim_scale((p_usage -> '{name}')::numeric), {default})"

    def _variable(self, node: exp.Expr) -> str:
        return self.variables.get(node.name) or self.read(node.name)

    def _literal(self, node: exp.Expr) -> str:
        return text(node.name) if node.is_string else f"{node.name}::numeric"

    def _parameter(self, node: exp.Expr) -> str:
        """Sugar that copies an operand shares its nodes: they stay one rate."""
        if id(node) not in self.lifted:
            self.lifted[id(node)] = self.rate(Decimal(node.this.name))
        return self.lifted[id(node)]

    def _chain(self, node: exp.Expr) -> str:
        first, links = spine(node, CHAINED)
        return reduce(self._operation, links, self.sql(first))

    def _operation(self, left: str, node: exp.Expr) -> str:
        right = self.sql(node.expression)
        if type(node) in _SIGNS:
            return f"({left} {_SIGNS[type(node)]} {right})"
        plain, floored = _WHOLE[type(node)]
        function = floored if -1 in signs(node.this) | signs(node.expression) else plain
        return f"{function}({left}, {right})"

    def _connective(self, node: exp.Expr) -> str:
        pattern = (
            "case when {} then true else {} end" if isinstance(node, exp.Or) else "case when {} then {} else false end"
        )
        first, links = spine(node, (type(node),))
        return reduce(lambda left, link: pattern.format(left, self.sql(link.expression)), links, self.sql(first))

    def _comparison(self, node: exp.Expr) -> str:
        return f"({self.sql(node.this)} {_SIGNS[type(node)]} {self.sql(node.expression)})"

    def _call(self, node: exp.Expr) -> str:
        if node.name == "round":
            operand, digits = node.expressions
            return f"round({self.sql(operand)}, {digits.name})"
        if node.name == "percentile":
            position, *values = node.expressions
            return f"ducto_private.percentile({position.name}, array[{', '.join(map(self.sql, values))}])"
        return f"{_FUNCTIONS.get(node.name, node.name)}({', '.join(map(self.sql, node.expressions))})"

    def _case(self, node: exp.Expr) -> str:
        branches = " ".join(
            f"when {self.sql(branch.this)} then {self.sql(branch.args['true'])}" for branch in node.args["ifs"]
        )
        return f"case {branches} else {self.sql(node.args['default'])} end"

    TRANSFORMS: ClassVar[dict[type[exp.Expr], Callable[[Any, Any], str]]] = {
        exp.Literal: _literal,
        exp.Parameter: _parameter,
        exp.Var: _variable,
        exp.Neg: lambda self, node: f"(- {self.sql(node.this)})",
        **dict.fromkeys(OPERATORS, _chain),
        exp.Anonymous: _call,
        exp.Case: _case,
        **dict.fromkeys(COMPARISONS, _comparison),
        exp.Contains: lambda self, node: f"(strpos({self.sql(node.this)}, {self.sql(node.expression)}) > 0)",
        exp.And: _connective,
        exp.Or: _connective,
        exp.Not: lambda self, node: f"(not {self.sql(node.this)})",
    }
