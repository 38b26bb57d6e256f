"""Checkpoints of everything a resumed run needs, written in the background and marked complete last.

A checkpoint holds the train state, the reference parameters where a KL is used, the critic's train state where there is
one, the groups that were played ahead (``played``), and one JSON of host state: stage, weight version, data position,
draws under way, counters, alarm history. Random keys are functions of (seed, draw, sample, position) and of nothing
else, so the draw counter is all there is to save of them.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from jaxrl.config import CheckpointConfig
from jaxrl.records import Group
from jaxrl.train.played import PlayedHandler, RestorePlayed, SavePlayed


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says why and what to do."""


class Checkpoints:
    """The ``checkpoints`` folder of a run: keeps the newest ``keep`` and the best by pass rate.

    Args:
        read_only: for whoever does not hold the run folder's lock; what a live training is writing stays untouched.
    """

    def __init__(self, folder: pathlib.Path, config: CheckpointConfig, *, read_only: bool = False) -> None:
        best = managers.BestN(
            get_metric_fn=lambda metrics: metrics["pass_rate"], n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(config.keep), best]),
            best_fn=lambda metrics: metrics["pass_rate"],
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "reference": ocp.StandardCheckpointHandler(),
            "critic": ocp.StandardCheckpointHandler(),
            "host": ocp.JsonCheckpointHandler(),
            "played": PlayedHandler(),
        }
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def save(
        self,
        step: int,
        state: Any,
        reference: Any | None,
        host: dict[str, Any],
        pass_rate: float | None,
        critic: Any | None = None,
        played: Sequence[Group] = (),
    ) -> None:
        """Begin writing; returns once the arrays are copied. A fault of an earlier write is raised here.

        Args:
            step: the run's global step (cold start and reinforcement counted through).
            pass_rate: of the latest evaluation of these weights, or None if they were not evaluated.
            critic: its train state, where there is one.
            played: groups that wait to be trained on; of several processes each gives those that it played.
        """
        items = {"state": ocp.args.StandardSave(state), "host": ocp.args.JsonSave(host), "played": SavePlayed(played)}
        if reference is not None:
            items["reference"] = ocp.args.StandardSave(reference)
        if critic is not None:
            items["critic"] = ocp.args.StandardSave(critic)
        metrics = None if pass_rate is None else {"pass_rate": pass_rate}
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def find(self, which: str) -> int:
        """The step that "latest", "best" (by pass rate) or a number names.

        Raises:
            CheckpointError: there is no such checkpoint; the message lists those there are.
        """
        steps = {"latest": self._manager.latest_step(), "best": self._manager.best_step()}
        step = steps[which] if which in steps else int(which) if which.isdigit() else None
        if step not in self._manager.all_steps():
            kept = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise CheckpointError(f"no checkpoint {which!r} in {self._manager.directory}; there are: {kept}")
        return step

    def host(self, step: int) -> dict[str, Any]:
        """The host state alone."""
        return self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]

    def played(self, step: int, seen: Callable[[Group], Group]) -> tuple[Group, ...]:
        """The groups that were played ahead, of all processes that there were then, in the order of their draws.

        Args:
            seen: makes of each what this process keeps of it.

        Raises:
            CheckpointError: they cannot be read.
        """
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(played=RestorePlayed(seen)))["played"]

    def restore(self, step: int, abstract_state: Any, abstract_reference: Any | None) -> tuple[Any, Any | None]:
        """State and reference parameters, placed as the abstract trees' shardings say (any mesh).

        Raises:
            CheckpointError: the checkpoint holds another model, or cannot be read.
        """
        items = {"state": ocp.args.StandardRestore(abstract_state)}
        if abstract_reference is not None:
            items["reference"] = ocp.args.StandardRestore(abstract_reference)
        self._check_shapes(step, abstract_state)
        with self._reading(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored["state"], restored.get("reference")

    def critic(self, step: int, abstract_critic: Any) -> Any | None:
        """The critic's train state, placed as the abstract tree's shardings say; None where none was saved.

        Raises:
            CheckpointError: it cannot be read, or is of another model.
        """
        if "critic" not in self._manager.item_metadata(step):
            return None
        with self._reading(step):
            items = ocp.args.Composite(critic=ocp.args.StandardRestore(abstract_critic))
            return self._manager.restore(step, args=items)["critic"]

    def params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone, placed as the abstract tree's shardings say; no optimizer state is read.

        Raises:
            CheckpointError: as for ``restore``.
        """
        wanted = {"params": abstract_params}
        self._check_shapes(step, wanted)
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        with self._reading(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self._manager.directory / str(step) / "state", arguments)["params"]

    def rewind(self, step: int) -> list[int]:
        """Remove every checkpoint newer than ``step``, so that it is the latest; returns which."""
        newer = [other for other in self._manager.all_steps() if other > step]
        for other in newer:
            self._manager.delete(other)
        return newer

    def wait(self) -> None:
        """Until the last write is complete; a fault of it is raised here."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the folder."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a fault of writing into one that says what to do; tensorstore reports a full disk as ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"a checkpoint could not be written to {self._manager.directory} ({_reason(error)}); the complete ones "
                f"there are intact: {', '.join(map(str, self._manager.all_steps())) or 'none'}. Free space and resume"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {step} in {self._manager.directory} cannot be restored: {error}"
            ) from error

    def _check_shapes(self, step: int, abstract_state: Any) -> None:
        metadata = self._manager.item_metadata(step)["state"]
        saved = {_name(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(metadata)}
        wanted = {_name(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(abstract_state)}
        for name, shape in wanted.items():
            if saved.get(name) != shape:
                found = f"shape {saved[name]}" if name in saved else "nothing"
                raise CheckpointError(
                    f"checkpoint {step} in {self._manager.directory} is of another model: {name} should have "
                    f"shape {shape} but holds {found}; use the configuration it was made with, or another run folder"
                )


def _name(path: tuple) -> str:
    return "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)


def _reason(error: Exception) -> str:
    """The end of tensorstore's long messages says what the operating system said."""
    text = str(error).splitlines()[0]
    return text.rpartition(": ")[2].partition(" [")[0] if "RESOURCE_EXHAUSTED" in text else text
