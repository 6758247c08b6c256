"""Ranked boxes: order, shape, padding, batches, and where gradients may and may not go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.models.classifier import covid_ct_mask_net, set_regime
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.ranked_boxes import (
    author_padding,
    encoded_rows,
    even_padding,
    pad_rows,
    propose,
    rank_boxes,
    ranked_boxes,
    run_box_head,
    same_size_groups,
)

TINY = DetectorConfig(
    backbone="resnet18",
    cut=2,
    image_size=64,
    max_size=128,
    fpn_channels=32,
    box_features=32,
    rpn_test_proposals=100,
    light_mask_head=True,
)
CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))
quick = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return lesion_mask_rcnn(TINY).eval()


def random_head_output(seed, proposals=40, classes=3):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(proposals, classes, generator=generator)
    deltas = torch.randn(proposals, 4 * classes, generator=generator)
    corner = torch.rand(proposals, 2, generator=generator) * 50
    size = torch.rand(proposals, 2, generator=generator) * 14
    return logits, deltas, torch.cat([corner, corner + size], dim=1)


@quick
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([2, 3]))
def test_ranking_falls_and_is_no_longer_than_n(seed, n, classes):
    logits, deltas, proposals = random_head_output(seed, classes=classes)
    ranking = rank_boxes(logits, deltas, proposals, (64, 64), CODER, ClassifierConfig(n_boxes=n))
    assert len(ranking.roi) <= n
    assert (ranking.score[:-1] >= ranking.score[1:]).all()
    assert ((ranking.label >= 1) & (ranking.label < classes)).all()
    assert (ranking.box >= 0).all() and (ranking.box <= 64).all()
    width, height = (ranking.box[:, 2:] - ranking.box[:, :2]).T
    assert (width * height > 0).all()
    pairs = list(zip(ranking.roi.tolist(), ranking.label.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)  # a RoI at most once per class


@quick
@given(st.integers(0, 10_000))
def test_rows_hold_the_raw_outputs_of_their_class(seed):
    logits, deltas, proposals = random_head_output(seed)
    ranking = rank_boxes(logits, deltas, proposals, (64, 64), CODER, ClassifierConfig(n_boxes=20))
    rows = encoded_rows(logits[ranking.roi], deltas[ranking.roi], ranking.label)
    for row, roi, label in zip(rows, ranking.roi, ranking.label, strict=True):
        assert torch.isclose(row[0], logits[roi].softmax(0)[label])
        assert torch.equal(row[1:], deltas[roi, 4 * label : 4 * label + 4])


@quick
@given(st.integers(0, 10_000))
def test_nms_separates_boxes_of_one_class(seed):
    from torchvision.ops import box_iou

    logits, deltas, proposals = random_head_output(seed)
    config = ClassifierConfig(n_boxes=100, nms=0.5)
    ranking = rank_boxes(logits, deltas * 0.1, proposals, (64, 64), CODER, config)
    for label in (1, 2):
        boxes = ranking.box[ranking.label == label]
        overlap = box_iou(boxes, boxes).fill_diagonal_(0)
        assert (overlap <= 0.5 + 1e-6).all()


@quick
@given(st.integers(1, 40), st.integers(1, 40))
def test_even_padding_uses_each_box_equally_often_and_in_order(k, n):
    rows = torch.arange(k, dtype=torch.float32)[:, None].expand(k, 5)
    padded = pad_rows(rows, n)[:, 0]
    assert len(padded) == n and (padded[1:] >= padded[:-1]).all()
    if k <= n:
        counts = torch.bincount(even_padding(k, n), minlength=k)
        assert counts.min() >= n // k and counts.max() <= -(-n // k)
    else:
        assert torch.equal(padded, rows[:n, 0])


@quick
@given(st.integers(3, 40), st.data())
def test_author_padding_uses_each_box_in_order_and_the_last_twice(n, data):
    k = data.draw(st.integers(1, n - 1))
    seed = data.draw(st.integers(0, 1000))
    index = author_padding(k, n, torch.Generator().manual_seed(seed))
    assert index.unique().tolist() == list(range(k))
    assert (index[1:] >= index[:-1]).all() and (index == k - 1).sum() >= 2
    again = author_padding(k, n, torch.Generator().manual_seed(seed))
    assert torch.equal(index, again)


@pytest.mark.parametrize("k", [8, 9])
def test_as_many_boxes_as_rows_need_no_padding(k):
    rows = torch.arange(5.0 * k).reshape(k, 5)
    for generator in (None, torch.Generator().manual_seed(0)):
        assert torch.equal(pad_rows(rows, 8, generator), rows[:8])


def test_images_are_grouped_by_height_and_width():
    images = [torch.zeros(3, *size) for size in ((4, 6), (6, 4), (4, 6), (4, 4), (6, 4))]
    assert same_size_groups(images) == [[0, 2], [1, 4], [3]]


def test_no_box_at_all_gives_zeros(detector):
    config = ClassifierConfig(n_boxes=8, score=2.0)  # no score is above 2
    rows = ranked_boxes(detector, [torch.rand(3, 64, 64)], config)
    assert rows.shape == (1, 8, 5) and not rows.any()
    model = covid_ct_mask_net(detector, config)
    assert torch.isfinite(model([torch.rand(3, 64, 64)])).all()


def test_fewer_boxes_than_n(detector):
    rows = ranked_boxes(detector, [torch.rand(3, 64, 64)], ClassifierConfig(n_boxes=500))
    assert rows.shape == (1, 500, 5)
    assert (rows[0, 1:, 0] <= rows[0, :-1, 0]).all()


def test_order_of_images_does_not_matter(detector):
    torch.manual_seed(1)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 80), torch.rand(3, 64, 64)]
    config = ClassifierConfig(n_boxes=16)
    with torch.no_grad():
        together = ranked_boxes(detector, images, config)
        backwards = ranked_boxes(detector, images[::-1], config).flip(0)
        alone = torch.cat([ranked_boxes(detector, [image], config) for image in images])
    torch.testing.assert_close(together, backwards, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def oblong(count=2):
    generator = torch.Generator().manual_seed(11)
    return [torch.rand(3, 64, 112, generator=generator) for _ in range(count)]


def test_boxes_are_clipped_to_the_height_and_the_width():
    proposals = torch.tensor([[80.0, 5, 90, 15], [5, 50, 15, 59]])
    deltas = torch.zeros(2, 8)
    deltas[0, 4], deltas[1, 5] = 6, 5  # 6 to the right, 4.5 down
    logits = torch.tensor([[0.0, 1], [0, 0]])
    ranking = rank_boxes(logits, deltas, proposals, (60, 100), CODER, ClassifierConfig(n_boxes=9))
    assert ranking.box.tolist() == [[86, 5, 96, 15], [5, 54.5, 15, 60]]


def test_boxes_without_area_are_dropped():
    """Proposals may have none, and deltas push others out of the image."""
    proposals = torch.tensor([[98, 5, 99, 15], [5, 58, 15, 59], [5, 5, 5, 9], [20, 20, 20.004, 21]])
    deltas = torch.zeros(4, 8)
    deltas[0, 4], deltas[1, 5] = 50, 50
    logits = torch.tensor([[0.0, 4], [0, 3], [0, 2], [0, 1]])
    ranking = rank_boxes(logits, deltas, proposals, (60, 100), CODER, ClassifierConfig(n_boxes=9))
    assert ranking.roi.tolist() == [3]  # thin, but not empty: torchvision would drop it


def test_the_score_threshold_is_exclusive():
    proposals = torch.tensor([[0.0, 0, 9, 9], [20, 20, 29, 29]])
    logits, deltas = torch.tensor([[0.0, 0], [0, 1]]), torch.zeros(2, 8)
    config = ClassifierConfig(n_boxes=9, score=0.5)  # the first has a score of exactly 0.5
    ranking = rank_boxes(logits, deltas, proposals, (60, 100), CODER, config)
    assert ranking.roi.tolist() == [1]


def test_scores_do_not_tie_in_mixed_precision(detector):
    """Eight bits of mantissa would give many boxes one score, and chance would order them."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features, proposals, shapes = propose(detector, oblong())
        logits, deltas = run_box_head(detector, features, proposals, shapes)
        rows = ranked_boxes(detector, oblong(), ClassifierConfig(n_boxes=60))
    for parts in (logits, deltas, [rows]):
        assert all(part.dtype == torch.float32 for part in parts)
    for scores in rows[..., 0]:
        assert len(scores.unique()) >= 59
    with torch.no_grad():
        exact = ranked_boxes(detector, oblong(), ClassifierConfig(n_boxes=60))
    assert (rows[..., 0] - exact[..., 0]).abs().max() < 0.02


def test_mixed_precision_keeps_the_gradient(detector):
    model = covid_ct_mask_net(detector, ClassifierConfig(n_boxes=16))
    set_regime(model, "full")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model.ranked_boxes(oblong())
    rows.square().sum().backward()
    for name in ("backbone.body.conv1", "backbone.fpn.inner_blocks.0.0", "roi_heads.box_head.fc6",
                 "roi_heads.box_head.fc7", "roi_heads.box_predictor.cls_score",
                 "roi_heads.box_predictor.bbox_pred"):  # fmt: skip
        weight = model.detector.get_parameter(f"{name}.weight")
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_the_copies_made_without_gradient_are_forgotten(detector, monkeypatch):
    """Older versions of torch would use them again, and the box head would not learn."""
    model = covid_ct_mask_net(detector, ClassifierConfig(n_boxes=16))
    set_regime(model, "full")
    seen, clear = [], torch.clear_autocast_cache
    hook = model.detector.roi_heads.box_head.register_forward_hook(
        lambda *_: seen.append(torch.is_grad_enabled())
    )
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: seen.append("clear") or clear())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.ranked_boxes(oblong(1))
        hook.remove()
        assert seen.index("clear") == seen.count(False) > 0  # after all without, before all with
        assert set(seen[seen.index("clear") + 1 :]) <= {True, "clear"}


def gradients(model, columns):
    """Parameters that a loss on these columns of the ranked boxes reaches."""
    model.zero_grad()
    model.requires_grad_(True)
    rows = model.ranked_boxes([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3))])
    rows[..., columns].square().sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_gradient_reaches_scores_and_deltas_and_nothing_it_should_not(detector):
    model = covid_ct_mask_net(detector, ClassifierConfig(n_boxes=16))
    scores, deltas = gradients(model, [0]), gradients(model, [1, 2, 3, 4])
    for reached in (scores, deltas):
        assert "detector.backbone.body.conv1.weight" in reached
        assert "detector.roi_heads.box_head.fc6.weight" in reached
        assert not any(name.startswith(("detector.rpn", "s.")) for name in reached)
    predictor = "detector.roi_heads.box_predictor."
    assert predictor + "cls_score.weight" in scores and predictor + "cls_score.weight" not in deltas
    assert predictor + "bbox_pred.weight" in deltas and predictor + "bbox_pred.weight" not in scores


def test_differentiating_the_kept_boxes_only_gives_the_same_gradient(detector):
    """The shortcut, against all proposals differentiated at once."""
    model = covid_ct_mask_net(detector, ClassifierConfig(n_boxes=16))
    set_regime(model, "full")
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    weight = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(5))
    (model.ranked_boxes(images) * weight).sum().backward()
    short = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    features, proposals, shapes = propose(model.detector, images)
    logits, deltas = run_box_head(model.detector, features, proposals, shapes)
    rows = []
    for parts in zip(logits, deltas, proposals, shapes, strict=True):
        with torch.no_grad():
            ranking = rank_boxes(*parts, model.detector.roi_heads.box_coder, model.config)
        rows.append(
            pad_rows(encoded_rows(parts[0][ranking.roi], parts[1][ranking.roi], ranking.label), 16)
        )
    (torch.stack(rows) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        if name in short:
            scale = parameter.grad.abs().max()
            torch.testing.assert_close(short[name], parameter.grad, atol=1e-5 * scale, rtol=1e-3)
