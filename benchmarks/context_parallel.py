"""`python -m benchmarks.context_parallel`: causal attention of tokens that several GPUs share.

One process, all of its devices; tokens are zigzag, so that devices have equal work. One device
alone runs the same attention of all tokens beside them, in turns; scaling is its time over that of
all devices together, 1 where P devices take a P-th.

    python -m benchmarks.context_parallel --tokens 32768 131072
    python -m benchmarks.context_parallel --check

Sends overlap with computing where XLA is told to hide latencies: `--overlap` sets the options of
docs/ring-attention.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gluon
from benchmarks import collectives
from benchmarks.nvidia import measure
from jax_gluon._quantization.formats import PRESETS

LAYOUT = "zigzag"
OVERLAPPING = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_collective_permute_combine_threshold_bytes": 1 << 33,
}


def on_the_wire(preset: str) -> jax_gluon.AttentionQuantization:
    """Keys and values as the preset has them; the query, which stays, as it is."""
    return dataclasses.replace(PRESETS[preset], query=None)


STRATEGIES: dict[str, dict[str, Any]] = {
    "ring": {"strategy": "ring"},
    "ring int8": {"strategy": "ring", "quantization": on_the_wire("int8")},
    "ring int4": {"strategy": "ring", "quantization": on_the_wire("int4")},
    "all_gather": {"strategy": "all_gather"},
    "all_to_all": {"strategy": "all_to_all"},
}
_NAMES = ("out", "dQ", "dK", "dV")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a problem, of bfloat16 operands."""

    T: int
    B: int = 1
    N: int = 16
    K: int = 16
    H: int = 128

    def operands(self, sharding: Any) -> list[jax.Array]:
        """Query, key, value and the cotangent of the output, drawn where they are to be."""
        heads = self.N, self.K, self.K, self.N

        @functools.partial(jax.jit, out_shardings=sharding)
        def draw() -> list[jax.Array]:
            keys = jax.random.split(jax.random.key(0), 4)
            return [
                jax.random.normal(key, (self.B, self.T, n, self.H), jnp.bfloat16)
                for key, n in zip(keys, heads, strict=True)
            ]

        return draw()


def passes(attend: Callable[..., jax.Array], direction: str) -> Callable[..., Any]:
    """Forward, or output and all gradients."""
    if direction == "forward":
        return lambda q, k, v, d_out: (attend(q, k, v),)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(d_out)

    return both


def alone(**keywords: Any) -> Callable[..., jax.Array]:
    """Attention of all tokens by one device."""
    return functools.partial(jax_gluon.dot_product_attention, is_causal=True, **keywords)


def together(mesh: Any, keywords: dict[str, Any]) -> Callable[..., jax.Array]:
    """Of tokens that are sharded already, in the order of the layout."""
    return functools.partial(
        jax_gluon.context_parallel_attention,
        mesh=mesh, axis="sequence", token_layout=LAYOUT, is_causal=True, **keywords,
    )  # fmt: skip


def compiled(function: Callable[..., Any], operands: list[jax.Array], options: Any) -> Any:
    return jax.jit(function).lower(*operands).compile(compiler_options=options)


def compare(mesh: Any, sizes: Sizes, names: list[str], rounds: int, options: Any) -> None:
    """A row for each pass: milliseconds, and scaling."""
    devices = mesh.devices.size
    sharded = sizes.operands(NamedSharding(mesh, P(None, "sequence")))
    whole = sizes.operands(jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))
    for direction in ("forward", "both"):
        runs = {"one": compiled(passes(alone(), direction), whole, options)}
        for name in names:
            attend = together(mesh, STRATEGIES[name])
            runs[name] = compiled(passes(attend, direction), sharded, options)
        given = {name: whole if name == "one" else sharded for name in runs}
        times = measure(
            {
                name: functools.partial(lambda run, x, *_: run(*x), run, given[name])
                for name, run in runs.items()
            },
            [],
            rounds,
        )
        cells = [f"{times['one']:.2f}"]
        cells += [f"{times[x]:.2f} ({times['one'] / devices / times[x]:.2f})" for x in names]
        print(f"| {sizes.T} | {direction} | " + " | ".join(cells) + " |", flush=True)


def rate(mesh: Any, mebibytes: int) -> float:
    """GB/s from each device to the next, all at once: less where GPUs can't reach each other."""
    spread = NamedSharding(mesh, P("sequence"))
    devices = mesh.devices.size
    x = jax.device_put(jnp.zeros(devices * mebibytes << 20, jnp.uint8), spread)
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    send = functools.partial(jax.lax.ppermute, axis_name="sequence", perm=pairs)
    spec = P("sequence")
    run = jax.jit(jax.shard_map(send, mesh=mesh, in_specs=spec, out_specs=spec))
    return (mebibytes << 20) / 1e6 / measure({"send": run}, [x], 5)["send"]


def count(mesh: Any, sizes: Sizes, names: list[str], options: Any) -> None:
    """Bytes that a device sends, by the formula and in the program; and what it needs of memory."""
    devices = mesh.devices.size
    sharded = sizes.operands(NamedSharding(mesh, P(None, "sequence")))
    shard = 2 * sharded[1].nbytes / devices
    print("\n| | pass | MiB by the formula | in the program | temporary, in shards of K and V |")
    print("|---|---|---|---|---|")
    for name in names:
        attend = together(mesh, STRATEGIES[name])
        plan = jax_gluon.explain_context_parallel(
            *sharded[:3], mesh=mesh, axis="sequence", token_layout=LAYOUT, is_causal=True,
            **STRATEGIES[name],
        )  # fmt: skip
        traffic = plan.traffic[plan.strategy]
        for direction, formula in (("forward", traffic.forward), ("both", traffic.total)):
            program = compiled(passes(attend, direction), sharded, options)
            found = collectives.sent_by_all(program, devices)
            memory = program.memory_analysis().temp_size_in_bytes / shard
            mib = f"{formula / 2**20:.1f} | {found / 2**20:.1f}"
            print(f"| {name} | {direction} | {mib} | {memory:.1f} |", flush=True)


def check(mesh: Any, sizes: Sizes, names: list[str], options: Any) -> None:
    """Relative L2 errors against float32 attention of all tokens by one device."""
    devices = mesh.devices.size
    first = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    whole = sizes.operands(first)
    spread = NamedSharding(mesh, P(None, "sequence"))
    sharded = [jax.device_put(jax_gluon.reorder_tokens(x, devices, LAYOUT), spread) for x in whole]
    with jax.default_matmul_precision("highest"):
        exact = passes(alone(implementation="xla"), "both")
        wide = [x.astype(jnp.float32) for x in whole]
        wanted = [np.asarray(x, np.float64) for x in jax.jit(exact)(*wide)]
    print("\n| | " + " | ".join(_NAMES) + " |\n|---|" + "---|" * len(_NAMES))
    for name in ("one", *names):
        attend = alone() if name == "one" else together(mesh, STRATEGIES[name])
        given = whole if name == "one" else sharded
        found = list(compiled(passes(attend, "both"), given, options)(*given))
        if name != "one":
            found = [
                jax_gluon.restore_tokens(jax.device_put(x, first), devices, LAYOUT) for x in found
            ]
        errors = [
            np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)
            for x, y in zip(found, wanted, strict=True)
        ]
        print(f"| {name} | " + " | ".join(f"{x:.1e}" for x in errors) + " |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    names = list(STRATEGIES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.context_parallel", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="default: as many as heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--names", nargs="*", choices=names, default=names)
    parser.add_argument("--check", action="store_true", help="errors and bytes, no times")
    parser.add_argument("--link", type=int, default=256, help="MiB by which the rate is measured")
    parser.add_argument("--overlap", action="store_true", help="have XLA hide what is sent")
    options = parser.parse_args(arguments)
    devices = jax.devices()
    if len(devices) < 2:
        parser.error(f"there is {len(devices)} device; allowed: at least 2")
    mesh = jax.make_mesh((len(devices),), ("sequence",), axis_types=(AxisType.Auto,))
    for tokens in options.tokens:
        if tokens % (2 * len(devices)):
            parser.error(f"--tokens is {tokens}; allowed: multiples of {2 * len(devices)}")
    kind = devices[0].device_kind
    print(f"{len(devices)} x {kind}, jax {jax.__version__}, {options.rounds} rounds")
    print(f"a device sends {rate(mesh, options.link):.1f} GB/s to the next")
    flags = OVERLAPPING if options.overlap else None
    H, N = options.head_dim, options.heads
    sizes = [Sizes(T, N=N, K=options.kv_heads or N, H=H) for T in options.tokens]
    if options.check:
        for each in sizes:
            print(f"\n{each}")
            check(mesh, each, options.names, flags)
            count(mesh, each, options.names, flags)
        return
    print(f"\n| T | pass | one | {' | '.join(options.names)} |")
    print("|---|---|---|" + "---|" * len(options.names))
    for each in sizes:
        compare(mesh, each, options.names, options.rounds, flags)


if __name__ == "__main__":
    main()
