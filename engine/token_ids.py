"""Token ids as they travel in messages: packed little-endian int32."""

from __future__ import annotations

import sys
from array import array

from cortexd import errors


def pack_token_ids(token_ids: list[int]) -> bytes:
    """Return the ids as little-endian int32."""
    packed = array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_token_ids(packed: bytes, name: str) -> list[int]:
    """Return the ids of `pack_token_ids`; `name` stands in the error. Raises: InvalidValue."""
    if len(packed) % 4:
        raise errors.InvalidValue(
            f"{name} token ids have {len(packed)} bytes; they must be packed as int32, 4 bytes each"
        )
    token_ids = array("i")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids.tolist()
