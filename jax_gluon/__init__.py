"""Quantized flash attention that trains, in JAX, on every CPU."""

from jax_gluon import debug, reference
from jax_gluon import lowering as _lowering
from jax_gluon.attention import (
    Plan,
    attention_with_log_sum_exp,
    dot_product_attention,
    explain,
)
from jax_gluon.formats import AttentionQuantization, QuantizedTensor, QuantSpec
from jax_gluon.kv_cache import QuantizedKVCache
from jax_gluon.lowering import CHECKPOINT_NAMES
from jax_gluon.pinning import Pin, pin
from jax_gluon.quantization import quantize
from jax_gluon.selection import KernelConfig

__all__ = [
    "CHECKPOINT_NAMES",
    "AttentionQuantization",
    "KernelConfig",
    "Pin",
    "Plan",
    "QuantSpec",
    "QuantizedKVCache",
    "QuantizedTensor",
    "attention_with_log_sum_exp",
    "debug",
    "dot_product_attention",
    "explain",
    "pin",
    "quantize",
    "reference",
]

_lowering.register()
