"""Worked solutions for the cold start: what a policy would write, and what its Python tool would say.

The environment writes the opened ``<reason>``, so every policy turn begins inside it. Tool outputs are computed, not
written down: the value of the last expression, or the last line of the traceback.
"""

import contextlib
import dataclasses
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence

from jaxrl.config import DataConfig, SftConfig
from jaxrl.data import recorded
from jaxrl.data.arithmetic import Output, UnsupportedProgram, run
from jaxrl.data.problems import STORIES, DataError, Row, read_rows, row_problem
from jaxrl.data.recorded import Worked
from jaxrl.data.stories import LARGEST, OPERATORS, SMALLEST, Story, fill, make_stories
from jaxrl.records import Demonstration, Problem
from jaxrl.text.tokens import ANSWER_CLOSE, ANSWER_OPEN, CALL_CLOSE, CALL_OPEN, REASON_CLOSE

TOOL_NAME = "python"
_VERBS = {"+": "add", "-": "subtract", "*": "multiply", "//": "divide"}
_OPERATOR = re.compile(r"//|[-+*]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_STATED = re.compile(r"(?<![\w.,/])\d+(?![\w/]|[.,]\d)")  # whole numbers of a question, no part of 1,000 or of 1/2
_LITERAL = re.compile(r"(?<![\w.])\d+(?![\w.])")  # whole numbers of a program, no part of 0.5 or of v1
_OFTEN_IMPLIED = {"1", "2", "100"}  # by "half", "twice" and "percent"; where they stand they may mean something else
_NOTE = re.compile(r"<<(.*?)>>")
_TOLERANCE = 1e-6  # of a float against the answer it stands for
_DRAWS = 20  # of numbers for a variant
_OPERAND_SHARE = 0.3  # of wrong stories: wrong in an operand rather than in an operation


def load(sft: SftConfig, data: DataConfig, train: Sequence[Problem]) -> tuple[Worked, ...]:
    """The demonstrations that ``sft.demonstrations`` names.

    Args:
        data: gives the seed of stories, and the files whose rows are turned into demonstrations.
        train: problems of ``load_split``; rows of those files that are not among them were kept back, and are skipped.

    Raises:
        DataError: no file, files of which no row can be turned into a program, or rows that are no conversation.
    """
    if sft.demonstrations == "stories":
        return story_demonstrations(sft.count, sft.wrong_share, sft.repair_share, data.seed)
    if sft.demonstrations != "gsm8k":
        return recorded.read(sft)
    files = ",".join(part for part in data.train.split(",") if part.strip() != STORIES)
    if not files:
        raise DataError(f'SftConfig.demonstrations="gsm8k" needs files; DataConfig.train="{data.train}" has none')
    allowed = {(problem.source, problem.id) for problem in train}
    rows = [row for row in read_rows(files) if (row.path.stem, row_problem(row).id) in allowed]
    made = gsm8k_demonstrations(rows[: sft.count], sft.variants, data.seed)
    if not made:
        raise DataError(
            f"none of the {len(rows)} training rows of {files} has calculator notes <<...>> or an equation that gives "
            'its answer; use GSM8K or SVAMP files, or set SftConfig.demonstrations=""'
        )
    return made


def story_demonstrations(count: int, wrong_share: float, repair_share: float, seed: int) -> tuple[Demonstration, ...]:
    """Solutions of training stories in several manners, so that a policy has manners to choose between.

    Args:
        count: how many.
        wrong_share: share whose program uses a wrong operation or number, so that the answer is wrong.
        repair_share: share whose first call fails and is then repaired. Independent of ``wrong_share``: some do both.
        seed: of the stories and of the manners.
    """
    draw = random.Random(f"demonstrations {seed}")
    return tuple(
        _story_demonstration(story, draw, wrong=draw.random() < wrong_share, repair=draw.random() < repair_share)
        for story in make_stories(count, seed, "train")
    )


def gsm8k_demonstrations(rows: Sequence[Row], variants: int = 0, seed: int = 0) -> tuple[Demonstration, ...]:
    """Human solutions as one Python call each.

    A GSM8K solution's calculator notes ``<<48/2=24>>`` become the lines of a program; a number that an earlier line
    computed and the question does not state becomes that line's name. An SVAMP row's ``equation`` is a program as it
    is. Rows whose program does not give the answer are left out: the length tells how many are left.

    Args:
        variants: how often each is repeated with other numbers, so that a model that sees few problems learns to copy
            numbers rather than to remember them. What the question states is changed there and in the program alike;
            rows where that gives no whole, positive result stay as they are alone.
        seed: of the numbers.
    """
    draw = random.Random(f"variants {seed}")
    solved = [(problem, code) for row in rows if (problem := row_problem(row)) and (code := _row_program(row, problem))]
    made = [_one_call(problem, code) for problem, code in solved]
    for _ in range(variants):
        made += [_one_call(*other) for one in solved if (other := _renumbered(*one, draw))]
    return tuple(made)


def _story_demonstration(story: Story, draw: random.Random, *, wrong: bool, repair: bool) -> Demonstration:
    code = _wrong_code(story, draw) if wrong else story.expression
    verbs = " and ".join(_VERBS[operator] for operator in _OPERATOR.findall(code))
    turns, failed = [_call_turn(f"{verbs.capitalize()}.", code)], ()
    if repair:
        slip = _slip(code, draw)
        turns = [_call_turn(f"{verbs.capitalize()}.", slip), run(slip).text, _call_turn("Fix it.", code)]
        failed = (0,)
    output = run(code)
    return Demonstration(story.problem, (*turns, output.text, _answer_turn(output.text)), failed)


def _one_call(problem: Problem, code: str) -> Demonstration:
    return Demonstration(problem, (_call_turn("", code), run(code).text, _answer_turn(problem.answer)))


def _row_program(row: Row, problem: Problem) -> str | None:
    for code in _row_programs(row, problem):
        with contextlib.suppress(UnsupportedProgram):
            if _gives(run(code), problem.answer):
                return code
    return None


def _renumbered(problem: Problem, code: str, draw: random.Random) -> tuple[Problem, str] | None:
    """The problem with other numbers where its program uses what it states; None where no draw comes out even."""
    stated = set(_STATED.findall(problem.question))
    shared = sorted((stated & set(_LITERAL.findall(code))) - _OFTEN_IMPLIED)
    if not shared:
        return None
    for _ in range(_DRAWS):
        numbers = [str(_alike(int(number), draw)) for number in shared]
        if len(set(numbers) | (stated - set(shared))) < len(stated):
            continue  # two numbers of the question would become one
        other = dict(zip(shared, numbers, strict=True))
        program = _exchanged(_LITERAL, code, other)
        value = run(program).value
        if value is not None and value > 0 and value == int(value):
            question = _exchanged(_STATED, problem.question, other)
            return dataclasses.replace(problem, question=question, answer=str(int(value))), program
    return None


def _exchanged(pattern: re.Pattern[str], text: str, other: dict[str, str]) -> str:
    return pattern.sub(lambda match: other.get(match[0], match[0]), text)


def _alike(number: int, draw: random.Random) -> int:
    """Another number with as many digits and as many zeros at its end."""
    zeros = 0
    while number >= 10 and number % 10 == 0:
        number, zeros = number // 10, zeros + 1
    least = 10 ** (len(str(number)) - 1)
    return draw.randrange(max(2, least), 10 * least) * 10**zeros


def _row_programs(row: Row, problem: Problem) -> Iterator[str]:
    """Programs to try for a row, best first."""
    equation = row.fields.get("equation")
    if isinstance(equation, str):
        yield re.sub(r"\s+|\.0\b", "", equation).removeprefix("(").removesuffix(")")
        yield equation.strip()
    notes = [note.rpartition("=")[0].strip() for note in _NOTE.findall(str(row.fields.get("answer", "")))]
    if notes:
        yield _chained(notes, problem.question)
        yield notes[-1]


def _chained(notes: Sequence[str], question: str) -> str:
    """The notes as lines that use each other's results, those without influence on the last left out."""
    stated = {float(number) for number in _NUMBER.findall(question.replace(",", ""))}
    names: dict[float, str] = {}  # of the results so far
    lines: list[str] = []
    for index, note in enumerate(notes):
        line = _NUMBER.sub(lambda match: names.get(float(match[0]), match[0]), note)
        lines.append(line)
        value = _value(note)
        if value is not None and value not in stated:
            names[value] = f"v{index + 1}"
    needed = {len(lines)}
    for number in range(len(lines), 0, -1):
        if number in needed:
            needed |= {int(used) for used in re.findall(r"\bv(\d+)\b", lines[number - 1])}
    program = [f"v{number} = {lines[number - 1]}" for number in sorted(needed)[:-1]]
    return "\n".join([*program, lines[-1]])


def _value(expression: str) -> float | None:
    try:
        value = run(expression).value
    except UnsupportedProgram:
        return None
    return None if value is None else float(value)


def _gives(output: Output, answer: str) -> bool:
    try:
        return output.value is not None and abs(output.value - float(answer)) <= _TOLERANCE
    except ValueError:
        return False


def _wrong_code(story: Story, draw: random.Random) -> str:
    """The story's expression with one operation or one number changed, so that it has another whole value."""
    operations, operands = list(_other_operations(story)), list(_other_operands(story))
    draw.shuffle(operations)
    draw.shuffle(operands)
    candidates = operands + operations if draw.random() < _OPERAND_SHARE else operations + operands
    return next(code for code in candidates if _wrong(run(code), story))


def _wrong(output: Output, story: Story) -> bool:
    return output.value is not None and output.value >= 0 and output.text != story.problem.answer


def _other_operations(story: Story) -> Iterator[str]:
    for match, operator in itertools.product(_OPERATOR.finditer(story.pattern), OPERATORS):
        if operator != match[0]:
            yield fill(story.pattern[: match.start()] + operator + story.pattern[match.end() :], story.numbers)


def _other_operands(story: Story) -> Iterator[str]:
    for place, number in enumerate(story.numbers):
        for other in {*story.numbers, max(SMALLEST, number - 1), min(LARGEST, number + 1)} - {number}:
            yield fill(story.pattern, (*story.numbers[:place], other, *story.numbers[place + 1 :]))


def _slip(code: str, draw: random.Random) -> str:
    """``code`` with a slip that makes it fail: a name nobody defined, or broken syntax."""
    last = list(_NUMBER.finditer(code))[-1]
    undefined = f"{code[: last.start()]}x{code[last.end() :]}"
    return draw.choice((undefined, f"{code})", f"({code}", f"{code}+"))


def _call_turn(reasoning: str, code: str) -> str:
    call = json.dumps({"name": TOOL_NAME, "arguments": {"code": code}}, ensure_ascii=False)
    return f"{reasoning}{REASON_CLOSE}\n{CALL_OPEN}{call}{CALL_CLOSE}"


def _answer_turn(answer: str) -> str:
    return f"{REASON_CLOSE}\n{ANSWER_OPEN}\\boxed{{{answer}}}{ANSWER_CLOSE}"
