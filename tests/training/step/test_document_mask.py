"""Document masks: positions, masks, losses."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.cli_errors import InputError
from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from training.checkpoints.checkpoint_folder import checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.setup.model import attention_for
from training.step.train_step import document_positions, model_inputs

Make = Callable[..., Recipe]


EOT = 99
WINDOWS = torch.tensor(
    [
        [
            5,
            6,
            7,
            EOT,
            8,
            9,
            EOT,
            EOT,
            10,
            11,
            12,
            13,
        ],  # an end, a complete document, an empty one, a beginning
        [EOT, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],  # one document
    ]
)


def model(attention: str, n_positions: int = 16) -> GPT2ScratchForCausalLM:
    torch.manual_seed(0)
    config = GPT2ScratchConfig(vocab_size=100, n_positions=n_positions, n_embd=64, n_layer=2, n_head=2)
    config._attn_implementation = attention
    return GPT2ScratchForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def uncompiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without this, flex attention compiles itself for half a minute; with it, it warns."""
    if {"slow", "gpu"} & set(request.keywords):
        yield
        return
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        yield


def logits(net: GPT2ScratchForCausalLM, windows: Tensor, *, masked: bool) -> Tensor:
    inputs = model_inputs((windows, windows), torch.device("cpu"), EOT if masked else None)
    del inputs["shift_labels"]
    with torch.no_grad():
        return net(**inputs, use_cache=False).logits


def test_positions_restart_at_each_end_of_text() -> None:
    assert document_positions(WINDOWS, EOT).tolist() == [
        [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    ]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_a_document_in_a_window_gets_the_logits_that_it_gets_alone(attention: str) -> None:
    net = model(attention)
    packed = logits(net, WINDOWS, masked=True)
    for row, start, end in ((0, 0, 3), (0, 3, 6), (0, 6, 7), (0, 7, 12), (1, 0, 12)):
        alone = logits(net, WINDOWS[row : row + 1, start:end], masked=False)
        # Sums in another order: a few units in the last place of values near 1.
        torch.testing.assert_close(packed[row, start:end], alone[0], atol=1e-5, rtol=1e-4)


def test_without_the_mask_documents_attend_to_each_other() -> None:
    net = model("sdpa")
    masked, unmasked = logits(net, WINDOWS, masked=True), logits(net, WINDOWS, masked=False)
    assert not torch.allclose(masked[0, 3:], unmasked[0, 3:], atol=1e-3)
    torch.testing.assert_close(masked[1], unmasked[1], atol=1e-5, rtol=1e-4)


def test_windows_that_are_cut_have_the_logits_of_their_pieces() -> None:
    net = model("sdpa")
    for mark in (None, EOT):
        inputs = model_inputs((WINDOWS, WINDOWS.roll(-1, 1)), torch.device("cpu"), mark, seq_len=4)
        torch.testing.assert_close(inputs["shift_labels"].reshape(WINDOWS.shape), WINDOWS.roll(-1, 1))
        del inputs["shift_labels"]
        with torch.no_grad():
            cut = net(**inputs, use_cache=False).logits
        pieces = [
            logits(net, WINDOWS[row : row + 1, at : at + 4], masked=mark is not None)
            for row in (0, 1)
            for at in (0, 4, 8)
        ]
        torch.testing.assert_close(cut, torch.cat(pieces), atol=1e-5, rtol=1e-4)


def test_flex_and_dense_masks_give_the_same_loss() -> None:
    torch.manual_seed(1)
    windows = torch.randint(0, 99, (4, 16)).masked_fill(torch.rand(4, 16) < 0.2, EOT)
    targets = torch.randint(0, 99, (4, 16))
    losses = []
    for attention in ("eager", "sdpa", "flex_attention"):
        with torch.no_grad():
            inputs = model_inputs((windows, targets), torch.device("cpu"), EOT)
            losses.append(model(attention)(**inputs, use_cache=False).loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def loss_and_gradients(attention: str, device: str, *, backward: bool) -> tuple[float, dict[str, Tensor]]:
    """Of windows as long as several of flex attention's blocks, with documents that end inside and outside of them."""
    torch.manual_seed(2)
    windows = torch.randint(0, 99, (2, 320)).masked_fill(torch.rand(2, 320) < 0.02, EOT)
    net = model(attention, n_positions=320).to(device)
    with torch.set_grad_enabled(backward):
        loss = net(**model_inputs((windows, windows.roll(-1, 1)), torch.device(device), EOT), use_cache=False).loss
    if backward:
        loss.backward()
    found = {name: parameter.grad.cpu() for name, parameter in net.named_parameters() if parameter.grad is not None}
    return loss.item(), found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between transformers and torch, as a mask is compiled
def test_compiled_flex_attention_gives_the_loss_of_the_dense_mask_on_a_cpu() -> None:
    flex = loss_and_gradients("flex_attention", "cpu", backward=False)[0]  # torch has no backward for it there
    assert flex == pytest.approx(loss_and_gradients("sdpa", "cpu", backward=False)[0], abs=1e-5)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_flex_attention_on_a_gpu_gives_loss_and_gradients_of_the_dense_mask_on_a_cpu() -> None:
    flex, flex_gradients = loss_and_gradients("flex_attention", "cuda", backward=True)
    dense, dense_gradients = loss_and_gradients("sdpa", "cpu", backward=True)
    assert flex == pytest.approx(dense, abs=1e-4)
    assert flex_gradients.keys() == dense_gradients.keys()
    for name, expected in dense_gradients.items():
        # Sums in another order, over 640 positions.
        torch.testing.assert_close(flex_gradients[name], expected, atol=1e-5, rtol=1e-3, msg=name)


def test_gradients_stay_inside_a_document() -> None:
    net = model("sdpa")
    embedded = net.transformer.wte(WINDOWS[:1]).detach().requires_grad_()
    positions = document_positions(WINDOWS[:1], EOT)
    net(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[0, 8:].sum().backward()
    assert embedded.grad is not None
    assert embedded.grad[0, :7].abs().max() == 0
    assert embedded.grad[0, 7:].abs().min(dim=-1).values.max() > 0


def test_gpus_with_triton_use_flex_attention_unless_there_is_dropout(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.setup.model.has_triton", lambda: True)
    masked = tiny_recipe(document_mask=True)
    assert attention_for(masked, "cuda") == "flex_attention"
    assert attention_for(dataclasses.replace(masked, dropout=0.1), "cuda") == "sdpa"
    assert attention_for(dataclasses.replace(masked, attn_implementation="eager"), "cuda") == "eager"
    assert attention_for(tiny_recipe(), "cuda") == "sdpa"
    by_name = tiny_recipe(attn_implementation="flex_attention")
    assert attention_for(by_name, "cuda") == "flex_attention"
    with pytest.raises(InputError, match="needs a GPU with Triton and dropout 0"):
        attention_for(dataclasses.replace(by_name, dropout=0.1), "cuda")
    with pytest.raises(InputError, match="kernels-community/flash-attn3 does not separate documents"):
        attention_for(dataclasses.replace(masked, attn_implementation="kernels-community/flash-attn3"), "cuda")
    monkeypatch.setattr("training.setup.model.has_triton", lambda: False)
    assert attention_for(masked, "cuda") == "sdpa"
    with pytest.raises(InputError, match="needs a GPU with Triton"):
        attention_for(by_name, "cuda")


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_with_a_document_mask_trains_and_cannot_resume_without_it(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.setup.accelerator.use_all_cores", lambda: torch.set_num_threads(1))
    unmasked = tiny_recipe(output_dir=str(tmp_path / "unmasked"), max_steps=4)
    masked = tiny_recipe(output_dir=str(tmp_path / "masked"), max_steps=4, document_mask=True)
    losses = {}
    for recipe in (unmasked, masked):
        train(recipe)
        losses[recipe.output_dir] = [line.get("val_loss") for line in read_metrics(Path(recipe.output_dir))]
    assert losses[unmasked.output_dir] != losses[masked.output_dir]
    assert checkpoints(Path(masked.output_dir))
    with pytest.raises(InputError, match="document_mask: True → False"):
        train(dataclasses.replace(masked, document_mask=False))
