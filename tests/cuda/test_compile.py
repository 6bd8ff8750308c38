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


@pytest.mark.parametrize("case", CASES)
def test_batch_and_heads_over_four_gpus(case, devices, monkeypatch):
    """No collective, and each pass of cuDNN once."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(cudnn._calls, "check_compute_capability", lambda least: float(least) <= 9)
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"))
    sharding = NamedSharding(mesh, P("data", None, "model"))
    keywords, calls = CASES[case]
    T = 255 if case == "odd" else 256
    operands = [
        jax.ShapeDtypeStruct((4, T, heads, 64), jnp.bfloat16, sharding=sharding)
        for heads in (8, 4, 4)
    ]
    traced = jax.jit(functools.partial(gradient, **keywords)).trace(*operands)
    program = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
    found = {x: len(re.findall(rf"\b{x}(-start)?\(", program)) for x in COLLECTIVES}
    assert found == dict.fromkeys(COLLECTIVES, 0)
    assert re.findall(r'custom_call_target="(__cudnn[^"]*)"', program) == calls
