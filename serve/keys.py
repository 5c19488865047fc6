"""API keys: one of them is wanted as bearer token, whichever front a request comes through."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


def keys_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The keys, where one, several or none (no key is needed) are given."""
    return (given,) if isinstance(given, str) else tuple(given or ())


def is_opened(authorization: bytes, keys: Sequence[str]) -> bool:
    """Whether a request with this Authorization may pass: it may where there are no keys."""
    if not keys:
        return True
    scheme, _, given = authorization.partition(b" ")
    digest = _digest(given.strip())
    # All are compared, of equal length: how long it takes tells nothing of any key.
    known = sum(hmac.compare_digest(digest, _digest(key.encode())) for key in keys)
    return bool(known) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
