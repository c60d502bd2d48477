"""Folding: nothing lost, no word cut that fits, spans that are the text, special tokens of the tokenizer."""

import random
import unicodedata
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from test_tokenization import HOSTILE, make_folder, sample_lines, words_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lmscripts.data.folding import Folder, FoldSettings, special_tokens_around
from lmscripts.errors import UserError
from lmscripts.tokenizer.alignment import Aligner, _only_places
from lmscripts.tokenizer.encoder import Encoder, load_encoder, special_tokens
from lmscripts.tokenizer.folder import write_tokenizer
from lmscripts.tokenizer.training import VocabularySettings, train_vocabulary


def fold(encoder, texts, settings):
    return Folder(encoder, settings)(texts)


EXAMPLE = "Beat my Republican opponent! She will remove stop signs from your neighborhood."
KINDS = [
    "wordpiece mecab", "character mecab", "unigram mecab", "wordpiece sudachi", "wordpiece whitespace",
    "unigram whitespace", "wordpiece none", "unigram none", "bpe none", "causal bpe", "causal unigram",
    "foreign bert", "foreign roberta", "foreign t5",
]  # fmt: skip
JAPANESE = ("wordpiece mecab", "character mecab", "unigram mecab", "wordpiece sudachi")
LENGTHS = (5, 16, 40)


def make_causal(folder, kind):
    words = words_of("none", normalization="none")
    text = folder.with_suffix(".txt")
    text.write_text("".join(line + "\n" for line in sample_lines() + sample_lines("english.txt")), encoding="utf-8")
    settings = VocabularySettings(size=2500, causal=True)
    trained = train_vocabulary(kind, [text], settings, segmented=False)
    folder.mkdir()
    write_tokenizer(folder, trained, kind, words, causal=True, model_max_length=512, record={})


def make_foreign(folder, kind):
    """Tokenizers as other people make them: lower-casing, a space in front of a piece, other special tokens."""
    lines = sample_lines("english.txt") + sample_lines()[:100]
    if kind == "bert":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special)
        template = ("[CLS] $A [SEP]", ["[CLS]", "[SEP]"])
    elif kind == "roberta":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
        template = None
    else:
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(vocab_size=2000, special_tokens=special, unk_token="<unk>")
        template = ("$A </s>", ["</s>"])
    made.train_from_iterator(lines, trainer)
    ids = {token: made.token_to_id(token) for token in special}
    made.post_processor = (
        processors.TemplateProcessing(single=template[0], special_tokens=[(t, ids[t]) for t in template[1]])
        if template
        else processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True)
    )
    pad = next(token for token in special if "pad" in token.lower())
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad).save_pretrained(folder)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    place, made = tmp_path_factory.mktemp("folding"), {}

    def get(name):
        if name not in made:
            kind, words = name.split()
            folder = place / name.replace(" ", "_")
            if kind == "causal":
                make_causal(folder, words)
            elif kind == "foreign":
                make_foreign(folder, words)
            else:
                # Few characters, so that there are unknown ones, of which the pieces say nothing.
                settings = VocabularySettings(size=2500, **({} if kind == "unigram" else {"limit_alphabet": 600}))
                lines = sample_lines() + sample_lines("english.txt")
                make_folder(folder, kind, words_of(words), settings, lines)
            made[name] = load_encoder(folder)
        return made[name]

    return get


def texts_of():
    """Real texts of all lengths, with line feeds and tabs, and hostile ones."""
    choose = random.Random(3)
    lines = sample_lines() + sample_lines("english.txt")
    joined = ["\n".join(choose.sample(lines, choose.randint(1, 4))) for _ in range(30)]
    mixed = [choose.choice(HOSTILE) + choose.choice(lines) + choose.choice(HOSTILE) for _ in range(40)]
    strange = [EXAMPLE, "  \n lead " + EXAMPLE + "\r\n\t ", "か\u3099き\u3099く\u3099" * 9, "ｶﾞｷﾞｸﾞ ㈱㍻元年 ﬁne" * 5]
    strange += [
        "㌔㍍" * 20,
        "\u1112\u1161\u11ab\u1100\u1173\u11af" * 9,
        "e\u0301a\u0308" * 20,
        "a\nb\n\nc" * 9,
        "𠮷野家𩸽" * 12,
    ]
    strange += ["[CLS] <s> </s> literal [SEP] tokens [MASK] あ[UNK]い " * 3, "\u200b", "x" * 400]
    return joined + mixed + strange + HOSTILE


TEXTS = texts_of()


def text_ids(encoder, folds):
    """The ids of the rows without special tokens and repeated ones."""
    before, after = special_tokens_around(encoder.tokenizer)
    parts = [f.ids[len(before) + f.num_repeated : len(f.ids) - len(after)] for f in folds]
    return np.concatenate(parts).tolist() if parts else []


def settings_to_try():
    for length in LENGTHS:
        yield FoldSettings(max_length=length)
        yield FoldSettings(max_length=length, balance=True)
        yield FoldSettings(max_length=length, unit="words", max_words=4)
    yield FoldSettings(max_length=16, overlap=5)
    yield FoldSettings(max_length=16, overlap=11, balance=True)
    yield FoldSettings(max_length=40, unit="words", max_words=6, overlap=5)


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_ids_of_the_whole_text_and_spans_are_the_text(encoders, name):
    encoder = encoders(name)
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    asked = {"add_special_tokens": False, "split_special_tokens": True}
    whole = [tokenizer(text, **asked)["input_ids"] for text in TEXTS]
    for place, text in enumerate(TEXTS):
        if any(token in unicodedata.normalize("NFKC", text) for token in special_tokens(tokenizer)):
            whole[place] = encoder.encode([text]).ids.tolist()  # where a vocabulary has the piece, only we see text
    before, after = special_tokens_around(tokenizer)
    for settings in settings_to_try():
        for text, ids, folds in zip(TEXTS, whole, fold(encoder, TEXTS, settings)):
            if not text.strip():
                assert folds == []
                continue
            assert text_ids(encoder, folds) == ids, (settings, text)
            assert [(f.idx, f.n) for f in folds] == [(place, len(folds)) for place in range(len(folds))]
            for f in folds:
                assert f.ids.dtype == np.int32
                assert len(f.ids) <= settings.max_length
                assert f.num_tokens == len(f.ids) - len(before) - len(after) > f.num_repeated
                assert f.ids[: len(before)].tolist() == before.tolist()
                assert f.ids[len(f.ids) - len(after) :].tolist() == after.tolist()
            if not folds:
                continue
            assert (folds[0].char_start, folds[-1].char_end) == (0, len(text))
            for a, b in pairwise(folds):
                assert a.char_start <= b.char_start <= a.char_end <= b.char_end
                assert settings.overlap or b.char_start == a.char_end


@pytest.mark.parametrize("name", KINDS)
def test_no_word_is_cut_where_it_fits(encoders, name):
    """A cut lies before a word of the encoder and never inside a run of letters that is written between spaces."""
    encoder = encoders(name)
    lines = [text for text in sample_lines("english.txt") + sample_lines() if len(text) > 60]
    for settings in (FoldSettings(max_length=24), FoldSettings(max_length=24, balance=True, overlap=4)):
        cuts = 0
        for text, folds in zip(lines, fold(encoder, lines, settings)):
            flags = encoder.encode([text]).word_starts
            place = 0
            for a, b in pairwise(folds):
                place += a.num_tokens - a.num_repeated
                words = text[: a.char_end].split()[-1], text[a.char_end :].split()[0]
                joined = text[a.char_end - 1].isspace() or text[a.char_end - 1 : a.char_end + 1].isspace()
                ascii_only = (words[0][-1] + words[1][0]).isascii()
                alone = len(encoder.encode(["".join(words)]).ids) > 20
                assert joined or not ascii_only or alone, (name, words)
                assert flags[place] or alone, (name, words)
                cuts += 1
                assert b.idx == a.idx + 1
        assert cuts > 40


@pytest.mark.parametrize("name", JAPANESE)
def test_spans_of_japanese_rows_hold_their_own_characters(encoders, name):
    """Each row's span, encoded by itself, gives the row's characters back, whatever NFKC did to the lengths."""
    encoder = encoders(name)
    lines = [line for line in sample_lines() if len(line) > 40]
    texts = lines[:60] + [f"㈱{a}ｶﾞ㍻か\u3099{b}Ⅷ㌔\n{a}" for a, b in pairwise(lines[:40])]
    checked = 0
    for text, folds in zip(texts, fold(encoder, texts, FoldSettings(max_length=20))):
        for f in folds:
            pieces = encoder.tokenizer.convert_ids_to_tokens(f.ids[1:-1].tolist())
            shown = "".join(p.removeprefix("##").replace("▁", "") for p in pieces)
            normal = "".join(unicodedata.normalize("NFKC", text[f.char_start : f.char_end]).split())
            if "[UNK]" not in shown:
                assert shown == normal
                checked += 1
            else:
                known = [part for part in shown.split("[UNK]") if part]
                assert all(part in normal for part in known)
                assert not known or shown.startswith("[UNK]") or normal.startswith(known[0])
                assert not known or shown.endswith("[UNK]") or normal.endswith(known[-1])
    assert checked > 60


@pytest.mark.parametrize("name", ["wordpiece mecab", "wordpiece sudachi"])
def test_pieces_and_words_of_the_analyser_agree_on_where_words_begin(encoders, name):
    encoder = encoders(name)
    aligner, compared = Aligner(encoder.tokenizer), 0
    for text in TEXTS + sample_lines():
        encoded, normal = encoder.encode([text]), unicodedata.normalize("NFKC", text)
        by_pieces = aligner._by_pieces(normal, encoded.ids)
        by_words = aligner._by_words(text, normal, encoded.word_starts)
        if by_pieces is not None and by_words is not None and len(encoded.ids):
            assert by_pieces[encoded.word_starts].tolist() == by_words[encoded.word_starts].tolist(), text
            compared += encoder.unk_id in encoded.ids
    assert compared > 50


def test_runs_between_unknown_characters_are_placed_only_where_there_is_one_way():
    """Against all ways, tried one by one."""

    def ways(text, runs, place):
        if not runs:
            return [[]] if place == len(text) else []
        starts = [0] if place < 0 else range(place + 1, len(text) + 1)
        fits = [start for start in starts if text.startswith(runs[0], start)]
        return [[start, *rest] for start in fits for rest in ways(text, runs[1:], start + len(runs[0]))]

    choose, found = random.Random(1), Counter()
    for _ in range(5000):
        runs = ["".join(choose.choices("ab", k=choose.randint(0, 3))) for _ in range(choose.randint(1, 4))]
        gaps = ["".join(choose.choices("abc", k=choose.randint(1, 2))) for _ in runs[1:]] + [""]
        text = "".join(run + gap for run, gap in zip(runs, gaps))
        text = text if choose.random() < 0.8 else "".join(choose.choices("abc", k=choose.randint(0, 6)))
        (*_, only) = [None] if len(all_ways := ways(text, runs, -1)) != 1 else all_ways
        assert _only_places(text, runs) == only, (text, runs)
        found[only is None] += 1
    assert min(found.values()) > 1000


def test_the_example_of_the_document_gives_its_three_rows(encoders):
    for name in ("foreign bert", "foreign roberta", "wordpiece whitespace", "causal bpe", "wordpiece mecab"):
        for text in (EXAMPLE, f" \n\n {EXAMPLE}\n\n \n", EXAMPLE.replace(" ", "\n\n")):  # white space is no word
            (folds,) = fold(encoders(name), [text], FoldSettings(unit="words", max_words=4))
            assert [" ".join(text[f.char_start : f.char_end].split()) for f in folds] == [
                "Beat my Republican opponent!",
                "She will remove stop",
                "signs from your neighborhood.",
            ]


def test_special_tokens_are_those_of_the_tokenizer(encoders):
    expected = {"foreign roberta": (["<s>"], ["</s>"]), "foreign t5": ([], ["</s>"]), "causal bpe": (["<s>"], [])}
    expected["wordpiece mecab"] = (["[CLS]"], ["[SEP]"])
    for name, (before, after) in expected.items():
        tokenizer = encoders(name).tokenizer
        found = special_tokens_around(tokenizer)
        assert [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in found] == [before, after]


@pytest.mark.parametrize("name", KINDS)
def test_a_special_token_written_in_a_text_is_text(encoders, name):
    """A second </s> made models fail that look for the end, and any [SEP] or <pad> told them of a row's inside."""
    encoder = encoders(name)
    tokens = sorted(set(encoder.tokenizer.all_special_tokens))
    texts = [f"{place} {token} {place}{token}" for place in ("a", "dog") for token in tokens] + ["".join(tokens)]
    folder = Folder(encoder, FoldSettings(max_length=40))
    encoder.tokenizer(texts[0], split_special_tokens=False)  # whoever asks for something else changes nothing
    special = set(encoder.special_ids) - {encoder.unk_id}
    for text, folds in zip(texts, folder(texts), strict=True):
        ids = text_ids(encoder, folds)
        assert len(ids) > 0
        assert not special & set(ids), text
    plain = "dog < a > s"
    (expected,) = encoder.encode([plain]).rows()
    assert text_ids(encoder, folder([plain])[0]) == expected.tolist()


def test_added_words_of_a_slow_tokenizer_stay_words(encoders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(encoders("wordpiece mecab").folder)
    tokenizer.add_tokens(["東京ドーム計画"])
    tokenizer.save_pretrained(tmp_path)
    folder = Folder(load_encoder(tmp_path), FoldSettings(max_length=40))
    ids = text_ids(folder.encoder, folder(["東京ドーム計画[SEP]の星"])[0])
    assert ids[:2] == [folder.encoder.tokenizer.convert_tokens_to_ids("東京ドーム計画"), folder.encoder.unk_id]
    assert folder.encoder.sep_id not in ids


def test_a_word_longer_than_a_row_is_cut_between_characters_and_every_other_word_stays_whole(encoders):
    text = "short https://example.org/" + "a1b2" * 60 + " words follow here"
    emoji = "😀😃😄😁😆😅🤣😂" * 8
    for name in ("foreign roberta", "causal bpe", "causal unigram", "foreign bert"):
        encoder = encoders(name)
        long, faces = fold(encoder, [text, emoji], FoldSettings(max_length=16))
        assert text_ids(encoder, long) == encoder.encode([text]).ids.tolist()
        inside = [f.char_end for f in long if f.char_end < len(text) and not text[f.char_end - 1].isspace()]
        assert all(6 < place < text.index(" words") for place in inside)
        assert [f.char_end for f in faces] == sorted({f.char_end for f in faces})
        if name.startswith("causal"):
            shown = [encoder.tokenizer.decode(f.ids, skip_special_tokens=True) for f in faces]
            assert "\ufffd" not in "".join(shown)
            assert "".join(shown) == emoji


def test_balance_keeps_the_number_of_rows_and_evens_them_out(encoders):
    encoder = encoders("wordpiece mecab")
    texts = ["".join(sample_lines()[start : start + 6]) for start in range(0, 120, 6)]
    full = fold(encoder, texts, FoldSettings(max_length=64))
    even = fold(encoder, texts, FoldSettings(max_length=64, balance=True))
    spread = {"full": [], "even": []}
    for a, b in zip(full, even):
        assert len(a) == len(b)
        for name, folds in (("full", a), ("even", b)):
            spread[name].append(max(f.num_tokens for f in folds) - min(f.num_tokens for f in folds))
    assert np.mean(spread["full"]) > 15
    assert max(spread["even"]) <= 12


def test_overlap_repeats_whole_words_and_at_most_what_was_asked(encoders):
    encoder = encoders("wordpiece mecab")
    text = "".join(sample_lines()[:20])
    (folds,) = fold(encoder, [text], FoldSettings(max_length=34, overlap=8))
    for a, b in pairwise(folds):
        assert 1 <= b.num_repeated <= 8
        assert a.ids[-1 - b.num_repeated : -1].tolist() == b.ids[1 : 1 + b.num_repeated].tolist()
        assert b.char_start < a.char_end
    (words,) = fold(encoder, [EXAMPLE], FoldSettings(unit="words", max_words=4, overlap=1))
    shown = [EXAMPLE[f.char_start : f.char_end].split() for f in words]
    assert all(b[0] == a[-1] for a, b in pairwise(shown))


def test_policies_and_the_limit_of_rows(encoders):
    encoder = encoders("wordpiece mecab")
    text = "".join(sample_lines()[:20])
    ids = encoder.encode([text]).ids.tolist()
    (folds,) = fold(encoder, [text, "短い文。"], FoldSettings(max_length=34))[:1]
    (one,) = fold(encoder, [text], FoldSettings(max_length=34, policy="truncate"))[0]
    assert one.ids.tolist() == folds[0].ids.tolist()
    assert (one.idx, one.n, one.char_start, one.char_end) == (0, 1, 0, folds[0].char_end)
    (both,) = fold(encoder, [text], FoldSettings(max_length=34, policy="head_tail"))[0]
    inner = both.ids[1:-1].tolist()
    head = next(size for size in range(len(inner), 0, -1) if inner[:size] == ids[:size])
    assert 4 <= head <= 8 < len(inner) <= 32
    assert inner[head:] == ids[len(ids) - len(inner) + head :]
    assert (both.char_start, both.char_end) == (0, len(text))
    (three,) = fold(encoder, [text], FoldSettings(max_length=34, most_folds=3))
    assert [f.ids.tolist() for f in three] == [f.ids.tolist() for f in folds[:3]]
    assert {f.n for f in three} == {3}
    assert three[-1].char_end == folds[2].char_end
    for policy in ("truncate", "head_tail"):
        (short,) = fold(encoder, ["短い文。"], FoldSettings(max_length=34, policy=policy))[0]
        assert short.num_tokens == len(encoder.encode(["短い文。"]).ids)


def test_many_texts_are_one_call_of_the_encoder_and_do_not_depend_on_one_another(encoders, monkeypatch):
    encoder = encoders("unigram mecab")
    folder = Folder(encoder, FoldSettings(max_length=24))
    alone = [folder([text])[0] for text in TEXTS]
    calls, encode = [], type(encoder).encode
    monkeypatch.setattr(type(encoder), "encode", lambda self, lines: calls.append(len(lines)) or encode(self, lines))
    together = folder(TEXTS)
    assert calls == [len(TEXTS)]
    for a, b in zip(alone, together):
        assert [(f.ids.tolist(), f.char_start, f.char_end) for f in a] == [
            (f.ids.tolist(), f.char_start, f.char_end) for f in b
        ]
    assert folder([]) == []


@pytest.mark.parametrize("name", ["foreign bert", "causal bpe", "wordpiece mecab"])
def test_nothing_is_lost_when_the_tokenizer_was_called_with_truncation_in_between(encoders, name):
    """A call of transformers leaves its truncation and padding set in a fast tokenizer."""
    encoder, texts = encoders(name), [EXAMPLE * 5, "short", "今日は晴れ。" * 30]
    folder = Folder(encoder, FoldSettings(max_length=16))
    before = folder(texts)
    if encoder.tokenizer.pad_token is None:
        encoder.tokenizer.pad_token = encoder.tokenizer.eos_token
    encoder.tokenizer(texts, truncation=True, max_length=10, padding="max_length")
    for a, b in zip(before, folder(texts), strict=True):
        assert [(f.ids.tolist(), f.char_end) for f in a] == [(f.ids.tolist(), f.char_end) for f in b]


def test_a_tokenizer_of_transformers_serves_as_well(encoders):
    encoder = encoders("foreign bert")
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    settings = FoldSettings(max_length=12)
    for a, b in zip(fold(encoder, TEXTS, settings), fold(Encoder(encoder.folder, tokenizer), TEXTS, settings)):
        assert [f.ids.tolist() for f in a] == [f.ids.tolist() for f in b]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_length": 16, "overlap": 16}, "overlap of 16"),
        ({"overlap": -1}, "overlap of -1"),
        ({"unit": "words"}, "max_words"),
        ({"max_words": 4}, "max_words"),
        ({"unit": "words", "max_words": 4, "overlap": 4}, "overlap of 4 words"),
        ({"most_folds": 0}, "most_folds"),
        ({"unit": "lines"}, "'lines'"),
        ({"policy": "truncate", "overlap": 3}, "one row"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        FoldSettings(**settings)


def test_a_row_without_room_for_text_is_refused(encoders):
    with pytest.raises(UserError, match="2 special tokens"):
        fold(encoders("foreign bert"), ["a"], FoldSettings(max_length=2))
