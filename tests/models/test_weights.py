"""Files of weights: our own, and the author's, which must be read without running anything."""

import copy
import json
import os
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from author_files import ANCHORS, Payload, author_file, author_names
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import warn_if_stale

from covidmask import models
from covidmask.config import QUICK, ClassifierConfig, DetectorConfig
from covidmask.datasets.patients import old_friend
from covidmask.errors import CheckpointError
from covidmask.models import author_checkpoints, weights
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import weights_file
from tools.shipped_weights import card_page

ROOT = Path(__file__).parents[2]
CLS_SCORE = "roi_heads.box_predictor.cls_score.weight"
SMALL = DetectorConfig(
    backbone="resnet18", cut=2, image_size=64, rpn_test_proposals=60, light_mask_head=True
)
IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    config = DetectorConfig(
        **{**asdict(SMALL), "anchor_sizes": ANCHORS[0], "anchor_ratios": ANCHORS[1]}
    )
    return lesion_mask_rcnn(config).eval()


@pytest.fixture(scope="module")
def classifier(segmenter):
    return covid_ct_mask_net(segmenter, ClassifierConfig(n_boxes=16, hidden=24))


def same_weights(one, other):
    other = other.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


def test_segmenter_round_trip(segmenter, tmp_path):
    path = weights.save_model(segmenter, tmp_path / "s.safetensors", command="train", ap=0.5)
    loaded = weights.load_segmenter(path)
    assert loaded.config == segmenter.config and not loaded.training
    assert same_weights(segmenter, loaded)
    assert weights.read_card(path) == {"command": "train", "ap": 0.5}


def test_classifier_round_trip(classifier, tmp_path):
    path = weights.save_model(classifier, tmp_path / "c.safetensors")
    loaded = weights.load_classifier(path)
    assert loaded.config == classifier.config and same_weights(classifier, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), classifier(IMAGES))


def test_class_names_are_in_the_file(segmenter, tmp_path):
    names = ("healthy", "ill")
    config = ClassifierConfig(n_boxes=16, hidden=24, classes=names)
    model = covid_ct_mask_net(segmenter, config)
    assert model(IMAGES).shape == (2, 2)
    loaded = weights.load_classifier(weights.save_model(model, tmp_path / "c.safetensors"))
    assert loaded.config.classes == names
    with pytest.raises(ValueError, match="two or more different names"):
        covid_ct_mask_net(segmenter, ClassifierConfig(classes=("one", "one")))


def test_older_and_newer_files(tmp_path):
    """Before format 2 they had no class names; the shipped ones are such."""
    config = DetectorConfig(image_size=64, fpn_channels=8, light_mask_head=True)
    model = covid_ct_mask_net(lesion_mask_rcnn(config), ClassifierConfig(n_boxes=8, hidden=8))
    path = weights.save_model(model, tmp_path / "c.safetensors")
    header = json.loads(safe_open(path, "pt").metadata()["covidmask"])
    del header["format"], header["classifier"]["classes"]
    save_file(model.state_dict(), path, metadata={"covidmask": json.dumps(header)})
    loaded = weights.load_classifier(path)
    assert loaded.config == model.config and same_weights(model, loaded)
    header["format"] = 99
    save_file(model.state_dict(), path, metadata={"covidmask": json.dumps(header)})
    with pytest.raises(CheckpointError, match="newer covidmask"):
        weights.load_classifier(path)


BROKEN = {
    "a list": lambda header: [],
    "nothing": lambda header: None,
    "parts": lambda header: {**header, "parts": 5},
    "no kind": lambda header: header.pop("kind") and header,
    "no card": lambda header: [header.pop("card"), header][1],
    "format": lambda header: {**header, "format": "2"},
    "no detector": lambda header: {"kind": "segmenter", "card": {}, "detector": None},
    "no number": lambda header: {**header, "detector": {**header["detector"], "fpn_channels": -1}},
    "short": lambda header: {**header, "detector": {**header["detector"], "rpn_iou": [0.5]}},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_headers_of_another_form(segmenter, tmp_path, kind):
    path = weights.save_model(segmenter, tmp_path / "s.safetensors")
    header = BROKEN[kind](json.loads(safe_open(path, "pt").metadata()["covidmask"]))
    save_file(segmenter.state_dict(), path, metadata={"covidmask": json.dumps(header)})
    with pytest.raises(CheckpointError, match="s.safetensors: (a .safet|its model)"):
        weights.load_segmenter(path)


def test_half_keeps_what_float16_cannot_hold(segmenter, tmp_path):
    model = copy.deepcopy(segmenter)
    weight = model.rpn.head.conv[0][0].weight
    with torch.no_grad():
        weight[0, 0, 0, 0] = 1e5
    loaded = weights.load_segmenter(
        weights.save_model(model, tmp_path / "s.safetensors", half=True)
    )
    assert torch.equal(loaded.rpn.head.conv[0][0].weight, weight)
    assert not torch.equal(loaded.backbone.body.conv1.weight, model.backbone.body.conv1.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(segmenter, tmp_path, value):
    model = copy.deepcopy(segmenter)
    with torch.no_grad():
        model.rpn.head.conv[0][0].bias[3] = value
    path = weights.save_model(model, tmp_path / "s.safetensors")
    message = r"s.safetensors: rpn.head.conv.0.0.bias holds NaN, infinity or .*; train these"
    with pytest.raises(CheckpointError, match=message):
        weights.load_segmenter(path)
    with pytest.raises(CheckpointError, match="a.pth: rpn.head.conv.*bias holds NaN"):
        author_checkpoints.load_author_checkpoint(author_file(tmp_path / "a.pth", model))


def test_author_segmenter(segmenter, tmp_path):
    path = author_file(tmp_path / "seg.pth", segmenter)
    loaded = author_checkpoints.load_author_checkpoint(path)
    assert loaded.config.anchor_sizes == ANCHORS[0] and loaded.config.anchor_ratios == ANCHORS[1]
    assert (loaded.config.backbone, loaded.config.cut) == ("resnet18", 2)
    assert same_weights(segmenter, loaded) and not loaded.training


def test_author_classifier(classifier, tmp_path):
    module = "models.mask_net.rpn_segmentation"
    loaded = author_checkpoints.load_author_checkpoint(
        author_file(tmp_path / "c", classifier, module=module)
    )
    assert isinstance(loaded, CovidCTMaskNet)
    assert (loaded.config.n_boxes, loaded.s.fc_scores.out_features) == (16, 24)
    assert same_weights(classifier, loaded)


def test_author_resnet50_with_the_mask_branch_that_is_never_run(tmp_path):
    sizes = ((2, 4), (1.0,))
    config = DetectorConfig(anchor_sizes=sizes[0], anchor_ratios=sizes[1])
    whole = CovidCTMaskNet(lesion_mask_rcnn(config), ClassifierConfig(n_boxes=8, hidden=16))
    loaded = author_checkpoints.load_author_checkpoint(
        author_file(tmp_path / "c.pth", whole, *sizes)
    )
    assert loaded.detector.config.backbone == "resnet50"
    assert not loaded.detector.roi_heads.has_mask()
    assert same_weights(loaded, whole)


def test_plain_anchors_in_a_newer_file(segmenter, tmp_path):
    content = {
        "model_weights": author_names(segmenter.state_dict()),
        "anchor_generator": {"sizes": (ANCHORS[0],) * 5, "aspect_ratios": (ANCHORS[1],) * 5},
    }
    torch.save(content, tmp_path / "plain.pth")
    loaded = author_checkpoints.load_author_checkpoint(tmp_path / "plain.pth")
    assert same_weights(segmenter, loaded)


@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_code_is_refused_and_does_not_run(segmenter, tmp_path, zipped):
    marker, path = tmp_path / "marker", tmp_path / "bad.pth"
    content = {"model_weights": segmenter.state_dict(), "anchor_generator": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="bad.pth.*system"):
        author_checkpoints.load_author_checkpoint(path)
    assert not marker.exists()


def broken_files(tmp_path, segmenter):
    good = author_file(tmp_path / "good.pth", segmenter).read_bytes()
    yield "truncated.pth", good[: len(good) // 2]
    yield "short.pth", good[:200]
    yield "empty.pth", b""
    yield "text.pth", b"<html>not found</html>"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme", "nothing")
    yield "archive.pth", (tmp_path / "a.zip").read_bytes()
    for name, content in [
        ("list.pth", [1, 2]),
        ("keys.pth", {"weights": {}}),
        ("anchors.pth", {"model_weights": author_names(segmenter.state_dict())}),
        ("other.pth", {"model_weights": {"conv.weight": torch.zeros(2)},
                       "anchor_generator": {"sizes": ((1,),), "aspect_ratios": ((1,),)}}),
    ]:  # fmt: skip
        torch.save(content, tmp_path / "t")
        yield name, (tmp_path / "t").read_bytes()


def test_anything_else_is_refused_by_name(segmenter, tmp_path):
    for name, content in broken_files(tmp_path, segmenter):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            author_checkpoints.load_author_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="missing.pth"):
        author_checkpoints.load_author_checkpoint(tmp_path / "missing.pth")


def test_other_architecture_names_keys_and_sizes(segmenter, tmp_path):
    state = segmenter.state_dict()
    state["roi_heads.box_head.fc7.weight"] = torch.zeros(3, 5)
    del state["rpn.head.cls_logits.bias"]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        weights.load_state(lesion_mask_rcnn(segmenter.config), state, "w.safetensors")
    message = str(caught.value)
    for part in ("fc7.weight", "[3, 5]", "[128, 128]", "rpn.head.cls_logits.bias", "extra.weight"):
        assert part in message


def test_wrong_kind_truncated_and_foreign_safetensors(segmenter, classifier, tmp_path):
    from safetensors.torch import save_file

    path = weights.save_model(classifier, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="holds a classifier; give a segmenter"):
        weights.load_segmenter(path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut.safetensors"):
        weights.load_classifier(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another program"):
        weights.load_segmenter(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="none.safetensors"):
        weights.load_segmenter(tmp_path / "none.safetensors")


def test_configuration_of_another_version(segmenter, tmp_path, monkeypatch):
    path = weights.save_model(segmenter, tmp_path / "s.safetensors")
    monkeypatch.setattr(weights, "DetectorConfig", ClassifierConfig)  # knows none of the fields
    with pytest.raises(CheckpointError, match="s.safetensors: its model cannot be built"):
        weights.load_segmenter(path)


class TestShipped:
    def test_loads_fast_and_judges_the_old_friend(self):
        image, _ = old_friend(QUICK.phantoms.size)
        x = torch.from_numpy(image).expand(3, -1, -1)
        start = time.perf_counter()
        segmenter = weights.trained_segmenter("quick", shipped=True)
        classifier = weights.trained_classifier("quick", shipped=True)
        assert time.perf_counter() - start < 5  # about half a second; a broken cache takes longer
        assert segmenter.config == QUICK.detector and classifier.config == QUICK.classifier
        for name, tensor in classifier.detector.state_dict().items():  # S was trained on this one
            assert torch.equal(tensor, segmenter.state_dict()[name]), name
        with torch.no_grad():
            found = segmenter([x])[0]
            logits = classifier([x])
        assert (found["scores"] > 0.75).sum() >= 3  # it has five lesions
        assert logits.shape == (1, 3) and logits[0, 0] < 0  # certainly no control

    @pytest.mark.parametrize("member", weights.ShippedWeights)
    def test_cards_are_complete_and_the_page_shows_them(self, member):
        card = member.card()
        for key in ("command", "commit", "date", "hardware", "torch", "data", "seed", "limits"):
            assert str(card[key]), key
        used = ("phantoms", "detector", "segmenter", "classifier", "classifier_training")
        warn_if_stale(card, (*used, "min_area"), "make weights")
        assert member.value[1] in (ROOT / "book" / "weights.md").read_text(encoding="utf-8")
        measured = [value for value in card["metrics"].values() if isinstance(value, dict)]
        assert measured and all(v["low"] <= v["value"] <= v["high"] for v in measured)

    def test_the_page_is_made_from_the_files(self):
        page = (ROOT / "book" / "weights.md").read_text(encoding="utf-8")
        assert page == card_page(weights.SHIPPED), "run make weights again"

    def test_other_bytes_are_refused(self, tmp_path, monkeypatch):
        member = weights.ShippedWeights.SEGMENTER_QUICK
        changed = bytearray(member.path.read_bytes())
        changed[-1] ^= 1  # still a readable file, of other weights
        (tmp_path / member.value[0]).write_bytes(changed)
        monkeypatch.setattr(weights, "SHIPPED", tmp_path)
        for use in (member.load, member.card):
            with pytest.raises(CheckpointError, match="install covidmask again"):
                use()
        (tmp_path / member.value[0]).unlink()
        with pytest.raises(CheckpointError, match="is missing or"):
            member.load()

    def test_other_presets_need_training(self, tmp_path, monkeypatch, segmenter):
        monkeypatch.setenv("COVIDMASK_DATA", str(tmp_path))
        with pytest.raises(CheckpointError, match="covidmask train segmenter --preset colab"):
            weights.trained_segmenter("colab")
        weights.save_model(segmenter, weights_file("segmenter", "colab"))
        assert same_weights(segmenter, weights.trained_segmenter("colab"))


def test_half_precision_halves_the_file(segmenter, tmp_path):
    full = weights.save_model(segmenter, tmp_path / "full.safetensors")
    half = weights.save_model(segmenter, tmp_path / "half.safetensors", half=True)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    loaded = weights.load_segmenter(half)
    for (name, a), b in zip(
        segmenter.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-3), name
        assert a.ndim > 1 or torch.equal(a, b), name


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_type_are_refused(segmenter, tmp_path, kind):
    """`load_state_dict` would turn them into numbers without a word."""
    path = weights.save_model(segmenter, tmp_path / "s.safetensors")
    header = safe_open(path, "pt").metadata()
    state = {name: tensor.contiguous() for name, tensor in segmenter.state_dict().items()}
    state["rpn.head.conv.0.0.bias"] = state["rpn.head.conv.0.0.bias"].to(kind)
    try:
        save_file(state, path, metadata=header)
    except KeyError:
        pytest.skip("this safetensors writes no such numbers")
    with pytest.raises(CheckpointError, match=f"rpn.head.conv.0.0.bias holds .* type, {kind}"):
        weights.load_segmenter(path)


@pytest.mark.parametrize(
    "anchors", [5, None, {"sizes": [1, 2], "aspect_ratios": [1]}, {"sizes": [["x"]]}]
)
def test_odd_anchors_of_an_author_file(segmenter, tmp_path, anchors):
    content = {"model_weights": author_names(segmenter.state_dict()), "anchor_generator": anchors}
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="odd.pth: "):
        author_checkpoints.load_author_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "change",
    [
        {5: torch.zeros(1)},
        {CLS_SCORE: torch.tensor(1.0)},
        {"backbone.body.layer1.0.conv3.weight": torch.zeros(1)},  # a ResNet-50 that is cut
    ],
)
def test_odd_weights_of_an_author_file(segmenter, tmp_path, change):
    content = {
        "model_weights": {**author_names(segmenter.state_dict()), **change},
        "anchor_generator": {"sizes": (ANCHORS[0],), "aspect_ratios": (ANCHORS[1],)},
    }
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="odd.pth: "):
        author_checkpoints.load_author_checkpoint(tmp_path / "odd.pth")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_no_file_of_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for read in (weights.load_segmenter, models.load_author_checkpoint):
        with pytest.raises(CheckpointError, match="pipe.safetensors: .*folder"):
            read(tmp_path / "pipe.safetensors")
