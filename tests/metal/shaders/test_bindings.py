"""The binding table: what kernels declare, what the encoder binds, and how C++ lays it out."""

from __future__ import annotations

import os
import re
import subprocess

import numpy as np
import pytest

from jax_gluon._quantization.formats import QuantSpec
from tests.support.metal import encoder
from tests.support.metal.encoder import SHADERS, Encoder, Problem, enum, library, struct
from tests.support.metal.problems import draw, feature

STEMS = sorted(path.stem for path in SHADERS.glob("*.metal"))
WHOLE = QuantSpec(symmetric=False, center=True)


def slot_name(argument, prefix=""):
    return f"k{prefix}" + "".join(part.title() for part in argument.split("_"))


def buffers_of(kernel):
    return {x["name"]: x for x in kernel["arguments"] if x["kind"] == 0 and "index" in x}


#: Arguments that are named for what a kernel has of them.
ALIASES = {"kPartial": "kPartialStatistics", "kStatistics": "kRowStatistics",
           "kQuantizeX": "kQuantizeInput"}  # fmt: skip


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_declare_the_table(stem):
    prefix = "Quantize" if stem == "quantize" else ""
    slots = enum("QuantizeBuffer" if prefix else "AttentionBuffer")
    kernels = library(stem).declared["kernels"]
    assert len(kernels) >= 3
    for kernel in kernels:
        for argument, declared in buffers_of(kernel).items():
            name = slot_name(argument, prefix)
            name = ALIASES.get(name, name)
            assert declared["index"] == slots[name], (kernel["name"], argument)
            if declared["reference"]:
                assert declared["size"] == struct(f"{prefix or 'Attention'}Parameters").itemsize
                assert declared["address_space"] == "constant"


@pytest.mark.parametrize("stem", STEMS)
def test_address_spaces(stem):
    import softmetal

    softmetal.check(SHADERS / f"{stem}.metal")


@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem != "quantize"])
def test_function_constants(stem):
    constants = library(stem).declared["function_constants"]
    found = {slot_name(x["name"]): x["index"] for x in constants}
    assert found == enum("FunctionConstant")
    assert {x["type"] for x in constants} == {"int"}


@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem != "quantize"])
def test_every_slot_is_bound(stem, monkeypatch):
    """A problem that has everything leaves no declared slot to the stand-in, nor to nothing."""
    given: dict[str, dict[int, int]] = {}

    def record(self, stem, name, grid, **options):
        given[name] = {slot: x.nbytes for slot, x in self.buffers.items()}

    q, k, v, d_out = draw("float32", (WHOLE,) * 3)
    problem = Problem(q, k, v, **feature("everything"))
    found = encoder.forward(problem)
    d_lse = np.ones((problem.B, problem.T, problem.N), np.float32)
    monkeypatch.setattr(Encoder, "dispatch", record)
    encoder.forward(problem)
    encoder.decode(problem, 2)
    encoder.backward(problem, found, d_out, d_lse)
    encoder.backward_bias(problem, found, d_out, d_lse)
    tangents = dict(zip(("query", "key", "value"), draw("float32"), strict=False))
    encoder.tangent(problem, tangents | {"bias": problem.bias})
    implicit = {enum("AttentionBuffer")[x] for x in ("kParameters", "kBatchOffsets")}
    ran = [kernel for kernel in library(stem).declared["kernels"] if kernel["name"] in given]
    assert ran
    for kernel in ran:
        bound = {x["index"] for x in buffers_of(kernel).values()} - implicit
        assert bound <= set(given[kernel["name"]])
        assert min(given[kernel["name"]].values()) > 0


def test_unbound_slots_are_refused():
    import softmetal

    kernel = library("attention_forward").kernel(
        "attention_forward_float_64", dict.fromkeys(range(3), 0)
    )
    with pytest.raises(softmetal.Error, match="not bound"):
        kernel(grid=1, threads=128, buffers=[np.zeros(1024, np.uint8)])


def test_cpp_lays_structs_out_alike(tmp_path):
    text = (SHADERS / "bindings.h").read_text(encoding="utf-8")
    checks = ["#include <cstddef>", '#include "bindings.h"']
    for name in re.findall(r"struct (\w+) \{", text):
        layout = struct(name)
        checks.append(f"static_assert(sizeof({name}) == {layout.itemsize});")
        assert layout.fields is not None
        for field, (_, offset, *_) in layout.fields.items():
            checks.append(f"static_assert(offsetof({name}, {field}) == {offset});")
    source = tmp_path / "layout.cc"
    source.write_text("\n".join(checks), encoding="utf-8")
    clang = os.environ.get("SOFTMETAL_CLANG", "clang++-19")
    command = [clang, "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{SHADERS}", source]
    subprocess.run(command, check=True)
