"""The errors of the model library: each message has the value, the rule, and what to do."""

from __future__ import annotations


class LdmError(Exception):
    """Root of all errors that this package raises for its users."""


class ConfigError(LdmError, ValueError):
    """A configuration that names no network, schedule, sampler or combination of them that exists here."""


class InputError(LdmError, ValueError):
    """A tensor or prompt of a wrong shape, type or value."""


class FolderError(LdmError):
    """A model folder, or a file in it, that is absent, corrupt, refused, or doesn't fit its configuration."""


class EncoderMissing(LdmError):
    """A conditioning encoder's package or files are not installed."""


class GenerationError(LdmError):
    """Sampling produced values that are not numbers."""
