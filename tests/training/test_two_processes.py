"""Two processes on the CPU (gloo) against one, with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("train_worker.py")


def run(kind, folder, processes):
    folder.mkdir()
    command = [sys.executable, str(WORKER)]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*command, kind, str(folder)], env=environment, check=True, timeout=300)
    names = ["final.pt"] if processes == 1 else ["rank0.pt", "rank1.pt"]
    return [torch.load(folder / name, weights_only=True) for name in names]


@pytest.mark.parametrize("kind", ["heads", "heads_bn"])
def test_classifier_gives_the_curve_and_weights_of_one_process(kind, tmp_path):
    (one,) = run(kind, tmp_path / "one", 1)
    first, second = run(kind, tmp_path / "two", 2)
    assert first["history"] == second["history"]
    for values, expected in zip(first["history"], one["history"], strict=True):
        assert values["bce"] == pytest.approx(expected["bce"], abs=1e-5)
    for name, tensor in one["model"].items():
        torch.testing.assert_close(first["model"][name], tensor, atol=2e-4, rtol=1e-3)
        assert torch.equal(first["model"][name], second["model"][name])
    assert sum(map(sum, first["result"]["confusion"])) == 12  # each slice once, not twice
    assert first["result"]["labels"] == one["result"]["labels"]


def test_segmenter_has_equal_weights_on_both_ranks_after_every_epoch(tmp_path):
    first, second = run("segmenter", tmp_path / "two", 2)
    assert len(first["epochs"]) == 4
    for one, two in zip(first["epochs"], second["epochs"], strict=True):
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not torch.equal(
        first["epochs"][0]["backbone.body.bn1.running_mean"],
        first["epochs"][1]["backbone.body.bn1.running_mean"],
    )
    judged = first["result"].pop("judged_here"), second["result"].pop("judged_here")
    assert sorted(judged[0] + judged[1]) == list(range(16))  # each slice once, not twice
    assert repr(first["result"]) == repr(second["result"])  # nan where nothing is found yet
    assert first["result"]["slices"] == 16
