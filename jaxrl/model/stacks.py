"""Layers that differ: which of them have experts, and the scan over stacks that not all layers are on.

A parameter stacks the layers that have it. Norms and attention are those of all layers; the feed-forward of a model
that has experts in some layers only stands on two stacks, one of the layers with experts and one of those without.
Training, rollout and checkpoints have these same arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl.config import ModelConfig
from jaxrl.model.lora import ADAPTERS

DENSE = ("gate", "up", "down")
SPARSE = ("router", "expert_gate", "expert_up", "expert_down")
"""Parameters of the layers without and with experts."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Successive layers whose kinds repeat: ``kinds`` ``repeats`` times, from layer ``first`` on."""

    first: int
    kinds: tuple[bool, ...]  # whether a layer has experts
    repeats: int

    @property
    def layers(self) -> range:
        return range(self.first, self.first + len(self.kinds) * self.repeats)


def sparse_layers(config: ModelConfig) -> tuple[bool, ...]:
    """Of each layer, whether it has experts."""
    return tuple(config.experts > 0 and layer not in config.dense_layers for layer in range(config.layers))


def runs(kinds: tuple[bool, ...]) -> list[Run]:
    """The layers in as few runs as taking the longest each time gives; of equally long ones that of the shortest
    period, so that layers which are all alike are one run of one kind."""
    found: list[Run] = []
    while (first := found[-1].layers.stop if found else 0) < len(kinds):
        rest = kinds[first:]
        candidates = []
        for period in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * period :][:period] == rest[:period]:
                repeats += 1
            if repeats > 1 or period == 1:
                candidates.append(Run(first, rest[:period], repeats))
        found.append(max(candidates or [Run(first, rest[:1], 1)], key=lambda run: len(run.layers)))
    return found


def scan(
    layer: Callable[[Any, tuple[dict[str, Any], Any]], tuple[Any, Any]],
    carry: Any,
    params: dict[str, Any],
    config: ModelConfig,
    constants: Any,
) -> tuple[Any, Any]:
    """``jax.lax.scan`` of ``layer`` over all layers, in order.

    Layers of one kind are scanned as they are. Of layers that differ, what repeats is scanned together; a stack of
    which a run takes only a part is cut for it, which copies that part.

    Args:
        layer: ``(carry, (its parameters, its constants)) -> (carry, output)``.
        params: the layers' parameters, stacked.
        constants: arrays with all layers on their first axis.

    Returns:
        The carry, and the outputs that are not None, stacked in the order of their layers; None if there are none.
    """
    kinds, outputs = sparse_layers(config), []
    for run in runs(kinds):

        def step(carry: Any, scanned: list[Any]) -> tuple[Any, list[Any]]:
            made = []
            for one in scanned:
                carry, output = layer(carry, one)
                made.append(output)
            return carry, made

        scanned = []
        for position, sparse in enumerate(run.kinds):
            layers = run.layers[position :: len(run.kinds)]
            before = kinds[: layers.start].count(sparse)
            each = run.kinds.count(sparse)
            own = range(before, before + each * run.repeats, each)
            scanned.append((_parameters(params, sparse, layers, own), _cut(constants, layers)))
        carry, made = jax.lax.scan(step, carry, scanned)
        outputs += _in_order([output for output in made if output is not None])
    if not outputs:
        return carry, None
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs) if len(outputs) > 1 else outputs[0]


def _parameters(params: dict[str, Any], sparse: bool, layers: range, own: range) -> dict[str, Any]:
    """What layers of one kind have: their places on the stacks of all layers are ``layers``, on those of their kind
    ``own``."""
    others, kind = (DENSE, SPARSE) if sparse else (SPARSE, DENSE)
    taken = {}
    for name, leaves in params.items():
        if name == ADAPTERS:
            taken[name] = _parameters(leaves, sparse, layers, own)
        elif name not in others:
            taken[name] = _cut(leaves, own if name in kind else layers)
    return taken


def _cut(leaves: Any, places: range) -> Any:
    """These places of the first axis; arrays that have no others are not copied."""
    return jax.tree.map(
        lambda leaf: leaf if len(places) == leaf.shape[0] else leaf[places.start : places.stop : places.step], leaves
    )


def _in_order(made: list[Any]) -> list[Any]:
    """Outputs [repeats, ...] of each position of a period as one [repeats x positions, ...]; none if there are none."""
    if len(made) < 2:
        return made
    return [jax.tree.map(lambda *parts: jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:]), *made)]
