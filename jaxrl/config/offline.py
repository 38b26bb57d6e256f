"""What is learned from others: from answers that somebody compared or judged, and from a teacher."""

import dataclasses
from dataclasses import field
from typing import Literal


@dataclasses.dataclass(frozen=True)
class PreferConfig:
    """``jaxrl prefer``: AdamW as in the cold start (SftConfig), on the model that ModelConfig.path names."""

    data: str = ""
    """JSONL files, whose format docs/algorithms.md has, or run folders with episodes; commas between."""
    pairs_of_problem: int = 0
    """Of a run folder: pairs of a right and a wrong episode of one problem, at most; 0 = as many as there are, each
    episode in one."""
    held_out: int = 64
    """Rows kept back to measure on, all rows of a prompt or none; at most half of them."""
    kind: Literal["pairs", "judged", "reward", "process"] = "pairs"
    """"pairs": a chosen and a rejected answer to a prompt; "judged": single answers that are good or bad. With a value
    head, to be a reward: "reward": pairs again; "process": answers in steps that are right or wrong."""
    loss: str = "sigmoid"
    """A name in docs/algorithms.md for this kind, or "path/to/file.py:function"."""
    loss_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    reference: bool = True
    """Measure against the policy that training began from, which is kept as it was; False = against nothing (CPO)."""
    sft_weight: float = 0.0
    """Weight of the mean negative log-likelihood of the chosen answers' tokens beside the loss (RPO, CPO, ORPO)."""
    length_weight: float = 1.0
    """Pairs: weight of the tokens by which an answer is longer than the other of its pair; below 1 is LD-DPO."""
    on_policy_weights: bool = False
    """Weigh pairs and judged answers by how likely the policy is to write them itself (WPO); one more forward pass."""
    steps: int = 200
    rows: int = 16
    """Packed rows in one update."""
    row_tokens: int = 512
    """Tokens in a packed row; must hold both answers of a pair, each with the prompt."""
    learning_rate: float = 1e-6
    warmup_steps: int = 10
    measure_every: int = 50
    """Steps between measurements on the rows kept back; 0 = only before and after."""


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A teacher whose distribution the policy learns, in `jaxrl train` and `jaxrl sft`."""

    teacher: str = ""
    """Hugging Face folder, with the policy's vocabulary; empty = no teacher."""
    stages: Literal["reinforcement", "cold_start", "both"] = "reinforcement"
    """On what it is learned: what the policy samples (on-policy distillation), the demonstrations, or both (GKD)."""
    loss: str = "generalised_jsd"
    """The loss of a token: a name in docs/algorithms.md. Demonstrations take "generalised_jsd" or "forward_kl_top"."""
    loss_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    task_weight: float = 0.0
    """Weight of the stage's own loss (the policy loss, or that of SftConfig) beside the distillation; 0 = none."""
