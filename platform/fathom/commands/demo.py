"""What ``fathom serve`` shows: one streamed answer with its depths, and how to call the server.

It talks to the server over HTTP as any client would, so that what is shown is what a user gets.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from fathom.commands.terminal import depth_colour, describe_mode

QUESTION = "Explain in three sentences why the sky is blue."
NEW_TOKENS = 96


class Client:
    """The few requests that the demonstration needs.

    Args:
        url: of the server, without a path. Its key is the first of ``FATHOM_API_KEY``.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.key = os.environ.get("FATHOM_API_KEY", "").split(",")[0].strip()

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of a streamed chat completion.

        Raises:
            RuntimeError: with the server's words, if it does not answer.
        """
        address = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        try:
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body), self._headers()
            )  # fmt: skip
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read().decode(errors='replace')}")
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(data)
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        return headers | {"Authorization": f"Bearer {self.key}"} if self.key else headers


def show_answer(client: Client, model: str, console: Console) -> None:
    """Ask the server something, and show the answer with its depths as it comes."""
    console.print(f"\n> {QUESTION}", style="bold")
    answer = _Answer()
    start, first = time.perf_counter(), None
    for chunk in client.stream(
        {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "depths": True,
            "logprobs": True,  # brings each token's text, so that each can take its own colour
        }
    ):
        if "error" in chunk:  # the stream had begun, so its status could not tell
            raise RuntimeError(chunk["error"]["message"])
        answer.usage = chunk.get("usage") or answer.usage
        for choice in chunk["choices"]:
            console.print(answer.add(choice), end="", soft_wrap=True, highlight=False)
        first = first or (time.perf_counter() if answer.depths else None)
    seconds = time.perf_counter() - start
    ttft = ((first or start) - start) * 1e3
    compute = answer.usage["compute"]
    lines = (
        "",
        f"\ndepths: {' '.join(map(str, answer.depths))}",
        f"{len(answer.depths)} tokens in {seconds:.2f} s, the first after {ttft:.0f} ms · mode "
        f"{describe_mode(compute['mode'])} · exits {compute['exit_rate']:.0%} · "
        f"{compute['layers_per_token']:.1f} layers/token · mean depth {compute['mean_depth']:.1f}",
    )
    for line in lines:
        console.print(line, style="dim", highlight=False, soft_wrap=True)


class _Answer:
    """Depths and usage of a streamed answer, gathered chunk by chunk."""

    def __init__(self) -> None:
        self.depths: list[int] = []
        self.usage: dict[str, Any] = {}

    def add(self, choice: dict[str, Any]) -> Text:
        """Take a chunk's choice; returns its text, each token in the colour of its depth."""
        new = choice.get("depths") or []
        self.depths += new
        content = choice["delta"].get("content") or ""
        texts = [entry["token"] for entry in (choice.get("logprobs") or {}).get("content") or []]
        # A character that spans tokens has no text of its own in either of them.
        if "".join(texts) != content or len(texts) != len(new):
            return Text(content)
        line = Text()
        for text, depth in zip(texts, new, strict=True):
            # The API does not tell the number of layers; some token soon needs all of them.
            line.append(text, depth_colour(depth, max(self.depths)))
        return line


def show_calls(client: Client, model: str, console: Console, *, full_depth: bool = False) -> None:
    """Say how to call the server: with curl, and with OpenAI's client.

    Args:
        full_depth: it knows mode ``full`` alone.
    """
    modes = ["full", "full"] if full_depth else ["exact", "free"]
    curls, clients = (
        json.dumps({"mode": mode} if full_depth else {"mode": mode, "exit_threshold": 0.8})
        for mode in modes
    )
    header = ' \\\n  -H "Authorization: Bearer $FATHOM_API_KEY"' if client.key else ""
    imports = "import os\n" if client.key else ""
    key = 'os.environ["FATHOM_API_KEY"]' if client.key else '"none"'
    console.print(
        f"""
Serving {model} at {client.url}. Call it:

curl {client.url}/v1/chat/completions -H 'Content-Type: application/json'\
{header} \\
  -d '{{"model": "{model}", "max_tokens": 64, "depths": true,
       "compute": {curls},
       "messages": [{{"role": "user", "content": "Hello!"}}]}}'

{imports}from openai import OpenAI
client = OpenAI(base_url="{client.url}/v1", api_key={key})
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "Hello!"}}],
    extra_body={{"compute": {clients}, "depths": True}},
)
print(answer.choices[0].message.content, answer.choices[0].depths, answer.usage.compute)

Ctrl-C stops the server.""",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
