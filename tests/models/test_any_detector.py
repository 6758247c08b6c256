"""Ranked boxes of detectors that the reader brings: torchvision's two-stage ones."""

import copy

import pytest
import torch
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, TinySlices, tiny_training
from torchvision.models import detection, mobilenet_v2
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from covidmask.config import ClassifierConfig
from covidmask.models.classifier import covid_ct_mask_net, set_regime
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.ranked_boxes import ranked_boxes
from covidmask.models.weights import save_model
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.loop import make_fabric

SMALL = {"weights": None, "weights_backbone": None, "min_size": 64, "rpn_post_nms_top_n_test": 30}
THEIRS = {
    "mask": lambda: detection.maskrcnn_resnet50_fpn(num_classes=3, **SMALL),
    "faster": lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(num_classes=4, **SMALL),
    "v2": lambda: detection.fasterrcnn_resnet50_fpn_v2(num_classes=2, **SMALL),
    "keypoints": lambda: detection.keypointrcnn_resnet50_fpn(num_classes=2, **SMALL),
}


def one_map():
    """A backbone that gives a tensor, as in torchvision's tutorial."""
    body = mobilenet_v2(weights=None).features
    body.out_channels = 1280
    anchors = AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    pool = MultiScaleRoIAlign(["0"], 7, 2)
    return detection.FasterRCNN(
        body, 3, min_size=64, rpn_anchor_generator=anchors, box_roi_pool=pool
    )


THEIRS["one map"] = one_map
CONFIG = ClassifierConfig(n_boxes=12, hidden=16)
IMAGES = [torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("kind", THEIRS)
def test_rows_and_gradients(kind):
    torch.manual_seed(0)
    model = covid_ct_mask_net(THEIRS[kind](), CONFIG)
    assert not model.detector.roi_heads.has_mask() and not model.detector.roi_heads.has_keypoint()
    with torch.no_grad():
        rows = model.ranked_boxes(IMAGES)
    assert rows.shape == (2, 12, 5) and rows.isfinite().all()
    assert (rows[:, 1:, 0] <= rows[:, :-1, 0]).all() and rows[..., 0].max() <= 1
    set_regime(model, "full")
    model.train()(IMAGES).square().sum().backward()
    for name in ("detector.backbone", "detector.roi_heads.box_head", "s.fc_scores"):
        learned = [p for key, p in model.named_parameters() if key.startswith(name)]
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learned), name


def test_the_slower_way_gives_the_same_rows():
    torch.manual_seed(0)
    ours = lesion_mask_rcnn(TINY_DETECTOR).eval()
    theirs = copy.deepcopy(ours)
    pool = theirs.roi_heads.box_roi_pool
    theirs.roi_heads.box_roi_pool = MultiScaleRoIAlign(pool.featmap_names, 7, 2)
    with torch.no_grad():
        one, other = (ranked_boxes(detector, IMAGES, CONFIG) for detector in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_training_and_judging(tmp_path):
    torch.manual_seed(0)
    model = covid_ct_mask_net(THEIRS["mask"](), TINY_CLASSIFIER)
    slices, fabric = TinySlices(6), make_fabric(device="cpu")
    options = {"fabric": fabric, "cache": tmp_path, "checkpoint": tmp_path / "run.ckpt"}
    train_classifier(model, slices, "heads", tiny_training(), progress=False, **options)
    assert evaluate_classifier(model, slices, fabric=fabric, progress=False)["n"] == 6
    with pytest.raises(ValueError, match="only detectors of `lesion_mask_rcnn`"):
        save_model(model, tmp_path / "model.safetensors")


def test_a_detector_without_proposals_is_refused():
    retina = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match="RetinaNet: has no proposals.*Mask or Keypoint R-CNN"):
        covid_ct_mask_net(retina, CONFIG)


def test_wrappers_are_to_be_taken_off(tmp_path):
    detector = lesion_mask_rcnn(TINY_DETECTOR)
    classifier = covid_ct_mask_net(detector, CONFIG)
    for wrap in (torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match="without a wrapper such as"):
            covid_ct_mask_net(wrap(detector), CONFIG)
        for model in (detector, classifier):
            with pytest.raises(ValueError, match="take off wrappers"):
                save_model(wrap(model), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_train_mode_is_refused_before_batch_norm_has_learned():
    detector = lesion_mask_rcnn(TINY_DETECTOR).train()
    before = copy.deepcopy(detector.state_dict())
    with pytest.raises(ValueError, match="in train mode"):
        ranked_boxes(detector, IMAGES, CONFIG)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


@pytest.mark.parametrize(("classes", "deltas"), [(1, 4), (3, 4)])
def test_predictors_of_another_form(classes, deltas):
    """Background alone; deltas that all classes share."""
    detector = lesion_mask_rcnn(TINY_DETECTOR).eval()
    predictor = detector.roi_heads.box_predictor
    predictor.cls_score = torch.nn.Linear(32, classes)
    predictor.bbox_pred = torch.nn.Linear(32, deltas)
    with pytest.raises(ValueError, match=f"gives {classes} classes and {deltas} deltas"):
        ranked_boxes(detector, IMAGES, CONFIG)


def test_frozen_batch_norm_is_told():
    body = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = covid_ct_mask_net(detection.FasterRCNN(body, 3, min_size=64), CONFIG)
    with pytest.raises(ValueError, match="no batch norm that could train"):
        set_regime(model, "heads_bn")


def test_mixed_precision_leaves_scores_and_deltas_their_digits():
    """bfloat16 has three digits; boxes would tie, and the order of the vector be chance."""
    torch.manual_seed(0)
    model = covid_ct_mask_net(THEIRS["faster"](), CONFIG)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rows = model.ranked_boxes(IMAGES)
    assert rows.dtype == torch.float32
    deltas = rows[..., 1:]
    assert (deltas != deltas.bfloat16().float()).float().mean() > 0.5
