"""What a process learns of trajectories that others played, where the host computes with more than outlines say."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax

from jaxrl.data.tree_packing import sharing_of
from jaxrl.processes.exchange import exchange
from jaxrl.records import Batch, Trajectory
from jaxrl.rl import algorithm
from jaxrl.rl.outcomes import Outcomes
from jaxrl.rl.trees import numbered, paths_of, states_of
from jaxrl.train.score import Scorer, of_trajectories
from jaxrl.train.session import Session, what_is_recorded
from jaxrl.train.shares import is_own


class Contents:
    """Numbers of tokens come from the devices, which add up what all processes have; of what was written everybody gets
    names, which are equal where that is. In a single process nothing has to be learnt."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self._train, self._several = config.train, jax.process_count() > 1
        asked = algorithm.contents_asked(config.algorithm, what_is_recorded(config)) if self._several else frozenset()
        self._situations, self._sampled = asked - {"logprobs"}, "logprobs" in asked
        joined = functools.partial(
            Scorer,
            model=session.model,
            temperature=config.engine.temperature,
            mesh=session.mesh,
            launches=session.launches,
            sharing=sharing_of(config.train),
            statistic=_nothing,
        )
        self._behaviour = joined(lambda batch, _: batch.behaviour_logprobs)
        self._proximal = joined(lambda batch, _: batch.proximal_logprobs)

    def compile(self, *, proximal: bool) -> None:
        """Compile what this run will use.

        Args:
            proximal: ``with_proximal`` will be called.
        """
        shape = self._train.rows, self._train.row_tokens
        if self._sampled:
            self._behaviour.compile(None, *shape)
        if proximal and self._several:
            self._proximal.compile(None, *shape)

    def seen(self, outcomes: Outcomes, trajectories: Sequence[Trajectory], step: int) -> Outcomes:
        """``outcomes`` with what the advantage asks for.

        Args:
            trajectories: those of the outcomes.
            step: of the run.
        """
        known: dict[str, Any] = {}
        if self._situations and trajectories:
            known = _situations(trajectories, f"jaxrl/situations/{step}")
        if self._sampled and trajectories:
            joined = functools.partial(self._behaviour, None)
            known["logprobs"] = of_trajectories(joined, trajectories, self._train)
        return dataclasses.replace(outcomes, **known)

    def with_proximal(self, batch: Batch) -> Batch:
        """A micro-batch with the proximal log-probabilities of all its tokens, for the host alone."""
        if not self._several:
            return batch
        return batch.replace(proximal_logprobs=self._proximal(None, batch.replace(groups=None)))


def _situations(trajectories: Sequence[Trajectory], name: str) -> dict[str, Any]:
    """``states`` and ``nodes`` of ``Outcomes``, with digests for names."""
    own = {
        index: [[state.hex() for state in states_of(one)], [path.hex() for path in paths_of(one)]]
        for index, one in enumerate(trajectories)
        if is_own(one.draw)
    }
    said = {}
    for message in exchange(name, json.dumps(own).encode()):
        said |= json.loads(message)
    situations = [[list(map(bytes.fromhex, names)) for names in said[str(i)]] for i in range(len(trajectories))]
    states, paths = zip(*situations, strict=True)
    return {"states": list(states), "nodes": numbered([one.draw for one in trajectories], paths)}


def _nothing(params: Any, model: Any, tokens: jax.Array, *rest: Any) -> jax.Array:
    """In the place of a statistic that needs a model."""
    del params, model, rest
    return tokens
