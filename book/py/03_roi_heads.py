# %% [markdown]
# # 3 · RoI heads
#
# The region proposal network has said where to look: "there may be something in this box". **What is
# it, where exactly does it end, and which pixels belong to it?** Two small networks answer, the box head
# and the mask head, and both read the same feature maps through a window that fits the box at hand. We
# build them from plain tensors and compare each with the trained detector.

# %% tags=["fold"] mystnb={"image": {"alt": "Three close-ups of the same place in a synthetic slice: a dotted box around a bright region; a corrected box with class and score; the outline of a mask inside the box."}, "figure": {"caption": "From a proposal to a detection, on our old friend: the proposal (dotted, left); class, score and corrected box (solid, middle); the pixels of the mask (right). This chapter takes these three steps. Synthetic."}}
# @title Imports, versions, and one proposal on its way
import math
import platform

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.patches import Rectangle

import covidmask
from covidmask import plotting
from covidmask.config import LESION_CLASSES, PRESETS
from covidmask.datasets import make_slice, mask_to_targets, old_friend
from covidmask.models import trained_segmenter
from covidmask.plotting import BLACK, BLUE, GREEN, SKY_BLUE, VERMILLION

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
    detector = trained_segmenter("quick", shipped=True)
    image, _ = old_friend(PRESETS["quick"].phantoms.size)
    pixels = [torch.from_numpy(image).expand(3, -1, -1)]
    with torch.no_grad():
        found = detector(pixels)[0]
        batch, _ = detector.transform(pixels)
        maps, heads = detector.backbone(batch.tensors), detector.roi_heads
        boxes, _ = detector.rpn(batch, maps)
        pooled = heads.box_roi_pool(maps, boxes, batch.image_sizes)
        _, deltas = heads.box_predictor(heads.box_head(pooled))
    decoded = heads.box_coder.decode(deltas, boxes)  # [P, L, 4]
    sure = {key: value[found["scores"] > 0.9] for key, value in found.items()}
    away = (decoded[:, sure["labels"]] - sure["boxes"]).abs().sum(dim=2)  # [P, D]
    proposals = boxes[0][away.argmin(dim=0)]  # where each came from
    fit = torchvision.ops.box_iou(proposals, sure["boxes"]).diagonal()
    most = int(fit.argmin())  # the one with the largest correction
    proposal, best = proposals[most], {key: value[most] for key, value in sure.items()}
    _, axes = plt.subplots(1, 3, figsize=(9, 3.5), layout="constrained", sharey=True)
    x1, y1, x2, y2 = best["boxes"].tolist()
    for ax in axes:
        plotting.show_slice(image, ax).set(xlim=(x1 - 12, x2 + 12), ylabel="")
        ax.set_ylim(y2 + 12, y1 - 12)
    axes[0].set_ylabel("y (pixels)")
    colour = plotting.LESION_COLOURS[best["labels"] - 1]
    for ax in axes[:2]:
        draw_boxes(proposal[None], ax, edgecolor=GREEN, ls=":", lw=2.5)
    draw_boxes(best["boxes"][None], axes[1], edgecolor=colour, lw=2)
    axes[2].contour(best["masks"][0] > 0.5, [0.5], colors=[colour], linewidths=2)
    name = LESION_CLASSES["both"][best["labels"] - 1]
    titles = ("proposal", f"{name}, score {best['scores']:.2f}", "mask")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10)
    plt.show()


opening()

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0

# %% [markdown]
# **After it you can**
#
# - write RoIAlign in a few lines, and say why it does not round;
# - turn a proposal and its four encoded deltas into a box, and back;
# - follow a lesion from a proposal to a box, a class, a score and a mask;
# - say what the detector returns for a slice without a lesion.
#
# **You need** proposals, IoU and NMS ([chapter 2](02_region_proposals.ipynb)). The chapter runs alone.
#
# **Time:** reading 25 min, exercises 60 min, running 1 min.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice here is a *phantom*, made by formulas and random numbers. No number below is a result on
# patients, and nothing here is for diagnosis.
# ```
#
# ## What comes in
#
# The first stage hands over two things: feature maps, and the corners of the proposals, best first.

# %%
preset = PRESETS[PRESET]
config, size = preset.detector, preset.phantoms.size
names = ("background", *LESION_CLASSES[config.lesions])  # class 0, 1, 2
image, mask = old_friend(size)
target = mask_to_targets(mask, config.lesions, preset.min_area)
friend = torch.from_numpy(image).expand(3, -1, -1).to(device)

detector = trained_segmenter(PRESET, device, shipped=True)
heads = detector.roi_heads
with torch.no_grad():
    batch, _ = detector.transform([friend])
    features = detector.backbone(batch.tensors)
    proposals = detector.rpn(batch, features)[0][0]  # [P, 4]
maps = list(features.values())  # [1, c, h, w] each, the finest first
height, width = batch.image_sizes[0]
strides = [height // level.shape[-2] for level in maps]
print(f"{len(proposals)} proposals, strides {strides},", end=" ")
print(f"{maps[0].shape[1]} channels")

# %% [markdown]
# ## RoIAlign: a window of fixed size
#
# A proposal that the second stage looks at is called a *region of interest* (RoI). The layers behind it
# need inputs of one size, but RoIs come in all sizes, with corners at fractions of a pixel. RoIAlign
# {cite:p}`He2017` cuts a grid of $7 \times 7$ numbers per channel out of the feature map:
#
# 1. divide the box by the stride: it now lies on the map, at fractions of a cell;
# 2. divide it into $7 \times 7$ bins;
# 3. take $2 \times 2$ sampling points in each bin (the *sampling ratio* is 2);
# 4. read the map at each point by bilinear interpolation;
# 5. average the four points of a bin.
#
# Bilinear interpolation weights the four cells around a point by how near they are. With the
# fractions $f_x, f_y$ of the way from the left to the right cell and from the top to the bottom one:
#
# $$v = (1-f_y)(1-f_x)\,v_{00} + (1-f_y)f_x\,v_{01} + f_y(1-f_x)\,v_{10} + f_y f_x\,v_{11}$$
#
# We try it at one point of a small map whose values we can read.

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
# Now all points at once. The points of all bins together form one regular grid, so it is enough to know
# its rows and its columns. Two details are torchvision's: a RoI is at least one cell wide and high, and
# the value of cell $j$ sits at $j$, not at $j + \tfrac12$, as in the grid of anchors.


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


# %%
def roi_align(feature, box, bins, stride=1, ratio=2):
    """Cut one box [4] (pixels) out of a map [c, h, w]: [c, bins, bins]."""
    x1, y1, x2, y2 = box / stride  # cells
    w, h = (x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1)
    points = bins * ratio  # in a row, and in a column
    steps = (torch.arange(points, device=box.device) + 0.5) / points
    values = bilinear(feature, y1 + steps * h, x1 + steps * w)
    return F.avg_pool2d(values, ratio)  # [c, bins, bins]


roi = torch.tensor([1.2, 0.9, 6.4, 5.5])
ours = roi_align(small, roi, bins=2)  # [1, 2, 2]
theirs = torchvision.ops.roi_align(small[None], [roi[None]], 2, 1, 2)
assert torch.allclose(ours, theirs[0], atol=1e-5)

# %% tags=["fold"] mystnb={"image": {"alt": "A grid of 8 by 8 numbers with a box at fractions of a cell, divided into four bins with four points each; beside it the 2 by 2 result."}, "figure": {"caption": "RoIAlign on a small map. The box (solid) is not moved to whole cells. Each of its 2 x 2 bins (dashed) holds 2 x 2 sampling points; each point reads the four cells around it; the mean of the points is the output on the right. A made-up map, no data."}}
# @title Draw the box, its bins and its sampling points
options = {"layout": "constrained", "width_ratios": [2, 1]}
fig, axes = plt.subplots(1, 2, figsize=(8.5, 4.6), **options)
for ax, values in zip(axes, (small[0], ours[0]), strict=True):
    ax.imshow(values, cmap="Blues", vmin=0, vmax=14)
    for (i, j), v in np.ndenumerate(values.numpy()):
        style = {"ha": "center", "va": "center", "color": "0.35"}
        ax.text(j, i, f"{v:.3g}", fontsize=9, **style)
x1, y1, x2, y2 = roi.tolist()
axes[0].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=BLACK, lw=2))
axes[0].hlines((y1 + y2) / 2, x1, x2, color=BLACK, ls="--")
axes[0].vlines((x1 + x2) / 2, y1, y2, color=BLACK, ls="--")
steps = (np.arange(4) + 0.5) / 4
grid = np.meshgrid(x1 + steps * (x2 - x1), y1 + steps * (y2 - y1))
axes[0].plot(*map(np.ravel, grid), "o", color=VERMILLION, ms=5)
axes[0].set(xlabel="Column (cells)", ylabel="Row (cells)", title="map, box and points")
axes[1].set(xlabel="Bin (count)", ylabel="Bin (count)", title="output")
axes[1].set(xticks=[0, 1], yticks=[0, 1])
plt.show()

# %% [markdown]
# With several maps, large RoIs read a coarse one {cite:p}`Lin2017`: level
# $k = \lfloor 4 + \log_2(\sqrt{wh}/224) \rfloor$, where level 2 has stride 4. A box with $\sqrt{wh}$ below
# 112 pixels reads the finest of the paper's four maps, and most lesions are smaller. With a single map,
# as in `quick`, there is no choice.


# %%
def level_of(box):
    """Index of the map that a box [4] reads, 0 for the finest."""
    side = (box[2:] - box[:2]).prod().sqrt()
    k = math.floor(4 + math.log2(max(side.item(), 1e-6) / 224) + 1e-6)
    return min(max(k - int(math.log2(strides[0])), 0), len(strides) - 1)


with torch.no_grad():
    # [P, c, 7, 7]
    pooled = heads.box_roi_pool(features, [proposals], batch.image_sizes)
for box, theirs in zip(proposals, pooled, strict=True):
    level = level_of(box)
    ours = roi_align(maps[level][0], box, 7, strides[level])
    assert torch.allclose(ours, theirs, atol=1e-3)

# %% [markdown]
# Why so much care about fractions? An older operation, RoIPool, rounds box and bins to whole cells and
# takes the maximum in each bin. A cell is several pixels wide, and a lesion may be as small as a single
# cell. Let us move the best proposal to the right, a quarter of a pixel at a time. RoIAlign follows every
# step, whereas RoIPool does nothing for a while and then jumps.

# %% tags=["fold"] mystnb={"image": {"alt": "Relative change of the pooled features against the shift of the box: a continuous curve for RoIAlign, a staircase for RoIPool."}, "figure": {"caption": "How the features of one RoI change as its box moves by up to two cells, relative to where it began. Rounding hides a small shift or turns it into a jump; box corrections and masks need the shift itself. Synthetic."}}
# @title Draw what a small shift does to RoIAlign and RoIPool
first = level_of(proposals[0])
level, stride_here = maps[first], strides[first]
shifts = np.arange(0, 2 * stride_here + 0.01, 0.25)
moved = proposals[0].repeat(len(shifts), 1)
moved[:, 0::2] += torch.from_numpy(shifts[:, None]).to(moved)
scale = 1 / stride_here
curves = {
    "RoIAlign": torchvision.ops.roi_align(level, [moved], 7, scale, 2),
    "RoIPool": torchvision.ops.roi_pool(level, [moved], 7, scale),
}
looks = ((BLUE, "-", "default"), (VERMILLION, "--", "steps-mid"))
ax = plotting.get_ax(7, 3.6)
for (name, values), look in zip(curves.items(), looks, strict=True):
    colour, line, style = look
    values = values.flatten(1)
    change = (100 * (values - values[0]).norm(dim=1) / values[0].norm()).cpu()
    ax.plot(shifts, change, color=colour, ls=line, drawstyle=style, label=name)
ax.set_xlabel("Shift of the box (pixels)")
ax.set_ylabel("Change of its features (%)")
ax.legend()
plt.show()

# %% [markdown]
# ## The box head: which class, and which correction?
#
# Two hidden layers read the $c \times 7 \times 7$ numbers of a RoI as one vector. Then two linear
# layers run side by side. One gives a logit for each class, background included. The other gives four
# deltas *for each class*, because a GGO and a consolidation in the same place need not have the same
# size.

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
# ### Encoded deltas
#
# What the second layer returns are *encoded* deltas $\delta_x, \delta_y, \delta_w, \delta_h$. They
# describe the box relative to its proposal, whose centre is $(x_p, y_p)$ and whose sides are $w_p, h_p$:
#
# $$x = x_p + \tfrac{\delta_x}{10}\, w_p, \quad y = y_p + \tfrac{\delta_y}{10}\, h_p, \quad w = w_p\, e^{\delta_w / 5}, \quad h = h_p\, e^{\delta_h / 5}.$$
#
# The RPN decodes in the same way but without the weights 10, 10, 5, 5. They are here because the RPN has
# already corrected the anchor, so that only small corrections are left. Multiplied by 10 and 5, the
# numbers to learn are of a size around 1, and their loss is not drowned by the others.

# %%
WEIGHTS = torch.tensor([10.0, 10.0, 5.0, 5.0], device=device)


def decode(proposals, encoded):
    """Proposals [n, 4] and encoded deltas [n, 4] -> boxes [n, 4]."""
    sides = proposals[:, 2:] - proposals[:, :2]  # [n, 2]: w, h
    centre = proposals[:, :2] + 0.5 * sides
    shift, stretch = (encoded / WEIGHTS).split(2, dim=1)
    centre = centre + shift * sides
    sides = sides * stretch.clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centre - 0.5 * sides, centre + 0.5 * sides], dim=1)


deltas_of = box_deltas.reshape(len(proposals), -1, 4)  # [P, L, 4]
theirs = heads.box_coder.decode(box_deltas, [proposals])  # [P, L, 4]
for label in range(len(names)):
    ours = decode(proposals, deltas_of[:, label])
    assert torch.allclose(ours, theirs[:, label], atol=1e-2)

# %% tags=["fold"] mystnb={"image": {"alt": "Two panels, each with a dotted proposal and a solid box to its lower right. Four arrows mark the shift of the centre to the right and down, and the growth of the width and of the height."}, "figure": {"caption": "The same four encoded deltas on a small proposal (left) and on one twice as large (right): dotted the proposal, solid the box. The arrows dx and dy move the centre (dashed: the proposal, moved); dw and dh stretch the sides on both ends. All four arrows double with the proposal. Made-up boxes."}}
# @title Draw the four deltas as arrows
encoded = torch.tensor([[4.0, 2.5, 1.5, 2.5]], device=device)
fig, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained", sharey=True)
for ax, factor in zip(axes, (1, 2), strict=True):
    proposal = torch.tensor([[4.0, 4.0, 20.0, 16.0]], device=device) * factor
    box = decode(proposal, encoded)
    draw_boxes(proposal, ax, edgecolor=GREEN, ls=":", lw=2.2)
    moved = decode(proposal, encoded * torch.tensor([1, 1, 0, 0], device=device))
    draw_boxes(moved, ax, edgecolor="0.6", ls="--", lw=1)
    draw_boxes(box, ax, edgecolor=BLUE, lw=2.2)
    px1, py1, px2, py2 = proposal[0].tolist()
    x1, y1, x2, y2 = box[0].tolist()
    px, py, x, y = (px1 + px2) / 2, (py1 + py2) / 2, (x1 + x2) / 2, (y1 + y2) / 2
    half_w, half_h = (px2 - px1) / 2, (py2 - py1) / 2
    for text, start, end, at in (
        ("dx", (px, py), (x, py), ((px + x) / 2, py - 1)),
        ("dy", (x, py), (x, y), (x + 1, (py + y) / 2 + 1)),
        ("dw", (x + half_w, y + 3), (x2, y + 3), (x2 + 1, y + 3.8)),
        ("dw", (x - half_w, y + 3), (x1, y + 3), None),
        ("dh", (x - 4, y + half_h), (x - 4, y2), (x - 3, y2 - 1)),
        ("dh", (x - 4, y - half_h), (x - 4, y1), None),
    ):
        colour = VERMILLION if text in ("dx", "dy") else BLACK
        lines = {"arrowstyle": "-|>", "color": colour, "lw": 1.8}
        lines |= {"shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end, start, arrowprops=lines)
        if at:
            ax.text(*at, text, color=colour, fontsize=11)
    ax.plot(px, py, "o", color=GREEN, ms=5)
    ax.plot(x, y, "s", color=BLUE, ms=5)
    values = ", ".join(f"{value:.1f}" for value in encoded[0].tolist())
    sides = f"proposal {px2 - px1:.0f} x {py2 - py1:.0f}"
    ax.set_title(f"{sides}: dx, dy, dw, dh =\n{values}", fontsize=10)
    ax.set(xlim=(0, 66), ylim=(50, 0), xlabel="x (pixels)", aspect="equal")
axes[0].set_ylabel("y (pixels)")
plt.show()

# %% [markdown]
# Encoding has consequences for the whole book, since these four numbers, together with a score, are one
# row of the vector that the classifier reads ([chapter 6](06_ranked_boxes.ipynb)). They have no unit, so
# small and large lesions share one scale. They are near 0 where the proposal was already right. And they
# say nothing about where in the slice the proposal lies, or how large it is; exercise 2 looks at that.
#
# ### From scores to detections
#
# A softmax over the classes turns the logits of a RoI into scores, and background is dropped. For each
# class, scores must exceed a threshold, and NMS runs. The objectness of the RPN plays no part any more;
# its job was to choose the proposals.

# %%
scores = class_logits.softmax(dim=1)  # [P, L]
found = []
for label in range(1, len(names)):
    score, boxes = scores[:, label], decode(proposals, deltas_of[:, label])
    boxes = torchvision.ops.clip_boxes_to_image(boxes, (height, width))
    # torchvision's smallest side
    wide = ((boxes[:, 2:] - boxes[:, :2]) >= 0.01).all(dim=1)
    index = torch.where((score > config.box_score) & wide)[0]
    kept = torchvision.ops.nms(boxes[index], score[index], config.box_nms)
    found += [(score[i], label, boxes[i], i) for i in index[kept]]
found = sorted(found, key=lambda entry: -entry[0])
found = found[: config.box_detections]
print(f"{len(proposals)} proposals -> {len(found)} detections", end=" ")
print(f"with a score above {config.box_score}")

# %%
with torch.no_grad():
    detections = detector([friend])[0]
score, label, boxes, _ = zip(*found, strict=True)
assert list(label) == detections["labels"].tolist()
assert torch.allclose(torch.stack(score), detections["scores"], atol=1e-4)
assert torch.allclose(torch.stack(boxes), detections["boxes"], atol=1e-2)

# %% tags=["fold"] mystnb={"image": {"alt": "The synthetic slice twice: on the left the proposals of the best detections, dotted, and the boxes they became; on the right the final detections with their scores and masks."}, "figure": {"caption": "Left: proposals (dotted) and the boxes that the box head made of them (solid GGO, dashed C), for detections with a score above 0.5. Right: the same with scores and masks, thinned by NMS at 0.25 to make them readable. Synthetic."}}
# @title Draw proposals, corrected boxes and detections
fig, axes = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
plotting.show_slice(image, axes[0])
for score, label, box, i in found:
    if score > 0.5:
        draw_boxes(proposals[i][None], axes[0], edgecolor=GREEN, ls=":", lw=1.6)
        look = plotting.LESION_COLOURS[label - 1], plotting.LESION_LINES[label - 1]
        draw_boxes(box[None], axes[0], edgecolor=look[0], ls=look[1])
axes[0].set_title("proposal, then corrected box")
columns = [detections[key] for key in ("boxes", "scores", "labels")]
few = torchvision.ops.batched_nms(*columns, 0.25)
few = {name: value[few] for name, value in detections.items()}
options = {"classes": names[1:], "score_threshold": 0.5}
plotting.show_lesions(image, few, axes[1], **options).set_title("detections")
plt.show()

# %% [markdown]
# Each stage should bring the boxes nearer to the lesions. For each lesion, the table has the best IoU
# with any proposal and with any detection.

# %% tags=["fold"]
# @title Print the best IoU of each lesion at two stages
best_of = [
    torchvision.ops.box_iou(target["boxes"], boxes.cpu()).amax(dim=1).tolist()
    for boxes in (proposals, detections["boxes"])
]
print("best IoU     proposal  detection   (one phantom)")
columns = target["labels"], target["area"], *best_of
for label, area, *values in zip(*columns, strict=True):
    line = "".join(f"{value:10.2f}" for value in values)
    print(f"{names[label]:3} {area:4.0f} px {line}")

# %% [markdown]
# Where a number falls, a better box was there and got lost: a neighbour with a better score suppressed
# it, or a correction overshot. And "best" is generous, since it takes the truth to pick the box. Whether
# the *scores* pick the right boxes is what average precision measures, in [chapter 5](05_segmenter.ipynb).
#
# ## The mask head: which pixels?
#
# A second RoIAlign cuts $14 \times 14$ numbers out of the map, now for the *detected* boxes. One
# convolution (in the light models; four in the paper's ResNet-50) and a transposed convolution, which
# doubles the resolution, lead to $28 \times 28$ logits for each class. We use the mask of the detected
# class and ignore the others, so the mask head does not decide the class; it only draws the shape.

# %% tags=["nbval-check-output"]
with torch.no_grad():
    # [D, c, 14, 14]
    boxes = [detections["boxes"]]
    x = cut = heads.mask_roi_pool(features, boxes, batch.image_sizes)
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
print(f"one RoI: {tuple(cut.shape[1:])} -> {tuple(mask_logits.shape[1:])}")

# %% [markdown]
# ### Back into the slice
#
# A mask of $28 \times 28$ must be stretched over its box. torchvision first surrounds it with one row of
# zeros on each side and enlarges the box by as much, so that the mask may fade out across the border.
# Then the box is cut to whole pixels, and the mask is resized into it.


# %%
def paste(probability, box):
    """A mask [28, 28] and its box [4] -> [H, W], 0 outside the box."""
    padded = F.pad(probability, (1, 1, 1, 1))[None, None]  # [1, 1, 30, 30]
    centre = (box[:2] + box[2:]) / 2
    half = (box[2:] - box[:2]) / 2 * padded.shape[-1] / len(probability)
    # towards 0
    corners = torch.cat([centre - half, centre + half])
    x1, y1, x2, y2 = corners.long().tolist()
    h, w = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    resized = F.interpolate(padded, size=(h, w), mode="bilinear")[0, 0]
    canvas = probability.new_zeros(height, width)
    left, top = max(x1, 0), max(y1, 0)
    right, bottom = min(x2 + 1, width), min(y2 + 1, height)
    inside = resized[top - y1 : bottom - y1, left - x1 : right - x1]
    canvas[top:bottom, left:right] = inside
    return canvas


# %%
each = torch.arange(len(mask_logits))
probabilities = mask_logits[each, detections["labels"]].sigmoid()
for probability, box, theirs in zip(
    probabilities,
    detections["boxes"],
    detections["masks"],
    strict=True,
):
    assert torch.allclose(paste(probability, box), theirs[0], atol=1e-3)

# %% [markdown]
# Where is the edge? We cut at a probability of 0.5, that is a logit of 0, as the paper says. The
# released code skips the sigmoid and cuts the *logit* at 0.5, a probability of
# $1/(1 + e^{-0.5}) = 0.622$, which makes its masks smaller.

# %% tags=["fold"] mystnb={"image": {"alt": "Left: 28 by 28 map of mask probabilities of one RoI. Right: the part of the synthetic slice around it with the true outline and the outlines of the mask at two thresholds."}, "figure": {"caption": "The mask of the best detection of our old friend: as the network gives it (left), and pasted into the slice (right) at the two thresholds. Synthetic."}}
# @title Draw a mask, and paste it at two thresholds
best_box = detections["boxes"][0].cpu()
pasted = detections["masks"][0, 0].cpu()  # [H, W]
match = int(torchvision.ops.box_iou(best_box[None], target["boxes"])[0].argmax())
fig, axes = plt.subplots(1, 2, figsize=(9, 4.1), layout="constrained")
drawn = axes[0].imshow(probabilities[0].cpu(), cmap="viridis", vmin=0, vmax=1)
axes[0].set_xlabel("Column of the mask (count)")
axes[0].set_ylabel("Row of the mask (count)")
axes[0].set_title(f"28 x 28 mask, {names[detections['labels'][0]]}", fontsize=10)
fig.colorbar(drawn, ax=axes[0], label="Probability (no unit)")
plotting.show_slice(image, axes[1])
logit_half = torch.tensor(0.5).sigmoid().item()  # 0.622
outlines = {
    "truth": (target["masks"][match], 0.5, "white", "-"),
    "probability 0.5": (pasted, 0.5, SKY_BLUE, "--"),
    "logit 0.5": (pasted, logit_half, VERMILLION, ":"),
}
for name, (values, cut_at, colour, line) in outlines.items():
    style = {"colors": [colour], "linestyles": [line], "linewidths": 2}
    axes[1].contour(values, levels=[cut_at], **style)
    axes[1].plot([], [], color=colour, ls=line, lw=2, label=name)
axes[1].legend(fontsize=9, facecolor="0.4", labelcolor="white")
(x1, y1), (x2, y2) = best_box[:2].tolist(), best_box[2:].tolist()
axes[1].set(xlim=(x1 - 8, x2 + 8), ylim=(y2 + 8, y1 - 8))
plt.show()

# %% [markdown]
# ## A slice without a lesion
#
# The RPN proposes boxes on a healthy slice, too. What do the heads make of them? Every proposal gets its
# scores, so there is a list of boxes with scores for this slice as for any other. We compare the best
# lesion score of each proposal of our old friend with those of a control.

# %%
healthy, healthy_mask = make_slice(3, 0, size, position=0.5)  # a control
assert not len(mask_to_targets(healthy_mask, config.lesions)["boxes"])
control = torch.from_numpy(healthy).expand(3, -1, -1).to(device)
with torch.no_grad():
    batch_h, _ = detector.transform([control])
    features_h = detector.backbone(batch_h.tensors)
    boxes_h, _ = detector.rpn(batch_h, features_h)
    cut_h = heads.box_roi_pool(features_h, boxes_h, batch_h.image_sizes)
    logits_h, _ = heads.box_predictor(heads.box_head(cut_h))
scores_h = logits_h.softmax(dim=1)  # [P, L]
for name, values in (("old friend", scores), ("control", scores_h)):
    best = values[:, 1:].amax()
    print(f"{name:10} {len(values)} proposals, best score {best:.2f}")

# %% tags=["fold"] mystnb={"image": {"alt": "Lesion score against rank for two slices: the curve of the old friend starts near one and falls; that of the control starts much lower."}, "figure": {"caption": "The best lesion score of each proposal, sorted, for our old friend (solid) and a control (dashed). Both slices have a list; its height differs. Two phantoms only. Synthetic."}}
# @title Draw the sorted scores of two slices
ax = plotting.get_ax(7, 3.6)
both = ("old friend", scores, BLUE, "-"), ("control", scores_h, VERMILLION, "--")
for name, values, colour, line in both:
    best = values[:, 1:].amax(dim=1).sort(descending=True).values.cpu()
    ax.plot(range(1, len(best) + 1), best, color=colour, ls=line, label=name)
ax.set(xlabel="Rank of the proposal (count)", ylabel="Best lesion score (no unit)")
ax.legend()
plt.show()

# %% [markdown]
# The segmentation set of the paper holds COVID-19 patients only {cite:p}`Zhang2020`, as ours does, so
# the detector has never been trained on a healthy patient. It has seen plenty of background, though:
# most regions of any slice. What it says about a control is a list, too, of low scores here;
# [chapter 5](05_segmenter.ipynb) counts how often a control scores high, and [chapter 6](06_ranked_boxes.ipynb) turns such lists into vectors of one length.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Why does RoIAlign interpolate instead of rounding to whole cells?**
#
# - [ ] Because interpolation is faster than rounding. :: It costs more; one reads four cells for each point.
# - [x] Because a cell is several pixels wide. :: A rounded box is off by up to half a cell, which is a lot here.
# - [ ] Because it makes the feature map finer. :: The map stays as it is; only the reading is finer.
#
# **2. A proposal is 20 pixels wide, and its encoded $\delta_x$ is 5. How far does the box move?**
#
# - [ ] 5 pixels, as the delta says. :: Deltas have no unit; they are shares of the width, times 10.
# - [ ] 100 pixels, five times the width. :: The weight 10 has been forgotten.
# - [x] 10 pixels, half of the width. :: 5 / 10 of a width of 20 pixels.
#
# **3. Why are there four deltas for each class?**
#
# - [x] Each class may correct the same RoI in its own way. :: The score then says which correction to use.
# - [ ] The classes share one box, and the four are added. :: They are not combined; one class is picked.
# - [ ] A delta per class is needed for the softmax. :: The softmax runs over the logits, not the deltas.
#
# **4. A RoI has the scores background 0.55, GGO 0.30, C 0.15. What happens at a threshold of 0.05?**
#
# - [ ] Nothing, since background is the most likely. :: Background is dropped; it suppresses nothing by itself.
# - [ ] It becomes one detection, a GGO. :: C is above the threshold as well, and NMS runs within a class.
# - [x] It becomes a GGO and a C candidate. :: Each class is judged alone, so a RoI may give two boxes.
#
# **5. What can the classifier tell from the deltas of a box?**
#
# - [ ] In which lung the lesion lies. :: A shift relative to the proposal is the same in both lungs.
# - [x] How the proposal had to be corrected. :: That is all: a relative shift, and relative sizes.
# - [ ] How large the lesion is in pixels. :: Sizes are ratios to the proposal, whose size is not given.
#
# **6. What does the mask head decide?**
#
# - [x] Which pixels in the box belong to the lesion. :: It draws a shape for each class, and one is used.
# - [ ] Whether the box is a GGO or a consolidation. :: That is the box head's decision.
# - [ ] Whether a box is kept or dropped. :: Scores and NMS decide before the mask head runs.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Encode by hand
#
# Kind: pencil, **
#
# A proposal has the corners (20, 40, 40, 80). The box should be (22, 38, 62, 78). Work out the four
# encoded deltas on paper, with the weights 10, 10, 5, 5, and let `my_deltas()` return them.
#
# Hint: write down centre and sides of both, then solve the four decoding formulas for the deltas. A
# logarithm may stay as `math.log(...)`.


# %% tags=["starter"]
def my_deltas():
    raise NotImplementedError("return dx, dy, dw, dh")


# %% tags=["solution"]
# @title Solution
def my_deltas():
    # centre (30, 60), sides 20 x 40 -> centre (42, 58), sides 40 x 40
    dx, dy = 10 * (42 - 30) / 20, 10 * (58 - 60) / 40  # 6, -0.5
    dw, dh = 5 * math.log(40 / 20), 5 * math.log(40 / 40)  # 3.47, 0
    return dx, dy, dw, dh


# %% tags=["wrong"]
def my_deltas():
    return 0.6, -0.05, math.log(2), 0.0  # no weights


# %% tags=["wrong"]
def my_deltas():
    return 1.0, -0.5, 5 * math.log(2), 0.0  # compares left edges, not centres


# %% tags=["wrong"]
def my_deltas():
    return 6.0, -0.5, 10.0, 0.0  # a ratio where a logarithm belongs


# %% tags=["check"]
# @title Check your answer
mine = torch.tensor([my_deltas()], dtype=torch.float32, device=device)
assert mine.shape == (1, 4), "Return four numbers: dx, dy, dw, dh."
given = torch.tensor([[20.0, 40.0, 40.0, 80.0]], device=device)
x1, y1, x2, y2 = decode(given, mine)[0].tolist()
assert abs(x2 - x1 - 40) < 0.1 and abs(y2 - y1 - 40) < 0.1, (
    f"Your deltas give sides of {x2 - x1:.1f} x {y2 - y1:.1f}, not 40 x 40. Which two "
    "of the four deltas decide that?"
)
assert abs(x1 + x2 - 84) < 0.1 and abs(y1 + y2 - 116) < 0.1, (
    f"Your deltas give the centre ({(x1 + x2) / 2:.1f}, {(y1 + y2) / 2:.1f}), not "
    "(42, 58). Put your dx and dy into the decoding formulas, and see where you land."
)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The same lesion in the other lung
#
# Kind: predict, then run, *
#
# Two lesions look alike, and each has a proposal that is a little too far to the left and a little too
# small. One lies in the left lung; the other, with its proposal, 60 pixels further to the right. Which of the
# encoded deltas differ? Let `which_differ()` return a set with their names, out of "dx", "dy", "dw" and
# "dh". The set may be empty.
#
# Hint: what happens to $x - x_p$ when both centres move by 60?


# %% tags=["starter"]
def which_differ():
    raise NotImplementedError('return a set such as {"dw", "dh"}')


# %% tags=["solution"]
# @title Solution
def which_differ():
    return set()


place = torch.tensor([[20.0, 40.0, 36.0, 52.0]], device=device)
same = torch.tensor([[2.0, 0.0, 1.0, 1.0]], device=device)
apart = torch.tensor([60.0, 0.0, 60.0, 0.0], device=device)
print("here: ", [round(v, 1) for v in decode(place, same)[0].tolist()])
print("there:", [round(v, 1) for v in decode(place + apart, same)[0].tolist()])


# %% tags=["wrong"]
def which_differ():
    return {"dx"}


# %% tags=["wrong"]
def which_differ():
    return {"dx", "dy"}


# %% tags=["check"]
# @title Check your answer
def by_coder(shift):
    """The deltas of torchvision's coder, of a proposal and its box, both moved."""
    pair = torch.tensor([[20.0, 40.0, 36.0, 52.0], [22.0, 39.0, 42.0, 55.0]])
    pair[:, 0::2] += shift
    return heads.box_coder.encode_single(pair[1:], pair[:1])[0]


differ = ((by_coder(60) - by_coder(0)).abs() > 1e-4).tolist()
truly = {n for n, d in zip(("dx", "dy", "dw", "dh"), differ, strict=True) if d}
assert set(which_differ()) == truly, (
    "Not so. Encode both pairs: a delta compares a box with its own proposal, and here "
    "both of them moved."
)

# %% [markdown] tags=["answer"]
# All four are the same, so from these numbers alone the classifier cannot know in which lung a lesion
# lies. (Whatever the network could learn from the surroundings may still leave traces in a score.)
# [Chapter 11](11_what_makes_it_work.ipynb) asks what the vector carries.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The deltas of another class
#
# Kind: find the bug, **
#
# A colleague picks the four deltas of one class for each RoI. The shapes are right, and the boxes land
# near the lesions. Still, something is wrong with them. Repair the function.
#
# Hint: the last linear layer lists the four deltas of background, then the four of GGO, then those of C.


# %% tags=["starter"]
def deltas_of_class(box_deltas, label):
    """[P, 4 * L] -> [P, 4]: the deltas of class `label`."""
    return box_deltas.reshape(len(box_deltas), 4, -1)[:, :, label]


# %% tags=["solution"]
# @title Solution
def deltas_of_class(box_deltas, label):
    """[P, 4 * L] -> [P, 4]: the deltas of class `label`."""
    return box_deltas.reshape(len(box_deltas), -1, 4)[:, label]


# %% tags=["wrong"]
def deltas_of_class(box_deltas, label):
    return box_deltas[:, label : label + 4]


# %% tags=["wrong"]
def deltas_of_class(box_deltas, label):
    return box_deltas[:, 4 * label - 4 : 4 * label]  # forgets background


# %% tags=["check"]
# @title Check your answer
numbered = torch.arange(24.0).reshape(2, 12)  # two RoIs, three classes
for label in (1, 2):
    mine = deltas_of_class(numbered, label)
    assert mine.shape == (2, 4), "Return four deltas for each RoI."
    assert (mine[:, 1:] - mine[:, :-1] == 1).all(), (
        "The four deltas of a class are neighbours in a row."
    )
    assert mine[0, 0] % 4 == 0, "A class begins at a multiple of four."
assert deltas_of_class(numbered, 1)[0, 0] > 3, "The first four belong to background."
real_ones = deltas_of_class(box_deltas, 1)
assert torch.equal(real_ones, deltas_of[:, 1]), "Not for the RoIs of our old friend."

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · How much of the lung?
#
# Kind: write a function, **
#
# Radiologists estimate how much of the lung is affected. Write `affected_share(masks, lung)`:
# masks are probabilities [D, H, W] of detections, `lung` is bool [H, W]. It returns, as a number from 0
# to 1, the share of the lung's pixels on which at least one mask has a probability above 0.5. Then use it on
# our old friend, on detections with a score above 0.5. (It is a phantom, so the result means nothing in
# medicine.)
#
# Hint: two detections may cover the same pixel, and `any(dim=...)` counts it once. The pixels of the lung are
# `mask > 0`: lesions are part of it.


# %% tags=["starter"]
def affected_share(masks, lung):
    raise NotImplementedError("the share of the lung under at least one mask")


# %% tags=["solution"]
# @title Solution
def affected_share(masks, lung):
    covered = (masks > 0.5).any(dim=0)  # [H, W]
    return float((covered & lung).sum() / lung.sum())


sure = detections["scores"] > 0.5
lung = torch.from_numpy(mask > 0)
found_share = affected_share(detections["masks"][sure, 0].cpu(), lung)
true_share = affected_share(target["masks"].float(), lung)
print(f"detected {found_share:.1%} of the lung, drawn {true_share:.1%}")


# %% tags=["wrong"]
def affected_share(masks, lung):
    return float(((masks > 0.5) & lung).sum() / lung.sum())  # counts overlaps twice


# %% tags=["wrong"]
def affected_share(masks, lung):
    return float((masks > 0.5).any(dim=0).float().mean())  # a share of the slice


# %% tags=["wrong"]
def affected_share(masks, lung):
    covered = (masks.mean(dim=0) > 0.5) & lung  # means instead of "at least one"
    return float(covered.sum() / lung.sum())


# %% tags=["check"]
# @title Check your answer
half = torch.zeros(4, 4, dtype=torch.bool)
half[:, 2:] = True  # eight pixels of lung
two = torch.zeros(2, 4, 4)
two[0, 0, 2:], two[1, :2, 2:] = 0.9, 0.8  # the second covers the first
assert abs(affected_share(two, half) - 0.5) < 1e-6, (
    "Four of the eight pixels of lung lie under a mask here, two of them under both. "
    "Count each pixel once, and divide by the lung's pixels."
)
two[0, :, 0] = 0.9  # outside the lung
assert abs(affected_share(two, half) - 0.5) < 1e-6, "Only the lung counts."
assert affected_share(0.4 * two, half) == 0, "A mask begins above a probability of 0.5."

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Sharper masks
#
# Kind: predict, then run, **
#
# Suppose somebody doubles all mask logits, so that the probabilities move towards 0 and 1. What happens to
# the number of pixels in the masks, counted on their 28 x 28 grids, if they are cut at a probability of 0.5? And if the logits are cut at
# 0.5, as in the released code? Let `prediction()` return two words out of "fewer", "same" and "more".
#
# Hint: which logits cross the threshold when they are doubled?


# %% tags=["starter"]
def prediction():
    raise NotImplementedError("two words: at probability 0.5, at logit 0.5")


# %% tags=["solution"]
# @title Solution
def prediction():
    return "same", "more"


for factor in (1, 2):
    own = factor * mask_logits[each, detections["labels"]]
    print(f"logits x {factor}: {int((own > 0).sum()):,} pixels above 0,", end=" ")
    print(f"{int((own > 0.5).sum()):,} above 0.5")


# %% tags=["wrong"]
def prediction():
    return "more", "more"


# %% tags=["wrong"]
def prediction():
    return "same", "same"


# %% tags=["check"]
# @title Check your answer
own = mask_logits[each, detections["labels"]]
guess = prediction()
assert len(guess) == 2, "Return two words."
for cut_at, word, name in zip((0.0, 0.5), guess, ("probability", "logit"), strict=True):
    before, after = int((own > cut_at).sum()), int((2 * own > cut_at).sum())
    seen = "same" if after == before else "more" if after > before else "fewer"
    assert word == seen, (
        f"Not at {name} 0.5. Count the pixels of mask_logits before and after: which "
        "logits change sides when they are doubled?"
    )

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · The sampling ratio
#
# Kind: experiment, **
#
# Cut the best proposal out of the finest feature map with sampling ratios of 1, 2, 4 and 16. Take 16
# as the truth. How much do you gain from one ratio to the next, and from which ratio on does it hardly
# matter?
#
# Hint: `roi_align` takes `ratio`. The norm of the difference, as a share of the norm of the truth, is a fair
# measure.

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

# %% [markdown]
# ## What we learned
#
# 1. RoIAlign reads the feature map between its cells, so that small shifts of a box are not rounded away.
# 2. The box head gives each RoI a score for each class, and four encoded deltas for each class.
# 3. Encoded deltas are relative to the proposal, times 10, 10, 5, 5; place and size of the proposal are not in them.
# 4. The mask head draws $28 \times 28$ pixels, which are stretched over the box.
# 5. A slice without a lesion still gets a list of boxes, with lower scores in the example here.
#
# ## Further reading
#
# - {cite:t}`He2017` introduce RoIAlign and the mask head; {cite:t}`Girshick2015` has RoIPool and the box
#   head with its class scores and deltas.
# - {cite:t}`Lin2017` give the rule for which map a RoI reads.
# - {cite:t}`TerSarkisov2020`, section 3.1, describe the detector of the paper;
#   [paper v code](paper_v_code.ipynb) has the details of masks and thresholds.
# - {cite:t}`Aleem2020` also take Mask R-CNN to lung slices.
# - [Chapter 4](04_losses.ipynb) shows what these heads are trained on.
