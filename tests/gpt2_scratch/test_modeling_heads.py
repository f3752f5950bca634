"""Parity of token classification and question answering with the official classes."""

import pytest
import torch
from support.tiny_models import TINY, gradients, one_thread, padded, tiny, tokens  # noqa: F401 - a fixture for all
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForTokenClassification,
)

from gpt2_scratch import (
    GPT2ScratchConfig,
    GPT2ScratchForCausalLM,
    GPT2ScratchForQuestionAnswering,
    GPT2ScratchForTokenClassification,
)

pytestmark = pytest.mark.parity

TAGS = torch.tensor([[0, 1, 2, -100] * 5] * 3)
# The last answers lie outside the text; they are ignored.
SPANS = {"start_positions": torch.tensor([0, 5, 20]), "end_positions": torch.tensor([3, 5, 25])}
CASES = {
    "tokens": (
        (GPT2ScratchForTokenClassification, GPT2ForTokenClassification, AutoModelForTokenClassification),
        {"labels": TAGS},
        "classifier.",
    ),
    "answers": (
        (GPT2ScratchForQuestionAnswering, GPT2ForQuestionAnswering, AutoModelForQuestionAnswering),
        SPANS,
        "qa_outputs.",
    ),
}
each_head = pytest.mark.parametrize(("classes", "labels", "head"), CASES.values(), ids=CASES)


def both(classes, **overrides):
    """Return our model and the official one with the same weights."""
    settings = {**TINY, "num_labels": 3, "attn_implementation": "eager", **overrides}
    torch.manual_seed(0)
    ours = classes[0](GPT2ScratchConfig(**settings, initializer_range=0.2)).eval()
    official = classes[1](GPT2Config(**settings)).eval()
    official.load_state_dict(ours.state_dict())
    return ours, official


@each_head
@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_loss_and_every_gradient_equal_the_official_ones(classes, labels, head, side):
    found = []
    for model in both(classes):
        out = model(**padded(side), **labels)
        out.loss.backward()
        found.append((out, gradients(model)))
    ours, official = found
    assert ours[0].keys() >= {"loss"}
    assert ours[0].loss > 0.1
    for name in {"loss", "logits", "start_logits", "end_logits"} & official[0].keys():
        assert torch.equal(ours[0][name], official[0][name]), name
    assert ours[1].keys() == official[1].keys()
    assert any(name.startswith(head) for name in ours[1])
    assert all(torch.equal(gradient, official[1][name]) for name, gradient in ours[1].items())


@pytest.mark.parametrize("options", [{}, {"classifier_dropout": 0.5}, {"classifier_dropout": None}])
def test_dropout_before_the_token_head_equals_the_official_one(options):
    losses = []
    for model in both(CASES["tokens"][0], **options):
        torch.manual_seed(1)
        losses.append(model.train()(tokens(3), labels=TAGS).loss)
    assert torch.equal(*losses)


@each_head
def test_fine_tuning_loads_a_pretrained_folder_and_saves_one(tmp_path, classes, labels, head):
    tiny().save_pretrained(tmp_path / "model")
    model = classes[2].from_pretrained(tmp_path / "model", attn_implementation="eager", num_labels=3)
    assert type(model) is classes[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(tokens(3), **labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.eval().save_pretrained(tmp_path / "tuned")
    tuned = classes[2].from_pretrained(tmp_path / "tuned", attn_implementation="eager")
    assert torch.equal(tuned(tokens(3), **labels).loss, model(tokens(3), **labels).loss)
    body = GPT2ScratchForCausalLM.from_pretrained(tmp_path / "tuned").transformer.state_dict()
    assert all(torch.equal(body[name], weight) for name, weight in model.transformer.state_dict().items())


@each_head
def test_official_folder_loads_with_its_head(tmp_path, classes, labels, head):
    ours, official = both(classes)
    official.save_pretrained(tmp_path)
    loaded = classes[0].from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tokens(3), **labels).loss, ours(tokens(3), **labels).loss)


@each_head
def test_count_of_targets_is_refused_because_the_losses_are_means(classes, labels, head):
    with pytest.raises(TypeError, match="got an unexpected argument 'num_items_in_batch'"):
        both(classes)[0](tokens(3), **labels, num_items_in_batch=7)
