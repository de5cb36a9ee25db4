"""Links of a cluster: which of them a group has, and what collectives take on them, by hand and as laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.errors import InputError, on_command_line
from powerplan.hardware import Device, devices, find_device
from powerplan.run.links import (
    LINK_SHARE,
    NETWORK_LATENCY_S,
    NETWORK_SHARE,
    START_S,
    Cluster,
    Link,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    cluster_of,
    link_for,
    reduce_scatter_s,
    send_s,
)

H100 = find_device("h100-sxm")
NVLINK, NETWORK = 450e9 * LINK_SHARE, 50e9 * NETWORK_SHARE

RANKS = st.integers(2, 4096)
BYTES = st.floats(0, 1e15)
LINKS = st.builds(Link, st.floats(1e6, 1e13), st.floats(0, 1e-3), st.just("link"))


@st.composite
def groups(draw: st.DrawFn) -> tuple[Cluster, int, int]:
    """Return a cluster of H100s with a group in it: its ranks, and how far apart they lie."""
    ranks, stride, copies = draw(st.integers(2, 64)), draw(st.integers(1, 64)), draw(st.integers(1, 4))
    size = draw(st.sampled_from([1, 2, 4, 8, 12, 72]))
    return cluster_of(H100, ranks * stride * copies, node_devices=size), ranks, stride


def test_64_h100s_are_8_nodes_of_nvlink_and_network() -> None:
    cluster = cluster_of(H100, 64)
    assert (cluster.nodes, cluster.node_devices) == (8, 8)
    assert cluster.inside == Link(NVLINK, 3.4e-6, "NVLink")
    assert cluster.between == Link(NETWORK, NETWORK_LATENCY_S, "network")


def test_groups_within_a_node_and_over_nodes() -> None:
    cluster = cluster_of(H100, 64)
    assert link_for(cluster, 8) == link_for(cluster, 2, 4) == cluster.inside
    apart = link_for(cluster, 8, 8)
    assert (apart.name, apart.bytes_per_s, apart.latency_s, apart.members) == ("network", NETWORK, 14e-6, 1)
    everywhere = link_for(cluster, 64)
    assert (everywhere.name, everywhere.members) == ("NVLink and network", 8)
    assert everywhere.bytes_per_s == min(NVLINK, 8 * NETWORK)
    assert everywhere.latency_s == pytest.approx((56 * 3.4e-6 + 7 * 14e-6) / 63)
    halves = link_for(cluster, 16, 4)
    assert (halves.members, halves.bytes_per_s) == (2, 2 * NETWORK)


@pytest.mark.parametrize(
    ("name", "devices", "nodes", "size"),
    [
        ("gb200", 256, 4, 64),
        ("gb200", 144, 2, 72),
        ("h100-sxm", 4, 1, 4),
        ("h100-sxm", 12, 2, 6),
        ("h100-sxm", 13, 2, 8),
    ],
)
def test_devices_are_spread_over_as_few_nodes_as_hold_them(name: str, devices: int, nodes: int, size: int) -> None:
    cluster = cluster_of(find_device(name), devices)
    assert (cluster.nodes, cluster.node_devices) == (nodes, size)


@pytest.mark.parametrize(("ranks", "members"), [(3, 1), (12, 4), (10, 2)])
def test_a_group_that_fits_no_nodes_has_its_smallest_share(ranks: int, members: int) -> None:
    """Groups of 3 in nodes of 8: devices 6, 7 | 8 are one, and one card carries what leaves the second node."""
    assert link_for(cluster_of(H100, 120), ranks).members == members


def test_one_device_has_no_links() -> None:
    cluster = cluster_of(H100, 1)
    assert (cluster.inside, cluster.between, cluster.nodes) == (None, None, 1)
    link = link_for(cluster, 1)
    for collective in (all_gather_s, reduce_scatter_s, all_reduce_s, all_to_all_s):
        assert collective(link, 1, 1e12) == 0
    assert send_s(link, 1e12) == 0


def test_collectives_by_hand() -> None:
    cluster = cluster_of(H100, 64)
    inside, over, everywhere = link_for(cluster, 8), link_for(cluster, 8, 8), link_for(cluster, 64)
    assert all_gather_s(inside, 8, 8e9) == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 7e9 / 360e9)
    assert reduce_scatter_s(over, 8, 8e9) == pytest.approx(8.4e-6 + 7 * 14e-6 + 7e9 / 48.5e9)
    assert all_to_all_s(inside, 8, 8e9) == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 7e9 / 360e9)
    steps = 56 * 3.4e-6 + 7 * 14e-6
    assert all_gather_s(everywhere, 64, 64e9) == pytest.approx(8.4e-6 + steps + 63e9 / 360e9)
    assert all_to_all_s(everywhere, 64, 64e9) == pytest.approx(8.4e-6 + steps + 56e9 / 48.5e9)
    assert send_s(everywhere, 1e9) == pytest.approx(14e-6 + 1e9 / 48.5e9)
    assert send_s(inside, 1e9) == pytest.approx(3.4e-6 + 1e9 / 360e9)


@given(LINKS, RANKS, BYTES)
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(link: Link, ranks: int, size: float) -> None:
    assert all_reduce_s(link, ranks, size) == reduce_scatter_s(link, ranks, size) + all_gather_s(link, ranks, size)
    assert all_gather_s(link, ranks, size) >= START_S


@given(groups(), BYTES, BYTES)
def test_more_bytes_are_never_faster(group: tuple[Cluster, int, int], one: float, other: float) -> None:
    link, ranks = link_for(*group), group[1]
    few, many = sorted((one, other))
    for collective in (all_gather_s, reduce_scatter_s, all_reduce_s, all_to_all_s):
        assert collective(link, ranks, few) <= collective(link, ranks, many)
    assert send_s(link, few) <= send_s(link, many)


@given(groups(), BYTES)
def test_no_group_is_faster_than_one_in_a_node(group: tuple[Cluster, int, int], size: float) -> None:
    cluster, ranks, stride = group
    link, best = link_for(cluster, ranks, stride), Link(NVLINK, 3.4e-6, "NVLink")
    assert 1 <= max(link.members, 1) <= min(ranks, cluster.node_devices)
    assert all_gather_s(best, ranks, size) <= all_gather_s(link, ranks, size) * (1 + 1e-12)
    assert all_to_all_s(best, ranks, size) <= all_to_all_s(link, ranks, size) * (1 + 1e-12)
    assert send_s(best, size) <= send_s(link, size)


@given(groups(), st.floats(1, 1e4), BYTES)
def test_a_faster_network_is_never_slower(group: tuple[Cluster, int, int], factor: float, size: float) -> None:
    cluster, ranks, stride = group
    faster = cluster_of(H100, cluster.devices, node_devices=cluster.node_devices, network_gbs=50 * factor)
    for collective in (all_gather_s, all_to_all_s):
        then = collective(link_for(faster, ranks, stride), ranks, size)
        assert then <= collective(link_for(cluster, ranks, stride), ranks, size) * (1 + 1e-12)


def test_given_rates_replace_those_of_the_catalogue() -> None:
    cluster = cluster_of(H100, 32, node_devices=4, link_gbs=100, network_gbs=12.5)
    assert cluster.inside == Link(80e9, 3.4e-6, "NVLink")
    assert cluster.between == Link(12.125e9, 14e-6, "network")
    assert cluster.nodes == 8


def test_pcie_has_its_own_latency() -> None:
    inside = cluster_of(find_device("l40s"), 8).inside
    assert inside is not None
    assert (inside.name, inside.latency_s) == ("PCIe", 5.7e-6)


def test_a_link_that_is_needed_and_unknown_is_named() -> None:
    card = find_device("h100-pcie")
    assert cluster_of(card, 2).between is None
    message = "h100-pcie has no network rate in the catalogue, and 8 devices are more than a node of 2; give GB/s"
    with pytest.raises(InputError, match=f"^network_gbs: {message}"):
        cluster_of(card, 8)
    with on_command_line(), pytest.raises(InputError, match=f"^--network-gbs: {message}"):
        cluster_of(card, 8)
    bare = Device(name="bare", memory_gb=1, memory_gbs=1, source="made up")
    with pytest.raises(InputError, match=r"^link_gbs: bare has no link rate in the catalogue, and 4 devices share a"):
        cluster_of(bare, 4, node_devices=8)
    assert cluster_of(card, 8, network_gbs=64).between is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "^devices: 0 is out of range; allowed is at least 1$"),
        ({"devices": 8, "node_devices": 0}, "^node_devices: 0 is out of range; allowed is at least 1$"),
        ({"devices": 8, "link_gbs": 0.0}, "^link_gbs: 0.0 is not a rate; give GB/s per device and direction$"),
        ({"devices": 8, "network_gbs": -1.0}, "^network_gbs: -1.0 is not a rate"),
        ({"devices": 8, "network_gbs": float("nan")}, "^network_gbs: nan is not a rate"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster_of(H100, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", devices().values(), ids=lambda device: device.name)
def test_every_device_says_what_joins_its_node(device: Device) -> None:
    assert device.link is not None
    assert device.link_gbs is not None
    assert device.link_source
    assert device.node_devices > 1
    assert cluster_of(device, device.node_devices).between is None
    if device.network_gbs is not None:
        assert device.network_gbs < device.link_gbs


@pytest.mark.parametrize("device", devices().values(), ids=lambda device: device.name)
def test_a_program_is_given_nearly_the_gib_that_the_datasheet_has_as_gb(device: Device) -> None:
    assert device.usable_mib is not None
    assert device.capacity_bytes == device.usable_mib * 2**20
    assert 0.92 < device.capacity_bytes / (device.memory_gb * 2**30) < 1.01


def test_without_it_the_datasheet_counts() -> None:
    assert Device(name="bare", memory_gb=1.5, memory_gbs=1, source="made up").capacity_bytes == 1_500_000_000
