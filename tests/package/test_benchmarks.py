"""The benchmark harness measures what it says; no test here depends on how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import (
    attention,
    cliffs,
    decode,
    features,
    gluon,
    implementations,
    nvidia,
    report,
)
from benchmarks.peers import PEERS
from benchmarks.problem import REQUIREMENTS, SUITES, Problem, Requirement

TINY = Problem(B=1, N=2, T=40, H=16, is_causal=True)
BIASED = Problem(B=3, N=2, T=9, H=16, has_bias=True)
GROUPED = Problem(B=2, N=4, T=3, H=16, S=40, K=2, V=8, has_bias=True)


@pytest.mark.parametrize("problem", [TINY, BIASED, GROUPED], ids=str)
@pytest.mark.parametrize("name", implementations.NAMES)
def test_every_implementation_computes_attention(name, problem):
    if not implementations.available(name):
        pytest.skip("not installed")
    if not implementations.computes(name, problem):
        pytest.skip("the peer has no such form")
    if name.split()[0] in PEERS:
        # In a process of its own: some fork when they are imported.
        worker = attention.Worker(name, threads=1)
        error = worker.measure(problem, calls=1)["error"]
        worker.close()
    else:
        run, head = implementations.make(name, problem, threads=1)
        assert head is not None
        exact = problem.exact_head()
        error = np.linalg.norm(head(run()) - exact) / np.linalg.norm(exact)
    bars = {"float32": 2e-6, "bfloat16": 1e-2, "int8": 2e-2}
    assert 0 < error < bars[name.split()[1]]


def test_long_heads_are_exact_too():
    problem = Problem(1, 1, 520, 8, is_causal=True, S=530)
    query, key, value, _ = (x[0, :, 0].astype(np.float64) for x in problem.operands())
    logits = np.where(np.tri(520, 530), query @ key.T / np.sqrt(8.0), -np.inf)
    weights = np.exp(logits)
    expected = weights @ value / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(problem.exact_head(), expected, rtol=1e-9)


def test_the_float64_head_is_attention():
    query, key, value, _ = (x[0, :, 0].astype(np.float64) for x in TINY.operands())
    i = 7
    weights = np.exp(key[: i + 1] @ query[i] / 4.0)
    expected = weights @ value[: i + 1] / weights.sum()
    np.testing.assert_allclose(TINY.exact_head()[i], expected, rtol=1e-12)


def test_the_float64_head_takes_bias_and_its_kv_head():
    query, key, value, _ = (x[0, :, 0].astype(np.float64) for x in GROUPED.operands())
    assert key.shape == (40, 16)
    bias = GROUPED.bias()
    assert bias is not None
    weights = np.exp(key @ query[1] / 4.0 + bias[0, 0, 1])
    np.testing.assert_allclose(GROUPED.exact_head()[1], weights @ value / weights.sum(), rtol=1e-6)


def test_ratios_are_of_medians():
    problem = SUITES["quick"][0]
    measurements = [
        report.Measurement(problem, "fast", [1.0, 2.0, 9.0], None),
        report.Measurement(problem, "slow", [8.0, 5.0, 6.0], None),
    ]
    assert report.ratio(measurements, Requirement(problem, "fast", "slow", 1.0)) == 3.0
    assert report.ratio(measurements, Requirement(problem, "fast", "absent", 1.0)) is None
    assert "| slow | 6000.00 |" in report.table(measurements)


def test_operations_count_the_visible_half():
    dense, causal = Problem(1, 2, 8, 4), Problem(1, 2, 8, 4, is_causal=True)
    assert dense.operations == 4 * 2 * 8 * 8 * 4 == 2 * causal.operations
    assert Problem(1, 2, 8, 4, direction="both").operations == 3.5 * dense.operations
    assert Problem(1, 2, 8, 4, S=16, V=12).operations == 4 * dense.operations


def test_every_floor_is_measured_by_its_suite():
    for requirement in REQUIREMENTS:
        assert requirement.problem in SUITES["floor"]
        assert {requirement.fast, requirement.slow} <= set(implementations.NAMES)


def test_the_command_alternates_workers_and_writes_its_files(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.attention", "--shapes", "B1,N2,T40,H16", "--rounds", "2",
        "--calls", "2", "--implementations", "gluon float32", "gluon int8",
        "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "forward B1 N2 T40 H16 | gluon int8" in run.stdout
    document = json.loads((tmp_path / "out.json").read_text())
    assert [m["name"] for m in document["measurements"]] == ["gluon float32", "gluon int8"]
    assert all(len(m["times"]) == 4 for m in document["measurements"])
    assert document["measurements"][0]["error"] < 2e-6 < document["measurements"][1]["error"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_features_cost_is_a_table(capsys):
    size = ["--length", "512", "--heads", "2", "--head-dim", "16"]
    features.main([*size, "--rounds", "1", "--formats", "float32"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if "| float32" in line]
    rows = [row for row in rows if len(row) == 6]
    assert len(rows) == len(features.rows(512, 2)) == 16
    assert all(float(row[3]) > 0 < float(row[4]) for row in rows)


def test_decoding_is_of_the_same_cache(monkeypatch):
    shape = decode.Shape(heads=2, group=3, tokens=64, width=16, queries=2)
    outs = {name: run(*operands) for name, (run, operands) in decode.cases(shape).items()}
    by_head = np.asarray(outs.pop("einsum")).reshape(1, 2, 3, 2, 16).transpose(0, 3, 1, 2, 4)
    outs["einsum"] = by_head.reshape(outs["jax.nn"].shape)
    bars = {"int8": 3e-2, "int4": 3e-1}
    for name, out in outs.items():
        error = np.linalg.norm(out - outs["jax.nn"]) / np.linalg.norm(outs["jax.nn"])
        assert error < bars.get(name, 1e-5), name
    monkeypatch.setattr(decode, "READ_BYTES", 8 * 2**20)
    cells = decode.row(shape, 2).split(" | ")
    assert len(cells) == 13
    assert all(float(cell) > 0 for cell in cells[1:9])


def test_a_cliff_is_over_the_line_through_its_neighbours():
    times = {1: 1.0, 2: 1.2, 4: 2.0, 8: 8.0, 10: 8.5, 20: 20.0}
    assert cliffs.cliffs(times, 1.2) == {8: pytest.approx(8 / (2 + 4 / 6 * 6.5))}
    assert cliffs.cliffs(dict.fromkeys(range(5), 1.0), 1.01) == {}


def test_a_worker_that_dies_is_reported():
    worker = attention.Worker("no-such float32", 1)
    with pytest.raises(RuntimeError, match="the worker of no-such float32 ended with 1"):
        worker.measure(TINY, 1)
    worker.close()


@pytest.mark.parametrize("text", ["B1,N2", "B1,N2,T4,Hx", ""])
def test_a_malformed_shape_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        attention.parse_arguments(["--shapes", text])
    assert "B1,N8,T2048,H64" in capsys.readouterr().err


def test_the_pipelines_take_turns_and_write_their_files(tmp_path):
    # The other checkout is this one.
    landed = tmp_path / "landed"
    python = landed / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (landed / "benchmarks").symlink_to(Path(gluon.__file__).parent)
    command = [
        sys.executable, "-m", "benchmarks.gluon", "--lengths", "40", "--head-dims", "16",
        "--heads", "2", "--rounds", "2", "--least", "0", "--formats", "float32", "int8",
        "--json", str(tmp_path / "gluon.json"), "--plot", str(tmp_path / "gluon.png"),
        "--landed", str(landed),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    comparisons = json.loads((tmp_path / "gluon.json").read_text())["comparisons"]
    # Two directions, causal or not, two formats.
    assert len(comparisons) == 8
    for c in comparisons:
        assert set(c["times"]) == {"baseline", "gluon", "landed"}
        assert all(len(times) == 2 and min(times) > 0 for times in c["times"].values())
    assert run.stdout.count("| both B1 N2 T40 H16 causal | int8 |") == 1
    assert (tmp_path / "gluon.png").read_bytes().startswith(b"\x89PNG")


def test_the_ratio_of_pipelines_is_of_medians():
    times = {"baseline": [3.0, 4.0, 9.0], "gluon": [2.0, 2.0, 1.0]}
    comparison = gluon.Comparison(TINY, "float32", times)
    assert comparison.ratio == 2.0
    assert comparison.quartiles == (1.5, 9.0)


def test_nvidia_s_rows_take_turns():
    """Here of what runs without a GPU."""
    row = nvidia.Row(1, 4, 8, 16, is_causal=True, K=2, S=12)
    assert str(row) == "B1 N4 K2 T8 S12 H16 causal"
    every = nvidia.attentions(row.is_causal)
    for direction in ("forward", "both"):
        names = ("jax_gluon xla", "jax.nn xla")
        runs = {name: nvidia.passes(every[name], direction) for name in names}
        ours, theirs = (run(*row.operands()) for run in runs.values())
        for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (x, y)), atol=0.1)
        times = nvidia.measure(runs, row.operands(), rounds=2)
        assert list(times) == list(names)
        assert min(times.values()) > 0
