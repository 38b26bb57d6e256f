"""What is too old to be trained on, and what is shown of how old the rest is."""

import types

import numpy as np

from jaxrl.rl import staleness


def sampled(*versions: int) -> types.SimpleNamespace:
    """A trajectory of these tokens; -1 is one that the environment wrote."""
    array = np.array(versions, np.int32)
    return types.SimpleNamespace(versions=array, mask=(array >= 0).astype(np.int8))


def test_the_oldest_token_decides_and_what_the_environment_wrote_does_not() -> None:
    old, mixed, new, nothing = sampled(3, 3), sampled(4, -1, 7), sampled(-1, 7), sampled()
    assert [staleness.oldest(one, 7) for one in (old, mixed, new, nothing)] == [4, 3, 0, 0]
    assert staleness.young([old, mixed, new, nothing], 7, 3) == (mixed, new, nothing)
    assert staleness.young([old, mixed, new], 7, 0) == (new,)


def test_figures_are_over_sampled_tokens_of_what_is_trained_on() -> None:
    figures = staleness.figures([sampled(4, -1, 7), sampled(-1, 7, 7)], dropped=2, version=7)
    assert figures == {
        "staleness/dropped_share": 0.5,
        "staleness/mean": 3 / 4,
        "staleness/max": 3.0,
        "staleness/mixed_share": 0.5,
    }
    assert staleness.figures([], 0, 7) == {"staleness/dropped_share": 0.0}
    assert staleness.figures([sampled(-1)], 1, 7) == {"staleness/dropped_share": 0.5}
