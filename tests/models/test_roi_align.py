"""RoIAlign by matrix products gives torchvision's numbers, forward and backward."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from covidmask.models import detector as roi_align
from covidmask.models.detector import LesionRoIAlign

SIDE, CHANNELS = 256, 6
EDGES = torch.tensor(  # at the corners, along an edge, without area, thinner than a pixel
    [[0, 0, 9, 7], [240, 244, 256, 256], [0, 100, 256, 103], [77, 0, 78, 256],
     [50, 60, 50, 60], [256, 256, 256, 256], [30, 30, 30.4, 90]]
)  # fmt: skip
LARGE = torch.tensor([[0, 0, 256, 256.0], [3, 5, 250, 240], [0, 0, 256, 120]])


def boxes_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=generator) * 0.9 * SIDE
    size = 2 + torch.rand(count, 2, generator=generator) ** 3 * SIDE
    return torch.cat([start, (start + size).clamp(max=SIDE)], dim=1)


def maps_of(strides, images, channels_last=True, dtype=torch.float32):
    torch.manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return {
        str(i): torch.randn(images, CHANNELS, SIDE // s, SIDE // s, dtype=dtype).to(
            memory_format=layout
        )
        for i, s in enumerate(strides)
    }


def pair(strides, size=7):
    names = [str(i) for i in range(len(strides))]
    return LesionRoIAlign(names, size, 2), MultiScaleRoIAlign(names, size, 2)


BOXES = {
    "usual": [boxes_of(300), boxes_of(170, 1)],
    "edges": [EDGES, EDGES.flip(0)],
    "large": [LARGE, boxes_of(3)],
    "one image without boxes": [torch.empty(0, 4), boxes_of(20)],
}


@pytest.mark.parametrize("strides", [(8,), (4, 8, 16), (4, 8, 16, 32)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("name", BOXES)
def test_forward_and_backward_are_torchvisions(strides, channels_last, name):
    boxes, shapes = BOXES[name], [(SIDE, SIDE)] * 2
    grad = None
    results = []
    for align in pair(strides):
        maps = maps_of(strides, 2, channels_last)
        maps = {key: value.requires_grad_(True) for key, value in maps.items()}
        pooled = align(maps, boxes, shapes)
        if grad is None:
            grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
        pooled.backward(grad)
        results.append((pooled, [map.grad for map in maps.values()]))
    (ours, our_grads), (theirs, their_grads) = results
    assert ours.shape == (sum(map(len, boxes)), CHANNELS, 7, 7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(our_grads, their_grads, strict=True):
        found = torch.zeros_like(wanted) if found is None else found  # a level without a box
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "padded"),  # height and width; the network pads to multiples of 32
    [((256, 20), (256, 32)), ((20, 256), (32, 256)), ((60, 100), (64, 128)), ((33, 250), (64, 256)),
     ((250, 33), (256, 64)), ((91, 180), (96, 192))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("strides", [(8,), (16,), (32,), (4, 8, 16), (4, 8, 16, 32)], ids=str)
def test_oblong_images(strides, image, padded):
    """Maps are longer than the image by the padding, so the scale is a matter of rounding."""
    sides = torch.tensor([image[1], image[0]])
    generator = torch.Generator().manual_seed(3)
    start = torch.rand(60, 2, generator=generator) * 0.9 * sides
    size = 1 + torch.rand(60, 2, generator=generator) ** 2 * sides
    boxes = [torch.cat([start, torch.minimum(start + size, sides)], dim=1)]
    boxes.append(torch.tensor([[0, 0, image[1], image[0]], [0, 0, 5, 3.0]]))
    maps = {
        str(i): torch.randn(2, CHANNELS, padded[0] // s, padded[1] // s, generator=generator)
        for i, s in enumerate(strides)
    }
    ours, theirs = (align(maps, boxes, [image] * 2) for align in pair(strides))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_images_of_several_sizes():
    """One batch, padded to the largest: the scale is that of the largest."""
    shapes, strides = [(40, 96), (64, 50), (33, 97)], (4, 8)
    generator = torch.Generator().manual_seed(4)
    maps = {
        str(i): torch.randn(3, CHANNELS, 64 // s, 128 // s, generator=generator)
        for i, s in enumerate(strides)
    }
    boxes = [torch.tensor([[0, 0, width, height], [3, 5, 20, 30.0]]) for height, width in shapes]
    ours, theirs = (align(maps, boxes, shapes) for align in pair(strides))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [-5.0, -5.1, 255.0, 255.1])
def test_points_on_the_border_count_and_those_beyond_it_do_not(start):
    """Boxes of 28 pixels on a map of stride 4 have a point at -1 or at 64 exactly, or beyond."""
    boxes = [torch.tensor([[start, 100, start + 28, 128], [100, start, 128, start + 28]])]
    ours, theirs = (align(maps_of((4,), 1), boxes, [(SIDE, SIDE)]) for align in pair((4,)))
    assert theirs.any() == (start != 255.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_both_ways_of_pooling_were_tested(monkeypatch):
    """Large boxes go to torchvision's kernel, the others do not."""
    seen = []
    original = roi_align.ops.roi_align

    def spy(map, boxes, *arguments):
        seen.append(len(boxes))
        return original(map, boxes, *arguments)

    monkeypatch.setattr(roi_align.ops, "roi_align", spy)
    ours, _ = pair((4,))
    ours(maps_of((4,), 1), [torch.cat([LARGE, EDGES])], [(SIDE, SIDE)])
    assert seen == [len(LARGE)]


def test_masks_are_pooled_on_a_finer_grid():
    ours, theirs = pair((8,), size=14)
    maps, boxes = maps_of((8,), 1), [boxes_of(40)]
    torch.testing.assert_close(
        ours(maps, boxes, [(SIDE, SIDE)]), theirs(maps, boxes, [(SIDE, SIDE)])
    )


def test_bins_need_not_be_square():
    maps, boxes = maps_of((8,), 1), [torch.cat([boxes_of(20), LARGE])]
    ours, theirs = (align(maps, boxes, [(SIDE, SIDE)]) for align in pair((8,), size=(3, 5)))
    assert ours.shape == (23, CHANNELS, 3, 5)
    torch.testing.assert_close(ours, theirs)


def test_parts_are_the_rows_of_forward():
    ours, _ = pair((4, 8, 16, 32))
    maps, boxes, shapes = maps_of((4, 8, 16, 32), 2), BOXES["usual"], [(SIDE, SIDE)] * 2
    whole = ours(maps, boxes, shapes)
    parts = list(ours.parts(maps, boxes, shapes))
    assert len(parts) > 3
    assert torch.cat([index for index, _ in parts]).sort().values.tolist() == list(range(470))
    for index, pooled in parts:
        torch.testing.assert_close(pooled, whole[index], rtol=0, atol=0)


def test_no_box_at_all():
    ours, _ = pair((4, 8))
    pooled = ours(maps_of((4, 8), 1), [torch.empty(0, 4)], [(SIDE, SIDE)])
    assert pooled.shape == (0, CHANNELS, 7, 7)


def test_bfloat16_differs_by_its_rounding_alone():
    ours, theirs = pair((4, 8))
    rough, boxes = maps_of((4, 8), 1, dtype=torch.bfloat16), [torch.cat([boxes_of(50), LARGE])]
    pooled = ours(rough, boxes, [(SIDE, SIDE)])
    assert pooled.dtype == torch.bfloat16
    exact = theirs({key: map.float() for key, map in rough.items()}, boxes, [(SIDE, SIDE)])
    torch.testing.assert_close(pooled.float(), exact, rtol=0.02, atol=0.02)
