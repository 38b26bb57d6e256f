"""Tries against a slow, clear reference: sets of beginnings."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.data.tries import agreement, trie

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9)
"""Of so few ids that many begin alike, and some are equal or the beginning of another."""


def nodes_of(sequence: list[int]) -> list[tuple]:
    """The nodes of one sequence: what comes before and the token, with the token that follows, or the end."""
    followed = [*sequence, None]
    return [tuple(followed[: place + 2]) for place in range(len(sequence))]


def built(chosen: list[list[int]]) -> tuple[list[list[int]], object]:
    ordered = sorted(chosen)
    arrays = [np.array(sequence) for sequence in ordered]
    shared = [0, *(agreement(first, second) for first, second in itertools.pairwise(arrays))]
    return ordered, trie([len(sequence) for sequence in ordered], shared)


@given(sequences)
def test_agreement_counts_common_nodes(chosen: list[list[int]]) -> None:
    first, second = chosen[0], chosen[-1]
    wanted = len(set(nodes_of(first)) & set(nodes_of(second)))
    assert agreement(np.array(first), np.array(second)) == wanted
    assert agreement(np.array(first), np.array(second), limit=2) == min(wanted, 2)


@given(sequences)
def test_every_node_is_there_once_and_sees_its_path(chosen: list[list[int]]) -> None:
    ordered, nodes = built(chosen)
    found: dict[int, tuple] = {}
    for sequence, places in zip(ordered, nodes.places, strict=True):
        for place, node in zip(places, nodes_of(sequence), strict=True):
            assert found.setdefault(int(place), node) == node
    assert sorted(found) == list(range(len(nodes.ends)))
    assert len(set(found.values())) == len(found) == len({node for each in ordered for node in nodes_of(each)})
    for place in found:
        sees = [key for key in range(place + 1) if place < nodes.ends[key]]
        owner = next(places for places in nodes.places if place in places)
        assert sees == [int(key) for key in owner if key <= place]


@given(sequences)
def test_copies_count_the_sequences_that_have_a_node(chosen: list[list[int]]) -> None:
    ordered, nodes = built(chosen)
    assert nodes.copies.sum() == sum(map(len, ordered))
    for place, copies in enumerate(nodes.copies):
        assert copies == sum(place in places for places in nodes.places)


def test_values_that_differ_part_what_tokens_would_share() -> None:
    first, second = np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])
    experts = np.zeros((4, 2, 1), np.int8)
    other = experts.copy()
    other[1] = 7
    assert agreement(first, second, (experts, experts)) == 2
    assert agreement(first, second, (experts, other)) == 1


def test_what_is_placed_can_be_read_back() -> None:
    ordered, nodes = built([[0, 1, 2], [0, 1, 2], [0, 1], [0, 2, 1, 1]])
    tokens = np.full(len(nodes.ends), -1)
    for sequence, places in zip(ordered, nodes.places, strict=True):
        tokens[places] = sequence
    assert tokens.tolist() == [0, 1, 1, 2, 0, 2, 1, 1]  # [0 1.] [0 1 2.] twice, and [0] again, with 2 after it
    assert nodes.copies.tolist() == [3, 1, 2, 2, 1, 1, 1, 1]
    assert nodes.ends.tolist() == [4, 2, 4, 4, 8, 8, 8, 8]
