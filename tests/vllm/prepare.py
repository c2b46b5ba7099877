"""What the vLLM tests compare with: SmolLM2 edited with real facts, and transformers' greedy tokens. Main environment.

    python tests/vllm/prepare.py FOLDER

FOLDER gets `model/` (a link), `twelve-heads/` (the same function for two ranks), `edits-a/`, `edits-b/` (a batch
more), `sequence/` (vLLM refuses it) and `expected.json`: prompt token ids and, for each version, the tokens. A
sequence ends where the model hesitates between two tokens (`vllm_modes.MARGIN`), for there rounding may decide.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from coachhook_fast import EditConfig, Editor, EditRequest, load_model
from coachhook_fast.edits import store
from coachhook_fast.integrations.vllm_modes import certain_tokens
from coachhook_fast.models.loading import cache_dir

ROOT = Path(__file__).resolve().parents[2]
FACTS = ROOT / "examples" / "facts.jsonl"
ORDINARY = ("The capital of France is", "Water boils at a temperature of", "My favourite book is about")
FILLER = "It rained all day in the old town, and the baker closed early. Nobody minded, for the market was full. "


def twelve_heads(model: Any, folder: Path) -> None:
    """The same function in a shape that two ranks can share: SmolLM2's 9 heads and 3 key-value heads, and one group
    more whose output projection is zero."""
    head = model.config.head_dim
    more = {"q_proj": 3 * head, "k_proj": head, "v_proj": head}
    weights = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[-2]
        if part in more:
            tensor = torch.cat([tensor, tensor[: more[part]]])
        elif part == "o_proj":
            tensor = torch.nn.functional.pad(tensor, (0, 3 * head))
        if name != "lm_head.weight":  # tied to the embeddings
            weights[name] = tensor.contiguous()
    config = copy.deepcopy(model.config)
    config.num_attention_heads, config.num_key_value_heads = 12, 4
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def requests() -> Iterator[EditRequest]:
    for line in FACTS.read_text().splitlines():
        fact = json.loads(line)
        yield EditRequest(fact["prompt"], fact["subject"], fact["target_new"], fact.get("ground_truth"))


def main(folder: Path) -> None:
    config = EditConfig(layers=(4, 5, 6, 7, 8), round_robin=2, v_num_grad_steps=20)
    done = folder / "expected.json"
    if done.is_file() and json.loads(done.read_text()).get("config") == json.loads(json.dumps(config.to_dict())):
        return
    shutil.rmtree(folder, ignore_errors=True)  # of other settings
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("smollm2", dtype="float32")
    (folder / "model").symlink_to(cache_dir() / "models" / "smollm2-135m-instruct")
    twelve_heads(model, folder / "twelve-heads")
    tokenizer.save_pretrained(folder / "twelve-heads")
    facts = list(requests())[:12]
    # Version a edits layers 4, 6 and 8 and leaves 5 and 7 empty, version b edits those.
    editor = Editor(model, tokenizer, config)
    text = Path(os.environ.get("COACHHOOK_DATA", ROOT.parent / "shared" / "data")) / "wikitext2-test.raw"
    editor.collect_statistics(text if text.is_file() else None, max_tokens=8192)  # None: the model writes some

    texts = [fact.text for fact in facts] + list(ORDINARY) + [FILLER * 12 + fact.text for fact in facts[:3]]
    prompts = [tokenizer(text).input_ids for text in texts]
    expected = {"config": config.to_dict(), "prompts": prompts, "base": [certain_tokens(model, ids) for ids in prompts]}
    for version, start, end in (("a", 0, 8), ("b", 8, 12)):
        editor.edit(facts[start:end])
        editor.save_pretrained(folder / f"edits-{version}")
        expected[version] = [certain_tokens(model, ids) for ids in prompts]
    changed = sum(a != base for a, base in zip(expected["a"][:8], expected["base"][:8], strict=True))
    assert changed >= 6, f"only {changed} of 8 edits changed what the model writes"
    published = {"round_robin": 1, "threshold_relative": False, "threshold_whitened": False}
    refused = replace(editor.edit_set, config=editor.config.replace(gate="sequence", **published))
    store.save(refused, folder / "sequence")
    done.write_text(json.dumps(expected))
    compared = sum(map(len, expected["a"]))
    print(f"{len(prompts)} prompts, {compared} tokens to compare, {changed} of 8 edits change the first answer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
