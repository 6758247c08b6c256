"""What every model asks of its images, checked before a wrong one becomes a plausible result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from covidmask.errors import DataError

SLACK = 1e-3  # interpolation may step over 0..1 by its rounding


def check_images(
    images: Sequence[Tensor],
    model: nn.Module | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse images that a network would take without a word, and answer with nonsense.

    Values on a GPU are not read, because the CPU would have to wait for them; see `to_model`.

    Args:
        images: B tensors.
        model: its weights must not be float64 either.
        names: what messages call the images, such as their files; else "image 0" and so on.

    Raises:
        DataError: no image; no tensor; another shape than [3,H,W], or no pixel; whole numbers,
            float64; values outside 0..1, or NaN.
    """
    if len(images) == 0:
        raise DataError("no image is given; give a list of float32 tensors [3, H, W] in 0..1")
    weights = None if model is None else next(model.parameters(), None)
    if weights is not None and weights.dtype == torch.float64:
        raise DataError(
            f"the model's weights are {weights.dtype}; use model.float(), and autocast for speed"
        )
    for number, image in enumerate(images):
        name = names[number] if names else f"image {number}"
        if not isinstance(image, Tensor):
            raise DataError(f"{name}: {type(image).__name__}; give a torch.float32 [3, H, W]")
        kinds = (torch.float32, torch.bfloat16, torch.float16)  # mixed precision makes the others
        shaped = image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0
        if not shaped or image.dtype not in kinds:
            raise DataError(
                f"{name}: {image.dtype} {list(image.shape)}; give torch.float32 [3, H, W]"
            )
        if image.device.type != "cpu":
            continue
        low, high = (float(end) for end in image.detach().aminmax())  # NaN if one value is
        if not (low >= -SLACK and high <= 1 + SLACK):
            raise DataError(
                f"{name}: its values run from {low:.4g} to {high:.4g}, not within 0..1; "
                "divide 8-bit grey by 255, and map Hounsfield units by "
                "covidmask.data.medical.hounsfield_to_unit"
            )


def to_model(
    images: Sequence[Tensor], device: torch.device, names: Sequence[str] | None = None
) -> list[Tensor]:
    """The images on `device`, after `check_images`, which costs no wait before they are there."""
    check_images(images, names=names)
    return [image.to(device) for image in images]


def same_size_groups(images: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the images, grouped by shape, in order of first appearance."""
    groups: dict[torch.Size, list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(image.shape, []).append(position)
    return list(groups.values())
