"""A copy for prediction: the same numbers but for rounding, fewer layers, nothing that learns."""

import copy
import dataclasses

import pytest
import torch
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, TinySlices
from torch import nn

from covidmask.models.classifier import batch_norm_parameters, covid_ct_mask_net
from covidmask.models.inference import for_inference
from covidmask.models.segmentation import lesion_mask_rcnn


def used(model):
    """Give every batch norm statistics and parameters of its own, as training does."""
    torch.manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    return model


@pytest.fixture(params=["resnet18", "resnet50"])
def classifier(request):
    torch.manual_seed(0)
    changes = {"backbone": request.param, "cut": 0 if request.param == "resnet50" else 2}
    config = dataclasses.replace(TINY_DETECTOR, **changes)
    return used(covid_ct_mask_net(lesion_mask_rcnn(config), TINY_CLASSIFIER))


def test_same_features_and_rows_but_for_rounding(classifier):
    fast = for_inference(classifier)
    images = [TinySlices(3)[i][0] for i in range(3)]
    with torch.no_grad():
        batch = torch.stack(images)
        plain, folded = classifier.detector.backbone(batch), fast.detector.backbone(batch)
        for key, map in plain.items():
            torch.testing.assert_close(folded[key], map, rtol=1e-4, atol=1e-4 * map.std().item())
        assert fast(images).shape == (3, 3)
        rows = classifier.ranked_boxes(images)
        scores = fast.ranked_boxes(images)[..., 0]
    torch.testing.assert_close(scores, rows[..., 0], rtol=1e-3, atol=1e-4)


def test_every_batch_norm_is_folded_and_nothing_learns(classifier):
    assert batch_norm_parameters(classifier)
    fast = for_inference(classifier.train())
    assert not batch_norm_parameters(fast)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not any(module.training for module in fast.modules())


def test_the_model_is_left_as_it_is_and_shares_nothing(classifier):
    before = copy.deepcopy(classifier.state_dict())
    learning = [parameter.requires_grad for parameter in classifier.parameters()]
    fast = for_inference(classifier)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
    for key, value in classifier.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert [parameter.requires_grad for parameter in classifier.parameters()] == learning
