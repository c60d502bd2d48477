"""Models of sentencepiece that were made elsewhere, as folders for AutoTokenizer, beside sentencepiece itself."""

import functools
import io
import json
import random

import pytest
import sentencepiece
from conftest import SAMPLE, run_script
from transformers import AutoTokenizer

from lmscripts.errors import UserError
from lmscripts.tokenizer import sentencepiece_import
from lmscripts.tokenizer.encoder import load_encoder
from lmscripts.tokenizer.report import DIFFICULT_LINES, check_encoder, keeps_line_feeds
from lmscripts.tokenizer.sentencepiece_import import import_sentencepiece

NAMES = ("articles.txt", "finnish.txt", "english.txt")
LINES = [line for name in NAMES for line in (SAMPLE / name).read_text(encoding="utf-8").split("\n") if line]


def train(path, **options):
    model = io.BytesIO()
    options = {"vocab_size": 2000, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return path


def take_over(tmp_path, **options):
    """The folder and sentencepiece's own processor of a model that is trained with these options."""
    model = train(tmp_path / "m.model", **options)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    import_sentencepiece(model, folder, LINES[::10])
    return folder, sentencepiece.SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="module", autouse=True)
def tables_are_read_once():
    """Most models here have the same table, and it takes two seconds to find its steps."""
    find = functools.cache(sentencepiece_import._table_steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_import, "_table_steps", lambda table: list(find(table)))
        yield


def mixed_lines(number, seed=7):
    """Random pieces of the sample, of difficult lines, and of single characters, put together."""
    pick = random.Random(seed)
    extras = ["  ", " ", "\u3000", "<s>", "</s>", "<0x0A>", "ﾞ", "ﾊﾟ", "\u3099", "\u0301", "\n", "～", "①", "e", "X"]
    for _ in range(number):
        parts = []
        for _ in range(pick.randint(1, 6)):
            source = pick.choice(LINES if pick.random() < 0.6 else DIFFICULT_LINES)
            start = pick.randrange(len(source) + 1)
            parts += [source[start : start + pick.randint(0, 12)], pick.choice(extras)]
        yield "".join(parts)


def lines_of_marks(number, seed=5):
    """Marks, vowels and final consonants behind what they could be joined with, in no order.

    NFKC would sort the marks, and join what does not stand side by side; sentencepiece does neither.
    """
    pick = random.Random(seed)
    bases = "aeoTXKéäかがはハﾊ각가ᄀक구゛´ⓐａ 東\n"
    marks = "\u0301\u0323\u0302\u031b\u0327\u032e\u0316\u0308\u0345\u3099\u309aﾞﾟ\u1161\u11a8\u093c\u0bc2"
    for _ in range(number):
        yield "".join(pick.choice(bases if pick.random() < 0.4 else marks) for _ in range(pick.randint(2, 16)))


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_are_those_of_sentencepiece(tmp_path, kind, byte_fallback, rule):
    folder, processor = take_over(tmp_path, model_type=kind, byte_fallback=byte_fallback, normalization_rule_name=rule)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    assert len(tokenizer) == processor.get_piece_size()
    lines = [*DIFFICULT_LINES, *LINES, *mixed_lines(1500), *lines_of_marks(500)]
    found = tokenizer(lines, add_special_tokens=False)["input_ids"]
    for line, ids in zip(lines, found):
        assert ids == processor.encode(line), repr(line)
    check_encoder(load_encoder(folder), lines)
    known = [line for line in LINES if processor.unk_id() not in processor.encode(line)]
    assert len(known) > 100
    for line in known:
        assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == processor.decode(
            processor.encode(line)
        )


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False, "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3},
        {"remove_extra_whitespaces": False, "byte_fallback": True, "normalization_rule_name": "identity"},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"treat_whitespace_as_suffix": True},
        {"split_by_whitespace": False, "normalization_rule_name": "identity", "character_coverage": 0.98},
        {"user_defined_symbols": ["ます", "です。", "\n", "▁東", "ＡＢ"], "byte_fallback": True},
    ],
    ids=lambda options: "-".join(options)[:40],
)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_other_settings(tmp_path, kind, options):
    folder, processor = take_over(tmp_path, model_type=kind, **options)
    encoder = load_encoder(folder)
    lines = [*LINES[::3], *lines_of_marks(300)]
    assert [row.tolist() for row in encoder.encode(lines).rows()] == processor.encode(lines)


def test_special_tokens_come_from_the_model(tmp_path):
    ids = {"pad_id": 4, "unk_id": 2, "bos_id": -1, "eos_id": 0}
    folder, processor = take_over(tmp_path, control_symbols=["[CLS]", "[SEP]", "[MASK]"], pad_piece="[PAD]", **ids)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (4, 2, 0)
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token == "[PAD]"
    encoded = tokenizer("東京の天気")
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert (pieces[0], pieces[-1]) == ("[CLS]", "[SEP]")
    assert set(encoded) == {"input_ids", "token_type_ids", "attention_mask"}
    # People write the mask into a text, whatever its kind in the model; nothing else is read out of a text.
    assert tokenizer.mask_token_id in tokenizer("東京の[MASK]天気")["input_ids"]
    assert tokenizer("[CLS]</s>")["input_ids"][1:-1] == processor.encode("[CLS]</s>")


def test_a_model_that_knows_neither_spaces_nor_latin_letters(tmp_path):
    """As that of a Japanese GPT-2: "<s>" in a text is one unknown with what stands around it, and never a token."""
    special = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "control_symbols": "<cls>,<sep>"}
    lines = [line for line in LINES if not line.isascii() and " " not in line]
    only_japanese = [line for line in lines if not any(c.isascii() for c in line)]
    options = {"vocab_size": 2000, "hard_vocab_limit": False, "minloglevel": 2, "add_dummy_prefix": False, **special}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(only_japanese), model_writer=model, **options)
    (tmp_path / "m.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer").mkdir()
    import_sentencepiece(tmp_path / "m.model", tmp_path / "tokenizer", LINES)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for line in ("<s>", "水<s> </s>水", "a<s>", "<unk><unk>", *LINES):
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == processor.encode(line), line
    # It has a cls and a sep token, but no mask: it is no tokenizer of an encoder, and a text gets the beginning only.
    assert tokenizer("水")["input_ids"][0] == 2
    assert tokenizer("水")["input_ids"][1:] == processor.encode("水")


def test_causal_models_get_their_beginning_and_keep_line_feeds(tmp_path):
    options = {"byte_fallback": True, "normalization_rule_name": "identity"}
    folder, processor = take_over(tmp_path, model_type="bpe", remove_extra_whitespaces=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("東京\n")["input_ids"] == [tokenizer.bos_token_id, *processor.encode("東京\n")]
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    encoder = load_encoder(folder)
    assert encoder.mask_id is None
    assert keeps_line_feeds(encoder)


def test_whole_command(tmp_path):
    model = train(tmp_path / "m.model", model_type="unigram", byte_fallback=True)
    arguments = ["--model_dir", tmp_path / "t", "--from_sentencepiece"]
    done = run_script(
        "train_tokenizer.py", *arguments, model, "--model_max_length", 77, "--input_file", SAMPLE / NAMES[0]
    )
    assert "lines have the ids of sentencepiece" in done.stdout
    assert AutoTokenizer.from_pretrained(tmp_path / "t").model_max_length == 77
    record = json.loads((tmp_path / "t" / "lmscripts_tokenizer.json").read_text())
    assert record["from_sentencepiece"] == "m.model"
    for extra, sentence in (
        ([model], "--overwrite"),
        ([model, "--overwrite", "--vocab_size", 100], "--vocab_size has no effect"),
        ([SAMPLE / NAMES[0], "--overwrite"], "no model of sentencepiece"),
        ([tmp_path / "none", "--overwrite"], "cannot read"),
    ):
        done = run_script("train_tokenizer.py", *arguments, *extra, check=False)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "t").model_max_length == 77


def test_a_model_that_differs_is_refused_by_the_line(tmp_path):
    """A rule of its own (two characters to one, not in NFKC) that no step of `tokenizers` applies."""
    rules = tmp_path / "rules.tsv"
    rules.write_text("3042 3044\t3046\n3042\t3048\n", encoding="utf-8")  # あい -> う, あ -> え
    model = train(tmp_path / "m.model", normalization_rule_tsv=str(rules))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    line = "このあいだ"
    assert processor.encode(line) == processor.encode("このうだ")
    (tmp_path / "t").mkdir()
    with pytest.raises(UserError, match=r"differ on the line '[^']*あい"):
        import_sentencepiece(model, tmp_path / "t", ["前の行", line])


def test_other_kinds_are_refused(tmp_path):
    model = train(tmp_path / "m.model", model_type="char")
    with pytest.raises(UserError, match="kind char"):
        import_sentencepiece(model, tmp_path, [])


@pytest.mark.parametrize(
    ("kind", "name", "config"),
    [
        ("unigram", "spiece.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
        ("bpe", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
        ("unigram", "spiece.model", {"tokenizer_class": "AlbertTokenizer", "do_lower_case": False}),
    ],
    ids=["t5", "llama", "albert"],
)
def test_folders_with_only_a_model_load(tmp_path, kind, name, config):
    options = {
        "byte_fallback": kind == "bpe",
        "normalization_rule_name": "nmt_nfkc" if kind == "unigram" else "identity",
    }
    options |= {"control_symbols": ["[CLS]", "[SEP]", "[MASK]"]} if "Albert" in config["tokenizer_class"] else {}
    train(tmp_path / name, model_type=kind, pad_id=0, unk_id=1, bos_id=2, eos_id=3, **options)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = load_encoder(tmp_path)
    assert encoder.unk_id == encoder.tokenizer.unk_token_id
    check_encoder(encoder, LINES[::5])
    encoded = encoder.encode(["東京の天気は晴れ。", "The quick brown fox"])
    assert encoded.lengths.min() > 0
    assert encoded.word_starts.sum() >= 4 + 6
