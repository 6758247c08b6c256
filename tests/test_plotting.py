import os
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from covidmask import plotting
from covidmask.datasets.lesions import mask_to_targets
from covidmask.predict import overlay

MASK = np.zeros((40, 60), dtype=np.uint8)
MASK[5:35, 5:55] = 1
MASK[10:20, 10:22] = 2
MASK[25:32, 40:50] = 3
IMAGE = np.full((40, 60), 0.4, dtype=np.float32)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def lesions():
    return mask_to_targets(MASK)


def drawn(ax):
    """Draw it, so that an error in the figure shows, and return the texts in it."""
    ax.figure.canvas.draw()
    texts = [text.get_text() for text in ax.texts]
    legend = ax.get_legend()
    return texts, [text.get_text() for text in legend.get_texts()] if legend else []


def labels_of(ax):
    return ax.get_xlabel(), ax.get_ylabel()


def test_show_slice_takes_a_tensor_or_an_array_and_the_given_axes():
    ax = plotting.get_ax(3, 2)
    assert plotting.show_slice(torch.from_numpy(IMAGE).repeat(3, 1, 1), ax) is ax
    np.testing.assert_array_equal(ax.images[0].get_array(), IMAGE)
    assert labels_of(ax) == ("x (pixels)", "y (pixels)")
    assert plotting.show_slice(IMAGE) is not ax


def test_show_lesions_tells_the_classes_apart_without_colour(lesions):
    ax = plotting.show_lesions(IMAGE, lesions)
    ggo, consolidation = ax.patches
    assert ggo.get_linestyle() != consolidation.get_linestyle()
    assert ggo.get_bbox().bounds == (9.5, 9.5, 12, 10)
    assert drawn(ax) == ([], ["GGO", "C"])


def test_show_lesions_leaves_out_low_scores(lesions):
    lesions["scores"] = torch.tensor([0.91, 0.3])
    lesions["masks"] = lesions["masks"][:, None].float().requires_grad_()
    ax = plotting.show_lesions(IMAGE, lesions, score_threshold=0.75)
    assert len(ax.patches) == 1
    assert drawn(ax) == (["0.91"], ["GGO"])
    del lesions["masks"]
    assert drawn(plotting.show_lesions(IMAGE, lesions))[0] == ["0.91", "0.30"]


def test_show_lesions_of_none():
    none = mask_to_targets(np.zeros_like(MASK))
    assert drawn(plotting.show_lesions(IMAGE, none)) == ([], [])


def test_show_mask_names_the_codes_that_occur():
    assert drawn(plotting.show_mask(MASK))[1] == ["background", "lung", "GGO", "consolidation"]
    assert drawn(plotting.show_mask(np.minimum(MASK, 1)))[1] == ["background", "lung"]


def test_loss_curves_skip_missing_keys_and_smooth():
    history = [{"step": i, "epoch": i // 2, "loss": float(i)} for i in range(6)]
    history[1]["accuracy"] = 0.5
    history[5]["accuracy"] = 0.7
    ax = plotting.loss_curves(history, ("loss", "accuracy"), smooth=2)
    loss, accuracy = ax.lines
    np.testing.assert_allclose(loss.get_ydata(), [0.5, 1.5, 2.5, 3.5, 4.5])
    np.testing.assert_allclose(loss.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(accuracy.get_ydata(), [0.6])
    assert loss.get_linestyle() != accuracy.get_linestyle()
    assert drawn(ax)[1] == ["loss", "accuracy"]
    with pytest.raises(KeyError, match="'lost'"):
        plotting.loss_curves(history, ("lost",))


def test_confusion_matrix_shows_counts_and_shares_of_the_row():
    ax = plotting.confusion_matrix([[3, 1, 0], [0, 0, 0], [1000, 0, 1000]])
    texts = drawn(ax)[0]
    assert texts[0] == "3\n75.0 %"
    assert texts[4] == "0\n0.0 %"
    assert texts[8] == "1,000\n50.0 %"
    assert labels_of(ax) == ("Predicted class", "True class")


def test_ranked_box_matrix_scales_each_number_by_its_largest():
    rows = np.array([[0.8, -4, 0, 1, 2], [0.4, 2, 0, 1, -1]])
    ax = plotting.ranked_box_matrix(torch.from_numpy(rows))
    expected = [[1, 0.5], [-1, 0.5], [0, 0], [1, 1], [1, -0.5]]
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert [tick.get_text() for tick in ax.get_yticklabels()][:2] == ["score / 0.8", "dx / 4"]
    drawn(ax)


def test_score_by_rank_has_a_line_per_class_that_occurs():
    rows = np.zeros((4, 3, 5))
    rows[:2, :, 0] = [[0.9, 0.5, 0.1], [0.7, 0.3, 0.1]]
    ax = plotting.score_by_rank(rows, [2, 2, 0, 0])
    control, covid = ax.lines
    np.testing.assert_allclose(covid.get_ydata(), [0.8, 0.4, 0.1])
    np.testing.assert_allclose(control.get_xdata(), [1, 2, 3])
    assert drawn(ax)[1] == ["Control (2 slices)", "COVID-19 (2 slices)"]


def test_own_classes_have_looks_of_their_own(lesions):
    lesions["labels"] = torch.tensor([1, 3])
    ax = plotting.show_lesions(IMAGE, lesions, classes=("a", "b", "c"))
    assert ax.patches[0].get_edgecolor() != ax.patches[1].get_edgecolor()
    assert drawn(ax)[1] == ["a", "c"]
    ax = plotting.show_mask(np.where(MASK == 3, 4, MASK), classes=("a", "b", "c"))
    assert drawn(ax)[1] == ["background", "lung", "a", "c"]
    ax = plotting.score_by_rank(np.ones((5, 3, 5)), np.arange(5), classes="vwxyz")
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 5
    looks = list(zip(plotting.COLOURS, plotting.LINES, strict=True))
    assert len(set(looks)) == len(looks) == 28 <= len(plotting.HATCHES)
    assert drawn(plotting.ranked_box_matrix(np.ones((4, 2)), columns=("score", "area")))


def overlaid(lesions, scores=(0.9, 0.8), image=IMAGE, **options):
    codes = np.where(MASK >= 2, MASK, 0).astype(np.uint8)
    picture = overlay(image, {**lesions, "scores": torch.tensor(scores)}, codes, **options)
    return np.asarray(picture)


def test_overlay_tints_the_lesion_and_leaves_the_rest(lesions):
    before, boxes = plt.get_fignums(), lesions["boxes"].clone()
    picture = overlaid(lesions)
    assert plt.get_fignums() == before and torch.equal(lesions["boxes"], boxes)
    assert picture.shape == (40, 60, 3)
    assert picture.dtype == np.uint8
    grey = round(255 * 0.4)
    assert (picture[0, 50:] == grey).all()
    inside = picture[15, 15].astype(int)
    assert inside[2] > inside[0]  # sky blue
    assert picture[28, 45, 0] > picture[28, 45, 2]  # orange
    # the frame goes round the last pixel of the box
    sky_blue = [0x56, 0xB4, 0xE9]
    assert picture[19, 21].tolist() == sky_blue
    assert picture[19, 22].tolist() == [grey] * 3


def test_overlay_enlarges_by_a_whole_factor(lesions):
    image = np.linspace(0, 1, IMAGE.size, dtype=np.float32).reshape(IMAGE.shape)
    small, large = (overlaid(lesions, image=image, enlarge=k, score_threshold=1.0) for k in (1, 3))
    assert np.array_equal(large, small.repeat(3, 0).repeat(3, 1))
    framed = overlaid(lesions, enlarge=3)
    assert framed[3 * 20 - 1, 3 * 22 - 1].tolist() == [0x56, 0xB4, 0xE9]


def test_overlay_frames_only_what_scores_above_the_threshold(lesions):
    frames = [[0x56, 0xB4, 0xE9], [0xE6, 0x9F, 0x00]]
    for threshold, shown in ((0.0, 2), (0.85, 1), (0.9, 0)):  # "above": 0.9 itself is not
        picture = overlaid(lesions, (0.9, 0.8), score_threshold=threshold)
        found = [picture[19, 21].tolist(), picture[31, 49].tolist()]
        assert [one == other for one, other in zip(found, frames, strict=True)] == [
            shown > 0,
            shown > 1,
        ]


def test_overlay_of_other_classes(lesions):
    picture = overlaid({**lesions, "labels": torch.tensor([1, 1])}, classes=("nodule",))
    assert picture[28, 45].tolist() == [102] * 3  # code 3 is none of its classes
    assert (picture[15, 15] != 102).any()


def test_import_changes_no_setting_and_opens_no_figure():
    code = (
        "import matplotlib; before = dict(matplotlib.rcParams.copy());"
        "import covidmask.plotting, matplotlib.pyplot as plt;"
        "after = dict(matplotlib.rcParams.copy()); before.pop('backend'); after.pop('backend');"
        "assert before == after; assert not plt.get_fignums();"
        "import sys; assert 'seaborn' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "MPLBACKEND": "Agg"}
    )
