"""Images that are packed to be embedded: every one of them, whatever their folders are called."""

from moco_fast.embedding.images import pack_images
from tests.shards.pictures import jpeg


def test_folders_that_could_be_classes_in_several_ways_are_embedded_without_labels(tmp_path):
    for i, folder in enumerate(("train/cat", "val/cat", "val/dog")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "0.jpg").write_bytes(jpeg(i))
    (tmp_path / "in" / "val" / "dog" / "0.seg.png").write_bytes(jpeg(9))
    for _ in range(2):
        packed = pack_images(str(tmp_path / "in"), tmp_path / "out")
        assert (packed.num_samples, packed.class_names) == (4, ())
