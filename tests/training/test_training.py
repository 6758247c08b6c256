"""Training: what it changes, that it resumes bit for bit after kill -9, and how it stops."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, tiny_training
from torch.utils.data import Dataset

from covidmask.config import AugmentConfig
from covidmask.datasets.augmentation import Augmented
from covidmask.datasets.lesions import LesionDataset
from covidmask.datasets.patients import make_slice
from covidmask.errors import CheckpointError, DataError, OutputError, TrainingError
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training import loop
from covidmask.training.classification import (
    cache_ranked_boxes,
    evaluate_classifier,
    train_classifier,
    train_s,
)
from covidmask.training.loop import load_checkpoint, save_checkpoint
from covidmask.training.segmentation import evaluate_segmenter, predict_lesions, train_segmenter

WORKER = Path(__file__).with_name("train_worker.py")


def segmenter(seed=0):
    torch.manual_seed(seed)
    return lesion_mask_rcnn(TINY_DETECTOR)


def classifier():
    model = segmenter()
    torch.manual_seed(1)
    return covid_ct_mask_net(model, TINY_CLASSIFIER)


def equal(one, other):
    return all(torch.equal(t, other[name]) for name, t in one.items())


def test_segmenter_learns(tiny_lesions):
    model = segmenter()
    training = tiny_training(epochs=10, warmup=0, cosine=False)
    history = train_segmenter(model, tiny_lesions, training, progress=False)
    assert len(history) == 20 and history[-1]["epoch"] == 9
    assert set(history[0]) >= {"step", "epoch", "lr", "loss", "loss_mask", "loss_objectness"}
    first, last = (sum(h["loss"] for h in part) for part in (history[:4], history[-4:]))
    assert last < 0.8 * first
    assert not model.training


def test_same_seed_same_weights_other_seed_other_weights(tiny_lesions):
    results = []
    for seed in (0, 0, 1):
        model = segmenter()
        train_segmenter(model, tiny_lesions, tiny_training(epochs=1), seed=seed, progress=False)
        results.append(model.state_dict())
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


@pytest.mark.parametrize("regime", ["heads", "heads_bn", "full"])
def test_classifier_overfits_a_few_slices(tiny_slices, regime):
    model = classifier()
    before = {k: v.clone() for k, v in model.detector.state_dict().items()}
    training = tiny_training(epochs=12 if regime != "heads" else 40, warmup=0, cosine=False)
    history = train_classifier(model, tiny_slices, regime, training, progress=False)
    bce = [step["bce"] for step in history]
    assert sum(bce[-3:]) < sum(bce[:3])  # the last epoch against the first, three steps each
    changed = {k for k, v in model.detector.state_dict().items() if not torch.equal(v, before[k])}
    assert not any("running" in name for name in changed)
    assert bool(changed) == (regime != "heads")


def test_heads_cached_equals_heads_computed_each_step(tiny_slices):
    """The cache changes the time, not the result."""
    model, plain = classifier(), classifier()
    training = tiny_training(epochs=2)
    history = train_classifier(model, tiny_slices, "heads", training, progress=False)
    optimizer = torch.optim.Adam(plain.s.parameters(), lr=1e-3, weight_decay=1e-4)
    from covidmask.training.classification import classification_loss

    for step, values in enumerate(history):
        epoch, position = divmod(step, 3)
        batch = loop.epoch_batches(12, 4, epoch, 0)[position]
        images, labels = zip(*(tiny_slices[i] for i in batch), strict=True)
        loss = classification_loss(plain(list(images)), torch.tensor(labels))
        assert abs(loss.item() - values["bce"]) < 1e-5
        optimizer.param_groups[0]["lr"] = values["lr"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_groups_get_their_share_of_the_rate(tmp_path):
    torch.manual_seed(0)
    rows, labels = torch.randn(8, 3, 5), torch.arange(8) % 3
    training, checkpoint = tiny_training(warmup=0, weight_decay=0.0), tmp_path / "s.ckpt"

    def moved(share):
        torch.manual_seed(1)
        s = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(15, 3))
        before = [parameter.clone() for parameter in s.parameters()]
        groups = [{"params": [s[1].weight]}, {"params": [s[1].bias], "share": share}]
        options = {"groups": groups, "progress": False, "checkpoint": checkpoint}
        train_s(s, rows, labels, replace(training, epochs=1, batch_size=8), **options)
        return [(a - b).abs().mean().item() for a, b in zip(s.parameters(), before, strict=True)]

    weight, bias = moved(0.1)  # Adam's first step has the size of the rate
    assert weight == pytest.approx(training.lr, rel=0.01)
    assert bias == pytest.approx(0.1 * training.lr, rel=0.01)
    with pytest.raises(CheckpointError, match="groups was"):
        moved(0.5)


def test_validation_keeps_the_best_epoch(tiny_slices):
    model = classifier()
    history = train_classifier(
        model, tiny_slices, "heads", tiny_training(epochs=8), validation=tiny_slices, progress=False
    )
    accuracies = [h["accuracy"] for h in history if "accuracy" in h]
    assert len(accuracies) == 8
    result = evaluate_classifier(model, tiny_slices, progress=False)
    assert result["accuracy"] == pytest.approx(max(accuracies))
    assert result["confusion"].sum() == 12 and result["probabilities"].shape == (12, 3)


def test_another_s_is_judged_in_eval_mode():
    """As one with dropout needs it."""
    seen = set()

    class Own(torch.nn.Linear):
        def forward(self, rows):
            seen.add((len(rows), self.training))
            return super().forward(rows.flatten(1))

    rows, labels = torch.rand(8, 2, 7), torch.arange(8) % 4
    held_out = rows[:3], labels[:3]
    s = Own(14, 4)
    train_s(s, rows, labels, tiny_training(), validation=held_out, progress=False)
    assert seen == {(4, True), (3, False)} and not s.training


def test_average_of_the_weights(tiny_lesions, tmp_path, monkeypatch):
    """Two steps, one an epoch, and the same again after a stop between them."""
    plain = tiny_training(epochs=1, batch_size=8, warmup=0, cosine=False)
    states = [segmenter().state_dict()]
    for epochs in (1, 2):
        model = segmenter()
        train_segmenter(model, tiny_lesions, replace(plain, epochs=epochs), progress=False)
        states.append(model.state_dict())
    training = replace(plain, epochs=2, average=0.15)
    model = segmenter()
    train_segmenter(model, tiny_lesions, training, progress=False)
    averaged = model.state_dict()
    for name, value in averaged.items():
        first, second, third = (state[name].double() for state in states)
        if value.is_floating_point():  # the decay grows from 0.1, and stops at 0.15
            expected = 0.15 * (0.1 * first + 0.9 * second) + 0.85 * third
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)
        else:
            assert value == third
    assert not equal(averaged, states[2])

    checkpoint = tmp_path / "run.ckpt"

    def train():
        train_segmenter(segmenter(), tiny_lesions, training, checkpoint=checkpoint, progress=False)

    stop_after_an_epoch(monkeypatch, train)
    model = segmenter()
    train_segmenter(model, tiny_lesions, training, checkpoint=checkpoint, progress=False)
    assert equal(model.state_dict(), averaged)


def test_average_or_best(tiny_slices):
    training = tiny_training(average=0.9)
    with pytest.raises(ValueError, match="choose one of the two"):
        train_classifier(
            classifier(), tiny_slices, "heads", training, validation=tiny_slices, progress=False
        )


def test_evaluation_builds_no_graph_and_reads_each_slice_once(tiny_lesions, tiny_slices):
    rows = cache_ranked_boxes(classifier(), tiny_slices, batch_size=5, progress=False)
    assert rows.shape == (12, 16, 5) and not rows.requires_grad
    model = segmenter()
    seen = []
    for index, prediction, _ in predict_lesions(model, tiny_lesions, batch_size=3, progress=False):
        seen.append(index)
        assert not prediction["scores"].requires_grad
    assert sorted(seen) == list(range(8))
    result = evaluate_segmenter(model, tiny_lesions, progress=False)
    assert result["slices"] == 8 and 0 <= result["mask_ap50"] <= 1


class Oblong(Dataset):
    """Phantoms of 48 x 64 pixels, as they are or mirrored."""

    def __init__(self, mirrored=False):
        self.mirrored = mirrored

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = torch.from_numpy(make_slice(index, 2, 64)[0][8:56]).repeat(3, 1, 1)
        return (image.flip(-1) if self.mirrored else image), {}


def test_mirrored_maps_are_the_mean_of_both_ways_round():
    model = segmenter()

    def maps(dataset, **options):
        found = predict_lesions(model, dataset, fused=True, progress=False, **options)
        return torch.stack([prediction["maps"] for _, prediction, _ in found])  # [2, 2, 48, 64]

    plain, mirrored = maps(Oblong()), maps(Oblong(mirrored=True)).flip(-1)
    assert plain.shape == (2, 2, 48, 64) and plain.max() > 0.1
    assert (plain - mirrored).abs().max() > 0.01
    torch.testing.assert_close(maps(Oblong(), mirror=True), (plain + mirrored) / 2)


def test_not_finite_loss_names_the_slices(tiny_lesions):
    model = segmenter()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 0.*phantom_\d\.png.*learning rate"):
        train_segmenter(model, tiny_lesions, tiny_training(), progress=False)


def test_batches_of_an_epoch_use_each_slice_at_most_once():
    one, two = (loop.epoch_batches(10, 4, epoch, 0) for epoch in (0, 1))
    assert [len(batch) for batch in one] == [4, 4]
    used = [index for batch in one for index in batch]
    assert len(set(used)) == 8 and one != two
    assert one == loop.epoch_batches(10, 4, 0, 0) != loop.epoch_batches(10, 4, 0, 1)


def test_copies_to_the_cpu_have_arrived(monkeypatch):
    """Only a copy to a GPU may still be under way when it is used."""
    asked, fabric = [], loop.make_fabric(device="cpu")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **options: asked.append(options))
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(type(fabric), "device", torch.device(device))
        fabric.to_device([{"boxes": (torch.zeros(1),)}])
    assert [options.get("non_blocking", False) for options in asked] == [False, True]


def test_pinnable_batches_share_no_memory():
    image, target = torch.rand(2, 2).expand(3, -1, -1), {"boxes": torch.rand(1, 4), "name": "a"}
    ((written, same),) = loop.pinnable([(image, target)])
    assert written.is_contiguous() and torch.equal(written, image)
    assert same["boxes"] is target["boxes"] and same["name"] == "a"


def test_learning_rate():
    training = tiny_training(lr=1.0, warmup=4)
    rates = [loop.learning_rate(training, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False)) and 0 < rates[-1] < 0.05
    constant = replace(training, warmup=0, cosine=False)
    assert {loop.learning_rate(constant, step, 20) for step in range(20)} == {1.0}


def test_fewer_slices_than_a_batch(tiny_lesions):
    with pytest.raises(DataError, match="batch size 9: .* up to 8 slices"):
        train_segmenter(segmenter(), tiny_lesions, tiny_training(batch_size=9), progress=False)


# ---- resuming -------------------------------------------------------------------------------


def worker(kind, folder, *options):
    command = [sys.executable, str(WORKER), kind, str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["segmenter", "heads_bn"])
def test_killed_run_resumes_bit_for_bit(kind, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert worker(kind, whole).wait() == 0
    target = random.Random(time.time()).randint(5, 9)  # the first checkpoint follows step 2 or 3
    process = worker(kind, killed, "--announce")
    for line in process.stdout:
        if line.strip() == f"step {target}":
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert (killed / "run.ckpt").exists() and not (killed / "final.pt").exists()
    assert worker(kind, killed).wait() == 0
    one = torch.load(whole / "final.pt", weights_only=True)
    two = torch.load(killed / "final.pt", weights_only=True)
    assert one["history"] == two["history"]
    assert equal(one["model"], two["model"])


def test_checkpoint_of_another_run(tiny_lesions, tmp_path):
    path = tmp_path / "run.ckpt"
    train_segmenter(
        segmenter(), tiny_lesions, tiny_training(epochs=1), checkpoint=path, progress=False
    )
    with pytest.raises(CheckpointError, match="run.ckpt.*another run.*seed was 0, is 5"):
        train_segmenter(segmenter(), tiny_lesions, tiny_training(epochs=1), seed=5, checkpoint=path)


def test_classifier_does_not_go_on_with_another_segmenter(tiny_slices, tmp_path):
    path, training = tmp_path / "run.ckpt", tiny_training(epochs=1)
    train_classifier(classifier(), tiny_slices, "heads", training, checkpoint=path, progress=False)
    other = covid_ct_mask_net(segmenter(3), TINY_CLASSIFIER)
    with pytest.raises(CheckpointError, match="run.ckpt.*another run.*segmenter was"):
        train_classifier(other, tiny_slices, "heads", training, checkpoint=path, progress=False)


def test_finished_checkpoint_gives_the_finished_model(tiny_lesions, tmp_path):
    path, first, second = tmp_path / "run.ckpt", segmenter(), segmenter()
    training = tiny_training(epochs=1)
    one = train_segmenter(first, tiny_lesions, training, checkpoint=path, progress=False)
    two = train_segmenter(second, tiny_lesions, training, checkpoint=path, progress=False)
    assert one == two and equal(first.state_dict(), second.state_dict())
    assert not equal(first.state_dict(), segmenter().state_dict())


def test_a_run_from_other_weights_is_another_run(tiny_lesions, tmp_path):
    """Such as one without the pre-training that the killed one had."""
    path, training = tmp_path / "run.ckpt", tiny_training(epochs=1)
    train_segmenter(segmenter(), tiny_lesions, training, checkpoint=path, progress=False)
    with pytest.raises(CheckpointError, match="another run.*weights at the start was"):
        train_segmenter(segmenter(3), tiny_lesions, training, checkpoint=path, progress=False)


class Readable(LesionDataset):
    """Four phantoms of 64 pixels."""

    names = patients = list("abcd")

    def read(self, index):
        return make_slice(index, 2, 64)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (Readable(min_area=9), "min_area was 1, is 9"),
        (Readable("merged"), "lesions was 'both', is 'merged'"),
        (Augmented(Readable(), AugmentConfig(64, 1, 1)), "augment was None, is"),
    ],
    ids=["min_area", "lesions", "augment"],
)
def test_a_run_on_other_items_is_another_run(other, problem, tmp_path):
    path, training = tmp_path / "run.ckpt", tiny_training(epochs=1)
    train_segmenter(segmenter(), Readable(), training, checkpoint=path, progress=False)
    with pytest.raises(CheckpointError, match=problem):
        train_segmenter(segmenter(), other, training, checkpoint=path, progress=False)


@pytest.mark.parametrize(
    ("config", "seed"), [(AugmentConfig(64, 1, 2), 0), (AugmentConfig(64, 1, 1), 1)]
)
def test_a_run_on_other_copies_is_another_run(config, seed, tmp_path):
    path, training = tmp_path / "run.ckpt", tiny_training(epochs=1)
    first = Augmented(Readable(), AugmentConfig(64, 1, 1))
    one, two = (
        train_segmenter(segmenter(), first, training, checkpoint=path, progress=False)
        for _ in range(2)
    )
    assert one == two
    other = Augmented(Readable(), config, seed)
    with pytest.raises(CheckpointError, match="another run.*augment was"):
        train_segmenter(segmenter(), other, training, checkpoint=path, progress=False)


def stop_after_an_epoch(monkeypatch, train):
    save = loop.save_checkpoint

    def interrupted(path, state):
        save(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop, "save_checkpoint", interrupted)
        train()


def test_without_validation_the_best_epoch_of_before_is_not_restored(
    tiny_slices, tmp_path, monkeypatch
):
    def train(**options):
        model = classifier()
        options |= {"progress": False}
        train_classifier(model, tiny_slices, "heads", tiny_training(epochs=3), **options)
        return model.s.state_dict()

    path = tmp_path / "run.ckpt"
    validated = {"checkpoint": path, "validation": tiny_slices}
    stop_after_an_epoch(monkeypatch, lambda: train(**validated))
    assert equal(train(checkpoint=path), train())


def test_the_scale_of_the_loss_is_resumed(tiny_lesions, tmp_path, monkeypatch):
    """As in 16-mixed, which a CPU does not offer: its scaler is put beside bf16."""

    def train(checkpoint=None):
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        fabric.strategy.precision.scaler = scaler
        training = tiny_training(epochs=2)  # two steps an epoch
        options = {"fabric": fabric, "checkpoint": checkpoint, "progress": False}
        train_segmenter(segmenter(), tiny_lesions, training, **options)
        return scaler.state_dict()

    path = tmp_path / "run.ckpt"
    stop_after_an_epoch(monkeypatch, lambda: train(path))
    state = train(path)
    assert state == train() and state["scale"] == 128  # it grew after the third step


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other"])
def test_damaged_checkpoint(damage, tmp_path):
    path = tmp_path / "run.ckpt"
    save_checkpoint(path, {"run": {"seed": 0}, "model": {"w": torch.zeros(1000)}})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "foreign":
        torch.save({"run": {"seed": 0}, "model": Path("x")}, path)
    else:
        torch.save([1, 2, 3], path)
    with pytest.raises(CheckpointError, match="run.ckpt"):
        load_checkpoint(path, {"seed": 0})


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    save_checkpoint(path, {"run": {}, "step": 1})

    def fail(file, content):
        file.touch()  # something is there before the disk is full
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError, match="run.ckpt.*No space left"):
        save_checkpoint(path, {"run": {}, "step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path, {})["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]
