import numpy as np
import pytest
from scan_files import write_image

from covidmask.datasets.classes import SliceImages, class_statistics
from covidmask.datasets.lesions import LesionSlices, lesion_statistics


@pytest.fixture
def lesions(tmp_path):
    """Two slices of 20 x 50 = 1,000 px: six GGO of 10 px and one of 40; one consolidation of 8."""
    many, one = np.ones((2, 20, 50), dtype=np.uint8)
    for column in range(0, 48, 8):
        many[2:4, column : column + 5] = 2
    one[5:9, 5:15] = 2
    one[15:17, 5:9] = 3
    for name, mask in (("1", many), ("2", one)):
        write_image(tmp_path / "image" / "7" / f"{name}.png", mask * 0.1)
        write_image(tmp_path / "mask" / "7" / f"{name}.png", mask)
    return tmp_path


@pytest.fixture
def slices(tmp_path):
    folder = tmp_path / "slices"
    names = ["Normal_1_1_1.png", "CP_2_1_1.png", "CP_2_1_2.png", "NCP_3_1_1.png", "NCP_4_1_1.png"]
    for name in names:
        write_image(folder / name, np.zeros((9, 9)))
    (folder / "train.txt").write_text("\n".join(names))
    return folder


def test_lesion_statistics(lesions):
    found = lesion_statistics(LesionSlices(lesions))
    assert found.classes == ("GGO", "C")
    assert found.counts.tolist() == [[6, 0], [1, 1]]
    assert found.region_labels.tolist() == [1] * 7 + [2]
    np.testing.assert_allclose(found.region_fractions, [0.01] * 6 + [0.04, 0.008])
    assert found.share_of_slices_below(5).tolist() == [0.5, 1.0]
    np.testing.assert_allclose(found.share_of_regions_below(0.02, 0.01), [6 / 7, 1])
    assert found.share_of_regions_below(0.01, 0.008).tolist() == [0, 0]  # strictly below


def test_merged_and_absent_lesions(lesions):
    merged = lesion_statistics(LesionSlices(lesions, lesions="merged"))
    assert merged.counts.tolist() == [[6], [2]]
    none = lesion_statistics(LesionSlices(lesions, min_area=1000))
    assert none.counts.tolist() == [[0, 0], [0, 0]]
    assert np.isnan(none.share_of_regions_below(0.02, 0.01)).all()


def test_class_statistics(slices):
    found = class_statistics(SliceImages(slices, "train"))
    assert found.slices.tolist() == [1, 2, 2]
    assert found.patients.tolist() == [1, 1, 2]
