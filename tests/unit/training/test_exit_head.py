"""Exit heads trained, saved and read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from fathom.models.files import weights_digest
from fathom.models.heads import build_exit_head, read_trained_head
from fathom.models.load import load_decoder
from fathom.training import exit_head
from fathom.training.collect import answer_rows, collect
from fathom.training.data import data_dir, heldout_prompts, rank_tokens, train_prompts
from fathom.training.errors import TrainingError
from fathom.training.evaluate import Costs, Drafts, draft, predict
from fathom.training.rows import Rows, join, load_rows, split_validation
from fathom.training.train import TrainableHead, agreement, loss_of, save_head
from tests.tiny_models import TINY
from tests.unit.training.conftest import LAYER, SETTINGS, VOCAB


def agreement_of(head: TrainableHead, rows: Rows, trained: SimpleNamespace) -> float:
    tokens = trained.ranked[: trained.subset]
    place = torch.full((VOCAB,), -1)
    place[tokens] = torch.arange(len(tokens))
    return agreement(head, trained.lm_weight[tokens], rows, place[rows.argmax])


# --- data


def test_without_data_the_error_says_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = ("datasets/openai/gsm8k", "datasets/allenai/scitldr", "bentrevett/multi30k")
    sources += ("hemingkx/Spec-Bench", "gutenberg.org")
    monkeypatch.delenv("FATHOM_DATA")
    with pytest.raises(TrainingError, match="FATHOM_DATA is unset") as unset:
        data_dir()
    assert all(source in str(unset.value) for source in sources)
    monkeypatch.setenv("FATHOM_DATA", str(tmp_path))
    with pytest.raises(TrainingError, match=r"train\.jsonl\.gz is missing") as missing:
        train_prompts(0)
    assert all(source in str(missing.value) for source in sources)


def test_the_command_ends_in_one_line_without_data(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FATHOM_DATA")
    arguments = ["exit_head", "--model", str(model_dir), "--work-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--layers", "1"])
    with pytest.raises(SystemExit, match=r"^exit_head: .*huggingface\.co/datasets/openai/gsm8k"):
        exit_head.main()


def test_no_prompt_that_is_held_out_is_trained_on() -> None:
    seen = {prompt.text for prompts in train_prompts(0).values() for prompt in prompts}
    assert not seen & {prompt.text for prompt in heldout_prompts()}


def test_the_ranking_holds_every_token_and_answers_weigh_most(model: SimpleNamespace) -> None:
    answers = torch.full((10_000_000,), 7)
    ranked = rank_tokens(model.tokenizer, answers, VOCAB)
    assert ranked[0] == 7
    assert ranked.sort().values.tolist() == list(range(VOCAB))
    assert ranked[-2:].tolist() == [1, 2], "tokens never seen come last, by id"


# --- collection


def test_rows_hold_what_the_model_says(collected: Path, model: SimpleNamespace) -> None:
    for split in ("train", "heldout"):
        for rows in load_rows(collected, split, LAYER).values():
            assert rows.hidden.shape == rows.final.shape == (len(rows.argmax), 32)
            said = model.module.lm_head(rows.final).argmax(-1)
            assert torch.equal(said, rows.argmax)


def test_answers_are_those_of_greedy_decoding_alone(
    collected: Path, model: SimpleNamespace
) -> None:
    # Prompts of different length share a batch with padding: each must still be answered as if
    # alone, up to and including its end.
    rows = load_rows(collected, "heldout", LAYER)["gsm8k"]
    prompts = sorted(
        (p for p in heldout_prompts() if p.domain == "gsm8k"), key=lambda p: len(p.text)
    )
    answers = rows.argmax.split(
        torch.unique_consecutive(rows.sequence, return_counts=True)[1].tolist()
    )
    assert len(answers) == len(prompts)
    same = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = model.tokenizer("<s> " + prompt.text, add_special_tokens=False, return_tensors="pt")
        output = model.module.generate(**ids, max_new_tokens=12, do_sample=False)
        same += output[0, ids["input_ids"].shape[1] :].tolist() == answer.tolist()
    assert same >= len(prompts) - 2, "bfloat16 may part two equal logits, seldom"


def test_collection_resumes_from_its_shards(
    tmp_path: Path, collected: Path, model: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return answer_rows(*args)

    with monkeypatch.context() as patch:
        patch.setattr("fathom.training.collect.answer_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(SETTINGS, tmp_path, model.module, model.tokenizer)
    assert not model.module.model.norm._forward_hooks
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert 0 < len(before) < len(list(collected.glob("*.safetensors")))
    # What a run killed while it wrote leaves behind.
    (tmp_path / "train-0001-math.partial").write_bytes(b"half a shard")

    collect(SETTINGS, tmp_path, model.module, model.tokenizer)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    names = sorted(path.name for path in collected.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for split in ("train", "heldout"):
        whole, resumed = load_rows(collected, split, LAYER), load_rows(tmp_path, split, LAYER)
        assert list(whole) == list(resumed)
        for domain, rows in whole.items():
            for field in dataclasses.fields(Rows):
                first, second = getattr(rows, field.name), getattr(resumed[domain], field.name)
                assert torch.equal(first, second), (domain, field.name)


def test_a_folder_of_other_settings_is_refused(collected: Path, model: SimpleNamespace) -> None:
    other = dataclasses.replace(SETTINGS, seed=1)
    with pytest.raises(TrainingError, match="other settings"):
        collect(other, collected, model.module, model.tokenizer)


def test_a_layer_that_is_no_exit_is_refused(tmp_path: Path, model: SimpleNamespace) -> None:
    other = dataclasses.replace(SETTINGS, layers=(TINY["num_hidden_layers"],))
    with pytest.raises(TrainingError, match="from 1 to 3"):
        collect(other, tmp_path, model.module, model.tokenizer)


def test_validation_takes_whole_sequences(collected: Path) -> None:
    rows = join(list(load_rows(collected, "train", LAYER).values()))
    train, valid = split_validation(rows)
    assert len(train.argmax) + len(valid.argmax) == len(rows.argmax)
    assert not set(train.sequence.tolist()) & set(valid.sequence.tolist())


# --- training


def test_training_raises_agreement(trained: SimpleNamespace, collected: Path) -> None:
    before = agreement_of(trained.untrained, trained.train, trained)
    assert agreement_of(trained.head, trained.train, trained) > before + 0.1
    # Random text, but of the same model: what was learned holds there too.
    heldout = load_rows(collected, "heldout", LAYER)["classics"]
    before = agreement_of(trained.untrained, heldout, trained)
    assert agreement_of(trained.head, heldout, trained) > before + 0.05
    assert trained.summary["valid_best"] >= trained.summary["valid_start"]


def test_rows_outside_the_subset_are_drawn_to_no_confidence() -> None:
    lost = torch.tensor([-1])
    flat, sharp = torch.zeros(1, 8), torch.tensor([[9.0] + [0.0] * 7])
    assert loss_of(flat, lost, 0.1) < loss_of(sharp, lost, 0.1)
    assert loss_of(sharp, lost, 0.0) == 0
    assert loss_of(sharp, torch.tensor([0]), 0.1) < loss_of(flat, torch.tensor([0]), 0.1)


# --- the file


@pytest.mark.parametrize("count", [VOCAB // 2, VOCAB])
def test_a_saved_head_is_the_one_that_is_served(
    count: int, tmp_path: Path, trained: SimpleNamespace, model_dir: Path
) -> None:
    path, token_ids = tmp_path / "head.safetensors", trained.ranked[:count]
    metadata = {"format_version": exit_head.FORMAT_VERSION, "exit_layer": str(LAYER)}
    save_head(path, trained.head, token_ids, metadata)

    read, stored = read_trained_head(path)
    assert stored == metadata
    assert read.exit_layer == LAYER
    assert read.adapter is not None
    assert torch.equal(read.norm.float(), trained.head.norm_weight)
    assert torch.equal(read.adapter.float(), trained.head.adapter)
    assert torch.equal(read.token_ids, token_ids)

    decoder = load_decoder(model_dir, dtype=torch.float32)
    served = build_exit_head(decoder, model_dir, read, exit_vocab=0)
    hidden = trained.train.hidden[:64].float()
    module = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    # The whole vocabulary is served in its own order, a subset in the head's.
    columns = token_ids if count < VOCAB else torch.arange(VOCAB)
    with torch.inference_mode():
        expected = trained.head(hidden) @ module.lm_head.weight[columns].T
    torch.testing.assert_close(served.logits(hidden), expected, atol=1e-4, rtol=1e-4)
    assert [served.token_of(i) for i in range(count)] == columns.tolist()


# --- evaluation


def test_drafts_of_a_subset_are_those_of_its_logits(trained: SimpleNamespace) -> None:
    rows = trained.train.take(torch.arange(300))  # more than one chunk
    ranked_weight = trained.lm_weight[trained.ranked].float()
    found = draft(trained.head, rows, ranked_weight, trained.ranked, [8, VOCAB])
    with torch.inference_mode():
        logits = trained.head(rows.hidden) @ ranked_weight.T
    for size, drafts in found.items():
        best = logits[:, :size].softmax(-1).topk(2)
        assert torch.equal(drafts.agree, trained.ranked[best.indices[:, 0]] == rows.argmax)
        gap = best.values[:, 0] - best.values[:, 1]
        torch.testing.assert_close(drafts.gap, gap, atol=1e-5, rtol=0)


def test_predictions_count_units_as_by_hand() -> None:
    # One sequence: two good drafts, a wrong one, then a row that is not confident.
    drafts = Drafts(
        agree=torch.tensor([True, True, False, True]),
        gap=torch.tensor([0.9, 0.9, 0.9, 0.1]),
        sequence=torch.zeros(4, dtype=torch.int64),
    )
    costs = Costs(layers=10, vocab=100, lm_head=5.0, row=0.1)
    shallow, full = 4 + 5 * 0.2, 15.0
    # exact: all four rows flushed, three kept up to the correction; then the last row alone.
    units = 4 * shallow + 11 * 1.3 + shallow + 11
    exact = predict(drafts, 4, 20, costs, threshold=0.5, exact=True)
    assert exact.speedup == pytest.approx(full * 4 / units)
    assert (exact.per_flush, exact.wrong) == (2, 0)
    free = predict(drafts, 4, 20, costs, threshold=0.5, exact=False)
    assert free.speedup == pytest.approx(full * 4 / (4 * shallow + 11 * 1.3))
    assert (free.per_flush, free.wrong) == (4, 0.25)


# --- the command


def test_the_command_collects_trains_reports_and_saves(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    out, tables = tmp_path / "head.safetensors", tmp_path / "report.md"
    command = f"--model {model_dir} --model-name tiny --work-dir {tmp_path / 'rows'} --layers 1 2 "
    command += "--train-layers 2 --answer-batches 1 --batch 4 --max-new-tokens 8 --text-batches 1 "
    command += "--subset-sizes 8 16 --train-subset 16 --steps 20 --save-subset 16 "
    command += f"--out {out} --report {tables}"
    exit_head.run(exit_head.parse(command.split()))

    head, metadata = read_trained_head(out)
    assert (head.exit_layer, len(head.token_ids)) == (2, 16)
    assert (metadata["model"], metadata["weights_digest"]) == ("tiny", weights_digest(model_dir))
    training = json.loads(metadata["training"])
    assert training["subset"] == 16
    assert set(training["heldout_agreement"]) == {"gsm8k", "spec_bench", "classics"}
    assert tables.read_text() in capsys.readouterr().out
    for size in (8, 16, VOCAB):
        assert f"| 2 | trained | {size} |" in tables.read_text()

    with pytest.raises(TrainingError, match=r"layers \[2\], sizes \[8, 16\] or 40"):
        exit_head.run(exit_head.parse([*command.split(), "--save-layer", "1"]))
