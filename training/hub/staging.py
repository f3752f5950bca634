"""What is pushed, in a folder of its own made of hard links: it costs no space, and stays when a checkpoint is pruned.

No training state goes along, unless asked for as `last-checkpoint/`, and no path of this machine: keys of JSON files
that hold one, or one that leads up from where the run was started, are left out.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.checkpoints.checksums import renew_checksums

LAST_CHECKPOINT = "last-checkpoint"

# What a model is loaded from and described by, at the top of its folder. Other programs keep their arguments,
# optimizers and logs with the machine's name there.
_OF_A_MODEL = (
    *("config.json", "generation_config.json", "eval_results.json", "chat_template.*", "*.py"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.md", "LICENSE*", "NOTICE*", "*.png", "*.jpg", "*.svg"),
)
_WORDS = ("tokenizer.json", "vocab.json")  # where "/usr" is a word and no place


def stage(target: Path, model: Path, *, curves: Path | None = None, state: Path | None = None) -> Path:
    """Make `target` what is to be pushed of a model folder or checkpoint.

    Args:
        target: does not exist, or holds what a dead process left.
        model: a folder that is whole; of its files those that belong to a model are taken.
        curves: its picture, where the folder has none.
        state: a checkpoint that goes along whole, to go on from.
    """
    shutil.rmtree(target, ignore_errors=True)
    _carry([path for path in sorted(model.iterdir()) if _belongs(path)], model, target)
    if curves is not None and curves.is_file() and not (target / curves.name).exists():
        _link(curves, target / curves.name)
    if state is not None:
        rewritten = _carry(sorted(state.rglob("*")), state, target / LAST_CHECKPOINT)
        renew_checksums(target / LAST_CHECKPOINT, rewritten)
    return target


def _belongs(path: Path) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _OF_A_MODEL)


def _carry(paths: Iterable[Path], source: Path, target: Path) -> list[Path]:
    """Link files of `source` into `target`; return those that had to be rewritten."""
    rewritten = []
    for path in paths:
        name = path.relative_to(source)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts) or not path.is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link(path, target / name)
        if path.suffix == ".json" and path.name not in _WORDS and _without_places(target / name):
            rewritten.append(target / name)
    return rewritten


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(path, target)


def _without_places(path: Path) -> bool:
    """Rewrite a JSON file without keys whose value is an absolute path; the file it was linked to stays as it is.

    Returns:
        Whether there were any.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    cleaned = _cleaned(content)
    if cleaned != content:
        path.unlink()
        path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return bool(cleaned != content)


def _cleaned(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _cleaned(value) for key, value in content.items() if not _is_place(value)}
    return [_cleaned(value) for value in content] if isinstance(content, list) else content


def _is_place(value: object) -> bool:
    return isinstance(value, str) and len(value) > 1 and (value.startswith(("~", "../")) or Path(value).is_absolute())
