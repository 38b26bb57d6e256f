"""Instructions of the TPU kernel's unmasked body beside those of splash at equal blocks: one JSON object a line.

A bundle is what a TPU's core starts in one cycle. They are counted in what the compiler writes, for chips that are not
there, loops and both sides of a branch once: a hint at what a change of the kernel costs, no measurement of speed.
Needs the compiler: ``jaxrl check --install tpu``.

    python benchmarks/bundles.py --json
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from jaxrl.check import environment
from jaxrl_kernels.interval_attention import tpu
from jaxrl_kernels.interval_attention.pairs import Blocks, make_pairs

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
KERNELS = {"ours": "forward_kernel_of_interval_attention", "splash": "splash_mha_fwd"}
TOKENS, WIDTH, BLOCK = 4096, 128, 512
DEMAND = 1.25
"""Of splash's bundles, per row."""


def splash() -> Callable[..., jax.Array]:
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((TOKENS, TOKENS))])
    sizes = splash_attention_kernel.BlockSizes(block_q=BLOCK, block_kv=BLOCK, block_kv_compute=BLOCK)
    return splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    end = jnp.full((1, TOKENS), TOKENS, jnp.int32)
    pairs = make_pairs(end, queries=TOKENS, first=0, blocks=Blocks(BLOCK, BLOCK))
    q, k, v = (x[:, :, None] for x in (q, k, v))
    return tpu.interval_attention(q, k, v, end, jnp.int32(0), 0, WIDTH**-0.5, 0.0, None, pairs)[0]


def compile_for(kernel: str, topology: str) -> None:
    """Compile one of both, for the compiler to write down what it does."""
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    mesh = jax.sharding.Mesh([device], ("one",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    row = jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.bfloat16, sharding=whole)
    attend = splash() if kernel == "splash" else ours  # it makes arrays, for which the mesh has no devices
    with jax.set_mesh(mesh):
        jax.jit(attend).trace(row, row, row).lower(lowering_platforms=("tpu",)).compile()


def bundles(kernel: str, topology: str) -> int:
    """How many the compiler made of a kernel.

    Raises:
        RuntimeError: it failed, or wrote down nothing of the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, __file__, "--compile", kernel, topology],
            env=environment.variables("tpu") | {"LIBTPU_INIT_ARGS": dump},
            capture_output=True,
            text=True,
            check=False,
        )
        found = pathlib.Path(folder).glob(f"*{KERNELS[kernel]}*schedule-analysis_final_bundles.txt")
        counts = [re.search(r"total scheduled bundles:\s+(\d+)", path.read_text()) for path in found]
    if done.returncode or len(counts) != 1 or counts[0] is None:
        raise RuntimeError(f"the compiler for {topology} wrote down no {KERNELS[kernel]}:\n{done.stderr[-2000:]}")
    return int(counts[0][1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs=2, metavar=("KERNEL", "TOPOLOGY"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object a line (there is no other form)")
    options = parser.parse_args()
    if options.compile:
        # Only what a block takes in which all is visible.
        tpu._if_needed = lambda settings, places, entry, scalars, masks, asked, add: add(None)
        compile_for(*options.compile)
        return 0
    if not environment.installed("tpu"):
        print(json.dumps({"figure": "K1", "holds": None, "note": "no compiler for TPUs: jaxrl check --install tpu"}))
        return 0
    holds = True
    for chip, topology in TOPOLOGIES.items():
        counted = {kernel: bundles(kernel, topology) for kernel in KERNELS}
        ratio = counted["ours"] / counted["splash"]
        holds = holds and ratio <= DEMAND
        figure = {"figure": "K1", "what": "unmasked forward body: bundles over splash's", "value": round(ratio, 2)}
        figure |= {"unit": "ratio", "demand": f"<= {DEMAND}", "holds": ratio <= DEMAND, "chip": chip} | counted
        print(json.dumps(figure | {"blocks": BLOCK, "head_width": WIDTH, "jax": jax.__version__}), flush=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
