"""Starts the agent."""

import sys

from agent.settings import AgentSettings
from agent.wiring import run
from hivewire import logs
from hivewire.errors import HivewireError
from hivewire.process import harden
from hivewire.settings import load


def main() -> None:
    try:
        harden()
        settings = load(AgentSettings)
        logs.setup("agent", level=settings.log_level, style=settings.log_format)
        sys.exit(0 if run(settings) else 1)
    except HivewireError as error:
        sys.exit(f"hivewire-agent: {error}")


if __name__ == "__main__":
    main()
