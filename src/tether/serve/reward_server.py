"""``tether serve-reward``: one of our reward models, for other processes, in OpenRLHF's form.

    POST /get_reward  {"query": [text], "prompts": [text], ...}  ->  {"rewards": [number], ...}
    GET  /health      {"status": "ok", "model": ...}
    GET  /metrics     Prometheus' text format

It reads what :class:`tether.rewards.learned.LearnedReward` would read in the run: the run's ids where the reward
model's tokenizer gives the same ones, else ``messages`` by its own chat template, or ``prompts`` and the rest of
``query``.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass, field

from tether.config import DeviceOptions, unrounded
from tether.errors import ConfigError
from tether.flags import POSITIONAL
from tether.models.reward import load_reward_model
from tether.rewards.client import is_here
from tether.rewards.learned import LearnedReward
from tether.rewards.remote import TOKEN
from tether.serve.batching import Batcher
from tether.serve.reward_app import PATH, RewardApp, application
from tether.training.inputs import naming_the_model_of_a_run
from tether.training.loading import placing, set_matmul_dtype, tell_unpacked
from tether.untrusted import one_line

GRACE = 30
"""Seconds that requests have to end once the server is asked to stop."""


@dataclass(frozen=True, kw_only=True)
class ServeReward:
    """Serve a reward model to runs in other processes, in the form of OpenRLHF's remote reward models. A token in the
    environment variable TETHER_REWARD_TOKEN is then asked for."""

    model: str = field(metadata={POSITIONAL: "DIR"})
    """Reward-model directory or hub id."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs a token."""
    port: int = 5000
    """Port to listen on; 0 takes a free one."""
    token_budget: int = 16384
    """Tokens of a batch, which holds what waits of all requests."""
    queue_limit: int = 4096
    """Texts that are in the server at a time; requests beyond them are answered with 429."""
    body_limit: int = 16
    """MiB of a request."""
    device: DeviceOptions = field(default_factory=unrounded)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "port must lie in 0..65535": 0 <= self.port <= 65535,
                "token_budget must be at least 1": self.token_budget >= 1,
                "queue_limit must be at least 1": self.queue_limit >= 1,
                "body_limit must be at least 1": self.body_limit >= 1,
            },
        )


@naming_the_model_of_a_run()
def main(command: ServeReward) -> None:
    try:
        import uvicorn
    except ModuleNotFoundError:
        raise ConfigError("serving needs the extra: pip install 'tether-rlhf[serve]'") from None
    token = os.environ.get(TOKEN) or None
    if token is None and not is_here(f"http://{bracketed(command.host)}"):
        raise ConfigError(
            "other machines reach this address, so it needs a token",
            where=f"--host {command.host}",
            hint=f"set {TOKEN}",
        )
    with listening(command.host, command.port) as one:
        model, tokenizer = load_reward_model(command.model, **placing(command.device))
        tell_unpacked(model)
        set_matmul_dtype(command.device.matmul_dtype, model)
        reward = LearnedReward(
            command.model, model, tokenizer, same_vocabulary=False, token_budget=command.token_budget
        )
        batcher = Batcher(reward.scores, command.token_budget, command.queue_limit)
        app = application(RewardApp(reward, batcher, command.body_limit << 20, token))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE,
                lifespan="on",
            )
        )
        url = f"http://{bracketed(command.host)}:{one.getsockname()[1]}{PATH}"
        print(one_line(f"tether serve-reward: {command.model} at {url}"), flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # SIGINT and SIGTERM, once the requests have been answered
            server.run(sockets=[one])
    print("tether serve-reward: stopped", flush=True)


def bracketed(host: str) -> str:
    """A host as an address writes it."""
    return f"[{host}]" if ":" in host else host


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises :class:`ConfigError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(
            f"cannot listen there ({reason})", where=f"{bracketed(host)}:{port}", hint="give --port"
        ) from None
