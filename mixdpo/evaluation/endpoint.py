"""A model behind an OpenAI-compatible endpoint, a judge's or one that answers: what is tried again, for how long, and
what ends the whole thing."""

import asyncio
import base64
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from mixdpo.errors import InputError
from mixdpo.evaluation.judge_prompt import Malformed, NoVerdict, Response, messages, prompt_hash, read_choice
from mixdpo.evaluation.outputs import Comparison
from mixdpo.evaluation.verdicts import Order

Read = TypeVar("Read")


INSTALL = "pip install -c constraints.txt -e '.[judge]'"


CONTINUES = "the same command continues"


FIRST_WAIT = 0.5
"""Seconds before the second attempt, a quarter more or less; each further wait is twice as long, up to LONGEST_WAIT."""


LONGEST_WAIT = 30.0


LONGEST_RETRY_AFTER = 600.0
"""Seconds that the endpoint may ask to wait; longer ends the whole thing."""


TRY_AGAIN = {408, 409, 425, 429}


HINTS = {
    401: "set OPENAI_API_KEY to a key that the endpoint knows",
    402: "pay what the endpoint asks for",
    403: "set OPENAI_API_KEY to a key that may use this model",
    404: "check the model's name and the server's URL, which mostly ends in /v1",
    405: "check the server's URL, which mostly ends in /v1",
}
"""What an error of this status needs; without it every further request would fail as well."""


class TryAgain(Exception):
    """A request that may succeed later.

    Args:
        reason: begins with the kind, up to a colon.
        after: seconds that the endpoint says to wait.
        absent: there was nothing to connect to.
    """

    def __init__(self, reason: str, after: float | None = None, absent: bool = False) -> None:
        super().__init__(reason)
        self.after, self.absent = after, absent


class Endpoint:
    def __init__(
        self,
        model: str,
        base_url: str | None,
        *,
        attempts: int,
        timeout: float,
        max_tokens: int,
        log_probs: bool,
        **more: Any,
    ) -> None:
        """A judge: `await judge(comparison, order)`, inside of `async with judge`. Options as for `judge`; `more` goes
        into each request.

        Raises:
            InputError: the package is missing, or there is neither a base_url nor a key.
        """
        self.attempts, self.timeout = attempts, timeout
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY", "").strip() or None
        self._client = _client(base_url, key, timeout)
        self._secrets = secrets(key, base_url)
        self.url = without_secrets(str(self._client.base_url))
        self.about = {"kind": "endpoint", "model": model, "base_url": self.url, "prompt": prompt_hash()}
        self.about |= {"max_tokens": max_tokens, "log_probs": log_probs}
        # OpenAI's newer models refuse the old name, and many local servers do not know the new one
        self._options: dict[str, Any] = {"model": model, "temperature": 0}
        self._options["max_tokens" if base_url else "max_completion_tokens"] = max_tokens
        self._options |= {"logprobs": True, "top_logprobs": 20} if log_probs else {}
        self._options |= more
        self._not_before = 0.0  # of the loop's clock

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def __call__(self, comparison: Comparison, order: Order) -> Response:
        """
        Raises:
            NoVerdict: all attempts failed.
            InputError: none will succeed, for any prompt.
        """
        texts = [comparison.model.text, comparison.baseline.text]
        chat = messages(comparison.instruction, *(texts if order == "model_first" else texts[::-1]))
        (first, source), used = await self.ask(chat, read_choice)
        return Response(first, source, used.get("prompt_tokens"), used.get("completion_tokens"))

    async def ask(
        self, chat: list[dict[str, str]], read: Callable[[Any], Read], **more: Any
    ) -> tuple[Read, dict[str, int]]:
        """What `read` makes of the response, and the tokens that all attempts used; a `Malformed` of it is asked again.
        `more` goes into the request.

        Raises:
            NoVerdict, InputError: as for `__call__`.
        """
        used: dict[str, int] = {}
        for attempt in range(1, self.attempts + 1):
            try:
                content = await self._request(chat, more)
                _add_usage(used, content)
                return read(content), used
            except (TryAgain, Malformed, NoVerdict) as error:
                last = error
                if isinstance(error, NoVerdict):  # asking again would not help, but earlier attempts are paid for
                    break
            if attempt < self.attempts and isinstance(last, TryAgain):
                await self._wait(attempt, last)
        if isinstance(last, TryAgain) and last.absent:
            raise InputError(f"{self.url} cannot be reached ({last}): start the server or correct the URL; {CONTINUES}")
        raise NoVerdict(self._clean(str(last)), used.get("prompt_tokens"), used.get("completion_tokens"))

    async def _request(self, chat: list[dict[str, str]], more: dict[str, Any]) -> Any:
        """The body of the response to one request.

        Raises:
            TryAgain, NoVerdict, InputError: as the error lasts for a while, for this prompt, or for all.
        """
        import openai

        while (wait := self._not_before - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(wait)
        create = self._client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self.timeout):  # the client's own limit is between two pieces of a response
                response = await create(messages=chat, **self._options, **more)
            return json.loads(self._clean(response.text, least=8))
        except TimeoutError:
            raise TryAgain(f"time-out: no response in {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise self._of_connection(error.__cause__) from None
        except openai.APIStatusError as error:
            raise self._of_status(error) from None
        except ValueError as error:
            raise TryAgain(f"response is no JSON: {error}") from None

    def _of_connection(self, cause: BaseException | None) -> TryAgain:
        import httpx2

        if isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout):
            return TryAgain(f"no connection: {cause}", absent=True)
        if isinstance(cause, httpx2.TimeoutException):
            return TryAgain(f"time-out: no response in {self.timeout:g} s")
        return TryAgain(f"connection lost: {type(cause).__name__} {cause}")

    def _of_status(self, error: Any) -> Exception:
        status, said = error.status_code, self._clean(" ".join(str(error.message).split()))[:300]
        reason, after = f"HTTP {status}: {said}", retry_after(error.response.headers)
        if status in HINTS:
            return InputError(f"{self.url} refuses: {reason}. To continue, {HINTS[status]}; {CONTINUES}")
        if error.code == "insufficient_quota":
            return InputError(f"{self.url} refuses: {reason}. To continue, {HINTS[402]}; {CONTINUES}")
        if after is not None and after > LONGEST_RETRY_AFTER:
            return InputError(f"{self.url} asks to wait {after:.0f} s: {reason}; {CONTINUES}")
        if status in TRY_AGAIN or status >= 500:
            return TryAgain(reason, after)
        if "logprob" in said.lower():
            return InputError(f"{self.url} refuses: {reason}. Ask without log-probabilities: --log_probs false")
        if error.code in ("unsupported_parameter", "unsupported_value"):
            return InputError(f"{self.url} refuses: {reason}. Use a model that takes temperature and max_tokens")
        return NoVerdict(reason)

    async def _wait(self, attempt: int, error: TryAgain) -> None:
        """Where the endpoint says how long, all requests wait, else only this one."""
        if error.after:
            self._not_before = max(self._not_before, asyncio.get_running_loop().time() + error.after)
        else:
            await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25))

    def _clean(self, text: str, least: int = 1) -> str:
        """Without key and password, which some servers repeat; of a body only long ones, since a short one, such as the
        x that a local server is given, may be a part of anything."""
        for secret in self._secrets:
            text = text.replace(secret, "***") if len(secret) >= least else text
        return text


def _client(base_url: str | None, key: str | None, timeout: float) -> Any:
    try:
        from openai import AsyncOpenAI, Timeout
    except ImportError:
        raise InputError(f"a model behind an endpoint needs the package openai: {INSTALL}") from None
    if not base_url and not key:
        raise InputError("no key: set OPENAI_API_KEY, or give the --base_url of a server that needs none")
    if base_url and not _is_url(base_url):
        raise InputError(
            f"the server's URL {without_secrets(base_url)}: write it in full, such as http://localhost:8000/v1"
        )
    limits = Timeout(timeout, connect=min(10.0, 0.8 * timeout))
    return AsyncOpenAI(api_key=key or "none", base_url=base_url, timeout=limits, max_retries=0)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False


def secrets(key: str | None, url: str | None) -> list[str]:
    """What must be in no file and no message: the key, and of a URL the user and password, and the password alone, as
    they are and as sent."""
    user = urlsplit(url or "").netloc.rpartition("@")[0]
    sent = base64.b64encode(unquote(user).encode()).decode() if user else ""
    password = user.partition(":")[2]
    return [secret for secret in (key, user, sent, password, unquote(password)) if secret]


def without_secrets(url: str) -> str:
    """Scheme, host, port and path of a URL: no user, password or query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that a response says to wait, given in seconds or as an HTTP date; None where it does not say."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now))
    except (ValueError, TypeError):
        return None


def _add_usage(used: dict[str, int], content: Any) -> None:
    """Failed attempts are paid for too."""
    usage = content.get("usage") if isinstance(content, dict) else None
    for name in ("prompt_tokens", "completion_tokens"):
        if isinstance(usage, dict) and isinstance(usage.get(name), int):
            used[name] = used.get(name, 0) + usage[name]
