"""Programs for several NVIDIA GPUs, compiled where there is none: XLA's splits and cuDNN's calls.

`make test-cuda-compile` installs JAX's CUDA plugin, which compiles for a described GPU. Nothing is
run.
"""

import ctypes
import functools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gluon
from jax_gluon._cuda import cudnn

H100 = """
platform_name: "CUDA" dnn_version_info { major: 9 minor: 19 }
device_description_str: "NVIDIA H100 80GB HBM3"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84978434048
}
"""
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


def _load_cuda():
    """What the plugin loads where it finds a GPU, and the way to its compiler of PTX."""
    nvidia = pytest.importorskip("nvidia", reason="JAX's CUDA plugin is not installed")
    pytest.importorskip("jax_plugins.xla_cuda13")
    libraries = Path(next(iter(nvidia.__path__)))
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["PATH"] += os.pathsep + str(libraries / "cu13" / "bin")
    for name in ("cu13/lib/libcudart.so*", "cu13/lib/libnvrtc.so*", "cudnn/lib/libcudnn*.so*"):
        for path in sorted(libraries.glob(name)):
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:  # one that needs the driver
                continue


@pytest.fixture(scope="module")
def devices():
    _load_cuda()
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU: tests/cuda/test_numerics.py runs on it")
    topology = topologies.get_topology_desc(
        topology_name="1x1x4", topology="1x1x4", platform="cuda", target_config=H100
    )
    return list(topology.devices)


def gradient(*operands, **keywords):
    def loss(*operands):
        out = jax_gluon.dot_product_attention(*operands, **keywords)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1, 2))(*operands)


CUDNN = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
CASES = {
    "causal": (dict(is_causal=True), CUDNN),
    "int8": (dict(quantization="int8"), CUDNN),
    "odd": (dict(), CUDNN),
    "sinks": (dict(sinks=np.zeros(8, np.float32)), []),
    "xla": (dict(implementation="xla", is_causal=True), []),
}


@pytest.fixture
def described(devices, monkeypatch):
    """What calls of cuDNN ask of a GPU, answered for those that are described."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(cudnn._calls, "check_compute_capability", lambda least: float(least) <= 9)
    return devices


def compiled(function, *operands, **options):
    traced = jax.jit(function).trace(*operands)
    return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options).as_text()


# Of one hop of the ring: sends of key and value, or of both together.
OVERLAPPING = dict(
    xla_gpu_enable_latency_hiding_scheduler=True,
    xla_gpu_collective_permute_combine_threshold_bytes=1 << 30,
)
STEPS = r"(collective-permute-start|collective-permute-done|collective-permute|conditional)\("


ROWS = jax_gluon.QuantSpec(center=True)
BLOCKS = jax_gluon.QuantSpec(granularity="block", block_size=128)


# Two and three warpgroups with rows; keys of whole chunks and with a tail.
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("key", "S"), [(ROWS, 256), (BLOCKS, 256), (BLOCKS, 141)])
def test_products_of_codes_over_four_gpus(key, S, is_causal, described):
    """A kernel for each operand's codes, and for forward; no collective; cuDNN's backward."""
    mesh = Mesh(np.array(described).reshape(2, 2), ("data", "model"))
    sharding = NamedSharding(mesh, P("data", None, "model"))
    operands = [
        jax.ShapeDtypeStruct((4, T, heads, 128), jnp.bfloat16, sharding=sharding)
        for T, heads in ((300, 8), (S, 4), (S, 4))
    ]
    quantization = jax_gluon.AttentionQuantization(jax_gluon.QuantSpec(), key)
    attend = functools.partial(
        gradient, quantization=quantization, implementation="pallas", is_causal=is_causal
    )
    program = compiled(attend, *operands)
    assert not re.findall("|".join(COLLECTIVES), program)
    assert re.findall(r'custom_call_target="(__cudnn[^"]*)"', program) == CUDNN[1:]
    assert len(re.findall(r'custom_call_target="mosaic_gpu', program)) == 3


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_ring_over_four_gpus(layout, quantization, described):
    """Blocks are cuDNN's, and each is sent while the one before is computed with, not earlier."""
    mesh = Mesh(np.array(described), ("sequence",))
    sharding = NamedSharding(mesh, P(None, "sequence"))
    operands = [
        jax.ShapeDtypeStruct((1, 1 << 14, heads, 64), jnp.bfloat16, sharding=sharding)
        for heads in (8, 4, 4)
    ]
    attention = functools.partial(
        jax_gluon.context_parallel_attention,
        mesh=mesh, axis="sequence", strategy="ring", token_layout=layout, is_causal=True,
        quantization=quantization, implementation="cudnn",
    )  # fmt: skip
    program = compiled(attention, *operands, **OVERLAPPING)
    # Own keys, and on either side of a condition those of each of three hops.
    assert program.count(f'custom_call_target="{CUDNN[0]}"') == 7
    start, done = "collective-permute-start", "collective-permute-done"
    steps = re.findall(STEPS, program[program.index("\nENTRY") :])
    assert steps == [start, done, *[start, "conditional", done] * 2, "conditional"]


@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all"])
def test_other_strategies_over_four_gpus(strategy, described):
    mesh = Mesh(np.array(described), ("sequence",))
    sharding = NamedSharding(mesh, P(None, "sequence"))
    operands = [jax.ShapeDtypeStruct((1, 2048, 8, 64), jnp.bfloat16, sharding=sharding)] * 3

    def loss(*operands):
        out = jax_gluon.context_parallel_attention(
            *operands, mesh=mesh, axis="sequence", strategy=strategy, token_layout="zigzag",
            is_causal=True,
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) ** 2)

    program = compiled(jax.grad(loss, (0, 1, 2)), *operands)
    # All heads' tokens at once, or one's own block and those of three others, before or after it.
    calls = 1 if strategy == "all_to_all" else 12
    for name in CUDNN:
        assert program.count(f'custom_call_target="{name}"') == calls


@pytest.mark.parametrize("case", CASES)
def test_batch_and_heads_over_four_gpus(case, described):
    """No collective, and each pass of cuDNN once."""
    mesh = Mesh(np.array(described).reshape(2, 2), ("data", "model"))
    sharding = NamedSharding(mesh, P("data", None, "model"))
    keywords, calls = CASES[case]
    T = 255 if case == "odd" else 256
    operands = [
        jax.ShapeDtypeStruct((4, T, heads, 64), jnp.bfloat16, sharding=sharding)
        for heads in (8, 4, 4)
    ]
    program = compiled(functools.partial(gradient, **keywords), *operands)
    found = {x: len(re.findall(rf"\b{x}(-start)?\(", program)) for x in COLLECTIVES}
    assert found == dict.fromkeys(COLLECTIVES, 0)
    assert re.findall(r'custom_call_target="(__cudnn[^"]*)"', program) == calls
