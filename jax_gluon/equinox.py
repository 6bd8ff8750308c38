"""Equinox's multi-head attention, computed by this package.

A module of the same constructor, fields, parameters and call as `equinox.nn.MultiheadAttention`, so
that checkpoints load from one into the other; and `convert`, which puts it into a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from jax_gluon._arguments import Implementation, check_names, window_of
from jax_gluon._attention import dot_product_attention
from jax_gluon._block_mask import BlockMask
from jax_gluon._derivative_modes import DIFFERENTIATIONS, Differentiation
from jax_gluon._errors import Checker
from jax_gluon._frameworks import OF_A_CALL, framework
from jax_gluon._kernels import KernelWishes
from jax_gluon._quantization.formats import AttentionQuantization, Preset
from jax_gluon._typing import Array, Bool, Float, Key, UInt32

_eqx = framework("equinox", "equinox")

_CHECK = Checker("equinox.MultiheadAttention")
_Tree = TypeVar("_Tree")
_LENGTHS = {"query_seq_lengths", "key_value_seq_lengths"}
_DEFAULTS: dict[str, Any] = dict(
    is_causal=False, local_window_size=None, scale=None, logits_soft_cap=None, quantization=None,
    implementation=None, kernel=None, differentiation=None,
)  # fmt: skip


def _static() -> Any:
    return _eqx.field(static=True)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options, hashable; raises for those that no call takes."""
    check_names(_CHECK, options["quantization"], options["implementation"], options["kernel"])
    _CHECK.name("differentiation", options["differentiation"], DIFFERENTIATIONS)
    _CHECK.flag("is_causal", options["is_causal"])
    window_of(_CHECK, options["local_window_size"], None)
    if isinstance(options["local_window_size"], list):
        window = cast(list[int], options["local_window_size"])
        return options | dict(local_window_size=tuple(window))
    return options


def _projected(linear: Any, x: jax.Array, heads: int) -> jax.Array:
    return jax.vmap(linear)(x).reshape(x.shape[0], heads, -1)


class MultiheadAttention(_eqx.nn.MultiheadAttention):
    """`equinox.nn.MultiheadAttention` with this package's attention.

    **Arguments:** those of `equinox.nn.MultiheadAttention`, whose fields and parameters it has;
    checkpoints of `equinox.tree_serialise_leaves` load from one into the other. And, by keyword:

    - `is_causal`, `local_window_size`, `scale`, `logits_soft_cap`, `quantization`,
      `implementation`, `kernel`, `differentiation`: as `jax_gluon.dot_product_attention`, for every
      call. They are static fields.
    - `num_kv_heads`: K, a divisor of `num_heads`; default `num_heads`. Key and value are projected
      to so many heads.
    - `sinks`: whether there is a trainable sink for each head, 0 at first. It is one more leaf, the
      last.

    It is called as Equinox's, for one sequence, and batched by `jax.vmap`: `module(query, key_,
    value, mask=None, *, key=None, inference=None, process_heads=None)`, with a mask of shape
    `[T, S]` or `[N, T, S]`, or a `BlockMask`. By keyword a call may also have `bias`,
    `key_value_mask`, lengths, segments, positions and `query_offset`, as `dot_product_attention`
    without a batch.

    Dropout is that of `jax_gluon.dropout_mask`: of Equinox's rate, by other bits of the same key. A
    row that sees no key gives 0, where Equinox gives the mean of all values. Operands are promoted
    to one dtype; sums are float32.

    **Raises:** `ValueError` or `TypeError` for options that no call takes, when it is made; for
    what `jax_gluon.dot_product_attention` refuses, when it is called; `RuntimeError` where dropout
    has no key.

    >>> import jax, jax.numpy as jnp, jax_gluon.equinox
    >>> module = jax_gluon.equinox.MultiheadAttention(
    ...     4, 64, is_causal=True, quantization="int8", key=jax.random.key(0)
    ... )
    >>> x = jnp.ones((2, 32, 64))
    >>> jax.vmap(module)(x, x, x).shape
    (2, 32, 64)
    """

    sinks: Float[Array, " N"] | None
    num_kv_heads: int = _static()
    is_causal: bool = _static()
    local_window_size: int | tuple[int, int] | None = _static()
    scale: float | None = _static()
    logits_soft_cap: float | None = _static()
    quantization: Preset | AttentionQuantization | None = _static()
    implementation: Implementation | None = _static()
    kernel: KernelWishes = _static()
    differentiation: Differentiation | None = _static()

    def __init__(
        self,
        *arguments: Any,
        num_kv_heads: int | None = None,
        sinks: bool = False,
        key: Key[Array, ""] | UInt32[Array, " words"],
        **keywords: Any,
    ) -> None:
        options = _checked({name: keywords.pop(name, _DEFAULTS[name]) for name in _DEFAULTS})
        super().__init__(*arguments, key=key, **keywords)
        for name, option in options.items():
            setattr(self, name, option)
        heads: int = self.num_heads
        self.num_kv_heads = heads if num_kv_heads is None else num_kv_heads
        K = _CHECK.integer("num_kv_heads", self.num_kv_heads, 1, f"a divisor of {heads}")
        if heads % K:
            _CHECK.value_error("num_kv_heads", f"{K}", f"a divisor of num_heads, {heads}")
        if heads != K:
            keys = jax.random.split(key, 4)  # as Equinox draws its four projections
            for name, width, use_bias, each in (
                ("key_proj", self.qk_size, self.use_key_bias, keys[1]),
                ("value_proj", self.vo_size, self.use_value_bias, keys[2]),
            ):
                old: Any = getattr(self, name)
                linear = _eqx.nn.Linear(
                    old.in_features, K * width, use_bias, dtype=old.weight.dtype, key=each
                )
                setattr(self, name, linear)
        dtype = self.query_proj.weight.dtype
        self.sinks = jnp.zeros((heads,), dtype) if _CHECK.flag("sinks", sinks) else None

    def __call__(
        self,
        query: Float[Array, "T query_size"],
        key_: Float[Array, "S key_size"],
        value: Float[Array, "S value_size"],
        mask: Bool[Array, "T S"] | Bool[Array, "N T S"] | BlockMask | None = None,
        *,
        key: Key[Array, ""] | UInt32[Array, " words"] | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Callable[..., Any] | None = None,
        **keywords: Any,
    ) -> Float[Array, "T output_size"]:
        """Attention of one sequence; the class says the rest."""
        _CHECK.keywords(keywords, OF_A_CALL)
        if deterministic is not None:
            warnings.warn("deterministic is Equinox's older name of inference", stacklevel=2)
            inference = deterministic
        heads = [
            _projected(self.query_proj, query, self.num_heads),
            _projected(self.key_proj, key_, self.num_kv_heads),
            _projected(self.value_proj, value, self.num_kv_heads),
        ]
        if process_heads is not None:
            processed = tuple(process_heads(*heads))
            found, expected = ([x.shape for x in each] for each in (processed, heads))
            if found != expected:
                _CHECK.value_error("process_heads", f"to shapes {found}", f"{expected}, as before")
            heads = list(processed)
        attention: Any = dot_product_attention
        for name in _LENGTHS.intersection(keywords):  # of one sequence
            keywords[name] = jnp.reshape(jnp.asarray(keywords[name]), (1,))
        dtype = jnp.result_type(*heads)
        q, k, v = (x.astype(dtype) for x in heads)
        is_off = self.dropout.inference if inference is None else inference
        rate = 0.0 if is_off else float(self.dropout.p)
        if rate and key is None:
            raise RuntimeError(_CHECK.text("key", "None with dropout", "a key, or inference=True"))
        out: Array = attention(
            q,
            k,
            v,
            mask=mask,
            dropout_rate=rate,
            dropout_rng=key if rate else None,
            sinks=self.sinks,
            **{name: getattr(self, name) for name in _DEFAULTS},
            **keywords,
        )
        return jax.vmap(self.output_proj)(out.reshape(out.shape[0], -1))


def convert(model: _Tree, **options: Any) -> _Tree:
    """The model with each `equinox.nn.MultiheadAttention` in it replaced by ours.

    Parameters are shared, and modules of Equinox's own class alone are replaced: what a subclass
    computes is its own affair. Of ours the options are changed.

    **Arguments:** `model`: any pytree; `options`: the static fields of `MultiheadAttention`, those
    not named as their defaults.

    **Raises:** `TypeError` or `ValueError` for other options, and for those that no call takes.

    >>> import equinox, jax, jax_gluon.equinox
    >>> block = [equinox.nn.MultiheadAttention(4, 64, key=jax.random.key(0)), equinox.nn.Identity()]
    >>> jax_gluon.equinox.convert(block, quantization="int8")[0].quantization
    'int8'
    """
    check = Checker("equinox.convert")
    check.keywords(options, tuple(_DEFAULTS))
    static = _checked(_DEFAULTS | options)

    def is_attention(x: Any) -> bool:
        return type(x) in (_eqx.nn.MultiheadAttention, MultiheadAttention)

    def converted(x: Any) -> Any:
        if not is_attention(x):
            return x
        fields = cast(dict[str, Any], vars(x))
        missing: dict[str, Any] = dict(sinks=None, num_kv_heads=fields["num_heads"])
        new: Any = object.__new__(MultiheadAttention)
        for name, value in (missing | fields | static).items():
            object.__setattr__(new, name, value)
        return new

    return cast(_Tree, jax.tree.map(converted, model, is_leaf=is_attention))
