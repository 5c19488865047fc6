import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import document as d


def make(text, **fields):
    return d.make_document(text, **{"source": "s", "path": "p"} | fields)


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), max_size=6))
def test_documents_survive_arrow(texts):
    documents = [make(text, path=f"f:{i}", meta={"é": [i, None]}) for i, text in enumerate(texts)]
    assert d.to_documents(d.to_batch(documents)) == documents


def test_id_depends_on_source_path_and_text_and_on_nothing_else():
    ids = {make("a").id, make("b").id, make("a", source="t").id, make("a", path="q").id}
    assert len(ids) == 4
    assert make("a").id == make("a", language="zh", meta={"x": 1}).id
    # Parts are separated: moving a character from one to the next is another document.
    assert d.document_id("c", source="ab", path="") != d.document_id("c", source="a", path="b")


def test_lone_surrogate_becomes_text_that_a_file_can_hold():
    assert make("a\ud800b").text.encode() == b"a?b"


def test_text_buffer_honours_slices_and_chunks_and_no_rows():
    batch = d.to_batch([make(text, path=str(i)) for i, text in enumerate(["ab", "", "héé", "x"])])
    data, offsets = d.text_buffer(batch.slice(1, 2))
    assert [bytes(data[a:b]).decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == ["", "héé"]
    assert d.num_text_bytes(batch.slice(1, 2)) == 5
    joined = d.concat_batches([batch.slice(0, 1), batch.slice(2, 2), batch.slice(0, 0)])
    assert joined.column("text").to_pylist() == ["ab", "héé", "x"]
    for empty in (d.to_batch([]), batch.slice(2, 0), d.concat_batches([])):
        assert d.text_buffer(empty).offsets.tolist()[-1] - d.text_buffer(empty).offsets.tolist()[0] == 0
        assert empty.schema == d.SCHEMA
    assert isinstance(joined, pa.RecordBatch)


def test_fingerprint_sees_order_and_content():
    a, b = make("a"), make("b")
    assert d.fingerprint([a, b]) == d.fingerprint(d.to_batch([a, b])) != d.fingerprint([b, a])


def test_split_keeps_a_file_together_and_has_about_the_fraction():
    documents = [make(f"{kind} {i}", path=f"file{i}.py", source=kind) for i in range(2000) for kind in ("code", "doc")]
    split = d.split_by_file(documents, fraction=0.1)
    assert not {x.path for x in split.train} & {x.path for x in split.held_out}
    assert len(split.train) + len(split.held_out) == 4000
    assert 300 < len(split.held_out) < 500  # 400 expected, deviation 27 of pairs
    # The set grows with the fraction: what is held out at 0.1 stays held out at 0.2.
    assert {x.id for x in split.held_out} <= {x.id for x in d.split_by_file(documents, fraction=0.2).held_out}
    assert d.in_held_out("a.py", fraction=1.0) and not d.in_held_out("a.py", fraction=0.0)
    with pytest.raises(ValueError, match="fraction is 2"):
        d.split_by_file(documents, fraction=2)
