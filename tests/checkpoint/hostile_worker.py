"""A process that loads checkpoints within limits: reads `kind folder` as JSON lines, answers what came of each.

Run by test_hostile.py with the bytes of memory it may add as argument.
"""

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import torch

from aurora.checkpoint.gguf import load_llama
from aurora.modeling import AuroraForConditionalGeneration
from aurora.processing.gguf_tokenizer import load_gguf_tokenizer
from aurora.processing.processor import AuroraProcessor
from aurora.processing.text import Tokenizer


def load(kind: str, folder: Path) -> None:
    """Load everything of a checkpoint, and use its tokenizer."""
    if kind in ("model", "xtuner"):
        AuroraForConditionalGeneration.from_pretrained(folder)
        return
    if kind == "processor":
        processor = AuroraProcessor.from_pretrained(folder)
        processor(images=torch.zeros(3, 30, 40), text=processor.build_prompt("Hi", 1))
        return
    if kind == "gguf":
        load_llama(folder / "m.gguf")
        tokenizer = load_gguf_tokenizer(folder / "m.gguf")
    else:
        tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("abc Hello, wörld 日本\n  12 </s>", add_bos=True)
    tokenizer.decode(ids, skip_special_tokens=False)


def main() -> None:
    """Serve until the input ends."""
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = used + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, folder = json.loads(line)
        start = time.process_time()
        outcome, message = "loaded", ""
        try:
            load(kind, Path(folder))
        except ValueError as error:
            outcome, message = "refused", str(error)
        except BaseException as error:  # what must not happen is reported with its kind
            outcome, message = type(error).__name__, str(error)
        print(json.dumps([outcome, message, time.process_time() - start]), flush=True)


if __name__ == "__main__":
    main()
