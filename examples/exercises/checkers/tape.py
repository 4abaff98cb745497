"""The tape: gradients of small expressions, and of a deep chain."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from examples.exercises.frame import Case, Race, function_of, judge, race
from examples.exercises.solutions import tape as solution

#: Gradients of the diamond that come late, and those that have come: by the short way, by the long one.
_PARTS = [(4 - k - long, k, long) for k in (0, 1) for long in range(4) if k + long < 4]


def check(module: ModuleType) -> None:
    """Check gradients of expressions, from easy to hard."""
    add, mul, relu, backward, Value = (
        function_of(module, name) for name in ("add", "mul", "relu", "backward", "Value")
    )

    def gradients(expression: Callable[..., Any]) -> Callable[..., Any]:
        def run(*numbers: float) -> list[float]:
            values = [Value(number) for number in numbers]
            backward(expression(*values))
            return [value.grad for value in values]

        return run

    a, b, c = np.random.default_rng().uniform(1, 2, 3).tolist()
    overwritten = "gradients are overwritten where they must be added"
    nothing = "no gradient arrives: go backwards, from the result to what it is made of"
    early = "a value passes its gradient on before all of it has arrived: visit in reverse order"
    trials: list[tuple[str, Callable[..., Any], tuple[float, ...], list[float], dict[str, Any]]] = [
        ("a sum", add, (a, b), [1, 1], {"the derivative of a sum is that of a product": [b, a]}),
        ("a product", mul, (a, b), [b, a], {"each factor gets its own value": [a, b]}),
        ("a negative number", relu, (-a,), [0], {"relu passes the gradient of numbers below 0": [1]}),
        ("a positive number", relu, (a,), [1], {}),
        ("x * x", lambda x: mul(x, x), (a,), [2 * a], {overwritten: [a]}),
        ("a chain", lambda x, y: mul(add(x, y), mul(x, y)), (a, b), [b * (2 * a + b), a * (2 * b + a)], {}),
    ]

    def diamond(x: Any) -> Any:  # y reaches the result by a short way and by a long one
        y = mul(x, x)
        return add(y, mul(mul(y, y), y))

    # y has three gradients of c**4 by the long way, and 1 by the short one; so many have come too late.
    late = {f"{early} ({n} came late)": [2 * c * (k + long * c**4)] for n, k, long in _PARTS}
    trials.append(("a diamond", diamond, (c,), [2 * c + 6 * c**5], late))
    for label, expression, numbers, answer, mistakes in trials:
        known = mistakes | {nothing: [0.0] * len(answer)}
        judge(gradients(expression), [Case(label, numbers, answer, 1e-9, known)])
    with_twice = Value(a)
    result = mul(with_twice, with_twice)
    backward(result)
    backward(result)
    judge(
        lambda: [with_twice.grad],
        [Case("backward twice", (), [2 * a], 1e-9, {"old gradients stay": [4 * a]})],
    )


def compete(module: ModuleType) -> Race:
    """Compare with our solution, on a chain of 600 values."""

    def chain(tape: ModuleType) -> Callable[..., Any]:
        def run(*numbers: float) -> list[float]:
            values = [tape.Value(number) for number in numbers]
            value = values[0]
            for factor in values[1:]:
                value = tape.mul(tape.add(value, value), factor)
            tape.backward(value)
            return [each.grad for each in values]

        return run

    def numbers() -> tuple[float, ...]:
        return tuple(np.random.default_rng().uniform(0.45, 0.55, 200).tolist())

    return race("of the speed of our solution", chain(module), chain(solution), numbers, 0.5)
