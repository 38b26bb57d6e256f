"""Log-probabilities over a vocabulary: the case table, finite differences, a split vocabulary, and what is held."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import linear_logprob
from jaxrl_kernels.linear_logprob import LinearLogprob
from jaxrl_kernels.linear_logprob.cases import CASES, Case

Arrays = tuple[jax.Array, ...]


def inputs(case: Case, dtype: str | None = None) -> tuple[jax.Array, Arrays, jax.Array, LinearLogprob]:
    """hidden, head, targets, and cotangents of the results."""
    draw = np.random.default_rng(0)
    shapes = [(case.tokens, case.width), (case.vocabulary, case.width)]
    if case.rank:
        shapes += [(case.width, case.rank), (case.rank, case.vocabulary)]
    hidden, *head = (jnp.asarray(draw.normal(size=shape), case.dtype).astype(dtype or case.dtype) for shape in shapes)
    targets = jnp.asarray(draw.integers(0, case.vocabulary, case.tokens), jnp.int32)
    cotangents = LinearLogprob(*(jnp.asarray(draw.normal(size=case.tokens), jnp.float32) for _ in range(3)))
    return hidden, tuple(head), targets, cotangents


def differentiated(
    case: Case, score: Callable[..., LinearLogprob], given: tuple[jax.Array, Arrays, jax.Array, LinearLogprob]
) -> list[jax.Array]:
    """The results, and the gradients of hidden states and head."""
    hidden, head, targets, cotangents = given

    def both(hidden: jax.Array, head: Arrays) -> tuple[LinearLogprob, tuple[jax.Array, Arrays]]:
        options = {"temperature": case.temperature, "soft_cap": case.soft_cap}
        results, pull = jax.vjp(lambda hidden, head: score(hidden, head, targets, **options), hidden, head)
        return results, pull(cotangents)

    return jax.tree.leaves(jax.jit(both)(hidden, head))


def naive(hidden: jax.Array, head: Arrays, targets: jax.Array, *, temperature: float, soft_cap: float) -> LinearLogprob:
    """As one writes it down, with logits in the type of the hidden states."""
    scores = hidden @ head[0].T + (hidden @ head[1] @ head[2] if len(head) > 1 else 0)
    scores = soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores
    logprobs = jax.nn.log_softmax((scores / temperature).astype(jnp.float32))
    entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
    total = jax.nn.logsumexp((scores / temperature).astype(jnp.float32), axis=-1)
    return LinearLogprob(logprobs[jnp.arange(len(targets)), targets], entropy, total)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    """At most twice as far from float32 as the naive computation in the same type."""
    exact = functools.partial(linear_logprob, implementation="reference")
    ours = functools.partial(linear_logprob, implementation="xla", chunk=case.chunk)
    wanted = differentiated(case, exact, inputs(case, "float32"))
    got, rough = (differentiated(case, score, inputs(case)) for score in (ours, naive))
    for mine, plain, true in zip(got, rough, wanted, strict=True):
        error, allowed = (float(jnp.abs(x.astype(jnp.float32) - true).max()) for x in (mine, plain))
        assert error <= 2 * allowed + 1e-5 * (1 + float(jnp.abs(true).max())), (error, allowed)
    assert [x.dtype for x in got] == [jnp.float32] * 3 + [jnp.dtype(case.dtype)] * (2 + 2 * bool(case.rank))


def test_gradients_are_those_of_finite_differences() -> None:
    case = Case("tiny", tokens=3, width=4, vocabulary=5, rank=2, chunk=2, temperature=0.7, soft_cap=1.5)
    hidden, head, targets, cotangents = inputs(case)

    def loss(arrays: list[np.ndarray]) -> float:
        """The formula, in float64."""
        hidden, matrix, left, right = arrays
        scores = 1.5 * np.tanh((hidden @ matrix.T + hidden @ left @ right) / 1.5) / 0.7
        total = np.log(np.exp(scores).sum(axis=1))
        logprobs = scores - total[:, None]
        results = logprobs[np.arange(3), targets], -(np.exp(logprobs) * logprobs).sum(axis=1), total
        return sum(float(np.asarray(weight, np.float64) @ x) for weight, x in zip(cotangents, results, strict=True))

    arrays = [np.asarray(x, np.float64) for x in (hidden, *head)]
    gradients = differentiated(case, functools.partial(linear_logprob, chunk=2), inputs(case))[3:]
    for array, gradient in zip(arrays, gradients, strict=True):
        for place in np.ndindex(array.shape):
            kept, step, values = array[place], 1e-6, []
            for sign in (1, -1):
                array[place] = kept + sign * step
                values.append(loss(arrays))
            array[place] = kept
            assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=2e-5)


def test_a_gradient_of_many_chunks_is_as_good_as_that_of_one() -> None:
    """In bfloat16 too, where a sum that is rounded after every chunk loses what a chunk adds."""
    case = Case("many", tokens=2048, width=4, vocabulary=8, dtype="bfloat16")
    wanted = differentiated(
        case, functools.partial(linear_logprob, implementation="reference"), inputs(case, "float32")
    )
    errors = {}
    for chunk in (1, 2048):
        got = differentiated(case, functools.partial(linear_logprob, chunk=chunk), inputs(case))[-1]
        errors[chunk] = float(jnp.linalg.norm(got.astype(jnp.float32) - wanted[-1]) / jnp.linalg.norm(wanted[-1]))
    assert errors[1] < 2 * errors[2048] < 0.02, errors


def test_a_frozen_head_has_no_gradient_in_memory() -> None:
    """Nothing of the size of all logits, nor, where only hidden states are differentiated, of the matrix."""
    tokens, vocabulary, width = 2048, 4096, 64
    shapes = (tokens, width), (vocabulary, width)
    hidden, matrix = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def loss(hidden: jax.Array, matrix: jax.Array, targets: jax.Array) -> jax.Array:
        return sum(part.sum() for part in linear_logprob(hidden, (matrix,), targets, chunk=32))

    def temporary(argnums: tuple[int, ...]) -> int:
        compiled = jax.jit(jax.grad(loss, argnums)).lower(hidden, matrix, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary((0, 1)) < tokens * vocabulary * 4 / 4
    assert temporary((0, 1)) - temporary((0,)) > vocabulary * width * 4 / 2


def test_a_split_vocabulary_gives_the_same() -> None:
    """Over two axes of four devices, its gradients too; a device holds its part of the matrix only."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.kernels.split_vocabulary"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 7
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"matrix": (5, 3)},
            r"hidden \(2, 4\) \[T, D\] .* needs a matrix \[V, D\] and integer targets \[T\]; got \(5, 3\)",
        ),
        ({"targets": (3,)}, r"targets \[T\]; got \(5, 4\), int32 \(3,\)"),
        ({"factors": ((4, 2), (3, 5))}, r"matrix \(5, 4\) \[V, D\] needs factors"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 above 0"),
        ({"factors": ((4, 2), (2, 4))}, r"matrix \(5, 4\) \[V, D\] needs factors \[D, r\] and \[r, V\]; got"),
        ({"implementation": "tpu"}, "implementation='tpu' with vocab_axis=None cannot be had; choose auto or xla"),
        ({"implementation": "reference", "vocab_axis": "tensor"}, "'reference' with vocab_axis='tensor' cannot be had"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    hidden, head = jnp.zeros((2, 4)), [jnp.zeros(change.pop("matrix", (5, 4)))]
    head += [jnp.zeros(shape) for shape in change.pop("factors", ())]
    targets = jnp.zeros(change.pop("targets", (2,)), jnp.int32)
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, tuple(head), targets, **change)
