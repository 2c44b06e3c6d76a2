"""What a person sees: text coloured by depth, and the line that sums a run up."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from fathom.types import AcceptMode, ComputeUsage, Token

# From a token that left early to one that needed every layer. Names, not shades: they are told
# apart on a terminal of 16 colours, and follow its theme.
_RAMP = ("green", "cyan", "yellow", "magenta", "red")

_LOSSLESS = (AcceptMode.FULL, AcceptMode.EXACT)


def describe_mode(mode: str) -> str:
    """The mode's name, as it is or with a threshold (``exact@0.3``), and whether it is lossless."""
    return f"{mode} ({'lossless' if mode.partition('@')[0] in _LOSSLESS else 'lossy'})"


def depth_colour(depth: int, num_layers: int) -> str:
    """Colour of a token that was decided after ``depth`` of ``num_layers`` layers."""
    place = (depth - 1) * len(_RAMP) // max(num_layers, 1)
    return _RAMP[min(max(place, 0), len(_RAMP) - 1)]


class DepthPrinter:
    """Streams text to a console, each token's characters in the colour of its depth.

    The engine's text may lag behind its tokens (characters of several tokens, possible stop
    strings), so each token notes how many characters it is going to bring, and the text takes
    its colours from those notes in order.

    Args:
        detokenizer: turns the same token ids into text pieces; None leaves the text plain.
    """

    def __init__(self, console: Console, detokenizer: Any, num_layers: int) -> None:
        self._console = console
        self._detokenizer = detokenizer if console.color_system else None
        self._num_layers = num_layers
        self._due: deque[tuple[int, int]] = deque()  # (characters, depth)

    def show(self, tokens: Sequence[Token], text: str) -> None:
        """Show the engine's news at once."""
        if self._detokenizer is not None:
            for token in tokens:
                self._due.append((len(self._detokenizer.push(token.id)), token.depth))
        line = Text()
        while text:
            size, depth = self._due.popleft() if self._due else (len(text), 0)
            style = depth_colour(depth, self._num_layers) if depth else ""
            line.append(text[:size], style)
            if size > len(text):
                self._due.appendleft((size - len(text), depth))
            text = text[size:]
        if line:
            self._console.print(line, end="", soft_wrap=True, highlight=False)

    def legend(self) -> Text:
        """What the colours mean; empty without colours."""
        line = Text()
        if self._detokenizer is not None:
            line.append("depth ")
            for step, colour in enumerate(_RAMP):
                low = step * self._num_layers // len(_RAMP) + 1
                high = (step + 1) * self._num_layers // len(_RAMP)
                line.append(f"■ {low}-{high} ", colour)
        return line


def summary(
    compute: ComputeUsage, *, seconds: float, num_layers: int, ttft_s: float | None = None
) -> str:
    """One line: tokens, rate, mode, exits, acceptance, layers and depth a token, TTFT."""
    parts = [
        f"{compute.decided} tokens",
        f"{compute.decided / max(seconds, 1e-9):.1f} tok/s",
        f"mode {describe_mode(compute.mode)}",
        f"exits {compute.exit_rate:.0%}",
    ]
    if compute.acceptance_rate is not None:
        parts.append(f"drafts accepted {compute.acceptance_rate:.0%}")
    parts.append(f"{compute.layers_per_token:.1f} layers/token of {num_layers}")
    parts.append(f"mean depth {compute.mean_depth:.1f}")
    if ttft_s is not None:
        parts.append(f"TTFT {ttft_s * 1e3:.0f} ms")
    return " · ".join(parts)
