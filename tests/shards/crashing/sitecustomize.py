"""Lets image libraries crash at images that say so; every process with this folder in PYTHONPATH imports it."""

import os
import signal
from pathlib import Path

import simplejpeg
from PIL import GifImagePlugin, ImageFile


def act(data):
    """End this process, or ask for memory, as the image says that follows a mark; or fail, for reference."""
    _, mark, rest = bytes(data).partition(b"crash:")
    kind = rest.partition(b";")[0].decode()
    if not mark:
        return
    if kind.startswith("once-"):
        kind = kind.removeprefix("once-")
        try:
            (Path(os.environ["CRASHED"]) / kind).touch(exist_ok=False)
        except FileExistsError:
            return
    if os.environ.get("RAISES"):
        raise KeyError(kind)
    if kind == "abort":
        os.abort()
    elif kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "exit":
        os._exit(3)
    elif kind == "memory":
        bytearray(1 << 45)


def hooked(function):
    def call(data, *arguments, **options):
        act(data)
        return function(data, *arguments, **options)

    return call


def load(image):
    if "mark" in image.info:
        act(image.info["mark"].encode())
    return whole_load(image)


def open_gif(image):
    whole_open(image)
    act(image.info.get("comment", b""))


whole_open, GifImagePlugin.GifImageFile._open = GifImagePlugin.GifImageFile._open, open_gif
simplejpeg.decode_jpeg = hooked(simplejpeg.decode_jpeg)
whole_load, ImageFile.ImageFile.load = ImageFile.ImageFile.load, load
