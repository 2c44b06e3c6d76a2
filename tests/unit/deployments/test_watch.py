"""Requests end when the process that they hang on has died, and only then."""

from __future__ import annotations

import asyncio

from deployments.watch import ActorWatch


def test_the_requests_of_a_dead_actor_end():
    dead: set[str] = set()
    unknown: set[str] = set()
    ended: list[str] = []

    def is_alive(name: str) -> bool:
        if name in unknown:
            raise ConnectionError("the head does not answer")
        return name not in dead

    async def cancel(request_id: str) -> None:
        ended.append(request_id)
        if request_id == "a":
            raise RuntimeError("the engine has died")

    async def main() -> None:
        watch = ActorWatch(cancel, is_alive=is_alive, period_s=0.01)
        with watch.depending("x", "a"), watch.depending("x", "b"), watch.depending("y", "c"):
            with watch.depending("", "from a driver"), watch.depending("x", "done"):
                await asyncio.sleep(0.05)
            unknown.add("x")
            await asyncio.sleep(0.05)
            assert not ended
            unknown.clear()
            dead.add("x")
            await asyncio.sleep(0.1)
            assert sorted(ended) == ["a", "b"]
        dead.add("y")
        await asyncio.sleep(0.05)
        assert sorted(ended) == ["a", "b"]
        with watch.depending("y", "later"):  # it starts again after an idle time
            await asyncio.sleep(0.1)
        assert ended[-1] == "later"

    asyncio.run(main())


def test_one_strange_answer_is_not_believed():
    answers = iter([True, False, True, False])
    ended: list[str] = []

    async def cancel(request_id: str) -> None:
        ended.append(request_id)

    async def main() -> None:
        watch = ActorWatch(cancel, is_alive=lambda name: next(answers, True), period_s=0.01)
        with watch.depending("x", "a"):
            await asyncio.sleep(0.15)

    asyncio.run(main())
    assert not ended and next(answers, None) is None
