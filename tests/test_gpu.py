"""What only a GPU can show: COVIDMASK_GPU=1 pytest tests/test_gpu.py"""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, tiny_training
from torch.utils.data import Dataset
from torchvision.models.detection import maskrcnn_resnet50_fpn

from covidmask.config import IMAGE_CLASSES
from covidmask.datasets.lesions import mask_to_targets
from covidmask.datasets.patients import make_slice
from covidmask.errors import DataError
from covidmask.models.classifier import REGIMES, covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import (
    ShippedWeights,
    load_segmenter,
    save_model,
    trained_classifier,
    trained_segmenter,
)
from covidmask.predict import predict
from covidmask.training import loop
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.ranked_cache import cache_ranked_boxes
from covidmask.training.segmentation import evaluate_segmenter, predict_lesions, train_segmenter

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and COVIDMASK_GPU=1 to use it"
)


class Phantoms(Dataset):
    """Slices of 128 pixels: with masks, or of the three classes."""

    def __init__(self, count, masks):
        classes = [2 if masks else index % 3 for index in range(count)]
        drawn = [make_slice(1000 + index, c, 128) for index, c in enumerate(classes)]
        self.images = [torch.from_numpy(image).expand(3, -1, -1) for image, _ in drawn]
        self.targets = [mask_to_targets(mask, min_area=7) for _, mask in drawn]
        self.labels, self.masks = classes, masks
        self.names = [f"phantom_{index}.png" for index in range(count)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.images[index], (self.targets if self.masks else self.labels)[index]


@pytest.fixture(autouse=True)
def all_digits(monkeypatch):
    """Convolutions in float32 proper and not in TF32, which keeps three digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_both(work):
    """What `work(fabric)` gives on the CPU and on the GPU."""
    return [work(loop.make_fabric(device=device)) for device in ("cpu", "cuda")]


def test_predictions_come_back_whole():
    """A copy from the GPU that is read before it has arrived holds anything."""
    lesions, model = Phantoms(32, True), trained_segmenter("quick", shipped=True)

    def predict(fabric):
        options = {"fabric": fabric, "fused": True, "progress": False}
        return [prediction for _, prediction, _ in predict_lesions(model, lesions, **options)]

    for one, other in zip(*on_both(predict), strict=True):
        assert {value.device.type for value in other.values()} == {"cpu"}
        torch.testing.assert_close(other["maps"], one["maps"], rtol=0, atol=1e-2)
        sure = [prediction["scores"] > 0.5 for prediction in (one, other)]
        assert abs(sure[0].sum() - sure[1].sum()) <= 1


def test_segmenter_is_judged_as_on_a_cpu():
    lesions, model = Phantoms(24, True), trained_segmenter("quick", shipped=True)
    cpu, gpu = on_both(lambda f: evaluate_segmenter(model, lesions, fabric=f, progress=False))
    for name in ("mask_ap50", "box_ap50", "author_ap50", "dice_GGO", "dice_C"):
        assert gpu[name] == pytest.approx(cpu[name], abs=0.02)
    assert cpu["mask_ap50"] > 0.5


def test_classifier_gives_what_it_gives_on_a_cpu():
    slices, model = Phantoms(24, False), trained_classifier("quick", shipped=True)
    cpu, gpu = on_both(lambda f: evaluate_classifier(model, slices, fabric=f, progress=False))
    torch.testing.assert_close(gpu["probabilities"], cpu["probabilities"], rtol=0, atol=1e-2)


def test_ranked_boxes_are_found_again_on_the_other_device(tmp_path):
    slices, model = Phantoms(6, False), trained_classifier("quick", shipped=True)
    slices.root = tmp_path
    for name in slices.names:
        (tmp_path / name).write_text(name)
    options = {"folder": tmp_path / "cache", "progress": False}
    one, other = on_both(lambda f: cache_ranked_boxes(model, slices, fabric=f, **options))
    assert torch.equal(one, other) and len(list((tmp_path / "cache").iterdir())) == 1


def test_classifier_lies_where_its_segmenter_does():
    model = covid_ct_mask_net(lesion_mask_rcnn(TINY_DETECTOR).cuda(), TINY_CLASSIFIER)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model([torch.rand(3, 64, 64, device="cuda")]).shape == (1, 3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_segmenter_learns_and_goes_on_after_a_stop(precision, tiny_lesions, tmp_path, monkeypatch):
    training = tiny_training(epochs=4, precision=precision, average=0.9)
    path = tmp_path / "run.ckpt"

    def train(checkpoint=None):
        torch.manual_seed(0)
        model = lesion_mask_rcnn(TINY_DETECTOR)
        options = {"checkpoint": checkpoint, "progress": False}
        return model, train_segmenter(model, tiny_lesions, training, **options)

    save = loop.save_checkpoint

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_checkpoint", stop)
        train(path)
    (_, whole), (model, resumed) = train(), train(path)
    assert len(resumed) == len(whole) == 8
    for one, other in zip(whole, resumed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.2)  # rounding, and what it does
    assert next(model.parameters()).is_cuda
    save_model(model, tmp_path / "model.safetensors")
    again = load_segmenter(tmp_path / "model.safetensors")
    assert all(torch.equal(v.cpu(), again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("regime", REGIMES)
def test_classifier_learns(regime, precision, tiny_slices):
    torch.manual_seed(0)
    model = covid_ct_mask_net(lesion_mask_rcnn(TINY_DETECTOR), TINY_CLASSIFIER)
    training = tiny_training(epochs=12, warmup=0, cosine=False, precision=precision)
    options = {"validation": tiny_slices, "progress": False}
    history = train_classifier(model, tiny_slices, regime, training, **options)
    bce = [step["bce"] for step in history]
    assert sum(bce[-3:]) < sum(bce[:3])


def test_a_detector_of_torchvision_ranks_as_on_a_cpu():
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=128, rpn_post_nms_top_n_test=50
    )
    model = covid_ct_mask_net(theirs, TINY_CLASSIFIER)
    images = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        cpu = model.ranked_boxes(images)
        gpu = model.cuda().ranked_boxes([image.cuda() for image in images]).cpu()
    torch.testing.assert_close(gpu[..., 0], cpu[..., 0], rtol=1e-3, atol=1e-3)


def test_images_are_looked_at_before_they_go_to_the_gpu(tmp_path):
    """There a look would wait, and without one a network answers anything."""
    lesions, slices = Phantoms(4, True), Phantoms(6, False)
    for data in (lesions, slices):
        data.images = [255 * image for image in data.images]
    segmenter, classifier = (
        trained("quick", shipped=True) for trained in (trained_segmenter, trained_classifier)
    )
    training = tiny_training()
    for run in (
        lambda: evaluate_segmenter(segmenter, lesions, progress=False),
        lambda: evaluate_classifier(classifier, slices, progress=False),
        lambda: train_segmenter(segmenter, lesions, training, progress=False),
        lambda: train_classifier(classifier, slices, "heads_bn", training, progress=False),
    ):
        with pytest.raises(DataError, match="not within 0..1; divide 8-bit grey by 255"):
            run()


def test_predict_gives_what_it_gives_on_a_cpu(tmp_path):
    image, _ = make_slice(5, 2, 128, position=0.6)
    Image.fromarray(np.round(255 * image[:96]).astype(np.uint8)).save(tmp_path / "a.png")
    files = [member.path for member in ShippedWeights]
    (cpu,), (gpu,) = (
        predict([tmp_path / "a.png"], *files, tmp_path / device, device=device)
        for device in ("cpu", "cuda")
    )
    assert cpu["lesion_pixels"] > 50
    assert gpu["lesion_pixels"] == pytest.approx(cpu["lesion_pixels"], rel=0.05)
    for name in IMAGE_CLASSES:
        assert gpu[name] == pytest.approx(cpu[name], abs=0.02)
