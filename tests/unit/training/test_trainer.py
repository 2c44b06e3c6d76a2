"""Training: what is learned, what stays, and going on after a kill."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fathom.training.errors import TrainingError
from fathom.training.examples import Batch, Example
from fathom.training.exits import ExitTraining, batches_of, split_heldout, train_exits
from fathom.training.export import export
from fathom.training.model import ShallowDeep, Shape
from fathom.training.objective import Objective, TrainSettings
from fathom.training.trainer import Trainer
from tests.unit.training.conftest import VOCAB


def trainer_of(base, examples: list[Example], work_dir: Path, shape: Shape, **settings) -> Trainer:
    torch.manual_seed(0)
    model = ShallowDeep(base, shape)
    original = None
    if settings.get("hold"):
        frozen = copy.deepcopy(base)

        def original(batch: Batch, rows: torch.Tensor) -> torch.Tensor:
            return frozen.model(batch.token_ids).last_hidden_state[rows]

    settings = {"steps": 8, "batch_tokens": 128, "learning_rate": 3e-3, "warmup": 2, **settings}
    objective = Objective(
        model,
        TrainSettings(**settings),
        weight=model.lm_head.weight.detach().clone(),
        token_ids=torch.arange(VOCAB),
        vocab_size=VOCAB,
        original=original,
    )
    return Trainer(objective, examples, work_dir=work_dir)


EXIT = Shape(exit_layer=1, exit_layers=1, tune="exit", head_adapter=True)
LORA = Shape(exit_layer=2, tune="lora", lora_rank=4, lora_alpha=8)
FULL = Shape(exit_layer=2, tune="full")


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (EXIT, {"kd": "logits"}),
        (LORA, {"kd": "last", "hold": 0.5}),
        (LORA, {"kd": "unif", "layer_dropout": 0.3, "curriculum": 0.5}),
        (FULL, {"kd": "dyna", "accumulate": 2, "deep_rate": 0.1}),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    base, examples, tmp_path: Path, shape: Shape, settings: dict
) -> None:
    whole = trainer_of(copy.deepcopy(base), examples, tmp_path / "whole", shape, **settings)
    (tmp_path / "whole").mkdir()
    whole.run(show=False)

    (tmp_path / "cut").mkdir()
    first = trainer_of(copy.deepcopy(base), examples, tmp_path / "cut", shape, **settings)
    for _ in range(3):
        first.step()
    first.save()
    first.step()  # killed after the checkpoint: this step is lost, and made again
    second = trainer_of(copy.deepcopy(base), examples, tmp_path / "cut", shape, **settings)
    second.run(show=False)
    assert second.progress.losses == whole.progress.losses
    for name, parameter in second.model.trained().items():
        assert torch.equal(parameter, whole.model.trained()[name]), name


def test_a_run_killed_between_two_epochs_goes_on(base, examples, tmp_path: Path) -> None:
    settings = {"batch_tokens": 1024, "steps": 6}
    (tmp_path / "cut").mkdir()
    whole = trainer_of(copy.deepcopy(base), examples, tmp_path, EXIT, **settings)
    first = trainer_of(copy.deepcopy(base), examples, tmp_path / "cut", EXIT, **settings)
    whole.run(show=False)
    first.step()
    while first.progress.position < len(first._groups):
        first.step()
    assert first.progress.step < 6
    first.save()
    second = trainer_of(copy.deepcopy(base), examples, tmp_path / "cut", EXIT, **settings)
    second.run(show=False)
    assert second.progress == whole.progress


def test_a_checkpoint_of_other_settings_is_refused(base, examples, tmp_path: Path) -> None:
    trainer_of(copy.deepcopy(base), examples, tmp_path, EXIT).save()
    other = trainer_of(copy.deepcopy(base), examples, tmp_path, EXIT, learning_rate=1e-4)
    with pytest.raises(TrainingError, match=r"other settings .*--work-dir"):
        other.resume()
    other = trainer_of(base, examples[1:], tmp_path, EXIT)
    with pytest.raises(TrainingError, match=r"other data .*--work-dir"):
        other.resume()


def test_what_is_logged_is_kept_before_each_checkpoint(base, examples, tmp_path: Path) -> None:
    trainer = trainer_of(base, examples, tmp_path, EXIT, steps=5, check_every=2)
    events: list[int | str] = []
    save = trainer.save
    trainer.save = lambda: (events.append("saved"), save())
    trainer.run(
        check=lambda: {"agreement": 0.5},
        log=lambda step, figures: events.append(step) if "loss" in figures else None,
        on_save=lambda: events.append("kept"),
        show=False,
    )
    assert events == [1, 2, "kept", "saved", 3, 4, "kept", "saved", 5, "kept", "saved"]


def test_some_example_is_always_held_out(examples) -> None:
    train, heldout = split_heldout(examples[:45])
    assert (len(train), heldout) == (43, [examples[19], examples[39]])
    assert split_heldout(examples[:3]) == (examples[:2], [examples[2]])
    with pytest.raises(TrainingError, match="--heldout"):
        split_heldout(examples[:1])


def test_training_exits_leaves_the_full_path_as_it_was(base, examples, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in base.named_parameters()}
    trainer = trainer_of(base, examples, tmp_path, EXIT, steps=5)
    names = set(trainer.model.trained())
    assert all(name.startswith(("branch.", "head.")) for name in names)
    start = trainer.step()["loss"]
    for _ in range(40):
        last = trainer.step()["loss"]
    assert last < start
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_kept_probabilities_are_those_of_a_whole_pass(base, examples, tmp_path: Path) -> None:
    """A frozen trunk's soft targets, by way of its states, as a plain forward pass gives them."""
    trainer = trainer_of(base, examples, tmp_path, EXIT, kd="logits", kd_weight=2.0)
    objective, batch = trainer._objective, Batch.of(examples[:5])
    rows = batch.labels != -100
    with torch.no_grad():
        total, parts = objective.losses(batch, 0)
        again, _ = objective.losses(batch, 1)
        logits = trainer.model.head(trainer.model(batch.token_ids, rows, deep=False).exit)
        logits = logits @ trainer.model.lm_head.weight.T
        target = base(batch.token_ids).logits[rows].softmax(-1)
    expected = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(parts["kd"], expected, rtol=0.02, atol=0.02)  # bfloat16 products
    torch.testing.assert_close(total, parts["ce_shallow"] + 2.0 * parts["kd"])
    assert torch.equal(total, again)  # kept, not computed anew


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        (EXIT, {"exit_loss": False}, "nothing is left to train"),
        (LORA, {"exit_loss": False, "deep_ce": False}, "nothing is left to train"),
        (EXIT, {"kd": "dyna"}, "use logits there, or --tune lora"),
        (EXIT, {"check_every": 0}, "check_every must be at least 1, got 0"),
        (EXIT, {"learning_rate": -1.0}, "learning_rate must be a number of at least 0, got -1.0"),
        (EXIT, {"kd_weight": float("nan")}, "kd_weight must be a number of at least 0, got nan"),
        (LORA, {"layer_dropout": 2.0}, "layer_dropout must be a number from 0 to 1, got 2.0"),
        (Shape(exit_layer=1, lora_rank=0), {}, "lora_rank and lora_alpha must be at least 1"),
        (LORA, {"kd": "best"}, "kd must be one of none, last, unif, dyna, logits, got 'best'"),
    ],
)
def test_settings_that_contradict_the_shape_are_refused(
    base, examples, tmp_path: Path, shape: Shape, settings: dict, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        trainer_of(base, examples, tmp_path, shape, **settings)


def test_without_the_exits_loss_the_exit_stays_as_it_was(base, examples, tmp_path: Path) -> None:
    shape = Shape(exit_layer=1, exit_layers=1, tune="lora", lora_rank=4, lora_alpha=8)
    trainer = trainer_of(base, examples, tmp_path, shape, exit_loss=False)
    before = {name: p.detach().clone() for name, p in trainer.model.trained().items()}
    figures = [trainer.step() for _ in range(3)]
    assert set(figures[0]) == {"loss", "ce_deep", "learning_rate"}
    after = trainer.model.trained()
    changed = {name for name, p in before.items() if not torch.equal(p, after[name])}
    assert changed and all("lora_" in name for name in changed)


def test_holding_keeps_the_full_path_nearer(base, examples, tmp_path: Path) -> None:
    def drift(hold: float) -> float:
        own = copy.deepcopy(base)
        trainer = trainer_of(own, examples, tmp_path, LORA, hold=hold, deep_ce=False, steps=30)
        for _ in range(30):
            trainer.step()
        batch = Batch.of(examples[:16])
        rows = batch.labels != -100
        with torch.no_grad():
            now = trainer.model(batch.token_ids, rows, deep=True).deep
            then = base.model(batch.token_ids, output_hidden_states=True)
        target = base.lm_head(then.last_hidden_state[rows]).log_softmax(-1)
        own_scores = base.lm_head(base.model.norm(now)).log_softmax(-1)
        return float((target.exp() * (target - own_scores)).sum(-1).mean().detach())

    assert drift(2.0) < drift(0.0) / 2


def test_the_shallow_path_is_that_of_all_rows(base, examples) -> None:
    """The last exit layer skips its MLP at rows without a label; nothing else may differ."""
    model = ShallowDeep(base, Shape(exit_layer=1, exit_layers=2, tune="exit"))
    batch = Batch.of(examples[:5])
    rows = batch.labels != -100
    with torch.no_grad():
        some = model(batch.token_ids, rows, deep=False).exit
        every = model(batch.token_ids, torch.ones_like(rows), deep=False).exit
        deep = model(batch.token_ids, rows, deep=True, keep=[3])
    torch.testing.assert_close(some, every[rows.flatten()])
    # Untouched copies of the model's own layers: the same states as further down the full path.
    torch.testing.assert_close(deep.exit, deep.layers[3])


def test_what_is_trained_is_what_is_served(base, examples, tmp_path: Path, model_dir) -> None:
    """The engine's shallow path and full path on an exported adapter give the trainer's states."""
    from fathom.models.adapters import read_adapter
    from fathom.models.heads import build_exit_head
    from fathom.models.load import load_decoder, load_exit_layers
    from tests.unit.reference_attention import ContiguousAttention

    shape = Shape(
        exit_layer=1, exit_layers=1, tune="lora", lora_rank=4, lora_alpha=8, head_adapter=True
    )
    trainer = trainer_of(base, examples, tmp_path, shape, kd="last", steps=20)
    for _ in range(20):
        trainer.step()
    model = trainer.model
    adapter = read_adapter(export(model, torch.arange(VOCAB), {}).write(tmp_path / "out"))
    assert adapter.changes_model
    batch = Batch.of(examples[:1])
    rows = torch.ones_like(batch.labels, dtype=torch.bool)
    with torch.no_grad():
        states = model(batch.token_ids, rows, deep=True)
        draft = model.head(states.exit) @ model.lm_head.weight.T
        full = model.lm_head(model.norm(states.deep))

    decoder = load_decoder(model_dir, dtype=torch.float32, adapter=adapter)
    extra = load_exit_layers(decoder, adapter)
    head = build_exit_head(decoder, model_dir, adapter, -1)
    attend = ContiguousAttention(decoder.config.num_heads, decoder.config.num_kv_heads)
    positions = list(range(batch.token_ids.shape[1]))
    at = torch.tensor(positions)
    attend.set_rows([0] * len(positions), positions)
    hidden = decoder.run(decoder.embed(batch.token_ids[0]), at, 0, 1, attend)
    shared = hidden.clone()
    own = extra.run(hidden, at, 1, 2, attend)
    # The adapter is stored in bfloat16.
    torch.testing.assert_close(head.logits(own), draft, rtol=0.05, atol=0.2)
    attend = ContiguousAttention(decoder.config.num_heads, decoder.config.num_kv_heads)
    attend.set_rows([0] * len(positions), positions)
    deep = decoder.run(shared, at, 1, decoder.config.num_layers, attend)
    torch.testing.assert_close(decoder.logits(deep), full, rtol=0.05, atol=0.2)
    untouched = load_decoder(model_dir, dtype=torch.float32)
    attend = ContiguousAttention(decoder.config.num_heads, decoder.config.num_kv_heads)
    attend.set_rows([0] * len(positions), positions)
    plain = untouched.run(untouched.embed(batch.token_ids[0]), at, 0, 4, attend)
    assert (untouched.logits(plain) - full).abs().max() > 0.5


def test_train_exits_raises_agreement(examples, tmp_path: Path, model_dir: Path) -> None:
    plan = ExitTraining(
        name="tiny",
        model=str(model_dir),
        shape=EXIT,
        subset=30,
        settings=TrainSettings(
            steps=150, batch_tokens=512, learning_rate=5e-3, warmup=5, check_every=50
        ),
    )
    before = train_exits(
        ExitTraining(
            name="tiny", model=str(model_dir), shape=EXIT, subset=30, fit=False,
            settings=TrainSettings(steps=1, batch_tokens=512, learning_rate=0.0, check_every=1),
        ),
        examples, examples[:24], tmp_path / "before", show=False,
    )  # fmt: skip
    # Random weights say nothing that carries over to other prompts, so these are seen ones.
    outcome = train_exits(plan, examples, examples[:24], tmp_path / "run", show=False)
    assert outcome.drafts.agreement > before.drafts.agreement + 0.3
    assert [step for step, _ in outcome.curve] == [50, 100, 150]
    outcome.write(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny: exits for" in text
    assert "| domain1 |" in text
    assert "nan" not in text
    assert len(batches_of(examples, 8)) == 12
