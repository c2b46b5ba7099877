"""What the tests of the service share: a tiny model on a free port, in a thread, and clients of it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig
from coachhook_fast.serve.app import Service
from coachhook_fast.serve.limits import Limits
from coachhook_fast.serve.server import listen, make_server

TOKEN = "secret-of-the-tests"
CONFIG = EditConfig(layers=(1, 2), v_num_grad_steps=4, mom2_update_weight=5.0, threshold_rule="zscore", threshold_z=1.0)
FACTS = [{name: fact[name] for name in ("prompt", "subject", "target_new")} for fact in tiny_facts(12)]
PROMPT = tiny_texts()[0]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def service_of(
    folder: Path, *, gate: str = "calibrated", token: str | None = TOKEN, ends: bool = False, **options: Any
) -> Service:
    """A service of a tiny model with statistics; `ends`: whether the model may end a text itself."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    if not ends:
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer.chat_template = CHAT_TEMPLATE
    limits = {name: options.pop(name) for name in list(options) if name in Limits.__dataclass_fields__}
    return Service(
        model, tokenizer, folder, token=token, config=CONFIG.replace(gate=gate), corpus=tiny_texts(),
        limits=Limits(**limits), **options,
    )  # fmt: skip


class Running:
    """A service that runs, in a thread, on a free port. `with Running(folder) as service:`"""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.token = options.get("token", TOKEN)
        self.service = service_of(folder, **options)
        self._listener = listen("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.server = make_server(self.service)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]})

    def __enter__(self) -> Running:
        self._thread.start()
        while not (self.server.started and self.service.statistics_ready):
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join()

    def client(self, token: str | None = None) -> httpx.Client:
        token = token or self.token
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.address, headers=headers, timeout=60)

    def raw(self, content: bytes, *, seconds: float = 10.0) -> bytes:
        """What the service says to these bytes until it closes the connection, or nothing comes for `seconds`."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.settimeout(seconds)
            connection.sendall(content)
            return received(connection)


def received(connection: socket.socket) -> bytes:
    parts: list[bytes] = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except (TimeoutError, ConnectionResetError):
        pass
    return b"".join(parts)


def ask(client: httpx.Client, **changes: Any) -> Any:
    """A greedy completion of eight tokens."""
    reply = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **changes})
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


def metrics_of(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
