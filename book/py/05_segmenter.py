# %% [markdown]
# # 5 · Training and judging the segmenter
#
# Below is a slice of our old friend, twice: with its true lesions, and with what a trained detector
# finds. It looks quite good. In this chapter you train such a detector, and then take apart the
# numbers by which detectors are judged.
#
# **How good is a detector, in one number, and why do two people get two different numbers from the
# same boxes?**

# %% tags=["fold"] mystnb={"image": {"alt": "The old friend, a synthetic axial chest slice, twice: with boxes and outlines around its true lesions on the left, and with those that a detector finds, with their scores, on the right."}, "figure": {"caption": "Our old friend, a patient whom no model has seen: the truth (left), and detections with a score above 0.75 (right). GGO solid, consolidation (C) dashed. Synthetic."}}
# @title Imports, versions, and a first look at truth and detections
import math
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import Subset
from torchvision.ops import batched_nms, box_iou

import covidmask
from covidmask import plotting
from covidmask.config import LESION_CLASSES, PRESETS
from covidmask.datasets import (
    LesionSlices,
    SliceImages,
    mask_to_targets,
    old_friend,
    write_phantoms,
)
from covidmask.interactive import frame_slider
from covidmask.metrics import (
    CocoAP,
    author_ap,
    author_image_ap,
    bootstrap,
    dice,
    semantic_mask,
    wilson,
)
from covidmask.models import (
    binary_masks,
    lesion_mask_rcnn,
    save_model,
    threshold_detections,
    trained_segmenter,
    weights_file,
)
from covidmask.training import predict_lesions, train_segmenter

plt.rcParams["image.interpolation"] = "nearest"  # show pixels as they are
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU, too, all digits of float32 count
torch.backends.cudnn.allow_tf32 = False
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")


def friend_of(preset):
    """The old friend of a preset: grey [H, W], mask of codes [H, W], target."""
    image, mask = old_friend(preset.phantoms.size)
    return image, mask, mask_to_targets(mask, preset.detector.lesions, preset.min_area)


@torch.no_grad()
def detect(model, image):
    """The detections of a slice [3, H, W], on the CPU, best score first."""
    found = model.eval()([image.to(device)])[0]
    return {key: value.cpu() for key, value in found.items()}


image, _, target = friend_of(PRESETS["quick"])
model = trained_segmenter("quick", device, shipped=True)
first = detect(model, torch.from_numpy(image).expand(3, -1, -1))
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
_ = plotting.show_lesions(image, target, axes[0]).set_title("Truth")
_ = plotting.show_lesions(image, first, axes[1], score_threshold=0.75)
_ = axes[1].set_title("Detections")
plt.show()

# %% [markdown]
# **After it you can**
#
# - train a detector, and test in a minute whether the training works at all;
# - compute average precision (AP) by hand, and get COCO's number;
# - say why the released code's AP is another number, and what NMS has to do with it;
# - report a result with an interval, a baseline, and what it leaves out.
#
# **You need** the parts of Mask R-CNN and its losses ([chapters 2](02_region_proposals.ipynb),
# [3](03_roi_heads.ipynb) and [4](04_losses.ipynb)). **Time:** reading 25 minutes, exercises 40
# minutes, running about 3 minutes on two CPU cores in the preset `quick`. (The first chapter that
# you run draws the phantoms once, which takes a few minutes more.)
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*, made by formulas and random numbers. No number below
# is a result on patients, and nothing here is for diagnosis.
# ```
#
# To keep the run short, the preset `quick` trains here for a sixth of its epochs and judges a part of
# the test patients. The other presets train in full, because the later chapters need the weights.

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")
JUDGED_PATIENTS = 30
SHARE_OF_EPOCHS = 1 / 6 if PRESET == "quick" else 1

# %% [markdown]
# ## What we train on, and what we judge on
#
# The lesion set is split by patient. Neighbouring slices of one patient look alike, so a slice in
# the training part would give away its neighbour in the test part.

# %% tags=["nbval-check-output"]
preset = PRESETS[PRESET]
classes = LESION_CLASSES[preset.detector.lesions]  # GGO and C
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
folder, least = root / "lesions", preset.min_area
train = LesionSlices(folder, "train", min_area=least)
test = LesionSlices(folder, "test", min_area=least)
chosen = list(dict.fromkeys(test.patients))[:JUDGED_PATIENTS]
those = [i for i, name in enumerate(test.patients) if name in chosen]
judged, patients = Subset(test, those), [test.patients[i] for i in those]
true = [target for _, target in judged]
print(f"train:  {len(train)} slices of {len(set(train.patients))} patients")
print(f"judged: {len(judged)} slices of {len(chosen)} patients")
for label, name in enumerate(classes, start=1):
    count = sum(int((target["labels"] == label).sum()) for target in true)
    print(f"        {count} lesions of class {name}")
print("patients in both:", len(set(train.patients) & set(test.patients)))

# %% [markdown]
# ## Two tests before a long training
#
# In train mode the detector answers with its five losses, and training minimises their plain sum
# ([chapter 4](04_losses.ipynb)). Before the first step the network knows nothing, so a loss should be
# what a guess costs: $\ln 2$ between lesion and background, $\ln 3$ between three classes. That is
# the first test.

# %%
torch.manual_seed(SEED)
practice = lesion_mask_rcnn(preset.detector).to(device).train()
items = [train[i] for i in range(20) if len(train[i][1]["labels"])]
items = items[: preset.segmenter.batch_size]
images = [image.to(device) for image, _ in items]
targets = [{k: v.to(device) for k, v in t.items()} for _, t in items]
losses = practice(images, targets)
guess = {"loss_objectness": 2, "loss_classifier": len(classes) + 1}
for key, value in losses.items():
    k = guess.get(key)
    says = f"   ln {k} = {math.log(k):.3f}" if k else ""
    print(f"{key:17} {value.item():6.3f}{says}")
assert abs(losses["loss_objectness"].item() - math.log(2)) < 0.1

# %% [markdown]
# The second test: train again and again on the *same* batch. Its loss must fall fast, because a
# network can learn a few slices by heart. If it does not, something is broken, perhaps the format of
# the boxes, labels that start at 0, or a frozen weight.

# %%
optimizer = torch.optim.Adam(practice.parameters(), lr=1e-3)
practised = []
for _ in range(12):
    loss = sum(practice(images, targets).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    practised.append(loss.item())
print("one batch:", *(f"{value:.2f}" for value in practised))
assert practised[-1] < practised[0]

# %% [markdown]
# ## The training
#
# `train_segmenter` does the same over all slices, in a new order each epoch. The released code makes
# tens of thousands of steps at a small, constant rate. The preset `quick` makes about a thousand, so
# it needs a larger rate, which it warms up and lets fall along a cosine. It also calls more anchors
# and RoIs positive, because on small pictures few boxes reach a high overlap. (In the table, *fg* is the
# IoU from which a box counts as lesion, foreground, and *bg* the one below which it counts as
# background; *weight decay* pulls each weight a little towards 0 in every step.)

# %% tags=["fold", "nbval-check-output"]
# @title Print the paper's settings beside those of the preset
paper = PRESETS["paper"]
settings = [
    ("image side, pixels", lambda p: p.detector.image_size),
    ("epochs, batch size", lambda p: (p.segmenter.epochs, p.segmenter.batch_size)),
    ("rate; falls to 0", lambda p: (p.segmenter.lr, p.segmenter.cosine)),
    ("weight decay", lambda p: p.segmenter.weight_decay),
    ("RPN: IoU of fg, bg", lambda p: p.detector.rpn_iou),
    ("RoI: IoU of fg, bg", lambda p: p.detector.box_iou),
    ("beta of RPN, RoI", lambda p: (p.detector.rpn_box_beta, p.detector.box_beta)),
    ("NMS of RPN, RoI", lambda p: (p.detector.rpn_nms, p.detector.box_nms)),
]


def in_words(value):
    """A setting, with numbers rounded."""
    parts = value if isinstance(value, tuple) else (value,)
    return ", ".join(f"{v:.3g}" if type(v) is float else str(v) for v in parts)


print(f"{'':20} {'paper':>16} {PRESET:>16}")
for name, value in settings:
    print(f"{name:20} {in_words(value(paper)):>16} {in_words(value(preset)):>16}")

# %% [markdown]
# So a preset sets the scale and much else, too. (Where the paper and its code disagree, the table
# follows the code; see [paper v code](paper_v_code.ipynb).) The next cell takes by far the longest.

# %%
torch.manual_seed(SEED)
own = lesion_mask_rcnn(preset.detector)  # random weights
epochs = max(1, round(SHARE_OF_EPOCHS * preset.segmenter.epochs))
settings = replace(preset.segmenter, epochs=epochs)
history = train_segmenter(own, train, settings, seed=SEED)
own.to(device).eval()
if PRESET != "quick":  # the package has weights of quick
    file = weights_file("segmenter", PRESET)
    note = {"trained_by": "book/05_segmenter", "seed": SEED}
    _ = save_model(own, file, **note, steps=len(history))
print(f"{epochs} of {preset.segmenter.epochs} epochs, {len(history)} steps")

# %% tags=["fold"] mystnb={"image": {"alt": "Left: five loss curves on a logarithmic axis against the training step. Right: the learning rate against the step; it rises during the warm-up and then falls to 0."}, "figure": {"caption": "The five losses, each the mean of 20 steps (left), and the learning rate (right). Synthetic data."}}
# @title Draw the losses and the learning rate
shown = [name for name in history[0] if name.startswith("loss_")]
look = {"layout": "constrained", "width_ratios": (3, 2)}
fig, axes = plt.subplots(1, 2, figsize=(9, 4), **look)
_ = plotting.loss_curves(history, shown, axes[0], smooth=20)
_ = axes[0].set_yscale("log")
_ = axes[0].legend(fontsize=9, ncols=2)
_ = plotting.loss_curves(history, ["lr"], axes[1], ylabel="Learning rate (no unit)")
plt.show()

# %% [markdown]
# How should you read such curves? **Objectness** can fall from the start, since it needs only the
# anchors and the true boxes. The loss of the **classes** drops at once, because "background" is right
# for almost every RoI, which shows no skill yet; any further fall has to wait until the RPN proposes
# lesions. The loss of the **RoI boxes** may *rise* first. It is summed over positive RoIs and divided
# by all, and at first hardly any RoI is positive, so that a rise is a good sign.
#
# A falling training loss shows that the network fits the training slices. Whether it finds lesions
# in *other* patients takes other numbers. We compute them for the detector that the next chapters
# use: in `quick` it comes with the package and was trained by the same call for all epochs (in other
# presets it is the one that you have just trained). At the end we come back to our own.

# %%
segmenter = trained_segmenter(PRESET, device, shipped=True)


def judge(model, dataset, nms=preset.detector.box_nms):
    """(prediction, target) of each slice; masks bool [D, H, W]."""
    model.roi_heads.nms_thresh, result = nms, []
    for _, found, target in predict_lesions(model, dataset):
        found["masks"] = binary_masks(found)  # probability above 0.5
        result.append((found, target))
    model.roi_heads.nms_thresh = preset.detector.box_nms
    return result


pairs = judge(segmenter, judged)
count = sum(len(found["scores"]) for found, _ in pairs)
lesions = sum(len(target["labels"]) for target in true)
print(f"{count} detections for {lesions} lesions")

# %% [markdown]
# There are far more detections than lesions, and many of them are doubtful. Move the score threshold:

# %% tags=["fold"]
# @title Draw the detections of the old friend above six score thresholds
friend, friend_mask, friend_target = friend_of(preset)
friend_image = torch.from_numpy(friend).expand(3, -1, -1)  # [3, H, W]
found = detect(segmenter, friend_image)


def above(prediction, score):
    """The detections that score above `score`."""
    sure = prediction["scores"] > score
    return {key: value[sure] for key, value in prediction.items()}


def zoom(ax, mask):
    """Show the lungs only."""
    y, x = np.nonzero(mask)
    edge = len(mask) // 40
    low, high = (x.min() - edge, y.max() + edge), (x.max() + edge, y.min() - edge)
    _ = ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))


def draw_scores(threshold):
    """The old friend with the detections above a threshold, without printed scores."""
    shown = {k: v for k, v in above(found, threshold).items() if k != "scores"}
    ax = plotting.show_lesions(friend, shown, plotting.get_ax(5, 4))
    zoom(ax, friend_mask)
    _ = ax.set_title(f"{len(shown['labels'])} detections")
    return ax.figure


thresholds = (0.05, 0.25, 0.5, 0.75, 0.9, 0.98)
frame_slider(
    [draw_scores(threshold) for threshold in thresholds],
    [f"score above {threshold}" for threshold in thresholds],
    "Score threshold",
    "The old friend with the detections that are left",
    caption="Detections of the old friend above a score threshold. Synthetic.",
    start=3,
    dpi=70,
)

# %% [markdown]
# A low threshold keeps more of the lesions and more of everything else; a high one loses some. No
# single value is right, so a good measure looks at all of them.
#
# ## Average precision by hand
#
# A measure for detectors has to answer three questions. Which detections are right? What part do
# the scores play? And how does all this become one number?
#
# **Right** means that the mask overlaps a true lesion of the same class enough, and that no detection
# with a better score has taken that lesion. So we need the overlap (IoU) of each detection with each
# lesion, and then go through the detections, best score first.


# %%
def mask_overlap(first, second):
    """IoU of masks [D, H, W] and [K, H, W] -> float64 [D, K]."""
    first, second = first.flatten(1).double(), second.flatten(1).double()
    common = first @ second.T  # pixels that both have
    union = first.sum(dim=1)[:, None] + second.sum(dim=1) - common
    return (common / union.clamp(min=1)).numpy()


def match(overlap, threshold):
    """Lesion that each detection takes, or -1: [D, K] -> int [D]."""
    taken = np.full(len(overlap), -1)
    free = np.ones(overlap.shape[1], dtype=bool)
    for k, row in enumerate(overlap):  # in falling score
        row = np.where(free, row, -1)
        if len(row) and row.max() >= threshold:
            taken[k] = row.argmax()
            free[taken[k]] = False
    return taken


# %% tags=["fold"] mystnb={"image": {"alt": "A heat map with detections in rows, in falling score, and true lesions in columns; cells hold the IoU, and a frame marks the detection that takes each lesion."}, "figure": {"caption": "IoU of the 12 best GGO detections of the old friend with its GGO lesions. A frame marks a match at IoU 0.5. A second detection of the same lesion finds it taken and counts as wrong, however well it fits. Synthetic."}}
# @title Draw which detection takes which lesion of the old friend
is_ggo = found["labels"] == 1
friend_masks = binary_masks(found)[is_ggo][:12]
true_masks = friend_target["masks"][friend_target["labels"] == 1]
friend_overlap = mask_overlap(friend_masks, true_masks)
friend_taken = match(friend_overlap, 0.5)
ax = plotting.get_ax(5.5, 4.8)
drawn = ax.imshow(friend_overlap, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for (k, lesion), value in np.ndenumerate(friend_overlap):
    look = {"ha": "center", "color": "white" if value > 0.6 else "black"}
    if value > 0:
        _ = ax.text(lesion, k, f"{value:.2f}", **look)
    if friend_taken[k] == lesion:
        look = {"fill": False, "lw": 2.5, "color": plotting.VERMILLION}
        _ = ax.add_patch(plt.Rectangle((lesion - 0.47, k - 0.45), 0.94, 0.9, **look))
_ = ax.set_xticks(range(friend_overlap.shape[1]))
rows = [f"{score:.2f}" for score in found["scores"][is_ggo][:12].tolist()]
_ = ax.set_yticks(range(len(rows)), rows)
_ = ax.set(xlabel="True GGO lesion (number)", ylabel="Detection (its score, no unit)")
_ = ax.figure.colorbar(drawn, ax=ax, label="IoU of the masks (no unit)")
plt.show()

# %% [markdown]
# **Scores** order the detections of *all* slices in one list. Go down that list, and count after each
# detection:
#
# $$\text{precision} = \frac{\text{right so far}}{\text{listed so far}}, \qquad
# \text{recall} = \frac{\text{right so far}}{\text{all true lesions}}.$$
#
# Each place in the list stands for one score threshold.
#
# **One number** is the area under the curve of precision over recall. COCO {cite:p}`Lin2014` first
# replaces each precision by the best one at this recall *or a higher one*, and then averages over 101
# recalls,
#
# $$\text{AP} = \frac{1}{101} \sum_{\rho \in \{0, 0.01, \dots, 1\}} \max_{\rho' \ge \rho}
# \text{precision}(\rho'),$$
#
# where a recall that is never reached gives 0. Only the *order* of the scores matters.


# %% tags=["nbval-check-output"]
def average_precision(hits, n_targets):
    """AP by COCO's 101 recalls; hits bool [D] in falling score."""
    right = np.cumsum(hits)
    recall = right / n_targets
    precision = right / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # from here on
    # where each recall is first reached; never: at the 0 behind the end
    place = np.searchsorted(recall, np.linspace(0, 1, 101))
    return np.append(best, 0)[place].mean()


# six detections, four of them right, and five lesions
hits = np.array([1, 1, 0, 1, 0, 1], dtype=bool)
print("precision", *(f"{v:.2f}" for v in hits.cumsum() / np.arange(1, 7)))
print("recall   ", *(f"{v:.2f}" for v in hits.cumsum() / 5))
# 41 recalls (0 to 0.4) at 1, 20 (to 0.6) at 3/4, 20 (to 0.8) at 4/6
on_paper = (41 * 1 + 20 * 3 / 4 + 20 * 4 / 6 + 20 * 0) / 101
print(f"AP {average_precision(hits, 5):.4f}, on paper {on_paper:.4f}")

# %% [markdown]
# Now the judged slices. Does our AP agree with the package's `CocoAP`?


# %%
def overlaps(label):
    """Scores [D], falling, and IoU [D, K] of a class, for each slice."""
    result = []
    for found, target in pairs:
        mine = torch.where(found["labels"] == label)[0]  # falling score
        masks = target["masks"][target["labels"] == label]
        matrix = mask_overlap(found["masks"][mine], masks)
        result.append((found["scores"][mine].numpy(), matrix))
    return result


def ranked_hits(table, threshold):
    """All detections in falling score: is it right, and its score."""
    scores = np.concatenate([scores for scores, _ in table])
    hits = np.concatenate([match(o, threshold) >= 0 for _, o in table])
    order = np.argsort(-scores, kind="stable")
    return hits[order], scores[order]


# %%
def coco_of(predictions):
    """COCO's numbers of the judged slices, by the package."""
    metric = CocoAP(classes)
    metric.update(predictions, true)
    return metric.compute()


tables = {name: overlaps(k) for k, name in enumerate(classes, start=1)}
n_true = {k: sum(o.shape[1] for _, o in t) for k, t in tables.items()}
coco = coco_of([found for found, _ in pairs])
for name, table in tables.items():
    ours = average_precision(ranked_hits(table, 0.5)[0], n_true[name])
    theirs = coco[f"mask_ap50_{name}"]
    print(f"AP50 of {name:3}: by hand {ours:.6f}, CocoAP {theirs:.6f}")
    assert abs(ours - theirs) < 1e-5

# %% tags=["fold"] mystnb={"image": {"alt": "Two panels, one for GGO and one for C: precision against recall as a jagged thin line, its monotone envelope as a thick line, and markers at the score thresholds 0.75 and 0.5."}, "figure": {"caption": "Precision and recall on the judged phantoms at mask IoU 0.5. AP is the area under the thick line. A score threshold picks one point of the curve. Synthetic."}}
# @title Draw precision against recall
fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
for ax, name, colour in zip(axes, tables, plotting.LESION_COLOURS, strict=True):
    hits, scores = ranked_hits(tables[name], 0.5)
    recall = hits.cumsum() / n_true[name]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    _ = ax.plot(recall, precision, color="black", lw=0.8, label="as counted", zorder=3)
    _ = ax.plot(recall, best, color=colour, lw=3, label="best from here on")
    for threshold, marker in ((0.75, "o"), (0.5, "s")):
        k = (scores > threshold).sum() - 1
        look = {"color": "black", "label": f"score > {threshold}", "ls": ""}
        _ = ax.plot(recall[k], precision[k], marker, **look)
    _ = ax.set(title=f"{name}: AP50 {average_precision(hits, n_true[name]):.2f}")
    _ = ax.set(xlabel="Recall (no unit)", xlim=(0, 1), ylim=(0, 1.03))
    _ = ax.legend(loc="lower left")
_ = axes[0].set_ylabel("Precision (no unit)")
plt.show()

# %% [markdown]
# How much overlap is enough? COCO asks ten times, at IoU 0.50, 0.55, ... 0.95. Its **AP** is the mean
# over these thresholds and the classes; **AP50** asks once, at 0.5.

# %%
ious, by_hand = np.linspace(0.5, 0.95, 10), []
for name, table in tables.items():
    ranked = [ranked_hits(table, iou)[0] for iou in ious]
    by_hand.append([average_precision(h, n_true[name]) for h in ranked])
ours = np.mean(by_hand)
print("at IoU", *(f"{iou:.2f}" for iou in ious))
print("AP    ", *(f"{value:.2f}" for value in np.mean(by_hand, axis=0)))
print(f"mean  : by hand {ours:.6f}, CocoAP {coco['mask_ap']:.6f}")
assert abs(ours - coco["mask_ap"]) < 1e-5

# %% [markdown]
# The fall has a simple reason, too: our lesions are small, and one pixel all round costs a small
# lesion much of its IoU (exercise 2). So an AP at one image size cannot be compared with an AP at
# another.
#
# ## The same name, another number
#
# The tables of the released code also say AP, but it is computed in another way, slice by slice:
#
# - Only detections above a score threshold enter: 0.05 by default, 0.75 where its README evaluates the
#   light models.
# - Each *lesion* looks for the detection of its class with the largest IoU, *whatever its score*. COCO
#   lets each *detection* choose, best score first.
# - Both classes share one curve, and a slice without lesions gives 1 if nothing is detected, else 0.
# - The result is the mean over *slices*. COCO makes one list of all slices and takes the mean over
#   classes.


# %%
def image_ap_by_hand(found, target, threshold=0.5):
    """The released code's AP of one slice, at one IoU threshold."""
    n, m = len(found["labels"]), len(target["labels"])
    if n == 0 or m == 0:
        return float(n == m)
    overlap = mask_overlap(found["masks"], target["masks"])  # [n, m]
    overlap[(found["labels"][:, None] != target["labels"]).numpy()] = 0
    # lesions choose; of equals the lowest score
    choice = n - 1 - overlap[::-1].argmax(axis=0)
    hits = np.zeros(n, dtype=bool)
    hits[choice[overlap.max(axis=0) > threshold]] = True
    precision = np.cumsum(hits) / np.arange(1, n + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return best[hits].sum() / m


# %%
for found_, target in pairs:
    for score in (0.05, 0.75):
        ours = image_ap_by_hand(above(found_, score), target)
        theirs = author_image_ap(above(found_, score), target)[0]
        assert math.isclose(ours, theirs, abs_tol=1e-6)
print("author_image_ap of the package gives the same")

# %% [markdown]
# Its README reports, by this rule, AP at IoU 0.5, at 0.75 and over thresholds: 61.92, 45.22 and 44.68
# for masks of one merged class; 50.20, 41.98 and 38.71 for two classes. They cannot be compared with
# the COCO AP of another paper, nor with ours: the rule differs, and so do slices, image size and the
# smallest lesion that counts. How far apart can the two rules be? That depends on NMS.
#
# ## Which NMS threshold?
#
# NMS removes a box that overlaps a better one of its class by more than a threshold ([chapter
# 2](02_region_proposals.ipynb)). It comes after the network, so we can change it without training
# again. Figure 2 of the paper shows one model at 0.25 and at 0.75; here it is on phantoms, for our old
# friend and the judged slice whose C lies deepest in a GGO.


# %% tags=["fold"] mystnb={"image": {"alt": "Two rows of three panels. Columns: true lesions; detections at NMS 0.25; detections at NMS 0.75. The titles count the detections."}, "figure": {"caption": "Figure 2 of the paper, remade on phantoms: truth, NMS 0.25 and NMS 0.75, all with scores above 0.75. Look at what the right column adds: new lesions, or second boxes on the same ones? GGO solid, C dashed. Synthetic."}}
# @title Draw Figure 2 of the paper on phantoms
def deepest(target):
    """The largest IoU between the boxes of a GGO and a C."""
    ggo, c = (target["boxes"][target["labels"] == k] for k in (1, 2))
    overlap = box_iou(ggo, c)
    return float(overlap.max()) if overlap.numel() else 0.0


inside = judged.indices[int(np.argmax([deepest(t) for t in true]))]
shown = [("old friend", friend_image, friend_target, friend_mask)]
shown.append(("C in GGO", *test[inside], test.read(inside)[1]))
fig, axes = plt.subplots(2, 3, figsize=(9, 5.6), layout="constrained")
for row, (name, image, target, mask) in zip(axes, shown, strict=True):
    _ = plotting.show_lesions(image, target, row[0]).set_title(f"truth: {name}")
    for ax, nms in zip(row[1:], (0.25, 0.75), strict=True):
        segmenter.roi_heads.nms_thresh = nms
        at = above(detect(segmenter, image), 0.75)
        del at["scores"]  # printed scores would cover each other
        _ = plotting.show_lesions(image, at, ax)
        _ = ax.set_title(f"NMS {nms}: {len(at['labels'])} detections")
    for ax in row:
        zoom(ax, mask)
        if legend := ax.get_legend():
            _ = legend.remove()
segmenter.roi_heads.nms_thresh = preset.detector.box_nms
plt.show()

# %% [markdown]
# A low threshold might also remove a *true* lesion that overlaps another one. We can test that
# without any model: give NMS a perfect detector, whose boxes are the true ones.

# %% tags=["nbval-check-output"]
print("true boxes removed   within a class   over both classes")
for nms in (0.1, 0.25, 0.5, 0.75):
    lost = [0, 0]
    for target in true:
        boxes, labels = target["boxes"], target["labels"]
        for k, group in enumerate((labels, 0 * labels)):
            kept = batched_nms(boxes, target["area"], group, nms)
            lost[k] += len(labels) - len(kept)
    print(f"NMS {nms:4} {lost[0]:25} {lost[1]:19}")

# %% [markdown]
# Within a class nothing is lost on these phantoms, whose lesions of one class are separate regions;
# on real slices, where large lesions run into each other, it may be otherwise. Over both classes
# together a C inside a GGO may be lost at 0.5 or below, which is a reason to run NMS per class. Now the
# detector itself, judged at four thresholds by both rules:

# %%
at_nms = {preset.detector.box_nms: [found for found, _ in pairs]}
for nms in (0.25, 0.5, 1.0):
    at_nms[nms] = [found for found, _ in judge(segmenter, judged, nms)]
lines = {}  # NMS -> five numbers
for nms, every in sorted(at_nms.items()):
    per_slice = np.mean([len(found["scores"]) for found in every])
    numbers = coco_of(every)
    sure = [above(found, 0.75) for found in every]
    rule = [author_ap(f, true, thresholds=(0.5,))[0] for f in (every, sure)]
    lines[nms] = per_slice, numbers["mask_ap"], numbers["mask_ap50"], *rule

# %% tags=["fold"]
# @title Print the table of NMS thresholds
print("      detections      COCO      COCO   released code: AP50 of scores")
print("NMS      a slice        AP      AP50     above 0.05     above 0.75")
for nms, values in lines.items():
    print("{:<5}{:11.1f}{:10.3f}{:10.3f}{:15.3f}{:15.3f}".format(nms, *values))

# %% [markdown]
# Each row is one model on the same slices, and each of its last three numbers may rightly be called
# AP50. (A difference of a few thousandths may be chance.)
#
# Compare 0.25 with 0.75. COCO's AP50 suffers a little from second boxes, which count as wrong but
# mostly stand far down in the list. The released rule suffers much more when all detections enter: a
# lesion takes the box that fits *best*, which may be a second box with a low score, and then the first
# box counts as wrong. (Look at the heat map above: in the run shown here, the best fit of one lesion
# has the lowest score of all twelve.) A cut at 0.75 keeps most such boxes out. At 1, where NMS removes
# nothing, copies with high scores flood the list, and every number falls.
#
# So why does the paper choose 0.75? For the *detector*, nothing in this table speaks for it. The
# paper's reason lies in the classifier, which reads many ranked boxes of each slice: where NMS leaves one box for
# each lesion, a slice with one small lesion has few boxes with high scores. [Chapter
# 6](06_ranked_boxes.ipynb) takes this up, and says what phantoms show of it.
#
# ## What a number needs beside it
#
# **An interval.** With other patients we would have got another AP. The bootstrap
# {cite:p}`Efron1979` draws patients with replacement, judges again, and looks at the spread. We draw
# whole patients, because slices of one patient resemble each other.

# %%
names = np.array(patients)
slices_of = [np.flatnonzero(names == name) for name in chosen]


def ap50_of(drawn):
    """AP50 of the patients drawn, int [patients]: mean of the classes."""
    those = np.concatenate([slices_of[i] for i in drawn])
    values = []
    for table in tables.values():
        part = [table[i] for i in those]
        count = sum(o.shape[1] for _, o in part)
        values.append(average_precision(ranked_hits(part, 0.5)[0], count))
    return np.mean(values)


low, high = bootstrap(len(chosen), ap50_of, repeats=200)
ap50 = coco["mask_ap50"]
print(f"AP50 {ap50:.3f}, 95 % interval {low:.3f} to {high:.3f}")

# %% [markdown]
# The interval covers the choice of patients. It does not cover the training, where another seed gives
# another model.
#
# **Something to compare with.** We take our own short training, and a rule without learning: inside
# the body, call everything a lesion that is neither air nor soft tissue. The rule finds no C, which is
# about as bright as soft tissue, so we compare on GGO alone. Its two thresholds are chosen on training
# slices.


# %%
def judge_rule(dataset, low, high):
    """AP50 of the rule on slices whose lesions are GGO."""
    metric = CocoAP()
    for image, target in (dataset[i] for i in range(len(dataset))):
        found = threshold_detections(image[0].numpy(), low, high, least)
        metric.update([found], [target])
    return metric.compute()["mask_ap50"]


ggo = {k: LesionSlices(folder, k, "ggo", least) for k in ("train", "test")}
grid = [(a, b) for a in (0.45, 0.5, 0.55) for b in (0.75, 0.8, 0.85)]
few = Subset(ggo["train"], range(60))
low, high = max(grid, key=lambda pair: judge_rule(few, *pair))
rule = judge_rule(Subset(ggo["test"], those), low, high)
mine = coco_of([found for found, _ in judge(own, judged)])
print(f"AP50 of GGO: rule without learning {rule:.2f}")
print(f"             our own detector      {mine['mask_ap50_GGO']:.2f}")
print(f"             fully trained         {coco['mask_ap50_GGO']:.2f}")

# %% [markdown]
# What the rule reaches tells you how easy these slices are. It can find a GGO that stands alone, but it
# cannot tell one from a vessel or a scar of the same grey, and a real lung has more of these. And in the
# run shown here our own detector, after a single epoch, is *behind* that rule. Its losses had fallen
# nicely; only the comparison shows that it needs a longer training. (One run does not rank two methods:
# another seed gives another model.)
#
# **The misses.** A single number does not show where they are. For each true lesion: did a detection
# above 0.5 match it?

# %% tags=["fold"] mystnb={"image": {"alt": "Recall with error bars against lesion area on a logarithmic axis, for GGO and C; the smallest lesions have a lower recall than the largest."}, "figure": {"caption": "Share of true lesions that are found (score above 0.5, mask IoU at least 0.5), by area, with 95 % intervals (Wilson's). Phantoms, synthetic."}}
# @title Draw the share of lesions that are found, by area
ax = plotting.get_ax(7, 4)
pixels = preset.phantoms.size**2
for label, (name, table) in enumerate(tables.items(), start=1):
    areas, recalled = [], []
    for (scores, overlap), target in zip(table, true, strict=True):
        taken = match(overlap[scores > 0.5], 0.5)
        recalled += np.isin(np.arange(overlap.shape[1]), taken).tolist()
        areas += (100 * target["area"][target["labels"] == label] / pixels).tolist()
    areas, recalled = np.array(areas), np.array(recalled)
    groups = np.array_split(np.argsort(areas, kind="stable"), 5)  # of equal number
    x = np.array([np.median(areas[group]) for group in groups])
    y = np.array([recalled[group].mean() for group in groups])
    ends = [wilson(int(recalled[group].sum()), len(group)) for group in groups]
    bars = np.maximum(np.abs(np.array(ends).T - y), 0)
    look = {"color": plotting.LESION_COLOURS[label - 1], "marker": "os"[label - 1]}
    look |= {"ls": plotting.LESION_LINES[label - 1], "capsize": 4}
    _ = ax.errorbar(x, y, yerr=bars, label=f"{name} ({len(areas)} lesions)", **look)
_ = ax.set(xlabel="Area of the lesion (% of the image)", xscale="log", ylim=(0, 1.03))
ticks = (0.1, 0.2, 0.5, 1, 2)
_ = ax.set_xticks(ticks, [str(tick) for tick in ticks])
_ = ax.set_xticks([], minor=True)
_ = ax.set_ylabel("Recall (share of lesions)")
_ = ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# Small lesions are missed more often than large ones. Part of this is the measure, since a shift by a
# pixel costs a small lesion much of its IoU.
#
# **Healthy slices.** Every slice of this set comes from a COVID-19 patient, as in the paper's set
# {cite:p}`Zhang2020`. So nothing above says what the detector does in healthy lungs. In how many
# control slices does it call anything a lesion?

# %%
control = SliceImages(root / "slices", "test")
healthy = [i for i, kind in enumerate(control.labels) if kind == 0][:40]
tops = []
for i in healthy:
    scores = detect(segmenter, control[i][0])["scores"].tolist()
    tops.append(max(scores, default=0.0))
for threshold in (0.25, 0.5, 0.75):
    alarms = sum(top > threshold for top in tops)
    low, high = wilson(alarms, len(tops))
    says = f"score > {threshold:4}: {alarms} of {len(tops)} controls"
    print(f"{says}, 95 % interval {low:.0%} to {high:.0%}")

# %% [markdown]
# (These intervals take slices as independent, which the slices of a patient are not.) None of these
# false alarms entered AP. That a detector has found something does not mean that the patient is ill.
# The next chapters build the classifier from these very detections, the doubtful ones included.
#
# **Pixels.** Often one wants to know which pixels are lesion, and not how many lesions there are.
# Dice's coefficient compares two masks $m$ and $m'$ by area, $2\,|m \cap m'| / (|m| + |m'|)$. It sees
# one score threshold and no instances, so it can disagree with AP.

# %% tags=["fold"]
# @title Print the mean Dice of both classes
values = []
for found_, target in pairs:
    ones = {**target, "scores": torch.ones(len(target["labels"]))}
    a, b = semantic_mask(found_, 0.75), semantic_mask(ones, 0)  # codes
    values.append([dice(a == code, b == code) for code in (2, 3)])
values = np.array(values)  # [slices, classes]; NaN: neither has it


def dice_of(drawn):
    """Mean Dice of both classes, of the patients drawn."""
    return np.nanmean(np.concatenate([values[slices_of[i]] for i in drawn]), axis=0)


means = dice_of(np.arange(len(chosen)))
ends = bootstrap(len(chosen), dice_of)  # [2, classes]
for name, mean, low, high in zip(classes, means, *ends, strict=True):
    print(f"Dice of {name:3}: {mean:.2f}, 95 % interval {low:.2f} to {high:.2f}")

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. The loss of one batch does not fall, although you train on it a hundred times. What now?**
#
# - [ ] Train longer, and on more slices. :: A network can learn a few slices by heart in a few steps. More data hides the mistake.
# - [ ] Nothing is wrong, since one batch says little. :: It says little about other patients, but much about whether the training works.
# - [x] Look for a mistake in boxes, labels or frozen weights. :: That is what this test is for.
#
# **2. A lesion has two detections, with scores 0.9 and 0.8 and IoU 0.6 and 0.8. At IoU 0.5, COCO says:**
#
# - [x] The first is right and the second is wrong. :: The better score chooses first; the second finds the lesion taken.
# - [ ] The second is right, because it fits better. :: That is the released code's rule, where the lesion chooses.
# - [ ] Both are right, as both overlap enough. :: A lesion counts once; else copies would raise the score.
#
# **3. You double all scores of a detector, within 0 to 1. What happens to COCO's AP?**
#
# - [ ] It rises, because more detections are confident. :: COCO's AP knows no threshold of confidence; the released one does.
# - [x] Nothing, because their order stays. :: COCO's AP sees only the order of the list.
# - [ ] It falls, because the scores are no probabilities any more. :: AP does not ask whether scores are probabilities.
#
# **4. Why does the released code's AP fall so much when second boxes with low scores stay?**
#
# - [ ] It counts each second box as a false alarm of its own. :: COCO does that as well; it costs little at the end of the list.
# - [ ] It averages over ten IoU thresholds. :: Here both rules ask at IoU 0.5.
# - [x] A lesion may take a second box, and the first one is then wrong. :: The wrong one stands at the top of the list, where it costs most.
#
# **5. Paper A reports AP50 0.62 and paper B AP50 0.70. What must you know before you compare them?**
#
# - [x] The rule, the slices, the image size and the smallest lesion. :: The rule alone can change the number by more than this.
# - [ ] Only which backbone they used. :: The backbone is what you would like to compare; the rest must be equal first.
# - [ ] Nothing, because AP50 is a standard. :: Two rules bear that name, as we saw.
#
# **6. Why do we draw patients, and not slices, in the bootstrap?**
#
# - [ ] It is faster. :: Speed is the same. It is about what is independent.
# - [x] Slices of one patient resemble each other. :: Drawn one by one they would count as independent, and the interval would be too narrow.
# - [ ] Patients have the same number of slices. :: They need not; the bootstrap does not ask for it.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · AP on paper
#
# Kind: pencil, *
#
# Four detections, best score first: right, wrong, right, right. There are five true lesions. Work out
# COCO's AP on paper, and let `my_ap()` return it (a fraction such as `12 / 101` is fine).
#
# Hint: write precision and recall under each detection. Which precision holds up to which recall, if
# you may take the best one from there on? Count the recalls 0, 0.01, ..., 1.


# %% tags=["starter"]
def my_ap():
    """COCO's AP of right, wrong, right, right with five lesions."""
    raise NotImplementedError("a sum of precisions over 101 recalls")


# %% tags=["solution"]
# @title Solution
def my_ap():
    """21 recalls (0 to 0.2) at 1, 40 (to 0.6) at 3/4, the rest at 0."""
    return (21 * 1 + 40 * 3 / 4) / 101


# %% tags=["wrong"]
def my_ap():
    """Without "the best from here on"."""
    return (21 * 1 + 20 * 2 / 3 + 20 * 3 / 4) / 101


# %% tags=["wrong"]
def my_ap():
    """The mean precision of the right ones, as if all lesions were found."""
    return (1 + 2 / 3 + 3 / 4) / 3


# %% tags=["check"]
# @title Check your answer
wanted_ = average_precision(np.array([True, False, True, True]), 5)
says = "not yet: which precision enters your sum at recall 0.3, and which at 0.8?"
assert abs(my_ap() - wanted_) < 0.006, says
print(f"Right: {wanted_:.4f}")

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · One pixel too wide
#
# Kind: pencil, *
#
# A lesion is a disc with a radius of $r$ pixels. Its detection is one pixel too wide all round. Write
# `iou_of_disc(r)`. From which radius on does such a detection count as right at IoU 0.75?
#
# Hint: the small disc lies inside the large one. What are the intersection and the union?


# %% tags=["starter"]
def iou_of_disc(r):
    """IoU of a disc of radius r with one that is a pixel wider all round."""
    raise NotImplementedError("two areas")


# %% tags=["solution"]
# @title Solution
def iou_of_disc(r):
    """IoU of a disc of radius r with one that is a pixel wider all round."""
    return (r / (r + 1)) ** 2


print("IoU:", ", ".join(f"r {r}: {iou_of_disc(r):.2f}" for r in (2, 3, 5, 7, 10, 20)))
areas = torch.cat([target["area"] for target in true])
half = (areas.median() / math.pi).sqrt()
print(f"half of our lesions are smaller than r = {half:.1f}")


# %% tags=["wrong"]
def iou_of_disc(r):
    """Radii instead of areas."""
    return r / (r + 1)


# %% tags=["wrong"]
def iou_of_disc(r):
    """Dice instead of IoU."""
    return 2 * r**2 / (r**2 + (r + 1) ** 2)


# %% tags=["check"]
# @title Check your answer
grid_ = torch.arange(-60, 61)
far_ = (grid_[:, None] ** 2 + grid_**2).sqrt()
for r_ in (5, 20, 40):
    counted_ = float((far_ <= r_).sum() / (far_ <= r_ + 1).sum())
    mine_ = iou_of_disc(r_)
    says = f"r = {r_}: counting pixels gives about {counted_:.2f}, you {mine_:.2f}"
    assert abs(mine_ - counted_) < 0.04, says
print("Right, as a count of pixels shows.")

# %% [markdown] tags=["answer"]
# The IoU reaches 0.75 at $r \approx 6.5$. When we ran it, half of our lesions were smaller than a disc of
# $r = 5.6$. So AP at high thresholds says much about the size of lesions and pixels, too, and not about
# the detector alone.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Everything twice
#
# Kind: predict, then run, **
#
# Suppose that the detector returned each detection twice, with the same score and mask. What would
# COCO's AP50 do? Let `prediction()` return `"rise"`, `"stay"` or `"fall"`.
#
# Hint: the two copies stand next to each other in the list. What does each count as, and what does
# that do to the precision at every recall?


# %% tags=["starter"]
def prediction():
    """One word: rise, stay or fall."""
    raise NotImplementedError("predict before you run anything")


# %% tags=["solution"]
# @title Solution
def prediction():
    """The copy of a right detection is wrong: precision halves nearly everywhere."""
    return "fall"


# %% tags=["wrong"]
def prediction():
    """As if a copy did not count."""
    return "stay"


# %% tags=["wrong"]
def prediction():
    """As if each copy were right."""
    return "rise"


# %% tags=["check"]
# @title Check your answer
twice_ = []
for name_, table_ in tables.items():
    doubled_ = [(np.repeat(s, 2), np.repeat(o, 2, axis=0)) for s, o in table_]
    twice_.append(average_precision(ranked_hits(doubled_, 0.5)[0], n_true[name_]))
before_, after_ = coco["mask_ap50"], np.mean(twice_)
seen_ = "rise" if after_ > before_ else "fall"
seen_ = "stay" if abs(after_ - before_) < 0.01 else seen_
word_ = prediction()
assert word_ in {"rise", "stay", "fall"}, 'return "rise", "stay" or "fall"'
says = f"it does not {word_}: can the copy of a right detection find its lesion free?"
assert word_ == seen_, says
print(f"Right: AP50 goes from {before_:.3f} to {after_:.3f}.")

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · A recall above 1
#
# Kind: find the bug, **
#
# A colleague writes her own matching and is delighted with her AP. Then she sees a recall of 1.7.
# Find the mistake and repair `greedy(overlap, threshold)`, which should do what `match` does.
#
# Hint: let two detections overlap the same lesion.


# %% tags=["starter"]
def greedy(overlap, threshold):
    """Lesion that each detection takes, or -1; overlap [D, K] in falling score."""
    taken = np.full(len(overlap), -1)
    for k, row in enumerate(overlap):
        if len(row) and row.max() >= threshold:
            taken[k] = row.argmax()
    return taken


# %% tags=["solution"]
# @title Solution
def greedy(overlap, threshold):
    """Lesion that each detection takes, or -1; overlap [D, K] in falling score."""
    taken = np.full(len(overlap), -1)
    overlap = np.array(overlap)  # a copy, as it changes
    for k, row in enumerate(overlap):
        if len(row) and row.max() >= threshold:
            taken[k] = row.argmax()
            overlap[k + 1 :, taken[k]] = -1  # the lesion is gone for those behind
    return taken


# %% tags=["wrong"]
def greedy(overlap, threshold):
    """The lesion chooses, by the best overlap."""
    taken = np.full(len(overlap), -1)
    for lesion in range(overlap.shape[1]):
        if len(overlap) and overlap[:, lesion].max() >= threshold:
            taken[overlap[:, lesion].argmax()] = lesion
    return taken


# %% tags=["wrong"]
def greedy(overlap, threshold):
    """Gives up where the best lesion is taken, although another one is free."""
    taken = np.full(len(overlap), -1)
    for k, row in enumerate(overlap):
        if len(row) and row.max() >= threshold and row.argmax() not in taken:
            taken[k] = row.argmax()
    return taken


# %% tags=["check"]
# @title Check your answer
def take_(rows):
    """Her matching at 0.5, as a list."""
    return np.asarray(greedy(np.array(rows), 0.5)).tolist()


says = "two detections of one lesion: only one may take it"
assert take_([[0.9], [0.8]]) == [0, -1], says
says = "the first has the better score: it takes the lesion, although it fits worse"
assert take_([[0.6], [0.8]]) == [0, -1], says
says = "the second finds lesion 0 taken, but lesion 1 is free and overlaps enough"
assert take_([[0.9, 0.1], [0.8, 0.6]]) == [0, 1], says
for _, overlap_ in tables["GGO"]:
    same_ = np.array_equal(greedy(overlap_, 0.5), match(overlap_, 0.5))
    assert same_, "it differs from `match` on a judged slice"
print("Right, on toy slices and on all judged ones.")

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · AP at any threshold
#
# Kind: write a function, **
#
# Write `ap_at(iou)`: COCO's AP at one IoU threshold, the mean over both classes, from `tables` and
# `n_true`.
#
# Hint: `ranked_hits` and `average_precision` do the work for one class. Should both classes share one
# list?


# %% tags=["starter"]
def ap_at(iou):
    """COCO's mask AP at one IoU threshold, the mean over the classes."""
    raise NotImplementedError("one AP for each class, then their mean")


# %% tags=["solution"]
# @title Solution
def ap_at(iou):
    """COCO's mask AP at one IoU threshold, the mean over the classes."""
    hits = {name: ranked_hits(table, iou)[0] for name, table in tables.items()}
    return np.mean([average_precision(hits[name], n_true[name]) for name in hits])


print(f"AP75 by hand {ap_at(0.75):.6f}, CocoAP {coco['mask_ap75']:.6f}")


# %% tags=["wrong"]
def ap_at(iou):
    """Both classes in one list."""
    hits = ranked_hits([one for table in tables.values() for one in table], iou)[0]
    return average_precision(hits, sum(n_true.values()))


# %% tags=["wrong"]
def ap_at(iou):
    """Recall over the detections instead of the lesions."""
    hits = [ranked_hits(table, iou)[0] for table in tables.values()]
    return np.mean([average_precision(h, h.sum()) for h in hits])


# %% tags=["check"]
# @title Check your answer
for iou_, wanted_ in ((0.5, coco["mask_ap50"]), (0.75, coco["mask_ap75"])):
    says = f"IoU {iou_}: CocoAP has {wanted_:.4f}, you have {ap_at(iou_):.4f}. "
    says += "Is each class a list of its own, and recall a share of all its lesions?"
    assert abs(ap_at(iou_) - wanted_) < 1e-4, says
print("Right at 0.5 and at 0.75.")

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · What are the false positives?
#
# Kind: experiment, ***
#
# Take the detections above 0.75 that match no lesion at IoU 0.5. How many are second boxes on a lesion
# that is taken, how many a poor outline of a lesion of their class, and how many sit on no lesion of
# their class at all? What would you change first: NMS, the masks, or the training data?
#
# Hint: `tables[name]` holds `scores` and `overlap` of each slice, for one class. For a detection in row
# `k` of `overlap`, look at `match(overlap, 0.5)[k]` and at
# `overlap[k].max(initial=0)`.

# %% tags=["solution"]
# @title Solution
kinds = {"right": 0, "second box": 0, "poor outline": 0, "no such lesion": 0}
for table in tables.values():
    for scores, overlap in table:
        for k, lesion in enumerate(match(overlap, 0.5)):
            best = overlap[k].max(initial=0)
            if scores[k] <= 0.75:
                continue
            if lesion >= 0:
                kinds["right"] += 1
            elif best >= 0.5:
                kinds["second box"] += 1
            else:
                kinds["poor outline" if best > 0.1 else "no such lesion"] += 1
print(", ".join(f"{kind} {count}" for kind, count in kinds.items()))

# %% [markdown] tags=["answer"]
# Second boxes are what NMS at 0.75 lets pass, so a lower threshold would remove them at no cost in
# training. Detections on no lesion of their class sit on look-alikes, such as vessels and scars, or
# mistake one class for the other; only better training data would help there.

# %% [markdown]
# ## What we learned
#
# 1. A network that cannot learn one batch by heart has a bug; test that before a long training.
# 2. AP is the area under precision over recall; greedy matching makes a second box a mistake.
# 3. The released code's AP is another number than COCO's on the very same detections.
# 4. NMS can change after training; for the detector alone nothing here speaks for 0.75.
# 5. A result needs an interval by patients, a baseline, and slices on which there is nothing to find.
#
# ## Further reading
#
# {cite:t}`Lin2014` define the data set behind COCO's AP, {cite:t}`He2017` describe Mask R-CNN. The
# paper of this book is {cite:t}`TerSarkisov2020`. What goes wrong when such models are judged is
# collected by {cite:t}`Roberts2021`.
