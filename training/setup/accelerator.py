"""The accelerator of a run: devices, processes, precision and threads."""

import contextlib
import datetime
import gc
import os
import re
import socket
from collections.abc import Iterator

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env

from common.cli_errors import InputError, LostConnectionError, one_line
from common.cpus import keep_freed_memory, usable_cpus, use_all_cores
from training.monitoring.trackers import chosen_trackers
from training.recipe import Recipe
from training.setup.fsdp import enable_fsdp_on_cpu, load_weights_on_every_rank
from training.setup.launcher import check_launcher, requested_precision
from training.step.precision import add_loss_scaler

# Rank 0 may draw samples, compress the validation text or write a checkpoint to a slow disk while the others wait.
PROCESS_TIMEOUT = datetime.timedelta(hours=1)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of this process, with threads and matrix precision set for its device.

    Raises:
        InputError: a tracker is not installed, the hardware lacks the precision, or the processes cannot connect.
    """
    load_weights_on_every_rank()
    _choose_interface()
    try:
        accelerator = Accelerator(
            cpu=not uses_gpu(),  # explicit: several CPU processes would not connect otherwise
            mixed_precision=resolve_mixed_precision(recipe),
            log_with=chosen_trackers(recipe) or None,
            project_dir=recipe.output_dir,
            dynamo_backend="no",  # the launcher's is obeyed by `compiles`
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except RuntimeError as error:
        reason = connection_error(error)
        if reason is None:
            raise
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not connect to {address} "
            f"({reason}); start every node, with the same main_process_ip and a main_process_port that is free on the "
            "first; if the nodes have several networks, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from None
    enable_fsdp_on_cpu(accelerator)
    add_loss_scaler(accelerator)
    if accelerator.device.type == "cpu":
        use_all_cores()
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")
    return accelerator


def _choose_interface() -> None:
    """Let gloo use the network on which this node reaches the first one.

    By default gloo announces the address of the node's own name. In many distributions that is 127.0.0.1, where no
    other node can connect.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not has_several_nodes():
        return
    with contextlib.suppress(OSError):  # an unknown name is reported by the connection itself
        family, kind, protocol, _, address = socket.getaddrinfo(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: sends nothing, but chooses a route
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(each.address.split("%")[0] == own for each in addresses) and not name.startswith("lo"):
                os.environ["GLOO_SOCKET_IFNAME"] = name


def has_several_nodes() -> bool:
    """Whether the launcher started processes on other nodes too."""
    return os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")


def connection_error(error: RuntimeError) -> str | None:
    """What torch reports of a connection between processes that could not be made or was lost, on one line.

    None for other errors. gloo has no exception class of its own.
    """
    text = str(error).strip()
    if not isinstance(error, torch.distributed.DistError) and not re.search(r"gloo|Connection (closed|reset)", text):
        return None
    text = re.sub(r"\[\S*/gloo/\S+\]\s*", "", text.splitlines()[0])
    return one_line(RuntimeError(text.split(". This is typically")[0]), 200).rstrip(".")


@contextlib.contextmanager
def lost_connections_reported() -> Iterator[None]:
    """Raise a `LostConnectionError` if the connection to another process is lost: every node ends with one line."""
    try:
        yield
    except RuntimeError as error:
        reason = connection_error(error)
        if reason is None:
            raise
        raise LostConnectionError(
            f"the connection to another process was lost ({reason}); look for its error in the output of the other "
            "nodes, and start the same command again on every node to resume"
        ) from None


def uses_gpu() -> bool:
    """Whether the run uses GPUs: there are any, and the launcher was not given `use_cpu`."""
    return torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def resolve_mixed_precision(recipe: Recipe) -> str:
    """The recipe's precision, "bf16", "fp16" or "no". "auto" is the launcher's, or else the best of the hardware.

    Raises:
        InputError: bf16 is requested on a GPU that only emulates it, several times slower than fp16.
    """
    requested = requested_precision() if recipe.mixed_precision == "auto" else recipe.mixed_precision
    cuda = uses_gpu() and torch.cuda.is_available()
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if requested == "bf16" and cuda and not has_bf16:
        raise InputError(
            f"{torch.cuda.get_device_name()} has no bf16; set the recipe key mixed_precision: fp16, or launch with "
            "--mixed_precision fp16 if the launcher asked for bf16"
        )
    if requested is not None:
        return requested
    if cuda and not has_bf16:  # tensor cores of V100, T4 and RTX 20; slow on older GPUs
        return "fp16" if torch.cuda.get_device_capability() >= (7, 0) else "no"
    if uses_gpu():
        return "bf16" if has_bf16 else "no"
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch lack it
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def check_launch(recipe: Recipe) -> None:
    """Raise an `InputError` if the launcher's settings or number of processes cannot train the recipe."""
    check_launcher(recipe)
    check_process_count()


def check_process_count() -> None:
    """Raise an `InputError` if this machine has more processes than GPUs, or without GPUs than cores, or if the nodes
    would each train alone.
    """
    first_node = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if parse_flag_from_env("ACCELERATE_USE_CPU") and "WORLD_SIZE" not in os.environ and first_node != "127.0.0.1":
        raise InputError(
            "accelerate launch --cpu starts every node on its own; leave out --cpu: nodes without GPUs train on their "
            "CPUs, together"
        )
    processes, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), usable_cpus()
    gpus = torch.accelerator.device_count() if uses_gpu() else 0
    if processes > (gpus or max(2, cores)):
        found = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"no usable GPU and {cores} CPU cores"
        raise InputError(
            f"{processes} processes need a GPU each, but this machine has {found}; launch with --num_processes "
            f"{gpus or 1}, or another file of accelerate_configs/"
        )


def all_reduce_min(accelerator: Accelerator, number: int) -> int:
    """The minimum of a number over all ranks."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())


def shut_down(accelerator: Accelerator) -> None:
    """End the trackers and destroy the process group. The caller has dropped the prepared model and optimizer.

    Objects that refer to the group are collected first: gloo can deadlock if the group is destroyed together with DDP.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
