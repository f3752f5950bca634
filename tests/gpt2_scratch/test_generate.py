import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.generating import folder, generate, refusal  # noqa: F401 - fixtures
from support.model_folders import change_json
from support.paths import ROOT
from support.tiny_models import tiny

from common.cli_errors import InputError
from gpt2_scratch.generate import continue_text, crop


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
