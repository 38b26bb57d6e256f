"""A decoder with a value head: one number for every token, for reward models and critics.

The head reads the hidden state after the final norm, in float32. The decoder's own output matrix stays, so the decoder
is exported as any other; the head lies beside it in a file of its own, named as a classifier of one class names it in
transformers.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxrl.config import ModelConfig
from jaxrl.mesh import to_compute
from jaxrl.model import transformer
from jaxrl.model.spec import ParamSpec, Specs
from jaxrl_kernels.products import product

HEAD_FILE, HEAD_TENSOR = "value_head.safetensors", "score.weight"
DECODER, HEAD = "decoder", "value_head"
"""Keys of the parameter tree."""


def value_specs(config: ModelConfig) -> Specs:
    """The decoder's table under ``decoder``, and the head [1, D] under ``value_head``."""
    init = jax.nn.initializers.normal(config.init_scale)
    head = ParamSpec((config.width,), jnp.dtype("float32"), ("embed",), init, HEAD_TENSOR, ((), ("embed",)))
    return {DECODER: transformer.param_specs(config), HEAD: head}


def token_values(
    params: Any, config: ModelConfig, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """[B, T] float32: the value of what a row holds up to and including each token. Arguments as in
    ``transformer.hidden_states``; what stands on padding means nothing."""
    hidden = transformer.hidden_states(params[DECODER], config, tokens, positions, segment_ids)
    head = to_compute(params[HEAD], (None,))
    values = product("btd,d->bt", hidden.astype(jnp.float32), head)
    return to_compute(values, ("batch", None))


def save_head(folder: pathlib.Path, head: Any) -> None:
    """Write a head beside the decoder in ``folder``."""
    safetensors.numpy.save_file({HEAD_TENSOR: np.asarray(jax.device_get(head))[None]}, folder / HEAD_FILE)


def load_head(folder: pathlib.Path, width: int) -> np.ndarray | None:
    """The head in a folder, float32 [D]; None where the folder holds a plain decoder.

    Raises:
        ValueError: a head of another width.
    """
    if not (folder / HEAD_FILE).is_file():
        return None
    head = safetensors.numpy.load_file(folder / HEAD_FILE)[HEAD_TENSOR]
    if head.shape != (1, width):
        raise ValueError(f"{folder / HEAD_FILE}: {HEAD_TENSOR} has shape {head.shape}, wanted {(1, width)}")
    return head[0].astype(np.float32)
