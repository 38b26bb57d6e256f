"""Packing with sharing: every trajectory can be read back from the tree, and its losses see what they see without."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.config import ConfigError, TrainConfig
from jaxrl.data import packing
from jaxrl.data.tree_packing import Sharing, figures, sharing_of, without_sharing
from jaxrl.records import Batch, Problem, StopReason, Trajectory
from jaxrl.rl.aggregation import aggregation_weights

ROW_TOKENS = 16
groups = st.lists(
    st.tuples(
        st.lists(st.integers(1, 3), min_size=1, max_size=6),
        st.lists(st.lists(st.integers(1, 2), max_size=7), min_size=1, max_size=6),
    ),
    max_size=4,
)
"""Prompt and responses of each group, of so few ids that many responses begin alike."""
sharings = st.sampled_from([Sharing(False, ROW_TOKENS), Sharing(True, ROW_TOKENS), Sharing(True, 3 * ROW_TOKENS)])


def trajectory(draw: int, sample: int, prompt: list[int], response: list[int], experts: bool = False) -> Trajectory:
    rng = np.random.default_rng((draw, sample))
    mask = rng.integers(0, 2, len(response)).astype(np.int8)
    recorded = np.array([*(token % 3 for token in [*prompt, *response][:-1]), -1]) if experts else None
    return Trajectory(
        problem=Problem(f"story/{draw}", "?", "1"),
        draw=draw,
        sample=sample,
        prompt_ids=np.array(prompt, np.int32),
        ids=np.array(response, np.int32),
        mask=mask,
        logprobs=(-rng.random(len(response)) * mask).astype(np.float32),
        versions=rng.integers(0, 3, len(response)).astype(np.int32),
        turns=(),
        stop_reason=StopReason.ANSWERED,
        experts=None if recorded is None else recorded.astype(np.int8)[:, None, None].repeat(2, axis=1),
    )


def of_groups(chosen: list, experts: bool = False) -> list[Trajectory]:
    return [
        trajectory(draw, sample, prompt, response, experts)
        for draw, (prompt, responses) in enumerate(chosen)
        for sample, response in enumerate(responses)
    ]


def packed(trajectories: list[Trajectory], sharing: Sharing | None, rows: int = 2) -> list[Batch]:
    weights = aggregation_weights([one.mask for one in trajectories], "sequence")
    advantages = [one.draw + one.sample / 8 - 1.5 for one in trajectories]
    return packing.pack_trajectories(
        trajectories, advantages, weights, rows=rows, row_tokens=ROW_TOKENS, sharing=sharing
    )


def beginning(batch: Batch, row: int, node: int) -> list[int]:
    """What a node sees, in order."""
    tree = batch.tree
    seen = [place for place in range(node + 1) if node < tree.ends[row, place]]
    assert tree.positions[row, seen].tolist() == list(range(len(seen)))
    return tree.tokens[row, seen].tolist()


def read_back(batches: list[Batch]) -> dict[tuple[int, ...], list[dict[str, list]]]:
    """Of every trajectory with a response its tokens, as its predictors see them, to what its losses see."""
    found: dict[tuple[int, ...], list[dict[str, list]]] = {}
    for batch in batches:
        for row, ids in enumerate(batch.segment_ids):
            for number in set(ids[ids > 0].tolist()):
                span = np.flatnonzero(ids == number)
                assert (np.diff(span) == 1).all()
                nodes = batch.tree.predictors[row, span]
                for place, node in zip(span, nodes, strict=True):
                    assert batch.tree.tokens[row, node + 1] == batch.tokens[row, place]  # what the node predicts
                whole = beginning(batch, row, nodes[-1]) + [int(batch.tokens[row, span[-1]])]
                for node, length in zip(nodes, range(len(whole) - len(span), len(whole)), strict=True):
                    assert beginning(batch, row, node) == whole[:length]
                assert batch.positions[row, span].tolist() == list(range(len(whole) - len(span), len(whole)))
                names = ("mask", "rl_weights", "advantages", "behaviour_logprobs", "proximal_logprobs", "versions")
                seen = {name: getattr(batch, name)[row, span].tolist() for name in names}
                found.setdefault(tuple(whole), []).append(seen)
    return found


@given(groups, sharings, st.integers(1, 3))
def test_every_trajectory_can_be_read_back(chosen: list, sharing: Sharing, rows: int) -> None:
    trajectories = of_groups(chosen)
    batches = packed(trajectories, sharing, rows)
    found = read_back(batches)
    weights = aggregation_weights([one.mask for one in trajectories], "sequence")
    wanted = [one for one in trajectories if len(one.ids)]
    assert sum(map(len, found.values())) == len(wanted)
    for one, weight in zip(trajectories, weights, strict=True):
        if not len(one.ids):
            continue
        seen = {
            "mask": one.mask,
            "rl_weights": weight,
            "advantages": (one.draw + one.sample / 8 - 1.5) * one.mask.astype(np.float32),
            "behaviour_logprobs": one.logprobs,
            "proximal_logprobs": one.logprobs,
            "versions": one.versions,
        }
        seen = {name: np.asarray(values).tolist() for name, values in seen.items()}
        assert seen in found[(*one.prompt_ids.tolist(), *one.ids.tolist())]
    for batch in batches:
        assert batch.tree.tokens.shape == (rows, ROW_TOKENS) and batch.tokens.shape == (rows, sharing.loss_tokens)
        assert ((batch.tree.copies > 0) == (batch.tree.ends > 0)).all()
        assert (batch.tree.predictors[batch.segment_ids == 0] == -1).all()
    assert sum(batch.tree.copies.sum() for batch in batches) == sum(
        len(one.prompt_ids) + len(one.ids) for one in trajectories
    )


@given(groups, sharings, st.randoms(use_true_random=False))
def test_packing_does_not_depend_on_the_order_of_its_input(chosen: list, sharing: Sharing, random: object) -> None:
    trajectories = of_groups(chosen, experts=True)
    first = packed(trajectories, sharing)
    random.shuffle(trajectories)
    jax.tree.map(np.testing.assert_array_equal, first, packed(trajectories, sharing))


@given(groups, sharings)
def test_nodes_compute_with_the_experts_that_were_recorded(chosen: list, sharing: Sharing) -> None:
    for batch in packed(of_groups(chosen, experts=True), sharing):
        recorded, real = batch.experts[..., 0, 0], batch.tree.copies > 0
        assert batch.experts.shape == (2, ROW_TOKENS, 2, 1)
        known = real & (recorded >= 0)
        assert (recorded[known] == batch.tree.tokens[known] % 3).all()
        assert (recorded[~real] == -1).all()
        used = np.take_along_axis(recorded, np.maximum(batch.tree.predictors, 0), axis=1)
        assert (used[batch.tree.predictors >= 0] >= 0).all()


def nodes(batches: list[Batch]) -> int:
    return sum(int((batch.tree.copies > 0).sum()) for batch in batches)


def test_a_shared_prompt_is_there_once_and_a_tree_shares_beginnings_too() -> None:
    prompt, responses = [1, 2, 3, 2], [[1, 1, 2], [1, 1, 1], [2, 1]]
    together = of_groups([(prompt, responses)])
    # A copy of the prompt's last token heads every response.
    assert nodes(packed(together, Sharing(False, ROW_TOKENS))) == 3 + (1 + 3) + (1 + 3) + (1 + 2)
    # Two responses share their first two tokens, the second of which heads both third ones.
    assert nodes(packed(together, Sharing(True, ROW_TOKENS))) == 3 + (1 + 1) + (1 + 1) + (1 + 1) + (1 + 2)
    assert figures([packed(together, Sharing(False, ROW_TOKENS))]) == {"packing/tokens_per_node": 20 / 14}
    assert figures([packed(together, None)]) == {}


def test_groups_share_nothing_with_each_other() -> None:
    same = [([1, 2, 3], [[1, 2]])] * 2
    for sharing in (Sharing(False, ROW_TOKENS), Sharing(True, ROW_TOKENS)):
        assert nodes(packed(of_groups(same), sharing)) == 2 * 5


def test_a_group_too_large_for_a_row_repeats_its_prompt_in_another() -> None:
    batches = packed(of_groups([([1] * 6, [[1, 2, sample % 2 + 1, 2] for sample in range(4)])]), Sharing(False, 16), 1)
    assert [int(batch.segment_ids.max()) for batch in batches] == [2, 2]
    assert [int((batch.tree.copies > 0).sum()) for batch in batches] == [5 + 2 * 5] * 2


def test_trajectories_of_a_group_fill_rows_side_by_side() -> None:
    """In the order they come in, the three short ones would fill a row alone."""
    trajectories = of_groups([([1] * 5, [[sample + 1] * (2 if sample < 3 else 8) for sample in range(6)])])
    (batch,) = packed(trajectories, Sharing(False, ROW_TOKENS), 3)
    assert batch.segment_ids.max(axis=1).tolist() == [2, 2, 2]


def test_rows_are_full_when_their_losses_are() -> None:
    """Sixteen equal answers are one branch, but the losses of each need room."""
    trajectories = of_groups([([1, 2], [[1, 2, 1, 1]] * 16)])
    assert [int(batch.segment_ids.max()) for batch in packed(trajectories, Sharing(True, 16), 1)] == [4] * 4
    assert [int(batch.segment_ids.max()) for batch in packed(trajectories, Sharing(True, 64), 1)] == [16]


def test_trajectories_that_recorded_other_experts_do_not_share() -> None:
    one, two = of_groups([([1, 2, 3], [[1, 2, 2], [1, 2, 1]])], experts=True)
    assert nodes(packed([one, two], Sharing(True, ROW_TOKENS))) == 4 + 2 + 2
    other = one.experts.copy()
    other[1] += 1
    changed = dataclasses.replace(two, experts=other)
    assert nodes(packed([one, changed], Sharing(True, ROW_TOKENS))) == 1 + 5 + 5
    without = dataclasses.replace(two, experts=None)
    assert nodes(packed([one, without], Sharing(True, ROW_TOKENS))) == 12


@pytest.mark.parametrize("sharing", [Sharing(False, ROW_TOKENS), Sharing(True, 3 * ROW_TOKENS)])
def test_rows_that_share_nothing_take_the_same_form(sharing: Sharing) -> None:
    sequences = [(np.arange(1, size + 1), np.r_[0, np.ones(size - 1)]) for size in (5, 9, 16, 2)]
    (plain,) = packing.pack_sequences(sequences, rows=3, row_tokens=ROW_TOKENS)
    batch = without_sharing(plain, sharing)
    assert batch.tokens.shape == (3, sharing.loss_tokens) and without_sharing(batch, sharing) is batch
    assert without_sharing(plain, None) is plain
    np.testing.assert_array_equal(batch.tree.tokens, plain.tokens)
    for row, (ids, predictors) in enumerate(zip(plain.segment_ids, batch.tree.predictors, strict=True)):
        for place in range(ROW_TOKENS):
            own = [key for key in range(place + 1) if ids[key] == ids[place] > 0]
            if own:
                assert beginning(batch, row, place) == plain.tokens[row, own].tolist()
            assert predictors[place] == (place - 1 if len(own) > 1 else -1)
    assert (batch.tree.predictors[:, ROW_TOKENS:] == -1).all()
    assert batch.ce_weights.sum() == pytest.approx(plain.ce_weights.sum())


def test_losses_that_compare_a_group_know_whose_a_token_is() -> None:
    trajectories = of_groups([([1, 2], [[1, 2], [1, 1]]), ([3, 2], [[2]])])
    weights = aggregation_weights([one.mask for one in trajectories], "token")
    shape = {"rows": 1, "row_tokens": ROW_TOKENS, "sharing": Sharing(True, 2 * ROW_TOKENS)}
    (batch,) = packing.pack_trajectories(trajectories, [0.0] * 3, weights, groups=[7, 7, 9], **shape)
    assert batch.groups[0, :6].tolist() in ([7, 7, 7, 7, 9, 0], [9, 7, 7, 7, 7, 0])
    assert packing.pack_trajectories(trajectories, [0.0] * 3, weights, **shape)[0].groups is None


def test_what_a_configuration_names() -> None:
    assert sharing_of(TrainConfig(row_tokens=8)) is None
    assert sharing_of(TrainConfig(row_tokens=8, packing="shared_prompt")) == Sharing(False, 8)
    assert sharing_of(TrainConfig(row_tokens=8, packing="tree", tree_loss_rows=3)) == Sharing(True, 24)


def test_a_trajectory_that_fits_no_row_is_named() -> None:
    with pytest.raises(ConfigError, match=r'"story/0" .* 17 tokens .* raise TrainConfig\.row_tokens'):
        packed(of_groups([([1] * 12, [[1] * 5])]), Sharing(False, ROW_TOKENS))
