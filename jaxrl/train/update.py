"""One optimizer step: gradients summed over micro-batches, then applied once.

The trainer does not know the algorithm. What a token contributes stands in the weights and advantages of the
batch; the aggregation's global denominator is already in the weights, so micro-batches simply add up.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl.config import AlgorithmConfig, ModelConfig
from jaxrl.data.tree_packing import Sharing, without_sharing
from jaxrl.model import logprob, moe
from jaxrl.model.lora import Base
from jaxrl.records import Batch
from jaxrl.rl import algorithm as rl_algorithm
from jaxrl.rl import divergence, mismatch
from jaxrl.rl.correction import correction
from jaxrl.rl.policy_losses import SPANS
from jaxrl.rl.supervised import SupervisedLoss, nll
from jaxrl.rl.tokens import sampled
from jaxrl.train.placement import Placement
from jaxrl.train.state import DEVICE, HOST, TrainState, in_memory, on_mesh

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""Name to (sum, count); of a name that ends in _max to (largest, 1 or 0)."""

Fixed = tuple[Base | None, Any]
"""Weights beneath adapters, and those of a teacher."""


class Guides(NamedTuple):
    """What a loss with a teacher measures against."""

    reference: Any
    teacher: Any


LossFunction = Callable[[Any, Batch, Any], tuple[jax.Array, Metrics]]  # parameters, batch, reference parameters or None


def cross_entropy_loss(model: ModelConfig, supervised: SupervisedLoss = nll) -> LossFunction:
    """A weighted loss of the log-probabilities of the masked tokens, for demonstrations."""

    def loss(params: Any, batch: Batch, reference: Any) -> tuple[jax.Array, Metrics]:
        del reference
        rows = batch.tokens, batch.positions, batch.segment_ids
        stats = logprob.sequence_logprobs(params, model, *rows, tree=batch.tree)
        metrics = {"nll": _masked(-stats.logprobs, batch.mask), "entropy": _masked(stats.entropy, batch.mask)}
        learned = (batch.ce_weights * supervised(jnp.where(batch.mask > 0, stats.logprobs, 0.0))).sum()
        balance, load_metrics = _balance(model, stats, batch)
        return learned + balance, metrics | load_metrics

    return loss


def policy_gradient_loss(
    model: ModelConfig, algorithm: AlgorithmConfig, temperature: float, supervised: SupervisedLoss | None = None
) -> LossFunction:
    """The policy loss that ``algorithm`` names, of the tokens its corrections leave and weigh, with a KL to the
    reference and an entropy bonus where their coefficients are not 0.

    Args:
        temperature: the sampler's; log-probabilities are those of the temperature-scaled distribution.
        supervised: the loss of tokens with a ``ce_weights``, if there are any.
    """

    policy_loss, correct = rl_algorithm.policy_loss(algorithm), correction(algorithm)
    span = algorithm.loss_settings.get("span", SPANS.get(algorithm.loss, "token"))
    pays_entropy = algorithm.entropy_coefficient or algorithm.entropy_target

    def loss(params: Any, batch: Batch, reference: Any) -> tuple[jax.Array, Metrics]:
        score = functools.partial(
            logprob.sequence_logprobs,
            config=model,
            tokens=batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            temperature=temperature,
            tree=batch.tree,
        )
        stats = score(params, experts=batch.experts)
        shares = batch.proximal_shares
        tokens = sampled(
            batch.mask,
            stats.logprobs,
            proximal_logprobs=(1 - shares) * batch.proximal_logprobs + shares * stats.logprobs,
            behaviour_logprobs=batch.behaviour_logprobs,
            advantages=batch.advantages,
            segment_ids=batch.segment_ids,
            entropy=stats.entropy,
        )
        corrected = correct(tokens)
        surrogate = policy_loss(corrected.tokens)
        total = (batch.rl_weights * corrected.weights * surrogate.loss).sum()
        metrics = {
            "entropy": _masked(stats.entropy, batch.mask),
            **{name: _masked(values, corrected.tokens.mask) for name, values in surrogate.metrics.items()},
            **mismatch.gap(stats.logprobs, batch.behaviour_logprobs, batch.mask),
            **corrected.metrics,
        }
        if pays_entropy:
            total -= (batch.entropy_weights * jnp.where(batch.mask > 0, stats.entropy, 0.0)).sum()
        if algorithm.kl_coefficient and algorithm.kl_placement == "loss":
            reference_stats = score(jax.lax.stop_gradient(reference))
            to_reference = divergence.kl(stats.logprobs, reference_stats.logprobs, batch.mask, algorithm.kl_estimator)
            counted = to_reference * tokens.ratio_of(span) if algorithm.kl_by_ratio else to_reference
            total += algorithm.kl_coefficient * (batch.kl_weights * counted).sum()
            metrics["kl_to_reference"] = _masked(to_reference, batch.mask)
        if supervised is not None:
            learned = batch.ce_weights > 0
            logprobs = jnp.where(learned, stats.logprobs, 0.0)
            total += (batch.ce_weights * supervised(logprobs)).sum()
            metrics["nll"] = -logprobs.sum(), learned.sum().astype(logprobs.dtype)
        balance, load_metrics = _balance(model, stats, batch)
        total += balance
        metrics |= load_metrics
        return total, metrics | {"loss": (total, jnp.zeros(()))}  # a sum: the weights divide it already

    return loss


def _balance(model: ModelConfig, stats: logprob.TokenStats, batch: Batch) -> tuple[jax.Array, Metrics]:
    """The term that evens the load of experts, and what is shown of the load; zero and nothing without experts.

    The term is of each micro-batch by itself, which counts as much as its tokens weigh.
    """
    if stats.load is None:
        return jnp.zeros(()), {}
    loss = moe.balance_loss(stats.load)
    shown = {"balance_loss": loss, **moe.load_metrics(stats.load)}
    metrics = {name: (jax.lax.stop_gradient(value), jnp.ones(())) for name, value in shown.items()}
    return model.balance_coefficient * loss * (batch.rl_weights + batch.ce_weights).sum(), metrics


def _masked(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum and count of [B, T] values where the mask is; what stands elsewhere does not matter, NaN included."""
    return jnp.where(mask > 0, values, 0.0).sum(), mask.sum()


def _merge(name: str, total: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]) -> tuple:
    combine = jnp.maximum if name.endswith("_max") else jnp.add
    return combine(total[0], new[0]), combine(total[1], new[1])


def _values(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) / max(float(count), 1.0) for name, (value, count) in jax.device_get(metrics).items()}


def over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step with several updates: means, but the gap to the sampler as the first update found it.

    Later updates meet weights that have moved on, so their gap is drift and not a fault of numerics.
    """
    if not updates:
        return {}
    means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return means | {name: updates[0][name] for name in mismatch.GAP_METRICS if name in means}


class LayoutError(RuntimeError):
    """Something would rest in another layout than the parameter it belongs to; training would slow down or not fit."""


def shardings_of(types: Any, mesh: jax.sharding.Mesh) -> Any:
    """The shardings that the types of traced values promise, on a mesh of devices."""
    return jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, leaf.sharding.spec), types)


def check_layout(what: str, shardings: Any, resting: Any) -> None:
    """Compare shardings with those of arrays of the same tree.

    Raises:
        LayoutError: naming the first leaf whose sharding is another.
    """
    have = jax.tree.leaves(shardings)
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(resting), have, strict=True):
        if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            raise LayoutError(
                f"{what} {jax.tree_util.keystr(path)} {leaf.shape} would rest as {sharding.spec} and not as "
                f"{leaf.sharding.spec}, as it does now; give the operation that changes it an out_sharding"
            )


def _on_device(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of an array once it is in device memory."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(DEVICE))


class Updater:
    """``step`` takes any number of micro-batches of the one shape that ``compile`` was given.

    Args:
        loss: of the decoder's parameters.
        launches: held while work is handed to the devices, where a rollout engine does so as well; see ``Engine``.
        offload: the optimizer state comes and goes in the host's memory.
        experts: what is recorded of a token, to compute with (``moe.record``); None: the router always chooses.
        sharing: as micro-batches are packed; those in which nothing is shared are taken as well.
        base: frozen weights; the state and the reference then hold adapters on them, and only those are differentiated.
        teacher: frozen weights of a teacher; the loss then gets ``Guides`` in place of the reference.
        pooled: of several processes each has the contents of its own trajectories alone; see ``Placement``.
    """

    def __init__(
        self,
        loss: LossFunction,
        optimizer: optax.GradientTransformation,
        mesh: jax.sharding.Mesh,
        launches: contextlib.AbstractContextManager[Any] | None = None,
        *,
        offload: bool = False,
        experts: jax.ShapeDtypeStruct | None = None,
        sharing: Sharing | None = None,
        base: Base | None = None,
        teacher: Any = None,
        pooled: bool = False,
    ) -> None:
        def loss_of_trained(trained: Any, fixed: Fixed, batch: Batch, reference: Any) -> tuple[jax.Array, Metrics]:
            base, teacher = fixed
            if base is not None:
                trained, reference = base.adapted(trained), None if reference is None else base.adapted(reference)
            return loss(trained, batch, reference if teacher is None else Guides(reference, teacher))

        def measured(trained: Any, fixed: Fixed, batch: Batch, reference: Any) -> Metrics:
            return loss_of_trained(trained, fixed, batch, reference)[1]

        gradient = jax.grad(loss_of_trained, has_aux=True)

        def first(params: Any, fixed: Fixed, batch: Batch, reference: Any) -> Any:
            return gradient(params, fixed, batch, reference)

        def more(total: Any, params: Any, fixed: Fixed, batch: Batch, reference: Any) -> Any:
            gradients, metrics = gradient(params, fixed, batch, reference)
            merged = {name: _merge(name, total[1][name], pair) for name, pair in metrics.items()}
            return jax.tree.map(jnp.add, total[0], gradients), merged

        def apply(state: TrainState, gradients: Any) -> tuple[TrainState, jax.Array]:
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            norm = optax.global_norm(gradients)
            new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
            return jax.tree.map(lambda after, before: jnp.where(jnp.isfinite(norm), after, before), new, state), norm

        def reset(state: TrainState) -> TrainState:
            return TrainState(state.params, optimizer.init(state.params), jnp.zeros_like(state.step))

        self._mesh, self._fixed = mesh, (base, teacher)
        self._launches = launches or contextlib.nullcontext()
        self._offload, self._experts, self._sharing = offload, experts, sharing
        self._place = Placement(mesh, pooled=pooled)
        self._measured = jax.jit(measured)
        self._first = jax.jit(first)
        self._more = jax.jit(more, donate_argnums=0)
        self._apply = jax.jit(apply, donate_argnums=0)
        self._reset = jax.jit(reset, donate_argnums=0)

    def compile(self, state: TrainState, rows: int, row_tokens: int, reference: Any = None) -> None:
        """Compile for micro-batches [rows, row_tokens], so that nothing is compiled once training runs.

        Raises:
            LayoutError: a gradient, or what the update makes of the state, would rest elsewhere than its parameter.
        """
        empty = Batch.zeros(rows, row_tokens)
        with jax.set_mesh(self._mesh):
            total = jax.eval_shape(self._first, state.params, self._fixed, self._placed(empty), reference)
            check_layout("the gradient of", shardings_of(total[0], self._mesh), state.params)
            gradients, _ = self._accumulate(state, [empty, empty], reference)
            check_layout("the sum of gradients of", jax.tree.map(lambda leaf: leaf.sharding, gradients), state.params)
            state = state.replace(opt_state=jax.tree.map(_on_device, state.opt_state))
            self._apply = self._apply.lower(state, gradients).compile()
            check_layout("after an update", self._apply.output_shardings[0], state)
            self._reset = self._reset.lower(state).compile()
            check_layout("after a reset", self._reset.output_shardings, state)

    def traced(
        self, state: TrainState, rows: int, row_tokens: int, reference: Any = None
    ) -> dict[str, jax.stages.Traced]:
        """The programs of a step, by name, for micro-batches [rows, row_tokens]; nothing is compiled or run.

        Args:
            state: and ``reference``, and the frozen weights if there are any: shapes, types and shardings suffice.
        """
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._place.rows),
            self._formed(Batch.zeros(rows, row_tokens)),
        )
        with jax.set_mesh(self._mesh):
            arguments = (state.params, self._fixed, batch, reference)
            total = on_mesh(jax.eval_shape(self._first, *arguments), self._mesh)
            first = self._first.trace(*arguments)
            more = self._more.trace(total, *arguments)
            return {"first": first, "more": more, "apply": self._apply.trace(state, total[0])}

    def reset(self, state: TrainState) -> TrainState:
        """The same parameters with a fresh optimizer; ``state`` is consumed."""
        with jax.set_mesh(self._mesh):
            return self._put_away(self._reset(self._bring(state)))

    def step(
        self, state: TrainState, batches: Iterable[Batch], reference: Any = None
    ) -> tuple[TrainState, dict[str, float]]:
        """Sum the gradients of all micro-batches, apply them once; ``state`` is consumed.

        A gradient that is not finite changes nothing; its ``grad_norm`` says so, and an alarm rings.

        Returns:
            The new state, and every metric as its mean or maximum, with ``grad_norm`` before clipping.
        """
        with jax.set_mesh(self._mesh):
            gradients, metrics = self._accumulate(state, batches, reference)
            with self._launches:
                state, norm = self._apply(self._bring(state), gradients)
            state = self._put_away(state)
        return state, _values(metrics) | {"grad_norm": float(norm)}

    def measure(self, params: Any, batches: Iterable[Batch], reference: Any = None) -> dict[str, float]:
        """Every metric of the loss over all batches, as its mean or maximum; nothing is changed."""
        total: Metrics = {}
        with jax.set_mesh(self._mesh):
            for batch in batches:
                new = self._measured(params, self._fixed, self._placed(batch), reference)
                total = {name: _merge(name, total[name], pair) for name, pair in new.items()} if total else new
        return _values(total)

    def _placed(self, batch: Batch) -> Batch:
        return self._place(self._formed(batch))

    def _formed(self, batch: Batch) -> Batch:
        """The batch in the form the programs are compiled for."""
        return without_sharing(batch, self._sharing).with_experts(self._experts)

    def _bring(self, state: TrainState) -> TrainState:
        """With its moments on the devices."""
        return state.replace(opt_state=in_memory(state.opt_state, DEVICE)) if self._offload else state

    def _put_away(self, state: TrainState) -> TrainState:
        """With its moments where they rest."""
        return state.replace(opt_state=in_memory(state.opt_state, HOST)) if self._offload else state

    def _accumulate(self, state: TrainState, batches: Iterable[Batch], reference: Any) -> tuple[Any, Metrics]:
        total = None
        for batch in batches:
            with self._launches:
                placed = self._placed(batch)
                if total is None:
                    total = self._first(state.params, self._fixed, placed, reference)
                else:
                    total = self._more(total, state.params, self._fixed, placed, reference)
        return total
