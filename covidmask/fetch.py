"""`covidmask fetch`: from nothing to real data, one command for each data set."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from covidmask.files import data_root

_OUT = arg(help_behavior_hint="(default: its name in $COVIDMASK_DATA or ./data)", metavar="DIR")
_SOURCE = arg(help_behavior_hint="(default: the authors)", metavar="URL|DIR")


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Get real CT: download it, or lay out what you downloaded; every file is checked.

    covid-semiseg downloads 98 slices with masks of GGO and consolidation (5 MB, non-commercial use
    only).

    covidx-ct lays out the slices of three classes of COVIDx-CT-1. Get them from Kaggle
    (hgunraj/covidxct; `--from kaggle` does it if kagglehub is installed) or from the CNCB archives
    (http://ncov-ai.big.ac.cn/download). OUT/slices gets the lists train (the author's 3,000
    slices), val, test, train_all, and new balanced samples.

    cncb-lesions lays out the masked slices on which the paper trains its detector. Name a folder or
    archive with image/<patient>/<slice> and mask/<patient>/<slice> in it, at any depth; which
    archive of CNCB that is, is not established. OUT gets the author's lists, train (650 slices) and
    test (100), and train_500 and test_150, which divide the 650 by patient.

    covid-ct downloads 746 figures of two classes, COVID and NonCOVID (97 MB). covid-ct-md downloads
    the DICOM files of a few patients of three classes, as an example of scans of your own.

    For example: `covidmask fetch covidx-ct --from ~/Downloads/covidxct`
    """

    data_set: Positional[
        Literal["covid-semiseg", "covid-ct", "covid-ct-md", "covidx-ct", "cncb-lesions"]
    ]
    sources: Annotated[tuple[str, ...], arg(name="from", metavar="DIR|kaggle|ZIP [...]")] = ()
    """Folders, which are linked, so leave them there, and zip archives."""
    out: Annotated[Path | None, _OUT] = None  # Folder to fill.
    source: Annotated[str | None, _SOURCE] = None
    """Another address or folder with the files to download, or the lists, by the same SHA-256."""
    seed: int = 0  # Of the division into 500 and 150 slices, and of sample_seed<n>.
    per_class: int = 1000  # Slices of each class in sample_seed<n>, and ..._by_patient.
    allow_missing: bool = False  # Leave out slices of COVIDx-CT-1 or COVID-CT that are not there.

    def run(self) -> None:
        from covidmask.datasets import public_sets

        print(*public_sets.SETS[self.data_set]["terms"], sep="\n", flush=True)
        out = self.out or data_root() / self.data_set
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            with public_sets.filling(self.data_set, out):
                counts = self._counts(out, [os.path.expanduser(source) for source in self.sources])
        for note in notes:
            print(f"Note: {note.message}")
        part = self.allow_missing or (self.data_set == "covid-ct-md" and self.sources)
        print(f"{self.data_set} is{'' if part else ' whole'} in {out}")
        for what, count in counts.items():
            print(f"  {what}: {count:,}")

    def _counts(self, out: Path, sources: list[str]) -> dict[str, int]:
        from covidmask.datasets import public_sets

        if self.data_set == "covidx-ct":
            options = (self.source, self.seed, self.per_class, self.allow_missing)
            return public_sets.lay_out_covidx_ct(out, sources, *options)
        if self.data_set == "cncb-lesions":
            return public_sets.lay_out_cncb_lesions(out, sources, self.source, self.seed)
        if self.data_set == "covid-ct":
            return public_sets.lay_out_covid_ct(out, sources, self.source, self.allow_missing)
        if self.data_set == "covid-ct-md":
            return public_sets.lay_out_covid_ct_md(out, sources, self.source)
        return public_sets.fetch_files(self.data_set, out, self.source)  # the files are the data
