"""Selection against the rStar release, the paper's tables, and properties that hold for every group."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.records import Problem, RewardStatus, StopReason, ToolCall, ToolStatus, Trajectory, Turn
from jaxrl.rl import selection
from jaxrl.rl.selection import Selection, resampling

Golden = Callable[[str], list[dict[str, Any]]]
ROC = AlgorithmConfig(keep=4, selection_settings={"min_positive": 1, "min_negative": 1})


def trajectory(
    sample: int,
    status: RewardStatus = RewardStatus.CORRECT,
    calls: tuple[ToolStatus, ...] = (ToolStatus.OK,),
    answer_tags: int = 1,
    stop_reason: StopReason = StopReason.ANSWERED,
) -> Trajectory:
    """A trajectory that makes one call a turn and then answers."""
    turns: list[Turn] = []
    for position, call in enumerate(calls):
        turns.append(Turn(2 * position, 2 * position + 1, "policy", (ToolCall("python", {}, call),)))
        turns.append(Turn(2 * position + 1, 2 * position + 2, "tool"))
    turns.append(Turn(2 * len(calls), 2 * len(calls) + 1, "policy"))
    length = 2 * len(calls) + 1
    return Trajectory(
        problem=Problem("p", "1+1?", "2"),
        draw=0,
        sample=sample,
        prompt_ids=np.arange(3, dtype=np.int32),
        ids=np.arange(length, dtype=np.int32),
        mask=np.ones(length, np.int8),
        logprobs=np.zeros(length, np.float32),
        versions=np.zeros(length, np.int32),
        turns=tuple(turns),
        stop_reason=stop_reason,
        answer_tags=answer_tags,
        reward=float(status is RewardStatus.CORRECT),
        reward_status=status,
    )


def select_group(group: list[Trajectory], config: AlgorithmConfig, rng: np.random.Generator) -> Selection:
    return selection.chooser(config).choose(group, rng)


def release_selection(case: dict[str, Any]) -> list[int]:
    """Our greedy mode, put behind what the release does around it: small groups drop, the tail is cut."""
    config = case["settings"]["config"]
    keep = config["down_sample_to_n"]
    uids, rewards = np.array(case["inputs"]["uids"]), np.array(case["inputs"]["rewards"])
    penalties = np.array(case["inputs"]["penalty_weights"])
    chosen: list[int] = []
    for uid in dict.fromkeys(uids):
        members = np.flatnonzero(uids == uid)
        if len(members) >= keep:
            kept = resampling.resample_on_correct(
                penalties[members],
                rewards[members] > 0,
                keep,
                min_positive=config["min_non_zero_reward_trace_num"],
                min_negative=config["min_zero_reward_trace_num"],
            )
            chosen += members[kept].tolist()
    chosen.sort()
    return chosen[: len(chosen) // case["settings"]["world_size"] * case["settings"]["world_size"]]


def test_text_penalties_match_the_release(golden: Golden) -> None:
    """Left out: the release's own metrics over all of them."""
    recorded = golden("rstar/penalties")
    cases = [case for case in recorded if case["id"] != "__batch_metrics__"]
    assert len(recorded) == 127
    for case in cases:
        outputs = case["outputs"]
        got = resampling.text_penalties(case["inputs"]["response_text"])
        assert got == (outputs["error_ratio_penalty"], outputs["answer_format_penalty"]), case["id"]
    assert len(cases) == 126


def test_text_penalties_rank_the_resampled_groups_of_the_release(golden: Golden) -> None:
    checked = 0
    for case in golden("rstar/resample_of_correct"):
        config = case["settings"]["config"]
        for text, expected in zip(
            case["inputs"]["response_texts"], case["inputs"].get("penalty_weights") or [], strict=False
        ):
            error, form = resampling.text_penalties(text)
            total = error * config["roc_error_ratio"] + form * config["roc_answer_format"]
            assert total == pytest.approx(expected, abs=1e-6), case["id"]
            checked += 1
    assert checked > 1000


RESAMPLING_LEFT_OUT = {
    "069_odd_n_assert": "the release fails on an odd number; here the quotas add up, see below",
    "071_odd_n_5of10": "as the one before",
    "078_do_sample_false": "a switch of the release that leaves the batch as it is; here selection is 'first'",
    "079_n_minus_one_disables": "as the one before; here keep is 0",
    "082_invalid_minima": "the release fails; here it is refused, see below",
}


def test_greedy_selection_matches_the_release(golden: Golden) -> None:
    cases = golden("rstar/resample_of_correct")
    for case in cases:
        if case["id"] not in RESAMPLING_LEFT_OUT:
            assert release_selection(case) == (case["outputs"]["chosen"] or []), case["id"]
    assert len(cases) == 83 and RESAMPLING_LEFT_OUT.keys() <= {case["id"] for case in cases}


def test_floors_above_keep_are_refused_like_in_the_release(golden: Golden) -> None:
    cases = {case["id"]: case for case in golden("rstar/resample_of_correct")}
    with pytest.raises(ValueError, match="min_positive=2 and min_negative=3 exceed keep=4"):
        release_selection(cases["082_invalid_minima"])
    # Where the release fails because both halves round the same way, the quotas still sum to keep.
    for name in ("069_odd_n_assert", "071_odd_n_5of10"):
        assert len(release_selection(cases[name])) == 5


def test_equal_reward_matches_the_release(golden: Golden) -> None:
    cases = golden("rstar/reject_equal_reward")
    for case in cases:
        uids, rewards = np.array(case["inputs"]["uids"]), np.array(case["inputs"]["rewards"], np.float32)
        equal = {uid: selection.equal_reward(rewards[uids == uid]) for uid in uids}
        assert sum(equal.values()) == case["outputs"]["metrics"]["reject_equal_reward/solve_equal_total"], case["id"]
        if case["id"] != "05_do_false":  # which counts and drops nothing
            kept = [index for index, uid in enumerate(uids) if not equal[uid]]
            world = case["settings"]["world_size"]
            assert kept[: len(kept) // world * world] == (case["outputs"]["chosen"] or []), case["id"]
    assert len(cases) == 19


def test_rejection_then_resampling_matches_the_release(golden: Golden) -> None:
    cases = golden("rstar/pipeline")
    for case in cases:
        uids, rewards = np.array(case["inputs"]["uids"]), np.array(case["inputs"]["rewards"])
        survivors = [i for i, uid in enumerate(uids) if not selection.equal_reward(rewards[uids == uid])]
        world = case["settings"]["world_size"]
        survivors = survivors[: len(survivors) // world * world]
        assert survivors == (case["outputs"]["stage1"] or []), case["id"]
        inputs = {key: [values[i] for i in survivors] for key, values in case["inputs"].items()}
        got = [survivors[i] for i in release_selection(case | {"inputs": inputs})]
        assert got == (case["outputs"]["stage2"] or []), case["id"]
    assert len(cases) == 12


@pytest.mark.parametrize(
    ("calls", "errors", "turns", "answers", "balanced", "expected"),
    [
        (3, 0, 4, 1, True, (0, 0)),
        (4, 1, 5, 1, True, (0.25, 0)),
        (0, 0, 1, 1, True, (0.5, 0)),
        (2, 2, 3, 0, True, (1, 1)),
        (1, 0, 2, 2, True, (0, 0.5)),
        (1, 1, 2, 5, True, (1, 1)),
        (1, 0, 2, 1, False, (0, 1)),
        (0, 0, 0, 1, True, (0.5, 1)),
    ],
)
def test_penalties_of_the_paper(
    calls: int, errors: int, turns: int, answers: int, balanced: bool, expected: tuple[float, float]
) -> None:
    got = resampling.error_penalty(calls, errors), resampling.format_penalty(answers, turns, balanced)
    assert got == expected


@pytest.mark.parametrize(("turns", "answers", "expected"), [(1, 1, 1.0), (2, 2, 1.0), (5, 1, 0.0)])
def test_format_penalty_without_the_first_turn_is_that_of_the_release(
    turns: int, answers: int, expected: float
) -> None:
    assert resampling.format_penalty(answers, turns - 1) == expected


def test_quota_table_of_the_release_for_32_to_16() -> None:
    negatives = {1: 15, 6: 13, 10: 11, 14: 9, 18: 7, 22: 5, 26: 3, 31: 1}
    bands = {(2, 5): 14, (7, 9): 12, (11, 13): 10, (15, 17): 8, (19, 21): 6, (23, 25): 4, (27, 30): 2}
    negatives |= {positives: kept for (low, high), kept in bands.items() for positives in range(low, high + 1)}
    assert sorted(negatives) == list(range(1, 32))
    for positives, kept in negatives.items():
        assert resampling.quotas(positives, 32 - positives, 16, min_positive=2, min_negative=2) == (16 - kept, kept)


def test_quotas_are_exact_for_every_group() -> None:
    for size in range(1, 34):
        for positives in range(size + 1):
            negatives = size - positives
            for keep in range(1, size + 3):
                for floor, down in itertools.product((-1, 0, keep // 4, keep // 2), (False, True)):
                    kept = resampling.quotas(
                        positives, negatives, keep, min_positive=floor, min_negative=floor, round_negatives_down=down
                    )
                    assert sum(kept) == min(keep, size)
                    assert 0 <= kept[0] <= positives
                    assert 0 <= kept[1] <= negatives
                    if size > keep:
                        assert kept[0] >= min(floor, positives)
                        assert kept[1] >= min(floor, negatives)
                        if floor < 1:  # nothing but rounding moves the mix
                            assert abs(kept[0] - positives * keep / size) <= 1


def test_the_papers_quotas_round_the_negatives_down() -> None:
    """arXiv 2508.20722, section 3.2: ⌊|O_neg| / 2⌋ of 2G = 32 wrong ones, correct ones for the rest of G = 16."""
    for positives in range(1, 32):
        kept_negatives = (32 - positives) // 2
        quotas = resampling.quotas(positives, 32 - positives, 16, round_negatives_down=True)
        assert quotas == (16 - kept_negatives, kept_negatives)
    assert resampling.quotas(31, 1, 16, min_negative=1, round_negatives_down=True) == (15, 1)


def test_quotas_where_both_halves_round_the_same_way() -> None:
    assert resampling.quotas(7, 7, 7) == (4, 3)  # both 3.5: half to even gives 4 + 4 = 8
    assert resampling.quotas(5, 5, 5, min_positive=1, min_negative=1) == (3, 2)  # both 2.5: 2 + 2 = 4


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.5]), st.booleans()), min_size=1, max_size=24),
    st.integers(1, 16),
    st.sampled_from(["greedy", "inverse"]),
    st.integers(0, 2**32 - 1),
)
def test_resampling_keeps_the_quotas_and_nothing_twice(
    group: list[tuple[float, bool]], keep: int, mode: Any, seed: int
) -> None:
    penalties, positive = (np.array(column) for column in zip(*group, strict=True))

    def resample() -> np.ndarray:
        rng = np.random.default_rng(seed)
        return resampling.resample_on_correct(penalties, positive, keep, mode, rng=rng)

    kept = resample()
    assert (np.diff(kept) > 0).all()
    assert len(kept) == min(keep, len(group))
    np.testing.assert_array_equal(kept, resample())
    expected = resampling.quotas(
        int(positive.sum()), int((~positive).sum()), keep, round_negatives_down=mode == "inverse"
    )
    assert (positive[kept].sum(), (~positive[kept]).sum()) == expected
    if mode == "greedy" and 0 < expected[0] < positive.sum():
        dropped = np.setdiff1d(np.flatnonzero(positive), kept)
        assert penalties[kept][positive[kept]].max() <= penalties[dropped].min()


def test_inverse_draws_positives_by_their_weight_and_negatives_uniformly() -> None:
    penalties = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 0.0, 1.0, 2.0])
    positive = np.arange(8) < 4
    rng = np.random.default_rng(0)
    first = np.zeros(8)
    for _ in range(20_000):
        kept = resampling.resample_on_correct(penalties, positive, 2, "inverse", epsilon=0.05, rng=rng)
        first[kept] += 1
    # One of four positives and one of four negatives: the share kept is the probability of the first draw.
    np.testing.assert_allclose(first[:4] / 20_000, [0.854, 0.078, 0.041, 0.028], atol=0.01)
    np.testing.assert_allclose(first[4:] / 20_000, 0.25, atol=0.015)


def test_inverse_draws_without_replacement_from_what_remains() -> None:
    penalties, positive = np.array([0.0, 0.5, 1.0, 0.0, 0.0, 0.0]), np.arange(6) < 3
    weights = 1 / (penalties[:3] + 0.1)
    share = weights / weights.sum()
    # Two of three are kept; index 2 is left out if the draws were (0, 1) or (1, 0).
    left_out = share[0] * share[1] / (1 - share[0]) + share[1] * share[0] / (1 - share[1])
    rng = np.random.default_rng(1)
    kept = [
        resampling.resample_on_correct(penalties, positive, 4, "inverse", epsilon=0.1, rng=rng) for _ in range(20_000)
    ]
    assert all(len(indices) == 4 for indices in kept)
    assert np.mean([2 not in indices for indices in kept]) == pytest.approx(left_out, abs=0.012)


def test_inverse_says_what_it_needs() -> None:
    for arguments in ({"rng": None}, {"rng": np.random.default_rng(0), "epsilon": 0.0}):
        with pytest.raises(ValueError, match="needs a random generator and epsilon > 0"):
            resampling.resample_on_correct(np.zeros(4), np.arange(4) < 2, 2, "inverse", **arguments)


def test_select_group_joins_penalties_quotas_and_order() -> None:
    wrong, error = RewardStatus.WRONG, ToolStatus.ERROR
    group = [
        trajectory(0, calls=(error, ToolStatus.OK)),  # penalty 0.5
        trajectory(1, calls=()),  # 0.5, later than 0
        trajectory(2),  # 0
        trajectory(3, calls=(error,)),  # 1
        trajectory(4, wrong, calls=(error,)),
        trajectory(5, RewardStatus.NO_ANSWER),
        trajectory(6, wrong),
        trajectory(7, wrong),
    ]
    kept = select_group(group, ROC, np.random.default_rng(0))
    assert [item.sample for item in kept.kept] == [0, 2, 4, 5]
    assert kept.rejected == ""
    statistics = kept.statistics
    assert statistics["pass_rate"] == (4, 8)
    assert statistics["pass_rate_kept"] == (2, 4)
    assert statistics["kept_share_of_correct"] == (2, 4)
    assert statistics["kept_share_of_wrong"] == (2, 4)
    assert statistics["penalty_of_correct_kept"] == (0.5, 2)
    assert statistics["penalty_of_correct_dropped"] == (1.5, 2)
    assert statistics["tool_error_share_in_correct"] == (2, 4)
    assert statistics["tool_error_share_in_correct_kept"] == (1, 3)
    assert statistics["tool_error_share_in_wrong"] == (1, 4)
    assert statistics["untrainable_share"] == (0, 8)


@pytest.mark.parametrize("method", ["roc", "roc_sampled", "first", "max_variance"])
def test_select_group_does_not_depend_on_the_order_episodes_finished_in(method: str) -> None:
    config = AlgorithmConfig(keep=4, selection=method)
    group = [
        trajectory(i, RewardStatus.CORRECT if i % 3 else RewardStatus.WRONG, (ToolStatus.OK,) * (i % 4))
        for i in range(12)
    ]
    shuffled = [group[i] for i in np.random.default_rng(3).permutation(12)]
    one = select_group(group, config, np.random.default_rng(7))
    other = select_group(shuffled, config, np.random.default_rng(7))
    assert [item.sample for item in one.kept] == [item.sample for item in other.kept]
    assert one.statistics == other.statistics


@pytest.mark.parametrize(
    ("status", "reason"), [(RewardStatus.CORRECT, "all_correct"), (RewardStatus.WRONG, "all_wrong")]
)
def test_select_group_rejects_equal_groups_on_raw_correctness(status: RewardStatus, reason: str) -> None:
    group = [trajectory(i, status) for i in range(8)]
    rejected = select_group(group, ROC, np.random.default_rng(0))
    assert (rejected.kept, rejected.rejected) == ((), reason)
    assert rejected.statistics[f"groups_{reason}"] == (1, 1)
    kept = select_group(group, dataclasses.replace(ROC, reject_equal=False), np.random.default_rng(0))
    assert [item.sample for item in kept.kept] == [0, 1, 2, 3]


def test_promise_5_a_fault_of_ours_leaves_the_batch_before_anything_else() -> None:
    crash, correct, wrong = RewardStatus.VERIFIER_CRASH, RewardStatus.CORRECT, RewardStatus.WRONG
    spoiled = [trajectory(0, crash), trajectory(1, correct, stop_reason=StopReason.INFRA_ERROR)]
    # The only correct trajectory is spoiled, so what remains is all wrong.
    rejected = select_group([*spoiled, trajectory(2, wrong), trajectory(3, wrong)], ROC, np.random.default_rng(0))
    assert rejected.rejected == "all_wrong"
    assert rejected.statistics["untrainable_share"] == (2, 4)
    assert rejected.statistics["pass_rate"] == (0, 2)
    kept = select_group([*spoiled, trajectory(2, wrong), trajectory(3)], ROC, np.random.default_rng(0))
    assert [item.sample for item in kept.kept] == [2, 3]
    nothing = select_group(spoiled, ROC, np.random.default_rng(0))
    assert (nothing.kept, nothing.rejected) == ((), "untrainable")
    assert nothing.statistics["groups_all_wrong"] == (0, 1)


def test_every_status_but_ok_is_an_error_and_a_fault_of_ours_is_no_call() -> None:
    for status in ToolStatus:
        expected = {ToolStatus.OK: (1, 0), ToolStatus.INFRA_ERROR: (0, 0)}.get(status, (1, 1))
        assert resampling.tool_counts(trajectory(0, calls=(status,))) == expected


def test_penalty_switches() -> None:
    messy = trajectory(0, calls=(ToolStatus.ERROR,), answer_tags=2)  # two policy turns
    for error, form, expected in ((True, True, 1.5), (True, False, 1.0), (False, True, 0.5), (False, False, 0.0)):
        assert resampling.penalty(messy, errors=error, form=form) == expected


@pytest.mark.parametrize(
    ("name", "holds", "spared"),
    [
        ("truncated", trajectory(0, stop_reason=StopReason.MAX_TOKENS), trajectory(0)),
        ("turn_limit", trajectory(0, stop_reason=StopReason.MAX_TURNS), trajectory(0)),
        ("wall_clock", trajectory(0, stop_reason=StopReason.WALL_CLOCK), trajectory(0)),
        ("void_turn", trajectory(0, stop_reason=StopReason.NO_CALL), trajectory(0)),
        ("no_valid_call", trajectory(0, calls=()), trajectory(0, calls=(ToolStatus.OK,))),
        (
            "no_valid_call",
            trajectory(0, calls=(ToolStatus.UNKNOWN_TOOL,)),
            trajectory(0, calls=(ToolStatus.PARSE_ERROR, ToolStatus.ERROR)),
        ),
        ("unreadable_call", trajectory(0, calls=(ToolStatus.OK, ToolStatus.PARSE_ERROR)), trajectory(0)),
        ("failed_call", trajectory(0, calls=(ToolStatus.OK, ToolStatus.TIMEOUT)), trajectory(0)),
    ],
)
def test_filters(name: str, holds: Trajectory, spared: Trajectory) -> None:
    assert selection.FILTERS[name](holds) and not selection.FILTERS[name](spared)


def test_a_filter_leaves_out_before_the_group_is_judged_and_is_counted() -> None:
    truncated = trajectory(0, RewardStatus.NO_ANSWER, stop_reason=StopReason.MAX_TOKENS)
    config = AlgorithmConfig(selection="first", keep=0, leave_out=("truncated",))
    chosen = select_group([truncated, trajectory(1), trajectory(2)], config, np.random.default_rng(0))
    assert chosen.rejected == "all_correct"
    chosen = select_group([truncated, trajectory(1), trajectory(2, RewardStatus.WRONG)], config, None)
    assert [kept.sample for kept in chosen.kept] == [1, 2]
    assert chosen.statistics["left_out_truncated"] == (1, 3) and chosen.statistics["kept"] == (2, 1)
    assert select_group([truncated], config, None).rejected == "filtered"


def test_a_masked_trajectory_stays_in_the_group_without_weight_and_is_counted() -> None:
    failed = trajectory(0, calls=(ToolStatus.ERROR,))
    config = AlgorithmConfig(selection="first", keep=0, mask_out=("failed_call", "truncated"))
    chosen = select_group([failed, trajectory(1), trajectory(2, RewardStatus.WRONG)], config, None)
    assert [kept.sample for kept in chosen.kept] == [0, 1, 2] and chosen.masked == (True, False, False)
    assert chosen.statistics["masked_failed_call"] == chosen.statistics["masked"] == (1, 3)
    assert chosen.statistics["masked_truncated"] == (0, 3)
    wrong = trajectory(1, RewardStatus.WRONG, calls=(ToolStatus.ERROR,))
    nothing = select_group([failed, wrong], config, None)
    assert chosen.statistics["groups_kept"] == (1, 1) and nothing.statistics["groups_kept"] == (0, 1)
    assert nothing.kept == () and nothing.rejected == "masked" and nothing.statistics["masked"] == (2, 2)
    assert nothing.statistics["kept"] == (0, 1) and nothing.statistics["pass_rate_kept"] == (0, 0)
    assert nothing.statistics["pass_rate"] == (1, 2)


def test_every_group_that_leaves_is_counted_under_its_reason() -> None:
    config = AlgorithmConfig(selection="first", keep=0, leave_out=("truncated",), mask_out=("failed_call",))
    wrong, failed = {"status": RewardStatus.WRONG}, {"calls": (ToolStatus.ERROR,)}
    groups = {
        "": [trajectory(0), trajectory(1, **wrong)],
        "untrainable": [trajectory(0, stop_reason=StopReason.INFRA_ERROR)],
        "filtered": [trajectory(0, stop_reason=StopReason.MAX_TOKENS)],
        "all_correct": [trajectory(0), trajectory(1)],
        "all_wrong": [trajectory(0, **wrong), trajectory(1, **wrong)],
        "masked": [trajectory(0, **failed), trajectory(1, **wrong, **failed)],
    }
    for why, group in groups.items():
        statistics = select_group(group, config, None).statistics
        counted = {name for name, (total, _) in statistics.items() if name.startswith("groups_") and total}
        assert counted == {f"groups_{why or 'kept'}"}
        assert all(statistics[f"groups_{other or 'kept'}"][1] == 1 for other in groups)


def test_the_first_and_those_of_largest_variance() -> None:
    group = [
        dataclasses.replace(
            trajectory(i), reward=reward, reward_status=RewardStatus.CORRECT if i else RewardStatus.WRONG
        )
        for i, reward in enumerate([0.5, 0.9, 0.1, 0.6, 1.0, 0.4])
    ]

    def kept(method: str, keep: int) -> list[int]:
        chosen = select_group(group, AlgorithmConfig(selection=method, keep=keep), np.random.default_rng(0))
        return [item.sample for item in chosen.kept]

    assert kept("first", 0) == kept("max_variance", 0) == kept("roc", 0) == list(range(6))
    assert kept("first", 2) == [0, 1]
    assert kept("max_variance", 3) == [1, 2, 4]
    best = max(itertools.combinations(group, 3), key=lambda three: np.var([item.reward for item in three]))
    assert kept("max_variance", 3) == [item.sample for item in best]


def test_a_selection_of_ones_own_and_what_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "def last(candidates, *, count: int = 1):\n    return np.arange(len(candidates.trajectories))[-count:]\n"
        "def wrong(candidates):\n    return [5]\n"
        "def short(trajectory):\n    return len(trajectory.ids) < 2\n"
        "def unsure(trajectory):\n    trajectory.calls\n"
        "def failing(trajectory):\n    return trajectory.tools\n"
    )
    config = AlgorithmConfig(selection=f"{file}:last", selection_settings={"count": 2}, leave_out=(f"{file}:short",))
    group = [trajectory(0), trajectory(1, RewardStatus.WRONG), trajectory(2, calls=()), trajectory(3)]
    chosen = select_group(group, config, np.random.default_rng(0))
    assert [item.sample for item in chosen.kept] == [1, 3] and chosen.statistics["left_out_short"] == (1, 4)
    for bad, words in (
        (AlgorithmConfig(selection=f"{file}:wrong"), "must give ascending indices"),
        (AlgorithmConfig(selection="rok"), "did you mean roc"),
        (AlgorithmConfig(keep=3), "min_positive=2 and min_negative=2 exceed keep=3"),
        (AlgorithmConfig(selection="roc_sampled", selection_settings={"epsilon": 0.0}), "epsilon > 0"),
        (AlgorithmConfig(leave_out=(f"{file}:unsure",)), "leave_out='.*:unsure' gave None .* must give True or False"),
        (AlgorithmConfig(mask_out=(f"{file}:unsure",)), "mask_out='.*:unsure' gave None"),
        (AlgorithmConfig(leave_out=(f"{file}:failing",)), r"leave_out='.*' raised AttributeError: .*mine.py:11\)$"),
        (AlgorithmConfig(mask_out=("trunkated",)), "did you mean truncated"),
    ):
        with pytest.raises(ConfigError, match=words):
            selection.chooser(bad)
