"""EditRequest: validation, the lookup position, and the joint tokens of prompt and target."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer

from coachhook_fast import EditRequest
from coachhook_fast.request import encode_prompt_target, last_token_before, tokenise_batch


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "The tower is in", "subject": "Eiffel", "target_new": "Rome"}, "subject 'Eiffel' does not stand"),
        ({"prompt": "{} is in {}", "subject": "Eiffel", "target_new": "Rome"}, "has 2 slots"),
        ({"prompt": "{} is in", "subject": " ", "target_new": "Rome"}, "subject is empty"),
        ({"prompt": "{} is in", "subject": "\u200b\u2060 ", "target_new": "Rome"}, "subject is empty"),
        ({"prompt": "{} is in", "subject": "\x00", "target_new": "Rome"}, "subject is empty"),
        ({"prompt": "{} is in", "subject": "Eiffel", "target_new": "\n"}, "target_new is empty"),
        ({"prompt": "", "subject": "Eiffel", "target_new": "Rome"}, "prompt is empty"),
    ],
)
def test_refuses_bad_fields(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EditRequest(**fields)


def test_refuses_wrong_types() -> None:
    with pytest.raises(TypeError, match="target_new must be a string, got 7"):
        EditRequest("{} is in", "Eiffel", 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [("{} plays the", "Åse Vale"), ("Of all, Ada Vale plays the", "Ada Vale"), ("Ada met Ada", "Ada"), ("{}", "Oslo")],
)
def test_lookup_is_the_token_with_the_subjects_last_character(prompt: str, subject: str, bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    request = EditRequest(prompt, subject, "horn")
    for row in request.tokenise(tokenizer, ["Because of it", "I"]).rows:
        upto = tokenizer.decode(row.prompt[: row.lookup + 1], skip_special_tokens=True)
        before = tokenizer.decode(row.prompt[: row.lookup], skip_special_tokens=True)
        assert subject in upto
        assert len(before) < upto.rindex(subject) + len(subject)


def test_lookup_takes_the_last_occurrence_without_a_slot_and_the_slot_with_one() -> None:
    assert EditRequest("Ada met Ada in", "Ada", "Oslo").subject_end == len("Ada met Ada")
    assert EditRequest("{} met Ada in", "Ada", "Oslo").subject_end == len("Ada")


def test_slow_tokenizers_find_the_same_token() -> None:
    tokenizer = tiny_tokenizer()

    class Slow:
        is_fast = False

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": tokenizer(text)["input_ids"]}

    text = "By trade, Clara Quill is a"
    end = len("By trade, Clara Quill")
    assert last_token_before(Slow(), text, end) == last_token_before(tokenizer, text, end)


def test_prompt_and_target_join_with_one_space() -> None:
    tokenizer = tiny_tokenizer()
    prompt, target = encode_prompt_target(tokenizer, "Ada was born in", "Lund")
    assert tokenizer.decode(prompt + target) == "Ada was born in Lund"
    assert encode_prompt_target(tokenizer, "Ada was born in", " Lund") == (prompt, target)
    assert prompt == tokenizer("Ada was born in")["input_ids"]


class TestBatch:
    tokenizer = tiny_tokenizer()
    request = EditRequest("{} works as a", "Ada Vale", "baker")

    def tokenise(self, *requests: EditRequest, limit: int | None = None) -> None:
        tokenise_batch(requests, self.tokenizer, ["I"], limit)

    def test_empty(self) -> None:
        with pytest.raises(ValueError, match="requests is empty"):
            self.tokenise()

    def test_not_a_request(self) -> None:
        with pytest.raises(TypeError, match=r"requests\[1\] must be an EditRequest, got dict"):
            self.tokenise(self.request, {"prompt": "x"})  # type: ignore[arg-type]

    def test_duplicate(self) -> None:
        same = EditRequest("Ada Vale  works as a", "Ada Vale", " baker")
        with pytest.raises(ValueError, match=r"requests\[1\] repeats requests\[0\]: 'Ada Vale"):
            self.tokenise(self.request, same)

    def test_contradiction(self) -> None:
        other = EditRequest("{} works as a", "Ada Vale", "pilot")
        with pytest.raises(ValueError, match=r"requests\[1\] contradicts \(target 'baker'\) requests\[0\]"):
            self.tokenise(self.request, other)

    def test_too_long(self) -> None:
        with pytest.raises(ValueError, match=r"requests\[0\].prompt takes \d+ tokens .* context is 5"):
            self.tokenise(self.request, limit=5)


def test_the_end_that_a_tokenizer_puts_behind_every_text_is_no_part_of_a_prompt() -> None:
    from tokenizers import processors

    from coachhook_fast.request import prompt_ids

    plain, ending = tiny_tokenizer(), tiny_tokenizer()
    ending.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)]),
        ]
    )
    assert ending("Ada")["input_ids"][-1] == ending.eos_token_id
    fact = EditRequest(
        "{} works as a", "Ada Vale", "baker", paraphrases=("By trade, {} is a",), keep=("{} was born in",)
    )
    contexts = ("The old market", "A text about {} mentions")
    assert fact.tokenise(ending, contexts) == fact.tokenise(plain, contexts)
    assert prompt_ids(ending, "Ada<eos>") == [*prompt_ids(plain, "Ada"), 1]  # the text's own stays
    assert prompt_ids(plain, "Ada<eos><eos>") == [*prompt_ids(plain, "Ada"), 1, 1]
    assert prompt_ids(ending, "") == []
