"""The folder that is pushed: hard links, so it takes no space and outlives a checkpoint that is deleted.

It holds no training state, except in `last-checkpoint/` on request, and no local paths: JSON keys whose value
is an absolute path, or starts with `~` or `../`, are dropped.
"""

import contextlib
import json
import os
import shutil
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
    last = target / LAST_CHECKPOINT
    files = {target / path.name: path for pattern in _MODEL_FILES for path in model.glob(pattern)}
    if curves is not None:
        files.setdefault(target / curves.name, curves)
    if state is not None:
        files |= {last / path.relative_to(state): path for path in state.rglob("*")}
    rewritten = []
    for staged, path in sorted(files.items()):
        parts = staged.relative_to(target).parts
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in parts):
            staged.parent.mkdir(parents=True, exist_ok=True)
            if _link(path, staged):
                rewritten.append(staged)
    if state is not None:
        update_checksums(last, [path for path in rewritten if path.is_relative_to(last)])
    return target


def _link(path: Path, target: Path) -> bool:
    """Link a file, or write a copy of it without paths; return whether it holds any."""
    if path.suffix == ".json" and path.name not in _VOCABULARIES:
        text = path.read_text(encoding="utf-8")
        with contextlib.suppress(ValueError):  # not JSON
            cleaned = json.loads(text, object_hook=_without_paths)
            if cleaned != json.loads(text):
                target.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                return True
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, target)
    return False


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    def is_path(value: object) -> bool:
        text = value if isinstance(value, str) else ""
        return len(text) > 1 and (text.startswith(("~", "../")) or Path(text).is_absolute())

    return {key: value for key, value in values.items() if not is_path(value)}
