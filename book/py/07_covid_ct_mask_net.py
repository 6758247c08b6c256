# %% [markdown]
# # 7 · COVID-CT-Mask-Net
#
# The detector turns a slice into ranked boxes, and the module $S$ turns the ranked boxes into a
# class. What is $S$ made of, how do detector and $S$ become one model, and how large is it?
#
# **After it you can**
#
# - write $S$ with three matrices, and say what the released code's initial weights cost;
# - say why three sigmoids need both terms of the cross-entropy, and what one term alone does;
# - put $S$ on a copy of a trained segmenter, and count what is copied, dropped and new;
# - recount Table 1 of the paper and say which rule gives which published number;
# - read off the gradient which ranks move the COVID-19 logit.
#
# **You need** the ranked boxes of [chapter 6](06_ranked_boxes.ipynb); the detector is the one of
# [chapter 2](02_region_proposals.ipynb), trained in [chapter 5](05_segmenter.ipynb). The chapter runs
# alone, with weights that come with the package. **Run time:** about 20 seconds on two CPU cores in
# the preset `quick`; 44 seconds on a GPU (H200) that other chapters used, too.
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
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from IPython.display import SVG
from torch import nn

import covidmask
from covidmask import plotting
from covidmask.config import (
    IMAGE_CLASSES,
    PRESETS,
    ClassifierConfig,
    DetectorConfig,
)
from covidmask.datasets import make_slice, old_friend
from covidmask.diagrams import model_diagram
from covidmask.interactive import frame_slider
from covidmask.metrics import wilson
from covidmask.models import (
    ClassificationModule,
    batch_norm_parameters,
    count_parameters,
    covid_ct_mask_net,
    lesion_mask_rcnn,
    set_regime,
    trained_classifier,
    trained_segmenter,
)
from covidmask.training import classification_loss, train_s

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# on a GPU, too, all digits of float32 count
torch.backends.cudnn.allow_tf32 = False
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")
print(f"torchvision {torchvision.__version__}, Python {platform.python_version()}")

# %% [markdown]
# The preset sets the size of the pictures and of the models, and how they were trained.

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0

# %% tags=["nbval-check-output"]
preset = PRESETS[PRESET]
size = preset.phantoms.size
n, hidden = preset.classifier.n_boxes, preset.classifier.hidden
print(f"slices of {size} x {size} pixels, N = {n} ranked boxes,")
print(f"hidden layers {hidden} wide")

# %% [markdown]
# ## The model on one page
#
# `trained_classifier` loads a detector with an $S$ that was trained on its ranked boxes (regime
# "heads", [chapter 8](08_three_regimes.ipynb)). The picture shows what Figure 3 of the paper shows
# {cite:p}`TerSarkisov2020`. It is drawn from the loaded modules, so every shape in it is a shape of
# this model.

# %% mystnb={"image": {"alt": "Diagram from top to bottom. A slice enters ResNet and FPN, then RPN, RoIAlign and box head, which give logits and encoded deltas of P proposals. Softmax, decoding, NMS and ranking keep N boxes as an N by 5 matrix. Module S flattens it to 5N numbers and passes them through three linear layers to three logits, each with a sigmoid: control, common pneumonia, COVID-19. A dashed box beside RoIAlign holds the masks, which the segmenter alone has."}, "figure": {"caption": "COVID-CT-Mask-Net with the shapes of the loaded model. Blue: weights copied from the segmenter. Green: no weights. Orange: module S, new. Dashed: the mask branch, dropped."}}
model = trained_classifier(PRESET, device, shipped=True)
SVG(data=model_diagram(model))

# %% [markdown]
# Three things in the picture are easy to miss.
#
# - The boxes that $S$ reads are not detections. They are the $N$ best boxes of the slice, however
#   bad.
# - The proposals are needed to decode boxes, and decoded boxes are needed for NMS. But $S$ gets the
#   *encoded* deltas.
# - No path leads from the masks to the classes. The masks train the backbone in
#   [chapter 5](05_segmenter.ipynb); after that they are not used.
#
# ## Slices for this chapter
#
# Our old friend, a COVID-19 phantom, is in no data set. We draw eight more phantoms of each class,
# which no model has seen either.

# %%
each = 8


def model_input(image):
    """float32 [H, W] -> [3, H, W] on the device."""
    return torch.from_numpy(image).expand(3, -1, -1).to(device)


friend = model_input(old_friend(size)[0])
others = []
for k in range(3):
    for seed in range(1, each + 1):
        others.append(model_input(make_slice(seed, k, size)[0]))
# [24]: 0 control, 1 pneumonia, 2 COVID-19
labels = torch.arange(3).repeat_interleave(each)
with torch.no_grad():
    pictures = [friend, *others]
    rows = [model.ranked_boxes([image]) for image in pictures]
    rows = torch.cat(rows)  # [25, N, 5]
friend_rows, other_rows = rows[:1], rows[1:]  # [1, N, 5], [24, N, 5]

# %% mystnb={"image": {"alt": "Three synthetic axial chest slices in the lung window, side by side, each with two dark lungs and bright vessels around a white heart or great vessels, in a wall of ribs, muscle and fat: our old friend with lesions in both lungs, a control without lesions, and a common pneumonia."}, "figure": {"caption": "Our old friend, one control and one common pneumonia. We use all three again below. Synthetic."}}
shown = {
    "Old friend (COVID-19)": 0,
    "Control": 1,
    "Common pneumonia": 1 + each,
}
fig, axes = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained")
for (name, i), ax in zip(shown.items(), axes, strict=True):
    _ = plotting.show_slice(pictures[i].cpu(), ax)
    _ = ax.set_title(name)
plt.show()

# %% [markdown]
# ## S from raw tensors
#
# In this chapter $x \in \mathbb{R}^{5N}$ is not the picture but its ranked boxes, written row after
# row. $S$ is a perceptron with two hidden layers:
#
# $$
# h_1 = \max(0, W_1 x + b_1), \qquad h_2 = \max(0, W_2 h_1 + b_2), \qquad z = W_3 h_2 + b_3 .
# $$
#
# The three numbers $z$ are *logits*: control, common pneumonia, COVID-19.
#
# Why a plain vector and not something that treats all boxes alike? Because the position in the
# vector tells the rank. If both are counted from 0, the score of rank $i$ always stands at position
# $5i$, its four deltas follow, and each position has its own column in $W_1$. So $S$ can ask for
# "the score of rank 10".

# %% tags=["nbval-check-output"]
x = friend_rows.flatten(1)  # [1, 5N]
for rank in (0, n // 2, n - 1):
    assert torch.equal(x[0, 5 * rank : 5 * rank + 5], friend_rows[0, rank])
print(tuple(friend_rows.shape), "->", tuple(x.shape))

# %% [markdown]
# ### Random weights to start with
#
# How large should the random numbers in the matrices be? Take one layer with weights of variance
# $v$, and let a ReLU follow. We would like two things at once:
#
# - forward, the mean square of the activations stays the same if $v = 2 / n_{\text{in}}$;
# - backward, that of the gradients stays the same if $v = 2 / n_{\text{out}}$.
#
# The factor 2 makes up for the half that the ReLU removes. The released code takes the second rule,
# "Kaiming normal, fan-out": a standard deviation of $\sqrt{2 / n_{\text{out}}}$, and biases of
# zero.

# %%
torch.manual_seed(SEED)
outputs, inputs = (hidden, hidden, 3), (5 * n, hidden, hidden)
matrices, biases = [], []
for n_out, n_in in zip(outputs, inputs, strict=True):
    theory = (2 / n_out) ** 0.5
    # [n_out, n_in]
    matrix = torch.randn(n_out, n_in, device=device) * theory
    matrices.append(matrix)
    biases.append(torch.zeros(n_out, device=device))
    drawn = matrix.std().item()
    assert abs(drawn / theory - 1) < 0.15
    print(f"{n_in:5} -> {n_out:5}: drawn {drawn:.4f}, theory {theory:.4f}")

# %% [markdown]
# The forward pass takes four lines. PyTorch's `nn.Linear` keeps $W$ as [out, in], hence the
# transpose.

# %%
def s_by_hand(rows, matrices, biases):
    """float32 [B, N, 5] -> logits [B, 3]."""
    x = rows.flatten(1)  # [B, 5N]
    h1 = (x @ matrices[0].T + biases[0]).clamp(min=0)  # [B, hidden]
    h2 = (h1 @ matrices[1].T + biases[1]).clamp(min=0)  # [B, hidden]
    return h2 @ matrices[2].T + biases[2]  # [B, 3]


# %% [markdown]
# The package's `ClassificationModule` gives the same with the same weights. We check it first with
# the random ones from above, then with the trained ones of the loaded model.

# %% tags=["nbval-check-output"]
fresh = ClassificationModule(n, hidden).to(device)
layers = (fresh.fc_scores, fresh.fc_scores_2, fresh.fc_scores_img)
with torch.no_grad():
    for layer, matrix, bias in zip(layers, matrices, biases, strict=True):
        _ = layer.weight.copy_(matrix)
        _ = layer.bias.copy_(bias)
    by_hand = s_by_hand(rows, matrices, biases)
    assert torch.allclose(by_hand, fresh(rows), atol=1e-3)

layers = (model.s.fc_scores, model.s.fc_scores_2, model.s.fc_scores_img)
trained = (
    [layer.weight.detach() for layer in layers],
    [layer.bias.detach() for layer in layers],
)
with torch.no_grad():
    logits = s_by_hand(friend_rows, *trained)  # [1, 3]
    assert torch.allclose(logits, model.s(friend_rows), atol=1e-4)
    # from the picture to the logits
    assert torch.allclose(logits, model([friend]), atol=5e-4)
print(tuple(logits.shape), "logits: the same by hand and by the package")

# %% [markdown]
# ### What the start costs
#
# Fan-out has a side effect: the last layer has only three outputs, so its weights are large. Let us
# follow the mean square through the layers. Each layer multiplies it by
# $n_{\text{in}} v = 2 n_{\text{in}} / n_{\text{out}}$, each ReLU halves it, and the widths cancel:
#
# $$
# \overline{z^2} = \overline{x^2} \cdot \frac{5N}{h} \cdot \frac{h}{h} \cdot \frac{2h}{3}
# = \frac{10 N}{3} \, \overline{x^2} .
# $$
#
# A model that knows nothing should say so, with logits near 0, all probabilities near one half, and
# a loss of $\log 2 = 0.69$. Instead the fresh $S$ is sure of itself and wrong. With fan-in the same
# calculation gives $\overline{z^2} = 2 \, \overline{x^2}$. We try twenty fresh $S$ of each kind; the
# number behind the mean loss is half the width of its 95 % interval.

# %%
mean_square = rows.square().mean().item()
print(f"{'':8} size of the logits   theory    first loss")
theories = {"fan_out": 10 * n / 3 * mean_square, "fan_in": 2 * mean_square}
for mode, theory in theories.items():
    squares, losses = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        s = ClassificationModule(n, hidden)
        for layer in s.children():
            start = {"mode": mode, "nonlinearity": "relu"}
            _ = nn.init.kaiming_normal_(layer.weight, **start)
        with torch.no_grad():
            z = s.to(device)(rows)  # [25, 3]
        squares.append(z.square().mean().item())
        losses.append(classification_loss(z[1:], labels.to(device)).item())
    measured = np.mean(squares) ** 0.5
    assert 0.5 < measured / theory**0.5 < 2
    half = 1.96 * np.std(losses, ddof=1) / len(losses) ** 0.5
    print(
        f"{mode:8} {measured:18.2f} {theory**0.5:8.2f} "
        f"{np.mean(losses):8.2f} ± {half:.2f}"
    )  # fmt: skip
paper_n = PRESETS["paper"].classifier.n_boxes
theory = (10 * paper_n / 3 * mean_square) ** 0.5
print(f"theory for the paper's N = {paper_n}, fan_out: {theory:.1f}")

# %% [markdown]
# Training removes this, and the final result need not suffer. But it explains why the first loss is
# far above 0.69, and the larger $N$ is, the more the first steps have to undo.
#
# ## Three sigmoids
#
# Each logit goes through a sigmoid of its own:
#
# $$
# \hat p_k = \sigma(z_k) = \frac{1}{1 + e^{-z_k}}, \qquad k = 0, 1, 2 .
# $$
#
# So $S$ answers three separate questions: is it a control or not, a common pneumonia or not,
# COVID-19 or not? The answers share the hidden layers and nothing else. They may all be "no", or
# two may be "yes". A softmax, $q_k = e^{z_k} / \sum_j e^{z_j}$, would instead divide a total of 1
# among the three classes. As the classes exclude each other, that would fit as well; the paper does
# not say why it prefers sigmoids. Two differences matter when you read a result:
#
# - the three probabilities need not sum to 1, so they are not shares of a whole;
# - adding the same number to all logits changes nothing in a softmax, but all the probabilities
#   here.
#
# The *predicted* class is that of the largest logit. It is the same for both, because both keep the
# order of the logits.

# %%
with torch.no_grad():
    logits = model.s(rows)  # [25, 3]
probabilities = 1 / (1 + torch.exp(-logits))
assert torch.allclose(probabilities, logits.sigmoid())
assert torch.equal(probabilities.argmax(1), logits.softmax(1).argmax(1))
print(f"{'phantom':22}  control  pneum.   COVID    sum   predicted")
for name, i in shown.items():
    p = probabilities[i].tolist()
    columns = f"{p[0]:8.3f} {p[1]:7.3f} {p[2]:7.3f} {sum(p):6.3f}"
    predicted = IMAGE_CLASSES[int(probabilities[i].argmax())]
    print(f"{name:22} {columns}   {predicted}")

# %% [markdown]
# Compare the two largest probabilities in each line. The predicted class is the one with the
# larger, however close the second comes, and it does not show how close that was. So when you
# report a class, report the three numbers with it. Over all phantoms that we drew:

# %%
sums = probabilities.sum(1)
best = probabilities[1:].argmax(1).cpu()
print(f"sum of the probabilities: {sums.min():.2f} to {sums.max():.2f}")
right = int((best == labels).sum())
low, high = wilson(right, len(labels))
print(f"right without our old friend: {right} of {len(labels)},")
print(f"95 % interval {low:.0%} to {high:.0%}")

# %% [markdown]
# ## The loss, both terms of it
#
# Binary cross-entropy compares each $\hat p_k$ with $L_k$, which is 1 for the true class and 0 for
# the other two:
#
# $$
# \mathcal{L} = - \frac{1}{3} \sum_{k} \Bigl[ L_k \log \hat p_k + (1 - L_k) \log (1 - \hat p_k) \Bigr] .
# $$
#
# The first term asks for a high $\hat p_k$ of the true class, the second for low ones of the
# others. Line 9 of the paper's Algorithm 1 has the first term alone; the released code has both.
# Here they are for our old friend:

# %%
# [1, 3]: COVID-19
truth = F.one_hot(torch.tensor([2]), 3).float().to(device)
p = probabilities[:1]  # [1, 3]
positive = -truth * p.log()  # [1, 3]
negative = -(1 - truth) * (1 - p).log()  # [1, 3]
print(f"{'':17} L_k   p_k  {'positive term':>15} {'negative term':>14}")
for k, name in enumerate(IMAGE_CLASSES):
    terms = f"{positive[0, k].item():15.3f} {negative[0, k].item():14.3f}"
    print(f"{name:18} {int(truth[0, k])}  {p[0, k].item():.3f} {terms}")
print(f"{'sum':27} {positive.sum():15.3f} {negative.sum():14.3f}")

# %% [markdown]
# The positive term does not see how high the other two classes stand. The negative term does.
#
# The mean over slices and classes is the package's `classification_loss`:

# %% tags=["nbval-check-output"]
truth = F.one_hot(labels, 3).float().to(device)  # [24, 3]
p = probabilities[1:]
by_hand = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
package = classification_loss(logits[1:], labels.to(device))
assert torch.allclose(by_hand, package, atol=1e-5)
print("classification loss: the same by hand and by the package")

# %% [markdown]
# (PyTorch computes it from the logits rather than from $\hat p_k$. For a logit of 100,
# $1 - \hat p_k$ would round to 0 and its logarithm to $-\infty$.)
#
# ### What the positive term alone would do
#
# Let us try it. Sixty random matrices get random labels, so there is nothing to find and $S$ can
# only memorise. Two copies of $S$ start from the same weights and train with the same optimiser.

# %%
def toy_training(both, steps=100):
    """Train S on random rows: loss, mean logit of true and other classes."""
    torch.manual_seed(SEED)
    toy_rows, toy_labels = torch.randn(60, n, 5), torch.randint(3, (60,))
    truth = F.one_hot(toy_labels, 3).float()
    s = ClassificationModule(n, hidden)
    optimiser = torch.optim.Adam(s.parameters(), lr=1e-4)
    history = []
    for _ in range(steps + 1):
        z = s(toy_rows)  # [60, 3]
        # log(1 - p) = log sigma(-z)
        negative = (1 - truth) * F.logsigmoid(-z) if both else 0
        loss = -(truth * F.logsigmoid(z) + negative).sum(1).mean()
        means = z[truth == 1].mean().item(), z[truth == 0].mean().item()
        history.append([loss.item(), *means])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    accuracy = (z.argmax(1) == toy_labels).float().mean().item()
    return np.array(history), accuracy


runs = {
    "positive term alone": toy_training(False),
    "both terms": toy_training(True),
}
print(f"{'':20}    loss  true logit  other logits  memorised")
for name, (history, accuracy) in runs.items():
    loss, right, wrong = history[-1]
    logits_of = f"{right:11.1f} {wrong:13.1f}"
    print(f"{name:20} {loss:7.4f} {logits_of} {accuracy:10.0%}")

# %% mystnb={"image": {"alt": "Left: both losses fall towards zero on a logarithmic axis. Right: with the positive term alone the mean logits of the true class and of the other classes both rise; with both terms the logits of the other classes fall."}, "figure": {"caption": "A loss of zero that says nothing: with the positive term alone every logit rises. Random rows, random labels."}}
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.7), layout="constrained")
colours = (plotting.VERMILLION, plotting.BLUE)
for name, colour, line in zip(runs, colours, ("-", "--"), strict=True):
    history, look = runs[name][0], {"color": colour, "ls": line}
    _ = axes[0].plot(history[:, 0], **look, label=name)
    for i, which, marker in ((1, "true class", "^"), (2, "others", "v")):
        look |= {"marker": marker, "markevery": 20}
        _ = axes[1].plot(history[:, i], **look, label=f"{name}: {which}")
_ = axes[0].set(xlabel="Step", ylabel="Loss (no unit)", yscale="log")
_ = axes[1].set(xlabel="Step", ylabel="Mean logit (no unit)")
_ = axes[1].axhline(0, color=plotting.BLACK, lw=0.8)
_ = axes[0].legend(fontsize="small")
place = {"loc": "center", "bbox_to_anchor": (0.65, 0.34)}
_ = axes[1].legend(fontsize="x-small", framealpha=1, **place)
plt.show()

# %%
positive_alone, both_terms = runs["positive term alone"], runs["both terms"]
# its loss is nearly gone
assert positive_alone[0][-1, 0] < 0.1 * positive_alone[0][0, 0]
# logits of the wrong classes
assert positive_alone[0][-1, 2] > 0 > both_terms[0][-1, 2]
assert both_terms[1] > positive_alone[1]

# %% [markdown]
# With the positive term alone, nothing pulls a logit down. A large bias in all three classes would
# bring the loss to 0 whatever the input, and that is where $S$ goes: "yes" to all three questions.
# With both terms it has to tell the rows apart, and so it memorises them.
#
# The formula in the paper is not wrong in itself. With a *softmax* the positive term is enough,
# because a larger share of one class means smaller shares of the others. You can see it in the
# gradients. For one slice, and with the sum over classes instead of the mean, the derivative by the
# logit $z_k$ is
#
# $$
# \underbrace{\hat p_k - L_k}_{\text{sigmoids, both terms}} \qquad
# \underbrace{L_k (\hat p_k - 1)}_{\text{sigmoids, positive term}} \qquad
# \underbrace{q_k - L_k}_{\text{softmax } q \text{, positive term}}
# $$
#
# The middle one is 0 for every wrong class.

# %% tags=["nbval-check-output"]
z = torch.tensor([0.5, 1.0, -0.5], requires_grad=True)
one_hot = torch.tensor([0.0, 0.0, 1.0])
both = F.binary_cross_entropy_with_logits(z, one_hot, reduction="sum")
alone = -(one_hot * F.logsigmoid(z)).sum()
softmax = -(one_hot * z.log_softmax(0)).sum()
theory = {
    "both terms": (both, z.sigmoid() - one_hot),
    "positive term": (alone, one_hot * (z.sigmoid() - 1)),
    "softmax": (softmax, z.softmax(0) - one_hot),
}
for name, (loss, expected) in theory.items():
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.allclose(gradient, expected)
    numbers = " ".join(f"{value + 0.0:6.3f}" for value in gradient.tolist())
    print(f"{name:14} {numbers}")

# %% [markdown]
# ## One model of two
#
# By line 2 of Algorithm 1, the classifier starts from the weights of the segmenter. So
# `covid_ct_mask_net` *copies* the segmenter, drops the mask branch from the copy, and puts a fresh
# $S$ behind it.

# %%
segmenter = trained_segmenter(PRESET, device, shipped=True)
assembled = covid_ct_mask_net(segmenter, preset.classifier)

heads = segmenter.roi_heads
branch = heads.mask_head, heads.mask_predictor
masks = sum(count_parameters(part) for part in branch)
s_size = count_parameters(assembled.s)
assert assembled.detector.roi_heads.mask_head is None
assert heads.mask_head is not None  # the segmenter itself keeps its masks
expected = count_parameters(segmenter) - masks + s_size
assert count_parameters(assembled) == expected

# %% [markdown]
# The weights are equal but lie in different memory, so training one model does not change the
# other.

# %% tags=["nbval-check-output"]
source = dict(segmenter.named_parameters())
for name, copied in assembled.detector.named_parameters():
    assert torch.equal(copied, source[name])
    assert copied.data_ptr() != source[name].data_ptr()
print(f"segmenter          {count_parameters(segmenter):10,} parameters")
print(f"- mask branch      {masks:10,}")
print(f"+ module S         {s_size:10,}")
print(f"= classifier       {count_parameters(assembled):10,}")

# %% [markdown]
# The model is assembled now, but not trained: its $S$ is random, and its detector is the
# segmenter's. Does it rank boxes as the *trained* classifier does, from which `friend_rows` came?

# %%
with torch.no_grad():
    again = assembled.ranked_boxes([friend])
    same = torch.allclose(again, friend_rows, atol=1e-4)
    guess = assembled([friend])[0].sigmoid()  # [3]
assert same
print("same ranked boxes as in the trained classifier:", same)
print(
    "fresh S on our old friend:",
    ", ".join(f"{value:.2f}" for value in guess.tolist()),
)

# %% [markdown]
# It does, because the regime "heads" trains $S$ and nothing else: the detector of the trained
# classifier is still the segmenter's. The other two regimes change it.
#
# ### Always in eval mode
#
# The detector contains batch normalisation {cite:p}`Ioffe2015`, which turns a feature $u$ into
#
# $$
# \gamma \, \frac{u - \text{mean}}{\sqrt{\text{variance} + \varepsilon}} + \beta .
# $$
#
# In train mode it takes mean and variance from the *batch*; in eval mode it takes running values
# that were stored in training. So in train mode the result of a slice depends on the slices that
# happen to be beside it. For a classifier in medicine that is a defect: the same slice must give
# the same answer. As in the released code, the detector therefore stays in eval mode, even while
# the classifier trains. `CovidCTMaskNet.train` sees to that.

# %% tags=["nbval-check-output"]
_ = assembled.train()
modes = {"S": assembled.s.training, "detector": assembled.detector.training}
print("in train mode after .train():", modes)
_ = assembled.eval()

four = [friend, others[0], others[each], others[2 * each]]
with torch.no_grad():
    together = model(four)  # [4, 3]
    alone = torch.cat([model([image]) for image in four])  # [4, 3]
assert torch.allclose(together, alone, atol=1e-3)
print("logits of a batch of four equal those of four single slices")

# %% [markdown]
# What would happen otherwise? We put a copy of the backbone into train mode and look at the feature
# maps of our old friend, alone and beside three others.

# %%
probe = covid_ct_mask_net(segmenter, preset.classifier).detector
batch = probe.transform(four)[0].tensors  # [4, 3, H, W]
for mode in ("eval", "train"):
    _ = probe.backbone.train(mode == "train")
    with torch.no_grad():
        single, beside = probe.backbone(batch[:1]), probe.backbone(batch)
    change = max((beside[k][0] - single[k][0]).abs().max() for k in single)
    largest = max(value.abs().max() for value in single.values())
    change = change / largest
    print(f"{mode:5} mode: largest change {change:.2%} of largest feature")

# %% [markdown]
# ## How large is it?
#
# Count $S$ by hand. A linear layer from $a$ to $b$ numbers has $(a + 1) b$ parameters, the 1 being
# the bias:
#
# $$
# |S| = (5N + 1) h + (h + 1) h + (h + 1) \cdot 3 .
# $$

# %% tags=["nbval-check-output"]
def s_parameters(n, h):
    return (5 * n + 1) * h + (h + 1) * h + (h + 1) * 3


assert s_parameters(256, 1024) == 2_364_419
assert s_parameters(n, hidden) == count_parameters(model.s)
for name, other in PRESETS.items():
    boxes, width = other.classifier.n_boxes, other.classifier.hidden
    count = s_parameters(boxes, width)
    print(f"{name:5} N = {boxes:3}, h = {width:4}: {count:9,}")

# %% [markdown]
# Where are the other parameters? Beside the paper's model and the preset `quick` we look at one of
# the author's light models, ResNet-18 with its last layer cut off. We build them on PyTorch's
# `meta` device, which knows shapes but holds no numbers, and so takes no memory.

# %% tags=["nbval-check-output"]
def parts_of(detector_config, config):
    """Parameters of segmenter and S by part."""
    with torch.device("meta"):
        segmenter = lesion_mask_rcnn(detector_config)
        s = ClassificationModule(config.n_boxes, config.hidden)
    heads = segmenter.roi_heads
    modules = {
        "ResNet": [segmenter.backbone.body],
        "FPN": [segmenter.backbone.fpn],
        "RPN": [segmenter.rpn],
        "box head": [heads.box_head, heads.box_predictor],
        "mask branch": [heads.mask_head, heads.mask_predictor],
        "S": [s],
    }
    return {k: sum(map(count_parameters, m)) for k, m in modules.items()}


light = DetectorConfig(backbone="resnet18", cut=1, light_mask_head=True)
light_s = ClassifierConfig(n_boxes=128, hidden=512)
paper, quick = PRESETS["paper"], PRESETS["quick"]
chosen = {
    "paper, ResNet-50": parts_of(paper.detector, paper.classifier),
    "light, ResNet-18": parts_of(light, light_s),
    "preset quick": parts_of(quick.detector, quick.classifier),
}
print(f"{'':14}" + "".join(f"{name:>18}" for name in chosen))
for part in chosen["preset quick"]:
    counts = "".join(f"{parts[part]:18,}" for parts in chosen.values())
    print(f"{part:14}{counts}")
totals = {
    name: sum(p for part, p in parts.items() if part != "mask branch")
    for name, parts in chosen.items()
}
counts = "".join(f"{total:18,}" for total in totals.values())
print(f"{'classifier':14}{counts}")

# %% mystnb={"image": {"alt": "Three stacked horizontal bars, one for each model, in percent of the classifier's parameters: most of the paper's model is the ResNet, and S has a small share in each."}, "figure": {"caption": "Where the parameters of the classifier are. In the regime heads, S is all that trains."}}
fig, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
fills = {
    "ResNet": (plotting.BLUE, ""),
    "FPN": (plotting.SKY_BLUE, "///"),
    "RPN": (plotting.GREEN, "..."),
    "box head": (plotting.YELLOW, "\\\\\\"),
    "S": (plotting.VERMILLION, "xxx"),
}
for row, (name, parts) in enumerate(chosen.items()):
    left = 0.0
    for part, (colour, hatch) in fills.items():
        width = 100 * parts[part] / totals[name]
        style = {"color": colour, "hatch": hatch, "ec": "black", "lw": 0.5}
        style["label"] = part if row == 0 else None
        _ = ax.barh(row, width, 0.6, left, **style)
        left += width
names = [f"{name}\n{totals[name] / 1e6:.2f} million" for name in chosen]
_ = ax.set_yticks(range(len(names)), names)
_ = ax.set(xlabel="Share of the classifier's parameters (%)", xlim=(0, 100))
ax.invert_yaxis()
_ = fig.legend(loc="outside upper center", ncols=5, fontsize="small")
plt.show()

# %% [markdown]
# ### Table 1 of the paper, recounted
#
# "Parameters" can mean two things. `parameters()` holds what an optimiser may change. A state
# dict, the content of a weights file, also holds the running means and variances of batch
# normalisation and its step counters; we call its numbers *entries*. The published numbers mix the
# two, and most of those with two decimals are cut rather than rounded.

# %% tags=["nbval-check-output"]
def entries(module):
    return sum(tensor.numel() for tensor in module.state_dict().values())


# the paper's, or light ones of the released code
def both_models(backbone="resnet50"):
    light = backbone != "resnet50"
    detector = DetectorConfig(backbone=backbone, light_mask_head=light)
    segmenter = lesion_mask_rcnn(detector)
    config = light_s if light else ClassifierConfig()
    return segmenter, covid_ct_mask_net(segmenter, config)


with torch.device("meta"):  # shapes without numbers
    paper_segmenter, paper_model = both_models()
    resnet34 = both_models("resnet34")[1]
    resnet18 = both_models("resnet18")[1]
s_count = count_parameters(paper_model.s)
published = [
    ("Mask R-CNN", 31.78, "segmenter entries", entries(paper_segmenter)),
    ("full", 34.14, "those + S", entries(paper_segmenter) + s_count),
    ("heads+BN", 2.36, "S alone", s_count),
    ("ResNet-34 cut 0", 24.86, "classifier entries", entries(resnet34)),
    ("ResNet-18 cut 0", 14.75, "classifier entries", entries(resnet18)),
    ("S of a light model", 0.6, "S alone", count_parameters(resnet18.s)),
    ("heads", 2.25, "none", None),
    ("ResNet-34 cut 1", 11.74, "none", None),
    ("ResNet-18 cut 1", 6.35, "none", None),
    ("ResNet-34 cut 2", 4.92, "none", None),
    ("ResNet-18 cut 2", 4.25, "none", None),
]
print(f"{'model':18} {'published':>9} {'count':>12}   rule")
for name, millions, rule, count in published:
    counted = f"{count:12,}" if count else f"{'-':>12}"
    print(f"{name:18} {millions:8g}M {counted}   {rule}")

# %% [markdown]
# The first three lines and "heads" are from Table 1 of the paper {cite:p}`TerSarkisov2020`, the
# light models from the README of the released code.
#
# - **31.78M**, segmenter, is the number of *entries*.
# - **34.14M**, classifier, is the number of entries of the segmenter plus $S$. It counts a mask
#   branch that the classifier never runs.
# - **2.36M**, called heads + BN (batch normalisation), fits $S$ alone; with BN it would be more.
# - **2.25M**, called heads, fits more than one rule, as we shall see.
# - Four light models fit no rule that we know.
#
# Counted the same way throughout, as parameters, and for the classifier without masks:

# %% tags=["nbval-check-output"]
rpn = count_parameters(paper_model.detector.rpn)
whole = count_parameters(paper_model)
heads_bn = sum(p.numel() for p in set_regime(paper_model, "heads_bn"))
segmenter_size = count_parameters(paper_segmenter)
print(f"segmenter                     {segmenter_size:12,}")
print(f"classifier                    {whole:12,}")
print(f"trains in heads: S            {s_count:12,}")
print(f"trains in heads + BN          {heads_bn:12,}")
print(f"gets a gradient in full       {whole - rpn:12,}   (without RPN)")

# %% tags=["nbval-check-output"]
roi_heads = paper_model.detector.roi_heads
box_heads = count_parameters(roi_heads.box_head)
box_heads += count_parameters(roi_heads.box_predictor)
norms = [m for m in paper_model.modules() if isinstance(m, nn.BatchNorm2d)]
# gamma and beta; as many running values
affine = sum(2 * norm.num_features for norm in norms)
own, with_bn = rpn + box_heads, rpn + box_heads + 2 * affine
print(f"S / 2**20                           {s_count / 2**20:.4f}")
print(f"RPN and box heads, millions         {own / 1e6:.4f}")
print(f"those and all values of BN          {with_bn / 1e6:.4f}")

# %% [markdown]
# The first two come to 2.25. The third gives 2.36 if it is rounded (if it is cut, as most numbers
# here are, 2.35), so "heads" and "heads + BN" may mean the detector's own heads rather than $S$.
# But $S$ gives 2.36 as well. The paper does not say, and we leave it open.
#
# The last column of Table 1 is headed "Train/Test" but holds test/train. COVID-CT-Mask-Net trains
# on 3,000 slices, and each confusion matrix in the README of the released code sums to 21,191:

# %% tags=["nbval-check-output"]
print(f"test / train {21_191 / 3_000:.2f} (printed 7.06)")
print(f"train / test {3_000 / 21_191:.2f}")
print(f"COVNet: 438 / 3,000 = {438 / 3_000:.3f} (printed 0.129)")

# %% [markdown]
# A large ratio says that the test set is large. It does not say that a model generalises. For that
# it matters whose slices the test set holds, and these come from the same source as those for
# training ([chapter 10](10_evaluation.ipynb)).
#
# ## What does S look at?
#
# $S$ is made of linear layers and ReLUs. As long as no ReLU switches, $S$ is exactly linear, and
# its slope is a product of matrices. Let $D_1$ and $D_2$ be diagonal matrices with a 1 for each
# unit of the first and the second hidden layer that is above 0:
#
# $$
# \frac{\partial z_2}{\partial x} = W_3[2] \; D_2 \; W_2 \; D_1 \; W_1 \; \in \mathbb{R}^{5N} .
# $$

# %%
def slope_by_hand(rows, matrices, biases, k=2):
    """Gradient of logit k by every input, float32 [B, N, 5]."""
    a1 = rows.flatten(1) @ matrices[0].T + biases[0]  # [B, hidden]
    a2 = a1.clamp(min=0) @ matrices[1].T + biases[1]  # [B, hidden]
    slope = matrices[2][k] * (a2 > 0)  # [B, hidden]
    slope = (slope @ matrices[1]) * (a1 > 0)  # [B, hidden]
    return (slope @ matrices[0]).reshape(rows.shape)  # [B, N, 5]


slope = slope_by_hand(rows, *trained)
variable = rows.clone().requires_grad_(True)
(gradient,) = torch.autograd.grad(model.s(variable)[:, 2].sum(), variable)
assert torch.allclose(slope, gradient, atol=1e-4)
print(tuple(slope.shape), "by hand and by autograd")

# %% [markdown]
# The gradient says how much the COVID-19 logit would rise if one number rose by 1, but a score at
# the end of the ranking never varies by that much. So the right panel multiplies the gradient by
# the spread (standard deviation) that the number has over our phantoms: the effect of a change of
# usual size.

# %% mystnb={"image": {"alt": "Left: gradient of the COVID-19 logit by the score at each rank, for our old friend and as a mean over control, common pneumonia and COVID-19 phantoms. Right: gradient times spread by rank, one curve for the score and one for the four deltas together."}, "figure": {"caption": "Which inputs move the COVID-19 logit. Left: by the score at each rank. Right: effect of a change of usual size. Ranks on a logarithmic axis, mean over phantoms. Synthetic."}}
groups = {"Old friend": slope[:1]}
for k, name in enumerate(IMAGE_CLASSES):
    groups[name] = slope[1:][labels == k]
colours = plotting.BLACK, *plotting.CLASS_COLOURS
lines = "-.", *plotting.CLASS_LINES
ranks = np.arange(1, n + 1)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
for name, colour, line in zip(groups, colours, lines, strict=True):
    mean = groups[name][..., 0].mean(0).cpu()
    _ = axes[0].plot(ranks, mean, color=colour, ls=line, label=name)
_ = axes[0].axhline(0, color=plotting.BLACK, lw=0.8)
_ = axes[0].set(xlabel="Rank", ylabel="Gradient by the score (no unit)")
_ = axes[0].legend(fontsize="small")
effect = (slope.abs() * rows.std(0)).mean(0).cpu()  # [N, 5]
_ = axes[1].plot(ranks, effect[:, 0], color=plotting.ORANGE, label="score")
look = {"color": plotting.SKY_BLUE, "ls": "--"}
deltas = effect[:, 1:].sum(1)
_ = axes[1].plot(ranks, deltas, **look, label="four deltas together")
_ = axes[1].set(xlabel="Rank", ylabel="|gradient| x spread (no unit)")
_ = axes[1].set_ylim(0, None)
_ = axes[1].legend(fontsize="small")
ticks = [2**power for power in range(n.bit_length()) if 2**power <= n]
for ax in axes:
    _ = ax.set_xscale("log", base=2)
    _ = ax.set_xticks(ticks, [str(tick) for tick in ticks])
plt.show()

# %%
bands = {
    "1": slice(0, 1),
    f"2 to {n // 4}": slice(1, n // 4),
    f"{n // 2 + 1} to {n}": slice(n // 2, n),
}
header = "".join(f"{name:>10}" for name in bands)
print(f"{'mean gradient by the score, at ranks':38}{header}")
for name, values in groups.items():
    means = [values[:, band, 0].mean().item() for band in bands.values()]
    print(f"{name:38}" + "".join(f"{mean:10.3f}" for mean in means))
share = (effect.sum(0) / effect.sum()).tolist()  # of the five columns
named = zip(plotting.BOX_NUMBERS, share, strict=True)
shares = [f"{name} {value:.0%}" for name, value in named]
print("share of |gradient| x spread:", ", ".join(shares))

# %% [markdown]
# How do you read this?
#
# - A positive value says that a higher score at these ranks would push the slice towards COVID-19,
#   a negative one away from it. The first rank need not agree with the next ones.
# - The last line compares the score with the four deltas. It says how much each *could* do, because
#   it adds up absolute values, and the effects of many deltas may cancel.
# - All of this is one $S$ from one training (seed 0), and the rows of the classes are means over
#   eight phantoms each, without an interval. Another seed may give other signs, so do not make a
#   story of a sign.
#
# In our phantoms COVID-19 usually has many lesions on both sides, and common pneumonia one to
# three. An $S$ that has learned to count boxes with high scores has found this rule of the
# phantoms, and nothing about patients. And a gradient is local: it says what a small change would
# do, not why the slice got its class. [Chapter 11](11_what_makes_it_work.ipynb) removes scores and
# deltas and trains anew, which is the stronger test.
#
# ### Turn the knob
#
# Now a change that is not small: we take the control from above and replace its best boxes, one,
# two, four and so on, by those of our old friend. How many does it take until $S$ changes its
# answer?

# %%
control_rows = rows[shown["Control"]]  # [N, 5]
steps = sorted({0, *(n // 2**power for power in range(6))})


def draw_mixture(k):
    """Scores of the mixed ranking, and the probabilities that it gets."""
    mixed = torch.cat([friend_rows[0, :k], control_rows[k:]])  # [N, 5]
    with torch.no_grad():
        p = model.s(mixed[None])[0].sigmoid().cpu()  # [3]
    fig, axes = plt.subplots(1, 2, figsize=(6.6, 3.3), layout="constrained")
    ends = (mixed[:k, 0].cpu(), mixed[k:, 0].cpu())
    look = {"color": plotting.VERMILLION, "ms": 4}
    _ = axes[0].plot(ranks[:k], ends[0], "o", **look, label="old friend")
    look = {"color": plotting.GREEN, "ms": 4, "mfc": "none"}
    _ = axes[0].plot(ranks[k:], ends[1], "s", **look, label="control")
    _ = axes[0].set(xlabel="Rank", ylabel="Score (no unit)")
    _ = axes[0].set(xlim=(0, n + 1), ylim=(-0.05, 1.05))
    _ = axes[0].legend(fontsize="small")
    names = [name.replace(" ", "\n") for name in IMAGE_CLASSES]
    look = {"color": plotting.CLASS_COLOURS, "ec": "black", "lw": 0.5}
    bars = axes[1].bar(names, p, **look)
    _ = axes[1].bar_label(bars, fmt="%.2f")
    _ = axes[1].set(xlabel="Image class", ylim=(0, 1.12))
    _ = axes[1].set_ylabel("Probability (no unit)")
    return fig


frame_slider(
    [draw_mixture(k) for k in steps],
    [f"{k} of {n} boxes from the old friend" for k in steps],
    "Ranked boxes taken from the old friend",
    "Left: scores by rank, the first from the old friend and the others "
    "from a control. Right: three bars with the probabilities of control, "
    "common pneumonia and COVID-19",
    caption="A control whose best boxes give way to those of a COVID-19 phantom. Synthetic.",
    dpi=80,
)

# %% [markdown]
# Start with few boxes: which class gains from the first one, and which from the later ones? Then
# compare the left panel with the right one. If a probability still changes where the scores of both
# slices are near 0, the scores can hardly be the reason, and the deltas must be.
#
# The next cell needs a running notebook. It shows the same for any number of boxes.

# %% tags=["remove-output"]
def show_mixture(k):
    _ = draw_mixture(k)
    plt.show()


slider = ipywidgets.IntSlider(min=0, max=n, value=0, description="boxes")
_ = ipywidgets.interact(show_mixture, k=slider)

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Other sizes of S
#
# Kind: experiment, **
#
# Compute the size of $S$ for $h = 1024$ and $N = 1, 16, 64, 256$. How small can a smaller $N$ alone
# make $S$? Check one count with `ClassificationModule`.

# %% tags=["solution"]
# @title Solution
for boxes in (1, 16, 64, 256):
    print(f"N = {boxes:3}: {s_parameters(boxes, 1024):9,}")
with torch.device("meta"):
    assert count_parameters(ClassificationModule(64, 1024)) == s_parameters(64, 1024)
print(f"middle layer alone: {(1024 + 1) * 1024:,}")

# %% [markdown] tags=["answer"]
# The middle layer does not depend on $N$, so $S$ stays above a million. A smaller $h$ saves more.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Rows in another order
#
# Kind: experiment, **
#
# Shuffle the rows of our old friend twenty times. The boxes stay the same. What happens to the
# three probabilities and to the predicted class?

# %% tags=["solution"]
# @title Solution
generator = torch.Generator().manual_seed(SEED)
orders = [torch.randperm(n, generator=generator).to(device) for _ in range(20)]
with torch.no_grad():
    # [20, 3]
    shuffled = model.s(torch.cat([friend_rows[:, order] for order in orders])).sigmoid()
for k, name in enumerate(IMAGE_CLASSES):
    low, high = shuffled[:, k].min().item(), shuffled[:, k].max().item()
    print(f"{name:17} ranked {probabilities[0, k].item():.2f}, shuffled {low:.2f} to {high:.2f}")
print(
    "predicted classes:",
    sorted({IMAGE_CLASSES[k] for k in shuffled.argmax(1).tolist()}),
)
assert shuffled.std(0).max() > 0.01

# %% [markdown] tags=["answer"]
# $S$ was trained on ranked rows, so it has no use for shuffled ones. Whether the order *helps* is
# another question: it takes an $S$ that was trained on shuffled rows, as in [chapter
# 11](11_what_makes_it_work.ipynb).

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · A linear layer in place of S
#
# Kind: experiment, **
#
# Does $S$ need its hidden layers? Draw some phantoms of each class, rank their boxes, and train a
# fresh $S$ and a single linear layer from $5N$ to 3 on the first two thirds. Compare both on the
# last third, and with the $S$ of the loaded model, which has seen many more phantoms.

# %% tags=["solution"]
# @title Solution
class Linear(nn.Module):
    """float32 [B, N, 5] -> logits [B, 3]."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5 * n, 3)

    def forward(self, rows):
        return self.fc(rows.flatten(1))


each_class, drawn_rows = 60, []
drawn_labels = torch.arange(3).repeat_interleave(each_class)
with torch.no_grad():
    for k in range(3):
        for seed in range(100, 100 + each_class):
            drawn_rows.append(model.ranked_boxes([model_input(make_slice(seed, k, size)[0])]).cpu())
drawn_rows = torch.cat(drawn_rows)  # [180, N, 5]
learn = torch.arange(each_class).repeat(3) < 2 * each_class // 3
candidates = {
    "linear": Linear,
    "S": lambda: ClassificationModule(n, hidden),
}


def on_others(right):
    """Share of the last third that is right, with a 95 % interval."""
    count, of = int(right[~learn].sum()), int((~learn).sum())
    return "{:12.0%}, {:.0%} to {:.0%}".format(count / of, *wilson(count, of))


print(f"{'':9} parameters   right on training phantoms   on the others, 95 %")
for name, make in candidates.items():
    torch.manual_seed(SEED)
    small = make()
    _ = train_s(
        small, drawn_rows[learn], drawn_labels[learn], preset.classifier_training, progress=False
    )
    with torch.no_grad():
        right = (small.cpu()(drawn_rows).argmax(1) == drawn_labels).float()
    size_of = f"{name:9} {count_parameters(small):10,}"
    print(f"{size_of} {right[learn].mean().item():27.0%} {on_others(right)}")
with torch.no_grad():
    right = (model.s(drawn_rows.to(device)).argmax(1).cpu() == drawn_labels).float()
print(f"{'loaded S':9} {count_parameters(model.s):10,} {'-':>27} {on_others(right)}")

# %% [markdown] tags=["answer"]
# A module that is right on all its training phantoms but not on others has memorised them. The
# intervals show how little so few phantoms can decide between the linear layer and $S$. The loaded
# $S$ is as large as the fresh one, but it has seen more phantoms.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Parameters of batch normalisation
#
# Kind: experiment, **
#
# Count gamma and beta of all batch-norm layers of the paper's detector: two numbers a channel. The
# released code picks what trains by looking for `bn` in a parameter's name. Which layers does that
# miss, and how many parameters train in its heads + BN?

# %% tags=["solution"]
# @title Solution
layers = [m for m in paper_model.detector.modules() if isinstance(m, nn.BatchNorm2d)]
by_hand = sum(2 * layer.num_features for layer in layers)
assert by_hand == sum(p.numel() for p in batch_norm_parameters(paper_model.detector))
named = {name: p.numel() for name, p in paper_model.detector.named_parameters()}
found = sum(count for name, count in named.items() if ".bn" in name)
missed = [name for name in named if "downsample.1" in name]
print(f"{len(layers)} layers, {by_hand:,} parameters; a name with bn: {found:,}")
print(f"missed: {len(missed)} parameter tensors, such as {missed[0]}")
print(f"heads + BN: {s_count + found:,} by name, {s_count + by_hand:,} with all")
assert s_count + found == 2_409_859

# %% [markdown] tags=["answer"]
# The batch norms in the shortcut branches are called `downsample.1`, so a search for `bn` misses
# them. The package trains them in `heads_bn`.

# %% [markdown]
# ## What we learned
#
# 1. $S$ is three matrices and two ReLUs on $5N$ numbers; the position of a number tells its rank.
# 2. Three sigmoids answer three yes-or-no questions, so the loss needs both of its terms.
# 3. The classifier is a copy of the segmenter without masks, always in eval mode, and $S$.
# 4. Table 1 of the paper mixes parameters with entries of the state dict; the module $S$ alone has
#    2,364,419 parameters.
# 5. The gradient shows which ranks move a trained $S$, but only near the input where it is taken.
#
# ## Further reading
#
# The model and its Figure 3 are in {cite:t}`TerSarkisov2020`. Mask R-CNN, which it starts from, is
# {cite:t}`He2017`; batch normalisation, {cite:t}`Ioffe2015`; the residual networks with their
# shortcut branches, {cite:t}`He2016`. {cite:t}`Gunraj2020` train one network on whole slices
# instead.

