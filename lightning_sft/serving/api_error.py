"""What a client is told that is not served, in the shape of OpenAI's API.

This module does not import torch.
"""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error as OpenAI's clients know it.

    Args:
        status: Of HTTP.
        param: The field at fault.
        code: A word for programs.
        retry_after: Seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kinds.get(self.status, fallback)}
        return {"error": error | {"param": self.param, "code": self.code}}


def invalid(param: str, problem: str) -> ApiError:
    """A field that holds something else than it may."""
    return ApiError(400, f"{param} {problem}.", param=param, code="invalid_value")
