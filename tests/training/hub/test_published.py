"""Pushed models load in clean processes: with our code, without it, as plain GPT-2, and as a base model."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from support.hub_client import ACCOUNTS, TOKEN, point_client_at
from support.loopback_hub import LoopbackHub, serving
from support.loopback_writing import metadata_errors
from support.paths import ROOT
from support.tiny_models import tiny

from common.cli_errors import InputError
from gpt2_scratch import GPT2ScratchForCausalLM
from gpt2_scratch.generate import main as generate
from training.hub.__main__ import main
from training.loop import train

# The client itself uploads large files this way without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub_of_a_run(
    tiny_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_accelerator: None
) -> Iterator[tuple[LoopbackHub, Any]]:
    """A Hub with a run that was pushed while it trained."""
    hub = LoopbackHub(accounts=ACCOUNTS)
    point_client_at(hub, monkeypatch, tmp_path / "cache")
    with serving(hub):
        recipe = tiny_recipe(push_to_hub=True, hub_model_id="me/tiny", hub_private_repo=True)
        train(recipe)
        yield hub, recipe


def other_process(hub: LoopbackHub, tmp_path: Path, *command: str | Path) -> str:
    environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    environment |= {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    (tmp_path / "away").mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        cwd=tmp_path / "away",
        env=environment,
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


SNIPPET = """
import re
from huggingface_hub import hf_hub_download
for revision in ("main", "native"):
    card = open(hf_hub_download("me/tiny", "README.md", revision=revision)).read()
    for code in re.findall("```python\\n(.*?)```", card, re.DOTALL):
        exec(code, {})
"""

LOGITS = """
import sys
{first}
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
found = {{}}
for name, options in {loads}.items():
    model = AutoModelForCausalLM.from_pretrained("me/tiny", **options).eval()
    ids = AutoTokenizer.from_pretrained("me/tiny", **options)("The model", return_tensors="pt")["input_ids"]
    found[name] = [type(model).__name__, ids.tolist(), model(ids).logits[0, -1].tolist()]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_published_model_loads_four_ways(
    hub_of_a_run: tuple[LoopbackHub, Any], programs: Path, tmp_path: Path
) -> None:
    hub, recipe = hub_of_a_run
    main(["push", recipe.output_dir, "--repo_id", "me/tiny", "--native"])
    folder = Path(recipe.output_dir) / "model"
    model = GPT2ScratchForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    installed = LOGITS.format(first="import gpt2_scratch", loads={"ours": {}})
    alone = LOGITS.format(
        first='sys.modules["gpt2_scratch"] = None',
        loads={"remote code": {"trust_remote_code": True}, "native": {"revision": "native"}},
    )
    found = json.loads(other_process(hub, tmp_path, programs / "python", "-c", installed).splitlines()[-1])
    # The code of both cards comes after.
    lines = other_process(hub, tmp_path, sys.executable, "-c", alone + SNIPPET).splitlines()
    [found_alone] = [line for line in lines if line.startswith('{"remote code"')]
    found |= json.loads(found_alone)
    assert {name: kind for name, (kind, _, _) in found.items()} == {
        **{"ours": "GPT2ScratchForCausalLM", "remote code": "GPT2ScratchForCausalLM"},
        "native": "GPT2LMHeadModel",
    }
    for _, ids, logits in found.values():
        expected = model(torch.tensor(ids)).logits[0, -1]
        # The same operations, but for another order of sums in the attention of one of them.
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)

    printed = "".join(lines[lines.index(found_alone) + 1 :])
    assert printed.count("The") >= 4
    assert "Do you wish to run" not in printed

    # As a base model.
    flags = ["--init_from", "me/tiny", "--push_to_hub", "false", "--output_dir", str(tmp_path / "continued")]
    flags += ["--max_steps", "2", "--learning_rate", "1e-5"]
    config = Path(recipe.output_dir) / "recipe.yaml"
    other_process(hub, tmp_path, programs / "python", ROOT / "training" / "train.py", "--config", config, *flags)
    lines = [json.loads(line) for line in (tmp_path / "continued" / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
    last = [line["val_loss"] for line in before if "val_loss" in line][-1]
    again = [line["val_loss"] for line in lines if "val_loss" in line][-1]
    assert abs(again - last) < 0.05  # two tiny steps away, where a fresh model is nats away
    card = (tmp_path / "continued" / "model" / "README.md").read_text()
    assert "base_model: me/tiny" in card


GENERATED = """
import sys, torch
sys.modules["gpt2_scratch"] = None
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("me/old", trust_remote_code=True).eval()
print(model.generate(torch.arange(8)[None], max_new_tokens=12, do_sample=False, pad_token_id=96).tolist()[0])
"""


@pytest.mark.slow
def test_published_folder_is_renewed_by_the_documented_commands(
    hub: LoopbackHub, programs: Path, tmp_path: Path
) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "README.md").write_text("---\nlicense: mit\n---\n\nThe owner's own card\n")
    for path in (tmp_path / "old").glob("*.py"):
        path.write_text('raise ImportError("old code")\n')
    api = huggingface_hub.HfApi()
    api.create_repo("me/old")
    api.upload_folder(repo_id="me/old", folder_path=tmp_path / "old")
    before = hub.model("me/old").files()

    section = (ROOT / "docs" / "hub.md").read_text().split("## Renew a published folder")[1].split("\n## ")[0]
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("OWNER/NAME", "me/old").splitlines()
    export, upload = (shlex.split(command)[1:] for command in commands)
    other_process(hub, tmp_path, programs / "python", *export)
    other_process(hub, tmp_path, programs / "python", "-m", "huggingface_hub.cli.hf", *upload)

    after = hub.model("me/old").files()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {name for name in before if name.endswith(".py")}
    assert all(after[name] == (ROOT / "gpt2_scratch" / name).read_bytes() for name in changed)
    expected = model.generate(torch.arange(8)[None], max_new_tokens=12, do_sample=False, pad_token_id=96)
    assert json.loads(other_process(hub, tmp_path, sys.executable, "-c", GENERATED)) == expected[0].tolist()


def test_a_push_contains_nothing_private(hub_of_a_run: tuple[LoopbackHub, Any], tmp_path: Path) -> None:
    hub, recipe = hub_of_a_run
    main(["push", recipe.output_dir, "--repo_id", "me/tiny", "--native"])
    there = hub.model("me/tiny")
    secrets = [str(tmp_path), str(Path.home()), TOKEN, recipe.data_dir, recipe.corpus, str(ROOT), "/tmp/"]
    for revision in ("main", "native"):
        for name, content in there.files(revision).items():
            for secret in secrets:
                assert secret.encode() not in content, (revision, name, secret)
    card = there.files()["README.md"].decode()
    assert not metadata_errors({"content": card})
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in card
    assert '`revision="native"`' in card
    native = there.files("native")["README.md"].decode()
    assert 'from_pretrained("me/tiny", revision="native")' in native
    assert not [name for name in there.files("native") if name.endswith(".py")]
    assert there.files("native")["model.safetensors"] == there.files()["model.safetensors"]


def test_an_interrupted_run_is_pushed_and_loaded_from_its_newest_checkpoint(
    hub_of_a_run: tuple[LoopbackHub, Any], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    hub, recipe = hub_of_a_run
    run = Path(recipe.output_dir)
    (run / "model").rename(tmp_path / "model-elsewhere")
    main(["push", str(run / "checkpoints" / "step-000012"), "--repo_id", "me/one-checkpoint"])
    assert "12 steps of 256 tokens" in hub.model("me/one-checkpoint").files()["README.md"].decode()
    assert not [name for name in hub.model("me/one-checkpoint").files() if "training_state" in name]
    main(["push", str(run), "--repo_id", "me/one-checkpoint", "--checkpoint"])
    assert "last-checkpoint/training_state/trainer_state.json" in hub.model("me/one-checkpoint").files()
    main(["push", str(run), "--repo_id", "me/again"])
    there = hub.model("me/again")
    assert set(there.tags) == {"step-000012"}
    card = there.files()["README.md"].decode()
    assert "12 steps of 256 tokens" in card
    assert not [name for name in there.files() if "training_state" in name]
    generate(["--model", str(run), "--prompt", "The", "--max_new_tokens", "4", "--device", "cpu"])
    captured = capfdbinary.readouterr()
    assert b"The" in captured.out
    assert b"tokens/s" in captured.err


def test_a_folder_without_a_complete_model_is_rejected(hub: LoopbackHub, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            main(["push", str(tmp_path / "folder"), "--repo_id", "me/x"])

    refused("there is no folder")
    (tmp_path / "folder").mkdir()
    refused(r"there is neither a config.json nor a checkpoint")
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "bert"}')
    refused("expected gpt2 or gpt2_scratch")
    GPT2ScratchForCausalLM.config_class(n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "folder")
    refused("no model.safetensors in")
    with pytest.raises(InputError, match="repo_id"):
        main(["push", str(tmp_path / "folder")])
    assert not hub.requests


def test_a_run_without_a_checkpoint_cannot_generate(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("output_dir: x\n")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        generate(["--model", str(tmp_path), "--prompt", "x"])
