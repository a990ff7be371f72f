"""JPEGs of flat blocks, written by hand: any sampling factors, and the color of each half is known."""

import numpy as np

LEFT, RIGHT = (90, 110, 150), (170, 140, 100)
"""Y, Cb, Cr of the halves."""


def flat_jpeg(factors: tuple[tuple[int, int], ...], *, mcus: int = 4, scan: bytes = b"\0\x3f\0") -> bytes:
    """A baseline JPEG of `mcus` x `mcus` units, whose left and right half have a color each.

    Args:
        factors: horizontal and vertical sampling factor of Y, Cb and Cr.
        mcus: an even number.
        scan: the last three bytes of the scan's header.
    """
    widest, highest = (max(factor[axis] for factor in factors) for axis in (0, 1))
    width, height = mcus * 8 * widest, mcus * 8 * highest
    bits, last = "", [0, 0, 0]
    for _ in range(mcus):
        for column in range(mcus):
            for component, (across, down) in enumerate(factors):
                value = (LEFT if column < mcus // 2 else RIGHT)[component] - 128
                for _ in range(across * down):
                    difference, last[component] = value - last[component], value
                    size = abs(difference).bit_length()
                    bits += f"{size:04b}"
                    bits += f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}" if size else ""
                    bits += "0"  # the end of the block
    bits += "1" * (-len(bits) % 8)
    coded = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    components = b"".join(bytes((i + 1, across << 4 | down, 0)) for i, (across, down) in enumerate(factors))
    return b"".join(
        (
            b"\xff\xd8",
            _segment(0xDB, b"\0" + b"\x08" * 64),
            _segment(0xC0, b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + b"\3" + components),
            # Twelve sizes of differences, four bits each; one code that ends a block.
            _segment(0xC4, b"\0" + bytes((0, 0, 0, 12)) + bytes(12) + bytes(range(12))),
            _segment(0xC4, b"\x10" + bytes((1,)) + bytes(15) + b"\0"),
            _segment(0xDA, b"\3\1\0\2\0\3\0" + scan),
            coded,
            b"\xff\xd9",
        )
    )


def _segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(data) + 2).to_bytes(2, "big") + data


def halves(width: int, height: int) -> np.ndarray:
    """The pixels that such a JPEG holds, (height, width, 3), by JFIF's conversion."""
    found = np.empty((height, width, 3))
    for columns, (y, cb, cr) in ((slice(0, width // 2), LEFT), (slice(width // 2, width), RIGHT)):
        cb, cr = cb - 128, cr - 128
        found[:, columns] = (y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb)
    return found.clip(0, 255)
