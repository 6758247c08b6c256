"""Fixtures that many tests share. Without COVIDMASK_GPU every test runs on the CPU."""

import os

import pytest
from tiny import TinyLesions, TinySlices

# A GPU adds up in any order and so rounds otherwise each time; most tests compare digits.
if not os.environ.get("COVIDMASK_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_lesions():
    return TinyLesions()


@pytest.fixture(scope="session")
def tiny_slices():
    return TinySlices()
