# %% [markdown]
# # Three training regimes
#
# [Open in Colab](https://colab.research.google.com/github/repository_not_set/covidmask/blob/main/book/06_three_regimes.ipynb) · [Download this notebook](https://github.com/repository_not_set/covidmask/raw/main/book/06_three_regimes.ipynb)
#
# A trained detector, its ranked boxes and the module $S$ make the classifier. What happens when
# only $S$ learns, when batch normalisation learns too, and when everything does? The paper trains
# all three and gets three different models.
#
# **After it you can**
#
# - write one step of Algorithm 1 with raw tensors, Adam included;
# - say for each part of the network whether a regime changes it, and show it on the state dict;
# - explain what batch normalisation does when its statistics are frozen, and why they should be;
# - train $S$ alone at the price of one pass of the detector;
# - read a comparison of regimes with its intervals, and measure what a detector forgets.
#
# **You need** the ranked boxes of [chapter 4](04_ranked_boxes.ipynb) and the module $S$ of [chapter
# 5](05_covid_ct_mask_net.ipynb); the chapter runs alone. **Run time:** about 2 minutes on two CPU
# cores in the preset `quick` (the first chapter that you run draws the phantoms once, which takes
# about a minute more); 79 seconds on a GPU (H200) that other chapters used, too.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a picture made by formulas and random numbers. No
# number below is a result on patients, but for the table that cites the paper, and nothing here
# is for diagnosis.
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
import copy
import platform
from dataclasses import replace

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch
from torch import nn
from torch.utils.data import Subset

import covidmask
from covidmask import plotting
from covidmask.config import PRESETS
from covidmask.datasets import (
    LesionSlices,
    SliceImages,
    mask_to_targets,
    old_friend,
    write_phantoms,
)
from covidmask.interactive import frame_slider
from covidmask.metrics import wilson
from covidmask.models import (
    REGIMES,
    count_batch_norm,
    count_parameters,
    count_trainable,
    covid_ct_mask_net,
    lesion_mask_rcnn,
    propose,
    save_model,
    set_regime,
    trained_segmenter,
    weights_file,
)
from covidmask.training import (
    cache_ranked_boxes,
    classification_loss,
    epoch_batches,
    evaluate_classifier,
    evaluate_segmenter,
    learning_rate,
    train_classifier,
)

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # on a GPU, too, all digits of float32 count
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"numpy {np.__version__}, Python {platform.python_version()}")

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# All regimes start from the same two things: the trained segmenter of
# [chapter 3](03_segmenter.ipynb), less its mask branch, and an $S$ with random weights. `fresh`
# puts them together anew, always with the same random $S$.

# %%
preset = PRESETS[PRESET]
training = preset.classifier_training
segmenter = trained_segmenter(PRESET, device, shipped=True)


def fresh():
    """The classifier before its first step (Algorithm 1, line 2)."""
    torch.manual_seed(SEED)
    return covid_ct_mask_net(segmenter, preset.classifier)


root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
slices = {split: SliceImages(root / "slices", split) for split in ("train", "val")}
lesions = LesionSlices(root / "lesions", "test", min_area=preset.min_area)

friend, friend_mask = old_friend(preset.phantoms.size)
friend = torch.from_numpy(friend).expand(3, -1, -1).to(device)  # [3, S, S]

# %% [markdown]
# ## Three ways to train one network
#
# The gradient of the classification loss starts at the three logits and runs back: through $S$,
# into the $N$ ranked boxes, through box predictor, box head and RoIAlign into the feature pyramid
# (FPN) and the backbone. A regime says where it may stop, and who may move.
#
# - **heads:** $S$ alone. The gradient ends at the ranked boxes.
# - **heads + BN:** $S$ and the scale $\gamma$ and shift $\beta$ of each batch-norm layer. The
#   gradient must run all the way back, because these layers sit in the backbone, but all other
#   weights on its way stay as they are.
# - **full:** every weight.
#
# Before you read on: which parts will *not* change even in "full"?

# %% mystnb={"image": {"alt": "A grid with one column for each part of the network, from the backbone to module S, and one row for each regime. Cells say learns, passes the gradient on, or no gradient. Only S learns in heads; S and the batch-norm affine parameters in heads plus BN; everything but RPN and batch-norm statistics in full."}, "figure": {"caption": "Who learns in which regime, and how far back the gradient runs. The RPN and the statistics of batch normalisation change in none of them; this chapter shows why."}}
parts = ("Backbone\nconv.", "BN\nγ, β", "BN\nstatistics", "FPN", "RPN", "Box head,\npredictor", "S")
plan = {
    "heads": "nnnnnnl",
    "heads + BN": "plnpnpl",
    "full": "llnlnll",
}
words = {"l": "learns", "p": "passes\ngradient on", "n": "no\ngradient"}
colours = {"l": plotting.ORANGE, "p": "#cfe8f7", "n": "#f0f0f0"}
fig, ax = plt.subplots(figsize=(10, 3.4), layout="constrained")
for row, codes in enumerate(plan.values()):
    for column, code in enumerate(codes):
        box = FancyBboxPatch(
            (column + 0.06, row + 0.08),
            0.88,
            0.84,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=colours[code],
            edgecolor="black",
            hatch="//" if code == "l" else "",
            lw=0.8,
        )
        _ = ax.add_patch(box)
        _ = ax.text(
            column + 0.5,
            row + 0.5,
            words[code],
            ha="center",
            va="center",
            fontsize=9,
            bbox={"facecolor": colours[code], "edgecolor": "none", "pad": 1.5},
        )
_ = ax.set(xlim=(0, 7), ylim=(3, 0), xlabel="Part of the network", ylabel="Regime")
_ = ax.set_xticks(np.arange(7) + 0.5, parts)
_ = ax.set_yticks(np.arange(3) + 0.5, list(plan))
_ = ax.tick_params(length=0)
plt.show()

# %% [markdown]
# ## One step of Algorithm 1 by hand
#
# We take the regime in the middle and one batch, and do everything that the package does in a
# step: rank the boxes, apply $S$, compare with the labels, differentiate, move. First the batch.
# The package draws the order of an epoch from the seed and the number of the epoch, so that a run
# can be repeated and resumed. `pick` is a data set of a few slices.


# %%
def pick(dataset, indices):
    """The slices with these numbers, as a data set of their own."""
    part = copy.copy(dataset)
    for name in ("names", "labels", "patients"):
        setattr(part, name, [getattr(dataset, name)[i] for i in indices])
    return part


batch = pick(slices["train"], range(0, len(slices["train"]), len(slices["train"]) // 100))
batch = pick(batch, epoch_batches(len(batch), training.batch_size, epoch=0, seed=SEED)[0])
order = epoch_batches(len(batch), training.batch_size, epoch=0, seed=SEED)[0]  # of the step below
images = [batch[i][0].to(device) for i in order]  # B x [3, S, S]
labels = torch.tensor([batch[i][1] for i in order], device=device)  # [B]

# %% [markdown]
# **Lines 4 to 6: ranked boxes.** The detector stays in eval mode, whatever the regime: no sampler
# runs, no detection loss is computed, and batch normalisation uses its running statistics. The
# rows carry a gradient, because the $\gamma$ and $\beta$ before them learn.

# %%
# NBVAL_CHECK_OUTPUT
model = fresh()
parameters = set_regime(model, "heads_bn")
rows = model.ranked_boxes(images)  # [B, N, 5]
print(tuple(rows.shape), "requires a gradient:", rows.requires_grad)

# %% [markdown]
# **Line 8: $S$.** Two hidden layers with ReLU and one linear layer.

# %%
# NBVAL_CHECK_OUTPUT
first, second, last = model.s.fc_scores, model.s.fc_scores_2, model.s.fc_scores_img
x = rows.flatten(1)  # [B, 5N]
x = (x @ first.weight.T + first.bias).clamp(min=0)  # [B, hidden]
x = (x @ second.weight.T + second.bias).clamp(min=0)  # [B, hidden]
logits = x @ last.weight.T + last.bias  # [B, 3]
assert torch.allclose(logits, model.s(rows), rtol=1e-4, atol=1e-4)
print(tuple(logits.shape), "logits: control, common pneumonia, COVID-19")

# %% [markdown]
# **Line 9: the loss.** With labels $y_{bk}$ as zeros and ones, and $p_{bk} = \sigma(z_{bk})$,
#
# $$L = -\frac{1}{3B} \sum_{b=1}^{B} \sum_{k=1}^{3}
# \left[ y_{bk} \log p_{bk} + (1 - y_{bk}) \log (1 - p_{bk}) \right].$$
#
# Algorithm 1 prints the first term alone. The released code has both, and so do we. The last
# exercise shows what the first term does alone.

# %%
y = nn.functional.one_hot(labels, 3).float()  # [B, 3]
p = logits.sigmoid()
loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
assert torch.allclose(loss, classification_loss(logits, labels), rtol=1e-4)

# %% [markdown]
# **Backward and Adam.** Adam {cite:p}`Kingma2015` keeps a running mean $m$ of the gradient and a
# running mean $v$ of its square. Weight decay $\lambda$ is added to the gradient, as in the paper:
#
# $$g_t = \nabla L + \lambda \theta, \quad m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
# v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2,$$
# $$\theta_t = \theta_{t-1} - \alpha \,
# \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}.$$
#
# On the first step the corrections make the fraction $g / (|g| + \epsilon)$: plus or minus one.
# **Every parameter moves by about $\alpha$, however small its gradient is.** We come back to it.

# %%
loss = classification_loss(logits, labels)
gradients = torch.autograd.grad(loss, parameters)
alpha = learning_rate(training, step=0, total=1)
beta1, beta2, epsilon = 0.9, 0.999, 1e-8
by_hand = []
for theta, gradient in zip(parameters, gradients, strict=True):
    g = gradient + training.weight_decay * theta.detach()
    m = (1 - beta1) * g  # the means start at zero
    v = (1 - beta2) * g**2
    m, v = m / (1 - beta1), v / (1 - beta2)  # corrections at t = 1
    by_hand.append(theta.detach() - alpha * m / (v.sqrt() + epsilon))

# %% [markdown]
# Now the package: one epoch on a data set that holds this batch alone is one step. The moved
# parameters must be ours. We ask for 99 % of them and not for all: where gradient and
# weight decay nearly cancel, the sign of their sum is rounding, and Adam turns even that into a step
# of size $\alpha$.

# %%
# NBVAL_CHECK_OUTPUT
package = fresh()
_ = train_classifier(
    package, batch, "heads_bn", replace(training, epochs=1), seed=SEED, progress=False
)
moved = list(package.s.parameters()) + [
    parameter
    for layer in package.detector.modules()
    if isinstance(layer, nn.BatchNorm2d)
    for parameter in (layer.weight, layer.bias)
]
apart = torch.cat([(a - b).abs().flatten() for a, b in zip(moved, by_hand, strict=True)])
assert (apart < 0.01 * alpha).float().mean() > 0.99
print(f"one step by hand and by the package: {len(moved)} tensors, the same")

# %% [markdown]
# ## What one step changes
#
# A regime is a promise about what stays. So we check the promise on the whole state dict: every
# tensor that a file of weights would hold, before and after one step. `part_of` sorts the names
# into parts.

# %%
PARTS = (
    "backbone convolutions",
    "BN gamma, beta",
    "BN statistics",
    "FPN",
    "RPN",
    "box head",
    "box predictor",
    "module S",
)


def part_of(name, tensor):
    """The part of the network that a tensor of the state dict belongs to."""
    if "running_" in name or "num_batches" in name:
        return "BN statistics"
    if "backbone.body" in name:  # ResNet's convolutions have no bias
        return "BN gamma, beta" if tensor.ndim == 1 else "backbone convolutions"
    for key, part in (
        ("fpn.", "FPN"),
        ("rpn.", "RPN"),
        ("box_head.", "box head"),
        ("box_predictor.", "box predictor"),
    ):
        if key in name:
            return part
    return "module S"


def one_step(regime, images, labels, rate):
    """The model after one step of a regime, and its state dict before it."""
    model = fresh()
    trained = set_regime(model, regime)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()  # leaves the detector in eval mode
    adam = torch.optim.Adam(trained, lr=rate, weight_decay=training.weight_decay)
    classification_loss(model(images), labels).backward()
    adam.step()
    return model, before


# %%
# NBVAL_CHECK_OUTPUT
few = slice(0, min(8, len(images)))
stepped, changed = {}, {}
for regime in REGIMES:
    stepped[regime] = one_step(regime, images[few], labels[few], training.lr)
    model, before = stepped[regime]
    count = dict.fromkeys(PARTS, 0)
    for name, tensor in model.state_dict().items():
        count[part_of(name, tensor)] += not torch.equal(tensor, before[name])
    changed[regime] = count

print(f"{'tensors changed':22} {'of':>4}" + "".join(f"{regime:>10}" for regime in REGIMES))
names = {name: part_of(name, tensor) for name, tensor in before.items()}
for part in PARTS:
    total = list(names.values()).count(part)
    print(f"{part:22} {total:4}" + "".join(f"{changed[regime][part]:10}" for regime in REGIMES))
    assert part == "module S" or changed["heads"][part] == 0
assert all(changed[regime]["RPN"] == changed[regime]["BN statistics"] == 0 for regime in REGIMES)

# %% [markdown]
# Two rows stay at zero in all regimes.
#
# **Statistics.** They are no parameters: a forward pass in training mode would update them, and
# the detector never is in training mode.
#
# **RPN.** Its weights are on the optimiser's list in "full", yet nothing reaches them. The RPN
# hands over proposals: the coordinates of boxes that were chosen by sorting and by non-maximum
# suppression. The choice has no derivative. The coordinates would have one, but torchvision
# detaches them, because Faster R-CNN trains the RPN with losses of its own {cite:p}`Ren2015`. Here
# these losses are off.

# %%
model, before = stepped["full"]
unreached = {names[n] for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
assert unreached == {"RPN"}
features, proposals, _ = propose(model.detector, images[:1])
assert all(feature.requires_grad for feature in features.values())
assert not proposals[0].requires_grad
print("on the optimiser's list but without a gradient:", ", ".join(unreached))

# %% [markdown]
# "No gradient" and "a gradient of zero" are not the same. Adam skips a parameter whose gradient is
# `None`. A gradient of zero it takes, adds the weight decay, and divides by its own size: the
# parameter moves by $\alpha$ towards zero.

# %%
# NBVAL_CHECK_OUTPUT
for gradient in (None, torch.zeros(1)):
    theta = torch.ones(1, requires_grad=True)
    theta.grad = gradient
    torch.optim.Adam([theta], lr=0.01, weight_decay=0.001).step()
    print(f"gradient {'none' if gradient is None else 'zero'}: 1 becomes {theta.item():.2f}")

# %% [markdown]
# The box predictor shows where this leads. It also predicts deltas for the background, which no
# loss reads, neither here nor in the segmenter's training. Their gradient is zero, not `None`, and
# the weight decay has had all the time that it needed:

# %%
weights = segmenter.roi_heads.box_predictor.bbox_pred.weight.detach()  # [4 C, features]
names_of_deltas = ("background", *(f"lesion class {k}" for k in range(1, len(weights) // 4)))
for name, part in zip(names_of_deltas, weights.split(4), strict=True):
    print(f"deltas of {name:15} median weight {part.abs().median():.4f}")

# %% [markdown]
# The same property of Adam decides which learning rate a regime can bear. A step of size $\alpha$
# is small for a $\gamma$ near one and large for a weight near zero. Here is the step of "full" in
# percent of the size that the parameters of a part typically have.

# %%
print(f"{'':22} median size   a step of {training.lr:g} is")
sizes = {}
for name, p in model.named_parameters():
    if p.grad is not None:
        part = names[name]
        if part == "BN gamma, beta":
            part = "BN gamma" if name.endswith("weight") else "BN beta"
        sizes.setdefault(part, []).append(before[name].abs().flatten())
for part, values in sizes.items():
    size = torch.cat(values).median().item()
    print(f"{part:22} {size:11.3f} {100 * training.lr / max(size, 1e-9):15.1f} %")

# %% [markdown]
# $S$ is random at the start, so it does not matter if a step shakes it. Convolutions and heads hold
# what the segmenter has learned, and many such steps change them beyond recognition. The paper
# uses one rate for all regimes, $10^{-5}$, with batches of 8 for 50 epochs
# {cite:p}`TerSarkisov2020`: many small steps. Our preset `quick` wants results in minutes, takes
# few large ones, and its rate is made for $S$. For "full" we take at most $3 \cdot 10^{-4}$ below,
# which is what the benchmark at the end chose on validation slices.

# %% [markdown]
# ## How many numbers learn
#
# The regimes differ in what they train by orders of magnitude. Count for the preset `quick` and for
# the paper's model: ResNet-50, $N = 256$, $S$ with two layers of 1024.

# %%
# NBVAL_CHECK_OUTPUT
print(f"{'':8}" + "".join(f"{regime:>12}" for regime in REGIMES) + f"{'of it S':>12}")
for name in ("quick", "paper"):
    sized = covid_ct_mask_net(lesion_mask_rcnn(PRESETS[name].detector), PRESETS[name].classifier)
    counts = []
    for regime in REGIMES:
        set_regime(sized, regime)
        counts.append(count_trainable(sized))
    print(f"{name:8}" + "".join(f"{n:12,}" for n in (*counts, count_parameters(sized.s))))
assert counts[:2] == [2_364_419, 2_417_539]

# %% [markdown]
# The released code trains a few numbers less in its version of heads + BN. It looks for `bn` in the
# name of a parameter. The batch-norm layers on the shortcuts of ResNet are called
# `downsample.1` and slip through. The rule in view, on the paper's model:

# %%
# NBVAL_CHECK_OUTPUT
by_name = sum(p.numel() for n, p in sized.named_parameters() if n.startswith("s.") or "bn" in n)
missed = sum(
    layer.weight.numel() + layer.bias.numel()
    for name, layer in sized.detector.named_modules()
    if isinstance(layer, nn.BatchNorm2d) and "bn" not in name
)
print(f"S and names with bn: {by_name:,}; missed on the shortcuts: {missed:,}")
print(f"all gamma and beta: {count_batch_norm(sized):,}")
assert by_name == 2_409_859 and by_name + missed == 2_417_539

# %% [markdown]
# "Heads" and "full" have no code in the release that we read (an older commit had an option for all
# three: [paper v code](paper_v_code.ipynb), items 20 and 21). For "heads" there is little to guess.
# For "full" the paper says that all layers of RPN and RoI were set to training mode, made
# trainable, and their losses and samplers switched off. It does not say what the batch-norm
# statistics did. We keep the detector in eval mode and let every weight learn. Then a slice's result does not
# depend on the other slices of its batch, and the three regimes differ in one thing only: who
# learns. Results of our "full" are therefore not a repetition of the paper's.

# %% [markdown]
# ## Batch normalisation with frozen statistics
#
# Batch normalisation {cite:p}`Ioffe2015` brings each channel $c$ to mean 0 and variance 1, then
# gives it a scale and a shift that are learned:
#
# $$y = \gamma_c \, \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + \beta_c.$$
#
# In training mode $\mu$ and $\sigma^2$ come from the batch at hand. In eval mode they are running
# means from the segmenter's training. Frozen, they are constants, and the layer is a line for each
# channel: $y = a_c x + b_c$ with $a_c = \gamma_c / \sqrt{\sigma_c^2 + \epsilon}$ and
# $b_c = \beta_c - a_c \mu_c$. We check it on the first layer, with our old friend.

# %%
# NBVAL_CHECK_OUTPUT
body = fresh().detector.backbone.body
with torch.no_grad():
    picture = segmenter.transform([friend])[0].tensors  # [1, 3, S, S]
    x = body.conv1(picture)  # [1, C, S/2, S/2]
    layer = body.bn1
    a = layer.weight / (layer.running_var + layer.eps).sqrt()  # [C]
    b = layer.bias - a * layer.running_mean  # [C]
    line = a[:, None, None] * x + b[:, None, None]
    assert torch.allclose(layer(x), line, rtol=1e-3, atol=1e-4)
print("first batch-norm layer:", tuple(x.shape), "the same as one line for each channel")

# %% [markdown]
# ### Why two numbers a channel can move a detector
#
# A line for each channel seems weak. But a ReLU follows, and $\beta$ decides which part of the map
# is above its threshold. Shift it, and a channel that marks the edges of lesions begins to mark
# vessels too, or falls silent. $\gamma$ decides how much the channel counts for the layers behind,
# and zero removes it. So heads + BN cannot learn new filters. It can choose among those that are
# there, in every layer.

# %% mystnb={"image": {"alt": "The same feature map of a synthetic slice three times. With a lower beta few pixels are bright, with a higher beta most of the body is."}, "figure": {"caption": "One channel of the first layer after batch normalisation and ReLU, on our old friend, with three values of its beta. The filter is the same; what passes is not. Synthetic."}}
with torch.no_grad():
    normalised = layer(x)[0]  # [C, S/2, S/2]
    open_share = (normalised > 0).flatten(1).float().mean(1)
    channel = int(normalised.relu().flatten(1).std(1).mul((open_share - 0.5).abs() < 0.4).argmax())
    shift = normalised[channel].std().item()
    maps = [(normalised[channel] + k * shift).relu().cpu() for k in (-1, 0, 1)]
fig, axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
for k, (ax, map_) in enumerate(zip(axes, maps, strict=True)):
    drawn = ax.imshow(map_, cmap="gray", vmin=0, vmax=float(maps[2].max()))
    _ = ax.set_title(f"β {k - 1:+d} std: {100 * (map_ > 0).float().mean():.0f} % open")
    _ = ax.set(xlabel="x (pixels of the map)", ylabel="y (pixels of the map)")
_ = fig.colorbar(drawn, ax=axes, label="Activation (no unit)", shrink=0.8)
plt.show()

# %% [markdown]
# ### What the statistics of a batch would do
#
# Why freeze $\mu$ and $\sigma^2$? Let batch normalisation use those of the batch, as in training
# mode, and put our old friend into batches with other slices. The function returns its scores, best
# first.


# %%
def friend_scores(companions, statistics):
    """Scores by rank of the old friend [N] in a batch; statistics "running" or of the "batch"."""
    probe = fresh()
    if statistics == "batch":
        for layer in probe.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
    with torch.no_grad():
        return probe.ranked_boxes([friend, *companions])[0, :, 0].cpu()


def company(size, draw):
    """`size` - 1 validation slices; `draw` 0, 1, 2 gives others each time."""
    others = len(slices["val"])
    chosen = [(draw * others // 3 + k * others // 50) % others for k in range(size - 1)]
    return [slices["val"][i][0].to(device) for i in chosen]


alone = friend_scores([], "running")
in_company = friend_scores(company(8, 0), "running")
print(f"running statistics: mean change in company {(alone - in_company).abs().mean():.6f}")
for draw in range(3):
    scores = friend_scores(company(8, draw), "batch")
    print(f"statistics of batch {draw}: mean change {(alone - scores).abs().mean():.3f}")
assert (alone - in_company).abs().mean() < 1e-3
assert (alone - scores).abs().mean() > 5e-3

# %% [markdown]
# With running statistics the neighbours change nothing beyond rounding. With the statistics of the
# batch, the same slice gets other scores from each company. For a diagnosis that would be absurd:
# the result of one patient must not depend on who is examined at the same time. Move the slider to
# see batches of other sizes.


# %%
def draw_company(size):
    """The old friend's scores by rank, in batches of `size`."""
    fig, ax = plt.subplots(figsize=(5.4, 4), layout="constrained")
    ranks = np.arange(1, len(alone) + 1)
    _ = ax.plot(ranks, alone, color="black", lw=2.5, label="running statistics, any batch")
    styles = ((plotting.BLUE, "--"), (plotting.VERMILLION, ":"), (plotting.GREEN, "-."))
    for draw, (colour, line) in enumerate(styles[: 1 if size == 1 else 3]):
        scores = friend_scores(company(size, draw), "batch")
        label = "statistics of itself" if size == 1 else f"statistics of batch {draw + 1}"
        _ = ax.plot(ranks, scores, color=colour, ls=line, label=label)
    _ = ax.set(xlabel="Rank of the box (1 is the best score)", ylabel="Score (no unit)")
    _ = ax.set(ylim=(0, 1.02), title=f"{size} slice{'s' if size > 1 else ''} in the batch")
    _ = ax.legend(fontsize="small")
    return fig


sizes = (1, 2, 4, 8, 16)
frame_slider(
    [draw_company(size) for size in sizes],
    [f"{size} slices" if size > 1 else "1 slice" for size in sizes],
    "Slices in the batch",
    "Scores of the old friend by rank: one black curve for running statistics, and up to three "
    "others, for the statistics of three batches, which differ from it and from each other",
    caption="The scores of one synthetic slice when batch normalisation uses the statistics of the "
    "batch. The black curve is the only one that belongs to the slice alone.",
    start=3,
    dpi=70,
)

# %% [markdown]
# The next cell draws the same for any size; it needs a running notebook.


# %% tags=["remove-output"]
def show_company(size):
    """Draw and show."""
    draw_company(size)
    plt.show()


_ = ipywidgets.interact(
    show_company,
    size=ipywidgets.IntSlider(value=8, min=1, max=32, continuous_update=False),
)

# %% [markdown]
# ## All three, live
#
# Now train the three regimes: the same start, the same slices in the same order, the same number of
# steps. Only the rate of "full" is smaller, as said above. To stay within minutes we take every tenth training slice and a quarter of the preset's
# epochs. A hook on the backbone counts how many images pass it.

# %%
live = pick(slices["train"], range(0, len(slices["train"]), 10))
held_out = pick(slices["val"], range(0, len(slices["val"]), 3))
short = replace(training, epochs=training.epochs // 4)
rate = {"heads": training.lr, "heads_bn": training.lr, "full": min(training.lr, 3e-4)}

models, history, passes = {}, {}, {}
for regime in REGIMES:
    models[regime], passes[regime] = fresh(), 0

    def count(module, inputs, output, regime=regime):
        """Called at each forward pass of the backbone."""
        passes[regime] += len(inputs[0])

    hook = models[regime].detector.backbone.register_forward_hook(count)
    history[regime] = train_classifier(
        models[regime], live, regime, replace(short, lr=rate[regime]), seed=SEED
    )
    hook.remove()

# %% mystnb={"image": {"alt": "Training loss against the step for heads, heads plus BN and full. All three fall."}, "figure": {"caption": "Loss of the three regimes on the same few training slices, smoothed over five steps. A low training loss is no merit here: so few slices can be learned by heart. Synthetic."}}
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
merged = [
    {"step": step, **{r: history[r][step]["bce"] for r in REGIMES}}
    for step in range(len(history["heads"]))
]
_ = plotting.loss_curves(merged, REGIMES, ax, smooth=5, ylabel="Binary cross-entropy (no unit)")
plt.show()

# %%
print(f"accuracy on {len(held_out)} validation slices (phantoms), 95 % by slices")
for regime in REGIMES:
    result = evaluate_classifier(models[regime], held_out, progress=False)
    low, high = wilson(int(result["confusion"].trace()), len(held_out))
    print(f"{regime:10} {result['accuracy']:.1%} ({low:.1%} to {high:.1%})")

# %% [markdown]
# The intervals are wide, so this run shows how to train, not which regime wins; the benchmark below
# uses all slices. But the figure has something to say. In "heads" the rows of a slice never change,
# and $S$ learns so few of them by heart. In the other two the rows move under $S$ from step to
# step, which slows it down, and makes learning by heart harder. In "full" the rate is smaller, too,
# so its curve has two possible reasons.
#
# ### Heads: run the detector once
#
# In "heads" the ranked boxes of a slice are constants: the detector gets no gradient, changes
# nothing, and gives the same rows in each epoch. So they can be computed once and kept. The package
# does it without being asked. The hook has counted:

# %%
# NBVAL_CHECK_OUTPUT
steps = len(history["full"])
assert passes["heads"] == len(live)
assert passes["heads_bn"] == passes["full"] == steps * training.batch_size
for regime in REGIMES:
    print(f"{regime:10} {passes[regime]:5} images through the backbone, {steps} steps")
whole = training.epochs * (len(slices["train"]) // training.batch_size) * training.batch_size
print(f"whole preset: {len(slices['train']):,} images for heads, {whole:,} for the others")
print(f"saved: {1 - len(slices['train']) / whole:.0%}")

# %% [markdown]
# With $E$ epochs the saving is $1 - 1/E$. That is why the other chapters use "heads": one can try
# ten modules $S$ on rows that were computed once. The other two regimes must run the detector at
# every step, and keep the activations of the backbone for the way back. (They differentiate only
# the $N$ RoIs that are ranked; see [chapter 4](04_ranked_boxes.ipynb).)
#
# ### What the regimes do to the old friend
#
# Our old friend was in no training set. Its ranked boxes before and after:

# %% mystnb={"image": {"alt": "Scores of the old friend by rank: before training and after heads they coincide; after heads plus BN and after full they differ."}, "figure": {"caption": "Scores by rank of our old friend before training and after each regime. Heads leaves them; the other two bend them to what the image label needs. Synthetic."}}
with torch.no_grad():
    start_rows = fresh().ranked_boxes([friend])[0].cpu()  # [N, 5]
    friend_rows = {r: models[r].ranked_boxes([friend])[0].cpu() for r in REGIMES}
assert torch.allclose(friend_rows["heads"], start_rows, atol=1e-5)
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
ranks = np.arange(1, len(start_rows) + 1)
_ = ax.plot(ranks, start_rows[:, 0], color="#bbbbbb", lw=6, label="before training")
for regime, colour, line in zip(
    REGIMES, (plotting.BLUE, plotting.VERMILLION, plotting.GREEN), ("-", "--", ":"), strict=True
):
    _ = ax.plot(ranks, friend_rows[regime][:, 0], color=colour, ls=line, lw=2, label=regime)
_ = ax.set(xlabel="Rank of the box (1 is the best score)", ylabel="Score (no unit)")
_ = ax.set(ylim=(0, 1.02))
_ = ax.legend()
plt.show()

# %% [markdown]
# ## What the detector forgets
#
# After heads + BN or full, the detector has been trained to please $S$, and nobody has shown it a
# lesion mask since. Does it still find lesions? A network that is trained on a new task tends to
# lose the old one; the name for it is catastrophic forgetting.
#
# To measure it we put the mask branch of the segmenter back beside the changed box branch, and judge
# on lesion slices of patients that no model has trained on.


# %%
def with_masks(model):
    """The classifier's detector with the mask branch that its copy had lost."""
    detector = copy.deepcopy(model.detector)
    for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
        setattr(detector.roi_heads, name, getattr(segmenter.roi_heads, name))
    return detector.eval()


some = Subset(lesions, range(0, len(lesions), len(lesions) // 40))
detectors = {"before": segmenter, **{regime: with_masks(models[regime]) for regime in REGIMES}}
found = {name: evaluate_segmenter(d, some, progress=False) for name, d in detectors.items()}
print(f"{len(some)} lesion slices (phantoms)   box AP50   mask AP50")
for name, values in found.items():
    print(f"{name:30} {values['box_ap50']:10.2f} {values['mask_ap50']:11.2f}")
assert abs(found["heads"]["box_ap50"] - found["before"]["box_ap50"]) < 0.01

# %% mystnb={"image": {"alt": "Four panels with the old friend: the true lesions, and the detections with a score above one half before training, after heads plus BN and after full."}, "figure": {"caption": "Our old friend: true lesions, and detections with a score above 0.5 before training and after two regimes. Synthetic."}}
truth = mask_to_targets(friend_mask, preset.detector.lesions, preset.min_area)
fig, axes = plt.subplots(2, 2, figsize=(8.4, 8.4), layout="constrained")
_ = plotting.show_lesions(friend.cpu(), truth, axes[0, 0])
_ = axes[0, 0].set_title("truth")
for ax, name in zip(axes.flat[1:], ("before", "heads_bn", "full"), strict=True):
    with torch.no_grad():
        prediction = {k: v.cpu() for k, v in detectors[name]([friend])[0].items()}
    _ = plotting.show_lesions(friend.cpu(), prediction, ax, score_threshold=0.5)
    _ = ax.set_title(f"{name}: {int((prediction['scores'] > 0.5).sum())} detections")
plt.show()

# %% [markdown]
# These are the first steps of a training. The last column of the benchmark below shows what is left
# after all of it. This matters for what one may say about the model. A classifier whose boxes still lie on
# lesions can point at what it counted. After the other two regimes a "box" is whatever helped the image
# label, and a picture of it explains less than it seems to.

# %% [markdown]
# ## The whole benchmark
#
# `benchmarks/regimes.py` does what the live cell did, with all training slices of the preset
# `quick`, and judges on test patients. All runs start from the shipped segmenter and from the same
# random $S$ of a seed. The regimes train for fewer epochs than the preset gives $S$, and with few
# seeds, so that all of it takes half an hour on two cores. Three questions:
#
# - The three regimes, each with one learning rate for the whole network, as in the paper.
# - Two regimes again, with a tenth of the rate of $S$ for the detector, and with less weight decay
#   there. The preset's values were tuned for $S$ on fixed rows; why should they suit $\gamma$? We
#   asked this *after* the first question was answered, test slices and all. The tenth and the
#   paper's weight decay were fixed beforehand and not tuned, but these two rows are an afterthought,
#   and they change rate and decay at once; in "full" the rate of $S$ is larger, too.
# - "Heads" once more with the preset's own number of epochs, which costs no further run of the
#   detector.
#
# <!-- regimes -->
# | regime (phantoms) | epochs; rate | COVID-19 | common pneumonia | control | accuracy (95 %) | each seed | minus heads (95 %) | minus heads of all epochs (95 %) | box AP50 after |
# |---|---|---|---|---|---|---|---|---|---|
# | heads | 8; 0.001 | 0.825 (0.733) | 0.620 (0.752) | 0.910 (0.867) | 0.785 (0.738 to 0.827) | 0.785 | +0.000 (+0.000 to +0.000) | -0.037 (-0.063 to -0.010) | 0.885 |
# | heads + BN | 8; 0.001 | 0.820 (0.785) | 0.575 (0.752) | 0.935 (0.786) | 0.777 (0.728 to 0.822) | 0.777 | -0.008 (-0.052 to +0.038) | -0.045 (-0.088 to -0.005) | 0.204 |
# | full | 8; 0.0001 | 0.890 (0.937) | 0.790 (0.786) | 0.880 (0.842) | 0.853 (0.818 to 0.887) | 0.853 | +0.068 (+0.025 to +0.112) | +0.032 (-0.007 to +0.065) | 0.224 |
# | heads + BN | 8; 0.001 / 0.0001 | 0.760 (0.840) | 0.740 (0.751) | 0.965 (0.869) | 0.822 (0.777 to 0.865) | 0.822 | +0.037 (+0.000 to +0.077) | +0.000 (-0.028 to +0.032) | 0.862 |
# | full | 8; 0.001 / 0.0001 | 0.900 (0.896) | 0.745 (0.851) | 0.935 (0.835) | 0.860 (0.823 to 0.893) | 0.860 | +0.075 (+0.038 to +0.117) | +0.038 (+0.003 to +0.072) | 0.353 |
# | heads | 20; 0.001 | 0.800 (0.833) | 0.750 (0.750) | 0.915 (0.880) | 0.822 (0.787 to 0.857) | 0.822 | +0.037 (+0.010 to +0.063) | +0.000 (+0.000 to +0.000) | 0.885 |
#
# | pilot: validation accuracy | at 0.001 | at 0.0003 | at 0.0001 |
# |---|---|---|---|
# | heads | 0.643 | 0.553 | 0.490 |
# | heads + BN | 0.733 | 0.603 | 0.493 |
# | full | 0.337 | 0.630 | 0.690 |
#
# Means of 1 seed(s): 3,000 training, 300 validation and 600 test slices, these of 120 patients, 320 lesion slices for the box AP50. The pilot: one seed, every 4th training slice, 2 epochs at most.
#
# Command: `python benchmarks/regimes.py`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-26; commit 2ba6285; all numbers in `results/regimes.json`.
# <!-- /regimes -->
#
# Sensitivity (PPV), accuracy and AP, 0 to 1, on synthetic phantoms of the preset quick. The
# intervals draw whole patients, and not other seeds: *each seed* shows what these do. *Minus heads*
# is the difference to the first row on the same slices: what the detector's training adds in as many
# epochs. *Minus heads of all epochs* is that to the last row, since more epochs of S cost nearly
# nothing. The box AP50 in the rows of heads is the shipped segmenter's, which stays as it is.
# The phantoms and the preset were tuned earlier while looking at results on these very test patients.
#
# One rate: a short pilot (the second table) chose it for each regime, by the accuracy on the
# validation slices. Two rates: the first is
# that of S, the second that of the detector, whose weight decay is then 0.001, as in the paper,
# instead of 0.03. The validation slices also chose the epoch.
#
# ### How to read it
#
# - **With one rate, heads + BN does not beat heads.** The interval of the difference holds zero.
#   Full does better than heads, by more than its interval, with one rate and with two.
# - **For heads + BN the optimiser's settings matter more than the regime.** With a gentler rate and
#   less decay for the detector it comes out above heads, and the interval begins at zero. Which of
#   the two settings did it, this benchmark cannot say.
# - **Heads has not finished after the common number of epochs.** Its longer schedule, at hardly any
#   cost, lifts it to the level of heads + BN with two rates. Full stays ahead of both.
# - **A seed is one draw.** Two earlier runs with one seed, on code that rounds a little differently,
#   had other pilot winners for "full", and 0.828 and 0.860 for "full" with two rates. Rounding grows
#   over thousands of steps. Differences of three points between two rows of this table are within
#   what such a change can do, whatever the interval over patients says.
# - **The detector pays.** At one rate both regimes unlearn the lesions almost wholly. With the
#   gentler rate, heads + BN keeps nearly all of its box AP50, and full still loses most of it.

# %% [markdown]
# ## What a regime costs
#
# The released code pays for more than a regime needs: it differentiates all proposals whatever
# trains, and in "heads" it would run a detector that never changes in every epoch. The table
# compares a loop with these habits and ours, on the same machine, weights and slices of 512 x 512
# (phantoms). "Heads" gains most, because its detector runs once, and without the backward pass that
# it does not need; its two rows are extrapolated from a few steps. In the other two, the boxes are
# ranked without a gradient, and only the $N$ that are kept are differentiated: the same gradient
# for less work. [What makes it fast](fast.md) has the rest, and what each of the two savings of
# "heads" is worth alone.
#
# <!-- speed -->
# | regime and work | model | baseline | ours | ratio |
# |---|---|---|---|---|
# | heads, 3,000 slices x 50 epochs | ResNet-18 cut 1 | 2.0 days | 7.7 min | 379x |
# | heads, 3,000 slices x 50 epochs | ResNet-50 | 4.5 days | 35 min | 184x |
# | heads + BN, step of 8 | ResNet-18 cut 1 | 9.4 s | 1.9 s | 5.02x |
# | heads + BN, step of 8 | ResNet-50 | 21 s | 8.1 s | 2.53x |
# | full, step of 8 | ResNet-18 cut 1 | 11 s | 3.1 s | 3.52x |
# | full, step of 8 | ResNet-50 | 21 s | 12 s | 1.72x |
#
# Command: `python benchmarks/speed.py` (about 37 minutes); x86_64, 2 cores, no GPU used, AMD EPYC (avx512_bf16), 2 threads; torch 2.14.1+cu130; 2026-11-25; commit 80492a5; 51dc5d9 for the parts named in `measured_again`; all numbers in `results/benchmarks.json`.
# <!-- /speed -->

# %% mystnb={"image": {"alt": "Bars on a logarithmic axis: how many times faster than the released way of working each regime is, with ResNet-18 and with ResNet-50. Heads gains by far the most."}, "figure": {"caption": "How many times faster than a loop that works as the released code does, at 512 x 512. Numbers of the table above (those of heads are extrapolated); this cell only draws them.", "name": "fig-regime-speed"}}
# speed, from results/benchmarks.json
speed = {  # (regime, model): times faster than the baseline
    ("heads", "ResNet-18 cut 1"): 379,
    ("heads", "ResNet-50"): 184,
    ("heads + BN", "ResNet-18 cut 1"): 5.02,
    ("heads + BN", "ResNet-50"): 2.53,
    ("full", "ResNet-18 cut 1"): 3.52,
    ("full", "ResNet-50"): 1.72,
}
# end of speed
names = list(dict.fromkeys(regime for regime, _ in speed))
backbones = list(dict.fromkeys(model for _, model in speed))
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for i, model in enumerate(backbones):
    places = np.arange(len(names)) + 0.4 * (i - 0.5)
    ratios = [speed[regime, model] for regime in names]
    bars = ax.barh(
        places,
        ratios,
        0.38,
        label=model,
        color=(plotting.BLUE, plotting.ORANGE)[i],
        hatch=("", "//")[i],
        edgecolor="black",
        lw=0.6,
    )
    _ = ax.bar_label(bars, [f"{ratio:.3g}x" for ratio in ratios], padding=3)
_ = ax.set(xscale="log", xlabel="Times faster (ratio of times, no unit)", ylabel="Regime")
_ = ax.set_xlim(0.9, 3 * max(speed.values(), default=1))
_ = ax.set_yticks(range(len(names)), names)
_ = ax.invert_yaxis()
_ = ax.legend()
plt.show()

# %% [markdown]
# ## What the paper reports
#
# Its Table 2, on the real test split of COVIDx-CT {cite:p}`TerSarkisov2020,Gunraj2020`. Sensitivity
# (PPV) in percent, as printed:
#
# | regime (published) | COVID-19 | common pneumonia | control | accuracy |
# |---|---|---|---|---|
# | heads | 76.30 (81.13) | 71.13 (67.70) | 82.37 (83.38) | 77.20 |
# | heads + BN | 90.80 (94.75) | 91.62 (87.08) | 91.10 (94.33) | 91.66 |
# | full | 82.26 (87.01) | 91.70 (95.22) | 97.21 (95.33) | 92.22 |
#
# The paper prefers heads + BN: full is more accurate over all, but misses more COVID-19. Two notes
# of caution. The table is not quite consistent: an accuracy of 91.66 needs 92.10 for the controls
# of heads + BN, as the abstract has it, and not 91.10 (see [paper v code](paper_v_code.ipynb)). And
# the two tables do not rank against each other: other data, other scale, other learning rates,
# another "full". What they can share is the direction of an effect.
#
# Our benchmark does **not** show the paper's order. There, heads is far behind and the other two are
# close to each other. Here, heads + BN is level with heads or slightly above, and the best row is a
# "full". Reasons that we can name, without knowing which of them counts: the preset was tuned in
# "heads", which favours it; the phantoms come from one generator, so the frozen detector is at home
# on every slice; we take few large steps where the paper takes many small ones; few seeds and so few
# patients leave room for chance. Both tables agree on one point: the most
# accurate row over all is a "full".

# %% [markdown]
# ## For the next chapters
#
# Chapters 5 and 7 need a classifier trained in "heads" with the whole schedule. The package ships
# one for the preset `quick`. In another preset this cell trains it and writes it where they look.

# %%
if PRESET == "quick":
    print("preset quick: the other chapters load the weights of the package")
else:
    model = fresh()
    _ = train_classifier(
        model, slices["train"], "heads", training, validation=slices["val"], seed=SEED
    )
    file = weights_file("classifier", PRESET, "heads")
    _ = save_model(model, file, trained_by="book/06_three_regimes", regime="heads", seed=SEED)
    print(f"saved for the other chapters as {file.name}")

# %% [markdown]
# ## Exercises
#
# ```{exercise} Let the statistics move
# :label: 06-three-regimes-statistics
# Take the model that was trained in "heads". Let batch normalisation update its running statistics
# on ten batches of training slices, without any gradient. What happens to the validation accuracy,
# and why?
# ```

# %% [markdown]
# ````{solution-start} 06-three-regimes-statistics
# :class: dropdown
# ````

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution
model = copy.deepcopy(models["heads"])
frozen = evaluate_classifier(model, held_out, progress=False)
weights = [parameter.clone() for parameter in model.parameters()]
for layer in model.modules():
    if isinstance(layer, nn.BatchNorm2d):
        layer.train()
with torch.no_grad():
    for chosen in epoch_batches(len(live), 16, epoch=0, seed=SEED)[:10]:
        batch_images = [live[i][0].to(device) for i in chosen]
        _ = model.detector.backbone(model.detector.transform(batch_images)[0].tensors)
model.eval()
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
updated = evaluate_classifier(model, held_out, progress=False)
other = (frozen["predictions"] != updated["predictions"]).float().mean().item()
print(f"accuracy with frozen statistics  {frozen['accuracy']:.1%} (phantoms)")
print(f"accuracy with updated statistics {updated['accuracy']:.1%}")
print(f"slices with another prediction   {other:.1%}")

# %% [markdown]
# No weight has changed, only means and variances. They came from slices of COVID-19 patients with
# lesions; now they come from slices of all three classes. Each channel is shifted and scaled a
# little, the rows change, and $S$ was trained on the old ones. Look at the predictions and not at
# the accuracy alone: it can stay where it is while many slices change sides.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise} Only gamma, or only beta
# :label: 06-three-regimes-affine
# Keep the $S$ that was trained in "heads" fixed and let only $\gamma$, or only $\beta$, learn for
# six steps on one batch of validation slices, at the preset's rate and at a tenth of it. Which
# lowers the loss of this batch more, and which does it smoothly?
# ```

# %% [markdown]
# ````{solution-start} 06-three-regimes-affine
# :class: dropdown
# ````

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution
some_slices = pick(slices["val"], range(0, len(slices["val"]), len(slices["val"]) // 15))
few_images = [image.to(device) for image, _ in some_slices]
few_labels = torch.tensor(some_slices.labels, device=device)
for name, attribute in (("gamma", "weight"), ("beta", "bias")):
    for step_size in (training.lr, training.lr / 10):
        model = copy.deepcopy(models["heads"]).requires_grad_(False)
        norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        learned = [getattr(layer, attribute).requires_grad_(True) for layer in norms]
        adam = torch.optim.Adam(learned, lr=step_size)
        losses = []
        for _ in range(7):
            loss = classification_loss(model(few_images), few_labels)
            losses.append(f"{loss.item():.2f}")
            adam.zero_grad()
            loss.backward()
            adam.step()
        print(f"only {name:5} at {step_size:g}: {' '.join(losses)}")

# %% [markdown]
# Either can lower the loss of a batch, and in the preset `quick` $\beta$ at the larger rate gets
# lowest. No run is smooth. A step has the same size for both, but $\gamma$ stands near one and
# $\beta$ near zero, so $\beta$ is shaken more. A tenth of the rate does not smooth the curve: boxes
# that swap ranks make the rows jump, and no gradient announces that.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise} Ten times the rate
# :label: 06-three-regimes-rate
# Train "full" for some steps at ten times the rate that the chapter used for it. Watch how much
# the ranked boxes differ between slices.
# ```

# %% [markdown]
# ````{solution-start} 06-three-regimes-rate
# :class: dropdown
# ````


# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution
def spread(model):
    """How much the ranked boxes of 16 slices differ: mean standard deviation of a value."""
    with torch.no_grad():
        return model.ranked_boxes(images[:16]).std(dim=0).mean().item()  # of [16, N, 5]


print(f"before: spread of the rows over slices {spread(fresh()):.3f}")
for factor in (1, 10):
    model = fresh()
    adam = torch.optim.Adam(set_regime(model, "full"), lr=factor * rate["full"])
    for chosen in epoch_batches(len(live), 16, epoch=0, seed=SEED)[:10]:
        target = torch.tensor([live.labels[i] for i in chosen], device=device)
        loss = classification_loss(model([live[i][0].to(device) for i in chosen]), target)
        adam.zero_grad()
        loss.backward()
        adam.step()
    print(f"{factor:2} x, ten steps: spread {spread(model):.3f}")
third = torch.tensor(1 / 3)
print(
    f"loss of one who always says 1/3: {-(third * third.log() + 2 * third * (1 - third).log()):.3f}"
)

# %% [markdown]
# When the spread falls, all slices look alike to $S$, and the best that it can do is to give each
# class its share, one third. In a longer run, a loss that stays near that of "always 1/3" is the
# sign; after ten steps the loss of one batch says little.
#
# ````{solution-end}
# ````

# %% [markdown]
# ```{exercise} The loss as it is printed
# :label: 06-three-regimes-positive
# Train two modules $S$ on the cached rows of the live slices: one with binary cross-entropy, one
# with the positive term alone, $-\sum_k y_k \log \sigma(z_k)$, as Algorithm 1 prints it. Compare
# the probabilities.
# ```

# %% [markdown]
# ````{solution-start} 06-three-regimes-positive
# :class: dropdown
# ````

# %% cellView="form" jupyter={"source_hidden": true}
# @title Solution
cached = cache_ranked_boxes(models["heads"], live, progress=False).to(device)  # [M, N, 5]
target = torch.tensor(live.labels, device=device)
losses = {
    "both terms": classification_loss,
    "positive term": lambda z, k: nn.functional.softplus(-z[torch.arange(len(k)), k]).mean(),
}
for name, function in losses.items():
    s = fresh().s
    adam = torch.optim.Adam(s.parameters(), lr=training.lr)
    for _ in range(100):
        loss = function(s(cached), target)
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        probability = s(cached).sigmoid().cpu()
    above = (probability > 0.5).float().mean().item()
    right = (probability.argmax(1) == target.cpu()).float().mean().item()
    print(f"{name:14} loss {loss.item():.3f}, above 0.5: {above:.0%}, accuracy here {right:.0%}")

# %% [markdown]
# The positive term is content when *every* logit is large: nothing punishes a wrong class. Both
# modules are judged on their own training slices here, where BCE has one third of its outputs
# above one half, as it should.
#
# ````{solution-end}
# ````

# %% [markdown]
# ## What we learned
#
# 1. A regime is a list of parameters: $S$; $S$ with every $\gamma$ and $\beta$; or all. The state
#    dict shows whether the list was kept.
# 2. The RPN learns in none of them, because proposals are detached; the batch-norm statistics stay,
#    because the detector stays in eval mode.
# 3. With frozen statistics, batch normalisation is one line for each channel, and a slice's result
#    does not depend on its neighbours in the batch.
# 4. Adam's first step has the size of the learning rate whatever the gradient, so pretrained
#    convolutions bear a smaller rate than a random $S$.
# 5. In "heads" the ranked boxes are constants and the detector runs once for each slice. The other
#    regimes can gain accuracy, and can unlearn the lesions: measure both.
#
# ## Further reading
#
# {cite:t}`TerSarkisov2020` trains the three regimes; sections 3.2 and 4 are on two pages.
# {cite:t}`Ioffe2015` introduces batch normalisation and says what its statistics are at test time.
# {cite:t}`Kingma2015` is Adam; the size of its steps is the subject of their section 2.1.
# {cite:t}`Ren2015` trains the RPN and the detector that reads its proposals, and discusses why the
# proposals' coordinates get no gradient. {cite:t}`He2017` is the detector that we change here.
