"""The `harness` protocols against lm-evaluation-harness itself, item by item, on the same rows and weights.

lm-evaluation-harness uses its own tasks on local files, and its own wrapper of the same model.
It comes with the extra `harness`.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
from support.paths import SHARED_DATA

from evaluation.scoring.scorer import score
from evaluation.scoring.tokenizer_adapter import TokenizerAdapter
from evaluation.tasks.hellaswag import without_tags
from evaluation.tasks.registry import task_named
from evaluation.tasks.task_types import argmax

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install -e '.[harness]')")

TOLERANCE = 1e-4  # as documented; fp32 sums in another order differ by about 1e-5

# lm-evaluation-harness and its dependencies emit warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

# Brackets, double and surrounding spaces, other alphabets, endings of one letter, a context longer than the positions.
HAND_MADE_HELLASWAG = [
    {
        "ind": 0,
        "activity_label": "Caf\u00e9 \u2013 \u65e5\u672c",
        "ctx_a": "[header] How to boil an egg [title] Take a pot. [step] Fill  it.",
        "ctx_b": "then \u00c9TIENNE",
        "ctx": "[header] How to boil an egg",
        "endings": [
            " waits.",
            "a",
            "[substeps] adds  salt \U0001f9c2 .",
            "\u00e9t\u00e9 \u2014 na\u00efve \u65e5\u672c\u8a9e",
        ],
        "label": label,
    }
    for label in (0, "3")
] + [
    {
        "ind": 2,
        "activity_label": "Walking",
        "ctx_a": "One two three four. " * 60,
        "ctx_b": "",
        "ctx": "One two three four.",
        "endings": ["walks on.", "runs away from there.", "sits.", "stands still for a long time."],
        "label": 1,
    }
]
HAND_MADE_LAMBADA = [
    {"text": "A word and the last one"},
    {"text": "Line\n\nbreaks and \u201cquotes of\n\nPower"},
    {"text": "two  spaces before  antidisestablishmentarianism"},
    {"text": "caf\u00e9 \u65e5\u672c \u00e9t\u00e9"},
    {"text": "over and over " * 100 + "again"},
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import AutoTokenizer

    from training.data.tokenization.tokenizer import load_tokenizer

    cache = SHARED_DATA / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip(f"needs GPT-2's vocabulary in {cache}")
    folder = tmp_path_factory.mktemp("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        load_tokenizer("gpt2").save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert TokenizerAdapter(tokenizer).bos_ids == ()
    return tokenizer


@pytest.fixture(scope="module")
def model():
    from transformers import GPT2Config, GPT2LMHeadModel

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=48, n_head=4, n_positions=192, initializer_range=0.1)).eval()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder_with_bos():
    """A tokenizer like Llama's, which puts a token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([row["text"] for row in HAND_MADE_LAMBADA], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def harness_samples(folder: Path, task: str, split: str, rows, model, tokenizer):
    """The responses and metrics of lm-evaluation-harness for each item."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = next(Path(lm_eval.__file__).parent.glob(f"tasks/*/{task}.yaml"))
    (folder / "local.yaml").write_text(
        f"include: {own}\ntask: local\ntag: null\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    {split}: {data}\n"
        + "".join(f"{name}_split: null\n" for name in ("training", "validation", "test") if name != split)
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=192),
        tasks=["local"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])


def our_records(folder: Path, task: str, file: str, rows, model, tokenizer):
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = task_named(task)
    items = task.items(folder, TokenizerAdapter(tokenizer), 192)
    return [task.record(item, scores) for item, scores in zip(items, score(model, items), strict=True)]


def rows_of(path: Path, count: int):
    if not path.is_file():
        pytest.skip(f"needs {path}")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


@pytest.mark.parametrize("rows", ["real", "by hand"])
def test_hellaswag_equals_lm_evaluation_harness(rows, tmp_path, model, encoder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if rows == "real":
        rows = rows_of(SHARED_DATA / "hellaswag" / "hellaswag_val.first10.jsonl", 10)
    else:
        rows = [{**row, "label": str(row["label"])} for row in HAND_MADE_HELLASWAG]
    theirs = harness_samples(tmp_path, "hellaswag", "validation", rows, model, encoder)
    found = our_records(tmp_path, "hellaswag:harness", "hellaswag_val.jsonl", rows, model, encoder)
    assert len(theirs) == len(found) == len(rows)
    for sample, record, row in zip(theirs, found, rows, strict=True):
        expected = [float(response[0][0]) for response in sample["resps"]]
        assert record["log_likelihoods"] == pytest.approx(expected, abs=TOLERANCE)
        assert (record["prediction_by_sum"] == record["gold"]) == bool(sample["acc"])
        # The harness's acc_norm is per character; ours, per byte, differs where endings are not ASCII.
        lengths = [len(without_tags(ending)) for ending in row["endings"]]
        by_characters = argmax([total / n for total, n in zip(record["log_likelihoods"], lengths, strict=True)])
        assert (by_characters == record["gold"]) == bool(sample["acc_norm"])


def test_tokenizer_with_beginning_of_sequence_token_equals_lm_evaluation_harness(
    tmp_path, model, encoder_with_bos, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows, encoder = HAND_MADE_LAMBADA, encoder_with_bos
    assert TokenizerAdapter(encoder).bos_ids == (0,)
    theirs = harness_samples(tmp_path, "lambada_openai", "test", rows, model, encoder)
    found = our_records(tmp_path, "lambada:harness", "lambada_test.jsonl", rows, model, encoder)
    expected = [float(sample["resps"][0][0][0]) for sample in theirs]
    assert [record["log_likelihood"] for record in found] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("rows", ["real", "by hand"])
def test_lambada_equals_lm_evaluation_harness(rows, tmp_path, model, encoder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    real = SHARED_DATA / "lambada" / "lambada_test.jsonl"
    rows = rows_of(real, 40) if rows == "real" else HAND_MADE_LAMBADA
    theirs = harness_samples(tmp_path, "lambada_openai", "test", rows, model, encoder)
    found = our_records(tmp_path, "lambada:harness", "lambada_test.jsonl", rows, model, encoder)
    assert len(theirs) == len(found) == len(rows)
    for sample, record in zip(theirs, found, strict=True):
        log_likelihood, greedy = sample["resps"][0][0]
        assert record["log_likelihood"] == pytest.approx(float(log_likelihood), abs=TOLERANCE)
        assert record["prediction"] == (greedy in (True, "True"))
