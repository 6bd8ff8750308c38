"""Calls and the bits of their results: some that are always there, others drawn from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gluon
from jax_gluon._quantization.formats import PRESETS, AttentionQuantization
from tests.fuzz import cases, check
from tests.fuzz.cases import Case


@dataclass(frozen=True)
class Problem:
    """A function and its operands."""

    name: str
    call: Callable[..., Any]
    operands: tuple[Any, ...]

    def digest(self) -> str:
        """Of every bit of the results."""
        return digest(self.call(*self.operands))


def digest(results: Any) -> str:
    hashed = hashlib.sha256()
    for x in jax.tree.leaves(results):
        hashed.update(np.asarray(x).tobytes())
    return hashed.hexdigest()


def _specs(preset: str) -> tuple[dict[str, Any] | None, ...]:
    specs = PRESETS[preset].query, PRESETS[preset].key, PRESETS[preset].value
    return tuple(None if spec is None else asdict(spec) for spec in specs)


#: Of each format, mask and kind of kernel; small, so that calls are many.
ALWAYS = (
    Case(seed=1, B=2, T=65, S=65, K=2, group=2, H=32, V=32, rules=("causal",)),
    Case(seed=2, B=2, T=50, S=80, K=1, group=4, H=32, V=32, rules=("key_value_lengths",),
         specs=_specs("int8")),
    Case(seed=3, B=1, T=70, S=70, K=2, group=1, H=32, V=32, rules=("causal",),
         specs=_specs("int4")),
    Case(seed=4, B=2, T=33, S=129, K=2, group=2, H=24, V=16, dtype="bfloat16",
         rules=("mask", "bias")),
    Case(seed=5, B=3, T=1, S=300, K=2, group=4, H=32, V=32),
    Case(seed=6, B=1, T=90, S=90, K=1, group=3, H=16, V=16, rules=("dropout", "window")),
)  # fmt: skip


def always(implementation: str = "cpu") -> list[Problem]:
    return [_jitted(case, implementation) for case in ALWAYS]


def drawn(seed: int, count: int) -> list[Problem]:
    """The first `count` cases from a seed on that the CPU's kernels take."""
    found: list[Problem] = []
    while len(found) < count:
        problem = _jitted(cases.draw(seed, ["portable"], ["cpu"]), "cpu")
        seed += 1
        try:
            problem.digest()
        except ValueError as error:
            if "; allowed: " not in str(error):
                raise
            continue
        found.append(problem)
    return found


def outside_jit() -> Problem:
    """A call that JAX dispatches by itself."""
    x = [np.random.default_rng(0).standard_normal((2, n, 2, 16), np.float32) for n in (9, 30, 30)]
    return Problem("outside jit", jax_gluon.dot_product_attention, tuple(map(jnp.asarray, x)))


def _jitted(case: Case, implementation: str) -> Problem:
    """Output and gradients of a case; its variant is the process's, which threads share."""
    drawn = check.build(case)
    arrays = {n: jnp.asarray(x) for n, x in drawn.keywords.items() if isinstance(x, np.ndarray)}
    numbers = {n: x for n, x in drawn.keywords.items() if n not in arrays} | drawn.dropout
    options = {n: case.how[n] for n in ("kernel", "layout") if case.how.get(n) is not None}
    specs = AttentionQuantization(*case.quant_specs()) if any(case.specs) else None

    @jax.jit
    def results(operands: tuple[Any, ...], d_out: Any, arrays: dict[str, Any]) -> Any:
        def attention(*x: Any) -> Any:
            return jax_gluon.dot_product_attention(
                *x, quantization=specs, implementation=implementation,
                **arrays, **numbers, **options,
            )  # fmt: skip

        out, pullback = jax.vjp(attention, *operands)
        return out, pullback(d_out)

    operands = tuple(map(jnp.asarray, drawn.arrays))
    d_out = jnp.asarray(drawn.d_out)
    if options.get("layout") == "BNTH":
        operands = (*(jnp.swapaxes(x, 1, 2) for x in operands[:3]), *operands[3:])
        d_out = jnp.swapaxes(d_out, 1, 2)
    return Problem(str(case), results, (operands, d_out, arrays))
