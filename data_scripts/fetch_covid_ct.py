"""Download COVID-CT: 746 figures of two classes, cut out of preprints, 97 MB.

python data_scripts/fetch_covid_ct.py --out data/covid-ct
"""

import sys

from covidmask.cli import main

sys.exit(main(["fetch", "covid-ct", *sys.argv[1:]]))
