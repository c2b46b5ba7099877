"""EasyEdit's calling convention over our editor: a script written for zjunlp/EasyEdit runs with its import changed.

    from coachhook_fast.integrations.easyedit import BaseEditor, MEMITHyperParams      # was: from easyeditor import ...
    hparams = MEMITHyperParams.from_hparams("hparams/MEMIT/gpt2-xl.yaml")
    metrics, edited_model, weights_copy = BaseEditor.from_hparams(hparams).edit(
        prompts=["The mother tongue of Danielle Darrieux is"], subject=["Danielle Darrieux"], target_new=["English"],
    )

What differs is in docs/easyedit.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coachhook_fast.config import EditConfig, settings_in, yaml_mapping
from coachhook_fast.editing.editor import Editor
from coachhook_fast.edits.edit_set import Batch
from coachhook_fast.evaluate.scoring import Pair, encode_pair, score_distinct
from coachhook_fast.models.loading import context_length, load_model
from coachhook_fast.request import EditRequest, filled, tokenise_batch
from coachhook_fast.statistics.corpus import Corpus

Texts = str | Sequence[str]
Inputs = Mapping[str, Mapping[str, Any]]
Answers = Mapping[Pair, Sequence[int]]  # a fact's questions, and the tokens predicted
_NO_ANSWER = "<|endoftext|>"  # EasyEdit's ground truth where none is given
_WITHOUT_MEANING = {"train_ds", "keep_original_weight", "copy", "return_orig_weights", "loc_prompts"}
_TOKEN_ACCURACY = ("exact match", "token_em", "token em")  # EasyEdit's names of its default
_log = logging.getLogger(__name__)


@dataclass
class CoachHooKHyperParams:
    """What an hparams file of EasyEdit says.

    Attributes:
        model_name: hub name, folder, or the pair (model, tokenizer) itself.
        config: our settings; keys that have no meaning here are passed over, unknown ones refused.
        device: a GPU's number, or a device's name; None: the GPU where there is one.
        fp16, model_parallel: load in half precision; share the model out over all devices.
        batch_size: facts a batch of `batch_edit`.
    """

    model_name: Any
    config: EditConfig
    device: int | str | None = None
    fp16: bool = False
    model_parallel: bool = False
    batch_size: int = 1

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> CoachHooKHyperParams:
        """Reads a YAML file; ".yaml" is added where the name lacks it, as EasyEdit does.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not YAML, names no model, or holds an unknown or wrong setting.

        Example:
            hparams = CoachHooKHyperParams.from_hparams("hparams/MEMIT/gpt2-xl")
        """
        path = Path(hparams_name_or_path)
        path = path if path.suffix in (".yaml", ".yml") else path.with_name(f"{path.name}.yaml")
        values = yaml_mapping(path)
        config = EditConfig.from_dict(settings_in(values))
        if not isinstance(values.get("model_name"), str):
            raise ValueError(f"{path} must name the model as model_name, got {values.get('model_name')!r}")
        known = {name: values[name] for name in ("device", "fp16", "model_parallel", "batch_size") if name in values}
        return cls(values["model_name"], config, **known)

    def __post_init__(self) -> None:
        name = self.model_name
        pair = isinstance(name, tuple) and len(name) == 2 and isinstance(name[0], torch.nn.Module) and callable(name[1])
        if not pair and (not isinstance(name, str) or not name.strip()):
            raise TypeError(f"model_name must be a hub name, a folder or the pair (model, tokenizer), got {name!r}")
        _check_batch_size(self.batch_size)
        _check_flags(fp16=self.fp16, model_parallel=self.model_parallel)
        if isinstance(self.device, bool) or not isinstance(self.device, (int, str, type(None))):
            raise TypeError(f"device must be a GPU's number or a device's name, got {self.device!r}")
        if isinstance(self.device, int) and self.device < 0:
            raise ValueError(f"a GPU's number in device must be 0 or above, got {self.device}")

    @property
    def placement(self) -> str | None:
        """`load_model`'s device."""
        if self.model_parallel:
            return "auto"
        if isinstance(self.device, int):
            return f"cuda:{self.device}" if torch.cuda.is_available() else None
        return self.device


MEMITHyperParams = CoachHooKHyperParams


class BaseEditor:
    """EasyEdit's editor of one model; every method is ours.

    Attributes:
        model, tok: the model, with hooks, and its tokenizer; hparams: what it was made from; editor: our own editor.
    """

    @classmethod
    def from_hparams(cls, hparams: CoachHooKHyperParams, *, corpus: Corpus | None = None) -> BaseEditor:
        """See `__init__`."""
        return cls(hparams, corpus=corpus)

    def __init__(self, hparams: CoachHooKHyperParams, *, corpus: Corpus | None = None) -> None:
        """Loads the model and installs hooks.

        Args:
            corpus: ordinary text for the key statistics, which EasyEdit takes from `mom2_dataset`; None: text that the
                model writes itself (`Editor.collect_statistics`).

        Raises:
            TypeError: hparams is of another class. ValueError: see `load_model` and `Editor`.
        """
        if not isinstance(hparams, CoachHooKHyperParams):
            raise TypeError(f"hparams must be a CoachHooKHyperParams (from_hparams reads one), got {hparams!r}")
        self.hparams, self._corpus = hparams, corpus
        if isinstance(hparams.model_name, str):
            dtype = torch.float16 if hparams.fp16 else torch.float32
            self.model, self.tok = load_model(hparams.model_name, dtype=dtype, device=hparams.placement)
        else:
            self.model, self.tok = hparams.model_name
        self.editor = Editor(self.model, self.tok, hparams.config)

    def edit(
        self,
        prompts: Texts,
        target_new: Texts,
        ground_truth: Texts | None = None,
        rephrase_prompts: Texts | None = None,
        locality_inputs: Inputs | None = None,
        portability_inputs: Inputs | None = None,
        sequential_edit: bool = False,
        verbose: bool = True,
        *,
        subject: Texts | None = None,
        train_rephrase: bool = False,
        batch_size: int = 1,
        **kwargs: Any,
    ) -> tuple[list[dict[str, Any]], Any, Callable[[], None]]:
        """Edits batch by batch and measures each fact before and after.

        Args:
            prompts, target_new, ground_truth, subject: one text a fact; the subject stands in its prompt.
            rephrase_prompts: one text, or list of texts, a fact: measured, and not learned from.
            locality_inputs, portability_inputs: {name: {"prompt": [...], "ground_truth": [...]}} with one text, list of
                texts or None a fact.
            sequential_edit: True: every batch stays, and all are measured after the last; False: each is measured alone
                and then undone, so that the model is as before at the end.
            train_rephrase: the edit learns from the rephrase prompts too; a score on them is none of generality then.
            batch_size: facts a batch.

        Returns:
            (metrics, edited model, weights_copy): a dictionary a fact with `case_id`, `requested_rewrite`, `pre` and
            `post`, in which accuracies are lists of token accuracies, one a prompt; the model; and a function that
            goes back to the edits that the model had before this call.

        Raises:
            ValueError, TypeError: lists of different lengths, a fact that is no edit, an argument that is not known
                here: before anything is edited.

        Example:
            metrics, model, _ = editor.edit("Ann is a", "baker", subject="Ann", sequential_edit=True)
            metrics[0]["post"]["rewrite_acc"]                                                              # [1.0]
        """
        _check_others(kwargs)
        _check_flags(sequential_edit=sequential_edit, verbose=verbose, train_rephrase=train_rephrase)
        _check_batch_size(batch_size)
        facts = self._facts(
            prompts, target_new, ground_truth, rephrase_prompts, locality_inputs, portability_inputs, subject,
            train_rephrase,
        )  # fmt: skip
        batches = [facts[start : start + batch_size] for start in range(0, len(facts), batch_size)]
        return self._run(batches, keep=sequential_edit, verbose=verbose)

    def batch_edit(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any, Callable[[], None]]:
        """As `edit`, with `hparams.batch_size` facts a batch."""
        return self.edit(*args, batch_size=self.hparams.batch_size, **kwargs)

    def _facts(
        self, prompts: Texts, target_new: Texts, ground_truth: Texts | None, rephrase: Any, locality: Inputs | None,
        portability: Inputs | None, subject: Texts | None, train_rephrase: bool,
    ) -> list[_Fact]:  # fmt: skip
        asked = _texts("prompts", prompts, None)
        if not asked:
            raise ValueError("prompts must hold a fact or more, got none")
        count = len(asked)
        if subject is None:
            raise ValueError("subject is missing: CoachHooK edits at the subject's last token, give one a prompt")
        targets, subjects = _texts("target_new", target_new, count), _texts("subject", subject, count)
        old = [_NO_ANSWER] * count if ground_truth is None else _texts("ground_truth", ground_truth, count)
        others_of = [None] * count if rephrase is None else _entries("rephrase_prompts", rephrase, count)
        facts = []
        for index in range(count):
            request: dict[str, Any] = {
                "prompt": asked[index], "target_new": targets[index], "ground_truth": old[index],
                "subject": subjects[index],
                "portability": _inputs("portability_inputs", portability, index, count),
                "locality": _inputs("locality_inputs", locality, index, count),
            }  # fmt: skip
            if others_of[index] is not None:
                request["rephrase_prompt"] = others_of[index]
            learned = tuple(_listed(others_of[index])) if train_rephrase and others_of[index] is not None else ()
            edit = EditRequest(asked[index], subjects[index], targets[index], old[index], index, learned)
            facts.append(_Fact(request, edit, _questions(request, self.tok, context_length(self.model))))
        return facts

    def _run(
        self, batches: Sequence[Sequence[_Fact]], *, keep: bool, verbose: bool
    ) -> tuple[list[dict[str, Any]], Any, Callable[[], None]]:
        editor, edits = self.editor, [[fact.edit for fact in batch] for batch in batches]
        for number, requests in enumerate(edits, 1):  # all of them before the first is edited
            try:
                tokenise_batch(requests, self.tok, editor.edit_set.contexts, context_length(self.model))
            except ValueError as error:
                raise ValueError(f"batch {number}: {error}") from None
        facts = [fact for batch in batches for fact in batch]
        before = self._answers(facts)
        if editor.statistics is None:
            editor.collect_statistics(self._corpus, progress=verbose)
        earlier = editor.edit_set

        def undo() -> None:
            editor.restore(earlier)  # and not by rollbacks: an edit may have taken an earlier one's place

        after: list[Answers] = []
        if keep:
            try:
                made = [editor.edit(requests, progress=verbose) for requests in edits]
                after = self._answers(facts)
            except BaseException:
                undo()
                raise
        else:
            made = []
            for batch, requests in zip(batches, edits, strict=True):
                with editor.trial(requests, progress=verbose) as one:
                    made.append(one)
                    after += self._answers(batch)
        owners = [one for one, batch in zip(made, batches, strict=True) for _ in batch]
        metrics = [_metrics(*line) for line in zip(facts, range(len(facts)), before, after, owners, strict=True)]
        if verbose:
            for line in metrics:
                _log.info("%d editing: %s", line["case_id"], line)
        return metrics, self.model, undo

    def _answers(self, facts: Sequence[_Fact]) -> list[Answers]:
        """The tokens that the model predicts at each question's answer, a fact."""
        scores = score_distinct(self.model, [pair for fact in facts for pair in fact.pairs])
        return [{pair: scores[pair].predictions for pair in fact.pairs} for fact in facts]


@dataclass(frozen=True)
class _Fact:
    """EasyEdit's request, ours, and its questions: (group, name) -> pairs."""

    request: dict[str, Any]
    edit: EditRequest
    questions: dict[tuple[str, str], list[Pair]]

    @property
    def pairs(self) -> Iterator[Pair]:
        return (pair for pairs in self.questions.values() for pair in pairs)


def _questions(request: Mapping[str, Any], tok: Any, most: int | None) -> dict[tuple[str, str], list[Pair]]:
    def pairs(argument: str, texts: Sequence[str], answers: Sequence[str]) -> list[Pair]:
        found = [encode_pair(tok, text, answer) for text, answer in zip(texts, answers, strict=True)]
        for text, pair in zip(texts, found, strict=True):
            count = len(pair.prompt) + len(pair.target)
            if not pair.prompt or (most is not None and count > most):
                raise ValueError(
                    f"{argument} must have a token at least, and with its answer as many as the model's context, "
                    f"{most}, at most, got {count}: {text[:80]!r}"
                )
        return found

    target = request["target_new"]
    found = {("", "rewrite"): pairs("prompts", [filled(request["prompt"], request["subject"])], [target])}
    if "rephrase_prompt" in request:
        texts = _listed(request["rephrase_prompt"])
        found["", "rephrase"] = pairs("rephrase_prompts", texts, [target] * len(texts))
    for group in ("locality", "portability"):
        for name, inputs in request[group].items():
            texts, answers = _listed(inputs["prompt"]), _listed(inputs["ground_truth"])
            found[group, name] = pairs(f"{group}_inputs[{name!r}]['prompt']", texts, answers)
    return found


def _metrics(fact: _Fact, place: int, before: Answers, after: Answers, batch: Batch) -> dict[str, Any]:
    pre: dict[str, Any] = {"portability": {}}
    post: dict[str, Any] = {"locality": {}, "portability": {}}
    for (group, name), pairs in fact.questions.items():
        if group == "locality":  # what the model said before is the measure, whatever the file holds
            post[group][f"{name}_acc"] = [_share(after[pair], before[pair]) for pair in pairs]
            continue
        for side, answers in ((pre, before), (post, after)):
            place_of = side[group] if group else side
            place_of[f"{name}_acc"] = [_share(answers[pair], pair.target) for pair in pairs]
    return {
        "pre": pre, "case_id": place, "requested_rewrite": fact.request, "post": post,
        "time": batch.seconds / len(batch.outcomes),
    }  # fmt: skip


def _share(found: Sequence[int], wanted: Sequence[int]) -> float:
    return sum(one == other for one, other in zip(found, wanted, strict=True)) / len(wanted)


def _inputs(name: str, inputs: Inputs | None, index: int, count: int) -> dict[str, dict[str, Any]]:
    found = {}
    if not isinstance(inputs, Mapping | None):
        raise TypeError(f"{name} must be a mapping of names to prompts and answers, got {inputs!r}")
    for key, entry in (inputs or {}).items():
        if not isinstance(entry, Mapping) or not {"prompt", "ground_truth"} <= entry.keys():
            raise ValueError(f"{name}[{key!r}] must hold 'prompt' and 'ground_truth', got {entry!r}")
        where = f"{name}[{key!r}]"
        texts = _entries(f"{where}['prompt']", entry["prompt"], count)[index]
        answers = _entries(f"{where}['ground_truth']", entry["ground_truth"], count)[index]
        if texts is None:
            continue
        if answers is None or len(_listed(texts)) != len(_listed(answers)):
            raise ValueError(f"{where} has prompts {texts!r} and answers {answers!r} for fact {index}")
        found[key] = {"prompt": texts, "ground_truth": answers}
    return found


def _texts(name: str, value: Any, count: int | None) -> list[str]:
    found = _listed(value)
    if not isinstance(value, str | Sequence) or not all(isinstance(text, str) for text in found):
        raise TypeError(f"{name} must be a text or a list of texts, got {value!r}")
    if count is not None and len(found) != count:
        raise ValueError(f"{name} must hold one text a prompt, {count}, got {len(found)}")
    return found


def _entries(name: str, value: Any, count: int) -> list[Any]:
    """A text, a list of texts or None a fact."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or len(found) != count:
        raise ValueError(f"{name} must hold one entry a prompt, {count}, got {value!r}")
    for entry in found:
        if entry is not None:
            _texts(name, entry, None)
    return list(found)


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)


def _check_batch_size(size: object) -> None:
    if type(size) is not int or size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {size!r}")


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false, got {value!r}")


def _check_others(others: Mapping[str, Any]) -> None:
    if others.get("test_generation"):
        raise ValueError("test_generation is not measured here: `coachhook eval --metrics all` has fluency")
    metric = others.get("eval_metric", _TOKEN_ACCURACY[0])
    if metric not in _TOKEN_ACCURACY:
        raise ValueError(f"eval_metric must be one of {_TOKEN_ACCURACY}, got {metric!r}")
    if unknown := sorted(others.keys() - _WITHOUT_MEANING - {"test_generation", "eval_metric"}):
        raise TypeError(f"edit() got the arguments {unknown}, which have no meaning here")
