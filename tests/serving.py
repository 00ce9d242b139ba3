"""Web applications on loopback, in a thread of the test."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from tether.models.loading import load_tokenizer
from tether.models.reward import new_reward_model
from tether.rewards.learned import LearnedReward
from tether.serve.batching import Batcher
from tether.serve.reward_app import RewardApp, application
from tether.serve.reward_server import listening


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """``app``, running; gives its address without a path."""
    with listening("127.0.0.1", 0) as one:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [one]})
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{one.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def until(condition: Any, seconds: float = 20.0) -> None:
    """Wait for ``condition()``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.005)


def reward_model(directory: str, *, seed: int = 0) -> tuple[LearnedReward, LearnedReward]:
    """A reward model as a run has it for the policy in ``directory``, and as a server has it."""
    model, tokenizer = new_reward_model(directory, seed=seed)
    model.requires_grad_(False)
    local = LearnedReward.of("local", model, tokenizer, load_tokenizer(directory))
    return local, LearnedReward("served", model, tokenizer, same_vocabulary=False)


@contextlib.contextmanager
def reward_server(
    reward: LearnedReward,
    *,
    token_budget: int = 16384,
    queue_limit: int = 4096,
    body_limit: int = 2**20,
    token: str | None = None,
    score: Any = None,
) -> Iterator[tuple[str, Batcher]]:
    """A reward server; ``score`` in place of the model's."""
    batcher = Batcher(score or reward.scores, token_budget, queue_limit)
    with serving(application(RewardApp(reward, batcher, body_limit, token))) as url:
        yield url, batcher
