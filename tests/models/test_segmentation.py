"""The detector: shapes, losses, and the two points where it departs from torchvision."""

from dataclasses import replace

import pytest
import torch
from tiny import TINY_CLASSIFIER
from torchvision.models.detection.roi_heads import fastrcnn_loss

from covidmask.config import DetectorConfig
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import fpn_backbone, lesion_mask_rcnn

SMALL = DetectorConfig(
    backbone="resnet18",
    cut=2,
    image_size=64,
    fpn_channels=32,
    rpn_test_proposals=100,
    light_mask_head=True,
)
LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


def target(boxes=((8.0, 8.0, 24.0, 20.0),)):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.uint8)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    return {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64), "masks": masks}


@pytest.mark.parametrize(
    ("backbone", "cut", "strides"),
    [("resnet50", 0, [4, 8, 16, 32]), ("resnet34", 0, [32]), ("resnet18", 1, [16]),
     ("resnet18", 2, [8])],
)  # fmt: skip
def test_feature_maps(backbone, cut, strides):
    maps = fpn_backbone(DetectorConfig(backbone=backbone, cut=cut))(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 256, 64 // s, 96 // s) for s in strides]


def test_five_finite_losses_with_and_without_lesions():
    model = lesion_mask_rcnn(SMALL).train()
    for targets in ([target(), target()], [target(), target(())], [target(()), target(())]):
        losses = model([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], targets)
        assert set(losses) == LOSSES
        assert all(torch.isfinite(loss) for loss in losses.values())
        sum(losses.values()).backward()


SEMANTIC = replace(SMALL, cut=1, levels=3, semantic=True)


def test_levels_of_a_light_backbone():
    maps = lesion_mask_rcnn(SEMANTIC).backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps.values()] == [
        *((1, 32, 64 // s, 96 // s) for s in (4, 8, 16)),
        (1, 3, 64, 96),  # the image, for the semantic branch
    ]
    with pytest.raises(ValueError, match="it has 1 to 3 levels"):
        lesion_mask_rcnn(replace(SMALL, cut=1, levels=4))


def test_levels_of_resnet50():
    """All four unless a number is asked for, which is then obeyed and not ignored."""
    for levels, strides in ((None, (4, 8, 16, 32)), (2, (16, 32)), (1, (32,))):
        config = replace(SMALL, backbone="resnet50", cut=0, levels=levels)
        maps = fpn_backbone(config)(torch.rand(1, 3, 64, 96))
        assert [tuple(m.shape[-2:]) for m in maps.values()] == [(64 // s, 96 // s) for s in strides]
        model = lesion_mask_rcnn(config).eval()
        assert model([torch.rand(3, 64, 96)])[0]["boxes"].shape[1] == 4
    with pytest.raises(ValueError, match="levels 5, .*it has 1 to 4 levels"):
        lesion_mask_rcnn(replace(SMALL, backbone="resnet50", cut=0, levels=5))


def test_semantic_branch_adds_a_loss_and_maps():
    model = lesion_mask_rcnn(SEMANTIC).train()
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target(), target(())])
    assert set(losses) == LOSSES | {"loss_semantic"}
    losses["loss_semantic"].backward()
    assert model.backbone.body.conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        found = model.eval()([torch.rand(3, 64, 70), torch.rand(3, 64, 64)])
    # the batch is padded to 64 x 96; each map is cut to its own slice, of stride 2
    assert [tuple(one["semantic"].shape) for one in found] == [(2, 32, 35), (2, 32, 32)]
    assert all(((one["semantic"] >= 0) & (one["semantic"] <= 1)).all() for one in found)
    assert not any(
        "semantic" in name for name in covid_ct_mask_net(model, TINY_CLASSIFIER).state_dict()
    )


def test_semantic_loss_falls_towards_the_truth():
    branch = lesion_mask_rcnn(SEMANTIC).roi_heads.semantic
    features = {"0": torch.rand(1, 32, 16, 16), "image": torch.rand(1, 3, 64, 64)}
    assert branch(features).shape == (1, 3, 32, 32)
    wanted = target(((0.0, 0.0, 32.0, 64.0),))
    left = torch.zeros(1, 3, 16, 16)
    left[:, 0], left[:, 1, :, :8], left[:, 0, :, :8] = 9, 9, 0
    for logits, low, high in ((left, 0, 0.3), (left.flip(-1), 3, 20)):
        branch.forward = lambda _, logits=logits: logits
        assert low <= branch.loss(features, [(64, 64)], [wanted]).item() <= high


def test_semantic_loss_weighs_slices_alike():
    """To miss the only lesion of a slice costs about as much, however small it is."""
    branch = lesion_mask_rcnn(SEMANTIC).roi_heads.semantic
    nothing = torch.zeros(1, 3, 16, 16)
    nothing[:, 0] = 9
    branch.forward = lambda _: nothing
    costs = []
    for side in (8.0, 48.0):
        target_ = target(((0.0, 0.0, side, side),))
        cross_entropy = 9 * (side / 64) ** 2
        costs.append(branch.loss({}, [(64, 64)], [target_]).item() - cross_entropy)
    assert costs[0] == pytest.approx(costs[1], rel=0.15)
    assert costs[0] > 0.5  # two of three regions: the class, and any lesion


def test_semantic_branch_sees_the_image():
    branch = lesion_mask_rcnn(SEMANTIC).roi_heads.semantic.eval()
    features = {"0": torch.rand(1, 32, 16, 16), "image": torch.rand(1, 3, 64, 64)}
    changed = {**features, "image": features["image"].roll(2, -1)}
    assert not torch.allclose(branch(features), branch(changed))


def test_predictions_are_in_range():
    model = lesion_mask_rcnn(SMALL).eval()
    with torch.no_grad():
        result = model([torch.rand(3, 80, 64)])[0]
    assert set(result) == {"boxes", "labels", "scores", "masks"}
    assert result["masks"].shape == (len(result["boxes"]), 1, 80, 64)
    assert (result["boxes"] >= 0).all() and result["scores"].le(1).all()
    assert set(result["labels"].tolist()) <= {1, 2}


def test_stock_box_loss_at_the_stock_beta():
    """With beta 1/9 our RoI loss is torchvision's own function; with beta 1 it is not."""
    values = {}
    for beta in (1 / 9, 1.0):
        torch.manual_seed(0)
        config = DetectorConfig(**{**SMALL.__dict__, "box_beta": beta})
        model = lesion_mask_rcnn(config).train()
        heads, seen = model.roi_heads, {}
        select = heads.select_training_samples

        def spy(*args, seen=seen, select=select):
            result = select(*args)
            seen["labels"], seen["targets"] = result[2], result[3]
            return result

        heads.select_training_samples = spy
        heads.box_predictor.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.update(output=output)
        )
        losses = model([torch.rand(3, 64, 64)], [target()])
        stock = fastrcnn_loss(*seen["output"], seen["labels"], seen["targets"])
        torch.testing.assert_close(losses["loss_classifier"], stock[0])
        values[beta] = (losses["loss_box_reg"], stock[1])
    torch.testing.assert_close(*values[1 / 9])
    assert not torch.isclose(*values[1.0])


def test_proposals_are_ranked_on_raw_logits():
    """Logits of 30 and 40 have the same sigmoid in float32; the stronger one must come first."""
    rpn = lesion_mask_rcnn(SMALL).rpn.eval()
    assert rpn._pre_nms_top_n is not rpn._post_nms_top_n  # each can be set alone
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]]])
    kept, logits = rpn.filter_proposals(boxes, torch.tensor([[30.0, 40.0, -5.0]]), [(64, 64)], [3])
    assert logits[0].tolist() == [40.0, 30.0, -5.0]
    assert kept[0][0].tolist() == [20, 20, 40, 40]


@pytest.mark.parametrize("wrong", [{"backbone": "vgg"}, {"cut": 3}, {"cut": 1}, {"lesions": "all"},
     {"lesions": "nodule,nodule"}, {"lesions": ","}, {"lesions": "nodule,,cyst"}])  # fmt: skip
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match="choose"):
        lesion_mask_rcnn(DetectorConfig(**wrong))
