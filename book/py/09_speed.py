# %% [markdown]
# # 9 · Speed
#
# The released code is clear, and it trains "heads" with a detector that never changes by running
# this detector again in every epoch. By the picture's numbers, which are extrapolated for "heads", the
# package does the same training hundreds of times as fast on the same machine as a loop that we wrote
# to work in that way, and its losses and gradients agree.
#
# **The question: which work can you leave out without changing a result, and how do you prove that
# you have not changed it?**

# %% tags=["fold"] mystnb={"image": {"alt": "Horizontal bars on a logarithmic axis: how many times faster than the released way of working each regime is, with ResNet-18 and with ResNet-50. Heads gains by far the most, heads plus BN and full a few times."}, "figure": {"caption": "How many times faster than a loop that works as the released code does: two CPU cores, phantoms of 512 x 512. Numbers of the table near the end of this chapter (those of heads are extrapolated); this cell only draws them."}}
# @title Imports, versions, and the measured speed-ups
import copy
import os
import time
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import covidmask
from covidmask import plotting
from covidmask.config import PRESETS
from covidmask.datasets import SliceImages, write_phantoms
from covidmask.models import (
    ClassificationModule,
    covid_ct_mask_net,
    encoded_rows,
    pad_rows,
    propose,
    rank_boxes,
    run_box_head,
    set_regime,
    trained_classifier,
    trained_segmenter,
)
from covidmask.training import cache_ranked_boxes, classification_loss, make_fabric
from covidmask.training.compare import part_of

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # on a GPU, too, all digits of float32 count
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")

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
works, backbones = (list(dict.fromkeys(key[i] for key in speed)) for i in (0, 1))
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for i, name in enumerate(backbones):
    ratios = [speed[work, name] for work in works]
    look = {"color": (plotting.BLUE, plotting.ORANGE)[i], "hatch": ("", "//")[i]}
    places = np.arange(len(works)) + 0.4 * (i - 0.5)
    bars = ax.barh(places, ratios, 0.38, label=name, ec="black", **look)
    _ = ax.bar_label(bars, [f"{ratio:.3g}x" for ratio in ratios], padding=3)
_ = ax.set(xscale="log", ylabel="Regime")
_ = ax.set_xlabel("Times faster (ratio of times, no unit)")
_ = ax.set_xlim(0.9, 4 * max(speed.values()))
_ = ax.set_yticks(range(len(works)), works)
_ = ax.invert_yaxis()
_ = ax.legend()
plt.show()

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")

# %% [markdown]
# **After it you can**
#
# - time a piece of a model so that the number means something, and say which piece is worth work;
# - train $S$ at the price of one pass of the detector, and prove that nothing has changed;
# - differentiate only the boxes that are kept, and show that the gradient is the same;
# - say what bfloat16 does to a ranking, and why it is not the default;
# - read a table of speed-ups: against what, on which machine, measured or extrapolated.
#
# **You need** the three regimes of [chapter 8](08_three_regimes.ipynb) and the ranked boxes of
# [chapter 6](06_ranked_boxes.ipynb).
#
# **Time:** reading 20 minutes, exercises 35 minutes, running about a minute on two CPU cores in the
# preset `quick`; the first chapter that you run also draws the phantoms, which takes a few minutes
# more.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice here is a *phantom*, made by formulas and random numbers. No number that this chapter
# computes is a result on patients, and nothing here is for diagnosis.
# ```

# %% tags=["fold"]
# @title Load a classifier and a few slices
preset = PRESETS[PRESET]
n = preset.classifier.n_boxes
segmenter = trained_segmenter(PRESET, device, shipped=True)


def fresh():
    """A new classifier on the trained segmenter, always with the same random S."""
    torch.manual_seed(SEED)
    return covid_ct_mask_net(segmenter, preset.classifier)


root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
val = SliceImages(root / "slices", "val")
few = part_of(val, range(0, len(val), len(val) // 24))  # all three classes
images = [few[i][0].to(device) for i in range(len(few))]  # each [3, H, W]
labels = torch.tensor(few.labels, device=device)
side = preset.phantoms.size
print(f"{len(few)} slices of {side} x {side} pixels, N = {n}")

# %% [markdown]
# ## First measure
#
# Before you make anything faster, find out where the time goes. A single measurement says little:
# the first call is slower than all others, because memory has to be found and code to be loaded,
# and now and then the machine does something else. So we run the work once without counting it,
# then several times, and take the median. On a GPU we also have to wait for it, because a call
# returns before the work is done.


# %%
def seconds(work, repeats=7):
    """Median time of a call, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


# %% [markdown]
# Now we cut the path of one slice into its stages and time each of them, with no gradient.

# %%
model = fresh()
detector, heads = model.detector, model.detector.roi_heads
with torch.no_grad():
    batch, _ = detector.transform(images[:1])
    features, proposals, shapes = propose(detector, images[:1])
    found = run_box_head(detector, features, proposals, shapes)
    place = proposals[0], shapes[0], heads.box_coder
    one_row = model.ranked_boxes(images[:1])  # [1, N, 5]
    stages = {
        "backbone, FPN": lambda: detector.backbone(batch.tensors),
        "RPN": lambda: detector.rpn(batch, features),
        "RoIAlign, box head": lambda: run_box_head(
            detector, features, proposals, shapes
        ),
        "NMS and ranking": lambda: rank_boxes(
            found[0][0], found[1][0], *place, model.config
        ),
        "S": lambda: model.s(one_row),
    }  # fmt: skip
    took = {name: seconds(work) for name, work in stages.items()}

# %% tags=["fold"] mystnb={"image": {"alt": "Horizontal bars with the milliseconds that each stage of one slice takes: backbone and FPN, RPN, RoIAlign and box head, NMS and ranking, and module S, whose bar is by far the shortest."}, "figure": {"caption": "Where the time of one slice goes on the machine that made this page, in the preset quick, without a gradient. Other machines and models give other bars."}}
# @title Draw the time of each stage
fig, ax = plt.subplots(figsize=(7, 2.9), layout="constrained")
milliseconds = [1000 * value for value in took.values()]
bars = ax.barh(list(took), milliseconds, color=plotting.SKY_BLUE, ec="black", lw=0.6)
shares = [value / sum(milliseconds) for value in milliseconds]
_ = ax.bar_label(bars, [f" {share:.1%}" for share in shares])
_ = ax.set(xlabel="Time of a stage (ms, median)", xlim=(0, 1.15 * max(milliseconds)))
_ = ax.set_ylabel("Stage")
_ = ax.invert_yaxis()
plt.show()

# %% [markdown]
# The bar of $S$ is tiny. In "heads", $S$ is all that learns, so nearly all the time goes into a
# detector that gives the same rows in each epoch.
#
# ## Heads: run the detector once
#
# In "heads" the ranked boxes of a slice are constants, so we can compute them once and keep them:
# $5N$ numbers in place of a picture. Let us train $S$ in both ways and count how many pictures go
# through the backbone, with a *hook*, a function that PyTorch calls at each forward pass.


# %%
def train_heads(rows_of, epochs=5):
    """Train S on all slices at once; `rows_of()` gives [M, N, 5]."""
    torch.manual_seed(SEED)
    s = ClassificationModule(n, preset.classifier.hidden).to(device)
    adam = torch.optim.Adam(s.parameters(), lr=1e-3)
    for _ in range(epochs):
        loss = classification_loss(s(rows_of()), labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return s


passes = 0


def count(module, inputs, output):
    global passes
    passes += len(inputs[0])


# %%
model = fresh().requires_grad_(False)
hook = model.detector.backbone.register_forward_hook(count)
trained, counted, spent = {}, {}, {}
start = time.perf_counter()
trained["each epoch"] = train_heads(lambda: model.ranked_boxes(images))
counted["each epoch"], passes = passes, 0
spent["each epoch"] = time.perf_counter() - start

start = time.perf_counter()
rows = model.ranked_boxes(images)  # [M, N, 5]
trained["once"] = train_heads(lambda: rows)
counted["once"] = passes
spent["once"] = time.perf_counter() - start
hook.remove()

# %% [markdown]
# Is it the same $S$? That is the important check. We may take such a saving only if the result stays
# the same.

# %%
pairs = zip(*(s.parameters() for s in trained.values()), strict=True)
for one, other in pairs:
    assert torch.allclose(one, other, atol=1e-5)
for way, pictures in counted.items():
    print(f"detector {way:10}: {pictures:4} pictures, {spent[way]:.2f} s")
print("the weights of both S agree")

# %% [markdown]
# With $E$ epochs this saves a share of about $1 - 1/E$ of the detector's work: more epochs, more
# saved. The package does it without being asked. `train_classifier(..., "heads")` calls
# `cache_ranked_boxes`, which can also keep the rows in a file.
#
# Such a file is dangerous when something changes and the old rows come back. So its name is a hash
# of everything that decides the rows: the detector's weights and settings, $N$ and the columns, the
# precision, the content of the slices, and the code that reads and ranks them. If any of these
# changes, the name changes, and the boxes are ranked anew.

# %%
folder = f"{DATA}/ranked"
first = cache_ranked_boxes(model, few, folder=folder, progress=False)
start = time.perf_counter()
again = cache_ranked_boxes(model, few, folder=folder, progress=False)
print(f"found again in {1000 * (time.perf_counter() - start):.0f} ms")
assert torch.equal(first, again)
assert torch.allclose(again, rows.cpu(), atol=1e-3)
other = copy.deepcopy(model)
with torch.no_grad():  # a small change in one layer of the detector
    _ = other.detector.roi_heads.box_predictor.cls_score.bias.add_(0.1)
changed = cache_ranked_boxes(other, few, folder=folder, progress=False)
assert not torch.equal(first, changed)
print("another detector, other rows")

# %% [markdown]
# ## No gradient that nobody uses
#
# In "heads + BN" and "full" the detector changes at each step, so it has to run. But how much of it
# has to be differentiated? The RPN gives up to $P$ proposals, and $S$ reads only the $N$ best
# boxes. The boxes that are not ranked never reach the loss, so their gradient is zero. The simple
# way computes it nonetheless:


# %%
def rows_of_all(model, image):
    """Ranked boxes [1, N, 5]; the graph holds all P proposals."""
    detector = model.detector
    features, proposals, shapes = propose(detector, [image])
    found = run_box_head(detector, features, proposals, shapes)
    logits, deltas = found[0][0], found[1][0]  # [P, 3], [P, 12]
    with torch.no_grad():
        place = proposals[0], shapes[0], detector.roi_heads.box_coder
        best = rank_boxes(logits, deltas, *place, model.config)
    kept = logits[best.roi], deltas[best.roi], best.label
    return pad_rows(encoded_rows(*kept), model.config.n_boxes)[None]


# %% [markdown]
# The cheaper way has two passes through the box head. The first, without a gradient, only decides
# which boxes are the best. The second runs RoIAlign and box head again, for these boxes alone, and
# builds the graph:


# %%
def rows_of_kept(model, image):
    """The same rows; the graph holds the kept boxes alone."""
    detector = model.detector
    features, proposals, shapes = propose(detector, [image])
    with torch.no_grad():  # which boxes?
        found = run_box_head(detector, features, proposals, shapes)
        place = proposals[0], shapes[0], detector.roi_heads.box_coder
        best = rank_boxes(found[0][0], found[1][0], *place, model.config)
    kept = [proposals[0][best.roi]]  # K boxes, with a gradient
    logits, deltas = run_box_head(detector, features, kept, shapes)
    rows = encoded_rows(logits[0], deltas[0], best.label)
    return pad_rows(rows, model.config.n_boxes)[None]


# %% [markdown]
# Both give the same rows. Do they give the same gradient? And does the package's `ranked_boxes`? We
# compare the whole gradient of "full", as one long vector.

# %%
model = fresh()
parameters = set_regime(model, "full")


def gradient_of(rows_of):
    """The gradient of "full" for the first slice, as one vector."""
    logits = model.s(rows_of(model, images[0]))
    loss = classification_loss(logits, labels[:1])
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])


# %%
ways = {
    "all P proposals": rows_of_all,
    "kept boxes alone": rows_of_kept,
    "the package": lambda model, image: model.ranked_boxes([image]),
}
gradients = {name: gradient_of(way) for name, way in ways.items()}
reference = gradients["all P proposals"]
for name, gradient in gradients.items():
    difference = ((gradient - reference).norm() / reference.norm()).item()
    assert difference < 1e-3
    took_now = seconds(lambda way=ways[name]: gradient_of(way), 3)
    print(f"{name:17} differs by {difference:.0e}, {took_now:.3f} s")

# %% [markdown]
# The differences are rounding. How much time is saved depends on how many proposals there are and on
# the size of the maps. In the preset `quick`, with at most 200 proposals on small maps, there is
# little to save, and the second pass costs something, too. With the 1,000 proposals of the paper's
# model it is worth much more, as the table near the end shows.
#
# The same thought applies to judging a model, where nothing learns at all: inside `torch.no_grad()`
# no graph is built, and no activation is kept for a backward pass that never comes.
#
# ## Fewer bits: faster, but not the same
#
# All savings so far leave the numbers as they are. *Precision* is another kind of saving. A float32
# has 24 significant bits, about seven decimal digits. A bfloat16 has 8, so two to three digits, and
# the same range. Processors that know it multiply it about twice as fast, or faster.
#
# For ranked boxes this matters, because $S$ reads *ranks*. When two
# scores differ by less than rounding, their boxes may swap, and two rows of the vector with them.

# %% tags=["nbval-check-output"]
for value in (0.9, 0.902, 0.904, 0.1, 0.1002):
    rounded = torch.tensor(value).bfloat16().item()
    print(f"{value:<7} becomes {rounded:.6f}")

# %% [markdown]
# Let us see what it does to a trained classifier. We rank the same slices with float32 and with
# bfloat16 (`bf16-mixed` lets PyTorch choose which operations take it, and the package computes the
# scores themselves in float32), and let the same $S$ read both.

# %%
classifier = trained_classifier(PRESET, device, shipped=True)
ranked, answers = {}, {}
for precision in ("32-true", "bf16-mixed"):
    fabric = make_fabric(precision, device)
    options = {"fabric": fabric, "progress": False}
    found = cache_ranked_boxes(classifier, few, **options)  # [M, N, 5]
    with torch.no_grad():
        answers[precision] = classifier.s(found.to(device)).sigmoid().cpu()
    ranked[precision] = found
exact, rounded = answers.values()  # [M, 3] each
moved = (exact - rounded).abs()
other_class = (exact.argmax(1) != rounded.argmax(1)).sum()
print(f"probabilities move by {moved.mean():.3f} on average,")
print(f"at most {moved.max():.2f}; another class in {other_class}")
print(f"of {len(few)} slices")

# %% tags=["fold"] mystnb={"image": {"alt": "Two panels. Left: score by rank of one synthetic slice in float32 and in bfloat16, two curves that nearly coincide. Right: the probability of each class in float32 against that in bfloat16, a cloud of points about the diagonal."}, "figure": {"caption": "Left: scores by rank of one slice, in both precisions. Right: probabilities of the same S on the same slices; points off the diagonal have moved by rounding alone. Synthetic."}}
# @title Draw scores and probabilities in both precisions
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.7), layout="constrained")
ranks = np.arange(1, n + 1)
for name, colour, line in (
    ("32-true", "black", "-"),
    ("bf16-mixed", plotting.VERMILLION, "--"),
):
    scores = ranked[name][-1, :, 0]
    _ = axes[0].plot(ranks, scores, color=colour, ls=line, label=name)
_ = axes[0].set(xlabel="Rank of the box", ylabel="Score (no unit)", ylim=(-0.02, 1.02))
_ = axes[0].legend()
for k, name in enumerate(covidmask.config.IMAGE_CLASSES):
    look = {"color": plotting.CLASS_COLOURS[k], "ms": 5, "mfc": "none", "label": name}
    _ = axes[1].plot(exact[:, k], rounded[:, k], "os^"[k], **look)
_ = axes[1].plot([0, 1], [0, 1], color="black", lw=0.8)
_ = axes[1].set(xlabel="Probability, float32", ylabel="Probability, bfloat16")
_ = axes[1].legend(fontsize=9)
plt.show()

# %% [markdown]
# The scores hardly differ, but some probabilities do. An older comparison, with the classifier and
# 600 test phantoms of that time, is in [What makes it fast](fast.md): there 71 predictions changed, and
# the accuracy went from 0.82 to 0.81. So bfloat16 is never the default. If you want it, ask for it
# with `precision`, train $S$ on
# rows of the same precision, and judge the model as it will run.
#
# ## What a regime costs
#
# Here is the comparison of the opening picture in full. The *baseline* is a loop that works as the
# released code does, on our modules: every parameter requires a gradient, all proposals are
# differentiated, evaluation builds graphs, and the detector runs in each epoch. Both were timed in
# turn, with the same weights and slices. The two rows of "heads" are extrapolated: from a step of
# 8, from ranking 48 slices, and from two epochs of $S$.
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
#
# How do you read such a table?
#
# - **Against what?** A large ratio may only show a slow baseline. A loop that ranks without
#   gradients, but in each epoch, is the harder rival for "heads". Keeping the rows is 43 times as
#   fast as that one (43.3x and 42.8x for the two models), where 50 epochs allow at most 50 times.
# - **On what?** On a GPU the ratios are smaller: 20 to 40 for "heads", about two to three for the
#   rest. [What makes it fast](fast.md) has the numbers, memory, and what was tried in vain.
# - **Is the result the same?** In float32 one step gives the same loss and gradient as the baseline
#   to about one in a million, as long as the order of the sums is the same.
#
# ### On your machine
#
# Finally, what does a step of 8 slices cost here, in the preset `quick`?


# %%
def step(model, parameters, regime, rows):
    """One training step on eight slices."""
    inputs = rows if regime == "heads" else model.ranked_boxes(images[:8])
    loss = classification_loss(model.s(inputs), labels[:8])
    torch.autograd.grad(loss, parameters, allow_unused=True)


kept_rows = rows[:8]
for regime in ("heads", "heads_bn", "full"):
    model = fresh()
    parameters = set_regime(model, regime)
    now = (model, parameters, regime, kept_rows)
    took_now = seconds(lambda now=now: step(*now), 3)
    print(f"{regime:9} {1000 * took_now:8.1f} ms")

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Why can "heads" run the detector once for each slice?**
#
# - [x] Its detector does not change, so the rows of a slice are constants. :: The same input and
#   the same weights in eval mode give the same rows in each epoch.
# - [ ] Its slices are small enough to fit in memory. :: Rows are small, but that alone would not
#   make them right after a step that changes the detector.
# - [ ] Its $S$ is so small that old rows do little harm. :: There are no old rows in "heads". In
#   the other regimes, rows of an earlier step would be wrong.
#
# **2. The kept rows lie in a file. Then somebody loads other weights into the detector. What should
# happen?**
#
# - [ ] The rows are used, because the slices have the same names. :: These are rows of another
#   detector; $S$ would be trained on something that no model gives.
# - [ ] The program should ask whether the file is still valid. :: Nobody can tell by looking at it, but
#   the program can compute it.
# - [x] The boxes are ranked anew, into a file of another name. :: The name is a hash of all that
#   decides the rows, weights included.
#
# **3. Why do the proposals that are in no row need no gradient in "full"?**
#
# - [ ] Their scores are low, so their gradient is small enough to be left out. :: It is not small
#   but exactly zero, and a low score is not the reason.
# - [x] They do not reach $S$, so the loss does not depend on them. :: What is not in the rows cannot
#   change the loss.
# - [ ] The RPN is frozen in "full", and they come from the RPN. :: Their coordinates are detached for
#   all proposals, kept ones included. The gradient meant here is that of RoIAlign and box head.
#
# **4. A stage takes 10 % of the time. You make it ten times faster. How much faster is the whole?**
#
# - [ ] About twice as fast. :: 90 % of the time is still there.
# - [ ] Ten times as fast. :: Only if the stage were everything.
# - [x] About 1.1 times as fast. :: 1 / (0.90 + 0.01) = 1.10. So measure first.
#
# **5. What does bfloat16 do to the ranked boxes of a slice?**
#
# - [ ] It rounds scores a little, which $S$ cannot notice. :: $S$ reads places, and boxes with nearly
#   equal scores may swap theirs.
# - [x] It may swap boxes of nearly equal score, and rows with them. :: Then positions of the vector
#   hold other numbers, and the answers can move.
# - [ ] It makes scores overflow, because its range is small. :: Its range is that of float32; it is
#   short of digits.
#
# **6. "379 times faster" was extrapolated. What does that mean?**
#
# - [ ] The number was guessed from the sizes of the models. :: All its parts were timed.
# - [ ] It was measured once instead of several times. :: That would be a measurement with one run.
# - [x] Short pieces were timed, and their times multiplied. :: Nobody ran the baseline for two days;
#   a step was timed and multiplied by the number of steps.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · How often does the detector run?
#
# Kind: pencil, *
#
# Write `pictures_through(slices, epochs, batch_size, regime)`: how many pictures go through the
# detector in a whole training, as the package does it. An epoch takes whole batches only; slices
# that do not fill one sit it out. Ranking in advance takes every slice. `regime` is `"heads"`,
# `"heads_bn"` or `"full"`.
#
# Hint: For 10 slices in batches of 4, an epoch has two steps.


# %% tags=["starter"]
def pictures_through(slices, epochs, batch_size, regime):
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def pictures_through(slices, epochs, batch_size, regime):
    if regime == "heads":
        return slices
    return epochs * (slices // batch_size) * batch_size


for regime in ("heads", "heads_bn"):
    print(f"{regime:9} {pictures_through(3000, 50, 8, regime):8,}")


# %% tags=["wrong"]
def pictures_through(slices, epochs, batch_size, regime):
    return epochs * (slices // batch_size) * batch_size


# %% tags=["wrong"]
def pictures_through(slices, epochs, batch_size, regime):
    return slices if regime == "heads" else epochs * slices


# %% tags=["wrong"]
def pictures_through(slices, epochs, batch_size, regime):
    return slices if regime == "heads" else epochs * (slices // batch_size)


# %% tags=["check"]
# @title Check your answer
got = pictures_through(10, 3, 5, "heads")
assert got == 10, "heads: the rows are constants, so how often is a slice needed?"
got = pictures_through(16, 2, 4, "full")
assert got != 8, "that is the number of steps; a step has a batch of pictures"
assert got == 32, "full, 16 slices in batches of 4, 2 epochs: all slices, twice"
got = pictures_through(10, 3, 4, "heads_bn")
assert got == 24, "10 slices in batches of 4: which slices sit out an epoch?"
print("right")

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · What a faster stage is worth
#
# Kind: write a function, *
#
# A stage that takes a share of the time becomes some times faster; all others stay. Write
# `whole_speed_up(shares, factors)` for several stages: two dicts with the same names, shares that
# sum to 1, and factors (1: as before). It returns how many times faster the whole becomes.
#
# Hint: How long does the whole take afterwards, if it took 1 before?


# %% tags=["starter"]
def whole_speed_up(shares, factors):
    raise NotImplementedError("time before over time after")


# %% tags=["solution"]
# @title Solution
def whole_speed_up(shares, factors):
    return 1 / sum(shares[name] / factors[name] for name in shares)


shares = {name: value / sum(took.values()) for name, value in took.items()}
for name in shares:
    factors = {other: 1e9 if other == name else 1 for other in shares}
    best = whole_speed_up(shares, factors)
    print(f"if {name:18} took no time: {best:.2f}x")


# %% tags=["wrong"]
def whole_speed_up(shares, factors):
    return sum(shares[name] * factors[name] for name in shares)


# %% tags=["wrong"]
def whole_speed_up(shares, factors):
    return sum(shares[name] / factors[name] for name in shares)


# %% tags=["check"]
# @title Check your answer
half = {"a": 0.5, "b": 0.5}
assert abs(whole_speed_up(half, {"a": 1, "b": 1}) - 1) < 1e-9, "nothing changed: 1x"
got = whole_speed_up(half, {"a": 1, "b": 1e9})
assert got <= 2 + 1e-6, "half of the time is untouched: the whole cannot gain that much"
assert abs(got - 2) < 1e-6, "time before over time after: above 1 when it is faster"
got = whole_speed_up({"a": 0.9, "b": 0.1}, {"a": 3, "b": 1})
assert abs(got - 2.5) < 1e-6, "90 % three times as fast: what time is left?"
print("right")

# %% [markdown] tags=["answer"]
# This is Amdahl's law. The stage that you leave alone sets the limit: where the RPN takes 42 % of the
# time, as on a GPU with ResNet-50 ([What makes it fast](fast.md)), all work on the rest can give at
# most 1 / 0.42 = 2.4x.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A memory that is too good
#
# Kind: find the bug, **
#
# A colleague keeps the rows of each slice in a dict `kept`, as in the starter below. The first
# training is right and fast. Then the detector is trained further, and "heads" gives the same result
# as before, to the last digit. Remove the first line, find the bug, and repair it.
#
# Hint: What decides the rows besides the slice? `weights_of(model)`, in the starter, may help.


# %% tags=["starter"]
def weights_of(model):
    """A tuple that changes with any weight of the model."""
    return tuple(value.double().sum().item() for value in model.state_dict().values())


def remembered(model, names, pictures, kept):
    raise NotImplementedError("remove this line, then find the bug")
    for name, picture in zip(names, pictures, strict=True):
        if name not in kept:
            kept[name] = model.ranked_boxes([picture])[0]
    return torch.stack([kept[name] for name in names])


# %% tags=["solution"]
# @title Solution
def weights_of(model):
    """A tuple that changes with any weight of the model."""
    return tuple(value.double().sum().item() for value in model.state_dict().values())


def remembered(model, names, pictures, kept):
    weights = weights_of(model)
    for name, picture in zip(names, pictures, strict=True):
        if (weights, name) not in kept:
            kept[weights, name] = model.ranked_boxes([picture])[0]
    return torch.stack([kept[weights, name] for name in names])


# %% tags=["wrong"]
def remembered(model, names, pictures, kept):
    for name, picture in zip(names, pictures, strict=True):
        if name not in kept:
            kept[name] = model.ranked_boxes([picture])[0]
    return torch.stack([kept[name] for name in names])


# %% tags=["wrong"]
def remembered(model, names, pictures, kept):
    return torch.stack([model.ranked_boxes([picture])[0] for picture in pictures])


# %% tags=["wrong"]
def remembered(model, names, pictures, kept):
    for name, picture in zip(names, pictures, strict=True):
        if (id(model), name) not in kept:
            kept[id(model), name] = model.ranked_boxes([picture])[0]
    return torch.stack([kept[id(model), name] for name in names])


# %% tags=["check"]
# @title Check your answer
class Toy(nn.Module):
    """Stands in for a detector: fast, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), 0

    def ranked_boxes(self, pictures):
        self.calls += len(pictures)
        return torch.stack([picture * self.weight.detach() for picture in pictures])


toy, store = Toy(), {}
case = ["a", "b"], [torch.ones(2, 5), 2 * torch.ones(2, 5)]
before = remembered(toy, *case, store)
same = torch.equal(before, torch.stack(case[1]))
assert same, "the rows are not those of the detector"
again = remembered(toy, *case, store)
assert toy.calls == 2, "asked twice, the detector ran again: nothing is remembered"
with torch.no_grad():
    _ = toy.weight.fill_(3)
after = remembered(toy, *case, store)
fresh_rows = torch.equal(after, 3 * before)
assert fresh_rows, "the weights have changed, and old rows came back"
print("right: remembers, and notices a change")

# %% [markdown] tags=["answer"]
# A key has to name everything that decides the value. The identity of the object is not enough,
# because its weights can change inside it. Settings such as the NMS threshold and $N$ belong in the
# key, too, as in the package; and sums of weights can agree by chance, so the package takes a hash
# of all their bytes.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Which calls build a graph?
#
# Kind: predict, then run, *
#
# For each of four calls, decide whether the rows that `ranked_boxes` returns will require a
# gradient. Write your prediction as `builds_graph()`, which returns a dict from the name of the call
# to `True` or `False`:
#
# - `"heads"`: after `set_regime(model, "heads")`;
# - `"heads_bn"`: after `set_regime(model, "heads_bn")`;
# - `"full, no_grad"`: after `set_regime(model, "full")`, inside `torch.no_grad()`;
# - `"full, eval"`: after `set_regime(model, "full")` and `model.eval()`.
#
# Hint: Does `eval()` say anything about gradients?


# %% tags=["starter"]
def builds_graph():
    raise NotImplementedError("a dict of four True or False")


# %% tags=["solution"]
# @title Solution
def builds_graph():
    regimes = {"heads": False, "heads_bn": True}
    return regimes | {"full, no_grad": False, "full, eval": True}


print("True:", [name for name, value in builds_graph().items() if value])


# %% tags=["wrong"]
def builds_graph():
    regimes = {"heads": False, "heads_bn": True}
    return regimes | {"full, no_grad": False, "full, eval": False}


# %% tags=["wrong"]
def builds_graph():
    regimes = {"heads": True, "heads_bn": True}
    return regimes | {"full, no_grad": False, "full, eval": True}


# %% tags=["check"]
# @title Check your answer
predicted, real = builds_graph(), {}
probe = fresh()
for name in ("heads", "heads_bn", "full, no_grad", "full, eval"):
    _ = set_regime(probe, name.partition(",")[0])
    _ = probe.eval()
    with torch.set_grad_enabled("no_grad" not in name):
        real[name] = probe.ranked_boxes(images[:1]).requires_grad
assert set(predicted) == set(real), f"the keys should be {sorted(real)}"
off = [name for name in real if predicted[name] != real[name]]
assert not off, f"run these calls and look at .requires_grad: {off}"
print("right in all four")

# %% [markdown] tags=["answer"]
# `eval()` changes what batch norm and dropout do, and nothing else. Whether a graph is built depends
# on `requires_grad` of what goes in and on `no_grad`. Many programs run `eval()` for judging and
# forget `no_grad`; the results are right, and time and memory are wasted.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · bfloat16 by hand
#
# Kind: write a function, ***
#
# Write `keep_bits(x, bits)`, which rounds positive float32 numbers to so many significant bits. With
# 8 bits it must agree with `x.bfloat16().float()`. Then find the smallest step between two scores
# near 0.9 that 8 bits can tell apart.
#
# Hint: `torch.frexp(x)` gives `mantissa` in [0.5, 1) and `exponent` with
# $x = \text{mantissa} \cdot 2^{\text{exponent}}$. What does rounding to 8 bits do to the mantissa?


# %% tags=["starter"]
def keep_bits(x, bits):
    raise NotImplementedError("round the mantissa")


# %% tags=["solution"]
# @title Solution
def keep_bits(x, bits):
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


near = keep_bits(torch.linspace(0.9, 0.92, 2001), 8).unique()
print("steps near 0.9:", (near[1:] - near[:-1]).unique().tolist())


# %% tags=["wrong"]
def keep_bits(x, bits):
    return (x * 2**bits).round() / 2**bits


# %% tags=["wrong"]
def keep_bits(x, bits):
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).floor() / 2**bits, exponent)


# %% tags=["check"]
# @title Check your answer
x = torch.rand(1000, generator=torch.Generator().manual_seed(1)) + 1e-3
powers = torch.tensor([0.5, 1.0, 4.0])
assert torch.equal(keep_bits(powers, 8), powers), "powers of two need one bit"
got, expected = keep_bits(x / 100, 8), (x / 100).bfloat16().float()
assert (got > x / 100).any(), "all are too small: is it rounding, or cutting?"
close = (got - expected).abs() <= 1e-9
assert close.all(), "small numbers: count significant bits, not places behind the point"
print("your rounding is that of bfloat16")

# %% [markdown] tags=["answer"]
# Near 0.9 the step is 1/256, about 0.004. On a slice with many boxes of nearly equal score, that is
# enough to swap some of them; this is why the package computes the scores in float32 even where the
# maps are in bfloat16.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · Does the number of proposals matter?
#
# Kind: experiment, **
#
# Change the number of proposals that the RPN may give, from 50 to 800, with
# `model.detector.rpn._post_nms_top_n["testing"]`, and time the gradient of one slice in both ways,
# `rows_of_all` and `rows_of_kept`. Which curve is steeper? How many proposals does the RPN really
# give?
#
# Hint: Make a fresh model and set both `_pre_nms_top_n` and `_post_nms_top_n` before you time.


# %% tags=["starter"]
def seconds_with(proposals, rows_of):
    raise NotImplementedError("the median time of one gradient")


# %% tags=["solution"]
# @title Solution
def seconds_with(proposals, rows_of):
    probe = fresh()
    parameters = [p for p in set_regime(probe, "full")]
    rpn = probe.detector.rpn
    for limit in (rpn._pre_nms_top_n, rpn._post_nms_top_n):
        limit["testing"] = proposals

    def work():
        loss = classification_loss(probe.s(rows_of(probe, images[0])), labels[:1])
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return seconds(work, 3)


for proposals in (50, 200, 800):
    with torch.no_grad():
        probe = fresh()
        probe.detector.rpn._pre_nms_top_n["testing"] = proposals
        probe.detector.rpn._post_nms_top_n["testing"] = proposals
        given = len(propose(probe.detector, images[:1])[1][0])
    times = [seconds_with(proposals, way) for way in (rows_of_all, rows_of_kept)]
    print(f"{given:4} proposals: all {times[0]:.3f} s, kept alone {times[1]:.3f} s")

# %% [markdown] tags=["answer"]
# Both become slower, because both run the box head forward on all proposals. The backward pass grows
# with the proposals only in the first. With as few proposals as kept boxes the second way is the
# slower one, since it runs the box head twice.

# %% [markdown]
# ## What we learned
#
# 1. Measure first: after a warm-up, several times, the median, and by stage. What you leave alone
#    sets the limit of what you can gain.
# 2. In "heads" the ranked boxes are constants: run the detector once, and let the key of what you
#    keep name everything that decides it.
# 3. Boxes that are not ranked have a gradient of zero, so rank without a gradient first, and
#    differentiate the kept boxes alone; the gradient is the same.
# 4. Fewer bits are another kind of saving: they change rankings, so ask for them on purpose and
#    judge the model with them.
# 5. A speed-up needs its baseline, its machine, and the word "measured" or "extrapolated".
#
# ## Further reading
#
# [What makes it fast](fast.md) has all tables, memory, and what did not pay. {cite:t}`Ren2015`
# shares one feature map among all proposals, the idea that made two-stage detectors fast in the
# first place; {cite:t}`He2017` adds RoIAlign. The regimes whose cost this chapter compares are those
# of {cite:t}`TerSarkisov2020`.
