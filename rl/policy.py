"""The policy: a vision-language model that scores rows, `[rows] -> log-probs of every answer token`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, PreTrainedModel

from rl.batch import Rows
from rl.packing import pack, tree_mask
from rollout.hf_engine import saved_weights

PROJECTION_CHUNK = 1024  # scored tokens projected to the vocabulary at a time: bounds the logits to [1024, vocabulary]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) on the named linear layers; everything else is frozen."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Which model to train, and which of its weights.

    `path` is a folder or a hub id. `freeze` names modules by the start of their name ("model.visual").
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["sdpa", "eager"] = "sdpa"
    freeze: tuple[str, ...] = ()
    lora: Lora | None = None
    gradient_checkpointing: bool = False

    def load(self) -> PreTrainedModel:
        """The plain transformers model: safetensors only, no code from the hub."""
        model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
            self.path,
            revision=self.revision,
            dtype=getattr(torch, self.dtype),
            attn_implementation=self.attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
        return model.eval()


class Policy(nn.Module):
    """A vision-language model as the learner sees it: `policy(rows)` gives the log-probs [N, L] of every answer token.

    The distribution is the one the engine samples from: logits / temperature, and placeholder tokens of images can
    never be an answer.
    """

    def __init__(self, model: PreTrainedModel, config: Model, banned_token_ids: Collection[int]) -> None:
        super().__init__()
        self.saved_names = names_when_saved(model)  # before adapters rename and hide layers
        freeze(model, config.freeze)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        self.adapted = with_lora(model, config.lora, config.freeze) if config.lora else None
        self.model = model
        self.train()  # a model without dropout computes the same in both modes; checkpointing works in this one only
        self.register_buffer(
            "banned_token_ids", torch.tensor(sorted(banned_token_ids), dtype=torch.long), persistent=False
        )

    def forward(self, rows: Rows) -> Tensor:
        """Log-probs of every answer token, float32 [N, L], zero beyond an answer's end."""
        device = self.model.device
        packed = pack(rows, [self.context_positions(c, v) for c, v in zip(rows.context_ids, rows.vision, strict=True)])
        hidden = self.model.base_model(
            input_ids=packed.token_ids.to(device),
            attention_mask=additive(tree_mask(packed.segment.to(device), packed.parent.to(device)), self.model.dtype),
            position_ids=packed.position_ids.squeeze(0).to(device),
            use_cache=False,
            **joined(rows.vision, device, self.model.dtype),
        ).last_hidden_state[0]  # [T, hidden]
        scored = self.project(hidden[packed.scored_at.to(device)], packed.targets.to(device), rows.temperature)
        lengths = rows.lengths
        table = scored.new_zeros(len(lengths), int(lengths.max()))
        branch, place = packed.table_cell
        return table.index_put((branch.to(device), place.to(device)), scored)

    def project(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:  # [S, hidden], [S] -> [S]
        """Log-probs of `targets`, a chunk of positions at a time; the backward pass recomputes the logits."""

        def chunk_logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = self.model.get_output_embeddings()(hidden).float() / temperature
            logits = logits.index_fill(-1, self.banned_token_ids, -torch.inf)
            return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)

        chunks = zip(hidden.split(PROJECTION_CHUNK), targets.split(PROJECTION_CHUNK), strict=True)
        return torch.cat([checkpoint(chunk_logprobs, h, t, use_reentrant=False) for h, t in chunks])

    def context_positions(self, context_ids: Tensor, vision: Mapping[str, Tensor]) -> Tensor:
        """Positions [axes, L] of a context: the model's own M-RoPE grid where it has one, else 0, 1, 2, ..."""
        base = self.model.base_model
        if not hasattr(base, "get_rope_index"):
            return torch.arange(len(context_ids))[None]
        if not vision:
            return torch.arange(len(context_ids)).expand(3, -1)
        accepted = inspect.signature(base.get_rope_index).parameters
        token_types = (context_ids == self.model.config.image_token_id).int()
        positions, _ = base.get_rope_index(
            input_ids=context_ids[None],
            mm_token_type_ids=token_types[None],
            **{name: tensor for name, tensor in vision.items() if name in accepted},
        )
        return positions[:, 0]

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside, a LoRA policy is the model it started from."""
        return self.adapted.disable_adapter() if self.adapted is not None else nullcontext()

    def plain_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight under the name transformers saves it, adapters merged in, one at a time."""
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            yield from self.plain_weight(name, tensor)

    def plain_weight(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """One entry of the model's state as it is saved; adapters themselves are not."""
        if ".lora_" in name:
            return []
        whole = tensor.detach()
        if (layer := self.adapted_layer(name)) is not None:
            with torch.no_grad():
                whole = (whole.float() + layer.get_delta_weight("default").float()).to(whole.dtype)
        return [(self.saved_names[name.replace(".base_layer", "")], whole)]

    def needed_for(self, name: str, tensor: Tensor) -> list[Tensor]:
        """The parameters that `plain_weight` reads, which ZeRO-3 must gather first."""
        layer = self.adapted_layer(name)
        return [tensor] if layer is None else list(layer.parameters())

    def adapted_layer(self, name: str) -> LoraLayer | None:
        """The layer whose weight `name` an adapter changes; None for every other entry of the model's state."""
        if not name.endswith(".base_layer.weight"):
            return None
        layer = self.model.get_submodule(name.removesuffix(".base_layer.weight"))
        assert isinstance(layer, LoraLayer)
        return layer


def names_when_saved(model: PreTrainedModel) -> dict[str, str]:
    """The name of every weight in the module -> its name in a checkpoint, which engines load by."""
    names: dict[int, list[str]] = {}
    for saved_name, tensor in saved_weights(model).items():
        names.setdefault(tensor.data_ptr(), []).append(saved_name)
    own = {name: names[tensor.data_ptr()] for name, tensor in model.state_dict().items()}
    return {
        name: shared.pop() if len(shared) > 1 else shared[0] for name, shared in own.items()
    }  # tied weights have two


def freeze(model: PreTrainedModel, prefixes: Sequence[str]) -> None:
    """Stop the gradient of weights whose name starts with one of `prefixes`; a prefix without weights is an error."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            modules = sorted({".".join(name.split(".")[:2]) for name in names})
            raise ValueError(f"model.freeze names {prefix!r}, but no weight starts with it. Modules: {modules}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(prefixes)))


def with_lora(model: PreTrainedModel, lora: Lora, frozen: Sequence[str]) -> PeftModel:
    """Put adapters into the linear layers of `model` outside its frozen modules, in place; only they get a gradient."""
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            exclude_modules=rf"({'|'.join(map(re.escape, frozen))})\b.*" if frozen else None,
        ),
    )


def joined(vision: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Vision tensors of several contexts as one: every model family stacks its images along the first axis."""
    names = list(dict.fromkeys(name for tensors in vision for name in tensors))
    stacked = {name: torch.cat([tensors[name] for tensors in vision if name in tensors]) for name in names}
    return {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in stacked.items()}


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask [T, T] as what attention adds to its scores, [1, 1, T, T]: 0 where visible, else very negative."""
    scores = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return scores.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]
