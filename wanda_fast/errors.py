"""One exception type a cause; each carries one sentence that names the culprit and the numbers."""


class WandaFastError(Exception):
    """Any input that wanda_fast refuses, or any resource it lacks."""


class UnknownMethodError(WandaFastError, ValueError):
    """No pruning method of that name is registered."""


class PatternError(WandaFastError, ValueError):
    """A sparsity pattern that does not parse, or does not fit a linear's in_features."""


class SparsityRatioError(WandaFastError, ValueError):
    """A ratio outside [0, 1), or at odds with the pattern."""


class CalibrationError(WandaFastError, ValueError):
    """Calibration or evaluation text that is missing, unreadable or too short."""


class NoPrunableBlockError(WandaFastError, ValueError):
    """No repeated block with nn.Linear weights was found."""


class HiddenStatesError(WandaFastError, ValueError):
    """Blocks that cannot run one by one: they take something else than one sequence's hidden states after the
    other, or a forward does not run them in turn, each once."""


class IgnorePatternError(WandaFastError, ValueError):
    """An --ignore pattern that matches no linear, or is no valid regular expression."""


class NonFiniteError(WandaFastError, ValueError):
    """NaN or infinity in a weight or in the activations that a linear receives."""


class HessianError(WandaFastError, ArithmeticError):
    """A Hessian that no dampening makes positive definite, or a dampening that is no positive number."""


class DeviceError(WandaFastError, ValueError):
    """A device that is neither the CPU nor a GPU of this machine."""


class CheckpointError(WandaFastError, OSError):
    """A model folder or file that cannot be loaded."""


class OutputError(WandaFastError, OSError):
    """An output folder that is not empty, or cannot be written."""


class MaskError(WandaFastError, ValueError):
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
