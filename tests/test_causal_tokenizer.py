"""Tokenizers for causal models: no text is lost, line feeds are learnt, and everything loads without this package."""

import itertools
import json
import random
import re
import sys

import forked
import numpy as np
import pytest
from conftest import SAMPLE, run_script
from transformers import AutoTokenizer

from lmscripts.data.preparation import Source, describe_source, prepare_store
from lmscripts.data.token_store import store_fingerprint
from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.text.words import WordTokenizer
from lmscripts.tokenizer.encoder import load_encoder
from lmscripts.tokenizer.folder import fast_tokenizer, write_tokenizer
from lmscripts.tokenizer.report import (
    DIFFICULT_LINES,
    check_encoder,
    check_lossless,
    keeps_line_feeds,
    readable_pieces,
)
from lmscripts.tokenizer.training import PRINTABLE_ASCII, Trained, VocabularySettings, train_vocabulary

KINDS = ("unigram", "bpe")
AS_IT_IS = WordTokenizer(kind="none", normalization="none")
ARTICLES = SAMPLE / "articles.txt"


def train(folder, kind, *more, text=ARTICLES, **settings):
    arguments = ["--input_file", text, "--model_dir", folder, "--objective", "causal", "--tokenizer_type", kind]
    return run_script("train_tokenizer.py", *arguments, "--vocab_size", 2000, "--num_workers", 1, *more, **settings)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    return {kind: (folder / kind, train(folder / kind, kind).stdout) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request, outputs):
    return outputs[request.param][0]


def digests(folder):
    return {path.name: file_sha256(path) for path in folder.iterdir()}


def random_texts(number, seed=11):
    """Valid Unicode of all kinds: whole ranges, what is awkward, and pieces of real text."""
    pick = random.Random(seed)
    real = ARTICLES.read_text(encoding="utf-8")
    awkward = [
        *DIFFICULT_LINES,
        "\n",
        "\r\n",
        "\r",
        "\t",
        " ",
        "  ",
        "\u3000",
        "\u00a0",
        "\u2009",
        "▁",
        "<0x0A>",
        "<0xE3>",
    ]
    awkward += [
        "<s>",
        "</s>",
        "<pad>",
        "<unk>",
        "[unused0]",
        "##",
        "\u200d",
        "\ufe0f",
        "\u0301",
        "Ġ",
        "Ċ",
        "\x00",
        "\ufffd",
    ]
    ranges = [(1, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (0x1F300, 0x1FA00)]
    for _ in range(number):
        parts = []
        for _ in range(pick.randint(1, 8)):
            choice = pick.random()
            if choice < 0.4:
                low, high = pick.choice(ranges)
                parts.append("".join(chr(pick.randrange(low, high)) for _ in range(pick.randint(1, 5))))
            elif choice < 0.8:
                parts.append(pick.choice(awkward))
            else:
                start = pick.randrange(len(real))
                parts.append(real[start : start + pick.randint(1, 20)])
        yield "".join(parts)


def test_report_and_check_of_the_command(outputs):
    for kind in KINDS:
        output = outputs[kind][1]
        assert re.search(r"checked: \d+ lines have the same ids", output)
        assert "lossless: " in output
        assert "unknown tokens        0" in output
        record = json.loads((outputs[kind][0] / "lmscripts_tokenizer.json").read_text())
        assert (record["objective"], record["tokenizer_type"]) == ("causal", kind)


def test_every_text_comes_back(folder):
    """Also without our package, and with special tokens left out as a generated text has them left out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*DIFFICULT_LINES, *random_texts(2500)]
    ids = tokenizer(texts)["input_ids"]
    special = set(tokenizer.all_special_ids)
    for text, row in zip(texts, ids):
        assert row[0] == tokenizer.bos_token_id
        assert not special & set(row[1:]), repr(text)
        assert tokenizer.decode(row, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in {number for row in ids for number in row}
    check_encoder(load_encoder(folder), texts)
    check_lossless(load_encoder(folder), texts[:200])


def test_text_that_reads_like_a_token_is_text(folder):
    """No text can end a document by itself; whoever wants the token gives its id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("<s>", "</s>", "a</s>b", "<0x0A>", "[unused1]", "<pad>"):
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(row) >= len(set(text)) - 1
        assert row != [tokenizer.convert_tokens_to_ids(text)]
        assert tokenizer.decode(row, skip_special_tokens=True) == text
    assert tokenizer.decode([2, *tokenizer("犬", add_special_tokens=False)["input_ids"], 3]) == "<s>犬</s>"


def test_folder_is_what_causal_models_expect(folder):
    program = (
        "import sys, json; sys.modules['lmscripts'] = None\n"
        "from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = [t.pad_token_id, t.unk_token_id, t.bos_token_id, t.eos_token_id]\n"
        "print(json.dumps([ids, [t.pad_token, t.unk_token, t.bos_token, t.eos_token], t.is_fast, len(t) % 64,\n"
        "    t.model_input_names, sorted(t('東京')), t('東京\\n')['input_ids'],\n"
        "    t('東京', '大阪')['input_ids'].count(2)]))"
    )
    done = forked.run([sys.executable, "-c", program, str(folder)])
    assert done.returncode == 0, done.stderr
    ids, tokens, fast, rest, names, keys, encoded, beginnings = json.loads(done.stdout)
    assert ids == [0, 1, 2, 3]
    assert tokens == ["<pad>", "<unk>", "<s>", "</s>"]
    assert (fast, rest) == (True, 0)
    assert sorted(names) == keys == ["attention_mask", "input_ids"]
    assert encoded[0] == 2
    assert 3 not in encoded
    assert beginnings == 1
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert [vocabulary[f"[unused{number}]"] for number in range(10)] == list(range(4, 14))


def test_beside_a_model_and_saved_again_it_is_the_same(folder, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_encoder(tmp_path)
    texts = [*DIFFICULT_LINES, *random_texts(100)]
    assert again.encode(texts).ids.tolist() == load_encoder(folder).encode(texts).ids.tolist()
    assert again.fingerprint == load_encoder(folder).fingerprint
    prompt = "今日は  \n<s>"
    generated = pipeline("text-generation", str(tmp_path))(prompt, max_new_tokens=3)[0]["generated_text"]
    assert generated.startswith(prompt)


def test_line_by_line_is_as_in_one_go(folder):
    """What a model is trained on, lines with their line feed, is what a prompt of several lines gives."""
    encoder = load_encoder(folder)
    lines = [line for line in ARTICLES.read_text(encoding="utf-8").split("\n") if line][:200]
    apart = encoder.encode([line + "\n" for line in lines]).ids.tolist()
    assert encoder.encode(["".join(line + "\n" for line in lines)]).ids.tolist() == apart
    assert encoder.tokenizer.decode(apart) == "".join(line + "\n" for line in lines)
    assert keeps_line_feeds(encoder)


def test_a_very_long_line(folder):
    """A line of 1 MB: as many tokens for its length as a tenth of it, and it comes back."""
    encoder = load_encoder(folder)
    text = (ARTICLES.read_text(encoding="utf-8").replace("\n", "") * 40)[:350_000]
    assert len(text.encode()) > 1e6
    long, short = (len(encoder.encode([part]).ids) for part in (text, text[: len(text) // 10]))
    assert 9.5 < long / short < 10.5
    check_lossless(encoder, [text, "あ" * 100_000, "\U0001f468" * 20_000])


def test_what_stood_between_spaces_before_is_the_same_again(outputs):
    """The cache of a byte-level BPE changes neither ids nor words; what is long is not kept in it."""
    encoder = load_encoder(outputs["bpe"][0])
    way = encoder._encode
    spaces = ["\x1c", "\x85", "\xa0", "\u3000", "\u200b", "\n\n", " \r\n", "\u0301 ", " \t", "\t "]
    lines = [" a  b", "don't 'll  've x", "", " ", "   ", "a" * 200, "a,b 12c_3 ...", "a b" * 30, *random_texts(50)]
    lines += [f"{a} {b}x{a}  {b} {a}" for a in spaces for b in ("", *spaces)]
    plain = way.encode(lines)
    for _ in range(2):
        encoded = encoder.encode(lines)
        assert np.array_equal(encoded.word_starts, plain.word_starts)
        ids = [encoder.tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
        assert [row.tolist() for row in encoded.rows()] == ids
    assert "a" in way.cache
    assert "a" * 200 not in way.cache


def test_word_starts(folder):
    """Spaces begin words, characters of unspaced scripts do, and a line feed is a word of its own."""
    encoder = load_encoder(folder)

    def words(text):
        encoded = encoder.encode([text])
        places = [*np.flatnonzero(encoded.word_starts), len(encoded.ids)]
        return [encoder.tokenizer.decode(encoded.ids[a:b].tolist()) for a, b in itertools.pairwise(places)]

    assert words("zebra xylophone quartz") == ["zebra", " xylophone", " quartz"]
    assert words("quick\nfox") == ["quick", "\n", "fox"]
    assert "".join(words("東京の天気は晴れ。")) == "東京の天気は晴れ。"
    assert len(words("東京の天気は晴れ。")) >= 4
    assert len(words("鱻驫")) == 2  # by their bytes
    assert words("quartz\n鱻") == ["quartz", "\n", "鱻"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_every_time(outputs, tmp_path, kind):
    """Another number of processes, of splits and of threads, another hash seed."""
    environment = {"PYTHONHASHSEED": "5", "RAYON_NUM_THREADS": "3"}
    arguments = ["--input_file", ARTICLES, "--model_dir", tmp_path / "t", "--objective", "causal", "--num_workers", 2]
    arguments += ["--tokenizer_type", kind, "--vocab_size", 2000, "--num_files", 5]
    run_script("train_tokenizer.py", *arguments, env=environment)
    assert digests(tmp_path / "t") == digests(outputs[kind][0])
    assert "holds this tokenizer already" in run_script("train_tokenizer.py", *arguments).stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokenizer_type", "wordpiece"], "--tokenizer_type wordpiece loses text"),
        (["--tokenizer_type", "character"], "--tokenizer_type character loses text"),
        (["--word_tokenizer", "mecab"], "--word_tokenizer mecab loses text"),
        (["--word_tokenizer", "whitespace"], "--word_tokenizer whitespace loses text"),
        (["--normalization", "nfkc"], "--normalization nfkc loses text"),
        (["--mecab_dic", "ipadic"], "--mecab_dic has no effect"),
        (["--vocab_size", "300"], "needs more than"),
        (["--vocab_size", "200", "--tokenizer_type", "bpe"], "256 bytes"),
    ],
)
def test_refusals(tmp_path, words, sentence):
    arguments = ["--input_file", ARTICLES, "--model_dir", tmp_path / "t", "--objective", "causal", *words]
    done = run_script("train_tokenizer.py", *arguments, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_awkward_training_text(tmp_path):
    """What sentencepiece keeps for itself, and text that reads like its bytes, in the text that is trained on."""
    text = tmp_path / "in.txt"
    lines = ["<0x0A> and <0x0A>", "▁mark▁ ▅ mark", "a\tb\tc", "if x:    return", "</s> <s>", "[unused0]", "東京　大阪"]
    text.write_text("\n".join(lines * 60), encoding="utf-8")
    arguments = ["--input_file", text, "--model_dir", tmp_path / "t", "--objective", "causal", "--vocab_size", 420]
    assert "lossless" in run_script("train_tokenizer.py", *arguments, "--num_workers", 1).stdout
    check_lossless(load_encoder(tmp_path / "t"), [*lines, *random_texts(300, seed=3)])


# ---- texts that leave characters out ----

ENGLISH = (SAMPLE / "english.txt").read_text(encoding="utf-8")
TEXTS = {
    "ascii": ENGLISH,
    "one line of ascii": ENGLISH.replace("\n", " "),
    "short line": ENGLISH.split("\n")[0],
    "japanese": "".join(one for one in ARTICLES.read_text(encoding="utf-8")[:9000] if not one.isascii() or one == "\n"),
    "short japanese line": "吾輩は猫である。",
    "one character": "a",
    "nothing but one character": "a" * 24,
    "two characters": "abab\n" * 300,
    "reads like bytes": "<0x0a><0xFF>\n<0x0a>\n" * 200,
    "reads like reserved": "[unused0] <s> [unused400]\n[unused400]\n</s>\n" * 100,
    "reserved by sentencepiece": "▅ ab▁\n" * 5000,
}


def vocabulary_settings(size):
    return VocabularySettings(size=size, causal=True, multiple=0)


def train_causal(kind, files, settings):
    return train_vocabulary(kind, files, settings, segmented=False)


def encoder_of(folder, trained, kind):
    folder.mkdir()
    write_tokenizer(folder, trained, kind, AS_IT_IS, causal=True, model_max_length=512, record={})
    return load_encoder(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_text_was_the_tokenizer_is_lossless(tmp_path, kind):
    for number, (name, text) in enumerate(TEXTS.items()):
        (tmp_path / "in.txt").write_text(text, encoding="utf-8")
        trained = train_causal(kind, [tmp_path / "in.txt"], vocabulary_settings(420))
        assert len(trained.pieces) <= 420
        assert len(set(trained.pieces)) == len(trained.pieces), name
        encoder = encoder_of(tmp_path / str(number), trained, kind)
        lines = [*DIFFICULT_LINES, *text.split("\n")[:50], *random_texts(100, seed=number)]
        check_lossless(encoder, lines)
        check_encoder(encoder, lines)


@pytest.mark.parametrize(("name", "size"), [("ascii", 420), ("japanese", 1600)])
def test_characters_that_sentencepiece_left_out_have_entries(tmp_path, name, size):
    """As many entries as were asked for; what was put in costs the worst pieces and changes no other text."""
    (tmp_path / "in.txt").write_text(TEXTS[name], encoding="utf-8")
    small, large = (train_causal("unigram", [tmp_path / "in.txt"], vocabulary_settings(each)) for each in (size, 9999))
    assert len(small.pieces) == size < len(large.pieces) < 9999
    scores = dict(zip(small.pieces[270:], small.scores[270:]))
    best = max((score, piece) for piece, score in zip(large.pieces, large.scores) if len(piece) > 1)[1]
    assert best in scores
    assert set(PRINTABLE_ASCII + " ") <= scores.keys()
    absent = set(PRINTABLE_ASCII) - set(TEXTS[name])
    assert len(absent) > 20
    used = {piece: score for piece, score in scores.items() if not set(piece) & absent}
    assert len(used) == len(scores) - len(absent)
    several = [score for piece, score in used.items() if len(piece) > 1]
    assert max(scores[character] for character in absent) <= min(several)
    assert min(scores.values()) > -100
    with_and_without = [
        fast_tokenizer(Trained(list(known), scores=list(known.values())), "unigram", AS_IT_IS, causal=True)
        for known in (dict(zip(small.pieces, small.scores)), dict(zip(small.pieces[:270], small.scores[:270])) | used)
    ]
    for line in TEXTS[name].split("\n")[:100]:
        before, after = (tokenizer.encode(line).tokens for tokenizer in with_and_without)
        assert before == after


@pytest.mark.parametrize(
    ("left_out", "put_in", "sentence"),
    [
        ("<", {}, "is not lossless"),
        ("x", {}, "is not lossless"),
        ("", {"<0x0a>": -5.0}, "is not lossless"),
        ("", {"[unused77]": -5.0}, r"takes text for \[unused77\]"),
    ],
)
def test_a_tokenizer_that_takes_text_for_something_else_is_found(tmp_path, left_out, put_in, sentence):
    """By the check alone, with no line of the user's that has such text."""
    (tmp_path / "in.txt").write_text(ENGLISH, encoding="utf-8")
    trained = train_causal("unigram", [tmp_path / "in.txt"], vocabulary_settings(420))
    scores = {piece: score for piece, score in zip(trained.pieces, trained.scores) if piece != left_out} | put_in
    encoder = encoder_of(tmp_path / "t", Trained(list(scores), scores=list(scores.values())), "unigram")
    with pytest.raises(UserError, match=sentence):
        check_lossless(encoder, [])


# ---- line ends in the store ----


def test_line_feeds_are_in_the_store(folder, tmp_path):
    source = Source((str(ARTICLES),), folder, validation_fraction=0.0)
    store = prepare_store(source, tmp_path / "one", 1)
    assert store.manifest["options"]["line_ends"] == "keep"
    part, encoder = store.part("train"), load_encoder(folder)
    documents = ARTICLES.read_text(encoding="utf-8").strip().split("\n\n")
    assert part.num_documents == len(documents)
    for number, document in enumerate(documents):
        start, end = part.document_tokens[number : number + 2]
        ids = part.tokens[start:end].tolist()
        assert encoder.tokenizer.decode(ids) == document
        assert ids == encoder.tokenizer(document, add_special_tokens=False)["input_ids"]
    # Every line feed is a word of its own.
    feed = encoder.encode(["\n"]).ids[0]
    starts, feeds = part.word_starts(0, part.tokens.size), part.tokens == feed
    assert feeds.sum() == sum(document.count("\n") for document in documents)
    assert starts[feeds].all()
    assert starts[1:][feeds[:-1]].all()
    again = prepare_store(source, tmp_path / "two", 2)
    for name in ("tokens", "word_starts", "document_tokens", "sentence_lengths"):
        paths = [opened.folder / "train" / f"{name}.bin" for opened in (store, again)]
        assert file_sha256(paths[0]) == file_sha256(paths[1])


def test_white_space_is_in_the_store(folder, tmp_path):
    """A program comes back with its indentation and its empty lines; all but the ends of the record is predicted."""
    texts = ["def f(x):\n    if x:\n        return 1  \n\n\nclass A:\n\tpass", "　段落の頭。\n\n　次の段落。 "]
    file = tmp_path / "programs.jsonl"
    file.write_text("".join(json.dumps({"text": f"\n{text}\n"}) + "\n" for text in texts), encoding="utf-8")
    store = prepare_store(Source((str(file),), folder, validation_fraction=0.0), tmp_path / "store", 1)
    part, tokenizer = store.part("train"), load_encoder(folder).tokenizer
    ends = part.document_tokens
    assert [tokenizer.decode(part.tokens[a:b].tolist()) for a, b in itertools.pairwise(ends)] == texts
    assert store.manifest["parts"]["train"]["text_bytes"] == sum(len(text.encode()) + 1 for text in texts)


def test_dropped_line_ends_are_the_store_of_before(folder, tmp_path, tokenizer_dir):
    encoder = load_encoder(folder)
    dropped = Source((str(ARTICLES),), folder, line_ends="drop")
    kept = Source((str(ARTICLES),), folder)
    described = describe_source(dropped)
    assert set(described["options"]) == {"validation_fraction", "max_documents", "document_per_line", "text_column"}
    expected = store_fingerprint(described["source"]["fingerprint"], encoder.fingerprint, described["options"])
    assert described["fingerprint"] == expected != describe_source(kept)["fingerprint"]
    store = prepare_store(dropped, tmp_path / "store", 1)
    assert encoder.encode(["\n"]).ids[0] not in store.part("train").tokens
    with pytest.raises(UserError, match="other options"):
        prepare_store(kept, tmp_path / "store", 1)
    # A tokenizer for masked models has no line feed: dropped by itself, and refused if asked for.
    assert "line_ends" not in describe_source(Source((str(ARTICLES),), tokenizer_dir))["options"]
    with pytest.raises(UserError, match="does not give a line feed back"):
        describe_source(Source((str(ARTICLES),), tokenizer_dir, line_ends="keep"))


def test_inspect_is_readable(outputs, tmp_path):
    for kind in KINDS:
        arguments = ["--input_file", ARTICLES, "--tokenizer_dir", outputs[kind][0], "--output_dir", tmp_path / kind]
        assert "line feeds" in run_script("prepare_corpus.py", *arguments, "--num_workers", 1).stdout
        output = run_script("prepare_corpus.py", "--inspect", tmp_path / kind).stdout
        first = next(line for line in output.split("\n") if line.startswith("document 0: "))
        shown = re.sub(r"[|·]|\\n.*|<0x..>", "", first.removeprefix("document 0: "))
        assert shown[:6] in ARTICLES.read_text(encoding="utf-8")
        assert len(shown) > 20
        assert "|\\n|" in output
        assert "ã" not in first
        tokenizer = AutoTokenizer.from_pretrained(outputs[kind][0])
        ids = tokenizer("鱻\n<s>é")["input_ids"]
        assert re.match(r"<s>.*(0xE9|\xe9)", "".join(readable_pieces(tokenizer, ids)), re.DOTALL)
