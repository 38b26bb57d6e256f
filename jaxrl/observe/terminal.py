"""Putting text of unknown origin on a terminal."""

import dataclasses
import io
import re

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from jaxrl.records import Trajectory

PLAIN_WIDTH = 100
"""Columns of everything that is printed where there is no terminal."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """``text`` with control characters made visible, so that a model's output cannot steer the terminal.

    Newlines and tabs stay. C0 codes become their Unicode pictures (ESC is shown as ␛); C1 codes, lone surrogates and
    marks that turn the writing direction become �.
    """

    def picture(match: re.Match[str]) -> str:
        code = ord(match.group())
        if code < 0x20:
            return chr(0x2400 + code)
        return "␡" if code == 0x7F else "�"

    visible = _CONTROL.sub(picture, text.replace("\r\n", "\n"))
    return visible.encode("utf-8", "replace").decode("utf-8")


def beginning(text: str, width: int) -> str:
    """The start of ``text`` on one line of at most ``width`` characters, with an ellipsis where it was cut."""
    line = " ".join(printable(text[: 8 * width]).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def outcome(trajectory: Trajectory) -> str:
    """How an episode went, in one word or two: the verifier's status, or the fault that keeps it out of training."""
    return str(trajectory.reward_status if trajectory.trainable else "left out").replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Marked:
    """Text with a mark at the left edge of each line, wrapped ones included."""

    body: Text
    mark: str
    mark_style: str = "none"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        mark = Segment(self.mark, console.get_style(self.mark_style))
        width = max(1, options.max_width - len(self.mark))
        for line in console.render_lines(self.body, options.update(width=width), pad=False):
            yield mark
            yield from line
            yield Segment.line()


def plain_text(renderable: RenderableType, width: int = PLAIN_WIDTH) -> str:
    """A rich renderable as text without colours, lines at most ``width`` columns, none with trailing blanks."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
