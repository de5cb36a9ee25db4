"""What the field found that bears on a recommendation, each finding with the range that it was found in."""

from __future__ import annotations

from powerplan.search import Recommendation

HYBRIDS = (
    "arXiv 2507.06457 found the recall of attention with 3 to 6 layers of linear attention to each of full attention "
    "(HGRN-2 and Gated DeltaNet, 340M and 1.3B parameters, 20B and 100B tokens)"
)
SPARSE = (
    "arXiv 2504.17768 found that larger and sparser models beat smaller and dense ones at equal cost, and that longer "
    "inputs bear more sparsity (sparse attention without training, 7B to 72B parameters, 16k to 128k tokens)."
)


def findings(answer: Recommendation) -> list[str]:
    """Return a sentence for each finding: of hybrids for a plan that is one, of sparsity where it is used or bears."""
    after, context = answer.recommended.spec, answer.contexts[-1]
    mixers = list(after.mixers_by_layer().values())
    fixed = sum(mixer.direct_reach(context) is None for mixer in mixers)
    full = sum(mixer.keeps_every_key for mixer in mixers)
    found = []
    if fixed and full and not answer.recommended.plan.unchanged:
        inside = "within" if 3 * full <= fixed <= 6 * full else "below" if fixed < 3 * full else "above"
        here = f"{fixed} of fixed state to {full} of full attention here, {fixed / full:.1f}:1, are {inside} that range"
        found.append(f"{HYBRIDS}; {here}.")
    new = set(mixers) - set(answer.base.spec.mixers())
    if answer.request.keep == "flops" or any(mixer.sparse_reads for mixer in new):
        found.append(SPARSE)
    return found
