"""The policy's forward pass over a batch of prompts and completions, and the values read from the same states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.errors import ModelError
from tether.models.attention import laid_out
from tether.models.balance import weigh_tokens
from tether.models.packing import Pack, pack
from tether.models.routes import pick_routes
from tether.models.trainable import trainable
from tether.models.unpacked import is_unpacked
from tether.ops.logprobs import chunked_logprobs
from tether.ops.reduce import length_mask
from tether.types import Batch


def project(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from last hidden states [..., D] to logits [..., V], with what the configuration says is done to
    them: a factor (Cohere's ``logit_scale``), a divisor (Granite's ``logits_scaling``), a soft cap (Gemma 2's)."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    factor, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))

    def logits(hidden: Tensor) -> Tensor:
        scores = head(hidden)
        if factor is not None:
            scores = scores * factor
        if divisor is not None:
            scores = scores / divisor
        return scores if cap is None else cap * torch.tanh(scores / cap)

    return logits


def policy_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of ids [B, S] from position 0, computed from the hidden states."""
    return project(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)


def completion_states(trunk: nn.Module, batch: Batch) -> Tensor:
    """The hidden state at s_t for every token that the policy emitted, [N, D], N = ``batch.mask.sum()``, row by row.

    Rows with the same prompt share it, and nothing is padded (:mod:`tether.models.packing`).
    """
    if is_unpacked(trunk):
        return padded_states(trunk, batch)
    packed = pack(batch, ends=False)
    states = packed_states(trunk, packed)[packed.states]
    pick_routes(lambda routes: routes[packed.states])
    return states


def final_states(trunk: nn.Module, batch: Batch) -> Tensor:
    """The hidden state at the last token of each row, [B, D]."""
    if is_unpacked(trunk):
        hidden = padded_hidden(trunk, batch, last=True)
        return hidden[torch.arange(len(batch), device=hidden.device), batch.lengths.to(hidden.device) - 1]
    packed = pack(batch, ends=True)
    return packed_states(trunk, packed)[packed.ends]


def packed_states(trunk: nn.Module, packed: Pack) -> Tensor:
    """The last hidden state of every packed token, [N, D]."""
    weigh_tokens(packed.rows_per_token)
    with laid_out(trunk):
        out = trunk(input_ids=packed.ids, position_ids=packed.positions, use_cache=False, layout=packed.layout)
    hidden: Tensor = out.last_hidden_state
    return hidden.squeeze(0)


def padded_states(trunk: nn.Module, batch: Batch) -> Tensor:
    """The same as :func:`completion_states` from padded rows and the model's own attention: its oracle, and the way of
    models that are unpacked."""
    hidden = padded_hidden(trunk, batch, last=False)
    rows = torch.arange(len(batch), device=hidden.device).unsqueeze(1)
    pick_routes(lambda routes: routes.view(hidden.shape[:2])[rows, batch.predictors][batch.mask])
    return hidden[rows, batch.predictors][batch.mask]


def padded_hidden(trunk: nn.Module, batch: Batch, *, last: bool) -> Tensor:
    """The last hidden states of padded rows, [B, S, D]; ``last`` is whether that of a row's last token is needed."""
    weigh_tokens(lambda: length_mask(batch.lengths - (0 if last else 1), batch.ids.size(1)).flatten())
    hidden: Tensor = trunk(input_ids=batch.ids, use_cache=False).last_hidden_state
    return hidden


def unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Scatter values of the True positions, [N], to [B, T]; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def logprobs_of_states(
    model: PreTrainedModel, states: Tensor, batch: Batch, *, temperature: float, entropy: bool = False
) -> tuple[Tensor, ...]:
    """``(logp,)``, or with ``entropy`` ``(logp, entropy)``, all [B, T], of the emitted tokens given their states
    [N, D]."""
    mask = batch.mask
    figures = chunked_logprobs(states, batch.targets[mask], project(model), temperature=temperature, entropy=entropy)
    return tuple(unflatten(values, mask) for values in figures)


def completion_logprobs(
    model: PreTrainedModel, batch: Batch, *, temperature: float, entropy: bool = False
) -> tuple[Tensor, ...]:
    """``(logp,)``, or with ``entropy`` ``(logp, entropy)``, of every emitted token under
    softmax(logits / temperature), all [B, T], 0 where the mask is False."""
    states = completion_states(model.base_model, batch)
    return logprobs_of_states(model, states, batch, temperature=temperature, entropy=entropy)


class Critic(nn.Module):
    """V(s_t): a linear head, initialised to zero, on a trunk of its own or on the policy's states.

    A head that starts at zero makes the first advantages plain returns (arXiv 2403.17031, detail 11).
    """

    def __init__(self, policy: PreTrainedModel, *, own_trunk: bool) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy.base_model) if own_trunk else None
        width = policy.get_output_embeddings().weight.size(1)
        self.head = nn.Linear(width, 1, device=policy.device, dtype=policy.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, policy_states: Callable[[], Tensor]) -> Tensor:
        """Values [B, T] of the states before each emitted token, 0 where the mask is False.

        ``policy_states`` returns the policy's states [N, D]; only a critic without a trunk of its own calls it.
        """
        states = policy_states() if self.trunk is None else completion_states(self.trunk, batch)
        return unflatten(self.head(states).squeeze(-1).float(), batch.mask)


def save_critic(critic: Critic, path: Path) -> None:
    """Write a critic as safetensors: its head, and its trunk where that is its own."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in critic.state_dict().items()}, path)


def load_critic(path: Path | str, policy: PreTrainedModel) -> Critic:
    """The critic that was saved beside ``policy``. Raises :class:`ModelError` where it is not one of such a policy."""
    try:
        weights = load_file(path)
        critic = Critic(policy, own_trunk=any(name.startswith("trunk.") for name in weights))
        critic.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"no critic of this policy ({str(error).splitlines()[0]})", where=path) from error
    return critic.requires_grad_(False)


@torch.no_grad()
def replace_weights(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy ``weights``, the :func:`tether.models.trainable.trainable` of a model with the same parameters, into
    ``model``: all of them, or none and an error. Tensors that are the model's own already are not copied.
    """
    own, given = dict(model.named_parameters()), dict(weights)
    wrong = (trainable(model).keys() - given.keys()) | (given.keys() - own.keys())
    wrong |= {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape}
    if wrong:
        raise ValueError(f"the weights do not fit the model: {sorted(wrong)[:3]}")
    for name, tensor in given.items():
        if own[name].data_ptr() != tensor.data_ptr():
            own[name].copy_(tensor)
