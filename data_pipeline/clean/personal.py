"""Replace e-mail addresses and public IP addresses in a text, as FineWeb (Penedo et al. 2024) does with web pages.

A match can begin only where no part of an address stands before it, so the time grows linearly with the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

EMAILS, IPS = "e-mail addresses", "IP addresses"

_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]+@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_][\w-]{0,61}[^\W_]")
_RESERVED = re.compile(r"@(?:[\w-]+\.)*(?:example\.(?:com|net|org)|example|invalid|test|localhost)$", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
# Only 2000::/3, the range from which addresses are assigned: abc::def in a program is no address.
_IPV6 = re.compile(r"(?<![\w.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{0,41}(?:[0-9A-Fa-f]|(?<=:):)(?!\w|\.\d)")


def personal(
    text: str, *, email: str | None = "email@example.com", ip: str | None = "192.0.2.1"
) -> tuple[str, dict[str, int]]:
    """Replace the addresses in a text. Returns the new text and the number of each kind. None leaves a kind as it is.

    Addresses that belong to nobody stay: those in domains reserved for examples, and IP addresses that are not public.
    """
    counts: dict[str, int] = {}
    if email is not None and "@" in text:
        text = _replaced(_EMAIL, text, lambda found: not _RESERVED.search(found), email, EMAILS, counts)
    if ip is not None:
        for pattern in (_IPV6, _IPV4):
            text = _replaced(pattern, text, _is_public, ip, IPS, counts)
    return text, counts


def _replaced(
    pattern: re.Pattern[str], text: str, is_one: Callable[[str], bool], by: str, name: str, counts: dict[str, int]
) -> str:
    def put(match: re.Match[str]) -> str:
        if not is_one(match[0]):
            return match[0]
        counts[name] = counts.get(name, 0) + 1
        return by

    return pattern.sub(put, text)


def _is_public(found: str) -> bool:
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast
