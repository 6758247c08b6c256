"""Lay out the masked slices of CNCB from a folder or archive that you name, and read every one.

python data_scripts/fetch_cncb_lesions.py --from masked_slices.zip --out data/cncb-lesions
"""

import sys

from covidmask.cli import main

sys.exit(main(["fetch", "cncb-lesions", *sys.argv[1:]]))
