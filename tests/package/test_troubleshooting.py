"""Every text that the page on troubleshooting lists is one that the package, or JAX, says."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jax_gluon
from jax_gluon import _native
from jax_gluon._plan import tuned_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
TEXTS = re.findall(r"^### `(.*)`$", PAGE.read_text(encoding="utf-8"), re.M)


def attention(**changes):
    x = jnp.ones((1, 8, 2, 16))
    return jax_gluon.dot_product_attention(**{"query": x, "key": x, "value": x} | changes)


def without_plugin(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_gluon._plugin", None)
    _native.plugin.__wrapped__()


def with_a_table_of_another_version(monkeypatch):
    path = PAGE.with_name("roadmap.md")  # no table at all
    tuned_table._read.__wrapped__(path, "cpu", 0)


def with_an_unknown_variant(monkeypatch):
    """The variant is chosen once in a process."""
    program = (
        "import jax, jax_gluon; x = jax.numpy.ones((1, 8, 2, 16));"
        "jax_gluon.dot_product_attention(x, x, x)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"JAX_GLUON_CPU_ISA": "mmx"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    raise RuntimeError(finished.stderr)


CAUSES = {
    "write key.astype(": lambda _: attention(key=jnp.ones((1, 8, 2, 16), jnp.bfloat16)),
    "allowed: a multiple of key's": lambda _: attention(query=jnp.ones((1, 8, 3, 16))),
    "mask is of dtype float32": lambda _: attention(mask=jnp.ones((1, 1, 8, 8))),
    "dropout_rng is None": lambda _: attention(dropout_rate=0.1),
    "these keys stay visible": lambda _: attention(
        bias=jnp.full((1, 1, 8, 8), -1e9), logits_soft_cap=30.0
    ),
    "an array is needed here, found codes": lambda _: jnp.sin(
        jax_gluon.quantize(jnp.ones((1, 8, 2, 16)), jax_gluon.QuantSpec())
    ),
    "forward-mode or second derivatives of attention": lambda _: jax.jvp(
        lambda x: attention(query=x), (jnp.ones((1, 8, 2, 16)),), (jnp.ones((1, 8, 2, 16)),)
    ),
    "for this problem": lambda _: attention(kernel="decode", implementation="cpu"),
    "JAX finds no cuDNN": lambda _: attention(implementation="cudnn"),
    "compiled plugin can't be imported": without_plugin,
    "JAX_GLUON_CPU_ISA is": with_an_unknown_variant,
    "no compatibility guarantees": lambda _: export.export(
        jax.jit(jax_gluon.dot_product_attention)
    )(*[jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)] * 3),
    "is ignored": with_a_table_of_another_version,
}


def test_every_text_has_a_cause_here():
    assert sorted(CAUSES) == sorted(TEXTS)


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_is_what_is_said(text, monkeypatch):
    said = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            CAUSES[text](monkeypatch)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            said = str(error)
    assert text in " ".join([said, *(str(x.message) for x in caught)])
