"""Demonstrations learned beside reinforcement (CHORD, DataMind): (1 - μ) policy loss + μ supervised loss."""

import collections
from collections.abc import Sequence

import numpy as np

from jaxrl.data import packing
from jaxrl.data.recorded import Worked
from jaxrl.records import Batch, Conversation
from jaxrl.rl.selection import Selection
from jaxrl.rl.supervised import SupervisedLoss, demonstration_weight, supervised_loss
from jaxrl.train.placement import said_once
from jaxrl.train.session import Session
from jaxrl.train.sft import sequence


class Mixture:
    """What ``MixConfig`` adds to the updates of a step; a function of the step and its problems alone.

    Attributes:
        loss: of tokens with a cross-entropy weight; None where nothing is learned beside the policy loss.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._mix = session, session.config.mix
        used = self._mix.demonstrations != "off"
        self.loss: SupervisedLoss | None = None
        if used or self._mix.observation_weight:
            self.loss = supervised_loss("MixConfig.loss", self._mix.loss, self._mix.loss_settings)
        self._worked: tuple[Worked, ...] = session.demonstrations if used else ()
        self._of_problem: dict[str, list[int]] = collections.defaultdict(list)
        for index, worked in enumerate(self._worked):
            self._of_problem[worked.id if isinstance(worked, Conversation) else worked.problem.id].append(index)

    def mixed(self, updates: list[list[Batch]], kept: Sequence[Selection], step: int) -> list[list[Batch]]:
        """The micro-batches of each update with demonstrations added, and both weighted.

        An update for whose problems there is no demonstration stays as it is.

        Args:
            updates: as ``pack`` makes them of ``kept``.
            kept: every group of the step that is trained on.
            step: which step of reinforcement, from 0.
        """
        if not (self._worked and updates):
            return updates
        parts = [part for part in np.array_split(np.arange(len(kept)), len(updates)) if len(part)]
        return [
            self._with_demonstrations(batches, [kept[index] for index in part], (step, number))
            for number, (batches, part) in enumerate(zip(updates, parts, strict=True))
        ]

    def _with_demonstrations(
        self, batches: list[Batch], groups: Sequence[Selection], place: tuple[int, int]
    ) -> list[Batch]:
        config = self._session.config
        draw = np.random.default_rng((config.train.seed, *place))
        chosen = [self._choose(group.kept[0].problem.id, draw) for group in groups]
        sequences = [sequence(self._session, self._worked[index]) for index in chosen if index is not None]
        if not sequences:
            return batches
        weight = demonstration_weight(self._mix, place[0])
        shape = {"rows": config.train.rows, "row_tokens": config.train.row_tokens}
        return [
            batch.replace(rl_weights=batch.rl_weights * (1 - weight), kl_weights=batch.kl_weights * (1 - weight))
            for batch in batches
        ] + [
            # The mask says what the policy sampled, of which there is nothing here.
            said_once(batch.replace(ce_weights=batch.ce_weights * np.float32(weight), mask=np.zeros_like(batch.mask)))
            for batch in packing.pack_sequences(sequences, **shape, row_tokens_key="TrainConfig.row_tokens")
        ]

    def _choose(self, problem: str, draw: np.random.Generator) -> int | None:
        """One demonstration: of that problem if it must be, and None if there is none."""
        if self._mix.demonstrations == "any":
            return int(draw.integers(len(self._worked)))
        of_problem = self._of_problem.get(problem)
        return of_problem[int(draw.integers(len(of_problem)))] if of_problem else None
