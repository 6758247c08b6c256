# %% [markdown]
# # 0 · The whole path
#
# Welcome. A slice of a chest CT goes in, and three numbers come out, one for each kind of patient:
# control, common pneumonia, COVID-19. In between, a network draws boxes around what may be lesions.
# That is an unusual way to classify a picture, and the idea of the paper behind this book
# {cite:p}`TerSarkisov2020`. In this chapter we walk the whole path once, with a detector that is already
# trained, so that you have seen every station before we take it apart. The question is: **how can a
# handful of boxes say what a whole slice shows?**

# %% tags=["fold"] mystnb={"image": {"alt": "Four panels. One: a synthetic chest slice with two grey lungs. Two: the same slice with boxes and outlines around lesions, each with a score. Three: a heat map of 32 columns, one for each box, with the score and four deltas in rows; scores fall from left to right. Four: three bars, the probabilities of control, common pneumonia and COVID-19; COVID-19 is the highest."}, "figure": {"caption": "The whole path of one slice. A detector finds lesions (GGO solid, consolidation dashed); its boxes, sorted by score, become a table of numbers; a small network reads the table and gives three probabilities. A synthetic slice of a COVID-19 patient."}}
# @title Import what we need, and draw the whole path of one slice
import matplotlib.pyplot as plt
import torch
from sklearn.linear_model import LogisticRegression

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import make_slice, mask_to_targets, old_friend
from covidmask.interactive import frame_slider
from covidmask.metrics import confusion, report, wilson
from covidmask.models import (
    ClassificationModule,
    covid_ct_mask_net,
    trained_classifier,
    trained_segmenter,
)
from covidmask.training import train_s

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")


def draw_bars(probabilities, ax):
    """Three probabilities as bars, with their values."""
    bars = ax.barh(IMAGE_CLASSES, probabilities, color=plotting.CLASS_COLOURS)
    for bar, hatch in zip(bars, ("", "///", "..."), strict=True):
        _ = bar.set(hatch=hatch, edgecolor="k")
    _ = ax.bar_label(bars, [f" {p:.2f}" for p in probabilities])
    _ = ax.set(xlim=(0, 1.15), xlabel="Probability (no unit)")
    ax.invert_yaxis()


friend = old_friend(PRESETS["quick"].phantoms.size)[0]
first_look = torch.from_numpy(friend).expand(3, -1, -1).to(device)
whole = trained_classifier("quick", device, shipped=True)
with torch.no_grad():
    lesions = trained_segmenter("quick", device, shipped=True)([first_look])[0]
    table = whole.ranked_boxes([first_look])
    probabilities = whole.s(table)[0].sigmoid().tolist()
fig, axes = plt.subplots(2, 2, figsize=(9, 7.2), layout="constrained")
_ = plotting.show_slice(friend, axes[0, 0])
_ = plotting.show_lesions(friend, lesions, axes[0, 1], score_threshold=0.5)
_ = plotting.ranked_box_matrix(table[0].cpu(), axes[1, 0])
draw_bars(probabilities, axes[1, 1])
steps = (
    "1 · A slice goes in",
    "2 · A detector finds boxes",
    "3 · Its boxes, ranked by score",
    "4 · Three probabilities",
)
for ax, step in zip(axes.flat, steps, strict=True):
    _ = ax.set_title(step, loc="left", fontsize=12)
if legend := axes[0, 1].get_legend():  # in a corner where there is no lesion
    names = [text.get_text() for text in legend.get_texts()]
    _ = axes[0, 1].legend(legend.legend_handles, names, loc="lower right", fontsize=9)
plt.show()

# %% [markdown]
# **After it you can**
#
# - name the two kinds of label that the method needs, and the two models that learn from them;
# - turn the detections of a slice into the vector that the classifier reads;
# - train the classifier in seconds, and say why it takes no longer;
# - say what a good result on synthetic slices shows, and what it does not.
#
# **You need** Python and some PyTorch. No medicine, and no experience with object detection.
#
# **Time:** reading 12 min, exercises 25 min, running 2 min on two CPU cores.
#
# ```{admonition} Synthetic data
# :class: important
# Every slice in this chapter is a *phantom*: a picture made by formulas and random numbers. No number
# below is a result on patients, and nothing here is for diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper", with weights of your own
SEED = 0
SLICES = 200  # of each class, half of them to learn from

# %% [markdown]
# A preset holds all settings of one scale, from the size of the images to the learning rates. `quick`
# is small enough for a laptop; `paper` has the sizes of the paper.

# %%
preset = PRESETS[PRESET]
size, n = preset.phantoms.size, preset.classifier.n_boxes
print(f"{size} x {size} pixels, N = {n} boxes of each slice")

# %% [markdown]
# ## Step 1: look for lesions
#
# The method learns from two kinds of label, and from two sets of patients:
#
# - **Lesion masks** say which pixels are *ground-glass opacity* (GGO, a haze in the lung) or
#   *consolidation* (C, lung without air). An expert needs a long time to draw one, so there are few. In
#   the paper they are of COVID-19 patients only {cite:p}`Zhang2020`. They teach the **detector**.
# - **Slice labels** are one word each: control, common pneumonia or COVID-19 {cite:p}`Gunraj2020`. They
#   teach the **classifier**.
#
# The slice above is our *old friend*: you will meet it in most chapters, and no model of this book was
# trained on it. By construction it shows COVID-19, and we know each of its lesions:

# %% tags=["nbval-check-output"]
image, mask = old_friend(size)
truth = mask_to_targets(mask, min_area=preset.min_area)
for label, name in enumerate(("GGO", "C"), start=1):
    print(f"{name:3} lesions: {int((truth['labels'] == label).sum())}")

# %% [markdown]
# The detector is a Mask R-CNN {cite:p}`He2017`. It proposes boxes, calls each one background, GGO or C,
# corrects its place, and draws a mask inside it. We load a small one that was trained on other phantoms
# ([its card](weights.md)).

# %%
segmenter = trained_segmenter(PRESET, device, shipped=True)
picture = torch.from_numpy(image).expand(3, -1, -1).to(device)
with torch.no_grad():
    found = segmenter([picture])[0]
print({key: tuple(value.shape) for key, value in found.items()})

# %% [markdown]
# Each box comes with a score between 0 and 1. Usually only boxes with high scores are shown, and the
# others are thrown away. Move the slider: what does a threshold hide?


# %% tags=["fold"]
# @title Draw the true lesions, and the boxes above six thresholds
def draw_boxes(lesions, threshold, title):
    """The old friend with the boxes that score above a threshold."""
    fig, ax = plt.subplots(figsize=(5.2, 4.8), layout="constrained")
    _ = plotting.show_lesions(image, lesions, ax, score_threshold=threshold)
    _ = ax.set_title(title)
    return fig


frames = [draw_boxes(truth, 0, f"the truth: {len(truth['labels'])} lesions")]
labels = ["the true lesions"]
for threshold in (0.9, 0.75, 0.5, 0.25, 0.1, 0.05):
    count = int((found["scores"] > threshold).sum())
    frames.append(draw_boxes(found, threshold, f"{count} boxes above {threshold}"))
    labels.append(f"boxes above {threshold}")
frame_slider(
    frames,
    labels,
    "Score threshold",
    "The synthetic slice with boxes around lesions",
    caption="The true lesions of our old friend, and what the detector finds. "
    "The lower the threshold, the more boxes, right and wrong ones.",
    start=3,
    dpi=70,
)

# %% [markdown]
# ## Step 2: from boxes to a vector
#
# Here is the idea of the paper. A classifier needs the same number of inputs for every slice, but a sick
# slice has many good boxes and a healthy one few or none. So we set no threshold: we keep the $N$ best
# boxes *however low they score*. Each becomes a row of five numbers,
#
# $$ r = (s, \delta_x, \delta_y, \delta_w, \delta_h), $$
#
# its score $s$, and four *deltas* that say how the detector moved and resized the box. The rows are
# sorted by score. These are the **ranked boxes**, and [chapter 6](06_ranked_boxes.ipynb) builds them by
# hand. Let us compare our old friend with a healthy phantom.

# %%
# the detector, and a classifier on top that has learned nothing yet
model = covid_ct_mask_net(segmenter, preset.classifier)


@torch.no_grad()
def rank(images):
    """Slices [H, W], as a list -> their ranked boxes, [M, N, 5]."""
    parts = []
    for start in range(0, len(images), 8):  # eight at a time
        batch = map(torch.from_numpy, images[start : start + 8])
        batch = [one.expand(3, -1, -1).to(device) for one in batch]
        parts.append(model.ranked_boxes(batch).cpu())
    return torch.cat(parts)


healthy = make_slice(seed=SLICES, label=0, size=size)[0]
pair = rank([image, healthy])
assert pair.shape == (2, n, 5)
assert (pair[:, :-1, 0] >= pair[:, 1:, 0]).all(), "sorted by score"

# %% tags=["fold"] mystnb={"image": {"alt": "Above, a heat map of the ranked boxes of our old friend: five lines, score and four deltas, and a column for each rank. Below, scores against rank for our old friend and for a healthy slice: those of the friend begin near 1 and fall slowly, those of the healthy slice begin lower and fall at once."}, "figure": {"caption": "Above: the table of our old friend; the number behind each name is the largest magnitude in that line. Below: its first line, the scores, beside those of a healthy slice. Synthetic."}}
# @title Draw the ranked boxes, and the scores of both slices
fig, axes = plt.subplots(2, 1, figsize=(8.5, 5.6), layout="constrained")
_ = plotting.ranked_box_matrix(pair[0], axes[0])
ranks = range(1, n + 1)
looks = (
    ("o--", plotting.VERMILLION, "our old friend"),
    ("s-", plotting.GREEN, "a healthy slice"),
)
for rows, (line, colour, name) in zip(pair, looks, strict=True):
    _ = axes[1].plot(ranks, rows[:, 0], line, color=colour, label=name)
_ = axes[1].set(xlabel="Rank of the box (1 is the best score)", xlim=(0.5, n + 0.5))
_ = axes[1].set(ylabel="Score (no unit)", ylim=(0, 1.05))
_ = axes[1].legend()
plt.show()

# %% [markdown]
# The healthy slice has as many rows as our old friend. What differs is what stands in them, and that is
# what the classifier will learn from.
#
# ## Step 3: many slices
#
# To learn and to judge we need many slices, so we draw phantoms of the three classes, each of another
# patient. The detector looks at each slice *once*: as long as its weights stay the same, so do the
# ranked boxes, and we can keep them.

# %%
split = SLICES // 2  # so many of each class to learn from
train_rows, test_rows = [], []
for label in range(3):
    seeds = range(SLICES)
    images = [make_slice(seed, label, size)[0] for seed in seeds]
    ranked = rank(images)
    train_rows.append(ranked[:split])
    test_rows.append(ranked[split:])
train_rows, test_rows = torch.cat(train_rows), torch.cat(test_rows)
train_labels = torch.arange(3).repeat_interleave(split)
test_labels = torch.arange(3).repeat_interleave(SLICES - split)
print("to learn from:", tuple(train_rows.shape))
print("to judge:     ", tuple(test_rows.shape))

# %% [markdown]
# Before we train anything, look at the scores. Where does each curve start, and how fast does it fall?

# %% tags=["fold"] mystnb={"image": {"alt": "Mean score against rank for control, common pneumonia and COVID-19: three falling curves, each with a band. Control is lowest, COVID-19 is highest."}, "figure": {"caption": "Scores by rank in the three classes, with the band from the 25 to the 75 percent quantile. Synthetic slices to learn from."}}
# @title Draw the scores by rank
_ = plotting.score_by_rank(train_rows, train_labels)
plt.show()

# %% [markdown]
# A slice with many lesions has many boxes with high scores, so its curve falls late. A slice with one or
# two lesions has a few, and a healthy slice fewer still. So the *shape of the ranking* already says
# something about the class. But the bands overlap, so for a single slice it is no proof.
#
# ## Step 4: a small network learns to read
#
# The classifier is called $S$. It reads the $N \times 5$ numbers as one vector, passes them through two
# hidden layers, and gives three numbers, which a *sigmoid* turns into probabilities. The detector stays
# as it is; so its part of the work is done, and $S$ trains in seconds.

# %%
s = ClassificationModule(n, preset.classifier.hidden).to(device)
settings = preset.classifier_training
_ = train_s(s, train_rows, train_labels, settings, seed=SEED)


@torch.no_grad()
def predict(network, rows):
    """Ranked boxes [M, N, 5] -> probabilities of the classes, [M, 3]."""
    return network(rows.to(device)).sigmoid().cpu()


predicted = predict(s, test_rows).argmax(dim=1)
right = predicted == test_labels

# %% [markdown]
# ## Step 5: the report
#
# How good is it, on patients that neither model has seen? The *accuracy* is the share of slices that
# are classified correctly. With so few slices chance moves it a good deal, and Wilson's interval says
# how far {cite:p}`Wilson1927`.

# %%
low, high = wilson(int(right.sum()), len(right))
print(f"accuracy {right.float().mean():.1%} of {len(right)} phantoms")
print(f"95 % interval: {low:.1%} to {high:.1%}; chance: {1 / 3:.1%}")
assert low > 1 / 3, "better than guessing"

# %% tags=["fold"] mystnb={"image": {"alt": "Confusion matrix of three classes with counts and percentages."}, "figure": {"caption": "What the small S says about phantom patients it has not seen. A row is a true class, and its percentages add up to 100. Synthetic."}}
# @title Draw the confusion matrix
_ = plotting.confusion_matrix(confusion(test_labels, predicted))
plt.show()

# %% [markdown]
# The diagonal holds the slices that are right. In each row it gives the *sensitivity*, the share of a
# class that is found. Now look for the largest number beside the diagonal: which two classes does $S$
# confuse most, and does that surprise you after the curves above?
#
# Our $S$ has learned from few slices. The package brings one with the same layers that has seen thousands
# of phantoms, none of them here; it drew the fourth panel of the first picture. How does it do on the same
# test slices?

# %%
experienced = trained_classifier(PRESET, device, shipped=True)
same = predict(experienced.s, test_rows).argmax(dim=1) == test_labels
low, high = wilson(int(same.sum()), len(same))
phantoms = preset.phantoms  # of those that it learned from
seen = 3 * phantoms.class_patients[0] * phantoms.slices_per_patient
print(f"S of {seen:,} slices: accuracy {same.float().mean():.1%}", end=" ")
print(f"(95 %: {low:.1%} to {high:.1%})")

# %% [markdown]
# ## Back to our old friend
#
# What do the two say of the slice that we started with?

# %% tags=["fold"] mystnb={"image": {"alt": "Two bar charts with the probabilities of control, common pneumonia and COVID-19 for our old friend: left by S of few slices, right by S of many slices."}, "figure": {"caption": "Three probabilities for our old friend, by the S that you have just trained (left) and by the one that has seen thousands of slices (right). By construction the slice shows COVID-19. Synthetic."}}
# @title Draw what both say of our old friend
fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
readers = (s, f"S of {len(train_rows)} slices"), (experienced.s, "S of many slices")
for ax, (reader, name) in zip(axes, readers, strict=True):
    draw_bars(predict(reader, pair[:1])[0].tolist(), ax)
    _ = ax.set_title(name, loc="left")
axes[0].invert_yaxis()  # shared: drawn twice, turned twice
plt.show()

# %% [markdown]
# The three numbers need not sum to 1, because each answers a yes-or-no question of its own. The
# prediction is the largest of them.
#
# What can we learn from one slice? Less than it seems. In the run shown here both are right, and our own
# $S$ is the surer of the two. But the row of COVID-19 in its confusion matrix says that it misses many such
# slices, and the accuracies above say that the other one is right more often. So a probability near 1 tells
# how convinced a network is, and not how often it is right. If a prediction is wrong in your run, the same
# row tells you not to be surprised. That is why the rest of this book counts many slices, and gives an
# interval.
#
# So, how can a handful of boxes say what a whole slice shows? By their scores and their order: a ranking
# that falls late looks like many lesions, one that falls at once looks like none. Exercise 5 shows how
# small the handful may be. What else is in the five numbers, and whether it is enough for real patients,
# are the questions of the chapters to come.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Which labels does the detector learn from?**
#
# - [ ] One word for each slice, such as COVID-19. :: These teach the classifier.
# - [x] Masks that say which pixels are GGO or consolidation. :: From them it learns boxes, classes and masks.
# - [ ] The probabilities that the classifier gives. :: The detector is trained first, and knows nothing of $S$.
#
# **2. Why do boxes with very low scores stay?**
#
# - [ ] Many of them turn out to be lesions after all. :: Most are wrong, as the slider shows.
# - [ ] Without them, training would take longer. :: Fewer boxes would make it faster, if anything.
# - [x] So that each slice, a healthy one too, has N rows. :: With a threshold a healthy slice might have none.
#
# **3. What stands in a row of the ranked boxes?**
#
# - [x] A score and four deltas. :: Five numbers, in that order.
# - [ ] A score and the four edges in pixels. :: The edges are not among them; chapter 6 shows why that matters.
# - [ ] A class and four deltas. :: The class itself is not written down, only the score.
#
# **4. Why is each slice shown to the detector only once?**
#
# - [ ] Because a second look would give other boxes. :: The same weights give the same boxes.
# - [x] Because its weights do not change while S learns. :: So its answer can be kept.
# - [ ] Because S would otherwise learn the slices by heart. :: S sees the same rows in every epoch.
#
# **5. Two networks call a slice COVID-19, one with 0.99 and one with 0.72. Which one do you trust?**
#
# - [ ] The first, because its probability is higher. :: It may be too sure of itself.
# - [ ] The second, because modest networks err less. :: Modesty proves nothing either.
# - [x] I cannot say until both are judged on many slices. :: That is what the report is for.
#
# **6. S reaches a high accuracy on phantoms. What follows for patients?**
#
# - [ ] It will do nearly as well, since phantoms look like CT. :: Looks are no evidence; chapter 15 tries it.
# - [x] Nothing yet: it has learned the rules by which we draw. :: Only patients can show more.
# - [ ] It will fail, since phantoms are not real. :: That does not follow either.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Where is the score?
#
# Kind: pencil, *
#
# $S$ reads the $N \times 5$ numbers as one vector, row after row. At which index of the vector does the
# score of the box with rank $k$ stand, if ranks begin at 1 and indices at 0? And how long is the vector
# for `boxes` boxes? Write the two formulas.
#
# Hint: Write down the indices of the scores of the first three boxes.


# %% tags=["starter"]
def place_of_score(k):
    """Index of the score of the box with rank k = 1, 2, ... in the vector."""
    raise NotImplementedError("your formula")


def length(boxes):
    """Numbers in the vector of so many boxes."""
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def place_of_score(k):
    """Index of the score of the box with rank k = 1, 2, ... in the vector."""
    return 5 * (k - 1)


def length(boxes):
    """Numbers in the vector of so many boxes."""
    return 5 * boxes


print(f"{n} boxes: {length(n)} numbers; 256, as in the released code: {length(256)}")


# %% tags=["wrong"]
def place_of_score(k):
    return 5 * k  # forgets that indices begin at 0


def length(boxes):
    return 5 * boxes


# %% tags=["wrong"]
def place_of_score(k):
    return k - 1  # all scores first, then all deltas


def length(boxes):
    return 5 * boxes


# %% tags=["wrong"]
def place_of_score(k):
    return 5 * (k - 1)


def length(boxes):
    return 4 * boxes  # forgets the score


# %% tags=["check"]
# @title Check your answer
vector = train_rows[-1].flatten()
assert length(n) == len(vector), "count the numbers of one row again"
assert place_of_score(1) == 0, "the vector begins with the score of the best box"
for k in range(1, n + 1):
    at = place_of_score(k)
    assert at < len(vector), f"rank {k}: index {at} lies outside the vector"
    score = train_rows[-1][k - 1, 0]
    assert vector[at] == score, f"rank {k}: another number stands there"
print("Right.")

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · One number
#
# Kind: predict, then run, *
#
# Give a classifier nothing but the *best score* of each slice. Predict: which of the three classes will
# such a rule find, and which will it miss? Then try it with `LogisticRegression` on
# `train_rows[:, 0, :1]`, and compare its accuracy with that of $S$.
#
# Hint: The curves of step 3 show where each class starts, on the left.

# %% tags=["solution"]
# @title Solution
rule = LogisticRegression().fit(train_rows[:, 0, :1].numpy(), train_labels.numpy())
guess = torch.from_numpy(rule.predict(test_rows[:, 0, :1].numpy()))
of_rule = report(confusion(test_labels, guess))
for name, value in zip(IMAGE_CLASSES, of_rule["sensitivity"], strict=True):
    print(f"{name:18} found {value:.0%}")
count = int((guess == test_labels).sum())
low, high = wilson(count, len(guess))
print(f"accuracy {count / len(guess):.1%} (95 %: {low:.1%} to {high:.1%})")
print(f"S, which reads {5 * n} numbers: {right.float().mean():.1%}")

# %% [markdown] tags=["answer"]
# The best score says how sure the detector is that there is any lesion at all. That separates healthy from
# sick, but hardly one disease from the other: when we ran it, the rule found 96 % of the slices with
# COVID-19 and 12 % of those with common pneumonia. Yet its accuracy, 62.0 % (56.4 to 67.3 %), was above
# the 49.7 % of our $S$, which reads this number, too, and many more. That tells you something about learning: with few slices and many
# inputs, a network also fits what is chance in its examples. The $S$ of many slices, in step 5, did
# better. [Chapter 11](11_what_makes_it_work.ipynb) asks which numbers help.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Read the matrix
#
# Kind: write a function, **
#
# From a confusion matrix (true classes in rows), compute two lists: the *sensitivity* of each class, the
# share of its slices that are found, and the *positive predictive value* (PPV), the share of its
# predictions that are right.
#
# Hint: One is the diagonal divided by sums over rows, the other by sums over columns. Which is which?


# %% tags=["starter"]
def rates(matrix):
    """A matrix [3, 3] of counts -> sensitivities [3], PPVs [3]."""
    raise NotImplementedError("return two arrays")


# %% tags=["solution"]
# @title Solution
def rates(matrix):
    """A matrix [3, 3] of counts -> sensitivities [3], PPVs [3]."""
    diagonal = matrix.diagonal()
    return diagonal / matrix.sum(axis=1), diagonal / matrix.sum(axis=0)


for name, found_share, ppv in zip(
    IMAGE_CLASSES,
    *rates(confusion(test_labels, predicted)),
    strict=True,
):
    print(f"{name:18} sensitivity {found_share:.0%}, PPV {ppv:.0%} (phantoms)")


# %% tags=["wrong"]
def rates(matrix):
    diagonal = matrix.diagonal()
    return diagonal / matrix.sum(axis=0), diagonal / matrix.sum(axis=1)  # swapped


# %% tags=["wrong"]
def rates(matrix):
    share = matrix.diagonal() / matrix.sum()  # of all slices
    return share, share


# %% tags=["check"]
# @title Check your answer
truths, guesses = [0] * 8 + [1] * 4 + [2] * 4, [0] * 6 + [1] * 6 + [0, 2, 2, 2]
example = confusion(truths, guesses)
expected = report(example)
found_shares, ppvs = (torch.tensor(list(values)) for values in rates(example))
expected = {key: torch.tensor(expected[key]) for key in ("sensitivity", "ppv")}
close = torch.isclose(found_shares.float(), expected["sensitivity"])
assert close.all(), "sensitivity: of the 8 slices of class 0 here, 6 are found"
close = torch.isclose(ppvs.float(), expected["ppv"])
assert close.all(), "PPV: class 1 is predicted 6 times in this example, 4 times rightly"
print("Right.")

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Torn apart
#
# Kind: find the bug, **
#
# A colleague ranks the boxes of a slice with this function. The scores of its result are perfectly
# sorted, and $S$ still learns poorly. What is wrong? Repair it.
#
# Hint: Take two boxes whose deltas you can tell apart, and follow one row.


# %% tags=["starter"]
def ranked(boxes):
    """Boxes [K, 5] in any order -> the same rows, best score first."""
    return boxes.sort(dim=0, descending=True).values


# %% tags=["solution"]
# @title Solution
def ranked(boxes):
    """Boxes [K, 5] in any order -> the same rows, best score first."""
    return boxes[boxes[:, 0].argsort(descending=True)]


torn = train_rows[-1].sort(dim=0, descending=True).values
kept = (torn[:, None] == train_rows[-1]).all(dim=2).any(dim=1).sum()
print(f"of {n} rows of one slice the colleague leaves {int(kept)} whole")


# %% tags=["wrong"]
def ranked(boxes):
    return boxes[boxes[:, 0].argsort()]  # the worst first


# %% tags=["check"]
# @title Check your answer
rows = train_rows[-1]
mixed = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
result = ranked(mixed)
assert result.shape == rows.shape, "no box may be lost"
assert (result[:-1, 0] >= result[1:, 0]).all(), "the best score comes first"
whole_rows = (result[:, None] == rows).all(dim=2).any(dim=1)
assert whole_rows.all(), "a score has been given the deltas of another box"
print("Right.")

# %% [markdown] tags=["answer"]
# `sort(dim=0)` sorts each *column* on its own. Each number survives, but a score no longer stands beside
# the deltas of its own box. Shapes and scores look right, so only a look at a whole row finds it.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Fewer boxes
#
# Kind: experiment, ***
#
# How many boxes does $S$ need? Train it on the first 1, 2, 8 and all of the ranked boxes, three times
# each with different seeds, and judge each on the test slices. What do you conclude, and what not?
#
# Hint: A fresh $S$ for 2 boxes is `ClassificationModule(2, preset.classifier.hidden)`. Call
# `torch.manual_seed` before you make it, because it begins with random weights.


# %% tags=["solution"]
# @title Solution
def accuracy_of_s(boxes, seed):
    """Train a fresh S on the first so many boxes; its accuracy on the test slices."""
    torch.manual_seed(seed)
    fresh = ClassificationModule(boxes, preset.classifier.hidden).to(device)
    rows = train_rows[:, :boxes].contiguous()
    _ = train_s(fresh, rows, train_labels, settings, seed=seed, progress=False)
    guess = predict(fresh, test_rows[:, :boxes]).argmax(dim=1)
    return (guess == test_labels).float().mean().item()


for boxes in (1, 2, 8, n):
    values = [accuracy_of_s(boxes, seed) for seed in range(3)]
    print(f"{boxes:3} boxes: {min(values):.1%} to {max(values):.1%} (three seeds)")

# %% [markdown] tags=["answer"]
# Compare the ranges, not single values. When we ran it, two boxes gave 65.7 to 68.0 %, one gave 61.3 to
# 62.0 %, and all 32 gave 49.7 to 53.0 %. Perhaps the second box hints at more than one lesion, while the
# later rows bring many inputs, and these slices are too few to learn which of them matter. It is a
# statement about few slices, though, and all runs share the same ones. With thousands the answer may be
# another; [chapter 11](11_what_makes_it_work.ipynb) asks again.

# %% [markdown]
# ## What we learned
#
# 1. Two sets of labels train two models: masks teach the detector, slice labels the classifier $S$.
# 2. A slice becomes $N$ rows of a score and four deltas, ranked by score.
# 3. Boxes with low scores stay in, so that healthy slices have a vector, too.
# 4. The detector's part is computed once, since its weights stay, and $S$ trains in seconds.
# 5. One slice proves nothing, and phantoms are not patients: a good number here shows working code.
#
# ## Further reading
#
# Mask R-CNN {cite:p}`He2017` and Faster R-CNN {cite:p}`Ren2015` describe the detector. The paper of this
# book is {cite:t}`TerSarkisov2020`; {cite:t}`Gunraj2020` describe the slices with a class. Go on with
# [chapter 1](01_data.ipynb), where the labels come from.
