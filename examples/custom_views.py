"""Train with a recipe of views of one's own: here one that leaves colors alone, as for medical images.

accelerate launch --config_file deploy/accelerate/cpu-1.yaml examples/custom_views.py shards/train runs/mine
"""

import sys

import moco_fast
from pipelines.config import ViewConfig, ViewsConfig

PLAIN = ViewConfig(crop_scale=(0.5, 1.0), jitter_p=0.0, grayscale_p=0.0, blur_p=0.0)


def main(shards: str, run: str, steps: str = "200") -> int:
    views = ViewsConfig(size=64, query=PLAIN, key=PLAIN)
    options = {"data.shards": shards, "run.out": run, "run.steps": int(steps), "views": views}
    return moco_fast.train(moco_fast.configure("demo", options))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
