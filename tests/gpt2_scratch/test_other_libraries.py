"""Libraries that CI does not install: TRL, bitsandbytes, torchao. docs/ecosystem.md states what these tests show."""

import copy

import pytest
import torch
from support.model_folders import scratch  # noqa: F401 - a fixture
from support.tiny_models import one_thread, pair, tiny, tokens  # noqa: F401 - a fixture for all
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.filterwarnings("default")  # their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny(n_embd=64, n_head=4).save_pretrained(path)
    return path


def quantized(folder, config):
    """The model, loaded with a `quantization_config`."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    ).eval()


def largest_difference(model, folder):
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(tokens()).logits
        return float((model(tokens()).logits - expected).abs().max() / expected.std())


@pytest.mark.parametrize(("bits", "layer", "largest"), [(8, "Linear8bitLt", 0.2), (4, "Linear4bit", 2.0)])
def test_bitsandbytes_quantizes_the_affine_layers_only(folder, bits, layer, largest):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes==0.50.2")
    model = quantized(folder, BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    found = {name.split(".")[-1] for name, module in model.named_modules() if type(module).__name__ == layer}
    assert found == {"c_attn", "c_proj", "c_fc"}
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype == torch.float32
    assert 0 < largest_difference(model, folder) < largest


def test_torchao_quantizes_nothing(folder):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao==0.18.0")
    model = quantized(folder, TorchAoConfig(quantization.Int8WeightOnlyConfig()))
    assert largest_difference(model, folder) == 0


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("packing", [False, True])
def test_trl_gives_the_losses_of_the_official_model(scratch, tmp_path, packing):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(scratch)
    tokenizer.pad_token = tokenizer.eos_token
    texts = Dataset.from_dict({"text": ["the quick brown fox", "lazy dogs", "jumps over the lazy dog"] * 8})
    found = []
    for model in pair(vocab_size=257, bos_token_id=256, eos_token_id=256):
        model.loss_type = "ForCausalLM"  # TRL does not recognize the official class, and counts one target too many
        arguments = trl.SFTConfig(
            str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            packing=packing,
            max_length=16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = trl.SFTTrainer(copy.deepcopy(model), arguments, train_dataset=texts, processing_class=tokenizer)
        trainer.train()
        found.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(found[0]) == 3
    assert found[0] == found[1]
