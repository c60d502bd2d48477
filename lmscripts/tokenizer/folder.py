"""A trained vocabulary as a folder that `AutoTokenizer.from_pretrained` loads, without this package and offline.

Text that MeCab or Sudachi cuts goes to `BertJapaneseTokenizer` (vocab.txt or spiece.model); everything else to a
fast tokenizer (tokenizer.json). `lmscripts_tokenizer.json` records how the vocabulary was made.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lmscripts.errors import UserError, naming
from lmscripts.files import new_folder
from lmscripts.text.words import WordTokenizer
from lmscripts.tokenizer.training import MAX_WORD_CHARACTERS, SPECIAL_TOKENS, TokenizerType, Trained

RECORD_FILE = "lmscripts_tokenizer.json"
REPORT_FILE = "tokenizer_report.json"
# All that a tokenizer folder may hold; a folder with anything else is never replaced.
FOLDER_FILES = {
    RECORD_FILE,
    REPORT_FILE,
    "added_tokens.json",
    "config.yaml",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "spiece.vocab",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}


def check_combination(tokenizer_type: TokenizerType, words: WordTokenizer) -> None:
    """Refuse what no tokenizer class of transformers does.

    Raises:
        UserError: with what to take instead.
    """
    if not _is_japanese(words):
        return
    if tokenizer_type == "bpe":
        raise UserError(
            f"transformers has no tokenizer that runs {words.kind} before byte-level BPE: take --tokenizer_type "
            "wordpiece or unigram, or --word_tokenizer none"
        )
    if tokenizer_type == "character" and words.normalization == "none":
        raise UserError(
            "the character tokenizer of transformers always normalises to NFKC: take --normalization nfkc, or "
            "--word_tokenizer none"
        )


@contextmanager
def splits_folder(model_dir: Path, intermediate_dir: str) -> Iterator[Path]:
    """The folder for the segmented text: `intermediate_dir`, or one beside the tokenizer that is removed again."""
    if intermediate_dir:
        folder = Path(intermediate_dir)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{model_dir.name}.words-", dir=model_dir.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def needs_words(tokenizer_type: TokenizerType, words: WordTokenizer) -> bool:
    """Whether training reads words joined by spaces instead of the lines themselves."""
    return tokenizer_type != "bpe" and words.kind != "none"


def write_tokenizer(
    folder: Path,
    trained: Trained,
    tokenizer_type: TokenizerType,
    words: WordTokenizer,
    *,
    model_max_length: int,
    record: dict[str, Any],
) -> None:
    """Write the files of a tokenizer.

    Args:
        folder: exists and is empty.
        trained: the vocabulary.
        tokenizer_type: wordpiece, unigram, bpe or character.
        words: how text is cut into words before.
        model_max_length: tokens beyond which transformers warns.
        record: further facts for `lmscripts_tokenizer.json`.
    """
    config: dict[str, Any] = {
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS)),
    }
    if _is_japanese(words):
        config |= _japanese_config(tokenizer_type, words)
        if tokenizer_type == "unigram":
            assert trained.sentencepiece is not None
            (folder / "spiece.model").write_bytes(trained.sentencepiece)
        else:
            text = "".join(f"{piece}\n" for piece in trained.pieces)
            (folder / "vocab.txt").write_text(text, encoding="utf-8", newline="\n")
    else:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        fast = fast_tokenizer(trained, tokenizer_type, words)
        (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8", newline="\n")
    write_json(folder / "tokenizer_config.json", config)
    write_record(folder, trained, tokenizer_type, words, record)


def write_record(
    folder: Path, trained: Trained, tokenizer_type: TokenizerType, words: WordTokenizer, record: dict[str, Any]
) -> None:
    """Write `lmscripts_tokenizer.json`: how a vocabulary was made, with the further facts of `record`."""
    facts = {
        "tokenizer_type": tokenizer_type,
        "words": words.description(),
        "vocab_size": len(trained.pieces),
        "characters_kept": trained.num_characters,
        "characters_in_text": trained.num_text_characters,
        **record,
        "versions": library_versions(words),
    }
    write_json(folder / RECORD_FILE, facts)


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
    ignored = shutil.ignore_patterns(*weights, *state)(str(source), [path.name for path in source.iterdir()])
    for path in source.iterdir():
        if path.is_file() and path.name not in ignored:
            shutil.copy2(path, target / path.name)


def write_json(path: Path, values: Any) -> None:
    """Write plain values as readable JSON."""
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def _is_japanese(words: WordTokenizer) -> bool:
    return words.kind in ("mecab", "sudachi")


def _japanese_config(tokenizer_type: TokenizerType, words: WordTokenizer) -> dict[str, Any]:
    subwords = "sentencepiece" if tokenizer_type == "unigram" else tokenizer_type
    # Without explicit arguments transformers takes another dictionary than ipadic.
    arguments = words.mecab_kwargs() if words.kind == "mecab" else words.sudachi_kwargs()
    return {
        "tokenizer_class": "BertJapaneseTokenizer",
        "do_lower_case": False,
        "do_word_tokenize": True,
        "do_subword_tokenize": True,
        "word_tokenizer_type": words.kind,
        "subword_tokenizer_type": subwords,
        f"{words.kind}_kwargs": arguments,
    }


def fast_tokenizer(trained: Trained, tokenizer_type: TokenizerType, words: WordTokenizer) -> Tokenizer:
    """A tokenizer of the `tokenizers` library: normalisation, words, vocabulary, [CLS] A [SEP] (B [SEP])."""
    ids = {piece: number for number, piece in enumerate(trained.pieces)}
    separate = words.kind == "whitespace"
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    if tokenizer_type == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if separate else pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=separate)
    elif tokenizer_type == "unigram":
        assert trained.scores is not None
        tokenizer = Tokenizer(models.Unigram(list(zip(trained.pieces, trained.scores)), unk_id=1, byte_fallback=False))
        # As BertJapaneseTokenizer does: the mark of a beginning stands before every word.
        each_word = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), metaspace])
        tokenizer.pre_tokenizer = each_word if separate else metaspace
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    elif tokenizer_type == "bpe":
        assert trained.merges is not None
        tokenizer = Tokenizer(models.BPE(ids, trained.merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        # BPE without merges is the model that looks up every character and keeps track of the words.
        tokenizer = Tokenizer(models.BPE(ids, [], unk_token="[UNK]", fuse_unk=False))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if separate else pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.Fuse()
    steps: list[Any] = [normalizers.NFKC()] if words.normalization == "nfkc" else []
    if tokenizer_type == "unigram":
        # What the training text went through: two back-quotes or apostrophes are a quotation mark.
        steps.append(normalizers.Replace(Regex("``|''"), '"'))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return tokenizer


# ---- putting it in place ----


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `lmscripts_tokenizer.json` of a folder says; None without such a file."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a target folder whose content would be lost.

    Raises:
        UserError: it holds a tokenizer and `overwrite` is off, or it holds anything else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder as --model_dir")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in FOLDER_FILES]
    if foreign:
        raise UserError(
            f"{folder} holds other files ({', '.join(foreign[:3])}); give a folder of its own as --model_dir"
        )
    if names and not overwrite:
        raise UserError(f"{folder} holds another tokenizer; give another --model_dir, or --overwrite to replace it")


@contextmanager
def replaced_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `folder` when the block ends well, and vanishes otherwise.

    What is there stays usable until then.

    Raises:
        UserError: see `check_target`.
    """
    check_target(folder, overwrite)
    fresh = folder.with_name(f".{folder.name}.new-{uuid.uuid4().hex[:8]}")
    earlier = folder.with_name(f".{folder.name}.earlier-{uuid.uuid4().hex[:8]}")
    try:
        with naming(folder), new_folder(fresh) as aside:
            yield aside
        check_target(folder, overwrite)
        if folder.exists():
            os.rename(folder, earlier)
        try:
            os.rename(fresh, folder)
        except OSError:
            if earlier.exists():
                os.rename(earlier, folder)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
