"""The command line. Exit codes: 0 done, 1 failed, 2 bad usage, configuration or data; Ctrl-C leaves a resumable run."""

import argparse
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Sequence

from jaxrl import __version__
from jaxrl import config as configuration
from jaxrl.config import Config, ConfigError
from jaxrl.sandbox import serve

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.run_verb in (_doctor, _bench, serve.main):  # need neither jax nor a configuration
        return options.run_verb(options)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax explains itself at length
    if options.run_verb not in (_train, _sft):
        return _run(options)
    os.environ.setdefault("JAX_ENABLE_PREEMPTION_SERVICE", "0")  # which would catch SIGTERM, and nobody asks it
    from jaxrl.processes import join

    try:
        place = join.place(options.coordinator, options.processes, options.process, options.wait, os.environ)
        return join.run(place, lambda: _run(options))
    except ConfigError as error:
        return _complain(error, BAD_USAGE)
    except OSError as error:
        return _complain(error, FAILED)


def _run(options: argparse.Namespace) -> int:
    """A verb that may need jax; returns the exit code."""
    from jaxrl import commands  # imports jax, which `--help` and usage errors need not wait for

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"jaxrl: {message}", file=sys.stderr)
            code = options.run_verb(commands, options)
    except (ConfigError, commands.DataError, commands.TokenizerError, FileNotFoundError) as error:
        return _complain(error, BAD_USAGE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        print(f"jaxrl: the output was closed{_how_to_go_on(options)}", file=sys.stderr)
        return FAILED
    except commands.EXPECTED_ERRORS as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        print(f"\nstopped{_how_to_go_on(options)}", file=sys.stderr)
        return INTERRUPTED
    return DONE if code is None else code


def _how_to_go_on(options: argparse.Namespace) -> str:
    if options.run_verb not in (_train, _sft, _prefer):
        return ""
    if any((_run_folder(options) / "checkpoints").glob("[0-9]*")):
        return "; the same command goes on from the last checkpoint"
    return " before the first checkpoint; the same command begins anew"


def _complain(error: Exception, code: int) -> int:
    print(f"jaxrl: {error}", file=sys.stderr)
    return code


def _cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxrl" / "compiled"


def _config(options: argparse.Namespace) -> Config:
    """The recipe named on the command line, or the one its run folder was last started with, with overrides."""
    overrides = list(options.set)
    if options.unsafe_sandbox:
        overrides.append("SandboxConfig.unsafe=True")
    if options.config is not None:
        return configuration.load(options.config, overrides)
    saved = options.run / "config.gin" if options.run else None
    if saved is not None and not saved.is_file():
        raise ConfigError(
            f"{options.run} holds no config.gin, so it is no run folder; give one that `jaxrl train` made"
        )
    if saved is None:
        raise ConfigError(f"name a recipe ({', '.join(configuration.recipe_names())}), or a --run folder that has one")
    return configuration.parse([saved.read_text(encoding="utf-8")], overrides)


def _train(commands, options: argparse.Namespace) -> None:
    commands.train(_config(options), _run_folder(options), cold_start_only=False, which=options.step)


def _sft(commands, options: argparse.Namespace) -> None:
    commands.train(_config(options), _run_folder(options), cold_start_only=True, which=options.step)


def _prefer(commands, options: argparse.Namespace) -> None:
    commands.prefer(_config(options), _run_folder(options), options.step)


def _eval(commands, options: argparse.Namespace) -> None:
    commands.evaluate(_config(options), options.run, options.step, options.json)


def _rollout(commands, options: argparse.Namespace) -> None:
    if options.count < 1:
        raise ConfigError(f"--count {options.count} must be at least 1")
    commands.rollout(_config(options), options.run, options.step, options.count)


def _export(commands, options: argparse.Namespace) -> None:
    commands.export(
        _config(options),
        options.run,
        options.step,
        options.to,
        options.dtype,
        options.max_shard_size,
        adapter=options.adapter,
    )


def _import(commands, options: argparse.Namespace) -> None:
    commands.import_folder(_config(options), options.folder, options.run)


def _check(commands, options: argparse.Namespace) -> int:
    if options.install:
        commands.install_compiler(options.install)
    if options.config is None or options.target is None:
        if options.install and options.config is None and options.target is None:
            return DONE
        raise ConfigError("name a recipe and a --target, or only --install tpu or --install gpu")
    fits = commands.check(options.config, options.set, options.target, as_json=options.json, again=options.again)
    return DONE if fits else FAILED


def _bench_kernels(commands, options: argparse.Namespace) -> int:
    if options.dump_target is not None:
        commands.dump_target(options.dump_target)
    holds = commands.bench_kernels(
        options.tokens, options.rounds, tune=options.tune, table=options.table, as_json=options.json
    )
    return DONE if holds else FAILED


def _doctor(options: argparse.Namespace) -> int:
    from jaxrl.sandbox import doctor

    return doctor.main()


def _bench(options: argparse.Namespace) -> int:
    from jaxrl.sandbox.bench import accounting, table

    try:
        figures = table.chosen(options.figures)
        effort = accounting.Effort(options.rounds, options.scale)
    except ValueError as error:
        return _complain(error, BAD_USAGE)
    return table.main(figures, effort, options.json)


def _byte_count(text: str) -> int:
    """Bytes of a size such as 500MB or 5GB, in powers of ten as transformers counts them."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", text.strip().upper())
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 500MB or 5GB")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")


def _run_folder(options: argparse.Namespace) -> pathlib.Path:
    if options.run:
        return options.run
    return pathlib.Path("runs") / pathlib.Path(options.config).stem


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrl",
        description="Train language models that think with tools.",
        epilog="Recipes: " + ", ".join(configuration.recipe_names()) + ". `jaxrl VERB --help` shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"jaxrl {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function, summary: str, examples: str) -> argparse.ArgumentParser:
        new = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        new.set_defaults(run_verb=function, config=None)
        new.add_argument(
            "--set", action="append", default=[], metavar="Section.field=value", help="override one value (repeatable)"
        )
        new.add_argument(
            "--unsafe-sandbox", action="store_true", help="run tool code without isolation, on machines that refuse it"
        )
        return new

    for name, function, summary, examples in (
        (
            "train",
            _train,
            "train a recipe from cold start to export; again on the same folder, resume exactly",
            "  jaxrl train quickstart\n  jaxrl train quickstart --set TrainConfig.steps=200 --run runs/long\n"
            "  jaxrl train gsm8k_tool --set DataConfig.train=gsm8k_train.jsonl",
        ),
        (
            "sft",
            _sft,
            "only the cold start of a recipe: on demonstrations, on chat messages, or on the episodes of a run",
            "  jaxrl sft quickstart --run runs/cold\n  jaxrl sft quickstart --set SftConfig.demonstrations=chat.jsonl",
        ),
        (
            "prefer",
            _prefer,
            "train on answers that were compared or judged: DPO and its relatives",
            "  jaxrl prefer quickstart --run runs/dpo --set PreferConfig.data=pairs.jsonl "
            "--set ModelConfig.path=runs/quickstart/export\n"
            "  jaxrl prefer quickstart --run runs/own --set PreferConfig.data=runs/played "
            "--set ModelConfig.path=runs/cold/export\n"
            "  jaxrl prefer quickstart --run runs/kto --set PreferConfig.data=judged.jsonl "
            "--set PreferConfig.kind=judged --set PreferConfig.loss=kto",
        ),
    ):
        new = verb(name, function, summary, examples)
        new.add_argument(
            "config",
            nargs="?",
            help="name of a recipe, path of a .gin file, or several joined by +; may be left out for an existing --run",
        )
        new.add_argument("--run", type=pathlib.Path, help="run folder (default: runs/RECIPE)")
        new.add_argument(
            "--step",
            default="latest",
            help='checkpoint of the folder to go on from: "latest", "best" or a step; newer ones are removed',
        )
        _add_processes(new)

    def checkpoint_verb(name: str, function, summary: str, examples: str) -> argparse.ArgumentParser:
        new = verb(name, function, summary, examples)
        new.add_argument("run", type=pathlib.Path, help="run folder that `jaxrl train` made")
        new.add_argument("--step", default="latest", help='checkpoint: "latest", "best" or a step (default: latest)')
        return new

    new = checkpoint_verb(
        "eval",
        _eval,
        "avg@k, pass@k and maj@k of a checkpoint, with their intervals",
        "  jaxrl eval runs/quickstart\n  jaxrl eval runs/quickstart --set EvalConfig.temperature=0\n"
        "  jaxrl eval runs/gsm8k_tool --set DataConfig.eval=gsm8k_test.jsonl --json",
    )
    new.add_argument("--json", action="store_true", help="print one JSON object")
    new = checkpoint_verb(
        "rollout",
        _rollout,
        "play a few episodes and print them: calls, results, rewards, and where the mask lies",
        "  jaxrl rollout runs/quickstart --count 3",
    )
    new.add_argument("--count", type=int, default=2, help="episodes to play (default: 2)")
    new = checkpoint_verb(
        "export",
        _export,
        "write a checkpoint as a Hugging Face folder, and read it back before it takes its name",
        "  jaxrl export runs/quickstart --step best --to model\n"
        "  jaxrl export runs/quickstart --to model --dtype bfloat16 --max-shard-size 2GB\n"
        "  jaxrl export runs/lora --to adapter --adapter",
    )
    new.add_argument("--to", type=pathlib.Path, required=True, help="folder to write")
    new.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the tensors (default: that of the checkpoint's parameters)",
    )
    new.add_argument(
        "--max-shard-size",
        type=_byte_count,
        default="5GB",
        metavar="SIZE",
        help="largest file of tensors, as 500MB or 5GB (default: 5GB)",
    )
    new.add_argument(
        "--adapter", action="store_true", help="only the adapter, as PEFT has it (default: merged into the weights)"
    )
    new = verb(
        "import",
        _import,
        "check a Hugging Face folder and make it the start of a run",
        "  jaxrl import Qwen3-0.6B --run runs/mine quickstart\n  jaxrl train --run runs/mine",
    )
    new.add_argument("folder", type=pathlib.Path, help="folder with config.json, safetensors and tokenizer")
    new.add_argument("config", help="recipe to train it with")
    new.add_argument("--run", type=pathlib.Path, required=True, help="run folder to make")
    new = verb(
        "check",
        _check,
        "compile every program of a recipe for devices that are not there, and say whether it fits on them",
        "  jaxrl check rstar2_14b --target v5p-64\n  jaxrl check rstar2_14b --target h200x64 --json\n"
        "  jaxrl check rstar2_14b --target '2x v5e-256' --set MeshConfig.slice=2 --set TrainConfig.rows=512\n"
        "  jaxrl check quickstart --target this\n  jaxrl check --install tpu",
    )
    new.add_argument("config", nargs="?", help="name of a recipe or path of a .gin file")
    new.add_argument("--target", help="the devices: v5p-64, v5e-256, v6e-16, '2x v5e-256', h200x8, this (chips, GPUs)")
    new.add_argument("--install", choices=("tpu", "gpu"), help="install the compiler for these devices (700 MB)")
    new.add_argument("--again", action="store_true", help="compile again what was compiled before")
    new.add_argument("--json", action="store_true", help="print one JSON object")
    _add_sandbox(verbs)
    _add_bench(verbs)
    return parser


def _add_processes(verb: argparse.ArgumentParser) -> None:
    """Where one run is several processes; docs/launch.md."""
    several = verb.add_argument_group(
        "several processes", "one run on several machines; a TPU pod, Slurm and Open MPI need none of these"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="machine of process 0 and a free port there")
    several.add_argument("--processes", type=int, metavar="N", help="how many processes the run has")
    several.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    several.add_argument(
        "--wait", type=int, default=300, metavar="SECONDS", help="how long to wait for the others (default: 300)"
    )


def _add_sandbox(verbs) -> None:
    """The verbs of the sandbox, which take no configuration."""
    sandbox = verbs.add_parser("sandbox", help="the sandbox by itself", description="The sandbox by itself.")
    sandbox_verbs = sandbox.add_subparsers(required=True, metavar="VERB")
    doctor = sandbox_verbs.add_parser(
        "doctor",
        help="which isolation this machine gives, layer by layer, and what to do about what is missing",
        description="Tries every layer by itself, then a call in a whole jail. Exit code 1: it cannot start here.",
    )
    doctor.set_defaults(run_verb=_doctor)
    server = sandbox_verbs.add_parser(
        "serve",
        help="offer the sandbox to other programs over HTTP",
        description="Offers the sandbox over HTTP until SIGTERM or Ctrl-C; /openapi.json describes the interface.",
        epilog=serve.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_options(server)
    server.set_defaults(run_verb=serve.main)
    bench = sandbox_verbs.add_parser(
        "bench",
        help="what a call costs here, beside other designs and beside what is demanded",
        description="Measures figures S1 to S15, which docs/sandbox.md lists in its section Figures; takes minutes. "
        "Exit code 1: one does not hold here.",
        epilog="examples:\n  jaxrl sandbox bench\n  jaxrl sandbox bench --figures S1,S4 --rounds 9 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("--figures", metavar="S1,S2", help="only these (default: all)")
    bench.add_argument("--rounds", type=int, default=5, help="in which the designs take turns (default: 5)")
    bench.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the calls of each figure; below 1 nothing is judged (default: 1)",
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object a line")
    bench.set_defaults(run_verb=_bench)


def _add_bench(verbs) -> None:
    """What is measured on the devices at hand, which takes no configuration."""
    bench = verbs.add_parser("bench", help="measure on the devices at hand", description="Measures on these devices.")
    kernels = bench.add_subparsers(required=True, metavar="WHAT").add_parser(
        "kernels",
        help="what the attention kernels cost beside plain attention, and which sizes of blocks cost least",
        description="Compares interval attention with attention under a dense mask; on a GPU or TPU prints all that "
        "kernels must reach there, against cuDNN or splash, one JSON object a line. Exit code 1: a demand does not "
        "hold. --tune tries sizes of blocks instead and writes those that cost least on this device into the table "
        "that the kernels read. Other sizes give other last bits, and all processes of a run need the same table.",
        epilog="examples:\n  jaxrl bench kernels\n  jaxrl bench kernels --tokens 8192\n  jaxrl bench kernels --tune"
        "\n  jaxrl bench kernels --dump-target gpu.txt > bars.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels.add_argument(
        "--tokens", type=int, default=4096, help="of a row (default: 4096); on a GPU or TPU for --tune alone"
    )
    kernels.add_argument("--rounds", type=int, default=5, help="in which the alternatives take turns (default: 5)")
    kernels.add_argument("--tune", action="store_true", help="try sizes of blocks (on a TPU), and write a table")
    kernels.add_argument(
        "--table", type=pathlib.Path, metavar="FILE", help="written by --tune (default: that of the kernels package)"
    )
    kernels.add_argument(
        "--json", action="store_true", help="print one JSON object a line, as the table of a GPU or TPU always is"
    )
    kernels.add_argument(
        "--dump-target",
        type=pathlib.Path,
        metavar="FILE",
        help="write what XLA knows of this GPU, to be put in the place of GPU_DESCRIPTION in jaxrl/check/devices.py",
    )
    kernels.set_defaults(run_verb=_bench_kernels)


if __name__ == "__main__":
    sys.exit(main())
