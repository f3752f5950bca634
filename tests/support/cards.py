"""Cards of a made-up run."""

from typing import Any

from evaluation.results.metric_values import MetricValue
from evaluation.results.results_file import Results, TaskResult
from gpt2_scratch import GPT2ScratchConfig
from training.hub.card import model_card
from training.hub.provenance import Provenance
from training.monitoring.run_history import RunFacts
from training.recipe import Recipe

FACTS = RunFacts(
    name="my-gpt2",
    parameters=124_439_808,
    steps=19_073,
    tokens=9_999_745_024,
    hardware=("8 × NVIDIA A100-SXM4-80GB",),
    seconds=7200.0,
    val_loss=3.0412,
    bits_per_byte=0.9,
    gzip_bits_per_byte=2.8,
    samples=("Hello, ```I'm``` a language model",),
)


CONFIG = GPT2ScratchConfig()


def card(facts: RunFacts = FACTS, provenance: Provenance | None = None, **changes: Any) -> str:
    keys = {"output_dir": "runs/x", "data_dir": "data/x", "corpus": "fineweb-edu", "max_steps": 10, **changes}
    return model_card(Recipe(**keys), facts, CONFIG, provenance or Provenance("fineweb-edu"))


def hellaswag(value: float, *, step: int) -> Results:
    """Results of HellaSwag after a step."""
    result = TaskResult("hellaswag:harness", 10_042, 1.0, {"acc_norm": MetricValue(value, 0.01, None, "acc_norm")}, [])
    about: dict[str, Any] = {"model": "x", "revision": None, "commit": None, "weights": "", "parameters": 1}
    how: dict[str, Any] = {"n_positions": 1024, "dtype": "float32", "device": "cpu", "processes": 1}
    return Results(**about, **how, data_dir=None, limit=None, started="", seconds=1.0, tasks=[result], step=step)
