"""How fast the rollout engine samples, against ``transformers.generate()``: figures R1 to R6, one JSON object a line.

Both sample from the same random weights, at temperature 1, groups of 16 for each prompt. "Mixed" responses have lengths
like those of reasoning (log-normal, 16 to 256 tokens; no stop ids, so both sides sample exactly as much); "equal" ones
all have the longest length, which is the best case of a padded batch. ``generate()`` takes the sequences in batches as
wide as the engine has slots, left-padded, and runs each to its longest member; tokens beyond a sequence's own length do
not count. The two take turns, and a figure is the median over the rounds. CPU time is that of the process; on a busy
machine believe those figures, and pin the process to one core (``taskset -c 0``), since torch's threads wait for each
other actively.

    python benchmarks/rollout.py --json
"""

import argparse
import asyncio
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrl.config import EngineConfig, ModelConfig
from jaxrl.model import hf, spec, transformer
from jaxrl.rollout.engine import Engine

SAMPLES = 16
LONGEST = 256


@dataclasses.dataclass(frozen=True)
class Work:
    """Prompts, and for each of their samples the number of tokens to sample."""

    prompts: list[np.ndarray]
    lengths: np.ndarray  # [prompts, SAMPLES]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


@dataclasses.dataclass(frozen=True)
class Lap:
    """Tokens per second of one run."""

    wall: float
    cpu: float


def make_work(prompts: int, vocabulary: int, *, mixed: bool) -> Work:
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, vocabulary, generator.integers(40, 121)).astype(np.int32) for _ in range(prompts)]
    drawn = np.clip(generator.lognormal(4.2, 0.8, (prompts, SAMPLES)), 16, LONGEST).astype(int)
    return Work(texts, drawn if mixed else np.full_like(drawn, LONGEST))


def time_lap(run: Callable[[], object], work: Work) -> Lap:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Lap(work.tokens / (time.perf_counter() - wall), work.tokens / (time.process_time() - cpu))


def run_engine(engine: Engine, work: Work) -> None:
    async def sample(draw: int, index: int) -> None:
        length = int(work.lengths[draw, index])
        sequence = await engine.open(work.prompts[draw], draw=draw, sample=index, max_tokens=length)
        await sequence.generate(length)
        sequence.close()

    async def run() -> None:
        async with engine.serving():
            await asyncio.gather(*(sample(draw, index) for draw, index in np.ndindex(work.lengths.shape)))

    asyncio.run(run())


def make_generate(config: ModelConfig, params: Any, slots: int) -> Callable[[Work], None] | None:
    """The same through transformers; None where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        hf.save_folder(pathlib.Path(folder), config, jax.tree.map(np.asarray, params))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def run(work: Work) -> None:
        rows = [(work.prompts[draw], int(work.lengths[draw, index])) for draw, index in np.ndindex(work.lengths.shape)]
        for first in range(0, len(rows), slots):
            batch = rows[first : first + slots]
            width = max(len(prompt) for prompt, _ in batch)
            ids, mask = np.zeros((2, len(batch), width), np.int64)
            for row, (prompt, _) in enumerate(batch):
                ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
            new = max(length for _, length in batch)
            with torch.inference_mode():
                model.generate(
                    torch.from_numpy(ids),
                    attention_mask=torch.from_numpy(mask),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    pad_token_id=0,
                )

    return run


def figure(name: str, values: list[float], unit: str, demand: str = "", floor: float | None = None) -> dict[str, Any]:
    value = statistics.median(values)
    row = {"figure": name, "value": round(value, 3), "unit": unit, "demand": demand}
    return row | {"holds": None if floor is None else value >= floor, "rounds": [round(v, 3) for v in values]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="accepted for uniformity; the output is always JSON")
    options = parser.parse_args()
    model = ModelConfig(
        vocab_size=options.vocabulary, layers=options.layers, width=options.width, ffn_width=3 * options.width
    )
    params = spec.initialize(transformer.param_specs(model), jax.random.key(0))
    config = EngineConfig(slots=options.slots, max_prompt_tokens=128, max_response_tokens=LONGEST)
    engine = Engine(config, model, params, stop_ids=(), seed=0)
    engine.compile()
    generate = make_generate(model, params, options.slots)
    laps: dict[tuple[str, bool], list[Lap]] = {}
    for _ in range(options.rounds):
        for mixed in (True, False):
            work = make_work(options.prompts, options.vocabulary, mixed=mixed)
            laps.setdefault(("engine", mixed), []).append(time_lap(lambda work=work: run_engine(engine, work), work))
            if generate is not None:
                laps.setdefault(("generate", mixed), []).append(time_lap(lambda work=work: generate(work), work))
    for number, mixed in ((1, True), (2, False)):
        kind = "mixed" if mixed else "equal"
        ours = laps["engine", mixed]
        rows = [
            figure(f"R{number} sampled tokens, {kind} lengths", [lap.wall for lap in ours], "1/s"),
            figure(f"R{number} sampled tokens, {kind} lengths, CPU", [lap.cpu for lap in ours], "1/CPU s"),
        ]
        if generate is not None:
            pairs = list(zip(ours, laps["generate", mixed], strict=True))
            wall, cpu = [our.wall / their.wall for our, their in pairs], [our.cpu / their.cpu for our, their in pairs]
            rows.append(figure(f"R{number + 2} against generate(), {kind} lengths", wall, "ratio", ">= 1", 1.0))
            rows.append(figure(f"R{number + 2} against generate(), {kind} lengths, CPU", cpu, "ratio", ">= 1", 1.0))
        for row in rows:
            print(json.dumps(row), flush=True)
    stats = engine.stats()
    print(json.dumps(figure("R5 slot-steps that sampled a token", [stats["occupancy"]], "share")))
    print(
        json.dumps(
            figure("R6 serving time without device work", [stats["idle_share"]], "share", "<= 0.05")
            | {"holds": stats["idle_share"] <= 0.05}
        )
    )


if __name__ == "__main__":
    main()
