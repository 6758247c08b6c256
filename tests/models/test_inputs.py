"""Images that a network would take without a word are refused in words."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import TINY_CLASSIFIER, TINY_DETECTOR

from covidmask.errors import DataError
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import check_images, lesion_mask_rcnn, to_model

GOOD = torch.rand(3, 40, 64, generator=torch.Generator().manual_seed(0))
BAD = {
    "0 to 255": (GOOD * 255, "run from 0.0.* to 25.*not within 0..1; divide 8-bit grey by 255"),
    "Hounsfield units": (GOOD * 1500 - 1350, "hounsfield_to_unit"),
    "one NaN": (torch.where(GOOD.max() == GOOD, torch.nan, GOOD), "run from nan to nan"),
    "infinite": (torch.where(GOOD.max() == GOOD, torch.inf, GOOD), "to inf"),
    "grey": (GOOD[0], r"\[40, 64\]; give a torch.float32 tensor \[3, H, W\]"),
    "one channel": (GOOD[:1], r"\[1, 40, 64\]"),
    "a batch": (GOOD[None], r"\[1, 3, 40, 64\]"),
    "bytes": ((GOOD * 255).byte(), "torch.uint8"),
    "no pixel": (GOOD[:, :0], r"torch.float32 \[3, 0, 64\]"),
    "an array": (GOOD.numpy(), "ndarray.* give a torch.float32"),
    "a picture": (Image.new("RGB", (8, 8)), "Image.* give a torch.float32"),
    "float64": (GOOD.double(), "torch.float64"),
}


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return covid_ct_mask_net(lesion_mask_rcnn(TINY_DETECTOR), TINY_CLASSIFIER)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return lesion_mask_rcnn(TINY_DETECTOR).eval()


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("which", ["classifier", "segmenter"])
def test_bad_images(kind, which, request):
    model = request.getfixturevalue(which)
    image, words = BAD[kind]
    with pytest.raises(DataError, match=f"image 1: .*{words}"):
        model([GOOD, image])


def test_no_image_and_a_model_in_float64(classifier, segmenter):
    for model in (classifier, segmenter):
        with pytest.raises(DataError, match="no image is given"):
            model([])
        with pytest.raises(DataError, match="weights are torch.float64; use model.float"):
            copy.deepcopy(model).double()([GOOD])


def test_names():
    with pytest.raises(DataError, match="b.png: its values run from"):
        check_images([GOOD, GOOD * 255], names=["a.png", "b.png"])


@pytest.mark.filterwarnings("error")
def test_a_saliency_map(classifier):
    """The gradient of a logit by the image, of a model that does not learn."""
    model = copy.deepcopy(classifier).requires_grad_(False)
    image = GOOD.clone().requires_grad_()
    model([image])[0, 2].backward()
    assert image.grad.abs().sum() > 0


def test_the_ends_of_the_range_and_their_rounding_are_fine():
    check_images([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), GOOD * 1.0005, GOOD.bfloat16()])


def test_what_goes_to_another_device_is_looked_at_before():
    """On a GPU a look would wait, so that it comes first; `meta` stands for it here."""
    meta = torch.device("meta")
    assert [image.device for image in to_model([GOOD], meta)] == [meta]
    with pytest.raises(DataError):
        to_model([GOOD * 255], meta)
    check_images([(GOOD * 255).to(meta)])  # not read


def test_a_strip_that_resizing_would_leave_nothing_of():
    with pytest.raises(DataError, match="image 1: 8 x 4000 pixels, too thin a strip"):
        check_images([torch.rand(3, 64, 64), torch.rand(3, 4000, 8)])


@pytest.mark.parametrize("side", [-5, 0, 10_000_000])
def test_sizes_that_no_image_can_be_brought_to(side):
    with pytest.raises(DataError, match=f"image size {side}: give 1 to 8192"):
        lesion_mask_rcnn(replace(TINY_DETECTOR, image_size=side))
