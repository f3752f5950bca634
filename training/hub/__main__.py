"""Push a run, a model folder or a shard folder to the Hub by hand.

    python -m training.hub push runs/quickstart --repo_id your-name/my-gpt2 --native
    python -m training.hub push-shards data/installed-docs --repo_id your-name/my-shards

The token is that of `hf auth login` or HF_TOKEN. Run it again after an interruption: no file is uploaded twice.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.cli_errors import CommandParser, InputError, run_command

_ADVICE = "and run the same command again"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = CommandParser(prog="python -m training.hub", description="Push a model or a shard folder to the Hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="push a run, a checkpoint or a model folder")
    push.add_argument("folder", type=Path, metavar="RUN", help="run folder, checkpoint or model folder")
    push.add_argument(
        "--native", action="store_true", help="also push plain GPT-2 weights, which load without our code, to `native`"
    )
    push.add_argument(
        "--checkpoint",
        action="store_true",
        help="also push the training state to resume from, as last-checkpoint/ (like hub_strategy: checkpoint)",
    )
    push.add_argument("--space", metavar="NAME", help="also push the demo page of the model to this Space")
    shards = commands.add_parser("push-shards", help="push a shard folder as a dataset to train from")
    shards.add_argument("path", type=Path, metavar="DIR", help="complete shard folder")
    for command in (push, shards):
        command.add_argument("--repo_id", required=True, help="owner/name; created if it does not exist")
        command.add_argument("--private", action="store_true", help="create the repository as private")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = vars(build_parser().parse_args(arguments))
    if options.pop("command") == "push":
        push(**options)
    else:
        from training.hub.shard_dataset import push_shards

        push_shards(**options)


def push(
    folder: Path, repo_id: str, *, private: bool, native: bool, checkpoint: bool, space: str | None = None
) -> None:
    """Push the newest model of a run, or a model folder.

    An existing native branch is updated even without `native`. `space` names a Space for the demo page: owner/name, or
    a name under the model's owner.

    Raises:
        InputError: no complete model, no checkpoint of it for `checkpoint`, or the Hub refuses the push.
    """
    from huggingface_hub import HfApi, ModelCard

    from gpt2_scratch.export import check_weights, export, read_config
    from training.checkpoints.checkpoint_folder import checkpoints
    from training.hub.card import write_model_card
    from training.hub.hub_errors import input_errors
    from training.hub.publisher import record_push
    from training.hub.repository import NATIVE, ensure_repository, push_folder
    from training.hub.space import push_space, space_id
    from training.hub.staging import stage
    from training.monitoring.run_history import RunHistory
    from training.recipe import load_recipe

    model, step = find_model(folder)
    _, skeleton = read_config(model)
    check_weights(model, skeleton)  # by their headers: no partial model is published
    if checkpoint and step is None:
        raise InputError(f"--checkpoint needs a checkpoint, and {folder} has none of this model; name its run folder")
    state = None
    if checkpoint:
        state = model if (model / "training_state").is_dir() else checkpoints(folder)[-1]
    run = folder if (folder / "recipe.yaml").is_file() else model.resolve().parents[1]  # a checkpoint's run
    is_of_run = step is not None and (run / "recipe.yaml").is_file()
    tag, message = (None, f"Push {model.name}") if step is None else (f"step-{step:06d}", f"Step {step:,}")
    repo_id = ensure_repository(repo_id, default_name=folder.name, private=private, advice=_ADVICE)
    if space is not None:  # checked before the uploads
        space = space_id(space, repo_id)
        ensure_repository(space, default_name=space, private=private, kind="space", advice=_ADVICE)
    with tempfile.TemporaryDirectory() as temporary, input_errors(repo_id, _ADVICE):
        # The curves of a checkpoint's run would show later steps too.
        staged = stage(Path(temporary) / "model", model, curves=folder / "curves.png", state=state)
        if is_of_run and not (staged / "README.md").exists():
            recipe = load_recipe(run / "recipe.yaml")
            facts = RunHistory.load(run).facts(recipe, steps=step or 0, parameters=skeleton.num_parameters())
            write_model_card(staged, recipe, facts, skeleton.config, earlier=run / "model")
        if native or HfApi().revision_exists(repo_id, NATIVE):  # first: the card of main mentions the branch
            export(str(staged), Path(temporary) / "native", "gpt2")
            push_folder(Path(temporary) / "native", repo_id, message=message, branch=NATIVE)
        pushed = push_folder(staged, repo_id, message=message, tag=tag)
        if is_of_run:
            record_push(run, repo_id, step or 0)
        print(f"{model} is on the Hub: {repo_id}" + (f", tag {tag}" if tag else ""))
        if pushed.has_native:
            print(f'as plain GPT-2: from_pretrained("{repo_id}", revision="{NATIVE}")')
        if space is not None:
            with input_errors(space, _ADVICE):
                push_space(space, repo_id)
            print(f"the demo page is on the Hub: spaces/{space}")
            if HfApi().model_info(repo_id).private:
                print("the model is private: add a secret HF_TOKEN, with read access, in the settings of the Space")
    if pushed.card_kept:
        print("the card was edited on the Hub: only its metadata and results are updated")
    if ModelCard(pushed.card, ignore_metadata_errors=True).data.get("license") is None:
        print("the card states no license: add one to its metadata on the Hub; later pushes keep it")


def find_model(folder: Path) -> tuple[Path, int | None]:
    """Return the newest model of a run, or the folder itself, and its step if that is known."""
    from training.checkpoints.checkpoint_folder import TrainerState, checkpoints, is_model_of

    def step_of(model: Path) -> int | None:
        return TrainerState.read(model).step if (model / "training_state").is_dir() else None

    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; check the path")
    if (folder / "config.json").is_file():
        return folder, step_of(folder)
    saved, model = [path for path in checkpoints(folder) if (path / "config.json").is_file()], folder / "model"
    has_model = (model / "config.json").is_file()
    if not saved and not has_model:
        raise InputError(
            f"there is neither a config.json nor a checkpoint in {folder}; pass a folder such as runs/quickstart"
        )
    if not has_model:
        return saved[-1], step_of(saved[-1])
    if saved and is_model_of(saved[-1], folder):
        return model, step_of(saved[-1])
    # A run that was extended, and then stopped before its end, has an older model.
    if saved and (saved[-1] / "config.json").stat().st_mtime > (model / "config.json").stat().st_mtime:
        return saved[-1], step_of(saved[-1])
    return model, None


if __name__ == "__main__":
    run_command(main)
