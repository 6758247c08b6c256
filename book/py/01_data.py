# %% [markdown]
# # 1 · The data
#
# Two data sets teach the two stages of COVID-CT-Mask-Net: lesion masks teach the detector, and
# slice labels teach the classifier. What do they hold, and what do their labels hide? Many later
# problems have their origin here.
#
# **After it you can**
#
# - read a lesion mask and turn it into the boxes, labels and masks that Mask R-CNN trains on;
# - say what connectivity, a smallest area and the naming of classes do to these targets;
# - map Hounsfield units to grey values by hand;
# - check that no patient crosses from training to test, and show what happens when one does;
# - say what a model can read off a slice label that has nothing to do with a disease.
#
# **You need** Python and some PyTorch. [Chapter 0](00_whole_path.ipynb) shows what the data are for,
# but this chapter runs alone. **Run time:** about a minute on two CPU cores in the preset `quick`
# (the first chapter that you run draws the phantoms once, which takes a few minutes more).
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a picture made by formulas and random numbers. The
# layout on disk is that of the real data, so the same code reads both. Numbers about the real data
# are counts from the public lists or come from the paper, and the text says so each time. Nothing
# here is for diagnosis.
# ```

# %% tags=["fold"]
# @title Imports and versions
import platform

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import (
    LUNG_WINDOW,
    LesionSlices,
    SliceImages,
    class_statistics,
    hounsfield_to_unit,
    lesion_statistics,
    make_patient,
    mask_to_targets,
    old_friend,
    parse_name,
    phantom_mask,
    read_split,
    render,
    split_by_patient,
    write_phantoms,
)
from covidmask.interactive import frame_slider

torch.manual_seed(0)
# this chapter needs no GPU
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"torchvision {torchvision.__version__}, Python {platform.python_version()}")

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# ## Two kinds of label
#
# | | lesion masks | slice labels |
# |---|---|---|
# | says | which pixels are lung, GGO, consolidation | control, common pneumonia or COVID-19 |
# | costs | an expert draws outlines | one word for each slice |
# | patients | COVID-19 only | all three classes |
# | trains | the detector, [chapter 5](05_segmenter.ipynb) | the module S, [chapter 7](07_covid_ct_mask_net.ipynb) |
# | real source | CNCB {cite:p}`Zhang2020` | COVIDx-CT {cite:p}`Gunraj2020`, made from CNCB |
# | on disk | `image/PATIENT/SLICE.png`, `mask/PATIENT/SLICE.png` | `CLASS_PATIENT_SCAN_SLICE.png` |
#
# The phantoms lie on disk in both layouts.

# %%
preset = PRESETS[PRESET]
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
SPLITS = ("train", "val", "test")
least, folder = preset.min_area, root / "lesions"
lesions = {s: LesionSlices(folder, s, min_area=least) for s in SPLITS}
slices = {s: SliceImages(root / "slices", s) for s in SPLITS}

# %% tags=["nbval-check-output"]
print("phantoms          slices  patients")
for split, dataset in lesions.items():
    people = len(set(dataset.patients))
    print(f"lesion set {split:6} {len(dataset):6} {people:9}")
for split, dataset in slices.items():
    found = class_statistics(dataset)
    total, people = found.slices.sum(), found.patients.sum()
    print(f"class set  {split:6} {total:6} {people:9}", end="   ")
    each = zip(found.slices, IMAGE_CLASSES, strict=True)
    print(", ".join(f"{n} {name}" for n, name in each))
print(lesions["test"].names[0], "|", slices["test"].names[-1])

# %% [markdown]
# ## What a mask file holds
#
# A mask is a picture of the same size as its slice. Each pixel holds a code: 0 background, 1 lung,
# 2 ground-glass opacity (GGO), 3 consolidation (C). Here is the mask of our old friend, a COVID-19
# phantom on which no model of this book was trained.

# %%
# float32 [H, W] in 0..1, uint8 [H, W]
image, mask = old_friend(preset.phantoms.size)
target = mask_to_targets(mask, min_area=preset.min_area)
names = ("background", "lung", "GGO", "C")
for code, count in enumerate(np.bincount(mask.ravel(), minlength=4)):
    share = count / mask.size
    print(f"code {code}  {names[code]:10} {share:6.1%} of the pixels")

# %% mystnb={"image": {"alt": "Our old friend three times: the slice in the lung window, with fat, muscle, ribs, spine and heart around the lungs; its mask with lung, GGO and consolidation in different colours; and the slice with a box and an outline around each lesion."}, "figure": {"caption": "Our old friend: slice, mask, and the instances made from the mask. GGO is drawn solid, consolidation (C) dashed or hatched. Synthetic."}}
fig, axes = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
_ = plotting.show_slice(image, axes[0])
_ = plotting.show_mask(mask, axes[1])
_ = plotting.show_lesions(image, target, axes[2])
titles = "slice", "mask: a code per pixel", "instances"
for ax, title in zip(axes, titles, strict=True):
    _ = ax.set_title(title)
plt.show()

# %% [markdown]
# Look for what is as bright as the consolidations in the slice. The heart is, and so are the large
# vessels and the muscles of the chest wall, but none of them is a lesion. The grey value of a pixel
# alone does not tell what it is.
#
# A little radiology helps to read the mask.
#
# - **GGO** is a hazy rise in density. Part of the air is still there, so the lung looks grey rather
#   than white, and vessels stay visible through it.
# - **Consolidation** is denser: fluid or cells have replaced the air. It is nearly as bright as soft
#   tissue and hides the vessels inside it.
# - **COVID-19** tends to show several lesions, in both lungs, near the pleura (the outer border),
#   often low and at the back, and often as GGO, some of it with consolidation.
# - **Common pneumonia**, where bacteria cause it, tends to fill one connected region such as a lobe,
#   often in one lung.
#
# In outline, this comes from the way the diseases spread. Fluid that fills neighbouring air spaces
# makes one solid region; a virus that harms the tissue in many places at once makes many hazy ones.
# So the number, place and size of the lesions carry information about the disease. But these are
# only tendencies, and single patients break them. The paper calls the differences subtle, and points
# to {cite:t}`Zhao2020scans`, {cite:t}`Zhao2020relation` and {cite:t}`Yan2020`. Both GGO and C occur
# in either disease.
#
# The phantoms follow this outline because we drew them so ([how the phantoms are
# made](phantoms_made.ipynb) has the rules). Their classes overlap, too: some common pneumonias are of
# the patchy kind that viruses cause, on both sides. What the phantoms show about the diseases is
# therefore no evidence about patients.
#
# ## From a CT value to a grey value
#
# A scanner measures how strongly a point weakens X-rays, in Hounsfield units (HU): air is -1000,
# water 0, soft tissue about 40, bone several hundred. A picture has room for 0 to 1. A *window* with
# level $\ell$ and width $w$ chooses which HU it shows:
#
# $$ v = \mathrm{clip}\left(\frac{\mathrm{HU} - (\ell - w/2)}{w},\ 0,\ 1\right). $$
#
# By hand, for the usual lung window (that of each phantom patient differs a little from it):

# %% tags=["nbval-check-output"]
level, width = LUNG_WINDOW
hu = np.array([-1000, -850, -600, 0, 40, 450], dtype=np.float32)
by_hand = np.clip((hu - (level - width / 2)) / width, 0, 1)
packaged = hounsfield_to_unit(hu, LUNG_WINDOW)
np.testing.assert_allclose(by_hand, packaged, atol=1e-6)
print(f"window: level {level:g} HU, width {width:g} HU")
tissues = "air", "lung", "haze", "water", "muscle", "bone"
for what, h, v in zip(tissues, hu, by_hand, strict=True):
    print(f"{what:7} {h:6.0f} HU -> {v:.3f}")
print(f"one of 255 grey steps is {width / 255:.1f} HU")

# %% [markdown]
# Everything above the window becomes 1 and everything below becomes 0, and an 8-bit file keeps 256
# steps. This cannot be undone. Both public sets come as PNG or JPEG pictures, so somebody has already
# chosen the window; with another window, a model meets other grey values
# ([chapter 15](15_real_lesions.ipynb)).
#
# Are grey values enough to find lesions? Here they are for each mask code, over the test slices of
# the lesion set.

# %%
greys = {code: [] for code in range(4)}
for i in range(len(lesions["test"])):
    picture, codes = lesions["test"].read(i)
    for code in greys:
        greys[code].append(picture[codes == code])
greys = {code: np.concatenate(parts) for code, parts in greys.items()}

# %% mystnb={"image": {"alt": "Four overlapping histograms of grey values: lung lies low, GGO in the middle, consolidation high, and the background has a peak of air on the left and soft tissue on the right."}, "figure": {"caption": "Grey values of each mask code. Lung (vessels, dependent density) overlaps GGO, and the chest wall overlaps consolidation, so no threshold separates them. Phantoms."}}
ax = plotting.get_ax(8, 4)
styles = (
    (plotting.BLACK, ":"),
    (plotting.GREEN, "-."),
    (plotting.SKY_BLUE, "-"),
)
for code, (colour, line) in enumerate((*styles, (plotting.ORANGE, "--"))):
    height, edges = np.histogram(greys[code], 60, (0, 1), density=True)
    middle = (edges[1:] + edges[:-1]) / 2
    _ = ax.plot(middle, height, color=colour, ls=line, label=names[code])
_ = ax.set(
    xlabel="Grey value (no unit)",
    ylabel="Density (share per unit of grey)",
    xlim=(0, 1),
)
to_hu = (
    lambda v: v * width + level - width / 2,
    lambda h: (h - level + width / 2) / width,
)
top = ax.secondary_xaxis("top", functions=to_hu)
_ = top.set_xlabel("Hounsfield units in the usual window (HU)")
_ = ax.legend()
plt.show()

# %%
low, high = np.quantile(greys[2], [0.25, 0.75])
hits = [((v > low) & (v < high)).sum() for v in greys.values()]
share = hits[2] / sum(hits)
print("pixels with the grey of the middle half of GGO:", end=" ")
print(f"{share:.0%} of them are GGO (phantoms)")

# %% [markdown]
# The rest is something else of the same grey, such as vessels, denser lung, or the edges of organs. So
# shape and surroundings must help, and that is why the detector is a convolutional network with a
# field of view.
#
# ## Why instances and not pixels
#
# A network could label pixels and stop there (semantic segmentation
# {cite:p}`Long2015,Ronneberger2015`). The paper takes *instances*: each lesion is an object of its
# own {cite:p}`He2017`. The next cell looks for two slices with the same number of lesion pixels, one
# of common pneumonia and one of COVID-19, whose numbers of lesions differ most. (Slices of the class
# set have no mask on disk, but the generator can draw it again.)

# %%
test = slices["test"]
size = preset.phantoms.size
# every second slice will do
chosen = [i for i in range(0, len(test), 2) if test.labels[i] > 0]
true_masks = {i: phantom_mask(test.names[i], size) for i in chosen}
found = {i: mask_to_targets(true_masks[i], min_area=least) for i in chosen}
area = {i: float(t["area"].sum()) for i, t in found.items()}
number = {i: len(t["labels"]) for i, t in found.items()}
pairs = [
    (number[b] - number[a], area[a], a, b)
    for a in chosen
    if test.labels[a] == 1
    for b in chosen
    if test.labels[b] == 2 and abs(area[a] - area[b]) < 0.02 * area[a]
]
_, _, pneumonia, covid = max(pairs)
for i in (pneumonia, covid):
    name, share = IMAGE_CLASSES[test.labels[i]], area[i] / size**2
    print(f"{name:16}  lesions: {number[i]}, on {share:.1%} of the image")

# %% mystnb={"image": {"alt": "Two synthetic chest slices with boxes around the lesions: a common pneumonia with few, and a COVID-19 slice with more and smaller ones."}, "figure": {"caption": "Almost the same number of lesion pixels, but not the same lesions. A sum over pixels cannot tell the two apart; a count of boxes can. Phantoms, a pair chosen for its contrast."}}
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
for ax, i in zip(axes, (pneumonia, covid), strict=True):
    _ = plotting.show_lesions(test[i][0], found[i], ax)
    name = IMAGE_CLASSES[test.labels[i]]
    _ = ax.set_title(f"{name}, number of lesions: {number[i]}")
plt.show()

# %% [markdown]
# ## From pixels to instances
#
# The mask says what each pixel is, but not which pixels belong together. We define: one instance is
# one *connected component* of one class. Two pixels belong to the same component when a path of
# neighbouring pixels of that class leads from one to the other.
#
# Max-pooling, which networks use anyway, finds the components. Give each lesion pixel a number of its
# own, the largest to the first in reading order. Then let each pixel take the largest number among
# its neighbours and itself, again and again, and keep the background at 0. Numbers cannot leave their
# component, so in the end each component carries one number: that of its first pixel.
#
# $$ n_{t+1}(p) = m(p) \cdot \max_{q \in \mathcal{N}(p)} n_t(q), \qquad m(p) \in \{0, 1\}. $$

# %%
ggo = torch.from_numpy(mask == 2)  # bool [H, W]


def start_numbers(inside):
    """Number lesion pixels in falling reading order; 0 elsewhere.

    float32 is exact up to 4096 x 4096 pixels.
    """
    numbers = torch.arange(inside.numel(), 0, -1.0)
    return numbers.reshape(inside.shape) * inside  # [H, W]


def one_step(numbers, inside):
    """Each lesion pixel takes the largest number of its 3 x 3 pixels."""
    largest = max_pool2d(numbers[None], 3, stride=1, padding=1)[0]
    return largest * inside  # [H, W]


def spread(inside, step=one_step):
    """Repeat until nothing changes: one number for each component."""
    numbers = start_numbers(inside)
    while not torch.equal(after := step(numbers, inside), numbers):
        numbers = after
    return numbers  # [H, W]


components = spread(ggo)
print("GGO regions of our old friend:", len(components[ggo].unique()))

# %% mystnb={"image": {"alt": "The GGO pixels of our old friend in four stages. At first each pixel has its own shade; after some steps the shade of the first pixel has spread; at the end each region has one shade."}, "figure": {"caption": "Numbers spread through the GGO of our old friend, cut out of the slice. When nothing changes any more, each region has one number. Synthetic."}}
rows, columns = (np.flatnonzero((mask == 2).any(axis=k)) for k in (1, 0))
x_range = columns[0] - 3, columns[-1] + 3
y_range = rows[-1] + 3, rows[0] - 3  # y points down
fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
first = numbers = start_numbers(ggo)
done = 0
for ax, steps in zip(axes.flat, (0, 3, 8, None), strict=True):
    while steps is not None and done < steps:
        numbers, done = one_step(numbers, ggo), done + 1
    shown = components if steps is None else numbers
    hidden = np.ma.masked_equal(shown.numpy(), 0)
    limits = {"vmin": first[ggo].min(), "vmax": first.max()}
    _ = ax.imshow(hidden, cmap="viridis", **limits)
    _ = ax.set(xlim=x_range, xlabel="x (pixels)")
    _ = ax.set(ylim=y_range, ylabel="y (pixels)")
    title = "at the end" if steps is None else f"after {steps} steps"
    _ = ax.set_title(title)
plt.show()

# %% [markdown]
# Now the tensors that Mask R-CNN asks for. For $K$ instances: `boxes` [K, 4], `labels` [K] (1 GGO,
# 2 C; 0 is the background), `masks` [K, H, W]. A box runs from the first pixel to the edge *behind*
# the last, so that $x_2 - x_1$ is the width. Instances of fewer than `min_area` pixels are dropped.

# %%
def targets_by_hand(mask, min_area):
    boxes, labels, masks = [], [], [torch.zeros(0, *mask.shape)]
    for label, code in ((1, 2), (2, 3)):  # GGO, consolidation
        numbers = spread(torch.from_numpy(mask == code))
        # largest first: reading order
        for number in numbers[numbers > 0].unique().flip(0):
            instance = numbers == number  # [H, W]
            if instance.sum() < min_area:
                continue
            rows, columns = torch.nonzero(instance, as_tuple=True)
            low = columns.min(), rows.min()
            high = columns.max() + 1, rows.max() + 1
            boxes.append([*low, *high])
            labels.append(label)
            masks.append(instance[None])
    return {
        # [K, 4]
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),  # [K]
        "masks": torch.cat(masks).byte(),  # [K, H, W]
    }


mine = targets_by_hand(mask, preset.min_area)
for key, value in mine.items():
    print(f"{key:6} {str(value.dtype):14} {tuple(value.shape)}")

# %% [markdown]
# The package has a function for this. It gives the same tensors, for our old friend and for every
# test slice of the lesion set.

# %% tags=["nbval-check-output"]
indices = range(len(lesions["test"]))
test_masks = [lesions["test"].read(i)[1] for i in indices]
for one in (mask, *test_masks):
    mine = targets_by_hand(one, least)
    packaged = mask_to_targets(one, "both", least)
    assert all(torch.equal(mine[key], packaged[key]) for key in mine)
print(f"{len(test_masks)} test slices and our old friend:", end=" ")
print("the same targets by hand and by the package")

# %% [markdown]
# One detail matters. `torchvision.ops.masks_to_boxes` ends a box *at* the last pixel. A lesion that
# is one pixel wide would then have a box of width 0, which torchvision's detectors refuse, so the
# package adds 1.

# %%
loose = torchvision.ops.masks_to_boxes(target["masks"])  # [K, 4]
assert torch.equal(loose[:, :2], target["boxes"][:, :2])
assert torch.equal(loose[:, 2:] + 1, target["boxes"][:, 2:])

# %% [markdown]
# ## Corners: 4 or 8 neighbours
#
# The pooling window of 3 x 3 pixels has 8 neighbours, so pixels that touch at a corner belong
# together. With 4 neighbours (left, right, above, below) they do not. The released code uses 8, and
# so do we. A diagonal line shows the difference:

# %% tags=["nbval-check-output"]
def cross_step(numbers, inside):
    """As `one_step`, with 4 neighbours: a row and a column of three."""
    across = max_pool2d(numbers[None], (1, 3), stride=1, padding=(0, 1))[0]
    along = max_pool2d(numbers[None], (3, 1), stride=1, padding=(1, 0))[0]
    return torch.maximum(across, along) * inside


def count_components(inside, step):
    numbers = spread(inside, step)
    return len(numbers[numbers > 0].unique())


line = torch.eye(4, dtype=torch.bool)
of_line = [count_components(line, step) for step in (one_step, cross_step)]
counts = np.array(
    [
        [count_components(inside, step) for step in (one_step, cross_step)]
        for m in test_masks
        for inside in (torch.from_numpy(m == 2), torch.from_numpy(m == 3))
    ]
)  # [2 * slices, 2]
differ = int((counts[:, 0] != counts[:, 1]).sum())
print("                              8 neighbours   4 neighbours")
print("diagonal line of 4 pixels:    {:12}   {:12}".format(*of_line))
print("regions in the test phantoms: {:12}   {:12}".format(*counts.sum(0)))
print("slices and classes in which they differ:", differ)

# %% [markdown]
# Wherever two counts differ, an outline has a loose corner: with 4 neighbours, it becomes a tiny
# "lesion" of its own that the detector is asked to find. Outlines drawn by hand, and masks that were
# resized, can have many of these.
#
# ## How small is a lesion?
#
# The released code drops objects of at most 100 pixels from a slice of 512 x 512, that is 0.04 % of
# the image. A preset with smaller slices needs a smaller number. At height $H$, we keep an object with
# more than $100\,(H/512)^2$ pixels:

# %% tags=["nbval-check-output"]
for name in ("quick", "colab", "paper"):
    p = PRESETS[name]
    smallest = int(100 * (p.phantoms.size / 512) ** 2) + 1
    assert smallest == p.min_area
    print(f"{name:6} side {p.phantoms.size}:", end=" ")
    print(f"an instance has at least {smallest} pixels")

# %% [markdown]
# What does the number do to our old friend? The slider shows which instances stay.

# %%
def draw_kept(min_area):
    """Our old friend with the instances of at least `min_area` pixels."""
    kept = mask_to_targets(mask, min_area=min_area)
    fig, ax = plt.subplots(figsize=(4.4, 4), layout="constrained")
    plotting.show_lesions(image, kept, ax)
    count = len(kept["labels"])
    ax.set_title(f"{count} instances of {min_area} pixels or more")
    return fig


smallest_areas = [k * preset.min_area for k in (1, 2, 5, 10, 22, 50)]
frame_slider(
    [draw_kept(a) for a in smallest_areas],
    [f"{a} pixels" for a in smallest_areas],
    "Smallest area of an instance",
    "Our old friend with the boxes of the lesions that are large enough",
    caption="The larger the smallest area, the fewer lesions of our old "
    "friend are left. Synthetic.",
    dpi=70,
)

# %% [markdown]
# The next cell does the same live, in a running notebook.

# %% tags=["remove-output"]
def live(min_area):
    draw_kept(min_area)
    plt.show()


slider = ipywidgets.IntSlider(least, 1, 50 * least, continuous_update=False)
_ = ipywidgets.interact(live, min_area=slider)

# %% [markdown]
# And on the data set? Here is the share of regions that each value drops.

# %% tags=["nbval-check-output"]
areas, kinds = [], []
for split in SPLITS:
    for i in range(len(lesions[split])):
        every = mask_to_targets(lesions[split].read(i)[1], min_area=1)
        areas.append(every["area"])
        kinds.append(every["labels"])
areas, kinds = torch.cat(areas), torch.cat(kinds)  # one entry a region
print("phantoms: regions dropped")
for factor in (1, 2, 4, 8, 16):
    below = areas < factor * least
    ggo_share, c_share = (below[kinds == k].float().mean() for k in (1, 2))
    print(f"below {factor * least:4} pixels:", end=" ")
    print(f"GGO {ggo_share:6.1%}, C {c_share:6.1%}")

# %% [markdown]
# The preset's own value, in the first row, drops only slivers, which a rough outline, the pleura or
# another lesion has cut off: the generator draws no lesion whose cross-section is below 0.1 % of the
# image. Masks drawn by hand can contain specks, too. How many, the phantoms cannot say.
#
# The released code also drops small objects from the *ground truth* on which it computes its average
# precision (AP). This changes what the number means: a small lesion that the detector misses costs
# nothing, and one that it finds has nothing to match. When you compare two APs, ask which smallest
# area each of them used.
#
# ## A trap: classes named by position
#
# The released reader does not look the codes up. It lists the values that occur in a mask, in
# ascending order, and names them by their place: the first is background, the second lung, the third
# label 1, the fourth label 2. That works as long as every class occurs. Let us write the rule down
# and see when it fails.

# %% tags=["nbval-check-output"]
def labels_by_position(mask):
    """The label that the rule gives to codes 2 (GGO), 3 (C); None: lost."""
    present = np.unique(mask).tolist()
    place = {code: at for at, code in enumerate(present) if code in (2, 3)}
    return {code: at - 1 if at >= 2 else None for code, at in place.items()}


called = {1: "GGO", 2: "C", None: "lost"}
for codes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3), (0, 2)):
    result = labels_by_position(np.array(codes))
    renamed = [f"{called[c - 1]} -> {called[k]}" for c, k in result.items()]
    print(codes, ", ".join(renamed))

# %% [markdown]
# Two cases go wrong. Without GGO, consolidation moves up by one place and is called GGO. Without lung
# pixels, the first lesion class takes the place of the lung and is lost. How many phantom slices are
# affected?

# %% tags=["nbval-check-output"]
wrong, lost, regions, total, with_lesion = 0, 0, 0, 0, 0
for split in SPLITS:
    for i in range(len(lesions[split])):
        codes = lesions[split].read(i)[1]
        result = labels_by_position(codes)
        total += 1
        with_lesion += len(result) > 0
        lost += None in result.values()
        if any(k not in (code - 1, None) for code, k in result.items()):
            wrong += 1
            regions += int((mask_to_targets(codes)["labels"] == 2).sum())
print(f"phantoms: {total} slices, {with_lesion} with a lesion")
print("slices in which consolidation would be called GGO:", wrong, end=" ")
print(f"({regions} regions)")
print(f"slices in which a class would be lost: {lost}")

# %% [markdown]
# Every phantom slice shows lung, so nothing is lost here. In a set whose masks mark no lung, such as
# COVID-SemiSeg in [chapter 15](15_real_lesions.ipynb), the rule would fail for each lesion slice (see the
# exercises). We do not know how many slices of the real CNCB set are affected. One line would tell:
# count the masks that hold code 3 and not code 2.
#
# This holds for other data sets, too: look a code up, and do not infer it from the codes that
# happen to be present. The package reads codes, and refuses a mask with other values.
#
# ## Few and small: Figure 1 of the paper
#
# Figure 1 of the paper describes the lesion masks in two pairs of histograms, one column for GGO and
# one for C. It makes two statements about the real masks {cite:p}`TerSarkisov2020`:
#
# - the great majority of images have fewer than 5 regions of each class;
# - the great majority of regions are small: GGO below 2 % of the image, C below 1 %.
#
# Here are the same histograms for the training phantoms, which were drawn to be similar.

# %%
statistics = lesion_statistics(lesions["train"])

# %% mystnb={"image": {"alt": "Two histograms. Left: most slices have fewer than five regions of either class. Right: most regions cover less than two percent of the image."}, "figure": {"caption": "Figure 1 of the paper, remade on phantoms: regions in a slice (left) and area of a region (right). Lesion set, training split, COVID-19 only. Synthetic."}}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
counts = np.arange(statistics.counts.max() + 1)  # 0, 1, 2, ... regions
areas = 100 * statistics.region_fractions  # % of the image
edges = np.linspace(0, areas.max(), 21)
for i, name in enumerate(("GGO", "C")):
    slices_with = np.bincount(statistics.counts[:, i], None, len(counts))
    regions = areas[statistics.region_labels == i + 1]
    of_area = np.histogram(regions, edges)[0]
    look = {
        "color": plotting.LESION_COLOURS[i],
        "hatch": plotting.LESION_HATCHES[i],
        "edgecolor": "k",
        "linewidth": 0.5,
    }
    for ax, left, heights in (
        (axes[0], counts, slices_with / len(statistics.counts)),
        (axes[1], (edges[:-1] + edges[1:]) / 2, of_area / len(regions)),
    ):
        # the two classes stand side by side
        width = 0.4 * (left[1] - left[0])
        left = left + (i - 0.5) * width
        _ = ax.bar(left, 100 * heights, width, label=name, **look)
        _ = ax.legend()
axes[0].xaxis.get_major_locator().set_params(integer=True)
_ = axes[0].set(xlabel="Regions in a slice (count)", ylabel="Slices (%)")
_ = axes[1].set(
    xlabel="Area of a region (% of the image)",
    ylabel="Regions of the class (%)",
)
plt.show()

# %%
few = statistics.share_of_slices_below(5)
small = statistics.share_of_regions_below(0.02, 0.01)
none = (statistics.counts.sum(axis=1) == 0).mean()
print("phantoms")
print(f"slices with fewer than 5 regions: GGO {few[0]:.0%}, C {few[1]:.0%}")
print(f"regions that small: GGO {small[0]:.0%}, C {small[1]:.0%}")
print(f"slices without any lesion: {none:.0%}")
assert min(*few, *small) > 0.7

# %% [markdown]
# This has three consequences for the detector. Most anchors must be small ([chapter
# 2](02_region_proposals.ipynb)). Most candidate boxes are background, so the samplers must look for the
# positive ones. And a slice of a COVID-19 patient may show no lesion at all: the split is by patient,
# so the paper's set has such slices, too, as its text says.
#
# ## Splits: by patient
#
# Slices of one patient are alike. If some are in training and others in the test, a model can score
# by recognising the patient. So a split goes by patient: all slices of a patient land on one side.
# The check is short, and every project should have one.

# %% tags=["nbval-check-output"]
groups = {f"lesion {s}": set(lesions[s].patients) for s in SPLITS}
groups |= {f"class {s}": set(slices[s].patients) for s in SPLITS}
for a in groups:
    for b in groups:
        assert a == b or not groups[a] & groups[b], f"{a} and {b} overlap"
print("patients in two of", len(groups), "phantom groups: 0")

# %% [markdown]
# The lesion set and the class set must not share patients either. Otherwise the detector may have
# learned from a patient on whom the classifier is tested.
#
# Now the public lists. The split of COVIDx-CT (version 1) that the paper uses is published as three
# text files with one slice a line {cite:p}`Gunraj2020`. The name of a slice gives its class, patient
# and scan, so everything below can be counted without a single image. If you have the three lists,
# set the environment variable `COVIDMASK_SPLITS` to their folder, and the cell checks our numbers.

# %%
def counts_of(entries):
    """Slices and patients of each class in a list."""
    parts = [parse_name(entry.name) for entry in entries]
    people = {(p.label, p.patient) for p in parts}
    return (
        tuple(sum(p.label == c for p in parts) for c in range(3)),
        tuple(sum(label == c for label, _ in people) for c in range(3)),
    )


assert counts_of(read_split(root / "slices" / "test.txt"))[0] == tuple(
    class_statistics(slices["test"]).slices
)

# split: slices and patients of (Normal, common pneumonia, COVID-19)
PUBLIC = {
    "train": ((27201, 22061, 12520), (144, 420, 300)),
    "val": ((9107, 7400, 4529), (47, 190, 95)),
    "test": ((9450, 7395, 4346), (52, 125, 116)),
}
folder = os.environ.get("COVIDMASK_SPLITS")
if folder:
    files = {s: Path(folder) / f"{s}_COVIDx_CT-1.txt" for s in SPLITS}
    public_lists = {s: read_split(file) for s, file in files.items()}
    assert {s: counts_of(public_lists[s]) for s in SPLITS} == PUBLIC
    names = [[entry.name for entry in public_lists[s]] for s in SPLITS]
    people = [{parse_name(name).patient for name in part} for part in names]
    # nobody is in two splits
    assert len(set.union(*people)) == sum(map(len, people))


# %% tags=["nbval-check-output"]
def row(values):
    return "".join(f"{value:12,.0f}" for value in values)


print("COVIDx-CT-1 lists      Control   pneumonia    COVID-19         all")
for split, counted in PUBLIC.items():
    n, people = ((*v, sum(v)) for v in counted)
    each = [a / b for a, b in zip(n, people, strict=True)]
    print(f"{split:5} slices      " + row(n))
    print("      patients    " + row(people))
    print("      slices each " + row(each))
print("all slices:", f"{sum(sum(n) for n, _ in PUBLIC.values()):,}")

# %% [markdown]
# No patient is in two of these splits. But look at the patients. The largest class of the test split
# by slices is the smallest by patients.

# %% mystnb={"image": {"alt": "Two groups of three bars for the public test split. By slices control is the largest class, by patients it is the smallest."}, "figure": {"caption": "The public COVIDx-CT-1 test split counted in two ways. A control contributes a whole scan, a patient with a disease only chosen slices, so a metric over slices rests on few controls. Counts from the published list."}}
n, patients = PUBLIC["test"]
ax = plotting.get_ax(7, 3.8)
for c, hatch in enumerate(("", "///", "...")):
    values = 100 * n[c] / sum(n), 100 * patients[c] / sum(patients)
    bars = ax.bar(
        np.arange(2) + 0.27 * (c - 1),
        values,
        0.25,
        label=IMAGE_CLASSES[c],
        color=plotting.CLASS_COLOURS[c],
        hatch=hatch,
        edgecolor="white",
    )
    counted = [f"{n[c]:,}", f"{patients[c]}"]
    _ = ax.bar_label(bars, counted, fontsize="small")
units = [f"{sum(n):,} slices", f"{sum(patients)} patients"]
_ = ax.set_xticks(range(2), units)
_ = ax.set(
    xlabel="Unit that is counted",
    ylabel="Share of the test split (%)",
    ylim=(0, 52),
)
_ = ax.legend()
plt.show()

# %% [markdown]
# The paper trains S on 3,000 slices, 1,000 of each class, and stresses that the test set is 7.06 times
# as large. In patients it looks different: the published list of these 3,000 slices names 608
# patients, the test list 293.

# %% tags=["nbval-check-output"]
print(f"test / training in slices:   {sum(n) / 3000:.2f}")
print(f"test / training in patients: {sum(patients) / 608:.2f}")

# %% [markdown]
# Which ratio you want depends on the question. The slices of a scan are far from independent, so the
# number of patients says more about how sure a result is ([chapter 10](10_evaluation.ipynb)).
#
# The paper and the public lists differ in some numbers. We give both, and use the lists.
#
# | | paper | lists |
# |---|---|---|
# | slices in all | 104,900 | 104,009 |
# | validation slices | 21,036 | 21,036 |
# | test slices | 21,182 | 21,191 (as many as the released confusion matrices sum to) |
# | COVID-19 among test slices | 20 % | 20.5 % |
# | lesion slices | 650 of 150 patients | 750 of 150 patients |
# | lesion slices: training / held out | 500 / 150 in the text, 600 / 150 in Table 1 | 650 of 130 patients / 100 of 20 patients |
# | training slices of S | 3,000 | 3,000 of 608 patients |
#
# None of these changes a conclusion of the paper. They show why a split should be published as a
# file, which anyone can check. You will find more of them in [paper v code](paper_v_code.ipynb).
#
# ## What a slice label hides (1): where the slice was taken
#
# A scan runs from above the lungs to below them. For common pneumonia and COVID-19, COVIDx-CT kept
# the slices that show an infection. For Normal it kept the whole scan, since there is no infection to
# select by. You can see it in the lists. Slices are numbered within a scan: how many scans begin at
# number 0, and how many of those have no gap?

# %%
def whole_scans(entries):
    """For each class: scans, those from slice 0 on, those without a gap."""
    scans = {}
    for part in (parse_name(entry.name) for entry in entries):
        scan = part.label, part.patient, part.scan
        scans.setdefault(scan, []).append(int(part.slice))
    table = np.zeros((3, 3), dtype=int)
    for (label, _, _), numbers in scans.items():
        starts = min(numbers) == 0
        no_gap = max(numbers) + 1 == len(numbers)
        table[label] += (1, starts, starts and no_gap)
    return table


PUBLIC_SCANS = np.array(
    [[472, 472, 472], [1052, 23, 4], [833, 8, 2]]
)  # of the three lists together
if folder:
    every_entry = sum(public_lists.values(), [])
    np.testing.assert_array_equal(whole_scans(every_entry), PUBLIC_SCANS)

# %% tags=["nbval-check-output"]
print("COVIDx-CT-1 lists      scans   start at slice 0   and have no gap")
for name, row in zip(IMAGE_CLASSES, PUBLIC_SCANS, strict=True):
    print(f"{name:18} {row[0]:9,} {row[1]:18} {row[2]:17}")

# %% [markdown]
# So the first slices of a scan are nearly always Normal. (The lists do not say how long a scan was,
# so they cannot say the same of the last ones.) A model that recognises "this is above the lungs"
# has learned how slices were selected, and nothing about a disease. Work on other data has found
# shortcuts of this kind {cite:p}`DeGrave2021,Roberts2021`.
#
# The lists alone are enough to profit from it. Each line holds the number of the slice and the box
# around the body: five numbers, no pixel. A logistic regression on these numbers, their squares and
# products learns Control or not on the training list. We judge it by *balanced accuracy*, the mean of
# the two sensitivities; guessing gives 50 %. The next cell computes it where the lists are present.

# %%
def parabola():
    """Logistic regression on features, their squares and products."""
    return make_pipeline(
        StandardScaler(),
        PolynomialFeatures(2, include_bias=False),
        StandardScaler(),
        LogisticRegression(class_weight="balanced", max_iter=2000),
    )


def lines_without_pixels(entries):
    """Slice number and body box, [M, 5]; is it no control, [M]?"""
    x = np.array(
        [(int(parse_name(e.name).slice), *e.box) for e in entries],
        dtype=float,
    )
    return x, np.array([e.label > 0 for e in entries])


PUBLIC_WITHOUT_PIXELS = 0.63  # balanced accuracy on the test list
if folder:
    blind = parabola().fit(*lines_without_pixels(public_lists["train"]))
    x, other = lines_without_pixels(public_lists["test"])
    reached = balanced_accuracy_score(other, blind.predict(x))
    assert abs(reached - PUBLIC_WITHOUT_PIXELS) < 0.02, reached
print("COVIDx-CT-1 test list, no pixel seen:", end=" ")
print(f"balanced accuracy {PUBLIC_WITHOUT_PIXELS:.0%}")

# %% [markdown]
# That is better than guessing, on real patients, from a text file alone. Part of it may come from the
# body box and not from the position, for example if scanners or tables differ between classes. That
# would have nothing to do with a disease either.
#
# How much does position alone give? We ask phantoms, because there we can choose the position: 0 is
# the apex of the lungs, 1 the base. We compare two designs that differ in their controls only:
#
# - **selected**, as in COVIDx-CT: controls from anywhere, the others where a lesion shows;
# - **matched**: the positions of controls are drawn as if they had one of the diseases, as in the
#   phantoms on disk.
#
# The disease slices of both designs, and all slices of the matched one, are on disk; the name of a
# phantom holds 1000 times its position. For the selected design we draw new controls. All splits are
# by patient.

# %%
THUMBNAIL = 8  # pixels per side, at every preset


def thumbnail(picture):
    """A slice, [3, H, W], as 8 x 8 mean grey values, [64].

    Too coarse to show a small lesion.
    """
    return adaptive_avg_pool2d(picture[:1], THUMBNAIL).flatten()


thumbnails, positions, labels = {}, {}, {}
for split in ("train", "test"):
    dataset = slices[split]
    thumbnails[split] = torch.stack(
        [thumbnail(dataset[i][0]) for i in range(len(dataset))]
    )  # [M, 64]
    positions[split] = np.array(
        [int(parse_name(name).slice) / 1000 for name in dataset.names]
    )  # [M]
    labels[split] = np.array(dataset.labels)  # [M]

# %%
rng = np.random.default_rng(SEED)
# (position, thumbnail) of the new controls
drawn = {"train": [], "test": []}
for split, first_seed in (("train", 10_000), ("test", 20_000)):
    controls = class_statistics(slices[split]).patients[0]
    slices_each = preset.phantoms.slices_per_patient
    for seed in range(first_seed, first_seed + controls):
        control = make_patient(seed, 0)
        for position in rng.uniform(0, 1, slices_each):
            picture, _ = render(control, float(position), size)
            small = thumbnail(torch.from_numpy(picture)[None])
            drawn[split].append((position, small))

designs = {
    "selected": {},
    "matched": {},
}  # design -> split -> positions, thumbnails, Control or not
for split in drawn:
    x, other = thumbnails[split].numpy(), labels[split] > 0
    designs["matched"][split] = positions[split], x, other
    new_positions, new_x = map(np.stack, zip(*drawn[split], strict=True))
    designs["selected"][split] = (
        np.concatenate([new_positions, positions[split][other]]),
        np.concatenate([new_x, x[other]]),
        np.arange(len(new_x) + other.sum()) >= len(new_x),
    )

# %% mystnb={"image": {"alt": "Two histograms of slice positions from apex to base. Left, selected: controls are spread over the whole lung, the others leave out both ends. Right, matched: both have about the same shape."}, "figure": {"caption": "Positions of the training slices. When controls come from whole scans (left) the ends belong to them; matched positions (right) say nothing. Phantoms."}}
options = {"layout": "constrained", "sharey": True}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), **options)
for ax, (design, split) in zip(axes, designs.items(), strict=True):
    position, _, other = split["train"]
    for which, label, colour, line in (
        (~other, "Control", plotting.GREEN, "-"),
        (other, "pneumonia or COVID-19", plotting.VERMILLION, "--"),
    ):
        share, edges = np.histogram(position[which], bins=20, range=(0, 1))
        share = 100 * share / which.sum()
        _ = ax.stairs(share, edges, color=colour, ls=line, label=label)
    _ = ax.set(
        xlabel="Position (0 apex, 1 base; no unit)",
        ylabel="Slices of the group (%)",
    )
    _ = ax.set_title(design)
_ = axes[0].legend(loc="lower center")
plt.show()

# %% [markdown]
# Can a model see the position? We fit a linear regression to the 64 grey values of a thumbnail, on
# training patients, and judge it on test patients.

# %%
seer = {}
for design, split in designs.items():
    position, x, _ = split["train"]
    seer[design] = make_pipeline(StandardScaler(), Ridge(30.0))
    _ = seer[design].fit(x, position)
    position, x, _ = split["test"]
    error = np.abs(seer[design].predict(x) - position).mean()
    guess = np.abs(position - np.median(position)).mean()
    print(f"{design:8}: the position is off by {error:.3f};", end=" ")
    print(f"without the picture by {guess:.3f}")
    assert error < 0.5 * guess

# %% [markdown]
# It can: the error is a fraction of that of a guess, and what a linear regression can do, a network can
# do, too. Now take a classifier that is given *nothing but the position seen in the thumbnail*:
# Control or other? It is a logistic regression on the position and its square, because the controls
# have both ends.

# %%
def balanced_accuracies(features, make_model):
    """Train on each design, test on both: [trained on, tested on]."""
    table = np.zeros((2, 2))
    for i, design in enumerate(designs):
        truth = designs[design]["train"][2]
        model = make_model().fit(features(design, "train", design), truth)
        for j, other in enumerate(designs):
            truth = designs[other]["test"][2]
            guess = model.predict(features(other, "test", design))
            table[i, j] = balanced_accuracy_score(truth, guess)
    return table


def seen_position(design, split, trained_on):
    # [M, 1]
    return seer[trained_on].predict(designs[design][split][1])[:, None]


def print_table(table, what):
    print(f"{what} (phantoms)")
    print("                     tested on selected    on matched")
    for design, row in zip(designs, table, strict=True):
        print(f"trained on {design:8} {row[0]:19.1%} {row[1]:13.1%}")


by_position = balanced_accuracies(seen_position, parabola)
print_table(by_position, "position alone: balanced accuracy")
# the gain goes when positions are matched
assert by_position[0, 0] > max(0.5, by_position[0, 1])
assert abs(by_position[1, 1] - 0.5) < 0.12

# %% [markdown]
# In plain words: with selected slices, position alone predicts the class better than guessing,
# although it knows nothing about any lesion. With matched positions the same classifier is back
# near guessing. When it is trained there, too, all that it can find is what lesions do to a
# thumbnail, and so to the position that is read from it. A real scan also has slices above and
# below the lungs, where only controls are left, so the gain from selected slices may be larger
# there. (Each of these numbers comes from one test set and has no interval, so look at large
# differences only, here and below.)
#
# A real model sees more than the position. What does a logistic regression do that is given all 64 grey
# values, with the lesions and the position in them?

# %%
def all_greys(design, split, trained_on):
    return designs[design][split][1]  # [M, 64]


def linear():
    return make_pipeline(
        StandardScaler(),
        LogisticRegression(C=0.003, class_weight="balanced", max_iter=2000),
    )


by_thumbnail = balanced_accuracies(all_greys, linear)
print_table(by_thumbnail, "64 grey values: balanced accuracy")
assert by_thumbnail[1, 1] > by_thumbnail[0, 1]

# %% [markdown]
# Both models saw the same slices of patients with a disease; only the positions of their controls
# differ. Look at the right column: where position says nothing, the model trained on selected slices
# is the worse of the two. It has learned about position what it could have learned about lesions.
# (In the left column, the model trained on matched slices also suffers because it has seen no slice
# from the ends of the lungs.)
#
# The test split of COVIDx-CT is selected in the same way as its training split, so the test cannot
# show how much of a published result is of this kind. Nor can our phantoms say how much it is on real
# scans. Control slices at matched positions would show it, or a test on whole scans.
#
# ## What a slice label hides (2): who the slice belongs to
#
# What if a split ignores patients? Take the training slices of the class set and split them again,
# 80 % to 20 %: once by patient, once slice by slice. A patient with $k$ slices has some on both sides
# with probability
#
# $$ 1 - p^k - (1 - p)^k, \qquad p = 0.8. $$

# %% tags=["nbval-check-output"]
patients_of = np.array(slices["train"].patients)
by_patient = split_by_patient(patients_of.tolist(), (0.8, 0.2), seed=SEED)
order = np.random.default_rng(SEED).permutation(len(patients_of))
cut = int(0.8 * len(order))
by_slice = order[:cut], order[cut:]


def shared_patients(parts):
    a, b = (set(patients_of[np.asarray(part)]) for part in parts)
    return len(a & b)


k = preset.phantoms.slices_per_patient
everyone = len(set(patients_of))
print(f"{everyone} phantom patients with {k} slices each")
expected = everyone * (1 - 0.8**k - 0.2**k)
print("patients on both sides")
print("split by patient:       ", shared_patients(by_patient))
print("split by slice:         ", shared_patients(by_slice))
print(f"expected by the formula: {expected:.0f}")

# %% [markdown]
# With 37 slices, the average of a COVID-19 patient in the public test list, practically every patient
# would be on both sides.
#
# What does that do to a result? Take the simplest model: find the training slice with the nearest
# thumbnail, and copy its class.

# %%
def nearest(parts):
    """For each slice of the second part, the nearest one in the first."""
    train, held_out = (torch.as_tensor(np.asarray(part)) for part in parts)
    x = thumbnails["train"]
    return held_out, train[torch.cdist(x[held_out], x[train]).argmin(dim=1)]


copied = {"by patient": nearest(by_patient), "by slice": nearest(by_slice)}
classes = labels["train"]
accuracy = {}
for split, (query, match) in copied.items():
    accuracy[split] = float((classes[query] == classes[match]).mean())
    same = float((patients_of[query] == patients_of[match]).mean())
    print(f"split {split:10}: accuracy {accuracy[split]:.0%};", end=" ")
    print(f"nearest is the same patient: {same:.0%}")
assert accuracy["by slice"] > accuracy["by patient"] + 0.1

# %% mystnb={"image": {"alt": "Three synthetic slices: a query, its nearest neighbour in a split by slice, which is the same patient, and its nearest neighbour in a split by patient, which is another patient."}, "figure": {"caption": "A slice (left) and the training slice that the model copies. In the split by slice it is a slice of the same patient. An example in which the other split copies a wrong class. Phantoms."}}
lookup = {
    split: dict(zip(query.tolist(), match.tolist(), strict=True))
    for split, (query, match) in copied.items()
}
query = next(
    i
    for i in lookup["by slice"]
    if i in lookup["by patient"]
    and patients_of[lookup["by slice"][i]] == patients_of[i]
    and classes[lookup["by patient"][i]] != classes[i]
)
trio = (query, lookup["by slice"][query], lookup["by patient"][query])
fig, axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
titles = "query", "split by slice", "split by patient"
for ax, i, what in zip(axes, trio, titles, strict=True):
    _ = plotting.show_slice(slices["train"][i][0], ax)
    _ = ax.set_title(
        f"{what}\npatient {patients_of[i]}: {IMAGE_CLASSES[classes[i]]}",
        fontsize=10,
    )
plt.show()

# %% [markdown]
# The model does not know more about lesions in one split than in the other: it recognises patients.
# Only the split by patient says how it would do on a new one.
#
# ## What neither label says
#
# - The lesion set holds COVID-19 patients only. The detector never sees the consolidation of a
#   bacterial pneumonia with a mask; it must find there what it learned elsewhere.
# - A slice label says what the patient has *and* that this slice shows it. Slices of patients without
#   visible lesions are not in the classes of the diseases. A model trained on these classes has not
#   been asked what to say about a whole scan, or about a patient.
# - Both sets come from one collection. Scanner, hospital and window may differ between classes in
#   ways that nobody recorded, and a test split of the same collection cannot show it.
# - The prevalence is that of the lists. In a clinic it is different, and predictive values change
#   with it ([chapter 10](10_evaluation.ipynb)).
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Merged classes
#
# Kind: experiment, **
#
# In the mode `"merged"` GGO and consolidation are one class, joined before components are sought. How
# many instances do the training phantoms lose by it, and in how many slices? Why?

# %% tags=["solution"]
# @title Solution
masks = [lesions["train"].read(i)[1] for i in range(len(lesions["train"]))]
as_two, merged = (
    np.array([len(mask_to_targets(m, mode, least)["boxes"]) for m in masks])
    for mode in ("both", "merged")
)  # [slices] each
print(f"training phantoms: instances as two classes {as_two.sum()}", end="")
print(f", merged {merged.sum()}")
print("slices with fewer instances:", int((merged < as_two).sum()))
assert (merged <= as_two).all()

# %% [markdown] tags=["answer"]
# A consolidation that touches GGO becomes one lesion with it. So you cannot compare the numbers of
# instances of the two modes, nor their APs.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Masks without lung
#
# Kind: experiment, **
#
# Set the lung of every test mask to background, as in a set that marks no lung, and apply
# `labels_by_position`. In how many of the slices with a lesion is a class lost or misnamed?

# %% tags=["solution"]
# @title Solution
without_lung = [np.where(m == 1, 0, m) for m in test_masks]
outcomes = [labels_by_position(m) for m in without_lung]
outcomes = [o for o in outcomes if o]  # slices with a lesion
all_lost = sum(set(o.values()) == {None} for o in outcomes)
misnamed = sum(1 in o.values() and o.get(3) == 1 for o in outcomes)
print(f"test phantoms with a lesion: {len(outcomes)}")
print(f"no lesion left: {all_lost}", end="; ")
print(f"GGO lost and consolidation called GGO: {misnamed}")
assert all_lost + misnamed == len(outcomes)

# %% [markdown] tags=["answer"]
# In all of them. A slice with one class of lesion looks healthy, and in a slice with both, the
# consolidation takes the name of the lost GGO.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · How leaky?
#
# Kind: experiment, **
#
# Draw a split by slice with 95 % of the slices in training. Is it less leaky than the one with 80 %?
# Count the share of *held-out slices* whose patient is also in training, not the share of patients,
# and say which of the two matters for the result.

# %% tags=["solution"]
# @title Solution
for p in (0.5, 0.8, 0.95):
    parts = order[: int(p * len(order))], order[int(p * len(order)) :]
    known = np.isin(patients_of[parts[1]], patients_of[parts[0]]).mean()
    share = shared_patients(parts) / everyone
    query, match = nearest(parts)
    right = (classes[query] == classes[match]).mean()
    print(f"{p:.0%} in training:", end=" ")
    print(f"patients on both sides {share:.0%}", end=", ")
    print(f"held-out slices of known patients {known:.0%}", end=", ")
    print(f"accuracy {right:.0%}")

# %% [markdown] tags=["answer"]
# With 95 % in training, fewer patients have slices on both sides, because few have any held-out slice
# at all. But nearly every held-out slice has a relative in training, and this is the share that
# matters: the split is no less leaky. (Chance moves the last accuracy most, because it rests on the
# fewest slices.)

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Left and right
#
# Kind: experiment, **
#
# For the phantoms of common pneumonia and COVID-19 whose masks we have in `found`, count the lesions
# in each half of the image. What share of the slices has lesions in both halves? Can a classifier
# that is given only the number of lesions know the side?

# %% tags=["solution"]
# @title Solution
for label in (1, 2):
    sides = []
    for i in (i for i in chosen if test.labels[i] == label):
        # [K], x of the box centres
        middle = found[i]["boxes"][:, [0, 2]].mean(dim=1)
        # the right lung is on the left of the picture
        right_lung = int((middle < size / 2).sum())
        sides.append((right_lung, len(middle) - right_lung))
    sides = np.array(sides)  # [slices, 2]
    right, left = sides.mean(axis=0)
    both = (sides.min(axis=1) > 0).mean()
    print(f"{IMAGE_CLASSES[label]} (phantoms): lesions per slice,", end=" ")
    print(f"right and left lung {right:.1f} and {left:.1f};", end=" ")
    print(f"both lungs in {both:.0%} of {len(sides)} slices")

# %% [markdown] tags=["answer"]
# We drew the diseases so that they differ in number and in side. The number of lesions does not say
# on which side they are. Does the vector that $S$ reads? [Chapter 6](06_ranked_boxes.ipynb) builds
# that vector; look there for the position of a box.

# %% [markdown]
# ## What we learned
#
# 1. Lesion masks (COVID-19 only) teach the detector, slice labels (three classes) teach the classifier.
# 2. An instance is a connected component of one class; connectivity and smallest area are part of its definition.
# 3. Codes must be looked up: naming classes by position turns consolidation into GGO where GGO is absent.
# 4. Control slices come from whole scans and the others from selected slices, so position alone predicts a label.
# 5. Splits go by patient, and counting patients instead of slices changes how large a test set looks.
#
# ## Further reading
#
# {cite:t}`Zhang2020` describe the CNCB collection, {cite:t}`Gunraj2020` how COVIDx-CT was made from it.
# {cite:t}`Zhao2020scans` and {cite:t}`Zhao2020relation` describe what COVID-19 looks like on CT.
# {cite:t}`Roberts2021` review what goes wrong with data in models for COVID-19, and
# {cite:t}`DeGrave2021` show shortcuts in X-ray models. {cite:t}`Fan2020` published the small set with
# masks that [chapter 15](15_real_lesions.ipynb) uses.

