"""A run of a chain on one page, and the fate of one document.

    python -m data_pipelines.inspect DIR                      # writes DIR/inspect.html and DIR/inspect.md
    python -m data_pipelines.inspect DIR --document ID        # an id, or the beginning of one
    python -m data_pipelines.inspect DIR --path notes.jsonl:7 --tokens TOKENS

DIR is the --output of `data_pipelines.wanjuan`. The page needs nothing but itself: flow from raw to kept, reasons,
lengths, languages, domains, licences and sources, samples of what was dropped (their text where the run had
--keep-dropped), groups of near duplicates, and sliders that say what other thresholds would keep. TOKENS is a token
folder that was made from DIR: the document's shard and tokens are then named.
"""

import argparse
import bisect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_pipelines.executors import shown_progress
from data_pipelines.fate import documents_of, rows_of, tell
from data_pipelines.ledger import Fate, read_summary
from data_pipelines.measures import LENGTH, OTHERS, Bound, curves, named
from internjax import report
from internjax.figures import Bar, Bars, Slider, Stop, format_number
from internjax.report import Number, Numbers, Sample, Samples, Section, Table, Text

SHOWN_VALUES = 12
SHOWN_REASONS = 40
SAMPLES_EACH = 3
SHOWN_CHARACTERS = 600
SHOWN_MESSAGES = 10
DECONTAMINATION = "decontamination.json"
"""Where `python -m data_pipelines.decontamination --output DIR/decontamination.json` leaves its report."""


class Shown(NamedTuple):
    """A document that the page shows: where it came from, its text where there is one, what dropped it (None: kept)."""

    path: str
    text: str | None
    fate: str | None
    reason: tuple[str, str] | None = None


def write_page(
    folder: str | Path, *, progress: Callable[[str, int, int], None] = lambda label, done, total: None
) -> Path:
    """Writes inspect.html and inspect.md into the folder of a run and returns the path of the former.

    progress is told (what, done, of how many). Raises ValueError where the folder holds no run, or that of another
    version.
    """
    folder = Path(folder)
    counts = read_summary(folder)
    wanted: dict[tuple[str, str], list[str]] = {}
    done = 0
    for batch in _batches(folder / "dropped.parquet", ("stage", "reason", "id")):
        _draw(batch, wanted)
        done += batch.num_rows
        progress("draw samples", done, counts["documents_dropped"])
    near = {name: found for name, found in counts["reports"].items() if "shown" in found}
    in_groups = {name for found in near.values() for pair in found["pairs"] for name in pair[:2]}
    in_groups |= {name for found in near.values() for group in found["shown"] for name in group["members"]}
    shown = _documents(folder, in_groups | {name for names in wanted.values() for name in names}, progress)
    sections = [
        _at_a_glance(counts),
        _flow(counts),
        _reasons(folder, counts),
        _distributions(counts["profiles"]),
        _thresholds(folder, counts),
        _samples(counts, wanted, shown),
        *(_near_duplicates(name, found, shown) for name, found in near.items()),
        _left_in_meta(counts["profiles"]["kept"]),
        _decontamination(folder, counts),
        _set_aside(folder, counts),
    ]
    subtitle = f"{size(counts['bytes_in'])} in, {size(counts['bytes_kept'])} kept"
    report.write(folder, folder.name, [part for part in sections if part.blocks], subtitle=subtitle, name="inspect")
    return folder / "inspect.html"


def size(num_bytes: float) -> str:
    """Bytes in words: 15.9 MB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


# --- what is read ----------------------------------------------------------------------------------------------------


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow.dataset as ds

    yield from ds.dataset(path, format="parquet").to_batches(columns=list(columns))


def _draw(batch: pa.RecordBatch, found: dict[tuple[str, str], list[str]]) -> None:
    """Enters the least ids that each (stage, reason) dropped: ids are hashes, so these are drawn at random."""
    for stage, reason, name in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        least = found.setdefault((stage, reason), [])
        if len(least) < SAMPLES_EACH or name < least[-1]:
            bisect.insort(least, name)
            del least[SAMPLES_EACH:]


def _documents(folder: Path, ids: set[str], progress: Callable[[str, int, int], None]) -> dict[str, list[Shown]]:
    """Id -> what is known of it; a document that came twice has several entries."""
    found: dict[str, list[Shown]] = {}
    files = documents_of(folder)
    for number, path in enumerate(files, 1):
        for row in rows_of([path], ids, ["id", "path", "text"]):
            found.setdefault(row["id"], []).append(Shown(row["path"], _excerpt(row["text"]), None))
        progress("read documents", number, len(files))
    for row in rows_of([folder / "dropped.parquet"], ids, [*Fate._fields, "text"]):
        one = Shown(row["path"], _excerpt(row["text"]), row["detail"] or row["reason"], (row["stage"], row["reason"]))
        found.setdefault(row["id"], []).append(one)
    return found


def _excerpt(text: str | None) -> str | None:
    return text if text is None or len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"


# --- sections --------------------------------------------------------------------------------------------------------


def _at_a_glance(counts: Mapping[str, Any]) -> Section:
    came, kept = counts["documents_in"], counts["documents_kept"]
    num_bad = sum(counts["rows_set_aside"].values())
    tiles = [
        Number("Documents in", came, size(counts["bytes_in"])),
        Number("Documents kept", kept, f"{_share(kept, came)}, {size(counts['bytes_kept'])}"),
        Number("Dropped", counts["documents_dropped"], f"for {sum(map(len, counts['dropped'].values()))} reasons"),
        Number("Rows that could not be read", num_bad, outcome="bad" if num_bad else "neutral"),
    ]
    groups = sum(found["groups"] for found in counts["reports"].values() if "groups" in found)
    if groups:
        largest = max(found["largest_group"] for found in counts["reports"].values() if "groups" in found)
        tiles.append(Number("Groups of near duplicates", groups, f"the largest has {largest:,}"))
    return Section("At a glance", [Numbers(tiles)])


def _flow(counts: Mapping[str, Any]) -> Section:
    stages = counts["stages"]
    blocks: list[Any] = []
    for title, name, said in (("Documents", "documents", "{:,}".format), ("Bytes", "bytes", size)):
        came = counts[f"{name}_in"]
        bars = [Bar("raw", came, came, said(came))]
        bars += [
            Bar(
                stage["stage"],
                stage[f"{name}_in"],
                stage[f"{name}_kept"],
                f"{said(stage[f'{name}_kept'])} ({_share(stage[f'{name}_kept'], came)} of raw)",
            )
            for stage in stages
        ]
        blocks.append(Bars(title, bars, "in", "kept", "from raw to kept, stage by stage"))
    rows = [
        (
            stage["stage"], stage["documents_in"], sum(stage["dropped"].values()), stage["documents_kept"],
            size(stage["bytes_in"]), size(sum(stage["dropped_bytes"].values())), size(stage["bytes_kept"]),
        )
        for stage in stages
    ]  # fmt: skip
    columns = ("stage", "documents in", "dropped", "kept", "bytes in", "dropped bytes", "kept bytes")
    edits = "A stage that edits text keeps its documents and changes their bytes."
    return Section("From raw to kept", [*blocks, Table(columns, rows, edits)])


def _reasons(folder: Path, counts: Mapping[str, Any]) -> Section:
    came = counts["documents_in"]
    rows = [
        (reason, number, _share(number, came), size(stage["dropped_bytes"].get(reason, 0)), stage["stage"])
        for stage in counts["stages"]
        for reason, number in stage["dropped"].items()
    ]
    rows.sort(key=lambda row: -row[1])
    if not rows:
        return Section("Reasons", [])
    found: dict[str, Counter[str]] = {}
    for batch in _batches(folder / "dropped.parquet", ("language", "reason")):
        for (language, reason), number in Counter(zip(*(column.to_pylist() for column in batch.columns))).items():
            found.setdefault(language, Counter())[reason] += number
    in_all = counts["profiles"]["in"]["language"]
    languages = list(dict.fromkeys([*in_all, *found]))[:SHOWN_VALUES]
    by_language = [
        (name, in_all.get(name, (0, 0))[0], sum(found.get(name, {}).values()), _most(found.get(name)))
        for name in languages
    ]
    told = "By language: that which a document came with, and that which it had when it was dropped."
    text = "A document counts once, for the first reason that drops it; `dropped.parquet` names all of them."
    return Section(
        "Reasons",
        [
            Table(("reason", "documents", "of all that came in", "bytes", "stage"), rows, text),
            Table(("language", "documents in", "dropped", "most often as"), by_language, told),
        ],
    )


def _most(reasons: Counter[str] | None) -> str:
    most = sorted((reasons or Counter()).items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} ({number:,})" for reason, number in most[:3]) or "–"


def _distributions(profiles: Mapping[str, Any]) -> Section:
    blocks = []
    for name in (LENGTH, "language", "domain", "licence", "source"):
        came, kept = profiles["in"].get(name, {}), profiles["kept"].get(name, {})
        values = [*came, *(value for value in kept if value not in came)]
        if name == LENGTH:
            values = [str(value) for value in sorted(map(int, values))]
            rest = []
        else:
            values.sort(key=lambda value: (value == OTHERS, -came.get(value, (0, 0))[0]))
            values, rest = values[:SHOWN_VALUES], values[SHOWN_VALUES:]
        bars = [_bar(_length(value) if name == LENGTH else value, [value], came, kept) for value in values]
        if rest:
            bars.append(_bar(f"{len(rest)} others", rest, came, kept))
        title, caption = ("Length", "UTF-8 bytes of a document") if name == LENGTH else (name.capitalize(), "")
        if bars:
            blocks.append(Bars(title, bars, "in", "kept", caption))
    return Section("What they are like", blocks)


def _bar(label: str, values: Sequence[str], came: Mapping[str, Any], kept: Mapping[str, Any]) -> Bar:
    documents_in, bytes_in = (sum(came.get(value, (0, 0))[place] for value in values) for place in (0, 1))
    documents, num_bytes = (sum(kept.get(value, (0, 0))[place] for value in values) for place in (0, 1))
    said = f"{documents:,} of {documents_in:,}; {size(num_bytes)} of {size(bytes_in)}"
    return Bar(label, documents_in, documents, said)


def _length(value: str) -> str:
    least = int(value)
    return "empty" if least == 0 else f"from {_power(least)} on"


def _power(num_bytes: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << power:
            return f"{num_bytes >> power} {unit}"
    return f"{num_bytes} B"


def _thresholds(folder: Path, counts: Mapping[str, Any]) -> Section:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "measures.parquet")
    blocks: list[Any] = []
    for stage, held in counts["measured"].items():
        sample = rows.filter(pc.equal(rows.column("stage"), stage))
        found = curves([Bound(**bound) for bound in held["bounds"]], sample)
        if not found:
            continue
        exact = sample.num_rows == held["documents"]
        of_what = (
            f"all {held['documents']:,} documents that it measured"
            if exact
            else f"a sample of {sample.num_rows:,} of the {held['documents']:,} documents that it measured, scaled up"
        )
        blocks.append(Text(f"Stage `{stage}`: {of_what}."))
        # What decides of most documents comes first.
        found.sort(key=lambda curve: curve.points[curve.now][1] - max(point[1] for point in curve.points))
        blocks += [_slider(curve, held, exact=exact) for curve in found]
    if not blocks:
        return Section("Thresholds", [])
    told = Text(
        "What a stage would keep if one of its thresholds were another and all else stayed as it is: documents that "
        "fail nothing but this. Where a bound depends on domain or language, there is a slider for each. Later stages "
        "are not run again. Shares of duplicate n-grams are known only where they "
        "can reach the least threshold in use, and code that an early rule drops is not measured further."
    )
    return Section("Thresholds", [told, *blocks])


def _slider(curve: Any, held: Mapping[str, Any], *, exact: bool) -> Slider:
    about = "" if exact else "about "
    now = curve.points[curve.now]

    def said(point: tuple[float, float, float]) -> str:
        documents, num_bytes = point[1] * held["documents"], point[2] * held["bytes"]
        change = round(documents) - round(now[1] * held["documents"])
        beside = f"; {change:+,} documents" if change else ""
        return f"{about}{documents:,.0f} documents ({point[1]:.1%}) and {size(num_bytes)} stay{beside}"

    bound = curve.bound
    stops = [Stop(point[0], point[1], said(point)) for point in curve.points]
    label = named(bound._replace(reason=bound.reason.replace("_", " ")))
    goes = f"{bound.side} it a document goes; in use: {format_number(bound.value)}"
    return Slider(label, stops, curve.now, f"{goes}; others have a bound of their own" if bound.of else goes)


def _samples(
    counts: Mapping[str, Any], wanted: Mapping[tuple[str, str], Sequence[str]], shown: Mapping[str, Sequence[Shown]]
) -> Section:
    numbers = {
        (stage["stage"], reason): number for stage in counts["stages"] for reason, number in stage["dropped"].items()
    }
    order = sorted(wanted, key=lambda key: -numbers[key])
    blocks: list[Any] = []
    for stage, reason in order[:SHOWN_REASONS]:
        cards = []
        for name in wanted[stage, reason]:
            one = next(found for found in shown[name] if found.reason == (stage, reason))
            text = "" if one.text is None else f"\n\n{one.text}"
            cards.append(Sample(f"{one.path} · {name[:12]}", f"{one.fate}{text}"))
        number = numbers[stage, reason]
        documents = "1 document" if number == 1 else f"{number:,} documents"
        blocks.append(Samples(cards, f"`{reason}` of {stage}: {documents}"))
    if not blocks:
        return Section("Samples of what was dropped", [])
    told = "Drawn at random, the same in every run."
    if all(one.text is None for found in shown.values() for one in found if one.reason):
        told += " The texts were not kept: run the chain with `--keep-dropped` to see them here."
    if len(order) > SHOWN_REASONS:
        told += f" {len(order) - SHOWN_REASONS} rarer reasons are not shown."
    return Section("Samples of what was dropped", [Text(told), *blocks])


def _near_duplicates(stage: str, found: Mapping[str, Any], shown: Mapping[str, Sequence[Shown]]) -> Section:
    if not found["groups"]:
        return Section(f"Near duplicates ({stage})", [])
    sizes = [Bar(f"{members} documents", number, number, f"{number:,}") for members, number in found["sizes"].items()]
    more = f"{len(sizes) - SHOWN_VALUES} further sizes are not shown" if len(sizes) > SHOWN_VALUES else ""
    edges, ties = found["ties"]["edges"], found["ties"]["documents"]
    similar = [
        Bar(f"{low:.2f} to {high:.2f}", number, number, f"{number:,}")
        for low, high, number in zip(edges, edges[1:], ties)
    ]
    rows = []
    for group in found["shown"]:
        nearest, farthest = (1 - group[name][2] for name in ("nearest", "farthest"))
        compared = len(group["members"])
        rows.append(
            (
                _where(group["members"][0], shown), group["size"], compared, f"{nearest:.3f}", f"{farthest:.3f}",
                f"{group['below_threshold']} of {group['pairs']}",
            )
        )  # fmt: skip
    columns = ("kept document", "group", "compared", "least distance", "diameter", "pairs below the threshold")
    groups = "1 group" if found["groups"] == 1 else f"{found['groups']:,} groups, the largest"
    told = (
        f"{found['candidates']:,} candidate pairs, {found['verified']:,} of them verified and joined: {groups} of "
        f"{found['largest_group']:,} documents."
    )
    if found["capped_buckets"]:
        told += f" {found['capped_buckets']:,} buckets were so large that not all their pairs were looked at."
    caption = (
        "The largest groups, and others drawn at random. Distance is 1 - Jaccard similarity; the diameter is the "
        "largest one inside a group. Groups are chains of pairs, so some pairs lie below the threshold."
    )
    blocks = [
        Text(told),
        Bars("Groups by size", sizes[:SHOWN_VALUES], "groups", caption=more),
        Bars("Dropped documents by similarity", similar, "documents", caption="Jaccard, to the closest verified one"),
        Table(columns, rows, caption),
    ]
    chains = [group for group in found["shown"] if group["size"] > 2]
    for group in chains[:4]:
        first, second, similarity = group["farthest"]
        names = [group["members"][first], group["members"][second]]
        blocks.append(_pair(names, similarity, shown, f"The farthest two of a group of {group['size']:,}"))
    for first, second, similarity in found["pairs"][:6]:
        blocks.append(_pair([second, first], similarity, shown, "A document that went, beside the one it is tied to"))
    return Section(f"Near duplicates ({stage})", blocks)


def _where(name: str, shown: Mapping[str, Sequence[Shown]]) -> str:
    return f"{shown[name][0].path} · {name[:12]}" if name in shown else name[:12]


def _pair(names: Sequence[str], similarity: float, shown: Mapping[str, Sequence[Shown]], caption: str) -> Samples:
    cards = []
    for name in names:
        one = next(iter(shown.get(name, [])), None)
        text = one.text if one else None
        state = "kept" if one and one.fate is None else "dropped"
        cards.append(Sample(f"{_where(name, shown)} · {state}", text or "(its text was not kept)"))
    return Samples(cards, f"{caption}: Jaccard {similarity:.3f}")


def _left_in_meta(kept: Mapping[str, Any]) -> Section:
    blocks = []
    for name, title in (("personal_data_masked", "Personal data masked, by kind"), ("tier", "Tiers")):
        if column := kept.get(name):
            bars = [Bar(value, n, n, f"{n:,} documents, {size(num_bytes)}") for value, (n, num_bytes) in column.items()]
            blocks.append(Bars(title, bars, "documents", caption="of those that were kept"))
    return Section("Masked data and tiers", blocks)


def _decontamination(folder: Path, counts: Mapping[str, Any]) -> Section:
    blocks: list[Any] = []
    dropped = sum(stage["dropped"].get("contaminated", 0) for stage in counts["stages"])
    cut = counts["profiles"]["kept"].get("decontaminated", {})
    if dropped or cut:
        hit: Counter[str] = Counter()
        for batch in _batches(folder / "dropped.parquet", ("reason", "detail")) if dropped else ():
            for reason, detail in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if reason == "contaminated":
                    hit.update({part.partition(": ")[0] for part in detail.split("; ") if " words (" in part})
        rows = [
            (name, hit[name], cut.get(name, (0, 0))[0])
            for name in sorted({*hit, *cut}, key=lambda name: (-hit[name], name))
        ]
        blocks.append(Table(("evaluation set", "documents dropped", "documents cut"), rows))
    written = folder / DECONTAMINATION
    if written.is_file():
        found = json.loads(written.read_text(encoding="utf-8"))
        rows = [(row["benchmark"], row["items"], row["items_found"], row["documents"], row["words"]) for row in found]
        columns = ("evaluation set", "items", "items found", "documents with one", "words shared")
        blocks.append(Table(columns, rows, f"As in `{DECONTAMINATION}`."))
    return Section("Decontamination", blocks)


def _set_aside(folder: Path, counts: Mapping[str, Any]) -> Section:
    files = counts["rows_set_aside"]
    if not files:
        return Section("Set aside", [])
    rows = sorted(files.items(), key=lambda item: (-item[1], item[0]))
    with (folder / "set_aside.txt").open(encoding="utf-8") as lines:
        messages = [line.rstrip("\n") for _, line in zip(range(SHOWN_MESSAGES), lines)]
    table = Table(("file", "rows"), rows[:SHOWN_VALUES], f"{len(rows):,} files had rows that could not be read.")
    return Section("Set aside", [table, report.Code("\n".join(messages))])


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page of a run, or prints the fate of a document, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="DIR", help="the --output of data_pipelines.wanjuan")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--document", metavar="ID", help="the id of a document, or the beginning of one")
    which.add_argument("--path", help="the path of a document, as in its file: folder/file.jsonl:12")
    parser.add_argument("--tokens", metavar="FOLDER", help="token folder made from DIR")
    given = parser.parse_args(arguments)
    if given.tokens and not (given.document or given.path):
        parser.error("--tokens is for --document and --path")
    try:
        if given.document or given.path:
            print(tell(given.run, document=given.document, path=given.path, tokens=given.tokens))
        else:
            with shown_progress() as progress:
                print(write_page(given.run, progress=progress))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
