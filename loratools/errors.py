"""Every error that loratools raises on purpose.

    LoratoolsError
    ├── InputError              what was given cannot be used
    │   ├── MissingFileError      a path that does not exist
    │   ├── CorruptFileError      a header, index or payload that contradicts itself
    │   ├── UnknownFormatError    no adapter format, or more than one, fits the file
    │   ├── UnknownArchitectureError no known model has these modules, or several have
    │   ├── MalformedAdapterError an adapter whose tensors do not belong together
    │   ├── UnsupportedError      recognised, and refused with the reason
    │   ├── HubError              a reference or repository on the Hub that cannot be read
    │   └── NonFiniteError        NaN or infinity where a number belongs
    ├── MatchError              an adapter tensor finds no home in the base
    ├── OutputError             the destination exists, is unsafe, or cannot hold the result
    │   └── UploadError           the Hub does not take what was to be pushed
    └── OptionError             options that contradict each other or the input

``message`` says what and where; ``hint`` says the next step.
"""

from __future__ import annotations


class LoratoolsError(Exception):
    """Base class: a failure with a stated reason and, where there is one, a next step.

    Attributes:
        message: what failed, and where; names the file, tensor or option.
        hint: the next step, or ``None``.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(LoratoolsError):
    """What was given cannot be used."""


class MissingFileError(InputError):
    """A path that does not exist, or a folder without the file it should hold."""


class CorruptFileError(InputError):
    """A header, index or payload that contradicts itself or the file's size."""


class UnknownFormatError(InputError):
    """No known adapter format fits the file, or more than one does."""


class UnknownArchitectureError(InputError):
    """No known architecture has an adapter's or base's modules, or more than one has."""


class MalformedAdapterError(InputError):
    """Adapter tensors that do not belong together: a missing partner, ranks that differ."""


class UnsupportedError(InputError):
    """Something recognised that cannot be done, with the reason and the remedy."""


class NonFiniteError(InputError):
    """NaN or infinity in an adapter, a base weight or a result."""


class HubError(InputError):
    """A reference or a repository on the Hub that cannot be read."""


class MatchError(LoratoolsError):
    """An adapter tensor that finds no home in the base, or not exactly one."""


class OutputError(LoratoolsError):
    """The destination exists, would destroy an input, or cannot hold the result."""


class UploadError(OutputError):
    """The Hub does not take what was to be pushed, or it should not be pushed as it is."""


class OptionError(LoratoolsError):
    """Options that contradict each other or the input."""
