# %% [markdown]
# # 2 · Region proposals
#
# A slice may hold no lesion at all, or ten of different sizes. A convolutional network, however,
# returns the same number of outputs for every slice. **How can such a network propose boxes?** We
# take the first half of a trained Mask R-CNN apart, build each part again from plain tensors, and let
# an `assert` check that the copy gives the same numbers as the original.

# %% tags=["fold"] mystnb={"image": {"alt": "A synthetic chest slice twice. Left: areas of lung, GGO and consolidation in different colours. Right: the grey slice with outlined lesions and many dotted boxes, most of them near a lesion."}, "figure": {"caption": "Our old friend, a COVID-19 phantom on which no model was trained. Left: one code for each pixel. Right: the lesions in their boxes (solid GGO, dashed C) and the 40 best proposals of a trained detector (dotted). This chapter builds the dotted boxes. Synthetic."}}
# @title Imports, versions, and a slice with its proposals
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
from covidmask.plotting import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILLION

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # on a GPU, too, all digits of float32 count
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"torchvision {torchvision.__version__}, Python {platform.python_version()}")


def draw_boxes(boxes, ax, **style):
    """Frames; a box counts from the edges of pixels, the axes from their middles."""
    for x1, y1, x2, y2 in np.asarray(torch.as_tensor(boxes).cpu()):
        frame = Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False)
        ax.add_patch(frame).set(**{"lw": 1.2, **style})


def opening():
    """The picture above, from the package's own detector."""
    preset = PRESETS["quick"]
    image, mask = old_friend(preset.phantoms.size)
    truth = mask_to_targets(mask, preset.detector.lesions, preset.min_area)
    detector = trained_segmenter("quick", shipped=True)
    with torch.no_grad():
        batch, _ = detector.transform([torch.from_numpy(image).expand(3, -1, -1)])
        boxes = detector.rpn(batch, detector.backbone(batch.tensors))[0][0]
    _, axes = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
    plotting.show_mask(mask, axes[0]).set_title("a map: one code for each pixel")
    plotting.show_lesions(image, truth, axes[1]).set_title("lesions and proposals")
    draw_boxes(boxes[:40], axes[1], edgecolor=GREEN, lw=1, ls=":")
    plt.show()


opening()

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0

# %% [markdown]
# **After it you can**
#
# - say what boxes with scores add to a map of the slice;
# - place the anchors of a detector, and decode its deltas into boxes;
# - compute the IoU of two boxes, and run NMS by hand;
# - turn thousands of anchors into a list of proposals.
#
# **You need** basic PyTorch (convolutions) and [chapter 1](01_data.ipynb). The chapter runs alone.
#
# **Time:** reading 25 min, exercises 60 min, running 1 min.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice here is a *phantom*, made by formulas and random numbers. No number below is a result on
# patients, and nothing here is for diagnosis.
# ```
#
# ## Boxes with scores, not a map
#
# A semantic network such as U-Net {cite:p}`Ronneberger2015` or FCN {cite:p}`Long2015` answers one
# question for each pixel: which class is this? That is the map on the left of the picture. Mask R-CNN
# {cite:p}`He2017` asks about each *instance*, that is each separate lesion: where is its box, what is
# its class, how sure is the network, and which pixels inside the box belong to it?
#
# The difference is smaller than it looks, because the connected regions of a map are instances, too.
# That is how `mask_to_targets` makes boxes from a mask. But boxes with scores add three things:
#
# - **A score for each candidate.** A semantic network has a number for each pixel, whereas a
#   radiologist asks about a lesion.
# - **Candidates that are not lesions.** On a healthy slice a good map is empty. Mask R-CNN still
#   proposes boxes there, and says how much each looks like a lesion. The classifier of this book reads
#   them ([chapter 6](06_ranked_boxes.ipynb)).
# - **Overlap.** A consolidation inside a GGO is a second box within the first.

# %%
preset = PRESETS[PRESET]
config, size = preset.detector, preset.phantoms.size
image, mask = old_friend(size)
target = mask_to_targets(mask, config.lesions, preset.min_area)
names = ("background", *LESION_CLASSES[config.lesions])  # class 0, 1, 2
for label, box in zip(target["labels"], target["boxes"], strict=True):
    corners = ", ".join(f"{value:.0f}" for value in box)
    print(f"{names[label]:4} box ({corners})")

# %% [markdown]
# ## The parts
#
# Mask R-CNN works in two stages. The first looks everywhere and proposes boxes; the second looks
# closely at each proposal and decides what it is.

# %% tags=["fold"] mystnb={"image": {"alt": "Flow chart: slice, backbone with feature pyramid, region proposal network, proposals; then RoIAlign, box head and mask head."}, "figure": {"caption": "Mask R-CNN. The upper row is this chapter, the lower row the next. The proposals are handed on as plain numbers (dashed arrow): no gradient flows back through them, as chapter 4 shows."}}
# @title Draw the parts of Mask R-CNN
fig, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")


def part(x, y, text, colour=BLUE, width=1.8):
    """One frame of the chart."""
    style = {"boxstyle": "round,pad=0.04", "facecolor": "white", "edgecolor": colour}
    corner = x - width / 2, y - 0.43
    ax.add_patch(FancyBboxPatch(corner, width, 0.86, lw=1.6, **style))
    ax.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(start, end, line="-"):
    """From one frame to the next."""
    arrows = {"arrowstyle": "-|>", "ls": line, "color": BLACK, "lw": 1.2, "shrinkA": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=arrows)


part(0.9, 3, "slice\n[3, H, W]", BLACK, 1.4)
part(3.2, 3, "backbone\nand FPN")
part(5.9, 3, "region proposal\nnetwork (RPN)", width=2.2)
part(8.6, 3, "proposals\n[P, 4]", BLACK, 1.6)
part(3.2, 1, "RoIAlign\n[P, c, 7, 7]", GREEN)
part(5.9, 1.5, "box head:\nclass, 4 deltas", GREEN, 2.2)
part(5.9, 0.4, "mask head:\n28 x 28", GREEN, 2.2)
part(8.6, 1, "detections", BLACK, 1.6)
for start, end in (((1.66, 3), (2.2, 3)), ((4.16, 3), (4.7, 3)), ((7.06, 3), (7.7, 3))):
    arrow(start, end)
arrow((3.2, 2.52), (3.2, 1.5))
ax.text(3.1, 2.15, "feature maps", ha="right", va="center", fontsize=10)
ax.plot([8.6, 8.6, 4.0], [2.52, 2.22, 2.22], color=BLACK, lw=1.2, ls="--")
arrow((4.0, 2.22), (4.0, 1.5), "--")
for start, end in (((4.16, 1.1), (4.72, 1.45)), ((4.16, 0.9), (4.72, 0.5))):
    arrow(start, end)
for start, end in (((7.06, 1.45), (7.72, 1.1)), ((7.06, 0.5), (7.72, 0.9))):
    arrow(start, end)
ax.set(xlim=(0, 9.6), ylim=(-0.15, 3.55))
ax.axis("off")
plt.show()

# %% [markdown]
# The detector of this chapter comes with weights that were trained on other phantoms. We use it in
# `eval` mode, in which the output for a slice depends on that slice alone ([chapter
# 8](08_three_regimes.ipynb) says why).

# %% tags=["nbval-check-output"]
detector = trained_segmenter(PRESET, device, shipped=True)
for name, module in detector.named_children():
    count = sum(p.numel() for p in module.parameters())
    print(f"{name:10} {count:9,} parameters")

# %% [markdown]
# `transform` comes first and has nothing to learn. It resizes the slice, subtracts a mean from each
# of the three equal channels, divides by a standard deviation, and fills up a batch with zeros until
# both sides are multiples of 32. Mean and deviation are those of ImageNet, a set of colour photographs,
# because a backbone that starts from ImageNet weights expects them.

# %%
# [3, H, W] in 0..1
friend = torch.from_numpy(image).expand(3, -1, -1).to(device)
truth = {name: value.to(device) for name, value in target.items()}
with torch.no_grad():
    batch, _ = detector.transform([friend])
mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
std = torch.tensor(IMAGENET_STD, device=device)[:, None, None]
standardised = (friend - mean) / std  # [3, H, W]
assert torch.allclose(batch.tensors[0], standardised, atol=1e-5)
height, width = batch.image_sizes[0]
assert (height, width) == image.shape  # nothing was resized here

# %% [markdown]
# ## Backbone and feature pyramid
#
# The backbone is a ResNet {cite:p}`He2016` without its last, classifying layers. From stage to stage
# the resolution halves, and each cell of a map describes larger surroundings. The *stride* of a map is
# the distance, in pixels of the slice, between two neighbouring cells.
#
# So a fine map knows little about the surroundings, and a coarse one has lost the details. A feature
# pyramid network (FPN) {cite:p}`Lin2017` brings both together. A 1x1 convolution gives all maps the same
# number of channels. Then, from the coarsest map to the finest, each is enlarged and added to the next
# finer one, and a 3x3 convolution smooths each sum.

# %% tags=["fold"] mystnb={"image": {"alt": "Two columns of bars, one for each stride from 32 at the top to 4 at the bottom: stages of the backbone on the left, maps of the pyramid on the right. Arrows to the right say 1 x 1; arrows downwards on the right say enlarge and add."}, "figure": {"caption": "The feature pyramid of the paper's ResNet-50; the wider a bar, the finer the map. Cells are counted for a slice of 512 pixels. The preset quick keeps only one map, of stride 8."}}
# @title Draw the feature pyramid
fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
looks = {"ha": "center", "va": "center", "fontsize": 10}
for row, stride in enumerate((4, 8, 16, 32)):
    half, cells = 1.15 - 0.25 * row, 512 // stride
    for x, colour in ((1.7, BLUE), (5.3, VERMILLION)):
        bar = Rectangle((x - half, row - 0.2), 2 * half, 0.4, fill=False, lw=1.8)
        ax.add_patch(bar).set_edgecolor(colour)
        ax.text(x, row, f"{cells} x {cells}", **looks)
    ax.text(0.4, row, f"stride {stride}", **(looks | {"ha": "right"}))
    lines = {"arrowstyle": "-|>", "color": BLACK, "lw": 1.3}
    ax.annotate("", (5.3 - half, row), (1.7 + half, row), arrowprops=lines)
    ax.text(3.5, row + 0.16, "1x1", **looks)
    ax.annotate("", (8.0, row), (5.3 + half, row), arrowprops=lines)
    ax.text(7.25, row + 0.16, "3x3", **looks)
    ax.text(8.1, row, "c channels", ha="left", va="center", fontsize=10)
    if row:
        ax.annotate("", (1.7, row - 0.2), (1.7, row - 0.8), arrowprops=lines)
        ax.annotate("", (5.3, row - 0.8), (5.3, row - 0.2), arrowprops=lines)
        ax.text(5.45, row - 0.5, "enlarge, add", **(looks | {"ha": "left"}))
ax.text(1.7, 3.65, "stages of the backbone", color=BLUE, **looks)
ax.text(5.3, 3.65, "pyramid", color=VERMILLION, **looks)
ax.set(xlim=(-0.5, 9.1), ylim=(-0.4, 3.85))
ax.axis("off")
plt.show()


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


# %% [markdown]
# We compare it with the detector, which has a single map, and with an untrained ResNet-50 of the
# paper, which has four.

# %% tags=["nbval-check-output"]
large = lesion_mask_rcnn(PRESETS["paper"].detector).eval().to(device)
for name, model in (("ResNet-50", large), ("our detector", detector)):
    with torch.no_grad():
        stages = list(model.backbone.body(batch.tensors).values())
        # a dictionary of maps, finest first
        features = model.backbone(batch.tensors)
        by_hand = feature_pyramid(stages, model.backbone.fpn)
    maps = list(features.values())
    for own, theirs in zip(by_hand, maps, strict=True):
        assert torch.allclose(own, theirs, rtol=1e-3, atol=1e-3)
    strides = [height // level.shape[-2] for level in maps]
    print(f"{name}: {maps[0].shape[1]} channels, strides {strides}")

# %% [markdown]
# What is in such a map? The channels have no names; training shaped them all together, into whatever
# helps the heads. Here are the two channels of our detector that vary most inside the lungs.

# %% tags=["fold"] mystnb={"image": {"alt": "The synthetic chest slice and two coarse maps of it, which are bright at different places."}, "figure": {"caption": "Our old friend and the two channels of its finest feature map that vary most inside the lungs. One cell is one stride wide; each channel has its own scale of colours. Synthetic."}}
# @title Draw two channels of the feature map
finest, stride = maps[0][0].cpu(), strides[0]  # [c, h, w]
lungs = torch.from_numpy(mask[::stride, ::stride] > 0)  # [h, w]
liveliest = finest[:, lungs].std(dim=1).argsort(descending=True)[:2]
low, high = -stride / 2 - 0.5, width - stride / 2 - 0.5
edges = (low, high, height - stride / 2 - 0.5, low)
options = {"layout": "constrained", "sharex": True, "sharey": True}
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), **options)
plotting.show_slice(image, axes[0]).set_title("slice", fontsize=10)
for channel, ax in zip(liveliest.tolist(), axes[1:], strict=True):
    least, most = finest[channel, lungs].aminmax()
    ax.imshow(finest[channel], extent=edges, cmap="viridis", vmin=least, vmax=most)
    ax.set_title(f"channel {channel}", fontsize=10)
    ax.set_xlabel("x (pixels)")
axes[0].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
plt.show()

# %% [markdown]
# ## Anchors
#
# Now to the question of this chapter. A convolution gives the same number of outputs at every cell.
# *Anchors* make use of that: they are a fixed set of boxes, repeated at every cell. The network need
# not invent a box. For each anchor it says whether a lesion is there, and how to correct the anchor.
#
# An anchor has a size $q$ (the square root of its area) and a ratio $\rho$ of height $h$ to width $w$:
#
# $$w = \frac{q}{\sqrt\rho}, \qquad h = q\,\sqrt\rho, \qquad \text{so that}\quad w\,h = q^2,\quad h / w = \rho .$$
#
# The paper takes five small sizes and six ratios, because lesions are small and have many shapes.
# torchvision rounds each half side to a whole pixel, "half to even": 0.5 becomes 0, and 1.5 becomes 2.


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

# %% tags=["fold", "nbval-check-output"]
# @title Print width x height of the thirty anchors
anchor_sizes = config.anchor_sizes
sides = (cell[:, 2:] - cell[:, :2]).int()
sides = sides.reshape(-1, len(anchor_sizes), 2).tolist()
print("ratio  " + "".join(f"size {size:<5}" for size in anchor_sizes))
for ratio, row in zip(config.anchor_ratios, sides, strict=True):
    print(f"{ratio:5}  " + "".join(f"{w:>3} x {h:<4}" for w, h in row))
print(f"{int((cell[:, 3] == cell[:, 1]).sum())} have no height")

# %% [markdown]
# For the smallest anchors rounding is coarse, and two of them are lines: at size 2, ratio 0.1 wants a
# half height of 0.32 and ratio 0.25 one of exactly 0.5, and both round to 0. Exercise 2 asks what becomes
# of them.
#
# The thirty boxes are repeated at every cell. The cell in row $i$ and column $j$ sits at the pixel
# $(j \cdot \text{stride}, i \cdot \text{stride})$. Cells come row by row, with the anchors of one cell
# together.


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

# %% tags=["fold"]
# @title Draw the anchors of one cell, one size at a time
largest = int(target["area"].argmax())
box = target["boxes"][largest]
# x, y of the cell nearest to the middle of the largest lesion
middle = ((box[:2] + box[2:]) / 2 / strides[0]).round() * strides[0]
colours = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY_BLUE)
RATIO_STYLES = list(zip(colours, ["-", "--", ":"] * 2, strict=True))


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
    ax.legend(title="h / w", fontsize=9, loc="lower right", ncols=2)
    ax.set_xlim(middle[0] - 54, middle[0] + 54)
    ax.set_ylim(middle[1] + 54, middle[1] - 40)
    ax.set_title(f"size {size} pixels", fontsize=10)
    return fig


frame_slider(
    [draw_anchors(size) for size in anchor_sizes],
    [f"{size} pixels" for size in anchor_sizes],
    "Anchor size",
    "Six anchors of different ratios at one cell of a synthetic slice, "
    "over a lesion in a white frame",
    caption="The anchors of one cell, one size at a time; the white frame is the "
    "largest lesion of our old friend. Synthetic.",
    start=len(anchor_sizes) - 2,
    dpi=80,
)

# %% [markdown]
# ## The region proposal network
#
# The RPN {cite:p}`Ren2015` is small: one 3x3 convolution, then two 1x1 convolutions side by side.
# One gives a number for each anchor, its *objectness*: is there a lesion of any class? The number is a
# *logit*: it may have any size, and a sigmoid makes a probability of it (0 becomes one half). The other
# gives four numbers for each anchor, the *deltas*, which correct its place and size.
#
# The outputs come as maps, [anchors, rows, columns]. Our list of anchors runs the other way round:
# cells first, then the anchors of a cell. So the axes are swapped before the maps are flattened.
# Without the swap the boxes still look plausible, and the mistake is hard to notice.


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


# %% tags=["nbval-check-output"]
with torch.no_grad():
    logits_of, deltas_of = rpn_outputs(maps, detector.rpn.head)
    their_logits, _ = detector.rpn.head(maps)
# row 0, column 1
first = torch.stack([their_logits[0][0, a, 0, 1] for a in range(len(cell))])
ours = logits_of[0][len(cell) : 2 * len(cell)]
assert torch.allclose(ours, first, atol=1e-5)
for theirs, logits in zip(their_logits, logits_of, strict=True):
    print(f"map {tuple(theirs.shape)} -> {len(logits):,} logits")

# %% [markdown]
# ### Decoding
#
# The four deltas are not in pixels. They are relative to the anchor: with its centre $(x_a, y_a)$
# and its sides $w_a, h_a$, the corrected box has the centre and the sides
#
# $$x = x_a + \delta_x w_a, \quad y = y_a + \delta_y h_a, \quad w = w_a e^{\delta_w}, \quad h = h_a e^{\delta_h}.$$
#
# So "a tenth to the right" means the same for a small lesion as for a large one, and the exponential
# keeps the sides positive. Large $\delta_w$ and $\delta_h$ are cut at $\ln(1000/16)$, since an
# exponential can overflow. ([Chapter 3](03_roi_heads.ipynb) draws the four deltas as arrows.)


# %%
def decode(anchors, deltas):
    """Anchors [n, 4] and deltas [n, 4] -> boxes [n, 4]."""
    sides = anchors[:, 2:] - anchors[:, :2]  # [n, 2]: w, h
    centre = anchors[:, :2] + 0.5 * sides
    shift, stretch = deltas.split(2, dim=1)  # [n, 2] each
    centre = centre + shift * sides
    sides = sides * stretch.clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centre - 0.5 * sides, centre + 0.5 * sides], dim=1)


boxes_of = list(map(decode, anchors_of, deltas_of))
theirs = detector.rpn.box_coder.decode(torch.cat(deltas_of), [anchors])
assert torch.allclose(torch.cat(boxes_of), theirs[:, 0], atol=1e-3)

# %% [markdown]
# ## Overlap of two boxes
#
# Many anchors lie near the same lesion, so many decoded boxes lie on top of each other. To thin them
# out we need a number for overlap. *Intersection over union* (IoU) is the area that both boxes cover,
# divided by the area that at least one of them covers:
#
# $$\operatorname{IoU}(b, b') = \frac{|b \cap b'|}{|b \cup b'|} = \frac{|b \cap b'|}{|b| + |b'| - |b \cap b'|}$$
#
# It is 0 for boxes that are apart and 1 for equal boxes. Enlarging the whole picture does not change
# it.

# %% tags=["fold"] mystnb={"image": {"alt": "Left: two overlapping boxes; the common area is hatched and the area of both together is shaded. Right: three pairs of boxes of equal size, shifted by less and less."}, "figure": {"caption": "Left: intersection (hatched) and union (all that is shaded) of two boxes. Right: what an IoU of 0.25, 0.5 and 0.75 looks like when two boxes of the same size are shifted sideways. Made-up boxes."}}
# @title Draw intersection, union, and three values of IoU
fig, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
ax = axes[0]
for x, y, colour, line in ((1, 1, BLUE, "-"), (3, 2, VERMILLION, "--")):
    ax.add_patch(Rectangle((x, y), 5, 4, fc="0.88", ec="none"))
    frame = Rectangle((x, y), 5, 4, fill=False, ec=colour, ls=line, lw=2)
    ax.add_patch(frame).set_zorder(3)
ax.add_patch(Rectangle((3, 2), 3, 3, fc="none", hatch="//", ec="0.4", lw=0, zorder=2))
white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
ax.text(4.5, 3.5, "both:\n9", ha="center", va="center", bbox=white, zorder=4)
ax.text(2, 2.6, "20", ha="center", color=BLUE)
ax.text(7, 4.8, "20", ha="center", color=VERMILLION)
ax.set_title("IoU = 9 / (20 + 20 - 9) = 0.29", fontsize=10)
ax.set(xlim=(0.5, 8.5), ylim=(6.5, 0.5), xlabel="x (pixels)", ylabel="y (pixels)")
ax = axes[1]
for row, value in enumerate((0.25, 0.5, 0.75)):
    shift = 4 * (1 - value) / (1 + value)  # boxes of width 4
    ax.add_patch(Rectangle((1, 2.5 * row + 0.5), 4, 1.8, fill=False, ec=BLUE, lw=2))
    moved = Rectangle((1 + shift, 2.5 * row + 0.5), 4, 1.8, fill=False, ls="--", lw=2)
    ax.add_patch(moved).set_edgecolor(VERMILLION)
    ax.text(8.2, 2.5 * row + 1.4, f"IoU {value}", va="center")
ax.set(xlim=(0.5, 10.2), ylim=(7.8, 0), xlabel="x (pixels)", ylabel="y (pixels)")
plt.show()


# %%
def iou(a, b):
    """Boxes [K, 4] and [n, 4] -> IoU of each pair [K, n]."""
    # [K, n, 2]: larger left and top
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    # smaller right and bottom
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clamp(min=0).prod(dim=2)  # [K, n]
    area_a = (a[:, 2:] - a[:, :2]).prod(dim=1)
    area_b = (b[:, 2:] - b[:, :2]).prod(dim=1)
    return both / (area_a[:, None] + area_b - both)


overlap = iou(truth["boxes"], anchors)  # [K, A]
theirs = torchvision.ops.box_iou(truth["boxes"], anchors)
assert torch.allclose(overlap, theirs, atol=1e-6)

# %% [markdown]
# ## Non-maximum suppression
#
# *Non-maximum suppression* (NMS) keeps one of several boxes on the same spot. Take the box with the
# best score and drop every box that overlaps it by more than a threshold. Then take the best of those
# that are left, and so on, until each box is either kept or dropped.


# %%
def nms(boxes, scores, threshold):
    """Boxes [n, 4] and scores [n] -> indices of those kept, best first."""
    order = scores.argsort(descending=True, stable=True)
    too_close = iou(boxes[order], boxes[order]) > threshold  # [n, n]
    keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
    for i in range(len(order)):
        if keep[i]:
            keep[i + 1 :] &= ~too_close[i, i + 1 :]
    return order[keep]


boxes, scores = torch.cat(boxes_of)[:1000], torch.cat(logits_of)[:1000]
theirs = torchvision.ops.nms(boxes, scores, 0.75)
assert torch.equal(nms(boxes, scores, 0.75), theirs)

# %% tags=["fold"] mystnb={"image": {"alt": "Three panels with the same five boxes A to E and their scores. In the second, A is bold and B and C are crossed out; in the third, D is bold as well and E is crossed out."}, "figure": {"caption": "NMS at a threshold of 0.5, step by step. A has the best score: it stays, and B and C, which overlap it by more than 0.5, go. The best box that is left is D: it stays, and E goes. Made-up boxes."}}
# @title Draw NMS step by step
toy = [[2, 2, 8, 8], [3, 2.5, 9, 8.5], [1.5, 3, 7, 9.5]]
toy = torch.tensor([*toy, [11, 6, 16, 12], [11.5, 5, 17, 11.5]])
toy_scores = torch.tensor([0.95, 0.90, 0.60, 0.80, 0.70])
assert nms(toy, toy_scores, 0.5).tolist() == [0, 3]
gone, stay = iou(toy, toy) > 0.5, []
fig, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained", sharey=True)
for ax, step in zip(axes, (None, 0, 3), strict=True):
    stay += [] if step is None else [step]
    for i, (x1, y1, x2, y2) in enumerate(toy.tolist()):
        kept, dropped = i in stay, any(gone[i, k] and i != k for k in stay)
        colour = GREEN if kept else "0.6" if dropped else BLACK
        look = {"ec": colour, "ls": ":" if dropped else "-", "lw": 3 if kept else 1.2}
        ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **look))
        at = [(2.3, 1.8), (6.2, 1.8), (1.2, 11.2), (11.2, 13.6), (13.2, 4.6)][i]
        text = f"{'ABCDE'[i]} {toy_scores[i]:.2f}" + (" ✗" if dropped else "")
        ax.text(*at, text, color="0.45" if dropped else colour, fontsize=10)
    ax.set(xlim=(0, 18), ylim=(15, 0), xlabel="x (pixels)")
    ax.set_title("all boxes" if step is None else f"keep {'ABCDE'[step]}", fontsize=10)
axes[0].set_ylabel("y (pixels)")
plt.show()

# %% [markdown]
# The paper's threshold, 0.75, is high: boxes may overlap a great deal before one has to go. That costs
# duplicates, and it spares neighbouring lesions. At 1 nothing would ever go; at 0.25 two lesions side
# by side may end up with one box. Exercise 4 tries several values on proposals, and [chapter
# 5](05_segmenter.ipynb) and [chapter 6](06_ranked_boxes.ipynb) come back to the threshold for detections
# and ranked boxes.
#
# ## From anchors to proposals
#
# Now we can turn thousands of boxes into proposals. Map by map, keep the best by objectness, cut them
# at the border of the slice, and apply NMS. Then merge the maps and keep the best again.


# %%
def clip(boxes):
    """Cut boxes [n, 4] at the border of the slice."""
    x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
    return torch.stack([x, y], dim=2).flatten(1)  # x1, y1, x2, y2 again


def filter_proposals(boxes_of, logits_of, most):
    """Decoded boxes and logits of each map -> proposals, best first."""
    boxes, logits = [], []
    for own, score in zip(boxes_of, logits_of, strict=True):
        best = score.topk(min(most, len(score))).indices
        own, score = clip(own[best]), score[best]
        kept = nms(own, score, config.rpn_nms)
        boxes.append(own[kept])
        logits.append(score[kept])
    boxes, logits = torch.cat(boxes), torch.cat(logits)
    order = logits.argsort(descending=True, stable=True)[:most]
    return boxes[order]


# %%
most = config.rpn_test_proposals
proposals = filter_proposals(boxes_of, logits_of, most)  # [P, 4]
with torch.no_grad():
    theirs, _ = detector.rpn(batch, features)
assert torch.allclose(proposals, theirs[0], atol=1e-3)
print(f"{len(anchors):,} anchors -> the best {most}", end=" ")
print(f"-> {len(proposals)} proposals")

# %% [markdown]
# There is no threshold on the score anywhere, so the RPN proposes boxes on every slice. And proposals
# have no class yet. How many of them does it take to reach every lesion? In the figure a lesion counts as
# reached when some proposal overlaps it by an IoU of at least 0.5.


# %% tags=["fold"]
# @title Draw the best proposals, more and more of them
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
    dpi=80,
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
# Where does the RPN look, and what does it do on a slice of a healthy person?

# %% tags=["fold"] mystnb={"image": {"alt": "Coarse heat maps of objectness over two synthetic slices: an old friend with lesions, and a control."}, "figure": {"caption": "Objectness, the best of the anchors at each cell of the finest map: our old friend with its true boxes (left), and a control without a lesion (right). Synthetic."}}
# @title Draw the objectness of two slices
control = make_slice(3, 0, size, position=0.5)[0]
fig, axes = plt.subplots(1, 2, figsize=(9, 4.1), layout="constrained")
HEAT = {"cmap": "magma", "vmin": 0, "vmax": 1, "alpha": 0.6}
both = (image, "old friend"), (control, "control")
for ax, (picture, name) in zip(axes, both, strict=True):
    with torch.no_grad():
        pixels = torch.from_numpy(picture).expand(3, -1, -1).to(device)
        prepared, _ = detector.transform([pixels])
        heat = detector.rpn.head(list(detector.backbone(prepared.tensors).values()))[0]
    best = heat[0][0].amax(dim=0).sigmoid().cpu()  # [h, w]
    plotting.show_slice(picture, ax).set_title(name, fontsize=10)
    drawn = ax.imshow(best, extent=edges, **HEAT)
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
draw_boxes(target["boxes"], axes[0], edgecolor="white", lw=1)
fig.colorbar(drawn, ax=axes, shrink=0.85).set_label("Sigmoid of the logit (no unit)")
plt.show()

# %% [markdown]
# In the run shown here, the RPN finds the lesions of our old friend, and some places without a lesion, too.
# The control has places of high objectness as well. To tell them from lesions is the task of the second
# stage, which looks more closely.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. A slice holds more lesions than usual. What changes in the outputs of the RPN?**
#
# - [ ] There are more anchors. :: Anchors depend on the size of the maps, not on what the slice shows.
# - [ ] Each cell gets more deltas. :: Every cell has four deltas for each of its anchors, always.
# - [x] More anchors get a high logit. :: The number of outputs is fixed; only their values change.
#
# **2. Two maps of a pyramid have strides 8 and 16. How do they differ?**
#
# - [x] The second has half as many rows and columns. :: Its cells are twice as far apart in the slice.
# - [ ] The second has twice as many channels. :: Not after the FPN, which gives all maps the same number.
# - [ ] The second belongs to a slice twice as large. :: Both belong to the same slice.
#
# **3. An anchor of 10 x 10 pixels has $\delta_x = 0.2$ and the other deltas are 0. What happens?**
#
# - [ ] The box grows by a fifth of its width. :: $\delta_w$ changes the width; $\delta_x$ moves the centre.
# - [x] The box moves two pixels to the right. :: A fifth of its width, which is ten pixels.
# - [ ] The box moves by 0.2 pixels to the right. :: Deltas are relative to the anchor, not pixels.
#
# **4. A box of 10 x 10 lies in the middle of one of 20 x 20. What is their IoU?**
#
# - [ ] 1, because the small box is covered completely. :: The union counts, too, and it is larger.
# - [ ] 0.5, because its sides are half as long. :: IoU compares areas, and areas go with the square.
# - [x] 0.25, because the common area is a quarter. :: 100 pixels of the 400 that the union covers.
#
# **5. You raise the threshold of NMS from 0.5 to 0.75. What do you expect?**
#
# - [x] More boxes, with more duplicates among them. :: Boxes may now overlap more before one goes.
# - [ ] Fewer boxes, because the rule is stricter. :: Only an overlap above the threshold drops a box.
# - [ ] The same boxes in another order. :: The order comes from the scores, but more boxes stay.
#
# **6. Why is there no threshold on objectness?**
#
# - [ ] Because logits cannot be compared with a number. :: They could; torchvision offers such a threshold.
# - [ ] Because NMS already removes all poor boxes. :: NMS removes duplicates; a poor box far from others stays.
# - [x] Because the second stage should judge the boxes. :: A lesion without a proposal is lost for good.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Decode by hand
#
# Kind: pencil, *
#
# An anchor has the corners (10, 20, 30, 60). The RPN gives it the deltas
# $(\delta_x, \delta_y, \delta_w, \delta_h) = (0.5, -0.25, \ln 2, 0)$. Work out the box on paper and let
# `my_box()` return its corners, as four numbers x1, y1, x2, y2.
#
# Hint: find the centre and the sides of the anchor first. Move the centre, then stretch the sides around
# the new centre.


# %% tags=["starter"]
def my_box():
    raise NotImplementedError("return your four numbers")


# %% tags=["solution"]
# @title Solution
def my_box():
    # centre (20, 40), sides 20 and 40
    x, y = 20 + 0.5 * 20, 40 - 0.25 * 40  # 30, 30
    w, h = 20 * 2, 40 * 1
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


# %% tags=["wrong"]
def my_box():
    return 20, 10, 60, 50  # stretches to the right alone


# %% tags=["wrong"]
def my_box():
    return 0.5, 9.75, 40.5, 49.75  # takes the shifts for pixels


# %% tags=["check"]
# @title Check your answer
given = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
by_machine = decode(given, torch.tensor([[0.5, -0.25, math.log(2), 0.0]]))[0]
mine = torch.tensor(my_box(), dtype=torch.float32)
assert mine.shape == (4,), "Return four numbers: x1, y1, x2, y2."
sides_agree = torch.allclose(mine[2:] - mine[:2], by_machine[2:] - by_machine[:2])
assert sides_agree, "The sides are not right: exp(ln 2) is 2, and exp(0) is 1."
assert torch.allclose(mine, by_machine), (
    "The sides are right, the place is not: shifts are shares of the anchor's "
    "sides, and the box grows on both sides of its centre."
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · A line among the anchors
#
# Kind: predict, then run, *
#
# Two anchors have no height. Predict, before you run anything: an anchor has height 0, and the RPN
# gives it a delta $\delta_h$. How high is the decoded box? Write `height_after(delta_h)`. Then look at
# the formula of IoU: how much can such a box overlap a lesion?
#
# Hint: of what is $h$ made in the formulas of decoding?


# %% tags=["starter"]
def height_after(delta_h):
    raise NotImplementedError("the height of the decoded box")


# %% tags=["solution"]
# @title Solution
def height_after(delta_h):
    return 0.0


line = cell[cell[:, 1] == cell[:, 3]]  # [2, 4]
moved = decode(line, torch.randn(len(line), 4, device=device))
print("heights after decoding:", (moved[:, 3] - moved[:, 1]).tolist())
print("best IoU with a lesion:", iou(truth["boxes"], moved).max().item())
every_logit = torch.cat(logits_of)
is_line = (cell[:, 1] == cell[:, 3]).repeat(len(anchors) // len(cell))
rank = int((every_logit > every_logit[is_line].max()).sum()) + 1
print(f"the best line has rank {rank:,} of {len(anchors):,} anchors")


# %% tags=["wrong"]
def height_after(delta_h):
    return math.exp(delta_h)  # forgets the factor h_a


# %% tags=["wrong"]
def height_after(delta_h):
    return delta_h  # adds instead of multiplying


# %% tags=["check"]
# @title Check your answer
flat = torch.tensor([[0.0, 5.0, 6.0, 5.0]])  # 6 wide, no height
for delta_h in (-1.0, 0.0, 2.0):
    after = decode(flat, torch.tensor([[0.0, 0.0, 0.0, delta_h]]))[0]
    assert abs(height_after(delta_h) - float(after[3] - after[1])) < 1e-6, (
        f"Not for a delta of {delta_h}: decode an anchor of height 0 with it, and "
        "compare y1 and y2 of the box."
    )

# %% [markdown] tags=["answer"]
# A line stays a line, and its IoU with anything is 0, so no lesion is ever assigned to it. torchvision
# drops proposals with a side below 0.001 pixels. The released code drops none (`rpn.min_size = 0`), and
# so does our detector, so a line with a good logit would take the place of a proper proposal. The
# trained RPN gives lines low logits: when we ran it, the best of them had rank 577 of 7,680. [Paper v code](paper_v_code.ipynb) has more on this.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The order of the axes
#
# Kind: find the bug, **
#
# A colleague flattens the logits of a map, [a, h, w], into a list. The list has the right length, and
# nothing crashes. But `anchors` runs over rows, then columns, then the anchors of a cell. Repair the
# function.
#
# Hint: in a flattened tensor, the last axis runs fastest.


# %% tags=["starter"]
def flat_logits(logits):
    """[a, h, w] -> [h * w * a], in the order of `anchors`."""
    return logits.reshape(-1)


# %% tags=["solution"]
# @title Solution
def flat_logits(logits):
    """[a, h, w] -> [h * w * a], in the order of `anchors`."""
    return logits.permute(1, 2, 0).reshape(-1)


# %% tags=["wrong"]
def flat_logits(logits):
    return logits.permute(2, 1, 0).reshape(-1)  # columns before rows


# %% tags=["wrong"]
def flat_logits(logits):
    return logits.reshape(-1, len(logits)).reshape(-1)  # reshaping moves nothing


# %% tags=["check"]
# @title Check your answer
numbered = torch.arange(24).reshape(2, 3, 4)  # two anchors, three rows, four columns
mine = flat_logits(numbered)
assert mine.shape == (24,), "One entry for each anchor of each cell."
assert mine[:2].tolist() == numbered[:, 0, 0].tolist(), (
    "The first entries should be the anchors of the first cell, logits[:, 0, 0]."
)
assert mine[2:4].tolist() == numbered[:, 0, 1].tolist(), (
    "After the first cell comes its right neighbour, logits[:, 0, 1]: "
    "go through the columns before you go to the next row."
)
real_map = flat_logits(their_logits[0][0])
assert torch.allclose(real_map, logits_of[0], atol=1e-5), (
    "Right on a small map, but not on that of our old friend. Is it made for any size?"
)

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · The threshold of NMS
#
# Kind: write a function, **
#
# Write `kept_and_reached(boxes, logits, lesions, threshold)`. It applies NMS to boxes [n, 4] with logits
# [n], and returns two whole numbers: how many boxes are left, and how many of the lesions [K, 4] overlap
# at least one of them by an IoU of 0.5 or more. Then try thresholds of 0.1, 0.25, 0.5, 0.75 and 0.95 on our
# old friend: on its `most` best decoded boxes, after `clip`.
#
# Hint: `iou(lesions, kept)` has one row for each lesion. `torch.cat(boxes_of)` holds all decoded boxes.


# %% tags=["starter"]
def kept_and_reached(boxes, logits, lesions, threshold):
    raise NotImplementedError("NMS, then count")


# %% tags=["solution"]
# @title Solution
def kept_and_reached(boxes, logits, lesions, threshold):
    kept = boxes[nms(boxes, logits, threshold)]
    reached = iou(lesions, kept).amax(dim=1) >= 0.5
    return len(kept), int(reached.sum())


every_logit = torch.cat(logits_of)
top = every_logit.topk(min(most, len(every_logit))).indices
candidates = clip(torch.cat(boxes_of)[top])
for threshold in (0.1, 0.25, 0.5, 0.75, 0.95):
    inputs = candidates, every_logit[top], truth["boxes"]
    left, reached = kept_and_reached(*inputs, threshold)
    print(f"threshold {threshold:4}: {left:4} boxes,", end=" ")
    print(f"{reached} of {len(truth['boxes'])} lesions")


# %% tags=["wrong"]
def kept_and_reached(boxes, logits, lesions, threshold):
    kept = boxes[nms(boxes, logits, threshold)]
    reached = iou(lesions, kept).amax(dim=0) >= 0.5  # counts boxes, not lesions
    return len(kept), int(reached.sum())


# %% tags=["wrong"]
def kept_and_reached(boxes, logits, lesions, threshold):
    kept = boxes[nms(boxes, logits, threshold)]
    reached = iou(lesions, kept).amax(dim=1) >= threshold  # the wrong threshold
    return len(kept), int(reached.sum())


# %% tags=["check"]
# @title Check your answer
made_up = [[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 9], [40, 40, 50, 50]]
made_up = torch.tensor(made_up).float()
lesion_boxes = torch.tensor([[0, 0, 10, 6], [70, 70, 80, 80.0]])
strengths = torch.tensor([3.0, 2.0, 1.0, 0.0])
left, reached = kept_and_reached(made_up, strengths, lesion_boxes, 0.7)
assert left == 2, "At 0.7, the second and the third box overlap the first too much."
assert reached == 1, "One of the two lesions is reached. Did you count boxes?"
left, reached = kept_and_reached(made_up, strengths, lesion_boxes, 0.95)
assert left == 4, "At 0.95 no box has to go."
assert reached == 1, (
    "Count each lesion once, and call it reached from an IoU of 0.5, whatever the "
    "threshold of NMS is."
)

# %% [markdown] tags=["answer"]
# A low threshold leaves few boxes. On other slices it may also lose a lesion, for example a
# consolidation inside a GGO, or the better fitting of two boxes when the other has the better logit.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Three boxes
#
# Kind: pencil, ***
#
# "A lower threshold of NMS keeps fewer boxes, so all that it keeps, a higher threshold keeps, too." The
# second half is wrong. Find three boxes and three scores for which NMS at 0.5 keeps a box that NMS at
# 0.75 drops. `three_boxes()` returns boxes [3, 4] and scores [3].
#
# Hint: only a box that is kept itself can drop another. Let the middle box decide; boxes of one size that are
# shifted sideways are enough. A shift by a share $d$ of the width gives an IoU of $(1-d)/(1+d)$.


# %% tags=["starter"]
def three_boxes():
    raise NotImplementedError("return boxes [3, 4] and scores [3]")


# %% tags=["solution"]
# @title Solution
def three_boxes():
    # A-B: 0.6, B-C: 0.78, A-C: 0.46
    shifts = torch.tensor([0.0, 25.0, 37.0])
    boxes = torch.tensor([[0.0, 0.0, 100.0, 100.0]]).repeat(3, 1)
    boxes[:, 0] += shifts
    boxes[:, 2] += shifts
    return boxes, torch.tensor([0.9, 0.8, 0.7])


# %% tags=["wrong"]
def three_boxes():
    boxes = torch.tensor([[0.0, 0, 100, 100], [30, 0, 130, 100], [60, 0, 160, 100]])
    return boxes, torch.tensor([0.9, 0.8, 0.7])  # the third is never dropped


# %% tags=["wrong"]
def three_boxes():
    boxes = torch.tensor([[0.0, 0, 100, 100], [25, 0, 125, 100], [37, 0, 137, 100]])
    return boxes, torch.tensor([0.9, 0.7, 0.8])  # the third comes before the middle one


# %% tags=["check"]
# @title Check your answer
mine, my_scores = three_boxes()
assert mine.shape == (3, 4), "Return three boxes of four numbers each."
assert my_scores.shape == (3,), "Return one score for each of the three boxes."
at_low = set(torchvision.ops.nms(mine.float(), my_scores.float(), 0.5).tolist())
at_high = set(torchvision.ops.nms(mine.float(), my_scores.float(), 0.75).tolist())
assert at_low - at_high, (
    f"At 0.5 your boxes {sorted(at_low)} stay, at 0.75 {sorted(at_high)}. Choose the "
    "overlaps so that the first box drops the second at 0.5 alone, and the second "
    "drops the third at 0.75."
)

# %% [markdown] tags=["answer"]
# At 0.5 the first box drops the second, so nobody is left to drop the third. At 0.75 the second stays and
# drops the third. A change of the threshold can therefore both add boxes to the list and take some away.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · Anchors that fit the lesions
#
# Kind: experiment, **
#
# The cell below draws ten COVID-19 phantoms. `share_reached(sizes)` tells for which share of their lesions
# the best anchor has an IoU of at least 0.6. Find sizes, six at most, that reach more lesions than those of
# the paper, and let `my_sizes()` return them.
#
# Hint: look at the sizes of the lesions first, and at the gaps between the sizes of the paper.

# %% tags=["fold"]
# @title Draw ten phantoms and measure how well anchors fit
codes = [make_slice(seed, 2, size)[1] for seed in range(5000, 5010)]
found = [mask_to_targets(m, config.lesions, preset.min_area) for m in codes]
true_boxes = torch.cat([one["boxes"] for one in found]).to(device)  # [K, 4]


def share_reached(sizes):
    """The share of lesions whose best anchor has an IoU of at least 0.6."""
    own = cell_anchors(sizes, config.anchor_ratios).to(device)
    shapes = zip(maps, strides, strict=True)
    grids = [grid_anchors(own, *level.shape[-2:], stride) for level, stride in shapes]
    return float((iou(true_boxes, torch.cat(grids)).amax(dim=1) >= 0.6).float().mean())


print(f"sizes {config.anchor_sizes}: {share_reached(config.anchor_sizes):.0%}", end=" ")
print(f"of {len(true_boxes)} lesions")


# %% tags=["starter"]
def my_sizes():
    raise NotImplementedError("return up to six sizes, in pixels")


# %% tags=["solution"]
# @title Solution
def my_sizes():
    return (6, 8, 11, 16, 22, 32)


for sizes in ((2, 4), (8, 16, 32), (32, 64, 128), my_sizes()):
    share = share_reached(sizes)
    print(f"sizes {str(sizes):22}: {share:4.0%} of {len(true_boxes)} lesions")


# %% tags=["wrong"]
def my_sizes():
    return (2, 4)


# %% tags=["wrong"]
def my_sizes():
    return (32, 64, 128)


# %% tags=["check"]
# @title Check your answer
assert len(my_sizes()) <= 6, "Six sizes at most: each costs six anchors at every cell."
assert share_reached(my_sizes()) > share_reached(config.anchor_sizes), (
    "The paper's sizes reach at least as many. Are your steps finer than theirs where "
    "most lesions are?"
)

# %% [markdown] tags=["answer"]
# Leaving out sizes 2 and 4 shows what they add here, and finer steps show what is missing. Ratios and the
# stride set limits, too: where cells are eight pixels apart, a small lesion may lie between two of them.
# Lesions below the threshold are not lost; [chapter 4](04_losses.ipynb) has a rule for them.

# %% [markdown] tags=["exercise"]
# ### Exercise 7 · What one anchor sees
#
# Kind: experiment, ***
#
# Take the anchor with the best objectness on our old friend, and compute the gradient of its logit
# with respect to the slice. Which pixels can change the logit at all? Draw the answer. Then count
# the cells of the finest feature map that reach it.
#
# Hint: `friend.clone().requires_grad_(True)` goes through `detector.transform`, the backbone and
# `rpn_outputs`; then `torch.autograd.grad`.

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
draw_boxes(anchors[best][None], ax, edgecolor="white", lw=1.5)
ax.figure.colorbar(drawn, ax=ax).set_label("Gradient (share of the largest)")
share = (strength > 0).float().mean()
ax.set_title(f"{cells} cells and {share:.0%} of the pixels reach it")
ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
plt.show()

# %% [markdown] tags=["answer"]
# The 3x3 convolution of the RPN reads at most nine cells. But those nine see much more of the slice
# than the anchor covers, and the surroundings can help to tell a lesion from a vessel.

# %% [markdown]
# ## What we learned
#
# 1. Boxes with scores name candidates on every slice, also where a good map would be empty.
# 2. A pyramid of feature maps combines fine detail with wide context; one cell is one stride wide.
# 3. Anchors turn "how many lesions, and where?" into thousands of yes-or-no questions with corrections.
# 4. Deltas are relative to the anchor; decoding turns them into a box.
# 5. IoU measures overlap, and NMS keeps the best of the boxes that overlap too much.
#
# ## Further reading
#
# - {cite:t}`Ren2015` introduce anchors and the RPN.
# - {cite:t}`Lin2017` build the feature pyramid, {cite:t}`He2016` the backbone under it.
# - {cite:t}`TerSarkisov2020` set the anchors and thresholds used here, in section 3.1;
#   [paper v code](paper_v_code.ipynb) lists where the released code differs.
# - [Chapter 3](03_roi_heads.ipynb) looks into the proposals, and [chapter 4](04_losses.ipynb) trains all.
