"""What is measured: shapes, directions and the suites of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One row of a table. `direction`: "forward", or "both" for forward and backward.

    `S`, `K` and `V` are 0 where they are as `T`, `N` and `H`.
    """

    B: int
    N: int
    T: int
    H: int
    is_causal: bool = False
    direction: str = "forward"
    S: int = 0
    K: int = 0
    V: int = 0
    has_bias: bool = False

    def __str__(self) -> str:
        extents = {"B": self.B, "N": self.N, "K": self.K, "T": self.T, "S": self.S}
        extents |= {"H": self.H, "V": self.V}
        sizes = " ".join(f"{letter}{size}" for letter, size in extents.items() if size)
        causal = " causal" if self.is_causal else ""
        bias = " bias" if self.has_bias else ""
        return f"{self.direction} {sizes}{causal}{bias}"

    @property
    def keys(self) -> int:
        return self.S or self.T

    @property
    def kv_heads(self) -> int:
        return self.K or self.N

    @property
    def value_dim(self) -> int:
        return self.V or self.H

    @property
    def operations(self) -> float:
        """Floating-point operations: 2 B N T S (H + V) forward, 3.5 times that with backward."""
        count = 2.0 * self.B * self.N * self.T * self.keys * (self.H + self.value_dim)
        return count * (0.5 if self.is_causal else 1.0) * (3.5 if self.direction == "both" else 1.0)

    def operands(self) -> tuple[np.ndarray, ...]:
        """query, key, value and a cotangent: N(0, 1) float32 `[B, T, N, H]`, always the same."""
        rng = np.random.default_rng(0)
        shapes = (
            (self.B, self.T, self.N, self.H),
            (self.B, self.keys, self.kv_heads, self.H),
            (self.B, self.keys, self.kv_heads, self.value_dim),
            (self.B, self.T, self.N, self.value_dim),
        )
        return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)

    def bias(self) -> np.ndarray | None:
        """N(0, 1) float32 `[1, N, T, S]`, shared by the batch."""
        if not self.has_bias:
            return None
        shape = (1, self.N, self.T, self.keys)
        return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)

    def exact_head(self) -> np.ndarray:
        """Output of batch 0, head 0 in float64, `[T, V]`."""
        query, key, value = (x[0, :, 0].astype(np.float64) for x in self.operands()[:3])
        bias = self.bias()
        out = np.empty((self.T, value.shape[1]))
        # Some rows at a time: all scores of a long head are gigabytes.
        for i in range(0, self.T, 512):
            rows = slice(i, min(i + 512, self.T))
            logits = query[rows] @ key.T / np.sqrt(self.H)
            if bias is not None:
                logits += bias[0, 0, rows]
            if self.is_causal:
                logits = np.where(np.tri(*logits.shape, i, dtype=bool), logits, -np.inf)
            probabilities = np.exp(logits - logits.max(-1, keepdims=True))
            out[rows] = probabilities @ value / probabilities.sum(-1, keepdims=True)
        return out

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

# Shapes of models that are neither long nor of one kind: small windows, few queries, wide heads.
_MODELS = (
    Problem(64, 3, 49, 32, has_bias=True),  # windows of Swin
    Problem(4, 12, 197, 64),  # ViT
    Problem(1, 8, 512, 64, has_bias=True),  # T5
    Problem(8, 12, 1, 64, S=197),  # one query of cross attention
    Problem(1, 32, 1, 128, S=4096, K=4),  # decoding, grouped
    Problem(1, 32, 1, 128, S=4096, K=1),  # decoding, one kv head
    Problem(1, 8, 32, 64, S=4096),  # latents of Perceiver
    Problem(64, 8, 64, 32),  # an axis of an image
    Problem(32, 4, 128, 32, has_bias=True),  # pairs of residues
    Problem(1, 16, 1, 576, S=2048, K=1, V=512),  # decoding, latent keys and values
    Problem(1, 4, 256, 576, V=512),
    Problem(1, 4, 512, 256),
    *(Problem(1, 8, T, 64) for T in (1, 8, 16, 32, 64, 128, 256, 512)),
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
    "models": _MODELS,
    "growth": tuple(Problem(1, 1, 2**n, 64, direction=d) for d in ("forward", "both")
                    for n in range(8, 16)),
}  # fmt: skip
