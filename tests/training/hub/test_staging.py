"""The folder that is pushed: hard links without training state and paths."""

from pathlib import Path

import pytest

from training.checkpoints.checksums import write_checksums
from training.hub.staging import stage


def test_a_staged_folder_shares_the_bytes_of_its_checkpoint_and_omits_paths(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-000004"
    (checkpoint / "training_state").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "config.json").write_text(
        '{"_name_or_path": "/home/me/base", "up": "../../home/me", "n": 1, "dtype": "float32"}'
    )
    (checkpoint / "training_state" / "optimizer.safetensors").write_bytes(b"moments")
    words = '{"added_tokens": [{"content": "/home"}]}'
    (checkpoint / "tokenizer.json").write_text(words)
    (checkpoint / ".hidden").write_text("secret")
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "adapter_model.safetensors"):
        (checkpoint / name).write_bytes(b"of another program")
    (checkpoint / "runs" / "my-laptop").mkdir(parents=True)
    (checkpoint / "runs" / "my-laptop" / "README.md").write_text("logs")
    staged = stage(tmp_path / "staged", checkpoint)
    assert sorted(path.name for path in staged.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (staged / "tokenizer.json").read_text() == words
    assert (staged / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert "/home" not in (staged / "config.json").read_text()
    assert '"n": 1' in (staged / "config.json").read_text()
    assert "/home/me/base" in (checkpoint / "config.json").read_text()


def test_a_file_system_without_hard_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    staged = stage(tmp_path / "staged", tmp_path / "model")
    assert (staged / "model.safetensors").read_bytes() == b"weights"


def test_a_training_state_is_staged_without_compiled_code(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-000004"
    for name in ("training_state/optimizer.safetensors", "modeling.py", "__pycache__/modeling.cpython-311.pyc"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"content")
    write_checksums(checkpoint)
    staged = stage(tmp_path / "staged", checkpoint, state=checkpoint)
    last = staged / "last-checkpoint"
    found = sorted(path.relative_to(last).as_posix() for path in last.rglob("*") if path.is_file())
    assert found == ["modeling.py", "training_state/SHA256SUMS", "training_state/optimizer.safetensors"]
