"""The one error a user can cause: bad input, told in one line."""


class UserError(Exception):
    """Bad input (config, path, image, checkpoint, flag).

    The message names the thing, says what was expected and what to do. The command line prints it as one line
    on stderr and exits with code 2; a library caller catches it like any exception.
    """
