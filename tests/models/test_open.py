"""Parts that the reader brings: other backbones, columns of the rows, and modules S."""

from dataclasses import replace

import pytest
import torch
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, TinyLesions
from torch import nn

from covidmask.errors import CheckpointError, DataError
from covidmask.models import detector as detector_file
from covidmask.models.classifier import covid_ct_mask_net, set_regime
from covidmask.models.detector import for_inference, fpn_backbone, lesion_mask_rcnn
from covidmask.models.ranked_boxes import COLUMNS, Boxes, Columns, encoded_rows, ranked_boxes
from covidmask.models.weights import load_classifier, load_segmenter, save_model
from covidmask.training.ranked_cache import cache_ranked_boxes

IMAGES = [torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]


class Pools(nn.Module):
    """Two maps, of strides 8 and 16, and no more than a convolution each."""

    def __init__(self, out_channels=16, second=2):
        super().__init__()
        self.out_channels = out_channels
        self.first = nn.Sequential(nn.Conv2d(3, out_channels, 8, 8), nn.BatchNorm2d(out_channels))
        self.second = nn.Conv2d(out_channels, out_channels, second, second)

    def forward(self, x):
        fine = self.first(x).relu()
        return {"fine": fine, "coarse": self.second(fine).relu()}


class OneMap(nn.Sequential):
    out_channels = 16

    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 8, 8), nn.ReLU())


def network(name):
    """A detector on a named backbone, on one of timm's, or on an object."""
    torch.manual_seed(0)
    if name in ("Pools", "OneMap"):
        return lesion_mask_rcnn(replace(TINY_DETECTOR, cut=0), backbone=globals()[name]())
    if name not in detector_file.STAGES:
        pytest.importorskip("timm")
    return lesion_mask_rcnn(replace(TINY_DETECTOR, backbone=name, cut=1, levels=2))


STRIDES = {
    "mobilenet_v2": [8, 16],
    "test_resnet": [8, 16],
    "test_convnext": [8, 16],
    "Pools": [8, 16],
    "OneMap": [8],
}


@pytest.mark.parametrize("name", STRIDES)
def test_backbones(name, tmp_path):
    """Forward, a step, rows, the copy for prediction, and a file."""
    model = network(name)
    maps = model.backbone.eval()(torch.zeros(1, 3, 64, 96))
    maps = maps.values() if isinstance(maps, dict) else [maps]
    assert [tuple(map.shape) for map in maps] == [(1, 16, 64 // s, 96 // s) for s in STRIDES[name]]
    assert model.strides == STRIDES[name]
    image, target = TinyLesions(1)[0]
    model.train()
    losses = model([image, image], [target, target])
    sum(losses.values()).backward()
    assert len(losses) == 5 and all(loss.isfinite() for loss in losses.values())
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    classifier = covid_ct_mask_net(model.eval(), TINY_CLASSIFIER)
    with torch.no_grad():
        rows = classifier.ranked_boxes(IMAGES)
        fast = for_inference(classifier).ranked_boxes(IMAGES)
        found = model(IMAGES)
    assert rows.shape == (2, 16, 5) and rows[..., 0].all()
    torch.testing.assert_close(fast[..., 0], rows[..., 0], rtol=1e-3, atol=1e-4)
    own = (
        {}
        if name in detector_file.STAGES or name.islower()
        else {"backbone": network(name).backbone}
    )
    path = save_model(model, tmp_path / "s.safetensors")
    with torch.no_grad():
        again = load_segmenter(path, **own)(IMAGES)
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(again, found, strict=True))
        path = save_model(classifier, tmp_path / "c.safetensors")
        assert torch.equal(load_classifier(path, **own).ranked_boxes(IMAGES), rows)
    if own:
        assert model.config.backbone == name
        with pytest.raises(CheckpointError, match=f"backbone '{name}', .*choose .*backbone=..."):
            load_classifier(path)
        other = type("Other", (type(own["backbone"]),), {})()
        with pytest.raises(CheckpointError, match=f"its backbone is {name}, not Other"):
            load_classifier(path, backbone=other)


def test_own_backbone_is_left_as_it_is():
    own = Pools()
    before = own.first[1].running_mean.clone()
    lesion_mask_rcnn(replace(TINY_DETECTOR, cut=0), backbone=own)
    assert own.training and torch.equal(own.first[1].running_mean, before)


def test_levels_are_the_last_maps():
    config = replace(TINY_DETECTOR, cut=0, levels=1)
    model = lesion_mask_rcnn(config, backbone=Pools()).eval()
    assert model.strides == [16] and model.roi_heads.box_roi_pool.featmap_names == ["coarse"]
    assert ranked_boxes(model, IMAGES, TINY_CLASSIFIER).shape == (2, 16, 5)
    for name, most in (("mobilenet_v2", 5), ("resnet18", 4)):
        for levels in (1, most):
            found = fpn_backbone(replace(config, backbone=name, levels=levels)).strides
            assert found == [32 >> i for i in range(levels)][::-1]
    semantic = replace(config, semantic=True)
    losses = lesion_mask_rcnn(semantic, backbone=Pools())([IMAGES[0]], [TinyLesions(1)[0][1]])
    assert "loss_semantic" in losses


@pytest.mark.parametrize(
    ("changes", "own", "words"),
    [
        ({"cut": 0, "levels": 3}, Pools, "levels 3: choose 1 to 2"),
        ({"cut": 1}, Pools, "cut 1: an own backbone is not cut"),
        ({"cut": 0}, lambda: Pools(second=4), "strides 8, 32; give powers of two"),
        ({"cut": 0, "backbone": "vgg"}, None, "backbone 'vgg', .*choose resnet18.*timm"),
        (
            {"cut": 0, "backbone": "mobilenet_v2", "levels": 6},
            None,
            "levels 6, .*it has 1 to 5 levels",
        ),
    ],
)
def test_what_no_detector_can_be_made_of(changes, own, words):
    with pytest.raises(DataError, match=words):
        lesion_mask_rcnn(replace(TINY_DETECTOR, **changes), backbone=own and own())


def test_timm_in_words(monkeypatch):
    pytest.importorskip("timm")
    config = replace(TINY_DETECTOR, backbone="test_resnet", cut=0, levels=9)
    with pytest.raises(DataError, match="levels 9, cut 0: list index out of range; choose"):
        lesion_mask_rcnn(config)
    with pytest.raises(DataError, match="strides 16, 16; give powers of two"):
        lesion_mask_rcnn(replace(config, backbone="test_vit", levels=2, image_size=160))
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(DataError, match="'test_resnet', .*choose .*, after `pip install timm`"):
        lesion_mask_rcnn(config)


def test_a_file_of_a_timm_backbone_where_timm_is_absent(tmp_path, monkeypatch):
    path = save_model(network("test_resnet"), tmp_path / "s.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(CheckpointError, match="s.safetensors: .*after `pip install timm`"):
        load_segmenter(path)


def test_own_lesion_classes(tmp_path):
    model = lesion_mask_rcnn(replace(TINY_DETECTOR, lesions="nodule, cyst,scar"))
    assert model.classes == ("nodule", "cyst", "scar")
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    loaded = load_segmenter(save_model(model, tmp_path / "s.safetensors"))
    assert loaded.classes == model.classes
    assert lesion_mask_rcnn(replace(TINY_DETECTOR, lesions="nodule,")).classes == ("nodule",)


def some_boxes(k=3):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(k, 2, generator=generator) / 2
    size = torch.rand(k, 2, generator=generator) / 2
    place = torch.cat([corner, corner + size], dim=1)
    return Boxes(torch.rand(k), torch.randn(k, 4), torch.tensor([1, 2, 1][:k]), place)


def test_columns():
    boxes = some_boxes()
    found = dict(zip(COLUMNS, Columns(COLUMNS)(boxes).unbind(1), strict=True))
    for name, value in zip(("dx", "dy", "dw", "dh"), boxes.deltas.unbind(1), strict=True):
        assert torch.equal(found[name], value)
    x1, y1, x2, y2 = boxes.place.unbind(1)
    for name, value in {
        "score": boxes.score, "label": boxes.label.float(), "x1": x1, "y1": y1, "x2": x2, "y2": y2,
        "cx": (x1 + x2) / 2, "cy": (y1 + y2) / 2, "w": x2 - x1, "h": y2 - y1,
        "area": (x2 - x1) * (y2 - y1),
    }.items():  # fmt: skip
        torch.testing.assert_close(found[name], value)
    assert Columns(COLUMNS)(some_boxes(0)).shape == (0, len(COLUMNS))
    for wrong in (("score", "dz"), ()):
        with pytest.raises(DataError, match="columns (score, dz|none): choose among score, dx"):
            covid_ct_mask_net(
                lesion_mask_rcnn(TINY_DETECTOR), replace(TINY_CLASSIFIER, columns=wrong)
            )


def test_the_columns_of_the_rows(tmp_path):
    """By name: in the rows, the first layer of S, the cache and the file."""
    torch.manual_seed(0)
    config = replace(TINY_CLASSIFIER, columns=("cx", "score", "label", "dh", "w"), n_boxes=12)
    model = covid_ct_mask_net(lesion_mask_rcnn(TINY_DETECTOR), config)
    plain = covid_ct_mask_net(model.detector, replace(TINY_CLASSIFIER, n_boxes=12))
    with torch.no_grad():
        rows, paper = model.ranked_boxes(IMAGES), plain.ranked_boxes(IMAGES)
    assert torch.equal(rows[..., [1, 3]], paper[..., [0, 4]])
    assert rows[..., 0].min() > 0 and rows[..., 0].max() < 1 and rows[..., 4].max() <= 1
    assert set(rows[..., 2].unique().tolist()) <= {1, 2}
    narrow = covid_ct_mask_net(model.detector, replace(config, columns=("score", "area")))
    assert narrow.s.fc_scores.in_features == 24
    slices = [(image, 0) for image in IMAGES]
    cached = cache_ranked_boxes(narrow, slices, folder=tmp_path, progress=False)
    assert cached.shape == (2, 12, 2) and len(list(tmp_path.iterdir())) == 1
    loaded = load_classifier(save_model(narrow, tmp_path / "c.safetensors"))
    assert loaded.config == narrow.config and loaded.encoder.columns == ("score", "area")
    set_regime(narrow, "full")
    narrow.ranked_boxes(IMAGES)[..., 0].sum().backward()
    assert narrow.detector.backbone.body.conv1.weight.grad.any()


def is_consolidation(boxes):
    return boxes.label == 2


def score(boxes):
    return boxes.score**2


class Learned(nn.Module):
    """An encoder with weights."""

    columns = ("one", "two")

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, boxes):
        return self.layer(torch.cat([boxes.score[:, None], boxes.deltas], dim=1))


class MeanRow(nn.Module):
    """An S that does not care for the order."""

    def __init__(self, columns, classes=3):
        super().__init__()
        self.layer = nn.Linear(columns, classes)

    def forward(self, rows):
        return self.layer(rows.mean(1))


OWN = {
    "a function": lambda: (Columns(["score", is_consolidation]), None),
    "a module": lambda: (Learned(), None),
    "S": lambda: (None, MeanRow(5)),
    "both": lambda: (Learned(), MeanRow(2)),
}


@pytest.mark.parametrize("kind", OWN)
def test_own_encoder_and_s(kind, tmp_path):
    torch.manual_seed(0)
    encoder, s = OWN[kind]()
    model = covid_ct_mask_net(lesion_mask_rcnn(TINY_DETECTOR), TINY_CLASSIFIER, encoder, s)
    width = 5 if encoder is None else 2
    with torch.no_grad():
        rows, logits = model.ranked_boxes(IMAGES), model(IMAGES)
    assert rows.shape == (2, 16, width) and logits.shape == (2, 3)
    if encoder is not None:
        assert model.config.columns == tuple(encoder.columns)
        slices = [(image, 0) for image in IMAGES]
        kept = cache_ranked_boxes(model, slices, folder=tmp_path, progress=False)
        assert torch.allclose(kept, rows, atol=1e-4) and not list(tmp_path.iterdir()), (
            "its code may change"
        )
    set_regime(model, "full")
    model(IMAGES).square().sum().backward()
    own = [part for part in (encoder, s) if isinstance(part, nn.Module)]
    assert all(p.grad is not None for part in own for p in part.parameters())
    path = save_model(model, tmp_path / "c.safetensors")
    encoder, s = OWN[kind]()
    loaded = load_classifier(path, encoder=encoder, s=s)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), logits)
    words = "is MeanRow" if encoder is None else "columns score, is_|columns one, two: choose"
    with pytest.raises(CheckpointError, match=rf"c.safetensors: its model .*({words})"):
        load_classifier(path)


def test_parts_that_do_not_fit(tmp_path):
    detector = lesion_mask_rcnn(TINY_DETECTOR)
    with pytest.raises(ValueError, match=r"MeanRow: gives \[2, 2\], not \[2, 3\], for two slices"):
        covid_ct_mask_net(detector, TINY_CLASSIFIER, s=MeanRow(5, classes=2))
    wrong = Learned()
    wrong.columns = ("one", "two", "three")
    model = covid_ct_mask_net(detector, TINY_CLASSIFIER, wrong)
    with pytest.raises(ValueError, match=r"the encoder gives \[16, 2\], not \[16, 3\]"):
        model.ranked_boxes(IMAGES)
    path = save_model(covid_ct_mask_net(detector, TINY_CLASSIFIER), tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="its s is ClassificationModule, not MeanRow"):
        load_classifier(path, s=MeanRow(5))
    with pytest.raises(DataError, match="functions of other names"):
        Columns([score])  # a file would say "score", and be read with ours
    other = covid_ct_mask_net(detector, TINY_CLASSIFIER, Columns(["score", is_consolidation]))
    path = save_model(other, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="columns are score, is_consolidation; the encoder"):
        load_classifier(path, encoder=Columns([is_consolidation, "score"]))


def test_the_paper_rows_are_those_of_the_encoder():
    boxes = some_boxes()
    logits, deltas = torch.randn(3, 3), torch.randn(3, 12)
    rows = encoded_rows(logits, deltas, boxes.label)
    again = Columns(TINY_CLASSIFIER.columns)(
        Boxes(rows[:, 0], rows[:, 1:], boxes.label, boxes.place)
    )
    assert torch.equal(rows, again)
