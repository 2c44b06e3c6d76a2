from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fathom import __version__
from tests.command_line import Fathom, fathom, fathom_here

__all__ = ["fathom", "fathom_here"]

COMMANDS = [
    "serve",
    "generate",
    "pull",
    "bench engine",
    "bench peers",
    "bench serve",
    "bench cluster",
    "bench policies",
    "chaos",
    "train exits",
    "train probe",
    "calibrate",
    "exits show",
    "tune",
    "promote",
    "rollback",
    "dashboard",
    "eval",
    "export",
    "doctor",
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples(fathom_here: Fathom, command: str) -> None:
    result = fathom_here(*command.split(), "--help")
    assert result.returncode == 0
    assert f"  fathom {command}" in result.stdout.split("examples:")[1]


def test_help_does_not_wait_for_heavy_imports() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fathom.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fathom.commands.serve" in imported
    assert not imported & {"torch", "ray", "transformers", "mlflow", "pyarrow", "scipy", "numpy"}


def test_version(fathom: Fathom) -> None:
    assert fathom("--version").stdout == f"fathom {__version__}\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("", "COMMAND"),
        ("nonsense", "invalid choice: 'nonsense'"),
        ("generate --mode deep hi", "choose from full, exact, rollback, free, copy"),
        ("generate --dtype int8 hi", "choose from float32, bfloat16, float16"),
        ("generate --exit-threshold 1.5 hi", "exit_threshold must be a number in [0, 1]"),
        ("generate --forced-exit-rate -1 hi", "forced_exit_rate must be a number in [0, 1]"),
        ("generate --max-stack 0 hi", "max_stack must be an integer from 1 to 64"),
        ("generate --new-tokens 0 hi", "--new-tokens must be an integer of at least 1"),
        ("generate --temperature 3 hi", "--temperature must be a number in [0, 2]"),
        ("generate --threads -2 hi", "threads must be an integer of at least 0"),
        ("generate --operating-point fast hi", "needs --operating-points FILE"),
        ("generate --operating-points none.yaml hi", "none.yaml: cannot read the"),
        ("exits", "fathom exits show"),
        ("exits show --url localhost", "URL must be as http://127.0.0.1:8000"),
        ("dashboard --server localhost", "--server must be as http://127.0.0.1:8000"),
        ("dashboard --host 0.0.0.0", "set FATHOM_API_KEY, or bind to 127.0.0.1"),
        ("dashboard --port 99999", "choose another --host or --port"),
        ("generate", "the prompt is empty"),
        ("generate --json out.jsonl hi", "--json and --resume belong to --prompts"),
        ("generate --prompts none.jsonl", "none.jsonl: cannot read the prompts"),
        ("generate --prompts a.jsonl hi", "not both"),
        ("generate --prompts a.jsonl --resume", "--resume needs --json"),
        ("serve --port 99999", "port must be from 1 to 65535"),
        ("serve --replicas 0", "num_replicas must be above 0"),
        ("serve --config none.yaml", "none.yaml: cannot read the configuration"),
        ("bench", "fathom bench engine"),
        ("bench engine --modes full,deep", "--modes must be a list of full, exact"),
        ("bench engine --batch 1,x", "--batch must be a list of integers"),
        ("bench engine --runs 0", "--runs must be at least 1"),
        ("bench engine --json none/out.json", "there is no such folder"),
        ("bench peers --peers vllm,nobody", "--peers must be a list of transformers, vllm"),
        ("bench peers --python vllm", "--python must be PEER=PATH"),
        ("bench peers --python vllm=none/python", "none/python is no file"),
        ("bench peers --bits 16,5", "--bits must be a list of 16, 8, 4"),
        ("bench peers --prompt-tokens -1", "--prompt-tokens must be at least 0"),
        ("bench serve --request-rate 0", "--request-rate must be above 0"),
        ("bench serve --slo ttft", "--goodput must be as ttft:500,tpot:50"),
        ("bench serve --sweep 1,0", "--sweep must be a list of rates above 0"),
        ("bench serve --plot out.png", "--plot draws a sweep"),
        ("bench serve --vocab-size 9", "add --endpoint /v1/completions"),
        ("bench serve --endpoint /v1/embeddings", "--endpoint must be /v1/completions"),
        ("bench serve --extra-body [1]", "--extra-body must be an object"),
        ("bench serve --base-url localhost", "--base-url must be as http://127.0.0.1:8000"),
        ("bench cluster --parts prefix,lunch", "--parts must be a list of exchange, prefix"),
        ("bench cluster --modes deep", "--modes must be a list of full, exact"),
        ("bench cluster --sequences 0", "--sequences must be at least 1"),
        ("chaos --requests 0", "--requests must be at least 1"),
        ("chaos --kill-every 0", "--kill-every must be above 0"),
        ("chaos --kinds deep,proxy", "--kinds must be a list of ingress, shallow, deep"),
        ("chaos --url http://127.0.0.1:1", "--url needs --config"),
        ("chaos --json none/out.json", "there is no such folder"),
        ("pull --source nowhere", "invalid choice: 'nowhere'"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(fathom_here: Fathom, args: str, says: str) -> None:
    result = fathom_here(*args.split())
    assert result.returncode == 2, result.stderr
    # Python's versions differ in quoting choices.
    assert says.replace("'", "") in result.stderr.replace("'", "")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_errors_end_a_process_in_the_same_way(fathom: Fathom) -> None:
    for args in ("nonsense", "generate --new-tokens 0 hi"):
        result = fathom(*args.split())
        assert result.returncode == 2, result.stderr
        assert "error: " in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_unknown_setting_in_a_file_names_the_known_ones(
    fathom_here: Fathom, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("engine:\n  modell: x\n")
    result = fathom_here("serve", "--config", "bad.yaml")
    assert result.returncode == 2
    assert "engine.modell: unknown setting; known: adapter, attention, block_size" in result.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no valid JSON"),
        ("[1]", "must be an object, got list"),
        ("{}", 'needs either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'needs either "prompt" or "messages"'),
        ('{"prompt": 3}', '"prompt" must be a non-empty string'),
        ('{"prompt": ""}', '"prompt" must be a non-empty string'),
        ('{"messages": []}', '"messages" must be a non-empty list'),
        ('{"messages": [{"role": "user"}]}', 'a message needs "role" and "content"'),
        ('{"messages": ["hi"]}', 'a message needs "role" and "content"'),
    ],
)
def test_a_bad_line_is_named_before_any_work(
    fathom_here: Fathom, tmp_path: Path, line: str, says: str
) -> None:
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "good"}}\n\n{line}\n')
    result = fathom_here("generate", "--prompts", "in.jsonl", "--json", "out.jsonl")
    assert result.returncode == 2
    assert f"in.jsonl:3: {says}" in result.stderr
    assert 'write {"prompt": "text"}' in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_missing_model_is_a_failure(fathom_here: Fathom) -> None:
    result = fathom_here("generate", "--model", "nobody/nothing-here", "hi")
    assert result.returncode == 1
    assert "fathom pull nobody/nothing-here" in result.stderr
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(fathom: Fathom) -> None:
    result = fathom("generate", "--new-tokens", "0", "hi", FATHOM_DEBUG="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_a_public_address_without_a_key_is_refused(fathom_here: Fathom) -> None:
    result = fathom_here("serve", "--host", "0.0.0.0")
    assert result.returncode == 2
    assert "FATHOM_API_KEY" in result.stderr
