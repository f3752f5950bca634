"""A saved folder in a process where the project is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import one_thread, tiny  # noqa: F401 - a fixture for all

ROOT = Path(__file__).parents[1]

LOAD = """
import sys, torch
{imports}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
options = dict({options})
config = AutoConfig.from_pretrained({folder!r}, **options)
model = AutoModelForCausalLM.from_pretrained({folder!r}, attn_implementation="eager", **options).eval()
base = AutoModel.from_pretrained({folder!r}, attn_implementation="eager", **options).eval()
assert (type(config).__name__, type(base).__name__) == ("GPT2ScratchConfig", "GPT2ScratchModel"), (config, base)
out = model(torch.arange(20).view(1, 20), output_hidden_states=True)
assert torch.equal(base(torch.arange(20).view(1, 20)).last_hidden_state, out.hidden_states[-1])
torch.save(out.logits, {result!r})
assert ("gpt2_scratch" in sys.modules) == {imported}
model.save_pretrained({again!r})
"""


@pytest.mark.parametrize("code", ["installed", "from the folder"])
def test_auto_classes_load_a_saved_folder_in_a_new_process(tmp_path, code):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    installed = code == "installed"
    script = LOAD.format(
        imports="import gpt2_scratch" if installed else "",
        options="" if installed else "trust_remote_code=True",
        imported=installed,
        folder=str(tmp_path / "model"),
        again=str(tmp_path / "again"),
        result=str(tmp_path / "logits.pt"),
    )
    (tmp_path / "load.py").write_text(script)
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    if installed:
        environment["PYTHONPATH"] = str(ROOT)
    # A script's folder, not the working directory, is on the path: gpt2_scratch is not imported by accident.
    result = subprocess.run(
        [sys.executable, "load.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.arange(20).view(1, 20)).logits)
    assert (tmp_path / "again" / "modeling_gpt2_scratch.py").exists()
