"""Download COVID-SemiSeg: 98 real CT slices with masks, 5 MB, for non-commercial use only.

python data_scripts/fetch_covid_semiseg.py --out data/covid-semiseg
"""

import sys

from covidmask.cli import main

sys.exit(main(["fetch", "covid-semiseg", *sys.argv[1:]]))
