"""Every protocol, worked out by hand on a model whose probabilities are known."""

import json

import numpy as np
import pytest
from support.task_rows import CBT_OPTIONS, LAMBADA, cbt_folder, cbt_text, hellaswag_row, write_rows
from support.toy_model import NEXT, OTHER, Characters, alphabet, log_probability

from common.cli_errors import InputError
from evaluation.scoring.scorer import score
from evaluation.tasks.detokenizers import detokenize_wikitext
from evaluation.tasks.registry import default_protocols, task_named, tasks
from evaluation.tasks.task_types import Generation

EXACT = {"rel": 1e-6}  # fp32


def records(name, folder, n_positions=1024, limit=None):
    task = task_named(name)
    model = alphabet(n_positions)
    items = task.items(folder, Characters(), n_positions, limit)
    return [task.record(item, scores) for item, scores in zip(items, score(model, items), strict=True)]


def test_hellaswag_completion_takes_the_lowest_mean_loss(tmp_path):
    [record] = records("hellaswag:completion", write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_row()))
    # A space after "z", then the ending: one unlikely character and four likely ones.
    assert record["log_likelihoods"][1] == pytest.approx(OTHER + 4 * NEXT, **EXACT)
    expected = [log_probability("z", f" {ending}") for ending in hellaswag_row()["endings"]]
    assert record["log_likelihoods"] == pytest.approx(expected, **EXACT)
    assert record["tokens"] == [3, 5, 15, 2]
    assert (record["prediction"], record["prediction_by_sum"], record["gold"]) == (1, 1, 1)


def test_mean_and_sum_may_choose_differently(tmp_path):
    endings = ["abcdefghijk", "q", "#", "zz"]  # two unlikely and ten likely characters, or two unlikely ones
    [record] = records(
        "hellaswag:completion", write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_row(endings=endings))
    )
    assert (record["prediction"], record["prediction_by_sum"]) == (0, 1)


def test_hellaswag_harness_removes_tags_and_normalizes_by_bytes(tmp_path):
    folder = write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_row())
    item = task_named("hellaswag:harness").items(folder, Characters(), 1024)[0]
    assert Characters().decode(item.requests[2].context) == "Abc: x Yz"
    assert Characters().decode(item.requests[2].continuation) == "  abcdefgh"  # the tag is removed, its space is not
    [record] = records("hellaswag:harness", folder)
    expected = [log_probability("z", f" {ending}") for ending in ("zz", '!"#$', " abcdefgh", "q")]
    assert record["log_likelihoods"] == pytest.approx(expected, **EXACT)
    assert record["bytes"] == [2, 4, 9, 1]
    # per byte: (1 unlikely + 4 likely) / 4 = -1.90, (3 unlikely + 7 likely) / 9 = -2.38
    assert (record["prediction"], record["prediction_by_sum"]) == (1, 1)


def test_lambada_harness_needs_every_token_of_the_word(tmp_path):
    folder = write_rows(tmp_path / "lambada_test.jsonl", LAMBADA, {"text": "some ~ !\"#$%&'()*+,-./0"})
    first, second = records("lambada:harness", folder)
    assert first["log_likelihood"] == pytest.approx(2 * OTHER + 2 * NEXT, **EXACT)  # "`" to " ", " " to "a", "b", "c"
    assert (first["prediction"], first["gold"], first["words"], first["target"]) == (False, True, 1, "abc")
    assert second["log_likelihood"] == pytest.approx(17 * NEXT, **EXACT)  # "~" to " " to "!" and on
    assert second["prediction"] is True


def test_lambada_last_token_has_the_beginning_of_the_word_as_context(tmp_path):
    [record] = records("lambada:last_token", write_rows(tmp_path / "lambada_test.jsonl", LAMBADA))
    assert record["log_likelihood"] == pytest.approx(NEXT, **EXACT)
    assert record["prediction"] is True


@pytest.mark.parametrize(
    ("text", "target", "generated"),
    [
        ("say ~` wxyz", "wxyz", "abcdefgh"),
        ('say "W', "W", ""),  # the model generates punctuation, no word
        ("say stu/vw 01234567.", "01234567", "xyz"),
    ],
)
def test_lambada_word_compares_the_first_generated_word(text, target, generated, tmp_path):
    folder = write_rows(tmp_path / "lambada_test.jsonl", {"text": text})
    [record] = records("lambada:word", folder)
    assert (record["gold"], record["prediction"]) == (target, generated)


def test_lambada_word_is_right_if_the_generated_word_ends_where_the_target_does(tmp_path):
    # After "s" the model generates t, u, … z and then "{".
    [record] = records("lambada:word", write_rows(tmp_path / "lambada_test.jsonl", {"text": "pqr s tuvwxyz"}))
    assert record["generated"] == "tuvwxyz{|"
    assert record["prediction"] == record["gold"] == "tuvwxyz"


def test_lambada_word_generates_enough_tokens_for_a_long_target(tmp_path):
    text = {"text": "say /0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ ` abcdefghijklmnopqrstuvwxyz"}
    folder = write_rows(tmp_path / "lambada_test.jsonl", text, {"text": "say ` abc"})
    items = task_named("lambada:word").items(folder, Characters(), 1024)
    assert [item.requests[0].max_new_tokens for item in items] == [28, 8]
    assert [record["prediction"] for record in records("lambada:word", folder)] == [
        "abcdefghijklmnopqrstuvwxyz",
        "abcdefgh",
    ]


def test_lambada_stop_word_filter_excludes_stop_words_from_the_greedy_choice(tmp_path):
    from evaluation.tasks.lambada import stop_tokens

    class Words(Characters):
        """Like `Characters`, but " the" and " The" are single tokens."""

        def encode(self, text):
            return list(text.replace(" The", "\x05").replace(" the", "\x04").encode("ascii"))

    assert stop_tokens(Words()) == frozenset([4, 5])
    task = task_named("lambada:stop_word_filter")
    # After 3, token 4 (" the") is the most likely; without 4 and 5 the others are equal, and 0 is the first.
    folder = write_rows(tmp_path / "lambada_test.jsonl", {"text": "say \x03 the"}, {"text": "say \x03 a"})
    items = task.items(folder, Words(), 1024)
    assert [request.excluded for item in items for request in item.requests] == [frozenset([4, 5])] * 2
    found = [task.record(item, scores) for item, scores in zip(items, score(alphabet(), items), strict=True)]
    assert [record["prediction"] for record in found] == [False, False]
    assert found[0]["log_likelihood"] == pytest.approx(NEXT, **EXACT)
    plain = task_named("lambada:harness").items(folder, Words(), 1024)
    assert score(alphabet(), plain)[0][0].greedy


@pytest.mark.parametrize("kind", ["cn", "ne"])
def test_cbt_paper_scores_the_candidate_and_the_rest_of_the_sentence(kind, tmp_path):
    folder = cbt_folder(tmp_path, cbt_text())
    [raw] = records(f"cbt_{kind}:paper_raw", folder)
    [clean] = records(f"cbt_{kind}:paper", folder)
    assert raw["log_likelihoods"] == pytest.approx([log_probability("a", f" {o} c .") for o in CBT_OPTIONS], **EXACT)
    assert clean["log_likelihoods"] == pytest.approx([log_probability("a", f" {o} c.") for o in CBT_OPTIONS], **EXACT)
    assert raw["gold"] == 0
    # Single characters have equal scores, and "abcdefgh" a lower one; the first of the equal ones is chosen.
    assert raw["prediction"] == 0


def test_cbt_full_sequence_takes_the_lowest_mean_loss_of_the_complete_text(tmp_path):
    [record] = records("cbt_cn:full_sequence_raw", cbt_folder(tmp_path, cbt_text()))
    texts = [" ".join([*(f"s{p} ." for p in range(1, 21)), f"a {o} c ."]) for o in CBT_OPTIONS]
    assert record["log_likelihoods"] == pytest.approx([log_probability(t[0], t[1:]) for t in texts], **EXACT)
    assert record["tokens"] == [len(text) - 1 for text in texts]
    assert record["prediction"] == 2  # seven likely characters in a longer text lower the mean loss


def test_cbt_full_sentence_takes_the_lowest_mean_loss_of_the_question_alone(tmp_path):
    [record] = records("cbt_cn:full_sentence_raw", cbt_folder(tmp_path, cbt_text()))
    texts = [f"a {o} c ." for o in CBT_OPTIONS]
    assert record["log_likelihoods"] == pytest.approx([log_probability(t[0], t[1:]) for t in texts], **EXACT)
    assert record["tokens"] == [len(text) - 1 for text in texts]
    mean_losses = [log_probability(t[0], t[1:]) / (len(t) - 1) for t in texts]
    assert record["prediction"] == mean_losses.index(max(mean_losses)) == 2


def test_cbt_sentence_reads_the_question_only(tmp_path):
    folder = cbt_folder(tmp_path, cbt_text())
    item = task_named("cbt_cn:sentence").items(folder, Characters(), 1024)[0]
    assert Characters().decode(item.requests[0].context) == "a"
    assert Characters().decode(item.requests[0].continuation) == " b c."


@pytest.mark.parametrize("protocol", ["paper", "sentence", "paper_raw"])
def test_cbt_candidates_that_merge_with_the_quotation_mark_before_them_are_scored_completely(protocol, tmp_path):
    class Merging(Characters):
        """Like `Characters`, but "'s" is a single token, as in GPT-2's vocabulary."""

        def encode(self, text):
            return list(text.replace("'s", "\x05").encode("ascii"))

        def decode(self, ids):
            return super().decode(ids).replace("\x05", "'s")

    options = ["said", "told", *"12345678"]
    folder = cbt_folder(tmp_path, cbt_text("then 'XXXXX it", answer="said", options=options))
    [item] = task_named(f"cbt_cn:{protocol}").items(folder, Merging(), 1024)
    assert len({request.context for request in item.requests}) == 1
    scored = [Merging().decode(request.continuation).lstrip() for request in item.requests]
    assert scored == [f"'{o} it" for o in options]


def test_cbt_candidates_keep_the_same_context_when_it_is_truncated(tmp_path):
    folder = cbt_folder(tmp_path, cbt_text())
    for name in ("cbt_cn:paper", "cbt_cn:full_sequence"):
        items = task_named(name).items(folder, Characters(), 40)
        assert max(len(r.context) + len(r.continuation) for r in items[0].requests) == 41
        beginnings = {(r.context + r.continuation)[:25] for r in items[0].requests}
        assert len(beginnings) == 1


def test_wikitext_scores_every_token_once_and_counts_words_at_line_ends(tmp_path):
    text = " \n = Title = \n \n" + "".join(f" some words {n} in a line . \n" for n in range(10))
    (tmp_path / "wiki.test.tokens").write_text(text)
    for n_positions in (64, 1024):
        found = records("wikitext2:raw", tmp_path, n_positions)
        assert sum(record["tokens"] for record in found) == len(text)
        assert sum(record["words"] for record in found) == len(text.split()) + text.count("\n")
        total = sum(record["log_likelihood"] for record in found)
        assert total == pytest.approx(log_probability("\0", text), **EXACT)
    [clean] = records("wikitext2", tmp_path)
    assert clean["words"] == len(text.split()) + text.count("\n")
    assert clean["tokens"] == len(detokenize_wikitext(text)) < len(text)


def test_sliding_windows_overlap_by_half_and_fit_the_positions(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" = Title = \n" + " a b c d e f g \n" * 9)
    items = task_named("wikitext2:raw").items(tmp_path, Characters(), 32)
    sizes = [(len(item.requests[0].context), len(item.requests[0].continuation)) for item in items]
    assert sizes == [(1, 32), *[(16, 16)] * 7, (16, 12)]  # 156 characters
    assert len(task_named("wikitext2:raw").items(tmp_path, Characters(), 32, limit=3)) == 3


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_validation_is_the_mean_loss_over_windows_that_do_not_overlap(kind, tmp_path):
    ids = np.array([0, *b"abcdxyz", 0, *b"hello"], dtype=np.uint16)
    if kind == "npy":
        np.save(tmp_path / "c_val_000000.npy", ids)
    else:
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(ids)
        (tmp_path / "c_val_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
    found = records("validation", tmp_path, n_positions=4)
    assert [record["tokens"] for record in found] == [4, 4, 4, 1]
    assert [record["bytes"] for record in found] == [4, 3, 4, 1]  # the end-of-text token has none
    assert found[0]["log_likelihood"] == pytest.approx(OTHER + 3 * NEXT, **EXACT)  # 0 to "a", then "b", "c", "d"
    text = bytes(ids.tolist()).decode()
    assert sum(record["log_likelihood"] for record in found) == pytest.approx(log_probability("\0", text[1:]), **EXACT)


def test_validation_task_gives_the_validation_loss_of_training(shard_folder, tmp_path):
    import torch
    from transformers import AutoTokenizer

    from evaluation.scoring.tokenizer_adapter import TokenizerAdapter
    from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
    from training.data.shards.shard_reader import ShardFolder
    from training.data.tokenization.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(shard_folder)
    tokenizer.save(tmp_path)
    torch.manual_seed(0)
    model = GPT2ScratchForCausalLM(
        GPT2ScratchConfig(vocab_size=tokenizer.vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2,
                          bos_token_id=tokenizer.end_of_text_id, eos_token_id=tokenizer.end_of_text_id)
    ).eval()  # fmt: skip
    task = task_named("validation")
    items = task.items(shard_folder, TokenizerAdapter(AutoTokenizer.from_pretrained(tmp_path)), 32, limit=5)
    found = [task.record(item, scores) for item, scores in zip(items, score(model, items), strict=True)]
    ids = torch.from_numpy(ShardFolder.open(shard_folder).val_shard.read()[: 5 * 32 + 1].astype(np.int64))
    with torch.no_grad():
        logits = model(ids[:-1].view(5, 32)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:])
    loss = -sum(record["log_likelihood"] for record in found) / sum(record["tokens"] for record in found)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    text = tokenizer.decode_bytes([i for i in ids[1:].tolist() if i != tokenizer.end_of_text_id])
    assert sum(record["bytes"] for record in found) == len(text)


def test_validation_shards_of_another_tokenizer_are_refused(shard_folder, tmp_path):
    from training.data.tokenization.tokenizer import train_bpe

    text = ["another text " * 50, "with other words " * 50, "so that its merges differ from those of the corpus " * 50]
    other = train_bpe(text, 290)
    for tokenizer in (other, train_bpe(text, 270)):  # the second one lacks ids
        with pytest.raises(InputError, match="was made with another tokenizer than the model's; pass a --data_dir"):
            task_named("validation").items(shard_folder, tokenizer, 32, limit=5)


def test_every_record_has_the_keys_of_its_metrics(tmp_path):
    write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_row())
    write_rows(tmp_path / "lambada_test.jsonl", LAMBADA)
    cbt_folder(tmp_path, cbt_text())
    (tmp_path / "wiki.test.raw").write_text(" = Title = \n a . \n")
    np.save(tmp_path / "c_val_000000.npy", np.arange(40, dtype=np.uint16))
    for name, task in tasks().items():
        [record] = records(name, tmp_path, limit=1)
        for metric in task.metrics:
            assert {metric.prediction, metric.reference} <= record.keys(), name
        json.dumps(record)
        assert task.description.endswith(".")
        assert task.source


def test_added_tokens_of_a_byte_level_tokenizer_decode_to_their_own_bytes(tokenizer_folder):
    from transformers import AutoTokenizer

    from evaluation.scoring.tokenizer_adapter import TokenizerAdapter

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["    ", "é"])  # GPT-NeoX's has runs of spaces
    encoder, text = TokenizerAdapter(tokenizer), "def f():\n    return é + ê"
    ids = encoder.encode(text)
    assert set(ids) >= set(tokenizer.convert_tokens_to_ids(["    ", "é"]))
    assert encoder.decode_bytes(ids) == text.encode()


def test_beginning_of_sequence_tokens_precede_every_context(tmp_path):
    class WithBos(Characters):
        bos_ids = (7,)

    write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_row())
    write_rows(tmp_path / "lambada_test.jsonl", LAMBADA)
    cbt_folder(tmp_path, cbt_text())
    for name, task in tasks().items():
        if task.name not in ("wikitext2", "validation"):  # one text, and token ids from shards
            plain, with_bos = (task.items(tmp_path, e, 1024)[0].requests for e in (Characters(), WithBos()))
            assert [r.context for r in with_bos] == [(7, *r.context) for r in plain], name
            if name != "lambada:word":
                assert [r.continuation for r in with_bos] == [r.continuation for r in plain], name


def test_data_hash_of_an_item_is_the_same_for_every_tokenizer(tmp_path):
    class Capitals(Characters):
        def encode(self, text):
            return super().encode(text.upper())

    write_rows(tmp_path / "hellaswag_val.jsonl", hellaswag_row())
    write_rows(tmp_path / "lambada_test.jsonl", LAMBADA)
    cbt_folder(tmp_path, cbt_text())
    (tmp_path / "wiki.test.raw").write_text(" = Title = \n a . \n")
    np.save(tmp_path / "c_val_000000.npy", np.arange(40, dtype=np.uint16))
    known = {
        name: [t.items(tmp_path, e(), 1024)[0].data for e in (Characters, Capitals)] for name, t in tasks().items()
    }
    assert all(one == other and one for one, other in known.values()), known
    write_rows(tmp_path / "lambada_test.jsonl", {"text": "another word"})
    np.save(tmp_path / "c_val_000000.npy", np.arange(1, 41, dtype=np.uint16))
    (tmp_path / "wiki.test.raw").write_text(" = Title = \n b . \n")
    for name in ("lambada:harness", "validation:windows", "wikitext2:paper"):
        assert tasks()[name].items(tmp_path, Characters(), 1024)[0].data != known[name][0]


def test_limit_takes_the_first_items(tmp_path):
    folder = write_rows(tmp_path / "lambada_test.jsonl", *[{"text": f"word number {n}"} for n in range(5)])
    items = task_named("lambada").items(folder, Characters(), 1024, limit=2)
    assert [(item.index, item.gold) for item in items] == [(0, "0"), (1, "1")]
    assert isinstance(task_named("lambada:word").items(folder, Characters(), 1024)[0].requests[0], Generation)


def test_task_is_found_by_name_and_protocol():
    assert set(default_protocols()) == {"hellaswag", "lambada", "cbt_cn", "cbt_ne", "wikitext2", "validation"}
    assert task_named("lambada").full_name == "lambada:harness"
    with pytest.raises(InputError, match=r"unknown task 'helaswag'; tasks are hellaswag, .*; did you mean hellaswag\?"):
        task_named("helaswag")
    with pytest.raises(InputError, match=r"no protocol 'mean'; choose from hellaswag:completion, hellaswag:harness"):
        task_named("hellaswag:mean")
