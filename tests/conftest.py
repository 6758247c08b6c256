"""Fixtures that many tests share."""

import pytest
from tiny import TinyLesions, TinySlices


@pytest.fixture(scope="session")
def tiny_lesions():
    return TinyLesions()


@pytest.fixture(scope="session")
def tiny_slices():
    return TinySlices()
