"""Download the sample of COVID-CT-MD: DICOM files of a few patients of three classes.

python data_scripts/fetch_covid_ct_md.py --out data/covid-ct-md
"""

import sys

from covidmask.cli import main

sys.exit(main(["fetch", "covid-ct-md", *sys.argv[1:]]))
