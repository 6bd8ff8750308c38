"""What is measured: shapes, directions and the suites of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One row of a table; T == S. `direction`: "forward", or "both" for forward and backward."""

    B: int
    N: int
    T: int
    H: int
    is_causal: bool = False
    direction: str = "forward"

    def __str__(self) -> str:
        causal = " causal" if self.is_causal else ""
        return f"{self.direction} B{self.B} N{self.N} T{self.T} H{self.H}{causal}"

    @property
    def operations(self) -> float:
        """Floating-point operations: 4 B N T T H forward, 3.5 times that with backward."""
        count = 4.0 * self.B * self.N * self.T * self.T * self.H
        return count * (0.5 if self.is_causal else 1.0) * (3.5 if self.direction == "both" else 1.0)

    def operands(self) -> tuple[np.ndarray, ...]:
        """query, key, value and a cotangent: N(0, 1) float32 `[B, T, N, H]`, always the same."""
        rng = np.random.default_rng(0)
        shape = (self.B, self.T, self.N, self.H)
        return tuple(rng.standard_normal(shape, dtype=np.float32) for _ in range(4))

    def exact_head(self) -> np.ndarray:
        """Output of batch 0, head 0 in float64, `[T, H]`."""
        query, key, value = (x[0, :, 0].astype(np.float64) for x in self.operands()[:3])
        logits = query @ key.T / np.sqrt(self.H)
        if self.is_causal:
            logits = np.where(np.tril(np.ones(logits.shape, bool)), logits, -np.inf)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        return probabilities @ value / probabilities.sum(-1, keepdims=True)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Requirement:
    """`fast` must take at most 1 / `ratio` of the time of `slow` on `problem`."""

    problem: Problem
    fast: str
    slow: str
    ratio: float


FLOOR_SHAPE = {"B": 1, "N": 8, "T": 2048, "H": 64}
_DENSE, _CAUSAL = Problem(**FLOOR_SHAPE), Problem(**FLOOR_SHAPE, is_causal=True)
_BOTH = Problem(**FLOOR_SHAPE, direction="both")
REQUIREMENTS = (
    Requirement(_DENSE, "gluon float32", "torch float32", 1.15),
    Requirement(_DENSE, "gluon float32", "jax.nn float32", 2.0),
    Requirement(_CAUSAL, "gluon float32", "jax.nn float32", 4.0),
    Requirement(_DENSE, "gluon int8", "jax.nn float32", 5.0),
    Requirement(_CAUSAL, "gluon int8", "jax.nn float32", 10.0),
    Requirement(_BOTH, "gluon float32", "torch float32", 1.1),
)

SUITES = {
    "floor": (_DENSE, _CAUSAL, _BOTH),
    "quick": (Problem(1, 8, 512, 64), Problem(1, 8, 512, 64, is_causal=True)),
    "full": tuple(
        Problem(1, 8, T, H, is_causal, direction)
        for direction in ("forward", "both")
        for T, H in ((512, 64), (1024, 64), (2048, 64), (2048, 128))
        for is_causal in (False, True)
    ),
}
