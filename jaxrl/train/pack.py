"""What an optimizer update is made of: outcomes of what was kept, their advantages, and packed micro-batches."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl.config import Config, most_trajectories
from jaxrl.data import packing
from jaxrl.data.tree_packing import sharing_of
from jaxrl.records import Batch
from jaxrl.rl import selection
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.correction import of_micro_batch
from jaxrl.rl.outcomes import Outcomes, Recorded, of_trajectories
from jaxrl.rl.targets import TARGETS
from jaxrl.train.methods import Methods, methods_of


def earned(
    recorded: Recorded,
    selections: tuple[selection.Selection, ...],
    memory: dict[str, float],
    values: Sequence[np.ndarray] | None = None,
) -> Outcomes:
    """What became of the kept trajectories, before anything is charged for them.

    Args:
        recorded: what the trajectories hold.
        memory: what the advantage keeps from step to step.
        values: a critic's, of each kept trajectory [T_i].
    """
    trajectories = [trajectory for group in selections for trajectory in group.kept]
    groups = np.repeat(np.arange(len(selections)), [len(group.kept) for group in selections])
    masked = np.array([flag for group in selections for flag in group.masked or (False,) * len(group.kept)], bool)
    outcomes = of_trajectories(trajectories, groups, recorded, memory, values)
    return dataclasses.replace(outcomes, trained=~masked)


def pack(
    config: Config,
    selections: tuple[selection.Selection, ...],
    memory: dict[str, float],
    outcomes: Outcomes | None = None,
    methods: Methods | None = None,
) -> list[list[Batch]]:
    """Micro-batches of each optimizer update: advantages by step, aggregation weights by update, fixed shapes.

    Args:
        memory: what the advantage keeps from step to step; brought up to date in place.
        outcomes: what advantages are made of; None = what was ``earned``, with nothing charged for it.
        methods: of a run; None makes them of ``config``.
    """
    trajectories = [trajectory for group in selections for trajectory in group.kept]
    if not trajectories:
        return []
    methods = methods or methods_of(config)
    outcomes = outcomes or earned(methods.recorded, selections, memory)
    estimate = methods.advantage(outcomes)
    memory.update(estimate.memory)
    updates = []
    for part in np.array_split(np.arange(len(selections)), config.train.updates_per_step):
        if not (members := np.flatnonzero(np.isin(outcomes.groups, part) & outcomes.trained).tolist()):
            continue
        chosen, advantages = [trajectories[i] for i in members], [estimate.values[i] for i in members]
        masks, constant_length = [trajectory.mask for trajectory in chosen], config.engine.max_response_tokens
        weights = aggregation_weights(masks, config.algorithm.aggregation, constant_length)
        rows, row_tokens = config.train.rows, config.train.row_tokens
        updates.append(
            packing.pack_trajectories(
                chosen,
                advantages,
                weights,
                rows=rows,
                row_tokens=row_tokens,
                observation_weight=config.mix.observation_weight,
                groups=outcomes.groups[members].tolist() if config.algorithm.loss in TARGETS else None,
                sharing=sharing_of(config.train),
            )
        )
    return updates


def ranked_in_parts(config: Config) -> str:
    """What to say before a run in which ranks or means of an update's tokens may be those of its parts; "" if not."""
    train, engine = config.train, config.engine
    if not (settings := of_micro_batch(config.algorithm)):
        return ""
    trajectories = most_trajectories(config, -(-train.problems // train.updates_per_step))
    remedy = "How many rows would hold all of it depends on what is played"
    if trajectories is not None:
        rows = -(-trajectories // (train.row_tokens // (engine.max_prompt_tokens + engine.max_response_tokens)))
        if rows <= train.rows:
            return ""
        remedy = f"With rows={rows} all of it is compared"
    return (
        f"{', '.join(settings)} compares the tokens of a micro-batch, and an update may take several of "
        f"TrainConfig.rows={train.rows}: it then depends on how it is cut. {remedy}"
    )
