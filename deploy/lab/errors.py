"""What can go wrong, in words for the person at the keyboard."""

from collections.abc import Sequence


class LabError(RuntimeError):
    """The lab cannot do what was asked; the message says what is wrong and what to do."""


class CommandFailed(LabError):
    """A program that the lab ran ended with an error."""

    def __init__(self, argv: Sequence[str], returncode: int, stdout: str, stderr: str) -> None:
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        # Both: some programs, `docker build` among them, give the reason on standard output.
        said = "\n".join(text.strip()[-1500:] for text in (stdout, stderr) if text.strip()) or "it printed nothing"
        super().__init__(f"`{' '.join(argv)}` ended with status {returncode}: {said}")
