"""A run folder: one place for everything a run writes, owned by one process at a time."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

from jaxrl import config as configuration
from jaxrl.config import Config
from jaxrl.model.folders import together
from jaxrl.observe import traces
from jaxrl.observe.report import SUMMARY_FILE
from jaxrl.observe.traces import EPISODES_FOLDER
from jaxrl.processes.exchange import is_first


class RunError(RuntimeError):
    """A run folder that cannot be used."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run folder."""

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        return self.path / "config.gin"

    @property
    def tokenizer(self) -> pathlib.Path:
        return self.path / "tokenizer"

    @property
    def source(self) -> pathlib.Path:
        """Companions of the model the run began from, see ``jaxrl.model.companions``."""
        return self.path / "source"

    @property
    def base(self) -> pathlib.Path:
        """The frozen weights beneath the adapters of the checkpoints, as a Hugging Face folder."""
        return self.path / "base"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> pathlib.Path:
        return self.path / "export"

    def read_config(self) -> Config:
        """The configuration this run was last started with.

        Raises:
            RunError: the folder is no run folder.
        """
        if not self.config.is_file():
            raise RunError(
                f"{self.path} holds no config.gin, so it is not a run folder; give the folder `jaxrl train --run` made"
            )
        return configuration.parse([self.config.read_text(encoding="utf-8")])

    def go_back(self, checkpoint: int | None, step: int) -> None:
        """Remove what a run that went on from here left: its summary, and the episodes of later steps.

        Args:
            checkpoint: the one to go on from; None = from the beginning.
            step: its global step.
        """
        (self.path / SUMMARY_FILE).unlink(missing_ok=True)
        for file in (self.path / EPISODES_FOLDER).glob("*_*.jsonl"):
            if checkpoint is None or traces.step_of(file) > step:
                file.unlink()

    def write_config(self, config: Config) -> list[str]:
        """Put the resolved configuration beside the results; returns what changed since the last start, a line each."""
        return _put(self.config, configuration.dump(config))

    def write_kernels(self, lines: Sequence[str]) -> list[str]:
        """The same with what computes attention, and in which blocks: a change of it changes a run's last bits."""
        return _put(self.path / "kernels.txt", "".join(f"{line}\n" for line in lines))


def _put(path: pathlib.Path, text: str) -> list[str]:
    """Replace a file; returns the lines that its last version did not have, if there was one."""
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return [line for line in text.splitlines() if line and line not in before] if before else []


@contextlib.contextmanager
def open_run(path: pathlib.Path) -> Iterator[RunFolder]:
    """Make or reopen a run folder and hold its lock; the lock dies with the process, however that ends.

    A folder made here into which nothing was written is removed again. Of several processes, which share a disk, the
    first does this for all, and all enter and leave together.

    Raises:
        RunError: a live process holds the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with together("open"):
            if is_first():
                stack.enter_context(_locked(path))
        with together("open"):
            if not path.is_dir():
                raise RunError(f"run folder {path} of process 0 is not here; the processes must share a disk")
        yield RunFolder(path)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (closed below, and the lock with it)
    except OSError as error:
        raise RunError(f"run folder {path} cannot be written: {error}; choose another with --run") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise RunError(
                f"run folder {path} is in use by process {holder}; wait for it, stop it, or choose another with --run"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            if new and [file.name for file in path.rglob("*") if not file.is_dir()] == ["lock"]:
                shutil.rmtree(path)  # it failed before anything was made
