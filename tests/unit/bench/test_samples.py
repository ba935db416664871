"""Samples that are kept, and those that come out of the virtual machine."""

from pathlib import Path

import pytest

from tests.bench import samples


def test_a_part_that_is_measured_again_replaces_its_samples_and_no_others(tmp_path: Path) -> None:
    with samples.kept(tmp_path, "here", parts=["datapath", "revocation"]) as keep:
        keep({"kind": "sample", "round": 0})
        keep({"kind": "revocation", "what": "label"})
    with samples.kept(tmp_path, "here", parts=["datapath"]) as keep:
        keep({"kind": "sample", "round": 7})
    assert samples.read(tmp_path, "here") == [
        {"kind": "revocation", "what": "label"},
        {"kind": "sample", "round": 7},
    ]


def test_what_is_handed_out_is_found_again_among_other_output(capsys: pytest.CaptureFixture[str]) -> None:
    print("  1.0s round 1 of 9")
    samples.hand_out({"kind": "sample", "path": "link"})
    found = [samples.handed_out(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [None, {"kind": "sample", "path": "link"}]


def test_no_run_means_no_samples(tmp_path: Path) -> None:
    assert samples.read(tmp_path, "vm") == []
