"""The web application of a reward server: what it answers to whom."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from tether.errors import TetherError
from tether.rewards.learned import LearnedReward
from tether.serve.batching import Batcher, Counts, FullError
from tether.serve.questions import Question, QuestionError, question_of, reader_for, row_of
from tether.types import PromptCompletion
from tether.untrusted import one_line

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PATH = "/get_reward"
DRAINED = 8
"""A body is read up to so many times the limit."""
NONE: Mapping[str, str] = {}


class TooLargeError(Exception):
    """A request that is never answered, however empty the server is."""


@dataclass(frozen=True)
class RewardApp:
    """What the answers are made of."""

    reward: LearnedReward
    batcher: Batcher
    body_limit: int
    """Bytes."""
    token: str | None = None
    """What a request has to show, but for ``/health``; None lets everyone in."""
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tether-texts"))
    """Where texts become ids: a tokenizer is for one thread at a time."""

    async def get_reward(self, request: Request) -> Response:
        started = time.monotonic()
        answer = await self._answer(request)
        self.batcher.counts.answered(answer.status_code, time.monotonic() - started)
        return answer

    async def _answer(self, request: Request) -> Response:
        try:
            found = await self._rewards(request)
        except FullError as error:
            return refusal(HTTPStatus.TOO_MANY_REQUESTS, error, {"Retry-After": str(error.seconds)})
        except TooLargeError as error:
            return refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, error)
        except QuestionError as error:
            return refusal(HTTPStatus.BAD_REQUEST, error)
        except TetherError as error:
            return refusal(HTTPStatus.INTERNAL_SERVER_ERROR, error)
        return as_json({"rewards": found, "scores": found, "extra_logs": {}})

    async def _rewards(self, request: Request) -> list[float]:
        require_json(request)
        question = question_of(await body_of(request, self.body_limit))
        texts = question.texts
        if len(texts) > self.batcher.queue_limit:
            raise TooLargeError(f"{len(texts)} texts, and a request may hold {self.batcher.queue_limit}")
        with self.batcher.place(len(texts)):
            rows = await asyncio.get_running_loop().run_in_executor(self.reader, self._read, question)
            return await self.batcher.scores(rows)

    def _read(self, question: Question) -> list[PromptCompletion]:
        """The rows of a request."""
        reader = reader_for(self.reward, question.signature)
        return [row_of(reader, text, i) for i, text in enumerate(question.texts)]

    async def health(self, _: Request) -> Response:
        return as_json({"status": "ok", "model": self.reward.name})

    async def metrics(self, _: Request) -> Response:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(
            exposition(self.batcher.counts, self.batcher.held), media_type="text/plain; version=0.0.4"
        )

    def guarded(self, inner: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """``inner`` for requests that show the token."""

        async def outer(request: Request) -> Response:
            given = request.headers.get("authorization", "").encode("latin-1")
            if self.token is not None and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                return refusal(HTTPStatus.UNAUTHORIZED, "wrong or missing token", {"WWW-Authenticate": "Bearer"})
            return await inner(request)

        return outer

    @contextlib.asynccontextmanager
    async def running(self, _: Starlette) -> AsyncIterator[None]:
        """While the server runs, so does the batcher."""
        scoring = asyncio.create_task(self.batcher.run())
        try:
            yield
        finally:
            scoring.cancel()
            await asyncio.gather(scoring, return_exceptions=True)
            self.reader.shutdown()


def application(app: RewardApp) -> Starlette:
    """The routes of ``app``."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    return Starlette(
        routes=[
            Route(PATH, app.guarded(app.get_reward), methods=["POST"]),
            Route("/health", app.health),
            Route("/metrics", app.guarded(app.metrics)),
        ],
        lifespan=app.running,
    )


def as_json(content: Any, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] = NONE) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, dict(headers))


def refusal(status: HTTPStatus, error: object, headers: Mapping[str, str] = NONE) -> Response:
    """One line that says what is wrong."""
    return as_json({"error": one_line(str(error))}, status, headers)


def require_json(request: Request) -> None:
    """Raise :class:`QuestionError` unless the request says that it is JSON: a page in a browser on this machine can
    send other types to any address unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise QuestionError("the Content-Type must be application/json")


async def body_of(request: Request, limit: int) -> bytes:
    """The body of up to ``limit`` bytes. Raises :class:`TooLargeError` for a larger one, of which some more is read
    first: a client that is still sending does not read the answer."""
    found, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            found += chunk
        elif size > DRAINED * limit:
            break
    if size > limit:
        raise TooLargeError(f"the body is larger than {limit >> 20} MiB")
    return bytes(found)


def exposition(counts: Counts, held: int) -> str:
    """The figures of a server in Prometheus' text format."""
    return "\n".join([
        *described("requests_total", "counter", "Requests answered, by status."),
        *(f'{PREFIX}requests_total{{status="{status}"}} {n}' for status, n in sorted(counts.requests.items())),
        *described("request_seconds", "summary", "Time from a request to its answer."),
        f"{PREFIX}request_seconds_sum {counts.request_seconds!r}",
        f"{PREFIX}request_seconds_count {sum(counts.requests.values())}",
        *described("texts_total", "counter", "Texts scored."),
        f"{PREFIX}texts_total {counts.texts}",
        *described("tokens_total", "counter", "Tokens scored."),
        f"{PREFIX}tokens_total {counts.tokens}",
        *described("batch_seconds", "summary", "Time of the batches that texts were scored in."),
        f"{PREFIX}batch_seconds_sum {counts.batch_seconds!r}",
        f"{PREFIX}batch_seconds_count {counts.batches}",
        *described("queue_texts", "gauge", "Texts in the server that are not answered yet."),
        f"{PREFIX}queue_texts {held}",
        "",
    ])  # fmt: skip


PREFIX = "tether_reward_"


def described(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} {kind}"]
