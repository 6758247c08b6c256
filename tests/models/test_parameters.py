"""Sizes of the models against the counts of the paper, the author's README and his code."""

import pytest
import torch

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.models.classifier import (
    count_batch_norm,
    count_parameters,
    count_trainable,
    covid_ct_mask_net,
    set_regime,
)
from covidmask.models.detector import lesion_mask_rcnn

# backbone, cut: segmenter parameters, classifier parameters, S, batch-norm affine
TABLE = {
    ("resnet50", 0): (31_728_744, 31_469_672, 2_364_419, 53_120),
    ("resnet34", 0): (24_620_008, 24_851_304, 592_387, 17_024),
    ("resnet34", 1): (11_440_104, 11_671_400, 592_387, 9_856),
    ("resnet34", 2): (4_584_936, 4_816_232, 592_387, 3_200),
    ("resnet18", 0): (14_511_848, 14_743_144, 592_387, 9_600),
    ("resnet18", 1): (6_052_584, 6_283_880, 592_387, 4_480),
    ("resnet18", 2): (3_920_104, 4_151_400, 592_387, 1_920),
}


@pytest.mark.parametrize("backbone, cut", TABLE)
def test_every_count(backbone, cut):
    light = backbone != "resnet50"
    config = ClassifierConfig(n_boxes=128, hidden=512) if light else ClassifierConfig()
    with torch.device("meta"):  # shapes without memory
        segmenter = lesion_mask_rcnn(
            DetectorConfig(backbone=backbone, cut=cut, light_mask_head=light)
        )
        model = covid_ct_mask_net(segmenter, config)
    s, batch_norm = TABLE[backbone, cut][2:]
    counts = (segmenter, model, model.s)
    assert [count_parameters(each) for each in counts] == list(TABLE[backbone, cut][:3])
    assert count_batch_norm(model) == batch_norm
    for regime, expected in (("heads", s), ("heads_bn", s + batch_norm)):
        set_regime(model, regime)
        assert count_trainable(model) == expected
    if not light:  # the numbers of the state dict, which the paper prints
        entries = [sum(v.numel() for v in m.state_dict().values()) for m in (segmenter, model)]
        assert entries == [31_781_917, 31_522_845]
