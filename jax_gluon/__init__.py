"""Quantized flash attention that trains, in JAX, on every CPU."""

from jax_gluon import _requirements  # isort: skip
from jax_gluon import _native, debug, reference
from jax_gluon._attention import (
    Plan,
    attention_with_log_sum_exp,
    dot_product_attention,
    explain,
)
from jax_gluon._block_mask import BlockMask, block_mask
from jax_gluon._caches.dense import QuantizedKVCache
from jax_gluon._caches.paged import PagedKVCache
from jax_gluon._context_parallel.attention import ring_attention
from jax_gluon._context_parallel.choice import ContextPlan
from jax_gluon._context_parallel.token_layouts import reorder_tokens, restore_tokens
from jax_gluon._context_parallel.whole import (
    context_parallel_attention,
    explain_context_parallel,
)
from jax_gluon._derivative_modes import default_differentiation
from jax_gluon._dropout import dropout_mask
from jax_gluon._export import export_checks
from jax_gluon._kernels import CpuKernel, MetalKernel
from jax_gluon._lowering import CHECKPOINT_NAMES
from jax_gluon._patch import Patch, PatchedCall, patch
from jax_gluon._pinning import Pin, pin
from jax_gluon._quantization.formats import AttentionQuantization, QuantizedTensor, QuantSpec
from jax_gluon._quantize import quantize
from jax_gluon._version import __version__ as __version__

__all__ = [
    "CHECKPOINT_NAMES",
    "AttentionQuantization",
    "BlockMask",
    "ContextPlan",
    "CpuKernel",
    "MetalKernel",
    "PagedKVCache",
    "Patch",
    "PatchedCall",
    "Pin",
    "Plan",
    "QuantSpec",
    "QuantizedKVCache",
    "QuantizedTensor",
    "attention_with_log_sum_exp",
    "block_mask",
    "context_parallel_attention",
    "debug",
    "default_differentiation",
    "dot_product_attention",
    "dropout_mask",
    "explain",
    "explain_context_parallel",
    "export_checks",
    "patch",
    "pin",
    "quantize",
    "reference",
    "reorder_tokens",
    "restore_tokens",
    "ring_attention",
]

del _requirements
_native.register()
