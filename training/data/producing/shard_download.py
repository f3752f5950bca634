"""Fill a shard folder from a Hub repository that holds ready shards: download instead of tokenizing.

The result looks as if it had been tokenized here: the manifest names each file as soon as it is complete and checked.
Its hash must be the Hub's and, if the repository has a manifest, that manifest's. An interrupted download resumes in
the middle of the file (`hf_hub_download` keeps the part).
"""

import contextlib
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from common.atomic_files import file_sha256, fsync
from common.cli_errors import InputError, TemporaryError, one_line
from common.token_files import split_of
from training.data.producing.progress import ProducerProgress
from training.data.shards.manifest import MANIFEST_NAME, Manifest, ShardRecord
from training.data.shards.shard_reader import Shard
from training.data.shards.shard_spec import ShardSpec
from training.data.shards.shard_writer import create_folder, require_space
from training.data.sources.hub_corpus import HubCorpus
from training.data.tokenization.tokenizer import load_tokenizer, parse_train_spec

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

_ADVICE = "push the shards again, or give another --corpus"
_ATTEMPTS = 3  # at a file that arrives with another hash


class ReadyShards(NamedTuple):
    """The shards of a repository, validation first, and the manifest next to them; None for another program's."""

    files: "list[RepoFile]"
    manifest: "RepoFile | None"


def find_ready_shards(corpus: HubCorpus) -> ReadyShards | None:
    """Return the shards of the repository, or of its folder named by the config; None for text."""
    import huggingface_hub

    request: Any = {"recursive": True, "repo_type": "dataset", "revision": corpus.revision}
    tree = corpus.retry.call(lambda: list(huggingface_hub.HfApi().list_repo_tree(corpus.repository, **request)))
    files = {
        PurePosixPath(file.path): file
        for file in sorted(tree, key=lambda file: file.path)
        if isinstance(file, huggingface_hub.RepoFile)
        and (corpus.config is None or PurePosixPath(file.path).is_relative_to(corpus.config))
    }
    val, train = ([path for path in files if split_of(path.name) == split] for split in ("val", "train"))
    if not val and not train:
        return None
    types = sorted({path.suffix for path in (*val, *train)})
    if not (val and train and len(types) == 1):
        raise InputError(
            f"{corpus.repository} holds {len(val)} validation and {len(train)} training shards of type "
            f"{' and '.join(types)}; one type and both splits are needed: name their folder with --corpus_config"
        )
    by_name: dict[str, PurePosixPath] = {}
    for path in (*val, *train):
        if (other := by_name.setdefault(path.name, path)) != path:
            raise InputError(
                f"{corpus.repository} holds two shards of one name: {other} and {path}; "
                "name the folder of the right ones with --corpus_config"
            )
    return ReadyShards([files[path] for path in (*val, *train)], files.get(val[0].with_name(MANIFEST_NAME)))


def download_shards(
    spec: ShardSpec,
    corpus: HubCorpus,
    shards: ReadyShards,
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
    files = shards.files
    total = sum(file.size for file in files)
    tokens = manifest.tokens if manifest else 0
    with _download_folder(spec.folder) as downloads, ProducerProgress(tokens, report) as progress:
        listed = None if shards.manifest is None else _listed(corpus, shards, shards.manifest, downloads)
        for index in range(len(manifest.shards) if manifest else 0, len(files)):
            file, remaining = files[index], sum(file.size for file in files[index:])
            require_space(spec.folder, remaining if spec.max_tokens is None else file.size)
            path, sha256 = _download(corpus, file, downloads)
            shard = Shard(path, split_of(file.path) or "train", 0)
            ids = shard.read()
            if manifest is None:
                manifest = create_folder(spec, corpus, load_tokenizer(spec.tokenizer), dtype=ids.dtype.name)
            if listed is not None and manifest.tokenizer_fingerprint != listed.tokenizer_fingerprint:
                raise InputError(
                    f"the shards in {corpus.repository} were made with the tokenizer {listed.tokenizer}, not with "
                    f"{manifest.tokenizer}; give the right one, such as --tokenizer {corpus.repository}"
                )
            if ids.dtype.name != manifest.dtype:
                raise InputError(
                    f"{file.path} holds ids of {ids.dtype.name}, the shards before it {manifest.dtype}; "
                    "give another --corpus"
                )
            shard.check_ids(manifest.vocab_size)
            documents = int(np.count_nonzero(ids == manifest.end_of_text_id))
            record = ShardRecord(path.name, shard.split, len(ids), documents, sha256)
            if listed is not None and record not in listed.shards:
                path.unlink()
                raise InputError(
                    f"{file.path} in {corpus.repository} is not the shard that its {MANIFEST_NAME} describes: it has "
                    f"{record.tokens:,} tokens and sha256 {sha256[:12]}…; {_ADVICE}"
                )
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


def _listed(corpus: HubCorpus, shards: ReadyShards, manifest: "RepoFile", downloads: Path) -> Manifest:
    """Return the repository's own manifest, which must name the shards that the repository holds, and no others."""
    path, _ = _download(corpus, manifest, downloads)
    try:
        listed = Manifest.read(path.parent)
    except InputError as error:
        reason = str(error).partition(": ")[2].partition(";")[0] or str(error)
        raise InputError(
            f"{corpus.repository} has a broken {MANIFEST_NAME} ({one_line(InputError(reason), 120)}); {_ADVICE}"
        ) from None
    assert listed is not None
    found = {PurePosixPath(file.path).name for file in shards.files}
    expected = {shard.file for shard in listed.shards}
    problems = [
        *(f"lacks {name}" for name in sorted(expected - found)),
        *(f"adds {name}" for name in sorted(found - expected)),
        *(["is not complete"] if not listed.complete else []),
    ]
    if problems:
        raise InputError(f"{corpus.repository} {problems[0]}, compared with its {MANIFEST_NAME}; {_ADVICE}")
    return listed


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

    request: Any = {"repo_type": "dataset", "revision": corpus.revision, "local_dir": folder}
    download = functools.partial(huggingface_hub.hf_hub_download, corpus.repository, file.path, **request)
    for _ in range(_ATTEMPTS):
        path = Path(corpus.retry.call(download))
        sha256 = file_sha256(path)
        if _git_hash(path) == file.blob_id if file.lfs is None else sha256 == file.lfs.sha256:
            return path, sha256
        path.unlink()
    raise TemporaryError(f"{file.path} has another hash than on the Hub after its download; run the command again")


def _git_hash(path: Path) -> str:
    """Return the hash of a small file, which the Hub keeps in git."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
