"""LoRA: small additions to a frozen model are trained in its place, and added to it at the end (arXiv:2106.09685).

They are put into the model's own layers, so that it is saved and loaded as it is; the package peft is needed for it.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lmscripts.classification.classifier import in_body
from lmscripts.errors import UserError


def add_lora(model: PreTrainedModel, rank: int) -> list[str]:
    """Freeze the body and train low-rank additions to its layers (arXiv:2106.09685), and the head as a whole.

    Raises:
        UserError: the package peft is missing, or does not know the model's layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("--lora_rank needs the package peft: pip install peft") from None
    head = {name for name, _ in model.named_parameters() if not in_body(model, name)}
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0), model)
    except ValueError as error:
        raise UserError(f"peft cannot add to a {model.config.model_type}: {' '.join(str(error).split())}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.replace(".base_layer", "") in head)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [f"LoRA of rank {rank}: {trained:,} of {model.num_parameters():,} weights are trained"]


def merge_lora(model: PreTrainedModel) -> None:
    """Add the low-rank additions to the layers for good, so that the model is again as transformers knows it.

    Args:
        model: with additions or without; without any nothing happens.
    """
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.get_base_layer())
