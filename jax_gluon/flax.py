"""Flax on jax-gluon: `attention_fn` for linen's and nnx's multi-head attention, serialization.

Importing this module registers `QuantizedTensor` and `QuantizedKVCache` with `flax.serialization`:
`to_state_dict`, `to_bytes` and their inverses then keep every bit. The target of a restore must be
of the same format and shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jax_gluon._arguments import Implementation
from jax_gluon._attention import dot_product_attention
from jax_gluon._block_mask import BlockMask
from jax_gluon._caches.dense import QuantizedKVCache
from jax_gluon._caches.paged import PagedKVCache
from jax_gluon._derivative_modes import Differentiation
from jax_gluon._errors import Checker
from jax_gluon._flax_calls import CallArguments
from jax_gluon._kernels import KernelWishes
from jax_gluon._quantization.formats import AttentionQuantization, Preset, QuantizedTensor
from jax_gluon._typing import Array, Float, Key, Num, Shaped, UInt32

_CHECK = Checker("flax.attention_fn")


def attention_fn(
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    quantization: Preset | AttentionQuantization | None = None,
    implementation: Implementation | None = None,
    kernel: KernelWishes = None,
    sinks: Float[ArrayLike, " N"] | Callable[[], Float[ArrayLike, " N"]] | None = None,
    differentiation: Differentiation | None = None,
) -> Callable[..., Float[Array, "*B T N V"]]:
    """An `attention_fn` for `flax.linen` and `flax.nnx` multi-head attention modules.

    The function takes `query [..., T, N, H]`, `key [..., S, K, H]` and `value [..., S, K, Hv]` with
    any number of batch axes, and the keywords that Flax passes. `N` may be a multiple of `K`: query
    head n reads kv head `n // (N // K)`. Arguments are promoted to `dtype` as in Flax; softmax and
    every sum are float32 whatever `precision` and `force_fp32_for_softmax` say. A row that sees no
    key gives 0, where Flax's own function gives the mean of all values. Dropout is that of
    `jax_gluon.dropout_mask`: of Flax's rate, with other bits than Flax draws from the same key.

    **Arguments:** as `jax_gluon.dot_product_attention`, and used in every call. Causal masking
    applies where `is_causal` is set here or in the call. `sinks` are an array, which is a constant
    and must not be traced; or a function that each call asks for them, as `lambda: sinks` where
    `sinks` is a parameter of the linen module that makes this function when it is called. They then
    take a gradient. A function must not close over an nnx module, of which nnx makes copies.

    **Returns:** the function, which is equal to others of equal options, hashable and picklable. It
    raises `ValueError` for causal masking or a window with one query over several keys: in
    `decode=True` Flax does not pass the query's position (its cache's mask is causal by itself),
    and `NotImplementedError` for what a fused kernel does not give: weights for `sow_weights`,
    replaced einsums.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import jax_gluon.flax
    >>> attention = nnx.MultiHeadAttention(
    ...     num_heads=4, in_features=64, decode=False, rngs=nnx.Rngs(0),
    ...     attention_fn=jax_gluon.flax.attention_fn(quantization="int8"),
    ... )
    >>> attention(jnp.ones((2, 16, 64)), is_causal=True).shape
    (2, 16, 64)
    """
    window: Any = local_window_size
    if isinstance(window, list):
        window = tuple(cast(list[int], window))
    return _AttentionFn(
        is_causal, window, scale, logits_soft_cap, quantization, implementation, kernel,
        _hashable(sinks), differentiation,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _AttentionFn:
    """What `attention_fn` makes: a value, so that equal options neither retrace nor differ."""

    is_causal: bool
    local_window_size: int | tuple[int, int] | None
    scale: float | None
    logits_soft_cap: float | None
    quantization: Preset | AttentionQuantization | None
    implementation: Implementation | None
    kernel: KernelWishes
    sinks: tuple[float, ...] | Callable[[], ArrayLike] | None
    differentiation: Differentiation | None

    # Linen passes only the keywords that it finds in the signature, by name: each is spelled out.
    def __call__(
        self,
        query: Num[Array, "*B T N H"],
        key: Num[Array, "*B S K H"],
        value: Num[Array, "*B S K V"],
        bias: Float[Array, "*#BNTS"] | None = None,
        mask: Shaped[Array, "*#BNTS"] | BlockMask | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Key[Array, ""] | UInt32[Array, " words"] | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., jax.Array] | None = None,
        qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
        attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "*B T N V"]:
        del precision, force_fp32_for_softmax
        call = mask if isinstance(mask, CallArguments) else CallArguments(mask, {})
        mask = call.mask
        if deterministic:
            dropout_rate = 0.0
        if module is not None:
            _CHECK.not_available(
                "sow_weights", "True", "False: the attention weights are never formed"
            )
        einsums = {
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
        }
        for name, einsum in einsums.items():
            if einsum is not None:
                _CHECK.not_available(
                    name, "set", "None: the products are fused and can't be replaced"
                )
        if promote_dtype is not None:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        else:
            common = _common_dtype(query, key, value) if dtype is None else jnp.dtype(dtype)
            query, key, value = (jnp.asarray(x, common) for x in (query, key, value))

        if mask is not None and not isinstance(mask, BlockMask):
            # Flax's make_*_mask functions give masks of any type: nonzero is visible.
            mask = jnp.asarray(mask, jnp.bool_)
        options: dict[str, Any] = dict(
            scale=self.scale,
            logits_soft_cap=self.logits_soft_cap,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng,
            broadcast_dropout=broadcast_dropout,
            implementation=self.implementation,
            kernel=self.kernel,
            sinks=_given(self.sinks),
            differentiation=self.differentiation,
        )
        of_call = {"bias": bias, "mask": mask, **call.keywords}
        if call.cache is not None:
            return call.decode(query, key, value, **(options | call.keywords))
        is_causal = is_causal or self.is_causal
        stands = {"query_offset", "query_positions"} & set(call.keywords)
        if query.ndim >= 3 and key.ndim >= 3 and not stands:
            self._check_positions(query.shape[-3], key.shape[-3], is_causal)
        attention: Any = dot_product_attention
        return attention(
            query,
            key,
            value,
            is_causal=is_causal,
            local_window_size=self.local_window_size,
            quantization=self.quantization,
            **(options | of_call),
        )

    def _check_positions(self, T: int, S: int, is_causal: bool) -> None:
        """A step of decoding passes one query, whose position only Flax's cache knows."""
        if T != 1 or S == 1:
            return
        where = f"for one query over {S} keys, whose position Flax does not pass (decode=True)"
        if is_causal:
            _CHECK.value_error(
                "is_causal", f"True {where}", "False: the mask of Flax's cache is causal"
            )
        if self.local_window_size is not None:
            found = f"{self.local_window_size} {where}"
            _CHECK.value_error("local_window_size", found, "None, with the window in the mask")


def is_attention_fn(check: Checker, function: Any) -> None:
    """Raises where a function is not of `attention_fn`."""
    if not isinstance(function, _AttentionFn):
        found = f"a {type(function).__name__}"
        check.type_error("attention_fn", found, "what jax_gluon.flax.attention_fn returns")


def _hashable(sinks: Any) -> tuple[float, ...] | Callable[[], ArrayLike] | None:
    if sinks is None or callable(sinks):
        return cast(Any, sinks)
    if isinstance(sinks, Tracer):
        _CHECK.type_error("sinks", "traced", "a function that returns it, or a concrete array")
    array = _CHECK.float_array("sinks", sinks)
    if array.ndim != 1:
        _CHECK.value_error("sinks", f"of shape {list(array.shape)}", "a logit for each query head")
    return tuple(np.asarray(array, np.float64).tolist())


def _given(sinks: tuple[float, ...] | Callable[[], ArrayLike] | None) -> ArrayLike | None:
    if callable(sinks):
        return sinks()
    # Rounded to float32 already, unless JAX is in x64 mode.
    return None if sinks is None else jnp.asarray(sinks, float)


def _common_dtype(*arrays: jax.Array) -> jnp.dtype[Any]:
    """The dtype that Flax promotes to: of integers, float32."""
    dtype = jnp.result_type(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.promote_types(jnp.float32, dtype)


# Beside the arrays of a state: the rest in words, which a restore compares.
_FORMAT = "format"
_PARTS: Any = (QuantizedTensor, jax.Array, np.ndarray, jax.ShapeDtypeStruct)


def _parts(x: Any) -> tuple[dict[str, Any], str]:
    """The fields of `x` that hold arrays, and what its other fields say."""
    fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, _PARTS)}
    rest = (f"{name}={value}" for name, value in fields.items() if name not in arrays)
    return arrays, ", ".join(rest)


def _register(serialization: Any, kind: type) -> None:
    check = Checker("flax")

    def to_state_dict(x: Any) -> dict[str, Any]:
        arrays, words = _parts(x)
        states = {name: serialization.to_state_dict(part) for name, part in arrays.items()}
        return {**states, _FORMAT: words}

    def from_state_dict(target: Any, state: dict[str, Any]) -> Any:
        arrays, words = _parts(target)
        if set(state) != {*arrays, _FORMAT} or state[_FORMAT] != words:
            check.value_error(
                f"the state of a {kind.__name__}",
                f"of {sorted(state)} and {state.get(_FORMAT)}",
                f"those of the target, {sorted(arrays)} and {words}",
            )
        restored: dict[str, Any] = {}
        for name, part in arrays.items():
            new = serialization.from_state_dict(part, state[name], name=name)
            if (new.shape, new.dtype) != (part.shape, part.dtype):
                check.value_error(
                    f"{name} in the state of a {kind.__name__}",
                    f"{new.dtype}{list(new.shape)}",
                    f"the target's, {part.dtype}{list(part.shape)}",
                )
            restored[name] = new if isinstance(new, QuantizedTensor) else jnp.asarray(new)
        return dataclasses.replace(target, **restored)

    serialization.register_serialization_state(kind, to_state_dict, from_state_dict, override=True)


# `attention_fn` itself does not need Flax.
with contextlib.suppress(ImportError):
    for _kind in (QuantizedTensor, QuantizedKVCache, PagedKVCache):
        _register(importlib.import_module("flax.serialization"), _kind)
