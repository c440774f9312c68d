import hashlib
import os

from tandem.files.digests import BEHIND, Hashing


def test_digests_take_their_blocks_in_order_while_others_are_hashed() -> None:
    blocks = [[os.urandom(1 + number) for number in range(BEHIND)] for _ in range(5)]
    hashing = Hashing()
    digests = [hashing.digest() for _ in blocks]
    for turn in range(BEHIND):
        for digest, array_blocks in zip(digests, blocks):
            hashing.update(digest, memoryview(array_blocks[turn]))
    hashing.close()
    expected = [hashlib.sha256(b"".join(array_blocks)).hexdigest() for array_blocks in blocks]
    assert [digest.hexdigest() for digest in digests] == expected
