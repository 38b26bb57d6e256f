"""How episodes are played and graded: engine, sandbox, environment, verifier."""

import dataclasses
from dataclasses import field
from typing import Literal


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The rollout engine: decode slots, KV pages, compiled shapes."""

    slots: int = 64
    """Sequences that decode together."""
    page_size: int = 16
    """Tokens in a KV page."""
    pages: int = 0
    """KV pages; 0 gives every slot its longest sequence."""
    kv_dtype: Literal["auto", "int8", "float8_e4m3fn"] = "auto"
    """What keys and values are kept in: "auto" is ``ModelConfig.compute_dtype``; the others take 8 bits a number and a
    scale for each token and KV head, so that about twice as many pages go into the same memory. The log-probabilities
    that the sampler records then differ from those of training by that rounding (``docs/kernels.md``)."""
    round_steps: int = 16
    """Decode steps in one jitted round."""
    prefill_rows: int = 4
    """Chunks in one prefill call; empty ones cost as much as full ones."""
    prefill_chunk: int = 64
    """Tokens of a row that one prefill call takes; longer texts take several calls."""
    max_prompt_tokens: int = 256
    max_response_tokens: int = 256
    """Response tokens of all turns together, tool output included."""
    group_decode: Literal["auto", "on", "off"] = "auto"
    """Slots with the same prompt read its KV pages once for all of them in every decode step. "auto" does on TPUs
    whose kernel takes the shapes; elsewhere it pays for large groups with long prompts, and costs time once few of a
    group are left (``docs/kernels.md``). It changes the last bits of log-probabilities."""
    group_width: int = 16
    """The most slots that read a prompt together; a larger group does it in several parties."""
    temperature: float = 1.0
    record_experts: bool = False
    """Keep which experts computed each token of an episode, and train with these instead of those that the router would
    choose then. For models with experts."""
    reserve_quantile: float = 1.0
    """Admission reserves this quantile of recent response lengths; 1 = the longest possible, never preempts. Below 1 a
    preempted sequence is prefilled anew, which may change the last bits of its log-probabilities; with ``kv_dtype`` a
    number between two levels of 8 bits may then become the other one."""


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
    """Where tool code runs."""

    workers: int = 2
    """Template processes of each kind, from which calls are forked."""
    slots: int = 4
    """Calls that run at once, over all workers."""
    slow_slots: int = 8
    """Further calls that may run on, at lower priority, once they have lasted a quarter second."""
    queue: int = 4096
    """Calls that may wait before submitting blocks."""
    cpu_seconds: float = 4.0
    """CPU time of a call, all threads together. This and the next nine are ``Limits`` of one call."""
    wall_seconds: float = 8.0
    """For code that sleeps; stretched by the time the code waited for a core."""
    memory_mib: int = 512
    """Address space a call may add; with ``disk_mib`` what a call that starts processes may use."""
    output_kib: int = 64
    """Kept of stdout and of stderr, head and tail."""
    output_hard_mib: int = 16
    """Output beyond this ends the call."""
    disk_mib: int = 64
    """A call's working directory, which lies in memory."""
    open_files: int = 64
    threads: int = 128
    """Each takes 3 MiB of ``memory_mib``."""
    files_mib: int = 16
    """Files that a call returns, together."""
    processes: int = 32
    """Processes and threads of a call that may start processes."""
    session_memory_mib: int = 4096
    """Live sessions together; beyond it those unused for longest are put out, and rebuilt when they are needed."""
    preload: tuple[str, ...] = ("numpy", "scipy", "sympy")
    """Modules that are loaded once: calls that mention one find it already imported."""
    program_folders: tuple[str, ...] = ()
    """Further folders of the host, by absolute path, for calls that start programs; the code can read all of them."""
    processes_without_cgroup: bool = False
    """Let calls start processes also where no memory cgroup bounds them together. Named in their results."""
    cluster: str = ""
    """Where the calls run: "" on this machine; otherwise on every node of a Ray cluster, each with so many workers and
    slots: "auto" for the cluster that this machine belongs to, or the address of its head as "host:port"."""
    unsafe: bool = False
    """Run tool code without isolation. Named in every result. For machines without namespaces, at your own risk."""


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """Limits of one episode."""

    max_turns: int = 4
    """Policy turns."""
    max_turn_tokens: int = 0
    """Tokens of one policy turn; 0 = only the response budget."""
    max_tool_tokens: int = 64
    """A tool's output is cut once, in the middle, to this many tokens."""
    max_parallel_calls: int = 1
    """Calls of one turn that run; the rest are answered with an error."""
    traceback: Literal["last", "full"] = "last"
    """What the policy reads of an error: its final message, or the whole traceback."""
    wall_seconds: float = 60.0
    """Seconds of the episode's own: engine rounds it takes part in and calls that run, without any waiting."""
    queue_seconds: float = 600.0
    """A call that has no result after this, on top of its run time, counts as a fault of ours."""
    infra_retries: int = 2
    """Fresh tries of a call after a fault of ours; then the trajectory leaves the batch."""
    joint_episode: str = ""
    """How several agents play an episode that is trained on: a name in docs/episodes.md, or
    "path/to/file.py:function"; empty = one plays it alone, as in evaluations."""
    joint_episode_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of ``joint_episode``, by name, where they are not its defaults."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Grading, and what is rewarded."""

    components: dict[str, float] = field(default_factory=lambda: {"correct": 1.0})
    """What is rewarded, and its weight: names in docs/algorithms.md, or "path/to/file.py:function"."""
    component_settings: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Of the components, by "COMPONENT.SETTING", where they are not their defaults."""
    judge: str = ""
    """ "path/to/file.py:function", asked about every correct trajectory that is trained on; empty = nobody is."""
    judge_seconds: float = 60.0
    """A judge that has not replied after this has said nothing."""
    verifier: str = "math"
    """What compares an answer with the expected one: a name in docs/algorithms.md, or "path/to/file.py:function"."""
    workers: int = 1
    """Processes of the verifier "math"."""
    seconds: float = 5.0
    """Hard deadline for one answer."""
