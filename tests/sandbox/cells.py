"""A session that synchronous tests can call."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxrl.records import ToolStatus
from jaxrl.sandbox import Limits, Result, Session
from tests.sandbox.driver import LIMITS, Driver

# For cells that are not meant to run out of time: a busy machine must not make them.
PATIENT = dataclasses.replace(LIMITS, cpu_seconds=5.0, wall_seconds=20.0)


class Cells:
    """A session that synchronous tests can call."""

    def __init__(self, driver: Driver, session: Session) -> None:
        self.driver, self.session = driver, session

    def run(self, code: str, **options: Any) -> Result:
        return self.driver.wait(self.session.run(code, **options))

    def out(self, code: str, **options: Any) -> str:
        """What a cell prints that must go well."""
        result = self.run(code, **options)
        assert (result.status, result.stderr) == (ToolStatus.OK, ""), result
        return result.stdout

    def fork(self, copies: int) -> list["Cells"]:
        return [Cells(self.driver, copy) for copy in self.driver.wait(self.session.fork(copies))]

    def close(self) -> None:
        self.driver.wait(self.session.close())


@contextmanager
def session(driver: Driver, limits: Limits = PATIENT, **options: Any) -> Iterator[Cells]:
    cells = Cells(driver, driver.pool.session(limits=limits, **options))
    try:
        yield cells
    finally:
        cells.close()
