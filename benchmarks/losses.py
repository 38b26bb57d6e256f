"""What the losses add to a train step, in CPU time of one run in turns: one JSON object a line.

A loss is its value and gradient by the log-probabilities of a batch of rows x tokens, with corrections where the line
says so; the advantage is GRPO's with the aggregation weights, on the host. The step they are compared with is forward
and backward of a recipe's model on a few rows, counted for all. The smaller the model, the larger these shares: the
recipe's is the smallest there is. No loss may move anything between host and device: its arguments are there, and its
compiled program has no instruction that would.

    python benchmarks/losses.py --json
"""

import argparse
import functools
import json
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import config as configuration
from jaxrl.config import AlgorithmConfig
from jaxrl.model import spec, transformer
from jaxrl.records import Batch
from jaxrl.rl.advantages.group import grpo
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.correction import correction
from jaxrl.rl.outcomes import Outcomes
from jaxrl.rl.policy_losses import POLICY_LOSSES
from jaxrl.rl.tokens import sampled
from jaxrl.train.update import policy_gradient_loss

SEGMENTS = 4  # trajectories in a row
CORRECTED = AlgorithmConfig(proximal="recomputed", mismatch="icepop", rejection="divergence", top_entropy=0.8)


def arrays(rows: int, tokens: int) -> dict[str, np.ndarray]:
    """A batch whose segments are as long as each other and sampled but for every fifth token."""
    draw = np.random.default_rng(0)
    shape = (rows, tokens)
    made = {name: draw.normal(-1, 0.2, shape).astype(np.float32) for name in ("logprobs", "proximal", "behaviour")}
    made |= {name: draw.normal(size=shape).astype(np.float32) for name in ("advantages", "entropy")}
    made["mask"] = np.broadcast_to(np.arange(tokens) % 5 > 0, shape).astype(np.float32)
    made["segment_ids"] = np.broadcast_to(np.arange(tokens) * SEGMENTS // tokens + 1, shape).astype(np.int32)
    return made


def loss_gradient(name: str, algorithm: AlgorithmConfig) -> jax.stages.Wrapped:
    """Value and gradient of a loss, with what the algorithm does to tokens before."""
    correct = correction(algorithm)

    def loss(logprobs: jax.Array, given: dict[str, jax.Array]) -> jax.Array:
        tokens = sampled(
            given["mask"],
            logprobs,
            proximal_logprobs=given["proximal"],
            behaviour_logprobs=given["behaviour"],
            advantages=given["advantages"],
            segment_ids=given["segment_ids"],
            entropy=given["entropy"],
        )
        corrected = correct(tokens)
        return (given["mask"] * corrected.weights * POLICY_LOSSES[name](corrected.tokens).loss).sum()

    return jax.jit(lambda given: jax.value_and_grad(loss)(given["logprobs"], given))


def host_instructions(program: jax.stages.Wrapped, given: dict[str, jax.Array]) -> int:
    """How many instructions of a compiled program talk to the host."""
    text = program.lower(given).compile().as_text()
    return len(re.findall(r"callback|\b(?:infeed|outfeed|send|recv)(?:-done)?\(", text))


def step(recipe: str, rows: int, tokens: int) -> Callable[[], Any]:
    """Forward and backward of a recipe's model on rows of tokens, with the default loss."""
    config = configuration.load(recipe).model
    config = config if config.vocab_size else configuration.load(recipe, ["ModelConfig.vocab_size=768"]).model
    params = spec.initialize(transformer.param_specs(config), jax.random.key(0))
    given = arrays(rows, tokens)
    batch = Batch.zeros(rows, tokens).replace(
        tokens=np.random.default_rng(1).integers(0, config.vocab_size, (rows, tokens)).astype(np.int32),
        positions=np.broadcast_to(np.arange(tokens) % (tokens // SEGMENTS), (rows, tokens)).astype(np.int32),
        segment_ids=given["segment_ids"],
        mask=given["mask"],
        rl_weights=given["mask"],
        advantages=given["advantages"],
        behaviour_logprobs=given["behaviour"],
        proximal_logprobs=given["proximal"],
    )
    gradient = jax.jit(jax.grad(policy_gradient_loss(config, AlgorithmConfig(), 1.0), has_aux=True))
    placed = jax.tree.map(jnp.asarray, batch)
    return lambda: gradient(params, placed, None)


def advantage(rows: int, tokens: int) -> Callable[[], Any]:
    count = rows * SEGMENTS
    masks = [np.ones(tokens // SEGMENTS, np.int8)] * count
    outcomes = Outcomes(rewards=np.arange(count) % 3.0, groups=np.arange(count) // 16, masks=masks)
    return lambda: (grpo(outcomes), aggregation_weights(masks, "token"))


def cpu_seconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, taken in turns; each runs once before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            with jax.transfer_guard("disallow"):
                jax.block_until_ready(run())
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a row")
    parser.add_argument("--step-rows", type=int, default=1, help="rows that the train step is timed on")
    parser.add_argument("--recipe", default="quickstart", help="whose model takes the step")
    parser.add_argument("--losses", nargs="*", default=list(POLICY_LOSSES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    given = jax.tree.map(jnp.asarray, arrays(options.rows, options.tokens))
    programs = {name: loss_gradient(name, AlgorithmConfig(loss=name)) for name in options.losses}
    programs["ppo_clip, corrected"] = loss_gradient("ppo_clip", CORRECTED)
    talking = sum(host_instructions(program, given) for program in programs.values())
    runs = {"step": step(options.recipe, options.step_rows, options.tokens)}
    runs["advantage"] = advantage(options.rows, options.tokens)
    runs |= {name: functools.partial(program, given) for name, program in programs.items()}
    seconds = cpu_seconds(runs, options.rounds)
    whole = seconds.pop("step") * options.rows / options.step_rows
    for name, value in seconds.items():
        share = (value + (seconds["advantage"] if name != "advantage" else 0)) / whole
        row = {
            "figure": f"losses: {name}" + ("" if name == "advantage" else " and advantage"),
            "value": round(share, 5),
            "unit": "share of the step",
            "demand": "<= 0.02",
            "holds": share <= 0.02,
            "seconds": round(value, 4),
            "step_seconds": round(whole, 2),
        }
        print(json.dumps(row) if options.json else f"{row['figure']}: {share:.2%} of the step, {value:.3f} s")
    row = {"figure": "losses: instructions that talk to the host", "value": talking, "unit": "count"}
    row |= {"demand": "0", "holds": talking == 0}
    print(json.dumps(row) if options.json else f"{row['figure']}: {talking}")


if __name__ == "__main__":
    main()
