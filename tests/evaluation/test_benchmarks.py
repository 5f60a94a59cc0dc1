"""Benchmarks from end to end, with models that are right, wrong, random and tiny."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.benchmarks import (
    BENCHMARKS,
    find_benchmark,
    list_images,
    question_reader,
    read_questions,
)
from data_pipeline.errors import DamagedError
from pixellm_jax.benchmark_question import BenchmarkQuestion
from pixellm_jax.cli.main import main
from pixellm_jax.errors import InputError
from pixellm_jax.evaluation.metrics import merge
from pixellm_jax.evaluation.run import answer_share
from pixellm_jax.evaluation.run_folder import RunFolder, RunSettings
from pixellm_jax.evaluation.scoring import (
    Answered,
    make_record,
    make_released_line,
    released_scores,
)
from pixellm_jax.evaluation.summary import summarise, tally_record
from pixellm_jax.evaluation.teacher_forced import answer_teacher_forced
from pixellm_jax.experiments.question_images import image_reader
from pixellm_jax.images import rle
from pixellm_jax.report.page import write_report
from pixellm_jax.stopwatch import Stopwatch

PICTURES = 6
"""Of a split, at most; the small data root has fewer, but for shapes."""

# Logits of a tiny float32 network, in another order of summation.
TOLERANCE = 1e-4

PUBLISHED = [
    (b.name, split)
    for b in BENCHMARKS.values()
    if b.name != "jsonl" and not b.text_only
    for split in b.source.splits
]


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """A folder of JSONL: two turns about one picture, void pixels, and a line of names."""
    folder, rng = tmp_path / "people", np.random.default_rng(0)
    folder.mkdir()
    Image.fromarray(rng.integers(0, 256, (37, 53, 3), np.uint8)).save(folder / "a.png")
    for name, (top, left) in {"cup": (3, 5), "plate": (20, 30), "void": (3, 15)}.items():
        mask = np.zeros((37, 53), np.uint8)
        mask[top : top + 9, left : left + 13] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    targets = [{"phrase": name, "mask": f"{name}.png"} for name in ("cup", "plate")]
    turns = [
        {"question": "Where is the cup?", "answer": "Here: {seg}.", "targets": [0]},
        {"question": "And both?", "answer": "{seg} and {seg}.", "targets": [1, 0]},
        {"question": "Thanks?", "answer": "Welcome."},
    ]
    lines = [
        {"image": "a.png", "targets": targets, "void": "void.png", "conversations": [turns]},
        {"image": "a.png", "targets": targets},
        {"image": "no.png", "targets": targets},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@cache
def questions(name: str, split: str, root: Path) -> tuple[BenchmarkQuestion, ...]:
    benchmark, split = find_benchmark(name, split)
    found = list[BenchmarkQuestion]()
    for entry in list_images(benchmark, root, split)[:PICTURES]:
        try:
            found += read_questions(benchmark, root, split, entry).questions
        except DamagedError:  # items of MUSE without questions, and what `people` spoils
            assert name in ("muse", "jsonl")
    return tuple(found)


def right(question: BenchmarkQuestion) -> Answered:
    masks = rle.decode(question.truth, question.hw)
    logits = np.where(masks > 0, np.float32(0.5), np.float32(-0.5))
    return Answered(question, logits, question.expected, "stop")


def empty(question: BenchmarkQuestion) -> Answered:
    return Answered(question, np.zeros((0, *question.hw), np.float32), "Nothing.", "stop")


def noisy(question: BenchmarkQuestion) -> Answered:
    """From none to two masks too many, of noise; the same for the same question."""
    rng = np.random.default_rng(zlib.crc32(question.id.encode()))
    logits = right(question).logits
    logits = np.concatenate([logits, rng.standard_normal((2, *question.hw), np.float32)])
    kept = logits[: rng.integers(0, len(logits) + 1)]
    noise = 2 * rng.standard_normal(kept.shape, np.float32)
    return Answered(question, kept + noise, "[SEG]" * len(kept), "stop")


def answerer(answer: Callable[[BenchmarkQuestion], Answered]):
    def answer_all(questions, watch, left_out) -> Iterator[Answered]:
        return map(answer, questions)

    return answer_all


def settings(mode: str = "generated", compat: bool = False, **others) -> RunSettings:
    fields = {"benchmark": "muse", "split": "val", "mode": mode, "reference_compat": compat}
    return RunSettings(**fields | others)


def run(out: Path, name: str, root: Path, answer, hosts: int = 1, **options) -> bytes:
    """Evaluate on several hosts, one after the other; return questions.jsonl."""
    benchmark, split = find_benchmark(name)
    entries = list_images(benchmark, root, split)[:PICTURES]
    read = question_reader(benchmark, root, split)
    folders, sums = [], []
    for host in range(hosts):
        folders.append(RunFolder(out, settings(**options), host=host, hosts=hosts))
        sums.append(answer_share(entries, read, answerer(answer), folders[-1]))
    records = folders[0].merge()
    fresh = [record for record in records if record.id not in folders[0].completed]
    assert merge(*map(tally_record, fresh)) == merge(*sums)
    write_report(out, image_reader(root))
    return (out / "questions.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "split"), PUBLISHED, ids=map("/".join, PUBLISHED))
def test_right_and_empty_answers(name, split, data_root):
    asked = questions(name, split, data_root)
    assert asked and len({question.id for question in asked}) == len(asked)
    drawn = name == "shapes"
    assert all((data_root / question.picture).is_file() != drawn for question in asked)
    for given in (True, False):
        found = summarise(make_record(right(question), given=given) for question in asked)
        assert found.giou == found.ciou == found.t_acc == 1.0
        assert found.n_acc == 1.0 or (math.isnan(found.n_acc) and name != "grefcoco")
    found = summarise(make_record(empty(question), given=False) for question in asked)
    nothing = [not rle.area(mask) for question in asked for mask in question.truth]
    assert found.giou == sum(nothing) / len(nothing)  # where there is nothing, silence is right
    assert found.ciou == found.t_acc == 0.0
    assert (found.n_acc == 1.0) == any(nothing) == (name == "grefcoco")
    assert found.masks == len(nothing)


def test_groups_and_words(data_root, people):
    groups = {
        "muse": {"few", "many"},
        "grefcoco": {"no target", "one target", "several targets"},
        "reasonseg": {"short", "long"},
        "multirefcoco": {"sentences: 6", "sentences: 5", "sentences: 3"},
        "refcoco": set(),
    }
    for name, wanted in groups.items():
        asked = [q for s in ("val", "test_many") if (name, s) in PUBLISHED
                 for q in questions(name, s, data_root)]  # fmt: skip
        assert {group for question in asked for group in question.groups} == wanted
    for question in questions("muse", "val", data_root):
        assert question.question.endswith("Please respond with segmentation mask.")
        assert question.given.count("[SEG]") == len(question.truth) == len(question.descriptions)
        assert question.groups == (("few", "many")[len(question.truth) > 3],)
    sizes = [len(q.truth) for q in questions("multirefcocog", "val", data_root)]
    assert sizes == [6, 5, 1, 6, 5, 1, 6]
    one, two, none, cup, plate = questions("jsonl", "train", people)
    assert (one.id, plate.id) == ("jsonl/train/line 1/0", "jsonl/train/line 2/1")
    assert two.messages == ("<image>\nWhere is the cup?", "Here: [SEG].", "And both?")
    assert (two.given, two.descriptions) == ("[SEG] and [SEG].", ("plate", "cup"))
    assert (none.truth, none.given) == ((), "Welcome.")
    assert cup.question == "What is cup in this image? Please output segmentation mask."
    assert one.void is not None and rle.area(one.truth[0]) == 9 * 10  # 13 columns, 3 of them void


def test_void_pixels_do_not_count(people):
    for question in questions("jsonl", "train", people)[:2]:
        answered = right(question)
        unknown = rle.decode([question.void], question.hw)[0] > 0
        answered.logits[:, unknown] = 1
        assert summarise([make_record(answered, given=False)]).giou == 1.0


def test_order_of_predictions_does_not_matter(data_root):
    """But for equally cheap pairs; noise has none. Given answers are in the order of the truth."""
    rng = np.random.default_rng(1)
    for question in questions("muse", "test_many", data_root):
        answered = noisy(question)
        other = answered._replace(logits=rng.permutation(answered.logits))
        first, second = (tally_record(make_record(a, given=False)) for a in (answered, other))
        assert first == second
    (many,) = [q for q in questions("muse", "test_many", data_root) if len(q.truth) > 3][:1]
    turned = right(many)._replace(logits=right(many).logits[::-1])
    assert summarise([make_record(turned, given=False)]).giou == 1.0
    assert summarise([make_record(turned, given=True)]).giou < 1.0


def test_one_region_may_come_in_parts(data_root):
    for name, whole in (("refcoco", True), ("muse", False)):
        question = next(q for q in questions(name, "val", data_root) if rle.area(q.truth[0]) > 99)
        question = question._replace(truth=question.truth[:1], descriptions=())
        logits = right(question).logits
        upper, lower = logits.copy(), logits.copy()
        rows = np.flatnonzero((logits[0] > 0).any(axis=1))
        upper[:, np.median(rows).astype(int) :] = lower[:, : np.median(rows).astype(int)] = -1
        parts = Answered(question, np.concatenate([upper, lower]), "[SEG][SEG]", "stop")
        record = make_record(parts, given=False)
        assert (len(record.predicted), len(record.pairs)) == ((1, 1) if whole else (2, 2))
        assert (summarise([record]).giou == 1.0) == whole
        assert summarise([record]).right_count == 0.0


@pytest.fixture(scope="module")
def alone(data_root, tmp_path_factory) -> tuple[bytes, dict]:
    """What one host makes of noise, without an interruption."""
    out = tmp_path_factory.mktemp("alone") / "out"
    lines = run(out, "muse", data_root, noisy, compat=True)
    return lines, json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("hosts", [2, 8])
def test_any_number_of_hosts_gives_the_same(hosts, alone, data_root, tmp_path):
    assert run(tmp_path / "out", "muse", data_root, noisy, hosts, compat=True) == alone[0]
    report = json.loads((tmp_path / "out/report.json").read_text())
    for key in ("scores", "groups", "released", "left_out", "mode"):
        assert report[key] == alone[1][key]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in names if name.endswith("jsonl")} == {
        "questions.jsonl",
        "released.jsonl",
    }


def test_resumed_run_equals_an_uninterrupted_one(alone, data_root, tmp_path):
    out, seen = tmp_path / "out", list[str]()

    def stop(question: BenchmarkQuestion) -> Answered:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(question.id)
        return noisy(question)

    with pytest.raises(KeyboardInterrupt):
        run(out, "muse", data_root, stop, compat=True)
    path = out / "questions.jsonl"
    assert len(path.read_bytes().splitlines()) == 5
    path.write_bytes(path.read_bytes()[:-100])  # as when the machine goes down
    again = list[str]()

    def rest(question: BenchmarkQuestion) -> Answered:
        again.append(question.id)
        return noisy(question)

    assert run(out, "muse", data_root, rest, compat=True) == alone[0]
    assert seen[:4] == [i for i in seen if i not in again] and seen[4] in again
    report = json.loads((out / "report.json").read_text())
    assert report["scores"] == alone[1]["scores"] and report["released"] == alone[1]["released"]
    assert json.loads((out / "run.json").read_text())["questions"] == 5 + len(again)
    assert run(out, "muse", data_root, lambda _: pytest.fail("asked"), compat=True) == alone[0]


def test_another_evaluation_is_refused(data_root, tmp_path):
    run(tmp_path / "out", "muse", data_root, right)
    with pytest.raises(InputError, match="mode 'generated', now 'given'; choose another --out"):
        RunFolder(tmp_path / "out", settings(mode="given"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        RunFolder(tmp_path / "other", settings())


def test_confident_nonsense_is_right_for_the_released_code(data_root):
    """An extra prediction far above 0 counts as a perfect one (docs/reference_notes.md M1)."""
    asked = questions("muse", "val", data_root)
    answers = []
    for question in asked:
        answered = right(question)
        extra = np.full((1, *question.hw), 9, np.float32)
        answers.append(answered._replace(logits=np.concatenate([answered.logits, extra])))
    lines = [make_released_line(answered, given=False) for answered in answers]
    assert released_scores(lines)["giou"] == pytest.approx(1, abs=1e-4)  # it adds 1e-5
    masks = sum(len(question.truth) for question in asked)
    found = summarise(make_record(answered, given=False) for answered in answers)
    assert found.giou == pytest.approx(masks / (masks + len(asked)))
    assert found.ciou < 0.5


@pytest.mark.parametrize("key", ["m1", "m2", "m4", "m5", "m6", "m7", "m9"])
def test_released_scores_of_whole_runs(key, goldens):
    """Question by question, as they are logged, against the reference's run over all pictures."""
    table = json.loads((goldens / "data/metrics.json").read_text())
    case = next(case for case in table["muse"] if case["key"] == key)
    lines = []
    with np.load(goldens / "data/metrics.npz") as arrays:
        for number, image in enumerate(case["images"]):
            logits = arrays[f"{key}_{number}_pred"].astype(np.float32)
            truth = arrays[f"{key}_{number}_gt"]
            p = t = 0
            for i, (own, true) in enumerate(
                zip(image["pred_per_question"], image["gt_per_question"], strict=True)
            ):
                question = made_up(f"{key}/{number}/{i}", truth[t : t + true])
                answered = Answered(question, logits[p : p + own], "", "stop")
                lines.append(make_released_line(answered, given=False))
                p, t = p + own, t + true
    found, wanted = released_scores(lines), case["reference"]
    # The reference sums in float32, over at most a few dozen masks.
    assert (found["giou"], found["ciou"]) == pytest.approx(
        (wanted["giou"], wanted["ciou"]), abs=2e-6
    )


def made_up(key: str, truth: np.ndarray) -> BenchmarkQuestion:
    hw = (truth.shape[1], truth.shape[2])
    masks = tuple(rle.encode(mask == 1) for mask in truth)
    void = rle.encode((truth == 255).any(0)) if (truth == 255).any() else None
    return BenchmarkQuestion(key, "", b"", hw, ("?",), "", "", masks, void, (), (), united=False)


def test_given_answers_do_not_depend_on_their_row(varied, data_root):
    """Packed with others of its picture, or alone in a row: the same masks, and each once."""
    asked = [*questions("multirefcoco", "val", data_root)[:5]]
    asked.append(questions("shapes", "test", data_root)[0]._replace(truth=(), given=""))
    apart = [question._replace(id=f"{question.id}/alone") for question in asked]
    left_out: dict[str, str] = {}
    together, single = (
        {
            answered.question.id.removesuffix("/alone"): answered
            for answered in answer_teacher_forced(
                *varied, each, Stopwatch("io", rest="model"), left_out, max_batch=2
            )
        }
        for each in (asked, apart)
    )
    assert together.keys() == single.keys() == {question.id for question in asked}
    assert left_out == {}
    for question in asked:
        one, other = together[question.id], single[question.id]
        assert len(one.logits) == len(question.truth) and one.reason == "given"
        np.testing.assert_allclose(one.logits, other.logits, atol=TOLERANCE, rtol=TOLERANCE)


def command(tiny, out: Path, name: str, *more: str) -> list[str]:
    options = ["--checkpoint", str(tiny.jax), "--benchmark", name, "--out", str(out)]
    return ["evaluate", *options, "--rows", "4", "--max-new-tokens", "16", *more]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "generated") for name in BENCHMARKS),
        *((name, "given") for name in ("refcoco", "multirefcocog", "reasonseg", "muse", "jsonl")),
    ],
)
def test_command(name, mode, tiny, data_root, people, tmp_path, capfd):
    data = people if name == "jsonl" else data_root
    named = {"jsonl": "jsonl/train", "muse": "muse/test_less"}.get(name, name)
    more = ["--data", str(data), "--mode", mode, "--limit", "3" if name == "jsonl" else "1"]
    compat = BENCHMARKS[name].released == mode
    assert (
        main(command(tiny, tmp_path / "out", named, *more, *["--reference-compat"] * compat)) == 0
    )
    out, err = capfd.readouterr()
    assert err == "" and f", mode {mode}" in out
    assert ("not comparable" in out) == compat
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["mode"], report["benchmark"]) == (mode, name)
    lines = (tmp_path / "out/questions.jsonl").read_text().splitlines()
    assert report["scores"]["questions"] == len(lines) > 0
    assert sum(report["shares"].values()) == pytest.approx(1) and report["seconds_per_1000"] > 0
    assert report["data"] == data.resolve().name
    assert set(report["left_out"]) == ({"line 3"} if name == "jsonl" else set())
    assert (report["text"] is not None) == ("words: answers" in out) == BENCHMARKS[name].text_only


def test_text_scores_of_answers_in_words(data_root, tmp_path):
    """Right answers, but for one that says nothing of the expected and points at a target."""
    benchmark, split = find_benchmark("llava")
    entries = list_images(benchmark, data_root, split)[:2]
    folder = RunFolder(tmp_path, settings(benchmark="llava", split=split))
    first: list[str] = []

    def answer(question):
        first.append(question.id)
        said = question.expected if len(first) > 1 else "[SEG]!"
        logits = np.ones((int(len(first) == 1), *question.hw), np.float32)
        return Answered(question, logits, said, "stop")

    read = question_reader(benchmark, data_root, split)
    answer_share(entries, read, answerer(answer), folder)
    folder.merge()
    write_report(tmp_path, image_reader(data_root))
    count = len(first)
    assert count > 2
    text = json.loads((tmp_path / "report.json").read_text())["text"]
    assert text["answers"] == count
    for name, right in (("exact", count - 1), ("rouge_l", count - 1), ("marked", 1)):
        assert text[name] == pytest.approx(right / count), name
    assert f"Words of {count} answers" in (tmp_path / "report.md").read_text()
    assert f"Words of {count} answers" in (tmp_path / "index.html").read_text()


def test_answers_are_judged_at_once(tiny, data_root, tmp_path, capfd):
    """Equals `evaluate` followed by `judge`; repeating the command keeps the judge's scores."""
    more = ["--data", str(data_root), "--limit", "1", "--judge-offline"]
    assert main(command(tiny, tmp_path / "out", "muse/test_less", *more)) == 0
    out, err = capfd.readouterr()
    assert err == "" and "judge: shared words (offline" in out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["judged"]["questions_without_scores"] == 0
    assert main(command(tiny, tmp_path / "out", "muse/test_less", *more[:-1])) == 0
    again = json.loads((tmp_path / "out/report.json").read_text())
    assert again["judged"] == report["judged"]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("cocostuff", [], "no benchmark 'cocostuff': choose from refcoco, "),
        ("muse/testA", [], "muse has no split 'testA': choose from train, val, test_less"),
        ("muse/val", ["--split", "train"], "name one split"),
        ("muse", [], "give the folder of the datasets with --data"),
        ("muse", ["--data", "no folder"], "no folder: no such folder; check --data"),
        ("shapes", ["--limit", "0"], "--limit 0: expected at least 1"),
        ("shapes", ["--reference-compat"], "no numbers of shapes in mode generated"),
        ("muse", ["--data", ".", "--mode", "given", "--reference-compat"], "only of --mode gen"),
        ("muse", ["--data", "."], "muse_val.json"),
        ("muse", ["--data", ".", "--judge-model", "m"], "no judge: give"),
        ("muse", ["--data", ".", "--judge-offline", "--mode", "given"], "nothing to read"),
        ("llava", ["--data", ".", "--mode", "given"], "llava asks for words"),
        (
            "muse",
            ["--data", ".", "--mode", "given", "--weights", "int8"],
            "answers that the model",
        ),
    ],
)
def test_bad_input_is_one_line(name, more, message, tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command(tiny, tmp_path / "out", name, *more)) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("pixellm evaluate: ") and err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_empty_split_says_where_there_is_something(tiny, people, tmp_path, capfd):
    assert main(command(tiny, tmp_path / "out", "jsonl", "--data", str(people))) == 2
    assert "in the split 'val'; there are some in train" in capfd.readouterr().err


def test_a_question_of_shapes_has_one_kind():
    """Scenes of shapes: a group for each question."""
    benchmark, split = find_benchmark("shapes")
    entries: Sequence = list_images(benchmark, Path(), split)[:3]
    for entry in entries:
        found = read_questions(benchmark, Path(), split, entry).questions
        assert all(len(q.groups) == 1 and q.groups[0].startswith("kind: ") for q in found)
