import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE, run_script

from lmscripts.data.preparation import Source, describe_source, prepare_store
from lmscripts.data.token_store import in_validation, open_store, verify_store
from lmscripts.errors import UserError
from lmscripts.files import file_sha256
from lmscripts.text.records import corpus_table


def contents(folder):
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def many_documents(tmp_path_factory, workspace):
    """The sample many times over, with a number in each document, so that several batches go to the workers."""
    file = tmp_path_factory.mktemp("text") / "many.txt"
    documents = (SAMPLE / "articles.txt").read_text(encoding="utf-8").strip().split("\n\n")
    with open(file, "w", encoding="utf-8") as out:
        for number in range(40):
            for document in documents:
                out.write(f"第{number}版\n{document}\n\n")
    return file


def prepare(source_file, tokenizer_dir, folder, workers=1, **changes):
    source = Source((str(source_file),), Path(tokenizer_dir), validation_fraction=0.05, **changes)
    return prepare_store(source, folder, workers)


def test_store_holds_the_ids_of_the_reloaded_tokenizer(store_dir, tokenizer_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    store = open_store(store_dir)
    documents = (SAMPLE / "articles.txt").read_text(encoding="utf-8").strip().split("\n\n")
    for name, wanted in (("train", False), ("validation", True)):
        part = store.part(name)
        expected = [d.split("\n") for d in documents if in_validation(d.split("\n"), 0.1) == wanted]
        assert part.num_documents == len(expected) > 0
        lengths = []
        for number, lines in enumerate(expected):
            ids = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
            lengths += map(len, ids)
            start, end = part.document_tokens[number : number + 2]
            assert part.tokens[start:end].tolist() == [i for line in ids for i in line]
            assert part.document_bytes[number] == sum(len(line.encode()) + 1 for line in lines)
        assert part.sentence_lengths.tolist() == lengths
        words = sum(len(tokenizer.word_tokenizer.tokenize(line)) for lines in expected for line in lines)
        starts = part.word_starts(0, part.tokens.size)
        assert starts.sum() == words == store.manifest["parts"][name]["words"]
        assert starts[part.document_tokens[:-1]].all()
        assert np.array_equal(part.word_starts(13, 77), starts[13:77])


def test_one_worker_and_three_give_the_same_bytes(many_documents, tokenizer_dir, tmp_path):
    stores = [prepare(many_documents, tokenizer_dir, tmp_path / f"s{n}", workers=n) for n in (1, 3)]
    assert contents(stores[0].folder) == contents(stores[1].folder)
    assert stores[0].manifest["parts"]["validation"]["documents"] > 0


def test_same_source_is_reused_and_another_refused(many_documents, tokenizer_dir, tmp_path):
    store = prepare(many_documents, tokenizer_dir, tmp_path / "store")
    written = (store.folder / "manifest.json").stat().st_mtime_ns
    prepare(many_documents, tokenizer_dir, tmp_path / "store")
    assert (store.folder / "manifest.json").stat().st_mtime_ns == written
    other = tmp_path / "other.txt"
    other.write_text("別の文章です。\n", encoding="utf-8")
    with pytest.raises(UserError, match=store.fingerprint[:16]):
        prepare(other, tokenizer_dir, tmp_path / "store")
    verify_store(store)


def test_validation_side_is_decided_by_the_text_alone(many_documents, tokenizer_dir, tmp_path):
    """Twice the text: every document stays on its side, and copies of one fall on the same side."""
    doubled = tmp_path / "doubled.txt"
    text = many_documents.read_text(encoding="utf-8")
    doubled.write_text(text + text, encoding="utf-8")
    once, twice = (prepare(f, tokenizer_dir, tmp_path / f.stem) for f in (many_documents, doubled))
    for part in ("train", "validation"):
        a, b = once.part(part), twice.part(part)
        assert b.num_documents == 2 * a.num_documents
        assert np.array_equal(np.concatenate([a.tokens, a.tokens]), b.tokens)


def test_validation_file_and_max_documents(tokenizer_dir, tmp_path):
    source = Source(
        (str(SAMPLE / "articles.txt"),),
        Path(tokenizer_dir),
        validation_files=(str(SAMPLE / "finnish.txt"),),
        max_documents=10,
    )
    manifest = prepare_store(source, tmp_path / "store", 1).manifest
    assert manifest["parts"]["train"]["documents"] == 10
    assert manifest["parts"]["validation"]["documents"] == 8


@pytest.mark.parametrize("file", ["tokens", "word_starts", "document_tokens"])
def test_truncated_store_is_refused(store_dir, tmp_path, file):
    broken = tmp_path / "broken"
    shutil.copytree(store_dir, broken)
    path = broken / "train" / f"{file}.bin"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{file}.bin has .* bytes"):
        open_store(broken)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_store(broken)


def test_one_flipped_bit_is_found(store_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(store_dir, broken)
    path = broken / "train" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    done = run_script("prepare_corpus.py", "--inspect", broken, check=False)
    assert done.returncode == 2
    assert "damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_store_of_another_tokenizer_is_refused(store_dir, tokenizer_dir):
    with pytest.raises(UserError, match="0123456789abcdef"):
        open_store(store_dir, "0123456789abcdef0000")


def test_a_killed_build_leaves_nothing_that_looks_like_a_store(many_documents, tokenizer_dir, tmp_path):
    class Killed(BaseException):
        pass

    def stop(_):
        raise Killed

    source = Source((str(many_documents),), Path(tokenizer_dir))
    with pytest.raises(Killed):
        prepare_store(source, tmp_path / "store", 1, stop)
    assert not (tmp_path / "store").exists()
    assert list(tmp_path.iterdir()) == []


def test_old_tokenizer_in_the_store_folder_is_self_contained(store_dir, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(store_dir, moved)
    done = run_script("prepare_corpus.py", "--inspect", moved)
    assert "every file has the hash" in done.stdout
    manifest = json.loads((moved / "manifest.json").read_text(encoding="utf-8"))
    assert f"{manifest['parts']['train']['tokens']:,}" in done.stdout


def test_text_held_out_is_not_text_trained_on(tokenizer_dir, tmp_path):
    """The same two files, once with the second held out and once with both trained on, are two stores."""
    a, b = SAMPLE / "articles.txt", SAMPLE / "finnish.txt"
    apart = Source((str(a),), Path(tokenizer_dir), validation_files=(str(b),))
    together = Source((str(a), str(b)), Path(tokenizer_dir), validation_fraction=0.0)
    prepare_store(apart, tmp_path / "store", 1)
    with pytest.raises(UserError, match="another text"):
        prepare_store(together, tmp_path / "store", 1)


def test_a_killed_worker_is_an_error_and_not_a_wait(many_documents, tokenizer_dir, tmp_path):
    import os
    import signal

    import psutil

    def kill_a_worker(_):
        for child in psutil.Process(os.getpid()).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it was killed at the batch before
                if "spawn_main" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)

    longer = tmp_path / "longer.txt"  # than what is under way at once, which may be ready before the kill
    longer.write_bytes(many_documents.read_bytes() * 4)
    with pytest.raises(UserError, match=r"died on the text up to .*longer.txt:[0-9]+; "):
        prepare_store(Source((str(longer),), Path(tokenizer_dir)), tmp_path / "store", 2, kill_a_worker)
    assert not (tmp_path / "store").exists()


def test_how_tables_are_read_is_told_apart_only_where_it_is_unusual(tokenizer_dir, tmp_path):
    """So that a store that an earlier version made of the same text is found again."""
    (tmp_path / "a.csv").write_text('id;text\n1;eins\n2;"zwei\n', encoding="utf-8")

    def options(**table):
        source = Source((str(tmp_path / "a.csv"),), Path(tokenizer_dir), table=corpus_table(**table))
        return describe_source(source)["options"]

    usual = {"validation_fraction": 0.01, "max_documents": None, "document_per_line": False, "text_column": "text"}
    assert options() == options(delimiter=None, quotes=True, input_format=None) == usual
    assert options(quotes=False, delimiter=";") == usual | {"quotes": False, "delimiter": ";"}
    assert options(input_format="txt") == usual | {"format": "txt"}
    (tmp_path / "a.csv").write_text('{"text": "eins"}\n', encoding="utf-8")
    assert options() == usual
    (tmp_path / "a.csv").rename(tmp_path / "a.json")
    (tmp_path / "a.csv").symlink_to(tmp_path / "a.json")
    source = Source((str(tmp_path / "a.json"),), Path(tokenizer_dir))
    assert describe_source(source)["options"] == usual | {"json_lines": ["a.json"]}


def test_bad_rows_and_skipped_files_are_told_by_every_script_that_reads_a_corpus(tokenizer_dir, tmp_path):
    """One reader: the tokenizer and the store leave out the same rows and say why; --no_quotes takes them as texts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [f"{number}\tこれは{number}番目の文です。" for number in range(40)]
    rows[7] = '7\t"引用で始まる文です。'
    (folder / "a.tsv").write_text("\n".join(["id\ttext", *rows, "id\ttext", ""]), encoding="utf-8")
    (folder / "b.json").write_text("{}", encoding="utf-8")
    told = ["2 records could not be read and were left out", f"1 x stray quote, at {folder}/a.tsv:9:", "--no_quotes"]
    told += [f"1 x header repeated, at {folder}/a.tsv:42:", "1 files of a folder were left out", f"{folder}/b.json"]
    arguments = ["--input_file", folder, "--num_workers", 1]
    store = ["prepare_corpus.py", *arguments, "--tokenizer_dir", tokenizer_dir, "--output_dir"]
    vocabulary = ["train_tokenizer.py", *arguments, "--vocab_size", 200, "--model_dir"]
    for number, command in enumerate((store, vocabulary)):
        done = run_script(*command, tmp_path / f"skipped{number}")
        assert all(words in done.stdout for words in told), done.stdout
        done = run_script(*command, tmp_path / f"taken{number}", "--no_quotes", "--delimiter", "\t")
        assert "1 records could not be read" in done.stdout
        assert "stray quote" not in done.stdout
    assert open_store(tmp_path / "skipped0").manifest["text"]["documents"] == 39
    assert open_store(tmp_path / "taken0").manifest["text"]["documents"] == 40


def test_held_out_text_that_is_trained_on_is_counted_and_told(tokenizer_dir, tmp_path):
    """A part of it, in another file and order; and all of it."""
    documents = (SAMPLE / "articles.txt").read_text(encoding="utf-8").strip().split("\n\n")
    (tmp_path / "train.txt").write_text("\n\n".join(documents), encoding="utf-8")
    other = ["これは別の文章です。", "これも別の文章です。", *documents[7:3:-1], documents[5]]
    (tmp_path / "held_out.txt").write_text("\n\n".join(other), encoding="utf-8")
    for file, counted, of in (("held_out.txt", 5, 7), ("train.txt", len(documents), len(documents))):
        files = ["--input_file", tmp_path / "train.txt", "--validation_file", tmp_path / file]
        store = tmp_path / f"store_{file}"
        done = run_script("prepare_corpus.py", *files, "--tokenizer_dir", tokenizer_dir, "--output_dir", store)
        sentence = f"{counted} of the {of} held-out documents of {store} are in the training text too"
        assert sentence in done.stdout
        assert ("held-out figures speak of such text alone" in done.stdout) == (of < 10)
        assert open_store(store).manifest["parts"]["validation"]["also_in_training"] == counted
    run = ["--dataset_dir", store, "--model_dir", tmp_path / "run", "--model_type", "bert-tiny", "--dry_run"]
    assert sentence in run_script("run_pretraining.py", *run).stdout
    shutil.rmtree(store)
    files = ["--input_file", tmp_path / "train.txt", "--validation_file", SAMPLE / "finnish.txt"]
    done = run_script("prepare_corpus.py", *files, "--tokenizer_dir", tokenizer_dir, "--output_dir", store)
    assert "training text too" not in done.stdout
