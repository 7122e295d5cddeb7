"""A model behind an OpenAI-compatible endpoint: which requests are repeated, and which errors end the command.

The `openai` client repeats what may pass (no connection, time-out, HTTP 408, 409, 429 and 5xx), after growing pauses or
when Retry-After says. A response that cannot be used is asked for again here.
"""

import asyncio
import base64
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from mixdpo.errors import InputError

Read = TypeVar("Read")


Chat = list[dict[str, str]]


INSTALL = "pip install -c constraints.txt -e '.[judge]'"


CONTINUES = "the same command continues"


LARGEST_BODY = 16 * 2**20  # bytes, decompressed


HINTS = {
    401: "set OPENAI_API_KEY to a key that the endpoint knows",
    402: "pay what the endpoint asks for",
    403: "set OPENAI_API_KEY to a key that may use this model",
    404: "check the model's name and the server's URL, which mostly ends in /v1",
    405: "check the server's URL, which mostly ends in /v1",
}
"""What to do about an HTTP status that every further request would get as well."""


class NoResponse(Exception):
    """One request has no usable response; others may have.

    Args:
        reason: begins with the kind of reason, up to a colon.
        used: `prompt_tokens` and `completion_tokens` of all attempts, as far as the server says.
    """

    def __init__(self, reason: str, used: Counter[str] | None = None) -> None:
        super().__init__(reason)
        self.used = used or Counter()


class Endpoint:
    def __init__(
        self,
        model: str,
        base_url: str | None,
        *,
        attempts: int,
        timeout: float,
        max_tokens: int,
        log_probs: bool = False,
        **request: Any,
    ) -> None:
        """A model to `ask`, inside of `async with endpoint`. Options as for `judge`; `request` goes into each request.

        Raises:
            InputError: the package openai is missing, the URL is none, or there is neither a URL nor a key.
        """
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY", "").strip() or None
        self._client = _client(base_url, key, timeout)
        self._secrets = secrets(key, base_url)
        self.url = without_secrets(str(self._client.base_url))
        self.attempts = attempts
        # OpenAI's newer models refuse the old name, and many local servers do not know the new one
        limit = {"max_tokens" if base_url else "max_completion_tokens": max_tokens}
        self._request = {"model": model, "temperature": 0, **limit}
        self._request |= ({"logprobs": True, "top_logprobs": 20} if log_probs else {}) | request

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, chat: Chat, read: Callable[[Any], Read], **request: Any) -> tuple[Read, Counter[str]]:
        """What `read` makes of the response's body, and the tokens that all attempts used.

        Args:
            read: raises ValueError, whose message begins with the kind up to a colon, if the response cannot be used.
            request: goes into the request.

        Raises:
            NoResponse: all attempts failed.
            InputError: no request would succeed.
        """
        import openai

        used, left, reason = Counter[str](), self.attempts, ""
        while left > 0:
            completions = self._client.with_options(max_retries=left - 1).chat.completions
            try:
                response = await completions.with_raw_response.create(messages=chat, **self._request, **request)
                left -= 1 + response.retries_taken
                body = _parsed(self._clean(response.text, least=8))
                used.update(_usage(body))
                return read(body), used
            except openai.OpenAIError as error:
                reason, left = self._reason(error), 0
            except ValueError as error:
                reason = str(error)
            except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
                reason = f"no chat completion: {type(error).__name__} {error} in {str(body)[:200]!r}"
        raise NoResponse(self._clean(reason), used)

    def _reason(self, error: Any) -> str:
        """Why there is no response.

        Raises:
            InputError: no request would succeed.
        """
        import httpx2
        import openai

        cause = error.__cause__
        if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
            raise InputError(f"{self.url} cannot be reached: start the server or correct the URL; {CONTINUES}")
        if isinstance(error, openai.APITimeoutError):
            return f"time-out: no response in {self._client.timeout.read:g} s"
        if not isinstance(error, openai.APIStatusError):
            return f"connection lost: {type(cause).__name__} {cause}" if cause else str(error)
        text = self._clean(" ".join(str(error.message).split()))[:300]
        reason, hint = f"HTTP {error.status_code}: {text}", HINTS.get(error.status_code)
        if error.code == "insufficient_quota":
            hint = HINTS[402]
        elif error.response.is_redirect:
            hint = "give the URL of the server itself: redirects are not followed"
        elif error.response.headers.get("retry-after", "0").isdigit() and "logprob" in text.lower():
            hint = "ask without log-probabilities: --log_probs false"
        elif error.code in ("unsupported_parameter", "unsupported_value"):
            hint = "use a model that takes temperature and max_tokens"
        if hint:
            raise InputError(f"{self.url} refuses: {reason}. To continue, {hint}; {CONTINUES}")
        return reason

    def _clean(self, text: str, least: int = 1) -> str:
        """Without control characters, key and password, which some servers repeat.

        Args:
            least: shorter secrets stay. In a body, a short one such as the x that a local server is given may be a part
                of anything.
        """
        for secret in self._secrets:
            text = text.replace(secret, "***") if len(secret) >= least else text
        return "".join(" " if ord(sign) < 32 or 127 <= ord(sign) < 160 else sign for sign in text)


def _client(base_url: str | None, key: str | None, timeout: float) -> Any:
    try:
        import httpx2
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
    except ImportError:
        raise InputError(f"a model behind an endpoint needs the package openai: {INSTALL}") from None
    if not base_url and not key:
        raise InputError("no key: set OPENAI_API_KEY, or give the --base_url of a server that needs none")
    if base_url and not _is_url(base_url):
        raise InputError(
            f"the server's URL {without_secrets(base_url)}: write it in full, such as http://localhost:8000/v1"
        )

    class Client(DefaultAsyncHttpxClient):
        """Reads a bounded body in a bounded time; the timeouts of httpx are between two pieces of a body."""

        async def send(self, request: Any, **options: Any) -> Any:
            try:
                async with asyncio.timeout(timeout):
                    response = await super().send(request, **{**options, "stream": True})
                    body = bytearray()
                    async for piece in response.aiter_bytes(2**16):
                        body += piece
                        if len(body) > LARGEST_BODY:
                            await response.aclose()
                            raise OpenAIError(f"too long: a body of more than {LARGEST_BODY // 2**20} MB")
            except TimeoutError:
                raise httpx2.ReadTimeout("", request=request) from None
            headers = [(name, value) for name, value in response.headers.multi_items() if name != "content-encoding"]
            return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=request)

    limits = httpx2.Timeout(timeout, connect=min(10.0, 0.8 * timeout))
    client = Client(timeout=limits, follow_redirects=False)
    return AsyncOpenAI(api_key=key or "none", base_url=base_url, timeout=limits, http_client=client)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False


def secrets(key: str | None, url: str | None) -> list[str]:
    """What must be in no file and no message: the key, and user and password of a URL, as they are and as sent."""
    user = urlsplit(url or "").netloc.rpartition("@")[0]
    sent = base64.b64encode(unquote(user).encode()).decode() if user else ""
    password = user.partition(":")[2]
    return [secret for secret in (key, user, sent, password, unquote(password)) if secret]


def without_secrets(url: str) -> str:
    """Scheme, host, port and path of a URL: no user, password or query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def _parsed(text: str) -> Any:
    """
    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"response is no JSON: {error}") from None


def _usage(body: Any) -> dict[str, int]:
    """Tokens that the server counted; failed attempts are paid for too."""
    usage = body.get("usage") if isinstance(body, dict) else None
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")} if isinstance(usage, dict) else {}
    return {name: count for name, count in counts.items() if isinstance(count, int)}
