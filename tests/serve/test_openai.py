"""/v1 with the official client: names, sampling, stops, streams, and answers equal to the model's own."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serve_cases import FACTS, PROMPT, TOKEN, Running, ask, text_of
from tiny import tiny_model, tiny_tokenizer
from tokenizers import processors

from coachhook_fast import load_edits
from coachhook_fast.evaluate import complete
from coachhook_fast.serve.asking import Asking
from coachhook_fast.serve.limits import Limits
from coachhook_fast.serve.schemas import CompletionBody, read

openai = pytest.importorskip("openai", reason="the openai client is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with Running(folder / "acme") as first, first.client() as client:
        assert client.post("/edits", json={"edits": FACTS[:4]}).status_code == 200
    with Running(folder / "edits", adapters={"acme": folder / "acme"}) as service:
        service.acme = folder / "acme"  # type: ignore[attr-defined]
        with service.client() as client:
            assert client.post("/edits", json={"edits": FACTS[4:8]}).status_code == 200
        yield service


@pytest.fixture
def client(running: Running) -> Any:
    return openai.OpenAI(base_url=f"{running.address}/v1", api_key=TOKEN, max_retries=0)


def plain(edits: Path | None, prompt: str = PROMPT, tokens: int = 8) -> str:
    """What the model alone says."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    if edits is not None:
        load_edits(model, edits)
    return complete(model, tiny_tokenizer(), [prompt], max_new_tokens=tokens)[0]


def test_models_are_the_edit_sets(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["base", "default", "acme"]
    assert client.models.retrieve("acme").id == "acme"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="a")


def test_a_name_picks_the_edits(client: Any, running: Running, tmp_path: Path) -> None:
    prompt = str(FACTS[0]["prompt"]).replace("{}", str(FACTS[0]["subject"]))
    folders = {"base": None, "default": running.service.editing.folder, "acme": running.acme}  # type: ignore[attr-defined]
    expected = {name: plain(folder, prompt) for name, folder in folders.items()}
    for name, text in expected.items():
        made = client.completions.create(model=name, prompt=prompt, max_tokens=8, temperature=0)
        assert made.choices[0].text == text, name
        assert made.choices[0].finish_reason == "length"
        assert made.usage.completion_tokens == 8
        assert made.usage.prompt_tokens == len(tiny_tokenizer()(prompt).input_ids)
    assert len(set(expected.values())) > 1
    version = running.service.editing.version
    assert (
        client.completions.create(model="default", prompt="a", max_tokens=1).system_fingerprint
        == f"coachhook-{version}"
    )


def test_prompts_and_answers_of_one_request(client: Any) -> None:
    ids = list(tiny_tokenizer()("A b c").input_ids)
    for prompt, count in ((["A b c", "A b"], 2), (ids, 1), ([ids, ids[:2]], 2)):
        made = client.completions.create(model="base", prompt=prompt, max_tokens=4, temperature=0, n=2)
        assert [choice.index for choice in made.choices] == list(range(2 * count))
        assert made.choices[0].text == plain(None, "A b c", 4)
        assert made.choices[1].text == made.choices[0].text


def test_streams_say_what_answers_say(client: Any) -> None:
    options: dict[str, Any] = {
        "model": "default",
        "prompt": [PROMPT, "A b"],
        "max_tokens": 12,
        "temperature": 0.8,
        "seed": 3,
    }
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert sum(choice.finish_reason is not None for chunk in chunks for choice in chunk.choices) == 2
    assert len(chunks) > 6  # it came in pieces


def test_chat_goes_through_the_template(client: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Hm?"}]},
    ]
    text = "system: Be brief.\nuser Ann: Hm?\nassistant:"
    made = client.chat.completions.create(model="base", messages=messages, max_completion_tokens=6, temperature=0)
    assert made.choices[0].message.content == plain(None, text, 6)
    assert made.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(model="base", messages=messages, max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == plain(None, text, 6)
    with pytest.raises(openai.BadRequestError, match="system comes first"):
        client.chat.completions.create(model="base", messages=[messages[1], messages[0]])


def test_a_prompt_goes_on_whatever_the_tokenizer_puts_behind_it() -> None:
    """As it does where it is edited: end-of-text tokens behind every text are left out."""
    ending = tiny_tokenizer()
    ending.backend_tokenizer.post_processor = processors.Sequence(
        [
            ending.backend_tokenizer.post_processor,
            processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)]),
        ]
    )
    assert ending("Ada")["input_ids"][-1] == ending.eos_token_id
    generator = SimpleNamespace(served=SimpleNamespace(model=tiny_model("llama")))
    asking = Asking(generator, ending, Limits())  # type: ignore[arg-type]
    found = asyncio.run(asking.completion_ids(read(CompletionBody, b'{"prompt": ["Ada", "Ada<eos>"]}')))
    asking.close()
    assert found == [tuple(tiny_tokenizer()(text)["input_ids"]) for text in ("Ada", "Ada<eos>")]


def test_seeds_repeat_and_differ(client: Any) -> None:
    def drawn(seed: int, **options: Any) -> list[str]:
        made = client.completions.create(model="base", prompt=PROMPT, max_tokens=10, n=3, seed=seed, **options)
        return [choice.text for choice in made.choices]

    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first
    assert len(set(first)) == 3  # answers of one request are drawn apart
    assert len(set(drawn(5, top_p=1e-9))) == 1  # the best token alone is left
    assert drawn(5, top_p=1e-9) == drawn(6, temperature=0)


def test_stop_strings_end_a_text_before_them(client: Any) -> None:
    options: dict[str, Any] = {"model": "base", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[5:9]
    made = client.completions.create(**options, stop=[stop, "never there"])
    assert made.choices[0].text == whole[: whole.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == made.choices[0].text


def test_logprobs_are_the_models(client: Any) -> None:
    made = client.completions.create(model="base", prompt="A b c", max_tokens=3, temperature=0, logprobs=2).choices[0]
    model, ids = tiny_model("llama"), tiny_tokenizer()("A b c").input_ids
    with torch.no_grad():
        best = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).topk(2)
    assert len(made.logprobs.tokens) == 3
    assert made.logprobs.token_logprobs[0] == pytest.approx(float(best.values[0]), abs=1e-4)
    assert max(made.logprobs.top_logprobs[0].values()) == pytest.approx(float(best.values[0]), abs=1e-4)
    chat = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "a"}], max_tokens=2, logprobs=True, top_logprobs=3
    )
    assert [len(entry.top_logprobs) for entry in chat.choices[0].logprobs.content] == [3, 3]


def test_what_is_not_supported_is_refused_by_name(client: Any) -> None:
    for options, word in (
        ({"frequency_penalty": 1.0}, "frequency_penalty"), ({"echo": True}, "echo"), ({"n": 17}, "n times prompts"),
        ({"max_tokens": 5000}, "max_tokens"), ({"temperature": 3.0}, "temperature"),
        ({"extra_body": {"top_k": 4}}, "top_k"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"),
        ({"max_tokens": 300}, "more than the 256"), ({"prompt": "a " * 400}, "more than the 256"),
        ({"prompt": [9999]}, "ids"), ({"stop": ["a"] * 5}, "stop"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=word):
            client.completions.create(**{"model": "base", "prompt": "A b", **options})
    for options, field in (({"stop": ""}, "stop"), ({"extra_body": {"top-k": 4}}, "top-k")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**{"model": "base", "prompt": "A b", **options})
        assert caught.value.param == field
    made = client.completions.create(
        model="base",
        prompt="A b",
        max_tokens=1,
        frequency_penalty=0,
        user="u",
        best_of=1,
        logit_bias={},
        extra_body={"store": None},
    )
    assert made.usage.completion_tokens == 1


def test_no_request_means_less_than_it_says(client: Any) -> None:
    chat = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    for options, word in (
        ({"top_logprobs": 2}, "top_logprobs is for logprobs"), ({"max_completion_tokens": 2}, "one setting"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "is for a stream"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=word):
            client.chat.completions.create(**{**chat, **options})
    neutral = {"top_logprobs": 0, "max_completion_tokens": 1, "logprobs": False}
    assert client.chat.completions.create(**{**chat, **neutral}).usage.completion_tokens == 1


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_batches_answer_as_single_requests_do(gate: str, tmp_path: Path) -> None:
    """Requests of other lengths, names and sampling that wait together."""
    import threading

    with Running(tmp_path / "edits", gate=gate, workers=1) as service, service.client() as client:
        assert client.post("/edits", json={"edits": FACTS[:4]}).status_code == 200
        cases = [
            {"model": name, "prompt": PROMPT[:length], "max_tokens": tokens, "temperature": heat, "seed": 7}
            for name in ("base", "default")
            for length, tokens, heat in ((20, 12, 0), (40, 5, 0), (9, 9, 0.7), (60, 3, 0))
        ]
        alone = [text_of(ask(client, **case)) for case in cases]
        together: dict[int, str] = {}

        def run(index: int) -> None:
            with service.client() as mine:
                together[index] = text_of(ask(mine, **cases[index]))

        blocking = threading.Thread(target=lambda: ask(client, max_tokens=60))
        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(cases))]
        for thread in [blocking, *threads]:
            thread.start()
        for thread in [blocking, *threads]:
            thread.join()
        assert [together[index] for index in range(len(cases))] == alone
        batches = service.service.metrics.text({})
        count = next(line for line in batches.splitlines() if line.startswith("coachhook_batches_generated_total"))
        assert float(count.rpartition(" ")[2]) < 2 * len(cases) + 1  # some went together


def test_an_answer_that_was_given_is_kept_by_nobody(tmp_path: Path) -> None:
    """Without the garbage collector: among a model's objects it comes by seldom, and finds prompts and answers late."""
    with Running(tmp_path / "edits", workers=1) as service, service.client() as client:
        jobs: list[weakref.ref[Any]] = []
        start = service.service.asking.start

        def watched(*args: Any) -> Any:
            answers = start(*args)
            jobs.append(weakref.ref(answers.job))
            return answers

        service.service.asking.start = watched  # type: ignore[method-assign]
        gc.disable()
        try:
            ask(client)
            assert client.post("/v1/completions", json={"prompt": PROMPT, "stream": True}).text.endswith("[DONE]\n\n")
            end = time.monotonic() + 5
            while any(job() is not None for job in jobs) and time.monotonic() < end:
                time.sleep(0.01)
            assert [job() for job in jobs] == [None, None]
        finally:
            gc.enable()
