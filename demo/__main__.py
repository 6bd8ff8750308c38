"""`python -m demo`: train with float and with quantized attention, compare, plot."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import textwrap
from pathlib import Path

import matplotlib as mpl
import numpy as np

from demo import text as demo_text
from demo.model import ModelConfig
from demo.training import Run, peak_memory, sample, train

QUANTIZATIONS = {"float32": None, "INT8": "int8", "INT4": "int4"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each run")
    parser.add_argument("--batch", type=int, default=4, help="excerpts in a step")
    parser.add_argument("--length", type=int, default=256, help="characters in an excerpt")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and sample")
    parser.add_argument(
        "--attention", nargs="+", choices=QUANTIZATIONS, default=list(QUANTIZATIONS),
        help="the runs to compare, in this order",
    )  # fmt: skip
    parser.add_argument(
        "--implementation", choices=("cpu", "metal"), help="default: jax_gluon's choice"
    )
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the plot's file")
    return parser.parse_args(arguments)


def plot(runs: dict[str, Run], written: str, path: Path) -> None:
    mpl.use("agg")
    from matplotlib import pyplot

    figure, (curves, page) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for style, (name, run) in zip(("-", "--", ":"), runs.items(), strict=False):
        curves.plot(smooth(run.losses), style, label=f"{name} attention")
    curves.set(
        xlabel="step", ylabel="loss (nats per character, mean of 10 steps)", title="Training loss"
    )
    curves.legend()
    curves.grid(alpha=0.3)
    page.axis("off")
    page.set_title(f"Written by the model with {list(runs)[-1]} attention")
    lines = [part for line in written.splitlines() for part in textwrap.wrap(line, 64) or [""]]
    page.text(
        0, 1, "\n".join(lines[:24]), va="top", family="monospace", fontsize=7, parse_math=False
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def shortened(custom_calls: list[str]) -> list[str]:
    """One HLO line for each target, its operands left out."""
    first = {}
    for line in custom_calls:
        target = re.search(r'custom_call_target="[^"]*"', line)
        if target:
            call = line.split("custom-call(")[0] + "custom-call(...), " + target[0]
            first.setdefault(target[0], call)
    return list(first.values())


def smooth(losses: np.ndarray, width: int = 10) -> np.ndarray:
    width = min(width, len(losses))
    return np.convolve(losses, np.ones(width) / width, "valid")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    text = demo_text.load()
    config = ModelConfig(
        vocabulary=len(text.alphabet), length=options.length, implementation=options.implementation
    )
    print(f"Text: {len(text.codes):,} characters of CPython's documentation topics.")
    runs = {}
    for name in options.attention:
        runs[name] = train(
            text, dataclasses.replace(config, quantization=QUANTIZATIONS[name]), name=name,
            steps=options.steps, batch=options.batch, seed=options.seed,
        )  # fmt: skip

    last = options.attention[-1]
    print(f"\nThe plugin's custom calls in the compiled {last} training step:")
    for name, run in runs.items():
        expected = {"attention_forward", "attention_backward"}
        # Metal's forward call makes the codes too.
        makes_codes = any("_is_made = 1" in line for line in run.custom_calls)
        expected |= {"quantize"} if QUANTIZATIONS[name] and not makes_codes else set()
        missing = [
            target
            for target in sorted(expected)
            if not any(f'"jax_gluon.{target}"' in line for line in run.custom_calls)
        ]
        if missing:
            print(f"The {name} step does not call {', '.join(missing)}.", file=sys.stderr)
            return 1
    for line in shortened(runs[last].custom_calls):
        print(f"  {line}")

    print()
    ends = {name: float(smooth(run.losses)[-1]) for name, run in runs.items()}
    for name, run in runs.items():
        print(
            f"{name:>8}: loss {run.losses[0]:.4f} at the first step, {ends[name]:.4f} at the end; "
            f"{run.tokens_per_second:,.0f} tokens/s"
        )
    first = options.attention[0]
    for name in options.attention[1:]:
        print(f"{name} - {first} at the end: {ends[name] - ends[first]:+.4f}")
    quantized = dataclasses.replace(config, quantization=QUANTIZATIONS[last])
    prompt = 'The "import" statement'
    written = sample(runs[last], text, quantized, prompt=prompt, count=300, seed=options.seed)
    print(f"\nWritten by the model with {last} attention:\n{written}\n")
    plot(runs, written, options.output)
    print(f"Peak memory {peak_memory():,.0f} MiB. Curves and sample: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
