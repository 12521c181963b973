"""What can go wrong in selecting, by name. The message has the value, the rule, and what to do."""


class SelectError(Exception):
    """The recipe's `select` block doesn't fit the acquired pairs."""


class UnknownColumn(SelectError):
    """A rule names a column that neither ledgers nor scores have."""


class UnusableRule(SelectError):
    """A rule's value doesn't fit its operation or the type of its column."""


class NothingSelected(SelectError):
    """No pair is left to train on; the message says what became of them."""
