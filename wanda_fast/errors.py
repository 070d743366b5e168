"""The exceptions of wanda_fast: one type for each cause.

A message is one sentence that names the faulty part and repeats the numbers.
"""


class WandaFastError(Exception):
    """wanda_fast refuses an input, or lacks a resource.

    Attributes:
        resumable: whether `--resume` can succeed where this run failed. If so, the blocks that the run
            finished are kept. False if the same input would be refused again.
    """

    resumable = True


class RefusedInputError(WandaFastError, ValueError):
    """An input that a second run would refuse as well."""

    resumable = False


class UnknownMethodError(RefusedInputError):
    """An option's value is not one of its choices, e.g. a pruning method that is not registered."""


class OptionError(RefusedInputError):
    """A value that an option does not take."""


class SweepError(RefusedInputError):
    """A sweep over several settings cannot do what one run can."""


class AllocationError(RefusedInputError):
    """Ratios by name do not fit the model or the pattern, or cannot be found."""


class ExpectedError(RefusedInputError):
    """A file of published figures is broken, or has no row that fits the run."""


class ScoreError(RefusedInputError):
    """A method's score of the wrong shape, or with NaN."""


class PatternError(RefusedInputError):
    """A sparsity pattern cannot be parsed, or does not fit a linear's in_features."""


class SparsityRatioError(RefusedInputError):
    """A ratio is outside [0, 1), or contradicts the pattern."""


class CalibrationError(RefusedInputError):
    """Calibration or evaluation data is missing, unreadable, too short, or does not fit the model."""


class NoPrunableBlockError(RefusedInputError):
    """The model has no repeated block with nn.Linear weights."""


class HiddenStatesError(RefusedInputError):
    """The model's blocks cannot be run one by one.

    Either a block's input is not one row of hidden states for each sequence, or the model's forward does not
    call the blocks in order, each once.
    """


class IgnorePatternError(RefusedInputError):
    """An --ignore pattern matches no linear, or is not a valid regular expression."""


class DtypeError(RefusedInputError):
    """A weight of a model in memory has a dtype that no operation takes."""


class NonFiniteError(WandaFastError, ValueError):
    """A weight, or the activations that a linear receives, hold NaN or infinity.

    Resumable: the weight's shard may be broken, and can be repaired.
    """


class HessianError(WandaFastError, ArithmeticError):
    """No dampening makes a Hessian positive definite, or the dampening is not a positive number."""


class DeviceError(RefusedInputError):
    """A device is neither the CPU nor a GPU of this machine."""


class CheckpointError(WandaFastError, OSError):
    """A model's folder or file cannot be loaded."""


class QuantizedModelError(RefusedInputError):
    """A model's weights are quantised."""


class PackedModelError(RefusedInputError):
    """A packed model cannot be trained or saved, or transformers cannot load a model of its weights."""


class AdapterError(RefusedInputError):
    """A model is an adapter, or has adapters that are not merged into its weights."""


class LiveModelError(RefusedInputError):
    """A model in memory is not whole, or is not a transformers model."""


class OutputError(WandaFastError, OSError):
    """An output folder is not empty, or cannot be written."""


class PathError(RefusedInputError):
    """A path begins with `~` and the home folder is unknown."""


class OutputInUseError(OutputError):
    """Another run is writing the output folder."""


class RanksError(RefusedInputError):
    """Several processes cannot prune a model together as they were started."""


class PackError(RefusedInputError):
    """A checkpoint cannot be packed or unpacked: it is packed already or not at all, or gets no smaller."""


class MaskError(RefusedInputError):
    """A file is not a mask file, or does not fit the model."""


class ReportError(RefusedInputError):
    """A folder or file holds no report of a finished run."""


class OutOfMemoryError(WandaFastError, MemoryError):
    """Memory ran out. The message says which options lower the need."""


class MissingDependencyError(WandaFastError, ImportError):
    """An optional package is required and not installed."""


class NotStreamableError(WandaFastError):
    """A checkpoint cannot be read block by block. The caller loads it as a whole instead."""


class ResumeError(WandaFastError):
    """An unfinished run cannot be continued with these options, or would be lost."""


class InterruptedRunError(WandaFastError):
    """The run was stopped by Ctrl-C after a block, and can be continued."""


class LostRankError(WandaFastError):
    """Another rank of the run has ended or does not answer. The run can be continued."""


class AnotherRankFailedError(LostRankError):
    """Another rank of the run has failed, and says why."""


class RanksDifferError(WandaFastError):
    """The ranks of a run do not have the same weights."""
