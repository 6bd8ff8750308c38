"""`jax-gluon doctor`: what is here, whether it is right, and what would run."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import warnings
from collections.abc import Generator
from typing import Any

from jax_gluon._cli.console import Console, Style
from jax_gluon._doctor import facts, plans, self_test
from jax_gluon._kernels import Device


def add(commands: Any) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="say what is here, test the kernels against float64, say what would run",
        description="Versions, processor, devices and caches; a test of every kernel that this "
        "machine would run, against float64; what would be chosen for typical problems. The exit "
        "status is 0 where nothing is wrong, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plain", action="store_true", help="plain text, though rich is there")
    parser.add_argument("--no-test", action="store_true", help="run no kernels")
    parser.add_argument(
        "--metal", action="store_true", help="test Metal's kernels, on the software device too"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    report = examine(runs_kernels=not options.no_test, with_metal=options.metal)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, Console(options.plain))
    return 0 if report["ok"] else 1


def examine(*, runs_kernels: bool = True, with_metal: bool = False) -> dict[str, Any]:
    """All that `doctor` finds, as it is printed by `--json`; `problems` has a line for each."""
    report: dict[str, Any] = {
        "ok": True,
        "problems": [],
        "warnings": [],
        "versions": facts.versions(),
        "machine": facts.machine(),
        "ffi": facts.ffi(),
        "processor": facts.processor(),
        "metal": facts.metal(with_metal),
        "cuda": facts.cuda(),
        "cache": facts.cache(),
        "environment": facts.environment(),
        "self_test": {"seconds": 0.0, "checks": []},
        "plans": [],
    }
    problems, notes = report["problems"], report["warnings"]
    missing = report["ffi"]["problem"]
    if missing and report["machine"]["platform"] == "cpu":
        problems.append(missing)
    elif missing:
        notes.append(missing)
    if report["processor"]["kernels"] == "unsupported":
        problems.append(
            f'JAX_GLUON_CPU_ISA is "{report["processor"]["forced"]}"; allowed here: '
            f"{', '.join(report['processor']['others'])}"
        )
    if report["cache"]["problem"]:
        notes.append(f"nothing is kept in the cache folder: {report['cache']['problem']}")
    notes += [
        f"{report['cache']['folder']}/{name}: {state}"
        for name, state in report["cache"]["files"].items()
        if state.startswith("BROKEN")
    ]
    verdict = report["metal"].get("self_test", {"passed": True})
    if not verdict["passed"]:
        with_metal = False
        problems.append(
            f"the GPU is not used: {verdict['why']} (`jax-gluon doctor --metal` tests again)"
        )
    if missing or report["processor"]["kernels"] == "unsupported":
        runs_kernels = False
    if runs_kernels:
        devices = _devices(report, with_metal)
        with _warnings_are_said():
            summary = self_test.summary(devices)
        report["self_test"] = {
            "seconds": round(summary.seconds, 1),
            "checks": [check.to_json() for check in summary.checks],
        }
        problems += [_failure(check) for check in summary.failed]
    try:
        with _warnings_are_said():
            report["plans"] = plans.plans()
    except Exception as error:  # what is wrong with the installation, in its own words
        problems.append(f"no plan can be made: {type(error).__name__}: {error}")
    report["ok"] = not problems
    return report


@contextlib.contextmanager
def _warnings_are_said() -> Generator[None]:
    """What the package would warn of (broken tables, a GPU that is not used) is in the report."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jax_gluon: ")
        yield


def _devices(report: dict[str, Any], with_metal: bool) -> tuple[Device, ...]:
    devices: list[Device] = [] if report["ffi"]["problem"] else ["cpu"]
    if with_metal and report["metal"]["device"]:
        devices.append("metal")
    return tuple(devices)


def _failure(check: self_test.Check) -> str:
    found = check.problem or f"relative error {check.error:.1e}; allowed: {check.bar:.1e}"
    where = f"{check.device} ({check.variant})" if check.variant else check.device
    return f"{where}: {check.kernel or 'attention'}, {check.operands} {check.direction}: {found}"


def show(report: dict[str, Any], console: Console) -> None:
    """Prints a report."""
    _show_facts(report, console)
    _show_test(report, console)
    _show_plans(report, console)
    for text in report["warnings"]:
        console.line(f"note: {text}", "doubtful")
    for text in report["problems"]:
        console.line(f"FAILED: {text}", "bad")
    if report["ok"]:
        console.line("Nothing is wrong.", "good")


def _show_facts(report: dict[str, Any], console: Console) -> None:
    versions = [f"{name} {version}" for name, version in report["versions"].items()]
    machine, processor, ffi = report["machine"], report["processor"], report["ffi"]
    metal, cache = report["metal"], report["cache"]
    rows = [
        ("versions", ", ".join(versions)),
        ("system", machine["system"]),
        ("JAX runs on", f"{machine['platform']}: {', '.join(machine['devices'])}"),
        ("FFI API", f"plugin {ffi['plugin'] or 'missing'}, jaxlib {ffi['jaxlib']}"),
        ("processor", f"{processor['name']}, {machine['processors']} processors"),
    ]
    if processor["kernels"]:
        forced = ", forced by JAX_GLUON_CPU_ISA" if processor["forced"] else ""
        others = ", ".join(processor["others"]) or "none"
        rows.append(("CPU kernels", f"{processor['kernels']}{forced} (others here: {others})"))
    for state in ("used", "there, not used", "absent"):
        names = [name for name, found in processor["features"].items() if found == state]
        if names:
            rows.append((f"features {state}", " ".join(names)))
    if processor.get("refusal"):
        rows.append(("refused", processor["refusal"]))
    rows.append(("Metal", _metal(metal)))
    if report["cuda"]:
        rows.append(("CUDA", f"{report['cuda']['device']}, cuDNN: {report['cuda']['cudnn']}"))
    rows.append(("cache folder", cache["folder"] or "none"))
    rows += [("", f"{name}: {state}") for name, state in cache["files"].items()]
    if not any(name.startswith("tuned-") for name in cache["files"]):
        rows.append(("", "no table of `jax-gluon tune`: kernels are chosen by default rules"))
    rows += [("variable", f"{name}={value}") for name, value in report["environment"].items()]
    console.table("This machine", ("", ""), rows)


def _metal(metal: dict[str, Any]) -> str:
    if not metal["device"]:
        return f"none: {metal['why']}"
    family = f"{metal['device']}, family {metal['family']}"
    if "self_test" not in metal:
        return f'{family}; for implementation="metal" alone'
    verdict = metal["self_test"]
    when = "remembered" if verdict["remembered"] else "now"
    return f"{family}; self-test {'passed' if verdict['passed'] else 'FAILED'} ({when})"


def _show_test(report: dict[str, Any], console: Console) -> None:
    checks = [self_test.Check(**_without(x, "passed")) for x in report["self_test"]["checks"]]
    if not checks:
        console.line("No kernels were run.", "doubtful")
        return
    groups: dict[tuple[str, str, str], list[self_test.Check]] = {}
    for check in checks:
        groups.setdefault((check.device, check.variant, check.kernel), []).append(check)
    rows: list[tuple[str, ...]] = []
    styles: list[Style] = []
    for (device, variant, kernel), group in sorted(groups.items(), key=_order(checks)):
        failed = [check for check in group if not check.passed]
        worst = max(group, key=lambda check: _share(check))
        rows.append(
            (
                f"{device} {variant}".strip(),
                kernel or "chosen there",
                ", ".join(dict.fromkeys(check.operands for check in group)),
                " ".join(dict.fromkeys(check.direction for check in group)),
                f"{_share(worst):.2g} ({worst.operands} {worst.direction})",
                f"{len(failed)} of {len(group)} FAILED" if failed else f"{len(group)} ok",
            )
        )
        styles.append("bad" if failed else "")
    seconds = report["self_test"]["seconds"]
    console.table(
        f"Kernels that were run, against float64 ({seconds:.1f} s)",
        ("device", "kernel", "operands", "passes", "largest error / allowed", "result"),
        rows,
        styles,
    )


def _order(checks: list[self_test.Check]) -> Any:
    """Sorts groups by device and variant as they came, and by kernel."""
    places = list(dict.fromkeys((check.device, check.variant) for check in checks))
    names = list(dict.fromkeys(check.kernel for check in checks))

    def key(item: tuple[tuple[str, str, str], object]) -> tuple[int, int]:
        device, variant, kernel = item[0]
        return places.index((device, variant)), names.index(kernel)

    return key


def _share(check: self_test.Check) -> float:
    return math.inf if math.isnan(check.error) else check.error / check.bar


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _show_plans(report: dict[str, Any], console: Console) -> None:
    rows: list[tuple[str, ...]] = []
    for plan in report["plans"]:
        implementation, *reasons = plan["reasons"]
        keywords = ", ".join(f"{name}={value}" for name, value in plan["keywords"].items())
        problem = f"{plan['problem']} {keywords}".strip()
        rows.append((plan["name"], plan["implementation"], implementation))
        rows.append((problem, "", reasons[0] if reasons else ""))
        rows += [("", "", reason) for reason in reasons[1:]]
    if rows:
        console.table("What would run, and why", ("problem", "runs on", "why"), rows)
