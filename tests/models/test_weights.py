"""Files of weights: our own, and the author's, which must be read without running anything."""

import zipfile
from dataclasses import asdict

import pytest
import torch
from author_files import ANCHORS, Payload, author_file, author_names

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.errors import CheckpointError
from covidmask.models import author_checkpoints, weights
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net
from covidmask.models.segmentation import lesion_mask_rcnn

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
    for part in ("fc7.weight is (3, 5)", "(128, 128)", "rpn.head.cls_logits.bias", "extra.weight"):
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
    with pytest.raises(CheckpointError, match="s.safetensors.*not one of this version"):
        weights.load_segmenter(path)
