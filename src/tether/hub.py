"""Whether the hub can be reached, checked before its client tries."""

from __future__ import annotations

import socket
import urllib.request
from functools import cache
from urllib.parse import urlsplit

from huggingface_hub import constants


@cache
def settle_for_the_cache_when_offline() -> None:
    """Where the hub's name does not resolve, restrict its client to its cache.

    The client would otherwise retry each file for a minute before it gives up.
    """
    if urllib.request.getproxies().get("https"):
        return  # names are then resolved by the proxy
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
