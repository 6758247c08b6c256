# %% [markdown]
# # 2 · Mask R-CNN from the inside
#
# How does a network turn a slice into boxes and masks, and what exactly is it trained on? In this
# chapter we take a trained detector apart. We build each part again from plain tensors, and each
# time an `assert` checks that the copy gives the same numbers as the original.
#
# **After it you can**
#
# - list the anchors of a detector, decode its deltas and filter its proposals by hand;
# - say which anchors and regions count as lesion, which as background, and which are left out;
# - write RoIAlign in ten lines, and say why it does not round;
# - follow one lesion from an anchor to a box, a class and a mask;
# - compute the five losses of Mask R-CNN, and say which part of the network each one teaches.
#
# **You need** basic PyTorch (convolutions, gradients) and, for the data, [chapter
# 1](01_data.ipynb). The chapter runs alone. **Run time:** about half a minute on two CPU cores in the
# preset `quick`.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a picture made by formulas and random numbers. No
# number below is a result on patients, and nothing here is for diagnosis.
# ```

# %% tags=["fold"]
# @title Imports and versions
import copy
import math
import platform

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.patches import FancyBboxPatch, Rectangle

import covidmask
from covidmask import plotting
from covidmask.config import LESION_CLASSES, PRESETS
from covidmask.datasets import make_slice, mask_to_targets, old_friend
from covidmask.interactive import frame_slider
from covidmask.models import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    lesion_mask_rcnn,
    trained_segmenter,
)
from covidmask.plotting import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILLION,
)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU, too, all digits of float32 count
torch.backends.cudnn.allow_tf32 = False
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"torchvision {torchvision.__version__}, Python {platform.python_version()}")

# %% [markdown]
# The preset chooses the scale (image size, backbone, number of proposals) and the settings that go
# with it. In `quick` the IoU thresholds, the $\beta$ of the box losses and the learning rate are
# not the paper's.

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0

# %% [markdown]
# ## Boxes with scores, not a map of the slice
#
# A semantic segmentation network such as U-Net {cite:p}`Ronneberger2015` or FCN {cite:p}`Long2015`
# answers one question for each pixel: which class is this? Mask R-CNN {cite:p}`He2017` answers
# another one for each *instance*, that is each separate lesion: where is its box, what is its
# class, how sure is the network, and which pixels inside the box belong to it?
#
# Here is our old friend, a COVID-19 phantom on which no model was trained, with the truth that the
# detector should find.

# %%
preset = PRESETS[PRESET]
config = preset.detector
image, mask = old_friend(preset.phantoms.size)
target = mask_to_targets(mask, config.lesions, preset.min_area)
names = ("background", *LESION_CLASSES[config.lesions])  # class 0, 1, 2

# %% mystnb={"image": {"alt": "A synthetic chest slice twice. Left: areas of lung, GGO and consolidation in different colours. Right: the grey slice in the lung window with boxes and outlines around single lesions."}, "figure": {"caption": "Our old friend. Left: one code for each pixel, as a semantic network would predict it. Right: one box, one class and one mask for each lesion, as Mask R-CNN predicts them. Synthetic."}}
fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.6), layout="constrained")
_ = plotting.show_mask(mask, axes[0])
_ = axes[0].set_title("semantic mask")
_ = plotting.show_lesions(image, target, axes[1])
_ = axes[1].set_title("instances")
plt.show()

# %%
columns = target["labels"], target["boxes"], target["area"]
for label, box, area in zip(*columns, strict=True):
    corners = ", ".join(f"{value:.0f}" for value in box)
    print(f"{names[label]:4} box ({corners}), {area:.0f} pixels")

# %% [markdown]
# The difference is smaller than it looks. The connected regions of a semantic mask are instances
# too, and that is how `mask_to_targets` made the boxes above: both kinds of network can learn from
# the same drawing. What Mask R-CNN adds is this:
#
# - **A score for each candidate.** A semantic network has a number for each pixel. A radiologist's
#   question is about a lesion.
# - **Candidates that are not lesions.** On a healthy slice a good semantic map is empty. Mask R-CNN
#   still proposes boxes there, and says how much each looks like a lesion. The classifier of this
#   book reads them ([chapter 6](06_ranked_boxes.ipynb)).
# - **Overlap.** A consolidation inside a GGO is a second box within the first.
# - **Many training examples in one slice.** The network is trained on small regions of slices, and
#   each slice holds hundreds of them. The paper counts on this to train with few slices
#   {cite:p}`TerSarkisov2020`. The regions of one slice are not independent, so they do not replace
#   patients.
#
# ## The parts
#
# The network works in two stages. The first looks everywhere and proposes boxes; the second looks
# closely at each proposal and decides.

# %% tags=["fold"] mystnb={"image": {"alt": "Flow chart: slice, backbone with feature pyramid, region proposal network, proposals, RoIAlign, box head and mask head, with the five losses in dashed frames below."}, "figure": {"caption": "Mask R-CNN. Solid frames are parts of the network, dashed frames its five losses. The proposals are passed on as plain numbers (dashed arrow): no gradient flows back through them."}}
# @title TODO say what this does
fig, ax = plt.subplots(figsize=(10, 4.2), layout="constrained")


def part(x, y, text, colour=BLUE, line="-", width=1.62, height=0.86):
    """One frame of the chart."""
    style = {"boxstyle": "round,pad=0.04", "facecolor": "white", "edgecolor": colour, "ls": line}
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, lw=1.6, **style))
    ax.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(start, end, line="-", colour=BLACK):
    """From one frame to the next."""
    arrows = {"arrowstyle": "-|>", "ls": line, "color": colour, "lw": 1.2, "shrinkA": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=arrows)


part(0.9, 3, "slice\n[3, H, W]", BLACK)
part(3.0, 3, "backbone\nand FPN")
part(5.1, 4.4, "region proposal\nnetwork (RPN)")
part(7.3, 4.4, "proposals\nboxes [P, 4]", BLACK)
part(7.3, 3, "RoIAlign\n[P, c, 7, 7]\n[D, c, 14, 14]")
part(9.6, 3.55, "box head\nclass, 4 deltas")
part(9.6, 2.1, "mask head\n[D, L, 28, 28]", width=1.8)
part(5.1, 2.9, "loss_objectness\nloss_rpn_box_reg", VERMILLION, "--", 1.75)
part(9.6, 4.85, "loss_classifier\nloss_box_reg", VERMILLION, "--", 1.75)
part(9.6, 0.8, "loss_mask", VERMILLION, "--", 1.75, 0.6)
arrow((1.75, 3), (2.12, 3))
arrow((3.85, 3.3), (4.25, 4.2))
arrow((5.95, 4.4), (6.42, 4.4), "--")
arrow((7.3, 3.92), (7.3, 3.5))
ax.plot([3.0, 3.0, 6.1], [2.5, 1.9, 1.9], color=BLACK, lw=1.2)
arrow((6.1, 1.9), (6.55, 2.55))
ax.text(4.5, 1.65, "feature maps", ha="center", fontsize=9)
arrow((8.15, 3.15), (8.73, 3.45))
arrow((8.15, 2.75), (8.62, 2.3))
arrow((5.1, 3.92), (5.1, 3.42), colour=VERMILLION)
arrow((9.6, 4.04), (9.6, 4.36), colour=VERMILLION)
arrow((9.6, 1.6), (9.6, 1.2), colour=VERMILLION)
ax.set(xlim=(0, 10.6), ylim=(0.3, 5.4))
ax.axis("off")
plt.show()

# %% [markdown]
# The detector comes with weights that were trained on other phantoms. In `eval` mode, batch
# normalisation uses the statistics that it stored during training, so the output for a slice depends
# on that slice alone.

# %%
detector = trained_segmenter(PRESET, device, shipped=True)
# [3, H, W] in 0..1
friend = torch.from_numpy(image).expand(3, -1, -1).to(device)
truth = {name: value.to(device) for name, value in target.items()}

# %% tags=["nbval-check-output"]
for name, module in detector.named_children():
    count = sum(p.numel() for p in module.parameters())
    print(f"{name:10} {count:9,} parameters")

# %% [markdown]
# ## The slice as the network sees it
#
# `detector.transform` has three jobs: standardise each channel, resize, and fill up a batch with
# zeros so that both sides are multiples of 32. The mean and the standard deviation of each channel
# are those of ImageNet, a set of colour photographs:
#
# $$x' = \frac{x - \text{mean}}{\text{std}}$$
#
# A CT slice has one grey value, copied into three channels, so the three channels leave this step
# with different offsets. That is harmless, because the first convolution can learn to undo them. If
# you start from ImageNet weights, you need exactly these numbers.

# %%
with torch.no_grad():
    batch, _ = detector.transform([friend])
# [3, 1, 1]
mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
std = torch.tensor(IMAGENET_STD, device=device)[:, None, None]
standardised = (friend - mean) / std  # [3, H, W]
assert torch.allclose(batch.tensors[0], standardised, atol=1e-5)

# %% [markdown]
# The phantoms of a preset have the size that its network wants, so nothing was resized here, and
# pixels of the slice are pixels of the network's image. On other slices the boxes are scaled along
# with the image, and back at the end.

# %% tags=["nbval-check-output"]
height, width = batch.image_sizes[0]
assert (height, width) == image.shape
print(f"slice {tuple(friend.shape)} -> batch {tuple(batch.tensors.shape)}")

# %% [markdown]
# ## Backbone and feature pyramid
#
# The backbone is a ResNet {cite:p}`He2016` without its last, classifying layers. From stage to stage
# the resolution halves, and each point describes larger surroundings. The *stride* of a map is the
# distance, in pixels of the slice, between two neighbouring cells.
#
# A feature pyramid network (FPN) {cite:p}`Lin2017` gives all maps the same number of channels, by a
# 1x1 convolution. Then the next coarser map is enlarged and added to each, so that fine maps also
# know about larger surroundings, and a 3x3 convolution smooths the sum.
#
# The paper's ResNet-50 gives four maps, of strides 4, 8, 16 and 32. The light models, of which the
# preset `quick` is one, use a single map, and then the FPN is just two convolutions. The code below
# handles both.

# %%
def feature_pyramid(maps, fpn):
    """Maps, finest first -> maps with the same number of channels."""
    results, coarser = [], None
    for level in reversed(range(len(maps))):
        lateral = fpn.inner_blocks[level][0]
        smooth = fpn.layer_blocks[level][0]
        # 1x1: [1, c, h, w]
        x = F.conv2d(maps[level], lateral.weight, lateral.bias)
        if coarser is not None:
            x = x + F.interpolate(coarser, x.shape[-2:], mode="nearest")
        coarser = x
        # 3x3
        x = F.conv2d(x, smooth.weight, smooth.bias, padding=1)
        results.insert(0, x)
    return results


with torch.no_grad():
    stages = list(detector.backbone.body(batch.tensors).values())
    # a dictionary of maps, finest first
    features = detector.backbone(batch.tensors)
    by_hand = feature_pyramid(stages, detector.backbone.fpn)
for own, theirs in zip(by_hand, features.values(), strict=True):
    assert torch.allclose(own, theirs, atol=1e-4)

# %% tags=["nbval-check-output"]
maps = list(features.values())
strides = [height // level.shape[-2] for level in maps]
for stage, level, stride in zip(stages, maps, strides, strict=True):
    before, after = tuple(stage.shape), tuple(level.shape)
    print(f"ResNet {before} -> FPN {after}, stride {stride} pixels")

# %% [markdown]
# What is in such a map? The channels have no names. Training shaped them all together, into whatever
# helps the heads below. We look at those that vary most inside the lungs.

# %% mystnb={"image": {"alt": "The synthetic chest slice and seven coarse maps of it; different maps are bright at different places."}, "figure": {"caption": "Our old friend and the seven channels of its finest feature map that vary most inside the lungs. One cell is one stride wide. Each channel has its own scale of colours, from its least to its largest value in the lungs. Synthetic."}}
finest, stride = maps[0][0].cpu(), strides[0]  # [c, h, w]
lungs = torch.from_numpy(mask[::stride, ::stride] > 0)  # [h, w]
liveliest = finest[:, lungs].std(dim=1).argsort(descending=True)[:7]
edges = (
    -stride / 2 - 0.5,
    width - stride / 2 - 0.5,
    height - stride / 2 - 0.5,
    -stride / 2 - 0.5,
)
options = {"layout": "constrained", "sharex": True, "sharey": True}
fig, axes = plt.subplots(2, 4, figsize=(10, 5.2), **options)
_ = plotting.show_slice(image, axes[0, 0])
_ = axes[0, 0].set_title("slice", fontsize=10)
for channel, ax in zip(liveliest.tolist(), axes.flat[1:], strict=True):
    low, high = finest[channel, lungs].aminmax()
    look = {"extent": edges, "cmap": "viridis", "vmin": low, "vmax": high}
    _ = ax.imshow(finest[channel], **look)
    _ = ax.set_title(f"channel {channel}", fontsize=10)
    _ = ax.set_xlabel("x (pixels)")
_ = [ax.set_ylabel("") for ax in axes[:, 1:].flat]
_ = axes[1, 0].set_ylabel("y (pixels)")
_ = axes[0, 0].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
plt.show()

# %% [markdown]
# ## Anchors
#
# A convolution gives the same number of outputs at every cell, but a slice holds any number of
# lesions of any size. *Anchors* bridge the two: a fixed set of boxes, repeated at every cell. The
# network need not predict a box from scratch. For each anchor, it says whether a lesion is there,
# and how to correct the box.
#
# An anchor has a size $q$ (the square root of its area) and a ratio $\rho$ of height $h$ to width $w$:
#
# $$w = \frac{q}{\sqrt\rho}, \qquad h = q\,\sqrt\rho, \qquad \text{so that}\quad w\,h = q^2,\quad h / w = \rho .$$
#
# The paper takes five small sizes and six ratios, because lesions are small and have many shapes.
# torchvision centres the box on 0 and rounds each half side to a whole pixel. `round` here means
# "half to even", as in PyTorch: 0.5 becomes 0, and 1.5 becomes 2.

# %%
def cell_anchors(sizes, ratios):
    """The anchors of a cell, x1, y1, x2, y2 around (0, 0): [a, 4]."""
    boxes = []
    for ratio in ratios:
        for size in sizes:
            w, h = size / math.sqrt(ratio), size * math.sqrt(ratio)
            boxes.append([-w / 2, -h / 2, w / 2, h / 2])
    return torch.tensor(boxes).round()


# [30, 4]
cell = cell_anchors(config.anchor_sizes, config.anchor_ratios).to(device)
generator = detector.rpn.anchor_generator
assert torch.equal(cell, generator.cell_anchors[0].to(device))

# %% [markdown]
# Rounding is coarse for anchors of two or four pixels. Look at the sizes that come out:

# %% tags=["nbval-check-output"]
anchor_sizes = config.anchor_sizes
sides = (cell[:, 2:] - cell[:, :2]).int()
sides = sides.reshape(-1, len(anchor_sizes), 2).tolist()
titles = [f"size {size:<5}" for size in anchor_sizes]
print("ratio  " + "".join(titles))
for ratio, row in zip(config.anchor_ratios, sides, strict=True):
    print(f"{ratio:5}  " + "".join(f"{w:>3} x {h:<4}" for w, h in row))
different = len(cell.unique(dim=0))
print(f"{len(cell)} anchors at each cell, {different} of them different")
print(f"{int((cell[:, 3] == cell[:, 1]).sum())} have no height")

# %% [markdown]
# Two surprises. Several small anchors are the same box. And two of the thirty are lines: at size 2,
# ratio 0.1 wants a half height of 0.32, ratio 0.25 one of exactly 0.5, and both round to 0. We meet
# them again below.
#
# Now repeat the thirty boxes at every cell. The cell in row $i$ and column $j$ sits at the pixel
# $(j \cdot \text{stride}, i \cdot \text{stride})$, which is its corner and not its middle. Cells
# come row by row, with the anchors of one cell together. The maps follow one another, finest first.

# %%
def grid_anchors(cell, rows, columns, stride):
    """[a, 4] at one cell -> [rows * columns * a, 4] over the slice."""
    y, x = torch.arange(rows), torch.arange(columns)
    y, x = torch.meshgrid(y, x, indexing="ij")
    # [cells, 1, 4]
    corner = stride * torch.stack([x, y, x, y], dim=-1).to(cell)
    corner = corner.reshape(-1, 1, 4)
    return (corner + cell).reshape(-1, 4)


anchors_of = [
    grid_anchors(cell, *level.shape[-2:], stride)
    for level, stride in zip(maps, strides, strict=True)
]
anchors = torch.cat(anchors_of)  # [A, 4]
assert torch.equal(anchors, generator(batch, maps)[0])

# %% tags=["nbval-check-output"]
for level, own, stride in zip(maps, anchors_of, strides, strict=True):
    rows, columns = level.shape[-2:]
    print(f"stride {stride}: {rows} x {columns} cells", end=" ")
    print(f"x {len(cell)} = {len(own):,} anchors")

# %% [markdown]
# Here are the anchors of one cell, the one nearest to the middle of the largest lesion. Move the
# slider from one size to the next. Anchors may reach over the border of the slice; nothing is cut
# yet.

# %%
def draw_boxes(boxes, ax, **style):
    """Frames on a slice.

    Pixel p covers p .. p + 1 in a box, p - 0.5 .. p + 0.5 on the axes.
    """
    for x1, y1, x2, y2 in np.asarray(torch.as_tensor(boxes).cpu()):
        corner = x1 - 0.5, y1 - 0.5
        frame = Rectangle(corner, x2 - x1, y2 - y1, fill=False)
        ax.add_patch(frame).set(**{"lw": 1.2, **style})


largest = int(target["area"].argmax())
box = target["boxes"][largest]
# x, y of a cell
middle = ((box[:2] + box[2:]) / 2 / strides[0]).round() * strides[0]
RATIO_STYLES = list(
    zip(
        (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY_BLUE),
        ["-", "--", ":"] * 2,
        strict=True,
    )
)


def draw_anchors(size):
    """The anchors of one size at one cell, on our old friend."""
    fig, ax = plt.subplots(figsize=(4.6, 4.1), layout="constrained")
    # a smaller file
    plotting.show_slice(image, ax).images[0].set_interpolation("nearest")
    draw_boxes(box[None], ax, edgecolor="white", lw=1)
    ax.text(*(box[:2] - 1), "lesion", color="white", fontsize=9)
    own = cell.cpu()[anchor_sizes.index(size) :: len(anchor_sizes)]
    looks = zip(own, config.anchor_ratios, RATIO_STYLES, strict=True)
    for anchor, ratio, (colour, line) in looks:
        at = anchor[None] + middle.repeat(2)
        draw_boxes(at, ax, edgecolor=colour, ls=line, lw=1.6)
        ax.plot([], [], color=colour, ls=line, label=f"{ratio}")
    ax.legend(title="h / w", fontsize="small", loc="lower right", ncols=2)
    reach = 60  # pixels
    ax.set(
        xlim=(middle[0] - reach, middle[0] + reach),
        ylim=(middle[1] + reach, middle[1] - reach),
    )
    ax.set_title(f"size {size} pixels", fontsize=10)
    return fig


frame_slider(
    [draw_anchors(size) for size in anchor_sizes],
    [f"{size} pixels" for size in anchor_sizes],
    "Anchor size",
    "Six anchors of different ratios at one cell of a synthetic slice, "
    "over a lesion in a white frame",
    caption="The anchors of one cell on our old friend, one size at a "
    "time. The white frame is the largest lesion. Synthetic.",
    start=len(anchor_sizes) - 2,
    dpi=70,
)

# %% [markdown]
# The same with a live control; it needs a running notebook.

# %% tags=["remove-output"]
def show_anchors(size):
    """Draw and show, for the slider."""
    draw_anchors(size)
    plt.show()


_ = ipywidgets.interact(
    show_anchors,
    size=ipywidgets.SelectionSlider(
        options=anchor_sizes,
        value=anchor_sizes[-2],
    ),
)

# %% [markdown]
# ## The region proposal network
#
# The RPN {cite:p}`Ren2015` is small: one 3x3 convolution, then two 1x1 convolutions side by side.
# One gives a logit for each anchor, its *objectness*: is there a lesion of any class? The other
# gives four numbers for each anchor, the *deltas*, which correct its place and size.
#
# The outputs come as maps, [anchors, rows, columns]. The anchors above run the other way round:
# cells first, then the anchors of a cell. So the axes are swapped before the maps are flattened. If
# you forget this, the boxes still look plausible, and the mistake is hard to notice.

# %%
def rpn_outputs(maps, head):
    """Logits [n] and deltas [n, 4] of each map, in the order of anchors."""
    conv, cls, reg = head.conv[0][0], head.cls_logits, head.bbox_pred
    logits_of, deltas_of = [], []
    for level in maps:
        # [1, c, h, w]
        x = F.relu(F.conv2d(level, conv.weight, conv.bias, padding=1))
        logits = F.conv2d(x, cls.weight, cls.bias)[0]  # [a, h, w]
        deltas = F.conv2d(x, reg.weight, reg.bias)[0]  # [4 * a, h, w]
        a, h, w = logits.shape
        logits_of.append(logits.permute(1, 2, 0).reshape(-1))  # [h * w * a]
        deltas = deltas.reshape(a, 4, h, w).permute(2, 3, 0, 1)
        deltas_of.append(deltas.reshape(-1, 4))  # [h * w * a, 4]
    return logits_of, deltas_of


with torch.no_grad():
    logits_of, deltas_of = rpn_outputs(maps, detector.rpn.head)
    their_logits, _ = detector.rpn.head(maps)
# row 0, column 1
first = torch.stack([their_logits[0][0, a, 0, 1] for a in range(len(cell))])
ours = logits_of[0][len(cell) : 2 * len(cell)]
assert torch.allclose(ours, first, atol=1e-5)

# %% tags=["nbval-check-output"]
outputs = their_logits, logits_of, deltas_of
for each in zip(*outputs, strict=True):
    theirs, logits, deltas = (tuple(tensor.shape) for tensor in each)
    print(f"map {theirs} -> logits {logits}, deltas {deltas}")

# %% [markdown]
# ### Decoding
#
# The four deltas are not in pixels. They are relative to the anchor: with its centre $(x_a, y_a)$
# and its sides $w_a, h_a$, the box is
#
# $$x = x_a + \delta_x w_a, \quad y = y_a + \delta_y h_a, \quad w = w_a e^{\delta_w}, \quad h = h_a e^{\delta_h}.$$
#
# So "a tenth to the right" means the same for a small lesion as for a large one, and the
# exponential keeps the sides positive. The RPN uses its deltas as they are; the box head will divide
# its own by weights $(10, 10, 5, 5)$, so the function takes weights. Large $\delta_w$ and $\delta_h$
# are cut at $\ln(1000/16)$, since an exponential can overflow.

# %%
def decode(anchors, deltas, weights=(1.0, 1.0, 1.0, 1.0)):
    """Anchors or proposals [n, 4] and deltas [n, 4] -> boxes [n, 4]."""
    sides = anchors[:, 2:] - anchors[:, :2]  # [n, 2]: w, h
    centre = anchors[:, :2] + 0.5 * sides
    shift, stretch = (deltas / deltas.new_tensor(weights)).split(2, dim=1)
    centre = shift * sides + centre
    sides = stretch.clamp(max=math.log(1000 / 16)).exp() * sides
    return torch.cat([centre - 0.5 * sides, centre + 0.5 * sides], dim=1)


boxes_of = list(map(decode, anchors_of, deltas_of))
# [A, 4]
theirs = detector.rpn.box_coder.decode(torch.cat(deltas_of), [anchors])
theirs = theirs[:, 0]
assert torch.allclose(torch.cat(boxes_of), theirs, atol=1e-3)

# %% [markdown]
# ### Overlap
#
# Two boxes around the same lesion overlap. *Intersection over union* (IoU) measures how much: the
# area that both cover, divided by the area that at least one covers. It is 0 for boxes that are
# apart and 1 for equal boxes, and it does not depend on the scale.
#
# $$\operatorname{IoU}(b, b') = \frac{|b \cap b'|}{|b| + |b'| - |b \cap b'|}$$

# %%
def iou(a, b):
    """Boxes [K, 4] and [N, 4] -> IoU of each pair [K, N]."""
    # [K, N, 2]: larger left and top
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    # smaller right and bottom
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clamp(min=0).prod(dim=2)  # [K, N]
    area_a = (a[:, 2:] - a[:, :2]).prod(dim=1)
    area_b = (b[:, 2:] - b[:, :2]).prod(dim=1)
    return both / (area_a[:, None] + area_b - both)


overlap = iou(truth["boxes"], anchors)  # [K, A]
theirs = torchvision.ops.box_iou(truth["boxes"], anchors)
assert torch.allclose(overlap, theirs, atol=1e-6)

# %% [markdown]
# ### Non-maximum suppression
#
# Neighbouring anchors find the same lesion, so many decoded boxes lie on top of each other.
# *Non-maximum suppression* (NMS) thins them out: take the best box, drop every box that overlaps it
# by more than a threshold, take the best of those that are left, and so on.

# %%
def nms(boxes, scores, threshold):
    """Boxes [n, 4] and scores [n] -> indices of those kept, best first."""
    order = scores.argsort(descending=True, stable=True)
    too_close = iou(boxes[order], boxes[order]) > threshold  # [N, N]
    keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
    for i in range(len(order)):
        if keep[i]:
            keep[i + 1 :] &= ~too_close[i, i + 1 :]
    return order[keep]


# %% [markdown]
# The threshold of the paper, 0.75, is high: boxes may overlap a great deal before one has to go.
# [Chapter 5](05_segmenter.ipynb) shows what that does to detections.
#
# ### Proposals
#
# Now the filter that turns thousands of boxes into proposals, map by map: keep the best by
# objectness, cut them at the border of the slice, apply NMS. Then merge the maps, and keep the best
# again.

# %%
def filter_proposals(boxes_of, logits_of, most):
    """Decoded boxes and logits of each map -> proposals, best first."""
    boxes, logits = [], []
    for own, score in zip(boxes_of, logits_of, strict=True):
        best = score.topk(min(most, len(score))).indices
        own, score = own[best], score[best]
        own = torch.stack(
            [own[:, 0::2].clamp(0, width), own[:, 1::2].clamp(0, height)],
            dim=2,
        )
        own = own.flatten(1)  # [T, 4] again: x1, y1, x2, y2
        kept = nms(own, score, config.rpn_nms)
        boxes.append(own[kept])
        logits.append(score[kept])
    boxes, logits = torch.cat(boxes), torch.cat(logits)
    order = logits.argsort(descending=True, stable=True)[:most]
    return boxes[order], logits[order]


# [P, 4]
most = config.rpn_test_proposals
proposals, objectness = filter_proposals(boxes_of, logits_of, most)
with torch.no_grad():
    theirs, _ = detector.rpn(batch, features)
assert torch.allclose(proposals, theirs[0], atol=1e-3)
print(f"{len(anchors):,} anchors -> the best {most}", end=" ")
print(f"-> {len(proposals)} proposals")

# %% [markdown]
# There is no score threshold anywhere: the RPN always proposes boxes, on a healthy slice, too. And
# proposals have no class yet.

# %% mystnb={"image": {"alt": "Left: coarse heat map of objectness over the synthetic slice. Right: the slice with its true lesions and many dotted boxes, most of them close to others."}, "figure": {"caption": "Left: objectness, the best of the anchors at each cell of the finest map. Right: the 40 proposals with the best logits (fewer if there are fewer). The RPN proposes far more boxes than there are lesions, because a lesion without a proposal is lost. Synthetic."}}
rows, columns = maps[0].shape[-2:]
# [h, w]
best = logits_of[0].reshape(rows, columns, -1).amax(dim=2).sigmoid().cpu()
fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
_ = plotting.show_slice(image, axes[0])
HEAT = {"cmap": "magma", "vmin": 0, "vmax": 1, "alpha": 0.6}
drawn = axes[0].imshow(best, extent=edges, **HEAT)
_ = axes[0].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
_ = axes[0].set_title("objectness")
bar = fig.colorbar(drawn, ax=axes[0], shrink=0.85)
bar.set_label("Sigmoid of the logit (no unit)")
_ = plotting.show_lesions(image, target, axes[1])
_ = draw_boxes(proposals[:40], axes[1], edgecolor=GREEN, lw=1, ls=":")
_ = axes[1].set_title("best proposals (dotted) and the truth")
plt.show()

# %% [markdown]
# How many proposals does it take to find every lesion? Move the slider. The title counts the
# lesions that overlap some proposal by an IoU of at least 0.5.

# %%
def draw_proposals(count):
    """The best proposals and the true boxes of our old friend."""
    fig, ax = plt.subplots(figsize=(4.6, 4.1), layout="constrained")
    plotting.show_lesions(image, target, ax)
    ax.images[0].set_interpolation("nearest")
    draw_boxes(proposals[:count], ax, edgecolor=GREEN, lw=1, ls=":")
    found = iou(truth["boxes"], proposals[:count]).amax(dim=1) >= 0.5
    reached = f"{int(found.sum())} of {len(found)} lesions"
    ax.set_title(f"{count} proposals reach {reached}", fontsize=10)
    return fig


every = len(proposals)
counts = sorted({min(count, every) for count in (1, 5, 10, 40, every)})
frame_slider(
    [draw_proposals(count) for count in counts],
    [f"the best {count}" for count in counts],
    "Proposals",
    "Dotted proposal boxes over the true lesions of a synthetic slice",
    caption="The best proposals (dotted) of our old friend. Synthetic.",
    start=min(2, len(counts) - 1),
    dpi=70,
)

# %% [markdown]
# The same with a live control; it needs a running notebook.

# %% tags=["remove-output"]
def show_proposals(count):
    """Draw and show, for the slider."""
    draw_proposals(count)
    plt.show()


_ = ipywidgets.interact(
    show_proposals,
    count=ipywidgets.IntSlider(value=10, min=1, max=len(proposals)),
)

# %% [markdown]
# ### The two lines
#
# What becomes of the two anchors without a height? Decoding multiplies, so a line stays a line
# whatever the deltas. torchvision drops proposals with a side below 0.001 pixels. The released code
# of the paper drops none (`rpn.min_size = 0`), and so does our detector. A line that gets a good
# logit then takes the place of a proper proposal. In the box head it stays a line, and a box of
# no area is dropped when the boxes are ranked. The place is lost.

# %%
line = cell[cell[:, 1] == cell[:, 3]]  # [2, 4]
moved = decode(line, torch.randn(len(line), 4, device=device))
assert ((moved[:, 3] - moved[:, 1]) == 0).all()

# [A]
is_line = (cell[:, 1] == cell[:, 3]).repeat(len(anchors) // len(cell))
every_logit = torch.cat(logits_of)
rank = (every_logit > every_logit[is_line].max()).sum() + 1
lines = int((proposals[:, 1] == proposals[:, 3]).sum())
print("trained detector, old friend:")
print(f"the best line has rank {rank:,} of {len(anchors):,} anchors")
print(f"lines among the proposals: {lines}")

# %% [markdown]
# A trained RPN has learned that lines never match a lesion (their IoU with anything is 0). How many
# come through depends on how many places there are to fill. Here is a detector of the paper's
# size, ResNet-50 with four maps, before any training:

# %%
torch.manual_seed(SEED)
untrained = lesion_mask_rcnn(PRESETS["paper"].detector).eval()
slice_512 = torch.from_numpy(old_friend(512)[0]).expand(3, -1, -1)
with torch.no_grad():
    batch_512, _ = untrained.transform([slice_512])
    maps_512 = untrained.backbone(batch_512.tensors)
    for least in (0.0, 1e-3):
        untrained.rpn.min_size = least
        boxes = untrained.rpn(batch_512, maps_512)[0][0]
        lines = int((boxes[:, 1] == boxes[:, 3]).sum())
        print(f"min_size {least}:", end=" ")
        print(f"{lines} lines among {len(boxes):,} proposals")
assert lines == 0

# %% [markdown]
# It is a small matter, but it decides whether two implementations return the same boxes.
#
# ## What the RPN is trained on
#
# The truth is a handful of lesions, but the output is about thousands of anchors. Each anchor needs a
# label:
#
# - **1, lesion:** its IoU with some lesion reaches the upper threshold;
# - **0, background:** its best IoU stays below the lower threshold;
# - **-1, left out:** in between. Such an anchor fits too well to be called background and too poorly
#   to be called a lesion, so it takes no part in the training.
#
# There is an extra rule: for each lesion, the anchor that fits best gets the label 1 as well, however
# poor the fit. Otherwise the network would never learn a lesion that no anchor fits.

# %%
def label_anchors(anchors, boxes, high, low):
    """Labels [A] (1, 0 or -1), and the lesion each anchor overlaps most."""
    if len(boxes) == 0:  # a slice without a lesion: all background
        background = anchors.new_zeros(len(anchors))
        return background, background.long()
    overlap = iou(boxes, anchors)  # [K, A]
    best, lesion = overlap.max(dim=0)  # [A], [A]
    labels = anchors.new_full((len(anchors),), -1.0)
    labels[best < low] = 0
    labels[best >= high] = 1
    # the extra rule
    labels[(overlap == overlap.amax(dim=1, keepdim=True)).any(dim=0)] = 1
    return labels, lesion


# [A], [A]
labels, lesion = label_anchors(anchors, truth["boxes"], *config.rpn_iou)
their_labels, _ = detector.rpn.assign_targets_to_anchors([anchors], [truth])
assert torch.equal(labels, their_labels[0])
for value, name in ((1, "lesion"), (0, "background"), (-1, "left out")):
    print(f"{name:10} {int((labels == value).sum()):6,} anchors")

# %%
high, low = config.rpn_iou
print(f"lesion from an IoU of {high}, background below {low}")
for k, label in enumerate(truth["labels"].tolist()):
    own = int(((labels == 1) & (lesion == k)).sum())
    fit = overlap[k].max()
    rule = "threshold" if fit >= high else "extra rule"
    print(f"{names[label]:4} best IoU {fit:.2f},", end=" ")
    print(f"{own:2} anchors, by the {rule}")

# %% mystnb={"image": {"alt": "The synthetic slice with the true lesion boxes in white and the anchors labelled lesion on them: solid green above the threshold, dashed orange-red by the extra rule."}, "figure": {"caption": "The anchors of our old friend that count as lesion: above the threshold (solid) or best of their lesion although below it (dashed). White: the truth. All other anchors are background or left out. Synthetic."}}
above = (labels == 1) & (overlap.amax(dim=0) >= high)
rescued = (labels == 1) & ~above
ax = plotting.show_slice(image, plotting.get_ax(6.5, 5.4))
_ = draw_boxes(target["boxes"], ax, edgecolor="white", lw=2)
_ = draw_boxes(anchors[above], ax, edgecolor=GREEN, lw=1.4)
_ = draw_boxes(anchors[rescued], ax, edgecolor=VERMILLION, lw=1.4, ls="--")
_ = ax.plot([], [], color=GREEN, label="above the threshold")
_ = ax.plot([], [], color=VERMILLION, ls="--", label="best of its lesion")
_ = ax.legend(loc="upper right", fontsize="small")
plt.show()

# %% [markdown]
# ### The same rule at the paper's size
#
# Anchor sizes are pixels of the network's image, so it matters how large that is. The paper resizes
# slices to 512 pixels and keeps the sizes 2 to 32. Labelling needs no network, only geometry, so we
# can try it at once: four maps, strides 4 to 32, our old friend at 512 pixels.

# %%
paper = PRESETS["paper"]
mask_512 = old_friend(512)[1]
settings = paper.detector
truth_512 = mask_to_targets(mask_512, settings.lesions, paper.min_area)
boxes_512 = truth_512["boxes"]
cell_512 = cell_anchors(settings.anchor_sizes, settings.anchor_ratios)
cells = {stride: 512 // stride for stride in (4, 8, 16, 32)}
grids = [grid_anchors(cell_512, n, n, stride) for stride, n in cells.items()]
anchors_512 = torch.cat(grids)
assigned = label_anchors(anchors_512, boxes_512, *settings.rpn_iou)
labels_512, lesion_512 = assigned  # [A], [A]
best_512 = iou(boxes_512, anchors_512).amax(dim=1)  # [K]

threshold = settings.rpn_iou[0]
print(f"{len(anchors_512):,} anchors, threshold {threshold} (one phantom)")
for k, label in enumerate(truth_512["labels"].tolist()):
    x1, y1, x2, y2 = boxes_512[k].int().tolist()
    own = int(((labels_512 == 1) & (lesion_512 == k)).sum())
    name = LESION_CLASSES[settings.lesions][label - 1]
    share = f"{100 * truth_512['area'][k] / 512**2:.1f} % of the slice"
    print(f"{name:4}{x2 - x1:3} x {y2 - y1:3} pixels, {share}:", end=" ")
    print(f"IoU {best_512[k]:.2f}, {own:3} anchors")
chosen = labels_512 == 1
best_of_anchor = iou(boxes_512, anchors_512[chosen]).amax(dim=0)
extra = (best_of_anchor < threshold).float().mean()
print(f"{int(chosen.sum())} anchors count as lesion,", end=" ")
print(f"{extra:.0%} of them by the extra rule")
room = int(settings.rpn_batch * settings.rpn_positive)
print(f"a training step has room for {room}")
assert best_512.min() < threshold

# %% [markdown]
# The larger lesions have outgrown the anchors. Where no anchor comes near the threshold, the extra
# rule steps in, and then it does more than it should: *every* anchor of the largest area that lies
# wholly inside the lesion has the same IoU, so all of them are "the best", and all count as lesion.
# The last lines tell what share of the sample that is. The deltas of these anchors must stretch a
# small box to the whole lesion. Training can learn large deltas, but anchors are there to make that
# unnecessary. This is a finding on one phantom. But a GGO of 2 % of the slice, the range of the paper's
# Figure 1, has a box at least 72 pixels wide or high at this size, so it is worth a check on real masks.
#
# ### A sample for the loss
#
# Back to our own anchors. A few say "lesion", thousands say "background". If all of them counted, a
# network that always says "background" would have almost no loss. So only a sample counts: a fixed
# number of anchors in each slice, of which at most a share (`rpn_positive`) are lesion and the rest
# background. A slice with small lesions may have too few lesion anchors to reach that share.

# %%
def sample(labels, count, share):
    """Draw indices of positive (label >= 1) and negative (0) entries."""
    positive = torch.where(labels >= 1)[0]
    negative = torch.where(labels == 0)[0]
    most = min(int(count * share), len(positive))
    order = torch.randperm(len(positive), device=labels.device)
    positive = positive[order[:most]]
    order = torch.randperm(len(negative), device=labels.device)
    negative = negative[order[: count - most]]
    return positive.sort().values, negative.sort().values


torch.manual_seed(SEED)
positive, negative = sample(labels, config.rpn_batch, config.rpn_positive)
torch.manual_seed(SEED)
theirs = detector.rpn.fg_bg_sampler([labels])
assert torch.equal(positive, torch.where(theirs[0][0])[0])
assert torch.equal(negative, torch.where(theirs[1][0])[0])
print(f"{config.rpn_batch} anchors a slice,", end=" ")
print(f"at most {config.rpn_positive:.0%} of them lesion")
print(f"our old friend: {len(positive)} lesion, {len(negative)} background")

# %% [markdown]
# An anchor that counts as lesion also has a target for its deltas: those that would turn it into
# the true box. This is decoding, solved for the deltas:
#
# $$\delta_x = \frac{x - x_a}{w_a}, \quad \delta_y = \frac{y - y_a}{h_a}, \quad \delta_w = \ln\frac{w}{w_a}, \quad \delta_h = \ln\frac{h}{h_a}$$
#
# The anchors without height would divide by zero here. But they never count as lesion, because some
# other anchor always overlaps the lesion more.

# %%
def encode(boxes, anchors, weights=(1.0, 1.0, 1.0, 1.0)):
    """The deltas [N, 4] that turn anchors [N, 4] into boxes [N, 4]."""
    sides = anchors[:, 2:] - anchors[:, :2]
    wanted = boxes[:, 2:] - boxes[:, :2]
    centre = anchors[:, :2] + 0.5 * sides
    shift = (boxes[:, :2] + 0.5 * wanted - centre) / sides
    deltas = torch.cat([shift, (wanted / sides).log()], dim=1)
    return deltas * anchors.new_tensor(weights)


# [positive, 4]
goal = encode(truth["boxes"][lesion[positive]], anchors[positive])
back = decode(anchors[positive], goal)
assert torch.allclose(back, truth["boxes"][lesion[positive]], atol=1e-3)
assert (anchors[positive, 3] > anchors[positive, 1]).all()

# %% [markdown]
# ## RoIAlign
#
# The second stage looks at each proposal, a *region of interest* (RoI). Its layers need inputs of one
# size, but proposals come in all sizes, at fractions of a pixel. RoIAlign {cite:p}`He2017` cuts a grid
# of $7 \times 7$ numbers per channel out of the feature map:
#
# 1. divide the box by the stride: it now lies on the map, at fractions of a cell;
# 2. divide it into $7 \times 7$ bins;
# 3. take $2 \times 2$ sampling points in each bin (the *sampling ratio* is 2);
# 4. read the map at each point by bilinear interpolation;
# 5. average the four points of a bin.
#
# Points of all bins together form one regular grid of $14 \times 14$. Point $i$ of a row lies at
# $x_1 + (i + \tfrac12)\, w / 14$.
#
# ### One point
#
# Bilinear interpolation weights the four cells around a point by how near they are. With the
# fractions $f_x, f_y$ of the way from the left to the right cell and from the top to the bottom one:
#
# $$v = (1-f_y)(1-f_x)\,v_{00} + (1-f_y)f_x\,v_{01} + f_y(1-f_x)\,v_{10} + f_y f_x\,v_{11}$$
#
# We try it on a small map whose values we can read.

# %% tags=["nbval-check-output"]
# [1, 8, 8], values 0 .. 9
small = (torch.arange(64).reshape(1, 8, 8) * 7 % 10).float()
x, y = 2.25, 3.5
left, top = math.floor(x), math.floor(y)
fx, fy = x - left, y - top
v00, v01 = small[0, top, left : left + 2].tolist()
v10, v11 = small[0, top + 1, left : left + 2].tolist()
upper = (1 - fx) * v00 + fx * v01
lower = (1 - fx) * v10 + fx * v11
value = (1 - fy) * upper + fy * lower
print(f"around ({x}, {y}): {v00} {v01} / {v10} {v11}, value {value}")

# %% [markdown]
# ### All points
#
# This code follows two details of torchvision. A RoI is at least one cell wide and high. And the
# value of cell $j$ sits at $j$, not in the cell's middle at $j + \tfrac12$ (`aligned=False`); the
# anchors above follow the same rule.

# %%
def bilinear(feature, y, x):
    """Read a map [c, h, w] at rows y [m] and columns x [n]: [c, m, n]."""
    h, w = feature.shape[-2:]
    # else the value is 0
    inside = ((y >= -1) & (y <= h))[:, None] & ((x >= -1) & (x <= w))
    y, x = y.clamp(0, h - 1), x.clamp(0, w - 1)
    top, left = y.long(), x.long()
    bottom, right = (top + 1).clamp(max=h - 1), (left + 1).clamp(max=w - 1)
    fy, fx = (y - top)[:, None], x - left  # [m, 1], [n]
    above, below = feature[:, top], feature[:, bottom]  # [c, m, w]
    upper = (1 - fx) * above[:, :, left] + fx * above[:, :, right]
    lower = (1 - fx) * below[:, :, left] + fx * below[:, :, right]
    return ((1 - fy) * upper + fy * lower) * inside  # [c, m, n]


def roi_align(feature, box, bins, stride=1, ratio=2):
    """Cut one box [4] (pixels) out of a map [c, h, w]: [c, bins, bins]."""
    x1, y1, x2, y2 = box / stride  # cells
    w, h = (x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1)
    # 0 .. 1
    points = bins * ratio
    steps = (torch.arange(points, device=box.device) + 0.5) / points
    # [c, bins * ratio, bins * ratio]
    points = bilinear(feature, y1 + steps * h, x1 + steps * w)
    return F.avg_pool2d(points, ratio)  # [c, bins, bins]


roi = torch.tensor([1.2, 0.9, 6.4, 5.5])
ours = roi_align(small, roi, bins=2)  # [1, 2, 2]
theirs = torchvision.ops.roi_align(small[None], [roi[None]], 2, 1, 2)
assert torch.allclose(ours, theirs[0], atol=1e-5)

# %% mystnb={"image": {"alt": "A grid of 8 by 8 numbers with a box at fractions of a cell, divided into four bins with four points each; beside it the 2 by 2 result."}, "figure": {"caption": "RoIAlign on a small map. The box (solid) is not moved to whole cells. Each of its 2 x 2 bins (dashed) holds 2 x 2 sampling points; each point reads the four cells around it; the mean of the points is the output on the right. A made-up map, no data."}}
options = {"layout": "constrained", "width_ratios": [2, 1]}
fig, axes = plt.subplots(1, 2, figsize=(8.5, 4.6), **options)
for ax, values in zip(axes, (small[0], ours[0]), strict=True):
    _ = ax.imshow(values, cmap="Blues", vmin=0, vmax=14)
    for (i, j), v in np.ndenumerate(values.numpy()):
        style = {"ha": "center", "va": "center", "color": "0.35"}
        _ = ax.text(j, i, f"{v:.3g}", fontsize=9, **style)
x1, y1, x2, y2 = roi.tolist()
frame = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=BLACK, lw=2)
_ = axes[0].add_patch(frame)
_ = axes[0].hlines((y1 + y2) / 2, x1, x2, color=BLACK, ls="--")
_ = axes[0].vlines((x1 + x2) / 2, y1, y2, color=BLACK, ls="--")
steps = (np.arange(4) + 0.5) / 4
grid = np.meshgrid(x1 + steps * (x2 - x1), y1 + steps * (y2 - y1))
_ = axes[0].plot(*map(np.ravel, grid), "o", color=VERMILLION, ms=5)
_ = axes[0].set(
    xlabel="Column (cells)",
    ylabel="Row (cells)",
    title="map, box and points",
)
_ = axes[1].set(xlabel="Bin (count)", ylabel="Bin (count)", title="output")
_ = axes[1].set(xticks=[0, 1], yticks=[0, 1])
plt.show()

# %% [markdown]
# ### On the old friend
#
# With several maps, which one does a RoI read? The FPN paper's rule sends large RoIs to coarse maps
# {cite:p}`Lin2017`: level $k = \lfloor 4 + \log_2(\sqrt{wh}/224) \rfloor$, where level 2 has
# stride 4. So a box with $\sqrt{wh}$ below 112 pixels reads the finest of the paper's four maps. By
# Figure 1 of the paper most regions of GGO cover less than 2 % of the slice, which at 512 pixels
# is a square of 72: nearly all lesions read that one map. With a single map there is no choice.

# %%
def level_of(box):
    """Index of the map that a box [4] reads, 0 for the finest."""
    side = (box[2:] - box[:2]).prod().sqrt()
    k = math.floor(4 + math.log2(max(side.item(), 1e-6) / 224) + 1e-6)
    return min(max(k - int(math.log2(strides[0])), 0), len(strides) - 1)


heads = detector.roi_heads
with torch.no_grad():
    # [P, c, 7, 7]
    pooled = heads.box_roi_pool(features, [proposals], batch.image_sizes)
first = level_of(proposals[0])
# [c, 7, 7]
ours = roi_align(maps[first][0], proposals[0], 7, strides[first])
assert torch.allclose(ours, pooled[0], atol=1e-4)
for index in range(len(proposals)):
    level = level_of(proposals[index])
    ours = roi_align(maps[level][0], proposals[index], 7, strides[level])
    assert torch.allclose(ours, pooled[index], atol=1e-3)

# %% [markdown]
# ### Why not round?
#
# An older operation, RoIPool, rounds box and bins to whole cells and takes the maximum in each bin.
# A cell is several pixels wide, and a lesion may be as small as a single cell. We move the best
# proposal to the right, a quarter of a pixel at a time, and watch how much its features change.
# RoIAlign follows every step. RoIPool does nothing for a while, then jumps.

# %% mystnb={"image": {"alt": "Relative change of the pooled features against the shift of the box: a continuous curve for RoIAlign, a staircase for RoIPool."}, "figure": {"caption": "How the features of one RoI change as its box moves by up to two cells, relative to where it began. Rounding hides a small shift or turns it into a jump; box corrections and masks need the shift itself. Synthetic."}}
level, stride_here = maps[first], strides[first]
shifts = np.arange(0, 2 * stride_here + 0.01, 0.25)
moved = proposals[0].repeat(len(shifts), 1)
moved[:, 0::2] += torch.from_numpy(shifts[:, None]).to(moved)
scale = 1 / stride_here
curves = {
    "RoIAlign": torchvision.ops.roi_align(level, [moved], 7, scale, 2),
    "RoIPool": torchvision.ops.roi_pool(level, [moved], 7, scale),
}
ax = plotting.get_ax(7, 3.8)
for (name, values), colour, line, style in zip(
    curves.items(),
    (BLUE, VERMILLION),
    ("-", "--"),
    ("default", "steps-mid"),
    strict=True,
):
    values = values.flatten(1)
    change = 100 * (values - values[0]).norm(dim=1) / values[0].norm()
    _ = ax.plot(
        shifts,
        change.cpu(),
        color=colour,
        ls=line,
        drawstyle=style,
        label=name,
    )
_ = ax.set_xlabel("Shift of the box (pixels)")
_ = ax.set_ylabel("Change of its features (%)")
_ = ax.legend()
plt.show()

# %% [markdown]
# ## The box head
#
# Two hidden layers read the $c \times 7 \times 7$ numbers of a RoI as one vector. Then two linear
# layers run side by side: one logit for each class, background included, and four deltas *for each
# class*. A GGO and a consolidation in the same place need not have the same size, so each class
# corrects the box in its own way.

# %%
with torch.no_grad():
    x = pooled.flatten(1)  # [P, c * 7 * 7]
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        # [P, box_features]
        x = F.relu(F.linear(x, layer.weight, layer.bias))
    cls, reg = heads.box_predictor.cls_score, heads.box_predictor.bbox_pred
    class_logits = F.linear(x, cls.weight, cls.bias)  # [P, L]
    box_deltas = F.linear(x, reg.weight, reg.bias)  # [P, 4 * L]
    theirs = heads.box_predictor(heads.box_head(pooled))
assert torch.allclose(class_logits, theirs[0], atol=1e-4)
assert torch.allclose(box_deltas, theirs[1], atol=1e-4)

# %% tags=["nbval-check-output"]
print(f"one RoI: {tuple(pooled.shape[1:])}", end=" ")
print(f"-> {pooled[0].numel():,} -> {x.shape[1]} numbers")
numbers = class_logits.shape[1], box_deltas.shape[1]
print("-> {} class logits and {} deltas".format(*numbers))

# %% [markdown]
# Decoding works as in the RPN, with the proposal in place of the anchor, and with weights
# $(10, 10, 5, 5)$: the network's deltas are ten times the relative shifts, and five times the logs of
# the relative sizes. After the RPN's correction only a small part of the box is left to correct. The
# weights make the targets larger, so that this loss is not drowned by the others.
#
# To get detections, a softmax over the classes turns logits into scores, background is dropped,
# scores must exceed a threshold, and NMS runs within each class. The objectness plays no part any
# more: its job was to choose the proposals.

# %%
scores = class_logits.softmax(dim=1)  # [P, L]
found = []
for label in range(1, scores.shape[1]):
    deltas = box_deltas[:, 4 * label : 4 * label + 4]  # [P, 4]
    boxes = decode(proposals, deltas, heads.box_coder.weights)
    boxes = torch.stack(
        [boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)],
        dim=2,
    )
    boxes = boxes.flatten(1)  # [P, 4]
    # torchvision's smallest side
    wide = ((boxes[:, 2:] - boxes[:, :2]) >= 0.01).all(dim=1)
    index = torch.where((scores[:, label] > config.box_score) & wide)[0]
    index = index[nms(boxes[index], scores[index, label], config.box_nms)]
    found += [(scores[i, label], label, boxes[i], i) for i in index]
found = sorted(found, key=lambda entry: -entry[0])[: config.box_detections]

with torch.no_grad():
    detections = detector([friend])[0]
assert len(found) == len(detections["scores"])
for (score, label, box, _), theirs, their_label, their_box in zip(
    found,
    detections["scores"],
    detections["labels"],
    detections["boxes"],
    strict=True,
):
    assert label == their_label and torch.allclose(score, theirs, atol=1e-4)
    assert torch.allclose(box, their_box, atol=1e-2)
print(f"{len(proposals)} proposals -> {len(found)} detections", end=" ")
print(f"with a score above {config.box_score}")

# %% mystnb={"image": {"alt": "The synthetic slice twice: on the left the proposals of the best detections, dotted, and the boxes they became; on the right the final detections with their scores and masks."}, "figure": {"caption": "Left: proposals (dotted) and the boxes that the box head made of them (solid GGO, dashed C), for detections with a score above 0.5. Right: the same with scores and masks, thinned by NMS at 0.25 to make them readable. Compare with the truth at the top of the chapter: is every detection a lesion? Synthetic."}}
fig, axes = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
_ = plotting.show_slice(image, axes[0])
for score, label, box, i in found:
    if score > 0.5:
        style = {
            "edgecolor": plotting.LESION_COLOURS[label - 1],
            "ls": plotting.LESION_LINES[label - 1],
        }
        dots = {"edgecolor": GREEN, "ls": ":", "lw": 1.6}
        _ = draw_boxes(proposals[i][None], axes[0], **dots)
        _ = draw_boxes(box[None], axes[0], **style)
_ = axes[0].set_title("proposal, then corrected box")
columns = [detections[key] for key in ("boxes", "scores", "labels")]
few = torchvision.ops.batched_nms(*columns, 0.25)
few = {name: value[few] for name, value in detections.items()}
options = {"classes": names[1:], "score_threshold": 0.5}
_ = plotting.show_lesions(image, few, axes[1], **options)
_ = axes[1].set_title("detections")
plt.show()

# %% [markdown]
# Each stage should bring the boxes nearer to the lesions. Does it? For each lesion, the best IoU
# with any box of three stages:

# %%
best_of = [
    iou(truth["boxes"], boxes).amax(dim=1).tolist()
    for boxes in (anchors, proposals, detections["boxes"])
]
print("best IoU    anchor  proposal  detection   (one phantom)")
columns = target["labels"], target["area"], *best_of
for label, area, *values in zip(*columns, strict=True):
    line = "".join(f"{value:9.2f}" for value in values)
    print(f"{names[label]:3} {area:4.0f} px {line}")

# %% [markdown]
# Where a number falls from one stage to the next, a better box was there and got lost: a neighbour
# with a better score suppressed it, or a correction overshot. And "best" is a generous measure,
# since it takes the truth to pick the box. Whether the *scores* pick the right boxes is what
# average precision measures, in [chapter 5](05_segmenter.ipynb).
#
# ## The mask head
#
# A second RoIAlign cuts $14 \times 14$ numbers out of the map, now for the *detected* boxes. One
# convolution (in the light models; four in the paper's) and a transposed convolution, which doubles
# the resolution, lead to $28 \times 28$ logits for each class. We use the mask of the detected class
# and ignore the others. So the mask head does not decide the class; it only draws the shape.

# %%
with torch.no_grad():
    # [D, c, 14, 14]
    boxes = [detections["boxes"]]
    cut = heads.mask_roi_pool(features, boxes, batch.image_sizes)
    x = cut
    for block in heads.mask_head:
        # [D, ..., 14, 14]
        x = F.relu(F.conv2d(x, block[0].weight, block[0].bias, padding=1))
    up = heads.mask_predictor.conv5_mask
    last = heads.mask_predictor.mask_fcn_logits
    # [D, ..., 28, 28]
    x = F.relu(F.conv_transpose2d(x, up.weight, up.bias, stride=2))
    mask_logits = F.conv2d(x, last.weight, last.bias)  # [D, L, 28, 28]
    theirs = heads.mask_predictor(heads.mask_head(cut))
assert torch.allclose(mask_logits, theirs, atol=1e-4)

# %% tags=["nbval-check-output"]
print(f"one RoI: {tuple(cut.shape[1:])} -> {tuple(mask_logits.shape[1:])}")

# %% [markdown]
# ### Back into the slice
#
# A 28x28 mask must be stretched over its box. torchvision first surrounds it with one row of zeros
# on each side and enlarges the box by as much, so that the mask may fade out across the border. Then
# the box is cut to whole pixels, and the mask is resized into it.

# %%
def paste(probability, box):
    """A mask [28, 28] and its box [4] -> [H, W], 0 outside the box."""
    size = len(probability)
    padded = F.pad(probability, (1, 1, 1, 1))  # [30, 30]
    centre = (box[:2] + box[2:]) / 2
    half = (box[2:] - box[:2]) / 2 * (size + 2) / size
    # towards 0
    corners = torch.cat([centre - half, centre + half])
    x1, y1, x2, y2 = corners.long().tolist()
    w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    padded = padded[None, None]  # [1, 1, 30, 30]
    resized = F.interpolate(padded, size=(h, w), mode="bilinear")[0, 0]
    canvas = probability.new_zeros(height, width)
    left, top = max(x1, 0), max(y1, 0)
    right, bottom = min(x2 + 1, width), min(y2 + 1, height)
    inside = resized[top - y1 : bottom - y1, left - x1 : right - x1]
    canvas[top:bottom, left:right] = inside
    return canvas


each = torch.arange(len(mask_logits))
probabilities = mask_logits[each, detections["labels"]].sigmoid()
for probability, box, theirs in zip(
    probabilities, detections["boxes"], detections["masks"], strict=True
):
    assert torch.allclose(paste(probability, box), theirs[0], atol=1e-3)

# %% [markdown]
# Where is the edge? We cut at a probability of 0.5, that is a logit of 0, as the paper says. The
# released code skips the sigmoid and cuts the *logit* at 0.5, a probability of
# $1/(1 + e^{-0.5}) = 0.622$, which makes its masks smaller.

# %% mystnb={"image": {"alt": "Left: 28 by 28 map of mask probabilities of one RoI. Right: the part of the synthetic slice around it with the true outline and the outlines of the mask at two thresholds."}, "figure": {"caption": "The mask of the best detection of our old friend: as the network gives it (left), and pasted into the slice (right) at the two thresholds. Synthetic."}}
best_box = detections["boxes"][0].cpu()
pasted = detections["masks"][0, 0].cpu()  # [H, W]
match = int(iou(best_box[None], target["boxes"])[0].argmax())
fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.3), layout="constrained")
UNIT = {"cmap": "viridis", "vmin": 0, "vmax": 1}
drawn = axes[0].imshow(probabilities[0].cpu(), **UNIT)
_ = axes[0].set_xlabel("Column of the mask (count)")
_ = axes[0].set_ylabel("Row of the mask (count)")
title = f"28 x 28 mask, {names[detections['labels'][0]]}"
_ = axes[0].set_title(title, fontsize=10)
_ = fig.colorbar(drawn, ax=axes[0], label="Probability (no unit)")
_ = plotting.show_slice(image, axes[1])
logit_half = torch.tensor(0.5).sigmoid().item()  # 0.622
outlines = {
    "truth": (target["masks"][match], 0.5, "white", "-"),
    "probability 0.5": (pasted, 0.5, SKY_BLUE, "--"),
    "logit 0.5": (pasted, logit_half, VERMILLION, ":"),
}
for name, (values, cut_at, colour, line) in outlines.items():
    style = {"colors": [colour], "linestyles": [line], "linewidths": 2}
    _ = axes[1].contour(values, levels=[cut_at], **style)
    _ = axes[1].plot([], [], color=colour, ls=line, lw=2, label=name)
_ = axes[1].legend(fontsize="small", facecolor="0.4", labelcolor="white")
(x1, y1), (x2, y2) = best_box[:2].tolist(), best_box[2:].tolist()
_ = axes[1].set(xlim=(x1 - 8, x2 + 8), ylim=(y2 + 8, y1 - 8))
plt.show()

# %%
real = target["masks"][match].bool()
for name, cut_at in (("probability 0.5", 0.5), ("logit 0.5", logit_half)):
    drawn = pasted > cut_at
    quality = (drawn & real).sum() / (drawn | real).sum()
    print(f"{name:15}: {int(drawn.sum()):6,} pixels,", end=" ")
    print(f"IoU with the true mask {quality:.2f}")
assert (pasted > 0.5).sum() >= drawn.sum()

# %% [markdown]
# ## The five losses
#
# In `train` mode the model takes targets and returns five losses; training minimises their sum.
# Three things change with the mode. Samples are drawn at random, so both computations below start
# from the same seed. The number of proposals is that for training. And batch normalisation
# {cite:p}`Ioffe2015` uses the mean and variance of the *batch at hand* instead of the stored ones,
# and updates the stored ones as a side effect. We work on a copy, so that our detector keeps its
# own.

# %%
student = copy.deepcopy(detector).train()
torch.manual_seed(SEED)
losses = student([friend], [truth])
for name, value in losses.items():
    print(f"{name:17} {value.item():.4f}")

# %% [markdown]
# Now by hand. First, two small functions. With a logit $o$ and a target $t$, binary cross-entropy
# is $-t \ln \sigma(o) - (1-t) \ln(1 - \sigma(o)) = \ln(1 + e^o) - t\,o$. `F.softplus`
# computes $\ln(1 + e^o)$ without an overflow. The smooth L1 loss of an error $e$ is a parabola near
# 0 and a straight line elsewhere, with the border $\beta$:
#
# $$\ell_\beta(e) = \begin{cases} e^2 / (2\beta) & |e| < \beta \\ |e| - \beta/2 & \text{else} \end{cases}$$
#
# For $\beta = 0$ it is the plain L1 loss. ($\beta$ is torchvision's name, and has nothing to do with
# batch normalisation.) Far from 0 the size of the gradient is 1 and does not grow, so a single wild
# box cannot dominate. Near 0 the gradient fades out, so that good boxes settle.

# %%
def binary_cross_entropy(logits, targets):
    """Element by element, no mean yet."""
    return F.softplus(logits) - targets * logits


def smooth_l1(error, beta):
    """Element by element, no sum yet."""
    error = error.abs()
    if beta == 0:
        return error
    parabola = 0.5 * error**2 / beta
    return torch.where(error < beta, parabola, error - 0.5 * beta)


# %% mystnb={"image": {"alt": "Left: smooth L1 loss for three values of beta against the error; right: its derivative, a ramp between minus one and one of width beta."}, "figure": {"caption": "Smooth L1 (left) and its gradient (right) for the betas that occur: L1 in the RPN of the released code, 1/9 in torchvision, 1 in the box head of the released code. No data."}}
errors = torch.linspace(-2, 2, 401, requires_grad=True)
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
for beta, text, colour, line in (
    (0, "0 (L1)", BLUE, "-"),
    (1 / 9, "1/9", VERMILLION, "--"),
    (1, "1", GREEN, ":"),
):
    value = smooth_l1(errors, beta)
    (slope,) = torch.autograd.grad(value.sum(), errors)
    look = {"color": colour, "ls": line, "label": f"beta {text}"}
    _ = axes[0].plot(errors.detach(), value.detach(), **look)
    _ = axes[1].plot(errors.detach(), slope, **look)
for ax, what in zip(axes, ("Loss", "Gradient"), strict=True):
    _ = ax.set_xlabel("Error of a delta (no unit)")
    _ = ax.set_ylabel(f"{what} (no unit)")
_ = axes[0].legend()
plt.show()

# %% [markdown]
# ### Two losses of the RPN
#
# Anchors do not depend on the weights, so labels and deltas to learn are those from above. The
# objectness loss is the mean over all sampled anchors, lesion and background. The box loss is the
# *sum* over the lesion anchors (a background anchor has no box to learn), divided by the number of
# *all* sampled anchors. So the more lesion anchors a slice has, the more it weighs in this loss.

# %%
torch.manual_seed(SEED)  # the same draws as in the model
batch_t, (truth_t,) = student.transform([friend], [truth])
# with the statistics of this slice
features_t = student.backbone(batch_t.tensors)
maps_t = list(features_t.values())
logits_of, deltas_of = rpn_outputs(maps_t, student.rpn.head)

positive, negative = sample(labels, config.rpn_batch, config.rpn_positive)
sampled = torch.cat([positive, negative])
# [positive, 4]
goal = encode(truth_t["boxes"][lesion[positive]], anchors[positive])

ours = {}
logits = torch.cat(logits_of)[sampled]
entropy = binary_cross_entropy(logits, labels[sampled])
ours["loss_objectness"] = entropy.mean()
error = torch.cat(deltas_of)[positive] - goal  # [positive, 4]
each = smooth_l1(error, config.rpn_box_beta)
ours["loss_rpn_box_reg"] = each.sum() / len(sampled)
CLOSE = {"rtol": 1e-3, "atol": 1e-6}
for name in ours:
    assert torch.allclose(ours[name], losses[name], **CLOSE), name
print(f"{len(sampled)} anchors, {len(positive)} of them lesion")

# %% [markdown]
# ### Two losses of the box head
#
# The examples of the second stage are proposals, so they change while the RPN learns. Note three
# points:
#
# - The proposals are *detached*: the box head learns from them, and its losses do not reach the RPN
#   through them.
# - The true boxes join the proposals. Early in training hardly any proposal overlaps a lesion, and
#   the box and mask heads would have nothing to learn from.
# - A proposal takes the class of the lesion that it overlaps most, if the IoU reaches the threshold.
#   The extra rule for the best match does not apply here.

# %%
with torch.no_grad():
    boxes_of = list(map(decode, anchors_of, deltas_of))
    most = config.rpn_train_proposals
    candidates, _ = filter_proposals(boxes_of, logits_of, most)
candidates = torch.cat([candidates, truth_t["boxes"]])  # [P + K, 4]

best, match = iou(truth_t["boxes"], candidates).max(dim=0)  # [P + K] each
high, low = config.box_iou
roi_labels = truth_t["labels"][match]  # 1 GGO, 2 C
roi_labels = torch.where(best < high, -1, roi_labels)  # left out
roi_labels = torch.where(best < low, 0, roi_labels)  # background

drawn = sample(roi_labels, config.box_batch, config.box_positive)
chosen = torch.cat(drawn).sort().values  # [RoIs]
rois, roi_labels = candidates[chosen], roi_labels[chosen]
match = match[chosen]
print(f"{len(candidates)} candidates; {len(rois)} drawn, of these", end=" ")
per_class = roi_labels.bincount(minlength=len(names)).tolist()
print(*map("{} {}".format, per_class, names), sep=", ")

# %% [markdown]
# The class loss is the cross-entropy over all drawn RoIs, background included:
# $-\ln p_y = \ln \sum_c e^{z_c} - z_y$. The box loss takes the four deltas of the *true* class
# only; those of other classes get no gradient from this RoI.

# %%
heads_t = student.roi_heads
# [RoIs, c, 7, 7]
pooled = heads_t.box_roi_pool(features_t, [rois], batch_t.image_sizes)
# [RoIs, 3], [RoIs, 12]
class_logits, box_deltas = heads_t.box_predictor(heads_t.box_head(pooled))

rows = torch.arange(len(rois), device=device)
# [RoIs]
true_logit = class_logits[rows, roi_labels]
cross_entropy = class_logits.logsumexp(dim=1) - true_logit
ours["loss_classifier"] = cross_entropy.mean()

is_lesion = roi_labels > 0
# [lesions, 4]
deltas = box_deltas.reshape(len(rois), -1, 4)[rows, roi_labels][is_lesion]
true_boxes = truth_t["boxes"][match]
goal = encode(true_boxes, rois, heads_t.box_coder.weights)[is_lesion]
each = smooth_l1(deltas - goal, config.box_beta)
ours["loss_box_reg"] = each.sum() / len(rois)
for name in ("loss_classifier", "loss_box_reg"):
    assert torch.allclose(ours[name], losses[name], **CLOSE), name

# %% [markdown]
# ### The loss of the mask head
#
# Only RoIs that match a lesion have a mask. The true mask is cut out of the slice by RoIAlign, too,
# onto the same $28 \times 28$ grid (with a sampling ratio of a 28th of the box's side, rounded up:
# torchvision's default). The targets are therefore fractions at the edge, not only 0 and 1.
# Binary cross-entropy compares them with the logits of the true class.

# %%
lesion_rois = rois[is_lesion]  # [lesions, 4]
lesion_match = match[is_lesion]  # [lesions]
# [lesions, c, 14, 14]
cut = heads_t.mask_roi_pool(features_t, [lesion_rois], batch_t.image_sizes)
# [lesions, L, 28, 28]
mask_logits = heads_t.mask_predictor(heads_t.mask_head(cut))
# [lesions, 28, 28]
mask_logits = mask_logits[torch.arange(len(cut)), roi_labels[is_lesion]]

# [lesions, 1, H, W]
true_masks = truth_t["masks"][lesion_match, None].float()
# tensors [1, 4]: one box for each mask
one_each = list(lesion_rois[:, None])
mask_goal = torchvision.ops.roi_align(true_masks, one_each, output_size=28)
mask_goal = mask_goal[:, 0]  # [lesions, 28, 28]
ours["loss_mask"] = binary_cross_entropy(mask_logits, mask_goal).mean()
assert torch.allclose(ours["loss_mask"], losses["loss_mask"], **CLOSE)

# %% mystnb={"image": {"alt": "Two rows of small square maps: on top the target masks of one RoI for each lesion, below the probabilities that the network gives for the same RoIs."}, "figure": {"caption": "What the mask head is trained on: for one drawn RoI of each lesion, the target (top) and the network's probability (bottom) on the grid of 28 x 28. Small lesions fill the grid as large ones do. Synthetic."}}
examples = [
    (lesion_match == k).nonzero()[0, 0]  # the first of its lesion
    for k in lesion_match.unique()[:5]
]
fig, axes = plt.subplots(
    2,
    len(examples),
    figsize=(1.9 * len(examples) + 0.6, 4.2),
    layout="constrained",
    squeeze=False,
)
for column, i in enumerate(examples):
    shown = mask_goal[i], mask_logits[i].sigmoid().detach()
    for ax, values in zip(axes[:, column], shown, strict=True):
        drawn = ax.imshow(values.cpu(), cmap="viridis", vmin=0, vmax=1)
        _ = ax.set(xticks=[0, 14, 27], yticks=[0, 14, 27])
        _ = ax.set_xlabel("Column (count)")
    name = names[roi_labels[is_lesion][i]]
    _ = axes[0, column].set_title(name, fontsize=10)
_ = axes[0, 0].set_ylabel("target\nRow (count)")
_ = axes[1, 0].set_ylabel("network\nRow (count)")
_ = fig.colorbar(drawn, ax=axes, label="Probability (no unit)", shrink=0.8)
plt.show()

# %% [markdown]
# ### All five

# %%
print(f"{'':17} {'by hand':>9} {'model':>9}")
for name, value in losses.items():
    print(f"{name:17} {ours[name].item():9.5f} {value.item():9.5f}")
assert set(ours) == set(losses)
assert torch.allclose(sum(ours.values()), sum(losses.values()), rtol=1e-3)

# %% [markdown]
# | loss | examples | formula | teaches |
# |---|---|---|---|
# | `loss_objectness` | sampled anchors $I$ | $\frac{1}{\lvert I\rvert} \sum_{i \in I} \operatorname{BCE}(o_i, t_i)$ | where to look |
# | `loss_rpn_box_reg` | lesion anchors $I^+ \subset I$ | $\frac{1}{\lvert I\rvert} \sum_{i \in I^+} \sum_{4} \ell_\beta(\delta_i - \delta_i^*)$ | a first correction of place and size |
# | `loss_classifier` | sampled RoIs $J$ | $-\frac{1}{\lvert J\rvert} \sum_{j \in J} \ln p_{j, y_j}$ | background, GGO or C |
# | `loss_box_reg` | lesion RoIs $J^+ \subset J$ | $\frac{1}{\lvert J\rvert} \sum_{j \in J^+} \sum_{4} \ell_\beta(\delta_{j, y_j} - \delta_j^*)$ | a second correction, for each class its own |
# | `loss_mask` | lesion RoIs $J^+$ | mean of $\operatorname{BCE}(m_{j, y_j}, m_j^*)$ over $J^+$ and $28 \times 28$ | which pixels of the box |
#
# How many examples is that, from one slice?

# %%
print(f"{len(sampled)} anchors with a label,", end=" ")
print(f"{len(positive)} of them with deltas to learn")
print(f"{len(rois)} RoIs with a class,", end=" ")
print(f"{int(is_lesion.sum())} of them with deltas and a mask to learn")

# %% [markdown]
# In the table, a star marks the truth, and $y_j$ is the true class of RoI $j$. The paper names smooth
# L1 for both box losses {cite:p}`TerSarkisov2020`; in the released code the RPN's is plain L1
# ($\beta = 0$) and the box head's has $\beta = 1$. Here, `config.rpn_box_beta` and `config.box_beta`
# set it.
#
# ### Who learns from which loss?
#
# The chart at the top says that no gradient flows through the proposals. We can check it with the
# model's own five losses: a parameter on which a loss does not depend gets `None` for a gradient.

# %% tags=["nbval-check-output"]
parts = {
    "backbone": [student.backbone],
    "RPN head": [student.rpn.head],
    "box head": [heads_t.box_head, heads_t.box_predictor],
    "mask head": [heads_t.mask_head, heads_t.mask_predictor],
}
print(f"{'':17}" + "".join(f"{name:>10}" for name in parts))
for name in (
    "loss_objectness",
    "loss_rpn_box_reg",
    "loss_classifier",
    "loss_box_reg",
    "loss_mask",
):
    row = ""
    for modules in parts.values():
        weights = [p for module in modules for p in module.parameters()]
        options = {"retain_graph": True, "allow_unused": True}
        grads = torch.autograd.grad(losses[name], weights, **options)
        learns = any(grad is not None for grad in grads)
        row += f"{'learns' if learns else '-':>10}"
    print(f"{name:17}{row}")

# %% [markdown]
# Every loss teaches the backbone; each head learns from its own losses alone. The RPN is never told
# whether its proposals led to a right class.
#
# ### What the batch statistics do
#
# The released code trains the segmenter on one slice at a time. Then the batch is a single slice, and
# its mean and variance are only rough estimates. How much does that matter for our old friend? Here
# are the same losses from the same seed, once with the statistics of this slice and once with the
# stored ones:

# %%
stored = copy.deepcopy(detector).train()
for module in stored.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.eval()  # use the stored statistics, and do not update them
torch.manual_seed(SEED)
steady = stored([friend], [truth])
print(f"{'':17} this slice    stored")
for name in losses:
    value, other = losses[name].item(), steady[name].item()
    print(f"{name:17} {value:10.4f} {other:9.4f}")

# %% [markdown]
# The samples of RoIs differ as well, because other features give other proposals. So the table says
# that the two differ, not that one is better. It is one reason why a trained detector is run in
# `eval` mode, and why [chapter 7](07_covid_ct_mask_net.ipynb) is careful about what batch
# normalisation does while the classifier trains.
#
# Our detector itself has not changed, because only the copy saw the slice in `train` mode.

# %%
fresh = trained_segmenter(PRESET, device, shipped=True).state_dict()


def changes(model):
    """Names of the entries that are not as they were loaded."""
    state = model.state_dict()
    same = {name: torch.equal(state[name], fresh[name]) for name in fresh}
    return [name for name in same if not same[name]]


assert not changes(detector)
for name in changes(student):
    assert "running_" in name or "num_batches" in name
print(f"{len(changes(student))} entries of the copy have changed,", end=" ")
print("all of batch normalisation")

# %% [markdown]
# ## A slice without a lesion
#
# What can a healthy slice teach, and what does the detector return for it? Three of the five losses
# are 0: without a lesion there is no box and no mask to learn. In the other two, every target is
# "background".

# %%
# a control
size = preset.phantoms.size
healthy, healthy_mask = make_slice(3, 0, size, position=0.5)
nothing = mask_to_targets(healthy_mask, config.lesions, preset.min_area)
nothing = {name: value.to(device) for name, value in nothing.items()}
assert len(nothing["boxes"]) == 0
control = torch.from_numpy(healthy).expand(3, -1, -1).to(device)

torch.manual_seed(SEED)
empty = copy.deepcopy(detector).train()([control], [nothing])
for name in ("loss_rpn_box_reg", "loss_box_reg", "loss_mask"):
    assert empty[name] == 0
for name in ("loss_classifier", "loss_objectness"):
    print(f"{name:15} {empty[name].item():.4f}")

# %%
with torch.no_grad():
    batch_h, _ = detector.transform([control])
    features_h = detector.backbone(batch_h.tensors)
    proposals_h, _ = detector.rpn(batch_h, features_h)
    sizes_h = batch_h.image_sizes
    pooled = heads.box_roi_pool(features_h, proposals_h, sizes_h)
    logits_h, _ = heads.box_predictor(heads.box_head(pooled))
print("best lesion score of a proposal, at rank 1, 11, 21, ...", end="   ")
print("(two phantoms)")
for name, values in (
    ("old friend", scores),
    ("control", logits_h.softmax(dim=1)),
):
    best = values[:, 1:].amax(dim=1).sort(descending=True).values
    shown = " ".join(f"{value:.2f}" for value in best[:60:10])
    print(f"{name:10} {len(best):4} proposals: {shown}")

# %% [markdown]
# The segmentation set of the paper holds COVID-19 patients only {cite:p}`Zhang2020`, as ours does.
# Some of their slices show no lesion (the released code skips those in training, ours does not), but
# the detector has never been trained on a healthy patient. Still, it proposes boxes on the control as
# it does everywhere. So every slice has a list of boxes with scores, and
# [chapter 6](06_ranked_boxes.ipynb) turns it into a vector.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Lesions without an anchor
#
# Kind: experiment, **
#
# Anchors must fit the lesions. Draw 20 COVID-19 phantoms, and for several sets of sizes compute the
# share of lesions whose best anchor reaches the upper threshold of the RPN. Try sizes that are too
# large, such as 32, 64 and 128 pixels, and too small.

# %% tags=["solution"]
# @title Solution
true_boxes = []
for seed in range(5000, 5020):
    codes = make_slice(seed, 2, size)[1]
    one = mask_to_targets(codes, config.lesions, preset.min_area)
    true_boxes.append(one["boxes"])
true_boxes = torch.cat(true_boxes).to(device)  # [K, 4]
shares = {}
for sizes in (
    config.anchor_sizes,
    (2, 4),
    (8, 16, 32),
    (32, 64, 128),
    (6, 8, 11, 16, 22, 32),
):
    own = cell_anchors(sizes, config.anchor_ratios).to(device)
    grids = [
        grid_anchors(own, *level.shape[-2:], stride)
        for level, stride in zip(maps, strides, strict=True)
    ]
    grid = torch.cat(grids)
    best = iou(true_boxes, grid).amax(dim=1)  # [K]
    shares[sizes] = (best >= config.rpn_iou[0]).float().mean().item()
    print(f"sizes {str(sizes):22}: {shares[sizes]:4.0%}", end=" ")
    print(f"of {len(best)} lesions reach the threshold")
assert shares[anchor_sizes] >= max(shares[(2, 4)], shares[(8, 16, 32)])

# %% [markdown] tags=["answer"]
# Compare the first row with the third to see what sizes 2 and 4 add, and with the last to see what
# finer steps would bring. Lesions below the threshold are not lost, because the extra rule gives each
# at least one anchor. But a poor anchor has much to correct, and it is one example among hundreds.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The NMS threshold of the RPN
#
# Kind: experiment, **
#
# Filter the decoded boxes of our old friend with NMS thresholds of 0.1, 0.25, 0.5, 0.75 and 0.95.
# How many proposals are left, and how many lesions do they reach with an IoU of at least 0.5?

# %% tags=["solution"]
# @title Solution
with torch.no_grad():
    logits_e, deltas_e = rpn_outputs(maps, detector.rpn.head)
logits, boxes = torch.cat(logits_e), decode(anchors, torch.cat(deltas_e))
top = logits.topk(min(config.rpn_test_proposals, len(logits))).indices
boxes = torchvision.ops.clip_boxes_to_image(boxes[top], (height, width))
left = []
for threshold in (0.1, 0.25, 0.5, 0.75, 0.95):
    kept = boxes[nms(boxes, logits[top], threshold)]
    reached = (iou(truth["boxes"], kept).amax(dim=1) >= 0.5).sum()
    left.append(len(kept))
    print(f"threshold {threshold:4}: {len(kept):4} proposals,", end=" ")
    print(f"{reached} of {len(truth['boxes'])} lesions")
assert left[0] < left[-1]

# %% [markdown] tags=["answer"]
# A low threshold leaves few boxes. It may also lose a lesion, for example a consolidation inside a
# GGO, or the better fitting of two boxes when the other has the better logit.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · What one anchor sees
#
# Kind: experiment, **
#
# Take the anchor with the best objectness on our old friend, and compute the gradient of its logit
# with respect to the slice. Which pixels can change the logit at all? Draw the answer. Then count
# the cells of the finest feature map that reach it.

# %% tags=["solution"] mystnb={"image": {"alt": "The synthetic slice with a heat map of the size of the gradient, and a frame around one anchor."}, "figure": {"caption": "Which pixels the best anchor (frame) listens to: size of the gradient of its logit, relative to the largest. Synthetic."}}
# @title Solution
pixels = friend.clone().requires_grad_(True)
batch_g, _ = detector.transform([pixels])
maps_g = list(detector.backbone(batch_g.tensors).values())
logits_g, _ = rpn_outputs(maps_g, detector.rpn.head)
best = int(torch.cat(logits_g).argmax())
of_slice, *of_maps = torch.autograd.grad(
    torch.cat(logits_g)[best], [pixels, *maps_g], allow_unused=True
)
read = [(g[0] != 0).any(dim=0) for g in of_maps if g is not None]
cells = sum(int(each.sum()) for each in read)
strength = of_slice.abs().sum(dim=0).cpu()  # [H, W]
assert cells <= 9
ax = plotting.show_slice(image, plotting.get_ax(6, 4.8))
drawn = ax.imshow(strength / strength.max(), **HEAT)
_ = draw_boxes(anchors[best][None], ax, edgecolor="white", lw=1.5)
bar = ax.figure.colorbar(drawn, ax=ax)
bar.set_label("Gradient (share of the largest)")
share = (strength > 0).float().mean()
_ = ax.set_title(f"{cells} cells and {share:.0%} of the pixels reach it")
_ = ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
plt.show()

# %% [markdown] tags=["answer"]
# The 3x3 convolution of the RPN reads at most nine cells. But those nine see much more of the slice
# than the anchor covers, and the surroundings can help to tell a lesion from a vessel.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · The sampling ratio
#
# Kind: experiment, **
#
# Cut the best proposal out of the finest feature map with sampling ratios of 1, 2, 4 and 16. Take 16
# as the truth. How much do you gain from one ratio to the next, and from which ratio on does it hardly
# matter?

# %% tags=["solution"]
# @title Solution
inputs = maps[0][0], proposals[0], 7, strides[0]
fine = roi_align(*inputs, ratio=16)
errors = []
for ratio in (1, 2, 4):
    coarse = roi_align(*inputs, ratio=ratio)
    errors.append(float((coarse - fine).norm() / fine.norm()))
    print(f"ratio {ratio}: {100 * errors[-1]:.2f} % away")
assert errors[0] > errors[2]

# %% [markdown] tags=["answer"]
# The bins of a small RoI are narrower than a cell, and between two cells the interpolated map is
# nearly a straight line, so a few points do almost as well as many. More points pay off for large
# boxes on fine maps, whose bins are several cells wide.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Beta
#
# Kind: experiment, **
#
# Compute the box loss of the box head on the drawn RoIs above, with $\beta$ set to 0, 1/9 and 1 in
# turn. What share of the deltas lies in the parabola? What does a large $\beta$ do to the gradients of
# boxes that are nearly right?

# %% tags=["solution"]
# @title Solution
error = (deltas - goal).detach().requires_grad_(True)  # [lesions, 4]
for beta in (0, 1 / 9, 1):
    loss = smooth_l1(error, beta).sum() / len(rois)
    (slope,) = torch.autograd.grad(loss, error)
    inside = (error.abs() < beta).float().mean()
    print(f"beta {beta:.2f}: loss {loss:.3f}, {inside:.0%} in the", end=" ")
    print(f"parabola, gradient {slope.norm():.3f}")

# %% [markdown] tags=["answer"]
# In the parabola the gradient is $e / \beta$ instead of 1. With $\beta = 1$, the released code's
# choice for the box head, a delta that is off by 0.1 pulls ten times less than under L1. Remember the
# weights of the coder: for a shift, 0.1 is a hundredth of the proposal's width.

# %% [markdown]
# ## What we learned
#
# 1. Anchors turn "how many lesions, and where?" into thousands of small yes-or-no questions with corrections.
# 2. A detector is trained on sampled anchors and regions, which IoU with the truth labels as lesion, background or left out.
# 3. RoIAlign reads the feature map between its cells, so that small shifts of a box are not rounded away.
# 4. The box head scores and corrects each proposal for each class, and the mask head draws 28 x 28 pixels inside the box.
# 5. Five losses train the parts together, each head learns from its own, and no gradient passes through the proposals.
#
# ## Further reading
#
# - {cite:t}`Ren2015` introduce anchors and the RPN; {cite:t}`He2017` add RoIAlign and the masks.
# - {cite:t}`Lin2017` build the feature pyramid, {cite:t}`He2016` the backbone under it.
# - {cite:t}`TerSarkisov2020` set the sizes and thresholds used here, in section 3.1;
#   [paper v code](paper_v_code.ipynb) lists where the released code differs.
# - {cite:t}`Aleem2020` also take Mask R-CNN to lung slices; {cite:t}`Ronneberger2015` and
#   {cite:t}`Long2015` are the semantic networks to compare with.
# - [Chapter 5](05_segmenter.ipynb) trains this detector from random weights and judges it.

