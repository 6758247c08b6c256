"""A copy of a model that only predicts, and does it faster."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, Bottleneck

Model = TypeVar("Model", bound=nn.Module)
# Where a batch norm is known to read the convolution that stands before it, and nothing else does.
# Elsewhere the order of attributes says nothing about the order of calls.
IN_ORDER = (nn.Sequential, IntermediateLayerGetter, BasicBlock, Bottleneck)


def for_inference(model: Model) -> Model:
    """Copy a detector or classifier for prediction: fewer layers, channels last.

    In eval mode batch norm is a fixed scale and shift of each channel, so it is folded into the
    convolution before it: one pass over the feature map less. The results differ by rounding.
    That is done in torchvision's ResNets and in sequences; all other layers, such as batch norms
    that carry an activation, stay as they are.

    Args:
        model: any detector or classifier; it is left as it is, and later changes to it do not
            reach the copy.

    Returns:
        The copy, in eval mode, with no parameter that requires a gradient.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(fast.modules()):
        if not any(type(module).forward is kind.forward for kind in IN_ORDER):
            continue
        for (name, layer), (next_name, follower) in pairwise(list(module._modules.items())):
            plain = type(layer) is nn.Conv2d and type(follower) is nn.BatchNorm2d  # no subclass
            if plain and follower.running_mean is not None and not _hooked(layer, follower):
                setattr(module, name, fuse_conv_bn_eval(layer, follower))
                setattr(module, next_name, nn.Identity())
    return fast.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _hooked(*layers: nn.Module) -> bool:
    """Whether there are hooks, which may change weights and results, or read them."""
    return any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
