"""Small phantoms, models and settings that many tests share."""

import json

import torch
from torch.utils.data import Dataset

from covidmask.config import ClassifierConfig, DetectorConfig, TrainingConfig
from covidmask.data.lesions import mask_to_targets
from covidmask.data.phantoms import make_slice

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


def has_settings(preset, stored):
    """Whether a preset, from `asdict`, still has all stored values; later settings do not count."""
    return all(
        has_settings(preset[key], value)
        if isinstance(value, dict)
        else json.loads(json.dumps(preset[key])) == value
        for key, value in stored.items()
    )
