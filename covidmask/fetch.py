"""`covidmask fetch`: from nothing to real data, one command for each data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg, subcommand

from covidmask.files import data_root

_HINT = "(default: its name in $COVIDMASK_DATA or ./data)"
_Out = Annotated[Path | None, arg(help_behavior_hint=_HINT, metavar="DIR")]
_Lists = Annotated[Path | None, arg(help_behavior_hint="(default: download)", metavar="DIR")]
_Source = Annotated[str | None, arg(help_behavior_hint="(default: the authors)", metavar="URL|DIR")]


@dataclass(frozen=True, kw_only=True)
class FetchCovidSemiSeg:
    """Download COVID-SemiSeg: 98 real CT slices with masks of GGO and consolidation, 5 MB.

    For non-commercial use only; the terms are printed first and stored beside the data.
    OUT/lesion_layout holds the same slices upright, as image/, mask/ and lists. For example:
    `covidmask fetch covid-semiseg`, then `covidmask stats --data data/covid-semiseg`
    """

    out: _Out = None  # Folder to fill.
    source: _Source = None  # Another address or folder with the same files, by the same SHA-256.


@dataclass(frozen=True, kw_only=True)
class FetchCovidxCt:
    """Lay out COVIDx-CT-1, slices of three classes, from what you downloaded; check every file.

    Get the images from Kaggle (hgunraj/covidxct; `--from kaggle` does it if kagglehub is installed)
    or from the CNCB archives (http://ncov-ai.big.ac.cn/download). Folders are linked, not copied,
    so leave them where they are. OUT/slices gets the lists train (the author's 3,000 slices), val,
    test, train_all, and new balanced samples. For example:
    `covidmask fetch covidx-ct --from ~/Downloads/covidxct`
    """

    sources: Annotated[tuple[str, ...], arg(name="from", metavar="DIR|kaggle|ARCHIVE [...]")]
    """Folders and archives (zip, tar, tar.gz ...) that hold the slices; kaggle downloads them."""
    out: _Out = None  # Folder to fill.
    lists: _Lists = None  # Folder with copies of the four public lists, by the same SHA-256.
    seeds: tuple[int, ...] = (0,)  # Each gives sample_seed<n>, and _by_patient, of more patients.
    per_class: int = 1000  # Slices of each class in a sample.
    allow_missing: bool = False  # Leave out slices that are not there; OUT/missing.txt names them.


@dataclass(frozen=True, kw_only=True)
class FetchCncbLesions:
    """Lay out the masked slices of CNCB, on which the paper trains its detector; read every one.

    Name a folder or archive that has image/<patient>/<slice> and mask/<patient>/<slice> in it, at
    any depth. Which archive of http://ncov-ai.big.ac.cn/download that is, is not established. OUT
    gets the author's lists, train (650 slices) and test (100), and train_500 and test_150, which
    divide the 650 by patient. For example: `covidmask fetch cncb-lesions --from masked_slices.zip`
    """

    source: Annotated[str, arg(name="from", metavar="DIR|ARCHIVE")]
    """Folder or archive (zip, tar, tar.gz ...)."""
    out: _Out = None  # Folder to fill.
    lists: _Lists = None  # Folder with copies of the author's two lists, by the same SHA-256.
    seed: int = 0  # Of the division into 500 and 150 slices.


@dataclass(frozen=True)
class Fetch:
    """Get real CT: download it, or lay out what you downloaded; every file is checked."""

    data_set: (
        Annotated[FetchCovidSemiSeg, subcommand("covid-semiseg")]
        | Annotated[FetchCovidxCt, subcommand("covidx-ct")]
        | Annotated[FetchCncbLesions, subcommand("cncb-lesions")]
    )

    def run(self) -> None:
        from covidmask.datasets import public_sets

        name, fetch = {
            FetchCovidSemiSeg: ("covid-semiseg", public_sets.fetch_covid_semiseg),
            FetchCovidxCt: ("covidx-ct", public_sets.lay_out_covidx_ct),
            FetchCncbLesions: ("cncb-lesions", public_sets.lay_out_cncb_lesions),
        }[type(self.data_set)]
        print(public_sets.TERMS[name], flush=True)
        out = self.data_set.out or data_root() / name
        counts = fetch(**{**vars(self.data_set), "out": out})
        print(f"{name} is whole in {out}")
        for what, count in counts.items():
            print(f"  {what}: {count:,}")
