"""Who gets in: the bearer token, and, where there is none, this machine alone."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from coachhook_fast import files

_MOST_TOKEN = 4096
Headers = Sequence[tuple[bytes, bytes]]


def read_token(path: Path) -> str:
    """The bearer token in `path`: one line of visible ASCII characters without spaces.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is blank, has a second line, a space, or characters that a header cannot carry; the message says
            which, and nothing of the token.

    read_token(Path("token"))
    """
    token = files.read_text(path, most=_MOST_TOKEN).removesuffix("\n").removesuffix("\r")
    if not token.strip():
        raise ValueError(f"--token-file {path} is blank: nobody could enter, or anybody")
    if "\n" in token or "\r" in token:
        raise ValueError(f"--token-file {path} has more than one line: a token is one")
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(
            f"--token-file {path} holds spaces or characters that are not visible ASCII: no client could send them"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only; names other than localhost count as not.

    is_loopback("127.0.0.1")
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, token: str | None) -> None:
    """ValueError where the service would be open to other machines without a token."""
    if token is None and not is_loopback(host):
        raise ValueError(f"--host {host} can be reached from other machines: give --token-file, or keep to 127.0.0.1")


class Doorkeeper:
    """Decides by a request's headers alone.

    With a token: the request must bring it. Without one, the service listens on loopback, and a page of the web in a
    browser of this machine is the stranger: `Host` must name loopback, which a rebound name does not, and `Origin`,
    where there is one, must be the service's own.
    """

    def __init__(self, token: str | None) -> None:
        self._wanted = None if token is None else f"Bearer {token}".encode("ascii")

    def refusal(self, headers: Headers) -> tuple[int, str] | None:
        """(status, message), or None where the request may enter."""
        if self._wanted is not None:
            given = [value for name, value in headers if name == b"authorization"]
            # Also with several or none: what is compared takes the same time.
            right = hmac.compare_digest(given[0] if len(given) == 1 else b"", self._wanted)
            return None if right else (401, "a valid bearer token is needed")
        host = next((value for name, value in headers if name == b"host"), b"").decode("latin-1")
        if not is_loopback(_name_of(host)):
            return 403, "without a token the service answers requests to 127.0.0.1, [::1] or localhost only"
        origin = next((value for name, value in headers if name == b"origin"), None)
        if origin is not None and origin.partition(b"://")[2] != host.encode("latin-1"):
            return 403, "without a token the service answers its own page only, of the pages there are"
        return None


def _name_of(host: str) -> str:
    """The host in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
