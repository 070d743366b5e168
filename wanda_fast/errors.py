"""One exception type a cause; each carries one sentence that names the culprit and the numbers."""


class WandaFastError(Exception):
    """Any input that wanda_fast refuses, or any resource it lacks.

    Attributes:
        resumable: whether `--resume` can succeed where this run failed, so that the blocks which it finished
            are kept. False: the same input would be refused again.
    """

    resumable = True


class RefusedInputError(WandaFastError, ValueError):
    """Input that no second try would accept."""

    resumable = False


class UnknownMethodError(RefusedInputError):
    """No pruning method of that name is registered."""


class PatternError(RefusedInputError):
    """A sparsity pattern that does not parse, or does not fit a linear's in_features."""


class SparsityRatioError(RefusedInputError):
    """A ratio outside [0, 1), or at odds with the pattern."""


class CalibrationError(RefusedInputError):
    """Calibration or evaluation text that is missing, unreadable or too short."""


class NoPrunableBlockError(RefusedInputError):
    """No repeated block with nn.Linear weights was found."""


class HiddenStatesError(RefusedInputError):
    """Blocks that cannot run one by one: they take something else than one sequence's hidden states after the
    other, or a forward does not run them in turn, each once."""


class IgnorePatternError(RefusedInputError):
    """An --ignore pattern that matches no linear, or is no valid regular expression."""


class NonFiniteError(RefusedInputError):
    """NaN or infinity in a weight or in the activations that a linear receives."""


class HessianError(WandaFastError, ArithmeticError):
    """A Hessian that no dampening makes positive definite, or a dampening that is no positive number."""


class DeviceError(RefusedInputError):
    """A device that is neither the CPU nor a GPU of this machine."""


class CheckpointError(WandaFastError, OSError):
    """A model folder or file that cannot be loaded."""


class OutputError(WandaFastError, OSError):
    """An output folder that is not empty, or cannot be written."""


class MaskError(RefusedInputError):
    """A mask file that is none, or does not fit the model."""


class OutOfMemoryError(WandaFastError, MemoryError):
    """Memory ran out; the sentence says what to lower."""


class MissingDependencyError(WandaFastError, ImportError):
    """An optional package is needed for what was asked."""


class NotStreamableError(WandaFastError):
    """A checkpoint that cannot be read block by block; whoever opened it loads it whole instead."""


class ResumeError(WandaFastError):
    """An unfinished run that cannot be continued as asked, or would be lost."""


class InterruptedRunError(WandaFastError):
    """Ctrl-C: the run ended after a block, and can be continued."""
