import json

import pyarrow as pa
import pytest

from data_pipelines import ledger as books
from data_pipelines.dedup import exact_duplicates
from data_pipelines.document import Outcome, Stage, make_document, to_batch
from data_pipelines.wanjuan import run_chain


def batch_of(*texts):
    return to_batch([make_document(text, source="s", path=f"f:{i}") for i, text in enumerate(texts)])


def test_record_keeps_and_names():
    ledger, batch = books.Ledger(), batch_of("one", "two!", "three")
    kept = books.record(ledger, "length", batch, Outcome(batch, [None, "long", None], [None, "4 is above 3", None]))
    assert kept.column("text").to_pylist() == ["one", "three"]
    assert ledger.stages == {"length": books.StageCount("length", 3, 12, 2, 8, {"long": 1}, {"long": 4})}
    books.check(ledger)
    dropped = batch.column("id")[1].as_py()
    assert books.explain(ledger, dropped[:12]) == f"{dropped} f:1: dropped by length: long (4 is above 3)"
    assert books.dropped_by_reason(ledger) == {"long": 1}


def test_texts_are_not_copied_where_the_rows_that_go_have_none():
    whole = batch_of("before", "", "one", "", "", "zwei 二", "")
    batch = whole.slice(1)
    reasons = ["empty" if not text else None for text in batch.column("text").to_pylist()]
    kept = books.record(books.Ledger(), "edit", batch, Outcome(batch, reasons, reasons))
    assert kept.equals(batch.filter(pa.array([reason is None for reason in reasons])))
    assert kept.column("text").buffers()[2].address == whole.column("text").buffers()[2].address
    nothing = books.record(books.Ledger(), "edit", whole.slice(3, 2), Outcome(whole.slice(3, 2), ["x"] * 2, [None] * 2))
    assert nothing.num_rows == 0 and nothing.schema.equals(whole.schema)


def test_a_stage_that_loses_rows_fails_at_once():
    batch = batch_of("one", "two")
    with pytest.raises(RuntimeError, match="given 2 rows and returned 1 rows"):
        books.record(books.Ledger(), "leak", batch, Outcome(batch.slice(0, 1), [None, None], [None, None]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents_kept": 1}, "does not sum at stage 'b'"),
        ({"documents_in": 3, "documents_kept": 3}, "vanished between stages: 'a' kept 2, 'b' was given 3"),
        ({"documents_kept": 1, "dropped": {"x": 1}}, "1 documents dropped, 0 of them have a name"),
    ],
)
def test_a_ledger_that_does_not_sum_fails(change, message):
    fine = {name: books.StageCount(name, 2, 6, 2, 6) for name in "ab"}
    books.check(books.Ledger(stages=fine))
    with pytest.raises(RuntimeError, match=message):
        books.check(books.Ledger(stages=fine | {"b": fine["b"]._replace(**change)}))


def test_saved_ledger_sums_and_lists_every_drop(tmp_path):
    import pyarrow.parquet as pq

    def odd(batch):
        reasons = ["odd" if len(text) % 2 else None for text in batch.column("text").to_pylist()]
        return Outcome(batch, reasons, reasons)

    documents = [make_document("x" * n, source="s", path=f"f:{n}") for n in range(1, 3001)]
    ledger = books.Ledger()
    kept = run_chain(documents, [Stage("odd", "batch", odd), Stage("again", "corpus", exact_duplicates)], ledger)
    books.save(ledger, tmp_path)
    saved = json.loads((tmp_path / "ledger.json").read_text())
    assert (saved["documents_in"], saved["documents_kept"], saved["documents_dropped"]) == (3000, 1500, 1500)
    assert saved["bytes_in"] == 3000 * 3001 // 2 and saved["bytes_kept"] == sum(range(2, 3001, 2))
    assert saved["dropped"] == {"odd": {"odd": 1500}, "again": {}}
    rows = pq.read_table(tmp_path / "dropped.parquet").to_pylist()
    assert {row["id"] for row in rows} | {document.id for document in kept} == {document.id for document in documents}
    assert books.explain(ledger, kept[0].id) == f"{kept[0].id}: kept"
    with pytest.raises(ValueError, match="matches 0 documents"):
        books.explain(ledger, "zz")


def test_a_run_that_drops_everything_says_so():
    def all_of_it(batch):
        return Outcome(batch, ["bad"] * batch.num_rows, [None] * batch.num_rows)

    with pytest.raises(ValueError, match=r"all 1 documents were dropped: bad \(1\)"):
        run_chain([make_document("x", source="s", path="p")], [Stage("s", "batch", all_of_it)], books.Ledger())
    with pytest.raises(ValueError, match="corpus is empty"):
        run_chain([], [], books.Ledger())
