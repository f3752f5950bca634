"""Auto classes load a saved folder in a new process, with and without our package."""

import os
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT
from support.tiny_models import one_thread, tiny  # noqa: F401 - a fixture for all
from transformers import GPT2Tokenizer

from gpt2_scratch import GPT2ScratchForSequenceClassification, modeling_gpt2_scratch

pytestmark = pytest.mark.parity

INSTALLED = "import gpt2_scratch"
# Hides an editable install in this environment.
NOT_INSTALLED = 'import sys; sys.modules["gpt2_scratch"] = None'
LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification
torch.set_num_threads(1)

config = AutoConfig.from_pretrained("model", **options)
model = AutoModelForCausalLM.from_pretrained("model", attn_implementation="eager", **options).eval()
base = AutoModel.from_pretrained("model", attn_implementation="eager", **options).eval()
classifier = AutoModelForSequenceClassification.from_pretrained("classifier", **options).eval()
names = [type(one).__name__ for one in (config, model, base, classifier)]
classes = ["GPT2ScratchConfig", "GPT2ScratchForCausalLM", "GPT2ScratchModel", "GPT2ScratchForSequenceClassification"]
assert names == classes, names
assert model.lm_head.weight is model.transformer.wte.weight
tagger = AutoModelForTokenClassification.from_pretrained("model", **options)
reader = AutoModelForQuestionAnswering.from_pretrained("model", **options)
assert [type(one).__name__ for one in (tagger, reader)] == [
    "GPT2ScratchForTokenClassification", "GPT2ScratchForQuestionAnswering"
]
assert type(AutoModelForCausalLM.from_config(config, **options)) is type(model)

input_ids = torch.arange(20).view(1, 20)
out = model(input_ids, output_hidden_states=True)
assert torch.equal(base(input_ids).last_hidden_state, out.hidden_states[-1])
assert model.generate(input_ids, max_new_tokens=3, pad_token_id=96).shape == (1, 23)
torch.save([out.logits, classifier(input_ids).logits], "logits.pt")

model.save_pretrained("model-again")
classifier.save_pretrained("classifier-again")
base.save_pretrained("base-again")
AutoModelForCausalLM.from_pretrained("model-again", **options)
AutoModel.from_pretrained("base-again", **options)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a causal language model and a classifier, and both models."""
    path = tmp_path_factory.mktemp("remote")
    model = tiny()
    model.save_pretrained(path / "model")
    classifier = GPT2ScratchForSequenceClassification.from_pretrained(path / "model", num_labels=3).eval()
    classifier.save_pretrained(path / "classifier")
    return path, model, classifier


def run(folder, script, **environment):
    """Run a script offline, away from the project's folder."""
    (folder / "load.py").write_text(script)
    # Python puts the script's folder on the path, not the working directory, so our package is not found.
    return subprocess.run(
        [sys.executable, "load.py"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("code", ["installed", "not installed"])
def test_auto_classes_load_a_saved_folder_and_saving_it_again_gives_the_same_bytes(saved, code):
    folder, model, classifier = saved
    if code == "installed":
        result = run(folder, INSTALLED + "\noptions = {}" + LOAD, PYTHONPATH=str(ROOT))
    else:
        result = run(folder, NOT_INSTALLED + "\noptions = dict(trust_remote_code=True)" + LOAD)
    assert result.returncode == 0, result.stderr
    logits, scores = torch.load(folder / "logits.pt")
    input_ids = torch.arange(20).view(1, 20)
    assert torch.equal(logits, model(input_ids).logits)
    assert torch.equal(scores, classifier(input_ids).logits)
    for name in ("model", "classifier"):
        before, after = ({path.name: path for path in (folder / part).iterdir()} for part in (name, f"{name}-again"))
        assert before.keys() == after.keys()
        for file, path in before.items():
            assert path.read_bytes() == after[file].read_bytes(), (name, file)


def test_folder_contains_exactly_the_code_it_imports(saved):
    sources = {path.name for path in (saved[0] / "model").glob("*.py")}
    imported = {"modeling_gpt2_scratch.py", "configuration_gpt2_scratch.py", "pretrained_gpt2_scratch.py"}
    assert sources == imported | {"heads_gpt2_scratch.py", "linear_cross_entropy.py"}
    for name in sources:
        assert (saved[0] / "model" / name).read_bytes() == (ROOT / "gpt2_scratch" / name).read_bytes()


def test_code_of_a_folder_is_not_run_without_trust_and_the_tokenizer_needs_none(saved):
    """AutoTokenizer reads config.json first, which names code. It asks if nobody told it, and any answer will do."""
    script = f"""
{NOT_INSTALLED}
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast
from transformers.utils import logging
try:
    AutoModelForCausalLM.from_pretrained("model", trust_remote_code=False)
except ValueError as error:
    assert "contains custom code which must be executed" in str(error)
else:
    raise AssertionError("the folder's code ran")
def check(tokenizer):
    assert type(tokenizer).__name__ == "GPT2Tokenizer", type(tokenizer)
    assert list(tokenizer("abc")) == ["input_ids", "attention_mask"]
    assert tokenizer("abc").input_ids == [0, 1, 2]
check(GPT2TokenizerFast.from_pretrained("model"))
check(AutoTokenizer.from_pretrained("model", trust_remote_code=False))  # with a warning
logging.set_verbosity_error()
check(AutoTokenizer.from_pretrained("model"))  # asks, and nobody answers
assert not any(name.startswith("transformers_modules.model") for name in sys.modules)
logging.set_verbosity_warning()
check(AutoTokenizer.from_pretrained("model", trust_remote_code=True))
assert any(name.startswith("transformers_modules.model") for name in sys.modules)
"""
    GPT2Tokenizer(vocab={"a": 0, "b": 1, "c": 2, "<|endoftext|>": 96}).save_pretrained(saved[0] / "model")
    result = run(saved[0], script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("Do you wish to run the custom code? [y/N] ")
    assert result.stdout.count("[y/N]") == 1
    assert "model of type `gpt2_scratch` to instantiate a model of type ``" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("version", ["4.57.6", "5.16.0"])
def test_code_of_a_folder_names_the_version_of_transformers_that_it_needs(saved, monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    path = saved[0] / "model" / "configuration_gpt2_scratch.py"
    with pytest.raises(ImportError, match=rf"needs transformers 5.17 or newer, found {version}; upgrade it"):
        exec(path.read_text(), {"__name__": "configuration_gpt2_scratch"})
    # The package index's range and the code's minimum are the same.
    assert "transformers>=5.17," in (ROOT / "setup.cfg").read_text()


LIBRARIES = """
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging
logging.set_verbosity_error()
torch.set_num_threads(1)

model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
official = GPT2LMHeadModel(__import__("transformers").GPT2Config(**{
    name: value for name, value in model.config.to_dict().items() if name not in ("auto_map", "model_type")
}))
official.load_state_dict(model.state_dict())
official.loss_type = "ForCausalLM"  # Trainer guesses it for ours, and would count one target too many
rows = [{"input_ids": list(range(i, i + 16)), "labels": list(range(i, i + 16))} for i in range(16)]
losses = []
for one in (model, official):
    arguments = TrainingArguments(
        "run", label_smoothing_factor=0.1, max_steps=3, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, seed=0, learning_rate=1e-2,
    )
    trainer = Trainer(one, arguments, train_dataset=rows)
    trainer.train()
    losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
assert losses[0] == losses[1], losses

from peft import IA3Config, LoraConfig, get_peft_model  # after the model is built
for config in (LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True), IA3Config(task_type="CAUSAL_LM")):
    assert any(parameter.requires_grad for parameter in get_peft_model(official, config).parameters())
    get_peft_model(AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True), config)
"""


def test_libraries_recognize_a_model_of_the_folders_own_code(saved):
    result = run(saved[0], NOT_INSTALLED + LIBRARIES)
    assert result.returncode == 0, result.stderr


def test_folders_of_earlier_versions_find_the_classifier_with_newer_code(saved):
    """They name another file, and `hf upload --include "*.py"` renews only the code."""
    code = (saved[0] / "model" / "modeling_gpt2_scratch.py").read_text()
    assert "import GPT2ScratchForSequenceClassification" in code
    assert modeling_gpt2_scratch.GPT2ScratchForSequenceClassification is GPT2ScratchForSequenceClassification
