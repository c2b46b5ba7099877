"""Text for key statistics: from a file, strings, token ids, a `datasets` dataset, or sampled from the model itself."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast import files
from coachhook_fast.models.placement import input_device

# Between documents in a corpus' text (`joined`): no token.
BOUNDARY = -1

_SHORT_PREFIX = 6  # tokens of a text's beginning
_SPACES = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write a space

Corpus = str | Path | Iterable[str] | Iterable[Sequence[int]] | Iterable[Mapping[str, Any]]


def read_documents(corpus: Corpus, tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Token ids of the corpus' documents, without special tokens, until `max_tokens` are reached.

    Args:
        corpus: path of a UTF-8 text file (documents are separated by blank lines), or an iterable of strings, of token
            id sequences, or of records with a "text" field (a `datasets` dataset).

    Raises:
        ValueError: the file does not exist, a record has no "text", or there is no text at all.
        TypeError: an item is of none of these kinds.
    """
    documents = cut_documents((_token_ids(item, i, tokenizer) for i, item in enumerate(_items(corpus))), max_tokens)
    if not documents:
        raise ValueError(f"corpus holds no text: {corpus!r:.100}")
    return documents


def cut_documents(documents: Iterable[list[int]], max_tokens: int) -> list[list[int]]:
    """The documents with tokens among the first `max_tokens`, the last of them cut there; no more are asked for."""
    kept: list[list[int]] = []
    room = max_tokens
    for document in documents:
        if document and room > 0:
            kept.append(document[:room])
            room -= len(kept[-1])
        if room <= 0:
            break
    return kept


def with_short_prefixes(
    documents: Iterable[Sequence[int]], tokenizer: Any, share: float, *, seed: int = 0
) -> Iterator[list[int]]:
    """The documents, and among them short texts that begin where one of their words does: `share` of all tokens.

    Prompts are short, and their first tokens, which look at little but the attention sink, have keys of their own; in
    documents such tokens are rare.
    """
    generator = random.Random(seed)
    owed = 0.0
    for document in documents:
        yield list(document)
        # What a document without room for one owes is its successors' to pay, up to one.
        owed = min(owed, _SHORT_PREFIX) + len(document) * share / (1.0 - share)
        starts = _word_starts(document, tokenizer) if owed >= _SHORT_PREFIX else []
        while owed >= _SHORT_PREFIX and starts:
            start = generator.choice(starts)
            # Encoded anew, since many tokenizers write a text's first word otherwise than one behind a space.
            text = tokenizer.decode(list(document[start : start + _SHORT_PREFIX + 2])).strip()
            prefix = list(tokenizer(text, add_special_tokens=False)["input_ids"])[:_SHORT_PREFIX]
            if prefix:
                yield prefix
            owed -= max(1, len(prefix))


def _word_starts(document: Sequence[int], tokenizer: Any) -> list[int]:
    """Places where a word begins with a room of `_SHORT_PREFIX` tokens behind; every place where tokens hide it."""
    places = range(max(0, len(document) - _SHORT_PREFIX - 1))
    tokens = tokenizer.convert_ids_to_tokens(list(document))
    marked = [i for i in places if isinstance(tokens[i], str) and tokens[i][:1] in _SPACES and tokens[i][1:2].isalnum()]
    return marked or list(places)


def content_hash(documents: Sequence[Sequence[int]]) -> str:
    """sha256 of the documents' tokens and boundaries, 16 hex digits."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(torch.tensor([len(document), *document], dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


def sample_documents(
    model: nn.Module,
    tokenizer: Any,
    max_tokens: int,
    *,
    seed: int = 0,
    length: int = 128,
    batch_size: int = 128,
) -> Iterator[list[int]]:
    """Documents that the model writes itself (temperature 1), `length` tokens each, `max_tokens` in all.

    They begin at the tokenizer's BOS token, or its EOS token where it has none. The caller's random state is kept.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("tokenizer has neither a BOS nor an EOS token to begin texts with: pass a corpus instead")
    device = input_device(model)
    generate: Any = model.generate
    written = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        while written < max_tokens:
            rows = min(batch_size, -(-(max_tokens - written) // length))
            texts = generate(
                torch.full((rows, 1), start, device=device),
                attention_mask=torch.ones((rows, 1), dtype=torch.int64, device=device),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length, min_new_tokens=length, pad_token_id=start,
            )  # fmt: skip
            for text in texts[:, 1:].tolist():
                yield text[: max_tokens - written]
                written += min(length, max_tokens - written)
                if written >= max_tokens:
                    return


def begin_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text (BOS, mostly; often none)."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def pack_rows(documents: Iterable[Sequence[int]], begin: Sequence[int], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fills rows of `length` tokens with documents, one after the other: (input_ids, position_ids), each [length].

    A document that does not fit goes on in the next row as a sequence of its own. Every sequence starts at position 0
    with the `begin` tokens; transformers keeps packed sequences apart by these positions.
    The last row is shorter.
    """
    ids: list[int] = []
    positions: list[int] = []
    for document in documents:
        rest = list(document)
        while rest:
            room = length - len(ids)
            if room <= len(begin):
                yield torch.tensor(ids), torch.tensor(positions)
                ids, positions, room = [], [], length
            piece = [*begin, *rest[: room - len(begin)]]
            rest = rest[room - len(begin) :]
            ids += piece
            positions += range(len(piece))
    if ids:
        yield torch.tensor(ids), torch.tensor(positions)


def sequences_of(rows: Iterable[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """The sequences inside packed rows: each begins where the position is 0."""
    found: list[list[int]] = []
    for ids, positions in rows:
        for token, position in zip(ids.tolist(), positions.tolist(), strict=True):
            if position == 0:
                found.append([])
            found[-1].append(token)
    return found


def _items(corpus: Corpus) -> Iterator[Any]:
    if isinstance(corpus, (str, Path)):
        path = Path(corpus)
        if not path.exists():
            raise ValueError(f"corpus file {str(path)!r} does not exist")
        try:
            yield from _paragraphs(files.text_lines(path))
        except ValueError as error:
            raise ValueError(f"corpus file {error}") from error
    elif isinstance(corpus, Iterable):
        yield from corpus
    else:
        raise TypeError(f"corpus must be a path or an iterable of texts, got {type(corpus).__name__}: {corpus!r:.80}")


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    size = 0
    for line in chain(lines, [""]):
        blank = not line.strip()
        if paragraph and (blank or size + len(line) > files.MOST_LINE):  # one without end goes in pieces
            yield "".join(paragraph).strip()
            paragraph, size = [], 0
        if not blank:
            paragraph.append(line)
            size += len(line)


def _token_ids(item: Any, index: int, tokenizer: Any) -> list[int]:
    if isinstance(item, Mapping):
        if "text" not in item:
            raise ValueError(f"corpus record {index} has no field 'text', it has {sorted(item)}")
        item = item["text"]
    if isinstance(item, str):
        return list(tokenizer(item, add_special_tokens=False)["input_ids"])
    if isinstance(item, Tensor):
        item = item.tolist()
    if isinstance(item, Sequence) and all(isinstance(token, int) for token in item):
        return list(item)
    raise TypeError(f"corpus item {index} must be text, token ids or a record, got {type(item).__name__}: {item!r:.80}")


def joined(documents: Sequence[Sequence[int]]) -> Tensor:
    """[N] int32: the documents' tokens behind one another, BOUNDARY before each."""
    return torch.tensor([token for document in documents for token in (BOUNDARY, *document)], dtype=torch.int32)
