"""Errors of stores, and what drivers raise put into one message: what was tried, where, why it failed, what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

ROOM_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PERMANENT_ERRNOS = ROOM_ERRNOS | {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
}
OF_ONE_FILE = {errno.EIO, errno.EISDIR, errno.ELOOP}
"""Errors that are of one file of a local store: a bad place of the disk, or no file where one has to be. The store
answers, that file is lost."""


class StorageError(Exception):
    """A store can't be read or written; the message names the store, the path, the cause and what to do."""


class StoreUnwritable(StorageError):
    """The store can't be written to until somebody makes room or gives leave: trying again would meet the same."""


class FileDamaged(StorageError):
    """A file in a store is not what was recorded of it; the message has both."""


@contextlib.contextmanager
def reading(location: str) -> Iterator[None]:
    """Turns what a driver raises into `StorageError`; where nothing is, into `FileNotFoundError`; where a local file
    alone is lost, into `FileDamaged`."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except NotADirectoryError as error:  # a file lies where a folder would have to be
        raise FileNotFoundError(errno.ENOENT, "nothing is published there", location) from error
    except Exception as error:
        if not _is_of_driver(error):
            raise
        if getattr(error, "errno", None) in OF_ONE_FILE and "://" not in location:
            raise FileDamaged(f"{location} can't be read: {_cause(error)}; bring the right file back") from error
        remedy = _MAKE_ROOM if getattr(error, "errno", None) in ROOM_ERRNOS else _remedy(error) or _CHECK_READABLE
        raise StorageError(f"can't read {location}: {_cause(error)}; {remedy}") from error


@contextlib.contextmanager
def writing(location: str) -> Iterator[None]:
    """Turns what a driver raises into `StorageError`; into `StoreUnwritable` where trying again is in vain."""
    try:
        yield
    except Exception as error:
        if isinstance(error, StorageError) or not _is_of_driver(error):
            raise
        permanent = getattr(error, "errno", None) in PERMANENT_ERRNOS or isinstance(error, PermissionError)
        kind = StoreUnwritable if permanent or _lacks_credentials(error) else StorageError
        raise kind(f"can't write {location}: {_cause(error)}; {_remedy(error) or _CHECK_WRITABLE}") from error


@contextlib.contextmanager
def opening(url: str) -> Iterator[None]:
    """Turns what fsspec raises about the URL of a store into `StorageError`."""
    try:
        yield
    except ImportError as error:
        install = "pip install 'latentworks[s3]'" if url.startswith(("s3:", "s3a:")) else "install that package"
        raise StorageError(f"no driver for store {url!r} is installed ({_cause(error)}): {install}") from error
    except Exception as error:
        if not _is_of_driver(error):
            raise
        raise StorageError(
            f"store {url!r} can't be used: {_cause(error)}; give a folder, s3://bucket/prefix, or another URL that"
            " fsspec has a driver for (recipe key `store`)"
        ) from error


_MAKE_ROOM = "make room for this machine's copy, or name another folder for copies with LATENTWORKS_CACHE"
_CHECK_READABLE = "check that the store exists, answers and may be read (recipe key `store`), then try again"
_CHECK_WRITABLE = (
    "check that the store exists, has room and may be written (recipe key `store`), then run the same command again"
)


def _is_of_driver(error: Exception) -> bool:
    """Whether it is about the store: an operating system's error, or one of a class that a driver's package defines.

    Drivers are any package that fsspec knows, and share no class of errors: botocore's and aiohttp's are none of
    Python's own. What else Python itself raises is somebody's mistake, and stays what it is.
    """
    return isinstance(error, OSError | ValueError | NotImplementedError) or type(error).__module__ != "builtins"


def _cause(error: Exception) -> str:
    """Its words, in one line."""
    words = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(words).splitlines()[0].rstrip(".")


def _remedy(error: Exception) -> str:
    if _lacks_credentials(error):
        return (
            "give the store's credentials in the environment, as its driver documents (for S3 AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), then run the same command again"
        )
    if isinstance(error, PermissionError):
        return "ask for access, or use other credentials or another store (recipe key `store`)"
    if _named(error, "EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"):
        return "check the network and the store's address (for S3 AWS_ENDPOINT_URL), then run the same command again"
    return ""


def _lacks_credentials(error: Exception) -> bool:
    return _named(
        error, "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"
    ) or _named(error, "ProfileNotFound", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "DefaultCredentialsError")


def _named(error: Exception, *names: str) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)
