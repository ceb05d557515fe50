"""Two training steps in a fresh process and the memory they took: `python -m tests.training.step_memory <settings>`.

The allocator is told to give memory back as it is freed (`ENVIRONMENT`): by default glibc keeps a heap that has grown,
and what a process holds is then more than what it uses.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aurora.data.collate import Batch
from aurora.model.captioner import AuroraConfig, AuroraModel
from aurora.model.llama import LlamaConfig
from aurora.model.merge import MergeConfig
from aurora.model.vision import VisionConfig
from aurora.runtime import process_bytes
from aurora.training.build import prepare_model
from aurora.training.config import Objective, Parallel, Precision, StageConfig
from aurora.training.conversations import AnswerLoss
from aurora.training.distributed import World, shard, torchrun_world
from aurora.training.init import init_llama, init_tower
from aurora.training.loop import WholeBatch, start_learning, train_step
from aurora.training.lora import LoraConfig
from aurora.training.plan import Work, plan_memory

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0", "OMP_NUM_THREADS": "1"}
SMALL = AuroraConfig(
    vision=VisionConfig(
        hidden_size=256, intermediate_size=1024, num_layers=8, num_heads=4, patch_size=14, image_size=224
    ),
    text=LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=688, num_layers=4, num_heads=4, num_kv_heads=4
    ),
)
TINY = AuroraConfig(
    vision=VisionConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, patch_size=14, image_size=56),
    text=LlamaConfig(vocab_size=2000, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2),
)
WIDE = replace(
    SMALL,
    text=LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1376, num_layers=10, num_heads=8, num_kv_heads=8
    ),
)
"""More weights and fewer activations, for ranks that share them."""
ROWS, FRAMES, TEXT = 2, 8, 60


class Fixed(WholeBatch):
    """One random batch, again and again."""

    def __init__(self, model: AuroraModel, learner: AnswerLoss, num_frames: int) -> None:
        self.module, self._learner = model, learner
        side = model.config.vision.image_size
        ids = torch.cat([torch.full((ROWS, num_frames), -200), torch.randint(3, 1000, (ROWS, TEXT))], dim=1)
        clips: list[Tensor | None] = [torch.randn(num_frames, 3, side, side) for _ in range(ROWS)]
        self.batch = Batch(ids, ids.masked_fill(ids < 0, -100), torch.ones_like(ids, dtype=torch.bool), clips)
        self.lengths: list[int] = []

    def loss(self, step: int, world: World) -> tuple[Tensor, dict[str, float]]:
        found = self._learner(self.batch)
        self.lengths = found.lengths
        return found.loss / (ROWS * (TEXT - 1)), {}

    def validate(self) -> dict[str, float]:
        return {}


def take_steps(
    config: AuroraConfig, stage: StageConfig, num_frames: int, world: World
) -> tuple[AuroraModel, list[int]]:
    """Train for two steps; returns the model and the lengths of its rows."""
    model = AuroraModel(config)
    init_tower(model.vision_tower)
    init_llama(model.language_model)
    prepare_model(model, stage)
    learner = AnswerLoss(model, merge=stage.merge, row_length=None)
    if stage.parallel is Parallel.fsdp:
        shard(learner, model.language_model.layers, world=world, precision=stage.precision)
    task = Fixed(model, learner, num_frames)
    learning = start_learning(task, stage)
    for step in range(2):
        train_step(learning, stage, step=step, world=world)
    return model, task.lengths


def measure(
    world: World,
    *,
    ratio: float,
    checkpointing: bool,
    precision: str = "fp32",
    trainable: list[str] | None = None,
    lora: bool = False,
    ranks: int = 1,
) -> dict[str, int]:
    """Train a small model in this process; returns the memory it took and what the plan says."""
    config, num_frames = (SMALL, FRAMES) if ranks == 1 else (WIDE, 2)
    stage = StageConfig(
        objective=Objective.conversations,
        precision=Precision(precision),
        activation_checkpointing=checkpointing,
        merge=MergeConfig(token_kept_ratio=ratio),
        trainable=trainable or [""],
        lora=LoraConfig(rank=8) if lora else None,
        packing=False,
        parallel=Parallel.none if ranks == 1 else Parallel.fsdp,
    )
    take_steps(TINY, stage, 1, world)
    base = process_bytes("VmRSS")
    lengths = take_steps(config, stage, num_frames, world)[1]
    most = process_bytes("VmHWM")
    assert base is not None
    assert most is not None
    taken = most - base
    with torch.device("meta"):
        model = prepare_model(AuroraModel(config), stage)
    side = config.vision.image_size
    work = Work(
        num_rows=ROWS,
        row_tokens=lengths[0],
        learned_tokens=ROWS * TEXT,
        clips=[(num_frames, side, side)] * ROWS,
        merge=stage.merge,
        masked=False,
        precision=stage.precision,
        activation_checkpointing=checkpointing,
        parallel=stage.parallel,
        num_ranks=ranks,
    )
    return {"taken": taken, "planned": plan_memory(model, work).peak}


def measure_afresh(**settings: Any) -> dict[str, int]:
    """Call `measure` in a process of its own, or in several ranks that share the model."""
    ranks = settings.get("ranks", 1)
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [sys.executable, "-m", *launcher, "tests.training.step_memory", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ) | ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torchrun_world(torch.device("cpu")) as this:
        result = measure(this, **json.loads(sys.argv[1]))
        if this.is_main:
            print(json.dumps(result))
