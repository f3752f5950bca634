"""Find the checkpoint to resume from, and check that the run may write to its folder and has the same data."""

import os
import tempfile
from itertools import chain, count
from pathlib import Path

import yaml

from common.cli_errors import InputError
from common.folder_lock import LOCK_NAME
from training.checkpoints.checkpoint_folder import TrainerState, check_intact, checkpoints, remove_leftovers, step_of
from training.data.loading.order import Order
from training.data.shards.shard_reader import ShardFolder
from training.data.sources.open_corpus import check_outside_corpus
from training.data.tokenization.tokenizer import Tokenizer
from training.recipe import Recipe

_PROBE = ".can-be-written-"


def find_resume_point(recipe: Recipe) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run.

    A checkpoint in another folder starts a branch. Once the branch has its own checkpoints, it resumes from those.

    Raises:
        InputError: the output folder is not writable or contains another run or other files, the recipe forbids a
            resume, or the checkpoint's data or model differ from the recipe's.
    """
    output_dir, requested = Path(recipe.output_dir), recipe.resume_from_checkpoint
    check_writable(output_dir)
    if Path(recipe.data_dir).resolve().is_relative_to(output_dir.resolve()):
        raise InputError(f"data_dir {recipe.data_dir} is inside output_dir {output_dir}; choose separate folders")
    for key in ("output_dir", "data_dir"):
        check_outside_corpus(Path(getattr(recipe, key)), recipe.corpus, key)
    found = checkpoints(output_dir)
    is_run = (output_dir / "recipe.yaml").is_file() or bool(found)
    files = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
    # A run that is starting or was killed leaves a lock, a probe or a partial recipe.
    if not is_run and any(name != LOCK_NAME and not name.startswith((_PROBE, "recipe.yaml.")) for name in files):
        raise InputError(f"output_dir {output_dir} contains files but no run; choose another output_dir")
    if is_run and not (found and requested == "auto"):  # checkpoints hold the recipe too, and a checksum of it
        # A recipe that cannot be read keeps no run from resuming.
        _check_same_run(recipe, _read_recipe(output_dir / "recipe.yaml"), f"output_dir {output_dir}")
    if requested == "none" and is_run:
        raise InputError(
            f"output_dir {output_dir} already contains a run, and resume_from_checkpoint is none; "
            "remove that setting to resume, or choose another output_dir"
        )
    if requested not in ("auto", "none"):
        state = TrainerState.read(Path(requested))
        _check_same_run(recipe, state.recipe, f"checkpoint {requested}")
        is_branch = Path(requested).resolve().parent != (output_dir / "checkpoints").resolve()
        ahead = [path for path in checkpoints(output_dir) if step_of(path) > state.step]
        # The command that started a branch in this folder resumes the branch when it runs again.
        chosen = ahead[-1] if is_branch and ahead else Path(requested)
        return _checked(recipe, chosen, f"checkpoint {chosen}")
    if found:
        return _checked(recipe, found[-1], f"output_dir {output_dir}")
    if (output_dir / "model").exists():
        raise InputError(
            f"output_dir {output_dir} contains a finished model but no checkpoint; "
            f"choose another output_dir, and start from the model with init_from: {output_dir / 'model'}"
        )
    return None


def _checked(recipe: Recipe, checkpoint: Path, where: str) -> Path:
    state = TrainerState.read(checkpoint)
    _check_same_run(recipe, state.recipe, where)
    # Hashing a large checkpoint takes seconds: once per node is enough.
    check_intact(checkpoint, state.step, read_files=os.environ.get("LOCAL_RANK", "0") == "0")
    return checkpoint


def check_writable(output_dir: Path) -> None:
    """Raise an `InputError` if `output_dir` is a file, or nothing can be written there."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} is a file; choose another output_dir")
    parent = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    try:
        # Permission bits are not enough: some file systems refuse folders. So write a file.
        with tempfile.TemporaryDirectory(dir=parent, prefix=_PROBE) as probe:
            (Path(probe) / "file").write_bytes(b"x" * 4096)
    except OSError as error:
        raise InputError(
            f"output_dir {output_dir} is not writable ({error.strerror}); choose another output_dir"
        ) from None


def _read_recipe(path: Path) -> dict[str, object]:
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        keys = None
    return keys if isinstance(keys, dict) else {}


def _check_same_run(recipe: Recipe, earlier: dict[str, object], where: str) -> None:
    differences = recipe.differences_from(earlier)
    if differences:
        raise InputError(
            f"{where} belongs to another run ({'; '.join(differences)}); undo the change, or choose another output_dir"
        )


def check_end(checkpoint: Path, done: int, end: int) -> None:
    """Raise an `InputError` if the run ends before the checkpoint it resumes from."""
    if done > end:
        raise InputError(
            f"{checkpoint} is at step {done:,}, after the end of the run at step {end:,}; "
            "raise max_steps, or choose another output_dir"
        )


def prepare_run_folder(recipe: Recipe, step: int) -> list[str]:
    """Write the recipe of a run that takes the steps after `step`, and return lines to print.

    The lines name the settings of training that changed since the last start, and everything that was renamed:
    a recipe.yaml that cannot be read, and checkpoints after `step`, because the next start would resume from them (to
    `checkpoints/abandoned-step-000060`, or `abandoned-2-step-000060` if that exists). Partial files are removed.
    """
    output_dir, lines = Path(recipe.output_dir), []
    path = output_dir / "recipe.yaml"
    earlier = _read_recipe(path)
    if step and (changes := recipe.changes_from(earlier, recipe.values_with(on_card=True, group=None))):
        lines.append(f"changed since the last start: {', '.join(changes)}")
    if path.exists() and not earlier:
        kept = path.rename(path.with_name("recipe.yaml.unreadable"))
        lines.append(f"recipe.yaml could not be read; it was renamed to {kept}")
    recipe.save(path)
    remove_leftovers(output_dir)
    renamed = []
    for later in (checkpoint for checkpoint in checkpoints(output_dir) if step_of(checkpoint) > step):
        names = chain([f"abandoned-{later.name}"], (f"abandoned-{number}-{later.name}" for number in count(2)))
        renamed.append(later.rename(next(new for name in names if not (new := later.with_name(name)).exists())))
    if renamed:
        lines.append(f"later checkpoints were renamed to {', '.join(map(str, renamed))}; delete them if you like")
    return lines


def shard_identities(folder: ShardFolder) -> list[str]:
    """What a checkpoint records of its shards, validation first: their hashes, or their sizes without a manifest."""
    return [shard.sha256 or f"{shard.tokens} tokens" for shard in [folder.val_shard, *folder.train_shards]]


def refuse_other_data(state: TrainerState, folder: ShardFolder, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Raise an `InputError` if the shard folder does not hold the checkpoint's data: tokens of another tokenizer, other
    shards, or shards that were added after the first epoch.
    """
    if state.tokenizer_fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"data_dir {recipe.data_dir} was made with another tokenizer than the checkpoint's data; "
            "set data_dir to that run's data"
        )
    seen, found = state.shards, shard_identities(folder)
    common = min(len(seen), len(found))
    same = seen[:common] == found[:common] and (len(found) >= len(seen) or not folder.complete)
    if same and len(found) > len(seen):
        # Epoch 0 reads the shards in their own order, so more of them change nothing; later epochs permute them.
        earlier = [shard.tokens for shard in folder.train_shards[: len(seen) - 1]]
        windows = Order(earlier, seq_len=recipe.seq_len, seed=recipe.seed).windows_in_epoch(0)
        same = state.tokens <= windows * recipe.seq_len
    if not same:
        raise InputError(
            f"data_dir {recipe.data_dir} holds other shards than the checkpoint's run used "
            f"({_first_difference(seen, found)}); set data_dir to that run's data"
        )


def _first_difference(seen: list[str], found: list[str]) -> str:
    for number, (then, now) in enumerate(zip(seen, found, strict=False)):
        if then != now:
            which = f"training shard {number}" if number else "the validation shard"
            return f"{which} was {_shortened(then)}, now {_shortened(now)}"
    return f"{len(seen) - 1} training shards then, {len(found) - 1} now"


def _shortened(identity: str) -> str:
    return identity if identity.endswith("tokens") else f"sha256 {identity[:12]}…"
