"""The official checkpoints give the values that llm.c and lm-evaluation-harness publish, and survive a round trip.

    GPT2_OFFICIAL_DIR=~/models pytest -m network tests/gpt2_scratch/test_official.py

reads `~/models/gpt2`, `~/models/gpt2-medium`, … (or `~/models` itself, if it is a model folder). Without the variable
the checkpoints are downloaded from the Hub. The published values are in the shared data.
"""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import tiktoken
import torch
from support.paths import SHARED_DATA
from transformers import GPT2LMHeadModel

from evaluation.scoring.scorer import score
from evaluation.tasks.task_types import Item, Request
from gpt2_scratch import GPT2ScratchForCausalLM
from gpt2_scratch.export import export

SIZES = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
END_OF_TEXT = 50256

needs_shared_data = pytest.mark.skipif(
    not (SHARED_DATA / "golden").is_dir(), reason=f"needs the published values in {SHARED_DATA}"
)


def official(name: str) -> str:
    """Return the folder of an official checkpoint, or its id on the Hub."""
    folder = os.environ.get("GPT2_OFFICIAL_DIR")
    if folder is None:
        return f"openai-community/{name}"
    if name == "gpt2" and (Path(folder) / "config.json").is_file():
        return folder
    if not (Path(folder) / name / "config.json").is_file():
        pytest.skip(f"no {name} in GPT2_OFFICIAL_DIR={folder}")
    return str(Path(folder) / name)


def network(test):
    """Mark a test that needs official weights, with time for the download."""
    return pytest.mark.network(pytest.mark.timeout(1800)(test))


def gpt2(**options):
    return GPT2ScratchForCausalLM.from_pretrained(official("gpt2"), dtype=torch.float32, **options)


@functools.cache
def tokenizer():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED_DATA / "tiktoken_cache"))
    return tiktoken.get_encoding("gpt2")


def golden(name):
    return json.loads((SHARED_DATA / "golden" / f"{name}.json").read_text())


# --- without weights: our reading of the published values -------------------------------------------------------------


def shakespeare():
    """Return the tokens of llm.c: end-of-text before every section; a section ends with an empty line."""
    text = (SHARED_DATA / "tinyshakespeare" / "input.txt").read_text()
    *sections, last = text.split("\n\n")
    pieces = [section + "\n\n" for section in sections] + [last]
    return [token for piece in pieces for token in (END_OF_TEXT, *tokenizer().encode_ordinary(piece))]


def pairs():
    """Yield the requests of lm-evaluation-harness, with context and continuation tokenized separately."""
    for request in golden("lm_eval_gpt2_loglikelihoods")["loglikelihood"]:
        yield request, *(tokenizer().encode_ordinary(request[part]) for part in ("context", "continuation"))


def rolling_windows(ids, max_length):
    """Return windows of tokens and how many of their last predictions count: each token once, in few windows."""
    first = min(max_length, len(ids))
    windows = [([END_OF_TEXT, *ids[: first - 1]], first)]
    done = first
    while done < len(ids):
        count = min(max_length, len(ids) - done)
        done += count
        windows.append((ids[done - max_length - 1 : done - 1], count))
    return windows


@needs_shared_data
def test_tokens_are_those_of_the_published_values():
    assert len(shakespeare()) == 32_768 + 305_260  # as llm.c's data script reports
    for request, context, continuation in pairs():
        assert (len(context), len(continuation)) == (request["n_ctx"], request["n_cont"]), request
    rolling = golden("lm_eval_gpt2_loglikelihoods")["rolling"]
    assert tokenizer().encode_ordinary(rolling["text"]) == rolling["ids"]


@needs_shared_data
def test_rolling_windows_predict_every_token_once():
    ids = golden("lm_eval_gpt2_loglikelihoods")["rolling"]["ids"]
    assert rolling_windows(ids, 1024) == [([END_OF_TEXT, *ids[:-1]], 17)]
    windows = rolling_windows(ids, 5)
    assert [count for _, count in windows] == [5, 5, 5, 2]
    assert [read for read, _ in windows] == [[END_OF_TEXT, *ids[:4]], ids[4:9], ids[9:14], ids[11:16]]


# --- with the weights -------------------------------------------------------------------------------------------------


@network
@pytest.mark.parametrize("name", SIZES)
def test_official_checkpoint_loads_with_nothing_missing_and_gives_the_official_logits(name):
    ours, info = GPT2ScratchForCausalLM.from_pretrained(official(name), output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert ours.num_parameters() == SIZES[name]
    assert ours.lm_head.weight is ours.transformer.wte.weight
    input_ids = torch.tensor([[464, 3290, 373, 1043, 287, 257, 2214, 1474]])
    with torch.no_grad():
        logits = ours(input_ids).logits
        del ours
        assert torch.equal(logits, GPT2LMHeadModel.from_pretrained(official(name))(input_ids).logits)


@network
def test_greedy_text_equals_the_published_one():
    # transformers, tests/models/gpt2/test_modeling_gpt2.py.
    text = gpt2().generate(torch.tensor([[464, 3290]]), do_sample=False, max_length=20, pad_token_id=END_OF_TEXT)
    expected = "The dog was found in a field near the intersection of West and West Streets.\n\nThe dog"
    assert tokenizer().decode(text[0].tolist()) == expected


@network
@needs_shared_data
def test_ten_optimizer_steps_have_the_losses_published_by_llm_c():
    published = golden("llmc_test_gpt2_losses")
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    tokens = torch.tensor(shakespeare()[: 4 * 64 + 1])
    losses = []
    for _ in published["losses"]:
        loss = model(tokens[:-1].view(4, 64), shift_labels=tokens[1:].view(4, 64), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(published["losses"], abs=published["tolerance"])


def log_probabilities(model, ids, count):
    """Return log-probabilities of the last `count` ids, and whether each is the most likely token."""
    with torch.no_grad():
        scores = model(torch.tensor([ids[:-1]])).logits[0, -count:].log_softmax(-1)
    targets = torch.tensor(ids[-count:])
    return scores.gather(1, targets[:, None])[:, 0], scores.argmax(-1) == targets


@network
@needs_shared_data
def test_log_likelihoods_are_those_published_by_lm_evaluation_harness():
    golden_values, model = golden("lm_eval_gpt2_loglikelihoods"), gpt2()
    found, greedy = {}, {}
    for request, context, continuation in pairs():
        scores, likeliest = log_probabilities(model, context + continuation, len(continuation))
        text = request["continuation"]
        found[text], greedy[text] = scores.sum().item(), bool(likeliest.all())
        if request["value"] is not None:
            assert found[text] == pytest.approx(request["value"], rel=golden_values["rtol"]), request
    assert found[" dog"] > found[" cat"]
    assert not greedy[" cat"]
    assert not greedy[", lazy dog"]
    assert greedy[", lazy fox"]
    assert greedy[", lazy fox and they both fall to the ground"]


@network
@needs_shared_data
def test_scoring_gives_the_log_likelihoods_published_by_lm_evaluation_harness():
    golden_values, asked = golden("lm_eval_gpt2_loglikelihoods"), list(pairs())
    # All in one item, so that common prefixes are computed once.
    item = Item(0, tuple(Request(tuple(context), tuple(continuation)) for _, context, continuation in asked))
    apart = [Item(index, (request,)) for index, request in enumerate(item.requests)]
    model = gpt2()
    together, alone = score(model, [item])[0], [answers[0] for answers in score(model, apart)]
    for (request, _, _), one, other in zip(asked, together, alone, strict=True):
        assert one.sum == pytest.approx(other.sum, abs=1e-3)  # sums of up to 220 tokens
        if request["value"] is not None:
            assert one.sum == pytest.approx(request["value"], rel=golden_values["rtol"]), request
    greedy = {request["continuation"]: answer.greedy for (request, _, _), answer in zip(asked, together, strict=True)}
    assert [greedy[text] for text in (" cat", ", lazy dog", ", lazy fox")] == [False, False, True]


@network
@needs_shared_data
def test_greedy_continuation_is_the_one_published_by_lm_evaluation_harness():
    request = golden("lm_eval_gpt2_loglikelihoods")["greedy_until"]
    input_ids = torch.tensor([tokenizer().encode_ordinary(request["context"])])
    text = gpt2().generate(input_ids, do_sample=False, max_new_tokens=32, pad_token_id=END_OF_TEXT)
    continuation = tokenizer().decode(text[0, input_ids.shape[1] :].tolist())
    for end in request["until"]:
        continuation = continuation.split(end)[0]
    assert continuation == request["text"]


@network
@needs_shared_data
@pytest.mark.parametrize(("case", "max_length"), [("full_context", 1024), ("max_length_5", 5)])
def test_rolling_log_probabilities_are_those_published_by_lm_evaluation_harness(case, max_length):
    golden_values, model = golden("lm_eval_gpt2_loglikelihoods"), gpt2()
    ids, found, done = golden_values["rolling"]["ids"], [], 0
    for read, count in rolling_windows(ids, max_length):
        done += count
        found += log_probabilities(model, [*read, ids[done - 1]], count)[0].tolist()
    published = golden_values["rolling"][f"token_logprobs_{case}"]
    assert found == pytest.approx(published, rel=golden_values["rtol"], abs=1e-4)


@network
def test_round_trip_of_the_official_folder_returns_every_byte(tmp_path):
    export(official("gpt2"), tmp_path / "ours", "gpt2_scratch")
    export(str(tmp_path / "ours"), tmp_path / "native", "gpt2")
    export(official("gpt2"), tmp_path / "direct", "gpt2")
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    for name in names:
        assert (tmp_path / "native" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name
    if Path(official("gpt2")).is_dir():
        original = Path(official("gpt2")) / "model.safetensors"
        assert (tmp_path / "native" / "model.safetensors").read_bytes() == original.read_bytes()
    shutil.rmtree(tmp_path)
