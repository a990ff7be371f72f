"""The encoder that a run started from: what a trained one is compared with."""

import torch

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder, build_encoder

__all__ = ["untrained_twin"]


def untrained_twin(config: Config) -> Encoder:
    """Build the run's encoder with the weights that it had before the first step; torch's generators stay untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        return build_encoder(config.model, config.method, image_size=config.views.size, crop=config.eval.crop).eval()
