"""`python -m training.prepare --inspect DIR`: the description of a folder, and what --verify finds."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import ROOT

from training import prepare
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder


@pytest.fixture
def folder(shard_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(shard_folder, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run_prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*flags: object, exit_code: int | None = None) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, flags)])
        if exit_code is None:
            prepare.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as caught:
            prepare.main()
        assert caught.value.code == exit_code
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("verify", [(), ("--verify",)])
def test_description_has_shards_tokenizer_and_first_lines(
    verify: tuple[str, ...], folder: Path, run_prepare: Callable[..., str]
) -> None:
    out = run_prepare("--inspect", folder, *verify)
    opened = ShardFolder.open(folder)
    assert opened.manifest is not None
    assert f"{folder}: complete" in out
    assert "tokenizer: bpe-300 with 300 ids as uint16" in out
    for shard in opened.shards:
        line = next(line for line in out.splitlines() if line.startswith(shard.path.name))
        columns = line.split()
        assert columns[1:4] == [shard.split, f"{shard.tokens:,}", f"{shard.documents:,}"]
        assert line.endswith("sha256 and ids") == bool(verify)
    assert f"{opened.manifest.tokens:,}" in out
    assert out.count("  | ") >= 2
    assert any(subject in out for subject in ("The model", "A shard", "The loader", "Every token"))


def test_partial_folder_is_described_as_partial(folder: Path, run_prepare: Callable[..., str]) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    dataclasses.replace(manifest, shards=manifest.shards[:2], complete=False, replaced_documents=3).write(folder)
    out = run_prepare("--inspect", folder, "--verify")
    assert f"{folder}: partial" in out
    assert "documents with invalid UTF-8: 3" in out
    assert out.count(".npy") == 2


def test_changed_byte_is_found_by_verify_only(folder: Path, run_prepare: Callable[..., str]) -> None:
    shard = ShardFolder.open(folder).train_shards[1].path
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    run_prepare("--inspect", folder)
    error = run_prepare("--inspect", folder, "--verify", exit_code=2)
    assert error.startswith(f"error: {shard} is corrupted: its sha256 is not the manifest's")


def test_folder_of_another_program_is_decoded_with_the_given_tokenizer(
    shard_folder: Path, tmp_path: Path, run_prepare: Callable[..., str]
) -> None:
    ids = ShardFolder.open(shard_folder).val_shard.read()
    for split in ("val", "train"):
        np.save(tmp_path / f"edufineweb_{split}_000000.npy", ids)
    out = run_prepare("--inspect", tmp_path, "--tokenizer", shard_folder)
    assert "shards of another program, without a manifest" in out
    assert "not counted" in out
    documents = np.count_nonzero(ids == 299)
    verified = run_prepare("--inspect", tmp_path, "--tokenizer", shard_folder, "--verify")
    assert f"{documents:,}  ids" in verified
    assert f"{2 * documents:,}" in verified


def test_ids_outside_the_vocabulary_are_reported_and_refused_by_verify(
    shard_folder: Path, tmp_path: Path, run_prepare: Callable[..., str]
) -> None:
    for split in ("val", "train"):
        np.save(tmp_path / f"x_{split}_000000.npy", np.full(50, 40_000, dtype="<u2"))
    assert "ids up to 40,000 are not in the vocabulary of bpe-300" in run_prepare(
        "--inspect", tmp_path, "--tokenizer", shard_folder
    )
    error = run_prepare("--inspect", tmp_path, "--tokenizer", shard_folder, "--verify", exit_code=2)
    assert "the vocabulary has 300 ids" in error


def test_folder_whose_tokenizer_was_replaced_is_refused(
    folder: Path, tmp_path: Path, run_prepare: Callable[..., str]
) -> None:
    from training.data.tokenization.tokenizer import train_bpe

    train_bpe(["another text, another tokenizer"] * 9, 270).save(folder)
    assert "were made with the tokenizer bpe-300, not with bpe-270" in run_prepare("--inspect", folder, exit_code=2)


@pytest.mark.parametrize("change", [{"vocab_size": 301}, {"end_of_text_id": 5}])
def test_manifest_that_contradicts_its_tokenizer_is_refused(
    folder: Path, change: dict[str, Any], run_prepare: Callable[..., str]
) -> None:
    manifest = Manifest.read(folder)
    assert manifest is not None
    dataclasses.replace(manifest, **change).write(folder)
    assert "its vocab_size and end_of_text_id are not those of the tok" in run_prepare("--inspect", folder, exit_code=2)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--inspect", "nowhere"), "error: nowhere does not exist; make shards"),
        (("--corpus", "installed-docs"), "error: --output is missing"),
        (("--corpus", "installed-docs", "--output", "x", "--verify"), "error: --verify needs --inspect DIR"),
        ((), "one of the arguments --corpus --inspect is required"),
    ],
)
def test_conflicting_flags_are_a_one_line_error(
    flags: tuple[str, ...], error: str, run_prepare: Callable[..., str]
) -> None:
    assert error in run_prepare(*flags, exit_code=2)


def test_closed_output_pipe_is_reported_once_and_is_not_an_error(folder: Path) -> None:
    command = [sys.executable, "-u", "-m", "training.prepare", "--inspect", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        lines = process.stderr.read().decode().splitlines()
    assert len(lines) == 1
    assert "cannot write" in lines[0]
