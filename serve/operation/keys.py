"""Who may ask: with one of the API keys as bearer token, whichever front a request comes through; from which pages."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._~%-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_OWN_PORTS = {"http": ":80", "https": ":443"}


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


def check_origin(given: str) -> str:
    """The origin of a page, if it is written as browsers send it; `*` is any, `null` that of a file.

    Raises ValueError for what no browser would ever send.
    """
    own_port = _OWN_PORTS.get(given.partition(":")[0])
    is_right = _ORIGIN.fullmatch(given) and not (own_port and given.endswith(own_port))
    if given not in ("*", "null") and not is_right:
        raise ValueError(
            f"an origin is a scheme, a host and a port that is not the scheme's own, in small letters and with nothing "
            f"behind, such as https://chat.example.org or http://localhost:3000; given {given}"
        )
    return given


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
