"""Whether the rollout engine draws from the model it was given: compared with the library's own forward pass."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tether.errors import ModelError
from tether.models.checks import affordable, probe_ids, refusing, thresholds, tolerance_of, tried_context
from tether.models.unpacked import is_unpacked
from tether.types import Generator, Prompt, RolloutGroup, Sampling, make_requests

NEW_TOKENS = 4
MORE_TOKENS = 16
"""Of a model that is unpacked, whose cache is the library's and may drift; its gaps must be ten times as small too."""


@torch.no_grad()
def check_samples(generator: Generator, model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` unless the log-probs that ``generator`` says it drew with are the model's own, at
    prompts on both sides of every length at which the model changes what it does and that it is cheap to cross
    (:func:`tether.models.checks.thresholds`)."""
    context, padded = tried_context(model), is_unpacked(model)
    new = max(1, min(MORE_TOKENS if padded else NEW_TOKENS, context - 1))
    crossing = [t for t in thresholds(model) if t + 1 + new <= context and affordable(model, 10 * t)]
    lengths = sorted({max(1, n) for t in crossing for n in (t - 2, t + 1)} | {1, max(1, min(5, context - new))})
    prompts = [Prompt(ids=probe_ids(model, n, seed=n), text="") for n in lengths]
    with refusing(str(model.config._name_or_path), model):
        asked = make_requests(prompts, group_size=2, seed=0)
        gaps = gaps_of(generator.generate(asked, sampling=Sampling(max_new_tokens=new)), model)
        worst = float(gaps.max())
        if not worst <= (1 if padded else 10) * tolerance_of(model):
            raise ModelError(
                f"{type(model).__name__} gives other log-probs when it is decoded token by token "
                f"({worst:.2g} nats apart), so it cannot be sampled from"
            )


def gaps_of(groups: list[RolloutGroup], model: PreTrainedModel) -> torch.Tensor:
    """Of every completion, the mean difference in nats between the log-probs it was drawn with and the model's own."""
    gaps = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.ids, *completion.ids]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt.ids) - 1 : -1].float()
            known = logits.log_softmax(-1).gather(1, ids[0, len(group.prompt.ids) :, None]).squeeze(1).cpu()
            gaps.append((known - torch.tensor(completion.sampler_logp)).abs().mean())
    return torch.stack(gaps).nan_to_num(nan=torch.inf)
