"""What can go wrong in encoding, by name. The message has the value, the rule, and what to do."""


class EncodeError(Exception):
    """The selection can't be encoded."""


class CacheDamaged(EncodeError):
    """A file of the cache is not what `encode` wrote."""


class CacheMismatch(EncodeError):
    """A file of the cache was made with something else than it is to be used with; the message says which."""


class UnusableImage(EncodeError):
    """A selected image is missing from its shard, can't be decoded, or has values that can't be stored."""
