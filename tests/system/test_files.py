"""Reading of files that somebody else may have made; writing through no link."""

import os
from pathlib import Path

import pytest

from kdlab.plain_text import one_line, printable
from kdlab.system import files
from kdlab.system.files import Unreadable, file_hash, make_folder, open_to_append, read_bytes, read_json, read_yaml


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_documents_are_read(tmp_path: Path):
    assert read_json(write(tmp_path / "a.json", '{"a": [1, 2]}')) == {"a": [1, 2]}
    assert read_yaml(write(tmp_path / "a.yaml", "a: &x [1, 2]\nb: *x\n")) == {"a": [1, 2], "b": [1, 2]}
    assert read_yaml(write(tmp_path / "empty.yaml", "")) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]" for n in range(12)), "aliases"),
        ("a: &a {b: *a}", "stands inside"),
        ("[" * 5000, "levels deep"),
        ("a: *nobody", "for nothing"),
        ("a: !!python/object/apply:os.getcwd []", "no YAML"),
        ("a: [", "no YAML"),
    ],
)
def test_a_hostile_yaml_document_is_refused(tmp_path: Path, text: str, reason: str):
    with pytest.raises(Unreadable, match=reason):
        read_yaml(write(tmp_path / "x.yaml", text))


def test_a_hostile_json_document_is_refused(tmp_path: Path):
    with pytest.raises(Unreadable, match="deep"):
        read_json(write(tmp_path / "deep.json", "[" * 100_000))
    with pytest.raises(Unreadable, match="no JSON"):
        read_json(write(tmp_path / "cut.json", '{"a": '))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(Unreadable, match="UTF-8"):
        read_json(tmp_path / "bytes.json")
    with pytest.raises(Unreadable, match="larger"):
        read_bytes(write(tmp_path / "long", "x" * 101), limit=100)
    assert read_bytes(write(tmp_path / "just", "x" * 100), limit=100) == b"x" * 100


@pytest.mark.timeout(20)  # a reader that waits for a pipe waits for ever
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zero"):
        for read in (read_json, read_yaml, file_hash):
            with pytest.raises(Unreadable, match="no regular file"):
                read(path)


def test_a_hash_changes_with_one_bit(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"weights")
    before = file_hash(tmp_path / "a")
    assert before == "sha256:9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    (tmp_path / "a").write_bytes(b"weighus")
    assert file_hash(tmp_path / "a") != before


def test_nothing_is_written_through_a_link(tmp_path: Path):
    target = write(tmp_path / "precious", "kept")
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(OSError):
        open_to_append(link)
    with files.atomic_write(link) as file:
        file.write(b"new")
    assert target.read_text() == "kept" and not link.is_symlink() and link.read_bytes() == b"new"
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "elsewhere").symlink_to(folder)
    with pytest.raises(OSError, match="link"):
        make_folder(tmp_path / "elsewhere")
    assert make_folder(folder) == folder and make_folder(tmp_path / "new").is_dir()


def test_text_for_the_terminal_has_no_escapes():
    assert one_line("a\n\x1b]0;title\x07 b") == "a ]0;title b"
    assert printable("a\tb\n\x9b31m‮") == "a\tb\n31m"
