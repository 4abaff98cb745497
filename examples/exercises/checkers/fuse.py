"""An operator fused by hand: its numbers, the pass, and the reorders that are left."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from examples.exercises.frame import Race, function_of
from kernels.workbench import operator_verdict
from kernels.workbench.definitions import DEFINITIONS
from kernels.workbench.verdict import Failure

AFTER = "propagate_layout"
_TIMED = (1, 32, 32, 32, 3)


def check(module: ModuleType) -> None:
    """Check ELU as the workbench does, then the pass, then what is left around ELU."""
    from tinyunet import workbench

    forward, backward = function_of(module, "forward"), function_of(module, "backward")
    operator_verdict.check(operator_verdict.Operator("elu", DEFINITIONS["elu"], forward, backward), 10)
    rewrite, nets = _watched(function_of(module, "rewrite")), _nets(forward, backward)
    changes = workbench.check(
        rewrite, AFTER, {name: nets[name] for name in nets if name != "ELU of the images"}
    )
    for change in changes:
        if left := [line for line in change.around if "own:elu" in line]:
            where = f"{change.net}, {change.mode}"
            raise Failure(f"{where}: {len(left)} reorders are left around ELU, the first is {left[0]}")
    # Where ELU reads the images, no reorder goes; the graph must stay right.
    workbench.check(rewrite, AFTER, {"ELU of the images": nets["ELU of the images"]}, may_do_nothing=True)


def _watched(rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """Return the pass, and let it fail with words if forward and backward of an ELU differ in layout."""

    def run(graph: Any, options: Any) -> Any:
        found = rewrite(graph, options)
        for node in getattr(found, "nodes", ()):
            undo = found.backward_of(node) if node.op == "own:elu" else None
            if undo is not None:
                names = [next(iter(each.inputs.values())) for each in (node, undo)]
                layouts = [found.values[name].layout for name in names if name in found.values]
                if len({*layouts}) > 1:
                    raise Failure(f"ELU reads {layouts[0]}, its backward {layouts[1]}: rewrite both or none")
        return found

    return run


def _nets(forward: Callable[..., Any], backward: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """Return nets with the student's ELU at several places."""
    from tinyunet.autograd import Function
    from tinyunet.nn import Conv3d, Module

    class Elu(Function):
        @staticmethod
        def forward(ctx: Any, src: Any) -> Any:
            ctx.save(src)
            return forward(src)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return (backward(gradient, *ctx.saved),)

    class Net(Module):
        def __init__(self, channels: int, between: Callable[..., Any], first: bool = False) -> None:
            self.first, self.second, self.third = (
                Conv3d(3, channels),
                Conv3d(channels, 3),
                Conv3d(channels, 3),
            )
            self.between, self.of_images = between, first

        def forward(self, images: Any) -> Any:
            return self.between(self, self.first(Elu.apply(images) if self.of_images else images))

    one = lambda net, x: net.second(Elu.apply(x))  # noqa: E731
    two = lambda net, x: net.second(Elu.apply(Elu.apply(x)))  # noqa: E731
    return {
        "one ELU": lambda: Net(16, one),
        "17 channels": lambda: Net(17, one),
        "two in a row": lambda: Net(16, two),
        "read twice": lambda: Net(16, lambda net, x: (lambda y: net.second(y) + net.third(y))(Elu.apply(x))),
        "ELU of the images": lambda: Net(16, lambda net, x: net.second(x), first=True),
    }


def compete(module: ModuleType) -> Race:
    """Compare the bytes of a training step with the reorders and without; say what a prediction gains."""
    from tinyunet import workbench

    make = _nets(module.forward, module.backward)["two in a row"]
    change = workbench.check(module.rewrite, AFTER, {"two in a row": make}, _TIMED)[-1]
    before, after, _ = workbench.time_it(module.rewrite, AFTER, make, _TIMED)
    what = f"fewer bytes in a training step (and a prediction is {before / after:.2f} times as fast)"
    return Race(what, change.before.moved / change.after.moved, 1.2)
