"""The comment of a table, the transaction that replaces it, and names of devices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel import hosting, nftables
from agent.kernel.node import temporary_name
from hivewire.errors import KernelBusy
from hivewire.ids import TaskId

SWARM_IDS = st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=25, max_size=25)


def test_a_comment_is_found_among_other_data() -> None:
    """User data is a list of type, length, value; the comment has type 0 and ends with a zero."""
    assert nftables.comment(bytes([7, 2, 1, 1, 0, 5]) + b"abcd\0") == "abcd"
    assert nftables.comment(bytes([7, 2, 1, 1])) == ""


@given(st.binary())
def test_user_data_of_others_is_no_error(data: bytes) -> None:
    """A table of that name that somebody else made may carry anything."""
    nftables.comment(data)


@pytest.mark.parametrize("text", ["", "flush ruleset", "table ip nat {\n}\n", "add table ip hivewire"])
def test_rules_of_other_tables_are_refused(text: str) -> None:
    """The adapter replaces Hivewire's table and no other."""
    with pytest.raises(KernelBusy):
        nftables.replace(None, lambda _: pytest.fail("carried out"), text)


@given(SWARM_IDS)
def test_a_temporary_name_is_accepted_by_the_host(task: str) -> None:
    """What the agent makes of a task's id is a name that the kernel and the host take."""
    name = temporary_name(TaskId(task))
    assert len(name) <= 15
    assert hosting.is_device_name(name)


@pytest.mark.parametrize("name", ["eth0", "wg0", "hw", "hw-1", "hw/../x", "hw1\n", "HW1", "hw12345678901234"])
def test_no_other_name_is_accepted(name: str) -> None:
    """The host never touches an interface that is not its own."""
    assert not hosting.is_device_name(name)
