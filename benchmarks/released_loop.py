"""How the author's loops (AlexTS1980/COVID-CT-Mask-Net, `train_classifier.py` and
`evaluation_mean_ap.py`) spend their time, on our modules: slices one by one, a gradient for every
parameter and every proposal, graphs in evaluation, and the detector again for each epoch and IoU
threshold. The baseline of `speed.py`; these sentences describe, no line is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from covidmask.metrics.detection import author_image_ap
from covidmask.models.ranked_boxes import encoded_rows, pad_rows, rank_boxes


def released(model: nn.Module) -> nn.Module:
    """A copy of a detector or classifier with torchvision's RoIAlign, all of it differentiable."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    for heads in [module for module in model.modules() if hasattr(module, "box_roi_pool")]:
        for name in ("box_roi_pool", "mask_roi_pool"):
            ours = getattr(heads, name)
            if ours is not None:
                size, ratio = ours.output_size, ours.sampling_ratio
                setattr(heads, name, MultiScaleRoIAlign(ours.featmap_names, size, ratio))
    return model


def logits(model: nn.Module, image: Tensor) -> Tensor:
    """float32 [3,H,W] -> [3]; the graph holds every proposal."""
    detector, heads = model.detector, model.detector.roi_heads
    batch, _ = detector.transform([image])
    features = detector.backbone(batch.tensors)
    proposals, _ = detector.rpn(batch, features)
    proposals = [boxes.detach() for boxes in proposals]
    pooled = heads.box_roi_pool(features, proposals, batch.image_sizes)  # [P, C, 7, 7]
    scores, deltas = heads.box_predictor(heads.box_head(pooled))  # [P, classes], [P, 4*classes]
    with torch.no_grad():
        place = proposals[0], batch.image_sizes[0], heads.box_coder
        best = rank_boxes(scores, deltas, *place, model.config)
    rows = encoded_rows(scores[best.roi], deltas[best.roi], best.label)  # [K, 5]
    return model.s(pad_rows(rows, model.config.n_boxes)[None])[0]


def training_step(
    model: nn.Module, images: Sequence[Tensor], labels: Tensor, optimizer: torch.optim.Optimizer
) -> float:
    """One step; the graphs of all images of the batch are held until its end."""
    optimizer.zero_grad()
    outputs = torch.stack([logits(model, image) for image in images])  # [B, 3]
    loss = F.binary_cross_entropy_with_logits(outputs, F.one_hot(labels, 3).float())
    loss.backward()
    optimizer.step()
    return loss.item()


def average_precision(
    segmenter: nn.Module, dataset, thresholds: Sequence[float], device: torch.device
) -> list[float]:
    """The released code's AP at each IoU threshold; the detector runs anew for each of them."""
    result = []
    for threshold in thresholds:
        values = []
        for image, target in (dataset[i] for i in range(len(dataset))):  # decoded again
            target = {key: value.to(device) for key, value in target.items()}
            found = segmenter([image.to(device)])[0]
            values.append(float(author_image_ap(found, target, (threshold,))[0]))
        result.append(sum(values) / len(values))
    return result
