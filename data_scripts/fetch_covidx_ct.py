"""Lay out COVIDx-CT-1 from a Kaggle download, or from the archives of CNCB, and check every file.

python data_scripts/fetch_covidx_ct.py --from ~/Downloads/covidxct --out data/covidx-ct
"""

import sys

from covidmask.cli import main

sys.exit(main(["fetch", "covidx-ct", *sys.argv[1:]]))
