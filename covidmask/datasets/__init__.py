"""Slices with masks, slices with a class, scans, phantoms, and where to get real data."""

from covidmask.rooms import open_room

__all__, __getattr__ = open_room(
    __name__,
    {
        "chest": ("HEIGHT", "Lesion", "POSITIONS", "render"),
        "classes": (
            "SliceImages",
            "class_statistics",
            "open_slices",
            "slice_splits",
            "parse_name",
            "read_split",
        ),
        "lesions": (
            "LesionDataset",
            "LesionSlices",
            "SemiSeg",
            "lesion_statistics",
            "lesion_splits",
            "open_lesions",
            "mask_to_targets",
            "split_by_patient",
        ),
        "medical": ("PACKAGES", "hounsfield_to_unit"),
        "patients": ("FRIEND", "make_patient", "make_slice", "old_friend"),
        "phantom_sets": ("phantom_mask", "write_phantoms", "write_semiseg_phantoms"),
        "scans": ("LUNG_WINDOW", "find_scans", "read_image", "read_slices"),
    },
)
