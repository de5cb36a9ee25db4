"""Rows of packaged tables: a wrong one is one error with its place, and so are two devices under one name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from powerplan.documents import parse_yaml
from powerplan.errors import InputError
from powerplan.hardware import Device, by_any_name, devices
from powerplan.report.render import Report, render
from powerplan.typed import rows_of

ROW = "{name: a, memory_gb: 80, memory_gbs: 2000, source: datasheet}"
WRONG = {
    "devices: [{name: a, memory_gb: 80, memory_gbs: 2000}]": "h.yaml:1:11: devices[0].source: is missing",
    f"devices: [{ROW}, {ROW}]": "h.yaml:1:81: devices[1].name: 'a' is the name of an earlier row",
    f"devices: [{ROW.replace('datasheet', '')}]": "devices[0].source: null is not a text",
    f"devices: [{ROW.replace('80', '0')}]": "h.yaml:1:32: devices[0].memory_gb: 0 is out of range; allowed is ",
    f"devices: [{ROW.replace('source', 'sources')}]": "devices[0].sources: unknown key; did you mean source? allowed",
    "devices: [h100]": "h.yaml:1:11: devices[0]: 'h100' is not a mapping",
    "devises: []": "h.yaml:1:1: needs a list under the key devices",
    "3": "h.yaml:1:1: needs a list under the key devices",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_row_of_hardware(text: str) -> None:
    with pytest.raises(InputError) as refused:
        rows_of(parse_yaml(text, "h.yaml"), "devices", Device)
    assert WRONG[text] in str(refused.value)


def test_two_devices_under_one_name() -> None:
    first = devices()["h100-sxm"]
    other = msgspec.structs.replace(first, name="h100-new", aliases=("H100 SXM5",))
    with pytest.raises(InputError, match="'H100 SXM5' is a name or alias of both h100-sxm and h100-new"):
        by_any_name([first, other])
    with pytest.raises(InputError, match="'h100-sxm' is a name or alias of both"):
        by_any_name([first, msgspec.structs.replace(other, aliases=("h100-sxm",))])
    assert len(by_any_name(devices().values())) == sum(1 + len(device.aliases) for device in devices().values())


def test_a_format_that_nobody_wrote() -> None:
    unknown: Any = "xml"
    with pytest.raises(AssertionError, match="'xml'"):
        render(Report("powerplan.test/1", {}, [], []), unknown)
