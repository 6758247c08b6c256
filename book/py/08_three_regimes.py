# %% [markdown]
# # 8 · Three training regimes
#
# A trained detector, its ranked boxes and the module $S$ make the classifier. Now it learns from
# the labels of slices: $S$ alone, $S$ and batch normalisation, or everything. The paper calls these
# heads, heads + BN and full, and gets three different models. The picture shows what each regime
# does to each part of the network.
#
# **The question: what does a regime really change, and what does the detector forget on the way?**

# %% tags=["fold"] mystnb={"image": {"alt": "A grid with one column for each part of the network, from the backbone to module S, and one row for each regime. Cells say learns, passes the gradient on, or no gradient. Only S learns in heads; S and the batch-norm affine parameters in heads plus BN; everything but RPN and batch-norm statistics in full."}, "figure": {"caption": "What learns in which regime, and how far back the gradient runs. The RPN and the statistics of batch normalisation change in none of them; this chapter shows why."}}
# @title Imports, versions, and the picture of the three regimes
import copy
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch
from torch import nn

import covidmask
from covidmask import plotting
from covidmask.config import PRESETS, DetectorConfig
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
    batch_norm_parameters,
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
    classification_loss,
    epoch_batches,
    evaluate_classifier,
    evaluate_segmenter,
    learning_rate,
    train_classifier,
)
from covidmask.training.compare import part_of

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # on a GPU, too, all digits of float32 count
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")

columns = ["Backbone\nconv.", "BN\nγ, β", "BN\nstatistics", "FPN", "RPN"]
columns += ["Box head,\npredictor", "S"]
plan = {"heads": "nnnnnnl", "heads + BN": "plnpnpl", "full": "llnlnll"}
words = {"l": "learns", "p": "passes\ngradient\non", "n": "no\ngradient"}
fills = {"l": plotting.ORANGE, "p": "#cfe8f7", "n": "#f0f0f0"}
fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
for at, codes in enumerate(plan.values()):
    for column, code in enumerate(codes):
        look = {"facecolor": fills[code], "edgecolor": "black", "lw": 0.8}
        look |= {"hatch": "//" if code == "l" else ""}
        style = "round,pad=0,rounding_size=0.08"
        corner = (column + 0.06, at + 0.08)
        _ = ax.add_patch(FancyBboxPatch(corner, 0.88, 0.84, boxstyle=style, **look))
        paper = {"facecolor": fills[code], "edgecolor": "none", "pad": 1.5}
        look = {"ha": "center", "va": "center", "fontsize": 9, "bbox": paper}
        _ = ax.text(column + 0.5, at + 0.5, words[code], **look)
_ = ax.set(xlim=(0, 7), ylim=(3, 0), xlabel="Part of the network", ylabel="Regime")
_ = ax.set_xticks(np.arange(7) + 0.5, columns)
_ = ax.set_yticks(np.arange(3) + 0.5, list(plan))
_ = ax.tick_params(length=0)
plt.show()

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# **After it you can**
#
# - write one step of Algorithm 1 with raw tensors, Adam included;
# - say for each part of the network whether a regime changes it, and show it on the state dict;
# - say whether "full" trains the RPN, and why;
# - explain what batch normalisation does in train and in eval mode, and why it stays in eval mode;
# - read a comparison of regimes with its intervals, and measure what a detector forgets.
#
# **You need** the ranked boxes of [chapter 6](06_ranked_boxes.ipynb) and the module $S$ of
# [chapter 7](07_covid_ct_mask_net.ipynb). The chapter runs alone.
#
# **Time:** reading 30 minutes, exercises 45 minutes, running about 4 minutes on two CPU cores in the
# preset `quick`; the first chapter that you run also draws the phantoms, which takes a few minutes
# more.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice here is a *phantom*, made by formulas and random numbers. Except in the table that
# cites the paper, no number is a result on patients, and nothing here is for diagnosis.
# ```
#
# All regimes start from the same two things: the trained segmenter of
# [chapter 5](05_segmenter.ipynb) without its mask branch, and an $S$ with random weights. In the
# cell below, `fresh()` puts a new copy together, always with the same random $S$.

# %% tags=["fold"]
# @title Load the segmenter and the slices
preset = PRESETS[PRESET]
training = replace(preset.classifier_training, batch_size=8)
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

total = len(slices["train"])
chosen = range(total // 16, total, total // 8)  # all three classes
batch = part_of(slices["train"], chosen)
order = epoch_batches(len(batch), training.batch_size, epoch=0, seed=SEED)[0]
images = [batch[i][0].to(device) for i in order]  # B x [3, H, W]
labels = torch.tensor([batch[i][1] for i in order], device=device)  # [B]
print(f"one batch: {len(images)} slices, labels {labels.tolist()}")

# %% [markdown]
# ## Three ways to train one network
#
# The gradient of the classification loss starts at the three logits and runs back: through $S$,
# into the $N$ ranked boxes, through box predictor, box head and RoIAlign into the feature pyramid
# (FPN) and the backbone. A regime says which weights learn, and so how far back the gradient has to
# run.
#
# - **heads:** $S$ alone. (The name is the paper's: the head that is meant is $S$, not the box head.)
#   The gradient ends at the ranked boxes.
# - **heads + BN:** $S$ and the scale $\gamma$ and shift $\beta$ of each batch-norm layer. These
#   layers sit in the backbone, so the gradient runs all the way back, but all other weights on its
#   way stay as they are.
# - **full:** every weight.
#
# Before you read on: which parts will *not* change even in "full"?
#
# ## One step of Algorithm 1 by hand
#
# The paper prints its training as Algorithm 1 {cite:p}`TerSarkisov2020`. Here it is in our words, with
# the paper's line numbers in brackets:
#
# 1. Set epochs, rate and weight decay (1); start with weights and anchors of the segmenter (2).
# 2. In each epoch (3), for each batch: backbone features (4), and boxes and scores from the RPN (5).
# 3. RoI: take $N$ encoded boxes with their scores, $N \times 5$ (6); masks are ignored (7).
# 4. $S$ reads these ranked boxes as one vector and predicts the image classes (8).
# 5. Compute the binary cross-entropy (9). After all epochs (10), return the best model (11).
#
# The step of the optimiser, between 9 and 10, is not printed. We take heads + BN and one batch, and do
# what the package does in a step.
#
# **Lines 4 to 9: ranked boxes, $S$, and the loss.** The detector stays in eval mode, whatever the
# regime. The rows carry a gradient, because the $\gamma$ and $\beta$ before them learn.

# %% tags=["nbval-check-output"]
model = fresh()
parameters = set_regime(model, "heads_bn")
rows = model.ranked_boxes(images)  # [B, N, 5]
logits = model.s(rows)  # [B, 3]
y = nn.functional.one_hot(labels, 3).float()  # [B, 3]
p = logits.double().sigmoid()  # in float32 1 - p loses digits
loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
ours = classification_loss(logits, labels)
assert torch.allclose(loss.float(), ours, rtol=1e-4)
print(tuple(rows.shape), "requires a gradient:", rows.requires_grad)
print(f"{len(parameters)} tensors learn")

# %% [markdown]
# **Backward and Adam.** Adam {cite:p}`Kingma2015` keeps a running mean $u$ of the gradient and a
# running mean $v$ of its square, with decay rates $\rho_1$ and $\rho_2$ (usually called $\beta_1$
# and $\beta_2$; we keep $\beta$ for batch normalisation). Weight decay $\lambda$ is added to the
# gradient:
#
# $$g_t = \nabla \mathcal{L} + \lambda \theta, \quad u_t = \rho_1 u_{t-1} + (1 - \rho_1) g_t, \quad
# v_t = \rho_2 v_{t-1} + (1 - \rho_2) g_t^2,$$
# $$\theta_t = \theta_{t-1} - \alpha \,
# \frac{u_t / (1 - \rho_1^t)}{\sqrt{v_t / (1 - \rho_2^t)} + \epsilon}.$$
#
# In the first step these corrections turn the fraction into $g / (|g| + \epsilon)$, which is plus
# or minus one unless $g$ is tiny. So every parameter moves by about $\alpha$, however small its
# gradient is. We will come back to this.

# %%
gradients = torch.autograd.grad(ours, parameters)
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
# Now the package: one epoch on this batch alone is one step, and it should move the parameters to
# where ours are. We ask this of 99 % of them: where gradient and weight decay nearly cancel,
# rounding decides the sign of their sum, and Adam turns even that into a step of size $\alpha$.

# %% tags=["nbval-check-output"]
package = fresh()
settings = replace(training, epochs=1)
options = {"seed": SEED, "progress": False}
_ = train_classifier(package, batch, "heads_bn", settings, **options)
moved = [*package.s.parameters(), *batch_norm_parameters(package.detector)]
pairs = zip(moved, by_hand, strict=True)
apart = torch.cat([(a - b).abs().flatten() for a, b in pairs])
assert (apart < 0.01 * alpha).float().mean() > 0.99
print(f"a step by hand and by the package: {len(moved)} tensors agree")

# %% [markdown]
# ## What one step changes
#
# A regime promises that certain parts stay as they are. Let us check this on the state dict, that is
# on every tensor that a file of weights would hold, before and after one step.

# %% tags=["fold"]
# @title Name the part of the network to which a tensor belongs
PARTS = ("backbone convolutions", "BN gamma, beta", "BN statistics", "FPN", "RPN")
PARTS += ("box head", "box predictor", "module S")
KEYS = {"fpn.": "FPN", "rpn.": "RPN", "box_head.": "box head"}
KEYS |= {"box_predictor.": "box predictor"}


def part_name(name, tensor):
    """The part of the network to which an entry of a state dict belongs."""
    if "running_" in name or "num_batches" in name:
        return "BN statistics"
    if "backbone.body" in name:  # ResNet's convolutions have no bias
        return "BN gamma, beta" if tensor.ndim == 1 else "backbone convolutions"
    return next((part for key, part in KEYS.items() if key in name), "module S")


# %%
def one_step(regime, images, labels):
    """The model after one step of a regime; its state dict before it."""
    model = fresh()
    trained = set_regime(model, regime)
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    model.train()  # leaves the detector in eval mode
    decay = training.weight_decay
    adam = torch.optim.Adam(trained, lr=training.lr, weight_decay=decay)
    classification_loss(model(images), labels).backward()
    adam.step()
    return model, before


# %%
stepped, changed = {}, {}
for regime in REGIMES:
    model, before = stepped[regime] = one_step(regime, images, labels)
    count = changed[regime] = dict.fromkeys(PARTS, 0)
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name])
        count[part_name(name, tensor)] += not same
    assert count["RPN"] == count["BN statistics"] == 0
assert sum(changed["heads"].values()) == changed["heads"]["module S"]

# %% tags=["fold", "nbval-check-output"]
# @title Print how many tensors each regime has changed
names = {name: part_name(name, tensor) for name, tensor in before.items()}
print(f"{'tensors changed':22} {'of':>4}", *(f"{regime:>9}" for regime in REGIMES))
for part in PARTS:
    counts = [f"{changed[regime][part]:9}" for regime in REGIMES]
    print(f"{part:22} {list(names.values()).count(part):4}", *counts)

# %% [markdown]
# Two rows stay at zero in all regimes.
#
# **Statistics.** They are not parameters. A forward pass in train mode would update them, but the
# detector is never in train mode.
#
# **RPN.** Its weights are on the optimiser's list in "full", yet no gradient reaches them. The RPN
# hands over proposals: the coordinates of boxes that were chosen by sorting and by non-maximum
# suppression. This choice has no derivative. The coordinates would have one, but torchvision
# *detaches* them, because Faster R-CNN trains the RPN with losses of its own {cite:p}`Ren2015`,
# which are switched off here. So "full" does not train the RPN.

# %% tags=["nbval-check-output"]
model, before = stepped["full"]
learns = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
unreached = {names[n] for n, p in learns if p.grad is None}
assert unreached == {"RPN"}
features, proposals, _ = propose(model.detector, images[:1])
assert all(feature.requires_grad for feature in features.values())
assert not proposals[0].requires_grad
print("on the optimiser's list, without a gradient:", *unreached)

# %% [markdown]
# ### Why "full" needs a smaller rate
#
# A first step of size $\alpha$ is small for a $\gamma$ near one and large for a weight near zero.
# Here is that step as a percentage of the median size of the parameters in each part.

# %% tags=["fold"]
# @title Print the size of a first step beside the size of the parameters
sizes = {}
for name, p in model.named_parameters():
    if p.grad is not None:
        part = names[name]
        if part == "BN gamma, beta":
            part = "BN gamma" if name.endswith("weight") else "BN beta"
        sizes.setdefault(part, []).append(before[name].abs().flatten())
print(f"{'':22} median size   a step of {training.lr:g} is")
for part, values in sizes.items():
    middle = torch.cat(values).median().item()
    print(f"{part:22} {middle:11.3f} {100 * training.lr / max(middle, 1e-9):15.1f} %")

# %% [markdown]
# $S$ is random at the start, so a large step does it no harm. Convolutions, box head and box predictor
# hold what the segmenter has learned, and many such steps can undo it. The paper takes many small steps:
# one rate for all regimes, $10^{-5}$, for 50 epochs {cite:p}`TerSarkisov2020`. Our preset has to give results
# within minutes, and its larger rate was chosen for $S$, so for "full" we use a smaller one below.
#
# ### How many numbers learn
#
# The last column tells how many of them are in $S$; "paper" is ResNet-50 with $N = 256$.

# %% tags=["nbval-check-output"]
print(f"{'':8}", *(f"{title:>11}" for title in (*REGIMES, "of it S")))
for name in ("quick", "paper"):
    detector = lesion_mask_rcnn(PRESETS[name].detector)
    sized = covid_ct_mask_net(detector, PRESETS[name].classifier)
    counts = []
    for regime in REGIMES:
        set_regime(sized, regime)
        counts.append(count_trainable(sized))
    counts.append(count_parameters(sized.s))
    print(f"{name:8}", *(f"{number:11,}" for number in counts))
assert counts[:2] == [2_364_419, 2_417_539]

# %% [markdown]
# The release that we read has code for heads + BN alone ([paper v code](paper_v_code.ipynb)). For
# "full" the paper says that all layers of RPN and RoI were set to training mode, and that their losses
# and samplers were switched off; it does not say what happened to the batch-norm statistics. We keep
# the detector in eval mode, so that the regimes differ only in what learns. Our "full" therefore does
# not repeat the paper's.
#
# ## Batch normalisation in train and in eval mode
#
# Batch normalisation {cite:p}`Ioffe2015` brings each channel $c$ of a feature map to mean 0 and
# variance 1, and then gives it a scale and a shift that are learned. A feature $f$ becomes
#
# $$\gamma_c \, \frac{f - \text{mean}_c}{\sqrt{\text{var}_c + \epsilon}} + \beta_c.$$
#
# The two modes differ in *whose* mean and variance these are. In **train mode** they come from the
# batch at hand, so from all slices that happen to be in it, and the layer also moves its running
# values towards them. In **eval mode** they are these stored running values, here from the
# segmenter's training. The picture shows one channel of the backbone's last batch-norm layer, for our
# old friend beside three controls and beside three COVID-19 phantoms: the channel in which these two
# batches differ most.

# %%
body = fresh().detector.backbone.body
norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
norm = norms[-1]  # the last batch-norm layer of the backbone


# %%
def company(size, draw):
    """`size` - 1 validation slices; others for each `draw` of 0, 1, 2."""
    total = len(slices["val"])
    start, step = draw * total // 3, total // 50
    chosen = (start + step * np.arange(size - 1)) % total
    return [slices["val"][int(i)][0].to(device) for i in chosen]


def before_norm(pictures):
    """What `norm` reads: a feature map [B, channels, height, width]."""
    read = []
    hook = norm.register_forward_hook(lambda _, f, out: read.append(f[0]))
    with torch.no_grad():
        _ = body(segmenter.transform(pictures)[0].tensors)
    hook.remove()
    return read[0]


# %%
batches = [before_norm([friend, *company(4, draw)]) for draw in (0, 2)]
means = torch.stack([one.mean((0, 2, 3)) for one in batches])  # [2, ch.]
stds = torch.stack([one.std((0, 2, 3)) for one in batches])
apart = (means[0] - means[1]).abs() / stds.mean(0)
channel = int(apart.argmax())

# %% tags=["fold"] mystnb={"image": {"alt": "Three panels with one row of activations for each slice of a batch, the old friend on top. In the first two, train mode, a band shows mean and standard deviation of the batch, and it lies elsewhere in the second batch. In the third, eval mode, the band is that of the stored running values, whatever the batch."}, "figure": {"caption": "Whose mean and variance? One channel of the last batch-norm layer of the backbone: each row is a slice (5 to 95 % of its activations, and their mean), the top row our old friend. The band is the mean plus and minus one standard deviation with which the layer normalises. In train mode it moves with the batch; in eval mode it is stored. Synthetic."}}
# @title Draw batch normalisation in train and in eval mode
alike = {"sharex": True, "sharey": True}
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained", **alike)
stored = norm.running_mean[channel].item(), norm.running_var[channel].sqrt().item()
of_batch = [(means[i, channel].item(), stds[i, channel].item()) for i in (0, 1)]
cases = (
    ("train mode, with controls", batches[0], of_batch[0], plotting.BLUE, "//"),
    ("train mode, with COVID-19", batches[1], of_batch[1], plotting.ORANGE, "\\\\"),
    ("eval mode, with anyone", batches[1], stored, "#777777", ""),
)
for ax, (title, values, (mean, std), colour, hatch) in zip(axes, cases, strict=True):
    look = {"color": colour, "alpha": 0.25, "hatch": hatch, "lw": 0}
    _ = ax.axvspan(mean - std, mean + std, **look)
    _ = ax.axvline(mean, color=colour, lw=2)
    for row, one in enumerate(values[:, channel].flatten(1).cpu()):
        low, high = one.quantile(0.05), one.quantile(0.95)
        ink, thick, marker, ms = "black", 1.5, "o", 5
        if row == 0:  # the old friend
            ink, thick, marker, ms = plotting.VERMILLION, 3, "D", 7
        _ = ax.plot([low, high], [row, row], color=ink, lw=thick)
        _ = ax.plot(one.mean(), row, marker, color=ink, ms=ms)
    own = (values[0, channel].mean().item() - mean) / std
    _ = ax.set_title(f"{title}\nfriend's mean becomes {own:+.2f}", fontsize=10)
    _ = ax.set_xlabel("Activation (no unit)")
axes[0].set_yticks(range(4), ["friend", "slice 2", "slice 3", "slice 4"])
_ = axes[0].set_ylabel("Slices of the batch")
_ = axes[0].set_ylim(3.5, -0.5)
plt.show()

# %% [markdown]
# With stored statistics the layer is a straight line for each channel, $a_c f + d_c$ with
# $a_c = \gamma_c / \sqrt{\text{var}_c + \epsilon}$ and $d_c = \beta_c - a_c \, \text{mean}_c$. Let us
# check this on our old friend.

# %% tags=["nbval-check-output"]
f = before_norm([friend])  # [1, channels, height, width]
with torch.no_grad():
    a = norm.weight / (norm.running_var + norm.eps).sqrt()  # [channels]
    d = norm.bias - a * norm.running_mean  # [channels]
    line = a[:, None, None] * f + d[:, None, None]
    assert torch.allclose(norm(f), line, rtol=1e-3, atol=1e-4)
print("what the layer reads:", tuple(f.shape))
print("the same as one line for each channel")

# %% [markdown]
# **Why can two numbers a channel move a detector?** A ReLU follows, and $\beta$ decides which part
# of the map lies above its threshold. When it shifts, a channel that marks the edges of lesions may
# begin to mark vessels, too, or mark nothing at all; a $\gamma$ of zero removes the channel. So
# heads + BN cannot learn new filters, but in every layer it can choose among those that are there.
#
# ### What would go wrong in train mode
#
# Let us put our old friend into batches with other slices, once with the stored statistics and once
# with those of the batch. The function returns its scores, best first.


# %%
def friend_scores(companions, statistics):
    """Scores of the old friend by rank [N], in a batch with others.

    Batch normalisation uses "running" statistics or those of "batch".
    """
    probe = fresh()
    if statistics == "batch":
        for layer in probe.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
    with torch.no_grad():
        return probe.ranked_boxes([friend, *companions])[0, :, 0].cpu()


# %%
alone = friend_scores([], "running")
in_company = friend_scores(company(8, 0), "running")
assert (alone - in_company).abs().mean() < 1e-3
print("running statistics: the company changes nothing but rounding")
for draw in range(3):
    other = friend_scores(company(8, draw), "batch")
    change = (alone - other).abs().mean()
    assert change > 1e-3
    print(f"statistics of batch {draw + 1}: mean change {change:.3f}")

# %% [markdown]
# With the statistics of the batch, the same slice gets other scores in each batch. A diagnosis
# cannot work like that: a patient's result must not depend on who is examined at the same time. And
# each forward pass would move the running values away from those with which the segmenter was
# trained. Therefore the classifier keeps its detector in eval mode even while it trains, as the
# released code does. Move the slider to see batches of other sizes.

# %% tags=["fold"]
# @title Draw the old friend's scores in batches of several sizes
ranks = np.arange(1, len(alone) + 1)


def draw_company(size):
    """The old friend's scores by rank, in batches of `size`."""
    fig, ax = plt.subplots(figsize=(5.4, 4), layout="constrained")
    label = "running statistics, any batch"
    _ = ax.plot(ranks, alone, color="black", lw=2.5, label=label)
    styles = ((plotting.BLUE, "--"), (plotting.VERMILLION, ":"), (plotting.GREEN, "-."))
    for draw, (colour, line) in enumerate(styles[: 1 if size == 1 else 3]):
        scores = friend_scores(company(size, draw), "batch")
        whose = "itself" if size == 1 else f"batch {draw + 1}"
        label = f"statistics of {whose}"
        _ = ax.plot(ranks, scores, color=colour, ls=line, lw=2, label=label)
    _ = ax.set(xlabel="Rank of the box (1 is the best score)", ylabel="Score (no unit)")
    _ = ax.set(ylim=(0, 1.02), title=f"Slices in the batch: {size}")
    _ = ax.legend()
    return fig


batch_sizes = (1, 2, 4, 8)
frame_slider(
    [draw_company(size) for size in batch_sizes],
    [f"{size} slices" if size > 1 else "1 slice" for size in batch_sizes],
    "Slices in the batch",
    "Scores of the old friend by rank: one black curve for running statistics, and up "
    "to three others for the statistics of batches",
    caption="The scores of one synthetic slice when batch normalisation uses the "
    "statistics of the batch. Only the black curve does not depend on the others.",
    start=3,
    dpi=70,
)

# %% [markdown]
# ## All three, live
#
# Now we train the three regimes: the same start, the same slices in the same order, the same number
# of steps. Only the rate of "full" is smaller, as said above. To stay within minutes we take a small
# part of the training slices and few epochs.

# %%
live = part_of(slices["train"], range(0, len(slices["train"]), 60))
held_out = part_of(slices["val"], range(0, len(slices["val"]), 3))
short = replace(training, epochs=3)
rate = {"heads": training.lr, "heads_bn": training.lr, "full": 3e-4}

models, history = {}, {}
for regime in REGIMES:
    models[regime] = fresh()
    settings = replace(short, lr=min(training.lr, rate[regime]))
    history[regime] = train_classifier(
        models[regime], live, regime, settings, seed=SEED
    )  # fmt: skip

# %% tags=["fold"] mystnb={"image": {"alt": "Training loss against the step for heads, heads plus BN and full, three curves that fall."}, "figure": {"caption": "Loss of the three regimes on the same few training slices, smoothed over five steps. A low training loss is no merit here: so few slices can be learned by heart. Synthetic."}}
# @title Draw the losses, and print accuracies with intervals
fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
merged = [
    {"step": step, **{r: history[r][step]["bce"] for r in REGIMES}}
    for step in range(len(history["heads"]))
]
label = "Binary cross-entropy (no unit)"
_ = plotting.loss_curves(merged, REGIMES, ax, smooth=5, ylabel=label)
plt.show()
print(f"accuracy on {len(held_out)} validation slices (phantoms)")
print("intervals: 95 %, slices as independent")
for regime in REGIMES:
    result = evaluate_classifier(models[regime], held_out, progress=False)
    low, high = wilson(int(result["confusion"].trace()), len(held_out))
    print(f"{regime:10} {result['accuracy']:.1%} ({low:.1%} to {high:.1%})")

# %% [markdown]
# So few slices and one seed show how to train, and not which regime wins; the benchmark below uses
# more. ([Chapter 9](09_speed.ipynb) is about what each regime costs.)
#
# ## What the detector forgets
#
# In heads + BN and full, the detector is trained for the image label and sees no lesion masks any
# more. Does it still find lesions? A network that is trained on a new task tends to lose the old
# one, which is called *catastrophic forgetting*. To measure it, we put the mask branch of the
# segmenter back beside the changed box branch, and evaluate on lesion slices of patients that no
# model has trained on.


# %%
def with_masks(model):
    """The classifier's detector, with the segmenter's mask branch again."""
    detector = copy.deepcopy(model.detector)
    heads = detector.roi_heads
    for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
        setattr(heads, name, getattr(segmenter.roi_heads, name))
    return detector.eval()


some = part_of(lesions, range(0, len(lesions), len(lesions) // 40))
detectors = {"before": segmenter}
detectors |= {regime: with_masks(models[regime]) for regime in REGIMES}
print(f"{len(some)} lesion slices (phantoms)   box AP50   mask AP50")
found = {}
for name, detector in detectors.items():
    found[name] = evaluate_segmenter(detector, some, progress=False)
    box, mask = found[name]["box_ap50"], found[name]["mask_ap50"]
    print(f"{name:30} {box:10.2f} {mask:11.2f}")
assert abs(found["heads"]["box_ap50"] - found["before"]["box_ap50"]) < 0.01

# %% tags=["fold"] mystnb={"image": {"alt": "Four panels with the old friend, a drawn chest slice in the lung window: the true lesions, and the detections with a score above one half before training, after heads plus BN and after full."}, "figure": {"caption": "Our old friend: true lesions, and detections with a score above 0.5 before training and after two regimes. Synthetic."}}
# @title Draw what is found on our old friend
lesion_kinds, picture = preset.detector.lesions, friend.cpu()
truth = mask_to_targets(friend_mask, lesion_kinds, preset.min_area)
fig, axes = plt.subplots(2, 2, figsize=(8, 8), layout="constrained")
_ = plotting.show_lesions(picture, truth, axes[0, 0])
_ = axes[0, 0].set_title("truth")
for ax, name in zip(axes.flat[1:], ("before", "heads_bn", "full"), strict=True):
    with torch.no_grad():
        output = detectors[name]([friend])[0]
    output = {key: value.cpu() for key, value in output.items()}
    _ = plotting.show_lesions(picture, output, ax, score_threshold=0.5)
    number = int((output["scores"] > 0.5).sum())
    _ = ax.set_title(f"{name}: {number} detections")
plt.show()

# %% [markdown]
# In the run shown here next to nothing is left of "full" after a few dozen steps, while its loss on the
# labels fell. Remember how large a step is beside the weights of the box head. This was one seed; the
# last column of the benchmark shows what is left of "full" after more steps at a smaller rate. It
# matters for what you may say about the model. If the boxes still lie on lesions, a
# classifier can point at what it has used. If they do not, a box is whatever helped the image label,
# and a picture of it explains less than it seems to ([chapter 13](13_which_box.ipynb)).
#
# What does $S$ read, then, when "full" has destroyed the boxes, and why is its accuracy higher in the
# benchmark below? $S$ still reads $N$ rows of five numbers, but the gradient has shaped them for the
# image label and no longer for lesions; what they now say about a slice we have not measured.
#
# ## The whole benchmark
#
# `benchmarks/regimes.py` trains on every second training slice of the preset `quick` and evaluates on
# test patients. A short pilot (the second table) chose one rate for each regime on validation slices.
# Two regimes run again with 0.001 for $S$, and 0.0001 and the paper's weight decay for the detector. For
# full this speeds up $S$, while the detector's rate stays. The last row is heads with all epochs of the
# preset, for which its detector need not run again.
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
# Sensitivity (PPV), accuracy and AP go from 0 to 1. The intervals resample whole patients. A *minus*
# column is the difference to a row of heads on the same slices.
#
# How do you read it?
#
# - **Start with the differences.** If an interval contains zero, this benchmark does not show that
#   the regime differs from heads, in either direction.
# - **Compare each regime with its second run.** If they differ by more than two regimes do, the
#   settings of the optimiser matter more here than the regime.
# - **Ask what no interval holds.** The intervals resample patients, not trainings. A difference between
#   regimes that is no larger than that between seeds may be chance; with one seed you cannot know.
# - **Look at the last column.** What a regime gains in accuracy, it may lose in lesions found.
#
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
# The paper prefers heads + BN: full is more accurate over all, but misses more COVID-19. (One number
# is inconsistent: an accuracy of 91.66 needs 92.10 for the controls of heads + BN, as in the
# abstract.) You cannot compare these numbers with ours, because data, scale, learning rates and
# "full" all differ. The most that you can compare is the direction of an effect. Here the order of
# accuracies in the first three rows is the paper's, heads < heads + BN < full, from a single seed. The
# paper's full finds less COVID-19 than its heads + BN, and ours does not; we do not know why.

# %% tags=["fold"]
# @title In another preset than quick: train a classifier for the chapters that need one
if PRESET == "quick":
    print("preset quick: other chapters load the weights of the package")
else:
    model = fresh()
    whole = preset.classifier_training
    options = {"validation": slices["val"], "seed": SEED}
    _ = train_classifier(model, slices["train"], "heads", whole, **options)
    file = weights_file("classifier", PRESET, "heads")
    origin = {"trained_by": "book/08_three_regimes", "regime": "heads", "seed": SEED}
    _ = save_model(model, file, **origin)
    print(f"saved for the other chapters as {file.name}")

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Does "full" train the RPN?**
#
# - [ ] Yes, because every weight is on the optimiser's list. :: Being on the list is not enough: Adam
#   skips a parameter whose gradient is `None`.
# - [x] No, because the proposals are detached and its own losses are off. :: No gradient reaches it,
#   as the state dict shows.
# - [ ] No, because its weights are frozen in all three regimes. :: In "full" they require a gradient.
#   They just do not get one.
#
# **2. What learns in heads + BN?**
#
# - [x] $S$, and $\gamma$ and $\beta$ of every batch-norm layer. :: Two numbers a channel, and nothing
#   else in the detector.
# - [ ] $S$, and the means and variances of batch norm. :: These are statistics. They are stored, not
#   learned, and here they stay.
# - [ ] $S$, and all layers that the gradient passes. :: It passes convolutions and box head, which
#   pass it on and stay as they are.
#
# **3. Where do mean and variance come from in eval mode?**
#
# - [ ] From the slices of the batch, as in train mode. :: Then the result of a slice would depend on
#   its neighbours.
# - [ ] From the slice alone, whatever else is in the batch. :: That would be instance normalisation.
# - [x] From running values stored while the segmenter trained. :: So they are constants, and the
#   layer is a straight line for each channel.
#
# **4. The classifier calls `.train()`. What happens to its detector?**
#
# - [x] It stays in eval mode; only $S$ is set to train mode. :: `CovidCTMaskNet.train` sees to that.
# - [ ] It is set to train mode and its samplers begin to run. :: The package keeps it in eval mode.
# - [ ] Its weights are frozen until the next `.eval()`. :: Modes and gradients are two things. A
#   detector in eval mode can learn.
#
# **5. Why can one learning rate suit $S$ and harm the convolutions?**
#
# - [ ] Convolutions have larger gradients than linear layers. :: In its first step Adam moves each
#   parameter by about the rate, whatever its gradient.
# - [x] They hold something learned, and some weights are as small as a step. :: $S$ starts from random
#   numbers and has nothing to lose.
# - [ ] Convolutions are frozen by batch norm in eval mode. :: Eval mode freezes statistics, not
#   weights.
#
# **6. In the benchmark, "minus heads" of a regime is +0.02 (-0.03 to +0.07). What do you say?**
#
# - [ ] The regime is slightly better than heads. :: The interval contains zero, so these patients do
#   not show it.
# - [ ] The regime is exactly as good as heads. :: A difference of 0.07 would fit these data as well.
# - [x] This benchmark does not decide between the two. :: And seeds are not in this interval.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Adam's first step
#
# Kind: pencil, *
#
# A parameter has the value `theta`. Work out where Adam's first step, with rate `rate` and weight
# decay `decay`, takes it, and write `first_step(theta, gradient, rate, decay)` for plain numbers. You
# may leave out $\epsilon$. The gradient may be `None`, which means that nothing reached the
# parameter; Adam then skips it. What happens when the gradient is 0 and the decay is not?
#
# Hint: In the first step the fraction is $g / |g|$. What is $g$ when the gradient is 0?


# %% tags=["starter"]
def first_step(theta, gradient, rate, decay):
    raise NotImplementedError("where does the parameter go?")


# %% tags=["solution"]
# @title Solution
def first_step(theta, gradient, rate, decay):
    if gradient is None:
        return theta
    g = gradient + decay * theta
    return theta - rate * (g > 0) + rate * (g < 0)


for gradient in (None, 0.0, 1e-6, -5.0):
    moved_to = first_step(1.0, gradient, 0.01, 0.001)
    print(f"gradient {gradient}: 1 becomes {moved_to:.2f}")


# %% tags=["wrong"]
def first_step(theta, gradient, rate, decay):
    return theta if gradient is None else theta - rate * (gradient + decay * theta)


# %% tags=["wrong"]
def first_step(theta, gradient, rate, decay):
    if not gradient:
        return theta
    return theta - rate * (1 if gradient > 0 else -1)


# %% tags=["wrong"]
def first_step(theta, gradient, rate, decay):
    g = (gradient or 0) + decay * theta
    return theta - rate * (g > 0) + rate * (g < 0)


# %% tags=["check"]
# @title Check your answer
messages = {
    None: "None: Adam skips this parameter",
    0.0: "a gradient of 0: weight decay is added before the division",
    -5.0: "a large gradient: how long is a first step?",
    1e-3: "a small gradient: how long is a first step?",
    -1e-4: "gradient and weight decay point in opposite directions: which wins?",
}
for value, message in messages.items():
    theta = torch.ones(1, requires_grad=True)
    theta.grad = None if value is None else torch.tensor([value])
    torch.optim.Adam([theta], lr=0.01, weight_decay=0.001).step()
    assert abs(first_step(1.0, value, 0.01, 0.001) - theta.item()) < 1e-4, message
print("right: as torch.optim.Adam does it")

# %% [markdown] tags=["answer"]
# "No gradient" and "a gradient of zero" are not the same. With a gradient of zero, weight decay alone
# moves the parameter, by a whole $\alpha$ towards zero. It is therefore good for the RPN in "full"
# that its gradient is `None`: a zero would shrink it step by step.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Batch norm by name
#
# Kind: find the bug, **
#
# The released code finds what trains in heads + BN by looking for `bn` in the name of a parameter, as
# in the starter below. For the paper's model this misses thousands of parameters. Remove the first
# line, print which layers of `nn.BatchNorm2d` the name does not find, and repair the function. It
# returns a list of parameters, for any detector.
#
# Hint: `module.named_modules()` gives names and modules. How are the batch norms on the skip
# connections of a ResNet called?


# %% tags=["starter"]
def norm_parameters(detector):
    raise NotImplementedError("remove this line, then find the bug")
    return [p for name, p in detector.named_parameters() if "bn" in name]


# %% tags=["solution"]
# @title Solution
def norm_parameters(detector):
    layers = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    return [p for layer in layers for p in (layer.weight, layer.bias)]


found_by_name = [p for name, p in sized.detector.named_parameters() if "bn" in name]
by_name = sum(p.numel() for p in found_by_name)
every = sum(p.numel() for p in norm_parameters(sized.detector))
print(f"by name {by_name:,}, all {every:,}")
print(f"with S {counts[3] + by_name:,}, {counts[3] + every:,}")


# %% tags=["wrong"]
def norm_parameters(detector):
    return [p for name, p in detector.named_parameters() if "bn" in name]


# %% tags=["wrong"]
def norm_parameters(detector):
    named = detector.named_parameters()
    return [p for name, p in named if "bn" in name or "downsample" in name]


# %% tags=["wrong"]
def norm_parameters(detector):
    return [m.weight for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]


# %% tags=["check"]
# @title Check your answer
with torch.device("meta"):
    probe = lesion_mask_rcnn(DetectorConfig(backbone="resnet18", light_mask_head=True))
got = norm_parameters(probe)
flat = all(p.ndim == 1 for p in got)
assert flat, "some of these are convolutions: a batch norm has one number a channel"
numbers, expected = sum(p.numel() for p in got), count_batch_norm(probe)
assert numbers != expected // 2, "exactly half: each channel has two numbers that learn"
missing = f"{expected - numbers:,} numbers of ResNet-18 are still missing"
assert numbers == expected, missing
print("right, whatever the layers are called")

# %% [markdown] tags=["answer"]
# The batch norms on the skip connections are called `downsample.1`. With them, the paper's heads + BN would
# train 2,417,539 parameters; by name it is 2,409,859. A list that is made by name should be checked by
# counting.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · The friend's company
#
# Kind: predict, then run, **
#
# In each of four cases, decide whether the friend's scores differ from its scores *alone with the same
# kind of statistics*, by more than rounding. Write your prediction as `differs()`, which returns a
# dict from the name of the case to `True` or `False`:
#
# - `"running, others"`: running statistics, beside three other slices;
# - `"batch, others"`: statistics of the batch, beside three other slices;
# - `"batch, copies"`: statistics of the batch, beside three copies of itself;
# - `"running v batch"`: alone, with the statistics of the batch instead of the running ones.
#
# Hint: What are mean and variance of four copies of the same numbers?


# %% tags=["starter"]
def differs():
    raise NotImplementedError("a dict of four True or False")


# %% tags=["solution"]
# @title Solution
def differs():
    cases = {"running, others": False, "batch, others": True}
    return cases | {"batch, copies": False, "running v batch": True}


print("True:", [name for name, value in differs().items() if value])


# %% tags=["wrong"]
def differs():
    cases = {"running, others": False, "batch, others": True}
    return cases | {"batch, copies": True, "running v batch": True}


# %% tags=["wrong"]
def differs():
    cases = {"running, others": False, "batch, others": True}
    return cases | {"batch, copies": False, "running v batch": False}


# %% tags=["check"]
# @title Check your answer
by_batch = friend_scores([], "batch")
pairs = {
    "running, others": (alone, friend_scores(company(4, 1), "running")),
    "batch, others": (by_batch, friend_scores(company(4, 1), "batch")),
    "batch, copies": (by_batch, friend_scores([friend] * 3, "batch")),
    "running v batch": (alone, by_batch),
}
real = {name: bool((a - b).abs().mean() > 1e-3) for name, (a, b) in pairs.items()}
predicted = differs()
assert set(predicted) == set(real), f"the keys should be {sorted(real)}"
off = [name for name in real if predicted[name] != real[name]]
assert not off, f"call friend_scores yourself and compare: {off}"
print("right in all four")

# %% [markdown] tags=["answer"]
# Copies add nothing new, so mean and variance stay. But even alone, a slice that is normalised by
# itself is not the slice that the detector was trained to read.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Let the statistics move
#
# Kind: experiment, **
#
# Write `move_statistics(model, pictures)`: it sends the pictures through the detector's backbone once,
# as one batch, so that batch normalisation updates its running values, while no weight changes, and
# leaves the model in eval mode. Then use it on a copy of `models["heads"]` with ten batches of
# training slices. How many validation slices get another class?
#
# Hint: `model.train()` will not help; which mode does the detector keep? The backbone takes
# `model.detector.transform(pictures)[0].tensors`.


# %% tags=["starter"]
def move_statistics(model, pictures):
    raise NotImplementedError("update running values, and nothing else")


# %% tags=["solution"]
# @title Solution
def move_statistics(model, pictures):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    with torch.no_grad():
        _ = model.detector.backbone(model.detector.transform(pictures)[0].tensors)
    _ = model.eval()


model = copy.deepcopy(models["heads"])
frozen = evaluate_classifier(model, held_out, progress=False)
for chosen in epoch_batches(len(live), 10, epoch=0, seed=SEED):
    move_statistics(model, [live[i][0].to(device) for i in chosen])
updated = evaluate_classifier(model, held_out, progress=False)
other = (frozen["predictions"] != updated["predictions"]).float().mean()
print(f"accuracy {frozen['accuracy']:.1%} before, {updated['accuracy']:.1%} after;")
print(f"{other:.1%} of the slices get another class")


# %% tags=["wrong"]
def move_statistics(model, pictures):
    _ = model.train()
    with torch.no_grad():
        _ = model.ranked_boxes(pictures)
    _ = model.eval()


# %% tags=["wrong"]
def move_statistics(model, pictures):
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    with torch.no_grad():
        _ = model.detector.backbone(model.detector.transform(pictures)[0].tensors)


# %% tags=["check"]
# @title Check your answer
probe = fresh()
before = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
move_statistics(probe, images[:2])
state = probe.state_dict()
weights = [name for name, _ in probe.named_parameters()]
kept_weights = [torch.equal(state[name], before[name]) for name in weights]
assert all(kept_weights), "a weight has changed; only running values should"
batches_seen = [name for name in state if name.endswith("num_batches_tracked")]
steps_made = {int(state[name] - before[name]) for name in batches_seen}
assert steps_made != {0}, "no running value has moved: which mode have the layers?"
assert steps_made == {1}, "send the pictures through once, as one batch"
assert not any(m.training for m in probe.modules()), "leave the model in eval mode"
print("right: the running values moved, and nothing else")

# %% [markdown] tags=["answer"]
# No weight has changed, only means and variances. They came from slices of COVID-19 patients; now they
# come from slices of all three classes. Each channel is shifted and scaled, so the rows change, and
# $S$ was trained on the old ones. Look at the predictions and not at the accuracy alone: it can stay
# the same, or even rise, while many slices get another class.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · A regime of your own
#
# Kind: write a function, **
#
# Between heads and full, there is "S and the box branch": $S$, box head and box predictor learn, and
# everything else is frozen. Write `set_box_regime(model)`. It sets `requires_grad` of every parameter
# of the model, which may come from another regime, and returns the list of those that learn.
#
# Hint: Freeze everything first. The box branch is `model.detector.roi_heads.box_head` and
# `.box_predictor`.


# %% tags=["starter"]
def set_box_regime(model):
    raise NotImplementedError("freeze everything, then choose")


# %% tags=["solution"]
# @title Solution
def set_box_regime(model):
    heads = model.detector.roi_heads
    model.requires_grad_(False)
    for part in (model.s, heads.box_head, heads.box_predictor):
        part.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


trained = set_box_regime(fresh())
print(f"{sum(p.numel() for p in trained):,} numbers learn")


# %% tags=["wrong"]
def set_box_regime(model):
    heads = model.detector.roi_heads
    parts = (model.s, heads.box_head, heads.box_predictor)
    for part in parts:
        part.requires_grad_(True)
    return [p for part in parts for p in part.parameters()]


# %% tags=["wrong"]
def set_box_regime(model):
    model.requires_grad_(False)
    for part in (model.s, model.detector.rpn.head, model.detector.roi_heads):
        part.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


# %% tags=["wrong"]
def set_box_regime(model):
    model.requires_grad_(False)
    model.detector.roi_heads.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


# %% tags=["check"]
# @title Check your answer
probe = fresh()
_ = set_regime(probe, "full")
returned = {id(p) for p in set_box_regime(probe)}
learning = {n for n, p in probe.named_parameters() if p.requires_grad}
still = any("backbone" in n for n in learning)
assert not still, "the backbone, which learned before, still does"
assert not any("rpn" in n for n in learning), "the RPN is not part of the box branch"
assert any(n.startswith("s.") for n in learning), "S does not learn"
for part in ("box_head", "box_predictor"):
    assert any(part in n for n in learning), f"{part} does not learn"
same = returned == {id(p) for p in probe.parameters() if p.requires_grad}
assert same, "return exactly the parameters that require a gradient"
print("right: S and the box branch, and nothing else")

# %% [markdown] tags=["answer"]
# Here the maps of a slice are constants and the rows are not, so you could keep the maps. They are much
# larger than rows.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · Fold a frozen batch norm into its convolution
#
# Kind: write a function, ***
#
# In eval mode a batch norm is a straight line for each channel, and a convolution without bias comes
# before it. Two linear steps are one. Write `folded(weight, norm)` for the weights [out, in, k, k] of
# such a convolution and the batch-norm layer `norm` behind it: it returns the weight and the bias of
# one convolution that does the work of both. The package does so before it predicts.
#
# Hint: Which axis of `weight` counts the channels that `norm` scales?


# %% tags=["starter"]
def folded(weight, norm):
    raise NotImplementedError("a weight [out, in, k, k] and a bias [out]")


# %% tags=["solution"]
# @title Solution
def folded(weight, norm):
    a = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * a[:, None, None, None], norm.bias - a * norm.running_mean


with torch.no_grad():
    picture = segmenter.transform([friend])[0].tensors
    joined = folded(body.conv1.weight, body.bn1)
    at_once = nn.functional.conv2d(picture, *joined, stride=2, padding=3)
    difference = (at_once - body.bn1(body.conv1(picture))).abs().max()
    print(f"largest difference: {difference:.0e}")


# %% tags=["wrong"]
def folded(weight, norm):
    a = norm.weight / (norm.running_var + norm.eps)
    return weight * a[:, None, None, None], norm.bias - a * norm.running_mean


# %% tags=["wrong"]
def folded(weight, norm):
    a = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * a[None, :, None, None], norm.bias - a * norm.running_mean


# %% tags=["wrong"]
def folded(weight, norm):
    a = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * a[:, None, None, None], norm.bias


# %% tags=["check"]
# @title Check your answer
torch.manual_seed(1)
toy, toy_norm = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4).eval()
with torch.no_grad():
    for name in ("weight", "bias", "running_mean", "running_var"):
        _ = getattr(toy_norm, name).copy_(torch.rand(4) + 0.2)
    inputs = torch.rand(2, 4, 5, 5)
    expected = toy_norm(toy(inputs))
    new_weight, new_bias = folded(toy.weight, toy_norm)
    shapes = new_weight.shape == toy.weight.shape and new_bias.shape == (4,)
    assert shapes, "weight and bias should be [out, in, k, k] and [out]"
    got = nn.functional.conv2d(inputs, new_weight, new_bias)
    shift = (got - expected).mean((0, 2, 3), keepdim=True)
    constant = torch.allclose(got - shift, expected, atol=1e-5)
    same = torch.allclose(got, expected, atol=1e-5)
    assert same or not constant, "right but for one number a channel: look at the bias"
    assert same, "the maps differ: is it the square root, or the axis of the channels?"
print("one convolution does the work of both")

# %% [markdown]
# ## What we learned
#
# 1. A regime is a list of parameters: $S$; $S$ with every $\gamma$ and $\beta$; or all. The state
#    dict shows whether the list was kept.
# 2. "Full" does not train the RPN, because proposals are detached and its own losses are off.
# 3. In eval mode batch normalisation uses stored statistics: one line for each channel, and a result
#    that does not depend on the neighbours in the batch. So the detector stays in eval mode.
# 4. Adam's first step has the size of the learning rate whatever the gradient, so a rate that suits a
#    random $S$ can be too large for trained convolutions.
# 5. What a regime gains in accuracy, the detector may lose in lesions found, so measure both.
#
# ## Further reading
#
# {cite:t}`TerSarkisov2020` trains the three regimes; sections 3.2 and 4 are on two pages.
# {cite:t}`Ioffe2015` introduces batch normalisation and says what its statistics are at test time.
# {cite:t}`Kingma2015` is Adam; the size of its steps is the subject of their section 2.1.
# {cite:t}`Ren2015` trains the RPN and the detector that reads its proposals, and discusses why the
# proposals' coordinates get no gradient.
