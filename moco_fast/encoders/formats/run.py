"""Format of this project: a run's folder, or one of its checkpoints."""

from moco_fast.checkpoint import load_encoder, step_of
from moco_fast.encoders.formats.base import OpenedEncoder, Place, Which, opened

__all__ = ["Run"]


class Run:
    """Checkpoints of ours, which say themselves what they hold."""

    def takes(self, place: Place) -> bool:
        """A folder with checkpoints, or a checkpoint."""
        if not place.is_folder or place.path is None:
            return False
        return (place.path / "state.json").is_file() or (place.path / "checkpoints").is_dir()

    def open(self, place: Place, which: Which) -> OpenedEncoder:
        """Load the newest checkpoint's encoder."""
        assert place.path is not None
        config, encoder = load_encoder(place.path, which=which)
        step = step_of(place.path)
        name = f"{place.where} ({config.model.encoder}, {config.method.name}, {which} encoder)"
        return opened(encoder, place.where, name, config=config, model=config.model, method=config.method, step=step)
