"""Work of the Metal kernels, counted by the software device: no clock, and no claim about a GPU.

    SOFTMETAL_INSTRUMENT=counters python -m benchmarks.metal [--length 1024]

Prints Markdown tables for B1, N1, T = S.
"""

from __future__ import annotations

import argparse
import os
import sys

import jax
import jax.numpy as jnp

import jax_gluon

FORMATS = {
    "float16": (jnp.float16, None),
    "bfloat16": (jnp.bfloat16, None),
    "float32": (jnp.float32, None),
    "int8": (jnp.float32, "int8"),
    "int4": (jnp.float32, "int4"),
}


def least_products(length: int, head_dim: int, is_causal: bool, products: int) -> int:
    """Multiply-accumulates of the 8 x 8 tiles with a visible pair; `products` of them each."""
    tiles = length // 8
    visible = tiles * (tiles + 1) // 2 if is_causal else tiles * tiles
    return visible * 64 * head_dim * products


def dispatches(length: int, head_dim: int, is_causal: bool, name: str) -> list[dict[str, int]]:
    dtype, quantization = FORMATS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (1, length, 1, head_dim), dtype) for k in keys)

    def loss(kernel, *x):
        out = jax_gluon.dot_product_attention(
            *x,
            is_causal=is_causal,
            quantization=quantization,
            implementation="metal",
            kernel=kernel,
        )
        return jnp.sum(out.astype(jnp.float32))

    work = []
    for kernel in ("baseline", "gluon"):
        jax_gluon.debug.metal_counters(reset=True)
        gradient = jax.grad(loss, argnums=(1, 2, 3))
        jax.block_until_ready(gradient(kernel, query, key, value))
        work += jax_gluon.debug.metal_counters(reset=True)
    return work


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.metal", description="Counted work on Metal.")
    parser.add_argument("--length", type=int, default=1024, help="tokens, a multiple of 8")
    length = parser.parse_args().length
    if os.environ.get("SOFTMETAL_INSTRUMENT") != "counters":
        sys.stderr.write("benchmarks.metal: SOFTMETAL_INSTRUMENT is not set to counters\n")
        return 2
    # Products of a score tile in each kernel: S and PV; S, dP and dQ, and PK where the output is
    # not exact; S, dP, dV and dK.
    products = {
        "attention_forward": 2,
        "attention_backward_query": 3,
        "attention_backward_key_value": 4,
    }
    for head_dim in (64, 128):
        for is_causal in (False, True):
            print(f"\nH = {head_dim}{', causal' if is_causal else ''}\n")
            print(
                "| format | kernel | products / least | device MB read | written | "
                "threadgroup KiB | barriers per threadgroup | simdgroup operations, thousands | "
                "exp2, thousands |"
            )
            print("|---|---|---|---|---|---|---|---|---|")
            for name in FORMATS:
                for work in dispatches(length, head_dim, is_causal, name):
                    stem = next((x for x in products if work["kernel"].startswith(x)), None)
                    if stem is None:
                        continue
                    count = products[stem]
                    if stem == "attention_backward_query" and name != "float32":
                        count += 1
                    least = least_products(length, head_dim, is_causal, count)
                    groups = work["threads"] // 128
                    print(
                        f"| {name} | {work['kernel']} | "
                        f"{work['multiply_accumulates'] / least:.3f} | "
                        f"{work['device_bytes_read'] / 1e6:.2f} | "
                        f"{work['device_bytes_written'] / 1e6:.2f} | "
                        f"{work['threadgroup_memory_peak'] / 1024:.1f} | "
                        f"{work['barriers'] / groups:.1f} | "
                        f"{work['simdgroup_operations'] / 1e3:.0f} | "
                        f"{work['exp2'] / 1e3:.0f} |",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
