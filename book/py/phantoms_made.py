# %% [markdown]
# # How the phantoms are made
#
# Below are two slices of a chest. One comes from a hospital. The other shows nobody: it was drawn by
# formulas. You will see at once which is which. But **what gives the drawn one away, and which of its
# faults matter to a network that has to find lesions?**
#
# The package's network for real scans, `SEGMENTER_CT`, learned from such chests alone, without any real
# slice in its training. The chapters use them, too. So it is worth knowing how they come about.

# %% tags=["fold"] mystnb={"image": {"alt": "A drawn chest slice beside a real one in the lung window. Both show two dark lungs with bright vessels, a heart, a spine and ribs. The drawn one is a smooth oval whose ribs are dashes in a ring, with a heart of one grey and a curved table below; the real one has an irregular outline, a white heart, fine vessels everywhere, and is cut off by a circle."}, "figure": {"caption": "A drawn slice, and a real one where the file is there. Lung window: level -600 HU, width 1500 HU."}}
# @title Import what we need, draw a chest, and set it beside a real one
import importlib.util
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.random import default_rng
from scipy import ndimage

import covidmask
from covidmask import plotting
from covidmask.datasets import LUNG_WINDOW, PACKAGES, hounsfield_to_unit
from covidmask.datasets.chest import (
    CONSOLIDATION,
    GGO,
    HEIGHT,
    VESSEL_SIGMAS,
    Lesion,
    draw,
    render,
    thorax,
)
from covidmask.datasets.lungs import find_lungs
from covidmask.datasets.patients import make_patient
from covidmask.datasets.scanner import Scanner, develop, draw_scanner, scan

torch.manual_seed(0)  # nothing here uses torch
plt.rcParams["figure.dpi"] = 72  # noise makes large files
device = "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")

SIZE = 512  # pixels per side
PATIENT = 7  # seed of the healthy patient
REAL = Path("real/slice.dcm")  # beside this notebook
real = None
if not REAL.is_file():
    print(f"There is no {REAL} here, so the real slice is left out of the figures.")
elif importlib.util.find_spec("pydicom") is None:
    print(f"`pip install {PACKAGES}` brings pydicom, which reads the real slice.")
else:
    import pydicom

    dicom = pydicom.dcmread(REAL)
    real = dicom.pixel_array * float(dicom.RescaleSlope)
    real = (real + float(dicom.RescaleIntercept)).astype(np.float32)  # [512, 512], HU
    print(f"real slice: {real.shape}, {real.min():.0f} to {real.max():.0f} HU")


def show(ax, hu, title="", window=LUNG_WINDOW, part=np.s_[:, :]):
    """A slice in HU through a window, without axes."""
    _ = ax.imshow(hounsfield_to_unit(hu[part], window), cmap="gray", vmin=0, vmax=1)
    _ = ax.set_title(title, fontsize=10)
    ax.axis("off")


SHARP = Scanner(
    cutoff=200, edge=0.3, noise=30, streak=0, motion=0,
    level=-600, width=1500, gamma=1, quality=0,
)  # fmt: skip
SOFT = replace(SHARP, cutoff=100, edge=0.05)
healthy = make_patient(PATIENT, label=0)
hu, mask = draw(healthy, position=0.6, size=SIZE)
scanned = scan(hu, SOFT, default_rng(0))
pair = {"drawn": scanned} | ({"real": real} if real is not None else {})
fig, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for ax in axes:
    ax.axis("off")
for ax, (name, picture) in zip(axes, pair.items(), strict=False):
    show(ax, picture, name)
plt.show()

# %% [markdown]
# Take your time before you read on. Outline, heart, vessels, noise, the border of the picture: where do
# they differ?
#
# **After it you can**
#
# - name the Hounsfield units of air, lung, fat, blood and bone, and choose a window;
# - build ground glass, crazy paving, consolidation and both kinds of halo in a healthy chest;
# - say what a scanner adds to a chest, and measure its noise;
# - say what follows from a phantom, and what does not.
#
# **You need** [chapter 1](01_data.ipynb), for masks and their codes. The page runs alone.
#
# **Time:** reading 25 min, exercises 25 min, running 1 min on two CPU cores.
#
# ```{admonition} Synthetic data, and one real slice
# :class: important
# All pictures are *phantoms*, except for one CT slice of an unknown patient, marked as real wherever it
# is shown. It comes from the tests of the program [lungmask](https://github.com/JoHof/lungmask) (Apache
# 2.0). Nothing here is for diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # this page is the same in every preset

# %% [markdown]
# ## Tissues are numbers
#
# CT measures how strongly each small piece of the body weakens X-rays, by a coefficient $\mu$. The scale
# is fixed at two points, air at -1000 Hounsfield units (HU) and water at 0:
#
# $$\text{HU} = 1000\,\frac{\mu - \mu_\text{water}}{\mu_\text{water} - \mu_\text{air}}$$
#
# So grey values mean something: a healthy lung is four fifths air, and lies near -800 HU whatever the
# scanner. The phantom is painted in these numbers. `draw` returns them before any scanner has touched
# them, together with the mask: 0 outside, 1 lung, 2 ground glass, 3 consolidation.

# %%
healthy = make_patient(PATIENT, label=0)
hu, mask = draw(healthy, position=0.6, size=SIZE)
print(f"{hu.shape}, {hu.min():.0f} to {hu.max():.0f} HU")

# %% tags=["fold"] mystnb={"image": {"alt": "Above, a bar for each tissue along the HU axis: air, lung, ground glass, fat, water, soft tissue, consolidation and bone. Below, the histogram of the drawn slice has peaks at air, lung, fat and soft tissue. The lung window spans -1350 to 150 HU, the soft tissue window -160 to 240 HU."}, "figure": {"caption": "Usual ranges of tissues (above), and how often each value occurs in the drawn slice (below, logarithmic), with two windows."}}
# @title Draw the HU of tissues, and those of the drawn slice
SOFT_WINDOW = (40, 400)  # level, width
ranges = {
    "air": (-1000, -970),
    "lung": (-920, -700),
    "ground glass": (-700, -300),
    "fat": (-120, -80),
    "consolidation": (-120, 60),
    "water": (-5, 15),
    "blood, muscle, liver": (30, 70),
    "bone": (150, 900),
}
fig, axes = plt.subplots(2, 1, figsize=(8, 5.4), sharex=True, layout="constrained")
top, bottom = axes
for row, (name, (low, high)) in enumerate(ranges.items()):
    _ = top.barh(row, high - low, left=low, color=plotting.BLUE, ec="k", lw=0.5)
    _ = top.text(high + 15, row, name, va="center", fontsize=9)
_ = top.set(yticks=[], ylabel="Tissue", xlim=(-1400, 1150))
top.invert_yaxis()
_ = bottom.hist(hu.ravel(), np.arange(-1060, 1000, 15), color="#606060", log=True)
_ = bottom.set(xlabel="HU", ylabel="Pixels (count)")
for name, (level, width), colour, hatch in (
    ("lung window", LUNG_WINDOW, plotting.SKY_BLUE, ""),
    ("soft tissue window", SOFT_WINDOW, plotting.ORANGE, "//"),
):
    low, high = level - width / 2, level + width / 2
    look = {"color": colour, "alpha": 0.25, "hatch": hatch}
    _ = bottom.axvspan(low, high, **look, label=f"{name}: {low:.0f} to {high:.0f}")
_ = bottom.legend(fontsize=9, loc="upper right")
plt.show()

# %% [markdown]
# A screen has 256 greys, and the scale has more than 2,000 steps. A **window** chooses which of them
# you see: its *level* becomes the middle grey, what lies more than half its *width* below is black, and
# what lies as far above is white. The lung window shows vessels and lesions, and makes heart and bone one
# white mass; the soft tissue window does the reverse.

# %%
for name, window in {"lung": LUNG_WINDOW, "soft tissue": (40, 400)}.items():
    grey = hounsfield_to_unit(hu, window)[mask > 0]
    lost = ((grey == 0) | (grey == 1)).mean()
    print(f"{name:11} window: {lost:3.0%} of the lung is black or white")

# %% [markdown]
# ## Shapes: each has a level, and the smallest decides
#
# How do you draw a lung? Not as an outline. Each organ has a *level*: a number at each place, positive
# inside, zero at the edge, about the distance to it. The level of "in the chest and not in the heart" is
# then the smaller of two levels. Here are a chest, a heart and a spine:

# %%
y, x = (np.mgrid[:256, :256] + 0.5) / 256 - 0.5  # in image sides


def ellipse(cx, cy, a, b):
    return (1 - np.hypot((x - cx) / a, (y - cy) / b)) * min(a, b)


chest = ellipse(0, 0, 0.42, 0.32)
others = [ellipse(0.06, -0.05, 0.16, 0.13), ellipse(0, 0.25, 0.06, 0.08)]
lung = np.minimum.reduce([chest, *(-level for level in others)])
cover = np.clip(0.5 + lung / 0.007, 0, 1)  # share of a pixel that is lung
print(f"lung: {cover.mean():.1%} of the picture")
print(f"pixels at the edge: {(cover % 1 > 0).mean():.1%}")

# %% tags=["fold"] mystnb={"image": {"alt": "Three panels: the level of an oval chest with contour lines; the level of the lungs, which has a hole for heart and spine; the cover, white inside the lungs and black outside with a soft edge."}, "figure": {"caption": "The level of the chest, the level of the lungs (the smallest of all), and the share of each pixel that they cover. The thick line is the edge, level 0."}}
# @title Draw two levels and the cover
fig, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
levels = {"level of the chest": chest, "level of the lungs": lung}
for ax, (name, field) in zip(axes, levels.items(), strict=False):
    _ = ax.imshow(field, cmap="cividis")
    _ = ax.contour(field, [0], colors="white", linewidths=2)
    _ = ax.contour(field, np.arange(-0.2, 0.3, 0.05), colors="k", linewidths=0.4)
    _ = ax.set_title(name, fontsize=10)
    ax.axis("off")
_ = axes[2].imshow(cover, cmap="gray")
_ = axes[2].set_title("cover", fontsize=10)
axes[2].axis("off")
plt.show()

# %% [markdown]
# The package does the same with some thirty shapes, and with three additions. Where two levels of a lung
# meet, the corner is rounded, because pleura has no sharp ones. Nobody is made of ellipses, so all
# coordinates are first shifted a little by a smooth random field. And every size depends on the height: a
# position from 0 (apex) to 1 (base) says how wide the chest is there, whether the trachea has divided
# yet, how much of the heart shows, how far the liver has come up.

# %% tags=["fold"] mystnb={"image": {"alt": "Six drawn slices from apex to base. The lungs begin small between shoulder blades, the trachea appears as a black disc and divides, the heart grows, and at the base the liver takes the place of the right lung."}, "figure": {"caption": "One drawn patient from apex (0.1) to base (0.85). As in every CT the patient's right is on the left. Synthetic."}}
# @title Draw one patient at six heights
fig, axes = plt.subplots(2, 3, figsize=(8, 5.2), layout="constrained")
for ax, position in zip(axes.flat, (0.1, 0.25, 0.4, 0.55, 0.7, 0.85), strict=True):
    show(ax, draw(healthy, position, 256)[0], f"position {position}")
plt.show()

# %% [markdown]
# Each patient has numbers of their own, all drawn from the seed: width and roundness of the chest, fat,
# size of the heart, how deeply the patient breathed in (less air makes the lung denser and lifts the
# diaphragm), denser lung at the back where blood settles, emphysema, fluid, and contrast medium in the
# blood of about three patients in ten.

# %% tags=["nbval-check-output"]
names = ("lung_hu", "gravity", "heart", "fat", "dome", "contrast")
print("patient " + "".join(f"{name:>10}" for name in names))
for seed in range(PATIENT, PATIENT + 5):
    patient = make_patient(seed, label=0)
    values = [getattr(patient, name) for name in names]
    print(f"{seed:7} " + "".join(f"{value:10.2f}" for value in values))

# %% [markdown]
# ## Vessels and bronchi
#
# A lesion finder is fooled most easily by vessels: they are bright, and cut across they are round. So the
# phantom grows trees. More than a dozen branches start from each hilum, where vessels enter the lung; each
# goes on nearly straight, gives off a thinner one, and both do so again. A bronchus, a tube of air with a
# wall, runs beside every second of the first branches. Some hundreds of short vessels fill the rest of
# each lung, and a few scars and nodules are put in to be mistaken for lesions.

# %%
# rows: x, y, z of both ends, index of the radius, weight, bronchus?
tubes = healthy.tubes
radii = 1000 * np.array(VESSEL_SIGMAS)[tubes[:, 6].astype(int)]
print(f"{len(tubes):,} segments, bronchi {tubes[:, 8].mean():.1%}")
print(f"radii {radii.min()} to {radii.max()} thousandths of the image side")
for thickness in (0.001, 0.008):  # of the slice, in image sides
    values = draw(replace(healthy, thickness=thickness), 0.6, SIZE)[0]
    share = (values > -500)[mask == 1].mean()
    print(f"thickness {thickness}: {share:.1%} of the lung above -500 HU")

# %% tags=["fold"] mystnb={"image": {"alt": "Left: all segments of one patient from the front, two trees that fan out from the middle, bronchi in orange dashes near the hila. Middle and right: part of one lung in a thin and in a thick slice; in the thin one vessels are short and sharp, in the thick one longer and paler."}, "figure": {"caption": "The trees from the front (bronchi orange), and the same part of a lung in a thin (0.1 % of the image side) and in a thick slice (0.8 %). Synthetic."}}
# @title Draw the trees, and a thin and a thick slice
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
for chosen, colour, line in ((0, "#404040", "-"), (1, plotting.ORANGE, "--")):
    rows = tubes[tubes[:, 8] == chosen]
    look = {"color": colour, "ls": line, "lw": 0.4, "alpha": 0.7}
    _ = axes[0].plot(rows[:, [0, 3]].T, rows[:, [2, 5]].T, **look)
_ = axes[0].set(xlabel="x (image sides)", ylabel="z (image sides)", aspect="equal")
_ = axes[0].set(xlim=(-0.4, 0.4), ylim=(0.75, 0))
PART = np.s_[130:330, 60:260]
for ax, name in zip(axes[1:], ("thin", "thick"), strict=True):
    thickness = 0.001 if name == "thin" else 0.008
    values = draw(replace(healthy, thickness=thickness), 0.6, SIZE)[0]
    show(ax, values, name, part=PART)
plt.show()

# %% [markdown]
# ## Lesions, as radiology describes them
#
# Now we make the patient ill. A `Lesion` is an ellipsoid with a wavy, rough outline, cut off by the
# pleura. **Ground-glass opacity** (GGO) raises the HU of the lung in which it lies: it adds, like a veil
# through which vessels stay visible. **Consolidation** replaces the air by fluid and cells: it sets the
# HU, and vessels can no longer be seen in it.

# %%
AT = 0.6
ggo = Lesion(
    GGO, centre=(-0.19, 0.04, HEIGHT * AT), radii=(0.095, 0.085, 0.08),
    angle=0.4, hu=260, edge=0.02, rough=0.012,
    waves=((0.05, 0), (0.06, 1), (0.05, 2)),
)  # fmt: skip
dense = replace(ggo, code=CONSOLIDATION, hu=10, edge=0.01)
core = replace(dense, radii=(0.04, 0.035, 0.05))
lesions = {
    "ground glass": [ggo],
    "crazy paving": [replace(ggo, paving=220)],
    "consolidation": [dense],
    "air bronchogram": [replace(dense, bronchogram=1)],
    "halo": [ggo, core],
    "reversed halo": [ggo, replace(dense, hu=-60, hollow=0.016)],
    "rind below the pleura": [replace(ggo, radii=(0.3,) * 3, rind=0.03)],
}

# %% tags=["fold"] mystnb={"image": {"alt": "Eight pictures of the same lung: healthy; a grey veil with vessels in it; the same veil with a fine bright net; a white patch; a white patch with dark branches; a veil with a white core; a veil with a white ring; a grey band along the chest wall."}, "figure": {"caption": "One healthy lung, and the same lung with seven lesions. Only the lesion changes. Synthetic."}}
# @title Draw the healthy lung and the seven lesions
drawn = {}
for name, each in lesions.items():
    drawn[name] = draw(replace(healthy, lesions=tuple(each)), AT, SIZE)
LUNG = np.s_[170:390, 60:280]
pictures = {"healthy": (hu, mask)} | drawn
fig, axes = plt.subplots(3, 3, figsize=(7, 7.3), layout="constrained")
axes[2, 2].axis("off")
for ax, name in zip(axes.flat, pictures, strict=False):
    show(ax, pictures[name][0], name, part=LUNG)
plt.show()

# %% [markdown]
# - *Crazy paving* is ground glass with a net in it: thickened walls between the lobules, pieces of lung of
#   one or two centimetres.
# - *Air bronchogram*: the alveoli, the air sacs of the lung, are full; the bronchi, its airways, are not, so
#   they stand out dark.
# - *Halo*: ground glass around a dense core. *Reversed halo*: a dense ring around ground glass.
# - A *rind* follows the chest wall, which is where COVID-19 often lies {cite:p}`Shi2020`.
#
# Can we measure "vessels stay visible"? Take the pixels that are vessel in the healthy lung, and ask how
# much brighter they are than the rest of the same lesion.

# %%
inside = drawn["ground glass"][1] == GGO
vessel = inside & (hu > -500)
for name in ("healthy", "ground glass", "crazy paving", "consolidation"):
    values = pictures[name][0]
    plain = np.median(values[inside & ~vessel])
    more = np.median(values[vessel]) - plain
    print(f"{name:14}{plain:5.0f} HU, vessels {more:3.0f} HU brighter")

# %% [markdown]
# In ground glass the vessels keep more than half of their contrast. In consolidation nearly all of it is
# gone.
#
# Four more signs come with some patients. *Contrast medium* makes blood nearly as bright as bone, and the
# vessels with it. A *lobar pneumonia* fills a lobe and stops at the fissure, the gap to the
# next lobe, as if cut off. *Tree-in-bud*
# is what small airways full of pus look like: twigs, each with a bud at its end. And a *curve below the
# pleura* is a thin line beside the chest wall, as some patients with COVID-19 have it. The last two are
# tubes, as vessels are, and are in no mask.


# %% tags=["fold"] mystnb={"image": {"alt": "Four pictures. A whole slice in the soft tissue window, whose heart and aorta are white; part of a lung whose back half is white up to a sharp, nearly straight edge, with dark branches in it; a cluster of short lines with round ends; a thin bright curve beside the chest wall."}, "figure": {"caption": "The same patient with contrast medium (soft tissue window) and with three more signs (lung window). Synthetic."}}
# @title Draw four more signs
def with_tubes(patient, start, end, kind):
    """The patient with more tubes, from `start` to `end` [n, 3]."""
    rest = np.tile((kind, 1, 0), (len(start), 1))
    rows = np.concatenate([start, end, rest], axis=1)
    return replace(patient, tubes=np.concatenate([patient.tubes, rows]))


rng = default_rng(3)
twigs = rng.normal((-0.22, 0.11, HEIGHT * AT), (0.03, 0.03, 0.003), (20, 3))
buds = twigs + rng.normal(0, (0.012, 0.012, 0.002), (20, 3))
cy, wide, deep = thorax(healthy, AT)  # centre, half axes of the wall
turn = np.linspace(0.1, 0.9, 12)
across, down = -0.9 * wide * np.cos(turn), cy + 0.9 * deep * np.sin(turn)
line = np.stack([across, down, np.full(12, HEIGHT * AT)], axis=1)
lobe = replace(dense, radii=(0.3, 0.3, 0.2), lobe=1, bronchogram=1)
budding = with_tubes(healthy, twigs, buds, 0)
signs = {
    "contrast medium": replace(healthy, contrast=200),
    "lobar pneumonia": replace(healthy, lesions=(lobe,)),
    "tree-in-bud": with_tubes(budding, buds, buds + (0, 0, 0.004), 3),
    "curve below the pleura": with_tubes(healthy, line[:-1], line[1:], 1),
}
fig, axes = plt.subplots(2, 2, figsize=(6.4, 6.6), layout="constrained")
for ax, (name, patient) in zip(axes.flat, signs.items(), strict=True):
    given = patient.contrast > 0
    window, part = (SOFT_WINDOW, np.s_[:, :]) if given else (LUNG_WINDOW, LUNG)
    show(ax, draw(patient, AT, SIZE)[0], name, window, part)
plt.show()

# %% [markdown]
# ## Which patient gets what
#
# A class of patients is a rule for drawing lesions:
#
# - **Controls** have no lesions, only the look-alikes: vessels, scars, nodules, and dependent
#   density, the denser lung at the back where blood settles.
# - **Common pneumonia**: mostly two or three foci that lie together, often on one side, more of them
#   consolidation than ground glass (by number; by area about half). Large ones often keep to their lobe; one patient in ten has the patchy
#   viral kind, four in ten have tree-in-bud.
# - **COVID-19**: many foci on both sides, rather near the pleura and in the lower half of the lungs, ground
#   glass somewhat more often than consolidation; three patients in ten have a curve below the pleura. In
#   number and size they follow Figure 1 of the paper, as [chapter 1](01_data.ipynb) shows.
# - **Severe COVID-19** (`severe=True`): up to half a lung, by one of four patterns: spots, foci that merge,
#   rinds, or large patches, like the slices of COVID-SemiSeg, on which `SEGMENTER_CT` is judged.
#
# Three slices each of forty patients show what comes out.


# %%
def look_at(codes):
    """Lesion share of the lungs, GGO share, depth, and on both sides?"""
    lesion = codes >= GGO
    depth = ndimage.distance_transform_edt(codes > 0)
    sides = [lesion[:, half].any() for half in (np.s_[:64], np.s_[64:])]
    share = lesion.sum() / (codes > 0).sum()
    deep = np.median(depth[lesion]) / depth.max()
    return share, (codes == GGO).sum() / lesion.sum(), deep, all(sides)


# %% tags=["fold"]
# @title Draw forty patients of each kind, and print what they have
COHORTS = {
    "common pneumonia": (1, False),
    "COVID-19": (2, False),
    "severe COVID-19": (2, True),
}
print("               with lesion  of lung   GGO  depth  both sides")
for name, (label, severe) in COHORTS.items():
    cohort = [make_patient(1000 + i, label, severe) for i in range(40)]
    codes = [draw(p, t, 128)[1] for p in cohort for t in (0.4, 0.55, 0.7)]
    found = [look_at(c) for c in codes if (c >= GGO).any()]
    share, ggo_share, deep, both = np.mean(found, axis=0)
    print(f"{name:16}{len(found) / len(codes):10.0%}{share:9.1%}", end="")
    print(f"{ggo_share:6.0%}{deep:7.2f}{both:12.0%}")

# %% [markdown]
# (GGO: its share of the lesion area. Depth: 0 is the edge of the lung, 1 its innermost point. All columns
# but the first are means over slices with a lesion, and describe these 40 patients.) These rules are what
# *we* put in, after the usual descriptions. A network that tells these classes apart has found our rules
# again, and no more than that.

# %% tags=["fold"] mystnb={"image": {"alt": "Two rows of three slices. Above: a common pneumonia, a COVID-19 and a severe COVID-19 patient. Below the masks: lung grey, ground glass light blue, consolidation orange."}, "figure": {"caption": "A sick patient of each kind (above) and the mask that comes with the slice (below). Synthetic."}}
# @title Draw a patient of each kind, with the mask
fig, axes = plt.subplots(2, 3, figsize=(8.5, 6), layout="constrained")
for (above, below), name in zip(axes.T, COHORTS, strict=True):
    label, severe = COHORTS[name]
    picture, codes = render(make_patient(1004, label, severe), 0.55, 256)
    _ = above.imshow(picture, cmap="gray", vmin=0, vmax=1)
    _ = above.set_title(name, fontsize=10)
    _ = plotting.show_mask(codes, below)
    above.axis("off")
    below.axis("off")
    below.get_legend().remove()
looks = zip(
    ("#606060", *plotting.LESION_COLOURS),
    ("", *plotting.LESION_HATCHES),
    ("lung", "ground glass", "consolidation"),
    strict=True,
)
handles = []
for colour, hatch, name in looks:
    look = {"fc": colour, "hatch": hatch, "ec": "k", "label": name}
    handles.append(plt.Rectangle((0, 0), 1, 1, **look))
_ = fig.legend(handles=handles, ncols=3, loc="outside lower center", fontsize=9)
plt.show()

# %% [markdown]
# ## The scanner
#
# So far every pixel was exact. A real scanner changes the picture, and `scan` does so in four ways. Its
# *kernel* decides how much fine detail passes: `cutoff`, in cycles per image side, is where half of it is
# left. It adds *noise*. Between the shoulders, where X-rays must pass a lot of bone, *streaks* run across.
# And some patients move.


# %%
def zoom(scanner=SHARP, **changes):
    return scan(hu, replace(scanner, **changes), default_rng(1))


apex = draw(healthy, 0.12, SIZE)[0]
steps = {
    "no scanner": hu,
    "soft kernel, no noise": zoom(SOFT, noise=0),
    "sharp kernel, no noise": zoom(noise=0),
    "sharp, noise 30 HU": zoom(),
    "sharp, noise 80 HU": zoom(noise=80),
    "motion": zoom(motion=0.4),
}
worst = replace(SHARP, streak=1)
streaky = scan(apex, worst, default_rng(1), shoulders=0.64)

# %% tags=["fold"] mystnb={"image": {"alt": "Eight pictures. Part of a lung without a scanner, blurred by a soft kernel, crisp with a sharp kernel, with weak noise, with strong noise, doubled by motion; then a whole slice at the apex with horizontal streaks between the shoulders, and a part of it."}, "figure": {"caption": "What the scanner does to a part of a lung, and streaks at the height of the shoulders (last row). Synthetic."}}
# @title Draw what the scanner does
fig, axes = plt.subplots(3, 3, figsize=(6.6, 6.9), layout="constrained")
axes[2, 2].axis("off")
for ax, (name, picture) in zip(axes.flat, steps.items(), strict=False):
    show(ax, picture, name, part=PART)
show(axes[2, 0], streaky, "apex: streaks")
show(axes[2, 1], streaky, "the same, zoomed", part=np.s_[180:340, 100:260])
plt.show()

# %% [markdown]
# Noise in CT is not the snow of an old television. The image is computed by filtered back projection,
# whose filter weakens slow changes and lifts fast ones, until the kernel cuts them off. A Fourier
# transform shows this: it splits a patch into waves, and we ask how much power the waves of each length
# have.


# %%
def spectrum(patch, rings=20):
    """Frequencies, cycles per pixel, and the share of the power at each."""
    window = np.hanning(len(patch))
    flat = (patch - patch.mean()) * np.outer(window, window)
    waves = np.fft.fftfreq(len(patch))
    frequency = np.hypot(waves[:, None], waves[None, :])
    ring = (frequency / 0.5 * rings).astype(int)
    power = np.abs(np.fft.fft2(flat)) ** 2
    power = np.bincount(ring.ravel(), power.ravel())
    power = power[:rings] / np.bincount(ring.ravel())[:rings]
    return (np.arange(rings) + 0.5) / rings / 2, power / power.sum()


grain = {  # the noise alone
    name: zoom(scanner) - zoom(scanner, noise=0)
    for name, scanner in (("soft kernel", SOFT), ("sharp kernel", SHARP))
}
grain["white noise"] = default_rng(0).normal(0, 30, hu.shape)

# %% tags=["fold"] mystnb={"image": {"alt": "Left: power against frequency; soft kernel peaks at a low frequency and falls to nothing, sharp kernel peaks later and reaches further, white noise is flat. Right: standard deviation of the noise in each row of the slice, larger in the middle rows, where the body is."}, "figure": {"caption": "Left: the noise power of two kernels, and of white noise for comparison. Right: the noise in each row of the slice. Synthetic."}}
# @title Draw the spectra of the noise, and the noise of each row
fig, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
looks = ("-", plotting.BLUE), ("--", plotting.VERMILLION), (":", plotting.BLACK)
for (name, noise), (line, colour) in zip(grain.items(), looks, strict=True):
    frequency, power = spectrum(noise)
    _ = axes[0].plot(frequency, 100 * power, line, color=colour, label=name)
_ = axes[0].set(xlabel="Frequency (cycles per pixel)", ylabel="Noise power (% of all)")
_ = axes[0].legend()
deviation = grain["sharp kernel"].std(axis=1)
_ = axes[1].plot(deviation, np.arange(SIZE), color=plotting.VERMILLION)
_ = axes[1].set_xlabel("Noise, sharp kernel (standard deviation, HU)")
_ = axes[1].set_ylabel("Row of the slice (pixels)")
axes[1].invert_yaxis()
plt.show()

# %% [markdown]
# The right panel shows the second property. Rays along a row that crosses shoulder, ribs and spine lose
# most of their photons, and fewer photons mean more noise. So `scan` gives each row noise that grows with
# what the row absorbs; the `noise` that we ask for holds in a broad patient who fills the picture.
#
# `draw_scanner` draws a whole examination. Hospital 0 has middling kernels and dose; hospital 1 sharp ones,
# less dose and another window. `published=True` is a third source: pictures cut out of papers, in any
# window and contrast, stored as JPEG. `develop` makes the picture from HU.

# %% tags=["fold"] mystnb={"image": {"alt": "Three rows of three pictures of the same lung. Hospital 0: soft and quiet. Hospital 1: sharper, noisier, more contrast. Published: brightness and contrast vary widely, some very noisy."}, "figure": {"caption": "The same part of the same patient by three scanners of each source. Synthetic."}}
# @title Draw three scanners of each source
worlds = {
    "hospital 0": {"hospital": 0},
    "hospital 1": {"hospital": 1},
    "published": {"published": True},
}
fig, axes = plt.subplots(3, 3, figsize=(6, 6), layout="constrained")
for row, (name, options) in zip(axes, worlds.items(), strict=True):
    for i, ax in enumerate(row):
        scanner = draw_scanner(default_rng(i), **options)
        picture = develop(scan(hu, scanner, default_rng(i)), scanner)
        _ = ax.imshow(picture[PART], cmap="gray", vmin=0, vmax=1)
        _ = ax.set(xticks=[], yticks=[], ylabel=name if i == 0 else "")
plt.show()

# %% [markdown]
# `SEGMENTER_CT` saw pictures of the third source, cut to the lungs, because real slices that are published
# with masks often look like that: JPEG files in a window that nobody wrote down. The two hospitals are for
# experiments in which a model trains in one and is tested in the other ([chapter
# 14](14_another_hospital.ipynb)).
#
# ## Beside the real slice
#
# Back to the two slices of the beginning, now with numbers. Inside the lungs, found by the same thresholds
# in both (`find_lungs`), we compare the HU; and in a patch of air, where there should be nothing but noise,
# its standard deviation and its spectrum.

# %%
inside = {name: each[find_lungs(each)] for name, each in pair.items()}
air = {"drawn": scanned[:64, :64]}  # a corner
if real is not None:
    air["real"] = real[10:74, 224:288]  # above the chest, in the circle
print("HU in lungs:   5 %   25 %   50 %   75 %   95 %   noise in air")
for name, values in inside.items():
    quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
    print(f"{name:10}" + "".join(f"{q:7.0f}" for q in quantiles), end="")
    print(f"{air[name].std():12.1f} HU")

# %% tags=["fold"] mystnb={"image": {"alt": "Left: distribution of HU in the lungs. The drawn lung has one narrow peak; the real one a wider peak, further right. Right: noise spectra of a patch of air for both, which are much alike."}, "figure": {"caption": "HU in the lungs (left) and the noise spectrum in air (right), drawn, and real where the file is there."}}
# @title Draw the HU in the lungs and the noise in air
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
looks = {"drawn": (plotting.BLUE, "-"), "real": (plotting.VERMILLION, "--")}
for name, values in inside.items():
    colour, line = looks[name]
    heights, edges = np.histogram(values, np.arange(-1000, 301, 20))
    look = {"color": colour, "ls": line, "lw": 1.5, "label": name}
    _ = axes[0].stairs(100 * heights / len(values), edges, **look)
    frequency, power = spectrum(air[name], rings=12)
    _ = axes[1].plot(frequency, 100 * power, line, color=colour, label=name)
_ = axes[0].set(xlabel="HU", ylabel="Pixels of the lungs (%)")
_ = axes[1].set(xlabel="Frequency (cycles per pixel)", ylabel="Noise power (% of all)")
for ax in axes:
    _ = ax.legend()
plt.show()

# %% [markdown]
# Noise and its spectrum nearly agree: with our soft kernel they no longer give the drawn slice away. Other
# things do, as you will have seen:
#
# - **The wall.** The real chest has an irregular outline, breasts, muscles in layers, fat with strands in
#   it, and ribs that are cut at all angles. Ours is a set of smooth rings, with ribs as regular as the
#   dashes of a line.
# - **The heart.** Ours is an egg of one grey on a smooth funnel. The real one has chambers and fat around
#   it, and is far brighter, because this patient was given a contrast medium.
# - **The vessels.** Ours crowd at the hila, leave parts of the lung empty, and end abruptly. Real ones grow
#   thinner and thinner and reach nearly to the pleura, so more of a real lung is as dense as a vessel.
# - **The lung itself.** The real one is denser on the whole, its values are spread more widely, and it is
#   hazy at the back.
#
# `SEGMENTER_CT` is shown the lungs alone, so the last two concern it most. They show in small pieces, too:
# a network that sees 64 x 64 pixels of lung tells drawn ones from those of COVID-SemiSeg better than by
# chance in most of five folds (`python benchmarks/segmenter_ct.py patches`; `results/looks.jsonl`). One
# real slice says little about real slices in general. But it shows where this phantom is plainly wrong.
#
# ## What drawn chests are worth on real slices
#
# You have seen the faults. What do they cost a network? To find out, we train networks on drawn chests and
# judge them on real slices, by mean Dice, the overlap of two masks (1 is perfect). As in the table of
# [chapter 15](15_real_lesions.ipynb), a slice counts 0 where prediction and truth share no pixel.
#
# `SEGMENTER_CT` learned from drawn chests alone. It was judged on real slices of COVID-SemiSeg that took no
# part while the chests were improved ([its card](weights.md)). The table sets a plain U-Net beside it,
# which is smaller and learned for a shorter time, also from drawn chests alone. So what the U-Net reaches
# does not depend on a special network.
#
# <!-- unet_beside -->
# | Drawn chests alone | Dice, infection | Dice, GGO | Dice, C |
# |---|---|---|---|
# | `SEGMENTER_CT` | 0.685 (0.623 to 0.743) | 0.489 (0.400 to 0.576) | 0.286 (0.182 to 0.395) |
# | U-Net | 0.627 (0.509 to 0.720) | 0.451 (0.348 to 0.547) | 0.328 (0.214 to 0.457) |
#
# On the second 25 slices by number. Command: `python benchmarks/real_slices.py beside --data data/covid-semiseg --half second`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-27; commit 980dc55; all numbers in results/unet_beside.json.
# <!-- /unet_beside -->
#
# <!-- real_slices -->
# **Drawn chests beside real slices.** Suppose you have a few real slices with masks. Do
# drawn chests still help? Here such a U-Net learns from some of the 50 slices and is judged on ten
# others, in five folds, so that each slice is judged once. There are three ways to train it:
#
# - *real alone*: on real slices in every step;
# - *drawn first*: on drawn chests in the first half of the steps, on real slices in the second;
# - *drawn mixed in*: on as many drawn as real ones in every step.
#
# All take equally many steps, so with drawn chests the network meets real slices half as often. In
# the first row it has met none. In brackets: the gain over real slices alone, and its 95 % interval
# from resampling the slices. (Half of them had been looked at while the chests were improved.)
#
# | Real slices | Training | Dice, infection | Dice, GGO | Dice, C |
# |---|---|---|---|---|
# | 0 | drawn alone | 0.514 | 0.353 | 0.216 |
# | 5 | real alone | 0.637 | 0.461 | 0.224 |
# | 5 | drawn first | 0.625 (-0.012, -0.046 to +0.021) | 0.451 (-0.010, -0.040 to +0.022) | 0.167 (-0.057, -0.094 to -0.024) |
# | 5 | drawn mixed in | 0.637 (-0.000, -0.041 to +0.038) | 0.444 (-0.017, -0.052 to +0.016) | 0.267 (+0.043, -0.000 to +0.091) |
# | 10 | real alone | 0.670 | 0.517 | 0.238 |
# | 10 | drawn first | 0.639 (-0.031, -0.047 to -0.015) | 0.503 (-0.014, -0.036 to +0.008) | 0.204 (-0.034, -0.066 to -0.006) |
# | 10 | drawn mixed in | 0.658 (-0.012, -0.035 to +0.011) | 0.494 (-0.023, -0.043 to +0.001) | 0.260 (+0.022, -0.021 to +0.071) |
# | 20 | real alone | 0.699 | 0.554 | 0.217 |
# | 20 | drawn first | 0.675 (-0.024, -0.044 to -0.008) | 0.537 (-0.017, -0.037 to +0.002) | 0.160 (-0.056, -0.090 to -0.030) |
# | 20 | drawn mixed in | 0.667 (-0.032, -0.066 to +0.003) | 0.508 (-0.046, -0.079 to -0.015) | 0.227 (+0.011, -0.023 to +0.044) |
# | 40 | real alone | 0.686 | 0.546 | 0.233 |
# | 40 | drawn first | 0.669 (-0.017, -0.035 to -0.002) | 0.532 (-0.014, -0.028 to -0.001) | 0.192 (-0.041, -0.069 to -0.015) |
# | 40 | drawn mixed in | 0.653 (-0.033, -0.058 to -0.010) | 0.503 (-0.043, -0.070 to -0.020) | 0.231 (-0.003, -0.021 to +0.020) |
#
# Command: `python benchmarks/real_slices.py curve --data data/covid-semiseg`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-27; commit 05cfc2e and 6a4f6db; all numbers in results/real_slices.json.
# <!-- /real_slices -->
#
# (Why does the U-Net reach more in the first table than in the first row of the second? There it learned
# for longer, from more chests and with more pixels, and it was judged on half of the slices.)
#
# We had expected a clear gain with five and ten real slices, and there is none. For infection and ground
# glass no row with drawn chests is better than real slices alone. *Drawn first* is worse for infection from
# ten slices on, and for consolidation always; *drawn mixed in* is worse for ground glass from twenty on. Only
# consolidation, which few real slices show, may gain
# with five of them when drawings are mixed in: the interval just reaches 0. Real slices, cut and turned and
# mixed at random, teach this network more than so many drawings do. The drawings are for the other case, in
# which you have no real slice at all: `SEGMENTER_CT` in the table above has seen none. The curve does not
# say what happens when a network first learns from drawings for as long as that one did.
#
# Can the same network also help to name the disease? We trained $S$ on the ranked boxes of `SEGMENTER_CT`
# in drawn patients of the three classes, and asked it about three real patients (`python
# benchmarks/segmenter_ct.py classes`; `results/looks.jsonl`). It called the one with common pneumonia
# healthy. So `covidmask predict` gives no class probabilities on scans.
#
# ## What a phantom cannot show
#
# - **How good a network is on patients.** A high score on phantoms says that the network has learned our
#   rules. What it is worth on patients, only patients show: many, from several hospitals, read by
#   radiologists. Models of COVID-19 failed here by the dozen {cite:p}`Roberts2021`.
# - **How the diseases differ.** Influenza, oedema, haemorrhage or a tumour can look like either, and are not
#   here.
# - **The reader's doubt.** Our masks are exact. Where ground glass ends, two radiologists draw two lines.
# - **Much of anatomy and physics.** No breasts, no children, no implants, a heart without chambers; noise
#   that is added after the fact, no ring artefact, no beam hardening.
#
# Phantoms are good for other things. Their truth is exact, you can have as many as you like, they touch
# nobody's privacy, and you can change one thing at a time.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. A pixel has -800 HU. What is it most likely to be?**
#
# - [x] Healthy lung. :: Four fifths air, one fifth tissue and blood.
# - [ ] Fat. :: Fat lies near -100 HU.
# - [ ] Consolidation. :: It has lost its air, and lies near 0.
#
# **2. How is ground glass drawn?**
#
# - [ ] It sets the HU to one value. :: That is consolidation, and it would hide the vessels.
# - [x] It adds to the HU of the lung. :: So vessels keep their contrast, or most of it.
# - [ ] It blurs the lung below it. :: Vessels in ground glass stay sharp.
#
# **3. Why are scars and nodules drawn, though they are in no mask?**
#
# - [ ] To make the lesions easier to find. :: They make it harder.
# - [ ] Because each patient with COVID-19 has them. :: Controls have them, too.
# - [x] So that not everything bright is a lesion. :: A network that has never met look-alikes trusts them.
#
# **4. Why does averaging four pixels reduce scanner noise by less than a factor of 2?**
#
# - [x] Neighbouring pixels share part of their noise. :: What is alike does not average out.
# - [ ] Scanner noise is larger than white noise. :: The factor does not depend on the size of the noise.
# - [ ] An average of four pixels is rounded. :: Rounding plays no part here.
#
# **5. A network trained on drawn chests alone reaches a fair Dice on real slices. What follows?**
#
# - [ ] The chests look real to any network. :: A small network tells pieces of them apart.
# - [ ] Real slices would not help it. :: With real slices alone the small network reached more.
# - [x] The chests share what this task needs with real ones. :: That much, and only for this task.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · A mixture
#
# Kind: pencil, *
#
# A pixel is partly air (-1000 HU) and partly blood and tissue (take 40 HU), and its $\mu$ is the mean of
# both, weighted by their shares. Which HU does it have for a share of air between 0 and 1? And which share
# of air has a pixel of -800 HU? Write both formulas.
#
# Hint: HU is a linear function of $\mu$, so HU values mix like $\mu$ does.


# %% tags=["starter"]
def hu_of(air_share):
    raise NotImplementedError("HU of a mixture of air and tissue")


def air_share_of(hu_value):
    raise NotImplementedError("the other way round")


# %% tags=["solution"]
# @title Solution
def hu_of(air_share):
    return -1000 * air_share + 40 * (1 - air_share)


def air_share_of(hu_value):
    return (40 - hu_value) / 1040


print(f"-800 HU: {air_share_of(-800):.0%} air; -450 HU: {air_share_of(-450):.0%} air")


# %% tags=["wrong"]
def hu_of(air_share):
    return -1000 * air_share  # forgets the tissue


def air_share_of(hu_value):
    return -hu_value / 1000


# %% tags=["wrong"]
def hu_of(air_share):
    return 40 * air_share - 1000 * (1 - air_share)  # the shares are swapped


def air_share_of(hu_value):
    return (hu_value + 1000) / 1040


# %% tags=["check"]
# @title Check your answer
assert abs(hu_of(1) + 1000) < 1e-6, "air alone has -1000 HU"
assert abs(hu_of(0) - 40) < 1e-6, "a pixel without air is tissue alone, at 40 HU"
assert abs(hu_of(0.5) + 480) < 1e-6, "half and half lies in the middle of both"
for share in (0.1, 0.4, 0.9):
    assert abs(air_share_of(hu_of(share)) - share) < 1e-6, "the second undoes the first"
print("Right.")

# %% [markdown] tags=["answer"]
# A healthy lung near -800 HU is about four fifths air. Ground glass near -450 HU still holds nearly half
# of its volume as air, and that is why it is a haze and not a white patch.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Your own window
#
# Kind: write a function, **
#
# Write `window(hu, level, width)`, which turns HU into grey values: 0 at the lower edge of the window and
# below, 1 at the upper edge and above, linear in between. Then: a colleague sends you ground glass as a
# picture in the soft tissue window (40, 400). What share of it is not black?
#
# Hint: Shift so that the lower edge becomes 0, divide by the width, and use `np.clip`.


# %% tags=["starter"]
def window(hu, level, width):
    """HU -> grey values in 0..1."""
    raise NotImplementedError("shift, divide, clip")


# %% tags=["solution"]
# @title Solution
def window(hu, level, width):
    """HU -> grey values in 0..1."""
    return np.clip((hu - (level - width / 2)) / width, 0, 1)


for name in ("ground glass", "consolidation"):
    values, codes = drawn[name]
    seen = window(values, 40, 400)[codes >= GGO] > 0
    print(f"{name}: {seen.mean():.0%} of its pixels are not black")


# %% tags=["wrong"]
def window(hu, level, width):
    return np.clip((hu - level) / width, 0, 1)  # begins at the level


# %% tags=["wrong"]
def window(hu, level, width):
    return (hu - (level - width / 2)) / width  # not clipped


# %% tags=["check"]
# @title Check your answer
example = np.array([-2000.0, -1350, -600, -225, 150, 900])
grey = np.asarray(window(example, *LUNG_WINDOW))
assert grey.min() >= 0 and grey.max() <= 1, "what lies outside the window is 0 or 1"
assert abs(grey[2] - 0.5) < 1e-6, "the level is the middle of the window"
assert np.allclose(grey, hounsfield_to_unit(example, LUNG_WINDOW)), "check both edges"
print("Right.")

# %% [markdown] tags=["answer"]
# Of the veil only the vessels remain. No later processing brings it back, so look at the window before you
# look for ground glass.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Vessels that shine through
#
# Kind: find the bug, **
#
# A colleague paints a lesion into HU values with this function. Ground glass looks fine, but vessels shine
# through the consolidation. Repair it. (`amount` is what ground glass adds, or the HU of consolidation.)
#
# Hint: One of the two lesions adds, the other sets.


# %% tags=["starter"]
def paint(hu, inside, code, amount):
    """The HU with a lesion painted where `inside` is true."""
    lesion = hu + amount if code == GGO else hu + (amount + 800)
    return np.where(inside, lesion, hu)


# %% tags=["solution"]
# @title Solution
def paint(hu, inside, code, amount):
    """The HU with a lesion painted where `inside` is true."""
    lesion = hu + amount if code == GGO else amount
    return np.where(inside, lesion, hu)


# %% tags=["wrong"]
def paint(hu, inside, code, amount):
    return np.where(inside, amount, hu)  # ground glass hides the vessels, too


# %% tags=["wrong"]
def paint(hu, inside, code, amount):
    return hu + amount if code == GGO else np.full_like(hu, amount)  # everywhere


# %% tags=["check"]
# @title Check your answer
before = np.array([-800.0, -800, -300, -800])  # the third is a vessel
within = np.array([False, True, True, True])
veil = np.asarray(paint(before.copy(), within, GGO, 260))
patch = np.asarray(paint(before.copy(), within, CONSOLIDATION, 10))
assert veil[0] == patch[0] == -800, "outside the lesion nothing changes"
assert veil[2] - veil[1] == 500, "ground glass: the vessel keeps its contrast"
assert veil[1] == -540, "ground glass adds its amount"
assert np.all(patch[1:] == 10), "consolidation: vessel and lung become the same"
print("Right.")

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Does averaging help?
#
# Kind: predict, then run, **
#
# Average blocks of 2 x 2 pixels of the noise of the sharp kernel, of the soft kernel, and of white noise
# (all three are in `grain`). Predict first: by what factor does each standard deviation fall?
#
# Hint: For four independent pixels the factor is $\sqrt{4}$. Which of the three are independent?

# %% tags=["solution"]
# @title Solution
for name, noise in grain.items():
    blocks = noise.reshape(SIZE // 2, 2, SIZE // 2, 2).mean(axis=(1, 3))
    print(f"{name:12} {noise.std() / blocks.std():.2f} times less noise")

# %% [markdown] tags=["answer"]
# White noise is independent from pixel to pixel, so four pixels give a factor of 2. In the noise of a
# scanner neighbouring pixels are alike, the more so the softer the kernel, and averaging what is alike
# changes little.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Give it away
#
# Kind: experiment, **
#
# Find a rule of one line, without any anatomy, that tells the drawn slice from the real one. Why would a
# network that is trained on both, with the answer "drawn" or "real", learn nothing useful?
#
# Hint: Look at the corners of both pictures.

# %% tags=["solution"]
# @title Solution
for name, picture in pair.items():
    print(f"{name}: the upper left pixel is {picture[0, 0]:.0f} HU")
assert scanned[0, 0] > -1500

# %% [markdown] tags=["answer"]
# The scanner writes -2048 outside its circle, where it has measured nothing. The corner alone gives the
# answer away, and a network takes the easiest way. Networks have learned to tell COVID-19 by the hospital
# in this manner {cite:p}`DeGrave2021`.

# %% [markdown]
# ## What we learned
#
# 1. Hounsfield units give each tissue its number; a window decides which of them a picture keeps.
# 2. An organ is a level, and the level of the lungs is the smallest of many; height changes them all.
# 3. Ground glass adds to the lung and keeps its vessels; consolidation replaces it and hides them.
# 4. A scanner blurs, and adds noise with a spectrum of its own, more of it where the body absorbs more.
# 5. A phantom shows whether a network learned our rules, and nothing about patients.
#
# ## Further reading
#
# How COVID-19 looks in CT is described in {cite:t}`Shi2020`; why models of it failed on patients, in
# {cite:t}`Roberts2021` and {cite:t}`DeGrave2021`. The data that the phantoms stand in for are those of
# {cite:t}`Zhang2020` and {cite:t}`Fan2020`. [Chapter 15](15_real_lesions.ipynb) turns to real slices.
