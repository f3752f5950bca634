"""Every command in README and docs runs as printed, or states why it cannot be run here and has flags that exist.

Commands that train or tokenize get smaller numbers: the same flags, on a corpus of a few kilobytes.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from support.launching import run_python
from support.paths import ROOT
from support.small_corpora import write_corpus

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run in tests: (?P<reason>[^\n]+) -->\n)?```bash\n(?P<commands>.*?)```", re.DOTALL)
# Run by .ci/run, or by hand.
ELSEWHERE = ("make ", "pip install ", ".venv/bin/python -m pytest")

SMALLER = {
    "--max_steps 1200": "--max_steps 8",
    "--max_steps 400": "--max_steps 6",
    "--decay_steps 300": "--decay_steps 2",
    "step-000900": "step-000004",
    "--shard_tokens 2000000": "--shard_tokens 9000",
    "--val_tokens 131073": "--val_tokens 2000",
    "train:4096": "train:300",
    "--num_samples 3": "--num_samples 2 --max_new_tokens 4",
}
TINY_RUN = {
    "--corpus": "corpus.jsonl",
    "--tokenizer": "train:300",
    "--shard_tokens": "9000",
    "--val_tokens": "2000",
    "--seq_len": "32",
    "--n_layer": "1",
    "--n_head": "2",
    "--n_embd": "32",
    "--tokens_per_step": "256",
    "--per_device_train_batch_size": "4",
    "--max_steps": "6",
    "--warmup_steps": "2",
    "--eval_steps": "3",
    "--eval_tokens": "1000",
    "--sample_tokens": "4",
    "--save_steps": "2",
    "--mixed_precision": "no",
}


class Command(NamedTuple):
    """A command of a page, and why it is not run, if it is not."""

    page: str
    line: str
    reason: str | None

    @property
    def words(self) -> list[str]:
        """The words of the command, without the comment."""
        return shlex.split(self.line, comments=True)


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            lines = block["commands"].replace("\\\n", " ").splitlines()
            found += [Command(page.name, line.strip(), block["reason"]) for line in lines if line.strip()]
    return found


@functools.cache
def help_of(program: tuple[str, ...]) -> str:
    done = run_python(*program, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def program_of(words: list[str]) -> tuple[str, ...] | None:
    """The program of ours that a command starts: a path, or -m and a module with its sub-command."""
    for number, word in enumerate(words):
        if word == "pytest":
            return None
        if word.endswith(".py"):
            return (word,)
        if word == "-m" and words[number + 1].split(".")[0] in {"training", "evaluation", "gpt2_scratch"}:
            has_subcommand = words[number + 1] == "training.hub"
            return tuple(words[number : number + (3 if has_subcommand else 2)])
    return None


def test_pages_have_commands_to_run_and_others() -> None:
    assert len([command for command in commands() if command.reason is None]) > 20
    assert len([command for command in commands() if command.reason]) > 10


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.page}: {command.line[:70]}")
def test_a_documented_command_names_flags_and_files_that_exist(command: Command) -> None:
    words = command.words
    for word in words:
        if re.fullmatch(r"(accelerate_configs|training|benchmarks|tests)/[\w/.-]+\.(py|yaml)", word):
            assert (ROOT / word).is_file(), word
    program = program_of(words)
    if program is not None:
        ours = words[words.index(program[-1]) + 1 :]
        for flag in ours:
            if flag.startswith("--"):
                assert re.search(rf"{flag.split('=')[0]}\b", help_of(program)), flag


@pytest.fixture(scope="module")
def checkout(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout, with small texts in place of a user's."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(programs)
    for name in ("gpt2_scratch", "training", "evaluation", "common", "accelerate_configs", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    write_corpus(folder / "corpus.jsonl", 400)
    text = (folder / "corpus.jsonl").read_text()
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "a.jsonl").write_text(text.replace('"text"', '"content"'))
    (folder / "input.txt").write_text(text)
    run(folder, "accelerate launch training/train.py --output_dir runs/quickstart --data_dir data/installed-docs")
    own = "--corpus my-texts/ --text_field content --data_dir data/mine --output_dir runs/mine"
    run(folder, f"accelerate launch training/train.py {own}")
    return folder


def shortened(line: str) -> str:
    line = re.sub(r"\s+# .*", "", line)
    for long, short in SMALLER.items():
        line = line.replace(long, short)
    # The launcher's own flags come before the script.
    if "training/train.py" in line and "--help" not in line:
        ours = line.split("training/train.py")[1]
        given = set(re.findall(r"--\w+", ours))
        tiny = {flag: value for flag, value in TINY_RUN.items() if flag not in given}
        if "runs/stable/recipe.yaml" in ours:  # a recipe that is tiny already
            tiny = {}
        if "--gpus 8" in ours:
            tiny["--tokens_per_step"] = "1024"
        line += "".join(f" {flag} {value}" for flag, value in tiny.items())
    return line


def run(folder: Path, line: str) -> str:
    environment = os.environ | {
        "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    line = shortened(line)
    if exported := re.search(r"gpt2_scratch.export .*--output (\S+)", line):  # several pages show the same command
        shutil.rmtree(folder / exported[1], ignore_errors=True)
        (folder / exported[1]).unlink(missing_ok=True)  # a GGUF file
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [command for command in commands() if command.reason is None and not command.line.startswith(ELSEWHERE)],
    ids=lambda command: f"{command.page}: {command.line[:70]}",
)
def test_a_documented_command_runs(command: Command, checkout: Path) -> None:
    run(checkout, command.line)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_guide_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES if page.parent.name == "docs" and f"(docs/{page.name}" not in readme]


def test_commands_that_ci_runs_are_in_its_script() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script
    assert "make train" in script


@pytest.mark.slow
def test_python_of_the_readme_runs(checkout: Path) -> None:
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)):
        (checkout / f"example_{number}.py").write_text(code)
        run(checkout, f"python example_{number}.py")
