"""The baseline of benchmarks/speed.py does our arithmetic: same losses, gradients and AP."""

import copy
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, TinyLesions, TinySlices
from torch import nn

from covidmask.metrics.detection import IOU_THRESHOLDS
from covidmask.models.classifier import covid_ct_mask_net, set_regime
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import ShippedWeights
from covidmask.training.classification import classification_loss
from covidmask.training.loop import make_fabric
from covidmask.training.segmentation import evaluate_segmenter

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def baseline():
    path = ROOT / "benchmarks" / "released_loop.py"
    spec = importlib.util.spec_from_file_location("released_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["one level", "four levels"])
def model(request):
    torch.manual_seed(0)
    config = TINY_DETECTOR
    if request.param == "four levels":
        config = dataclasses.replace(config, backbone="resnet50", cut=0)
    model = covid_ct_mask_net(lesion_mask_rcnn(config), TINY_CLASSIFIER)
    images = torch.stack([TinySlices(6)[i][0] for i in range(6)])
    for layer in model.detector.backbone.modules():  # features that do not grow with depth
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        model.detector.backbone.train()((images - images.mean()) / images.std())
    return model.eval()


def batch(count=4):
    images = [TinySlices(count)[i][0] for i in range(count)]
    return images, torch.arange(count) % 3


@pytest.mark.parametrize("regime", ["heads_bn", "full"])
def test_loss_and_gradients_are_ours(baseline, model, regime):
    images, labels = batch()
    theirs = baseline.released(model)
    loss = baseline.training_step(theirs, images, labels, torch.optim.SGD(theirs.parameters(), 0.0))
    trained = {id(parameter) for parameter in set_regime(model.train(), regime)}
    total = 0
    for image, label in zip(images, labels, strict=True):  # one by one, as on a CPU
        ours = classification_loss(model([image]), label[None]) / len(images)
        ours.backward()
        total += ours.item()
    assert total == pytest.approx(loss, rel=1e-5)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = 0
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            assert parameter.grad is None, f"{name} learns nothing and has a gradient"
        elif wanted[name] is None or not wanted[name].any():
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            difference = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
            assert difference < 1e-5, (name, float(difference))
            compared += 1
    assert compared > 20


def test_baseline_differentiates_everything_and_leaves_the_model(baseline, model):
    set_regime(model, "heads")
    before = copy.deepcopy(model.state_dict())
    theirs = baseline.released(model)
    assert all(parameter.requires_grad for parameter in theirs.parameters())
    logits = baseline.logits(theirs, batch(1)[0][0])
    assert logits.requires_grad
    assert type(theirs.detector.roi_heads.box_roi_pool).__name__ == "MultiScaleRoIAlign"
    assert type(model.detector.roi_heads.box_roi_pool).__name__ == "LesionRoIAlign"
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    baseline.training_step(theirs, *batch(), optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_average_precision_is_ours(baseline):
    """The shipped segmenter finds lesions, so the AP is no zero."""
    segmenter = ShippedWeights.SEGMENTER_QUICK.load()
    dataset = TinyLesions(4)
    passes = []
    theirs = baseline.released(segmenter)
    theirs.register_forward_hook(lambda *_: passes.append(1))
    wanted = baseline.average_precision(theirs, dataset, IOU_THRESHOLDS, torch.device("cpu"))
    assert len(passes) == len(IOU_THRESHOLDS) * len(dataset)
    fabric = make_fabric(device="cpu")
    found = evaluate_segmenter(segmenter, dataset, fabric=fabric, score=0, progress=False)
    assert found["author_ap"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert found["author_ap50"] == pytest.approx(wanted[IOU_THRESHOLDS.index(0.5)], abs=1e-6)
    assert wanted[0] > 0.2
