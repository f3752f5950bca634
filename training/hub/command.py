"""Publish by hand: a run, a model folder or a folder of shards becomes a repository on the Hub.

    python -m training.hub push runs/quickstart --repo_id your-name/my-gpt2 --native
    python -m training.hub push-shards data/installed-docs --repo_id your-name/my-shards

The token is that of `hf auth login` or HF_TOKEN. Run it again when it was interrupted: what is there is not sent twice.
"""

import argparse
import filecmp
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.cli_errors import CommandParser, InputError

_WAY_OUT = "and run the same command again"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = CommandParser(prog="python -m training.hub", description="Publish a model or shards on the Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="a run, a checkpoint or a model folder")
    push.add_argument("folder", type=Path, metavar="RUN", help="a run, a checkpoint or a model folder")
    push.add_argument(
        "--native",
        action="store_true",
        help="also as a plain GPT-2, on the branch `native`: for programs without our code",
    )
    push.add_argument(
        "--checkpoint",
        action="store_true",
        help="with the state to go on from, as last-checkpoint/: what hub_strategy: checkpoint does",
    )
    shards = commands.add_parser("push-shards", help="a folder of shards, as a dataset to train from")
    shards.add_argument("folder", type=Path, metavar="DIR", help="a complete folder of shards")
    for command in (push, shards):
        command.add_argument("--repo_id", required=True, help="owner/name; made when it does not exist")
        command.add_argument("--private", action="store_true", help="when it is made now, only for you")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Push as the command line says."""
    options = build_parser().parse_args(arguments)
    if options.command == "push":
        push(
            options.folder,
            options.repo_id,
            private=options.private,
            native=options.native,
            with_state=options.checkpoint,
        )
    else:
        from training.hub.shard_dataset import push_shards

        push_shards(options.folder, options.repo_id, private=options.private, say=lambda line: print(line, flush=True))


def push(folder: Path, repo_id: str, *, private: bool, native: bool, with_state: bool = False) -> None:
    """Push the newest model of a run, or a model folder, and say where it is.

    The branch with the plain GPT-2 is renewed where there is one, whether or not `native` asks for it.

    Raises:
        InputError: it holds no whole model, no checkpoint of it although `with_state` asks for that, or the Hub refuses
            it.
    """
    model, step = find_model(folder)
    _refuse_broken(model)
    state = _checkpoint_of(folder, model, step) if with_state else None
    from training.hub.publisher import remember_push
    from training.hub.repository import NATIVE, claim, has_branch, push_folder, refused_in_one_line
    from training.hub.staging import stage

    repo_id = claim(repo_id, default_name=folder.name, private=private, way_out=_WAY_OUT)
    with tempfile.TemporaryDirectory() as place:
        # Of the run itself: a checkpoint's picture would show what came later too.
        staged = stage(Path(place) / "model", model, curves=folder / "curves.png", state=state)
        run = folder if (folder / "recipe.yaml").is_file() else model.resolve().parents[1]  # the run of a checkpoint
        if step is not None and (run / "recipe.yaml").is_file() and not (staged / "README.md").exists():
            _write_card(staged, run, step)
        message = f"Step {step:,}" if step is not None else f"Push {model.name}"
        tag = f"step-{step:06d}" if step is not None else None
        with refused_in_one_line(repo_id, _WAY_OUT):
            native = native or has_branch(repo_id, NATIVE)
            pushed = push_folder(staged, repo_id, message=message, tag=tag, with_native=native)
            if native:
                from gpt2_scratch.export import export

                export(str(staged), Path(place) / "native", "gpt2")
                push_folder(Path(place) / "native", repo_id, message=message, branch=NATIVE)
    if step is not None and (run / "recipe.yaml").is_file():
        remember_push(run, repo_id, step)
    print(f"{model} is on the Hub: {repo_id}" + (f", tag {tag}" if tag else ""))
    if native:
        print(f'as a plain GPT-2: from_pretrained("{repo_id}", revision="{NATIVE}")')
    if pushed.card_kept:
        print("the card was edited on the Hub: its text is kept, and only the generated sections are new")


def find_model(folder: Path) -> tuple[Path, int | None]:
    """The newest model in a run, or the folder itself; and its step where that is known.

    Raises:
        InputError: there is none.
    """
    from training.checkpoints.checkpoint_folder import checkpoints

    if not folder.is_dir():
        raise InputError(f"expected a run or a model folder, found no folder {folder}; check the path")
    saved = checkpoints(folder)
    found = [path for path in (*saved, folder / "model", folder) if (path / "config.json").is_file()]
    if not found:
        raise InputError(
            f"expected a run or a model folder, found neither config.json nor checkpoints in {folder}; "
            "name a folder such as runs/quickstart"
        )
    if folder in found:
        return folder, _step_of(folder)
    newest = found[-1]
    if saved and newest not in saved:
        made, last = newest / "model.safetensors", saved[-1] / "model.safetensors"
        if made.is_file() and last.is_file() and filecmp.cmp(made, last, shallow=False):
            return newest, _step_of(saved[-1])
        # A run that was extended and died before its end has an older model.
        newer = (saved[-1] / "config.json").stat().st_mtime > (newest / "config.json").stat().st_mtime
        newest = saved[-1] if newer else newest
    return newest, _step_of(newest)


def _checkpoint_of(folder: Path, model: Path, step: int | None) -> Path:
    """The checkpoint that a model is of: the folder itself, or the run's newest, which `find_model` compared."""
    from training.checkpoints.checkpoint_folder import checkpoints

    if step is None:
        raise InputError(
            f"--checkpoint: expected a checkpoint, or a run whose newest checkpoint is its model, found {folder}; name "
            "the run, or leave the flag out"
        )
    return model if (model / "training_state").is_dir() else checkpoints(folder)[-1]


def _step_of(folder: Path) -> int | None:
    from training.checkpoints.checkpoint_folder import TrainerState

    return TrainerState.read(folder).step if (folder / "training_state").is_dir() else None


def _refuse_broken(model: Path) -> None:
    """Look through config and headers of the weights, so that nothing half-written is published."""
    import torch

    from gpt2_scratch.configuration_gpt2_scratch import GPT2ScratchConfig
    from gpt2_scratch.export import check_weights, read_config, weight_files

    config, model_class = read_config(model)
    with torch.device("meta"):
        skeleton = model_class(GPT2ScratchConfig.from_dict({**config, "attn_implementation": "eager"}))
    check_weights(model, weight_files(model), skeleton)


def _write_card(staged: Path, run: Path, step: int) -> None:
    """Write the card of a checkpoint, whose run did not come to its end, from the run's files."""
    from transformers import AutoConfig

    import gpt2_scratch  # noqa: F401 - registers model_type gpt2_scratch
    from training.hub.card import earlier_card, write_model_card
    from training.hub.run_facts import count_parameters, run_facts
    from training.recipe import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    facts = run_facts(recipe, run, steps=step, parameters=count_parameters(staged))
    kept = earlier_card(run / "model")
    write_model_card(staged, recipe, facts, AutoConfig.from_pretrained(staged), kept=kept)
