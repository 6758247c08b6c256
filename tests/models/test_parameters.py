"""Sizes of the models against the counts of the paper, the author's README and his code."""

import pytest

from covidmask.models import parameters

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


@pytest.fixture(scope="module")
def sizes():
    return {(s.backbone, s.cut): s for s in parameters.paper_and_light_sizes()}


def test_every_count(sizes):
    assert set(sizes) == set(TABLE)
    for key, (segmenter, classifier, s, batch_norm) in TABLE.items():
        size = sizes[key]
        assert size.segmenter_parameters == segmenter
        assert size.classifier_parameters == classifier
        assert (size.s_parameters, size.batch_norm_parameters) == (s, batch_norm)
        assert size.heads_bn_trainable == s + batch_norm


def test_entries_of_the_paper_model(sizes):
    size = sizes["resnet50", 0]
    assert (size.segmenter_entries, size.classifier_entries) == (31_781_917, 31_522_845)
    assert size.heads_bn_trainable == 2_417_539


def test_published_numbers_follow_from_their_rule_or_are_reported():
    for row in parameters.published_counts():
        if row.count is None:
            assert row.rule == "none"
            continue
        digits = 1 if row.millions == 0.6 else 2
        exact = row.count / 1e6
        cut = int(exact * 10**digits) / 10**digits
        assert row.millions in (cut, round(exact, digits)), row
    unmatched = {row.name for row in parameters.published_counts() if row.count is None}
    assert unmatched == {
        "heads", "ResNet-34 cut 1", "ResNet-18 cut 1", "ResNet-34 cut 2", "ResNet-18 cut 2"
    }  # fmt: skip
