import google_crc32c
import numpy as np
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shards.ground.digests import crc32c, digest, digest_file, digest_number, running_digest, short_digest


@given(parts=st.lists(st.binary(max_size=50), max_size=4))
def test_all_ways_to_the_same_bytes_give_the_same_digest(parts, tmp_path_factory):
    whole = b"".join(parts)
    path = tmp_path_factory.mktemp("digest") / "file"
    path.write_bytes(whole)
    running = running_digest()
    for part in parts:
        running.update(part)
    expected = xxhash.xxh3_128_hexdigest(whole)
    assert {digest(*parts), digest_file(path), running.hexdigest(), f"{digest_number(whole):032x}"} == {expected}
    assert short_digest(whole) == xxhash.xxh3_64_hexdigest(whole)
    assert crc32c(np.frombuffer(whole, dtype=np.uint8).copy()) == crc32c(whole) == google_crc32c.value(whole)


def test_crc32c_of_the_check_string():
    # RFC 3720, B.4, and every catalog of CRCs.
    assert crc32c(b"123456789") == 0xE3069283
