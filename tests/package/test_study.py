"""The study of training, in seconds: formats learn alike, and records are kept and never lost."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study import __main__ as program
from benchmarks.study import formats, page, results, suspects, tasks, training

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


@pytest.fixture(autouse=True, scope="module")
def tiny():
    """The models of one block, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            tasks.DECODERS, "small", dict(length=64, layers=1, heads=2, kv_heads=1, head_dim=32)
        )
        patch.setitem(
            tasks.FLOWS, "small", dict(joint_blocks=0, single_blocks=1, heads=2, head_dim=32)
        )
        patch.setattr(training, "HELD_OUT_POINTS", 3)
        patch.setattr(training, "GRADIENT_POINTS", 3)
        yield


def test_formats_learn_alike():
    ends = {}
    for form, cosine, ratio in (("float32", 0, 0), ("int8", 3e-4, 1e-2), ("int4", 4e-2, 0.25)):
        record = training.train(training.Settings("decoder", "small", form, 0, STEPS))
        ends[form] = record["held_out"][-1][1]
        assert ends[form] < 0.5 * record["held_out"][0][1]
        arithmetic = {kernel.split(" in ")[1] for kernel in record["kernels"]}
        assert ("int8" in arithmetic) == (form != "float32")
        if form != "float32":
            # Cosine and norm ratio of all gradients, then of those of query and key.
            found = np.array(record["gradients"])
            assert found.shape == (3, 5)
            assert (found[:, [1, 3]] > 1 - cosine).all()
            np.testing.assert_allclose(found[:, [2, 4]], 1, atol=ratio)
    assert abs(ends["int8"] - ends["float32"]) < 3e-3
    assert abs(ends["int4"] - ends["float32"]) < 3e-2


def test_runs_that_are_finished_are_not_run_again(tmp_path, capsys, monkeypatch):
    def trained(settings):
        calls.append(settings)
        return {key: [[0, 1.0]] for key in results.KEYS} | {"settings": settings.to_json()}

    calls = []
    monkeypatch.setattr(program, "train", trained)
    arguments = ["--sizes", "small", "--seeds", "0", "7", "--results", str(tmp_path)]
    assert program.main([*arguments, "--models", "decoder", "--formats", "int8"]) == 0
    assert [(x.format, x.seed) for x in calls] == [("int8", 0), ("int8", 7)]
    assert program.main([*arguments, "--models", "flow", "decoder", "--formats", "int8"]) == 0
    assert [x.model for x in calls] == ["decoder", "decoder", "flow", "flow"]
    assert "4 runs, 2 of them finished" in capsys.readouterr().out
    assert len(results.read_all(tmp_path)) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("text", ["", '{"settings": ', '{"name": "another"}', "[1]", "steps 99"])
def test_a_foreign_file_is_told_and_left(tmp_path, capsys, monkeypatch, text):
    monkeypatch.setattr(program, "train", lambda settings: pytest.fail("it was overwritten"))
    settings = training.Settings("flow", "small", "int4", 0, 1500)
    path = results.path_of(tmp_path, settings)
    if text == "steps 99":
        record = dict.fromkeys(results.KEYS, 0) | {"settings": settings.to_json() | {"steps": 99}}
        assert results.write(tmp_path, record) == path
    else:
        path.write_text(text)
    before = path.read_text()
    assert program.main(["--results", str(tmp_path)]) == 1
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == before


def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    settings = training.Settings("flow", "small", "int4", 0, 1500)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        results.write(tmp_path, {"settings": settings.to_json()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [x for x in formats.CASES if not x.startswith("peak")])
def test_cases_change_no_exact_probability(name):
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((2, 5, 3, 32)) for _ in range(2))
    q, k = (np.asarray(x, np.float64) for x in formats.changed(formats.CASES[name], query, key))
    found, expected = (np.einsum("bihd,bjhd->bhij", *x) for x in ((q, k), (query, key)))
    difference = found - expected
    np.testing.assert_allclose(difference, np.broadcast_to(
        difference[..., :1], difference.shape), atol=2e-3)  # fmt: skip
    assert name == "plain" or np.abs(k - key).max() > 5


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("cpu", "bfloat16"), ("cpu", "int8"), ("cpu", "int4"), ("xla", "int8"), ("metal", "int8")],
)
def test_rounded_outputs_have_no_part_in_rows_of_gradients(require, implementation, name):
    """Rows of dS sum to 0 whatever forward rounded, so that what keys share is in no gradient."""
    require(implementation)
    found = suspects.leak(name, 100.0, 1.0, implementation)
    assert found.key_sum < 1e-4
    assert max(found.d_key, found.d_value) < 1e-2
    if name != "bfloat16":  # whose keys are not centered
        assert found.d_query < 1e-2
        # Elsewhere probabilities are float32 or float16.
        assert implementation != "cpu" or found.careless_d_query > 0.1


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_backward_has_the_probabilities_of_forward(implementation):
    """INT8 scores are the same numbers in both passes; INT4 keys become INT8 rows in forward."""
    bars = {"int8": 4e-3, "int4": 0.25}
    for name, bar in bars.items():
        assert suspects.leak(name, 0.0, 8.0, implementation).row_sum < bar


def test_the_page_is_that_of_the_records():
    text = (ROOT / page.PAGE).read_text(encoding="utf-8")
    found = page.tables(ROOT / page.DATA)
    assert set(re.findall(r"<!-- table (\w+) -->", text)) == set(found)
    assert page.filled(text, found) == text
    assert page.filled(text, found | {"losses": "none"}) != text
