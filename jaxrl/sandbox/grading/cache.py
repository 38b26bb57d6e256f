"""Grades by content, so that the same program is not run again on the same test."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections import OrderedDict

from jaxrl.sandbox.grading.grade import Grade
from jaxrl.statuses import ToolStatus


class Cache:
    """The most recently used grades in memory, and all of them in a folder if there is one.

    Several processes may share the folder. It is never emptied; deleting it, or files in it, is always safe.

    Args:
        entries: kept in memory.
        folder: made if absent.
    """

    def __init__(self, entries: int, folder: pathlib.Path | None) -> None:
        self._entries = entries
        self._folder = folder
        self._grades: OrderedDict[str, Grade] = OrderedDict()

    def get(self, key: str) -> Grade | None:
        """The grade kept under a key of hexadecimal digits."""
        grade = self._grades.get(key) or self._read(key)
        if grade is not None:
            self._remember(key, grade)
        return grade

    def put(self, key: str, grade: Grade) -> None:
        """Keep a grade, unless the fault was ours. Where the folder cannot be written it is kept in memory alone."""
        if grade.is_infra:
            return
        self._remember(key, grade)
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._write(self._path(self._folder, key), grade)

    @staticmethod
    def _write(path: pathlib.Path, grade: Grade) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Complete when it gets its name, so that no reader in another process meets half of it.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(dataclasses.asdict(grade), file)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise

    def _remember(self, key: str, grade: Grade) -> None:
        self._grades[key] = grade
        self._grades.move_to_end(key)
        while len(self._grades) > self._entries:
            self._grades.popitem(last=False)

    def _read(self, key: str) -> Grade | None:
        if self._folder is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # absent, or damaged: graded anew
                fields = json.loads(self._path(self._folder, key).read_text(encoding="utf-8"))
                return Grade(**fields | {"status": ToolStatus(fields["status"])})
        return None

    @staticmethod
    def _path(folder: pathlib.Path, key: str) -> pathlib.Path:
        return folder / key[:2] / f"{key[2:]}.json"
