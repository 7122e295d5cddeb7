"""One message for the user, from the chain of errors that a mistake raises."""

import errno
import os
import re
from argparse import ArgumentError

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mixdpo.errors import InputError, NonFiniteError, nearest
from mixdpo.model.memory import is_out_of_memory
from mixdpo.options import HELP, UNKNOWN_OPTION, nearest_path

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# beginnings of jsonargparse's lines that tell a user nothing
NOISE = re.compile("Does not validate|Subtypes|Errors|Given value type|Problem with|Expected a (path b|<class 'N)")
# beginnings of errors of Lightning (a package is missing, a seed is negative), of torch's optimizers, of a full disk
OF_LIBRARIES = re.compile(
    r"Requirement |`val_check|-?\d+ is not in bounds|Invalid (beta|\w+ (rate|value))|.*\(os error \d"
)
NOT_FOUND = re.compile("has no attribute|No module named|path string: |given class_path")


def message_for_user(error: BaseException | None) -> str | None:
    """The message of a user's mistake, or of a machine that is too small; None for a fault of the program.

    jsonargparse wraps an `InputError` of a constructor in another error.
    """
    while error is not None:
        if is_out_of_memory(error):
            return "\n".join(getattr(error, "__notes__", [f"out of memory: {error}"]))
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            where = error.filename or "the run's files"
            return f"cannot write {where}: {os.strerror(error.errno)}. Free some space, or give other --runs"
        if OF_LIBRARIES.match(str(error)):
            return " ".join(str(error).split())
        if isinstance(error, InputError | NonFiniteError | ArgumentError | MisconfigurationException):
            return _innermost(str(error))
        error = error.__cause__ or error.__context__
    return None


def _innermost(message: str) -> str:
    """The one line that matters, without the lines that jsonargparse prints around this line."""
    if unknown := UNKNOWN_OPTION.search(message):
        return f"{unknown[0]} ({HELP})"
    _, nested, leaf = message.rpartition('Parser key "')
    if not nested:
        return message
    key, _, reason = leaf.partition('":')
    reason, *given = re.split(r"(?:Got|Given) value: ", reason)
    value = given[0].splitlines()[0] if given else ""
    if value in ("None", "True", "False"):
        return f"{key} needs a value, not null, true or false: give one (text in quotes), or leave it out ({HELP})"
    lines = dict.fromkeys(line.strip(" -.") for line in reason.splitlines())
    reason = " or ".join(line for line in lines if line and not NOISE.match(line))
    path = re.search(r"(?:class_path'?[=: ]+'|val='|^(?=[\w.]+$))([\w.]+)", value)
    choices = re.findall(r"'([\w.-]+)'(?=[^][]*\])", reason)
    meant = nearest_path(path[1]) if path and NOT_FOUND.search(reason) else nearest(value, choices)
    return f"{key}: {reason}{value and f', not {value}'}{meant} ({HELP})"
