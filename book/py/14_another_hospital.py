# %% [markdown]
# # 14 · Another hospital
#
# A model is trained on slices of one hospital and then sent to another, where the scanner is sharper,
# the dose lower and the window different. The patients have the same diseases. **Is the model still
# right as often, and does it still know how sure it should be?** We draw the same phantoms under two
# scanners, so that nothing but the scanner can be the cause of what we see.

# %% tags=["fold"] mystnb={"image": {"alt": "The same synthetic chest slice twice: from hospital 0, softer, and from hospital 1, sharper, noisier and with more contrast; beside them the histograms of the grey values in the lungs, which are shifted against each other."}, "figure": {"caption": "Our old friend in two hospitals: the same lesions, other pictures. Right: grey values of the lungs. Synthetic."}}
# @title Import, print versions, and draw the old friend in two hospitals
import copy
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.random import default_rng
from torch import nn
from torch.nn.functional import one_hot
from torchvision.models.resnet import BasicBlock

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import (
    FRIEND,
    SliceImages,
    make_patient,
    make_slice,
    render,
    write_phantoms,
)
from covidmask.datasets.patients import FRIEND_POSITION, draw_positions
from covidmask.datasets.scanner import draw_scanner
from covidmask.metrics import bootstrap, confusion
from covidmask.models import trained_classifier
from covidmask.training import classification_loss, train_s

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")

fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
colours = plotting.BLUE, plotting.VERMILLION
for hospital, colour, dashes in ((0, colours[0], "-"), (1, colours[1], "--")):
    friend, mask = make_slice(*FRIEND, 128, FRIEND_POSITION, hospital=hospital)
    _ = plotting.show_slice(friend, axes[hospital])
    _ = axes[hospital].set_title(f"hospital {hospital}", fontsize=10)
    style = {"color": colour, "ls": dashes, "lw": 2, "histtype": "step"}
    bins = np.linspace(0, 1, 26)
    _ = axes[2].hist(friend[mask >= 1], bins, label=f"hospital {hospital}", **style)
_ = axes[2].set(xlabel="Grey value (no unit)", ylabel="Pixels (count)")
_ = axes[2].legend(fontsize=9)
plt.show()

# %% [markdown]
# **After it you can**
#
# - compare a model in two hospitals on the same patients, with an interval for the difference;
# - draw a reliability curve, and compute Brier score and expected calibration error;
# - repair probabilities with one number, and say what that cannot repair;
# - tell a shift of the pictures from a shift of the mix of patients, and choose the remedy;
# - say how little a few slices of a new hospital may bring.
#
# **You need** [chapter 7](07_covid_ct_mask_net.ipynb) (module $S$) and [chapter
# 10](10_evaluation.ipynb) (intervals by patient). **Time:** reading 25 min, exercises 60 min, running
# 2 min on two CPU cores in the preset `quick`. (The first chapter that you run also draws the phantoms,
# which takes a few minutes once.)
#
# ```{admonition} Synthetic data
# :class: important
# Every slice is a *phantom*, drawn by formulas and random numbers ([how](phantoms_made.ipynb)), and both
# hospitals are a few lines of code. No number below is a result on patients, and nothing here is for
# diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
TEST = 40  # patients of each class to judge, two slices each
NEW = 20  # more patients of each class in the new hospital
LOOKS = 9000  # slices shown to the ordinary classifier
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# ## The same patients, two scanners
#
# `render` draws a slice as a scanner of hospital 0 or 1 shows it. All training phantoms of this book
# are of hospital 0, so we call it *home* and the other *away*. We draw every test slice under both. A
# second group of patients is there to learn from: they were examined away, and we judge nobody by
# them.

# %%
preset = PRESETS[PRESET]
size = preset.phantoms.size


def draw_group(first, count, slices, hospital):
    """Images [M, H, W], labels [M] and patients [M] of all classes."""
    images, labels, patients = [], [], []
    for label in range(3):
        for seed in range(first, first + count):
            patient = make_patient(seed, label)
            for position in draw_positions(patient, slices):
                shown = render(patient, position, size, hospital=hospital)
                images.append(shown[0])
                labels.append(label)
                patients.append(1000 * label + seed - first)
    return np.stack(images), torch.tensor(labels), np.array(patients)


# %%
home, labels, patients = draw_group(70_000, TEST, 2, hospital=0)
away, *_ = draw_group(70_000, TEST, 2, hospital=1)
new, new_labels, _ = draw_group(80_000, NEW, 1, hospital=1)


# %% tags=["nbval-check-output"]
people = len(set(patients))
print(f"{len(home)} test slices of {people} patients, in both hospitals")
print(f"{len(new)} slices of other patients, in the new hospital only")

# %% [markdown]
# ## Two models
#
# The first is the classifier that comes with the package: a detector and module $S$ on its ranked
# boxes. The second is an ordinary classifier, the small network of [chapter 13](13_which_box.ipynb),
# which learns from the slices themselves. Both were trained at home, and both give three logits, read
# through a sigmoid each.


# %% tags=["fold"]
# @title Train the small network of chapter 13 at home
def block(inputs, outputs, stride):
    """A residual block of torchvision; the shortcut adapts the size."""
    shortcut = None
    if inputs != outputs:
        convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


stem = nn.Conv2d(1, 24, 3, stride=2, padding=1, bias=False)
stem = nn.Sequential(stem, nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2))
torch.manual_seed(SEED)
blocks = block(24, 24, 1), block(24, 48, 2), block(48, 96, 2)
body = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
head = nn.Linear(96, 3)
net = nn.Sequential(body, head).to(device)  # [M, 1, H, W] -> [M, 3]

root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
train = SliceImages(root / "slices", "train")
chosen = range(0, len(train), 2)  # every second slice will do
codes = torch.stack([(train[i][0][:1] * 255).round().byte() for i in chosen])
truth = torch.tensor([train.labels[i] for i in chosen])
steps = LOOKS // 32
order = torch.cat([torch.randperm(len(codes)) for _ in range(9)])
optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
for some in order[: steps * 32].split(32):
    x = codes[some].to(device) / 255 - 0.5
    x = x.flip(3) if torch.rand(()) < 0.5 else x
    loss = classification_loss(net(x), truth[some].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    plan.step()
_ = net.eval()
print(f"trained on {len(codes)} slices of hospital 0")

# %% [markdown]
# Each model has a part that we shall never touch again, and a small part behind it that reads what the
# first part says: $S$ reads ranked boxes, a linear layer reads 96 means of feature maps. So we look at
# each slice once and keep these numbers.

# %%
model = trained_classifier(PRESET, device, shipped=True)
readers = {"S": model.s.cpu(), "ordinary": head.cpu()}
body = body.to(device)


@torch.no_grad()
def look(images):
    """What the two readers read: {"S": [M, N, 5], "ordinary": [M, 96]}."""
    rows, means = [], []
    for part in torch.from_numpy(images).to(device).split(16):
        batch = [one.expand(3, -1, -1) for one in part]
        rows.append(model.ranked_boxes(batch).cpu())
        means.append(body(part[:, None] - 0.5).cpu())
    return {"S": torch.cat(rows), "ordinary": torch.cat(means)}


# %%
seen = {"home": look(home), "away": look(away), "new": look(new)}
logits = {}  # (model, hospital) -> [M, 3]
with torch.no_grad():
    for name, reader in readers.items():
        for where, inputs in seen.items():
            logits[name, where] = reader(inputs[name])

# %% [markdown]
# ## Is it right as often?
#
# We count the slices that are right, and draw *patients* with replacement for the intervals, as in
# [chapter 10](10_evaluation.ipynb). As the patients are the same at home and away, we also take the
# difference slice by slice: an interval of the difference on the same patients is narrower than two
# intervals side by side suggest.

# %%
slices_of = [np.flatnonzero(patients == p) for p in np.unique(patients)]


def over_patients(statistic):
    """95 % of statistic(positions of slices) when patients are drawn."""

    def of_drawn(drawn):
        return statistic(np.concatenate([slices_of[p] for p in drawn]))

    return bootstrap(len(slices_of), of_drawn, repeats=500)


# %%
def right(name, where):
    return (logits[name, where].argmax(1) == labels).float().numpy()


def line(title, values):
    low, high = over_patients(lambda at: values[at].mean())
    print(f"{title:22} {values.mean():+.3f}  ({low:+.3f} to {high:+.3f})")


for name in readers:
    for where in ("home", "away"):
        line(f"{name}, {where}", right(name, where))
    line(f"{name}, away - home", right(name, "away") - right(name, "home"))

# %% [markdown]
# Accuracy hides which errors are made, so here are the shares of each class that the models find.

# %% tags=["fold"] mystnb={"image": {"alt": "Two panels, S and the ordinary classifier. Each shows the share found of control, common pneumonia and COVID-19, at home and away, with intervals."}, "figure": {"caption": "Sensitivity of each class at home (circles) and away (squares), with 95 % intervals over patients. Synthetic."}}
# @title Draw the sensitivities at home and away
LOOK = {
    "home": (plotting.BLUE, "o", "-"),
    "away": (plotting.VERMILLION, "s", "--"),
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for ax, name in zip(axes, readers, strict=True):
    for where, (colour, marker, dashes) in LOOK.items():
        shift = -0.1 if where == "home" else 0.1
        values = right(name, where)
        for k in range(3):
            of_class = (labels == k).numpy()

            def found(at, values=values, of_class=of_class):
                return values[at][of_class[at]].mean()

            low, high = over_patients(found)
            style = {"color": colour, "ls": dashes, "lw": 2}
            _ = ax.plot([k + shift] * 2, [low, high], **style)
            label = where if k == 0 else None
            middle = values[of_class].mean()
            _ = ax.plot(k + shift, middle, marker, color=colour, label=label)
    _ = ax.set_xticks(range(3), [c.replace(" ", "\n") for c in IMAGE_CLASSES])
    _ = ax.set_title(name, fontsize=10)
    _ = ax.set(ylim=(0, 1.03), xlabel="True class")
_ = axes[0].set_ylabel("Sensitivity (share found)")
_ = axes[0].legend(fontsize=9, loc="lower left")
plt.show()

# %% [markdown]
# What do the models see of the other scanner? For $S$, everything depends on what the detector makes of
# it; the ordinary classifier reads means of its maps. We measure how far the numbers move from home to
# away, in units of their spread at home: for each of the numbers that a reader reads, the mean
# difference on the same slices, divided by the standard deviation over slices.

# %%
for name in readers:
    at_home = seen["home"][name].flatten(1)
    at_away = seen["away"][name].flatten(1)
    change, spread = (at_away - at_home).mean(0).abs(), at_home.std(0)
    moved = (change / spread)[spread > 0]
    print(f"{name:9} moved by {moved.median():.2f} standard ", end="")
    print(f"deviations (median), {moved.max():.2f} (largest)")

# %% [markdown]
# In the run shown here the ordinary classifier loses accuracy away, as the interval of its difference lies
# below 0. For $S$ the interval holds 0, so this test set cannot say; and the numbers that $S$ reads move
# much less. One reading that fits: a box leaves out most of what a scanner changes. Brightness, noise and
# sharpness are no columns of it, as long as the detector finds the same lesions, while a mean over a
# feature map has no such filter. (But the two models also differ in what they were taught: the detector
# has seen lesion masks. And all phantoms of hospital 0 differ in kernel, dose and window from patient to
# patient. How far robustness goes, exercise 2 tries.)
#
# ## Is it as sure as it should be?
#
# A model is *calibrated* if, among all slices of which it says 0.8, eight out of ten are as it says. We
# take as **confidence** $q$ of an answer the largest of the three sigmoids, sort the answers into bins
# of confidence, and compare in each bin the mean confidence with the share that is right. Drawn as a
# curve, this is a *reliability curve*; where it lies above the diagonal the model is too modest, below
# it, too sure.

# %%
EDGES = np.linspace(0, 1, 6)  # five bins


def answers(logits):
    """Confidence of each answer and whether it is right, [M] each."""
    confidence, called = logits.sigmoid().max(1)
    return confidence.numpy(), (called == labels).float().numpy()


def reliability(confidence, right):
    """Per bin: mean confidence, share right, share of the answers."""
    which = np.digitize(confidence, EDGES[1:-1])
    bins = []
    for b in range(len(EDGES) - 1):
        at = which == b
        if at.any():
            means = confidence[at].mean(), right[at].mean()
            bins.append((*means, at.mean()))
    return np.array(bins)  # [bins that are not empty, 3]


# %% tags=["fold"] mystnb={"image": {"alt": "Two panels with reliability curves of S and of the ordinary classifier, at home and away, beside the diagonal."}, "figure": {"caption": "Reliability curves at home and away. On the dotted diagonal a model is as sure as it should be. The size of a point is the share of answers in its bin; bars are 95 % intervals over patients. Synthetic."}}
# @title Draw the reliability curves
def share_right(name, where, b):
    """95 % interval of the share right in the bin of edges b, b + 1."""
    confidence, ok = answers(logits[name, where])
    inside = np.digitize(confidence, EDGES[1:-1]) == b

    def of_bin(at):
        return ok[at][inside[at]].mean() if inside[at].any() else np.nan

    return over_patients(of_bin)


fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
for ax, name in zip(axes, readers, strict=True):
    _ = ax.plot([0, 1], [0, 1], color="black", ls=":")
    for where, (colour, marker, dashes) in LOOK.items():
        bins = reliability(*answers(logits[name, where]))
        _ = ax.plot(bins[:, 0], bins[:, 1], color=colour, ls=dashes, label=where)
        style = {"color": colour, "marker": marker}
        _ = ax.scatter(bins[:, 0], bins[:, 1], 20 + 250 * bins[:, 2], **style)
        for x, _y, _share in bins:
            low, high = share_right(name, where, min(int(x * 5), 4))
            _ = ax.plot([x, x], [low, high], color=colour, lw=1)
    _ = ax.set_title(name, fontsize=10)
    _ = ax.set(xlabel="Mean confidence in the bin", xlim=(0, 1), ylim=(0, 1.03))
_ = axes[0].set_ylabel("Share right in the bin")
_ = axes[0].legend(fontsize=9)
plt.show()

# %% [markdown]
# Two numbers sum this up.
#
# - The **expected calibration error** (ECE) is the mean gap between confidence and share right over the
#   bins, weighted with the share of answers in each bin {cite:p}`Guo2017`. A model that always says
#   one third and guesses has an ECE near 0: calibration is not accuracy.
# - The **Brier score** {cite:p}`Brier1950` is the mean square of probability less truth (1 or 0), here
#   over the three yes-or-no questions. It punishes both wrong answers and wrong confidence; 0 is
#   perfect.


# %%
def ece(logits, at=slice(None)):
    bins = reliability(*(values[at] for values in answers(logits)))
    return (np.abs(bins[:, 0] - bins[:, 1]) * bins[:, 2]).sum()


def brier(logits, labels=labels):
    """Squared error of each slice, mean over its three questions: [M]."""
    truth = one_hot(labels, 3).float()
    return (logits.sigmoid() - truth).square().mean(1).numpy()


for (name, where), values in logits.items():
    if where != "new":
        low, high = over_patients(lambda at, v=values: ece(v, at))
        print(f"{name:8} {where}: ECE {ece(values):.3f}", end="")
        print(f" ({low:.3f} to {high:.3f}), ", end="")
        errors = brier(values)
        low, high = over_patients(lambda at, e=errors: e[at].mean())
        print(f"Brier {errors.mean():.3f} ({low:.3f} to {high:.3f})")

# %% [markdown]
# Accuracy and calibration need not fall together: in the run shown here neither ECE changes by more than
# its interval is wide. Read ECE with care, though. With few answers in a bin the share right is noisy, and
# noise counts as a gap. So even a perfectly calibrated model has an ECE above 0, and redrawn patients tend
# to give values above the one measured. The Brier score has no bins and suffers less.
#
# ## What do a few slices bring back?
#
# Suppose that the new hospital gives us 5 or 20 slices of each class with labels, each of another
# patient. Two things we can do in seconds:
#
# - **Temperature.** Divide all logits by one number $\tau$, chosen so that the loss on these slices is
#   smallest: $\sigma(\hat y / \tau)$ {cite:p}`Guo2017`. A large $\tau$ makes a model modest. The order
#   of the three logits stays, and so does every answer.
# - **Retraining the reader.** Train $S$ alone, or the linear layer alone, on the new slices, starting
#   from what it has learned at home. The detector and the body of the network stay as they are.

# %%
TAUS = torch.logspace(-1, 1, 201)  # 0.1 to 10


def fit_temperature(logits, labels):
    """The temperature of the smallest loss on some slices."""
    losses = [classification_loss(logits / tau, labels) for tau in TAUS]
    return TAUS[torch.stack(losses).argmin()].item()


def retrain(reader, inputs, labels):
    """A copy of a reader, trained on a few slices of the new hospital."""
    reader, few = copy.deepcopy(reader), len(labels)
    plan = replace(preset.classifier_training, epochs=20, lr=2e-4)
    plan = replace(plan, batch_size=min(few, plan.batch_size))
    _ = train_s(reader, inputs, labels, plan, seed=SEED, progress=False)
    return reader.cpu().eval()


# %% [markdown]
# Which slices we happen to get matters when there are few, so we draw them five times and look at the
# range. All results are for the same test slices of the new hospital.


# %%
def draw_few(per_class, number):
    """Positions in `new` of some slices of each class."""
    rng = np.random.default_rng((per_class, number))
    classes = [np.flatnonzero(new_labels == k) for k in range(3)]
    parts = [rng.choice(p, per_class, replace=False) for p in classes]
    return np.concatenate(parts)


# %%
results = {}  # (model, slices, what) -> [(accuracy, Brier), ...]
for name, reader in readers.items():
    for per_class in (5, 20):
        for number in range(5 if per_class < NEW else 1):
            some = draw_few(per_class, number)
            known = logits[name, "new"][some], new_labels[some]
            softer = logits[name, "away"] / fit_temperature(*known)
            inputs = seen["new"][name][some], new_labels[some]
            again = retrain(reader, *inputs)(seen["away"][name]).detach()
            for what, z in (("temperature", softer), ("retrained", again)):
                both = answers(z)[1].mean(), brier(z).mean()
                results.setdefault((name, per_class, what), []).append(both)

# %% tags=["fold"] mystnb={"image": {"alt": "Two panels, S and the ordinary classifier: the Brier score away, as it is, with a temperature and with a retrained reader, from 5 and 20 slices of each class. A dotted line shows the score at home."}, "figure": {"caption": "Brier score in the new hospital (lower is better) after help from 5 and 20 slices of each class. Bars: range of five draws (20 are all there are). Dotted: at home. Synthetic."}}
# @title Draw and print what a few slices bring back
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
looks = (
    ("temperature", plotting.ORANGE, "s", -0.1),
    ("retrained", plotting.GREEN, "^", 0.1),
)
for ax, name in zip(axes, readers, strict=True):
    at_home, as_is = (brier(logits[name, where]).mean() for where in LOOK)
    _ = ax.axhline(at_home, color="black", ls=":", label="at home")
    _ = ax.axhline(as_is, color=plotting.VERMILLION, ls="--", label="away, as it is")
    for what, colour, marker, shift in looks:
        for x, per_class in enumerate((5, 20)):
            values = np.array(results[name, per_class, what])
            mean, low, high = values.mean(0), values.min(0), values.max(0)
            bars = [[mean[1] - low[1]], [high[1] - mean[1]]]
            label = what if x == 0 else None
            style = {"color": colour, "capsize": 4, "label": label}
            _ = ax.errorbar(x + shift, mean[1], bars, fmt=marker, **style)
            print(f"{name:8} {per_class:2} a class, {what:11} ", end="")
            print(f"accuracy {mean[0]:.3f} ({low[0]:.3f} to {high[0]:.3f}), ", end="")
            print(f"Brier {mean[1]:.3f} ({low[1]:.3f} to {high[1]:.3f})")
    _ = ax.set_xticks((0, 1), ("5", "20"))
    _ = ax.set(xlabel="New slices of each class", xlim=(-0.5, 1.5))
    _ = ax.set_title(name, fontsize=10)
_ = axes[0].set_ylabel("Brier score (no unit)")
_ = axes[1].legend(fontsize=9)
plt.show()

# %% [markdown]
# A temperature never changes the accuracy, as every answer stays. It can only help where a model is too
# sure or too modest *as a whole*, and here neither model was far from the diagonal. Retraining can change everything, also for
# the worse: the fewer the slices, the more the result depends on which ones they are. In the run shown
# here neither remedy moves the score far, and for $S$ there was hardly anything to bring back. So before
# you repair a model, check that it is broken, on slices that you do not use for the repair. (What the
# ordinary classifier lost, it lost in its body, which we left alone; exercise 5 goes there.)
#
# ## When the patients change and the pictures do not
#
# Up to now the pictures have changed, and the mix of patients has not: a *covariate shift*. In a
# screening clinic it may be the other way round. The scanner is that of home, but of 100 patients 80 are
# healthy: a *prevalence shift*. Our test slices are one third of each class. To see the clinic, we need
# no new slices; we only count those of class $k$ with the weight $\pi'_k / \pi_k$, where $\pi_k$ is the
# share of the class at home and $\pi'_k$ in the clinic.
#
# Sensitivities stay as they are, for each looks at one class. But the probabilities become wrong, since
# the model has learned with its training mix that one slice in three is COVID-19. Here the remedy needs
# no training. Bayes' rule says how the odds of a class change when its prevalence does
# {cite:p}`Saerens2002`, and odds are what a sigmoid's logit is the logarithm of:
#
# $$ \hat y_k' = \hat y_k + \log\frac{\pi'_k}{1 - \pi'_k} - \log\frac{\pi_k}{1 - \pi_k}. $$
#
# (For a yes-or-no question this is exact only if "other" keeps its own mix. With three classes it does
# not quite, but the correction takes most of the error away.)

# %%
clinic = torch.tensor([0.80, 0.15, 0.05])  # at home: one third each
old = torch.full((3,), 1 / 3)
weights = (clinic / old)[labels].numpy()  # [M], mean 1
corrected = clinic.logit() - old.logit()  # [3], added to the logits


def weighted(title, values, w):
    """Print a mean with weights, and its 95 % over patients."""

    def mean(at):
        return (values * w)[at].sum() / max(w[at].sum(), 1e-9)

    low, high = over_patients(mean)
    print(f"  {title:9} {mean(slice(None)):.3f} ({low:.3f} to {high:.3f})")


# %%
for name in readers:
    z = logits[name, "home"]
    for what, shifted in (("as it is", z), ("corrected", z + corrected)):
        ok = answers(shifted)[1]  # [M], 1 where the answer is right
        flagged = (shifted.argmax(1) == 2).numpy()  # called COVID-19
        print(f"{name} in the clinic, {what}:")
        weighted("accuracy", ok, weights)
        weighted("Brier", brier(shifted), weights)
        weighted("PPV COVID", ok, weights * flagged)

# %% [markdown]
# In the run shown here, fewer than half of the slices that are called COVID-19 in the clinic show it, as
# long as nothing is corrected. The correction lowers both Brier scores and lifts the PPV, though with so
# few slices of the ill the intervals are wide. It need not lift the accuracy: the odds of each class are now better,
# but the answer is the largest of three, and where almost everyone is healthy "Control" wins too often if
# the logits of control were too high to begin with.
#
# Who pays for the better PPV? The lines above have no sensitivities, but the formula says which way they can
# move. With this mix it raises the logit of control against both others and lowers that of COVID-19
# against both. So the
# sensitivity of control can only rise, and that of COVID-19 can only fall. Whether fewer false alarms are
# worth the cases that are missed, no formula decides.
#
# So which remedy for which shift? If you know that the mix has changed and by how much, correct the
# logits; no label of the new place is needed. If the pictures have changed, no rule of that kind
# exists: it takes labelled slices of the new place, or a model that does not mind the change. In
# practice both happen together, and often they cannot be told apart from unlabelled slices alone.
#
# ## What this does not show
#
# - **Two hospitals of one program.** Real ones differ also in patients, protocols, contrast medium and in
#   who labels. Models that did well at home have failed at the next hospital many times
#   {cite:p}`Roberts2021`.
# - **A kind shift.** Home has scanners of many kinds itself. A home with one scanner would make a less
#   robust detector.
# - **One training run** of each model; the intervals cover other patients, not other seeds.
# - **80 test slices of each class** leave intervals of several points. "No difference seen" is not "no
#   difference".

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Why do we draw the same patients under both scanners?**
#
# - [ ] Because a model must know a patient to be fair to both. :: No model has seen them; what they share is each other's comparison.
# - [x] Because then only the scanner can explain a difference. :: The interval of the difference is narrower, too.
# - [ ] Because phantoms of hospital 1 are hard to draw. :: They take the same time.
#
# **2. A model says 0.9 of ten slices and is right on six. What is it?**
#
# - [ ] Too modest, as it is right more often than not. :: It claims nine out of ten and has six.
# - [ ] Calibrated, as 0.9 is only a score. :: Calibration asks that scores can be read as shares; these cannot.
# - [x] Too sure, and the point lies below the diagonal. :: Confidence 0.9, share right 0.6.
#
# **3. What does a temperature change?**
#
# - [x] The confidence, and no answer. :: Dividing by one positive number keeps the order of the logits, and their signs.
# - [ ] The answers of slices near 0.5. :: A logit of 0 stays 0, and the largest logit stays the largest.
# - [ ] The accuracy, if it is fitted on enough slices. :: However it is fitted, every answer stays.
#
# **4. In a clinic COVID-19 becomes rarer; scanner and mix of all others stay. What suffers for sure?**
#
# - [ ] The sensitivity of COVID-19. :: It looks at COVID-19 slices alone, and these look as before.
# - [x] The PPV of COVID-19. :: False alarms come from more slices, and hits from fewer.
# - [ ] The detector's boxes. :: It sees the same kinds of slices, in another mix.
#
# **5. Why is even a perfectly calibrated model's ECE above 0 on 240 slices?**
#
# - [ ] Because sigmoids never reach 0 or 1. :: Calibration does not ask them to.
# - [ ] Because its accuracy is below 1. :: A model can err often and know it.
# - [x] Because shares of few answers in a bin are noisy, and gaps count. :: They count whichever way they point.
#
# **6. After retraining S on 15 slices of the new hospital the accuracy there has fallen. How can that be?**
#
# - [x] It fits these slices and forgets what many others taught it. :: With so few, the draw decides.
# - [ ] The detector has been changed, too. :: Only S was trained; its inputs stayed as they were.
# - [ ] New labels are wrong more often. :: Phantoms have no wrong labels.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · A cooler probability
#
# Kind: pencil, *
#
# A sigmoid says $p$. What does it say after its logit has been divided by $\tau$? Derive a formula of
# $p$ and $\tau$ on paper and write it as `cooled(p, tau)`. What do 0.9 and 0.5 become at $\tau = 2$?
#
# Hint: odds are $p / (1 - p) = e^{\hat y}$. What happens to them when $\hat y$ is divided by $\tau$?


# %% tags=["starter"]
def cooled(p, tau):
    """What a sigmoid of value p becomes at a temperature, 0 to 1."""
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def cooled(p, tau):
    """What a sigmoid of value p becomes at a temperature, 0 to 1."""
    odds = (p / (1 - p)) ** (1 / tau)
    return odds / (1 + odds)


print(f"at 2: 0.9 becomes {cooled(0.9, 2):.2f}, 0.5 stays {cooled(0.5, 2):.2f}")


# %% tags=["wrong"]
def cooled(p, tau):
    return p / tau


# %% tags=["wrong"]
def cooled(p, tau):
    return p ** (1 / tau)


# %% tags=["check"]
# @title Check your answer
assert abs(cooled(0.5, 3) - 0.5) < 1e-9, "a logit of 0 stays 0 at every temperature"
assert abs(cooled(0.9, 1) - 0.9) < 1e-9, "a temperature of 1 changes nothing"
_z = torch.tensor([-2.0, 0.3, 4.0])
for _tau in (0.5, 2.0):
    for _p, _want in zip(_z.sigmoid(), (_z / _tau).sigmoid(), strict=True):
        _off = abs(cooled(_p.item(), _tau) - _want.item())
        assert _off < 1e-4, "torch's sigmoid(logit / tau) disagrees"

# %% [markdown] tags=["answer"]
# The odds are raised to the power $1/\tau$. At $\tau = 2$, odds of 9 become 3, and so 0.9 becomes 0.75;
# 0.5 stays, because its odds are 1. So a temperature moves no answer across one half either.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Pictures as in papers
#
# Kind: predict, then run, **
#
# Published figures have been through windows, contrast curves and JPEG. `draw_scanner(rng, 1,
# published=True)` draws such an examination, and `render(..., scanner=...)` uses it. Write down first
# how many of 100 slices each model will have right. Then draw 20 patients of each class, one slice
# each, and count, with an interval.


# %% tags=["solution"]
# @title Solution
def published(seed, label):
    """A slice as a paper might print it."""
    patient = make_patient(seed, label)
    scanner = draw_scanner(default_rng((seed, label)), 1, published=True)
    return render(patient, draw_positions(patient, 1)[0], size, scanner)[0]


printed = [published(70_000 + i, k) for k in range(3) for i in range(20)]
printed = look(np.stack(printed))
of_printed = torch.arange(3).repeat_interleave(20)
with torch.no_grad():
    for name, reader in readers.items():
        ok = (reader(printed[name]).argmax(1) == of_printed).float().numpy()
        low, high = bootstrap(len(ok), lambda drawn, ok=ok: ok[drawn].mean())
        print(f"{name:9} {ok.mean():.0%} right ({low:.0%} to {high:.0%})")

# %% [markdown] tags=["answer"]
# Compare with the accuracies at home and away. The intervals are wide, as there are only 60 slices, so
# claim only a difference that is larger than they are.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A test that is too easy
#
# Kind: find the bug, **
#
# A colleague divides the slices of the new hospital into a part to fit on and a part to judge on. His
# results are always a little better than ours. Repair `divide(patients, share, seed)`, which gets the
# patient of each slice and returns two arrays of positions.
#
# Hint: which two slices may never be in different parts?


# %% tags=["starter"]
def divide(patients, share, seed):
    """Positions to fit on (about `share` of them) and to judge on."""
    order = np.random.default_rng(seed).permutation(len(patients))
    cut = round(share * len(patients))
    return order[:cut], order[cut:]


# %% tags=["solution"]
# @title Solution
def divide(patients, share, seed):
    """Positions to fit on (about `share` of them) and to judge on."""
    names = np.random.default_rng(seed).permutation(np.unique(patients))
    fit = np.isin(patients, names[: round(share * len(names))])
    return np.flatnonzero(fit), np.flatnonzero(~fit)


fit_on, judge_on = divide(patients, 0.25, SEED)
print(f"{len(fit_on)} slices to fit on, {len(judge_on)} to judge, no patient in both")


# %% tags=["wrong"]
def divide(patients, share, seed):
    cut = round(share * len(patients))
    return np.arange(cut), np.arange(cut - 1, len(patients))


# %% tags=["check"]
# @title Check your answer
_who = np.repeat(np.arange(30), 4)[np.random.default_rng(0).permutation(120)]
_fit, _judge = divide(_who, 0.3, 1)
_all = sorted([*_fit, *_judge]) == list(range(120))
assert _all, "each slice belongs to exactly one part"
_shared = set(_who[_fit].tolist()) & set(_who[_judge].tolist())
assert not _shared, "some patients have slices in both parts"
assert 0.2 < len(_fit) / 120 < 0.4, "about `share` of the slices are to fit on"
_again = divide(_who, 0.3, 2)[0]
assert set(_again.tolist()) != set(_fit.tolist()), "another seed, other patients"

# %% [markdown] tags=["answer"]
# He shuffled slices, so that most patients had slices in both parts. A temperature has one number to
# cheat with and gains little from that; a retrained $S$ would gain more.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Bins of equal size
#
# Kind: write a function, **
#
# Our bins are equally wide, so some hold few answers. Write `even_ece(confidence, right, bins)`: sort
# the answers by confidence, cut them into `bins` parts of (nearly) equal size, and return the mean over
# parts of the gap between mean confidence and share right.
#
# Hint: `np.argsort` and `np.array_split`.


# %% tags=["starter"]
def even_ece(confidence, right, bins):
    """Mean gap over bins that hold equally many answers."""
    raise NotImplementedError("sort, cut, compare")


# %% tags=["solution"]
# @title Solution
def even_ece(confidence, right, bins):
    """Mean gap over bins that hold equally many answers."""
    order = np.argsort(confidence)
    parts = np.array_split(order, bins)
    gaps = [abs(confidence[p].mean() - right[p].mean()) for p in parts]
    return float(np.mean(gaps))


for (name, where), values in logits.items():
    if where != "new":
        print(f"{name:9} {where}: {even_ece(*answers(values), 5):.3f}")


# %% tags=["wrong"]
def even_ece(confidence, right, bins):
    parts = np.array_split(np.arange(len(confidence)), bins)
    return float(np.mean([abs(confidence[p].mean() - right[p].mean()) for p in parts]))


# %% tags=["wrong"]
def even_ece(confidence, right, bins):
    parts = np.array_split(np.argsort(confidence), bins)
    return float(np.mean([confidence[p].mean() - right[p].mean() for p in parts]))


# %% tags=["check"]
# @title Check your answer
_c = np.array([0.9, 0.2, 0.8, 0.3])
_r = np.array([1.0, 1.0, 0.0, 0.0])
_gap = abs(_c.mean() - _r.mean())
assert abs(even_ece(_c, _r, 1) - _gap) < 1e-9, "one bin: one gap"
assert abs(even_ece(_c, _r, 2) - (0.25 + 0.35) / 2) < 1e-9, (
    "the two least sure answers share a bin, wherever they stand; gaps have no sign"
)

# %% [markdown] tags=["answer"]
# The numbers differ from those above, though the models are the same. An ECE is comparable only with
# one of the same bins.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Batch norm looks around
#
# Kind: experiment, **
#
# The ordinary classifier standardises its maps with means and variances that batch norm collected at
# home. Recompute them from the slices of the new hospital, which needs no label at all
# {cite:p}`Li2016`: set `momentum = None` (a plain average) in every `nn.BatchNorm2d` of a copy of
# `body`, call `reset_running_stats()`, put the copy into train mode, and let it see `new`. What does
# it do to the accuracy away? Take the interval of the difference.

# %% tags=["solution"]
# @title Solution
fresh = copy.deepcopy(body).train()
for layer in fresh.modules():
    if isinstance(layer, nn.BatchNorm2d):
        layer.momentum = None
        layer.reset_running_stats()
with torch.no_grad():
    for part in torch.from_numpy(new).to(device).split(20):
        _ = fresh(part[:, None] - 0.5)
    _ = fresh.eval()
    parts = torch.from_numpy(away).to(device).split(20)
    means = [fresh(part[:, None] - 0.5) for part in parts]
    adapted = head(torch.cat(means).cpu())
ok = (adapted.argmax(1) == labels).float().numpy()
line("adapted, away", ok)
line("adapted - as it is", ok - right("ordinary", "away"))

# %% [markdown] tags=["answer"]
# If the interval of the difference lies above 0, the statistics were part of the problem; if it holds
# 0, this test set cannot say. One more caution: the slices came sorted by class and in equal parts. With
# the mix of a screening clinic the statistics would follow the mix, too.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · What is the mix?
#
# Kind: write a function, ***
#
# In the clinic nobody tells us the mix. But we know from home how often a true class $i$ is called $j$,
# and can count how often each class is *called* in the clinic. Write `find_mix(rates, called)`: `rates`
# [3, 3] has the true classes in rows, each row with sum 1; `called` [3] are the shares of the answers.
# Return the shares of the true classes, [3].
#
# Hint: the share called $j$ is a sum over true classes. It is a linear system; mind which way the
# matrix stands.


# %% tags=["starter"]
def find_mix(rates, called):
    """Shares of the true classes that explain the shares called."""
    raise NotImplementedError("solve a linear system")


# %% tags=["solution"]
# @title Solution
def find_mix(rates, called):
    """Shares of the true classes that explain the shares called."""
    return np.linalg.solve(np.asarray(rates).T, np.asarray(called))


for name in readers:  # rates from half of the patients, a clinic made of the others
    half = patients % 1000 < TEST // 2
    called, true = logits[name, "home"].argmax(1).numpy(), labels.numpy()
    counts = confusion(true[half], called[half])
    rates = counts / counts.sum(1, keepdims=True)
    there = called[~half], weights[~half]
    seen_there = [np.average(there[0] == j, weights=there[1]) for j in range(3)]
    mix = ", ".join(f"{value:.2f}" for value in find_mix(rates, seen_there))
    print(f"{name:9} {mix}  (true: 0.80, 0.15, 0.05)")


# %% tags=["wrong"]
def find_mix(rates, called):
    return np.linalg.solve(np.asarray(rates), np.asarray(called))


# %% tags=["wrong"]
def find_mix(rates, called):
    return np.asarray(called) @ np.asarray(rates)


# %% tags=["check"]
# @title Check your answer
_rates = np.array([[0.8, 0.15, 0.05], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
for _mix in ([1 / 3, 1 / 3, 1 / 3], [0.8, 0.15, 0.05]):
    _called = [sum(_mix[i] * _rates[i, j] for i in range(3)) for j in range(3)]
    assert np.allclose(find_mix(_rates, _called), _mix), (
        "put your mix back: do slices of that mix, by these rates, give `called`?"
    )

# %% [markdown] tags=["answer"]
# The estimates come near the true mix, with errors of some points, and may even be negative where the
# rates are noisy {cite:p}`Lipton2018`. The method assumes that slices of a class look as they did at
# home: after a covariate shift it finds a change of mix that never happened.

# %% [markdown]
# ## What we learned
#
# 1. The same patients under two scanners show what the scanner does, and nothing else.
# 2. Accuracy and calibration are two questions; a reliability curve and a Brier score answer the second.
# 3. A temperature repairs confidence as a whole and never changes an answer.
# 4. Retraining on a few slices may help or harm; check first that something is broken.
# 5. For a known change of the mix, Bayes' rule corrects logits without any new label.
#
# ## Further reading
#
# {cite:t}`Guo2017` on calibration and temperature, {cite:t}`Brier1950` on his score, {cite:t}`Saerens2002`
# and {cite:t}`Lipton2018` on a changed mix, {cite:t}`Li2016` on batch norm in a new place. What goes
# wrong between real hospitals: {cite:t}`Roberts2021`, {cite:t}`DeGrave2021`.
