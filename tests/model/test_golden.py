"""The decoder against logits, log-probabilities and gradients recorded from the reference models."""

import itertools
import json
import pathlib
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.model import hf, kv_pages, logprob, transformer

MODELS = (
    "qwen2_tied", "qwen2_sliding", "qwen3", "qwen3_tied_mha", "llama_plain", "llama3_rope", "mistral_sliding", "gemma2",
    "gemma3_text", "qwen3_moe",
)  # fmt: skip
CASES = ("plain", "right_pad", "left_pad", "long", "packed")
LOGIT_TOLERANCE = 2e-4
ROWS, TOKENS = 3, 24
"""Every short case is padded to this shape, so that all share one compiled function."""
PAGE, CHUNK = 4, 6


class Golden:
    """One recorded model: its parameters here, and the arrays of its cases."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.config, self.params = hf.load_folder(folder)
        self.document = json.loads((folder / "golden.json").read_text())
        with np.load(folder / "golden.npz") as arrays:
            self.arrays = dict(arrays)
        self.score = jax.jit(self._score)
        self.paged_step = jax.jit(self._paged_step)

    def case(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs as the decoder takes them, and expected outputs."""
        case = next(case for case in self.document["cases"] if case["id"] == name)
        inputs, outputs = (
            {key: self.arrays[value[1:]] if isinstance(value, str) else value for key, value in case[part].items()}
            for part in ("inputs", "outputs")
        )
        segment_ids = inputs.get("segment_ids", inputs["attention_mask"]).astype(np.int32)
        if "segment_ids" in inputs:
            segment_ids = (segment_ids - segment_ids.min() + 1) * inputs["attention_mask"]
        rows = {"tokens": inputs["input_ids"], "positions": inputs["position_ids"], "segment_ids": segment_ids}
        count, length = segment_ids.shape
        more = ((0, max(ROWS - count, 0)), (0, max(TOKENS - length, 0))) if length <= TOKENS else 0
        return {key: np.pad(value.astype(np.int32), more) for key, value in rows.items()}, outputs

    def _score(self, params: Any, rows: dict[str, jax.Array]) -> tuple[jax.Array, logprob.TokenStats]:
        """(logits, statistics) of packed rows."""
        hidden = transformer.hidden_states(params, self.config, **rows)
        return logprob.logits(params, self.config, hidden), logprob.sequence_logprobs(params, self.config, **rows)

    def _paged_step(self, params: Any, tokens: Any, positions: Any, pages: Any, table: Any) -> Any:
        """(logits [R, C, V], pages) of new tokens [R, C]."""
        hidden, pages = transformer.paged_hidden_states(params, self.config, tokens, positions, pages, table)
        return logprob.logits(params, self.config, hidden), pages


@pytest.fixture(scope="module", params=MODELS)
def golden(request: pytest.FixtureRequest, shared: pathlib.Path) -> Golden:
    return Golden(shared / "golden" / "models" / request.param)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_logprobs(golden: Golden, case: str) -> None:
    rows, expected = golden.case(case)
    logits, stats = jax.device_get(golden.score(golden.params, rows))
    there = rows["segment_ids"] > 0
    pairs = np.zeros_like(there)
    count, length = expected["pair_mask"].shape
    pairs[:count, 1 : length + 1] = expected["pair_mask"]
    if "logits_positions" in expected:
        logits, there = logits[:, expected["logits_positions"]], there[:, expected["logits_positions"]]
    wanted = expected["logits"][there[: len(expected["logits"]), : expected["logits"].shape[1]]]
    np.testing.assert_allclose(logits[there], wanted, atol=LOGIT_TOLERANCE, rtol=0)
    wanted = expected["token_logprobs"][expected["pair_mask"].astype(bool)]
    np.testing.assert_allclose(stats.logprobs[pairs], wanted, atol=LOGIT_TOLERANCE, rtol=0)
    assert not stats.logprobs[~pairs].any()
    assert -stats.logprobs.sum() / pairs.sum() == pytest.approx(expected["mean_nll"], abs=1e-4)


def test_gradient_norms(golden: Golden) -> None:
    rows, expected = golden.case("plain")

    @jax.jit
    def gradient(params: Any) -> Any:
        def mean_nll(params: Any) -> jax.Array:
            stats = logprob.sequence_logprobs(params, golden.config, **rows)
            return -jnp.sum(stats.logprobs) / expected["pair_mask"].sum()

        return jax.grad(mean_nll)(params)

    specs = flax.traverse_util.flatten_dict(transformer.param_specs(golden.config))
    found = {}
    for key, leaf in flax.traverse_util.flatten_dict(jax.device_get(gradient(golden.params))).items():
        for place, name in specs[key].hf_names.items():
            found[name] = float(np.linalg.norm(leaf[place]))
    assert found == pytest.approx(expected["grad_norms"], rel=1e-3)


def shuffled_pages(rows: int, tokens: int) -> np.ndarray:
    """A page table [rows, pages of a row] in no order, so that a page read in the wrong place shows."""
    pages_of_row = -(-tokens // PAGE)
    return np.random.default_rng(0).permutation(rows * pages_of_row).reshape(rows, pages_of_row).astype(np.int32)


def test_paged_logits(golden: Golden) -> None:
    """Half of the row is prefilled in chunks, the rest decoded token by token; the third row is empty throughout."""
    rows, expected = golden.case("plain")
    tokens, positions = rows["tokens"], np.where(rows["segment_ids"] > 0, rows["positions"], -1)
    table = shuffled_pages(ROWS, TOKENS)
    pages, logits = kv_pages.init_pages(golden.config, table.size, PAGE), []
    cuts = [*range(0, 2 * CHUNK, CHUNK), *range(2 * CHUNK, TOKENS + 1)]
    for start, stop in itertools.pairwise(cuts):
        part, pages = golden.paged_step(golden.params, tokens[:, start:stop], positions[:, start:stop], pages, table)
        logits.append(part[:2])
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected["logits"], atol=LOGIT_TOLERANCE, rtol=0)


def test_greedy_continuation(golden: Golden) -> None:
    """The last chunk of the prompt is not full: only true tokens may be written and seen."""
    greedy = golden.document["greedy"]
    prompt, wanted = greedy["prompt"], greedy["continuation"]
    table = shuffled_pages(ROWS, TOKENS)
    pages = kv_pages.init_pages(golden.config, table.size, PAGE)
    for start in range(0, len(prompt), CHUNK):
        ids = prompt[start : start + CHUNK]
        tokens, positions = np.zeros((ROWS, CHUNK), np.int32), np.full((ROWS, CHUNK), -1, np.int32)
        tokens[0, : len(ids)] = ids
        positions[0, : len(ids)] = np.arange(start, start + len(ids))
        logits, pages = golden.paged_step(golden.params, tokens, positions, pages, table)
    found = [int(np.argmax(logits[0, len(ids) - 1]))]
    for position in range(len(prompt), len(prompt) + len(wanted) - 1):
        tokens, positions = np.full((ROWS, 1), found[-1], np.int32), np.array([[position], [-1], [-1]], np.int32)
        logits, pages = golden.paged_step(golden.params, tokens, positions, pages, table)
        found.append(int(np.argmax(logits[0, 0])))
    assert found == wanted
