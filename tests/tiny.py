"""Small phantoms, models and settings that many tests share."""

import json
import warnings
from dataclasses import asdict

import torch
from torch.utils.data import Dataset

from covidmask.config import PRESETS, ClassifierConfig, DetectorConfig, TrainingConfig
from covidmask.datasets.lesions import mask_to_targets
from covidmask.datasets.patients import make_slice
from covidmask.datasets.phantom_sets import GENERATOR

TINY_DETECTOR = DetectorConfig(
    backbone="resnet18",
    cut=2,
    image_size=64,
    max_size=128,
    fpn_channels=16,
    box_features=32,
    rpn_train_proposals=60,
    rpn_test_proposals=60,
    rpn_batch=64,
    box_batch=32,
    light_mask_head=True,
)
TINY_CLASSIFIER = ClassifierConfig(n_boxes=16, hidden=32)


class TinyLesions(Dataset):
    """COVID phantoms of 64 pixels, in the form of `LesionSlices`."""

    def __init__(self, count=8):
        self.names = [f"phantom_{seed}.png" for seed in range(count)]
        self._items = []
        for seed in range(count):
            image, mask = make_slice(seed, 2, 64)
            self._items.append((torch.from_numpy(image).expand(3, -1, -1), mask_to_targets(mask)))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self._items[index]


class TinySlices(Dataset):
    """Phantoms of the three classes, in the form of `SliceImages`."""

    def __init__(self, count=12):
        self.labels = [index % 3 for index in range(count)]
        self.names = [f"phantom_{index}.png" for index in range(count)]
        self._images = [
            torch.from_numpy(make_slice(index, label, 64)[0]).expand(3, -1, -1)
            for index, label in enumerate(self.labels)
        ]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self._images[index], self.labels[index]


def tiny_training(**changes):
    values = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "weight_decay": 1e-4, "warmup": 2}
    return TrainingConfig(**{**values, "cosine": True, **changes})


def warn_if_stale(result, used, command):
    """Warn, naming them, where settings that a benchmark used are no longer those of its preset.

    An edit of a preset thus costs no rerun of an hour before the tests pass again: the file states
    the settings that it is about. What the benchmark does not use, and settings that came later,
    do not count.
    """
    now = json.loads(json.dumps(asdict(PRESETS[result["preset"]["name"]])))
    generator = result.get("generator", GENERATOR)
    changed = ["the phantoms' generator"] * (generator != GENERATOR) + sorted(
        name
        for part in used
        for name in _differences({part: result["preset"][part]}, {part: now.get(part)})
    )
    if changed:
        warnings.warn(
            f"made with other settings than preset {now['name']} has now ({', '.join(changed)}); "
            f"to renew: {command}",
            stacklevel=2,
        )
    return changed


def _differences(stored, now, prefix=""):
    for key, value in stored.items():
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            yield from _differences(value, now[key], f"{prefix}{key}.")
        elif now.get(key) != value:
            yield f"{prefix}{key}"


def stored_config(kind, values):
    """A config of class `kind` from what a results file stored: lists become tuples again."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
