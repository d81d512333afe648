"""InputError: the one exception for everything a user can get wrong; commands print it and exit with code 2."""


class InputError(ValueError):
    """Bad input. The message names the input and the fix."""


class BuildError(Exception):
    """Why a library of csrc/ could not be compiled or loaded, in one line."""
