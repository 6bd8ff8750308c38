"""`python -m benchmarks.study.boundary`: where codes stop being good enough, and what helps.

Errors of output and gradients from float64 attention of the operands before they were rounded.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accuracy, report
from benchmarks.study.formats import ALL, Case, Format, attend, changed
from benchmarks.study.suspects import relative

HEADS, HEAD_DIM = 4, 64
CASES: dict[str, tuple[Case, int]] = {
    **{f"logits of deviation {x}": (Case(peak=float(x)), 512) for x in (1, 2, 4, 8, 12, 20)},
    **{f"outlier channel x{x}": (Case(outlier=float(x)), 512) for x in (10, 30, 100)},
    **{f"shared offset {x}": (Case(offset=float(x)), 512) for x in (10, 100)},
    **{f"rows of {x} keys": (Case(), x) for x in (128, 2048, 8192)},
}
QUERIES = 128


def errors(form: Format, case: Case, keys: int) -> dict[str, float]:
    """Relative L2 of output, dQ, dK and dV over all heads, and the worse cosine of dQ and dK."""
    rng = np.random.default_rng(0)
    shapes = [(1, tokens, HEADS, HEAD_DIM) for tokens in (QUERIES, keys, keys, QUERIES)]
    q, k, v, d_out = (rng.standard_normal(shape, np.float32) for shape in shapes)
    q, k = (np.asarray(x) for x in changed(case, jnp.asarray(q), jnp.asarray(k)))
    attention = functools.partial(attend, form, Case())
    out, pullback = jax.vjp(attention, *map(jnp.asarray, (q, k, v)))
    found = [np.asarray(x, np.float64) for x in (out, *pullback(jnp.asarray(d_out)))]
    expected = [np.zeros_like(x) for x in found]
    for n, head in enumerate(accuracy.heads((q, k, v, d_out))):
        results = accuracy.exact(*head[:3]), *accuracy.exact_gradients(*head)
        for x, y in zip(expected, results, strict=True):
            x[0, :, n] = y
    cosines = [
        float(np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))
        for x, y in zip(found[1:3], expected[1:3], strict=True)
    ]
    names = ("out", "d_query", "d_key", "d_value")
    pairs = zip(names, found, expected, strict=True)
    return {name: relative(x, y) for name, x, y in pairs} | {"cosine": min(cosines)}


def measure() -> list[dict[str, Any]]:
    return [
        {"case": title, "format": name, **errors(form, *case)}
        for title, case in CASES.items()
        for name, form in ALL.items()
    ]


if __name__ == "__main__":
    json.dump({"boundary": measure(), "machine": report.machine()}, sys.stdout, indent=1)
