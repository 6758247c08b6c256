# %% [markdown]
# # 17 · Your own scan
#
# A scan from a hospital is a folder of some hundred files with meaningless names. In the figure
# below, the same files are stacked twice, and seen from the front: once in the order of their names,
# once in the order of the patient. **What must go right between such a folder and a sentence about a
# patient?** We build the steps by hand, then let one command do them, and end with what a report of
# the result has to say.

# %% tags=["fold"] mystnb={"image": {"alt": "Three panels. Left: a chest seen from the front whose horizontal strips are in disorder. Middle: the same strips in order show two lungs, the windpipe and the heart. Right: one axial slice of the chest."}, "figure": {"caption": "One scan as a stack of slices, seen from the front: in the order of the file names (left) and of the positions (middle). Right: one of the slices. A drawn chest."}}
# @title Imports, versions, and the opening picture
import csv
import importlib.util
import io
import os
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import covidmask
from covidmask import plotting
from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets import (
    FRIEND,
    LUNG_WINDOW,
    PACKAGES,
    POSITIONS,
    LesionSlices,
    find_scans,
    hounsfield_to_unit,
    make_patient,
    read_slices,
    render,
    write_phantoms,
)
from covidmask.datasets.scans import choose_slices
from covidmask.interactive import frame_slider
from covidmask.metrics import dice, semantic_mask, wilson
from covidmask.models import (
    ShippedWeights,
    find_weights,
    trained_classifier,
    trained_segmenter,
)
from covidmask.predict import predict

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"covidmask {covidmask.__version__}, torch {torch.__version__}, {device}")

SIDE, FIELD = 128, 384  # pixels, mm: what a slice covers
friend = make_patient(*FRIEND)
positions = POSITIONS[::4]  # 0 is the apex of the lungs, 1 their base
drawn = [render(friend, position, SIDE) for position in positions]
stack = np.stack([image for image, _ in drawn])  # [slices, H, W] in 0..1, from the apex
true_masks = np.stack([mask for _, mask in drawn])
numbers = np.random.default_rng(0).permutation(len(stack))  # of the files: IM0007, ...
heights = -0.75 * FIELD * positions  # mm, rising to the head
middle = SIDE // 2
panels = {
    "by file name": stack[np.argsort(numbers), middle],
    "by position": stack[:, middle],
    "one slice": stack[len(stack) // 2],
}
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
step = (heights[0] - heights[1]) / (FIELD / SIDE)  # of neighbours, in pixels
for ax, (title, picture) in zip(axes, panels.items(), strict=True):
    aspect = 1 if title == "one slice" else step
    _ = ax.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=aspect)
    _ = ax.set_title(title)
    _ = ax.set(xlabel="x (pixels)", ylabel="Slice (number)")
_ = axes[2].set(ylabel="y (pixels)")
plt.show()

# %% [markdown]
# **After it you can**
#
# - turn stored integers into Hounsfield units, and these into what a model expects;
# - put the files of a scan in order, and find out whether slices are missing;
# - run the method on a whole scan, DICOM or NIfTI, without a name leaving the file;
# - say what a result for a patient needs beyond results for slices, and what a report must say.
#
# **You need** [chapter 5](05_segmenter.ipynb) (masks) and
# [chapter 7](07_covid_ct_mask_net.ipynb) (the classifier).
#
# **Time:** reading 20 min, exercises 60 min, running 2 min.
#
# ```{admonition} Synthetic data
# :class: important
# The scan on this page is a *phantom*: a drawn chest. No number below is a result on patients, and
# nothing here is for diagnosis.
# ```

# %% tags=["parameters"]
PRESET = "quick"  # or "colab", "paper"
SEED = 0
DATA = os.environ.get("COVIDMASK_DATA", "data")
PATIENTS = 8  # of each class, for the rules over slices

# %% tags=["fold"]
# @title Write the scan as a hospital hands it out, and read what each file says
HAS_PYDICOM = importlib.util.find_spec("pydicom") is not None
temporary = tempfile.TemporaryDirectory()
series = Path(temporary.name) / "Doe_Jane"
series.mkdir()


@dataclass
class Record:
    """What the file of one slice says."""

    name: str
    pixels: np.ndarray  # uint16 [H, W], as stored
    slope: float
    intercept: float
    corner: tuple  # x, y, z of the first pixel, mm
    axes: tuple  # directions of a row and of a column, six numbers


def write_dicom(record, series_id):
    """A slice as a scanner writes it."""
    import pydicom
    from pydicom import uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    scan = pydicom.Dataset()
    scan.file_meta = meta
    scan.PatientName, scan.SeriesInstanceUID = "Doe^Jane", series_id
    scan.ImagePositionPatient = list(record.corner)
    scan.ImageOrientationPatient = list(record.axes)
    scan.PixelSpacing = [FIELD / SIDE, FIELD / SIDE]  # mm
    scan.Rows, scan.Columns = record.pixels.shape
    scan.SamplesPerPixel, scan.PhotometricInterpretation = 1, "MONOCHROME2"
    scan.BitsAllocated = scan.BitsStored = 16
    scan.HighBit, scan.PixelRepresentation = 15, 0
    scan.RescaleSlope, scan.RescaleIntercept = record.slope, record.intercept
    scan.PixelData = record.pixels.tobytes()
    scan.save_as(series / record.name, enforce_file_format=True)


def read_dicom(path):
    """The record of a file, by pydicom."""
    import pydicom

    scan = pydicom.dcmread(path)
    corner, axes = map(tuple, (scan.ImagePositionPatient, scan.ImageOrientationPatient))
    scale = float(scan.RescaleSlope), float(scan.RescaleIntercept)
    return Record(path.name, scan.pixel_array, *scale, corner, axes)


level, width = LUNG_WINDOW
records = []
for number, height, image in zip(numbers, heights, stack, strict=True):
    integers = np.clip(np.round(image * width + level - width / 2) + 1024, 0, None)
    corner, axes = (0.0, 0.0, float(round(height, 2))), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    name = f"IM{number:04d}"
    records.append(Record(name, integers.astype(np.uint16), 1.0, -1024.0, corner, axes))
if HAS_PYDICOM:
    from pydicom.uid import generate_uid

    series_id = generate_uid()
    for record in records:
        write_dicom(record, series_id)
    records = [read_dicom(path) for path in series.iterdir()]
else:
    print(f"No files: `pip install {PACKAGES}` brings pydicom.")
records.sort(key=lambda record: record.name)  # as a folder lists them
print(f"{len(records)} slices, the first is called {records[0].name}")

# %% [markdown]
# ## Hounsfield units
#
# A scanner stores integers, with a slope and an intercept that turn them into Hounsfield units (HU):
#
# $$ \mathrm{HU} = \text{slope} \cdot \text{integer} + \text{intercept}. $$
#
# Air is -1000 HU, water 0, healthy lung about -800, soft tissue about 40, bone several hundred. A
# reader that forgets the intercept of our files sees everything 1,024 HU too bright, and no error
# says so.


# %% tags=["nbval-check-output"]
def to_hu(record):
    """float32 [H, W], Hounsfield units."""
    pixels = record.pixels.astype(np.float32)  # before any arithmetic
    return pixels * record.slope + record.intercept


first = records[0]
print("stored", first.pixels.dtype, "slope", first.slope)
print("intercept", first.intercept)
air = (slice(0, 8), slice(0, 8))  # a corner, beside the patient
print(f"air as stored: {first.pixels[air].mean():.0f}")
print(f"air in HU: {to_hu(first)[air].mean():.0f}")

# %% [markdown]
# ## Windows
#
# A screen, and a model, see Hounsfield units through a *window* with level $\ell$ and width $w$:
#
# $$ v = \mathrm{clip}\left(\frac{\mathrm{HU} - (\ell - w/2)}{w},\; 0,\; 1\right). $$
#
# The lung window of this book has $\ell = -600$ and $w = 1500$, so what lies below -1350 HU is black
# and what lies above 150 HU is white.


# %%
def windowed(hu, level, width):
    """Grey values 0..1 of Hounsfield units."""
    return np.clip((hu - (level - width / 2)) / width, 0, 1)


by_hand = windowed(to_hu(first), -600, 1500)
theirs = hounsfield_to_unit(to_hu(first), LUNG_WINDOW)
assert np.allclose(by_hand, theirs, atol=1e-5)

# %% [markdown]
# Now change the window. Ground-glass opacity (GGO), at some -700 to -300 HU, vanishes in a window for
# soft tissue, and so does the whole lung. The boxes are what the shipped segmenter finds: it learned
# on the first window.

# %% tags=["fold"]
# @title Draw one slice through five windows, with detections
preset = PRESETS[PRESET]
segmenter = trained_segmenter(PRESET, device, shipped=True).eval()
WINDOWS = {
    "lung (-600, 1500)": (-600, 1500),
    "narrow lung (-600, 800)": (-600, 800),
    "wide (-500, 2000)": (-500, 2000),
    "high lung (-400, 1200)": (-400, 1200),
    "soft tissue (40, 400)": (40, 400),
}
middle = len(stack) // 2
middle_hu = stack[middle] * width + level - width / 2  # [H, W], cut at both ends
middle_truth = true_masks[middle]


def find(model, grey):
    """Detections of a model in a slice, grey [H, W] in 0..1; on the CPU."""
    grey = np.ascontiguousarray(grey, dtype=np.float32)
    image = torch.from_numpy(grey).expand(3, -1, -1)
    with torch.no_grad():
        found = model([image.to(device)])[0]
    return {key: value.cpu() for key, value in found.items()}


def draw_window(new_level, new_width):
    """Draw a slice in a window, and what the segmenter finds."""
    grey = windowed(middle_hu, new_level, new_width)
    found = find(segmenter, grey)
    ax = plotting.get_ax(5, 4.2)
    _ = plotting.show_lesions(grey, found, ax, score_threshold=0.75)
    look = {"levels": [0.5], "colors": plotting.YELLOW, "linewidths": 0.8}
    _ = ax.contour(middle_truth >= 2, **look)
    infection = dice(semantic_mask(found, 0.75) > 0, middle_truth >= 2)
    title = f"level {new_level:g}, width {new_width:g} HU: Dice {infection:.2f}"
    _ = ax.set_title(title, fontsize=10)
    return ax.figure


frame_slider(
    [draw_window(*window) for window in WINDOWS.values()],
    list(WINDOWS),
    "Window (level, width in HU)",
    "The same synthetic slice through one window, with the detections of "
    "the shipped segmenter; contrast and detections change with the window",
    caption="One slice of our old friend in five windows, and what a segmenter finds "
    "that learned on the first. Yellow: the true lesions. Scores over 0.75. Synthetic",
    dpi=70,
)

# %% [markdown]
# One slice proves nothing, so here is a mean over more of them (still few, and without an interval).

# %% tags=["fold"]
# @title Mean Dice of the segmenter in each window
home_root = write_phantoms(f"{DATA}/phantoms-{PRESET}", preset.phantoms, seed=0)
home_set = LesionSlices(home_root / "lesions", "test", min_area=preset.min_area)
window_dice = {}
for name, window in WINDOWS.items():
    values = []
    for index in range(0, len(home_set), 30):
        grey, truth = home_set.read(index)
        grey = windowed(grey * width + level - width / 2, *window)
        painted = semantic_mask(find(segmenter, grey), 0.75) > 0
        values.append(dice(painted, truth >= 2))
    window_dice[name] = np.nanmean(values)
    print(f"{name:26} {window_dice[name]:.2f}")
print(f"mean Dice of infection, {len(values)} phantoms")
assert window_dice["soft tissue (40, 400)"] < window_dice["lung (-600, 1500)"]

# %% [markdown]
# **The window is a part of the model.** With weights, always note the window that they learned on.
# Pictures, unlike DICOM and NIfTI files, do not say which window made them.
#
# ## The order of the slices
#
# File names say nothing about where a slice lies. Each file holds the place of its first pixel (in mm)
# and the directions of its rows and columns. Their cross product is the normal of the slice, and the
# height of the slice is how far its corner lies along that normal. Sorted by it, slice 1 is the one
# nearest the feet.


# %% tags=["nbval-check-output"]
def height_of(record):
    """Position along the normal of the slice, in mm, rising to the head."""
    along_row, along_column = np.reshape(record.axes, (2, 3))
    return float(np.cross(along_row, along_column) @ record.corner)


ordered = sorted(records, key=height_of)
volume = np.stack([to_hu(record) for record in ordered])  # [slices, H, W]
for record in ordered[:3]:
    print(f"{record.name} at {height_of(record):7.2f} mm")
apart = np.diff([height_of(record) for record in ordered])
print(f"distances {apart.min():.2f} to {apart.max():.2f} mm")

# %% [markdown]
# Equal distances mean that no slice is missing. The package's `find_scans` does the same and more: it
# keeps the files of one series identifier together, leaves out scouts, other planes and reports and
# counts them, and reports gaps and copies. `read_slices` then gives what we built.

# %%
if HAS_PYDICOM:
    (scan,), notes = find_scans([series])
    theirs = np.stack(list(read_slices(scan.slices)))  # from the feet up
    assert np.allclose(theirs, windowed(volume, *LUNG_WINDOW), atol=1e-5)
    print(f"{len(theirs)} slices in the same order; notes: {notes}")

# %% [markdown]
# A NIfTI file holds the whole scan in one piece. Its affine matrix says in which order and direction
# its axes run; the reader turns them so that the same slices come out. (DICOM counts towards the
# patient's left and back, NIfTI towards right and front.)

# %% tags=["fold"]
# @title Write the same scan as one NIfTI file, and read it back
if HAS_PYDICOM and importlib.util.find_spec("nibabel") is not None:
    import nibabel

    # the file's axes run to the right, the front and the head; ours to the left of
    # the patient, to the back and to the head: the first two are reversed
    turned = volume.transpose(2, 1, 0)[::-1, ::-1].astype(np.int16)
    path = Path(temporary.name) / "friend.nii.gz"
    nibabel.save(nibabel.Nifti1Image(turned, np.eye(4)), path)
    (one_file,), _notes = find_scans([path])
    again = np.stack(list(read_slices(one_file.slices)))
    assert np.allclose(again, theirs, atol=1e-3)
    print(f"{len(again)} slices in one NIfTI file, the same as those of DICOM")
else:
    print(f"Skipped: `pip install {PACKAGES}` brings what reads DICOM and NIfTI.")

# %% [markdown]
# ## Many slices, one patient
#
# The method classifies *slices*, and which slice you take decides what you get. COVIDx-CT kept slices
# with visible lesions for the two diseases and any slice for controls {cite:p}`Gunraj2020`, so a model
# that was trained on it has never had to deal with a clear slice of a sick patient. Here is our old
# friend's whole chest.

# %% tags=["fold"] mystnb={"image": {"alt": "Two panels over the position in the chest from apex to base. Above: area of lesions as a share of each slice. Below: the three sigmoids of the classifier for each slice, which cross several times."}, "figure": {"caption": "One patient, many answers: lesion area (above) and the classifier's three sigmoids (below) along our old friend's chest, who has COVID-19. Synthetic."}}
# @title Draw lesions and sigmoids along the chest
classifier = trained_classifier(PRESET, device, shipped=True).eval()


def sigmoids(greys):
    """float [slices, 3], one sigmoid for each class, of grey slices [H, W]."""
    images = [torch.from_numpy(grey).expand(3, -1, -1).to(device) for grey in greys]
    with torch.no_grad():
        return classifier(images).sigmoid().cpu().numpy()


friend_p = sigmoids(stack)
fig, axes = plt.subplots(2, 1, figsize=(7.5, 5), sharex=True, layout="constrained")
share = 100 * (true_masks >= 2).mean((1, 2))
_ = axes[0].bar(positions, share, 0.015, color=plotting.ORANGE, edgecolor="black")
_ = axes[0].set(ylabel="True lesion area\n(% of the slice)")
for label, name in enumerate(IMAGE_CLASSES):
    look = {"color": plotting.CLASS_COLOURS[label], "ls": plotting.CLASS_LINES[label]}
    look |= {"marker": "osD"[label], "label": name}
    _ = axes[1].plot(positions, friend_p[:, label], **look)
xlabel = "Position (0 apex, 1 base of the lungs, no unit)"
_ = axes[1].set(xlabel=xlabel, ylabel="Sigmoid (no unit)", ylim=(0, 1.02))
_ = fig.legend(loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# Slices of one patient get different answers. Where no lesion is in sight, "control" is right for the
# slice and wrong for the patient. A result for a patient therefore needs a *rule over slices*, and the
# paper has none: its figures are per slice. Three simple rules:


# %%
def answers(p):
    """The class of a patient by three rules; p: sigmoids [slices, 3]."""
    likeliest = p.argmax(axis=1)  # [slices], class of each slice
    return {
        "most slices": np.bincount(likeliest, minlength=3).argmax(),
        "highest mean": p.mean(axis=0).argmax(),
        "highest maximum": p.max(axis=0).argmax(),
    }


for rule, label in answers(friend_p).items():
    print(f"{rule:16} {IMAGE_CLASSES[label]}")

# %% [markdown]
# Our old friend has COVID-19. Do the rules agree on other patients? We draw a few new ones of each
# class, nine slices from apex to base for each.

# %%
new_p, new_labels = [], []  # sigmoids [9, 3], class of the patient
for label in range(3):
    for number in range(PATIENTS):
        patient = make_patient(900_000 + number, label)
        slices = [render(patient, t, SIDE)[0] for t in POSITIONS[::15]]
        new_p.append(sigmoids(slices))
        new_labels.append(label)

# %% tags=["fold"]
# @title Print how many patients each rule gets right
n = len(new_labels)
pairs = list(zip(new_p, new_labels, strict=True))
slice_right = sum((p.argmax(1) == c).sum() for p, c in pairs)
print(f"single slices: {slice_right} of {9 * n} right, {slice_right / (9 * n):.0%}")
for rule in answers(friend_p):
    right = [answers(p)[rule] == c for p, c in pairs]
    low, high = wilson(sum(right), n)
    print(f"{rule:16} {sum(right)} of {n} patients right ({low:.0%} to {high:.0%})")
    each = [sum(right[c * PATIENTS : (c + 1) * PATIENTS]) for c in range(3)]
    parts = ", ".join(f"{c} {k}" for c, k in zip(IMAGE_CLASSES, each, strict=True))
    print(f"{'':16} of {PATIENTS} each: {parts}")

# %% [markdown]
# With so few patients the intervals are wide, so this does not say which rule is best. It does show
# that the rule is a part of the method: another rule, other answers, from the same sigmoids. (Why
# might the highest maximum do badly? In the figure above, look at the sigmoid of "control" where the
# old friend's slices are clear.) A rule has to be chosen on some patients and judged on others, like a
# threshold. That is why the package's summary of a scan gives shares and means, and no diagnosis.
#
# ## One command
#
# `covidmask predict` does all of the above for a folder, or for files of DICOM, NIfTI, PNG and JPEG in
# any mix:
#
# ```
# covidmask predict scan/ --out out
# ```
#
# Of a volume it looks at 32 slices, evenly spaced (`--slices all`, `--slices 20-80` and `--every 5`
# choose others). Unless you name weights of yours, the lesions are those of `SEGMENTER_CT`, a network
# that was trained on [drawn chests](phantoms_made.ipynb) and on no real slice. It looks at the lungs
# alone, which the command finds first, and [its card](weights.md) says what it reaches on real slices.
# It gives no class probabilities, because none in this book was shown to be right on real patients.
#
# Here is the same from Python, on our scan. Every fourth slice is enough to see the outputs: a picture
# of each slice, `predictions.csv` with a row for each, and `summary.csv` with a row for each volume.

# %%
out = Path(temporary.name) / "out"
if HAS_PYDICOM:
    with redirect_stdout(io.StringIO()):  # it would print paths
        rows = predict(
            [series],
            segmenter=find_weights("segmenter", "quick", shipped=True)[0],
            classifier=find_weights("classifier", "quick", shipped=True)[0],
            out=out,
            ct=ShippedWeights.SEGMENTER_CT.path,  # of volumes
            every=4,
            device=device,
        )

# %% tags=["fold"]
# @title Print the tables, with the truth beside them
if HAS_PYDICOM:
    from_feet = true_masks[::-1]
    print("slice  position   lesions found   found share of lung   true share")
    for row in rows:
        truth = from_feet[row["slice"] - 1]
        true_share = (truth >= 2).sum() / (truth >= 1).sum()
        print(
            f"{row['slice']:5}  {row['position_mm']:5.1f} mm   {row['lesions']:13}"
            f"   {row['lung_share']:19.1%}   {true_share:10.1%}"
        )
    with open(out / "summary.csv", newline="", encoding="utf-8") as file:
        (summary,) = csv.DictReader(file)
    for name in ("slices", "looked_at", "lesion_slices", "lung_share"):
        print(f"{name:14} {summary[name]}")
    print(f"note: {summary['note']}")

# %% [markdown]
# The columns of shares stand beside each other only because we drew the chest; of a real scan nobody
# hands you the last one.
#
# DICOM files carry names and dates. None of them reaches an output, nor does the name of a DICOM or
# NIfTI file. PNG, JPEG and TIFF files *keep* their names, so rename those first. Text that is burned
# into the pixels stays there, so look at the pictures before you pass them on.

# %%
if HAS_PYDICOM:
    written = [path.name.encode() for path in out.iterdir()]
    written += [path.read_bytes() for path in out.iterdir()]
    everything = b"".join(written)
    assert b"Doe" not in everything
    assert series_id.encode() not in everything
    print(f"{len(list(out.iterdir()))} files; the name is in none of them")

# %% [markdown]
# ## A real scan to try
#
# If you have no scan that you may use, take a public one. COVID-CT-MD
# ([Afshar et al., 2021](https://doi.org/10.1038/s41597-021-00900-3)) publishes a sample with DICOM
# files of a few patients of three classes. Its repository states no licence, so
# keep the files to yourself. They are compressed, and the
# packages in the first line unpack them.
#
# ```
# pip install pydicom nibabel python-gdcm
# covidmask fetch covid-ct-md
# covidmask predict data/covid-ct-md/COVID-19/P001 --out out
# ```
#
# We ran `SEGMENTER_CT` on slices of three of these patients (`results/looks.jsonl`). It
# called 2.2 % of the lung lesion in the patient with COVID-19, 3.9 % in the one with pneumonia, and
# 0.6 % in the control. The control is lowest, as one would hope, and three patients show no more than
# that. A classifier that had learned on drawn chests was tried on them, too; its highest mean sigmoid
# was COVID-19 for the first patient, and control for *both* others. Whatever you run, do not upload a
# patient's scan to a service that is not approved for it.
#
# ## What a report must say
#
# A sentence such as "the program found 2 % of the lung affected" is worth as much as what stands beside
# it. Before you hand on a result, write down
#
# 1. **which slices**: how many the scan has, how many were looked at, how they were chosen, and what was
#    left out or missing;
# 2. **what the model saw**: the window, the crop to the lungs, the size;
# 3. **which weights**: their file and checksum, on which data they were trained, and on which patients
#    they were judged, with intervals;
# 4. **which thresholds and rule**: the score, the cut of the masks, and how slices became one answer,
#    with where these were chosen;
# 5. **what it cannot mean**: that the weights saw no scanner of this hospital, that nobody checked the
#    outlines, and that this is no diagnosis.
#
# `summary.csv` and the cards of the weights hold the first four. The fifth is yours to write.

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. Why are slices sorted by position and not by file name?**
#
# - [ ] File names are longer than eight characters, which DICOM forbids. :: The length is not the point; a short name tells as little about the place.
# - [ ] Sorting numbers is faster than sorting words. :: Speed does not matter for some hundred files.
# - [x] Names need not follow the order in the patient, and positions do. :: The left panel of the opening figure shows what names can give.
#
# **2. A reader ignores the intercept of -1024. What will you notice?**
#
# - [ ] An error, because HU below -1000 do not exist. :: Values are too high, not too low, and nothing checks them.
# - [x] Most of the slice is white in a lung window, and nothing fails. :: Lung at -800 HU is taken for 224 HU, which lies above the window. Exercise 4 tries it.
# - [ ] Nothing, since a network normalises its input. :: It subtracts a fixed mean; what the window has cut off is lost before.
#
# **3. Weights were trained in the window (-600, 1500). May you use them on a window (40, 400)?**
#
# - [x] Not without new training or at least new measurements. :: In the soft-tissue window the lung is black, GGO with it; see the table of windows.
# - [ ] Yes, both windows show the same HU. :: They show different parts of the scale, and cut off the rest.
# - [ ] Yes, if the slices are scaled to 0 to 1 afterwards. :: Both are 0 to 1 already; what is cut off does not come back.
#
# **4. A patient has 200 slices, and a program says "COVID-19" if any slice is positive. What is the risk?**
#
# - [ ] It will miss patients whose lesions are small. :: This rule misses the fewest; it errs on the other side.
# - [x] Nearly every healthy patient has some false alarm. :: With so many tries a rare error becomes a likely one; exercise 1 computes it.
# - [ ] None, because errors of slices cancel out. :: They cancel in a mean, not in a maximum.
#
# **5. You want to pass on the pictures that `predict` wrote. What may still tell who the patient is?**
#
# - [ ] The name in the DICOM tags, which is copied into each picture. :: Tags reach no output; the cell above tests it.
# - [ ] The name of the folder that you gave. :: Pictures of a volume are numbered; the folder's name is printed on your screen only.
# - [x] Text that is burned into the pixels, or the name of a PNG file. :: Pixels are shown as they are, and pictures keep their file names.
#
# **6. Why does `predict` give no class probabilities for a scan, unless you name a classifier?**
#
# - [ ] The classifier needs more than 32 slices. :: It reads one slice at a time.
# - [x] No classifier that comes with the package was shown to be right on real patients. :: The shipped one learned on phantoms; its sigmoids on a real scan would mean nothing.
# - [ ] DICOM files hold no class labels. :: True, but a prediction needs no label.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · One false alarm
#
# Kind: pencil, *
#
# A slice classifier has a specificity of `s` (the share of healthy slices that it calls healthy). A
# healthy patient has `n` slices, and a program raises an alarm if *any* slice is called ill. If the
# errors of the slices were independent, which share of healthy patients would stay without an alarm?
# Write it as `patient_specificity(s, n)`. Which value do 95 % and 32 slices give?
#
# Hint: how likely is it that the first slice is fine, and the second, too?


# %% tags=["starter"]
def patient_specificity(s, n):
    raise NotImplementedError("your formula")


# %% tags=["solution"]
# @title Solution
def patient_specificity(s, n):
    return s**n


print(f"32 slices, 95 % each: {patient_specificity(0.95, 32):.0%} without an alarm")


# %% tags=["wrong"]
def patient_specificity(s, n):
    return 1 - (1 - s) ** n  # at least one slice is right


# %% tags=["wrong"]
def patient_specificity(s, n):
    return max(0, 1 - n * (1 - s))


# %% tags=["check"]
# @title Check your answer
assert np.isclose(patient_specificity(0.9, 1), 0.9), "With one slice nothing changes."
assert patient_specificity(0.9, 10) < 0.9, "More slices, more chances for an alarm."
assert np.isclose(patient_specificity(0.5, 2), 0.25), "When do both coins show heads?"
assert np.isclose(patient_specificity(0.9, 2), 0.81), "Both have to be called healthy."
print("right")

# %% [markdown] tags=["answer"]
# Neighbouring slices look alike, so their errors are not independent, and a real program does better
# than that. But the direction holds: a rule that asks for *any* slice gets worse with every slice.

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Black bones
#
# Kind: find the bug, **
#
# `to_8bit(hu, level, width)` saves slices as 8-bit pictures, for integer HU. In its pictures some bones
# are black. Put it right; the result is uint8, 0 at the lower end of the window, 255 at the upper.
#
# Hint: what becomes of the number 256 in eight bits?


# %% tags=["starter"]
def to_8bit(hu, level, width):
    low = level - width // 2
    return (255 * (np.asarray(hu) - low) // width).astype(np.uint8)


# %% tags=["solution"]
# @title Solution
def to_8bit(hu, level, width):
    low = level - width // 2
    return np.clip(255 * (np.asarray(hu) - low) // width, 0, 255).astype(np.uint8)


bone = to_8bit([-1350, -600, 150, 160, 400], -600, 1500)
print("HU -1350, -600, 150, 160, 400 become", bone.tolist())


# %% tags=["wrong"]
def to_8bit(hu, level, width):  # clips when it is too late
    low = level - width // 2
    return np.clip((255 * (np.asarray(hu) - low) // width).astype(np.uint8), 0, 255)


# %% tags=["wrong"]
def to_8bit(hu, level, width):  # clips one end
    low = level - width // 2
    return np.maximum(255 * (np.asarray(hu) - low) // width, 0).astype(np.uint8)


# %% tags=["check"]
# @title Check your answer
scale = to_8bit(np.arange(-2000, 1500), -600, 1500)
assert scale.dtype == np.uint8, "The picture has eight bits."
assert scale[-1] == 255, "1499 HU lie above the window, so they are white."
assert scale[0] == 0, "-2000 HU lie below the window, so they are black."
assert (np.diff(scale.astype(int)) >= 0).all(), "More HU are never darker."
grey = int(to_8bit([-600], -600, 1500)[0])
assert abs(grey - 127) <= 1, "The level is the middle grey."
print("right")

# %% [markdown] tags=["answer"]
# Numbers above 255 start again at 0. The first wrong answer clips after the cast, when the high bits are
# gone. Look at the brightest parts of a picture first when you check a conversion.

# %% [markdown] tags=["exercise"]
# ### Exercise 3 · Missing slices
#
# Kind: write a function, **
#
# Write `missing(heights)`: how many slices are missing, given the heights of those that are there, in
# mm and in any order. Take the usual distance of neighbours, the median, for the true one.
#
# Hint: a gap of three times the usual distance has room for two slices.


# %% tags=["starter"]
def missing(heights):
    raise NotImplementedError("how many are missing")


# %% tags=["solution"]
# @title Solution
def missing(heights):
    steps = np.diff(np.sort(heights))
    return int((np.round(steps / np.median(steps)) - 1).sum())


all_heights = [height_of(record) for record in records]
print("our scan:", missing(all_heights), "missing")
fewer = all_heights[:10] + all_heights[13:]
print("without three of its files:", missing(fewer), "missing")


# %% tags=["wrong"]
def missing(heights):  # counts gaps, not slices
    steps = np.diff(np.sort(heights))
    return int((steps > 1.5 * np.median(steps)).sum())


# %% tags=["wrong"]
def missing(heights):  # in the order of the files
    steps = np.abs(np.diff(heights))
    return int((np.round(steps / np.median(steps)) - 1).sum())


# %% tags=["wrong"]
def missing(heights):  # a gap moves the mean
    steps = np.diff(np.sort(heights))
    return int((np.round(steps / np.mean(steps)) - 1).sum())


# %% tags=["check"]
# @title Check your answer
whole = [5.0 * i for i in range(12)]
assert missing(whole) == 0, "Equal distances: nothing is missing."
assert missing(whole[:4] + whole[5:]) == 1, "One slice was taken out."
assert missing(whole[:4] + whole[6:]) == 2, "Two were taken out, which leaves one gap."
assert missing(whole[::-1]) == 0, "The same slices from head to feet."
assert missing(whole[::2] + whole[1::2]) == 0, "The same slices in another order."
print("right")

# %% [markdown] tags=["answer"]
# Slices missing at the ends leave no gap, so they cannot be found in this way; taking away files whose
# names follow each other removes slices from here and there. The package reports gaps as notes, in
# terms of the same median.

# %% [markdown] tags=["exercise"]
# ### Exercise 4 · Without the intercept
#
# Kind: predict, then run, *
#
# Suppose a reader forgets the intercept. Predict first: how will the middle slice look in the lung
# window, and how many lesion pixels will the shipped segmenter find above a score of 0.75, more or
# fewer than with the intercept? Then draw both pictures and count.
#
# Hint: `to_hu(record) - record.intercept` is what the forgetful reader takes for HU.

# %% tags=["solution"]
# @title Solution
record = ordered[len(ordered) // 2]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for ax, (name, hu) in zip(
    axes,
    {"right": to_hu(record), "forgotten": to_hu(record) - record.intercept}.items(),
    strict=True,
):
    grey = windowed(hu, *LUNG_WINDOW)
    pixels = (semantic_mask(find(segmenter, grey), 0.75) > 0).sum()
    print(f"{name:9} mean grey {grey.mean():.2f}, {pixels} lesion pixels")
    _ = plotting.show_slice(grey, ax)
    _ = ax.set_title(f"intercept {name}")
plt.show()

# %% [markdown] tags=["answer"]
# Lung and body are white alike, and only the air around is a little darker. The network is given
# nothing to see and says so in its own way. `covidmask predict` warns of pictures that use less than an
# eighth of the grey values.

# %% [markdown] tags=["exercise"]
# ### Exercise 5 · Evenly spaced
#
# Kind: write a function, **
#
# Which of `count` slices does a program look at, if it may take `parts` of them? Cut the scan into
# `parts` pieces of equal length and take the middle of each. Write `evenly(count, parts)`, a list of
# numbers from 0, and compare with the package's `choose_slices(count)`, where `parts` is 32. With fewer
# slices than parts, take all of them.
#
# Hint: the pieces begin at 0, count / parts, 2 count / parts, and so on; `int()` rounds down.


# %% tags=["starter"]
def evenly(count, parts):
    raise NotImplementedError("a list of numbers")


# %% tags=["solution"]
# @title Solution
def evenly(count, parts):
    parts = min(count, parts)
    return [int((part + 0.5) * count / parts) for part in range(parts)]


print(evenly(200, 32)[:5], "...", evenly(200, 32)[-1])


# %% tags=["wrong"]
def evenly(count, parts):  # takes both ends
    return np.linspace(0, count - 1, min(count, parts)).astype(int).tolist()


# %% tags=["wrong"]
def evenly(count, parts):  # whole steps only
    return list(range(0, count, max(1, count // parts)))


# %% tags=["check"]
# @title Check your answer
assert len(evenly(200, 32)) == 32, "As many slices as parts."
assert evenly(10, 32) == list(range(10)), "With fewer slices than parts, all of them."
assert evenly(9, 3) == [1, 4, 7], "Pieces of three slices: the middle of each."
for total in (31, 32, 33, 77, 200, 513):
    assert evenly(total, 32) == choose_slices(total), f"{total}: the package differs."
print("right")

# %% [markdown] tags=["answer"]
# The first slice of a scan lies in the belly and the last in the neck, so a rule that takes both ends
# spends two looks on slices without lung.

# %% [markdown] tags=["exercise"]
# ### Exercise 6 · Between mean and maximum
#
# Kind: experiment, ***
#
# The mean over slices dilutes a disease that few slices show, and the maximum believes a single slice.
# Write `top_mean(p, k)`: for sigmoids `p` [slices, 3], the mean of the `k` highest of each class, [3].
# How many of the new patients does the highest `top_mean` get right with k = 1, 3, 5 and 9? Can you
# recommend a `k`?
#
# Hint: `np.sort(p, axis=0)` sorts each class for itself, the highest last.


# %% tags=["starter"]
def top_mean(p, k):
    raise NotImplementedError("three numbers")


# %% tags=["solution"]
# @title Solution
def top_mean(p, k):
    return np.sort(p, axis=0)[-k:].mean(axis=0)


for k in (1, 3, 5, 9):
    right = [top_mean(p, k).argmax() == c for p, c in pairs]
    low, high = wilson(sum(right), len(right))
    print(f"k = {k}: {sum(right)} of {n} right ({low:.0%} to {high:.0%})")


# %% tags=["wrong"]
def top_mean(p, k):  # the first slices, not the highest
    return p[:k].mean(axis=0)


# %% tags=["wrong"]
def top_mean(p, k):  # the wrong axis
    return np.sort(p, axis=1)[-k:].mean(axis=0)


# %% tags=["wrong"]
def top_mean(p, k):  # the lowest
    return np.sort(p, axis=0)[:k].mean(axis=0)


# %% tags=["check"]
# @title Check your answer
toy = np.array([[0.1, 0.9, 0.3], [0.8, 0.2, 0.3], [0.4, 0.5, 0.6], [0.2, 0.1, 0.0]])
assert np.shape(top_mean(toy, 2)) == (3,), "One number for each class."
assert np.allclose(top_mean(toy, 1), toy.max(0)), "With k = 1 it is the maximum."
assert np.allclose(top_mean(toy, 4), toy.mean(0)), "With all slices it is the mean."
assert np.allclose(top_mean(toy, 2), [0.6, 0.7, 0.45]), "The two highest of a class."
print("right")

# %% [markdown] tags=["answer"]
# The intervals overlap, so these patients recommend no `k`. To choose one, take many patients whose
# slices cover the whole lung, choose on a part of them, and judge once on the rest.

# %% tags=["fold"]
# @title Remove the temporary files
temporary.cleanup()

# %% [markdown]
# ## What we learned
#
# 1. Stored integers become Hounsfield units by slope and intercept; forgetting them raises no error.
# 2. The window is a part of the model, and the order of the slices a part of the scan.
# 3. DICOM and NIfTI files give order and units, collections of pictures give neither.
# 4. A patient needs a rule over slices; the paper has none, and a rule must be chosen and judged.
# 5. A report names slices, window, weights, thresholds and rule, and what its numbers cannot mean.
#
# ## Further reading
#
# {cite:t}`Gunraj2020` say how the slices of COVIDx-CT were chosen. {cite:t}`Roberts2021` list what
# goes wrong when such models meet real patients, and {cite:t}`DeGrave2021` show models that learned the
# source of a picture. To train on the full public sets, see [Reproduce the paper](reproduce.md).
