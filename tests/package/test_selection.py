"""The choice of a pipeline, as a table."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from jax_gluon._plan import tuned_table
from jax_gluon._plan.selection import (
    KernelConfig,
    KernelProblem,
    Measurement,
    is_allowed,
    kernel_config,
    kernel_configs,
    select_kernel,
)

LARGE = KernelProblem(T=1024, S=1024, H=64, V=64)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, 1024),
        ({"S": 300}, 300),
        ({"T": 300}, 1024),
        ({"T": 300, "is_causal": True}, 300),
        ({"S": 300, "is_causal": True}, 300),
        ({"local_window": (100, 20)}, 121),
        ({"local_window": (100, 20), "is_causal": True}, 101),
        ({"local_window": (5000, 5000)}, 1024),
        ({"T": 1, "is_causal": True}, 1),
        ({"S": 0}, 0),
    ],
)
def test_the_most_keys_that_a_row_sees(changes, keys):
    problem = dataclasses.replace(LARGE, **changes)
    assert problem.keys == keys
    # One row after another, as the mask says it.
    left, right = problem.local_window or (problem.T, problem.S)
    seen = [
        sum(
            i - left <= j <= i + right and (j <= i or not problem.is_causal)
            for j in range(problem.S)
        )
        for i in range(problem.T)
    ]
    assert max(seen, default=0) <= keys
    if problem.S + left <= problem.T:
        assert max(seen) == keys


@pytest.mark.parametrize(
    ("changes", "expected", "words"),
    [
        ({}, "gluon", "at most 1024 keys, and the head dim is 64"),
        ({"S": 512}, "gluon", "512"),
        ({"S": 511}, "baseline", "at most 511 keys"),
        ({"H": 63}, "baseline", "the head dim is 63"),
        ({"H": 128}, "gluon", "128"),
        ({"T": 511, "is_causal": True}, "baseline", "at most 511 keys"),
        ({"T": 1}, "gluon", "1024"),
        ({"local_window": (255, 255)}, "baseline", "at most 511 keys"),
        ({"local_window": (256, 255)}, "gluon", "at most 512 keys"),
        ({"direction": "backward"}, "gluon", "1024"),
        ({"S": 0}, "baseline", "at most 0 keys"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_the_default(device, changes, expected, words):
    config, reason = select_kernel(dataclasses.replace(LARGE, **changes), device)
    assert config.pipeline == expected
    assert words in reason


def row(
    operands="float32", direction="forward", H=64, S=1024, baseline=1.0, gluon=0.9, device="cpu"
):
    problem = KernelProblem(S, S, H, H, operands, direction)
    seconds = {"baseline": baseline, "gluon": gluon}
    measured = {kernel_config(problem, device, name): seconds[name] for name in seconds}
    return Measurement(operands, direction, H, S, measured)


def test_what_was_measured_decides():
    config, reason = select_kernel(LARGE, "cpu", [row()])
    assert config.pipeline == "gluon"
    assert reason == (
        "measured here at 1024 keys and head dim 64: gluon takes 0.90 times as long as baseline"
    )
    for gluon in (1.1, 1.0):  # slower, as fast
        slower = row(gluon=gluon, device="metal")
        assert select_kernel(LARGE, "metal", [slower])[0].pipeline == "baseline"
    # Of other operands or the other direction: the default.
    others = [
        row(operands="int8", gluon=2.0, device="metal"),
        row(direction="backward", gluon=2.0, device="metal"),
    ]
    assert "measured" not in select_kernel(LARGE, "metal", others)[1]
    assert select_kernel(LARGE, "metal", others)[0].pipeline == "gluon"


def test_the_nearest_row_decides():
    rows = [
        row(S=256, gluon=3.0),
        row(S=2048, gluon=0.5),
        row(H=128, S=1024, gluon=4.0),
    ]
    for S, pipeline in ((128, "baseline"), (700, "baseline"), (800, "gluon"), (10**6, "gluon")):
        assert select_kernel(dataclasses.replace(LARGE, S=S), "cpu", rows)[0].pipeline == pipeline
    # The head dim goes before the keys.
    problem = dataclasses.replace(LARGE, S=2048, H=100)
    assert "head dim 128" in select_kernel(problem, "cpu", rows)[1]
    # No keys, no distance.
    assert "at most 0 keys" in select_kernel(dataclasses.replace(LARGE, S=0), "cpu", rows)[1]


ROOT = Path(__file__).resolve().parents[2]


def numbers(file: str, pattern: str) -> list[int]:
    """The groups of the first match in a source."""
    found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"))
    assert found, f"{file} has no {pattern}"
    return [int(group) for group in found.groups()]


def sizes(config):
    return config.block_q, config.block_k, config.subtile, config.stages


def test_the_sizes_are_those_of_the_cpu_kernels():
    """The defaults, and the most that kernels have room for."""
    blocks = "plugin/cpu/forward_blocks.h"
    (rows,) = numbers(blocks, r"kBlockRows = (\d+)")
    (keys,) = numbers(blocks, r"kBlockKeys = (\d+)")
    (codes,) = numbers(blocks, r"kSubtileKeys = (\d+)")
    (registers,) = numbers(blocks, r"kSubtileColumns = kInt8 \? kSubtileKeys : (\d+) \* Core::Isa")
    (lanes,) = numbers("plugin/cpu/simd_avx512.h", r"kLanes = (\d+)")
    int8 = dataclasses.replace(LARGE, operands="int8")
    assert sizes(kernel_config(LARGE, "cpu", "baseline")) == (rows, keys, keys, 1)
    assert sizes(kernel_config(LARGE, "cpu", "gluon")) == (rows, 512, registers * lanes, 2)
    assert sizes(kernel_config(int8, "cpu", "baseline")) == (rows, keys, codes, 1)
    assert sizes(kernel_config(int8, "cpu", "gluon")) == (rows, 512, codes, 2)
    (rows,) = numbers("plugin/cpu/attention_backward.h", r"kMaxRows = (\d+), kMinRows")
    (keys,) = numbers("plugin/cpu/attention_backward.h", r"kMaxTileKeys = (\d+)")
    problem = dataclasses.replace(LARGE, direction="backward")
    assert sizes(kernel_config(problem, "cpu", "baseline")) == (rows, keys, keys, 1)
    assert sizes(kernel_config(problem, "cpu", "gluon")) == (rows, 192, 96, 2)
    long = dataclasses.replace(problem, H=128, S=4096)
    assert sizes(kernel_config(long, "cpu", "gluon")) == (rows, 768, keys, 2)
    most, stages = numbers("plugin/call_decoder.cc", r"kMaxBlockKeys = (\d+), kMaxStages = (\d+)")
    largest = KernelConfig("gluon", rows, most // 192 * 192, 192, stages)
    assert is_allowed(largest, problem, "cpu")
    assert not is_allowed(
        dataclasses.replace(largest, block_k=most // 192 * 192 + 192), problem, "cpu"
    )
    assert not is_allowed(dataclasses.replace(largest, stages=stages + 1), problem, "cpu")


@pytest.mark.parametrize("device", ["cpu", "metal"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("operands", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("S", [64, 4096])
def test_what_is_tuned_is_allowed(device, direction, operands, S):
    problem = KernelProblem(S, S, 128, 128, operands, direction)
    configs = kernel_configs(problem, device)
    assert len(set(configs)) == len(configs) == (2 if device == "metal" else 5)
    assert {config.pipeline for config in configs} == {"baseline", "gluon"}
    for config in configs:
        assert is_allowed(config, problem, device)
        assert not is_allowed(dataclasses.replace(config, block_q=64), problem, device)
        assert not is_allowed(dataclasses.replace(config, subtile=5), problem, device)


def test_sizes_of_another_problem_give_their_pipeline():
    """A table of integers where the problem's codes have to be multiplied as floats."""
    measured = row(operands="int8", gluon=0.5)
    problem = dataclasses.replace(LARGE, operands="int8", has_integer_rows=False)
    config, reason = select_kernel(problem, "cpu", [measured])
    assert config == kernel_config(problem, "cpu", "gluon")
    assert "gluon is faster" in reason


@pytest.mark.parametrize("operands", ["float16", "bfloat16", "int8", "float32"])
@pytest.mark.parametrize("H", [64, 128, 256])
def test_the_sizes_are_those_of_the_shaders(operands, H):
    problem = dataclasses.replace(LARGE, operands=operands, H=H, V=H)
    element = "float " if operands == "float32" else "16 bits"
    table = "shaders/block_sizes.h"
    _, tile, _ = numbers(table, rf"\| {element} +\| +({H}) \| (\d+) +\| (\d+),")
    granule, subtile = numbers(table, rf"\| {element} +\| +{H} \| (\d+) +\| (\d+) +\| (?:yes|no)")
    (rows,) = numbers("shaders/bindings.h", r"kBlockRows = (\d+)")
    assert sizes(kernel_config(problem, "metal", "baseline")) == (rows, tile, tile, 1)
    assert sizes(kernel_config(problem, "metal", "gluon"))[:3] == (rows, granule, subtile)
    inexact = dataclasses.replace(problem, operands="int4", has_exact_codes=False)
    floats = dataclasses.replace(problem, operands="float32")
    backward = dataclasses.replace(problem, direction="backward")
    if operands in ("float16", "float32"):  # others are dequantized
        assert sizes(kernel_config(backward, "metal", "baseline")) == (rows, tile, 8, 1)
        stages = 1 if tile == 8 else 2
        assert sizes(kernel_config(backward, "metal", "gluon")) == (rows, granule, 8, stages)
    for pipeline in ("baseline", "gluon"):
        assert kernel_config(inexact, "metal", pipeline) == kernel_config(floats, "metal", pipeline)


@pytest.fixture
def shape(tmp_path, monkeypatch):
    """A large problem, where no table is."""
    pytest.importorskip("jax_gluon._plugin")
    monkeypatch.setenv("JAX_GLUON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("JAX_GLUON_KERNEL", raising=False)
    return jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.float32)


def chosen(x, **keywords):
    plan = jax_gluon.explain(x, x, x, **keywords)
    assert plan.forward is not None
    assert plan.backward is not None
    return plan.forward.pipeline, plan.backward.pipeline, plan.reasons


def test_the_argument_goes_before_the_environment(shape, monkeypatch):
    assert chosen(shape)[:2] == ("gluon", "gluon")
    monkeypatch.setenv("JAX_GLUON_KERNEL", "baseline")
    *pipelines, reasons = chosen(shape)
    assert pipelines == ["baseline", "baseline"]
    assert reasons[1:] == (
        "forward: JAX_GLUON_KERNEL is baseline",
        "backward: JAX_GLUON_KERNEL is baseline",
    )
    *pipelines, reasons = chosen(shape, kernel="gluon")
    assert pipelines == ["gluon", "gluon"]
    assert 'kernel="gluon" was asked for' in reasons[1]
    assert chosen(shape, kernel=("gluon", None))[:2] == ("gluon", "baseline")
    monkeypatch.setenv("JAX_GLUON_KERNEL", "fast")
    with pytest.raises(
        ValueError, match='JAX_GLUON_KERNEL is "fast"; allowed: "baseline", "gluon"'
    ):
        chosen(shape)


def test_the_environment_goes_before_the_table(shape, monkeypatch):
    path = tuned_table.table_path("cpu")
    assert path is not None
    tuned_table.save(path, "cpu", [row(), row(direction="backward", gluon=1.5)])
    *pipelines, reasons = chosen(shape)
    assert pipelines == ["gluon", "baseline"]
    assert "measured here" in reasons[1]
    assert "1.50 times" in reasons[2]
    monkeypatch.setenv("JAX_GLUON_KERNEL", "baseline")
    assert chosen(shape)[:2] == ("baseline", "baseline")


@pytest.mark.parametrize("kernel", ["baseline", "gluon"])
def test_the_choice_reaches_the_kernels(shape, kernel):
    def loss(x):
        out = jax_gluon.dot_product_attention(x, x, x, implementation="cpu", kernel=kernel)
        return out.sum()

    text = jax.jit(jax.grad(loss)).lower(shape).as_text()
    found = re.findall(r"cpu_pipeline = (\d)", text)
    assert found == [str(int(kernel == "gluon"))] * 2


@pytest.mark.parametrize(
    ("kernel", "found", "allowed"),
    [
        (KernelConfig("gluon", 96, 256, 256, 2), "block_k=256", "at least twice it"),
        (KernelConfig("gluon", 96, 512, 100, 2), "subtile=100", "subtile 128 or 256"),
        (KernelConfig("gluon", 64, 512, 256, 2), "block_q=64", "block_q 96"),
        (KernelConfig("gluon", 96, 8192, 256, 2), "block_k=8192", "at most 4096"),
        (KernelConfig("gluon", 96, 512, 256, 1), "stages=1", "stages 2 to 8"),
        (KernelConfig("baseline", 96, 512, 512, 1), "block_k=512", "64, 128, 192 or 256"),
        ((None, KernelConfig("baseline", 96, 64, 64, 1)), "subtile=64", "backward on cpu has"),
        ((None, KernelConfig("gluon", 96, 300, 96, 2)), "block_k=300", "a multiple of subtile"),
    ],
)
def test_sizes_that_a_device_lacks(shape, kernel, found, allowed):
    with pytest.raises(ValueError, match=r"jax_gluon\.explain: kernel is KernelConfig") as error:
        jax_gluon.explain(shape, shape, shape, kernel=kernel)
    assert found in str(error.value)
    assert allowed in str(error.value)


def test_sizes_of_metal_are_compiled_in(shape, require):
    require("metal")
    config = KernelConfig("gluon", 32, 64, 32, 2)
    with pytest.raises(ValueError, match=r"forward on metal has .*whose sizes are compiled in"):
        jax_gluon.explain(shape, shape, shape, kernel=config, implementation="metal")


def test_sizes_reach_the_kernels(shape):
    forward, backward = (
        KernelConfig("gluon", 96, 768, 128, 3),
        KernelConfig("gluon", 96, 384, 96, 4),
    )

    def loss(x):
        out = jax_gluon.dot_product_attention(
            x, x, x, implementation="cpu", kernel=(forward, backward)
        )
        return out.sum()

    text = jax.jit(jax.grad(loss)).lower(shape).as_text()
    for name, values in {"block_k": (768, 384), "subtile": (128, 96), "stages": (3, 4)}.items():
        assert re.findall(rf"cpu_{name} = (\d+)", text) == [str(x) for x in values]
    plan = jax_gluon.explain(shape, shape, shape, kernel=forward)
    assert plan.forward == forward
    assert plan.backward is not None
    assert plan.backward.pipeline == "gluon"
    assert plan.reasons[1] == "forward: these sizes were asked for"


def test_the_choice_reaches_metal(shape, require):
    require("metal")
    assert chosen(shape, implementation="metal")[:2] == ("gluon", "gluon")
    x = np.random.default_rng(0).standard_normal((3, 2, 70, 2, 40)).astype(np.float32)

    def loss(kernel, query):
        out = jax_gluon.dot_product_attention(
            query, x[1], x[2], implementation="metal", kernel=kernel
        )
        return (out**2).sum()

    gradients = {kernel: jax.grad(loss, 1)(kernel, x[0]) for kernel in ("baseline", "gluon")}
    np.testing.assert_allclose(gradients["gluon"], gradients["baseline"], rtol=1e-5, atol=1e-5)


def test_a_wish_for_operands(shape):
    plan = jax_gluon.explain(shape, shape, shape, quantization="int8")
    assert plan.forward is not None
    assert plan.forward.subtile == 64
