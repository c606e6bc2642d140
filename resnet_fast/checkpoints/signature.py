"""The SHA-256 of an archive of torch.save, in the archive's comment, so that any damage shows.

    comment = b"resnet_fast sha256 " + SHA-256 of all bytes before the comment

torch.load reads such an archive as any other. It verifies no checksum, so it does not notice changed bits in a weight.
"""

import hashlib
import io
import os

MARK = b"resnet_fast sha256 "
COMMENT_BYTES = len(MARK) + 64


def sign(archive: io.BytesIO) -> None:
    """Append the comment to an archive without one."""
    archive.seek(-2, os.SEEK_END)  # the length of the comment, 0 until now
    archive.write(COMMENT_BYTES.to_bytes(2, "little"))
    digest = hashlib.sha256(archive.getbuffer()).hexdigest()
    archive.write(MARK + digest.encode())


def is_signed(data: bytes) -> bool:
    """Return whether the bytes end in such a comment, right or wrong."""
    return data[-COMMENT_BYTES:].startswith(MARK)


def is_whole(data: bytes) -> bool:
    """Return whether the SHA-256 in the comment is that of the bytes."""
    digest = hashlib.sha256(memoryview(data)[:-COMMENT_BYTES]).hexdigest()
    return data[-COMMENT_BYTES:] == MARK + digest.encode()
