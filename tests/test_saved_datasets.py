"""Text from `datasets`: folders of save_to_disk, and data sets on the Hub, with a stand-in of its HTTP interface."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from lmscripts.errors import UserError
from lmscripts.text import corpus
from lmscripts.text.report import TextReport

datasets = pytest.importorskip("datasets")
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def documents(*names, report=None):
    report = TextReport() if report is None else report
    spans = [corpus.Span(str(path)) for path in corpus.find_files(names, report)]
    return list(corpus.read_documents(spans, report))


@pytest.fixture
def saved(tmp_path):
    """Two splits, as save_to_disk leaves them; train in two files and another order than it was made in."""
    texts = ["一。\n二。", "three.", "四。", "five."]
    train = datasets.Dataset.from_dict({"text": texts, "n": [0, 1, 2, 3]}).select([3, 2, 1, 0])
    test = datasets.Dataset.from_dict({"text": ["other."], "n": [9]})
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both", num_shards={"train": 2, "test": 1})
    return tmp_path / "both"


def test_a_saved_data_set_is_read_in_its_order_and_of_several_splits_train(saved):
    report = TextReport()
    assert documents(str(saved), report=report) == [["five."], ["四。"], ["three."], ["一。", "二。"]]
    assert report.changes["splits_left"] == 1
    assert f"first at {saved / 'test'}" in "\n".join(report.sentences())
    assert documents(str(saved / "test")) == [["other."]]
    before = corpus.source_fingerprint(corpus.find_files([str(saved)]))
    datasets.Dataset.from_dict({"text": ["new."], "n": [1]}).save_to_disk(saved / "train")
    assert documents(str(saved)) == [["new."]]
    assert corpus.source_fingerprint(corpus.find_files([str(saved)])) != before


def test_a_saved_data_set_that_does_not_say_what_to_read_is_refused(saved):
    for splits, sentence in (
        (["dev", "test"], r"no split train: name .*both/dev or .*both/test"),
        (5, "save the data"),
    ):
        (saved / "dataset_dict.json").write_text(json.dumps({"splits": splits}), encoding="utf-8")
        with pytest.raises(UserError, match=sentence):
            documents(str(saved))
    (part,) = (saved / "test").glob("*.arrow")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"arrow is not an Arrow stream that can be read"):
        documents(str(saved / "test"))


def test_without_the_hub_a_name_is_refused_in_one_sentence_and_a_commit_stands():
    with pytest.raises(UserError, match=r"which commit hub:some/text@v1:ja is .*offline.*hub:some/text@COMMIT"):
        corpus.find_files(["hub:some/text@v1:ja"])
    name = f"hub:some/text@{'c' * 40}:ja"
    assert list(map(str, corpus.find_files([name]))) == [name]


class Hub(BaseHTTPRequestHandler):
    """One data set of one file, whose text is the commit that is asked for."""

    def answer(self):
        where = self.path.partition("?")[0].strip("/").split("/")
        if where == ["move"]:
            COMMITS["main"] = "c" * 40
            return self.send(200, "")
        if where[:3] == ["api", "datasets", "some"]:
            revision = where[5] if len(where) > 5 else "main"
            if where[4:5] == ["tree"]:
                found = [] if len(where) > 6 else [{"type": "file", "path": "t.jsonl", "size": 60, "oid": "d" * 40}]
                return self.send(200, json.dumps(found))
            commit = COMMITS.get(revision, revision)
            if len(commit) == 40:
                return self.send(200, json.dumps({"id": "some/text", "sha": commit, "siblings": []}))
        if where[-1] == "t.jsonl":
            return self.send(200, json.dumps({"text": where[4]}).ljust(59) + "\n")
        return self.send(404, "")

    do_GET = do_HEAD = do_POST = answer

    def send(self, code, text):
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", '"d"')
        if code == 404:
            self.send_header("X-Error-Code", "RevisionNotFound" if "/revision/" in self.path else "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


PROGRAM = """
import sys, urllib.request
from pathlib import Path
from lmscripts.data.preparation import Source, describe_source
from lmscripts.errors import UserError
from lmscripts.text import corpus
from lmscripts.text.report import TextReport

for name in ("hub:some/text@v1", "hub:some/text", "hub:some/text", "hub:some/text@gone"):
    try:
        files = corpus.find_files([name])
        (document,) = corpus.read_documents([corpus.Span(str(path)) for path in files], TextReport())
        described = describe_source(Source((name,), Path(sys.argv[1])))
        print(*described["source"]["files"], *document, described["fingerprint"])
    except UserError as error:
        print(error)
    if name == "hub:some/text":
        urllib.request.urlopen(sys.argv[2] + "/move").close()
        corpus._pinned.cache_clear()  # as for another run
"""


def test_a_name_on_the_hub_is_that_of_one_commit_and_a_branch_that_moved_another_text(tokenizer_dir, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_address[1]}"
    to_it = {"HF_ENDPOINT": place, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    try:
        command = [sys.executable, "-c", PROGRAM, str(tokenizer_dir), place]
        done = subprocess.run(command, env=os.environ | to_it, capture_output=True, text=True, check=True, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    tagged, first, moved, gone = done.stdout.splitlines()
    prints = []
    for line, letter in ((tagged, "b"), (first, "a"), (moved, "c")):
        name, text, fingerprint = line.split()
        assert name == f"hub:some/text@{letter * 40}"
        assert text == letter * 40  # that is what was read
        prints.append(fingerprint)
    assert len(set(prints)) == 3
    assert "does not say which commit hub:some/text@gone is" in gone
