"""The meta classifier, trained on states of which the truth is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fathom.exits.calibration import reliability
from fathom.exits.meta import MetaClassifier, fit
from fathom.models.errors import ModelError

SIZE = 16


def states(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States whose direction tells how likely agreement is, and whose length tells nothing."""
    random = torch.Generator().manual_seed(seed)
    direction = torch.randn(n, SIZE, generator=random)
    chance = (6 * (direction[:, 0].abs() - 0.7)).sigmoid()
    agrees = torch.rand(n, generator=random) < chance
    length = torch.exp(2 * torch.randn(n, 1, generator=random))
    return direction * length, agrees, chance


@pytest.fixture(scope="module")
def trained() -> MetaClassifier:
    hidden, agrees, _ = states(8000)
    return fit(hidden, agrees, lr=5e-3)


def test_it_finds_what_the_states_tell(trained: MetaClassifier) -> None:
    hidden, agrees, chance = states(4000, seed=1)
    confidence = trained.confidence(hidden)
    assert confidence.shape == (4000,)
    assert confidence.dtype is torch.float32
    assert ((confidence >= 0) & (confidence <= 1)).all()
    assert ((confidence > 0.5) == (chance > 0.5)).float().mean() > 0.85
    # No line through the states separates them: it takes the hidden layer.
    assert ((confidence > 0.5) == agrees).float().mean() > 0.72
    assert reliability(confidence.numpy(), agrees.numpy()).ece < 0.06


def test_it_stops_before_it_learns_by_heart(trained: MetaClassifier) -> None:
    hidden, agrees, _ = states(300)
    few = fit(hidden, agrees, epochs=200, lr=1e-2)
    assert int(few.metadata["epoch"]) < 60
    assert float(trained.metadata["held_out_loss"]) < 0.69 < 1
    assert trained.metadata["rows"] == "7200"


def test_the_same_seed_gives_the_same_classifier() -> None:
    hidden, agrees, _ = states(500)
    before = torch.random.get_rng_state()
    first, second = (fit(hidden, agrees, epochs=2, seed=3) for _ in range(2))
    assert torch.equal(first.confidence(hidden), second.confidence(hidden))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = fit(hidden, agrees, epochs=2, seed=4)
    assert not torch.equal(first.confidence(hidden), other.confidence(hidden))


def test_whole_requests_are_held_out() -> None:
    # Within a request all rows agree or none does, which its states tell only by heart: held-out
    # rows of the same requests would look learnable, held-out requests do not.
    random = torch.Generator().manual_seed(0)
    groups = torch.arange(40).repeat_interleave(25)
    marks = torch.randn(40, SIZE, generator=random)
    hidden = marks[groups] + 0.05 * torch.randn(1000, SIZE, generator=random)
    agrees = (torch.rand(40, generator=random) < 0.5)[groups]
    by_row = fit(hidden, agrees, held_out=0.2, lr=1e-2)
    by_request = fit(hidden, agrees, groups, held_out=0.2, lr=1e-2)
    assert float(by_row.metadata["held_out_loss"]) < 0.1
    assert float(by_request.metadata["held_out_loss"]) > 0.4


def test_states_that_are_not_finite_are_not_learned_and_have_no_confidence(
    trained: MetaClassifier,
) -> None:
    hidden, agrees, _ = states(400)
    hidden[0, 3], hidden[1, 0] = float("nan"), float("inf")
    assert torch.isnan(trained.confidence(hidden)[:2]).all()
    assert torch.isfinite(trained.confidence(hidden)[2:]).all()
    fitted = fit(hidden, agrees, epochs=2)
    assert all(torch.isfinite(p).all() for p in fitted.parameters())
    assert int(fitted.metadata["rows"]) == 398 - round(39.8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_of_the_models_dtype_will_do(trained: MetaClassifier, dtype: torch.dtype) -> None:
    hidden, _, _ = states(200)
    rounded = trained.confidence(hidden.clamp(-6e4, 6e4).to(dtype))
    torch.testing.assert_close(
        rounded, trained.confidence(hidden.clamp(-6e4, 6e4)), atol=0.05, rtol=0
    )


def test_it_goes_through_a_file(trained: MetaClassifier, tmp_path: Path) -> None:
    hidden, _, _ = states(50)
    path = tmp_path / "meta.safetensors"
    trained.save(path, "digest-1", {"trace": "some"})
    loaded = MetaClassifier.load(path, "digest-1")
    assert torch.equal(loaded.confidence(hidden), trained.confidence(hidden))
    assert loaded.metadata["trace"] == "some"
    assert loaded.metadata["rows"] == "7200"
    assert [each.name for each in tmp_path.iterdir()] == ["meta.safetensors"]
    assert MetaClassifier.load(path).size == SIZE
    with pytest.raises(ModelError, match=r"digest-1.*digest-2"):
        MetaClassifier.load(path, "digest-2")


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        MetaClassifier.load(tmp_path / "none.safetensors")
    path = tmp_path / "meta.safetensors"
    path.write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="cannot read"):
        MetaClassifier.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="format"):
        MetaClassifier.load(path)
    save_file({"x": torch.zeros(2)}, path, {"format_version": "1"})
    with pytest.raises(ModelError, match="cannot read"):
        MetaClassifier.load(path)


def test_too_little_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="2 requests"):
        fit(torch.zeros(5, 4), torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="hidden must be"):
        fit(torch.zeros(5, 4), torch.ones(4, dtype=torch.bool))
