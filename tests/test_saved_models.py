"""Models to evaluate: what is taken, what is refused, and what was never trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lmscripts.checkpoint import write_checksums
from lmscripts.errors import UserError
from lmscripts.saved_models import find_model, open_model, signs_of_no_training

VOCABULARY = 64
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 32}


def fresh(family, **more):
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=3))
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "bert": (BertConfig, BertForMaskedLM),
        "roberta": (RobertaConfig, RobertaForMaskedLM),
        "discriminator": (ElectraConfig, ElectraForPreTraining),
        "generator": (ElectraConfig, ElectraForMaskedLM),
        "modernbert": (ModernBertConfig, ModernBertForMaskedLM),
    }
    configure, architecture = classes[family]
    return architecture(configure(**SIZES | more))


def perturbed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def write_tokenizer(folder, size=VOCABULARY):
    words = {f"w{n}": n for n in range(size)}
    special = {"pad_token": "w0", "cls_token": "w2", "sep_token": "w3", "mask_token": "w4", "unk_token": "w1"}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def write_model(folder, family="bert", tokenizer=True, model=None):
    (model or perturbed(fresh(family))).save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_checkpoint(run, step, family="bert", model=None, origin=""):
    folder = write_model(run / f"checkpoint-{step}", family, model=model)
    state = {"progress": {"step": step, "origin": origin}}
    (folder / "training_state.json").write_text(json.dumps(state), encoding="utf-8")
    write_checksums(folder)
    return folder


def damage(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def names_in(folder):
    return sorted(path.name for path in folder.rglob("*"))


# ---- what is taken ----


def test_of_a_run_the_final_model_is_taken_else_the_newest_whole_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 5)
    damage(write_checkpoint(tmp_path, 10))
    before = names_in(tmp_path)
    found, notices = find_model(str(tmp_path))
    assert found == tmp_path / "checkpoint-5"
    assert "checkpoint-10 is damaged" in " ".join(notices)
    assert notices[-1] == f"{tmp_path} is the folder of a run: checkpoint-5 is taken"
    assert names_in(tmp_path) == before  # the run may be going on
    saved = open_model(str(tmp_path))
    assert (saved.step, saved.name) == (5, f"{tmp_path} (checkpoint-5)")
    write_model(tmp_path / "final")
    found, notices = find_model(str(tmp_path))
    assert found == tmp_path / "final"
    assert notices == [f"{tmp_path} is the folder of a run: final is taken"]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    damage(write_checkpoint(tmp_path, 10))
    with pytest.raises(UserError, match=r"checkpoint-10 is damaged: model\.safetensors has another content"):
        open_model(str(tmp_path / "checkpoint-10"))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        open_model(str(tmp_path))
    (tmp_path / "checkpoint-10" / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"damaged: checksums\.json is missing"):
        open_model(str(tmp_path / "checkpoint-10"))


@pytest.mark.parametrize(
    ("family", "kind", "longest"),
    [
        ("bert", "masked", 32),
        ("roberta", "masked", 31),
        ("gpt2", "causal", 32),
        ("llama", "causal", 32),
        ("generator", "masked", 32),
    ],
)
def test_each_family_is_known_by_its_configuration(tmp_path, family, kind, longest):
    saved = open_model(str(write_model(tmp_path / "model", family)))
    assert (saved.kind, saved.longest, saved.untrained) == (kind, longest, [])
    assert list(saved.weights) == ["model.safetensors"]
    assert not saved.models[""].training


def test_weights_in_several_files_are_all_hashed(tmp_path):
    perturbed(fresh("gpt2")).save_pretrained(tmp_path, max_shard_size="20KB")
    write_tokenizer(tmp_path)
    parts = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert sorted(open_model(str(tmp_path)).weights) == parts
    (tmp_path / parts[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {parts[1]}, one of the {len(parts)} files"):
        open_model(str(tmp_path))


def test_electra_needs_both_halves(tmp_path):
    folder = write_model(tmp_path / "discriminator", "discriminator")
    with pytest.raises(UserError, match=r"without its generator.*give --generator_dir"):
        open_model(str(folder))
    generator = write_model(tmp_path / "elsewhere", "generator", tokenizer=False)
    assert open_model(str(folder), str(generator)).kind == "electra"
    shutil.copytree(generator, folder / "generator")
    saved = open_model(str(folder))
    assert set(saved.models) == {"", "generator"}
    assert set(saved.weights) == {"model.safetensors", str(Path("generator", "model.safetensors"))}
    write_model(folder / "generator", tokenizer=False, model=perturbed(fresh("generator", vocab_size=80)))
    with pytest.raises(UserError, match="the generator has 80 entries in its vocabulary, the discriminator 64"):
        open_model(str(folder))
    with pytest.raises(UserError, match=r"--generator_dir .* has no effect"):
        open_model(str(write_model(tmp_path / "bert")), str(generator))


# ---- what is refused ----


def test_a_folder_without_weights(tmp_path):
    """transformers would be asked for a random model, which is what an older system scored."""
    folder = write_model(tmp_path / "model", "gpt2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights .* would be random"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("bert", "cls.predictions.transform.dense.weight"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight"),
        ("discriminator", "discriminator_predictions.dense.bias"),
        ("llama", "model.norm.weight"),
    ],
)
def test_weights_that_lack_a_tensor(tmp_path, family, lost):
    folder = write_model(tmp_path / "model", family)
    if family == "discriminator":
        write_model(folder / "generator", "generator", tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks .*{lost}.*would be random"):
        open_model(str(folder))


def test_weights_of_an_encoder_without_a_head(tmp_path):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match="lacks the head of BertForMaskedLM"):
        open_model(str(tmp_path))


def test_tokenizers(tmp_path):
    folder = write_model(tmp_path / "model", tokenizer=False)
    with pytest.raises(UserError, match="has no tokenizer beside the model: give --tokenizer_dir"):
        open_model(str(folder))
    write_tokenizer(tmp_path / "right")
    write_tokenizer(tmp_path / "large", VOCABULARY + 1)
    assert open_model(str(folder), tokenizer_dir=str(tmp_path / "right")).encoder.vocab_size == VOCABULARY
    with pytest.raises(UserError, match=r"ids up to 64, but the vocabulary of .* has 64 entries"):
        open_model(str(folder), tokenizer_dir=str(tmp_path / "large"))
    write_tokenizer(folder)
    with pytest.raises(UserError, match=r"--tokenizer_dir .* has no effect"):
        open_model(str(folder), tokenizer_dir=str(tmp_path / "right"))


def test_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"holds no model: it has no config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        open_model(str(tmp_path))
    with pytest.raises(UserError, match="is a file, not a folder"):
        open_model(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match=r"nowhere is neither a folder .* nor a model of the Hub"):
        open_model("nowhere")
    sizes = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    folder = write_model(tmp_path / "modern", model=fresh("modernbert", **sizes))
    with pytest.raises(UserError, match="of the type modernbert; evaluated are bert, roberta, electra and causal"):
        open_model(str(folder))


# ---- what was never trained ----

EVERY = ["gpt2", "llama", "bert", "roberta", "discriminator", "generator"]


def train_one_step(model, parameters=None):
    optimizer = torch.optim.AdamW(parameters or model.parameters(), lr=1e-5)
    ids = torch.randint(5, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    labels = ids % 2 if isinstance(model, ElectraForPreTraining) else ids
    model(input_ids=ids, labels=labels.float() if isinstance(model, ElectraForPreTraining) else labels).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("family", EVERY)
def test_a_fresh_model_is_named_and_one_step_makes_it_a_trained_one(tmp_path, family):
    model = fresh(family)
    before = torch.random.get_rng_state()
    assert "every part is as freshly initialised" in signs_of_no_training(model)[0]
    assert torch.equal(before, torch.random.get_rng_state())
    train_one_step(model)
    assert signs_of_no_training(model) == []


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_fresh_model_is_named_after_it_was_saved(tmp_path, family):
    saved = open_model(str(write_model(tmp_path / "model", model=fresh(family))))
    assert len(saved.untrained) == 1


def test_a_fresh_generator_of_a_trained_discriminator_is_named(tmp_path):
    folder = write_model(tmp_path / "model", "discriminator")
    write_model(folder / "generator", tokenizer=False, model=fresh("generator"))
    assert open_model(str(folder)).untrained[0].startswith("generator: every part")


def test_a_fresh_head_on_a_trained_body_is_named(tmp_path):
    """What comes of loading an encoder into a model with a head and saving that."""
    perturbed(BertModel(BertConfig(**SIZES))).save_pretrained(tmp_path / "encoder")
    BertForMaskedLM.from_pretrained(tmp_path / "encoder", local_files_only=True).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    assert "the head is as freshly initialised" in open_model(str(tmp_path / "model")).untrained[0]


def test_trained_matrices_are_training_although_no_gain_has_moved():
    """In bfloat16 a gain of 1 stays 1 under small steps, and a Llama has no biases."""
    model = fresh("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1.5)
    assert signs_of_no_training(model) == []


def test_step_0_is_untrained_unless_the_run_began_with_a_trained_model(tmp_path):
    write_checkpoint(tmp_path / "new", 0)
    assert open_model(str(tmp_path / "new")).untrained == ["training_state.json says step 0"]
    write_checkpoint(tmp_path / "further", 0, origin="bert-base")
    assert open_model(str(tmp_path / "further")).untrained == []


@pytest.mark.parametrize("name", ["runs/one/two", "../gone", "epoch=2-step=8.ckpt", "/nowhere"])
def test_a_path_that_does_not_exist_is_no_name_on_the_hub(name):
    with pytest.raises(UserError, match="does not exist"):
        find_model(name)
