"""Runs the kernels of `shaders/` on the software device, bound by the table of `bindings.h`."""

from __future__ import annotations

import dataclasses
import functools
import re
import runpy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec
from tests.support.metal.visible_keys import entries_and_lists, reach_of

ROOT = Path(__file__).resolve().parents[3]
SHADERS = ROOT / "shaders"
EMPTY_ROW_LOG2_SUM = np.float32(-3.0e38)
_SCALARS = {"Int64": np.int64, "int": np.int32, "float": np.float32}
_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "uint8": 4}


@functools.cache
def _table() -> tuple[dict[str, dict[str, int]], dict[str, np.dtype[Any]]]:
    """Enumerations and structs of bindings.h."""
    text = re.sub(r"//[^\n]*", "", (SHADERS / "bindings.h").read_text(encoding="utf-8"))
    enums = {
        name: {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body)}
        for name, body in re.findall(r"enum (\w+) : int \{(.*?)\};", text, re.DOTALL)
    }
    structs: dict[str, np.dtype[Any]] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = re.findall(r"(\w+) (\w+);", body)
        structs[name] = np.dtype(
            [(field, structs.get(kind) or _SCALARS[kind]) for kind, field in fields], align=True
        )
    return enums, structs


def enum(name: str) -> dict[str, int]:
    """The members of an enumeration of bindings.h."""
    return _table()[0][name]


def struct(name: str) -> np.dtype[Any]:
    """A struct of bindings.h, laid out as C++ and Metal lay it out."""
    return _table()[1][name]


SIZES = enum("BlockSize")
BLOCK_ROWS, THREADS, SIMDGROUPS = (SIZES[f"k{x}"] for x in ("BlockRows", "Threads", "Simdgroups"))


@functools.cache
def library(stem: str, instrumentation: str | None = None) -> Any:
    """Compiled as the host compiles it, from one text, so that each is compiled once for both."""
    import softmetal

    flat = runpy.run_path(str(ROOT / "plugin" / "metal" / "embed_shaders.py"))["flat"]
    text = flat(SHADERS / f"{stem}.metal", set())
    return softmetal.Library(text, std="metal3.1", fast_math=False, instrumentation=instrumentation)


@functools.cache
def pipeline(
    stem: str, name: str, constants: tuple[tuple[int, int], ...], instrumentation: str | None
) -> Any:
    return library(stem, instrumentation).kernel(name, dict(constants))


def raw(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Contiguous; bfloat16 as its bits."""
    x = np.ascontiguousarray(x)
    return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x


def type_code(x: Any) -> int:
    return _TYPES[str(x.dtype)]


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a dense array, 0 on axes of extent 1."""
    steps = np.cumprod([1, *shape[:0:-1]])[::-1]
    return [0 if n == 1 else int(step) for n, step in zip(shape, steps, strict=True)]


@dataclasses.dataclass
class Problem:
    """What an attention kernel is asked, in arrays of numpy and `QuantizedTensor`s."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    scale: float | None = None
    soft_cap: float = 0.0
    is_causal: bool = False
    window: tuple[int, int] | None = None
    query_lengths: Any = None
    key_value_lengths: Any = None
    query_offset: Any = None
    segment_ids: Any = None
    sinks: Any = None
    out_dtype: Any = np.float32

    def __post_init__(self) -> None:
        self.B, self.T, self.N, self.H = self.query.shape
        self.S, self.K = self.key.shape[1:3]
        self.V = self.value.shape[-1]
        if self.scale is None:
            self.scale = self.H**-0.5

    def operands(self) -> tuple[Any, Any, Any]:
        return self.query, self.key, self.value

    def is_quantized(self) -> bool:
        return any(isinstance(x, QuantizedTensor) for x in self.operands())


def matrix_type(problem: Problem) -> str:
    """The element type of the matrices that a forward kernel multiplies."""
    query, key, value = problem.operands()
    if not problem.is_quantized():
        names = {str(x.dtype) for x in (query, key, value)}
        if names == {"float16"}:
            return "half"
        return "bfloat" if names == {"bfloat16"} else "float"
    if not all(isinstance(x, QuantizedTensor) for x in (query, key, value)):
        return "float"
    # Codes are exact where scale and zero point are constant along the contraction, or fold into P.
    is_exact = (
        all(x.minimum is None for x in (query, key, value))
        and query.center is None
        and all(x.spec.head_block in (0, x.head_dim) for x in (query, key))
        and (value.spec.head_block in (0, value.head_dim) or value.spec.token_block == 0)
    )
    return "half" if is_exact else "float"


def head_dim_class(problem: Problem) -> int:
    return next(d for d in (64, 128, 256) if d >= max(problem.H, problem.V))


class Encoder:
    """Buffers and parameters of one attention problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.parameters = np.zeros((), struct("AttentionParameters"))
        self.tables = np.zeros((enum("BatchTable")["kBatchTables"], problem.B), np.int64)
        self.buffers: dict[int, np.ndarray[Any, Any]] = {}
        self.sinks_tangent = np.zeros(0, np.float32)  # [B, N]
        p = self.parameters
        for name in ("B", "T", "S", "N", "K", "H", "V", "scale", "soft_cap"):
            p[name] = getattr(problem, name)
        p["reach_left"], p["reach_right"] = reach_of(problem)
        p["out_type"] = p["out_gradient_type"] = _TYPES[np.dtype(problem.out_dtype).name]
        p["batch_per_map"] = problem.B
        p["dropout_scale"] = 1.0
        for name, x in zip(("query", "key", "value"), problem.operands(), strict=True):
            self._bind_rows(name, x)
        for name in ("bias", "mask"):
            x = getattr(problem, name)
            if x is None:
                continue
            strides = self._bind(f"k{name.title()}", x)
            p[name]["head"], p[name]["row"], p[name]["key"] = strides[1:]
            p[f"has_{name}"] = 1
            if name == "bias":
                p["bias_type"] = type_code(x)
        entries, lists = entries_and_lists(problem, struct("BatchEntry"))
        if entries is not None:
            self.buffers[enum("AttentionBuffer")["kEntries"]] = entries
            p["has_entries"] = 1
        if lists is not None:
            self.buffers[enum("AttentionBuffer")["kVisibleKeys"]] = lists
        p["has_sinks"] = problem.sinks is not None

    def _bind(self, slot: str, x: Any) -> list[int]:
        """Binds an operand, and says where its batch entries start; its strides in elements.

        A view of rows is read in place, from the array that it is a view of.
        """
        x, first = np.asarray(x), 0
        strides = _strides(x.shape)
        if not x.flags.c_contiguous:
            strides = [
                0 if n == 1 else step // x.itemsize
                for n, step in zip(x.shape, x.strides, strict=True)
            ]
            first = (x.ctypes.data - x.base.ctypes.data) // x.itemsize
            x = x.base
        self.buffers[enum("AttentionBuffer")[slot]] = raw(x)
        tables = enum("BatchTable")
        if f"{slot}Batch" in tables:
            self.tables[tables[f"{slot}Batch"]] = first + np.arange(self.problem.B) * strides[0]
        return strides

    def _bind_rows(self, name: str, x: Any) -> None:
        p, title = self.parameters, name.title()
        if not isinstance(x, QuantizedTensor):
            strides = self._bind(f"k{title}", x)
        else:
            strides = self._bind(f"k{title}", x.data)
            q = p[f"{name}_quantization"]
            q["token_block"] = x.spec.token_block
            q["head_block"] = 0 if x.spec.head_block >= x.head_dim > 1 else x.spec.head_block
            q["is_bfloat16"] = x.scale.dtype == ml_dtypes.bfloat16
            offset = x.zero_point if x.minimum is None else x.minimum
            q["offset_kind"] = 0 if offset is None else 1 if x.minimum is None else 2
            for field, part in (("scale", x.scale), ("offset", offset)):
                if part is not None:
                    steps = self._bind(f"k{title}{field.title()}", part)
                    q[field]["block"], q[field]["head"], q[field]["column"] = steps[1:]
            q["has_powers"] = x.spec.token_powers
            if x.center is not None:
                q["center_head_stride"] = self._bind(f"k{title}Center", x.center)[2]
                q["has_center"] = 1
        p[name]["token"], p[name]["head"] = strides[1:3]

    def bind(self, slot: str, x: Any) -> None:
        """Binds a dense array; bfloat16 arrays are read and written through their bits."""
        self._bind(slot, x)

    def constants(self) -> dict[str, int]:
        problem = self.problem
        types = [
            type_code(x.data if isinstance(x, QuantizedTensor) else x) for x in problem.operands()
        ]
        return dict(zip(("kQueryType", "kKeyType", "kValueType"), types, strict=True))

    def dispatch(
        self,
        stem: str,
        name: str,
        grid: tuple[int, int, int],
        threads: int = THREADS,
        instrumentation: str | None = None,
        **options: Any,
    ) -> Any:
        """Runs a kernel; slots that the problem has nothing for are bound to a small buffer."""
        slots = enum("AttentionBuffer")
        self.buffers[slots["kParameters"]] = self.parameters.reshape(1)
        # Sinks stand behind the tables.
        sinks = np.tile(np.asarray(self.problem.sinks or (), np.float32), self.problem.B)
        heads = np.append(sinks, self.sinks_tangent)
        self.buffers[slots["kBatchOffsets"]] = np.append(self.tables.view(np.float32), heads)
        count = max(slots.values()) + 1
        buffers = [self.buffers.get(slot, np.zeros(4, np.uint32)) for slot in range(count)]
        indices = enum("FunctionConstant")
        constants = tuple((indices[key], value) for key, value in self.constants().items())
        kernel = pipeline(stem, name, constants, instrumentation)
        return kernel(grid=grid, threads=threads, buffers=buffers, **options)


def kernel_of(stem: str, pipeline: str) -> str:
    """The first part of the name of a kernel in `stem`.metal that walks as `pipeline` says."""
    return stem if pipeline == "baseline" else f"{stem}_{pipeline}"


def blocks(extent: int, size: int) -> int:
    return -(-extent // size)


def nan(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.full(shape, np.nan, dtype)


@dataclasses.dataclass
class Forward:
    """What a forward kernel wrote, and its counters."""

    out: np.ndarray[Any, Any]
    row_maximum: np.ndarray[Any, Any]
    log2_sum: np.ndarray[Any, Any]
    counters: Any


def forward(
    problem: Problem,
    *,
    pipeline: str = "baseline",
    matrix: str | None = None,
    instrumentation: str | None = None,
    **options: Any,
) -> Forward:
    encoder = Encoder(problem)
    rows = (problem.B, problem.T, problem.N)
    out = nan((*rows, problem.V), problem.out_dtype)
    row_maximum, log2_sum = nan(rows), nan(rows)
    for slot, x in (("kOut", out), ("kRowMaximum", row_maximum), ("kLog2Sum", log2_sum)):
        encoder.bind(slot, x)
    counters = encoder.dispatch(
        "attention_forward",
        f"{kernel_of('attention_forward', pipeline)}_{matrix or matrix_type(problem)}"
        f"_{head_dim_class(problem)}",
        (blocks(problem.T, BLOCK_ROWS), problem.N, problem.B),
        instrumentation=instrumentation,
        **options,
    )
    return Forward(out, row_maximum, log2_sum, counters)


@dataclasses.dataclass
class Tangent(Forward):
    """What the tangent kernel wrote besides."""

    tangent_out: np.ndarray[Any, Any]
    tangent_log_sum_exp: np.ndarray[Any, Any]


def tangent(problem: Problem, tangents: dict[str, np.ndarray[Any, Any]], **options: Any) -> Tangent:
    """Forward mode along `tangents`, by the operands' names; others are zero."""
    encoder = Encoder(problem)
    p = encoder.parameters
    rows = (problem.B, problem.T, problem.N)
    out, tangent_out = (nan((*rows, problem.V), problem.out_dtype) for _ in range(2))
    row_maximum, log2_sum, tangent_log_sum_exp = nan(rows), nan(rows), nan(rows)
    for slot, x in (
        ("kOut", out), ("kRowMaximum", row_maximum), ("kLog2Sum", log2_sum),
        ("kOutTangent", tangent_out), ("kLogSumExpTangent", tangent_log_sum_exp),
    ):  # fmt: skip
        encoder.bind(slot, x)
    p["out_tangent_type"] = p["out_type"]
    for name in ("query", "key", "value", "bias"):
        x = tangents.get(name)
        p[f"{name}_tangent_type"] = -1 if x is None else type_code(x)
        if x is None:
            continue
        steps = encoder._bind(f"k{name.title()}Tangent", x)[1:]
        fields = ("head", "row", "key") if name == "bias" else ("token", "head")
        for field, step in zip(fields, steps, strict=False):
            p[f"{name}_tangent"][field] = step
    if "sinks" in tangents:
        p["has_sinks_tangent"] = 1
        encoder.sinks_tangent = np.tile(tangents["sinks"], problem.B).astype(np.float32)
    counters = encoder.dispatch(
        "attention_tangent",
        f"attention_tangent_float_{head_dim_class(problem)}",
        (blocks(problem.T, BLOCK_ROWS), problem.N, problem.B),
        **options,
    )
    return Tangent(out, row_maximum, log2_sum, counters, tangent_out, tangent_log_sum_exp)


@dataclasses.dataclass
class Backward:
    """What the backward kernels wrote, and their counters."""

    d_query: np.ndarray[Any, Any]
    d_key: np.ndarray[Any, Any]
    d_value: np.ndarray[Any, Any]
    query_counters: Any
    key_value_counters: Any


def backward_matrix_type(problem: Problem) -> str:
    """The element type of the matrices that a backward kernel multiplies."""
    return "half" if matrix_type(problem) == "half" and not problem.is_quantized() else "float"


def _bind_cotangents(encoder: Encoder, found: Forward, d_out: Any, d_log_sum_exp: Any) -> None:
    encoder.parameters["out_gradient_type"] = type_code(d_out)
    for slot, x in (
        ("kOut", found.out),
        ("kRowMaximum", found.row_maximum),
        ("kLog2Sum", found.log2_sum),
        ("kOutGradient", d_out),
        ("kLogSumExpGradient", d_log_sum_exp),
    ):
        if x is not None:
            encoder.bind(slot, x)
    encoder.parameters["has_log_sum_exp_gradient"] = d_log_sum_exp is not None


def backward(
    problem: Problem,
    found: Forward,
    d_out: Any,
    d_log_sum_exp: Any = None,
    *,
    pipeline: str = "baseline",
    matrix: str | None = None,
    instrumentation: str | None = None,
    instrumented: tuple[str, ...] = ("query", "key_value"),
    **options: Any,
) -> Backward:
    """Both kernels; `instrumentation` is of those `instrumented`."""
    encoder = Encoder(problem)
    _bind_cotangents(encoder, found, d_out, d_log_sum_exp)
    B, T, S, N, K, H, V = (getattr(problem, x) for x in "BTSNKHV")
    encoder.bind("kRowStatistics", nan((B, N, T, 4)))
    gradients = [
        nan(shape, problem.out_dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, V))
    ]
    for slot, x in zip(("Query", "Key", "Value"), gradients, strict=True):
        encoder.bind(f"k{slot}Gradient", x)
    suffix = f"{matrix or backward_matrix_type(problem)}_{head_dim_class(problem)}"
    counters = [
        encoder.dispatch(
            f"attention_backward_{kernel}",
            f"{kernel_of(f'attention_backward_{kernel}', pipeline)}_{suffix}",
            grid,
            instrumentation=instrumentation if kernel in instrumented else None,
            **options,
        )
        for kernel, grid in (
            ("query", (blocks(T, BLOCK_ROWS), N, B)),
            ("key_value", (blocks(S, BLOCK_ROWS), K, B)),
        )
    ]
    return Backward(*gradients, *counters)


def backward_bias(
    problem: Problem,
    found: Forward,
    d_out: Any,
    d_log_sum_exp: Any = None,
    *,
    maps: int = 1,
    instrumentation: str | None = None,
    **options: Any,
) -> np.ndarray[Any, Any]:
    """The gradient of `problem.bias`; with `maps`, of each of as many parts of the batch."""
    encoder = Encoder(problem)
    _bind_cotangents(encoder, found, d_out, d_log_sum_exp)
    b, n, t, s = problem.bias.shape
    batch = problem.B // maps
    b = b if b == 1 else batch
    d_bias = nan((maps, b, n, t, s), problem.bias.dtype)
    encoder.bind("kBiasGradient", d_bias)
    encoder.bind("kRowStatistics", nan((problem.B, problem.N, problem.T, 4)))
    p = encoder.parameters
    p["bias_gradient_type"] = type_code(d_bias)
    head_dim = head_dim_class(problem)

    def run(b: int, n: int, t: int, s: int, batch_per_map: int, keys: int) -> None:
        p["bias_batches"], p["bias_heads"], p["bias_rows"], p["bias_keys"] = b, n, t, s
        p["batch_per_map"] = batch_per_map
        encoder.dispatch(
            "attention_backward_bias",
            f"attention_backward_bias_float_{head_dim}",
            (blocks(t, BLOCK_ROWS), blocks(s, keys), problem.B // batch_per_map * b * n),
            instrumentation=instrumentation,
            **options,
        )

    key_block = SIZES["kTileBytes"] // (4 * head_dim)
    if any(encoder.constants().values()):
        p["finds_statistics"] = 1
        run(problem.B, problem.N, problem.T, 1, problem.B, key_block)
        p["finds_statistics"] = 0
    run(b, n, t, s, batch, key_block)
    return d_bias


def quantize(
    x: Any,
    spec: QuantSpec,
    *,
    visible: Any = None,
    maps: int = 1,
    instrumentation: str | None = None,
) -> QuantizedTensor:
    """The codes of `x` `[B, S, K, H]`; with `maps`, of each of as many parts of the batch."""
    B, S, K, H = x.shape
    p = np.zeros((), struct("QuantizeParameters"))
    strides = _strides(x.shape)
    p["x"]["token"], p["x"]["head"] = strides[1:3]
    for name, value in dict(
        B=B, S=S, K=K, H=H, batch_per_map=B // maps, x_type=type_code(x), bits=spec.bits,
        is_symmetric=spec.symmetric, has_minimum=spec.float_minimum, token_block=spec.token_block,
        head_block=spec.head_block, is_per_tensor=spec.granularity == "tensor",
        has_center=spec.center, has_visible=visible is not None, is_rotated=spec.rotate,
        is_bfloat16=spec.scale_dtype == ml_dtypes.bfloat16, chunks=blocks(S, SIZES["kChunkTokens"]),
        has_powers=spec.token_powers,
    ).items():  # fmt: skip
        p[name] = value
    scale_dtype = np.dtype(spec.scale_dtype)
    scale = nan(spec.scale_shape(x.shape), scale_dtype)
    cells = spec.block_shape(x.shape)
    minimum = nan(cells, scale_dtype) if spec.float_minimum else None
    zero_point = None if spec.symmetric or spec.float_minimum else np.full(cells, 99, np.int8)
    center = nan((B, 1, K, H)) if spec.center else None
    width, code = (H // 2, np.uint8) if spec.bits == 4 else (H, np.int8)
    data = np.full((B, S, K, width), 99, code)
    slots = enum("QuantizeBuffer")
    offset = minimum if spec.float_minimum else zero_point
    given = {
        "kQuantizeParameters": p.reshape(1),
        "kQuantizeBatchOffsets": np.stack([np.arange(B) * strides[0], np.arange(B) * S]),
        "kQuantizeInput": raw(x),
        "kQuantizeVisible": None if visible is None else np.asarray(visible, np.uint8),
        "kQuantizeData": data,
        "kQuantizeScale": raw(scale),
        "kQuantizeOffset": None if offset is None else raw(offset),
        "kQuantizeCenter": center,
        "kQuantizeExtremes": nan((B, K, int(p["chunks"]), 2, H)),
    }
    buffers = [np.zeros(4, np.uint32) if (y := given[slot]) is None else y for slot in slots]

    def run(name: str, grid: tuple[int, int, int]) -> None:
        kernel = pipeline("quantize", name, (), instrumentation)
        kernel(grid=grid, threads=THREADS, buffers=buffers)

    if spec.center:
        run("quantize_center", (K, B, 1))
    if spec.token_block != 0:
        run("quantize_blocks", (blocks(blocks(S, spec.token_block), SIMDGROUPS), K, B))
    else:
        run("quantize_extremes", (blocks(int(p["chunks"]), SIMDGROUPS), K, B))
        run("quantize_parameters", (1 if spec.granularity == "tensor" else K, B, 1))
        run("quantize_codes", (blocks(S, SIMDGROUPS), K, B))
    return QuantizedTensor(data, scale, zero_point, minimum, center, spec, np.dtype(x.dtype), H)


def decode(
    problem: Problem, splits: int, *, instrumentation: str | None = None, **options: Any
) -> Forward:
    """Attention with the keys in `splits` parts."""
    encoder = Encoder(problem)
    B, T, N, K, V = (getattr(problem, x) for x in "BTNKV")
    p = encoder.parameters
    p["splits"], p["split_keys"] = splits, blocks(blocks(problem.S, splits), 8) * 8
    heads = T * N // K
    parts = splits * SIMDGROUPS
    out = nan((B, T, N, V), problem.out_dtype)
    row_maximum, log2_sum = nan((B, T, N)), nan((B, T, N))
    for slot, x in (
        ("kOut", out),
        ("kRowMaximum", row_maximum),
        ("kLog2Sum", log2_sum),
        ("kPartialOut", nan((B, K, parts, heads, V))),
        ("kPartialStatistics", nan((B, K, parts, heads, 2))),
    ):
        encoder.bind(slot, x)
    name = f"attention_decode_{matrix_type(problem)}_{head_dim_class(problem)}"
    counters = encoder.dispatch(
        "attention_decode", name, (splits * blocks(heads, 8), K, B),
        instrumentation=instrumentation, **options,
    )  # fmt: skip
    encoder.dispatch(
        "attention_decode", "attention_decode_combine", (heads, K, B),
        instrumentation=instrumentation, **options,
    )  # fmt: skip
    return Forward(out, row_maximum, log2_sum, counters)
