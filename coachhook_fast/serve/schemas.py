"""Requests as they may be written: every field known, of its kind and within bounds; all else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from coachhook_fast.files import parse_json
from coachhook_fast.serve.errors import ApiError

Body = TypeVar("Body", bound=BaseModel)

DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI's
# Taken and without effect: they change no answer. What would change one is refused unless it is neutral.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}), "best_of": (None, 1),
    "echo": (None, False), "suffix": (None, ""), "tools": (None, []), "tool_choice": (None, "none"),
    "parallel_tool_calls": (None, True, False), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}  # fmt: skip


def _whole(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a character (a lone surrogate)")
    return text


Text = Annotated[str, AfterValidator(_whole)]
Filled = Annotated[str, Field(min_length=1), AfterValidator(_whole)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Sampling(_Strict):
    model: Filled = "default"
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    n: int | None = Field(default=None, ge=1)
    stop: Filled | Annotated[list[Filled], Field(max_length=4)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in NEUTRAL.items():
            if name in data and data[name] not in neutral:
                raise ValueError(f"{name} is not supported, other than as {neutral[-1]!r}")
        return {name: value for name, value in data.items() if name not in IGNORED and name not in NEUTRAL}

    @model_validator(mode="after")
    def _usage_of_a_stream(self) -> _Sampling:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options.include_usage is for a stream: set stream to true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(_Sampling):
    """POST /v1/completions. `prompt`: a text, token ids, or a list of either."""

    prompt: Filled | list[Filled] | list[Token] | list[list[Token]] = Field(min_length=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)


class Part(_Strict):
    type: Annotated[str, Field(pattern="^text$")]
    text: Text


class Message(_Strict):
    role: Annotated[str, Field(pattern="^(system|developer|user|assistant)$")]
    content: Text | list[Part]
    name: Text | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_meaning(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: set logprobs to true")
        if None not in (self.max_tokens, self.wanted) and self.max_tokens != self.wanted:
            raise ValueError("max_tokens and max_completion_tokens are one setting: give one of them")
        return self

    @property
    def wanted(self) -> int | None:
        """Tokens to write."""
        return self.max_completion_tokens or self.max_tokens


class Fact(_Strict):
    """An EditRequest."""

    prompt: Text
    subject: Text
    target_new: Text
    ground_truth: Text | None = None
    case_id: Seed | Text | None = None
    paraphrases: list[Text] = Field(default=[], max_length=64)
    keep: list[Text] = Field(default=[], max_length=64)


class EditsBody(_Strict):
    """POST /edits."""

    edits: list[Fact] = Field(min_length=1)


class PreviewBody(EditsBody):
    """POST /edits/preview. `questions`: other prompts to compare before and after."""

    questions: list[Filled] = []
    max_tokens: int = Field(default=16, ge=1, le=64)


class InspectBody(_Strict):
    """POST /inspect."""

    prompt: Filled
    model: Filled = "default"


def read(kind: type[Body], content: bytes) -> Body:
    """`content` as a `kind`.

    Raises:
        ApiError: 400, with the field: it is no UTF-8 or JSON, a key stands twice, or a field is unknown, missing, of
            another kind or out of bounds.

    read(EditsBody, b'{"edits": []}')
    """
    try:
        return kind.model_validate(parse_json(content.decode()))
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", code="not_json") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        known = first["type"] != "extra_forbidden"  # then all parts but pydantic's names of a field's kinds are ours
        parts = [str(part) for part in first["loc"] if not known or isinstance(part, int) or part.isidentifier()]
        place = ".".join(parts) or None
        raise ApiError(
            400, f"{place or 'the body'}: {first['msg'].removeprefix('Value error, ')}", param=place, code="invalid"
        ) from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="not_json") from None
