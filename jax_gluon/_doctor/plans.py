"""What would run for a few typical problems, and why."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_gluon._attention import explain

_Shape = tuple[int, int, int, int, int, int]
#: B, T, S, N, K, H of each, and what else it asks for.
TYPICAL: dict[str, tuple[_Shape, Any, dict[str, Any]]] = {
    "small model, training": ((8, 256, 256, 6, 6, 64), jnp.float32, {"is_causal": True}),
    "decoder, training": ((1, 2048, 2048, 16, 16, 128), jnp.bfloat16, {"is_causal": True}),
    "decoder, prompt in INT8": (
        (1, 4096, 4096, 32, 8, 128),
        jnp.bfloat16,
        {"is_causal": True, "quantization": "int8"},
    ),
    "decoder, one token": ((8, 1, 4096, 32, 8, 128), jnp.bfloat16, {}),
    "image model in INT8": ((1, 4608, 4608, 24, 24, 128), jnp.bfloat16, {"quantization": "int8"}),
}


def plans() -> list[dict[str, Any]]:
    """For each typical problem: implementation, kernels of both passes, reasons."""
    found: list[dict[str, Any]] = []
    for name, ((B, T, S, N, K, H), dtype, keywords) in TYPICAL.items():
        query = jax.ShapeDtypeStruct((B, T, N, H), dtype)
        key = jax.ShapeDtypeStruct((B, S, K, H), dtype)
        plan = explain(query, key, key, **keywords)
        found.append(
            {
                "name": name,
                "problem": f"B{B} T{T} S{S} N{N} K{K} H{H} {dtype.__name__}",
                "keywords": {key: str(value) for key, value in keywords.items()},
                "implementation": plan.implementation,
                "forward": None if plan.forward is None else str(plan.forward),
                "backward": None if plan.backward is None else str(plan.backward),
                "reasons": list(plan.reasons),
            }
        )
    return found
