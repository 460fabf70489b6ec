"""``--gate 'error <= before + 0.1 and ece <= 5'``: what must hold after, in words that cannot run anything.

    GATE      := CONDITION {"and" CONDITION}
    CONDITION := METRIC ("<=" | "<" | ">=" | ">") SUM
    SUM       := PRODUCT {("+" | "-") PRODUCT}
    PRODUCT   := FACTOR {"*" FACTOR}
    FACTOR    := NUMBER | "before" | "before." METRIC | "-" FACTOR | "(" SUM ")"
    METRIC    := "error" | "error5" | "nll" | "ece"

``before`` alone is the condition's own metric before.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ckpt_tools.errors import UsageError
from ckpt_tools.evaluate.metrics import METRICS

Values = Mapping[str, float]
Term = Callable[[Values], float]

_TOKEN = re.compile(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|[A-Za-z_][\w.]*|<=|>=|[<>+\-*()]|\S)")
_HOLDS: Mapping[str, Callable[[float, float, float], bool]] = {  # NaN holds nowhere
    "<=": lambda value, bound, slack: value <= bound + slack,
    "<": lambda value, bound, slack: value < bound - slack,
    ">=": lambda value, bound, slack: value >= bound - slack,
    ">": lambda value, bound, slack: value > bound + slack,
}
_COMPARISONS = tuple(_HOLDS)
_ROUNDING = 1e-9  # so that 5.1 <= 5.0 + 0.1 whatever floats say
_DEEPEST, _LONGEST = 50, 500  # brackets inside each other, words


@dataclass(frozen=True)
class Condition:
    """One comparison. ``metrics`` are those that it needs before; ``bound`` takes them."""

    text: str
    metric: str
    comparison: str
    bound: Term
    metrics: frozenset[str]

    def failure(self, before: Values, after: Values) -> str | None:
        """What is wrong, in numbers; None if it holds."""
        value, bound = after[self.metric], self.bound(before)
        slack = _ROUNDING * max(abs(value), abs(bound), 1.0)
        if _HOLDS[self.comparison](value, bound, slack if math.isfinite(slack) else 0.0):
            return None
        old = "".join(f", {name} before {before[name]:.6g}" for name in sorted(self.metrics))
        return f"{self.text}: {self.metric} is {value:.6g}, the bound {bound:.6g}{old}"


@dataclass(frozen=True)
class Gate:
    """All conditions must hold."""

    text: str
    conditions: tuple[Condition, ...]

    @property
    def needs_before(self) -> bool:
        """Whether some condition looks at the metrics before."""
        return any(condition.metrics for condition in self.conditions)

    @property
    def metrics(self) -> frozenset[str]:
        """All metrics that it looks at, before or after."""
        return frozenset().union(*({one.metric} | one.metrics for one in self.conditions))

    def failures(self, before: Values, after: Values) -> tuple[str, ...]:
        """What does not hold, in words; nothing if the gate is passed."""
        found = (condition.failure(before, after) for condition in self.conditions)
        return tuple(one for one in found if one is not None)


def parse_gate(text: str) -> Gate:
    """Raises UsageError that says where it does not parse."""
    return _Parser(text).gate()


class _Parser:
    """Recursive descent over the tokens of a gate."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [(match[1], match.start(1), match.end(1)) for match in _TOKEN.finditer(text)]
        self._position = 0
        self._depth = 0
        self._metric = ""
        self._needed: set[str] = set()
        if len(self._tokens) > _LONGEST:
            raise UsageError(f"--gate: expected at most {_LONGEST} words and signs, found {len(self._tokens)}.")

    def gate(self) -> Gate:
        conditions = [self._condition()]
        while self._taken("and"):
            conditions.append(self._condition())
        if self._next:
            raise self._expected("an operator, 'and' or the end")
        return Gate(self._text.strip(), tuple(conditions))

    def _condition(self) -> Condition:
        start = self._position
        self._metric = self._one_of(METRICS, f"one of {', '.join(METRICS)}")
        self._needed = set()
        comparison = self._one_of(_COMPARISONS, f"one of {' '.join(_COMPARISONS)}")
        bound = self._sum()
        text = self._text[self._tokens[start][1] : self._tokens[self._position - 1][2]]
        return Condition(text, self._metric, comparison, bound, frozenset(self._needed))

    def _sum(self) -> Term:
        total = self._product()
        while sign := self._taken("+", "-"):
            total = _joined(operator.add if sign == "+" else operator.sub, total, self._product())
        return total

    def _product(self) -> Term:
        product = self._factor()
        while self._taken("*"):
            product = _joined(operator.mul, product, self._factor())
        return product

    def _factor(self) -> Term:
        token = self._next
        if self._taken("-"):
            return _joined(operator.sub, _number(0.0), self._nested(self._factor))
        if self._taken("("):
            inner = self._nested(self._sum)
            self._one_of((")",), "a closing bracket")
            return inner
        if re.match(r"\.?\d", token):
            if not math.isfinite(float(token)):
                raise self._expected("a number that a float can hold")
            self._position += 1
            return _number(float(token))
        word, dot, metric = token.partition(".")
        if word == "before" and (not dot or metric in METRICS):
            self._position += 1
            name = metric or self._metric
            self._needed.add(name)
            return lambda before: before[name]
        raise self._expected(f"a number, before, or before.METRIC with one of {', '.join(METRICS)}")

    def _nested(self, parse: Callable[[], Term]) -> Term:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._expected(f"at most {_DEEPEST} brackets and signs inside each other")
        found = parse()
        self._depth -= 1
        return found

    @property
    def _next(self) -> str:
        return self._tokens[self._position][0] if self._position < len(self._tokens) else ""

    def _taken(self, *tokens: str) -> str:
        found = self._next
        if found not in tokens:
            return ""
        self._position += 1
        return found

    def _one_of(self, tokens: tuple[str, ...], expected: str) -> str:
        found = self._taken(*tokens)
        if not found:
            raise self._expected(expected)
        return found

    def _expected(self, what: str) -> UsageError:
        found = f"{self._next!r} at character {self._tokens[self._position][1] + 1}" if self._next else "the end"
        example = "'error <= before + 0.1 and ece <= 5'"
        return UsageError(f"--gate {self._text!r}: expected {what}, found {found}. For example: {example}.")


def _number(value: float) -> Term:
    return lambda before: value


def _joined(operation: Callable[[float, float], float], left: Term, right: Term) -> Term:
    return lambda before: operation(left(before), right(before))
