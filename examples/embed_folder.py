"""Embed a folder of images with a trained encoder, and find what is most like one of them.

python examples/embed_folder.py runs/first photos
"""

import sys

import moco_fast


def main(run: str, folder: str) -> None:
    found = moco_fast.embed(moco_fast.load_encoder(run), folder)
    print(f"{len(found)} images, {found.values.shape[1]} numbers each; {len(found.rejected)} could not be read")
    print(f"most like {found.names[0]}:")
    for row, similarity in found.nearest(0, k=5):
        print(f"  {similarity:.3f}  {found.names[row]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
