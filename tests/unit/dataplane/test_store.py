"""A deep stage that takes over from a lost one fetches from the KV store what it can."""

from __future__ import annotations

from fathom.types import AcceptMode, ComputePolicy
from tests.local_store import LocalStore
from tests.unit.dataplane.conftest import Deep
from tests.unit.engine.conftest import make_engine_of, request, run_one
from tests.unit.engine.test_shared_prefixes import LONG, settle

COMPUTE = ComputePolicy(mode=AcceptMode.EXACT, exit_threshold=0.2)


def test_a_new_deep_stage_loads_what_was_published(decoder, model_dir) -> None:
    store, deeps = LocalStore(), []

    def remote(local):
        # The replicas that follow the first one have the same layers and a pool of their own.
        other = make_engine_of(decoder, model_dir, 256, store=store)._deep
        deeps.extend([Deep(local), Deep(other)])
        return deeps[0].connect(peers=lambda: [deep.server.address for deep in deeps])

    engine = make_engine_of(decoder, model_dir, 256, remote, store=store)
    item = request("a", LONG, COMPUTE, max_tokens=60)
    expected = run_one(make_engine_of(decoder, model_dir, 256), item)
    engine.add_request(item)
    outputs = []
    while len(outputs) < 10:
        outputs += engine.step()
    settle(store)
    deeps[0].close()
    before = store.fetched
    while engine.has_work():
        outputs += engine.step()
    assert [token.id for output in outputs for token in output.tokens] == expected.ids
    assert store.fetched - before >= (len(LONG) - 1) // 8
    # The prompt's rows did not go there as states.
    assert deeps[1].worker.stats()["deep_rows"] * deeps[1].worker.stats()["deep_passes"] < len(LONG)
    engine.check_integrity()
    engine.close()
    deeps[1].close()
