"""The errors that bad input raises. Each message names the file, the problem and the remedy."""


class CovidmaskError(Exception):
    """Base of every error below; the command line prints it in one sentence and exits with 2."""


class DataError(CovidmaskError, ValueError):
    """An image, a mask, a split file or a folder is not what it should be."""


class CheckpointError(CovidmaskError, ValueError):
    """A weights or checkpoint file cannot be read, or belongs to another model."""


class OutputError(CovidmaskError, OSError):
    """A result cannot be written: no permission, a full disk, a path that is in the way."""


class TrainingError(CovidmaskError, RuntimeError):
    """Training cannot go on, for example because the loss is no longer a finite number."""
