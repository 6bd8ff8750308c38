"""`jax-gluon tune --device metal`: from which size on the GPU pays, by a planted clock."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jax_gluon
from jax_gluon import _cli as cli
from jax_gluon import _timing
from jax_gluon import _tuning as tuning
from jax_gluon._plan import tuned_table


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Real calls of short problems, each of which takes what the clock says."""
    monkeypatch.setenv("JAX_GLUON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_LENGTHS", (8, 16, 32, 64))
    monkeypatch.setattr(tuning, "cases", list)
    monkeypatch.setattr(tuning.tune, "__kwdefaults__", {"rounds": 5, "least": 0.0})
    now, call_of, seconds = [0.0], tuning.call_of, {}
    monkeypatch.setattr(_timing, "perf_counter", lambda: now[0])

    def timed(case, device, kernel):
        call = call_of(case, device, kernel)
        first = []

        def run():
            if not first:  # runs once: the clock is planted
                first.append(call())
            now[0] += seconds[device](case)

        return run

    monkeypatch.setattr(tuning, "call_of", timed)
    return seconds


def test_the_gpu_is_chosen_from_where_it_pays(planted, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "OPERANDS", {"float32": (jnp.float32, None)})
    planted["cpu"] = tuning.products_of  # and a launch is as much as 3 times the second size
    planted["metal"] = lambda case: 3 * tuning.products_of(tuning.Case("", "forward", 64, 16))
    assert cli.main(["tune", "--device", "metal"]) == 0
    (found,) = tuned_table.measured("metal").crossovers
    # Constant against linear: they cross where the launch ends, and two sizes in a row are enough.
    assert found.min_products == pytest.approx(3 * 4 * 16 * 16 * 128, rel=0.01)
    assert found.max_products == 4 * 64 * 64 * 128
    assert f"float32: the GPU pays from {found.min_products} multiply-accumulates on" in "".join(
        capsys.readouterr()
    )
    assert cli.main(["tune", "--device", "metal", "--show"]) == 0
    assert f"float32: the GPU pays from {found.min_products}" in capsys.readouterr().out

    # As on a Mac; the device is tested elsewhere.
    monkeypatch.setenv("JAX_GLUON_METAL_BY_DEFAULT", "1")
    monkeypatch.setenv("JAX_GLUON_METAL_SELF_TEST", "0")
    for S, device in ((27, "cpu"), (29, "metal")):
        x = jax.ShapeDtypeStruct((1, S, 4, 64), jnp.float32)
        plan = jax_gluon.explain(x, x, x)
        assert plan.implementation == device
        assert f"from {found.min_products} on, as measured here for float32" in plan.reasons[0]
        out = jax_gluon.dot_product_attention(*(jnp.ones(x.shape),) * 3)
        assert jnp.allclose(out, 1.0)
        assert jax_gluon.debug.kernels()[-1]["device"] == device
    # Nothing was measured for others.
    x = jax.ShapeDtypeStruct((1, 64, 4, 64), jnp.bfloat16)
    plan = jax_gluon.explain(x, x, x)
    assert plan.implementation == "cpu"
    assert f"from {2**28} on by default" in plan.reasons[0]
    monkeypatch.setenv("JAX_GLUON_METAL_BY_DEFAULT", "0")
    assert jax_gluon.explain(x, x, x).reasons[0] == "the plugin's kernels run on the CPU platform"


def test_a_gpu_that_never_pays_is_never_chosen(planted, monkeypatch):
    monkeypatch.setattr(tuning, "OPERANDS", {"float32": (jnp.float32, None)})
    planted["cpu"], planted["metal"] = (lambda case: 1.0), (lambda case: 2.0)
    assert cli.main(["tune", "--device", "metal"]) == 0
    (found,) = tuned_table.measured("metal").crossovers
    assert found.min_products is None
    monkeypatch.setenv("JAX_GLUON_METAL_BY_DEFAULT", "1")
    monkeypatch.setenv("JAX_GLUON_METAL_SELF_TEST", "0")
    x = jax.ShapeDtypeStruct((8, 4096, 16, 128), jnp.float32)
    plan = jax_gluon.explain(x, x, x)
    assert plan.implementation == "cpu"
    assert f"float32 is not faster there up to {4 * 64 * 64 * 128}" in plan.reasons[0]


def test_a_crossover_that_is_not_sure_is_not_kept(planted, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "OPERANDS", {"float32": (jnp.float32, None)})
    disturbed = [0]

    def metal(case):
        disturbed[0] += 1
        return (0.1, 0.1, 9.0, 9.0)[disturbed[0] // 2 % 4]

    planted["cpu"], planted["metal"] = (lambda case: 1.0), metal
    assert cli.main(["tune", "--device", "metal"]) == 0
    assert "float32: NOT KEPT, unsure: 8 keys: Metal / CPU" in "".join(capsys.readouterr())
    assert tuned_table.measured("metal").crossovers == ()
