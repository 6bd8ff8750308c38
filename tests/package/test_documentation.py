"""The examples in the README, in the documentation and in docstrings run as they stand."""

import doctest
import re
from pathlib import Path

import pytest

import jax_gluon
from jax_gluon import debug, reference
from jax_gluon import equinox as gluon_equinox
from jax_gluon import flax as gluon_flax
from jax_gluon import keras as gluon_keras
from jax_gluon import linen as gluon_linen
from jax_gluon import nnx as gluon_nnx
from jax_gluon._plan import selection
from jax_gluon._quantization import formats

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *(path for each in ("shaders", "softmetal", "plugin") for path in (ROOT / each).rglob("*.md")),
]


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: p.name)
def test_examples_of_a_page_run_in_order(page, require):
    if page.name == "metal.md":
        require("metal")
    if page.name == "use-a-published-model.md":
        pytest.importorskip("keras_hub", reason="make test-frameworks installs KerasHub")
    namespace: dict[str, object] = {}
    for number, example in enumerate(examples(page)):
        exec(compile(example, f"{page.name}, example {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


FOLDERS = (
    "jax_gluon", "plugin", "shaders", "softmetal", "tests", "tools", "benchmarks", "demo", "docs",
    "examples",
)  # fmt: skip
#: Files that a page asks its reader to have, or that a command writes.
OF_READERS = {"FILE.metal", "demo.png", "images.png", "program.py", "train.py"}


def tails(path: Path) -> set[str]:
    """The ways in which a page may name a file: its path, or the end of it."""
    parts = path.relative_to(ROOT).parts
    return {"/".join(parts[i:]) for i in range(len(parts))}


@pytest.fixture(scope="module")
def names():
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    top = (path for path in ROOT.iterdir() if path.is_file())
    return set().union(*map(tails, (*found, *top)))


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_and_folders_are_there(page, names):
    text = re.sub(r"https?://\S+|-m [\w.]+", "", page.read_text(encoding="utf-8"))
    words = {word.strip("./") for word in re.findall(r"[\w./*<>{}-]+", text)}
    named = re.compile(
        rf"[\w/-]+\.(cc|cmake|h|metal|mm|png|py|sh|toml)|({'|'.join(FOLDERS)})/[\w/.-]+"
    )
    missing = {word for word in words if named.fullmatch(word)} - names - OF_READERS
    assert not missing, f"{page.name} names what is not there: {sorted(missing)}"


def test_the_first_pages_have_examples():
    assert len(examples(ROOT / "README.md")) >= 1
    assert len(examples(ROOT / "docs" / "start.md")) >= 3


def test_the_site_opens_with_the_readme():
    readme, index = (
        (ROOT / name).read_text(encoding="utf-8").split("## Read on")[0]
        for name in ("README.md", "docs/index.md")
    )
    assert index == readme.replace("](docs/", "](")


def test_the_readme_is_short():
    """Two screens: some 60 lines as a browser shows them, of which a table's row is one or two."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 700
    first = text.split("## Read on")[0].lower()
    assert "softmetal" not in first
    assert "gluon" not in re.sub(r"jax[-_]gluon", "", first)


PUBLIC = {
    f"{owner.__name__}.{name}": getattr(owner, name)
    for owner, names in (
        (jax_gluon, jax_gluon.__all__),
        (gluon_flax, ("attention_fn",)),
        (gluon_equinox, ("MultiheadAttention", "convert")),
        (gluon_linen, ("MultiHeadDotProductAttention",)),
        (gluon_nnx, ("MultiHeadAttention",)),
        (gluon_keras, ("MultiHeadAttention", "GroupQueryAttention")),
        (reference, ("dot_product_attention", "fake_quantize")),
        (formats, ("QuantizedTensor",)),
        (debug, ("kernels",)),
        (selection, ("select_kernel",)),
    )
    for name in names
    if not isinstance(getattr(owner, name), type(re))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_of_a_docstring(name, require):
    if name == "jax_gluon.pin":
        require("metal")
    tests = doctest.DocTestFinder(exclude_empty=True).find(PUBLIC[name], name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        if test.examples:
            assert runner.run(test).failed == 0


def test_public_functions_have_examples():
    for name, function in PUBLIC.items():
        if callable(function) and not isinstance(function, type):
            assert ">>>" in (function.__doc__ or ""), name
