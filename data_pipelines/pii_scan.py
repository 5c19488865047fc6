"""A compiled search for places where personal data may stand; `pii.py` decides what does. It misses none."""

import numpy as np

from data_pipelines.blocks import compiled, inlined

LEAST_WEIGHT = 8
"""Digits and dots: a phone number has at least 8 digits, an address of version 4 that is masked 5 digits and 3 dots."""
LEAST_COLONS = 3
"""Of an address of version 6 that is masked."""


@inlined
def _is_digit(byte):
    return 48 <= byte <= 57


@inlined
def _is_letter(byte):
    return 65 <= byte <= 90 or 97 <= byte <= 122


@inlined
def _is_account(data, at, stop):
    """Whether two capitals and a digit stand here, as at the start of an IBAN."""
    return at + 2 < stop and 65 <= data[at] <= 90 and 65 <= data[at + 1] <= 90 and _is_digit(data[at + 2])


@compiled
def candidates(data, start, stop, out):
    """Number of candidates in data[start:stop]; fills out with the place of each, in order.

    A candidate is an @, two capitals before a digit, or the first digit (and the + before it) of every number in a run
    of digits, a to f and separators that is long enough or has colons enough. `out` must hold one value per byte.
    """
    found = 0
    at = start
    while at < stop:
        byte = data[at]
        if byte == 64:
            out[found] = at
            found += 1
            at += 1
        elif _is_digit(byte) or (byte == 43 and at + 1 < stop and _is_digit(data[at + 1])):
            weight, end, colons = 0, at, 0
            while end < stop:
                seen = data[end]
                if _is_digit(seen) or seen == 46:
                    weight += 1
                elif 97 <= seen <= 102 or 65 <= seen <= 70 or seen == 58:
                    colons += seen == 58
                elif not (seen == 32 or seen == 43 or seen == 45 or seen == 40 or seen == 41):
                    break
                end += 1
            # Every number of the run may be the first of one that is masked: 2 cats, 138 1234 5678.
            enough = weight >= LEAST_WEIGHT or colons >= LEAST_COLONS
            previous = data[at - 1] if at > start else np.uint8(32)
            for place in range(at, end):
                here = data[place]
                begins = not _is_digit(previous) and not _is_letter(previous)
                if begins and ((enough and (_is_digit(here) or here == 43)) or _is_account(data, place, stop)):
                    out[found] = place
                    found += 1
                previous = here
            # A letter that ends the run may begin an account number: 2 CH93...
            at = max(end - _is_letter(data[end - 1]), at + 1)
        elif _is_account(data, at, stop):
            if at == start or not (_is_digit(data[at - 1]) or _is_letter(data[at - 1])):
                out[found] = at
                found += 1
            at += 2
        else:
            at += 1
    return found
