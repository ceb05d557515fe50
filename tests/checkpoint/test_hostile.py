"""Truncated, mutated and hostile files: one clear ValueError each, in seconds and little memory, and never a crash.

All are loaded in a process of their own, which has 1 GB of memory beyond its imports and 10 s for each; the quick tests
load a part of them here.
"""

import json
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aurora.cli import main
from tests.checkpoint.hostile_cases import CONFIG, TOKENIZER, WEIGHTS, Case, Files, all_cases, sound_checkpoints
from tests.checkpoint.hostile_worker import load

MAX_SECONDS = 10.0
MAX_BYTES = 10**9
WORKER = Path(__file__).with_name("hostile_worker.py")


class Loader:
    """A process that loads checkpoints; a new one after a crash or a hang."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def load(self, kind: str, folder: Path) -> tuple[str, str, float]:
        """What came of loading a folder: outcome, message, seconds of processor time."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), str(MAX_BYTES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert self._answer() == "ready"
        assert self.process.stdin is not None
        print(json.dumps([kind, str(folder)]), file=self.process.stdin, flush=True)
        answer = self._answer()
        if answer is None:
            # Ended or still at it.
            code = self.process.poll()
            self.stop()
            return "hang" if code is None else "crash", f"exit code {code}", 0.0
        outcome, message, seconds = answer
        return outcome, message, seconds

    def _answer(self) -> Any:
        """The next answer, None where there is none."""
        assert self.process is not None
        assert self.process.stdout is not None
        # Waiting is generous, since the machine may be busy with other things; the processor time decides.
        ready, _, _ = select.select([self.process.stdout], [], [], 6 * MAX_SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if ready and not line:
            self.process.wait()
        return json.loads(line) if line else None

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None


@pytest.fixture
def loader() -> Iterator[Loader]:
    loader = Loader()
    yield loader
    loader.stop()


def _verdict(case: Case, folder: Path, outcome: str, message: str, seconds: float) -> str:
    """What is wrong with the answer, empty if nothing is."""
    if seconds > MAX_SECONDS:
        return f"{seconds:.0f} s"
    if case.sound:
        return "" if outcome == "loaded" else f"{outcome}: {message}"
    if outcome == "loaded":
        return "loaded" if case.must_fail else ""
    if outcome != "refused":
        return f"{outcome}: {message}"
    # What two files disagree about may be put down to the other one.
    names = {Path(name).name for name in (*case.base, case.file)} | {"y.safetensors", "pytorch_model.bin"}
    if str(folder) not in message or not any(name in message for name in names):
        return f"does not name the file: {message}"
    if case.fields and not any(name in message for name in case.fields):
        return f"names none of {', '.join(case.fields)}: {message}"
    return ""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    return sound_checkpoints(tmp_path_factory.mktemp("sound") / "all")


def write(folder: Path, case: Case) -> None:
    for name, content in {**case.base, case.file: case.content}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.filterwarnings("ignore:.*fields this version does not know")
def test_one_file_in_eight_is_refused_here(tmp_path: Path, sound: dict[str, Files]) -> None:
    cases = [*_sound_cases(sound), *(case for case in all_cases(sound)[::8] if case.must_fail)]
    assert len(cases) > 60
    wrong = []
    for number, case in enumerate(cases):
        folder = tmp_path / f"case{number}"
        write(folder, case)
        outcome, message = "loaded", ""
        try:
            load(case.kind, folder)
        except ValueError as error:
            outcome, message = "refused", str(error)
        verdict = _verdict(case, folder, outcome, message, 0.0)
        if verdict:
            wrong.append(f"{case.name}: {verdict}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (WEIGHTS, b"\x00" * 100),
        (CONFIG, b'{"architectures": ["AuroraForConditionalGeneration"]}'),  # sizes of 7B: a table of tensors
        (TOKENIZER, b"hello"),
        ("processor_config.json", b'{"num_frames": 0}'),
    ],
    ids=["weights", "config", "tokenizer", "processor"],
)
def test_a_script_says_it_in_one_line(
    tmp_path: Path, sound: dict[str, Files], capsys: pytest.CaptureFixture[str], file: str, content: bytes
) -> None:
    case = Case(name=file, kind="model", file=file, content=content, base=sound["model"])
    write(tmp_path, case)
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    with pytest.raises(SystemExit) as stop:
        main(["caption", f"model_path={tmp_path}", f"visual_input={tmp_path / 'photo.png'}"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ")
    assert "\n" not in printed
    assert str(tmp_path / file) in printed or str(tmp_path) in printed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hostile_files_are_refused(tmp_path: Path, loader: Loader, sound: dict[str, Files]) -> None:
    cases = all_cases(sound)
    assert sum(case.must_fail for case in cases) >= 300
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number, case in enumerate([*_sound_cases(sound), *cases]):
        folder = tmp_path / f"case{number}"
        write(folder, case)
        outcome, message, seconds = loader.load(case.kind, folder)
        outcomes[outcome] += 1
        slowest = max(slowest, seconds)
        verdict = _verdict(case, folder, outcome, message, seconds)
        if verdict:
            wrong.append(f"{case.name}: {verdict}")
        shutil.rmtree(folder)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{len(cases)} files: {summary}; slowest {slowest:.2f} s")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)} ({summary}):", *wrong])


def _sound_cases(sound: dict[str, Files]) -> list[Case]:
    """The checkpoints as they are, so that a loader which refuses everything is found out."""
    return [
        Case(name=f"sound {kind}", kind=kind, file=name, content=files[name], sound=True, base=files)
        for kind, files in sound.items()
        for name in [next(iter(files))]
    ]
