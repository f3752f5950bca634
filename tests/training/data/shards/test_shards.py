import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.atomic_files import PARTIAL_SUFFIX
from common.cli_errors import InputError
from training.data.shards.manifest import Manifest, ResumePoint
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.shards.shard_writer import ShardWriter

END_OF_TEXT = 300
MANIFEST = Manifest(
    corpus="c",
    corpus_config=None,
    corpus_revision="r",
    text_field="text",
    tokenizer="bpe-301",
    tokenizer_fingerprint="f",
    vocab_size=301,
    end_of_text_id=END_OF_TEXT,
    dtype="uint16",
    shard_tokens=10,
    val_tokens=4,
    max_tokens=None,
)


def _fill(folder: Path, ids, manifest: Manifest = MANIFEST) -> ShardFolder:
    writer = ShardWriter(folder, manifest)
    writer.add(np.array(ids))
    writer.finish()
    return ShardFolder.open(folder)


def test_shards_have_the_expected_names_sizes_and_ids(tmp_path):
    folder = _fill(tmp_path, range(27))
    names = [(shard.path.name, shard.split, shard.tokens) for shard in folder.shards]
    assert names == [
        ("c_val_000000.npy", "val", 4),
        ("c_train_000001.npy", "train", 10),
        ("c_train_000002.npy", "train", 10),
        ("c_train_000003.npy", "train", 3),
    ]
    assert np.concatenate([shard.read() for shard in folder.shards]).tolist() == list(range(27))
    assert np.load(folder.train_shards[0].path).dtype == np.dtype("<u2")
    assert folder.complete
    assert folder.val_shard.tokens == 4


def test_ids_are_read_only(tmp_path):
    ids = _fill(tmp_path, range(27)).val_shard.read()
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_ids_of_a_large_vocabulary_are_uint32(tmp_path):
    manifest = replace(MANIFEST, dtype="uint32", vocab_size=100_000, end_of_text_id=99_999)
    folder = _fill(tmp_path, [99_999, 70_000, 1, 2, 3, 4], manifest)
    assert folder.val_shard.read().tolist() == [99_999, 70_000, 1, 2]
    assert folder.val_shard.read().dtype == np.dtype("<u4")


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 25), min_size=1, max_size=8))
def test_shards_do_not_depend_on_how_ids_arrive(tmp_path_factory, sizes):
    ids = np.arange(sum(sizes) + 6) % 301
    at_once, pieces = tmp_path_factory.mktemp("at_once"), tmp_path_factory.mktemp("pieces")
    _fill(at_once, ids)
    writer = ShardWriter(pieces, MANIFEST)
    for piece in np.split(ids, np.cumsum(sizes)):
        writer.add(piece)
    writer.finish()
    assert {p.name: p.read_bytes() for p in at_once.iterdir()} == {p.name: p.read_bytes() for p in pieces.iterdir()}


def test_manifest_counts_documents_and_hashes_files(tmp_path):
    folder = _fill(tmp_path, [END_OF_TEXT, 1, END_OF_TEXT, 2, 3, 4, END_OF_TEXT, 5, 6])
    assert [shard.documents for shard in folder.shards] == [2, 1]
    assert folder.manifest.documents == 3
    assert folder.manifest.tokens == 9
    for shard in folder.shards:
        assert shard.sha256 == hashlib.sha256(shard.path.read_bytes()).hexdigest()


def test_writer_stops_at_max_tokens_of_training(tmp_path):
    manifest = replace(MANIFEST, max_tokens=13)
    writer = ShardWriter(tmp_path, manifest)
    assert not writer.full
    writer.add(np.arange(100))
    assert writer.full
    writer.finish()
    assert [shard.tokens for shard in ShardFolder.open(tmp_path).shards] == [4, 10, 3]


@pytest.mark.parametrize("tokens", [0, 3, 4, 5])
def test_too_small_corpus_is_refused_and_leaves_no_shard(tmp_path, tokens):
    writer = ShardWriter(tmp_path, MANIFEST)
    writer.add(np.arange(tokens))
    with pytest.raises(InputError, match=f"corpus has {tokens} tokens.* need at least 6"):
        writer.finish()
    assert not list(tmp_path.glob("*.npy*"))


def test_position_to_resume_from_has_its_key_of_the_file_format(tmp_path):
    manifest = replace(MANIFEST, resume=ResumePoint(0, [3, 7], 9))
    manifest.write(tmp_path)
    path = tmp_path / "manifest.json"
    resume = json.loads(path.read_text())["resume"]
    checksum = resume.pop("sha256")
    assert resume == {"document": 0, "place": [3, 7], "tokens": 9}
    assert Manifest.read(tmp_path) == manifest
    path.write_text(path.read_text().replace("7", "8", 1))
    with pytest.raises(InputError, match="resume has another sha256"):
        Manifest.read(tmp_path)
    path.write_text(path.read_text().replace(f',\n    "sha256": "{checksum}"', ""))  # as an earlier version wrote it
    assert Manifest.read(tmp_path) == MANIFEST


def test_partial_folder_has_its_complete_shards(tmp_path):
    writer = ShardWriter(tmp_path, MANIFEST)
    MANIFEST.write(tmp_path)
    with pytest.raises(InputError, match="holds no validation shard yet"):
        ShardFolder.open(tmp_path).val_shard  # noqa: B018
    writer.add(np.arange(20))
    folder = ShardFolder.open(tmp_path)
    assert not folder.complete
    assert [shard.tokens for shard in folder.shards] == [4, 10]
    assert not list(tmp_path.glob(f"*{PARTIAL_SUFFIX}"))


def _header(text: str, version: bytes = b"\x01\x00") -> bytes:
    content = text.encode() + b"\n"
    return b"\x93NUMPY" + version + len(content).to_bytes(2, "little") + content + b"\0" * 20


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_cut, "its header says 10 tokens, its size 8"),
        (lambda path: path.unlink(), "it cannot be read .No such file"),
        (lambda path: path.write_bytes(b""), "not a .npy file"),
        (lambda path: path.write_bytes(b"not numpy at all"), "not a .npy file"),
        (lambda path: np.save(path, np.zeros(7, "<u2")), "manifest.json says 10 tokens of uint16, its header 7"),
        (lambda path: np.save(path, np.zeros(10, "<u4")), "its header 10 of uint32"),
        (lambda path: np.save(path, np.zeros((2, 5), "<u2")), r"shape \(2, 5\)"),
        (lambda path: np.save(path, np.zeros(10, "<f4")), "float32"),
        *(
            (lambda path, content=content: path.write_bytes(content), "not a .npy file")
            for content in (
                _header("{'descr': '<u2', 'shape': (10"),  # a TokenError
                _header("{'descr': [ , }"),  # a SyntaxError
                _header("(" * 3000),  # a MemoryError
                _header("-" * 9000 + "1"),  # a RecursionError
                _header("{'descr': '<u2', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}"),
                _header("{'descr': '<u2', 'fortran_order': False, 'shape': (10,), \0}"),
                _header("{'descr': ('x', ), 'fortran_order': False, 'shape': (10,)}"),
                _header("{'descr': '<u2', 3: False, 'shape': (10,)}"),
                _header("{'descr': '<u2', 'fortran_order': False, 'shape': (10,)}", b"\x09\x09"),
                b"\x93NUMPY\x01",
            )
        ),
        (lambda path: path.write_bytes(_header("{'descr': '<u2', 'fortran_order': False, 'shape': (-4,)}")), "-4 tok"),
    ],
)
def test_corrupted_shard_is_refused_with_its_name_and_a_fix(tmp_path, damage, found):
    damage(_fill(tmp_path, range(27)).shards[1].path)
    with pytest.raises(InputError, match=found) as caught:
        ShardFolder.open(tmp_path)
    assert "c_train_000001.npy" in str(caught.value)
    assert "training.prepare again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: data.update(format_version=2), "has format_version 2, this program reads 1"),
        (lambda data: data.pop("format_version"), "has format_version None"),
        (lambda data: data.pop("dtype"), "missing 1 required positional argument: 'dtype'"),
        (lambda data: data["shards"][0].pop("tokens"), "missing 1 required positional argument: 'tokens'"),
        (lambda data: data.update(dtype="float7"), "Field 'dtype' expected one of .*, got float7"),
        (lambda data: data.update(dtype=7), "Field 'dtype' expected one of .*, got 7"),
        (lambda data: data.update(vocab_size="301"), "Field 'vocab_size' expected int, got str .value: '301'"),
        (lambda data: data.update(vocab_size=12), "end_of_text_id 300 with vocab_size 12"),
        (lambda data: data.update(complete="no"), "Field 'complete' expected bool, got str"),
        (lambda data: data.update(replaced_documents=None), "Field 'replaced_documents' expected int, got NoneType"),
        (lambda data: data.update(shard_tokens=0), "shard_tokens or val_tokens below 1"),
        (lambda data: data.update(shards={}), "shards is not a list"),
        (lambda data: data["shards"].append(data["shards"][1]), "two shards have the same file"),
        (lambda data: data["shards"][1].update(file="../c_train_000001.npy"), "a shard's file is not a file name"),
        (lambda data: data["shards"][1].update(file="c\0.npy"), "a shard's file is not a file name"),
        (lambda data: data["shards"][1].update(file="\ud800.npy"), "a shard's file is not a file name"),
        (lambda data: data["shards"][1].update(file=3), "Field 'file' expected str, got int .value: 3"),
        (
            lambda data: data["shards"][1].update(documents=-5),
            "a shard has no tokens, or a negative",
        ),
        (lambda data: data["shards"][1].update(tokens=0), "a shard has no tokens"),
        (lambda data: data["shards"].__delitem__(slice(1, None)), "complete, but without a training shard"),
        (lambda data: data["shards"][1].update(tokens="10"), "Field 'tokens' expected int, got str .value: '10'"),
        (lambda data: data["shards"][1].update(documents=None), "Field 'documents' expected int, got NoneType"),
        (lambda data: data["shards"][1].update(split="test"), "Field 'split' expected one of .*, got test"),
        (lambda data: data["shards"][0].update(split="train"), "validation shards must precede training shards"),
        (lambda data: data.update(resume=5), "5 is not an object"),
        (lambda data: data.update(resume={"document": 1, "sha256": "?"}), "resume has another sha256"),
        (lambda data: data.update(resume={"document": -1, "place": 0, "sha256": 1}), "resume has another sha256"),
    ],
)
def test_invalid_manifest_is_refused(tmp_path, change, found):
    _fill(tmp_path, range(27))
    path = tmp_path / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=found):
        ShardFolder.open(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b"[]", b'{"x": ' + b"9" * 5000])
def test_unreadable_manifest_is_a_one_line_error(tmp_path, content):
    _fill(tmp_path, range(27))
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match="delete the folder and prepare it again") as caught:
        ShardFolder.open(tmp_path)
    assert "\n" not in str(caught.value)


# Folders of other programs


def _bin(path: Path, ids, magic: int = 20240520, version: int = 1, claimed: int | None = None) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if claimed is None else claimed
    path.write_bytes(header.tobytes() + np.array(ids, dtype="<u2").tobytes())


def test_build_nanogpt_folder_opens(tmp_path):
    np.save(tmp_path / "edufineweb_val_000000", np.arange(9, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000002", np.arange(5, dtype=np.uint16))
    np.save(tmp_path / "edufineweb_train_000001", np.arange(7, dtype=np.uint16))
    folder = ShardFolder.open(tmp_path)
    assert (folder.manifest, folder.complete) == (None, True)
    assert [shard.tokens for shard in folder.train_shards] == [7, 5]
    assert folder.val_shard.read().tolist() == list(range(9))
    assert folder.val_shard.documents is None


@pytest.mark.parametrize("names", [("fineweb_val_000000", "fineweb_train_000001"), ("tiny_val", "tiny_train")])
def test_llmc_bin_folder_opens(tmp_path, names):
    _bin(tmp_path / f"{names[0]}.bin", [50256, 1, 2])
    _bin(tmp_path / f"{names[1]}.bin", [50256, 3, 4, 5])
    folder = ShardFolder.open(tmp_path)
    assert folder.val_shard.read().tolist() == [50256, 1, 2]
    assert folder.train_shards[0].read().tolist() == [50256, 3, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"magic": 20240801}, "found magic 20240801"),
        ({"version": 7}, "version 7"),
        ({"claimed": 5}, "its header says 5 tokens, its size 3"),
        ({"claimed": 2}, "its header says 2 tokens, its size 3"),
    ],
)
def test_other_bin_files_are_refused(tmp_path, arguments, found):
    _bin(tmp_path / "c_val_000000.bin", [1, 2, 3], **arguments)
    with pytest.raises(InputError, match=found):
        ShardFolder.open(tmp_path)


def test_bin_without_header_is_refused(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"\x01\x00" * 40)
    with pytest.raises(InputError, match="magic"):
        ShardFolder.open(tmp_path)


def test_ids_are_checked_against_the_vocabulary_size(tmp_path):
    np.save(tmp_path / "c_val_000000", np.array([1, 2], dtype=np.uint16))
    np.save(tmp_path / "c_train_000001", np.array([1, 50256, 2], dtype=np.uint16))
    folder = ShardFolder.open(tmp_path)
    folder.train_shards[0].check_ids(50257)
    folder.val_shard.check_ids(3)
    with pytest.raises(InputError, match=r"c_train_000001.npy holds token id 50,256, but the vocabulary has 4,096 ids"):
        folder.train_shards[0].check_ids(4096)


def test_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist; make shards"):
        ShardFolder.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no shards"):
        ShardFolder.open(tmp_path)
    assert ShardFolder.find(tmp_path) is None


def test_folder_with_both_formats_is_refused(tmp_path):
    np.save(tmp_path / "c_val_000000", np.array([1, 2], dtype=np.uint16))
    _bin(tmp_path / "c_train_000001.bin", [1])
    with pytest.raises(InputError, match=re.escape("both .npy and .bin")):
        ShardFolder.open(tmp_path)


def test_folder_without_a_validation_shard_is_refused_when_one_is_needed(tmp_path):
    np.save(tmp_path / "c_train_000001", np.array([1, 2], dtype=np.uint16))
    folder = ShardFolder.open(tmp_path)
    with pytest.raises(InputError, match="holds no validation shard; choose"):
        folder.val_shard  # noqa: B018


# The spec


def test_spec_survives_json(tmp_path):
    spec = ShardSpec(
        folder=tmp_path, corpus="fineweb-edu", tokenizer="train:300", shard_tokens=10, val_tokens=4, max_tokens=20
    )
    assert spec.corpus_config == "sample-10BT"
    assert ShardSpec.from_json(spec.to_json()) == spec


def test_spec_opens_a_folder_that_matches_and_refuses_others(tmp_path):
    spec = ShardSpec(folder=tmp_path / "shards", corpus="c", tokenizer="train:301", shard_tokens=10, val_tokens=4)
    assert spec.open_folder() is None
    spec.folder.mkdir()
    assert spec.open_folder() is None
    folder = _fill(spec.folder, range(27))
    assert spec.open_folder() == folder
    for change, difference in (
        ({"shard_tokens": 12}, "shard_tokens 10 instead of 12"),
        ({"text_field": "body"}, "text_field text instead of body"),
        ({"tokenizer": "train:400"}, "tokenizer bpe-301 instead of train:400"),
    ):
        with pytest.raises(InputError, match=f"holds other shards than requested: {difference}; request the same"):
            replace(spec, **change).open_folder()
