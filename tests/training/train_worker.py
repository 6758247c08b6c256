"""Train a tiny model in a process of its own, which a test can kill or start twice.

    python train_worker.py segmenter|heads|heads_bn FOLDER [--announce]

Under `torchrun` it trains with as many processes and writes what each rank ended with.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, TinyLesions, TinySlices, tiny_training

from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training import loop
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.segmentation import evaluate_segmenter, predict_lesions, train_segmenter


def main(kind: str, folder: Path, announce: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lesion_mask_rcnn(TINY_DETECTOR)
    training = tiny_training(epochs=4, batch_size=4)
    fabric = loop.make_fabric(device="cpu")
    if announce:
        original = loop.learning_rate

        def announced(settings, step, total):
            print("step", step, flush=True)
            return original(settings, step, total)

        loop.learning_rate = announced
    options = {"fabric": fabric, "checkpoint": folder / "run.ckpt", "progress": False}
    epochs = []  # weights at the end of each epoch, to compare between ranks
    if kind == "segmenter":
        save, data = loop.share_buffers, TinyLesions(16)

        def spy(trained, world):
            save(trained, world)
            epochs.append({k: v.clone() for k, v in trained.state_dict().items()})

        loop.share_buffers = spy
        history = train_segmenter(model, data, training, **options)
        result = evaluate_segmenter(model, data, fabric=fabric, progress=False)
        seen = predict_lesions(model, data, fabric=fabric, batch_size=3, progress=False)
        result["judged_here"] = [index for index, _, _ in seen]
    else:
        data = TinySlices()
        model = covid_ct_mask_net(model, TINY_CLASSIFIER)
        history = train_classifier(model, data, kind, training, **options)
        result = evaluate_classifier(model, data, fabric=fabric, progress=False)
        result = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in result.items()}
    name = "final.pt" if fabric.world_size == 1 else f"rank{fabric.global_rank}.pt"
    state = {"model": model.state_dict(), "history": history, "result": result, "epochs": epochs}
    torch.save(state, folder / name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "--announce" in sys.argv)
