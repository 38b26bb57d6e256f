"""Folders that are whole or not there, written by one process or by many that share a disk; JSON files in them."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl.config import ConfigError

CONFIG = "config.json"
MANIFEST = ".jaxrl-export.json"
"""The names of the other files of a folder that was written here: what may be replaced."""


@contextlib.contextmanager
def replaced_folder(
    path: str | os.PathLike[str], needed_bytes: int = 0, known_by: str = MANIFEST
) -> Iterator[pathlib.Path]:
    """A temporary sibling folder that takes the place of ``path`` when the block ends without an exception.

    On an exception it is removed and ``path`` stays as it was. A process killed in the block leaves the sibling, called
    ``.NAME.partial``, for the next writer to remove; killed between the two renames at the end, it leaves the former
    folder as ``.NAME.previous``, which the next writer puts back first.

    Of several processes the first prepares and renames the folder; all enter the block and write into it, and an
    exception in any of them leaves ``path`` as it was.

    Args:
        path: an absent or empty folder, or one of the same kind that was written here and holds nothing else.
        needed_bytes: disk space without which the block is not even entered.
        known_by: the file that every folder of this kind has.

    Raises:
        ConfigError: something else stands at ``path``.
        OSError: a folder that cannot be written, not enough space, a rename that failed, or another process's failure.
    """
    target = pathlib.Path(path).absolute()
    staging, previous = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "previous"))
    first = jax.process_index() == 0
    try:
        with together("prepare"):
            if first:
                _prepare(target, staging, previous, needed_bytes, known_by)
        with together("write"):
            yield staging
        with together("finish"):
            if first:
                _take_place(target, staging, previous)
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
    if first:
        _flush(target.parent)
        shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A block that all processes leave at the same time, and in which a failure of one is a failure of all.

    Raises:
        OSError: another process failed; that one raises its own exception.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(failure is not None)))
        if failure is None and failed.size:
            raise OSError(f"process {failed[0]} could not {what} the folder; its own message says why")
    if failure is not None:
        raise failure


def _prepare(
    target: pathlib.Path, staging: pathlib.Path, previous: pathlib.Path, needed_bytes: int, known_by: str
) -> None:
    _writable(target, lambda: target.parent.mkdir(parents=True, exist_ok=True))
    if previous.exists() and not target.exists():
        previous.rename(target)
    if target.exists():
        _replaceable(target, known_by)
    for leftover in (staging, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    _writable(target, staging.mkdir)
    free = shutil.disk_usage(staging).free
    if free < needed_bytes:
        raise OSError(
            f"{target} needs {needed_bytes} bytes but its disk has {free} free; make room or choose another path"
        )


def _replaceable(target: pathlib.Path, known_by: str) -> None:
    """Refuse to replace what was not written here, such as the weights that an export began from."""
    if not target.is_dir():
        raise ConfigError(f"{target} exists and is no folder; choose another path or remove it")
    if not any(target.iterdir()):
        return
    if not all((target / name).is_file() for name in (MANIFEST, known_by)):
        raise ConfigError(f"{target} exists and is no such export of jaxrl; choose another path or remove it")
    if foreign := _files(target) - {MANIFEST, *read_json(target / MANIFEST).get("files", ())}:
        raise ConfigError(f"{target} holds {min(foreign)!r}, which no export wrote; choose another path or move it")


def _files(folder: pathlib.Path) -> set[str]:
    """Everything in it but folders that are not empty."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or not any(path.iterdir())}


def _writable(target: pathlib.Path, make: Callable[[], None]) -> None:
    try:
        make()
    except OSError as error:
        raise OSError(f"{target} cannot be written: {error}; choose another path or change its permissions") from error


def _take_place(target: pathlib.Path, staging: pathlib.Path, previous: pathlib.Path) -> None:
    write_json(staging / MANIFEST, {"files": sorted(_files(staging))})
    for file in [*staging.rglob("*"), staging]:
        _flush(file)
    if target.exists():
        target.rename(previous)  # a folder with content cannot be renamed over
    try:
        staging.rename(target)
    except BaseException:
        if previous.exists():
            previous.rename(target)
        raise


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: no such file, or no JSON object in it.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is not there; give the path of a Hugging Face folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no JSON: {error}; fetch it again") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file} holds no JSON object; fetch it again")
    return document


def write_json(file: pathlib.Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _flush(path: pathlib.Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
