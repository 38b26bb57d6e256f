"""A reward model that ``jaxrl prefer`` trained, as a reward."""

import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from jaxrl.config import ConfigError
from jaxrl.model import hf, value
from jaxrl.records import Trajectory

LEAST_TOKENS = 64
"""Rows are padded to this length or a power of two above it, so that few shapes are compiled."""


class RewardModel:
    """A decoder with a value head, on the first device."""

    def __init__(self, folder: str) -> None:
        """
        Args:
            folder: the export of a run of kind "reward" or "process".

        Raises:
            ConfigError: no such model there.
        """
        check_folder(folder)
        path = pathlib.Path(folder)
        config, decoder = hf.load_folder(path)
        params = {value.DECODER: decoder, value.HEAD: value.load_head(path, config.width)}
        self._params = jax.device_put(params, jax.local_devices()[0])
        self._vocab_size = config.vocab_size
        self._score = jax.jit(functools.partial(value.token_values, config=config))

    def compile(self, longest: int) -> None:
        """Compile for texts of at most ``longest`` tokens, so that nothing is compiled once training runs."""
        width = LEAST_TOKENS
        while width <= padded_length(longest):
            self.values(np.zeros(width, np.int32))
            width *= 2

    def values(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """[T] float32: the value after each token of a text.

        Args:
            ids: [T], of the tokenizer the model was trained with.

        Raises:
            ValueError: an id beyond its vocabulary.
        """
        ids = np.asarray(ids, np.int32)
        if len(ids) and int(ids.max()) >= self._vocab_size:
            raise ValueError(f"id {ids.max()} is beyond the reward model's vocabulary of {self._vocab_size}")
        width = padded_length(len(ids))
        row = np.zeros((3, 1, width), np.int32)
        row[0, 0, : len(ids)], row[1, 0], row[2, 0, : len(ids)] = ids, np.arange(width), 1
        tokens, positions, segment_ids = row
        values = self._score(self._params, tokens=tokens, positions=positions, segment_ids=segment_ids)
        return np.asarray(values)[0, : len(ids)]

    def of_trajectory(self, trajectory: Trajectory) -> float:
        """The value of a whole episode: after its last token."""
        return float(self.values(np.concatenate([trajectory.prompt_ids, trajectory.ids]))[-1])

    def of_turns(self, trajectory: Trajectory) -> np.ndarray:
        """[policy turns]: σ of the value at the end of each, the chance that it is right by a process reward model."""
        values = self.values(np.concatenate([trajectory.prompt_ids, trajectory.ids]))
        ends = [len(trajectory.prompt_ids) + turn.end - 1 for turn in trajectory.turns if turn.author == "policy"]
        return 1 / (1 + np.exp(-values[ends]))


def padded_length(tokens: int) -> int:
    """How long the row of a text is."""
    return max(LEAST_TOKENS, 1 << max(tokens - 1, 0).bit_length())


def check_folder(folder: str) -> None:
    """Refuse a folder without a reward model.

    Raises:
        ConfigError: with the remedy.
    """
    if not (pathlib.Path(folder) / value.HEAD_FILE).is_file():
        raise ConfigError(
            f"{folder!r} holds no {value.HEAD_FILE}; give the folder export of a run of `jaxrl prefer` with "
            "PreferConfig.kind='reward' or 'process'"
        )


@functools.lru_cache(maxsize=4)
def loaded(folder: str) -> RewardModel:
    """The reward model of a folder, read once."""
    return RewardModel(folder)
