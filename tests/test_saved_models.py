"""Models to evaluate: what is taken, what is refused, and what was never trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForCausalLM,
    XLMRobertaForMaskedLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from lmscripts.errors import UserError
from lmscripts.models import saved as saved_models
from lmscripts.models.finding import find_model, write_checksums

VOCABULARY = 64
SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 32}
GPT2_SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}


def open_model(name, *others, **more):
    return saved_models.open_model(name, ("causal", "masked", "replaced"), *others, **more)


def fresh(family, **more):
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, bos_token_id=2, eos_token_id=3))
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "bert": (BertConfig, BertForMaskedLM),
        "roberta": (RobertaConfig, RobertaForMaskedLM),
        "discriminator": (ElectraConfig, ElectraForPreTraining),
        "generator": (ElectraConfig, ElectraForMaskedLM),
        "albert": (AlbertConfig, AlbertForMaskedLM),
    }
    configure, architecture = classes[family]
    return architecture(configure(**SIZES | more))


def perturbed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def rewrite(folder, **values):
    """Change what config.json says."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


def write_tokenizer(folder, size=VOCABULARY, **others):
    words = {f"w{n}": n for n in range(size)}
    special = {"pad_token": "w0", "cls_token": "w2", "sep_token": "w3", "mask_token": "w4", "unk_token": "w1"}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **special | others).save_pretrained(folder)


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
    assert (saved.objective, saved.longest, saved.untrained) == (kind, longest, [])
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
    assert open_model(str(folder), str(generator)).objective == "replaced"
    assert open_model(str(folder), str(generator)).notices == [f"the generator is {generator}"]
    shutil.copytree(generator, folder / "generator")
    saved = open_model(str(folder))
    assert set(saved.models) == {"", "generator"}
    with pytest.raises(UserError, match=r"--generator_dir .*elsewhere has no effect: .* has its own in .*generator"):
        open_model(str(folder), str(generator))
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
    with pytest.raises(UserError, match=r"saved as BertModel\) lacks the head of BertForMaskedLM"):
        open_model(str(tmp_path))
    rewrite(tmp_path, architectures=None)
    with pytest.raises(UserError, match="lacks the head of BertForMaskedLM"):
        open_model(str(tmp_path))


# Each of these is loaded without a word by AutoModelForCausalLM or by the family's class, most through tied weights.
NO_LANGUAGE_MODELS = [
    GPT2Model,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    LlamaForSequenceClassification,
]
NO_LANGUAGE_MODELS += [BertForSequenceClassification, ElectraForSequenceClassification, XLMRobertaForMaskedLM]


@pytest.mark.parametrize("architecture", NO_LANGUAGE_MODELS, ids=lambda each: each.__name__)
def test_what_was_saved_as_something_else_is_refused_by_name(tmp_path, architecture):
    sizes = GPT2_SIZES | {"pad_token_id": 0} if "GPT2" in architecture.__name__ else SIZES
    model = perturbed(architecture(architecture.config_class(**sizes)))
    folder = write_model(tmp_path / "model", model=model)
    if model.config.model_type == "electra":
        write_model(folder / "generator", "generator", tokenizer=False)
    said = r"(, and that is not what is scored of the type|\) lacks the head of)"
    with pytest.raises(UserError, match=f"saved as {architecture.__name__}{said}"):
        open_model(str(folder))


def test_an_objective_without_scores_is_named(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", model=perturbed(BertForSequenceClassification(BertConfig(**SIZES))))
    judged = {"judged": {"": "BertForSequenceClassification"}}
    monkeypatch.setattr(saved_models.family("bert"), "heads", saved_models.family("bert").heads | judged)
    with pytest.raises(UserError, match="was trained on the objective judged, which has no scores of a text"):
        open_model(str(folder))
    assert open_model(str(write_model(tmp_path / "other"))).objective == "masked"


def test_what_brings_the_whole_head_is_taken_whatever_its_name(tmp_path):
    for name, model in {
        "pretraining": perturbed(BertForPreTraining(BertConfig(**SIZES))),
        "two heads": perturbed(GPT2DoubleHeadsModel(GPT2Config(**GPT2_SIZES, summary_type="cls_index"))),
    }.items():
        assert open_model(str(write_model(tmp_path / name, model=model))).untrained == []
    folder = write_model(tmp_path / "old", "llama")
    for architectures in (["LLaMAForCausalLM"], None):
        rewrite(folder, architectures=architectures)
        assert open_model(str(folder)).objective == "causal"


def test_a_discriminator_is_no_generator(tmp_path):
    folder = write_model(tmp_path / "model", "discriminator")
    write_model(folder / "generator", "discriminator", tokenizer=False)
    with pytest.raises(UserError, match=r"ElectraForPreTraining\) lacks the head of ElectraForMaskedLM"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("configure", "architecture", "longest"),
    [
        (BertConfig, BertLMHeadModel, 32),
        (RobertaConfig, RobertaForCausalLM, 31),
        (XLMRobertaConfig, XLMRobertaForCausalLM, 31),
    ],
)
def test_a_decoder_is_scored_as_one_and_only_if_it_is_one(tmp_path, configure, architecture, longest):
    """An encoder of these types under a causal head sees the tokens that it is asked for."""
    decoder = perturbed(architecture(configure(**SIZES, is_decoder=True)))
    folder = write_model(tmp_path / "decoder", model=decoder)
    saved = open_model(str(folder))
    assert (saved.objective, saved.longest) == ("causal", longest)
    ids = torch.randint(5, VOCABULARY, (1, longest), generator=torch.Generator().manual_seed(0))
    assert saved.models[""](input_ids=ids, use_cache=False).logits.isfinite().all()
    rewrite(folder, is_decoder=False)
    with pytest.raises(UserError, match=r"looks ahead: a later token changes the logits before it"):
        open_model(str(folder))


def test_a_masked_model_that_says_it_decodes_is_neither(tmp_path):
    folder = write_model(tmp_path / "model", "bert")
    rewrite(folder, is_decoder=True)
    with pytest.raises(UserError, match="saved as BertForMaskedLM with is_decoder"):
        open_model(str(folder))


def test_a_damaged_index_is_named(tmp_path):
    folder = write_model(tmp_path / "model", "gpt2")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for text in ("{}", "no JSON", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "\0"):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is damaged"):
            open_model(str(folder))


def test_special_tokens_of_another_model(tmp_path):
    """The sizes of two vocabularies are often equal; what ends a text seldom is."""
    folder = write_model(tmp_path / "model", "gpt2", tokenizer=False)  # begins with 2, ends with 3
    write_tokenizer(tmp_path / "own", bos_token="w2", eos_token="w3")
    write_tokenizer(tmp_path / "other", bos_token="w2", eos_token="w9")
    notices = open_model(str(folder), tokenizer_dir=str(tmp_path / "own")).notices
    assert len(notices) == 1
    assert "nothing proves that the tokenizer" in notices[0]
    with pytest.raises(
        UserError, match=r"eos token has the id 9 in the tokenizer .*, but .* says 3 in its config\.json"
    ):
        open_model(str(folder), tokenizer_dir=str(tmp_path / "other"))
    for eos, sentences in ((3, 1), ([3, 9], 0), (None, 0), (50256, 0), (9, 0)):
        rewrite(folder, eos_token_id=eos)
        shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
        notices = open_model(str(folder)).notices
        assert len(notices) == sentences, (eos, notices)


def test_padding_matters_where_positions_depend_on_it(tmp_path):
    write_tokenizer(tmp_path / "other", pad_token="w7")
    bert = write_model(tmp_path / "bert", "bert", tokenizer=False)
    assert "the pad token has the id 7" in open_model(str(bert), tokenizer_dir=str(tmp_path / "other")).notices[0]
    roberta = write_model(tmp_path / "roberta", "roberta", tokenizer=False)
    with pytest.raises(UserError, match="the pad token has the id 7"):
        open_model(str(roberta), tokenizer_dir=str(tmp_path / "other"))


def test_any_length(tmp_path):
    """XLNet's configuration says -1 for the number of its positions."""
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "vocab_size": VOCABULARY}
    both = write_model(tmp_path / "both", model=perturbed(XLNetLMHeadModel(XLNetConfig(**sizes))))
    with pytest.raises(UserError, match="looks ahead"):
        open_model(str(both))
    one = write_model(tmp_path / "one", model=perturbed(XLNetLMHeadModel(XLNetConfig(**sizes, attn_type="uni"))))
    assert open_model(str(one)).longest is None


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


def test_a_tokenizer_that_lost_its_vocabulary(tmp_path):
    """transformers makes one of special tokens alone, or takes what is left: the score would be of unknown words."""
    folder = write_model(tmp_path / "model")
    (folder / "lmscripts_tokenizer.json").write_text(json.dumps({"vocab_size": VOCABULARY + 9}), encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged: of the 73 entries by lmscripts_tokenizer\.json only 64 are left"):
        open_model(str(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    with pytest.raises(UserError, match="has no tokenizer beside the model"):
        open_model(str(folder))


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
    folder = write_model(tmp_path / "albert", model=fresh("albert", **sizes))
    with pytest.raises(UserError, match="of the type albert; evaluated are bert, electra, modernbert, roberta and"):
        open_model(str(folder))


# ---- what was never trained ----


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


def test_what_looks_fresh_after_steps_on_record_is_a_notice(tmp_path):
    """Too short a training to be seen is training: the number of its steps is there to be believed."""
    saved = open_model(str(write_checkpoint(tmp_path, 5, model=fresh("gpt2"))))
    assert saved.untrained == []
    assert "cannot be told whether the model was trained" in saved.notices[0]
    assert "although 5 steps of training are on record" in saved.notices[0]


def test_step_0_is_untrained_unless_the_run_began_with_a_trained_model(tmp_path):
    write_checkpoint(tmp_path / "new", 0)
    assert open_model(str(tmp_path / "new")).untrained == ["training_state.json says step 0"]
    write_checkpoint(tmp_path / "further", 0, origin="bert-base")
    assert open_model(str(tmp_path / "further")).untrained == []


@pytest.mark.parametrize("name", ["runs/one/two", "../gone", "epoch=2-step=8.ckpt", "/nowhere"])
def test_a_path_that_does_not_exist_is_no_name_on_the_hub(name):
    with pytest.raises(UserError, match="does not exist"):
        find_model(name)
