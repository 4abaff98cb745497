"""A tape: numbers that remember what they were made of, and gradients that flow back.

Each ``Value`` keeps its parents, and with each parent the derivative of the value with respect to it.
``backward(result)`` sets ``grad`` of every value that the result was made of to d result / d value.
"""


class Value:
    """A number, and (parent, derivative) of each number that it was made of."""

    def __init__(self, data, parents=()):
        self.data, self.parents, self.grad = data, list(parents), 0.0


def add(a, b):
    """Return the sum a + b."""
    # <answer>
    return Value(a.data + b.data, [(a, 1.0), (b, 1.0)])
    # </answer>


def mul(a, b):
    """Return the product a b."""
    # <answer>
    return Value(a.data * b.data, [(a, b.data), (b, a.data)])
    # </answer>


def relu(a):
    """Return max(a, 0)."""
    # <answer>
    return Value(max(a.data, 0.0), [(a, 1.0 if a.data > 0 else 0.0)])
    # </answer>


def backward(result):
    """Set ``grad`` of the result to 1, and of everything behind it to its derivative."""
    # <answer>
    order, seen = [], set()

    def visit(value):
        if id(value) not in seen:
            seen.add(id(value))
            for parent, _ in value.parents:
                visit(parent)
            order.append(value)

    visit(result)
    for value in order:
        value.grad = 0.0
    result.grad = 1.0
    for value in reversed(order):
        for parent, derivative in value.parents:
            parent.grad += derivative * value.grad
    # </answer>
