"""Command `accelerate launch -m moco_fast.train RECIPE [options]`: pretrain an encoder.

This file cannot be imported as a module: it would replace `moco_fast.train(config)`, the function of the Python API.
"""

import sys

if __name__ == "moco_fast.train":
    raise ImportError("moco_fast.train is a command; its command line is read by moco_fast.commandline")

if __name__ == "__main__":
    from moco_fast.commandline import main

    sys.exit(main())
