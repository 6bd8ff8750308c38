"""`jax-gluon tune`: its table, and what becomes of broken ones."""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from jax_gluon import _cli as cli
from jax_gluon import _timing
from jax_gluon import _tuning as tuning
from jax_gluon._plan import tuned_table
from jax_gluon._plan.selection import Measurement
from jax_gluon._plan.tuned_table import Crossover, Table

pytest.importorskip("jax_gluon._plugin")


def _row(operands, direction, H, S, *seconds):
    """Seconds of as many of the kernels that tune measures."""
    kernels = tuning.kernels_of(tuning.Case(operands, direction, H, S), "cpu")
    return Measurement(operands, direction, H, S, dict(zip(kernels, seconds, strict=False)))


TABLE = Table(
    (
        _row("float32", "forward", 64, 256, 1e-3, 2e-3, 2e-3),
        _row("float32", "forward", 64, 1024, 4e-3, 4.5e-3, 3e-3, 2.5e-3),
        _row("int8", "backward", 128, 1024, *[5e-3] * 8),
    ),
    (Crossover("float32", 10**6, 10**9), Crossover("int8", None, 10**9)),
)


def _with(document, **changes):
    """The document as text, its first row changed."""
    return json.dumps(document | {"rows": [document["rows"][0] | changes]})


def _spoiled(document, name, value):
    """The document as text, its first kernel changed."""
    first, *others = document["rows"][0]["kernels"]
    return _with(document, kernels=[first | {name: value}, *others])


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The file of the CPU's table, in a cache folder of its own."""
    monkeypatch.setenv("JAX_GLUON_CACHE_DIR", str(tmp_path))
    path = tuned_table.table_path("cpu")
    assert path is not None
    assert path.parent == tmp_path
    return path


def test_a_table_comes_back_as_it_was_kept(table):
    assert tuned_table.measured("cpu") == Table()
    tuned_table.save(table, "cpu", TABLE)
    assert tuned_table.measured("cpu") == TABLE
    tuned_table.save(table, "cpu", Table(TABLE.rows[:1]))  # read again: the file has changed
    assert tuned_table.measured("cpu") == Table(TABLE.rows[:1])
    assert [path.name for path in table.parent.iterdir()] == [table.name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda document: "{", "Expecting"),
        (lambda document: "[]", "list indices"),
        (lambda document: json.dumps(document | {"schema": 0}), 'its schema is "0", not "4"'),
        (lambda document: json.dumps(document | {"package": "9"}), 'its package is "9"'),
        (lambda document: json.dumps(document | {"device": "Other"}), 'its device is "Other"'),
        (lambda document: json.dumps({"schema": 4}), "'package'"),
        (lambda document: json.dumps(document | {"rows": [{"H": 64}]}), "missing 4 required"),
        (lambda document: json.dumps(document | {"rows": 3}), "not iterable"),
        (
            lambda document: json.dumps(document | {"crossovers": [{"operands": "int8"}]}),
            "missing 2 required",
        ),
        (
            lambda document: json.dumps(
                document
                | {"crossovers": [{"operands": "x", "min_products": -5, "max_products": 1}]}
            ),
            "a crossover has the number -5",
        ),
        (lambda document: _with(document, H=0), "a number that is not positive"),
        (lambda document: _with(document, H="x"), "'x' stands where int should"),
        (lambda document: _with(document, S=float("inf")), "inf stands where int should"),
        (lambda document: _with(document, operands=[1]), "[1] stands where str should"),
        (
            lambda document: _spoiled(
                document, "kernel", {"device": "cpu", "name": "gluon", "block_k": "128"}
            ),
            "'128' stands where int should",
        ),
        (lambda document: _spoiled(document, "seconds", float("inf")), "not positive"),
        (lambda document: _spoiled(document, "seconds", True), "True stands where int should"),
        (lambda document: "[" * 200_000, "recursion"),
        (lambda document: _with(document, kernels=[]), "kernels [] alone"),
        (
            lambda document: _with(document, kernels=document["rows"][0]["kernels"][:1]),
            "kernels ['baseline'] alone",
        ),
        (
            lambda document: _with(document, kernels=[{"kernel": {"device": "cpu", "a": 1}}]),
            "unexpected keyword",
        ),
    ],
)
def test_a_broken_or_foreign_table_is_ignored_with_a_warning(table, change, complaint):
    tuned_table.save(table, "cpu", TABLE)
    table.write_text(change(json.loads(table.read_text())))
    with pytest.warns(
        UserWarning, match=r"is ignored: .*`jax-gluon tune` makes a new one"
    ) as found:
        assert tuned_table.measured("cpu") == Table()
    assert complaint in str(found[0].message)
    # Once for a state of the file.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned_table.measured("cpu") == Table()
    # What follows makes a new one.
    tuned_table.save(table, "cpu", TABLE)
    assert tuned_table.measured("cpu") == TABLE


def test_without_a_cache_folder_there_is_no_table(monkeypatch):
    for name in ("JAX_GLUON_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert tuned_table.table_path("cpu") is None
    assert tuned_table.measured("cpu") == Table()
    with pytest.raises(SystemExit):
        cli.main(["tune"])


@pytest.fixture
def few_cases(monkeypatch):
    cases = [tuning.Case("float32", "forward", 64, 64), tuning.Case("int8", "backward", 64, 64)]
    monkeypatch.setattr(tuning, "cases", lambda: cases)
    return cases


class Clock:
    """A clock that stands still but for the contenders: each call takes what its list says next."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def contender(self, seconds):
        """A call that takes the seconds of an endless sequence."""

        def run():
            self.now += next(seconds)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(_timing, "perf_counter", clock)
    return clock


def compared(clock, sequences, rounds=5, least=0.0):
    settled = []

    def is_settled(found):
        settled.append(found.ratio("b", "a"))
        return settled[-1].is_sure

    contenders = {name: clock.contender(seconds) for name, seconds in sequences.items()}
    found = _timing.compare(contenders, is_settled, rounds=rounds, least=least)
    return found, settled


def turns(*seconds):
    """For `least` 0: the call that compiles, then each round's two, of which one counts."""
    yield 99.0
    for each in itertools.cycle(seconds):
        yield 99.0
        yield each


def test_a_quiet_machine_settles_it_at_once(clock):
    noise = 1.0 + 0.02 * np.random.default_rng(0).standard_normal(100)
    found, settled = compared(clock, {"a": turns(1.0), "b": turns(*(0.93 * noise))})
    assert len(settled) == 1
    assert found.ratio("b", "a").median == pytest.approx(0.93, rel=0.03)
    assert found.seconds() == {"a": 1.0, "b": pytest.approx(0.93, rel=0.03)}


def test_an_outlier_is_outvoted_by_more_rounds(clock):
    """Three rounds of the first five are disturbed, as were those that once gave 0.125."""
    disturbed = itertools.chain([8.0, 8.0, 8.0], itertools.repeat(1.0))
    found, settled = compared(
        clock, {"a": turns(*itertools.islice(disturbed, 40)), "b": turns(0.93)}
    )
    assert settled[0].median == pytest.approx(0.93 / 8)
    assert not settled[0].is_sure
    assert settled[-1].is_sure
    assert settled[-1].median == pytest.approx(0.93)
    assert found.seconds()["b"] == pytest.approx(0.93)


def test_what_never_settles_is_not_sure(clock):
    found, settled = compared(clock, {"a": turns(1.0, 8.0), "b": turns(1.0)})
    assert len(settled) == 4
    assert len(found.times["a"]) == 20
    assert not any(ratio.is_sure for ratio in settled)
    assert (settled[-1].low, settled[-1].high) == (1 / 8, 1.0)


def test_what_slows_all_down_cancels(clock):
    load = [1.0, 1.0, 3.0, 7.0, 2.0, 5.0, 1.0]
    found, settled = compared(
        clock, {"a": turns(*load), "b": turns(*(0.5 * each for each in load))}
    )
    assert len(settled) == 1
    assert found.ratio("b", "a") == _timing.Ratio(0.5, 0.5, 0.5, 5)


def test_a_hiccup_within_a_turn_is_no_round(clock):
    """Of the calls of a turn the median counts: one in five is disturbed."""
    calls = itertools.chain([9.0, 9.0], itertools.cycle([1.0, 1.0, 20.0, 1.0, 1.0]))
    sequences = {"a": calls, "b": itertools.repeat(0.9)}
    found, settled = compared(clock, sequences, least=2.5)
    assert len(settled) == 1
    assert set(found.times["a"]) == {1.0}


def test_the_interval_of_a_median():
    """That of the binomial distribution: 5 and 6 values use all, 20 leave out 5 at each end."""
    for n, cut in ((1, 0), (4, 0), (5, 0), (7, 0), (8, 1), (20, 5)):
        ratio = _timing._median([float(i) for i in range(n)])
        assert (ratio.low, ratio.high) == (cut, n - 1 - cut), n
        assert ratio.median == (n - 1) / 2


def _planted(monkeypatch, clock, seconds):
    """Calls that take no time but the clock's: `seconds(case, kernel, device)` of it."""

    def call_of(case, device, kernel):
        return clock.contender(seconds(case, device, kernel))

    monkeypatch.setattr(tuning, "call_of", call_of)


def test_tune_keeps_what_is_sure_and_says_what_is_not(table, few_cases, clock, monkeypatch, capsys):
    disturbed = few_cases[0].operands

    def seconds(case, device, kernel):
        usual = 1.0 if kernel.name == "baseline" else 0.93
        if case.operands == disturbed and kernel.name == "baseline":
            return itertools.cycle([1.0, 1.0, 8.0])
        return itertools.repeat(usual)

    _planted(monkeypatch, clock, seconds)
    assert cli.main(["tune"]) == 0
    text = "".join(capsys.readouterr())
    (row,) = tuned_table.measured("cpu").rows
    assert (row.operands, row.ratio) == ("int8", pytest.approx(0.93))
    assert set(row.seconds) == set(tuning.kernels_of(few_cases[1], "cpu"))
    assert "int8 backward H64 S64: gluon / baseline 0.930, fastest gluon" in text
    assert "float32 forward H64 S64: NOT KEPT, unsure: gluon / baseline " in text
    assert "20 rounds)" in text
    assert "1 not kept: their rounds differ too much." in text

    # The machine is quiet again: what is there is not measured anew.
    disturbed = ""
    measured = []
    measure = tuning.measure
    monkeypatch.setattr(
        tuning, "measure", lambda case, *x, **y: measured.append(case) or measure(case, *x, **y)
    )
    assert cli.main(["tune"]) == 0
    assert measured == few_cases[:1]
    assert [each.operands for each in tuned_table.measured("cpu").rows] == ["int8", "float32"]
    assert "not kept" not in "".join(capsys.readouterr())


def test_what_was_unsure_is_tried_again_at_the_end(table, few_cases, clock, monkeypatch):
    calls = []

    def measure(case, device, **keywords):
        calls.append(case)
        if case == few_cases[0] and len(calls) == 1:
            return tuning.Unsure("so it was")
        return _row(*dataclasses.astuple(case), 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(tuning, "measure", measure)
    found = list(tuning.tune(table, "cpu", seconds=99.0))
    assert calls == [*few_cases, few_cases[0]]
    assert [case for case, _ in found] == calls
    assert len(tuned_table.measured("cpu").rows) == 2


def test_real_calls_are_timed(table, few_cases, monkeypatch, capsys):
    monkeypatch.setattr(_timing, "MAX_SPREAD", 1e9)  # of a machine that runs other tests
    monkeypatch.setattr(tuning.tune, "__kwdefaults__", {"rounds": 5, "least": 0.0})
    assert cli.main(["tune"]) == 0
    first = tuned_table.measured("cpu").rows
    for row, case in zip(first, few_cases, strict=True):
        assert (row.operands, row.direction, row.H, row.S) == dataclasses.astuple(case)
        assert set(row.seconds) == set(tuning.kernels_of(case, "cpu"))
        assert all(seconds > 0 for seconds in row.seconds.values())


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([4.0, 2.0, 1.5], None),
        ([0.5, 2.0, 1.5], None),
        ([0.9, 0.5], 100),
        ([2.0, 0.5], 1000),  # halfway, of powers
        ([4.0, 0.5, 0.4], 100 * 100 ** (2 / 3)),
        ([0.5, 2.0, 0.5, 0.4], 100_000),
    ],
)
def test_where_the_gpu_begins_to_pay(ratios, expected):
    points = [(100 * 100**i, ratio) for i, ratio in enumerate(ratios)]
    found = tuning.crossing(points)
    assert found == (None if expected is None else round(expected))


def test_a_table_that_is_broken_is_set_aside(table, few_cases, clock, monkeypatch, capsys):
    _planted(monkeypatch, clock, lambda case, device, kernel: itertools.repeat(1.0))
    table.write_text("{")
    assert cli.main(["tune"]) == 0
    assert "it is kept as *.broken" in capsys.readouterr().out
    assert table.with_name(f"{table.name}.broken").read_text() == "{"
    assert len(tuned_table.measured("cpu").rows) == 2


def test_a_folder_that_can_not_be_written_is_named_first(tmp_path, few_cases, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "measure", lambda *x, **y: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert cli.main(["tune", "--table", str(tmp_path / "file" / "table.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jax-gluon tune: ")
    assert "can't be written" in line


@pytest.fixture
def full_disk():
    """A context in which files grow to 100 bytes and no further."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def full():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return full


def test_a_full_disk_costs_what_is_new_alone(
    table, few_cases, clock, monkeypatch, capsys, full_disk
):
    tuned_table.save(table, "cpu", TABLE)
    before = table.read_text()
    _planted(monkeypatch, clock, lambda case, device, kernel: itertools.repeat(1.0))
    with full_disk():
        assert cli.main(["tune"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("jax-gluon tune: ")
    assert str(table) in error
    assert table.read_text() == before
    assert [path.name for path in table.parent.iterdir()] == [table.name]


def test_a_plot_that_can_not_be_written_is_named(table, tmp_path, capsys):
    tuned_table.save(table, "cpu", TABLE)
    plot = tmp_path / "missing" / "plot.png"
    assert cli.main(["tune", "--show", "--plot", str(plot)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jax-gluon tune: ")
    assert str(plot) in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full_is_one_line(table):
    tuned_table.save(table, "cpu", TABLE)
    command = [sys.executable, "-m", "jax_gluon", "tune", "--show"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "jax-gluon tune: [Errno 28] No space left on device\n"


def test_tune_stops_in_time(table, few_cases, capsys):
    assert cli.main(["tune", "--seconds", "0"]) == 0
    assert "0 of 2 measured" in capsys.readouterr().out
    assert not table.exists()


def test_show(table, tmp_path, capsys):
    assert cli.main(["tune", "--show"]) == 1
    assert "there is no table" in capsys.readouterr().out
    tuned_table.save(table, "cpu", TABLE)
    plot = tmp_path / "plot.png"
    assert cli.main(["tune", "--show", "--plot", str(plot)]) == 0
    assert (
        "| float32 | forward | 64 | 1024 | 0.625 | gluon 256/128 | 2.500 |"
        in capsys.readouterr().out
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    table.write_text("{}")
    assert cli.main(["tune", "--show"]) == 1
    assert "is no table of this device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["tune", "--plot", "x.png"], "--plot goes with --show"),
        (["tune", "--rounds", "4"], "--rounds is 4; allowed: at least 5"),
        (["tune", "--device", "tpu"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_folder_in_place_of_a_table_is_left_alone(tmp_path, few_cases, capsys):
    assert cli.main(["tune", "--table", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
    assert tmp_path.is_dir()
    assert list(tmp_path.parent.glob("*.broken")) == []
