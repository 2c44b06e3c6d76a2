"""The head that is trained, its losses, and the file it is saved in.

logits = W_lm[token_ids] @ norm(h + A h): W_lm is the model's own frozen LM head; only A and the
norm's weight are trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fathom.training.rows import Rows


class TrainableHead(nn.Module):
    """norm(h + A h), to be multiplied by LM-head rows.

    Attributes:
        norm_weight: [d]. adapter: A, [d, d], used as h @ A.T.
    """

    def __init__(self, norm_weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm_weight = nn.Parameter(norm_weight.detach().float().clone())
        self.adapter = nn.Parameter(torch.zeros(norm_weight.numel(), norm_weight.numel()))

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, d] states of any dtype -> [n, d] float32 normed states."""
        h = hidden.float()
        h = h + h @ self.adapter.T
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return h * scale * self.norm_weight


@torch.no_grad()
def fit_linear(head: TrainableHead, rows: Rows, penalty: float = 1e-3) -> None:
    """Start A at the ridge regression of the final state's direction on the layer's: seconds.

    Both sides are scaled to root mean square 1, as the norm's output does not depend on the
    state's length; without that, the few states of huge norm would decide the fit.
    """
    d = rows.hidden.shape[1]
    gram, cross = torch.zeros(d, d), torch.zeros(d, d)
    for start in range(0, len(rows.argmax), 8192):
        x = F.rms_norm(rows.hidden[start : start + 8192].float(), (d,))
        z = F.rms_norm(rows.final[start : start + 8192].float() / head.norm_weight, (d,))
        gram += x.T @ x
        cross += x.T @ z
    gram += penalty * gram.diagonal().mean() * torch.eye(d)
    head.adapter.copy_(torch.linalg.solve(gram, cross).T - torch.eye(d))


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How a head is trained.

    Attributes:
        subset: LM-head rows in the loss. steps, learning_rate: AdamW, cosine decay.
        batch: rows a step. mse: weight of the squared error to the final-normed state.
        outside: weight of the loss on rows whose answer the subset lacks.
        check_every: steps between checks. patience: checks without gain before the end.
        seed: of the order of rows.
    """

    subset: int = 2048
    steps: int = 600
    batch: int = 512
    learning_rate: float = 1e-3
    mse: float = 0.0
    outside: float = 0.1
    check_every: int = 100
    patience: int = 3
    seed: int = 0


def loss_of(logits: Tensor, labels: Tensor, outside: float) -> Tensor:
    """Cross entropy against the deep argmax.

    Args:
        logits: [n, subset]. labels: [n] int64 positions in the subset, -1 where it lacks the
            answer. Those rows are drawn to the uniform distribution instead: the head cannot be
            right there, so it should not be confident.
    """
    known = labels >= 0
    loss = F.cross_entropy(logits[known], labels[known], reduction="sum")
    if outside and not known.all():
        lost = logits[~known]
        loss = loss + outside * (lost.logsumexp(-1) - lost.mean(-1)).sum()
    return loss / len(labels)


@torch.inference_mode()
def agreement(head: TrainableHead, weight: Tensor, rows: Rows, labels: Tensor) -> float:
    """Share of rows whose best logit is the label.

    Args:
        weight: [m, d] LM-head rows of the subset, in the model's dtype.
        labels: [n] int64 positions in the subset, -1 where it lacks the answer.
    """
    hits = 0
    for start in range(0, len(labels), 1024):
        state = head(rows.hidden[start : start + 1024]).to(weight.dtype)
        best = (state @ weight.T).argmax(-1)
        hits += int((best == labels[start : start + 1024]).sum())
    return hits / max(len(labels), 1)


def train_head(
    head: TrainableHead,
    rows: Rows,
    valid: Rows,
    lm_weight: Tensor,
    ranked: Tensor,
    s: TrainSettings,
) -> dict[str, Any]:
    """Train A and the norm in place; the best state on ``valid`` is kept, rounded to bfloat16.

    Args:
        lm_weight: [vocab, d] in the model's dtype.
        ranked: [vocab] int64, most frequent token first.

    Returns:
        a summary: steps run, best step, validation agreement at the start and at the best.
    """
    weight = lm_weight[ranked[: s.subset]]
    place = torch.full((lm_weight.shape[0],), -1)
    place[ranked[: s.subset]] = torch.arange(min(s.subset, len(ranked)))
    labels, valid_labels = place[rows.argmax], place[valid.argmax]
    best = start = agreement(head, weight, valid, valid_labels)
    best_step, kept = 0, {n: p.detach().clone() for n, p in head.named_parameters()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=s.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.steps)
    generator = torch.Generator().manual_seed(s.seed)
    order = torch.randperm(len(labels), generator=generator)
    step, cursor = 0, 0
    bar = tqdm(total=s.steps, desc="train", unit="step")
    for step in range(1, s.steps + 1):
        if cursor + s.batch > len(order):
            order, cursor = torch.randperm(len(labels), generator=generator), 0
        index = order[cursor : cursor + s.batch]
        cursor += s.batch
        # Unit length first: the output is the same, and A's gradients are of one size.
        state = head(F.rms_norm(rows.hidden[index].float(), (rows.hidden.shape[1],)))
        logits = (state.to(weight.dtype) @ weight.T).float()
        loss = loss_of(logits, labels[index], s.outside)
        if s.mse:
            loss = loss + s.mse * F.mse_loss(state, rows.final[index].float())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.update()
        if step % s.check_every == 0 or step == s.steps:
            now = agreement(head, weight, valid, valid_labels)
            bar.set_postfix(loss=f"{loss.item():.3f}", agreement=f"{now:.4f}")
            if now > best:
                best, best_step = now, step
                kept = {n: p.detach().clone() for n, p in head.named_parameters()}
            elif step - best_step >= s.patience * s.check_every:
                break
    bar.close()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(kept[name].bfloat16().float())
    return {
        "steps": step,
        "best_step": best_step,
        "rows": len(labels),
        "valid_start": round(start, 4),
        "valid_best": round(best, 4),
    }


def save_head(path: Path, head: TrainableHead, token_ids: Tensor, metadata: dict[str, str]) -> None:
    """Write ``norm.weight`` [d], ``adapter.weight`` [d, d], both bfloat16, and ``token_ids``.

    Args:
        token_ids: [n] LM-head rows, most frequent first, kept as int32.
    """
    tensors = {
        "norm.weight": head.norm_weight.detach().bfloat16(),
        "adapter.weight": head.adapter.detach().bfloat16().contiguous(),
        "token_ids": token_ids.int().contiguous(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
