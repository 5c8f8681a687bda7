"""The one error for what files hold."""


class DataError(ValueError):
    """A file cannot be read, or holds something else than what is needed; one line that names the file."""
