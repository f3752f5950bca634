"""The folder that is pushed: hard links, so it takes no space and outlives a checkpoint that is deleted.

It holds no training state, except in `last-checkpoint/` on request, and no local paths: JSON keys whose value
is an absolute path, or starts with `~` or `../`, are dropped.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.checkpoints.checksums import update_checksums

LAST_CHECKPOINT = "last-checkpoint"

# Files of a model, at the top of its folder. Other programs keep their arguments, optimizers and logs there too.
_MODEL_FILES = (
    *("config.json", "generation_config.json", "eval_results.json", "chat_template.*", "*.py"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.md", "LICENSE*", "NOTICE*", "*.png", "*.jpg", "*.svg"),
)
_VOCABULARIES = ("tokenizer.json", "vocab.json")  # "/usr" is a token there


def stage(target: Path, model: Path, *, curves: Path | None = None, state: Path | None = None) -> Path:
    """Replace `target` by the folder to push for a model folder or checkpoint, and return it.

    `curves` is a picture for a folder that has none. The checkpoint `state`, to resume from, becomes last-checkpoint/.
    """
    shutil.rmtree(target, ignore_errors=True)
    _link_all(sorted({path for pattern in _MODEL_FILES for path in model.glob(pattern)}), model, target)
    if curves is not None and curves.is_file() and not (target / curves.name).exists():
        _link(curves, target / curves.name)
    if state is not None:
        rewritten = _link_all(sorted(state.rglob("*")), state, target / LAST_CHECKPOINT)
        update_checksums(target / LAST_CHECKPOINT, rewritten)
    return target


def _link_all(paths: Iterable[Path], source: Path, target: Path) -> list[Path]:
    """Link files of `source` into `target`; return those that are rewritten because they hold paths."""
    rewritten = []
    for path in paths:
        name = path.relative_to(source)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts) or not path.is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link(path, target / name)
        if path.suffix == ".json" and path.name not in _VOCABULARIES and _remove_paths(target / name):
            rewritten.append(target / name)
    return rewritten


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, target)


def _remove_paths(path: Path) -> bool:
    """Replace a JSON file by a copy without keys that hold a path; return whether it had any."""
    text = path.read_text(encoding="utf-8")
    try:
        cleaned = json.loads(text, object_hook=_without_paths)
    except ValueError:
        return False
    if cleaned == json.loads(text):
        return False
    path.unlink()  # the original keeps its content
    path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not _is_path(value)}


def _is_path(value: object) -> bool:
    return isinstance(value, str) and len(value) > 1 and (value.startswith(("~", "../")) or Path(value).is_absolute())
