import pytest


@pytest.fixture(scope="session")
def device():
    return None
