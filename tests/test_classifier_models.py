"""Classifiers from models of many types: padding changes no answer, LoRA finds its layers, or there is a sentence."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
    XLNetLMHeadModel,
)

from lmscripts.errors import UserError
from lmscripts.evaluation.applying import Classifier, Text
from lmscripts.models.checks import check_padding
from lmscripts.models.classifier import (
    ClassifierSettings,
    add_lora,
    build_classifier,
    find_source,
    fold_settings,
    in_body,
    merge_lora,
    open_classifier,
)

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WORDS = ["the", "a", "dog", "cat", "runs", "sleeps", "and", "or", "red", "blue", "<", "/", "s", ">"]
SIZE = len(SPECIAL) + len(WORDS)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ENDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
MAKE = {
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=SIZE, max_position_embeddings=32, pad_token_id=1, **SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_positions=32, n_embd=16, n_layer=1, n_head=2)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=SIZE, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=32)
    ),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(vocab_size=SIZE, max_position_embeddings=32, cls_token_id=0, sep_token_id=2, **ENDS, **SMALL)
    ),
    "xlnet": lambda: XLNetLMHeadModel(
        XLNetConfig(vocab_size=SIZE, d_model=16, d_inner=32, n_layer=1, n_head=2, pad_token_id=1)
    ),
    "bart": lambda: BartModel(
        BartConfig(
            **{"vocab_size": SIZE, "d_model": 16, "max_position_embeddings": 32, **ENDS},
            **{f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")},
            **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            **{"vocab_size": SIZE, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
            **{"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        )
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")

    def get(name):
        folder = place / name
        if not folder.exists():
            made = Tokenizer(models.WordLevel({w: n for n, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
            made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
            names = {f"{kind}_token": token for kind, token in zip(("bos", "pad", "eos", "unk", "mask"), SPECIAL)}
            PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **names).save_pretrained(folder)
            torch.manual_seed(1)
            MAKE[name]().save_pretrained(folder)
        return folder

    return get


def build(folder, **options):
    source = find_source(str(folder))
    settings = ClassifierSettings(fold_settings(source, None))
    return build_classifier(source, ["a", "b", "c"], settings, seed=1, **options)[0], source, settings


@pytest.mark.parametrize("name", [name for name in MAKE if name != "xlnet"])
def test_answers_depend_neither_on_the_batch_nor_on_ends_written_in_a_text(folders, name, tmp_path):
    model, source, settings = build(folders(name))
    assert model.training
    texts = [Text(1, None, "a dog"), Text(2, None, "a </s> dog <pad> or a <s>"), Text(3, None, "the cat sleeps " * 6)]
    device = torch.device("cpu")
    alone, together = (
        Classifier(model.eval(), source, settings, batch_size=size, device=device).answer(texts) for size in (1, 3)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        assert one.note == ""


def test_a_model_that_reads_its_answer_off_the_padding_is_refused(folders, tmp_path):
    folder = folders("xlnet")
    for options in ({}, {"from_scratch": True}):
        with pytest.raises(UserError, match=r"type xlnet cannot .*filled up to the length of another"):
            build(folder, **options)
    source = find_source(str(folder))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    model = XLNetForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type xlnet cannot"):
        open_classifier(str(tmp_path))
    model.train()
    with pytest.raises(UserError, match="type xlnet cannot"):
        check_padding(model, source.encoder, 1, 32)
    assert model.training  # as it was
    check_padding(model, source.encoder, 1, 3)  # rows of one word each are all of one length


def test_a_configuration_that_lacks_something_is_named(folders, tmp_path):
    folder = folders("t5")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["decoder_start_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for options in ({}, {"from_scratch": True}):
        with pytest.raises(UserError, match="decoder_start_token_id"):
            build(tmp_path, **options)


@pytest.mark.parametrize("name", ["distilbert", "modernbert", "bert", "gpt2", "t5"])
def test_lora_adds_to_the_body_of_any_type_and_leaves_the_model_as_it_is_known(folders, name):
    pytest.importorskip("peft")
    model, _, _ = build(folders(name))
    names = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    head = {key for key, _ in model.named_parameters() if not in_body(model, key)}
    (said,) = add_lora(model, 2)
    assert ("linear layers of the body" in said) == (name in ("distilbert", "modernbert"))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key.replace(".base_layer", "") for key in trained if "lora_" not in key} == head
    added = [key for key in trained if "lora_B" in key]
    assert added
    assert all(in_body(model, key) for key in added)
    with torch.no_grad():
        for key in added:
            model.get_parameter(key).fill_(0.1)
    merge_lora(model)
    after = model.state_dict()
    assert after.keys() == names.keys()
    changed = {key for key in names if not torch.equal(after[key], names[key])}
    assert len(changed) == len(added)
    assert all(in_body(model, key) for key in changed)
