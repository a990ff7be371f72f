"""The encoder that a run started from: what a trained one is compared with."""

import torch

from moco_fast.config import Config
from moco_fast.encoders.encoder import Encoder, build_encoder
from moco_fast.encoders.initial import initial_weights

__all__ = ["untrained_twin"]


def untrained_twin(config: Config) -> Encoder:
    """Build the run's encoder with the weights that it had before the first step; torch's generators stay untouched.

    Raises:
        ValueError: what --run.init-from names cannot be opened any more.
    """
    initial = initial_weights(config)
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.model, config.method, image_size=config.views.size, crop=config.eval.crop)
    if initial is not None:
        encoder.load_state_dict(initial.tensors, strict=False)
    return encoder.eval()
