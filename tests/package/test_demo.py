"""The demo trains, compares and plots what it says."""

import re

import jax
import numpy as np
import pytest

from demo import __main__ as program
from demo import text as demo_text
from demo import training
from demo.model import ModelConfig


@pytest.fixture(scope="module")
def text():
    return demo_text.load()


def test_the_text_is_real_english_and_survives_encoding(text):
    assert len(text.codes) > 400_000
    sentence = 'The "import" statement'
    assert text.decode(text.encode(sentence)) == sentence
    assert " the " in text.decode(text.codes[:5000])


def test_batches_depend_on_the_seed_alone(text):
    first, again, other = (np.stack(list(text.batches(2, 3, 16, seed))) for seed in (1, 1, 2))
    assert first.shape == (2, 3, 17)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_both_runs_start_from_the_same_weights_and_learn(text):
    config = dict(vocabulary=len(text.alphabet), length=32, layers=1, heads=2, kv_heads=1)
    runs = [
        training.train(
            text, ModelConfig(**config, quantization=quantization),
            name=str(quantization), steps=40, batch=4, seed=3,
        )
        for quantization in (None, "int8")
    ]  # fmt: skip
    for x, y in zip(*(jax.tree.leaves(run.initial_state) for run in runs), strict=True):
        np.testing.assert_array_equal(x, y)
    for run in runs:
        assert run.losses[-5:].mean() < run.losses[0] - 0.5
    assert runs[0].losses[0] != runs[1].losses[0]
    assert abs(runs[0].losses[0] - runs[1].losses[0]) < 1e-2
    targets = [
        {line.split('"jax_gluon.')[1].split('"')[0] for line in run.custom_calls} for run in runs
    ]
    assert targets[0] == {"attention_forward", "attention_backward"}
    assert targets[1] == {"attention_forward", "attention_backward", "quantize"}


def test_the_program_writes_its_picture(tmp_path, capsys):
    path = tmp_path / "demo.png"
    assert (
        program.main(["--steps", "4", "--length", "32", "--batch", "2", "--output", str(path)]) == 0
    )
    output = capsys.readouterr().out
    assert 'custom_call_target="jax_gluon.attention_backward"' in output
    assert "INT8 - float32 at the end:" in output
    assert "INT4 - float32 at the end:" in output
    assert 'The "import" statement' in output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_program_runs_on_metal(tmp_path, capsys, monkeypatch, require):
    """As on the CPU: the same losses, up to rounding."""
    require("metal")
    # A sample of 300 characters takes longer there than all else.
    monkeypatch.setattr(
        program, "sample", lambda *of, **keywords: training.sample(*of, **keywords | {"count": 8})
    )
    losses = {}
    for implementation in ("cpu", "metal"):
        arguments = ["--steps", "4", "--length", "32", "--batch", "1"]
        path = tmp_path / f"{implementation}.png"
        arguments += ["--implementation", implementation, "--output", str(path)]
        assert program.main(arguments) == 0
        found = re.findall(
            r"loss ([\d.]+) at the first step, ([\d.]+) at the end", capsys.readouterr().out
        )
        losses[implementation] = np.array(found, float)
    assert losses["metal"].shape == (3, 2)
    np.testing.assert_allclose(losses["metal"][0], losses["cpu"][0], atol=2e-4)  # float32
    np.testing.assert_allclose(losses["metal"], losses["cpu"], atol=3e-2)


def test_the_program_fails_where_the_plugin_is_not_called(monkeypatch, capsys):
    monkeypatch.setattr(training, "custom_calls", lambda hlo: [])
    assert program.main(["--steps", "1", "--length", "32", "--batch", "1"]) == 1
    assert "does not call attention_backward, attention_forward" in capsys.readouterr().err
