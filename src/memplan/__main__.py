"""``python -m memplan``: the command line."""

import sys

from memplan.cli import main

sys.exit(main())
