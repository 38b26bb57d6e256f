"""What a run writes down and shows: metrics, episodes, alarms, checkpoints, seconds by phase."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxrl.config import Config
from jaxrl.evaluate.run import EvalReport
from jaxrl.observe import alarms, metrics, traces, writers
from jaxrl.observe.progress import Progress
from jaxrl.processes.exchange import is_first
from jaxrl.records import Trajectory
from jaxrl.rewards.scorer import component_names
from jaxrl.rl.selection import Selection
from jaxrl.train.checkpoint import Checkpoints
from jaxrl.train.progress import RunProgress
from jaxrl.train.run import RunFolder
from jaxrl.train.shares import is_own

ALARM_HISTORY = 64
"""Steps the alarms look back on."""
ENGINE_TOTALS = (
    *("opened", "rounds", "decode_tokens", "decode_steps", "prefill_tokens", "prefill_calls"),
    *("decode_seconds", "prefill_seconds", "serving_seconds", "queue_seconds", "preemptions"),
)
STEP_PHASES = ("rollout", "update", "sync")
"""Phases that tokens per second are measured over: the loop itself, not compiling, evaluating or saving."""


class Recorder:
    """Writes into the run folder and onto the screen. Of several processes the first writes the metrics, and each the
    episodes that it played; all of them hand over their checkpoints together.

    Args:
        progress: where the run continues from; rows beyond it that a killed run left are dropped.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        view: Progress,
        timer: metrics.PhaseTimer,
        progress: RunProgress,
        checkpoints: Checkpoints,
    ) -> None:
        self.view = view
        self.timer = timer
        self._config, self._run, self._checkpoints = config, run, checkpoints
        self._engine_totals: dict[str, float] = {}
        nothing_yet = progress.global_step == 0 and progress.before is None
        self._writer = (
            writers.MetricsWriter(run.path, -1 if nothing_yet else progress.global_step) if is_first() else None
        )

    def sft_step(self, progress: RunProgress, values: Mapping[str, float]) -> None:
        """One update of the cold start."""
        self.offline_step(progress, "sft", values)

    def offline_step(self, progress: RunProgress, stage: str, values: Mapping[str, float]) -> None:
        """One update of a stage that plays no episodes."""
        row = dict(values) | self._take_seconds(progress)
        self._write(progress.global_step, stage, row)
        self.view.step(row)

    def measurement(self, progress: RunProgress, values: Mapping[str, float]) -> None:
        """What such a stage measured on rows that were kept back."""
        self._write(progress.global_step, "held_out", dict(values))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.view.note(f"held out at step {progress.step}: {shown}")

    def rl_step(
        self,
        progress: RunProgress,
        played: Sequence[Trajectory],
        selections: Sequence[Selection],
        update: Mapping[str, float],
        engine: Mapping[str, float],
    ) -> None:
        """One step of reinforcement: how it went, what was kept, what the update did, what the engine did."""
        pairs = metrics.Accumulator()
        for selection in selections:
            pairs.merge({f"select/{name}": pair for name, pair in selection.statistics.items()})
        pairs.merge(metrics.episode_pairs(played, self._config.engine.max_response_tokens))
        pairs.merge(reward_pairs(played, component_names(self._config.reward)))
        for status in {t.reward_status for t in played}:
            pairs.add(f"reward_status/{status}", sum(t.reward_status is status for t in played), len(played))
        for reason in {t.stop_reason for t in played}:
            pairs.add(f"stop_reason/{reason}", sum(t.stop_reason is reason for t in played), len(played))
        seconds = self._take_seconds(progress)
        elapsed = sum(value for name, value in seconds.items() if name.removeprefix(metrics.SECONDS) in STEP_PHASES)
        tokens = sum(len(t.ids) for t in played)
        progress.response_tokens += tokens
        progress.rl_seconds += elapsed
        progress.left_out += sum(not t.trainable for t in played)
        counts = {"skipped_steps": progress.skipped_steps, "left_out": progress.left_out, "too_old": progress.too_old}
        row = pairs.means() | dict(update) | counts
        progress.history = [*progress.history, row][-ALARM_HISTORY:]
        for message in alarms.new_alarms(progress.history).values():
            self.view.note(f"alarm: {message}")
        trained = seconds.get(f"{metrics.SECONDS}update", 0.0)
        row |= seconds | self._engine_step(engine)
        row |= {
            "tokens_per_second": tokens / max(elapsed, 1e-9),
            "trainer/idle_share": 1 - trained / max(elapsed, 1e-9),
        }
        step = progress.global_step
        self._write(step, "rl", row)
        self.view.step(row, self._keep_own("rl", step, played))

    def evaluation(
        self, progress: RunProgress, sampled: EvalReport, greedy: EvalReport, played: Sequence[Trajectory]
    ) -> dict[str, Any]:
        """One evaluation; returns it as JSON values: ``pass_rate``, figures by name, and estimates by label."""
        estimates = {"pass@1, greedy": greedy.average}
        if not sampled.greedy:
            estimates = {"pass@1, sampled": sampled.average} | estimates
            estimates |= {f"pass@{k}": estimate for k, estimate in sampled.pass_at.items() if k > 1}
            estimates[f"maj@{sampled.samples}"] = sampled.majority
        self._keep_own("eval", progress.global_step, played)
        figures = {
            "pass_rate": sampled.average.value,
            "tool_error_share_in_correct": sampled.tool_error_share_in_correct,
            "calls": sampled.calls,
            "response_tokens": sampled.response_tokens,
            "truncated_share": sampled.truncated_share,
            "excluded": sampled.excluded + greedy.excluded,
        }
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        row = figures | {label: estimate.value for label, estimate in estimates.items()}
        self._write(progress.global_step, "eval", row)
        headline, failed = sampled.average, figures.get("tool_error_share_in_correct")
        self.view.note(
            f"evaluation at step {progress.step}: pass@1 {headline.value:.1%} "
            f"({headline.low:.1%} to {headline.high:.1%}), greedy {greedy.average.value:.1%}"
            + (f", failed calls in correct {failed:.1%}" if failed is not None else "")
        )
        return figures | {"estimates": {label: dataclasses.asdict(estimate) for label, estimate in estimates.items()}}

    def save(
        self,
        progress: RunProgress,
        state: Any,
        reference: Any | None,
        pass_rate: float | None,
        critic: Any | None = None,
    ) -> None:
        """Begin a checkpoint, unless this step has one; ``pass_rate`` if these very weights were evaluated."""
        step = progress.global_step
        if step == self._checkpoints.latest():
            return
        with self.timer.phase("checkpoint"):
            own = [group for group in progress.pending if is_own(group.draw)]
            self._checkpoints.save(step, state, reference, progress.to_json(), pass_rate, critic, own)

    def settle(self, progress: RunProgress) -> None:
        """Count the seconds since the last step, so that the report has all of them."""
        self._take_seconds(progress)

    def close(self) -> None:
        """Close every file."""
        if self._writer is not None:
            self._writer.close()

    def begin_step(self, engine: Mapping[str, float]) -> None:
        """What the engine did until now, for an evaluation say, is not the step's."""
        self._engine_totals = dict(engine)

    def _write(self, step: int, kind: str, row: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(step, kind, row)

    def _keep_own(self, kind: str, step: int, played: Sequence[Trajectory]) -> list[Trajectory]:
        """Write what this process played, and return it."""
        own = [trajectory for trajectory in played if is_own(trajectory.draw)]
        if self._config.train.dump_episodes:
            traces.write_episodes(self._run.path, kind, step, own, jax.process_index())
        return own

    def _engine_step(self, totals: Mapping[str, float]) -> dict[str, float]:
        """What the engine did in this step; its own figures run over its whole life."""
        done = {name: totals[name] - self._engine_totals[name] for name in ENGINE_TOTALS}
        slot_steps = done["decode_steps"] * self._config.engine.slots
        busy = done["decode_seconds"] + done["prefill_seconds"]
        rates = {
            "occupancy": done["decode_tokens"] / max(slot_steps, 1),
            "idle_share": max(0.0, 1 - busy / max(done["serving_seconds"], 1e-9)),
            "mean_queue_seconds": done["queue_seconds"] / max(done["opened"], 1),
        }
        return {f"engine/{name}": value for name, value in (done | rates).items()}

    def _take_seconds(self, progress: RunProgress) -> dict[str, float]:
        seconds = self.timer.take()
        for name, value in seconds.items():
            progress.seconds[name] = progress.seconds.get(name, 0.0) + value
        return {metrics.SECONDS + name: value for name, value in seconds.items()}


def reward_pairs(played: Sequence[Trajectory], components: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Rewards of what can be trained on, as (sum, count) by name: whole, by component, and where a component gave none.

    Args:
        played: the episodes of a step.
        components: what is rewarded; a component that gave nothing, or nan, is missing.
    """
    pairs = metrics.Accumulator()
    for trajectory in (t for t in played if t.trainable):
        pairs.add("reward", trajectory.reward)
        for name, value in trajectory.components.items():
            pairs.add(f"reward/{name}", value)
        for name in components:
            pairs.add(f"reward/{name}_missing", float(name not in trajectory.components))
    return pairs.pairs()
