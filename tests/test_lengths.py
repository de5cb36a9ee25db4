"""Lengths of documents: what is read, what a lognormal becomes, how documents are cut and packed."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.lengths import Lengths, histogram, read_file, read_lengths, reading
from powerplan.lengths.lognormal import DOCUMENTS, lognormal_counts, solved
from powerplan.lengths.packing import filled_share, packed_sequences, packings
from powerplan.textfiles import MAX_BYTES

documents = st.lists(st.integers(1, 90), min_size=1, max_size=40)


def of(lengths: Sequence[int]) -> Lengths:
    return Lengths.of(Counter(lengths))


def cut_one_by_one(lengths: Sequence[int], context: int) -> list[int]:
    pieces: list[int] = []
    for length in lengths:
        while length > context:
            pieces.append(context)
            length -= context
        pieces.append(length)
    return pieces


def packed_one_by_one(pieces: Sequence[int], context: int) -> list[list[int]]:
    """Best-fit decreasing as it is described: each document goes into the fullest sequence that has room for it."""
    sequences: list[list[int]] = []
    for length in sorted(pieces, reverse=True):
        fitting = [own for own in sequences if sum(own) + length <= context]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            sequences.append([length])
    return sequences


@given(documents, st.integers(1, 64))
def test_documents_are_cut_and_packed_as_one_by_one(lengths: list[int], context: int) -> None:
    whole = of(lengths)
    pieces = whole.cut(context)
    one_by_one = cut_one_by_one(lengths, context)
    assert dict(pieces.counts) == Counter(one_by_one)
    assert (pieces.tokens, whole.tokens) == (sum(lengths), sum(lengths))
    assert whole.longer_than(context) == sum(length > context for length in lengths)
    packed = packed_one_by_one(one_by_one, context)
    assert packed_sequences(pieces, context) == len(packed)
    assert filled_share(pieces, context) == Fraction(sum(lengths), len(packed) * context)


@given(documents, st.integers(1, 64))
def test_the_three_ways_to_fill_sequences(lengths: list[int], context: int) -> None:
    padded, packed, stream = packings(of(lengths), context)
    assert padded.sequences == len(cut_one_by_one(lengths, context))
    assert stream.sequences == math.ceil(sum(lengths) / context)
    assert padded.sequences >= packed.sequences >= stream.sequences
    assert padded.cut == packed.cut == sum(length > context for length in lengths)
    crossed = sum(start + length > context for length in lengths for start in range(context))
    assert stream.cut == Fraction(crossed, context)
    for way in (padded, packed, stream):
        assert way.padding == 1 - Fraction(sum(lengths), way.sequences * context)


@given(documents, st.fractions(Fraction(1, 100), 1))
def test_quantiles(lengths: list[int], share: Fraction) -> None:
    ordered = sorted(lengths)
    assert of(lengths).quantile(share) == ordered[math.ceil(share * len(ordered)) - 1]
    by_token = [length for length in ordered for _ in range(length)]
    assert of(lengths).token_quantile(share) == by_token[math.ceil(share * len(by_token)) - 1]
    assert of(lengths).mean == Fraction(sum(lengths), len(lengths))


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("lognormal:mean=4k,p99=64k", {"mean": 4096, "p99": 65_536}),
        ("lognormal:mean=2000,p99=16k,max=64k", {"mean": 2000, "p99": 16_384}),
        ("lognormal:median=1k,p99=32k", {"median": 1024, "p99": 32_768}),
        ("lognormal:mean=4k,median=1k", {"mean": 4096, "median": 1024}),
        ("lognormal:median=1k,sigma=1.5", {"median": 1024}),
        ("lognormal:mean=4k,sigma=0.5", {"mean": 4096}),
        ("lognormal:mean=4k,sigma=0.01", {"mean": 4096}),
        ("lognormal:mean=100,p99=120", {"mean": 100, "p99": 120}),
    ],
)
def test_a_lognormal_has_what_its_text_says(text: str, known: dict[str, int]) -> None:
    lengths = read_lengths(text)
    found = {
        "mean": float(lengths.mean),
        "median": lengths.quantile(Fraction(1, 2)),
        "p99": lengths.quantile(Fraction(99, 100)),
    }
    assert lengths.documents == DOCUMENTS
    assert lengths.label == text
    for name, value in known.items():  # The steps are 1.1 % wide; a mean is exact but for rounding.
        assert found[name] == pytest.approx(value, rel=2e-4 if name == "mean" else 0.011, abs=0.6)


def test_a_lognormal_follows_its_distribution() -> None:
    """Against the standard library's normal distribution, at every end of a step; the tokens against a fine sum."""
    mu, sigma, longest = 6.0, 1.2, 50_000
    counts = lognormal_counts(mu, sigma, longest)
    normal = NormalDist(mu, sigma)
    whole = normal.cdf(math.log(longest))
    held = 0
    for length, count in sorted(counts.items()):
        before, held = held, held + count
        # A step stands for its mean, so that the distribution passes the count somewhere within 1.2 % of it.
        assert before <= DOCUMENTS * normal.cdf(math.log(length * 1.012)) / whole + 1
        assert held >= DOCUMENTS * normal.cdf(math.log(max(length * 0.988, 0.5))) / whole - 1
    fine = [normal.inv_cdf((place + 0.5) / 200_000 * whole) for place in range(200_000)]
    mean = sum(math.ceil(math.exp(value)) for value in fine) / 200_000
    assert sum(length * count for length, count in counts.items()) / DOCUMENTS == pytest.approx(mean, rel=1e-3)
    assert list(counts) == sorted(counts)
    assert max(counts) <= longest


@given(st.floats(0.05, 3), st.floats(2, 12))
def test_what_a_lognormal_has_gives_it_again(sigma: float, mu: float) -> None:
    longest = 2**20
    middle = math.exp(mu)
    assert solved({"median": middle, "sigma": sigma}, longest, "lengths")[1] == sigma
    own, _ = solved({"median": middle, "sigma": sigma}, longest, "lengths")
    normal = NormalDist(own, sigma)
    assert normal.cdf(math.log(middle)) == pytest.approx(normal.cdf(math.log(longest)) / 2, rel=1e-6)


def test_shares_are_in_their_proportion() -> None:
    lengths = read_lengths("4k:0.9,64k:0.1")
    assert lengths.counts == ((4096, 900_000), (65_536, 100_000))
    assert read_lengths("4k,8k").counts == ((4096, 500_000), (8192, 500_000))
    assert read_lengths("4k:1,8k:2").counts == ((4096, 333_333), (8192, 666_666))
    assert read_lengths("64k").counts == ((65_536, DOCUMENTS),)


PLAIN = "4096\n\n  12 \r\n4096\n4k"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "\ufeff4096,3\n12,1\n",
        "4096,3\n12\n",
        "Length,Count\n4096,2\n12,1\n4096,1\n",
        'id,count,"length"\n"a,b",3,4096\nc,1,12\n',
        '{"length": 4096, "count": 3}\n{"length": 12, "text": "x"}\n',
    ],
)
def test_files_of_the_same_documents(text: str, tmp_path: Path) -> None:
    path = tmp_path / "docs.txt"
    path.write_text(text, encoding="utf-8")
    assert read_file(path).counts == ((12, 1), (4096, 3))
    assert read_lengths(path) == read_lengths(str(path))
    assert read_lengths(path).label == "docs.txt"


def test_from_python() -> None:
    numpy = pytest.importorskip("numpy")
    wanted = ((12, 1), (4096, 3))
    for given_as in (
        [4096, 12, 4096, 4096],
        {4096: 3, 12: 1},
        numpy.array([4096, 12, 4096, 4096]),
        iter([4096] * 3 + [12]),
    ):
        assert read_lengths(given_as).counts == wanted
    assert read_lengths(Lengths(wanted)).counts == wanted


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PLAIN.encode())))
    assert main(["wsfr", "gpt2-small", "--lengths", "-"]) == 0
    assert "4 documents (<stdin>): 3,075 tokens on average" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"12\nx y\n")))
    assert main(["wsfr", "gpt2-small", "--lengths", "-"]) == 2
    assert capsys.readouterr().err.startswith("error: <stdin>:2: 'x y' is not a size in tokens; ")
    assert main(["wsfr", "-", "--lengths", "-"]) == 2
    assert (
        capsys.readouterr().err == "error: --lengths: - is there as MODEL too, and standard input holds one of them\n"
    )


SIZE = "is not a size in tokens; write 65536, 64k (=65536) or 1M (=1048576)"
TOKENS = "a document has 1 to 1,125,899,906,842,624 tokens (2^50), and this one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": holds no lengths"),
        ("\n \n", ": holds no lengths"),
        ("12\nx\n", f":2: 'x' {SIZE}"),
        ("12\n0\n", f":2: {TOKENS} 0"),
        ("-4\n", f":1: {TOKENS} -4"),
        ("12,0\n", ":1: '0' is not a number of documents; allowed are 1 to 1,000,000,000,000,000"),
        ("1,2,3\n", ":1: '1,2,3' is not a length; write 4096, or 4096,12 for 12 documents"),
        ("id,len\n1,2\n", ":1: 'id,len' has no column length; write length in place of len"),
        ("a b\n", ":1: 'a b' has no column length; write a length in each line, or name the column length"),
        ("id,length\na\n", ":2: 'a' has 1 column, and the header has more"),
        ("length,count\n4\n", ":2: '4' has 1 column, and the header has more"),
        (
            '{"length": 5}\n{"lenght": 4}\n',
            ':2: \'{"lenght": 4}\' has no key "length"; write length in place of lenght',
        ),
        ("+5\n", f":1: '+5' {SIZE}"),
        ('{"length": 99999999999999999999}\n', ":1: '99999999999999999999' is out of range; a document is 1 to ..."),
        ('{"length": true}\n', ":1: length: true is not a whole number"),
        ('{"length": 4, "count": 1.5}\n', ":1: count: 1.5 is not a whole number"),
        ('id,length\n"' + "x" * 200_000 + '",4\n', ":2: '\"xxxxx..."),
        ("{bad\n", ":1: '{bad' is not valid JSON"),
        ('{"length": 4}\n4\n', ":2: '4' has no key \"length\""),
        ("12\n\udcff\n", ":2: is not UTF-8 text (byte 0xff)"),
        ("12\n1\0\n", ":2: is not text (a NUL character)"),
        ("7" * (MAX_BYTES + 1), ":1: is a line of more than 1 MiB"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_messages_of_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "docs.txt"
    path.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    with pytest.raises(InputError) as caught:
        read_file(path)
    begin, dots, _ = message.partition("...")
    found = str(caught.value)
    assert found.startswith(f"{path}{begin}") if dots else found == f"{path}{message}"


def tried(read: Callable[[Any], Lengths], source: Any) -> tuple[Lengths | None, str]:
    """Return what is read, or the message of the one error that is raised on purpose."""
    try:
        return read(source), ""
    except InputError as error:
        return None, str(error)


pieces = st.sampled_from(
    ["length", "count", "4096", "0", "-1", "4k", ",", '"', "{", "}", ":", "=", " ", "\n", "\t", "1e3"]
)
likely = st.lists(pieces | st.text(max_size=3), max_size=12).map("".join)


@given(likely | st.text() | st.binary())
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    lengths, message = tried(read_file, path)
    if lengths is None:
        assert message.startswith(f"{path}:")
        assert "\n" not in message
    else:
        assert lengths.documents >= 1
        assert lengths.counts[0][0] >= 1


words = st.sampled_from(
    ["lognormal:", "mean=", "p99=", "median=", "sigma=", "max=", "4k", "64k", "1", "2", "0.5", ",", ":", "1M"]
)


@given(st.lists(words | st.text(max_size=2), max_size=9).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    lengths, message = tried(read_lengths, text)
    assert "\n" not in message
    assert lengths is None or lengths.documents >= 1


def test_too_many_different_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (histogram, reading):
        monkeypatch.setattr(module, "MAX_DIFFERENT", 3)
    path = tmp_path / "docs.txt"
    path.write_text("1\n2\n3\n4\n5\nx\n")
    with pytest.raises(InputError, match=r"docs\.txt: has more than 3 different lengths; round them"):
        read_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "is empty; write a path, 4k:0.9,64k:0.1 (shares of documents) or lognormal:mean=4k,p99=64k"),
        ("nofile", "'nofile' is neither a file nor lengths; write a path, 4k:0.9,64k:0.1 (shares of documents) or ..."),
        ("lognorml:mean=4k", "'lognorml:mean=4k' is neither a file nor lengths; did you mean lognormal?"),
        ("lognormal:", "lognormal takes two of mean, median, p99 and sigma, and has none"),
        ("lognormal:mean=4k", "lognormal takes two of mean, median, p99 and sigma, and has mean"),
        ("lognormal:4k", "'4k' is not a setting of lognormal; write lognormal:mean=4k,p99=64k"),
        (
            "lognormal:mean=4k,p9=8k",
            "'p9' is not a setting of lognormal; did you mean p99? allowed are ...",
        ),
        ("lognormal:mean=4k,mean=8k", "mean is given twice"),
        ("lognormal:mean=4k,p99=2k", "the p99 must be more than the mean, and they are mean 4,096 and p99 2,048"),
        (
            "lognormal:mean=1k,median=2k",
            "the mean must be more than the median, and they are mean 1,024 and median 2,048",
        ),
        ("lognormal:mean=4k,p99=2M", "p99 2,097,152 is not below the longest document, 1,048,576 tokens (max)"),
        (
            "lognormal:mean=1k,p99=64k",
            "no lognormal of at most 1,048,576 tokens has mean 1,024 and p99 65,536; the smallest mean is 3,304",
        ),
        (
            "lognormal:mean=900k,median=800k",
            "no lognormal of at most 1,048,576 tokens has mean 921,600 and median 819,200; the largest mean is ...",
        ),
        (
            "lognormal:mean=3,median=2,max=4",
            "no lognormal of at most 4 tokens has mean 3 and median 2; the largest ...",
        ),
        ("0:1", "'0' is out of range; a document is 1 to 1,125,899,906,842,624 tokens (2^50)"),
        ("4k:0.5,4096:2", "4096 is given twice"),
        ("4k:x", "'x' is not a share of documents; write 4k:0.9, or 4096:3"),
        ("4k:0", "'0' is not a share of documents; write 4k:0.9, or 4096:3"),
    ],
)
def test_messages_of_texts(text: str, message: str) -> None:
    begin, dots, _ = message.partition("...")
    with pytest.raises(InputError) as caught:
        read_lengths(text)
    found = str(caught.value)
    assert found.startswith(f"lengths: {begin}") if dots else found == f"lengths: {message}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "lengths: is empty; give the tokens of each document, as [4096, 512]"),
        ([4, 0], "lengths: a document has 1 token or more, and one has 0"),
        ([4, 2.5], "lengths: 2.5 is not a whole number of tokens"),
        ({4: 0}, "lengths: there are 1 or more documents of a length, and one length has less"),
        ({2**51: 1}, "lengths: a document has 1,125,899,906,842,624 tokens (2^50) at most, and one has more"),
        ({}, "lengths: holds no lengths"),
        ({4: 10**16}, "lengths: has more than 1,000,000,000,000,000 documents"),
        (7, "lengths: 7 is not a list of lengths; give the tokens of each document, as [4096, 512]"),
    ],
)
def test_messages_of_values(value: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_lengths(value)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_settings_have_their_place() -> None:
    for text, where in (("lognormal:mean=4k,p99=x", "lengths p99: "), ("lognormal:mean=4k,sigma=9", "lengths sigma: ")):
        with pytest.raises(InputError, match=f"^{where}"):
            read_lengths(text)
