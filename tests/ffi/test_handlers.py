"""The XLA FFI handlers trust nothing: what does not fit is an error that names it, never a crash.

Every call is made with `jax.ffi.ffi_call` directly, so that Python's own validation is out of the
way.
"""

import copy
import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax_gluon._plugin", reason="jax_gluon._plugin is not built")

B, T, S, N, K, H, V = 2, 5, 7, 4, 2, 8, 6
FORWARD = "jax_gluon.attention_forward"
BACKWARD = "jax_gluon.attention_backward"
BACKWARD_BIAS = "jax_gluon.attention_backward_bias"
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
        operands = [jnp.asarray(x) for x in self.operands.values()]
        return jax.block_until_ready(call(*operands, **self.attributes))

    def error(self):
        """The message of the error that the call must come back with."""
        with pytest.raises(jax.errors.JaxRuntimeError) as error:
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
        width = columns // 2 if packed else columns
        parts = {
            name: draw(batch, tokens, heads, width, dtype=np.uint8 if packed else np.int8),
            f"{name}_scale": np.full(scale, 0.1 if packed else 0.01, np.float32),
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
    "int4": (Format(8, 2, offset=1), Format(4, 4, 1, 2), Format(4, 1, 4, 1, has_center=1)),
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
        "scale": np.float32(0.5),
        "soft_cap": np.float32(0.0),
        "causal": np.int64(0),
        "window_left": np.int64(-1),
        "window_right": np.int64(-1),
        "has_bias": np.int64(full),
        "has_mask": np.int64(full),
        "has_query_seq_lengths": np.int64(full),
        "has_key_value_seq_lengths": np.int64(full),
        "has_query_offset": np.int64(full),
    }
    row = result(B, T, N)
    results = {"out": result(B, T, N, V), "row_maximum": row, "log2_sum": row}
    for format_, (name, shape) in zip(FORMATS[formats], shapes.items(), strict=True):
        results |= format_.results(name, shape)
    if target != FORWARD:
        operands |= {
            "out": draw(B, T, N, V),
            "row_maximum": draw(B, T, N),
            "log2_sum": draw(B, T, N),
            "d_out": draw(B, T, N, V),
        }
        if full:
            operands["d_log_sum_exp"] = draw(B, T, N)
        attributes["has_d_log_sum_exp"] = np.int64(full)
        results = {
            "d_query": result(B, T, N, H),
            "d_key": result(B, S, K, H),
            "d_value": result(B, S, K, V),
        }
    if target == BACKWARD_BIAS:
        results = {"d_bias": result(B, N, T, S)}
    return Call(target, operands, results, attributes)


def quantize(*, bits=8, symmetric=1, token_block=1, head_block=0, per_tensor=0, center=1):
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
        center=center, rotate=0, has_visible=1,
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
    "backward": lambda: attention(BACKWARD),
    "backward_int4": lambda: attention(BACKWARD, "int4"),
    "backward_bias": lambda: attention(BACKWARD_BIAS),
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


@pytest.fixture(autouse=True)
def _handlers_still_work():
    """After each test the process lives and a good call still gives the right numbers."""
    yield
    call = attention(FORWARD, full=False)
    out, row_maximum, log2_sum = call.run()
    query, key, value = call.operands.values()
    key, value = (np.repeat(x, N // K, axis=2) for x in (key, value))
    logits = np.einsum("btnh,bsnh->btns", query, key) * 0.5
    largest = logits.max(-1)
    p = np.exp(logits - largest[..., None])
    expected = np.einsum("btns,bsnv->btnv", p / p.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(row_maximum, largest * np.log2(np.e), atol=1e-5)
    np.testing.assert_allclose(log2_sum, np.log2(p.sum(-1)), atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_that_are_spoilt_below_are_good(name):
    call = CALLS[name]()
    for x, expected in zip(call.run(), call.results.values(), strict=True):
        assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
        assert np.isfinite(x).all()


def reshaped(part, name, call, shape):
    """The call with one operand or result of another shape."""
    call = copy.deepcopy(call)
    old = getattr(call, part)[name]
    new = np.zeros(shape, old.dtype) if part == "operands" else result(*shape, dtype=old.dtype)
    getattr(call, part)[name] = new
    return call


@pytest.mark.parametrize(("name", "part", "of"), PARTS)
def test_every_extent_is_checked(name, part, of):
    call = CALLS[name]()
    shape = getattr(call, part)[of].shape
    for axis, extent in enumerate(shape):
        longer = (*shape[:axis], extent + 1, *shape[axis + 1 :])
        message = reshaped(part, of, call, longer).error()
        # The found shape, or number of heads, stands in the message, and so does what was expected.
        assert "expected" in message
        assert any(str(n) in message for n in longer)


BROADCAST = ("bias", "mask", "scale", "zero_point", "minimum")


@pytest.mark.parametrize(
    ("name", "part", "of"),
    [case for case in PARTS if case[1] == "results" or not case[2].endswith(BROADCAST)],
)
def test_only_bias_mask_and_scales_broadcast(name, part, of):
    """An extent of 1 stands for no other on the axes behind the leading ones."""
    call = CALLS[name]()
    shape = getattr(call, part)[of].shape
    for axis in (axis for axis, extent in enumerate(shape) if extent > 1):
        message = reshaped(part, of, call, (*shape[:axis], 1, *shape[axis + 1 :])).error()
        assert "expected" in message


@pytest.mark.parametrize(("name", "part", "of"), PARTS)
def test_every_rank_is_checked(name, part, of):
    call = CALLS[name]()
    shape = getattr(call, part)[of].shape
    for other in (shape[1:], (1, *shape), (3, *shape), ()):
        message = reshaped(part, of, call, other).error()
        assert "expected" in message


@pytest.mark.parametrize(("name", "part", "of"), PARTS)
def test_every_dtype_is_checked(name, part, of):
    call = CALLS[name]()
    old = getattr(call, part)[of]
    for dtype in (np.int16, np.uint32, np.complex64):
        new = old.astype(dtype) if part == "operands" else result(*old.shape, dtype=dtype)
        getattr(call, part)[of] = new
        message = call.error()
        assert f"{part[:-1]} {of} is another type, expected " in message


@pytest.mark.parametrize(("name", "of"), [(c, of) for c, part, of in PARTS if part == "operands"])
def test_every_operand_must_be_there(name, of):
    call = CALLS[name]()
    del call.operands[of]
    # The operands behind it move up, so the message may name the first that then does not fit.
    message = call.error()
    assert "operand " in message or "query has" in message


@pytest.mark.parametrize(
    ("name", "of"),
    # XLA drops a call that has no result at all, so the only one of a call can't be taken away.
    [(c, of) for c, part, of in PARTS if part == "results" and of != "d_bias"],
)
def test_every_result_must_be_there(name, of):
    call = CALLS[name]()
    del call.results[of]
    assert "result" in call.error()


@pytest.mark.parametrize("name", CALLS)
def test_operands_and_results_left_over_are_an_error(name):
    call = CALLS[name]()
    count = len(call.operands)
    call.operands["extra"] = draw(B)
    assert f"it has {count + 1} operands, expected {count}" in call.error()
    call = CALLS[name]()
    count = len(call.results)
    call.results["extra"] = result(B)
    assert f"it has {count + 1} results, expected {count}" in call.error()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_operands_or_attributes_is_an_error(name):
    call = CALLS[name]()
    call.operands = {}
    assert "is missing" in call.error()
    call = CALLS[name]()
    call.attributes = {}
    assert "attribute " in call.error()


@pytest.mark.parametrize("name", ["forward", "backward", "backward_bias", "quantize"])
def test_every_attribute_must_be_there_and_of_its_type(name):
    attributes = CALLS[name]().attributes
    for i, (attribute, setting) in enumerate(attributes.items()):
        call = CALLS[name]()
        del call.attributes[attribute]
        assert f"attribute {attribute} is missing or not " in call.error()
        # A value of its own: JAX takes the compiled call of attributes that compare equal.
        wrong = np.float64(100 + i) if isinstance(setting, np.float32) else np.int32(100 + i)
        call.attributes = attributes | {attribute: wrong}
        assert f"attribute {attribute} is missing or not " in call.error()


ATTRIBUTES = {
    "device": ("device", np.int64(3), "is 3, expected 0 to 2"),
    "cpu_kernel": ("cpu_kernel", "fast", 'is "fast", expected one of baseline, gluon, decode'),
    "large_block": ("cpu_block_k", np.int64(2**40), f"is {2**40}, expected 0 to 4096"),
    "negative_subtile": ("cpu_subtile", np.int64(-64), "is -64, expected 0 to 4096"),
    "many_stages": ("cpu_stages", np.int64(9), "is 9, expected 0 to 8"),
    "metal_kernel": ("metal_kernel", "", 'is "", expected one of baseline'),
    "scale_nan": ("scale", np.float32("nan"), "is nan, expected a finite number"),
    "scale_inf": ("scale", np.float32("inf"), "is inf, expected a finite number"),
    "soft_cap_nan": ("soft_cap", np.float32("nan"), "is nan, expected a finite number"),
    "soft_cap_negative": ("soft_cap", np.float32(-1), "is -1.000000, expected 0"),
    "causal": ("causal", np.int64(2), "is 2, expected 0 to 1"),
    "causal_negative": ("causal", np.int64(-1), "is -1, expected 0 to 1"),
    "window_left": ("window_left", np.int64(-2), "is -2, expected -1 to "),
    "window_right": ("window_right", np.int64(-(2**63)), f"is {-(2**63)}, expected -1 to "),
    "window_huge": ("window_left", np.int64(2**63 - 1), f"is {2**63 - 1}, expected -1 to "),
    "bits": ("key_bits", np.int64(16), "is 16, expected 0 to 8"),
    "bits_odd": ("key_bits", np.int64(5), "is 5, expected 0, 4 or 8"),
    "offset": ("value_offset", np.int64(3), "is 3, expected 0 to 2"),
    "token_block": ("key_token_block", np.int64(-3), "is -3, expected 0 to "),
    "head_block": ("query_head_block", np.int64(-(2**63)), f"is {-(2**63)}, expected 0 to "),
    "has_center": ("key_has_center", np.int64(2), "is 2, expected 0 to 1"),
}


@pytest.mark.parametrize("name", ["forward", "backward", "backward_bias"])
def test_a_kernel_that_there_is_not(name):
    """Names are checked against what the CPU has for the call, and its sizes must be there."""

    def error(name, **attributes):
        call = CALLS[name]()
        call.attributes |= attributes
        with pytest.raises(jax.errors.JaxRuntimeError) as error:
            call.run()
        return str(error.value)

    refused = error("forward_int8" if name == "forward" else name, cpu_kernel="decode")
    if name == "forward":
        refused = error("forward_int8", cpu_kernel="small")
    assert 'the call is for the kernel "' in refused
    assert 'the CPU has for it "' in refused
    if name == "backward_bias":
        return
    assert 'has no block_k for the kernel "baseline"' in error(name, cpu_block_k=np.int64(0))
    gluon = error(name, cpu_kernel="gluon", cpu_block_k=np.int64(512))
    assert 'the call has no subtile for the kernel "gluon"' in gluon


@pytest.mark.parametrize("name", ["forward_int4", "backward", "backward_bias"])
@pytest.mark.parametrize("case", ATTRIBUTES)
def test_attribute_out_of_range(name, case):
    attribute, setting, complaint = ATTRIBUTES[case]
    call = CALLS[name]()
    call.attributes[attribute] = setting
    assert f"attribute {attribute} {complaint}" in call.error()


@pytest.mark.parametrize(
    "attribute", ["symmetric", "float_minimum", "per_tensor", "center", "rotate", "has_visible"]
)
def test_quantize_flag_out_of_range(attribute):
    call = quantize()
    call.attributes[attribute] = np.int64(2)
    assert f"attribute {attribute} is 2, expected 0 to 1" in call.error()


@pytest.mark.parametrize(
    ("attribute", "setting", "complaint"),
    [
        ("bits", 6, "attribute bits is 6, expected 4 or 8"),
        ("bits", 3, "attribute bits is 3, expected 4 to 8"),
        ("token_block", -1, "attribute token_block is -1, expected 0 to "),
        ("head_block", -1, "attribute head_block is -1, expected 0 to "),
        ("float_minimum", 1, "attribute float_minimum is 1, expected 0 where symmetric is 1"),
        ("per_tensor", 1, "attribute per_tensor is 1, expected 0 where blocks are not whole axes"),
        ("token_block", 2, "result scale has shape [2, 7, 2, 1], expected [2, 4, 2, 1]"),
        ("head_block", 3, "result scale has shape [2, 7, 2, 1], expected [2, 7, 2, 3]"),
    ],
)
def test_quantize_attributes_that_contradict(attribute, setting, complaint):
    call = quantize()
    call.attributes[attribute] = np.int64(setting)
    assert complaint in call.error()


def test_quantize_an_odd_head_dim_to_4_bits():
    call = quantize(bits=4)
    call.operands["x"] = draw(B, S, K, 7)
    assert "x has shape [2, 7, 2, 7], expected a head dim of at least 1, even" in call.error()


def test_codes_that_a_call_makes_are_those_of_the_quantizer():
    """The same bits, and the same output as that of a call that is given them."""
    call = attention(FORWARD, "made")
    found = dict(zip(call.results, call.run(), strict=True))
    given = attention(FORWARD, "made")
    given.results = {name: given.results[name] for name in ("out", "row_maximum", "log2_sum")}
    given.operands = {}
    for format_, name in zip(FORMATS["made"], ("query", "key", "value"), strict=True):
        quantizer = quantize(
            bits=format_.bits, symmetric=int(format_.offset == 0), center=format_.has_center,
            token_block=format_.token_block, head_block=format_.head_block,
        )  # fmt: skip
        quantizer.attributes["float_minimum"] = np.int64(format_.offset == 2)
        x = call.operands[name]
        visible = call.operands["query_visible" if name == "query" else "key_value_visible"]
        quantizer.operands = {"x": x, "visible": visible}
        quantizer.results = {
            part.removeprefix(f"{name}_"): shape
            for part, shape in call.results.items()
            if part.startswith(f"{name}_")
        }
        for part, y in zip(quantizer.results, quantizer.run(), strict=True):
            np.testing.assert_array_equal(found[f"{name}_{part}"], y)
            given.operands[name if part == "data" else f"{name}_{part}"] = np.asarray(y)
        given.attributes[f"{name}_is_made"] = np.int64(0)
    given.operands |= {
        name: x for name, x in call.operands.items() if name not in ("query", "key", "value")
    }
    for part, y in zip(given.results, given.run(), strict=True):
        np.testing.assert_array_equal(found[part], y)


@pytest.mark.parametrize(
    ("attribute", "setting", "complaint"),
    [
        ("query_is_made", 2, "attribute query_is_made is 2, expected 0 to 1"),
        ("value_per_tensor", -1, "attribute value_per_tensor is -1, expected 0 to 1"),
        ("key_bits", 0, "attribute key_bits is 0, expected 4 or 8 where key_is_made is 1"),
        ("key_per_tensor", 1, "attribute key_per_tensor is 1, expected 0 where blocks are not"),
        ("key_token_block", 2, "result key_scale has shape [2, 2, 2, 8], expected [2, 4, 2, 8]"),
        ("key_offset", 1, "result key_zero_point "),
    ],
)
def test_made_codes_whose_attributes_contradict(attribute, setting, complaint):
    call = attention(FORWARD, "made")
    call.attributes[attribute] = np.int64(setting)
    assert complaint in call.error()


def test_codes_are_made_where_there_is_no_row():
    """The output is empty, the codes are not."""
    call = attention(FORWARD, "made_in_part", full=False)
    call.operands["query"] = draw(B, 0, N, H)
    call.results |= {"out": result(B, 0, N, V), "row_maximum": result(B, 0, N),
                     "log2_sum": result(B, 0, N)}  # fmt: skip
    found = dict(zip(call.results, call.run(), strict=True))
    codes = np.asarray(found["key_data"], np.float32) * np.asarray(found["key_scale"])
    np.testing.assert_allclose(codes, call.operands["key"], atol=float(found["key_scale"].max()))


@pytest.mark.parametrize("window", [(2**61 - 1, 0), (0, 2**61 - 1), (2**61 - 1, 2**61 - 1)])
def test_a_huge_window_does_not_overflow(window):
    call = attention(FORWARD)
    call.attributes["window_left"], call.attributes["window_right"] = map(np.int64, window)
    wide = copy.deepcopy(call)
    wide.attributes["window_left"], wide.attributes["window_right"] = (
        np.int64(min(n, T + S)) for n in window
    )
    for x, y in zip(call.run(), wide.run(), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "flag",
    ["has_bias", "has_mask", "has_query_seq_lengths", "has_query_offset", "has_d_log_sum_exp"],
)
def test_flags_that_deny_an_operand_which_is_there(flag):
    call = attention(BACKWARD)
    call.attributes[flag] = np.int64(0)
    call.error()


@pytest.mark.parametrize(
    "flag",
    ["has_bias", "has_mask", "has_query_seq_lengths", "has_query_offset", "has_query_visible"],
)
def test_flags_that_announce_an_operand_which_is_not_there(flag):
    call = attention(FORWARD, full=False)
    call.attributes[flag] = np.int64(1)
    assert f"operand {flag.removeprefix('has_')} is missing" in call.error()


def test_bias_gradient_without_bias():
    call = attention(BACKWARD_BIAS, full=False)
    assert "attribute has_bias is 0, expected 1" in call.error()


@pytest.mark.parametrize("target", [FORWARD, BACKWARD, BACKWARD_BIAS])
def test_bits_and_operands_must_agree(target):
    call = attention(target, full=False)
    call.attributes["query_bits"] = np.int64(8)
    call.error()
    call = attention(target, "int8")
    call.attributes["query_bits"] = np.int64(4)
    call.error()
    call = attention(target, "int4")
    call.attributes |= {"key_bits": np.int64(8)}
    call.error()


def test_scales_along_a_row_are_all_there():
    call = attention(FORWARD, "int4")
    call.operands["key_scale"] = call.operands["key_scale"][..., :1]
    assert "operand key_scale has one scale a row, expected 8" in call.error()
    call = attention(FORWARD, "int4")
    call.operands["key_minimum"] = call.operands["key_minimum"][..., :1]
    assert "expected 8" in call.error()


def test_scales_broadcast_over_tokens_and_heads():
    call = attention(FORWARD, "int8", full=False)
    expected = call.run()
    for name in ("query_scale", "key_scale", "value_scale"):
        call.operands[name] = call.operands[name][:1, :1, :1]
    for x, y in zip(call.run(), expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_operands_of_different_float_types():
    call = attention(FORWARD, full=False)
    call.operands["key"] = call.operands["key"].astype(np.float16)
    expected = copy.deepcopy(call)
    expected.operands["key"] = expected.operands["key"].astype(np.float32)
    for x, y in zip(call.run(), expected.run(), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_heads_that_do_not_divide(heads):
    call = attention(FORWARD, full=False)
    call.operands["query"] = draw(B, T, heads, H)
    row = result(B, T, heads)
    call.results = {"out": result(B, T, heads, V), "row_maximum": row, "log2_sum": row}
    assert f"query has {heads} heads, expected a multiple of key's 2" in call.error()


def test_no_kv_heads():
    call = attention(FORWARD, full=False)
    call.operands |= {"key": draw(B, S, 0, H), "value": draw(B, S, 0, V)}
    assert "query has 4 heads, expected a multiple of key's 0" in call.error()


@pytest.mark.parametrize("name", ["bias", "mask"])
@pytest.mark.parametrize(
    "shape", [(B, K, T, S), (B, N, S, T), (3, N, T, S), (B, N, T, 2), (B, N, T, 0)]
)
def test_bias_and_mask_must_broadcast(name, shape):
    call = reshaped("operands", name, attention(FORWARD), shape)
    message = call.error()
    assert f"operand {name} has shape {list(shape)}, expected {[B, N, T, S]}" in message


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_64_bit_operands(configure, dtype):
    with configure(jax_enable_x64=True):
        call = attention(FORWARD)
        name = "query" if dtype == np.float64 else "key_value_seq_lengths"
        call.operands[name] = call.operands[name].astype(dtype)
        assert f"operand {name} is " in call.error()


def test_no_keys_is_not_an_error():
    call = attention(FORWARD, full=False)
    call.operands |= {"key": draw(B, 0, K, H), "value": draw(B, 0, K, V)}
    out, row_maximum, log2_sum = call.run()
    assert not out.any()
    assert not row_maximum.any()
    assert (log2_sum == np.float32(-3.0e38)).all()


# The mapped leading axes of each operand in turn, out of (2, 3); the results always have both.
LEADING = [(2, 3), (1, 3), (2, 1), (1, 1)]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("turn", range(len(LEADING)))
def test_leading_axes_fold_into_the_batch_without_a_copy(name, turn):
    """The same bits as one call per entry, whichever operands are mapped over which axis."""
    call = CALLS[name]()
    mapped = copy.deepcopy(call)
    for i, (of, x) in enumerate(call.operands.items()):
        leading = LEADING[(i + turn) % len(LEADING)]
        # Each entry another permutation of the same numbers: lengths and scales stay in range.
        entries = [np.roll(x, 3 * entry, axis=-1) for entry in range(math.prod(leading))]
        mapped.operands[of] = np.stack(entries).reshape(*leading, *x.shape)
    for of, x in call.results.items():
        mapped.results[of] = result(2, 3, *x.shape, dtype=x.dtype)
    actual = mapped.run()
    assert len({np.asarray(actual[0][i, j]).tobytes() for i in range(2) for j in range(3)}) > 1
    for i in range(2):
        for j in range(3):
            for of, x in mapped.operands.items():
                call.operands[of] = x[min(i, x.shape[0] - 1), min(j, x.shape[1] - 1)]
            for x, y in zip(actual, call.run(), strict=True):
                np.testing.assert_array_equal(x[i, j], y)


def test_leading_axes_must_agree():
    call = attention(FORWARD, full=False)
    leading = {"query": (2, 3), "key": (2, 2), "value": (2, 3)}
    for of, axes in leading.items():
        call.operands[of] = np.broadcast_to(call.operands[of], axes + call.operands[of].shape)
    for of, x in call.results.items():
        call.results[of] = result(2, 3, *x.shape)
    message = call.error()
    assert f"operand key has shape {[2, 2, B, S, K, H]}, expected {[2, 3, B, S, K, H]}" in message


@pytest.mark.parametrize("target", [FORWARD, BACKWARD, BACKWARD_BIAS, QUANTIZE])
def test_an_unknown_instruction_set_fails_every_call_and_kills_nothing(target):
    program = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('handlers', sys.argv[1])\n"
        "sys.modules['handlers'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "import jax\n"
        "make = module.quantize if sys.argv[2] == module.QUANTIZE else None\n"
        "call = make() if make else module.attention(sys.argv[2])\n"
        "try:\n"
        "    call.run()\n"
        "except jax.errors.JaxRuntimeError as error:\n"
        "    print(error)\n"
        "import jax_gluon._plugin\n"
        "print(jax_gluon._plugin.cpu_isa())\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, __file__, target],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_GLUON_CPU_ISA": "avx1024"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    message, isa = finished.stdout.splitlines()
    assert f"{target}: JAX_GLUON_CPU_ISA is 'avx1024', expected one of those" in message
    assert "portable" in message
    assert isa == "unsupported"
