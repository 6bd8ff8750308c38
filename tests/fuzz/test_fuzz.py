"""A few random cases, always the same; and faults, which they must show."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jax_gluon
from jax_gluon import _native
from tests.fuzz import __main__ as command
from tests.fuzz.cases import RULES, Case, draw, simpler
from tests.fuzz.check import failures

PLAIN = Case(seed=5, B=2, T=9, S=13, K=2, group=2, H=8, V=6, how={"implementation": "xla"})
ATTENTION = jax_gluon.dot_product_attention


@pytest.mark.parametrize("seed", range(12))
def test_random_case(seed):
    """`make fuzz` draws more of them."""
    case = draw(seed, list(_native.plugin().cpu_isas_supported()), ["cpu", "cpu", "xla"])
    found = command.wrong_with(case)
    assert not found, f"python -m tests.fuzz --case '{case}'\n" + "\n".join(found)


def test_every_rule_is_drawn():
    cases = [draw(seed, ["portable"], ["cpu"]) for seed in range(400)]
    assert {rule for case in cases for rule in case.rules} == set(RULES)
    assert all(Case.of(str(case)) == case for case in cases)


def off(out, by):
    return out * (1 + by)


FAULTS = {
    "out[": lambda q, k, v, **x: ATTENTION(off(q, 1e-4), k, v, **x),
    "d_value": lambda q, k, v, **x: ATTENTION(q, k, off(v, 1e-4), **x),
    "is nan": lambda q, k, v, **x: tuple(y.at[0, 3].set(jnp.nan) for y in ATTENTION(q, k, v, **x)),
    "0 where it should not": lambda q, k, v, **x: ATTENTION(q, k, v.at[:, :, 1].set(0), **x),
    "log_sum_exp": lambda q, k, v, **x: (
        ATTENTION(q, k, v, **x)[0],
        ATTENTION(q, k, v, **x)[1] + 1e-3,
    ),
    "log_sum_exp is of shape": lambda q, k, v, **x: (
        ATTENTION(q, k, v, **x)[0],
        ATTENTION(q, k, v, **x)[1][:, :-1],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, monkeypatch):
    assert failures(PLAIN) == []
    monkeypatch.setattr(jax_gluon, "dot_product_attention", FAULTS[fault])
    assert any(fault in text for text in failures(PLAIN))


def test_a_wrong_derivative_is_seen_forward_too(monkeypatch):
    case = dataclasses.replace(PLAIN, how={"implementation": "xla", "differentiation": "any"})
    assert failures(case) == []

    def steep(q, *operands, **keywords):
        return ATTENTION(q + 1e-3 * (q - jax.lax.stop_gradient(q)), *operands, **keywords)

    monkeypatch.setattr(jax_gluon, "dot_product_attention", steep)
    found = failures(case)
    for name in ("d_query", "tangent_out"):
        assert any(text.startswith(f"{name}[") for text in found)


def test_a_failure_is_made_smaller_and_printed(monkeypatch, capsys):
    """Of a call that forgets the causal mask nothing is left but it, and two keys."""

    def forgetful(*operands, is_causal=False, **keywords):
        return ATTENTION(*operands, **keywords)

    # Small enough for few steps, of which each compiles programs.
    sizes = {"B": 2, "T": 2, "S": 3, "K": 2, "group": 1, "H": 2, "V": 2}
    case = dataclasses.replace(PLAIN, **sizes, rules=("causal", "sinks"))
    monkeypatch.setattr(jax_gluon, "dot_product_attention", forgetful)
    smallest = command.smallest(case, attempts=200)
    assert smallest.rules == ("causal",)
    assert (smallest.B, smallest.T, smallest.K, smallest.S) == (1, 1, 1, 2)
    assert not any(command.wrong_with(other) for other in simpler(smallest))
    assert command.main(["--case", str(smallest)]) == 1
    assert "out" in capsys.readouterr().out
    monkeypatch.undo()
    assert command.main(["--case", str(smallest)]) == 0
    assert capsys.readouterr().out == "right\n"
