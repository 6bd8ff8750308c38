"""Checks which variant this processor is given, and what happens to one that it lacks."""

import os
import sys

import jax.numpy as jnp
import numpy as np

import jax_gluon
from jax_gluon import _plugin

BEST_FIRST = ("neon_i8mm_bf16", "neon_dotprod", "neon", "portable")


def attention():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 24, 2, 32)), jnp.float32)
    return np.asarray(jax_gluon.dot_product_attention(x, x, x, quantization="int8"))


def main() -> None:
    (expected,) = sys.argv[1:]
    first = BEST_FIRST.index(expected)
    supported = _plugin.cpu_isas_supported()
    found = [name for name in supported if not name.startswith("emulated")]
    if found != list(BEST_FIRST[first:]):
        sys.exit(f"the variants are {found}, expected {BEST_FIRST[first:]}")
    if _plugin.cpu_isa() != expected:
        sys.exit(f"{_plugin.cpu_isa()} is chosen, expected {expected}")
    best = attention()
    os.environ["JAX_GLUON_CPU_ISA"] = "portable"
    error = np.linalg.norm(attention() - best) / np.linalg.norm(best)
    if not error <= 1e-4:
        sys.exit(f"{expected} differs from portable by {error:.1e}")
    for lacking in BEST_FIRST[:first]:
        os.environ["JAX_GLUON_CPU_ISA"] = lacking
        try:
            attention()
        except Exception as refusal:
            if f"JAX_GLUON_CPU_ISA is '{lacking}', expected one of" in str(refusal):
                continue
            sys.exit(f"{lacking} is refused with: {refusal}")
        sys.exit(f"{lacking} is not refused")
    print(f"{expected}: chosen, within {error:.1e} of portable; others are refused")


if __name__ == "__main__":
    main()
