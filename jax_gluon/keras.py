"""Keras 3's multi-head and grouped-query attention layers, computed by this package.

The layers are Keras's own with `_compute_attention` replaced, which Keras documents for that:
constructor, weights, call, masks and checkpoints are theirs, and a model trains by `fit` as before.
Keras must run on JAX (the environment variable `KERAS_BACKEND=jax`, set before it is imported). A
model that can't be edited is run by `jax_gluon.patch` instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp

from jax_gluon._arguments import Implementation, check_names
from jax_gluon._attention import dot_product_attention
from jax_gluon._errors import Checker
from jax_gluon._frameworks import framework
from jax_gluon._quantization.formats import AttentionQuantization, Preset, QuantSpec
from jax_gluon._typing import Array, Bool, Float

_keras = framework("keras", "keras", " and KERAS_BACKEND=jax in the environment")

if (_backend := _keras.backend.backend()) != "jax":
    raise ImportError(
        f'jax_gluon.keras: the backend of Keras is "{_backend}"; allowed: "jax", by the variable '
        "KERAS_BACKEND in the environment before Keras is imported."
    )

_layers: Any = _keras.layers
_register: Any = _keras.saving.register_keras_serializable


@dataclasses.dataclass(frozen=True)
class _Visibility:
    """What Keras makes a mask `[B, T, S]` of, kept apart: blocks that nobody sees are skipped."""

    rows: Bool[Array, "B T"] | None
    keys: Bool[Array, "B S"] | None
    mask: Bool[Array, "B T S"] | Bool[Array, "B N T S"] | None
    is_causal: bool
    as_mask: Callable[[], Any]


class _Attention:
    """What both layers have in common; a base before Keras's own."""

    _repeats = 1  # as often Keras repeats heads of key and value before the attention

    def __init__(
        self,
        *arguments: Any,
        quantization: Preset | AttentionQuantization | None = None,
        implementation: Implementation | None = None,
        logits_soft_cap: float | None = None,
        **keywords: Any,
    ) -> None:
        check = Checker(f"keras.{type(self).__qualname__}")
        quantization = _from_config(quantization)
        check_names(check, quantization, implementation, None)
        super().__init__(*arguments, **keywords)
        self._gluon_options: Any = dict(
            quantization=quantization, implementation=implementation,
            logits_soft_cap=logits_soft_cap,
        )  # fmt: skip

    def get_config(self) -> dict[str, Any]:
        """Keras's configuration and ours, of plain values."""
        options = dict(self._gluon_options)
        if isinstance(options["quantization"], AttentionQuantization):
            options["quantization"] = dataclasses.asdict(options["quantization"])
        layer: Any = super()
        return layer.get_config() | options

    def _compute_attention_mask(
        self,
        query: Any,
        value: Any,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        use_causal_mask: bool = False,
    ) -> _Visibility:
        masks: Any = dict(
            query_mask=query_mask, value_mask=value_mask, key_mask=key_mask,
            attention_mask=attention_mask, use_causal_mask=use_causal_mask,
        )  # fmt: skip
        layer: Any = super()
        keys = [jnp.asarray(x, bool) for x in (value_mask, key_mask) if x is not None]
        return _Visibility(
            rows=None if query_mask is None else jnp.asarray(query_mask, bool),
            keys=keys[0] & keys[-1] if keys else None,
            mask=None if attention_mask is None else jnp.asarray(attention_mask, bool),
            is_causal=use_causal_mask,
            as_mask=lambda: layer._compute_attention_mask(query, value, **masks),
        )

    def _compute_attention(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N V"],
        attention_mask: _Visibility,
        training: bool | None = None,
        return_attention_scores: bool = False,
    ) -> tuple[Float[Array, "B T N V"], Any]:
        returns_scores = return_attention_scores or getattr(self, "_return_attention_scores", False)
        if returns_scores or jnp.ndim(query) != 4:
            # The probabilities are never formed here, and there is one axis of tokens.
            layer: Any = super()
            scores = {"return_attention_scores": True} if return_attention_scores else {}
            mask = attention_mask.as_mask()
            return layer._compute_attention(query, key, value, mask, training, **scores)
        layer = self
        # Layers of Keras name their own fields in two ways.
        rate = layer.dropout if training else 0.0
        window = getattr(layer, "sliding_window", getattr(layer, "_sliding_window", None))
        mask = attention_mask.mask
        out = dot_product_attention(
            query,
            key[:, :, :: self._repeats],
            value[:, :, :: self._repeats],
            mask=mask[:, None] if mask is not None and mask.ndim == 3 else mask,
            key_value_mask=attention_mask.keys,
            is_causal=attention_mask.is_causal,
            local_window_size=None if window is None else window - 1,
            dropout_rate=rate,
            dropout_rng=layer._dropout_layer.seed_generator.next() if rate else None,
            quantization=self._gluon_options["quantization"],
            implementation=self._gluon_options["implementation"],
            logits_soft_cap=self._gluon_options["logits_soft_cap"],
        )
        rows = attention_mask.rows
        if rows is not None:
            out = jnp.where(rows[:, :, None, None], out, jnp.zeros((), out.dtype))
        return out, None


def _from_config(quantization: Any) -> Any:
    """The argument, or what `get_config` made of it."""
    if not isinstance(quantization, dict):
        return quantization
    specs = cast(dict[str, Any], quantization)
    made = {name: spec and QuantSpec(**spec) for name, spec in specs.items()}
    return AttentionQuantization(**made)


@_register(package="jax_gluon")
class MultiHeadAttention(_Attention, _layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with this package's attention, dropout included.

    **Arguments:** those of `keras.layers.MultiHeadAttention`, whose weights it has, and

    - `quantization`, `implementation`, `logits_soft_cap`: as `jax_gluon.dot_product_attention`.

    Causal masks, padding masks of the keys and `sliding_window` skip what they hide; a row that
    sees no key gives 0. With `return_attention_scores` and with more than one attention axis Keras
    computes, without these options.

    **Raises:** `ValueError` or `TypeError` for options that no call takes, when it is made; for
    what `jax_gluon.dot_product_attention` refuses, when it is called.

    >>> import os; os.environ["KERAS_BACKEND"] = "jax"
    >>> import numpy as np, jax_gluon.keras
    >>> layer = jax_gluon.keras.MultiHeadAttention(4, 16, quantization="int8")
    >>> x = np.ones((2, 32, 64), np.float32)
    >>> layer(x, x, use_causal_mask=True).shape
    (2, 32, 64)
    """


@_register(package="jax_gluon", name="GroupQueryAttention")
class GroupQueryAttention(_Attention, _layers.GroupQueryAttention):
    """`keras.layers.GroupQueryAttention` with this package's attention, dropout included.

    Heads of key and value are read as few as they are.

    **Arguments:** those of `keras.layers.GroupQueryAttention`, and those of `MultiHeadAttention`
    here, which says the rest.

    >>> import os; os.environ["KERAS_BACKEND"] = "jax"
    >>> import numpy as np, jax_gluon.keras
    >>> layer = jax_gluon.keras.GroupQueryAttention(16, 8, 2)
    >>> x = np.ones((2, 32, 64), np.float32)
    >>> layer(x, x, use_causal_mask=True).shape
    (2, 32, 64)
    """

    @property
    def _repeats(self) -> int:
        return self.num_repeats


# By this name Keras finds the weights in a checkpoint, and it is not the name that Keras exports.
GroupQueryAttention.__name__ = _layers.GroupQueryAttention.__name__
