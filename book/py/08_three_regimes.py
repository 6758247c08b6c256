# %% [markdown]
# # 8 · Three training regimes
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
# **You need** the ranked boxes of [chapter 6](06_ranked_boxes.ipynb) and the module $S$ of [chapter
# 7](07_covid_ct_mask_net.ipynb); the chapter runs alone. **Run time:** a few minutes on two CPU
# cores in the preset `quick`. The first chapter that you run also draws the phantoms, once, which
# takes a few minutes more.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a chest drawn by formulas and random numbers
# ([how](phantoms_made.ipynb)). Except for the table that cites the paper, no number below is a
# result on patients, and nothing here is for diagnosis.
# ```

# %% tags=["fold"]
# @title Imports and versions
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
# on a GPU, too, all digits of float32 count
torch.backends.cudnn.allow_tf32 = False
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}")
print(f"numpy {np.__version__}, Python {platform.python_version()}")
print(device)

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# All regimes start from the same two things: the trained segmenter of
# [chapter 5](05_segmenter.ipynb) without its mask branch, and an $S$ with random weights. `fresh`
# puts a new copy together, always with the same random $S$.

# %%
preset = PRESETS[PRESET]
training = preset.classifier_training
segmenter = trained_segmenter(PRESET, device, shipped=True)


def fresh():
    """The classifier before its first step (Algorithm 1, line 2)."""
    torch.manual_seed(SEED)
    return covid_ct_mask_net(segmenter, preset.classifier)


root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
slices = {s: SliceImages(root / "slices", s) for s in ("train", "val")}
lesions = LesionSlices(root / "lesions", "test", min_area=preset.min_area)

friend, friend_mask = old_friend(preset.phantoms.size)
friend = torch.from_numpy(friend).expand(3, -1, -1).to(device)  # [3, H, W]

# %% [markdown]
# ## Three ways to train one network
#
# The gradient of the classification loss starts at the three logits and runs back: through $S$,
# into the $N$ ranked boxes, through box predictor, box head and RoIAlign into the feature pyramid
# (FPN) and the backbone. A regime says which weights learn, and so how far back the gradient has to
# run.
#
# - **heads:** $S$ alone. The gradient ends at the ranked boxes.
# - **heads + BN:** $S$ and the scale $\gamma$ and shift $\beta$ of each batch-norm layer. The
#   gradient must run all the way back, because these layers sit in the backbone, but all other
#   weights on its way stay as they are.
# - **full:** every weight.
#
# Before you read on: which parts will *not* change even in "full"?

# %% mystnb={"image": {"alt": "A grid with one column for each part of the network, from the backbone to module S, and one row for each regime. Cells say learns, passes the gradient on, or no gradient. Only S learns in heads; S and the batch-norm affine parameters in heads plus BN; everything but RPN and batch-norm statistics in full."}, "figure": {"caption": "What learns in which regime, and how far back the gradient runs. The RPN and the statistics of batch normalisation change in none of them; this chapter shows why."}}
parts = ["Backbone\nconv.", "BN\nγ, β", "BN\nstatistics", "FPN", "RPN"]
parts += ["Box head,\npredictor", "S"]
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
            bbox={
                "facecolor": colours[code],
                "edgecolor": "none",
                "pad": 1.5,
            },
        )
_ = ax.set(xlim=(0, 7), ylim=(3, 0))
_ = ax.set(xlabel="Part of the network", ylabel="Regime")
_ = ax.set_xticks(np.arange(7) + 0.5, parts)
_ = ax.set_yticks(np.arange(3) + 0.5, list(plan))
_ = ax.tick_params(length=0)
plt.show()

# %% [markdown]
# ## One step of Algorithm 1 by hand
#
# We take heads + BN and one batch, and do everything that the package does in a step: rank the
# boxes, apply $S$, compare with the labels, differentiate, and move the parameters. First we need
# the batch. The package derives the order of an epoch from the seed and the number of the epoch, so
# that a run can be repeated and resumed. `pick` makes a data set of a few slices.

# %%
def pick(dataset, indices):
    """The slices with these numbers, as a data set of their own."""
    part = copy.copy(dataset)
    for name in ("names", "labels", "patients"):
        setattr(part, name, [getattr(dataset, name)[i] for i in indices])
    return part


def first_batch(dataset):
    """Indices of the slices of the first step of an epoch."""
    return epoch_batches(len(dataset), training.batch_size, 0, SEED)[0]


total = len(slices["train"])
batch = pick(slices["train"], range(0, total, total // 100))
batch = pick(batch, first_batch(batch))
order = first_batch(batch)  # in which the step below takes them
images = [batch[i][0].to(device) for i in order]  # B x [3, H, W]
labels = torch.tensor([batch[i][1] for i in order], device=device)  # [B]

# %% [markdown]
# **Lines 4 to 6: ranked boxes.** The detector stays in eval mode, whatever the regime: no sampler
# runs, no detection loss is computed, and batch normalisation uses its running statistics. The
# rows carry a gradient, because the $\gamma$ and $\beta$ before them learn.

# %% tags=["nbval-check-output"]
model = fresh()
parameters = set_regime(model, "heads_bn")
rows = model.ranked_boxes(images)  # [B, N, 5]
print(tuple(rows.shape), "requires a gradient:", rows.requires_grad)

# %% [markdown]
# **Line 8: $S$.** Two hidden layers with ReLU and one linear layer.

# %% tags=["nbval-check-output"]
first, second = model.s.fc_scores, model.s.fc_scores_2
last = model.s.fc_scores_img
x = rows.flatten(1)  # [B, 5N]
x = (x @ first.weight.T + first.bias).clamp(min=0)  # [B, hidden]
x = (x @ second.weight.T + second.bias).clamp(min=0)  # [B, hidden]
logits = x @ last.weight.T + last.bias  # [B, 3]
assert torch.allclose(logits, model.s(rows), rtol=1e-4, atol=1e-4)
print(tuple(logits.shape), "logits: control, common pneumonia, COVID-19")

# %% [markdown]
# **Line 9: the loss.** With labels $y_{bk}$ as zeros and ones, logits $\hat{y}_{bk}$ and
# probabilities $p_{bk} = \sigma(\hat{y}_{bk})$,
#
# $$\mathcal{L} = -\frac{1}{3B} \sum_{b=1}^{B} \sum_{k=1}^{3}
# \left[ y_{bk} \log p_{bk} + (1 - y_{bk}) \log (1 - p_{bk}) \right].$$
#
# Algorithm 1 prints the first term alone. The released code has both, and so do we. In the last
# exercise you can see what the first term does alone.

# %%
y = nn.functional.one_hot(labels, 3).float()  # [B, 3]
p = logits.double().sigmoid()  # in float32 1 - p loses digits
loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
ours = classification_loss(logits, labels)
assert torch.allclose(loss.float(), ours, rtol=1e-4)

# %% [markdown]
# **Backward and Adam.** Adam {cite:p}`Kingma2015` keeps a running mean $u$ of the gradient and a
# running mean $v$ of its square. Their decay rates, $\rho_1$ and $\rho_2$ here, are usually called
# $\beta_1$ and $\beta_2$; we keep $\beta$ for batch normalisation. Weight decay $\lambda$ is added
# to the gradient:
#
# $$g_t = \nabla \mathcal{L} + \lambda \theta, \quad u_t = \rho_1 u_{t-1} + (1 - \rho_1) g_t, \quad
# v_t = \rho_2 v_{t-1} + (1 - \rho_2) g_t^2,$$
# $$\theta_t = \theta_{t-1} - \alpha \,
# \frac{u_t / (1 - \rho_1^t)}{\sqrt{v_t / (1 - \rho_2^t)} + \epsilon}.$$
#
# In the first step these corrections turn the fraction into $g / (|g| + \epsilon)$, which is plus
# or minus one unless $g$ is tiny. **Every parameter moves by about $\alpha$, however small its
# gradient is.** We will come back to this.

# %%
loss = classification_loss(logits, labels)
gradients = torch.autograd.grad(loss, parameters)
alpha = learning_rate(training, step=0, total=1)
rho1, rho2, epsilon = 0.9, 0.999, 1e-8
by_hand = []
for theta, gradient in zip(parameters, gradients, strict=True):
    g = gradient + training.weight_decay * theta.detach()
    u = (1 - rho1) * g  # the means start at zero
    v = (1 - rho2) * g**2
    u, v = u / (1 - rho1), v / (1 - rho2)  # corrections at t = 1
    by_hand.append(theta.detach() - alpha * u / (v.sqrt() + epsilon))

# %% [markdown]
# Now the package: one epoch on a data set that holds this batch alone is one step. It should move
# the parameters to where ours are. We ask this of 99 % of them and not of all: where gradient and
# weight decay nearly cancel, rounding decides the sign of their sum, and Adam turns even that into
# a step of size $\alpha$.

# %% tags=["nbval-check-output"]
package = fresh()
_ = train_classifier(
    package,
    batch,
    "heads_bn",
    replace(training, epochs=1),
    seed=SEED,
    progress=False,
)
moved = list(package.s.parameters()) + [
    parameter
    for layer in package.detector.modules()
    if isinstance(layer, nn.BatchNorm2d)
    for parameter in (layer.weight, layer.bias)
]
pairs = zip(moved, by_hand, strict=True)
apart = torch.cat([(a - b).abs().flatten() for a, b in pairs])
assert (apart < 0.01 * alpha).float().mean() > 0.99
print(f"a step by hand and by the package: {len(moved)} tensors, the same")

# %% [markdown]
# ## What one step changes
#
# A regime promises that certain parts stay as they are. Let us check this on the whole state dict,
# that is on every tensor that a file of weights would hold, before and after one step. `part_of`
# says which part of the network a tensor belongs to.

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
    """The part of the network to which an entry of a state dict belongs."""
    if "running_" in name or "num_batches" in name:
        return "BN statistics"
    if "backbone.body" in name:  # ResNet's convolutions have no bias
        of_norm = tensor.ndim == 1
        return "BN gamma, beta" if of_norm else "backbone convolutions"
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
    """The model after one step of a regime; its state dict before it."""
    model = fresh()
    trained = set_regime(model, regime)
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    model.train()  # leaves the detector in eval mode
    decay = training.weight_decay
    adam = torch.optim.Adam(trained, lr=rate, weight_decay=decay)
    classification_loss(model(images), labels).backward()
    adam.step()
    return model, before


# %% tags=["nbval-check-output"]
few = slice(0, min(8, len(images)))
stepped, changed = {}, {}
for regime in REGIMES:
    model, before = one_step(regime, images[few], labels[few], training.lr)
    count = dict.fromkeys(PARTS, 0)
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name])
        count[part_of(name, tensor)] += not same
    assert count["RPN"] == count["BN statistics"] == 0
    stepped[regime], changed[regime] = (model, before), count

print(f"{'tensors changed':22} {'of':>4}", *(f"{r:>9}" for r in REGIMES))
names = {name: part_of(name, tensor) for name, tensor in before.items()}
for part in PARTS:
    total = list(names.values()).count(part)
    counts = [f"{changed[regime][part]:9}" for regime in REGIMES]
    print(f"{part:22} {total:4}", *counts)
    assert part == "module S" or changed["heads"][part] == 0

# %% [markdown]
# Two rows stay at zero in all regimes.
#
# **Statistics.** They are not parameters. A forward pass in training mode would update them, but
# the detector is never in training mode.
#
# **RPN.** Its weights are on the optimiser's list in "full", yet no gradient reaches them. The RPN
# hands over proposals: the coordinates of boxes that were chosen by sorting and by non-maximum
# suppression. This choice has no derivative. The coordinates would have one, but torchvision
# detaches them, because Faster R-CNN trains the RPN with losses of its own {cite:p}`Ren2015`, which
# are switched off here.

# %%
model, before = stepped["full"]
learns = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
unreached = {names[n] for n, p in learns if p.grad is None}
assert unreached == {"RPN"}
features, proposals, _ = propose(model.detector, images[:1])
assert all(feature.requires_grad for feature in features.values())
assert not proposals[0].requires_grad
print("on the optimiser's list, without a gradient:", ", ".join(unreached))

# %% [markdown]
# "No gradient" and "a gradient of zero" are not the same. Adam skips a parameter whose gradient is
# `None`. To a gradient of zero it adds the weight decay and divides the sum by its own size: the
# parameter moves by $\alpha$ towards zero.

# %% tags=["nbval-check-output"]
for gradient in (None, torch.zeros(1)):
    theta = torch.ones(1, requires_grad=True)
    theta.grad = gradient
    torch.optim.Adam([theta], lr=0.01, weight_decay=0.001).step()
    kind = "none" if gradient is None else "zero"
    print(f"gradient {kind}: 1 becomes {theta.item():.2f}")

# %% [markdown]
# The box predictor shows where this leads. It also predicts deltas for the background, which no
# loss reads, neither here nor in the segmenter's training. Their gradient is zero and not `None`,
# so in the segmenter's training weight decay alone has moved their weights:

# %%
predictor = segmenter.roi_heads.box_predictor
weights = predictor.bbox_pred.weight.detach()  # [4 C, features]
for label, part in enumerate(weights.split(4)):
    name = f"lesion class {label}" if label else "background"
    print(f"deltas of {name:15} median weight {part.abs().median():.4f}")

# %% [markdown]
# The same property of Adam limits the learning rate of a regime. A step of size $\alpha$ is small
# for a $\gamma$ near one and large for a weight near zero. Here is the step of "full" as a
# percentage of the median size of the parameters in each part.

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
    percent = 100 * training.lr / max(size, 1e-9)
    print(f"{part:22} {size:11.3f} {percent:15.1f} %")

# %% [markdown]
# $S$ is random at the start, so a large step does it no harm. Convolutions and heads hold what the
# segmenter has learned, and many such steps can undo it. The paper uses one rate for all regimes,
# $10^{-5}$, for 50 epochs {cite:p}`TerSarkisov2020`; it names no batch size, and the released code
# takes 8 slices at a time. These are many small steps. Our preset `quick` has to give results
# within minutes, so it takes fewer and larger ones, and its rate was chosen for $S$. For "full" we
# use a smaller rate below. In the benchmark near the end, a pilot chooses the rate of each regime
# on validation slices.

# %% [markdown]
# ## How many numbers learn
#
# How many parameters does each regime train? We count for the preset `quick` and for the paper's
# model: ResNet-50, $N = 256$, $S$ with two layers of 1024.

# %% tags=["nbval-check-output"]
print(f"{'':8}", *(f"{title:>11}" for title in (*REGIMES, "of it S")))
for name in ("quick", "paper"):
    detector = lesion_mask_rcnn(PRESETS[name].detector)
    sized = covid_ct_mask_net(detector, PRESETS[name].classifier)
    counts = []
    for regime in REGIMES:
        set_regime(sized, regime)
        counts.append(count_trainable(sized))
    of_s = count_parameters(sized.s)
    print(f"{name:8}", *(f"{number:11,}" for number in (*counts, of_s)))
assert counts[:2] == [2_364_419, 2_417_539]

# %% [markdown]
# The released code trains slightly fewer in its version of heads + BN. It looks for `bn` in the
# name of a parameter, but the batch-norm layers on the shortcuts of ResNet are called
# `downsample.1`, and so it misses them. Here is what its rule finds in the paper's model:

# %% tags=["nbval-check-output"]
parameters = sized.named_parameters()
found = [p for n, p in parameters if n.startswith("s.") or "bn" in n]
by_name = sum(p.numel() for p in found)
missed = sum(
    layer.weight.numel() + layer.bias.numel()
    for name, layer in sized.detector.named_modules()
    if isinstance(layer, nn.BatchNorm2d) and "bn" not in name
)
print(f"S and names with bn: {by_name:,}; missed: {missed:,}")
print(f"all gamma and beta: {count_batch_norm(sized):,}")
assert by_name == 2_409_859 and by_name + missed == 2_417_539

# %% [markdown]
# The release that we read has no code for "heads" and "full" (an older commit had an option for all
# three: [paper v code](paper_v_code.ipynb), items 20 and 21). For "heads" there is little to guess.
# For "full" the paper says that all layers of RPN and RoI were set to training mode and made
# trainable, and that their losses and samplers were switched off. It does not say what happened to
# the batch-norm statistics. We keep the detector in eval mode and let every weight learn. Then the
# result of a slice does not depend on the other slices of its batch, and the three regimes differ
# only in what learns. So our "full" does not repeat the paper's.

# %% [markdown]
# ## Batch normalisation with frozen statistics
#
# Batch normalisation {cite:p}`Ioffe2015` brings each channel $c$ to mean 0 and variance 1, then
# gives it a scale and a shift that are learned:
#
# $$y = \gamma_c \, \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + \beta_c.$$
#
# In training mode $\mu$ and $\sigma^2$ come from the batch at hand. In eval mode they are running
# means from the segmenter's training. Frozen, they are constants, and the layer is a straight line
# for each channel: $y = a_c x + d_c$ with $a_c = \gamma_c / \sqrt{\sigma_c^2 + \epsilon}$ and
# $d_c = \beta_c - a_c \mu_c$. We check this on the first layer, with our old friend.

# %% tags=["nbval-check-output"]
body = fresh().detector.backbone.body
with torch.no_grad():
    picture = segmenter.transform([friend])[0].tensors  # [1, 3, H, W]
    x = body.conv1(picture)  # [1, channels, H/2, W/2]
    layer = body.bn1
    a = layer.weight / (layer.running_var + layer.eps).sqrt()  # [channels]
    d = layer.bias - a * layer.running_mean  # [channels]
    line = a[:, None, None] * x + d[:, None, None]
    assert torch.allclose(layer(x), line, rtol=1e-3, atol=1e-4)
print("first batch-norm layer:", tuple(x.shape))
print("the same as one line for each channel")

# %% [markdown]
# ### Why two numbers a channel can move a detector
#
# A straight line for each channel does not seem much. But a ReLU follows, and $\beta$ decides which
# part of the map lies above its threshold. When it shifts, a channel that marks the edges of
# lesions may begin to mark vessels, too, or mark nothing at all. $\gamma$ decides how much the
# channel counts for the layers behind it, and zero removes the channel. So heads + BN cannot learn
# new filters, but in every layer it can choose among those that are there.

# %% mystnb={"image": {"alt": "The same feature map of a synthetic slice three times. The higher beta is, the more of the map is above zero and bright."}, "figure": {"caption": "One channel of the first layer after batch normalisation and ReLU, on our old friend, with three values of its beta. The filter is the same; what passes is not. Synthetic."}}
with torch.no_grad():
    normalised = layer(x)[0]  # [channels, H/2, W/2]
    open_share = (normalised > 0).flatten(1).float().mean(1)
    varied = normalised.relu().flatten(1).std(1)
    channel = int((varied * ((open_share - 0.5).abs() < 0.4)).argmax())
    shift = normalised[channel].std().item()
    one = normalised[channel].cpu()
    maps = [(one + k * shift).relu() for k in (-1, 0, 1)]
fig, axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
for k, (ax, map_) in enumerate(zip(axes, maps, strict=True)):
    drawn = ax.imshow(map_, cmap="gray", vmin=0, vmax=float(maps[2].max()))
    open_now = (map_ > 0).float().mean()
    _ = ax.set_title(f"β {k - 1:+d} std: {open_now:.0%} open")
    _ = ax.set(xlabel="x (map pixels)", ylabel="y (map pixels)")
_ = fig.colorbar(drawn, ax=axes, label="Activation (no unit)", shrink=0.8)
plt.show()

# %% [markdown]
# ### What the statistics of a batch would do
#
# Why freeze $\mu$ and $\sigma^2$? Let us have batch normalisation use those of the batch, as in
# training mode, and put our old friend into batches with other slices. The function returns the
# friend's scores, best first.

# %%
def friend_scores(companions, statistics):
    """Scores of the old friend by rank [N], in a batch with others.

    Batch normalisation uses "running" statistics or those of the "batch".
    """
    probe = fresh()
    if statistics == "batch":
        for layer in probe.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
    with torch.no_grad():
        return probe.ranked_boxes([friend, *companions])[0, :, 0].cpu()


def company(size, draw):
    """`size` - 1 validation slices; others for each `draw` of 0, 1, 2."""
    total = len(slices["val"])
    start, step = draw * total // 3, total // 50
    chosen = [(start + k * step) % total for k in range(size - 1)]
    return [slices["val"][i][0].to(device) for i in chosen]


alone = friend_scores([], "running")
in_company = friend_scores(company(8, 0), "running")
change = (alone - in_company).abs().mean()
print(f"running statistics, in company: mean change {change:.6f}")
assert change < 1e-3
for draw in range(3):
    scores = friend_scores(company(8, draw), "batch")
    change = (alone - scores).abs().mean()
    print(f"statistics of batch {draw}: mean change {change:.3f}")
assert change > 1e-3

# %% [markdown]
# With running statistics, the other slices change nothing beyond rounding. With the statistics of
# the batch, the same slice gets different scores in each batch. A diagnosis cannot work like that:
# a patient's result must not depend on who is examined at the same time. Move the slider to see
# batches of other sizes.

# %%
def draw_company(size):
    """The old friend's scores by rank, in batches of `size`."""
    fig, ax = plt.subplots(figsize=(5.4, 4), layout="constrained")
    ranks = np.arange(1, len(alone) + 1)
    label = "running statistics, any batch"
    _ = ax.plot(ranks, alone, color="black", lw=2.5, label=label)
    colours = (plotting.BLUE, plotting.VERMILLION, plotting.GREEN)
    styles = list(zip(colours, ("--", ":", "-."), strict=True))
    for draw, (colour, line) in enumerate(styles[: 1 if size == 1 else 3]):
        scores = friend_scores(company(size, draw), "batch")
        whose = "itself" if size == 1 else f"batch {draw + 1}"
        label = f"statistics of {whose}"
        _ = ax.plot(ranks, scores, color=colour, ls=line, label=label)
    _ = ax.set(
        xlabel="Rank of the box (1 is the best score)",
        ylabel="Score (no unit)",
    )
    _ = ax.set(
        ylim=(0, 1.02),
        title=f"{size} slice{'s' if size > 1 else ''} in the batch",
    )
    _ = ax.legend(fontsize="small")
    return fig


sizes = (1, 2, 4, 8, 16)
frame_slider(
    [draw_company(size) for size in sizes],
    [f"{size} slices" if size > 1 else "1 slice" for size in sizes],
    "Slices in the batch",
    "Scores of the old friend by rank: one black curve for running "
    "statistics, and up to three others for the statistics of batches",
    caption="The scores of one synthetic slice when batch normalisation "
    "uses the statistics of the batch. Only the black curve does not "
    "depend on the other slices.",
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
# Now we train the three regimes: the same start, the same slices in the same order, the same number
# of steps. Only the rate of "full" is smaller, as said above. To stay within minutes we take every
# tenth training slice and a quarter of the preset's epochs. A hook on the backbone counts how many
# images pass through it.

# %%
live = pick(slices["train"], range(0, len(slices["train"]), 10))
held_out = pick(slices["val"], range(0, len(slices["val"]), 3))
short = replace(training, epochs=training.epochs // 4)
rate = dict.fromkeys(REGIMES, training.lr)
rate["full"] = min(training.lr, 3e-4)

models, history, passes = {}, {}, {}
for regime in REGIMES:
    models[regime], passes[regime] = fresh(), 0

    def count(module, inputs, output, regime=regime):
        """Called at each forward pass of the backbone."""
        passes[regime] += len(inputs[0])

    hook = models[regime].detector.backbone.register_forward_hook(count)
    history[regime] = train_classifier(
        models[regime],
        live,
        regime,
        replace(short, lr=rate[regime]),
        seed=SEED,
    )
    hook.remove()

# %% mystnb={"image": {"alt": "Training loss against the step for heads, heads plus BN and full."}, "figure": {"caption": "Loss of the three regimes on the same few training slices, smoothed over five steps. A low training loss is no merit here: so few slices can be learned by heart. Synthetic."}}
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
merged = [
    {"step": step, **{r: history[r][step]["bce"] for r in REGIMES}}
    for step in range(len(history["heads"]))
]
label = "Binary cross-entropy (no unit)"
_ = plotting.loss_curves(merged, REGIMES, ax, smooth=5, ylabel=label)
plt.show()

# %%
print(f"accuracy on {len(held_out)} validation slices (phantoms)")
print("intervals: 95 %, slices as independent")
for regime in REGIMES:
    result = evaluate_classifier(models[regime], held_out, progress=False)
    low, high = wilson(int(result["confusion"].trace()), len(held_out))
    print(f"{regime:10} {result['accuracy']:.1%} ({low:.1%} to {high:.1%})")

# %% [markdown]
# The intervals are wide, so this run shows how to train and not which regime wins; the benchmark
# below uses all slices. But look at the three curves again. In "heads" the rows of a slice never
# change, and so few of them can be learned by heart. In the other two regimes the rows change under
# $S$ from step to step, which can slow it down and make learning by heart harder. "Full" has a
# smaller rate, too, so there are two possible reasons for its curve.
#
# ### Heads: run the detector once
#
# In "heads" the ranked boxes of a slice are constants: the detector does not learn, so it gives the
# same rows in each epoch. They can be computed once and kept, and the package does so without being
# asked. Here is what the hook has counted:

# %% tags=["nbval-check-output"]
steps = len(history["full"])
assert passes["heads"] == len(live)
assert passes["heads_bn"] == passes["full"] == steps * training.batch_size
for regime in REGIMES:
    print(f"{regime:10} {passes[regime]:5} images, {steps} steps")
total, size = len(slices["train"]), training.batch_size
whole = training.epochs * (total // size) * size
print(f"whole preset: {total:,} images for heads, {whole:,} for the others")
print(f"saved: {1 - total / whole:.0%}")

# %% [markdown]
# With $E$ epochs the saving is about $1 - 1/E$. That is why the other chapters use "heads": one can
# try many modules $S$ on rows that were computed once. The other two regimes must run the detector
# at every step and keep the activations of the backbone for the backward pass. (They differentiate
# only the $N$ RoIs that are ranked; see [chapter 6](06_ranked_boxes.ipynb).)
#
# ### What the regimes do to the old friend
#
# Our old friend was in no training set. Here are the scores of its ranked boxes before and after
# training.

# %% mystnb={"image": {"alt": "Scores of the old friend by rank: before training and after heads they coincide; after heads plus BN and after full they differ."}, "figure": {"caption": "Scores by rank of our old friend before training and after each regime. Heads leaves them as they are; in the other two the loss of the image label has changed them. Synthetic."}}
with torch.no_grad():
    start_rows = fresh().ranked_boxes([friend])[0].cpu()  # [N, 5]
    friend_rows = {
        r: models[r].ranked_boxes([friend])[0].cpu() for r in REGIMES
    }  # fmt: skip
assert torch.allclose(friend_rows["heads"], start_rows, atol=1e-5)
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
ranks = np.arange(1, len(start_rows) + 1)
scores = start_rows[:, 0]
_ = ax.plot(ranks, scores, color="#bbbbbb", lw=6, label="before training")
for regime, colour, line in zip(
    REGIMES,
    (plotting.BLUE, plotting.VERMILLION, plotting.GREEN),
    ("-", "--", ":"),
    strict=True,
):
    scores = friend_rows[regime][:, 0]
    _ = ax.plot(ranks, scores, color=colour, ls=line, lw=2, label=regime)
_ = ax.set(xlabel="Rank of the box (1 is the best score)")
_ = ax.set(ylabel="Score (no unit)", ylim=(0, 1.02))
_ = ax.legend()
plt.show()

# %% [markdown]
# ## What the detector forgets
#
# In heads + BN and full, the detector is trained for the image label and sees no lesion masks any
# more. Does it still find lesions? A network that is trained on a new task tends to lose the old
# one, which is called catastrophic forgetting.
#
# To measure it, we put the mask branch of the segmenter back beside the changed box branch and
# evaluate on lesion slices of patients that no model has trained on.

# %%
def with_masks(model):
    """The classifier's detector, with the segmenter's mask branch again."""
    detector = copy.deepcopy(model.detector)
    heads = detector.roi_heads
    for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
        setattr(heads, name, getattr(segmenter.roi_heads, name))
    return detector.eval()


some = Subset(lesions, range(0, len(lesions), len(lesions) // 40))
detectors = {
    "before": segmenter,
    **{regime: with_masks(models[regime]) for regime in REGIMES},
}
print(f"{len(some)} lesion slices (phantoms)   box AP50   mask AP50")
found = {}
for name, detector in detectors.items():
    found[name] = evaluate_segmenter(detector, some, progress=False)
    box, mask = found[name]["box_ap50"], found[name]["mask_ap50"]
    print(f"{name:30} {box:10.2f} {mask:11.2f}")
assert abs(found["heads"]["box_ap50"] - found["before"]["box_ap50"]) < 0.01

# %% mystnb={"image": {"alt": "Four panels with the old friend, a drawn chest slice in the lung window: the true lesions, and the detections with a score above one half before training, after heads plus BN and after full."}, "figure": {"caption": "Our old friend: true lesions, and detections with a score above 0.5 before training and after two regimes. Synthetic."}}
lesion_kinds, picture = preset.detector.lesions, friend.cpu()
truth = mask_to_targets(friend_mask, lesion_kinds, preset.min_area)
fig, axes = plt.subplots(2, 2, figsize=(8.4, 8.4), layout="constrained")
_ = plotting.show_lesions(picture, truth, axes[0, 0])
_ = axes[0, 0].set_title("truth")
shown = "before", "heads_bn", "full"
for ax, name in zip(axes.flat[1:], shown, strict=True):
    with torch.no_grad():
        output = detectors[name]([friend])[0]
    output = {key: value.cpu() for key, value in output.items()}
    _ = plotting.show_lesions(picture, output, ax, score_threshold=0.5)
    number = int((output["scores"] > 0.5).sum())
    _ = ax.set_title(f"{name}: {number} detections")
plt.show()

# %% [markdown]
# These were only the first steps of a training; the last column of the benchmark below shows what
# is left after more of them. It matters for what you may say about the model. If the boxes still
# lie on lesions, a classifier can point at what it has used. If they do not, a box is whatever
# helped the image label, and a picture of it explains less than it seems to.

# %% [markdown]
# ## The whole benchmark
#
# `benchmarks/regimes.py` does what the live cell did, with every second training slice of the preset
# `quick`, and evaluates on test patients. All runs start from the shipped segmenter, and each seed
# gives every regime the same random $S$. There are three questions:
#
# - How do the three regimes compare with one learning rate for the whole network, as in the paper?
#   They have fewer epochs than the preset, to keep the benchmark short.
# - Does a gentler treatment of the detector help? Two regimes run again with a tenth of the rate of
#   $S$ for the detector, and with less weight decay there, because the preset's values were chosen
#   for $S$ on fixed rows. We had this idea after the first question had been answered, on phantoms
#   of an earlier kind. The tenth and the paper's weight decay were not tuned. Note that these two
#   rows change the rate and the decay at once, and that their rate of $S$ is that of heads.
# - What does "heads" reach with all epochs of the preset? They need no further run of the detector.
#
# <!-- regimes -->
# | regime (phantoms) | epochs; rate | COVID-19 | common pneumonia | control | accuracy (95 %) | each seed | minus heads (95 %) | minus heads of all epochs (95 %) | box AP50 after |
# |---|---|---|---|---|---|---|---|---|---|
# | heads | 3; 0.001 | 0.642 (0.690) | 0.512 (0.507) | 0.746 (0.704) | 0.633 (0.590 to 0.677) | 0.633 | +0.000 (+0.000 to +0.000) | -0.076 (-0.116 to -0.036) | 0.757 |
# | heads + BN | 3; 0.001 | 0.642 (0.827) | 0.647 (0.594) | 0.896 (0.789) | 0.728 (0.690 to 0.768) | 0.728 | +0.095 (+0.045 to +0.143) | +0.018 (-0.022 to +0.060) | 0.537 |
# | full | 3; 0.0001 | 0.781 (0.744) | 0.557 (0.709) | 0.950 (0.816) | 0.763 (0.720 to 0.806) | 0.763 | +0.129 (+0.078 to +0.179) | +0.053 (+0.003 to +0.100) | 0.073 |
# | heads + BN | 3; 0.001 / 0.0001 | 0.731 (0.659) | 0.547 (0.564) | 0.736 (0.800) | 0.672 (0.630 to 0.711) | 0.672 | +0.038 (-0.010 to +0.085) | -0.038 (-0.080 to +0.003) | 0.743 |
# | full | 3; 0.001 / 0.0001 | 0.816 (0.859) | 0.716 (0.720) | 0.886 (0.840) | 0.806 (0.766 to 0.841) | 0.806 | +0.172 (+0.123 to +0.221) | +0.096 (+0.050 to +0.139) | 0.293 |
# | heads | 20; 0.001 | 0.637 (0.753) | 0.682 (0.566) | 0.811 (0.853) | 0.710 (0.673 to 0.750) | 0.710 | +0.076 (+0.036 to +0.116) | +0.000 (+0.000 to +0.000) | 0.757 |
#
# | pilot: validation accuracy | at 0.001 | at 0.0003 | at 0.0001 |
# |---|---|---|---|
# | heads | 0.539 | 0.448 | 0.401 |
# | heads + BN | 0.569 | 0.488 | 0.377 |
# | full | 0.401 | 0.515 | 0.566 |
#
# Means of 1 seed(s): 3,150 training, 297 validation and 603 test slices, these of 201 patients, 321 lesion slices for the box AP50. The pilot: one seed, every 8th training slice, 2 epochs at most.
#
# Command: `python benchmarks/regimes.py --jobs 1 --seeds 0`; x86_64, 2 cores, no GPU used, 1 thread(s); torch 2.15.0+cu132; 2026-11-27; commit 4f3b286; all numbers in `results/regimes.json`.
# <!-- /regimes -->
#
# Sensitivity (PPV), accuracy and AP go from 0 to 1. All are means over the seeds (the line below the
# tables says how many), on all synthetic
# test slices of the preset `quick`. The intervals resample whole patients. A *minus* column is the
# difference to a row of heads on the same slices: to the first row, or to the last, which has all
# epochs. The box AP50 is measured on the lesion test slices with the mask branch put back; in the
# rows of heads it is the shipped segmenter's, which stays as it is. The settings of the preset were
# chosen while looking at results on phantoms.
#
# A short pilot (the second table) chose the rate for each regime, by the accuracy on the validation
# slices after a few epochs on every eighth training slice. Where two rates are given, the first is
# that of $S$ and the second that of the detector, which then has the weight decay of the preset
# `paper` instead of that of `quick`. In all runs the validation slices also chose the epoch.
#
# ### How to read it
#
# - **Start with the differences.** Does an interval contain zero? Then this benchmark does not show
#   that the regime differs from heads, in either direction.
# - **Compare each regime with its gentler run.** If they differ by more than two regimes do, the
#   settings of the optimiser matter more here than the regime. Which of the two settings did it,
#   this benchmark cannot say.
# - **Compare heads with itself.** If heads gains much from its longer schedule, then it had not
#   finished after the common number of epochs, and *minus heads* flatters the others. The column
#   *minus heads of all epochs* is stricter: these epochs are cheap for heads, and for the others
#   they are not.
# - **Look at each seed.** The intervals resample patients, but not trainings. Rounding errors and
#   random starts grow over thousands of steps, and one or two seeds hardly show how far apart two
#   trainings of the same kind can end. A difference between regimes that is no larger than that
#   between seeds may be chance, whatever its interval says.
# - **Look at the last column.** What a regime gains in accuracy, it may lose in lesions found.

# %% [markdown]
# ## What a regime costs
#
# The released code does more work than a regime needs: it differentiates all proposals whatever
# trains, and in "heads" it would run a detector that never changes in every epoch. The table
# compares a loop that works in this way with ours, on the same machine, weights and slices of 512 x
# 512 (phantoms). "Heads" gains most, because its detector runs only once, and without a backward
# pass; its two rows are extrapolated from a few steps. In the other two, the boxes are ranked
# without a gradient, and only the $N$ that are kept are differentiated: the same gradient for less
# work. [What makes it fast](fast.md) has the rest, and shows what each of the two savings of
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
_ = ax.set(
    xscale="log",
    xlabel="Times faster (ratio of times, no unit)",
    ylabel="Regime",
)
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
# of heads + BN, as in the abstract, and not 91.10 (see [paper v code](paper_v_code.ipynb)). And the
# numbers of the two tables cannot be compared: data, scale, learning rates and "full" all differ.
# At most you can compare the direction of an effect.
#
# In the paper heads is far behind, and the other two are close to each other. Is this so in our
# table, too? Where it is not, we can name possible reasons, but we do not know which of them
# matter. The preset was tuned in "heads", which favours it. All phantoms come from one program, so
# a frozen detector is at home on every slice. We take few large steps where the paper takes many
# small ones. And with few seeds and so few patients there is room for chance.

# %% [markdown]
# ## For the next chapters
#
# Chapters 7 and 10 need a classifier trained in "heads" with the whole schedule. The package ships
# one for the preset `quick`. In another preset this cell trains it and writes it where they look.

# %%
if PRESET == "quick":
    print("preset quick: other chapters load the weights of the package")
else:
    model = fresh()
    _ = train_classifier(
        model,
        slices["train"],
        "heads",
        training,
        validation=slices["val"],
        seed=SEED,
    )
    file = weights_file("classifier", PRESET, "heads")
    _ = save_model(
        model,
        file,
        trained_by="book/08_three_regimes",
        regime="heads",
        seed=SEED,
    )
    print(f"saved for the other chapters as {file.name}")

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Let the statistics move
#
# Kind: experiment, **
#
# Take the model that was trained in "heads". Let batch normalisation update its running statistics
# on ten batches of training slices, without any gradient. What happens to the validation accuracy,
# and why?

# %% tags=["solution"]
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
        resized = model.detector.transform(batch_images)[0]
        _ = model.detector.backbone(resized.tensors)
model.eval()
pairs = zip(model.parameters(), weights, strict=True)
assert all(torch.equal(now, before) for now, before in pairs)
updated = evaluate_classifier(model, held_out, progress=False)
other = frozen["predictions"] != updated["predictions"]
print("accuracy on phantoms")
print(f"with frozen statistics  {frozen['accuracy']:.1%}")
print(f"with updated statistics {updated['accuracy']:.1%}")
print(f"slices with another prediction: {other.float().mean():.1%}")

# %% [markdown] tags=["answer"]
# No weight has changed, only means and variances. They came from slices of COVID-19 patients; now
# they come from slices of all three classes. Each channel is shifted and scaled, so the rows
# change, and $S$ was trained on the old ones. Look at the predictions and not at the accuracy
# alone: it can stay the same, or even rise, while many slices get another class.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Only gamma, or only beta
#
# Kind: experiment, **
#
# Keep the $S$ that was trained in "heads" fixed and let only $\gamma$, or only $\beta$, learn for
# six steps on one batch of validation slices, at the preset's rate and at a tenth of it. Which
# lowers the loss of this batch more? Does it fall smoothly in any of the four runs?

# %% tags=["solution"]
# @title Solution
total = len(slices["val"])
some_slices = pick(slices["val"], range(0, total, total // 15))
few_images = [image.to(device) for image, _ in some_slices]
few_labels = torch.tensor(some_slices.labels, device=device)
for name, attribute in (("gamma", "weight"), ("beta", "bias")):
    for step_size in (training.lr, training.lr / 10):
        model = copy.deepcopy(models["heads"]).requires_grad_(False)
        learned = [
            getattr(layer, attribute).requires_grad_(True)
            for layer in model.modules()
            if isinstance(layer, nn.BatchNorm2d)
        ]
        adam = torch.optim.Adam(learned, lr=step_size)
        losses = []
        for _ in range(7):
            loss = classification_loss(model(few_images), few_labels)
            losses.append(f"{loss.item():.2f}")
            adam.zero_grad()
            loss.backward()
            adam.step()
        print(f"only {name:5} at {step_size:g}: {' '.join(losses)}")

# %% [markdown] tags=["answer"]
# Adam's first step has the same size for both, but $\gamma$ is near one and $\beta$ near zero, so
# the step changes $\beta$ more in relation to its size. In the run shown here no loss falls
# smoothly. Where it goes up and down even at a tenth of the rate, think of the ranking: boxes that
# swap ranks make the rows jump, and the gradient knows nothing of that.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Ten times the rate
#
# Kind: experiment, **
#
# Train "full" for some steps at ten times the rate that the chapter used for it. How much do the
# ranked boxes still differ between slices?

# %% tags=["solution"]
# @title Solution
def spread(model):
    """Mean standard deviation of the ranked boxes over 16 slices."""
    with torch.no_grad():
        rows = model.ranked_boxes(images[:16])  # [16, N, 5]
    return rows.std(dim=0).mean().item()


print(f"before: spread of the rows over slices {spread(fresh()):.3f}")
for factor in (1, 10):
    model = fresh()
    parameters = set_regime(model, "full")
    adam = torch.optim.Adam(parameters, lr=factor * rate["full"])
    for chosen in epoch_batches(len(live), 16, epoch=0, seed=SEED)[:10]:
        target = torch.tensor([live.labels[i] for i in chosen])
        logits = model([live[i][0].to(device) for i in chosen])
        loss = classification_loss(logits, target.to(device))
        adam.zero_grad()
        loss.backward()
        adam.step()
    print(f"{factor:2} x, ten steps: spread {spread(model):.3f}")
third = torch.tensor(1 / 3)
guess = -(third * third.log() + 2 * third * (1 - third).log())
print(f"loss if every probability is 1/3: {guess:.3f}")

# %% [markdown] tags=["answer"]
# If the spread falls, all slices look alike to $S$, and the best that it can do is to give each
# class its share, one third. In a longer run you would notice it by a loss that stays near that of
# "always 1/3"; after ten steps the loss of one batch says little.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · The loss as it is printed
#
# Kind: experiment, **
#
# Train two modules $S$ on the cached rows of the live slices: one with binary cross-entropy, one
# with the positive term alone, $-\sum_k y_k \log \sigma(\hat{y}_k)$, as Algorithm 1 prints it.
# Compare the probabilities.

# %% tags=["solution"]
# @title Solution
cached = cache_ranked_boxes(models["heads"], live, progress=False)
cached = cached.to(device)  # [M, N, 5]
target = torch.tensor(live.labels, device=device)


def positive_term(logits, target):
    """The negative log sigmoid of the true class, averaged."""
    own = logits.gather(1, target[:, None])
    return nn.functional.softplus(-own).mean()


losses = {"both terms": classification_loss, "positive term": positive_term}
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
    print(f"{name:14} loss {loss.item():.3f}, ", end="")
    print(f"above 0.5: {above:.0%}, accuracy here {right:.0%}")

# %% [markdown] tags=["answer"]
# The positive term is lowest when *every* logit is large, because nothing punishes a wrong class. A
# module that has learned its slices with both terms has about one third of its outputs above one
# half, since each slice has one class of three. (Both are evaluated on their own training slices
# here.)

# %% [markdown]
# ## What we learned
#
# 1. A regime is a list of parameters: $S$; $S$ with every $\gamma$ and $\beta$; or all. The state
#    dict shows whether the list was kept.
# 2. The RPN learns in none of them, because proposals are detached; the batch-norm statistics stay,
#    because the detector stays in eval mode.
# 3. With frozen statistics, batch normalisation is one line for each channel, and a slice's result
#    does not depend on its neighbours in the batch.
# 4. Adam's first step has the size of the learning rate whatever the gradient, so a rate that suits
#    a random $S$ can be too large for trained convolutions.
# 5. In "heads" the ranked boxes are constants, and the detector runs once for each slice. The other
#    regimes may gain accuracy and may forget lesions, so measure both.
#
# ## Further reading
#
# {cite:t}`TerSarkisov2020` trains the three regimes; sections 3.2 and 4 are on two pages.
# {cite:t}`Ioffe2015` introduces batch normalisation and says what its statistics are at test time.
# {cite:t}`Kingma2015` is Adam; the size of its steps is the subject of their section 2.1.
# {cite:t}`Ren2015` trains the RPN and the detector that reads its proposals, and discusses why the
# proposals' coordinates get no gradient. {cite:t}`He2017` is the detector that we change here.

