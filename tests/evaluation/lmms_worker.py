"""What the adapter says outside of a run of lmms-eval, as one JSON line; run by the Python of `.venv-lmms`.

Argument: a folder with outputs/lmms as `aurora tinyworld` writes it.
"""

import json
import sys
from pathlib import Path

from aurora.runtime import define_missing_torchvision_ops

define_missing_torchvision_ops()

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402

from aurora.data.tinyworld.language import caption_prompts  # noqa: E402
from aurora.processing.video import load_visual  # noqa: E402


def main(folder: Path) -> None:
    from PIL import Image

    scenes = [json.loads(line) for line in (folder / "outputs/lmms/scenes.jsonl").read_text().splitlines()]
    paths = [str(folder / "outputs/lmms" / scene["video"]) for scene in scenes]
    model = get_model("aurora")(token_kept_ratio=0.4, schedule="exact", dtype="float32", device="cpu", batch_size=1)
    model.task_dict = {"task": {"test": scenes}}
    question = caption_prompts("main_object")[0]

    def ask(kind, *first, visuals, doc=0):
        arguments = (*first, lambda _: visuals, doc, "task", "test")
        return Instance(
            request_type=kind, arguments=arguments, idx=0, metadata={"task": "task", "doc_id": doc, "repeats": 1}
        )

    def generate(*questions, **settings):
        settings = {"max_new_tokens": 80, **settings}
        return model.generate_until([ask("generate_until", text, settings, visuals=seen) for text, seen in questions])

    def score(answer, visuals):
        return model.loglikelihood([ask("loglikelihood", question, answer, visuals=visuals)])[0]

    captions = generate((question, [paths[0]]), (question, [paths[1]]))
    frames = [Image.fromarray(frame) for frame in load_visual(paths[0], 8).frames]
    first, second = captions
    red = "color" if " is " not in first else first.split(" ")[1]
    calls = []
    answer = model.answer
    model.answer = lambda group: calls.append(len(group)) or answer(group)
    mixed = generate(
        (question, [paths[0]]), (caption_prompts("camera")[0], [paths[0]]), (question, [paths[1]]), (question, frames),
        (question, frames), ("Hello", None),
    )  # fmt: skip
    groups, errors = list(calls), []
    for attempt in (
        lambda: get_model("aurora")(pretrain="x"),
        lambda: generate((question, [{"array": 1}])),
        lambda: generate((question, ["missing.mp4"])),
    ):
        try:
            attempt()
        except ValueError as error:
            errors.append(str(error))
    report = {
        "captions": captions,
        "from_images": mixed[3],
        "with_placeholder": generate(("<image>\n" + question, [paths[0]]))[0],
        "until": generate((question, [paths[0]]), until=[red])[0],
        "word": red,
        "sampled_off": generate((question, [paths[0]]), do_sample=False, temperature=0.9, top_p=0.5, num_beams=1)[0],
        "mixed": mixed,
        "groups": groups,
        "own": score(first, [paths[0]]),
        "own_with_space": score(" " + first, [paths[0]]),
        "other": score(second, [paths[0]]),
        "by_function": model.loglikelihood(
            [ask("loglikelihood", question, lambda scene: scene["video"] + " " + first, visuals=[paths[0]])]
        )[0],
        "text_alone": score(first, None),
        "errors": errors,
    }
    print("REPORT " + json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
