"""`python -m demo.images`: handwritten digits from their names, with quantized attention.

Trains a small rectified-flow transformer on scikit-learn's digits, then samples one grid in
float32, INT8 and INT4 from the same noise and says how far they part, step by step of the sampler.
Trains it once more with INT8 attention, forward and backward, from the same weights.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np

import jax_gluon
from demo import digits
from demo.image_model import ImageModelConfig, initial_weights, velocity
from demo.rectified_flow import Velocity, distances, sampler, train
from demo.training import kernels_that_ran, peak_memory

QUANTIZATIONS = {"float32": None, "INT8": "int8", "INT4": "int4"}
PEAK = 2.0  # pixels are in [-1, 1]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.images", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each run")
    parser.add_argument("--batch", type=int, default=32, help="images in a step")
    parser.add_argument("--side", type=int, default=16, help="pixels, a multiple of 8")
    parser.add_argument("--sampler-steps", type=int, default=28)
    parser.add_argument("--each", type=int, default=5, help="samples of each digit")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise")
    parser.add_argument(
        "--train-in", nargs="+", choices=("float32", "INT8", "INT4"), default=["float32", "INT8"],
        help="attention of the runs; the first run's weights are sampled in every format",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("images.png"), help="the picture")
    return parser.parse_args(arguments)


def model(side: int) -> ImageModelConfig:
    return ImageModelConfig(
        rows=side // digits.PATCH, columns=side // digits.PATCH, patch_width=digits.PATCH**2,
        text_tokens=digits.NAME_LENGTH, text_width=len(digits.ALPHABET),
        joint_blocks=2, single_blocks=2, heads=4, head_dim=32,
    )  # fmt: skip


def velocity_in(config: ImageModelConfig, quantization: str | None) -> Velocity:
    attention = functools.partial(jax_gluon.dot_product_attention, quantization=quantization)
    return lambda weights, patches, time, text: velocity(
        weights, config, attention, patches, time, text
    )


def table(paths: dict[str, np.ndarray]) -> str:
    """How far the samples of each format are from the first's, at five steps of the sampler."""
    first, *others = paths
    steps = len(paths[first])
    shown = sorted({max(1, round(steps * part)) for part in (0, 0.25, 0.5, 0.75, 1)})
    lines = [
        "| sampler step | " + " | ".join(f"{name} PSNR | cosine" for name in others) + " |",
        "|---" * (1 + 2 * len(others)) + "|",
    ]
    for i in shown:
        found = [distances(paths[name][i - 1], paths[first][i - 1], PEAK) for name in others]
        cells = [f"{x['psnr']:.1f} dB | {x['cosine']:.6f}" for x in found]
        lines.append(f"| {i} of {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grid(images: np.ndarray, each: int) -> np.ndarray:
    """Images ordered by digit to one picture, a column a digit."""
    side = images.shape[1]
    columns = images.reshape(-1, each, side, side).transpose(1, 2, 0, 3)
    return columns.reshape(each * side, -1)


def plot(grids: dict[str, np.ndarray], losses: dict[str, np.ndarray], path: Path) -> None:
    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic(
        [list(range(3)), [3, "loss", "loss"]] if len(grids) > 3 else [list(range(3)), ["loss"] * 3],
        figsize=(12, 5), layout="constrained",
    )  # fmt: skip
    for i, (name, picture) in enumerate(list(grids.items())[:4]):
        axes[i].imshow(picture, cmap="gray", vmin=-1, vmax=1)
        axes[i].set_title(name, fontsize=9)
        axes[i].axis("off")
    for style, (name, values) in zip(("-", "--", ":"), losses.items(), strict=False):
        width = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axes["loss"].plot(smooth, style, label=f"{name} attention")
    axes["loss"].set(xlabel="step", ylabel="loss", yscale="log", title="Training")
    axes["loss"].legend()
    axes["loss"].grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    config = model(options.side)
    data = digits.load(options.side)
    start = initial_weights(jax.random.key(options.seed), config)
    count = sum(x.size for x in jax.tree.leaves(start))
    print(
        f"{len(data.labels):,} digits of {options.side} x {options.side} pixels; "
        f"{count:,} weights, {config.tokens} tokens, {os.cpu_count()} processors"
    )
    labels = np.repeat(np.arange(10), options.each)
    text = digits.text_of(labels)
    rng = np.random.default_rng(options.seed)
    noise = rng.standard_normal((len(labels), config.image_tokens, config.patch_width), np.float32)

    flows = {name: velocity_in(config, each) for name, each in QUANTIZATIONS.items()}
    samplers = {name: sampler(flow) for name, flow in flows.items()}
    losses, grids, lines = {}, {}, []

    def drawn(weights: object, name: str) -> np.ndarray:
        return samplers[name](weights, noise, text, options.sampler_steps)

    def keep(title: str, path: np.ndarray) -> None:
        images = digits.images_of(path[-1])
        grids[title] = grid(images, options.each)
        right = int((digits.read(images) == labels).sum())
        lines.append(f"{title}: {right} of {len(labels)} are read as the digit asked for")

    for name in options.train_in:
        jax_gluon.debug.kernels()
        weights, losses[name] = train(
            flows[name], start, data.batches(options.steps, options.batch, options.seed),
            steps=options.steps, seed=options.seed, name=f"train in {name}",
        )  # fmt: skip
        print(f"Kernels: {', '.join(kernels_that_ran())}", flush=True)
        if name == options.train_in[0]:
            paths = {other: drawn(weights, other) for other in QUANTIZATIONS}
            for other, path in paths.items():
                keep(f"trained in {name}, sampled in {other}", path)
            print(f"\nFrom the same noise, against float32:\n\n{table(paths)}\n", flush=True)
        else:
            keep(f"trained and sampled in {name}", drawn(weights, name))
        # After each run: the picture of one that is ended early shows what there was.
        plot(grids, losses, options.output)
    print("\n".join(lines))
    last = max(1, options.steps // 10)
    for name, values in losses.items():
        print(f"{name}: loss {values[0]:.4f} at first, {values[-last:].mean():.4f} over the last "
              f"{last} steps")  # fmt: skip
    print(f"Peak memory {peak_memory():,.0f} MiB. Picture: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
