"""Answers by a model behind an OpenAI-compatible server, such as vLLM's, which is faster than one process on a GPU."""

import asyncio
from typing import Any

from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import Endpoint
from mixdpo.evaluation.generation import Response
from mixdpo.evaluation.judge_prompt import Malformed, NoVerdict

Chat = list[dict[str, str]]


def complete(
    chats: list[Chat],
    model: str,
    base_url: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seeds: list[int],
) -> list[Response | Exception]:
    """One completion of each chat, all asked at once; entry i belongs to chat i, and is why there is none otherwise: an
    InputError where the server cannot be reached or refuses all, a NoVerdict where it is only this chat.

    Args:
        chats: messages that end with the user's.
        model: its name at the server.
        base_url: of the server, such as http://localhost:8000/v1. The key, if it wants one, is OPENAI_API_KEY.
        max_new_tokens: a completion is cut there.
        temperature, top_p: of the server's sampling.
        seeds: one for each chat; whether the server obeys them is its affair.
    """
    options = {"attempts": 5, "timeout": 600.0, "max_tokens": max_new_tokens, "log_probs": False}
    endpoint = Endpoint(model, base_url, **options, temperature=temperature, top_p=top_p)
    return asyncio.run(_complete(chats, endpoint, seeds))


async def _complete(chats: list[Chat], endpoint: Endpoint, seeds: list[int]) -> list[Response | Exception]:
    async def response(chat: Chat, seed: int) -> Response | Exception:
        try:
            return (await endpoint.ask(chat, _read, seed=seed))[0]
        except (NoVerdict, InputError) as error:
            return error  # the others go on: they may be paid for

    async with endpoint:
        return await asyncio.gather(*map(response, chats, seeds))


def _read(content: Any) -> Response:
    """
    Raises:
        Malformed: it is no chat completion that says how many tokens it has.
    """
    try:
        choice = content["choices"][0]
        text, tokens = choice["message"]["content"], content["usage"]["completion_tokens"]
        if not isinstance(text, str) or type(tokens) is not int:
            raise TypeError(f"content {text!r:.40}, completion_tokens {tokens!r}")
    except (KeyError, IndexError, TypeError) as error:
        raise Malformed(f"no chat completion: {type(error).__name__} {error} in {str(content)[:200]!r}") from None
    return Response(text, tokens, choice.get("finish_reason") == "stop")
