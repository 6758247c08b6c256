"""Mask R-CNN, ranked boxes, S, and weights."""

from covidmask.rooms import open_room

__all__, __getattr__ = open_room(
    __name__,
    {
        "author_checkpoints": ("load_author_checkpoint",),
        "baselines": ("area_features", "fit_area_classifier", "threshold_detections"),
        "classifier": (
            "ClassificationModule",
            "REGIMES",
            "batch_norm_parameters",
            "count_batch_norm",
            "count_parameters",
            "count_trainable",
            "covid_ct_mask_net",
            "set_regime",
        ),
        "detector": (
            "IMAGENET_MEAN",
            "IMAGENET_STD",
            "binary_masks",
            "lesion_mask_rcnn",
        ),
        "ranked_boxes": (
            "Columns",
            "author_padding",
            "encoded_rows",
            "even_padding",
            "pad_rows",
            "propose",
            "rank_boxes",
            "run_box_head",
            "same_size_groups",
        ),
        "weights": (
            "ShippedWeights",
            "find_weights",
            "load_classifier",
            "load_segmenter",
            "read_card",
            "save_model",
            "trained_classifier",
            "trained_segmenter",
            "weights_file",
        ),
    },
)
