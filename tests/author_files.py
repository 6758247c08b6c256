"""Files in the format of the author's release, and one with a payload, for tests to read."""

import os
import re
import sys
import types

import torch
from torch import nn

ANCHORS = ((4.0, 8.0), (0.5, 1.0, 2.0))


def author_names(state):
    """Our names -> those of the released files."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("s.fc", "s2new.fc") if name.startswith("s.fc") else name
        name = name.replace("detector.", "").replace("rpn.head.conv.0.0", "rpn.head.conv")
        name = re.sub(r"((?:inner|layer)_blocks\.\d)\.0", r"\1", name)
        name = re.sub(r"mask_head\.(\d)\.0", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}", name)
        renamed[name] = tensor.clone()
    return renamed


def author_file(path, model, sizes=ANCHORS[0], ratios=ANCHORS[1], module="models.mask_net.rpn"):
    """Write `model` as torch 1.1 did: a pre-zip pickle with the author's anchor class inside."""
    foreign = types.ModuleType(module)

    class AnchorGenerator(nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes, self.aspect_ratios = (sizes,) * 5, (ratios,) * 5
            self.cell_anchors, self._cache = [torch.zeros(3, 4)], {}

    AnchorGenerator.__module__, AnchorGenerator.__qualname__ = module, "AnchorGenerator"
    foreign.AnchorGenerator = AnchorGenerator
    parents = [".".join(module.split(".")[: i + 1]) for i in range(module.count("."))]
    added = {name: types.ModuleType(name) for name in parents} | {module: foreign}
    sys.modules.update(added)
    try:
        content = {
            "epoch": "50",
            "model_weights": author_names(model.state_dict()),
            "optimizer_state": {"state": {}, "param_groups": []},
            "lrate": 1e-5,
            "anchor_generator": AnchorGenerator(),
            "model_name": "maskrcnn",
        }
        torch.save(content, path, _use_new_zipfile_serialization=False)
    finally:
        for name in added:
            del sys.modules[name]
    return path


class Payload:
    """What a malicious file would do."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))
