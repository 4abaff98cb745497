"""Backward by counting: a value passes its gradient on when all of its readers have passed theirs."""


class Value:
    """A number."""

    def __init__(self, data, parents=()):
        self.data, self.parents, self.grad = data, list(parents), 0.0


def add(a, b):
    return Value(a.data + b.data, [(a, 1.0), (b, 1.0)])


def mul(a, b):
    return Value(a.data * b.data, [(a, b.data), (b, a.data)])


def relu(a):
    return Value(a.data, [(a, 1.0)]) if a.data > 0 else Value(0.0, [(a, 0.0)])


def backward(result):
    waiting, found = {}, [result]
    for value in found:
        value.grad = 0.0
        for parent, _ in value.parents:
            if id(parent) not in waiting:
                found.append(parent)
            waiting[id(parent)] = waiting.get(id(parent), 0) + 1
    result.grad, ready = 1.0, [result]
    while ready:
        value = ready.pop()
        for parent, derivative in value.parents:
            parent.grad += derivative * value.grad
            waiting[id(parent)] -= 1
            if waiting[id(parent)] == 0:
                ready.append(parent)
