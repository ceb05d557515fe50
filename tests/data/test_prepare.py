import json

import pytest

from aurora.cli import main
from tests.data.datasets import turns, write_dataset, write_jsonl


def test_prepare_shows_a_table_and_writes_ids(tmp_path, capsys):
    path = write_dataset(tmp_path)
    arguments = [f"data.path={path}", f"data.cache_dir={tmp_path / 'cache'}", "decode=true", "token_kept_ratio=0.2"]
    main(["prepare", *arguments])
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split()[:6] == ["source", "samples", "weight", "text", "image", "video"]
    assert lines[1].split()[:6] == ["data", "12", "1", "3", "6", "3"]
    assert "tokens written" in out
    assert "all 12 samples can be read" in out
    main(["prepare", *arguments])
    assert "tokens found" in capsys.readouterr().out


def test_prepare_names_mistakes_and_fails(tmp_path, capsys):
    path = write_dataset(tmp_path)
    with path.open("a") as file:
        file.write(json.dumps({"image": "gone.png", "conversations": turns("<image>Q", "A")}) + "\n{\n")
    with pytest.raises(SystemExit) as left:
        main(["prepare", f"data.path={path}"])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert f"{path}:13: no such file: gone.png\n{path}:14: bad JSON" in error
    assert error.splitlines()[-1] == "error: data: 2 mistakes; want none"


def test_prepare_decodes(tmp_path, capsys):
    path = write_dataset(tmp_path)
    (tmp_path / "im/1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(["prepare", f"data.path={path}", "decode=true"])
    assert f"{path}:2: im/1.png: not an image" in capsys.readouterr().err


def test_extraction_needs_tars(tmp_path, capsys):
    path = write_jsonl(tmp_path / "d.jsonl", [{"conversations": turns("Q", "A")}])
    with pytest.raises(SystemExit):
        main(["prepare", f"data.path={path}", f"extract_to={tmp_path / 'x'}"])
    assert "data.media names no tar files" in capsys.readouterr().err
