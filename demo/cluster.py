"""`python -m demo.cluster`: a decoder trained by several processes, batch and tokens sharded.

One process for each host (or each group of devices), all with the same arguments. On a cluster
whose launcher JAX knows (Slurm, Open MPI, Kubernetes, TPU pods) nothing more is needed:

    srun python -m demo.cluster --processes auto --batch-devices 2

Elsewhere, and on one machine, each process is told who it is:

    python -m demo.cluster --processes 2 --process 0 --coordinator localhost:9876 --cpu-devices 2 &
    python -m demo.cluster --processes 2 --process 1 --coordinator localhost:9876 --cpu-devices 2

Without `--processes` one process trains alone, on the same batches: losses and weights are the same
to rounding, whatever the number of devices is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gluon
from demo import text as demo_text
from demo.rotary import rotated_at

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 16
WIDTH = HEADS * HEAD_DIM
TOKENS = P("batch", "sequence")
LAYOUT = "zigzag"  # equal work for all devices under a causal mask


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.cluster", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--processes", help='their number, or "auto": the launcher knows')
    parser.add_argument("--process", type=int, help="the number of this one")
    parser.add_argument("--coordinator", default="localhost:9876", help="address of process 0")
    parser.add_argument("--cpu-devices", type=int, help="of each process, where there is no GPU")
    parser.add_argument("--batch-devices", type=int, default=1, help="devices along the batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="excerpts in a step")
    parser.add_argument("--length", type=int, default=256, help="characters in an excerpt")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of attention's operands; GPUs' fused kernels take 16 bits",
    )  # fmt: skip
    parser.add_argument("--quantization", choices=("int8", "int4"), help="what the ring sends")
    parser.add_argument("--weights", type=Path, help="file (.npz) for the weights at the end")
    return parser.parse_args(arguments)


def start(options: argparse.Namespace) -> None:
    """Joins the other processes. It comes before anything that makes a device."""
    if options.cpu_devices:
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if options.processes is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if options.processes == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(options.coordinator, int(options.processes), options.process)


def initial_weights(key: jax.Array, vocabulary: int) -> dict[str, Any]:
    def matrix(*shape: int, fan_in: int) -> jax.Array:
        nonlocal key
        key, own = jax.random.split(key)
        return jax.random.normal(own, shape) / fan_in**0.5

    def layer() -> dict[str, jax.Array]:
        return {
            "query": matrix(WIDTH, HEADS, HEAD_DIM, fan_in=WIDTH),
            "key": matrix(WIDTH, KV_HEADS, HEAD_DIM, fan_in=WIDTH),
            "value": matrix(WIDTH, KV_HEADS, HEAD_DIM, fan_in=WIDTH),
            "out": matrix(HEADS, HEAD_DIM, WIDTH, fan_in=WIDTH),
            "up": matrix(WIDTH, 4 * WIDTH, fan_in=WIDTH),
            "down": matrix(4 * WIDTH, WIDTH, fan_in=4 * WIDTH),
        }

    embedding = matrix(vocabulary, WIDTH, fan_in=WIDTH)
    return {"embedding": embedding, "layers": [layer() for _ in range(LAYERS)]}


def logits_of(
    weights: dict[str, Any],
    codes: jax.Array,
    positions: jax.Array,
    mesh: Mesh,
    options: argparse.Namespace,
) -> jax.Array:
    """A decoder without biases; everything but attention works on each token by itself."""

    def normalised(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    x = weights["embedding"][codes]
    for layer in weights["layers"]:
        y = normalised(x)
        query, key, value = (
            jnp.einsum("btw,wnh->btnh", y, layer[name]) for name in ("query", "key", "value")
        )
        operands = rotated_at(query, positions), rotated_at(key, positions), value
        attended = jax_gluon.context_parallel_attention(
            *(operand.astype(options.dtype) for operand in operands),
            mesh=mesh, axis="sequence", batch_axis="batch", token_layout=LAYOUT,
            is_causal=True, quantization=options.quantization,
        )  # fmt: skip
        x = x + jnp.einsum("btnh,nhw->btw", attended.astype(x.dtype), layer["out"])
        x = x + jax.nn.gelu(normalised(x) @ layer["up"]) @ layer["down"]
    return normalised(x) @ weights["embedding"].T


def train(options: argparse.Namespace) -> dict[str, Any]:
    """The weights after training; process 0 says how it goes."""
    text = demo_text.load()
    sequence_devices = jax.device_count() // options.batch_devices
    mesh = jax.make_mesh(
        (options.batch_devices, sequence_devices), ("batch", "sequence"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )  # fmt: skip
    everywhere, by_token = NamedSharding(mesh, P()), NamedSharding(mesh, TOKENS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.3, momentum=0.9))

    def ordered(x: Any, axis: int) -> np.ndarray:
        """Tokens as the devices have them: zigzag."""
        return np.asarray(jax_gluon.reorder_tokens(x, sequence_devices, LAYOUT, axis=axis))

    def placed(x: np.ndarray) -> jax.Array:
        """An array of all processes, which all of them read alike; each keeps its own part."""
        return jax.make_array_from_callback(x.shape, by_token, lambda index: x[index])

    positions = ordered(np.arange(options.length, dtype=np.int32), 0)

    def loss_of(weights: Any, codes: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits_of(weights, codes, jnp.asarray(positions), mesh, options)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(weights: Any, state: Any, codes: jax.Array, labels: jax.Array) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(weights, codes, labels)
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    @jax.jit
    def initial() -> Any:
        weights = initial_weights(jax.random.key(0), len(text.alphabet))
        return jax.lax.with_sharding_constraint((weights, optimizer.init(weights)), everywhere)

    weights, state = initial()
    for i, excerpt in enumerate(text.batches(options.steps, options.batch, options.length, 0)):
        codes, labels = (placed(ordered(x, 1)) for x in (excerpt[:, :-1], excerpt[:, 1:]))
        weights, state, loss = step(weights, state, codes, labels)
        if jax.process_index() == 0:
            print(f"step {i}: loss {float(loss):.6f}", flush=True)
    return weights


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start(options)
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)
    weights = train(options)
    if options.weights and jax.process_index() == 0:
        leaves = jax.tree.leaves(weights)
        np.savez(options.weights, *(np.asarray(x.addressable_data(0)) for x in leaves))


if __name__ == "__main__":
    main()
