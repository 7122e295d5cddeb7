"""The one error a user is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what, where (file, row, option) and what to do."""
