"""vLLM as it comes loads what ``fathom export`` writes, and answers as it does without it.

Runs where ``FATHOM_VLLM_PYTHON`` names an interpreter that has vLLM 0.32, such as
``~/.cache/fathom/peers/vllm/bin/python``, which ``fathom bench peers`` makes.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fathom.cli import main
from fathom.models.errors import ModelError
from fathom.models.pull import pull
from fathom.models.tokenizer import load_tokenizer

PYTHON = os.environ.get("FATHOM_VLLM_PYTHON", "")
WORKER = Path(__file__).with_name("vllm_drafts.py")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
QUESTIONS = (
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total "
    "does it take?",
    "Tom has 3 boxes with 12 apples each and gives 7 away. How many apples are left?",
)

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="FATHOM_VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.timeout(900),
]


def run_vllm(model: str, speculative: dict[str, Any] | None) -> dict[str, Any]:
    tokenizer = load_tokenizer(Path(model))
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in QUESTIONS]
    settings = {
        "model": model, "dtype": "float32", "prompts": prompts, "new_tokens": 48,
        "speculative": speculative,
    }  # fmt: skip
    done = subprocess.run(
        [PYTHON, str(WORKER), json.dumps(settings)],
        capture_output=True, text=True, timeout=600, check=False,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(pull())
    except ModelError as error:
        pytest.skip(f"the default model is neither cached nor reachable: {error}")


def test_answers_are_the_same_with_drafts_and_without(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone: dict[str, Any] | None = None
    for name, options in (("whole", ["--vocab", "0"]), ("fewer", ["--vocab", "8192"])):
        out = tmp_path / name
        arguments = ["export", "--for", "vllm", "--model", model, "--adapter", "default"]
        assert main([*arguments, "--out", str(out), "--dtype", "float32", *options]) == 0
        command = shlex.split(capsys.readouterr().out)
        assert command[:2] == ["vllm", "serve"]
        speculative = json.loads(command[command.index("--speculative-config") + 1])
        assert speculative["method"] == "draft_model"
        alone = alone or run_vllm(command[2], None)
        assert "drafts" not in alone
        drafted = run_vllm(command[2], {**speculative, "num_speculative_tokens": 3})
        # In float32: in bfloat16 a pass over several rows rounds otherwise than one over one row,
        # and near ties between two tokens may go the other way.
        assert drafted["answers"] == alone["answers"]
        assert drafted["drafted"] == 3 * drafted["drafts"]
        # A draft that is wired wrongly is right in almost none.
        assert drafted["accepted_at"][0] / drafted["drafts"] > 0.4
        assert drafted["drafts"] < 0.7 * sum(map(len, alone["answers"]))
