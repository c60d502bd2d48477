import json
import mmap
import os
import shutil
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lmscripts.data.arrays import fetch_soon, map_array
from lmscripts.data.packing import Layout, PackedRows, open_rows
from lmscripts.data.stream import StreamRows
from lmscripts.data.token_store import Part
from lmscripts.errors import UserError

BEGIN, END, PAD = 2, 3, 0


def make_part(document_lengths, seed=0, word_share=0.8):
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(document_lengths)]).astype(np.int64)
    tokens = random.integers(10, 30000, offsets[-1]).astype(np.uint16)
    starts = random.random(offsets[-1]) < word_share
    starts[offsets[:-1]] = True
    lengths = np.zeros(len(document_lengths), np.int64)
    bits = np.packbits(starts, bitorder="little")
    return Part(Path("train"), tokens, bits, np.zeros(0, np.uint32), offsets, offsets, lengths), starts


CORPORA = {
    "mixed": np.random.default_rng(1).integers(1, 400, 300),
    "short": np.random.default_rng(2).integers(1, 40, 2000),
    "one long": np.array([20_000, 5, 3]),
    "tiny": np.array([1]),
}


def rows_of(part, layout, folder, fingerprint="fingerprint"):
    return open_rows(SimpleNamespace(part=lambda name: part, fingerprint=fingerprint, folder=folder), "train", layout)


def expected_row(part, packed, row, layout):
    """One row written out segment by segment."""
    ids, segments, positions = [], [], []
    if layout.lead_of_row:
        ids, segments, positions = [BEGIN], [0], [0]
    for number, segment in enumerate(range(packed.first_segment[row], packed.first_segment[row + 1])):
        start, size = packed.segment_start[segment], packed.segment_length[segment]
        piece = [BEGIN] * layout.lead_of_segment + part.tokens[start : start + size].tolist() + [END]
        isolated = layout.packing == "isolated"
        positions += range(len(piece)) if isolated else range(len(ids), len(ids) + len(piece))
        segments += [number if isolated else 0] * len(piece)
        ids += piece
    return ids, segments, positions


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("packing", ["isolated", "contiguous"])
@pytest.mark.parametrize("length", [16, 64, 128])
@pytest.mark.parametrize("begin", [BEGIN, None])
def test_rows_hold_every_token_once_in_the_right_place(tmp_path, corpus, packing, length, begin):
    part, _ = make_part(CORPORA[corpus])
    layout = Layout(length, packing, begin, END, PAD)
    packed = rows_of(part, layout, tmp_path)
    rows = packed.read(np.arange(packed.num_rows))
    assert np.array_equal(rows.ids[rows.content], part.tokens)
    assert packed.real_tokens == part.tokens.size
    for row in range(0, packed.num_rows, max(1, packed.num_rows // 40)):
        ids, segments, positions = expected_row(part, packed, row, layout)
        used = len(ids)
        assert used <= length
        assert rows.ids[row].tolist() == ids + [PAD] * (length - used)
        assert rows.segments[row].tolist() == segments + [-1] * (length - used)
        assert rows.positions[row, :used].tolist() == positions
        assert packed.fill() == pytest.approx((rows.segments >= 0).mean(), abs=1e-12)


@pytest.mark.parametrize("corpus", ["mixed", "one long"])
def test_rows_are_full_and_no_word_is_cut(tmp_path, corpus):
    part, starts = make_part(CORPORA[corpus])
    layout = Layout(128, "isolated", BEGIN, END, PAD)
    packed = rows_of(part, layout, tmp_path)
    assert packed.fill() > 0.98
    assert starts[packed.segment_start].all()
    rows = packed.read(np.arange(packed.num_rows))
    assert np.array_equal(rows.word_starts[rows.content], starts)


def test_a_word_longer_than_a_row_is_cut_and_nothing_is_lost(tmp_path):
    part, _ = make_part(np.array([500, 3]), word_share=0.0)
    layout = Layout(32, "isolated", BEGIN, END, PAD)
    packed = rows_of(part, layout, tmp_path)
    rows = packed.read(np.arange(packed.num_rows))
    assert np.array_equal(rows.ids[rows.content], part.tokens)
    first_of_segment = rows.content & (rows.positions == 1)
    assert rows.word_starts[first_of_segment].all()


def laid_out(part, layout):
    """The segments, one after the other: the plain way, (first token, length, whether it begins a row)."""
    length, lead, row_lead = layout.sequence_length, layout.lead_of_segment, layout.lead_of_row
    found, used = [], row_lead
    for begin, end in pairwise(part.document_tokens.tolist()):
        while begin < end:
            room = length - used - lead - 1
            size = end - begin
            if size > room:
                starts = np.flatnonzero(part.word_starts(begin, begin + room + 1)[1:]) + 1 if room >= 4 else []
                if not len(starts) and used > row_lead:
                    used = row_lead
                    continue
                size = starts[-1] if len(starts) else room
            found.append((begin, size, used == row_lead))
            used += lead + size + 1
            begin += size
            if begin < end:
                used = row_lead
    return [np.array(values) for values in zip(*found, strict=True)]


@pytest.mark.parametrize("word_share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("sizes", ["short", "any", "long"])
def test_rows_are_those_of_the_plain_way(tmp_path, monkeypatch, sizes, word_share):
    """Also where pieces of the text are looked at that end inside of rows, and past documents without tokens."""
    monkeypatch.setattr("lmscripts.files.sync_folder", lambda folder: None)  # of hundreds of small files
    random = np.random.default_rng(3)
    few, most, number = {"short": (0, 7, 150), "any": (0, 150, 30), "long": (700, 900, 2)}[sizes]
    part, _ = make_part([*random.integers(few, most, number), 0, 5], word_share=word_share)
    for length, packing, begin in product((10, 16, 130), ("isolated", "contiguous"), (BEGIN, None)):
        layout = Layout(length, packing, begin, END, PAD)
        starts, lengths, begins_row = laid_out(part, layout)
        for tokens in (1, 1 << 20):
            monkeypatch.setattr("lmscripts.data.packing._CHUNK", tokens)
            packed = rows_of(part, layout, tmp_path, f"looked at {tokens} at a time")
            assert np.array_equal(packed.segment_start, starts)
            assert np.array_equal(packed.segment_length, lengths)
            assert np.array_equal(packed.first_segment, [*np.flatnonzero(begins_row), starts.size])


def test_order_of_rows_does_not_matter(tmp_path):
    part, _ = make_part(CORPORA["mixed"])
    layout = Layout(64, "isolated", BEGIN, END, PAD)
    packed = rows_of(part, layout, tmp_path)
    order = np.random.default_rng(0).permutation(packed.num_rows)[:50]
    together = packed.read(order)
    for place, row in enumerate(order):
        alone = packed.read(np.array([row]))
        assert np.array_equal(alone.ids[0], together.ids[place])
        assert np.array_equal(alone.segments[0], together.segments[place])


def test_index_is_built_once_and_reused(tmp_path):
    part, _ = make_part(CORPORA["short"])
    layout = Layout(64, "isolated", BEGIN, END, PAD)
    first = rows_of(part, layout, tmp_path)
    made = sorted(tmp_path.rglob("*"))
    again = rows_of(part, layout, tmp_path)
    assert sorted(tmp_path.rglob("*")) == made
    assert np.array_equal(first.segment_start, again.segment_start)
    rows_of(part, layout, tmp_path, "another store")
    assert len(list((tmp_path / "rows").iterdir())) == 2


def test_too_short_rows_are_refused(tmp_path):
    part, _ = make_part(CORPORA["tiny"])
    with pytest.raises(UserError, match="sequence length 6"):
        rows_of(part, Layout(6, "isolated", BEGIN, END, PAD), tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "facts", "form", "no hashes", "a file"])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    part, _ = make_part(CORPORA["short"])
    layout = Layout(64, "isolated", BEGIN, END, PAD)
    whole = np.array(rows_of(part, layout, tmp_path).segment_length)
    (folder,) = (tmp_path / "rows").iterdir()
    file, facts = folder / "segment_length.bin", folder / "index.json"
    if damage == "cut":
        file.write_bytes(b"1234")
    elif damage == "flipped":
        file.write_bytes(bytes([file.read_bytes()[0] ^ 4]) + file.read_bytes()[1:])
    elif damage == "gone":
        file.unlink()
    elif damage == "facts":
        facts.write_text("[" * 100_000)
    elif damage == "form":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"rows": "many"}))
    elif damage == "no hashes":  # as an earlier version wrote it
        facts.write_text(json.dumps({k: v for k, v in json.loads(facts.read_text()).items() if k != "sha256"}))
    else:
        shutil.rmtree(folder)
        folder.write_text("")
    assert np.array_equal(rows_of(part, layout, tmp_path).segment_length, whole)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == [folder.name]


def test_an_index_of_a_store_that_cannot_be_written_is_kept_for_its_user_alone(tmp_path, monkeypatch):
    part, _ = make_part(CORPORA["short"])
    layout, cache = Layout(64, "isolated", BEGIN, END, PAD), tmp_path / "cache"
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(str(cache)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    rows_of(part, layout, tmp_path / "store")
    assert len(list((cache / "lmscripts" / "rows" / "fingerprint").iterdir())) == 1
    assert (cache / "lmscripts").stat().st_mode & 0o077 == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(cache / "lmscripts")
    (cache / "lmscripts").symlink_to(tmp_path / "elsewhere")  # laid out by somebody
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        rows_of(part, layout, tmp_path / "store")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def sparse_part(folder, documents):
    """A part with documents of these sizes on files that hold next to nothing: token 7 and a word start at the end."""
    offsets = np.append(0, np.cumsum(documents))
    sizes = {"tokens": 2 * int(offsets[-1]), "word_starts": -(-int(offsets[-1]) // 8)}
    for (name, size), last in zip(sizes.items(), (b"\7\0", b"\x80"), strict=True):
        with (folder / f"{name}.bin").open("wb") as file:
            file.seek(size - len(last))
            file.write(last)
    tokens, bits = (map_array(folder / f"{n}.bin", np.dtype(d), sizes[n]) for n, d in zip(sizes, ("u2", "u1")))
    return Part(folder, tokens, bits, np.zeros(0, np.uint32), offsets, offsets, np.zeros(len(documents), np.int64))


def test_rows_beyond_four_billion_tokens(tmp_path):
    total = (1 << 32) + 4096
    part = sparse_part(tmp_path, [total - 4000, 3900, 100])
    rows = StreamRows(part, Layout(128, "isolated", BEGIN, END, PAD), 1).read(np.array([(total + 3) // 128]))
    assert rows.targets[0, :4].tolist() == [0, 7, END, PAD]
    starts = np.array([total - 4000 - 126, total - 100])
    packed = PackedRows(
        part, Layout(128, "isolated", BEGIN, END, PAD), {}, np.arange(3), starts, np.array([126, 100], np.int32)
    )
    laid_out = packed.read(np.array([1, 0]))
    assert laid_out.ids[0, 96:102].tolist() == [0, 0, 0, 0, 7, END]
    assert laid_out.ids[1].tolist() == [BEGIN, *[0] * 126, END]
    assert laid_out.word_starts[0, [1, 99, 100]].tolist() == [True, False, True]


@pytest.mark.slow
def test_an_index_beyond_four_billion_tokens(tmp_path):
    total = (1 << 32) + 4096
    packed = rows_of(sparse_part(tmp_path, [total - 4000, 3900, 100]), Layout(1 << 16, "isolated", 2, 3, 0), tmp_path)
    assert packed.segment_start[-2:].tolist() == [total - 4000, total - 100]
    assert packed.real_tokens == packed.segment_length.sum(dtype=np.int64) == total


def test_rows_that_are_not_in_memory_are_asked_for_all_at_once(tmp_path, monkeypatch):
    """Only while the disk has to be waited for, and never beyond the ends of a file."""
    asked = []

    class Mapped(mmap.mmap):
        def madvise(self, *what):
            asked.append(what[1:])
            super().madvise(*what)

    faults = iter([5, 5, *[9] * 200])
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_majflt=next(faults)))
    monkeypatch.setattr("mmap.mmap", Mapped)
    monkeypatch.setattr("lmscripts.data.arrays._cold", SimpleNamespace(faults=5, calls=0))
    tokens = np.arange(20_000, dtype=np.uint16)
    (tmp_path / "a.bin").write_bytes(tokens.tobytes())
    mapped = map_array(tmp_path / "a.bin", tokens.dtype, tokens.nbytes)
    assert np.array_equal(mapped, tokens)
    begin = np.array([-5, 2040, 19_990, 30_000])
    for number in range(104):
        fetch_soon([(mapped, begin, 128), (tokens, begin, 128)])
        assert len(asked) == 4 * min(max(0, number - 1), 100)
    page = mmap.PAGESIZE
    assert asked[:4] == [(0, 256), *((at - at % page, at % page + 256) for at in (4080, 39_980, 39_998))]
