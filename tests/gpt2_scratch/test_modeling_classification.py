"""Parity of the classifier with the official one."""

import pytest
import torch
from support.tiny_models import TINY, gradients, one_thread, padded, tiny, tokens  # noqa: F401 - a fixture for all
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM, GPT2ScratchForSequenceClassification

pytestmark = pytest.mark.parity

LABELS = {
    "regression": (1, torch.tensor([0.5, -1.0, 2.0])),
    "single_label_classification": (3, torch.tensor([2, 0, 1])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])),
}


def classifiers(attn_implementation="eager", **overrides):
    """Return our classifier and the official one with the same weights."""
    settings = {**TINY, "pad_token_id": 0, "num_labels": 3, "attn_implementation": attn_implementation, **overrides}
    torch.manual_seed(0)
    ours = GPT2ScratchForSequenceClassification(GPT2ScratchConfig(**settings, initializer_range=0.2)).eval()
    official = GPT2ForSequenceClassification(GPT2Config(**settings)).eval()
    official.load_state_dict(ours.state_dict())
    return ours, official


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("problem", LABELS)
def test_logits_loss_and_every_gradient_equal_the_official_ones(problem, named):
    num_labels, labels = LABELS[problem]
    found = []
    for model in classifiers(num_labels=num_labels, problem_type=problem if named else None):
        out = model(tokens(3), labels=labels)
        out.loss.backward()
        found.append((out, gradients(model)))
        assert model.config.problem_type == problem
    assert found[0][0].logits.shape == (3, num_labels)
    assert torch.equal(found[0][0].logits, found[1][0].logits)
    assert torch.equal(found[0][0].loss, found[1][0].loss)
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_last_token_before_the_padding_is_classified(side, attn_implementation):
    ours, official = classifiers(attn_implementation)
    batch = padded(side)
    logits = ours(**batch).logits
    assert torch.equal(logits, official(**batch).logits)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = ours(batch["input_ids"][row][mask].unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)


def test_batch_without_a_padding_token_is_refused():
    with pytest.raises(ValueError, match="padding token"):
        classifiers(pad_token_id=None)[0](tokens())
    assert classifiers(pad_token_id=None)[0](tokens(1)).logits.shape == (1, 3)


def test_fine_tuning_loads_a_pretrained_folder_and_saves_one(tmp_path):
    pretrained = tiny()
    pretrained.save_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=2, pad_token_id=0, id2label={0: "no", 1: "yes"}
    )
    assert type(model) is GPT2ScratchForSequenceClassification
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    input_ids, labels = tokens(8), torch.tensor([0, 1] * 4)
    losses = []
    for _ in range(12):
        loss = model(input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
    model.eval().save_pretrained(tmp_path / "tuned")
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert tuned.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(tuned(input_ids).logits, model(input_ids).logits)
    assert torch.equal(tuned(input_ids).logits.argmax(-1), labels)
    body = GPT2ScratchForCausalLM.from_pretrained(tmp_path / "tuned").transformer.state_dict()
    assert all(torch.equal(body[name], weight) for name, weight in model.transformer.state_dict().items())


def test_official_classifier_loads_with_its_head(tmp_path):
    ours, official = classifiers()
    official.save_pretrained(tmp_path)
    loaded = GPT2ScratchForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tokens()).logits, ours(tokens()).logits)
