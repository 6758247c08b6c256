# %% [markdown]
# # 5 · Training and judging the segmenter
#
# How do you train the detector, and how can you tell whether it is any good? In this chapter you
# train Mask R-CNN from random weights and watch it learn. Then we take apart the numbers by which a
# detector is judged, one by one, so that you know what each of them says and what it leaves out.
#
# **After it you can**
#
# - write the training step of a detector, and say what each of its five losses asks;
# - run non-maximum suppression (NMS) by hand, and say what its threshold changes;
# - compute average precision (AP) from masks and scores, and get COCO's number;
# - say why two numbers called "AP" may not be compared;
# - report a result with an interval and a baseline, and say which lesions are missed.
#
# **You need** the parts of Mask R-CNN from [chapter 2](02_region_proposals.ipynb), and the data of
# [chapter 1](01_data.ipynb). The chapter runs without them. **Run time:** about 4 minutes on two
# CPU cores in the preset `quick`, of which the training takes 3 (the first chapter that you run
# draws the phantoms once, which takes a few minutes more); 122 seconds on a GPU (H200) that other
# chapters used, too.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a picture made by formulas and random numbers. The
# layout on disk is that of the real data, so the same code reads both. No number below is a result
# on patients, and nothing here is for diagnosis.
# ```

# %% tags=["fold"]
# @title Imports and versions
import copy
import math
import platform
from dataclasses import replace

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from torch.utils.data import Subset

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
    dice,
    semantic_mask,
    wilson,
)
from covidmask.models import (
    binary_masks,
    lesion_mask_rcnn,
    propose,
    save_model,
    threshold_detections,
    trained_segmenter,
    weights_file,
)
from covidmask.training import (
    evaluate_segmenter,
    predict_lesions,
    train_segmenter,
)

plt.rcParams["image.interpolation"] = "nearest"  # show pixels as they are
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU, too, all digits of float32 count
torch.backends.cudnn.allow_tf32 = False
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"torchvision {torchvision.__version__}, Python {platform.python_version()}")

# %% [markdown]
# The preset sets the size of the pictures, of the models and of the data set, and how we train; a
# table below puts it beside the paper's. To keep the run short, we train for four fifths of the
# preset's epochs and judge on a part of the test patients. Raise the last two numbers to use all.

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")
JUDGED_PATIENTS = 30
SHARE_OF_EPOCHS = 0.8

# %% [markdown]
# ## What we train on, and what we judge on
#
# The lesion set is split by patient. Neighbouring slices of one patient look alike, so a slice in
# the training part would give away its neighbour in the test part.

# %% tags=["nbval-check-output"]
preset = PRESETS[PRESET]
classes = LESION_CLASSES[preset.detector.lesions]
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
train, test = (
    LesionSlices(root / "lesions", part, min_area=preset.min_area)
    for part in ("train", "test")
)  # fmt: skip
chosen = list(dict.fromkeys(test.patients))[:JUDGED_PATIENTS]
those = [i for i, name in enumerate(test.patients) if name in chosen]
judged = Subset(test, those)
patients = [test.patients[i] for i in those]  # of each judged slice
true = [target for _, target in judged]
print(f"train:  {len(train)} slices of {len(set(train.patients))} patients")
print(f"judged: {len(judged)} slices of {len(chosen)} patients,")
print(f"        out of {len(test)} test slices")
for label, name in enumerate(classes, start=1):
    count = sum(int((target["labels"] == label).sum()) for target in true)
    print(f"        {count} lesions of class {name}")
print("patients in both:", len(set(train.patients) & set(test.patients)))

# %% [markdown]
# Our old friend is a slice of one more phantom patient, whom no model has seen.

# %% mystnb={"image": {"alt": "The old friend, a synthetic axial chest slice in the lung window, twice: two dark lungs with bright vessels around a white heart, in a wall of ribs, muscle and fat. It is shown alone, and with boxes and outlines around its ground-glass opacities (solid) and consolidations (dashed)."}, "figure": {"caption": "Our old friend and its true lesions: what the detector gets, and what it should answer. Synthetic."}}
# float32 [H, W], uint8 [H, W]
friend, friend_mask = old_friend(preset.phantoms.size)
friend_image = torch.from_numpy(friend).expand(3, -1, -1)  # [3, H, W]
lesions = preset.detector.lesions
friend_target = mask_to_targets(friend_mask, lesions, preset.min_area)
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
_ = plotting.show_slice(friend, axes[0])
_ = plotting.show_lesions(friend, friend_target, axes[1])
plt.show()

# %% [markdown]
# ## One training step by hand
#
# One batch is a list of images and a list of targets. A target holds a box, a label and a mask for
# each lesion of its slice. They are lists because slices have different numbers of lesions.

# %% tags=["nbval-check-output"]
items = [train[i] for i in range(20) if len(train[i][1]["labels"])]
items = items[: preset.segmenter.batch_size]
images = [image.to(device) for image, _ in items]
targets = [{k: v.to(device) for k, v in t.items()} for _, t in items]
print(f"{len(images)} images, each {tuple(images[0].shape)}")
for key, value in targets[0].items():
    print(f"first target: {key:9} {tuple(value.shape)} {value.dtype}")

# %% [markdown]
# In *train mode* torchvision's detectors answer with losses, not with detections. There are five,
# and training minimises their plain sum,
#
# $$\mathcal{L} = \mathcal{L}_\text{objectness} + \mathcal{L}_\text{RPN box} + \mathcal{L}_\text{class} +
# \mathcal{L}_\text{box} + \mathcal{L}_\text{mask}.$$
#
# | key | part | the question | form |
# |---|---|---|---|
# | `loss_objectness` | RPN | does this anchor hold a lesion? | binary cross-entropy |
# | `loss_rpn_box_reg` | RPN | how must the anchor move to fit it? | L1 or smooth L1 |
# | `loss_classifier` | box head | is this RoI background, GGO or C? | cross-entropy |
# | `loss_box_reg` | box head | how must the RoI move, given its class? | smooth L1 |
# | `loss_mask` | mask head | which pixels of the RoI are lesion, given its class? | binary cross-entropy |
#
# Before the first step the network knows nothing, so each loss should be what a guess costs:
# $\ln 2$ between two answers, $\ln 3$ between three. The box losses start near 0, because they
# count only positive anchors and RoIs, and there are few of those. The mask loss starts higher than
# $\ln 2$: torchvision draws the first weights of the mask head larger than those of the RPN, so its
# first guesses are confident, and being confidently wrong costs more than being undecided.

# %%
torch.manual_seed(SEED)
practice = lesion_mask_rcnn(preset.detector).to(device).train()
losses = practice(images, targets)
guess = {
    "loss_objectness": math.log(2),
    "loss_classifier": math.log(len(classes) + 1),
}
for key, value in losses.items():
    beside = f"   a guess costs {guess[key]:.3f}" if key in guess else ""
    print(f"{key:17} {value.item():6.3f}{beside}")
assert abs(losses["loss_objectness"].item() - math.log(2)) < 0.1

# %% [markdown]
# The backward pass gives each weight its gradient $g$, to which weight decay $\lambda$ adds
# $\lambda w$. Adam {cite:p}`Kingma2015` divides a running mean $u$ of the gradients by the root of
# a running mean $v$ of their squares:
#
# $$w \leftarrow w - \alpha\, \frac{\hat u}{\sqrt{\hat v} + \epsilon}.$$
#
# (The hats are for a correction of the first steps.) At the first step $\hat u = g$ and $\hat v =
# g^2$, so each weight moves by the learning rate $\alpha$, however small its gradient is. The size
# of a loss does not set the size of the step, but it still matters for the direction: where several
# losses share weights, as in the backbone, the one with the larger gradient decides.

# %%
# a rate for this small experiment
rate, decay = 1e-3, preset.segmenter.weight_decay
weights = practice.parameters()
optimizer = torch.optim.Adam(weights, lr=rate, weight_decay=decay)
# [1 + classes, 128]
weight = practice.roi_heads.box_predictor.cls_score.weight
before = weight.detach().clone()

optimizer.zero_grad()
sum(losses.values()).backward()
gradient = weight.grad + decay * before
optimizer.step()

by_hand = before - rate * gradient / (gradient.abs() + 1e-8)
torch.testing.assert_close(weight.detach(), by_hand)
move = (weight - before).abs().median()
print(f"typical gradient {gradient.abs().median():.0e}, move {move:.0e}")

# %% [markdown]
# Now we run these lines again and again, on the *same* batch. Its loss must fall fast, because the
# network can learn a few slices by heart. If it does not, something is broken: perhaps the format
# of the boxes, labels that start at 0, or a frozen weight. Do this test before any long run; it
# takes a minute.

# %% mystnb={"image": {"alt": "A curve that falls steeply: the sum of the five losses of one batch over sixteen training steps."}, "figure": {"caption": "The loss of one batch, when we train on it again and again. It must fall; if it does not, look for the mistake before you train for hours. Synthetic data."}}
practised, total_loss = [], "sum of the five losses"
for step in range(16):
    losses = practice(images, targets)
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    practised.append({"step": step, total_loss: loss.item()})
assert practised[-1][total_loss] < practised[0][total_loss]
_ = plotting.loss_curves(practised, [total_loss], plotting.get_ax(6, 3.6))
plt.show()

# %% [markdown]
# ## The whole schedule
#
# `train_segmenter` runs these lines over all slices, in a new random order each epoch. It also does
# what a long run needs: it sets the learning rate of each step, writes checkpoints, can use several
# processes, and stops if a loss is not finite. Here are the settings of the paper's released code
# and ours.

# %% tags=["nbval-check-output"]
paper = PRESETS["paper"]
rows = [
    ("backbone", lambda p: f"{p.detector.backbone}, cut {p.detector.cut}"),
    ("image side, pixels", lambda p: p.detector.image_size),
    ("epochs", lambda p: p.segmenter.epochs),
    ("batch size", lambda p: p.segmenter.batch_size),
    ("Adam, learning rate", lambda p: p.segmenter.lr),
    ("rate falls to 0", lambda p: p.segmenter.cosine),
    ("weight decay", lambda p: p.segmenter.weight_decay),
    ("RPN: IoU of fg, bg", lambda p: p.detector.rpn_iou),
    ("RoI: IoU of fg, bg", lambda p: p.detector.box_iou),
    ("NMS of RPN, RoI", lambda p: (p.detector.rpn_nms, p.detector.box_nms)),
]
print(f"{'':20} {'paper':>16} {PRESET:>16}")
for name, value in rows:
    print(f"{name:20} {value(paper)!s:>16} {value(preset)!s:>16}")

# %% [markdown]
# The sources for the first column do not agree everywhere:
#
# | | text of the paper | elsewhere |
# |---|---|---|
# | epochs of the segmenter | 50, for "each algorithm" | 100 in the README of the released code |
# | training / held-out slices | 500 / 150 | 600 / 150 in Table 1; 650 / 100 in the released lists |
# | loss of the RPN boxes | smooth L1 | L1 in the released code |
#
# With the released lists, 100 epochs at batch size 1 are at most 65,000 steps at a small, constant
# rate (its loop skips slices without a lesion). The preset `quick` makes fewer than a fiftieth of
# them, so it takes a larger rate, warms it up, and lets it fall along a cosine. It also calls more
# anchors and RoIs positive: on small pictures fewer boxes reach a high overlap, and without
# positives the network learns nothing about lesions.
#
# The next cell takes by far the longest.

# %%
torch.manual_seed(SEED)
segmenter = lesion_mask_rcnn(preset.detector)  # random weights
epochs = max(1, round(SHARE_OF_EPOCHS * preset.segmenter.epochs))
settings = replace(preset.segmenter, epochs=epochs)
history = train_segmenter(segmenter, train, settings, seed=SEED)
segmenter.to(device).eval()
size = sum(p.numel() for p in segmenter.parameters())
print(f"{len(history)} steps, {size:,} parameters")

# %% [markdown]
# The other chapters need trained weights. In the preset `quick` they take [small ones](weights.md)
# that come with the package, trained by the same call for all epochs. In the other presets they
# take what you have just trained.

# %% tags=["nbval-check-output"]
if PRESET == "quick":
    print("preset quick: the other chapters load the package's weights")
else:
    file = weights_file("segmenter", PRESET)
    note = {"trained_by": "book/05_segmenter", "seed": SEED}
    _ = save_model(segmenter, file, **note, steps=len(history))
    print(f"saved for the other chapters as {file.name}")

# %% mystnb={"image": {"alt": "Left: five loss curves on a logarithmic axis against the training step. Right: the learning rate against the step; it rises during the warm-up and then falls to 0."}, "figure": {"caption": "The five losses, each the mean of 20 steps (left), and the learning rate (right). The losses differ in size and in what they wait for. Synthetic data."}}
names = [name for name in history[0] if name.startswith("loss_")]
look = {"layout": "constrained", "width_ratios": (3, 2)}
fig, axes = plt.subplots(1, 2, figsize=(10, 4), **look)
_ = plotting.loss_curves(history, names, axes[0], smooth=20)
_ = axes[0].set_yscale("log")
_ = axes[0].legend(fontsize="small", ncols=2)
label = "Learning rate (no unit)"
_ = plotting.loss_curves(history, ["lr"], axes[1], ylabel=label)
plt.show()

# %% [markdown]
# How to read them:
#
# - **Objectness** can fall from the start, because the two RPN losses need only the anchors and the
#   true boxes.
# - **Class** drops at once, because "background" is right for almost every RoI. This first drop
#   shows no skill yet. Any further fall must wait until the RPN proposes lesions.
# - **RoI box** *rises* before it falls. It is summed over positive RoIs and divided by all sampled
#   RoIs, and at first hardly any RoI is positive. So a rise here is a good sign.
# - **Mask** is a mean over the pixels of positive RoIs. It falls slowly, because the pixels at the
#   border of a lesion stay hard.
#
# A falling training loss shows that the network fits the training slices. To learn whether it finds
# lesions in *other* patients, we need other numbers.
#
# ## Eval mode is part of judging
#
# In train mode, batch normalisation uses the statistics of the batch and moves its running
# statistics. The released code computes the validation losses in train mode, so its validation
# slices change the model a little. We show this on a copy.

# %% tags=["nbval-check-output"]
copied = copy.deepcopy(segmenter)
buffers = copied.named_buffers()
statistics = {name: b.clone() for name, b in buffers if "running" in name}


def moved():
    """How many running statistics differ from those after training."""
    now = dict(copied.named_buffers())
    return sum(not torch.equal(now[k], old) for k, old in statistics.items())


with torch.no_grad():  # no gradient, no optimizer step
    _ = copied.eval()(images)
    after_eval = moved()
    _ = copied.train()(images, targets)
    after_train = moved()
print(f"of {len(statistics)} running statistics {after_eval} moved in eval")
print(f"mode, {after_train} in train mode, without any gradient")
assert after_eval == 0 and after_train > 0

# %% [markdown]
# ## A first look
#
# In eval mode the detector answers with boxes, labels, scores and masks. It keeps all boxes with
# scores above 0.05, many of them doubtful. A reader wants fewer boxes, and so chooses a *score
# threshold*. The paper draws and counts what scores above 0.75.

# %%
@torch.no_grad()
def detect(image):
    """The detections of a slice [3, H, W], on the CPU, best score first."""
    found = segmenter([image.to(device)])[0]
    return {key: value.cpu() for key, value in found.items()}


def above(prediction, score):
    """The detections that score above `score`."""
    sure = prediction["scores"] > score
    return {key: value[sure] for key, value in prediction.items()}


found = detect(friend_image)
sure = int((found["scores"] > 0.75).sum())
print(f"{len(found['scores'])} detections, {sure} score above 0.75")


# %% mystnb={"image": {"alt": "The old friend twice: true lesions on the left, detections with scores above 0.75 on the right."}, "figure": {"caption": "Truth (left) and detections with a score above 0.75 (right) on a patient that the model has not seen. Synthetic."}}
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
_ = plotting.show_lesions(friend, friend_target, axes[0]).set_title("Truth")
ax = plotting.show_lesions(friend, found, axes[1], score_threshold=0.75)
_ = ax.set_title("Detections")
plt.show()


# %% [markdown]
# Move the score threshold. A low one keeps more of the lesions, but also more boxes on other
# things; a high one loses some of them. No single value is right, so a good measure has to look at
# all of them.

# %%
def zoom(ax, mask):
    """Show the lungs only."""
    y, x = np.nonzero(mask)
    margin = len(mask) // 40
    _ = ax.set(
        xlim=(x.min() - margin, x.max() + margin),
        ylim=(y.max() + margin, y.min() - margin),
    )


def draw_friend(detections, title):
    """Detections on our old friend, without scores: they would overlap."""
    shown = {k: v for k, v in detections.items() if k != "scores"}
    ax = plotting.show_lesions(friend, shown, plotting.get_ax(5, 4))
    zoom(ax, friend_mask)
    _ = ax.set_title(f"{title}: {len(shown['labels'])} detections")
    return ax.figure


def draw_scores(threshold):
    """Our old friend with the detections that score above the threshold."""
    return draw_friend(above(found, threshold), f"score > {threshold:.2f}")


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
# With a running notebook you can choose any value:

# %% tags=["remove-output"]
def live_scores(threshold):
    """Draw into the widget."""
    _ = draw_scores(threshold)
    plt.show()


_ = ipywidgets.interact(
    live_scores, threshold=ipywidgets.FloatSlider(value=0.75, min=0.05, max=0.99, step=0.01)
)

# %% [markdown]
# ## Non-maximum suppression
#
# Many RoIs see the same lesion, and each answers with a box of its own. NMS keeps the best of them
# and removes the others. Whether two boxes mark the same lesion is judged by their *intersection
# over union*,
#
# $$\text{IoU}(b, b') = \frac{|b \cap b'|}{|b \cup b'|}.$$
#
# NMS takes the box with the best score, removes all others whose IoU with it is above a threshold,
# takes the best of what is left, and so on.

# %%
def box_overlap(box, others):
    """IoU of one box [4] with others [K, 4]; x1, y1, x2, y2."""
    left_top = torch.maximum(box[:2], others[:, :2])  # [K, 2]
    right_bottom = torch.minimum(box[2:], others[:, 2:])
    common = (right_bottom - left_top).clamp(min=0).prod(dim=1)  # [K]
    area = (box[2:] - box[:2]).prod()
    areas = (others[:, 2:] - others[:, :2]).prod(dim=1)
    return common / (area + areas - common)


def nms_by_hand(boxes, scores, threshold):
    """Indices of the kept boxes, best score first."""
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        order = order[box_overlap(boxes[best], boxes[order]) <= threshold]
    return torch.stack(kept)


# %% [markdown]
# To try it out we need the boxes *before* NMS. Backbone and RPN do not know the threshold of the
# last stage, so we compute features and proposals once, and then run only the RoI heads, as often
# as we like. Nothing has to be trained again. A threshold of 1 removes nothing.

# %%
@torch.no_grad()
def detect_at(nms, image, proposed):
    """Detections at another threshold; `proposed` is what `propose` gives."""
    features, proposals, shapes = proposed
    segmenter.roi_heads.nms_thresh = nms
    found, _ = segmenter.roi_heads(features, proposals, shapes)
    original = [tuple(image.shape[-2:])]
    found = segmenter.transform.postprocess(found, shapes, original)[0]
    segmenter.roi_heads.nms_thresh = preset.detector.box_nms
    return {key: value.cpu() for key, value in found.items()}


with torch.no_grad():
    friend_proposed = propose(segmenter, [friend_image.to(device)])
same = detect_at(preset.detector.box_nms, friend_image, friend_proposed)
# the same as the whole detector, run at once
torch.testing.assert_close(same["scores"], found["scores"])

raw = detect_at(1.0, friend_image, friend_proposed)
ggo = raw["labels"] == 1
boxes, scores = raw["boxes"][ggo], raw["scores"][ggo]  # [K, 4], [K]
for threshold in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
    kept = nms_by_hand(boxes, scores, threshold)
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))
    print(f"NMS {threshold:4}: {len(kept):3} of {len(boxes)} GGO boxes stay")

# %% [markdown]
# ### Figure 2 of the paper
#
# Figure 2 of the paper shows one model at the NMS thresholds 0.25 and 0.75, beside the true mask.
# Its first slice has both kinds of lesion, its second only GGO. A detection counts if its score is
# above 0.75, and a pixel of its mask if the logit is above 0, that is, a probability above 0.5. We
# remake it on phantoms, with our old friend on top. Below come the judged slice whose C lies
# deepest in a GGO, and the one with the most GGO and no C. We put the truth first.

# %%
def deepest(target):
    """The largest IoU between the boxes of a GGO and a C."""
    ggo, c = (target["boxes"][target["labels"] == k] for k in (1, 2))
    overlap = torchvision.ops.box_iou(ggo, c)
    return float(overlap.max()) if overlap.numel() else 0.0


def only_ggo(target):
    """How many GGO, if there is nothing else."""
    return len(target["labels"]) * bool((target["labels"] == 1).all())


inside = judged.indices[int(np.argmax([deepest(t) for t in true]))]
alone = judged.indices[int(np.argmax([only_ggo(t) for t in true]))]
shown = [("old friend", friend_image, friend_target, friend_mask)]
for name, i in (("C in GGO", inside), ("only GGO", alone)):
    shown.append((name, *test[i], test.read(i)[1]))

# %% mystnb={"image": {"alt": "Three rows of three panels. Columns: true lesions; detections at NMS 0.25; detections at NMS 0.75. The titles count the detections."}, "figure": {"caption": "Figure 2 of the paper, remade on phantoms: (a) truth, (b) NMS 0.25, (c) NMS 0.75, all with scores above 0.75. Look at what (c) adds to (b): new lesions, or second boxes on the same ones? The view is cut to the lungs. Synthetic."}}
fig, axes = plt.subplots(3, 3, figsize=(10, 8.6), layout="constrained")
for row, (name, image, target, mask) in zip(axes, shown, strict=True):
    with torch.no_grad():
        proposed = propose(segmenter, [image.to(device)])
    ax = plotting.show_lesions(image, target, row[0])
    _ = ax.set_title(f"(a) truth: {name}")
    for ax, letter, nms in zip(row[1:], "bc", (0.25, 0.75), strict=True):
        at = above(detect_at(nms, image, proposed), 0.75)
        del at["scores"]  # printed scores would cover each other
        _ = plotting.show_lesions(image, at, ax)
        count = len(at["labels"])
        _ = ax.set_title(f"({letter}) NMS {nms}: {count} detections")
    for ax in row:
        zoom(ax, mask)
        if legend := ax.get_legend():
            _ = legend.remove()
lines = [
    plt.Line2D([], [], color=colour, ls=line, label=name)
    for colour, line, name in zip(
        plotting.LESION_COLOURS, plotting.LESION_LINES, classes, strict=True
    )
]
_ = fig.legend(handles=lines, loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# Slide through more thresholds. The score threshold is low here (0.25), so that you see what NMS
# takes away.

# %%
def draw_nms(nms):
    """Our old friend at one NMS threshold, scores above 0.25."""
    at = detect_at(nms, friend_image, friend_proposed)
    return draw_friend(above(at, 0.25), f"NMS {nms:.2f}")


nms_values = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
frame_slider(
    [draw_nms(nms) for nms in nms_values],
    [f"NMS threshold {nms}" for nms in nms_values],
    "NMS threshold",
    "The old friend with the detections that non-maximum suppression keeps",
    caption="What NMS keeps on the old friend, scores above 0.25; at 1 it keeps all. Synthetic.",
    start=3,
    dpi=70,
)

# %% [markdown]
# With a running notebook you can choose any value:

# %% tags=["remove-output"]
def live_nms(nms):
    """Draw into the widget."""
    _ = draw_nms(nms)
    plt.show()


_ = ipywidgets.interact(
    live_nms, nms=ipywidgets.FloatSlider(value=0.75, min=0.05, max=1.0, step=0.05)
)

# %% [markdown]
# ### Why 0.75?
#
# Three arguments speak for a high threshold. The third is the paper's own.
#
# 1. *Overlapping lesions.* If two true lesions overlap, a low threshold removes one of them.
# 2. *A C inside a GGO.* A low threshold would remove one of the two, but only if NMS ran over both
#    classes together. It runs per class.
# 3. *More ranked boxes.* The classifier reads the $N$ best boxes. If NMS leaves one box for each
#    lesion, a slice with one small lesion has few boxes with high scores. The paper reports that
#    several overlapping ones speak for COVID-19, which raises its sensitivity at some cost in
#    accuracy.
#
# We can test the first two without any model. Suppose we had a perfect detector, whose boxes are
# the true ones. How many lesions would NMS remove?

# %% tags=["nbval-check-output"]
total = sum(len(target["labels"]) for target in true)
print(f"perfect boxes of {total} lesions: how many does NMS remove?")
for threshold in (0.1, 0.25, 0.5, 0.75):
    lost = {"per class": 0, "all classes together": 0}
    for target in true:
        boxes, labels, area = target["boxes"], target["labels"], target["area"]
        kept = torchvision.ops.batched_nms(boxes, area, labels, threshold)
        lost["per class"] += len(labels) - len(kept)
        kept = torchvision.ops.nms(boxes, area, threshold)
        lost["all classes together"] += len(labels) - len(kept)
    counts = ", ".join(f"{name} {count}" for name, count in lost.items())
    print(f"NMS {threshold:4}: {counts}")

# %% [markdown]
# The counts per class answer the first argument for these phantoms: lesions of one class are
# separate regions, and their boxes hardly overlap. On real slices, where large lesions run into
# each other, it may be otherwise. The counts for all classes together answer the second: there are
# such lesions, and NMS per class keeps them. The third argument is about the classifier, and
# [chapter 6](06_ranked_boxes.ipynb) takes it up. What the threshold does to the quality of a
# *detector* we can find out once we have a measure for it.
#
# ## Average precision by hand
#
# A measure for detectors must answer three questions. Which detections are right? What part do
# their scores play? And how does all this become one number?
#
# **Right** means: the mask overlaps a true lesion of the same class enough, and no better-scored
# detection has taken that lesion. We run the detector once over the judged slices and keep its
# masks as true/false.

# %%
pairs = []  # (prediction, target) of each judged slice
for _, prediction, target in predict_lesions(segmenter, judged):
    # float [K, 1, H, W] -> bool [K, H, W]
    prediction["masks"] = binary_masks(prediction)
    pairs.append((prediction, target))
count = sum(len(prediction["scores"]) for prediction, _ in pairs)
print(f"{count} detections for {total} lesions")


# %%
def mask_overlap(first, second):
    """IoU of masks bool [K, H, W] and [L, H, W] -> float64 [K, L]."""
    # [K, HW], [L, HW]
    first, second = first.flatten(1).double(), second.flatten(1).double()
    common = first @ second.T  # [K, L] pixels that both have
    union = first.sum(dim=1)[:, None] + second.sum(dim=1) - common
    return (common / union.clamp(min=1)).numpy()


def match(overlap, threshold):
    """Greedy matching of one slice and class.

    Rows of `overlap` [K, L] are in falling score. Each takes the best
    lesion that is still free. Returns int [K]: that lesion, or -1.
    """
    taken = np.full(len(overlap), -1)
    free = np.ones(overlap.shape[1], dtype=bool)
    for k, row in enumerate(overlap):
        row = np.where(free, row, -1)
        if len(row) and row.max() >= threshold:
            taken[k] = row.argmax()
            free[taken[k]] = False
    return taken


# %% [markdown]
# For the GGO of our old friend, the matrix of IoU looks like this. A second detection of a lesion
# may have a high IoU too, but the lesion is already taken, so it counts as wrong.

# %% mystnb={"image": {"alt": "A heat map with detections in rows, in falling score, and true lesions in columns; cells hold the IoU, and a frame marks the detection that takes each lesion."}, "figure": {"caption": "IoU of the 12 best GGO detections of the old friend with its GGO lesions. A frame marks a match at IoU 0.5: the best score wins, not the best IoU. Synthetic."}}
is_ggo = found["labels"] == 1
# the detector returns falling scores
friend_masks = binary_masks(found)[is_ggo][:12]
true_masks = friend_target["masks"][friend_target["labels"] == 1]
friend_overlap = mask_overlap(friend_masks, true_masks)
friend_taken = match(friend_overlap, 0.5)
ax = plotting.get_ax(5.5, 4.8)
drawn = ax.imshow(friend_overlap, cmap="Blues", vmin=0, vmax=1, aspect="auto")
for (k, lesion), value in np.ndenumerate(friend_overlap):
    if value > 0:
        _ = ax.text(
            lesion, k, f"{value:.2f}", ha="center", va="center",
            color="white" if value > 0.6 else "black",
        )  # fmt: skip
    if friend_taken[k] == lesion:
        frame = plt.Rectangle(
            (lesion - 0.47, k - 0.45), 0.94, 0.9, fill=False, lw=2.5, color=plotting.VERMILLION
        )
        _ = ax.add_patch(frame)
_ = ax.set_xticks(range(friend_overlap.shape[1]))
_ = ax.set_yticks(
    range(len(friend_overlap)),
    [f"{s:.2f}" for s in found["scores"][is_ggo][:12].tolist()],
)
_ = ax.set(
    xlabel="True GGO lesion (number)",
    ylabel="Detection (its score, no unit)",
)
_ = ax.figure.colorbar(drawn, ax=ax, label="IoU of the masks (no unit)")
plt.show()

# %% [markdown]
# **Scores** order the detections of *all* slices. Go down that list. After each detection, count:
#
# $$\text{precision} = \frac{\text{right so far}}{\text{listed so far}}, \qquad
# \text{recall} = \frac{\text{right so far}}{\text{all true lesions}}.$$
#
# Each place in the list stands for one score threshold, so the curve of precision over recall shows
# all of them.
#
# **One number** is the area under that curve. COCO {cite:p}`Lin2014` first replaces each precision
# by the best one at this recall *or a higher one*. This removes the teeth of the curve. Then it
# averages over 101 recalls,
#
# $$\text{AP} = \frac{1}{101} \sum_{\rho \in \{0, 0.01, \dots, 1\}} \max_{\rho' \ge \rho}
# \text{precision}(\rho'),$$
#
# where a recall that is never reached gives 0. Only the *order* of the scores matters, not their
# values.

# %%
def average_precision(hits, n_targets):
    """AP by COCO's 101 recalls; hits bool [K] in falling score."""
    found = np.cumsum(hits)
    recall = found / n_targets
    precision = found / np.arange(1, len(hits) + 1)
    # the best from here on
    best = np.maximum.accumulate(precision[::-1])[::-1]
    # where each recall is first reached; never: at the 0 behind the end
    place = np.searchsorted(recall, np.linspace(0, 1, 101))
    return np.append(best, 0)[place].mean()


# %% [markdown]
# Here is a table that you can check on paper: six detections, four of them right, and five true
# lesions.

# %% tags=["nbval-check-output"]
hits = np.array([1, 1, 0, 1, 0, 1], dtype=bool)
print("rank       ", *[f"{k:5}" for k in range(1, 7)])
print("right      ", *[f"{'yes' if hit else 'no':>5}" for hit in hits])
print("precision  ", *[f"{p:5.2f}" for p in np.cumsum(hits) / np.arange(1, 7)])
print("recall     ", *[f"{r:5.2f}" for r in np.cumsum(hits) / 5])
# 41 recalls (0 to 0.4) at 1, 20 (to 0.6) at 3/4, 20 (to 0.8) at 4/6, 20 at 0
on_paper = (41 * 1 + 20 * 3 / 4 + 20 * 4 / 6) / 101
print(f"AP: {average_precision(hits, 5):.4f}, on paper {on_paper:.4f}")
assert math.isclose(average_precision(hits, 5), on_paper)

# %% [markdown]
# Now the judged slices. The IoU matrices hold all that we need, so we compute them once.

# %%
def overlaps(pairs, label):
    """For each slice the scores [K], falling, and IoU [K, L] of a class."""
    result = []
    for prediction, target in pairs:
        mine = torch.where(prediction["labels"] == label)[0]
        scores = prediction["scores"][mine]
        mine = mine[scores.argsort(descending=True, stable=True)]
        masks = target["masks"][target["labels"] == label]
        matrix = mask_overlap(prediction["masks"][mine], masks)
        result.append((prediction["scores"][mine].numpy(), matrix))
    return result


def ranked_hits(table, threshold):
    """All detections in falling score: is it right, and its score."""
    scores = np.concatenate([scores for scores, _ in table])
    hits = np.concatenate([match(o, threshold) >= 0 for _, o in table])
    order = np.argsort(-scores, kind="stable")
    return hits[order], scores[order]


tables = {name: overlaps(pairs, k) for k, name in enumerate(classes, start=1)}
n_true = {k: sum(o.shape[1] for _, o in t) for k, t in tables.items()}
coco = CocoAP(classes)
coco.update([p for p, _ in pairs], [t for _, t in pairs])
coco = coco.compute()
for name, table in tables.items():
    ours = average_precision(ranked_hits(table, 0.5)[0], n_true[name])
    theirs = coco[f"mask_ap50_{name}"]
    print(f"AP50 of {name:3}: by hand {ours:.6f}, CocoAP {theirs:.6f}")
    assert abs(ours - theirs) < 1e-5

# %% mystnb={"image": {"alt": "Two panels, one for GGO and one for C: precision against recall as a jagged thin line, its monotone envelope as a thick line, and markers at the score thresholds 0.75 and 0.5."}, "figure": {"caption": "Precision and recall on the judged phantoms at mask IoU 0.5. AP is the area under the thick line. A score threshold picks one point of the curve. Synthetic."}}
fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
for ax, name, colour in zip(axes, tables, plotting.LESION_COLOURS, strict=True):
    hits, scores = ranked_hits(tables[name], 0.5)
    recall = hits.cumsum() / n_true[name]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    thin, thick = {"color": "black", "lw": 0.8}, {"color": colour, "lw": 3}
    _ = ax.plot(recall, precision, **thin, label="as counted", zorder=3)
    _ = ax.plot(recall, best, **thick, alpha=0.8, label="best from here on")
    for threshold, marker in ((0.75, "o"), (0.5, "s")):
        k = (scores > threshold).sum() - 1
        look = {"color": "black", "label": f"score > {threshold}", "ls": ""}
        _ = ax.plot(recall[k], precision[k], marker, **look)
    ap = average_precision(hits, n_true[name])
    _ = ax.set(
        title=f"{name}: AP50 {ap:.2f}",
        xlabel="Recall (no unit)",
        xlim=(0, 1),
        ylim=(0, 1.03),
    )
    _ = ax.legend(loc="lower left")
_ = axes[0].set_ylabel("Precision (no unit)")
plt.show()

# %% [markdown]
# Each marker shows what a score threshold gives you: the recall that it reaches, and the precision
# at which it does so. The last exercise asks what the wrong detections are.
#
# ### Ten thresholds
#
# How much overlap is enough? COCO asks ten times, at IoU 0.50, 0.55, ... 0.95, and its AP is the
# mean over thresholds and classes. Where it says AP50 it asks once.

# %%
ious = np.linspace(0.5, 0.95, 10)
curve = {}
for name, table in tables.items():
    ranked = [ranked_hits(table, iou)[0] for iou in ious]
    curve[name] = [average_precision(hits, n_true[name]) for hits in ranked]
ours = np.mean(list(curve.values()))
print(f"mask AP: by hand {ours:.6f}, CocoAP {coco['mask_ap']:.6f}")
assert abs(ours - coco["mask_ap"]) < 1e-5

# %% mystnb={"image": {"alt": "AP against the IoU threshold for GGO and C, two falling curves."}, "figure": {"caption": "AP at each of the ten thresholds. The more exact an outline must be, the fewer detections count as right. Phantoms, synthetic."}}
ax = plotting.get_ax(6, 3.8)
for (name, values), colour, line in zip(
    curve.items(), plotting.LESION_COLOURS, plotting.LESION_LINES, strict=True
):
    _ = ax.plot(ious, values, line, color=colour, marker="o", label=name)
_ = ax.set(xlabel="IoU threshold (no unit)", ylabel="AP (no unit)")
_ = ax.set_ylim(0, 1)
_ = ax.legend()
plt.show()

# %% [markdown]
# One reason for the fall is simple: the lesions are small. Suppose a lesion is a disc of radius $r$
# pixels, and its prediction is one pixel too wide all round. Then
#
# $$\text{IoU} = \left(\frac{r}{r + 1}\right)^2.$$

# %% tags=["nbval-check-output"]
for r in (2, 3, 5, 10, 20, 40):
    iou = (r / (r + 1)) ** 2
    print(f"radius {r:2} pixels, one pixel too wide: IoU {iou:.2f}")
areas = torch.cat([target["area"] for target in true])  # pixels
radius = (areas.median() / math.pi).sqrt()
print(f"half of our lesions are smaller than a disc of radius {radius:.1f}")

# %% [markdown]
# At a radius of 3 pixels, one pixel too many turns a lesion that was found in the right place into
# a miss at IoU 0.75. So AP at high thresholds says as much about the size of lesions and pixels as
# about the detector. For small lesions AP50 is fairer, and an AP at one image size cannot be
# compared with an AP at another.
#
# ### What does NMS do to AP?
#
# Now we can measure it. We change the threshold of the trained detector and judge again.

# %%
print("NMS   detections a slice   AP50     AP   (phantoms)")
at_nms = {preset.detector.box_nms: [prediction for prediction, _ in pairs]}
for nms in (0.25, 0.5, 0.75):
    if nms not in at_nms:
        segmenter.roi_heads.nms_thresh = nms
        found_again = [p for _, p, _ in predict_lesions(segmenter, judged)]
        at_nms[nms] = [{**p, "masks": binary_masks(p)} for p in found_again]
        segmenter.roi_heads.nms_thresh = preset.detector.box_nms
    metric = CocoAP(classes)
    metric.update(at_nms[nms], true)
    result = metric.compute()
    count = np.mean([len(p["scores"]) for p in at_nms[nms]])
    ap50, ap = result["mask_ap50"], result["mask_ap"]
    print(f"{nms:4} {count:19.1f} {ap50:6.3f} {ap:6.3f}")

# %% [markdown]
# Compare the rows. AP50 forgives duplicates that score low; where it falls, some of them score
# above right detections of other lesions. AP over ten thresholds can even gain from more boxes:
# where the first box of a lesion fits loosely, a second one may still match at a high IoU. (All
# rows are one model on the same slices, so a difference of a few thousandths may be chance.) The
# second column shows what the paper is after, which is more boxes for the classifier to rank.
#
# ## The released code's own AP
#
# The tables of the released code hold another number under the same name. For one slice, it is
# computed like this:
#
# - only detections above a score threshold enter: 0.05 by default, 0.75 where its README evaluates
#   the light models ([paper v code](paper_v_code.ipynb), item 14). We take 0.75, as in the paper's
#   Figure 2;
# - each *lesion* looks for the detection of its class with the largest IoU, whatever its score.
#   Two lesions may find the same detection, which then counts once;
# - both classes share one curve, and the area under it is taken at each step of recall;
# - a slice without lesions gives 1 if nothing is detected, else 0.
#
# The result is the mean over *slices*. COCO makes one list of all slices, and takes the mean over
# classes.

# %%
def image_ap_by_hand(prediction, target, threshold=0.5):
    """The released code's AP of one slice, at one IoU threshold."""
    n, m = len(prediction["labels"]), len(target["labels"])
    if n == 0 or m == 0:
        return float(n == m)
    # [n, m], falling score
    overlap = mask_overlap(binary_masks(prediction), target["masks"])
    overlap[(prediction["labels"][:, None] != target["labels"]).numpy()] = 0
    # lesions choose; of equals the lowest score
    choice = n - 1 - overlap[::-1].argmax(axis=0)
    hits = np.zeros(n, dtype=bool)
    hits[choice[overlap.max(axis=0) > threshold]] = True
    precision = np.cumsum(hits) / np.arange(1, n + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return best[hits].sum() / m


confident = [above(prediction, 0.75) for prediction, _ in pairs]
for prediction, target in zip(confident, true, strict=True):
    assert math.isclose(
        image_ap_by_hand(prediction, target),
        author_image_ap(prediction, target)[0],
        abs_tol=1e-6,
    )


def coco_ap50(predictions):
    """COCO's AP50 of the judged slices."""
    metric = CocoAP(classes)
    metric.update(predictions, true)
    return metric.compute()["mask_ap50"]


def released_ap50(predictions):
    """The released code's AP at IoU 0.5 of the same slices."""
    return author_ap(predictions, true, thresholds=(0.5,))[0]


header = "".join(f"  NMS {nms:4}" for nms in sorted(at_nms))
print(f"{'AP50 on phantoms':35}{header}")
rules = {"COCO": coco_ap50, "released code": released_ap50}
for score, kept in ((0, "all"), (0.75, "score above 0.75")):
    parts = [[above(p, score) for p in at_nms[nms]] for nms in sorted(at_nms)]
    for name, rule in rules.items():
        values = "".join(f"{rule(part):10.3f}" for part in parts)
        print(f"{name}, {kept}".ljust(35) + values)

# %% [markdown]
# It is one model and one set of slices, and each of these numbers may rightly be called AP50. They
# differ for two reasons. First, for COCO a detection with a low score does little harm, because it
# stands at the end of the list. By the released rule it can do harm: a lesion takes the box that
# fits *best*, which may be a second box with a low score, and then the first box counts as wrong.
# The more duplicates NMS leaves, the more this can cost. A cut such as 0.75 keeps most of them out.
# Second, the mean over slices gives the only lesion of one slice the weight of all lesions of
# another.
#
# The README of the released code reports, by this rule, AP at IoU 0.5, at 0.75, and over
# thresholds: 61.92, 45.22 and 44.68 for masks of one merged class; 50.20, 41.98 and 38.71 for two
# classes. They cannot be compared with the COCO AP of another paper, nor with ours: the rule
# differs, and so do the slices, the size of the image, and the smallest lesion that counts.
#
# ## Dice
#
# Often one wants to know which pixels are lesion rather than how many lesions there are. Dice's
# coefficient compares two masks $m$ and $m'$ by their areas,
#
# $$\text{Dice} = \frac{2\,|m \cap m'|}{|m| + |m'|} = \frac{2\,\text{IoU}}{1 + \text{IoU}}.$$
#
# To get one mask per class, we paint the detections above a score threshold into the slice, in
# order of rising score, so that the best lies on top.

# %%
painted = np.zeros(friend.shape, dtype=np.uint8)  # [H, W]: 0, 2 GGO, 3 C
masks = binary_masks(found).numpy()
for k in reversed(range(len(masks))):  # falling score, so go backwards
    if found["scores"][k] > 0.75:
        painted[masks[k]] = int(found["labels"][k]) + 1
assert (painted == semantic_mask(found, 0.75)).all()
for code, name in enumerate(classes, start=2):
    a, b = painted == code, friend_mask == code
    value = 2 * (a & b).sum() / (a.sum() + b.sum())
    assert math.isclose(value, dice(a, b))
    print(f"old friend, Dice of {name:3}: {value:.2f}")


# %%
def slice_dice(pairs, score=0.75):
    """Dice of each slice and class, float [M, classes]; NaN: neither has it."""
    rows = []
    for prediction, target in pairs:
        painted = semantic_mask(prediction, score)
        scores = torch.ones(len(target["labels"]))
        truth = semantic_mask({**target, "scores": scores}, 0)
        codes = range(2, 2 + len(classes))
        rows.append([dice(painted == c, truth == c) for c in codes])
    return np.array(rows)


dices = slice_dice(pairs)
for name, column in zip(classes, dices.T, strict=True):
    count = np.isfinite(column).sum()
    mean = np.nanmean(column)
    print(f"Dice of {name:3} {mean:.2f}, mean of {count} slices")

# %% [markdown]
# AP and Dice can disagree. Dice sees one score threshold and no instances, so joining two lesions
# into one costs nothing, and a lesion counts by its area. AP sees all thresholds, and each lesion
# counts once.
#
# ## How sure is the number?
#
# With other patients we would have got another AP. The bootstrap {cite:p}`Efron1979` estimates how
# different it might be: draw patients with replacement, judge again, and look at the spread. We
# draw whole *patients*, because slices of one patient resemble each other. Matching happens inside
# a slice, so it is done once; each draw only sorts and counts.

# %%
def bootstrap(tables, dices, repeats=200, seed=0):
    """AP50 and mean Dice of each draw of patients, two arrays [repeats]."""
    rng = np.random.default_rng(seed)
    of = np.array(patients)
    slices_of = [np.flatnonzero(of == name) for name in chosen]
    hits = {k: [match(o, 0.5) >= 0 for _, o in t] for k, t in tables.items()}
    aps, means = [], []
    for _ in range(repeats):
        those = rng.integers(len(chosen), size=len(chosen))
        drawn = np.concatenate([slices_of[i] for i in those])
        values = []
        for name, table in tables.items():
            scores = np.concatenate([table[i][0] for i in drawn])
            right = np.concatenate([hits[name][i] for i in drawn])
            n_targets = sum(table[i][1].shape[1] for i in drawn)
            order = np.argsort(-scores, kind="stable")
            values.append(average_precision(right[order], n_targets))
        aps.append(np.mean(values))
        means.append(np.nanmean(dices[drawn], axis=0).mean())
    return np.array(aps), np.array(means)


ap_draws, dice_draws = bootstrap(tables, dices)
mean_dice = np.nanmean(dices, axis=0).mean()
print("with the 95 % interval by patients:")
for name, value, draws in (
    ("mask AP50", coco["mask_ap50"], ap_draws),
    ("Dice, mean of the classes", mean_dice, dice_draws),
):
    low, high = np.quantile(draws, [0.025, 0.975])
    print(f"{name:25} {value:.3f}, {low:.3f} to {high:.3f}")

# %% [markdown]
# The interval covers the choice of patients. It does not cover the training, where another seed
# gives another model. The table of results in the repository's README has three seeds.
#
# ## Better than what?
#
# To judge a number, you need something to compare it with. First we take the model that comes with
# the package, which was trained by the same call on the same slices. If our own run went well, the
# two are alike. (In the other presets this is the file that we have just saved.)
# `evaluate_segmenter` gives in one call what we have built by hand.

# %%
shipped = trained_segmenter(PRESET, device, shipped=True)
shipped = evaluate_segmenter(shipped, judged)
dice_keys = [f"dice_{name}" for name in classes]
live = coco | dict(zip(dice_keys, np.nanmean(dices, axis=0), strict=True))
print(f"{'phantoms':14} {'trained here':>12} {'shipped':>9}")
for key in ("mask_ap50", "mask_ap", "box_ap50", *dice_keys):
    print(f"{key:14} {live[key]:12.3f} {shipped[key]:9.3f}")
assert shipped["slices"] == len(pairs)
assert abs(live["mask_ap50"] - shipped["mask_ap50"]) < 0.15

# %% [markdown]
# Next comes a rule without learning: inside the body, call everything a lesion that is neither air
# nor soft tissue, and take connected regions. The rule knows no classes, so for this comparison all
# lesions are of one merged class, in the truth and in our detections. Consolidation is about as
# bright as soft tissue, so much of it is out of the rule's reach, and we compare a second time, on
# GGO alone. To be fair, we choose the two thresholds of the rule on training slices, and judge it
# on the same slices as the detector.

# %%
def judge_rule(dataset, low, high):
    """AP50 of the rule on slices whose lesions are of one class."""
    metric = CocoAP()
    for i in range(len(dataset)):
        image, target = dataset[i]
        picture = image[0].numpy()
        found = threshold_detections(picture, low, high, preset.min_area)
        metric.update([found], [target])
    return metric.compute()["mask_ap50"]


few = Subset(
    LesionSlices(root / "lesions", "train", "merged", preset.min_area),
    range(60),
)
grid = [(a, b) for a in (0.45, 0.5, 0.55) for b in (0.75, 0.8, 0.85)]
low, high = max(grid, key=lambda pair: judge_rule(few, *pair))
for lesions, name in (("merged", "GGO or C"), ("ggo", "GGO alone")):
    one_class = LesionSlices(root / "lesions", "test", lesions, preset.min_area)
    one_class = Subset(one_class, judged.indices)
    metric = CocoAP()
    for (prediction, _), (_, target) in zip(pairs, one_class, strict=True):
        kept = prediction["labels"] <= (2 if lesions == "merged" else 1)
        prediction = {key: value[kept] for key, value in prediction.items()}
        prediction["labels"] = torch.ones_like(prediction["labels"])
        metric.update([prediction], [target])
    rule = judge_rule(one_class, low, high)
    detector = metric.compute()["mask_ap50"]
    print(f"{name:9} mask AP50: rule {rule:.2f}, detector {detector:.2f}")
    assert detector > rule

# %% [markdown]
# The first line is hard on both. Where a C lies inside a GGO, the two are one lesion there, so one
# of the detector's two boxes counts as wrong; and the rule misses most of the C. The second line
# asks only for what the rule can find. The detector is ahead in both. What the rule reaches tells
# you how easy the slices are: it can find a GGO that stands alone, but it cannot tell one from a
# vessel, a scar or dependent density of the same grey, and a real lung has more of these.
#
# ## Which lesions are missed?
#
# A single number does not show where the misses are. We take the detections above 0.5 and ask for
# each true lesion whether one of them matched it, at IoU 0.5.

# %% mystnb={"image": {"alt": "Recall with error bars against lesion area on a logarithmic axis, for GGO and C; the smallest lesions have a lower recall than the largest."}, "figure": {"caption": "Share of true lesions that are found (score above 0.5, mask IoU at least 0.5), by area, with Wilson intervals. Phantoms, synthetic."}}
ax = plotting.get_ax(7, 4)
pixels = preset.phantoms.size**2
for label, (name, table) in enumerate(tables.items(), start=1):
    areas, recalled = [], []
    for (scores, overlap), target in zip(table, true, strict=True):
        taken = match(overlap[scores > 0.5], 0.5)
        recalled += np.isin(np.arange(overlap.shape[1]), taken).tolist()
        area = target["area"][target["labels"] == label]
        areas += (100 * area / pixels).tolist()
    areas, recalled = np.array(areas), np.array(recalled)
    # five groups of equal number
    groups = np.array_split(np.argsort(areas, kind="stable"), 5)
    x = np.array([np.median(areas[group]) for group in groups])
    y = np.array([recalled[group].mean() for group in groups])
    ends = [wilson(int(recalled[group].sum()), len(group)) for group in groups]
    ends = np.array(ends).T
    _ = ax.errorbar(
        x, y, yerr=np.maximum(np.abs(ends - y), 0), capsize=4, marker="os"[label - 1],
        color=plotting.LESION_COLOURS[label - 1], ls=plotting.LESION_LINES[label - 1],
        label=f"{name} ({len(areas)} lesions)",
    )  # fmt: skip
    assert y[0] < y[-1]
_ = ax.set(xlabel="Area of the lesion (% of the image)")
_ = ax.set(xscale="log", ylim=(0, 1.03))
ticks = (0.1, 0.2, 0.5, 1, 2)
_ = ax.set_xticks(ticks, [str(tick) for tick in ticks])
_ = ax.set_xticks([], minor=True)
_ = ax.set_ylabel("Recall (share of lesions)")
_ = ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# Small lesions are missed more often than large ones. Part of this is due to the measure: as we
# saw, one pixel all round costs a small lesion much of its IoU, so a small shift on top makes it a
# miss at 0.5. Another part is due to the detector: its features have a stride of several pixels,
# and a lesion smaller than that leaves little trace in them.
#
# ## What these slices cannot show
#
# Every slice of this set comes from a COVID-19 patient, as in the paper's set {cite:p}`Zhang2020`.
# So no number above says what the detector does in *healthy* lungs. Let us find out: in how many
# control slices does it call anything a lesion?

# %%
control = SliceImages(root / "slices", "test")
healthy = [i for i, label in enumerate(control.labels) if label == 0][:50]
found_in = [detect(control[i][0])["scores"].tolist() for i in healthy]
tops = [max(scores, default=0.0) for scores in found_in]
for threshold in (0.25, 0.5, 0.75):
    alarms = sum(top > threshold for top in tops)
    low, high = wilson(alarms, len(tops))
    print(
        f"score > {threshold:4}: in {alarms} of {len(tops)} control slices, "
        f"95 % interval {low:.0%} to {high:.0%}"
    )

# %% [markdown]
# (The intervals take slices as independent, which the slices of a patient are not.)
#
# None of these false alarms entered AP. A detector of lesions is not yet a classifier of slices:
# that it has found something does not mean that the patient is ill. The next chapters build the
# classifier from these very detections, the doubtful ones included.
#
# All of this is also about slices, and about phantoms. For real CT these numbers have to be
# measured again, on patients of other hospitals.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · AP at another threshold
#
# Kind: experiment, **
#
# Compute AP at mask IoU 0.75, for both classes, from the matrices in `tables`. Check the mean
# against `coco["mask_ap75"]`.

# %% tags=["solution"]
# @title Solution
ap75 = [average_precision(ranked_hits(t, 0.75)[0], n_true[name]) for name, t in tables.items()]
print(f"AP75 by hand {np.mean(ap75):.6f}, CocoAP {coco['mask_ap75']:.6f}")
assert abs(np.mean(ap75) - coco["mask_ap75"]) < 1e-5

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Duplicates
#
# Kind: experiment, **
#
# Switch NMS off (`nms_thresh = 1.0`) and judge the first 25 slices of `judged` again. What do
# duplicates do to AP50? And what if each detection came twice, with the same score? Think before
# you run it: AP sees only the order.

# %% tags=["solution"]
# @title Solution
part = Subset(test, judged.indices[:25])


def ap50(predictions):
    """COCO's AP50 of the first slices."""
    metric = CocoAP(classes)
    metric.update(predictions, true[:25])
    return metric.compute()["mask_ap50"]


with_nms = [prediction for prediction, _ in pairs[:25]]
segmenter.roi_heads.nms_thresh = 1.0
without = [prediction for _, prediction, _ in predict_lesions(segmenter, part, progress=False)]
segmenter.roi_heads.nms_thresh = preset.detector.box_nms
twice = [{k: torch.cat([v, v]) for k, v in p.items()} for p in with_nms]
print(f"AP50 with NMS 0.75 {ap50(with_nms):.3f}, without NMS {ap50(without):.3f}")
print(f"AP50 if each detection came twice, with the same score: {ap50(twice):.3f}")
assert ap50(without) < ap50(with_nms) and ap50(twice) < ap50(with_nms)

# %% [markdown] tags=["answer"]
# A duplicate is a wrong detection. It hurts when it stands above right ones in the list, so copies
# with high scores cost most. Without NMS, each lesion gets many boxes with high scores.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Where to cut a mask
#
# Kind: experiment, **
#
# The paper says that a pixel is lesion if its logit is above 0. The released code cuts the raw
# logit at 0.5. What probability is that? Judge the first 25 slices with both cuts (`CocoAP(classes,
# mask_threshold=...)`). Do masks grow or shrink?

# %% tags=["solution"]
# @title Solution
cut = 1 / (1 + math.exp(-0.5))
part = Subset(test, judged.indices[:25])
soft = [prediction for _, prediction, _ in predict_lesions(segmenter, part, progress=False)]
sizes = {}
for threshold in (0.5, cut):
    metric = CocoAP(classes, mask_threshold=threshold)
    metric.update(soft, true[:25])
    result = metric.compute()
    sizes[threshold] = sum(int(binary_masks(p, threshold).sum()) for p in soft)
    print(f"cut at {threshold:.3f}: AP50 {result['mask_ap50']:.3f}, AP {result['mask_ap']:.3f}")
print(f"the masks have {sizes[cut] / sizes[0.5]:.0%} of their area at 0.5")
assert abs(cut - 0.622) < 1e-3 and sizes[cut] < sizes[0.5]

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Score threshold and Dice
#
# Kind: experiment, **
#
# Draw the mean Dice of each class against the score threshold. Is 0.75 a good choice here? On which
# slices should you choose it?

# %% tags=["solution"] mystnb={"image": {"alt": "Mean Dice against the score threshold for GGO and C, one curve for each."}, "figure": {"caption": "Dice depends on the score threshold. Phantoms, synthetic."}}
# @title Solution
cuts = np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95])
means = np.array([np.nanmean(slice_dice(pairs[:50], score), axis=0) for score in cuts])
ax = plotting.get_ax(6, 3.6)
for column, name, colour, line in zip(
    means.T, classes, plotting.LESION_COLOURS, plotting.LESION_LINES, strict=True
):
    _ = ax.plot(cuts, column, line, color=colour, marker="o", label=name)
_ = ax.set(xlabel="Score threshold (no unit)", ylabel="Mean Dice (no unit)", ylim=(0, 1))
_ = ax.legend()
plt.show()

# %% [markdown] tags=["answer"]
# Where a curve is flat, the choice hardly matters: painting in the order of rising score lets the
# best box win anyway. Choose such a threshold on validation patients. If you choose it on the very
# slices that you report, the result looks better than it is.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · What are the false positives?
#
# Kind: experiment, **
#
# Take the detections above 0.75 that match no lesion at IoU 0.5. How many are second boxes on a
# lesion that is taken, how many a poor outline of a lesion of their class, how many the other
# class, and how many no lesion at all?

# %% tags=["solution"]
# @title Solution
kinds = {"right": 0, "second box": 0, "poor outline": 0, "other class": 0, "no lesion": 0}
for label, table in enumerate(tables.values(), start=1):
    for (scores, overlap), (prediction, target) in zip(table, pairs, strict=True):
        others = mask_overlap(
            # falling score, as in the table
            prediction["masks"][prediction["labels"] == label],
            target["masks"][target["labels"] != label],
        )
        for k, lesion in enumerate(match(overlap, 0.5)):
            same = overlap[k].max(initial=0)
            if scores[k] > 0.75:
                kind = "no lesion"
                if lesion >= 0:
                    kind = "right"
                elif same >= 0.5:
                    kind = "second box"
                elif others[k].max(initial=0) > max(same, 0.1):
                    kind = "other class"
                elif same > 0.1:
                    kind = "poor outline"
                kinds[kind] += 1
print(", ".join(f"{kind} {count}" for kind, count in kinds.items()))
wrong = max(list(kinds)[1:], key=kinds.get)
print(f"most frequent among the wrong ones: {wrong}")
assert sum(kinds.values()) == sum(len(p["scores"]) for p in confident)

# %% [markdown] tags=["answer"]
# Second boxes are what NMS at 0.75 lets pass: two boxes of one lesion often overlap by less than
# that. Detections on no lesion sit on look-alikes, such as vessels and scars. Bear in mind that all
# these slices are of patients with lesions.

# %% [markdown]
# ## What we learned
#
# 1. Five losses are summed and minimised at once; a model that cannot learn one batch by heart has a bug.
# 2. NMS is greedy and runs per class; its threshold can change after training, at no cost.
# 3. AP is the area under precision over recall; greedy matching makes a duplicate a mistake.
# 4. The released code's AP is another number than COCO's, on the very same detections.
# 5. A result needs an interval by patients, a baseline, and slices on which there is nothing to find.
#
# ## Further reading
#
# {cite:t}`He2017` describe the losses of Mask R-CNN and {cite:t}`Ren2015` those of the RPN.
# {cite:t}`Lin2014` define the data set behind COCO's AP. {cite:t}`Fan2020` judge lesion
# segmentation by Dice. {cite:t}`Aleem2020` train Mask R-CNN on COVID-19 CT with several backbones.
# The paper of this book is {cite:t}`TerSarkisov2020`. What goes wrong when such models are judged
# is collected by {cite:t}`Roberts2021`.

