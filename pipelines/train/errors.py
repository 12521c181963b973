"""What can go wrong in training, by name. The message has the value, the rule, and what to do."""


class TrainError(Exception):
    """Training can't start, or can't go on."""


class UnusableData(TrainError):
    """There are too few samples, or one of them can't be read as what it is listed as."""


class WorkerFailed(TrainError):
    """A training process died or raised, more often than it is started again."""
