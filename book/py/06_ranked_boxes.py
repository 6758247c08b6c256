# %% [markdown]
# # 6 · From detections to a feature vector
#
# A detector returns a list of boxes, which is long for one slice and empty for another. A classifier
# reads a vector whose length never changes. The idea at the heart of the paper is a bridge between
# the two, and in this chapter we build it number by number.
#
# **How does a list of boxes become one vector of fixed length that describes a healthy slice,
# too?**

# %% tags=["fold"] mystnb={"image": {"alt": "Three heat maps side by side: the scores of all proposals with three columns, their deltas with twelve columns, and the 32 ranked rows with five columns. Lines lead from five frames in the first two to five rows of the third. A long strip below shows the rows one after the other."}, "figure": {"caption": "The whole chapter in one picture, with the real numbers of one slice. Each proposal has three scores and twelve deltas (top left and middle). The best candidates become rows of one score and four deltas (top right), and the rows, one after the other, are the vector (bottom). Columns that are crossed out are never used. Synthetic."}}
# @title Imports, versions, and the picture of the chapter
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import ConnectionPatch, Rectangle
from scipy.ndimage import label as regions
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.ops import batched_nms, clip_boxes_to_image

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


def draw_path(logits, deltas, ranking, rows):
    """Scores [P, 3] and deltas [P, 12] -> rows [N, 5] -> vector [5N], as one figure."""
    fig = plt.figure(figsize=(9, 6.4), layout="constrained")
    grid = fig.add_gridspec(2, 3, width_ratios=(3, 8, 6), height_ratios=(9, 1))
    left, middle, right = (fig.add_subplot(grid[0, k]) for k in range(3))
    strip = fig.add_subplot(grid[1, :])
    blue = {"cmap": "Blues", "vmin": 0, "vmax": 1}
    puor = {"cmap": "PuOr", "vmin": -3, "vmax": 3}
    look = {"aspect": "auto", "interpolation": "nearest"}
    score, delta = np.full(rows.shape, np.nan), rows.copy()
    score[:, 0], delta[:, 0] = rows[:, 0], np.nan
    _ = left.imshow(logits.softmax(dim=1).numpy(), **blue, **look)
    _ = middle.imshow(deltas.numpy(), **puor, **look)
    bar = {"ax": right, "location": "right", "fraction": 0.08, "pad": 0.03}
    parts = ((score, blue, "Score (no unit)"), (delta, puor, "Delta (no unit)"))
    for values, colours, says in parts:
        drawn = right.imshow(values, **colours, **look)
        _ = strip.imshow(values.reshape(1, -1), **colours, **look)
        _ = fig.colorbar(drawn, label=says, **bar)
    for r in range(1, len(rows)):
        _ = strip.axvline(5 * r - 0.5, color="black", lw=0.4)
    p, n = len(logits), len(rows)
    for ax, width in ((left, 1), (middle, 4)):  # cross out the background
        for ends in ([-0.5, p - 0.5], [p - 0.5, -0.5]):
            _ = ax.plot([-0.5, width - 0.5], ends, color="black", lw=1)
        _ = ax.set(xlim=(-0.5, 3 * width - 0.5), ylim=(p - 0.5, -0.5))
    for rank in (0, 4, 8, 12, 16):
        roi, kind = int(ranking.roi[rank]), int(ranking.label[rank])
        place = {"fill": False, "edgecolor": plotting.VERMILLION, "lw": 1.2}
        _ = left.add_patch(Rectangle((kind - 0.5, roi - 1), 1, 2, **place))
        _ = middle.add_patch(Rectangle((4 * kind - 0.5, roi - 1), 4, 2, **place))
        ends = {"xyA": (4 * kind + 3.5, roi), "xyB": (-0.5, rank), "coordsA": "data"}
        ends |= {"coordsB": "data", "axesA": middle, "axesB": right}
        _ = fig.add_artist(ConnectionPatch(**ends, color=plotting.VERMILLION))
    names = ("background", "GGO", "C")
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    _ = left.set_xticks(range(3), names, **turned)
    _ = middle.set_xticks([1.5, 5.5, 9.5], names)
    _ = right.set_xticks(range(5), ["s", "dx", "dy", "dw", "dh"])
    _ = left.set(title=f"scores\n{p} × 3", ylabel="Proposal (number)")
    says = f"four deltas of each class\n{p} × 12"
    _ = middle.set(title=says, yticks=[])
    _ = right.set(title=f"the best, ranked\n{n} × 5", ylabel="Rank (from 0)")
    says = f"Position in the vector: {n} rows of 5 make {5 * n} numbers"
    _ = strip.set(xlabel=says, yticks=[])


quick, shipped = PRESETS["quick"], trained_segmenter("quick", device, shipped=True)
picture = torch.from_numpy(old_friend(quick.phantoms.size)[0]).to(device)
with torch.no_grad():
    maps, found, shapes = propose(shipped, [picture.expand(3, -1, -1)])
    lo, de = (part[0] for part in run_box_head(shipped, maps, found, shapes))
coder = shipped.roi_heads.box_coder
chosen = rank_boxes(lo, de, found[0], shapes[0], coder, quick.classifier)
matrix = encoded_rows(lo[chosen.roi], de[chosen.roi], chosen.label)
draw_path(lo.cpu(), de.cpu(), chosen, matrix.cpu().numpy())
plt.show()

# %% [markdown]
# **After it you can**
#
# - name each of the $5N$ numbers that the classifier reads, and say where it comes from;
# - explain why boxes with very low scores stay, and overlapping ones, too;
# - say why the box is written down *encoded*, and what happens when there are too few boxes;
# - find out what the vector leaves out, and say which weights a loss on it can reach.
#
# **You need** proposals and NMS ([chapter 2](02_region_proposals.ipynb)), the box head ([chapter
# 3](03_roi_heads.ipynb)) and a look at [chapter 5](05_segmenter.ipynb). **Time:** reading 25
# minutes, exercises 40 minutes, running about 1 minute on two CPU cores in the preset `quick`.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*, made by formulas and random numbers. No number below
# is a result on patients, and nothing here is for diagnosis.
# ```
#
# The preset sets the scale, and much else: in `quick` the learning rates, the weight decay, some IoU
# thresholds and the $\beta$ of the box losses are not the paper's, either. Presets other than `quick`
# need both models trained first ([chapters 5](05_segmenter.ipynb) and [8](08_three_regimes.ipynb)).

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0

# %% tags=["nbval-check-output"]
preset = PRESETS[PRESET]
config = preset.classifier
segmenter = trained_segmenter(PRESET, device, shipped=True)
model = covid_ct_mask_net(segmenter, config)  # detector, then S
detector, n = model.detector, config.n_boxes
heads = detector.roi_heads
print(f"N = {n}, thresholds: score {config.score}, NMS {config.nms}")

# %% [markdown]
# ## Three slices, three lists
#
# We follow a control, a common pneumonia and our old friend, which shows COVID-19. The detector has
# seen none of them. It was trained on lesions of COVID-19 phantoms only, as the paper's was on
# COVID-19 patients {cite:p}`Zhang2020`, so pneumonia is new to it. This is what it reports when we
# ask for scores above 0.5:

# %% tags=["fold"] mystnb={"image": {"alt": "Three synthetic chest slices in the lung window, each with two dark lungs and bright vessels around a white heart: a control, a common pneumonia and our old friend. Boxes mark what the detector found, and the titles count them."}, "figure": {"caption": "Boxes with a score above 0.5: a list whose length differs from slice to slice. GGO solid, consolidation (C) dashed. Synthetic."}}
# @title Draw the three slices and the boxes that the detector reports
size = preset.phantoms.size


def model_input(image):
    """float32 [H, W] -> [3, H, W] on the device."""
    return torch.from_numpy(image).expand(3, -1, -1).to(device)


grey = [make_slice(3006, 0, size)[0], make_slice(3010, 1, size)[0], old_friend(size)[0]]
friend_mask = old_friend(size)[1]  # 0 background, 1 lung, 2 GGO, 3 C
slices = [model_input(image) for image in grey]
names = ["control", "pneumonia", "old friend"]  # image classes 0, 1, 2
with torch.no_grad():
    detections = segmenter(slices)  # the detector's own output: scores above 0.05 only
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
for ax, image, name, found in zip(axes, grey, names, detections, strict=True):
    sure = found["scores"] > 0.5
    boxes_only = {k: found[k][sure].cpu() for k in ("boxes", "labels")}
    _ = plotting.show_lesions(image, boxes_only, ax)
    _ = ax.set_title(f"{name}: {int(sure.sum())} boxes")
plt.show()

# %% [markdown]
# A linear layer cannot read such lists. We could average over the boxes, but an average forgets how
# many there are, and an empty list has none. The paper {cite:p}`TerSarkisov2020` keeps the same number
# of boxes for *every* slice, orders them by score, and writes them one after the other:
#
# | step | what happens | shape |
# |---|---|---|
# | 1 | the box head looks at $P$ proposals | logits $[P, 3]$, deltas $[P, 12]$ |
# | 2 | softmax, drop the background, flatten | $[2P]$, $[2P, 4]$ |
# | 3 | decode, clip, drop boxes of no area | $[2P, 4]$ |
# | 4 | threshold the scores at $-0.01$ | $[2P]$ |
# | 5 | NMS at 0.75 within each lesion class | $[K]$ |
# | 6 | keep the best $N$, as score and *encoded* box | $[N, 5]$ |
# | 7 | flatten | $[5N]$ |
#
# ## Steps 1 and 2: candidates
#
# The RPN proposes $P$ boxes. For each one the box head gives three logits (background, GGO, C, in this
# order) and four deltas for each of the three. We stop the detector there. (The deltas of the
# background are never used: a background proposal has no true box from which they could learn.)

# %%
friend = slices[2]
with torch.no_grad():
    maps, proposals, shapes = propose(detector, [friend])
    logits, deltas = run_box_head(detector, maps, proposals, shapes)
logits, deltas, proposal = logits[0], deltas[0], proposals[0]
p = len(proposal)
print("proposals", tuple(proposal.shape))
print("logits   ", tuple(logits.shape))
print("deltas   ", tuple(deltas.shape))

# %% [markdown]
# A softmax over *all three* classes makes probabilities. Then the background is dropped, which
# leaves two scores for each proposal. They need not sum to 1, since the rest is the detector's
# belief that nothing is there. From here on "RoI 7 as GGO" and "RoI 7 as C" are two candidates, side
# by side, so that one RoI may fill two rows of the vector. (A proposal that has reached the box head
# is called a region of interest, RoI.)

# %%
probability = logits.softmax(dim=1)  # [P, 3]
scores = probability[:, 1:].flatten()  # [2P]
per_class = deltas.reshape(p, 3, 4)  # [P, class, delta]
lesion_deltas = per_class[:, 1:].reshape(-1, 4)  # [2P, 4]
index = torch.arange(2 * p, device=device)
roi, label = index // 2, index % 2 + 1  # [2P], [2P]: 1 GGO, 2 C
for i in range(4):
    kind = ("GGO", "C")[label[i] - 1]
    print(f"candidate {i}: RoI {roi[i]} as {kind:3}, score {scores[i]:.3f}")

# %% [markdown]
# ## Step 3: decode, for NMS alone
#
# Let a proposal have the centre $(x_p, y_p)$ and the sides $w_p, h_p$, and let the box that it
# should become have the centre $(x, y)$ and the sides $w, h$. The detector was trained to output the
# *encoded* box
#
# $$\delta_x = 10\,\frac{x - x_p}{w_p}, \quad \delta_y = 10\,\frac{y - y_p}{h_p}, \quad
# \delta_w = 5\,\log\frac{w}{w_p}, \quad \delta_h = 5\,\log\frac{h}{h_p}.$$
#
# So the shift is measured in sizes of the proposal, and the size as a log ratio. The factors, called
# *coder weights*, bring typical corrections to the order of 1. Decoding is the inverse; a very large
# $\delta_w / 5$ is cut at $\log(1000/16)$, so that the exponential cannot explode.

# %%
CODER_WEIGHTS = torch.tensor([10.0, 10.0, 5.0, 5.0], device=device)


def decode(deltas, proposals):
    """[K, 4], [K, 4] -> [K, 4]: the proposals, moved and resized."""
    raw = deltas / CODER_WEIGHTS
    p_size = proposals[:, 2:] - proposals[:, :2]  # [K, 2]
    p_centre = proposals[:, :2] + p_size / 2
    centre = p_centre + raw[:, :2] * p_size
    size = raw[:, 2:].clamp(max=math.log(1000 / 16)).exp() * p_size
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


box = decode(lesion_deltas, proposal[roi])  # [2P, 4]
theirs = heads.box_coder.decode(deltas, [proposal])[:, 1:]
assert torch.allclose(box, theirs.reshape(-1, 4), atol=1e-3)
box = clip_boxes_to_image(box, shapes[0])
area = (box[:, 2:] - box[:, :2]).prod(dim=1)
index = index[area > 0]
print(f"{len(index)} of {2 * p} candidates have an area")

# %% [markdown]
# ## Step 4: a threshold that removes nothing
#
# A detector that reports lesions drops what scores below 0.05. The classifier sets this threshold
# to $-0.01$, and as a softmax is never negative, every candidate passes. Why keep boxes in which
# the detector itself does not believe? Look at the scores of our three slices.

# %%
with torch.no_grad():
    maps, three, shapes3 = propose(detector, slices)
    logits3, deltas3 = run_box_head(detector, maps, three, shapes3)
all_scores = [part.softmax(dim=1)[:, 1:].flatten() for part in logits3]
print("candidates with a score above   -0.01    0.05     0.5")
for name, values in zip(names, all_scores, strict=True):
    above = [int((values > score).sum()) for score in (-0.01, 0.05, 0.5)]
    print(f"{name:27}", *(f"{count:8}" for count in above))

# %% tags=["fold"] mystnb={"image": {"alt": "Sorted scores of all candidates on a logarithmic axis, one falling curve for each of the three slices, with horizontal lines at 0.05 and 0.5."}, "figure": {"caption": "The scores of all candidates of the three slices, sorted. The horizontal lines are common thresholds. The control has a curve, too. Synthetic."}}
# @title Draw the sorted scores of the three slices
ax = plotting.get_ax(7, 3.8)
for k, values in enumerate(all_scores):
    falling = values.sort(descending=True).values.cpu()
    look = {"color": plotting.CLASS_COLOURS[k], "ls": plotting.CLASS_LINES[k], "lw": 2}
    _ = ax.plot(np.arange(1, len(falling) + 1), falling, label=names[k], **look)
for threshold in (0.05, 0.5):
    _ = ax.axhline(threshold, color=plotting.BLACK, lw=0.8)
    _ = ax.text(1, threshold * 1.15, f"{threshold}")
_ = ax.set(xlabel="Candidates, best first (count)", ylabel="Score (no unit)")
_ = ax.set(yscale="log", ylim=(1e-9, 3))
_ = ax.legend()
plt.show()

# %% [markdown]
# With 0.5 the control would have no row at all, and with 0.05 only a handful. Without a threshold
# it has hundreds of candidates and a curve of its own, which says how much the best places in these
# lungs look like a lesion (a vessel or a scar may), and how soon the scores fall after them. These
# are the paper's reasons: a healthy slice needs a description, too, and the *ranking* of weak boxes
# is a pattern that the classifier can learn; and the vector keeps its size. These are arguments,
# not measurements. On our phantoms a threshold of 0.05 with repeated boxes cannot be told apart
# from $-0.01$ ([chapter 11](11_what_makes_it_work.ipynb)).
#
# And why not 0, if no score is negative? Because the comparison is strict, `score > threshold`, and a
# computer rounds a very small probability to exactly 0. Such a candidate would be dropped, and the
# number of rows would depend on rounding. Any negative threshold avoids that.

# %% tags=["nbval-check-output"]
sure = torch.tensor([200.0, 0.0, 0.0])  # logits: surely background
tiny = sure.softmax(dim=0)[1].item()
print("score:", tiny)
print("passes at 0:    ", tiny > 0)
print("passes at -0.01:", tiny > config.score)

# %%
index = index[scores[index] > config.score]
dropped = int((scores <= config.score).sum())
print(f"dropped by -0.01: {dropped}; smallest score {scores.min():.0e}")

# %% [markdown]
# ## Step 5: near copies
#
# Many candidates mark the same lesion. NMS drops a box whose overlap (IoU) with a better one of the
# *same class* is above a threshold. It compares decoded boxes, since two boxes at opposite ends of
# the slice may have the same deltas. `batched_nms` does what we built in [chapter
# 2](02_region_proposals.ipynb), class by class.


# %%
def survivors_at(nms):
    """Candidates that survive NMS at this threshold, best first."""
    kept = batched_nms(box[index], scores[index], label[index], nms)
    return index[kept]


survivors = survivors_at(config.nms)  # [K]
print(f"{len(index)} candidates, {len(survivors)} survive {config.nms}")

# %% [markdown]
# The threshold 0.75 is high: only near copies go. Move the slider and watch two numbers: how many
# boxes survive, and how many of the best $N$ have a score above 0.5.

# %% tags=["fold"]
# @title Draw the best boxes of the old friend at five NMS thresholds
in_lungs = np.argwhere(friend_mask > 0)  # rows and columns
(y_low, x_low), (y_high, x_high) = in_lungs.min(axis=0), in_lungs.max(axis=0)


def frame(ax, corners, **style):
    """Draw one box, given in pixels."""
    x1, y1, x2, y2 = corners.tolist()
    ax.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, **style))


def lungs_of_friend():
    """A figure of the old friend's lungs; true lesions are outlined."""
    ax = plotting.show_slice(grey[2], plotting.get_ax(4.4, 3.6))
    ax.contour(friend_mask >= 2, [0.5], colors="white", linewidths=0.8)
    edge = 0.03 * size
    ax.set(xlim=(x_low - edge, x_high + edge), ylim=(y_high + edge, y_low - edge))
    return ax


def draw_nms(threshold):
    """The N best boxes of the old friend that survive this threshold."""
    left = survivors_at(threshold)
    ax, top = lungs_of_friend(), left[:n]
    for i in top.tolist():
        k, sure = int(label[i]) - 1, bool(scores[i] > 0.5)
        look = {"edgecolor": plotting.LESION_COLOURS[k], "ls": plotting.LESION_LINES[k]}
        frame(ax, box[i], lw=1.6 if sure else 0.5, **look)
    sure = int((scores[top] > 0.5).sum())
    title = f"{len(left)} of {len(index)} survive"
    title += f"\n{sure} of the best {len(top)} above 0.5"
    ax.set_title(title, fontsize=10)
    return ax.figure


thresholds = (0.05, 0.25, 0.5, 0.75, 1.0)
frame_slider(
    [draw_nms(threshold) for threshold in thresholds],
    [f"{threshold}" for threshold in thresholds],
    "NMS threshold",
    "The old friend with its best boxes, thick where the score is above 0.5",
    caption="The best boxes of the old friend after NMS: GGO solid, C dashed, thick "
    "where the score is above 0.5; white: true lesions. Synthetic.",
    start=thresholds.index(0.75),
    dpi=70,
)

# %% [markdown]
# One slice may not be typical, so we let the detector look at twenty new phantoms of each class,
# once, and rank their boxes at three thresholds. (`rank_boxes` is steps 2 to 6 in the package.)

# %%
labels = np.repeat([0, 1, 2], 20)
made = [make_slice(7000 + i, c, size) for i, c in enumerate(labels)]
parts = []  # logits, deltas, proposals and shape of each slice
for i in range(0, len(made), 10):
    batch = [model_input(image) for image, _ in made[i : i + 10]]
    with torch.no_grad():
        maps, found, at = propose(detector, batch)
        outputs = run_box_head(detector, maps, found, at)
    parts += zip(*outputs, found, at, strict=True)


def ranked(part, **changes):
    """Ranked boxes of a slice; `changes` of the paper's settings."""
    return rank_boxes(*part, heads.box_coder, replace(config, **changes))


sure_rows = {}  # NMS threshold -> [60]: rows with a score above 0.5
for nms in (0.25, 0.75, 1.0):
    rankings = [ranked(part, nms=nms) for part in parts]
    sure_rows[nms] = [int((r.score > 0.5).sum()) for r in rankings]


# %% tags=["fold"]
# @title Print how many rows score high at each NMS threshold
def mean_of(values):
    """The mean, and half the width of its 95 % interval."""
    values = np.asarray(values, dtype=float)
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():5.1f} ± {half:.1f}"


print(f"rows of {n} with a score above 0.5: mean of 20 phantoms, 95 % interval")
print("NMS  " + "".join(f"{name:>18}" for name in IMAGE_CLASSES))
for nms, counts in sure_rows.items():
    means = [mean_of(np.array(counts)[labels == c]) for c in range(3)]
    print(f"{nms:<5}" + "".join(f"{mean:>18}" for mean in means))

# %% [markdown]
# What does the threshold change?
#
# - **At 0.25** each suspicious place keeps about one box. The $N$ rows reach more places, but a slice
#   with one small lesion has one high score, and its other rows may look like those of a control.
# - **At 0.75** a lesion fills several rows, so the *length* of the high part of the ranking hints at
#   how much lesion there is. The paper reports that $S$ learns to take overlapping boxes with high
#   scores for a sign of COVID-19, which raises the sensitivity at some cost in accuracy.
# - **At 1** nothing is removed. The hint becomes stronger still, but copies of a few large lesions
#   can fill nearly all $N$ rows and push out weaker places (exercise 6).
#
# The paper prints no numbers for other thresholds. [Chapter 11](11_what_makes_it_work.ipynb) measures
# them on phantoms: there $S$ is better without any NMS than at 0.75, and 0.25 cannot be told apart from
# 0.75. So 0.75 is the paper's choice, and not a law.
#
# ## Step 6: the rows
#
# We keep the best $N$ survivors, GGO and C in one common ranking. Each becomes a row
#
# $$r = (s,\ \delta_x,\ \delta_y,\ \delta_w,\ \delta_h).$$
#
# The deltas are the outputs of the network as they are: not divided by the coder weights, not
# decoded, not clipped.
#
# Why did the authors take $N = 256$, and how does accuracy depend on $N$? We know of no reason that
# they give; on phantoms, [chapter 11](11_what_makes_it_work.ipynb) finds that with NMS at 0.75 one box is
# too few, four do better than 32, and 64 do worse, whereas without NMS more boxes help, up to the 32
# that we tried.

# %%
top = survivors[:n]  # [N]
rows = torch.cat([scores[top, None], lesion_deltas[top]], dim=1)  # [N, 5]
print("rows", tuple(rows.shape))
print("rank  score     dx     dy     dw     dh   not in the row")
for i, candidate in enumerate(top[:5].tolist()):
    kind = ("GGO", "C")[label[candidate] - 1]
    numbers = " ".join(f"{value:6.2f}" for value in rows[i])
    print(f"{i + 1:4} {numbers}   RoI {int(roi[candidate])} as {kind}")


# %% tags=["fold"]
# @title Draw the boxes at six ranks of the old friend
def draw_rank(rank):
    """The box at this rank, its proposal, and its row."""
    i, ax = int(top[rank - 1]), lungs_of_friend()
    k = int(label[i]) - 1
    look = {"edgecolor": plotting.LESION_COLOURS[k], "ls": plotting.LESION_LINES[k]}
    frame(ax, box[i], lw=2.5, label=f"decoded as {('GGO', 'C')[k]}", **look)
    dots = {"edgecolor": plotting.YELLOW, "ls": ":", "lw": 2}
    frame(ax, proposal[roi[i]], label="proposal", **dots)
    ax.legend(loc="upper right", fontsize="small")
    numbers = ", ".join(f"{value:.2f}" for value in rows[rank - 1].tolist())
    ax.set_title(f"rank {rank}: [{numbers}]", fontsize=10)
    return ax.figure


ranks = sorted({round(float(r)) for r in np.geomspace(1, len(top), 6)})
frame_slider(
    [draw_rank(rank) for rank in ranks],
    [f"{rank}" for rank in ranks],
    "Rank",
    "The old friend with the proposal (dotted) and the decoded box of one rank",
    caption="Which box stands at which rank, with the true lesions outlined in white. "
    "The title is the row that enters the vector. Synthetic.",
    dpi=70,
)

# %% [markdown]
# Why the encoded box? Compare both forms over the sixty phantoms:

# %%
rankings = [ranked(part) for part in parts]
encoded, decoded = [], []
for (lo, de, *_), r in zip(parts, rankings, strict=True):
    encoded.append(encoded_rows(lo[r.roi], de[r.roi], r.label)[:, 1:])
    decoded.append(r.box)
for name, values in (("encoded", encoded), ("decoded", decoded)):
    values = torch.cat(values)
    low, high, spread = values.min(), values.max(), values.std()
    print(f"{name}: {low:6.1f} to {high:6.1f}, deviation {spread:5.1f}")

# %% [markdown]
# Decoded corners range over the whole slice, and at 512 pixels they would range four times as far as at
# 128. A linear layer would have to weigh inputs of the order of 100 against a score below 1. Encoded
# boxes are of the order of 1 at any image size, and the paper calls this a form of normalisation. It
# has a price, as we shall see.
#
# ## Step 7: one vector
#
# Number $j$ of the row at rank $i$ (both from 0) lands at position $5i + j$. So it is the order by
# score that gives each input of the classifier a fixed meaning, such as "the score at rank 3". Does
# the package agree? A hook catches what arrives at the first layer of the module $S$.

# %% tags=["nbval-check-output"]
vector = rows.flatten()  # [5N]
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
print(tuple(rows.shape), "->", tuple(vector.shape))
print("S reads", tuple(caught[0].shape), "and they are our numbers")

# %% [markdown]
# ## When there are too few boxes
#
# Here more than $N$ boxes survived. With the $N = 256$ of the released code there may be fewer, and the vector must
# be filled up. Rows of zeros would be input of another kind: a score of 0 together with no shift at all
# is nothing that a real box gives. So the released code and the package both repeat boxes, each *in its place*, so that
# the scores still fall with rank.
#
# - **Here (even padding):** row $i$ shows box $\lfloor iK/N \rfloor$, so that each box is shown
#   equally often, give or take one.
# - **Released code:** $K - 1$ of the positions $1, \dots, N - 2$ are drawn at random and sorted; the
#   next box starts at each. Every box is used, but the draw is made afresh at *every* call, even at
#   inference, so the same slice gives another vector each time.
#
# For a small example, the box head sees only six proposals of the old friend.

# %%
with torch.no_grad():
    maps, _, shapes = propose(detector, [friend])
    few = run_box_head(detector, maps, [proposal[:6]], shapes)
few = few[0][0], few[1][0], proposal[:6], shapes[0]
r = ranked(few)
some_rows = encoded_rows(few[0][r.roi], few[1][r.roi], r.label)  # [K, 5]
k = len(some_rows)
by_hand = torch.stack([some_rows[i * k // n] for i in range(n)])
assert torch.equal(by_hand, pad_rows(some_rows, n))  # [N, 5]
fills = {"even": even_padding(k, n)}
for seed in (1, 2):
    generator = torch.Generator().manual_seed(seed)
    fills[f"author, draw {seed}"] = author_padding(k, n, generator)
print(f"K = {k} boxes for N = {n} rows")

# %% tags=["fold"] mystnb={"image": {"alt": "Three strips of coloured runs, one cell per row of the vector, each run labelled with its box number. Even padding has runs of nearly equal length; the two random draws have runs of very different lengths."}, "figure": {"caption": "Which box fills which row when there are fewer boxes than rows: even padding, and two draws of the author's rule. Synthetic."}}
# @title Draw which box fills which row, and print what a trained S answers
ax = plotting.get_ax(9, 2.6)
look = {"cmap": "cividis", "aspect": "auto", "interpolation": "nearest"}
_ = ax.imshow(torch.stack(list(fills.values())).numpy(), **look)
for line, which in enumerate(fills.values()):
    for i in [0, *(i for i in range(1, n) if which[i] != which[i - 1])]:
        colour = "white" if int(which[i]) < k / 2 else "black"
        _ = ax.text(i, line, int(which[i]) + 1, ha="center", va="center", color=colour)
        _ = ax.plot([i - 0.5, i - 0.5], [line - 0.5, line + 0.5], color="white", lw=1)
_ = ax.set_yticks(range(3), fills)
_ = ax.set(xlabel="Row of the vector (from 0)", ylabel="Padding")
trained_s = trained_classifier(PRESET, device, shipped=True).s
print("probability of     control  pneumonia  COVID-19")
with torch.no_grad():
    for name, which in fills.items():
        answer = trained_s(some_rows[which.to(device)][None]).sigmoid()[0]
        print(f"{name:17} " + " ".join(f"{value:9.2f}" for value in answer.tolist()))
plt.show()

# %% [markdown]
# The printed table has the answers of a trained $S$ for the same slice and the same boxes. It has
# hardly met padded vectors, so none of them is worth much. But the two draws of the author's rule give
# different answers, and a result that changes from call to call cannot be reproduced.
#
# And if no box is left at all? The released code fails on such a slice. The package gives a vector of
# zeros. To see one we need a threshold that no score passes:

# %% tags=["nbval-check-output"]
impossible = replace(config, score=2.0)
with torch.no_grad():
    nothing = ranked_boxes(detector, [friend], impossible)
print(tuple(nothing.shape), "not zero:", int(nothing.count_nonzero()))

# %% [markdown]
# ## What the vector leaves out
#
# A row does not say whether its box is GGO or C. And a code that stays the same when proposal and box
# move together should not say *where* they are, although COVID-19 tends to lie at the periphery and in
# both lungs. Does the vector really not know where in the lung a box lies? We can find out: draw two
# hundred patients with *one* GGO each, at a place that we choose, and let a regression guess the place
# from the vector. Such a model is called a *probe*.


# %% tags=["fold"]
# @title Draw two hundred patients with one lesion each, and rank their boxes
def one_lesion(seed, x, y, radius):
    """A control with one GGO; x, y, radius in image sides from the middle."""
    centre, radii = (x, y, HEIGHT / 2), (radius, radius, 0.08)
    lesion = Lesion(2, centre, radii, 0.0, 280.0, 0.015, ((0, 0),) * 3)
    return render(replace(make_patient(seed, 0), lesions=(lesion,)), 0.5, size)


rng, seed, images, places = np.random.default_rng(SEED), 5100, [], []
while len(images) < 200:
    seed += 1
    x, y = rng.choice([-1, 1]) * rng.uniform(0.13, 0.27), rng.uniform(-0.1, 0.17)
    image, mask = one_lesion(seed, x, y, rng.uniform(0.045, 0.09))
    inside = np.argwhere(mask == 2)
    if len(inside) >= 0.002 * size**2:  # else the pleura left almost nothing of it
        images.append(image)
        places.append([inside[:, 1].mean(), inside[:, 0].mean()])
places = np.array(places)  # [200, 2]: x, y of the lesion in pixels
wide = replace(config, columns=(*config.columns, "cx", "cy"))  # and the decoded centre
wide_rows = []
with torch.no_grad():
    for i in range(0, 200, 10):
        ten = [model_input(image) for image in images[i : i + 10]]
        wide_rows.append(ranked_boxes(detector, ten, wide))
wide_rows = torch.cat(wide_rows).cpu().numpy()  # [200, N, 7]
print("vectors", wide_rows[..., :5].shape, "centres", wide_rows[..., 5:].shape)

# %%
inputs = {
    "first row, 5 numbers": wide_rows[:, 0, :5],
    "whole vector": wide_rows[..., :5].reshape(200, -1),
    "decoded centre": wide_rows[:, 0, 5:],  # not in the vector
}
probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))
x, left = places[:, 0], places[:, 0] < size / 2
guesses, draws = {}, rng.integers(200, size=(500, 200))
print("the probe reads         R² of x, 95 % interval    right side")
for name, values in inputs.items():
    guess = cross_val_predict(probe, values, x, cv=10)  # held-out
    error, scatter = (guess - x) ** 2, (x - x.mean()) ** 2
    r2 = 1 - error.sum() / scatter.sum()
    many = 1 - error[draws].sum(axis=1) / scatter[draws].sum(axis=1)
    low, high = np.quantile(many, [0.025, 0.975])
    side = ((guess < size / 2) == left).mean()
    print(f"{name:22} {r2:6.2f}, {low:5.2f} to {high:4.2f} {side:17.0%}")
    guesses[name] = guess

# %% tags=["fold"] mystnb={"image": {"alt": "Two scatter plots against the true horizontal place of the lesion. Left: the guess from the whole vector, a flat cloud. Right: the guess from the decoded centre, for most lesions close to the diagonal."}, "figure": {"caption": "Where a probe puts two hundred lesions that it has not seen: from the whole vector it hardly does better than always saying the middle (left); from the decoded centre of the best box it is right nearly always (right). Synthetic."}}
# @title Draw the guesses, and print the largest correlation with the place
fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
looks = ((plotting.BLUE, "o"), (plotting.VERMILLION, "s"))
shown = ("whole vector", "decoded centre")
for ax, name, (colour, marker) in zip(axes, shown, looks, strict=True):
    _ = ax.scatter(places[:, 0], guesses[name], s=14, color=colour, marker=marker)
    _ = ax.plot([0, size], [0, size], color=plotting.BLACK, lw=0.8)
    _ = ax.set(xlabel="True x of the lesion (pixels)", title=f"from the {name}")
_ = axes[0].set_ylabel("Guessed x (pixels)")
table = np.corrcoef(np.c_[places, wide_rows[:, 0, :5]].T)[:2, 2:]
i, j = np.unravel_index(np.abs(table).argmax(), table.shape)
print("place of the lesion with a number of the first row, ten correlations:")
print(f"the largest is {table[i, j]:.2f} ({plotting.BOX_NUMBERS[j]} with {'xy'[i]});")
print(f"chance alone passes {2.81 / 200**0.5:.2f} in 5 % of such tables")
plt.show()

# %% [markdown]
# An $R^2$ of 1 means that the place is known, and 0 that the probe does no better than the average
# place. The last column is the share of lesions that it puts into the correct half of the picture;
# a coin would reach 50 %, give or take 7.
#
# So the answer has two parts. There *is* a trace of the place. The correlation printed above is
# larger than chance explains, and from the whole vector the half is guessed better than by a coin,
# in the run shown here. (One likely reason is that the tissue around a lesion is not the same
# everywhere, and with it the fit of a proposal.) But the trace is faint. The decoded box, which we
# threw away, tells the half nearly always. (Our probe is linear. A network might find more, and $S$
# is one; [chapter 11](11_what_makes_it_work.ipynb) gives $S$ the place and the class, and measures
# what it gains.)
#
# ## Which weights can a loss reach?
#
# When we train more than $S$, the loss reaches the detector through the rows. We sum the rows of the
# old friend and run backwards.

# %% tags=["nbval-check-output"]
_ = set_regime(model, "full")  # every weight may learn
model.zero_grad()
model.ranked_boxes([friend]).sum().backward()
groups = {
    "backbone": detector.backbone,
    "RPN": detector.rpn,
    "box head": heads.box_head,
    "class logits": heads.box_predictor.cls_score,
    "box deltas": heads.box_predictor.bbox_pred,
}
for name, part in groups.items():
    found = [w.grad for w in part.parameters() if w.grad is not None]
    reached = "yes" if any(g.any() for g in found) else "no"
    print(f"{name:12} gradient: {reached}")
model.zero_grad()

# %% [markdown]
# All but the RPN. torchvision *detaches* the proposals: it treats them as constants. This is a choice,
# known as approximate joint training; {cite:t}`Ren2015` also describe a non-approximate form, which
# differentiates by the boxes. While a detector trains, its RPN learns from two losses of its own. The
# classifier has no such losses, so the RPN never changes, even when "all" weights train ([chapter
# 8](08_three_regimes.ipynb)). Ranking and NMS have no gradient either: they choose which rows exist, and
# the gradient flows through the numbers in them.
#
# ## What S sees
#
# Finally we look at sixty vectors, twenty of each class.

# %% tags=["fold"] mystnb={"image": {"alt": "Mean score against rank for twenty phantoms of each class, one falling curve with a quantile band for each class."}, "figure": {"caption": "Scores by rank over twenty phantoms of each class, with the band from the 25 to the 75 percent quantile. Synthetic."}}
# @title Draw the scores by rank of sixty phantoms, and print what the best boxes score
matrices = []
for (lo, de, *_), r in zip(parts, rankings, strict=True):
    matrices.append(pad_rows(encoded_rows(lo[r.roi], de[r.roi], r.label), n).cpu())
matrices = torch.stack(matrices)  # [60, N, 5]
best_scores = matrices[:, 0, 0].numpy()
print("slices of 20 whose best box scores above   0.05    0.5")
for c, name in enumerate(IMAGE_CLASSES):
    counts = [int((best_scores[labels == c] > score).sum()) for score in (0.05, 0.5)]
    print(f"{name:40} {counts[0]:6} {counts[1]:6}")
_ = plotting.score_by_rank(matrices, labels, plotting.get_ax(7, 4))
plt.show()

# %% [markdown]
# Where the curves differ, there is a pattern that $S$ can learn. Where the bands overlap, scores alone
# do not settle a slice: some controls have a vessel or a scar that scores high, and with it an error of
# the detector has entered the vector. Keep in mind that in the real data every sick slice was chosen
# because it shows lesions {cite:p}`Gunraj2020`.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. What does a score threshold of −0.01 do?**
#
# - [ ] It drops the candidates that score lowest. :: No score is below 0, so it drops nothing.
# - [x] It lets every candidate pass, whatever its score. :: Boxes without area, NMS and $N$ limit the rows; scores do not.
# - [ ] It turns background boxes into lesions. :: It changes no score and no class.
#
# **2. Why not a threshold of 0?**
#
# - [x] A score may be rounded to exactly 0, and 0 > 0 is false. :: Rounding would decide how many rows there are.
# - [ ] Some scores are slightly negative. :: A softmax gives numbers from 0 to 1.
# - [ ] The gradient at 0 is not defined. :: No gradient passes through the comparison.
#
# **3. One RoI has the scores 0.60 for GGO and 0.30 for C. How many rows can it fill?**
#
# - [ ] None, since the scores do not sum to 1. :: The missing 0.10 is the background, which is dropped.
# - [ ] One, since NMS removes the weaker class. :: NMS runs within each class.
# - [x] Two, one for each lesion class. :: "RoI as GGO" and "RoI as C" are two candidates.
#
# **4. Which boxes does NMS compare, and which enter the vector?**
#
# - [ ] It compares encoded boxes, and decoded ones enter. :: Overlap needs pixels, which encoded boxes lack.
# - [x] It compares decoded boxes, and encoded ones enter. :: The vector takes the raw outputs of the network.
# - [ ] It compares decoded boxes, and decoded ones enter. :: Corners would be far larger than scores, and grow with the image.
#
# **5. You raise the NMS threshold from 0.75 to 1. What can be lost?**
#
# - [ ] The best box of the slice. :: It has rank 1 whatever NMS does.
# - [ ] Boxes with low scores, which NMS removes. :: NMS looks at overlap; at 1 it removes nothing.
# - [x] Weaker places, pushed out by copies of large lesions. :: There are only $N$ rows, and the copies score higher.
#
# **6. A slice has K = 40 boxes for N = 256 rows. What does the released code do?**
#
# - [ ] It adds 216 rows of zeros. :: No real box gives zeros; both rules repeat boxes.
# - [x] It repeats boxes at places drawn anew at each call. :: So the same slice gives another vector each time.
# - [ ] It repeats the last box 216 times. :: Any box may be repeated.
#
# **7. A linear probe guesses the place of a lesion from the vector with $R^2$ below 0.1. What follows?**
#
# - [x] Read in this way, the vector hardly knows the place. :: That was tested. Another model might find more.
# - [ ] The detector does not know where the lesion is. :: The decoded centre tells it nearly always.
# - [ ] No number in the vector depends on the place. :: One correlation was more than chance: faint is not absent.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Find the number
#
# Kind: pencil, *
#
# Take paper: which rank, and which of the five numbers, stands at position 17 of the vector (counted
# from 0)? Then write `meaning(position)`. It returns the rank, counted from 1, and the index of the
# number in its row, 0 (score) to 4.
#
# Hint: the rows lie one after the other, and each has five numbers.


# %% tags=["starter"]
def meaning(position):
    """Rank (from 1) and index in the row (0 to 4) of a position."""
    raise NotImplementedError("two operations with whole numbers")


# %% tags=["solution"]
# @title Solution
def meaning(position):
    """Rank (from 1) and index in the row (0 to 4) of a position."""
    return position // 5 + 1, position % 5


print("position 17: rank {}, number {}".format(*meaning(17)))


# %% tags=["wrong"]
def meaning(position):
    """Columns first."""
    return position % n + 1, position // n


# %% tags=["wrong"]
def meaning(position):
    """The rank from 0."""
    return position // 5, position % 5


# %% tags=["check"]
# @title Check your answer
for position in (0, 4, 5, 17, 5 * n - 1):
    rank, number = meaning(position)
    at = f"position {position}"
    assert 1 <= rank <= n, f"{at}: ranks run from 1 to {n}; yours is {rank}"
    assert 0 <= number <= 4, f"{at}: a row has the indices 0 to 4, not {number}"
    says = f"{at} holds another number: how many numbers lie before it?"
    assert vector[position] == rows[rank - 1, number], says
print("Right, for the first and last positions, too.")

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The whole way
#
# Kind: write a function, ***
#
# Write `vector_of(logits, deltas, proposals, shape)`: steps 2 to 7 for one slice, with even padding. It
# takes what the box head gives (`[P, 3]`, `[P, 12]`), the proposals `[P, 4]` and the height and width,
# and returns float `[5N]`. Use `decode`, `clip_boxes_to_image` and `batched_nms`, but not `rank_boxes`.
#
# Hint: collect the cells of this chapter. For the padding, row $i$ shows box $\lfloor iK/N \rfloor$,
# which is also right when $K = N$.


# %% tags=["starter"]
def vector_of(logits, deltas, proposals, shape):
    """The vector of one slice, float [5N]."""
    raise NotImplementedError("scores, boxes, NMS, rows, padding")


# %% tags=["solution"]
# @title Solution
def vector_of(logits, deltas, proposals, shape):
    """The vector of one slice, float [5N]."""
    s = logits.softmax(dim=1)[:, 1:].flatten()  # [2P]
    d = deltas.reshape(len(logits), 3, 4)[:, 1:].reshape(-1, 4)  # [2P, 4]
    place = torch.arange(len(s), device=s.device)
    b = clip_boxes_to_image(decode(d, proposals[place // 2]), shape)
    sized = (b[:, 2:] - b[:, :2]).prod(dim=1) > 0
    place = place[sized & (s > config.score)]
    kept = place[batched_nms(b[place], s[place], place % 2, config.nms)][:n]
    kept = kept[torch.arange(n, device=s.device) * len(kept) // n]
    return torch.cat([s[kept, None], d[kept]], dim=1).flatten()


# %% tags=["wrong"]
def vector_of(logits, deltas, proposals, shape):
    """NMS over both classes together."""
    s = logits.softmax(dim=1)[:, 1:].flatten()  # [2P]
    d = deltas.reshape(len(logits), 3, 4)[:, 1:].reshape(-1, 4)  # [2P, 4]
    place = torch.arange(len(s), device=s.device)
    b = clip_boxes_to_image(decode(d, proposals[place // 2]), shape)
    sized = (b[:, 2:] - b[:, :2]).prod(dim=1) > 0
    place = place[sized & (s > config.score)]
    kept = place[batched_nms(b[place], s[place], 0 * place, config.nms)][:n]
    kept = kept[torch.arange(n, device=s.device) * len(kept) // n]
    return torch.cat([s[kept, None], d[kept]], dim=1).flatten()


# %% tags=["wrong"]
def vector_of(logits, deltas, proposals, shape):
    """Decoded boxes instead of deltas."""
    s = logits.softmax(dim=1)[:, 1:].flatten()  # [2P]
    d = deltas.reshape(len(logits), 3, 4)[:, 1:].reshape(-1, 4)  # [2P, 4]
    place = torch.arange(len(s), device=s.device)
    b = clip_boxes_to_image(decode(d, proposals[place // 2]), shape)
    sized = (b[:, 2:] - b[:, :2]).prod(dim=1) > 0
    place = place[sized & (s > config.score)]
    kept = place[batched_nms(b[place], s[place], place % 2, config.nms)][:n]
    kept = kept[torch.arange(n, device=s.device) * len(kept) // n]
    return torch.cat([s[kept, None], b[kept]], dim=1).flatten()


# %% tags=["wrong"]
def vector_of(logits, deltas, proposals, shape):
    """The last box fills what is left."""
    s = logits.softmax(dim=1)[:, 1:].flatten()  # [2P]
    d = deltas.reshape(len(logits), 3, 4)[:, 1:].reshape(-1, 4)  # [2P, 4]
    place = torch.arange(len(s), device=s.device)
    b = clip_boxes_to_image(decode(d, proposals[place // 2]), shape)
    sized = (b[:, 2:] - b[:, :2]).prod(dim=1) > 0
    place = place[sized & (s > config.score)]
    kept = place[batched_nms(b[place], s[place], place % 2, config.nms)][:n]
    kept = kept[torch.arange(n, device=s.device).clamp(max=len(kept) - 1)]
    return torch.cat([s[kept, None], d[kept]], dim=1).flatten()


# %% tags=["wrong"]
def vector_of(logits, deltas, proposals, shape):
    """The score behind the deltas."""
    s = logits.softmax(dim=1)[:, 1:].flatten()  # [2P]
    d = deltas.reshape(len(logits), 3, 4)[:, 1:].reshape(-1, 4)  # [2P, 4]
    place = torch.arange(len(s), device=s.device)
    b = clip_boxes_to_image(decode(d, proposals[place // 2]), shape)
    sized = (b[:, 2:] - b[:, :2]).prod(dim=1) > 0
    place = place[sized & (s > config.score)]
    kept = place[batched_nms(b[place], s[place], place % 2, config.nms)][:n]
    kept = kept[torch.arange(n, device=s.device) * len(kept) // n]
    return torch.cat([d[kept], s[kept, None]], dim=1).flatten()


# %% tags=["check"]
# @title Check your answer
tries_ = {"control": parts[0], "COVID-19": parts[-1], "padding": few}
for name_, part_ in tries_.items():
    r_ = ranked(part_)
    right_ = encoded_rows(part_[0][r_.roi], part_[1][r_.roi], r_.label)
    right_ = pad_rows(right_, n)
    with torch.no_grad():
        mine_ = vector_of(*part_)
    says = f"{name_}: {5 * n} numbers are wanted, yours are {list(mine_.shape)}"
    assert mine_.shape == (5 * n,), says
    mine_ = mine_.reshape(n, 5)
    bad = (mine_[:, 0] - right_[:, 0]).abs() > 1e-4
    says = f"{name_}: the first column is wrong from row {int(bad.int().argmax())} on. "
    assert not bad.any(), says + "NMS within each class? Padding in place?"
    says = f"{name_}: right scores, wrong deltas: encoded, and of the right class?"
    assert torch.allclose(mine_[:, 1:], right_[:, 1:], atol=1e-3), says
print("Right for a control, a COVID-19 slice, and with padding.")

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Move the whole slice
#
# Kind: predict, then run, *
#
# We put the old friend on a black canvas twice as wide: once a quarter of a slice from its left end,
# once a quarter of a slice from its right end. Are the *encoded* rows of the two the same (up to
# rounding)? And the *decoded* boxes? Let `prediction()` return two words, each `"same"` or
# `"different"`, first for the rows.
#
# Hint: what does a convolution do when its input is shifted by a multiple of the stride?


# %% tags=["starter"]
def prediction():
    """Two words, "same" or "different": for the rows, for the boxes."""
    raise NotImplementedError("predict before you run anything")


# %% tags=["solution"]
# @title Solution
def prediction():
    """Proposals and boxes move with the slice; the code is relative."""
    return "same", "different"


# %% tags=["wrong"]
def prediction():
    """As if the code held the place."""
    return "different", "different"


# %% tags=["wrong"]
def prediction():
    """As if nothing noticed."""
    return "same", "same"


# %% tags=["check"]
# @title Check your answer
both = []
for left_edge in (size // 4, 3 * size // 4):
    canvas = torch.nn.functional.pad(friend, (left_edge, size - left_edge))
    with torch.no_grad():
        maps_, found_, at_ = propose(detector, [canvas])
        lo_, de_ = (part[0] for part in run_box_head(detector, maps_, found_, at_))
    r_ = ranked((lo_, de_, found_[0], at_[0]))
    both.append((encoded_rows(lo_[r_.roi], de_[r_.roi], r_.label), r_.box))
seen = []
for one_, two_ in zip(*both, strict=True):
    seen.append("same" if (one_ - two_).abs().median() < 0.01 else "different")
words = tuple(prediction())
says = 'return two words, each "same" or "different"'
assert len(words) == 2 and set(words) <= {"same", "different"}, says
for word, what, was in zip(words, ("encoded rows", "decoded boxes"), seen, strict=True):
    says = f"the {what} behave otherwise: from where are they measured?"
    assert word == was, says
print("Right. Median change of the decoded boxes in pixels:", end=" ")
print(f"{(both[1][1] - both[0][1])[:, 0].median():.1f}")

# %% [markdown] tags=["answer"]
# The shift is a multiple of the stride, so features, proposals and boxes all move with the slice.
# The code of a box against its own proposal stays. A few rows far down may swap places, because
# their scores are almost equal.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · A colleague's scores
#
# Kind: find the bug, **
#
# A colleague's classifier calls every slice COVID-19. Here is how she makes the scores of the
# candidates from logits float [P, 3]. Find the mistake and repair the function.
#
# Hint: try it on one RoI that is surely background, with logits such as 8, 0, 0.


# %% tags=["starter"]
def candidate_scores(logits):
    """[P, 3] -> [2P]: the scores of the candidates, RoI by RoI."""
    lesions = logits[:, 1:]  # drop the background
    return lesions.softmax(dim=1).flatten()


# %% tags=["solution"]
# @title Solution
def candidate_scores(logits):
    """First the softmax over all classes; then the background may go."""
    return logits.softmax(dim=1)[:, 1:].flatten()


# %% tags=["wrong"]
def candidate_scores(logits):
    """A sigmoid ignores the background as well."""
    return logits[:, 1:].sigmoid().flatten()


# %% tags=["wrong"]
def candidate_scores(logits):
    """The softmax over the proposals."""
    return logits.softmax(dim=0)[:, 1:].flatten()


# %% tags=["wrong"]
def candidate_scores(logits):
    """Class by class instead of RoI by RoI."""
    return logits.softmax(dim=1)[:, 1:].T.flatten()


# %% tags=["check"]
# @title Check your answer
try_ = torch.tensor([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
found_ = candidate_scores(try_)
assert found_.shape == (4,), f"two RoIs make [4], not {list(found_.shape)}"
says = f"RoI 0 is background, yet its lesion scores are {found_[:2].tolist()}"
assert found_[:2].max() < 0.01, says
says = f"RoI 1 as GGO is candidate 2, e^4 / (e^4 + 2), not {found_[2]:.3f}"
assert abs(found_[2] - 0.965) < 0.01, says
says = "not the scores of the old friend: in which order are the candidates?"
assert torch.allclose(candidate_scores(logits), scores, atol=1e-6), says
print("Right: the scores of one RoI and its background sum to 1.")

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · The author's rule, on average
#
# Kind: pencil, ***
#
# By the author's rule $K$ boxes fill $N$ rows: box 1 starts at position 0, and the other $K - 1$
# boxes start at sorted random places among $1, \dots, N - 2$. How many rows does each box fill, on
# average? Write `mean_copies(k, n)`, which returns a list of $K$ numbers.
#
# Hint: the $K - 1$ starts cut the positions $0, \dots, N - 2$ into $K$ pieces, and no piece is
# favoured. Who gets position $N - 1$?


# %% tags=["starter"]
def mean_copies(k, n):
    """How many rows each of k boxes fills on average: k numbers."""
    raise NotImplementedError("think of n - 1 positions and k pieces")


# %% tags=["solution"]
# @title Solution
def mean_copies(k, n):
    """n - 1 positions in k equal pieces; the last box also has the last position."""
    return [(n - 1) / k] * (k - 1) + [(n - 1) / k + 1]


# %% tags=["wrong"]
def mean_copies(k, n):
    """As if even."""
    return [n / k] * k


# %% tags=["wrong"]
def mean_copies(k, n):
    """Forgets the last position."""
    return [(n - 1) / k] * k


# %% tags=["check"]
# @title Check your answer
mine = torch.tensor(mean_copies(4, 12), dtype=torch.float32)
assert mine.shape == (4,), "one number for each of the four boxes"
says = f"twelve rows are filled in all; yours sum to {mine.sum():.2f}"
assert abs(mine.sum() - 12) < 1e-3, says
generator_ = torch.Generator().manual_seed(0)
draws_ = [author_padding(4, 12, generator_) for _ in range(3000)]
counts_ = torch.stack([torch.bincount(draw, minlength=4) for draw in draws_])
drawn_ = counts_.float().mean(dim=0)
says = "3,000 draws give another mean for some box: are all treated alike?"
assert (mine - drawn_).abs().max() < 0.15, says
print("Right. The mean of 3,000 draws:", *(f"{value:.2f}" for value in drawn_.tolist()))

# %% [markdown] tags=["answer"]
# Even padding does about what the author's rule does on average, and leaves nothing to chance.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · Where do the rows go?
#
# Kind: experiment, **
#
# Take the twenty COVID-19 phantoms. At the NMS thresholds 0.25, 0.75 and 1: how many of the $N$ rows
# have their centre in a lesion, and how many of the lesions get at least one row? Which threshold
# makes the best use of its rows?
#
# Hint: `made[i][1]` is the mask of phantom `i` (2 GGO, 3 C), and `regions(mask >= 2)` numbers its
# separate lesions. `ranked(parts[i], nms=...)` has `box`, in pixels.

# %% tags=["solution"]
# @title Solution
print("NMS    rows in a lesion   share of lesions with a row")
for nms in (0.25, 0.75, 1.0):
    hits, shares = [], []
    for i in np.flatnonzero(labels == 2):
        separate, count = regions(made[i][1] >= 2)
        corners = ranked(parts[i], nms=nms).box
        middle = ((corners[:, :2] + corners[:, 2:]) / 2).long().cpu()
        middle = middle.clamp(max=size - 1)
        on = separate[middle[:, 1], middle[:, 0]]  # [K]: number of the lesion, or 0
        hits.append((on > 0).sum())
        shares.append(100 * len(set(on[on > 0].tolist())) / count)
    print(f"{nms:<5} {mean_of(hits):>18} {mean_of(shares):>18} %")

# %% [markdown] tags=["answer"]
# A higher threshold lets more rows repeat what is known, and a lower one leaves more rows for other
# places. Look at the second column before you call one of them better: if nearly all lesions have a
# row at every threshold, the copies cost little on these slices. With a smaller $N$ they would cost
# more.

# %% [markdown]
# ## What we learned
#
# 1. Each RoI gives one candidate per lesion class; the best $N$ become rows of a score and an encoded box.
# 2. A threshold of −0.01 drops nothing, so a healthy slice has a ranking of its own.
# 3. NMS at 0.75 lets one lesion fill several rows; it is the paper's choice, and on phantoms not the best.
# 4. Encoded boxes are of the order of 1 at any image size, and carry only a faint trace of the place.
# 5. A loss on the rows reaches the backbone and the box head, and never the RPN.
#
# ## Further reading
#
# The construction is section 3.2 of {cite:t}`TerSarkisov2020`. Box encoding and both forms of joint
# training are in {cite:t}`Ren2015`, RoIAlign in {cite:t}`He2017`. In [chapter
# 7](07_covid_ct_mask_net.ipynb) $S$ reads the vector.
