"""A complete folder is compared with the content of its corpus."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from support.small_corpora import folder_bytes, make_shards, write_corpus

from common.cli_errors import InputError
from training.data.producing.background_producer import BackgroundProducer
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.sources.installed_docs import InstalledDocs
from training.data.sources.open_corpus import open_corpus


def _replace_text(path: Path) -> None:
    """Write other text of the same length."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"token", b"nekot"))
    assert path.stat().st_size == len(content)


def test_folder_of_replaced_text_is_refused_with_both_revisions(tmp_path, settings):
    path = write_corpus(tmp_path / "c.jsonl", 100)
    settings = {**settings, "corpus": str(path)}
    make_shards(tmp_path / "out", **settings)
    before, revisions = folder_bytes(tmp_path / "out"), [open_corpus(str(path)).revision[:12]]
    _replace_text(path)
    revisions.append(open_corpus(str(path)).revision[:12])
    found = rf"revision {revisions[0]} of 'c', but '{path}' is now at {revisions[1]}; use another folder \(--data_dir"
    with pytest.raises(InputError, match=found):
        make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == before


def test_another_file_of_the_same_name_is_refused_and_a_copy_is_not(tmp_path, settings):
    for folder, seed in (("one", 0), ("copy", 0), ("other", 1)):
        (tmp_path / folder).mkdir()
        write_corpus(tmp_path / folder / "c.jsonl", 100, seed=seed)
    make_shards(tmp_path / "out", **{**settings, "corpus": str(tmp_path / "one" / "c.jsonl")})
    make_shards(tmp_path / "out", **{**settings, "corpus": str(tmp_path / "copy" / "c.jsonl")})
    with pytest.raises(InputError, match="was made of other content"):
        make_shards(tmp_path / "out", **{**settings, "corpus": str(tmp_path / "other" / "c.jsonl")})


def test_shards_without_their_corpus_are_used_and_it_is_reported(tmp_path, settings):
    path = write_corpus(tmp_path / "c.jsonl", 100)
    settings = {**settings, "corpus": str(path)}
    make_shards(tmp_path / "out", **settings)
    path.unlink()
    lines: list[str] = []
    assert make_shards(tmp_path / "out", **{**settings, "report": lines.append}).complete
    assert lines[0].startswith(f"{tmp_path / 'out'} was not compared with its corpus: unknown corpus '{path}'")


def test_training_does_not_start_on_replaced_text(tmp_path, settings, tiny_recipe):
    from common.ranks import Ranks
    from training.setup.training_data import open_data

    path = write_corpus(tmp_path / "c.jsonl", 100)
    settings = {**settings, "corpus": str(path)}
    make_shards(tmp_path / "out", **settings)
    recipe = tiny_recipe(data_dir=str(tmp_path / "out"), **settings)
    assert open_data(recipe, BackgroundProducer(), Ranks())[0].complete
    _replace_text(path)
    with pytest.raises(InputError, match="was made of other content"):
        open_data(recipe, BackgroundProducer(), Ranks())
    path.unlink()
    lines: list[str] = []
    assert open_data(recipe, BackgroundProducer(lines.append), Ranks())[0].complete
    assert "was not compared with its corpus" in lines[0]


def test_upgraded_packages_are_reported_and_do_not_stop_a_run(tmp_path, settings, monkeypatch):
    make_shards(tmp_path / "out", **settings)
    path = tmp_path / "out" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "corpus": "installed-docs"}))
    monkeypatch.setattr(InstalledDocs, "revision", "after the upgrade")
    lines: list[str] = []
    make_shards(tmp_path / "out", **{**settings, "corpus": "installed-docs", "report": lines.append})
    assert "'installed-docs' is now at after the up" in lines[0]
    assert "its shards are used as they are" in lines[0]


@pytest.mark.parametrize("answer", ["commit", RevisionNotFoundError, RepositoryNotFoundError, ConnectionError])
def test_dataset_with_the_commit_of_the_shards_is_accepted_and_another_is_not(tmp_path, settings, monkeypatch, answer):
    make_shards(tmp_path, **settings)
    asked: list[object] = []

    class Api:
        def dataset_info(self, repository, *, revision=None, **_):
            asked.append((repository, revision))
            if answer != "commit" and revision is not None:
                raise answer("no") if answer is ConnectionError else answer("no", response=_Response())
            return type("Info", (), {"sha": "a commit of main"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    spec = ShardSpec(folder=tmp_path, **{**settings, "corpus": "owner/c"})
    folder, lines = ShardFolder.open(tmp_path), []
    if answer is RevisionNotFoundError:
        with pytest.raises(InputError, match=r"of 'c', but 'owner/c' is now at a commit of "):
            spec.check_content(folder, lines.append)
    else:
        spec.check_content(folder, lines.append)
        assert [answer.__name__ in line for line in lines] == ([] if answer == "commit" else [True])
    assert asked[0] == ("owner/c", folder.manifest.corpus_revision)


class _Response:
    status_code, headers, text, request, url = 404, {}, "", None, "https://example.org"
