"""`jax-gluon tune`: its table, and what becomes of broken ones."""

import json
import warnings

import pytest

from jax_gluon import _cli as cli
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
        (lambda document: _with(document, H="x"), "not supported between"),
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


def test_tune_measures_and_goes_on_where_it_was(table, few_cases, monkeypatch, capsys):
    assert cli.main(["tune", "--rounds", "1"]) == 0
    first = tuned_table.measured("cpu").rows
    assert [(row.operands, row.direction, row.H, row.S) for row in first] == [
        ("float32", "forward", 64, 64),
        ("int8", "backward", 64, 64),
    ]
    for row, case in zip(first, few_cases, strict=True):
        assert set(row.seconds) == set(tuning.kernels_of(case, "cpu"))
        assert all(seconds > 0 for seconds in row.seconds.values())

    few_cases.append(tuning.Case("float16", "forward", 64, 64))
    measured = []

    def measure(case, device, **keywords):
        measured.append(case)
        return _row("float16", "forward", 64, 64, 1.0, 1.5, 2.0)

    monkeypatch.setattr(tuning, "measure", measure)
    assert cli.main(["tune"]) == 0
    assert measured == few_cases[2:]
    assert tuned_table.measured("cpu").rows[:2] == first
    assert "gluon / baseline 2.000" in capsys.readouterr().out + capsys.readouterr().err


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
        (["tune", "--rounds", "0"], "--rounds is 0; allowed: at least 1"),
        (["tune", "--device", "tpu"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert complaint in capsys.readouterr().err
