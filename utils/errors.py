class UserError(Exception):
    """Something that the user can mend: `main.py` prints its one line and exits with status 1.

    The message names the file or flag that is wrong and says what to do about it.
    """
