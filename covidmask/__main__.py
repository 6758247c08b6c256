"""`python -m covidmask` is the command `covidmask`; `torchrun -m covidmask` needs it."""

from covidmask.cli import main

raise SystemExit(main())
