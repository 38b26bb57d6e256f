import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.observe.metrics import Accumulator, PhaseTimer, episode_pairs, means, phase_seconds
from jaxrl.records import RewardStatus, StopReason, ToolStatus, Trajectory


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=8), min_size=1, max_size=5))
def test_accumulated_batches_have_the_mean_of_all_their_observations(batches: list[list[float]]) -> None:
    accumulator = Accumulator()
    for batch in batches:
        accumulator.merge({"x": (sum(batch), len(batch))})
    assert accumulator.means()["x"] == pytest.approx(np.mean(np.concatenate(batches)), abs=1e-9)


def test_what_was_never_counted_is_absent_rather_than_zero() -> None:
    accumulator = Accumulator()
    accumulator.add("none", 0, 0)
    accumulator.add("one", 2)
    assert accumulator.means() == {"one": 2.0}


def test_episode_pairs_count_as_documented(episode: Trajectory, wrong_episode: Trajectory) -> None:
    pairs = episode_pairs([episode, wrong_episode])
    assert pairs["pass_rate"] == (1, 2)
    assert pairs["calls"] == (3, 2)
    assert pairs["tool_error_share"] == (2, 3)
    assert pairs["tool_error_share_in_correct"] == (0, 1)
    assert pairs["repeated_call_share"] == (1, 3)
    assert pairs["turns"] == (4, 2)
    assert pairs["policy_tokens"] == (2 * (len(episode.ids) - 4), 2)
    assert pairs["response_tokens"] == (2 * len(episode.ids), 2)
    assert pairs["capped_share"] == (0, 2)
    assert means(episode_pairs([episode], max_response_tokens=len(episode.ids)))["capped_share"] == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"stop_reason": StopReason.INFRA_ERROR},
        {"reward_status": RewardStatus.VERIFIER_TIMEOUT},
        {"reward_status": RewardStatus.VERIFIER_CRASH},
    ],
)
def test_faults_of_ours_count_as_such_and_never_against_the_model(episode: Trajectory, fault: dict) -> None:
    pairs = episode_pairs([episode, dataclasses.replace(episode, **fault)])
    assert pairs["infra_share"] == (1, 2)
    assert pairs["pass_rate"] == (1, 1)


def test_an_infra_error_of_a_call_is_no_tool_error(episode: Trajectory) -> None:
    call = dataclasses.replace(episode.calls[0], status=ToolStatus.INFRA_ERROR)
    turns = (dataclasses.replace(episode.turns[0], calls=(call,)), *episode.turns[1:])
    assert episode_pairs([dataclasses.replace(episode, turns=turns)])["tool_error_share"] == (0, 1)


def test_nested_phases_add_up_to_the_wall_clock() -> None:
    now = 100.0
    names = []
    timer = PhaseTimer(names.append, clock=lambda: now)
    with timer.phase("rollout"):
        now += 3
        with timer.phase("grading"):
            now += 2
        now += 1
    now += 50  # between phases: nobody's time
    with timer.phase("update"):
        now += 4
        first = timer.take()
        now += 5
    assert first == {"rollout": 4, "grading": 2, "update": 4}
    assert timer.take() == {"update": 5}
    assert names == ["rollout", "grading", "rollout", "", "update", ""]


def test_a_phase_that_raises_is_counted_and_left() -> None:
    now = 0.0
    timer = PhaseTimer(clock=lambda: now)
    with pytest.raises(KeyError), timer.phase("update"):
        now += 2
        raise KeyError
    now += 7
    assert timer.take() == {"update": 2}


def test_phase_seconds_are_found_by_their_prefix() -> None:
    assert phase_seconds({"seconds/rollout": 2.0, "loss": 1.0, "seconds/update": 3.0}) == {
        "rollout": 2.0,
        "update": 3.0,
    }
