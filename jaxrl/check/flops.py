"""Floating-point operations of a traced program: matrix products, those in a loop as often as it turns.

XLA's own count takes the body of a loop once, so it is of no use for layers that are scanned.
"""

import math

from jax.extend import core

DOTS = ("dot_general", "ragged_dot", "ragged_dot_general")


def matrix_flops(jaxpr: core.Jaxpr | core.ClosedJaxpr, turns: float = 1.0) -> float:
    """FLOPs of all matrix products on all devices together.

    What is computed again in the backward pass is counted again.

    Args:
        turns: of an innermost loop whose end the data decide, as those over blocks of keys; one around it counts once.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_of(equation, turns) for equation in inner.eqns)


def _of(equation: core.JaxprEqn, turns: float) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name in DOTS:
        return _product(equation)
    times = 1.0
    if name == "scan":
        times = parameters["length"]
    elif name == "shard_map":
        times = parameters["mesh"].size  # shapes inside are those of one device, and every axis is split
    elif name == "while" and not _loops(parameters["body_jaxpr"]):
        times = turns
    inside = _inside(equation)
    if name in ("custom_vjp_call", "custom_jvp_call"):
        return matrix_flops(inside[0], turns)
    if name == "cond":
        return max((matrix_flops(part, turns) for part in inside), default=0.0)
    return times * sum(matrix_flops(part, turns) for part in inside)


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


def _product(equation: core.JaxprEqn) -> float:
    left, right = (operand.aval.shape for operand in equation.invars[:2])
    result = equation.outvars[0].aval.shape
    if equation.primitive.name != "dot_general":
        # Each of the rows that both sides have meets the matrix of its own group, whichever side holds the matrices.
        rows = left[0]
        return 2.0 * math.prod(left) * math.prod(result if len(right) == 3 else right) / rows
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)
