"""What is trained on, and how: data, cold start, algorithm, optimizer, loop, evaluation, checkpoints."""

import dataclasses
from dataclasses import field
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Problems to train and evaluate on."""

    train: str = "stories"
    """"stories" makes problems on the spot; anything else is a path to a JSONL file (comma-separated for several)."""
    eval: str = "stories"
    """As ``train``, for problems never trained on; empty keeps back ``eval_problems`` rows of ``train``."""
    train_problems: int = 4096
    """How many stories to make (files are used whole)."""
    eval_problems: int = 128
    """How many problems an evaluation uses at most."""
    seed: int = 0
    """Of the stories and of the shuffling."""


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Cold start on demonstrations: AdamW, second beta 0.95; first beta, decay and clipping as in OptimizerConfig."""

    demonstrations: str = "stories"
    """"stories"; "gsm8k" (calculator notes of DataConfig.train turned into Python); or paths, with commas between:
    JSONL files of chat messages, and run folders whose recorded episodes are learned. Empty skips the cold start."""
    episodes: Literal["correct", "all"] = "correct"
    """Run folders: which of the episodes that were played to train on."""
    mask_failed_calls: bool = False
    """Policy turns whose tool call failed stay in the context and are not learned."""
    loss: str = "nll"
    """The loss of a token to be learned: a name in docs/algorithms.md, or "path/to/file.py:function"."""
    loss_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    count: int = 8192
    """Stories: demonstrations to make. Files: at most so many of their rows."""
    variants: int = 0
    """Files: further demonstrations of each row, with other numbers in question and program."""
    wrong_share: float = 0.4
    """Stories: share of demonstrations with a wrong operation or operand."""
    repair_share: float = 0.25
    """Stories: share of demonstrations whose first call fails and is then repaired."""
    steps: int = 300
    rows: int = 32
    """Packed rows in one update."""
    row_tokens: int = 256
    learning_rate: float = 3e-3
    warmup_steps: int = 20


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """Selection, advantages and loss (GRPO-RoC unless changed)."""

    reject_equal: bool = True
    """Drop groups in which all answers are right or all are wrong."""
    selection: str = "roc"
    """Which trajectories of a group are kept: a name in docs/algorithms.md, or "path/to/file.py:function"."""
    selection_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of the selection, by name, where they are not its defaults."""
    keep: int = 8
    """Trajectories kept of every group; 0 = all."""
    leave_out: tuple[str, ...] = ()
    """Filters, by name or path: a trajectory that one of them holds of leaves its group before anything else."""
    mask_out: tuple[str, ...] = ()
    """Filters: a kept trajectory that one of them holds of counts in its group's mean and is not trained on."""
    extra_samples: str = ""
    """How many more trajectories a problem gets once its first ones are graded: a name in docs/algorithms.md, or
    "path/to/file.py:function"; empty = none."""
    extra_samples_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of ``extra_samples``, by name, where they are not its defaults."""
    advantage: str = "grpo"
    """How rewards become advantages: a name in docs/algorithms.md, or "path/to/file.py:function"."""
    advantage_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of the advantage, by name, where they are not its defaults."""
    greedy_baseline: bool = False
    """Play one more, greedy, trajectory of every problem, whose reward the advantage ``remax`` subtracts."""
    square_sums: bool = False
    """Score, of every token, the sum of squared probabilities over the vocabulary, which the advantage
    ``optimal_token_baseline`` needs: one more forward pass a step."""
    reference_ratios: bool = False
    """Keep the policy that reinforcement began from and score every token under it, which the advantages
    ``online_dpo``, ``xpo``, ``nash_md`` and ``optimal_value`` need: one more forward pass a step."""
    hint: Literal["", "demonstration", "attempts"] = ""
    """What the policy is told beside a problem when it scores what it wrote, for the advantage ``self_distillation``: a
    demonstration of it (SftConfig.demonstrations), or another attempt that was kept of its group and solved it, or what
    the tools of a failed one answered. Two more forward passes a step; empty = nothing."""
    loss: str = "ppo_clip"
    """The policy loss of a token: a name in docs/algorithms.md, or "path/to/file.py:function"."""
    loss_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of the loss, by name, where they are not its defaults."""
    aggregation: Literal["token", "token_sum", "sequence", "sequence_sum", "constant"] = "token"
    """How the losses of tokens become one number, see docs/algorithms.md."""
    kl_coefficient: float = 0.0
    """Weight of the KL to the reference, the policy RL started from."""
    kl_estimator: Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"] = "k3"
    """How it is estimated; with a "+" the value stays and the gradient is that of k2."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """Added to the loss, or subtracted from the reward of every token before advantages are made of it."""
    kl_by_ratio: bool = False
    """In the loss: multiply the estimate by the ratio to the proximal policy, over what the loss takes it."""
    kl_target: float = 0.0
    """KL to the reference, nats, that ``kl_coefficient`` is adapted to after every step; 0 = it stays as it is."""
    kl_horizon: int = 10_000
    """Trajectories over which it is adapted: by at most a fifth."""
    reference_every: int = 0
    """Steps after which the reference moves towards the policy; 0 = it never does."""
    reference_mix: float = 0.6
    """Share of the policy in the reference that this makes; 1 = a copy of the policy."""
    entropy_coefficient: float = 0.0
    """Weight of an entropy bonus, aggregated like the policy loss."""
    entropy_target: float = 0.0
    """Entropy, nats, below which the bonus is paid, its weight adapted after every step; 0 = always, one weight."""
    entropy_step: float = 0.005
    """By how much the weight moves."""
    entropy_limit: float = 1.0
    """Its largest value."""
    top_entropy: float = 1.0
    """Share of the sampled tokens that the policy loss is taken of, those of highest entropy."""
    proximal: Literal["behaviour", "recomputed", "interpolated"] = "behaviour"
    """Whose log-probabilities the ratio of the loss is taken against: the sampler's, those of the weights at the step's
    beginning, or a value between the sampler's and the present ones by the age of the token's weights."""
    mismatch: str = "none"
    """How much a token counts by the ratio of the proximal to the sampler's probability: a name in docs/algorithms.md,
    or "path/to/file.py:function"."""
    mismatch_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of ``mismatch``, by name, where they are not its defaults."""
    rejection: str = "none"
    """Which tokens are left out of the policy loss by the same ratio: a name or a path."""
    rejection_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of ``rejection``, by name, where they are not its defaults."""


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """What reinforcement learns beside the policy loss: demonstrations (CHORD), and what tools answer (ECHO)."""

    demonstrations: Literal["off", "batch", "any"] = "off"
    """Of SftConfig.demonstrations, one for each problem of the update: "batch" one of that very problem, where there is
    one; "any" one of them all. Each is drawn anew."""
    peak: float = 0.9
    """Largest weight μ of the demonstrations' loss; the policy loss has 1 - μ."""
    valley: float = 0.05
    """Weight after the decay."""
    warmup_steps: int = 0
    decay_steps: int = 350
    """Steps of the cosine from peak to valley."""
    loss: str = "nll"
    """As SftConfig.loss."""
    loss_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    observation_weight: float = 0.0
    """Weight of the mean cross-entropy of what tools answered; 0.1 in ECHO."""


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """A critic beside the policy, for advantages that need values (PPO with AlgorithmConfig.advantage='gae')."""

    enabled: bool = False
    path: str = ""
    """Hugging Face folder it begins from, such as the export of a reward model; empty takes the policy's decoder."""
    learning_rate: float = 2e-6
    """Its optimizer is the policy's (OptimizerConfig) but for this and the warm-up."""
    warmup_steps: int = 0
    """Updates over which its learning rate rises; for what is called critic warm-up (verl) see ``first_steps``."""
    first_steps: int = 0
    """Steps at the beginning of reinforcement in which it learns alone and the policy stays as it is: what is called
    critic warm-up (verl's ``critic_warmup``), which ``warmup_steps`` is not."""
    clip: float = 0.5
    """How far a value may move in one step before its gradient ends, in units of reward."""
    huber: float = 0.0
    """Error in units of reward beyond which the loss grows linearly; 0 = squares everywhere."""
    discount: float = 1.0
    """γ of the returns it learns."""
    decay: float = 1.0
    """λ of the returns it learns; the advantage has its own in AlgorithmConfig.advantage_settings."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for the RL updates; the cold start takes ``beta1``, ``weight_decay`` and ``clip_norm`` from here too."""

    learning_rate: float = 1e-6
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    offload: bool = False
    """Keep the moments in the host's memory and bring them to the devices only to apply an update, when no activations
    are there."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    seed: int = 0
    steps: int = 100
    problems: int = 16
    """Problems a step trains on."""
    samples: int = 16
    """Trajectories played for each problem."""
    max_draws: int = 4
    """When nothing survives selection, problems are drawn again at most this many times before the step is skipped."""
    refill: bool = False
    """Draw on, as many problems as are missing and at most ``max_draws`` times, until ``problems`` groups survive
    (DAPO's dynamic sampling)."""
    prefetch_groups: int = 0
    """Groups of the next step that are played, with the present weights, while this step's stragglers wait for their
    tools and during its update."""
    max_staleness: int = 0
    """Versions that the oldest token of a trajectory may be behind the weights it is trained with. 0 is synchronous.
    Above it, episodes are played on during updates and while weights are handed over, up to
    (max_staleness + 1) x problems groups at once (docs/asynchronous.md)."""
    next_groups: Literal["drawn", "finished"] = "drawn"
    """What an asynchronous step trains on: the problems drawn first, or those played first, so that no straggler holds
    it up; but then short episodes come earlier, and those that become older than max_staleness are dropped."""
    updates_per_step: int = 1
    """Parts that one collected batch is cut into, with an optimizer update on each (mini-batches)."""
    passes: int = 1
    """Times that a step goes through these parts (PPO's epochs). Advantages, and the proximal policy unless it is
    interpolated, stay those of before the first."""
    rows: int = 16
    """Packed rows in one micro-batch."""
    row_tokens: int = 512
    """Tokens in a packed row; must hold the longest prompt and response."""
    packing: Literal["rows", "shared_prompt", "tree"] = "rows"
    """What the trajectories of a group that lie in one row share: nothing, their prompt, or every beginning that some
    of them have in common. What is shared is computed once, and loss and gradient are the same
    (docs/algorithms.md)."""
    tree_loss_rows: int = 4
    """With packing="tree", response tokens of all trajectories in a row, as a multiple of ``row_tokens``; a shared
    token counts in each. Few numbers are kept of each, and more than are needed cost next to nothing."""
    eval_every: int = 20
    """Steps between evaluations; 0 = only before and after."""
    dump_episodes: bool = True


@dataclasses.dataclass(frozen=True)
class StagesConfig:
    """Stages of one run with their own limits. Every tuple has one entry a stage; all empty = a single stage."""

    until: tuple[int, ...] = ()
    """Cumulative step at which each stage ends."""
    max_response_tokens: tuple[int, ...] = ()
    """At most EngineConfig.max_response_tokens, for which everything is compiled."""
    max_turns: tuple[int, ...] = ()
    drop_solved: tuple[int, ...] = ()
    """On entering the stage play every problem this often and drop those always solved; 0 drops none."""
    drop_unsolved: tuple[int, ...] = ()
    """The same for those never solved, so that a weak policy's steps are not spent on groups that are all wrong."""
    reset_optimizer: tuple[bool, ...] = ()
    """Begin the stage with a fresh optimizer, and the present policy as the reference."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training and by ``jaxrl eval``."""

    samples: int = 8
    """Samples for each problem."""
    temperature: float = 1.0
    """0 = greedy."""
    k: tuple[int, ...] = (1, 8)
    """Values of k for pass@k; maj@k uses all samples."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 20
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept, beside the best by pass rate."""
