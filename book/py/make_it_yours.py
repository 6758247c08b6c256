# %% [markdown]
# # Make it yours
#
# You have read how the method works, and now you would like to try an idea of your own: another
# network under the detector, one more number for each box, two classes instead of three. **Where do
# you put it, and how much of the package do you have to touch?** For the six changes in the figure the
# answer is the same: you write a few lines in your own file, and leave the package as it is.

# %% tags=["fold"] mystnb={"image": {"alt": "Five boxes in a row, joined by arrows: data set, detector, ranked boxes, S, classes. Numbers 1 to 6 mark what can be replaced: 1 the columns of the ranked boxes, 2 the backbone of the detector, 3 the image classes of the data set, 4 S, 5 the lesion classes of the data set, 6 the whole detector."}, "figure": {"caption": "The six places where you can put something of your own, on the way from a slice to its classes. The numbers are those of the sections below."}}
# @title Imports, versions, and the opening picture
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import Dataset, Subset

import covidmask
from covidmask import plotting
from covidmask.config import PRESETS, TrainingConfig
from covidmask.datasets import LesionDataset, SliceImages, make_slice, write_phantoms
from covidmask.metrics import wilson
from covidmask.models import (
    Columns,
    count_parameters,
    covid_ct_mask_net,
    lesion_mask_rcnn,
    load_classifier,
    save_model,
    trained_segmenter,
)
from covidmask.models.ranked_boxes import ranked_boxes
from covidmask.training import evaluate_classifier, train_classifier, train_segmenter

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")

fig, ax = plt.subplots(figsize=(8, 1.9), layout="constrained")
parts = {
    "data set": "3  image classes\n5  lesion classes",
    "detector": "2  backbone\n6  all of it",
    "ranked\nboxes": "1  columns",
    "S": "4  all of it",
    "classes": "follow from\nthe data set",
}
frame = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": plotting.BLUE, "lw": 1.5}
for i, (name, places) in enumerate(parts.items()):
    middle = {"ha": "center", "va": "center", "weight": "bold"}
    _ = ax.text(1.5 * i, 1, name, bbox=frame, **middle)
    _ = ax.text(1.5 * i, 0.45, places, ha="center", va="top", linespacing=1.4)
    if i:
        ends = (1.5 * i - 0.5, 1), (1.5 * i - 1, 1)
        _ = ax.annotate("", *ends, arrowprops={"arrowstyle": "->", "lw": 1.5})
_ = ax.set(xlim=(-0.8, 6.8), ylim=(-0.1, 1.4))
_ = ax.axis("off")
plt.show()

# %% [markdown]
# **After it you can**
#
# - add a column to the ranked boxes, and replace the module $S$ that reads them;
# - put another backbone under the detector, or bring a detector of your own;
# - train on a data set with other classes, of images or of lesions;
# - save what you built, and load it again.
#
# **You need** [chapter 6](06_ranked_boxes.ipynb) and [chapter 7](07_covid_ct_mask_net.ipynb).
#
# **Time:** reading 15 min, exercises 30 min, running 2 min.
#
# ```{admonition} Synthetic data
# :class: important
# All slices are *phantoms*, and all runs here are far too short to compare anything. They show that a
# change works, not that it helps. Nothing here is for diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")
EVERY = 12  # a slice in so many is used, so that the page stays short
EPOCHS = 10

# %% [markdown]
# ## What all sections share
#
# The segmenter that comes with the package, a few slices, and one short training. `try_out` trains
# the regime *heads*, S alone, and says how many held-out slices it gets right.

# %%
preset = PRESETS[PRESET]
segmenter = trained_segmenter(PRESET, device, shipped=True)
root = write_phantoms(Path(DATA) / f"phantoms-{PRESET}", preset.phantoms)
splits = ("train", "val", "test")
slices = {split: SliceImages(root / "slices", split) for split in splits}
short = replace(preset.classifier_training, epochs=EPOCHS)


# %% tags=["fold"]
# @title Take a part of the slices, and train S alone
class Every(Subset):
    """Every so many slices of a data set, with what the training asks for."""

    def __init__(self, dataset, step=EVERY):
        super().__init__(dataset, range(0, len(dataset), step))
        self.classes = dataset.classes
        for name in ("names", "labels", "patients"):
            setattr(self, name, getattr(dataset, name)[::step])


def try_out(model, train, held_out):
    """Train S of a model, and count how many held-out slices are right."""
    torch.manual_seed(SEED)
    train_classifier(model, train, "heads", short, seed=SEED, progress=False)
    found = evaluate_classifier(model, held_out, progress=False)
    right, n = int(found["confusion"].trace()), len(held_out)
    low, high = wilson(right, n)
    print(f"{right} of {n} right: {right / n:.2f} ({low:.2f} to {high:.2f})")


# %%
train, held_out = Every(slices["train"]), Every(slices["test"], 6)
try_out(covid_ct_mask_net(segmenter, preset.classifier), train, held_out)

# %% [markdown]
# ## 1. A column
#
# A ranked box is five numbers. Suppose you believe that it matters how far a lesion lies from the
# middle of the slice. An encoder asks a function for each column; the function sees the boxes of
# one image, best first, and gives one number for each. `boxes.place` holds the corners as shares
# of the image; `boxes.score`, `boxes.deltas` and `boxes.label` are there, too.


# %%
def from_middle(boxes):
    middle = (boxes.place[:, :2] + boxes.place[:, 2:]) / 2  # [K, 2]
    return (middle - 0.5).norm(dim=1)  # [K]


encoder = Columns(("score", "dx", "dy", "dw", "dh", from_middle))
model = covid_ct_mask_net(segmenter, preset.classifier, encoder)
print(model.config.columns)
try_out(model, train, held_out)

# %% [markdown]
# S has grown with the rows: its first layer reads $6N$ numbers instead of $5N$. Columns that the
# package knows need no function, only their names: `Columns(("score", "cx", "cy", "w", "h"))`, or
# on the command line `--classifier.columns score cx cy w h`.
#
# ## 2. A backbone
#
# The backbone is a name: a ResNet or MobileNetV2 of torchvision, or any network of
# [timm](https://huggingface.co/docs/timm) that gives its feature maps (`pip install timm`).
# `levels` says how many of its last maps feed the pyramid. Here the weights are random; for
# ImageNet weights add `weights="IMAGENET1K_V1"`, or `weights="pretrained"` for a network of timm.

# %% tags=["nbval-check-output"]
grey, _mask = make_slice(seed=1, label=2, size=128)
image = torch.from_numpy(grey).repeat(3, 1, 1)  # [3, 128, 128]
for name in ("resnet18", "mobilenet_v2", "resnet10t"):  # the last is timm's
    config = replace(preset.detector, backbone=name, cut=0, levels=2)
    detector = lesion_mask_rcnn(config).eval()
    rows = ranked_boxes(detector, [image], preset.classifier)
    count = count_parameters(detector)
    print(f"{name:12s} {count:>10,} parameters, rows {list(rows.shape)}")

# %% [markdown]
# On the command line it is `covidmask train segmenter --detector.backbone mobilenet_v2
# --detector.cut 0 --detector.levels 2`.
#
# ## 3. Other image classes
#
# A data set brings its classes. What the training asks for is `classes`, and for each slice a
# label, a name and a patient. Here the question is only whether a slice shows COVID-19.


# %%
class CovidOrNot(Dataset):
    classes = ("not COVID-19", "COVID-19")

    def __init__(self, slices):
        self.slices = slices
        self.names, self.patients = slices.names, slices.patients
        self.labels = [int(label == 2) for label in slices.labels]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.slices[i][0], self.labels[i]


# %%
two = replace(preset.classifier, classes=CovidOrNot.classes)
model = covid_ct_mask_net(segmenter, two)
try_out(model, CovidOrNot(train), CovidOrNot(held_out))

# %% [markdown]
# A third of the slices show COVID-19, so a model that always says no is right in two thirds. For a
# folder of images no code is needed: put a file `classes.txt` beside the lists, with a name on each line
# in the order of the labels, and lines `image.png 1` into `train.txt`. Then `covidmask train
# classifier --data FOLDER` takes the classes from there.
#
# ## 4. Another S
#
# $S$ reads its rows in order, so it can learn what the first row means and what the tenth. This one
# cannot: it looks at each box alone and takes the mean over the boxes, so their order is lost.


# %%
class DeepSet(nn.Module):
    def __init__(self, columns=5, classes=3, width=64):
        super().__init__()
        self.box = nn.Sequential(
            nn.Linear(columns, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        self.image = nn.Linear(width, classes)

    def forward(self, rows):  # [B, N, columns]
        return self.image(self.box(rows).relu().mean(1))  # [B, classes]


# %%
model = covid_ct_mask_net(segmenter, preset.classifier, s=DeepSet())
try_out(model, train, held_out)

# %% [markdown]
# With three classes of equal size guessing is right in a third of the slices; a new network may
# need more than these few epochs to do better than that. The change works. Whether it can help is
# another question, and this run is too short to answer it.
#
# The weights file keeps the *name* of a part that is yours, never its code: loading a file must not
# run what a stranger wrote. So you pass the part again when you load the file, and an error reminds
# you if you forget.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = save_model(model, Path(folder) / "mine.safetensors")
    again = load_classifier(path, s=DeepSet())
    with torch.no_grad():
        before, after = model([image]).cpu(), again([image])
    print("the same logits:", torch.equal(before, after))
    try:
        load_classifier(path)
    except ValueError as error:
        print(str(error).replace(folder, "..."))

# %% [markdown]
# ## 5. Other lesions
#
# A data set with masks is a class with `read`: a grey slice in 0..1, and a mask in which 0 is
# background, 1 lung, and your classes are 2, 3, ... in their order. Boxes, labels and instances
# follow. These two lesions are discs, bright and dark.


# %%
class Discs(LesionDataset):
    names = patients = [f"disc {i}" for i in range(4)]

    def read(self, index):
        rng = np.random.default_rng(index)
        y, x = np.mgrid[:128, :128]
        mask = np.zeros((128, 128), np.uint8)
        centres = rng.uniform(20, 108, (2, 2))
        for code, (cy, cx) in zip((2, 3), centres, strict=True):
            mask[np.hypot(y - cy, x - cx) < 10] = code
        grey = np.choose(mask, (0.4, 0.4, 0.9, 0.1)).astype(np.float32)
        return grey, mask


# %%
discs = Discs(lesions="nodule,cyst")
config = replace(preset.detector, lesions="nodule,cyst")
detector = lesion_mask_rcnn(config)
once = TrainingConfig(epochs=1, batch_size=2)
steps = train_segmenter(detector, discs, once, progress=False)
print(f"{len(discs)} slices, {len(steps)} steps")
print("classes", detector.classes)
print("labels of the first slice:", discs[0][1]["labels"].tolist())

# %% tags=["fold"] mystnb={"image": {"alt": "A grey square with a bright and a dark disc, each in its box; the bright one is labelled nodule, the dark one cyst."}, "figure": {"caption": "The first slice of the data set of discs, with boxes and classes made from its mask."}}
# @title Draw the first slice of the discs
ax = plotting.get_ax(3.4, 3.4)
_ = plotting.show_lesions(*discs[0], ax, classes=detector.classes)
plt.show()

# %% [markdown]
# ## 6. A detector of yours
#
# Any two-stage detector of torchvision can be ranked, with masks or without, whatever it was
# trained to find. Here is a Faster R-CNN with MobileNetV3, untrained.

# %% tags=["nbval-check-output"]
mine = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
    weights=None,
    weights_backbone=None,
    num_classes=3,
    box_detections_per_img=50,
)
model = covid_ct_mask_net(mine, preset.classifier)
with torch.no_grad():
    print("rows", list(model.ranked_boxes([image]).shape))
    print("logits", list(model([image]).shape))

# %% [markdown]
# A detector that has no proposals, such as RetinaNet, has nothing to rank in this sense, and is
# refused with an error that says so.
#
# ## Numbers of a preset
#
# To change a number or a name you need no code. Every entry of a preset is an option of the command
# line, and `--help` lists them with their values:
#
#     covidmask train segmenter --preset quick --detector.lesions merged --segmenter.epochs 2
#     covidmask train classifier --classifier.n-boxes 8 --classifier.columns score cx cy w h
#     covidmask phantoms --phantoms.size 64 --out data/small
#
# The weights file notes what was changed.
#
# ## More than one GPU
#
# `torchrun` starts one process for each GPU, and the commands for training and evaluation work under
# it. The batch size counts the slices of all processes together and must be a multiple of their
# number, so the released code's batch of one slice becomes at least one slice a GPU; the learning rate is then
# yours to choose again. (Two processes on a CPU are tested; several GPUs were not at hand.)
#
#     torchrun --standalone --nproc_per_node=4 -m covidmask train segmenter --preset paper \
#         --data data/cncb-lesions --out seg.safetensors --batch-size 4 --workers 4
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · A longer box
#
# Kind: write a function, **
#
# Write a column `elongation(boxes)`: the logarithm of height over width, one number for each box.
# A box may be thinner than a pixel, so no side may count as less than 0.001 of the image. What does
# the column add that $\delta_w$ and $\delta_h$ do not say already?
#
# Hint: `boxes.place` is [K, 4], with $x_1, y_1, x_2, y_2$ as shares of the image.


# %% tags=["starter"]
def elongation(boxes):
    raise NotImplementedError("one number a box")


# %% tags=["solution"]
# @title Solution
def elongation(boxes):
    sides = (boxes.place[:, 2:] - boxes.place[:, :2]).clamp(min=1e-3)  # [K, 2]
    return (sides[:, 1] / sides[:, 0]).log()


encoder = Columns((*preset.classifier.columns, elongation))
longer = covid_ct_mask_net(segmenter, preset.classifier, encoder)
with torch.no_grad():
    column = longer.ranked_boxes([image.to(device)])[0, :, -1]
print(f"from {column.min():.2f} to {column.max():.2f}")


# %% tags=["wrong"]
def elongation(boxes):  # width over height
    sides = (boxes.place[:, 2:] - boxes.place[:, :2]).clamp(min=1e-3)
    return (sides[:, 0] / sides[:, 1]).log()


# %% tags=["wrong"]
def elongation(boxes):  # a box without width gives infinity
    sides = boxes.place[:, 2:] - boxes.place[:, :2]
    return (sides[:, 1] / sides[:, 0]).log()


# %% tags=["check"]
# @title Check your answer
corners = [[0, 0, 0.2, 0.2], [0, 0, 0.1, 0.2], [0.5, 0.5, 0.9, 0.7], [0.3, 0, 0.3, 0.5]]
toy = elongation(SimpleNamespace(place=torch.tensor(corners)))
assert toy.shape == (4,), f"One number a box, not {list(toy.shape)}."
assert abs(toy[0]) < 1e-6, "The logarithm of a square box is 0."
assert toy[1] > 0 > toy[2], "Tall boxes are above 0, wide ones below."
assert torch.isclose(toy[1], -toy[2]), "Twice as tall or wide: the sign differs."
assert toy.isfinite().all(), "The last box has no width: what is the logarithm then?"
print("right")

# %% [markdown] tags=["answer"]
# The deltas say how the box differs from its proposal; what the proposal looked like is not in the
# row. The elongation of the final box is new to $S$.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Order
#
# Kind: predict, then run, **
#
# Shuffle the rows of a slice. Whose logits change, those of the usual $S$ or those of `DeepSet`? Write
# your guess down first. Then write `change(s, rows, order)`: the largest change of a logit when the
# rows [1, N, 5] are put into another order, a permutation of 0 to N - 1. What does `DeepSet` still know
# of the ranks?
#
# Hint: `rows[:, order]` changes the order of the boxes.


# %% tags=["starter"]
def change(s, rows, order):
    raise NotImplementedError("one number")


# %% tags=["solution"]
# @title Solution
def change(s, rows, order):
    with torch.no_grad():
        return (s(rows) - s(rows[:, order])).abs().max().item()


usual = covid_ct_mask_net(segmenter, preset.classifier)
free = covid_ct_mask_net(segmenter, preset.classifier, s=DeepSet())
with torch.no_grad():
    rows = usual.ranked_boxes([image.to(device)])
order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(1))
changes = [change(m.s, rows, order) for m in (usual, free)]
print(f"S changes by {changes[0]:.3f}, DeepSet by {changes[1]:.6f}")
assert changes[0] > 100 * changes[1]


# %% tags=["wrong"]
def change(s, rows, order):  # shuffles the slices of the batch: there is one
    with torch.no_grad():
        return (s(rows) - s(rows[order % len(rows)][:1])).abs().max().item()


# %% tags=["wrong"]
def change(s, rows, order):  # shuffles the numbers of each box
    with torch.no_grad():
        return (s(rows) - s(rows.flip(2))).abs().max().item()


# %% tags=["check"]
# @title Check your answer
toy_rows = torch.arange(20.0).reshape(1, 4, 5)
back = torch.tensor([3, 2, 1, 0])
assert change(lambda r: r[:, 0, :3], toy_rows, back) == 15, (
    "A reader of the best box alone sees the last one after the turn."
)
assert change(lambda r: r.mean(1), toy_rows, back) == 0, "A mean has no order."
same = torch.arange(4)
assert change(lambda r: r[:, :, 0], toy_rows, same) == 0, "This order is the old one."
print("right")

# %% [markdown] tags=["answer"]
# Only the usual $S$ notices. Each row still holds its score, though, so `DeepSet` knows which boxes
# scored high; it has lost the order, not the scores.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A data set that contradicts itself
#
# Kind: find the bug, **
#
# `SickOrNot` is to tell control from both diseases together, label 0 from label 1. The training runs,
# and learns nonsense or stops with an error about labels. Find out why, and put it right.
#
# Hint: two places say what the label of slice `i` is.


# %% tags=["starter"]
class SickOrNot(Dataset):
    classes = ("control", "sick")

    def __init__(self, slices):
        self.slices = slices
        self.names, self.patients = slices.names, slices.patients
        self.labels = [int(label > 0) for label in slices.labels]

    def __len__(self):
        return len(self.slices.labels)

    def __getitem__(self, i):
        return self.slices[i]


# %% tags=["solution"]
# @title Solution
class SickOrNot(Dataset):
    classes = ("control", "sick")

    def __init__(self, slices):
        self.slices = slices
        self.names, self.patients = slices.names, slices.patients
        self.labels = [int(label > 0) for label in slices.labels]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.slices[i][0], self.labels[i]


two = replace(preset.classifier, classes=SickOrNot.classes)
try_out(covid_ct_mask_net(segmenter, two), SickOrNot(train), SickOrNot(held_out))


# %% tags=["wrong"]
class SickOrNot(Dataset):  # consistent, but the classes have changed places
    classes = ("control", "sick")

    def __init__(self, slices):
        self.slices = slices
        self.names, self.patients = slices.names, slices.patients
        self.labels = [int(label == 0) for label in slices.labels]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.slices[i][0], self.labels[i]


# %% tags=["check"]
# @title Check your answer
class ThreeSlices(list):
    """Three slices, one of each class."""

    names, patients, labels = ["a", "b", "c"], ["1", "2", "3"], [0, 1, 2]


toy_set = SickOrNot(ThreeSlices((torch.zeros(3, 8, 8), label) for label in range(3)))
assert len(toy_set) == 3, "As many slices as before."
given = [toy_set[i][1] for i in range(3)]
assert given == list(toy_set.labels), "Item and list `labels` disagree on a label."
assert toy_set.classes[given[0]] == "control", "The first slice is a control."
assert all(toy_set.classes[k] == "sick" for k in given[1:]), "The others are sick."
print("right")

# %% [markdown] tags=["answer"]
# The list `labels` is what sampling and reports read, the item is what the loss reads. Two thirds of the
# slices are of sick patients here, so compare what you see with a model that always says "sick".

# %% [markdown]
# ## What we learned
#
# 1. A column is a function of the boxes; $S$ grows with it.
# 2. A backbone is a name, and a detector of torchvision's is taken as it is.
# 3. A data set brings its classes, of images or of lesions.
# 4. A weights file names your parts and never holds their code; you pass them when you load it.
# 5. A short run shows that a change works. Whether it helps is a question for several seeds,
#    intervals and patients that nobody has looked at ([chapter 10](10_evaluation.ipynb)).
#
# ## Further reading
#
# The method is {cite:t}`TerSarkisov2020`, the detector {cite:t}`He2017`, the pyramid under it
# {cite:t}`Lin2017`.
