"""Answers by a model behind an OpenAI-compatible server, such as vLLM's, which is faster than one process on a GPU."""

import asyncio
from typing import Any

from mixdpo.errors import InputError
from mixdpo.evaluation.endpoint import CONTINUES, Endpoint
from mixdpo.evaluation.generation import Generation
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
    seed: int,
) -> list[Generation]:
    """One completion of each chat, all asked at once; entry i belongs to chat i.

    Args:
        chats: messages that end with the user's.
        model: its name at the server.
        base_url: of the server, such as http://localhost:8000/v1. The key, if it wants one, is OPENAI_API_KEY.
        max_new_tokens: a completion is cut there.
        temperature, top_p, seed: of the server's sampling; whether it obeys the seed is its affair.

    Raises:
        InputError: the server cannot be reached, or refuses a chat.
    """
    options = {"attempts": 5, "timeout": 600.0, "max_tokens": max_new_tokens, "log_probs": False}
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return asyncio.run(_complete(chats, Endpoint(model, base_url, **options, **sampling)))


async def _complete(chats: list[Chat], endpoint: Endpoint) -> list[Generation]:
    async with endpoint:
        asked = [endpoint.ask(chat, _read) for chat in chats]
        try:
            return [generation for generation, _ in await asyncio.gather(*asked)]
        except NoVerdict as error:
            raise InputError(f"{endpoint.url} does not answer a prompt: {error}; {CONTINUES}") from None


def _read(content: Any) -> Generation:
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
    return Generation(text, tokens, choice.get("finish_reason") == "stop")
