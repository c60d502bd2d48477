"""New words in the place of unused tokens: the whole command, the ids it gives, and what it refuses."""

import json
import shutil

import pytest
from conftest import SAMPLE, run_script
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer

from lmscripts.errors import UserError
from lmscripts.text.words import WordTokenizer
from lmscripts.tokenizer.encoder import load_encoder, segmentation_difference
from lmscripts.tokenizer.extension import plan_extension, write_extension
from lmscripts.tokenizer.folder import write_tokenizer
from lmscripts.tokenizer.report import check_encoder
from lmscripts.tokenizer.training import VocabularySettings, train_vocabulary

WORDS = ["縄文", "ＬＬＭ", "素粒子", "縄文", "。"]  # one of full width, one twice, one that every vocabulary has


def words_file(folder, *words):
    path = folder / "words.txt"
    path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return path


def extend(tokenizer, folder, *words):
    """Extend without the script; returns the new folder and the sentences."""
    target = folder / "extended"
    target.mkdir()
    return target, write_extension(plan_extension(tokenizer, words_file(folder, *words)), target)


def trained(folder, tokenizer_type, kind, text="the cat sat on the mat . the dog sat too .\n" * 50):
    (folder / "text.txt").write_text(text, encoding="utf-8")
    settings = VocabularySettings(size=300, num_unused=4, multiple=0)
    made = train_vocabulary(tokenizer_type, [folder / "text.txt"], settings, segmented=kind != "none")
    (folder / "tokenizer").mkdir()
    words = WordTokenizer(kind)
    write_tokenizer(folder / "tokenizer", made, tokenizer_type, words, model_max_length=512, record={})
    return folder / "tokenizer"


def tokens_of(tokenizer):
    return {number: token for token, number in tokenizer.get_vocab().items()}


def test_whole_command(tokenizer_dir, tmp_path):
    """The words come out as one token; no other token has another id, and text is cut as before."""
    target = tmp_path / "extended"
    arguments = ["--extend_tokenizer_dir", tokenizer_dir, "--new_words_file", words_file(tmp_path, *WORDS)]
    output = run_script("train_tokenizer.py", *arguments, "--model_dir", target).stdout
    assert "3 new words took the place of unused tokens" in output
    assert "1 words were in the vocabulary already (。)" in output
    assert "1 lines give a word a second time" in output
    assert "do not come out" not in output
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tokenizer_dir, target))
    old, new = tokens_of(before), tokens_of(after)
    changed = {number: new[number] for number in old if new[number] != old[number]}
    assert changed == {5: "縄文", 6: "LLM", 7: "素粒子"}  # the first unused ids, as encoding sees the words
    assert old.keys() == new.keys()
    assert not segmentation_difference(before, after)
    sentence = "縄文の人は素粒子もＬＬＭも知らない。"
    ids = after(sentence, add_special_tokens=False)["input_ids"]
    assert [ids.count(number) for number in changed] == [1, 1, 1]
    assert not set(changed) & set(before(sentence, add_special_tokens=False)["input_ids"])
    encoder = load_encoder(target)
    assert encoder.encode([sentence]).ids.tolist() == ids
    check_encoder(encoder, [sentence, *(SAMPLE / "articles.txt").read_text(encoding="utf-8").splitlines()])


def test_record_tells_the_copy_from_the_original(tokenizer_dir, tmp_path):
    """Otherwise the trainer would take the extended folder for the one that it trains."""
    target = tmp_path / "extended"
    arguments = ["--extend_tokenizer_dir", tokenizer_dir, "--new_words_file", words_file(tmp_path, *WORDS)]
    run_script("train_tokenizer.py", *arguments, "--model_dir", target)
    training = ["--input_file", SAMPLE / "articles.txt", "--vocab_size", 2048]
    assert "nothing to do" in run_script("train_tokenizer.py", *training, "--model_dir", tokenizer_dir).stdout
    refused = run_script("train_tokenizer.py", *training, "--model_dir", target, check=False)
    assert refused.returncode == 2
    assert "holds another tokenizer" in refused.stderr
    assert load_encoder(target).fingerprint != load_encoder(tokenizer_dir).fingerprint
    before, after = (json.loads((f / "lmscripts_tokenizer.json").read_text()) for f in (tokenizer_dir, target))
    assert after.pop("extensions")[0]["new_words"] == {"縄文": 5, "LLM": 6, "素粒子": 7}
    assert before.pop("request") != after.pop("request")
    assert before == after
    assert not (target / "tokenizer_report.json").exists()  # it measured another vocabulary
    # The same again has nothing to do; other words are refused before they replace anything.
    assert "nothing to do" in run_script("train_tokenizer.py", *arguments, "--model_dir", target).stdout
    words_file(tmp_path, "ベクトル場")
    kept = (target / "vocab.txt").read_bytes()
    assert run_script("train_tokenizer.py", *arguments, "--model_dir", target, check=False).returncode == 2
    assert (target / "vocab.txt").read_bytes() == kept
    run_script("train_tokenizer.py", *arguments, "--model_dir", target, "--overwrite")
    assert (target / "vocab.txt").read_bytes() != kept


def test_extended_twice(tokenizer_dir, tmp_path):
    first, _ = extend(tokenizer_dir, tmp_path, "縄文")
    (tmp_path / "again").mkdir()
    second, sentences = extend(first, tmp_path / "again", "LLM", "縄文")
    assert load_encoder(second).tokenizer.convert_tokens_to_ids(["縄文", "LLM"]) == [5, 6]
    assert "1 words were in the vocabulary already (縄文)" in sentences
    record = json.loads((second / "lmscripts_tokenizer.json").read_text())
    assert [step["new_words"] for step in record["extensions"]] == [{"縄文": 5}, {"LLM": 6}]
    assert record["extensions"][1]["tokenizer"] == load_encoder(first).fingerprint


def test_words_that_the_segmenter_cuts_are_counted(tokenizer_dir, tmp_path):
    """A vocabulary entry that MeCab never gives as a word is dead; that is said."""
    target, sentences = extend(tokenizer_dir, tmp_path, "縄文", "量子もつれ回路", "深い学習の本")
    assert "warning: 2 of the 3 new words (量子もつれ回路, 深い学習の本) do not come out as one token" in sentences[-1]
    assert len(load_encoder(target).encode(["縄文"]).ids) == 1


def test_fast_tokenizer(tmp_path):
    folder = trained(tmp_path, "wordpiece", "whitespace")
    target, sentences = extend(folder, tmp_path, "ﬁnetuning", "x-ray", "cat")
    assert "1 words were in the vocabulary already (cat)" in sentences
    assert "warning: 1 of the 2 new words (x-ray)" in sentences[-1]  # punctuation is a word of its own
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("the ﬁnetuning cat") == ["the", "finetuning", "cat"]
    assert load_encoder(target).encode(["the ﬁnetuning cat"]).ids.tolist()[1] == 5


def test_folder_of_a_model_from_the_hub(tmp_path):
    """vocab.txt and tokenizer.json are both there and stay the same; weights are not copied; lower case is kept."""
    folder = tmp_path / "model"
    pieces = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "東", "京", "##s"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    BertForMaskedLM(
        BertConfig(vocab_size=12, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    ).save_pretrained(folder)
    BertTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "json")
    shutil.copy(tmp_path / "json" / "tokenizer.json", folder)  # no tokenizer_config.json: the class is in config.json
    target, sentences = extend(folder, tmp_path, "Protéine", "東京")
    names = {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "lmscripts_tokenizer.json"}
    assert {path.name for path in target.iterdir()} == names
    assert (target / "vocab.txt").read_text(encoding="utf-8").splitlines()[1:3] == ["proteine", "東京"]
    assert "warning: 1 of the 2 new words (東京)" in sentences[-1]  # BERT puts every Chinese character by itself
    for lone in (False, True):
        if lone:  # the other file alone has to say the same
            (target / "tokenizer.json").unlink()
        tokenizer = AutoTokenizer.from_pretrained(target)
        assert tokenizer("The PROTÉINE cats", add_special_tokens=False)["input_ids"] == [7, 1, 8, 11]


def test_character_vocabulary_takes_characters(tmp_path):
    folder = trained(tmp_path, "character", "mecab", "東 京 の 人\n" * 20)
    with pytest.raises(UserError, match="line 2: 大阪 can never be one token"):
        plan_extension(folder, words_file(tmp_path, "鷗", "大阪"))
    target, _ = extend(folder, tmp_path, "鷗")
    assert AutoTokenizer.from_pretrained(target).tokenize("東の鷗") == ["東", "の", "鷗"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("縄文\n人工 知能\n", "words.txt, line 2: '人工 知能' holds white space"),
        ("人工\u3000知能\n", "line 1: .* holds white space"),
        ("a\x00b\n", "line 1: .* control characters"),
        ("縄文\n［ｕｎｕｓｅｄ７７］\n", r"line 2: \[unused77\] is written like an unused token"),
        ("##文\n", "line 1: ##文 is written like .* the rest of a word"),
        ("。\n[MASK]\n", "holds no word that the vocabulary"),
        ("\n\n", "holds no word that the vocabulary"),
        ("".join(f"縄文{number}\n" for number in range(11)), "holds 11 new words, but .* has 10 unused tokens"),
        ("縄文\n".encode("cp932"), "line 1 is not UTF-8"),
    ],
)
def test_refused_words(tokenizer_dir, tmp_path, content, sentence):
    path = tmp_path / "words.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence):
        plan_extension(tokenizer_dir, path)


def test_refused_vocabularies(tmp_path):
    folder = trained(tmp_path, "bpe", "none")
    with pytest.raises(UserError, match=r"WordPiece or character vocabulary, but that of .* \(bpe\)"):
        plan_extension(folder, words_file(tmp_path, "x"))
    with pytest.raises(UserError, match="does not exist"):
        plan_extension(tmp_path / "nowhere", words_file(tmp_path, "x"))


def test_tokens_of_their_own_are_not_free(tmp_path):
    """An [unusedN] that was added as a special token is cut out of the text before the vocabulary is asked."""
    folder = trained(tmp_path, "wordpiece", "whitespace")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[unused0]"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    target, _ = extend(folder, tmp_path, "finetuning")
    assert AutoTokenizer.from_pretrained(target).convert_tokens_to_ids(["[unused0]", "finetuning"]) == [5, 6]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--vocab_size", 32768], "--vocab_size has no effect with --extend_tokenizer_dir"),
        (["--mecab_dic", "unidic_lite"], "--mecab_dic has no effect with --extend_tokenizer_dir"),
        (["--input_file", SAMPLE / "articles.txt"], "--input_file has no effect with --extend_tokenizer_dir"),
    ],
)
def test_options_without_effect(tokenizer_dir, tmp_path, arguments, sentence):
    given = ["--extend_tokenizer_dir", tokenizer_dir, "--new_words_file", words_file(tmp_path, "縄文")]
    done = run_script("train_tokenizer.py", *given, "--model_dir", tmp_path / "t", *arguments, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "t").exists()


def test_half_of_the_options(tokenizer_dir, tmp_path):
    for given, missing in (
        (["--extend_tokenizer_dir", tokenizer_dir], "missing --new_words_file"),
        (["--new_words_file", words_file(tmp_path, "縄文")], "missing --extend_tokenizer_dir"),
        ([], "missing --input_file"),
    ):
        done = run_script("train_tokenizer.py", *given, "--model_dir", tmp_path / "t", check=False)
        assert (done.returncode, missing in done.stderr) == (2, True), done.stderr
