"""Let the environment that runs this see the packages of another, after its own.

build/bench-loaders/bin/python benchmarks/loaders/beside.py .venv
"""

import sys
import sysconfig
from pathlib import Path


def main() -> None:
    [other] = Path(sys.argv[1]).resolve().glob("lib/python3*/site-packages")
    # Not the path alone: what is installed there in editable mode is a .pth file, too.
    line = f"import site; site.addsitedir({str(other)!r})\n"
    Path(sysconfig.get_path("purelib"), "beside.pth").write_text(line, encoding="utf-8")


if __name__ == "__main__":
    main()
