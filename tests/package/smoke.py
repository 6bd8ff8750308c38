"""Runs the public API once in every way that matters, against NumPy in float64.

A plain script: it needs jax, NumPy and jax_gluon alone, so that any release of JAX can be tried.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from jax_gluon import _plugin

B, T, S, N, K, H = 2, 37, 45, 4, 2, 24
SCALE = H**-0.5


def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    query, key, value, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return query, key + 0.5, value, d_out


def fake_quantized(x: np.ndarray, *, center: bool = False) -> np.ndarray:
    """The int8 recipe in float64: one scale per (batch, token, head), the key centered first."""
    x = x.astype(np.float64)
    # The lower median of the first 32 tokens.
    middle = (min(x.shape[1], 32) - 1) // 2
    shared = np.sort(x[:, :32], axis=1)[:, middle : middle + 1] if center else 0.0
    x = x - shared
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / scale) * scale + shared


def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, d_out: np.ndarray, *, causal: bool
) -> tuple[np.ndarray, ...]:
    """Output and gradients of query, key and value, in float64."""
    query, key, value, d_out = (x.astype(np.float64) for x in (query, key, value, d_out))
    group = N // K
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    scores = SCALE * np.einsum("btnh,bsnh->bnts", query, key)
    if causal:
        scores = np.where(np.tri(T, S, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", p, value)
    d_p = np.einsum("btnh,bsnh->bnts", d_out, value)
    d_scores = SCALE * p * (d_p - np.einsum("btnh,btnh->bnt", d_out, out)[..., None])
    d_query = np.einsum("bnts,bsnh->btnh", d_scores, key)
    d_key = np.einsum("bnts,btnh->bsnh", d_scores, query)
    d_value = np.einsum("bnts,btnh->bsnh", p, d_out)
    d_key, d_value = (x.reshape(B, S, K, group, H).sum(axis=3) for x in (d_key, d_value))
    return out, d_query, d_key, d_value


def check(name: str, found: object, expected: np.ndarray, bound: float) -> None:
    found = np.asarray(found, np.float64)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    if found.shape != expected.shape or not error <= bound:
        sys.exit(f"{name}: shape {found.shape}, relative L2 error {error:.2e}, bound {bound:.0e}")


def check_custom_calls(function: object, arguments: tuple, *targets: str) -> None:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    for target in targets:
        if target not in text:
            sys.exit(f"the compiled program has no custom call {target}")


def check_gradients(quantization: str | None, *, causal: bool) -> None:
    query, key, value, d_out = operands()
    expected_operands = query, key, value
    if quantization == "int8":
        expected_operands = (
            fake_quantized(query),
            fake_quantized(key, center=True),
            fake_quantized(value),
        )
    expected = attention(*expected_operands, d_out, causal=causal)
    bounds = (2e-6, 3e-6) if quantization is None else (8e-3, 1e-2)
    name = f"{quantization or 'float32'} causal={causal}"

    def forward(query, key, value):
        return jax_gluon.dot_product_attention(
            query, key, value, is_causal=causal, quantization=quantization
        )

    def gradients(query, key, value):
        out, pullback = jax.vjp(forward, query, key, value)
        return out, *pullback(jnp.asarray(d_out))

    arguments = query, key, value
    check(f"{name}, eager", forward(*map(jnp.asarray, arguments)), expected[0], bounds[0])
    labels = "out", "d_query", "d_key", "d_value"
    for label, found, exact in zip(labels, jax.jit(gradients)(*arguments), expected, strict=True):
        check(f"{name}, {label}", found, exact, bounds[label != "out"])

    calls = ["jax_gluon.attention_forward", "jax_gluon.attention_backward"]
    if quantization:
        calls.append("jax_gluon.quantize")
    check_custom_calls(gradients, arguments, *calls)


def check_transformations() -> None:
    query, key, value, d_out = operands()
    out, *exact = attention(query, key, value, d_out, causal=True)
    d_query = exact[0]

    def forward(query, key, value):
        return jax_gluon.dot_product_attention(query, key, value, is_causal=True)

    def loss(query, key, value, d_out):
        return jnp.sum(forward(query, key, value) * d_out)

    stacked = jnp.stack([query, query[::-1]])
    mapped = jax.jit(jax.vmap(forward, in_axes=(0, None, None)))(stacked, key, value)
    check("vmap over query", mapped[0], out, 2e-6)

    mapped = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None, None, None)))(
        stacked, key, value, d_out
    )
    check("vmap of grad", mapped[0], d_query, 3e-6)

    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(query, key, value, d_out)
    check("grad of checkpoint", remat, d_query, 3e-6)

    def step(carry, _):
        return carry, forward(carry, key, value)

    scanned = jax.jit(lambda query: jax.lax.scan(step, query, None, length=3)[1])(query)
    check("scan", scanned[2], out, 2e-6)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tokens",))
    around = jax.jit(
        lambda query, key, value: jax_gluon.context_parallel_attention(
            query, key, value, mesh=mesh, axis="tokens", is_causal=True
        )
    )
    check("tokens over a mesh", around(query, key, value), out, 2e-6)

    def by_xla(query, key, value):
        return jax_gluon.dot_product_attention(
            query, key, value, is_causal=True, implementation="xla"
        )

    found = jax.jit(lambda *x: jax.vjp(by_xla, *x[:3])[1](x[3]))(query, key, value, d_out)
    check("implementation xla", jax.jit(by_xla)(query, key, value), out, 2e-6)
    for gradient, expected in zip(found, exact, strict=True):
        check("gradient of implementation xla", gradient, expected, 3e-6)
    # A cotangent that is constant, by which XLA simplifies.
    found = jax.jit(jax.grad(lambda *x: jnp.sum(by_xla(*x)), (0, 1, 2)))(query, key, value)
    tangent = jax.jit(
        lambda *x: jax.jvp(
            lambda *x: jax_gluon.dot_product_attention(
                *x, is_causal=True, implementation="xla", differentiation="any"
            ),
            x,
            tuple(map(jnp.ones_like, x)),
        )[1]
    )(query, key, value)
    exact = attention(query, key, value, np.ones_like(d_out), causal=True)[1:]
    pulled = sum(float(np.sum(x)) for x in exact)
    check("tangent of ones by implementation xla", np.sum(tangent), np.asarray(pulled), 1e-4)
    for gradient, expected in zip(found, exact, strict=True):
        check("gradient of the sum by implementation xla", gradient, expected, 3e-6)


def check_metal() -> None:
    """Right where there is a GPU; elsewhere an error that says why, and no other kernel."""
    query, key, value, d_out = operands()
    name, why = _plugin.metal_device()
    try:
        out = jax_gluon.dot_product_attention(
            *map(jnp.asarray, (query, key, value)), implementation="metal"
        )
    except RuntimeError as error:
        if name or not why or why not in str(error):
            sys.exit(f"Metal's device is {name!r} ({why}), and the error: {error}")
        return
    if not name:
        sys.exit(f"no error, although there is no Metal device: {why}")
    check(f"Metal on {name}", out, attention(query, key, value, d_out, causal=False)[0], 3e-6)


def main() -> None:
    for quantization in (None, "int8"):
        for causal in (False, True):
            check_gradients(quantization, causal=causal)
    check_transformations()
    check_metal()
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"smoke: jax_gluon is right under jax {jax.__version__}, Python {python}")


if __name__ == "__main__":
    main()
