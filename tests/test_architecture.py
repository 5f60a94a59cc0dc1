"""The rules of the house that a program can check: layers, imports, the legend, file sizes, paths.

`LAYERS` is the one place where a module is given its layer; docs/architecture.md explains it.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from pixellm_jax.axes import AXES, LOGICAL

ROOT = Path(__file__).parents[1]
PACKAGES = ("pixellm_jax", "data_pipeline")
LAUNCHERS = ("scripts", "configs")  # above all layers; nobody imports them
LONGEST_FILE = 350

# A module imports only modules of a strictly lower number. The whole number is the layer of
# docs/architecture.md, the digit after the point orders modules inside a layer. `name.*` stands for
# the modules of a folder that have no line of their own.
LAYERS = {
    "pixellm_jax": 0.0,
    "pixellm_jax.axes": 0.0,
    "pixellm_jax.errors": 0.0,
    "pixellm_jax.perf.hlo": 0.0,
    "pixellm_jax.perf.host_memory": 0.0,
    "pixellm_jax.json_files": 0.1,
    "pixellm_jax.config": 1.0,
    "pixellm_jax.training.config": 1.0,
    "pixellm_jax.folders": 1.0,
    "pixellm_jax.images.rle": 1.0,
    "pixellm_jax.stopwatch": 1.0,
    "pixellm_jax.evaluation.record": 1.1,
    "pixellm_jax.benchmark_question": 0.2,
    "pixellm_jax.images.geometry": 1.0,
    "pixellm_jax.images.read": 1.0,
    "pixellm_jax.images.overlay": 1.0,
    "pixellm_jax.weights.torch_file": 1.0,
    "pixellm_jax.batch": 1.1,
    "pixellm_jax.weights.torch_config": 1.1,
    "pixellm_jax.weights.safetensors_file": 1.1,
    "pixellm_jax.weights.torch_folder": 1.2,
    "pixellm_jax.text.tokenizer": 1.0,
    "pixellm_jax.text.vocabulary": 1.1,
    "pixellm_jax.text.answer": 1.2,
    "pixellm_jax.text.prompt": 1.2,
    "pixellm_jax.evaluation.prompts": 1.3,
    "pixellm_jax.inference.request_checks": 1.0,
    "pixellm_jax.model": 2.0,
    "pixellm_jax.model.init": 2.0,
    "pixellm_jax.model.layers": 2.0,
    "pixellm_jax.model.lora": 2.1,
    "pixellm_jax.model.codebook": 3.0,
    "pixellm_jax.model.language_model": 3.0,
    "pixellm_jax.model.pixel_decoder": 3.0,
    "pixellm_jax.model.vision_encoder": 3.0,
    "pixellm_jax.model.pixellm": 4.0,
    "pixellm_jax.inference.sampling": 5.0,
    "pixellm_jax.inference.compilation": 5.0,
    "pixellm_jax.model.quantize": 5.0,
    "pixellm_jax.inference.prepare": 5.1,
    "pixellm_jax.model.flops": 2.0,
    "pixellm_jax.inference.decoding": 5.1,
    "pixellm_jax.inference.request": 5.2,
    "pixellm_jax.inference.image_cache": 5.3,
    "pixellm_jax.inference.mask_decoding": 5.4,
    "pixellm_jax.inference.engine": 5.5,
    "pixellm_jax.inference.service": 5.6,
    "pixellm_jax.weights.torch_layout": 5.0,
    "pixellm_jax.weights.lora_adapter": 5.1,
    "pixellm_jax.training.losses": 5.0,
    "pixellm_jax.evaluation.matching": 5.1,
    "pixellm_jax.training.optimizer": 5.0,
    "pixellm_jax.sharding": 1.1,
    "pixellm_jax.evaluation.metrics": 5.0,
    "pixellm_jax.evaluation.released_metrics": 5.2,
    "pixellm_jax.evaluation.summary": 5.1,
    "pixellm_jax.evaluation.scoring": 5.3,
    "pixellm_jax.evaluation.bootstrap": 5.1,
    "pixellm_jax.weights.checkpoint": 6.0,
    "pixellm_jax.weights.source": 6.1,
    "pixellm_jax.weights.convert": 6.2,
    "pixellm_jax.weights.convert_llava": 6.2,
    "pixellm_jax.training.validation": 6.1,
    "pixellm_jax.evaluation.free_running": 6.1,
    "pixellm_jax.evaluation.teacher_forced": 6.1,
    "pixellm_jax.training.export": 6.3,
    "pixellm_jax.experiments.recipe": 7.0,
    "pixellm_jax.weights.export": 6.1,
    "pixellm_jax.inference.stablehlo": 6.2,
    "pixellm_jax.inference.stablehlo_runner": 0.0,
    "pixellm_jax.inference.answer": 6.0,
    "pixellm_jax.evaluation.judge.question": 6.0,
    "pixellm_jax.evaluation.judge.prompt": 6.1,
    "pixellm_jax.evaluation.judge.cache": 6.2,
    "pixellm_jax.evaluation.judge.client": 6.3,
    "pixellm_jax.evaluation.judge.offline": 6.1,
    "pixellm_jax.evaluation.judge.judge": 6.1,
    "pixellm_jax.evaluation.judge.report": 6.2,
    "pixellm_jax.evaluation.text_scores": 5.0,
    "pixellm_jax.inference.predictor": 6.1,
    "pixellm_jax.training.state": 6.1,
    "pixellm_jax.training.step": 6.2,
    "pixellm_jax.training.checkpoints": 6.2,
    "pixellm_jax.training.log": 6.0,
    "pixellm_jax.training.recipe_record": 6.0,
    "pixellm_jax.perf.aot": 6.3,
    "pixellm_jax.training.loop": 6.3,
    "pixellm_jax.cli": 7.0,
    "pixellm_jax.report.samples_page": 7.0,
    "pixellm_jax.cli.progress": 7.0,
    "pixellm_jax.inference.answer_files": 7.0,
    "pixellm_jax.evaluation.settings": 6.9,
    "pixellm_jax.evaluation.run_folder": 7.0,
    "pixellm_jax.cli.processes": 7.0,
    "pixellm_jax.cli.table": 7.0,
    "pixellm_jax.report.curves": 7.0,
    "pixellm_jax.experiments.shapes_quiz": 7.0,
    "pixellm_jax.experiments.shapes_page": 7.05,
    "pixellm_jax.experiments.shapes_training": 7.05,
    "pixellm_jax.report.bars": 7.05,
    "pixellm_jax.report.published": 7.0,
    "pixellm_jax.report.numbers": 7.05,
    "pixellm_jax.cli.report_pictures": 7.0,
    "pixellm_jax.report.tables": 7.06,
    "pixellm_jax.cli.report_page": 7.07,
    "pixellm_jax.cli.report": 7.08,
    "pixellm_jax.cli.judge_options": 7.05,
    "pixellm_jax.experiments.ablation_grid": 7.06,
    "pixellm_jax.experiments.ablation_report": 7.0,
    "pixellm_jax.perf.parts": 7.0,
    "pixellm_jax.perf.sizes": 7.0,
    "pixellm_jax.perf.baseline": 7.0,
    "pixellm_jax.cli.bench_train": 7.05,
    "pixellm_jax.cli.bench_recital": 7.06,
    "pixellm_jax.cli.bench_generate": 7.07,
    "pixellm_jax.cli.*": 7.1,
    "pixellm_jax.cli.main": 7.2,
    # data_pipeline stands between layers 1 and 7.
    "data_pipeline": 2.0,
    "data_pipeline.config": 3.1,
    "data_pipeline.damage": 2.0,
    "data_pipeline.example": 2.0,
    "data_pipeline.formats.masks": 2.1,
    "data_pipeline.formats.pickle_machine": 2.0,
    "data_pipeline.formats.pickle": 2.1,
    "data_pipeline.formats.json_items": 2.1,
    "data_pipeline.reading": 2.2,
    "data_pipeline.formats.coco_index": 2.3,
    "data_pipeline.formats.label_map": 2.3,
    "data_pipeline.sources.shapes.scene": 2.1,
    "data_pipeline.sources.shapes.places": 2.2,
    "data_pipeline.sources.shapes.phrases": 2.2,
    "data_pipeline.sources.shapes.questions": 2.3,
    "data_pipeline.sources.shapes.tokenizer": 2.3,
    "data_pipeline.sources.shapes.tokenizer.__main__": 2.4,
    "data_pipeline.collate": 3.2,
    "data_pipeline.sources.*": 3.0,
    "data_pipeline.draws": 2.0,
    "data_pipeline.templates": 2.0,
    "data_pipeline.transforms": 3.0,
    "data_pipeline.sources": 3.1,
    "data_pipeline.storage.stored": 3.0,
    "data_pipeline.storage.shards": 3.2,
    "data_pipeline.benchmarks": 3.2,
    "data_pipeline.storage.builders": 4.0,
    "data_pipeline.curate.*": 4.0,
    "data_pipeline.curate": 4.1,
    "data_pipeline.loader": 5.0,
}
SEEN_BY_DATA_PIPELINE = 1  # the highest layer of pixellm_jax that data_pipeline may import
BANNED = {"torch", "torchvision", "tensorflow"}
# Packages that may be imported inside a function: optional ones, and one that imports PyTorch, too,
# where that is installed.
EXTRAS = {"apache_beam", "matplotlib", "openai", "rouge_score", "tensorboardX", "wandb"}
# What one module compares with, where that is installed; also inside its functions alone.
PEERS = {"pixellm_jax.perf.baseline": {"torch", "transformers"}}

ANNOTATIONS = {
    name
    for name, kind in vars(jaxtyping).items()
    if isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractDtype)
}
# Long axis names: the words of the legend that have no letter.
WORDS = LOGICAL - {axis.logical for axis in AXES.values()}
LETTERS = set(AXES)

# Hosts that a link may name. Add the host of a public page that a reader should open.
HOSTS = {
    "arxiv.org",
    "bottosson.github.io",
    "docs.astral.sh",
    "docs.jaxtyping.org",
    "flax.readthedocs.io",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "semver.org",
    "www.apache.org",
}
TEXT = {".cfg", ".ini", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
# A folder of one machine; written so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|root|farm|home/\w+)(?:/|\b)|\bfile:/" + "/")
URL_HOST = re.compile(r"\bhttps?://([\w-]+(?:\.[\w-]+)+)")


def layer(module: str) -> float | None:
    """Layer of a module of the packages; None for one that is not in the table."""
    return LAYERS.get(module, LAYERS.get(module.rpartition(".")[0] + ".*"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def violations(module: str, source: str) -> list[str]:
    """Every rule that `source`, standing as `module`, breaks."""
    tree = ast.parse(source)
    found = []
    if module.rpartition(".")[2] == "utils":
        found.append("a file is named after what is in it, not `utils`")
    if module.startswith(PACKAGES):
        if layer(module) is None:
            found.append("not in LAYERS of tests/test_architecture.py: add it with its layer")
        if len(source.splitlines()) > LONGEST_FILE:
            found.append(f"{len(source.splitlines())} lines, at most {LONGEST_FILE}: split it")
    for line, target in imports(tree):
        found += [f"line {line}: imports {target}: {why}" for why in import_faults(module, target)]
    found += [f"line {line}: {fault}" for line, fault in placed_imports(module, tree)]
    found += [f"line {line}: {fault}" for line, fault in legend_faults(tree)]
    return [f"{module}: {fault}" for fault in found]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if is_module(full) else str(node.module)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name in LAYERS or path.with_suffix(".py").is_file() or path.is_dir()


def import_faults(module: str, target: str) -> Iterator[str]:
    package, top = module.partition(".")[0], target.partition(".")[0]
    if target.startswith("."):
        yield "write the absolute name"
    if top in BANNED - PEERS.get(module, set()):
        yield "only tests may import it"
    if top in LAUNCHERS:
        yield "nobody imports scripts or configs"
    if top == "tensorflow_datasets" and package == "pixellm_jax":
        yield "only data_pipeline may import it"
    if package not in PACKAGES or top not in PACKAGES:
        return
    own, other = layer(module), layer(target)
    if other is None:
        yield "it is not in LAYERS of tests/test_architecture.py"
    elif own is not None and other >= own:
        yield f"layer {own} may import only layers below it, this is layer {other}"
    if package == "pixellm_jax" and top == "data_pipeline":
        if not module.startswith("pixellm_jax.cli."):
            yield "of pixellm_jax only cli sees data_pipeline"
    if package == "data_pipeline" and top == "pixellm_jax":
        if other is not None and int(other) > SEEN_BY_DATA_PIPELINE:
            yield f"data_pipeline sees pixellm_jax up to layer {SEEN_BY_DATA_PIPELINE}"


def placed_imports(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Imports inside functions that belong to the top of the file, and the other way round."""
    functions = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    inner = {found for function in functions for found in imports(function)}
    peers = PEERS.get(module, set())
    for line, target in sorted(inner):
        if target.partition(".")[0] not in EXTRAS | peers:
            yield line, f"imports {target} inside a function: only optional extras may be"
    for line, target in sorted(set(imports(tree)) - inner):
        if target.partition(".")[0] in peers:
            yield line, f"imports {target} at the top: it may be absent, import it where it is used"


def legend_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Axis names of annotations and letters of einsums that the legend does not have."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(
                value=ast.Name(id=name) | ast.Attribute(attr=name),
                slice=ast.Tuple(elts=[_, ast.Constant(value=str(shape))]),
            ) if name in ANNOTATIONS:
                unknown = axis_names(shape) - LETTERS - WORDS
            case ast.Call(
                func=ast.Name(id="einsum") | ast.Attribute(attr="einsum"),
                args=[ast.Constant(value=str(shape)), *_],
            ):
                unknown = set(re.findall("[A-Za-z]", shape)) - LETTERS
            case _:
                continue
        if unknown:
            yield node.lineno, f"{sorted(unknown)} in {shape!r}: not in pixellm_jax/axes.py"


def axis_names(shape: str) -> set[str]:
    """Names in a shape: "*b {size} 2*y ... 3" -> {"b", "y"}."""
    return set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\{[^{}]*\}", "", shape)))


@pytest.mark.parametrize("path", modules(*PACKAGES, *LAUNCHERS), ids=module_name)
def test_module_follows_the_rules(path):
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


def test_every_folder_of_a_package_is_installed():
    folders = {path.parent for path in modules(*PACKAGES)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def tracked_files() -> list[Path]:
    """Files that git tracks or would track; everything where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return [path for path in ROOT.rglob("*") if path.is_file()]
    return [ROOT / name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def foreign_text(text: str) -> list[str]:
    """Paths of one machine, and hosts that are not in `HOSTS`."""
    paths = [match.group() for match in MACHINE_PATH.finditer(text)]
    return paths + [host for host in URL_HOST.findall(text) if host not in HOSTS]


def test_files_name_no_machine():
    found = {}
    for path in tracked_files():
        if path.suffix in TEXT or path.parent == ROOT / ".ci":
            foreign = foreign_text(path.read_text(encoding="utf-8"))
            if foreign:
                found[str(path.relative_to(ROOT))] = foreign
    assert found == {}


GOOD = [
    ("pixellm_jax.training.losses", "import jax\nfrom pixellm_jax.model.pixellm import PixelLM\n"),
    ("pixellm_jax.model.codebook", "from pixellm_jax.model import layers\n"),
    ("pixellm_jax.cli.train", "from data_pipeline.loader import load\n"),
    ("pixellm_jax.cli.main", "from pixellm_jax.cli import segment\n"),
    ("data_pipeline.loader", "import tensorflow_datasets\nfrom pixellm_jax.batch import Batch\n"),
    ("scripts.segment", "from pixellm_jax.cli.main import main\n"),
    ("pixellm_jax.batch", 'x: Float[Array, "b *m 3 {size + 1} 2*y ... frequency"]\n'),
    ("pixellm_jax.training.losses", 'jnp.einsum("...btd,vd->...btv", x, w)\n'),
    ("pixellm_jax.perf.baseline", "def f():\n    import torch\n    import transformers\n"),
]


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_accepts(module, source):
    assert violations(module, source) == []


BAD = [
    ("pixellm_jax.axes", "import pixellm_jax.config", "layer 0.0 may import only"),
    ("pixellm_jax.model.codebook", "from pixellm_jax.model import vision_encoder", "layer 3.0"),
    ("pixellm_jax.model.codebook", "from pixellm_jax.model.pixellm import PixelLM", "layer 4.0"),
    ("pixellm_jax.cli.train", "from pixellm_jax.cli import segment", "layer 7.1 may import only"),
    (
        "pixellm_jax.training.loop",
        "from data_pipeline.loader import load",
        "only cli sees data_pipeline",
    ),
    (
        "data_pipeline.loader",
        "from pixellm_jax.training.losses import dice",
        "sees pixellm_jax up to",
    ),
    ("data_pipeline.loader", "from pixellm_jax.model.layers import x", "sees pixellm_jax up to"),
    ("pixellm_jax.evaluation.metrics", "from pixellm_jax.novelty import x", "it is not in LAYERS"),
    ("pixellm_jax.novelty", "", "add it with its layer"),
    ("pixellm_jax.model.utils", "", "named after what is in it"),
    ("pixellm_jax.training.loop", "import configs.pixellm_7b", "nobody imports scripts or configs"),
    ("configs.pixellm_13b", "from configs import pixellm_7b", "nobody imports"),
    ("pixellm_jax.weights.torch_layout", "import torch", "only tests may import it"),
    (
        "pixellm_jax.weights.torch_layout",
        "from torch.nn import functional",
        "only tests may import it",
    ),
    ("data_pipeline.loader", "def f():\n    import tensorflow as tf", "only tests may import it"),
    ("pixellm_jax.cli.bench", "def f():\n    import torch", "only tests may import it"),
    ("pixellm_jax.perf.baseline", "import torch", "at the top"),
    ("pixellm_jax.perf.baseline", "def f():\n    import tensorflow", "only tests may import it"),
    ("pixellm_jax.training.loop", "import tensorflow_datasets", "only data_pipeline may import it"),
    ("pixellm_jax.weights.torch_layout", "def f():\n    import json", "inside a function"),
    (
        "pixellm_jax.weights.torch_layout",
        "class A:\n    async def f(self):\n        import json",
        "inside a",
    ),
    ("pixellm_jax.weights.torch_layout", "from . import errors", "write the absolute name"),
    ("pixellm_jax.weights.torch_layout", "x = 1\n" * 351, "351 lines"),
    ("pixellm_jax.batch", 'x: Float[Array, "b Q"]', "['Q'] in 'b Q'"),
    ("pixellm_jax.batch", 'x: jaxtyping.UInt8[np.ndarray, "batch y"]', "['batch'] in"),
    ("pixellm_jax.batch", 'x: Int[Array, "4*W"] | None', "['W'] in"),
    ("pixellm_jax.training.losses", 'jnp.einsum("bQ->b", x)', "['Q'] in"),
]


@pytest.mark.parametrize(("module", "source", "message"), BAD)
def test_refuses(module, source, message):
    assert any(message in fault for fault in violations(module, source))


@pytest.mark.parametrize(
    "text", ["cd /{}ork/x", "see `/{}oot`", "http{}://pypi.example.net/simple"]
)
def test_refuses_text(text):
    fill = {"cd": "w", "see": "r"}.get(text.split()[0], "s")
    assert foreign_text(text.format(fill))


@pytest.mark.parametrize("text", ["frame/work", "~/work/x", "../work/", "https://arxiv.org/"])
def test_accepts_text(text):
    assert foreign_text(text) == []
