"""The U-Net on drawn and real slices: its folds, its parts, and the page that shows them."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from covidmask.datasets.lesions import SemiSeg
from covidmask.datasets.phantom_sets import write_semiseg_phantoms

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbours
    return importlib.import_module("real_slices")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_semiseg_phantoms(tmp_path_factory.mktemp("semiseg") / "set", 64, (15, 0))


def test_unet_gives_a_logit_for_each_class_and_pixel(benchmark):
    net = benchmark.UNet()
    assert net(torch.rand(2, 1, 40, 48)).shape == (2, 3, 40, 48)
    assert 0.85e6 < sum(p.numel() for p in net.parameters()) < 0.95e6


def test_no_network_is_judged_on_slices_of_its_training(benchmark, data):
    whole = SemiSeg(data, "train", min_area=1)
    folds = [benchmark.fold_of(whole, k) for k in range(benchmark.FOLDS)]
    assert sorted(i for test, _ in folds for i in test) == list(range(15))
    assert all(sorted(test + rest) == list(range(15)) for test, rest in folds)


def test_half_of_a_mixed_batch_is_drawn(benchmark):
    class Constant:
        def __init__(self, code):
            self.code, self.seen = code, []

        def read(self, index):
            self.seen.append(index)
            return np.full((4, 4), self.code / 10, np.float32), np.full((4, 4), self.code, np.uint8)

    lung, dense = Constant(1), Constant(3)
    (images, truth), _ = benchmark.batches([lung, dense], 0, 2)
    assert truth[:, 0, 0].tolist() == [0] * 4 + [2] * 4
    assert images.shape == (8, 1, 4, 4)
    assert lung.seen == dense.seen == list(range(8))


@pytest.mark.slow
def test_the_curve_trains_what_is_lacking_and_fills_the_page(
    benchmark, data, tmp_path, monkeypatch
):
    page, looks = tmp_path / "page.py", []
    marks = [
        line for line in benchmark.TWIN.read_text("utf-8").splitlines() if "real_slices -->" in line
    ]
    page.write_text("\n".join(marks) + "\n", encoding="utf-8")  # those of the page itself
    (tmp_path / "README.md").write_text("<!-- segmenter_ct -->\n<!-- /segmenter_ct -->\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALLOW_DIRTY", "1")
    for name, value in (
        ("SIZES", (3, 6)),
        ("TWIN", page),
        ("BESIDE", tmp_path / "none"),
        ("README", tmp_path / "README.md"),
    ):
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "OUT", ROOT / "results" / "real_slices.json")
    monkeypatch.setattr(benchmark, "log", looks.append)
    out = tmp_path / "out.json"
    benchmark.curve(data, steps=2, size=32, different=4, out=out)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["parts"]) == 1 + 2 * len(benchmark.ARMS) * benchmark.FOLDS
    assert benchmark.of_slices(result["parts"], "mixed", 6).shape == (15, 3, 5)
    assert len(looks) == 1 and page.read_text(encoding="utf-8").count("| drawn first |") == 2
    monkeypatch.setattr(benchmark, "fit", lambda *_: 1 / 0)  # nothing is lacking now
    benchmark.curve(data, steps=2, size=32, different=4, out=out)


def test_the_pages_show_the_results_files(benchmark, tmp_path, monkeypatch):
    shown = {name: getattr(benchmark, name) for name in ("TWIN", "README")}
    for name, file in shown.items():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        monkeypatch.setattr(benchmark, name, tmp_path / file.name)
    benchmark.page()
    for file in shown.values():
        assert (tmp_path / file.name).read_text("utf-8") == file.read_text("utf-8"), (
            "run `python benchmarks/real_slices.py page`, then `make notebooks`"
        )
