"""The core's back end in PL/pgSQL: a formula becomes one SQL expression over local variables.

Everything is numeric, parenthesised and schema-qualified; texts are `E'…'` constants. Order of evaluation is kept by
`case` alone: `and` and `or` promise none in SQL. A divisor that is not a literal passes through a stable function, so
that the planner cannot meet a division by zero while it folds constants of a branch that is never taken.
"""

from collections.abc import Mapping
from typing import assert_never

from ducto_pg.formula import (
    And,
    Arithmetic,
    Call,
    Choice,
    Comparison,
    Condition,
    Formula,
    ModelHas,
    ModelIs,
    Negative,
    NonZero,
    Not,
    Number,
    Or,
    Percentile,
    Round,
    Truth,
    Value,
    Variable,
)

_CALLS = {
    "min": "least",
    "max": "greatest",
    "abs": "pg_catalog.abs",
    "ceil": "pg_catalog.ceil",
    "floor": "pg_catalog.floor",
}
_QUOTED = str.maketrans({"\\": "\\\\", "'": "''", "\n": "\\n", "\r": "\\r", "\1": "\\001"})


def text(value: str) -> str:
    """A text constant that means the same under every setting of `standard_conforming_strings`."""
    return f"E'{value.translate(_QUOTED)}'"


def variable(name: str) -> str:
    """The local variable that holds a usage field."""
    return f"v_usage_{name}"


def expression(formula: Formula, where: str, inlined: Mapping[str, str] | None = None) -> str:
    """The formula over `v_usage_<name>` (numeric, never null) and `v_model` (text, '' when absent).

    `where` is the formula's path in the config, which a division by zero names; `inlined` has the expressions of the
    usage fields that stand in no variable.
    """
    return _Writer(text(where), inlined or {}).value(formula.tree)


def json_path(formula: Formula) -> str | None:
    """The formula as one path over a usage that has all its fields and only whole numbers; null where that fails.

    One call in the server, where `expression` is several for each operand. None where the formula has more
    than fields, numbers, and their sums, products and quotients.
    """
    try:
        return _path(formula.tree)
    except NotImplementedError:
        return None


def _path(node: Value) -> str:
    match node:
        case Number():
            return format(node.value, "f")
        case Variable():
            return f'$."{node.name}".floor()'
        case Negative():
            return f"(- {_path(node.operand)})"
        case Arithmetic(operator="+" | "-" | "*" | "/"):
            return f"({_path(node.left)} {node.operator} {_path(node.right)})"
    raise NotImplementedError


class _Writer:
    def __init__(self, where: str, inlined: Mapping[str, str]) -> None:
        self.where = where
        self.inlined = inlined

    def value(self, node: Value) -> str:
        match node:
            case Number():
                number = format(node.value, "f")
                return number if "." in number else f"{number}::numeric"
            case Variable():
                return self.inlined.get(node.name) or variable(node.name)
            case Negative():
                return f"(- {self.value(node.operand)})"
            case Arithmetic():
                return self.arithmetic(node)
            case Call():
                arguments = ", ".join(map(self.value, node.arguments))
                return f"{_CALLS[node.function]}({arguments})"
            case Round():
                return f"pg_catalog.round({self.value(node.operand)}, {node.digits})"
            case Percentile():
                values = ", ".join(map(self.value, node.values))
                return f"ducto_private.percentile({node.position:f}, array[{values}])"
            case Choice():
                then, otherwise = self.value(node.then), self.value(node.otherwise)
                return f"case when {self.condition(node.condition)} then {then} else {otherwise} end"
            case Truth():
                return f"case when {self.condition(node.condition)} then 1::numeric else 0::numeric end"
        assert_never(node)

    def arithmetic(self, node: Arithmetic) -> str:
        left, right = self.value(node.left), self.value(node.right)
        match node.operator:
            case "+" | "-" | "*":
                return f"({left} {node.operator} {right})"
            case "/":
                literal = isinstance(node.right, Number) and node.right.value
                return f"({left} / {right if literal else f'ducto_private.divisor({right}, {self.where})'})"
            case "//":
                return f"ducto_private.floor_divide({left}, {right}, {self.where})"
            case "%":
                return f"ducto_private.modulo({left}, {right}, {self.where})"
        assert_never(node.operator)

    def condition(self, node: Condition) -> str:
        match node:
            case Comparison():
                return f"({self.value(node.left)} {node.operator} {self.value(node.right)})"
            case And():
                return f"case when {self.condition(node.left)} then {self.condition(node.right)} else false end"
            case Or():
                return f"case when {self.condition(node.left)} then true else {self.condition(node.right)} end"
            case Not():
                return f"(not {self.condition(node.operand)})"
            case NonZero():
                return f"({self.value(node.operand)} <> 0)"
            case ModelIs():
                return f"(v_model = {text(node.text)})"
            case ModelHas():
                return f"(pg_catalog.strpos(v_model, {text(node.text)}) > 0)"
        assert_never(node)
