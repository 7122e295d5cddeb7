"""A model behind an OpenAI-compatible endpoint: the requests to repeat, and the errors that end the command.

The `openai` client repeats requests that may succeed later (no connection, time-out, HTTP 408, 409, 429 and 5xx), after
growing pauses or when Retry-After says. A response that cannot be used counts as none.
"""

import asyncio
import base64
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from mixdpo.errors import InputError
from mixdpo.storage.read import parse_json

Chat = list[dict[str, str]]


LARGEST = 16 * 2**20  # bytes of a body


CONTINUES = "the same command continues"


_URL = re.compile(r"https?://([^/@\s]*@)?(\[[0-9a-fA-F:.]+\]|[^][/:@\s]+)(:[1-9]\d{0,4})?(/\S*)?")


HINTS = {
    **dict.fromkeys((401, 403), "set OPENAI_API_KEY to a key that may use this model"),
    307: "give the server's own URL (redirects are not followed)",
    402: "pay what the endpoint asks for",
    404: "check the model's name and the server's URL, which mostly ends in /v1",
}
"""Remedies for each HTTP status that every further request would get as well."""


class NoResponse(Exception):
    """One request has no usable response; others may have. The text begins with the kind of reason, up to a colon."""


class Endpoint:
    def __init__(
        self, model: str, base_url: str | None, *, attempts: int, timeout: float, max_tokens: int, **request: Any
    ) -> None:
        """A model to `ask`, inside of `async with endpoint.client`.

        Args:
            request: goes into each request; other options as for `judge`.

        Raises:
            InputError: the package openai is missing, the URL is malformed, or neither a URL nor a key is given.
        """
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY", "").strip() or None
        self.client = _client(base_url, key, timeout, attempts)
        self._secrets = secrets(key, base_url)
        self.url = without_secrets(str(self.client.base_url))
        # OpenAI's newer models refuse the old name, and many local servers do not know the new one
        limit = {"max_tokens" if base_url else "max_completion_tokens": max_tokens}
        self._request = {"model": model, "temperature": 0, **limit, **request}

    async def ask(self, chat: Chat, read: Callable[[Any], Any], **request: Any) -> Any:
        """What `read` makes of the response's body.

        Args:
            read: raises ValueError, whose message begins with the kind up to a colon, if the response cannot be used.
            request: goes into the request.

        Raises:
            NoResponse: there is no response, or it cannot be used.
            InputError: no request would succeed.
        """
        import openai

        body = None
        try:
            create = self.client.chat.completions.with_raw_response.create
            response = await create(messages=chat, **self._request, **request)
            body = parse_json(self._without_secrets(response.text, least=8), "the response", "check the server")
            return read(body)
        except openai.OpenAIError as error:
            reason = self._reason(error)
        except ValueError as error:
            reason = str(error)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            reason = f"no chat completion: {type(error).__name__} {error} in {str(body)[:200]!r}"
        raise NoResponse(_printable(self._without_secrets(reason)))

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
            return f"time-out: no response in {self.client.timeout.read:g} s"
        if not isinstance(error, openai.APIStatusError):
            return f"connection lost: {type(cause).__name__} {cause}" if cause else str(error)
        status, text = error.status_code, _printable(self._without_secrets(str(error.message)))[:300]
        if hint := HINTS.get(402 if error.code == "insufficient_quota" else status):
            raise InputError(f"{self.url} refuses: HTTP {status}: {text}. To continue, {hint}; {CONTINUES}")
        return f"HTTP {status}: {text}"

    def _without_secrets(self, text: str, least: int = 1) -> str:
        """Without key and password, which some servers repeat.

        Args:
            least: shorter secrets stay. In a body, a short one such as the x that a local server is given may be a part
                of anything.
        """
        for secret in self._secrets:
            text = text.replace(secret, "***") if len(secret) >= least else text
        return text


def _printable(text: str) -> str:
    """On one line, and without control characters, which a terminal would obey."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def _client(base_url: str | None, key: str | None, timeout: float, attempts: int) -> Any:
    try:
        import httpx2
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
    except ImportError:
        raise InputError("the package openai is missing: pip install -c constraints.txt -e '.[judge]'") from None
    if not base_url and not key:
        raise InputError("no key: set OPENAI_API_KEY, or give the --base_url of a server that needs none")
    if base_url and not _URL.fullmatch(base_url):
        raise InputError(f"URL {without_secrets(base_url)}: write it in full, such as http://localhost:8000/v1")

    class Client(DefaultAsyncHttpxClient):
        """Reads a bounded body in a bounded time; the timeouts of httpx are between two pieces of a body."""

        async def send(self, request: Any, **options: Any) -> Any:
            try:
                async with asyncio.timeout(timeout):
                    response = await super().send(request, **{**options, "stream": True})
                    body = bytearray()
                    async for piece in response.aiter_bytes(2**16):
                        body += piece
                        if len(body) > LARGEST:
                            await response.aclose()
                            raise OpenAIError(f"too long: the body has more than {LARGEST // 2**20} MB")
            except TimeoutError:
                raise httpx2.ReadTimeout("", request=request) from None
            headers = [(name, value) for name, value in response.headers.multi_items() if name != "content-encoding"]
            return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=request)

    limits = httpx2.Timeout(timeout, connect=min(10.0, 0.8 * timeout))
    options = {"timeout": limits, "http_client": Client(timeout=limits, follow_redirects=False)}
    return AsyncOpenAI(api_key=key or "none", base_url=base_url, max_retries=attempts - 1, **options)


def secrets(key: str | None, url: str | None) -> list[str]:
    """Strings to keep out of files and messages: the key, and user and password of a URL, as given and as sent."""
    user = urlsplit(url or "").netloc.rpartition("@")[0]
    sent = base64.b64encode(unquote(user).encode()).decode() if user else ""
    password = user.partition(":")[2]
    return [secret for secret in (key, user, sent, password, unquote(password)) if secret]


def without_secrets(url: str) -> str:
    """Scheme, host, port and path of a URL: no user, password or query."""
    return re.sub(r"^(\w+://)?[^/]*@|[?#].*", r"\1", url).rstrip("/")


def complete(
    chats: list[Chat], model: str, base_url: str, *, max_new_tokens: int, seeds: list[int], **sampling: float
) -> list[Any]:
    """One `Response` for each chat, all asked for at once, from a server that is faster than one process on a GPU.

    Args:
        chats: messages that end with the user's.
        model: its name at the server.
        base_url: the server's, such as http://localhost:8000/v1. A key, if needed, is read from OPENAI_API_KEY.
        max_new_tokens: a response is cut at this many tokens.
        seeds: one for each chat; a server may ignore the seeds.
        sampling: temperature and top_p.

    Returns:
        Instead of a Response, a NoResponse where only this chat has no response, and any other error as such: an
        InputError where the server cannot be reached or refuses all.
    """
    endpoint = Endpoint(model, base_url, attempts=5, timeout=600.0, max_tokens=max_new_tokens, **sampling)

    async def all_responses() -> list[Any]:
        async with endpoint.client:
            asked = (endpoint.ask(chat, _generation, seed=seed) for chat, seed in zip(chats, seeds, strict=True))
            return await asyncio.gather(*asked, return_exceptions=True)  # the others go on: they may be paid for

    return asyncio.run(all_responses())


def _generation(body: Any) -> Any:
    from mixdpo.evaluation.generation import Response  # not above: a judge needs no transformers

    choice = body["choices"][0]
    text, tokens = choice["message"]["content"], body["usage"]["completion_tokens"]
    if not isinstance(text, str) or type(tokens) is not int:
        raise TypeError(f"content {text!r:.40}, completion_tokens {tokens!r}")
    return Response(text, tokens, choice.get("finish_reason") == "stop")
