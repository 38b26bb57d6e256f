"""What changes from step to step beside the weights: coefficients, the reference, and the proximal policy."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl.config import AlgorithmConfig
from jaxrl.data.tree_packing import sharing_of
from jaxrl.model import logprob
from jaxrl.records import Batch, Trajectory
from jaxrl.rl import divergence, entropy, targets
from jaxrl.rl.outcomes import Outcomes
from jaxrl.train.contents import Contents
from jaxrl.train.hints import hinted
from jaxrl.train.placement import once
from jaxrl.train.progress import RunProgress
from jaxrl.train.score import Scorer, of_trajectories
from jaxrl.train.session import Session


class Steering:
    """Of one run. Everything it remembers stands in ``RunProgress.coefficients``, so that a resumed run goes on."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self._algorithm, self._train, self._mesh = config.algorithm, config.train, session.mesh
        self._launches = session.launches
        self._charges = bool(config.algorithm.kl_coefficient) and config.algorithm.kl_placement == "reward"
        several = config.train.updates_per_step * config.train.passes > 1
        self._rescores = config.algorithm.proximal == "recomputed" and several
        estimator = config.algorithm.kl_estimator
        scored = session.model, config.engine.temperature, session.mesh, session.launches, session.base
        scorer = functools.partial(Scorer, sharing=sharing_of(config.train))
        self._logprobs = scorer(lambda _, logprobs: logprobs, *scored, experts=session.recorded_experts)
        self._divergence = scorer(
            lambda batch, reference: divergence.kl(batch.behaviour_logprobs, reference, batch.mask, estimator),
            *scored,
        )
        self._reference_logprobs = scorer(lambda _, logprobs: logprobs, *scored)
        self._reference_ratios = scorer(lambda batch, theirs: batch.behaviour_logprobs - theirs, *scored)
        self._contents = Contents(session)
        self._hinted_logprobs = scorer(lambda _, logprobs: logprobs, *scored)
        self._hinted = functools.partial(hinted, session)
        self._squares = scorer(
            lambda _, sums: sums,
            *scored,
            experts=session.recorded_experts,
            statistic=logprob.square_sums,
        )
        share = config.algorithm.reference_mix
        self._mix: Any = jax.jit(
            lambda reference, params: jax.tree.map(lambda a, b: (1 - share) * a + share * b, reference, params),
            donate_argnums=0,
        )

    def compile(self, params: Any, reference: Any | None) -> None:
        """Compile what this run will use, so that nothing is compiled once it trains."""
        if self._rescores or self._algorithm.loss in targets.TARGETS:
            self._logprobs.compile(params, self._train.rows, self._train.row_tokens)
        if self._algorithm.loss in targets.AGAINST_REFERENCE:
            self._reference_logprobs.compile(reference, self._train.rows, self._train.row_tokens)
        if self._algorithm.reference_ratios:
            self._reference_ratios.compile(reference, self._train.rows, self._train.row_tokens)
        self._contents.compile(proximal=self._algorithm.loss in targets.TARGETS)
        if self._algorithm.hint:
            self._hinted_logprobs.compile(params, self._train.rows, self._train.row_tokens)
        if self._charges:
            self._divergence.compile(reference, self._train.rows, self._train.row_tokens)
        if self._algorithm.square_sums:
            self._squares.compile(params, self._train.rows, self._train.row_tokens)
        if self._algorithm.reference_every and reference is not None:
            with jax.set_mesh(self._mesh):
                self._mix = self._mix.lower(reference, params).compile()

    def seen(
        self,
        outcomes: Outcomes,
        trajectories: Sequence[Trajectory],
        params: Any,
        reference: Any | None,
        progress: RunProgress,
    ) -> Outcomes:
        """What the advantage sees: ``outcomes`` with what it asks for of ``Contents``, with every token's Σ π² under
        ``params``, every trajectory's ratio to the reference, and what a hint adds, if the run scores them, and
        ``charged``."""
        outcomes = self._contents.seen(outcomes, trajectories, progress.global_step)
        if self._algorithm.square_sums and trajectories:
            sums = of_trajectories(functools.partial(self._squares, params), trajectories, self._train)
            outcomes = dataclasses.replace(outcomes, square_sums=sums)
        if self._algorithm.reference_ratios and trajectories:
            score = functools.partial(self._reference_ratios, reference)
            by_token = of_trajectories(score, trajectories, self._train)
            ratios = np.array([values.sum(dtype=np.float64) for values in by_token])
            outcomes = dataclasses.replace(outcomes, reference_ratios=ratios)
        if self._algorithm.hint and trajectories:
            outcomes = self._told(outcomes, trajectories, params, progress)
        return self.charged(outcomes, trajectories, reference, progress)

    def _told(
        self, outcomes: Outcomes, trajectories: Sequence[Trajectory], params: Any, progress: RunProgress
    ) -> Outcomes:
        """``outcomes`` with what a hint adds to the log-probabilities of what was written under ``params``.

        Other weights may have written it; what changed since then is not the hint's.
        """
        told = self._hinted(trajectories)
        pairs = [(one, own) for one, own in zip(told, trajectories, strict=True) if one is not None]
        score = functools.partial(self._hinted_logprobs, params)
        after, before = (of_trajectories(score, [pair[i] for pair in pairs], self._train) for i in range(2))
        gains = map(np.subtract, after, before)
        progress.coefficients["hinted"] = len(pairs) / len(told)
        return dataclasses.replace(outcomes, hint_gains=[None if one is None else next(gains) for one in told])

    def charged(
        self, outcomes: Outcomes, trajectories: Sequence[Trajectory], reference: Any | None, progress: RunProgress
    ) -> Outcomes:
        """``outcomes`` with the KL to the reference subtracted from their rewards, if that is where it is placed.

        Every sampled token pays for its own estimate; the reward of a trajectory loses their sum. Components of the
        reward are left as they are.
        """
        if not (self._charges and trajectories):
            return outcomes
        estimates = of_trajectories(lambda batch: self._divergence(reference, batch), trajectories, self._train)
        sampled = sum(int((one.mask > 0).sum()) for one in trajectories)
        progress.coefficients["kl_found"] = float(sum(values.sum() for values in estimates)) / max(sampled, 1)
        costs = [self._kl_coefficient(progress) * values.astype(np.float64) for values in estimates]
        by_token = [rewards - cost for rewards, cost in zip(outcomes.rewards_by_token(), costs, strict=True)]
        rewards = outcomes.rewards - np.array([cost.sum() for cost in costs])
        return dataclasses.replace(outcomes, rewards=rewards, token_rewards=by_token)

    def prepared(self, updates: Sequence[list[Batch]], params: Any, progress: RunProgress) -> list[list[Batch]]:
        """The micro-batches of a step's updates with the present coefficients in their weights, and the proximal
        policy that the ratio is taken against.

        Args:
            updates: of the step that begins.
            params: the weights it begins with; needed before the first update consumes them.

        Returns:
            The updates, ``TrainConfig.passes`` times in the same order.
        """
        passes = self._train.passes
        scored = [
            [self._rescored(batch, params) if number or passes > 1 else batch for batch in batches]
            for number, batches in enumerate(updates)
        ]
        total = len(scored) * passes
        return [
            [self._prepared(batch, progress, number / total) for batch in batches]
            for number, batches in enumerate(scored * passes)
        ]

    def completed(self, batches: list[Batch], params: Any, reference: Any | None) -> list[Batch]:
        """The micro-batches of the next update with targets in the place of advantages, if its loss is of whole groups.

        Args:
            batches: as ``prepared`` made them.
            params: the weights that the update begins with.
            reference: looked at where the loss does.
        """
        if self._algorithm.loss not in targets.TARGETS:
            return batches
        sampled = [batch for batch in batches if batch.mask.any()]  # the others are demonstrations
        logprobs = [self._logprobs(params, batch.replace(groups=None)) for batch in sampled]
        theirs = None
        if self._algorithm.loss in targets.AGAINST_REFERENCE:
            theirs = [self._reference_logprobs(reference, batch.replace(groups=None)) for batch in sampled]
        known = [self._contents.with_proximal(batch) for batch in sampled]
        found = iter(targets.completed(self._algorithm, known, logprobs, theirs))
        return [
            batch.replace(advantages=next(found).advantages, groups=None) if batch.mask.any() else batch
            for batch in batches
        ]

    def _rescored(self, batch: Batch, params: Any) -> Batch:
        """With the log-probabilities of ``params`` as the proximal ones, if the run takes these."""
        if not (self._rescores and batch.mask.any()):
            return batch
        return batch.replace(proximal_logprobs=once(self._logprobs(params, batch.replace(groups=None))))

    def _prepared(self, batch: Batch, progress: RunProgress, done: float) -> Batch:
        """``done`` is the share of the step's updates that come before."""
        algorithm = self._algorithm
        scale = np.float32(self._kl_coefficient(progress) / algorithm.kl_coefficient if algorithm.kl_coefficient else 1)
        bonus = self._entropy_coefficient(progress)
        return batch.replace(
            kl_weights=batch.kl_weights * scale,
            entropy_weights=batch.rl_weights * np.float32(bonus),
            proximal_shares=proximal_shares(algorithm, batch.versions, progress.step, done) * (batch.mask > 0),
        )

    def adapt(self, metrics: Mapping[str, float], trajectories: int, progress: RunProgress) -> dict[str, float]:
        """Move the coefficients by what the step found.

        Args:
            metrics: of the step's updates; none of a step that was skipped, which moves nothing.
            trajectories: the step was trained on.

        Returns:
            ``metrics`` with the coefficients that the step used, where they move, and the KL that rewards paid for.
        """
        algorithm, state = self._algorithm, progress.coefficients
        if not metrics:
            return {}
        shown = dict(metrics)
        if self._charges:
            shown["kl_to_reference"] = state["kl_found"]
        if algorithm.hint:
            shown["hinted_share"] = state["hinted"]
        if algorithm.kl_target:
            shown["kl_coefficient"] = self._kl_coefficient(progress)
            state["kl"] = divergence.adapted(
                shown["kl_coefficient"],
                shown["kl_to_reference"],
                target=algorithm.kl_target,
                horizon=algorithm.kl_horizon,
                count=trajectories,
            )
        if algorithm.entropy_target:
            shown["entropy_coefficient"] = self._entropy_coefficient(progress)
            state["entropy"] = entropy.adapted(
                state.get("entropy", algorithm.entropy_coefficient),
                metrics["entropy"],
                target=algorithm.entropy_target,
                step=algorithm.entropy_step,
                largest=algorithm.entropy_limit,
            )
            state["entropy_paid"] = state["entropy"] if metrics["entropy"] <= algorithm.entropy_target else 0.0
        return shown

    def refreshed(self, reference: Any | None, params: Any, step: int) -> Any | None:
        """The reference after ``step`` steps, moved towards the policy where one is due; the old one is consumed."""
        every = self._algorithm.reference_every
        if reference is None or not every or step % every:
            return reference
        with jax.set_mesh(self._mesh), self._launches:
            return self._mix(reference, params)

    def _kl_coefficient(self, progress: RunProgress) -> float:
        fixed = self._algorithm.kl_coefficient
        return progress.coefficients.get("kl", fixed) if self._algorithm.kl_target else fixed

    def _entropy_coefficient(self, progress: RunProgress) -> float:
        fixed = self._algorithm.entropy_coefficient
        return progress.coefficients.get("entropy_paid", fixed) if self._algorithm.entropy_target else fixed


def proximal_shares(algorithm: AlgorithmConfig, versions: np.ndarray, step: int, done: float) -> np.ndarray:
    """How far from ``Batch.proximal_logprobs`` towards the present policy the proximal one lies, in log space.

    ``behaviour``: 0. ``recomputed``: in the first update of a step the present weights are those that the step began
    with, 1; later ones find them scored, 0. ``interpolated``: (step - version) / (step + done - version), as if every
    update moved a log-probability by the same amount (AReaL's "loglinear" approximation of the decoupled loss,
    arXiv 2505.24298); tokens of the step's own weights have 0.

    Args:
        versions: int, of the weights that sampled a token.
        step: version of the weights that the step began with.
        done: share of the step's updates that came before, in [0, 1).

    Returns:
        float32 of the shape of ``versions``.
    """
    if algorithm.proximal == "interpolated":
        age = (step - versions).astype(np.float32)
        return np.where(age > 0, age / np.maximum(age + np.float32(done), 1), 0).astype(np.float32)
    first = algorithm.proximal == "recomputed" and done == 0
    return np.full(versions.shape, first, np.float32)
