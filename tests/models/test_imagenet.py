"""torchvision's own ImageNet file, as a classifier and inside Mask R-CNN, where it is at hand.

COVIDMASK_IMAGENET names a folder for TORCH_HOME: hub/checkpoints/mobilenet_v2-b0353104.pth in it.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY_CLASSIFIER, TINY_DETECTOR
from torch import nn

from covidmask.errors import DataError
from covidmask.models import covid_ct_mask_net, lesion_mask_rcnn, set_regime
from covidmask.models.systems import ImageClassifier, load_system, save_system

HOME = os.environ.get("COVIDMASK_IMAGENET", "")
FILE = Path(HOME, "hub/checkpoints/mobilenet_v2-b0353104.pth")
WEIGHTS = "IMAGENET1K_V1"
MOBILE = replace(TINY_DETECTOR, backbone="mobilenet_v2", cut=1)
needs_file = pytest.mark.skipif(
    not HOME or not FILE.is_file(), reason="COVIDMASK_IMAGENET names no folder with the weights"
)


@pytest.fixture
def stored(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", HOME)  # torchvision finds it there without a network
    return torch.load(FILE, weights_only=True)


@needs_file
def test_a_classifier_has_all_of_them_but_the_head(stored):
    model = ImageClassifier("mobilenet_v2", ("no", "yes"), 64, WEIGHTS)
    own = model.network.state_dict()
    assert set(own) == set(stored)
    other = [name for name in stored if own[name].shape != stored[name].shape]
    assert other == ["classifier.1.weight", "classifier.1.bias"]
    body = [name for name in stored if name not in other]
    assert all(torch.equal(own[name], stored[name]) for name in body)


@needs_file
def test_its_features_are_those_of_torchvision(stored, tmp_path):
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    model = ImageClassifier("mobilenet_v2", ("no", "yes"), 64, WEIGHTS).eval()
    theirs = mobilenet_v2(weights=MobileNet_V2_Weights[WEIGHTS]).eval()
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(part)[:, None, None] for part in (
        [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # fmt: skip
    with torch.no_grad():
        pooled = theirs.features(((image - mean) / std)[None]).mean((2, 3))
        expected = model.network.classifier(pooled)
        torch.testing.assert_close(model([image]), expected, atol=1e-4, rtol=1e-4)
        again = load_system(save_system(model, tmp_path / "w.safetensors"))
        torch.testing.assert_close(again([image]), expected, atol=1e-4, rtol=1e-4)


@needs_file
def test_the_detector_has_them_in_its_backbone_and_trains(stored, tiny_lesions):
    torch.manual_seed(0)
    model = lesion_mask_rcnn(MOBILE, WEIGHTS)
    own = {f"features.{name}": v for name, v in model.backbone.body.state_dict().items()}
    assert len(own) > 100
    assert all(torch.equal(value, stored[name]) for name, value in own.items())
    images, targets = zip(*(tiny_lesions[i] for i in range(2)), strict=True)
    sum(model.train()(list(images), list(targets)).values()).backward()
    first = next(m for m in model.backbone.body.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad.abs().sum() > 0
    classifier = covid_ct_mask_net(model.eval(), TINY_CLASSIFIER)
    set_regime(classifier, "heads_bn")
    logits = classifier(list(images))
    assert logits.shape == (2, 3) and logits.isfinite().all()


def test_weights_that_cannot_be_downloaded_are_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no")))
    for build in (
        lambda: ImageClassifier("mobilenet_v2", ("no", "yes"), 64, WEIGHTS),
        lambda: lesion_mask_rcnn(MOBILE, WEIGHTS),
        lambda: ImageClassifier("mobilenet_v2", ("no", "yes"), 64, "NO_SUCH_WEIGHTS"),
    ):
        with pytest.raises(DataError, match="mobilenet_v2"):
            build()
