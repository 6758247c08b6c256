"""COVID-SemiSeg: 98 real CT slices with GGO and consolidation masks (Fan et al. 2020, Inf-Net)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from covidmask.data.images import read_image, read_mask
from covidmask.data.lesions import LesionDataset, checked_pair, natural
from covidmask.data.lists import some
from covidmask.errors import DataError

_FOLDERS = {
    "train": Path("TrainingSet", "MultiClassInfection-Train"),
    "test": Path("TestingSet", "MultiClassInfection-Test"),
}
_TO_CODE = np.array([0, 2, 3], dtype=np.uint8)  # palette index -> background, GGO, consolidation


class SemiSeg(LesionDataset):
    """The published 50 training and 48 test slices, as items of `LesionDataset`.

    All slices are of COVID patients, so nothing can be learned here about other conditions. They
    are cropped to the lungs, carry no Hounsfield units, and the masks mark no lung (no code 1).
    There are no patient ids, so each slice counts as a patient of its own: parts made by
    `split_by_patient`, and the published split itself, may share patients.

    Args:
        root: the folder that holds TrainingSet and TestingSet, or Inf-Net's folder above it, which
            holds Dataset.
        split: "train" or "test".
        lesions, min_area: as in `mask_to_targets`.

    Raises:
        DataError: a folder or a mask is missing; on reading, damaged files, palette indices
            outside 0..2, and an image and mask of different sizes.
    """

    patients_known = False

    def __init__(
        self, root: str | Path, split: str, lesions: str = "both", min_area: int = 1
    ) -> None:
        super().__init__(lesions, min_area)
        if split not in _FOLDERS:
            raise ValueError(f"split {split!r}: choose train or test")
        folders = [Path(root) / _FOLDERS[split], Path(root) / "Dataset" / _FOLDERS[split]]
        self.folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        slices = self.folder / "Imgs"
        found = slices.iterdir() if slices.is_dir() else ()  # glob is silent about permissions
        images = sorted(
            (path for path in found if path.suffix == ".jpg"), key=lambda path: natural(path.stem)
        )
        if not images:
            raise DataError(
                f"{self.folder / 'Imgs'}: no .jpg slices found; name the folder of COVID-SemiSeg "
                "that holds TrainingSet and TestingSet"
            )
        self.names = [path.name for path in images]
        self.patients = [path.stem for path in images]
        no_mask = [f"{p}.png" for p in self.patients if not self._mask_path(p).is_file()]
        if no_mask:
            raise DataError(
                f"{self.folder / 'GT'}: masks are missing: {some(no_mask)}; download them again"
            )

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # Both files are stored transposed, with the spine to the right; .T gives the axial view.
        image = read_image(self.folder / "Imgs" / self.names[index]).T
        mask_path = self._mask_path(self.patients[index])
        image, indices = checked_pair(image, read_mask(mask_path).T, 2, mask_path)
        return np.ascontiguousarray(image), _TO_CODE[indices]

    def _mask_path(self, name: str) -> Path:
        return self.folder / "GT" / f"{name}.png"
