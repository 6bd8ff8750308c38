"""The benchmark of several GPUs, here on devices of the CPU."""

from benchmarks import context_parallel

SMALL = ["--tokens", "256", "--heads", "8", "--head-dim", "32", "--link", "1"]


def rows(printed, columns):
    """Cells of each row of the tables that have as many columns."""
    lines = [line.strip("|").split(" | ") for line in printed.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line] for line in lines if len(line) == columns]


def test_errors_and_bytes(capsys):
    context_parallel.main([*SMALL, "--names", "ring", "ring int8", "--check"])
    printed = capsys.readouterr().out
    # Against attention of the operands as they are: the codes' own error is in it.
    errors = {name: max(map(float, cells)) for name, *cells in rows(printed, 5)[1:4]}
    assert errors["one"] < 3e-3
    assert errors["ring"] < 3.5e-3
    assert errors["ring int8"] < 1.5e-2
    sent = {(name, direction): (x, y) for name, direction, x, y, _ in rows(printed, 5)[5:]}
    for name in ("ring", "ring int8"):
        formula, program = map(float, sent[name, "forward"])
        assert formula == program > 0


def test_devices_take_turns_with_one(capsys):
    context_parallel.main([*SMALL, "--rounds", "1", "--names", "all_to_all"])
    table = rows(capsys.readouterr().out, 4)
    assert [row[:2] for row in table[1:]] == [["256", "forward"], ["256", "both"]]
    for *_, one, several in table[1:]:
        milliseconds, scaling = several.rstrip(")").split(" (")
        # 8 devices; scaling has two digits.
        assert abs(float(one) / 8 / float(milliseconds) - float(scaling)) < 0.01
