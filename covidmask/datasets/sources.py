"""Real CT: where each data set is, on what terms, and with which checksums; and its download.

No scan comes with this package. `layouts` then makes the folders that the loaders read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from covidmask.datasets.downloads import copy_checked, download
from covidmask.datasets.lesions import SemiSeg
from covidmask.datasets.scans import write_image
from covidmask.errors import DataError, OutputError
from covidmask.files import atomic_path, one_line

KAGGLE = "hgunraj/covidxct"
_GITHUB = "https://raw.githubusercontent.com"
COVIDX = f"{_GITHUB}/haydengunraj/COVIDNet-CT/b5c92b7d3c4b4f3d472b2fb72c29155a6e953627/splits/v1"
AUTHOR = f"{_GITHUB}/AlexTS1980/COVID-CT-Mask-Net/f06cd3735b7325c032c961a426b88b59224e73ba"
# data set -> address -> list -> SHA-256
LISTS: dict[str, dict[str, dict[str, str]]] = {
    "covidx-ct": {
        COVIDX: {
            "train_COVIDx_CT-1.txt": (
                "28ff488ad0c6f0d8d1d9fa329122641bdb574d5fc325268f91da2511c65c1f59"
            ),
            "val_COVIDx_CT-1.txt": (
                "4d237c049a17c0bc0aa49e24dfc98fb46d4e74acab36cdf197e92ec352b54537"
            ),
            "test_COVIDx_CT-1.txt": (
                "862ed108da3012643642bdf9df9e79d04e1b18c97eadfa23a1affebed5242093"
            ),
        },
        AUTHOR: {
            "train_split_classification.txt": (
                "9534b00ea9d08ed8318c12fd8f9fe9ac239f7a6d2c09708a80a5a805e1702264"
            ),
        },
    },
    "cncb-lesions": {
        AUTHOR: {
            "train_split_segmentation.txt": (
                "2ca58d201549b354fc9788bbcfd90501b8fe47b30e9874598400c978eb4a5e35"
            ),
            "test_split_segmentation.txt": (
                "5b9525b4a087ddee988bc50a5ef595738bd842c421fb3f55c1530e21eabd3c6e"
            ),
        },
    },
}
TERMS = {
    "covid-semiseg": """\
COVID-SemiSeg (Fan et al. 2020, Inf-Net, arXiv 2004.14133; github.com/DengPingFan/Inf-Net).
Its README allows NON-COMMERCIAL use only: "The COVID-SemiSeg Dataset is made available for
non-commercial purposes only. Any comercial use should get formal permission first. You will not,
directly or indirectly, reproduce, use, or convey the COVID-SemiSeg Dataset or any Content, or any
work product or data derived therefrom, for commercial purposes."
The slices come from https://medicalsegmentation.com/covid19/, which has terms of its own.
""",
    "covidx-ct": """\
COVIDx-CT-1 (Gunraj et al. 2020, doi 10.3389/fmed.2020.608525), made from scans of the China
National Center for Bioinformation, CNCB (Zhang et al. 2020, Cell, doi 10.1016/j.cell.2020.04.045).
Its authors name the terms of the CNCB scans as CC BY 3.0 China Mainland (github.com/haydengunraj/
COVIDNet-CT, docs/licenses_acknowledgements.md). Read the terms on the page you download from, too.
""",
    "cncb-lesions": """\
Masked CT slices of the China National Center for Bioinformation, CNCB (Zhang et al. 2020, Cell,
doi 10.1016/j.cell.2020.04.045; http://ncov-ai.big.ac.cn/download). Users of the CNCB scans name
their terms as CC BY 3.0 China Mainland. Read the terms on the page you download from, too.
Which archive there holds the masks is not established: any that has image/<patient>/<slice> and
mask/<patient>/<slice> in it will do.
""",
}


def semiseg_files() -> tuple[str, dict[str, str]]:
    """The address of COVID-SemiSeg, and its 196 files with their SHA-256."""
    text = Path(__file__).with_name("semiseg_files.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return table["source"], table["sha256"]


def fetch_covid_semiseg(
    out: str | Path,
    source: str | None = None,
    workers: int = 8,
    files: Mapping[str, str] | None = None,
    progress: bool = True,
) -> int:
    """Download the 50 + 48 slices of COVID-SemiSeg with their masks; 5 MB.

    `out` then holds TrainingSet and TestingSet as published, for `SemiSeg`; TERMS.txt; and
    lesion_layout/, the same slices upright in the layout of `LesionSlices`, with train.txt and
    test.txt. Each slice counts there as a patient, because the set names none.

    Args:
        source: another address that serves the same files. workers: downloads at a time.
        files: name -> SHA-256, instead of the published table.

    Returns:
        how many files were fetched now; the others were there already.

    Raises:
        DataError: a file cannot be had, or is not the published one.
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    address, published = semiseg_files()
    write_terms(out, "covid-semiseg")
    files = published if files is None else files
    fetched = download(source or address, files, out, workers, progress)
    layout = out / "lesion_layout"
    lists = [layout / f"{split}.txt" for split in ("train", "test")]
    if fetched or not all(path.is_file() for path in lists):
        for path in lists:
            path.unlink(missing_ok=True)  # they come last, and so mark the layout as complete
        for path in lists:
            write_lines(path, _convert(SemiSeg(out, path.stem), layout, progress))
    return len(fetched)


def _convert(dataset: SemiSeg, layout: Path, progress: bool) -> list[str]:
    names = []
    items = tqdm(dataset.patients, desc="lesion layout", unit="slice", disable=not progress)
    for index, patient in enumerate(items):
        image, mask = dataset.read(index)
        write_image(layout / "image" / patient / f"{patient}.png", image)
        write_image(layout / "mask" / patient / f"{patient}.png", mask)
        names.append(f"{patient}_{patient}.png")
    return names


def kaggle_folder(version: int = 1) -> Path:
    """Download COVIDx-CT by kagglehub, which keeps it in a folder of its own.

    Version 1 is COVIDx-CT-1. Later ones hold more slices under the same scheme of names, but leave
    out eight scans (28 slices) of version 1.

    Raises:
        DataError: kagglehub is not installed, or its download fails.
    """
    page = f"https://www.kaggle.com/datasets/{KAGGLE}"
    try:
        import kagglehub
    except ImportError as error:
        raise DataError(
            "--from kaggle: kagglehub is not installed; run `pip install kagglehub`, or download "
            f"{page} yourself and name its folder with --from"
        ) from error
    try:
        return Path(kagglehub.dataset_download(f"{KAGGLE}/versions/{version}"))
    except Exception as error:  # kagglehub has many ways to fail: login, consent, network, disk
        raise DataError(
            f"--from kaggle: the download fails ({one_line(error)}); download {page} "
            "yourself and name its folder with --from"
        ) from error


def public_lists(out: Path, name: str, copies: str | Path | None, progress: bool) -> Path:
    """`out`/lists, filled by download or from the reader's copies."""
    for address, files in LISTS[name].items():
        if copies is None:
            try:
                download(address, files, out / "lists", progress=progress)
            except DataError as error:
                raise DataError(f"{error}; or name a folder with copies by --lists") from error
        else:
            copy_checked(copies, files, out / "lists")
    return out / "lists"


def write_terms(out: Path, name: str) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; choose a folder")
    with atomic_path(out / "TERMS.txt") as temporary:
        temporary.write_text(TERMS[name], encoding="utf-8", newline="\n")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    with atomic_path(path) as temporary:
        text = "".join(f"{line}\n" for line in lines)
        temporary.write_text(text, encoding="utf-8", newline="\n")
