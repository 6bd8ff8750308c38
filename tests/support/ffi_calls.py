"""Calls of the XLA FFI handlers by `jax.ffi.ffi_call`, to be spoilt.

Python's own validation is out of the way.
"""

import copy
import dataclasses
import math

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.support.arrays import placed

pytest.importorskip("jax_gluon._plugin", reason="jax_gluon._plugin is not built")

B, T, S, N, K, H, V = 2, 5, 7, 4, 2, 8, 6
FORWARD = "jax_gluon.attention_forward"
BACKWARD = "jax_gluon.attention_backward"
BACKWARD_BIAS = "jax_gluon.attention_backward_bias"
TANGENT = "jax_gluon.attention_tangent"
QUANTIZE = "jax_gluon.quantize"


@dataclasses.dataclass
class Call:
    """A custom call in parts, to be spoilt: operands and results in order, by name."""

    target: str
    operands: dict[str, np.ndarray]
    results: dict[str, jax.ShapeDtypeStruct]
    attributes: dict[str, object]

    def run(self):
        call = jax.ffi.ffi_call(self.target, tuple(self.results.values()))
        operands = [placed(x) for x in self.operands.values()]
        return jax.block_until_ready(call(*operands, **self.attributes))

    def error(self):
        """The message of the error that the call must come back with."""
        # JAX raises a ValueError from its faster path, which it takes from a call's second run on.
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as error:
            self.run()
        message = str(error.value)
        assert message.startswith(f"INVALID_ARGUMENT: {self.target}: "), message
        return message


def draw(*shape, dtype=np.float32):
    rng = np.random.default_rng(math.prod(shape) + len(shape))
    if dtype == np.uint8:
        return rng.integers(0, 256, shape).astype(np.uint8)
    if dtype == np.int8:
        return rng.integers(-127, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(dtype)


def result(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Format:
    """How one operand is stored: bits 0 is float; block 0 is the whole axis.

    Codes that `is_made` are results of the forward call, which takes floats.
    """

    bits: int = 0
    token_block: int = 0
    head_block: int = 0
    offset: int = 0
    has_center: int = 0
    has_powers: int = 0
    is_made: int = 0
    per_tensor: int = 0

    def operands(self, name, shape):
        if self.bits == 0 or self.is_made:
            return {name: draw(*shape)}
        return self.codes(name, shape)

    def results(self, name, shape):
        if not self.is_made:
            return {}
        parts = {f"{name}_data" if x == name else x: y for x, y in self.codes(name, shape).items()}
        return {x: result(*y.shape, dtype=y.dtype) for x, y in parts.items()}

    def codes(self, name, shape):
        batch, tokens, heads, columns = shape
        packed = self.bits == 4
        scale = (
            batch,
            math.ceil(tokens / (self.token_block or tokens)),
            1 if self.per_tensor else heads,
            math.ceil(columns / (self.head_block or columns)),
        )
        stored = np.full(scale, 0.1 if packed else 0.01, np.float32)
        if self.has_powers:
            cells = np.full((*scale[:3], math.ceil(self.token_block / 5)), 2.0)
            stored = np.concatenate([stored, cells], axis=-1).astype(ml_dtypes.bfloat16)
        width = columns // 2 if packed else columns
        parts = {
            name: draw(batch, tokens, heads, width, dtype=np.uint8 if packed else np.int8),
            f"{name}_scale": stored,
        }
        if self.offset == 1:
            parts[f"{name}_zero_point"] = draw(*scale, dtype=np.int8) // 16
        if self.offset == 2:
            parts[f"{name}_minimum"] = np.full(scale, -0.75, np.float32)
        if self.has_center:
            parts[f"{name}_center"] = draw(batch, 1, heads, columns)
        return parts

    def attributes(self, name, target):
        fields = dataclasses.asdict(self)
        if target != FORWARD:
            del fields["is_made"], fields["per_tensor"]
        return {f"{name}_{field}": np.int64(x) for field, x in fields.items()}


ROW = Format(8, token_block=1)
FORMATS = {
    "float": (Format(), Format(), Format()),
    "int8": (ROW, Format(8, token_block=1, has_center=1), ROW),
    "int4": (Format(8, 2, offset=1), Format(4, 4, 1, 2, 1, 1), Format(4, 1, 4, 1, has_center=1)),
    "mixed": (Format(), Format(8, 0, 3, 2, 1), Format(8, 0, 1)),
    "made": (
        Format(8, 2, offset=1, has_center=1, is_made=1),
        Format(4, 4, 1, 2, is_made=1),
        Format(8, 1, has_center=1, is_made=1),
    ),
    "made_in_part": (Format(), Format(8, 0, is_made=1, per_tensor=1), ROW),
}


def attention(target, formats="float", *, full=True):
    """A consistent attention call; with `full` every optional operand is there."""
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, V)}
    operands, attributes = {}, {}
    for format_, (name, shape) in zip(FORMATS[formats], shapes.items(), strict=True):
        operands |= format_.operands(name, shape)
        attributes |= format_.attributes(name, target)
    if full:
        operands |= {
            "bias": draw(B, N, T, S),
            "mask": draw(B, 1, T, S) > -1.0,
            "query_seq_lengths": np.array([T, 3], np.int32),
            "key_value_seq_lengths": np.array([4, S], np.int32),
            "query_offset": np.array([2, -1], np.int32),
            "sinks": draw(B, N),
            "query_segment_ids": np.arange(B * T, dtype=np.int32).reshape(B, T) % 2,
            "key_value_segment_ids": np.arange(B * S, dtype=np.int32).reshape(B, S) % 2,
            "query_positions": draw(B, T, dtype=np.int8).astype(np.int32),
            "key_value_positions": draw(B, S, dtype=np.int8).astype(np.int32),
            "dropout_seeds": np.array([[7, 8, b, 3, 1, 5, 70] for b in range(B)], np.int32),
        }
    if target == FORWARD:
        attributes |= {f"has_{name}_visible": np.int64(full) for name in ("query", "key_value")}
        if full:
            operands |= {
                "query_visible": draw(B, T) > -1.0,
                "key_value_visible": draw(B, S) > -1.0,
            }
    attributes |= {
        "device": np.int64(0),
        "cpu_kernel": "baseline",
        "cpu_block_k": np.int64(192),
        "cpu_subtile": np.int64(0),
        "cpu_stages": np.int64(0),
        "metal_kernel": "baseline",
        "metal_min_products": np.int64(-1),
        "scale": np.float32(0.5),
        "soft_cap": np.float32(0.0),
        "head_major": np.int64(0),
        "causal": np.int64(0),
        "window_left": np.int64(-1),
        "window_right": np.int64(-1),
        "has_bias": np.int64(full),
        "has_mask": np.int64(full),
        "mask_block": np.int64(0),
        "has_query_seq_lengths": np.int64(full),
        "has_key_value_seq_lengths": np.int64(full),
        "has_query_offset": np.int64(full),
        "has_sinks": np.int64(full),
        "has_segment_ids": np.int64(full),
        "has_positions": np.int64(full),
        "page_tokens": np.int64(0),
        "table_pages": np.int64(0),
        "dropout_threshold": np.int64(6000 * full),
        "dropout_scale": np.float32(1.1),
    }
    row = result(B, T, N)
    results = {"out": result(B, T, N, V), "row_maximum": row, "log2_sum": row}
    for format_, (name, shape) in zip(FORMATS[formats], shapes.items(), strict=True):
        results |= format_.results(name, shape)
    if target == TANGENT:
        names = ("query", "key", "value", *(("bias", "sinks") if full else ()))
        logits = {"bias": (B, N, T, S), "sinks": (B, N)}
        operands |= {f"{name}_tangent": draw(*(shapes | logits)[name]) for name in names}
        attributes |= {
            f"has_{name}_tangent": np.int64(name in names) for name in (*shapes, *logits)
        }
        results |= {"tangent_out": result(B, T, N, V), "tangent_log_sum_exp": row}
    elif target != FORWARD:
        operands |= {
            "out": draw(B, T, N, V),
            "row_maximum": draw(B, T, N),
            "log2_sum": draw(B, T, N),
            "d_out": draw(B, T, N, V),
        }
        if full:
            operands["d_log_sum_exp"] = draw(B, T, N)
        attributes["has_d_log_sum_exp"] = np.int64(full)
        attributes["is_partial"] = np.int64(0)
        results = {
            "d_query": result(B, T, N, H),
            "d_key": result(B, S, K, H),
            "d_value": result(B, S, K, V),
        }
    if target == BACKWARD_BIAS:
        results = {"d_bias": result(B, N, T, S)}
    return Call(target, operands, results, attributes)


#: Of `paged`: tokens of a page, pages that are stored, pages of an entry.
PAGE, POOL, PAGES = 16, 5, 3


def paged(formats="int8"):
    """A forward call of keys and values in pages, whose entries share the last one."""
    call = attention(FORWARD, formats, full=False)
    shapes = {"key": (POOL, PAGE, K, H), "value": (POOL, PAGE, K, V)}
    for format_, (name, shape) in zip(FORMATS[formats][1:], shapes.items(), strict=True):
        codes = format_.operands(name, shape)
        if format_.has_center:
            codes[f"{name}_center"] = draw(B, 1, K, shape[-1])
        call.operands |= codes
    call.operands["page_table"] = np.array([[0, 1, 4], [2, 3, 4]], np.int32)
    call.attributes |= {"page_tokens": np.int64(PAGE), "table_pages": np.int64(PAGES)}
    return call


def quantize(
    *, bits=8, symmetric=1, token_block=1, head_block=0, per_tensor=0, center=1, token_powers=0
):
    heads = 1 if per_tensor else K
    scale = (B, math.ceil(S / (token_block or S)), heads, math.ceil(H / (head_block or H)))
    results = {
        "data": result(B, S, K, H // 2, dtype=np.uint8) if bits == 4
        else result(B, S, K, H, dtype=np.int8),
        "scale": result(*scale),
    }  # fmt: skip
    if not symmetric:
        results["minimum"] = result(*scale)
    if center:
        results["center"] = result(B, 1, K, H)
    attributes = dict(
        device=0, bits=bits, symmetric=symmetric, float_minimum=1 - symmetric,
        token_block=token_block, head_block=head_block, per_tensor=per_tensor,
        center=center, token_powers=0, rotate=0, has_visible=1,
        head_major=0,
    )  # fmt: skip
    return Call(
        QUANTIZE,
        {"x": draw(B, S, K, H), "visible": draw(B, S) > -1.0},
        results,
        {name: np.int64(x) for name, x in attributes.items()},
    )


CALLS = {
    "forward": lambda: attention(FORWARD),
    "forward_int8": lambda: attention(FORWARD, "int8"),
    "forward_int4": lambda: attention(FORWARD, "int4"),
    "forward_mixed": lambda: attention(FORWARD, "mixed"),
    "forward_made": lambda: attention(FORWARD, "made"),
    "forward_made_in_part": lambda: attention(FORWARD, "made_in_part"),
    "forward_paged": paged,
    "forward_paged_int4": lambda: paged("int4"),
    "backward": lambda: attention(BACKWARD),
    "backward_int4": lambda: attention(BACKWARD, "int4"),
    "backward_bias": lambda: attention(BACKWARD_BIAS),
    "tangent": lambda: attention(TANGENT),
    "tangent_int4": lambda: attention(TANGENT, "int4"),
    "quantize": quantize,
    "quantize_int4": lambda: quantize(bits=4, symmetric=0, token_block=3, head_block=2),
    "quantize_tensor": lambda: quantize(token_block=0, per_tensor=1),
}


def _parts():
    """Operands and results, each once for a handler: by name, type and shape."""
    seen = set()
    for name, make in CALLS.items():
        call = make()
        for part in ("operands", "results"):
            for of, x in getattr(call, part).items():
                key = call.target, part, of, x.dtype, x.shape
                if key not in seen:
                    seen.add(key)
                    yield name, part, of


PARTS = list(_parts())


def reshaped(part, name, call, shape):
    """The call with one operand or result of another shape."""
    call = copy.deepcopy(call)
    old = getattr(call, part)[name]
    new = np.zeros(shape, old.dtype) if part == "operands" else result(*shape, dtype=old.dtype)
    getattr(call, part)[name] = new
    return call
