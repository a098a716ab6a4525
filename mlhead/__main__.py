"""`python -m mlhead`."""

import sys

from mlhead.cli import main

sys.exit(main())
