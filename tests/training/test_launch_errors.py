"""Errors between `accelerate launch` and the first step, each reported in one line."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from common.cli_errors import InputError, TemporaryError
from common.hub_retry import hub_cache_error
from training.data.producing.background_producer import BackgroundProducer
from training.loop import train
from training.recipe import Recipe
from training.setup import accelerator as accelerator_module
from training.setup.accelerator import build_accelerator, check_process_count, lost_connections_reported
from training.setup.model import Vocabulary, build_model
from training.setup.preflight import preflight

MISTAKE = "from common.cli_errors import *\ndef main(): raise InputError('no')\nrun_command(main)"
Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the environment of one of several processes, as a launcher does."""

    def be(rank: int, of: int, port: int = 1) -> None:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of, "MASTER_PORT": port}
        for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}.items():
            monkeypatch.setenv(name, str(value))

    return be


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (1, "64 processes need a GPU each, but this machine has 1 GPU; launch with --num_processes 1, or"),
        (4, "has 4 GPUs; launch with --num_processes 4, or another file of accelerate_configs/"),
        (0, r"has no usable GPU and \d+ CPU cores; launch with --num_processes 1, or another"),
    ],
)
def test_more_processes_than_gpus_are_an_error_before_anything_starts(
    gpus: int,
    message: str,
    process: Callable[..., None],
    tiny_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process(0, of=64)
    monkeypatch.setattr(accelerator_module, "usable_cpus", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    for start in (train, preflight):
        with pytest.raises(InputError, match=message):
            start(tiny_recipe(data_dir=str(tmp_path / "absent")))
    assert list(tmp_path.iterdir()) == []
    process(0, of=max(1, gpus))
    check_process_count()


def test_processes_with_use_cpu_need_no_gpu(
    process: Callable[..., None], tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    process(0, of=2)
    with pytest.raises(InputError, match="has 1 GPU;"):
        check_process_count()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_process_count()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert build_accelerator(tiny_recipe()).device.type == "cpu"


def test_nodes_that_the_launcher_starts_on_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # several processes of one node were requested
    check_process_count()
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    with pytest.raises(InputError, match="--cpu starts every node on its own; leave out --cpu"):
        check_process_count()


@pytest.mark.parametrize(("networks", "chosen"), [(["lo"], None), (["lo", "eth1"], "eth1")])
def test_gloo_uses_the_network_that_reaches_the_first_node(
    networks: list[str], chosen: str | None, process: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    process(1, of=2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    own = [SimpleNamespace(address="127.0.0.1")]
    monkeypatch.setattr(
        accelerator_module.psutil,
        "net_if_addrs",
        lambda: {"eth0": [SimpleNamespace(address="192.168.0.9")], **dict.fromkeys(networks, own)},
    )
    accelerator_module._choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
    os.environ.pop("GLOO_SOCKET_IFNAME", None)


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:29", "closed by"),
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Read error [10.0.0.2]:29: Connection reset by "
            "peer. This is typically caused by a remote worker hanging or bugs in the application.",
            "Read error [10.0.0.2]:29: Connection reset by peer)",
        ),
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 9ms for recv",
            "(Timed out waiting 9ms for recv)",
        ),
    ],
)
def test_lost_connection_is_reported_in_one_line(text: str, reported: str) -> None:
    with (
        pytest.raises(InputError, match="connection to another process was lost") as caught,
        lost_connections_reported(),
    ):
        raise RuntimeError(text)
    assert reported in str(caught.value)
    assert "gloo/" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="size mismatch"), lost_connections_reported():
        raise RuntimeError("size mismatch")


def test_error_of_all_processes_is_reported_by_rank_0_even_if_it_is_late(tmp_path: Path) -> None:
    command, pipe = [sys.executable, "-c", MISTAKE], subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    with subprocess.Popen(command, stderr=pipe, env={**environment, "LOCAL_RANK": "1"}) as second:
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(4)
        first = subprocess.run(command, stderr=pipe, env={**environment, "LOCAL_RANK": "0"}, timeout=60)
        assert (first.returncode, first.stderr) == (2, b"error: no\n")
        # The launcher's own report ends with the same line.
        assert ProcessFailure(0, 1, 2, environment["TORCHELASTIC_ERROR_FILE"]).message == "error: no"
        second.terminate()  # as the launcher does when the first has ended
        assert second.communicate() == (None, b"")


def test_ctrl_c_while_an_error_waits_for_rank_0_is_not_a_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "1"}
    # Programs started in the background ignore Ctrl-C by default.
    handle_ctrl_c = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    mistake = MISTAKE.replace("raise", "print(flush=True); raise")
    command, pipe = [sys.executable, "-c", f"{handle_ctrl_c}\n{mistake}"], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment) as second:
        assert second.stdout is not None
        second.stdout.readline()
        time.sleep(0.2)
        second.send_signal(signal.SIGINT)
        assert second.communicate(timeout=30)[1] == b""
        assert second.returncode == 130


def test_child_processes_do_not_report_to_the_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    producer = BackgroundProducer()
    producer.report = lambda line: None
    assert producer._run([sys.executable, "-c", MISTAKE]) == (2, "no")
    assert not (tmp_path / "error.json").exists()


def test_port_in_use_is_a_one_line_error(
    process: Callable[..., None], tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator_module, "PROCESS_TIMEOUT", timedelta(seconds=1))
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        process(0, of=2, port=taken.getsockname()[1])
        with pytest.raises(InputError, match=r"rank 0 of 2 could not .*in use\); start every .* free") as caught:
            build_accelerator(tiny_recipe())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_node_is_a_one_line_error(
    rank: int, process: Callable[..., None], tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator_module, "PROCESS_TIMEOUT", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process(rank, of=2, port=port)
    with pytest.raises(InputError, match=rf"rank {rank} of 2 .* to 127.0.0.1:{port} \(.*imed out") as caught:
        build_accelerator(tiny_recipe())
    assert "\n" not in str(caught.value)


def test_unwritable_hub_cache_is_a_one_line_error(programs: Path, tiny_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    tiny_recipe(corpus="roneneldan/TinyStories", data_dir=str(tmp_path / "data"), preprocessing_num_workers=0).save(
        tmp_path / "r.yaml"
    )
    impatient = f"""
import runpy
from training.data.producing import background_producer
background_producer._FIRST_DELAY_SECONDS, background_producer._ATTEMPTS_BEFORE_TRAINING = 0.01, 2
runpy.run_path({str(ROOT / "training" / "train.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [programs / "python", "-c", impatient, "--config", tmp_path / "r.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path / "file"), "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: cannot write to the Hugging Face cache (")
    assert "set HF_HOME to a writable folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_error_of_the_hub_cache_is_distinguished_from_one_of_the_run_folder(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    full = OSError(28, "No space left on device", str(tmp_path / "cache" / "hub" / "x"))
    assert "No space left on device); free space, or set HF_HOME" in str(hub_cache_error(full))
    assert isinstance(hub_cache_error(full), TemporaryError)
    refused = hub_cache_error(PermissionError(13, "Permission denied", str(tmp_path / "cache" / "hub" / "x")))
    assert not isinstance(refused, TemporaryError)  # a restart of the producer cannot resolve it
    assert hub_cache_error(OSError(28, "No space left on device", str(tmp_path / "data" / "x"))) is None
    assert hub_cache_error(ValueError()) is None
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "data"))
    found = hub_cache_error(OSError(28, "No space left on device", str(tmp_path / "data" / "x")))
    assert "set HF_HUB_CACHE to a writable folder" in str(found)
    for variable in ("HF_HOME", "HF_HUB_CACHE", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without a home, as in containers
    assert hub_cache_error(full) is None
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    from gpt2_scratch import GPT2ScratchForCausalLM

    def raising(*arguments: object, **settings: object) -> None:
        raise full

    monkeypatch.setattr(GPT2ScratchForCausalLM, "from_pretrained", raising)

    with pytest.raises(InputError, match="cannot write to the Hugging Face cache"):
        build_model(tiny_recipe(init_from="openai-community/gpt2"), Vocabulary(300, 299), device_type="cpu")
