"""A model of sentencepiece that was made elsewhere, as a folder that `AutoTokenizer` loads as a fast tokenizer.

What sentencepiece does to a text is built from parts of the `tokenizers` library, and every id of a sample of lines is
compared with sentencepiece's own; a model that differs on one line is refused. The converters of transformers (5.23)
do not pass this comparison, for three reasons:

- They give the table of normalisation rules to `normalizers.Precompiled`, which looks up clusters of less than six
  bytes, by their shortest beginning, and else single characters. sentencepiece takes the longest rule at each place:
  half-width voiced kana (two characters of three bytes) become one kana, an accent behind a letter stays. The tables
  that sentencepiece ships are Unicode's NFKC with some exceptions, and without its sorting of marks; so NFKC goes
  first, between the ends of the rules, the exceptions are kept from it, and the table does the rest. Which steps a
  table needs is found by trying its rules.
- They cut the text at spaces, strip all kinds of white space, and put the mark of a beginning only where there is none.
- Special tokens and bytes can be read out of the text "<s>" or "<0x0A>". In sentencepiece they cannot.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lmscripts.errors import UserError, shortened
from lmscripts.tokenizer.encoder import load_encoder
from lmscripts.tokenizer.folder import RECORD_FILE, write_json
from lmscripts.tokenizer.report import DIFFICULT_LINES, check_ids
from lmscripts.tokenizer.training import merges_by_score

SPACE_MARK = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of pieces in a model
_MASK_NAMES = {"mask_token": ("[MASK]", "<mask>"), "cls_token": ("[CLS]", "<cls>"), "sep_token": ("[SEP]", "<sep>")}
# Text that a normalisation step must leave alone passes it as characters of private use.
_STAND_INS, _STAND_INS_OF_OWN = range(0xF0000, 0xF0040), range(0xF0040, 0xF0080)
_UNKNOWN_TEXT = chr(0xF0080)  # a character that no model knows
_END_OF_RULE = chr(0xF0081)
_TRIED_RULES = 10_000


def import_sentencepiece(
    model_file: Path, folder: Path, lines: Sequence[str], *, model_max_length: int | None = None
) -> list[str]:
    """Write a model, unigram or bpe, into an empty tokenizer folder and check it on `DIFFICULT_LINES` and on `lines`.

    Only what is checked is sure, and U+F0000 to U+F0081 in a text do differ.

    Returns:
        Sentences about what was written.

    Raises:
        UserError: no such model, a kind that `tokenizers` has not, or a line whose ids differ from sentencepiece's.
    """
    proto, processor = _read(model_file)
    ids = {name: getattr(processor, f"{name}_id")() for name in ("pad", "unk", "bos", "eos")}
    special = {f"{name}_token": processor.id_to_piece(number) for name, number in ids.items() if number >= 0}
    known = {piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _USER_DEFINED)}
    for name, spellings in _MASK_NAMES.items():
        if found := [spelling for spelling in spellings if spelling in known]:
            special[name] = found[0]
    tokenizer = fast_tokenizer(proto, special)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", *(["token_type_ids"] if "cls_token" in special else []), "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
        **special,
    }
    write_json(folder / "tokenizer_config.json", config)
    kind = _kind(proto)
    facts = {"tokenizer_type": kind, "from_sentencepiece": model_file.name, "vocab_size": len(proto.pieces)}
    write_json(folder / RECORD_FILE, facts)
    # sentencepiece itself reads those out of a text that are symbols of their own.
    read = [p.piece for p in proto.pieces if p.type == _USER_DEFINED and p.piece in special.values()]
    checked = [line for line in (*DIFFICULT_LINES, *lines) if not any(token in line for token in read)]
    blame = f"{model_file} cannot be taken over: `tokenizers` and sentencepiece"
    check_ids(load_encoder(folder), checked, processor.encode, blame)
    added = tokenizer.encode("").tokens
    return [
        f"{model_file.name}: {kind}, {len(proto.pieces):,} entries; "
        + ", ".join(f"{name} {piece}" for name, piece in special.items()),
        f"a text gets {' '.join(added)} around it" if added else "a text gets no special token around it",
        f"checked: {len(checked):,} lines have the ids of sentencepiece",
    ]


def _read(model_file: Path) -> tuple[Any, Any]:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    try:
        content = model_file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {model_file}: {error.strerror}") from None
    try:
        proto: Any = getattr(sentencepiece_model_pb2, "ModelProto").FromString(content)  # noqa: B009 (made at run time)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # whatever protobuf and sentencepiece raise for foreign bytes
        raise UserError(f"{model_file} is no model of sentencepiece ({shortened(error)})") from None
    if (kind := _kind(proto)) not in ("unigram", "bpe"):
        raise UserError(f"{model_file} is a model of the kind {kind}; unigram and bpe can be taken over")
    return proto, processor


def _kind(proto: Any) -> str:
    return str(proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type).lower())


# ---- the tokenizer ----


def fast_tokenizer(proto: Any, special: dict[str, str]) -> Tokenizer:
    """A tokenizer of the `tokenizers` library with the ids of a model.

    Of the special tokens (name -> piece) a text gets [CLS] and [SEP] around it where the model has both and a mask,
    else the beginning in front where it has one. The mask is read out of a text, in which people write it.
    """
    if mask := special.get("mask_token"):
        proto = type(proto).FromString(proto.SerializeToString())
        next(piece for piece in proto.pieces if piece.piece == mask).type = _USER_DEFINED
    own = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tokenizer = Tokenizer(_bpe(proto, bool(own)) if _kind(proto) == "bpe" else _unigram(proto))
    unknown, beginnings = _reserved_in_text(proto)
    aside = [normalizers.Replace(text, _UNKNOWN_TEXT) for text in unknown]
    tokenizer.normalizer = normalizers.Sequence([*_normalization(proto, own), *aside])
    cuts = [pre_tokenizers.Split(Regex(_any_of(own)), "isolated")] if own else []
    if beginnings:
        cuts.append(pre_tokenizers.Split(Regex(beginnings), "merged_with_previous"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    mark = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    suffix = bool(proto.trainer_spec.treat_whitespace_as_suffix)
    dummy = [decoders.Strip(" ", int(not suffix), int(suffix))] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([*mark, *dummy])
    control = [piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _UNKNOWN)]
    tokens = dict.fromkeys([*control, *special.values()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if {"cls_token", "sep_token", "mask_token"} <= special.keys():
        one, other = used = [special["cls_token"], special["sep_token"]]
        single, pair = f"{one}:0 $A:0 {other}:0", f"{one}:0 $A:0 {other}:0 $B:1 {other}:1"
    elif "bos_token" in special:
        used = [special["bos_token"]]
        single, pair = f"{used[0]} $A", f"{used[0]} $A $B"
    else:
        return tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(piece, tokenizer.token_to_id(piece)) for piece in used]
    )
    return tokenizer


def _any_of(texts: Sequence[str]) -> str:
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def _reserved_in_text(proto: Any) -> tuple[list[str], str]:
    """Special tokens and bytes, which in a text are only text.

    Returns:
        Those whose characters are all unknown: sentencepiece takes them together with unknown neighbours. And how each
        of the others begins where it stands in a text: cut behind this, it is only text. It is cut where no piece
        reaches across and no two unknown characters meet.
    """
    pieces = [piece.piece for piece in proto.pieces if piece.type in (_NORMAL, _USER_DEFINED)]
    characters = {piece for piece in pieces if len(piece) == 1}
    crossed = {piece[place : place + 2] for piece in pieces for place in range(len(piece) - 1)}
    reserved = [p.piece for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL, _BYTE) and len(p.piece) > 1]
    # With byte fallback no character is unknown.
    unknown = [text for text in reserved if not proto.trainer_spec.byte_fallback and not characters & set(text)]
    endings: dict[str, list[str]] = {}
    for text in reserved:
        if text not in unknown:
            places = range(1, len(text))
            known = [place for place in places if characters & set(text[place - 1 : place + 1])] or list(places)
            free = [place for place in known if text[place - 1 : place + 1] not in crossed] or known
            endings.setdefault(text[: free[0]], []).append(text[free[0] :])
    cuts = "|".join(f"{re.escape(beginning)}(?={_any_of(rest)})" for beginning, rest in sorted(endings.items()))
    return sorted(unknown, key=len, reverse=True), cuts


def _unigram(proto: Any) -> models.Unigram:
    # A symbol of its own stands by itself and is taken whole. No text gives reserved pieces; a lower score than the
    # lowest would change what an unknown character costs.
    lowest = min((piece.score for piece in proto.pieces if piece.type == _NORMAL), default=0.0)
    scores = {_USER_DEFINED: 0.0, **dict.fromkeys((_UNKNOWN, _CONTROL, _UNUSED, _BYTE), lowest)}
    vocabulary = [(piece.piece, scores.get(piece.type, piece.score)) for piece in proto.pieces]
    unknown = next(number for number, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any, has_own: bool) -> models.BPE:
    ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    settings = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": proto.trainer_spec.byte_fallback}
    # A symbol that stands by itself is in the vocabulary, and no merges lead to it.
    return models.BPE(ids, merges_by_score(proto), ignore_merges=has_own, **settings)


# ---- normalisation ----


def _normalization(proto: Any, own: Sequence[str]) -> list[Any]:
    """The steps from a text to what the model cuts into pieces."""
    spec = proto.normalizer_spec
    mark = SPACE_MARK if spec.escape_whitespaces else " "
    steps = _table_steps(spec.precompiled_charsmap) if spec.precompiled_charsmap else []
    steps = _around(steps, own, _STAND_INS_OF_OWN) or steps
    if spec.remove_extra_whitespaces:
        # A literal mark counts as a space at the end, as in sentencepiece.
        steps.append(normalizers.Replace(Regex(r"\A +|(?<= ) +"), ""))
        steps.append(normalizers.Replace(Regex(rf"[ {mark}]+\z"), ""))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", mark))
    if spec.add_dummy_prefix:
        if proto.trainer_spec.treat_whitespace_as_suffix:
            steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), mark))
        else:
            steps.append(normalizers.Prepend(mark))
    return steps


def _table_steps(table: bytes) -> list[Any]:
    """The steps that apply a table of rules; NFKC, or it and lower case, goes first if more texts come out right so."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    off = dict.fromkeys(("add_dummy_prefix", "escape_whitespaces", "remove_extra_whitespaces"), False)
    spec = getattr(sentencepiece_model_pb2, "NormalizerSpec")(precompiled_charsmap=table, **off)  # noqa: B009
    normalizer = sentencepiece.SentencePieceNormalizer(normalizer_spec=spec)
    rules = dict(normalizer.decompile())
    single, several = (sorted(source for source in rules if (len(source) > 1) == many) for many in (False, True))
    tried = [*single, *several[:: len(several) // _TRIED_RULES + 1], *(source + "\u0301" for source in single)]
    expected = normalizer.normalize(tried)
    others = [character for character in _all_characters() if character not in rules]
    # Single characters that become nothing or a space: `Precompiled` would take what is combined with them along.
    gone = {target: [one for one in single if rules[one] == target] for target in ("", " ")}
    deletions = [normalizers.Replace(Regex(_one_of(ones)), target) for target, ones in gone.items() if ones]
    after = [*deletions, normalizers.Precompiled(table)]
    whole = [normalizers.Replace(_ends_of_rules(rules), _END_OF_RULE), normalizers.NFKC()]
    joined = normalizers.Replace(_END_OF_RULE, "")
    ways = (after, [*whole, *after, joined], [*whole, normalizers.Lowercase(), *after, joined])
    candidates = [guarded for steps in ways if (guarded := _around(steps, others, _STAND_INS)) is not None]

    def num_wrong(steps: list[Any]) -> int:
        apply = normalizers.Sequence(steps).normalize_str
        return sum(apply(text) != result for text, result in zip(tried, expected))

    return min(candidates, key=num_wrong)


def _ends_of_rules(rules: dict[str, str]) -> Regex:
    """Where no rule goes on, in front of marks and of what NFKC would join with the character before it.

    sentencepiece joins what stands side by side and sorts nothing: "T" with an acute and a dot below, in this order,
    stays as it is, and so does a syllable of Hangul before a final consonant of its own.
    """
    begins = {character: unicodedata.normalize("NFKD", character)[0] for character in _all_characters()}
    later = {last for character in begins for last in unicodedata.normalize("NFD", character)[1:]}
    joining = later | {c for c, one in begins.items() if one in later or unicodedata.category(one)[0] == "M"}
    firsts: dict[tuple[str, str], set[str]] = {}  # what comes first in the rules with a middle and a rest
    for source in rules:
        for place in range(1, len(source)):
            if source[place] in joining:
                firsts.setdefault((source[1:place], source[place:]), set()).add(source[0])
    rests: dict[tuple[frozenset[str], str], list[str]] = {}
    for (middle, rest), characters in firsts.items():
        rests.setdefault((frozenset(characters), middle), []).append(rest)
    goes_on = sorted(
        rf"(?<={_one_of(first)}{re.escape(middle)})(?:{_any_of(sorted(rest))})"
        for (first, middle), rest in rests.items()
    )
    # tokenizers 0.23 fails on a text with something put before its first character.
    return Regex(rf"(?<=[\s\S])(?={_one_of(joining)})(?!{'|'.join(goes_on) or '(?!)'})")


def _one_of(characters: Iterable[str]) -> str:
    """A class of characters as a regular expression."""
    codes = sorted(map(ord, characters))
    runs = [list(run) for _, run in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    return "[" + "".join(rf"\x{{{run[0][1]:x}}}-\x{{{run[-1][1]:x}}}" for run in runs) + "]"


def _all_characters() -> Iterator[str]:
    return map(chr, itertools.chain(range(1, 0xD800), range(0xE000, 0x30000)))


def _around(steps: list[Any], kept: Sequence[str], stand_ins: range) -> list[Any] | None:
    """The steps, with stand-ins for those of `kept` that they would change; None if these are too many."""
    apply: Callable[[str], str] = normalizers.Sequence(steps).normalize_str
    changed = sorted((text for text in kept if apply(text) != text), key=len, reverse=True)
    if len(changed) > len(stand_ins):
        return None
    pairs = list(zip(changed, map(chr, stand_ins)))
    aside = [normalizers.Replace(text, stand_in) for text, stand_in in pairs]
    return [*aside, *steps, *(normalizers.Replace(stand_in, text) for text, stand_in in pairs)]
