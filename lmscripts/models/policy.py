"""A policy: a model that scores the candidates of a decision by all that was known.

One encoder reads everything as tokens, each of which sees all others: the set, the numbers, the events in their order,
and the candidates; a head scores each candidate by its last state. Which fields there are says a schema, see
`lmscripts.data.schema`, which stands in config.json: a saved folder needs nothing else.

    from lmscripts.models.policy import PolicyModel
    model = PolicyModel.from_pretrained("RUN/final")

B rows of T tokens and K candidates in layers H wide; a batch is made by `lmscripts.data.decision_rows`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from lmscripts.data.schema import Schema
from lmscripts.errors import UserError, shortened
from lmscripts.models.building import recompute_activations
from lmscripts.models.dropout import attend, install
from lmscripts.models.finding import find_saved, weight_files
from lmscripts.models.loading import read_config, some_of

PRESETS: dict[str, tuple[int, int, int]] = {  # width, heads, layers; a feed-forward network is four times as wide
    "tiny": (128, 2, 2),
    "mini": (256, 4, 4),
    "small": (512, 8, 4),
    "base": (768, 12, 12),
    "large": (1024, 16, 24),
}
ORIGINAL = {"norm": "post", "numbers": "channel", "positions": "sinusoidal"}  # the network of the older trainer
ACTIVATIONS = ("gelu", "relu")
_SEQUENCE_DROPOUT = 0.1  # of the older network's sequence, whatever its dropout is elsewhere
# What config.json says of a part and cannot be seen in its weights, or better than there.
_OF_ENCODER = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_act", "norm", "numbers",
    "positions"
)  # fmt: skip
_OF_DECODER = ("hidden_size", "final_intermediate_size", "hidden_act", "norm")


class PolicyConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What config.json says of a policy.

    Attributes:
        schema: as `Schema.as_json` gives it.
        final_intermediate_size: hidden width of the heads.
        attention_dropout: of attention weights, which then stand in memory.
        norm: "pre", before attention and feed-forward networks and at the end; or "post", behind them, where also
            the inner states of feed-forward networks are dropped, as in `torch.nn.TransformerEncoder`.
        numbers: "linear", a trained vector for each number, and another times its value; or "channel", the value in
            the first channel of a trained vector.
        positions: of the tokens of a sequence, "learned"; or "sinusoidal", with a dropout.
        value_head: whether there is a head for the value, at the VALUE token.
    """

    model_type = "decision-policy"

    schema: dict[str, Any] | None = None
    hidden_size: int = 768
    num_attention_heads: int = 12
    num_hidden_layers: int = 12
    intermediate_size: int = 3072
    final_intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.0
    norm: str = "pre"
    numbers: str = "linear"
    positions: str = "learned"
    value_head: bool = False
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02


@dataclass
class PolicyOutput(ModelOutput):
    """What a policy says.

    Attributes:
        logits: (B, K) float32, -inf where there is no candidate.
        value: (B,) float32; None without a value head, or where no place was asked for.
    """

    logits: Tensor | None = None
    value: Tensor | None = None


# ---- the network -------------------------------------------------------------------------------------------------


class PolicyLayer(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """Attention and a feed-forward network."""

    is_causal = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.num_heads, self.attention_dropout = config.num_attention_heads, config.attention_dropout
        self.norm_first = config.norm == "pre"
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(0.0 if self.norm_first else config.hidden_dropout)
        self.dropout1, self.dropout2 = nn.Dropout(config.hidden_dropout), nn.Dropout(config.hidden_dropout)

    def forward(self, states: Tensor, mask: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, T, H) for (B, T, H) states and a (B, 1, 1, T) mask, True where there is a token.

        With (B, P) places (B, P, H), the states there: others are not computed.
        """
        seen = self.norm1(states) if self.norm_first else states
        asking = seen
        if places is not None:
            asking, states = (_taken(each, places) for each in (seen, states))
        states = states + self.dropout1(self._attend(asking, seen, mask))
        if self.norm_first:
            return states + self._feed_forward(self.norm2(states))  # type: ignore[no-any-return]
        states = self.norm1(states)
        return self.norm2(states + self._feed_forward(states))  # type: ignore[no-any-return]

    def _feed_forward(self, states: Tensor) -> Tensor:
        inner = self.dropout(self.activation(self.linear1(states)))
        return self.dropout2(self.linear2(inner))  # type: ignore[no-any-return]

    def _attend(self, asking: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
        shape = (len(seen), -1, self.num_heads, seen.shape[-1] // self.num_heads)
        pair = self.key_value(seen).chunk(2, -1)
        query, key, value = (each.view(shape).transpose(1, 2) for each in (self.query(asking), *pair))
        p = self.attention_dropout if self.training else 0.0
        if p and hasattr(self, "of_weights"):  # drawn by rows, see `lmscripts.models.dropout.install`
            additive = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
            context = attend(self, query, key, value, additive, dropout=p)[0]
        else:
            context = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p).transpose(1, 2)
        return self.out(context.flatten(2))  # type: ignore[no-any-return]


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """(B, P, H) of (B, T, H) states those at (B, P) places."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))


class PolicyEncoder(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The tokens of a record, each seeing all others."""

    config_class = PolicyConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["PolicyLayer"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        schema, width, eps = Schema.from_json(config.schema), config.hidden_size, config.layer_norm_eps
        self.pad_id, self.num_numeric = schema.pad_id, schema.num_numeric
        self.embeddings = nn.Embedding(schema.num_ids, width, padding_idx=schema.pad_id)
        linear = config.numbers == "linear"
        if self.num_numeric:
            self.number_embeddings = nn.Parameter(torch.zeros(self.num_numeric, width if linear else width - 1))
        if self.num_numeric and linear:
            self.number_slopes = nn.Parameter(torch.zeros(self.num_numeric, width))
        if config.positions == "learned":
            longest = max((field.max_length for field in schema.of_kind("sequence")), default=0)
            self.positions = nn.Embedding(longest + 1, width, padding_idx=0)
        self.dropout = nn.Dropout(0.0 if config.positions == "learned" else _SEQUENCE_DROPOUT)
        self.layers = nn.ModuleList([PolicyLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(width, eps=eps) if config.norm == "pre" else nn.Identity()
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        _begin_linear(module)
        # The first norm sees the direction of their sum, which turns less and less by slopes as long as the vectors.
        for name, longer in {"number_embeddings": 3, "number_slopes": 1}.items() if module is self else ():
            if (vectors := getattr(self, name, None)) is not None:
                initialization.normal_(vectors, std=longer * self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        values: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        places: Tensor | None = None,
    ) -> Tensor:
        """(B, T, H) last states, or with (B, P) places (B, P, H), those there.

        Args:
            input_ids: (B, T) int64, rows of the table of the schema; number i is its size + i.
            values: (B, T) scaled numbers, 0 at other tokens.
            position_ids: (B, T) int64, 1 + place within its sequence, 0 at tokens of no sequence.
            attention_mask: (B, T), 0 at padding, which no token sees.
            places: (B, P) int64 positions.
        """
        states, mask = self.embed(input_ids, values, position_ids), attention_mask[:, None, None, :] != 0
        for layer in self.layers[:-1]:
            states = layer(states, mask)
        return self.norm(self.layers[-1](states, mask, places))  # type: ignore[no-any-return]

    def embed(self, input_ids: Tensor, values: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, H) states that the first layer sees."""
        # Numbers have no row of the table: padding's, the last one, stands there as 0.
        states: Tensor = self.embeddings(input_ids.clamp(max=self.pad_id))
        if self.num_numeric:
            # A value must not lose its digits before it lies in many channels.
            with torch.autocast(states.device.type, enabled=False):
                states = states + self._numbers(input_ids, values.to(states.dtype))
        if self.config.positions == "learned":
            return states + self.positions(position_ids)  # type: ignore[no-any-return]
        in_sequence = position_ids[..., None] > 0
        with_places = self.dropout(states + _sinusoids(position_ids - 1, states.shape[-1]).to(states.dtype))
        return torch.where(in_sequence, with_places, states)

    def _numbers(self, input_ids: Tensor, values: Tensor) -> Tensor:
        """(B, T, H) at tokens of numbers what stands for them, 0 elsewhere."""
        ids = self.pad_id + 1 + torch.arange(self.num_numeric, device=input_ids.device)
        which, values = (input_ids[..., None] == ids).to(values.dtype), values[..., None]
        if self.config.numbers == "channel":
            return which @ pad(self.number_embeddings, (1, 0)) + pad(values, (0, self.config.hidden_size - 1))
        return torch.cat([which, which * values], -1) @ torch.cat([self.number_embeddings, self.number_slopes])


def _sinusoids(places: Tensor, width: int) -> Tensor:
    """(..., width) of places: sines and cosines in turn, of falling frequency (arXiv:1706.03762, section 3.5)."""
    frequencies = torch.exp(torch.arange(0, width, 2, device=places.device) * (-math.log(10000.0) / width))
    angles = places[..., None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :width]


def _begin_linear(module: nn.Module) -> None:
    """Weights that keep the size of what goes in, whatever the width: 0.02 would learn late where that is 128."""
    if isinstance(module, nn.Linear):
        initialization.normal_(module.weight, std=module.in_features**-0.5)


class PolicyHead(nn.Module):
    """One number for each state."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.hidden_size, config.final_intermediate_size)
        self.output = nn.Linear(config.final_intermediate_size, 1)
        self.activation, self.dropout = ACT2FN[config.hidden_act], nn.Dropout(config.hidden_dropout)
        self.drop_first = config.norm == "post"

    def forward(self, states: Tensor) -> Tensor:
        """(B, P) float32 for (B, P, H)."""
        states = self.hidden(states)
        states = self.activation(self.dropout(states)) if self.drop_first else self.dropout(self.activation(states))
        # As a product with one column, some CPUs would give it other bits at another place in memory.
        return (states * self.output.weight[0]).sum(-1).float() + self.output.bias.float()


class PolicyModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A policy: the encoder, `decoder`, which scores candidates, and with a value head `value_decoder`."""

    config_class = PolicyConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["PolicyLayer"]
    frozen = False  # see `freeze_encoder`

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = PolicyEncoder(config)
        self.decoder = PolicyHead(config)
        self.value_decoder = PolicyHead(config) if config.value_head else None
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        _begin_linear(module)

    def get_input_embeddings(self) -> nn.Module:
        """The table of all ids."""
        return self.encoder.embeddings

    def train(self, mode: bool = True) -> PolicyModel:
        """As of every module; an encoder that is frozen drops nothing."""
        super().train(mode)
        if self.frozen:
            self.encoder.train(False)
        return self

    def forward(
        self,
        input_ids: Tensor,
        values: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        candidates: Tensor,
        candidate_mask: Tensor,
        value_places: Tensor | None = None,
    ) -> PolicyOutput:
        """Scores of the candidates of a batch.

        Args:
            input_ids: (B, T), as all up to the mask see `PolicyEncoder.forward`.
            values: (B, T).
            position_ids: (B, T).
            attention_mask: (B, T).
            candidates: (B, K) int64 places of the candidates in their row; any place where there is none.
            candidate_mask: (B, K) bool, whether there is one.
            value_places: (B,) int64 place of the VALUE token, where the value is wanted.
        """
        with_value, places = self.value_decoder is not None and value_places is not None, candidates
        if with_value:  # first, so that dropout by place does not depend on the number of candidates
            places = torch.cat([value_places[:, None], candidates], 1)  # type: ignore[index]
        states = self.encoder(input_ids, values, position_ids, attention_mask, places)
        logits = self.decoder(states[:, int(with_value) :]).masked_fill(~candidate_mask, -math.inf)
        return PolicyOutput(logits, self.value_decoder(states[:, :1])[:, 0] if with_value else None)  # type: ignore[misc]


AutoConfig.register(PolicyConfig.model_type, PolicyConfig, exist_ok=True)
AutoModel.register(PolicyConfig, PolicyModel, exist_ok=True)


def flops(model: Any, sequence_length: int, slots: int) -> float:
    """Operations of a training step per position, of rows with so many candidates; see `models.encoder.flops`.

    The last layer computes no more than keys and values at tokens that are no candidates.
    """
    config, share = model.config, slots / sequence_length
    width, layers = config.hidden_size, config.num_hidden_layers
    layer = 4 * width**2 + 2 * width * config.intermediate_size
    weights = layers * layer - (1 - share) * (layer - 2 * width**2) + share * config.final_intermediate_size * width
    return float(6 * weights + 12 * width * sequence_length * (layers - 1 + share))


# ---- new models --------------------------------------------------------------------------------------------------


def sizes(
    preset: str | None,
    dimension: int | None = None,
    num_heads: int | None = None,
    num_layers: int | None = None,
    dim_feedforward: int | None = None,
    dim_final_feedforward: int | None = None,
) -> dict[str, int]:
    """Sizes of a configuration: those of the preset, where no other is given.

    Raises:
        UserError: there is no such preset, a size is missing, or the heads do not divide the width.
    """
    if preset is not None and preset not in PRESETS:
        raise UserError(f"there is no --model-preset {preset}: choose among {', '.join(PRESETS)}")
    given = {"--dimension": dimension, "--num-heads": num_heads, "--num-layers": num_layers}
    settled = {name: value or usual for (name, value), usual in zip(given.items(), PRESETS.get(preset or "", (0,) * 3))}
    if missing := [name for name, value in settled.items() if not value]:
        raise UserError(f"without --model-preset {', '.join(missing)} must be given; presets: {', '.join(PRESETS)}")
    width, heads, layers = settled.values()
    if width % heads:
        raise UserError(f"--dimension {width} cannot be divided among --num-heads {heads}: take a multiple of {heads}")
    inner = dim_feedforward or 4 * width
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "final_intermediate_size": dim_final_feedforward or inner,
    }


def build(
    schema: Schema,
    sizes: Mapping[str, int],
    *,
    seed: int,
    original: bool = False,
    activation_function: str = "gelu",
    dropout: float = 0.1,
    attention_dropout: float | None = None,
    value_head: bool = False,
    recompute: bool = False,
) -> PolicyModel:
    """A new policy in training mode and float32, whose dropout is drawn by rows (`lmscripts.models.dropout`).

    Args:
        schema: of the records.
        sizes: from `sizes`, for the configuration.
        seed: decides the new weights.
        original: the network of the older trainer, and how it begins: torch's initial weights, the same in all layers.
        activation_function: one of `ACTIVATIONS`.
        dropout: of hidden states.
        attention_dropout: of attention weights; None for the usual one, of the original's `dropout`, else 0.
        value_head: add a head for the value.
        recompute: activations are computed again for the gradient instead of being kept.

    Raises:
        UserError: the schema has no value, and a head for it is wanted.
    """
    if value_head and schema.value is None:
        raise UserError(f"the schema {schema.name} does not say which extra number is the value: give it a value")
    of_weights = (dropout if original else 0.0) if attention_dropout is None else attention_dropout
    said: dict[str, Any] = {"schema": schema.as_json(), **sizes, "value_head": value_head}
    said |= {"hidden_act": activation_function, "hidden_dropout": dropout, "attention_dropout": of_weights}
    said |= ORIGINAL if original else {}
    torch.manual_seed(seed)
    model = PolicyModel(PolicyConfig(**said))
    if original:
        _begin_as_the_original(model)
    install([model], of_weights > 0)
    if recompute:
        recompute_activations({"": model})
    return model.train()


@torch.no_grad()
def _begin_as_the_original(model: PolicyModel) -> None:
    """Initial weights as torch's modules have them; layers begin as copies of the first."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.reset_parameters()
    first: Any = model.encoder.layers[0]
    width = model.config.hidden_size
    together = nn.init.xavier_uniform_(torch.empty(3 * width, width))
    first.query.weight.copy_(together[:width])
    first.key_value.weight.copy_(together[width:])
    for linear in (first.query, first.key_value, first.out):
        linear.bias.zero_()
    for layer in model.encoder.layers:
        layer.load_state_dict(first.state_dict())
    if model.encoder.num_numeric:
        model.encoder.number_embeddings.normal_()


def freeze_encoder(model: PolicyModel) -> None:
    """Train the heads alone: no weight of the encoder gets a gradient or is given to an optimizer, none is dropped."""
    model.frozen = True
    model.encoder.requires_grad_(False)
    model.train(model.training)


# ---- saved models, and parts of them -----------------------------------------------------------------------------


def load_parts(model: PolicyModel, encoder: str | None = None, decoder: str | None = None) -> list[str]:
    """Begin with the encoder or the heads of other models; what was loaded, in sentences.

    Each comes from a folder (a model, a snapshot or a run), a file of weights in safetensors, or a .pth of the older
    trainer, whose encoder fits the older network alone.

    Raises:
        UserError: it cannot be read, or does not fill the part, or has more than the part.
    """
    said = []
    for part, path in (("encoder", encoder), ("decoder", decoder)):
        if path is not None:
            said += _load_part(model, part, Path(path).expanduser())
    return said


def _load_part(model: PolicyModel, part: str, path: Path) -> list[str]:
    place, said = find_saved(path) if path.is_dir() else (path, [])
    if place.is_dir():
        _check_config(model.config, read_config(place, PolicyModel), part, place)
    saved, notices = _own_names(_read_tensors(place), model, part, place)
    said += [f"the {part} is that of {place}", *notices]
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_prefixes(part))}
    missing, unexpected = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    new = [name for name in missing if name.startswith(("value_decoder.", "encoder.number_embeddings"))]
    if new[:1] == missing[:1] and len(new) == len(missing):
        missing = []
    if missing or unexpected:
        lacks = f"lacks {len(missing)} tensors of it ({some_of(missing)})" if missing else "has them all"
        more = f" and has {len(unexpected)} more ({some_of(unexpected)})" if unexpected else ""
        raise UserError(f"{place} is no {part} for this model, of {len(own)} tensors: it {lacks}{more}")
    for name, tensor in saved.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            raise UserError(f"{place} is no {part} for this model: {name} has the shape {shapes}")
    model.load_state_dict(saved, strict=False)
    return [*said, f"not in {place}, and new: {some_of(new)}"] if new else said


def _prefixes(part: str) -> tuple[str, ...]:
    return ("encoder.",) if part == "encoder" else ("decoder.", "value_decoder.")


def _check_config(ours: Any, theirs: Any, part: str, place: Path) -> None:
    """Refuse a part that computes something else with weights of the same shapes."""
    names = _OF_ENCODER if part == "encoder" else _OF_DECODER
    differing = [f"{name} is {getattr(theirs, name)}, not {getattr(ours, name)}" for name in names
                 if getattr(theirs, name) != getattr(ours, name)]  # fmt: skip
    old, new = Schema.from_json(theirs.schema), Schema.from_json(ours.schema)
    if part == "encoder" and (old.layout(), old.scales) != (new.layout(), new.scales):
        differing.append(f"its schema {old.name} has other fields, sizes or scales than {new.name}")
    if differing:
        raise UserError(f"the {part} of {place} does not fit this model: {'; '.join(differing)}")


def _read_tensors(place: Path) -> dict[str, Tensor]:
    """Tensors by name, of a folder's weights or of a file."""
    files = weight_files(place) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{place} holds no weights")
    found: dict[str, Any] = {}
    for file in files:
        try:
            is_safe = file.suffix == ".safetensors"
            found |= load_file(file) if is_safe else torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{file} does not exist (seen from {Path.cwd()})") from None
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
            raise UserError(f"{file} cannot be read as weights ({shortened(error)})") from error
    if not found or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{place} is no table of weights by their names")
    return found


def _own_names(
    saved: dict[str, Tensor], model: PolicyModel, part: str, place: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a part by the names that the model has for them, and sentences."""
    if any("in_proj_weight" in name for name in saved):
        if part == "decoder":
            raise UserError(f"{place} is an encoder of the older trainer, and a decoder is asked for")
        return _encoder_of_the_original(saved, model, place)
    if any(name.startswith(("encoder.", "decoder.")) for name in saved):
        kept = {name: tensor for name, tensor in saved.items() if name.startswith(_prefixes(part))}
        without_value = model.value_decoder is None
        return {n: t for n, t in kept.items() if not (without_value and n.startswith("value_decoder."))}, []
    if part == "decoder" and [tensor.ndim for tensor in saved.values()] == [2, 1, 2, 1]:  # of the older trainer
        return dict(zip((f"decoder.{name}" for name in model.decoder.state_dict()), saved.values())), []
    return {f"{part}.{name}": tensor for name, tensor in saved.items()}, []


# ---- the older trainer's files: of torch.nn.TransformerEncoder, and an embedding for each field ------------------

_TABLES = ("sparse_embedding", "progression_embedding", "candidates_embedding")
_SAME = ("linear1", "linear2", "norm1", "norm2")


def _encoder_of_the_original(
    saved: dict[str, Tensor], model: PolicyModel, place: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Its tensors by our names. The vectors of its numbers it never saved; later versions did."""
    config = model.config
    if any(getattr(config, name) != value for name, value in ORIGINAL.items()):
        raise UserError(f"{place} is an encoder of the older trainer, which fits the network of --original alone")
    tables = [t for kind in _TABLES for n, t in saved.items() if n.startswith(kind) and n.endswith("weight")]
    found = {"encoder.embeddings.weight": torch.cat(tables)} if tables else {}
    for name, tensor in saved.items():
        if name == "numeric_embedding":
            found["encoder.number_embeddings"] = tensor
        elif name.startswith("encoder.layers."):
            before, _, last = name.partition(".self_attn.")
            if last.startswith("in_proj_"):
                kind, width = last.removeprefix("in_proj_"), len(tensor) // 3
                found[f"{before}.query.{kind}"], found[f"{before}.key_value.{kind}"] = tensor[:width], tensor[width:]
            else:
                found[f"{before}.{last.replace('out_proj', 'out')}" if last else name] = tensor
        elif not name.startswith(_TABLES):  # whose buffers are the sines and cosines
            found[name] = tensor
    lost = "its numbers' vectors are new: the older trainer neither trained nor saved them"
    return found, [] if "numeric_embedding" in saved else [lost]


def to_original(model: PolicyModel) -> dict[str, Tensor]:
    """The layers of an encoder by the names of `torch.nn.TransformerEncoder`."""
    layers, found = model.encoder.layers.state_dict(), {}
    for name, tensor in layers.items():
        number, module, kind = name.split(".")
        if module == "query":
            both = layers[f"{number}.key_value.{kind}"]
            found[f"layers.{number}.self_attn.in_proj_{kind}"] = torch.cat([tensor, both])
        elif module == "out":
            found[f"layers.{number}.self_attn.out_proj.{kind}"] = tensor
        elif module in _SAME:
            found[f"layers.{name}"] = tensor
    return found
