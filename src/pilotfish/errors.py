"""Every error that Pilotfish raises on purpose: what was given, what is allowed, what to do.

PilotfishError
├── SettingError         a setting, flag or argument outside what is allowed
├── TextError            a text, span or data file that cannot be used
│   └── LeakError        the same source document on both sides of a split
├── ModelError           a model that cannot be used as asked
│   ├── UnknownFamily    no row in the family table
│   ├── PairMismatch     target and draft do not share a vocabulary
│   └── WeightsError     weights that cannot be fetched, checked or stored
├── StorageError         a file that cannot be written: the disk is full
├── ArtefactError        a bank, direction or recording that is damaged or incomplete
│   ├── BankMismatch     a bank made for another model, tokenizer or shape
│   └── DirectionMismatch  directions of another model, or of different sites
├── EndpointError        a judge's server that refuses to work, or has stopped answering
│   └── Unanswered       one request that it did not answer; others may go well
├── GenerationError      a request that the engine refuses, or could not finish
├── EngineFailed         an engine that broke while it worked on a request
│   └── UpstreamError    a server behind the proxy that refuses, breaks off or says what cannot be monitored
├── Busy                 more requests than a server takes on
├── StoreError           a database that cannot be reached or written
└── DeliveryError        an alert that has not arrived where it was sent
"""


class PilotfishError(Exception):
    """Base of all errors that a user can act on; the CLI prints it without a traceback and exits 1."""


class SettingError(PilotfishError, ValueError):
    """A setting, flag or argument outside what is allowed."""


class TextError(PilotfishError, ValueError):
    """A text, span or data file that cannot be used."""


class LeakError(TextError):
    """The same source document stands on both sides of a split."""


class ModelError(PilotfishError):
    """A model that cannot be used as asked."""


class UnknownFamily(ModelError):
    """The model's architecture has no row in the family table."""


class PairMismatch(ModelError):
    """Target and draft do not share a vocabulary."""


class WeightsError(ModelError):
    """Weights that cannot be fetched, checked or stored."""


class StorageError(PilotfishError):
    """A file that cannot be written: the disk is full."""


class ArtefactError(PilotfishError):
    """A bank, direction or recording that is damaged or incomplete."""


class BankMismatch(ArtefactError):
    """A bank made for another model, another tokenizer or another shape."""


class DirectionMismatch(ArtefactError):
    """Directions of another model, or of different sites."""


class EndpointError(PilotfishError):
    """A judge's server that refuses to work, or has stopped answering."""


class Unanswered(EndpointError):
    """One request that a server did not answer; others may go well."""


class GenerationError(PilotfishError):
    """A request that the engine refuses, or a generation that could not finish."""


class EngineFailed(PilotfishError):
    """An engine that broke while it worked on a request; its log says why."""


class UpstreamError(EngineFailed):
    """A server behind the proxy that refuses a request, breaks off, or says what cannot be monitored."""

    def __init__(self, message: str, *, status: int = 502, retry_after_s: float = 0.0) -> None:
        """`status`: of the HTTP answer that says so to the client."""
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


class Busy(PilotfishError):
    """More requests than a server takes on; another try later may be taken."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"all places are taken and the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class StoreError(PilotfishError):
    """A database that cannot be reached or written."""


class DeliveryError(PilotfishError):
    """An alert that has not arrived where it was sent, as far as is known."""
