"""What calls of the double raise."""


class Violation(AssertionError):
    """A rule of NCCL was broken."""


class NcclError(RuntimeError):
    """What cupy raises for a failed call."""
