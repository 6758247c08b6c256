"""`covidmask fetch`: from nothing to real data, one command for each data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg, subcommand

from covidmask.errors import CovidmaskError
from covidmask.files import data_root

_Lists = Annotated[
    Path | None, arg(help_behavior_hint="(default: they are downloaded)", metavar="DIR")
]


def _folder(name: str) -> object:
    return arg(help_behavior_hint=f"(default: {name} in $COVIDMASK_DATA or ./data)", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class FetchCovidSemiSeg:
    """Download COVID-SemiSeg: 98 real CT slices with masks of GGO and consolidation, 5 MB.

    For non-commercial use only; the terms are printed first and stored beside the data. Each file
    is compared with its SHA-256. Running it again fetches what is missing or wrong. For example:
    `covidmask fetch covid-semiseg`, then
    `covidmask stats --data data/covid-semiseg`
    """

    out: Annotated[Path | None, _folder("covid-semiseg")] = None
    """Folder to fill."""
    source: Annotated[
        str | None,
        arg(help_behavior_hint="(default: the authors' repository at one commit)", metavar="URL"),
    ] = None
    """Another address that serves TrainingSet and TestingSet; the sums stay the same."""
    workers: int = 8
    """Downloads at a time."""

    def run(self) -> None:
        from covidmask.datasets.sources import TERMS, fetch_covid_semiseg, semiseg_files

        if not 1 <= self.workers <= 64:
            raise CovidmaskError(f"--workers {self.workers}: must be 1 to 64")
        out = self.out or data_root() / "covid-semiseg"
        print(TERMS["covid-semiseg"], flush=True)
        fetched = fetch_covid_semiseg(out, self.source, self.workers)
        print(
            f"COVID-SemiSeg is whole in {out}: {fetched} files fetched, "
            f"{len(semiseg_files()[1]) - fetched} were there; the same slices in the lesion layout "
            f"in {out / 'lesion_layout'}"
        )


@dataclass(frozen=True, kw_only=True)
class FetchCovidxCt:
    """Lay out COVIDx-CT-1, slices of three classes, from what you downloaded; check every file.

    Get the images from Kaggle (hgunraj/covidxct; `--from kaggle` does it if kagglehub is installed)
    or from the CNCB archives (http://ncov-ai.big.ac.cn/download). Folders are linked, not copied,
    so leave them where they are. OUT/slices gets the lists train (the author's 3,000 slices), val,
    test, train_all, and new balanced samples. For example:
    `covidmask fetch covidx-ct --from ~/Downloads/covidxct`, then
    `covidmask train classifier --preset paper --data data/covidx-ct`
    """

    sources: Annotated[tuple[str, ...], arg(name="from", metavar="DIR|kaggle|ARCHIVE [...]")]
    """Folders and archives (zip, tar, tar.gz ...) that hold the slices; kaggle downloads them."""
    out: Annotated[Path | None, _folder("covidx-ct")] = None
    """Folder to fill."""
    lists: _Lists = None
    """Folder with copies of the four public lists; their SHA-256 is checked, too."""
    seeds: tuple[int, ...] = (0,)
    """Each gives two samples: sample_seed<n>, and _by_patient, which covers more patients."""
    per_class: int = 1000
    """Slices of each class in a sample."""
    kaggle_version: int = 1
    """Of the data set on Kaggle; later ones leave out 28 slices of version 1."""
    allow_missing: bool = False
    """Leave out slices that are not there, and name them in OUT/missing.txt."""

    def run(self) -> None:
        from covidmask.datasets.layouts import lay_out_covidx_ct
        from covidmask.datasets.sources import TERMS, kaggle_folder

        if min(self.seeds, default=0) < 0 or self.per_class < 1 or self.kaggle_version < 1:
            raise CovidmaskError(
                f"--seeds {' '.join(map(str, self.seeds))} --per-class {self.per_class} "
                f"--kaggle-version {self.kaggle_version}: seeds must be at least 0, the others 1"
            )
        if not self.sources:
            raise CovidmaskError("--from: name at least one folder or archive, or kaggle")
        out = self.out or data_root() / "covidx-ct"
        print(TERMS["covidx-ct"], flush=True)
        sources = [
            kaggle_folder(self.kaggle_version) if name == "kaggle" else Path(name).expanduser()
            for name in self.sources
        ]
        counts = lay_out_covidx_ct(
            out, sources, self.lists, self.seeds, self.per_class, self.allow_missing
        )
        _print_lists(counts)
        print(f"COVIDx-CT-1 is laid out in {out}")


@dataclass(frozen=True, kw_only=True)
class FetchCncbLesions:
    """Lay out the masked slices of CNCB, on which the paper trains its detector; read every one.

    Name a folder or archive that has image/<patient>/<slice> and mask/<patient>/<slice> in it, at
    any depth. Which archive of http://ncov-ai.big.ac.cn/download that is, is not established. OUT
    gets the author's lists, train (650 slices) and test (100), and train_500 and test_150, which
    divide the 650 by patient as the paper's text counts. For example:
    `covidmask fetch cncb-lesions --from masked_slices.zip`, then
    `covidmask train segmenter --preset paper --data data/cncb-lesions`
    """

    source: Annotated[Path, arg(name="from", metavar="DIR|ARCHIVE")]
    """Folder or archive (zip, tar, tar.gz ...)."""
    out: Annotated[Path | None, _folder("cncb-lesions")] = None
    """Folder to fill."""
    lists: _Lists = None
    """Folder with copies of the author's two lists; their SHA-256 is checked, too."""
    seed: int = 0
    """Of the division into 500 and 150 slices."""

    def run(self) -> None:
        from covidmask.datasets.layouts import lay_out_cncb_lesions
        from covidmask.datasets.sources import TERMS

        out = self.out or data_root() / "cncb-lesions"
        print(TERMS["cncb-lesions"], flush=True)
        counts = lay_out_cncb_lesions(out, self.source.expanduser(), self.lists, self.seed)
        _print_lists(counts)
        print(f"The masked slices of CNCB are laid out in {out}")


@dataclass(frozen=True)
class Fetch:
    """Get real CT: download it, or lay out what you downloaded; every file is checked."""

    data_set: (
        Annotated[FetchCovidSemiSeg, subcommand("covid-semiseg")]
        | Annotated[FetchCovidxCt, subcommand("covidx-ct")]
        | Annotated[FetchCncbLesions, subcommand("cncb-lesions")]
    )

    def run(self) -> None:
        self.data_set.run()


def _print_lists(counts: dict[str, int]) -> None:
    for name, count in counts.items():
        print(f"  {name}.txt: {count:,} slices")
