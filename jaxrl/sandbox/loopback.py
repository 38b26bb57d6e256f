"""Who may speak to a server without a token: programs of this machine, and no web page that its browser shows.

A page's own name may lead to this machine (DNS rebinding), but what a browser sends still names the page's host.
"""

import ipaddress
import urllib.parse
from collections.abc import Mapping

from jaxrl.sandbox.room import Refused


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without a port, is certain to mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check(headers: Mapping[str, str]) -> None:
    """Refuse a request for another host, or from a page of another.

    Raises:
        Refused: with 403.
    """
    host = headers.get("Host")
    if host is not None and not is_loopback(_name(f"//{host}")):
        remedy = "ask for 127.0.0.1 or localhost, or start the server with a token"
        raise Refused(403, "a foreign Host", value=ascii(host)[:80], limit="names of loopback", remedy=remedy)
    origin = headers.get("Origin")
    if origin is not None and origin != f"http://{host}":
        remedy = "ask from a program, or start the server with a token"
        raise Refused(403, "a foreign Origin", value=ascii(origin)[:80], limit=f"http://{host}", remedy=remedy)


def _name(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url).hostname or ""
    except ValueError:
        return ""
