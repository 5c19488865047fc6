import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pytest

from data_pipelines import readers, sources

FILES = {
    "r/a.py": b"import b\n",
    "r/sub/b.h": b"class B {};\n",
    "r/LICENSE": b"MIT",
    "r/run": b"#!/bin/sh\necho\n",
    "r/plain": b"not known",
    "r/README.md": b"# Title\n",
    "r/rows.jsonl": b'{"text": "a row"}\n{broken\n',
    "r/page.html": b"<title>T</title><p>A page.</p>",
    "r/.hidden.py": b"x",
    "r/node_modules/m.js": b"x",
    "r/picture.png": b"\x89PNG",
}


def tar_bytes(files, *links):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return content.getvalue()


def zip_bytes(files, method=zipfile.ZIP_DEFLATED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return content.getvalue()


def read(path):
    bad = []
    return sources.read([path], on_bad_row=bad.append), [message.replace(f"{path}", path.name) for message in bad]


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("r.tar", bytes),
        ("r.tar.gz", gzip.compress),
        ("r.tgz", gzip.compress),
        ("r.tar.bz2", bz2.compress),
        ("r.tar.xz", lzma.compress),
        ("r.tar.zst", lambda raw: pa.compress(raw, codec="zstd", asbytes=True)),
        ("r.zip", None),
    ],
)
def test_an_archive_gives_what_its_folder_gives(tmp_path, name, packed):
    for inside, raw in FILES.items():
        (tmp_path / "folder" / inside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / inside).write_bytes(raw)
    path = tmp_path / name
    path.write_bytes(packed(tar_bytes(FILES)) if packed else zip_bytes(FILES))
    expected, said = read(tmp_path / "folder" / "r")
    found, said_of_archive = read(path)
    assert len(found) == 7 and sorted(found) == sorted(expected), "ids as well"
    assert len(said) == 1 and said_of_archive == [f"{name}/{said[0]}"]


def test_members_that_are_not_to_be_followed_or_held_are_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    files = {
        "../up.py": b"x",
        "/etc/root.py": b"x",
        "inner.tar.gz": b"",
        "bomb.txt": b"0" * 1_000_000,
        "many.jsonl": b'{"text": "a row"}\n' * 300,
        "film.mkv": b"",
        "end.py": b"x = 1\n",
    }
    links = [
        ("node_modules/.bin/tool", tarfile.SYMTYPE, "x"),
        ("link.py", tarfile.SYMTYPE, "/etc/passwd"),
        ("hard.py", tarfile.LNKTYPE, "end.py"),
    ]
    (tmp_path / "x.tgz").write_bytes(gzip.compress(tar_bytes(files, *links)))
    link = zipfile.ZipInfo("link.py")
    link.external_attr = 0o120777 << 16
    (tmp_path / "x.zip").write_bytes(zip_bytes({**files, link: b"/etc/passwd"}))
    said = {
        "../up.py: a name that leads out of the archive; not read",
        "/etc/root.py: a name that leads out of the archive; not read",
        "inner.tar.gz: an archive in an archive; not read, give it by itself",
        "bomb.txt:1: one text of more than 1000 bytes; split it",
        "film.mkv: not text: a video",
        "link.py: a link, or no plain file; not followed",
    }
    for name, more in (("x.tgz", {"hard.py: a link, or no plain file; not followed"}), ("x.zip", set())):
        found, bad = read(tmp_path / name)
        assert found[-1].path == "x/end.py" and len(found) == 301, "rows are streamed, however many"
        assert {message.removeprefix(f"{name}/") for message in bad} == said | more


def test_damage_is_named_and_what_comes_before_it_is_kept(tmp_path):
    whole = tar_bytes({f"{n}.py": f"x = {n}\n".encode() * 200 for n in range(9)})
    packed = zip_bytes({f"{n}.py": f"x = {n}\n".encode() * 200 for n in range(9)}, zipfile.ZIP_STORED)
    encrypted = bytearray(zip_bytes({"a.py": b"x"}))
    for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        encrypted[encrypted.index(mark) + at] |= 1
    for name, raw, kept, message in (
        ("body.tar", whole[:7000], 3, "body.tar/3.py: cannot be read (unexpected end of data)"),
        ("head.tar", whole[:4300], 2, "head.tar: the archive is cut off or damaged (it has no end mark)"),
        ("cut.tar.gz", gzip.compress(whole, 0)[:6500], 3, "cut.tar.gz: the archive is cut off or damaged (Compressed"),
        ("none.tar", b"garbage" * 100, 0, "none.tar: not a readable tar archive (invalid header)"),
        ("cut.zip", packed[:-30], 0, "cut.zip: not a readable zip archive (File is not a zip file)"),
        ("byte.zip", packed.replace(b"x = 3", b"x = 4", 1), 8, "byte.zip/3.py: cannot be read (Bad CRC-32"),
        ("secret.zip", bytes(encrypted), 0, "secret.zip/a.py: encrypted; not read, decrypt the archive first"),
        ("empty.zip", b"", 0, "empty.zip: not a readable zip archive"),
    ):
        path, bad = tmp_path / name, []
        path.write_bytes(raw)
        found = list(sources.unit(sources.cut(sources.find_files([path]), size=1).slices).read(bad.append))
        assert len(found) == kept and all(d.text.startswith("x = ") for d in found), name
        assert len(bad) == (2 if name == "body.tar" else 1), "the member, and the archive that ends in it"
        assert bad[0].replace(str(path), name).startswith(message), (name, bad)
        with pytest.raises(ValueError, match=path.name):
            sources.read([path])
