"""What is known of a run before anything heavy is built, and everything that can be refused by then."""

import filecmp
import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from common.atomic_files import file_sha256
from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import TrainerState
from training.checkpoints.checksums import state_checksum
from training.checkpoints.data_identity import refuse_other_data
from training.checkpoints.resume import find_resume_point, refuse_earlier_end
from training.data.loading.loader import validation_windows
from training.data.loading.order import Order
from training.data.loading.training_shards import TrainingShards
from training.data.producing.background_producer import ProducerBeside, producer_command
from training.data.producing.workers import usable_cpus
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.sources.open_corpus import open_corpus
from training.data.tokenization.tokenizer import Tokenizer, load_tokenizer, parse_train_spec
from training.hub.publisher import claim_repository
from training.monitoring.task_evaluation import TaskEvaluation
from training.recipe import Recipe
from training.setup.cross_node_checks import Machines
from training.step.batch_plan import BatchPlan, plan_batch


@dataclass(frozen=True)
class Plan:
    """What is known of a run before anything heavy is built.

    Attributes:
        recipe: every knob.
        shards: the training shards and the order of their windows; they may still be growing.
        tokenizer: the shards' tokenizer.
        batch: how a step falls on processes and forward passes; of one sequence each, as long as the number of them
            that fits is not known.
        total_steps: where the run ends.
        resume_from: the checkpoint to go on from.
        first_step: steps that it has behind it.
        repo_id: the repository on the Hub that the first process pushes to.
        tasks: what the model is judged on while it learns; None without eval_tasks.
    """

    recipe: Recipe
    shards: TrainingShards
    tokenizer: Tokenizer
    batch: BatchPlan
    total_steps: int
    resume_from: Path | None
    first_step: int
    repo_id: str | None = None
    tasks: TaskEvaluation | None = None

    @property
    def folder(self) -> ShardFolder:
        """The shard folder as it was last looked at."""
        return self.shards.folder

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.output_dir)

    @property
    def document_mark(self) -> int | None:
        """The id at which documents begin, when the recipe keeps them apart."""
        return self.tokenizer.end_of_text_id if self.recipe.document_mask else None

    def is_due(self, done: int, every: int) -> bool:
        """Whether what comes `every` so many steps, 0 for only at the end, comes after step `done`."""
        return done == self.total_steps or (every > 0 and done % every == 0)

    @property
    def is_complete(self) -> bool:
        """Whether an earlier start took the last step and left the model folder."""
        return (
            self.first_step == self.total_steps
            and self.resume_from is not None
            and _is_the_model(self.output_dir, self.resume_from)
        )


def plan_run(recipe: Recipe, producer: ProducerBeside, *, least: Callable[[int], int] = lambda number: number) -> Plan:
    """Check the recipe against the output folder, the data and the number of processes.

    When the shard folder is not complete, `producer` is started, and what is there is taken as soon as it can be
    trained on. `least` returns the smallest of all processes' numbers; it is asked only where there are several
    machines.

    Raises:
        InputError: whatever would make the run fail, or another run than was asked for.
    """
    machines = Machines(least)
    with machines.told_of_mistakes():
        plan = _plan(recipe, producer, machines)
        machines.compare_data(plan.folder, plan.tokenizer)
        machines.compare_runs(recipe.output_dir, lambda: _run_facts(plan))
    return plan


_OF_EACH_MACHINE = {
    # Where things lie; what they are is compared.
    *("output_dir", "data_dir", "corpus", "tokenizer", "init_from", "eval_data_dir", "resume_from_checkpoint"),
    # How a machine uses its cores, and what only the first one does.
    *("preprocessing_num_workers", "dataloader_num_workers"),
    *("report_to", "profile_steps", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy"),
}


def _run_facts(plan: Plan) -> dict[str, object]:
    """What decides on the steps of a run and on the weights it begins with, the same on every machine."""
    return {
        "steps taken": plan.first_step,
        "checkpoint": None if plan.resume_from is None else state_checksum(plan.resume_from),
        "initial weights": None if plan.resume_from is not None else _initial_weights(plan.recipe.init_from),
        "steps in all": plan.total_steps,
        "complete": plan.is_complete,
        "items of eval_tasks": None if plan.tasks is None else plan.tasks.fingerprint,
        **{key: value for key, value in plan.recipe.to_dict().items() if key not in _OF_EACH_MACHINE},
    }


def _initial_weights(init_from: str | None) -> str | None:
    """A hash of what is in a model folder; the name of one on the Hub."""
    if init_from is None or not Path(init_from).is_dir():
        return init_from
    files = [path for kind in ("*.safetensors", "*.bin") for path in sorted(Path(init_from).glob(kind))]
    return hashlib.sha256("\n".join(file_sha256(path) for path in files).encode()).hexdigest()


def _plan(recipe: Recipe, producer: ProducerBeside, machines: Machines) -> Plan:
    resume_from = find_resume_point(recipe)
    batch = batch_of(recipe)
    # Before the data, which may take minutes to come.
    repo_id = None
    if recipe.push_to_hub and os.environ.get("RANK", "0") == "0" and not _nothing_is_left_to_do(recipe, resume_from):
        repo_id = claim_repository(recipe, goes_on=resume_from is not None)
    folder, tokenizer = open_data(recipe, producer, machines)
    validation_windows(folder.val_shard, seq_len=recipe.seq_len, eval_tokens=recipe.eval_tokens)
    # A look at the beginning: every id of a large corpus would take minutes, and the loader checks as it goes.
    for shard in (folder.val_shard, *folder.train_shards[:1]):
        shard.check_ids(tokenizer.vocab_size)
    try:
        shards = TrainingShards(folder, seq_len=recipe.seq_len, seed=recipe.seed)
    except ValueError as error:
        raise InputError(
            f"{recipe.data_dir}: {error}; prepare a larger corpus, or train with a shorter seq_len"
        ) from None
    first_step = 0
    if resume_from is not None:
        state = TrainerState.read(resume_from)
        refuse_other_data(state, folder, tokenizer, recipe)
        first_step = state.step
    end = total_steps(recipe, shards.order)
    if resume_from is not None:
        refuse_earlier_end(resume_from, first_step, end)
    tasks = TaskEvaluation(recipe, tokenizer) if recipe.eval_tasks else None
    return Plan(recipe, shards, tokenizer, batch, end, resume_from, first_step, repo_id, tasks)


def _is_the_model(output_dir: Path, checkpoint: Path) -> bool:
    """Whether the run's model folder is of that checkpoint; one that was extended and died has an older model there."""
    weights = output_dir / "model" / "model.safetensors"
    return weights.is_file() and filecmp.cmp(weights, checkpoint / weights.name, shallow=False)


def _nothing_is_left_to_do(recipe: Recipe, resume_from: Path | None) -> bool:
    """Whether a run is complete, as far as that is known before its data."""
    if resume_from is None or recipe.num_train_epochs is not None:
        return False
    at_its_end = TrainerState.read(resume_from).step == total_steps(recipe, None)
    return at_its_end and _is_the_model(Path(recipe.output_dir), resume_from)


def batch_of(recipe: Recipe) -> BatchPlan:
    """How the recipe's step falls on the processes that were started."""
    per_device = recipe.per_device_train_batch_size
    return plan_batch(
        tokens_per_step=recipe.tokens_per_step,
        seq_len=recipe.seq_len,
        per_device=1 if per_device == "auto" else per_device,
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def open_data(recipe: Recipe, producer: ProducerBeside, machines: Machines) -> tuple[ShardFolder, Tokenizer]:
    """Open the recipe's shard folder and load its tokenizer.

    Where the folder is not complete, the first process of each node starts the producer, and all wait until training
    can begin. The folder is opened once if it is complete.

    Raises:
        InputError: the corpus, the folder or the tokenizer cannot be used, or they do not match.
    """
    path = Path(recipe.data_dir)
    folder = ShardFolder.find(path)
    if folder is not None and folder.manifest is None:
        tokenizer = _tokenizer_of_foreign_shards(recipe)
        machines.wait_for(lambda: True, producer)
        return folder, tokenizer
    spec = ShardSpec(
        folder=path,
        corpus=recipe.corpus,
        corpus_config=recipe.corpus_config,
        text_field=recipe.text_field,
        tokenizer=recipe.tokenizer,
        shard_tokens=recipe.shard_tokens,
        val_tokens=recipe.validation_shard_tokens,
        # A recipe has no such limit: it belongs to the folder, and whoever prepared it has chosen it.
        max_tokens=folder.manifest.max_tokens if folder and folder.manifest else None,
    )
    spec.check(folder)
    if (folder is None or not folder.complete) and os.environ.get("LOCAL_RANK", "0") == "0":
        open_corpus(recipe.corpus, recipe.corpus_config, text_field=recipe.text_field)  # raises if it does not exist
        workers = preprocessing_workers(recipe, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        producer.start(producer_command(path, [*_flags(spec), "--num_workers", str(workers)]))
    wait_for_all = recipe.num_train_epochs is not None  # the length of an epoch needs every shard

    def ready() -> bool:
        nonlocal folder
        if folder is None or not folder.can_train(wait_for_all):
            folder = ShardFolder.find(path)
        return folder is not None and folder.can_train(wait_for_all)

    machines.wait_for(ready, producer)
    assert folder is not None
    return folder, folder.load_tokenizer(recipe.tokenizer)


def _flags(spec: ShardSpec) -> list[str]:
    """The spec as flags of `python -m training.prepare`, without `--output`."""
    given = {name: value for name, value in asdict(spec).items() if value is not None and name != "folder"}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def _tokenizer_of_foreign_shards(recipe: Recipe) -> Tokenizer:
    if parse_train_spec(recipe.tokenizer) is not None:
        raise InputError(
            f"{recipe.data_dir} holds ready shards without a manifest, so tokenizer {recipe.tokenizer} cannot be "
            "trained for them; name the tokenizer that they were made with, such as gpt2"
        )
    return load_tokenizer(recipe.tokenizer)


def preprocessing_workers(recipe: Recipe, local_processes: int) -> int:
    """Processes that tokenise beside training: the recipe's number, or the cores that training leaves free.

    Two at least, where there are two cores: they give way to training, and have it all until the first shard is ready.
    """
    if recipe.preprocessing_num_workers is not None:
        return recipe.preprocessing_num_workers
    taken = local_processes * (1 + recipe.dataloader_num_workers)
    return max(min(2, usable_cpus()), usable_cpus() - taken)


def total_steps(recipe: Recipe, order: Order | None) -> int:
    """Optimizer steps of the whole run; a length in tokens or epochs is cut to whole steps.

    Only a length in epochs needs the order, that of all shards.
    """
    if recipe.max_steps is not None:
        return recipe.max_steps
    if recipe.max_tokens is not None:
        steps = recipe.max_tokens // recipe.tokens_per_step
    else:
        assert order is not None
        # As it was written: in binary, 2.3 - 2 is less than 0.3.
        epochs = Fraction(repr(recipe.num_train_epochs))
        whole = sum(order.windows_in_epoch(epoch) for epoch in range(int(epochs)))
        part = int((epochs - int(epochs)) * order.windows_in_epoch(int(epochs)))
        steps = (whole + part) * recipe.seq_len // recipe.tokens_per_step
    if not steps:
        raise InputError(
            f"the run is shorter than one step of tokens_per_step={recipe.tokens_per_step:,}; "
            "make the run longer or the step smaller"
        )
    return steps
