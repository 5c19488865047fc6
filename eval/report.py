"""Results as tables: every score with its interval, its chance level and the counts that qualify it."""

from collections.abc import Sequence

from eval.run import Comparison, Result

HEADER = ("task", "metric", "score", "95 % interval", "chance", "items", "prompts cut", "outputs capped", "no answer")


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Returns one row of texts per result, under HEADER. Shares are in per cent."""
    table = []
    for result in results:
        is_share = result.chance is not None
        value, low, high = (f"{100 * x:.1f} %" if is_share else f"{x:.3f}" for x in result.interval)
        chance = f"{100 * result.chance:.0f} %" if is_share else "-"
        counts = (result.num_items, result.num_cut, result.num_capped, result.num_unparsed)
        table.append(
            (f"{result.task} v{result.version}", result.metric, value, f"{low} to {high}", chance, *map(str, counts))
        )
    return table


def markdown(results: Sequence[Result]) -> str:
    """Returns the table in Markdown."""
    lines = [HEADER, ("---",) * 2 + ("---:",) * (len(HEADER) - 2), *rows(results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdict(comparison: Comparison, *, unit: str = "points", scale: float = 100.0) -> str:
    """Returns one sentence on a paired difference, such as "+12.5 points (+4.0 to +21.0), p = 0.0042"."""
    value, low, high = (f"{scale * x:+.1f}" for x in comparison.difference)
    test = "" if comparison.test is None else f", p = {comparison.test.p_value:.2g} (exact McNemar)"
    return f"{value} {unit} ({low} to {high}){test}"
