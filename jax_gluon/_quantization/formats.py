"""What quantized operands look like: `QuantSpec`, `AttentionQuantization` and `QuantizedTensor`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_gluon._errors import Checker
from jax_gluon._meshes import on_meshes
from jax_gluon._quantization.codes import (
    POWERS_IN_CELL,
    from_bits,
    spread,
    token_factors,
    unpack,
    unrotated,
)
from jax_gluon._typing import Array, Float, Float32, Int8, UInt8, UInt16

Preset = Literal["int8", "int4"]
Granularity = Literal["tensor", "head", "row", "block", "group", "channel", "channel_block"]

GRANULARITIES: tuple[Granularity, ...] = (
    "tensor", "head", "row", "block", "group", "channel", "channel_block",
)  # fmt: skip

#: Tokens that the center of a head and channel is taken from: the first that can be seen.
CENTER_TOKENS = 32

#: Granularities with a scale for every block of tokens, and with more than one scale in a row.
_TOKEN_BLOCKS = ("block", "channel_block")
_BLOCKS = (*_TOKEN_BLOCKS, "group")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one operand `[..., T, N, H]` becomes integer codes.

    An element is `(code - zero_point) * scale`, or `code * scale + minimum`, rounded half to even.

    **Arguments:**

    - `bits`: 8, or 4 (two codes a byte, low nibble first, biased by 8; H must be even).
    - `symmetric`: codes in `[-127, 127]` (4 bits: `[-7, 7]`) around 0. False: all 256 (16) codes,
      with an integer zero point, or with `float_minimum`.
    - `granularity`: what shares a scale. `"tensor"`; `"head"`; `"row"`, one token of one head;
      `"block"`, `block_size` tokens of one head; `"group"`, `block_size` elements of a row;
      `"channel"`, one element of a head over all tokens; `"channel_block"`, that over `block_size`
      tokens. The last block or group may be short.
    - `block_size`: at least 1; read by block, group and channel_block only.
    - `center`: first subtract the center of each head and channel, kept in float32 as `center`: the
      lower median of the finite values of the first 32 tokens that can be seen. Softmax does not
      see what all keys share; no later token moves it.
    - `rotate`: first a randomised Hadamard rotation along H (in blocks of the largest power of two
      that divides H), which spreads outliers. `dequantize` undoes it.
    - `float_minimum`: keep each block's smallest element in place of a zero point; needs
      `symmetric=False`.
    - `token_powers`: divide a token that is 4 times an ordinary one or more by a power of 4 first,
      so that it does not widen the scales of the tokens that share them with it. Its size is the
      norm of its centered row; ordinary is the lower median of the tokens that the center is taken
      from. Powers are 4 to 4^7; `scale` keeps them. Needs granularity channel_block and `center`.

    Scales and minima are float32; those of block, group and channel_block bfloat16, with codes
    computed from the rounded values.

    **Raises:** `ValueError` or `TypeError` that names the field, what was found and is allowed.

    >>> import jax_gluon
    >>> jax_gluon.QuantSpec(bits=4, symmetric=False, granularity="group", float_minimum=True).bits
    4
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "row"
    block_size: int = 32
    center: bool = False
    rotate: bool = False
    float_minimum: bool = False
    token_powers: bool = False

    def __post_init__(self) -> None:
        for name in ("symmetric", "center", "rotate", "float_minimum", "token_powers"):
            if not isinstance(getattr(self, name), bool):
                self._raise(TypeError, name, "True or False")
        for name, allowed in (("bits", "4 or 8"), ("block_size", "an int of at least 1")):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                self._raise(TypeError, name, allowed)
        if self.bits not in (4, 8):
            self._raise(ValueError, "bits", "4 or 8")
        if self.block_size < 1:
            self._raise(ValueError, "block_size", "an int of at least 1")
        if self.granularity not in GRANULARITIES:
            self._raise(ValueError, "granularity", ", ".join(GRANULARITIES))
        if self.symmetric and self.float_minimum:
            self._raise(ValueError, "float_minimum", "False where symmetric is True")
        if self.token_powers and not (self.center and self.granularity == "channel_block"):
            allowed = "False unless granularity is channel_block and center is True"
            self._raise(ValueError, "token_powers", allowed)

    def _raise(self, error: type[Exception], field: str, allowed: str) -> NoReturn:
        raise error(Checker("QuantSpec").text(field, f"{getattr(self, field)!r}", allowed))

    @property
    def token_block(self) -> int:
        """Tokens that share a scale; 0 where all do."""
        if self.granularity in _TOKEN_BLOCKS:
            return self.block_size
        return 1 if self.granularity in ("row", "group") else 0

    @property
    def head_block(self) -> int:
        """Elements of a row that share a scale; 0 where all do."""
        if self.granularity == "group":
            return self.block_size
        return 1 if self.granularity in ("channel", "channel_block") else 0

    @property
    def scale_dtype(self) -> Any:
        """Of scales and minima."""
        return jnp.bfloat16 if self.granularity in _BLOCKS else jnp.float32

    @property
    def code_range(self) -> tuple[int, int]:
        """Least and largest code, before 4-bit codes are biased for storage."""
        half = 1 << (self.bits - 1)
        return (1 - half if self.symmetric else -half), half - 1

    @property
    def power_cells(self) -> int:
        """Numbers that keep the powers of a block's tokens."""
        return -(-self.block_size // POWERS_IN_CELL) if self.token_powers else 0

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of an operand of `shape`, and of the powers that follow them."""
        *blocks, scales = self.block_shape(shape)
        return (*blocks, scales + self.power_cells)

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of an entry for each block of an operand of `shape` `[..., T, N, H]`."""
        *leading, T, N, H = shape
        heads = 1 if self.granularity == "tensor" else N
        return (*leading, _blocks(T, self.token_block), heads, _blocks(H, self.head_block))


def _blocks(extent: int, size: int) -> int:
    return 1 if size == 0 else -(-extent // size)


@dataclasses.dataclass(frozen=True)
class AttentionQuantization:
    """A `QuantSpec` for each operand of attention; None leaves it in float.

    Where an operand stays in float, the query is centered, or INT8 scales vary along H, products
    are those of the dequantized operands in float32; else of integers.

    >>> import jax_gluon
    >>> jax_gluon.AttentionQuantization(key=jax_gluon.QuantSpec(center=True)).key.center
    True
    """

    query: QuantSpec | None = None
    key: QuantSpec | None = None
    value: QuantSpec | None = None

    def __post_init__(self) -> None:
        for name in ("query", "key", "value"):
            spec = getattr(self, name)
            if spec is not None and not isinstance(spec, QuantSpec):
                found = f"a {type(spec).__name__}"
                Checker("AttentionQuantization").type_error(name, found, "None or a QuantSpec")


_INDEX = Checker("QuantizedTensor")
_MINIMUM = {"symmetric": False, "float_minimum": True}

#: The recipes that a string names; the documentation has the measurements that chose them.
PRESETS: dict[Preset, AttentionQuantization] = {
    "int8": AttentionQuantization(QuantSpec(), QuantSpec(center=True), QuantSpec()),
    "int4": AttentionQuantization(
        QuantSpec(),
        QuantSpec(bits=4, granularity="channel_block", center=True, token_powers=True, **_MINIMUM),
        QuantSpec(bits=4, granularity="group", block_size=24, **_MINIMUM),
    ),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale", "zero_point", "minimum", "center"),
    meta_fields=("spec", "dtype", "head_dim"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """Integer codes that stand for a float array `[..., T, N, H]`; made by `jax_gluon.quantize`.

    A pytree: its arrays keep the leading axes, so `jit`, `vmap`, `scan`, donation, sharding and
    checkpointing treat it as they treat an array. Attention's gradient through one is zero.

    - `data`: int8 `[..., T, N, H]`, or uint8 `[..., T, N, H // 2]` for 4 bits.
    - `scale`: `[..., t, n, h]`, an entry for each block that shares one (`spec.block_shape`).
      With `spec.token_powers`, the powers of the block's tokens follow along h, five in the bits
      of a number. In a cache, bfloat16 scales and minima are their bits, uint16.
    - `zero_point`: int8, or `minimum`: `[..., t, n, h]`; whichever the spec asks for.
    - `center`: float32 `[..., 1, N, H]`, with `spec.center` (of the rotated array, with
      `spec.rotate`).
    - `spec`; `dtype` of the float array; `head_dim`, H.

    `==` is identity. `np.asarray` gives the dequantized values; functions of `jax.numpy` raise
    `TypeError`, so that nothing is dequantized unseen in a program.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> x = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
    >>> quantized = jax_gluon.quantize(x, jax_gluon.QuantSpec())
    >>> quantized.shape, quantized.nbytes, quantized[:, 32:64].shape
    ((2, 128, 8, 64), 139264, (2, 32, 8, 64))
    """

    data: Int8[Array, "*B T N H"] | UInt8[Array, "*B T N half_H"]
    scale: Float[Array, "*B t n scales"] | UInt16[Array, "*B t n scales"]
    zero_point: Int8[Array, "*B t n h"] | None
    minimum: Float[Array, "*B t n h"] | UInt16[Array, "*B t n h"] | None
    center: Float32[Array, "*B 1 N H"] | None
    spec: QuantSpec
    dtype: np.dtype[Any]
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that the codes stand for."""
        return (*self.data.shape[:-1], self.head_dim)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.data.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and whatever goes with them."""
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in self._parts())

    def __repr__(self) -> str:
        return f"QuantizedTensor(shape={self.shape}, dtype={self.dtype}, spec={self.spec})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            Checker("QuantizedTensor.__array__").value_error(
                "copy", "False", "None, True: values are computed from the codes"
            )
        return np.asarray(self.dequantize(), dtype)

    def __jax_array__(self) -> jax.Array:
        raise TypeError(
            "jax_gluon.QuantizedTensor: an array is needed here, found codes; allowed: the values "
            "of `.dequantize()`, or a function of jax_gluon that takes codes."
        )

    def _parts(self) -> list[jax.Array]:
        return jax.tree.leaves(self)

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "*B T N H"]:
        """The float array, of `dtype` or that of the array that was quantized."""
        return on_meshes(
            _dequantize, (np.dtype(self.dtype if dtype is None else dtype),), self.data, self
        )

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """A part along leading axes (ints or slices) and tokens (slices of whole blocks)."""
        leading = self.ndim - 3
        parts: list[Any] = list(cast(Any, index)) if isinstance(index, tuple) else [index]
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (self.ndim + 1 - len(parts))
        index = (*parts, *(slice(None),) * (self.ndim - len(parts)))
        if len(index) > self.ndim or any(x != slice(None) for x in index[leading + 1 :]):
            raise IndexError(
                _INDEX.text("index", f"{index!r}", "ints and slices of leading axes and tokens")
            )
        tokens = self._token_blocks(index[leading])

        def part(x: jax.Array | None) -> jax.Array | None:
            if x is None:
                return None
            along = tokens if x.shape[leading] != 1 or self.spec.token_block else slice(None)
            return x[(*index[:leading], along)]

        center = None if self.center is None else self.center[index[:leading]]
        return dataclasses.replace(
            self, data=self.data[index], center=center,
            scale=part(self.scale), zero_point=part(self.zero_point), minimum=part(self.minimum),
        )  # fmt: skip

    def _token_blocks(self, tokens: Any) -> slice:
        """The slice of the scales that belongs to a slice of the tokens."""
        T, block = self.shape[-3], self.spec.token_block
        if not isinstance(tokens, slice) or tokens.step not in (None, 1):
            raise IndexError(_INDEX.text("index of tokens", f"{tokens!r}", "a slice of step 1"))
        if block == 0:
            return slice(None)
        start, stop, _ = tokens.indices(T)
        if start % block or (stop % block and stop < T):
            raise IndexError(
                _INDEX.text(
                    "index of tokens",
                    f"{start} to {stop} of {T}",
                    f"whole blocks of {block} tokens, which share scales",
                )
            )
        return slice(start // block, max(start // block, _blocks(stop, block)))


#: What attention takes as query, key or value.
Operand = ArrayLike | QuantizedTensor


def _dequantize(dtype: np.dtype[Any], x: QuantizedTensor) -> jax.Array:
    wide = np.promote_types(np.float32, dtype)
    restored = dequantize_rotated(x, wide)
    if x.spec.rotate:
        restored = unrotated(restored)
    return restored.astype(dtype)


def check_parts(x: QuantizedTensor) -> str | None:
    """What is wrong with the arrays of `x`, or None."""
    spec, shape = x.spec, x.shape
    width = x.head_dim // 2 if spec.bits == 4 else x.head_dim
    code = np.dtype(np.uint8 if spec.bits == 4 else np.int8)
    blocks = spec.block_shape(shape)
    needed = {
        "data": ((*shape[:-1], width), code),
        "scale": (spec.scale_shape(shape), np.dtype(spec.scale_dtype)),
        "zero_point": (blocks, np.dtype(np.int8)) if _has_zero_point(spec) else None,
        "minimum": (blocks, np.dtype(spec.scale_dtype)) if spec.float_minimum else None,
        "center": ((*shape[:-3], 1, *shape[-2:]), np.dtype(np.float32)) if spec.center else None,
    }
    for name, expected in needed.items():
        part = getattr(x, name)
        if expected is None:
            if part is not None:
                return f"{name} is set; its spec {spec} has none"
        elif part is None:
            return f"{name} is missing"
        elif (tuple(part.shape), _float_dtype(part)) != expected:
            found = f"{part.dtype.name}{list(part.shape)}"
            return f"{name} is {found}, expected {expected[1].name}{list(expected[0])}"
    return None


def _float_dtype(part: Any) -> Any:
    """Its dtype, or what its bits stand for."""
    return np.dtype(jnp.bfloat16) if part.dtype == np.uint16 else part.dtype


def _has_zero_point(spec: QuantSpec) -> bool:
    return not spec.symmetric and not spec.float_minimum


def dequantize_rotated(x: QuantizedTensor, dtype: Any) -> jax.Array:
    """The array of `dtype` that the codes of `x` stand for, still rotated."""
    spec, shape = x.spec, x.shape

    def floats(cells: jax.Array) -> jax.Array:
        is_bits = cells.dtype == jnp.uint16
        return (from_bits(cells, spec.scale_dtype) if is_bits else cells).astype(dtype)

    scales = spec.block_shape(shape)[-1]
    scale = spread(floats(x.scale[..., :scales]), spec, shape)
    codes = unpack(x.data).astype(dtype) if spec.bits == 4 else x.data.astype(dtype)
    if x.minimum is not None:
        # Halves: the steps may be more than the largest float although their sum is not.
        half = jnp.asarray(0.5, dtype)
        steps = codes - jnp.asarray(spec.code_range[0], dtype)
        minimum = spread(floats(x.minimum), spec, shape)
        restored = (steps * (scale * half) + minimum * half) * jnp.asarray(2, dtype)
    elif x.zero_point is not None:
        zero = spread(x.zero_point.astype(dtype), spec, shape)
        restored = (codes - zero) * scale
    else:
        restored = codes * scale
    if spec.token_powers:
        restored = restored * token_factors(x.scale[..., scales:], spec, shape[-3]).astype(dtype)
    # A rounded scale, zero point or minimum may take the last step past the largest float, and so
    # may the center.
    largest = float(np.finfo(np.float32).max)
    restored = jnp.clip(restored, -largest, largest)
    if x.center is None:
        return restored
    return jnp.clip(restored + x.center.astype(dtype), -largest, largest)


def preset(quantization: Preset | AttentionQuantization | None) -> AttentionQuantization | None:
    """The recipe that the `quantization` argument stands for: None, a preset's name or itself."""
    return PRESETS[quantization] if isinstance(quantization, str) else quantization
