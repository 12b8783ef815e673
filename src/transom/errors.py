"""Every exception transom raises on purpose."""

from __future__ import annotations


class TransomError(Exception):
    """Base of all exceptions of transom."""


class HostError(TransomError):
    """The model cannot be used as a host: its family is unknown, or a part of it is."""


class FitError(TransomError):
    """A method cannot be fitted to this host, or not beside what is fitted already."""


class SettingsError(TransomError, ValueError):
    """A hyperparameter is unknown or out of range."""


class TokensError(TransomError):
    """The tokens of a running call are not what a fitted block expects."""


class CheckpointError(TransomError):
    """A saved fitting cannot be read, or belongs to something else."""


class DataError(TransomError):
    """Images or labels cannot be used for a measurement."""


class ExportError(TransomError):
    """A model cannot be written as a file that runs without transom."""


class TrainingError(TransomError):
    """A training run cannot go on: its loss is no number, or its folder holds another run."""


class FeedError(TransomError):
    """A feed of papers cannot be read: its form is unknown, or one of its entries is broken."""


class StoreError(TransomError):
    """The database of the gallery cannot be opened, or does not hold what was asked for."""


class MailError(TransomError):
    """A mail cannot be sent: an address or the configuration is wrong, or the server refuses."""


class GalleryError(TransomError):
    """The gallery cannot be built or served as asked, or an upload cannot be used."""
