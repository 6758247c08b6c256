"""Lay out COVIDx-CT-1 from a Kaggle download, or from the archives of CNCB, and check every file.

    python data_scripts/fetch_covidx_ct.py --from ~/Downloads/covidxct --out data/covidx-ct

The same as `covidmask fetch covidx-ct`, which explains the options.
"""

import sys

from covidmask.cli import main

if __name__ == "__main__":
    sys.exit(main(["fetch", "covidx-ct", *sys.argv[1:]]))
