"""Trained vocabularies, tokenizer folders, and the same ids as AutoTokenizer."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from lmscripts.errors import UserError
from lmscripts.text.corpus import Span, TextReport, read_documents
from lmscripts.text.words import WordTokenizer, make_segmenter
from lmscripts.tokenizer.encoder import load_encoder
from lmscripts.tokenizer.folder import check_combination, fast_tokenizer, needs_words, replaced_folder, write_tokenizer
from lmscripts.tokenizer.report import check_encoder, report_table, tokenizer_report, unspaced_share
from lmscripts.tokenizer.training import SPECIAL_TOKENS, VocabularySettings, train_vocabulary

SAMPLE = Path(__file__).parent.parent / "sample_data"
HOSTILE = [
    "", " ", "\u3000", "今日は　晴れ", "ＡＢＣ　１２３", "a\tb", "a\u00a0b", "a\u2028b", "a\u2028",
    "末尾\u0085", "x\u1680", "a\u200bb",
    "😀👨‍👩‍👧と絵文字", "これは[MASK]です。[SEP]終わり", "[MASK]", "[MASK][MASK] 二つ", "[UNK]だ",
    "［ＭＡＳＫ］全角", "[unused0]と[unused99]",
    "ア" * 300, "x" * 500 + " ふつう", "これはテストです。" * 500, "㈱㍻①ｶﾞｷﾞ", "12,000円と3,4,",
    "``引用''", "\U00020bb7野家で\U0001f363", "\ufffd",
    "The quick brown fox, don't!", "hyvää päivää", "٣٤ кот 고양이 สวัสดี", "##接続 ▁下線", "が\u3099",
]  # fmt: skip
KINDS = [
    ("wordpiece", "mecab"), ("character", "mecab"), ("unigram", "mecab"), ("wordpiece", "sudachi"),
    ("unigram", "sudachi"),
    ("wordpiece", "whitespace"), ("unigram", "whitespace"), ("bpe", "whitespace"), ("character", "whitespace"),
    ("wordpiece", "none"), ("unigram", "none"), ("bpe", "none"), ("character", "none"),
    ("sentencepiece_bpe", "mecab"), ("sentencepiece_bpe", "whitespace"), ("sentencepiece_bpe", "none"),
]  # fmt: skip


def sample_lines(name="articles.txt"):
    return [line for document in read_documents([Span(str(SAMPLE / name))], TextReport()) for line in document]


def words_of(kind, **settings):
    if kind == "sudachi":
        pytest.importorskip("sudachidict_small")
        settings["sudachi_dictionary"] = "small"
    return WordTokenizer(kind, **settings)


def make_folder(folder, tokenizer_type, words, settings=None, lines=None):
    """Train on the sample and write the folder."""
    lines = sample_lines() if lines is None else lines
    segment = make_segmenter(words)
    segmented = needs_words(tokenizer_type, words)
    text = folder.with_suffix(".words.txt")
    normal = [unicodedata.normalize("NFKC", line) for line in lines]
    text.write_text(
        "".join((" ".join(segment(line)) if segmented else line) + "\n" for line in normal), encoding="utf-8"
    )
    trained = train_vocabulary(tokenizer_type, [text], settings or VocabularySettings(size=2500), segmented=segmented)
    folder.mkdir()
    write_tokenizer(folder, trained, tokenizer_type, words, model_max_length=512, record={})
    return folder


@pytest.fixture(scope="module", autouse=True)
def _offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(tokenizer_type, kind) -> folder, each made once."""
    place, made = tmp_path_factory.mktemp("tokenizers"), {}

    def get(tokenizer_type, kind):
        if (tokenizer_type, kind) not in made:
            made[tokenizer_type, kind] = make_folder(place / f"{tokenizer_type}_{kind}", tokenizer_type, words_of(kind))
        return made[tokenizer_type, kind]

    return get


# ---- the same ids ----


@pytest.mark.parametrize(("tokenizer_type", "kind"), KINDS)
def test_ids_are_those_of_auto_tokenizer(folders, tokenizer_type, kind):
    encoder = load_encoder(folders(tokenizer_type, kind))
    tokenizer = AutoTokenizer.from_pretrained(folders(tokenizer_type, kind))
    lines = sample_lines()[::3] + sample_lines("english.txt") + HOSTILE
    rows = encoder.encode(lines).rows()
    for line, row in zip(lines, rows):
        if not any(token in unicodedata.normalize("NFKC", line) for token in SPECIAL_TOKENS):
            assert row.tolist() == tokenizer(line, add_special_tokens=False)["input_ids"], repr(line[:60])
    check_encoder(encoder, lines)


@pytest.mark.parametrize(("tokenizer_type", "kind"), KINDS)
def test_special_tokens_in_a_text_are_text(folders, tokenizer_type, kind):
    """Their characters, one way or the other, and what stands around them is as it was."""
    encoder = load_encoder(folders(tokenizer_type, kind))
    for token in (*SPECIAL_TOKENS, "［ＭＡＳＫ］"):
        for text in (token, f"東京{token}は晴れ{token}{token}。", f"a {token} b"):
            ids = encoder.encode([text]).ids.tolist()
            assert not set(ids) & {0, 2, 3, 4}, (text, encoder.tokenizer.convert_ids_to_tokens(ids))
            pieces = encoder.tokenizer.convert_ids_to_tokens(ids)
            if "[UNK]" not in pieces and tokenizer_type != "bpe":
                shown = "".join(piece.removeprefix("##").replace("▁", "") for piece in pieces)
                assert shown == unicodedata.normalize("NFKC", text).replace(" ", "")
    around = encoder.encode(["東京[SEP]晴れ"]).ids.tolist()
    assert around[0] == encoder.encode(["東京"]).ids[0] or kind == "none"
    spaced = encoder.encode(["東京 [SEP] 晴れ", "東京", "[SEP]", "晴れ"]).rows()
    if tokenizer_type != "bpe":
        assert spaced[0].tolist() == [number for row in spaced[1:] for number in row.tolist()]


@pytest.mark.parametrize(("tokenizer_type", "kind"), KINDS)
def test_shapes_and_batches(folders, tokenizer_type, kind):
    encoder = load_encoder(folders(tokenizer_type, kind))
    lines = ["", "東京の天気は晴れ。", " ", "明日も晴れ。", ""]
    encoded = encoder.encode(lines)
    assert encoded.ids.dtype == np.uint32
    assert encoded.word_starts.dtype == np.bool_
    assert encoded.lengths.dtype == np.int64
    assert encoded.lengths.sum() == len(encoded.ids) == len(encoded.word_starts)
    assert [len(row) for row in encoded.rows()] == encoded.lengths.tolist()
    firsts = (np.cumsum(encoded.lengths) - encoded.lengths)[encoded.lengths > 0]
    assert encoded.word_starts[firsts].all()
    apart = [encoder.encode([line]) for line in lines]
    assert np.concatenate([part.ids for part in apart]).tolist() == encoded.ids.tolist()
    assert np.concatenate([part.word_starts for part in apart]).tolist() == encoded.word_starts.tolist()
    nothing = encoder.encode([])
    assert (len(nothing.ids), len(nothing.lengths), nothing.rows()) == (0, 0, [])


@pytest.mark.parametrize(("tokenizer_type", "kind"), KINDS)
def test_folder_is_what_transformers_expects(folders, tokenizer_type, kind):
    folder = folders(tokenizer_type, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL_TOKENS, "[unused0]", "[unused9]")] == [
        0, 1, 2, 3, 4, 5, 14,
    ]  # fmt: skip
    assert tokenizer.pad_token_id == 0
    assert tokenizer.mask_token_id == 4
    assert len(tokenizer) % 64 == 0
    assert tokenizer.model_max_length == 512
    pair = tokenizer("東京の天気", "晴れ")
    first, second = len(tokenizer("東京の天気")["input_ids"]), len(tokenizer("晴れ")["input_ids"]) - 1
    assert pair["token_type_ids"] == [0] * first + [1] * second
    assert pair["input_ids"][0] == 2
    assert pair["input_ids"][-1] == pair["input_ids"][first - 1] == 3
    padded = tokenizer(["東京の天気は明日も晴れ。", "晴れ"], padding=True)
    assert padded["input_ids"][1][-1] == 0
    assert padded["attention_mask"][1][-1] == 0
    encoder = load_encoder(folder)
    assert (encoder.pad_id, encoder.unk_id, encoder.cls_id, encoder.sep_id, encoder.mask_id) == (0, 1, 2, 3, 4)
    assert encoder.eos_id is None
    assert encoder.special_ids == (0, 1, 2, 3, 4)
    assert encoder.vocab_size == len(tokenizer)
    assert len(encoder.reserved_ids) >= 10


def test_saved_again_it_is_the_same(folders, tmp_path):
    for tokenizer_type, kind in (("wordpiece", "mecab"), ("unigram", "mecab"), ("unigram", "none")):
        encoder = load_encoder(folders(tokenizer_type, kind))
        encoder.tokenizer.save_pretrained(tmp_path / tokenizer_type / kind)
        again = load_encoder(tmp_path / tokenizer_type / kind)
        lines = sample_lines()[:50] + HOSTILE
        assert again.encode(lines).ids.tolist() == encoder.encode(lines).ids.tolist()


def test_published_tokenizers_of_other_makes(folders, tmp_path):
    """Lower-casing, other analysers, no subwords, minimal settings: the ids are still those of transformers."""
    vocabulary = (folders("wordpiece", "mecab") / "vocab.txt").read_text(encoding="utf-8") + "hello\n##world\n"
    variants = [
        {"do_lower_case": True, "mecab_kwargs": {"mecab_dic": "ipadic"}},
        {"word_tokenizer_type": "basic"},
        {"do_word_tokenize": False, "subword_tokenizer_type": "character"},
        {"do_subword_tokenize": False, "mecab_kwargs": {"mecab_dic": "ipadic"}},
        {"mecab_kwargs": {"mecab_dic": "ipadic", "normalize_text": False}},
        {"mecab_kwargs": {"mecab_dic": "ipadic"}, "never_split": ["HELLO"], "do_lower_case": True},
    ]
    for number, variant in enumerate(variants):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vocab.txt").write_text(vocabulary, encoding="utf-8")
        settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab", **variant}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        check_encoder(load_encoder(folder), [*sample_lines()[::20], *HOSTILE, "HELLOworld hello ＨＥＬＬＯ"])


def test_added_tokens(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders("wordpiece", "mecab"))
    tokenizer.add_tokens(["東京タワー", "晴れ晴れ"])
    tokenizer.save_pretrained(tmp_path / "more")
    encoder = load_encoder(tmp_path / "more")
    lines = ["東京タワーと東京", "晴れ晴れ晴れ", "[MASK]東京タワー", *HOSTILE]
    check_encoder(encoder, lines)
    encoded = encoder.encode(["東京タワーと東京"])
    assert encoded.ids[0] == encoder.vocab_size - 2
    assert encoded.word_starts[:2].tolist() == [True, True]


@pytest.mark.parametrize(("tokenizer_type", "kind"), KINDS)
def test_unknown_characters_are_counted(folders, tokenizer_type, kind):
    """Of a word that is unknown all of them, of unknown characters these; white space never."""
    encoder = load_encoder(folders(tokenizer_type, kind))
    lines = ["東京の天気", "", "東京 ᚠᚢᚦ ᚨ", "ᚠ" * 150 + " ᚠ", *sample_lines()[:300]]
    encoded = encoder.encode(lines)
    found = encoder.unknown_characters(lines, encoded).tolist()
    rows = encoded.rows()
    assert [bool(number) for number in found] == [1 in row for row in rows]
    if tokenizer_type != "bpe":
        assert found[:4] == [0, 0, 4, 151]
        report = tokenizer_report(encoder, lines)
        assert report["unknown_characters"] == sum(found)


def test_words_that_wordpiece_cannot_cut_are_left_out_and_told(tmp_path):
    """They would give the unknown token whatever is learnt from them, and cost the square of their length."""
    settings = VocabularySettings(size=300, limit_alphabet=100)
    short, file = "the cat sat on the mat\n" * 50, tmp_path / "words.txt"
    file.write_text(short, encoding="utf-8")
    expected = train_vocabulary("wordpiece", [file], settings, segmented=True)
    file.write_text(short + "gattaca" * 30_000 + " the\n" + short, encoding="utf-8")
    found = train_vocabulary("wordpiece", [file], settings, segmented=True)
    assert found.pieces == expected.pieces
    assert (expected.num_long_words, found.num_long_words) == (0, 1)
    assert found.long_words_share == 210_000 / (210_003 + 2 * 50 * 17)
    assert "1 words are longer than 100 characters" in found.remarks(settings)[-1]
    file.write_text("gattaca" * 30 + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"every word .* longer than 100 .*unigram"):
        train_vocabulary("wordpiece", [file], settings, segmented=True)
    assert "gattaca" in "".join(train_vocabulary("unigram", [file], settings, segmented=True).pieces)


def test_coverage_keeps_the_characters_that_are_a_share_of_the_text(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text(f"{'ab ' * 498}\n{'c ' * 3}\nd\n" * 10, encoding="utf-8")  # of 1,000: 498, 498, 3, 1
    for coverage, kept in ((0.9, 2), (0.996, 2), (0.9961, 3), (0.999, 3), (1.0, 4)):
        settings = VocabularySettings(size=64, limit_alphabet=1, num_unused=0, character_coverage=coverage)
        trained = train_vocabulary("unigram", [file], settings, segmented=True)
        assert trained.num_characters == kept
        assert sum(piece in "abcd" for piece in trained.pieces) == kept


def test_joins_are_those_of_sentencepiece(tmp_path):
    """A fast tokenizer gives each word the ids that sentencepiece gives it."""
    segment = make_segmenter(WordTokenizer())
    words = [word for line in sample_lines() for word in segment(line)] + " ".join(sample_lines("english.txt")).split()
    file = tmp_path / "words.txt"
    file.write_text("\n".join(words), encoding="utf-8")
    settings = VocabularySettings(size=2500, character_coverage=0.995)
    trained = train_vocabulary("sentencepiece_bpe", [file], settings, segmented=True)
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.sentencepiece)
    tokenizer = fast_tokenizer(trained, "sentencepiece_bpe", WordTokenizer("none", normalization="none"))
    ids = {word: model.encode(word) for word in words if word not in ("``", "''")}
    assert {word: tokenizer.encode(word, add_special_tokens=False).ids for word in ids} == ids
    assert sum(len(model.id_to_piece(number)) > 3 for each in ids.values() for number in each) > 100
    assert any(1 in each for each in ids.values())


def test_unigram_says_what_it_needs(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("".join(f"{chr(0x4E00 + n)} " for n in range(200)), encoding="utf-8")
    sentence = r"leave 49 characters .* 98% of it: 196 characters, so at least --vocab_size 202$"
    with pytest.raises(UserError, match=sentence):
        train_vocabulary("unigram", [file], VocabularySettings(size=55, num_unused=0), segmented=True)
    with pytest.raises(UserError, match=r"202 and --limit_alphabet 196 \(or --character_coverage 0.98\)$"):
        train_vocabulary(
            "unigram", [file], VocabularySettings(size=900, num_unused=0, limit_alphabet=9), segmented=True
        )
    trained = train_vocabulary("unigram", [file], VocabularySettings(size=202, num_unused=0), segmented=True)
    assert trained.num_characters == 196


def test_language_without_spaces_is_seen():
    japanese, spaced = sample_lines(), sample_lines("english.txt")
    segment = make_segmenter(WordTokenizer())
    assert unspaced_share(japanese) > 0.5
    assert unspaced_share(["ภาษาไทยเขียนโดยไม่เว้นวรรคระหว่างคำ"]) == 1
    assert unspaced_share([" ".join(segment(line)) for line in japanese]) < 0.1
    assert unspaced_share(spaced) == unspaced_share([]) == 0


# ---- word starts ----


@pytest.mark.parametrize("tokenizer_type", ["wordpiece", "character", "unigram", "sentencepiece_bpe"])
def test_one_start_for_every_word(folders, tokenizer_type):
    encoder = load_encoder(folders(tokenizer_type, "mecab"))
    segment = make_segmenter(WordTokenizer())
    lines = sample_lines()[:200]
    words = [segment(line) for line in lines]
    encoded = encoder.encode(lines)
    starts = np.add.reduceat(encoded.word_starts.astype(int), np.cumsum(encoded.lengths) - encoded.lengths)
    assert starts.tolist() == list(map(len, words))
    # The tokens between two starts are those of the word alone.
    pieces = np.split(encoded.ids, np.flatnonzero(encoded.word_starts)[1:])
    flat = [word for line in words for word in line]
    for word, piece in zip(flat[:300], pieces):
        assert (
            encoder.tokenizer.convert_tokens_to_ids(encoder.tokenizer.subword_tokenizer.tokenize(word))
            == piece.tolist()
        )


def test_unknown_words_are_words(folders):
    encoder = load_encoder(folders("wordpiece", "mecab"))
    encoded = encoder.encode(["東京ᚠ"])
    assert encoded.ids.tolist()[-1] == 1
    assert encoded.word_starts.tolist()[-1]
    assert encoder.encode(["\u2028"]).lengths.tolist() == [0]


def test_word_starts_of_spaced_text(folders, tmp_path):
    lines = sample_lines("english.txt") + sample_lines("finnish.txt")
    settings = VocabularySettings(size=600)
    count = 5  # The | quick | foxes | jump | .
    for tokenizer_type in ("wordpiece", "unigram", "bpe", "character", "sentencepiece_bpe"):
        folder = make_folder(tmp_path / tokenizer_type, tokenizer_type, WordTokenizer("whitespace"), settings, lines)
        encoded = load_encoder(folder).encode(["The quick foxes jump."])
        assert int(encoded.word_starts.sum()) == count, tokenizer_type
        assert len(encoded.ids) > count
    folder = make_folder(tmp_path / "plain", "unigram", WordTokenizer("none"), settings, lines)
    assert int(load_encoder(folder).encode(["The quick foxes jump."]).word_starts.sum()) == 4


def test_word_starts_of_unsegmented_japanese(folders):
    """Without an analyser there are no words: every piece stands for itself, not the whole sentence for one word."""
    for tokenizer_type in ("unigram", "bpe", "character", "sentencepiece_bpe"):
        encoded = load_encoder(folders(tokenizer_type, "none")).encode(["東京の天気は晴れ、明日は雨になるらしい。"])
        assert encoded.word_starts.mean() > 0.85


# ---- vocabularies ----


@pytest.mark.parametrize("tokenizer_type", ["wordpiece", "unigram", "bpe", "character", "sentencepiece_bpe"])
def test_vocabulary_size(tmp_path, tokenizer_type):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sample_lines("english.txt")) + "\n", encoding="utf-8")

    def train(**settings):
        return train_vocabulary(tokenizer_type, [text], VocabularySettings(**settings), segmented=True)

    asked = 50 if tokenizer_type == "character" else 390
    trained = train(size=asked, multiple=64)
    assert len(trained.pieces) == -(-asked // 64) * 64
    assert trained.pieces[:15] == [*SPECIAL_TOKENS, *(f"[unused{number}]" for number in range(10))]
    filled = len(trained.pieces) - asked
    assert trained.pieces[-filled:] == [f"[unused{10 + number}]" for number in range(filled)]
    assert len(train(size=asked, multiple=0).pieces) == asked
    assert len(set(trained.pieces)) == len(trained.pieces)
    large = train(size=100_000, min_frequency=2, num_unused=0)
    assert len(large.pieces) < 100_000
    assert "entries, not 100,032" in large.remarks(VocabularySettings(size=100_000))[0]


def test_alphabet_is_the_most_frequent_characters(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("aaaa bb cc d e\n" * 3, encoding="utf-8")
    trained = train_vocabulary(
        "wordpiece", [text], VocabularySettings(size=64, limit_alphabet=3, num_unused=0), segmented=True
    )
    assert trained.pieces[5:11] == ["a", "b", "c", "##a", "##b", "##c"]
    assert (trained.num_characters, trained.num_text_characters) == (3, 5)
    small = train_vocabulary("wordpiece", [text], VocabularySettings(size=9, num_unused=0, multiple=0), segmented=True)
    assert small.pieces[5:] == ["a", "b", "##a", "##b"]  # no room for more


def test_no_text_and_no_room(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n", encoding="utf-8")
    for tokenizer_type in ("wordpiece", "unigram", "bpe", "character", "sentencepiece_bpe"):
        with pytest.raises(UserError, match="no text"):
            train_vocabulary(tokenizer_type, [text], VocabularySettings(size=400), segmented=tokenizer_type != "bpe")
    with pytest.raises(UserError, match="no room"):
        VocabularySettings(size=15).room()
    text.write_text("a text\n", encoding="utf-8")
    with pytest.raises(UserError, match="256 bytes"):
        train_vocabulary("bpe", [text], VocabularySettings(size=100), segmented=False)


PROGRAM = """
import hashlib, sys
from pathlib import Path
from lmscripts.tokenizer.training import VocabularySettings, train_vocabulary
for kind in ("wordpiece", "unigram", "bpe", "character", "sentencepiece_bpe"):
    files = [Path(name) for name in sys.argv[1:]]
    trained = train_vocabulary(kind, files, VocabularySettings(size=2200), segmented=kind != "bpe")
    print(kind, hashlib.sha256(repr(trained).encode()).hexdigest())
"""


def test_the_same_vocabulary_in_every_process(tmp_path):
    segment = make_segmenter(WordTokenizer())
    lines = [" ".join(segment(line)) + "\n" for line in sample_lines()]
    whole, cuts = tmp_path / "whole.txt", [tmp_path / f"{number}.txt" for number in range(4)]
    whole.write_text("".join(lines), encoding="utf-8")
    for number, path in enumerate(cuts):  # one of them is empty
        path.write_text("".join(lines[number * 300 : number * 300 + 300]), encoding="utf-8")
    answers = set()
    for number in range(5):
        files = [whole] if number < 3 else cuts
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "RAYON_NUM_THREADS": str(number % 3 + 1)}
        command = [sys.executable, "-c", PROGRAM, *map(str, files)]
        answers.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(answers) == 1, answers


# ---- folders ----


def test_fingerprint_follows_what_changes_ids(folders, tmp_path):
    folder = folders("wordpiece", "mecab")
    before = load_encoder(folder).fingerprint
    shutil.copytree(folder, tmp_path / "moved")
    assert load_encoder(tmp_path / "moved").fingerprint == before
    settings = json.loads((tmp_path / "moved" / "tokenizer_config.json").read_text())
    (tmp_path / "moved" / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 128}))
    assert load_encoder(tmp_path / "moved").fingerprint == before
    (tmp_path / "moved" / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": True}))
    assert load_encoder(tmp_path / "moved").fingerprint != before
    assert len({load_encoder(folders(*key)).fingerprint for key in (("unigram", "mecab"), ("unigram", "none"))}) == 2


def test_encoder_goes_to_other_processes(folders):
    encoder = load_encoder(folders("wordpiece", "mecab"))
    again = pickle.loads(pickle.dumps(encoder))
    assert again.fingerprint == encoder.fingerprint
    assert again.encode(["東京の天気"]).ids.tolist() == encoder.encode(["東京の天気"]).ids.tolist()


def test_word_cache_is_bounded(folders, monkeypatch):
    from lmscripts.tokenizer import encoder as tokenization

    monkeypatch.setattr(tokenization, "MAX_CACHED_WORDS", 50)
    check_encoder(load_encoder(folders("wordpiece", "mecab")), sample_lines()[:100])


def test_check_names_the_first_line_that_differs(folders):
    encoder = load_encoder(folders("wordpiece", "mecab"))
    encoder.encode(["東京の天気"])
    encoder._encode.cache["東京"] = np.array([7], np.uint32).tobytes()
    with pytest.raises(UserError, match="differ on the line '東京の天気'"):
        check_encoder(encoder, ["明日は雨。", "東京の天気"])


def test_report_counts(folders):
    encoder = load_encoder(folders("wordpiece", "mecab"))
    report = tokenizer_report(encoder, ["東京の天気", "ᚠ"])
    assert (report["lines"], report["characters"], report["unknown_tokens"]) == (2, 6, 1)
    assert report["words"] == len(make_segmenter(WordTokenizer())("東京の天気")) + 1
    assert report["tokens_per_word"] == pytest.approx(report["tokens"] / report["words"])
    assert "unknown tokens" in report_table(report)
    assert "-" in report_table(tokenizer_report(encoder, []))


def test_combinations_without_a_tokenizer_class():
    for kind in ("mecab", "sudachi"):
        with pytest.raises(UserError, match="byte-level BPE"):
            check_combination("bpe", WordTokenizer(kind))
    with pytest.raises(UserError, match="NFKC"):
        check_combination("character", WordTokenizer(normalization="none"))


def test_folder_that_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_encoder(tmp_path / "none")
    with pytest.raises(UserError, match="no tokenizer"):
        load_encoder(tmp_path)


def test_replacing_a_folder_loses_nothing(tmp_path):
    folder = tmp_path / "tokenizer"
    with replaced_folder(folder, overwrite=False) as aside:
        (aside / "vocab.txt").write_text("one")
    with pytest.raises(UserError, match="--overwrite"), replaced_folder(folder, overwrite=False):
        pass
    with pytest.raises(FileNotFoundError), replaced_folder(folder, overwrite=True) as aside:
        (aside / "missing" / "vocab.txt").write_text("two")
    assert (folder / "vocab.txt").read_text() == "one"
    with replaced_folder(folder, overwrite=True) as aside:
        (aside / "vocab.txt").write_text("two")
    assert (folder / "vocab.txt").read_text() == "two"
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "vocab.txt").stat().st_mode & 0o777 == 0o666 & ~umask
    (folder / "thesis.doc").write_text("")
    with pytest.raises(UserError, match=r"thesis\.doc"), replaced_folder(folder, overwrite=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer"]


def test_same_files_in_every_process(folders, tmp_path):
    """The folder itself holds no times, paths or orders that change."""
    digests = set()
    for name in ("one", "two"):
        folder = make_folder(tmp_path / name, "wordpiece", WordTokenizer())
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        digests.add(json.dumps(files, sort_keys=True))
    assert len(digests) == 1
