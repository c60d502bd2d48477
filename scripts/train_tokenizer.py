"""Train a tokenizer from raw text: a folder that AutoTokenizer loads, checked and measured.

The text is split at document ends, segmented in parallel into files, and a vocabulary is trained on them. A stopped run
with --intermediate_dir goes on where it was. The result does not depend on the number of splits or processes.

With --extend_tokenizer_dir new words take the place of the unused tokens of a tokenizer instead; with
--from_sentencepiece a model of sentencepiece that was made elsewhere becomes such a folder.

    python scripts/train_tokenizer.py --input_file corpus.txt --model_dir tokenizer
    python scripts/train_tokenizer.py --extend_tokenizer_dir tokenizer --new_words_file words.txt --model_dir extended
    python scripts/train_tokenizer.py --from_sentencepiece spiece.model --model_dir tokenizer
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmscripts.errors import UserError, user_errors
from lmscripts.files import command
from lmscripts.options import TOKENIZER, check_numbers, num_cpus, option, parse_options_with_origin

if TYPE_CHECKING:
    from lmscripts.text.records import TableOptions
    from lmscripts.text.report import TextReport
    from lmscripts.text.words import WordTokenizer
    from lmscripts.tokenizer.training import Trained, VocabularySettings
    from lmscripts.tokenizer.training_text import SplitTask

EXTENDING = ("extend_tokenizer_dir", "new_words_file", "model_dir", "overwrite")  # all that an extension reads
IMPORTING = ("from_sentencepiece", "input_file", "document_per_line", "text_column", "model_max_length", *EXTENDING[2:])
IMPORTING += ("delimiter", "quotes", "input_format")
# What does not decide the tokenizer that is trained.
ELSEWHERE = ("input_file", "model_dir", "overwrite", "intermediate_dir", "num_files", "num_workers")
ELSEWHERE += ("extend_tokenizer_dir", "new_words_file", "from_sentencepiece")
CAUSAL_DEFAULTS = {"tokenizer_type": "unigram", "word_tokenizer": "none", "normalization": "none"}
CHECKED_LINES = 2_000
MOST_ALONE = 1 << 20  # bytes for which a second process would not be worth the seconds that it takes to begin
MEASURED_LINES = 20_000


@dataclass(frozen=True)
class Options:
    """One field is one option and one key of the YAML file."""

    input_file: tuple[str, ...] = option(
        (),
        help="text to train on: files, patterns, folders, or hub:NAME[@REVISION][:CONFIG][:SPLIT][:COLUMN]; "
        "txt, jsonl, csv, tsv, parquet, each also .gz .xz .bz2 .zst",
        group="text",
    )
    document_per_line: bool = option(False, help=".txt files hold one document a line, not one sentence", group="text")
    text_column: str = option("text", help="column or key of the text in jsonl, csv, tsv and parquet", group="text")
    delimiter: str | None = option(None, help="of csv and tsv; default: found in the header", group="text")
    quotes: bool = option(True, help="csv: a field may stand in double quotes", group="text")
    input_format: Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None = option(
        None, help="of every file; default: by its name, and JSON lines by their content", group="text"
    )
    on_bad_line: Literal["skip", "fail"] = option("skip", help="leave out bad records, counted; or stop", group="text")

    objective: Literal["masked", "causal"] = option(
        "masked",
        help="of the model; causal: lossless, with the defaults unigram, no words, no normalisation",
        group="words",
    )
    word_tokenizer: Literal["mecab", "sudachi", "whitespace", "none"] = option(
        "mecab", help="mecab or sudachi: Japanese; whitespace (and punctuation): others; none: as it is", group="words"
    )
    mecab_dic: str = option("ipadic", help="ipadic, unidic_lite, unidic or the folder of a dictionary", group="words")
    mecab_option: str = option("", help='further options of MeCab, for example "-u user.dic"', group="words")
    sudachi_split_mode: Literal["A", "B", "C"] = option("A", help="short (A) to long (C) words", group="words")
    sudachi_dict: Literal["small", "core", "full"] = option("core", help="dictionary of Sudachi", group="words")
    normalization: Literal["nfkc", "none"] = option("nfkc", help="of training and encoding", group="words")

    tokenizer_type: Literal["wordpiece", "unigram", "bpe", "sentencepiece_bpe", "character", "sentencepiece"] = option(
        "wordpiece",
        help="how words are cut into pieces; bpe: on bytes; sentencepiece_bpe: on characters; sentencepiece: unigram "
        "by coverage",
        group="vocabulary",
    )
    vocab_size: int = option(32768, help="entries, special and unused ones included", group="vocabulary", most=10**8)
    min_frequency: int = option(2, help="of a pair (wordpiece, bpe) or a character (character)", group="vocabulary")
    limit_alphabet: int = option(6129, help="different characters that are kept; not for bpe", group="vocabulary")
    character_coverage: float | None = option(
        None,
        help="of unigram, sentencepiece_bpe: keep the characters that are this share of the text; not --limit_alphabet",
        group="vocabulary",
    )
    num_unused_tokens: int = option(10, help="entries [unusedN] left free for fine-tuning", group="vocabulary")
    pad_vocab_to_multiple_of: int = option(
        64, help="filled up with [unusedN]; 0: left as it is", group="vocabulary", most=65536
    )
    model_max_length: int = option(512, help="tokens beyond which transformers warns", group="vocabulary")

    model_dir: str = option(help="folder of the tokenizer", group="output", writes="folder")
    overwrite: bool = option(False, help="replace another tokenizer that is in model_dir", group="output")
    intermediate_dir: str = option(
        "", help="folder that keeps the segmented splits; else removed", group="output", writes="folder"
    )
    num_files: int = option(0, help="number of splits; 0: one for each worker process", group="output", most=10_000)
    num_workers: int = option(0, help="worker processes; 0: one for each CPU", group="output", most=1024)

    extend_tokenizer_dir: str = option("", help="tokenizer to extend instead of training one", group="extension")
    new_words_file: str = option("", help="a new word a line, each for an unused token", group="extension")
    from_sentencepiece: str = option("", help="model of sentencepiece to take over instead of training", group="import")


# ---- what the options mean together ----


def refuse(origins: dict[str, str], why: str, *names: str) -> None:
    """Refuse options that were given although they would change nothing."""
    for name in names:
        if origins[name] != "default":
            raise UserError(f"--{name} has no effect {why}; leave it out")


def refuse_useless(options: Options, origins: dict[str, str], paths: Sequence[Path]) -> None:
    """Refuse what the other options, or the formats of the text, leave without effect."""
    from lmscripts.text.corpus import is_plain
    from lmscripts.tokenizer.training import SENTENCEPIECE_TYPES

    for analyser in ("mecab", "sudachi"):
        if options.word_tokenizer != analyser:
            names = [name for name in origins if name.startswith(f"{analyser}_")]
            refuse(origins, f"with --word_tokenizer {options.word_tokenizer}", *names)
    # The defaults themselves are let through: older command lines give them with every type.
    for kind, name in (("unigram", "min_frequency"), ("sentencepiece_bpe", "min_frequency"), ("bpe", "limit_alphabet")):
        if options.tokenizer_type == kind and getattr(options, name) != getattr(Options, name):
            refuse(origins, f"with --tokenizer_type {kind}", name)
    if options.tokenizer_type not in SENTENCEPIECE_TYPES or options.objective == "causal":
        refuse(origins, f"with --tokenizer_type {options.tokenizer_type}", "character_coverage")
    elif options.character_coverage is not None and options.limit_alphabet != Options.limit_alphabet:
        refuse(origins, "with --character_coverage", "limit_alphabet")
    plain = [is_plain(str(path), options.input_format or "") for path in paths]
    if all(plain):
        refuse(origins, "where all input is plain text", "text_column", "delimiter", "quotes", "on_bad_line")
    if not any(plain):
        refuse(origins, "where no input is plain text", "document_per_line")


def vocabulary_of(options: Options) -> VocabularySettings:
    """What the vocabulary is to be."""
    from lmscripts.tokenizer.training import VocabularySettings

    not_negative = ("num_unused_tokens", "pad_vocab_to_multiple_of", "num_files", "num_workers")
    positive = ("min_frequency", "limit_alphabet", "model_max_length")
    check_numbers(vars(options), positive=positive, not_negative=not_negative)
    coverage = options.character_coverage
    if coverage is not None and not 0 < coverage <= 1:
        raise UserError(f"--character_coverage must be greater than 0 and at most 1, got {coverage}")
    settings = VocabularySettings(
        size=options.vocab_size,
        min_frequency=options.min_frequency,
        limit_alphabet=options.limit_alphabet,
        num_unused=options.num_unused_tokens,
        multiple=options.pad_vocab_to_multiple_of,
        causal=options.objective == "causal",
        character_coverage=coverage or 0.0,
    )
    settings.room()
    return settings


def as_there(options: Options) -> Options:
    """What `sentencepiece` means in language-pretraining, said in words: unigram with the coverage of sentencepiece."""
    coverage = options.character_coverage or 0.9995
    print(
        f"--tokenizer_type sentencepiece is now --tokenizer_type unigram --character_coverage {coverage}: as there, "
        "--limit_alphabet and --min_frequency have no effect on it. Pieces stay inside the words of --word_tokenizer: "
        "text is encoded word by word, so the pieces across words that later versions there learnt could never be "
        "used. Its first versions (2021) trained BPE on characters: --tokenizer_type sentencepiece_bpe",
        flush=True,
    )
    plain = {name: getattr(Options, name) for name in ("limit_alphabet", "min_frequency")}
    return dataclasses.replace(options, tokenizer_type="unigram", character_coverage=coverage, **plain)


def words_of(options: Options) -> WordTokenizer:
    """How lines are cut into words; tried once here, so that a missing dictionary is known at once."""
    from lmscripts.text.words import WordTokenizer, make_segmenter
    from lmscripts.tokenizer.folder import check_combination

    words = WordTokenizer(
        kind=options.word_tokenizer,
        dictionary=options.mecab_dic,
        option=options.mecab_option,
        sudachi_split_mode=options.sudachi_split_mode,
        sudachi_dictionary=options.sudachi_dict,
        normalization=options.normalization,
    )
    check_combination(options.tokenizer_type, words, causal=options.objective == "causal")
    make_segmenter(words)
    return words


def request_of(options: Options, source: str, words: WordTokenizer) -> str:
    """Hash of all that decides the tokenizer: text, options, dictionary and libraries, not folders or processes."""
    from lmscripts.tokenizer.folder import library_versions

    chosen = {name: value for name, value in vars(options).items() if name not in ELSEWHERE}
    # Names and defaults as earlier versions had them, so that their tokenizers are known again.
    chosen["document_format"] = "line" if chosen.pop("document_per_line") else "blank_line"
    if options.objective == "masked":
        del chosen["objective"]
    for name in ("delimiter", "quotes", "input_format", "character_coverage"):
        if chosen[name] == getattr(Options, name):
            del chosen[name]
    facts = [source, chosen, words.description(), library_versions(words)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ---- the steps ----


class Progress:
    """A bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, num_splits: int, total_bytes: int | None) -> None:
        from tqdm import tqdm

        self.num_splits = num_splits
        self.of_total = f" of {total_bytes / 1e6:.0f}" if total_bytes else ""
        self.started = self.last_line = time.monotonic()
        self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="segmenting", disable=None)

    def __call__(self, done_bytes: int, done_splits: int) -> None:
        """Show what is done by now."""
        now = time.monotonic()
        self.bar.update(done_bytes - self.bar.n)
        if self.bar.disable and now - self.last_line >= 10:  # there is no terminal
            self.last_line = now
            done = f"{done_bytes / 1e6:.0f}{self.of_total} MB, {done_splits} of {self.num_splits} splits"
            print(f"segmenting: {done}, {done_bytes / (now - self.started) / 1e6:.1f} MB/s", flush=True)


def table_of(options: Options) -> TableOptions:
    """How tables of texts are read."""
    from lmscripts.text.records import corpus_table

    form = (options.delimiter, options.quotes, options.input_format, options.on_bad_line)
    return corpus_table(options.text_column, *form)


def segment(tasks: Sequence[SplitTask], num_workers: int, paths: Sequence[Path], report: TextReport) -> None:
    """Write the splits that are not there yet and say what was found in the text, all of it added to the report."""
    from lmscripts.tokenizer.training_text import numeral_run_warning, write_splits

    plain = all(path.suffix == ".txt" and path.is_file() for path in paths)
    progress = Progress(len(tasks), sum(path.stat().st_size for path in paths) if plain else None)
    started = time.monotonic()
    with progress.bar:
        results = write_splits(tasks, num_workers, progress)
    if kept := sum(result.was_there for result in results):
        print(f"{kept} of {len(tasks)} splits were finished by an earlier run and are used again")
    for result in results:
        report.merge(result.report)
    print("\n".join(report.sentences()))
    print(f"segmented {len(tasks) - kept} splits in {time.monotonic() - started:.1f} s", flush=True)
    if warning := numeral_run_warning(results):
        print(f"warning: {warning}")
    if not report.num_documents:
        names = ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        raise UserError("; ".join([f"the input holds no text, empty or blank: {names}", *report.sentences()[1:]]))


def train(options: Options, tasks: Sequence[SplitTask], settings: VocabularySettings) -> Trained:
    """Train the vocabulary and say where it differs from what was asked for."""
    from lmscripts.tokenizer.training import train_vocabulary

    started = time.monotonic()
    files = [task.text_file for task in tasks]
    trained = train_vocabulary(options.tokenizer_type, files, settings, segmented=tasks[0].segmented)
    print(f"trained {len(trained.pieces):,} entries ({options.tokenizer_type}) in {time.monotonic() - started:.1f} s")
    print("".join(f"{sentence}\n" for sentence in trained.remarks(settings)), end="", flush=True)
    return trained


def check_words(options: Options, lines: Sequence[str]) -> None:
    """Say so where a language without spaces is cut into words at spaces."""
    from lmscripts.tokenizer.report import unspaced_share

    kind = options.word_tokenizer
    cut_at_spaces = kind == "whitespace" or (kind == "none" and options.tokenizer_type == "wordpiece")
    if cut_at_spaces and options.tokenizer_type != "bpe" and (share := unspaced_share(lines)) > 0.2:
        advice = (
            "have the text cut into words before (Japanese: --word_tokenizer mecab), or take --tokenizer_type unigram "
        )
        print(
            f"warning: {share:.0%} of the characters stand in long runs without spaces, as Thai, Chinese or Japanese "
            f"is written; --word_tokenizer {kind} takes whole clauses for words: {advice}--word_tokenizer none",
            flush=True,
        )


def check_and_measure(
    folder: Path, lines: Sequence[str], words: WordTokenizer, trained: Trained, lossless: bool
) -> None:
    """Compare the fast path with AutoTokenizer on a sample, and print and write the tokenizer report."""
    from lmscripts.tokenizer.encoder import load_encoder
    from lmscripts.tokenizer.folder import REPORT_FILE, write_json
    from lmscripts.tokenizer.report import (
        DIFFICULT_LINES,
        check_encoder,
        check_lossless,
        report_table,
        tokenizer_report,
    )
    from lmscripts.tokenizer.training import LONG_WORDS_ADVICE, MAX_WORD_CHARACTERS

    encoder = load_encoder(folder)
    step = max(1, len(lines) // CHECKED_LINES)
    checked = lines[::step][:CHECKED_LINES]
    check_encoder(encoder, checked)
    print(f"checked: {len(checked):,} lines have the same ids through AutoTokenizer")
    if lossless:
        check_lossless(encoder, [*DIFFICULT_LINES, *checked])
        print(f"lossless: decoding gives {len(checked):,} lines and {len(DIFFICULT_LINES)} difficult ones back exactly")
    report = tokenizer_report(encoder, lines)
    report |= {"long_words": trained.num_long_words, "long_words_share": round(trained.long_words_share, 6)}
    write_json(folder / REPORT_FILE, report)
    print(report_table(report))
    if (share := report["unknown_character_rate"] or 0) > 0.01 or (report["unknown_rate"] or 0) > 0.01:
        advice = "raise --limit_alphabet or --vocab_size, or lower --min_frequency"
        if words.kind == "none":
            advice += ", or let a --word_tokenizer cut the text into words"
        if trained.long_words_share > share / 2:
            advice = f"most of them stand in words of over {MAX_WORD_CHARACTERS} characters: {LONG_WORDS_ADVICE}"
        print(
            f"warning: {report['unknown_rate']:.1%} of the tokens, {share:.1%} of the characters, are unknown: {advice}"
        )


def main() -> None:
    description = (__doc__ or "").rsplit("\n\n", 1)[0]
    options, origins = parse_options_with_origin(Options, description=description, **TOKENIZER)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    steps = extend if options.extend_tokenizer_dir or options.new_words_file else run
    steps = take_over if options.from_sentencepiece else steps
    with user_errors(only_words=True):
        steps(options, origins)


def extend(options: Options, origins: dict[str, str]) -> None:
    """Write a copy of a tokenizer in which new words stand where unused tokens stood."""
    from lmscripts.tokenizer.extension import plan_extension, write_extension
    from lmscripts.tokenizer.folder import read_record, replaced_folder

    if missing := [name for name in EXTENDING[:2] if not getattr(options, name)]:
        raise UserError(f"missing --{missing[0]}: --extend_tokenizer_dir and --new_words_file belong together")
    refuse(origins, "with --extend_tokenizer_dir", *[name for name in origins if name not in EXTENDING])
    target = Path(options.model_dir)
    extension = plan_extension(Path(options.extend_tokenizer_dir), Path(options.new_words_file))
    if (read_record(target) or {}).get("request") == extension.request:
        print(f"{target} holds this tokenizer already: same tokenizer, same words; nothing to do")
        return
    with replaced_folder(target, options.overwrite) as aside:
        print("\n".join(write_extension(extension, aside)))
    print(f"the tokenizer is in {target}; make a new token store with --tokenizer_dir {shlex.quote(str(target))}")


def take_over(options: Options, origins: dict[str, str]) -> None:
    """Write the folder of a model of sentencepiece that was made elsewhere."""
    from lmscripts.text.corpus import find_files, spread_sample
    from lmscripts.tokenizer.folder import replaced_folder
    from lmscripts.tokenizer.sentencepiece_import import import_sentencepiece

    refuse(origins, "with --from_sentencepiece", *[name for name in origins if name not in IMPORTING])
    target, model = Path(options.model_dir), Path(options.from_sentencepiece)
    paths = find_files(options.input_file) if options.input_file else []
    per_line = options.document_per_line
    form = {"document_per_line": per_line, "keep_spaces": True}
    lines = spread_sample(paths, CHECKED_LINES, table_of(options), **form) if paths else []
    length = options.model_max_length if origins["model_max_length"] != "default" else None
    with replaced_folder(target, options.overwrite) as aside:
        print("\n".join(import_sentencepiece(model, aside, lines, model_max_length=length)))
    print(f"the tokenizer is in {target}; make a token store with --tokenizer_dir {shlex.quote(str(target))}")


def run(options: Options, origins: dict[str, str]) -> None:
    """Train a tokenizer: everything after the options were read."""
    from lmscripts.text.corpus import find_files, plan_spans, source_fingerprint, spread_sample
    from lmscripts.text.report import TextReport
    from lmscripts.tokenizer.folder import check_target, needs_words, read_record, replaced_folder, write_tokenizer
    from lmscripts.tokenizer.training_text import SplitTask, splits_folder

    causal = options.objective == "causal"
    if options.tokenizer_type == "sentencepiece":
        options = dataclasses.replace(options, tokenizer_type="unigram") if causal else as_there(options)
    if causal:
        changes = {name: value for name, value in CAUSAL_DEFAULTS.items() if origins[name] == "default"}
        options = dataclasses.replace(options, **changes)
    if not options.input_file:
        raise UserError("missing --input_file (on the line or in the file of --config)")
    target = Path(options.model_dir)
    settings = vocabulary_of(options)
    report, table = TextReport(), table_of(options)
    paths = find_files(options.input_file, report)
    refuse_useless(options, origins, paths)
    words = words_of(options)
    source = source_fingerprint(paths)
    request = request_of(options, source, words)
    if (read_record(target) or {}).get("request") == request:
        print(f"{target} holds this tokenizer already: same text, same settings; nothing to do")
        return
    check_target(target, options.overwrite)

    workers = options.num_workers or num_cpus()
    per_line = options.document_per_line
    small = all(map(Path.is_file, paths)) and sum(path.stat().st_size for path in paths) < MOST_ALONE
    spans = plan_spans(
        paths, options.num_files or (1 if small else workers), document_per_line=per_line, input_format=table.format
    )
    form = {"document_per_line": per_line, "keep_spaces": causal}
    split = (source, words, needs_words(options.tokenizer_type, words), table, form)
    with splits_folder(target, options.intermediate_dir) as folder:
        tasks = [SplitTask(i, tuple(part), folder, *split) for i, part in enumerate(spans)]
        segment(tasks, workers, paths, report)
        lines = spread_sample(paths, MEASURED_LINES, table, **form)
        check_words(options, lines)
        trained = train(options, tasks, settings)
    record = {"request": request, "source_sha256": source, "text": report.as_dict(), "settings": settings.facts()}
    del record["text"]["examples"]  # names of files
    made = {"causal": causal, "model_max_length": options.model_max_length, "record": record}
    with replaced_folder(target, options.overwrite) as aside:
        write_tokenizer(aside, trained, options.tokenizer_type, words, **made)
        check_and_measure(aside, lines, words, trained, causal)
    inputs = shlex.join(["--input_file", *options.input_file, "--tokenizer_dir", str(target)])
    print(f"the tokenizer is in {target}; next:\n  {command('prepare_corpus')} {inputs} --output_dir store")


if __name__ == "__main__":
    main()
