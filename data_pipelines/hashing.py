"""Compiled loops over hashed text. As in `kernels.py`, 0 rows are accepted and the interpreter lock is released.

`data` holds the UTF-8 of all rows end to end, row i at data[offsets[i]:offsets[i + 1]].
"""

import numpy as np

from data_pipelines.kernels import FNV_OFFSET, FNV_PRIME, compiled


@compiled
def row_hashes(data, offsets, out):
    """Fills out[i] with the 64-bit FNV-1a hash of row i (`kernels.fnv` of its text)."""
    for row in range(offsets.shape[0] - 1):
        value = np.uint64(FNV_OFFSET)
        for at in range(offsets[row], offsets[row + 1]):
            value = (value ^ np.uint64(data[at])) * np.uint64(FNV_PRIME)
        out[row] = value
