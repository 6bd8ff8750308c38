"""Faults of the shaders."""

from tests.mutation.fault import (
    BARRIER,
    BITS,
    FACTOR,
    HEAD,
    INDEX,
    OFF_BY_ONE,
    RESCALE,
    SIGN,
    TAIL,
    TERM,
    Fault,
)

_FORWARD = ("tests/metal/shaders/test_attention_forward.py", "tests/metal/shaders/test_gluon.py")
_BACKWARD = ("tests/metal/shaders/test_attention_backward.py",)
_SANITIZERS = ("tests/metal/shaders/test_sanitizers.py", "-m", "sanitizers", "-k", "thread")

ONLINE, MASK, RING = "shaders/online_softmax.h", "shaders/mask.h", "shaders/ring.h"
DROPOUT, LOGITS, SINK = "shaders/dropout.h", "shaders/logits.h", "shaders/sink.h"
ROWS, QUERY = "shaders/backward_rows.h", "shaders/attention_backward_query.metal"

FAULTS = (
    Fault(RESCALE, ONLINE, "    sum *= rescale;\n", "", _FORWARD),
    Fault(
        RESCALE, ONLINE, "        out[d].thread_elements()[1] *= rescale;\n", "", _FORWARD,
    ),
    Fault(
        BITS, ONLINE,
        "if (!rules.dropout.keeps(key0 + 8 * t + place.column + i)) weight = 0.0f;",
        "if (!rules.dropout.keeps(key0 + 8 * t + i)) weight = 0.0f;", _FORWARD,
    ),
    Fault(
        SIGN, ONLINE, "if (adds_centre) x += center;", "if (adds_centre) x -= center;", _FORWARD,
    ),
    Fault(
        OFF_BY_ONE, MASK,
        "return {between(i + first, keys), between(i + last + 1, keys)};",
        "return {between(i + first, keys), between(i + last, keys)};", _FORWARD,
    ),
    Fault(
        TAIL, MASK,
        "return {between(of.begin - last, rows), between(of.end - first, rows)};",
        "return {between(of.begin - last, rows), between(of.end - first - 8, rows)};", _BACKWARD,
    ),
    Fault(
        BITS, DROPOUT,
        "for (int round = 0; round < 7; ++round) {",
        "for (int round = 0; round < 6; ++round) {", _FORWARD,
    ),
    Fault(
        BITS, DROPOUT, "const int slot = token / 8 % 8;", "const int slot = token % 8;", _FORWARD,
    ),
    Fault(FACTOR, LOGITS, "slope = 1.0f - t * t;", "slope = 1.0f - t;", _BACKWARD),
    Fault(
        HEAD, LOGITS,
        "mask += operands.batch_offset(kMaskBatch, b) + n * p.mask.head;",
        "mask += operands.batch_offset(kMaskBatch, b) + n / 2 * p.mask.head;", _FORWARD,
    ),
    Fault(
        INDEX, LOGITS,
        "rules.bias = p.has_bias != 0 ? bias + i * p.bias.row * bias_size(p) : bias;",
        "rules.bias = p.has_bias != 0 ? bias + i * p.bias.key * bias_size(p) : bias;", _FORWARD,
    ),
    Fault(
        SIGN, SINK,
        "const float divisor = sum + exp2(sink - maximum), share = sum / divisor;",
        "const float divisor = sum + exp2(maximum - sink), share = sum / divisor;", _FORWARD,
    ),
    Fault(
        SIGN, QUERY,
        "if (refines_delta()) x -= rest * probability_sum[d].thread_elements()[i];",
        "if (refines_delta()) x += rest * probability_sum[d].thread_elements()[i];", _BACKWARD,
    ),
    Fault(
        SIGN, ROWS,
        "statistics.delta = delta - log_sum_exp_gradient;",
        "statistics.delta = delta + log_sum_exp_gradient;", _BACKWARD,
    ),
    Fault(
        TERM, ROWS,
        "const float share = rules.dropout.keeps(key) ? p.dropout_scale : 0.0f;",
        "const float share = p.dropout_scale;", _BACKWARD,
    ),
    Fault(
        BARRIER, RING,
        "    threadgroup_barrier(mem_flags::mem_threadgroup);  // the next granule is filled\n",
        "", _SANITIZERS,
    ),
)  # fmt: skip
