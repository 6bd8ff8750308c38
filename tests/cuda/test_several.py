"""Tokens over several NVIDIA GPUs, by what is chosen there, against the float64 oracle.

`python -m pytest --noconftest tests/cuda` on a machine that has them; elsewhere it is skipped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gluon
from jax_gluon import AttentionQuantization, QuantSpec
from tests.support import oracle
from tests.support.cases import BARS

if jax.default_backend() != "gpu" or jax.device_count() < 2:
    pytest.skip("JAX finds no two GPUs", allow_module_level=True)

DEVICES = jax.device_count()
B, N, K, H = 2, 4 * DEVICES, 2 * DEVICES, 64
ROWS = AttentionQuantization(None, QuantSpec(), QuantSpec())  # scales of tokens, whoever has them

#: Tokens of a device, and arguments; "in_xla": cuDNN does not take them.
CASES = {
    "full": (77, {}),
    "contiguous": (77, dict(is_causal=True)),
    "zigzag": (90, dict(is_causal=True, token_layout="zigzag")),
    "striped": (90, dict(is_causal=True, token_layout="striped")),
    "striped_odd": (77, dict(is_causal=True, token_layout="striped")),
    "gathered": (90, dict(is_causal=True, token_layout="zigzag", strategy="all_gather")),
    "heads": (90, dict(is_causal=True, token_layout="striped", strategy="all_to_all")),
    "sinks": (90, dict(is_causal=True, token_layout="zigzag", sinks=True)),
    "codes": (90, dict(is_causal=True, token_layout="zigzag", quantization=ROWS)),
    "codes_heads": (
        90, dict(is_causal=True, token_layout="zigzag", quantization=ROWS, strategy="all_to_all")
    ),
    "segments": (90, dict(is_causal=True, token_layout="zigzag", segments=True, in_xla=True)),
    "window": (90, dict(is_causal=True, local_window_size=(100, 0), in_xla=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_devices_give_what_one_does(name):
    tokens, case = CASES[name]
    case = {"token_layout": "contiguous", "strategy": "ring"} | case
    layout, quantization = case["token_layout"], case.get("quantization")
    in_xla = case.pop("in_xla", False)
    rng = np.random.default_rng(3)
    T = tokens * DEVICES
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    arrays = [jnp.asarray(rng.standard_normal(x), jnp.bfloat16) for x in shapes]
    given = {}
    if case.pop("sinks", False):
        given["sinks"] = rng.standard_normal(N).astype(np.float32)
    if case.pop("segments", False):
        ids = np.sort(rng.integers(0, 3, (B, T)), axis=1).astype(np.int32)
        given |= dict(query_segment_ids=ids, key_value_segment_ids=ids)
    exact = [np.asarray(x, np.float64) for x in arrays]
    if quantization:
        for i, spec in ((1, quantization.key), (2, quantization.value)):
            codes = jax_gluon.quantize(arrays[i], spec, implementation="xla")
            exact[i] = np.asarray(codes.dequantize(jnp.float32), np.float64)
    oracle_only = {
        x: case[x] for x in ("is_causal", "local_window_size") if x in case
    } | given  # fmt: skip
    wanted = oracle.attention(*exact[:3], d_out=exact[3], **oracle_only)

    mesh = Mesh(np.array(jax.devices()), ("sequence",))
    spread = NamedSharding(mesh, P(None, "sequence"))

    def ordered(x):
        return jax_gluon.reorder_tokens(x, DEVICES, layout)

    def placed(x):
        return jax.device_put(ordered(x), spread)

    moved = {x: y if x == "sinks" else ordered(y) for x, y in given.items()}
    attend = functools.partial(
        jax_gluon.context_parallel_attention, mesh=mesh, axis="sequence", **case, **moved
    )

    def run(q, k, v, d_out):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(d_out)

    operands = [placed(x) for x in arrays]
    program = jax.jit(run).lower(*operands).compile()
    assert ("__cudnn$fmhaSoftmaxBackward" in program.as_text()) != in_xla
    found = program(*operands)
    forward, backward = BARS["int8" if quantization else "bfloat16"]
    bars = forward, backward, backward, backward
    restore = functools.partial(jax_gluon.restore_tokens, shards=DEVICES, token_layout=layout)
    names = "out", "d_query", "d_key", "d_value"
    errors = {}
    for field, x in zip(names, found, strict=True):
        x, y = np.asarray(restore(np.asarray(x, np.float32)), np.float64), getattr(wanted, field)
        errors[field] = np.linalg.norm(x - y) / np.linalg.norm(y)
    print(name, {field: f"{x:.1e}" for field, x in errors.items()})
    assert all(x <= bar for x, bar in zip(errors.values(), bars, strict=True)), errors
