"""What the engine tells of completions: to its exit policies, and to the shadow."""

from __future__ import annotations

from collections.abc import Iterable

from fathom.engine import sampling
from fathom.engine.sequence import Sequence
from fathom.exits.live import LivePolicies
from fathom.exits.shadow import Notes, Shadowed, ShadowLog, Unread
from fathom.types import FinishReason


def begin(shadow: ShadowLog, family: Iterable[Sequence]) -> None:
    """Begin to note what becomes of those that the shadow picks.

    What goes on after a loss is left out: part of it was seen elsewhere. So is a text of mode
    ``copy`` that was drawn at random or under penalties: scored later, its tokens would say nothing
    of the full model's choice.
    """
    for seq in family:
        request = seq.request
        params, compute = request.sampling, request.compute
        if request.resumed or not params.max_tokens:
            continue
        plain = sampling.is_greedy(params) and sampling.is_plain(params)
        if compute.copies_states and not plain:
            continue
        if shadow.picks(request.request_id, seq.index, compute):
            seq.shadow = Notes()


def tell_end(seq: Sequence, policies: LivePolicies, shadow: ShadowLog | None) -> None:
    """Tell of a completion that has ended by itself.

    Not of one that was cut short: its values were never checked to be finite. Nor of one that was
    decided more cheaply under load: that is nothing that later requests should make up for, and no
    drift of traffic.
    """
    if seq.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        return
    page, compute = seq.compute, seq.request.compute
    if page.load_shifted:
        return
    policies.completed(
        compute, exited=page.exited, decided=page.decided, asked=seq.asked, wrong=seq.wrong
    )
    notes = seq.shadow
    if shadow is None or notes is None:
        return
    unread = None
    if compute.copies_states:
        last = len(seq.tokens) - 1
        unread = Unread(tuple(seq.tokens), tuple(p for p in seq.copied if p < last))
    shadow.add(
        Shadowed(
            point=compute.operating_point,
            compute=compute,
            asked=notes.asked,
            decided=page.decided,
            exited=page.exited,
            wrong=notes.wrong,
            layer_tokens=page.shallow_layer_tokens + page.deep_layer_tokens,
            rows=notes.rows,
            agreed=notes.agreed,
            unread=unread,
        )
    )
