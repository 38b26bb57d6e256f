"""``jaxrl check``: compile every program of a run for a target, add up, judge, and look for a way to make it fit."""

import concurrent.futures
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl.check import environment, estimate, ledger, mending, programs, remedies, targets
from jaxrl.check.environment import CompilerError
from jaxrl.check.worker import Compiled
from jaxrl.config import Config, ConfigError, dump, load, read_recipe
from jaxrl.model import hf
from jaxrl.train.attention import check_name

Say = Callable[[str], None]

COMPILED = tuple(name for name in programs.NAMES if name != "first")
"""Programs that are compiled: ``more`` is ``first`` and a sum beside it, and needs no less."""
DECISIVE = tuple(name for name in COMPILED if name != "score")
"""Those of a remedy: log-probabilities need no more than log-probabilities with gradients."""

SPLIT = (
    ("more", "values", "critic apply"),
    ("score", "prefill", "decode", "apply", "copy", "first", "critic more", programs.HAND_OVER),
)
"""Programs by the process that compiles them: one takes as long as all others, so two cores are busy for as long."""

QUICK = {"tpu": -1.0}
"""By platform, XLA's effort for what a remedy is judged by first: it takes an eighth to a third of the time, and never
found more than 0.3 % of the memory too little."""
ASSURED = 0.03
"""Share of the memory that a program has to leave for that to be enough; others are compiled again as training does."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found for one configuration on one target; bytes are those of one device.

    ``kernels`` says what computes attention, a line for each shape.
    """

    config: Config
    target: targets.Target
    devices: int
    memory: int
    batch: int
    resident: programs.Resident
    compiled: Mapping[str, Compiled]
    kernels: tuple[str, ...] = ()

    @functools.cached_property
    def moments(self) -> list[ledger.Moment]:
        return _moments(self.config, self.resident, self.batch, self.compiled)

    @property
    def fits(self) -> bool:
        return ledger.fits(self.moments, self.memory)

    @property
    def fullest(self) -> ledger.Moment:
        return ledger.fullest(self.moments)


@dataclasses.dataclass(frozen=True)
class Report:
    """The result for what was asked, and the remedies that helped, each with its own result.

    Attributes:
        tried: remedies that were compiled for.
    """

    result: Result
    mended: tuple[tuple[remedies.Remedy, Result], ...] = ()
    tried: int = 0


def configuration(recipe: str, overrides: Sequence[str]) -> Config:
    """A recipe in which what must be set may be left open: the architecture is then that of its own fields.

    Raises:
        ConfigError: as ``config.load``, or ``ModelConfig.attention`` names nothing.
    """
    open_keys = re.findall(r"^(\w+\.\w+)\s*=\s*['\"]REQUIRED['\"]", read_recipe(recipe), re.MULTILINE)
    placeholders = [f"{key}={'' if key == 'ModelConfig.path' else 'stories'!r}" for key in open_keys]
    config = load(recipe, [*placeholders, *overrides])
    check_name(config.model)
    model = config.model
    if model.path:
        model = dataclasses.replace(hf.read_config(model.path, base=model), path="")
    elif not model.vocab_size:
        model = dataclasses.replace(model, vocab_size=-(-config.tokenizer.vocab_size // 8) * 8)
    return dataclasses.replace(config, model=model)


def check(config: Config, target: targets.Target, say: Say, *, cached: bool = True, mend: bool = True) -> Report:
    """Compile for the target, and where it does not fit for the cheapest changes that should help.

    Args:
        cached: use what compilers said of the same programs before; what they say is kept in any case.
        mend: look for remedies.

    Raises:
        ConfigError: the configuration cannot be used on the target.
        CompilerError: there is no compiler for the target, or it failed.
    """
    result = compile_for(config, target, say, cached=cached)
    if result.fits or not mend:
        return Report(result)

    def judge(remedy: remedies.Remedy) -> Result | None:
        say(f"re-checking {remedy.options(target)}")
        changed = remedies.changed(config, remedy.settings)
        try:
            outcome = compile_for(changed, remedy.target, say, cached=cached, names=DECISIVE, quick=True)
            if outcome.fits:
                outcome = _assured(outcome, say, cached=cached)
        except (ConfigError, CompilerError) as error:
            say(f"{remedy.options(target)} cannot run: {error}")
            return None
        if outcome.fits:
            return outcome
        needed, has = (amount / targets.GIB for amount in (outcome.fullest.total, outcome.memory))
        say(f"{remedy.options(target)} needs {needed:.1f} GiB of {has:.1f}")
        return None

    needs = functools.partial(_needs, base=result)
    proposed = remedies.candidates(config, target, result.devices, result.memory, needs)
    found, tried = mending.search(
        proposed, judge, lambda remedy, other: remedies.says_little(remedy, other, config, target)
    )
    return Report(result, tuple(found), tried)


def _assured(result: Result, say: Say, *, cached: bool) -> Result:
    """With the programs that hardly fit compiled as training compiles them."""
    close = [
        moment.name
        for moment in result.moments
        if moment.name in result.compiled
        and result.compiled[moment.name].effort
        and moment.total > (1 - ASSURED) * result.memory
    ]
    if not close:
        return result
    again = compile_for(result.config, result.target, say, cached=cached, names=close)
    return dataclasses.replace(result, compiled={**result.compiled, **again.compiled})


def compile_for(
    config: Config,
    target: targets.Target,
    say: Say,
    *,
    cached: bool = True,
    names: Sequence[str] = COMPILED,
    quick: bool = False,
) -> Result:
    """Compile the programs of these names for the target, in two processes side by side.

    Where what rests is too much already, nothing is compiled.

    Args:
        quick: with little effort, in one process; what comes after a program that finds no room is left out.

    Raises:
        ConfigError, CompilerError: as for ``check``.
    """
    request: dict[str, Any] = {
        "target": dataclasses.asdict(target),
        "config": dump(config),
        "cache": str(environment.cache_folder() / "results") if target.chip else "",
        "read": cached,
        "effort": QUICK.get(target.platform, 0.0) if quick else 0.0,
    }
    (general,) = environment.ask(target.platform, request | {"programs": []})
    resident = programs.Resident(**general["resident"])
    amounts = general["devices"], general["memory"], general["batch"]
    result = Result(config, target, *amounts, resident, {}, tuple(general["kernels"]))
    at_rest = dataclasses.replace(result, compiled={"more": Compiled()})
    if not at_rest.fits:
        say(f"{target.name}: what rests on a device is more than it has; nothing is compiled")
        return at_rest
    compiled: dict[str, Compiled] = {}

    def work(part: Sequence[str]) -> None:
        for answer in environment.ask(target.platform, request | {"programs": part}):
            if "program" in answer:
                name = answer.pop("program")
                compiled[name] = Compiled(**answer)
                say(f"{target.name}: compiled {name}")
            if quick and not dataclasses.replace(result, compiled=compiled).fits:
                return

    parts = [names] if quick else [[name for name in part if name in names] for part in SPLIT]
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as workers:
        for done in [workers.submit(work, part) for part in parts if part]:
            done.result()
    return dataclasses.replace(result, compiled={name: compiled[name] for name in names if name in compiled})


def _moments(
    config: Config, resident: programs.Resident, batch: int, compiled: Mapping[str, Compiled]
) -> list[ledger.Moment]:
    ahead = config.train.prefetch_groups > 0 or config.train.max_staleness > 0
    apart = config.mesh.rollout_devices > 0
    return ledger.moments(resident, batch, compiled, ahead=ahead, apart=apart)


def _needs(config: Config, devices: int, *, base: Result) -> int:
    """Bytes of one device, estimated: what rests exactly, what a program needs in proportion to what it needed."""
    platform = base.target.platform
    rests, guess = estimate.resident(config, devices), estimate.temporary(config, devices, platform)
    if "decode" not in base.compiled:
        guessed = {"more": Compiled(temporary=guess), "apply": Compiled()}
        if config.critic.enabled:
            guessed["critic more"] = guessed["more"]
        return max(moment.total for moment in _moments(config, rests, 0, guessed))
    grows = max(0.25, guess / estimate.temporary(base.config, base.devices, platform))
    compiled = {}
    for name, program in base.compiled.items():
        temporary = int(program.temporary * _growth(name, grows, config, base))
        compiled[name] = dataclasses.replace(program, refused="", temporary=temporary)
    return max(moment.total for moment in _moments(config, rests, base.batch, compiled))


def _growth(name: str, gradient: float, config: Config, base: Result) -> float:
    """By how much what a program needs grows: the engine's with its devices, the update's with the weights."""
    if name in ("first", "more", "score", "values", "critic more"):
        return gradient
    if name in programs.ROLLOUT:
        now, before = (c.mesh.rollout_tensor or c.mesh.tensor for c in (config, base.config))
        return before / now
    return 1.0
