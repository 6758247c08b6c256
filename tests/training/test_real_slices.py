"""Three training steps on real slices of COVID-SemiSeg, where a reader has them."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY_DETECTOR, tiny_training
from torch.utils.data import Subset

from covidmask.datasets.lesions import SemiSeg
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training.segmentation import train_segmenter

REAL = os.environ.get("COVIDMASK_REAL")


@pytest.mark.skipif(not REAL, reason="COVIDMASK_REAL names no folder with real slices")
def test_three_steps_on_real_slices():
    dataset = SemiSeg(Path(REAL) / "covid-semiseg", "train", min_area=20)
    assert len(dataset) == 50
    part = Subset(dataset, range(6))
    part.names = dataset.names[:6]
    torch.manual_seed(0)
    model = lesion_mask_rcnn(replace(TINY_DETECTOR, image_size=128, max_size=256))
    before = model.backbone.body.conv1.weight.detach().clone()
    history = train_segmenter(model, part, tiny_training(epochs=1, batch_size=2), progress=False)
    assert len(history) == 3 and all(math.isfinite(values["loss"]) for values in history)
    assert not torch.equal(before, model.backbone.body.conv1.weight)
