"""Shard folders as datasets on the Hub: pushed, interrupted, and trained from elsewhere."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from support.loopback_hub import LoopbackHub
from support.loopback_repository import Repository
from support.loopback_writing import metadata_errors
from support.small_corpora import make_shards

from common.cli_errors import InputError
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.hub.__main__ import main
from training.hub.shard_dataset import dataset_card

# The client itself uploads large files this way without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def shards(shard_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folder, tmp_path / "shards"))


def push(folder: Path) -> None:
    main(["push-shards", str(folder), "--repo_id", "me/shards"])


def names_of(folder: Path) -> set[str]:
    return {shard.path.name for shard in ShardFolder.open(folder).shards}


def test_downloaded_shards_equal_the_pushed_ones_and_bring_their_tokenizer(
    hub: LoopbackHub, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(shards)
    assert "every hash compared" in capsys.readouterr().out
    there = hub.repositories["dataset", "me/shards"]
    assert len(there.messages) == 1
    assert set(there.files()) == names_of(shards) | {
        *(".gitattributes", "README.md", "manifest.json", "tokenizer.json", "tokenizer_config.json")
    }
    assert not metadata_errors({"content": there.files()["README.md"].decode()})
    assert not [name for name, content in there.files().items() if str(tmp_path).encode() in content]

    settings: dict[str, Any] = {"shard_tokens": 9_000, "val_tokens": 2_000, "num_workers": 0}
    folder = make_shards(tmp_path / "elsewhere", corpus="me/shards", tokenizer="me/shards", **settings)
    assert names_of(folder.path) == names_of(shards)
    for name in names_of(shards):
        assert (folder.path / name).read_bytes() == (shards / name).read_bytes()
    before, after = Manifest.read(shards), Manifest.read(folder.path)
    assert before is not None
    assert after is not None
    assert after.complete
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint


SETTINGS: dict[str, Any] = {"corpus": "me/shards", "shard_tokens": 9_000, "val_tokens": 2_000}


def replaced(files: dict[str, bytes], name: str, old: bytes, new: bytes) -> None:
    assert old in files[name]
    files[name] = files[name].replace(old, new)


SECOND = "corpus_train_000001.npy"
DAMAGE: dict[str, Callable[[dict[str, bytes]], object]] = {
    r"corpus_train_000001.npy in me/shards is not the shard that its manifest.json describes": lambda files: (
        files.update({SECOND: files[SECOND][:-2] + b"\x07\x00"})
    ),
    r"corpus_train_000002.npy in me/shards is not the shard that": lambda files: files.update(
        {"corpus_train_000002.npy": files[SECOND]}
    ),
    r"me/shards lacks corpus_train_000001.npy, compared with its manifest.json": lambda files: files.pop(SECOND),
    r"me/shards adds corpus_train_000099.npy, compared with": lambda files: files.update(
        {"corpus_train_000099.npy": files[SECOND]}
    ),
    r"me/shards has a broken manifest.json \(Expecting": lambda files: files.update({"manifest.json": b""}),
    r"me/shards has a broken manifest.json \(it is nested": lambda files: files.update(
        {"manifest.json": b"[" * 99_999}
    ),
    r"me/shards has a broken manifest.json \(Field 'split'": lambda files: replaced(
        files, "manifest.json", b'"val"', b'"vam"'
    ),
    r"me/shards is not complete, compared with its manifest": lambda files: replaced(
        files, "manifest.json", b'"complete": true', b'"complete": false'
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_shards_that_are_not_those_of_the_manifest_are_refused(
    message: str, hub: LoopbackHub, shards: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    DAMAGE[message](files)
    hub.repositories["dataset", "me/shards"] = Repository(files)
    with pytest.raises(InputError, match=message) as caught:
        make_shards(tmp_path / "elsewhere", tokenizer=str(shards), **SETTINGS)
    assert "\n" not in str(caught.value)
    kept = ShardFolder.find(tmp_path / "elsewhere")
    assert kept is None or not kept.complete


def test_shards_of_another_tokenizer_of_the_same_size_are_refused(
    hub: LoopbackHub, shards: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    hub.repositories["dataset", "me/shards"] = Repository({path.name: path.read_bytes() for path in shards.iterdir()})
    with pytest.raises(
        InputError, match=r"made with the tokenizer bpe-300, not with bpe-300; give the right one, such"
    ):
        make_shards(tmp_path / "elsewhere", tokenizer=str(tokenizer_folder), **SETTINGS)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", [SECOND, "manifest.json"])
def test_a_byte_that_is_flipped_in_the_transfer_is_downloaded_again(
    name: str, hub: LoopbackHub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download, flips = huggingface_hub.hf_hub_download, [2]

    def flipping(repository: str, file: str, **options: Any) -> str:
        path = Path(download(repository, file, **options))
        if file == name and flips[0]:
            flips[0] -= 1
            content = path.read_bytes()
            path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", flipping)
    hub.repositories["dataset", "me/shards"] = Repository({path.name: path.read_bytes() for path in shards.iterdir()})
    folder = make_shards(tmp_path / "elsewhere", tokenizer=str(shards), **SETTINGS)
    assert flips == [0]
    assert [shard.path.read_bytes() for shard in folder.shards] == [
        shard.path.read_bytes() for shard in ShardFolder.open(shards).shards
    ]


def test_an_interrupted_push_resumes_after_the_uploaded_shards(hub: LoopbackHub, shards: Path) -> None:
    uploads: list[str] = []

    def trouble(method: str, path: str, number: int) -> int | None:
        if "/lfs/upload/" in path:
            uploads.append(path)
            return 403 if len(uploads) == 3 else None
        return None

    hub.trouble = trouble
    with pytest.raises(InputError, match=r"cannot write to me/shards \(403\).*uploaded shards are not sent twice"):
        push(shards)
    assert not hub.repositories["dataset", "me/shards"].messages  # nothing partial is visible
    push(shards)
    assert len(uploads) == len(set(uploads)) + 1 == len(names_of(shards)) + 1
    uploads.clear()
    push(shards)
    assert not uploads
    assert len(hub.repositories["dataset", "me/shards"].messages) == 1


def test_a_corrupted_shard_is_not_pushed(hub: LoopbackHub, shards: Path) -> None:
    victim = ShardFolder.open(shards).train_shards[1].path
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"its sha256 is not the manifest's"):
        push(shards)
    assert not hub.repositories["dataset", "me/shards"].messages


def test_a_shard_corrupted_in_the_download_is_rejected(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    push(shards)
    files = hub.repositories["dataset", "me/shards"].files()
    name = ShardFolder.open(shards).train_shards[0].path.name
    right, wrong = files[name], files[name][:-1] + bytes([files[name][-1] ^ 1])

    def changed(method: str, path: str, number: int) -> None:
        files[name] = wrong if method in ("GET", "HEAD") and "/resolve/" in path else right

    hub.trouble = changed
    with pytest.raises(InputError, match="has another hash than on the Hub"):
        make_shards(
            tmp_path / "elsewhere", corpus="me/shards", tokenizer=str(shards), shard_tokens=9_000, val_tokens=2_000
        )


def test_missing_partial_and_unwritable_targets_are_rejected(hub: LoopbackHub, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing does not exist"):
        push(tmp_path / "nothing")
    hub.repositories["dataset", "them/shards"] = Repository()
    with pytest.raises(InputError, match=r"cannot write to them/shards \(403\)"):
        main(["push-shards", str(shards), "--repo_id", "them/shards"])
    manifest = Manifest.read(shards)
    assert manifest is not None
    replace(manifest, complete=False).write(shards)
    with pytest.raises(InputError, match="is not complete"):
        push(shards)


def test_shards_of_an_earlier_push_are_deleted(hub: LoopbackHub, shards: Path) -> None:
    push(shards)
    there = hub.repositories["dataset", "me/shards"]
    old = {"old_val_000000.npy": b"x", "old_train_000001.npy": b"x", "notes.md": b"mine"}
    there.commit("main", {**there.files(), **old}, "another folder")
    push(shards)
    assert set(there.files()) & set(old) == {"notes.md"}
    assert names_of(shards) <= set(there.files())


def test_the_card_of_another_programs_shards_has_only_what_is_known(tmp_path: Path) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 100
    for name in ("x_val_000000.bin", "x_train_000001.bin"):
        (tmp_path / name).write_bytes(header.tobytes() + np.arange(100, dtype="<u2").tobytes())
    card = dataset_card(ShardFolder.open(tmp_path), "me/shards")
    assert "| tokens | 200 |" in card
    assert not [word for word in ("manifest", "numpy", "language", "size_categories", "documents") if word in card]
    assert not metadata_errors({"content": card})


def test_a_dataset_card_edited_on_the_hub_keeps_its_text(hub: LoopbackHub, shards: Path) -> None:
    push(shards)
    there = hub.repositories["dataset", "me/shards"]
    card = there.files()["README.md"].decode()
    there.commit("main", {**there.files(), "README.md": f"{card}\nCollected by hand.\n".encode()}, "by hand")
    push(shards)
    assert "Collected by hand." in there.files()["README.md"].decode()


def test_a_missing_tokenizer_is_reported(hub: LoopbackHub, tmp_path: Path) -> None:
    from training.data.tokenization.tokenizer import load_tokenizer

    with pytest.raises(InputError, match=r"no tokenizer me/nothing: .*RepositoryNotFoundError"):
        load_tokenizer("me/nothing")
