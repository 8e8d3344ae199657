"""What a provider's agent and its commands share: one configuration file, read and written."""

from cocoon.agent.config import (
    AgentConfig,
    ModelConfig,
    ModelPrice,
    parse_config,
    read_config,
)
from cocoon.agent.writing import config_text, write_config

__all__ = [
    "AgentConfig",
    "ModelConfig",
    "ModelPrice",
    "config_text",
    "parse_config",
    "read_config",
    "write_config",
]
