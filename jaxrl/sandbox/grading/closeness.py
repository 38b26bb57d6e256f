"""Equality up to an error in the numbers. Run outside for printed numbers, and in the test's jail for returned ones."""

import math


def close(got: object, wanted: object, tolerance: float) -> bool:
    """Whether two values agree, their numbers to a relative or absolute error of ``tolerance``."""
    if isinstance(got, int | float | complex) and isinstance(wanted, int | float | complex):
        if isinstance(got, complex) or isinstance(wanted, complex):
            return got == wanted or abs(got - wanted) <= tolerance * max(1.0, abs(got), abs(wanted))
        return got == wanted or math.isclose(got, wanted, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(got, list | tuple) and isinstance(wanted, list | tuple):
        return (
            isinstance(got, list) == isinstance(wanted, list)
            and len(got) == len(wanted)
            and all(close(*pair, tolerance) for pair in zip(got, wanted, strict=True))
        )
    if isinstance(got, dict) and isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(close(got[key], wanted[key], tolerance) for key in wanted)
    return got == wanted
