"""The links between the devices of a training run, and the seconds that collective communication takes on them.

An alpha-beta model: a collective over n ranks takes a start, a latency for each step of its ring, and its bytes over
the rate of the slowest link. Ring all-gather and reduce-scatter take n - 1 steps and move (n - 1)/n of the bytes over
every link (Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH";
Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"). NCCL's own estimate
has the same form, and the latencies are its constants (src/graph/tuning.cc).

Not modelled: trees, which NCCL prefers for small all-reduces over many nodes; sums within the switch (NVLS, SHARP);
and a network whose upper levels carry less than its cards. The first two make communication faster, the last slower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, inf

from powerplan.errors import InputError, parameter, shown
from powerplan.hardware import Device

START_S = 8.4e-6
"""Seconds before the first byte of a collective moves (NCCL's base latency of a ring, protocol Simple)."""

LINK_LATENCY_S = {"NVLink": 3.4e-6, "PCIe": 5.7e-6}
"""Seconds of a step between two devices of a node (NCCL's latencies of a ring, protocol Simple, NVLINK and PCI).

Links of other kinds, of which no figure was found, count as NVLink.
"""

NETWORK_LATENCY_S = 14.0e-6
"""Seconds of a step between two nodes (NCCL's latency of a ring, protocol Simple, NET)."""

LINK_SHARE = 0.8
"""The share of a link's rate that a collective reaches within a node.

NCCL counts 20.0 of an NVLink's 25 GB/s on Ampere, 20.6 of 25 on Hopper, 40.1 of 50 on Blackwell (src/graph/topo.h).
"""

NETWORK_SHARE = 0.97
"""The share of a network card's rate that a collective reaches: SimAI counts 48.5 GB/s of a ConnectX-7's 50."""


@dataclass(frozen=True)
class Link:
    """What joins the devices of a group.

    bytes_per_s: what a ring through the group moves past each device, per direction, at the ring's slowest place.
    latency_s: seconds of one step of the ring, as a mean over its steps.
    name: what it is, such as "NVLink", "network" or "NVLink and network".
    across: how a device of the group sends to another node by itself; None where the group lies in one node.
    members: how many devices of the group each node holds; 0 where the group lies in one node.
    within: how a device sends to another of the group in its node, where the group has several nodes and such devices.
    """

    bytes_per_s: float
    latency_s: float
    name: str
    across: Link | None = None
    members: int = 0
    within: Link | None = None


NO_LINK = Link(inf, 0.0, "none")
"""What joins one device to itself."""


@dataclass(frozen=True)
class Cluster:
    """The devices of a training run, and what joins them.

    device: a row of the catalogue; None for a device that is not in it.
    node_devices: devices of the run in one node. inside: what joins two of them; None where a node holds one.
    between: what joins each device to another node; None where one node holds them all.
    """

    device: Device | None
    devices: int
    node_devices: int
    inside: Link | None
    between: Link | None

    @property
    def nodes(self) -> int:
        """Nodes that hold the devices, the last one perhaps in part."""
        return -(-self.devices // self.node_devices)


def cluster_of(
    device: Device,
    devices: int,
    *,
    node_devices: int | None = None,
    link_gbs: float | None = None,
    network_gbs: float | None = None,
) -> Cluster:
    """Return `devices` devices in nodes, with the catalogue's links where none are given.

    As few nodes are taken as hold the devices, and each holds as many, if that is possible: 256 devices of gb200 are 64
    in each of 4 nodes, which could hold 72.

    Args:
        device: A row of the catalogue.
        devices: Devices of the run.
        node_devices: Devices of a node.
        link_gbs: Rate between the devices of a node, GB/s per device and direction, as a datasheet has it.
        network_gbs: Rate between nodes, GB/s per device and direction, as a datasheet has it.

    Raises:
        InputError: For a number that is not positive, and where a link is needed that the catalogue does not have.
    """
    for name, value in {"devices": devices, "node_devices": node_devices}.items():
        if value is not None and value < 1:
            raise InputError(f"{shown(value)} is out of range; allowed is at least 1", parameter(name))
    for name, rate in {"link_gbs": link_gbs, "network_gbs": network_gbs}.items():
        if rate is not None and not 0 < rate < inf:
            raise InputError(f"{shown(rate)} is not a rate; give GB/s per device and direction", parameter(name))
    size = device.node_devices if node_devices is None else node_devices
    nodes = -(-devices // size)
    if devices % nodes == 0:
        size = devices // nodes
    link = device.link_gbs if link_gbs is None else link_gbs
    network = device.network_gbs if network_gbs is None else network_gbs
    inside = between = None
    if size > 1 and devices > 1:
        if link is None:
            raise _unknown(device, "link", f"{min(size, devices)} devices share a node")
        kind = device.link or "link"
        inside = Link(link * 1e9 * LINK_SHARE, LINK_LATENCY_S.get(kind, LINK_LATENCY_S["NVLink"]), kind)
    if devices > size:
        if network is None:
            raise _unknown(device, "network", f"{devices:,} devices are more than a node of {size}")
        between = Link(network * 1e9 * NETWORK_SHARE, NETWORK_LATENCY_S, "network")
    return Cluster(device, devices, size, inside, between)


def _unknown(device: Device, kind: str, need: str) -> InputError:
    problem = f"{device.name} has no {kind} rate in the catalogue, and {need}; give GB/s per device and direction"
    return InputError(problem, parameter(f"{kind}_gbs"))


def link_for(cluster: Cluster, ranks: int, stride: int = 1) -> Link:
    """Return what joins a group of `ranks` devices that lie `stride` apart, among groups that fill the cluster.

    A group that lies in one node has the links of the node. A group over several nodes with one device in each has the
    network. Otherwise its ring passes within nodes and between them: each device moves all of the ring's bytes within
    its node, and the devices that a node holds share those that leave it, as each has a card of its own.
    """
    if ranks <= 1:
        return NO_LINK
    block = ranks * stride
    together = gcd(block, cluster.node_devices)
    if together == block or cluster.between is None:
        assert cluster.inside is not None, "two devices have a link"
        return cluster.inside
    members, between = max(1, together // stride), cluster.between
    if members == 1 or cluster.inside is None:
        return replace(between, across=between, members=1)
    inside, crossings = cluster.inside, -(-ranks // members) - 1
    latency = ((ranks - 1 - crossings) * inside.latency_s + crossings * between.latency_s) / (ranks - 1)
    rate = min(inside.bytes_per_s, members * between.bytes_per_s)
    return Link(rate, latency, f"{inside.name} and {between.name}", between, members, inside)


def all_gather_s(link: Link, ranks: int, bytes_in_all: float) -> float:
    """Return the seconds of an all-gather after which each of `ranks` has `bytes_in_all` bytes."""
    if ranks <= 1:
        return 0.0
    return START_S + (ranks - 1) * link.latency_s + (ranks - 1) / ranks * bytes_in_all / link.bytes_per_s


def reduce_scatter_s(link: Link, ranks: int, bytes_in_all: float) -> float:
    """Return the seconds of a reduce-scatter of `bytes_in_all` bytes of each of `ranks`: an all-gather backwards."""
    return all_gather_s(link, ranks, bytes_in_all)


def all_reduce_s(link: Link, ranks: int, bytes_in_all: float) -> float:
    """Return the seconds of an all-reduce of `bytes_in_all` bytes of each of `ranks`: reduce-scatter, all-gather."""
    return reduce_scatter_s(link, ranks, bytes_in_all) + all_gather_s(link, ranks, bytes_in_all)


def all_to_all_s(link: Link, ranks: int, bytes_per_rank: float) -> float:
    """Return the seconds of an all-to-all in which each of `ranks` has `bytes_per_rank` bytes, in equal parts for all.

    A device sends to each of the others in turn (pairwise exchange: Thakur et al. 2005, section 4.3). What leaves its
    node takes longest: (n - members)/n of its bytes, at the rate of its own card.
    """
    if ranks <= 1:
        return 0.0
    far, rate = ranks - 1, link.bytes_per_s
    if link.across is not None:
        far, rate = ranks - link.members, min(rate, link.across.bytes_per_s)
    return START_S + (ranks - 1) * link.latency_s + far / ranks * bytes_per_rank / rate


def routed_s(link: Link, ranks: int, row_bytes: float, copies: int, nodes: int) -> float:
    """Return the seconds until rows of a device are at `copies` of `ranks` devices each, on at most `nodes` nodes.

    A row crosses the network once for each node that it is for, to the device of that node with the same number, and
    goes on from there to its devices within the node (DeepSeek-V3, arXiv 2412.19437, section 3.2.2; results come back
    the same way, summed within the node). The devices of a row are even over the nodes, so that its own node is one of
    them as often as any. Both ways are in use at once: the slower one counts.

    Args:
        link: What joins the devices, over several nodes.
        ranks: Devices that share the experts.
        row_bytes: Of all rows of a device, one copy of each.
        copies: Devices that each row is for.
        nodes: Nodes that they lie on, at most.
    """
    assert link.across is not None, "one node has no network"
    groups = -(-ranks // link.members)
    far = nodes * (groups - 1) / groups * row_bytes / link.across.bytes_per_s
    latency = START_S + (groups - 1) * link.across.latency_s
    if link.within is None or link.members == 1:
        return latency + far
    near = copies * (link.members - 1) / link.members * row_bytes / link.within.bytes_per_s
    return latency + (link.members - 1) * link.within.latency_s + max(far, near)


def send_s(link: Link, bytes_sent: float) -> float:
    """Return the seconds until a device has sent `bytes_sent` bytes to its neighbour in the group, the farthest one."""
    wire = link.across or link
    return wire.latency_s + bytes_sent / wire.bytes_per_s
