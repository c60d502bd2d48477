"""LoRA: small additions to a frozen model are trained in its place, and added to it at the end (arXiv:2106.09685).

They are put into the model's own layers, so that it is saved and loaded as it is; the package peft is needed for it.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmscripts.errors import UserError
from lmscripts.models.classifier import in_body


def add_lora(model: PreTrainedModel, rank: int) -> list[str]:
    """Freeze the body and train low-rank additions to its layers (arXiv:2106.09685), and the head as a whole.

    The layers are those that peft knows for the type of the model; of a type that it does not know, all linear ones.
    Without the package, or layers that it can add to, there is a UserError.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
    except ImportError:
        raise UserError("--lora_rank needs the package peft: pip install peft") from None
    head = {name for name, _ in model.named_parameters() if not in_body(model, name)}
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    known = model.config.model_type in KNOWN
    layers = None if known else [name for name in linear if in_body(model, f"{name}.weight")]
    try:
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers)
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise UserError(f"peft cannot add to a {model.config.model_type}: {' '.join(str(error).split())}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.replace(".base_layer", "") in head)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = f" in all {len(layers)} linear layers of the body" if layers else ""
    return [f"LoRA of rank {rank}{where}: {trained:,} of {model.num_parameters():,} weights are trained"]


def merge_lora(model: PreTrainedModel) -> None:
    """Add the low-rank additions, if there are any, to the layers, so that the model is as transformers knows it."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.get_base_layer())
