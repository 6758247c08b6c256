# %% [markdown]
# # 7 · COVID-CT-Mask-Net
#
# The detector turns a slice into ranked boxes, and a small module $S$ turns the ranked boxes into
# three probabilities: control, common pneumonia, COVID-19. In this chapter you build $S$ from three
# matrices and put it behind the detector. The picture below shows where it sits.
#
# **The question: $S$ answers with three separate sigmoids, where most classifiers have one softmax.
# Does that cost accuracy, or gain any?**

# %% tags=["fold"] mystnb={"image": {"alt": "Diagram from top to bottom. A slice enters ResNet and FPN, then RPN, RoIAlign and box head, which give logits and encoded deltas of P proposals. Softmax, decoding, NMS and ranking keep N boxes as an N by 5 matrix. Module S flattens it to 5N numbers and passes them through three linear layers to three logits, each with a sigmoid: control, common pneumonia, COVID-19. A dashed box beside RoIAlign holds the masks, which the segmenter alone has."}, "figure": {"caption": "COVID-CT-Mask-Net of the preset quick, drawn from the loaded modules, with their shapes. Blue: weights copied from the segmenter. Green: no weights. Orange: module S, new. Dashed: the mask branch, dropped."}}
# @title Imports, versions, and the picture of the whole model
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import SVG
from scipy.stats import t as student
from torch import nn

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS, ClassifierConfig, DetectorConfig
from covidmask.datasets import SliceImages, make_slice, old_friend, write_phantoms
from covidmask.diagrams import model_diagram
from covidmask.interactive import frame_slider
from covidmask.metrics import bootstrap
from covidmask.models import (
    ClassificationModule,
    count_parameters,
    covid_ct_mask_net,
    lesion_mask_rcnn,
    set_regime,
    trained_classifier,
    trained_segmenter,
)
from covidmask.training import (
    cache_ranked_boxes,
    classification_loss,
    epoch_batches,
    learning_rate,
)
from covidmask.training.compare import part_of

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # on a GPU, too, all digits of float32 count
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
SVG(data=model_diagram(trained_classifier("quick", "cpu", shipped=True)))

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
SEEDS = 8  # trainings with sigmoids, and as many with a softmax
DECAYS = (0.01, 0.02, 0.04, 0.08)  # weight decays to choose from
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# **After it you can**
#
# - write $S$ with three matrices, and say what each number of its input means;
# - explain why three sigmoids need both terms of the cross-entropy, and a softmax only one;
# - say what sigmoids cost or gain against a softmax, with an interval;
# - put $S$ on a copy of a trained segmenter, and count what is copied, dropped and new;
# - derive the parameters of $S$ for $N = 256$, and say which published counts follow from a rule.
#
# **You need** the ranked boxes of [chapter 6](06_ranked_boxes.ipynb). The chapter runs alone, with
# weights that come with the package.
#
# **Time:** reading 25 minutes, exercises 40 minutes, running about 3 minutes on two CPU cores in
# the preset `quick`; the first chapter that you run also draws the phantoms, which takes a few
# minutes more.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice here is a *phantom*, made by formulas and random numbers. No number that this chapter
# computes is a result on patients, and nothing here is for diagnosis.
# ```
#
# Look at the picture again, because three things in it are easy to miss. The boxes that $S$ reads
# are not detections: they are the $N$ best boxes of the slice, however bad these are. $S$ reads the
# *encoded* deltas, although decoded boxes are needed on the way, for NMS. And no path leads from
# the masks to the classes.
#
# ## The slices of this chapter
#
# We load the trained model, our old friend (a COVID-19 phantom) and one phantom of each other
# class. For the comparison near the end we also rank the boxes of about two thousand phantoms,
# once, and keep the rows.

# %% tags=["fold"]
# @title Load the model and rank the boxes of all slices
preset = PRESETS[PRESET]
training, size = preset.classifier_training, preset.phantoms.size
n, hidden = preset.classifier.n_boxes, preset.classifier.hidden
model = trained_classifier(PRESET, device, shipped=True)


def model_input(image):
    """float32 [H, W] -> [3, H, W] on the device."""
    return torch.from_numpy(image).expand(3, -1, -1).to(device)


names = ("Old friend (COVID-19)", "Control", "Common pneumonia")
pictures = [old_friend(size)[0], *(make_slice(1, k, size)[0] for k in (0, 1))]
pictures = [model_input(picture) for picture in pictures]
with torch.no_grad():
    rows = [model.ranked_boxes([picture]) for picture in pictures]
rows = torch.cat(rows)  # [3, N, 5]

root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
splits = {s: SliceImages(root / "slices", s) for s in ("train", "val", "test")}
every = 2 * preset.phantoms.slices_per_patient  # one slice of every second patient
splits["train"] = part_of(splits["train"], range(0, len(splits["train"]), every))
kept = {}
for name, slices in splits.items():
    found = cache_ranked_boxes(model, slices, folder=f"{DATA}/ranked")  # [M, N, 5]
    kept[name] = found.clone(), torch.tensor(slices.labels)
print(f"N = {n} ranked boxes, hidden layers {hidden} wide")
for name, (found, _) in kept.items():
    print(f"{name:5} rows: {tuple(found.shape)}")

# %% [markdown]
# ## S from three matrices
#
# Write the rows $r_1, \dots, r_N$ one behind the other, and you have a vector
# $\mathbf{r} \in \mathbb{R}^{5N}$. $S$ is a perceptron with two hidden layers of width $d$:
#
# $$
# \mathbf{a}_1 = \max(0, W_1 \mathbf{r} + \mathbf{b}_1), \qquad
# \mathbf{a}_2 = \max(0, W_2 \mathbf{a}_1 + \mathbf{b}_2), \qquad
# \hat{y} = W_3 \mathbf{a}_2 + \mathbf{b}_3 .
# $$
#
# The three numbers $\hat{y}_0, \hat{y}_1, \hat{y}_2$ are *logits*: control, common pneumonia,
# COVID-19. PyTorch keeps a matrix as [out, in], hence the transpose in the code.


# %%
def s_by_hand(rows, matrices, biases):
    """float32 [B, N, 5] -> logits [B, 3]."""
    r = rows.flatten(1)  # [B, 5N]
    a1 = (r @ matrices[0].T + biases[0]).clamp(min=0)  # [B, d]
    a2 = (a1 @ matrices[1].T + biases[1]).clamp(min=0)  # [B, d]
    return a2 @ matrices[2].T + biases[2]  # [B, 3]


# %% [markdown]
# Why a plain vector, and not something that treats all boxes alike? Because the place in the vector
# tells the rank. If we count ranks from 0, the score of rank $i$ always stands at position $5i$,
# its four deltas follow, and each position has its own column in $W_1$. So $S$ can learn to look at
# "the score of the tenth box". Let us check that, and then that the package's
# `ClassificationModule` is our function, with the trained weights of the loaded model.

# %% tags=["nbval-check-output"]
r = rows.flatten(1)  # [3, 5N]
for rank in (0, n // 2, n - 1):
    assert torch.equal(r[0, 5 * rank : 5 * rank + 5], rows[0, rank])
print(tuple(rows.shape), "->", tuple(r.shape))

layers = (model.s.fc_scores, model.s.fc_scores_2, model.s.fc_scores_img)
matrices = [layer.weight.detach() for layer in layers]
biases = [layer.bias.detach() for layer in layers]
with torch.no_grad():
    logits = s_by_hand(rows, matrices, biases)  # [3, 3]
    assert torch.allclose(logits, model.s(rows), atol=1e-4)
    # from the pictures to the logits
    assert torch.allclose(logits, model(pictures), atol=1e-3)
print([tuple(matrix.shape) for matrix in matrices])
print(tuple(logits.shape), "logits: the same by hand and by the package")

# %% [markdown]
# ## Three sigmoids
#
# Each logit goes through a sigmoid of its own:
#
# $$
# p_k = \sigma(\hat{y}_k) = \frac{1}{1 + e^{-\hat{y}_k}}, \qquad k = 0, 1, 2 .
# $$
#
# So $S$ answers three separate questions: is this a control or not, a common pneumonia or not,
# COVID-19 or not? The answers share the hidden layers and nothing else. All three may be "no", or
# two may be "yes". A softmax, $q_k = e^{\hat{y}_k} / \sum_j e^{\hat{y}_j}$, divides a total of 1
# among the classes instead.
#
# The *predicted* class is the one with the largest logit. Both functions keep the order of the
# logits, so for given logits they predict the same class. They differ in what the numbers mean:
# three sigmoids need not sum to 1, and therefore they are no shares of a whole.

# %%
p = 1 / (1 + torch.exp(-logits))  # [3, 3]
q = logits.exp() / logits.exp().sum(1, keepdim=True)  # [3, 3]
assert torch.allclose(p, logits.sigmoid())
assert torch.allclose(q, logits.softmax(1), atol=1e-6)
assert torch.equal(p.argmax(1), q.argmax(1))
print(f"{'sigmoids':22} control  pneum.  COVID    sum   predicted")
for name, row in zip(names, p, strict=True):
    numbers = "  ".join(f"{value:6.3f}" for value in (*row, row.sum()))
    print(f"{name:22} {numbers}   {IMAGE_CLASSES[int(row.argmax())]}")

# %% [markdown]
# Move the slider to see the three answers change, and their sum with them. We take the control and
# replace its best boxes, one, two, four and so on, by those of our old friend.

# %% tags=["fold"]
# @title Draw a control whose best boxes give way to those of the old friend
steps = sorted({0, *(n // 2**power for power in range(6))})
ranks = np.arange(1, n + 1)


def draw_mixture(k):
    """Scores of k boxes of the old friend and n - k of the control, and their p."""
    mixed = torch.cat([rows[0, :k], rows[1, k:]])  # [N, 5]
    with torch.no_grad():
        answers = model.s(mixed[None])[0].sigmoid().cpu()  # [3]
    fig, axes = plt.subplots(1, 2, figsize=(6.6, 3.3), layout="constrained")
    look = {"color": plotting.VERMILLION, "ms": 4}
    _ = axes[0].plot(ranks[:k], mixed[:k, 0].cpu(), "o", **look, label="old friend")
    look = {"color": plotting.GREEN, "ms": 4, "mfc": "none"}
    _ = axes[0].plot(ranks[k:], mixed[k:, 0].cpu(), "s", **look, label="control")
    _ = axes[0].set(xlabel="Rank", ylabel="Score (no unit)")
    _ = axes[0].set(xlim=(0, n + 1), ylim=(-0.05, 1.05))
    _ = axes[0].legend()
    classes = [name.replace(" ", "\n") for name in IMAGE_CLASSES]
    look = {"color": plotting.CLASS_COLOURS, "ec": "black", "lw": 0.5}
    bars = axes[1].bar(classes, answers, **look)
    _ = axes[1].bar_label(bars, fmt="%.2f")
    _ = axes[1].set(xlabel="Image class", ylim=(0, 1.12), ylabel="Sigmoid (no unit)")
    _ = axes[1].set_title(f"sum {answers.sum():.2f}")
    return fig


frame_slider(
    [draw_mixture(k) for k in steps],
    [f"{k} of {n} boxes from the old friend" for k in steps],
    "Ranked boxes taken from the old friend",
    "Left: scores by rank, the first from the old friend and the others from a "
    "control. Right: three bars with the sigmoids of control, common pneumonia and "
    "COVID-19",
    caption="A control whose best boxes give way to those of our old friend.",
    dpi=80,
)

# %% [markdown]
# ## The loss needs both of its terms
#
# Let $y_k$ be 1 for the true class and 0 for the other two. Binary cross-entropy compares each
# answer with it:
#
# $$
# \mathcal{L} = - \frac{1}{3} \sum_{k} \Bigl[ y_k \log p_k + (1 - y_k) \log (1 - p_k) \Bigr] .
# $$
#
# The first, *positive* term asks for a high $p_k$ of the true class, and the second, *negative* one
# for low $p_k$ of the others. The paper prints its training as Algorithm 1, which [chapter
# 8](08_three_regimes.ipynb) gives in five lines. The loss in its line 9 is the first term alone
# {cite:p}`TerSarkisov2020`; the released code has both. The mean over slices is the package's
# `classification_loss`:

# %% tags=["nbval-check-output"]
labels = torch.tensor([2, 0, 1], device=device)
y = F.one_hot(labels, 3).float()  # [3, 3]
by_hand = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
package = classification_loss(logits, labels)
assert torch.allclose(by_hand, package, atol=1e-4)
print("classification loss: the same by hand and by the package")

# %% [markdown]
# What would happen without the second term? The derivatives by a logit $\hat{y}_k$ tell. For one
# slice, and with a sum over the classes instead of the mean, they are
#
# $$
# \underbrace{p_k - y_k}_{\text{sigmoids, both terms}} \qquad
# \underbrace{y_k (p_k - 1)}_{\text{sigmoids, positive term}} \qquad
# \underbrace{q_k - y_k}_{\text{softmax, positive term}}
# $$
#
# We ask autograd to confirm them, on a slice of class 2.

# %% tags=["nbval-check-output"]
z = torch.tensor([0.5, 1.0, -0.5], requires_grad=True)  # three logits
true = torch.tensor([0.0, 0.0, 1.0])
both = F.binary_cross_entropy_with_logits(z, true, reduction="sum")
alone = -(true * F.logsigmoid(z)).sum()
softmax = -(true * z.log_softmax(0)).sum()
theory = {
    "sigmoids, both terms": (both, z.sigmoid() - true),
    "sigmoids, positive term": (alone, true * (z.sigmoid() - 1)),
    "softmax, positive term": (softmax, z.softmax(0) - true),
}
for name, (loss, expected) in theory.items():
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.allclose(gradient, expected)
    numbers = " ".join(f"{value + 0.0:6.3f}" for value in gradient.tolist())
    print(f"{name:24} {numbers}")

# %% [markdown]
# In the middle line the wrong classes get no gradient at all: nothing pulls a logit down, so
# training would push every answer to "yes". With a softmax the positive term is enough, because a
# larger share of one class means smaller shares of the others.
#
# ## Sigmoids or softmax: let us measure it
#
# The classes exclude each other, so a softmax would fit as well, and the paper does not say why it
# prefers sigmoids. To see what the choice does, we train $S$ many times on the same rows: the same
# random starts, the same orders of slices, the same optimiser. Only the loss differs. We take the
# sum over the classes in both losses, because then the two gradients above have the same form. And
# because the preset's weight decay was chosen for sigmoids, we try several with each loss, and keep
# the one with the best accuracy on validation slices: a comparison is fair when both sides have had
# the same chances.


# %%
def sigmoids(logits, labels):
    """Both terms, summed over the classes; mean over the slices."""
    return 3 * classification_loss(logits, labels)


def one_softmax(logits, labels):
    """Minus log q of the true class; mean over the slices."""
    return F.cross_entropy(logits, labels)


# %% [markdown]
# To train many modules costs little more than to train one, if their matrices are stacked: [seeds,
# out, in]. The products then run for all seeds at once, and each seed keeps its own weights, its own
# order of slices and its own gradient.


# %%
def many_s(rows, weights, biases):
    """[seeds, B, N, 5] -> logits [seeds, B, 3], each seed by its own S."""
    x = rows.flatten(2)  # [seeds, B, 5N]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = (x.clamp(min=0) if i else x) @ weight.mT + bias
    return x


def random_starts(make):
    """Weights [seeds, out, in] and biases [seeds, 1, out] by layer."""
    layers = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        parts = make(n, hidden).modules()
        layers.append([m for m in parts if isinstance(m, nn.Linear)])
    weights, biases = [], []
    for one in zip(*layers, strict=True):  # a layer of all seeds
        weights.append(torch.stack([m.weight.data for m in one]))
        biases.append(torch.stack([m.bias.data[None] for m in one]))
    return weights, biases


# %%
def train_all(loss_of, decay, rows, labels, make=ClassificationModule):
    """Weights and biases of all seeds after the preset's epochs."""
    weights, biases = random_starts(make)
    parameters = [part.requires_grad_(True) for part in weights + biases]
    rates = {"lr": training.lr, "weight_decay": decay}
    adam = torch.optim.Adam(parameters, **rates, fused=True)
    batches = batches_of_all(len(rows))  # [steps, seeds, B]
    for step, chosen in enumerate(batches):
        rate = learning_rate(training, step, len(batches))
        adam.param_groups[0]["lr"] = rate
        logits = many_s(rows[chosen], weights, biases).flatten(0, 1)
        # the sum over the seeds, so that each has its own mean
        loss = SEEDS * loss_of(logits, labels[chosen].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return weights, biases


# %% [markdown]
# We judge all modules on test patients whom none has seen. We do it once with all our training
# slices and once with every tenth, since a difference might show only where data are scarce.


# %% tags=["fold"]
# @title Train and judge both kinds
def batches_of_all(count):
    """The slices of each step for each seed, int64 [steps, seeds, B]."""
    by_seed = [
        [
            batch
            for epoch in range(training.epochs)
            for batch in epoch_batches(count, training.batch_size, epoch, seed)
        ]
        for seed in range(SEEDS)
    ]
    return torch.tensor(by_seed).transpose(0, 1)


def logits_for(trained, split):
    """Logits of a split by the modules of all seeds, [seeds, M, 3]."""
    with torch.no_grad():
        return many_s(kept[split][0][None].expand(SEEDS, -1, -1, -1), *trained)


def right_of(logits, split):
    """Which slices are right, float32 [seeds, M]."""
    return (logits.argmax(2) == kept[split][1]).float()


def test_logits(loss_of, every, make=ClassificationModule):
    """Test logits [seeds, M, 3] with the best decay; `every`: which training slices."""
    few_rows, few_labels = (part[::every] for part in kept["train"])
    tried = {d: train_all(loss_of, d, few_rows, few_labels, make) for d in DECAYS}
    accuracy = {d: right_of(logits_for(tried[d], "val"), "val").mean() for d in DECAYS}
    best = max(accuracy, key=accuracy.get)
    print(f"{len(few_rows):6,} slices, {loss_of.__name__:11} weight decay {best:g}")
    return logits_for(tried[best], "test")


results = {}  # (training slices, loss) -> logits of the test slices [seeds, M, 3]
for every in (1, 10):
    count = len(kept["train"][1][::every])
    for loss_of in (sigmoids, one_softmax):
        results[count, loss_of.__name__] = test_logits(loss_of, every)

# %% [markdown]
# Two things make a measured difference uncertain. Another random start would give other modules, so
# we look at one difference for each seed and at their $t$ interval: the mean plus or minus a few
# standard errors, and the fewer the seeds, the more. Other patients would give other slices, so we
# also draw the test patients with replacement and average over the seeds
# ([chapter 10](10_evaluation.ipynb) explains both).

# %%
_, owner = np.unique(splits["test"].patients, return_inverse=True)
members = [np.flatnonzero(owner == i) for i in range(owner.max() + 1)]
gains = {}  # training slices -> differences of the accuracy, in points
for count in dict.fromkeys(count for count, _ in results):
    right = {}
    for name in ("sigmoids", "one_softmax"):
        right[name] = right_of(results[count, name], "test")  # [SEEDS, M]
    gain = 100 * (right["sigmoids"] - right["one_softmax"])  # [SEEDS, M]
    by_slice, by_seed = gain.mean(0).numpy(), gain.mean(1).numpy()

    def of_patients(drawn, by_slice=by_slice):
        return by_slice[np.concatenate([members[i] for i in drawn])].mean()

    half = student.ppf(0.975, SEEDS - 1) * by_seed.std(ddof=1) / SEEDS**0.5
    gains[count] = by_seed, half, bootstrap(len(members), of_patients)

# %% tags=["fold"] mystnb={"image": {"alt": "Two rows of dots, for all training slices and for a tenth: the accuracy of sigmoids minus that of a softmax, one dot for each seed, with two horizontal intervals of 95 percent, over seeds and over patients, and a vertical line at zero."}, "figure": {"caption": "Accuracy with sigmoids minus accuracy with a softmax, on the same test phantoms. Each dot is one seed. Right of the line sigmoids are better. Synthetic."}}
# @title Draw the differences, and print both accuracies
fig, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
look = {"capsize": 4, "lw": 2, "ms": 7}
for place, (by_seed, half, ends) in enumerate(gains.values()):
    mean = by_seed.mean()
    spread = np.linspace(-0.06, 0.06, SEEDS)
    first = {"label": "one seed"} if place == 0 else {}
    dots = {"color": "#888888", "ms": 5, "mfc": "none", **first}
    _ = ax.plot(by_seed, place + spread, "o", **dots)
    first = {"label": "mean, 95 % over seeds"} if place == 0 else {}
    ends_of = {"fmt": "s", "color": plotting.BLUE, **look, **first}
    _ = ax.errorbar(mean, place + 0.22, xerr=half, **ends_of)
    first = {"label": "mean, 95 % over patients"} if place == 0 else {}
    error = [[mean - ends[0]], [ends[1] - mean]]
    ends_of = {"fmt": "D", "color": plotting.VERMILLION, "ls": "--", **look, **first}
    _ = ax.errorbar(mean, place + 0.36, xerr=error, **ends_of)
_ = ax.axvline(0, color="black", lw=1)
_ = ax.set_xlabel("Accuracy, sigmoids minus softmax (percentage points)")
_ = ax.set_ylim(1.9, -0.4)
_ = ax.set_yticks(range(len(gains)), [f"{count:,}" for count in gains])
_ = ax.set_ylabel("Training slices")
_ = ax.legend(loc="lower left", ncols=3, fontsize=9)
plt.show()
print("accuracy on test phantoms: mean of the seeds (lowest to highest)")
for (count, name), logits_of in results.items():
    right = right_of(logits_of, "test").mean(1)
    seeds = f"{right.mean():.1%} ({right.min():.1%} to {right.max():.1%})"
    print(f"{count:6,} training slices, {name:12} {seeds}")
for count, (by_seed, half, ends) in gains.items():
    print(f"{count:6,} training slices: difference {by_seed.mean():+.2f} points; 95 %")
    of_patients = f"{ends[0]:+.2f} to {ends[1]:+.2f}"
    print(f"       over seeds ± {half:.2f}, over patients {of_patients}")

# %% [markdown]
# In the run shown here all four intervals contain zero. So this experiment does not show that either
# choice is more accurate, with many slices or with few. It does bound the difference: the ends of the
# intervals say how far it may go, and that is less than two seeds of the same kind can differ (compare
# the ranges above). What remains open: these are phantoms with a small $N$, and both losses chose a
# weight decay at an end of the range that we tried. The paper gives no comparison.
#
# The other difference is in what you can say about one slice. How often are the answers of the
# sigmoids all "no", or more than one "yes"?

# %%
chosen = results[len(splits["train"]), "sigmoids"]
answers = chosen.sigmoid()  # [SEEDS, M, 3]
yes = (answers > 0.5).sum(2)  # [SEEDS, M]: how many classes
for name, case in (("no", yes == 0), ("one", yes == 1), ("two", yes >= 2)):
    share = case.float().mean(1)  # [SEEDS]
    ends = f"{share.min():.1%} to {share.max():.1%}"
    right = right_of(answers, "test")[case].mean()
    print(f"{name:3} class above 0.5: {ends} of slices,", end=" ")
    print(f"of these {right:.0%} predicted right")

# %% [markdown]
# In the run shown here, predictions are right more often where exactly one answer is "yes" than where
# none or two are. So the three numbers tell when to look again, and "none of the three" is an answer
# that a softmax, which always hands out a whole, cannot give. If you need shares of a whole instead,
# take the softmax: in the run shown here, the intervals leave room for a difference of about two
# points, and of no more.
#
# ## One model of two
#
# By line 2 of the paper's Algorithm 1, the classifier starts from the weights of the segmenter.
# `covid_ct_mask_net` *copies* the segmenter, drops the mask branch from the copy, and puts a fresh
# $S$ behind it. The weights are equal but lie in different memory, so training one model does not
# change the other.

# %% tags=["nbval-check-output"]
segmenter = trained_segmenter(PRESET, device, shipped=True)
assembled = covid_ct_mask_net(segmenter, preset.classifier)
heads = segmenter.roi_heads
branch = heads.mask_head, heads.mask_predictor
masks = sum(count_parameters(part) for part in branch)
s_size = count_parameters(assembled.s)
assert assembled.detector.roi_heads.mask_head is None
source = dict(segmenter.named_parameters())
for name, copied in assembled.detector.named_parameters():
    assert torch.equal(copied, source[name])
    assert copied.data_ptr() != source[name].data_ptr()
print(f"segmenter          {count_parameters(segmenter):10,} parameters")
print(f"- mask branch      {masks:10,}")
print(f"+ module S         {s_size:10,}")
print(f"= classifier       {count_parameters(assembled):10,}")

# %% [markdown]
# The assembled model is not trained: its $S$ is random. But its detector already ranks the boxes of
# our old friend as the *trained* classifier does, because that one was trained in the regime
# "heads", in which $S$ alone learns. Whatever trains, the detector stays in eval mode;
# [chapter 8](08_three_regimes.ipynb) shows why.

# %% tags=["nbval-check-output"]
with torch.no_grad():
    again = assembled.ranked_boxes(pictures[:1])  # [1, N, 5]
assert torch.allclose(again, rows[:1], atol=1e-4)
_ = assembled.train()
modes = {"S": assembled.s.training, "detector": assembled.detector.training}
print("in train mode after .train():", modes)
_ = assembled.eval()

# %% [markdown]
# ## How large is it?
#
# A linear layer from $n_\text{in}$ to $n_\text{out}$ numbers has $(n_\text{in} + 1) \,
# n_\text{out}$ parameters; the 1 is the bias. For the released $N = 256$ and $d = 1024$ this gives
#
# $$
# \underbrace{(5 \cdot 256 + 1) \cdot 1024}_{1{,}311{,}744} +
# \underbrace{(1024 + 1) \cdot 1024}_{1{,}049{,}600} +
# \underbrace{(1024 + 1) \cdot 3}_{3{,}075} = 2{,}364{,}419 .
# $$


# %% tags=["nbval-check-output"]
def size_of_s(n, d):
    return (5 * n + 1) * d + (d + 1) * d + (d + 1) * 3


assert size_of_s(256, 1024) == 2_364_419
assert size_of_s(n, hidden) == count_parameters(model.s)
for name, other in PRESETS.items():
    boxes, width = other.classifier.n_boxes, other.classifier.hidden
    count = size_of_s(boxes, width)
    print(f"{name:7} N = {boxes:3}, d = {width:4}: {count:9,}")

# %% [markdown]
# ### Which published numbers follow from a rule?
#
# "Parameters" can mean two things. `parameters()` holds what an optimiser may change. The state
# dict, which a weights file stores, also holds the running means and variances of batch
# normalisation and its step counters; we call all its numbers *entries*. We build the paper's
# models on PyTorch's `meta` device, which knows shapes but holds no numbers, and count both.


# %%
def entries(module):
    return sum(tensor.numel() for tensor in module.state_dict().values())


with torch.device("meta"):  # shapes without numbers
    paper_segmenter = lesion_mask_rcnn(DetectorConfig())
    paper_model = covid_ct_mask_net(paper_segmenter, ClassifierConfig())
    light = DetectorConfig(backbone="resnet18", light_mask_head=True)
    light_s = ClassifierConfig(n_boxes=128, hidden=512)
    light_model = covid_ct_mask_net(lesion_mask_rcnn(light), light_s)
s_count = count_parameters(paper_model.s)
segmenter_entries = entries(paper_segmenter)

# %% tags=["fold", "nbval-check-output"]
# @title Print published counts beside ours
published = [
    ("Mask R-CNN", "31.78M", "entries of the segmenter", segmenter_entries),
    ("full", "34.14M", "those and S", segmenter_entries + s_count),
    ("heads + BN", "2.36M", "S alone", s_count),
    ("heads", "2.25M", "more than one, see below", None),
    ("ResNet-18", "14.75M", "entries of the classifier", entries(light_model)),
]
print(f"{'model':11} {'published':>9} {'our count':>11}   rule that gives it")
for name, millions, rule, count in published:
    print(f"{name:11} {millions:>9} {f'{count:,}' if count else '-':>11}   {rule}")
print("\nthe same rule for all: parameters, classifier without masks")
rpn = count_parameters(paper_model.detector.rpn)
box_head = count_parameters(paper_model.detector.roi_heads)
norm = sum(p.numel() for p in set_regime(paper_model, "heads_bn"))
honest = {
    "segmenter": count_parameters(paper_segmenter),
    "classifier": count_parameters(paper_model),
    "trains in heads": s_count,
    "trains in heads + BN": norm,
    "gets a gradient in full": count_parameters(paper_model) - rpn,
}
for name, count in honest.items():
    print(f"{name:24} {count:11,}")
print(f"\ncandidates for 2.25M: S / 2**20 = {s_count / 2**20:.3f}, ", end="")
print(f"RPN and box head {(rpn + box_head) / 1e6:.3f} million")
print(f"test / train slices {21_191 / 3_000:.2f}, train / test {3_000 / 21_191:.2f}")

# %% [markdown]
# The first four rows are in Table 1 of the paper {cite:p}`TerSarkisov2020`, the last is in the
# README of the released code. Most published numbers are cut, not rounded. So 31.78M counts
# entries, 34.14M counts a mask branch that the classifier never runs, and 2.36M, called heads + BN,
# fits $S$ alone, without any batch norm. For 2.25M, called heads, two rules fit
# and the paper names none, so we leave it open. Four light models follow from no rule that we know
# ([paper v code](paper_v_code.ipynb) lists them).
#
# The last column of Table 1 is headed "Train/Test", but its 7.06 is test over train: 21,191 test
# slices for 3,000 training slices. A ratio says nothing about the width of intervals, which depends
# on the number of test patients ([chapter 1](01_data.ipynb)). Nor does it say that a model
# generalises, because the test slices come from the same source as the training slices
# ([chapter 14](14_another_hospital.ipynb)).

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. In the vector that $S$ reads, ranks are counted from 0. What stands at position 50?**
#
# - [ ] A delta of the box of rank 9. :: Each box takes five places, so rank 9 has 45 to 49.
# - [ ] The score of the box of rank 50. :: A place holds one number, and a box needs five of them.
# - [x] The score of the box of rank 10. :: 50 = 5 · 10, and the score comes first in each row.
#
# **2. The sigmoids of a slice are 0.40, 0.35 and 0.30. What may you say?**
#
# - [x] The prediction is control, and none of the three answers is "yes". :: The largest logit
#   decides, however low it is. Report the three numbers with the class.
# - [ ] Something is wrong, because probabilities have to sum to 1. :: Only shares of a whole have
#   to. These are answers to three separate questions.
# - [ ] The slice is a control with a probability of 0.40 / 1.05. :: Dividing by the sum makes
#   numbers that sum to 1, but nobody trained $S$ to make them right.
#
# **3. You train three sigmoids with the positive term alone. What happens?**
#
# - [ ] The loss cannot fall, since two terms are needed. :: It falls easily: every logit may rise.
# - [ ] It works as a softmax does, only more slowly. :: In a softmax, one share rises at the cost
#   of the others; sigmoids do not know of each other.
# - [x] The loss falls to nearly 0 while all answers become "yes". :: Wrong classes get no gradient,
#   so nothing holds their logits down.
#
# **4. You add 3 to all three logits. What changes?**
#
# - [ ] The predicted class, in some slices. :: The same number on all keeps their order.
# - [x] The sigmoids, but neither the softmax nor the class. :: A softmax cancels a common factor
#   $e^3$; a sigmoid looks at one logit only.
# - [ ] The softmax, but neither the sigmoids nor the class. :: It is the other way round.
#
# **5. Why does the paper's 34.14M not give the parameters of the classifier?**
#
# - [ ] It leaves out the batch normalisation of the backbone. :: It counts that, and its running
#   statistics, too.
# - [x] It counts running statistics and a mask branch that is never run. :: It is the number of
#   entries of the whole segmenter, plus $S$.
# - [ ] It leaves out $S$, which has 2.36 million. :: Without $S$ the number is 31.78M.
#
# **6. Ten seeds give a mean difference of 0.3 points, 95 % interval -0.4 to 1.0. What follows?**
#
# - [ ] Sigmoids and softmax are equally good. :: A difference up to 1.0 would fit these data as
#   well. Not to see one is not to show that there is none.
# - [ ] Sigmoids are better, because the mean is positive. :: A mean of ten differences is rarely
#   exactly 0, even where nothing differs.
# - [x] This experiment does not decide the sign, but it bounds the size. :: Differences far outside
#   the interval are hard to reconcile with the data.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · The size of any S
#
# Kind: pencil, *
#
# You want rows of $f$ numbers instead of 5, and $k$ classes instead of 3. Derive how many
# parameters $S$ then has, and write it as `parameters_of_s(n, d, f, k)`. Use no module of PyTorch.
# Then put in $N = 1$: how small can a smaller $N$ alone make the paper's $S$?
#
# Hint: Which of the three layers know about $N$ and $f$, and which about $k$?


# %% tags=["starter"]
def parameters_of_s(n, d, f=5, k=3):
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def parameters_of_s(n, d, f=5, k=3):
    return (f * n + 1) * d + (d + 1) * d + (d + 1) * k


print(f"N = 256: {parameters_of_s(256, 1024):,}")
print(f"N =   1: {parameters_of_s(1, 1024):,}; middle layer {1025 * 1024:,}")


# %% tags=["wrong"]
def parameters_of_s(n, d, f=5, k=3):
    return f * n * d + d * d + d * k


# %% tags=["wrong"]
def parameters_of_s(n, d, f=5, k=3):
    return (f * n + 1) * d + (d + 1) * d + (d + 1) * 3


# %% tags=["check"]
# @title Check your answer
for case in ((1, 8, 5, 3), (4, 16, 7, 3), (32, 64, 5, 2)):
    boxes, width, columns, many = case
    expected = count_parameters(ClassificationModule(boxes, width, columns, many))
    got = parameters_of_s(*case)
    where = f"N, d, f, k = {case}: {got}"
    assert got >= expected, f"{where} is too few. Has each output a bias?"
    assert got == expected, f"{where} is too many. Do f and k count?"
print("your formula agrees with the modules")

# %% [markdown] tags=["answer"]
# The middle layer knows nothing of $N$, so the paper's $S$ stays above a million parameters however
# few boxes it reads. A smaller $d$ saves more.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · How sure is an S that knows nothing?
#
# Kind: predict, then run, **
#
# If all answers were 0.5, the loss would be $\log 2 \approx 0.69$. Will a fresh
# `ClassificationModule`, which has random weights, begin near that value, far above or far below?
# Decide first. Then write `first_losses(rows, labels, seeds)`: a list with the
# `classification_loss` of a fresh $S$ for each seed.
#
# Hint: Call `torch.manual_seed(seed)` just before you make the module. The module starts with
# "Kaiming normal, fan-out": weights of the variance 2 over the number of *outputs*. How many outputs
# has the last layer?


# %% tags=["starter"]
def first_losses(rows, labels, seeds):
    raise NotImplementedError("one fresh ClassificationModule(n, hidden) for each seed")


# %% tags=["solution"]
# @title Solution
def first_losses(rows, labels, seeds):
    losses = []
    for seed in seeds:
        torch.manual_seed(seed)
        s = ClassificationModule(n, hidden)
        with torch.no_grad():
            losses.append(classification_loss(s(rows), labels).item())
    return losses


losses = first_losses(*(part[::50] for part in kept["train"]), range(20))
print(f"first loss of 20 fresh S: {min(losses):.2f} to {max(losses):.2f}")


# %% tags=["wrong"]
def first_losses(rows, labels, seeds):
    torch.manual_seed(0)
    s = ClassificationModule(n, hidden)
    return [classification_loss(s(rows), labels).item() for _ in seeds]


# %% tags=["wrong"]
def first_losses(rows, labels, seeds):
    losses = []
    for seed in seeds:
        torch.manual_seed(seed)
        s = ClassificationModule(n, hidden)
        losses.append(F.cross_entropy(s(rows), labels).item())
    return losses


# %% tags=["check"]
# @title Check your answer
got = first_losses(*(part[::50] for part in kept["train"]), [3, 4])
assert len(got) == 2, "give one loss for each seed"
assert got[0] != got[1], "both losses are equal: make a new module for each seed"
torch.manual_seed(4)
fresh_s = ClassificationModule(n, hidden)
some_rows, some_labels = (part[::50] for part in kept["train"])
expected = classification_loss(fresh_s(some_rows), some_labels).item()
same = abs(got[1] - expected) < 1e-3
assert same, "seed 4 gives another loss; is it classification_loss?"
assert min(got) > 1, "these should be far from log 2; look at the numbers again"
print("right; now compare with what you predicted")

# %% [markdown] tags=["answer"]
# All are above 0.69, when we ran it from 1.38 to 5.43: a fresh $S$ is sure of itself, and wrong. Each layer multiplies the mean
# square of its input by $2 n_\text{in} / n_\text{out}$, each ReLU halves it, and the widths cancel:
# the mean square of the logits is $10 N / 3$ times that of the rows. With fan-in (2 over the number
# of inputs) it would be 2 times. Training undoes this in its first steps.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A loss that survives large logits
#
# Kind: write a function, **
#
# For a logit of 200, $1 - p$ rounds to 0 and its logarithm is $-\infty$. Write
# `stable_loss(logits, labels)`, the mean of both terms over slices and classes, so that it is right
# for logits from -200 to 200. Do not call a loss of PyTorch.
#
# Hint: Show that $-\log \sigma(\hat{y}) = \log(1 + e^{-\hat{y}})$ and
# $-\log(1 - \sigma(\hat{y})) = \log(1 + e^{\hat{y}})$. `F.softplus` computes $\log(1 + e^{x})$
# without overflow.


# %% tags=["starter"]
def stable_loss(logits, labels):
    raise NotImplementedError("both terms, from the logits")


# %% tags=["solution"]
# @title Solution
def stable_loss(logits, labels):
    y = F.one_hot(labels, logits.shape[1]).float()
    return (y * F.softplus(-logits) + (1 - y) * F.softplus(logits)).mean()


print(stable_loss(torch.tensor([[200.0, -200.0, 0.0]]), torch.tensor([1])).item())


# %% tags=["wrong"]
def stable_loss(logits, labels):
    y, p = F.one_hot(labels, logits.shape[1]).float(), logits.sigmoid()
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


# %% tags=["wrong"]
def stable_loss(logits, labels):
    y = F.one_hot(labels, logits.shape[1]).float()
    return (y * F.softplus(-logits)).mean()


# %% tags=["wrong"]
def stable_loss(logits, labels):
    y = F.one_hot(labels, logits.shape[1]).float()
    return (y * F.softplus(-logits) + (1 - y) * F.softplus(logits)).sum(1).mean()


# %% tags=["check"]
# @title Check your answer
some = torch.tensor([[0.5, 1.0, -0.5], [2.0, -3.0, 0.0]])
expected = classification_loss(some, torch.tensor([2, 0]))
got = stable_loss(some, torch.tensor([2, 0]))
near = torch.allclose(torch.as_tensor(got), expected, atol=1e-5)
assert near, "moderate logits: not the mean of both terms over slices and classes"
some = torch.tensor([[200.0, -200.0, 0.0]])
got = torch.as_tensor(stable_loss(some, torch.tensor([1])))
assert got.isfinite(), "logits of 200 give a number that is not finite"
near = torch.allclose(got, classification_loss(some, torch.tensor([1])))
assert near, "logits of 200: finite, but not right"
print("right, also for logits of 200")

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · It runs, and it is wrong
#
# Kind: find the bug, **
#
# A colleague has written $S$ as in the starter below. It takes the trained matrices, complains of
# nothing, and gives other logits than the package. Remove the first line, find the bug, and repair
# it. Why could no shape have told you?
#
# Hint: Print the first ten numbers of `r` for our old friend, and compare them with its first two
# rows.


# %% tags=["starter"]
def repaired(rows, matrices, biases):
    raise NotImplementedError("remove this line, then find the bug")
    r = rows.transpose(1, 2).flatten(1)
    a1 = (r @ matrices[0].T + biases[0]).clamp(min=0)
    a2 = (a1 @ matrices[1].T + biases[1]).clamp(min=0)
    return a2 @ matrices[2].T + biases[2]


# %% tags=["solution"]
# @title Solution
def repaired(rows, matrices, biases):
    r = rows.flatten(1)  # row after row: score, four deltas, score, ...
    a1 = (r @ matrices[0].T + biases[0]).clamp(min=0)
    a2 = (a1 @ matrices[1].T + biases[1]).clamp(min=0)
    return a2 @ matrices[2].T + biases[2]


# %% tags=["wrong"]
def repaired(rows, matrices, biases):
    r = rows.transpose(1, 2).flatten(1)
    a1 = (r @ matrices[0].T + biases[0]).clamp(min=0)
    a2 = (a1 @ matrices[1].T + biases[1]).clamp(min=0)
    return a2 @ matrices[2].T + biases[2]


# %% tags=["wrong"]
def repaired(rows, matrices, biases):
    r = rows.flatten(1)
    a1 = (r @ matrices[0].T + biases[0]).clamp(min=0)
    a2 = (a1 @ matrices[1].T + biases[1]).clamp(min=0)
    return (a2 @ matrices[2].T + biases[2]).sigmoid()


# %% tags=["check"]
# @title Check your answer
got = repaired(rows, matrices, biases)
assert got.shape == (len(rows), 3), "give three logits for each slice"
inside = bool(((got >= 0) & (got <= 1)).all())
assert not inside, "these look like probabilities; S gives logits"
same = torch.allclose(got, model.s(rows).detach(), atol=1e-3)
assert same, "still other logits than the package: in which order do the numbers stand?"
print("the same logits as the package")

# %% [markdown] tags=["answer"]
# The transpose puts all scores first, then all dx, and so on. There are still $5N$ numbers, so all
# shapes fit, but each number meets a column of $W_1$ that was trained for another one.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · What a shift changes
#
# Kind: predict, then run, *
#
# Someone adds 3 to every logit of every test slice. Decide first what changes: the predicted class,
# the sigmoids, the softmax, the number of slices in which no sigmoid exceeds 0.5? Then write
# `shift_report(logits, amount)`, which returns these four, as `True` where something changes, in
# a dict with the keys `"class"`, `"sigmoids"`, `"softmax"` and `"none above"`.
#
# Hint: Compare numbers before and after with `torch.allclose(..., atol=1e-5)`.


# %% tags=["starter"]
def shift_report(logits, amount):
    raise NotImplementedError("a dict of four True or False")


# %% tags=["solution"]
# @title Solution
def shift_report(logits, amount):
    moved = logits + amount

    def none_above(z):
        return int((z.sigmoid() <= 0.5).all(1).sum())

    return {
        "class": not torch.equal(logits.argmax(1), moved.argmax(1)),
        "sigmoids": not torch.allclose(logits.sigmoid(), moved.sigmoid(), atol=1e-5),
        "softmax": not torch.allclose(logits.softmax(1), moved.softmax(1), atol=1e-5),
        "none above": none_above(logits) != none_above(moved),
    }


print(shift_report(results[len(splits["train"]), "sigmoids"][0], 3.0))


# %% tags=["wrong"]
def shift_report(logits, amount):
    return {"class": False, "sigmoids": True, "softmax": True, "none above": True}


# %% tags=["wrong"]
def shift_report(logits, amount):
    return {"class": False, "sigmoids": True, "softmax": False, "none above": True}


# %% tags=["check"]
# @title Check your answer
z = torch.tensor([[-1.0, -2.0, -3.0], [4.0, 1.0, 0.0]])
keys = {"class", "sigmoids", "softmax", "none above"}
got, still = shift_report(z, 3.0), shift_report(z, 0.0)
assert set(got) == keys, f"the keys should be {sorted(keys)}"
typed = any(still.values())
assert not typed, "a shift of 0 changes nothing: compute the answers, do not type them"
assert not got["class"], "the same number was added to all: does their order change?"
cancelled = not got["softmax"]
assert cancelled, "softmax: compare the shares of [-1, -2, -3] with those of [2, 1, 0]"
own = got["sigmoids"] and got["none above"]
assert own, "a sigmoid looks at one logit: does it not move?"
print("right; was it what you had decided?")

# %% [markdown] tags=["answer"]
# So the sigmoids carry one thing that a softmax cannot: how high the logits are as a whole. This is
# how $S$ can say "none of the three".

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · Does S need its hidden layers?
#
# Kind: experiment, ***
#
# Train a single linear layer from $5N$ to 3 in place of $S$ with every tenth training slice, by
# `test_logits(sigmoids, 10, Linear)`. Compare it with $S$ on the test rows, seed by seed. Then give
# both all slices (`every=1`). What would you need before you say that the hidden layers help?
#
# Hint: `make(n, hidden)` makes one module; of it, `train_all` reads the `nn.Linear` layers, in order.
# So let your class ignore the second number. The logits of $S$ are in `results`.


# %% tags=["starter"]
class Linear(nn.Module):
    """One matrix from 5N to 3."""

    def __init__(self, n, hidden):
        super().__init__()
        raise NotImplementedError("one nn.Linear")


# %% tags=["solution"]
# @title Solution
class Linear(nn.Module):
    """One matrix from 5N to 3."""

    def __init__(self, n, hidden):
        super().__init__()
        self.fc = nn.Linear(5 * n, 3)


for every, (count, loss) in ((10, list(results)[2]), (1, list(results)[0])):
    right = right_of(test_logits(sigmoids, every, Linear), "test")  # [seeds, M]
    gain = 100 * (right_of(results[count, loss], "test") - right).mean(1)  # [seeds]
    print(f"{count:5,} slices: linear {right.mean():.1%}; S minus linear:")
    print(" ".join(f"{value:+.1f}" for value in gain), "points")

# %% [markdown] tags=["answer"]
# Look at the signs of the differences, with few and with many slices. Before you say that the
# hidden layers help, you need intervals over seeds and patients, as in the chapter; and rate and
# epochs were chosen for $S$, so that the linear layer has had less tuning.

# %% [markdown]
# ## What we learned
#
# 1. $S$ is three matrices and two ReLUs on $5N$ numbers; the place of a number tells its rank.
# 2. Three sigmoids answer three yes-or-no questions, so the loss needs both of its terms; a softmax
#    needs one.
# 3. In accuracy, sigmoids and softmax differ by no more than seeds and patients can explain here; they
#    differ in what the three numbers mean.
# 4. The classifier is a copy of the segmenter without its masks, always in eval mode, and $S$.
# 5. For $N = 256$, $S$ has 2,364,419 parameters; the published counts mix parameters, entries and
#    branches that are not run.
#
# ## Further reading
#
# The model and its Figure 3 are in {cite:t}`TerSarkisov2020`. Mask R-CNN, which it starts from, is
# {cite:t}`He2017`. {cite:t}`Gunraj2020` train one network on whole slices instead.
