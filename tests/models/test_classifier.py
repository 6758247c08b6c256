"""Module S, the assembled model and what each regime trains."""

import pytest
import torch

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.models.classifier import (
    REGIMES,
    ClassificationModule,
    batch_norm_parameters,
    covid_ct_mask_net,
    set_regime,
)
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training.classification import classification_loss

TINY = DetectorConfig(
    backbone="resnet18", cut=2, image_size=64, fpn_channels=32, rpn_test_proposals=100
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return covid_ct_mask_net(lesion_mask_rcnn(TINY), ClassifierConfig(n_boxes=16, hidden=32))


def images(count=2):
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(3, 64, 64, generator=generator) for _ in range(count)]


def test_s_is_two_relu_layers_and_a_linear_one():
    s = ClassificationModule(4, 8)
    rows = torch.randn(2, 4, 5)
    x = rows.reshape(2, 20)
    x = torch.clamp(x @ s.fc_scores.weight.T + s.fc_scores.bias, min=0)
    x = torch.clamp(x @ s.fc_scores_2.weight.T + s.fc_scores_2.bias, min=0)
    expected = x @ s.fc_scores_img.weight.T + s.fc_scores_img.bias
    torch.testing.assert_close(s(rows), expected)


def test_s_starts_as_in_the_paper():
    """Kaiming-normal weights of fan-out and ReLU's gain, and no bias."""
    torch.manual_seed(0)
    s = ClassificationModule(64, 512)
    for layer in (s.fc_scores, s.fc_scores_2, s.fc_scores_img):
        weights = layer.weight.detach()
        expected = (2 / layer.out_features) ** 0.5  # the inputs are 320, 512 and 512
        assert weights.std().item() == pytest.approx(expected, rel=0.05)
        assert abs(weights.mean().item()) < 0.1 * expected
        assert weights.abs().max() > 2.5 * expected  # a uniform draw ends at 1.73
        assert not layer.bias.any()
    assert [layer.out_features for layer in (s.fc_scores, s.fc_scores_2, s.fc_scores_img)] == [
        512, 512, 3
    ]  # fmt: skip


def test_logits_are_s_of_the_ranked_boxes(model):
    with torch.no_grad():
        rows = model.ranked_boxes(images())
        assert rows.shape == (2, 16, 5)
        torch.testing.assert_close(model(images()), model.s(rows))


def test_the_generator_decides_the_padding(model):
    model.config = ClassifierConfig(n_boxes=300, hidden=32)
    with torch.no_grad():
        plain = model.ranked_boxes(images(1))
        one, two, other = (
            model.ranked_boxes(images(1), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
    assert torch.equal(one, two) and not torch.equal(one, other) and not torch.equal(one, plain)


def test_a_new_model_is_ready_to_predict(model):
    assert not any(module.training for module in model.modules())
    model.train().train(False)
    assert not model.s.training


def test_the_detector_stays_in_eval_mode(model):
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.train()
    assert model.s.training and not any(m.training for m in model.detector.modules())
    set_regime(model, "full")
    model(images()).sum().backward()
    after = model.state_dict()
    assert before and all(torch.equal(after[k], v) for k, v in before.items())


def test_the_segmenter_is_left_as_it_was():
    segmenter = lesion_mask_rcnn(TINY)
    model = covid_ct_mask_net(segmenter, ClassifierConfig(n_boxes=16, hidden=32))
    assert segmenter.roi_heads.has_mask() and not model.detector.roi_heads.has_mask()
    assert not any("mask" in name or "semantic" in name for name in model.state_dict())
    own = {p.data_ptr() for p in segmenter.parameters()}
    assert not own & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("regime", REGIMES)
def test_a_step_changes_what_the_regime_names_and_nothing_else(model, regime):
    trained = set_regime(model, regime)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    loss = classification_loss(model(images()), torch.tensor([0, 2]))
    loss.backward()
    torch.optim.Adam(trained, lr=1e-2).step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    batch_norm = {id(p) for p in batch_norm_parameters(model)}
    for name, parameter in model.named_parameters():
        allowed = (
            name.startswith("s.")
            or (regime == "heads_bn" and id(parameter) in batch_norm)
            or (regime == "full" and not name.startswith("detector.rpn"))
        )
        assert parameter.requires_grad == (
            regime == "full" or name.startswith("s.") or name in changed or allowed
        )
        assert allowed or name not in changed, name
    assert "s.fc_scores_img.weight" in changed
    assert ("detector.backbone.body.bn1.weight" in changed) == (regime != "heads")
    downsample = "detector.backbone.body.layer2.0.downsample.1.weight"
    assert (downsample in changed) == (regime != "heads")
    assert ("detector.backbone.body.conv1.weight" in changed) == (regime == "full")


def test_unknown_regime(model):
    with pytest.raises(ValueError, match="heads_bn"):
        set_regime(model, "half")


def test_loss_is_the_mean_of_six_binary_terms():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0]])
    labels = torch.tensor([0, 2])
    p = logits.sigmoid()
    terms = [
        -p[0, 0].log(), -(1 - p[0, 1]).log(), -(1 - p[0, 2]).log(),
        -(1 - p[1, 0]).log(), -(1 - p[1, 1]).log(), -p[1, 2].log(),
    ]  # fmt: skip
    torch.testing.assert_close(classification_loss(logits, labels), torch.stack(terms).mean())
