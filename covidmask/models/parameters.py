"""How large a model, or a part of it, is."""

from __future__ import annotations

from torch import nn

from covidmask.models.classifier import batch_norm_parameters


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, trained or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_trainable(model: nn.Module) -> int:
    """Numbers in the parameters that require a gradient; call `set_regime` first."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_batch_norm(model: nn.Module) -> int:
    """Numbers in gamma and beta of all batch-norm layers, downsample branches included."""
    return sum(parameter.numel() for parameter in batch_norm_parameters(model))
