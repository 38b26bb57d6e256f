"""What a figure prints: its value with the demanded one beside it."""

import dataclasses
import json
import os

_SIGNS = {">=": lambda value, bound: value >= bound, "<=": lambda value, bound: value <= bound}


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        value: None where a part is missing; ``note`` then names it.
        demand: such as ">= 3"; empty for what is only told.
        holds: None where this machine, or this run, cannot tell.
    """

    figure: str
    what: str
    value: float | None
    unit: str
    demand: str
    holds: bool | None
    note: str = ""
    load_average: float = dataclasses.field(default_factory=lambda: round(os.getloadavg()[0], 1))

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def as_text(self) -> str:
        word = {True: "holds", False: "FAILS", None: "-"}[self.holds]
        value = "-" if self.value is None else f"{self.value:g}"
        note = f" ({self.note})" if self.note else ""
        return f"{self.figure:<4} {value:>9} {self.unit:<9} {self.demand:<9} {word:<5}  {self.what}{note}"


def judged(figure: str, what: str, value: float, unit: str, demand: str, note: str = "", tells: bool = True) -> Row:
    """A measured figure; ``tells=False`` keeps the value and leaves the verdict open."""
    sign, bound = demand.split()
    holds = _SIGNS[sign](value, float(bound)) if tells else None
    return Row(figure, what, float(f"{value:.3g}"), unit, demand, holds, note)


def told(figure: str, what: str, value: float, unit: str, note: str = "") -> Row:
    """A value that nothing is demanded of."""
    return Row(figure, what, float(f"{value:.3g}"), unit, "", None, note)


def missing(figure: str, what: str, unit: str, demand: str, why: str) -> Row:
    """A figure that cannot be measured here."""
    return Row(figure, what, None, unit, demand, None, why)
