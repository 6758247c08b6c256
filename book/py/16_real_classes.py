# %% [markdown]
# # 16 · Real classes
#
# COVID-CT {cite:p}`Zhao2020dataset` is a set of real CT images with a class that anyone can get. Its
# images are figures, mostly cut out of papers, of patients with COVID-19 and of others. A detector that has seen
# drawn chests alone looks at them, and we read more and more of what it computes. **What do ranked boxes
# keep of a real figure, and what do they lose?**

# %% tags=["fold"] mystnb={"image": {"alt": "One synthetic slice three times: as it is, brighter and with a white frame around it, and with a white letter A in the upper left corner."}, "figure": {"caption": "One slice as three journals may print it: as it is, in a brighter window with a frame, and with a letter. What belongs to the patient is the same in all three. Synthetic."}}
# @title Import, print versions, and draw one slice as three journals print it
import os
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.ops import roi_pool

import covidmask
from covidmask import plotting
from covidmask.config import PRESETS
from covidmask.datasets import SliceImages, old_friend, open_slices, write_phantoms
from covidmask.datasets.classes import SliceEntry
from covidmask.models import (
    ShippedWeights,
    encoded_rows,
    pad_rows,
    propose,
    rank_boxes,
    run_box_head,
    trained_segmenter,
)
from covidmask.models.ranked_boxes import ranked_boxes
from covidmask.models.systems import BoxMaps, LinearReader, PooledMaps
from covidmask.training.compare import auc, few, judge

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")


TITLES = "as it is", "brighter, framed", "with a letter"


def show_three_prints(friend):
    framed = np.pad(friend[5:-5, 5:-5] ** 0.8, 5, constant_values=1)
    _, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for ax, picture in zip(axes, (friend, framed, friend), strict=True):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
    axes[2].text(6, 22, "A", color="white", fontsize=20, weight="bold")
    for ax, title in zip(axes, TITLES, strict=True):
        ax.set_title(title, fontsize=10)


show_three_prints(old_friend(PRESETS["quick"].phantoms.size)[0])
plt.show()

# %% [markdown]
# **After it you can**
#
# - say what a set of figures is, and what it is not;
# - read more and more of one look of a detector, and find the step at which information is lost;
# - test whether a reader follows the disease or the layout, where you control both;
# - go from nothing to classes on real images, with commands.
#
# **You need** [chapter 6](06_ranked_boxes.ipynb) (ranked boxes), [chapter
# 12](12_side_by_side.ipynb) (summaries of a look, AUC) and [chapter 10](10_evaluation.ipynb)
# (intervals). **Time:** reading 25 min, exercises 40 min, running 2 min.
#
# ```{admonition} Real figures, and synthetic data
# :class: important
# The two tables are about real figures, which belong to the authors of the papers: none is shown here.
# What runs here runs on *phantoms*, drawn by formulas and random numbers. Nothing is for diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")
COVID_CT = os.environ.get("COVIDMASK_COVID_CT", f"{DATA}/covid-ct")
SHOW = False  # True draws a real figure, in your own copy
PER_CLASS = 60  # training slices

# %% [markdown]
# ## What COVID-CT is
#
# The set has 746 images of two classes in a published division: 425 to train, 118 for validation (*val*)
# and 203 to test. Before you train on any set, look at what it is:
#
# - **NonCOVID is not healthy.** The class holds other diseases, tumours and some normal lungs. So the
#   question is not "ill or well", and not the paper's three classes either.
# - **Figures are not scans.** Someone chose each image because it shows something. There is one slice, in
#   an unknown window, squeezed into 8 bits and a printed size.
# - **The layout differs** from one source to the next: borders, letters, arrows, cuts. The two classes
#   come largely from different sources, so the layout may tell the class.
# - **Patients are known in part.** What we do know are the panels of one source figure, by their names.
#   Folds and intervals below keep them together: the 425 training images are of 224 figures.
#
# ## More and more of the same look
#
# Any detector of this book makes feature maps, then proposals, then scores and deltas of boxes. Below,
# `look` collects four summaries of one look, each nearer to the maps than the one before. On real images
# the detector will be `SEGMENTER_CT`, which learned from drawn chests alone; here it is the preset's.

# %%
preset = PRESETS[PRESET]
detector = trained_segmenter(PRESET, device, shipped=True).eval()
N, channels = preset.classifier.n_boxes, detector.backbone.out_channels


def boxes_of(features, proposals, shapes):
    """Rows [N, 5] of the ranked boxes, and the boxes [K, 4] in pixels."""
    found = run_box_head(detector, features, proposals, shapes)
    logits, deltas = (part[0] for part in found)  # of the one image
    coder = detector.roi_heads.box_coder
    image = proposals[0], shapes[0]
    best = rank_boxes(logits, deltas, *image, coder, preset.classifier)
    rows = encoded_rows(logits[best.roi], deltas[best.roi], best.label)
    return pad_rows(rows, N), best.box


# %%
@torch.no_grad()
def look(image):
    """One look at an image [3, H, W]: from scores to whole maps."""
    features, proposals, shapes = propose(detector, [image])
    rows, boxes = boxes_of(features, proposals, shapes)
    maps = [m for m in features.values() if m.shape[1] == channels]
    inside, pooled = [], []
    for m, stride in zip(maps, detector.strides, strict=True):
        # m [1, channels, h, w], cut [K, channels, 1, 1]
        cut = roi_pool(m, [boxes], 1, 1 / stride)
        inside.append(cut.flatten(1).amax(0))
        pooled += [m[0].mean((1, 2)), m[0].amax((1, 2))]
    return {
        "scores": rows[:, 0],
        "paper's vector": rows.flatten(),
        "inside boxes": torch.cat(inside),
        "maps": torch.cat(pooled),
        "two greys": torch.stack([image.mean(), image.max()]),
    }


# %% [markdown]
# `roi_pool` with an output of one cell takes the largest value of each channel within a box, and `amax` the
# largest of these over the boxes. The fifth summary, two grey values, needs no network at all. It is
# there as a warning, as you will see.
#
# The package computes the same:

# %% tags=["nbval-check-output"]
friend = torch.from_numpy(old_friend(preset.phantoms.size)[0])
image = friend.expand(3, -1, -1).to(device)
ours, by_package = look(image), {}
with torch.no_grad():
    rows = ranked_boxes(detector, [image], preset.classifier)[0]
    by_package["paper's vector"] = rows.flatten()
    by_package["maps"] = PooledMaps(detector)([image])[0]
    inside = BoxMaps(detector, preset.classifier)
    by_package["inside boxes"] = inside([image])[0]
for name, numbers in by_package.items():
    assert torch.allclose(ours[name], numbers, atol=1e-5), name
    print(f"{name:14} {len(numbers):3} numbers, as in the package")

# %% [markdown]
# ## What it says of real figures
#
# The table has what a logistic regression makes of such summaries of COVID-CT, looked at by
# `SEGMENTER_CT`. The first rows read boxes, and the third to the fifth add to one another. Last comes
# another network. An AUC of 0.5 is a coin toss, and 1 is no error.
#
# <!-- covid_ct -->
# | what a logistic regression reads | numbers | AUC, folds (95 % over figures) | AUC, val |
# |---|---|---|---|
# | scores of the 64 boxes, in their order | 64 | 0.623 (0.563 to 0.681) | 0.621 (0.499 to 0.732) |
# | score and four deltas, in their order (the paper's vector) | 320 | 0.662 (0.609 to 0.719) | 0.622 (0.518 to 0.718) |
# | the same, as mean, spread and quantiles over the boxes | 25 | 0.661 (0.595 to 0.724) | 0.644 (0.513 to 0.763) |
# | and lesion class and place of each box | 50 | 0.648 (0.584 to 0.717) | 0.649 (0.506 to 0.767) |
# | and mean, spread, least and most grey in each box | 70 | 0.694 (0.627 to 0.761) | 0.677 (0.535 to 0.789) |
# | what the box head makes of each box: mean and maximum over the boxes | 256 | 0.676 (0.624 to 0.732) | 0.703 (0.572 to 0.805) |
# | largest value of each map channel inside each box: the largest over the boxes | 192 | 0.817 (0.766 to 0.864) | 0.784 (0.681 to 0.870) |
# | the same inside boxes of these sizes at places drawn at random | 192 | 0.791 (0.730 to 0.845) | 0.749 (0.622 to 0.838) |
# | mean and greatest grey value of the whole image | 2 | 0.733 (0.655 to 0.800) | 0.541 (0.413 to 0.680) |
# | feature maps of the detector: mean and maximum over the image | 384 | 0.831 (0.765 to 0.887) | 0.822 (0.722 to 0.896) |
# | score, deltas, class and place of the boxes, and those maps | 434 | 0.827 (0.765 to 0.882) | 0.804 (0.698 to 0.884) |
# | MobileNetV2 of ImageNet, frozen: its pooled features | 1,280 | 0.824 (0.756 to 0.887) | 0.775 (0.690 to 0.861) |
#
# COVID-CT, real: 425 training images, 118 of val. Command: `python benchmarks/covid_ct.py --data data/covid-ct`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.14.1+cu130; 2026-11-27; commit 6bee086; all numbers in `results/covid_ct.json`.
# <!-- /covid_ct -->
#
# The *folds* are five parts of the training list: each image is judged by a reader that has not met its
# figure. Which rows to try was decided by the folds. The validation images were opened only
# after the rows were fixed, all but the control at random places.

# %% tags=["fold"] mystnb={"image": {"alt": "AUC of summaries of the images of COVID-CT, as dots with intervals, in the folds and on val. Rows of scores, deltas, places and the hidden layer lie between 0.6 and 0.7; inside boxes, at random places, maps and ImageNet above 0.74; two grey values at 0.73 in the folds and 0.54 on val."}, "figure": {"caption": "The table as a picture: AUC with 95 % intervals over source figures, in the folds (dots) and on val (squares); dotted: a coin toss. Real figures, COVID-CT."}}
# @title Draw the table (numbers of results/covid_ct.json)
table = {  # summary: AUC in the folds, its interval, AUC on val, its interval
    # rows of covid_ct
    "scores": (0.623, 0.563, 0.681, 0.621, 0.499, 0.732),
    "paper's vector": (0.662, 0.609, 0.719, 0.622, 0.518, 0.718),
    "its mean, spread, ...": (0.661, 0.595, 0.724, 0.644, 0.513, 0.763),
    "+ class and place": (0.648, 0.584, 0.717, 0.649, 0.506, 0.767),
    "+ grey in the boxes": (0.694, 0.627, 0.761, 0.677, 0.535, 0.789),
    "hidden layer": (0.676, 0.624, 0.732, 0.703, 0.572, 0.805),
    "maps inside boxes": (0.817, 0.766, 0.864, 0.784, 0.681, 0.870),
    "maps in boxes elsewhere": (0.791, 0.730, 0.845, 0.749, 0.622, 0.838),
    "two greys of the image": (0.733, 0.655, 0.800, 0.541, 0.413, 0.680),
    "maps of the image": (0.831, 0.765, 0.887, 0.822, 0.722, 0.896),
    "maps and boxes": (0.827, 0.765, 0.882, 0.804, 0.698, 0.884),
    "ImageNet, frozen": (0.824, 0.756, 0.887, 0.775, 0.690, 0.861),
    # end of rows
}
fig, ax = plt.subplots(figsize=(7, 5), layout="constrained")
for y, values in enumerate(table.values()):
    for shift, colour, marker, three in (
        (-0.14, plotting.BLUE, "o", values[:3]),
        (0.14, plotting.VERMILLION, "s", values[3:]),
    ):
        _ = ax.plot(three[1:], [y + shift] * 2, color=colour, lw=1.8)
        _ = ax.plot(three[0], y + shift, marker, color=colour)
_ = ax.plot([], [], "o-", color=plotting.BLUE, label="folds")
_ = ax.plot([], [], "s-", color=plotting.VERMILLION, label="val")
_ = ax.axvline(0.5, color="black", ls=":")
_ = ax.set_yticks(range(len(table)), list(table))
_ = ax.set(xlabel="AUC (no unit)", xlim=(0.38, 1))
_ = ax.invert_yaxis()
_ = ax.legend(loc="upper right", fontsize=9)
plt.show()

# %% [markdown]
# In the folds, all rows that read scores, deltas, places, grey values in the boxes or the hidden layer
# of the box head lie close together, and their intervals overlap. Then comes a jump. The row *inside
# each box* has the same detector and the same boxes, and does about as well as the maps of the whole
# image.
#
# So **what tells these images apart is in the maps, and also in that part of them which the boxes cover;
# scores and deltas do not carry it.** Nor does the hidden layer of the box head, which was trained to tell
# two kinds of lesion from the rest and keeps what serves that purpose. Other columns for the same boxes
# are the smallest change of the vector we found that brings the information back (`covidmask compare` has
# the row as `inside`). On val, that row reaches less than in the folds, and its interval is wide.
#
# Two conclusions would go too far:
#
# - *That the places of the boxes matter.* 64 boxes cover much of the image. The row below *inside each
#   box* is the control: boxes of the same sizes, at places drawn at random. It comes close, in the folds
#   and on val, and the intervals overlap widely. So most of what these boxes bring could be had anywhere
#   in the image; whether the detector's places add a little, 425 images cannot tell. (This row was added
#   after the others had been judged on val.)
# - *That lesions are what is seen there.* Look at the two grey values. In the folds brightness alone does
#   as well as the paper's vector or better, and on val it is no better than a coin. Images carry traces
#   of how they were made, and every row that looks at maps sees those, too.
#
# ## Could the layout alone do it?
#
# On COVID-CT we cannot take disease and layout apart. On phantoms we can, since we draw both. Let there be
# two journals: one prints a slice as it is, the other in a brighter window and with a frame.


# %%
def as_printed(image, journal):
    """A slice [3, H, W] as journal 0 or 1 prints it."""
    if journal == 0:
        return image
    brighter = image.clone() ** 0.8
    brighter[:, :6] = brighter[:, -6:] = 1  # a white frame
    brighter[:, :, :6] = brighter[:, :, -6:] = 1
    return brighter


# %%
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
train = few(SliceImages(root / "slices", "train"), PER_CLASS, SEED)
test = SliceImages(root / "slices", "test")
each = len(test) // len(set(test.patients))  # slices of a patient


def read_prints(slices, indices):
    """[{name: [M, numbers]}], one entry for each journal."""
    found = [defaultdict(list), defaultdict(list)]
    for i in indices:
        for journal, columns in enumerate(found):
            printed = as_printed(slices[i][0].to(device), journal)
            for name, numbers in look(printed).items():
                columns[name].append(numbers.cpu().numpy())
    return [{k: np.stack(v) for k, v in c.items()} for c in found]


# %%
known = read_prints(train, range(len(train)))
new = read_prints(test, range(0, len(test), each))  # one a patient
known_ill = np.array(train.labels) == 2  # COVID-19, or not
new_ill = np.array(test.labels)[::each] == 2
print(f"{len(known_ill)} slices to learn from, {len(new_ill)} to judge")

# %% [markdown]
# Now the papers get a habit: a slice with COVID-19 is printed by journal 1 with probability 0.9, any other
# slice with probability 0.1. A reader learns from such prints. Then we judge it three times on the same
# test patients: printed by the same habit, by no habit (0.5 for both), and by the reversed one. The
# disease is the same in all three; only the layout changes its meaning.

# %%
HABITS, DRAWS = {"as learned": 0.9, "none": 0.5, "reversed": 0.1}, 10


def printed(features, ill, habit, rng):
    """Each slice as one journal has it, {name: [M, numbers]}."""
    second = rng.random(len(ill)) < np.where(ill, habit, 1 - habit)
    one, other = features
    return {k: np.where(second[:, None], other[k], one[k]) for k in one}


def fitted(x, y):
    """A logistic regression of labels y [M] on x [M, numbers]."""
    reader = LogisticRegression(C=0.1, max_iter=5000)
    return make_pipeline(StandardScaler(), reader).fit(x, y)


# %%
reached = {name: np.zeros((3, DRAWS)) for name in known[0]}
for number in range(DRAWS):  # another draw of who prints what
    rng = np.random.default_rng(number)
    x = printed(known, known_ill, HABITS["as learned"], rng)
    readers = {name: fitted(x[name], known_ill) for name in x}
    for row, habit in enumerate(HABITS.values()):
        z = printed(new, new_ill, habit, rng)
        for name, reader in readers.items():
            shares = reader.predict_proba(z[name])
            reached[name][row, number] = auc(new_ill, shares)

# %% tags=["fold"] mystnb={"image": {"alt": "AUC of five summaries under three habits of printing: as learned, none, reversed. The maps and the two grey values fall steeply from left to right, the scores, the paper's vector and what lies inside the boxes fall little."}, "figure": {"caption": "AUC on the same test patients, printed by three habits: mean of ten draws, bars from the lowest to the highest; dotted: a coin toss. Synthetic."}}
# @title Draw what changes with the habit of printing
fig, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
HUES = "BLUE", "VERMILLION", "GREEN", "PURPLE", "ORANGE"
COLOURS = [getattr(plotting, hue) for hue in HUES]
shown = {name: values.mean(1)[-1] for name, values in reached.items()}
height = -1.0
for name in sorted(shown, key=shown.get):  # labels apart from each other
    height = shown[name] = max(shown[name], height + 0.06)
for number, (name, values) in enumerate(reached.items()):
    mean, x = values.mean(1), np.arange(3) + 0.04 * (number - 2)
    bars = [mean - values.min(1), values.max(1) - mean]
    look_of = {"color": COLOURS[number], "ls": ("-", "--", "-.", ":", "-")[number]}
    _ = ax.errorbar(x, mean, bars, marker="os^Dv"[number], capsize=3, **look_of)
    _ = ax.text(2.2, shown[name], name, va="center", fontsize=9)
    _ = ax.plot(2.16, shown[name], "os^Dv"[number], color=COLOURS[number], ms=4)
_ = ax.axhline(0.5, color="black", ls=":", lw=1)
_ = ax.set_xticks(range(3), [f"{k}\n({habit:.0%})" for k, habit in HABITS.items()])
_ = ax.set(xlabel="Habit of printing COVID-19 slices framed", ylabel="AUC (no unit)")
_ = ax.set_xlim(-0.2, 2.75)
plt.show()

# %% [markdown]
# The patients are the same in all three columns, and so is their disease. Yet the reader of the maps goes
# from nearly perfect to worse than a coin: it has learned the print. The two grey values know nothing but
# the print, and show what it alone is worth. The three summaries that go through the boxes stay within
# a few points of where they were. The frame lies outside most boxes, so what the boxes lose here is
# mostly layout. (The bars are ten draws of who prints what; other test patients would add to them.)
#
# So a jump from boxes to maps, as on COVID-CT, has two possible reasons: the maps hold more of the disease,
# or more of the layout. There, though, the row *inside each box* kept up with the whole maps, and a
# border lies outside the boxes. A window, a letter in the lungs or the blur of a print lie inside them,
# too. The experiment shows what layout can do; it does not show what it did on COVID-CT.
#
# ## Networks that start from photographs
#
# In the next table a whole network trains on the images of COVID-CT themselves: MobileNetV2, from weights of
# ImageNet. The rules are those of [chapter 12](12_side_by_side.ipynb): a budget of 9,000 images, nothing
# tuned, and the last weights judged. A system without a row was not run.
#
# <!-- side_by_side_covid_ct -->
# | system | accuracy | AUC | AUC, 95 % by patient, first seed | trained | minutes | accuracy, patients |
# |---|---|---|---|---|---|---|
# | `mobilenet_v2`, from ImageNet | 0.797 (0.780 to 0.814) | 0.904 (0.903 to 0.906) | 0.831 to 0.964 | 2,226,434 | 6.4 | 0.904 |
#
# COVID-CT, real: the 118 images of val, learned from the 425 of train; as patients count source figures. Command: `python benchmarks/side_by_side.py covid-ct --data data/covid-ct --systems mobilenet_v2 IMAGENET1K_V1`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-27; commit 9ad715e; all numbers in `results/side_by_side_covid_ct.json`.
# <!-- /side_by_side_covid_ct -->
#
# The mean AUC of `mobilenet_v2` from ImageNet on these 118 images is above that of every row that reads
# the frozen detector by a logistic regression: a classifier that starts from photographs and learns from
# 425 images of 224 figures. We have no interval of the difference, and the intervals of the rows overlap. (For their own best method the authors of the set report an accuracy of 0.89 and an AUC of
# 0.98, on the test images {cite:p}`Zhao2020dataset`.) Whether it has learned the disease or the layout,
# the table cannot say; our live experiment shows that a high number is no proof.
#
# ## From nothing to classes
#
# These commands fetch the images (some 90 MB), train two systems, judge them on val, and judge one of them on
# the published test list. `SEGMENTER_CT` comes with the package; the second command asks for its file.
#
# ```bash
# covidmask fetch covid-ct
# CT=$(python -c "from covidmask.models import ShippedWeights as Shipped
# print(Shipped.SEGMENTER_CT.path)")
# covidmask compare --preset semiseg --weights "$CT" --size 192 \
#     --data data/covid-ct --split val --systems maps mobilenet_v2 \
#     --weights-backbone IMAGENET1K_V1 --budget.epochs 20 \
#     --budget.lr 5e-3 --keep kept
# covidmask evaluate classifier --data data/covid-ct --split test \
#     --weights kept/mobilenet_v2-0.safetensors
# ```
#
# Where the images are there, the next cell does the heart of it in this notebook: a linear layer on the
# maps of `SEGMENTER_CT`, judged on val. (Expect an AUC near that of the row of the maps, not the same:
# `LinearReader` shrinks its weights less.)

# %%
real = Path(COVID_CT).is_dir()
if not real:
    print("No real images here yet. Run `covidmask fetch covid-ct`")
    print("in a terminal, and then this cell again.")
else:
    drawn_alone = ShippedWeights.SEGMENTER_CT.load()
    learn = open_slices(COVID_CT, "train")
    val = open_slices(COVID_CT, "val")
    features = PooledMaps(drawn_alone)
    model = LinearReader(features, learn.classes).eval()
    seen = [features([learn[i][0]]) for i in range(len(learn))]
    model.fit(torch.cat(seen), learn.labels)
    logits = [model([val[i][0]]) for i in range(len(val))]
    found = judge(torch.cat(logits).detach(), val)
    low, high = found["auc_interval"]
    print(f"AUC {found['auc']:.3f} ({low:.3f} to {high:.3f}),")
    print(f"on {len(val)} real images")

# %% tags=["fold"] mystnb={"image": {"alt": "A real image of the reader's own copy with the lesions that SEGMENTER_CT finds."}, "figure": {"caption": "Lesions that `SEGMENTER_CT` finds in a training image. Drawn in your own copy only."}}
# @title Draw the lesions found in a real figure (in your own copy, with SHOW = True)
if real and SHOW:
    picture = learn[0][0]
    with torch.no_grad():
        _ = plotting.show_lesions(picture[0], drawn_alone([picture])[0])
    plt.show()
else:
    print("No real figure is drawn here: fetch the images and set SHOW = True.")

# %% [markdown]
# ## What this chapter does not show
#
# - **That a number on COVID-CT is a number on patients.** The figures were chosen, and the two classes
#   come from different sources.
# - **That ranked boxes fail on real CT.** `SEGMENTER_CT` has never seen a real slice, and it stayed frozen.
#   The paper's detector learned from real slices of the source that it then classified.
# - **What the three classes of the paper would show.** Here there are two, and others.
# - **A final test.** The test list has not been read for any of these numbers.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. What does the class NonCOVID of COVID-CT hold?**
#
# - [ ] Healthy lungs, as the paper's controls. :: Some are normal, most are not.
# - [ ] Common pneumonia alone. :: That would be one of the paper's three classes.
# - [x] Other diseases, tumours and some normal lungs. :: So the task is another one than the paper's.
#
# **2. Why do folds keep the panels of one figure together?**
#
# - [x] They are nearly the same image, so a reader could know the answer by heart. :: They share patient, window and layout.
# - [ ] Otherwise the classes would not have the same size. :: Folds by figure make that harder, if anything.
# - [ ] Because the license asks for it. :: It is a matter of honest numbers.
#
# **3. *Inside each box* does much better than the paper's vector. What differs?**
#
# - [ ] It has better boxes. :: The boxes are the same.
# - [x] What is kept of each box: channels of the maps instead of score and deltas. :: Same look, same boxes, other columns.
# - [ ] It was trained on COVID-CT. :: The detector is frozen in both.
#
# **4. Two grey values reach a fair AUC in the folds and about a coin's on val. What do you conclude?**
#
# - [ ] COVID-19 changes the brightness of lungs, as the folds prove. :: The folds show a difference, and not where it comes from.
# - [ ] The folds were computed wrongly. :: They keep figures together, as they should.
# - [x] Brightness may tell sources apart; val does not confirm it. :: Two figures of one paper may share a window; and val is small.
#
# **5. In our experiment the maps fall below 0.5 under the reversed habit. Why below?**
#
# - [ ] Too few test slices; by chance it may be any number. :: The bars of ten draws lie far from it.
# - [x] The reader trusts the print, and now the print points the wrong way. :: A reader that had ignored it would stay where it was.
# - [ ] The detector no longer sees lesions when the image is brighter. :: Then it would fall to 0.5, and the boxes would suffer, too.
#
# **6. What would tell disease from layout on real images?**
#
# - [x] Test images of both classes from one source, processed alike. :: Then the layout cannot tell the class.
# - [ ] A larger network. :: It would find the layout, too.
# - [ ] A higher AUC on val. :: Val comes from the same sources.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · AUC by counting
#
# Kind: write a function, *
#
# The AUC is the share of pairs, one image of each class, in which the image of class 1 has the higher
# score; a tie counts one half. Write `auc_by_pairs(labels, scores)` for NumPy arrays [M], with labels 0
# and 1.
#
# Hint: `scores[labels == 1][:, None] - scores[labels == 0]` has a row and a column for each pair.


# %% tags=["starter"]
def auc_by_pairs(labels, scores):
    raise NotImplementedError("count pairs")


# %% tags=["solution"]
# @title Solution
def auc_by_pairs(labels, scores):
    gaps = scores[labels == 1][:, None] - scores[labels == 0]
    return float(((gaps > 0) + 0.5 * (gaps == 0)).mean())


shares = readers["maps"].predict_proba(z["maps"])
print(f"the last reader of the maps: {auc_by_pairs(new_ill, shares[:, 1]):.3f}")


# %% tags=["wrong"]
def auc_by_pairs(labels, scores):
    gaps = scores[labels == 1][:, None] - scores[labels == 0]
    return float((gaps > 0).mean())


# %% tags=["wrong"]
def auc_by_pairs(labels, scores):
    return float(((scores > 0.5) == labels).mean())


# %% tags=["check"]
# @title Check your answer
truth, marks = np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.6, 0.4])
both = np.stack([1 - marks, marks], 1)
message = "four pairs: two won, one lost, one tie; how much does the tie count?"
assert abs(auc_by_pairs(truth, marks) - auc(truth, both)) < 1e-9, message
assert auc_by_pairs(truth, np.zeros(4)) == 0.5, "all scores equal: a coin toss"
print("Right, as in the package.")

# %% [markdown] tags=["answer"]
# The AUC asks only for the order of the images. That is why it needs no threshold, and why it says
# nothing about whether the probabilities are right.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Which figure is it from?
#
# Kind: write a function, **
#
# Panels of one figure have names such as `paper-p6-52%0.png` and `paper-p6-52%1.png`, or `paper-p6-64-1.png`
# and `paper-p6-64-2.png`: the paper, the page, the number of the figure, the panel. Write
# `figure_of(name)`, which returns the name without panel and suffix.
#
# Hint: cut the suffix, then all from `%` on, then a last `-1` behind `-p6-64`; `re.sub` can do the third.


# %% tags=["starter"]
def figure_of(name):
    raise NotImplementedError("the figure, without its panel")


# %% tags=["solution"]
# @title Solution
import re


def figure_of(name):
    stem = name.rpartition(".")[0].partition("%")[0]
    return re.sub(r"(-p\d+-\d+)-\d+$", r"\1", stem)


names = ["paper-p6-52%0.png", "paper-p6-52%1.png", "paper-p6-64-1.png"]
print([figure_of(name) for name in names])


# %% tags=["wrong"]
def figure_of(name):
    return name.rpartition(".")[0]


# %% tags=["wrong"]
def figure_of(name):
    return name.partition("-")[0]


# %% tags=["check"]
# @title Check your answer
for a, b, same in (
    ("x.1-p6-52%0.png", "x.1-p6-52%1.png", True),
    ("x.1-p6-64-1.png", "x.1-p6-64-2.png", True),
    ("x.1-p6-64-1.png", "x.1-p7-64-1.png", False),
    ("x.1-p6-52%0.png", "x.1-p6-53%0.png", False),
):
    message = f"{a} and {b} are {'two panels of one figure' if same else 'two figures'}"
    assert (figure_of(a) == figure_of(b)) == same, message
name = "2020.01-p12-3%2.jpg"
message = "keep all of the figure's own name, the paper and the page, too"
assert figure_of(name) == SliceEntry(name, 0, None).patient, message
print("Right, as the package reads them.")

# %% [markdown] tags=["answer"]
# The package calls it `patient`, since it stands where the patient stands elsewhere. It is a stopgap: two
# figures of one paper may show the same patient, and we would not know.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Folds that leak
#
# Kind: find the bug, **
#
# `folds` is meant to divide images into parts so that no figure is in two of them. Find the mistake and
# repair it. `figures` is an array [M] with the figure of each image.
#
# Hint: what must stay together, and does the code know of it?


# %% tags=["starter"]
def folds(figures, number=3):
    """Pairs (train, test) of positions; no figure may be in both."""
    cut = KFold(number, shuffle=True, random_state=0)
    return list(cut.split(figures))


# %% tags=["solution"]
# @title Solution
def folds(figures, number=3):
    """Pairs (train, test) of positions; no figure may be in both."""
    return list(GroupKFold(number).split(figures, groups=figures))


for learn_from, judge_on in folds(np.repeat(np.arange(6), 2)):
    print(f"{len(learn_from)} to learn from, {len(judge_on)} to judge")


# %% tags=["wrong"]
def folds(figures, number=3):
    parts = np.array_split(np.arange(len(figures)), number)  # not shuffled
    everything = np.arange(len(figures))
    return [(np.setdiff1d(everything, part), part) for part in parts]


# %% tags=["check"]
# @title Check your answer
some = np.array(list("abcabcddeeff"))
pairs = folds(some)
judged = np.sort(np.concatenate([part for _, part in pairs]))
assert (judged == np.arange(len(some))).all(), "each image is judged once"
for learn_from, judge_on in pairs:
    shared = set(some[learn_from]) & set(some[judge_on])
    assert not shared, f"figures in both parts: {', '.join(sorted(shared))}"
print("Right: no figure is in two parts.")

# %% [markdown] tags=["answer"]
# Neither shuffling nor the order of the list protects you: the panels of a figure need not stand next to
# each other. `covidmask.training.compare.folds_of` also keeps the classes in proportion.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · A reader that sees the frame alone
#
# Kind: pencil, **
#
# Imagine a reader that only sees whether there is a frame, and says 1 if so and 0 if not. A slice with
# COVID-19 has a frame with probability $q$, any other with $1 - q$. What is its AUC on many slices? Write
# it as `auc_of_frame(q)`, and compare with the two grey values in the figure.
#
# Hint: of a pair, one of each class, how often does the first win, and how often is it a tie?


# %% tags=["starter"]
def auc_of_frame(q):
    raise NotImplementedError("wins, and half the ties")


# %% tags=["solution"]
# @title Solution
def auc_of_frame(q):
    wins = q * q  # framed, and the other one is not
    ties = 2 * q * (1 - q)  # both framed, or both not
    return wins + ties / 2


for name, row in zip(HABITS, reached["two greys"].mean(1), strict=True):
    alone = auc_of_frame(HABITS[name])
    print(f"{name:10} frame alone {alone:.2f}, two greys {row:.2f}")


# %% tags=["wrong"]
def auc_of_frame(q):
    return q * q


# %% tags=["wrong"]
def auc_of_frame(q):
    return q * q + (1 - q) * (1 - q)


# %% tags=["check"]
# @title Check your answer
rng = np.random.default_rng(0)
for q in (0.9, 0.5, 0.2):
    truth = np.repeat([0, 1], 4000)
    frame = (rng.random(8000) < np.where(truth == 1, q, 1 - q)).astype(float)
    drawn = auc(truth, np.stack([1 - frame, frame], 1))
    message = f"8,000 drawn slices with q = {q} have another AUC; mind the ties"
    assert abs(auc_of_frame(q) - drawn) < 0.03, message
print("Right, as 8,000 drawn slices confirm.")

# %% [markdown] tags=["answer"]
# It is just $q$. So a habit of 90 % is worth an AUC of 0.9 to a reader that knows nothing of medicine,
# more than scores and deltas reach with the disease in view.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · A weaker habit
#
# Kind: predict, then run, **
#
# In the training prints, let COVID-19 slices be framed with probability 0.6 instead of 0.9. Predict: what
# do the maps then reach under the reversed habit of 0.1? Run it with `printed`, `fitted` and `auc`, for
# 0.5, 0.6, 0.7, 0.8 and 0.9.
#
# Hint: train on `printed(known, known_ill, q, rng)["maps"]`.

# %% tags=["solution"]
# @title Solution
for q in (0.5, 0.6, 0.7, 0.8, 0.9):
    values = []
    for number in range(5):
        rng = np.random.default_rng(number)
        x = printed(known, known_ill, q, rng)["maps"]
        z = printed(new, new_ill, 0.1, rng)["maps"]
        values.append(auc(new_ill, fitted(x, known_ill).predict_proba(z)))
    print(f"habit {q}: {np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")

# %% [markdown] tags=["answer"]
# When we ran it, with a habit of 0.6 the maps lost little, with 0.8 most of what they had gained
# over a coin, and with 0.9 they fell below it. Without any habit (0.5) the reader had no reason to look at
# the print. A weak habit is easy to miss, and still costs something.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · Tidy up first
#
# Kind: experiment, ***
#
# Can one take the layout away before anything reads the image? Write `tidy(image)` for an image [3, H, W]:
# cut off the outer 6 pixels, and change the grey values so that it no longer matters in which window it
# was printed. Then read the maps of tidy prints and judge them under the reversed habit.
#
# Hint: a power of the grey values keeps their order, and so does any window that is not clipped. What
# stays the same if you replace each grey value by its rank, from 0 to 1?


# %% tags=["starter"]
def tidy(image):
    raise NotImplementedError("cut the frame, undo the window")


# %% tags=["solution"]
# @title Solution
def tidy(image):
    inner = image[0, 6:-6, 6:-6]
    _, rank = inner.flatten().unique(return_inverse=True)  # equal greys share a rank
    ranked = rank.reshape(inner.shape) / rank.max()
    return ranked[None].repeat(3, 1, 1).to(image)


pooled, tidied = PooledMaps(detector), []
for slices, indices in ((train, range(len(train))), (test, range(0, len(test), each))):
    part = []
    for journal in (0, 1):
        prints = [as_printed(slices[i][0].to(device), journal) for i in indices]
        rows = torch.cat([pooled([tidy(x)]) for x in prints])
        part.append({"maps": rows.cpu().numpy()})
    tidied.append(part)
values = []
for number in range(5):
    rng = np.random.default_rng(number)
    x = printed(tidied[0], known_ill, 0.9, rng)["maps"]
    z = printed(tidied[1], new_ill, 0.1, rng)["maps"]
    values.append(auc(new_ill, fitted(x, known_ill).predict_proba(z)))
print(f"maps of tidy prints, reversed habit: {min(values):.2f} to {max(values):.2f}")


# %% tags=["wrong"]
def tidy(image):
    return image[:, 6:-6, 6:-6]


# %% tags=["wrong"]
def tidy(image):
    return (image - image.mean()) / image.std()


# %% tags=["check"]
# @title Check your answer
original = test[0][0]
first, second = (tidy(as_printed(original, journal)) for journal in (0, 1))
assert first.shape[0] == 3 and first.ndim == 3, "return an image [3, H, W]"
assert first.std() > 0.05, "something of the image must be left"
left = (first - second).abs().mean() / first.std()
message = "the two prints of one slice still differ: is the frame gone, is the window?"
assert left < 0.05, message
print("Right: both journals' prints are the same now.")

# %% [markdown] tags=["answer"]
# Where you know what the layout does, you can undo it: when we ran it, the maps of tidy prints reached
# about what they reach on plain slices, whatever the habit. On real figures you would have to know all that
# differs. Cutting to the lungs and one window for all images are good first steps.

# %% [markdown]
# ## What we learned
#
# 1. A set of figures is no set of patients; know what its classes are before you train.
# 2. On COVID-CT scores and deltas keep little of what the maps hold, even inside the same boxes.
# 3. Two grey values can look like a finding: ask first how far brightness alone would get you.
# 4. Where we control the layout, readers of whole maps follow it, and boxes shield from much of it.
# 5. A network from ImageNet has the higher AUC on COVID-CT; we have no interval of the difference, and no
#    table says whether it sees the disease.
#
# ## Further reading
#
# {cite:t}`Zhao2020dataset` describe the set. {cite:t}`DeGrave2021` show networks for chest radiographs that
# follow the source of an image instead of the disease, and {cite:t}`Roberts2021` how common that is.
