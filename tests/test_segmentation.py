"""Words are those of transformers' Japanese tokenizers."""

import importlib.util
from pathlib import Path

import pytest
from transformers.models.bert_japanese.tokenization_bert_japanese import MecabTokenizer, SudachiTokenizer

from lmscripts.errors import UserError
from lmscripts.text.words import WordTokenizer, make_segmenter, numeral_run_finder

SAMPLE = Path(__file__).parent.parent / "sample_data" / "articles.txt"
HOSTILE = [
    "", " ", "\u3000", "今日は　晴れ", "a\tb", "a\u00a0b", "a\u2028b", "a\u2028", "末尾\u0085", "\u0085",
    "x\x1f", "a\u200bb", "\ufeffx",
    "  前と後ろ  ", "a  b", "ａｂｃ１２３", "㈱㍻①ｶﾞｷﾞ", "が\u3099", "a\u0301", "\u1680", "a\x0bb\x0cc",
    "a\rb", "あ\x00い", "😀👨‍👩‍👧🇯🇵",
    "[MASK]と[CLS]", "［ＭＡＳＫ］", "EOS", "ア" * 300, "これはテストです。" * 3000, "x" * 20_000,
    "\U00020bb7野家", "\ufffd", "٣٤ кот 고양이",
]  # fmt: skip


def lines():
    return [line for line in SAMPLE.read_text(encoding="utf-8").splitlines() if line] + HOSTILE


@pytest.mark.parametrize("dictionary", ["ipadic", "unidic_lite"])
@pytest.mark.parametrize("normalization", ["nfkc", "none"])
def test_mecab_words_are_those_of_transformers(dictionary, normalization):
    pytest.importorskip(dictionary)
    segment = make_segmenter(WordTokenizer(dictionary=dictionary, normalization=normalization))
    exact = MecabTokenizer(mecab_dic=dictionary, normalize_text=normalization == "nfkc")
    for line in lines():
        assert segment(line) == exact.tokenize(line), repr(line[:80])


def test_mecab_dictionary_by_folder_and_options():
    ipadic = pytest.importorskip("ipadic")
    settings = WordTokenizer(dictionary=ipadic.DICDIR)
    assert settings.analyser_kwargs()["mecab_dic"] is None
    exact = MecabTokenizer(**settings.analyser_kwargs())
    by_name = MecabTokenizer(mecab_dic="ipadic")
    segment = make_segmenter(settings)
    assert all(segment(line) == exact.tokenize(line) == by_name.tokenize(line) for line in lines())
    # An output format changes MeCab's string, not the words.
    assert make_segmenter(WordTokenizer(option="-Oyomi"))("東京都に行く") == by_name.tokenize("東京都に行く")


@pytest.mark.parametrize("mode", ["A", "C"])
def test_sudachi_words_are_those_of_transformers(mode):
    pytest.importorskip("sudachidict_small")
    settings = WordTokenizer("sudachi", sudachi_split_mode=mode, sudachi_dictionary="small")
    segment, exact = make_segmenter(settings), SudachiTokenizer(**settings.analyser_kwargs())
    for line in lines():
        if len(line.encode()) <= 49149:
            assert segment(line) == exact.tokenize(line), repr(line[:80])


def test_sudachi_takes_lines_beyond_its_limit():
    pytest.importorskip("sudachidict_small")
    segment = make_segmenter(WordTokenizer("sudachi", sudachi_dictionary="small"))
    assert segment("これはテストです。" * 10_000) == segment("これはテストです。") * 10_000
    assert "".join(segment("ア" * 50_000)) == "ア" * 50_000


def test_whitespace_and_none():
    assert make_segmenter(WordTokenizer("whitespace"))("Don't  stop, ﬁsh!") == [
        "Don",
        "'",
        "t",
        "stop",
        ",",
        "fish",
        "!",
    ]
    assert make_segmenter(WordTokenizer("none"))("Don't  stop,\u3000ﬁsh!") == ["Don't", "stop,", "fish!"]
    assert make_segmenter(WordTokenizer("none", normalization="none"))("ﬁsh") == ["ﬁsh"]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (WordTokenizer(dictionary="/no/such/folder"), "ipadic, unidic_lite, unidic or a folder"),
        (WordTokenizer(dictionary="naist"), "ipadic, unidic_lite, unidic or a folder"),
        (WordTokenizer(option="/etc/mecabrc"), "-r FILE"),
    ],
)
def test_impossible_dictionaries_are_named(settings, advice):
    with pytest.raises(UserError, match=advice):
        make_segmenter(settings)


def test_missing_dictionary_says_how_to_install_it(monkeypatch, tmp_path):
    import importlib

    def missing(name):
        raise ModuleNotFoundError(name)

    with pytest.raises(UserError, match="compiled dictionary"):
        make_segmenter(WordTokenizer(dictionary=str(tmp_path)))
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install unidic-lite"):
        make_segmenter(WordTokenizer(dictionary="unidic_lite"))


def test_numeral_runs_of_ipadic():
    segment = make_segmenter(WordTokenizer())
    numeral_runs = numeral_run_finder(WordTokenizer())
    assert numeral_runs(" ".join(segment("第3四半期連結会計期間末日満期手形"))) == ["四半期連結会計期間末日満期手形"]
    assert numeral_runs(" ".join(segment("第3四半期報告書は百貨店の一般管理費について述べる。"))) == []
    assert segment("九州芸術工科大学") == ["九州芸術工科大学"]  # an entry of the dictionary
    assert numeral_runs("九州芸術工科大学 と 四半期連結会計期間末日満期手形") == ["四半期連結会計期間末日満期手形"]
    assert numeral_run_finder(WordTokenizer(kind="none"))("四半期連結会計期間末日満期手形") == []


def test_a_dictionary_of_sudachi_that_is_installed_is_named():
    pytest.importorskip("sudachidict_small")
    missing = next(name for name in ("full", "core") if importlib.util.find_spec(f"sudachidict_{name}") is None)
    with pytest.raises(UserError, match=rf"pip install SudachiPy sudachidict_{missing}; --sudachi_dict \w+ is inst"):
        make_segmenter(WordTokenizer("sudachi", sudachi_dictionary=missing))


@pytest.mark.parametrize("piece", ["ab1/", "7", "東京の天気は晴れ。", "漢", "x ", "\u0e2a\u0e27\u0e31"])
def test_lines_that_mecab_cannot_bear_are_cut(piece):
    """Each of these, of 120,000 characters, may end the process or takes minutes where MeCab gets all of it."""
    segment = make_segmenter(WordTokenizer(dictionary="ipadic"))
    line = piece * (120_000 // len(piece))
    words = segment(line)
    assert "".join(words) == line.replace(" ", "")
    if piece.endswith(("。", " ")):  # a cut behind a sentence, or at a space, changes no word
        assert words == segment(piece) * (120_000 // len(piece))
    assert max(map(len, words)) < 100
