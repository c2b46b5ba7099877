"""Every setting of an editing run, in groups; how files name them."""

from coachhook_fast.config.edit_config import PAPER, ROUND_ROBIN_SETTINGS, EditConfig
from coachhook_fast.config.gate import GATES, THRESHOLD_RULES, GateSettings
from coachhook_fast.config.reading import current_names, number_in, read_yaml, settings_in, yaml_mapping
from coachhook_fast.config.solve import SolveSettings
from coachhook_fast.config.statistics import START_TOKENS, StatisticsSettings
from coachhook_fast.config.targets import TargetSettings

__all__ = [
    "GATES",
    "PAPER",
    "ROUND_ROBIN_SETTINGS",
    "START_TOKENS",
    "THRESHOLD_RULES",
    "EditConfig",
    "GateSettings",
    "SolveSettings",
    "StatisticsSettings",
    "TargetSettings",
    "current_names",
    "number_in",
    "read_yaml",
    "settings_in",
    "yaml_mapping",
]
