"""Faults of the kernels of the CPU."""

from tests.mutation.fault import (
    BITS,
    FACTOR,
    GROUP,
    HEAD,
    INDEX,
    OFF_BY_ONE,
    RESCALE,
    SIGN,
    STALE,
    TAIL,
    TERM,
    Fault,
)

# The builds have no emulated instruction sets.
_NATIVE = ("-k", "not emulated and not metal and not xla")
_KERNELS = ("tests/cpu/test_kernels.py", *_NATIVE)
_GLUON = ("tests/cpu/test_gluon.py", *_NATIVE)
_BOTH = ("tests/cpu/test_kernels.py", "tests/cpu/test_gluon.py", *_NATIVE)
_DECODE = ("tests/cpu/test_attention_decode.py", *_NATIVE)
_SEGMENTS = ("tests/package/test_segments_and_positions.py", *_NATIVE)
_DROPOUT = ("tests/package/test_dropout.py", *_NATIVE)
_SINKS = ("tests/package/test_sinks.py", *_NATIVE)

ONLINE = "plugin/cpu/forward/online_softmax.h"
SUBTILE = "plugin/cpu/forward/subtile_softmax.h"
BACKWARD, RULES = "plugin/cpu/backward/backward_rows.h", "plugin/cpu/rows/logit_rules.h"
VISIBLE, BITS_OF_ROWS = "plugin/visible_keys.cc", "plugin/cpu/rows/dropout_row.h"
QUERIES = "plugin/cpu/decode/decode_queries.h"

FAULTS = (
    Fault(
        RESCALE, ONLINE,
        "state.sum[row] = state.sum[row] * rescale + Isa::reduce_add(Isa::add(l0, l1));",
        "state.sum[row] = state.sum[row] + Isa::reduce_add(Isa::add(l0, l1));", _KERNELS,
    ),
    Fault(
        STALE, ONLINE,
        "? std::exp2(largest + move - reference) * (1.0f / kMaxProbability)",
        "? std::exp2(largest + move - before) * (1.0f / kMaxProbability)", _KERNELS,
    ),
    Fault(
        GROUP, ONLINE,
        "out.subtile_factor[j0 / kSubtileKeys][r] = factor;",
        "out.subtile_factor[(end - 1) / kSubtileKeys][r] = factor;", _KERNELS,
    ),
    Fault(
        SIGN, ONLINE,
        "if (before != kHidden) before += first_origin - last_origin;",
        "if (before != kHidden) before -= first_origin - last_origin;", _KERNELS,
    ),
    Fault(
        STALE, SUBTILE,
        "Isa::where_less(floor, largest, Isa::where_less(far, largest, largest, old), old);",
        "Isa::where_less(floor, largest, Isa::where_less(far, largest, old, old), old);", _GLUON,
    ),
    Fault(
        RESCALE, SUBTILE,
        "sum = Isa::fma(before, Isa::set1(group.rescale[r]), sum);",
        "sum = Isa::fma(before, Isa::set1(1.0f), sum);", _GLUON,
    ),
    Fault(
        SIGN, BACKWARD,
        "if (call_.d_log_sum_exp) s.delta = -scalar_of(",
        "if (call_.d_log_sum_exp) s.delta = scalar_of(", _BOTH,
    ),
    Fault(TERM, BACKWARD, "      total += sink;\n", "", _SINKS),
    Fault(
        INDEX, BACKWARD,
        "if (cap_slope) ds = Isa::mul(ds, Isa::load(cap_slope + j));",
        "if (cap_slope) ds = Isa::mul(ds, Isa::load(cap_slope + begin));", _BOTH,
    ),
    Fault(
        FACTOR, BACKWARD,
        "const auto grown = Isa::mul(Isa::load(d_p + j), Isa::set1(scale));",
        "const auto grown = Isa::mul(Isa::load(d_p + j), Isa::set1(0.0f * scale + 1.0f));",
        _DROPOUT,
    ),
    Fault(
        HEAD, BACKWARD,
        "if (const float* stored = key_center(b, n / (call_.N / call_.K))) {",
        "if (const float* stored = key_center(b, n % call_.K)) {", _BOTH,
    ),
    Fault(
        HEAD, RULES,
        "call.mask_batch_offset[static_cast<size_t>(b)] + n * call.mask_stride[0];",
        "call.mask_batch_offset[static_cast<size_t>(b)] + n / 2 * call.mask_stride[0];", _BOTH,
    ),
    Fault(
        HEAD, RULES,
        "(bias.batch_offset[static_cast<size_t>(b)] + n * bias.stride[0]) *",
        "(bias.batch_offset[static_cast<size_t>(b)] + n / 2 * bias.stride[0]) *", _BOTH,
    ),
    Fault(
        FACTOR, RULES,
        "Isa::store(cap_slope + j, Isa::sub(Isa::set1(1.0f), Isa::mul(t, t)));",
        "Isa::store(cap_slope + j, Isa::sub(Isa::set1(1.0f), t));", _BOTH,
    ),
    Fault(
        TAIL, RULES,
        "for (int64_t j = std::max(begin, last / W * W); j < end; j += W) hide(j);",
        "for (int64_t j = std::max(begin, last / W * W + W); j < end; j += W) hide(j);", _BOTH,
    ),
    Fault(
        OFF_BY_ONE, VISIBLE,
        "const auto last = std::upper_bound(first, places.end(),",
        "const auto last = std::lower_bound(first, places.end(),", _SEGMENTS,
    ),
    Fault(
        OFF_BY_ONE, VISIBLE,
        "found.last_rank[row] : extremes.max(begin, end) + 1;",
        "found.last_rank[row] : extremes.max(begin, end);", _SEGMENTS,
    ),
    Fault(
        BITS, BITS_OF_ROWS,
        "static_cast<uint32_t>(n) * static_cast<uint32_t>(seeds[4]);",
        "static_cast<uint32_t>(n / 2) * static_cast<uint32_t>(seeds[4]);", _DROPOUT,
    ),
    Fault(
        BITS, BITS_OF_ROWS,
        "const uint32_t first = tile * kLanes + static_cast<uint32_t>(v * W);",
        "const uint32_t first = tile * kLanes + static_cast<uint32_t>(v);", _DROPOUT,
    ),
    Fault(
        RESCALE, QUERIES,
        "scale_row<Isa>(s.out.get() + i * value_width, value_width, factor);",
        "scale_row<Isa>(s.out.get() + i * value_width, value_width, 1.0f + 0.0f * factor);",
        _DECODE,
    ),
    Fault(
        TERM, QUERIES,
        "        *to.maximum += s.center[i];\n",
        "        *to.maximum += 0.0f * s.center[i];\n", _DECODE,
    ),
    Fault(
        GROUP, QUERIES,
        "to.values[c] = out[Value::value_position(c)] + offsets[c / size];",
        "to.values[c] = out[Value::value_position(c)] + offsets[0 * size];", _DECODE,
    ),
)  # fmt: skip
