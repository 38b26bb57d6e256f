"""What grading finds out."""

import dataclasses

import numpy as np

from jaxrl.statuses import ToolStatus


@dataclasses.dataclass(frozen=True)
class Grade:
    """How one program did on one test. Not for the policy's eyes: ``detail`` may quote the test."""

    passed: bool
    status: ToolStatus  # of the program's call; ``error`` also where its function raised what the test did not expect
    hidden: bool  # whether the expected answers were out of the program's reach
    cpu_seconds: float  # of the program's calls
    wall_seconds: float
    detail: str = ""  # why it did not pass, or why the test was not hidden

    @property
    def is_infra(self) -> bool:
        """Whether the fault is ours, so that ``passed`` says nothing about the program."""
        return self.status == ToolStatus.INFRA_ERROR


@dataclasses.dataclass(frozen=True)
class PassMatrix:
    """Programs x tests. Where ``infra`` holds, ``passed`` is False and means nothing: mask it."""

    passed: np.ndarray  # [programs, tests] bool
    infra: np.ndarray  # [programs, tests] bool
    hidden: np.ndarray  # [programs, tests] bool
    status: np.ndarray  # [programs, tests] str, values of ToolStatus
    cpu_seconds: np.ndarray  # [programs, tests] float64
    wall_seconds: np.ndarray  # [programs, tests] float64


def matrix_of(grades: list[list[Grade]], tests: int) -> PassMatrix:
    """Rows of grades, one row per program, as arrays."""
    shape = (len(grades), tests)

    def array(field: str, kind: str) -> np.ndarray:
        return np.array([[getattr(grade, field) for grade in row] for row in grades], dtype=kind).reshape(shape)

    return PassMatrix(
        passed=array("passed", "bool"),
        infra=array("is_infra", "bool"),
        hidden=array("hidden", "bool"),
        status=array("status", f"U{max(map(len, ToolStatus))}"),
        cpu_seconds=array("cpu_seconds", "float64"),
        wall_seconds=array("wall_seconds", "float64"),
    )
