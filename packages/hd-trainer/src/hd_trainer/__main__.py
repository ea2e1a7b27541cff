"""``python -m hd_trainer`` is ``hdistill``."""

import sys

from hd_trainer.cli import main

sys.exit(main())
