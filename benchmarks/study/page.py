"""`python -m benchmarks.study.page`: puts tables and a plot of what ran into the page of docs.

Tables stand between `<!-- table NAME -->` and `<!-- end -->`; the prose around them is left.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.study import results
from benchmarks.study.formats import FORMATS
from benchmarks.study.tasks import MODELS, SIZES

DATA = Path("docs/data")
PAGE = Path("docs/training-study.md")
SEEDS = (0, 1, 2)
Record = dict[str, Any]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], form: str) -> str:
    """Mean, and the least and the greatest of the seeds."""
    if len(values) == 1:
        return f"{values[0]:{form}} (one seed)"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def of(records: list[Record], case: str = "plain", **wanted: Any) -> list[Record]:
    wanted["case"] = case
    return [x for x in records if all(x["settings"][key] == y for key, y in wanted.items())]


def gaps(records: list[Record], model: str, size: str, form: str, case: str) -> list[float]:
    """Held-out loss at the end less that of float32 from the same seed.

    An exact model does not notice a case, unless it is one of peaks.
    """
    exact = case if case.startswith("peak") else "plain"
    ends = {
        x["settings"]["seed"]: x["held_out"][-1][1]
        for x in of(records, exact, model=model, size=size, format="float32")
    }
    return [
        x["held_out"][-1][1] - ends[x["settings"]["seed"]]
        for x in of(records, case, model=model, size=size, format=form)
        if x["settings"]["seed"] in ends
    ]


def losses(records: list[Record]) -> str:
    rows = []
    for model in MODELS:
        for size in SIZES:
            for form in FORMATS:
                found = of(records, model=model, size=size, format=form)
                if not found:
                    continue
                gap = gaps(records, model, size, form, "plain")
                rows.append([
                    f"{model}, {size}", form, str(len(found)),
                    f"{statistics.mean(x['held_out'][0][1] for x in found):.3f}",
                    spread([x["held_out"][-1][1] for x in found], ".4f"),
                    spread(gap, "+.4f") if gap and form != "float32" else "",
                    f"{statistics.median(x['seconds']['training'] for x in found):.0f}",
                ])  # fmt: skip
    return markdown(
        ["model", "attention", "seeds", "before", "held-out loss at the end", "less float32",
         "s"], rows,
    )  # fmt: skip


def gradients(records: list[Record]) -> str:
    rows = []
    for model in MODELS:
        for size in SIZES:
            for form in FORMATS:
                points = [y for x in of(records, model=model, size=size, format=form)
                          for y in x["gradients"]]  # fmt: skip
                if points:
                    cells = [f"{min(x[i] for x in points):.5f}" for i in (1, 3)]
                    cells += [
                        f"{min(x[i] for x in points):.3f} to {max(x[i] for x in points):.3f}"
                        for i in (2, 4)
                    ]
                    rows.append([f"{model}, {size}", form, *cells])
    return markdown(
        ["model", "attention", "least cosine", "of Q, K weights", "norm ratio", "of Q, K weights"],
        rows,
    )


def cases(records: list[Record]) -> str:
    keys = {tuple(x["settings"][key] for key in ("model", "size", "format", "case"))
            for x in records}  # fmt: skip
    rows = []
    for model, size, form, case in sorted(keys):
        gap = gaps(records, model, size, form, case)
        if case != "plain" and gap:
            rows.append([f"{model}, {size}", case, form, spread(gap, "+.4f")])
    if not rows:
        return "None has been run."
    return markdown(["model", "case", "attention", "less float32"], rows)


def missing(records: list[Record]) -> str:
    """What a whole study has and these records have not."""
    lines = []
    for size in SIZES:
        for model in MODELS:
            for form in FORMATS:
                there = {x["settings"]["seed"] for x in
                         of(records, model=model, size=size, format=form)}  # fmt: skip
                if absent := [str(x) for x in SEEDS if x not in there]:
                    lines.append(f"- {model}, {size}, {form}: seeds {', '.join(absent)}")
    return "\n".join(lines) or "None."


def suspects(found: list[Record]) -> str:
    columns = ("key_sum", "careless_key_sum", "d_query", "careless_d_query", "d_key", "row_sum")
    return markdown(
        ["attention", "key offset", "logits", "sum of dK", "careless", "dQ", "careless", "dK",
         "sum of P - 1"],
        [[x["format"], f"{x['offset']:.0f}", f"x{x['peak']:.0f}", *(f"{x[y]:.1e}" for y in columns)]
         for x in found],
    )  # fmt: skip


def boundary(found: list[Record]) -> str:
    names = list(dict.fromkeys(x["format"] for x in found if x["format"] != "float32"))
    table: dict[str, dict[str, str]] = {}
    for x in found:
        cell = f"{100 * x['out']:.2g} / {100 * max(x['d_query'], x['d_key']):.2g}"
        table.setdefault(x["case"], {})[x["format"]] = cell
    rows = [[case, *(cells[name] for name in names)] for case, cells in table.items()]
    return markdown(["case", *names], rows)


def machines(records: list[Record]) -> str:
    found = sorted({", ".join(f"{key} {y}" for key, y in x["machine"].items()) for x in records})
    steps = sorted({x["settings"]["steps"] for x in records})
    total = sum(x["seconds"]["all"] for x in records)
    return (
        f"{len(records)} runs of {', '.join(map(str, steps))} steps, {total / 60:.0f} minutes, "
        f"on: {'; '.join(found)}."
    )


def tables(data: Path) -> dict[str, str]:
    records = results.read_all(data / "training-study")
    limits = {
        name: json.loads((data / f"training-{name}.json").read_text(encoding="utf-8"))[name]
        for name in ("suspects", "boundary")
    }
    return {
        "losses": losses(records), "gradients": gradients(records), "cases": cases(records),
        "missing": missing(records), "machines": machines(records),
        "suspects": suspects(limits["suspects"]), "boundary": boundary(limits["boundary"]),
    }  # fmt: skip


def filled(page: str, found: dict[str, str]) -> str:
    """The page with every table in its place."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n\n{found[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, page, flags=re.S)


def plot(records: list[Record], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    sizes = [x for x in SIZES if of(records, size=x)]
    figure, axes = pyplot.subplots(
        len(sizes), 2 * len(MODELS), figsize=(14, 3.6 * len(sizes)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for row, size in zip(axes, sizes, strict=True):
        for i, model in enumerate(MODELS):
            curve, cosine = row[2 * i], row[2 * i + 1]
            for color, form in enumerate(FORMATS):
                for x in of(records, model=model, size=size, format=form):
                    label = form if x["settings"]["seed"] == 0 else None
                    exact = of(records, model=model, size=size, format="float32",
                               seed=x["settings"]["seed"])  # fmt: skip
                    if exact and form != "float32":
                        steps, ends = zip(*x["held_out"], strict=True)
                        gap = [y - z[1] for y, z in zip(ends, exact[0]["held_out"], strict=True)]
                        curve.plot(steps, gap, f"C{color}", alpha=0.7, lw=1, label=label)
                    if x["gradients"]:
                        steps, _, _, of_logits, _ = zip(*x["gradients"], strict=True)
                        cosine.semilogy(steps, [max(1 - y, 1e-7) for y in of_logits], f"C{color}",
                                        alpha=0.7, lw=1, label=label)  # fmt: skip
            curve.set(title=f"{model}, {size}: held-out loss less float32", xlabel="step")
            cosine.set(title="1 - cosine, gradient of Q, K weights", xlabel="step")
            for each in (curve, cosine):
                each.legend(fontsize=7)
                each.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.page")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of all records")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(filled(page, tables(options.data)), encoding="utf-8")
    plot(results.read_all(options.data / "training-study"), options.page.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
