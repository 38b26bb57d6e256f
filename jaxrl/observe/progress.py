"""What a run shows while it works: a live view on a terminal, plain lines anywhere else, the same facts in both."""

import collections
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxrl.observe.metrics import phase_seconds
from jaxrl.observe.terminal import PLAIN_WIDTH, beginning, outcome, printable
from jaxrl.records import Trajectory

HISTORY = 20
"""Steps that a trend line shows."""
SHOWN_EPISODES = 3
HEARTBEAT_SECONDS = 30.0
"""Plain lines: the longest silence before a line says what is going on; and how often an episode is quoted."""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _whole_percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _number(value: float) -> str:
    return f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """How one metric is shown. Metrics that a step does not have are left out."""

    metric: str
    label: str  # in the live view
    line: str  # in plain lines, with {} for the value
    show: Callable[[float], str]
    show_short: Callable[[float], str]
    unit: str = ""


FIGURES = (
    Figure("pass_rate", "pass rate", "pass {}", _percent, _percent),
    Figure("tool_error_share", "failed tool calls", "tool-err {}", _percent, _whole_percent),
    Figure("response_tokens", "response length", "len {}", _count, _count, "tokens"),
    Figure("capped_share", "cut off at the cap", "cut {}", _percent, _whole_percent),
    Figure("nll", "loss in nats a token", "nll {}", _number, _number),
    Figure("loss", "loss", "loss {}", _number, _number),
    Figure("grad_norm", "gradient norm", "grad {}", _number, _number),
    Figure("tokens_per_second", "speed", "{} tok/s", _count, _whole, "tokens/s"),
)
"""Shown in this order."""

_GROUPS = "select/groups_"
"""Begins the metrics of what became of groups: the share that was kept, and those left out, by reason."""

_DISPENSABLE = ("loss", "grad_norm", "capped_share")
"""Left out of a plain line, in this order, until the seconds of two phases fit."""


@dataclasses.dataclass(frozen=True)
class View:
    """Everything on the screen at one moment."""

    title: str
    stage: str = ""
    step: int = 0
    steps: int = 0
    phase: str = ""
    detail: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    episodes: tuple[Trajectory, ...] = ()
    stage_seconds: float = 0.0
    phase_seconds: float = 0.0


class Progress:
    """The view of a run; use as a context manager around the work.

    Args:
        title: what runs, e.g. the recipe's name.
        file: where to show it; standard output unless given. A terminal gets the live view.
        live: force the live view on or off; None looks at ``file``.
        heartbeat: plain lines: seconds of silence after which a line says what is going on.
    """

    def __init__(
        self,
        title: str,
        *,
        file: TextIO | None = None,
        live: bool | None = None,
        heartbeat: float = HEARTBEAT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = Console(file=file or sys.stdout, highlight=False)
        is_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._heartbeat, self._clock = heartbeat, clock
        self._lock = threading.RLock()
        self._view = View(title)
        self._history: dict[str, collections.deque[float]] = {}
        self._stage_start = self._phase_start = self._last_line = self._last_quote = clock()
        self._first_step = 0
        self._every = 1
        self._stopped = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="progress heartbeat", daemon=True)
        self._live = (
            Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
            if (is_terminal if live is None else live)
            else None
        )

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        else:
            self._pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.phase("")
        self._stopped.set()
        if self._live:
            self._live.stop()
        else:
            self._pulse.join()

    def stage(self, name: str, steps: int, *, first: int = 0, every: int = 1) -> None:
        """Begin a part of the run with its own steps, figures and episodes.

        Args:
            name: e.g. "cold start" or "reinforcement".
            steps: how many steps the stage has in all.
            first: steps of it that an earlier, resumed run has done.
            every: plain lines: show every so many steps (the last always); for stages of very short steps.
        """
        with self._lock:
            self._history = {}
            self._view = View(self._view.title, stage=name, step=first, steps=steps)
            self._first_step, self._every = first, every
            self._stage_start = self._phase_start = self._clock()
        if self._live is None:
            resumed = f", from step {first}" if first else ""
            self._line(f"{name}: {steps} steps{resumed}")

    def step(self, metrics: Mapping[str, float], episodes: Sequence[Trajectory] = ()) -> None:
        """One more step of the stage is done.

        Args:
            metrics: its means by name; those of ``FIGURES`` and the ``seconds/`` of its phases are shown.
            episodes: some of its episodes; the beginnings of the last few are shown.
        """
        with self._lock:
            for figure in FIGURES:
                if figure.metric in metrics:
                    past = self._history.setdefault(figure.metric, collections.deque(maxlen=HISTORY))
                    past.append(metrics[figure.metric])
            latest = tuple(episodes[-SHOWN_EPISODES:])
            self._view = view = dataclasses.replace(
                self._view,
                step=self._view.step + 1,
                metrics=dict(metrics),
                episodes=latest or self._view.episodes,
                history={name: tuple(values) for name, values in self._history.items()},
            )
        if self._live is None and (view.step % self._every == 0 or view.step == view.steps):
            self._line(step_line(view))
            if latest and self._clock() - self._last_quote >= self._heartbeat:
                self._last_quote = self._clock()
                self._line("  " + quote(latest[-1], PLAIN_WIDTH - 2))

    def phase(self, name: str) -> None:
        """What goes on from now on; "" for nothing in particular. Fits ``PhaseTimer(on_phase=progress.phase)``."""
        with self._lock:
            if name != self._view.phase:
                self._phase_start = self._clock()
            self._view = dataclasses.replace(self._view, phase=name, detail="")

    def detail(self, text: str) -> None:
        """How far the phase is, e.g. "112 of 256 episodes"."""
        with self._lock:
            self._view = dataclasses.replace(self._view, detail=text)

    def note(self, text: str) -> None:
        """Say something that stays: above the live view, or as a line of its own."""
        if self._live is None:
            self._line(printable(text))
        else:
            self._console.print(Text(printable(text)))

    def _timed_view(self) -> View:
        with self._lock:
            now = self._clock()
            return dataclasses.replace(
                self._view, stage_seconds=now - self._stage_start, phase_seconds=now - self._phase_start
            )

    def _render(self) -> RenderableType:
        return live_view(self._timed_view(), self._first_step, min(self._console.width, PLAIN_WIDTH))

    def _line(self, text: str) -> None:
        with self._lock:
            self._last_line = self._clock()
            file = self._console.file
            encoding = getattr(file, "encoding", None) or "utf-8"
            file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            file.flush()

    def _beat(self) -> None:
        while not self._stopped.wait(min(1.0, self._heartbeat / 2)):
            view = self._timed_view()
            if view.phase and self._clock() - self._last_line >= self._heartbeat:
                place = f"step {view.step + 1}/{view.steps}: " if view.steps else ""
                self._line("  " + beginning(f"... {place}{_activity(view)}", PLAIN_WIDTH - 2))


def quote(episode: Trajectory, width: int) -> str:
    """An episode in one line: how it went, its calls, its beginning."""
    return beginning(", ".join(_summary(episode)) + ": " + _opening(episode), width)


def _summary(episode: Trajectory) -> tuple[str, str]:
    calls = len(episode.calls)
    return outcome(episode), f"{calls} call{'' if calls == 1 else 's'}"


def _opening(episode: Trajectory) -> str:
    return episode.text.removeprefix("<reason>").lstrip()


def duration(seconds: float) -> str:
    """Seconds in at most five characters below an hour, seven below a hundred: 0.02s, 3.1s, 45s, 12:05, 3:07:45."""
    if seconds < 9.95:
        return f"{seconds:.2f}s" if seconds < 0.0995 else f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def trend(values: Sequence[float]) -> str:
    """``values`` as a line of bars between their least and greatest; a middle bar where they are all equal."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    if low == high:
        return "▄" * len(finite)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low))] for value in finite)


def step_line(view: View) -> str:
    """A finished step in one line of at most ``PLAIN_WIDTH`` columns."""
    width = len(str(view.steps))
    seconds = sorted(phase_seconds(view.metrics).items(), key=lambda item: -item[1])
    shown = [figure for figure in FIGURES if figure.metric in view.metrics]
    dropped = list(_DISPENSABLE)
    while True:
        figures = "  ".join(figure.line.format(figure.show_short(view.metrics[figure.metric])) for figure in shown)
        line = "  ".join(
            filter(None, (f"step {view.step:>{width}}/{view.steps}", nothing_trained(view.metrics), figures))
        )
        times = _times(seconds, PLAIN_WIDTH - len(line) - 2)
        if times is not None or not dropped:
            return f"{line}  {times or ''}".rstrip()[:PLAIN_WIDTH]
        unwanted = dropped.pop(0)
        shown = [figure for figure in shown if figure.metric != unwanted]


def nothing_trained(metrics: Mapping[str, float]) -> str:
    """That a step left the weights as they were, with the commonest reason among its groups; "" for any other step."""
    if metrics.get(f"{_GROUPS}kept") != 0 or "grad_norm" in metrics:
        return ""
    reasons = {name.removeprefix(_GROUPS): share for name, share in metrics.items() if name.startswith(_GROUPS)}
    reason, share = max(reasons.items(), key=lambda item: item[1])
    return "nothing to train on" + (f" ({reason.replace('_', ' ')}: {share:.0%})" if share else "")


def _times(seconds: Sequence[tuple[str, float]], room: int) -> str | None:
    """All seconds, then those of as many phases as fit in ``room`` columns, longest first; None if not even two fit."""
    if not seconds:
        return ""
    for named in range(len(seconds), min(2, len(seconds)) - 1, -1):
        phases = " ".join(f"{name} {duration(value)}" for name, value in seconds[:named])
        text = f"{duration(sum(value for _, value in seconds))} ({phases})"
        if len(text) <= room:
            return text
    return None


def _activity(view: View) -> str:
    detail = f", {view.detail}" if view.detail else ""
    return beginning(f"{view.phase} for {duration(view.phase_seconds)}{detail}", PLAIN_WIDTH - 6)


def live_view(view: View, first_step: int = 0, width: int = PLAIN_WIDTH) -> RenderableType:
    """The picture on a terminal.

    Args:
        first_step: steps of the stage that were done before this process; the time left is estimated from the others.
        width: columns.
    """
    parts: list[RenderableType] = [_bar(view, first_step)]
    if view.metrics and width >= PLAIN_WIDTH:
        parts += [Text(), Columns([_figures(view), _phases(view)], padding=(0, 3))]
    elif view.metrics:
        parts += [Text(), _figures(view), Text(), _phases(view)]
    if reason := nothing_trained(view.metrics):
        parts += [Text(), Text(reason, "yellow")]
    if view.episodes:
        parts += [Text(), _episodes(view.episodes)]
    if view.phase:
        parts += [Text(), Text.assemble(("now  ", "dim"), (_activity(view), "cyan"))]
    title = Text(f"jaxrl · {printable(view.title)}", "bold")
    return Panel(Group(*parts), title=title, title_align="left", border_style="blue", padding=(0, 1), width=width)


def _bar(view: View, first_step: int) -> RenderableType:
    done = view.step - first_step
    left = ""
    if done and view.step < view.steps:
        left = f", about {duration(view.stage_seconds / done * (view.steps - view.step))} left"
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True, justify="right")
    row.add_row(
        Text.assemble((view.stage or "starting", "bold"), f"  step {view.step} of {view.steps}" if view.steps else ""),
        ProgressBar(total=max(view.steps, 1), completed=view.step, complete_style="green", finished_style="green"),
        Text(f"{duration(view.stage_seconds)}{left}", "dim"),
    )
    return row


def _figures(view: View) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    for figure in FIGURES:
        if figure.metric in view.metrics:
            style = "bold green" if figure.metric == "pass_rate" else "bold"
            value = Text(figure.show(view.metrics[figure.metric]), style)
            table.add_row(figure.label, value, figure.unit, trend(view.history.get(figure.metric, ())))
    return table


def _phases(view: View) -> RenderableType:
    """Where the last step's seconds went: a bar to scale and the figures."""
    seconds = phase_seconds(view.metrics)
    total = sum(seconds.values())
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        cells = round(10 * value / total) if total else 0
        table.add_row(printable(name), duration(value), Text("━" * cells, "magenta"))
    return table


_OUTCOME_STYLES = {"correct": "green", "wrong": "red", "no answer": "red"}


def _episodes(episodes: Sequence[Trajectory]) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for episode in episodes:
        how, calls = _summary(episode)
        text = Text(beginning(_opening(episode), PLAIN_WIDTH))
        table.add_row(Text(how, _OUTCOME_STYLES.get(how, "yellow")), calls, text)
    return Group(Text("last episodes", "dim"), table)
