"""What a replica ratio stands for."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fathom.settings import ConfigError
from fathom.tuning.ratios import FUSED, check_ratio, replicas_of, serve_options


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.1, 256))
def test_replicas_share_the_cores_equally(shallow: int, deep: int, cpus: float) -> None:
    ratio = f"{shallow}:{deep}"
    check_ratio("space.replica_ratio", ratio)
    own = replicas_of(ratio, cpus)
    assert (own.shallow, own.deep) == (shallow, deep)
    together = own.cpus * (shallow + deep)
    # Ray counts ten thousandths of a core.
    assert together <= cpus + 1e-9
    assert together >= cpus - 1e-4 * (shallow + deep) - 1e-9


def test_fused_has_a_replica_for_each_whole_core() -> None:
    check_ratio("space.replica_ratio", FUSED)
    for cpus, count, each in ((0.5, 1, 0.5), (2, 2, 1.0), (3.5, 3, 1.1666)):
        own = replicas_of(FUSED, cpus)
        assert (own.shallow, own.deep, own.cpus) == (count, 0, each)
    assert serve_options({"replica_ratio": FUSED, "pause_drafting": False}, 2) == (
        "--replicas 2 --no-pause-drafting"
    )


@pytest.mark.parametrize("value", ["0:1", "65:1", "1:", "1:01", "2", "1:1:1", 1.5, True, None, 7])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r'space\.replica_ratio must .* "N:M" .* 1 to 64'):
        check_ratio("space.replica_ratio", value)


@given(st.integers(1, 59), st.integers(1, 59))
def test_what_yaml_takes_for_a_time_is_told_how_to_be_written(shallow: int, deep: int) -> None:
    value = yaml.safe_load(f"{shallow}:{deep}")
    if value == f"{shallow}:{deep}":  # a single digit behind the colon is no time to some versions
        return
    with pytest.raises(ConfigError, match=f'put it in quotes, "{shallow}:{deep}"'):
        check_ratio("space.replica_ratio", value)
