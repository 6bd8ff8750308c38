"""The command `jax-gluon`: doctor, the programs of the repository, terminals, bad surroundings."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from jax_gluon import __version__, _native
from jax_gluon import _cli as cli
from jax_gluon._cli import programs
from jax_gluon._cli.console import Console
from jax_gluon._doctor import facts, self_test
from jax_gluon._plan import tuned_table

pytest.importorskip("jax_gluon._plugin")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own."""
    monkeypatch.setenv("JAX_GLUON_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def few(monkeypatch, cache):
    """Two formats on one instruction set beside the chosen one."""
    chosen = _native.plugin().cpu_isa()
    variants = list(dict.fromkeys([chosen, "portable"]))
    formats = {name: self_test.FORMATS[name] for name in ("float32", "int8")}
    monkeypatch.setattr(self_test, "FORMATS", formats)
    monkeypatch.setattr(self_test, "_variants", lambda device: variants)
    monkeypatch.setattr(self_test.run, "__defaults__", (("cpu",), tuple(formats)))
    return variants


def printed(capsys, *arguments):
    """Status and output of the command."""
    status = cli.main(list(arguments))
    return status, capsys.readouterr().out


def test_doctor_runs_every_kernel_in_every_pass(few, capsys):
    status, text = printed(capsys, "doctor", "--json")
    report = json.loads(text)
    assert status == 0
    assert report["ok"]
    assert report["problems"] == []
    ran = {
        (x["variant"], x["operands"], x["kernel"], x["direction"])
        for x in report["self_test"]["checks"]
    }
    wanted = {
        (variant, operands, kernel, direction)
        for variant in few
        for operands in ("float32", "int8")
        for kernel, direction in [
            ("baseline", "forward"), ("baseline", "backward"), ("gluon", "forward"),
            ("gluon", "backward"), ("decode", "forward"),
            ("small", "forward") if operands == "float32" else ("quantize", "codes"),
        ]
    }  # fmt: skip
    assert ran == wanted
    assert all(x["passed"] and 0 < x["error"] <= x["bar"] for x in report["self_test"]["checks"])
    assert report["versions"]["jax-gluon"] == __version__
    assert report["ffi"]["plugin"] == "0.1"
    assert report["ffi"]["jaxlib"].startswith("0.")
    assert len(report["plans"]) == 5
    assert all(plan["reasons"] and plan["implementation"] == "cpu" for plan in report["plans"])


def test_doctor_finds_kernels_that_are_wrong(few, monkeypatch, capsys):
    attend = self_test.dot_product_attention

    def wrong(query, key, value, **keywords):
        if keywords["kernel"][0] == "decode":
            raise RuntimeError("no such\ninstruction")
        return attend(query, key, value * 1.03, **keywords)

    monkeypatch.setattr(self_test, "dot_product_attention", wrong)
    status, text = printed(capsys, "doctor")
    assert status == 1
    assert "Nothing is wrong" not in text
    isa = few[0]
    (line,) = (x for x in text.splitlines() if f"cpu ({isa}): gluon, float32 backward" in x)
    assert line.startswith("FAILED: ")
    assert "relative error 3.0e-02; allowed: 5.0e-06" in line
    assert f"FAILED: cpu ({isa}): decode, int8 forward: RuntimeError: no such\n" in text
    assert "1 of 1 FAILED" in text or "2 of 2 FAILED" in text


def test_doctor_finds_another_kernel_than_was_asked_for(few, monkeypatch):
    attend = self_test.dot_product_attention
    monkeypatch.setattr(
        self_test,
        "dot_product_attention",
        lambda *x, **keywords: attend(*x, **keywords | {"kernel": "baseline"}),
    )
    checks = [x for x in self_test.run(("cpu",), ("float32",)) if x.kernel == "gluon"]
    assert {x.problem for x in checks} == {'"baseline" ran on "cpu"'}
    assert not any(x.passed for x in checks)


def test_doctor_says_what_is_no_use(cache, monkeypatch, capsys):
    monkeypatch.setenv("JAX_GLUON_CPU_ISA", "sse9")
    status, text = printed(capsys, "doctor", "--no-test")
    assert status == 1
    assert 'FAILED: JAX_GLUON_CPU_ISA is "sse9"; allowed here: ' in text

    monkeypatch.delenv("JAX_GLUON_CPU_ISA")
    path = tuned_table.table_path("cpu")
    path.write_text("{")
    other = cache / "tuned-9.9-other.json"
    other.write_text("{}")
    status, text = printed(capsys, "doctor", "--no-test")
    assert status == 0
    assert f"note: {path}: BROKEN, ignored: Expecting" in text
    assert "of another device or version" in text
    assert path.read_text() == "{"  # whoever wants to may look at it
    monkeypatch.setenv("JAX_GLUON_CACHE_DIR", str(other))
    assert (
        f"note: nothing is kept in the cache folder: {other} is no folder"
        in printed(capsys, "doctor", "--no-test")[1]
    )


def test_doctor_without_the_plugin(cache, monkeypatch, capsys):
    def missing():
        raise ImportError("jax_gluon's compiled plugin can't be imported")

    monkeypatch.setattr(_native, "plugin", missing)
    status, text = printed(capsys, "doctor")
    assert status == 1
    assert "FAILED: jax_gluon's compiled plugin can't be imported" in text
    assert "Traceback" not in text


def test_features_say_which_are_used():
    found = facts.processor()
    used = {name for name, state in found["features"].items() if state == "used"}
    assert set(facts.VARIANTS.get(found["kernels"], ())) <= used
    assert used <= facts._features() | {"avx512_vnni"}


class Terminal:
    """A terminal of an encoding, whose text is kept."""

    def __init__(self, encoding="utf-8"):
        self.encoding, self.text = encoding, ""

    def write(self, text):
        text.encode(self.encoding)  # raises where a terminal would
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True

    def fileno(self):
        raise OSError


@pytest.mark.parametrize(
    ("encoding", "environment", "has_colors"),
    [
        ("utf-8", {}, True),
        ("utf-8", {"NO_COLOR": "1"}, False),
        ("utf-8", {"TERM": "dumb"}, False),
        ("ascii", {}, False),
    ],
)
def test_terminals(monkeypatch, encoding, environment, has_colors):
    pytest.importorskip("rich")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | environment).items():
        monkeypatch.setenv(name, value)
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    console = Console()
    console.table("Title", ("a", "b"), [("1 [x]", "é")], ["bad"])
    console.line("[bold]not markup", "good")
    assert ("\x1b[3" in terminal.text or "\x1b[1;3" in terminal.text) == has_colors
    for text in ("Title", "1 [x]", "[bold]not markup"):
        assert text in terminal.text


def test_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    Console().table("Title", ("name", "n"), [("a", "1"), ("long", "22")])
    assert terminal.text == "Title\n  name  n\n  a     1\n  long  22\n\n"


def test_version_and_help(capsys):
    for arguments, text in ((["--version"], f"jax-gluon {__version__}\n"), (["--help"], "doctor")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn"),
        (["treat"], "invalid choice: 'treat'"),
    ],
)
def test_bad_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_programs_of_the_repository(monkeypatch, capfd, tmp_path):
    """Found in the checkout, with the arguments that follow; else one line says what to do."""
    pytest.importorskip("tqdm")
    assert cli.main(["bench", "--help"]) == 0
    assert "--suite {floor,quick" in capfd.readouterr().out
    assert cli.main(["bench", "--suite", "nothing"]) == 2
    assert "invalid choice: 'nothing'" in capfd.readouterr().err

    monkeypatch.setattr(programs.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--plot", "x.png"]) == 1
    complaint = 'tqdm, matplotlib is not installed: pip install "jax-gluon[bench]"'
    assert capfd.readouterr().err == f"jax-gluon bench: {complaint}\n"
    monkeypatch.setattr(programs.jax_gluon, "__file__", str(tmp_path / "site/jax_gluon/x.py"))
    monkeypatch.chdir(tmp_path)
    for name in programs.PROGRAMS:
        assert cli.main([name]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"jax-gluon {name}: ")
        assert "run it in a checkout" in line


def test_programs_are_those_that_there_are():
    for program in programs.PROGRAMS.values():
        assert importlib.util.find_spec(program.module) is not None


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )


def test_the_import_is_light():
    """Nothing of optional packages, of the commands, or of what JAX itself leaves for later."""
    finished = run_python(
        "import sys, jax, jax.numpy; before = set(sys.modules); import jax_gluon\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    names = finished.stdout.split()
    heavy = ("rich", "tqdm", "matplotlib", "flax", "optax", "jax.extend", "jax_gluon._cli",
             "jax_gluon._doctor", "jax_gluon._tuning", "jax._src.pallas")  # fmt: skip
    assert "jax_gluon" in names
    assert not [name for name in names if name.startswith(heavy)]


def test_a_jax_that_is_too_old_is_named():
    finished = run_python(
        "import jax; jax.__version__, jax.__version_info__ = '0.4.30', (0, 4, 30)\n"
        "import jax_gluon._cli"
    )
    assert finished.returncode == 1
    last = finished.stderr.splitlines()[-1]
    assert last == (
        'ImportError: jax_gluon needs jax 0.5.0 or later, found 0.4.30: pip install --upgrade "jax"'
    )


def test_a_standard_output_that_is_closed(cache, monkeypatch):
    """As `jax-gluon doctor >&-` has it."""
    monkeypatch.setattr(sys, "stdout", None)
    console = Console()
    console.line("nobody reads this")
    console.table("nor", ["this"], [["one"]])
