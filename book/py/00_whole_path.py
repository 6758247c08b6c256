# %% [markdown]
# # 0 · The whole path
#
# A slice of a chest CT goes in, and three numbers come out, one for each kind of patient. In this
# chapter we walk that path once, from data to report, with a detector that is already trained. Each
# step gets a chapter of its own later.
#
# **After it you can**
#
# - name the two kinds of label that the method needs, and the two models that learn from them;
# - turn the detections of a slice into the vector that the classifier reads;
# - train the classifier in seconds, and say why it takes no longer;
# - say what a good result on synthetic slices does not show.
#
# **You need** Python and some PyTorch. **Run time:** about a minute and a half on two CPU cores in
# the preset `quick`.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a picture made by formulas and random numbers. No
# number below is a result on patients, and nothing here is for diagnosis.
# ```

# %% tags=["fold"]
# @title Imports and versions
import platform

import ipywidgets
import matplotlib.pyplot as plt
import torch
import torchvision
from sklearn.linear_model import LogisticRegression

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import make_slice, mask_to_targets, old_friend
from covidmask.interactive import frame_slider
from covidmask.metrics import confusion, report, wilson
from covidmask.models import (
    ClassificationModule,
    ShippedWeights,
    covid_ct_mask_net,
    load_classifier,
    trained_segmenter,
)
from covidmask.training import train_s

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"torchvision {torchvision.__version__}, Python {platform.python_version()}")

# %% [markdown]
# The preset chooses the scale (image size, backbone, number of boxes) and the settings that go with
# it: learning rates, weight decay, and some IoU thresholds and losses of the detector. In `quick`
# these are not the paper's; [chapter 5](05_segmenter.ipynb) puts many of them side by side.

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
SLICES = 240  # of each class, two thirds of them to learn from

# %%
preset = PRESETS[PRESET]
size, n = preset.phantoms.size, preset.classifier.n_boxes
backbone = preset.detector.backbone
print(f"{size} x {size} pixels, backbone {backbone}, N = {n} boxes")

# %% [markdown]
# ## Two kinds of label
#
# The method learns from two sets of patients.
#
# - **Lesion masks** teach a detector where ground-glass opacity (GGO) and consolidation (C) are.
#   A mask takes far longer to draw than a label to give, so this set is small. In the paper it holds
#   COVID-19 patients only {cite:p}`Zhang2020`.
# - **Slice labels** teach a classifier: one word for each slice, control, common pneumonia or
#   COVID-19 {cite:p}`Gunraj2020`.
#
# Here is a slice with its mask, cut into *instances*: each connected region of one kind is one
# lesion. You will meet this slice again in every chapter, so we call it our old friend. ([How the
# phantoms are made](phantoms_made.ipynb) draws such a chest step by step.)

# %% mystnb={"image": {"alt": "A synthetic axial chest slice in the lung window, twice: alone, with fat, muscle, ribs, spine and heart around two dark lungs with bright vessels; and with boxes and outlines around ground-glass opacities and consolidations."}, "figure": {"caption": "Our old friend, without and with its lesions. GGO is drawn solid, consolidation (C) dashed. A synthetic slice of a COVID-19 phantom."}}
image, mask = old_friend(size)
truth = mask_to_targets(mask, min_area=preset.min_area)
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
_ = plotting.show_slice(image, axes[0])
_ = plotting.show_lesions(image, truth, axes[1])
plt.show()

# %% tags=["nbval-check-output"]
labels = truth["labels"].tolist()
print("lesions:", ["GGO" if label == 1 else "C" for label in labels])

# %% [markdown]
# ## A detector looks at the slice
#
# Mask R-CNN {cite:p}`He2017` proposes boxes, calls each one background, GGO or C, corrects its
# place, and draws a mask inside it. [Chapter 2](02_region_proposals.ipynb) takes it apart and
# [chapter 5](05_segmenter.ipynb) trains it. Here we load a small one that was trained on other
# phantoms ([its card](weights.md)).
#
# A detector gives each of its boxes a score, and boxes with low scores are usually thrown away.
# Move the slider to see what that hides.

# %%
segmenter = trained_segmenter(PRESET, device, shipped=True)
picture = torch.from_numpy(image).expand(3, -1, -1).to(device)  # [3, H, W]
with torch.no_grad():
    found = segmenter([picture])[0]
found = {key: value.cpu() for key, value in found.items()}


def draw(threshold=0.5):
    """The old friend with the detections that score above a threshold."""
    fig, ax = plt.subplots(figsize=(5, 4.4), layout="constrained")
    _ = plotting.show_lesions(image, found, ax, score_threshold=threshold)
    count = int((found["scores"] > threshold).sum())
    _ = ax.set_title(f"{count} boxes above {threshold:.2f}")
    return fig


thresholds = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
frame_slider(
    [draw(t) for t in thresholds],
    [f"{t:.2f}" for t in thresholds],
    "Score threshold",
    "The synthetic slice with the boxes that score above the threshold",
    caption="Detections of our old friend. A lower threshold shows more "
    "boxes, right and wrong ones.",
    start=3,
    dpi=70,
)

# %% [markdown]
# In a running notebook, you can turn the same knob yourself:

# %% tags=["remove-output"]
slider = ipywidgets.FloatSlider(0.5, min=0.05, max=0.95, step=0.05)
_ = ipywidgets.interact(
    lambda threshold: (draw(threshold), plt.show())[1],
    threshold=slider,
)

# %% [markdown]
# ## From detections to a vector
#
# A classifier needs the same number of inputs for every slice, even for a healthy one. So the
# method keeps the $N$ best boxes, however low they score. Each becomes a row of five numbers,
# $r = (s, \delta_x, \delta_y, \delta_w, \delta_h)$: its score, and how the network moved and
# resized the proposal. The rows are sorted by score. These are the **ranked boxes**, and
# [chapter 6](06_ranked_boxes.ipynb) builds them by hand.

# %%
# the detector and a fresh module S
model = covid_ct_mask_net(segmenter, preset.classifier)
with torch.no_grad():
    rows = model.ranked_boxes([picture])  # [1, N, 5]
assert rows.shape == (1, n, 5)
assert (rows[0, :-1, 0] >= rows[0, 1:, 0]).all(), "ranked by score"
print("one slice, N boxes, five numbers each:", tuple(rows.shape))

# %% mystnb={"image": {"alt": "A heat map with five lines (score and four deltas) and one column for each rank; scores fall from left to right."}, "figure": {"caption": "The ranked boxes of our old friend. Scores fall with the rank; the deltas are those of the same boxes. Synthetic."}}
_ = plotting.ranked_box_matrix(rows[0].cpu())
plt.show()

# %% [markdown]
# ## Many slices
#
# To train and to judge, we draw phantoms of the three classes, each slice from another patient. The
# detector needs to look at each of them only once: as long as its weights stay the same, so do the
# ranked boxes of a slice.

# %%
def draw_class(label):
    """Phantoms of one class, each of another patient."""
    return [make_slice(seed, label, size)[0] for seed in range(SLICES)]


images = [draw_class(label) for label in range(3)]


def rank_class(label):
    """Ranked boxes [SLICES, N, 5] of the phantoms of one class."""
    parts = []
    with torch.no_grad():
        for i in range(0, SLICES, 8):
            batch = map(torch.from_numpy, images[label][i : i + 8])
            batch = [one.expand(3, -1, -1).to(device) for one in batch]
            parts.append(model.ranked_boxes(batch).cpu())
    return torch.cat(parts)


ranked = [rank_class(label) for label in range(3)]
ranked = torch.stack(ranked)  # [3, SLICES, N, 5]
split = 2 * SLICES // 3
train_rows = ranked[:, :split].flatten(0, 1)
test_rows = ranked[:, split:].flatten(0, 1)
train_labels = torch.arange(3).repeat_interleave(split)
test_labels = torch.arange(3).repeat_interleave(SLICES - split)

# %% [markdown]
# Why keep boxes with low scores? Look at the scores by rank, and compare the three curves: where do
# they start, and how fast do they fall? A healthy slice has no lesion, but it does have a ranking.

# %% mystnb={"image": {"alt": "Mean score against rank for control, common pneumonia and COVID-19: three falling curves, each with a band."}, "figure": {"caption": "Scores by rank in the three classes, with the band from the 25 to the 75 percent quantile. Synthetic slices."}}
_ = plotting.score_by_rank(train_rows, train_labels)
plt.show()

# %% [markdown]
# ## The classifier
#
# The module $S$ reads the $N \times 5$ numbers as one vector, passes them through two hidden layers,
# and gives three logits. It is small: [chapter 7](07_covid_ct_mask_net.ipynb) builds it from three
# matrices. Here we train $S$ alone, the regime that the paper calls "heads";
# [chapter 8](08_three_regimes.ipynb) compares it with two others.

# %%
settings = preset.classifier_training
history = train_s(model.s, train_rows, train_labels, settings, seed=SEED)
with torch.no_grad():
    predicted = model.s(test_rows.to(device)).argmax(1).cpu()
result = report(confusion(test_labels, predicted))
assert result["accuracy"] > 0.45, "chance is one third"

# %% [markdown]
# ## The report
#
# *Sensitivity* of a class is the share of its slices that are found. *Positive predictive value*
# (PPV) is the share of its predictions that are right. Wilson's interval says how far chance alone
# can move the accuracy when there are so few slices {cite:p}`Wilson1927`.

# %% mystnb={"image": {"alt": "Confusion matrix of three classes with counts and percentages."}, "figure": {"caption": "Confusion matrix of a small S on unseen phantom patients. Synthetic."}}
_ = plotting.confusion_matrix(confusion(test_labels, predicted))
plt.show()

# %%
print(f"{'':18} sensitivity      PPV   (phantoms)")
columns = IMAGE_CLASSES, result["sensitivity"], result["ppv"]
for name, sensitivity, ppv in zip(*columns, strict=True):
    print(f"{name:18} {sensitivity:11.1%} {ppv:8.1%}")
right, total = int((predicted == test_labels).sum()), len(test_labels)
low, high = wilson(right, total)
print(f"accuracy {right / total:.1%} of {total} slices", end=" ")
print(f"(95 %: {low:.1%} to {high:.1%})")

# %% [markdown]
# This $S$ has learned from few slices. The package brings one that has seen all training phantoms of
# the preset; [chapter 10](10_evaluation.ipynb) judges it. What do the two say of our old friend?

# %%
whole = load_classifier(ShippedWeights.CLASSIFIER_QUICK.path, device)
with torch.no_grad():
    few, all_slices = (net([picture])[0].sigmoid().tolist() for net in (model, whole))
print(f"{'our old friend':18} S of few slices   S of all")
for name, *probabilities in zip(IMAGE_CLASSES, few, all_slices, strict=True):
    print(f"{name:18} {probabilities[0]:15.2f} {probabilities[1]:10.2f}")

# %% [markdown]
# The three numbers need not sum to 1: each answers a yes-or-no question of its own. The prediction
# is the largest of them. Our old friend has COVID-19, by construction, so you can see who is right.
# Look also at how sure each of them is. The $S$ of few slices may be the surer one, although the
# report above says how often it errs, so a probability near 1 does not make a good classifier. And
# if a model misses our old friend in your run, do not be discouraged: it is worth asking why, and
# worth saying so openly. Either way one slice proves nothing. That is why the report counts many
# slices, and gives an interval.
#
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Fewer boxes
#
# Kind: experiment, **
#
# Train $S$ on the first 4 ranked boxes only. Does the accuracy suffer?

# %% tags=["solution"]
# @title Solution
def accuracy_of_s(train, test):
    """Train a fresh S on these rows; return its accuracy on the others."""
    torch.manual_seed(SEED)
    boxes, columns = train.shape[1:]
    s = ClassificationModule(boxes, preset.classifier.hidden, columns)
    train_s(s, train, train_labels, settings, seed=SEED, progress=False)
    with torch.no_grad():
        guess = s(test.to(next(s.parameters()).device)).argmax(1).cpu()
    return (guess == test_labels).float().mean().item()


every_box = accuracy_of_s(train_rows, test_rows)
print(f"{n} boxes: {every_box:.1%}")
print(f" 4 boxes: {accuracy_of_s(train_rows[:, :4], test_rows[:, :4]):.1%}")

# %% [markdown] tags=["answer"]
# Before you trust the difference, compare the first number with the accuracy in the report. The boxes
# are the same, and only the random weights from which $S$ starts are not. If four boxes change the
# accuracy no more than that, you have seen chance at work. If they gain clearly more, there were too
# many inputs for so few slices. [Chapter 11](11_what_makes_it_work.ipynb) asks the question with more
# slices.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · One number
#
# Kind: experiment, **
#
# Use the best score of a slice and nothing else, in a logistic regression. Which classes does it
# tell apart?

# %% tags=["solution"]
# @title Solution
best_train = train_rows[:, 0, :1].numpy()
best_test = test_rows[:, 0, :1].numpy()
simple = LogisticRegression().fit(best_train, train_labels.numpy())
guess = torch.from_numpy(simple.predict(best_test))
of_one = report(confusion(test_labels, guess))
for name, value in zip(IMAGE_CLASSES, of_one["sensitivity"], strict=True):
    print(f"{name:18} found {value:.0%}")
print(f"accuracy {of_one['accuracy']:.1%}, of S {result['accuracy']:.1%}")

# %% [markdown] tags=["answer"]
# The best score says how sure the detector is that there is a lesion at all. It hardly tells the
# two diseases apart: in the run shown here the rule finds nearly all COVID-19, but calls most
# common pneumonia something else. Now compare the accuracies in the last line. $S$ reads this
# number and many more, and is right less often here. With so few slices to learn from, it could not
# make good use of the rest. In [chapter 11](11_what_makes_it_work.ipynb) it gets more.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Without the detector
#
# Kind: experiment, **
#
# Give the detector random weights (`lesion_mask_rcnn(preset.detector).eval()`), rank the boxes
# again, and train a fresh $S$. Does the detector matter, or would any boxes do?

# %% tags=["solution"]
# @title Solution
from covidmask.models import lesion_mask_rcnn

torch.manual_seed(SEED)
random_detector = lesion_mask_rcnn(preset.detector).to(device)
model = covid_ct_mask_net(random_detector, preset.classifier)
untrained = torch.stack([rank_class(label) for label in range(3)])
train = untrained[:, :split].flatten(0, 1)
test = untrained[:, split:].flatten(0, 1)
accuracy = accuracy_of_s(train, test)
print(f"trained detector: {every_box:.1%}, random weights: {accuracy:.1%}")

# %% [markdown]
# ## What we learned
#
# 1. Two sets of labels train two models: masks the detector, slice labels the module $S$.
# 2. A slice becomes $N$ rows of score and encoded deltas, ranked by score.
# 3. Low scores stay in, so that healthy slices have a vector too.
# 4. With the detector frozen, its boxes are computed once and $S$ trains in seconds.
# 5. Phantoms are not patients: a good number here shows that the code works, nothing more.
#
# ## Further reading
#
# Mask R-CNN {cite:p}`He2017` and Faster R-CNN {cite:p}`Ren2015` describe the detector. The paper of
# this book is {cite:t}`TerSarkisov2020`; the classification data are described by
# {cite:t}`Gunraj2020`.

