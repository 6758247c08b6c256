# %% [markdown]
# # 12 · Side by side
#
# So far this book has compared the method with itself. Its idea is that a list of ranked boxes says
# what disease a slice shows, and the paper reports that this does better than some ordinary
# classifiers, after training on little data. In this chapter the others join in, all on the same
# slices. **Do ranked boxes beat an ordinary classifier, or segmenting first and classifying then?**

# %% tags=["fold"] mystnb={"image": {"alt": "Three panels of one synthetic slice. Left: the slice with its detections. Middle: one channel of a feature map, brightest where lesions are. Right: the scores of the ranked boxes, falling from left to right."}, "figure": {"caption": "Our old friend, looked at once: what the detector finds (left), the channel of its feature map that answers most to lesions (middle), and all that a list of scores keeps (right). Synthetic."}}
# @title Import, print versions, and draw one look at a slice
import os
from collections import defaultdict
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import adaptive_max_pool2d

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import SliceImages, old_friend, write_phantoms
from covidmask.metrics import bootstrap, wilson
from covidmask.models import propose, trained_segmenter
from covidmask.models.detector import lesion_maps
from covidmask.models.ranked_boxes import ranked_boxes
from covidmask.models.systems import LesionAreas, LinearReader, PooledMaps
from covidmask.training.compare import few

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")


def show_one_look(quick):
    """Detections, a feature map and scores of our old friend."""
    detector = trained_segmenter("quick", device, shipped=True).eval()
    friend, mask = old_friend(quick.phantoms.size)
    image = torch.from_numpy(friend).expand(3, -1, -1).to(device)
    with torch.no_grad():
        maps = propose(detector, [image])[0]
        rows = ranked_boxes(detector, [image], quick.classifier)[0].cpu()
        found = {key: value.cpu() for key, value in detector([image])[0].items()}
    finest = next(iter(maps.values()))[0].cpu()  # [channels, H/8, W/8]
    lesion = torch.from_numpy(mask >= 2).float()[None]  # [1, H, W]
    lesion = adaptive_max_pool2d(lesion, finest.shape[1:])[0] > 0
    gap = finest[:, lesion].mean(1) - finest[:, ~lesion].mean(1)
    channel = int((gap / finest.std((1, 2))).argmax())  # brightest there
    _, axes = plt.subplots(1, 3, figsize=(9, 3.1), layout="constrained")
    sure = found.pop("scores") > 0.5
    found = {key: found[key][sure] for key in ("boxes", "labels", "masks")}
    plotting.show_lesions(friend, found, axes[0])
    axes[0].set_title("detections", fontsize=10)
    axes[1].imshow(finest[channel], cmap="cividis")
    axes[1].set_axis_off()
    axes[1].set_title(f"map channel {channel} of {len(finest)}", fontsize=10)
    axes[2].bar(range(1, len(rows) + 1), rows[:, 0], color=plotting.BLUE)
    axes[2].set(xlabel="Rank of the box", ylabel="Score (no unit)", ylim=(0, 1))
    axes[2].set_title("scores", fontsize=10)


show_one_look(PRESETS["quick"])
plt.show()

# %% [markdown]
# **After it you can**
#
# - let one classifier read several summaries of the same slice, and say what each of them holds;
# - state the rules of a fair comparison before anything runs, and read a table made by them;
# - check a claim about "little data" with a curve, and one about "better" with an interval.
#
# **You need** [chapter 6](06_ranked_boxes.ipynb) (ranked boxes), [chapter
# 7](07_covid_ct_mask_net.ipynb) (the module $S$) and [chapter 10](10_evaluation.ipynb) (intervals).
# **Time:** reading 25 min, exercises 40 min, running 3 min.
#
# ```{admonition} Synthetic data
# :class: important
# All slices here are *phantoms*, drawn by formulas and random numbers; only the table from the paper
# is about patients. Nothing here is for diagnosis. [Chapter 16](16_real_classes.ipynb) asks the same
# of real images.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")
PER_CLASS = 100  # training slices
EVERY = 2  # judge every second test slice

# %% [markdown]
# ## One look, four summaries
#
# When a detector looks at a slice, it first computes *feature maps*: for each place in the slice a few
# dozen numbers that say what it looks like there. Boxes, scores and masks are all made of these maps.
# So we can hand the same look on in several forms:
#
# | summary | numbers | what it knows |
# |---|---|---|
# | *scores* | $N$ | how sure the detector is of each box |
# | *ranked boxes* | $5N$ | the same, and how each box was moved from its proposal: the paper's vector |
# | *areas* | 6 | of each kind of lesion: how many are found, how sure the pixels are on the mean, and the share of the slice that is covered |
# | *maps* | $2c$ | mean and maximum of each of the $c$ map channels, and no box at all |
#
# *Areas* is what people mean by "segment, then classify": the lesions are drawn first, and a classifier
# reads their sizes. (With several levels of maps, *maps* has $2c$ numbers for each.)

# %%
preset = PRESETS[PRESET]
detector = trained_segmenter(PRESET, device, shipped=True).eval()
channels = detector.backbone.out_channels  # c


def areas_of(image):
    """Count, mean and share of each lesion class in a slice [3, H, W]."""
    found = detector([image])[0]
    sure = found["labels"][found["scores"] > 0.5]
    counts = torch.bincount(sure - 1, minlength=2)  # GGO, C
    pixels = lesion_maps(found, 2)  # [2, H, W], how sure at each pixel
    mean, share = pixels.mean((1, 2)), (pixels > 0.5).float().mean((1, 2))
    return torch.cat([counts, mean, share])


# %%
@torch.no_grad()
def look(image):
    """One look at a slice [3, H, W], in four forms."""
    rows = ranked_boxes(detector, [image], preset.classifier)[0]  # [N, 5]
    maps = propose(detector, [image])[0].values()
    pooled = []
    for m in maps:  # [1, channels, h, w]
        if m.shape[1] == channels:  # not the image itself
            pooled += [m[0].mean((1, 2)), m[0].amax((1, 2))]
    return {
        "scores": rows[:, 0],
        "ranked boxes": rows.flatten(),
        "areas": areas_of(image),
        "maps": torch.cat(pooled),
    }


# %% [markdown]
# ## The same reader for all
#
# To compare summaries, everything else must stay the same: the frozen detector, the slices, and
# whatever reads the summary. Our reader is a logistic regression, the plainest classifier there is, so
# no summary wins because something cleverer reads it. It learns from 100 slices of each class; neither
# it nor the detector has met the test patients.

# %%
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
train = few(SliceImages(root / "slices", "train"), PER_CLASS, SEED)
test = SliceImages(root / "slices", "test")
chosen = range(0, len(test), EVERY)


def read_all(slices, indices):
    """{name: [M, numbers]} of some slices."""
    columns = defaultdict(list)
    for i in indices:
        for name, numbers in look(slices[i][0].to(device)).items():
            columns[name].append(numbers.cpu().numpy())
    return {name: np.stack(column) for name, column in columns.items()}


known, new = read_all(train, range(len(train))), read_all(test, chosen)
learned = np.array(train.labels)
labels = np.array([test.labels[i] for i in chosen])
patients = np.array([test.patients[i] for i in chosen])

# %% tags=["nbval-check-output"]
print(f"{len(learned)} slices to learn from, {len(labels)} to judge,")
print(f"of {len(set(patients))} patients")
for name, numbers in known.items():
    print(f"{name:13} {numbers.shape[1]:4} numbers")


# %%
def fitted(x, y):
    """The reader, fitted to x [M, numbers] with labels y [M]."""
    reader = LogisticRegression(C=0.1, max_iter=5000)
    return make_pipeline(StandardScaler(), reader).fit(x, y)


right = {}
for name, x in known.items():
    predicted = fitted(x, learned).predict(new[name])
    right[name] = (predicted == labels).astype(float)
    print(f"{name:13} {right[name].mean():.0%} of the slices right")

# %% [markdown]
# How much could these numbers change with other test patients? As in [chapter
# 10](10_evaluation.ipynb), we draw *patients* with replacement. To compare two readers we take their
# **difference on the same slices**, since what is hard for both cancels there.

# %%
slices_of = [np.flatnonzero(patients == p) for p in np.unique(patients)]


def over_patients(values):
    """95 % of the mean of `values` [M], drawing patients."""

    def mean(drawn):
        return np.concatenate([values[slices_of[p]] for p in drawn]).mean()

    return bootstrap(len(slices_of), mean, repeats=1000)


for name in ("scores", "areas", "maps"):
    low, high = over_patients(right[name] - right["ranked boxes"])
    print(f"{name:6} minus ranked boxes: {low:+.2f} to {high:+.2f}")

# %% tags=["fold"] mystnb={"image": {"alt": "Points with bars: the share of slices that the reader of the scores, of the ranked boxes, of the areas and of the maps has right, each with its interval, beside a line for chance at one third."}, "figure": {"caption": "Four readers of one look, with 95 % intervals over patients. Dotted: what guessing reaches. Synthetic."}}
# @title Draw the four readers with their intervals
fig, ax = plt.subplots(figsize=(6, 2.4), layout="constrained")
for y, values in enumerate(right.values()):
    _ = ax.plot(over_patients(values), [y, y], color=plotting.BLUE, lw=2)
    _ = ax.plot(values.mean(), y, "o", color=plotting.BLUE)
_ = ax.axvline(1 / 3, color="black", ls=":")
_ = ax.set_yticks(range(len(right)), list(right))
_ = ax.set(xlabel="Share of slices right (no unit)", xlim=(0.25, 1))
_ = ax.invert_yaxis()
plt.show()

# %% [markdown]
# A difference whose interval lies above 0 says that the other summary is ahead of the paper's vector, for
# this reader and these training slices. One whose interval contains 0 leaves it open.
#
# The package has these summaries, too, and a linear layer behind them; its features are ours.

# %% tags=["nbval-check-output"]
image = test[0][0].to(device)
for name, kind in (("maps", PooledMaps), ("areas", LesionAreas)):
    system = LinearReader(kind(detector), IMAGE_CLASSES).eval()
    theirs = system.features([image])[0].cpu().numpy()
    assert np.allclose(theirs, new[name][0], atol=1e-5), name
    print(f"{name}: {len(theirs)} numbers, the same as by hand")

# %% [markdown]
# ## How much data?
#
# The paper trains its classifier on 3,000 slices, where COVIDNet-CT takes 60,000. The idea is that the
# detector has already learned what lesions look like, so little is left to learn. We can test that: from
# our 100 slices of each class we draw 5, 10, 20 or 50, ten times each, and let every reader learn from
# the same draws.

# %%
SIZES, DRAWS = (5, 10, 20, 50), 10


def draw(per_class, number):
    """Positions of some slices of each class; `number`: of the draw."""
    rng = np.random.default_rng((per_class, number))
    classes = [np.flatnonzero(learned == k) for k in range(3)]
    picked = [rng.choice(p, per_class, replace=False) for p in classes]
    return np.concatenate(picked)


live = {name: np.zeros((len(SIZES), DRAWS)) for name in known}
for row, per_class in enumerate(SIZES):
    for number in range(DRAWS):
        some = draw(per_class, number)
        for name, x in known.items():
            reader = fitted(x[some], learned[some])
            share = reader.score(new[name], labels)
            live[name][row, number] = share

# %% tags=["fold"] mystnb={"image": {"alt": "Four curves of the share of slices right over 5, 10, 20 and 50 training slices of each class, with bars for the spread over ten draws and a dotted line for chance."}, "figure": {"caption": "Share of the test slices right, over training slices of each class: mean of ten draws, bars from the lowest to the highest. Synthetic."}}
# @title Draw the four live curves
LOOKS = (
    (plotting.BLUE, "-", "o"),
    (plotting.VERMILLION, "--", "s"),
    (plotting.GREEN, "-.", "^"),
    (plotting.ORANGE, ":", "D"),
)
fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for number, (name, values) in enumerate(live.items()):
    colour, line, marker = LOOKS[number]
    mean = values.mean(1)
    _ = ax.errorbar(
        np.array(SIZES) * (0.955 + 0.03 * number),  # apart
        mean,
        [mean - values.min(1), values.max(1) - mean],
        color=colour,
        ls=line,
        marker=marker,
        capsize=3,
        label=name,
    )
_ = ax.axhline(1 / 3, color="black", ls=":", lw=1)
_ = ax.set(xscale="log", xlabel="Training slices of each class")
_ = ax.set_ylabel("Share right (no unit)")
_ = ax.set_xticks(SIZES, list(map(str, SIZES)))
_ = ax.minorticks_off()
_ = ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# So the look of a detector is a good thing to learn from: in the run shown here, ten slices of each class
# are enough for the scores or the areas to get about two thirds of the test slices right, where guessing
# gets one third. In that sense the paper has a point. But with this reader and so few slices it is not
# the vector that makes it so. Its mean is the lowest of the four at every size, although it contains the
# scores.
#
# Length alone is not the reason, as the maps are nearly as long. One explanation that fits: the deltas
# say how a box was moved from its proposal, which has little to do with the class ([chapter
# 11](11_what_makes_it_work.ipynb) tries $S$ on deltas alone), so a reader must first learn to leave four
# numbers out of five nearly alone. (The bars show how ten draws of training slices differ; other test
# patients would differ, too.)
#
# ## Every system under one budget
#
# Others train a whole network on the images. To put all into one table we need rules, and these have
# to be stated before anything runs:
#
# - **The same slices.** Each seed draws its training slices once, and all systems get them. The test
#   slices are the same 603, of 201 patients.
# - **One budget.** A network that trains on images is shown 9,000 of them in all, however few distinct
#   ones there are, in batches of 16, at a rate that falls along half a cosine. Linear layers on frozen
#   features are fitted to the end. $S$ on ranked boxes costs next to nothing and is shown 60,000 rows.
# - **No system is tuned**, and no epoch is chosen: the weights after the last step are judged.
# - **The detector is given.** Its lesion masks are extra knowledge, which an ordinary classifier does
#   not get. That is the idea of the method.
#
# | name | what it is |
# |---|---|
# | `heads`, `heads_bn`, `full` | the paper's vector and $S$, in the three regimes of [chapter 8](08_three_regimes.ipynb) |
# | `scores` | as `heads`, but $S$ reads the scores alone |
# | `mask`, `faster` | as `heads`, on a detector that is trained here, with and without masks |
# | `maps`, `areas` | a linear layer on two of our summaries |
# | `inside` | a linear layer on the largest value of each map channel inside the ranked boxes |
# | `unet`, `fcn` | a network that segments lesions, then a linear layer on their areas |
# | `jcs` | one network that does both at once, in the manner of {cite:t}`Wu2020` |
# | `covnet` | all slices of a patient at once, in the manner of {cite:t}`Li2020` |
# | `resnet18`, `mobilenet_v2`, ... | ordinary classifiers, from random weights unless the table says ImageNet |
#
# *AUC*, the area under the ROC curve, asks for the order only. Take all pairs of a slice of one class and a
# slice of the others: the AUC is the share of pairs in which the first gets the higher probability, so 0.5
# is a coin toss and 1 is no error. Here it is the mean over the classes, each against the others. *Dice,
# infection* is the overlap of the lesion pixels that a system draws with the true ones ([chapter
# 15](15_real_lesions.ipynb)), where it draws any. *Above `heads`* is the difference in accuracy on the same
# slices. *Accuracy, patients* takes
# the mean of the probabilities over all slices of a patient, and *trained* counts the parameters that were
# fitted here, without those of a given detector. A system without a row was not run.
#
# <!-- side_by_side_phantoms -->
# | system | accuracy | above `heads`, 95 % by patient | AUC | AUC, 95 % by patient, first seed | trained | minutes | accuracy, patients | Dice, infection |
# |---|---|---|---|---|---|---|---|---|
# | `mobilenet_v2`, from ImageNet | 0.834 (one seed) | +0.156 (+0.111 to +0.202) | 0.955 (one seed) | 0.940 to 0.968 | 2,227,715 | 3.0 | 0.881 |  |
# | `resnet18` | 0.768 (one seed) | +0.090 (+0.041 to +0.139) | 0.919 (one seed) | 0.899 to 0.936 | 11,178,051 | 6.4 | 0.831 |  |
# | `inside` | 0.773 (one seed) | +0.095 (+0.051 to +0.138) | 0.906 (one seed) | 0.882 to 0.927 | 195 | 0.3 | 0.826 |  |
# | `maps` | 0.745 (one seed) | +0.066 (+0.015 to +0.113) | 0.903 (one seed) | 0.879 to 0.925 | 387 | 0.2 | 0.811 |  |
# | `areas` | 0.756 (one seed) | +0.078 (+0.036 to +0.119) | 0.898 (one seed) | 0.877 to 0.921 | 21 | 0.9 | 0.861 | 0.686 |
# | `scores` | 0.753 (one seed) | +0.075 (+0.035 to +0.116) | 0.893 (one seed) | 0.867 to 0.918 | 75,011 | 0.3 | 0.861 |  |
# | `heads` | 0.678 (one seed) |  | 0.839 (one seed) | 0.811 to 0.865 | 107,779 | 0.3 | 0.761 |  |
#
# Phantoms, 300 training slices of each class, mean of the seeds and their range. Minutes are those of a core. Command: `python benchmarks/side_by_side.py phantoms --systems scores heads areas maps resnet18 mobilenet_v2 IMAGENET1K_V1 and python benchmarks/side_by_side.py phantoms --systems scores heads maps inside resnet18 and python benchmarks/side_by_side.py phantoms --no-curve --systems resnet18 heads_bn full faster mobilenet_v2 IMAGENET1K_V1 covnet+resnet18 jcs unet and python benchmarks/side_by_side.py phantoms --systems scores heads areas maps inside mobilenet_v2 IMAGENET1K_V1 and python benchmarks/side_by_side.py phantoms --systems mobilenet_v2 IMAGENET1K_V1`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132 and 2.14.1+cu130; 2026-11-27; commit 83fe655 and 25f9c58 and 9ad715e and 1556a6a; all numbers in `results/side_by_side_phantoms.json`.
# <!-- /side_by_side_phantoms -->
#
# On your own slices one command makes such a table, with a budget in epochs:
#
# ```bash
# covidmask compare --data DIR --per-class 300 --seeds 0 1 2 \
#     --systems heads scores areas maps inside resnet18
# ```
#
# The next figure has the accuracy of some systems over the number of training slices, as far as that was
# measured. A system that is ahead on the left gets by with little data; one whose line still rises on
# the right would gain from more.

# %% tags=["fold"] mystnb={"image": {"alt": "Accuracy of systems on phantoms over the training slices of each class, on a logarithmic axis, with a dot for each seed, a bar for its interval and a line through the means; on the left systems that read the frozen detector, on the right networks that train on images; a dotted line marks chance."}, "figure": {"caption": "Accuracy on 603 test slices, over the training slices of each class. A dot is a seed, a bar the 95 % interval of the first seed over patients, a line joins the means; dotted: chance. Synthetic."}}
# @title Draw accuracy over training slices, from results/side_by_side_phantoms.json
interval = {}  # (system, training slices of each class): 95 % of the accuracy
curve = {}  # system: {training slices of each class: accuracy of each seed}
# curve
trained = {  # system: parameters trained, mean accuracy
    "scores": (75011, 0.753),
    "heads": (107779, 0.678),
    "areas": (21, 0.756),
    "maps": (387, 0.745),
    "inside": (195, 0.773),
    "resnet18": (11178051, 0.768),
    "mobilenet_v2 IMAGENET1K_V1": (2227715, 0.834),
}
curve = {
    "scores": {
        30: [0.720],
        100: [0.760],
        300: [0.753],
        1000: [0.746],
    },
    "heads": {
        30: [0.547],
        100: [0.619],
        300: [0.678],
        1000: [0.705],
    },
    "areas": {
        30: [0.700],
        100: [0.761],
        300: [0.756],
        1000: [0.758],
    },
    "maps": {
        30: [0.687],
        100: [0.716],
        300: [0.745],
        1000: [0.778],
    },
    "inside": {
        30: [0.711],
        100: [0.708],
        300: [0.773],
        1000: [0.811],
    },
    "resnet18": {
        300: [0.768],
    },
    "mobilenet_v2 IMAGENET1K_V1": {
        30: [0.577],
        300: [0.834],
    },
}
interval = {  # the same: 95 % over patients, of the first seed
    ("scores", 30): (0.681, 0.765),
    ("heads", 30): (0.502, 0.590),
    ("areas", 30): (0.654, 0.743),
    ("maps", 30): (0.640, 0.730),
    ("inside", 30): (0.670, 0.748),
    ("mobilenet_v2 IMAGENET1K_V1", 30): (0.530, 0.628),
    ("scores", 100): (0.723, 0.797),
    ("heads", 100): (0.577, 0.661),
    ("areas", 100): (0.720, 0.803),
    ("maps", 100): (0.672, 0.758),
    ("inside", 100): (0.662, 0.745),
    ("scores", 300): (0.715, 0.794),
    ("heads", 300): (0.638, 0.719),
    ("areas", 300): (0.716, 0.797),
    ("maps", 300): (0.701, 0.784),
    ("inside", 300): (0.735, 0.811),
    ("resnet18", 300): (0.725, 0.804),
    ("mobilenet_v2 IMAGENET1K_V1", 300): (0.796, 0.871),
    ("scores", 1000): (0.706, 0.790),
    ("heads", 1000): (0.667, 0.743),
    ("areas", 1000): (0.721, 0.796),
    ("maps", 1000): (0.741, 0.818),
    ("inside", 1000): (0.773, 0.849),
}
# end of curve
if not curve:
    curve = {name: {300: [accuracy]} for name, (_, accuracy) in trained.items()}
FROZEN = ("scores", "heads", "areas", "maps", "inside")
STYLES = (
    (plotting.BLUE, "-", "o"),
    (plotting.VERMILLION, "--", "s"),
    (plotting.GREEN, "-.", "^"),
    (plotting.PURPLE, ":", "D"),
    (plotting.ORANGE, "-", "v"),
    (plotting.SKY_BLUE, "--", "P"),
    (plotting.BLACK, "-.", "X"),
)


def spread_out(heights, least):
    """Heights of labels, moved apart to at least `least`, in the same order."""
    order, placed = np.argsort(heights), np.array(heights, dtype=float)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + least)
    return placed - (placed - heights).mean()


def draw_curve(ax, names, ends):
    """Dots of the seeds, a line through their means, and a name at the right."""
    last = []
    for name, (colour, line, marker) in zip(names, STYLES, strict=False):
        sizes = sorted(curve[name])
        for size in sizes:
            seeds = curve[name][size]
            x = [size] * len(seeds)
            _ = ax.plot(x, seeds, marker, color=colour, ms=4, alpha=0.5)
            ends95 = interval.get((name, size), (seeds[0], seeds[0]))
            _ = ax.plot([size, size], ends95, color=colour, lw=0.8)
        means = [np.mean(curve[name][size]) for size in sizes]
        _ = ax.plot(sizes, means, color=colour, ls=line, lw=1.8)
        last.append(means[-1])
    shown = spread_out(last, 0.034 if len(last) > 1 else 0)
    beside = {"transform": ax.get_yaxis_transform(), "clip_on": False}  # x in widths
    for name, height, (colour, _, marker) in zip(names, shown, STYLES, strict=False):
        text = name.replace("IMAGENET1K_V1", "\n(ImageNet)").replace(" \n", "\n")
        _ = ax.plot(1.05, height, marker, color=colour, ms=5, **beside)
        _ = ax.text(1.09, height, text, va="center", fontsize=9, **beside)
    _ = ax.axhline(1 / 3, color="black", ls=":", lw=1)
    _ = ax.set(xscale="log", xlim=ends, xlabel="Training slices of each class")


every = sorted({size for sizes in curve.values() for size in sizes})
ends = (every[0] / 1.3, every[-1] * 1.3)
groups = {
    "read the frozen detector": [name for name in curve if name in FROZEN],
    "train on images": [name for name in curve if name not in FROZEN],
}
groups = {title: names[:7] for title, names in groups.items() if names}
shape = {"figsize": (9, 4), "sharey": True, "squeeze": False, "layout": "constrained"}
fig, axes = plt.subplots(1, len(groups), **shape)
for ax, title in zip(axes[0], groups, strict=True):
    draw_curve(ax, groups[title], ends)
    _ = ax.set_title(title, fontsize=10)
    _ = ax.set_xticks(every, [f"{size:,}" for size in every])
    _ = ax.minorticks_off()
_ = axes[0, 0].set_ylabel("Accuracy (no unit)")
plt.show()

# %% [markdown]
# Read it from the left. With 30 slices of each class, MobileNetV2 from ImageNet is far behind every summary
# of the frozen detector but one: the paper's vector. With 300 it is ahead of all of them. So against this
# one network **the frozen detector is ahead where slices are few**, as the paper expects of it. It also
# brings knowledge along that MobileNetV2 lacks: lesion masks of other phantoms, drawn by the same program. But
# the vector is not what makes it pay. The scores alone and the areas are good from the start, and gain
# nothing after 100; the vector climbs slowly, and with 1,000 slices it has not caught up with what its own
# scores reach with 30. The two summaries that look inside the maps end highest, and still rise.
#
# Each line is one draw of training slices and one start, so trust the large gaps and not the small ones.
# For ResNet-18 we have one size only, so a network from random weights with little data remains open.
#
# ## The paper's own comparison
#
# Table 3 of the paper {cite:p}`TerSarkisov2020` compares four models on patients' slices. Only its first
# two rows share a list of test slices. The other two come from other papers, with other patients, and
# one of them has 90 test images. How well is an accuracy known from so few?

# %% tags=["nbval-check-output"]
table_3 = {  # COVID-19 sensitivity, accuracy (published, %), test cases
    "heads + BN (the paper)": (90.80, 91.66, 21_182),
    "COVIDNet-CT": (92.49, 97.57, 21_182),
    "COVNet": (90.00, 89.04, 438),
    "ResNet-18": (81.30, 86.70, 90),
}
for name, (sensitivity, accuracy, n) in table_3.items():
    low, high = wilson(round(accuracy / 100 * n), n)
    print(
        f"{name:23} {sensitivity:.2f} {accuracy:.2f}",
        f"(95 %: {100 * low:.1f} to {100 * high:.1f}, n = {n:,})",
    )

# %% [markdown]
# (Wilson's intervals take slices for independent, which those of one patient are not, so the true ones
# are wider. COVNet judges scans rather than slices.)
#
# On the same slices, then, heads + BN stays well behind COVIDNet-CT. Its accuracy of 91.66 lies inside the
# interval of ResNet-18 and just above COVNet's, and both were judged on other patients, so the table does
# not show that it is ahead of either. And no row says what an ordinary classifier reaches *on the 3,000 training slices that the method
# had*. Our table above adds just that comparison, on phantoms. The one on patients waits for somebody with
# COVIDx-CT and a GPU: [Reproduce the paper](reproduce.md) has the data, and
# `covidmask compare --preset paper --data data/covidx-ct` the systems.
#
# ## So, do ranked boxes beat the others?
#
# On these phantoms, under this budget, with 300 slices of each class:
#
# - **Against an ordinary classifier: no.** On the same test slices `resnet18`, which starts from random
#   weights and has never seen a lesion mask, is ahead of `heads`, and `mobilenet_v2` from ImageNet further
#   still. The intervals of both differences, over patients, lie above 0. With 30 slices of each class the
#   two that we measured, `heads` and `mobilenet_v2`, lie close together and their intervals overlap.
# - **Against segmenting first and classifying then: no.** `areas`, a linear layer on six numbers of the
#   same frozen detector, is ahead with 300 slices and, in the figure, with every other number.
# - **The boxes are not to blame.** `scores` and `inside` use the same boxes, and they are ahead of
#   `heads`, too. What costs accuracy is to describe the boxes by their deltas.
#
# This is about the regime in which the detector stays as it is. `heads_bn` and `full` change what the
# detector looks at while $S$ learns; we have not measured them here, and [chapter
# 8](08_three_regimes.ipynb) compares them with `heads` only.
# And with the 6,300 training slices of [chapter 11](11_what_makes_it_work.ipynb), $S$ on the vector and
# $S$ on the scores are no longer clearly apart, so part of the distance is a price of little data.
#
# On the paper's own data neither answer is known to us, since its Table 3 never gives two systems the same
# training slices.
#
# ## What these comparisons cannot show
#
# - **All phantoms come from one program**, which also taught the detector. A frozen detector is at home
#   there as it never is in another hospital ([chapter 14](14_another_hospital.ipynb)).
# - **One seed.** Each row is one draw of training slices and one start; another may move it. The
#   intervals are about other patients, not about other seeds.
# - **A budget is a choice.** Shown ten times as many images, the networks that train on images may gain
#   more than the others.
# - **A class of a slice is not a diagnosis** of a patient.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Why does the same logistic regression read all four summaries?**
#
# - [ ] It is the classifier that the paper uses for its ranked boxes. :: The paper has the module $S$, with two hidden layers.
# - [ ] It gives the highest accuracy on each of the summaries. :: Nobody has tried, and that is not the aim.
# - [x] What differs in the result then comes from the summary. :: With two readers, the better one could hide the better summary.
#
# **2. `areas` has 6 numbers of a slice, the vector has 160. What follows for few slices?**
#
# - [x] Fewer weights must be learned, which may outweigh what 6 numbers leave out. :: With few slices, each weight that must be learned costs accuracy.
# - [ ] The vector must win, since it holds more information. :: More numbers may hold more, but a reader has to learn which of them matter.
# - [ ] The areas must win, since they use the masks. :: Masks help only as far as their sizes tell the classes apart.
#
# **3. The intervals of two readers overlap. Are they equally good?**
#
# - [ ] Yes, overlapping intervals mean that there is no difference. :: Two intervals can overlap while the difference is clearly above 0.
# - [x] That is open; look at the interval of their difference on the same slices. :: What is hard for both cancels there.
# - [ ] No, the higher mean is better, that is what a mean is for. :: Other patients might have turned the order round.
#
# **4. Why is each network shown 9,000 images, whether there are 90 distinct ones or 3,000?**
#
# - [ ] With fewer images it would not fit the memory. :: Memory depends on the batch, which is always 16.
# - [x] So that a point of the curve differs in the data, not in the steps of training. :: With epochs as the budget, small sets would also get less training.
# - [ ] It is the best number for a ResNet-18, found by a search. :: Nothing here was tuned.
#
# **5. One row of Table 3 rests on 90 images. What can it tell?**
#
# - [ ] That heads + BN is ahead, since 91.66 is more than 86.70. :: 91.66 lies inside the interval that 90 images allow.
# - [ ] Nothing at all. :: An accuracy far outside the interval, such as guessing, is excluded.
# - [x] An accuracy within several points, of other patients. :: The interval is that wide, and the patients are not those of the other rows.
#
# **6. On phantoms a frozen detector does well. Why may that flatter it?**
#
# - [x] The program that drew the test slices also drew those that taught it. :: It has never been away from home.
# - [ ] Its training slices and the test slices are the same. :: The patients are kept apart.
# - [ ] Phantoms have no noise. :: They have, with the spectrum of a scanner.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · What the readers learn
#
# Kind: pencil, *
#
# A linear layer reads a summary of `numbers` values and gives a logit for each of `classes` classes. How
# many parameters does it learn? Write it as a function of both, and compare with the column *trained*
# of `inside`, `maps` and `areas`.
#
# Hint: each logit is a weighted sum of all values, and a bias.


# %% tags=["starter"]
def parameters_of_reader(numbers, classes):
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def parameters_of_reader(numbers, classes):
    return classes * (numbers + 1)


for name, numbers in (("inside", channels), ("maps", 2 * channels), ("areas", 6)):
    print(f"{name:6} {parameters_of_reader(numbers, 3)}")


# %% tags=["wrong"]
def parameters_of_reader(numbers, classes):
    return classes * numbers


# %% tags=["wrong"]
def parameters_of_reader(numbers, classes):
    return classes * numbers + 1


# %% tags=["check"]
# @title Check your answer
layer = torch.nn.Linear(7, 4)
wanted = sum(p.numel() for p in layer.parameters())
message = "count the parameters of torch.nn.Linear(7, 4), weights and biases"
assert parameters_of_reader(7, 4) == wanted, message
assert parameters_of_reader(1, 2) == 4, "one value, two logits: 2 weights, 2 biases"
print("Right: a weight for each value and logit, and a bias for each logit.")

# %% [markdown] tags=["answer"]
# The reader of the areas learns 21 numbers and the module $S$ of `heads` more than a hundred thousand,
# and the table shows which of the two is ahead with 300 slices of each class.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Fewer boxes
#
# Kind: predict, then run, *
#
# Is the vector too long for so few slices? Predict first: if the reader gets only the first 2, 4, 8 or
# 16 boxes, once with all five numbers and once with the score alone, what does each of the two curves do?
# Then run it.
#
# Hint: `known["ranked boxes"][:, : 5 * n]` are the first $n$ boxes, since rows are stored one after the
# other.

# %% tags=["solution"]
# @title Solution
for n in (2, 4, 8, 16, preset.classifier.n_boxes):
    shares = []
    for name, step in (("ranked boxes", 5), ("scores", 1)):
        reader = fitted(known[name][:, : step * n], learned)
        share = reader.score(new[name][:, : step * n], labels)
        shares.append(f"{name} {share:.0%}")
    print(f"{n:2} boxes:", ", ".join(shares))

# %% [markdown] tags=["answer"]
# When we ran it, the vector did best with four boxes and lost with every step after that, while
# the scores gained or stayed where they were. So length does hurt when most of it is deltas: each number
# brings a weight to learn for each class, and there are four deltas a box.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · From slices to patients
#
# Kind: write a function, **
#
# The table has a column *accuracy, patients*. Write `patient_accuracy(shares, labels, patients)`: take
# the mean of the probabilities `shares` [M, classes] over the slices of each patient, call the class
# with the largest mean, and return the share of patients that are right. All slices of a patient have
# the same label; the three arguments are NumPy arrays.
#
# Hint: `np.unique(patients)` names each patient once, and `patients == p` finds the slices of one.


# %% tags=["starter"]
def patient_accuracy(shares, labels, patients):
    raise NotImplementedError("one answer for each patient")


# %% tags=["solution"]
# @title Solution
def patient_accuracy(shares, labels, patients):
    hits = []
    for p in np.unique(patients):
        own = patients == p
        hits.append(shares[own].mean(0).argmax() == labels[own][0])
    return float(np.mean(hits))


for name, x in known.items():
    shares = fitted(x, learned).predict_proba(new[name])
    by_patient = patient_accuracy(shares, labels, patients)
    print(f"{name:13} slices {right[name].mean():.0%}, patients {by_patient:.0%}")


# %% tags=["wrong"]
def patient_accuracy(shares, labels, patients):
    hits = []
    for p in np.unique(patients):
        own = patients == p
        votes = np.bincount(shares[own].argmax(1))
        hits.append(votes.argmax() == labels[own][0])
    return float(np.mean(hits))


# %% tags=["wrong"]
def patient_accuracy(shares, labels, patients):
    return float((shares.argmax(1) == labels).mean())


# %% tags=["check"]
# @title Check your answer
some = np.array([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55], [0.2, 0.8]])
whose, truth = np.array(["a", "a", "a", "b"]), np.array([0, 0, 0, 1])
answer = patient_accuracy(some, truth, whose)
message = "patient a: two of three slices vote wrong, but the mean is right"
assert answer == 1, message
truth = np.array([0, 0, 0, 0])
assert patient_accuracy(some, truth, whose) == 0.5, "one of two patients is right"
print("Right. A sure slice counts for more than an unsure one.")

# %% [markdown] tags=["answer"]
# A patient has three test slices here, of which we judge one or two, and where they disagree the surer
# one decides. Note that it is a different question: how many *patients* are right.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · What the reader may know
#
# Kind: find the bug, **
#
# A friend scales by hand. His `scaled(train, test)` brings the columns of two arrays [M, numbers] to mean 0
# and spread 1, and returns both arrays. It runs, and the accuracy hardly changes. Yet what it makes of a
# test slice depends on which other test slices there are. Find the mistake and repair it.
#
# Hint: in a clinic slices come one by one. Which mean is known by then?


# %% tags=["starter"]
def scaled(train, test):
    """Both arrays, with the columns brought to one scale."""
    both = np.concatenate([train, test])
    mean, spread = both.mean(0), both.std(0)
    spread = np.where(spread > 0, spread, 1)  # columns that never vary
    return (train - mean) / spread, (test - mean) / spread


# %% tags=["solution"]
# @title Solution
def scaled(train, test):
    """Both arrays, with the columns brought to one scale."""
    mean, spread = train.mean(0), train.std(0)
    spread = np.where(spread > 0, spread, 1)  # columns that never vary
    return (train - mean) / spread, (test - mean) / spread


x, z = scaled(known["areas"], new["areas"])
reader = LogisticRegression(C=0.1, max_iter=5000).fit(x, learned)
print(f"areas: {reader.score(z, labels):.0%}, before {right['areas'].mean():.0%}")


# %% tags=["wrong"]
def scaled(train, test):
    def alone(part):
        spread = np.where(part.std(0) > 0, part.std(0), 1)
        return (part - part.mean(0)) / spread

    return alone(train), alone(test)


# %% tags=["wrong"]
def scaled(train, test):
    mean, spread = train.mean(0), train.std(0)
    return (train - mean) / spread, (test - mean) / spread  # 0 / 0


# %% tags=["check"]
# @title Check your answer
rng = np.random.default_rng(0)
a, b = rng.normal(5, 2, (40, 3)), rng.normal(7, 3, (20, 3))
a[:, 2] = b[:, 2] = 1  # as a count that is 1 in every slice
with np.errstate(all="ignore"):
    (x, z), (_, alone) = scaled(a, b), scaled(a, b[:1])
    _, again = scaled(a, a[:5])
assert np.isfinite(x).all(), "a constant column has spread 0: do not divide by it"
message = "alone, a test slice gets other numbers than among twenty: whose mean is it?"
assert np.allclose(alone, z[:1]), message
message = "a slice must get the same numbers, whether it stands in train or in test"
assert np.allclose(again, x[:5]), message
assert np.allclose(x[:, :2].mean(0), 0), "training columns should have mean 0"
assert np.allclose(x[:, :2].std(0), 1), "training columns should have spread 1"
print("Right: what is learned about the scale is learned from training slices.")

# %% [markdown] tags=["answer"]
# His mean and spread were those of training and test slices together, so the test slices took part in what
# the reader knows. With a mean and a spread that hardly matters; with a choice of columns it can matter
# much. A pipeline, as in `fitted`, keeps you from it, since all its steps are fitted on training slices alone.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Both together
#
# Kind: experiment, **
#
# Give the reader the ranked boxes *and* the maps. Does it do better than with the maps alone? Use the
# interval of the difference.
#
# Hint: `np.hstack([known["ranked boxes"], known["maps"]])`.

# %% tags=["solution"]
# @title Solution
both = [np.hstack([part["ranked boxes"], part["maps"]]) for part in (known, new)]
values = (fitted(both[0], learned).predict(both[1]) == labels).astype(float)
low, high = over_patients(values - right["maps"])
print(f"both {values.mean():.0%}, minus maps alone: {low:+.2f} to {high:+.2f}")

# %% [markdown] tags=["answer"]
# When we ran it, the interval reached just above 0 and lay mostly below it: the 160 numbers more did not
# help, and may hurt. They do not even add *where* the boxes are, since deltas are relative to their
# proposals ([chapter 6](06_ranked_boxes.ipynb)).

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · How many images to tell two systems apart?
#
# Kind: pencil, ***
#
# Suppose that ResNet-18 had kept its accuracy of 86.7 % on more test images. From how many images on
# would the upper end of its 95 % interval stay below the 91.66 % of heads + BN? Use the plain interval
# $p \pm 1.96 \sqrt{p (1 - p) / n}$, solve it for $n$, and write it as `images_needed(p, limit)`.
#
# Hint: the half-width of the interval must equal the distance from $p$ to the limit; square both sides.


# %% tags=["starter"]
def images_needed(p, limit):
    raise NotImplementedError("solve the interval for n")


# %% tags=["solution"]
# @title Solution
def images_needed(p, limit):
    return 1.96**2 * p * (1 - p) / (limit - p) ** 2


print(f"{images_needed(0.867, 0.9166):.0f} images, twice the 90 that there were")


# %% tags=["wrong"]
def images_needed(p, limit):
    return p * (1 - p) / (limit - p) ** 2


# %% tags=["wrong"]
def images_needed(p, limit):
    return 1.96 * (p * (1 - p)) ** 0.5 / (limit - p)


# %% tags=["check"]
# @title Check your answer
for p, limit in ((0.867, 0.9166), (0.5, 0.6), (0.75, 0.76)):
    n = images_needed(p, limit)
    end = p + 1.96 * (p * (1 - p) / n) ** 0.5
    message = f"with your n, the upper end for p = {p} is {end:.3f}, not {limit}"
    assert abs(end - limit) < 1e-6, message
print("Right. Half the distance takes four times as many images.")

# %% [markdown] tags=["answer"]
# So the table was not far from being able to tell. But slices of one patient are alike, and then the
# number that counts is nearer to that of the patients ([chapter 10](10_evaluation.ipynb)).

# %% [markdown]
# ## What we learned
#
# 1. Scores, ranked boxes, areas and maps are summaries of one look, and one reader can compare them.
# 2. A fair table states its rules first: the same slices, one budget, no system tuned.
# 3. On phantoms the frozen vector beats neither an ordinary classifier nor the areas of the lesions; with
#    30 slices of each class, scores and areas were ahead of the one ordinary network we measured.
# 4. The boxes are not the weak point: their scores, or what lies inside them, do better than deltas.
# 5. Table 3 of the paper cannot decide it: no two of its systems learned from the same slices.
#
# ## Further reading
#
# {cite:t}`TerSarkisov2020` makes the claims, {cite:t}`Gunraj2020` describes COVIDNet-CT, {cite:t}`Li2020`
# COVNet and {cite:t}`Wu2020` JCS. {cite:t}`Roberts2021` show how often such comparisons go wrong on real
# patients.
