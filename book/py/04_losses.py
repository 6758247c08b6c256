# %% [markdown]
# # 4 · The losses
#
# A slice with a handful of lesions gives thousands of anchors and hundreds of proposals. **What exactly
# is each of them told in a training step, and which part of the network learns from it?** We label anchors
# and regions by hand, compute the five losses of Mask R-CNN from plain tensors, compare them with those
# of the model, and then follow each gradient back.

# %% tags=["fold"] mystnb={"image": {"alt": "Left: a synthetic slice with true lesion boxes in white and the few anchors that count as lesion. Right: three bars on a logarithmic scale, for anchors that count as lesion, as background, or are left out; background is by far the longest."}, "figure": {"caption": "What the anchors of our old friend are told. Left: those that count as lesion, by the threshold (solid) or by an extra rule (dashed); white is the truth. Right: how many anchors get which label, on a logarithmic scale. Synthetic."}}
# @title Imports, versions, and the labels of the anchors
import copy
import platform

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.patches import Rectangle
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import box_iou

import covidmask
from covidmask import plotting
from covidmask.config import LESION_CLASSES, PRESETS
from covidmask.datasets import make_slice, mask_to_targets, old_friend
from covidmask.models import trained_segmenter
from covidmask.plotting import BLUE, GREEN, VERMILLION

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
    preset, detector = PRESETS["quick"], trained_segmenter("quick", shipped=True)
    image, mask = old_friend(preset.phantoms.size)
    truth = mask_to_targets(mask, preset.detector.lesions, preset.min_area)
    with torch.no_grad():
        batch, _ = detector.transform([torch.from_numpy(image).expand(3, -1, -1)])
        maps = list(detector.backbone(batch.tensors).values())
    anchors = detector.rpn.anchor_generator(batch, maps)[0]
    labels = detector.rpn.assign_targets_to_anchors([anchors], [truth])[0][0]
    above = box_iou(truth["boxes"], anchors).amax(dim=0) >= preset.detector.rpn_iou[0]
    sizes = {"layout": "constrained", "width_ratios": [1.2, 1]}
    _, axes = plt.subplots(1, 2, figsize=(9, 4.2), **sizes)
    plotting.show_slice(image, axes[0])
    draw_boxes(truth["boxes"], axes[0], edgecolor="white", lw=2)
    draw_boxes(anchors[(labels == 1) & above], axes[0], edgecolor=GREEN, lw=1.6)
    extra = anchors[(labels == 1) & ~above]
    draw_boxes(extra, axes[0], edgecolor=VERMILLION, lw=1.6, ls="--")
    axes[0].plot([], [], color=GREEN, label="above the threshold")
    axes[0].plot([], [], color=VERMILLION, ls="--", label="best of its lesion")
    axes[0].legend(loc="upper right", fontsize=9)
    counts = [int((labels == value).sum()) for value in (-1, 0, 1)]
    names, colours = ("left out", "background", "lesion"), ("0.7", BLUE, GREEN)
    bars = axes[1].barh(names, counts, color=colours)
    axes[1].bar_label(bars, fmt="{:,.0f}", padding=3)
    axes[1].set(xscale="log", xlim=(1, 8 * max(counts)), xlabel="Anchors (count)")
    plt.show()


opening()

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0

# %% [markdown]
# **After it you can**
#
# - say which anchors and regions count as lesion, which as background, and which are left out;
# - encode the deltas that an anchor or a proposal should have;
# - compute the five losses of Mask R-CNN;
# - say which part of the network each loss teaches, and which it cannot reach.
#
# **You need** anchors and IoU ([chapter 2](02_region_proposals.ipynb)), the heads ([chapter
# 3](03_roi_heads.ipynb)), and gradients in PyTorch. The chapter runs alone.
#
# **Time:** reading 25 min, exercises 60 min, running 1 min.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice here is a *phantom*, made by formulas and random numbers. No number below is a result on
# patients, and nothing here is for diagnosis.
# ```
#
# ## What an anchor is told
#
# The truth is a handful of boxes, but the output is about thousands of anchors. So each anchor needs a
# label of its own, and IoU with the truth decides:
#
# - **1, lesion:** its IoU with some lesion reaches the upper threshold;
# - **0, background:** its best IoU stays below the lower threshold;
# - **-1, left out:** in between. Such an anchor fits too well to be called background and too poorly
#   to be called a lesion, so it takes no part in the training.
#
# An extra rule helps lesions that no anchor fits: for each lesion, the anchor with the best IoU gets the label
# 1 as well, however poor the fit. Otherwise the network would never learn such a lesion.

# %%
preset = PRESETS[PRESET]
config, size = preset.detector, preset.phantoms.size
names = ("background", *LESION_CLASSES[config.lesions])  # class 0, 1, 2
image, mask = old_friend(size)
target = mask_to_targets(mask, config.lesions, preset.min_area)
friend = torch.from_numpy(image).expand(3, -1, -1).to(device)
truth = {name: value.to(device) for name, value in target.items()}

detector = trained_segmenter(PRESET, device, shipped=True)
with torch.no_grad():
    batch, _ = detector.transform([friend])
    maps = list(detector.backbone(batch.tensors).values())
anchors = detector.rpn.anchor_generator(batch, maps)[0]  # [A, 4]
print(f"{len(truth['boxes'])} lesions, {len(anchors):,} anchors")


# %%
def label_anchors(anchors, boxes, high, low):
    """Labels [A] (1, 0 or -1), and the lesion each anchor overlaps most."""
    if len(boxes) == 0:  # a slice without a lesion: all background
        background = anchors.new_zeros(len(anchors))
        return background, background.long()
    overlap = box_iou(boxes, anchors)  # [K, A]
    best, lesion = overlap.max(dim=0)  # [A], [A]
    labels = anchors.new_full((len(anchors),), -1.0)
    labels[best < low] = 0
    labels[best >= high] = 1
    # the extra rule
    labels[(overlap == overlap.amax(dim=1, keepdim=True)).any(dim=0)] = 1
    return labels, lesion


# [A], [A]
labels, lesion = label_anchors(anchors, truth["boxes"], *config.rpn_iou)
theirs, _ = detector.rpn.assign_targets_to_anchors([anchors], [truth])
assert torch.equal(labels, theirs[0])

# %% tags=["fold"]
# @title Print the best anchor of each lesion
high, low = config.rpn_iou
overlap = box_iou(truth["boxes"], anchors)  # [K, A]
print(f"lesion from an IoU of {high}, background below {low}")
for k, label in enumerate(truth["labels"].tolist()):
    own = int(((labels == 1) & (lesion == k)).sum())
    fit = overlap[k].max()
    rule = "threshold" if fit >= high else "extra rule"
    print(f"{names[label]:4} best IoU {fit:.2f}, anchors: {own}, by the {rule}")

# %% [markdown]
# ### A sample, not all
#
# A few anchors say "lesion", thousands say "background". If all of them counted, a network that always
# says "background" would have almost no loss. So only a sample counts: a fixed number of anchors in each
# slice, of which at most a share (`rpn_positive`) are lesion. The rest is background. A slice with few
# or small lesions may not have enough lesion anchors to reach that share.


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
print(f"{len(positive)} lesion, {len(negative)} background", end=" ")
print(f"(at most {config.rpn_positive:.0%} lesion)")

# %% [markdown]
# ### The deltas to learn
#
# An anchor that counts as lesion also has a target for its deltas: those that would turn it into the
# true box. This is the decoding of chapter 2, solved for the deltas:
#
# $$\delta_x = \frac{x - x_a}{w_a}, \quad \delta_y = \frac{y - y_a}{h_a}, \quad \delta_w = \ln\frac{w}{w_a}, \quad \delta_h = \ln\frac{h}{h_a}$$
#
# For the box head the proposal takes the place of the anchor, and the deltas are multiplied by 10, 10, 5, 5.


# %%
def encode(boxes, anchors, weights=(1.0, 1.0, 1.0, 1.0)):
    """The deltas [n, 4] that turn anchors [n, 4] into boxes [n, 4]."""
    sides = anchors[:, 2:] - anchors[:, :2]
    wanted = boxes[:, 2:] - boxes[:, :2]
    centre = anchors[:, :2] + 0.5 * sides
    shift = (boxes[:, :2] + 0.5 * wanted - centre) / sides
    deltas = torch.cat([shift, (wanted / sides).log()], dim=1)
    return deltas * anchors.new_tensor(weights)


mine = truth["boxes"][lesion[positive]]  # [positive, 4]
goal = encode(mine, anchors[positive])
theirs = detector.rpn.box_coder.encode([mine], [anchors[positive]])[0]
assert torch.allclose(goal, theirs, atol=1e-5)

# %% [markdown]
# ## Five losses
#
# In `train` mode the model takes targets and returns five losses; training minimises their sum. Samples are
# drawn at random, so both computations below start from the same seed. In this mode batch normalisation
# uses the statistics of the batch at hand and updates its stored ones; [chapter
# 8](08_three_regimes.ipynb) explains what that does. We work on a copy, so that our detector keeps its own.

# %%
student = copy.deepcopy(detector).train()
torch.manual_seed(SEED)
losses = student([friend], [truth])
for name, value in losses.items():
    print(f"{name:17} {value.item():.4f}")

# %% [markdown]
# Two small functions do most of the work. For a logit $o$ and a target $t$ between 0 and 1, *binary
# cross-entropy* is $-t \ln \sigma(o) - (1-t) \ln(1 - \sigma(o)) = \ln(1 + e^o) - t\,o$, and `F.softplus`
# computes $\ln(1 + e^o)$ without an overflow. The *smooth L1* loss of an error $e$ is a parabola near 0
# and a straight line elsewhere; the border is called $\beta$:
#
# $$\ell_\beta(e) = \begin{cases} e^2 / (2\beta) & |e| < \beta \\ |e| - \beta/2 & \text{else} \end{cases}$$
#
# For $\beta = 0$ it is the plain L1 loss. (This $\beta$ has nothing to do with batch normalisation.)
# Far from 0 the gradient has the size 1 and does not grow, so a single wild box cannot dominate. Near 0 it
# fades out, so that good boxes settle.


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


# %% tags=["fold"] mystnb={"image": {"alt": "Left: smooth L1 loss for three values of beta against the error; right: its derivative, a ramp between minus one and one of width beta."}, "figure": {"caption": "Smooth L1 (left) and its gradient (right) for the betas that occur: L1 in the RPN of the released code, 1/9 in torchvision, 1 in the box head of the released code. No data."}}
# @title Draw smooth L1 and its gradient
errors = torch.linspace(-2, 2, 401, requires_grad=True)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for beta, text, colour, line in (
    (0, "0 (L1)", BLUE, "-"),
    (1 / 9, "1/9", VERMILLION, "--"),
    (1, "1", GREEN, ":"),
):
    value = smooth_l1(errors, beta)
    (slope,) = torch.autograd.grad(value.sum(), errors)
    look = {"color": colour, "ls": line, "label": f"beta {text}"}
    axes[0].plot(errors.detach(), value.detach(), **look)
    axes[1].plot(errors.detach(), slope, **look)
for ax, what in zip(axes, ("Loss", "Gradient"), strict=True):
    ax.set(xlabel="Error of a delta (no unit)", ylabel=f"{what} (no unit)")
axes[0].legend()
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
features_t = student.backbone(batch_t.tensors)
outputs = student.rpn.head(list(features_t.values()))
# [A, 1], [A, 4] in the order of the anchors, as in chapter 2
logits, deltas = concat_box_prediction_layers(*outputs)

positive, negative = sample(labels, config.rpn_batch, config.rpn_positive)
sampled = torch.cat([positive, negative])
goal = encode(truth_t["boxes"][lesion[positive]], anchors[positive])
rpn_error = deltas[positive] - goal  # [positive, 4]

ours = {}
entropy = binary_cross_entropy(logits[sampled, 0], labels[sampled])
ours["loss_objectness"] = entropy.mean()
each = smooth_l1(rpn_error, config.rpn_box_beta)
ours["loss_rpn_box_reg"] = each.sum() / len(sampled)
CLOSE = {"rtol": 1e-3, "atol": 1e-6}
for name in ours:
    assert torch.allclose(ours[name], losses[name], **CLOSE), name

# %% [markdown]
# ### What a region is told
#
# The examples of the second stage are proposals, so they change while the RPN learns. Note three
# points:
#
# - The proposals are *detached*: the heads take them as plain numbers, so no gradient goes back through
#   them to the RPN.
# - The true boxes join the proposals. Early in training hardly any proposal overlaps a lesion, and the
#   box and mask heads would have nothing to learn from.
# - A proposal takes the class of the lesion that it overlaps most, if the IoU reaches the threshold.
#   The extra rule for the best match does not apply here.

# %%
with torch.no_grad():
    shifted = student.rpn.box_coder.decode(deltas, [anchors])[:, 0]
    counts = [level[0].numel() for level in outputs[0]]  # of each map
    rest = logits, batch_t.image_sizes, counts
    kept, _ = student.rpn.filter_proposals(shifted[None], *rest)
candidates = torch.cat([kept[0], truth_t["boxes"]])  # [P + K, 4]

# [P + K] each
best, match = box_iou(truth_t["boxes"], candidates).max(dim=0)
high, low = config.box_iou
roi_labels = truth_t["labels"][match]  # 1 GGO, 2 C
roi_labels = torch.where(best < high, -1, roi_labels)  # left out
roi_labels = torch.where(best < low, 0, roi_labels)  # background

drawn = sample(roi_labels, config.box_batch, config.box_positive)
chosen = torch.cat(drawn).sort().values  # [RoIs]
rois, roi_labels = candidates[chosen], roi_labels[chosen]
match = match[chosen]
per_class = roi_labels.bincount(minlength=len(names)).tolist()

# %% tags=["fold"]
# @title Print how many examples one slice gives
print(f"{len(sampled)} anchors with a label,", end=" ")
print(f"{len(positive)} of them with deltas to learn")
print(f"{len(rois)} regions out of {len(candidates)}:", end=" ")
print(*map("{} {}".format, per_class, names), sep=", ")

# %% [markdown]
# One slice gives hundreds of examples; the paper counts on this to train with few slices
# {cite:p}`TerSarkisov2020`. But the regions of one slice are alike, so they do not replace patients.
#
# ### Two losses of the box head
#
# The class loss is the cross-entropy over all drawn RoIs, background included:
# $-\ln p_y = \ln \sum_k e^{z_k} - z_y$. The box loss takes the four deltas of the *true* class
# only; those of other classes get no gradient from this RoI.

# %%
heads = student.roi_heads
# [RoIs, c, 7, 7]
pooled = heads.box_roi_pool(features_t, [rois], batch_t.image_sizes)
# [RoIs, 3], [RoIs, 12]
class_logits, box_deltas = heads.box_predictor(heads.box_head(pooled))

rows = torch.arange(len(rois), device=device)
true_logit = class_logits[rows, roi_labels]  # [RoIs]
cross_entropy = class_logits.logsumexp(dim=1) - true_logit
ours["loss_classifier"] = cross_entropy.mean()

is_lesion = roi_labels > 0
of_class = box_deltas.reshape(len(rois), -1, 4)[rows, roi_labels]
goal = encode(truth_t["boxes"][match], rois, heads.box_coder.weights)
box_error = (of_class - goal)[is_lesion]  # [lesions, 4]
each = smooth_l1(box_error, config.box_beta)
ours["loss_box_reg"] = each.sum() / len(rois)
for name in ours:
    assert torch.allclose(ours[name], losses[name], **CLOSE), name

# %% [markdown]
# ### The loss of the mask head
#
# Only RoIs that match a lesion have a mask. The true mask is cut out of the slice by RoIAlign, too, onto
# the same $28 \times 28$ grid, so at the edge the targets are fractions and not only 0 and 1. Binary
# cross-entropy compares them with the logits of the true class.

# %%
lesion_rois, lesion_labels = rois[is_lesion], roi_labels[is_lesion]
# [lesions, c, 14, 14]
cut = heads.mask_roi_pool(features_t, [lesion_rois], batch_t.image_sizes)
# [lesions, L, 28, 28]
mask_logits = heads.mask_predictor(heads.mask_head(cut))
# [lesions, 28, 28]
mask_logits = mask_logits[rows[: len(cut)], lesion_labels]

# [lesions, 1, H, W]
true_masks = truth_t["masks"][match[is_lesion], None].float()
# tensors [1, 4]: one box for each mask
one_each = list(lesion_rois[:, None])
mask_goal = torchvision.ops.roi_align(true_masks, one_each, output_size=28)
mask_goal = mask_goal[:, 0]  # [lesions, 28, 28]
ours["loss_mask"] = binary_cross_entropy(mask_logits, mask_goal).mean()

# %% tags=["fold"] mystnb={"image": {"alt": "Two rows of three small square maps: on top the target masks of one RoI for each lesion, below the probabilities that the network gives for the same RoIs."}, "figure": {"caption": "What the mask head is trained on: for one drawn RoI of three lesions, the target (top) and the network's probability (bottom) on the grid of 28 x 28. Small lesions fill the grid as large ones do. Synthetic."}}
# @title Draw targets and outputs of the mask head
lesion_match = match[is_lesion]
examples = [(lesion_match == k).nonzero()[0, 0] for k in lesion_match.unique()[-3:]]
columns = max(len(examples), 1)
options = {"layout": "constrained", "squeeze": False}
fig, axes = plt.subplots(2, columns, figsize=(2.5 * columns + 1, 5), **options)
for column, i in enumerate(examples):
    shown = mask_goal[i], mask_logits[i].sigmoid().detach()
    for ax, values in zip(axes[:, column], shown, strict=True):
        drawn = ax.imshow(values.cpu(), cmap="viridis", vmin=0, vmax=1)
        ax.set(xticks=[0, 14, 27], yticks=[0, 14, 27])
    axes[1, column].set_xlabel("Column (count)")
    axes[0, column].set_title(names[lesion_labels[i]], fontsize=10)
axes[0, 0].set_ylabel("target\nRow (count)")
axes[1, 0].set_ylabel("network\nRow (count)")
if examples:
    fig.colorbar(drawn, ax=axes, label="Probability (no unit)", shrink=0.8)
plt.show()

# %% [markdown]
# ### All five

# %%
print(f"{'':17} {'by hand':>9} {'model':>9}")
for name, value in losses.items():
    print(f"{name:17} {ours[name].item():9.5f} {value.item():9.5f}")
    assert torch.allclose(ours[name], value, **CLOSE), name
assert set(ours) == set(losses)

# %% [markdown]
# | loss | examples | formula | teaches |
# |---|---|---|---|
# | `loss_objectness` | sampled anchors $I$ | $\frac{1}{\lvert I\rvert} \sum_{i \in I} \operatorname{BCE}(o_i, t_i)$ | where to look |
# | `loss_rpn_box_reg` | lesion anchors $I^+ \subset I$ | $\frac{1}{\lvert I\rvert} \sum_{i \in I^+} \sum_{4} \ell_\beta(\delta_i - \delta_i^*)$ | a first correction |
# | `loss_classifier` | sampled RoIs $J$ | $-\frac{1}{\lvert J\rvert} \sum_{j \in J} \ln p_{j, y_j}$ | background, GGO or C |
# | `loss_box_reg` | lesion RoIs $J^+ \subset J$ | $\frac{1}{\lvert J\rvert} \sum_{j \in J^+} \sum_{4} \ell_\beta(\delta_{j, y_j} - \delta_j^*)$ | a second correction |
# | `loss_mask` | lesion RoIs $J^+$ | mean of $\operatorname{BCE}(m_{j, y_j}, m_j^*)$ | which pixels |
#
# A star marks the truth, $y_j$ is the true class of RoI $j$, and $m$ are mask logits. The paper names smooth L1 for both box
# losses {cite:p}`TerSarkisov2020`; in the released code the RPN's is plain L1 ($\beta = 0$) and the box head's
# has $\beta = 1$. Here, `config.rpn_box_beta` and `config.box_beta` set it.
#
# ## Who learns from which loss?
#
# We said that no gradient flows through the proposals. Let us check it with the model's own five losses: a
# parameter on which a loss does not depend gets `None` for a gradient.

# %% tags=["nbval-check-output"]
parts = {
    "backbone": [student.backbone],
    "RPN head": [student.rpn.head],
    "box head": [heads.box_head, heads.box_predictor],
    "mask head": [heads.mask_head, heads.mask_predictor],
}
options = {"retain_graph": True, "allow_unused": True}
learns = []  # one row for each loss
for name, loss in losses.items():
    row = []
    for modules in parts.values():
        weights = [p for module in modules for p in module.parameters()]
        grads = torch.autograd.grad(loss, weights, **options)
        row.append(any(grad is not None for grad in grads))
    learns.append(row)
    found = [part for part, yes in zip(parts, row, strict=True) if yes]
    print(f"{name:17} -> {', '.join(found)}")

# %% tags=["fold"] mystnb={"image": {"alt": "A grid with the five losses as rows and backbone, RPN head, box head and mask head as columns. All losses reach the backbone; each head is reached only by its own losses."}, "figure": {"caption": "Which loss teaches which part: a filled field with a tick means that a gradient arrives. Computed above."}}
# @title Draw who learns from which loss
ax = plotting.get_ax(7, 3.4)
for i, row in enumerate(learns):
    for j, yes in enumerate(row):
        field = Rectangle((j - 0.46, i - 0.42), 0.92, 0.84, ec="0.4", lw=0.8)
        ax.add_patch(field).set_facecolor(BLUE if yes else "white")
        if yes:
            ax.text(j, i, "✓", color="white", ha="center", va="center", fontsize=13)
ax.set_xticks(range(len(parts)), list(parts))
ax.set_yticks(range(len(losses)), list(losses))
ax.set(xlim=(-0.6, len(parts) - 0.4), ylim=(len(losses) - 0.45, -0.55))
ax.xaxis.tick_top()
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# Every loss teaches the backbone, and each head learns from its own losses alone. The RPN is never told
# whether its proposals led to a right class.
#
# The same holds later, when the classifier of the image trains. It reads scores and deltas, which come
# from the box head, so its loss can reach the box head and the backbone. It cannot reach the RPN head,
# since proposals are handed on as plain numbers there, too. [Chapter 8](08_three_regimes.ipynb) comes back
# to this when it asks what trains in the regime called "full".

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. An anchor overlaps one lesion by 0.45 and is not the best of any lesion. The thresholds are 0.6 and 0.3. What is its label?**
#
# - [ ] Background, since it misses the upper threshold. :: Only anchors below the lower threshold are background.
# - [x] None; it takes no part in the training. :: It fits too well for background and too poorly for a lesion.
# - [ ] Lesion, since it overlaps a lesion. :: It would have to reach 0.6, or be the best of that lesion.
#
# **2. What is the extra rule for the best anchor good for?**
#
# - [x] Each lesion teaches the RPN through at least one anchor. :: Otherwise a badly fitted lesion would be lost.
# - [ ] It keeps the number of lesion anchors at one per lesion. :: It adds anchors; it never takes one away.
# - [ ] It raises the IoU of that anchor to the threshold. :: The fit stays poor; only the label changes.
#
# **3. Why does only a sample of the anchors count?**
#
# - [ ] Because the loss of thousands of anchors does not fit into memory. :: It would; they are single numbers.
# - [ ] Because lesion anchors must be exactly as many as background. :: The share is an upper limit only.
# - [x] Because background would drown the few lesion anchors. :: "Always background" would have almost no loss.
#
# **4. A RoI is a GGO. Which of its twelve deltas get a gradient from the box loss?**
#
# - [ ] All twelve, weighted by the scores. :: The loss picks deltas by the true class, without any weights.
# - [x] The four of the class GGO. :: Those of background and of C are not in this RoI's loss.
# - [ ] The eight of the two lesion classes. :: Those of C do not enter, since the true class is GGO.
#
# **5. You double $\beta$ in smooth L1. What happens to the gradient of an error that stays below the old $\beta$?**
#
# - [x] It is halved. :: In the parabola the gradient is the error divided by beta.
# - [ ] It is doubled. :: A larger beta makes the parabola flatter, not steeper.
# - [ ] It stays as it is. :: That is true for large errors, on the straight line.
#
# **6. The box head finds that a proposal was useless. How does the RPN hear of it?**
#
# - [ ] Through the gradient of the class loss. :: It ends at the proposals, which are plain numbers.
# - [ ] Through the gradient of the box loss. :: This one trains box head and backbone only, too.
# - [x] Not directly; only the shared backbone changes. :: The RPN head learns from its own two losses.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Five anchors
#
# Kind: pencil, *
#
# Two lesions, five anchors, and their IoU:
#
# | | anchor 1 | anchor 2 | anchor 3 | anchor 4 | anchor 5 |
# |---|---|---|---|---|---|
# | lesion 1 | 0.65 | 0.40 | 0.10 | 0.05 | 0.00 |
# | lesion 2 | 0.10 | 0.20 | 0.35 | 0.25 | 0.05 |
#
# With the thresholds 0.6 and 0.3, which labels do the anchors get? Let `my_labels()` return five numbers
# out of 1, 0 and -1.
#
# Hint: apply the two thresholds to the best number of each column. Then look for the best number of each row.


# %% tags=["starter"]
def my_labels():
    raise NotImplementedError("five numbers out of 1, 0 and -1")


# %% tags=["solution"]
# @title Solution
def my_labels():
    return [1, -1, 1, 0, 0]


# %% tags=["wrong"]
def my_labels():
    return [1, -1, -1, 0, 0]  # forgets the extra rule


# %% tags=["wrong"]
def my_labels():
    return [1, 0, 1, 0, 0]  # nothing is left out


# %% tags=["wrong"]
def my_labels():
    return [1, -1, 1, -1, 0]  # takes 0.25 for "in between"


# %% tags=["check"]
# @title Check your answer
table = torch.tensor([[0.65, 0.40, 0.10, 0.05, 0.0], [0.10, 0.20, 0.35, 0.25, 0.05]])
column_best = table.amax(dim=0)
by_rule = torch.where(column_best < 0.3, 0, torch.where(column_best < 0.6, -1, 1))
by_rule[table.argmax(dim=1)] = 1
mine = list(my_labels())
assert len(mine) == 5, "Return five labels, one for each anchor."
for number, (own, right) in enumerate(zip(mine, by_rule.tolist(), strict=True), 1):
    assert own == right, (
        f"Anchor {number} is not right. What is its best IoU, between which thresholds "
        "does it lie, and is it the best of a lesion?"
    )

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · A loss that is too large
#
# Kind: find the bug, **
#
# A colleague's box loss of the RPN does not agree with the model's: it is many times too large. `error` holds
# the errors of the deltas, [lesion anchors, 4], and `count` is the number of all sampled anchors. Repair the
# function, and say which slices would weigh more, and which less, with the bug.
#
# Hint: read the paragraph above the two losses of the RPN once more. What is summed, and what is it divided
# by?


# %% tags=["starter"]
def rpn_box_loss(error, count, beta):
    return smooth_l1(error, beta).mean()


# %% tags=["solution"]
# @title Solution
def rpn_box_loss(error, count, beta):
    return smooth_l1(error, beta).sum() / count


mean = smooth_l1(rpn_error, config.rpn_box_beta).mean()
print(f"with the bug {mean.item():.4f}, without", end=" ")
print(f"{rpn_box_loss(rpn_error, len(sampled), config.rpn_box_beta).item():.4f}")


# %% tags=["wrong"]
def rpn_box_loss(error, count, beta):
    return smooth_l1(error, beta).sum() / len(error)  # by the lesion anchors


# %% tags=["wrong"]
def rpn_box_loss(error, count, beta):
    return smooth_l1(error, beta).sum() / (4 * count)  # a mean over the four deltas


# %% tags=["check"]
# @title Check your answer
one, two = torch.full((1, 4), 2.0), torch.full((2, 4), 2.0)
beta = config.rpn_box_beta
ratio = rpn_box_loss(two, 256, beta) / rpn_box_loss(one, 256, beta)
assert abs(ratio - 2) < 1e-4, (
    "Twice as many lesion anchors, each as wrong as before, among as many sampled "
    f"anchors, should give twice the loss; yours is {float(ratio):.2f} times as large."
)
mine = rpn_box_loss(rpn_error.detach(), len(sampled), beta)
assert torch.allclose(mine, losses["loss_rpn_box_reg"].detach(), **CLOSE), (
    f"The model's loss is {losses['loss_rpn_box_reg'].item():.4f} here, and yours is "
    f"{float(mine):.4f}. By which factor do they differ?"
)

# %% [markdown] tags=["answer"]
# With the bug every slice that has a lesion weighs the same in this loss. Without it, a slice with many
# lesion anchors weighs more than one with few.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The gradient of smooth L1
#
# Kind: write a function, **
#
# Write `slope(error, beta)`: the derivative of `smooth_l1` with respect to the error, element by element and
# without autograd. It should work for $\beta = 0$, too, and for negative errors.
#
# Hint: derive the two cases of the formula. The derivative of $|e|$ is the sign of $e$.


# %% tags=["starter"]
def slope(error, beta):
    raise NotImplementedError("the derivative, element by element")


# %% tags=["solution"]
# @title Solution
def slope(error, beta):
    if beta == 0:
        return error.sign()
    return (error / beta).clamp(-1, 1)


# %% tags=["wrong"]
def slope(error, beta):
    return error.sign() if beta == 0 else error.clamp(-1, 1)  # forgets to divide


# %% tags=["wrong"]
def slope(error, beta):
    return torch.where(error < beta, error / max(beta, 1e-9), 1.0)  # no absolute value


# %% tags=["check"]
# @title Check your answer
for beta in (1.0, 1 / 9, 0.0):
    at = torch.tensor([-3.0, -0.5, -0.05, 0.05, 0.5, 3.0], requires_grad=True)
    (by_autograd,) = torch.autograd.grad(smooth_l1(at, beta).sum(), at)
    off = (slope(at.detach(), beta) - by_autograd).abs() > 1e-5
    assert not off.any(), (
        f"With beta {beta:.2f} it is not right for the errors {at[off].tolist()}. In "
        "the parabola the slope grows with the error; beyond it only the sign is left."
    )

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · A healthy slice in training
#
# Kind: predict, then run, *
#
# A slice without a lesion has an empty list of true boxes. Which of the five losses are exactly 0 on it?
# Let `zero_losses()` return a set of their names. Write down your reasons before you run the check.
#
# Hint: for each loss ask which examples it sums over, and whether there are any.


# %% tags=["starter"]
def zero_losses():
    raise NotImplementedError('a set such as {"loss_mask", "loss_objectness"}')


# %% tags=["solution"]
# @title Solution
def zero_losses():
    return {"loss_rpn_box_reg", "loss_box_reg", "loss_mask"}


healthy, healthy_mask = make_slice(3, 0, size, position=0.5)  # a control
nothing = mask_to_targets(healthy_mask, config.lesions, preset.min_area)
nothing = {name: value.to(device) for name, value in nothing.items()}
control = torch.from_numpy(healthy).expand(3, -1, -1).to(device)
torch.manual_seed(SEED)
empty = copy.deepcopy(detector).train()([control], [nothing])
for name, value in empty.items():
    print(f"{name:17} {value.item():.4f}")


# %% tags=["wrong"]
def zero_losses():
    return set(losses)  # "nothing to learn from a healthy slice"


# %% tags=["wrong"]
def zero_losses():
    return {"loss_mask"}


# %% tags=["wrong"]
def zero_losses():
    return {"loss_rpn_box_reg", "loss_box_reg", "loss_mask", "loss_classifier"}


# %% tags=["check"]
# @title Check your answer
pixels, codes = make_slice(3, 0, size, position=0.5)
no_truth = mask_to_targets(codes, config.lesions, preset.min_area)
no_truth = {name: value.to(device) for name, value in no_truth.items()}
slices = [torch.from_numpy(pixels).expand(3, -1, -1).to(device)]
seen = copy.deepcopy(detector).train()(slices, [no_truth])
for name, value in seen.items():
    assert (value == 0) == (name in zero_losses()), (
        f"Think about {name} again: does it need an anchor or a region that counts as "
        "lesion, or does background take part in it?"
    )

# %% [markdown] tags=["answer"]
# Without a lesion there is no box and no mask to learn. In the other two losses every target is
# "background", so a healthy slice teaches the detector where not to look. The segmentation set of the paper
# holds COVID-19 patients only; some of their slices show no lesion. The released code skips those in
# training, ours does not.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Beta
#
# Kind: experiment, **
#
# Compute the box loss of the box head on the drawn RoIs (`box_error`), with $\beta$ set to 0, 1/9 and 1 in
# turn. What share of the deltas lies in the parabola? What does a large $\beta$ do to the gradients of boxes
# that are nearly right?
#
# Hint: `box_error.detach().requires_grad_(True)`, then `torch.autograd.grad`.

# %% tags=["solution"]
# @title Solution
error = box_error.detach().requires_grad_(True)  # [lesions, 4]
for beta in (0, 1 / 9, 1):
    loss = smooth_l1(error, beta).sum() / len(rois)
    (pull,) = torch.autograd.grad(loss, error)
    inside = (error.abs() < beta).float().mean()
    print(f"beta {beta:.2f}: loss {loss:.3f}, {inside:.0%} in the", end=" ")
    print(f"parabola, gradient {pull.norm():.3f}")

# %% [markdown] tags=["answer"]
# In the parabola the gradient is $e / \beta$ instead of 1. With $\beta = 1$, the released code's
# choice for the box head, a delta that is off by 0.1 pulls ten times less than under L1. (When we ran
# it, 94 % of the deltas lay in that parabola, and their gradient was half as large as under L1.) Remember the
# factors 10, 10, 5, 5: for a shift, 0.1 is a hundredth of the proposal's width.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · The same rule at the paper's size
#
# Kind: experiment, ***
#
# Anchor sizes are pixels of the network's image. The paper resizes slices to 512 pixels and keeps the sizes
# 2 to 32. Label the anchors of our old friend at 512 pixels, on four maps with strides 4 to 32. How good is the
# best anchor of each lesion, how many anchors count as lesion, and by which rule?
#
# Hint: labelling needs no network, only anchors. `AnchorGenerator(sizes, ratios)` takes a tuple for each map, and
# its `grid_anchors` takes the grid sizes and the strides of the maps. `old_friend(512)` draws the slice.

# %% tags=["solution"]
# @title Solution
paper = PRESETS["paper"]
settings = paper.detector
truth_512 = mask_to_targets(old_friend(512)[1], settings.lesions, paper.min_area)
boxes_512 = truth_512["boxes"]
four = AnchorGenerator((settings.anchor_sizes,) * 4, (settings.anchor_ratios,) * 4)
grids = [[512 // stride] * 2 for stride in (4, 8, 16, 32)]
steps = [[torch.tensor(stride)] * 2 for stride in (4, 8, 16, 32)]
anchors_512 = torch.cat(four.grid_anchors(grids, steps))
threshold = settings.rpn_iou[0]
labels_512, lesion_512 = label_anchors(anchors_512, boxes_512, *settings.rpn_iou)
overlap_512 = box_iou(boxes_512, anchors_512)
print(f"{len(anchors_512):,} anchors, threshold {threshold} (one phantom)")
for k, label in enumerate(truth_512["labels"].tolist()):
    x1, y1, x2, y2 = boxes_512[k].int().tolist()
    own = int(((labels_512 == 1) & (lesion_512 == k)).sum())
    print(f"{names[label]:4}{x2 - x1:3} x {y2 - y1:3} pixels:", end=" ")
    print(f"best IoU {overlap_512[k].max():.2f}, {own:3} anchors")
chosen = labels_512 == 1
extra = (overlap_512.amax(dim=0)[chosen] < threshold).float().mean()
print(f"{int(chosen.sum())} anchors count as lesion,", end=" ")
print(f"{extra:.0%} of them by the extra rule")

# %% [markdown] tags=["answer"]
# The larger lesions have outgrown the anchors: when we ran it, the best IoU of a lesion was 0.29 to 0.59, at
# a threshold of 0.7, and all 136 anchors that count as lesion did so by the extra rule. Where no anchor comes near the threshold, the extra rule steps
# in, and then it does more than it should: *every* anchor of the largest area that lies wholly inside the lesion
# has the same IoU, so all of them are "the best", and all count as lesion. Their deltas must stretch a small
# box to the whole lesion. Training can learn large deltas, but anchors are there to make that unnecessary.
#
# This is one phantom. But a GGO of 2 % of the slice, the range of the paper's Figure 1, has a box at least 72
# pixels wide or high at this size, so it is worth a check on real masks.

# %% [markdown]
# ## What we learned
#
# 1. IoU with the truth labels each anchor and each region as lesion, background or left out.
# 2. Only a sample counts, since background would otherwise drown the lesions.
# 3. Deltas are learned by lesion anchors and lesion regions only, as errors of encoded numbers.
# 4. Five losses: objectness and deltas in the RPN; class, deltas and mask in the heads.
# 5. All five teach the backbone, each head learns from its own, and no gradient passes through the proposals.
#
# ## Further reading
#
# - {cite:t}`Ren2015` describe how anchors are labelled and sampled; {cite:t}`Girshick2015` introduces smooth L1
#   and the two losses of the box head; {cite:t}`He2017` add the loss of the mask.
# - {cite:t}`TerSarkisov2020`, section 3.1, name the losses; [paper v code](paper_v_code.ipynb) lists where the
#   released code differs.
# - [Chapter 5](05_segmenter.ipynb) minimises the sum of these losses, from random weights.
