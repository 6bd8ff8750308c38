"""`python -m benchmarks.attention`: attention against its peers, alternating in one run.

Every implementation lives in a process of its own, pinned to as many processors as `--threads`; the
driver asks each in turn, round after round, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks import implementations, report
from benchmarks.problem import REQUIREMENTS, SUITES, Problem


class Worker:
    """One implementation in its process.

    `checkout` is a tree with an environment of its own, `settings` are environment variables.
    """

    def __init__(
        self, name: str, threads: int, checkout: Path | None = None, **settings: str
    ) -> None:
        self.name = name
        python = sys.executable if checkout is None else str(checkout / ".venv/bin/python")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", name, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout,
            env=os.environ | settings,
        )  # fmt: skip

    def measure(self, problem: Problem, calls: int) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"problem": problem.to_json(), "calls": calls}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"the worker of {self.name} ended with {self._process.wait()}")

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def measure(
    problems: tuple[Problem, ...], names: list[str], *, threads: int, rounds: int, calls: int
) -> list[report.Measurement]:
    """Times every implementation on every problem."""
    workers = [Worker(name, threads) for name in names]
    measurements = []
    try:
        total = rounds * sum(implementations.computes(x.name, p) for x in workers for p in problems)
        with tqdm(total=total, unit="turn", file=sys.stderr) as progress:
            for problem in problems:
                turns = [x for x in workers if implementations.computes(x.name, problem)]
                times: dict[str, list[float]] = {worker.name: [] for worker in turns}
                errors: dict[str, float] = {}
                for _ in range(rounds):
                    for worker in turns:
                        answer = worker.measure(problem, calls)
                        times[worker.name] += answer["times"]
                        if answer["error"] is not None:
                            errors[worker.name] = answer["error"]
                        progress.update()
                measurements += [
                    report.Measurement(problem, name, own, errors.get(name))
                    for name, own in times.items()
                ]
    finally:
        for worker in workers:
            worker.close()
    return measurements


def measure_overhead(calls: int = 3000) -> dict[str, float]:
    """Median microseconds of our smallest call and of an empty one under jit, taken in turn."""
    import jax
    import jax.numpy as jnp

    import jax_gluon

    x = jnp.ones((1, 4, 1, 8))
    functions = {
        "attention": jax.jit(
            lambda x: jax_gluon.dot_product_attention(x, x, x, implementation="cpu")
        ),
        "empty": jax.jit(lambda x: x + 1),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(100):
            function(x).block_until_ready()
    for _ in range(calls):
        for name, function in functions.items():
            start = time.perf_counter()
            function(x).block_until_ready()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def shape(text: str) -> dict[str, int]:
    """`B1,N8,T2048,H64`."""
    try:
        parts = {part[0]: int(part[1:]) for part in text.split(",")}
    except (ValueError, IndexError):
        parts = {}
    if set(parts) != set("BNTH"):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form B1,N8,T2048,H64")
    return parts


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--suite", choices=[*SUITES, "overhead"], default="floor")
    parser.add_argument(
        "--shapes", type=shape, nargs="+", help="instead of a suite: B1,N8,T2048,H64"
    )
    parser.add_argument("--causal", action="store_true", help="with --shapes: causal")
    parser.add_argument(
        "--directions", nargs="+", choices=["forward", "both"], default=["forward"],
        help="with --shapes",
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--implementations", nargs="+", choices=implementations.NAMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3, help="calls in a round")
    parser.add_argument("--json", type=Path, help="write every time to this file")
    parser.add_argument("--plot", type=Path, help="draw the rates to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    command = "python -m benchmarks.attention " + shlex.join(
        sys.argv[1:] if arguments is None else arguments
    )
    machine = report.machine()
    print(f"Machine: {', '.join(f'{name} {value}' for name, value in machine.items())}")
    print(f"Command: {command}\n")
    if options.suite == "overhead" and not options.shapes:
        times = measure_overhead()
        print("| jit call | median us |\n|---|---|")
        print("\n".join(f"| {name} | {value:.1f} |" for name, value in times.items()))
        print(f"| difference | {times['attention'] - times['empty']:.1f} |")
        return 0
    problems = SUITES.get(options.suite, ())
    if options.shapes:
        problems = tuple(
            Problem(**sizes, is_causal=options.causal, direction=direction)
            for sizes in options.shapes
            for direction in options.directions
        )
    names = [
        name
        for name in options.implementations or implementations.NAMES
        if implementations.available(name)
        and (options.dtypes is None or name.split()[1] in options.dtypes)
    ]
    measurements = measure(
        problems, names, threads=options.threads, rounds=options.rounds, calls=options.calls
    )
    clock = "processor time" if options.threads == 1 else "wall time"
    print(
        f"{options.threads} thread(s), {clock}, {options.rounds} rounds of {options.calls} calls\n"
    )
    print(report.table(measurements))
    requirements = report.requirements_table(measurements, REQUIREMENTS)
    if requirements.count("\n") > 1:
        print(f"\nFloors (set for a processor with AVX-512):\n\n{requirements}")
    if options.json:
        document = {
            "machine": machine, "command": command, "threads": options.threads,
            "measurements": [m.to_json() for m in measurements],
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=1))
    if options.plot:
        caption = f"{machine['processor']}, {machine['isa']}, {options.threads} thread(s)"
        report.plot(measurements, options.plot, caption)
    return 0


if __name__ == "__main__":
    sys.exit(main())
