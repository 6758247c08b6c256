# %% [markdown]
# # 12 · Side by side
#
# The paper says that a list of ranked boxes tells what disease a slice shows, as well as or better
# than an ordinary classifier, and from little data. So far this book has compared the method with
# itself. Now it meets the others. Is the list of boxes a good summary of a slice, or does it leave
# out something that matters?
#
# **After it you can**
#
# - let one classifier read several summaries of the same slice, and say what each of them holds;
# - compare classifiers by rules stated in advance: the same slices, a budget, intervals by patient;
# - read a curve of accuracy against training data, and check a claim about "little data" with it;
# - go from nothing to lesions and classes on real images, and say what the result can mean.
#
# **You need** [chapter 6](06_ranked_boxes.ipynb) (ranked boxes), [chapter
# 7](07_covid_ct_mask_net.ipynb) (module $S$) and [chapter 10](10_evaluation.ipynb) (intervals).
# **Run time:** about two minutes on two CPU cores in the preset `quick`.
#
# ```{admonition} Synthetic data, and some real figures
# :class: important
# The cells of this page run on *phantoms*, drawn by formulas and random numbers. The tables about
# COVID-CT are about real figures of papers, and say so. Nothing here is for diagnosis.
# ```

# %% tags=["fold"]
# @title TODO say what this does
import os
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import adaptive_max_pool2d

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import (
    SliceImages,
    old_friend,
    open_slices,
    write_phantoms,
)
from covidmask.metrics import bootstrap, wilson
from covidmask.models import ShippedWeights, trained_segmenter
from covidmask.models.ranked_boxes import ranked_boxes
from covidmask.models.systems import LinearReader, PooledMaps
from covidmask.training.compare import few, judge

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}")
print(f"torchvision {torchvision.__version__}, {device}")

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")
COVID_CT = os.environ.get("COVIDMASK_COVID_CT", f"{DATA}/covid-ct")
PER_CLASS = 100  # training slices
EVERY = 2  # judge every second test slice

# %% [markdown]
# ## One look, many summaries
#
# A detector looks at a slice once. What it computes on the way is a stack of *feature maps*: for
# each place in the slice a few dozen numbers that say what it looks like there. Everything else is
# made of them. The boxes are its answers to the question "is there a lesion here?".

# %% tags=["fold"] mystnb={"image": {"alt": "Three panels of one synthetic slice. Left: the slice with its detections. Middle: one channel of a feature map, brightest where lesions are. Right: the scores of the ranked boxes, falling from left to right."}, "figure": {"caption": "Our old friend, looked at once: what the detector finds (left), the channel of its finest feature map that answers most to lesions (middle), and all that a list of scores keeps (right). Synthetic."}}
# @title TODO say what this does
# Draws one look: the boxes, a feature map, the scores.
preset = PRESETS[PRESET]
detector = trained_segmenter(PRESET, device, shipped=True).eval()
friend, mask = old_friend(preset.phantoms.size)
image = torch.from_numpy(friend).expand(3, -1, -1).to(device)
with torch.no_grad():
    maps = detector.backbone(detector.transform([image])[0].tensors)
    rows = ranked_boxes(detector, [image], preset.classifier)[0].cpu()
    found = detector([image])[0]
finest = next(iter(maps.values()))[0].cpu()  # [channels, H/8, W/8]
fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
found = {key: value.cpu() for key, value in found.items()}
_ = plotting.show_lesions(friend, found, axes[0])
lesion = torch.from_numpy(mask >= 2).float()[None]  # [1, H, W]
lesion = adaptive_max_pool2d(lesion, finest.shape[1:])[0] > 0
gap = finest[:, lesion].mean(1) - finest[:, ~lesion].mean(1)
channel = int((gap / finest.std((1, 2))).argmax())  # brightest there
_ = axes[1].imshow(finest[channel], cmap="cividis")
_ = axes[1].set_axis_off()
_ = axes[1].set_title(f"channel {channel} of {len(finest)}", fontsize=10)
_ = axes[2].bar(range(1, len(rows) + 1), rows[:, 0], color=plotting.BLUE)
_ = axes[2].set(xlabel="Rank of the box", ylabel="Score (no unit)")
_ = axes[2].set_ylim(0, 1)
plt.show()

# %% [markdown]
# So we can hand the same look on in several forms:
#
# | what is handed on | numbers | it knows |
# |---|---|---|
# | *scores* | $N$ | how sure the detector is of each box |
# | *ranked boxes* | $5N$ | and how each box was moved from its proposal: the paper's vector |
# | *maps* | $2 \times$ channels $\times$ levels | the mean and the maximum of every channel, and no box at all |
#
# The function below gives all three. (In the preset `quick` the detector has one level of maps, of 64
# channels. A map with other channels than these would be the image itself, which some presets keep
# beside the maps, so it is left out.)

# %%
N = preset.classifier.n_boxes


@torch.no_grad()
def look(image):
    """One look at a slice [3, H, W], in three forms."""
    rows = ranked_boxes(detector, [image], preset.classifier)[0]  # [N, 5]
    batch = detector.transform([image])[0].tensors
    maps = detector.backbone(batch).values()  # again, for the lesson's sake
    maps = [m[0] for m in maps if m.shape[1] == len(finest)]
    pooled = []
    for m in maps:  # [channels, h, w]
        pooled += [m.mean((1, 2)), m.amax((1, 2))]
    return {
        "scores": rows[:, 0],
        "ranked boxes": rows.flatten(),
        "maps": torch.cat(pooled),
    }


for name, numbers in look(image).items():
    print(f"{name:13} {len(numbers):4} numbers")

# %% [markdown]
# ## The same reader for all
#
# To compare summaries, everything else must be the same: the detector, which stays frozen, the
# slices, and the reader. Ours is a logistic regression, the plainest there is. If one summary wins,
# it is not because something cleverer reads it.
#
# We take 100 slices of each class to learn from, and judge test patients whom neither the
# detector nor the reader has met.

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


known = read_all(train, range(len(train)))
new = read_all(test, chosen)
labels = np.array([test.labels[i] for i in chosen])
patients = np.array([test.patients[i] for i in chosen])
print(f"{len(train)} slices to learn from, {len(labels)} to judge,")
print(f"of {len(set(patients))} patients")

# %%
right = {}
for name, x in known.items():
    scaled = StandardScaler()
    reader = make_pipeline(scaled, LogisticRegression(C=0.1, max_iter=5000))
    _ = reader.fit(x, train.labels)
    right[name] = (reader.predict(new[name]) == labels).astype(float)
    print(f"{name:13} {right[name].mean():.0%} of the slices right")

# %% [markdown]
# How far can such numbers be off because we happened to judge these patients? We draw *patients* with
# replacement, as in [chapter 10](10_evaluation.ipynb). To compare two readers we take the **difference**
# on the same slices: its interval is narrower than the two intervals side by side suggest. (What
# another draw of training slices would change comes next.)

# %% mystnb={"image": {"alt": "Points with bars: the share of slices that the reader of the scores, of the ranked boxes and of the maps has right, each with its interval, above a line for chance at one third."}, "figure": {"caption": "Three readers of one look, with 95 % intervals over patients. Dotted: what guessing reaches. Synthetic."}}
slices_of = [np.flatnonzero(patients == p) for p in np.unique(patients)]


def over_patients(values):
    """95 % of the mean of `values` [M], drawing patients."""

    def mean(drawn):
        return np.concatenate([values[slices_of[p]] for p in drawn]).mean()

    return bootstrap(len(slices_of), mean, repeats=1000)


fig, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
for y, values in enumerate(right.values()):
    low, high = over_patients(values)
    _ = ax.plot([low, high], [y, y], color=plotting.BLUE, lw=2)
    _ = ax.plot(values.mean(), y, "o", color=plotting.BLUE)
_ = ax.axvline(1 / 3, color="black", ls=":")
_ = ax.set_yticks(range(len(right)), list(right))
_ = ax.set(xlabel="Share of slices right (no unit)", xlim=(0.25, 1))
_ = ax.set_ylim(2.5, -0.5)
plt.show()
for name in ("scores", "maps"):
    low, high = over_patients(right[name] - right["ranked boxes"])
    print(f"{name} minus ranked boxes: {low:+.2f} to {high:+.2f}")

# %% [markdown]
# The package has this, too. `PooledMaps` is the look without boxes, and `LinearReader` puts a linear
# layer behind it. Its features are those that we made by hand.

# %% tags=["nbval-check-output"]
maps_reader = LinearReader(PooledMaps(detector), IMAGE_CLASSES).eval()
theirs = maps_reader.features([test[0][0].to(device)])[0].cpu()
assert torch.allclose(theirs, torch.from_numpy(new["maps"][0]), atol=1e-5)
print(f"{len(theirs)} numbers of a slice, the same as by hand")

# %% [markdown]
# ## How much data?
#
# The paper trains on 3,000 slices where COVIDNet-CT takes 60,000, and credits the method: the
# detector has learned what lesions look like, so little is left to learn. Is the vector a good thing
# to learn from when slices are few? We have read 100 slices of each class; from these we can draw
# 5, 10, 20 or 50, ten times each, and let all three readers learn from the same draw.

# %%
SIZES, DRAWS = (5, 10, 20, 50), 10
learned = np.array(train.labels)


def draw(per_class, number):
    """Positions of some slices of each class, by a draw of this number."""
    rng = np.random.default_rng((per_class, number))
    classes = [np.flatnonzero(learned == k) for k in range(3)]
    picked = [rng.choice(part, per_class, replace=False) for part in classes]
    return np.concatenate(picked)


def share_right(x, z, some):
    """Learn from some rows of x [M, numbers], judge all of z.

    The labels are `learned` and `labels`.
    """
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
    return reader.fit(x[some], learned[some]).score(z, labels)


curves = {name: np.zeros((len(SIZES), DRAWS)) for name in known}
for row, per_class in enumerate(SIZES):
    for number in range(DRAWS):
        some = draw(per_class, number)
        for name, x in known.items():
            right_now = share_right(x, new[name], some)
            curves[name][row, number] = right_now

# %% tags=["fold"] mystnb={"image": {"alt": "Three curves of the share of slices right over 5, 10, 20 and 50 training slices of each class. Scores and maps lie above ranked boxes; bars show the spread over ten draws."}, "figure": {"caption": "Share of the test slices right, over training slices of each class: mean of ten draws, bars from the lowest to the highest. Synthetic."}}
# @title TODO say what this does
# Draws the three curves.
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
looks = (
    (plotting.BLUE, "-", "o"),
    (plotting.VERMILLION, "--", "s"),
    (plotting.ORANGE, ":", "D"),
)
for shift, (name, values) in enumerate(curves.items()):
    colour, line, marker = looks[shift]
    mean = values.mean(1)
    _ = ax.errorbar(
        np.array(SIZES) * (0.97 + 0.03 * shift),  # apart
        mean,
        [mean - values.min(1), values.max(1) - mean],
        color=colour,
        ls=line,
        marker=marker,
        capsize=3,
        label=name,
    )
_ = ax.axhline(1 / 3, color="black", ls=":", lw=1)
_ = ax.set(
    xscale="log",
    xlabel="Training slices of each class",
    ylabel="Share right (no unit)",
)
_ = ax.set_xticks(SIZES, list(map(str, SIZES)))
_ = ax.minorticks_off()
_ = ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# So the look of a detector is a good thing to learn from: with ten slices of each class the scores
# alone classify two thirds of the test slices correctly, where guessing gets one third. In that sense
# the paper has a point. But with this reader and so few slices it is not the vector that makes it so.
# At every size it is behind the scores that it contains, and with fifty slices of each class it is about
# where they are with five to ten.
#
# Length alone is not the reason, as the maps are nearly as long. One that fits: the deltas say how a box
# was moved from its proposal. That is not worthless ([chapter 11](11_what_makes_it_work.ipynb) tries $S$
# on deltas alone), but most of it has little to do with the class, and a reader must first learn to
# leave four numbers out of five nearly alone. With the 6,300 training slices of chapter 11, $S$ on the
# vector and $S$ on the scores are no longer clearly apart. (The bars show how ten draws differ; they
# leave out that other patients would differ, too.)

# %% [markdown]
# ## Every system under one budget
#
# A frozen detector and a linear reader is one way. Others train the whole network on images. To put
# them in one table we need rules that are stated before anything runs:
#
# - **The same slices.** Each seed draws its training slices once, and all systems get them.
# - **One budget.** A network that trains on images is shown 9,000 of them in all, however many
#   distinct ones there are, in batches of 16, at a rate that falls along half a cosine. Linear layers
#   on frozen features are fitted to convergence, and $S$ on ranked boxes, which costs next to nothing,
#   is shown 60,000 rows.
# - **No system is tuned**, and no epoch is chosen: we judge the weights after the last step. (One rate
#   serves all networks from random weights, a gentler one those from ImageNet, and $S$ has the settings
#   of the preset.)
# - **The detector is given.** Its lesion masks are extra knowledge that an ordinary classifier does
#   not get. That is the method's idea, so we count it as part of the method. Parameters that its
#   training found are not in the column *trained*.
#
# What stands in the table:
#
# | name | what it is |
# |---|---|
# | `heads` | the paper's vector and $S$, the detector frozen ([chapter 8](08_three_regimes.ipynb)) |
# | `scores` | $S$ as in `heads`, on the scores alone |
# | `maps` | a linear layer on the pooled maps, as above |
# | `inside` | a linear layer on the largest value of each map channel inside the ranked boxes |
# | `areas` | a linear layer on counts and areas of the lesions that are found |
# | `resnet18`, `mobilenet_v2` | ordinary classifiers of a slice; from random weights, unless said |
#
# (`covidmask compare` knows more, whose rows are still to be run: `heads_bn` and `full`, the other two
# regimes; `faster`, heads on a detector without masks; `unet` and `fcn`, segment and then classify;
# `jcs`, both by one network, in the manner of {cite:t}`Wu2020`; `covnet`, all slices of a patient at once,
# as {cite:t}`Li2020` do.)
#
# AUC is the mean of one class against the rest, with an interval from drawing patients; F1 is the mean
# over classes. *Accuracy, patients* takes
# the mean of the probabilities over all slices of a patient; Dice is that of the lesions as a whole, for
# systems that draw them.
#
# `python benchmarks/side_by_side.py phantoms` made it. On your own slices, with a budget in epochs, it
# is one command:
#
# ```bash
# covidmask compare --data DIR --per-class 300 --seeds 0 1 2 \
#     --systems heads scores maps inside resnet18
# ```
#
# <!-- side_by_side_phantoms -->
# | system | accuracy | AUC | AUC, 95 % by patient, first seed | F1 | parameters | trained | minutes | accuracy, patients | Dice, infection |
# |---|---|---|---|---|---|---|---|---|---|
# | `mobilenet_v2`, from ImageNet | 0.834 (one seed) | 0.955 (one seed) | 0.940 to 0.968 | 0.831 | 2.23 M | 2,227,715 | 3.0 | 0.881 |  |
# | `resnet18` | 0.768 (one seed) | 0.919 (one seed) | 0.899 to 0.936 | 0.763 | 11.18 M | 11,178,051 | 6.4 | 0.831 |  |
# | `inside` | 0.773 (one seed) | 0.906 (one seed) | 0.882 to 0.927 | 0.771 | 1.34 M | 195 | 0.3 | 0.826 |  |
# | `maps` | 0.745 (one seed) | 0.903 (one seed) | 0.879 to 0.925 | 0.744 | 0.73 M | 387 | 0.2 | 0.811 |  |
# | `areas` | 0.756 (one seed) | 0.898 (one seed) | 0.877 to 0.921 | 0.756 | 1.33 M | 21 | 0.9 | 0.861 | 0.686 |
# | `scores` | 0.753 (one seed) | 0.893 (one seed) | 0.867 to 0.918 | 0.758 | 1.27 M | 75,011 | 0.3 | 0.861 |  |
# | `heads` | 0.678 (one seed) | 0.839 (one seed) | 0.811 to 0.865 | 0.680 | 1.30 M | 107,779 | 0.3 | 0.761 |  |
#
# Phantoms, 300 training slices of each class, mean of the seeds and their range. Minutes are those of a core. Command: `python benchmarks/side_by_side.py phantoms --systems scores heads areas maps resnet18 mobilenet_v2 IMAGENET1K_V1 and python benchmarks/side_by_side.py phantoms --systems scores heads maps inside resnet18 and python benchmarks/side_by_side.py phantoms --no-curve --systems resnet18 heads_bn full faster mobilenet_v2 IMAGENET1K_V1 covnet+resnet18 jcs unet`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-27; commit 83fe655 and 25f9c58 and 9ad715e; all numbers in `results/side_by_side_phantoms.json`.
# <!-- /side_by_side_phantoms -->

# %% [markdown]
# (One seed so far, and 603 test slices of 201 patients: by patient, an accuracy of 0.75 is known to about
# 0.04 either way, so rows that lie closer than that are not told apart.)
#
# Does it take many parameters? The next figure sets the same accuracies over the number that were
# trained. (Its axis does not begin at 0.)

# %% tags=["fold"] mystnb={"image": {"alt": "Points: accuracy of each system over the number of parameters that it trains, from some twenty to more than ten million, on a logarithmic axis."}, "figure": {"caption": "Accuracy with 300 training slices of each class, against the parameters that were trained for it. Synthetic."}}
# @title TODO say what this does
# Draws accuracy over the parameters trained; the numbers are those of
# results/side_by_side_phantoms.json.
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
# end of curve
fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, (count, accuracy) in trained.items():
    label = name.replace("IMAGENET1K_V1", "from ImageNet")
    _ = ax.plot(count, accuracy, "o", color=plotting.BLUE)
    _ = ax.annotate(
        label,
        (count, accuracy),
        xytext=(5, 3),
        textcoords="offset points",
        fontsize=8,
    )
_ = ax.set(
    xscale="log",
    xlabel="Parameters trained",
    ylabel="Accuracy (no unit)",
)
_ = ax.margins(x=0.2)
plt.show()

# %% [markdown]
# ## The paper's own comparison
#
# Its Table 3 {cite:p}`TerSarkisov2020`, for three classes of real slices. Only the first two rows share
# a test list. The other two come from other papers, with other patients, and one of them has 90 test
# images. How sure can an accuracy be on so few? (Numbers of images are those that the paper prints.)

# %% tags=["nbval-check-output"]
table_3 = {  # model: COVID-19 sensitivity, accuracy (published, %), test
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
# (Wilson's interval takes slices for independent, which those of one patient are not; the true
# intervals are wider. COVNet judges scans, not slices.) So Table 3 shows that heads + BN stays well
# behind COVIDNet-CT on the same slices. Whether it is ahead of ResNet-18, 90 images cannot tell, and
# no row says what an ordinary classifier reaches *on the 3,000 training slices that the method had*.
# That is the comparison which the table above adds, on phantoms; the real one waits for someone with
# COVIDx-CT and a GPU: [Reproduce the paper](reproduce.md) has the data, and
# `covidmask compare --preset paper --data data/covidx-ct` the systems.
#
# ## Real images with a class
#
# COVID-CT {cite:p}`Zhao2020dataset` is a set of real images that anyone can get: `covidmask fetch
# covid-ct` brings 746 images of two classes, cut out of the figures of preprints, with a published
# division. Look at what they are before you train: *NonCOVID* is not healthy but tumours, other disease
# and some normal lungs; windows, borders, letters and arrows differ from one to the next; patients are
# known in part. (The figures belong to the authors of the preprints, so none is shown here.)
#
# Does the paper's vector say which of the two an image is? Here `SEGMENTER_CT`, which has seen drawn
# chests alone, looks at them, and a logistic regression reads what it says. First come rows that read
# boxes; the third to the fifth add to one another. Then come the whole image, and last another network:
#
# <!-- covid_ct -->
# | what a logistic regression reads | numbers | AUC, folds (95 % over figures) | AUC, val |
# |---|---|---|---|
# | scores of the 64 boxes, in their order | 64 | 0.623 (0.563 to 0.681) | 0.621 (0.499 to 0.732) |
# | score and four deltas, in their order (the paper's vector) | 320 | 0.662 (0.609 to 0.719) | 0.624 (0.518 to 0.718) |
# | the same, as mean, spread and quantiles over the boxes | 25 | 0.661 (0.595 to 0.724) | 0.644 (0.513 to 0.763) |
# | and lesion class and place of each box | 50 | 0.648 (0.584 to 0.717) | 0.649 (0.506 to 0.767) |
# | and mean, spread, least and most grey in each box | 70 | 0.694 (0.627 to 0.761) | 0.677 (0.535 to 0.789) |
# | what the box head makes of each box: mean and maximum over the boxes | 256 | 0.676 (0.624 to 0.732) | 0.703 (0.572 to 0.805) |
# | largest value of each map channel inside each box: the largest over the boxes | 192 | 0.817 (0.766 to 0.864) | 0.784 (0.681 to 0.870) |
# | mean and greatest grey value of the whole image | 2 | 0.733 (0.655 to 0.800) | 0.541 (0.413 to 0.680) |
# | feature maps of the detector: mean and maximum over the image | 384 | 0.831 (0.765 to 0.887) | 0.822 (0.722 to 0.896) |
# | score, deltas, class and place of the boxes, and those maps | 434 | 0.827 (0.765 to 0.882) | 0.804 (0.698 to 0.884) |
# | MobileNetV2 of ImageNet, frozen: its pooled features | 1,280 | 0.824 (0.756 to 0.887) | 0.775 (0.690 to 0.861) |
#
# COVID-CT, real: 425 training images, 118 of val. Command: `python benchmarks/covid_ct.py --data data/covid-ct`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-27; commit 03b75bb; all numbers in `results/covid_ct.json`.
# <!-- /covid_ct -->
#
# (0.5 is a coin toss, 1 no error. Folds keep the panels of one source figure together. The rows were
# chosen by the folds; the validation images were judged once, when all rows stood.)
#
# In the folds, the rows that read scores, deltas, place, grey values or the hidden layer of the box
# head lie between 0.62 and 0.70. Then comes a jump. The row *inside each box* has the same detector and
# the same boxes. It keeps the largest value of each channel of the feature maps within a box, and of
# these the largest over the boxes, and does about as well as the maps of the whole image. So what tells
# these images apart is in the maps, and also in that part of them which the boxes cover. Scores and
# deltas do not carry it. Nor does the hidden layer of the box head, which was trained to tell two kinds
# of lesion from the rest and keeps what serves that. On this set, other columns for the same boxes are
# the smallest change of the vector that we found to bring it back. (`covidmask compare` has the row as
# `inside`.) On val it reaches less than in the folds, and its interval is wide.
#
# Two things this does not show. One is that the *places* of the boxes matter: 64 boxes cover much of the
# lungs, and boxes at random were not tried. The other is that lesions are what is seen there. The row of
# two grey values is a warning: in the folds, brightness alone does as well as the paper's vector or
# better, and on val it is no better than a coin. Images carry traces of how they were made, a window, a
# border, a journal, and the rows that look at maps see those, too. Whether it is the disease that tells
# these images apart or the layout, no table of them can say.
#
# And a network that trains on these images, from weights of ImageNet, under the budget above:
#
# <!-- side_by_side_covid_ct -->
# | system | accuracy | AUC | AUC, 95 % by patient, first seed | F1 | parameters | trained | minutes | accuracy, patients |
# |---|---|---|---|---|---|---|---|---|
# | `mobilenet_v2`, from ImageNet | 0.797 (0.780 to 0.814) | 0.904 (0.903 to 0.906) | 0.831 to 0.964 | 0.796 | 2.23 M | 2,226,434 | 6.4 | 0.904 |
#
# COVID-CT, real: the 118 images of val, learned from the 425 of train; as patients count source figures. Command: `python benchmarks/side_by_side.py covid-ct --data data/covid-ct --systems mobilenet_v2 IMAGENET1K_V1`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-27; commit 9ad715e; all numbers in `results/side_by_side_covid_ct.json`.
# <!-- /side_by_side_covid_ct -->
#
# An ordinary classifier that starts from photographs and learns from 425 images is ahead of every row
# that reads the frozen detector. (For their own best method the authors of the set report an accuracy of
# 0.89 and an AUC of 0.98, on the test images {cite:p}`Zhao2020dataset`.)
#
# ## From nothing to lesions and classes
#
# With the package installed, on Colab or at home: the images (some 90 MB), two systems trained and
# judged on val, and one of them on the published test list. `SEGMENTER_CT` comes with the package; the
# second line asks for its file.
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
# The next cell does the heart of it in this notebook, where the images are there: it draws the lesions
# that `SEGMENTER_CT` finds in one of them, fits a linear layer to its maps, and judges that on the
# validation list. (The AUC is near that of the row of the maps above, not the same: `LinearReader`
# shrinks its weights less.)

# %% mystnb={"image": {"alt": "A real image of the reader's own copy with the lesions that SEGMENTER_CT finds."}, "figure": {"caption": "Lesions that `SEGMENTER_CT` finds in a training image. Shown in your own run only."}}
if not Path(COVID_CT).is_dir():
    print("No real images here yet. Run `covidmask fetch covid-ct`")
    print("in a terminal, and then this cell again.")
else:
    learn = open_slices(COVID_CT, "train")
    check = open_slices(COVID_CT, "val")
    drawn_alone = ShippedWeights.SEGMENTER_CT.load()
    picture = learn[0][0]
    with torch.no_grad():
        found = drawn_alone([picture])[0]
    _ = plotting.show_lesions(picture[0], found)
    plt.show()
    features = PooledMaps(drawn_alone)
    model = LinearReader(features, learn.classes).eval()
    seen = [features([learn[i][0]]) for i in range(len(learn))]
    model.fit(torch.cat(seen), learn.labels)
    logits = [model([check[i][0]]) for i in range(len(check))]
    found = judge(torch.cat(logits).detach(), check)
    low, high = found["auc_interval"]
    print(f"AUC {found['auc']:.3f} ({low:.3f} to {high:.3f}),")
    print(f"on {len(check)} real images")

# %% [markdown]
# ## So, is the list of boxes enough?
#
# That depends on how well the detector knows the images. On phantoms, where it is at home, the scores
# of the boxes keep what a linear reader can use, and the deltas cost accuracy while slices are few. On
# COVID-CT the same kind of detector has never seen a real image: there, scores and deltas keep little,
# and the feature maps, also inside the boxes, keep much more, traces of the layout included.
#
# Against ordinary classifiers: on phantoms a ResNet-18 from random weights, which has no lesion masks to
# learn from, is ahead of $S$ on the vector and about level with the readers of scores, areas and maps; a
# MobileNetV2 from ImageNet is ahead of all of them, there and on COVID-CT. So in these tables the claim
# does not hold that ranked boxes do as well. On the paper's own data nobody has shown either, since its
# Table 3 does not give two systems the same training slices.
#
# ## What these comparisons cannot show
#
# - **All phantoms come from one program**, the one that taught the detector. A frozen detector is at
#   home there as it never is between two hospitals.
# - **Figures are not scans.** Someone chose each figure of COVID-CT because it shows something, and the
#   two classes come from different papers. A network that knows the layout of a journal is right
#   for the wrong reason, and no row of the table can tell.
# - **A budget is a choice.** Shown ten times as many slices, the networks that train on images may gain
#   more than the others.
# - **A class is not a diagnosis**, and these slices were picked because they show something.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Both together
#
# Kind: experiment, **
#
# Give the logistic regression the ranked boxes *and* the maps. Does it do better than with the maps
# alone? Use the interval of the difference.

# %% tags=["solution"]
# @title Solution
both = [np.concatenate([part["ranked boxes"], part["maps"]], 1) for part in (known, new)]
reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
_ = reader.fit(both[0], train.labels)
values = (reader.predict(both[1]) == labels).astype(float)
low, high = over_patients(values - right["maps"])
print(f"both {values.mean():.0%}, minus maps alone: {low:+.2f} to {high:+.2f}")

# %% [markdown] tags=["answer"]
# The interval reaches just above 0 and lies mostly below it: the 160 numbers more do not help, and may
# hurt. They do not even add *where* the boxes are, since deltas are relative to their proposals
# ([chapter 6](06_ranked_boxes.ipynb)).

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The plainest rival
#
# Kind: experiment, **
#
# Before you trust any row, ask what the brightness of a slice alone says. Give the reader two numbers:
# mean and maximum of the grey values. What does it reach on phantoms, and why would a higher number
# worry you?

# %% tags=["solution"]
# @title Solution
def light(slices, indices):
    """Mean and maximum grey of some slices, [M, 2]."""
    images = (slices[i][0][0] for i in indices)
    return np.array([(float(x.mean()), float(x.max())) for x in images])


reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
_ = reader.fit(light(train, range(len(train))), train.labels)
values = (reader.predict(light(test, chosen)) == labels).astype(float)
low, high = over_patients(values)
print(f"two grey values: {values.mean():.0%} (95 % over patients: {low:.0%} to {high:.0%})")

# %% [markdown] tags=["answer"]
# That is the level of chance: on phantoms brightness gives nothing away. Had it been 60 %, the question
# would be whether ill lungs are brighter, which is honest, or whether the drawing left a trace. On the
# real images above two such numbers reach an AUC in the folds that should make you careful with every
# row below them.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Fewer boxes
#
# Kind: experiment, **
#
# Is the vector too long for so few slices? Keep the first 2, 4, 8 or 16 boxes of each slice, once
# with all five numbers and once with the score alone. What do you see?

# %% tags=["solution"]
# @title Solution
everything = np.arange(len(learned))
for n in (2, 4, 8, 16, N):
    parts = {
        name: share_right(known[name][:, : step * n], new[name][:, : step * n], everything)
        for name, step in (("ranked boxes", 5), ("scores", 1))
    }
    print(f"{n:2} boxes:", ", ".join(f"{name} {value:.0%}" for name, value in parts.items()))

# %% [markdown] tags=["answer"]
# The vector is best with four boxes and loses with every one after that, while the scores stay where
# they are. So length does hurt, when most of it is deltas: each brings a weight to learn, and there are
# four of them a box. With 21 times as many slices, in [chapter 11](11_what_makes_it_work.ipynb), $S$ on
# the vector and $S$ on the scores are no longer clearly apart.

# %% [markdown]
# ## What we learned
#
# 1. Scores, ranked boxes and maps are summaries of one look, and one reader can compare them.
# 2. A fair table states its rules first: the same slices, one budget, no system tuned.
# 3. From few slices the scores of the boxes are worth more than the vector that holds them.
# 4. On COVID-CT, what the vector loses is in the feature maps, also inside the same boxes.
# 5. On real images, ask first how far brightness and layout alone would get you.
#
# ## Further reading
#
# {cite:t}`TerSarkisov2020` has the claims, {cite:t}`Gunraj2020` COVIDNet-CT, {cite:t}`Li2020` COVNet, and
# {cite:t}`Zhao2020dataset` the figures. {cite:t}`Roberts2021` and {cite:t}`DeGrave2021` show how such
# comparisons go wrong on real patients.

