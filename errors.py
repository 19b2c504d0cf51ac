"""The errors StepQuant raises. Each message says what was found, where, and what to do now; none needs a traceback."""


class StepQuantError(Exception):
    """Base of all errors whose message is written for the person at the screen."""


class SchemeError(StepQuantError):
    """A recipe or scheme that this version cannot run."""


class PlanError(StepQuantError):
    """A budget that no plan fits, or a plan's input that makes no sense."""


class WeightError(StepQuantError):
    """A weight that must not be quantized as it is: NaN, infinite, wrong shape."""


class CalibrationError(StepQuantError):
    """Calibration data that is missing, empty or belongs to another model."""


class FormatError(StepQuantError):
    """A file that cannot be read or written."""


class ModelError(StepQuantError):
    """A model that StepQuant does not quantize: not SDXL, or quantized already."""


class HostError(StepQuantError):
    """The surrounding program lacks something StepQuant needs."""


class LayoutError(StepQuantError):
    """A tensor whose shape, dtype or strides a kernel cannot take."""
