import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_lines import refused
from support.model_folders import change_json
from support.paths import ROOT
from support.tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from common.cli_errors import InputError
from gpt2_scratch import (
    GPT2ScratchConfig,
    GPT2ScratchForCausalLM,
    GPT2ScratchForQuestionAnswering,
    GPT2ScratchForSequenceClassification,
    GPT2ScratchForTokenClassification,
)
from gpt2_scratch.generate import continue_text, crop, load, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of random weights with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("generate") / "model"
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2ScratchConfig(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    GPT2ScratchForCausalLM(config).save_pretrained(path)
    return path


def generate(capfdbinary, *arguments):
    """Return what a command line prints, as bytes, because random weights do not generate valid UTF-8."""
    main([str(argument) for argument in ("--device", "cpu", *arguments)])
    captured = capfdbinary.readouterr()
    return captured.out, captured.err.decode()


def refusal(capsys, *arguments):
    return refused(main, capsys, *arguments)


@pytest.mark.parity
def test_text_starts_with_the_prompt_and_speed_is_printed_on_standard_error(folder, capfdbinary):
    out, err = generate(capfdbinary, "--model", folder, "--prompt", "Once upon", "--max_new_tokens", 8)
    assert out.startswith(b"Once upon")
    assert "8 tokens in " in err
    assert "tokens/s" in err
    assert len(err.splitlines()) == 1


def test_same_seed_gives_the_same_text_and_another_seed_another(folder, capfdbinary):
    texts = [
        generate(capfdbinary, "--model", folder, "--prompt", "a", "--max_new_tokens", 20, "--seed", seed)[0]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parity
def test_temperature_zero_is_greedy(folder, capfdbinary):
    texts = {
        generate(capfdbinary, "--model", folder, "--prompt", "a", "--temperature", 0, "--seed", seed)[0]
        for seed in (1, 2)
    }
    assert len(texts) == 1


def test_samples_differ_and_the_second_equals_that_of_the_next_seed(folder, capfdbinary):
    options = ("--model", folder, "--prompt", "a", "--max_new_tokens", 20)
    both, _ = generate(capfdbinary, *options, "--num_samples", 2, "--seed", 5)
    second, _ = generate(capfdbinary, *options, "--seed", 6)
    head, first_text, second_text = both.partition(b"--- sample 2 of 2\n")[0], *both.split(b"--- sample 2 of 2\n")
    assert head.startswith(b"--- sample 1 of 2\n")
    assert second_text == second != first_text


def test_prompt_is_read_from_standard_input_by_default(folder, capfdbinary, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe\n"))
    out, _ = generate(capfdbinary, "--model", folder, "--max_new_tokens", 2)
    assert out.startswith(b"From a pipe")


def test_empty_prompt_starts_from_end_of_text(folder, capfdbinary):
    out, err = generate(capfdbinary, "--model", folder, "--prompt", "", "--max_new_tokens", 5)
    assert b"endoftext" not in out
    assert "5 tokens" in err


def test_generation_stops_at_the_last_position(folder, capfdbinary):
    _, err = generate(capfdbinary, "--model", folder, "--prompt", "a" * 60, "--max_new_tokens", 500)
    assert "4 tokens" in err
    assert "stopped at n_positions=64" in err


@pytest.mark.parametrize(("max_new_tokens", "kept", "generated"), [(10, 54, 10), (500, 32, 32)])
def test_prompt_longer_than_the_model_is_cropped_from_the_left(folder, capfdbinary, max_new_tokens, kept, generated):
    prompt = "".join(chr(97 + number % 26) for number in range(70))
    options = ("--model", folder, "--max_new_tokens", max_new_tokens, "--prompt")
    out, err = generate(capfdbinary, *options, prompt)
    assert f"the prompt has 70 tokens, but the model has 64 positions; the first {70 - kept} tokens were dropped" in err
    assert f"{generated} tokens in" in err
    assert out == generate(capfdbinary, *options, prompt[-kept:])[0]


class Collected:
    """Collects new tokens, and the lengths of the passes that a model made."""

    def __init__(self, model):
        self.tokens, self.passes = [], []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )

    def put(self, value):
        self.tokens += value.tolist() if value.dim() == 1 else []

    def end(self):
        pass


def naive(model, ids, max_new_tokens, do_sample):
    """Generate without a cache: when the window is full, its second half starts the next one."""
    window, new = ids[0].tolist(), []
    with torch.no_grad():
        while len(new) < max_new_tokens and (not new or new[-1] != model.generation_config.eos_token_id):
            if len(window) == model.config.n_positions:
                window = window[-(model.config.n_positions // 2) :]
            logits = model(torch.tensor([window]), use_cache=False).logits[0, -1]
            token = int(torch.multinomial(logits.softmax(-1), 1) if do_sample else logits.argmax())
            window.append(token)
            new.append(token)
    return new


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("n_positions", [2, 15, 16])
def test_sliding_window_equals_a_naive_loop(n_positions, do_sample):
    model, ids = tiny(n_positions=n_positions, eos_token_id=None), torch.tensor([[5]])
    torch.manual_seed(1)
    expected = naive(model, ids, 50, do_sample)
    streamer = Collected(model)
    torch.manual_seed(1)
    options = {"do_sample": do_sample, "top_k": 0, "pad_token_id": 0, "streamer": streamer}
    continue_text(model, ids, 50, n_positions, sliding_window=True, **options)
    assert streamer.tokens == expected
    assert sum(streamer.passes) <= 2 * 50 + n_positions  # the cache is used
    model.generation_config.eos_token_id = expected[30]
    until_end = expected[: expected.index(expected[30]) + 1]
    streamer.tokens.clear()
    torch.manual_seed(1)
    continue_text(model, ids, 50, n_positions, sliding_window=True, **options)
    assert streamer.tokens == until_end


def test_sliding_window_prints_the_prompt_once_and_all_new_tokens(folder, tmp_path, capfdbinary):
    model = shutil.copytree(folder, tmp_path / "model")
    change_json(model / "generation_config.json", eos_token_id=None)
    options = ("--model", model, "--prompt", "Once upon", "--max_new_tokens", 150)
    short, stopped = generate(capfdbinary, *options)
    assert "55 tokens in" in stopped
    assert "stopped at n_positions=64, --sliding_window continues" in stopped
    out, err = generate(capfdbinary, *options, "--sliding_window")
    assert "150 tokens in" in err
    assert "stopped" not in err
    assert out.count(b"Once upon") == 1
    assert out.endswith(b"\n")
    assert b"\xef\xbf\xbd" in short  # characters that end inside a window would show
    assert out.startswith(short.decode().rstrip("\n\ufffd").encode())


def test_model_with_a_single_position_is_refused():
    with pytest.raises(InputError, match="single position"):
        crop(torch.tensor([[1]]), 1, 5)
    assert crop(torch.tensor([[1, 2, 3]]), 2, 5).tolist() == [[3]]


def test_missing_folder_is_refused(tmp_path, capsys):
    message = refusal(capsys, "--model", tmp_path / "nothing", "--prompt", "a")
    assert "there is no folder" in message
    assert len(message.splitlines()) == 1


def test_checkpoint_file_is_refused_with_the_command_that_converts_it(tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    message = refusal(capsys, "--model", tmp_path / "ckpt.pt", "--prompt", "a")
    assert "ckpt.pt' is a file; convert it with python -m gpt2_scratch.export --model" in message


def test_folder_without_a_model_is_refused(tmp_path, capsys):
    message = refusal(capsys, "--model", tmp_path, "--prompt", "a")
    assert "cannot load a causal language model from" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("model_type", ["gpt2_scratch", "gpt2"])  # transformers makes an empty tokenizer for gpt2
def test_folder_without_a_tokenizer_is_refused(folder, tmp_path, capsys, model_type):
    GPT2ScratchForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", model_type=model_type)
    capsys.readouterr()
    message = refusal(capsys, "--model", tmp_path, "--prompt", "a")
    assert "cannot load a tokenizer from" in message
    assert "tokenizer.json is missing" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max_new_tokens", 0),
        ("--num_samples", 0),
        ("--temperature", -1),
        ("--temperature", "nan"),
        ("--temperature", "1e-300"),
        ("--top_k", -1),
        ("--top_p", 0),
        ("--top_p", 1.5),
        ("--seed", -1),
        ("--device", "toaster"),
        ("--device", "meta"),
    ],
)
def test_bad_value_is_refused_before_anything_is_loaded(flag, value, capsys):
    assert f"error: expected {flag} to be" in refusal(capsys, "--model", "no/model", "--prompt", "a", flag, value)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def lose_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.ln_f.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shrink_the_vocabulary(folder):
    model = GPT2ScratchForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(50, mean_resizing=False)
    model.config.bos_token_id = model.config.eos_token_id = 1
    model.save_pretrained(folder)


def corrupt_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def misfit(folder):
    change_config(folder, n_positions=48)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt2_scratch"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "cannot load a causal language model from"),
        (lambda folder: change_config(folder, n_layer="two"), "'n_layer': .*expected int, got str"),
        (lambda folder: change_config(folder, dtype="floaty"), "floaty"),
        (lambda folder: change_config(folder, attn_implementation="flash_attention_2"), "(?i)flash"),
        (misfit, r"do not fit its config.json: transformer.wpe.weight \(1 in total\)"),
        (lose_a_weight, r"transformer.ln_f.bias \(1 in total\)"),
        (corrupt_a_weight, "weights hold NaN or infinity; use an earlier checkpoint"),
        (shrink_the_vocabulary, "but the model's vocabulary has 50 tokens"),
    ],
)
def test_unusable_folder_gives_a_one_line_error(folder, tmp_path, capsys, model_type, damage, message):
    if "flash" in message and torch.cuda.is_available():
        pytest.skip("with a GPU this depends on the installed packages")
    shutil.copytree(folder, tmp_path / "model")
    damage(tmp_path / "model")
    change_config(tmp_path / "model", model_type=model_type, auto_map={})
    capsys.readouterr()
    found = refusal(capsys, "--model", tmp_path / "model", "--prompt", "a", "--device", "cpu")
    assert len(found.splitlines()) == 1, found
    assert re.search(message, found), found


def test_model_that_is_not_causal_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=257, initializer_range=0.5, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    capsys.readouterr()
    found = refusal(capsys, "--model", tmp_path / "bert", "--prompt", "a", "--device", "cpu")
    assert "not a causal language model: its predictions depend on later tokens" in found.splitlines()[-1]


@pytest.mark.parametrize(
    "model_class",
    [GPT2ScratchForSequenceClassification, GPT2ScratchForTokenClassification, GPT2ScratchForQuestionAnswering],
)
def test_model_with_another_head_is_refused(folder, tmp_path, capsys, model_class):
    shutil.copytree(folder, tmp_path / "model")
    model_class(GPT2ScratchConfig.from_pretrained(folder)).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    found = refusal(capsys, "--model", tmp_path / "model", "--prompt", "a", "--device", "cpu")
    assert f"is a {model_class.__name__}, not a language model; use the model it was tuned from" in found


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(InputError, match="is a folder, which has no revisions; omit --revision"):
        load(str(folder), "cpu", revision="main")


@pytest.mark.parity
def test_beams_of_the_generation_config_are_ignored(folder, tmp_path, capfdbinary):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_beams": 4, "num_return_sequences": 2}))
    out, _ = generate(capfdbinary, "--model", tmp_path / "model", "--prompt", "Once", "--max_new_tokens", 3)
    assert out.startswith(b"Once")


def test_prompt_that_is_not_utf8_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait"), encoding="utf-8"))
    for prompt in ([], ["--prompt", "caf\udce9"]):
        message = refusal(capsys, "--model", "no/model", *prompt)
        assert "the prompt is not valid UTF-8" in message
        assert len(message.splitlines()) == 1


def test_closed_standard_input_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed; pass --prompt" in refusal(capsys, "--model", "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full exists on Linux only")
@pytest.mark.slow
def test_full_standard_output_gives_a_one_line_error(folder):
    command = [
        sys.executable,
        "-m",
        "gpt2_scratch.generate",
        "--model",
        str(folder),
        "--prompt",
        "x",
        "--device",
        "cpu",
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to standard output: No space left on device")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_closed_pipe_ends_the_command_silently(folder):
    command = [sys.executable, "-m", "gpt2_scratch.generate", "--model", folder, "--prompt", "Once upon a time"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 1
