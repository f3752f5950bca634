"""Fill a shard folder from a Hub repository that holds ready shards: download instead of tokenizing.

The result looks as if it had been tokenized here: the manifest names each file as soon as it is complete and checked.
An interrupted download resumes in the middle of the file (`hf_hub_download` keeps the part).
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from common.atomic_files import file_sha256, fsync
from common.cli_errors import InputError, TemporaryError
from common.token_files import split_of
from training.data.producing.progress import ProducerProgress
from training.data.shards.manifest import Manifest, ShardRecord
from training.data.shards.shard_reader import Shard
from training.data.shards.shard_spec import ShardSpec
from training.data.shards.shard_writer import create_folder, require_space
from training.data.sources.hub_corpus import HubCorpus
from training.data.tokenization.tokenizer import load_tokenizer, parse_train_spec

if TYPE_CHECKING:
    from huggingface_hub import RepoFile


def list_ready_shards(corpus: HubCorpus) -> list["RepoFile"]:
    """Return the shards of the repository, or of its folder named by the config, validation first; none for text."""
    import huggingface_hub

    tree = corpus.retry.call(
        lambda: list(
            huggingface_hub.HfApi().list_repo_tree(
                corpus.repository, recursive=True, repo_type="dataset", revision=corpus.revision
            )
        )
    )
    files = sorted((file for file in tree if isinstance(file, huggingface_hub.RepoFile)), key=lambda file: file.path)
    if corpus.config is not None:
        files = [file for file in files if PurePosixPath(file.path).is_relative_to(corpus.config)]
    val, train = ([file for file in files if split_of(file.path) == split] for split in ("val", "train"))
    types = sorted({PurePosixPath(file.path).suffix for file in (*val, *train)})
    if types and not (val and train and len(types) == 1):
        raise InputError(
            f"{corpus.repository} holds {len(val)} validation and {len(train)} training shards of type "
            f"{' and '.join(types)}; one type and both splits are needed: name their folder with --corpus_config"
        )
    by_name: dict[str, str] = {}
    for file in (*val, *train):
        other = by_name.setdefault(PurePosixPath(file.path).name, file.path)
        if other != file.path:
            raise InputError(
                f"{corpus.repository} holds two shards of one name: {other} and {file.path}; "
                "name the folder of the right ones with --corpus_config"
            )
    return [*val, *train]


def download_shards(
    spec: ShardSpec,
    corpus: HubCorpus,
    files: list["RepoFile"],
    manifest: Manifest | None,
    report: Callable[[str], None],
) -> None:
    """Download those of the ready shards that the folder lacks, up to `max_tokens`, and mark it complete."""
    from huggingface_hub.utils import disable_progress_bars

    if parse_train_spec(spec.tokenizer) is not None:
        raise InputError(
            f"{corpus.repository} holds ready shards, so tokenizer {spec.tokenizer} cannot be trained for them; "
            "name the tokenizer that they were made with, such as gpt2"
        )
    disable_progress_bars()
    total = sum(file.size for file in files)
    tokens = manifest.tokens if manifest else 0
    with _download_folder(spec.folder) as downloads, ProducerProgress(tokens, report) as progress:
        for index in range(len(manifest.shards) if manifest else 0, len(files)):
            file, remaining = files[index], sum(file.size for file in files[index:])
            require_space(spec.folder, remaining if spec.max_tokens is None else file.size)
            path, sha256 = _download(corpus, file, downloads)
            shard = Shard(path, split_of(file.path) or "train", 0)
            ids = shard.read()
            if manifest is None:
                tokenizer = load_tokenizer(spec.tokenizer)
                manifest = create_folder(spec, corpus, tokenizer, dtype=ids.dtype.name)
            if ids.dtype.name != manifest.dtype:
                raise InputError(
                    f"{file.path} holds ids of {ids.dtype.name}, the shards before it {manifest.dtype}; "
                    "give another --corpus"
                )
            shard.check_ids(manifest.vocab_size)
            documents = int(np.count_nonzero(ids == manifest.end_of_text_id))
            record = ShardRecord(path.name, shard.split, len(ids), documents, sha256)
            fsync(path)
            path.replace(spec.folder / record.file)
            fsync(spec.folder)
            manifest = replace(manifest, shards=(*manifest.shards, record))
            manifest.write(spec.folder)
            progress.show(manifest, manifest.tokens, 1 - (remaining - file.size) / total)
            train_tokens = sum(record.tokens for record in manifest.shards if record.split == "train")
            if spec.max_tokens is not None and train_tokens >= spec.max_tokens:
                break
        assert manifest is not None
        replace(manifest, complete=True).write(spec.folder)


@contextlib.contextmanager
def _download_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder for downloads; a partial shard folder keeps it, so that the download can resume."""
    downloads = folder / ".downloads"
    try:
        yield downloads
    finally:
        manifest = Manifest.read(folder)
        if manifest is None or not manifest.shards or manifest.complete:
            shutil.rmtree(downloads, ignore_errors=True)


def _download(corpus: HubCorpus, file: "RepoFile", folder: Path) -> tuple[Path, str]:
    """Return where the file was downloaded to below `folder`, and its sha256, compared with the Hub's."""
    import huggingface_hub

    path = Path(
        corpus.retry.call(
            lambda: huggingface_hub.hf_hub_download(
                corpus.repository, file.path, repo_type="dataset", revision=corpus.revision, local_dir=folder
            )
        )
    )
    sha256 = file_sha256(path)
    if file.lfs is not None and file.lfs.sha256 != sha256:
        path.unlink()
        raise TemporaryError(f"{file.path} has another hash than on the Hub after its download; run the command again")
    return path, sha256
