"""Errors as clients see them: OpenAI's JSON form, one line that names what is wrong, never a traceback."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from coachhook_fast.edits.store import ConflictError
from coachhook_fast.printable import one_line

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
FAILED = "the service failed at this request; its log says where"
_FULL = {errno.ENOSPC, errno.EDQUOT}


class ApiError(Exception):
    """A request that is not served.

    Args:
        status: HTTP status; message: one line for people.
        param: the field that is wrong; code: a word for programs; headers: of the answer.

    raise ApiError(404, "no batch 'x'", param="batch")
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = one_line(message)
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """{"error": {...}} as OpenAI's service writes it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: BaseException) -> ApiError:
    """`error` of a worker as what its client is told: 409 for a folder that another writer has, 507 for a full disk,
    503 where the system refuses otherwise, 422 for what the package refuses by name, else 500 without a word of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConflictError):
        return ApiError(409, str(error), code="conflict")
    if isinstance(error, OSError) and error.errno in _FULL:
        return ApiError(507, "no space is left where the edits are kept: nothing was changed", code="disk_full")
    if isinstance(error, OSError):
        return ApiError(503, f"the system refused ({error.strerror}): nothing was changed", code="system")
    if isinstance(error, (ValueError, TypeError)):
        return ApiError(422, str(error), code="refused")
    return ApiError(500, FAILED, code="internal")
