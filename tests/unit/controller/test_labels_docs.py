"""The documents and the code say the same of labels and findings."""

import re
from pathlib import Path

from controller.policy.findings import KINDS, finding, in_order, render
from controller.policy.labels import LABELS, MOST_ENTRIES, MTU_RANGE
from hivewire.records import Severity
from tests.unit.controller.test_labels_bad import BAD_LABELS

DOCS = Path(__file__).parents[3] / "docs"
FINDINGS = (DOCS / "findings.md").read_text(encoding="utf-8")
LABELS_TEXT = (DOCS / "labels.md").read_text(encoding="utf-8")
SECTION = re.compile(r'^<a id="(hw\d{3})"></a>\n### (HW\d{3}): (.+)\n\n\*(\w+)\.\* (.+)\n', re.MULTILINE)


def test_every_code_has_its_section() -> None:
    """Anchor, title, severity and explanation of each code stand in findings.md, in the order of the table."""
    assert SECTION.findall(FINDINGS) == [
        (k.code.lower(), k.code, k.title, k.severity.value, k.explanation) for k in KINDS.values()
    ]


def test_every_section_says_what_to_do() -> None:
    """No finding leaves its reader alone."""
    assert FINDINGS.count("**What to do.**") == len(KINDS)


def test_codes_are_in_order_and_anchors_follow() -> None:
    """The table is sorted, and a code leads to its anchor."""
    assert list(KINDS) == sorted(KINDS)
    assert KINDS["HW101"].anchor == "findings.md#hw101"


def test_every_label_has_its_section() -> None:
    """labels.md has an anchor, a heading and a row for each label, and the bounds that hold."""
    for label in LABELS:
        short = label.removeprefix("hivewire.")
        assert f'<a id="{short}"></a>\n## {label}\n' in LABELS_TEXT
        assert f"| [`{label}`](#{short}) |" in LABELS_TEXT
    assert f"at most {MOST_ENTRIES} entries" in LABELS_TEXT
    assert f"from {MTU_RANGE[0]} to {MTU_RANGE[1]}" in LABELS_TEXT


def test_links_between_the_documents_lead_somewhere() -> None:
    """Each anchor that labels.md points at exists."""
    wanted = set(re.findall(r"findings\.md#(\w+)", LABELS_TEXT))
    assert wanted <= set(re.findall(r'<a id="(\w+)"></a>', FINDINGS))


def test_every_code_of_labels_has_a_bad_example() -> None:
    """The table of bad labels covers each error that a label alone can cause."""
    from_labels = {c for c, k in KINDS.items() if c < "HW200" and k.severity is Severity.ERROR} - {"HW113"}
    assert {row.code for row in BAD_LABELS} == from_labels | {"HW202"}


def test_a_finding_reads_as_a_line_and_a_hint() -> None:
    """People see severity, code, subject and text, and below it what to do."""
    item = finding("HW102", "shop_web", 'unknown label "hivewire.link"', 'did you mean "hivewire.links"?')
    assert render(item) == (
        'Error [HW102] (shop_web) unknown label "hivewire.link"\n    did you mean "hivewire.links"?'
    )
    assert render(finding("HW304", "shop_web", "text")) == "Info [HW304] (shop_web) text"


def test_findings_have_one_order() -> None:
    """Sorting takes findings of any codes and severities, and each only once."""
    a, b = finding("HW201", "a", "x"), finding("HW205", "a", "x")
    assert in_order([b, a, b]) == (a, b)
