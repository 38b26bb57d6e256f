"""The critic of PPO: a decoder with a value head, and weights and an optimizer of its own, beside the policy.

It shares no trunk with the policy. The policy's gradient, its sampler's copy and its export thus stay what they are
without a critic, and the two learn at their own rates; the price is a second set of weights and moments.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl import mesh as meshes
from jaxrl.config import Config, ConfigError, CriticConfig, ModelConfig
from jaxrl.data import packing
from jaxrl.model import spec, value
from jaxrl.records import Batch, Trajectory
from jaxrl.rl.advantages.gae import advantages_and_returns
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.outcomes import Outcomes
from jaxrl.rl.value_loss import clipped_value_loss
from jaxrl.train.placement import Placement, once
from jaxrl.train.session import Session, valued_params
from jaxrl.train.state import TrainState, abstract_state, copied, initial_params, new_state, rl_optimizer
from jaxrl.train.update import LossFunction, Metrics, Updater, over_updates


class Critic:
    """Values of the tokens of episodes, and how to make them better.

    Attributes:
        state: weights and optimizer; replaced by ``learn``.
    """

    def __init__(self, session: Session, state: TrainState) -> None:
        config = session.config
        self.state = state
        self._config, self._mesh, self._model = config, session.mesh, session.model
        self._updater = Updater(
            value_loss(session.model, config.critic),
            critic_optimizer(config, value.value_specs(session.model)),
            session.mesh,
            session.launches,
            offload=config.optimizer.offload,
            pooled=True,
        )
        self._launches = session.launches
        self._place = Placement(session.mesh, pooled=True)
        self._values = jax.jit(functools.partial(values_for_all, model=session.model))

    def compile(self) -> None:
        """Compile everything, so that nothing is compiled once training runs."""
        train = self._config.train
        self._updater.compile(self.state, train.rows, train.row_tokens)
        self._score([Batch.zeros(train.rows, train.row_tokens)])

    def values(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Of each [T_i] float32: what the critic thinks is still to come before a token is written."""
        train = self._config.train
        nothing = [np.zeros(len(one.ids), np.float32) for one in trajectories]
        batches = packing.pack_trajectories(
            trajectories, nothing, nothing, rows=train.rows, row_tokens=train.row_tokens
        )
        return packing.unpack_responses(
            self._score(batches), trajectories, rows=train.rows, row_tokens=train.row_tokens
        )

    def learn(self, trajectories: Sequence[Trajectory], outcomes: Outcomes) -> dict[str, float]:
        """``TrainConfig.passes`` times ``updates_per_step`` updates; returns their metrics, named ``critic/...``.

        Args:
            trajectories: N, of which it learns those that are trained on.
            outcomes: what the policy's advantages are made of, with the values of when the step began.
        """
        config, train = self._config.critic, self._config.train
        values, masks = outcomes.need("values"), outcomes.trained_masks()
        rewards = outcomes.rewards_by_token()
        _, returns = advantages_and_returns(rewards, values, masks, discount=config.discount, decay=config.decay)
        trained = [index for index, mask in enumerate(masks) if np.any(mask)]
        parts = [
            self._pack(*([field[index] for index in part] for field in (trajectories, returns, values)))
            for part in np.array_split(trained, train.updates_per_step)
            if len(part)
        ]
        updates = []
        for batches in parts * train.passes:
            self.state, metrics = self._updater.step(self.state, batches)
            updates.append(metrics)
        explained = explained_variance(values, returns, masks)
        return {f"critic/{name}": x for name, x in (over_updates(updates) | {"explained_variance": explained}).items()}

    def _pack(self, trajectories: list[Trajectory], returns: list[np.ndarray], values: list[np.ndarray]) -> list[Batch]:
        """Rows of one update: returns as ``advantages``, old values as ``behaviour_logprobs``."""
        train = self._config.train
        weights = aggregation_weights([one.mask for one in trajectories], "token")
        shape = {"rows": train.rows, "row_tokens": train.row_tokens}
        with_returns = packing.pack_trajectories(trajectories, returns, weights, **shape)
        with_values = packing.pack_trajectories(trajectories, values, weights, **shape)
        return [
            batch.replace(behaviour_logprobs=once(other.advantages))
            for batch, other in zip(with_returns, with_values, strict=True)
        ]

    def _score(self, batches: Sequence[Batch]) -> list[np.ndarray]:
        with jax.set_mesh(self._mesh), self._launches:
            scored = [self._values(self.state.params, self._place(batch.with_experts(None))) for batch in batches]
        return [np.asarray(one) for one in scored]


def value_loss(model: ModelConfig, config: CriticConfig) -> LossFunction:
    """The clipped value loss of packed rows, as ``Critic._pack`` lays them out."""

    def loss(params: Any, batch: Batch, reference: Any) -> tuple[jax.Array, Metrics]:
        del reference
        values = _values_before(params, batch, model=model)
        old, returns = batch.behaviour_logprobs, batch.advantages
        per_token, clipped = clipped_value_loss(values, old, returns, batch.mask, clip=config.clip, huber=config.huber)
        shown = {"value": values, "return": returns, "value_clip_fraction": clipped}
        metrics = {name: (jnp.where(batch.mask > 0, x, 0.0).sum(), batch.mask.sum()) for name, x in shown.items()}
        total = (batch.rl_weights * per_token).sum()
        return total, metrics | {"value_loss": (total, jnp.zeros(()))}  # a sum: the weights divide it already

    return loss


def _values_before(params: Any, batch: Batch, *, model: ModelConfig) -> jax.Array:
    """The same, split as the batch is."""
    return jnp.roll(value.token_values(params, model, batch.tokens, batch.positions, batch.segment_ids), 1, axis=1)


def values_for_all(params: Any, batch: Batch, *, model: ModelConfig) -> jax.Array:
    """[B, T]: at each token the value of what precedes it in its segment, where every process reads it."""
    return meshes.to_compute(_values_before(params, batch, model=model), (None, None))


def critic_optimizer(config: Config, specs: spec.Specs) -> optax.GradientTransformation:
    """The policy's optimizer at the critic's rate."""
    section = dataclasses.replace(
        config.optimizer, learning_rate=config.critic.learning_rate, warmup_steps=config.critic.warmup_steps
    )
    return rl_optimizer(section, specs)


def new_critic(session: Session, policy: Any) -> Critic:
    """A critic before its first update: from ``CriticConfig.path``, or the policy's decoder with a new head.

    Raises:
        ConfigError: a folder whose decoder is not of the policy's kind.
    """
    config, specs = session.config, value.value_specs(session.model)
    if config.critic.path:
        params = valued_params(session.model, session.mesh, config.critic.path, config.train.seed)
    else:
        with jax.set_mesh(session.mesh):
            decoder = copied(policy) if session.base is None else session.base.merged(policy)
        head = initial_params({value.HEAD: specs[value.HEAD]}, session.mesh, config.train.seed)
        params = {value.DECODER: decoder} | head
    found, wanted = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, spec.abstract(specs)))
    if found != wanted:
        raise ConfigError(
            f"CriticConfig.path={config.critic.path!r} holds a decoder of another shape than the policy's"
        )
    optimizer, offload = critic_optimizer(config, specs), config.optimizer.offload
    return Critic(session, new_state(params, optimizer, session.mesh, offload=offload))


def abstract_critic(session: Session) -> TrainState:
    """Shapes, types and shardings of a critic's state: the target of a restore."""
    specs = value.value_specs(session.model)
    return abstract_state(specs, critic_optimizer(session.config, specs), session.mesh)


def explained_variance(
    values: Sequence[np.ndarray], returns: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> float:
    """1 - Var(return - value) / Var(return) over the sampled tokens; 0 where returns do not vary."""
    value, target = (
        np.concatenate([np.asarray(x, np.float64)[np.asarray(mask) > 0] for x, mask in zip(xs, masks, strict=True)])
        for xs in (values, returns)
    )
    return float(1 - np.var(target - value) / np.var(target)) if len(target) and np.var(target) > 0 else 0.0
