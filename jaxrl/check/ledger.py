"""What lies on a device at each moment of a step, and whether it fits."""

import dataclasses
from collections.abc import Mapping

from jaxrl.check.programs import Resident
from jaxrl.check.worker import Compiled

PARTS = ("weights", "optimizer", "reference", "engine", "pages", "gradients", "activations")


@dataclasses.dataclass(frozen=True)
class Moment:
    """The bytes of one device while a program runs.

    Attributes:
        name: of the program.
        parts: bytes by what they are for, see ``PARTS``; "activations" is all that only the program needs.
        refused: why the compiler did not make the program.
    """

    name: str
    parts: Mapping[str, int]
    refused: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def moments(resident: Resident, batch: int, compiled: Mapping[str, Compiled], *, ahead: bool) -> list[Moment]:
    """Every moment of a step, in its order.

    Args:
        batch: bytes of one device's piece of a micro-batch.
        compiled: the programs, by name.
        ahead: episodes of the next step are played during the update, so that a round may run between micro-batches.
    """
    stays = {
        "weights": resident.weights,
        "optimizer": resident.optimizer,
        "reference": resident.reference,
        "engine": resident.engine,
        "pages": resident.pages,
    }
    found = []
    for name, program in compiled.items():
        parts = dict(stays, gradients=0, activations=program.temporary + program.results)
        if name in ("first", "more"):
            parts["gradients"] = resident.gradients
            parts["activations"] += batch - (program.results if name == "first" else 0)
        elif name == "apply":
            parts["gradients"] = resident.gradients
            parts["optimizer"] += resident.offloaded
        elif name == "score":
            parts["activations"] += batch
        elif ahead:
            parts["gradients"] = resident.gradients
        found.append(Moment(name, parts, program.refused))
    handed = dict(stays, gradients=0, activations=resident.hand_over)
    return [*found, Moment("hand over", handed)]


def fullest(found: list[Moment]) -> Moment:
    """The moment that needs most; one that the compiler refused before all others."""
    return max(found, key=lambda moment: (bool(moment.refused), moment.total))


def fits(found: list[Moment], memory: int) -> bool:
    """Whether every moment finds room."""
    return all(not moment.refused and moment.total <= memory for moment in found)
