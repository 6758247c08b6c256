"""Training and evaluation loops with Lightning Fabric around them."""

from covidmask.rooms import open_room

__all__, __getattr__ = open_room(
    __name__,
    {
        "classification": (
            "cache_ranked_boxes",
            "classification_loss",
            "evaluate_classifier",
            "train_classifier",
            "train_s",
        ),
        "loop": ("epoch_batches", "learning_rate", "make_fabric"),
        "segmentation": ("evaluate_segmenter", "predict_lesions", "train_segmenter"),
    },
)
