"""Short forms of the load tests, and the faults that each must show."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gluon
from tests.load import memory, problems, processes, software_metal, threads
from tests.load.outcome import Options, Outcome
from tests.load.problems import Problem
from tests.support import software_device

pytest.importorskip("jax_gluon._plugin", reason="jax_gluon._plugin is not built")

SHORT = Options(seconds=0.5, calls=100, problems=0, always=2)
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_threads():
    assert threads.run(SHORT).failures == []


def test_threads_show_a_result_of_other_bits(monkeypatch):
    first, *_ = problems.always()
    counted = itertools.count()

    def call(*x):
        results = first.call(*x)
        return results if next(counted) < 5 else jax.tree.map(lambda y: y + 1, results)

    wrong = dataclasses.replace(first, call=call)
    monkeypatch.setattr(problems, "always", lambda: [wrong])
    (failure, *_) = threads.run(SHORT).failures
    assert failure == f"{first.name}: other bits than alone"


@ON_LINUX
@pytest.mark.parametrize("leak", [0, 1 << 20])
def test_memory_is_flat_and_a_leak_is_seen(leak):
    """Of calls that fail, of which no program is compiled; `make load` has the other kinds.

    What other tests of the process left free must not hide the leak.
    """
    found = memory.slope(SHORT.calls, memory.failing_calls(), leak)
    assert (found > 1 << 19) == bool(leak)


@ON_LINUX
def test_forked_children_live():
    outcome = Outcome()
    processes.forked(SHORT, outcome)
    assert outcome.failures == []
    assert outcome.lines


@ON_LINUX
@pytest.mark.parametrize(
    ("target", "given", "how"),
    [
        (processes.without_jax, (), ""),
        (sys.exit, (3,), "ended with 3"),
        (signal.raise_signal, (signal.SIGKILL,), "ended with -9"),
        (time.sleep, (60,), "did not end in 1 seconds"),
    ],
)
def test_how_a_child_ended(target, given, how):
    fork = multiprocessing.get_context("fork")
    patience = 1 if target is time.sleep else 60
    assert processes.ended(fork, target, *given, patience=patience) == how


def test_spawned_children_have_the_parents_bits():
    outcome = Outcome()
    processes.started("spawn", dataclasses.replace(SHORT, always=1), outcome)
    assert outcome.failures == []


@ON_LINUX
def test_signals():
    """In a process of its own, whose handlers they are."""
    program = [sys.executable, "-m", "tests.load", "--only=signals", "--seconds=1", "--seed=1"]
    finished = subprocess.run(
        [*program, "--always=1", "--problems=0"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "KeyboardInterrupts" in finished.stdout


@pytest.fixture
def on_software_metal():
    """Calls of one program, whose kernels other tests of the device use too."""
    if sys.platform == "darwin":
        pytest.skip("plants faults in the device")
    software_device.build_folder()
    x = np.random.default_rng(0).standard_normal((1, 64, 2, 64), np.float32)
    operands = (jnp.asarray(x, jnp.float16),) * 3
    call = jax.jit(
        lambda *x: jax_gluon.dot_product_attention(*x, is_causal=True, implementation="metal")
    )
    load = software_metal.Load(SHORT, [Problem("forward", call, operands)], Outcome())
    load.right.append(load.every[0].digest())
    yield load
    load.device.clear()


def test_failures_of_a_device_are_clear_and_pass(on_software_metal):
    on_software_metal.one_after_the_other(1)
    on_software_metal.at_once(1)
    assert on_software_metal.outcome.failures == []
    assert on_software_metal.errors


def test_a_device_that_is_wrong_in_silence_is_seen(on_software_metal, monkeypatch):
    # What is not written would else be what the call before it wrote there.
    monkeypatch.setenv("JAX_GLUON_POISON", "1")
    on_software_metal.device.plant("lost_threadgroup", -1)
    on_software_metal.call(0, {})
    (failure,) = on_software_metal.outcome.failures
    assert failure == "other bits of forward"
