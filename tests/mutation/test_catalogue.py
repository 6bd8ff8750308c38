"""The catalogue of faults is of this source: `python -m tests.mutation` plants them."""

import collections
from pathlib import Path

import pytest

from tests.mutation.catalogue import FAULTS
from tests.mutation.fault import Fault

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_faults_of_a_file_can_be_planted(file):
    text = (ROOT / file).read_text()
    for fault in FAULTS:
        if fault.file == file:
            assert fault.applied(text) != text
            missing = [x for x in fault.tests if x.endswith(".py") and not (ROOT / x).exists()]
            assert not missing, missing


def test_of_many_kinds_in_every_domain():
    assert len({fault[:4] for fault in FAULTS}) == len(FAULTS) >= 60
    assert len({fault.kind for fault in FAULTS}) >= 10
    domains = collections.Counter(fault.domain for fault in FAULTS)
    assert min(domains[domain] for domain in ("python", "shaders", "cpu")) >= 10


@pytest.mark.parametrize("text", ["", "x = 1\nx = 1\n"])
def test_text_that_is_not_there_once_is_an_error(text):
    fault = Fault("wrong sign", "jax_gluon/_dropout.py", "x = 1", "x = 2", ())
    with pytest.raises(ValueError, match="times, not once"):
        fault.applied(text)
