"""Detection, segmentation and classification, with intervals."""

from covidmask.rooms import open_room

__all__, __getattr__ = open_room(
    __name__,
    {
        "classification": ("bootstrap", "confusion", "patient_bootstrap", "report", "wilson"),
        "detection": ("CocoAP", "author_ap", "author_image_ap", "dice", "semantic_mask"),
    },
)
