"""InputError: the one exception for everything a user can get wrong. Commands print it and exit with code 2."""


class InputError(ValueError):
    """Bad input. The message names the input and the fix."""
