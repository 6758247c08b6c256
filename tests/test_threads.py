"""Threads of torch that wait do not spin, since on a busy machine the others need their cores."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("chosen", "found"), [(None, "passive"), ("active", "active")])
def test_commands_let_waiting_threads_rest_unless_the_reader_says_otherwise(chosen, found):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    code = (
        "import covidmask.cli, os, sys\n"
        "assert 'torch' not in sys.modules, 'too late for OpenMP'\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == found
