"""Where a run stands, apart from its weights: the host half of a checkpoint."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jaxrl.records import Group
from jaxrl.train.checkpoint import CheckpointError

Stage = Literal["sft", "rl", "prefer"]

FORMAT = 2
"""Version of the host half of a checkpoint; a reader refuses any other."""


@dataclasses.dataclass
class RunProgress:
    """Everything the next step depends on that is not an array. Round-trips through JSON, but for the groups that were
    played ahead, of which only the draws are there."""

    stage: Stage = "sft"
    step: int = 0  # steps of this stage done; also the weight version during reinforcement
    offset: int = 0  # global step at which this stage began
    stream: dict[str, Any] = dataclasses.field(default_factory=dict)  # data position
    pending: tuple[Group, ...] = ()  # played ahead for later steps
    unfinished: tuple[int, ...] = ()  # draws begun for later steps and not yet played; begun again on a resume
    problems: tuple[str, ...] | None = None  # ids the present stage keeps; None = all
    skipped_steps: int = 0
    left_out: int = 0  # trajectories that left a batch through faults of ours
    too_old: int = 0  # trajectories that left a batch because their oldest token was too many versions behind
    before: dict[str, Any] | None = None  # evaluation before reinforcement
    after: dict[str, Any] | None = None  # newest evaluation
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)  # what the alarms look at
    memory: dict[str, float] = dataclasses.field(default_factory=dict)  # what the advantage keeps from step to step
    coefficients: dict[str, float] = dataclasses.field(default_factory=dict)  # that adapt, where they stand
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by phase, over the whole run
    rl_seconds: float = 0.0
    response_tokens: int = 0  # of all episodes played in reinforcement
    stage_entered: int = 0  # stages whose one-time changes are done

    @property
    def global_step(self) -> int:
        """Steps since the run began: the cold start, one for the evaluation after it, and reinforcement."""
        return self.offset + self.step

    def begin_reinforcement(self) -> None:
        """Go over to the second stage."""
        self.offset, self.step, self.stage = self.global_step + 1, 0, "rl"

    def to_json(self) -> dict[str, Any]:
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        row["format"] = FORMAT
        row["unfinished"] = sorted([*row["unfinished"], *(group.draw for group in row.pop("pending"))])
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "RunProgress":
        """What ``to_json`` wrote, as if nothing under way had been played.

        Raises:
            CheckpointError: another format version.
        """
        row = dict(row)
        version = row.pop("format", None)
        if version != FORMAT:
            found = "an older jaxrl" if version is None else f"format {version}"
            raise CheckpointError(
                f"a checkpoint of {found}, but this jaxrl reads format {FORMAT}; go on with the one that made it, or "
                "choose a new folder with --run"
            )
        problems = None if row["problems"] is None else tuple(row["problems"])
        return cls(**{**row, "unfinished": tuple(row["unfinished"]), "problems": problems})

    def with_played(self, groups: Sequence[Group]) -> "RunProgress":
        """The same with groups, of the draws under way, that have been played."""
        played = {group.draw for group in groups}
        unfinished = tuple(draw for draw in self.unfinished if draw not in played)
        return dataclasses.replace(self, pending=tuple(groups), unfinished=unfinished)
