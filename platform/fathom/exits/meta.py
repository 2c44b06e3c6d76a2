"""A trained confidence: from the exit state, the probability that the deep stage agrees.

FREE's meta classifier (free.md): d -> d -> ReLU -> 2, trained on "shallow argmax = deep argmax".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fathom.models.errors import ModelError

FORMAT_VERSION = "1"
_BATCH = 1024


class MetaClassifier(nn.Module):
    """The classifier.

    States are divided by their root mean square first: their size varies by orders of magnitude
    from token to token, and the exit head's own norm takes it out too.

    Args:
        size: d, of the hidden states.

    Attributes:
        metadata: of the file: weights_digest of the model, and whatever training noted.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.metadata: dict[str, str] = {}
        self.inner = nn.Linear(size, size)
        self.outer = nn.Linear(size, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, d] float -> [rows, 2] float32 logits of "disagrees" and "agrees"."""
        normed = F.rms_norm(hidden.float(), (self.size,))
        logits: Tensor = self.outer(F.relu(self.inner(normed)))
        return logits

    @torch.inference_mode()
    def confidence(self, hidden: Tensor) -> Tensor:
        """Probability that the deep stage agrees.

        Args:
            hidden: [rows, d] exit states, any float dtype.

        Returns:
            [rows] float32 in [0, 1]; NaN for states that are not finite.
        """
        return self(hidden).softmax(-1)[:, 1]

    def save(self, path: Path, weights_digest: str, metadata: Mapping[str, str] = {}) -> None:
        """Write it to a safetensors file, whole or not at all.

        Args:
            weights_digest: of the model whose states it reads.
            metadata: kept in the file, beside what training noted.
        """
        self.metadata = {
            **self.metadata,
            **metadata,
            "format_version": FORMAT_VERSION,
            "weights_digest": weights_digest,
        }
        partial = path.with_name(path.name + ".partial")
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, partial, self.metadata)
        partial.chmod(0o644)  # safetensors makes files that only their owner reads
        partial.replace(path)

    @staticmethod
    def load(path: Path, weights_digest: str | None = None) -> MetaClassifier:
        """Read it.

        Args:
            weights_digest: of the model that is served; None does not compare.

        Raises:
            ModelError: for a file that is missing, damaged, or made for another model.
        """
        try:
            with safe_open(str(path), framework="pt") as reader:
                metadata = reader.metadata() or {}
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            if metadata.get("format_version") != FORMAT_VERSION:
                raise ModelError(
                    f"{path}: meta classifier of format {metadata.get('format_version')!r}; this "
                    f"version of Fathom reads format {FORMAT_VERSION!r}. Train it again."
                )
            model = MetaClassifier(len(tensors["inner.bias"]))
            model.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise ModelError(f"{path}: cannot read the meta classifier: {error}") from error
        made_for = metadata.get("weights_digest")
        if weights_digest is not None and made_for != weights_digest:
            raise ModelError(
                f"{path}: the meta classifier was trained for the model with weights digest "
                f"{made_for}, this one has {weights_digest}: train one for this model."
            )
        model.metadata = dict(metadata)
        return model.eval()


def fit(
    hidden: Tensor,
    agrees: Tensor,
    groups: Tensor | None = None,
    *,
    held_out: float = 0.1,
    epochs: int = 30,
    patience: int = 3,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> MetaClassifier:
    """Train a classifier by AdamW, and stop when held-out rows are predicted no better.

    Args:
        hidden: [n, d] exit states, any float dtype. agrees: [n] bool.
        groups: [n] int64 request of each row; whole requests are held out, as rows of one request
            resemble each other. None holds out rows.
        held_out: share in (0, 1). patience: epochs without a gain.

    Returns:
        the classifier of the best epoch; ``metadata`` holds rows, epoch and held-out loss in nats.

    Raises:
        ValueError: for tensors that do not fit each other, or fewer than 2 rows or requests.
    """
    if hidden.ndim != 2 or agrees.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be [rows, d] and agrees [rows], got {tuple(hidden.shape)} and "
            f"{tuple(agrees.shape)}."
        )
    finite = torch.isfinite(hidden).all(dim=1)
    owners = torch.arange(len(hidden)) if groups is None else groups
    hidden, target, owners = hidden[finite], agrees[finite].long(), owners[finite]
    names, owners = torch.unique(owners, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"at least 2 requests are needed, some to be held out, got {len(names)}.")
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=random)
    aside = torch.zeros(len(names), dtype=torch.bool)
    aside[order[: min(max(1, round(held_out * len(names))), len(names) - 1)]] = True
    test = aside[owners]
    rows = (~test).nonzero().flatten()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MetaClassifier(hidden.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    best_loss, best_epoch, best = float("inf"), 0, copy.deepcopy(model.state_dict())
    for epoch in range(1, epochs + 1):
        model.train()
        for part in torch.split(rows[torch.randperm(len(rows), generator=random)], _BATCH):
            loss = F.cross_entropy(model(hidden[part]), target[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        held = _loss(model, hidden[test], target[test])
        if held < best_loss:
            best_loss, best_epoch, best = held, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= patience:
            break
    model.load_state_dict(best)
    model.metadata = {
        "rows": str(len(rows)),
        "epoch": str(best_epoch),
        "held_out_loss": f"{best_loss:.6f}",
    }
    return model.eval()


@torch.inference_mode()
def _loss(model: MetaClassifier, hidden: Tensor, target: Tensor) -> float:
    model.eval()
    total = 0.0
    for states, wanted in zip(
        torch.split(hidden, _BATCH), torch.split(target, _BATCH), strict=True
    ):
        total += float(F.cross_entropy(model(states), wanted, reduction="sum"))
    return total / len(target)
