"""Judging: slices in order, classes that fit, numbers that are numbers, and as in predict."""

import copy
import csv
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, TinySlices, tiny_training
from torch.utils.data import Dataset

from covidmask.cli import main
from covidmask.config import IMAGE_CLASSES, LESION_CLASSES
from covidmask.datasets.lesions import mask_to_targets
from covidmask.datasets.patients import make_slice
from covidmask.errors import CheckpointError, DataError, TrainingError
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import detect, fuse, lesion_mask_rcnn
from covidmask.models.ranked_boxes import propose
from covidmask.models.weights import ShippedWeights, save_model
from covidmask.training import loop, segmentation
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.loop import make_fabric
from covidmask.training.segmentation import evaluate_segmenter, train_segmenter


class Mixed(Dataset):
    """Slices of two sizes in turn, none of them square."""

    def __init__(self, count=5):
        self.items = []
        for seed in range(count):
            image, mask = (
                array[: 40 + 16 * (seed % 2)] for array in make_slice(seed, 2, 64, position=0.6)
            )
            image = torch.from_numpy(np.ascontiguousarray(image)).repeat(3, 1, 1)
            self.items.append((image, mask_to_targets(mask)))
        self.names = [f"{seed}.png" for seed in range(count)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return lesion_mask_rcnn(TINY_DETECTOR).eval()


@pytest.fixture
def classifier(segmenter):
    torch.manual_seed(1)
    return covid_ct_mask_net(segmenter, TINY_CLASSIFIER)


def test_the_table_is_in_the_order_of_the_slices(segmenter):
    data = Mixed()
    table = evaluate_segmenter(segmenter, data, batch_size=4, progress=False)["table"]
    pixels = [image[0].numel() for image, _ in data.items]
    assert len(set(pixels)) == 2 and table[:, 0, 3].tolist() == pixels
    true = [int(target["masks"].any(0).sum()) for _, target in data.items]
    assert table[:, 0, 2].tolist() == true


@pytest.mark.parametrize("begin, right", [(0.5, False), (0.622, True)])
def test_masks_begin_where_asked(segmenter, monkeypatch, begin, right):
    data = Mixed(1)
    _, target = data.items[0]
    shape = target["masks"].shape[1:]
    found = {key: target[key] for key in ("boxes", "labels")}
    found["scores"] = torch.full((len(target["labels"]),), 0.9)
    found["masks"] = (0.6 + 0.3 * target["masks"].float())[:, None]  # a lesion, and all around it
    found["maps"] = torch.zeros(2, *shape)
    monkeypatch.setattr(segmentation, "predict_lesions", lambda *a, **k: [(0, found, target)])
    result = evaluate_segmenter(segmenter, data, mask_threshold=begin, progress=False)
    for name in ("author_ap", "mask_ap"):
        assert bool(result[name] == pytest.approx(1)) is right
    dices = [result[f"dice_{name}"] for name in LESION_CLASSES["both"]]
    assert bool(np.nanmin(dices) == pytest.approx(1)) is right


def test_mirrored_maps_are_the_mean_of_both(segmenter):
    (image, _), *_ = Mixed(1).items
    with torch.no_grad():
        one, other = (detect(segmenter, [x], 2)[0]["maps"] for x in (image, image.flip(-1)))
        (both,) = detect(segmenter, [image], 2, mirror=True)
    torch.testing.assert_close(both["maps"], (one + other.flip(-1)) / 2)
    assert not torch.equal(one, both["maps"])


def test_classes_of_the_data_and_of_the_model_must_be_the_same(classifier):
    slices = TinySlices(6)
    slices.classes = ("A", "B", "C")
    for run in (
        lambda: evaluate_classifier(classifier, slices, progress=False),
        lambda: train_classifier(classifier, slices, "heads", tiny_training(), progress=False),
    ):
        with pytest.raises(DataError, match="classes are A, B, C, the model's Control, Common"):
            run()
    slices.classes = IMAGE_CLASSES
    assert evaluate_classifier(classifier, slices, progress=False)["n"] == 6


@pytest.mark.parametrize("label", [3, -1])
def test_labels_outside_the_classes_name_the_slice(classifier, label):
    slices = TinySlices(6)
    slices.labels[4] = label
    for run in (
        lambda: evaluate_classifier(classifier, slices, progress=False),
        lambda: train_classifier(classifier, slices, "heads", tiny_training(), progress=False),
    ):
        with pytest.raises(DataError, match=f"phantom_4.png: label {label}; .* are 0 to 2"):
            run()


@pytest.mark.parametrize("regime", ["heads", "heads_bn", None])
def test_a_bad_slice_is_named_to_the_classifier(classifier, regime):
    slices = TinySlices(8)
    slices._images[5] = slices._images[5] * 255
    with pytest.raises(DataError, match="phantom_5.png: its values run from"):
        if regime is None:
            evaluate_classifier(classifier, slices, progress=False)
        else:
            train_classifier(classifier, slices, regime, tiny_training(), progress=False)


def test_a_bad_slice_is_named_to_the_segmenter(segmenter):
    data = Mixed()
    data.items[3] = (data.items[3][0] * 255, data.items[3][1])
    with pytest.raises(DataError, match="3.png: its values run from"):
        evaluate_segmenter(segmenter, data, progress=False)
    model = copy.deepcopy(segmenter)
    with pytest.raises(DataError, match="3.png: its values run from"):
        train_segmenter(model, data, tiny_training(batch_size=5), progress=False)


def test_mixed_precision_gives_maps_and_boxes_in_full(segmenter):
    config = dataclasses.replace(TINY_DETECTOR, semantic=True)
    fabric = make_fabric("bf16-mixed", "cpu")
    (image, _), *_ = Mixed(1).items
    for model in (segmenter, lesion_mask_rcnn(config).eval()):
        result = evaluate_segmenter(model, Mixed(), fabric=fabric, mirror=True, progress=False)
        assert result["slices"] == 5
        with torch.no_grad(), fabric.autocast():
            (found,) = detect(model, [image], 2)
            _, (proposals,), _ = propose(model, [image])
        assert proposals.dtype == torch.float32
        assert {found[key].dtype for key in ("boxes", "scores", "maps")} == {torch.float32}
        ends = found["boxes"][found["boxes"] > 32]  # pixels; bfloat16 has quarters there
        assert (ends * 4 != (ends * 4).round()).any()


def test_a_segmenter_of_nan_is_not_judged(segmenter):
    model = copy.deepcopy(segmenter)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[0] = torch.nan
    with pytest.raises(TrainingError, match="not finite: 1 .*cls_score.bias.; train the seg"):
        evaluate_segmenter(model, Mixed(), progress=False)


@pytest.mark.parametrize("name", ["score", "threshold"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_thresholds_are_shares(segmenter, name, value):
    with pytest.raises(DataError, match=f"{name} {value}: must be a number from 0 to 1"):
        evaluate_segmenter(segmenter, Mixed(), progress=False, **{name: value})


def test_a_validation_that_says_nothing(classifier):
    empty = TinySlices(0)
    with pytest.raises(TrainingError, match="accuracy is nan after epoch 0"):
        train_classifier(
            classifier, TinySlices(8), "heads", tiny_training(), validation=empty, progress=False
        )


def test_a_checkpoint_of_nan_is_not_resumed(tiny_lesions, tmp_path):
    path, training = tmp_path / "run.ckpt", tiny_training(epochs=1)

    def train():
        torch.manual_seed(0)
        model = lesion_mask_rcnn(TINY_DETECTOR)
        train_segmenter(model, tiny_lesions, training, checkpoint=path, progress=False)

    train()
    state = torch.load(path, weights_only=True)
    state["model"]["backbone.body.conv1.weight"][0] = torch.nan
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="run.ckpt: holds NaN or infinity in 1 .*conv1"):
        train()


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes(segmenter, tiny_lesions, size):
    with pytest.raises(DataError, match=f"batch size {size}: give a multiple"):
        train_segmenter(segmenter, tiny_lesions, tiny_training(batch_size=size), progress=False)


def test_logits_that_are_no_numbers(classifier):
    with torch.no_grad():
        classifier.s.fc_scores_img.bias[1] = torch.nan
    with pytest.raises(TrainingError, match="logits that are not numbers"):
        evaluate_classifier(classifier, TinySlices(3), progress=False)


def test_the_last_step_may_not_leave_weights_that_are_no_numbers(
    tiny_lesions, tmp_path, monkeypatch
):
    """No loss comes after it that would tell."""
    torch.manual_seed(0)
    model, seen = lesion_mask_rcnn(TINY_DETECTOR), []

    class Broken(torch.optim.Adam):
        def step(self, *arguments, **options):
            super().step(*arguments, **options)
            seen.append(0)
            if len(seen) == 4:
                self.param_groups[0]["params"][0].data[0] = torch.nan

    monkeypatch.setattr(torch.optim, "Adam", Broken)
    path = tmp_path / "run.ckpt"
    with pytest.raises(
        TrainingError, match=r"step 3: weights that are not finite: 1 \(.*conv1.weight\); lower"
    ):
        train_segmenter(model, tiny_lesions, tiny_training(), checkpoint=path, progress=False)
    state = loop.load_checkpoint(path, {})  # of the first epoch
    assert len(state["history"]) == 2 and not loop.not_finite(state["model"])


def test_predict_draws_and_measures_what_evaluate_scores(tmp_path):
    """One function gives the maps to both, to pictures and tables."""
    image, mask = make_slice(5, 2, 128, position=0.6)
    rows = np.round(255 * image[:96]).astype(np.uint8)  # 96 x 128
    Image.fromarray(rows).save(tmp_path / "a.png")
    model = ShippedWeights.SEGMENTER_QUICK.load()
    torch.manual_seed(1)
    save_model(model, tmp_path / "s.safetensors")
    save_model(covid_ct_mask_net(model, TINY_CLASSIFIER), tmp_path / "c.safetensors")
    words = ["predict", tmp_path / "a.png", "--out", tmp_path / "out", "--device", "cpu"]
    words += ["--segmenter", tmp_path / "s.safetensors", "--classifier", tmp_path / "c.safetensors"]
    assert main([str(word) for word in words]) == 0

    class One(Dataset):
        names = ["a.png"]

        def __len__(self):
            return 1

        def __getitem__(self, index):
            grey = torch.from_numpy(rows.astype(np.float32) / 255).repeat(3, 1, 1)
            return grey, mask_to_targets(mask[:96])

    table = evaluate_segmenter(model, One(), progress=False)["table"]  # [1, regions, 5]
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    predicted = int(table[0, 0, 1])
    assert predicted > 50 and int(row["lesion_pixels"]) == predicted
    drawn = np.asarray(Image.open(tmp_path / "out" / row["picture"]))
    side = drawn.shape[0] // 96
    tinted = np.ptp(drawn[side // 2 :: side, side // 2 :: side].astype(int), axis=-1)  # no grey
    with torch.no_grad():
        (found,) = detect(model, [One()[0][0]], len(LESION_CLASSES["both"]))
    codes = fuse(found["maps"])
    assert (tinted[codes > 0] > 10).mean() > 0.99  # tinted wherever evaluate counts a lesion
