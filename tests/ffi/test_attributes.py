"""Attributes that do not fit are an error that names them, never a crash."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jax_gluon
from tests.support.ffi_calls import (
    BACKWARD,
    BACKWARD_BIAS,
    CALLS,
    FORWARD,
    QUANTIZE,
    TANGENT,
    B,
    K,
    S,
    attention,
    draw,
    quantize,
)


@pytest.mark.parametrize("name", ["forward", "backward", "backward_bias", "tangent", "quantize"])
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
    "dropout": ("dropout_threshold", np.int64(0x10000), "is 65536, expected 0 to 65535"),
    "bits": ("key_bits", np.int64(16), "is 16, expected 0 to 8"),
    "bits_odd": ("key_bits", np.int64(5), "is 5, expected 0, 4 or 8"),
    "offset": ("value_offset", np.int64(3), "is 3, expected 0 to 2"),
    "token_block": ("key_token_block", np.int64(-3), "is -3, expected 0 to "),
    "head_block": ("query_head_block", np.int64(-(2**63)), f"is {-(2**63)}, expected 0 to "),
    "has_center": ("key_has_center", np.int64(2), "is 2, expected 0 to 1"),
    "has_powers": ("query_has_powers", np.int64(1), "is 1, expected 0 but for blocks of a channel"),
}


def test_powers_of_codes_that_the_call_makes_are_of_centered_ones():
    call = attention(FORWARD, "made")
    call.attributes["key_has_powers"] = np.int64(1)
    complaint = "is 1, expected 0 but for centered codes where key_is_made is 1"
    assert f"attribute key_has_powers {complaint}" in call.error()


@pytest.mark.parametrize("name", ["forward", "backward", "backward_bias", "tangent"])
def test_a_kernel_that_there_is_not(name):
    """Names are checked against what the CPU has for the call."""

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


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_sizes_that_a_call_lacks_are_the_preferred_ones(name):
    """A program may have been made on a processor whose kernels have other sizes."""

    def results(**attributes):
        call = CALLS[name]()
        call.attributes |= {"cpu_kernel": "gluon"} | attributes
        results = call.run()
        run = jax_gluon.debug.kernels()[-1]
        return results, {size: run[size] for size in ("block_k", "subtile", "stages")}

    sizes = ("cpu_block_k", "cpu_subtile", "cpu_stages")
    actual, found = results(**dict.fromkeys(sizes, np.int64(0)))
    expected, preferred = results(
        **{f"cpu_{size}": np.int64(number) for size, number in found.items()}
    )
    assert found == preferred
    assert found["block_k"] > 0
    assert found["stages"] >= 2
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["forward_int4", "backward", "backward_bias", "tangent"])
@pytest.mark.parametrize("case", ATTRIBUTES)
def test_attribute_out_of_range(name, case):
    attribute, setting, complaint = ATTRIBUTES[case]
    call = CALLS[name]()
    call.attributes[attribute] = setting
    assert f"attribute {attribute} {complaint}" in call.error()


@pytest.mark.parametrize(
    "attribute",
    ["symmetric", "float_minimum", "per_tensor", "center", "token_powers", "rotate", "has_visible"],
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
        ("token_powers", 1, "attribute token_powers is 1, expected 0 but for centered blocks of"),
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


# Of operands that both passes may have.
FLAGS = (
    "has_bias", "has_mask", "has_query_seq_lengths", "has_query_offset", "has_sinks",
    "has_segment_ids", "has_positions",
)  # fmt: skip


@pytest.mark.parametrize("flag", [*FLAGS, "dropout_threshold", "has_d_log_sum_exp"])
def test_flags_that_deny_an_operand_which_is_there(flag):
    call = attention(BACKWARD)
    call.attributes[flag] = np.int64(0)
    call.error()


@pytest.mark.parametrize("flag", [*FLAGS, "has_query_visible"])
def test_flags_that_announce_an_operand_which_is_not_there(flag):
    call = attention(FORWARD, full=False)
    call.attributes[flag] = np.int64(1)
    name = flag.removeprefix("has_")
    prefix = "query_" if name in ("segment_ids", "positions") else ""
    assert f"operand {prefix}{name} is missing" in call.error()


@pytest.mark.parametrize("target", [FORWARD, BACKWARD])
def test_heads_before_tokens_are_another_shape(target):
    call = attention(target, full=False)
    call.attributes["head_major"] = np.int64(1)
    assert "query has 5 heads" in call.error()


def test_bias_gradient_without_bias():
    call = attention(BACKWARD_BIAS, full=False)
    assert "attribute has_bias is 0, expected 1" in call.error()


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sinks"])
def test_tangents_and_their_flags_must_agree(name):
    call = attention(TANGENT)
    call.attributes[f"has_{name}_tangent"] = np.int64(0)
    call.error()
    call = attention(TANGENT, full=False)
    call.attributes |= {f"has_{name}_tangent": np.int64(1)}
    if name in ("bias", "sinks"):
        assert f"attribute has_{name} is 0, expected 1" in call.error()
    else:
        del call.operands[f"{name}_tangent"]
        call.error()


@pytest.mark.parametrize("target", [FORWARD, BACKWARD, BACKWARD_BIAS, TANGENT])
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


def test_an_unknown_instruction_set_fails_every_call_and_kills_nothing():
    targets = (FORWARD, BACKWARD, BACKWARD_BIAS, TANGENT, QUANTIZE)
    program = (
        "import sys, jax\n"
        "from tests.support import ffi_calls\n"
        "for target in sys.argv[1:]:\n"
        "    is_quantizer = target == ffi_calls.QUANTIZE\n"
        "    call = ffi_calls.quantize() if is_quantizer else ffi_calls.attention(target)\n"
        "    try:\n"
        "        call.run()\n"
        "    except jax.errors.JaxRuntimeError as error:\n"
        "        print(error)\n"
        "import jax_gluon._plugin\n"
        "print(jax_gluon._plugin.cpu_isa())\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, *targets],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_GLUON_CPU_ISA": "avx1024"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    *messages, isa = finished.stdout.splitlines()
    for target, message in zip(targets, messages, strict=True):
        assert f"{target}: JAX_GLUON_CPU_ISA is 'avx1024', expected one of those" in message
        assert "portable" in message
    assert isa == "unsupported"
