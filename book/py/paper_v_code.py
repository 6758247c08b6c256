# %% [markdown]
# # Paper v code
#
# A method section has a few pages and a repository thousands of lines, so small differences between
# the two are normal. **Where do the paper and its released code differ, and which of the two does
# this book follow?** The figure shows the 34 items of this page, so that you need not find them again
# if you build on the work.

# %% tags=["fold"] mystnb={"image": {"alt": "Six rows of numbered squares, one row for each part of the work: data, detector, ranked boxes and S, training, evaluation, numbers in the paper. Blue squares change results, hatched orange ones change counts or tables, white ones change words or leave something open. Most blue squares stand in the rows of the detector and of training."}, "figure": {"caption": "The items of this page by part of the work, and what each of them changes."}}
# @title Imports, versions, and the opening picture
import argparse
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Patch
from torchvision.models.detection.anchor_utils import AnchorGenerator

import covidmask
from covidmask import plotting
from covidmask.config import (
    IMAGE_CLASSES,
    PRESETS,
    ClassifierConfig,
    DetectorConfig,
)
from covidmask.datasets import mask_to_targets, old_friend
from covidmask.interactive import frame_slider
from covidmask.metrics import CocoAP, author_image_ap, report
from covidmask.models import (
    author_padding,
    batch_norm_parameters,
    binary_masks,
    count_parameters,
    count_trainable,
    covid_ct_mask_net,
    even_padding,
    lesion_mask_rcnn,
    pad_rows,
    propose,
    rank_boxes,
    run_box_head,
    set_regime,
    trained_classifier,
    trained_segmenter,
)
from covidmask.training import classification_loss

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # all digits count, on a GPU, too
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")

PARTS = {
    "data": range(1, 8),
    "detector": range(8, 16),
    "ranked boxes and S": range(16, 19),
    "training": range(19, 28),
    "evaluation": range(28, 30),
    "numbers in the paper": range(30, 35),
}
RESULTS = {5, 6, 7, 9, 11, 13, 14, 15, 17, 19, 20, 21, 22, 24, 25, 26}
TABLES = {1, 2, 3, 8, 23, 28, 29, 30, 31, 32, 33, 34}
LOOKS = {
    "results": {"facecolor": plotting.SKY_BLUE},
    "counts or tables": {"facecolor": plotting.ORANGE, "hatch": "//"},
    "words, or left open": {"facecolor": "white"},
}
fig, ax = plt.subplots(figsize=(8.5, 3.4), layout="constrained")
for row, items in enumerate(PARTS.values()):
    for column, item in enumerate(items):
        kind = "results" if item in RESULTS else "words, or left open"
        kind = "counts or tables" if item in TABLES else kind
        place = (column + 0.06, row + 0.06)
        _ = ax.add_patch(plt.Rectangle(place, 0.88, 0.88, ec="black", **LOOKS[kind]))
        frame = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        middle = {"ha": "center", "va": "center", "fontsize": 10}
        _ = ax.text(column + 0.5, row + 0.5, str(item), bbox=frame, **middle)
_ = ax.set(xlim=(0, 9), ylim=(len(PARTS), 0), xticks=[])
_ = ax.set_yticks([row + 0.5 for row in range(len(PARTS))], PARTS)
handles = [Patch(label=f"changes {k}", ec="black", **look) for k, look in LOOKS.items()]
_ = fig.legend(handles=handles, loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# **After it you can**
#
# - say, for each step of the method, what the paper says, what the code does and what we do;
# - tell a difference that changes results from one that changes only a count or a word;
# - check a published table with counts and arithmetic alone;
# - read code for what it does rather than for what its names promise.
#
# **You need** [chapter 6](06_ranked_boxes.ipynb) and [chapter 7](07_covid_ct_mask_net.ipynb) for
# the terms; the [glossary](glossary.md) has them as well.
#
# **Time:** reading 30 min, exercises 30 min, running 1 min.
#
# ```{admonition} Synthetic data
# :class: important
# Where a slice is needed, it is our old friend, a *phantom*. All other numbers are published ones, or
# counts and arithmetic. Nothing here is for diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0

# %%
preset = PRESETS[PRESET]
segmenter = trained_segmenter(PRESET, device, shipped=True)
model = trained_classifier(PRESET, device, shipped=True)
image, mask = old_friend(preset.phantoms.size)  # float32, uint8 [H, W]
picture = torch.from_numpy(image).expand(3, -1, -1).to(device)  # [3, H, W]

# %% [markdown]
# ## What is compared
#
# - **Paper**: {cite:t}`TerSarkisov2020`, the preprint.
# - **Code**: the repository AlexTS1980/COVID-CT-Mask-Net on GitHub, at commit
#   [f06cd37](https://github.com/AlexTS1980/COVID-CT-Mask-Net/tree/f06cd3735b7325c032c961a426b88b59224e73ba).
#   Where we look at an older commit, we name it.
# - **Lists**: the public split lists of COVIDx-CT-1 {cite:p}`Gunraj2020`, and the author's own
#   lists in his repository.
# - **Here**: what this book and its package do.
#
# The released code made this book possible. It answers questions that the paper leaves open, and a
# re-implementation could be tested against it number by number. In a paper without code nobody could
# have found any of this, so please do not read the list as a judgement of the work.
#
# Paper and code agree on most of what matters: Adam with learning rate $10^{-5}$ and weight decay
# $10^{-3}$, 50 epochs for the classifier, NMS thresholds of 0.75, the score threshold of -0.01, the
# five losses of Mask R-CNN, encoded boxes ranked by score, and the module $S$ on top.
#
# ## Data
#
# ### 1. How many slices have masks
#
# - **Paper**: 650 slices of 150 patients; 500 train and 150 validate (text), or 600 and 150 (Table
#   1).
# - **Code**: the README says 500 and 150. The released lists hold 650 slices of 130 patients and
#   100 slices of 20 patients.
# - **Here**: the lists, the only version that can be checked. Table 1 and the lists agree on the sum
#   of 750, the text does not; the number of patients fits the lists.
#
# ### 2. How many slices have class labels
#
# - **Paper**: 104,900 images, split 60 / 20 / 20 %. Table 1: 60K train, 20.6K validate, 21.1K test.
#   Text: 21,036 validate, 21,182 test.
# - **Lists**: 61,782 train, 21,036 validate, 21,191 test.
# - **Here**: the lists.

# %% tags=["fold", "nbval-check-output"]
# @title Add up the lists
lists = {"train": 61_782, "validation": 21_036, "test": 21_191}
total = sum(lists.values())
for split, slices in lists.items():
    share = slices / total
    print(f"{split:10} {slices:6,} = {share:.1%}, {slices / 1000:.1f}K")
print(f"sum {total:,}; the author trains on 3,000:", end=" ")
print(f"{3000 / lists['train']:.2%} of train, {3000 / total:.2%} of all")

# %% [markdown]
# 104,900 looks like 104,009 with two digits swapped. "About 5 % of the training split" and "3 % of
# the total" are right; 20.6K in Table 1 is not.
#
# ### 3. How many test slices
#
# - **Paper**: 21,182.
# - **Code**: the README's confusion matrices add up to 21,191, the page of the weights says 21,192.
# - **Lists**: 21,191.
# - **Here**: 21,191, and 21,182 where the paper's own table is quoted.
#
# An older README (commit
# [05c8fdc](https://github.com/AlexTS1980/COVID-CT-Mask-Net/blob/05c8fdc2f9effe19940809117a7115f621de2f1a/README.md))
# explains the paper's number. It prints the confusion matrix of the model in the paper.

# %% tags=["nbval-check-output"]
# rows: true class; columns: predicted class
old_readme = np.array([[8703, 738, 9], [406, 6767, 213], [14, 386, 3946]])
merged = np.array([[9236, 188, 26], [116, 7150, 129], [20, 298, 4028]])
two = np.array([[9158, 278, 14], [204, 7030, 161], [15, 251, 4080]])
readme = {"merged masks": merged, "two masks": two}
listed = np.array([9450, 7395, 4346])
for name, matrix in {"old README": old_readme, **readme}.items():
    missing = listed - matrix.sum(axis=1)
    print(f"{name:12} {matrix.sum():,} slices, missing {missing}")
hits, seen = old_readme[1, 1], old_readme[1].sum()
low, high = hits / (seen + 9), (hits + 9) / (seen + 9)
print(f"sensitivity of common pneumonia {hits / seen:.2%}")
print(f"with the nine {low:.2%} (all wrong) to {high:.2%} (all right)")

# %% [markdown]
# The paper's model was judged without nine slices of common pneumonia. They could move its
# percentages only a little.
#
# ### 4. Balance
#
# - **Paper**: trains "without" class weights and batch balancing.
# - **Code**: has neither. But the training sample of 3,000 slices is balanced by itself: 1,000 of
#   each class, out of 27,201, 22,061 and 12,520.
# - **Here**: the same. Say that the sample is balanced: it is a choice that helps the rarest class.
#
# ### 5. The classes of a mask are named by position
#
# - **Paper**: two lesion classes, GGO and consolidation.
# - **Code**: takes the values that occur in *this* mask, drops the two smallest (meant: background
#   and lung), and calls the next one class 1 and the one after it class 2.
# - **Here**: code 2 is GGO and code 3 is consolidation, whatever else occurs.
#
# As long as a mask holds all four values, both agree. Our own line with the same rule shows when
# they do not.


# %%
def names_by_position(mask):
    """Mask code -> class, by the rule of the released reader."""
    codes = np.unique(mask)[2:]
    return {int(code): place for place, code in enumerate(codes, start=1)}


# %% tags=["fold", "nbval-check-output"]
# @title Compare both rules on three small masks
lesion = {1: "GGO", 2: "C"}
for text, codes in (
    ("all four values", (0, 1, 2, 3)),
    ("no GGO", (0, 1, 3)),
    ("no lung pixels", (0, 2, 3)),
):
    toy = np.zeros((8, 8), dtype=np.uint8)
    for row, code in enumerate(codes):
        toy[2 * row, 2:6] = code  # one stripe for each value
    theirs = names_by_position(toy).values()
    ours = mask_to_targets(toy)["labels"].tolist()
    theirs, ours = (", ".join(lesion[i] for i in x) for x in (theirs, ours))
    print(f"{text:16} code: {theirs:7} here: {ours}")

# %% [markdown]
# A slice with consolidation and no GGO teaches the detector that consolidation is GGO. We do not know
# how many of the real slices are like that. With merged masks (one lesion class) a slice without GGO
# does no harm, but one without lung pixels loses its lesion.
#
# ### 6. Small lesions are dropped
#
# - **Paper**: says that the great majority of lesions are small (Figure 1), and does not say that
#   any is dropped.
# - **Code**: drops every connected region of at most 100 pixels, in training and from the ground
#   truth on which average precision is computed. A slice that has no lesion left is skipped in
#   training: no pass, no step.
# - **Here**: `min_area`, a setting: 101 in the preset `paper`, as in the code. Slices without a
#   lesion take part: their anchors and RoIs all teach "background".

# %% tags=["nbval-check-output"]
toy = np.zeros((512, 512), dtype=np.uint8)
toy[10:20, 10:20] = 2  # 100 pixels
toy[100:101, 100:201] = 2  # 101 pixels
for min_area in (1, 101):
    areas = mask_to_targets(toy, min_area=min_area)["area"].int().tolist()
    print(f"min_area {min_area:3}: regions of {areas} pixels")
print(f"100 pixels are {100 / 512**2:.3%} of a slice")

# %% [markdown]
# ### 7. Two ways to resize
#
# - **Paper**: says nothing about it.
# - **Code**: the classifier trains and validates on slices forced to 512 x 512, and tests on slices
#   whose shorter side is brought to 512 with the shape kept. A slice of 360 x 480 is squeezed to
#   512 x 512 in training and enlarged to 512 x 682 in testing.
# - **Here**: the shape is always kept. For square slices, which most CT slices are, nothing changes.
#
# ## The detector
#
# ### 8. Model sizes (Table 1)
#
# - **Paper**: 31.78M parameters for the segmenter, 34.14M for the classifier, of which 2.25M
#   (heads), 2.36M (heads + BN) or all are trained.
# - **Code**: can be counted. Three rules are in use: parameters; entries of the state dict
#   (parameters, batch-norm statistics and their counters); parameters that train.
# - **Here**: we count parameters, and say which. The list has each printed number with the rule
#   that gives it, or with "none". [Chapter 7](07_covid_ct_mask_net.ipynb) derives those of $S$.


# %% tags=["fold", "nbval-check-output"]
# @title Count parameters and entries
def entries(module):
    """All numbers of the state dict."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


def light_models(backbone, cut):
    """Segmenter and classifier of a light model, with shapes but without numbers."""
    with torch.device("meta"):
        config = DetectorConfig(backbone, cut, light_mask_head=True)
        segmenter = lesion_mask_rcnn(config)
        settings = ClassifierConfig(n_boxes=128, hidden=512)
        return segmenter, covid_ct_mask_net(segmenter, settings)


with torch.device("meta"):
    detector = lesion_mask_rcnn(DetectorConfig())
    large = covid_ct_mask_net(detector, ClassifierConfig())
s_count = count_parameters(large.s)
resnet34 = light_models("resnet34", 0)[1]
resnet18 = light_models("resnet18", 0)[1]
for name, millions, rule, number in (
    ("Mask R-CNN", 31.78, "segmenter entries", entries(detector)),
    ("full", 34.14, "segmenter entries + S", entries(detector) + s_count),
    ("heads+BN", 2.36, "S alone", s_count),
    ("ResNet-34 cut 0", 24.86, "classifier entries", entries(resnet34)),
    ("ResNet-18 cut 0", 14.75, "classifier entries", entries(resnet18)),
    ("S of a light model", 0.6, "S alone", count_parameters(resnet18.s)),
    ("heads", 2.25, "none", None),
    ("ResNet-34 cut 1", 11.74, "none", None),
    ("ResNet-18 cut 1", 6.35, "none", None),
    ("ResNet-34 cut 2", 4.92, "none", None),
    ("ResNet-18 cut 2", 4.25, "none", None),
):
    shown = "" if number is None else f"{number:,}"
    print(f"{name:20} {millions:5}M  {rule:22} {shown:>11}")
heads = detector.roi_heads
parts = detector.rpn.head, heads.box_head, heads.box_predictor
print(f"S: {s_count:,}; divided by 2**20: {s_count / 2**20:.3f}")
print(f"RPN head + box head + box predictor: {sum(map(count_parameters, parts)):,}")

# %% [markdown]
# 31.78M counts batch-norm statistics, which are no parameters. 34.14M (cut, not rounded) also
# counts a mask branch, which the classifier never runs. 2.36M is the module $S$ alone, without any
# batch norm. None of these rules gives 2.25M. The last two lines have two other counts that
# come to it, and we cannot say which was meant.
#
# ### 9. Losses of the boxes
#
# - **Paper**: smooth L1 for the boxes of the RPN and for those of the RoIs.
# - **Code**: plain L1 in the RPN, smooth L1 with $\beta = 1$ for the RoIs. So did torchvision when
#   the author copied it ([issue 1625](https://github.com/pytorch/vision/issues/1625)); since [pull
#   request 2113](https://github.com/pytorch/vision/pull/2113) both are smooth with $\beta = 1/9$.
# - **Here**: as in the code in the preset `paper` (`rpn_box_beta=0`, `box_beta=1`), as in today's
#   torchvision in the other presets.
#
# How hard does each pull at a small residual of one encoded coordinate?
# ([Chapter 4](04_losses.ipynb) draws these losses.)

# %% tags=["nbval-check-output"]
zero = torch.zeros(1)
for beta, name in (
    (0.0, "L1"),
    (1 / 9, "smooth L1, beta 1/9"),
    (1.0, "smooth L1, beta 1"),
):
    x = torch.tensor([0.05], requires_grad=True)
    F.smooth_l1_loss(x, zero, beta=beta, reduction="sum").backward()
    print(f"{name:20} residual 0.05: gradient {x.grad.item():.2f}")

# %% [markdown]
# ### 10. Anchors
#
# - **Paper**: small anchors with "a large number of scales (6 in total between 0.1 and 2)".
# - **Code**: five sizes (2 to 32 pixels); the six numbers are aspect ratios. That makes 30 anchors
#   at each place of each map. The code passes five tuples of sizes although there are four maps (or
#   one).
# - **Here**: the same anchors, one tuple for each map, on which torchvision insists.

# %% tags=["nbval-check-output"]
config = DetectorConfig()
sizes, ratios = config.anchor_sizes, config.anchor_ratios
anchors = AnchorGenerator((sizes,), (ratios,)).cell_anchors[0]  # [30, 4]
print(f"{len(sizes)} sizes x {len(ratios)} ratios = {len(anchors)}")
pairs = [(ratio, size) for ratio in ratios for size in sizes]
for (ratio, size), (_, top, _, bottom) in zip(pairs, anchors, strict=True):
    if top == bottom:
        print(f"size {size}, ratio {ratio}: height 0 pixels")

# %% [markdown]
# Corners are rounded to whole pixels, half to even, so two anchors have no height. No lesion can
# match them. The code keeps proposals of zero size (`min_size = 0`; torchvision: 0.001), so in the
# ResNet-50 model they can take up places among the 1,000. `rpn_min_size` is a setting here, 0 as in
# the code.
#
# ### 11. Ranking proposals
#
# - **Paper**: nothing on this.
# - **Code**: ranks proposals by raw logits. Today's torchvision ranks them by their sigmoid.
# - **Here**: raw logits.
#
# It sounds like the same order. In 32 bits it is not, because strong logits round to the same
# probability. Ties are then broken by accident, and the order of boxes is what $S$ reads.

# %% tags=["nbval-check-output"]
strong = torch.tensor([18.0, 20.0, 22.0, 25.0])
print("logits", strong.tolist())
print("different probabilities:", len(strong.sigmoid().unique()))

# %% [markdown]
# ### 12. Two words
#
# - **Paper**: the classes of RoIs have a "multilabel" cross-entropy; and positive RoIs are those
#   with a *score* above a threshold.
# - **Code**: a softmax over background and lesions (one label each, so multi-class); and positive
#   RoIs are those whose *IoU* with a true box is at least 0.75, negative ones those below 0.5.
# - **Here**: as in the code ([chapter 4](04_losses.ipynb)).
#
# ### 13. Where a mask begins
#
# - **Paper**: pixels with a mask logit above 0 (Figure 2), which is a probability of 0.5.
# - **Code**: the masks stay logits, without a sigmoid, and are cut at 0.5.
# - **Here**: probabilities, cut at 0.5. `mask_threshold` can be set.

# %%
code_threshold = torch.tensor(0.5).sigmoid().item()
assert abs(code_threshold - 0.6225) < 1e-4
print(f"a logit of 0.5 is a probability of {code_threshold:.3f}")
with torch.no_grad():
    found = segmenter([picture])[0]
keep = found["scores"] > 0.75
sure = {key: value[keep].cpu() for key, value in found.items()}
ours = int(binary_masks(sure, 0.5).sum())
theirs = int(binary_masks(sure, code_threshold).sum())
print(f"our old friend (phantom): {keep.sum()} detections above 0.75")
print(f"pixels of their masks: {ours} in the paper, {theirs} in the code")
assert theirs <= ours  # the masks of the code lie inside

# %% [markdown]
# ### 14. Defaults of the scripts
#
# - **Paper**: detections with a score above 0.75, RoI NMS 0.75.
# - **Code**: the scripts for detection default to a score of 0.05 and an RoI NMS of 0.5. The README
#   passes 0.75 for both where it evaluates the light models, and neither where it evaluates the
#   large ones.
# - **Here**: `box_nms=0.75`; the score threshold of a figure or a metric is always written down.
#
# ### 15. Pretrained backbone
#
# - **Paper**: nothing on how the backbone starts.
# - **Code**: has a flag `use_pretrained_resnet_backbone`, which reaches a function that ignores it.
#   The backbone starts from random weights.
# - **Here**: random weights, or torchvision's ImageNet weights by name (`lesion_mask_rcnn(config,
#   weights="IMAGENET1K_V1")`).
#
# ## Ranked boxes and the module S
#
# ### 16. N and the width of S
#
# - **Paper**: $N$ has no value; one fully connected layer of 1,024 is named.
# - **Code**: $N = 256$ and two hidden layers of 1,024 (light models: 128 and 512).
# - **Here**: as in the code.
#
# The count of 2.36M in the paper can be turned around: which $N$ fits it?

# %% tags=["nbval-check-output"]
wide = 1024
for layers in (1, 2):
    rest = wide + (layers - 1) * (wide * wide + wide) + 3 * wide + 3
    counts = {n: 5 * n * wide + rest for n in range(1, 1000)}
    fits = [n for n, number in counts.items() if int(number / 1e4) == 236]
    print(f"{layers} hidden layer(s) of {wide}: N = {fits}")

# %% [markdown]
# With two hidden layers, $N = 256$ is one of only two values that fit.
#
# ### 17. Fewer than N boxes
#
# - **Paper**: a score threshold of -0.01 guarantees the size of the vector.
# - **Code**: the threshold guarantees that no box is dropped for its score. NMS can still leave
#   $K < N$ boxes. Then the code repeats boxes, in order, with the places where the next box starts
#   drawn at random. With no box at all it stops with an error.
# - **Here**: each box is repeated equally often (`even_padding`). The author's rule is there too
#   (`author_padding`), with a generator that can be seeded. No box at all gives zeros.

# %% tags=["nbval-check-output"]
print("even:   ", even_padding(3, 8).tolist())
for seed in range(3):
    generator = torch.Generator().manual_seed(seed)
    print("author: ", author_padding(3, 8, generator).tolist())

# %% [markdown]
# Which box fills which row? The slider changes how many boxes are left.


# %% tags=["fold"]
# @title Draw which box fills which row
def draw_padding(kept, total):
    """Which of `kept` boxes fills each of `total` rows, by both rules."""
    fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    rows = np.arange(1, total + 1)
    look = {"where": "mid", "color": plotting.BLUE, "lw": 2.5}
    ax.step(rows, even_padding(kept, total) + 1, label="even", **look)
    colours = plotting.VERMILLION, plotting.GREEN
    for seed, (colour, line) in enumerate(zip(colours, ("--", ":"), strict=True)):
        index = author_padding(kept, total, torch.Generator().manual_seed(seed))
        look = {"where": "mid", "color": colour, "ls": line}
        ax.step(rows, index + 1, label=f"author, draw {seed}", **look)
    ax.set(xlabel="Row of the vector (rank)", ylabel="Box that fills it (rank)")
    ax.set(xlim=(0, total + 1), ylim=(0, total + 1))
    ax.legend(loc="upper left")
    return fig


N = preset.classifier.n_boxes
left = [max(2, N * eighths // 8) for eighths in (1, 2, 3, 4, 5, 6, 7)]
frame_slider(
    [draw_padding(kept, N) for kept in left],
    [f"{kept} of {N}" for kept in left],
    "Boxes that survive NMS",
    "Staircases from the first box to the last: one even, two random",
    caption="The even rule always gives the same staircase.",
    start=1,
    dpi=70,
)

# %% [markdown]
# Does it matter for the result? Suppose that a quarter of the boxes of our old friend were left.
# (In truth more than $N$ survive, see item 18.) Fill the vector five times by the random rule and
# ask $S$.

# %%
with torch.no_grad():
    rows = model.ranked_boxes([picture])[0]  # [N, 5]
    few = rows[: N // 4]
    draws = [torch.Generator().manual_seed(seed) for seed in range(5)]
    padded = [pad_rows(few, N, generator) for generator in draws]
    random = model.s(torch.stack(padded)).sigmoid().cpu()  # [5, 3]
    even = model.s(pad_rows(few, N)[None])[0].sigmoid().cpu()  # [3]
print(f"{'probability (phantom)':22} even   five random draws")
for i, name in enumerate(IMAGE_CLASSES):
    values = "  ".join(f"{value:.2f}" for value in random[:, i])
    print(f"{name:22} {even[i]:.2f}   {values}")

# %% [markdown]
# Where padding is needed, the code's probabilities for one and the same slice change from run to
# run. Where two classes are close, the answer can change with them.
#
# ### 18. What a row is
#
# - **Paper**: "we ignore the scaling to the image size" and use encoded coordinates with their
#   score.
# - **Code**: a row is the score and the four raw outputs of the box predictor for that class,
#   before they are divided by the box coder's weights (10, 10, 5, 5). NMS and the test for empty
#   boxes do use the decoded boxes. One RoI can appear twice, once for each lesion class.
# - **Here**: the same. The package's tests compare it with numbers that the author's code computed.

# %% tags=["fold"]
# @title Count the RoIs behind the rows
with torch.no_grad():
    features, proposals, shapes = propose(model.detector, [picture])
    outputs = run_box_head(model.detector, features, proposals, shapes)
    everything = ClassifierConfig(n_boxes=10**6)  # no cut at N
    coder = model.detector.roi_heads.box_coder
    first = (x[0] for x in (*outputs, proposals, shapes))  # of one slice
    ranking = rank_boxes(*first, coder, everything)
kept = ranking.roi[:N]
print(f"{len(proposals[0])} proposals x 2 classes")
print(f"{len(ranking.roi)} boxes after NMS, best {N} kept")
print(f"they come from {len(kept.unique())} RoIs (our old friend, phantom)")
assert len(ranking.roi) >= N
assert len(kept.unique()) <= len(kept)

# %% [markdown]
# ## Training
#
# ### 19. The loss of the classifier
#
# - **Paper** (Algorithm 1, line 9): $-\sum_k L_k \log \sigma(\hat s_k)$, the term of the true class
#   alone, summed over classes.
# - **Code**: binary cross-entropy with both terms,
#   $-\frac{1}{3}\sum_k \left[ L_k \log \sigma(\hat s_k) + (1 - L_k) \log (1 - \sigma(\hat s_k)) \right]$.
# - **Here**: as in the code.
#
# The difference is not small. With the printed loss a wrong class can score as high as it likes,
# and the optimum is to say "yes" to everything.


# %%
def printed_loss(logits, labels):
    """Line 9 of Algorithm 1 as printed."""
    true = F.one_hot(labels, 3)
    return -(true * F.logsigmoid(logits)).sum(dim=1).mean()


# %% tags=["nbval-check-output"]
label = torch.tensor([2])
for text, row in (
    ("only COVID-19 is high", [-3.0, -3.0, 3.0]),
    ("all are high", [3.0, 3.0, 3.0]),
):
    logits = torch.tensor([row])
    print(text)
    print(f"   as printed     {printed_loss(logits, label):.3f}")
    print(f"   as in the code {classification_loss(logits, label):.3f}")
logits = torch.tensor([[3.0, 3.0, 3.0]], requires_grad=True)
printed_loss(logits, label).backward()
wrong = logits.grad[0, :2].abs().tolist()
print("gradient of the printed loss for the two wrong classes:", wrong)

# %% [markdown]
# ### 20. Three regimes, one in the code
#
# - **Paper**: three regimes, "heads", "heads + BN" and "full".
# - **Code**: at the commit that we read there is one: $S$ + BN. An older commit
#   ([1a46e4a](https://github.com/AlexTS1980/COVID-CT-Mask-Net/tree/1a46e4a1ca83948bba3991a0e14215f73add6b59))
#   still has the option `--update_type` with all three names.
# - **Here**: all three ([chapter 8](08_three_regimes.ipynb)).
#
# ### 21. Training mode or evaluation mode
#
# - **Paper**: for "full", the layers of RPN and RoI were set to training mode.
# - **Code**: the detector is in evaluation mode, so batch norm uses its stored statistics and never
#   updates them. In the older commit, "full" did put the backbone, the RPN and the RoI heads into
#   training mode; then the statistics are those of the one image that is run, and they drift.
# - **Here**: evaluation mode in all three regimes, so that the result of a slice does not depend on
#   what was run before it. Our "full" is therefore not the paper's in this point.

# %% tags=["nbval-check-output"]
before = {name: b.clone() for name, b in model.named_buffers()}
_ = model.train()
pair = [picture, picture.flip(-1)]
labels = torch.tensor([2, 2], device=device)
loss = classification_loss(model(pair), labels)
assert not model.detector.training and model.s.training
after = dict(model.named_buffers())
assert all(torch.equal(after[name], before[name]) for name in before)
print("batch-norm statistics are the same before and after")
single = torch.cat([model([one]) for one in pair])
assert torch.allclose(model(pair), single, atol=1e-3)
print("a batch gives what single slices give")
_ = model.eval()

# %% [markdown]
# ### 22. Does the RPN learn in "full"?
#
# - **Paper**: all RPN and RoI weights were made trainable and "in fact they were updated".
# - **Code**: the RPN's proposals and scores are detached from the graph. No gradient of the
#   classifier's loss reaches the RPN's head, so it cannot change.
# - **Here**: the same.

# %% tags=["nbval-check-output"]
trained = set_regime(model, "full")
classification_loss(model([picture]), labels[:1]).backward()
for name, part in (
    ("backbone and FPN", model.detector.backbone),
    ("RPN head", model.detector.rpn.head),
    ("box head", model.detector.roi_heads.box_head),
    ("S", model.s),
):
    gradients = [p.grad for p in part.parameters() if p.grad is not None]
    reached = any(bool(gradient.any()) for gradient in gradients)
    print(f"{name:17} gets a gradient: {reached}")
model.zero_grad(set_to_none=True)

# %% [markdown]
# ### 23. Which batch norms train
#
# - **Paper**: "module $S$ + batch normalization layers".
# - **Code**: looks for the letters `bn` in the name of a parameter. The batch norms of the
#   downsample branches are called `downsample.1`, and are missed.
# - **Here**: every batch norm, found by its type.

# %% tags=["nbval-check-output"]
set_regime(large, "heads_bn")
named = dict(large.named_parameters())
trains = {name for name, p in named.items() if p.requires_grad}
by_name = {n for n in named if n.startswith("s.") or "bn" in n}
missed = sorted(trains - by_name)
found, lost = (sum(named[n].numel() for n in x) for x in (by_name, missed))
print(f"ResNet-50: S + every batch norm {count_trainable(large):,}")
print(f"by name {found:,}; missed: {len(missed)} tensors, {lost:,} numbers")
print("for example", missed[0].removeprefix("detector."))

# %% [markdown]
# ### 24. Batch size, epochs, and which model is kept
#
# - **Paper**: names no batch size ("for other details [...] see our implementation"); 50 epochs "for
#   each algorithm"; Algorithm 1 returns the best model. Where it says "batch" of boxes, it means the
#   $N$ ranked boxes of one image.
# - **Code**: a step of the segmenter takes **one slice** (batch size 1), a step of the classifier
#   eight. The README trains the segmenter for 100 epochs (an older one for 50). The loops save every
#   tenth epoch and compare nothing: which file is best is decided outside the code.
# - **Here**: the code's epochs and batches in the preset `paper`. Of the classifier the epoch with
#   the best *validation* accuracy is kept, by code; of the segmenter the last.
#
# ### 25. Validation that trains a little
#
# - **Paper**: nothing on this.
# - **Code**: the segmenter computes its validation loss in training mode. No weight changes, but
#   batch norm updates its running statistics from the validation slices. The classifier's
#   validation builds a graph that nobody uses, which costs memory and time.
# - **Here**: validation runs in evaluation mode without a graph.

# %% tags=["nbval-check-output"]
norm = torch.nn.BatchNorm2d(1)
with torch.no_grad():
    norm(torch.full((1, 1, 2, 2), 5.0))
print("running mean after one validation batch")
print(f"in training mode: {norm.running_mean.item():.1f}")
norm.eval()
with torch.no_grad():
    norm(torch.full((1, 1, 2, 2), 50.0))
print(f"after one more in evaluation mode: {norm.running_mean.item():.1f}")

# %% [markdown]
# ### 26. Seeds and resuming
#
# - **Paper**: nothing on this.
# - **Code**: the seed is the clock, so no run can be repeated. A saved file holds the number of
#   finished epochs; on resuming, the code adds 1 to it and skips an epoch number.
# - **Here**: a seed is an argument, and a resumed run gives the same bits as one that was not
#   interrupted.
#
# ### 27. Commands and files
#
# - **Code**: two commands of the README name options that the scripts do not have (see below).
#   `requirements.txt` asks for `PIL==6.1.0`, which cannot be installed (that package is called
#   Pillow). The released weights hold a pickled object of the author's own class, so loading them
#   the usual way can run code.
# - **Here**: commands in this book are run by its tests. `covidmask convert` reads the author's
#   files without running anything in them and writes safetensors.

# %% tags=["fold", "nbval-check-output"]
# @title Parse the commands of the README with the options of the scripts
parser = argparse.ArgumentParser()
declared = """
backbone_name truncation device model_name rpn_nms_th mask_type start_epoch
pretrained_model num_epochs use_pretrained_resnet_backbone save_dir lrate
train_data_dir val_data_dir gt_dir imgs_dir batch_size save_every ckpt
test_data_dir test_imgs_dir confidence_th mask_logits_th roi_nms_th
"""  # by the scripts
for option in declared.split():
    _ = parser.add_argument(f"--{option}")
evaluate = """--ckpt x.pth --test_data_dir covid_data/test
--test_imgs_dir imgs --masks_type both"""  # as the README has it
train = """--device cuda --num_epochs 100 --use_pretrained_model False
-use_pretrained_backbone True"""
for words in (evaluate, train):
    _, unknown = parser.parse_known_args(words.split())
    print("not accepted:", " ".join(unknown))

# %% [markdown]
# ## Evaluation
#
# ### 28. Average precision
#
# - **Paper**: gives no number for the segmenter, only pictures.
# - **Code**: has a script for average precision (AP), and the README a table. It calls the mean
#   over ten thresholds the main metric of COCO {cite:p}`Lin2014`. The rule is another one: each
#   true lesion takes the detection with the best IoU, whatever its score; all classes share one
#   curve; AP is computed for each image and averaged; an image without lesions and detections
#   counts as 1.
# - **Here**: COCO's AP, and the author's rule beside it where we compare (`author_ap`).
#
# Three toy images show that the rules differ in both directions.


# %%
def both_rules(found, target):
    """AP at IoU 0.5 of one image: the author's rule, and COCO's."""
    coco = CocoAP()
    coco.update([found], [target])
    author = author_image_ap(found, target, [0.5])[0]
    return author, coco.compute()["mask_ap50"]


# %% tags=["fold", "nbval-check-output"]
# @title Judge three toy images by both rules
def instances(boxes, labels, scores=None, size=48):
    """Rectangular lesions as torchvision's dictionary."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        masks[i, y1:y2, x1:x2] = 1
    labels = torch.tensor(labels, dtype=torch.int64)
    result = {"boxes": boxes, "labels": labels, "masks": masks}
    if scores is not None:
        result["scores"] = torch.tensor(scores)
    return result


A, nearly_A, B = [0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]
three_more = [[30, 0, 40, 10], [0, 30, 10, 40], [34, 34, 44, 44]]
cases = {
    "two detections of one lesion; the worse fit scores higher": (
        instances([A, nearly_A], [1, 1], [0.3, 0.8]),
        instances([A], [1]),
    ),
    "three GGO found, the one consolidation missed": (
        instances(three_more, [1, 1, 1], [0.9, 0.8, 0.7]),
        instances([*three_more, B], [1, 1, 1, 2]),
    ),
    "nothing there, nothing found": (
        instances([], [], []),
        instances([], []),
    ),
}
for name, (found, target) in cases.items():
    author, coco = both_rules(found, target)
    print(f"{name}: author {author:.2f}, COCO {coco:.2f}")

# %% [markdown]
# In the last case COCO has no value for the image and leaves it out. So the README's AP cannot be
# set beside a COCO table.
#
# ### 29. Which numbers are the result
#
# - **Paper**: COVID-19 sensitivity 90.80 %, accuracy 91.66 % (heads + BN).
# - **Code**: the README now reports better models, trained later (see below), and light models that
#   the paper does not have.
# - **Here**: we quote both, with their source. The weights that the repository offers are those of
#   the later models.

# %% tags=["nbval-check-output"]
for name, matrix in {"paper (old README)": old_readme, **readme}.items():
    shares = report(matrix)
    sensitivity, accuracy = shares["sensitivity"][2], shares["accuracy"]
    print(f"{name:19} COVID-19 {sensitivity:.2%}, accuracy {accuracy:.2%}")

# %% [markdown]
# ## Numbers in the paper
#
# The rest needs no code of the author, only arithmetic on what is printed. The paper prints
# percentages with two digits, and a class has thousands of slices, so a percentage nearly fixes a
# count.


# %%
def counts_for(percent, total):
    """Whole numbers k with 100 k / total near the percentage."""
    guess = round(percent / 100 * total)
    near = range(max(0, guess - 5), guess + 6)
    return [k for k in near if abs(100 * k / total - percent) < 0.01]


def accuracies_for(percents, sizes=listed):
    """Smallest and largest accuracy (%) that fit sensitivities."""
    pairs = zip(percents, sizes, strict=True)
    possible = [counts_for(percent, size) for percent, size in pairs]
    ends = sum(map(min, possible)), sum(map(max, possible))
    return tuple(100 * hits / sum(sizes) for hits in ends)


# %% [markdown]
# ### 30. Controls: 92.10 or 91.10
#
# - **Paper**: for heads + BN the abstract gives 92.10 % sensitivity for controls, Table 2 gives
#   91.10 %. Accuracy: 91.66 %.
# - **Here**: 92.10 % is right. Only it fits the accuracy, and it is what the old README's matrix
#   gives. The other two rows of Table 2 agree with their accuracy.

# %% tags=["fold", "nbval-check-output"]
# @title Which sensitivity fits the accuracy?
for control in (92.10, 91.10):
    low, high = accuracies_for((control, 91.62, 90.80))
    print(f"controls {control:.2f}: accuracy {low:.2f} to {high:.2f}")
print("printed accuracy 91.66")
old = report(old_readme)
print("old README:", [f"{value:.2%}" for value in old["sensitivity"]])
print(f"its accuracy {old['accuracy']:.2%}")
for name, row, printed in (
    ("heads", (82.37, 71.13, 76.30), 77.20),
    ("full", (97.21, 91.70, 82.26), 92.22),
):
    low, high = accuracies_for(row)
    assert low - 0.005 <= printed <= high + 0.005
    print(f"{name}: {low:.2f} to {high:.2f}, printed {printed:.2f}")

# %% [markdown]
# ### 31. PPVs that do not add up
#
# - **Paper**, Table 2: PPV (precision) of each class in brackets.
# - **Check**: a class with $TP$ hits and precision PPV was predicted $TP / \text{PPV}$ times. Every
#   slice gets one prediction, so the three numbers must add up to the number of test slices.

# %% tags=["fold", "nbval-check-output"]
# @title Add up the predictions that each row implies
table_2 = {  # (sensitivity, PPV) of control, common pneumonia, COVID-19
    "heads": ((82.37, 83.38), (71.13, 67.70), (76.30, 81.13)),
    # 92.10: see item 30
    "heads + BN": ((92.10, 94.33), (91.62, 87.08), (90.80, 94.75)),
    "full": ((97.21, 95.33), (91.70, 95.22), (82.26, 87.01)),
}


def predictions_for(row, sizes=listed):
    """Smallest and largest number of predictions that fit a printed row."""
    ends = []
    for (sensitivity, ppv), size in zip(row, sizes, strict=True):
        hits = counts_for(sensitivity, size)
        low, high = (int(100 * k / ppv) for k in (hits[0], hits[-1]))
        around = np.arange(low - 9, high + 10)  # [M], predictions
        misses = abs(100 * np.array(hits)[:, None] / around - ppv)
        ends.append(around[(misses < 0.01).any(0)].tolist())
    return sum(map(min, ends)), sum(map(max, ends))


without_nine = old_readme.sum(axis=1)  # see item 3
for name, row in table_2.items():
    for sizes in (listed, without_nine):
        low, high = predictions_for(row, sizes)
        slices = sum(sizes)
        fits = "fits" if low <= slices <= high else "does not fit"
        print(f"{name:10} {low:,} to {high:,} predictions,", end=" ")
        print(f"{slices:,} slices: {fits}")
print("PPV of the old README:", [f"{value:.2%}" for value in old["ppv"]])

# %% [markdown]
# The PPVs of "full" imply more than 300 predictions too few, those of heads + BN 16 to 20. The
# matrix in the old README has the sensitivities of heads + BN and other PPVs. So at least one
# number in each of these two rows comes from another model or is misprinted; we cannot tell which.
#
# ### 32. "Precision above 90 % for all classes"
#
# - **Paper**, text: heads + BN has a precision above 90 % across all classes. Table 2: 87.08 % for
#   common pneumonia.
# - **Here**: the table. (The old README's matrix gives 85.76 %.)
#
# ### 33. Table 1: "Ratio Train/Test"
#
# - **Paper**: 7.06 for this work, 0.353 for COVIDNet-CT, 0.129 for COVNet, 0.17 for ResNet18.
# - **Check**: it is test divided by train.

# %% tags=["fold", "nbval-check-output"]
# @title Divide test by training slices
for name, test_size, train_size, printed in (
    ("COVID-CT-Mask-Net", 21182, 3000, 7.06),
    ("COVIDNet-CT", 21182, 60000, 0.353),
    ("COVNet", 438, 3000, 0.129),
    ("ResNet18", 90, 528, 0.17),
):
    ratio = test_size / train_size
    print(f"{name:18} printed {printed:5}, test / train {ratio:.4f}")
print(f"COVNet, test / (train + validation): {438 / (3000 + 370):.5f}")

# %% [markdown]
# For COVNet the printed ratio fits only if the validation images are added to the training images
# (and the result is cut). The paper calls 7.06 a new state of the art. A ratio of test to train
# says how little was used for training. No accuracy enters it, so it does not measure how well the model
# generalises; and how precise a result is depends on the test patients. (Besides, all splits come from
# one source.)
#
# ### 34. Smaller slips
#
# - ResNet18 {cite:p}`Butt2020` has a COVID-19 sensitivity of 81.2 % in the introduction and 81.30 %
#   in Table 3.
# - README: the light ResNet-34 model has the same number, 92.89 %, for controls and for the
#   accuracy. Its sensitivities give another one:

# %% tags=["nbval-check-output"]
for name, row, printed in (
    ("ResNet-34 cut 1", (92.89, 91.70, 91.76), 92.89),
    ("ResNet-18 cut 1", (96.98, 91.63, 91.35), 93.95),
):
    low, high = accuracies_for(row)
    print(f"{name}: {low:.2f} to {high:.2f}, printed {printed:.2f}")

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · How many ways to pad
#
# Kind: pencil, **
#
# The author's rule (item 17) draws $K - 1$ different places out of $N - 2$; at each of them the next
# box starts. In how many ways can $K$ boxes fill $N$ rows? Write `ways(k, n)`. How likely is it that
# two runs fill 256 rows with 250 boxes alike?
#
# Hint: `math.comb`. To see whether you are right, collect what `author_padding(3, 6, generator)`
# gives with many seeds.


# %% tags=["starter"]
def ways(k, n):
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def ways(k, n):
    return math.comb(n - 2, k - 1)


count = ways(250, 256)
print(f"{count:,} ways, so two runs agree with a probability of 1 in {count:,}")


# %% tags=["wrong"]
def ways(k, n):
    return math.comb(n, k)


# %% tags=["wrong"]
def ways(k, n):
    return math.comb(n - 1, k - 1)


# %% tags=["check"]
# @title Check your answer
for few_boxes, few_rows in ((3, 6), (2, 7), (1, 4)):
    found = set()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        found.add(tuple(author_padding(few_boxes, few_rows, generator).tolist()))
    assert ways(few_boxes, few_rows) == len(found), (
        f"{few_boxes} boxes in {few_rows} rows: 200 seeds give another number of ways."
    )
print("right")

# %% [markdown] tags=["answer"]
# Six missing boxes are enough to make the result of a slice unrepeatable.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Found by name
#
# Kind: find the bug, **
#
# `batch_norms(model)` should return the names of all batch-norm parameters of a detector. The version
# below asks for letters in a name, as the released code does (item 23). Put it right, for any
# backbone. What share of the numbers does the first version miss in the light models with ResNet-18,
# for each cut?
#
# Hint: `model.named_modules()` gives the layers with their names; `isinstance` asks for their type.


# %% tags=["starter"]
def batch_norms(model):
    return [name for name, _ in model.named_parameters() if "bn" in name]


# %% tags=["solution"]
# @title Solution
def batch_norms(model):
    return [
        f"{name}.{part}"
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.BatchNorm2d)
        for part, _ in layer.named_parameters()
    ]


for cut in (0, 1, 2):
    light, _ = light_models("resnet18", cut)
    number = {name: p.numel() for name, p in light.named_parameters()}
    every = sum(number[name] for name in batch_norms(light))
    lost = sum(number[name] for name in batch_norms(light) if "bn" not in name)
    print(f"cut {cut}: {lost:,} of {every:,} missed ({lost / every:.0%})")


# %% tags=["wrong"]
def batch_norms(model):  # takes the convolutions of these branches, too
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if "bn" in name or "downsample" in name]


# %% tags=["wrong"]
def batch_norms(model):  # takes every vector, the biases of other layers, too
    return [name for name, p in model.named_parameters() if p.dim() == 1]


# %% tags=["check"]
# @title Check your answer
light, _ = light_models("resnet18", 1)
number = {name: p.numel() for name, p in light.named_parameters()}
mine = batch_norms(light)
assert set(mine) <= set(number), "Return names as `named_parameters` gives them."
true = sum(p.numel() for p in batch_norm_parameters(light))
total = sum(number[name] for name in mine)
assert total >= true, "Some are not found: their names lack these letters."
assert total <= true, "Some of these parameters belong to layers of another type."
print("right")

# %% [markdown] tags=["answer"]
# Each of layers 2, 3 and 4 begins with one downsample branch, and its batch norm is as wide as the
# layer. A cut removes whole layers, with their downsample branch and their other batch norms together,
# so the first layers, which have none, weigh more in what is left.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A table with an error
#
# Kind: write a function, **
#
# A paper reports, on 1,000 slices (500 control, 300 common pneumonia, 200 COVID-19), sensitivities
# of 96, 90 and 85 % with PPVs of 94.12, 91.22 and 94.44 %, and an accuracy of 92 %. Write
# `implied(sensitivity, ppv, sizes)`, which takes shares from 0 to 1 and numbers of slices, and returns
# the accuracy and the number of predictions that the table implies. Does the table add up?
#
# Hint: how many hits has a class? And how often was it predicted, if that share of them is right?


# %% tags=["starter"]
def implied(sensitivity, ppv, sizes):
    raise NotImplementedError("accuracy, predictions")


# %% tags=["solution"]
# @title Solution
def implied(sensitivity, ppv, sizes):
    sensitivity, ppv, sizes = map(np.asarray, (sensitivity, ppv, sizes))
    hits = sensitivity * sizes
    return hits.sum() / sizes.sum(), (hits / ppv).sum()


printed = (0.96, 0.9, 0.85), (0.9412, 0.9122, 0.9444)
accuracy, predictions = implied(*printed, (500, 300, 200))
print(f"accuracy {accuracy:.2%}, {predictions:.0f} predictions for 1,000 slices")


# %% tags=["wrong"]
def implied(sensitivity, ppv, sizes):  # all classes weigh alike
    sensitivity, ppv, sizes = map(np.asarray, (sensitivity, ppv, sizes))
    return sensitivity.mean(), (sensitivity * sizes / ppv).sum()


# %% tags=["wrong"]
def implied(sensitivity, ppv, sizes):  # multiplies by the PPV
    sensitivity, ppv, sizes = map(np.asarray, (sensitivity, ppv, sizes))
    hits = sensitivity * sizes
    return hits.sum() / sizes.sum(), (hits * ppv).sum()


# %% tags=["check"]
# @title Check your answer
one = report(merged)  # a matrix that adds up
accuracy, predictions = implied(one["sensitivity"], one["ppv"], merged.sum(axis=1))
assert np.isclose(accuracy, one["accuracy"]), "Large classes weigh more."
assert np.isclose(predictions, merged.sum()), "Each slice has one prediction."
print("right")

# %% [markdown] tags=["answer"]
# Sensitivities and accuracy agree. The PPVs leave some slices without a prediction, by more than their
# rounding explains, so at least one number is wrong.

# %% [markdown]
# ## What we learned
#
# 1. Paper and code agree on the method; they differ in details, and some details change results.
# 2. Check code by counting, by gradients and by toy inputs; its names can mislead.
# 3. A printed table can be checked with arithmetic: sensitivities fix counts, and counts must add
#    up.
# 4. Old commits are part of the record: one README explains three numbers of the paper.
# 5. Released code lets others find such things. When you publish, release yours too, with its lists
#    and matrices.
#
# ## Further reading
#
# The paper is {cite:t}`TerSarkisov2020`, the split that of {cite:t}`Gunraj2020`, the data those of
# {cite:t}`Zhang2020`. Mask R-CNN is described by {cite:t}`He2017`, batch normalisation by
# {cite:t}`Ioffe2015`, COCO's AP by {cite:t}`Lin2014`. On what studies of this kind should report,
# read {cite:t}`Roberts2021`.
