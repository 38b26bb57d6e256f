"""Metrics on disk: ``metrics.jsonl`` and TensorBoard event files, both safe to resume.

A row of ``metrics.jsonl`` is one JSON object: ``step`` (the run's global step), ``kind`` ("sft", "rl", "eval", ...)
and the metrics by name. A value that is not finite is written as null, because JSON has no word for it.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Appends rows to the run folder; each is on its way to the disk before ``write`` returns.

    Args:
        folder: the run folder; created if absent.
        resume_step: the global step that the run continues from. Rows beyond it, and a last row that a killed run left
            half written, are dropped: they will be written again. -1 starts over.
    """

    def __init__(self, folder: pathlib.Path, resume_step: int = -1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if path.exists():
            _keep_rows(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        board = folder / TENSORBOARD_FOLDER
        # Event files are named by the second they were opened in; two starts within one would write to one file.
        opened_before = len(list(board.iterdir())) if board.is_dir() else 0
        self._board = SummaryWriter(
            str(board), purge_step=resume_step + 1, filename_suffix=f".{opened_before}", flush_secs=30
        )

    def write(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        """Write one row. Two rows of one step must differ in ``kind``."""
        values = {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(folder: pathlib.Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of a run in order, of one kind or of all; a half-written last row is left out."""
    path = folder / METRICS_FILE
    rows = _complete_rows(path) if path.exists() else []
    return [row for row in rows if kind is None or row["kind"] == kind]


def _complete_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); repair or remove that line") from error
    return rows


def _keep_rows(path: pathlib.Path, last_step: int) -> None:
    """Replace the file by its rows up to ``last_step``; the old file stays whole until the new one is."""
    kept = [row for row in _complete_rows(path) if row["step"] <= last_step]
    replacement = path.with_suffix(".jsonl.tmp")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)
