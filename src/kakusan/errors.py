"""The one error that reaches a person as a sentence.

Every message says what is wrong, with its value and shape, and what to do. The command line
prints it alone, without a traceback; a library user sees an ordinary exception.
"""


class KakusanError(ValueError):
    """Something a person can mend: a bad file, value, shape or key."""


class UsageError(KakusanError):
    """The request itself is wrong (an unknown key, a bad value): exit code 2, not 1."""
