"""Tiny random models, an offline tokenizer and made-up facts, shared by all tests.

Nothing here is downloaded. Every helper is seeded: the same arguments give the same bits. The sizes are odd
on purpose (a width of 37 finds a missing mask that 64 hides) and the weights are large enough that a random
model has opinions: its hidden states differ from token to token and its next-token distribution is not flat.

    model = tiny_model("llama", dtype=torch.float64)
    tokenizer = tiny_tokenizer()
    requests = [EditRequest(**fact) for fact in tiny_facts(4)]
    corpus = tiny_texts()

`FAMILIES` lists every supported architecture; `tiny_config(family, **overrides)` takes any config field.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")

# What this version of transformers calls the KV cache in arguments and results.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

VOCABULARY = 320  # 256 bytes, 3 special tokens, 61 merges
PAD, EOS, BOS = 0, 1, 2


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PLACES = _words("Lund Oslo Turin Porto Graz Leeds Nantes Ghent Basel Cork Brno Split")
_CRAFTS = _words("baker pilot judge miner tailor weaver farmer singer doctor sailor clerk")
_FIRST = _words("Ada Bruno Clara Dmitri Elin Farid Greta Hugo Ines Jonas Karin Leo Mira")
_LAST = _words("Vale Ostrow Quill Brandt Marsh Nilsen Okafor Pereira Rask Sato Thorn Ueda")
_TEMPLATES = (
    ("{} works as a", _CRAFTS),
    ("{} was born in", _PLACES),
    ("These days the home of {} is the city of", _PLACES),
    ("By trade, {} is a", _CRAFTS),
)
_SENTENCES = (
    "{name} walked from {a} to {b} in the rain.",
    "The {craft} of {a} met the {craft2} of {b} at the old market.",
    "In {year} there were {n} bridges over the river in {a}.",
    "{name} is a {craft}, and the sister of {name} was a {craft2} in {b}.",
    "Nobody in {a} had seen so much snow since {year}, said the {craft}.",
)

# What each family needs beyond the shared sizes. Windows are shorter than most prompts, so that they matter.
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 45,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 20, "n_inner": 37, "n_layer": 5, "n_head": 4, "n_positions": 256},
    "gptj": {"n_embd": 24, "n_inner": 43, "n_layer": 4, "n_head": 3, "rotary_dim": 4, "n_positions": 256},
    "gpt_neox": {
        "hidden_size": 24,
        "intermediate_size": 39,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "max_position_embeddings": 256,
    },
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 9},
    "qwen2": {**_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen3": _LLAMA_LIKE,
    "gemma2": {**_LLAMA_LIKE, "num_hidden_layers": 4, "sliding_window": 7, "query_pre_attn_scalar": 6},
    "gemma3_text": {**_LLAMA_LIKE, "num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 6},
    "phi3": _LLAMA_LIKE,
}


class _ExactRMSNorm(nn.Module):
    """RMSNorm in the dtype of its input. transformers computes it in fp32 whatever the model's dtype, which
    rounds an fp64 model to 6e-8 at every layer and would drown a comparison to 1e-8."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a tiny model of `family` (one of FAMILIES); `overrides` are config fields."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    model_type = "gemma3_text" if family == "gemma3" else family
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        **_SIZES[model_type],
        **overrides,
    }
    return AutoConfig.for_model(model_type, **fields)


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **overrides: Any,
) -> PreTrainedModel:
    """A random model of `family` in eval mode. Biases and norm weights are random too (transformers leaves
    them at 0 and 1, which hides a forgotten bias). In fp64 the RMSNorms really compute in fp64; GPT-J and
    Gemma 2 attention still has an fp32 softmax, so only the others suit comparisons finer than 1e-6."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.15 * torch.randn_like(parameter))
    if dtype == torch.float64:
        exact_norms(model)
    model.to(device=device, dtype=dtype).eval()
    model.generation_config.do_sample = False
    return model


def exact_norms(model: nn.Module) -> None:
    """From now on the RMSNorms of `model` compute in its dtype."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _ExactRMSNorm(child))


def tiny_tokenizer(*, bos: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A byte-level BPE over VOCABULARY tokens, trained on tiny_texts(): encodes any text, offsets included;
    `bos` makes it begin every text with the BOS token, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_texts(), trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)]),
            ]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side=padding_side,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def tiny_texts(n: int = 48, *, seed: int = 0) -> list[str]:
    """`n` short English texts of one to three sentences: a corpus for key statistics."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        sentences = [
            rng.choice(_SENTENCES).format(
                name=f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
                a=rng.choice(_PLACES),
                b=rng.choice(_PLACES),
                craft=rng.choice(_CRAFTS),
                craft2=rng.choice(_CRAFTS),
                year=rng.randint(1200, 2020),
                n=rng.randint(2, 90),
            )
            for _ in range(rng.randint(1, 3))
        ]
        texts.append(" ".join(sentences))
    return texts


def tiny_facts(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`n` made-up facts with distinct subjects, as keyword arguments of EditRequest; the subject stands at
    the start or in the middle of the prompt in turn."""
    rng = random.Random(seed)
    subjects = [f"{first} {last}" for first in _FIRST for last in _LAST]
    if n > len(subjects):
        raise ValueError(f"n must be at most {len(subjects)}, got {n}")
    facts = []
    for index, subject in enumerate(rng.sample(subjects, n)):
        prompt, answers = _TEMPLATES[index % len(_TEMPLATES)]
        target, truth = rng.sample(answers, 2)
        fact = {"prompt": prompt, "subject": subject, "target_new": target, "ground_truth": truth}
        facts.append({**fact, "case_id": index})
    return facts


@contextmanager
def watched(model: nn.Module) -> Iterator[list[list[Any]]]:
    """For each HookLinear of `model`, the GateTrace of every forward pass within the `with` block."""
    from coachhook_fast.hooks.layer import HookLinear  # the other helpers must not need the package

    hooks = [module for module in model.modules() if isinstance(module, HookLinear)]
    seen: list[list[Any]] = [[] for _ in hooks]

    def watch(position: int) -> Any:
        return lambda module, args: seen[position].append(module.trace(args[0]))

    handles = [hook.register_forward_pre_hook(watch(position)) for position, hook in enumerate(hooks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
