"""Any parts of benchmarks/gpu_parts.py on the GPU that is not there; processes that they spawn begin here, too."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from tests import fake_cuda  # noqa: E402 (the path comes first)

fake_cuda.install()

if __name__ == "__main__":
    import gpu_parts

    for job in sys.argv[1:]:
        gpu_parts.do(job)
