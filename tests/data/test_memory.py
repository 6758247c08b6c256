"""Slices that are kept in memory are the slices of the data set, bit for bit."""

import pickle

import pytest
import torch
from tiny import TinyLesions, TinySlices
from torch.utils.data import DataLoader, Dataset

from covidmask.datasets.memory import InMemory


class Counting(Dataset):
    """Eight-bit slices; counts how often each is decoded."""

    def __init__(self, count=6, side=64):
        generator = torch.Generator().manual_seed(0)
        levels = torch.randint(0, 256, (count, 1, side, side), generator=generator)
        self.images = (levels.float() / 255).expand(-1, 3, -1, -1)
        self.names = [f"{i}.png" for i in range(count)]
        self.reads = [0] * count

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.images[index], index % 3


@pytest.mark.parametrize("dataset", [Counting(), TinySlices(5)], ids=["8 bits", "float"])
def test_slices_are_rebuilt_bit_for_bit(dataset):
    memory = InMemory(dataset, progress=False)
    assert memory.kept == len(memory) == len(dataset)
    for i in range(len(dataset)):
        (image, label), (wanted, wanted_label) = memory[i], dataset[i]
        assert torch.equal(image, wanted) and image.dtype == torch.float32
        assert label == wanted_label


def test_lesions_are_rebuilt_bit_for_bit_and_can_be_changed():
    dataset = TinyLesions(4)
    memory = InMemory(dataset, progress=False)
    assert sum(len(dataset[i][1]["labels"]) for i in range(4)) > 3
    for _ in range(2):  # the second time after the first was written to
        for i in range(4):
            (image, target), (wanted_image, wanted) = memory[i], dataset[i]
            assert torch.equal(image, wanted_image) and target.keys() == wanted.keys()
            for key, value in wanted.items():
                assert torch.equal(target[key], value) and target[key].dtype == value.dtype, key
            image.zero_()
            target["masks"].zero_(), target["boxes"].zero_()


def test_each_slice_is_decoded_once():
    dataset = Counting()
    memory = InMemory(dataset, progress=False)
    for _ in range(3):
        for i in range(len(memory)):
            memory[i]
    assert dataset.reads == [1] * len(dataset)


def test_eight_bits_take_one_byte_a_pixel():
    memory = InMemory(Counting(6, 64), progress=False)
    assert 0 <= memory.nbytes - 6 * 64 * 64 < 6 * 300  # and little else


def test_budget_is_kept_and_the_rest_is_decoded_each_time():
    dataset = Counting(6, 64)
    memory = InMemory(dataset, budget=2.5 * 64 * 64 / 2**20, progress=False)
    assert memory.kept == 2 and memory.nbytes <= 2.5 * 64 * 64
    reads = list(dataset.reads)
    for i in range(6):
        assert torch.equal(memory[i][0], dataset.images[i])
    again = [now - before for now, before in zip(dataset.reads, reads, strict=True)]
    assert again == [0, 0, 1, 1, 1, 1]


def test_workers_and_pickle():
    memory = InMemory(Counting(), progress=False)
    loader = DataLoader(memory, 3, num_workers=1, collate_fn=list)
    found = [image for batch in loader for image, _ in batch]
    assert all(torch.equal(a, b) for a, b in zip(found, memory.dataset.images, strict=True))
    copied = pickle.loads(pickle.dumps(memory))
    assert torch.equal(copied[5][0], memory[5][0])


def test_spawned_workers_share_the_memory():
    memory = InMemory(TinyLesions(3), progress=False)
    tensors = [value for value in vars(memory).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) == memory.nbytes  # one holds all of it
    loader = DataLoader(memory, 3, num_workers=1, collate_fn=list, multiprocessing_context="spawn")
    ((*found,),) = loader
    assert all(tensor.is_shared() for tensor in tensors)
    for (image, target), (wanted_image, wanted) in zip(found, memory.dataset, strict=False):
        assert torch.equal(image, wanted_image)
        assert torch.equal(target["masks"], wanted["masks"])


def test_a_budget_for_nothing():
    memory = InMemory(Counting(2), budget=0, progress=False)
    assert memory.kept == memory.nbytes == 0
    assert torch.equal(memory[1][0], memory.dataset.images[1])
