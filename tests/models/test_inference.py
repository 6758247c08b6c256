"""A copy for prediction: the same numbers but for rounding, fewer layers, nothing that learns."""

import copy
import dataclasses

import pytest
import torch
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, TinySlices
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from covidmask.models.classifier import batch_norm_parameters, covid_ct_mask_net
from covidmask.models.detector import for_inference, lesion_mask_rcnn


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


class NormAct(nn.BatchNorm2d):
    """A batch norm that carries an activation, as timm's do."""

    def forward(self, x):
        return super().forward(x).relu()


class OtherOrder(nn.Module):
    """Attributes in one order, calls in another."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(x))


class Scaled(nn.Sequential):
    """A sequence with a way of its own."""

    def forward(self, x):
        return 2 * self[0](x.relu())


def hooked():
    """A convolution that sets its weights at each call, as weight normalisation does."""
    conv = nn.Conv2d(3, 4, 3)
    conv.register_forward_pre_hook(set_weights)
    return nn.Sequential(conv, nn.BatchNorm2d(4))


def set_weights(conv, inputs):
    conv.weight.data.fill_(0.1)


def watched():
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, inputs, output: output.relu())
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)


def one_activation():
    relu = nn.ReLU()  # stands between the two a second time
    return nn.Sequential(relu, nn.Conv2d(3, 4, 3), relu, nn.BatchNorm2d(4))


class OtherStem(ResNet):
    def _forward_impl(self, x):
        return self.conv1(x)


UNKNOWN = {
    "watched": watched,
    "one activation": one_activation,
    "other stem": lambda: OtherStem(BasicBlock, [0, 0, 0, 0]),
    "activation": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)),
    "order": OtherOrder,
    "own forward": lambda: Scaled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "batch statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "hook": hooked,
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_not_known_is_left(kind):
    torch.manual_seed(0)
    model = used(UNKNOWN[kind]().eval()) if kind != "batch statistics" else UNKNOWN[kind]()
    image = torch.randn(2, 3, 9, 12)
    expected = model.eval()(image)
    fast = for_inference(model)
    torch.testing.assert_close(fast(image), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, nn.BatchNorm2d) for m in fast.modules()) == (kind != "plain")
