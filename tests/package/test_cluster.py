"""Two processes of two devices train what one device does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RUN = ["--steps", "4", "--length", "64", "--batch", "2"]


def start(path, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "demo.cluster", *RUN, "--weights", path, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_two_processes_train_what_one_device_does(tmp_path):
    address = f"localhost:{free_port()}"
    together = ["--processes", "2", "--coordinator", address, "--cpu-devices", "2"]
    together += ["--batch-devices", "2"]
    runs = [
        start(tmp_path / "alone.npz"),
        *(start(tmp_path / "four.npz", *together, "--process", str(i)) for i in range(2)),
    ]
    try:
        said = [run.communicate(timeout=300)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0, 0], "\n".join(said)
    assert "1 processes, 1 devices" in said[0]
    assert "2 processes, 4 devices" in said[1]
    losses = [
        [float(line.split()[-1]) for line in text.splitlines() if line.startswith("step ")]
        for text in said[:2]
    ]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    alone, four = (np.load(tmp_path / f"{name}.npz") for name in ("alone", "four"))
    for name in alone.files:
        error = np.linalg.norm(four[name] - alone[name]) / np.linalg.norm(alone[name])
        assert error <= 1e-5, (name, error)
