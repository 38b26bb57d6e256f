"""Arithmetic word problems made on the spot, with the expression that solves each.

Short texts, numbers 2 to 99, one or two steps of + - * //, whole answers: small enough that a model of a few hundred
thousand weights can learn them from nothing. Which split a text belongs to is decided by its hash, so no seed and no
count puts one text into both.
"""

import dataclasses
import functools
import hashlib
import random
import types

from jaxrl.records import Problem

SMALLEST, LARGEST = 2, 99
OPERATORS = ("+", "-", "*", "//")
_EVAL_SHARE = 8  # one text in eight

_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon", "Kira", "Leo", "Mia", "Noor", "Omar",
    "Pia",
)  # fmt: skip
_THINGS = (
    "apples", "books", "cards", "coins", "cups", "eggs", "hats", "keys", "marbles", "nuts", "pears", "pens", "plums",
    "rings", "shells", "stamps", "stones", "toys",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Template:
    """``text`` and ``pattern`` name the numbers {a}, {b}, {c}; ``exact`` asks every division to leave nothing over."""

    text: str
    pattern: str
    exact: bool = False


_TEMPLATES = (
    _Template("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "{a}+{b}"),
    _Template("{name} had {a} {things} and gave {b} of them to {other}. How many {things} are left?", "{a}-{b}"),
    _Template("There are {a} boxes with {b} {things} in each. How many {things} are there in all?", "{a}*{b}"),
    _Template(
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each get?", "{a}//{b}", True
    ),
    _Template("{name} packs {a} {things} into bags of {b}. How many bags are full?", "{a}//{b}"),
    _Template("{name} has {a} {things}. {other} has {b} fewer. How many {things} does {other} have?", "{a}-{b}"),
    _Template("{name} reads {a} pages a day for {b} days. How many pages is that?", "{a}*{b}"),
    _Template("{name} found {a} {things} on Monday and {b} on Friday. How many {things} is that?", "{a}+{b}"),
    _Template("A shelf holds {a} {things}. How many {things} do {b} shelves hold?", "{a}*{b}"),
    _Template("{name} needs {a} {things} and has {b} so far. How many more {things} are needed?", "{a}-{b}"),
    _Template("{name} pays {a} dollars for {b} {things}. What does one of them cost?", "{a}//{b}", True),
    _Template("{name} has {a} {things} and {other} has {b}. How many {things} do they have together?", "{a}+{b}"),
    _Template("{name} buys {a} bags of {b} {things} and finds {c} more. How many {things} is that?", "{a}*{b}+{c}"),
    _Template("{name} buys {a} bags of {b} {things} and loses {c}. How many {things} are left?", "{a}*{b}-{c}"),
    _Template("{name} has {a} red and {b} blue {things} and sells {c}. How many {things} are left?", "{a}+{b}-{c}"),
    _Template("{name} had {a} {things}, got {b} and then lost {c}. How many {things} are there now?", "{a}+{b}-{c}"),
    _Template(
        "{name} has {a} {things}, {other} has {b}. They share all of them among {c} friends. How many does each get?",
        "({a}+{b})//{c}",
        True,
    ),
    _Template("In {a} boxes there are {b} red and {c} blue {things} each. How many {things} is that?", "{a}*({b}+{c})"),
    _Template(
        "Of {a} {things} {b} broke. {name} packs the rest into bags of {c}. How many bags are full?", "({a}-{b})//{c}"
    ),
    _Template(
        "{name} had {a} dollars and bought {b} {things} for {c} dollars each. How many dollars are left?", "{a}-{b}*{c}"
    ),
    _Template(
        "{name} puts {a} {things} into {b} equal piles and adds {c} to the first. How many are in it?",
        "{a}//{b}+{c}",
        True,
    ),
    _Template(
        "{a} friends bring {b} {things} each and pack them into bags of {c}. How many bags are full?", "{a}*{b}//{c}"
    ),
    _Template(
        "{name} earns {a} dollars a day and spends {b}. How many dollars are left after {c} days?", "({a}-{b})*{c}"
    ),
    _Template("{name} has {a} {things}. {other} has {b} times as many. How many do they have together?", "{a}+{a}*{b}"),
)


@dataclasses.dataclass(frozen=True)
class Story:
    """A problem with its solution: ``pattern`` over {a}, {b}, {c} filled with ``numbers``."""

    problem: Problem
    pattern: str
    numbers: tuple[int, ...]

    @property
    def expression(self) -> str:
        """The Python expression whose value is the answer, e.g. ``(12+9)//3``."""
        return fill(self.pattern, self.numbers)


def fill(pattern: str, numbers: tuple[int, ...]) -> str:
    """``pattern`` with the numbers in the places of {a}, {b}, {c}."""
    return pattern.format(**_places(numbers))


def make_stories(count: int, seed: int, split: str) -> tuple[Story, ...]:
    """``count`` stories, no text twice, the same for the same arguments.

    Args:
        count: a longer sequence begins with the shorter one.
        seed: of everything.
        split: texts of "train" and "eval" never meet, whatever the seeds and counts.

    Raises:
        ValueError: an unknown split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'split="{split}" is none of "train", "eval"')
    draw = random.Random(f"stories {seed} {split}")
    stories: dict[str, Story] = {}
    while len(stories) < count:
        template = draw.choice(_TEMPLATES)
        numbers, answer = _numbers(draw, template)
        name, other = draw.sample(_NAMES, 2)
        words = {"name": name, "other": other, "things": draw.choice(_THINGS)}
        text = template.text.format(**_places(numbers), **words)
        if _split_of(text) == split and text not in stories:
            problem = Problem(f"stories/{split}/{seed}/{len(stories)}", text, str(answer), source="stories")
            stories[text] = Story(problem, template.pattern, numbers)
    return tuple(stories.values())


def _numbers(draw: random.Random, template: _Template) -> tuple[tuple[int, ...], int]:
    """Numbers that make sense in a template (nobody gives away what is not there), and the answer."""
    places = 3 if "{c}" in template.pattern else 2
    solve, divide = _compiled(template.pattern), _compiled(template.pattern.replace("//", "/"))
    while True:
        numbers = tuple(draw.randint(SMALLEST, LARGEST) for _ in range(places))
        names = _places(numbers)
        answer = eval(solve, {}, names)
        if answer >= 1 and not (template.exact and eval(divide, {}, names) != answer):
            return numbers, answer


@functools.cache
def _compiled(pattern: str) -> types.CodeType:
    """A pattern of the table above as code over a, b, c: exact divisions take many tries to draw."""
    return compile(pattern.replace("{", "").replace("}", ""), "<story>", "eval")


def _places(numbers: tuple[int, ...]) -> dict[str, int]:
    return dict(zip("abc", numbers, strict=False))


def _split_of(text: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _EVAL_SHARE
    return "eval" if bucket == 0 else "train"
