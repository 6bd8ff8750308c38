"""`python -m benchmarks.flux`: image transformers of FLUX's attention, how stable and how fast.

`drift` samples a latent image with attention in every format from the same noise: nothing may turn
non-finite, and latents may leave those of float32 attention by no more than a bound. `time` takes
turns between formats and kernels, over attention alone and over a step of the sampler.

Attention has FLUX's geometry: 24 heads of 128, 512 tokens of text and 4,096 of an image of
1024 x 1024 pixels. Blocks are FLUX's in kind and width and fewer in number. Weights are random and
in bfloat16, sums in float32; gates, shifts and scales are N(0, 0.5^2), and queries and keys leave
their norms so large that logits have a standard deviation of `--logits`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jax_gluon
from benchmarks.report import machine
from demo.image_model import Attention, ImageModelConfig, initial_weights, velocity
from demo.rectified_flow import distances, times

#: A step of Euler's method: latent, time before and time after to the latent.
Step = Callable[[jax.Array, float, float], jax.Array]

MODULATION = 0.5
#: Of the schedule of FLUX for 4,096 image tokens, exp(1.15).
SHIFT = 3.16
#: Of a latent's noise, from one end of four standard deviations to the other.
PEAK = 8.0
#: Largest distance of the last latent from that of float32 attention, over the way from the noise.
BOUNDS = {"bfloat16": 0.05, "int8": 0.05, "int4": 0.25}


@dataclass(frozen=True)
class Variant:
    """Attention of operands in `dtype`, quantized where `quantization` says so."""

    name: str
    dtype: Any = jnp.bfloat16
    quantization: str | None = None
    kernel: str | None = None

    def attention(self) -> Attention:
        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            operands = (x.astype(self.dtype) for x in (query, key, value))
            if self.name.startswith("jax.nn"):
                return jax.nn.dot_product_attention(*operands)
            return jax_gluon.dot_product_attention(
                *operands, quantization=self.quantization, kernel=self.kernel
            )

        return attend


FORMATS = (
    Variant("float32", jnp.float32),
    Variant("bfloat16"),
    Variant("int8", quantization="int8"),
    Variant("int4", quantization="int4"),
)
#: The first is what the others are compared with.
TIMED = (
    Variant("bfloat16"),
    Variant("jax.nn bfloat16"),
    Variant("float32", jnp.float32),
    *(
        Variant(f"{name} {kernel}", quantization=name, kernel=kernel)
        for name in ("int8", "int4")
        for kernel in ("gluon", "baseline")
    ),
)


@dataclass(frozen=True)
class Transformer:
    config: ImageModelConfig
    weights: Any
    text: jax.Array
    noise: jax.Array

    def step(self, variant: Variant) -> Step:
        attention = variant.attention()

        @jax.jit
        def step(weights, x, text, start, end):
            moment = jnp.full(1, start, jnp.float32)
            return x + (end - start) * velocity(weights, self.config, attention, x, moment, text)

        return lambda x, start, end: step(self.weights, x, self.text, start, end)


def make(options: argparse.Namespace) -> Transformer:
    config = ImageModelConfig(
        rows=options.side, columns=options.side, patch_width=64, text_tokens=options.text_tokens,
        text_width=4096, joint_blocks=options.joint, single_blocks=options.single,
        heads=options.heads, head_dim=options.head_dim, mlp_ratio=options.mlp_ratio,
        # As FLUX: an eighth of the head dim has no position.
        rotary_width=options.head_dim * 7 // 16,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(options.seed), 3)
    weights = jax.jit(
        lambda key: initial_weights(
            key, config, modulation=MODULATION, logits=options.logits, dtype=jnp.bfloat16
        )
    )(keys[0])
    text = jax.random.normal(keys[1], (1, config.text_tokens, config.text_width))
    noise = jax.random.normal(keys[2], (1, config.image_tokens, config.patch_width))
    return Transformer(config, weights, text, noise)


def drift(run: dict[str, Step], noise: jax.Array, steps: int) -> Iterator[dict[str, Any]]:
    """For each step and each run but the first, how far its latent is from the first's."""
    first, *others = run
    latents = dict.fromkeys(run, noise)
    # 4 steps are those of the model that was distilled to them, which has no shift.
    moments = times(steps, 1.0 if steps <= 4 else SHIFT)
    for i in range(steps):
        for name, step in run.items():
            latents[name] = step(latents[name], moments[i], moments[i + 1]).block_until_ready()
        expected = np.asarray(latents[first])
        way = float(np.linalg.norm(expected - np.asarray(noise)))
        for name in others:
            found = np.asarray(latents[name])
            yield {
                "step": i + 1, "name": name, "finite": bool(np.isfinite(found).all()),
                "way": float(np.linalg.norm(found - expected)) / way,
                **distances(found, expected, PEAK),
            }  # fmt: skip


def show_drift(rows: Iterable[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Prints a table of five steps as they come, since all may take an hour."""
    shown = {1, *(max(1, round(steps * part)) for part in (0.25, 0.5, 0.75, 1))}
    print("| step | attention | relative L1 | cosine | PSNR | distance / way from the noise |")
    print("|---|---|---|---|---|---|")
    kept = []
    for x in tqdm(rows, total=steps * (len(FORMATS) - 1), unit="latent", file=sys.stderr):
        kept.append(x)
        if x["step"] in shown:
            print(
                f"| {x['step']} of {steps} | {x['name']} | {100 * x['l1']:.3f} % | "
                f"{x['cosine']:.6f} | {x['psnr']:.1f} dB | {100 * x['way']:.2f} % |",
                flush=True,
            )
    print()
    return kept


def failures(rows: list[dict[str, Any]], steps: int) -> list[str]:
    found = [f"{x['name']} is not finite at step {x['step']}" for x in rows if not x["finite"]]
    return found + [
        f"{x['name']} ends {100 * x['way']:.2f} % of the way from float32's latent; "
        f"allowed: {100 * BOUNDS[x['name']]:.0f} %"
        for x in rows
        if x["step"] == steps and not x["way"] <= BOUNDS[x["name"]]
    ]


def take_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, wall clock; each has run once before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in tqdm([*runs, *[*runs] * rounds], unit="call", file=sys.stderr):
        start = time.perf_counter()
        jax.block_until_ready(runs[name]())
        seconds[name].append(time.perf_counter() - start)
    return {name: own[1:] for name, own in seconds.items()}


def time_table(what: str, seconds: dict[str, list[float]]) -> str:
    first = statistics.median(next(iter(seconds.values())))
    lines = [
        f"| {what} | median ms | spread | time of {next(iter(seconds))} / its time |",
        "|---|---|---|---|",
    ]
    for name, own in seconds.items():
        median = statistics.median(own)
        low, _, high = statistics.quantiles(own, n=4)
        lines.append(
            f"| {name} | {1e3 * median:.0f} | {100 * (high - low) / median:.0f} % | "
            f"{first / median:.2f} |"
        )
    return "\n".join(lines)


def time_attention(transformer: Transformer, rounds: int) -> dict[str, list[float]]:
    config = transformer.config
    shape = (1, config.tokens, config.heads, config.head_dim)
    operands = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key in jax.random.split(jax.random.key(1), 3)
    ]

    def run(variant: Variant) -> Callable[[], Any]:
        own = [x.astype(variant.dtype) for x in operands]
        call = jax.jit(variant.attention())
        return lambda: call(*own)

    return take_turns({variant.name: run(variant) for variant in TIMED}, rounds)


def time_step(transformer: Transformer, rounds: int) -> dict[str, list[float]]:
    def run(variant: Variant) -> Callable[[], Any]:
        step = transformer.step(variant)
        return lambda: step(transformer.noise, 1.0, 0.75)

    return take_turns({variant.name: run(variant) for variant in TIMED}, rounds)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    summary, *details = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flux", description=summary, epilog=" ".join(details)
    )
    parser.add_argument("--only", choices=["drift", "time"], help="default: one after the other")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 28], help="of the sampler")
    parser.add_argument("--rounds", type=int, default=5, help="turns of a timing, 2 or more")
    parser.add_argument("--joint", type=int, default=1, help="joint blocks (FLUX has 19)")
    parser.add_argument("--single", type=int, default=1, help="single blocks (FLUX has 38)")
    parser.add_argument("--mlp-ratio", type=int, default=4, help="FLUX has 4")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--side", type=int, default=64, help="patches along a side of the image")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--logits", type=float, default=3.0, help="standard deviation of logits")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Machine: {', '.join(f'{name} {value}' for name, value in machine().items())}")
    print(f"Command: python -m benchmarks.flux {command}; {threads} threads\n")
    transformer = make(options)
    config = transformer.config
    print(
        f"{config.joint_blocks} joint and {config.single_blocks} single blocks of width "
        f"{config.width}, MLP {config.mlp_ratio} times as wide; {config.tokens:,} tokens, "
        f"{config.heads} heads of {config.head_dim}; logits of standard deviation "
        f"{options.logits:g}\n"
    )
    wrong = []
    if options.only != "time":
        run = {variant.name: transformer.step(variant) for variant in FORMATS}
        for steps in options.steps:
            rows = show_drift(drift(run, transformer.noise, steps), steps)
            wrong += failures(rows, steps)
    if options.only != "drift":
        attention = time_attention(transformer, options.rounds)
        print(time_table("attention", attention) + "\n", flush=True)
        print(time_table("a step", time_step(transformer, options.rounds)) + "\n", flush=True)
    for failure in wrong:
        print(failure, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
