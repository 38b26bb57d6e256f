"""What lies on a device at each moment of a step, and whether it fits."""

import dataclasses
from collections.abc import Mapping

from jaxrl.check.programs import CRITIC, HAND_OVER, ROLLOUT, Resident
from jaxrl.check.worker import Compiled

PARTS = ("weights", "optimizer", "critic", "teacher", "reference", "engine", "pages", "gradients", "activations")


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


def moments(
    resident: Resident, batch: int, compiled: Mapping[str, Compiled], *, ahead: bool = False, apart: bool = False
) -> list[Moment]:
    """Every moment of a step, in its order.

    Args:
        batch: bytes of one device's piece of a micro-batch.
        compiled: the programs, by name.
        apart: some devices train and others roll out, and a moment is that of those it concerns.
        ahead: episodes of the next step are played during the update, so that a round may run between micro-batches.
    """
    found = []
    for name, program in compiled.items():
        if name == HAND_OVER:
            continue
        stays = _stays(resident, training=not (apart and name in ROLLOUT), rollout=not apart or name in ROLLOUT)
        parts = dict(stays, gradients=0, activations=program.temporary + program.results)
        if name in CRITIC:
            parts["gradients"] = 0 if name == "values" else resident.critic
            parts["activations"] += 0 if name == "critic apply" else batch
            parts["critic"] += resident.critic_offloaded if name == "critic apply" else 0
        elif name in ("first", "more"):
            parts["gradients"] = resident.gradients
            parts["activations"] += batch - (program.results if name == "first" else 0)
        elif name == "apply":
            parts["gradients"] = resident.gradients
            parts["optimizer"] += resident.offloaded
        elif name == "score":
            parts["activations"] += batch
        elif ahead and not apart:
            parts["gradients"] = max(resident.gradients, resident.critic)
        found.append(Moment(name, parts, program.refused))
    stays = _stays(resident, training=True, rollout=not apart)
    moved = compiled.get(HAND_OVER, Compiled())
    under_way = resident.hand_over + moved.arguments + moved.temporary + moved.results
    return [*found, Moment(HAND_OVER, dict(stays, gradients=0, activations=under_way), moved.refused)]


def _stays(resident: Resident, *, training: bool, rollout: bool) -> dict[str, int]:
    """What rests on devices that train, roll out, or do both."""
    return {
        "weights": resident.weights * training,
        "optimizer": resident.optimizer * training,
        "critic": (resident.critic + resident.critic_optimizer) * training,
        "teacher": resident.teacher * training,
        "reference": resident.reference * training,
        "engine": resident.engine * rollout,
        "pages": resident.pages * rollout,
    }


def fullest(found: list[Moment]) -> Moment:
    """The moment that needs most; one that the compiler refused before all others."""
    return max(found, key=lambda moment: (bool(moment.refused), moment.total))


def fits(found: list[Moment], memory: int) -> bool:
    """Whether every moment finds room."""
    return all(not moment.refused and moment.total <= memory for moment in found)
