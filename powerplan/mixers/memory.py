"""Memory sparse attention: documents are kept as means of chunks, and a question attends to the best documents."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from powerplan.mixers.formulas import Convention, Formulas, Rational, Term, mean_keys_in_chunks
from powerplan.mixers.heads import GroupedHeads
from powerplan.part import Size, Window


class MemorySparse(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="memory_sparse"):
    """Memory sparse attention (MSA): a question over a memory of documents, of which it picks `top_k`.

    A document attends to itself alone. Its keys, values and routing keys are kept as means of `pool_size` tokens; the
    means are not counted. The tokens of the question score every mean routing key. They attend to the means of the
    picked documents and to the question so far.
    The context is counted as documents of `document_size` tokens, the last of them shorter, and a question: its last
    `question_size` tokens.
    parameters in matmuls: attention's, and m(H + G)k of the routers
    state: G(2k + v) blocks of the documents, G(k + v) inside of the question
    state FLOPs per token: 2Hk blocks to route, 2H(k + v) picked and 2H(k + v) inside to attend, means over documents
    and question. A decoded token attends to what the question picked, and routes no more.
    Layers in the lower half of the published model do not route: `routed: false` leaves out routers and documents.

    top_k: documents that the question picks.
    pool_size: tokens whose keys and values one mean stands for.
    document_size: tokens of a document.
    question_size: tokens of the question and its answer, at the end of the context.
    routed: whether this layer attends to documents; without, it attends within the document or the question.
    """

    source = "Chen et al. 2026, arXiv 2603.23516, section 3.2, equations 1 to 4, and section 3.4; MSA's code"
    entry = "G*(k + v)"
    looked_up = "G*(k + v)*(picked + inside)"
    sparse_reads = True
    steady = False
    not_shared: ClassVar[frozenset[str]] = GroupedHeads.not_shared | {"top_k"}

    top_k: Size = 16
    pool_size: Window = 64
    document_size: Window = 1024
    question_size: Window = 1024
    routed: bool = True

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("routers", "m*(H + G)*k" if self.routed else ""))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        routers = "1" if self.routed else "0"
        return (*super().matrix_formulas(idle), ("routers", routers, "H*k", "m"), ("routers", routers, "G*k", "m"))

    def state_formulas(self) -> Formulas:
        return (
            ("memory sparse: question", "G*(k + v)*inside"),
            ("memory sparse: documents", "G*(2*k + v)*blocks" if self.routed else ""),
        )

    def state_values(self, context: int) -> dict[str, int]:
        question = min(context, self.question_size)
        picked, every = self._pooled(context - question, self.top_k), self._pooled(context - question)
        return {"t": context, "inside": question, "picked": picked, "blocks": every}

    def _pooled(self, documents: int, most: int | None = None) -> int:
        """Return the means of `documents` tokens; of the `most` longest documents where that is given."""
        if not self.routed:
            return 0
        whole, rest = divmod(documents, self.document_size)
        counted = whole if most is None else min(whole, most)
        last = -(-rest // self.pool_size) if most is None or most > whole else 0
        return counted * -(-self.document_size // self.pool_size) + last

    def flops_formulas(self, chunked: bool) -> Formulas:
        return (
            ("memory sparse: routing", "2*H*k*blocks" if self.routed else ""),
            ("memory sparse: picked documents", "2*H*(k + v)*picked" if self.routed else ""),
            ("memory sparse: own document or question", "2*H*(k + v)*inside"),
        )

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        values = self.state_values(context)
        question = values["inside"]
        share = Fraction(question, context)
        inside = share * mean_keys_in_chunks(question, convention.causal, question)
        if documents := context - question:
            inside += (1 - share) * mean_keys_in_chunks(documents, convention.causal, self.document_size)
        return {"inside": inside, "picked": share * values["picked"], "blocks": share * values["blocks"]}

    def decode_flops_terms(self, context: int) -> tuple[Term, ...]:
        return self.terms(self.flops_formulas(chunked=False)[1:], **self.state_values(context))

    def describe(self) -> str:
        if not self.routed:
            return f"memory sparse, documents of {self.document_size:,} alone"
        return f"memory sparse, {self.top_k:,} documents of {self.document_size:,}"
