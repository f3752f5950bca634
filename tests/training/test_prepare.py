import subprocess
import sys

import pytest
from support.paths import ROOT

from training import prepare
from training.data.shards.shard_reader import ShardFolder


def _run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    prepare.main()


def test_command_fills_a_folder_and_prints_a_summary(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "c.txt"
    corpus.write_text("A window of tokens begins where the last one ended. " * 400)
    flags = ["--corpus", corpus, "--output", tmp_path / "out", "--tokenizer", "train:280", "--num_workers", 0]
    _run(monkeypatch, *flags, "--shard_tokens", 1000, "--val_tokens", 100)
    folder = ShardFolder.open(tmp_path / "out")
    assert folder.complete
    out = capsys.readouterr().out
    assert f"{len(folder.shards)} shards, 1 documents, {folder.manifest.tokens:,} tokens of bpe-280" in out
    assert "bytes per token" in out


def test_val_tokens_defaults_to_shard_tokens(tmp_path, monkeypatch):
    corpus = tmp_path / "c.txt"
    corpus.write_text("A window of tokens begins where the last one ended. " * 400)
    flags = ["--corpus", corpus, "--output", tmp_path / "out", "--tokenizer", "train:280", "--num_workers", 0]
    _run(monkeypatch, *flags, "--shard_tokens", 700)
    assert ShardFolder.open(tmp_path / "out").val_shard.tokens == 700


@pytest.mark.parametrize(("flag", "documents"), [((), 1), (("--document_separator", r"\n\n"), 400)])
def test_separator_of_documents_is_a_flag(tmp_path, monkeypatch, flag, documents):
    corpus = tmp_path / "c.txt"
    corpus.write_text("A window of tokens begins where the last one ended.\n\n" * 400)
    flags = ["--corpus", corpus, "--output", tmp_path / "out", "--tokenizer", "train:280", "--num_workers", 0]
    _run(monkeypatch, *flags, "--shard_tokens", 1000, "--val_tokens", 100, *flag)
    assert ShardFolder.open(tmp_path / "out").manifest.documents == documents


def test_user_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        _run(monkeypatch, "--corpus", "nowhere", "--output", tmp_path / "out")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown corpus 'nowhere'")


def test_help_imports_nothing_heavy():
    program = (
        "import sys, training.prepare as p; p.build_parser().format_help(); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
