# %% [markdown]
# # 6 · From detections to a feature vector
#
# A detector returns a list of boxes, long for one slice and empty for another. A classifier reads a
# vector whose length never changes. How does such a list become one vector of fixed length that
# also describes a healthy slice? In this chapter we build that vector number by number.
#
# **After it you can**
#
# - name each of the $5N$ numbers that the classifier reads, and say where it comes from;
# - decode a box by hand, and say why the *encoded* box goes into the vector;
# - explain why boxes with very low scores are kept, and overlapping ones, too;
# - say what the vector leaves out;
# - tell which weights of the detector a loss on the vector can reach.
#
# **You need** [chapter 2](02_region_proposals.ipynb) (proposals, RoIs, box head) and a look at [chapter
# 5](05_segmenter.ipynb) (non-maximum suppression). The notebook runs alone. **Run time:** about 20
# seconds on two CPU cores in the preset `quick`; 41 seconds on a GPU (H200) that other chapters
# used, too.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a picture made by formulas and random numbers. No
# number below is a result on patients, and nothing here is for diagnosis.
# ```

# %% tags=["fold"]
# @title Imports and versions
import math
import platform
from dataclasses import replace

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from matplotlib.patches import Rectangle
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import (
    HEIGHT,
    Lesion,
    make_patient,
    make_slice,
    old_friend,
    render,
)
from covidmask.interactive import frame_slider
from covidmask.models import (
    author_padding,
    covid_ct_mask_net,
    encoded_rows,
    even_padding,
    pad_rows,
    propose,
    rank_boxes,
    run_box_head,
    same_size_groups,
    set_regime,
    trained_classifier,
    trained_segmenter,
)
from covidmask.models.ranked_boxes import ranked_boxes

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU, too, all digits of float32 count
torch.backends.cudnn.allow_tf32 = False
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"torchvision {torchvision.__version__}, Python {platform.python_version()}")

# %% [markdown]
# The preset sets the size of the pictures and of the models, and how they were trained. `quick`
# comes with trained weights. For another preset, train both models first, for example with
# `covidmask train segmenter --preset colab` and `covidmask train classifier --preset colab`.

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0

# %% [markdown]
# ## The question
#
# We load the trained detector of [chapter 5](05_segmenter.ipynb) and put the classifier of the
# paper {cite:p}`TerSarkisov2020` on top of it. What this chapter needs from the settings is $N$,
# the number of boxes that a slice keeps.

# %% tags=["nbval-check-output"]
preset = PRESETS[PRESET]
config = preset.classifier
segmenter = trained_segmenter(PRESET, device, shipped=True)
model = covid_ct_mask_net(segmenter, config)
detector, n = model.detector, config.n_boxes
print(f"N = {n}, thresholds: score {config.score}, NMS {config.nms}")

# %% [markdown]
# We follow three slices: our old friend, a patient with common pneumonia and a control. The
# detector has seen none of these patients. It was trained on lesions of COVID-19 phantoms only, as
# the paper's was on COVID-19 patients {cite:p}`Zhang2020`, so pneumonia is new to it.

# %%
size = preset.phantoms.size


def model_input(image):
    """float32 [H, W] -> [3, H, W] on the device."""
    return torch.from_numpy(image).expand(3, -1, -1).to(device)


grey = [
    make_slice(3006, 0, size)[0],
    make_slice(3010, 1, size)[0],
    old_friend(size)[0],
]
slices = [model_input(image) for image in grey]
names = ["control", "pneumonia", "old friend"]  # image classes 0, 1, 2

# %% mystnb={"image": {"alt": "Three synthetic chest slices in the lung window, each with two dark lungs and bright vessels around a white heart, in a wall of ribs, muscle and fat: a control, a common pneumonia and our old friend. Boxes mark what the detector found, and the titles count them."}, "figure": {"caption": "What the detector reports when it is asked for boxes with a score above 0.5: a list whose length differs from slice to slice. GGO solid, consolidation (C) dashed. Synthetic."}}
with torch.no_grad():
    # the detector's own output: scores above 0.05 only
    detections = segmenter(slices)
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for ax, image, name, found in zip(axes, grey, names, detections, strict=True):
    sure = found["scores"] > 0.5
    boxes_only = {k: found[k][sure].cpu() for k in ("boxes", "labels")}
    _ = plotting.show_lesions(image, boxes_only, ax)
    _ = ax.set_title(f"{name}: {int(sure.sum())} boxes")
plt.show()

# %% [markdown]
# A linear layer cannot read such a list. There are two easy ways out, and both have a price. An
# average over the boxes forgets how many there are, and it does not exist for an empty list. A grid
# that marks where the lesions lie has a fixed size, but it has many cells, and there are few slices
# to learn from.
#
# The paper takes a third way: it keeps the same number of boxes for every slice, orders them by
# score and writes them one after the other. It takes seven steps:
#
# | step | what happens | shape |
# |---|---|---|
# | 1 | the box head looks at $P$ proposals | logits $[P, 3]$, deltas $[P, 12]$ |
# | 2 | softmax, drop the background, flatten | $[2P]$, $[2P, 4]$ |
# | 3 | decode, clip, drop boxes of no area | $[2P, 4]$ |
# | 4 | threshold the scores at $-0.01$ | $[2P]$ |
# | 5 | suppress near copies within a class | $[K]$ |
# | 6 | keep the best $N$, as score and *encoded* box | $[N, 5]$ |
# | 7 | flatten | $[5N]$ |
#
# ## Step 1: what the box head says
#
# The RPN proposes $P$ boxes. RoIAlign cuts out the features of each, and the box head gives two
# answers: one logit for each class, and four numbers for each class that say how to move and resize
# the proposal. We stop the detector right there.

# %%
friend = slices[2]
heads = detector.roi_heads
with torch.no_grad():
    # normalised, resized, padded to multiples of 32
    batch, _ = detector.transform([friend])
    features = detector.backbone(batch.tensors)
    proposals, _ = detector.rpn(batch, features)  # one tensor per image
    # [P, channels, 7, 7]
    pooled = heads.box_roi_pool(features, proposals, batch.image_sizes)
    # [P, 3], [P, 12]
    logits, deltas = heads.box_predictor(heads.box_head(pooled))
proposal = proposals[0]  # [P, 4], x1 y1 x2 y2 in pixels
p = len(proposal)
print("proposals", tuple(proposal.shape))
print("logits   ", tuple(logits.shape))
print("deltas   ", tuple(deltas.shape))

# %% [markdown]
# The twelve columns of the deltas are *class-major*: four for the background, four for GGO, four
# for C. The first four are never used. The loss of the boxes reads only the deltas of the true
# class of a proposal, and a background proposal has no true box, so nothing trains them. Here are
# the three proposals that look most like a lesion to the detector.

# %%
per_class = deltas.reshape(p, 3, 4)  # [P, class, delta]
assert torch.equal(per_class[:, 1], deltas[:, 4:8])  # GGO is columns 4 to 7
most = (logits[:, 1:].max(dim=1).values - logits[:, 0]).topk(3).indices
print("RoI   background    GGO      C   GGO: dx     dy     dw     dh")
for i in most.tolist():
    none, *lesion = logits[i].tolist()
    print(
        f"{i:3} {none:12.2f}",
        *(f"{value:6.2f}" for value in lesion),
        "  ",
        *(f"{value:6.2f}" for value in per_class[i, 1]),
    )

# %% [markdown]
# ## Step 2: scores, RoI-major
#
# A softmax over *all three* classes makes probabilities. Then the column of the background is
# dropped. This leaves two scores for each RoI. They need not sum to 1: the rest is the detector's
# belief that there is nothing.
#
# From here on we treat "RoI 7 as GGO" and "RoI 7 as C" as two candidates. Flattening row by row
# puts them side by side. A toy table shows the order, which we need to find our way back:

# %% tags=["nbval-check-output"]
toy = [[f"RoI {i} as {name}" for name in ("GGO", "C")] for i in range(3)]
for place, candidate in enumerate(np.array(toy).flatten()):
    number, code = place // 2, place % 2 + 1
    print(f"position {place}: {candidate} = RoI {number}, label {code}")

# %%
probability = logits.softmax(dim=1)  # [P, 3]
scores = probability[:, 1:].flatten()  # [2P]
lesion_deltas = per_class[:, 1:].reshape(-1, 4)  # [2P, 4]
index = torch.arange(2 * p, device=device)
roi, label = index // 2, index % 2 + 1  # [2P], [2P]: 1 GGO, 2 C

# %% [markdown]
# So one RoI can occupy two rows of the final vector, one per lesion class. Here is the RoI whose
# lower lesion score is the highest. If the detector is torn between the two kinds anywhere, as it
# may be where a consolidation has a rim of ground glass, it is here.

# %%
torn = int(probability[:, 1:].min(dim=1).values.argmax())
print(f"RoI {torn}: background {probability[torn, 0]:.3f}, ", end="")
print(f"GGO {probability[torn, 1]:.3f}, C {probability[torn, 2]:.3f}")
print(f"positions {2 * torn} and {2 * torn + 1} of {2 * p}")

# %% [markdown]
# ## Step 3: decode
#
# Let a proposal have the centre $(p_x, p_y)$, the width $p_w$ and the height $p_h$, and let the box
# that it should become be $(b_x, b_y, b_w, b_h)$. The detector is trained to output the *encoded*
# box
#
# $$\delta_x = 10\,\frac{b_x - p_x}{p_w}, \quad \delta_y = 10\,\frac{b_y - p_y}{p_h}, \quad
# \delta_w = 5\,\log\frac{b_w}{p_w}, \quad \delta_h = 5\,\log\frac{b_h}{p_h}.$$
#
# The shift is measured in sizes of the proposal, the size as a log ratio. The factors 10 and 5 are
# the *coder weights*. If a proposal is off by a tenth of its size, they bring this to the order of
# 1, which suits the output of a network.
#
# Decoding is the inverse, with one safeguard: $\delta_w / 5$ is cut at $\log(1000/16)$ before the
# exponential, so that a wild output cannot become an infinite box.
#
# $$b_x = p_x + p_w\,\delta_x / 10, \qquad
# b_w = p_w\,\exp\bigl(\min(\delta_w / 5,\ \log(1000/16))\bigr)$$

# %%
CODER_WEIGHTS = torch.tensor([10.0, 10.0, 5.0, 5.0], device=device)
CLAMP = math.log(1000 / 16)


def encode(boxes, proposals):
    """[M, 4], [M, 4] -> [M, 4]: how far boxes are from proposals."""
    b_size = boxes[:, 2:] - boxes[:, :2]
    p_size = proposals[:, 2:] - proposals[:, :2]
    b_centre = boxes[:, :2] + b_size / 2
    p_centre = proposals[:, :2] + p_size / 2
    shift, growth = (b_centre - p_centre) / p_size, (b_size / p_size).log()
    return torch.cat([shift, growth], dim=1) * CODER_WEIGHTS


def decode(deltas, proposals):
    """[M, 4], [M, 4] -> [M, 4]: the proposals, moved and resized."""
    raw = deltas / CODER_WEIGHTS
    p_size = proposals[:, 2:] - proposals[:, :2]  # [M, 2]
    p_centre = proposals[:, :2] + p_size / 2
    centre = p_centre + raw[:, :2] * p_size
    size = raw[:, 2:].clamp(max=CLAMP).exp() * p_size
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


# %% [markdown]
# We check three things on made-up boxes: decoding undoes encoding; the code stays the same when
# proposal and box move together or grow together; and the safeguard holds.

# %% tags=["nbval-check-output"]
# a proposal of 20 x 10 pixels
small = torch.tensor([[10.0, 10.0, 30.0, 20.0]], device=device)
# twice as wide, further right
true = torch.tensor([[12.0, 10.0, 52.0, 20.0]], device=device)
code = encode(true, small)
assert torch.allclose(decode(code, small), true, atol=1e-4)
again = encode(3 * true + 40, 3 * small + 40)
assert torch.allclose(again, code, atol=1e-4)
wild = decode(torch.tensor([[0.0, 0.0, 1000.0, 0.0]], device=device), small)
print("encoded:", *(f"{value:.2f}" for value in code[0].tolist()))
width = (wild[0, 2] - wild[0, 0]).item()
print(f"a delta of 1000 widens 20 pixels to {width:.0f}, not more")

# %% [markdown]
# Now the boxes of our old friend. Each candidate uses the proposal of its own RoI and the deltas of
# its own class. Then the boxes are clipped to the slice. A box that lies outside is clipped to
# nothing, and one of a proposal without height stays without height. Boxes without an area are
# dropped.

# %%
box = decode(lesion_deltas, proposal[roi])  # [2P, 4]
same = heads.box_coder.decode(deltas, [proposal])[:, 1:].reshape(-1, 4)
# torchvision's decoder gives the same
assert torch.allclose(box, same, atol=1e-3)
box = clip_boxes_to_image(box, batch.image_sizes[0])
area = (box[:, 2:] - box[:, :2]).prod(dim=1)
index = index[area > 0]
print(f"{len(index)} of {2 * p} candidates have an area")


# %% mystnb={"image": {"alt": "Left: the old friend with all proposals as thin yellow boxes. Right: a zoom on one lesion with the proposal dotted and the two decoded boxes, GGO solid and C dashed."}, "figure": {"caption": "All proposals of the old friend (left), and one of them with the two boxes that it decodes to, one per lesion class (right, enlarged). Synthetic."}}
def frame(ax, corners, **style):
    """Draw one box, given in pixels."""
    x1, y1, x2, y2 = corners.tolist()
    place = x1 - 0.5, y1 - 0.5
    ax.add_patch(Rectangle(place, x2 - x1, y2 - y1, fill=False, **style))


best = int(scores.argmax()) // 2  # the RoI with the best score
fig, axes = plt.subplots(1, 2, figsize=(9, 4.3), layout="constrained")
for ax in axes:
    _ = plotting.show_slice(grey[2], ax)
for corners in proposal:
    frame(axes[0], corners, edgecolor=plotting.YELLOW, lw=0.5)
_ = axes[0].set_title(f"P = {p} proposals")
styles = {"proposal": dict(edgecolor=plotting.YELLOW, ls=":", lw=2)}
for k, kind in enumerate(("GGO", "C")):
    styles[f"{kind}, score {probability[best, k + 1]:.3f}"] = dict(
        edgecolor=plotting.LESION_COLOURS[k],
        ls=plotting.LESION_LINES[k],
        lw=2,
    )
shown = [proposal[best], box[2 * best], box[2 * best + 1]]
for corners, (name, style) in zip(shown, styles.items(), strict=True):
    frame(axes[1], corners, label=name, **style)
x1, y1 = torch.stack(shown)[:, :2].amin(0)
x2, y2 = torch.stack(shown)[:, 2:].amax(0)
middle, half = ((x1 + x2) / 2, (y1 + y2) / 2), 0.9 * max(x2 - x1, y2 - y1)
_ = axes[1].set(
    title=f"RoI {best}",
    xlim=(float(middle[0] - half), float(middle[0] + half)),
    ylim=(float(middle[1] + half), float(middle[1] - half)),
)
_ = axes[1].legend(loc="upper right", fontsize="small")
plt.show()

# %% [markdown]
# ## Step 4: a threshold that removes nothing
#
# A detector that reports lesions drops candidates with a score below 0.05. The classifier sets the
# threshold to $-0.01$. A softmax is never negative, so every candidate passes. (Why not 0? The
# comparison is strict, and a very small probability is rounded to 0.)

# %% tags=["nbval-check-output"]
index = index[scores[index] > config.score]
print("dropped by the threshold:", int((scores <= config.score).sum()))

# %% [markdown]
# Why keep boxes that the detector itself does not believe in? Look at the sorted scores of our
# three slices. (`propose` and `run_box_head` of the package do step 1 for a batch.)

# %%
with torch.no_grad():
    maps, proposed, shapes = propose(detector, slices)
    all_logits, all_deltas = run_box_head(detector, maps, proposed, shapes)
all_scores = []  # three of [2P]
for part in all_logits:
    all_scores.append(part.softmax(dim=1)[:, 1:].flatten())
print("candidates with a score above   -0.01    0.05     0.5")
for name, values in zip(names, all_scores, strict=True):
    above = [int((values > score).sum()) for score in (-0.01, 0.05, 0.5)]
    print(f"{name:27}", *(f"{count:8}" for count in above))

# %% mystnb={"image": {"alt": "Sorted scores of all candidates on a logarithmic axis, one falling curve for each of the three slices, with horizontal lines at 0.05 and 0.5."}, "figure": {"caption": "All candidate scores of the three slices, sorted, on a logarithmic axis. The two horizontal lines are common thresholds. A control has a curve, too. Synthetic."}}
ax = plotting.get_ax(7, 4)
for k, values in enumerate(all_scores):
    falling = values.sort(descending=True).values.cpu()
    ranks = np.arange(1, len(falling) + 1)
    _ = ax.plot(
        ranks,
        falling,
        color=plotting.CLASS_COLOURS[k],
        ls=plotting.CLASS_LINES[k],
        lw=2,
        label=names[k],
    )
for threshold in (0.05, 0.5):
    _ = ax.axhline(threshold, color=plotting.BLACK, lw=0.8)
    _ = ax.text(len(falling), threshold * 1.15, f"{threshold}", ha="right")
_ = ax.set(
    xlabel="Candidates, best first (count)",
    ylabel="Score (no unit)",
    yscale="log",
    ylim=(1e-9, 3),
)
_ = ax.legend()
plt.show()

# %% [markdown]
# Look at the control. Where a threshold leaves no candidate, the list is empty, and there is
# nothing to classify. (The last section counts how many controls this happens to.) Without a
# threshold every slice has hundreds of candidates, and a control has a curve of its own. It
# describes the slice: how much the best places in these lungs look like a lesion (a vessel or a
# scar may do so), and how soon the scores fall after them. That is worth knowing about a healthy
# slice, too. The paper gives this reason, and adds that the *ranking* of weak boxes is a pattern
# which the classifier can learn {cite:p}`TerSarkisov2020`.
#
# One could also fill an empty list with zeros, but the weak scores tell more. Two slices whose best
# boxes have the scores 0.04 and 0.001 would get the same zeros, and the first may hold a faint
# lesion of a kind that the detector was not trained on.
#
# ## Step 5: near copies
#
# Many candidates mark the same lesion. Non-maximum suppression (NMS) walks down the list by score
# and drops each box whose intersection over union (IoU) with a better one of the *same class* is
# above a threshold. It compares decoded boxes, because two boxes at opposite ends of the slice may
# have the same deltas.

# %%
def nms_by_hand(boxes, scores, threshold):
    """Positions of the boxes that stay, best first."""
    order, kept = scores.argsort(descending=True, stable=True), []
    while len(order):
        first, rest = order[:1], order[1:]
        kept.append(first)
        overlap = box_iou(boxes[first], boxes[rest])[0]  # [rest]
        order = rest[overlap <= threshold]
    return torch.cat(kept)


survivors = []
for kind in (1, 2):  # GGO and C do not suppress each other
    mine = index[label[index] == kind]
    survivors.append(mine[nms_by_hand(box[mine], scores[mine], config.nms)])
survivors = torch.cat(survivors)
order = scores[survivors].argsort(descending=True, stable=True)
survivors = survivors[order]  # [K]


def library_nms(threshold):
    """The same by torchvision's batched_nms."""
    kept = batched_nms(box[index], scores[index], label[index], threshold)
    return index[kept]


assert torch.equal(survivors, library_nms(config.nms))
print(f"{len(index)} candidates, {len(survivors)} survive")

# %% [markdown]
# The threshold 0.75 is high: only near copies are dropped. The default of torchvision's detectors
# is 0.5, which leaves fewer boxes per object. Move the slider and watch two numbers: how many boxes
# survive in all, and how many of the $N$ best have a score above 0.5. White outlines are the true
# lesions.

# %%
# 0 background, 1 lung, 2 GGO, 3 consolidation
friend_mask = old_friend(size)[1]
in_lungs = np.argwhere(friend_mask > 0)  # rows and columns
y_low, x_low = in_lungs.min(axis=0)
y_high, x_high = in_lungs.max(axis=0)


def lungs_of_friend():
    """A figure of the old friend's lungs; true lesions are outlined."""
    fig, ax = plt.subplots(figsize=(4.2, 3.4), layout="constrained")
    plotting.show_slice(grey[2], ax)
    ax.contour(friend_mask >= 2, [0.5], colors="white", linewidths=0.8)
    edge = 0.03 * size
    ax.set(
        xlim=(x_low - edge, x_high + edge),
        ylim=(y_high + edge, y_low - edge),
    )
    return ax


def draw_nms(threshold):
    """The N best boxes of the old friend that survive this threshold."""
    left = library_nms(threshold)
    top = left[:n]
    ax = lungs_of_friend()
    for i in top.tolist():
        k, sure = int(label[i]) - 1, bool(scores[i] > 0.5)
        frame(
            ax,
            box[i],
            edgecolor=plotting.LESION_COLOURS[k],
            ls=plotting.LESION_LINES[k],
            lw=1.6 if sure else 0.5,
        )
    sure = int((scores[top] > 0.5).sum())
    survive = f"{len(left)} of {len(index)} survive"
    title = f"{survive}; {sure} of the {len(top)} best above 0.5"
    ax.set_title(title, fontsize=9)


thresholds = (0.05, 0.25, 0.5, 0.75, 1.0)
frames = []
for threshold in thresholds:
    draw_nms(threshold)
    frames.append(plt.gcf())
frame_slider(
    frames,
    [f"{threshold}" for threshold in thresholds],
    "NMS threshold",
    "The old friend with its best boxes, thick where the score is above "
    "0.5; the title counts the boxes that survive",
    caption="Old friend: the best boxes after NMS. GGO solid blue, C "
    "dashed orange, thick where the score is above 0.5; white: true "
    "lesions. A higher threshold leaves more copies. Synthetic.",
    start=thresholds.index(0.75),
    dpi=70,
)

# %% [markdown]
# The next cell gives the same drawing at any threshold; it needs a running notebook.

# %% tags=["remove-output"]
_ = ipywidgets.interact(
    draw_nms,
    threshold=ipywidgets.FloatSlider(
        value=0.75, min=0.05, max=1, step=0.05, continuous_update=False
    ),
)

# %% [markdown]
# Why does the paper want copies? Most slices have few and small lesions. At a low threshold such a
# slice has one or two high scores, and its other rows may look like those of a control. At 0.75 a
# lesion (or what the detector takes for one) can fill several rows, so the *length* of the high
# part of the curve hints at how much lesion there is. The paper reports that overlapping boxes with
# high scores raise the sensitivity for COVID-19, at some cost in accuracy
# {cite:p}`TerSarkisov2020`. It prints no numbers for other thresholds;
# [chapter 11](11_what_makes_it_work.ipynb) makes the comparison on phantoms. Here is what the
# threshold does to the curves.

# %% mystnb={"image": {"alt": "Two panels with scores by rank for the three slices, at the NMS thresholds 0.25 and 0.75; curves that start high stay high for more ranks at 0.75."}, "figure": {"caption": "Scores by rank of the three slices at two NMS thresholds. Copies stretch the part with high scores. Synthetic."}}
fig, axes = plt.subplots(
    1,
    2,
    figsize=(10, 3.6),
    layout="constrained",
    sharey=True,
)
for ax, threshold in zip(axes, (0.25, config.nms), strict=True):
    for k, name in enumerate(names):
        ranking = rank_boxes(
            all_logits[k],
            all_deltas[k],
            proposed[k],
            shapes[k],
            heads.box_coder,
            replace(config, nms=threshold),
        )
        _ = ax.plot(
            np.arange(1, len(ranking.score) + 1),
            ranking.score.cpu(),
            lw=2,
            color=plotting.CLASS_COLOURS[k],
            ls=plotting.CLASS_LINES[k],
            label=name,
        )
    _ = ax.set(
        xlabel="Rank of the box (1 is the best score)",
        title=f"NMS at {threshold}",
    )
_ = axes[0].set_ylabel("Score (no unit)")
_ = axes[1].legend()
plt.show()

# %% [markdown]
# ## Step 6: the rows
#
# We keep the best $N$ of the survivors, GGO and C in one common ranking. Each becomes a row
#
# $$r = (s,\ \delta_x,\ \delta_y,\ \delta_w,\ \delta_h).$$
#
# The deltas are the outputs of the network as they are: before the division by the coder weights,
# before the exponential, before the clipping. The score comes first, as in the released code. The
# decoded boxes were needed for NMS alone.

# %%
top = survivors[:n]  # [N]
rows = torch.cat([scores[top, None], lesion_deltas[top]], dim=1)  # [N, 5]
print("rows", tuple(rows.shape))
print("rank  score     dx     dy     dw     dh   not in the row")
for i, candidate in enumerate(top[:5].tolist()):
    kind = ("GGO", "C")[int(label[candidate]) - 1]
    numbers = " ".join(f"{value:6.2f}" for value in rows[i])
    print(f"{i + 1:4} {numbers}   RoI {int(roi[candidate])} as {kind}")
twice = len(top) - len(roi[top].unique())
print(f"RoIs that occupy two of the {len(top)} rows: {twice}")


# %%
def draw_rank(rank):
    """The box at this rank, its proposal, and its row."""
    i = int(top[rank - 1])
    k = int(label[i]) - 1
    ax = lungs_of_friend()
    frame(
        ax,
        box[i],
        edgecolor=plotting.LESION_COLOURS[k],
        ls=plotting.LESION_LINES[k],
        lw=2.5,
        label=f"decoded as {('GGO', 'C')[k]}",
    )
    look = {"edgecolor": plotting.YELLOW, "ls": ":", "lw": 2}
    frame(ax, proposal[roi[i]], **look, label="proposal")
    ax.legend(loc="upper right", fontsize="small")
    numbers = ", ".join(f"{value:.2f}" for value in rows[rank - 1].tolist())
    ax.set_title(f"rank {rank}: [{numbers}]", fontsize=9)


ranks = sorted({round(float(r)) for r in np.geomspace(1, len(top), 6)})
frames = []
for rank in ranks:
    draw_rank(rank)
    frames.append(plt.gcf())
frame_slider(
    frames,
    [f"{rank}" for rank in ranks],
    "Rank",
    "The old friend with the proposal (dotted) and the decoded box of one "
    "rank; the title prints the row",
    caption="Old friend: which box stands at which rank, with the true "
    "lesions outlined in white. The title is the row that enters the "
    "vector. Synthetic.",
    dpi=70,
)

# %% [markdown]
# Some boxes repeat a lesion, and others lie where there is none, perhaps on a vessel, a scar or
# dependent density. Where such a box scores high, an error of the detector has entered the vector.
#
# The next cell shows every rank; it needs a running notebook.

# %% tags=["remove-output"]
_ = ipywidgets.interact(
    draw_rank,
    rank=ipywidgets.IntSlider(value=1, min=1, max=len(top), continuous_update=False),
)

# %% [markdown]
# ### Why encoded boxes?
#
# Compare the two forms over the rows of all three slices. Decoded corners range over the whole
# slice, and on a slice with four times as many pixels a side they would range four times as far. A
# linear layer would have to add up inputs of the order of 100 and a score below 1. Encoded boxes
# have values of the order of 1 at any image size. The paper calls this a form of normalisation.

# %% mystnb={"image": {"alt": "Two panels of box plots. Left: the four encoded deltas lie within a few units of zero. Right: the four decoded corners range over the whole width of the slice."}, "figure": {"caption": "The same boxes in both forms, over the ranked boxes of the three slices: encoded (left) and decoded (right), with median and quartiles. Synthetic."}}
rankings = [
    rank_boxes(*parts, heads.box_coder, config)
    for parts in zip(all_logits, all_deltas, proposed, shapes, strict=True)
]
encoded = torch.cat(
    [
        encoded_rows(lo[r.roi], de[r.roi], r.label)[:, 1:]
        for lo, de, r in zip(all_logits, all_deltas, rankings, strict=True)
    ]
).cpu()  # [3N, 4]
decoded = torch.cat([r.box for r in rankings]).cpu()  # [3N, 4]
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
median = {"color": plotting.VERMILLION}
_ = axes[0].boxplot(encoded.numpy(), medianprops=median)
_ = axes[0].set_xticks(range(1, 5), ["dx", "dy", "dw", "dh"])
_ = axes[0].set(title="encoded", xlabel="Delta", ylabel="Value (no unit)")
_ = axes[1].boxplot(decoded.numpy(), medianprops=median)
_ = axes[1].set_xticks(range(1, 5), ["x1", "y1", "x2", "y2"])
_ = axes[1].set(title="decoded", xlabel="Corner", ylabel="Pixels")
plt.show()

# %%
for name, values in (("encoded", encoded), ("decoded", decoded)):
    print(
        f"{name}: from {values.min():6.2f} to {values.max():6.2f}, "
        f"standard deviation {values.std():6.2f}"
    )

# %% [markdown]
# ### What the rows do not tell
#
# A code that does not change when box and proposal move together cannot say where they are. We can
# test this on phantoms with *one* GGO each, at a place and of a size that we choose. First comes
# the same patient twice, with the lesion in one lung and in the other.

# %%
def one_lesion(seed, x, y, radius):
    """A control with one GGO; x, y, radius in image sides from the middle."""
    centre, radii = (x, y, HEIGHT / 2), (radius, radius, 0.08)
    lesion = Lesion(2, centre, radii, 0.0, 280.0, 0.015, ((0, 0),) * 3)
    patient = replace(make_patient(seed, 0), lesions=(lesion,))
    return render(patient, 0.5, size)


def candidates_of(picture):
    """Logits, deltas, proposals and size of one image [3, H, W]."""
    with torch.no_grad():
        maps, found, shapes = propose(detector, [picture])
        logits, deltas = run_box_head(detector, maps, found, shapes)
    return logits[0], deltas[0], found[0], shapes[0]


def rows_of(candidates):
    """Ranking, and rows [K, 5], of what `candidates_of` gives."""
    ranking = rank_boxes(*candidates, heads.box_coder, config)
    logits, deltas = (part[ranking.roi] for part in candidates[:2])
    return ranking, encoded_rows(logits, deltas, ranking.label)


def best_box(image):
    """Row and decoded box at rank 1."""
    ranking, rows = rows_of(candidates_of(model_input(image)))
    return rows[0].cpu(), ranking.box[0].cpu()


# %% mystnb={"image": {"alt": "The same synthetic slice twice, with a grey lesion in the lung on the left of the picture, then in the lung on the right. A frame marks the best box, and the titles print two rows of five numbers."}, "figure": {"caption": "One patient, one lesion, two places. The titles are the rows at rank 1. Which of their numbers would say left or right? Synthetic."}}
fig, axes = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
for ax, x in zip(axes, (-0.2, 0.2), strict=True):
    image, _ = one_lesion(5010, x, 0.05, 0.07)
    row, corners = best_box(image)
    _ = plotting.show_slice(image, ax)
    frame(ax, corners, edgecolor=plotting.SKY_BLUE, lw=2)
    _ = ax.set_title(
        "[" + ", ".join(f"{value:.2f}" for value in row.tolist()) + "]",
        fontsize=10,
    )
plt.show()

# %% [markdown]
# The rows differ, as those of any two lesions do. Two slices prove little, so we draw two hundred,
# each of another patient with a lesion somewhere else. Does any number of the first row follow the
# place of the lesion?

# %%
rng = np.random.default_rng(SEED)
truth, first_rows, centres = [], [], []
seed = 5100
while len(truth) < 200:
    seed += 1
    x = rng.choice([-1, 1]) * rng.uniform(0.13, 0.27)
    y, radius = rng.uniform(-0.1, 0.17), rng.uniform(0.045, 0.09)
    image, mask = one_lesion(seed, x, y, radius)
    inside_y, inside_x = np.nonzero(mask == 2)
    # the pleura left almost nothing of it
    if len(inside_x) < 0.002 * size**2:
        continue
    row, corners = best_box(image)
    truth.append([inside_x.mean(), inside_y.mean(), len(inside_x) ** 0.5])
    first_rows.append(row.numpy())
    centres.append(((corners[:2] + corners[2:]) / 2).numpy())
truth, first_rows = np.array(truth), np.array(first_rows)
centres = np.array(centres)

# [3, 7]
correlation = np.corrcoef(np.c_[truth, first_rows, centres].T)[:3, 3:]
print("lesion        score     dx     dy     dw     dh | decoded x      y")
for name, line in zip(("x", "y", "size"), correlation, strict=True):
    numbers = [f"{value:6.2f}" for value in line]
    print(f"{name:12}", *numbers[:5], "|", *(f"{v:>8}" for v in numbers[5:]))
assert abs(correlation[0, 1]) < correlation[0, 5]
assert abs(correlation[1, 2]) < correlation[1, 6]
in_row = (correlation[:2, :5] ** 2).max()
decoded_share = correlation[0, 5] ** 2
print(f"one number of the row explains at most {in_row:.0%} of the")
print(f"variance of x or y, the decoded x {decoded_share:.0%} of that of x")

# %% mystnb={"image": {"alt": "Two scatter plots against the true horizontal place of the lesion. Left: the encoded shift dx, a cloud for lesions in either half. Right: the centre of the decoded box, for most lesions close to the diagonal."}, "figure": {"caption": "Two hundred phantoms with one lesion each. The encoded shift of the best box hardly follows the place of the lesion (left); the decoded box does (right). Synthetic."}}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
x = truth[:, 0]
_ = axes[0].scatter(x, first_rows[:, 1], s=14, color=plotting.BLUE)
_ = axes[0].set(
    xlabel="Lesion, x (pixels)",
    ylabel="dx of rank 1 (no unit)",
    title="in the row",
)
look = {"color": plotting.VERMILLION, "marker": "s"}
_ = axes[1].scatter(x, centres[:, 0], s=14, **look)
_ = axes[1].plot([0, size], [0, size], color=plotting.BLACK, lw=0.8)
_ = axes[1].set(
    xlabel="Lesion, x (pixels)",
    ylabel="Centre of its box, x (pixels)",
    title="not in the row",
)
plt.show()

# %% [markdown]
# The decoded centre follows the lesion, except where the best box sits on a look-alike. No number
# of the row follows it like that. With two hundred slices, chance alone rarely gives a correlation
# beyond $1.96 / \sqrt{200} = 0.14$, so where the table has a larger one, that number does depend on
# the place: the tissue around a lesion is not the same everywhere, so score and shape may vary with
# it. But the printed share of the variance tells you how little one could learn from it about where
# a lesion is. So what do $N$ rows hold, and what do they lack?
#
# - **They hold** how lesion-like the best places are, how fast that falls with rank, and how far
#   each proposal was from the box that the detector wants. The last is at best a hint of shape and
#   size, because size is measured against a proposal that we do not know.
# - **They lack** the place, apart from such traces. COVID-19 tends to lie at the periphery and in
#   both lungs, and no row says so.
# - **They lack** the lesion class. GGO and C share one ranking without a mark, though their mix
#   differs between the diseases.
#
# The paper works with exactly these rows. [Chapter 11](11_what_makes_it_work.ipynb) adds what is
# missing and measures whether it helps.
#
# ## Step 7: one vector
#
# We flatten the rows one after the other. Number $j$ of the row at rank $i$ (both from 0) lands at
# position $5i + j$. So it is the order by score that gives each input of the classifier a fixed
# meaning, such as "the score at rank 3" or "the width delta at rank 3".

# %% tags=["nbval-check-output"]
# enough boxes survived; the next section deals with fewer
assert len(rows) == n
vector = rows.flatten()  # [5N]
assert vector[5 * 2 + 0] == rows[2, 0] and vector[5 * 2 + 3] == rows[2, 3]
print(tuple(rows.shape), "->", tuple(vector.shape))

# %% [markdown]
# Now we compare our vector with the package's, and with what arrives at the first layer of the
# module $S$. A hook catches the input of that layer.

# %% tags=["nbval-check-output"]
caught = []
hook = model.s.fc_scores.register_forward_pre_hook(
    lambda layer, inputs: caught.append(inputs[0])
)  # fmt: skip
with torch.no_grad():
    package = ranked_boxes(detector, [friend], config)  # [1, N, 5]
    _ = model([friend])  # logits [1, 3]; S has random weights here
hook.remove()
assert torch.allclose(package[0], rows, atol=1e-4)
assert torch.allclose(caught[0][0], vector, atol=1e-4)
print("ranked_boxes gives", tuple(package.shape))
print("S reads           ", tuple(caught[0].shape))
print("the same numbers as by hand")

# %% [markdown]
# ## When there are not enough boxes
#
# So far more than $N$ boxes survived. There can be fewer: NMS may be strict, the picture small, or
# the RPN may have little to propose. We count the survivors in some phantoms, and compare them with
# our $N$ and the paper's.

# %%
crowd = [make_slice(6000 + i, i % 3, size)[0] for i in range(30)]
parts = [candidates_of(model_input(image)) for image in crowd]
many = PRESETS["paper"].classifier.n_boxes
print(f"{len(crowd)} phantoms")
print(f"NMS    survivors K      slices with K < {n}    K < {many}")
for threshold in (0.05, 0.25, 0.75):
    loose = replace(config, n_boxes=100_000, nms=threshold)
    ranked = [rank_boxes(*part, heads.box_coder, loose) for part in parts]
    counts = np.array([len(ranking.roi) for ranking in ranked])
    print(
        f"{threshold:4} {counts.min():6} to {counts.max():4} "
        f"{(counts < n).sum():20} {(counts < many).sum():10}"
    )

# %% [markdown]
# A vector of fixed length must then be filled up. Rows of zeros at its end would be input of
# another kind: a score of exactly 0 and no shift, which no real box has. So both the released code
# and the package repeat boxes, each *in its place*, so that the scores still fall with rank.
#
# For a small example we let the box head see only six proposals of the old friend.

# %%
few, sizes = [proposal[:6]], batch.image_sizes
with torch.no_grad():
    some_logits, some_deltas = run_box_head(detector, features, few, sizes)
_, some_rows = rows_of((some_logits[0], some_deltas[0], few[0], sizes[0]))
k = len(some_rows)
print(
    f"K = {k} boxes for N = {n} rows; scores",
    *(f"{s:.3f}" for s in some_rows[:, 0].tolist()),
)

# %% [markdown]
# **Even padding**, the package's default: row $i$ shows box $\lfloor iK/N \rfloor$. Each box is
# shown $\lfloor N/K \rfloor$ or $\lceil N/K \rceil$ times. By hand, for 3 boxes and 8 rows:

# %% tags=["nbval-check-output"]
print([i * 3 // 8 for i in range(8)])
assert even_padding(3, 8).tolist() == [i * 3 // 8 for i in range(8)]

# %%
by_hand = torch.stack([some_rows[i * k // n] for i in range(n)])  # [N, 5]
assert torch.equal(by_hand, pad_rows(some_rows, n))
assert (by_hand[1:, 0] <= by_hand[:-1, 0]).all()  # the scores still fall

# %% [markdown]
# **The author's padding**, in the released code: draw $K - 1$ of the positions $1, \dots, N - 2$ at
# random, sort them, and let the next box start at each. Every box is used and the order stays. But
# the draw is made afresh at every call, even at inference, so the same slice gives another vector
# each time. The package offers this rule with a generator that you pass.

# %% mystnb={"image": {"alt": "Three strips of coloured runs, one cell per row of the vector, each run labelled with its box number. Even padding has runs of nearly equal length; the two random draws have runs of very different lengths."}, "figure": {"caption": "Which box fills which row when there are fewer boxes than rows: even padding, and two draws of the author's random rule. Synthetic."}}
def start_of_runs(which):
    """Positions at which the shown box changes."""
    inner = range(1, len(which))
    return [0, *(i for i in inner if which[i] != which[i - 1])]


fills = {"even": even_padding(k, n)}
for seed in (1, 2):
    generator = torch.Generator().manual_seed(seed)
    fills[f"author, seed {seed}"] = author_padding(k, n, generator)
ax = plotting.get_ax(9, 2.6)
_ = ax.imshow(
    torch.stack(list(fills.values())),
    cmap="cividis",
    aspect="auto",
    interpolation="nearest",
)
for line, which in enumerate(fills.values()):
    for i in start_of_runs(which):
        number = int(which[i])
        _ = ax.text(
            i,
            line,
            number + 1,
            ha="center",
            va="center",
            color="white" if number < k / 2 else "black",
        )
        ends = [line - 0.5, line + 0.5]
        _ = ax.plot([i - 0.5, i - 0.5], ends, color="white", lw=1)
_ = ax.set_yticks(range(3), fills)
_ = ax.set(xlabel="Row of the vector (from 0)", ylabel="Padding")
plt.show()

# %% [markdown]
# Does it matter? We give these fillings to the trained classifier of the preset: the same slice,
# the same boxes, the same weights.

# %%
trained_s = trained_classifier(PRESET, device, shipped=True).s
print("probability of     control  pneumonia  COVID-19   prediction")
with torch.no_grad():
    for name, which in fills.items():
        answer = trained_s(some_rows[which.to(device)][None]).sigmoid()[0]
        predicted = IMAGE_CLASSES[int(answer.argmax())]
        numbers = " ".join(f"{value:9.2f}" for value in answer.tolist())
        print(f"{name:17} {numbers}    {predicted}")
assert not torch.equal(fills["author, seed 1"], fills["author, seed 2"])

# %% [markdown]
# As the table above shows, slices of the preset `quick` seldom need padding at 0.75, so $S$ has
# hardly met padded vectors and none of these answers is worth much. What matters is how far the two
# draws of the author's rule lie apart. A result that changes from call to call cannot be
# reproduced, and nobody could tell a user why it changed.
#
# And what if there is no box at all? The released code fails on such a slice. The package gives
# zeros: score 0 and no shift. To see this we need a threshold that no score passes:

# %% tags=["nbval-check-output"]
impossible = replace(config, score=2.0)
with torch.no_grad():
    nothing = ranked_boxes(detector, [friend], impossible)
print(tuple(nothing.shape), "not zero:", int(nothing.count_nonzero()))

# %% [markdown]
# ## Batches
#
# Training needs several slices at once. Does a slice get the same rows in a batch as alone? For
# slices of one size, yes, up to rounding. The detector stays in eval mode, so batch normalisation
# uses stored statistics and no slice sees its neighbours.

# %%
with torch.no_grad():
    together = model.ranked_boxes(slices)  # [3, N, 5]
    alone = torch.cat([model.ranked_boxes([picture]) for picture in slices])
difference = (together - alone).abs().max()
print(f"largest difference, together v alone: {difference:.0e}")
assert (together[..., 0] - alone[..., 0]).abs().max() < 1e-2

# %% [markdown]
# Slices of different sizes are another matter. A batch is one tensor, so the smaller slice is
# padded to the larger one. The padding is 0 *after* normalisation, which is a mid-grey strip beside
# darker air, and convolutions carry it into the slice. Here the old friend shares a batch with a
# slice that is a quarter wider.

# %%
wide = torch.nn.functional.pad(slices[0], (0, size // 4))  # [3, S, 1.25 S]
with torch.no_grad():
    # one padded batch
    maps, found, shapes_ = propose(detector, [friend, wide])
    lo, de = run_box_head(detector, maps, found, shapes_)
    _, mixed = rows_of((lo[0], de[0], found[0], shapes_[0]))
    grouped = model.ranked_boxes([friend, wide])[0]
mixed = pad_rows(mixed, n)
print(f"proposals of the friend: {p} alone, {len(found[0])} in the batch")
print("largest difference of a score from the old friend alone:")
print(f"mixed batch {(mixed - rows)[:, 0].abs().max():.2f}, ", end="")
print(f"package {(grouped - rows)[:, 0].abs().max():.0e}")

# %% [markdown]
# So the package sorts a batch by size and runs each group on its own:

# %% tags=["nbval-check-output"]
sizes = [(3, size, size), (3, size, size + size // 4), (3, size, size)]
print("groups:", same_size_groups([torch.empty(shape) for shape in sizes]))

# %% [markdown]
# ## Gradients
#
# When we train more than $S$, the loss of the classifier must reach the detector through the rows.
# Which weights does it reach? We sum all rows of the old friend and run backwards.

# %% tags=["nbval-check-output"]
_ = set_regime(model, "full")  # every weight may learn
model.zero_grad()
model.ranked_boxes([friend]).sum().backward()
groups = {
    "backbone: ResNet": detector.backbone.body,
    "backbone: FPN": detector.backbone.fpn,
    "RPN": detector.rpn,
    "box head": heads.box_head,
    "class logits": heads.box_predictor.cls_score,
    "box deltas": heads.box_predictor.bbox_pred,
    "S": model.s,
}
for name, part in groups.items():
    gradients = [w.grad for w in part.parameters() if w.grad is not None]
    reached = "yes" if any(g.any() for g in gradients) else "no"
    total = sum(w.numel() for w in part.parameters())
    print(f"{name:17} {total:9,} parameters, gradient: {reached}")

# %% [markdown]
# Everything between picture and rows has a gradient, except the RPN. torchvision *detaches* the
# proposals: it treats them as constants, as in the approximate joint training of {cite:t}`Ren2015`.
# (Their non-approximate form differentiates by the boxes, too.) In a detector the RPN has losses of
# its own, so it learns all the same. The classifier has no such loss, so its RPN never changes,
# even when "all" weights train. ($S$ has no gradient here because we stopped at the rows.)
#
# Ranking and NMS have no gradient either. They choose which rows exist and in what order; the
# gradient then flows through the numbers in the chosen rows. In `bbox_pred`, for instance, the four
# outputs of the background get no gradient at all:

# %% tags=["nbval-check-output"]
# per class
reach = heads.box_predictor.bbox_pred.weight.grad.reshape(3, -1)
reach = reach.abs().amax(dim=1)
print("background deltas:", "some" if reach[0] > 0 else "no", "gradient")

# %% [markdown]
# ### The same gradient for less work
#
# Only the $N$ kept boxes enter the sum, but a plain forward pass builds a graph over all $P$
# proposals, and runs backwards through all of them. At full scale that is 1,000 RoIs for at most
# 256 rows. The choice needs no gradient, so we can choose first without one, then run the box head
# once more on the chosen RoIs alone, and differentiate that. Here are both ways:

# %%
def plain_way():
    """Differentiate every proposal, then pick rows."""
    maps, found, shapes = propose(detector, [friend])
    logits, deltas = run_box_head(detector, maps, found, shapes)
    with torch.no_grad():
        ranking = rank_boxes(logits[0], deltas[0], found[0], shapes[0], heads.box_coder, config)
    rows = encoded_rows(logits[0][ranking.roi], deltas[0][ranking.roi], ranking.label)
    return rows, len(found[0])


def short_way():
    """Pick first, then differentiate what was picked."""
    maps, found, shapes = propose(detector, [friend])
    with torch.no_grad():
        logits, deltas = run_box_head(detector, maps, found, shapes)
        ranking = rank_boxes(logits[0], deltas[0], found[0], shapes[0], heads.box_coder, config)
    # [K, 4]; a RoI that serves both classes is here twice
    kept = [found[0][ranking.roi]]
    logits, deltas = run_box_head(detector, maps, kept, shapes)
    return encoded_rows(logits[0], deltas[0], ranking.label), len(kept[0])


weight = heads.box_head.fc6.weight
gradients = []
for way in (plain_way, short_way):
    model.zero_grad()
    graph_rows, rois = way()
    graph_rows.sum().backward()
    gradients.append(weight.grad.clone())
    print(f"{way.__name__.replace('_', ' ')}: {rois} RoIs in the graph")
difference = (gradients[0] - gradients[1]).abs().max()
difference = difference / gradients[0].abs().max()
print(f"relative difference of the gradient: {difference:.0e}")
assert difference < 1e-5
model.zero_grad()

# %% [markdown]
# The package takes the short way whenever a gradient is needed, and
# [chapter 8](08_three_regimes.ipynb) trains with it.
#
# ## Three slices as S sees them
#
# Now we can look at the three matrices together. Each column is one of our rows, turned upright, so
# the first line holds the scores.

# %% mystnb={"image": {"alt": "Three heat maps of five lines each: control, common pneumonia, old friend. In each the score line fades from left to right, and its largest score is printed beside it."}, "figure": {"caption": "The ranked boxes of a control (top), a common pneumonia (middle) and the old friend (bottom). Each line is divided by its largest magnitude, which is printed beside it. Synthetic."}}
fig, axes = plt.subplots(3, 1, figsize=(9, 7.5), layout="constrained")
for ax, matrix, name in zip(axes, together.cpu(), names, strict=True):
    _ = plotting.ranked_box_matrix(matrix, ax)
    _ = ax.set_title(name)
plt.show()

# %% [markdown]
# Three slices may not be typical, so we take twenty new phantoms of each class. The last three
# columns are means over slices, with half the width of a 95 % interval.

# %%
labels = torch.arange(3).repeat_interleave(20)
sample = []
for i, label_ in enumerate(labels.tolist()):
    sample.append(model_input(make_slice(7000 + i, label_, size)[0]))
with torch.no_grad():
    tens = [sample[i : i + 10] for i in range(0, 60, 10)]
    matrices = torch.cat([model.ranked_boxes(ten) for ten in tens]).cpu()
print(f"{'':17} best > 0.05  > 0.5   rows > 0.5       dw             dh")
for c, name in enumerate(IMAGE_CLASSES):
    group = matrices[labels == c]  # [20, N, 5]
    best_scores = group[:, 0, 0]
    counts = [int((best_scores > score).sum()) for score in (0.05, 0.5)]
    sure = (group[..., 0] > 0.5).sum(dim=1, keepdim=True).float()
    values = torch.cat([sure, group[..., 3:].mean(dim=1)], dim=1)  # [20, 3]
    half = 1.96 * values.std(dim=0) / len(group) ** 0.5
    pairs = zip(values.mean(dim=0), half, strict=True)
    means = "".join(f"{mean:8.2f} ± {h:4.2f}" for mean, h in pairs)
    print(f"{name:18} {counts[0]:11} {counts[1]:6} {means}")

# %% mystnb={"image": {"alt": "Mean score against rank for twenty phantoms of each class, one falling curve with a quantile band for each class."}, "figure": {"caption": "Scores by rank over twenty new phantoms of each class, with the band from the 25 to the 75 percent quantile. Synthetic."}}
_ = plotting.score_by_rank(matrices, labels, plotting.get_ax(7, 4))
plt.show()

# %% [markdown]
# Compare the mean curves at rank 1, and how fast they fall: where they differ, there is a pattern
# that $S$ can learn. Where the bands overlap, scores alone do not settle a slice. The table also
# counts the controls whose best box scores above 0.05, and those in which something, perhaps a
# vessel or a scar, looks so much like a lesion that it scores above 0.5.
#
# The deltas may differ between the classes as well. A positive mean says that the detector enlarges
# the proposals of such slices, a negative one that it shrinks them. Where the intervals of two
# classes overlap widely, twenty slices cannot tell them apart. How much $S$ gets from scores and
# how much from deltas is a question for [chapter 11](11_what_makes_it_work.ipynb).
#
# Keep in mind that these are slices. In the real data every sick slice was chosen because it shows
# lesions {cite:p}`Gunraj2020`, and the vector knows nothing about the patient around it.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Find the number
#
# Kind: experiment, **
#
# Position 17 of the vector, counted from 0: which rank (from 1, as in the figures), and which of
# the five numbers? Write the function and its inverse, and check both on all positions.

# %% tags=["solution"]
# @title Solution


def meaning(position):
    """Rank (from 1) and name of the number at this position of the vector."""
    return position // 5 + 1, plotting.BOX_NUMBERS[position % 5]


def position_of(rank, name):
    """The inverse."""
    return 5 * (rank - 1) + plotting.BOX_NUMBERS.index(name)


assert all(position_of(*meaning(i)) == i for i in range(5 * n))
assert vector[17] == rows[3, 2]
print("position 17: rank {}, {}".format(*meaning(17)))

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Move the whole slice
#
# Kind: experiment, **
#
# Put the old friend on a black canvas twice as wide, a quarter of a slice from its left end, and
# once more a quarter of a slice from its right end. Compare the ranked boxes of the two, decoded
# and encoded.

# %% tags=["solution"]
# @title Solution


def on_canvas(left):
    """The old friend, `left` pixels from the left end of a canvas twice as wide."""
    return torch.nn.functional.pad(friend, (left, size - left))


(left, rows_l), (right, rows_r) = (
    rows_of(candidates_of(on_canvas(s))) for s in (size // 4, 3 * size // 4)
)
moved = (right.box - left.box)[:, 0].median()
print(f"decoded: moved by {moved:.1f} pixels (median), the slice by {size // 2}")
print(f"encoded: median difference {(rows_r - rows_l).abs().median():.0e}")
print(f"to the control, for comparison: {(rows_l - together[0]).abs().median():.2f}")
assert abs(moved - size / 2) < 2

# %% [markdown] tags=["answer"]
# A convolution treats every place alike, so the features move with the slice, and so do proposals
# and boxes. The code of a box against its proposal stays the same. The shift is a multiple of the
# stride; otherwise the features would be sampled elsewhere and the rows would change a little. A
# few rows far down may swap places, because their scores are almost equal.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Rows per lesion
#
# Kind: experiment, **
#
# For how many of the $N$ rows of the old friend does the centre of the box lie inside a lesion, at
# NMS thresholds of 0.25 and of 0.75? How many different lesions get at least one row with a score
# above 0.5? Which of the two thresholds makes better use of its rows?

# %% tags=["solution"]
# @title Solution
from scipy.ndimage import label as regions

# [H, W]: lesion number, 0 outside; GGO and C together
separate, count = regions(friend_mask >= 2)
for threshold in (0.25, 0.75):
    r = rank_boxes(
        all_logits[2],
        all_deltas[2],
        proposed[2],
        shapes[2],
        heads.box_coder,
        replace(config, nms=threshold),
    )
    middle = ((r.box[:, :2] + r.box[:, 2:]) / 2).long().clamp(max=size - 1).cpu()
    on = separate[middle[:, 1], middle[:, 0]]  # [K]
    sure = np.unique(on[(r.score > 0.5).cpu().numpy() & (on > 0)])
    print(
        f"NMS {threshold}: {(on > 0).sum()} of {len(on)} rows on a lesion, "
        f"{len(sure)} of {count} lesions with a score above 0.5"
    )

# %% [markdown] tags=["answer"]
# A higher threshold lets more rows repeat what is known, and a lower one leaves more rows for other
# places. Neither is better in itself: it depends on what $S$ makes of them, and on how large $N$
# is.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · The author's rule, on average
#
# Kind: experiment, **
#
# Draw the author's padding 2,000 times for $K = 6$ and $N = 32$. How often is each box shown, on
# average? Explain the result.

# %% tags=["solution"]
# @title Solution
generator = torch.Generator().manual_seed(SEED)
copies = torch.stack(
    [torch.bincount(author_padding(6, 32, generator), minlength=6) for _ in range(2000)]
).float()  # [2000, 6]
print("mean:   ", *(f"{value:.2f}" for value in copies.mean(0).tolist()))
print("minimum:", *(f"{value:.0f}" for value in copies.amin(0).tolist()))
print("even:   ", *torch.bincount(even_padding(6, 32)).tolist())
expected = torch.full((6,), 31 / 6)
expected[-1] += 1
assert (copies.mean(0) - expected).abs().max() < 0.5 and copies[:, -1].min() >= 2

# %% [markdown] tags=["answer"]
# Five random starts cut the $N - 1$ places into six pieces of equal mean length, $31/6$, and the
# last box gets one row more, because no box may start at the last place. So even padding does about
# what the author's rule does on average, without leaving anything to chance.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · A sixth number
#
# Kind: experiment, **
#
# The rows do not say whether a box is GGO or C. Compute the share of C among the first ten rows of
# each of the sixty phantoms above, for each image class. Would a sixth column be worth a try?

# %% tags=["solution"]
# @title Solution
shares = []
for picture in sample:
    ranking, _ = rows_of(candidates_of(picture))
    shares.append(float((ranking.label[:10] == 2).float().mean()))
for c, name in enumerate(IMAGE_CLASSES):
    share = np.array(shares)[labels.numpy() == c]
    print(
        f"{name:18} C among the first 10 rows: mean {share.mean():.0%}, "
        f"quartiles {np.quantile(share, 0.25):.0%} to {np.quantile(share, 0.75):.0%} (phantoms)"
    )

# %% [markdown] tags=["answer"]
# Look at the quartiles before you compare the means: where those of two classes overlap, this share
# alone does not tell them apart. And a share is only a coarse summary. Whether $S$ makes more of
# the class of each row is tested in [chapter 11](11_what_makes_it_work.ipynb).

# %% [markdown]
# ## What we learned
#
# 1. Each RoI gives one candidate per lesion class; the best $N$ become rows of score and encoded box.
# 2. No score is too low, so a healthy slice has a ranking of its own.
# 3. Decoded boxes serve NMS alone; a threshold of 0.75 lets one lesion fill several rows.
# 4. Encoded boxes are of order 1 at any image size; they hold at most traces of the place, and do
#    not name the lesion class.
# 5. Gradients reach backbone and box head, never the RPN, and only the kept boxes need them.
#
# ## Further reading
#
# The construction is section 3.2 of {cite:t}`TerSarkisov2020`. Proposals, box encoding and both
# forms of joint training are in {cite:t}`Ren2015`, RoIAlign in {cite:t}`He2017`. In [chapter
# 7](07_covid_ct_mask_net.ipynb) $S$ reads the vector.

