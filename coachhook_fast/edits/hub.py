"""Edit sets of the Hugging Face hub: asked for by a prefix, so that a missing folder is never looked up elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from coachhook_fast.edits.manifest import MANIFEST

HUB = "hf:"  # before the name of a repository of the Hugging Face hub
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def local_folder(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder called `name`; or, of "hf:owner/name" or "hf:owner/name@revision", the hub's repository, downloaded.

    Args:
        revision: branch, tag or commit of the repository; a commit's hash stays what it was when it was looked at.

    Raises:
        ValueError: there is no such repository; `name` is a missing folder that could be one of the hub, which is asked
            for by its prefix alone; a revision of a folder, or two.
    """
    if not str(name).startswith(HUB):
        if revision is not None:
            raise ValueError(f"revision {revision!r} is of a repository of the hub, {str(name)!r} is a folder")
        if not Path(name).is_dir() and _REPOSITORY.fullmatch(str(name)):
            raise ValueError(f"there is no folder {str(name)!r}; a repository of the hub is asked for as '{HUB}{name}'")
        return Path(name)
    repository, at, named = str(name).removeprefix(HUB).partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and (not named or revision is not None)):
        raise ValueError(f"edits must be {HUB}owner/name or {HUB}owner/name@revision with one revision, got {name!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository, revision=revision or named or None, allow_patterns=[MANIFEST, "*.safetensors"], token=token
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ValueError) as error:
        raise ValueError(f"edits {str(name)!r} could not be had from the hub: {error}") from error
