"""Every error that Featherweight raises on purpose.

    FeatherweightError
    ├── WorkloadError     the user's workload breaks its contract
    ├── SettingError      a setting is unknown, of the wrong type or out of range
    ├── RecipeError       a recipe cannot be read, or its steps do not fit together
    ├── LayerError        a pattern matches no layer, or a layer cannot be treated
    ├── ExportError       a target cannot hold the network
    ├── TargetError       a target is unknown or its runtime is not installed
    ├── ArtifactError     a folder is no artifact, or not the one that was written
    ├── DataError         inputs cannot be read or do not fit the network, or outputs cannot be written
    ├── ProcessError      a process was killed, hung or ran out of memory: trying again may help
    └── BudgetError       what the user allows makes no sense

A message is one paragraph: what is wrong, where, why, and what to do. The command line prints it and exits
with 2. Nothing here formats messages: whoever raises knows best what to say.
"""


class FeatherweightError(Exception):
    """The base of all of them: catch this to catch every refusal of ours."""


class WorkloadError(FeatherweightError):
    """The user's workload breaks its contract."""


class SettingError(FeatherweightError):
    """A setting is unknown, of the wrong type or out of range."""


class RecipeError(FeatherweightError):
    """A recipe cannot be read, or its steps do not fit together."""


class LayerError(FeatherweightError):
    """A pattern matches no layer, or a layer cannot be treated."""


class ExportError(FeatherweightError):
    """A target cannot hold the network."""


class TargetError(FeatherweightError):
    """A target is unknown or its runtime is not installed."""


class ArtifactError(FeatherweightError):
    """A folder is no artifact, or not the one that was written."""


class DataError(FeatherweightError):
    """Inputs cannot be read or do not fit the network, or outputs cannot be written."""


class ProcessError(FeatherweightError):
    """A process was killed, hung or ran out of memory: trying again may help."""


class BudgetError(FeatherweightError):
    """What the user allows makes no sense."""
