import pytest

from tests.studio import tiny


@pytest.fixture(scope="module")
def studio(quick_compilation):
    """(the studio, its address)"""
    with tiny.running() as running:
        yield running
