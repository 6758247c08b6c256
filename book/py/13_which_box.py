# %% [markdown]
# # 13 · Which box decided?
#
# A classifier calls a slice COVID-19, and the doctor who reads its answer wants to know why. Module $S$
# reads a list of boxes, so we can ask which of them made the difference. For an ordinary classifier,
# people draw heat maps. On phantoms we can check such explanations, because we can take the lesions out
# of a patient and leave everything else as it was. **Does an explanation point at the lesion, and if it
# does, is that a reason to trust it?**

# %% tags=["fold"] mystnb={"image": {"alt": "Two synthetic chest slices of the same patient. Left, with lesions: the five boxes that speak most for the answer lie on lesions. Right, the same slice without lesions, with the five boxes that speak most for its answer."}, "figure": {"caption": "Our old friend, and the same patient without lesions. Drawn are the five boxes that speak most for what S answers; the number is what a box contributes to the logit, written once where boxes lie on each other. Synthetic."}}
# @title Import, print versions, and draw the old friend with and without lesions
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torchvision.models.resnet import BasicBlock

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import (
    FRIEND,
    SliceImages,
    make_patient,
    render,
    write_phantoms,
)
from covidmask.datasets.patients import FRIEND_POSITION, draw_positions
from covidmask.metrics import bootstrap, wilson
from covidmask.models import (
    ClassificationModule,
    encoded_rows,
    pad_rows,
    propose,
    rank_boxes,
    run_box_head,
    trained_classifier,
)
from covidmask.training import classification_loss

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")


def draw_friend():
    """Both slices, each with the boxes that speak most for the answer of S."""
    model = trained_classifier("quick", device, shipped=True)
    friend = make_patient(*FRIEND)
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    for ax, patient in zip(axes, (friend, replace(friend, lesions=())), strict=True):
        picture, _ = render(patient, FRIEND_POSITION, 128)
        batch = [torch.from_numpy(picture).expand(3, -1, -1).to(device)]
        with torch.no_grad():
            features, proposals, shapes = propose(model.detector, batch)
            heads = run_box_head(model.detector, features, proposals, shapes)
            parts = [part[0] for part in (*heads, proposals)]
            coder = model.detector.roi_heads.box_coder
            ranking = rank_boxes(*parts, shapes[0], coder, model.config)
        rows = model.ranked_boxes(batch).detach().requires_grad_()
        logits = model.s(rows)[0]
        answer = int(logits.argmax())
        (slope,) = torch.autograd.grad(logits[answer], rows)
        share = (slope * rows).sum(2)[0].detach().cpu()
        _ = plotting.show_slice(picture, ax)
        written = []  # where there is text, that more would cover
        for k in share.argsort(descending=True)[:5].tolist():
            label = f"{share[k]:.2f}"
            k = k * min(len(ranking.box), len(share)) // len(share)  # padded
            x1, y1, x2, y2 = ranking.box[k].cpu().tolist()
            style = {"fill": False, "edgecolor": plotting.ORANGE, "lw": 1.5}
            corner = x1 - 0.5, y1 - 0.5
            _ = ax.add_patch(plt.Rectangle(corner, x2 - x1, y2 - y1, **style))
            if all(abs(x1 - x) > 16 or abs(y1 - y) > 8 for x, y in written):
                text = {"color": plotting.ORANGE, "fontsize": 9}
                _ = ax.text(x1, y1 - 1, label, **text)
                written.append((x1, y1))
        probability = logits[answer].sigmoid().item()
        kind = "with" if patient.lesions else "without"
        title = f"{kind} lesions: {IMAGE_CLASSES[answer]}, {probability:.2f}"
        _ = ax.set_title(title, fontsize=10)


draw_friend()
plt.show()

# %% [markdown]
# **After it you can**
#
# - say what each ranked box contributes to a logit, by gradient × input and by occlusion;
# - say why two such methods agree, and why that alone proves little;
# - draw a Grad-CAM of an ordinary classifier from its parts;
# - compare an explanation with a baseline, and with random weights;
# - take the cause itself away and count how often the answer turns.
#
# **You need** [chapter 6](06_ranked_boxes.ipynb) (ranked boxes), [chapter
# 7](07_covid_ct_mask_net.ipynb) (module $S$) and Wilson's interval of [chapter
# 10](10_evaluation.ipynb). **Time:** reading 25 min, exercises 60 min, running 2 min on two CPU cores
# in the preset `quick`. (The first chapter that you run also draws the phantoms, which takes a few
# minutes once.)
#
# ```{admonition} Synthetic data
# :class: important
# Every slice is a *phantom*, drawn by formulas and random numbers ([how](phantoms_made.ipynb)). No
# number below is a result on patients, and nothing here is for diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
PAIRS = 80  # patients of each class
LOOKS = 9000  # slices shown to the ordinary classifier
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# ## The same patient without lesions
#
# The program that draws phantoms keeps a patient's anatomy and lesions apart. So we can draw a slice
# twice, with the same ribs, vessels, scanner and noise, once with the lesions and once without. No
# clinic can offer us that. (Two signs stay, since the program counts them to the vessels: tiny buds at
# the ends of airways in some pneumonias, and thin curves below the pleura in some COVID-19.)

# %%
preset = PRESETS[PRESET]
size = preset.phantoms.size


def draw_pair(seed, label):
    """One slice with lesions, the same without, and the mask."""
    patient = make_patient(seed, label)
    position = draw_positions(patient, 1)[0]
    image, mask = render(patient, position, size)
    spared, _ = render(replace(patient, lesions=()), position, size)
    return image, spared, mask


ill = [draw_pair(9000 + i, k) for k in (1, 2) for i in range(PAIRS)]
images, spared, masks = (np.stack(part) for part in zip(*ill, strict=True))
controls = np.stack([draw_pair(9000 + i, 0)[0] for i in range(PAIRS)])
labels = torch.tensor([1, 2]).repeat_interleave(PAIRS)  # [M]
print(f"{len(images)} slices with lesions, and as many without,")
print(f"{len(controls)} of controls; each patient gives one slice")

# %% [markdown]
# The classifier is the one that comes with the package; none of these patients was used to train it.
# We take the ranking apart as in [chapter 11](11_what_makes_it_work.ipynb), because besides the rows we
# want to know where each box lies.

# %%
model = trained_classifier(PRESET, device, shipped=True)
detector, config, N = model.detector, model.config, model.config.n_boxes
s = model.s.cpu()  # S is small, and so are the rows


@torch.no_grad()
def look(pictures):
    """Rows [M, N, 5] and boxes [M, N, 4] of slices [M, H, W]."""
    rows, boxes = [], []
    for part in torch.from_numpy(pictures).split(16):
        batch = [one.expand(3, -1, -1).to(device) for one in part]
        features, proposals, shapes = propose(detector, batch)
        heads = run_box_head(detector, features, proposals, shapes)
        for one in zip(*heads, proposals, shapes, strict=True):
            found = rank_boxes(*one, detector.roi_heads.box_coder, config)
            logits, deltas = one[0][found.roi], one[1][found.roi]
            row = encoded_rows(logits, deltas, found.label)
            rows.append(pad_rows(row, N).cpu())
            boxes.append(pad_rows(found.box, N).cpu())
    return torch.stack(rows), torch.stack(boxes)


# %%
rows, boxes = look(images)
rows_spared, _ = look(spared)
healthy, _ = look(controls)
first = torch.from_numpy(images[0]).expand(3, -1, -1).to(device)
with torch.no_grad():
    again = model.ranked_boxes([first])[0].cpu()
    logits = s(rows)  # [M, 3]
assert torch.allclose(rows[0], again, atol=1e-5), "as the package ranks"
called = logits.argmax(1)  # [M], what S answers
right = called == labels
share_right = right.float().mean()
print(f"S is right on {share_right:.0%} of the slices with lesions")

# %% [markdown]
# ## Gradient × input
#
# The logit $\hat y_k$ of a class $k$ is a function of $5N$ numbers. Its gradient says how steeply the
# logit rises with each of them. Multiply the gradient by the number itself, add up the five numbers
# of a row, and you have a first idea of what row $i$ contributes:
#
# $$ a_i = \sum_{j=1}^{5} r_{ij}\, \frac{\partial \hat y_k}{\partial r_{ij}}. $$
#
# We call $a_i$ the *contribution* of box $i$. Positive ones speak for the class, negative ones against it.


# %%
def gradient_times_input(s, rows, classes):
    """What rows [M, N, 5] give the logits of `classes`: [M, N]."""
    rows = rows.clone().requires_grad_()
    chosen = s(rows).gather(1, classes[:, None])
    (slope,) = torch.autograd.grad(chosen.sum(), rows)
    return (slope * rows).sum(2).detach()


given = {"gradient": gradient_times_input(s, rows, called)}

# %% [markdown]
# Do the contributions add up to the logit? Nearly. $S$ is made of linear layers and ReLUs. If we double its
# inputs *and* its biases, the output doubles, and for such functions Euler's theorem says that
# values times slopes, summed over inputs and biases, give the output. What the boxes do not explain
# is therefore exactly the part of the biases.

# %% tags=["nbval-check-output"]
biases = [p for name, p in s.named_parameters() if name.endswith("bias")]
logit = s(rows[:1])[0, called[0]]
slopes = torch.autograd.grad(logit, biases)
of_biases = sum((g * b).sum() for g, b in zip(slopes, biases, strict=True))
total = given["gradient"][0].sum() + of_biases
assert torch.isclose(total, logit, atol=1e-3)
print("boxes + biases = logit")

# %% [markdown]
# ## Occlusion
#
# Another way is to take a box away and see what happens {cite:p}`Zeiler2014`. But a vector of $5N$
# numbers has no hole where a box is missing, so we must put something in its place. Three choices:
#
# - **healthy**: the average row of that rank in healthy slices;
# - **zero**: a row of zeros, which is what the package writes for a slice without any box;
# - **delete**: the boxes behind move up by one rank, and the end is padded.

# %%
reference = healthy.mean(0)  # [N, 5], the average healthy slice


def put_healthy(one, i):
    return torch.cat([one[:i], reference[i : i + 1], one[i + 1 :]])


def put_zero(one, i):
    return torch.cat([one[:i], torch.zeros(1, 5), one[i + 1 :]])


def delete(one, i):
    return pad_rows(torch.cat([one[:i], one[i + 1 :]]), N)


# %%
@torch.no_grad()
def occlusion(s, rows, classes, change):
    """How far the logit falls when a row is changed: [M, N]."""
    falls = []
    for one, k in zip(rows, classes, strict=True):
        changed = torch.stack([change(one, i) for i in range(N)])
        values = s(torch.cat([one[None], changed]))[:, k]  # [1 + N]
        falls.append(values[0] - values[1:])
    return torch.stack(falls)


changes = {"healthy": put_healthy, "zero": put_zero, "delete": delete}
for name, change in changes.items():
    given[name] = occlusion(s, rows, called, change)

# %% tags=["fold"] mystnb={"image": {"alt": "Contributions of the boxes against their rank, averaged over slices called common pneumonia and over slices called COVID-19, for gradient times input, occlusion by a healthy row, and deletion."}, "figure": {"caption": "Mean contribution of each rank, over slices that S calls right. Gradient and healthy have similar curves; deletion goes its own way. Synthetic."}}
# @title Draw the mean contribution of each rank
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
looks = (
    ("gradient", plotting.BLUE, "-", "o"),
    ("healthy", plotting.ORANGE, "--", "s"),
    ("delete", plotting.VERMILLION, ":", "^"),
)
for ax, k in zip(axes, (1, 2), strict=True):
    for name, colour, line, marker in looks:
        mean = given[name][right & (labels == k)].mean(0)
        style = {"color": colour, "ls": line, "marker": marker, "ms": 3}
        _ = ax.plot(range(1, N + 1), mean, label=name, **style)
    _ = ax.axhline(0, color="black", lw=0.8)
    _ = ax.set(xlabel="Rank of the box (1 is the best score)")
    _ = ax.set_title(IMAGE_CLASSES[k], fontsize=10)
_ = axes[0].set_ylabel("Contribution to the logit (no unit)")
_ = axes[0].legend(fontsize=9)
plt.show()

# %% [markdown]
# For common pneumonia, look at the left end: the first boxes carry the answer. For COVID-19 the first
# box carries little, and the ones behind it more. That makes sense for phantoms, where pneumonia mostly
# has two or three lesions and COVID-19 many: what tells them apart is not whether there is a first
# lesion, but whether there is a fifth. And a healthy row in its place takes less from the first box than
# gradient × input gives it: a healthy slice has a first box, too, and its score is not 0.
#
# ## Do the methods agree?
#
# For each slice we rank its boxes by contribution, once by each method, and take Spearman's correlation of
# the two rankings: 1 if they are the same, 0 if they have nothing to do with each other. Then we
# average over slices, with an interval that draws slices (one a patient) with replacement.


# %%
def agreement(one, other):
    """Mean rank correlation of two [M, N], with a 95 % interval."""
    pairs = zip(one.numpy(), other.numpy(), strict=True)
    values = np.array([spearmanr(a, b)[0] for a, b in pairs])
    low, high = bootstrap(len(values), lambda drawn: values[drawn].mean())
    return values.mean(), low, high


for name in ("healthy", "zero", "delete"):
    mean, low, high = agreement(given["gradient"], given[name])
    print(f"gradient and {name:8} {mean:+.2f}  ({low:+.2f} to {high:+.2f})")

# %% [markdown]
# It would be a mistake to read the high numbers as "two methods confirm each other". One row more or
# less hardly moves $S$ out of the region in which it is linear, and for a linear function gradient ×
# input and occlusion by zero are the same thing (exercise 1). They agree because they ask the same
# question. Deletion asks another one: every box behind the deleted one gets a new rank, and with it
# other weights. So "what is the box worth?" has no answer until we say what stands in its place.
#
# ## How much does the answer depend on them?
#
# Contributions claim that some boxes matter more than others. If that is true, $S$ should lose its answer
# sooner when we replace boxes in the order of their contributions than when we do so at random. We put
# healthy rows in the place of 1, 2, 4, ... boxes and count the slices whose answer stays.


# %%
def kept(order, count):
    """Share of the answers that stay: `count` rows made healthy."""
    changed = rows.clone()
    for one, ranks in zip(changed, order[:, :count], strict=True):
        one[ranks] = reference[ranks]
    with torch.no_grad():
        return (s(changed).argmax(1) == called).float().mean().item()


generator = torch.Generator().manual_seed(SEED)
most = given["gradient"].argsort(1, descending=True)
orders = {
    "largest contribution first": most,
    "best score first": torch.arange(N).expand(len(rows), N),
    "random": torch.rand(len(rows), N, generator=generator).argsort(1),
}
counts = [0, 1, 2, 4, 8, 16, N]
curves = {name: [kept(o, k) for k in counts] for name, o in orders.items()}

# %% tags=["fold"] mystnb={"image": {"alt": "Three falling curves: the share of answers that stay, against the number of boxes replaced by healthy rows, in the order of contributions, of scores, and at random. That of contributions falls fastest, the random one slowest."}, "figure": {"caption": "Share of the answers that stay when boxes are replaced by healthy rows. Bars: 95 % intervals by Wilson. Synthetic."}}
# @title Draw how many answers stay
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
looks = (
    (plotting.BLUE, "-", "o"),
    (plotting.ORANGE, "--", "s"),
    (plotting.GREEN, ":", "^"),
)
for (name, values), look_of in zip(curves.items(), looks, strict=True):
    colour, line, marker = look_of
    ends = np.array([wilson(round(v * len(rows)), len(rows)) for v in values])
    bars = np.abs(ends.T - np.array(values))
    style = {"color": colour, "ls": line, "marker": marker, "capsize": 3, "label": name}
    _ = ax.errorbar(range(len(counts)), values, bars, **style)
_ = ax.set_xticks(range(len(counts)), list(map(str, counts)))
_ = ax.set(xlabel="Boxes replaced by healthy rows", ylim=(0, 1.03))
_ = ax.set_ylabel("Answers that stay (share)")
_ = ax.legend(fontsize=9)
plt.show()

# %% [markdown]
# Contributions pass this test: their curve falls first. It is a test of faithfulness to the *model*. Whether
# the model is right about the *patient* is another question.
#
# Now for larger changes. We shuffle all rows of a slice, give it the deltas of another slice, or give
# it the scores of another slice.

# %%
drawn = torch.randperm(len(rows), generator=generator)
shuffled = [one[torch.randperm(N, generator=generator)] for one in rows]
other = rows[drawn]  # of another slice
swaps = {
    "rows shuffled": torch.stack(shuffled),
    "deltas of another": torch.cat([rows[..., :1], other[..., 1:]], 2),
    "scores of another": torch.cat([other[..., :1], rows[..., 1:]], 2),
}
for name, changed in swaps.items():
    with torch.no_grad():
        same = int((s(changed).argmax(1) == called).sum())
    low, high = wilson(same, len(rows))
    print(f"{name:18} {same / len(rows):.0%} keep their answer", end="")
    print(f"  ({low:.0%} to {high:.0%})")

# %% [markdown]
# The order is part of the message: $S$ has other weights for each rank, so a shuffled list is one that it
# never met in training. With the deltas of another slice most answers stay; in the run shown here they
# bear a swap better than scores do. (The other slice often has the same disease, so some answers would
# stay anyway.) [Chapter 11](11_what_makes_it_work.ipynb) asks with ablations what each column is worth.
#
# ## An ordinary classifier, and its heat map
#
# For comparison we train a small network on whole slices: one convolution, three residual blocks of
# torchvision, the mean over all places, one linear layer. It gets the class of each slice, no masks and
# no boxes, and the same loss as $S$.


# %%
def block(inputs, outputs, stride):
    """A residual block of torchvision; the shortcut adapts the size."""
    shortcut = None
    if inputs != outputs:
        convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut)


def small_net():
    """Slices [M, 1, H, W]; body: maps [M, 96, h, w]; head: [M, 3]."""
    stem = nn.Conv2d(1, 24, 3, stride=2, padding=1, bias=False)
    stem = stem, nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)
    blocks = block(24, 24, 1), block(24, 48, 2), block(48, 96, 2)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 3)
    parts = nn.Sequential(*stem, *blocks), nn.Sequential(*head)
    return nn.Sequential(*parts).to(device)


# %% tags=["fold"]
# @title Read the training slices
root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
train = SliceImages(root / "slices", "train")
chosen = range(0, len(train), 2)  # every second slice will do
codes = torch.stack([(train[i][0][:1] * 255).round().byte() for i in chosen])
truth = torch.tensor([train.labels[i] for i in chosen])
print(f"{len(codes)} training slices of {len(set(train.patients))} patients")


# %%
def fit_net(net, batch=32, rate=4e-3):
    """Train on LOOKS slices; half of them mirrored."""
    steps = LOOKS // batch
    order = torch.cat([torch.randperm(len(codes)) for _ in range(9)])
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for some in order[: steps * batch].split(batch):
        x = codes[some].to(device) / 255 - 0.5
        x = x.flip(3) if torch.rand(()) < 0.5 else x
        loss = classification_loss(net(x), truth[some].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    return net.eval()


torch.manual_seed(SEED)
net = fit_net(small_net())


# %%
def ready(pictures):
    """Slices [M, H, W] as the network reads them."""
    return torch.from_numpy(pictures)[:, None].to(device) - 0.5


@torch.no_grad()
def answers(pictures):
    """Classes [M] that the ordinary classifier gives slices [M, H, W]."""
    return net(ready(pictures)).argmax(1).cpu()


net_called = answers(images)
net_right = net_called == labels
print(f"with lesions, right: S {right.float().mean():.0%},", end=" ")
print(f"ordinary classifier {net_right.float().mean():.0%}")

# %% [markdown]
# *Grad-CAM* {cite:p}`Selvaraju2017` asks which of the last feature maps speak for class $c$: it takes
# the gradient of the logit with respect to each map, averages it over all places to one weight a map,
# adds up the weighted maps, and drops what is negative. As our head is a mean and a linear layer, the
# weights must be those of that layer, divided by the number of places. We check that.


# %%
def grad_cam(net, pictures, classes):
    """Heat maps [M, h, w], at least 0, for the logits of `classes`."""
    body, head = net
    with torch.no_grad():
        maps = body(ready(pictures))  # [M, 96, h, w]
    maps.requires_grad_()
    chosen = head(maps).gather(1, classes[:, None].to(device))
    (slope,) = torch.autograd.grad(chosen.sum(), maps)
    weight = slope.mean((2, 3), keepdim=True)  # [M, 96, 1, 1]
    return (weight * maps).sum(1).relu().detach().cpu(), weight[..., 0, 0]


heat, weight = grad_cam(net, images, net_called)
places = heat.shape[1] * heat.shape[2]
linear = net[1][2].weight.detach()  # [3, 96]
assert torch.allclose(weight, linear[net_called] / places, atol=1e-6)
print("a heat map has", " x ".join(map(str, heat.shape[1:])), "places")

# %% tags=["fold"] mystnb={"image": {"alt": "Three synthetic slices of COVID-19 phantoms with the outlines of their lesions, a heat map of the ordinary classifier over them, and a cross at its maximum; an orange box is the one that contributes most to the logit of S."}, "figure": {"caption": "Three COVID-19 phantoms that both models call right. Bright: Grad-CAM; cross: its maximum; orange box: largest contribution, S; white: outlines of the lesions. Synthetic."}}
# @title Draw heat maps and the strongest boxes of three slices
wide = nn.functional.interpolate(heat[:, None], size=size, mode="bilinear")[:, 0]
both = torch.where(right & net_right & (labels == 2))[0][:3].tolist()
fig, axes = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained", squeeze=False)
for ax, i in zip(axes[0], both, strict=False):
    _ = ax.imshow(images[i], cmap="gray", vmin=0, vmax=1)
    _ = ax.imshow(wide[i], cmap="cividis", alpha=0.45)
    _ = ax.contour(masks[i] >= 2, [0.5], colors="white", linewidths=1)
    y, x = np.unravel_index(int(wide[i].argmax()), wide[i].shape)
    _ = ax.plot(x, y, "x", color=plotting.VERMILLION, ms=10, mew=2.5)
    x1, y1, x2, y2 = boxes[i, given["gradient"][i].argmax()].tolist()
    style = {"fill": False, "edgecolor": plotting.ORANGE, "lw": 2}
    corner = x1 - 0.5, y1 - 0.5
    _ = ax.add_patch(plt.Rectangle(corner, x2 - x1, y2 - y1, **style))
    _ = ax.set(xlabel="x (pixels)", ylabel="y (pixels)")
plt.show()

# %% [markdown]
# ## Does it point at a lesion?
#
# Three pictures convince nobody. The *pointing game* {cite:p}`Zhang2016pointing` counts: take the
# strongest point of each explanation and see whether it lies on a lesion, or no further than a few
# pixels from one. For $S$ the point is the middle of the box that contributes most, for Grad-CAM the
# maximum of the heat map.
#
# A count needs something to compare it with, so there are baselines. For $S$: the box with the best
# *score*, which needs no explanation at all, and a box drawn at random from the list. For the heat map:
# a network with random weights, and a point drawn at random in the lungs.

# %%
TOLERANCE = size // 32  # pixels
lesion = torch.from_numpy(masks >= 2).float()
near = nn.functional.max_pool2d(lesion, 2 * TOLERANCE + 1, 1, TOLERANCE) > 0


def on_lesion(x, y):
    """Whether points, pixels [M], lie on a lesion or near one."""
    x, y = (v.long().clamp(0, size - 1) for v in (x, y))
    return near[torch.arange(len(near)), y, x]


# %% tags=["fold"]
# @title Points: the middle of a box, and the maximum of a heat map
def middle(ranks):
    """The middles of one box of each slice: x and y, [M]."""
    x1, y1, x2, y2 = boxes[torch.arange(len(boxes)), ranks].T
    return (x1 + x2) / 2, (y1 + y2) / 2


def maximum(heat):
    """Where heat maps [M, h, w] are largest: x and y in pixels, [M]."""
    cell, at = size / heat.shape[1], heat.flatten(1).argmax(1)
    x, y = at % heat.shape[2], at // heat.shape[2]
    return (x + 0.5) * cell, (y + 0.5) * cell


# %%
torch.manual_seed(SEED)
fresh_net = small_net().eval()  # random weights
fresh_heat, _ = grad_cam(fresh_net, images, net_called)
lung = torch.from_numpy(masks >= 1).flatten(1).float()
spot = torch.multinomial(lung, 1, generator=generator)[:, 0]
any_box = torch.randint(N, (len(rows),), generator=generator)
points = {
    "S, largest contribution": (right, middle(given["gradient"].argmax(1))),
    "S, best score": (right, middle(torch.zeros(len(rows), dtype=int))),
    "S, any of its boxes": (right, middle(any_box)),
    "Grad-CAM": (net_right, maximum(heat)),
    "Grad-CAM, random weights": (net_right, maximum(fresh_heat)),
    "any point of the lungs": (net_right, (spot % size, spot // size)),
}
hits = {}  # of slices that the model calls right
for name, (chosen, point) in points.items():
    for k in (1, 2):
        found = on_lesion(*point)[chosen & (labels == k)]
        hits[name, k] = int(found.sum()), max(len(found), 1)

# %% tags=["fold"] mystnb={"image": {"alt": "Six rows of points with intervals, for common pneumonia and COVID-19: how often the strongest point of an explanation lies on a lesion, for S, for Grad-CAM, and for their baselines."}, "figure": {"caption": "How often the strongest point lies on a lesion or close to one, over slices called right, with 95 % intervals by Wilson. Synthetic."}}
# @title Draw how often each explanation hits, and print the counts
fig, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
looks = ((1, plotting.BLUE, "o", -0.13), (2, plotting.VERMILLION, "s", 0.13))
for k, colour, marker, shift in looks:
    for row, name in enumerate(points):
        count, total = hits[name, k]
        low, high = wilson(count, total)
        _ = ax.plot([low, high], [row + shift] * 2, color=colour, lw=2)
        label = IMAGE_CLASSES[k] if row == 0 else None
        style = {"color": colour, "ls": "none", "label": label}
        _ = ax.plot(count / total, row + shift, marker, **style)
_ = ax.set_yticks(range(len(points)), list(points))
_ = ax.set(xlabel="Share of slices with a hit", xlim=(0, 1.02))
_ = ax.set_ylim(len(points) - 0.5, -0.5)
_ = fig.legend(loc="outside upper center", ncols=2, fontsize=9)
plt.show()
for name in points:
    parts = [f"{IMAGE_CLASSES[k]} {hits[name, k]}" for k in (1, 2)]
    print(f"{name:25} {', '.join(parts)}  (hits, slices)")

# %% [markdown]
# The box with the largest contribution hits nearly always. Before you admire that, look one row down: so does
# the box with the best score, which knows nothing of $S$. It is the detector that finds lesions. For
# COVID-19 even a box drawn at random from the list hits often, because so many boxes lie on so many
# lesions. An explanation made of boxes that were drawn around lesions can hardly help pointing at one,
# so here the pointing game says little about $S$.
#
# The heat map tells two stories in the run shown here. For COVID-19 its maximum lies on a lesion more
# often than a random point of the lungs does. For common pneumonia it almost never does, and is no better
# than chance. A doctor who sees such a map would say that the network looks at the wrong things. Does it?
#
# ## Take the lesion out
#
# Pointing is not causing. So now the question that only phantoms can answer: what do the two models
# say about the *same* slices without their lesions? If the lesion decided, the answer should turn to
# Control, about as often as the model calls a real control so.

# %%
with torch.no_grad():
    of_s = called, s(rows_spared).argmax(1), s(healthy).argmax(1)
of_net = net_called, answers(spared), answers(controls)
turned = {}
for name, answered in (("S", of_s), ("ordinary", of_net)):
    before, after, of_control = answered
    for k in (1, 2):
        chosen = (labels == k) & (before == k)  # right with lesions
        count = int((after[chosen] == 0).sum())
        turned[name, IMAGE_CLASSES[k]] = count, max(int(chosen.sum()), 1)
    count = int((of_control == 0).sum())
    turned[name, "real controls"] = count, len(of_control)

# %% tags=["fold"]
# @title Print how often the answer turns to Control
for (name, group), (count, total) in turned.items():
    low, high = wilson(count, total)
    print(f"{name:9} {group:17} {count:3} of {total:3} called Control: ", end="")
    print(f"{count / total:.0%} ({low:.0%} to {high:.0%})")

# %% [markdown]
# Read each model's first two lines against its third: a slice without lesions cannot turn more reliably
# than the model recognises healthy slices at all. In the run shown here both models mostly turn, and in
# every line the interval overlaps with that of the real controls. The ordinary classifier turns nearly
# always, also for common pneumonia, where its heat map had pointed elsewhere.
#
# So the map was not evidence against the model. It is coarse, each place covering many pixels. And it
# shows what speaks *for* a class: to tell common pneumonia from COVID-19, it may count that most of the
# lung is free, and a free lung has no particular place. (This reading fits; we have not tested it.) The
# reverse holds for $S$: its explanation points at lesions nearly always, and yet some slices do not turn
# without them. There something else keeps the answer, as in the controls that $S$ calls ill: what the
# detector mistakes for a lesion, or the signs that we left in. A good picture is no proof of the cause.
#
# ## The test with random weights
#
# A last check costs a few lines. An explanation of *this* model should change when the model is
# replaced by one with random weights. {cite:t}`Adebayo2018` found well-liked methods whose pictures
# hardly changed, much as an edge detector's would. We compare the explanations of both
# models with those of models that have learned nothing.


# %% tags=["fold"]
# @title Compare with models of random weights
def same_places(one, other):
    """`agreement` of heat maps [M, h, w], where neither is flat."""
    one, other = one.flatten(1), other.flatten(1)
    varied = (one.std(1) > 0) & (other.std(1) > 0)
    return agreement(one[varied], other[varied])


torch.manual_seed(SEED)
fresh_s = ClassificationModule(N, config.hidden).eval()
fresh = gradient_times_input(fresh_s, rows, called)
strongest = rows[..., 0]  # the score of each box: no model of classes
for name, values in (
    ("contributions, S of random weights", agreement(given["gradient"], fresh)),
    ("contributions, scores of boxes", agreement(given["gradient"], strongest)),
    ("heat maps, random weights", same_places(heat, fresh_heat)),
):
    print(f"{name:36} {values[0]:+.2f}  ({values[1]:+.2f} to {values[2]:+.2f})")

# %% [markdown]
# Near 0 (or below it) means that the explanation depends on what was learned, which is what we want. It
# does not mean that the explanation is right: the heat map passes this test, too, and still points
# beside most pneumonias. The second line shows that contributions are more than a copy of the
# scores.
#
# ## What this does not show
#
# - **A contribution is not a cause.** It describes a function of numbers. We learned most about a slice by
#   changing it.
# - **The detector is not explained.** A box may be there because of a lesion or because of a vessel.
# - **The lesions are drawn.** Taking a formula out of a sum is easy; a real lesion pulls on vessels,
#   bends fissures (the gaps between the lobes) and comes with a patient who has a fever.
# - **One training run** of each model stands behind these numbers. The intervals cover other
#   patients, and not other seeds.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Gradient × input and occlusion by zero give nearly the same ranking of boxes. Why?**
#
# - [ ] Both have found the true cause. :: Two methods that ask the same question agree also when the question is the wrong one.
# - [ ] Both read the scores of the boxes. :: Both read S; the last table shows that contributions and scores do not rank boxes alike.
# - [x] One row less hardly leaves the region in which S is linear. :: For a linear function the two are equal.
#
# **2. What do the contributions of all boxes add up to?**
#
# - [x] The logit, less the part of the biases. :: S is linear in pieces, and Euler's theorem counts the biases among the inputs.
# - [ ] The probability of the class. :: The sigmoid comes after the logit, and contributions are made of the logit.
# - [ ] Always 1, or 100 %. :: Fractions of a whole would, but nothing scales these numbers.
#
# **3. The box with the largest contribution lies on a lesion in nearly all slices. What follows?**
#
# - [ ] S has learned what a lesion looks like. :: S never sees the image; the detector puts boxes on lesions.
# - [ ] S can be trusted on these slices. :: A box on a lesion can also speak for the wrong class.
# - [x] Little, since the box with the best score does so as well. :: Without the baseline the number would impress.
#
# **4. Why is deleting a row not the same as putting a healthy row in its place?**
#
# - [ ] Deleting changes the number of inputs of S. :: The list is padded to N rows again.
# - [x] All boxes behind it change their rank. :: S has other weights for every rank.
# - [ ] A healthy row has a score of 0. :: Healthy slices have boxes with scores, too; their mean is what we put in.
#
# **5. Which finding speaks most directly for the lesion as the cause of an answer?**
#
# - [ ] The heat map is bright on the lesion. :: It says where maps are active, and a coarse map is bright beside lesions, too.
# - [ ] Two explanations agree on the lesion. :: They can agree and be wrong together.
# - [x] Without the lesion the same slice is called Control. :: Only here was the lesion itself changed, and nothing else.
#
# **6. An explanation of a model with random weights looks the same as before. What does it show?**
#
# - [x] Something that does not depend on what was learned. :: Edges, for instance, or the shape of the lungs.
# - [ ] A robust method, as it does not depend on chance. :: An explanation of what was learned must change when that is gone.
# - [ ] A model that has not been trained for long. :: It may be trained as long as you like; the picture does not ask it.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · A linear S
#
# Kind: pencil, *
#
# Suppose that $S$ were one linear layer, so that a logit is $\sum_{i,j} w_{ij} r_{ij} + \text{bias}$.
# Work out on paper how far the logit falls when row $i$ is replaced by a healthy row, and when it is
# replaced by zeros. Which of the two equals gradient × input? Write the first as a function
# `fall(weights, row, healthy)` of three lists of five numbers.
#
# Hint: write both logits as sums. What stands in both cancels, the bias included.


# %% tags=["starter"]
def fall(weights, row, healthy):
    """Fall of a linear logit when `row` becomes `healthy`."""
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def fall(weights, row, healthy):
    """Fall of a linear logit when `row` becomes `healthy`."""
    return sum(w * (r - h) for w, r, h in zip(weights, row, healthy, strict=True))


print(fall([2, 0, 0, 0, 1], [0.9, 0, 0, 0, 1], [0.4, 0, 0, 0, 0]))


# %% tags=["wrong"]
def fall(weights, row, healthy):
    return sum(w * r for w, r in zip(weights, row, strict=True))


# %% tags=["wrong"]
def fall(weights, row, healthy):
    return sum(w * (h - r) for w, r, h in zip(weights, row, healthy, strict=True))


# %% tags=["check"]
# @title Check your answer
_w, _r = [1.0, -2.0, 0.5, 0.0, 3.0], [0.8, 1.0, -1.0, 2.0, 0.5]
_h = [0.3, 0.0, 0.0, 1.0, 0.5]
_layer = nn.Linear(5, 1)
with torch.no_grad():
    _ = _layer.weight.copy_(torch.tensor([_w]))
    _true = (_layer(torch.tensor(_r)) - _layer(torch.tensor(_h))).item()
assert fall(_w, _r, _r) == 0, "if the healthy row is the same, nothing may change"
_product = sum(a * b for a, b in zip(_w, _r, strict=True))
assert abs(fall(_w, _r, [0] * 5) - _product) < 1e-6, (
    "with zeros in its place, the fall is gradient x input; a fall is before less after"
)
assert abs(fall(_w, _r, _h) - _true) < 1e-5, "a linear layer disagrees: use both rows"

# %% [markdown] tags=["answer"]
# The fall is $\sum_j w_{ij} (r_{ij} - h_{ij})$, with $h$ for the healthy row. With zeros in its place it is
# $\sum_j w_{ij} r_{ij}$, and as the gradient of a linear function is $w$, this is gradient × input.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · The lower half
#
# Kind: predict, then run, *
#
# Replace the `N // 2` boxes with the *lowest* scores of each slice by healthy rows. Write down first: what
# share of the answers of $S$ stays? Then run it, with an interval, and do the same for the first `N // 2`.
#
# Hint: `kept(order, count)` takes any order of the ranks; `wilson` wants a whole number of slices.

# %% tags=["solution"]
# @title Solution
backwards = torch.arange(N).flip(0).expand(len(rows), N)
half = N // 2
for name, order in (("last", backwards), ("first", orders["best score first"])):
    same = round(kept(order, half) * len(rows))
    low, high = wilson(same, len(rows))
    print(f"{name:5} {half}: {same / len(rows):.0%} stay ({low:.0%} to {high:.0%})")

# %% [markdown] tags=["answer"]
# Most answers survive without the lower half, though not all: it is read, but it decides only where
# the rest leaves the matter open. Without the upper half few answers survive.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Chance in the pointing game
#
# Kind: write a function, **
#
# We drew one random point in the lungs of each slice. You can do better and compute the probability
# exactly. Write `chance(mask, tolerance)`, which takes a mask [H, W] (0 background, 1 lung, 2 and 3
# lesions) and returns the probability that a point drawn evenly from the lungs (lesions included) lies
# on a lesion, or within a square window of `tolerance` pixels to each side of a lesion pixel.
#
# Hint: `nn.functional.max_pool2d` with stride 1 makes a region grow; it wants [1, H, W], float.


# %% tags=["starter"]
def chance(mask, tolerance):
    """Probability that a random point of the lungs hits, 0 to 1."""
    raise NotImplementedError("count pixels")


# %% tags=["solution"]
# @title Solution
def chance(mask, tolerance):
    """Probability that a random point of the lungs hits, 0 to 1."""
    mask = torch.as_tensor(mask)
    lesion = (mask >= 2).float()[None]
    grown = nn.functional.max_pool2d(lesion, 2 * tolerance + 1, 1, tolerance)[0] > 0
    return (grown & (mask >= 1)).sum().item() / (mask >= 1).sum().item()


for k in (1, 2):
    values = [chance(one, TOLERANCE) for one in masks[labels.numpy() == k]]
    print(f"{IMAGE_CLASSES[k]:17} {np.mean(values):.0%} on average")


# %% tags=["wrong"]
def chance(mask, tolerance):
    mask = torch.as_tensor(mask)
    lesion = (mask >= 2).float()[None]
    grown = nn.functional.max_pool2d(lesion, 2 * tolerance + 1, 1, tolerance)[0] > 0
    return grown.float().mean().item()


# %% tags=["wrong"]
def chance(mask, tolerance):
    mask = torch.as_tensor(mask)
    return (mask >= 2).sum().item() / (mask >= 1).sum().item()


# %% tags=["check"]
# @title Check your answer
_mask = np.zeros((9, 9), dtype=np.uint8)
_mask[2:7, 2:7] = 1
_mask[4, 4] = 2
assert abs(chance(_mask, 0) - 1 / 25) < 1e-6, "one lesion pixel in 25 pixels of lung"
assert abs(chance(_mask, 1) - 9 / 25) < 1e-6, "with a tolerance of 1, 3 x 3 pixels hit"
assert abs(chance(_mask, 4) - 1) < 1e-6, "points outside the lungs are never drawn"

# %% [markdown] tags=["answer"]
# These are the numbers around which the row "any point of the lungs" should lie, in the figure of the
# pointing game. A baseline that can be computed needs no interval.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · A heat map that is too good
#
# Kind: find the bug, **
#
# A colleague rewrote Grad-CAM for maps and slopes that are given, `cam(maps, slope)`, both
# [M, C, h, w]. His maps look sharper than ours and are wrong. Find the two mistakes.
#
# Hint: go through the steps of Grad-CAM in the text above, one by one, and look for each in the code.


# %% tags=["starter"]
def cam(maps, slope):
    """Heat maps [M, h, w] of maps and slopes [M, C, h, w]."""
    weight = slope.mean(1, keepdim=True)
    return (weight * maps).relu().sum(1)


# %% tags=["solution"]
# @title Solution
def cam(maps, slope):
    """Heat maps [M, h, w] of maps and slopes [M, C, h, w]."""
    weight = slope.mean((2, 3), keepdim=True)  # one number a map
    return (weight * maps).sum(1).relu()


# %% tags=["wrong"]
def cam(maps, slope):
    weight = slope.mean((2, 3), keepdim=True)
    return (weight * maps).relu().sum(1)


# %% tags=["wrong"]
def cam(maps, slope):
    return (slope * maps).sum(1).relu()


# %% tags=["check"]
# @title Check your answer
_g = torch.Generator().manual_seed(1)
_maps = torch.randn(2, 3, 4, 5, generator=_g)
_slope = torch.randn(2, 3, 4, 5, generator=_g)
_out = cam(_maps, _slope)
assert tuple(_out.shape) == (2, 4, 5), "one number for each place"
_flat = cam(_maps, _slope.mean((2, 3), keepdim=True).expand_as(_slope))
_same = torch.allclose(_out, _flat, atol=1e-5)
assert _same, "slopes that differ only in their places must give the same map"
_pair = torch.stack([torch.ones(2, 2), -2 * torch.ones(2, 2)])[None]
_zero = cam(_pair, torch.ones_like(_pair))
assert _zero.max() == 0, (
    "a map that speaks against the class must be able to cancel one that speaks for it"
)

# %% [markdown] tags=["answer"]
# The mean went over the channels and not over the places, and the ReLU came before the sum, so that
# maps which speak against the class were dropped one by one rather than weighed against the others.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Integrated gradients
#
# Kind: write a function, ***
#
# Gradient × input compares with a vector of zeros, and uses the slope at one point only. Integrated
# gradients go on a straight line from a reference (here the average healthy slice) to the slice, take
# the mean slope on the way, and multiply by the difference. The contributions then add up to exactly what
# the logit gains on the way. Write `integrated(s, one, start, k, steps)` for one slice: `one` and
# `start` are [N, 5], `k` is a class, the result is [N].
#
# Hint: put all points of the line into one batch, `start + t * (one - start)`, with `t` at the middles
# of `steps` equal parts of 0 to 1.


# %% tags=["starter"]
def integrated(s, one, start, k, steps=64):
    """What each row of `one` contributes, against `start`: [N]."""
    raise NotImplementedError("a mean of slopes, times a difference")


# %% tags=["solution"]
# @title Solution
def integrated(s, one, start, k, steps=64):
    """What each row of `one` contributes, against `start`: [N]."""
    t = (torch.arange(steps) + 0.5) / steps
    line = (start + t[:, None, None] * (one - start)).requires_grad_()
    (slope,) = torch.autograd.grad(s(line)[:, k].sum(), line)
    return (slope.mean(0) * (one - start)).sum(1)


found = torch.stack(
    [integrated(s, r, reference, k) for r, k in zip(rows, called.tolist(), strict=True)]
)
mean, low, high = agreement(found, given["gradient"])
print(f"agrees with gradient x input: {mean:.2f} ({low:.2f} to {high:.2f})")


# %% tags=["wrong"]
def integrated(s, one, start, k, steps=64):
    line = one[None].clone().requires_grad_()
    (slope,) = torch.autograd.grad(s(line)[:, k].sum(), line)
    return (slope[0] * (one - start)).sum(1)


# %% tags=["wrong"]
def integrated(s, one, start, k, steps=64):
    t = (torch.arange(steps) + 0.5) / steps
    line = (start + t[:, None, None] * (one - start)).requires_grad_()
    (slope,) = torch.autograd.grad(s(line)[:, k].sum(), line)
    return (slope.mean(0) * one).sum(1)


# %% tags=["check"]
# @title Check your answer
torch.manual_seed(3)
_s = nn.Sequential(nn.Flatten(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
_one, _start = 2 * torch.randn(4, 5), 2 * torch.randn(4, 5)
_part = integrated(_s, _one, _start, 1, 256)
assert tuple(_part.shape) == (4,), "one number a row: add up its five"
with torch.no_grad():
    _gain = (_s(_one[None]) - _s(_start[None]))[0, 1].item()
assert abs(float(_part.sum()) - _gain) < 0.02, (
    "the contributions must add up to the gain of the logit from start to end"
)

# %% [markdown] tags=["answer"]
# The mean slope on the way makes the contributions complete: they add up to the gain. That they agree with
# gradient × input as far as the output says is once more a sign of how close to linear $S$ is between
# a healthy slice and these.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · A transplant
#
# Kind: experiment, **
#
# We took lesions out. Now put some in: give each control the lesions of a COVID-19 patient
# (`replace(control, lesions=covid.lesions)`), at a position where that patient shows one, and count
# how often $S$ and the ordinary classifier call it COVID-19. What would you compare the count with?
#
# Hint: `draw_pair` shows how a patient is drawn at a position, and `answers` asks the ordinary classifier.


# %% tags=["solution"]
# @title Solution
def transplant(seed):
    """A slice of a control who has the lesions of a COVID-19 patient."""
    covid = make_patient(seed, 2)
    control = replace(make_patient(seed, 0), lesions=covid.lesions)
    return render(control, draw_positions(covid, 1)[0], size)[0]


mixed = np.stack([transplant(9000 + i) for i in range(PAIRS // 2)])
with torch.no_grad():
    of_mixed = {"S": s(look(mixed)[0]).argmax(1), "ordinary": answers(mixed)}
before = {"S": called, "ordinary": net_called}
for name, found in of_mixed.items():
    real = before[name][labels == 2]
    for what, part in (("transplanted", found), ("COVID-19 itself", real)):
        count = int((part == 2).sum())
        low, high = wilson(count, len(part))
        print(f"{name:9} {what:16} {count / len(part):.0%} ({low:.0%} to {high:.0%})")

# %% [markdown] tags=["answer"]
# The count to compare with is how often each model finds COVID-19 in slices of real COVID-19 phantoms.
# If the two intervals of a model overlap widely, the lesions alone carry its answer, whoever's chest
# they lie in. (Some lesions end up outside the lungs of their new owner, which are shaped differently,
# so a little less is to be expected.)

# %% [markdown]
# ## What we learned
#
# 1. Gradient × input says what each ranked box contributes to a logit; boxes and biases add up to it.
# 2. Methods that agree may only ask the same question; say what stands in the place of a box.
# 3. A pointing count means something only beside a baseline: boxes lie on lesions anyway.
# 4. Taking the lesion out tests the cause; a map may point beside what decided, and the other way round.
# 5. An explanation that survives random weights does not explain what was learned.
#
# ## Further reading
#
# {cite:t}`Selvaraju2017` describe Grad-CAM, {cite:t}`Zeiler2014` occlusion, {cite:t}`Zhang2016pointing`
# the pointing game and {cite:t}`Sundararajan2017` integrated gradients. {cite:t}`Adebayo2018` have the
# test with random weights. {cite:t}`DeGrave2021` show classifiers of COVID-19 that looked at the wrong
# things.
