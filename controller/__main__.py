"""Starts the controller."""

import sys

from controller.settings import ControllerSettings
from controller.wiring import run
from hivewire import logs
from hivewire.errors import HivewireError
from hivewire.process import harden
from hivewire.settings import load


def main() -> None:
    try:
        harden()
        settings = load(ControllerSettings)
        logs.setup("controller", level=settings.log_level, style=settings.log_format)
        sys.exit(0 if run(settings) else 1)
    except HivewireError as error:
        sys.exit(f"hivewire-controller: {error}")


if __name__ == "__main__":
    main()
