"""Floating-point operations of a traced program: matrix products, those in a loop as often as it turns.

XLA's own count takes the body of a loop once, so it is of no use for layers that are scanned.
"""

import dataclasses
import math

from jax.extend import core

DOTS = ("dot_general", "ragged_dot", "ragged_dot_general")


@dataclasses.dataclass(frozen=True)
class Data:
    """What a program's data decide.

    Attributes:
        turns: of an innermost loop whose end they decide, as those over blocks of keys; one around it counts once.
        experts: of a layer, and
        experts_per_token: how many a token chooses. A grouped product has room for every token that might come; what
            comes at even load is counted.
    """

    turns: float = 1.0
    experts: int = 0
    experts_per_token: int = 0


def matrix_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr, data: Data) -> float:
    """FLOPs of all matrix products on all devices together.

    What is computed again in the backward pass is counted again.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_of(equation, data) for equation in inner.eqns)


def _of(equation: core.JaxprEqn, data: Data) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name in DOTS:
        return _product(equation, data)
    if name == "pallas_call":  # its grid may be as long as the data decide, so it says itself what it costs
        estimate = equation.params["cost_estimate"]
        return float(estimate.flops) if estimate else 0.0
    times = 1.0
    if name == "scan":
        times = parameters["length"]
    elif name == "shard_map":
        times = parameters["mesh"].size  # shapes inside are those of one device, and every axis is split
    elif name == "while" and not _loops(parameters["body_jaxpr"]):
        times = data.turns
    inside = _inside(equation)
    if name in ("custom_vjp_call", "custom_jvp_call"):
        return matrix_flops(inside[0], data)
    if name == "cond":
        return max((matrix_flops(part, data) for part in inside), default=0.0)
    return times * sum(matrix_flops(part, data) for part in inside)


def _inside(equation: core.JaxprEqn) -> list[core.Jaxpr | core.ClosedJaxpr]:
    return [
        part
        for value in equation.params.values()
        for part in (value if isinstance(value, tuple | list) else (value,))
        if isinstance(part, core.Jaxpr | core.ClosedJaxpr)
    ]


def _loops(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> bool:
    """Whether there is a loop inside."""
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return any(
        equation.primitive.name in ("scan", "while") or any(map(_loops, _inside(equation))) for equation in inner.eqns
    )


def _product(equation: core.JaxprEqn, data: Data) -> float:
    left, right = (operand.aval.shape for operand in equation.invars[:2])
    result = equation.outvars[0].aval.shape
    if equation.primitive.name != "dot_general":
        # Each of the rows that both sides have meets the matrix of its own group, whichever side holds the matrices.
        others = result if len(right) == 3 else right
        matrices = right[0] if len(right) == 3 else result[0]
        return 2.0 * math.prod(left) * math.prod(others) / left[0] * _share(matrices, data)
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _share(matrices: int, data: Data) -> float:
    """Of the rows that a product with so many experts has room for, the share that comes at even load."""
    if not data.experts:
        return 1.0
    per_token = data.experts_per_token * matrices / data.experts
    return per_token / min(data.experts_per_token, matrices)
