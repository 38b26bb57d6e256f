"""Problem sets, and the endless stream in which a run draws from them."""

import dataclasses
import json
import pathlib
import random
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import grain

from jaxrl.config import DataConfig
from jaxrl.data.stories import make_stories
from jaxrl.records import Problem

STORIES = "stories"
_KEEP_BACK_SEED = "kept back"


class DataError(ValueError):
    """A problem set that cannot be used; the message names the file and, where there is one, the line."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One JSON object of a file, with the line it stands on (from 1)."""

    path: pathlib.Path
    line: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"


def read_rows(spec: str) -> tuple[Row, ...]:
    """The rows of one or several JSONL files (comma-separated); blank lines are passed over.

    Raises:
        DataError: no such file, a line that is not a JSON object in UTF-8, or a file without rows.
    """
    return tuple(row for path in spec.split(",") for row in _read_file(pathlib.Path(path.strip())))


def row_problem(row: Row) -> Problem:
    """The problem in a row of one of these forms.

    * ``question`` or ``prompt``, ``answer`` and, if wanted, ``id`` (SVAMP and most others); the answer is text or a
      number;
    * GSM8K: ``question`` and an ``answer`` that ends with ``#### 1,080``: what follows the mark, commas removed.

    Without an ``id`` the problem is named after file and line.

    Raises:
        DataError: question or answer missing or empty.
    """
    question = row.fields.get("question", row.fields.get("prompt"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f'{row.place}: no "question" or "prompt" with text in it')
    answer = row.fields.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise DataError(f'{row.place}: no "answer" that is text or a number')
    if "####" in answer:
        answer = answer.rpartition("####")[2].replace(",", "")
    if not answer.strip():
        raise DataError(f'{row.place}: "answer" is empty')
    name = row.fields.get("id", f"{row.path.stem}/{row.line}")
    return Problem(str(name), question, answer.strip(), source=row.path.stem)


def load_problems(spec: str, *, count: int, seed: int, split: str = "train") -> tuple[Problem, ...]:
    """The problems of ``spec``.

    Args:
        spec: "stories", or paths of JSONL files, or both, separated by commas.
        count: stories to make; files are read whole.
        seed: of the stories.
        split: "train" or "eval", of the stories.

    Raises:
        DataError: see ``read_rows`` and ``row_problem``; also two problems with one id.
    """
    problems: dict[str, Problem] = {}
    places: dict[str, str] = {}
    for part in map(str.strip, spec.split(",")):
        if part == STORIES:
            problems |= {story.problem.id: story.problem for story in make_stories(count, seed, split)}
            continue
        for row in read_rows(part):
            problem = row_problem(row)
            if problem.id in places:
                raise DataError(
                    f'{row.place}: id "{problem.id}" is taken by {places[problem.id]}; ids must differ '
                    "(a row without one is named after its file and line)"
                )
            problems[problem.id], places[problem.id] = problem, row.place
    return tuple(problems.values())


def load_split(config: DataConfig) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """The problems to train on and those to evaluate on, with no question in both.

    With ``config.eval`` empty, ``config.eval_problems`` questions of the training set are kept back. A training problem
    whose question stands in the evaluation set, white space aside, is left out with a warning. Both choices depend
    on ``config.seed`` alone.

    Returns:
        train, eval (at most ``config.eval_problems``, a random choice of a larger set).

    Raises:
        DataError: nothing would be left to train on, and whatever ``load_problems`` raises.
    """
    train = load_problems(config.train, count=config.train_problems, seed=config.seed, split="train")
    held = load_held_out(config, train)
    forbidden = {_essence(problem) for problem in held}
    kept = tuple(problem for problem in train if _essence(problem) not in forbidden)
    if not kept:
        raise DataError(
            f"DataConfig.eval_problems={config.eval_problems} leaves none of the {len(train)} problems of "
            f'DataConfig.train="{config.train}" to train on; lower it or set DataConfig.eval to another file'
        )
    if config.eval and len(kept) < len(train):
        warnings.warn(
            f"{len(train) - len(kept)} problems of {config.train} are not trained on: they stand in {config.eval}",
            stacklevel=2,
        )
    return kept, held


def load_held_out(config: DataConfig, train: tuple[Problem, ...] | None = None) -> tuple[Problem, ...]:
    """The evaluation problems of ``load_split`` alone; ``config.train`` is read only where it keeps them back."""
    if config.eval:
        held = load_problems(config.eval, count=config.eval_problems, seed=config.seed, split="eval")
    else:
        train = train or load_problems(config.train, count=config.train_problems, seed=config.seed, split="train")
        held = tuple({_essence(problem): problem for problem in train}.values())
    if len(held) <= config.eval_problems:
        return held
    pick = random.Random(f"{_KEEP_BACK_SEED} {config.seed}")
    return tuple(held[i] for i in sorted(pick.sample(range(len(held)), config.eval_problems)))


class ProblemStream:
    """Endless draws from a problem set, reshuffled in every epoch, resumable from a few numbers.

    Draw n is a function of (problems, seed, n) alone.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        """
        Raises:
            DataError: no problems.
        """
        if not problems:
            raise DataError("no problems to draw from; DataConfig.train must name at least one")
        digest = zlib.crc32("\n".join(problem.id for problem in problems).encode())
        self._identity = {"seed": seed, "problems": len(problems), "ids": digest}
        self._draws = grain.MapDataset.source(problems).seed(seed).shuffle().repeat()
        self._next = 0

    def next(self) -> tuple[int, Problem]:
        """The number of this draw, from 0, and its problem."""
        draw = self._next
        self._next += 1
        return draw, self.problem(draw)

    def problem(self, draw: int) -> Problem:
        """What this draw gives, whether it has been drawn or not."""
        return self._draws[draw]

    def state(self) -> dict[str, int]:
        """The position, as JSON can hold it."""
        return {"next_draw": self._next} | self._identity

    def restore(self, state: dict[str, int]) -> None:
        """Go on from ``state``: the next draw is the one that would have come next.

        Raises:
            DataError: the state belongs to another seed or to other problems.
        """
        for name, mine in self._identity.items():
            if state[name] != mine:
                raise DataError(
                    f"the saved position was taken with {name}={state[name]} but this run has {name}={mine}; "
                    "resume with the data settings of the run, or start a new run folder"
                )
        self._next = state["next_draw"]


def _read_file(path: pathlib.Path) -> list[Row]:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the path of a JSONL file in it")
    if not path.is_file():
        raise DataError(f'no problem file {path}; give the path of a JSONL file, or "{STORIES}"')
    rows = []
    for line, data in enumerate(path.read_bytes().splitlines(), start=1):
        if not data.strip():
            continue
        try:
            fields = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{line}: not UTF-8: {error}; convert the file") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{line}: a {type(fields).__name__}, not a JSON object")
        rows.append(Row(path, line, fields))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _essence(problem: Problem) -> str:
    return " ".join(problem.question.split())
