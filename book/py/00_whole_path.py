# %% [markdown]
# # The whole path
#
# [Open in Colab](https://colab.research.google.com/github/repository_not_set/covidmask/blob/main/book/01_whole_path.ipynb)
#
# A slice of a chest CT goes in; three probabilities come out. This chapter walks that path once,
# from data to report, at a scale at which two CPU cores need minutes. Each step gets a chapter of
# its own later.
#
# **After it you can**
#
# - say what the detector is trained on and what the classifier is trained on, and why they differ;
# - turn the detections of a slice into the vector that the classifier reads, by hand;
# - train both models, and judge each with the number that fits it;
# - say what a good result on synthetic slices does not show.
#
# **You need** Python and some PyTorch. **Run time:** about 5 minutes on two CPU cores in the preset
# `quick`, of which the detector's training takes 3; on a GPU not measured.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a picture made by formulas and random numbers. The
# layout on disk is that of the real data, so the same code reads both. No number below is a result
# on patients, and nothing here is for diagnosis.
# ```

# %% tags=["hide-input"]
# Set-up: installs covidmask only where it is absent, for example on Colab.
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("covidmask") is None:
    repository = os.environ.get(
        "COVIDMASK_REPOSITORY", "https://github.com/repository_not_set/covidmask"
    )
    if "repository_not_set" in repository:
        raise RuntimeError(
            "This copy of the book does not know its repository yet: "
            "set the environment variable COVIDMASK_REPOSITORY to its address."
        )
    if Path(repository).is_dir():
        repository = Path(repository).resolve().as_uri()
    command = [sys.executable, "-m", "pip", "install", "--quiet", f"git+{repository}"]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()

# %%
import platform

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.data.lesions import LesionSlices
from covidmask.data.phantom_sets import write_phantoms
from covidmask.data.slices import SliceImages
from covidmask.data.statistics import class_statistics, lesion_statistics
from covidmask.metrics.classification import patient_bootstrap, report, wilson
from covidmask.models.classifier import ClassificationModule, covid_ct_mask_net
from covidmask.models.segmentation import lesion_mask_rcnn
from covidmask.training.classification import (
    cache_ranked_boxes,
    evaluate_classifier,
    train_classifier,
    train_s,
)
from covidmask.training.segmentation import evaluate_segmenter, train_segmenter

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"torchvision {torchvision.__version__}, Python {platform.python_version()}")

# %% [markdown]
# The preset sets the scale, and nothing else: image size, backbone, number of boxes, epochs.

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %%
# NBVAL_CHECK_OUTPUT
preset = PRESETS[PRESET]
print(f"slices of {preset.phantoms.size} x {preset.phantoms.size} pixels")
print(f"backbone {preset.detector.backbone}, last {preset.detector.cut} layers cut off")
print(f"N = {preset.classifier.n_boxes} ranked boxes, S is {preset.classifier.hidden} wide")

# %% [markdown]
# ## Two data sets
#
# The method needs two kinds of label, and they come from two sets of patients.
#
# - **Lesion masks** teach the detector where ground-glass opacity (GGO) and consolidation (C) are.
#   Masks are expensive, so this set is small. In the paper it holds COVID-19 patients only
#   {cite:p}`Zhang2020`.
# - **Slice labels** teach the classifier: control, common pneumonia or COVID-19. One word for each
#   slice, no mask.

# %%
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
lesions = {
    split: LesionSlices(root / "lesions", split, min_area=preset.min_area)
    for split in ("train", "test")
}
slices = {split: SliceImages(root / "slices", split) for split in ("train", "val", "test")}

# %%
# NBVAL_CHECK_OUTPUT
for split, dataset in lesions.items():
    print(f"lesions {split:5}: {len(dataset)} slices of {len(set(dataset.patients))} patients")
for split, dataset in slices.items():
    counts = class_statistics(dataset).slices.tolist()
    print(f"slices  {split:5}: {counts} slices of {len(set(dataset.patients))} patients")
groups = [*lesions.values(), *slices.values()]
shared = sum(len(set(a.patients) & set(b.patients)) for a in groups for b in groups if a is not b)
print("patients in two sets:", shared)

# %% [markdown]
# Here is one slice of each class. The one of COVID-19 will come back at every step: it is our old
# friend.

# %% mystnb={"image": {"alt": "Three synthetic axial chest slices side by side: a control without lesions, a common pneumonia and a COVID-19 case with grey patches in the lungs."}, "figure": {"caption": "One phantom of each image class. Synthetic, lung window."}}
friend = slices["test"].labels.index(2)
fig, axes = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
for label, ax in enumerate(axes):
    image, _ = slices["test"][slices["test"].labels.index(label)]
    _ = plotting.show_slice(image, ax)
    _ = ax.set_title(IMAGE_CLASSES[label])
plt.show()

# %% [markdown]
# Slices with a mask look like this. One *instance* is one connected region of one kind. The
# detector learns instances and not pixels, because their number, size and place are what tells the
# diseases apart later.

# %% mystnb={"image": {"alt": "A synthetic slice of a COVID-19 phantom twice: alone, and with boxes and outlines around each lesion."}, "figure": {"caption": "A slice of the lesion set, without and with its instances. GGO is drawn solid, consolidation (C) dashed. Synthetic."}}
most = int(np.argmax([len(lesions["test"][i][1]["labels"]) for i in range(40)]))
image, target = lesions["test"][most]
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
_ = plotting.show_slice(image, axes[0])
_ = plotting.show_lesions(image, target, axes[1])
plt.show()

# %% [markdown]
# Figure 1 of the paper asks how many lesions a slice has and how large they are. Its answer: few,
# and small. The phantoms are made to agree.

# %% mystnb={"image": {"alt": "Two histograms. Left: most slices have fewer than five regions of either kind. Right: most regions cover less than two percent of the image."}, "figure": {"caption": "The paper's Figure 1, remade on phantoms: regions in a slice, and area of a region. Synthetic."}}
statistics = lesion_statistics(lesions["train"])
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
_ = plotting.count_histogram(statistics.counts, axes[0])
_ = plotting.area_histogram(statistics.region_fractions, statistics.region_labels, axes[1])
plt.show()

# %%
few = statistics.share_of_slices_below(5)
small = statistics.share_of_regions_below(0.02, 0.01)
print(f"slices with fewer than 5 regions: GGO {few[0]:.0%}, C {few[1]:.0%}")
print(f"GGO regions below 2 % of the image: {small[0]:.0%}; C regions below 1 %: {small[1]:.0%}")

# %% [markdown]
# ## The detector
#
# Mask R-CNN {cite:p}`He2017` proposes boxes, classifies each as background, GGO or C, corrects its
# coordinates and draws a mask inside. Five losses train it at once: two in the region proposal
# network (RPN), two for the boxes, one for the masks. We start from random weights.

# %%
segmenter = lesion_mask_rcnn(preset.detector)
history = train_segmenter(segmenter, lesions["train"], preset.segmenter, seed=SEED)

# %% mystnb={"image": {"alt": "Five curves, one for each loss of Mask R-CNN, against the training step; four fall, and the loss of the RoI boxes first rises and then falls."}, "figure": {"caption": "The five losses of the segmenter, each smoothed over 20 steps. Synthetic data."}}
names = [name for name in history[0] if name.startswith("loss_")]
_ = plotting.loss_curves(history, names, smooth=20)
plt.show()

# %% [markdown]
# The loss of the RoI boxes rises before it falls: it counts only proposals that meet a lesion, and
# at first there are hardly any.
#
# Average precision (AP) judges a detector. A detection counts as right when its mask overlaps a
# true one by at least a threshold; AP50 uses the threshold 0.5, and AP averages over ten
# thresholds up to 0.95. The test patients are new to the detector.

# %%
detection = evaluate_segmenter(segmenter, lesions["test"])
print(f"{detection['slices']} slices of unseen phantom patients")
print(f"mask AP50 {detection['mask_ap50']:.2f}, mask AP {detection['mask_ap']:.2f}")

# %% mystnb={"image": {"alt": "The synthetic slice shown before, with the true lesion outlines on the left and the detected ones with their scores on the right."}, "figure": {"caption": "Truth (left) and detections with a score above 0.5 (right). Synthetic."}}
with torch.no_grad():
    prediction = segmenter([image.to(next(segmenter.parameters()).device)])[0]
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
_ = plotting.show_lesions(image, target, axes[0])
shown = {key: value.cpu() for key, value in prediction.items()}
_ = plotting.show_lesions(image, shown, axes[1], score_threshold=0.5)
plt.show()

# %% [markdown]
# ## From detections to a vector
#
# A classifier needs the same number of inputs for every slice, also for a healthy one. So we keep
# boxes that a detector usually throws away: the $N$ best, however low their scores. Each becomes a
# row $r = (s, \delta_x, \delta_y, \delta_w, \delta_h)$: its score, and how the network moved and
# resized the proposal. The rows are ranked by $s$.
#
# Let us build it for our old friend, step by step. First the detector without its last stage: for
# each proposal, one logit per class and four deltas per class.

# %%
model = covid_ct_mask_net(segmenter, preset.classifier)
detector = model.detector
picture, _ = slices["test"][friend]
with torch.no_grad():
    batch, _ = detector.transform([picture.to(next(model.parameters()).device)])
    features = detector.backbone(batch.tensors)
    proposals, _ = detector.rpn(batch, features)
    pooled = detector.roi_heads.box_roi_pool(features, proposals, batch.image_sizes)
    logits, deltas = detector.roi_heads.box_predictor(detector.roi_heads.box_head(pooled))
boxes = proposals[0]  # [P, 4]
print("proposals", tuple(boxes.shape), "logits", tuple(logits.shape), "deltas", tuple(deltas.shape))

# %% [markdown]
# A softmax gives scores; the background's is dropped. Each proposal now stands once for GGO and
# once for C.

# %%
scores = logits.softmax(dim=1)[:, 1:]  # [P, 2]
lesion_deltas = deltas.reshape(len(boxes), -1, 4)[:, 1:]  # [P, 2, 4]
scores, lesion_deltas = scores.flatten(), lesion_deltas.reshape(-1, 4)  # [2P], [2P, 4]
kind = torch.arange(len(scores), device=scores.device) % 2 + 1  # 1 GGO, 2 C

# %% [markdown]
# Overlapping boxes say the same thing twice. Non-maximum suppression (NMS) compares *decoded* boxes
# of one class, so we decode here, though only to compare: shift the centre by the deltas, scale the
# size by their exponential.

# %%
proposal = boxes.repeat_interleave(2, dim=0)  # [2P, 4]
size = proposal[:, 2:] - proposal[:, :2]
centre = proposal[:, :2] + 0.5 * size
weights = torch.tensor([10.0, 10.0, 5.0, 5.0], device=boxes.device)  # of the box coder
shift = lesion_deltas / weights
new_centre = centre + shift[:, :2] * size
new_size = shift[:, 2:].clamp(max=np.log(1000 / 16)).exp() * size
decoded = torch.cat([new_centre - 0.5 * new_size, new_centre + 0.5 * new_size], dim=1)
decoded = torchvision.ops.clip_boxes_to_image(decoded, batch.image_sizes[0])

there = (decoded[:, 2:] - decoded[:, :2]).prod(dim=1) > 0  # boxes of no area say nothing
index = torch.where(there)[0]
kept = torchvision.ops.batched_nms(decoded[index], scores[index], kind[index], 0.75)
best = index[kept][: preset.classifier.n_boxes]  # batched_nms returns them by falling score
by_hand = torch.cat([scores[best, None], lesion_deltas[best]], dim=1)  # [N, 5]

# %% [markdown]
# The package does the same for a batch:

# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    ranked = model.ranked_boxes([picture.to(boxes.device)])
assert torch.allclose(ranked[0, : len(by_hand)], by_hand, atol=1e-5)
print(tuple(ranked.shape), "ranked boxes: the same by hand and by the package")

# %% mystnb={"image": {"alt": "A heat map with five lines (score and four deltas) and one column for each rank; scores fall from left to right."}, "figure": {"caption": "The ranked boxes of our COVID-19 phantom. Scores fall with the rank; the deltas are those of the same boxes. Synthetic."}}
_ = plotting.ranked_box_matrix(ranked[0].cpu())
plt.show()

# %% [markdown]
# As long as the detector does not change, the ranked boxes of a slice do not change. So we compute
# them once for every slice, and keep them.

# %%
rows = {split: cache_ranked_boxes(model, dataset) for split, dataset in slices.items()}
labels = {split: torch.tensor(dataset.labels) for split, dataset in slices.items()}

# %% [markdown]
# Why should the boxes with low scores help? Look at the scores by rank. The classes differ not only
# at rank 1 but in how fast the scores fall. A healthy slice has no lesion, yet it has a ranking.

# %% mystnb={"image": {"alt": "Mean score against rank for control, common pneumonia and COVID-19; the curve of the controls starts lower and the three fall at different speeds."}, "figure": {"caption": "Scores by rank in the three classes, with the band from the 25 to the 75 percent quantile. Synthetic validation slices."}}
_ = plotting.score_by_rank(rows["val"], labels["val"])
plt.show()

# %% [markdown]
# ## The classifier
#
# The module $S$ reads the $N \times 5$ numbers as one vector through two hidden layers and gives
# three logits. Each goes through a sigmoid of its own, and binary cross-entropy compares it with
# "this class or not" (Algorithm 1 of the paper).
#
# We train $S$ alone, on the rows that we kept: the regime that the paper calls "heads". It takes
# seconds. The epoch with the best validation accuracy stays.

# %%
s_history = train_s(
    model.s,
    rows["train"],
    labels["train"],
    preset.classifier_training,
    validation=(rows["val"], labels["val"]),
    seed=SEED,
)

# %% mystnb={"image": {"alt": "The training loss of S falls while the validation accuracy rises and levels off."}, "figure": {"caption": "Training of S: loss at each step (left) and accuracy on the validation slices after each epoch (right). Synthetic."}}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
_ = plotting.loss_curves(s_history, ["bce"], axes[0], smooth=20)
_ = plotting.loss_curves(
    s_history, ["accuracy"], axes[1], x="epoch", ylabel="Accuracy (share of slices)"
)
plt.show()

# %% [markdown]
# ## The report
#
# *Sensitivity* of a class is the share of its slices that are found. *Positive predictive value*
# (PPV) is the share of its predictions that are right. *Accuracy* is the share of all slices that
# are right.

# %% mystnb={"image": {"alt": "Confusion matrix of three classes; most slices lie on the diagonal."}, "figure": {"caption": "Confusion matrix on test slices of unseen phantom patients. Synthetic."}}
test = slices["test"]
result = evaluate_classifier(model, test)
_ = plotting.confusion_matrix(result["confusion"])
plt.show()

# %%
print(f"{'':18} sensitivity      PPV   (phantoms)")
for name, sensitivity, ppv in zip(IMAGE_CLASSES, result["sensitivity"], result["ppv"], strict=True):
    print(f"{name:18} {sensitivity:11.1%} {ppv:8.1%}")
print(f"accuracy {result['accuracy']:.1%} on {len(test)} slices")

# %% [markdown]
# How sure is that accuracy? Wilson's interval treats every slice as independent. The slices of one
# patient are not, so we also resample whole *patients*.
#
# Neither interval knows of a third thing. The phantoms and the settings of this preset were tuned
# while looking at results on these very patients, though no model was trained on them. A fair
# number needs other ones: write phantoms with another seed, and compare.

# %%
correct = int((result["predictions"] == result["labels"]).sum())
low, high = wilson(correct, len(test))
print(f"95 % interval by slices:   {low:.1%} to {high:.1%}")
low, high = patient_bootstrap(
    result["labels"],
    result["predictions"],
    test.patients,
    lambda confusion: report(confusion)["accuracy"],
    seed=SEED,
)
print(f"95 % interval by patients: {low:.1%} to {high:.1%}")

# %% [markdown]
# Does the detector matter, or would any boxes do? Train $S$ afresh on the ranked boxes of a
# detector that has learned nothing. `train_classifier` does in one call what we did in two:
# it ranks the boxes of every slice, then trains $S$.

# %%
torch.manual_seed(SEED)
untrained = covid_ct_mask_net(lesion_mask_rcnn(preset.detector), preset.classifier)
_ = train_classifier(
    untrained,
    slices["train"],
    "heads",
    preset.classifier_training,
    validation=slices["val"],
    seed=SEED,
)
without = evaluate_classifier(untrained, test)
print(f"accuracy with the trained detector:  {result['accuracy']:.1%}")
print(f"accuracy with random weights:        {without['accuracy']:.1%}")
assert without["accuracy"] < result["accuracy"]

# %% [markdown]
# For comparison, what the paper's Table 2 reports on the real test split of COVIDx-CT, where a
# detector was trained on real masks and $S$ on 3,000 slices:
#
# | regime | COVID-19 | common pneumonia | control | accuracy |
# |---|---|---|---|---|
# | $S$ only ("heads") | 76.30 (81.13) | 71.13 (67.70) | 82.37 (83.38) | 77.20 |
# | $S$ + batch normalisation | 90.80 (94.75) | 91.62 (87.08) | 91.10 (94.33) | 91.66 |
# | everything ("full") | 82.26 (87.01) | 91.70 (95.22) | 97.21 (95.33) | 92.22 |
#
# Sensitivity (PPV) in percent, as printed {cite:p}`TerSarkisov2020`. Our numbers above come from
# other, synthetic data, so the two cannot be ranked against each other.
#
# ## Exercises
#
# ```{exercise} Fewer boxes
# :label: whole-path-fewer
# Train $S$ on the first 4 ranked boxes only. What does the accuracy lose?
# ```

# %% [markdown]
# ````{solution-start} whole-path-fewer
# :class: dropdown
# ````


# %%
def accuracy_of_s(train_rows, test_rows):
    """Train a fresh S on these rows and return its accuracy on the test slices."""
    torch.manual_seed(SEED)
    s = ClassificationModule(train_rows.shape[1], preset.classifier.hidden, train_rows.shape[2])
    train_s(s, train_rows, labels["train"], preset.classifier_training, seed=SEED, progress=False)
    with torch.no_grad():
        predicted = s(test_rows.to(next(s.parameters()).device)).argmax(1).cpu()
    return (predicted == labels["test"]).float().mean().item()


train_rows, test_rows = rows["train"], rows["test"]
print(f"{preset.classifier.n_boxes} boxes: {accuracy_of_s(train_rows, test_rows):.1%}")
print(f" 4 boxes: {accuracy_of_s(train_rows[:, :4], test_rows[:, :4]):.1%}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise} Scores or deltas
# :label: whole-path-columns
# Train $S$ on the scores alone, then on the deltas alone. Which carries more?
# ```

# %% [markdown]
# ````{solution-start} whole-path-columns
# :class: dropdown
# ````

# %%
print(f"scores alone: {accuracy_of_s(train_rows[..., :1], test_rows[..., :1]):.1%}")
print(f"deltas alone: {accuracy_of_s(train_rows[..., 1:], test_rows[..., 1:]):.1%}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise} Without the order
# :label: whole-path-order
# Shuffle the rows of every slice, in training and in testing. The same numbers are there. What is
# lost?
# ```

# %% [markdown]
# ````{solution-start} whole-path-order
# :class: dropdown
# ````

# %%
generator = torch.Generator().manual_seed(SEED)


def shuffled(rows):
    """[M, N, 5] with the rows of each slice in an order of its own."""
    order = torch.rand(rows.shape[:2], generator=generator).argsort(dim=1)
    return rows.gather(1, order[..., None].expand_as(rows))


print(f"shuffled: {accuracy_of_s(shuffled(train_rows), shuffled(test_rows)):.1%}")

# %% [markdown]
# ````{solution-end}
# ````

# %% [markdown]
# ## What we learned
#
# 1. Two sets of labels train two models: masks the detector, slice labels the module $S$.
# 2. A slice becomes $N$ rows of score and encoded deltas, ranked by score.
# 3. Low scores stay in, so that healthy slices have a vector too.
# 4. With the detector frozen, its boxes are computed once and $S$ trains in seconds.
# 5. Slices of one patient are not independent, and phantoms are not patients.
#
# ## Further reading
#
# Mask R-CNN {cite:p}`He2017` and Faster R-CNN {cite:p}`Ren2015` describe the detector. The paper of
# this book is {cite:t}`TerSarkisov2020`; the classification data are described by
# {cite:t}`Gunraj2020`.
