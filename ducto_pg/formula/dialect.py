"""The formula language as a sqlglot dialect: text -> sqlglot tree.

Tables say what there is; methods only what SQL does not have: Python's precedence, chained comparisons, conditionals.
Nothing of SQL's own grammar can be reached from `_parse_statement`.
"""

import re
from collections.abc import Callable
from typing import ClassVar, NoReturn, cast

from sqlglot import Token, Tokenizer, TokenType, exp
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import TokenError
from sqlglot.parser import Parser
from sqlglot.tokens import SQLGLOTC_INSTALLED

from ducto_pg.errors import ExpressionError

if SQLGLOTC_INSTALLED:
    raise ImportError("sqlglot's compiled build (sqlglotc, sqlglot[c]) takes no dialects: pip uninstall sqlglotc")

MAX_DEPTH = 50

WORDS = {
    "and": TokenType.AND,
    "or": TokenType.OR,
    "not": TokenType.NOT,
    "in": TokenType.IN,
    "if": TokenType.COMMAND,
    "else": TokenType.ELSE,
    "case": TokenType.CASE,
    "when": TokenType.WHEN,
    "then": TokenType.THEN,
    "end": TokenType.END,
    "True": TokenType.TRUE,
    "False": TokenType.FALSE,
}
IF = WORDS["if"]
SYMBOLS = {
    "+": TokenType.PLUS,
    "-": TokenType.DASH,
    "*": TokenType.STAR,
    "/": TokenType.SLASH,
    "%": TokenType.MOD,
    "<": TokenType.LT,
    ">": TokenType.GT,
    "=": TokenType.EQ,
    "(": TokenType.L_PAREN,
    ")": TokenType.R_PAREN,
    ",": TokenType.COMMA,
    ".": TokenType.DOT,
}
PAIRS = {
    "//": TokenType.DIV,
    "**": TokenType.DSTAR,
    "<=": TokenType.LTE,
    ">=": TokenType.GTE,
    "==": TokenType.EQ,
    "!=": TokenType.NEQ,
    "<>": TokenType.NEQ,
}
COMPARISONS = {
    TokenType.LT: "<",
    TokenType.LTE: "<=",
    TokenType.GT: ">",
    TokenType.GTE: ">=",
    TokenType.EQ: "=",
    TokenType.NEQ: "<>",
}
NOT_OURS = dict.fromkeys("'\"`!#$&:;?@[\\]^{|}~", TokenType.UNKNOWN)


class Comparisons(exp.Expression):
    """`a < b <= c`: operands and the operators between them."""

    arg_types: ClassVar[dict[str, bool]] = {"expressions": True, "operators": True}


class _Tokenizer(Tokenizer):
    SINGLE_TOKENS = NOT_OURS | SYMBOLS
    KEYWORDS = PAIRS | {word.upper(): token for word, token in WORDS.items()}
    QUOTES: ClassVar = ["'"]
    STRING_ESCAPES: ClassVar = ["'"]
    COMMENTS: ClassVar = []
    COMMANDS: ClassVar = set()
    NUMERIC_LITERALS: ClassVar = {}


class _Parser(Parser):
    DISJUNCTION: ClassVar = {TokenType.OR: exp.Or}
    CONJUNCTION: ClassVar = {TokenType.AND: exp.And}
    TERM: ClassVar = {TokenType.PLUS: exp.Add, TokenType.DASH: exp.Sub}
    FACTOR: ClassVar = {
        TokenType.STAR: exp.Mul,
        TokenType.SLASH: exp.Div,
        TokenType.DIV: exp.IntDiv,
        TokenType.MOD: exp.Mod,
    }
    EXPONENT: ClassVar = {TokenType.DSTAR: exp.Pow}

    depth: int = 0

    def raise_error(self, message: str, token: Token | None = None) -> NoReturn:
        token = token or self._curr
        raise ExpressionError(message, position=token.start if token else len(self.sql))

    def _unexpected(self) -> NoReturn:
        found = self._find_sql(self._curr, self._curr)[:20] if self._curr else None
        self.raise_error(f"unexpected {found!a}" if found else "the formula ends too early")

    def _expect(self, token_type: TokenType, text: str) -> None:
        if not self._match(token_type):
            self.raise_error(f"expected {text!r}")

    def _nested(self, parse: Callable[[], exp.Expr]) -> exp.Expr:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.raise_error(f"nested deeper than {MAX_DEPTH}")
        node = parse()
        self.depth -= 1
        return node

    def _parse_statement(self) -> exp.Expr:
        node = self._parse_assignment()
        if self._curr:
            self._unexpected()
        return node

    def _parse_assignment(self) -> exp.Expr:
        """`a if c else b`, the loosest of all."""
        then = cast(exp.Expr, self._parse_disjunction())
        if not self._match(IF):
            return then
        condition = self._parse_disjunction()
        self._expect(TokenType.ELSE, "else")
        return exp.If(this=condition, true=then, false=self._nested(self._parse_assignment))

    def _parse_equality(self, parse_is: bool = True) -> exp.Expr:
        """`not`, then comparisons, all of one precedence and chained."""
        if self._match(TokenType.NOT):
            return exp.Not(this=self._nested(self._parse_equality))
        operands, operators = [cast(exp.Expr, self._parse_term())], []
        while True:
            if self._match_set(COMPARISONS):
                operators.append(COMPARISONS[self._prev.token_type])
            elif self._match(TokenType.IN):
                operators.append("in")
            elif self._match_pair(TokenType.NOT, TokenType.IN):
                operators.append("not in")
            else:
                break
            operands.append(cast(exp.Expr, self._parse_term()))
        return Comparisons(expressions=operands, operators=operators) if operators else operands[0]

    def _parse_at_time_zone(self, this: exp.Expr | None) -> exp.Expr | None:
        return this

    def _parse_exponent(self) -> exp.Expr:
        """Signs bind looser than `**` on their right, tighter than everything else."""
        if self._match(TokenType.PLUS):
            return self._nested(self._parse_exponent)
        if self._match(TokenType.DASH):
            return exp.Neg(this=self._nested(self._parse_exponent))
        base = self._parse_primary()
        if self._match(TokenType.DSTAR):
            return exp.Pow(this=base, expression=self._nested(self._parse_exponent))
        return base

    def _parse_primary(self) -> exp.Expr:
        token = self._curr
        if self._match(TokenType.L_PAREN):
            node = self._nested(self._parse_assignment)
            self._expect(TokenType.R_PAREN, ")")
            return node
        if self._match(TokenType.CASE):
            return self._nested(self._parse_case)
        if self._match_pair(TokenType.DOT, TokenType.NUMBER):
            return self.expression(exp.Literal.number(self._find_sql(token, self._prev)), token)
        if self._match(TokenType.NUMBER):
            return self.expression(exp.Literal.number(self._find_sql(token, token)), token)
        if self._match(TokenType.STRING):
            return self.expression(exp.Literal.string(token.text), token)
        if self._match(TokenType.TRUE) or self._match(TokenType.FALSE):
            return exp.Boolean(this=token.token_type == TokenType.TRUE)
        if self._match_set((TokenType.VAR, IF)):
            if self._match(TokenType.L_PAREN):
                name = self._find_sql(token, token)
                return self.expression(exp.Anonymous(this=name, expressions=self._arguments()), token)
            if token.token_type == TokenType.VAR:
                return self.expression(exp.Var(this=token.text), token)
            self._retreat(self._index - 1)
        self._unexpected()

    def _arguments(self) -> list[exp.Expr]:
        arguments: list[exp.Expr] = []
        while not self._match(TokenType.R_PAREN):
            if arguments:
                self._expect(TokenType.COMMA, ",")
            arguments.append(self._nested(self._parse_assignment))
        return arguments

    def _parse_case(self) -> exp.Expr:
        branches = []
        while self._match(TokenType.WHEN):
            condition = self._parse_assignment()
            self._expect(TokenType.THEN, "then")
            branches.append(exp.If(this=condition, true=self._parse_assignment()))
        if not branches:
            self.raise_error("expected 'when'")
        self._expect(TokenType.ELSE, "else")
        default = self._parse_assignment()
        self._expect(TokenType.END, "end")
        return exp.Case(ifs=branches, default=default)


class FormulaDialect(Dialect):
    """See the module."""

    NUMBERS_CAN_BE_UNDERSCORE_SEPARATED = True

    Tokenizer = _Tokenizer
    Parser = _Parser


_DIALECT = FormulaDialect()
_KNOWN = WORDS | SYMBOLS | PAIRS
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_text(text: str) -> exp.Expr:
    """The tree of one formula. ExpressionError where it is not in the grammar; names and kinds are not looked at."""
    try:
        tokens = _DIALECT.tokenize(text)
    except TokenError:
        raise ExpressionError("a text is not closed", position=max(text.rfind("'"), 0)) from None
    _check_tokens(tokens, text)
    [node] = _DIALECT.parser().parse(tokens, text)
    return cast(exp.Expr, node)


def _check_tokens(tokens: list[Token], text: str) -> None:
    """Tokens and blanks are the whole text, and each token is written the one way that the language knows."""
    end = 0
    number = False
    for token in tokens:
        written = text[token.start : token.end + 1]
        _check_blank(text, end, token.start)
        if token.token_type == TokenType.STRING:
            ours = written == f"'{token.text}'"
        elif token.token_type == TokenType.VAR:
            ours = _NAME.fullmatch(written) is not None
        else:
            ours = token.token_type == TokenType.NUMBER or written in _KNOWN
        if not ours or (number and token.start == end and written[0].isalpha()):
            word = next((word for word in WORDS if word.lower() == written.lower() and word != written), None)
            raise ExpressionError(f"unexpected {written[:20]!a}", position=token.start, suggestion=word)
        number = token.token_type == TokenType.NUMBER
        end = token.end + 1
    _check_blank(text, end, len(text))


def _check_blank(text: str, start: int, end: int) -> None:
    first = start + len(text[start:end]) - len(text[start:end].lstrip(" \t\r\n"))
    if first < end:
        raise ExpressionError(f"unexpected {text[first:end][:20]!a}", position=first)
