"""Tokens on their way to experts: nodes that a router picks, what crosses the network, and in which format."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.accounting import Accounting
from powerplan.documents import parse_json, parse_yaml
from powerplan.errors import InputError
from powerplan.ffn import MoE
from powerplan.hardware import find_device
from powerplan.huggingface.config import Config
from powerplan.huggingface.experts import groups_chosen
from powerplan.load import catalogue_spec
from powerplan.run.degrees import Degrees
from powerplan.run.links import LINK_SHARE, NETWORK_SHARE, START_S, all_to_all_s, cluster_of, link_for, routed_s
from powerplan.run.loads import model_load
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads
from powerplan.run.traffic import Traffic, links_of, traffic_of
from powerplan.validation import validate

H100 = find_device("h100-sxm")
NVLINK, NETWORK = 450e9 * LINK_SHARE, 50e9 * NETWORK_SHARE


def moe(**fields: Any) -> MoE:
    return MoE(**{"experts": 256, "top_k": 8, "intermediate_size": 2048, "groups": 8, "top_groups": 4} | fields)


def crossings(nodes: int, picked: int) -> Fraction:
    """Return how many nodes other than its own a token is sent to, as a mean over all choices and its own node."""
    choices = list(combinations(range(nodes), picked))
    others = [len(set(choice) - {own}) for choice in choices for own in range(nodes)]
    return Fraction(sum(others), len(others))


@pytest.mark.parametrize(("nodes", "picked"), [(8, 4), (8, 1), (4, 3), (5, 5), (2, 1)])
def test_a_row_crosses_the_network_once_for_each_node(nodes: int, picked: int) -> None:
    link = link_for(cluster_of(H100, 8 * nodes), 8 * nodes)
    seconds = routed_s(link, 8 * nodes, 1e12, 8, picked)
    far, near = float(crossings(nodes, picked)) * 1e12 / NETWORK, 8 * 7 / 8 * 1e12 / NVLINK
    assert seconds == pytest.approx(max(far, near), rel=1e-4)


def test_a_row_to_a_few_nodes_by_hand() -> None:
    """DeepSeek-V3, arXiv 2412.19437, section 3.2.2: 4 of 8 nodes of 8, and 8 experts."""
    link = link_for(cluster_of(H100, 64), 64)
    latency = START_S + 7 * 14e-6 + 7 * 3.4e-6
    assert routed_s(link, 64, 1e9, 8, 4) == pytest.approx(latency + 4 * 7 / 8 * 1e9 / NETWORK)
    assert routed_s(link, 64, 1e9, 64, 1) == pytest.approx(latency + 64 * 7 / 8 * 1e9 / NVLINK)
    alone = link_for(cluster_of(H100, 64), 8, 8)
    assert routed_s(alone, 8, 1e9, 8, 4) == pytest.approx(START_S + 7 * 14e-6 + 4 * 7 / 8 * 1e9 / NETWORK)


@given(st.sampled_from([2, 4, 8, 32]), st.integers(1, 32), st.floats(1e6, 1e12), st.integers(1, 31))
def test_fewer_nodes_are_never_slower(nodes: int, copies: int, size: float, limit: int) -> None:
    link = link_for(cluster_of(H100, 8 * nodes), 8 * nodes)
    reached = min(nodes, copies)
    less = routed_s(link, 8 * nodes, size, copies, min(limit, reached))
    assert less <= routed_s(link, 8 * nodes, size, copies, reached)
    assert less <= all_to_all_s(link, 8 * nodes, size * copies) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("nodes", "most"), [(1, 1), (2, 2), (4, 4), (8, 4), (16, 8), (32, 8)], ids=lambda number: str(number)
)
def test_groups_lie_on_nodes(nodes: int, most: int) -> None:
    assert moe().nodes_sent_to(nodes) == most
    assert moe(top_groups=None).nodes_sent_to(nodes) is None
    assert moe(top_groups=8).nodes_sent_to(nodes) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 7}, "groups 7 does not divide the 256 experts"),
        ({"top_groups": 9}, "top_groups 9 is more than the 8 groups there are"),
        ({"groups": 128, "top_groups": 3}, "top_groups 3 have 6 experts, less than the top_k 8"),
    ],
)
def test_impossible_groups_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate_moe({"experts": 256, "top_k": 8, "intermediate_size": 64, "groups": 8} | fields)


def validate_moe(fields: dict[str, Any]) -> None:
    text = ", ".join(f"{name}: {value}" for name, value in fields.items())
    layer = f"[{{mixer: {{kind: attention, heads: 1, head_dim: 8}}, ffn: {{kind: moe, {text}}}}}]"
    validate(parse_yaml(f"name: x\nvocab_size: 9\nhidden_size: 8\nlayers: {layer}\n", "x.yaml"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"n_group": 8, "topk_group": 4}, (8, 4)),
        ({"num_expert_group": 8, "topk_group": 4}, (8, 4)),
        ({"n_group": 8, "topk_group": 4, "topk_method": "greedy"}, (1, None)),
        ({"n_group": 1, "topk_group": 1}, (1, None)),
        ({"n_group": 8, "topk_group": 8}, (1, None)),
        ({"n_group": 7, "topk_group": 4}, (1, None)),
        ({"n_group": 8, "topk_group": "4"}, (1, None)),
        ({"n_group": 8}, (1, None)),
        ({}, (1, None)),
    ],
)
def test_groups_are_read_from_a_config(data: dict[str, Any], expected: tuple[int, int | None]) -> None:
    config = Config(parse_json(json.dumps(data), "config.json"))
    assert groups_chosen(config, 256, 8) == expected


def of_experts(name: str, degrees: Degrees, recipe: Recipe | None = None) -> Traffic:
    model = model_load(Accounting(catalogue_spec(name)), 4096, recipe or Recipe())
    links = links_of(cluster_of(H100, degrees.devices), degrees)
    (stage,) = stage_loads(model, 1)
    return traffic_of(model, stage, degrees, links)


def test_deepseek_v3_sends_a_token_to_at_most_four_nodes() -> None:
    link = link_for(cluster_of(H100, 64), 64)
    each = routed_s(link, 64, 4096 * 7168 * 2, 8, 4)
    assert of_experts("deepseek-v3", Degrees(fsdp=64, ep=64)).experts_s == pytest.approx(58 * 2 * each)
    node = link_for(cluster_of(H100, 8), 8)
    within = all_to_all_s(node, 8, 4096 * 8 * 7168 * 2)
    assert of_experts("deepseek-v3", Degrees(fsdp=8, ep=8)).experts_s == pytest.approx(58 * 2 * within)


def test_tokens_go_to_experts_in_fp8_and_come_back_in_bf16() -> None:
    """DeepSeek-V3, arXiv 2412.19437, section 3.3.3; a scale of 4 bytes for 128 elements (section 3.3.2)."""
    link = link_for(cluster_of(H100, 64), 64)
    there, back = (routed_s(link, 64, 4096 * 7168 * size, 8, 4) for size in (1 + 4 / 128, 2))
    found = of_experts("deepseek-v3", Degrees(fsdp=64, ep=64), Recipe(matmuls_dtype="fp8"))
    assert found.experts_s == pytest.approx(58 * (there + back))
