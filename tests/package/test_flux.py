"""The stability run at FLUX's geometry notices what it is there to notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import flux

TINY = ["--heads", "2", "--head-dim", "16", "--side", "5", "--text-tokens", "2"]


@pytest.fixture(scope="module")
def transformer():
    return flux.make(flux.parse_arguments(TINY))


@pytest.fixture
def one_transformer(monkeypatch, transformer):
    """Made once for all tests."""
    monkeypatch.setattr(flux, "make", lambda options: transformer)


def test_the_geometry_is_that_of_flux_where_nothing_else_is_asked_for():
    options = flux.parse_arguments([])
    assert (options.heads, options.head_dim, options.side**2 + options.text_tokens) == (
        24, 128, 4608,
    )  # fmt: skip
    assert options.steps == [4, 28]


def test_every_format_stays_near_float32(one_transformer, capsys):
    assert flux.main([*TINY, "--steps", "2", "--only", "drift"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " of 2 |" in line]
    far = {(row[0], row[1]): float(row[5].split()[0]) for row in rows}
    for step in ("| 1 of 2", "| 2 of 2"):
        assert 0 < far[step, "bfloat16"] < far[step, "int8"] < far[step, "int4"] < 10


def test_weights_give_the_logits_that_were_asked_for(transformer):
    assert flux.parse_arguments([]).logits == 3

    @jax.jit
    def deviations(weights):
        seen = []

        def look(query, key, value):
            seen.append((jnp.einsum("btnh,bsnh->bnts", query, key) / 4.0).std())
            return value

        noise, text = transformer.noise, transformer.text
        flux.velocity(weights, transformer.config, look, noise, jnp.ones(1), text)
        return seen

    found = deviations(transformer.weights)
    assert len(found) == 2
    for deviation in found:
        assert 2.4 < deviation < 3.6


def test_what_is_not_finite_or_too_far_is_named():
    noise = np.full((1, 4, 2), 2.0, np.float32)
    run = {
        "float32": lambda x, start, end: x + (end - start),
        "bfloat16": lambda x, start, end: x + (end - start) * 1.001,
        "int8": lambda x, start, end: x * np.nan,
        "int4": lambda x, start, end: x + (end - start) * 1.5,
    }
    run = {name: jax.jit(step) for name, step in run.items()}
    rows = list(flux.drift(run, noise, 2))
    assert [row["name"] for row in rows] == ["bfloat16", "int8", "int4"] * 2
    assert flux.failures(rows, 2) == [
        "int8 is not finite at step 1",
        "int8 is not finite at step 2",
        "int8 ends nan % of the way from float32's latent; allowed: 5 %",
        "int4 ends 50.00 % of the way from float32's latent; allowed: 25 %",
    ]


def test_a_drift_that_is_too_large_fails_the_command(one_transformer, monkeypatch, capsys):
    far = {"step": 1, "name": "bfloat16", "finite": True, "way": 0.5}
    far |= {"l1": 0.1, "cosine": 0.9, "psnr": 20.0}
    monkeypatch.setattr(flux, "drift", lambda *of: [far])
    assert flux.main([*TINY, "--steps", "1", "--only", "drift"]) == 1
    assert "bfloat16 ends 50.00 % of the way" in capsys.readouterr().err


def test_timings_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = flux.take_turns(runs, 2)
    assert order == ["a", "b"] * 3
    assert {name: len(x) for name, x in seconds.items()} == {"a": 2, "b": 2}
    table = flux.time_table("a step", {"bfloat16": [2.0, 2.0], "int8": [1.0, 1.0]})
    assert "| int8 | 1000 | 0 % | 2.00 |" in table


def test_attention_and_steps_are_timed(one_transformer, monkeypatch, capsys):
    assert {x.kernel for x in flux.TIMED if x.quantization} == {"gluon", "baseline"}
    monkeypatch.setattr(flux, "TIMED", (*flux.TIMED[:2], flux.TIMED[-1]))
    assert flux.main([*TINY, "--rounds", "2", "--only", "time"]) == 0
    output = capsys.readouterr().out
    for variant in flux.TIMED:
        assert output.count(f"| {variant.name} | ") == 2
