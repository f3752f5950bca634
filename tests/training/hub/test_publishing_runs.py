"""Runs that push while they train: the Hub's real client against a server on this machine."""

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.hub_client import TOKEN
from support.loopback_hub import LoopbackHub
from support.paths import ROOT

from common.cli_errors import InputError
from gpt2_scratch import GPT2ScratchConfig
from training.checkpoints.checkpoint_folder import checkpoints, step_of
from training.hub import __main__ as command
from training.hub.publisher import Publisher, claim_repository, record_push
from training.loop import train
from training.monitoring.run_history import RunHistory
from training.recipe import Recipe

# The client itself uploads large files this way without Xet.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("impatient"),
]

Make = Callable[..., Recipe]


def published(make: Make, **changes: Any) -> tuple[Recipe, str]:
    recipe = make(**{"push_to_hub": True, "hub_model_id": "me/tiny", **changes})
    train(recipe)
    return recipe, (Path(recipe.output_dir) / "train.log").read_text()


@pytest.mark.usefixtures("fresh_accelerator")
def test_every_checkpoint_is_pushed_while_training_and_the_model_at_the_end(
    hub: LoopbackHub, tiny_recipe: Make
) -> None:
    recipe, log = published(tiny_recipe)
    there = hub.model("me/tiny")
    assert there.tags["step-000012"] == there.branches["main"]
    assert re.search(r"step 12 is on the Hub: me/tiny, tag step-000012", log)
    files = there.files()
    local = {p.name: p.read_bytes() for p in (Path(recipe.output_dir) / "model").iterdir() if p.is_file()}
    assert {name for name in files if name != ".gitattributes"} == set(local)
    assert files["model.safetensors"] == local["model.safetensors"]
    assert not (Path(recipe.output_dir) / ".pushing").exists()
    assert not [name for name in files if "training_state" in name or "optimizer" in name]


@pytest.mark.usefixtures("fresh_accelerator")
def test_strategy_end_pushes_once(hub: LoopbackHub, tiny_recipe: Make) -> None:
    published(tiny_recipe, hub_strategy="end", hub_private_repo=True)
    assert hub.model("me/tiny").messages == ["Step 12"]
    assert hub.model("me/tiny").private


@pytest.mark.usefixtures("fresh_accelerator")
def test_strategy_checkpoint_pushes_what_another_machine_can_resume_from(
    hub: LoopbackHub,
    tiny_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, _ = published(tiny_recipe, hub_strategy="checkpoint", max_steps=8)
    files = hub.model("me/tiny").files()
    state = json.loads(files["last-checkpoint/training_state/trainer_state.json"])
    assert state["step"] == 8
    for name, content in files.items():
        for secret in (str(tmp_path).encode(), TOKEN.encode(), recipe.data_dir.encode(), b"/home/", b"/root/"):
            assert secret not in content, (name, secret)
    for name, content in files.items():
        if name.startswith("last-checkpoint/"):
            path = tmp_path / "elsewhere" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for forget in (lambda: AcceleratorState._reset_state(True), GradientState._reset_state, PartialState._reset_state):
        forget()
    resumed = tiny_recipe(
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "elsewhere" / "last-checkpoint"),
        max_steps=10,
    )
    train(resumed)
    assert "resumed from" in (tmp_path / "resumed" / "train.log").read_text()


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("trouble", [401, "cut", "hang"])
def test_an_outage_does_not_affect_training(
    hub: LoopbackHub,
    tiny_recipe: Make,
    trouble: int | str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("training.hub.publisher.LAST_PUSH_SECONDS", 1.0)
    started = threading.Event()

    def out(method: str, path: str, number: int) -> int | str | None:
        if started.is_set() or "/preupload/" in path or "/tree/" in path:
            started.set()
            return trouble
        return None

    hub.trouble = out
    recipe, log = published(tiny_recipe)
    command_line = f"python -m training.hub push {recipe.output_dir} --repo_id me/tiny"
    assert command_line in log
    if trouble != "hang":
        assert re.search(r"the push of step \d+ failed: \w+", log)
    assert TOKEN not in log
    capsys.readouterr()
    train(recipe)  # it is complete: this only prints the command, without the Hub
    assert command_line in capsys.readouterr().out
    hub.trouble = lambda method, path, number: None
    hub.released.set()
    for thread in threading.enumerate():  # a daemon, which ends with a process
        if thread.name == "publisher":
            thread.join(30)
    command.main(["push", recipe.output_dir, "--repo_id", "me/tiny"])
    weights = (Path(recipe.output_dir) / "model" / "model.safetensors").read_bytes()
    assert hub.model("me/tiny").files("step-000012")["model.safetensors"] == weights
    capsys.readouterr()
    train(recipe)
    assert "training.hub" not in capsys.readouterr().out


def test_a_run_resumes_while_the_hub_is_down(
    hub: LoopbackHub, tiny_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.trouble = lambda method, path, number: "down"
    recipe = tiny_recipe(push_to_hub=True, hub_model_id="me/tiny")
    with pytest.raises(InputError, match="try later, or train with push_to_hub: false"):
        claim_repository(recipe, resumes=False)
    assert claim_repository(recipe, resumes=True) == "me/tiny"
    assert capsys.readouterr().out.startswith("resuming without the Hub: cannot reach the Hub at http")
    unnamed = tiny_recipe(push_to_hub=True)
    assert claim_repository(unnamed, resumes=True) is None
    Path(unnamed.output_dir).mkdir()
    record_push(Path(unnamed.output_dir), "me/run", 4)
    assert claim_repository(unnamed, resumes=True) == "me/run"
    hub.trouble = lambda method, path, number: 403
    with pytest.raises(InputError, match="you cannot write to"):
        claim_repository(recipe, resumes=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_hub_that_recovers_gets_the_newest_step(hub: LoopbackHub, tiny_recipe: Make) -> None:
    refused = []

    def at_first(method: str, path: str, number: int) -> int | None:
        if "/commit/" in path and len(refused) < 2:
            refused.append(path)
            return 500
        return None

    hub.trouble = at_first
    _, log = published(tiny_recipe)
    assert "the push of step" in log
    assert "step 12 is on the Hub" in log
    assert len(refused) == 2


def test_a_run_without_write_access_does_not_start(hub: LoopbackHub, tiny_recipe: Make) -> None:
    recipe = tiny_recipe(push_to_hub=True, hub_model_id="them/gpt2")
    with pytest.raises(InputError, match="push_to_hub: false and push the run later"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_rate_limit_of_an_hour_is_respected_but_does_not_delay_the_end_of_the_run(
    hub: LoopbackHub, tiny_recipe: Make
) -> None:
    limited: list[str] = []

    def once(method: str, path: str, number: int) -> tuple[int, dict[str, str]] | None:
        if "/tree/" in path and not limited:
            limited.append(path)
            return 429, {"Retry_After": "3600"}
        return None

    hub.trouble = once
    _, log = published(tiny_recipe)
    assert re.search(r"the push of step 4 failed: HfHubHTTPError: .*429.*, retry in 1 h 00 min", log)
    assert "step 12 is on the Hub" in log


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_push_that_cannot_be_staged_is_reported_and_training_continues(
    hub: LoopbackHub, tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.hub.publisher.stage", fail)
    recipe, log = published(tiny_recipe)
    assert "step 4 is not pushed: OSError: [Errno 28] No space left on device" in log
    assert "step 12 is not pushed" in log
    assert f"python -m training.hub push {recipe.output_dir} --repo_id me/tiny" in log
    assert not hub.model("me/tiny").messages


def publisher_of(recipe: Recipe, folder: str) -> tuple[Publisher, Any, Path, list[str]]:
    """A publisher, its run, a folder of the run with a config in it, and the lines that are reported."""
    saved = Path(recipe.output_dir) / folder
    saved.mkdir(parents=True)
    (saved / "config.json").write_text("{}")
    lines: list[str] = []
    run = SimpleNamespace(
        recipe=recipe,
        output_dir=Path(recipe.output_dir),
        config=GPT2ScratchConfig(),
        parameters=1,
        resume_from=None,
        step=12,
        total_steps=12,
        report=lines.append,
    )
    return Publisher(run, "me/tiny", RunHistory()), run, saved, lines  # type: ignore[arg-type]


def test_a_card_that_cannot_be_written_does_not_end_training(
    hub: LoopbackHub, tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise InputError("invalid manifest")

    monkeypatch.setattr("training.hub.publisher.write_model_card", fail)
    publisher, run, checkpoint, lines = publisher_of(tiny_recipe(), "checkpoints/step-000004")
    publisher.after_save(run, checkpoint, 4)
    publisher.close()
    assert lines == ["step 4 is not pushed: InputError: invalid manifest"]


def test_an_interrupted_run_reports_that_its_last_checkpoint_is_not_on_the_hub(
    hub: LoopbackHub, tiny_recipe: Make
) -> None:
    hub.trouble = lambda method, path, number: "hang"
    publisher, run, checkpoint, lines = publisher_of(tiny_recipe(), "checkpoints/step-000004")
    publisher.after_save(run, checkpoint, 4)
    publisher.close()
    assert lines == ["the newest checkpoint is not on the Hub yet; it is pushed when the run resumes"]


def test_ctrl_c_in_the_last_push_prints_the_command_to_finish_it(
    hub: LoopbackHub, tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Publisher, seconds: float) -> bool:
        raise KeyboardInterrupt

    recipe = tiny_recipe(hub_strategy="checkpoint")
    publisher, run, _, lines = publisher_of(recipe, "model")
    hub.trouble = lambda method, path, number: "down"
    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "stop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            publisher.after_training(run)
    publisher.close()
    assert lines[-1].endswith(f"training.hub push {recipe.output_dir} --repo_id me/tiny --checkpoint")


@pytest.mark.slow
def test_rank_0_pushes_while_two_processes_train(
    hub: LoopbackHub, programs: Path, tiny_recipe: Make, tmp_path: Path
) -> None:
    recipe = tiny_recipe(push_to_hub=True, hub_model_id="me/two", hub_strategy="checkpoint", max_steps=8)
    recipe.save(tmp_path / "recipe.yaml")
    done = launched_on_two(programs, tmp_path / "recipe.yaml", hub, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    there = hub.model("me/two")
    assert there.messages == ["Step 4", "Step 8"]
    assert set(there.tags) == {"step-000008", "step-000004"}
    states = {f"last-checkpoint/training_state/rng_state_{rank}.safetensors" for rank in range(2)}
    assert states <= set(there.files("step-000008"))
    # The run holds no token, and the push no trace of this machine.
    assert TOKEN not in done.stdout + done.stderr
    for path in Path(recipe.output_dir).rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for name, content in there.files().items():
        for secret in (str(tmp_path), TOKEN, str(Path.home()), str(ROOT), recipe.data_dir, "/tmp/"):
            assert secret.encode() not in content, (name, secret)


@pytest.mark.slow
def test_two_processes_without_write_access_do_not_start_and_print_one_error(
    hub: LoopbackHub, programs: Path, tiny_recipe: Make, tmp_path: Path
) -> None:
    tiny_recipe(push_to_hub=True, hub_model_id="them/gpt2").save(tmp_path / "recipe.yaml")
    done = launched_on_two(programs, tmp_path / "recipe.yaml", hub, tmp_path)
    assert done.returncode != 0
    # The launcher's report ends with the line as well, indented.
    assert len(re.findall("^error: you cannot write to", done.stderr, re.MULTILINE)) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_during_a_hanging_upload_ends_the_process(
    hub: LoopbackHub, programs: Path, tiny_recipe: Make, tmp_path: Path
) -> None:
    recipe = tiny_recipe(push_to_hub=True, hub_model_id="me/tiny", max_steps=100_000, eval_steps=0, sample_steps=0)
    recipe.save(tmp_path / "recipe.yaml")
    hangs = hub.hang_uploads()
    run = subprocess.Popen(
        [programs / "python", ROOT / "training" / "train.py", "--config", tmp_path / "recipe.yaml"],
        cwd=ROOT,
        env=environment_with(hub, tmp_path),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        assert hangs.wait(120)
        run.send_signal(signal.SIGTERM)
        printed, _ = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 128 + signal.SIGTERM, printed
    assert "the newest checkpoint is not on the Hub yet; it is pushed when the run resumes" in printed
    assert f"SIGTERM: stopped after step {step_of(checkpoints(Path(recipe.output_dir))[-1]):,} of 100,000" in printed
    assert not hub.model("me/tiny").messages


def environment_with(hub: LoopbackHub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that pushes to the Hub on this machine."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **hub.environment, **home}


def launched_on_two(
    programs: Path, recipe: Path, hub: LoopbackHub, tmp_path: Path
) -> "subprocess.CompletedProcess[str]":
    """`accelerate launch` of two CPU processes, with the Hub on this machine."""
    launcher = [str(programs / "accelerate"), "launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")]
    return subprocess.run(
        [*launcher, str(ROOT / "training" / "train.py"), "--config", str(recipe)],
        cwd=ROOT,
        env=environment_with(hub, tmp_path),
        text=True,
        capture_output=True,
        timeout=200,
    )
