"""The lung mask of a scan on its own grid, kept on disk: finding it may take minutes, and every follow-up needs the
baseline's again.

    lung.bin    bits of the mask, compressed        lung.json    key, shape and sha256; written last
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from fourdvq.data.files import write_atomic

_LARGEST = 1 << 27  # bytes of bits: a mask of 2^30 voxels


def load_mask(folder: Path, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The mask, bool (D, H, W), that was kept under `key`; None if there is none of this shape or it is damaged."""
    try:
        head = json.loads((folder / "lung.json").read_bytes())
        packed = (folder / "lung.bin").read_bytes()
        if head["key"] != key or tuple(head["shape"]) != shape or head["sha256"] != hashlib.sha256(packed).hexdigest():
            return None
        bits = np.frombuffer(zlib.decompressobj().decompress(packed, _LARGEST), dtype=np.uint8)
        flat = np.unpackbits(bits, count=int(np.prod(shape)))
    except (OSError, ValueError, KeyError, TypeError, zlib.error):
        return None
    return flat.reshape(shape).astype(bool)


def keep_mask(folder: Path, key: str, mask: np.ndarray) -> None:
    """Keep a mask, bool (D, H, W), under `key`; the one before is replaced."""
    (folder / "lung.json").unlink(missing_ok=True)
    packed = zlib.compress(np.packbits(mask).tobytes(), 1)
    write_atomic(folder / "lung.bin", packed)
    head = {"key": key, "shape": list(mask.shape), "sha256": hashlib.sha256(packed).hexdigest()}
    write_atomic(folder / "lung.json", json.dumps(head, sort_keys=True).encode())
