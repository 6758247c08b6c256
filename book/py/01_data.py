# %% [markdown]
# # 1 · The data
#
# Two sets of labels teach the two stages of COVID-CT-Mask-Net: outlines of lesions teach the detector,
# and one word for each slice teaches the classifier. A network learns what its labels say, but also
# whatever else goes along with them. So the question of this chapter is: **what do these labels say,
# and what do they give away that has nothing to do with a disease?**

# %% tags=["fold"] mystnb={"image": {"alt": "A synthetic chest slice three times: alone, in the lung window, titled with its slice label COVID-19; its mask with lung, ground-glass opacity and consolidation in different colours; and the slice with a box and an outline around each of five lesions."}, "figure": {"caption": "One slice and its labels. Left: the slice label is a single word. Middle: the lesion mask has a code for each pixel. Right: what the detector needs, lesions one by one. GGO is drawn solid, consolidation (C) dashed or hatched. Synthetic."}}
# @title Import what we need, and draw one slice with its labels
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import (
    LesionSlices,
    SliceImages,
    class_statistics,
    lesion_statistics,
    make_patient,
    mask_to_targets,
    old_friend,
    parse_name,
    read_split,
    render,
    split_by_patient,
    write_phantoms,
)
from covidmask.interactive import frame_slider
from covidmask.metrics import patient_bootstrap, report

torch.manual_seed(0)
device = "cpu"  # this chapter needs no GPU
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")

picture, codes = old_friend(PRESETS["quick"].phantoms.size)
one_by_one = mask_to_targets(codes, min_area=PRESETS["quick"].min_area)
fig, axes = plt.subplots(1, 3, figsize=(9, 4), layout="constrained")
_ = plotting.show_slice(picture, axes[0])
_ = plotting.show_mask(codes, axes[1])
_ = plotting.show_lesions(picture, one_by_one, axes[2])
titles = f"slice label: {IMAGE_CLASSES[2]}", "lesion mask", "instances"
for ax, title in zip(axes, titles, strict=True):
    _ = ax.set_title(title)
    if legend := ax.get_legend():  # below the picture, where it hides no lesion
        names = [text.get_text() for text in legend.get_texts()]
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
        _ = ax.legend(legend.legend_handles, names, fontsize=9, **place)
plt.show()

# %% [markdown]
# **After it you can**
#
# - turn a lesion mask into the boxes, labels and masks that Mask R-CNN trains on;
# - say what connectivity, a smallest area and a wrong code do to these targets;
# - split by patient, and show how much a leaky split flatters a model;
# - say what "test/train = 7.06" means, and what it does not;
# - find out what a model can read off a slice label that is no sign of a disease.
#
# **You need** Python and some PyTorch. [Chapter 0](00_whole_path.ipynb) shows what the data are for, but
# this chapter runs alone.
#
# **Time:** reading 25 min, exercises 40 min, running 1 min on two CPU cores. (The first chapter that you
# run draws the phantoms once, which takes a few minutes more.)
#
# ```{admonition} Synthetic data
# :class: important
# Every picture here is a *phantom*: a slice drawn by formulas and random numbers, stored in the layout
# of the real data. Counts of the real data come from public lists or from the paper, and the text says
# so each time. Nothing here is for diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# ## Two kinds of label
#
# | | lesion masks | slice labels |
# |---|---|---|
# | say | which pixels are lung, GGO, consolidation | control, common pneumonia or COVID-19 |
# | cost | an expert draws outlines | one word for each slice |
# | patients | COVID-19 only | all three classes |
# | train | the detector, [chapter 5](05_segmenter.ipynb) | the module $S$, [chapter 7](07_covid_ct_mask_net.ipynb) |
# | source | CNCB {cite:p}`Zhang2020` | COVIDx-CT {cite:p}`Gunraj2020`, made from CNCB |
#
# **Ground-glass opacity** (GGO) is a haze: some air is left, so the lung looks grey rather than white,
# and vessels stay visible through it. **Consolidation** (C) is denser, since fluid or cells have taken
# the place of the air; it is nearly as bright as muscle and hides the vessels. COVID-19 tends to show
# several lesions in both lungs, near the outer border {cite:p}`Zhao2020scans,Zhao2020relation`, while a
# bacterial pneumonia tends to fill one connected region. These are tendencies only: both kinds of lesion
# occur in either disease, and the paper calls the differences subtle {cite:p}`TerSarkisov2020`.
#
# Our phantoms follow these tendencies because we drew them so. [How the phantoms are
# made](phantoms_made.ipynb) shows the rules.

# %%
preset = PRESETS[PRESET]
size, least = preset.phantoms.size, preset.min_area
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms)
SPLITS = ("train", "val", "test")
folder = root / "lesions"
lesions = {s: LesionSlices(folder, s, min_area=least) for s in SPLITS}
slices = {s: SliceImages(root / "slices", s) for s in SPLITS}
image, mask = old_friend(size)  # float32 and uint8, both [H, W]

# %% tags=["fold", "nbval-check-output"]
# @title Count the phantoms, and what the mask of our old friend holds
print("phantoms           slices  patients")
for kind, sets in (("lesion masks", lesions), ("slice labels", slices)):
    for split, dataset in sets.items():
        people = len(set(dataset.patients))
        print(f"{kind} {split:5} {len(dataset):6} {people:9}")
print("\nthe mask of our old friend")
for code, count in enumerate(np.bincount(mask.ravel(), minlength=4)):
    name = ("background", "lung", "GGO", "consolidation")[code]
    print(f"code {code}  {name:14} {count / mask.size:6.1%} of the pixels")

# %% [markdown]
# A mask is a picture of the same size as its slice, and each pixel holds a code from 0 to 3. Our old
# friend is a COVID-19 phantom that most chapters look at and on which no model was trained.
#
# ## From pixels to instances
#
# The mask says what each pixel is, but not which pixels belong together. Mask R-CNN needs that: each
# lesion is an *instance*, an object with a box, a class and a mask of its own {cite:p}`He2017`. We
# define an instance as a **connected component** of one class: pixels between which a path of
# neighbouring pixels of the same class leads.
#
# How would you find the components? Here is a way that uses nothing but max-pooling. Give each lesion
# pixel a number of its own, the largest to the first in reading order. Then let each pixel take the
# largest number among itself and its neighbours, again and again, and keep the background at 0. A
# number cannot leave its component, so in the end each component carries one number.


# %%
def start_numbers(inside):
    """Number the lesion pixels in falling reading order; 0 elsewhere."""
    numbers = torch.arange(inside.numel(), 0, -1.0)
    return numbers.reshape(inside.shape) * inside  # [H, W]


def one_step(numbers, inside):
    """Each lesion pixel takes the largest number of its 3 x 3 pixels."""
    largest = max_pool2d(numbers[None], 3, stride=1, padding=1)[0]
    return largest * inside  # [H, W]


def spread(inside):
    """Repeat until nothing changes: one number for each component."""
    numbers = start_numbers(inside)
    while not torch.equal(after := one_step(numbers, inside), numbers):
        numbers = after
    return numbers  # [H, W]


# %% tags=["fold"] mystnb={"image": {"alt": "The GGO pixels of our old friend at three moments. At first each pixel has its own shade; after eight steps the shade of the first pixel has spread; at the end each of three regions has one shade."}, "figure": {"caption": "Numbers spread through the GGO of our old friend, cut out of the slice. When nothing changes any more, each region has one number. Synthetic."}}
# @title Draw how the numbers spread
ggo = torch.from_numpy(mask == 2)  # bool [H, W]
first = numbers = start_numbers(ggo)
eighth = first
for _ in range(8):
    eighth = one_step(eighth, ggo)
down, across = np.nonzero(mask == 2)
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
stages = {"at the start": first, "after 8 steps": eighth, "at the end": spread(ggo)}
for ax, (title, numbers) in zip(axes, stages.items(), strict=True):
    hidden = np.ma.masked_equal(numbers.numpy(), 0)
    _ = ax.imshow(hidden, cmap="viridis", vmin=first[ggo].min(), vmax=first.max())
    _ = ax.set(xlim=(across.min() - 3, across.max() + 3), xlabel="x (pixels)")
    _ = ax.set(ylim=(down.max() + 3, down.min() - 3), ylabel="y (pixels)", title=title)
plt.show()

# %% [markdown]
# Now we can make the tensors that Mask R-CNN asks for. For $K$ lesions these are `boxes` [K, 4],
# `labels` [K] (1 for GGO, 2 for C; 0 is kept for the background) and `masks` [K, H, W]. A box ends at
# the edge *behind* the last pixel, so that $x_2 - x_1$ is the width, and a lesion that is one pixel wide
# does not get a box of width 0. Components of fewer than `min_area` pixels are left out.


# %%
def targets_by_hand(mask, min_area):
    """A mask [H, W] of codes -> boxes, labels, masks of its K lesions."""
    boxes, labels, masks = [], [], []
    for code in (2, 3):  # GGO, consolidation
        numbers = spread(torch.from_numpy(mask == code))
        # the largest number first: reading order
        for number in numbers[numbers > 0].unique().flip(0):
            one = numbers == number  # [H, W]
            if one.sum() >= min_area:
                rows, columns = torch.nonzero(one, as_tuple=True)
                corner = columns.min(), rows.min()
                behind = columns.max() + 1, rows.max() + 1
                boxes.append([*corner, *behind])
                labels.append(code - 1)
                masks.append(one.byte())
    return boxes, labels, masks


# %% [markdown]
# The package has a function for this. Does it give the same, for our old friend and for every test
# slice?

# %% tags=["nbval-check-output"]
count = len(lesions["test"])
test_masks = [lesions["test"].read(i)[1] for i in range(count)]
for one_mask in (mask, *test_masks):
    boxes, labels, masks = targets_by_hand(one_mask, least)
    packaged = mask_to_targets(one_mask, min_area=least)
    assert packaged["boxes"].tolist() == boxes
    assert packaged["labels"].tolist() == labels
    assert all(map(torch.equal, packaged["masks"], masks))
print(f"the same targets in {count} test slices and our old friend")

# %% [markdown]
# ## What counts as a lesion?
#
# Two choices are hidden in these few lines. The pooling window has **8 neighbours**, so pixels that
# touch at a corner belong together; with 4 neighbours a ragged outline would break into crumbs, each a
# "lesion" that the detector is asked to find. The other choice is the **smallest area**. The released
# code drops objects of at most 100 pixels from a slice of 512 x 512. For smaller slices we scale this
# number with the area of the image.

# %% tags=["fold", "nbval-check-output"]
# @title Print the smallest area in each preset, and what it drops
for name in ("quick", "colab", "paper"):
    side, smallest = PRESETS[name].phantoms.size, PRESETS[name].min_area
    assert smallest == int(100 * (side / 512) ** 2) + 1
    print(f"{name:6} {side} x {side}: a lesion has at least {smallest} pixels")
every_mask = [lesions[s].read(i)[1] for s in SPLITS for i in range(len(lesions[s]))]
areas = torch.cat([mask_to_targets(each)["area"] for each in every_mask])
print(f"\nof {len(areas)} regions in the phantoms of preset {PRESET}")
for factor in (1, 4, 16):
    dropped = (areas < factor * least).float().mean()
    print(f"{dropped:5.1%} have fewer than {factor * least} pixels")


# %% tags=["fold"]
# @title Draw our old friend with larger and larger smallest areas
def draw_kept(min_area):
    """Our old friend with the instances of at least `min_area` pixels."""
    kept = mask_to_targets(mask, min_area=min_area)
    fig, ax = plt.subplots(figsize=(4.8, 4.3), layout="constrained")
    _ = plotting.show_lesions(image, kept, ax)
    _ = ax.set_title(f"{min_area} pixels or more: {len(kept['labels'])} lesions")
    return fig


smallest_areas = [least * factor for factor in (1, 10, 15, 20, 25)]
frame_slider(
    [draw_kept(area) for area in smallest_areas],
    [f"{area} pixels" for area in smallest_areas],
    "Smallest area of a lesion",
    "Our old friend with the boxes of the lesions that are large enough",
    caption="The larger the smallest area, the fewer lesions are left. Synthetic.",
    dpi=70,
)

# %% [markdown]
# The preset's own value drops only slivers, which a rough outline or the border of the lung has cut
# off. But the choice matters when models are compared: the released code drops small objects from the
# *ground truth*, too, before it computes average precision (AP), the usual measure of detectors
# ([chapter 5](05_segmenter.ipynb)). A small lesion that the detector misses
# then costs nothing, and one that it finds has nothing to match. So ask which smallest area stands
# behind an AP before you compare it with another.
#
# ## Few and small
#
# Figure 1 of the paper describes the real masks by two statements: the great majority of slices have
# fewer than 5 regions of each class, and the great majority of regions are small, GGO below 2 % of the
# image and C below 1 % {cite:p}`TerSarkisov2020`. Here are the same histograms for our training
# phantoms, which were drawn to be similar.

# %% tags=["fold"] mystnb={"image": {"alt": "Two histograms. Left: most slices have fewer than five regions of either class. Right: most regions cover less than two percent of the image."}, "figure": {"caption": "Figure 1 of the paper, remade on phantoms: regions in a slice (left) and area of a region (right). Lesion set, training split, COVID-19 only. Synthetic."}}
# @title Draw Figure 1 of the paper on phantoms
statistics = lesion_statistics(lesions["train"])
counts = np.arange(statistics.counts.max() + 1)  # 0, 1, 2, ... regions
percent = 100 * statistics.region_fractions  # of the image
edges = np.linspace(0, percent.max(), 21)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for i, name in enumerate(("GGO", "C")):
    colour, hatch = plotting.LESION_COLOURS[i], plotting.LESION_HATCHES[i]
    with_count = np.bincount(statistics.counts[:, i], None, len(counts))
    regions = percent[statistics.region_labels == i + 1]
    for ax, left, heights in (
        (axes[0], counts, with_count / len(statistics.counts)),
        (axes[1], edges[:-1], np.histogram(regions, edges)[0] / len(regions)),
    ):
        width = 0.4 * (left[1] - left[0])  # the two classes stand side by side
        look = {"color": colour, "hatch": hatch, "edgecolor": "k", "linewidth": 0.5}
        look |= {"align": "edge", "label": name}
        _ = ax.bar(left + i * width, 100 * heights, width, **look)
        _ = ax.legend()
_ = axes[0].set(xlabel="Regions in a slice (count)", ylabel="Slices (%)")
_ = axes[0].set_xticks(counts + 0.4, counts)
_ = axes[1].set_xlabel("Area of a region (% of the image)")
_ = axes[1].set_ylabel("Regions of the class (%)")
plt.show()

# %% tags=["fold", "nbval-check-output"]
# @title Print how few and how small
few = statistics.share_of_slices_below(5)
small = statistics.share_of_regions_below(0.02, 0.01)
none = (statistics.counts.sum(axis=1) == 0).mean()
print("phantoms, training split of the lesion set")
print(f"slices with fewer than 5 regions:  GGO {few[0]:.0%}, C {few[1]:.0%}")
print(f"regions below 2 % (GGO), 1 % (C):  GGO {small[0]:.0%}, C {small[1]:.0%}")
print(f"slices without any lesion:         {none:.0%}")

# %% [markdown]
# Small lesions need small anchors ([chapter 2](02_region_proposals.ipynb)). And since most candidate
# boxes are background, training has to look for the others ([chapter 4](04_losses.ipynb)).
#
# ## Splits go by patient
#
# Slices of one patient are alike: the same chest, the same scanner, often the same lesion a little
# higher up. So all slices of a patient must land on one side of a split. The check takes a few lines,
# and it covers both sets, because the detector must not have learned from a patient on whom the
# classifier is tested.

# %% tags=["nbval-check-output"]
groups = {f"masks {s}": set(lesions[s].patients) for s in SPLITS}
groups |= {f"labels {s}": set(slices[s].patients) for s in SPLITS}
for a in groups:
    for b in groups:
        assert a == b or not groups[a] & groups[b], f"{a} and {b} overlap"
print(f"no patient is in two of the {len(groups)} groups of phantoms")

# %% [markdown]
# What would happen if we ignored patients? Let us try it. We take the training slices of the class set
# and split them 80 to 20, once by patient and once slice by slice. Our model could not be simpler: it
# shrinks each slice to a thumbnail of 8 x 8 grey values, looks for the nearest thumbnail in training,
# and copies its class. With each accuracy we print its 95 % interval, that is how far the choice of test
# patients may have moved it by chance ([chapter 10](10_evaluation.ipynb)).


# %%
def thumbnail(picture):
    """A slice [3, H, W] as 8 x 8 mean grey values, [64]."""
    return adaptive_avg_pool2d(picture[:1], 8).flatten()


thumbnails = {}  # split -> [M, 64], too coarse to show a small lesion
for split in ("train", "test"):
    read = (slices[split][i][0] for i in range(len(slices[split])))
    thumbnails[split] = torch.stack([thumbnail(each) for each in read])
patients = np.array(slices["train"].patients)  # [M]
classes = np.array(slices["train"].labels)  # [M]

# %%
order = np.random.default_rng(SEED).permutation(len(patients))
cut = int(0.8 * len(order))
by_patient = split_by_patient(patients.tolist(), (0.8, 0.2), seed=SEED)
splits = {"by patient": by_patient, "by slice": (order[:cut], order[cut:])}


def nearest(train, held_out):
    """For each slice that is held out, the training slice most like it."""
    x = thumbnails["train"]
    return train[torch.cdist(x[held_out], x[train]).argmin(dim=1).numpy()]


# %%
copied = {}
for name, (train, held_out) in splits.items():
    train, held_out = np.asarray(train), np.asarray(held_out)
    copied[name] = held_out, nearest(train, held_out)
    truth, guess = (classes[which] for which in copied[name])
    owners = [patients[which] for which in copied[name]]
    low, high = patient_bootstrap(
        truth,
        guess,
        owners[0],
        lambda counts: report(counts)["accuracy"],
    )
    print(f"{name:10}: accuracy {(truth == guess).mean():.0%}", end=" ")
    print(f"(95 %: {low:.0%} to {high:.0%}),", end=" ")
    print(f"copied from the same patient: {np.equal(*owners).mean():.0%}")

# %% [markdown]
# Guessing would be right in a third of the slices. Judged by patient, copying is worth hardly more than
# a guess; judged by slice, the same model looks good, and that difference is the flattery of a leaky
# split. It knows no more about lesions than before. It recognises patients, not lesions.

# %% tags=["fold"] mystnb={"image": {"alt": "Three synthetic slices: a query, its nearest neighbour in a split by slice, which is the same patient, and its nearest neighbour in a split by patient, which is another patient with another class."}, "figure": {"caption": "A slice (left) and the training slice that the model copies. In the split by slice it is a slice of the same patient. Chosen as an example in which the other split copies a wrong class. Phantoms."}}
# @title Draw a slice and the two slices that the model copies
pairs = {
    name: dict(zip(query.tolist(), match.tolist(), strict=True))
    for name, (query, match) in copied.items()
}
trios = ((i, a, pairs["by patient"].get(i)) for i, a in pairs["by slice"].items())
trio = next(
    (i, a, b)
    for i, a, b in trios
    if b is not None and patients[a] == patients[i] and classes[b] != classes[i]
)
fig, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
for ax, i, what in zip(axes, trio, ("query", *reversed(splits)), strict=True):
    _ = plotting.show_slice(slices["train"][i][0], ax)
    who = f"patient {patients[i]}: {IMAGE_CLASSES[classes[i]]}"
    _ = ax.set_title(f"{what}\n{who}", fontsize=10)
plt.show()

# %% [markdown]
# A phantom patient has three slices here, so many patients end up on one side by chance. In the public
# test list a COVID-19 patient has 37 on average (below), and then practically everybody would be on
# both sides. Exercise 2 gives the formula.
#
# ## What "7.06" means
#
# The paper trains $S$ on 3,000 slices of COVIDx-CT, 1,000 of each class, and tests on all of the
# published test split. The abstract stresses the ratio of test to training data: 7.06. What is counted
# there? The split is published as three lists, one slice a line, and a line names the patient
# {cite:p}`Gunraj2020`. So we can count without a single image.

# %% tags=["fold", "nbval-check-output"]
# @title Count slices and patients in the public lists of COVIDx-CT-1
# split: slices and patients of (Control, common pneumonia, COVID-19)
PUBLIC = {
    "train": ((27201, 22061, 12520), (144, 420, 300)),
    "val": ((9107, 7400, 4529), (47, 190, 95)),
    "test": ((9450, 7395, 4346), (52, 125, 116)),
}


def counts_of(entries):
    """Slices and patients of each class in a list."""
    parts = [parse_name(entry.name) for entry in entries]
    people = [label for label, _ in {(part.label, part.patient) for part in parts}]
    labels = [part.label for part in parts]
    return tuple(tuple(each.count(c) for c in range(3)) for each in (labels, people))


# the folder of the three lists, if you have them
lists = os.environ.get("COVIDMASK_SPLITS")
if lists:
    public = {s: read_split(Path(lists) / f"{s}_COVIDx_CT-1.txt") for s in SPLITS}
    assert {s: counts_of(entries) for s, entries in public.items()} == PUBLIC
    people = [{entry.patient for entry in entries} for entries in public.values()]
    assert len(set.union(*people)) == sum(map(len, people)), "nobody is in two splits"


def row(values):
    return "".join(f"{value:11,.0f}" for value in values)


print("COVIDx-CT-1 lists     Control  pneumonia   COVID-19        all")
for split, counted in PUBLIC.items():
    n, people = ((*values, sum(values)) for values in counted)
    print(f"{split:5} slices      {row(n)}")
    print(f"      patients    {row(people)}")
    print(f"      slices each {row(np.divide(n, people))}")

# %% tags=["fold"] mystnb={"image": {"alt": "Two groups of three bars for the public test split. By slices control is the largest class, by patients it is the smallest."}, "figure": {"caption": "The public COVIDx-CT-1 test split counted in two ways. A control contributes a whole scan, a patient with a disease only chosen slices, so a metric over slices rests on few controls. Counts from the published list."}}
# @title Draw the public test split by slices and by patients
n, people = PUBLIC["test"]
ax = plotting.get_ax(7, 3.8)
for c, hatch in enumerate(("", "///", "...")):
    values = 100 * n[c] / sum(n), 100 * people[c] / sum(people)
    look = {"color": plotting.CLASS_COLOURS[c], "hatch": hatch, "edgecolor": "white"}
    look["label"] = IMAGE_CLASSES[c]
    bars = ax.bar(np.arange(2) + 0.27 * (c - 1), values, 0.25, **look)
    _ = ax.bar_label(bars, [f"{n[c]:,}", f"{people[c]}"], fontsize=9)
_ = ax.set_xticks(range(2), [f"{sum(n):,} slices", f"{sum(people)} patients"])
_ = ax.set(xlabel="Unit that is counted", ylim=(0, 52))
_ = ax.set_ylabel("Share of the test split (%)")
_ = ax.legend()
plt.show()

# %% [markdown]
# The list of those 3,000 training slices was published with the code; it names 608 patients.

# %% tags=["nbval-check-output"]
print(f"test / training in slices:   {sum(n) / 3000:.2f}")
print(f"test / training in patients: {sum(people) / 608:.2f}")

# %% [markdown]
# So 7.06 is a ratio of *slices*. In patients it is the other way round: the model was trained on more
# patients than it was tested on. The paper takes the 7.06 as a sign that the model generalises. But
# the slices of a scan are far from independent, so how sure a result is depends on the number of
# patients ([chapter 10](10_evaluation.ipynb)), and a ratio says nothing about how different the test
# patients are. What it does say is that 3,000 labelled slices were enough to learn from.
#
# No patient is in two of the public splits. The paper and the lists differ in some counts; [paper v
# code](paper_v_code.ipynb) shows them side by side.
#
# ## What a slice label gives away
#
# A scan runs from above the lungs to below them. For common pneumonia and COVID-19, COVIDx-CT kept the
# slices that show an infection. For controls it kept whole scans, since there is no infection to select
# by. The lists show it, because slices are numbered within a scan.

# %% tags=["fold", "nbval-check-output"]
# @title Count the scans of the public lists that are whole
# all three lists: scans; those that begin at slice 0; those of them without a gap
PUBLIC_SCANS = {0: (472, 472, 472), 1: (1052, 23, 4), 2: (833, 8, 2)}
if lists:
    scans = {}
    for part in (parse_name(e.name) for entries in public.values() for e in entries):
        scans.setdefault(part[:3], []).append(int(part.slice))
    for label, expected in PUBLIC_SCANS.items():
        own = [numbers for scan, numbers in scans.items() if scan[0] == label]
        begin = [numbers for numbers in own if min(numbers) == 0]
        whole = [numbers for numbers in begin if max(numbers) + 1 == len(numbers)]
        assert tuple(map(len, (own, begin, whole))) == expected
print("COVIDx-CT-1 lists      scans   begin at slice 0   and have no gap")
for label, (every, begin, whole) in PUBLIC_SCANS.items():
    print(f"{IMAGE_CLASSES[label]:18} {every:9,} {begin:18} {whole:17}")

# %% [markdown]
# So the first slices of a scan are nearly always controls. A model that recognises "this is above the
# lungs" has learned how slices were selected, and nothing about a disease. Such a *shortcut* has been
# found in models of COVID-19 on other data {cite:p}`DeGrave2021,Roberts2021`.
#
# How much is it worth here? Each line of the lists also holds the box around the body. With the
# lists at hand the next cell trains a logistic regression on the slice number and this box: five numbers,
# and not one pixel. Otherwise it prints what we measured. The regression tells controls from the others, and we judge it by **balanced accuracy**, the mean of the two
# sensitivities, which is 50 % for guessing.


# %% tags=["fold", "nbval-check-output"]
# @title Classify real slices without looking at them
def parabola():
    """Logistic regression on features, their squares and products."""
    squares = PolynomialFeatures(2, include_bias=False)
    last = LogisticRegression(class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), squares, StandardScaler(), last)


def linear():
    """Logistic regression on the features themselves, with small weights."""
    last = LogisticRegression(C=0.003, class_weight="balanced", max_iter=2000)
    return make_pipeline(StandardScaler(), last)


PUBLIC_WITHOUT_PIXELS = 0.63  # on the test list; checked where the lists are
if lists:
    found = []
    for split in ("train", "test"):
        x = [(int(parse_name(e.name).slice), *e.box) for e in public[split]]
        found.append((np.array(x, dtype=float), [e.label > 0 for e in public[split]]))
    guess = parabola().fit(*found[0]).predict(found[1][0])
    reached = balanced_accuracy_score(found[1][1], guess)
    assert abs(reached - PUBLIC_WITHOUT_PIXELS) < 0.02, reached
print("COVIDx-CT-1 test list, no pixel seen:", end=" ")
print(f"balanced accuracy {PUBLIC_WITHOUT_PIXELS:.0%}")

# %% [markdown]
# That is better than guessing, on real patients, from a text file. (Part of it may come from the box
# and not from the position, for example if scanners differ between classes. That would have nothing to
# do with a disease either.)
#
# With phantoms we can do the experiment that the lists do not allow: change the positions and nothing
# else. We compare two designs, which differ in their controls only:
#
# - **selected**, as in COVIDx-CT: controls from anywhere in the lungs, the others where a lesion shows;
# - **matched**, as in our phantoms on disk: controls come from the same positions as the others.

# %% tags=["fold"] mystnb={"image": {"alt": "Two histograms of slice positions from apex to base. Left, selected: controls are spread over the whole lung, the others leave out both ends. Right, matched: both have about the same shape."}, "figure": {"caption": "Positions of the training slices. When controls come from whole scans (left) the ends belong to them; matched positions (right) say nothing. Phantoms."}}
# @title Draw new controls from whole scans, and the positions in both designs
rng = np.random.default_rng(SEED)
designs = {"selected": {}, "matched": {}}  # -> split -> arrays, one entry a slice
for split, first_seed in (("train", 10_000), ("test", 20_000)):
    dataset = slices[split]
    at = [int(parse_name(name).slice) / 1000 for name in dataset.names]
    old = {
        "position": np.array(at)[:, None],  # [M, 1]
        "thumbnail": thumbnails[split].numpy(),  # [M, 64]
        "sick": np.array(dataset.labels) > 0,  # [M]
        "patient": np.array(dataset.patients),  # [M]
    }
    each = preset.phantoms.slices_per_patient
    seeds = first_seed + np.arange(class_statistics(dataset).patients[0]).repeat(each)
    at = rng.uniform(0, 1, len(seeds))
    small = []
    for i, position in enumerate(at.tolist()):
        if i % each == 0:
            control = make_patient(int(seeds[i]), 0)
        drawn = render(control, position, size)[0]
        small.append(thumbnail(torch.from_numpy(drawn)[None]).numpy())
    fresh = {
        "position": at[:, None],
        "thumbnail": np.stack(small),
        "sick": np.zeros(len(seeds), dtype=bool),
        "patient": np.char.add("new ", seeds.astype(str)),
    }
    kept = old["sick"]
    designs["matched"][split] = old
    pairs = {key: (fresh[key], old[key][kept]) for key in old}
    designs["selected"][split] = {key: np.concatenate(p) for key, p in pairs.items()}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
groups_drawn = (
    (False, "control", plotting.GREEN, "-"),
    (True, "sick", plotting.VERMILLION, "--"),
)
for ax, (design, split) in zip(axes, designs.items(), strict=True):
    position, sick = split["train"]["position"][:, 0], split["train"]["sick"]
    for value, label, colour, line in groups_drawn:
        share, edges = np.histogram(position[sick == value], bins=20, range=(0, 1))
        share = 100 * share / share.sum()
        _ = ax.stairs(share, edges, color=colour, ls=line, lw=1.5, label=label)
    _ = ax.set(xlabel="Position (0 apex, 1 base; no unit)", title=design)
_ = axes[0].set_ylabel("Slices of the group (%)")
_ = axes[0].legend(loc="lower center")
plt.show()

# %% [markdown]
# Control or sick? One classifier is given the position alone, and another the 64 grey values of a
# thumbnail, which hold the lesions and the position mixed together. We train each on one design and
# test it on both.


# %%
def balanced(counts):
    return np.mean(report(counts)["sensitivity"])


def judge(feature, model, trained_on, tested_on):
    """Balanced accuracy, and its interval from resampling patients."""
    train = designs[trained_on]["train"]
    test = designs[tested_on]["test"]
    guess = model.fit(train[feature], train["sick"]).predict(test[feature])
    answers = test["sick"] * 1, guess * 1, test["patient"]
    return balanced_accuracy_score(*answers[:2]), patient_bootstrap(
        *answers,
        balanced,
        classes=2,
    )


# %% tags=["fold"]
# @title Train on each design, test on both, and print the table
results = {}
print("balanced accuracy (95 %)        tested on selected       tested on matched")
for feature, new_model in (("position", parabola), ("thumbnail", linear)):
    for trained_on in designs:
        print(f"{feature:10}trained on {trained_on:8}", end="")
        for tested_on in designs:
            value, (low, high) = judge(feature, new_model(), trained_on, tested_on)
            results[feature, trained_on, tested_on] = value
            print(f"{f'{value:.0%} ({low:.0%} to {high:.0%})':>21}", end="   ")
        print("(phantoms)")
assert results["position", "selected", "selected"] > 0.55
assert abs(results["position", "selected", "matched"] - 0.5) < 0.1

# %% [markdown]
# Read the first line from left to right. With selected slices, position alone predicts the class,
# although it knows nothing about any lesion; where positions are matched, nothing is left of that. (In
# the second line there was nothing to learn. A rule made of noise may still happen to separate the ends
# of the lungs from the middle.)
#
# Now look at the right column for the thumbnails. Where position says nothing, the model that was
# trained on selected slices is far behind the one that was trained on matched slices. Both had seen the
# same sick slices. The first found the easier rule, and so it did not learn the other one.
#
# The test split of COVIDx-CT was selected in the same way as its training split. So the published test
# cannot show how much of a result is of this kind, and neither can our phantoms, since a real scan also
# has slices above and below the lungs. Controls at matched positions would show it, or a test on whole
# scans.
#
# ## What neither label says
#
# - The masks are of COVID-19 patients only. The detector never sees a mask of a bacterial pneumonia; it
#   must find there what it learned elsewhere.
# - A slice label says what the patient has *and* that this slice shows it. A model of such slices has
#   not been asked about a whole scan, or about a patient.
# - Both sets come from one collection. Scanner, hospital and grey-value window may differ between
#   classes in ways that nobody recorded ([chapter 14](14_another_hospital.ipynb)).
# - How common a class is in the lists is not how common it is in a clinic, and predictive values change
#   with it ([chapter 10](10_evaluation.ipynb)).

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Two patches of GGO touch at one corner. How many instances do we train on?**
#
# - [ ] Two, because they share no side. :: That is the rule with 4 neighbours; we use 8.
# - [x] One, because a corner is enough. :: With 8 neighbours a path leads across the corner.
# - [ ] One, because instances of a class are always merged. :: Two patches that do not touch stay two.
#
# **2. A GGO surrounds a core of consolidation. What does the detector get as targets?**
#
# - [ ] One lesion of class GGO, the larger of the two. :: Each class is searched on its own.
# - [ ] One lesion without a class, since two classes touch. :: A target always has one class.
# - [x] Two lesions, one of each class. :: A component holds pixels of one class only.
#
# **3. Where does a box of our targets end on the right?**
#
# - [x] At the edge behind the last pixel. :: So $x_2 - x_1$ is the width in pixels, and never 0.
# - [ ] At the centre of the last pixel. :: A lesion one pixel wide would then have no width.
# - [ ] One pixel after that edge, for safety. :: The box would be larger than the lesion.
#
# **4. Why does a split by slice flatter a model?**
#
# - [ ] Its training part has more slices. :: Both splits here train on four fifths.
# - [x] The model can recognise patients that it has seen. :: Most copied slices were of the same patient.
# - [ ] Its test part has fewer classes. :: All three classes are in both.
#
# **5. What does "test/train = 7.06" count?**
#
# - [ ] Patients: for each one in training, seven are tested. :: In patients the ratio is below 1.
# - [ ] Slices: the model is seven times as sure on the test. :: A ratio of sizes says nothing of this kind.
# - [x] Slices: seven are tested for each one in training. :: And slices of a patient are alike.
#
# **6. A model of whole-scan controls and selected sick slices gets a high accuracy on a test of the same
# kind. What do you know?**
#
# - [x] It may read positions; this test cannot tell. :: Test and training share the same selection.
# - [ ] It finds lesions, because the patients are new. :: A shortcut works on new patients, too.
# - [ ] It has overfitted, because the positions differ. :: In such a test they do not differ from training.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Count them yourself
#
# Kind: pencil, *
#
# Here is a very small mask; G is ground glass, C is consolidation:
#
# ```text
# . G . . . .
# . . G . . C
# . . G . C .
# . . . . . G
# ```
#
# How many instances does it have with 8 neighbours, how many with 4, and which box [x1, y1, x2, y2]
# does the first GGO get (8 neighbours)? Let `my_answer()` return the three.
#
# Hint: Treat each class alone, as if the other were background. Columns are x, rows are y, and both
# begin at 0.


# %% tags=["starter"]
def my_answer():
    """Instances with 8 neighbours, instances with 4, box of the first GGO."""
    raise NotImplementedError("return a, b, [x1, y1, x2, y2]")


# %% tags=["solution"]
# @title Solution
def my_answer():
    """Instances with 8 neighbours, instances with 4, box of the first GGO."""
    # 8: the chain of three G, the lone G, both C together
    # 4: the G on top, the two G below it, the lone G, and two C
    return 3, 5, [1, 0, 3, 3]


# %% tags=["wrong"]
def my_answer():
    return 3, 5, [1, 0, 2, 2]  # ends at the last pixel


# %% tags=["wrong"]
def my_answer():
    return 1, 5, [1, 0, 3, 3]  # lets lesions of two classes join


# %% tags=["check"]
# @title Check your answer
tiny = [list(line) for line in (".G....", "..G..C", "..G.C.", ".....G")]
tiny = np.array([["..GC".rindex(letter) for letter in line] for line in tiny], np.uint8)
with_8, with_4, box = my_answer()
packaged = mask_to_targets(tiny)
crosses = sum(ndimage.label(tiny == code)[1] for code in (2, 3))  # 4 neighbours
assert with_8 == len(packaged["labels"]), "with 8: corners join, but never G with C"
assert with_4 == crosses, "4 neighbours: a corner does not join; count the pieces again"
given = [float(number) for number in box]
assert given[:2] == packaged["boxes"][0, :2].tolist(), "x1, y1: first column, first row"
assert given[2:] == packaged["boxes"][0, 2:].tolist(), "it ends behind the last pixel"
print("Right.")

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · On both sides
#
# Kind: pencil, *
#
# In a split by slice, each slice goes to training with probability `p`, on its own. What is the
# probability that a patient with `slices_each` slices has some on both sides? Write it as
# `on_both_sides(slices_each, p)`.
#
# Hint: It is easier to say how a patient ends up on *one* side.


# %% tags=["starter"]
def on_both_sides(slices_each, p):
    """Probability that a patient has slices in training and outside."""
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def on_both_sides(slices_each, p):
    """Probability that a patient has slices in training and outside."""
    return 1 - p**slices_each - (1 - p) ** slices_each


each = preset.phantoms.slices_per_patient
seen = len(set(patients[splits["by slice"][0]]) & set(patients[splits["by slice"][1]]))
counted = seen / len(set(patients))
print(f"{each} slices each: {on_both_sides(each, 0.8):.0%} expected,", end=" ")
print(f"{counted:.0%} counted in our split (phantoms)")
print(f"37 slices each: {on_both_sides(37, 0.8):.2%}")


# %% tags=["wrong"]
def on_both_sides(slices_each, p):
    return 1 - p**slices_each


# %% tags=["wrong"]
def on_both_sides(slices_each, p):
    return 2 * p * (1 - p)


# %% tags=["check"]
# @title Check your answer
assert abs(on_both_sides(1, 0.8)) < 1e-9, "one slice is always on one side"
for each, p in ((2, 0.5), (3, 0.8), (5, 0.3)):
    drawn = np.random.default_rng(0).random((20_000, each)) < p
    share = (drawn.any(axis=1) & ~drawn.all(axis=1)).mean()
    off = abs(on_both_sides(each, p) - share)
    assert off < 0.02, f"{each} slices, p = {p}: a simulation gives something else"
print("Right.")

# %% [markdown] tags=["answer"]
# With 37 slices, the average of a COVID-19 patient in the public test list, nobody would be left on one
# side: a split by slice of such scans tests on known patients only.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A reader with a hidden flaw
#
# Kind: find the bug, **
#
# This function says which label each lesion code of a mask gets: GGO, code 2, should get label 1, and C,
# code 3, should get label 2. It works for our old friend, and the released code reads its masks by the
# same rule. For which masks does it fail? Repair it; codes that do not occur stay out of the result.
#
# Hint: Call it with `np.array([0, 1, 3])`, a mask without GGO, and with `np.array([0, 2])`, a mask in
# which nobody marked the lung.


# %% tags=["starter"]
def labels_of(mask):
    """{code: label} of the lesion codes 2 and 3 that occur in a mask."""
    present = np.unique(mask).tolist()  # ascending
    place = {code: at for at, code in enumerate(present)}
    return {code: place[code] - 1 for code in present if code >= 2}


# %% tags=["solution"]
# @title Solution
def labels_by_place(mask):
    """The rule with the flaw."""
    present = np.unique(mask).tolist()
    return {code: present.index(code) - 1 for code in present if code >= 2}


def labels_of(mask):
    """{code: label} of the lesion codes 2 and 3 that occur in a mask."""
    return {code: code - 1 for code in (2, 3) if (mask == code).any()}


wrong = sum(labels_by_place(each) != labels_of(each) for each in every_mask)
print(f"phantoms: {wrong} of {len(every_mask)} masks are read wrongly")
no_lung = [np.where(each == 1, 0, each) for each in every_mask]
wrong = sum(labels_by_place(each) != labels_of(each) for each in no_lung)
print(f"with the lung unmarked: {wrong} of {len(every_mask)}")


# %% tags=["wrong"]
def labels_of(mask):
    present = sorted({0, 1, *np.unique(mask).tolist()})  # lung is always there
    return {code: present.index(code) - 1 for code in present if code >= 2}


# %% tags=["wrong"]
def labels_of(mask):
    return {2: 1, 3: 2}


# %% tags=["check"]
# @title Check your answer
assert labels_of(np.array([0, 1, 2, 3])) == {2: 1, 3: 2}, "all codes: 2 -> 1, 3 -> 2"
assert labels_of(np.array([0, 1])) == {}, "codes that do not occur stay out"
assert labels_of(np.array([0, 1, 3])).get(3) == 2, "without GGO, C is called GGO"
assert labels_of(np.array([0, 2])).get(2) == 1, "GGO is lost when no lung is marked"
assert labels_of(np.array([0, 2, 3])) == {2: 1, 3: 2}, "two lesions, and no lung"
print("Right.")

# %% [markdown] tags=["answer"]
# The rule names codes by their place among those that occur. Without GGO, consolidation moves up and is
# called GGO. Without marked lung, the first lesion class becomes 0, the background, and is lost; in a
# set that marks no lung, such as COVID-SemiSeg ([chapter 15](15_real_lesions.ipynb)), that is every
# slice with a lesion. How many real masks of CNCB are affected we do not know. One line would tell:
# count the masks that hold code 3 and not code 2.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Split by patient
#
# Kind: write a function, **
#
# Write `split(patients, share, seed)`. It gets the patient of each slice and returns two arrays of
# indices: training, with about `share` of the *patients* drawn at random, and the rest. The same seed
# gives the same split.
#
# Hint: Shuffle the distinct patients (`np.unique`), take the first `share` of them, and ask `np.isin`
# which slices are theirs.


# %% tags=["starter"]
def split(patients, share, seed):
    """Indices of the slices in training, and of the others."""
    raise NotImplementedError("draw patients, then collect their slices")


# %% tags=["solution"]
# @title Solution
def split(patients, share, seed):
    """Indices of the slices in training, and of the others."""
    names = np.random.default_rng(seed).permutation(np.unique(patients))
    chosen = names[: round(share * len(names))]
    training = np.isin(patients, chosen)
    return np.flatnonzero(training), np.flatnonzero(~training)


parts = split(patients, 0.8, SEED)
print("slices:", [len(part) for part in parts])


# %% tags=["wrong"]
def split(patients, share, seed):  # slices, not patients
    order = np.random.default_rng(seed).permutation(len(patients))
    cut = round(share * len(patients))
    return order[:cut], order[cut:]


# %% tags=["wrong"]
def split(patients, share, seed):  # nothing is drawn
    names = np.unique(patients)
    training = np.isin(patients, names[: round(share * len(names))])
    return np.flatnonzero(training), np.flatnonzero(~training)


# %% tags=["check"]
# @title Check your answer
people = np.repeat([f"p{number:02d}" for number in range(40)], np.arange(1, 41))
ones, others = (np.asarray(part) for part in split(people, 0.75, seed=1))
together = np.sort(np.concatenate([ones, others]))
assert np.array_equal(together, np.arange(len(people))), "each slice goes to one side"
assert not set(people[ones]) & set(people[others]), "a patient is on both sides"
drawn = len(set(people[ones]))
assert abs(drawn - 30) <= 1, f"{drawn} of 40 patients in training; 75 % are 30"
again, other = split(people, 0.75, seed=1)[0], split(people, 0.75, seed=2)[0]
assert set(again) == set(ones), "the same seed must give the same split"
assert set(other) != set(ones), "another seed gives the same split: draw the patients"
print("Right.")

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Less held out, less leaky?
#
# Kind: predict, then run, **
#
# Put 50 %, 80 % and 95 % of the slices into training, slice by slice. Predict first: which way does the
# share of *patients* on both sides go, and which way the share of *held-out slices* whose patient is in
# training? Then count both. Which of the two makes a result too good?
#
# Hint: `order` from the chapter holds the slices in random order, so a first part of it can be training;
# `patients` holds the patient of each slice.

# %% tags=["solution"]
# @title Solution
for p in (0.5, 0.8, 0.95):
    ones, others = order[: int(p * len(order))], order[int(p * len(order)) :]
    both = set(patients[ones]) & set(patients[others])
    known = np.isin(patients[others], patients[ones]).mean()
    print(f"{p:.0%} in training: patients on both sides", end=" ")
    print(f"{len(both) / len(set(patients)):.0%}", end=", ")
    print(f"held-out slices of known patients {known:.0%}")

# %% [markdown] tags=["answer"]
# With 95 % in training, few patients are on both sides, because few have any held-out slice at all. But
# nearly every held-out slice has a relative in training, and it is the held-out slices that are judged.
# So the second share matters, and the split has become leakier, not less so.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · Merged classes
#
# Kind: experiment, **
#
# In the mode `"merged"` of `mask_to_targets(mask, "merged", least)`, GGO and C are one class, joined
# before components are sought. How many instances do the phantoms lose by it, and in how many masks?
# Can you compare the average precision of a detector trained this way with that of the usual one?
#
# Hint: `every_mask` from the chapter holds the masks of all phantoms of the lesion set.

# %% tags=["solution"]
# @title Solution
two, merged = (
    np.array([len(mask_to_targets(each, mode, least)["labels"]) for each in every_mask])
    for mode in ("both", "merged")
)
print(f"instances as two classes: {two.sum()}, merged: {merged.sum()}")
print(f"masks with fewer instances: {(merged < two).sum()} of {len(two)}")

# %% [markdown] tags=["answer"]
# A consolidation that touches GGO becomes one lesion with it. The two modes ask for different objects,
# so neither their numbers of instances nor their APs can be compared.

# %% [markdown]
# ## What we learned
#
# 1. Masks of COVID-19 patients teach the detector; slice labels of three classes teach the classifier.
# 2. An instance is a connected component of one class, and connectivity and smallest area define it.
# 3. Look codes up by value: named by their place, consolidation turns into GGO where GGO is absent.
# 4. Split by patient: in a split by slice, a model that only recognises patients looks good.
# 5. Slices that were selected differently in each class let a model predict the class without a lesion.
#
# ## Further reading
#
# {cite:t}`Zhang2020` describe the CNCB collection, and {cite:t}`Gunraj2020` how COVIDx-CT was made from
# it. {cite:t}`Zhao2020scans` and {cite:t}`Zhao2020relation` describe what COVID-19 looks like on CT.
# {cite:t}`Roberts2021` review what goes wrong with data in models for COVID-19, and
# {cite:t}`DeGrave2021` show shortcuts in X-ray models.
