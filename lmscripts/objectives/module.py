"""What is trained: the models of an objective in one module, of which a batch gives sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers import PreTrainedModel

from lmscripts.data.packing import Rows
from lmscripts.data.steps import Made, cut_rows
from lmscripts.models.attention import AttentionPath
from lmscripts.models.dropout import Draws

Batch = dict[str, Tensor]
Sums = Mapping[str, float]
_FLAT = ("slots", "labels", "weights", "draws", "pair_labels", "pair_weights")
_PLACES = ("slots", "pair_places")


class Objective(nn.Module):
    """The models of an objective under the names of its PARTS, and what computes its loss.

    `kind` is the module of the objective, `family` that of the family; `weights` are those of the terms of the loss;
    `draws` say by what dropout is drawn.
    """

    def __init__(
        self, kind: Any, family: Any, models: Mapping[str, PreTrainedModel], attention: AttentionPath, settings: Any
    ) -> None:
        super().__init__()
        for subfolder, name in kind.PARTS.items():
            if subfolder in models:
                setattr(self, name, models[subfolder])
        self.kind, self.family, self.settings = kind, family, settings
        self.attention: AttentionPath = attention
        self.weights: dict[str, float] = kind.weights(settings)
        self.draws: Any = next((model.draws for model in models.values() if hasattr(model, "draws")), Draws())
        self.is_compiled = False
        self._flops: dict[tuple[int, int], float] = {}
        kind.prepare(self)

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """What is saved, by subfolder, the model's own folder first."""
        parts = sorted(self.kind.PARTS.items())
        return {subfolder: getattr(self, name) for subfolder, name in parts if hasattr(self, name)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the targets of a batch, see the objective."""
        self.draws.keys, self.draws.length = batch.get("row_keys"), batch["input_ids"].shape[1]
        self.draws.places = None
        return self.kind.forward(self, batch)  # type: ignore[no-any-return]

    def compile(self, *arguments: Any, **settings: Any) -> None:
        """As of any module."""
        self.is_compiled = True
        super().compile(*arguments, **settings)

    def loss(self, sums: Mapping[str, Tensor], targets: Sums) -> Tensor:
        """() the weighted sum of the terms of a batch, each divided by its targets in all of the optimizer step."""
        terms = self.weights.items()
        return torch.stack([sums[term] * (weight / (targets[term] or 1.0)) for term, weight in terms]).sum()

    def metrics(self, sums: Sums, counts: Sums) -> dict[str, float]:
        """Named numbers from sums of `forward` and counts of targets."""
        return self.kind.metrics(self, sums, counts)  # type: ignore[no-any-return]

    def flops_per_position(self, sequence_length: int, slots: int) -> float:
        """Operations of a training step per position."""
        if (shape := (sequence_length, slots)) not in self._flops:
            bodies = {id(model.base_model): model for model in self.models.values()}  # two heads may share one
            self._flops[shape] = float(sum(self.family.flops(model, *shape) for model in bodies.values()))
        return self._flops[shape]

    def kept_bytes(self, batch: Batch, dtype: torch.dtype) -> int:
        """Bytes that a training forward pass of a batch keeps for the gradient, found without computing anything.

        Tensors stand for their shapes alone (`FakeTensorMode`), in autocast to `dtype` unless it is float32.
        """
        kept: dict[Any, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, saved_tensors_hooks(keep, lambda tensor: tensor), half:
            whose = [(prefix, module.named_parameters(recurse=False)) for prefix, module in self.named_modules()]
            shaped: dict[str, Tensor] = {
                f"{prefix}.{name}".lstrip("."): mode.from_tensor(p) for prefix, parts in whose for name, p in parts
            }
            own = {p.untyped_storage()._cdata for p in shaped.values()}
            asked = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
            functional_call(self, shaped, asked, tie_weights=False)  # each is there under all of its names
        return sum(kept.values())

    def attention_inputs(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """What keeps the documents of a batch apart in a model."""
        device = batch["input_ids"].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        return self.family.attention(model, self.attention, batch, dtype)  # type: ignore[no-any-return]

    def logits_at_slots(self, model: PreTrainedModel, batch: Batch, attention: dict[str, Any]) -> Tensor:
        """(B * K, V) fp32 logits at the prediction slots."""
        hidden = self.family.encode(model, batch["input_ids"], batch["position_ids"], attention, batch["slots"])
        return self.family.predict(model, hidden).float()  # type: ignore[no-any-return]

    def logits_of(self, model: PreTrainedModel, ids: Tensor, places: Sequence[int]) -> Tensor:
        """(K, V) fp32 logits of a model at places of a row (1, T) of ids that is one document."""
        at, positions = torch.tensor(places, device=ids.device), torch.arange(ids.shape[1], device=ids.device)[None]
        batch = {"input_ids": ids, "position_ids": positions, "slots": at}
        batch["segment_ends"] = torch.tensor([0, ids.shape[1]], dtype=torch.int32, device=ids.device)
        return self.logits_at_slots(model, batch, self.attention_inputs(model, batch))

    def answers(self, prompts: Mapping[str, list[int]], tokenizer: Any, seed: int) -> dict[str, list[str]]:
        """What the models, in any mode, make of prompts: lines for each; torch's random numbers are left alone."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return {text: self.kind.answers(self, ids, tokenizer, seed) for text, ids in prompts.items()}
        finally:
            self.train(was_training)


def cut(
    laid_out: Rows,
    sizes: list[int],
    arrays: dict[str, NDArray[Any]],
    targets: dict[str, NDArray[Any]],
    several: NDArray[np.bool_],
    usual: float | None,
) -> Made:
    """Laid out rows as batches with their counts, see `lmscripts.data.steps.cut_rows`.

    Arrays, by name, are (N, ...) for N rows; in a batch, places of a row are flat ones, and what they have is flat.
    Targets are (N, ...) what is counted. `usual` segments of a row are given where batches need "segment_ends".
    """
    in_batch = np.concatenate([np.arange(size) for size in sizes])[:, None] * laid_out.ids.shape[1]
    arrays = arrays | {name: arrays[name] + in_batch for name in _PLACES if name in arrays}
    made, begin = [], 0
    for batch in cut_rows(laid_out, sizes, arrays, several, usual):
        part = slice(begin, begin + len(batch["input_ids"]))
        begin = part.stop
        batch |= {name: batch[name].reshape(-1) for name in _FLAT if name in batch}
        made.append((batch, {name: float(each[part].sum()) for name, each in targets.items()}))
    return made
