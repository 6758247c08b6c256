"""Download COVID-SemiSeg (98 real CT slices, 5 MB, non-commercial use only).

    python data_scripts/fetch_covid_semiseg.py --out data/covid-semiseg

The same as `covidmask fetch covid-semiseg`, which explains the options.
"""

import sys

from covidmask.cli import main

if __name__ == "__main__":
    sys.exit(main(["fetch", "covid-semiseg", *sys.argv[1:]]))
