"""Quantized flash attention that trains, in JAX, on every CPU."""

from jax_gluon import lowering as _lowering
from jax_gluon import reference
from jax_gluon.attention import (
    Plan,
    attention_with_log_sum_exp,
    dot_product_attention,
    explain,
)

__all__ = [
    "Plan",
    "attention_with_log_sum_exp",
    "dot_product_attention",
    "explain",
    "reference",
]

_lowering.register()
