"""What the exit policies of one engine have seen, and the thresholds that follow from it."""

from __future__ import annotations

from fathom.types import ComputePolicy, InvalidRequest, PolicyName

_START = 0.9
"""λ before anything is known (FREE)."""


class LivePolicies:
    """Thresholds of this moment.

    Args:
        exit_cost: cost of a token decided at the exit, as a share of a full one's.
    """

    def __init__(self, exit_cost: float) -> None:
        self._exit_cost = exit_cost

    def check(self, compute: ComputePolicy) -> None:
        """Check what can be promised here.

        Raises:
            InvalidRequest: naming the field, its value and the remedy.
        """
        if compute.policy is PolicyName.RISK and compute.exit_threshold is None:
            raise InvalidRequest(
                "risk needs an exit_threshold that is certified for it: serve with operating "
                "points, which hold the data for that.",
                param="risk",
            )

    def threshold_for(self, compute: ComputePolicy, exited: int, decided: int) -> float | None:
        """λ for one token; None where the request's own holds."""
        del exited, decided
        return _START if compute.policy is PolicyName.ADAPTIVE else None

    def observe(
        self,
        compute: ComputePolicy,
        confidence: float,
        agrees: bool | None,
        *,
        probe: bool = False,
    ) -> None:
        """Note one row of the exit head."""

    def figures(self) -> dict[str, float]:
        """Figures under the names of the metrics."""
        return {}
