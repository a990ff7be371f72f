"""Entry point `python -m moco_fast.bench`, for `accelerate launch`."""

import sys

from moco_fast.bench.cli import main

sys.exit(main())
