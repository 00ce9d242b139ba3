"""JSON over HTTP, from a server that may be busy or gone for a moment.

A request that fails for the moment (no connection, a connection that breaks, 408, 429 or a status of 500 or above) is
sent again after a pause. Whatever else is wrong, and a failure of the last try, is a :class:`RewardError`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, TypeVar

import httpx2

from tether.errors import ConfigError, RewardError
from tether.rewards.supervision import FIRST_PAUSE, again, next_pause
from tether.untrusted import shown

T = TypeVar("T")

CONNECT, PATIENCE = 10.0, 600.0
"""Seconds for a connection, and for an answer where a reward has no deadline."""
LONGEST_WAIT = 60.0
"""The most seconds that a server's Retry-After is heeded for."""
LARGEST = 2**26
"""Bytes of an answer."""
BUSY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})
TRANSIENT = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError, httpx2.ProxyError)


class BusyError(RewardError):
    """A failure that may be over in a moment."""

    def __init__(self, message: str, *, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait
        """Seconds that the server asks for."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """How a server is asked."""

    concurrency: int = 16
    """Requests at the same time."""
    retries: int = 5
    """Times that a request is sent again."""

    def __post_init__(self) -> None:
        ConfigError.unless(
            self,
            {"concurrency must be at least 1": self.concurrency >= 1, "retries must be 0 or more": self.retries >= 0},
        )


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where the reward ``name`` is asked for."""

    name: str
    url: str
    token: str | None = field(default=None, repr=False)
    """Sent as ``Authorization: Bearer``."""
    patience: float = PATIENCE
    """Seconds for one answer."""
    requests: Requests = field(default_factory=Requests)


def address(text: str, *, where: str = "") -> str:
    """``text``, which must be an address that can be written down: ``http`` or ``https``, a host, perhaps a port and a
    path. Raises :class:`RewardError`."""
    try:
        url = httpx2.URL(text)
        known = url.scheme in ("http", "https") and bool(url.host)
    except httpx2.InvalidURL:
        known = False
    if not known:
        raise RewardError("not an address", where=where or text, hint="write http://host:port/path")
    if url.userinfo or url.query or url.fragment or "?" in text:
        raise RewardError(
            "an address of a reward has no user, password, query or fragment, which would be written into files",
            where=where or text,
            hint="give a token in the environment",
        )
    return text


def is_here(url: str) -> bool:
    """Whether an address is of this machine alone."""
    host = httpx2.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_from(variable: str, url: str) -> str | None:
    """The token in an environment variable, None where it is not set. Raises :class:`RewardError` where it would be
    sent in the clear, or cannot be one."""
    token = os.environ.get(variable, "")
    if not token:
        return None
    if not all("!" <= character <= "~" for character in token):
        raise RewardError("holds characters that no token has", where=f"the environment variable {variable}")
    if not (url.startswith("https:") or is_here(url)):
        raise RewardError(
            f"the token in {variable} would be sent over an unencrypted connection",
            where=url,
            hint=f"use https, or unset {variable}",
        )
    return token


class Session:
    """Requests to one server in one event loop; ``async with`` closes its connections."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.free = asyncio.Semaphore(server.requests.concurrency)
        self.told = 0
        """The highest number of a try of which a line was printed: one outage fails many requests."""
        self.client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {server.token}"} if server.token else {},
            timeout=httpx2.Timeout(server.patience, connect=CONNECT),
            limits=httpx2.Limits(max_connections=server.requests.concurrency),
            trust_env=not is_here(server.url),  # a proxy does not lead to this machine
        )

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.aclose()

    async def post(self, content: Any) -> Any:
        """The JSON that the server answers to ``content``, sent as JSON."""
        try:
            body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError) as error:
            raise self.failure(f"what it reads cannot be sent as JSON ({error})") from None
        tries, wait = 1, FIRST_PAUSE
        async with self.free:
            while True:
                try:
                    return self._read(await self._answer(body))
                except BusyError as error:
                    pause = max(wait, min(error.wait, LONGEST_WAIT))
                    line = again(error, tries, self.server.requests.retries, pause)
                if tries > self.told:
                    self.told = tries
                    print(line, file=sys.stderr, flush=True)
                tries, wait = tries + 1, next_pause(wait)
                await asyncio.sleep(pause)

    def failure(self, what: str) -> RewardError:
        return RewardError(f"reward {self.server.name!r}: {what}")

    def _busy(self, what: str, wait: float = 0.0) -> BusyError:
        return BusyError(f"reward {self.server.name!r}: {what}", wait=wait)

    async def _answer(self, body: bytes) -> bytes:
        """The body of an answer of status 200."""
        url, found = self.server.url, bytearray()
        try:
            async with self.client.stream(
                "POST", url, content=body, headers={"Content-Type": "application/json"}
            ) as response:
                async for chunk in response.aiter_bytes():
                    found += chunk
                    if len(found) > LARGEST:
                        raise self.failure(f"{url} answered more than {LARGEST >> 20} MiB")
        except httpx2.TimeoutException as error:
            raise self._busy(f"{url} did not answer in time ({type(error).__name__})") from error
        except TRANSIENT as error:
            raise self._busy(f"no answer from {url} ({shown(error, str) or type(error).__name__})") from error
        except httpx2.HTTPError as error:
            raise self.failure(f"{url} cannot be asked ({shown(error, str) or type(error).__name__})") from error
        status = response.status_code
        if status == HTTPStatus.OK:
            return bytes(found)
        said = shown(found[:300].decode("utf-8", "replace"), str)
        what = f"{url} answered {status} {response.reason_phrase}".rstrip() + (f": {said}" if said.strip() else "")
        if status in BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise self._busy(what, seconds_of(response.headers.get("retry-after", "")))
        raise self.failure(what)

    def _read(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise self.failure(f"{self.server.url} answered {shown(body[:80])}, which is no JSON") from None


def seconds_of(retry_after: str) -> float:
    """The seconds that a Retry-After header names; 0 for none and for a date."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0


async def all_of(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of ``calls``, made at the same time; the first error ends the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_finite(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False
