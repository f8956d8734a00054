"""The error of everything that reads, checks or writes model folders."""


class MergeError(ValueError):
    """Models that cannot be read or merged. The message names the model, the file and the tensor, and says what to do."""
