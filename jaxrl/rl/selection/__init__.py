"""Which trajectories of a group are trained on. Host side, numpy, a handful of numbers a group.

In this order: those that our own machinery spoiled leave; those that a filter names leave; a group whose answers are
all right or all wrong is rejected; a method chooses among the rest. What stays may still be masked: it counts in the
group's mean and is not trained on. Everything that leaves is counted.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.records import Trajectory
from jaxrl.rl.example import example
from jaxrl.rl.methods import configured
from jaxrl.rl.selection.candidates import Candidates
from jaxrl.rl.selection.filters import FILTERS
from jaxrl.rl.selection.resampling import penalty, roc, roc_sampled, tool_counts
from jaxrl.rl.selection.simple import first, max_variance
from jaxrl.rl.trial import described, numeric, tried

Statistics = dict[str, tuple[float, float]]  # name -> (sum, count); groups add up
Filter = Callable[[Trajectory], bool]
Rejection = Literal["", "untrainable", "filtered", "all_correct", "all_wrong", "masked"]

SELECTIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "roc": roc,
    "roc_sampled": roc_sampled,
    "first": first,
    "max_variance": max_variance,
}


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is kept of one group, and why not more.

    Attributes:
        kept: in the order of their sample index; empty when the group is rejected.
        rejected: why the whole group was left out; "" when it was not.
        statistics: (sum, count) by name, over raw and kept trajectories.
        masked: of each one kept, whether it counts in the group's statistics only; empty = none does.
    """

    kept: tuple[Trajectory, ...]
    rejected: Rejection
    statistics: Statistics
    masked: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chooser:
    """The rules of a run, by which ``choose`` goes. Made by ``chooser``."""

    method: Callable[[Candidates], np.ndarray]
    keep: int
    reject_equal: bool
    leave_out: Mapping[str, Filter]
    mask_out: Mapping[str, Filter]

    def choose(self, trajectories: Sequence[Trajectory], rng: np.random.Generator) -> Selection:
        """Choose what to train on from one group; the result does not depend on the order of the input.

        Args:
            trajectories: all trajectories of one draw.
            rng: source of the draws; seed it from the run's seed and the draw, so that a resumed run draws the same.
        """
        ordered = sorted(trajectories, key=lambda trajectory: trajectory.sample)
        trainable = [trajectory for trajectory in ordered if trajectory.trainable]
        eligible = [trajectory for trajectory in trainable if not _holds(self.leave_out, trajectory)]
        rejected = self._rejection(trainable, eligible)
        kept = np.arange(0) if rejected else np.asarray(self.method(Candidates(eligible, self.keep, rng)), int)
        chosen = tuple(eligible[index] for index in kept)
        masked = tuple(_holds(self.mask_out, trajectory) for trajectory in chosen)
        counted = self._counted(ordered, trainable, chosen, masked)
        if chosen and all(masked):
            rejected, kept, chosen, masked = "masked", kept[:0], (), ()
        counted |= {"kept": (float(len(chosen)), 1.0), "groups_kept": (float(len(chosen) > 0), 1.0)}
        counted |= {f"groups_{why}": (float(rejected == why), 1.0) for why in typing.get_args(Rejection) if why}
        return Selection(chosen, rejected, _statistics(eligible, kept) | counted, masked)

    def _rejection(self, trainable: Sequence[Trajectory], eligible: Sequence[Trajectory]) -> Rejection:
        if not eligible:
            return "filtered" if trainable else "untrainable"
        correct = [trajectory.correct for trajectory in eligible]
        if not self.reject_equal or not equal_reward(np.array(correct)):
            return ""
        return "all_correct" if correct[0] else "all_wrong"

    def _counted(
        self,
        ordered: Sequence[Trajectory],
        trainable: Sequence[Trajectory],
        chosen: Sequence[Trajectory],
        masked: Sequence[bool],
    ) -> Statistics:
        """What left, and what stays without weight."""
        counted = {
            "untrainable_share": (float(len(ordered) - len(trainable)), float(len(ordered))),
            "group_size": (float(len(ordered)), 1.0),
        }
        for name, rule in self.leave_out.items():
            counted[f"left_out_{name}"] = (float(sum(map(rule, trainable))), float(len(trainable)))
        for name, rule in self.mask_out.items():
            counted[f"masked_{name}"] = (float(sum(map(rule, chosen))), float(len(chosen)))
        if self.mask_out:
            counted["masked"] = (float(sum(masked)), float(len(chosen)))
        return counted


def chooser(config: AlgorithmConfig) -> Chooser:
    """The rules that ``selection``, ``leave_out`` and ``mask_out`` name.

    Raises:
        ConfigError: see ``methods.configured`` and ``trial.tried``; floors above ``keep``; a method that does not give
            back indices; a filter that does not give back True or False.
    """
    method = configured("AlgorithmConfig.selection", SELECTIONS, config.selection, config.selection_settings)
    rules = Chooser(
        method=method,
        keep=config.keep,
        reject_equal=config.reject_equal,
        leave_out=_filters("AlgorithmConfig.leave_out", config.leave_out),
        mask_out=_filters("AlgorithmConfig.mask_out", config.mask_out),
    )
    candidates = Candidates([example(0), example(1)], config.keep, np.random.default_rng(0))
    kept = tried("AlgorithmConfig.selection", config.selection, method, candidates)
    if not numeric(kept) or np.ndim(kept) != 1 or not np.isin(kept, [0, 1]).all() or not (np.diff(kept) > 0).all():
        raise ConfigError(
            f"AlgorithmConfig.selection={config.selection!r} gave {kept!r:.80} for a group of 2 trajectories; "
            "it must give ascending indices of those it keeps"
        )
    return rules


def equal_reward(rewards: np.ndarray) -> bool:
    """True if every reward [G] is close to the first (within 1e-8 + 1e-5 |first|), also for G < 2.

    Such a group has no advantage to learn from.
    """
    rewards = np.asarray(rewards, np.float64)
    return bool(np.isclose(rewards, rewards[:1], rtol=1e-5, atol=1e-8).all())


def _holds(filters: Mapping[str, Filter], trajectory: Trajectory) -> bool:
    return any(rule(trajectory) for rule in filters.values())


def _filters(key: str, names: Sequence[str]) -> dict[str, Filter]:
    filters: dict[str, Filter] = {}
    for name in names:
        rule = filters[name.rpartition(":")[2]] = configured(key, FILTERS, name, {})
        for trajectory in (example(0), example(1)):
            said = tried(key, name, rule, trajectory)
            if not isinstance(said, bool | np.bool_):
                raise ConfigError(f"{key}={name!r} gave {described(said)} for a trajectory; it must give True or False")
    return filters


def _statistics(trajectories: Sequence[Trajectory], kept: np.ndarray) -> Statistics:
    """What selection did, as (sum, count)."""
    correct = np.array([trajectory.correct for trajectory in trajectories], bool)
    penalties = np.array([penalty(trajectory) for trajectory in trajectories], np.float64)
    counts = np.array([tool_counts(trajectory) for trajectory in trajectories], np.int64).reshape(-1, 2)
    chosen = np.zeros(len(correct), bool)
    chosen[kept] = True

    def share(values: np.ndarray, among: np.ndarray) -> tuple[float, float]:
        return float(values[among].sum()), float(among.sum())

    def error_share(among: np.ndarray) -> tuple[float, float]:
        calls, errors = counts[among].sum(axis=0)
        return float(errors), float(calls)

    return {
        "pass_rate": share(correct, np.ones(len(correct), bool)),
        "pass_rate_kept": share(correct, chosen),
        "kept_share_of_correct": share(chosen, correct),
        "kept_share_of_wrong": share(chosen, ~correct),
        "penalty_of_correct_kept": share(penalties, correct & chosen),
        "penalty_of_correct_dropped": share(penalties, correct & ~chosen),
        "tool_error_share_in_correct": error_share(correct),
        "tool_error_share_in_correct_kept": error_share(correct & chosen),
        "tool_error_share_in_wrong": error_share(~correct),
    }
