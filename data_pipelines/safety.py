"""Safe data: documents from blocked domains, and documents full of blocked words, go (InternLM2's report, 3.1).

The lists are the user's: the report's own hold about 13 million domains and 36,289 words and are not published, and
none comes with this project. A toxicity or adult-content classifier is a model of `quality.py`, applied as a stage.

    stages = (
        Stage("blocked_domains", "batch", blocked_domains(["domains.txt"])),
        Stage("blocked_words", "batch", blocked_words(["words.txt"])),
    )
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import Check, Outcome, text_buffer
from data_pipelines.readers import existing, opened

URL_FIELDS = ("url", "uri", "source_url", "host", "domain")
"""Where a document's address is looked for in its meta, in this order; then in its path."""
AUTHORITY = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//(?:[^/?#@]*@)?(\[[^\]]*\]|[^/?#:]*)", re.IGNORECASE)
BARE_HOST = re.compile(r"([^\s/?#:@]+\.[^\s/?#:@]+)(?::\d+)?(?:[/?#]|$)")
NUMERIC_HOST = re.compile(r"\[.*\]|[\d.]+")
DOMAIN = r"^([^\s/:@#?]+\.[^\s/:@#?.]+|\[[0-9a-f:.]+\])$"
"""Of a line: a name with a dot, or an address of version 6 in brackets."""


# --- domains ---------------------------------------------------------------------------------------------------------


class Domains(NamedTuple):
    """Names in the order of their 64-bit hashes (`hashing.row_hashes`)."""

    hashes: np.ndarray
    names: pa.Array


def blocked_domains(files: Sequence[str | Path]) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops documents whose host, or a domain above it, is listed ("blocked_domain").

    A list has one domain per line; `#` starts a comment. example.com blocks www.example.com too, so the registered
    domain of a host needs no table of public suffixes. The host is that of the URL in meta (`URL_FIELDS`) or in the
    path; a document without one passes.
    """
    listed = read_domains(files)

    def apply(batch: pa.RecordBatch) -> Outcome:
        hosts = [host_of(meta, path) for meta, path in zip(*(batch.column(n).to_pylist() for n in ("meta", "path")))]
        found = find_listed({host for host in hosts if host}, listed)
        names = [found.get(host) for host in hosts]
        details = [name and f"host {host} is blocked by the entry {name}" for host, name in zip(hosts, names)]
        return Outcome(batch, [name and "blocked_domain" for name in names], details)

    return apply


def read_domains(files: Sequence[str | Path]) -> Domains:
    """Returns the domains of the files, each once. Raises ValueError naming lines that are no domain."""
    import pyarrow.compute as pc

    parts, bad = [], []
    for file in files:
        lines = pc.replace_substring_regex(_cleaned_lines(file), r"^(\*?\.)+|\.+$", "")
        ascii_only = pc.utf8_lower(lines)
        foreign = pc.invert(pc.string_is_ascii(ascii_only))
        if pc.any(foreign).as_py():
            names = [canonical_host(name) for name in lines.filter(foreign).to_pylist()]
            ascii_only = pc.replace_with_mask(ascii_only, foreign, pa.array(names, lines.type))
        is_domain = pc.match_substring_regex(ascii_only, DOMAIN)
        wrong = pc.and_(pc.invert(is_domain), pc.not_equal(ascii_only, ""))
        bad += [f"{file}:{at + 1}: {lines[at].as_py()[:60]!r}" for at in np.flatnonzero(wrong).tolist()]
        parts.append(ascii_only.filter(is_domain))
    if bad:
        raise ValueError(
            f"{len(bad)} lines are no domain, the first: {'; '.join(bad[:3])}; give one domain per line, such as "
            "example.com, without scheme, path or address before it"
        )
    names = pc.unique(pa.chunked_array(parts, pa.large_string()))
    if len(names) == 0:
        raise ValueError(f"no domain in {', '.join(map(str, files)) or 'no file'}; give one domain per line")
    hashes = _hashes(names)
    order = np.argsort(hashes)
    return Domains(hashes[order], names.take(pa.array(order)))


def host_of(meta: str, path: str) -> str | None:
    """Returns the host of a document's address in canonical form, or None where it names none."""
    if any(f'"{field}"' in meta for field in URL_FIELDS):
        values = json.loads(meta)
        for field in URL_FIELDS:
            value = values.get(field)
            found = isinstance(value, str) and (AUTHORITY.match(value) or BARE_HOST.match(value))
            if found and found[1]:
                return canonical_host(found[1])
    found = AUTHORITY.match(path) if "://" in path else None
    return canonical_host(found[1]) if found and found[1] else None


def canonical_host(host: str) -> str:
    """Returns the host in lower case, without a dot at its end, international names in their ASCII form."""
    host = host.strip().rstrip(".").lower()
    if host.isascii():
        return host
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host  # no valid name: only an equal line blocks it


def find_listed(hosts: Iterable[str], listed: Domains) -> dict[str, str]:
    """Returns host -> the listed name that blocks it: the host itself, else the nearest domain above it.

    Hashes find the candidates, the names decide.
    """
    names = [(host, name) for host in hosts for name in _names_above(host)]
    hashes = _hashes(pa.array([name for _, name in names], pa.large_string()))
    first = np.searchsorted(listed.hashes, hashes)
    found: dict[str, str] = {}
    for at in np.flatnonzero(listed.hashes[np.minimum(first, len(listed.hashes) - 1)] == hashes).tolist():
        host, name = names[at]
        stop = np.searchsorted(listed.hashes, hashes[at], side="right")
        if host not in found and name in listed.names[int(first[at]) : int(stop)].to_pylist():
            found[host] = name
    return found


def _names_above(host: str) -> list[str]:
    if NUMERIC_HOST.fullmatch(host):
        return [host]
    labels = host.split(".")
    return [".".join(labels[at:]) for at in range(len(labels))]


def _hashes(names: pa.Array) -> np.ndarray:
    from data_pipelines import hashing

    data, offsets = text_buffer(pa.record_batch([names], names=["text"]))
    hashes = np.empty(len(names), np.uint64)
    hashing.row_hashes(data, offsets, hashes)
    return hashes


def _cleaned_lines(file: str | Path) -> pa.Array:
    """Every line of a list without comment and surrounding white space; files may be compressed (.gz, .zst)."""
    import pyarrow.compute as pc

    path = existing(file)
    with opened(path) as lines:
        raw = lines.read().removeprefix(b"\xef\xbb\xbf")
    ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == 10)
    offsets = np.concatenate([[0], ends + 1, [len(raw)]])
    array = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(raw))
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save the list as UTF-8") from None
    if b"#" in raw:
        array = pc.replace_substring_regex(array, r"(^|\s)#[^\n]*", "")
    return pc.utf8_trim_whitespace(array)


# --- words -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordBounds:
    """A document goes when it is above both: a few hits in a long text are no reason, nor is one hit in a short one."""

    max_weight_per_1000_characters: float = 2.0
    max_weight: float = 2.0
    top_words: int = 5
    """How many words the detail names."""


class WeightedWords(NamedTuple):
    words: tuple[str, ...]
    weights: np.ndarray


def blocked_words(
    files: Sequence[str | Path], bounds: WordBounds = WordBounds()
) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops documents by the weight of blocked words per 1,000 characters ("blocked_words").

    A list has one word or phrase per line, and behind a tab its weight where that is not 1; `#` starts a comment. Case
    does not matter. Where a word begins or ends with a letter or digit that is neither Han nor kana, the text must have
    a boundary there ("ass" is not in "class", nor in "assess"); Han and kana match anywhere. Of overlapping words the
    first counts, of those that begin together the longest. The detail names the words that weigh most.
    """
    listed = read_words(files)

    def apply(batch: pa.RecordBatch) -> Outcome:
        import pyarrow.compute as pc

        lowered = pc.utf8_lower(batch.column("text"))
        data, offsets = text_buffer(pa.record_batch([lowered], names=["text"]))
        text = data[offsets[0] : offsets[-1]]
        matches = (
            _automaton(listed.words).find_matches_as_indexes(text.tobytes(), overlapping=True) if len(text) else []
        )
        found = _whole_words(text, offsets - offsets[0], np.array(matches, np.int64).reshape(-1, 3))
        weight_D = np.bincount(found.rows, listed.weights[found.words], minlength=batch.num_rows)
        characters_D = pc.utf8_length(batch.column("text")).to_numpy(zero_copy_only=False)
        rate_D = 1000 * weight_D / np.maximum(characters_D, 1)
        drops_D = (rate_D > bounds.max_weight_per_1000_characters) & (weight_D > bounds.max_weight)
        details: list[str | None] = [None] * batch.num_rows
        for row in np.flatnonzero(drops_D).tolist():
            words = _heaviest(found.words[found.rows == row], listed, bounds.top_words)
            details[row] = (
                f"weight {weight_D[row]:g} is above {bounds.max_weight:g}, {rate_D[row]:.4g} per 1000 characters is "
                f"above {bounds.max_weight_per_1000_characters:g}: {words}"
            )
        # A light weight is no reason, whatever the rate.
        heavy_D = np.where(weight_D > bounds.max_weight, rate_D, 0.0)
        check = Check("blocked_words", heavy_D, "above", bounds.max_weight_per_1000_characters)
        return Outcome(batch, [detail and "blocked_words" for detail in details], details, [check])

    return apply


@functools.lru_cache(maxsize=8)
def _automaton(words: tuple[str, ...]) -> Any:
    """Of Aho and Corasick; made once per process, since it cannot be sent to another one."""
    import ahocorasick_rs

    patterns = [word.encode() for word in words]
    # The table of states is the faster one, and at this size still in the tens of MB.
    is_small = sum(map(len, patterns)) <= 1_000_000
    kind = ahocorasick_rs.Implementation.DFA if is_small else ahocorasick_rs.Implementation.ContiguousNFA
    return ahocorasick_rs.BytesAhoCorasick(patterns, implementation=kind)


def read_words(files: Sequence[str | Path]) -> WeightedWords:
    """Returns the words of the files in lower case; one that stands twice has its greater weight."""
    weights: dict[str, float] = {}
    lines = ((file, *numbered) for file in files for numbered in enumerate(_cleaned_lines(file).to_pylist(), 1))
    for file, number, line in lines:
        if not line:
            continue
        word, _, weight = line.partition("\t")
        word = word.strip().lower()
        try:
            value = float(weight or 1)
        except ValueError:
            value = -1.0
        if not word or not 0 < value < np.inf:
            raise ValueError(
                f"{file}:{number}: {line[:60]!r}; give a word, and behind a tab a weight above 0 if it is not 1"
            )
        weights[word] = max(value, weights.get(word, 0.0))
    if not weights:
        raise ValueError(f"no word in {', '.join(map(str, files)) or 'no file'}; give one word or phrase per line")
    return WeightedWords(tuple(weights), np.array(list(weights.values())))


class _Found(NamedTuple):
    rows: np.ndarray
    words: np.ndarray


def _whole_words(text: np.ndarray, offsets: np.ndarray, matches: np.ndarray) -> _Found:
    """The matches (word, start, stop) that lie in one row, between boundaries, and overlap no earlier one."""
    words, starts, stops = matches.T
    rows = np.searchsorted(offsets, starts, side="right") - 1
    inside = stops <= offsets[rows + 1]
    words, starts, stops, rows = words[inside], starts[inside], stops[inside], rows[inside]
    runs_on = _in_letters(text, starts) & _in_letters(text, starts - 1) & (starts > offsets[rows])
    runs_on |= _in_letters(text, stops - 1) & _in_letters(text, stops) & (stops < offsets[rows + 1])
    whole = np.flatnonzero(~runs_on)
    whole = whole[np.lexsort((-stops[whole], starts[whole]))]
    taken, end = [], -1
    for at in whole.tolist():
        if starts[at] >= end:
            taken.append(at)
            end = stops[at]
    return _Found(rows[taken], words[taken])


def _in_letters(text: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Whether the byte belongs to a letter or digit that is neither Han nor kana; places outside the text give False.

    The classes are those of `kernels.words`: letters are ASCII word bytes and non-ASCII characters but for general,
    CJK and full-width punctuation.
    """
    inside = (at >= 0) & (at < len(text))
    first = np.where(inside, at, 0)
    if len(text) == 0:
        return inside
    for _ in range(3):  # back to the byte that starts the character
        first = first - ((text[first] & 0xC0) == 0x80)
    lead, second = text[first], text[np.minimum(first + 1, len(text) - 1)]
    is_ascii = (lead - 48 < 10) | ((lead | 32) - 97 < 26) | (lead == 95)
    punctuation = (lead == 0xC2) | ((lead == 0xE2) & (second <= 0x81)) | ((lead == 0xEF) & (second >= 0xBC))
    han = (lead >= 0xE3) & (lead <= 0xE9)
    return inside & np.where(lead < 0x80, is_ascii, ~punctuation & ~han)


def _heaviest(words: np.ndarray, listed: WeightedWords, top: int) -> str:
    counts = Counter(words.tolist())
    order = sorted(counts, key=lambda word: (-counts[word] * listed.weights[word], listed.words[word]))
    return ", ".join(f"{listed.words[word]} x{counts[word]}" for word in order[:top])
