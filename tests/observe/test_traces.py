import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.observe.terminal import plain_text
from jaxrl.observe.traces import FORMAT, format_trajectory, from_json, read_episodes, to_json, write_episodes
from jaxrl.records import Problem, RewardStatus, StopReason, ToolCall, ToolStatus, Trajectory, Turn

DOCUMENT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "episodes.md"


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def assert_equal(left: Trajectory, right: Trajectory) -> None:
    for field in dataclasses.fields(Trajectory):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name


def test_episodes_read_back_equal(tmp_path: pathlib.Path, episode: Trajectory, wrong_episode: Trajectory) -> None:
    path = write_episodes(tmp_path, "rl", 12, [episode, wrong_episode])
    assert path == tmp_path / "episodes" / "rl_000012.jsonl"
    for written, read in zip([episode, wrong_episode], read_episodes(path), strict=True):
        assert_equal(written, read)


_text = st.text(st.characters(), max_size=20)


@given(
    logprobs=st.lists(st.floats(-(2.0**100), 0, width=32), max_size=20),
    text=_text,
    status=st.sampled_from(ToolStatus),
    stop=st.sampled_from(StopReason),
    reward=st.sampled_from(RewardStatus),
    answer=st.none() | _text,
    experts=st.none() | st.sampled_from((np.int8, np.int16)),
)
def test_any_trajectory_round_trips_through_json(
    logprobs: list[float],
    text: str,
    status: ToolStatus,
    stop: StopReason,
    reward: RewardStatus,
    answer: str | None,
    experts: type | None,
) -> None:
    count = len(logprobs)
    call = ToolCall("python", {"code": text, "n": 1}, status, stdout=text, stderr=text, seconds=0.1)
    trajectory = Trajectory(
        problem=Problem("id", text, text),
        draw=0,
        sample=0,
        prompt_ids=np.arange(3, dtype=np.int32),
        ids=np.arange(count, dtype=np.int32),
        mask=np.ones(count, np.int8),
        logprobs=np.array(logprobs, np.float32),
        versions=np.zeros(count, np.int32),
        turns=(Turn(0, count, "policy", (call,)),),
        stop_reason=stop,
        text=text,
        answer=answer,
        reward_status=reward,
        experts=None if experts is None else np.arange(-1, 6 * (3 + count) - 1).reshape(-1, 3, 2).astype(experts),
    )
    assert_equal(trajectory, from_json(json.loads(json.dumps(to_json(trajectory)))))


def test_writing_again_replaces_and_an_interrupted_write_leaves_the_old_file(
    tmp_path: pathlib.Path, episode: Trajectory, wrong_episode: Trajectory
) -> None:
    path = write_episodes(tmp_path, "rl", 1, [episode, episode])
    write_episodes(tmp_path, "rl", 1, [episode])
    assert [read.correct for read in read_episodes(path)] == [True]

    def interrupted() -> Iterator[Trajectory]:
        yield wrong_episode
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_episodes(tmp_path, "rl", 1, interrupted())
    assert [read.correct for read in read_episodes(path)] == [True]


def test_unreadable_rows_are_named(tmp_path: pathlib.Path, episode: Trajectory) -> None:
    path = write_episodes(tmp_path, "rl", 1, [episode])
    row = to_json(episode)
    for broken, message in [
        (row | {"format": FORMAT + 1}, "episode format 2"),
        ({name: value for name, value in row.items() if name != "ids"}, "KeyError: 'ids'"),
        (row | {"surprise": 1}, "surprise"),
        (row | {"stop_reason": "tired"}, "tired"),
    ]:
        path.write_text(json.dumps(row) + "\n" + json.dumps(broken) + "\n")
        with pytest.raises(ValueError, match=rf"rl_000001.jsonl:2: .*{message}"):
            read_episodes(path)


def test_every_field_of_the_format_is_documented() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    for record in (Trajectory, Problem, Turn, ToolCall):
        for field in dataclasses.fields(record):
            assert f"`{field.name}`" in document, f"{record.__name__}.{field.name} is not in docs/episodes.md"
    for enumeration in (ToolStatus, StopReason, RewardStatus):
        for member in enumeration:
            assert f"`{member}`" in document, f"{enumeration.__name__} {member} is not in docs/episodes.md"


def test_the_mask_shows_without_colours(episode: Trajectory) -> None:
    lines = plain_text(format_trajectory(episode, decode)).splitlines()
    sampled = [line for line in lines if line.startswith("▌ ")]
    environment = [line for line in lines if line.startswith("┊ ")]
    assert "".join(line[2:] for line in sampled) == "I add them.<call>print(3 + 4)</call>||The sum is 7.|"
    assert [line[2:] for line in environment] == ["Q: 3 + 4?", "[7]|"]


def test_the_mask_shown_is_the_masks_own_not_the_turns(episode: Trajectory) -> None:
    mask = episode.mask.copy()
    mask[0:6] = 0  # written by the environment, though inside a policy turn
    lines = plain_text(format_trajectory(dataclasses.replace(episode, mask=mask), decode)).splitlines()
    assert "┊ I add" in lines
    assert "environment  6 tokens, mask 0" in lines


def test_calls_results_and_reward_are_shown(episode: Trajectory, wrong_episode: Trajectory) -> None:
    text = plain_text(format_trajectory(episode, decode))
    assert "call 1  python ok  0.004 s, 0.010 s in the queue, isolation namespaces" in text
    assert "    print(3 + 4)\n  stdout:\n    7\n" in text
    assert "reward 1, correct  answer '7', wanted '7', stopped: answered" in text
    text = plain_text(format_trajectory(wrong_episode, decode))
    assert "call 2  python error" in text and "NameError: x" in text and "reward 0, wrong" in text
    fault = dataclasses.replace(episode, stop_reason=StopReason.INFRA_ERROR)
    assert "no reward, left out" in plain_text(format_trajectory(fault, decode))


def test_long_lines_keep_their_mark_and_the_terminal_stays_ours(episode: Trajectory) -> None:
    ids = np.array([ord(letter) for letter in "\x1b[2J" + "word " * 60], np.int32)
    long = dataclasses.replace(
        episode,
        ids=ids,
        mask=np.ones(len(ids), np.int8),
        logprobs=np.zeros(len(ids), np.float32),
        versions=np.zeros(len(ids), np.int32),
        turns=(Turn(0, len(ids), "policy"),),
    )
    text = plain_text(format_trajectory(long, decode), width=60)
    assert "\x1b" not in text and "␛[2J" in text
    marked = [line for line in text.splitlines() if "word" in line]
    assert len(marked) > 4 and all(line.startswith("▌ ") and len(line) <= 60 for line in marked)
