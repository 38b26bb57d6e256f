"""What losses of whole groups fit sequences to, completed before an update from the log-probabilities it begins with.

A group lies in several rows and micro-batches, of which a loss sees one at a time; its mean is therefore taken here, on
the host, over all trajectories of the update, and splitting into micro-batches changes nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxrl.config import AlgorithmConfig
from jaxrl.records import Batch
from jaxrl.rl.methods import configured
from jaxrl.rl.outcomes import indices_of


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N sampled sequences of one update, as its weights find them. All [N] float64 but for ``groups``."""

    groups: np.ndarray  # [N] int
    advantages: np.ndarray  # mean over the sampled tokens
    log_ratios: np.ndarray  # sum of logprob - proximal logprob
    logprobs: np.ndarray  # mean of logprob
    reference_logprobs: np.ndarray  # mean of the reference's; 0 for losses that do not look at it
    lengths: np.ndarray  # sampled tokens


def of_gvpo(sequences: Sequences, *, beta: float = 0.1) -> np.ndarray:
    """[N] advantage + the group's mean of beta · log-ratio; see ``policy_losses.regression.gvpo``."""
    return sequences.advantages + _group_means(beta * sequences.log_ratios, sequences.groups)


def of_flowrl(sequences: Sequences, *, beta: float = 15.0, cap: float = 10.0) -> np.ndarray:
    """[N] beta · advantage + reference logprob - ln Z; see ``policy_losses.regression.flowrl``."""
    del cap  # a setting of the loss
    unnormalised = beta * sequences.advantages + sequences.reference_logprobs
    return unnormalised - _group_means(unnormalised - sequences.logprobs, sequences.groups)


def of_a_star_po(sequences: Sequences, *, beta: float = 1e-3) -> np.ndarray:
    """[N] advantage + beta · sum of the reference's logprob; see ``policy_losses.regression.a_star_po``."""
    return sequences.advantages + beta * sequences.lengths * sequences.reference_logprobs


TARGETS: Mapping[str, Callable[..., np.ndarray]] = {
    "gvpo": of_gvpo,
    "flowrl": of_flowrl,
    "a_star_po": of_a_star_po,
}
"""By the name of the loss, whose settings they share."""

AGAINST_REFERENCE = frozenset({"flowrl", "a_star_po"})
"""Those that look at the reference."""


def keeps_reference(config: AlgorithmConfig) -> bool:
    """Whether reinforcement needs the policy that it began from."""
    return bool(config.kl_coefficient) or config.reference_ratios or config.loss in AGAINST_REFERENCE


def completed(
    config: AlgorithmConfig,
    batches: Sequence[Batch],
    logprobs: Sequence[np.ndarray],
    reference_logprobs: Sequence[np.ndarray] | None,
) -> list[Batch]:
    """The micro-batches of an update with targets in the place of advantages.

    Args:
        config: names the loss.
        batches: of one update, those that hold sampled sequences; ``groups`` is set.
        logprobs: of each [B, T], under the weights that the update begins with.
        reference_logprobs: of each [B, T], under the reference; None for a loss that does not look at it.
    """
    target = configured("AlgorithmConfig.loss", TARGETS, config.loss, config.loss_settings)
    owners = [_owners(batch) for batch in batches]
    parts = [
        _sequences(batch, owner, own, None if reference_logprobs is None else reference_logprobs[index])
        for index, (batch, owner, own) in enumerate(zip(batches, owners, logprobs, strict=True))
    ]
    fields = [field.name for field in dataclasses.fields(Sequences)]
    whole = Sequences(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})
    found = np.split(target(whole), np.cumsum([len(part.groups) for part in parts])[:-1])
    return [
        batch.replace(advantages=np.append(of_batch, 0.0)[owner].astype(np.float32), groups=None)
        for batch, owner, of_batch in zip(batches, owners, found, strict=True)
    ]


def _owners(batch: Batch) -> np.ndarray:
    """[B, T] the number, from 0, of the sequence that a sampled token of a micro-batch belongs to; elsewhere -1."""
    here, segments = batch.mask > 0, batch.segment_ids
    names = np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1) + segments
    owners = np.full(here.shape, -1)
    owners[here] = np.unique(names[here], return_inverse=True)[1]
    return owners


def _sequences(batch: Batch, owners: np.ndarray, logprobs: np.ndarray, reference: np.ndarray | None) -> Sequences:
    here = owners >= 0
    lengths = np.bincount(owners[here])

    def mean(values: np.ndarray | None) -> np.ndarray:
        if values is None:
            return np.zeros(len(lengths))
        return np.bincount(owners[here], values[here].astype(np.float64)) / lengths

    drift = (1 - batch.proximal_shares) * (logprobs - batch.proximal_logprobs)
    return Sequences(
        groups=np.rint(mean(batch.groups)).astype(int),
        advantages=mean(batch.advantages),
        log_ratios=mean(drift) * lengths,
        logprobs=mean(logprobs),
        reference_logprobs=mean(reference),
        lengths=lengths,
    )


def _group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    means = np.zeros(len(values))
    for rows in indices_of(groups):
        means[rows] = values[rows].mean()
    return means
