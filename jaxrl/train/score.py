"""What weights that are not being trained, a reference or those of before, say of played tokens."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl import mesh as meshes
from jaxrl.config import ModelConfig, TrainConfig
from jaxrl.data import packing
from jaxrl.data.tree_packing import Sharing, sharing_of, without_sharing
from jaxrl.model import logprob
from jaxrl.model.lora import Base
from jaxrl.records import Batch, Trajectory
from jaxrl.train.placement import Placement


def _logprobs(*arguments: Any) -> jax.Array:
    return logprob.sequence_logprobs(*arguments).logprobs


class Scorer:
    """Scores micro-batches of the one shape that ``compile`` was given. Of several processes each has the contents of
    its own trajectories alone, see ``Placement``, and gets what is said of all; they score together.

    Args:
        value: of a micro-batch and the statistic [B, T] of its tokens, what is asked for, [B, T].
        statistic: takes what ``logprob.sequence_logprobs`` takes; the log-probabilities unless said otherwise.
        experts: of a token, see ``Batch.zeros``, for weights that compute with the experts a batch has recorded;
            None lets their own router choose.
        sharing: as the micro-batches were packed.
        temperature: the sampler's.
        launches: held while work is handed to the devices; see ``Engine``.
        base: frozen weights; what is scored under are then adapters on them.
    """

    def __init__(
        self,
        value: Callable[[Batch, jax.Array], jax.Array],
        model: ModelConfig,
        temperature: float,
        mesh: jax.sharding.Mesh,
        launches: contextlib.AbstractContextManager[Any],
        base: Base | None = None,
        *,
        experts: jax.ShapeDtypeStruct | None = None,
        sharing: Sharing | None = None,
        statistic: Callable[..., jax.Array] = _logprobs,
    ) -> None:
        def score(params: Any, base: Base | None, batch: Batch) -> jax.Array:
            whole = params if base is None else base.adapted(params)
            rows = batch.tokens, batch.positions, batch.segment_ids
            scored = statistic(whole, model, *rows, temperature, batch.experts, batch.tree)
            return meshes.to_compute(value(batch, scored), (None, None))

        self._mesh, self._launches, self._base = mesh, launches, base
        self._experts, self._sharing = experts, sharing
        self._place = Placement(mesh, pooled=True)
        self._score: Callable[..., jax.Array] = jax.jit(score)

    def compile(self, params: Any, rows: int, row_tokens: int) -> None:
        """Compile for micro-batches [rows, row_tokens] and weights placed like ``params``."""
        with jax.set_mesh(self._mesh):
            placed = self._placed(Batch.zeros(rows, row_tokens))
            self._score = self._score.lower(params, self._base, placed).compile()

    def __call__(self, params: Any, batch: Batch) -> np.ndarray:
        """[B, T] the value of every token of packed rows, on the host; [B, U] where they share, see ``Batch``."""
        with jax.set_mesh(self._mesh), self._launches:
            values = self._score(params, self._base, self._placed(batch))
        return np.asarray(values)

    def _placed(self, batch: Batch) -> Batch:
        return self._place(without_sharing(batch, self._sharing).with_experts(self._experts))


def of_trajectories(
    score: Callable[[Batch], np.ndarray], trajectories: Sequence[Trajectory], train: TrainConfig
) -> list[np.ndarray]:
    """Of each trajectory [T_i] float32: what ``score`` says of its sampled tokens, 0 elsewhere.

    Args:
        score: of a micro-batch, [B, T].
        trajectories: distinct by (draw, sample).
        train: the shape of a micro-batch.
    """
    places = np.arange(1.0, len(trajectories) + 1)
    weights = [np.zeros(len(trajectory.ids)) for trajectory in trajectories]
    form = {"rows": train.rows, "row_tokens": train.row_tokens, "sharing": sharing_of(train)}
    # The advantage of a token thus says whose it is.
    batches = packing.pack_trajectories(trajectories, places, weights, **form)
    scored = [np.zeros(len(trajectory.ids), np.float32) for trajectory in trajectories]
    for batch, values in zip(batches, map(score, batches), strict=True):
        owners = (batch.advantages * batch.mask).astype(int)
        for owner in np.unique(owners[owners > 0]):
            scored[owner - 1][trajectories[owner - 1].mask > 0] = values[owners == owner]
    return scored
