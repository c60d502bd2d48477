"""A trained vocabulary as a folder that `AutoTokenizer.from_pretrained` loads, without this package and offline.

Text that MeCab or Sudachi cuts goes to `BertJapaneseTokenizer` (vocab.txt or spiece.model); everything else to a
fast tokenizer (tokenizer.json). `lmscripts_tokenizer.json` records how the vocabulary was made.

Of a causal model's tokenizer nothing is normalised, so that it is lossless. `tokenizer(text)` puts <s> in front and
nothing behind, so that a prompt begins as a document does. Text in which "<s>" or "</s>" stands literally is text, as
is any other: `split_special_tokens` is on, the characters are encoded one by one, and no text can end a document by
itself. Whoever wants the token gives its id.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lmscripts import files
from lmscripts.errors import UserError, naming
from lmscripts.text.words import WordTokenizer
from lmscripts.tokenizer.encoder import model_kind
from lmscripts.tokenizer.training import (
    CAUSAL_SPECIAL_TOKENS,
    MAX_WORD_CHARACTERS,
    SENTENCEPIECE_TYPES,
    SPECIAL_TOKENS,
    TokenizerType,
    Trained,
)

RECORD_FILE = "lmscripts_tokenizer.json"
REPORT_FILE = "tokenizer_report.json"
# What transformers writes, and all that a tokenizer folder may hold: one with anything else is never replaced.
_VOCABULARIES = {"merges.txt", "spiece.model", "spiece.vocab", "tokenizer.json", "vocab.json", "vocab.txt"}
TRANSFORMERS_FILES = _VOCABULARIES | {"added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"}
FOLDER_FILES = TRANSFORMERS_FILES | {RECORD_FILE, REPORT_FILE, "config.yaml"}


def check_combination(tokenizer_type: TokenizerType, words: WordTokenizer, *, causal: bool = False) -> None:
    """Refuse what no tokenizer class of transformers does, and for a causal model what loses text, by a UserError."""
    if causal:
        spaces = "white space" + (" and words with unknown characters" if tokenizer_type == "wordpiece" else "")
        for option, value, lost, keeping in (
            ("tokenizer_type", tokenizer_type, spaces, ("bpe", "unigram")),
            ("word_tokenizer", words.kind, "the white space between words", ("none",)),
            ("normalization", words.normalization, "half and full width, U+3000, ligatures", ("none",)),
        ):
            if value not in keeping:
                loss = f"loses text ({lost}) that a causal model has to write"
                raise UserError(f"--{option} {value} {loss}: take {' or '.join(keeping)}")
    if _is_japanese(words) and tokenizer_type == "bpe":
        raise UserError(
            f"transformers has no tokenizer that runs {words.kind} before byte-level BPE: take --tokenizer_type "
            "wordpiece or unigram, or --word_tokenizer none"
        )
    if _is_japanese(words) and tokenizer_type == "character" and words.normalization == "none":
        raise UserError(
            "the character tokenizer of transformers always normalises to NFKC: take --normalization nfkc, or "
            "--word_tokenizer none"
        )


def _is_japanese(words: WordTokenizer) -> bool:
    return words.kind in ("mecab", "sudachi")


def needs_words(tokenizer_type: TokenizerType, words: WordTokenizer) -> bool:
    """Whether training reads words joined by spaces instead of the lines themselves."""
    return tokenizer_type != "bpe" and words.kind != "none"


def write_tokenizer(
    folder: Path,
    trained: Trained,
    tokenizer_type: TokenizerType,
    words: WordTokenizer,
    *,
    causal: bool = False,
    model_max_length: int,
    record: dict[str, Any],
) -> None:
    """Write the files of a tokenizer into an empty folder; the record, further facts, goes to `RECORD_FILE`."""
    sentencepiece = tokenizer_type in SENTENCEPIECE_TYPES
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    common = {"model_max_length": model_max_length, "clean_up_tokenization_spaces": False}
    config: dict[str, Any]
    if causal:
        tokens = zip(("pad_token", "unk_token", "bos_token", "eos_token"), CAUSAL_SPECIAL_TOKENS)
        config = {**fast, "model_input_names": ["input_ids", "attention_mask"], **common}
        config |= {"split_special_tokens": True, **dict(tokens)}
    else:
        tokens = zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS)
        config = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], **common, **dict(tokens)}
        if _is_japanese(words):
            config |= {
                "tokenizer_class": "BertJapaneseTokenizer",
                "do_lower_case": False,
                "do_word_tokenize": True,
                "do_subword_tokenize": True,
                "word_tokenizer_type": words.kind,
                "subword_tokenizer_type": "sentencepiece" if sentencepiece else tokenizer_type,
                # Without explicit arguments transformers takes another dictionary than ipadic.
                f"{words.kind}_kwargs": words.analyser_kwargs(),
            }
        else:
            config |= fast
    if "word_tokenizer_type" not in config:
        made = fast_tokenizer(trained, tokenizer_type, words, causal=causal)
        (folder / "tokenizer.json").write_text(made.to_str(pretty=True), encoding="utf-8", newline="\n")
    elif sentencepiece:
        (folder / "spiece.model").write_bytes(trained.sentencepiece)
    else:
        text = "".join(f"{piece}\n" for piece in trained.pieces)
        (folder / "vocab.txt").write_text(text, encoding="utf-8", newline="\n")
    write_json(folder / "tokenizer_config.json", config)
    facts = {
        "tokenizer_type": tokenizer_type,
        "words": words.description(),
        "vocab_size": len(trained.pieces),
        "characters_kept": trained.num_characters,
        "characters_in_text": trained.num_text_characters,
        **({"objective": "causal"} if causal else {}),
        **record,
        "versions": library_versions(words),
    }
    write_json(folder / RECORD_FILE, facts)


def fast_tokenizer(
    trained: Trained, tokenizer_type: TokenizerType, words: WordTokenizer, *, causal: bool = False
) -> Tokenizer:
    """A tokenizer of the `tokenizers` library: normalisation, words, vocabulary, [CLS] A [SEP] (B [SEP]) or <s> A."""
    ids = {piece: number for number, piece in enumerate(trained.pieces)}
    separate = words.kind == "whitespace"
    cut: Any = pre_tokenizers.BertPreTokenizer() if separate else pre_tokenizers.WhitespaceSplit()
    steps: list[Any] = [normalizers.NFKC()] if words.normalization == "nfkc" else []
    if tokenizer_type == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS))
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=separate)
    elif tokenizer_type == "character":
        # BPE without merges is the model that looks up every character and keeps track of the words.
        tokenizer = Tokenizer(models.BPE(ids, [], unk_token="[UNK]", fuse_unk=False))
        tokenizer.decoder = decoders.Fuse()
    elif tokenizer_type == "bpe":
        tokenizer = Tokenizer(models.BPE(ids, trained.merges))
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        if tokenizer_type == "sentencepiece_bpe":
            tokenizer = Tokenizer(models.BPE(ids, trained.merges, unk_token="[UNK]", fuse_unk=True))
        else:
            scores = list(zip(trained.pieces, trained.scores))
            tokenizer = Tokenizer(models.Unigram(scores, unk_id=1, byte_fallback=causal))
        if causal:
            cut = None  # a line is one lattice, in time linear in its length
            tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        else:
            # As BertJapaneseTokenizer does: the mark of a beginning stands before every word.
            metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
            cut = pre_tokenizers.Sequence([cut, metaspace]) if separate else metaspace
            tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
            # What the training text went through: two back-quotes or apostrophes are a quotation mark.
            steps.append(normalizers.Replace(Regex("``|''"), '"'))
    special = CAUSAL_SPECIAL_TOKENS if causal else SPECIAL_TOKENS
    around = ("<s> $A", "<s> $A $B") if causal else ("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")
    if not causal:
        tokenizer.normalizer = normalizers.Sequence(steps)
    if cut is not None:
        tokenizer.pre_tokenizer = cut
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    used = [(token, ids[token]) for token in special if token in ("<s>", "[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=around[0], pair=around[1], special_tokens=used)
    return tokenizer


def library_versions(words: WordTokenizer) -> dict[str, str]:
    """Versions of the libraries on which the vocabulary depends."""
    analysers = {"mecab": ["fugashi"], "sudachi": ["SudachiPy"]}.get(words.kind, [])
    names = ["tokenizers", "transformers", "sentencepiece", *analysers]
    return {name: importlib.metadata.version(name) for name in names}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files into a folder; of a model's folder that serves as tokenizer no weights and no state.

    `config.json` is among them, as it may be what says which tokenizer this is; a model's own is written afterwards.
    """
    weights = ("*.safetensors*", "*.bin*", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx*", "*.ckpt*", "*.gguf")
    state = ("training_state.json", "checksums.json", "log.jsonl", "README.md", ".*")
    target.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns(*weights, *state)
    for path in source.iterdir():
        if path.is_file() and not ignored("", [path.name]):
            shutil.copy2(path, target / path.name)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as readable JSON."""
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


# ---- what is in a folder ----


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `lmscripts_tokenizer.json` of a folder says; None without such a file."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def check_tokenizer(tokenizer: Any, **wanted: str | None) -> None:
    """Compare tokenizer_type, mecab_dic and word_tokenizer_type, where given, with a tokenizer of transformers.

    Raises:
        UserError: they differ.
    """
    record = read_record(Path(tokenizer.name_or_path)) or {}  # of a tokenizer of ours
    kind, arguments = record.get("tokenizer_type") or model_kind(tokenizer), tokenizer.init_kwargs
    # Of what another program made no more is known, and older systems say no more.
    either = {"sentencepiece", *SENTENCEPIECE_TYPES}
    asked = wanted.get("tokenizer_type")
    found = {"tokenizer_type": asked if "sentencepiece" in (kind, asked) and {kind, asked} <= either else kind}
    found["mecab_dic"] = (arguments.get("mecab_kwargs") or {}).get("mecab_dic")
    words = (record.get("words") or {}).get("kind") or arguments.get("word_tokenizer_type")
    found["word_tokenizer_type"] = {"basic": "whitespace"}.get(words, words)
    for name, value in wanted.items():
        if value is not None and value != found[name]:
            raise UserError(f"--{name} is {value}, but the tokenizer says {found[name]}")


# ---- putting it in place ----


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target folder whose content would be lost.

    Raises:
        UserError: it holds a tokenizer and `overwrite` is off, or it holds anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder as --model_dir")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if foreign := [name for name in names if name not in FOLDER_FILES]:
        raise UserError(
            f"{folder} holds other files ({', '.join(foreign[:3])}); give a folder of its own as --model_dir"
        )
    if names and not overwrite:
        other = f"another tokenizer{_made_with(folder)}"
        raise UserError(f"{folder} holds {other}; give another --model_dir, or --overwrite to replace it")


def _made_with(folder: Path) -> str:
    """Which other versions of libraries a tokenizer was made with, in words, where that is known."""
    made, record = {}, (read_record(folder) or {}).get("versions")
    for name, version in record.items() if isinstance(record, dict) else ():
        with suppress(importlib.metadata.PackageNotFoundError):
            made[name] = version, importlib.metadata.version(name)
    other = [f"{name} {then}, here it is {now}" for name, (then, now) in made.items() if then != now]
    return f" (made with {'; '.join(other)})" if other else ""


@contextmanager
def replaced_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """As `files.replaced_folder`, where `check_target` allows it, before and after the block."""
    check_target(folder, overwrite)
    with naming(folder), files.replaced_folder(folder) as aside:
        yield aside
        check_target(folder, overwrite)
