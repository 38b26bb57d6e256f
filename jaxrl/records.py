"""The records that flow through one iteration: Problem → Trajectory → Group → Batch.

Host-side records are frozen dataclasses that hold numpy arrays; ``Batch`` is the one pytree that goes to
the device. A trajectory is token-in, token-out: ids are appended as they are sampled or rendered and are
never re-tokenised, so the ids here are the ids the trainer scores.
"""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import numpy as np

from jaxrl.statuses import RewardStatus, StopReason, ToolStatus


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with the answer it is graded against."""

    id: str  # unique within its source, e.g. "gsm8k/17"
    question: str
    answer: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A worked solution for supervised training: what the policy would write, and what its tools would say.

    ``turns`` alternates policy text and tool output text, beginning and ending with policy text.
    """

    problem: Problem
    turns: tuple[str, ...]
    failed: tuple[int, ...] = ()  # indices of the policy turns whose tool call failed


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation that somebody else recorded."""

    role: Literal["system", "user", "assistant", "tool"]
    text: str
    learned: bool = True  # of an assistant's message: whether it is learned; it is context either way
    failed: bool = False  # of an assistant's message: whether a tool call in it failed


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages to learn from: at most one of the system, then the user's and the assistant's in turn, and between two
    of the assistant's those of its tools."""

    id: str  # of the problem it solves, or where it was read
    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One tool call and its outcome."""

    name: str
    arguments: dict[str, Any]
    status: ToolStatus
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0  # execution alone; time spent in a queue is never part of it
    queue_seconds: float = 0.0
    attempts: int = 1
    isolation: str = ""  # how the sandbox held the code ("" where no code ran)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A span ``[start, end)`` of a trajectory's response tokens."""

    start: int
    end: int
    author: str  # "policy" or "tool"
    calls: tuple[ToolCall, ...] = ()  # the calls this policy turn made, in order
    reward: float = 0.0  # what this policy turn earned by itself, apart from the reward of the trajectory
    replaced: bool = False  # the environment put another action in the place of this policy turn's, and went on from it


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One played episode. Per-token arrays run over the response; the prompt is kept apart.

    Attributes:
        mask: 1 where the policy sampled the token, 0 where the environment wrote it.
        logprobs: behaviour log-probability of each sampled token under the untruncated, temperature-scaled
            distribution (nats); 0 where mask is 0.
        versions: weight version that sampled each token; -1 where mask is 0.
        reward: scalar outcome; meaningless unless ``reward_status.trainable``.
        components: what ``reward`` is the weighted sum of, by name; one that had nothing to say is left out.
        greedy_reward: of a greedy trajectory of the same draw, where one was played.
        role: the agent that wrote it, where several play in one episode.
        episode: trajectories of one draw with the same number were played with each other.
        experts: of prompt and response, the experts of every layer that computed each token when it was sampled or
            prefilled; -1 for the last token, which nothing computed. None where the engine did not record them.
    """

    problem: Problem
    draw: int  # which draw of the run's problem stream this is; with ``sample`` it names the random key
    sample: int  # index within the group
    prompt_ids: np.ndarray  # [prompt tokens] int32
    ids: np.ndarray  # [T] int32
    mask: np.ndarray  # [T] int8
    logprobs: np.ndarray  # [T] float32
    versions: np.ndarray  # [T] int32
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    text: str = ""  # the decoded response, special tokens kept
    answer: str | None = None  # the last answer the policy wrote, as graded
    answer_tags: int = 0  # closed answer tags in policy-written text
    balanced_tags: bool = True  # every answer tag that was opened was closed, in order
    reward: float = 0.0
    reward_status: RewardStatus = RewardStatus.NO_ANSWER
    components: dict[str, float] = dataclasses.field(default_factory=dict)
    greedy_reward: float | None = None
    role: str = ""
    episode: int = 0
    seconds: float = 0.0
    tool_seconds: float = 0.0
    experts: np.ndarray | None = None  # [prompt tokens + T, L, experts of a token] int8 or int16

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(call for turn in self.turns for call in turn.calls)

    @property
    def policy_turns(self) -> int:
        return sum(turn.author == "policy" for turn in self.turns)

    @property
    def correct(self) -> bool:
        return self.reward_status is RewardStatus.CORRECT

    @property
    def trainable(self) -> bool:
        """False where our own machinery failed: such a trajectory is left out and counted, never scored 0."""
        return self.stop_reason is not StopReason.INFRA_ERROR and self.reward_status.trainable


@dataclasses.dataclass(frozen=True)
class Group:
    """All trajectories of one draw of a problem."""

    problem: Problem
    draw: int
    trajectories: tuple[Trajectory, ...]


@flax.struct.dataclass
class Tree:
    """Rows in which the trajectories of a batch lie as tries, so that the network computes once what they share.

    A node is a token with the token that follows it, in depth-first order: trajectories share it as long as they agree
    on both. What a node predicts is thus the token after it, and where trajectories part each has a copy of the last
    token they agree on. A node sees its ancestors and itself: those nodes j before node i with ``i < ends[j]``.
    """

    tokens: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32, how many ancestors the node has
    ends: jax.Array  # [B, T] int32, index after the last node below this one; 0 = padding
    copies: jax.Array  # [B, T] int32, trajectories that have the node; 0 = padding
    predictors: jax.Array  # [B, U] int32, the node that predicts a token of the batch; -1 where none does


@flax.struct.dataclass
class Batch:
    """Packed rows on the device. ``x[b, t]`` of every field belongs to token ``tokens[b, t]``.

    With a ``tree`` the rows hold what the losses are of and nothing else, [B, U]: of every trajectory the response. The
    network computes the tree, whose T nodes a row of ``experts`` then belongs to.

    The loss of a batch is a sum of components, each a sum over tokens with weights of its own: the policy loss, the KL
    to the reference, the entropy bonus, the cross-entropy. The aggregation (token, sequence, constant length) and its
    global denominator are already in the weights, so any split into micro-batches sums to the same loss, and rows of
    several kinds mix.
    """

    tokens: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32, restarts in every segment
    segment_ids: jax.Array  # [B, T] int32, 0 = padding, 1.. = segments in order
    mask: jax.Array  # [B, T] float32, 1 where the policy sampled the token
    rl_weights: jax.Array  # [B, T] float32, of the policy loss; 0 where mask is 0
    kl_weights: jax.Array  # [B, T] float32, of the KL to the reference; 0 where mask is 0
    ce_weights: jax.Array  # [B, T] float32, of the negative log-likelihood; may be set where mask is 0
    advantages: jax.Array  # [B, T] float32
    behaviour_logprobs: jax.Array  # [B, T] float32, by the weights that sampled the token
    proximal_logprobs: jax.Array  # [B, T] float32, by the weights the ratio of the policy loss is taken against
    proximal_shares: jax.Array  # [B, T] float32, how far from there to the present policy the ratio is really taken
    entropy_weights: jax.Array  # [B, T] float32, of the entropy bonus; 0 where mask is 0
    versions: jax.Array  # [B, T] int32, weight version that sampled the token; means nothing where mask is 0
    groups: np.ndarray | None = None  # [B, T] int32, of a trajectory, for targets; never reaches the devices
    experts: jax.Array | None = None  # [B, T, L, experts of a token] int8 or int16, to compute with; -1 = the router's
    tree: Tree | None = None

    @classmethod
    def zeros(cls, rows: int, row_tokens: int, experts: np.ndarray | jax.ShapeDtypeStruct | None = None) -> "Batch":
        """Rows of padding, numpy.

        Args:
            experts: anything of the shape [..., L, experts of a token] and the type of ``experts``, if there are any.
        """

        def zeros(dtype: type) -> np.ndarray:
            return np.zeros((rows, row_tokens), dtype)

        integers = {"tokens", "positions", "segment_ids", "versions"}
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("groups", "experts", "tree")]
        batch = cls(**{name: zeros(np.int32 if name in integers else np.float32) for name in names})
        return batch.with_experts(experts)

    def with_experts(self, experts: np.ndarray | jax.ShapeDtypeStruct | None) -> "Batch":
        """The rows with ``experts``, of this shape and type: those recorded, else -1; without any where it is None.

        Programs are compiled for one or the other.
        """
        if experts is None:
            return self.replace(experts=None)
        if self.experts is not None:
            return self
        computed = (self.tree or self).tokens
        return self.replace(experts=np.full((*computed.shape, *experts.shape[-2:]), -1, experts.dtype))
