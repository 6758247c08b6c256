# %% [markdown]
# # 11 · What makes it work?
#
# A slice becomes $N$ ranked boxes of five numbers each, and $S$ reads them all. Which of these
# numbers does $S$ need? We take parts away, add others, and see what happens to the accuracy. The
# paper reports no such experiment; everything here is ours, and on phantoms.
#
# **After it you can**
#
# - run an ablation: change one thing, keep the rest, and know how large a difference must be to
#   count;
# - say what scores, deltas, order, the number of boxes and non-maximum suppression (NMS)
#   contribute;
# - widen a row by the class and the place of its box, and judge whether that helps;
# - compare a network with rules of one or two numbers;
# - say why a finding on phantoms may fail on patients.
#
# **You need** [chapter 6](06_ranked_boxes.ipynb) (ranked boxes) and [chapter
# 7](07_covid_ct_mask_net.ipynb) (the module $S$). **Run time:** a minute or two on two CPU cores in
# the preset `quick`. The first chapter that you run also draws the phantoms, once, which takes a
# few minutes more.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a chest drawn by formulas and random numbers
# ([how](phantoms_made.ipynb)). No number below is a result on patients, and nothing here is for
# diagnosis. This chapter asks what a method uses, and the answer depends strongly on the data.
# ```

# %% tags=["fold"]
# @title Imports and versions
import platform
from dataclasses import replace

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import (
    SliceImages,
    mask_to_targets,
    old_friend,
    phantom_mask,
    write_phantoms,
)
from covidmask.interactive import frame_slider
from covidmask.metrics import wilson
from covidmask.models import (
    ClassificationModule,
    area_features,
    encoded_rows,
    fit_area_classifier,
    lesion_mask_rcnn,
    pad_rows,
    propose,
    rank_boxes,
    run_box_head,
    trained_segmenter,
)
from covidmask.models.ranked_boxes import ranked_boxes
from covidmask.training import train_s

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU, too, all digits of float32 count
torch.backends.cudnn.allow_tf32 = False
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}")
print(f"torchvision {torchvision.__version__}, {device}")
print(f"Python {platform.python_version()}")

# %% [markdown]
# The live run uses some of the patients and one seed of $S$. The table near the end has all
# patients and several seeds.

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")
PATIENTS = {"train": 45, "val": 10, "test": 20}  # of each class, at most

# %%
preset = PRESETS[PRESET]
config = preset.classifier
N = config.n_boxes
detector = trained_segmenter(PRESET, device, shipped=True).eval()
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
slices = {split: SliceImages(root / "slices", split) for split in PATIENTS}

# %% tags=["nbval-check-output"]
chosen, labels = {}, {}
for split, dataset in slices.items():
    first = [[], [], []]  # patients of each class, in the order of the list
    patients = dataset.patients
    for patient, label in zip(patients, dataset.labels, strict=True):
        if patient not in first[label]:
            first[label].append(patient)
    kept = {one for group in first for one in group[: PATIENTS[split]]}
    chosen[split] = [i for i, one in enumerate(patients) if one in kept]
    labels[split] = torch.tensor([dataset.labels[i] for i in chosen[split]])
    counts = labels[split].bincount().tolist()
    print(f"{split:5}: {counts} slices of {len(kept)} phantom patients")

# %% [markdown]
# ## One look, many vectors
#
# An *ablation* changes one part and keeps everything else, so that a change of the result has one
# possible cause. The detector is the costly part, and almost no variant changes it. So we let it
# look at each slice once and keep more than the paper does: wide rows, from which we can cut every
# variant.
#
# The paper's row of box $k$ is its score and its encoded deltas,
#
# $$ r_k = (s_k, \delta_{x,k}, \delta_{y,k}, \delta_{w,k}, \delta_{h,k}). $$
#
# Two things that the detector knows are not in it. One is the *class* $c_k$ of the box: a row does
# not say whether it speaks of ground-glass opacity (GGO) or consolidation (C). The other is the
# *place*: deltas tell how a proposal was moved, and not where the proposal was. We add both,
#
# $$ w_k = \bigl(r_k,\; e(c_k),\; x_k / W,\; y_k / H,\; u_k / W,\; v_k / H\bigr), $$
#
# with $e(c)$ a one-hot code of the class, $(x_k, y_k)$ the centre of the decoded box, $u_k$ and
# $v_k$ its width and height, and $W \times H$ the size of the image.
#
# Let us build such rows for our old friend.

# %% tags=["nbval-check-output"]
friend, friend_mask = old_friend(preset.phantoms.size)
picture = torch.from_numpy(friend).expand(3, -1, -1).to(device)  # [3, H, W]
with torch.no_grad():
    features, proposals, shapes = propose(detector, [picture])
    logits, deltas = run_box_head(detector, features, proposals, shapes)
lesion_classes = logits[0].shape[1] - 1
print("logits per proposal:", logits[0].shape[1])
print("deltas per proposal:", deltas[0].shape[1])

# %% [markdown]
# `rank_boxes` chooses and orders, as chapter 6 builds it by hand. It returns the proposal, the
# class, the score and the decoded box of each winner.

# %%
with torch.no_grad():
    ranking = rank_boxes(
        logits[0],
        deltas[0],
        proposals[0],
        shapes[0],
        detector.roi_heads.box_coder,
        config,
    )
    roi = ranking.roi  # [K]
    # [K, 5]
    rows = encoded_rows(logits[0][roi], deltas[0][roi], ranking.label)
kind = F.one_hot(ranking.label - 1, lesion_classes).float()  # [K, 2]
# [K, 2] each, pixels
upper_left, lower_right = ranking.box[:, :2], ranking.box[:, 2:]
height, width = shapes[0]
side = torch.tensor([width, height], device=device)
centre = (upper_left + lower_right) / 2 / side  # [K, 2]
size = (lower_right - upper_left) / side  # [K, 2]
wide = torch.cat([rows, kind, centre, size], dim=1)  # [K, 11]

# %% tags=["nbval-check-output"]
# [N, 11]; if there were fewer than N boxes, pad_rows would repeat some
padded = pad_rows(wide, N)
with torch.no_grad():
    by_package = ranked_boxes(detector, [picture], config)[0]  # [N, 5]
assert torch.allclose(padded[:, :5], by_package, atol=1e-5)
print(tuple(padded.shape), "wide rows")
print("their first 5 columns are the package's ranked boxes")

# %% [markdown]
# ## Which boxes? A knob first
#
# NMS drops a box that overlaps a better one of its class by more than a threshold. The paper sets
# 0.75, which drops only near-copies. At 0.25 each lesion keeps about one box. At 1 nothing is
# dropped, because no overlap exceeds 1.
#
# Move the slider and watch which boxes take the first places.

# %%
def ranked_at(nms, n=N, score=config.score):
    """The ranking of our old friend at another NMS threshold."""
    with torch.no_grad():
        return rank_boxes(
            logits[0],
            deltas[0],
            proposals[0],
            shapes[0],
            detector.roi_heads.box_coder,
            replace(config, nms=nms, n_boxes=n, score=score),
        )


# the detector may have resized the slice
scale = friend.shape[0] / shapes[0][0]


def draw_ranking(nms):
    """Draw the first eight boxes of the ranking and the scores of all N."""
    ranking = ranked_at(nms)
    fig, axes = plt.subplots(
        1,
        2,
        figsize=(7.5, 3.8),
        layout="constrained",
        width_ratios=(1.15, 1),
    )
    _ = plotting.show_slice(friend, axes[0])
    outline = {"colors": "white", "linewidths": 0.8}
    _ = axes[0].contour(friend_mask >= 2, levels=[0.5], **outline)
    for rank in range(min(8, len(ranking.score)) - 1, -1, -1):
        x1, y1, x2, y2 = (ranking.box[rank].cpu() * scale - 0.5).tolist()
        label = int(ranking.label[rank]) - 1
        style = {
            "edgecolor": plotting.LESION_COLOURS[label],
            "ls": plotting.LESION_LINES[label],
        }
        corner, width, height = (x1, y1), x2 - x1, y2 - y1
        box = plt.Rectangle(corner, width, height, fill=False, **style)
        _ = axes[0].add_patch(box)
    _ = axes[0].set_title("first 8 boxes (blue GGO, orange C)", fontsize=9)
    for label, name in enumerate(("GGO", "C"), start=1):
        at = (ranking.label == label).nonzero()[:, 0].cpu()
        _ = axes[1].plot(
            at + 1,
            ranking.score.cpu()[at],
            "os"[label - 1],
            color=plotting.LESION_COLOURS[label - 1],
            markeredgecolor="black",
            label=name,
        )
    _ = axes[1].set(
        xlabel="Rank (1 is the best score)",
        ylabel="Score (no unit)",
        ylim=(0, 1.03),
    )
    _ = axes[1].legend()
    return fig


thresholds = (0.1, 0.25, 0.5, 0.75, 1.0)
frame_slider(
    [draw_ranking(nms) for nms in thresholds],
    [f"{nms:g}" if nms < 1 else "1 (no NMS)" for nms in thresholds],
    "NMS threshold",
    "A drawn chest slice of a COVID-19 patient with the first eight ranked "
    "boxes, and the scores of all ranked boxes against their rank; with a "
    "higher threshold more boxes lie on the same lesion",
    caption="The first boxes of our old friend's ranking, and its scores. "
    "White: true outlines. With a low threshold few boxes share a lesion; "
    "with a high one, lesions are counted several times. Synthetic.",
    start=3,
    dpi=70,
)

# %% [markdown]
# With a running notebook you can choose any threshold:

# %% tags=["remove-output"]
def look(nms):
    """Draw and show, for the slider."""
    _ = draw_ranking(nms)
    plt.show()


_ = ipywidgets.interact(look, nms=ipywidgets.FloatSlider(0.75, min=0.05, max=1, step=0.05))

# %% [markdown]
# ## The same for every slice
#
# One pass of the detector is enough for several settings, because NMS and the score threshold come
# after it. The released code's score threshold lies below 0 and removes nothing; 0.05 is a usual
# value for a detector.

# %%
SETTINGS = {
    "NMS 0.75": replace(config, nms=0.75),
    "NMS 0.25": replace(config, nms=0.25),
    "no NMS": replace(config, nms=1.0),
    "score > 0.05": replace(config, nms=0.75, score=0.05),
}
PAPER = "NMS 0.75"  # the setting of the paper


@torch.no_grad()
def wide_rows(detector, images, settings):
    """Per setting, a list of wide rows [K, 11]; the detector runs once."""
    features, proposals, shapes = propose(detector, images)
    logits, deltas = run_box_head(detector, features, proposals, shapes)
    result = {name: [] for name in settings}
    coder = detector.roi_heads.box_coder
    for name, setting in settings.items():
        for one in zip(logits, deltas, proposals, shapes, strict=True):
            ranking = rank_boxes(*one, coder, setting)
            its_logits, its_deltas = (part[ranking.roi] for part in one[:2])
            rows = encoded_rows(its_logits, its_deltas, ranking.label)
            kind = F.one_hot(ranking.label - 1, lesion_classes).float()
            upper_left, lower_right = ranking.box[:, :2], ranking.box[:, 2:]
            side = torch.tensor([one[3][1], one[3][0]], device=rows.device)
            place = torch.cat(
                [upper_left + lower_right, 2 * (lower_right - upper_left)],
                dim=1,
            )
            # [K, 4]: centre and size as shares of the image
            place = place / 2 / side.repeat(2)
            result[name].append(torch.cat([rows, kind, place], dim=1).cpu())
    return result


def all_rows(detector, settings, every=1):
    """{setting: {split: [K, 11] of each `every`-th chosen slice}}."""
    result = {name: {split: [] for split in chosen} for name in settings}
    for split in chosen:
        indices = chosen[split][::every]
        for start in range(0, len(indices), 8):
            some = indices[start : start + 8]
            images = [slices[split][i][0].to(device) for i in some]
            for name, part in wide_rows(detector, images, settings).items():
                result[name][split] += part
    return result


again = wide_rows(detector, [picture], {PAPER: config})[PAPER][0]
# the same as step by step
assert torch.allclose(again, wide.cpu(), atol=1e-5)
kept = all_rows(detector, SETTINGS)

# %%
for name, parts in kept.items():
    counts = np.array([len(rows) for rows in parts["test"]])
    few, many = counts.min(), counts.max()
    print(f"{name:13} boxes in a slice: {few} to {many}, ", end="")
    print(f"padded slices: {(counts < N).mean():.0%}")

# %% [markdown]
# The list is cut at $N$, so "to $N$" means "at least $N$". Where a slice has fewer boxes, its
# vector is padded. Compare the first line with the last: the score threshold takes away all low
# scores, which can be most of the vector. The paper has a reason to keep them: a healthy slice has
# nothing else.
#
# ## Rules of the game
#
# Every variant gets an $S$ with the same two hidden layers, the same training slices in the same
# order, the same number of steps and the same seed. The validation slices choose the epoch; the
# test slices are used once for each variant.
#
# How large must a difference be? Wilson's interval {cite:p}`Wilson1927` says what chance alone does
# to an accuracy on that many slices, if they are independent. Ours are not, because each patient
# has several. And if you compare twenty variants, one of them will look better by luck. So in this
# live run we only trust large differences and leave small ones to the table of the full run.

# %%
COLUMNS = {
    "score": [0],
    "deltas": [1, 2, 3, 4],
    "class": [5, 6],
    "place": [7, 8, 9, 10],
}
results = {}


def vectors(parts, columns=("score", "deltas"), n=N):
    """{split: [M, n, F]}: some columns of the n best rows, padded."""
    index = [i for name in columns for i in COLUMNS[name]]
    result = {}
    for split, rows_of_split in parts.items():
        padded = [pad_rows(rows[:n], n) for rows in rows_of_split]
        result[split] = torch.stack(padded)[..., index]
    return result


def predict_with_s(
    x, y=labels, hidden=True, seed=SEED, training=preset.classifier_training
):  # fmt: skip
    """Train S on x and y; the classes of the test slices, int64 [M]."""
    torch.manual_seed(seed)
    n, columns = x["train"].shape[1:]
    if hidden:
        s = ClassificationModule(n, config.hidden, columns)
    else:
        linear = nn.Linear(n * columns, len(IMAGE_CLASSES))
        s = nn.Sequential(nn.Flatten(), linear)
    held_out = (x["val"], y["val"])
    _ = train_s(
        s,
        x["train"],
        y["train"],
        training,
        validation=held_out,
        seed=seed,
        progress=False,
    )
    with torch.no_grad():
        return s(x["test"].to(next(s.parameters()).device)).argmax(1).cpu()


def record(name, predicted, true=labels["test"]):
    """Keep a result and print it with its interval."""
    correct = int((predicted == true).sum())
    results[name] = (correct, predicted)
    low, high = wilson(correct, len(predicted))
    share = correct / len(predicted)
    print(f"{name:42} {share:.1%}  ({low:.1%} to {high:.1%})")


record(f"score and deltas, N = {N}", predict_with_s(vectors(kept[PAPER])))

# %% [markdown]
# That is the paper's vector. Everything below is compared with it.
#
# ## Scores, deltas, order
#
# First we take columns away. Then we keep all columns and shuffle the rows, differently in each
# slice, in training and in testing. The same numbers are there; what is lost is which rank each of
# them had.

# %%
generator = torch.Generator().manual_seed(SEED)


def shuffled(x):
    """{split: [M, N, F]}, the rows of each slice in another order."""
    result = {}
    for split, rows in x.items():
        order = torch.rand(rows.shape[:2], generator=generator)
        order = order.argsort(dim=1)[..., None]  # [M, N, 1]
        result[split] = rows.gather(1, order.expand_as(rows))
    return result


record("scores alone", predict_with_s(vectors(kept[PAPER], ("score",))))
record("deltas alone", predict_with_s(vectors(kept[PAPER], ("deltas",))))
record("ranks shuffled", predict_with_s(shuffled(vectors(kept[PAPER]))))

# %% [markdown]
# Deltas alone may tell $S$ more than you would expect, because they come in the order of the
# scores. If deltas of boxes on lesions differ from deltas of boxes on nothing, then the rank at
# which the one kind gives way to the other can be read from the deltas, too. Shuffling takes that
# away. It also takes away the alignment that a linear layer needs: input $5k$ is no longer always
# the score of rank $k$, counted from 0.
#
# ## How many boxes?
#
# The paper keeps 256 boxes, and its light models 128. Let us keep fewer and fewer.

# %%
for n in [n for n in (1, 2, 4, 8, 16) if n < N]:
    record(f"N = {n}", predict_with_s(vectors(kept[PAPER], n=n)))

# %% [markdown]
# From which $N$ on is there no clear gain any more? What you may expect depends on how many lesions
# a slice has, so let us count them. Phantoms have masks even where none is in the files:
# `phantom_mask` draws the mask of a slice again from its name.

# %% tags=["nbval-check-output"]
# drawing takes a moment, so a quarter of the training slices is enough
drawn = {"train": chosen["train"][::4], "test": chosen["test"]}
size = preset.phantoms.size
masks = {
    split: [phantom_mask(slices[split].names[i], size) for i in indices]
    for split, indices in drawn.items()
}
lesions = {
    split: np.array(
        [
            mask_to_targets(m, min_area=preset.min_area)["labels"]
            .bincount(minlength=3)
            .tolist()[1:]
            for m in part
        ]
    )
    for split, part in masks.items()
}  # [M, 2]: how many GGO and how many C
print("lesions in a slice")
for label, name in enumerate(IMAGE_CLASSES):
    counts = lesions["test"][labels["test"].numpy() == label].sum(axis=1)
    print(f"{name:16} mean {counts.mean():.2f}, at most {counts.max()}")

# %% mystnb={"image": {"alt": "Two panels. Left: bars of the number of true lesions in a slice for the three classes; controls have none. Right: mean score against rank, a curve for each class."}, "figure": {"caption": "Left: how many lesions the slices of each class have. Right: the mean score by rank, which falls when the lesions of a slice are used up. Synthetic test slices."}}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
truth = labels["test"].numpy()
most = lesions["test"].sum(axis=1).max()
for label, name in enumerate(IMAGE_CLASSES):
    counts = lesions["test"][truth == label].sum(axis=1)
    share = 100 * np.bincount(counts, minlength=most + 1) / len(counts)
    _ = axes[0].bar(
        np.arange(most + 1) + 0.27 * (label - 1),
        share,
        0.27,
        color=plotting.CLASS_COLOURS[label],
        hatch=("", "//", "..")[label],
        edgecolor="black",
        linewidth=0.5,
        label=name,
    )
_ = axes[0].set(
    xlabel="True lesions in a slice (count)",
    ylabel="Slices of the class (%)",
)
_ = axes[0].legend()
_ = plotting.score_by_rank(vectors(kept[PAPER])["test"], truth, axes[1])
plt.show()

# %% [markdown]
# A control has no lesion, a slice of common pneumonia one or a few, and one of COVID-19 mostly
# several. So the first ranks answer the most useful question: is there another lesion? Where the
# curves on the right have come together near 0, $S$ gets inputs that vary and mean little. They may
# even cost accuracy, because a network with few examples fits them as well.
#
# The paper's slices are different. They have 512 x 512 pixels, lesions of many more sizes and
# shapes, and a background that no formula has drawn. Its experiments do not tell whether 256 boxes
# help there, because they report no other $N$ for the same model.
#
# ## Which boxes fill the ranks?
#
# Now we come back to NMS. The paper argues for 0.75: overlapping boxes with high scores go with
# COVID-19, so they should be kept.

# %%
record("NMS 0.25", predict_with_s(vectors(kept["NMS 0.25"])))
record("no NMS", predict_with_s(vectors(kept["no NMS"])))
predicted = predict_with_s(vectors(kept["score > 0.05"]))
record("score > 0.05, then padded", predicted)

# %% [markdown]
# What does the number of high scores count in each ranking? With strict NMS each lesion should have
# about one rank, so it counts lesions. Without NMS it counts all boxes on each lesion. At 0.75 it
# depends on how these boxes happen to overlap.

# %%
found = {
    name: np.array([int((r[:, 0] > 0.5).sum()) for r in kept[name]["test"]])
    for name in ("NMS 0.25", "NMS 0.75", "no NMS")
}
print("boxes with a score above 0.5 (phantoms):")
print("mean of each class, correlation with the number of true lesions")
true_count = lesions["test"].sum(axis=1)
for name, counts in found.items():
    means = [f"{counts[truth == label].mean():5.2f}" for label in range(3)]
    correlation = np.corrcoef(counts, true_count)[0, 1]
    print(f"{name:10}", *means, f"  {correlation:.2f}")

# %% [markdown]
# ## The other parts: detector and hidden layers
#
# Does the detector have to know lesions? We rank the boxes of a detector with random weights, to
# check that nothing else leaks into the vector, such as the brightness of a slice. And does $S$
# need its hidden layers?

# %%
torch.manual_seed(SEED)
untrained = lesion_mask_rcnn(preset.detector).to(device).eval()
random_rows = all_rows(untrained, {PAPER: SETTINGS[PAPER]}, every=2)[PAPER]
half = {split: y[::2] for split, y in labels.items()}
predicted = predict_with_s(vectors(random_rows), half)
record("detector with random weights", predicted, half["test"])
assert (predicted == half["test"]).float().mean() < 0.6

# %%
predicted = predict_with_s(vectors(kept[PAPER]), hidden=False)
record("S without hidden layers", predicted)

# %% [markdown]
# The nearer a random detector leaves $S$ to chance, one third, the more of the information must
# come from what the trained one learned on lesion masks. This does not prove that it learned
# lesions alone: a trained detector could still use a shortcut that a random one does not see.
#
# ## Beyond the paper: class and place
#
# The row leaves out what a radiologist would say first: *which* finding, and *where*. In COVID-19,
# {cite:t}`Zhao2020relation` mostly find GGO, near the pleura and in both lungs; a lobar pneumonia
# is one large consolidation. Is that really lost? A *probe* can answer this: a small model that
# predicts the missing quantity from the row alone. We probe the rows of boxes with high scores, and
# use different patients for fitting and for testing.

# %%
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor


def strong_rows(split):
    """Wide rows [M, 11] of all boxes with a score above 0.5."""
    rows = torch.cat(kept["NMS 0.25"][split])
    return rows[rows[:, 0] > 0.5].numpy()


fit, judge = strong_rows("train"), strong_rows("test")
forest = {"n_estimators": 100, "min_samples_leaf": 5, "random_state": SEED}
probe = RandomForestClassifier(**forest).fit(fit[:, :5], fit[:, 6])
common = max(judge[:, 6].mean(), 1 - judge[:, 6].mean())
right = probe.score(judge[:, :5], judge[:, 6])
print(f"class from the row: {right:.0%} of boxes right")
print(f"always the commoner class: {common:.0%}")
targets = {
    "area (log)": np.log(fit[:, 9] * fit[:, 10]),
    "x of the centre": fit[:, 7],
    "y of the centre": fit[:, 8],
}
answers = [np.log(judge[:, 9] * judge[:, 10]), judge[:, 7], judge[:, 8]]
print("R2 from the row (1 is perfect, 0 is a constant guess)")
for (name, target), answer in zip(targets.items(), answers, strict=True):
    probe = RandomForestRegressor(**forest).fit(fit[:, :5], target)
    print(f"{name}: {probe.score(judge[:, :5], answer):.2f}")

# %% [markdown]
# An R2 near 0, or a share of right boxes near that of the commoner class, means that this probe
# does not find the quantity in the row. Where it does better, the row holds a trace of it: here
# perhaps of the class and of the area (one fit, no interval), and none of the place. For the place,
# the encoding is meant to work in this way: deltas are corrections, the same wherever the proposal
# lies. Where the probe fails, a wider row gives $S$ something new. Does $S$ use it?

# %%
for name in ("NMS 0.75", "NMS 0.25"):
    wider = {
        "+ class": ("score", "deltas", "class"),
        "place instead of deltas": ("score", "place"),
        "place and class": ("score", "place", "class"),
    }
    for what, columns in wider.items():
        predicted = predict_with_s(vectors(kept[name], columns))
        record(f"{what}, {name}", predicted)

# %% [markdown]
# Be careful if place seems to help: it *replaces* the deltas, so the gain may come from leaving the
# deltas out, which $S$ can overfit with few slices. Compare with "scores alone" above; the full run
# at the end has to decide.
#
# ## Simple rules
#
# Does a network with a hundred thousand weights beat a simple rule? We fit logistic regressions to
# one or two numbers from the same rankings: the best score, and the number of scores above 0.5. For
# comparison we also give a logistic regression what no method has, the *true* lesions.

# %%
def simple(parts, split):
    """float64 [M, 2]: the best score, and how many scores exceed 0.5."""
    scores = [rows[:, 0].numpy() for rows in parts[split]]
    return np.array([[s.max(), (s > 0.5).sum()] for s in scores])


def record_rule(name, train, test, true=labels["train"]):
    """Fit a logistic regression and keep its result."""
    model = fit_area_classifier(train, true.numpy())
    record(name, torch.from_numpy(model.predict(test)))


features = {s: simple(kept["NMS 0.25"], s) for s in ("train", "test")}
train, test = features["train"], features["test"]
record_rule("rule: best score", train[:, :1], test[:, :1])
record_rule("rule: best score and count", train, test)
areas = {s: np.array([area_features(m) for m in masks[s]]) for s in masks}
both = {split: np.hstack([areas[split], lesions[split]]) for split in masks}
fourth = labels["train"][::4]  # those whose masks are drawn
record_rule("rule: TRUE areas", areas["train"], areas["test"], fourth)
name = "rule: TRUE areas and counts"
record_rule(name, both["train"], both["test"], fourth)

# %% [markdown]
# ## All of it in one picture
#
# This is one seed and a part of the slices, so look at the large differences only.

# %% mystnb={"image": {"alt": "Horizontal bars of accuracy with intervals for about two dozen variants: variants of the rows, other parts, and logistic regressions."}, "figure": {"caption": "Accuracy of each variant on the live test slices with Wilson's 95 % interval; dotted: chance; dashed: the paper's vector. One seed of S. Synthetic."}}
names = list(results)
judged = np.array([len(results[name][1]) for name in names])
share = np.array([results[name][0] for name in names]) / judged
ends = np.array([wilson(results[n][0], len(results[n][1])) for n in names])


def group_of(name):
    """Which of the three kinds of variant this is."""
    if "random" in name or "hidden" in name:
        return "other"
    return "rule" if name.startswith("rule") else "rows"


look_of = {
    "rows": (plotting.SKY_BLUE, "", "S on variants of the rows"),
    "other": (
        plotting.ORANGE,
        "///",
        "another detector, or S without hidden layers",
    ),
    "rule": (plotting.GREEN, "..", "logistic regression"),
}
tall = 0.27 * len(names) + 1.3
fig, ax = plt.subplots(figsize=(9, tall), layout="constrained")
for i in range(len(names)):
    colour, hatch, _text = look_of[group_of(names[i])]
    _ = ax.barh(
        i,
        100 * share[i],
        color=colour,
        hatch=hatch,
        edgecolor="black",
        linewidth=0.5,
    )
lengths = 100 * np.abs(ends.T - share)
_ = ax.errorbar(
    100 * share,
    range(len(names)),
    xerr=lengths,
    fmt="none",
    color="black",
    capsize=3,
)
_ = ax.axvline(100 * share[0], color="black", ls="--", lw=1)
_ = ax.axvline(100 / 3, color="black", ls=":", lw=1)
_ = ax.set_yticks(range(len(names)), names, fontsize=8)
_ = ax.set_ylim(len(names) - 0.4, -0.6)
_ = ax.set(
    xlabel="Accuracy on phantoms (%)",
    xlim=(0, 100),
    ylabel="What S, or the rule, reads",
)
patches = [
    plt.Rectangle((0, 0), 1, 1, fc=c, hatch=h, ec="black", label=text)
    for c, h, text in look_of.values()
]
_ = ax.legend(
    handles=patches,
    loc="lower center",
    bbox_to_anchor=(0.4, 1),
    ncols=3,
    fontsize=8,
)
plt.show()

# %% [markdown]
# ## The full run
#
# `benchmarks/ablations.py` repeats all of this with every training slice of the preset `quick` and
# several seeds of $S$, and evaluates on patients of another data seed, on whom nothing in this book
# was tuned. The interval of a difference comes from resampling patients, with the *same* slices for
# both variants {cite:p}`Efron1979`. It is narrower than a comparison of two intervals would
# suggest, because a slice that is hard for one variant is often hard for the other.
#
# <!-- ablations -->
# | what S reads (phantoms) | accuracy: mean (range) | difference (95 %) | training | control | pneumonia | COVID-19 |
# |---|---|---|---|---|---|---|
# | **The paper's vector** | | | | | | |
# | score and deltas, N = 32, NMS 0.75 | 0.718 (0.695 to 0.733) | +0.000 (+0.000 to +0.000) | 0.81 | 0.81 | 0.72 | 0.62 |
# | **Columns** | | | | | | |
# | scores alone | 0.727 (0.723 to 0.733) | +0.009 (-0.018 to +0.038) | 0.74 | 0.77 | 0.80 | 0.62 |
# | deltas alone | 0.642 (0.625 to 0.650) | -0.076 (-0.106 to -0.048) | 0.80 | 0.82 | 0.53 | 0.57 |
# | **Order** | | | | | | |
# | ranks shuffled | 0.685 (0.667 to 0.695) | -0.032 (-0.057 to -0.007) | 0.80 | 0.77 | 0.61 | 0.67 |
# | ranks shuffled, scores alone | 0.650 (0.635 to 0.663) | -0.067 (-0.106 to -0.030) | 0.68 | 0.79 | 0.43 | 0.72 |
# | **Number of boxes** | | | | | | |
# | N = 1 | 0.612 (0.585 to 0.660) | -0.106 (-0.147 to -0.063) | 0.63 | 0.81 | 0.45 | 0.58 |
# | N = 2 | 0.729 (0.718 to 0.745) | +0.012 (-0.028 to +0.049) | 0.71 | 0.78 | 0.68 | 0.72 |
# | N = 4 | 0.772 (0.769 to 0.774) | +0.054 (+0.028 to +0.081) | 0.76 | 0.80 | 0.81 | 0.70 |
# | N = 8 | 0.747 (0.743 to 0.753) | +0.030 (+0.007 to +0.055) | 0.77 | 0.80 | 0.79 | 0.66 |
# | N = 16 | 0.726 (0.716 to 0.741) | +0.009 (-0.013 to +0.032) | 0.77 | 0.80 | 0.80 | 0.58 |
# | N = 64 | 0.687 (0.668 to 0.705) | -0.031 (-0.053 to -0.009) | 0.86 | 0.81 | 0.64 | 0.61 |
# | **Low scores** | | | | | | |
# | score above 0.05 only, then padded | 0.727 (0.726 to 0.728) | +0.010 (-0.023 to +0.043) | 0.79 | 0.78 | 0.66 | 0.74 |
# | **Less overlap** | | | | | | |
# | N = 2, NMS 0.25 | 0.744 (0.738 to 0.748) | +0.026 (-0.014 to +0.066) | 0.72 | 0.79 | 0.64 | 0.81 |
# | N = 4, NMS 0.25 | 0.746 (0.743 to 0.750) | +0.028 (-0.001 to +0.056) | 0.77 | 0.80 | 0.71 | 0.73 |
# | N = 8, NMS 0.25 | 0.749 (0.743 to 0.758) | +0.032 (+0.005 to +0.057) | 0.78 | 0.79 | 0.78 | 0.68 |
# | N = 16, NMS 0.25 | 0.748 (0.745 to 0.755) | +0.031 (+0.003 to +0.059) | 0.79 | 0.78 | 0.82 | 0.65 |
# | N = 32, NMS 0.25 | 0.740 (0.738 to 0.743) | +0.023 (-0.007 to +0.051) | 0.80 | 0.79 | 0.75 | 0.68 |
# | **More overlap** | | | | | | |
# | N = 2, no NMS | 0.651 (0.633 to 0.663) | -0.067 (-0.113 to -0.021) | 0.64 | 0.84 | 0.42 | 0.70 |
# | N = 4, no NMS | 0.700 (0.685 to 0.716) | -0.017 (-0.054 to +0.019) | 0.70 | 0.84 | 0.63 | 0.63 |
# | N = 8, no NMS | 0.759 (0.753 to 0.769) | +0.041 (+0.005 to +0.077) | 0.77 | 0.87 | 0.69 | 0.72 |
# | N = 16, no NMS | 0.784 (0.779 to 0.793) | +0.066 (+0.032 to +0.100) | 0.80 | 0.86 | 0.72 | 0.77 |
# | N = 32, no NMS | 0.794 (0.789 to 0.803) | +0.077 (+0.048 to +0.105) | 0.83 | 0.85 | 0.80 | 0.73 |
# | ranks shuffled, N = 32, no NMS | 0.764 (0.751 to 0.776) | +0.046 (+0.019 to +0.074) | 0.84 | 0.81 | 0.77 | 0.72 |
# | **Beyond the paper: wider rows** | | | | | | |
# | + lesion class, NMS 0.75 | 0.731 (0.718 to 0.738) | +0.013 (-0.010 to +0.035) | 0.82 | 0.88 | 0.68 | 0.64 |
# | place instead of deltas, NMS 0.75 | 0.747 (0.741 to 0.756) | +0.030 (+0.004 to +0.054) | 0.74 | 0.79 | 0.80 | 0.65 |
# | place instead of deltas, + lesion class, NMS 0.75 | 0.742 (0.736 to 0.748) | +0.025 (-0.003 to +0.055) | 0.74 | 0.84 | 0.83 | 0.56 |
# | + lesion class, NMS 0.25 | 0.735 (0.733 to 0.736) | +0.017 (-0.016 to +0.050) | 0.79 | 0.83 | 0.66 | 0.71 |
# | place instead of deltas, NMS 0.25 | 0.763 (0.755 to 0.781) | +0.046 (+0.016 to +0.075) | 0.78 | 0.78 | 0.83 | 0.68 |
# | place instead of deltas, + lesion class, NMS 0.25 | 0.756 (0.751 to 0.758) | +0.038 (+0.007 to +0.071) | 0.77 | 0.81 | 0.80 | 0.66 |
# | + lesion class, no NMS | 0.799 (0.796 to 0.801) | +0.082 (+0.049 to +0.115) | 0.83 | 0.87 | 0.79 | 0.73 |
# | place instead of deltas, no NMS | 0.812 (0.808 to 0.814) | +0.095 (+0.066 to +0.123) | 0.79 | 0.82 | 0.88 | 0.73 |
# | place instead of deltas, + lesion class, no NMS | 0.816 (0.808 to 0.821) | +0.098 (+0.071 to +0.125) | 0.80 | 0.87 | 0.85 | 0.73 |
# | **Other parts** | | | | | | |
# | S without hidden layers | 0.620 (0.619 to 0.624) | -0.097 (-0.134 to -0.061) | 0.67 | 0.67 | 0.48 | 0.72 |
# | S without hidden layers, no NMS | 0.756 (0.753 to 0.760) | +0.038 (+0.002 to +0.073) | 0.77 | 0.75 | 0.75 | 0.77 |
# | detector with random weights | 0.347 (0.337 to 0.360) | -0.370 (-0.417 to -0.323) | 0.37 | 0.46 | 0.11 | 0.48 |
# | **Logistic regression** | | | | | | |
# | best score | 0.645 (0.645 to 0.645) | -0.072 (-0.132 to -0.013) | 0.64 | 0.76 | 0.23 | 0.95 |
# | count of scores above 0.5, NMS 0.75 | 0.657 (0.657 to 0.657) | -0.061 (-0.100 to -0.024) | 0.65 | 0.80 | 0.50 | 0.67 |
# | best score and count, NMS 0.75 | 0.730 (0.730 to 0.730) | +0.012 (-0.019 to +0.043) | 0.73 | 0.75 | 0.77 | 0.67 |
# | best score and count of each lesion class, NMS 0.75 | 0.741 (0.741 to 0.741) | +0.024 (-0.013 to +0.064) | 0.73 | 0.82 | 0.69 | 0.71 |
# | count of scores above 0.5, NMS 0.25 | 0.667 (0.667 to 0.667) | -0.051 (-0.091 to -0.012) | 0.71 | 0.81 | 0.52 | 0.67 |
# | best score and count, NMS 0.25 | 0.753 (0.753 to 0.753) | +0.035 (+0.002 to +0.069) | 0.77 | 0.75 | 0.84 | 0.67 |
# | best score and count of each lesion class, NMS 0.25 | 0.758 (0.758 to 0.758) | +0.040 (+0.004 to +0.076) | 0.76 | 0.82 | 0.78 | 0.67 |
# | count of scores above 0.5, no NMS | 0.783 (0.783 to 0.783) | +0.065 (+0.035 to +0.097) | 0.77 | 0.84 | 0.79 | 0.72 |
# | best score and count, no NMS | 0.788 (0.788 to 0.788) | +0.070 (+0.037 to +0.103) | 0.78 | 0.80 | 0.84 | 0.72 |
# | best score and count of each lesion class, no NMS | 0.801 (0.801 to 0.801) | +0.083 (+0.050 to +0.116) | 0.78 | 0.84 | 0.82 | 0.75 |
# | true areas | 0.783 (0.783 to 0.783) | +0.065 (+0.020 to +0.108) | 0.78 | 1.00 | 0.71 | 0.64 |
# | true areas and counts | 0.925 (0.925 to 0.925) | +0.208 (+0.173 to +0.242) | 0.90 | 1.00 | 0.97 | 0.81 |
#
# Accuracy with N = 32 minus that with N = 2, NMS 0.75: -0.012 (-0.049 to +0.028).
#
# 6,300 slices train, 297 choose the epoch, 603 slices of 201 other patients judge; one detector, 3 seeds of S.
#
# Command: `python benchmarks/ablations.py`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-27; commit 6a4f6db; all numbers in `results/ablations.json`.
# <!-- /ablations -->
#
# Synthetic phantoms: all training slices of the preset, whose validation slices choose the epoch,
# and test slices of other patients; one detector, several seeds of S. The difference is to the
# first line. *Training* is the accuracy on the training slices; the last three columns are
# sensitivities on the test slices. Logistic regression has no seed and reads the numbers named.

# %% [markdown]
# Now read the table from the top, and look at the intervals of the differences first: one that
# contains 0 does not show a difference. Each group of rows has its own question.
#
# - **Number of boxes.** From which $N$ on does the accuracy stop growing? The line below the table
#   compares the usual $N$ with two boxes. Where *training* goes on rising with $N$ and the accuracy
#   does not, further boxes only help $S$ to learn its training slices by heart.
# - **Columns and order.** Which costs more, to leave out the scores, the deltas, or the order?
# - **Low scores.** The paper keeps them because a healthy slice has nothing else. Does it cost
#   anything to drop them and to repeat what is left? If not, the paper's argument is still right,
#   but padding gives a healthy slice a vector as well.
# - **Overlap.** Compare the three settings of NMS at each $N$. Strict NMS makes about one rank of
#   one lesion, so few ranks may do. Without NMS each lesion brings its copies, and $N$ must be
#   large enough to hold them. *This is a possible reason for a large $N$:* overlapping boxes need
#   room. The paper keeps most of the overlap, so it may well need its 256.
# - **Class and place.** Compare each wider row with the row without it at the same NMS.
# - **Hidden layers.** They should matter most where the rows are hard to read, and least where the
#   scores can simply be added up.
# - **Rules.** Is the best $S$ better than a logistic regression on four numbers, the best score and
#   the count of each lesion class? And how far are both from the last line, which has the true
#   areas and counts?
#
# Does the lesion class help the rule but not $S$? (No rule here reads the place.) There is a
# possible reason. To count GGO and C separately, a network must multiply a score by a class code at
# every rank, and learn this from few slices. The rule gets the counts ready made. In that case the
# class of a box is worth having, and the way to use it may be a sum over boxes rather than one more
# column.
#
# ## Why phantoms mislead
#
# Our program draws few foci for common pneumonia and many for COVID-19. So the count is a cue by
# construction, and an ablation finds what was put in. There are three more reasons for care:
#
# - In the phantoms, lesion class and place overlap between the two diseases on purpose, so that the
#   task is not trivial. How much they overlap in patients is another matter, and class and place
#   could be worth much more there, or less.
# - There is only one detector, and the same program drew its training slices and the test slices.
#   As in the paper, its masks show COVID-19 patients only, so it meets common pneumonia for the
#   first time when it ranks. But phantom pneumonia consists of the same two kinds of lesion, and a
#   patient's need not.
# - The training settings of $S$ were chosen with the paper's vector at NMS 0.75, which may be a
#   disadvantage for the other variants.
#
# What remains is a lesson about *method*: on any data, compare with a count and a logistic
# regression, and vary NMS together with $N$. For patients both questions are open. Shortcuts that
# look like skill are common there: {cite:t}`DeGrave2021` show it for X-rays of COVID-19, and
# {cite:t}`Roberts2021` find problems of design in most models that they review.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Deltas, or their order?
#
# Kind: experiment, **
#
# How much of the result of "deltas alone" is due to their order? Train $S$ on the deltas alone with
# the ranks shuffled.

# %% tags=["solution"]
# @title Solution
only_deltas = vectors(kept[PAPER], ("deltas",))
ordered = predict_with_s(only_deltas) == labels["test"]
mixed = predict_with_s(shuffled(only_deltas)) == labels["test"]
ordered, mixed = ordered.float().mean(), mixed.float().mean()
print(f"deltas in the order of their scores: {ordered:.1%}")
print(f"deltas in any order:                 {mixed:.1%}")

# %% [markdown] tags=["answer"]
# The difference is what the order adds. If the second line is still well above one third, then
# deltas of boxes on lesions differ from deltas of boxes on nothing.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · A difference and its interval
#
# Kind: experiment, **
#
# `results[name][1]` holds the predictions of a variant. Compute the difference in accuracy between
# "no NMS" and the paper's vector, and its 95 % interval by resampling patients.

# %% tags=["solution"]
# @title Solution
right = {
    name: (results[name][1] == labels["test"]).numpy().astype(float)
    for name in ("no NMS", f"score and deltas, N = {N}")
}
# -1, 0 or 1 for each slice
gain = right["no NMS"] - right[f"score and deltas, N = {N}"]
_, owner = np.unique(
    [slices["test"].patients[i] for i in chosen["test"]],
    return_inverse=True,
)
gains, sizes = (
    np.bincount(owner, gain),
    np.bincount(owner),
)  # of each patient
rng, patients = np.random.default_rng(SEED), len(gains)
draws = rng.integers(patients, size=(2000, patients))
drawn_gains = gains[draws].sum(1) / sizes[draws].sum(1)
low, high = np.quantile(drawn_gains, [0.025, 0.975])
print(f"difference {gain.mean():+.1%}, 95 %: {low:+.1%} to {high:+.1%}")
print(f"only one of the two is right: {(gain != 0).sum()} of {len(gain)}")

# %% [markdown] tags=["answer"]
# Only the slices on which the two disagree count. Many slices are easy for both or hard for both,
# which is why the paired interval is usually narrower than two Wilson intervals suggest.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Which slices go wrong?
#
# Kind: experiment, **
#
# If $S$ only counted lesions, it would fail on COVID-19 slices with few lesions and on pneumonia
# slices with many. Does it?

# %% tags=["solution"]
# @title Solution
predicted = results[f"score and deltas, N = {N}"][1].numpy()
print("called COVID-19 by S (phantoms)")
for label in (1, 2):
    for text, group in (
        ("one or two lesions", np.isin(true_count, (1, 2))),
        ("three or more", true_count >= 3),
    ):
        here = group & (truth == label)
        called = (predicted[here] == 2).mean()
        name = IMAGE_CLASSES[label]
        print(f"{name:16} {text:18} {called:4.0%} of {here.sum()} slices")

# %% [markdown] tags=["answer"]
# If $S$ only counted, it would rarely call a slice with one or two lesions COVID-19, whatever its
# class. Where it does so more often, the count that it can read from the scores is noisy, or $S$
# does more than count. The two lines with three or more may differ even for a mere counter, because
# COVID-19 slices have more lesions there (see the bars above). Lines that rest on a dozen slices
# cannot tell you more than this.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Fewer patients
#
# Kind: experiment, **
#
# Train on a quarter of the patients, with as many steps as before. Which suffers more, $S$ or the
# rule of two numbers?

# %% tags=["solution"]
# @title Solution
patients = [slices["train"].patients[i] for i in chosen["train"]]
fourth_patients = set(list(dict.fromkeys(patients))[::4])
quarter = torch.tensor([one in fourth_patients for one in patients])
x = vectors(kept[PAPER])
fewer = {"train": labels["train"][quarter]}
before = preset.classifier_training
epochs = round(before.epochs * len(quarter) / int(quarter.sum()))
as_long = replace(before, epochs=epochs)
short = x | {"train": x["train"][quarter]}
small = predict_with_s(short, labels | fewer, training=as_long)
few_features = features["train"][quarter.numpy()]
rule = fit_area_classifier(few_features, fewer["train"].numpy())
print(f"slices: {len(quarter)} and {int(quarter.sum())}   (phantoms)")
all_s = results[f"score and deltas, N = {N}"][0] / len(truth)
few_s = (small == labels["test"]).float().mean()
print(f"S:    {all_s:.1%} and {few_s:.1%}")
all_rule = results["rule: best score and count"][0] / len(truth)
print(f"rule: {all_rule:.1%} and {rule.score(features['test'], truth):.1%}")

# %% [markdown] tags=["answer"]
# You would expect $S$ to suffer more: it has to find in the slices what the rule was given, the two
# numbers that matter, and the rule has only a handful of weights to fit. Small differences mean
# little here, because both have one run on few test patients.

# %% [markdown]
# ## What we learned
#
# 1. An ablation changes one part; the detector looks once, and every variant is cut from wide rows.
# 2. How many boxes are useful depends on how many lesions a slice has, and phantoms have fewer
#    than $N$.
# 3. NMS and $N$ belong together: copies of boxes need room, single boxes do not.
# 4. The row names neither the class of a box nor its place. A probe shows what can be read from it
#    all the same, and an ablation whether $S$ gains from it.
# 5. A count and a logistic regression are the first thing to compare $S$ with, on any data.
#
# ## Further reading
#
# The vector and the reason for NMS at 0.75 are in section 3.2 of {cite:t}`TerSarkisov2020`.
# {cite:t}`DeGrave2021` and {cite:t}`Roberts2021` show how models of COVID-19 learn something else
# than the disease. The bootstrap is due to {cite:t}`Efron1979`.

