import io
import re
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.observe.metrics import PhaseTimer
from jaxrl.observe.progress import FIGURES, Progress, View, duration, live_view, step_line, trend
from jaxrl.observe.terminal import plain_text
from jaxrl.records import Trajectory

METRICS = {
    "pass_rate": 0.525,
    "tool_error_share": 0.2,
    "response_tokens": 143.2,
    "tokens_per_second": 1234.4,
    "seconds/rollout": 3.0,
    "seconds/update": 1.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_one_a_step_with_every_fact(episode: Trajectory) -> None:
    file = io.StringIO()
    with Progress("quickstart", file=file, heartbeat=0.0001, clock=iter(range(10_000)).__next__) as progress:
        progress.stage("reinforcement", 2)
        progress.step(METRICS, [episode])
        progress.note("eval: better")
        progress.step(METRICS)
    lines = file.getvalue().splitlines()
    assert lines == [
        "reinforcement: 2 steps",
        "step 1/2  pass 52.5%  tool-err 20%  len 143  1234 tok/s  4.0s (rollout 3.0s update 1.0s)",
        "  correct, 1 call: I add them.<call>print(3 + 4)</call>|[7]||The sum is 7.|",
        "eval: better",
        "step 2/2  pass 52.5%  tool-err 20%  len 143  1234 tok/s  4.0s (rollout 3.0s update 1.0s)",
    ]
    assert "\x1b" not in file.getvalue()


def test_the_live_view_shows_the_same_facts(episode: Trajectory, wrong_episode: Trajectory) -> None:
    view = View(
        "quickstart",
        stage="reinforcement",
        step=3,
        steps=100,
        phase="rollout",
        detail="112 of 256 episodes",
        metrics=METRICS,
        history={"pass_rate": (0.1, 0.3, 0.525)},
        episodes=(episode, wrong_episode),
        stage_seconds=30.0,
        phase_seconds=12.0,
    )
    text = plain_text(live_view(view, first_step=1))
    for fact in [
        "quickstart", "reinforcement  step 3 of 100", "30s, about 24:15 left", "pass rate", "52.5%", "▁▄█", "20.0%",
        "143  tokens", "1,234  tokens/s", "rollout", "3.0s", "update", "1.0s", "rollout for 12s, 112 of 256 episodes",
        "correct  1 call   I add them.", "wrong    2 calls  I add them.",
    ]:  # fmt: skip
        assert fact in text, f"{fact!r} is not in\n{text}"
    assert len(text.splitlines()) <= 20, "must fit on a terminal of 24 lines"
    for width in (60, 80, 100):
        assert all(len(line) <= width for line in plain_text(live_view(view, width=width), width=width).splitlines())


def test_the_live_view_draws_on_a_terminal_and_notes_stay_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    with Progress("quickstart", file=file) as progress:
        progress.stage("reinforcement", 2)
        progress.step(METRICS)
        progress.note("\x1b[2Jkept")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "step 1 of 2" in text and "52.5%" in text
    assert "␛[2Jkept\n" in text


def test_dumb_terminals_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with Progress("quickstart", file=file) as progress:
        progress.stage("reinforcement", 1)
        progress.step(METRICS)
    assert "\x1b" not in file.getvalue() and "step 1/1" in file.getvalue()


def test_stages_of_short_steps_show_some_and_the_last() -> None:
    file = io.StringIO()
    with Progress("quickstart", file=file) as progress:
        progress.stage("cold start", 25, first=5, every=10)
        for _ in range(20):
            progress.step({"loss": 0.5})
    assert [line.split()[:2] for line in file.getvalue().splitlines()] == [
        ["cold", "start:"], ["step", "10/25"], ["step", "20/25"], ["step", "25/25"],
    ]  # fmt: skip


def test_long_silence_is_broken_and_the_heartbeat_ends_with_the_run() -> None:
    file = io.StringIO()
    with Progress("quickstart", file=file, heartbeat=0.05) as progress:
        timer = PhaseTimer(progress.phase)
        with timer.phase("compiling"):
            progress.detail("decode round")
            deadline = time.monotonic() + 10
            while "compiling" not in file.getvalue() and time.monotonic() < deadline:
                time.sleep(0.02)
    assert re.search(r"^  \.\.\. compiling for 0\.\d+s, decode round$", file.getvalue(), re.MULTILINE)
    assert not any(thread.name == "progress heartbeat" for thread in threading.enumerate())


def test_output_that_cannot_hold_a_character_gets_a_question_mark(episode: Trajectory) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    with Progress("quickstart", file=file) as progress:
        progress.note("π")
    file.flush()
    assert raw.getvalue() == b"?\n"


_finite = st.floats(0, 1e12)


@given(
    st.fixed_dictionaries(
        {}, optional={figure.metric: _finite for figure in FIGURES} | {"select/groups_kept": st.just(0.0)}
    ),
    st.dictionaries(st.text("abcdefgh ", min_size=1, max_size=12), st.floats(0, 1e6), max_size=6),
)
def test_a_line_never_exceeds_its_width(figures: dict[str, float], seconds: dict[str, float]) -> None:
    metrics = figures | {f"seconds/{name}": value for name, value in seconds.items()}
    assert len(step_line(View("x", step=7, steps=1000, metrics=metrics))) <= 100


def test_the_ordinary_line_keeps_the_seconds_and_the_cut_share() -> None:
    metrics = METRICS | {"capped_share": 0.012, "grad_norm": 0.4, "loss": -0.1, "seconds/grading": 0.1}
    line = step_line(View("x", step=1, steps=100, metrics=metrics))
    assert (
        line == "step   1/100  pass 52.5%  tool-err 20%  len 143  cut 1%  1234 tok/s  4.1s (rollout 3.0s update 1.0s)"
    )


def test_a_step_that_trains_on_nothing_says_so_and_why() -> None:
    groups = {"select/groups_kept": 0.0, "select/groups_all_correct": 0.25, "select/groups_all_wrong": 0.75}
    view = View("x", step=1, steps=2, metrics={"pass_rate": 0.25, **groups})
    assert step_line(view) == "step 1/2  nothing to train on (all wrong: 75%)  pass 25.0%"
    assert "nothing to train on (all wrong: 75%)" in plain_text(live_view(view))
    for more in ({"select/groups_kept": 0.1}, {"grad_norm": 0.5}):  # the latter: of demonstrations
        assert "nothing" not in step_line(View("x", step=1, steps=2, metrics=view.metrics | more))
    chosen_none = {"select/groups_kept": 0.0, "select/groups_all_wrong": 0.0}
    assert step_line(View("x", step=1, steps=2, metrics=chosen_none)) == "step 1/2  nothing to train on"


def test_figures_a_step_does_not_have_are_left_out() -> None:
    assert step_line(View("x", step=1, steps=2, metrics={"loss": 0.25})) == "step 1/2  loss 0.25"
    assert "pass rate" not in plain_text(live_view(View("x", step=1, steps=2, metrics={"loss": 0.25})))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.023, "0.02s"), (3.14, "3.1s"), (9.96, "10s"), (59.6, "1:00"), (725, "12:05"), (11265, "3:07:45")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_trends() -> None:
    assert trend([0, 7, 3.5, 7]) == "▁█▅█"
    assert trend([2, 2]) == "▄▄"
    assert trend([float("nan")]) == ""
