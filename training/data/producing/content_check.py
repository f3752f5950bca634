"""Is a complete shard folder made of the corpus that is asked for? A folder is keyed by content, not by a name."""

from collections.abc import Callable

from common.cli_errors import InputError
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.sources.base import INSTALLED_DOCS


def check_content(spec: ShardSpec, folder: ShardFolder, report: Callable[[str], None]) -> None:
    """Compare the content of the spec's corpus with the revision in the manifest; report it where that is impossible.

    Local files cost a hash of at most 256 MiB, a Hub dataset one request: each of its commits is accepted. Shards of
    `installed-docs` outlive the packages that they were made of: a run can be resumed after an upgrade.

    Raises:
        InputError: the corpus has other content than the one that the shards were made of.
    """
    assert folder.manifest is not None  # a folder of ours
    made_of = folder.manifest.corpus_revision
    try:
        corpus = spec.open_corpus(report=report)
        if corpus.holds(made_of):
            return
        found = corpus.revision
    except InputError as error:
        report(f"{folder.path} was not compared with its corpus: {error}")
        return
    difference = (
        f"{folder.path} was made of other content: revision {made_of[:12]} of '{folder.manifest.corpus}', "
        f"but '{spec.corpus}' is now at {found[:12]}"
    )
    if corpus.name == INSTALLED_DOCS:
        report(f"{difference}; its shards are used as they are, delete the folder to prepare it again")
        return
    raise InputError(
        f"{difference}; use another folder (--data_dir in training, --output in training.prepare), "
        "or delete this one to prepare it again"
    )
